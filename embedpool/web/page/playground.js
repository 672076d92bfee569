// Try a model: lines of text in, and what becomes of them. Nothing is kept, and texts go to this server alone.
import { html, noChange, nothing, svg } from "./vendor/lit-html/lit-html.js";
import { Directive, directive } from "./vendor/lit-html/directive.js";
import { live as liveValue } from "./vendor/lit-html/directives/live.js";
import { ask, inPath, refusal } from "./server.js";
import { classifying, embedding, otherOutput, reranking } from "./code.js";
import { bar } from "./charts.js";
import { copy, jsonl, labelsTsv, npy, save, tsv } from "./files.js";
import { bestProducts, cosine, cosines, kept, norm, order, principal, promptTokensOf, rankCorrelation } from "./maths.js";

const MOST_LINES = 200, MOST_LABELS = 15, LONGEST_LABEL = 28, MOST_WEIGHTS = 16, LETTER_WIDTH = 7;
const EXAMPLE = `The cat sleeps on the sofa.
A kitten naps on the couch.
Interest rates went up again.
The central bank raised its rate.
How do I bake sourdough bread?`;
const TABS = { // name → title, the kind of model that can do it, what it does
  vectors: ["Vectors", "embed", showVectors],
  compare: ["Compare", "embed", showCompare],
  search: ["Search", "embed", showSearch],
  map: ["Map", "embed", showMap],
  side: ["Two models", "embed", showSide],
  sparse: ["Sparse", "sparse", showSparse],
  match: ["Token vectors", "multivector", showMatch],
  rerank: ["Rerank", "rerank", showRerank],
  classify: ["Classify", "classify", showClassify],
  code: ["Code", null, showCode],
};
const state = {
  tab: "vectors", models: {}, other: "", text: EXAMPLE, query: "Where does the cat rest?", prompt: "", input_type: "", dimensions: "", truncate: "", normalize: "",
  result: null, running: false, stretch: false, hovered: null, api: "embedpool", visit: 0,
};
const OPTIONS = { embed: ["prompt", "input_type", "dimensions", "truncate", "normalize"], sparse: ["prompt", "input_type", "truncate"], multivector: ["truncate"] };
const QUERIED = ["search", "side"]; // tabs whose texts are documents to a query, so that their vectors may be others

/** Drawn anew only where one of `known` is another: the page is drawn at every poll, and some of it is large. */
const unlessSame = directive(class extends Directive {
  render(known, make) {
    return make();
  }

  update(part, [known, make]) {
    if (this.known?.every((one, i) => one === known[i])) return noChange;
    this.known = known;
    return make();
  }
});

/** What was made of an object the last time. */
const once = (make) => {
  const made = new WeakMap();
  return (of) => {
    if (!made.has(of)) made.set(of, make(of));
    return made.get(of);
  };
};
const [cosinesOf, principalOf] = [once(cosines), once(principal)];

/** Tabs whose texts are embedded alike share a result. */
const asksAs = (tab) => (QUERIED.includes(tab) ? tab : TABS[tab][1]);
const lines = () => state.text.split("\n").filter((line) => line.trim() !== "").slice(0, MOST_LINES);
/** A multi-vector model reranks by the vectors of tokens. */
const does = (model, kind) => model.kinds.includes(kind) || (kind === "rerank" && model.kinds.includes("multivector"));
/** The models that can do it, or may turn out to, those first that are ready. */
const can = (app, kind) => app.live.models
  .filter((model) => model.enabled && (does(model, kind) || (!model.kinds.length && model.state !== "failed")))
  .sort((a, b) => (b.state === "ready") - (a.state === "ready"));
const kindOf = (tab) => TABS[tab][1] ?? state.lastKind ?? "embed";

