"""The config.yml that `embedpool init` writes and the docs show."""

from __future__ import annotations

import dataclasses

import yaml

from embedpool.config.settings import SECTIONS


def sample_config_yml(root: str = ".config") -> str:
    """A commented config.yml with every default, for `embedpool init` and the docs."""
    lines = ["# embedpool's settings. Every key may be left out; EMBEDPOOL_<SECTION>__<KEY> overrides it."]
    lines += ["version: 1"]
    for section, cls in SECTIONS.items():
        lines += ["", f"# {(cls.__doc__ or '').strip()}", f"{section}:"]
        for f in dataclasses.fields(cls):
            default = f.default
            if root != ".config" and isinstance(default, str):
                default = default.replace(".config", root, 1)
            shown = yaml.safe_dump(
                list(default) if isinstance(default, tuple) else default,
                default_flow_style=True,
                width=1000,
            ).splitlines()[0]
            choices = f.metadata["choices"]
            note = f.metadata["doc"] + (f" ({' | '.join(choices)})" if choices else "")
            lines.append(f"  {f.name}: {shown}".ljust(40) + f"  # {note}")
    return "\n".join(lines) + "\n"
