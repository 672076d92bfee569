// Cosines, ranks and principal axes of small numbers of vectors. No DOM here.

export const dot = (a, b) => {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
};

export const norm = (a) => Math.sqrt(dot(a, a));

export const cosine = (a, b) => {
  const lengths = norm(a) * norm(b);
  return lengths ? dot(a, b) / lengths : 0;
};

/** Places from the largest score to the least; equal ones stay in their order. */
export const order = (scores) => scores.map((_, i) => i).sort((a, b) => scores[b] - scores[a] || a - b);

/** For each vector its cosine to every other. */
export const cosines = (vectors) => vectors.map((a) => vectors.map((b) => cosine(a, b)));

/**
 * Two principal axes of vectors: `{points: [[x, y]…], shares: [of the variance, on each axis]}`, or `{reason}`.
 * By the Gram matrix of the centred vectors, which is small where the vectors are long.
 */
export function principal(vectors) {
  const n = vectors.length;
  if (n < 3) return { reason: "A map needs three texts or more." };
  const width = vectors[0].length;
  const mean = Array(width).fill(0);
  for (const vector of vectors) for (let i = 0; i < width; i++) mean[i] += vector[i] / n;
  const centred = vectors.map((vector) => vector.map((value, i) => value - mean[i]));
  const gram = centred.map((a) => centred.map((b) => dot(a, b)));
  const total = gram.reduce((sum, row, i) => sum + row[i], 0);
  if (total < 1e-9) return { reason: "All vectors are equal, so there is nothing to draw." };
  const axes = [];
  for (let axis = 0; axis < 2; axis++) {
    const { value, vector } = largest(gram, axis);
    axes.push({ value: Math.max(value, 0), vector });
    for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) gram[i][j] -= value * vector[i] * vector[j];
  }
  const points = vectors.map((_, i) => axes.map(({ value, vector }) => Math.sqrt(value) * vector[i]));
  return { points, shares: axes.map(({ value }) => value / total) };
}

/** The largest eigenvalue of a symmetric matrix with its vector, by power iteration from a start that is always the same. */
function largest(matrix, seed) {
  const n = matrix.length;
  let vector = matrix.map((_, i) => Math.sin(1 + i * (seed + 1.7)));
  let value = 0;
  for (let turn = 0; turn < 500; turn++) {
    const next = matrix.map((row) => dot(row, vector));
    const length = norm(next);
    if (length < 1e-12) return { value: 0, vector: Array(n).fill(0) };
    const scaled = next.map((one) => one / length);
    const moved = Math.min(norm(scaled.map((one, i) => one - vector[i])), norm(scaled.map((one, i) => one + vector[i])));
    vector = scaled;
    value = dot(vector, matrix.map((row) => dot(row, vector)));
    if (moved < 1e-9) break;
  }
  const at = vector.reduce((best, one, i) => (Math.abs(one) > Math.abs(vector[best]) ? i : best), 0);
  return { value, vector: vector[at] < 0 ? vector.map((one) => -one) : vector };
}

/** Spearman's rank correlation of two lists of scores without regard to ties. */
export function rankCorrelation(a, b) {
  const ranks = (scores) => {
    const found = [];
    order(scores).forEach((place, rank) => { found[place] = rank; });
    return found;
  };
  const [first, second] = [ranks(a), ranks(b)];
  const n = a.length;
  if (n < 2) return 1;
  const squares = first.reduce((sum, rank, i) => sum + (rank - second[i]) ** 2, 0);
  return 1 - (6 * squares) / (n * (n * n - 1));
}

/** What the vectors of a query and a document come to: the sum of the query's best products, and each best of the document's. */
export function bestProducts(query, document) {
  const products = query.map((one) => document.map((other) => one.reduce((sum, value, i) => sum + value * other[i], 0)));
  const score = document.length ? products.reduce((sum, row) => sum + Math.max(...row), 0) : 0;
  return { score, ofDocument: document.map((_, j) => Math.max(...products.map((row) => row[j]))) };
}

/**
 * Which tokens of a text a model keeps: `true` or `false` for each. The special tokens around the text stay; of the rest
 * so many as the limit leaves room for, from the left, or with side "left" from the right behind the first `promptTokens`.
 */
export function kept(tokens, limit, side, promptTokens) {
  if (limit === null || tokens.length <= limit) return tokens.map(() => true);
  const head = Math.max(tokens.findIndex((token) => !token.special), 0);
  const tail = tokens.length - 1 - tokens.findLastIndex((token) => !token.special);
  const end = tokens.length - tail, room = Math.max(limit - tail, head);
  const first = side === "left" ? Math.min(Math.max(promptTokens, head), room) : room;
  const last = Math.max(end - (room - first), first);
  return tokens.map((_, i) => i < Math.min(first, end) || i >= last);
}

/** How many of a text's first tokens are a prompt's, by the tokens of the prompt alone: one at its end that ends a text is none. */
export const promptTokensOf = (tokens) => tokens.length - (tokens.at(-1)?.special ? 1 : 0);