export function playground(app) {
  if (state.visit !== app.visit) [state.result, state.visit] = [null, app.visit];
  if (!app.live) return html`<p class="quiet">${app.refused ? refusal(app.refused) : "Asking the server …"}</p>`;
  const able = can(app, kindOf(state.tab));
  const kind = kindOf(state.tab);
  if (!able.some((model) => model.model === state.models[kind])) state.models[kind] = able[0]?.model ?? "";
  const model = app.model(state.models[kind]);
  const needsQuery = ["search", "side", "rerank", "match"].includes(state.tab) || (state.tab === "code" && kind === "rerank");
  const choose = (tab) => {
    if (TABS[tab][1]) state.lastKind = TABS[tab][1];
    if (tab !== "code" && state.result?.of !== asksAs(tab)) state.result = null;
    state.tab = tab;
    app.redraw();
  };
  const keys = (event) => {
    const names = Object.keys(TABS);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = names[(names.indexOf(state.tab) + step + names.length) % names.length];
    choose(next);
    document.getElementById(`tab-${next}`).focus();
  };
  return html`
    <div class="tabs" role="tablist" aria-label="Playground" @keydown=${keys}>${Object.entries(TABS).map(([name, [title]]) => html`
      <button role="tab" id="tab-${name}" aria-selected=${name === state.tab} aria-controls="panel" tabindex=${name === state.tab ? 0 : -1} @click=${() => choose(name)}>${title}</button>`)}</div>
    <div class="play" role="tabpanel" id="panel" aria-labelledby="tab-${state.tab}">
    ${able.length ? html`<form class="card ask" @submit=${(event) => { event.preventDefault(); run(app); }}>
        ${choice(app, "Model", able, kind)}
        ${state.tab === "side" ? choice(app, "Beside it", can(app, "embed"), "other") : nothing}
        ${needsQuery ? html`<label>Query <input class="query" dir="auto" autocomplete="off" spellcheck="false" .value=${liveValue(state.query)} @input=${set(app, "query")}></label>` : nothing}
        <label>${needsQuery ? "Documents, one a line" : "Texts, one a line"}
          <textarea rows="9" dir="auto" spellcheck="false" .value=${liveValue(state.text)} @input=${set(app, "text")}></textarea></label>
        ${OPTIONS[kind] ? options(app, model, OPTIONS[kind]) : nothing}
        ${state.tab === "code" ? nothing : html`<button class="first" ?disabled=${state.running}>
          ${state.running ? "Asking …" : { search: "Search", match: "Match", rerank: "Rerank", classify: "Classify", side: "Compare both", map: "Draw" }[state.tab] ?? "Embed"}</button>`}
        <span class="quiet">${lines().length} ${lines().length === 1 ? "line" : "lines"}${lines().length === MOST_LINES ? ", no more count here" : ""}</span>
      </form>
      <section class="result" aria-live="off">${state.result?.failed && state.tab !== "code" ? html`<div class="card failed message" role="alert">${state.result.failed}</div>`
        : unlessSame([state.tab === "code" ? {} : state.tab, state.result, state.stretch, state.hovered, model?.max_tokens, model?.truncation_side], () => TABS[state.tab][2](app, model))}</section>`
    : html`<section class="card empty"><h2>No ${{ embed: "embedder", sparse: "sparse model", multivector: "multi-vector model", rerank: "reranker", classify: "classifier" }[kind]} here</h2><p>Register one, for example:</p>
        <pre>${{
          embed: "embedpool register --model sentence-transformers/all-MiniLM-L6-v2 --type local_st",
          sparse: "embedpool register --model naver/splade-v3-distilbert --type local_st",
          multivector: "embedpool register --model lightonai/GTE-ModernColBERT-v1 --type local_st",
          rerank: "embedpool register --model cross-encoder/ms-marco-MiniLM-L6-v2 --type local_st",
          classify: "embedpool register --model SamLowe/roberta-base-go_emotions --type local_st",
        }[kind]}</pre></section>`}</div>`;
}

const set = (app, name) => (event) => {
  state[name] = event.target.value;
  app.redraw();
};

function choice(app, title, able, slot) {
  if (slot === "other") state.other ||= (able.find((one) => one.model !== state.models.embed && one.state === "ready") ?? able[0])?.model ?? "";
  const chosen = slot === "other" ? state.other : state.models[slot];
  const change = (event) => {
    if (slot === "other") state.other = event.target.value;
    else state.models[slot] = event.target.value;
    state.result = null;
    [state.prompt, state.dimensions] = ["", ""];
    app.redraw();
  };
  return html`<label>${title}<select @change=${change}>${able.map((one) => html`
    <option value=${one.model} ?selected=${one.model === chosen}>${one.alias ?? one.model}${one.runs_on.dim ? ` (${one.runs_on.dim})` : ""}${one.state === "ready" ? "" : `, ${one.state}`}</option>`)}</select></label>`;
}

