"""`dns+http://name`: all addresses behind a name are asked, as they come and go. Names are looked up here."""

from __future__ import annotations

import contextlib
import logging
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import marshmallow
import numpy as np
import pytest
from hypothesis import strategies as st

from embedpool.config import pool_yml
from embedpool.config.spec import HttpConfig
from embedpool.drivers import addresses, http
from embedpool.drivers.addresses import Address, Addresses
from embedpool.drivers.http import HttpDriver
from embedpool.errors import EmbedpoolError, UpstreamError
from embedpool.pool.settings import PoolSettings
from tests.conftest import run, wait_until
from tests.drivers.remote import Crowd, Reply, Seen, at_once, good, remote_pool, serving, vector

NAME = "embedpools.test"


class Names:
    """What a name stands for; None: it cannot be looked up."""

    def __init__(self) -> None:
        self.ips: list[str] | None = []
        self.asked: list[tuple[str, int]] = []

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        if self.ips is None:
            raise OSError("Name or service not known")
        return list(self.ips)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    found = Names()
    monkeypatch.setattr(addresses, "lookup", found)
    monkeypatch.setattr(http, "LOOKUP_S", 0.01)
    monkeypatch.setattr(http, "RECHECK_S", 0.02)
    return found


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[Crowd]]:
    """Services at different addresses of this machine, all at the same port."""
    with contextlib.ExitStack() as stack:

        def one(ip: str, port: int) -> Crowd:
            return stack.enter_context(contextlib.contextmanager(serving)(Crowd, ip, port))  # type: ignore[return-value]

        first = one("127.0.0.1", 0)
        yield [first, *(one(f"127.0.0.{i}", first.server_port) for i in range(2, count + 1))]


def states(driver: HttpDriver) -> dict[str, str]:
    found = driver.facts.description["base_urls"]
    assert isinstance(found, dict)
    return {name.partition(":")[0]: state for name, state in found.items()}


def all_serve(driver: HttpDriver, *ips: str) -> Callable[[], bool]:
    return lambda: states(driver) == dict.fromkeys(ips, "serves")


def test_all_addresses_of_a_name_are_asked(names: Names, opened: Callable[..., HttpDriver]) -> None:
    """Each by the name, as a certificate and a virtual host need it; those that come are proved, those that go left."""
    with machines(3) as (first, second, third):
        names.ips = ["127.0.0.1", "127.0.0.2"]
        driver = opened(base_url=f"dns+http://{NAME}:{first.server_port}")
        wait_until(all_serve(driver, "127.0.0.1", "127.0.0.2"))
        with driver._upstreams[0].call():
            run(driver, ["a"])
        assert second.seen[-1].headers["Host"] == f"{NAME}:{first.server_port}"
        assert names.asked[0] == (NAME, first.server_port)
        names.ips = ["127.0.0.2", "127.0.0.3"]
        wait_until(all_serve(driver, "127.0.0.2", "127.0.0.3"))
        first.seen.clear()
        for _ in range(20):
            np.testing.assert_array_equal(run(driver, ["abc"]).rows.values, [vector("abc")])
        assert not first.seen
        assert third.seen
        assert not driver.reasons


def test_all_addresses_may_be_exchanged_at_once(names: Names, opened: Callable[..., HttpDriver]) -> None:
    """As when the only machine behind a name is replaced: the old one is asked until the new one has proved itself."""
    with machines(2) as (first, second):
        may_answer = threading.Event()

        def slow_to_begin(seen: Seen) -> Reply:
            assert may_answer.wait(20)
            return good(seen)

        second.answer = slow_to_begin
        names.ips = ["127.0.0.1"]
        driver = opened(base_url=f"dns+http://{NAME}:{first.server_port}")
        names.ips = ["127.0.0.2"]
        wait_until(lambda: bool(second.seen))  # it is asked for its proof
        for _ in range(20):
            np.testing.assert_array_equal(run(driver, ["abc"]).rows.values, [vector("abc")])
        may_answer.set()
        wait_until(all_serve(driver, "127.0.0.2"))
        first.seen.clear()
        run(driver, ["abc"])
        assert not first.seen
        assert not driver.reasons


def test_a_name_that_cannot_be_looked_up_stands_for_what_it_did(
    names: Names, opened: Callable[..., HttpDriver], caplog: pytest.LogCaptureFixture
) -> None:
    """A resolver that is down stops nothing, and is told of once; a driver that knows no address does not open."""
    caplog.set_level(logging.WARNING, logger="embedpool.drivers.addresses")
    with machines(1) as (first,):
        url = f"dns+http://{NAME}:{first.server_port}"
        names.ips = None
        with pytest.raises(UpstreamError, match=f"no address is known of {NAME}"):
            opened(base_url=url)
        names.ips = ["127.0.0.1"]
        driver = opened(base_url=url)
        names.ips = None
        asked = len(names.asked)
        wait_until(lambda: len(names.asked) > asked + 3)
        run(driver, ["a"])
        assert [record.getMessage() for record in caplog.records].count(caplog.records[-1].getMessage()) <= 2
        names.ips = []
        asked = len(names.asked)
        wait_until(lambda: len(names.asked) > asked + 3)
        run(driver, ["a"])


