// Lines: a small one in a cell, as SVG, and larger ones by uPlot.
import { svg, html } from "./vendor/lit-html/lit-html.js";

const WIDTH = 120, HEIGHT = 26, STEPS = 75; // each step of a small line is the mean of four samples

/** The means of `values` in as many steps, the last of them now; null where nothing is known. */
function inSteps(values, steps, kept) {
  const size = Math.max(Math.round(kept / steps), 1);
  const found = [];
  for (let end = values.length; end > 0; end -= size) {
    const part = values.slice(Math.max(end - size, 0), end).filter((one) => one !== null);
    found.unshift(part.length ? part.reduce((a, b) => a + b, 0) / part.length : null);
  }
  return found;
}

/** Ten minutes of a rate; `said` is read where the line cannot be seen. */
export function sparkline(values, kept, said) {
  const steps = inSteps(values, STEPS, kept);
  const most = Math.max(...steps.filter((one) => one !== null), 0);
  if (!most) return html`<svg class="spark" viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label=${said}>
    ${svg`<path class="still" d=${`M0 ${HEIGHT - 2}H${WIDTH}`}/>`}</svg>`;
  const x = (i) => (WIDTH * (STEPS - steps.length + i + 1)) / STEPS;
  const y = (one) => HEIGHT - 2 - ((HEIGHT - 5) * one) / most;
  const line = steps.map((one, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(one ?? 0).toFixed(1)}`).join("");
  const area = `${line}L${x(steps.length - 1).toFixed(1)} ${HEIGHT}L${x(0).toFixed(1)} ${HEIGHT}Z`;
  return html`<svg class="spark" viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label=${said}>
    ${svg`<path class="still" d=${`M0 ${HEIGHT - 2}H${WIDTH}`}/><path class="area" d=${area}/><path class="line" d=${line}/>`}</svg>`;
}

const drawn = new Map(); // element → its chart

/** Give up the charts of rows that are closed. */
export function forgetClosed() {
  for (const [element, chart] of drawn) {
    if (element.isConnected) continue;
    chart.destroy();
    drawn.delete(element);
  }
}

/** A colour of the style sheet as a canvas takes it, in the scheme that holds. */
function resolved(element, name) {
  element.style.color = `var(${name})`;
  const { color } = getComputedStyle(element);
  element.style.color = "";
  return color;
}

const COLOURS = ["--line-1", "--line-2", "--line-3"];

/** Draw, or draw anew, lines over the ten minutes up to the newest sample in `element`; `lines` are `[{label, values}]`. */
export function draw(element, lines, { newest, step, kept }) {
  const length = Math.max(...lines.map(({ values }) => values.length), 1);
  const times = Array.from({ length }, (_, i) => newest - (length - 1 - i) * step);
  const data = [times, ...lines.map(({ values }) => values)];
  const width = Math.max(element.clientWidth, 200);
  let chart = drawn.get(element);
  const colour = (name) => resolved(element, name);
  if (chart && chart.scheme !== colour("--line-1")) {
    chart.destroy();
    chart = null;
  }
  if (!chart) {
    const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--rule"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    const until = () => chart?.newest ?? newest;
    chart = new uPlot({
      width, height: 150, cursor: { sync: { key: element.dataset.sync }, points: { size: 6 } }, legend: { show: false },
      padding: [8, 8, 0, 0],
      scales: { x: { time: true, range: () => [until() - kept * step, until()] }, y: { range: (_, low, high) => [0, high ? high * 1.1 : 1] } },
      axes: [
        { ...axis, values: (_, ticks) => ticks.map((at) => new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })), space: 60 },
        { ...axis, size: 52, values: (_, ticks) => ticks.map((one) => `${compact(one)}`) },
      ],
      series: [{}, ...lines.map(({ label }, i) => ({ label, stroke: colour(COLOURS[i]), width: 1.6, spanGaps: false, points: { show: false } }))],
    }, data, element);
    chart.scheme = colour("--line-1");
    drawn.set(element, chart);
  } else {
    chart.newest = newest;
    if (chart.width !== width) chart.setSize({ width, height: 150 });
    chart.setData(data);
  }
}

/** A bar of a share from 0 to 1; what it shows stands beside it as a number. */
export const bar = (share, isHigh = false) => html`<svg class="share ${isHigh ? "high" : ""}" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">
  ${svg`<rect class="whole" width="100" height="8" rx="4"/><rect class="part" width=${(100 * Math.max(0, Math.min(share, 1))).toFixed(1)} height="8" rx="4"/>`}</svg>`;

/** 1,234 → "1.2k"; small numbers with the digits that matter. */
export function compact(number) {
  if (number === null || number === undefined) return "–";
  if (number >= 1e6) return `${+(number / 1e6).toFixed(1)}M`;
  if (number >= 1e4) return `${+(number / 1e3).toFixed(1)}k`;
  return number >= 100 || Number.isInteger(number) ? Math.round(number).toLocaleString("en") : String(+number.toFixed(number < 1 ? 2 : 1));
}

/** 12,345, for where there is room. */
export const exact = (number) => number.toLocaleString("en");

export function duration(seconds) {
  if (seconds < 90) return `${seconds} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 129600 ? `${+(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} days`;
}

/** Milliseconds as the bound of a bucket; where there `is` something and no bound, it took longer than the `longest`. */
export function time(ms, is, longest) {
  if (ms === null || ms === undefined) return is ? `> ${longest / 1000} s` : "–";
  return ms >= 1000 ? `≤ ${ms / 1000} s` : `≤ ${ms} ms`;
}

