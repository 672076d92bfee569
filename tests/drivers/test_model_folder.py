"""Where a local model's files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from embedpool.config.spec import LocalStConfig
from embedpool.drivers.model_folder import find_model_folder
from embedpool.errors import ModelFailed
from tests.drivers.conftest import MINILM


def hub(monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """A hub that gives these answers one by one; what it was asked."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repo: str, **arguments: Any) -> str:
        asked.append((repo, arguments))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_folder_of_its_own_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`path` wins over the name, and nobody is asked."""
    asked = hub(monkeypatch, [])
    assert find_model_folder(MINILM, LocalStConfig(path=str(tmp_path))) == tmp_path
    assert not asked


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """A `path` that does not exist, or is a file, is told with model and path."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ModelFailed, match=str(path)):
            find_model_folder("org/m", LocalStConfig(path=str(path)))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", [MINILM, "all-MiniLM-L6-v2"])
def test_the_packaged_model_needs_no_network(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """MiniLM is found in its package, without a look at the hub."""
    asked = hub(monkeypatch, [])
    found = find_model_folder(name, LocalStConfig())
    assert (found / "tokenizer.json").is_file()
    assert not asked


def test_a_revision_is_taken_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pinned revision is not answered with whatever the package holds."""
    (tmp_path / "model.safetensors").touch()
    asked = hub(monkeypatch, [tmp_path])
    assert find_model_folder(MINILM, LocalStConfig(revision="abc")) == tmp_path
    assert [(repo, arguments["revision"], arguments["local_files_only"]) for repo, arguments in asked] == [
        (MINILM, "abc", True)
    ]


@pytest.mark.parametrize(("name", "repo"), [("org/m", "org/m"), ("m", "sentence-transformers/m")])
def test_the_local_cache_comes_before_the_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, repo: str
) -> None:
    """What is in the cache is used; a bare name is one of sentence-transformers."""
    (tmp_path / "model.safetensors").touch()
    asked = hub(monkeypatch, [tmp_path])
    assert find_model_folder(name, LocalStConfig()) == tmp_path
    assert [(r, arguments["local_files_only"]) for r, arguments in asked] == [(repo, True)]


def test_a_download_leaves_out_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is not cached is fetched, without weights that could carry code."""
    asked = hub(monkeypatch, [LocalEntryNotFoundError("no"), tmp_path])
    assert find_model_folder("org/m", LocalStConfig()) == tmp_path
    assert {"*.bin", "*.pt", "*.ckpt"} <= set(asked[1][1]["ignore_patterns"])


def test_a_cache_is_whole_without_what_is_never_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else each start would ask the hub, and follow whatever a branch has become: many repositories hold a .bin."""
    asked = hub(monkeypatch, [LocalEntryNotFoundError("no"), tmp_path])
    find_model_folder("org/m", LocalStConfig())
    assert asked[0][1]["ignore_patterns"] == asked[1][1]["ignore_patterns"]


@pytest.mark.parametrize("error", [OSError("offline\nand more"), ValueError(""), RuntimeError("401 gated")])
def test_a_model_that_cannot_be_had_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Whatever the hub's library raises, the error names the model and the reason in one line."""
    hub(monkeypatch, [LocalEntryNotFoundError("no"), error])
    with pytest.raises(ModelFailed, match="org/m") as caught:
        find_model_folder("org/m", LocalStConfig())
    assert "\n" not in caught.value.message
    assert (str(error).splitlines() or ["ValueError"])[0] in caught.value.message


def test_offline_and_not_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a network a model that is not there is refused at once, with the hub's own library."""
    with pytest.raises(ModelFailed, match="cannot be fetched"):
        find_model_folder("no-such-organisation/no-such-model", LocalStConfig())


def test_an_interrupted_download_is_taken_up_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cached folder without weights is not taken for the model."""
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole").mkdir()
    asked = hub(monkeypatch, [tmp_path / "cut", tmp_path / "whole"])
    assert find_model_folder("org/m", LocalStConfig()) == tmp_path / "whole"
    assert [arguments.get("local_files_only", False) for _, arguments in asked] == [True, False]
