"""What a model may reach."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from embedpool.config import edit, guard
from embedpool.config.settings import Security, Settings
from embedpool.errors import Forbidden, InvalidRequest


def spec(kind: str, **config: Any) -> Any:
    return edit.parse_registration({"model": "m", "driver_type": kind, "driver_config": config})


def test_a_folder_is_where_its_files_are(tmp_path: Path) -> None:
    """With roots, a folder must be below one of them, and links and dots are no way out."""
    inside, outside = tmp_path / "models" / "a", tmp_path / "elsewhere"
    inside.mkdir(parents=True)
    outside.mkdir()
    (inside.parent / "link").symlink_to(outside)
    settings = Settings(security=Security(model_roots=(str(inside.parent),)))
    guard.check(spec("local_st", path=str(inside)), settings)
    guard.check(spec("local_st"), settings)
    for path in (outside, inside.parent / "link", inside / ".." / ".." / "elsewhere", Path(f"{inside.parent}-2")):
        with pytest.raises(Forbidden, match="model_roots"):
            guard.check(spec("local_st", path=str(path)), settings)
        guard.check(spec("local_st", path=str(path)), Settings())


@pytest.mark.parametrize(
    "host",
    ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "100.100.100.200", "[fd00:ec2::254]", "2852039166"],
)
def test_addresses_that_tell_secrets_are_refused(host: str) -> None:
    """However they are written, and whatever is allowed."""
    for security in (Security(), Security(remote_hosts=("*",))):
        with pytest.raises(Forbidden, match="secrets"):
            guard.check(spec("http", base_url=f"http://{host}/embed"), Settings(security=security))


def test_a_name_is_as_good_as_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them."""
    answer = [(socket.AF_INET, 0, 0, "", (address, 0)) for address in ("10.0.0.1", "169.254.169.254")]
    monkeypatch.setattr(guard.socket, "getaddrinfo", lambda *_: answer)
    with pytest.raises(Forbidden, match="secrets"):
        guard.check(spec("http", base_url="http://innocent.example/embed"), Settings())


def test_an_allow_list_of_hosts() -> None:
    """Names or patterns of names; without one any host will do."""
    settings = Settings(security=Security(remote_hosts=("127.0.0.1", "*.internal")))
    for url in ("http://127.0.0.1:5/embed", "http://a.INTERNAL/embed", "http://u:p@a.internal/embed"):
        guard.check(spec("http", base_url=url), settings)
    for url in ("http://127.0.0.2/embed", "http://internal/embed", "http://a.internal.example/embed"):
        with pytest.raises(Forbidden, match="remote_hosts"):
            guard.check(spec("http", base_url=url), settings)
        guard.check(spec("http", base_url=url), Settings())


def test_a_fake_reaches_nothing() -> None:
    """There is nothing to refuse."""
    guard.check(spec("fake"), Settings(security=Security(model_roots=("/nowhere",), remote_hosts=("none",))))


@pytest.mark.parametrize("url", ["http://169.254.169.254\\@localhost/", "http://a b/", "http://a/\n", "http://a\t/"])
def test_an_address_that_programs_read_in_two_ways_is_none(url: str) -> None:
    """What is checked and what is connected to would not be the same."""
    with pytest.raises(InvalidRequest, match="backslash"):
        spec("http", base_url=url)


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::", "fe80::1%eth0"]
)
def test_a_connection_to_such_an_address_is_cut(address: str) -> None:
    """Whatever name has led to it, and whatever that name stood for when it was checked."""
    with pytest.raises(Forbidden, match="secrets"):
        guard.check_peer(address)
    guard.check_peer("127.0.0.1")
    guard.check_peer("::1")
