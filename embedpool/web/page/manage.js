// What an admin may do. Nothing is assumed: each action shows the server's own answer, and then the new state.
import { html, nothing } from "./vendor/lit-html/lit-html.js";
import { ask, inPath, refusal } from "./server.js";

const FORM_FIRST = ["model", "alias", "driver_type"];
const DRIVER_FIRST = ["path", "base_url", "protocol", "model", "api_key"];
const MOST_ABSENT = 5; // answers: another process of the server hears of a registration a little later
let schemas = null, isOpen = false, driver = "local_st", running = null, asked = {}, visit = 0;

/** Send an action, show what the server said, and look at the pool again. */
async function act(app, what, path, body, method) {
  app.say(`${what} …`);
  const answer = await ask(path, body, method);
  app.say(`${what}: ${answer.ok ? `${outcome(answer.document)} (${answer.status})` : refusal(answer)}`, !answer.ok);
  app.poll(true);
  return answer;
}

/** What the server's answer says that is so now. */
function outcome(found) {
  if (found.removed) return `${found.model} is removed`;
  if (found.state) return `${found.model}${found.alias ? ` as ${found.alias}` : ""} is ${found.state}`;
  if (found.last_reload) return found.last_reload.ok ? "pool.yml is followed" : found.last_reload.error;
  return found.cache ? `the memory holds ${found.cache.memory.entries} rows${found.cache.disk ? `, the disk ${found.cache.disk.entries}` : ""}` : "done";
}

export function actions(app, model) {
  const name = model.model;
  const setAlias = (event) => {
    event.preventDefault();
    const alias = event.target.elements.alias.value.trim();
    act(app, alias ? `Alias ${alias} for ${name}` : `No alias for ${name}`, "models/alias", { model: name, alias });
  };
  const remove = async (event) => {
    event.preventDefault();
    const form = event.target;
    if (form.elements.name.value !== name) return app.say(`Type the name of the model, ${name}, to unregister it.`, true);
    await act(app, `Unregister ${name}`, `models/${inPath(name)}`, undefined, "DELETE");
    form.reset();
  };
  return html`<div class="actions">
    <button @click=${() => act(app, `${model.enabled ? "Disable" : "Enable"} ${name}`, "models/enable", { model: name, enabled: !model.enabled })}>${model.enabled ? "Disable" : "Enable"}</button>
    <form @submit=${setAlias}><label>Alias <input name="alias" .value=${model.alias ?? ""} autocomplete="off"></label><button>Set</button></form>
    <form @submit=${remove}><label>Unregister: type the name <input name="name" autocomplete="off" spellcheck="false"></label><button class="danger">Unregister</button></form>
    <details><summary>Settings in pool.yml</summary>${settings(app, model)}</details></div>`;
}

function settings(app, model) {
  if (visit !== app.visit) [asked, visit] = [{}, app.visit];
  const found = asked[model.model];
  if (!found || found.space !== model.space || found.alias !== model.alias || found.enabled !== model.enabled) {
    asked[model.model] = { text: found?.text ?? "…", space: model.space, alias: model.alias, enabled: model.enabled };
    ask(`models/${inPath(model.model)}`).then((answer) => {
      if (asked[model.model]) asked[model.model].text = answer.ok ? JSON.stringify(answer.document.spec, null, 2) : refusal(answer);
      app.redraw();
    });
  }
  return html`<pre>${asked[model.model].text}</pre>`;
}

export function reload(app) {
  return html`<button @click=${() => act(app, "Reload pool.yml", "reload", { reason: "asked on the page" })}>Reload pool.yml</button>`;
}

export function clearCache(app) {
  return html`<button @click=${() => act(app, "Clear the cache", "cache/clear", {})}>Clear</button>`;
}

// --- registering, in a form made from the API's document

export function registration(app) {
  const show = async () => {
    isOpen = !isOpen;
    if (isOpen && !schemas) {
      const answer = await ask("openapi.json");
      if (!answer.ok) return app.say(refusal(answer), true);
      schemas = answer.document.components.schemas;
    }
    app.redraw();
  };
  return html`<button class="first" aria-expanded=${isOpen} @click=${show}>${isOpen ? "Close" : "Register a model"}</button>
    ${isOpen && schemas ? form(app) : nothing}`;
}

