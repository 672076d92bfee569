"""At the door: the texts of a request are prompted, measured and truncated, in the request's own thread."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from embedpool.config.spec import DriverConfig
from embedpool.errors import EmbedpoolError, InvalidRequest, TextTooLong, UnsupportedOption
from embedpool.pool.job import Ids
from embedpool.pool.request import DOCUMENT, QUERY, EmbedOptions, EmbedRequest

if TYPE_CHECKING:
    from embedpool.drivers.base import Meter


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """Texts ready to be split: `ids` and `tokens` after truncation, `truncated` as indices into the texts.

    `refused` are those that go no further, where the request goes on without them.
    """

    texts: Sequence[str]
    ids: Sequence[Ids] | None
    tokens: Sequence[int]
    truncated: list[int]
    variant: tuple[object, ...] | None  # what a text's vector depends on beside the text and the group
    group: str | None  # JSON of the options passed on to a remote service: only equal ones may share a call
    refused: Mapping[int, EmbedpoolError] = dataclasses.field(default_factory=dict)

    @property
    def kept(self) -> Sequence[int]:
        """Indices of the texts that go on."""
        return [i for i in range(len(self.texts)) if i not in self.refused]


def measure(request: EmbedRequest, config: DriverConfig, meter: Meter) -> Measured:
    """Apply the request's prompt and truncation policy.

    Raises InvalidRequest, TextTooLong (truncate: error) and UnsupportedOption.
    """
    options = request.options
    texts, passed_on = prompted(request.texts, options, config, meter)
    if not meter.tokenizes:
        for name in ("max_seq_length", "truncate"):
            if (value := getattr(options, name)) is not None:
                passed_on[name] = value
        passed_on.update(options.extra)
        group = json.dumps(passed_on, sort_keys=True) if passed_on else None
        return Measured(texts, None, meter.estimate(texts), [], None, group)
    if options.extra:
        names = ", ".join(sorted(options.extra))
        raise UnsupportedOption(
            f"unknown option for a local model: {names}",
            fields={f"options.{name}": "not an option of local models" for name in options.extra},
        )
    limit = _limit_of(options, config, meter)
    ids = meter.measure(texts)
    assert ids is not None  # a meter that tokenizes
    tokens = [len(i) for i in ids]
    truncated = [i for i, count in enumerate(tokens) if limit is not None and count > limit]
    policy = options.truncate or "right"
    if truncated and limit is not None:
        if policy == "error" and options.on_error == "partial":
            refused = {i: TextTooLong(f"{tokens[i]} tokens, the limit is {limit}") for i in truncated}
            return Measured(texts, ids, tokens, [], (limit, policy), None, refused)
        if policy == "error":
            raise TextTooLong(
                f"texts[{truncated[0]}] has {tokens[truncated[0]]} tokens, the limit is {limit}",
                fields={f"texts[{i}]": f"{tokens[i]} tokens, the limit is {limit}" for i in truncated[:20]},
            )
        for i in truncated:
            ids[i] = meter.cut(ids[i], limit, policy)
            tokens[i] = len(ids[i])
    return Measured(texts, ids, tokens, truncated, (limit, policy), None)


def prompted(
    texts: Sequence[str], options: EmbedOptions, config: DriverConfig, meter: Meter
) -> tuple[Sequence[str], dict[str, object]]:
    """The texts behind their prompt, and what a remote service is asked to do instead. Raises InvalidRequest."""
    prefix, passed_on = _prompt_of(options, config, meter)
    return [prefix + text for text in texts] if prefix else texts, passed_on


def _prompt_of(options: EmbedOptions, config: DriverConfig, meter: Meter) -> tuple[str, dict[str, object]]:
    """The text to put before each text, and what a remote service is asked to do instead."""
    if options.prompt is not None:
        if options.prompt_name is not None:
            message = "give either prompt or prompt_name"
            raise InvalidRequest(f"options.prompt: {message}", fields={"options.prompt": message})
        return options.prompt, {}
    prompts = {**meter.prompts, **config.prompts}
    if options.prompt_name is None:
        return _prompt_for(options.input_type, prompts, meter)
    if options.prompt_name in prompts:
        return prompts[options.prompt_name], {}
    if not meter.tokenizes:
        return "", {"prompt_name": options.prompt_name}
    known = f"known: {', '.join(sorted(prompts))}" if prompts else "this model has none"
    message = f"no prompt {options.prompt_name!r}; {known}"
    raise InvalidRequest(f"options.prompt_name: {message}", fields={"options.prompt_name": message})


def _prompt_for(input_type: str | None, prompts: Mapping[str, str], meter: Meter) -> tuple[str, dict[str, object]]:
    """The prompt for what the texts are for; a model that has none for it treats all texts alike."""
    if input_type is None:
        return meter.default_prompt, {}
    alike = next((words for words in (QUERY, DOCUMENT) if input_type in words), ())
    for name in (input_type, *alike):
        if name in prompts:
            return prompts[name], {}
    return meter.default_prompt, {} if meter.tokenizes else {"input_type": input_type}


def _limit_of(options: EmbedOptions, config: DriverConfig, meter: Meter) -> int | None:
    asked = options.max_seq_length
    if asked is not None and (fault := limit_fault(asked, meter)):
        raise InvalidRequest(f"options.max_seq_length: {fault}", fields={"options.max_seq_length": fault})
    limits = [asked or getattr(config, "max_seq_length", None) or meter.default_max_tokens, meter.max_tokens]
    return min((limit for limit in limits if limit is not None), default=None)


def limit_fault(limit: int, meter: Meter) -> str | None:
    """What is wrong with a max_seq_length for this model."""
    if meter.max_tokens is not None and limit > meter.max_tokens:
        return f"{limit} is more than the model's {meter.max_tokens} positions"
    if limit <= meter.special_tokens:
        return f"{limit} leaves nothing of a text: the model adds {meter.special_tokens} special tokens"
    return None
