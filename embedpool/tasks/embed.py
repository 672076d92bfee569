"""The embed task, texts to vectors: prompts and truncation before the queue, the final form of the vectors after it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from embedpool.config.spec import DriverConfig
from embedpool.errors import EmbedpoolError, InferenceFailed, InvalidRequest, UnsupportedOption
from embedpool.tasks.item import Group, Item, Keys
from embedpool.tasks.rows import Rows
from embedpool.tasks.task import Measured, Task
from embedpool.tasks.tokenizer import Tokenizer, estimated_tokens

# What a text is for, in the words of OpenAI-like services, Cohere, Voyage and Jina; those of a line mean the same.
QUERY = ("query", "search_query", "retrieval.query")
DOCUMENT = ("document", "passage", "search_document", "retrieval.passage")
INPUT_TYPES = (*QUERY, *DOCUMENT, "classification", "clustering", "separation", "text-matching")

NO_FLOAT16 = "the vectors do not fit float16; ask for float32 or normalize"
SLICE_CHARS = 1 << 17  # of texts that are tokenised at once: at full length ids take 200 times a text's memory
LONG_TEXTS = threading.Lock()  # of texts that are longer than a slice one is read whole at a time

Vectors = NDArray[Any]  # shape (texts, width)


@dataclasses.dataclass(frozen=True, slots=True)
class EmbedOptions:
    """Options of one request; None means the model's own setting. `extra` is passed on to remote services."""

    normalize: bool | None = None
    max_seq_length: int | None = None
    dtype: str | None = None
    dimensions: int | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    input_type: str | None = None
    truncate: str | None = None
    precision: str = "float32"
    top_k: int | None = None  # of sparse rows: how many of the largest values are kept
    on_error: str = "fail"  # partial: a text that fails takes no other with it
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Embed(Task):
    """Texts for a model, whose vectors are wanted."""

    name: ClassVar[str] = "embed"
    of_others: ClassVar[Sequence[str]] = ("top_k",)  # options that rows of this kind have not
    texts: Sequence[str]
    options: EmbedOptions = EmbedOptions()

    @property
    def outputs(self) -> Sequence[str]:
        """The tasks whose rows are wanted together, where there are several."""
        return ()

    def __len__(self) -> int:
        return len(self.texts)

    @property
    @override
    def partial(self) -> bool:
        return self.options.on_error == "partial"

    @override
    def where(self, index: int) -> str:
        return f"texts[{index}]"

    @override
    def measure(
        self, config: DriverConfig, tokenizer: Tokenizer, still_wanted: Callable[[], None] = lambda: None
    ) -> Measured:
        self._require_its_options()
        broken = self.broken(self.texts, "texts")
        given = ["" if i in broken else text for i, text in enumerate(self.texts)] if broken else self.texts
        prompt, passed_on = prompt_of(self.options, config, tokenizer)
        texts = [prompt + text for text in given] if prompt else given
        if config.is_remote:
            of_remote = self._for_a_remote(texts, passed_on)
            return Measured([item for item in of_remote if item.index not in broken], [], broken)
        tokenizer = routed(self.options, tokenizer)
        if extra := self.options.extra:
            raise UnsupportedOption(
                f"unknown option for a local model: {', '.join(sorted(extra))}",
                fields={f"options.{name}": "not an option of local models" for name in extra},
            )
        limit = limit_of(self.options.max_seq_length, config, tokenizer)
        refuses = self.options.truncate == "error"
        side = tokenizer.truncation_side if self.options.truncate in (None, "error") else self.options.truncate
        reads = limit if side == "right" and not refuses else None  # so many tokens and no more
        prompt_tokens = tokenizer.prompt_tokens(prompt) if prompt and self.options.truncate == "left" else 0
        group = group_of(self.name, tokenizer, self.outputs, prompt=prompt, limit=limit, side=side)
        keys = Keys(group)
        items: list[Item] = []
        too_long: dict[int, int] = {}  # tokens, at full length where they are told
        for at_once in slices(map(len, texts)):
            still_wanted()
            part = texts[at_once]
            for i, (text, full) in enumerate(zip(part, encoded(part, tokenizer, reads), strict=True), at_once.start):
                is_cut = limit is not None and len(full) > limit
                if is_cut:
                    too_long[i] = len(full)
                    if refuses:
                        continue
                ids = array("I", tokenizer.cut(full, limit, side, prompt_tokens) if is_cut and limit else full)
                whole = array("I", tokenizer.expanded(ids)) if tokenizer.expands else ids  # a fifth of a list's memory
                second = len(ids) if len(whole) > len(ids) else None
                key = keys.of(whole, *([text] if is_cut else []))  # a driver that is not fed by ids is given the text
                items.append(Item((text,), len(whole), whole, second, group=group, key=key, index=i))
        items = [item for item in items if item.index not in broken] if broken else items
        if refuses and limit is not None:
            says = {i: f"{tokens} tokens, the limit is {limit}" for i, tokens in too_long.items()}
            return Measured(items, [], {**broken, **self.too_long(says)})
        return Measured(items, list(too_long), broken)

    def _require_its_options(self) -> None:
        """Raises UnsupportedOption."""
        odd = [name for name in self.of_others if getattr(self.options, name) != getattr(EmbedOptions(), name)]
        if odd:
            fields = {f"options.{name}": f"is not for {self.name} rows" for name in odd}
            raise UnsupportedOption("; ".join(f"{path} {says}" for path, says in fields.items()), fields=fields)

    def _for_a_remote(self, texts: Sequence[str], passed_on: dict[str, object]) -> list[Item]:
        for name in ("max_seq_length", "truncate"):
            if (value := getattr(self.options, name)) is not None:
                passed_on[name] = value
        passed_on.update(self.options.extra)
        group = Group(self.name, json.dumps(passed_on, sort_keys=True) if passed_on else "")
        keys = Keys(group)
        return [
            Item((text,), estimated_tokens(text), group=group, key=keys.of(None, text), index=i)
            for i, text in enumerate(texts)
        ]

    @override
    def finish(self, rows: Rows, config: DriverConfig, tokenizer: Tokenizer, errors: dict[int, EmbedpoolError]) -> Rows:
        if not rows.width:
            return rows
        raw = rows.values
        if self.options.dimensions is None and tokenizer.default_dimensions:
            raw = raw[:, : tokenizer.default_dimensions]
        if self.partial and (too_large := self._overflowing(raw, config)):
            errors.update({i: InferenceFailed(NO_FLOAT16) for i in too_large if i not in errors})
            raw = raw.copy()
            raw[too_large] = 0
        return Rows(final_form(raw, self.options, normalize=config.normalize, dtype=config.dtype))

    def _overflowing(self, raw: Vectors, config: DriverConfig) -> list[int]:
        """The texts whose vectors do not fit the dtype that was asked for."""
        if (self.options.dtype or config.dtype) != "float16" or self.options.precision != "float32":
            return []
        options = dataclasses.replace(self.options, dtype="float32")
        final = final_form(raw, options, normalize=config.normalize, dtype="float32")
        too_large: list[int] = np.flatnonzero(np.abs(final).max(axis=1, initial=0) > np.finfo(np.float16).max).tolist()
        return too_large


