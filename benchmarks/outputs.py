"""Sparse and multi-vector rows beside their own library in one process, and several outputs of one pass beside as many.

The models are made here of the packaged MiniLM: their shapes are those of SPLADE, ColBERT and BGE-M3, their rows mean
little.

Usage:
  benchmarks.outputs [--rounds N] [--seconds S] [--write]

Options:
  --rounds N   Each round measures everything, and the reference beside it [default: 5].
  --seconds S  How long each server is asked [default: 8].
  --write      Write the table of README.md.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from docopt import docopt

from benchmarks import texts
from benchmarks.load import closed_loop
from benchmarks.report import between_markers, table
from benchmarks.servers import CACHE, MODEL, Running, running, serving

TEXTS, AT_ONCE, CLIENTS = 512, 16, 4  # texts in all, in a request, and requests at once
LIBRARY_BATCH = 32
ACTIVE_BIAS = -4.5  # of the vocabulary's layer: leaves some hundred entries of a text above zero
MULTIVECTOR_WIDTH, QUERY_TOKENS = 128, 32

ASKED = (
    ("sparse, 16 mixed texts a request, 4 clients: texts/s ÷ SparseEncoder.encode", ">=", 1.0),
    ("multivector, 16 mixed texts a request, 4 clients: texts/s ÷ MultiVectorEncoder.encode_document", ">=", 1.0),
    ("three outputs in one request: texts/s ÷ of three requests for one each", ">=", 2.0),
    ("late chunks, 16 a document: chunks/s ÷ texts/s of the same texts alone", ">=", 0.5),
)


def main() -> None:
    """Measure, print, and write."""
    arguments = docopt(__doc__)
    rounds, seconds = int(arguments["--rounds"]), float(arguments["--seconds"])
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        ups = {
            kind: stack.enter_context(running(serving({"driver": local(folder_of(kind))})))
            for kind in ("splade", "colbert", "m3", "dense")
        }
        for _ in range(rounds):
            for (name, _, _), value in zip(ASKED, _round(ups, seconds), strict=True):
                print(f"{name}: {value:.3f}", flush=True)
                found.setdefault(name, []).append(value)
    rows = []
    for name, sign, bound in ASKED:
        middle = statistics.median(found[name])
        measured = f"{middle:.2f} ({min(found[name]):.2f}, {max(found[name]):.2f})"
        rows.append([name, f"{sign} {bound}", measured, "yes" if middle >= bound else "**no**"])
    told = table(["what", "asked", "measured", "met"], rows)
    print(told)
    if arguments["--write"]:
        command = f"`--rounds {rounds} --seconds {seconds:g}`"
        between_markers("outputs", f"Medians, least and most of {rounds} rounds, {command}.\n\n{told}")


def local(folder: Path) -> dict[str, Any]:
    """The driver of a model in this folder."""
    return {"type": "local_st", "config": {"path": str(folder)}}


def _round(ups: dict[str, Running], seconds: float) -> Iterator[float]:
    """What ASKED asks for, in its order."""
    given = texts.mixed(TEXTS)
    for kind, encode in (("splade", sparse_encode), ("colbert", colbert_encode)):
        library = encode()
        library(given[:LIBRARY_BATCH])
        started = time.perf_counter()
        library(given)
        library_s = len(given) / (time.perf_counter() - started)
        yield _ask(ups[kind], given, seconds, {}) / library_s
    outputs = ["dense", "sparse", "multivector"]
    alone = [_ask(ups["m3"], given, seconds / 3, {"output": output}) for output in outputs]
    yield _ask(ups["m3"], given, seconds, {"output": outputs}) * sum(1 / rate for rate in alone)
    documents = [given[at : at + AT_ONCE] for at in range(0, len(given), AT_ONCE)]
    bodies = [json.dumps({"model": MODEL, "input": chunks, "late_chunking": True}).encode() for chunks in documents]
    late = closed_loop(ups["dense"].port, "/v1/embeddings", bodies, CLIENTS, seconds)
    yield AT_ONCE * late["answers"] / late["seconds"] / _ask(ups["dense"], given, seconds, {})


def _ask(up: Running, given: list[str], seconds: float, options: dict[str, Any]) -> float:
    """Texts a second."""
    wanted = {"encoding": "base64", **options}
    parts = [given[at : at + AT_ONCE] for at in range(0, len(given), AT_ONCE)]
    bodies = [json.dumps({"model": MODEL, "texts": part, "options": wanted}).encode() for part in parts]
    result = closed_loop(up.port, "/embed", bodies, CLIENTS, seconds)
    found: float = AT_ONCE * result["answers"] / result["seconds"]
    return found


# --- the models, and their library


def folder_of(kind: str) -> Path:
    """The model's folder, made if need be."""
    if kind == "dense":
        return texts.model_folder()
    folder = CACHE / "outputs" / kind
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        MAKERS[kind](folder)
    return folder


