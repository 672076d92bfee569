// The request that the page sends, as a person would write it elsewhere, in the words of each API that the server has.
// Keys stand as variables, never as values.
import { base, hasKey, inPath } from "./server.js";

const ONE_LINE = 60; // characters of a value that stays on the line

/** A value as Python or JavaScript writes it, on several lines where it is long. */
function literal(value, words, step, indent = "") {
  if (typeof value !== "object" || value === null) return words[String(value)] ?? JSON.stringify(value);
  const isList = Array.isArray(value);
  const parts = Object.entries(value).map(([name, one]) => `${isList ? "" : `${JSON.stringify(name)}: `}${literal(one, words, step, indent + step)}`);
  const [open, close] = isList ? "[]" : "{}";
  const short = `${open}${parts.join(", ")}${close}`;
  if (short.length <= ONE_LINE && !short.includes("\n")) return short;
  return `${open}\n${parts.map((part) => `${indent}${step}${part},\n`).join("")}${indent}${close}`;
}

const python = (value, indent = "") => literal(value, { true: "True", false: "False", null: "None" }, "    ", indent);
const json = (value) => literal(value, {}, "  ", "  ");
const root = () => base.href.replace(/\/$/, "");
const keyOf = (name) => (hasKey() ? `os.environ["${name}"]` : `"none"`);
const os = () => (hasKey() ? "import os\n\n" : "");
const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const comments = (notes, mark) => notes.map((note) => `${mark} ${note}\n`).join("");
const isEmpty = (found) => Object.keys(found).length === 0;

// --- a request in each language: `{path, body, read: [name, where, each], notes}`, where `read` says what is where in the answer

function curl({ path, body, notes }) {
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $EMBEDPOOL_KEY"` : "";
  return `${comments(notes, "#")}curl -s ${root()}${path} -H 'Content-Type: application/json'${key} \\\n  -d ${shell(JSON.stringify(body))}`;
}

function requests({ path, body, read: [name, where, each = []], notes }) {
  const key = hasKey() ? `, headers={"Authorization": f"Bearer {os.environ['EMBEDPOOL_KEY']}"}` : "";
  const [found, ofEach] = [where, each].map((parts) => parts.map((part) => `["${part}"]`).join(""));
  return `${os()}import requests

${comments(notes, "#")}answer = requests.post("${root()}${path}", json=${python(body)}${key}, timeout=60)
answer.raise_for_status()
${name} = ${ofEach ? `[one${ofEach} for one in answer.json()${found}]` : `answer.json()${found}`}`;
}

function javascript({ path, body, read: [name, where, each = []], notes }) {
  const key = hasKey() ? `, Authorization: \`Bearer \${process.env.EMBEDPOOL_KEY}\`` : "";
  const [found, ofEach] = [where, each].map((parts) => parts.map((part) => `.${part}`).join(""));
  return `${comments(notes, "//")}const answer = await fetch("${root()}${path}", {
  method: "POST",
  headers: { "Content-Type": "application/json"${key} },
  body: JSON.stringify(${json(body)}),
});
if (!answer.ok) throw new Error(await answer.text());
const ${name} = (await answer.json())${found}${ofEach ? `.map((one) => one${ofEach})` : ""};`;
}

/** The snippets of a request; `clients` are `{title: text}`, of libraries that send it. */
const inAll = (request, clients = {}) => [
  ["curl", curl(request)],
  ...Object.entries(clients).map(([name, text]) => [`Python: ${name}`, text]),
  ["Python: requests", requests(request)],
  ["JavaScript", javascript(request)],
];

function client(call, options) {
  const given = Object.entries(options).map(([name, one]) => `, ${name}=${python(one, "    ")}`).join("");
  const key = hasKey() ? `, api_key=os.environ["EMBEDPOOL_KEY"]` : "";
  return `${os()}from embedpool import Client

with Client("${root()}"${key}) as client:
    ${call.replace("OPTIONS", () => given)}`;
}

function cohere(call, reading) {
  return `${os()}import cohere

client = cohere.ClientV2(api_key=${keyOf("EMBEDPOOL_KEY")}, base_url="${root()}")
answer = client.${call}
${reading}`;
}

// --- options of /embed in the words of each API

