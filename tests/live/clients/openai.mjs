// As ask.py, with OpenAI's own client for JavaScript: openai.mjs FOLDER_OF_ITS_PACKAGE URL
import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

const [folder, url] = process.argv.slice(2);
const OpenAI = createRequire(`${folder}/package.json`)("openai").default;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const patient = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 30 });
const texts = JSON.parse(await text(process.stdin));

async function vectors(input, fields = {}, asked = client) {
  const answer = await asked.embeddings.create({ model: "m", input, ...fields });
  return answer.data.map((entry) => entry.embedding);
}

async function raised(call) {
  try {
    await call();
    return "none";
  } catch (error) {
    return error.constructor.name;
  }
}

const burst = (asked) =>
  Promise.allSettled(Array.from({ length: 6 }, (_, i) => vectors(`text ${i}`, { model: "slow" }, asked)));
const refused = (results) => results.filter((r) => r.status === "rejected").map((r) => r.reason.constructor.name);

console.log(
  JSON.stringify({
    one: (await vectors(texts[0]))[0],
    all: await vectors(texts),
    float: await vectors(texts, { encoding_format: "float" }),
    small: await vectors(texts, { dimensions: 64 }),
    errors: [
      await raised(() => vectors("a", { model: "nobody" })),
      await raised(() => vectors([101, 7592, 102])),
    ],
    refused: [...new Set(refused(await burst(client)))],
    refused_with_retries: refused(await burst(patient)),
  }),
);
