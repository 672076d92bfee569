// The page: which view is shown, the poll of /live, the key, and what the server said last.
import { html, render, nothing } from "./vendor/lit-html/lit-html.js";
import { ask, hasKey, setKey } from "./server.js";
import { dashboard, drawCharts } from "./dashboard.js";
import { playground } from "./playground.js";
import { jobs } from "./jobs.js";
import { requestLog } from "./log.js";

const POLL_MS = 2000, LONGEST_MS = 10000, MISSED = 3, SERIES = ["texts_s", "p50_ms", "p95_ms", "p99_ms", "queue"];
const VIEWS = { models: ["Models", dashboard], playground: ["Playground", playground], jobs: ["Jobs", jobs], log: ["Requests", requestLog] };

export const app = {
  live: null, // the last document of /live
  series: {}, // of each model, ten minutes
  newestAt: 0, // when a new sample came, on this machine's clock
  missed: 0,
  refused: null, // the answer where a key is missing or wrong
  isPaused: false,
  view: "models",
  redraw,
  say,
  poll,
  model: (name) => app.live?.models.find((one) => one.model === name || one.alias === name),
};

let timer = 0, wait = POLL_MS, process_ = null, asking = false;

// --- the poll: one at a time, none while nobody looks

async function poll() {
  clearTimeout(timer);
  if (document.hidden || app.isPaused || asking) return;
  asking = true;
  const answer = await ask(`live?since=${app.live?.number ?? 0}`);
  asking = false;
  if (answer.ok && answer.document?.models) {
    take(answer.document);
    [app.missed, app.refused, wait] = [0, null, POLL_MS];
  } else if (answer.status === 401 || answer.status === 403) {
    [app.refused, app.live, wait] = [answer, null, LONGEST_MS];
  } else {
    app.missed += 1;
    if (app.missed >= MISSED) wait = Math.min(wait * 1.5, LONGEST_MS);
  }
  redraw();
  timer = setTimeout(poll, wait);
}

function take(live) {
  const isNew = process_ === live.process && live.since > 0;
  for (const model of live.models) {
    const known = isNew ? app.series[model.model] : null;
    app.series[model.model] = Object.fromEntries(
      SERIES.map((name) => [name, [...(known?.[name] ?? []), ...model.series[name]].slice(-live.kept)]),
    );
  }
  if (process_ !== null && process_ !== live.process) say(`Another process of the server answers now: ${named(live)}.`);
  if (app.live?.number !== live.number || process_ !== live.process) app.newestAt = Date.now();
  process_ = live.process;
  app.live = live;
}

const named = (live) => (live.pid ? `pid ${live.pid} on ${live.host}` : live.process);

document.addEventListener("visibilitychange", () => !document.hidden && poll());
setInterval(() => !document.hidden && drawConnection(), 1000);

// --- what the server said to the last action

let saidTimer = 0;
function say(text, isError = false) {
  clearTimeout(saidTimer);
  render(text ? html`<p class=${isError ? "failed" : ""}>${text}
    <button class="plain" aria-label="Dismiss" @click=${() => say("")}>✕</button></p>` : nothing, document.getElementById("said"));
  if (text && !isError) saidTimer = setTimeout(() => say(""), 8000);
}

// --- drawing

function redraw() {
  const view = location.hash.slice(1).split("/")[0] || "models";
  app.view = view in VIEWS ? view : "models";
  const shown = Object.entries(VIEWS).filter(([name]) => name !== "log" || app.live?.admin);
  render(
    shown.map(([name, [title]]) => html`<a href="#${name}" aria-current=${name === app.view ? "page" : nothing}>${title}</a>`),
    document.getElementById("nav"),
  );
  drawConnection();
  render(VIEWS[app.view][1](app), document.getElementById("main"));
  if (app.view === "models") drawCharts(app);
}

function drawConnection() {
  const live = app.live;
  const seconds = Math.max(Math.round((Date.now() - app.newestAt) / 1000), 0);
  const isGone = app.missed >= MISSED;
  const state = isGone ? "gone" : app.isPaused || seconds > 6 ? "old" : "fresh";
  document.body.classList.toggle("stale", isGone);
  render(
    isGone ? html`<p>The server does not answer. What you see is of ${seconds} seconds ago; the page goes on asking.</p>` : nothing,
    document.getElementById("banner"),
  );
  render(html`
    ${live ? html`<span class="age ${state}" title="The server takes a sample every ${live.step_s} s">
        as of ${seconds} s ago${app.isPaused ? ", paused" : ""}</span>
      <button class="plain" @click=${pause}>${app.isPaused ? "Go on" : "Pause"}</button>
      <span class="quiet wide" title="The process that answers">${live.version} · ${named(live)}${live.stopping ? " · stopping" : ""}</span>` : nothing}
    <a class="plain wide" href=${"docs"}>API</a>
    <details class="key"><summary>${hasKey() ? "Key ✓" : "Key"}</summary>
      <form @submit=${useKey}>
        <label>API key <input type="password" name="key" autocomplete="off" spellcheck="false"></label>
        <label><input type="checkbox" name="remember"> remember in this tab</label>
        <button>Use it</button> ${hasKey() ? html`<button type="button" @click=${forgetKey}>Forget it</button>` : nothing}
        <p class="quiet">The page keeps it in memory and sends it to this server alone.
          <code>embedpool key create --scope admin</code> makes one.</p>
      </form></details>`, document.getElementById("connection"));
}

function pause() {
  app.isPaused = !app.isPaused;
  redraw();
  if (!app.isPaused) poll();
}

function useKey(event) {
  event.preventDefault();
  const form = event.target;
  setKey(form.elements.key.value, form.elements.remember.checked);
  form.reset();
  form.closest("details").open = false;
  startAnew();
}

function forgetKey(event) {
  setKey("", false);
  event.target.closest("details").open = false;
  startAnew();
}

function startAnew() {
  [app.live, app.series, app.refused, process_] = [null, {}, null, null];
  redraw();
  poll();
}

addEventListener("hashchange", redraw);
document.getElementById("main").replaceChildren();
addEventListener("resize", () => app.view === "models" && drawCharts(app));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
redraw();
poll();
