"""Token ids of texts, from a model's files alone: the tokenizers package, no torch, no GIL while it works."""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import tokenizers
from tokenizers import normalizers
from typing_extensions import override

from embedpool.drivers.body import AUTO_ENCODER, NORMALIZE, most_active, no_late_chunking, tasks_of
from embedpool.drivers.chat_pairs import ChatPairs, Rendered
from embedpool.drivers.late_interaction import QUERY, LateInteraction
from embedpool.drivers.layout import CLASSIFY, SCORING, SPARSE_STATIC, STATIC, Layout, Module
from embedpool.drivers.model_files import (
    is_model2vec,
    labels_of,
    read_json,
    transformer_settings,
    what_is_broken,
)
from embedpool.errors import ModelFailed
from embedpool.tasks.item import Ids
from embedpool.tasks.score import IDENTITY, SIGMOID, SOFTMAX
from embedpool.tasks.tokenizer import Located, Template, Token, Tokenizer, Whole

# Position 0 of these is behind the padding index, so they hold fewer tokens than positions.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl", "ibert")

CHARS_PER_TOKEN = 12  # of a beginning that most probably has enough tokens
TRAILING_DIGITS = re.compile(r"\d+\Z")
PAIRS = (
    ("what is it?", "A document, of more than one word."),
    ("Ünïcode 日本語", " begins and ends with blanks \n"),
    ("", "nothing before"),
    ("nothing after", ""),
    ("a", "[SEP] </s> 1234567 ..."),
)
NO_LIMIT = 1_000_000  # transformers writes a far larger number where a tokenizer has no limit


def tokenizers_of(layout: Layout) -> dict[str, FolderTokenizer]:
    """That of each route, by its name."""
    return {name: FolderTokenizer(layout, name) for name in layout.routes}


def tokenizer_of(layout: Layout) -> FolderTokenizer:
    """The model's, with those of its routes by what texts are for."""
    by_route = tokenizers_of(layout)
    first = by_route[layout.by_task.get("", next(iter(by_route)))]
    if len(by_route) > 1:
        first.routes = {task: by_route[route] for task, route in layout.by_task.items()}
    return first


