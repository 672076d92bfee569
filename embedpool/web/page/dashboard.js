// The pool as it is: one table of models, details under a row, and what an admin may do to them.
import { html, nothing, svg } from "./vendor/lit-html/lit-html.js";
import { repeat } from "./vendor/lit-html/directives/repeat.js";
import { bar, compact, draw, duration, exact, forgetClosed, sparkline, time } from "./charts.js";
import { copy } from "./files.js";
import { refusal } from "./server.js";
import { actions, clearCache, registration, reload } from "./manage.js";

const STATES = { // what a state looks like, and what it means
  ready: ["●", "ready", "Serves requests"],
  idle: ["◌", "idle", "Loads when somebody asks for it"],
  loading: ["◔", "loading", "Its files are read, or its replicas start"],
  draining: ["◑", "draining", "Answers what it has and takes nothing new"],
  disabled: ["○", "disabled", "Registered, and switched off"],
  failed: ["▲", "failed", "No replica of it loads"],
};
const COLUMNS = [ // title, what it is sorted by, the most first but for names, what it tells
  ["Model", (m) => m.model, "Name, alias, and what it is"],
  ["Replicas", (m) => -m.replicas, "Those that are ready, of those that there are"],
  ["Queue", (m) => -m.queue_len, "Texts that wait, and how many may"],
  ["Texts/s", (m) => -m.last_minute.texts_s, "Over the last minute; the line shows ten"],
  ["p50", (m) => -(m.last_minute.p50_ms ?? -1), "From a request's arrival to its numbers, last minute; the bound of a bucket"],
  ["p95", (m) => -(m.last_minute.p95_ms ?? -1), "As p50"],
  ["p99", (m) => -(m.last_minute.p99_ms ?? -1), "As p50"],
  ["Batch", (m) => -(m.last_minute.texts_a_batch ?? -1), "Texts in a batch, mean of the last minute"],
  ["Padding", (m) => -(m.last_minute.padding ?? -1), "Share of the computed tokens that only fills batches up, last minute"],
  ["Errors", (m) => -errors(m), "Requests refused or failed in the last minute, by code"],
];
const KINDS = { embed: "embedder", rerank: "reranker", classify: "classifier" };
const copyIcon = html`<svg viewBox="0 0 16 16" width="13" height="13" aria-hidden="true">${svg`<path d="M5.5 5.5h8v8h-8zM10.5 5.5v-3h-8v8h3"/>`}</svg>`;
const SPACE_SHOWN = 8; // characters; the details have all
const open = new Set();
let sorted = -1;

const errors = (model) => Object.values(model.last_minute.errors).reduce((a, b) => a + b, 0);

export function dashboard(app) {
  const { live, refused } = app;
  if (refused) return html`<section class="card empty"><h2>${refused.status === 401 ? "A key is asked for" : "Not with this key"}</h2><p>${refusal(refused)}</p>
    <p class="quiet">Enter one above. <code>embedpool key create</code> makes one.</p></section>`;
  if (!live) return html`<p class="quiet">Asking the server …</p>`;
  const models = [...live.models];
  if (sorted >= 0) models.sort((a, b) => compare(COLUMNS[sorted][1](a), COLUMNS[sorted][1](b)));
  return html`
    ${live.admin && live.reload?.ok === false ? html`<section class="card failed" role="alert"><h2>pool.yml is not followed</h2>
      <p class="message">${live.reload.error}</p><p class="quiet">The pool serves what it served before. Noticed ${live.reload.at}.</p></section>`
    : live.reload_ok === false ? html`<section class="card failed"><p>pool.yml is not followed: it has a fault, which whoever may manage is shown.</p></section>` : nothing}
    <div class="tiles">${tiles(app)}</div>
    ${models.length ? html`<div class="scroll card" tabindex="0" role="region" aria-label="Models">
      <table class="models"><caption>Rates, times, batches and errors are those of the last 60 s; state, replicas and queue are of now.</caption>
      <thead><tr><th scope="col">State</th>${COLUMNS.map(([title, , says], i) => html`
        <th scope="col" aria-sort=${sorted !== i ? nothing : i ? "descending" : "ascending"} class=${i > 0 ? "number" : nothing}>
          <button class="plain" title=${says} @click=${() => { sorted = sorted === i ? -1 : i; app.redraw(); }}>${title}${sorted !== i ? "" : i ? " ↓" : " ↑"}</button></th>`)}
      </tr></thead>
      <tbody>${repeat(models, (model) => model.model, (model) => row(app, model))}</tbody></table></div>`
    : html`<section class="card empty"><h2>No model yet</h2><p>Register one, here or on the command line:</p>
        <pre>embedpool register --model sentence-transformers/all-MiniLM-L6-v2 --type local_st --alias minilm</pre></section>`}
    ${live.admin && live.candidates?.length ? html`<section class="card"><h2>Being registered</h2>${live.candidates.map((one) => html`
      <p><b>${one.model}</b> <span class="quiet">${one.state}</span> ${progress(one.progress)}</p>`)}</section>` : nothing}
    ${live.admin ? html`<div class="bar">${registration(app)} ${reload(app)}</div>${cache(app)}`
    : html`<p class="quiet">To register, switch off or remove models enter a key of scope admin, or use the command line.</p>`}`;
}

