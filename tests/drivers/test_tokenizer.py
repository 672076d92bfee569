"""Token ids from a model's files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from embedpool.config.spec import LocalStConfig
from embedpool.drivers.layout import read_layout
from embedpool.drivers.padding import pad
from embedpool.drivers.tokenizer import FolderTokenizer, tokenizer_of
from embedpool.errors import ModelFailed
from tests.drivers.conftest import TEXTS

MODULES = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
LONG = [text for text in TEXTS if len(text.split()) == 600]


@pytest.fixture(scope="module")
def transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def tokenizer_in(folder: Path) -> FolderTokenizer:
    return tokenizer_of(read_layout(folder, LocalStConfig()))


@pytest.fixture
def made(folder: Path, tmp_path: Path) -> Callable[..., FolderTokenizer]:
    """Tokenizers of folders with MiniLM's tokenizer and other configurations."""

    def make(module: str = "", **files: Any) -> FolderTokenizer:
        (tmp_path / module).mkdir(exist_ok=True)
        (tmp_path / module / "tokenizer.json").symlink_to(folder / "tokenizer.json")
        (tmp_path / module / "model.safetensors").symlink_to(folder / "model.safetensors")
        files.setdefault("config", {"architectures": ["BertModel"]})
        for name, document in files.items():
            inner = "" if name in ("modules", "config_sentence_transformers") else module
            (tmp_path / inner / f"{name}.json").write_text(json.dumps(document))
        return tokenizer_in(tmp_path)

    return make


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:20]))
def test_ids_are_those_of_transformers(tokenizer: FolderTokenizer, transformers_tokenizer: Any, text: str) -> None:
    """A text's ids are those of the model's own tokenizer, special tokens included, at full length."""
    assert tokenizer.encode([text]) == [transformers_tokenizer(text, truncation=False, verbose=False)["input_ids"]]


def test_a_batch_is_measured_like_its_texts(tokenizer: FolderTokenizer) -> None:
    """Texts measured together are neither padded nor truncated, and none changes another."""
    assert tokenizer.encode(TEXTS) == [tokenizer.encode([text])[0] for text in TEXTS]


def _trained(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer of another family than MiniLM's, of a small vocabulary."""
    models, before, trainers = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.trainers
    made: Any
    if kind == "byte-level BPE":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = before.ByteLevel(add_prefix_space=False)
        trainer: Any = trainers.BpeTrainer(vocab_size=500, initial_alphabet=before.ByteLevel.alphabet())
    elif kind == "digits from the right":
        made = tokenizers.Tokenizer(models.BPE(unk_token="?"))
        pattern = tokenizers.Regex(r"\d{1,3}(?=(\d{3})*(\D|$))|\s+|[^\s\d]+")
        made.pre_tokenizer = before.Split(pattern, "isolated")
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["?"])
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer = tokenizers.normalizers.NFKC()
        if kind == "sentencepiece":
            made.pre_tokenizer = before.Sequence([before.WhitespaceSplit(), before.Metaspace()])
        trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="?", special_tokens=["?"])
    made.train_from_iterator([*TEXTS, "12 345 6789 1000000"] * 3, trainer)
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    return made


KINDS = ("MiniLM", "byte-level BPE", "digits from the right", "sentencepiece", "one word")
PIECES = (
    "the",
    "unbelievably",
    "x",
    "12",
    "1234567",
    "日本語の文",
    "。",
    "é",
    "e\u0301",
    "ﬁ",
    "👩‍👩‍👧‍👦",
    "-",
    "...",
    "Σ",
    "<s>",
    "[SEP]",
)


@pytest.fixture(scope="module")
def tokenizers_of_kinds(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FolderTokenizer]:
    found = {"MiniLM": tokenizer_in(folder)}
    for kind in KINDS[1:]:
        where = tmp_path_factory.mktemp("tokenizer")
        _trained(kind).save(str(where / "tokenizer.json"))
        (where / "config.json").write_text("{}")
        (where / "model.safetensors").symlink_to(folder / "model.safetensors")
        found[kind] = tokenizer_in(where)
    return found


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(
    pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=8),
    between=st.sampled_from(["", " ", "\n\n", "  "]),
    limit=st.integers(3, 9),
    times=st.integers(1, 60),
)
def test_a_long_text_is_read_no_further_than_is_kept_of_it(
    tokenizers_of_kinds: dict[str, FolderTokenizer],
    kind: str,
    pieces: list[str],
    between: str,
    limit: int,
    times: int,
) -> None:
    """What a cut at the right leaves of a text's beginning is what it leaves of the whole text, or nothing is said."""
    tokenizer, text = tokenizers_of_kinds[kind], between.join(pieces * times)
    begun, whole = tokenizer.beginning(text, limit), tokenizer.encode([text])[0]
    if begun is not None:
        assert len(begun) > limit
        assert tokenizer.cut(begun, limit, "right") == tokenizer.cut(whole, limit, "right")


