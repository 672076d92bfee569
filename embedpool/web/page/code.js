// The request that the page sends, as a person would write it elsewhere. Keys stand as variables, never as values.
import { base, hasKey } from "./server.js";

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

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl(path, body) {
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $EMBEDPOOL_KEY"` : "";
  return `curl -s ${root()}${path} -H 'Content-Type: application/json'${key} \\\n  -d ${shell(JSON.stringify(body))}`;
}

function requests(path, body, reading) {
  const key = hasKey() ? `, headers={"Authorization": f"Bearer {os.environ['EMBEDPOOL_KEY']}"}` : "";
  return `${hasKey() ? "import os\n\n" : ""}import requests

answer = requests.post("${root()}${path}", json=${python(body)}${key}, timeout=60)
answer.raise_for_status()
${reading}`;
}

function javascript(path, body, reading) {
  const key = hasKey() ? `, Authorization: \`Bearer \${process.env.EMBEDPOOL_KEY}\`` : "";
  return `const answer = await fetch("${root()}${path}", {
  method: "POST",
  headers: { "Content-Type": "application/json"${key} },
  body: JSON.stringify(${json(body)}),
});
if (!answer.ok) throw new Error(await answer.text());
${reading}`;
}

function client(call, options) {
  const given = Object.entries(options).map(([name, one]) => `, ${name}=${python(one, "    ")}`).join("");
  const key = hasKey() ? `, api_key=os.environ["EMBEDPOOL_KEY"]` : "";
  return `${hasKey() ? "import os\n\n" : ""}from embedpool import Client

with Client("${root()}"${key}) as client:
    ${call.replace("OPTIONS", given)}`;
}

/** Snippets for texts and options: `[[title, text]…]`. */
export function embedding(model, texts, options) {
  const body = { model, texts, ...(Object.keys(options).length ? { options } : {}) };
  const { dimensions, input_type: type } = options;
  const cohereType = { query: "search_query", document: "search_document" }[type] ?? type ?? "search_document";
  return [
    ["curl", curl("/embed", body)],
    ["Python: embedpool", client(`vectors = client.embed(${python(texts, "    ")}, model=${python(model)}OPTIONS)`, options)],
    ["Python: openai", `${hasKey() ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${root()}/v1", api_key=${keyOf("EMBEDPOOL_KEY")})
answer = client.embeddings.create(model=${python(model)}, input=${python(texts)}${dimensions ? `, dimensions=${dimensions}` : ""})
vectors = [one.embedding for one in answer.data]`],
    ["Python: cohere", `${hasKey() ? "import os\n\n" : ""}import cohere

client = cohere.ClientV2(api_key=${keyOf("EMBEDPOOL_KEY")}, base_url="${root()}")
answer = client.embed(model=${python(model)}, texts=${python(texts)}, input_type=${python(cohereType)}, embedding_types=["float"])
vectors = answer.embeddings.float_`],
    ["Python: requests", requests("/embed", body, `vectors = answer.json()["vectors"]`)],
    ["JavaScript", javascript("/embed", body, "const { vectors } = await answer.json();")],
  ];
}

/** Of sparse rows, or a vector for each token. */
export function otherOutput(model, texts, output) {
  const body = { model, texts, options: { output } };
  return [
    ["curl", curl("/embed", body)],
    ["Python: embedpool", client(`rows = client.embed_${output}(${python(texts, "    ")}, model=${python(model)})`, {})],
    ["Python: requests", requests("/embed", body, `rows = answer.json()["vectors"]`)],
    ["JavaScript", javascript("/embed", body, "const { vectors } = await answer.json();")],
  ];
}

export function reranking(model, query, documents) {
  const body = { model, query, documents };
  return [
    ["curl", curl("/rerank", body)],
    ["Python: embedpool", client(`ranked = client.rerank(${python(query)}, ${python(documents, "    ")}, model=${python(model)})`, {})],
    ["Python: cohere", `${hasKey() ? "import os\n\n" : ""}import cohere

client = cohere.ClientV2(api_key=${keyOf("EMBEDPOOL_KEY")}, base_url="${root()}")
answer = client.rerank(model=${python(model)}, query=${python(query)}, documents=${python(documents)})
ranked = [(one.index, one.relevance_score) for one in answer.results]`],
    ["Python: requests", requests("/rerank", body, `ranked = answer.json()["results"]`)],
    ["JavaScript", javascript("/rerank", body, "const { results } = await answer.json();")],
  ];
}

export function classifying(model, texts) {
  const body = { model, input: texts };
  return [
    ["curl", curl("/classify", body)],
    ["Python: embedpool", client(`labels = client.classify(${python(texts, "    ")}, model=${python(model)})`, {})],
    ["Python: requests", requests("/classify", body, `labels = answer.json()["data"]`)],
    ["JavaScript", javascript("/classify", body, "const { data } = await answer.json();")],
  ];
}