function options(app, model, names) {
  const prompts = Object.entries(model?.prompts ?? {});
  const change = (name) => (event) => { state[name] = event.target.value; app.redraw(); };
  const choices = (name, title, all) => (names.includes(name) ? html`<label>${title}<select @change=${change(name)}>${all.map(([one, says]) => html`
      <option value=${one} ?selected=${one === state[name]}>${says}</option>`)}</select></label>` : nothing);
  return html`<details class="options"><summary>Options</summary><div class="fields">
    ${prompts.length ? choices("prompt", "Prompt", [["", "the model's own"], ...prompts.map(([name, text]) => [name, `${name}: ${text}`])]) : nothing}
    ${choices("input_type", "What the texts are for", ["", "query", "document", "classification", "clustering"].map((one) => [one, one || (QUERIED.includes(state.tab) ? "documents" : "not said")]))}
    ${names.includes("dimensions") ? html`<label>Dimensions<input type="number" min="1" max=${model?.runs_on.dim ?? nothing} placeholder=${model?.runs_on.dim ?? "all"} .value=${liveValue(state.dimensions)} @input=${set(app, "dimensions")}></label>` : nothing}
    ${choices("truncate", "Texts that are too long", [["", "as the model does"], ["right", "lose their end"], ["left", "lose their beginning"], ["error", "are an error"]])}
    ${choices("normalize", "Length 1", [["", "as the model does"], ["true", "yes"], ["false", "no"]])}</div></details>`;
}

/** The options as /embed has them. */
function chosenOptions() {
  const names = OPTIONS[kindOf(state.tab)] ?? [];
  const given = (name) => (names.includes(name) ? state[name] : "");
  const found = {};
  if (given("prompt")) found.prompt_name = state.prompt;
  else if (given("input_type")) found.input_type = state.input_type;
  if (Number(given("dimensions")) > 0) found.dimensions = Number(state.dimensions);
  if (given("truncate")) found.truncate = state.truncate;
  if (given("normalize")) found.normalize = state.normalize === "true";
  return found;
}

// --- asking

async function run(app) {
  const given = lines();
  if (!given.length) return app.say("Write a line of text first.", true);
  [state.running, state.result] = [true, null];
  app.redraw();
  const began = performance.now(), { visit } = app, of = asksAs(state.tab);
  const asking = { rerank: askRerank, sparse: askSparse, multivector: askMatch, classify: askClassify }[kindOf(state.tab)] ?? askVectors;
  let result = null;
  try {
    result = await asking(app, given);
    result.took_ms = performance.now() - began;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    result = { failed: error.message };
  } finally {
    state.running = false;
    if (visit === app.visit && result) state.result = { ...result, of }; // else it was another key's
    app.redraw();
  }
}

class Refused extends Error {}

async function asked(path, body) {
  const answer = await ask(path, body);
  if (!answer.ok) throw new Refused(refusal(answer));
  return answer;
}

async function embed(model, texts, options) {
  const { document, headers } = await asked("embed", { model, texts, options });
  return { vectors: document.vectors, dim: document.dim, meta: document.meta, space: headers.get("X-Embedpool-Space") };
}

async function askVectors(app, texts) {
  const { tab, query } = state;
  const { prompt_name, ...others } = chosenOptions();
  const model = state.models.embed;
  if (!QUERIED.includes(tab)) {
    const options = prompt_name ? { ...others, prompt_name } : others;
    return { texts, model, options, ...(await embed(model, texts, options)), ...(await tokensOf(app.model(model), texts, options)) };
  }
  // Lines are documents unless something else is said, the query is a query.
  const ofLines = { input_type: "document", ...others }, ofQuery = { ...others, input_type: "query" };
  const against = async (name, lines, one) => ({
    model: name, ...(await embed(name, texts, lines)), asked: (await embed(name, [query], one)).vectors[0],
    prompts: await Promise.all([one, lines].map((options) => promptOf(app.model(name), options))),
  });
  const found = { texts, query, ...(await against(model, prompt_name ? { ...others, prompt_name } : ofLines, ofQuery)) };
  if (tab === "side") found.other = await against(state.other, { ...ofLines, dimensions: undefined }, { ...ofQuery, dimensions: undefined });
  return found;
}

const tokenized = (model, inputs, { prompt_name, input_type }) =>
  ask(`tei/${inPath(model.model)}/tokenize`, { inputs, add_special_tokens: true, prompt_name, input_type });