function cache(app) {
  if (!app.live.cache) return nothing; // of a key that is for some models alone
  const { memory, disk } = app.live.cache;
  if (!memory.max_bytes && !disk) return nothing;
  const layer = (name, found) => html`<div><dt>${name}</dt><dd>${found.off ? html`<span class="bad">off: ${found.off}</span>` : html`
    ${exact(found.entries)} rows, ${megabytes(found.bytes)} of ${megabytes(found.max_bytes)} MB ${bar(found.bytes / found.max_bytes)}
    ${found.evicted ? `${exact(found.evicted)} gave way to others` : nothing}`}</dd></div>`;
  return html`<section class="card"><h2>Cache</h2>
    <dl class="known">${memory.max_bytes ? layer("In memory", memory) : nothing}${disk ? layer("On the disk", disk) : nothing}</dl>
    ${clearCache(app)}</section>`;
}

const megabytes = (bytes) => (bytes < 1e7 ? (bytes / 1e6).toFixed(1) : Math.round(bytes / 1e6));
const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);

function tiles(app) {
  const { models } = app.live;
  const sum = (of) => models.reduce((total, model) => total + of(model), 0);
  const serving = models.filter((model) => model.state === "ready").length;
  const failed = models.filter((model) => model.state === "failed").length;
  const length = Math.max(...models.map((model) => app.series[model.model].texts_s.length), 0);
  const all = Array.from({ length }, (_, i) => models.reduce((total, model) => {
    const { texts_s } = app.series[model.model];
    return total + (texts_s[texts_s.length - length + i] ?? 0);
  }, 0));
  const rate = compact(sum((model) => model.last_minute.texts_s));
  const number = sum(errors);
  return [
    ["Models ready", html`${serving}<small> of ${models.length}</small>`, failed ? html`<span class="bad">${failed} failed</span>` : "none failed"],
    ["Texts a second", rate, sparkline(all, app.live.kept, `${rate} texts a second over the last minute`)],
    ["Waiting", compact(sum((model) => model.queue_len)), "texts in queues"],
    ["Errors a minute", html`<span class=${number ? "bad" : ""}>${number}</span>`, number ? Object.keys(Object.assign({}, ...models.map((m) => m.last_minute.errors))).join(", ") : "none"],
  ].map(([title, value, beside]) => html`<div class="tile card"><h2>${title}</h2><div class="value">${value}</div><div class="quiet">${beside}</div></div>`);
}

