"""The house stays as drawn: who may import whom, and what an import may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "embedpool"

# ring or file → what it may import, beside itself
MAY_IMPORT = {
    "web": {"pool", "config", "errors", "tracing"},
    "pool": {"config.spec", "errors", "tracing"},
    "drivers": {"config.spec", "errors", "tracing"},
    "config": {"config", "errors"},
    "reconcile": {"pool", "config", "errors"},
    "serve": {"server", "config", "client", "logs", "errors", "web.metrics"},
    "client": {"errors"},
    "server": {"web", "pool", "drivers", "config", "reconcile", "serve.service_manager", "logs", "tracing", "errors"},
    "logs": {"config"},
    "tracing": {"errors"},
    "cli": {"client", "serve", "config", "errors"},
    "errors": set(),
    "__main__": {"cli"},
    "__init__": {"client"},
}
FORWARDS = {"server": "embedpool.serve.run"}  # for a name that has moved there, imported when it is asked for
MAY_IMPORT_THIRD_PARTY = {
    "pool": {"numpy"},
    "web": {"flask", "werkzeug", "marshmallow", "orjson", "numpy", "prometheus_client", "apispec", "markupsafe"},
    "errors": set(),
    "reconcile": set(),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """embedpool.pool.job → pool; embedpool.config.spec → config.spec, and likewise in serve and web."""
    names = module.split(".")[1:] or ["__init__"]
    return ".".join(names[:2]) if names[0] in ("config", "serve", "web") and len(names) > 1 else names[0]


def runtime_imports(file: Path) -> set[str]:
    """Every module imported by the file, also inside functions, but not for types alone."""
    found = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                is_module = (ROOT / Path(*inner.split("."))).with_suffix(".py").exists()
                found.add(inner if is_module else module)

    Visitor().visit(ast.parse(file.read_text()))
    return found


@pytest.mark.parametrize("file", modules(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(file: Path) -> None:
    """A ring imports only what the design lets it import."""
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    allowed = MAY_IMPORT[own]
    for module in runtime_imports(file):
        if not module.startswith("embedpool") or module in ("embedpool", FORWARDS.get(own)):
            continue
        part = part_of(module)
        assert part.split(".")[0] == own or part in allowed or part.split(".")[0] in allowed, (
            f"{file.name} imports {module}"
        )


@pytest.mark.parametrize("ring", MAY_IMPORT_THIRD_PARTY)
def test_a_ring_keeps_to_its_libraries(ring: str) -> None:
    """Threads and queues need nothing but numpy; HTTP needs no requests and no torch."""
    files = (PACKAGE / ring).rglob("*.py") if (PACKAGE / ring).is_dir() else [PACKAGE / f"{ring}.py"]
    for file in files:
        for module in runtime_imports(file):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top != "embedpool":
                assert top in MAY_IMPORT_THIRD_PARTY[ring], f"{file} imports {module}"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("embedpool.web.app", ("torch", "requests", "sentence_transformers", "transformers")),
        ("embedpool.cli", ("torch", "flask", "requests", "marshmallow", "yaml", "numpy")),
        ("embedpool.server", ("torch", "sentence_transformers", "transformers", "openvino", "embedpool.serve.run")),
        ("embedpool.drivers.tokenizer", ("torch", "transformers")),
    ],
)
def test_an_import_stays_light(module: str, forbidden: tuple[str, ...]) -> None:
    """What starts fast must not pay for what it does not use."""
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_file_knows_waitress() -> None:
    """Every name of waitress's that is relied on stands there, and tests/serve/test_waitress.py checks it."""
    knowing = {f.name for f in modules() for module in runtime_imports(f) if module.split(".")[0] == "waitress"}
    assert knowing == {"connections.py"}


def test_the_rooms_stay_small() -> None:
    """A file that outgrows a screenful of screens is two ideas."""
    sizes = {f: len(f.read_text().splitlines()) for f in modules()}
    assert {str(f): n for f, n in sizes.items() if n > 400} == {}


def test_help_costs_little_cpu() -> None:
    """`embedpool --help` answers with docopt alone: no numpy, no flask, no torch."""
    code = "import sys; from embedpool.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'numpy', 'flask', 'torch', 'requests', 'yaml', 'marshmallow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
