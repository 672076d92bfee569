// The page: which view is shown, the poll of /live, the key, and what the server said last.
import { html, nothing, render } from "./vendor/lit-html/lit-html.js";
import { base, hasKey, look, setKey } from "./server.js";
import { duration } from "./charts.js";
import { dashboard, drawCharts } from "./dashboard.js";
import { playground } from "./playground.js";
import { jobs, loadJobs } from "./jobs.js";
import { loadLog, requestLog } from "./log.js";

const POLL_MS = 2000, LONGEST_MS = 10000, MISSED = 3, SERIES = ["texts_s", "p50_ms", "p95_ms", "p99_ms", "queue"];
const VIEWS = { // title, what is drawn, what else is asked for while it is looked at
  models: ["Models", dashboard], playground: ["Playground", playground], jobs: ["Jobs", jobs, loadJobs], log: ["Requests", requestLog, loadLog],
};

export const app = {
  live: null, // the last document of /live
  series: {}, // of each model, ten minutes
  newestAt: 0, // when a new sample came, on this machine's clock
  missed: 0,
  refused: null, // the answer where a key is missing or wrong
  isPaused: false,
  view: "models",
  visit: 0, // counts the keys that were used: what one was shown is not for the next
  redraw,
  say,
  poll,
  watch,
  asking: () => Promise.resolve(running), // until the answer that is under way has been drawn
  model: (name) => app.live?.models.find((one) => one.model === name || one.alias === name),
};

// --- the poll: one question at a time, none while nobody looks, and with those of the view one in two seconds

const watchers = new Set(), processes = new Set();
let timer = 0, wait = POLL_MS, running = null, wasOfView = false;

/** Ask now, if it is not too much. `isForced`: also while it is paused, and anew after what is being asked. */
function poll(isForced = false) {
  if (running) return isForced ? running.then(() => poll(true)) : running;
  clearTimeout(timer);
  if (document.hidden || (app.isPaused && !isForced && !watchers.size)) return Promise.resolve();
  const mine = turn().finally(() => { if (running === mine) running = null; });
  running = mine;
  return mine;
}

async function turn() {
  const { visit } = app;
  const ofView = app.live && !wasOfView ? VIEWS[app.view][2]?.(app) : null;
  wasOfView = Boolean(ofView);
  const answer = await (ofView ?? look(app.live ? `live?since=${app.live.number}&process=${app.live.process}` : "live"));
  if (visit !== app.visit) return; // it is another key's
  timer = setTimeout(poll, POLL_MS); // whatever goes wrong below
  if (answer.ok && !ofView && answer.document?.models) take(answer.document);
  if (!ofView && (answer.status === 401 || answer.status === 403)) [app.refused, app.live, app.missed, wait] = [answer, null, 0, LONGEST_MS];
  else if (answer.ok || (ofView && answer.status)) [app.missed, wait] = [0, POLL_MS];
  else {
    app.missed += 1;
    if (app.missed >= MISSED) wait = Math.min(wait * 1.5, LONGEST_MS);
  }
  clearTimeout(timer);
  timer = setTimeout(poll, wait);
  redraw();
}

function take(live) {
  const isMore = live.since > 0 && app.live?.process === live.process;
  app.series = Object.fromEntries(live.models.map((model) => [model.model, Object.fromEntries(SERIES.map((name) => {
    const known = isMore ? app.series[model.model]?.[name] ?? [] : [];
    return [name, [...known, ...model.series[name]].slice(-live.kept)];
  }))]));
  if (app.live?.number !== live.number || app.live.process !== live.process) app.newestAt = Date.now();
  if (processes.size && !processes.has(live.process)) say(`Another process of the server answers now, ${named(live)}. Each counts for itself.`);
  processes.add(live.process);
  [app.live, app.refused] = [live, null];
  for (const isOver of watchers) if (isOver(live)) watchers.delete(isOver);
}

/** Tell `isOver` of each answer until it says yes; meanwhile a pause does not hold. */
function watch(isOver) {
  watchers.add(isOver);
  poll(true);
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
  drawCharts(app);
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
      <span class="quiet wide">every ${POLL_MS / 1000} s</span>
      <button class="plain" @click=${pause}>${app.isPaused ? "Go on" : "Pause"}</button>
      <span class="quiet wide" title="The process that answers">${live.version} · ${named(live)} · up ${duration(live.uptime_s)}${live.stopping ? " · stopping" : ""}</span>` : nothing}
    <a class="plain wide" href=${new URL("docs", base)}>API</a>
    ${hasKey() ? nothing : html`<a class="plain wide" href=${new URL("metrics", base)}>Metrics</a>`}
    <details class="key"><summary>${hasKey() ? "Key ✓" : "Key"}</summary>
      <form @submit=${useKey}>
        <label>API key <input type="password" name="key" autocomplete="off" spellcheck="false"></label>
        <label><input type="checkbox" name="remember"> remember in this tab</label>
        <button>Use it</button> ${hasKey() ? html`<button type="button" @click=${forgetKey}>Forget it</button>` : nothing}
        <p class="quiet">The page keeps it in memory and sends it to this server alone.
          <code>embedpool key create --scopes admin</code> makes one.</p>
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
  watchers.clear();
  [app.live, app.series, app.refused, app.visit, running, wait] = [null, {}, null, app.visit + 1, null, POLL_MS];
  redraw();
  poll(true);
}

addEventListener("hashchange", () => {
  redraw();
  wasOfView = false;
  if (VIEWS[app.view][2]) poll(true);
});
document.getElementById("main").replaceChildren();
addEventListener("resize", () => drawCharts(app));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
redraw();
poll();