const promptIn = (answer) => decodeURIComponent(answer.headers.get("X-Embedpool-Prompt") ?? "");

/** Tokens of texts as the model reads them, behind the prompt of the options; those of the prompt alone come last. */
async function tokensOf(model, texts, options) {
  if (model.is_remote) return { noTokens: "A remote service keeps its tokens to itself." };
  const answer = await tokenized(model, [...texts, ""], options);
  if (!answer.ok) return { noTokens: refusal(answer) };
  return { tokens: answer.document.slice(0, -1), prompt: promptIn(answer), promptTokens: promptTokensOf(answer.document.at(-1)) };
}

/** What stands before each text; null where only the service knows. */
async function promptOf(model, options) {
  if (model.is_remote) return null;
  const answer = await tokenized(model, [""], options);
  return answer.ok ? promptIn(answer) : null;
}

async function askSparse(app, texts) {
  const model = state.models.sparse;
  const ask = (more) => asked("embed", { model, texts, options: { ...chosenOptions(), output: "sparse", top_k: MOST_WEIGHTS, ...more } });
  try {
    const { document } = await ask(app.model(model).is_remote ? {} : { tokens: true });
    return { texts, sparse: document.vectors, meta: document.meta };
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    const { document } = await ask({}); // of a model whose dimensions are no tokens
    return { texts, sparse: document.vectors, meta: document.meta };
  }
}

async function askMatch(app, texts) {
  const vectors = async (some, type) =>
    (await asked("embed", { model: state.models.multivector, texts: some, options: { ...chosenOptions(), output: "multivector", input_type: type } })).document;
  const [query, documents] = [await vectors([state.query], "query"), await vectors(texts, "document")];
  return { texts, query: state.query, dim: documents.dim, meta: documents.meta, products: documents.vectors.map((one) => bestProducts(query.vectors[0], one)) };
}

async function askRerank(app, documents) {
  const { document } = await asked("rerank", { model: state.models.rerank, query: state.query, documents });
  return { texts: documents, query: state.query, ranked: document.results, meta: document.meta };
}

async function askClassify(app, texts) {
  const { document } = await asked("classify", { model: state.models.classify, input: texts });
  return { texts, labels: document.data };
}

// --- what came

const cut = (text) => {
  const characters = Array.from(text);
  return characters.length > LONGEST_LABEL ? `${characters.slice(0, LONGEST_LABEL - 1).join("")}…` : text;
};
const hint = (text) => html`<p class="quiet hint">${text}</p>`;
const bdi = (text) => html`<bdi>${text}</bdi>`;

const quoted = (text) => html`<code class="prompt">${text}</code>`;
const promptsOf = ({ prompts: [ofQuery, ofLines] }) => html`prompt of the query ${said(ofQuery)}, of the lines ${said(ofLines)}`;
const said = (prompt) => (prompt === null ? "the service's own" : prompt ? quoted(prompt) : "none");

function told(result) {
  const { meta } = result;
  return html`<p class="told quiet">${[
    result.dim && `${result.dim} numbers`,
    result.space && html`space <code>${result.space}</code>`,
    meta && typeof meta.tokens === "number" && `${meta.tokens} tokens`,
    meta && `queue ${meta.queue_ms.toFixed(1)} ms, compute ${meta.compute_ms.toFixed(1)} ms, ${meta.total_ms.toFixed(1)} ms on the server`,
    result.took_ms && `${result.took_ms.toFixed(0)} ms here`,
    result.prompt && html`prompt ${quoted(result.prompt)}`,
    result.prompts && promptsOf(result),
  ].filter(Boolean).map((part, i) => html`${i ? " · " : ""}${part}`)}</p>`;
}

function showVectors(app, model) {
  const { result } = state;
  if (!result) return hint("Each line becomes a vector. You see its tokens one by one, and what was cut.");
  const limit = model?.max_tokens ?? null;
  return html`${told(result)}
    ${result.noTokens ? html`<p class="quiet">${result.noTokens}</p>` : nothing}
    ${result.texts.map((text, i) => vector(result, text, i, limit, model))}
    <div class="bar">Save ${[["npy", saveNpy], ["jsonl", saveJsonl], ["tsv", saveTsv]].map(([name, action]) => html`<button @click=${() => action(result)}>.${name}</button>`)}
      <button @click=${() => copy(app, JSON.stringify(result.vectors), "The vectors are in the clipboard.")}>Copy JSON</button></div>`;
}

