"""The house stays as drawn: who may import whom, what an import may cost, and the map at its front door."""

from __future__ import annotations

import ast
import configparser
import contextlib
import functools
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import embedpool

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "embedpool"

# room or file → what it may import, beside itself, be it at run time, inside a function or for types alone
MAY_IMPORT = {
    "web": {"reconcile", "jobs", "pool", "tasks", "config", "bounds", "tracing", "errors"},
    "jobs": {"outputs", "errors"},
    "cache": {"pool.cache", "pool.request", "tasks", "errors"},
    "in_process": {"server", "web", "jobs", "pool", "tasks", "config", "outputs", "errors"},
    "embedder": {"in_process", "jobs.sources", "places.cores", "config", "errors"},
    "pool": {"tasks", "config.spec", "bounds", "tracing", "errors"},
    "tasks": {"config.spec", "errors"},
    "places": {"tasks", "config.spec", "config.settings", "errors"},
    "drivers": {
        "places.cores", "tasks", "config.spec", "config.checks", "config.guard", "config.settings", "bounds", "tracing",
        "errors",
    },
    "config": {"errors"},
    "reconcile": {"pool", "config", "errors"},
    "serve": {"server", "config", "client", "logs", "web.metrics", "bounds", "errors"},
    "client": {"each", "outputs", "upload", "errors"},
    "outputs": set(),
    "upload": set(),
    "each": {"errors"},
    "server": {
        "web", "jobs", "pool", "places", "drivers", "tasks", "config", "reconcile", "logs", "tracing", "errors",
        "cache",
        "serve.service_manager", "serve.gunicorn_settings",
    },
    "logs": {"config"},
    "tracing": {"errors"},
    "cli": {"client", "serve", "jobs", "in_process", "config", "drivers", "tasks", "errors"},
    "errors": set(),
    "bounds": {"errors"},
    "__main__": {"cli"},
    "__init__": {"client", "embedder"},
}  # fmt: skip
MAY_IMPORT_THIRD_PARTY = {
    "tasks": {"numpy", "typing_extensions"},
    "pool": set(),
    "places": {"filelock", "numpy", "psutil", "ray", "threadpoolctl", "typing_extensions"},
    "web": {
        "flask", "werkzeug", "marshmallow", "orjson", "numpy", "prometheus_client", "apispec",
        "typing_extensions", "tiktoken", "zstandard", "brotli",
    },
    "cache": {"lmdb", "numpy", "typing_extensions"},
    "errors": set(),
    "reconcile": set(),
    "jobs": {"filelock", "numpy", "orjson", "pyarrow", "typing_extensions"},
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    """embedpool/pool/request.py → pool.request; embedpool/pool/__init__.py → pool."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {name_of(file) for file in modules()}


@functools.cache
def imports(file: Path) -> frozenset[str]:
    """Every module imported by the file, also inside functions and for types alone; ours without `embedpool.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole.removeprefix("embedpool.") in NAMES else node.module or "")
    return frozenset(name.removeprefix("embedpool.") for name in found - {"embedpool"})


@pytest.mark.parametrize("file", modules(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(file: Path) -> None:
    """A room imports only what the design lets it import."""
    own = name_of(file).split(".")[0]
    for module in imports(file) & NAMES:
        names = module.split(".")
        assert names[0] == own or {names[0], ".".join(names[:2])} & MAY_IMPORT[own], f"{file} imports {module}"


OF_AN_EXTRA = {"lmdb", "openvino", "opentelemetry", "pyarrow", "ray"}  # imported where they are used alone
WHERE_INSTALLED = {"brotli", "zstandard"}  # decoders of bodies


def installed_with(requirements: str) -> set[str]:
    """The distributions that pip installs for these lines, as far as they are installed here."""
    found: set[tuple[str, str]] = set()
    open_ = [(Requirement(line), "") for line in requirements.split("\n") if line]
    while open_:
        wanted, of_extra = open_.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": of_extra}):
            continue
        for extra in ("", *wanted.extras):
            if (one := (canonicalize_name(wanted.name), extra)) not in found:
                found.add(one)
                with contextlib.suppress(PackageNotFoundError):
                    open_ += [(Requirement(line), extra) for line in requires(wanted.name) or []]
    return {name for name, _ in found}


def test_every_import_comes_with_the_package() -> None:
    """What a fresh environment gets by setup.cfg: a module that only the developers have would be missing there."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    there, distributions = installed_with(parser["options"]["install_requires"]), packages_distributions()
    imported = {module.split(".")[0] for file in modules() for module in imports(file) - NAMES}
    missing = {
        module
        for module in imported - set(sys.stdlib_module_names) - {"embedpool"}
        if not {canonicalize_name(name) for name in distributions.get(module, ())} & there
    }
    assert missing == OF_AN_EXTRA | WHERE_INSTALLED


def test_no_two_files_import_each_other() -> None:
    """Nor do several in a circle, not even for types."""
    graph = {name_of(file): {m for m in imports(file) if m in NAMES} for file in modules()}
    while graph:
        ground = {name for name, needs in graph.items() if not needs & set(graph)}
        assert ground, f"a circle among {sorted(graph)}"
        for name in ground:
            del graph[name]


@pytest.mark.parametrize("room", MAY_IMPORT_THIRD_PARTY)
def test_a_room_keeps_to_its_libraries(room: str) -> None:
    """Threads and queues need the standard library alone; HTTP needs no requests and no torch."""
    for file in modules():
        if name_of(file).split(".")[0] == room:
            tops = {module.split(".")[0] for module in imports(file) - NAMES}
            assert tops - set(sys.stdlib_module_names) <= MAY_IMPORT_THIRD_PARTY[room], file


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("embedpool.web.app", ("torch", "requests", "sentence_transformers", "transformers")),
        ("embedpool.cli", ("torch", "flask", "requests", "marshmallow", "yaml", "numpy")),
        ("embedpool.server", ("torch", "sentence_transformers", "transformers", "openvino", "embedpool.serve.run")),
        ("embedpool.drivers.tokenizer", ("torch", "transformers")),
        ("embedpool.places.in_child", ("torch", "flask", "requests", "transformers")),
    ],
)
def test_an_import_stays_light(module: str, forbidden: tuple[str, ...]) -> None:
    """What starts fast must not pay for what it does not use."""
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_two_files_know_waitress() -> None:
    """Every name of waitress's that is relied on stands there, and tests/serve/test_waitress.py checks it."""
    knowing = {f.name for f in modules() for module in imports(f) if module.split(".")[0] == "waitress"}
    assert knowing == {"connections.py", "bodies.py"}


def test_the_web_ring_has_one_way_into_the_pool() -> None:
    """A request's task and call meet the pool in submit.py, and the chunks of a stream in ndjson.py with its help."""
    asking = {f.name for f in (PACKAGE / "web").rglob("*.py") if re.search(r"pool\.submit\(", f.read_text())}
    assert asking == {"submit.py", "ndjson.py"}
    making = {f.name for f in (PACKAGE / "web").rglob("*.py") if re.search(r"\bCall\(", f.read_text())}
    assert making == {"submit.py"}


def test_the_rooms_stay_small() -> None:
    """A file that outgrows a screenful of screens is two ideas."""
    sizes = {f: len(f.read_text().splitlines()) for f in modules()}
    assert {str(f): n for f, n in sizes.items() if n > 400} == {}


def test_help_costs_little_cpu() -> None:
    """`embedpool --help` answers with docopt alone: no numpy, no flask, no torch."""
    code = "import sys; from embedpool.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'numpy', 'flask', 'torch', 'requests', 'yaml', 'marshmallow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


# --- the map


def named_on_the_map() -> set[str]:
    """The files and rooms that the package's docstring names."""
    return set(re.findall(r"[\w/]+(?:\.py|/)(?=[\s,:;).]|$)", embedpool.__doc__ or ""))


def test_the_map_is_true() -> None:
    """Every file and room that it names is there, and no file of the package is on no map: it is named, or its room."""
    named = named_on_the_map()
    assert {name for name in named if not (PACKAGE / name).exists()} == set()
    unknown = [
        str(path)
        for file in modules()
        if (path := file.relative_to(PACKAGE)).name not in ("__init__.py", "__main__.py")
        and not {str(path), *(f"{room}/" for room in path.parents)} & named
    ]
    assert unknown == []


FOLLOW = """
import json, sys, tempfile, threading
from pathlib import Path

import embedpool
from tests.conftest import PoolSettings, open_fake, open_fake_tokenizer, settle
from tests.web.conftest import serving

package, walked, recording = str(Path(embedpool.__file__).parent) + "/", [], []

def note(frame, event, argument):
    file = frame.f_code.co_filename
    if recording and event == "call" and file.startswith(package) and file not in walked:
        walked.append(file)

threading.setprofile(note)  # of the replicas' threads
with tempfile.TemporaryDirectory() as folder:
    with serving(Path(folder), PoolSettings(open_fake, open_fake_tokenizer), "model: m") as web:
        settle(web.pool)
        assert web.embed("a").status_code == 200
        recording.append(True)
        sys.setprofile(note)
        assert web.embed("b").status_code == 200
        sys.setprofile(None)
        recording.clear()
print(json.dumps([file.removeprefix(package) for file in walked]))
"""


def test_the_road_of_a_request_is_on_the_map_in_its_order() -> None:
    """A request is followed by the files in which it makes a call: all are named, those of the road in their order."""
    done = subprocess.run([sys.executable, "-c", FOLLOW], capture_output=True, text=True, check=True, cwd=ROOT)
    walked = json.loads(done.stdout)
    road = re.findall(r"^    ([\w/]+\.py)", embedpool.__doc__ or "", flags=re.MULTILINE)
    assert [name for name in walked if name in road] == [name for name in road if not name.startswith("drivers/")]
    rooms = ("web/", "pool/", "tasks/", "places/", "drivers/")
    assert {name for name in walked if name.startswith(rooms)} <= named_on_the_map()
