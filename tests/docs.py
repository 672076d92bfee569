"""The parts of docs/ that are made from the code. `make docs` writes them; tests/test_docs.py compares."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import embedpool.cli
from embedpool import errors
from embedpool.config.settings import SECTIONS
from embedpool.config.spec import DRIVER_CONFIGS, ModelSpec, QueueSpec, Resources, Scaling
from embedpool.web.dialects.cohere import CohereSchema
from embedpool.web.dialects.ollama import OllamaSchema
from embedpool.web.dialects.openai import OpenAISchema
from embedpool.web.dialects.tei import TeiSchema
from embedpool.web.metrics import UNTIL_0_2, Metrics
from embedpool.web.schemas import OptionsSchema

OR = " \\| "  # in a table
ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs"


def manual() -> str:
    return f"```text\n{embedpool.cli.__doc__.strip()}\n```"


def settings() -> str:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for section, cls in SECTIONS.items():
        rows += [_row(f"{section}.{f.name}", f) for f in dataclasses.fields(cls)]
    return "\n".join(rows)


OF_AN_ENTRY = {"resources": Resources, "scaling": Scaling, "queue": QueueSpec}  # of an entry of pool.yml


def pool_keys() -> str:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    rows += [_row(f.name, f) for f in dataclasses.fields(ModelSpec) if f.name not in ("driver", *OF_AN_ENTRY)]
    rows += [f"| `driver.type` | required | {OR.join(DRIVER_CONFIGS)} |"]
    for name, cls in OF_AN_ENTRY.items():
        rows += [_row(f"{name}.{f.name}", f) for f in dataclasses.fields(cls)]
    return "\n".join(rows)


def driver_keys() -> str:
    parts = []
    for name, cls in DRIVER_CONFIGS.items():
        rows = [
            f"`driver.config` of type `{name}`:",
            "",
            "| key | default | meaning | loads anew |",
            "|---|---|---|---|",
        ]
        rows += [f"{_row(f.name, f)} {'yes' if f.metadata['loads'] else ''} |" for f in dataclasses.fields(cls)]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def error_codes() -> str:
    """Every error that is answered over HTTP."""
    unanswered = {errors.ConfigError, errors.ServerUnreachable, errors.ClientGone}
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.EmbedpoolError)]
    rows = ["| status | code | when |", "|---|---|---|"]
    for cls in sorted((c for c in found if c not in unanswered), key=lambda c: (c.status, c.code)):
        says = "An unexpected error." if cls is errors.EmbedpoolError else (cls.__doc__ or "").strip().split("\n")[0]
        rows.append(f"| {cls.status} | `{cls.code}` | {says} |")
    return "\n".join(rows)


def metrics() -> str:
    """The series of GET /metrics, with the names that stay until 0.2."""
    rows = ["| metric | type | meaning | older name, until 0.2 |", "|---|---|---|---|"]
    for family in Metrics()._own.collect():
        total = "_total" if family.type == "counter" else ""
        older = f"`{UNTIL_0_2[family.name]}{total}`" if family.name in UNTIL_0_2 else ""
        rows.append(f"| `{family.name}{total}` | {family.type} | {family.documentation} | {older} |")
    return "\n".join(rows)


def dialect_options() -> str:
    """Which field of a dialect stands for which option of POST /embed."""
    rows = ["| option | " + " | ".join(DIALECTS) + " |", "|---" * (len(DIALECTS) + 1) + "|"]
    for option in OptionsSchema._declared_fields:
        says = [
            ", ".join(f"`{n}`" for n, f in schema._declared_fields.items() if option in f.metadata.get("options", ()))
            for schema in DIALECTS.values()
        ]
        rows.append(f"| `{option}` | {' | '.join(says)} |")
    return "\n".join(rows)


def _row(name: str, f: dataclasses.Field[Any]) -> str:
    choices = f" ({OR.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
    return f"| `{name}` | {_default(f)} | {f.metadata['doc']}{choices} |"


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default_factory is not dataclasses.MISSING:
        return "`{}`"
    if f.default is dataclasses.MISSING:
        return "required"
    if f.default is None or f.default in ("", ()):
        return ""
    return f"`{str(f.default).lower() if isinstance(f.default, bool) else f.default}`"


DIALECTS = {
    "OpenAI, Voyage, Jina, infinity": OpenAISchema,
    "TEI": TeiSchema,
    "Cohere": CohereSchema,
    "Ollama": OllamaSchema,
}

PARTS = {
    "command-line.md": {"manual": manual},
    "configuration.md": {"settings": settings, "pool_keys": pool_keys, "driver_keys": driver_keys},
    "errors.md": {"error_codes": error_codes},
    "clients.md": {"dialect_options": dialect_options},
    "operating.md": {"metrics": metrics},
}


def written(page: str) -> str:
    """A page with its generated parts as the code has them now."""
    text = (PAGES / page).read_text()
    for name, make in PARTS[page].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)
        assert count == 1, f"{page} needs the markers of {name} once"
    return text


if __name__ == "__main__":
    for page in PARTS:
        (PAGES / page).write_text(written(page))