const saveNpy = ({ vectors }) => save("vectors.npy", npy(vectors), "application/octet-stream");
const saveJsonl = ({ texts, vectors }) => save("vectors.jsonl", jsonl(texts, vectors), "application/jsonl");
const saveTsv = ({ texts, vectors }) => {
  save("vectors.tsv", tsv(vectors), "text/tab-separated-values");
  save("texts.tsv", labelsTsv(texts), "text/tab-separated-values");
};

function vector(result, text, i, limit, model) {
  const numbers = result.vectors[i];
  const tokens = result.tokens?.[i];
  const wasCut = result.meta.truncated.includes(i);
  const side = result.options.truncate === "left" ? "left" : model?.truncation_side ?? "right";
  const stays = tokens ? kept(tokens, wasCut ? limit : null, side, result.options.truncate === "left" ? result.promptTokens : 0) : [];
  const ofPrompt = Array.from(result.prompt ?? "").length; // characters
  const looks = (token, j) => `token ${token.special ? "special" : token.stop <= ofPrompt ? "prompt" : ""} ${stays[j] ? "" : "lost"}`;
  const lost = stays.filter((one) => !one).length;
  return html`<article class="card vector">
    <h3>${bdi(text)}</h3>
    ${tokens ? html`<p class="tokens" dir="auto">${tokens.map((token, j) => html`<span class=${looks(token, j)} title="id ${token.id}${!token.special && token.stop <= ofPrompt ? ", of the prompt" : ""}${stays[j] ? "" : ", cut off"}">${token.text}</span>`)}</p>` : nothing}
    <p class="quiet">${tokens ? html`${tokens.length} tokens · ` : nothing}${wasCut ? html`<span class="bad">cut: ${lost ? `${lost} tokens at the ${side === "left" ? "beginning" : "end"} are lost` : "the service says so"}</span> · ` : nothing}norm ${norm(numbers).toFixed(4)}</p>
    <p class="numbers"><code>${numbers.slice(0, 8).map((one) => one.toFixed(4)).join("  ")}${numbers.length > 8 ? "  …" : ""}</code></p></article>`;
}

function showCompare(app) {
  const { result } = state;
  if (!result?.vectors) return hint("How alike the lines are: the cosine of each pair.");
  const found = cosinesOf(result.vectors);
  const off = found.flatMap((row, i) => row.filter((_, j) => i !== j));
  const [low, high] = state.stretch && off.length ? [Math.min(...off), Math.max(...off)] : [-1, 1];
  const shade = (one) => Math.max(0, Math.min(20, Math.round((20 * (one - low)) / (high - low || 1))));
  return html`${told(result)}
    <label class="inline"><input type="checkbox" .checked=${state.stretch} @change=${(event) => { state.stretch = event.target.checked; app.redraw(); }}> stretch the colours over what is there; else they go from −1 to 1</label>
    <div class="scroll card" tabindex="0"><table class="heat"><caption class="hidden">Cosines of the lines</caption>
      <thead><tr><td></td>${result.texts.map((text, i) => html`<th scope="col" title=${text}>${i + 1}</th>`)}</tr></thead>
      <tbody>${found.map((row, i) => html`<tr><th scope="row" title=${result.texts[i]}>${i + 1}. ${bdi(cut(result.texts[i]))}</th>
        ${row.map((one, j) => html`<td class="shade-${shade(one)}" title="${result.texts[i]} · ${result.texts[j]}">${one.toFixed(2)}</td>`)}</tr>`)}</tbody></table></div>`;
}

function bars(texts, scores, digits, places = null) {
  const most = Math.max(...scores.map(Math.abs), 1e-9);
  return html`<ol class="ranked">${order(scores).map((i) => html`<li><span class="score">${scores[i].toFixed(digits)}</span>
    ${bar(scores[i] / most)}
    <span class="what">${bdi(texts[i])} ${places ? html`<span class="quiet">${places[i]}</span>` : nothing}</span></li>`)}</ol>`;
}