class FolderTokenizer(Tokenizer):
    """A route's fast tokenizer without padding and truncation. One per model and route, shared by all threads."""

    def __init__(self, layout: Layout, route: str = "") -> None:
        module, *others = layout.routes[route]
        config = read_json(module.folder / "config.json")
        settings = transformer_settings(module.folder)
        tokenizer_config = read_json(module.folder / "tokenizer_config.json")
        self.route = route
        self._folder = module.folder
        self.prompts = layout.prompts
        self.default_prompt_name = layout.default_prompt_name
        self.default_dimensions = layout.dimensions
        self._tokenizer = _load_tokenizer(module.folder)
        self.pad_id = _pad_id(self._tokenizer, config)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._is_static = module.kind in (STATIC, SPARSE_STATIC)
        if settings.get("do_lower_case"):
            _lower(self._tokenizer)
        self.excludes_prompt = not all(_includes_prompt(step) for step in others)
        if not all(step.is_known for step in (module, *others)) or _is_told_in_messages(
            settings, tokenizer_config, layout, module
        ):
            self.told = ("prompt", "limit", "side")
        elif self.excludes_prompt:
            self.told = ("prompt",)
        self.truncation_side = tokenizer_config.get("truncation_side") or "right"
        if module.kind == STATIC:
            self.default_max_tokens = config.get("max_length") if is_model2vec(module.folder) else None
        else:
            self.max_tokens = _positions(config)
            own = settings.get("max_seq_length") or tokenizer_config.get("model_max_length")
            self.default_max_tokens = int(own) if own and own < NO_LIMIT else self.max_tokens
        self.hides_expansion = False  # whether the tokens that are added to a query are read by no other
        self._expansion: tuple[int, int] | None = None  # with which token such a text is filled up to how many
        if layout.interaction is not None:
            self._treat_as(layout.interaction, module.folder)
        bare = self._tokenizer.encode("", add_special_tokens=not self._is_static).ids
        self._head, self._tail = self.around = self._special_ids(bare)
        self.special_tokens = len(self._head) + len(self._tail)
        self.ends_specially = bool(self._tail)
        self.vocabulary_size = self._tokenizer.get_vocab_size()
        self._special = {id_ for id_, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._tell_of_rows(layout, others)
        self.second_type = 0  # token type of the second part of a pair
        self.pads_left = layout.is_causal  # the last position decides
        self._chat = ChatPairs(module.folder) if layout.is_causal else None
        if layout.kind in SCORING:
            self._score_as(layout, config)
        self._prompt_tokens = functools.lru_cache(maxsize=256)(self._counted)

    def _tell_of_rows(self, layout: Layout, others: Sequence[Module]) -> None:
        """What the model gives; `others` are the modules behind the first."""
        self.tasks = tasks_of(layout)
        self.default_top_k = layout.most_active
        if others and others[-1].kind == AUTO_ENCODER:
            self.indices_are_tokens = False
            self.most_active = most_active(others[-1], layout.most_active)
        self.no_late_chunking = no_late_chunking(layout, self.route)
        self.normalizes = any(step.kind == NORMALIZE for step in others)
        self.averages_queries = layout.interaction.averages_queries if layout.interaction else len(self.tasks) > 2

    def _score_as(self, layout: Layout, config: dict[str, Any]) -> None:
        """As a model that scores texts or pairs."""
        names = labels_of(self._folder)
        self.labels = names if layout.kind == CLASSIFY or len(names) == 1 else ("LABEL_0",)
        self.activation = _activation(layout, config)
        if self._chat is None:
            self.template = self._found_template()
            return
        self.told = ("prompt", "limit", "side")
        self.special_tokens = len(self.whole([("", "")])[0].ids)

    def _treat_as(self, found: LateInteraction, folder: Path) -> None:
        """As the queries or the documents of a multi-vector model."""
        for mark in found.marks:
            for prefix in filter(None, (mark, *mark.split(None, 1)[:1])):
                if self._tokenizer.token_to_id(prefix) is not None:
                    if self._tokenizer.encode(prefix, add_special_tokens=False).tokens != [prefix]:
                        one = tokenizers.AddedToken(prefix, normalized=False, special=True)
                        self._tokenizer.add_special_tokens([one])
                    break
        if self.route != QUERY:
            self.default_max_tokens = found.document_length or self.default_max_tokens
            return
        expansion = found.expansion
        self.default_max_tokens = found.query_length or self.default_max_tokens
        if expansion is None:
            return
        names = _special_names(folder)
        token = expansion.token or names.get("mask_token") or names.get("eos_token")
        id_ = self._tokenizer.token_to_id(token) if token else None
        if id_ is None:
            raise ModelFailed(f"{folder}: queries are filled up with {token!r}, which its tokenizer does not know")
        self._expansion, self.hides_expansion = (id_, expansion.length), not expansion.attends
        self.expands = True
        if expansion.fixed:
            self.default_max_tokens = self.most_kept = expansion.length
        elif found.query_length:
            self.default_max_tokens = max(found.query_length, expansion.length)

    @override
    def expanded(self, ids: Ids) -> Ids:
        if self._expansion is None:
            return ids
        id_, length = self._expansion
        return [*ids, *[id_] * (length - len(ids))]

    @override
    def located(self, text: str) -> Located:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        starts = [start + _blanks(text, start, stop) for start, stop in found.offsets]
        return Located(found.ids, starts)

    @override
    def names(self, ids: Sequence[int]) -> list[str]:
        return [self._tokenizer.id_to_token(id_) or "" for id_ in ids]

    def ids_of(self, tokens: Iterable[str]) -> list[int]:
        """Of those that are in the vocabulary."""
        return [id_ for token in tokens if (id_ := self._tokenizer.token_to_id(token)) is not None]

    def unused_ids(self) -> list[int]:
        """Of special tokens that stand for no word."""
        names = _special_names(self._folder)
        return self.ids_of(names[f"{kind}_token"] for kind in ("cls", "eos", "pad", "unk") if f"{kind}_token" in names)

    @override
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=not self._is_static)
        return [encoding.ids for encoding in encodings]

    @override
    def beginning(self, text: str, limit: int) -> list[int] | None:
        if self._is_static:
            return None
        # The tokenizer splits a text into words and reads each by itself. So the words of a beginning are those of the
        # whole text, but for the last two, which may be cut, or may be split by what follows. The digits at its end go
        # too: some tokenizers group them from the right.
        for chars in (CHARS_PER_TOKEN * limit, CHARS_PER_TOKEN**2 * limit):
            if len(text) <= chars:
                return None
            (encoding,) = self._tokenizer.encode_batch([TRAILING_DIGITS.sub("", text[:chars])])
            words = [word for word in encoding.word_ids if word is not None]
            if words and sum(word < words[-1] - 1 for word in words) > limit:
                ids: list[int] = encoding.ids
                return ids
        return None

    @override
    def cut(self, ids: list[int], limit: int, side: str, prompt_tokens: int = 0) -> list[int]:
        end = len(ids) - len(self._tail)
        kept = max(limit - len(self._tail), len(self._head))
        prompt_tokens = min(max(prompt_tokens, len(self._head)), kept) if side == "left" else kept
        return [
            *ids[: min(prompt_tokens, end)],
            *ids[max(end - (kept - prompt_tokens), prompt_tokens) : end],
            *self._tail,
        ]

    @override
    def prompt_tokens(self, prompt: str) -> int:
        return self._prompt_tokens(prompt)

    def _counted(self, prompt: str) -> int:
        """As sentence-transformers counts it: a special token at its end belongs to the text."""
        (ids,) = self.encode([prompt])
        return len(ids) - (bool(ids) and ids[-1] in self._special)

    @override
    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    @override
    def whole(self, pairs: Sequence[tuple[str, ...]], prompt: str = "") -> list[Whole]:
        if self._chat is not None:
            said = [self._chat.render(pair[0], pair[-1], prompt) for pair in pairs]
            encodings = self._tokenizer.encode_batch([one.text for one in said], add_special_tokens=False)
            return [_of_chat(found, one) for found, one in zip(encodings, said, strict=True)]
        given = [pair if len(pair) > 1 else pair[0] for pair in pairs]
        encodings = self._tokenizer.encode_batch(given)
        return [_as_whole(found, len(pair) > 1) for found, pair in zip(encodings, pairs, strict=True)]

    def _found_template(self) -> Template | None:
        """What the tokenizer puts around the parts of pairs, if it always joins them so."""
        (first, second), *_ = PAIRS
        found = _as_whole(self._tokenizer.encode(first, second), True)
        if not found.ids[found.last]:
            return None
        head, middle = found.ids[: found.first.start], found.ids[found.first.stop : found.last.start]
        template = Template((self._head, self._tail), (head, middle, found.ids[found.last.stop :]))
        types = set(self._tokenizer.encode(first, second).type_ids)
        self.second_type = max(types)
        for first, second in PAIRS:
            encoding = self._tokenizer.encode(first, second)
            a, b = self.bare([first, second])
            begin = [*head, *a, *middle]
            joined = [*begin, *b, *template.pair[2]]
            kinds = [0] * len(begin) + [self.second_type] * (len(joined) - len(begin))
            if encoding.ids != joined or encoding.type_ids != kinds:
                return None
        return template

    @override
    def tokens(self, texts: Sequence[str], *, special: bool) -> list[list[Token]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=special and not self._is_static)
        return [
            [
                Token(id_, token, True, None, None) if is_special else Token(id_, text[start:stop], False, start, stop)
                for id_, token, is_special, (start, stop) in zip(
                    encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
                )
            ]
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    @override
    def decode(self, ids: Sequence[Ids], *, skip_special: bool) -> list[str]:
        return list(self._tokenizer.decode_batch([list(i) for i in ids], skip_special_tokens=skip_special))

    def unknown_id(self) -> int | None:
        """The id that stands for what is in no vocabulary, if the tokenizer has one."""
        model = self._tokenizer.model
        if hasattr(model, "unk_token"):
            return self._tokenizer.token_to_id(model.unk_token) if model.unk_token else None
        found = orjson.loads(self._tokenizer.to_str())["model"].get("unk_id")
        return None if found is None else int(found)

    def _special_ids(self, bare: list[int]) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=not self._is_static).ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain and len(full) - len(plain) == len(bare):
                return full[:start], full[start + len(plain) :]
        return [], []


