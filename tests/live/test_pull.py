"""`embedpool pull`, against a hub played here, and what a server then does without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.hub import Hub, playing
from tests.live.conftest import Server
from tests.zoo import make

LONG_BYTES = 12_000_000


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """With a model, and a pickle beside its weights that nobody wants."""
    folder = make("bert, dense", tmp_path)
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with playing({**files, "pytorch_model.bin": b"a pickle", "long.txt": b"x" * LONG_BYTES}) as server:
        yield server


@pytest.fixture
def online(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a command that may ask the hub."""
    return {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip


@pytest.fixture
def folder(make_server: Callable[..., Server], tmp_path: Path) -> Server:
    """A folder with the files of `init`, and no server."""
    return make_server(EMBEDPOOL_PATHS__CACHE_DIR=str(tmp_path / "cache"))


def test_what_was_pulled_is_served_without_a_network(
    folder: Server, hub: Hub, online: dict[str, str], tmp_path: Path
) -> None:
    """The download is shown, taken up again after a cut, checked and exported; then nobody is asked any more."""
    hub.cut_after = LONG_BYTES - 1_000_000
    said = folder.cli("pull", "org/m", **online)
    for step in ("download", "load", "warm up"):
        assert f"org/m: {step}" in said
    assert "org/m: 12 MB in" in said
    assert len(hub.ranges) == 1
    assert "/org/m/resolve/" in " ".join(hub.asked)
    assert not any("pytorch_model.bin" in path for path in hub.asked)
    exports = list((tmp_path / "cache" / "openvino").glob("*/model.xml"))
    hub.asked.clear()
    offline = {**online, "HF_HUB_OFFLINE": "1"}
    folder.cli("pool", "start", "--detach", **offline)
    try:
        assert "org/m: registered" in folder.cli("register", "--model", "org/m", "--type", "local_st")
    finally:
        folder.cli("pool", "stop")
    assert hub.asked == []
    assert list((tmp_path / "cache" / "openvino").glob("*/model.xml")) == exports
    assert "exporting" not in folder.log.read_text()


def test_a_copy_for_another_machine(folder: Server, hub: Hub, online: dict[str, str], tmp_path: Path) -> None:
    """`--to` makes a folder that needs no cache; one that holds files is left alone; --json says it for a program."""
    to = tmp_path / "carried"
    found: dict[str, Any] = json.loads(folder.cli("pull", "org/m", "--to", str(to), "--json", **online))
    assert (found["ok"], found["folder"], found["runs_on"]["dim"]) == (True, str(to), 24)
    assert (to / "2_Dense" / "model.safetensors").is_file()
    assert not any(file.is_symlink() for file in to.rglob("*"))
    assert not (to / "pytorch_model.bin").exists()
    assert "holds files already" in folder.cli("pull", "org/m", "--to", str(to), code=2, **online)
    offline = {**online, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "elsewhere")}
    assert "24" in folder.cli("pull", "any-name", "--set", f"path={to}", "--json", **offline)


@pytest.mark.parametrize(("status", "headers", "words"), [
    (403, {"X-Error-Code": "GatedRepo"}, "accept the terms at"),
    (404, {"X-Error-Code": "RepoNotFound"}, "did you mean org/m?"),
    (404, {"X-Error-Code": "RevisionNotFound"}, "no revision 'v9'"),
], ids=str)  # fmt: skip
def test_what_cannot_be_had_is_told(
    folder: Server, hub: Hub, online: dict[str, str], status: int, headers: dict[str, str], words: str
) -> None:
    """With exit code 1 and a sentence that says what to do."""
    hub.says = (status, headers, b"")
    said = folder.cli("pull", "org/n", "--revision", "v9", code=1, **online)
    assert words in said
    assert "Traceback" not in said


def test_offline_what_is_not_there_is_told(folder: Server, online: dict[str, str]) -> None:
    """Likewise; and code of a model's own is never allowed from the command line."""
    assert "HF_HUB_OFFLINE forbids" in folder.cli("pull", "org/m", code=1, **{**online, "HF_HUB_OFFLINE": "1"})
    said = folder.cli("pull", "org/m", "--set", "trust_remote_code=true", code=2, **online)
    assert "may only be set in pool.yml" in said


# --- what a server says of kinds


@pytest.fixture
def running(make_server: Callable[..., Server], tmp_path: Path) -> Server:
    made = make_server(EMBEDPOOL_PATHS__CACHE_DIR=str(tmp_path / "cache"))
    made.cli("pool", "start", "--detach")
    return made


def register(server: Server, name: str, folder: Path, **options: Any) -> str:
    return server.cli("register", "--model", name, "--type", "local_st", "--set", f"path={folder}", **options)


def test_a_registration_says_what_is_assumed_and_what_is_refused(running: Server, tmp_path: Path) -> None:
    """On the command line, in /status, in the lists and TEI's /info; a refusal names the key that overrides it."""
    assert "plain: token vectors are averaged" in register(running, "plain", make("plain encoder", tmp_path))
    assert running.status("plain")["runs_on"]["assumed"].startswith("token vectors are averaged")
    assert running.status("plain")["kinds"] == ["embed"]
    for path in ("/models/plain", "/v1/models/plain"):
        assert running.get(path).json()["kinds"] == ["embed"]
    assert "embedding" in running.get("/tei/plain/info").json()["model_type"]
    tagger = make("token classifier, as an embedder", tmp_path)
    said = register(running, "tagger", tagger, code=1)
    assert "is a classifier of tokens" in said
    assert "set driver.config.task to embed" in said
    asked = ("register", "--model", "tagger", "--type", "local_st", "--set", f"path={tagger}")
    assert "it is a classifier of tokens, served by task: embed" in running.cli(*asked, "--set", "task=embed")
    register(running, "classifier", make("classifier", tmp_path))
    assert running.status("classifier")["kinds"] == ["classify"]
    assert running.post("/embed", {"model": "classifier", "texts": ["a"]}).json()["error"]["code"] == "unsupported_task"


def test_a_model_that_served_before_and_is_refused_now_is_named_at_start(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    """With the key that mends it, in the log and in `pool status`; the other models serve."""
    server = make_server()
    folder = make("token classifier, as an embedder", tmp_path)
    server.pool_yml.write_text(
        "version: 1\nmodels:\n"
        f"  - {{model: old, driver: {{type: local_st, config: {{path: {folder}}}}}}}\n"
        "  - {model: new, driver: {type: fake}}\n"
    )
    server.cli("pool", "start", "--detach")
    wait_until(lambda: server.status("old")["state"] == "failed")
    assert server.status("new")["state"] == "ready"
    for said in (server.log.read_text(), server.cli("pool", "status")):
        assert "set driver.config.task to embed" in said


def test_a_table_is_loaded_at_once_and_without_torch(running: Server, tmp_path: Path) -> None:
    """The server's process never maps its library, nor that of OpenVINO."""
    register(running, "table", make("model2vec", tmp_path))
    answer = running.post("/embed", {"model": "table", "texts": ["The quick brown fox", ""]})
    assert answer.status_code == 200
    for process in (running.process, *running.process.children(recursive=True)):
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libtorch" not in maps
        assert "openvino" not in maps