function showSearch() {
  const { result } = state;
  if (!result?.asked) return hint("A query against the lines, by the cosine of their vectors. The query is embedded as one where the model tells queries from documents.");
  return html`${told(result)}<div class="card">${bars(result.texts, result.vectors.map((one) => cosine(result.asked, one)), 4)}</div>`;
}

function showSparse() {
  const { result } = state;
  if (!result?.sparse) return hint("What each line weighs in the words of the model's vocabulary, the heaviest first: a search index stores these as they are.");
  return html`${told(result)}${result.texts.map((text, i) => {
    const { indices, values, tokens } = result.sparse[i];
    return html`<article class="card"><h3>${bdi(text)}</h3>
      ${indices.length ? bars(indices.map((index, j) => tokens?.[j] || `dimension ${index}`), values, 3) : html`<p class="quiet">Nothing weighs anything.</p>`}</article>`;
  })}`;
}

function showMatch() {
  const { result } = state;
  if (!result?.products) return hint("How well each vector of a line is met by one of the query's: the darker, the better. The score is the sum of the query's best products.");
  return html`${told(result)}${order(result.products.map((one) => one.score)).map((i) => {
    const { score, ofDocument } = result.products[i];
    return html`<article class="card"><h3>${bdi(result.texts[i])}</h3>
      <p class="quiet">score ${score.toFixed(4)} · ${ofDocument.length} vectors</p>
      <p class="strip" role="img" aria-label="${ofDocument.length} vectors, the best product ${Math.max(...ofDocument, 0).toFixed(3)}">${ofDocument.map((one, j) => html`
        <span class="shade-${Math.max(0, Math.min(20, Math.round(20 * one)))}" title="vector ${j + 1}: ${one.toFixed(3)}"></span>`)}</p></article>`;
  })}`;
}

function showRerank() {
  const { result } = state;
  if (!result?.ranked) return hint("A reranker reads the query and each line together, and says how well they fit. A multi-vector model compares the vectors of their tokens.");
  const scores = [];
  for (const { index, score } of result.ranked) scores[index] = score;
  return html`${told(result)}<div class="card">${bars(result.texts, scores, 4)}</div>
    ${result.meta.truncated.length ? html`<p class="bad">Cut: lines ${result.meta.truncated.map((i) => i + 1).join(", ")}</p>` : nothing}`;
}

function showClassify() {
  const { result } = state;
  if (!result?.labels) return hint("A classifier gives each line the labels of its model.");
  return html`${result.texts.map((text, i) => html`<article class="card"><h3>${bdi(text)}</h3>
    ${bars(result.labels[i].slice(0, 8).map((one) => one.label), result.labels[i].slice(0, 8).map((one) => one.score), 3)}</article>`)}`;
}

function showMap(app) {
  const { result } = state;
  if (!result?.vectors) return hint("The lines on the two axes along which their vectors differ most.");
  const found = principalOf(result.vectors);
  if (found.reason) return html`<p class="card">${found.reason}</p>`;
  const [across, up] = [0, 1].map((axis) => Math.max(...found.points.map((point) => Math.abs(point[axis])), 1e-9));
  const most = Math.max(across, up);
  const at = ([x, y]) => [300 + (265 * x) / most, 210 - (185 * y) / most];
  const near = (i) => order(result.vectors.map((one, j) => (i === j ? -2 : cosine(result.vectors[i], one)))).slice(0, 3);
  const hovered = state.hovered !== null && state.hovered < result.texts.length ? state.hovered : null;
  const hover = (i) => () => { state.hovered = i; app.redraw(); };
  const places = found.points.map(at);
  const many = found.points.length > MOST_LABELS;
  const labels = result.texts.map((text, i) => (many ? `${i + 1}` : cut(text)));
  const taken = []; // [left, right, height] of the labels so far
  const heights = places.map(([x, y], i) => { // beside its dot; lower where an earlier one stands
    const width = 10 + LETTER_WIDTH * labels[i].length;
    const [left, right] = x > 300 ? [x - width, x] : [x, x + width];
    let height = y;
    while (taken.some(([from, to, other]) => from < right && left < to && Math.abs(other - height) < 14)) height += 15;
    taken.push([left, right, height]);
    return height;
  });
  return html`${told(result)}
    <figure class="card map"><svg viewBox="0 0 600 420" role="group" aria-label="Map of the lines">
      <path class="axis" d="M20 210H580M300 15V405"/>
      ${found.points.map((_, i) => {
        const [x, y] = places[i];
        return dotAt(x, y, heights[i], labels[i], result.texts[i], hover(i));
      })}${hovered === null ? nothing : above(...places[hovered], heights[hovered], labels[hovered])}</svg>
      <figcaption>The two axes show ${Math.round(100 * (found.shares[0] + found.shares[1]))}% of what tells the vectors apart
        (${Math.round(100 * found.shares[0])}% across, ${Math.round(100 * found.shares[1])}% up). Distances here are not similarities.</figcaption></figure>
    ${hovered === null ? hint("Point at a dot, or reach it with the Tab key, to see which lines are nearest to it by all numbers of its vector.")
    : html`<div class="card"><h3>${hovered + 1}. ${bdi(result.texts[hovered])}</h3><p class="quiet">Nearest by the whole vector:</p>
        <ol class="ranked">${near(hovered).filter((j) => j !== hovered).map((j) => html`<li><span class="score">${cosine(result.vectors[hovered], result.vectors[j]).toFixed(3)}</span> <span class="what">${bdi(result.texts[j])}</span></li>`)}</ol></div>`}`;
}