def _blanks(text: str, start: int, stop: int) -> int:
    """How many blanks a token begins with, which may belong to what stands before its word."""
    token = text[start:stop]
    return len(token) - len(token.lstrip()) if token.strip() else 0


def _special_names(folder: Path) -> dict[str, str]:
    """Special tokens by what they are for, such as mask_token."""
    found = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    named = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: token for name, token in named.items() if name.endswith("_token") and isinstance(token, str)}


def _as_whole(encoding: tokenizers.Encoding, is_pair: bool) -> Whole:
    """Of a text alone, or of a pair that the tokenizer has joined."""
    parts, types = encoding.sequence_ids, encoding.type_ids
    first = _those([i for i, part in enumerate(parts) if part == 0], 0)
    if not is_pair:
        return Whole(encoding.ids, slice(0, 0), first, typed=False)
    empty_at = types.index(1) if 1 in types else first.stop  # what stands around an empty document shows its place
    return Whole(encoding.ids, first, _those([i for i, part in enumerate(parts) if part == 1], empty_at), typed=True)


def _those(places: list[int], empty_at: int) -> slice:
    """Places in a row."""
    return slice(places[0], places[-1] + 1) if places else slice(empty_at, empty_at)


def _of_chat(encoding: tokenizers.Encoding, said: Rendered) -> Whole:
    """A token that holds characters of the template too, and not only a blank, is the template's."""
    starts = [start + _blanks(said.text, start, stop) for start, stop in encoding.offsets]
    stops = [stop for _, stop in encoding.offsets]
    first, last = (
        slice(begin := bisect.bisect_left(starts, part.start), max(begin, bisect.bisect_right(stops, part.stop)))
        for part in (said.query, said.document)
    )
    return Whole(encoding.ids, first, slice(max(last.start, first.stop), last.stop), typed=False)


