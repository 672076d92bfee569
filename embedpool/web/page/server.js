// Talks to the server that this page came from, and to nobody else. The key lives in this module alone.

export const base = new URL(location.pathname.replace(/\/ui\/?$/, "/"), location.origin);

const REMEMBERED = "embedpool-key"; // in sessionStorage, where the person asked for it
let key = sessionStorage.getItem(REMEMBERED) ?? "";

export const hasKey = () => key !== "";

export function setKey(given, remember) {
  key = given.trim();
  if (key && remember) sessionStorage.setItem(REMEMBERED, key);
  else sessionStorage.removeItem(REMEMBERED);
}

/** The server's answer: `{ok, status, headers, document}`; status 0 where there was none. */
export async function ask(path, body, method = body === undefined ? "GET" : "POST") {
  const response = await send(path, body, method);
  if (!response) return { ok: false, status: 0, headers: new Headers(), document: null, says: GONE };
  return read(response);
}

/** A file's content, which may be large: `{ok, content, says}`. */
export async function fetchFile(path) {
  const response = await send(path, undefined, "GET");
  if (!response) return { ok: false, says: GONE };
  return response.ok ? { ok: true, content: await response.blob() } : read(response);
}

const GONE = "the server does not answer";

async function send(path, body, method) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  try {
    return await fetch(new URL(path, base), {
      method, headers, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store",
    });
  } catch {
    return null;
  }
}

async function read(response) {
  const text = await response.text();
  let document = null;
  try {
    document = JSON.parse(text);
  } catch { /* a proxy's page, say */ }
  const says = document?.error?.message ?? (response.ok ? "" : text.slice(0, 300));
  return { ok: response.ok, status: response.status, headers: response.headers, document, says };
}

/** A name as a part of a path; slashes stand as they are, as embedpool has them. */
export const inPath = (name) => name.split("/").map(encodeURIComponent).join("/");
