"""Token counts and ids of texts from a model's files alone: the tokenizers package, no torch, no GIL while it works."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from typing_extensions import override

from embedpool.errors import ModelFailed
from embedpool.tasks.item import Ids
from embedpool.tasks.tokenizer import Token, Tokenizer

# Position 0 of these is behind the padding index, so they hold fewer tokens than positions.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl", "ibert")


CHARS_PER_TOKEN = 12  # of a beginning that most probably has enough tokens
LFS_POINTER = b"version https://git-lfs"
TRAILING_DIGITS = re.compile(r"\d+\Z")


class FolderTokenizer(Tokenizer):
    """The model's fast tokenizer without padding and truncation. One per model, shared by all request threads."""

    def __init__(self, folder: Path) -> None:
        config = _json(folder / "config.json")
        st_config = _json(folder / "config_sentence_transformers.json")
        module = folder / _first_module_path(folder)
        limits = _json(module / "sentence_bert_config.json")
        tokenizer_config = _json(module / "tokenizer_config.json")
        self._tokenizer = _load_tokenizer(module)
        self.pad_id = _pad_id(self._tokenizer, config)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._lower = bool(limits.get("do_lower_case"))
        self.prompts = {k: v for k, v in (st_config.get("prompts") or {}).items() if isinstance(v, str)}
        self.default_prompt = self.prompts.get(st_config.get("default_prompt_name") or "", "")
        self.max_tokens = _positions(config)
        own = limits.get("max_seq_length") or tokenizer_config.get("model_max_length")
        self.default_max_tokens = int(own) if own and own < 1_000_000 else self.max_tokens
        bare = self._tokenizer.encode("", add_special_tokens=True).ids
        self._head, self._tail = self._special_ids(bare)
        self.special_tokens = len(self._head) + len(self._tail)

    @override
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(self._given(texts))]

    @override
    def beginning(self, text: str, limit: int) -> list[int] | None:
        # The tokenizer splits a text into words and reads each by itself. So the words of a beginning are those of the
        # whole text, but for the last two, which may be cut, or may be split by what follows. The digits at its end go
        # too: some tokenizers group them from the right.
        for chars in (CHARS_PER_TOKEN * limit, CHARS_PER_TOKEN**2 * limit):
            if len(text) <= chars:
                return None
            (encoding,) = self._tokenizer.encode_batch(self._given([TRAILING_DIGITS.sub("", text[:chars])]))
            words = [word for word in encoding.word_ids if word is not None]
            if words and sum(word < words[-1] - 1 for word in words) > limit:
                ids: list[int] = encoding.ids
                return ids
        return None

    @override
    def cut(self, ids: list[int], limit: int, side: str) -> list[int]:
        head, tail = self._head, self._tail
        words = ids[len(head) : len(ids) - len(tail)]
        room = max(limit - len(head) - len(tail), 0)
        return [*head, *(words[:room] if side == "right" else words[len(words) - room :]), *tail]

    @override
    def tokens(self, texts: Sequence[str], *, special: bool) -> list[list[Token]]:
        given = self._given(texts)
        encodings = self._tokenizer.encode_batch(given, add_special_tokens=special)
        return [
            [
                Token(id_, token, True, None, None) if is_special else Token(id_, text[start:stop], False, start, stop)
                for id_, token, is_special, (start, stop) in zip(
                    encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
                )
            ]
            for text, encoding in zip(given, encodings, strict=True)
        ]

    @override
    def decode(self, ids: Sequence[Ids], *, skip_special: bool) -> list[str]:
        return list(self._tokenizer.decode_batch([list(i) for i in ids], skip_special_tokens=skip_special))

    def _given(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() for text in texts] if self._lower else list(texts)

    def _special_ids(self, bare: list[int]) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain and len(full) - len(plain) == len(bare):
                return full[:start], full[start + len(plain) :]
        return [], []


def pad(ids: Sequence[Sequence[int]], pad_id: int) -> dict[str, NDArray[np.int64]]:
    """int64 arrays of shape (texts, longest): input_ids, attention_mask, token_type_ids."""
    lengths = np.fromiter((len(i) for i in ids), dtype=np.int64, count=len(ids))
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = np.concatenate([np.asarray(i, dtype=np.int64) for i in ids])
    return {
        "input_ids": input_ids,
        "attention_mask": mask.astype(np.int64),
        "token_type_ids": np.zeros_like(input_ids),
    }


def _load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if file.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # it raises nothing narrower
            raise ModelFailed(f"{file} {_broken(file, error)}") from None
    from transformers import AutoTokenizer  # builds a fast tokenizer from older files

    try:
        built = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return tokenizers.Tokenizer.from_str(built.backend_tokenizer.to_str())
    except Exception as error:
        raise ModelFailed(f"{folder.name}: no fast tokenizer: {error}") from None


def _json(file: Path, kind: type[Any] = dict) -> Any:
    """Its document, an empty one if there is no such file. Raises ModelFailed, which names the file."""
    try:
        text = file.read_text(encoding="utf-8")
        document = json.loads(text)
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError) as error:
        raise ModelFailed(f"{file} {_broken(file, error)}") from None
    if not isinstance(document, kind):
        raise ModelFailed(f"{file} holds {type(document).__name__}, not {kind.__name__}")
    return document


def _broken(file: Path, error: Exception) -> str:
    """What is wrong with a file that a library cannot read."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            return "is a pointer of Git LFS in the place of the file: fetch it with `git lfs pull`"
    return f"cannot be read: {error}"


def _first_module_path(folder: Path) -> str:
    modules = _json(folder / "modules.json", list)
    return str(modules[0].get("path") or "") if modules else ""


def _pad_id(tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> int:
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    return int(config.get("pad_token_id") or 0)


def _positions(config: dict[str, Any]) -> int | None:
    positions = config.get("max_position_embeddings")
    if not positions:
        return None
    if config.get("model_type") in OFFSET_POSITIONS:
        return int(positions) - int(config.get("pad_token_id") or 1) - 1
    return int(positions)