@pytest.mark.parametrize("kind", KINDS)
def test_the_beginning_of_a_long_text_tells(tokenizers_of_kinds: dict[str, FolderTokenizer], kind: str) -> None:
    """Wherever a tokenizer reads word by word; a megabyte then costs as little as a page."""
    begun = tokenizers_of_kinds[kind].beginning("A sentence of several words, again. " * 30_000, 32)
    assert (begun is None) == (kind == "one word")
    assert begun is None or len(begun) < 1000


@pytest.mark.parametrize("limit", [3, 16, 256, 512])
def test_the_right_cut_is_the_tokenizers_own_truncation(
    tokenizer: FolderTokenizer, transformers_tokenizer: Any, limit: int
) -> None:
    """What is cut on the right is what the model's own tokenizer would cut."""
    theirs = transformers_tokenizer(LONG, truncation=True, max_length=limit)["input_ids"]
    assert [tokenizer.cut(ids, limit, "right") for ids in tokenizer.encode(LONG)] == theirs


@pytest.mark.parametrize("limit", [2, 3, 16, 256])
def test_the_left_cut_keeps_the_special_tokens_and_the_end(tokenizer: FolderTokenizer, limit: int) -> None:
    """What is cut on the left leaves the end of the text between the special tokens."""
    ids = tokenizer.encode(LONG[:1])[0]
    cut = tokenizer.cut(ids, limit, "left")
    assert len(cut) == limit
    assert (cut[0], cut[-1]) == (ids[0], ids[-1])
    assert cut[1:-1] == ids[-1 - (limit - 2) : -1]


def test_many_threads_share_a_tokenizer(tokenizer: FolderTokenizer) -> None:
    """One tokenizer serves all request threads."""
    expected = tokenizer.encode(TEXTS)
    with ThreadPoolExecutor(8) as threads:
        assert all(ids == expected for ids in threads.map(lambda _: tokenizer.encode(TEXTS), range(32)))


def test_the_limits_of_the_model_are_read(tokenizer: FolderTokenizer, folder: Path) -> None:
    """MiniLM has 512 positions, and its makers cut at 256."""
    assert (tokenizer.max_tokens, tokenizer.default_max_tokens, tokenizer.pad_id) == (512, 256, 0)
    assert (dict(tokenizer.prompts), tokenizer.default_prompt_name) == ({}, "")


