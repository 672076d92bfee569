"""What is refused, and with what words; what kind a folder is found to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedpool.config.spec import LocalStConfig
from embedpool.drivers.layout import Layout, read_layout
from embedpool.drivers.local_st import LocalStDriver
from embedpool.drivers.tokenizer import tokenizers_of
from embedpool.errors import ModelFailed
from embedpool.tasks.driver import Folders
from tests.conftest import open_here
from tests.zoo import WORDPIECE, encoder, make, sentence_transformer

CONVERT = "embedpool pull --convert --to NEW MODEL"


@pytest.fixture
def layout(tmp_path: Path) -> Callable[..., Layout]:
    """The layout of a folder with these files, each as JSON, and weights that nobody reads."""

    def of(config: Any = None, *, weights: bool = True, register: Any = None, **files: Any) -> Layout:
        for name, document in {"config": config, **files}.items():
            if document is not None:
                file = tmp_path / f"{name.replace('__', '/')}.json"
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(document))
        if weights:
            save_file({"w": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
        return read_layout(tmp_path, LocalStConfig(**(register or {})))

    return of


def of(architecture: str, **config: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **config}


def module(kind: str, path: str = "") -> dict[str, str]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


OTHER_KINDS = {
    "tokens": ({"config": of("BertForTokenClassification")}, "a classifier of tokens"),
    "answers": ({"config": of("BertForQuestionAnswering")}, "a finder of answers"),
    "images": ({"config": of("ColPaliForRetrieval")}, "a model of images"),
}
ROUTER = {"types": {"q": "sentence_transformers.models.SparseStaticEmbedding"}, "structure": {"query": ["q"]}}
OTHER_OUTPUTS = {
    "colbert of stanford": ({"config": of("HF_ColBERT")}, "multivector"),
    "pylate": (
        {
            "modules": [module("Transformer"), {"type": "pylate.models.Dense.Dense", "path": ""}],
            "config_sentence_transformers": {"model_type": "ColBERT"},
        },
        "multivector",
    ),
    "early pylate": (
        {
            "modules": [module("Transformer"), {"type": "sentence_transformers.models.Dense", "path": ""}],
            "config_sentence_transformers": {"query_prefix": "[Q] ", "document_prefix": "[D] "},
        },
        "multivector",
    ),
    "colbert": ({"modules": [module("Transformer"), module("MultiVectorMask", "1")]}, "multivector"),
    "splade": ({"modules": [module("MLMTransformer"), module("SpladePooling", "1")]}, "sparse"),
    "sparse router": (
        {"modules": [module("Router")], "router_config": ROUTER, "q__config": {"path": "x/idf.json"}, "q__idf": {}},
        "sparse",
    ),
    "sparse encoder": (
        {"modules": [module("Transformer")], "config_sentence_transformers": {"model_type": "SparseEncoder"}},
        "sparse",
    ),
}
SCORING = {
    "one label": ({"config": of("BertForSequenceClassification", id2label={"0": "x"})}, "rerank"),
    "two labels": ({"config": of("BertForSequenceClassification")}, "classify"),
    "labels": ({"config": of("BertForSequenceClassification", num_labels=5)}, "classify"),
    "cross-encoder": (
        {"config": of("X", num_labels=1), "config_sentence_transformers": {"model_type": "CrossEncoder"}},
        "rerank",
    ),
    "logit score": ({"modules": [module("Transformer"), module("LogitScore", "1")]}, "rerank"),
}


@pytest.mark.parametrize(("files", "says"), OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_another_kind_is_refused_unless_it_is_asked_for(
    layout: Callable[..., Layout], files: dict[str, Any], says: str
) -> None:
    """Nothing is served on a guess: the error names what the folder is, by what, and the key that overrides it."""
    with pytest.raises(ModelFailed, match=f"is {says}.*set driver.config.task to embed"):
        layout(**files)
    files = {"config": of("X"), **files}
    assert "served by task: embed" in str(layout(**files, register={"task": "embed"}).assumed)


@pytest.mark.parametrize(("files", "kind"), OTHER_OUTPUTS.values(), ids=OTHER_OUTPUTS)
def test_what_a_model_gives_is_told_by_its_files(
    layout: Callable[..., Layout], files: dict[str, Any], kind: str
) -> None:
    """Sparse and multi-vector models are served as what they are; as another kind only their encoder, if asked for."""
    assert layout(**files).kind == kind
    with pytest.raises(ModelFailed, match=r"cannot be served with driver\.config\.task rerank"):
        layout(**files, register={"task": "rerank"})
    found = layout(**{"config": of("X"), **files}, register={"task": "embed"})
    assert (found.kind, "served by task: embed" in str(found.assumed)) == ("embed", True)


@pytest.mark.parametrize(("files", "kind"), SCORING.values(), ids=SCORING)
def test_what_a_model_is_for_is_told_by_its_files(
    layout: Callable[..., Layout], files: dict[str, Any], kind: str
) -> None:
    """A model with one label reranks, one with more classifies; its encoder embeds only if that is asked for."""
    assert layout(**files).kind == kind
    assert layout(**files, register={"task": kind}).kind == kind
    other = "classify" if kind == "rerank" else "rerank"
    with pytest.raises(ModelFailed, match=f"cannot be served with driver.config.task {other}"):
        layout(**files, register={"task": other})
    found = layout(**{"config": of("X"), **files}, register={"task": "embed"})
    assert (found.kind, "served by task: embed" in str(found.assumed)) == ("embed", True)


@pytest.mark.parametrize(
    ("architecture", "config", "pooling"),
    [
        ("BertModel", {}, "token vectors are averaged"),
        ("BertForMaskedLM", {}, "token vectors are averaged"),
        ("T5ForConditionalGeneration", {}, "token vectors are averaged"),
        ("MistralForCausalLM", {}, "the last token's vector is taken"),
        ("MistralForCausalLM", {"is_causal": False}, "token vectors are averaged"),
    ],
)
def test_what_no_file_says_is_told(
    layout: Callable[..., Layout], architecture: str, config: dict[str, Any], pooling: str
) -> None:
    """A plain encoder is pooled as sentence-transformers would, and that is said."""
    found = layout(of(architecture, **config))
    assert found.kind == "embed"
    assert found.assumed == f"{pooling}, as sentence-transformers does: no modules.json says how"


REFUSED = {
    "no model": ({"weights": False}, "holds no model"),
    "pickle": ({"config": of("BertModel"), "weights": False, "pickle": "pytorch_model.bin"}, CONVERT),
    "pickle of a module": (
        {"modules": [module("Transformer"), module("Dense", "2_Dense")], "pickle": "2_Dense/pytorch_model.bin"},
        f"the module 2_Dense of .* pytorch_model.bin alone, a pickle.*{CONVERT}",
    ),
    "no weights": ({"config": of("BertModel"), "weights": False}, f"has no weights in safetensors.*{CONVERT}"),
    "no weights of a module": (
        {"modules": [module("Transformer"), module("Dense", "2_Dense")]},
        "the module 2_Dense of .* has no weights",
    ),
    "gguf": ({"weights": False, "pickle": "model.gguf"}, "GGUF alone: let Ollama or llama.cpp serve it"),
    "adapter": ({"config": of("BertModel"), "adapter_config": {"r": 8}}, "an adapter: merge it into its base model"),
    "images": ({"modules": [module("CLIPModel")]}, "CLIPModel reads images"),
    "words": ({"modules": [module("WordEmbeddings")]}, "WordEmbeddings splits texts into words by itself"),
    "own code": ({"modules": [module("Transformer"), {"type": "my.Step", "path": "1"}]}, "my.Step is code that comes"),
    "outside": ({"modules": [module("Transformer", "../other")]}, "outside of it"),
    "not a list of modules": ({"modules": ["a"]}, "no list of modules"),
    "empty router": ({"modules": [module("Router")]}, "names no types and structure"),
    "late router": (
        dict(
            modules=[module("Transformer"), module("Router", "1")],
            **{"1__router_config": {"types": {"a": "x.Dense"}, "structure": {"query": ["a"]}}},
        ),
        "as the first module alone",
    ),
    "query lengths": (
        {"config": of("BertModel"), "sentence_bert_config": {"query_length": 32}},
        "sets query_length, which embedpool does not honour yet",
    ),
}


@pytest.mark.parametrize(("files", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_refused_with_what_mends_it(
    layout: Callable[..., Layout], tmp_path: Path, files: dict[str, Any], says: str
) -> None:
    """Before anything is loaded, in a sentence."""
    files = dict(files)
    if pickle := files.pop("pickle", None):
        (tmp_path / pickle).parent.mkdir(exist_ok=True)
        (tmp_path / pickle).write_bytes(b"\x80")
    with pytest.raises(ModelFailed, match=says):
        layout(**files)


def test_pickles_that_are_no_weights_do_not_matter(layout: Callable[..., Layout], tmp_path: Path) -> None:
    """Such as what a training left behind, or the same weights in both forms."""
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"\x80")
    assert layout(of("BertModel")).kind == "embed"


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 100])
def test_weights_that_are_damaged_are_named(layout: Callable[..., Layout], tmp_path: Path, content: bytes) -> None:
    """A pointer of Git LFS, an empty file, and one that is no safetensors."""
    layout(of("BertModel"))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFailed, match=r"model.safetensors (is a pointer of Git LFS|cannot be read)"):
        layout(weights=False)


def test_code_of_a_model_is_named_where_it_is_missing(tmp_path: Path) -> None:
    """transformers says in its own words that it wants to run code; here the key is named that allows it."""
    folder = tmp_path / "m"
    sentence_transformer(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "their-own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    driver = LocalStDriver("m", LocalStConfig(path=str(folder), backend="torch"), 1, Folders(tmp_path, tmp_path))
    with pytest.raises(ModelFailed, match=r"needs code that comes with the model.*trust_remote_code to true in pool"):
        open_here(driver)


def test_a_table_without_a_row_for_each_token_is_refused(tmp_path: Path) -> None:
    """Else a text would be answered with an error, or with another token's vector."""
    folder = make("model2vec", tmp_path)
    save_file({"embeddings": load_file(folder / "model.safetensors")["embeddings"][:9]}, folder / "model.safetensors")
    driver = LocalStDriver("m", LocalStConfig(path=str(folder)), 1, Folders(tmp_path, tmp_path))
    with pytest.raises(ModelFailed, match="its table has 9 rows for the"):
        open_here(driver)


def test_the_tokenizer_of_a_subfolder_reads_the_files_there(tmp_path: Path) -> None:
    """Older folders keep the transformer below the root, with its own configuration."""
    encoder(tmp_path / "0_Transformer", "Bert", WORDPIECE(), max_position_embeddings=77)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32}')
    modules = [module("Transformer", "0_Transformer"), module("Pooling", "1_Pooling")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tokenizer,) = tokenizers_of(read_layout(tmp_path, LocalStConfig())).values()
    assert tokenizer.max_tokens == 77