function row(app, model) {
  const { last_minute: minute } = model;
  const [icon, word, says] = STATES[model.state] ?? ["?", model.state, ""];
  const isOpen = open.has(model.model);
  const ready = model.replicas_idle + model.replicas_busy;
  const toggle = () => {
    if (!open.delete(model.model)) open.add(model.model);
    app.redraw();
  };
  return html`<tr class="model ${model.state}">
    <td data-title="State"><span class="state ${model.state}" title=${says}><span aria-hidden="true">${icon}</span> ${word}</span></td>
    <th scope="row" data-title="Model"><button class="plain name" aria-expanded=${isOpen} @click=${toggle}><span class="turn" aria-hidden="true">▸</span><bdi>${model.model}</bdi></button>
      <div class="quiet facts">${facts(model)}
        <button class="plain copy" title="Copy the name" aria-label="Copy the name ${model.model}" @click=${() => copy(app, model.model, `${model.model} is in the clipboard.`)}>${copyIcon}</button></div>
      ${model.in_trouble ? html`<div class="trouble">${model.last_error ?? "in trouble; what is wrong is shown to whoever may manage"}${model.error_age_s === null ? nothing : html`<span class="quiet">, ${duration(model.error_age_s)} ago.</span>`}${model.retry_s ? html`<span class="quiet"> The server tries again in ${duration(model.retry_s)}.</span>` : nothing}</div>` : nothing}
      ${progress(model.progress)}
      ${model.successor ? html`<div class="quiet">a changed one is ${model.successor.state} ${progress(model.successor.progress)}</div>` : nothing}</th>
    <td class="number" data-title="Replicas">${ready}<span class="quiet">/${model.replicas || model.scaling.max}</span>${model.replicas_busy ? html`<br><small class="quiet">${model.replicas_busy} busy</small>` : nothing}</td>
    <td class="number" data-title="Queue">${bar(model.queue_len / model.queue_max, model.queue_len > 0.8 * model.queue_max)}
      <span title="${exact(model.queue_len)} of ${exact(model.queue_max)}">${compact(model.queue_len)}<span class="quiet">/${compact(model.queue_max)}</span></span></td>
    <td class="number" data-title="Texts/s"><span class="rate" title=${exact(minute.texts_s)}>${compact(minute.texts_s)}</span> ${sparkline(app.series[model.model].texts_s, app.live.kept, "Texts a second over ten minutes")}</td>
    ${["p50", "p95", "p99"].map((name) => html`<td class="number" data-title=${name}>${time(minute[`${name}_ms`], minute.requests_s > 0, app.live.longest_ms)}</td>`)}
    <td class="number" data-title="Batch">${compact(minute.texts_a_batch)}</td>
    <td class="number" data-title="Padding">${minute.padding === null ? "–" : `${Math.round(100 * minute.padding)}%`}</td>
    <td class="number" data-title="Errors">${errors(model) ? html`<span class="bad" title=${codes(minute.errors)}>${errors(model)}</span>` : 0}</td></tr>
    ${isOpen ? html`<tr class="details"><td colspan=${COLUMNS.length + 1}>${details(app, model)}</td></tr>` : nothing}`;
}

const codes = (found) => Object.entries(found).map(([code, count]) => `${code}: ${count}`).join(", ");

function facts(model) {
  const { runs_on: on } = model;
  const where = [on.backend ?? (model.is_remote ? on.protocol : ""), on.device, on.compute_dtype !== "float32" && on.compute_dtype, model.place !== "thread" && model.place];
  const parts = [
    model.alias && html`as <bdi>${model.alias}</bdi>`,
    model.kinds.map((kind) => KINDS[kind] ?? kind).join(", "),
    on.dim && html`${on.dim} numbers${model.space ? html` in space <code title=${model.space}>${model.space.slice(0, SPACE_SHOWN)}</code>` : nothing}`,
    on.labels && `${on.labels.length} label${on.labels.length > 1 ? "s" : ""}`,
    [model.driver, ...where].filter(Boolean).join(" · "),
  ].filter(Boolean);
  return parts.map((part, i) => html`${i ? " · " : ""}${part}`);
}

function progress(found) {
  if (!found) return nothing;
  const { step, done_bytes: done, total_bytes: total } = found;
  return html`<div class="progress">${step}${total ? html` <progress max=${total} value=${done}></progress> ${Math.round((100 * done) / total)}%` : " …"}</div>`;
}

const OF_ONE = ["labels", "kind", "pid", "node", "node_ip", "raylet", "resources"]; // shown elsewhere, or of one replica

