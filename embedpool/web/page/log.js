// The last requests, for whoever may manage. Asked for while it is looked at, never pushed.
import { html, nothing } from "./vendor/lit-html/lit-html.js";
import { look, refusal } from "./server.js";

const DRAWN = 200;
let requests = [], number = 0, process_ = "", filter = "", visit = 0, refused = "";

/** Asked for while it is looked at. */
export const loadLog = (app) => (app.live.admin ? load(app) : null);

async function load(app) {
  if (visit !== app.visit) [requests, number, process_, visit] = [[], 0, "", app.visit];
  const answer = await look(`log?since=${number}&process=${process_}`);
  if (visit !== app.visit) return answer;
  refused = answer.ok ? "" : refusal(answer);
  if (answer.ok) {
    const { requests: more, number: last, process: from } = answer.document;
    requests = from === process_ ? [...requests, ...more].slice(-500) : more; // each process has its own
    [number, process_] = [last, from];
  }
  return answer;
}

export function requestLog(app) {
  if (!app.live?.admin) return html`<p class="quiet">The last requests are shown to whoever may manage: enter a key of scope admin.</p>`;
  const shown = requests.filter((one) => !filter || JSON.stringify(one).includes(filter)).slice(-DRAWN).reverse();
  return html`
    <div class="bar"><h2>The last requests</h2>
      <label class="search">Filter <input autocomplete="off" spellcheck="false" .value=${filter} @input=${(event) => { filter = event.target.value; app.redraw(); }}></label></div>
    ${refused ? html`<p class="bad">${refused}</p>` : nothing}
    ${shown.length ? html`<div class="scroll" tabindex="0"><table class="log"><caption class="hidden">The last requests, the newest first</caption>
      <thead><tr>${["Time", "Request", "Status", "Model", "Texts", "Tokens", "Queue, ms", "Compute, ms", "Total, ms", "Key"].map((title) => html`<th scope="col">${title}</th>`)}</tr></thead>
      <tbody>${shown.map((one) => html`<tr class=${one.status >= 500 ? "failed" : one.status >= 400 ? "warned" : nothing}>
        <td>${new Date(one.at * 1000).toLocaleTimeString()}</td><td><code>${one.method} ${one.path}</code></td>
        <td>${one.status}${one.code ? html` <span class="quiet">${one.code}</span>` : nothing}</td><td>${one.model ?? ""}</td>
        ${["texts", "tokens", "queue_ms", "compute_ms", "total_ms"].map((name) => html`<td class="number">${one[name] ?? ""}</td>`)}
        <td>${one.key ?? ""}</td></tr>`)}</tbody></table></div>`
    : html`<p class="quiet">No request yet${filter ? " that fits" : ""}.</p>`}
    <p class="quiet">Of the process ${process_}, the last 500 at most. No text is ever kept. The log on disk has the same lines.</p>`;
}
