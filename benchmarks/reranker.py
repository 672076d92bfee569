"""A reranker with meaning, made here, since none can be had from a package index: the packaged MiniLM, briefly trained.

It learns to tell a passage that a few words were taken from; half a minute on two cores, once.
"""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

from benchmarks.texts import mixed, model_folder

SEED = 7
TRAINED_ON, WORDS = 200, range(20, 61)  # passages, and words in each
QUERY_WORDS = 5
LEARNING_RATE, BATCH_PAIRS, MAX_TOKENS = 2e-4, 16, 128


def reranker_folder(cache: Path) -> Path:
    """The folder of the trained model below `cache`, made if need be."""
    folder = cache / "reranker"
    if not (folder / "config.json").exists():
        making = cache / "reranker.making"
        shutil.rmtree(making, ignore_errors=True)
        train(making)
        making.rename(folder)
    return folder


def passages(n: int) -> list[str]:
    """`n` different texts, of which the model has not seen those after the first TRAINED_ON."""
    return [text for text in mixed(2560) if len(text.split()) in WORDS][:n]


def query_of(passage: str, chance: random.Random) -> str:
    """A few words in sequence."""
    words = list(dict.fromkeys(re.findall(r"[A-Za-z]{4,}", passage)))
    at = chance.randrange(max(1, len(words) - QUERY_WORDS))
    return " ".join(words[at : at + QUERY_WORDS])


def train(folder: Path) -> None:
    """Write the model there, in the layout of CrossEncoder."""
    import torch
    from sentence_transformers import CrossEncoder
    from torch.nn.functional import binary_cross_entropy_with_logits

    torch.manual_seed(SEED)
    chance = random.Random(SEED)
    encoder = CrossEncoder(str(model_folder()), num_labels=1, max_length=512, device="cpu", local_files_only=True)
    model, tokenizer = encoder.model, encoder.tokenizer
    seen = passages(TRAINED_ON)
    pairs = []
    for i, passage in enumerate(seen):
        query, another = query_of(passage, chance), seen[(i + chance.randrange(1, len(seen))) % len(seen)]
        pairs += [(query, passage, 1.0), (query, another, 0.0)]
    chance.shuffle(pairs)
    model.get_input_embeddings().requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE)
    model.train()
    for at in range(0, len(pairs), BATCH_PAIRS):
        queries, documents, wanted = zip(*pairs[at : at + BATCH_PAIRS], strict=True)
        options = {"padding": True, "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        logits = model(**tokenizer(list(queries), list(documents), **options)).logits[:, 0]
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(logits, torch.tensor(wanted)).backward()
        optimizer.step()
    model.eval()
    encoder.save_pretrained(str(folder))