function form(app) {
  const { properties, required } = schemas.Register;
  const ofDriver = schemas[`driver_config.${driver}`]?.properties ?? {};
  const first = Object.fromEntries(FORM_FIRST.map((name) => [name, properties[name]]));
  const rest = Object.entries(properties).filter(([name]) => !FORM_FIRST.includes(name) && name !== "driver_config");
  const [near, far] = [[], []];
  for (const entry of Object.entries(ofDriver)) (DRIVER_FIRST.includes(entry[0]) ? near : far).push(entry);
  near.sort((a, b) => DRIVER_FIRST.indexOf(a[0]) - DRIVER_FIRST.indexOf(b[0]));
  return html`<form class="card register" @submit=${(event) => register(app, event)}>
    <h2>Register a model</h2>
    <div class="fields">${Object.entries(first).map(([name, schema]) => field(app, name, schema, required.includes(name)))}
      ${near.map(([name, schema]) => field(app, `driver_config.${name}`, schema, false))}</div>
    <details><summary>More settings of the driver</summary><div class="fields">${far.map(([name, schema]) => field(app, `driver_config.${name}`, schema, false))}</div></details>
    <details><summary>Replicas, queue, place</summary><div class="fields">${rest.map(([name, schema]) => field(app, name, schema, false))}</div></details>
    <button class="first" ?disabled=${running !== null}>Register</button>
    ${running ? html`<span class="quiet">${running}</span>` : nothing}</form>`;
}

function field(app, name, schema, isRequired) {
  const type = [schema.type].flat()[0];
  const label = name.replace("driver_config.", "").replaceAll("_", " ");
  const says = schema.description ?? "";
  const choices = (schema.enum ?? (type === "boolean" ? [true, false] : [])).filter((one) => one !== null);
  if (choices.length) {
    const isDriver = name === "driver_type";
    return html`<label>${label}<select name=${name} @change=${isDriver ? (event) => { driver = event.target.value; app.redraw(); } : nothing}>
      ${isDriver ? nothing : html`<option value="">${"default" in schema && schema.default !== null ? `default: ${schema.default}` : "default"}</option>`}
      ${choices.map((one) => html`<option ?selected=${isDriver && one === driver}>${one}</option>`)}</select><small>${says}</small></label>`;
  }
  const isNumber = type === "integer" || type === "number";
  return html`<label>${label}<input name=${name} ?required=${isRequired} autocomplete="off" spellcheck="false" data-type=${type ?? "string"}
    inputmode=${isNumber ? "decimal" : nothing} placeholder=${"default" in schema && ![null, ""].includes(schema.default) ? show(schema.default) : ""}><small>${says}</small></label>`;
}

const show = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));

/** What a person typed, in the type of its setting; lists and mappings as JSON. */
function value(element) {
  const { value: given, dataset } = element;
  if (element.tagName === "SELECT") return given === "true" ? true : given === "false" ? false : given;
  if (dataset.type === "integer" || dataset.type === "number") return Number.isNaN(Number(given)) ? given : Number(given);
  if (dataset.type === "object" || dataset.type === "array") {
    try {
      return JSON.parse(given);
    } catch { return given; }
  }
  return given;
}

async function register(app, event) {
  event.preventDefault();
  const body = {}, config = {};
  for (const element of event.target.elements) {
    if (!element.name || element.value.trim() === "") continue;
    const inside = element.name.startsWith("driver_config.");
    (inside ? config : body)[element.name.replace("driver_config.", "")] = value(element);
  }
  if (Object.keys(config).length) body.driver_config = config;
  running = "asking …";
  app.redraw();
  const answer = await act(app, `Register ${body.model}`, "models/register?wait=false", body);
  running = null;
  if (answer.ok) {
    event.target.reset();
    isOpen = false;
    follow(app, body.model);
  }
  app.redraw();
}

/** Say when it is ready or why it is not; meanwhile its row shows how far it is. */
function follow(app, name) {
  let absent = 0;
  app.watch((live) => {
    const model = app.model(name);
    const candidate = live.candidates?.find((one) => one.model === name);
    absent = model || candidate ? 0 : absent + 1;
    if (absent > MOST_ABSENT) app.say(`${name} is not registered: the server's log says why.`, true);
    else if (model?.state === "ready") app.say(`${name} is ready.`);
    else if (model?.state === "failed") app.say(`${name} failed: ${model.last_error ?? "see its row"}`, true);
    else if (model && !["loading", "draining"].includes(model.state)) app.say(`${name} is ${model.state}.`);
    else {
      const progress = model?.progress ?? candidate?.progress;
      app.say(`${name} is loading${progress ? `: ${progress.step}` : ""} …`);
      return false;
    }
    return true;
  });
}
