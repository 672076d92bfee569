// Talks to the server that this page came from, and to nobody else. The key lives in this module alone.

export const base = new URL(location.pathname.replace(/\/ui(\/(index\.html)?)?$/, "/"), location.origin);

const REMEMBERED = "embedpool-key"; // in sessionStorage, where the person asked for it
const PATIENCE_MS = 5000; // with what is asked again and again; what a person asks for once may take its time
let key = sessionStorage.getItem(REMEMBERED) ?? "";

export const hasKey = () => key !== "";

export function setKey(given, remember) {
  key = given.trim();
  if (key && remember) sessionStorage.setItem(REMEMBERED, key);
  else sessionStorage.removeItem(REMEMBERED);
}

/** The server's answer: `{ok, status, headers, document, says}`; status 0 where there was none. */
export const ask = (path, body, method = body === undefined ? "GET" : "POST") => send(path, body, method, readText);

/** The same for what a view asks again and again: a server that hangs is one that does not answer. */
export const look = (path) => send(path, undefined, "GET", readText, PATIENCE_MS);

/** A file's content, which may be large: `{ok, content, says}`. */
export const fetchFile = (path) => send(path, undefined, "GET", async (response) =>
  (response.ok ? { ok: true, content: await response.blob() } : readText(response)));

async function send(path, body, method, read, patienceMs = 0) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const impatience = new AbortController();
  const timer = patienceMs ? setTimeout(() => impatience.abort(), patienceMs) : 0;
  try {
    return await read(await fetch(new URL(path, base), {
      method, headers, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store", signal: impatience.signal,
    }));
  } catch { // also where it ends in the middle of an answer
    return { ok: false, status: 0, headers: new Headers(), document: null, says: "the server does not answer" };
  } finally {
    clearTimeout(timer);
  }
}

async function readText(response) {
  const text = await response.text();
  let document = null;
  try {
    document = JSON.parse(text);
  } catch { /* a proxy's page, say */ }
  const error = document?.error; // an object, or TEI's sentence
  const says = error?.message ?? (typeof error === "string" ? error : response.ok ? "" : text.slice(0, 300));
  return { ok: response.ok, status: response.status, headers: response.headers, document, says };
}

/** What the server said to what it did not do, with its status and code. */
export function refusal({ says, status, document }) {
  const told = [status, document?.error?.code].filter(Boolean).join(" ");
  return told ? `${says} (${told})` : says;
}

/** A name as a part of a path; slashes stand as they are, as embedpool has them. */
export const inPath = (name) => name.split("/").map(encodeURIComponent).join("/");