def test_measuring_needs_no_torch(folder: Path) -> None:
    """A model that is not loaded can be measured: no torch, no transformers."""
    code = (
        "import sys; from pathlib import Path; from tests.drivers.test_tokenizer import tokenizer_in;"
        f" tokenizer_in(Path({str(folder)!r})).encode(['a']);"
        " sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0


def test_prompts_are_read(made: Callable[..., FolderTokenizer]) -> None:
    """The model's own prompts are known, and the one it uses by default."""
    prompts = {"query": "find: ", "document": ""}
    tokenizer = made(modules=MODULES, config_sentence_transformers={"prompts": prompts, "default_prompt_name": "query"})
    assert (dict(tokenizer.prompts), tokenizer.default_prompt_name) == (prompts, "query")


@pytest.mark.parametrize(
    ("config", "st_config", "tokenizer_config", "expected"),
    [
        ({"max_position_embeddings": 512}, {"max_seq_length": 128}, {}, (512, 128)),
        ({"max_position_embeddings": 512}, {}, {"model_max_length": 384}, (512, 384)),
        ({"max_position_embeddings": 512}, {}, {"model_max_length": int(1e30)}, (512, 512)),
        ({"max_position_embeddings": 512}, {}, {}, (512, 512)),
        ({"max_position_embeddings": 514, "model_type": "xlm-roberta", "pad_token_id": 1}, {}, {}, (512, 512)),
        ({"max_position_embeddings": 514, "model_type": "mpnet"}, {}, {}, (512, 512)),
        ({}, {"max_seq_length": 128}, {}, (None, 128)),
        ({}, {}, {}, (None, None)),
    ],
)
def test_limits_come_from_whatever_file_knows_them(
    made: Callable[..., FolderTokenizer],
    config: Any,
    st_config: Any,
    tokenizer_config: Any,
    expected: tuple[int | None, int | None],
) -> None:
    """Positions come from config.json, minus those that a model type holds back; the own limit from its other files."""
    tokenizer = made(config=config, sentence_bert_config=st_config, tokenizer_config=tokenizer_config)
    assert (tokenizer.max_tokens, tokenizer.default_max_tokens) == expected


def test_the_tokenizer_may_lie_in_a_modules_folder(
    made: Callable[..., FolderTokenizer], tokenizer: FolderTokenizer
) -> None:
    """Where modules.json points elsewhere, the tokenizer and its limits are read there."""
    found = made(
        "0_Transformer", modules=[{**MODULES[0], "path": "0_Transformer"}], sentence_bert_config={"max_seq_length": 99}
    )
    assert found.default_max_tokens == 99
    assert found.encode(["hello"]) == tokenizer.encode(["hello"])


def test_lower_case_of_the_pipeline(made: Callable[..., FolderTokenizer]) -> None:
    """A pipeline that lowers case before the tokenizer is followed; a special token stays one, as in the library."""
    found = made(sentence_bert_config={"do_lower_case": True})._tokenizer.normalizer.normalize_str("ÀBC SΣ")
    assert found == "abc s\u03c3"  # not the letter's form at a word's end
    tokenizer = made("other", modules=[{**MODULES[0], "path": "other"}], sentence_bert_config={"do_lower_case": True})
    assert tokenizer.encode(["[SEP] ABC"]) == tokenizer.encode(["[SEP] abc"])


def test_older_files_give_a_fast_tokenizer(folder: Path, tmp_path: Path, tokenizer: FolderTokenizer) -> None:
    """A model without tokenizer.json is measured by what transformers builds from its older files."""
    for name in ("vocab.txt", "config.json", "tokenizer_config.json", "special_tokens_map.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    assert tokenizer_in(tmp_path).encode(TEXTS) == tokenizer.encode(TEXTS)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """A folder that is no model is told in a sentence."""
    with pytest.raises(ModelFailed, match=tmp_path.name):
        tokenizer_in(tmp_path)


def test_pad() -> None:
    """Ids become rectangular int64 arrays: padded on the right, masked, with a zero type."""
    padded = pad([[5, 6, 7], [8], [9, 10]], pad_id=3)
    np.testing.assert_array_equal(padded["input_ids"], [[5, 6, 7], [8, 3, 3], [9, 10, 3]])
    np.testing.assert_array_equal(padded["attention_mask"], [[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    np.testing.assert_array_equal(padded["token_type_ids"], np.zeros((3, 3)))
    assert {array.dtype for array in padded.values()} == {np.dtype(np.int64)}


def test_pad_is_what_transformers_pads(tokenizer: FolderTokenizer, transformers_tokenizer: Any) -> None:
    """The arrays are those that the model's own tokenizer would give."""
    theirs = transformers_tokenizer(TEXTS[:12], padding=True, return_tensors="np")
    ours = pad(tokenizer.encode(TEXTS[:12]), tokenizer.pad_id)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_tokens_have_their_place_in_the_text(tokenizer: FolderTokenizer) -> None:
    """Each is what stands between its start and stop; together they are the ids that are embedded."""
    text = "Tokenizers don't pad: ünïcode!"
    (tokens,) = tokenizer.tokens([text], special=True)
    assert [token.id for token in tokens] == tokenizer.encode([text])[0]
    assert [token.text for token in (tokens[0], tokens[-1])] == ["[CLS]", "[SEP]"]
    inner = tokens[1:-1]
    assert [token.text for token in inner] == [text[token.start : token.stop] for token in inner]
    assert tokenizer.tokens([text], special=False) == [inner]


def test_ids_are_decoded(tokenizer: FolderTokenizer) -> None:
    """What was tokenized comes back, as far as the tokenizer kept it."""
    ids = tokenizer.encode(["hello world"])
    assert tokenizer.decode(ids, skip_special=True) == ["hello world"]
    assert tokenizer.decode(ids, skip_special=False) == ["[CLS] hello world [SEP]"]


FILES = (
    "tokenizer.json", "config.json", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
)  # fmt: skip
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 466247\n"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("content", "says"), [
    (POINTER, "git lfs pull"), (b"", "cannot be read"), (b'{"a": ', "cannot be read"), (b"<html>", "cannot be read"),
    (b"\xef\xbb\xbf{}", "cannot be read"), (b"\xff\xfe", "cannot be read"), (b"7", "cannot be read|holds int"),
], ids=lambda value: ascii(value)[:12])  # fmt: skip
def test_a_broken_file_is_named(
    made: Callable[..., FolderTokenizer], tmp_path: Path, file: str, content: bytes, says: str
) -> None:
    """Whatever is in its place: a model is never served without what it says."""
    made()
    (tmp_path / file).unlink(missing_ok=True)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelFailed, match=says) as caught:
        tokenizer_in(tmp_path)
    assert str(tmp_path / file) in caught.value.message


@pytest.mark.parametrize("document", ["a fox", ""])
@pytest.mark.parametrize("query", ["what is it?", ""])
def test_the_parts_of_a_pair_that_the_tokenizer_joins(
    tokenizer: FolderTokenizer, transformers_tokenizer: Any, query: str, document: str
) -> None:
    """Are where they belong, whichever is empty; of a text alone the last part is all of it."""
    (pair,) = tokenizer.whole([(query, document)])
    bare = tokenizer.bare([query, document])
    assert [pair.ids[pair.first], pair.ids[pair.last]] == bare
    expected = transformers_tokenizer([(query, document)])  # alone an empty document counts as none
    assert pair.ids == expected["input_ids"][0]
    assert pair.last.start == expected["token_type_ids"][0].index(1)
    (alone,) = tokenizer.whole([(query,)])
    assert (alone.ids[alone.first], alone.ids[alone.last], alone.typed) == ([], bare[0], False)
