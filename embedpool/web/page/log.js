// The last requests, for whoever may manage. Asked for while it is looked at, never pushed.
import { html, nothing } from "./vendor/lit-html/lit-html.js";
import { ask } from "./server.js";

const DRAWN = 200;
let requests = [], number = 0, askedFor = null, filter = "";

export function requestLog(app) {
  if (!app.live?.admin) return html`<p class="quiet">The last requests are shown to whoever may manage: enter a key of scope admin.</p>`;
  if (askedFor !== app.live.number) {
    askedFor = app.live.number;
    ask(`log?since=${number}`).then((answer) => {
      if (!answer.ok) return;
      if (answer.document.number < number) requests = []; // another process answers
      requests = [...requests, ...answer.document.requests].slice(-500);
      number = answer.document.number;
      app.redraw();
    });
  }
  const shown = requests.filter((one) => !filter || JSON.stringify(one).includes(filter)).slice(-DRAWN).reverse();
  return html`
    <div class="bar"><h2>The last requests</h2>
      <label class="search">Filter <input .value=${filter} @input=${(event) => { filter = event.target.value; app.redraw(); }}></label></div>
    ${shown.length ? html`<div class="scroll" tabindex="0"><table class="log"><caption class="hidden">The last requests, the newest first</caption>
      <thead><tr>${["Time", "Request", "Status", "Model", "Texts", "Tokens", "Queue, ms", "Compute, ms", "Total, ms", "Key"].map((title) => html`<th scope="col">${title}</th>`)}</tr></thead>
      <tbody>${shown.map((one) => html`<tr class=${one.status >= 500 ? "failed" : one.status >= 400 ? "warned" : nothing}>
        <td>${new Date(one.at * 1000).toLocaleTimeString()}</td><td><code>${one.method} ${one.path}</code></td>
        <td>${one.status}${one.code ? html` <span class="quiet">${one.code}</span>` : nothing}</td><td>${one.model ?? ""}</td>
        ${["texts", "tokens", "queue_ms", "compute_ms", "total_ms"].map((name) => html`<td class="number">${one[name] ?? ""}</td>`)}
        <td>${one.key ?? ""}</td></tr>`)}</tbody></table></div>`
    : html`<p class="quiet">No request yet${filter ? " that fits" : ""}.</p>`}
    <p class="quiet">Of this process, the last 500 at most. No text is ever kept. The log on disk has the same lines.</p>`;
}