const WHERE_CUT = { right: "END", left: "START", error: "NONE" };
const YES_OR_NO = { right: true, left: "START", error: false }; // START is a word that the server takes in every API
const WORDS = { // option → its name there, and its values where they have other names
  OpenAI: { dimensions: ["dimensions"] },
  "text-embeddings-inference": { prompt_name: ["prompt_name"], normalize: ["normalize"], dimensions: ["dimensions"] },
  Cohere: {
    dimensions: ["output_dimension"], truncate: ["truncate", WHERE_CUT],
    input_type: ["input_type", { query: "search_query", document: "search_document" }],
  },
  Jina: {
    dimensions: ["dimensions"], normalize: ["normalized"], truncate: ["truncate", YES_OR_NO],
    input_type: ["task", { query: "retrieval.query", document: "retrieval.passage" }],
  },
  Voyage: { dimensions: ["output_dimension"], input_type: ["input_type"], truncate: ["truncation", { right: true, error: false }] },
  infinity: { dimensions: ["dimensions"] },
  Ollama: { dimensions: ["dimensions"], truncate: ["truncate", YES_OR_NO] },
};

/** `{body, notes, own}`: the options as fields of an API; `own` are those in embedpool's words, which it takes in all of them. */
function inWordsOf(api, options, side) {
  const body = {}, own = {}, notes = [];
  for (const [option, value] of Object.entries(options)) {
    const [name, values = {}] = WORDS[api][option] ?? [];
    if (api === "text-embeddings-inference" && option === "truncate") {
      body.truncate = value !== "error";
      if (value !== "error") body.truncation_direction = value === "left" ? "Left" : "Right";
    } else if (name === undefined || (option === "truncate" && !(value in values))) {
      own[option] = option === "truncate" ? WHERE_CUT[value] : value;
    } else body[name] = values[value] ?? value;
  }
  if (!isEmpty(own)) notes.push(`Words of embedpool's that ${api} does not have: ${Object.keys(own).join(", ")}.`);
  if (api === "text-embeddings-inference") {
    if (!("truncate" in options) && side === "left") body.truncation_direction = "Left";
    if (!("normalize" in options)) notes.push("This API gives vectors of length 1 unless normalize is false, whatever the model does.");
  }
  return { body, own, notes };
}

/** What a library's call has no argument for, so that its vectors are others. */
const lacking = (name, found) => (found.length ? [`${name} has no way to say ${found.join(", ")}: its vectors are others.`] : []);

/** For each API `[[title, text]…]`, of texts and options; `side` is where the model cuts a text that is too long. */
export function embedding(model, texts, options, side) {
  const of = (api, path, body, where, each) => {
    const said = inWordsOf(api, options, side);
    return { path, body: { ...body, ...said.body, ...said.own }, read: ["vectors", where, each], notes: said.notes, said };
  };
  const native = { path: "/embed", body: { model, texts, ...(isEmpty(options) ? {} : { options }) }, read: ["vectors", ["vectors"]], notes: [] };
  const openai = of("OpenAI", "/v1/embeddings", { model, input: texts }, ["data"], ["embedding"]);
  const tei = of("text-embeddings-inference", `/tei/${inPath(model)}/embed`, { inputs: texts }, []);
  const ofCohere = of("Cohere", "/v2/embed", { model, texts, embedding_types: ["float"] }, ["embeddings", "float"]);
  const ollama = of("Ollama", "/api/embed", { model, input: texts }, ["embeddings"]);
  const called = (fields) => Object.entries(fields).map(([name, value]) => `, ${name}=${python(value)}`).join("");
  const { input_type: type = null, ...ofClient } = ofCohere.said.body;
  const { truncation_direction: direction, ...ofHub } = tei.said.body;
  const more = ofCohere.said.own;
  return {
    embedpool: inAll(native, { embedpool: client(`vectors = client.embed(${python(texts, "    ")}, model=${python(model)}OPTIONS)`, options) }),
    OpenAI: inAll(openai, { openai: `${os()}from openai import OpenAI

client = OpenAI(base_url="${root()}/v1", api_key=${keyOf("EMBEDPOOL_KEY")})
${comments(openai.notes, "#")}answer = client.embeddings.create(model=${python(model)}, input=${python(texts)}${called(openai.said.body)}${isEmpty(openai.said.own) ? "" : `, extra_body=${python(openai.said.own)}`})
vectors = [one.embedding for one in answer.data]` }),
    "text-embeddings-inference": inAll(tei, { huggingface_hub: `${os()}from huggingface_hub import InferenceClient

client = InferenceClient(model="${root()}/tei/${inPath(model)}"${hasKey() ? `, token=os.environ["EMBEDPOOL_KEY"]` : ""})
${comments([...tei.notes.filter((note) => !note.startsWith("Words")), ...lacking("huggingface_hub", Object.keys(tei.said.own))], "#")}vectors = client.feature_extraction(${python(texts)}${called(ofHub)}${direction ? `, truncation_direction=${python(direction.toLowerCase())}` : ""})` }),
    Cohere: inAll(ofCohere, { cohere: cohere(
      `embed(model=${python(model)}, texts=${python(texts)}, input_type=${python(type)}, embedding_types=["float"]${called(ofClient)}${isEmpty(more) ? "" : `, request_options={"additional_body_parameters": ${python(more)}}`})`,
      "vectors = answer.embeddings.float_", ) }),
    Jina: inAll(of("Jina", "/v1/embeddings", { model, input: texts }, ["data"], ["embedding"])),
    Voyage: inAll(of("Voyage", "/v1/embeddings", { model, input: texts }, ["data"], ["embedding"])),
    infinity: inAll(of("infinity", "/embeddings", { model, input: texts }, ["data"], ["embedding"])),
    Ollama: inAll(ollama, { ollama: `${os()}import ollama

client = ollama.Client(host="${root()}"${hasKey() ? `, headers={"Authorization": f"Bearer {os.environ['EMBEDPOOL_KEY']}"}` : ""})
${comments(lacking("ollama", [...Object.keys(ollama.said.own), ...(options.truncate === "left" ? ["where texts are cut"] : [])]), "#")}vectors = client.embed(${python(model)}, ${python(texts)}${called({ ...ollama.said.body, ...(options.truncate === "left" ? { truncate: true } : {}) })}).embeddings` }),
  };
}

