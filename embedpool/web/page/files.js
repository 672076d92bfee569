// Vectors as files that a person saves, and texts that a person copies.

/** NumPy's format, float32, of shape (texts, width). */
export function npy(vectors) {
  const head = `{'descr': '<f4', 'fortran_order': False, 'shape': (${vectors.length}, ${vectors[0]?.length ?? 0}), }`;
  const length = Math.ceil((10 + head.length + 1) / 64) * 64 - 10;
  const bytes = new Uint8Array(10 + length + 4 * vectors.length * (vectors[0]?.length ?? 0));
  bytes.set([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, length & 255, length >> 8]);
  bytes.set(new TextEncoder().encode(head.padEnd(length - 1) + "\n"), 10);
  const view = new DataView(bytes.buffer, 10 + length);
  vectors.flat().forEach((value, i) => view.setFloat32(4 * i, value, true));
  return bytes;
}

export const jsonl = (texts, vectors) =>
  texts.map((text, i) => JSON.stringify({ text, vector: vectors[i] }) + "\n").join("");

/** Two columns more than numbers would spoil the projectors that read it: the texts go to a file of their own. */
export const tsv = (vectors) => vectors.map((vector) => vector.join("\t") + "\n").join("");
export const labelsTsv = (texts) => texts.map((text) => text.replace(/[\t\r\n]+/g, " ") + "\n").join("");

export function save(name, content, type) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Into the clipboard, also where the page came over plain http from another host, which has no `navigator.clipboard`. */
export async function copy(app, text, says) {
  const isDone = await (navigator.clipboard?.writeText(text) ?? Promise.reject()).then(() => true, () => copySelected(text));
  app.say(isDone ? says : "The browser does not let the page copy; select the text instead.", !isDone);
}

function copySelected(text) {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "hidden";
  const before = document.activeElement;
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  before?.focus();
  return isDone;
}
