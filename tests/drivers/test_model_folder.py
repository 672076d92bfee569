"""Where a local model's files are."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedpool.config.spec import LocalStConfig
from embedpool.drivers import hub
from embedpool.drivers.model_folder import commit_of, find_model_folder, keep_commit
from embedpool.errors import ModelFailed
from tests.conftest import NOWHERE
from tests.drivers.conftest import MINILM

NEW, OLD = "1" * 40, "0" * 40


class Asked:
    """Takes the place of the hub: gives the folder of what it is asked for."""

    def __init__(self, folder: Path, newest: str = OLD) -> None:
        self.seen: list[tuple[str, str | None]] = []
        self.newest = newest
        self._folder = folder

    def __call__(self, repo: str, revision: str | None, report: object, *, pickles: bool) -> Path:
        self.seen.append((repo, revision))
        commit = revision if revision and len(revision) == 40 else self.newest
        found = self._folder / "snapshots" / commit
        found.mkdir(parents=True, exist_ok=True)
        return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    made = Asked(tmp_path / "cache")
    monkeypatch.setattr(hub, "snapshot", made)
    return made


def served(model: str, state: Path, config: LocalStConfig | None = None) -> str:
    """Find a model and load it; gives the commit."""
    config = config or LocalStConfig()
    folder = find_model_folder(model, config, state)
    keep_commit(model, config, state, folder)
    return commit_of(folder) or ""


def test_a_folder_of_its_own_is_taken(tmp_path: Path, asked: Asked) -> None:
    """`path` wins over the name, and nobody is asked."""
    assert find_model_folder(MINILM, LocalStConfig(path=str(tmp_path)), NOWHERE.state) == tmp_path
    assert not asked.seen


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """A `path` that does not exist, or is a file, is told with model and path."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ModelFailed, match=str(path)):
            find_model_folder("org/m", LocalStConfig(path=str(path)), NOWHERE.state)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", [MINILM, "all-MiniLM-L6-v2"])
def test_the_packaged_model_needs_no_network(asked: Asked, name: str) -> None:
    """MiniLM is found in its package, without a look at the hub."""
    found = find_model_folder(name, LocalStConfig(), NOWHERE.state)
    assert (found / "tokenizer.json").is_file()
    assert commit_of(found) is None
    assert not asked.seen


@pytest.mark.parametrize(("name", "repo"), [("org/m", "org/m"), ("m", "sentence-transformers/m")])
def test_a_bare_name_is_one_of_sentence_transformers(asked: Asked, name: str, repo: str) -> None:
    """As its library has it."""
    find_model_folder(name, LocalStConfig(), NOWHERE.state)
    assert asked.seen == [(repo, None)]


def test_a_revision_is_taken_from_the_hub(asked: Asked) -> None:
    """A pinned revision is not answered with whatever the package holds."""
    find_model_folder(MINILM, LocalStConfig(revision="abc"), NOWHERE.state)
    assert asked.seen == [(MINILM, "abc")]


def test_a_commit_that_was_served_stays(asked: Asked, tmp_path: Path) -> None:
    """However the branch moves, and whoever moves it in the shared cache, until `revision` asks for another."""
    state = tmp_path / "state"
    assert served("org/m", state) == OLD
    asked.newest = NEW
    assert served("org/m", state) == OLD
    assert asked.seen[-1] == ("org/m", OLD)
    assert served("org/m", state, LocalStConfig(revision="main")) == NEW
    asked.newest = "2" * 40
    assert served("org/m", state, LocalStConfig(revision="main")) == NEW
    assert served("org/m", state, LocalStConfig(revision=OLD)) == OLD
    assert served("org/m", state) == OLD
    assert served("org/other", state) == "2" * 40


def test_a_commit_that_never_loaded_does_not(asked: Asked, tmp_path: Path) -> None:
    """Its authors may mend it."""
    find_model_folder("org/m", LocalStConfig(), tmp_path)
    asked.newest = NEW
    assert served("org/m", tmp_path) == NEW


@pytest.mark.parametrize("broken", [b"", b"main", b"\xff", b"../../etc"])
def test_a_broken_note_of_a_commit_is_none(asked: Asked, tmp_path: Path, broken: bytes) -> None:
    """A disk may break any file."""
    served("org/m", tmp_path)
    (note,) = (tmp_path / "revisions").iterdir()
    note.write_bytes(broken)
    asked.newest = NEW
    assert served("org/m", tmp_path) == NEW
    assert note.read_text() == f"{NEW}\n"


def test_a_commit_that_cannot_be_noted_is_served(asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    """The log says what that means."""
    assert served("org/m", NOWHERE.state) == OLD
    assert "another commit after a restart" in caplog.text


def test_what_cannot_be_had_is_told_with_the_models_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with the reason."""

    def fail(repo: str, revision: str | None, report: object, *, pickles: bool) -> Path:
        raise hub.NotToBeHad("it is gone")

    monkeypatch.setattr(hub, "snapshot", fail)
    with pytest.raises(ModelFailed, match=r"'org/m' is not whole in the local cache.*: it is gone"):
        find_model_folder("org/m", LocalStConfig(), NOWHERE.state)
