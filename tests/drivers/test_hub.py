"""The hub, played by a small server on this machine, and its own library."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from embedpool.drivers import hub
from embedpool.drivers.hub import NotToBeHad, snapshot
from embedpool.tasks.driver import Progress
from tests.hub import Hub, playing

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "1_Pooling/config.json": b'{"a": 1}',
    "pytorch_model.bin": b"a pickle",
    "onnx/model.onnx": b"a graph",
}
LOADED = {"config.json", "model.safetensors", "1_Pooling/config.json"}


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub that the library speaks to, with an empty cache."""
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with playing(FILES) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        files_at = f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files_at)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()  # it may know a proxy
        yield server
        huggingface_hub.close_session()


def names_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_what_is_fetched_is_what_is_loaded(remote: Hub) -> None:
    """No weights that could carry code."""
    assert names_in(snapshot("org/m", None)) == LOADED


def test_pickles_are_fetched_to_be_converted_alone(remote: Hub) -> None:
    """Also into a cache that was whole without them; other formats stay where they are."""
    snapshot("org/m", None)
    found = names_in(snapshot("org/m", None, pickles=True))
    pickles = {name for name in FILES if name.endswith((".bin", ".pt"))}
    assert pickles
    assert found == LOADED | pickles


def test_a_whole_cache_asks_nobody(remote: Hub) -> None:
    """Although the repository holds more than was fetched, and has moved on by now."""
    found = snapshot("org/m", None)
    remote.asked.clear()
    remote.commit = "b" * 40
    assert snapshot("org/m", None) == found
    assert snapshot("org/m", "a" * 40) == found
    assert remote.asked == []


def test_an_interrupted_download_is_taken_up_again(remote: Hub) -> None:
    """A cached folder without weights is not taken for the model."""
    found = snapshot("org/m", None)
    (found / "model.safetensors").unlink()
    assert names_in(snapshot("org/m", None)) == LOADED


def test_how_far_a_download_is(remote: Hub) -> None:
    """In bytes, up to the last; a cut connection is taken up where it ended."""
    remote.files["model.safetensors"] = b"w" * 12_000_000
    remote.cut_after = 11_000_000
    told: list[Progress] = []
    found = snapshot("org/m", None, told.append)
    assert (found / "model.safetensors").read_bytes() == remote.files["model.safetensors"]
    assert len(remote.ranges) == 1
    of_all = sum(len(remote.files[name]) for name in LOADED)
    assert told[-1] == Progress("download", of_all, of_all)
    assert [progress.done_bytes for progress in told] == sorted(progress.done_bytes or 0 for progress in told)
    assert snapshot("org/m", None, told.clear) == found  # not told of what is there


def test_a_mistyped_name_is_told_with_those_like_it(remote: Hub) -> None:
    """As far as the hub finds any."""
    with pytest.raises(NotToBeHad, match=r"no repository 'org/n', or a private one: .*; did you mean org/m\?"):
        snapshot("org/n", None)
    with pytest.raises(NotToBeHad, match=r"set HF_TOKEN in the server's environment$"):
        snapshot("other/unknown", None)


@pytest.mark.parametrize("says", [(403, {}), (503, {}), (429, {}), (401, {})], ids=str)
def test_a_hub_that_fails_is_not_asked_for_what_is_there(remote: Hub, says: tuple[int, dict[str, str]]) -> None:
    """The cache comes first."""
    found = snapshot("org/m", None)
    remote.says = (*says, b"")
    assert snapshot("org/m", None) == found


@pytest.mark.parametrize(("status", "headers", "words"), [
    (401, {}, "check the name"),
    (403, {}, "what the token in HF_TOKEN may read"),
    (403, {"X-Error-Code": "GatedRepo"}, "accept the terms at .*/org/m, and set HF_TOKEN"),
    (404, {}, "check the name"),
    (404, {"X-Error-Code": "RepoNotFound"}, "check the name"),
    (404, {"X-Error-Code": "RevisionNotFound"}, "no revision 'v9' of it"),
    (429, {"Retry-After": "5"}, "asks for a pause"),
    (500, {}, "the hub fails .500."),
    (503, {}, "the hub fails .503."),
    (200, {"Content-Type": "text/html"}, "check HF_ENDPOINT, and whether a proxy asks for a login"),
], ids=str)  # fmt: skip
def test_what_cannot_be_had_is_told_with_what_to_do(
    remote: Hub, status: int, headers: dict[str, str], words: str
) -> None:
    """In one sentence."""
    remote.says = (status, headers, b"<html>")
    with pytest.raises(NotToBeHad, match=words) as caught:
        snapshot("org/m", "v9")
    assert "\n" not in str(caught.value)


def test_a_hub_that_never_answers_is_waited_for_so_long(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library would wait for good."""
    monkeypatch.setattr(hub, "WAIT_S", 0.2)
    remote.hangs = True
    with pytest.raises(NotToBeHad, match="does not answer within"):
        snapshot("org/m", None)
    assert remote.asked


def test_a_hub_that_is_not_there(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(NotToBeHad, match="cannot be reached"):
            snapshot("org/m", None)


def test_a_proxy_that_refuses(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named as such, and not the hub."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{remote.server_port}")
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    huggingface_hub.close_session()
    with pytest.raises(NotToBeHad, match=r"the proxy refuses .*: check HTTPS_PROXY and NO_PROXY"):
        snapshot("org/m", None)


def test_offline(remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network a model that is not there is refused at once."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotToBeHad, match="HF_HUB_OFFLINE forbids"):
        snapshot("org/m", None)
    assert remote.asked == []


def test_a_name_that_is_none(remote: Hub) -> None:
    """The library's own words."""
    with pytest.raises(NotToBeHad, match="Repo id must"):
        snapshot("org/m/x", None)