def _load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if file.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # it raises nothing narrower
            raise ModelFailed(f"{file} {what_is_broken(file, error)}") from None
    from transformers import AutoTokenizer  # builds a fast tokenizer from older files

    try:
        built = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return tokenizers.Tokenizer.from_str(built.backend_tokenizer.to_str())
    except Exception as error:
        raise ModelFailed(f"{folder.name}: no fast tokenizer: {error}") from None


def _lower(tokenizer: tokenizers.Tokenizer) -> None:
    """Lower-case texts as sentence-transformers does: before its own normalizer, and never a special token."""
    own = tokenizer.normalizer
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([own] if own else [])])


def _is_told_in_messages(
    settings: Mapping[str, Any], tokenizer_config: Mapping[str, Any], layout: Layout, module: Module
) -> bool:
    """Whether sentence-transformers puts texts into a chat template: then it must be given them, and what to keep."""
    if layout.assumed:
        return "chat_template" in tokenizer_config or any(module.folder.glob("chat_template*"))
    return "message" in settings.get("modality_config", ())


def _activation(layout: Layout, config: Mapping[str, Any]) -> str:
    """What makes scores of logits: one sigmoid for one label, whatever the files name of sigmoid and identity."""
    if layout.activation not in (None, "Sigmoid", "Identity", "Softmax"):
        raise ModelFailed(f"{layout.folder} names the activation {layout.activation}, which embedpool does not serve")
    kind = config.get("problem_type")
    if kind == "regression" and layout.kind == CLASSIFY:
        return IDENTITY
    if layout.kind == CLASSIFY and kind != "multi_label_classification" and layout.activation != "Sigmoid":
        return SOFTMAX
    return SIGMOID


def _includes_prompt(module: Module) -> bool:
    """Whether a prompt's tokens count when token vectors are averaged."""
    return module.kind != "Pooling" or bool(read_json(module.folder / "config.json").get("include_prompt", True))


def _pad_id(tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> int:
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    return int(config.get("pad_token_id") or 0)


def _positions(config: dict[str, Any]) -> int | None:
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if not positions or positions < 0:
        return None
    if config.get("model_type") in OFFSET_POSITIONS:
        return int(positions) - int(config.get("pad_token_id") or 1) - 1
    return int(positions)