def make_splade(folder: Path) -> None:
    """The embeddings of tokens are the vocabulary's layer."""
    import torch
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sentence_transformer.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling
    from transformers import AutoTokenizer, BertForMaskedLM

    base = folder.with_name("splade-base")
    torch.manual_seed(0)
    model = BertForMaskedLM.from_pretrained(texts.model_folder())
    with torch.no_grad():
        model.cls.predictions.transform.dense.weight.copy_(torch.eye(model.config.hidden_size))
        model.cls.predictions.transform.dense.bias.zero_()
        model.get_output_embeddings().bias.fill_(ACTIVE_BIAS)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(texts.model_folder()).save_pretrained(base)
    steps = [Transformer(str(base), transformer_task="fill-mask", max_seq_length=256), SpladePooling()]
    SparseEncoder(modules=steps, device="cpu").save_pretrained(str(folder), create_model_card=False)


def make_colbert(folder: Path) -> None:
    """A projection of the tokens' vectors."""
    import torch
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Transformer

    expansion: Any = {"strategy": "fixed", "attend": False, "length": QUERY_TOKENS}
    first = Transformer(str(texts.model_folder()), query_expansion=expansion, document_length=256)
    torch.manual_seed(0)
    layer = Dense(
        384, MULTIVECTOR_WIDTH, bias=False, activation_function=torch.nn.Identity(),
        module_input_name="token_embeddings",
    )  # fmt: skip
    steps = [first, layer, MultiVectorMask(list(string.punctuation)), Normalize("token_embeddings")]
    MultiVectorEncoder(modules=steps, device="cpu").save_pretrained(str(folder), create_model_card=False)


def make_m3(folder: Path) -> None:
    """Laid out as BGE-M3 is once it was converted."""
    import torch
    from safetensors.torch import save_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    steps = [Transformer(str(texts.model_folder()), max_seq_length=256), Pooling(384, pooling_mode="cls"), Normalize()]
    SentenceTransformer(modules=steps, device="cpu").save_pretrained(str(folder), create_model_card=False)
    torch.manual_seed(0)
    for name, width in (("sparse", 1), ("colbert", 384)):
        layer = torch.nn.Linear(384, width)
        save_file(layer.state_dict(), folder / f"{name}_linear.safetensors")


MAKERS: dict[str, Callable[[Path], None]] = {"splade": make_splade, "colbert": make_colbert, "m3": make_m3}


def sparse_encode() -> Callable[[list[str]], Any]:
    """As its library is used."""
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(folder_of("splade")), device="cpu", local_files_only=True)
    return lambda given: model.encode(given, batch_size=LIBRARY_BATCH, show_progress_bar=False)


def colbert_encode() -> Callable[[list[str]], Any]:
    """As its library is used."""
    from sentence_transformers import MultiVectorEncoder

    model = MultiVectorEncoder(str(folder_of("colbert")), device="cpu", local_files_only=True)
    return lambda given: model.encode_document(given, batch_size=LIBRARY_BATCH, show_progress_bar=False)


if __name__ == "__main__":
    main()
