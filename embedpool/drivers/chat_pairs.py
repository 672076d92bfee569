"""Pairs as a chat template puts them: for rerankers that are language models and answer yes or no."""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from embedpool.drivers.model_files import read_json, transformer_settings
from embedpool.errors import ModelFailed, UnsupportedOption

TEMPLATE_FILE = "chat_template.jinja"
STRUCTURED = "structured"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Around(NamedTuple):
    """What a template puts before the query, between it and the document, and behind that."""

    before: str
    between: str
    behind: str


class Rendered(NamedTuple):
    """A pair as the model reads it, and which of its characters are those of the query and of the document."""

    text: str
    query: slice
    document: slice


class ChatPairs:
    """Renders a pair by the template of a folder, as transformers does, in a sandbox."""

    def __init__(self, folder: Path) -> None:
        config, settings = read_json(folder / "tokenizer_config.json"), transformer_settings(folder)
        modality = (settings.get("modality_config") or {}).get("message") or {}
        self._is_structured = modality.get("format") == STRUCTURED
        self._variables = {
            **{name: _content(config[name]) for name in SPECIAL if config.get(name) is not None},
            "add_generation_prompt": False,
            **((settings.get("processing_kwargs") or {}).get("chat_template") or {}),
        }
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(_source(folder, config))
            self._around = functools.lru_cache(maxsize=64)(self._found_around)
            self._around("")
        except (jinja2.TemplateError, ValueError) as error:
            raise ModelFailed(f"{folder}: its chat template cannot be used for pairs: {error}") from None

    def render(self, query: str, document: str, prompt: str = "") -> Rendered:
        """The text that the model reads; the prompt is the system's message. Raises UnsupportedOption."""
        try:
            text = self._text(query, document, prompt)
            before, between, behind = map(len, self._around(prompt))
        except (jinja2.TemplateError, ValueError) as error:
            raise UnsupportedOption(f"the model's chat template refuses this: {error}") from None
        end, shortest = len(text) - behind, len(query.strip())  # templates may strip it, or the document
        stop = text.find(self._around(prompt).between, before + shortest, end)
        stop = stop if stop >= 0 else before
        return Rendered(text, slice(before, stop), slice(stop + between, end))

    def _found_around(self, prompt: str) -> Around:
        """Raises ValueError for a template that puts a pair in another way."""
        query, document = secrets.token_hex(), secrets.token_hex()  # stand for a pair, and nowhere else
        text = self._text(query, document, prompt)
        before, found_query, rest = text.partition(query)
        between, found_document, behind = rest.partition(document)
        if not (found_query and found_document) or query in rest or document in behind:
            raise ValueError("it does not put the query and then the document, each once")
        return Around(before, between, behind)

    def _text(self, query: str, document: str, prompt: str) -> str:
        said = [("system", prompt)] if prompt else []
        said += [("query", query), ("document", document)]
        messages = [{"role": role, "content": self._as_content(text)} for role, text in said]
        return self._template.render(messages=messages, tools=None, documents=None, **self._variables)

    def _as_content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._is_structured else text


def _source(folder: Path, config: Mapping[str, Any]) -> str:
    """The template: a file of its own, else in the tokenizer's configuration, of several the default one."""
    file = folder / TEMPLATE_FILE
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((one.get("template") for one in found if one.get("name") == "default"), None)
    if not isinstance(found, str):
        raise ModelFailed(f"{folder} has no chat template to put pairs in")
    return found


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