const labelAt = (x, y, label) => svg`<text x=${x + (x > 300 ? -10 : 10)} y=${y + 4} text-anchor=${x > 300 ? "end" : "start"}>${label}</text>`;

function dotAt(x, y, labelY, label, text, hover) {
  return svg`<g class="dot" tabindex="0" role="img" aria-label=${text} @mouseenter=${hover} @focus=${hover}>
    <title>${text}</title><circle cx=${x} cy=${y} r="6"></circle>${labelAt(x, labelY, label)}</g>`;
}

/** The chosen dot once more, above all others; its place among them is kept for the keyboard. */
const above = (x, y, labelY, label) => svg`<g class="dot chosen" aria-hidden="true"><circle cx=${x} cy=${y} r="6"></circle>${labelAt(x, labelY, label)}</g>`;

function showSide() {
  const { result } = state;
  if (!result?.other) return hint("The same query and lines through two models: what would change if one took the other's place.");
  const first = result.vectors.map((one) => cosine(result.asked, one));
  const second = result.other.vectors.map((one) => cosine(result.other.asked, one));
  const place = (scores) => {
    const found = [];
    order(scores).forEach((i, rank) => { found[i] = rank; });
    return found;
  };
  const [before, after] = [place(first), place(second)];
  const moved = (from, to) => from.map((rank, i) => (rank === to[i] ? "" : rank > to[i] ? `▲ ${rank - to[i]} there` : `▼ ${to[i] - rank} there`));
  return html`<p class="told quiet">Rank correlation ${rankCorrelation(first, second).toFixed(3)}.
      ${result.space && result.space === result.other.space ? "Both give vectors of one space." : "Their vectors are of different spaces: a store that holds those of one has to be filled anew for the other."}</p>
    ${[result, result.other].map((one) => html`<p class="told quiet">${bdi(one.model)}: ${promptsOf(one)}</p>`)}
    <div class="two"><div class="card"><h3>${bdi(result.model)} <small class="quiet">${result.dim} numbers</small></h3>${bars(result.texts, first, 3, moved(before, after))}</div>
      <div class="card"><h3>${bdi(result.other.model)} <small class="quiet">${result.other.dim} numbers</small></h3>${bars(result.texts, second, 3)}</div></div>`;
}

function showCode(app, model) {
  const kind = kindOf("code");
  const name = state.models[kind];
  const apis = {
    embed: () => embedding(name, lines(), chosenOptions(), model?.truncation_side), rerank: () => reranking(name, state.query, lines()),
    classify: () => classifying(name, lines()),
  }[kind]?.() ?? otherOutput(name, lines(), kind, chosenOptions(), model?.truncation_side);
  if (!(state.api in apis)) state.api = "embedpool";
  return html`<label class="api">API<select @change=${(event) => { state.api = event.target.value; app.redraw(); }}>${Object.keys(apis).map((one) => html`
      <option ?selected=${one === state.api}>${one}</option>`)}</select></label>
    ${apis[state.api].map(([title, text]) => html`<section class="card code"><div class="bar"><h3>${title}</h3>
      <button @click=${() => copy(app, text, "It is in the clipboard.")}>Copy</button></div><pre tabindex="0">${text}</pre></section>`)}`;
}
