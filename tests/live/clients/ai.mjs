// Ask a server through Vercel's AI SDK: ai.mjs FOLDER_OF_NODE_MODULES URL, texts as JSON on standard input.
// It splits many texts and sends the parts at once; without retries each of them must be served.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import path from "node:path";

const [folder, url] = process.argv.slice(2);
const require = createRequire(path.join(path.resolve(folder), "index.js"));
const { embed, embedMany } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { createCohere } = require("@ai-sdk/cohere");
const texts = JSON.parse(readFileSync(0, "utf8"));

const openai = createOpenAICompatible({ name: "here", baseURL: `${url}/v1`, apiKey: "none" });
const cohere = createCohere({ baseURL: `${url}/v2`, apiKey: "none" });
const many = Array.from({ length: 2000 }, (_, i) => `${texts[i % texts.length]} ${i}`);

const raised = async (call) => {
  try {
    await call();
    return "none";
  } catch (error) {
    return error.name;
  }
};

const model = openai.textEmbeddingModel("m");
const found = {
  one: (await embed({ model, value: texts[0], maxRetries: 0 })).embedding,
  all: (await embedMany({ model, values: texts, maxRetries: 0 })).embeddings,
  more: (await embedMany({ model: cohere.textEmbeddingModel("m"), values: texts, maxRetries: 0 })).embeddings,
  many: (await embedMany({ model: cohere.textEmbeddingModel("m"), values: many, maxRetries: 0 })).embeddings.length,
  errors: [
    await raised(() => embed({ model: openai.textEmbeddingModel("nobody"), value: "a", maxRetries: 0 })),
  ],
};
console.log(JSON.stringify(found));