/** The same of sparse rows, or of a vector for each token. */
export function otherOutput(model, texts, output, options, side) {
  const of = (api, path, body, where, each) => {
    const said = inWordsOf(api, options, side);
    const notes = said.notes.filter((note) => !note.includes("length 1")); // these rows have the model's own
    return { path, body: { ...body, ...said.body, ...said.own }, read: ["rows", where, each], notes };
  };
  const action = output === "sparse" ? "embed_sparse" : "embed_all";
  const native = { path: "/embed", body: { model, texts, options: { ...options, output } }, read: ["rows", ["vectors"]], notes: [] };
  return {
    embedpool: inAll(native, { embedpool: client(`rows = client.embed_${output}(${python(texts, "    ")}, model=${python(model)}OPTIONS)`, options) }),
    "text-embeddings-inference": inAll(of("text-embeddings-inference", `/tei/${inPath(model)}/${action}`, { inputs: texts }, [])),
    ...(output === "sparse" ? {} : { Jina: inAll(of("Jina", "/v1/multi-vector", { model, input: texts }, ["data"], ["embeddings"])) }),
  };
}

export function reranking(model, query, documents) {
  const request = (path, body, where) => ({ path, body, read: ["ranked", where], notes: [] });
  const body = { model, query, documents };
  const asArguments = `model=${python(model)}, query=${python(query)}, documents=${python(documents)}`;
  return {
    embedpool: inAll(request("/rerank", body, ["results"]), {
      embedpool: client(`ranked = client.rerank(${python(query)}, ${python(documents, "    ")}, model=${python(model)})`, {}) }),
    "text-embeddings-inference": inAll(request(`/tei/${inPath(model)}/rerank`, { query, texts: documents }, [])),
    Cohere: inAll(request("/v2/rerank", body, ["results"]), {
      cohere: cohere(`rerank(${asArguments})`, "ranked = [(one.index, one.relevance_score) for one in answer.results]") }),
    Jina: inAll(request("/v1/rerank", body, ["results"])),
    Voyage: inAll(request("/v1/rerank", { ...body, top_k: documents.length }, ["data"])),
  };
}

export function classifying(model, texts) {
  const request = (path, body, where) => ({ path, body, read: ["labels", where], notes: [] });
  return {
    embedpool: inAll(request("/classify", { model, input: texts }, ["data"]), {
      embedpool: client(`labels = client.classify(${python(texts, "    ")}, model=${python(model)})`, {}) }),
    "text-embeddings-inference": inAll(request(`/tei/${inPath(model)}/predict`, { inputs: texts.map((text) => [text]) }, [])),
  };
}