LOCAL = Group(Embed.name)


def routed(options: EmbedOptions, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of the route that texts take, by what they are for. Raises InvalidRequest if there is none."""
    if not tokenizer.routes:
        return tokenizer
    field = "input_type" if options.input_type is not None else "prompt_name"
    word = options.input_type if options.input_type is not None else options.prompt_name
    for name in (word, *_alike(word)) if word is not None else ():
        if name in tokenizer.routes:
            return tokenizer.routes[name]
    is_for_one = word is not None and bool(_alike(word))
    if "" in tokenizer.routes and not is_for_one:
        return tokenizer.routes[""]
    known = ", ".join(sorted(filter(None, tokenizer.routes)))
    message = f"the model has no route for {word!r}" if is_for_one else "the model wants to know what the texts are for"
    raise InvalidRequest(f"options.{field}: {message}; known: {known}", fields={f"options.{field}": message})


def _alike(word: str) -> tuple[str, ...]:
    """Words that mean the same of a text."""
    return next((words for words in (QUERY, DOCUMENT) if word in words), ())


def group_of(task: str, tokenizer: Tokenizer, outputs: Sequence[str] = (), **facts: str | int | None) -> Group:
    """Items of one route and of the same outputs share a batch, and of one prompt or limit where the model is told.

    Those of `by_ids` are for drivers that are fed their token ids, and for no library that tokenises their texts anew.
    """
    known = {"route": tokenizer.route, "outputs": list(outputs), **facts}
    options = {name: known[name] for name in ("route", "outputs", "by_ids", *tokenizer.told) if known.get(name)}
    return Group(task, json.dumps(options, sort_keys=True) if options else "")


# --- before the queue


def slices(inputs_chars: Iterable[int]) -> Iterator[slice]:
    """Which inputs, of so many characters each, are tokenised at once."""
    start = stop = chars = 0
    for stop, size in enumerate(inputs_chars):
        if stop > start and chars + size > SLICE_CHARS:
            yield slice(start, stop)
            start, chars = stop, 0
        chars += size
    yield slice(start, stop + 1)


def encoded(texts: Sequence[str], tokenizer: Tokenizer, limit: int | None = None) -> list[list[int]]:
    """Ids at full length, or with a limit more than so many of them; see `Tokenizer.beginning`."""
    begun: dict[int, list[int]] = {}
    for i, text in enumerate(texts):
        if limit is not None and len(text) > limit and (ids := tokenizer.beginning(text, limit)):
            begun[i] = ids
    whole = [text for i, text in enumerate(texts) if i not in begun] if begun else texts
    with LONG_TEXTS if sum(map(len, whole)) > SLICE_CHARS else contextlib.nullcontext():
        found = tokenizer.encode(whole)
    assert found is not None  # only a remote service's tokenizer makes none
    rest = iter(found)
    return [begun[i] if i in begun else next(rest) for i in range(len(texts))] if begun else found


def prompt_of(options: EmbedOptions, config: DriverConfig, tokenizer: Tokenizer) -> tuple[str, dict[str, object]]:
    """The prompt to put before each text, and the options to forward to a remote service. Raises InvalidRequest."""
    if options.prompt is not None:
        if options.prompt_name is not None:
            message = "give either prompt or prompt_name"
            raise InvalidRequest(f"options.prompt: {message}", fields={"options.prompt": message})
        return options.prompt, {}
    prompts = {**tokenizer.prompts, **config.prompts}
    default = prompts.get(tokenizer.default_prompt_name, "")
    name = options.prompt_name
    if name is None:
        return _prompt_for(options.input_type, prompts, default, is_remote=config.is_remote)
    if name in prompts:
        return prompts[name], {}
    if config.is_remote:
        return "", {"prompt_name": name}
    if any(word in tokenizer.routes for word in (name, *_alike(name))):
        return default, {}  # it names a route
    known = f"known: {', '.join(sorted(prompts))}" if prompts else "this model has none"
    message = f"no prompt {name!r}; {known}"
    raise InvalidRequest(f"options.prompt_name: {message}", fields={"options.prompt_name": message})


def _prompt_for(
    input_type: str | None, prompts: Mapping[str, str], default: str, *, is_remote: bool
) -> tuple[str, dict[str, object]]:
    """The prompt for what the texts are for, if the model has one, else as sentence-transformers' encode methods do."""
    if input_type is None:
        return default, {}
    alike = _alike(input_type)
    for name in (input_type, *alike):
        if name in prompts:
            return prompts[name], {}
    if is_remote:
        return default, {"input_type": input_type}
    return "" if alike else default, {}  # encode_query and encode_document take no other prompt, encode the default


def limit_of(asked: int | None, config: DriverConfig, tokenizer: Tokenizer) -> int | None:
    """Tokens of an input that a request asked for so many of gets. Raises InvalidRequest."""
    if fault := limit_fault(asked, tokenizer):
        raise InvalidRequest(f"options.max_seq_length: {fault}", fields={"options.max_seq_length": fault})
    wanted = asked or config.max_seq_length or tokenizer.default_max_tokens
    limits = [wanted, tokenizer.max_tokens, tokenizer.most_kept]
    return min((limit for limit in limits if limit is not None), default=None)


def limit_fault(limit: int | None, tokenizer: Tokenizer) -> str | None:
    """What is wrong with a max_seq_length for this model; nothing with none."""
    if limit is None:
        return None
    if tokenizer.max_tokens is not None and limit > tokenizer.max_tokens:
        return f"{limit} is more than the model's {tokenizer.max_tokens} positions"
    if limit <= tokenizer.special_tokens:
        return f"{limit} leaves nothing of a text: the model adds {tokenizer.special_tokens} special tokens"
    return None


# --- after it


def final_form(vectors: Vectors, options: EmbedOptions, *, normalize: bool, dtype: str) -> Vectors:
    """The vectors as asked: cut to `dimensions`, normalised, then in the asked precision and dtype.

    Takes float32 of shape (n, width). int8 is clip(round(127·v)) of the normalised vector, so it does not depend on its
    batch; uint8 is int8 + 128; binary packs the signs of 8 values into a byte, ubinary the same unsigned (both as
    sentence-transformers does).
    """
    wanted = options.normalize if options.normalize is not None else normalize
    if options.dimensions is not None:
        if options.dimensions > vectors.shape[1]:
            message = f"{options.dimensions} is more than the model's {vectors.shape[1]}"
            raise InvalidRequest(f"options.dimensions: {message}", fields={"options.dimensions": message})
        vectors = vectors[:, : options.dimensions]
    if wanted or options.precision in ("int8", "uint8"):
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(lengths, 1e-12)
    if options.precision == "float32":
        return _in_dtype(vectors, options.dtype or dtype)
    if options.precision in ("int8", "uint8"):
        scaled = np.clip(np.round(vectors * 127), -127, 127)
        return scaled.astype(np.int8) if options.precision == "int8" else (scaled + 128).astype(np.uint8)
    packed = np.packbits(vectors > 0, axis=1)
    return packed if options.precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)


def _in_dtype(vectors: Vectors, dtype: str) -> Vectors:
    if dtype == "float32":
        return np.ascontiguousarray(vectors, dtype=np.float32)
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(vectors, dtype=np.float16)
    if not np.isfinite(cast).all():
        raise InferenceFailed(NO_FLOAT16)
    return cast