def test_one_that_gives_other_vectors_is_not_asked(names: Names, opened: Callable[..., HttpDriver]) -> None:
    """Whoever else stands behind the name."""
    with machines(2) as (first, second):
        second.answer = lambda seen: Reply(
            {"vectors": [[1.0, float(len(t)), 9.0] for t in seen.body["texts"]], "meta": {}}
        )
        names.ips = ["127.0.0.1"]
        driver = opened(base_url=f"dns+http://{NAME}:{first.server_port}")
        names.ips = ["127.0.0.1", "127.0.0.2"]
        wait_until(lambda: "a cosine of" in states(driver).get("127.0.0.2", ""))
        second.seen.clear()
        for _ in range(10):
            run(driver, ["abc"])
        assert all(len(seen.body["texts"]) != 1 or seen.body["texts"] != ["abc"] for seen in second.seen)


def test_one_leaves_and_one_joins_under_load(names: Names, pool_settings: PoolSettings) -> None:
    """Sixteen callers, time after time: no request fails, and the one that joins takes its part."""
    with machines(4) as (first, second, third, fourth):
        names.ips = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
        url = f"dns+http://{NAME}:{first.server_port}"
        with remote_pool(pool_settings, url, max_batch_texts=4) as pool:
            for number in range(30):
                if number == 10:  # it dies, and its name forgets it a little later
                    second.answer = lambda seen: Reply({}, 503)
                if number == 15:
                    names.ips = ["127.0.0.1", "127.0.0.3", "127.0.0.4"]
                texts = [[f"{number} {caller} {i}" for i in range(5)] for caller in range(16)]
                for asked, outcome in zip(texts, at_once(pool, texts), strict=True):
                    assert not isinstance(outcome, Exception), outcome
                    np.testing.assert_array_equal(outcome.vectors, [vector(text) for text in asked])
            wait_until(lambda: len(fourth.seen) > 3)  # its proof, and calls
        assert third.seen


@hypothesis.settings(
    max_examples=100, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(st.lists(st.none() | st.sets(st.sampled_from("abcdef")), max_size=12))
def test_whatever_a_name_becomes(monkeypatch: pytest.MonkeyPatch, turns: list[set[str] | None]) -> None:
    """Its addresses are those of the last answer; a known one stays the same; only one that went is closed."""
    names, closed, made = Names(), set[Any](), []
    monkeypatch.setattr(addresses, "lookup", names)

    class One:
        def __init__(self, address: Address) -> None:
            self.address, self.outstanding, self.name = address, 0, str(address.ip)
            self.fault = None
            made.append(self)

        def close(self) -> None:
            assert not self.outstanding
            assert self not in closed
            closed.add(self)

    known = Addresses([f"dns+http://{NAME}/", "http://fixed/"], One)  # type: ignore[arg-type]
    last: set[str] = set()
    for turn in turns:
        before = {one.address: one for one in known.current}
        names.ips = None if turn is None else sorted(turn)
        last = turn or last
        changed = known.refresh()
        now = {one.address: one for one in known.current}
        assert {address.ip for address in now} == {*last, None}
        assert changed == (now.keys() != before.keys())
        assert all(now[address] is before[address] for address in now.keys() & before.keys())
        assert not closed & set(known.current)
    if turns:
        known.refresh()
        assert closed == set(made) - set(known.current)


@pytest.mark.parametrize("url", ["dns+ftp://a/", "dns+http://", "dns+a"])
def test_what_is_no_such_url(url: str) -> None:
    """It is refused, as is a proxy beside one: that looks names up itself."""
    config = {"model": "m", "driver": {"type": "http", "config": {"base_url": url}}}
    with pytest.raises(EmbedpoolError, match="must be an http"):
        pool_yml.parse(str({"version": 1, "models": [config]}))
    with pytest.raises(marshmallow.ValidationError, match="looks names up itself"):
        HttpConfig(base_url="http://a/", base_urls=("dns+http://b/",), proxy="env")


def test_the_real_lookup() -> None:
    """Of this machine's resolver."""
    assert "127.0.0.1" in addresses.lookup("localhost", 80)
    with pytest.raises(OSError):  # noqa: PT011  (its text is the system's)
        addresses.lookup("nobody.invalid", 80)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_a_certificate_is_of_the_name(
    names: Names, opened: Callable[..., HttpDriver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the address that is reached."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={NAME}", "-days", "2"]
    files = ["-addext", f"subjectAltName=DNS:{NAME}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made, *files], check=True, capture_output=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    names.ips = ["127.0.0.1"]
    with machines(1) as (first,):
        first.socket = context.wrap_socket(first.socket, server_side=True)
        driver = opened(base_url=f"dns+https://{NAME}:{first.server_port}")
        np.testing.assert_array_equal(run(driver, ["abc"]).rows.values, [vector("abc")])
        with pytest.raises(UpstreamError, match="TLS"):
            opened(base_url=f"dns+https://other.test:{first.server_port}")
