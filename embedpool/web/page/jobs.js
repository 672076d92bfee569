// Batches: how far each is, what failed, its results as files. Asked for while it is looked at.
import { html, nothing } from "./vendor/lit-html/lit-html.js";
import { repeat } from "./vendor/lit-html/directives/repeat.js";
import { compact, duration, exact } from "./charts.js";
import { save } from "./files.js";
import { ask, fetchFile, look, refusal } from "./server.js";

const SHOWN = 100;
const STATES = { // what a status looks like; the colours are those of models
  validating: ["◔", "loading"], in_progress: ["◔", "loading"], finalizing: ["◔", "loading"], paused: ["▲", "failed"],
  cancelling: ["◑", "draining"], completed: ["●", "ready"], failed: ["▲", "failed"], expired: ["○", "disabled"], cancelled: ["○", "disabled"],
};
const UNFINISHED = ["validating", "in_progress", "finalizing"];
let batches = null, more = false, refused = "", visit = 0;

/** Asked for while it is looked at. */
export async function loadJobs(app) {
  const mine = app.visit;
  if (visit !== mine) [batches, visit] = [null, mine];
  const answer = await look(`v1/batches?limit=${SHOWN}`);
  if (mine !== app.visit) return answer;
  refused = answer.ok ? "" : refusal(answer);
  if (answer.ok) [batches, more] = [answer.document.data, answer.document.has_more];
  return answer;
}

export function jobs(app) {
  if (!app.live) return html`<p class="quiet">${app.refused ? `${refusal(app.refused)}: enter a key above.` : "Asking the server …"}</p>`;
  if (visit !== app.visit) batches = null;
  if (!batches) return html`<p class="quiet">${refused || "Asking the server …"}</p>`;
  if (!batches.length) return html`<section class="card empty"><h2>No batch yet</h2>
    <p>A batch runs a file of requests, a line each, beside what else is asked of the server:</p>
    <pre>embedpool batch create requests.jsonl</pre></section>`;
  return html`${refused ? html`<p class="bad">${refused}</p>` : nothing}
    ${repeat(batches, (batch) => batch.id, (batch) => card(app, batch))}
    ${more ? html`<p class="quiet">Older ones are not shown: <code>embedpool batch list</code> shows all.</p>` : nothing}`;
}

function card(app, batch) {
  const { total, completed, failed } = batch.request_counts;
  const status = batch.paused && UNFINISHED.includes(batch.status) ? "paused" : batch.status;
  const [icon, colour] = STATES[status] ?? ["?", ""];
  const files = [["output_file_id", "Results", "jsonl"], ["error_file_id", "Failures", "errors.jsonl"]].filter(([name]) => batch[name]);
  return html`<section class="card job" aria-label="Batch ${batch.id}">
    <div class="bar"><span class="state ${colour}"><span aria-hidden="true">${icon}</span> ${status.replace("_", " ")}</span>
      <h2><code>${batch.id}</code></h2>
      <span class="quiet">${batch.model ? html`<bdi>${batch.model}</bdi> · ` : nothing}${batch.endpoint} · ${new Date(batch.created_at * 1000).toLocaleString()}</span></div>
    ${total ? html`<div class="bar"><progress max=${total} value=${completed + failed} aria-label="Requests that ran"></progress>
      <span>${(completed + failed).toLocaleString("en")} of ${total.toLocaleString("en")} requests</span>
      ${failed ? html`<span class="bad">${failed.toLocaleString("en")} failed</span>` : nothing}
      ${batch.requests_s === null ? nothing : html`<span>${compact(batch.requests_s)} requests/s</span>`}
      ${batch.seconds_left ? html`<span>${duration(batch.seconds_left)} left</span>` : nothing}
      ${batch.usage ? html`<span class="quiet">${exact(batch.usage.total_tokens)} tokens</span>` : nothing}</div>` : nothing}
    ${status === "paused" ? html`<p class="bad">${batch.paused}</p>` : nothing}
    ${batch.errors ? html`<ul class="bad">${batch.errors.data.map((fault) => html`<li>${fault.line ? `line ${fault.line}: ` : ""}${fault.message} <code>${fault.code}</code></li>`)}</ul>` : nothing}
    ${UNFINISHED.includes(batch.status) || files.length ? html`<div class="bar">
      ${files.map(([name, title, ending]) => html`<button @click=${() => download(app, batch[name], `${batch.id}.${ending}`)}>${title}</button>`)}
      ${UNFINISHED.includes(batch.status) ? html`<button class="danger" @click=${() => cancel(app, batch.id)}>Cancel</button>` : nothing}</div>` : nothing}</section>`;
}

async function cancel(app, id) {
  const answer = await ask(`v1/batches/${id}/cancel`, {});
  app.say(answer.ok ? `${id} is ${answer.document.status}; what is done is kept.` : refusal(answer), !answer.ok);
  await loadJobs(app);
  app.redraw();
}

async function download(app, file, name) {
  app.say(`Downloading ${name} …`);
  const answer = await fetchFile(`v1/files/${file}/content`);
  if (answer.ok) save(name, answer.content, "application/jsonl");
  app.say(answer.ok ? `Saved ${name}.` : answer.says, !answer.ok);
}