function details(app, model) {
  const { counters, last_minute: minute, runs_on: on } = model;
  const known = [
    ["Space", html`<code>${model.space || "–"}</code>`, "Whose vectors these are: those of one space may be compared"],
    ["Since it was registered", `${exact(counters.requests)} requests, ${exact(counters.texts)} texts, ${exact(counters.tokens)} tokens`],
    ["Truncated", exact(counters.truncated)],
    ["Known from before", model.cached ? known_of(counters) : "not cached", "Texts whose rows came from the cache"],
    ["Queue, p95", time(minute.queue_p95_ms, minute.requests_s > 0, app.live.longest_ms), "Wait of a request until its first batch"],
    ["Batch, p95", time(minute.batch_p95_ms, minute.texts_a_batch !== null, app.live.longest_ms), "Compute time of a batch"],
    ["Replicas", `${model.scaling.min} to ${model.scaling.max}`],
    ["Errors since then", Object.keys(counters.errors).length ? codes(counters.errors) : "none"],
    ...(model.replicas_on ?? []).filter((one) => one.pid || one.node).map((one) => [one.replica, where(one), "Where this replica runs"]),
    ...Object.entries(on).filter(([name]) => !OF_ONE.includes(name)).map(([name, value]) => [name === "dim" ? "Dimension" : name.replaceAll("_", " "), show(value)]),
  ];
  return html`<div class="charts">
      <figure><figcaption>Texts a second</figcaption><div class="chart" data-model=${model.model} data-sync=${model.model} data-chart="rate"></div></figure>
      <figure><figcaption>Latency, ms: <span class="key-1">p50</span> <span class="key-2">p95</span> <span class="key-3">p99</span></figcaption><div class="chart" data-model=${model.model} data-sync=${model.model} data-chart="time"></div></figure>
      <figure><figcaption>Texts in the queue</figcaption><div class="chart" data-model=${model.model} data-sync=${model.model} data-chart="queue"></div></figure></div>
    <details class="twin"><summary>These lines as a table</summary>${twin(app, model)}</details>
    <dl class="known">${known.map(([title, value, says]) => html`<div><dt title=${says ?? nothing}>${title}</dt><dd>${value}</dd></div>`)}</dl>
    ${app.live.admin ? actions(app, model) : nothing}`;
}

/** A replica's state, its node of a cluster, its process. */
function where({ state, pid, node, node_ip: ip, resources }) {
  const parts = [state, node ? `node ${ip} (${node.slice(0, 8)})` : `process ${pid}`, resources && show(resources)];
  return parts.filter(Boolean).join(" · ");
}

function known_of({ cache_hits: hits, cache_misses: misses }) {
  const asked = hits + misses;
  return asked ? `${compact(hits)} of ${compact(asked)} texts, ${Math.round((100 * hits) / asked)}%` : "nothing yet";
}

const show = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));

/** What the charts show, a minute a row. */
function twin(app, model) {
  const series = app.series[model.model];
  const samples = Math.round(60 / app.live.step_s);
  const minutes = [];
  for (let end = series.queue.length; end > 0; end -= samples) {
    const part = (name) => series[name].slice(Math.max(end - samples, 0), end).filter((one) => one !== null);
    const mean = (of) => (of.length ? compact(of.reduce((a, b) => a + b, 0) / of.length) : "–");
    const most = (of) => (of.length ? time(Math.max(...of)) : "–");
    minutes.push([mean(part("texts_s")), ...["p50_ms", "p95_ms", "p99_ms"].map((name) => most(part(name))), mean(part("queue"))]);
  }
  return html`<div class="scroll" tabindex="0"><table><caption class="hidden">${model.model}, minute by minute, the newest first</caption>
    <thead><tr>${["Minutes ago", "Texts/s, mean", "p50, most", "p95, most", "p99, most", "Queue, mean"].map((title) => html`<th scope="col" class="number">${title}</th>`)}</tr></thead>
    <tbody>${minutes.map((cells, i) => html`<tr><th scope="row" class="number">${i} to ${i + 1}</th>${cells.map((cell) => html`<td class="number">${cell}</td>`)}</tr>`)}</tbody></table></div>`;
}

/** After the table stands: the lines of the rows that are open. */
export function drawCharts(app) {
  forgetClosed();
  if (!app.live || app.refused) return;
  for (const element of document.querySelectorAll(".chart")) {
    const series = app.series[element.dataset.model];
    if (!series) continue;
    const about = { newest: app.newestAt / 1000, step: app.live.step_s, kept: app.live.kept };
    const lines = {
      rate: [{ label: "texts/s", values: series.texts_s }],
      time: ["p50", "p95", "p99"].map((name) => ({ label: name, values: series[`${name}_ms`] })),
      queue: [{ label: "texts", values: series.queue }],
    };
    draw(element, lines[element.dataset.chart], about);
  }
}
