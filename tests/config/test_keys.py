"""keys.yml: hashes, limits, and a file that is followed."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path

import pytest

from embedpool.config.keys import ADMIN, EMBED, LOOK_EVERY_S, KeysFile, hash_of, id_of, make_key
from embedpool.errors import ConfigError, InvalidRequest


@pytest.fixture
def file(tmp_path: Path) -> KeysFile:
    return KeysFile(tmp_path / "keys.yml")


def test_a_key_is_in_no_file(file: KeysFile) -> None:
    """What is written is its hash, readable by its owner alone; what it is for comes back as it was."""
    entry, key = make_key("team a", scopes=["embed", "admin"], models=["m"], weight=2.5, texts_per_s=10)
    file.edit(lambda keys: (*keys, entry))
    text = file.path.read_text()
    assert key not in text
    assert key.split("_", 2)[2] not in text
    assert hash_of(key) in text
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert file.read() == (entry,)
    assert (entry.scopes, entry.models, entry.weight, entry.texts_per_s) == ((EMBED, ADMIN), ("m",), 2.5, 10)
    assert id_of(key) == entry.id


def test_two_keys_are_different() -> None:
    """In id and secret."""
    made = [make_key("") for _ in range(20)]
    assert len({entry.id for entry, _ in made}) == len({key for _, key in made}) == 20


@pytest.mark.parametrize("values", [{"scopes": []}, {"scopes": ["root"]}, {"weight": 0}, {"concurrent": -1}])
def test_a_key_that_means_nothing_is_refused(values: dict[str, object]) -> None:
    """Before anything is written."""
    with pytest.raises(InvalidRequest):
        make_key("", **values)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("keys: [", "line 1"),
        ("", "keys"),
        ("keys: 5", "keys"),
        ("keys: [{id: abcd}]", "sha256"),
        (f"keys: [{{id: abcd, sha256: {'0' * 64}, scope: embed}}]", "scopes"),
        (f"keys: [{{id: abcd, sha256: {'a' * 64}}}, {{id: abcd, sha256: {'b' * 64}}}]", "same id"),
    ],
)
def test_a_broken_file_is_an_error_that_says_where(file: KeysFile, text: str, says: str) -> None:
    """An empty file is one: it must not open the server."""
    file.path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        file.read()


def test_the_file_is_followed(file: KeysFile) -> None:
    """A change counts within a second; a file that is broken or gone changes nothing."""
    now = 100.0
    followed = KeysFile(file.path, clock=lambda: now)
    assert followed.current() == ()
    entry, _ = make_key("a")
    file.edit(lambda keys: (entry,))
    assert followed.current() == ()
    now += LOOK_EVERY_S
    assert followed.current() == (entry,)
    file.path.write_text("keys: [")
    now += LOOK_EVERY_S
    assert followed.current() == (entry,)
    assert followed.fault is None  # they are known
    file.path.unlink()
    now += LOOK_EVERY_S
    assert followed.current() == (entry,)
    assert followed.fault is None
    file.edit(lambda keys: (dataclasses.replace(entry, weight=3),))
    now += LOOK_EVERY_S
    assert followed.current()[0].weight == 3
    file.edit(lambda keys: ())
    now += LOOK_EVERY_S
    assert followed.current() == ()  # a key that the file does not list any more is none
    assert followed.fault
    file.revoke_last()
    now += LOOK_EVERY_S
    assert followed.current() == ()
    assert followed.fault is None


@pytest.mark.parametrize("text", ["keys: [", "", None])
def test_a_file_that_is_broken_from_the_start_opens_nothing(file: KeysFile, text: str | None) -> None:
    """Keys were made, and nobody knows whose; the file made whole is followed at the next look."""
    now = 100.0
    entry, _ = make_key("a")
    file.edit(lambda keys: (entry,))
    whole = file.path.read_text()
    if text is None:
        file.path.unlink()
    else:
        file.path.write_text(text)
    born = KeysFile(file.path, clock=lambda: now)
    assert born.current() == ()
    assert born.fault
    file.path.write_text(whole)
    now += LOOK_EVERY_S
    assert born.current() == (entry,)
    assert born.fault is None


def test_an_id_is_read_from_what_looks_like_a_key() -> None:
    """Anything else has none."""
    assert id_of("epk_abcd_x_y") == "abcd"
    for other in ("", "sk-abc", "epk_", "epk__x", "EPK_abcd_x"):
        assert id_of(other) == ""
