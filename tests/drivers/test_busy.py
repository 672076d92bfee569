"""A remote service that asks for a pause slows the server down, and no text fails for it."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpool.drivers import pace
from embedpool.drivers.http import HttpDriver
from embedpool.drivers.upstream import Upstream
from embedpool.errors import ModelFailed, Overloaded, UpstreamError
from embedpool.pool.pool import Pool
from embedpool.pool.request import Call
from embedpool.pool.settings import PoolSettings
from embedpool.tasks.embed import Embed, EmbedOptions
from tests.conftest import ask, run, settle, wait_until
from tests.drivers.remote import Remote, Reply, Seen, good, remote_pool, vector
from tests.web.conftest import serving as web_serving


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FIRST_PAUSE_S", 0.005)


def ask_within(pool: Pool, timeout_s: float, *texts: str) -> Any:
    return pool.submit("m", Embed(texts, EmbedOptions()), Call(pool.clock(), timeout_s))


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("retry_after", [{}, {"Retry-After": "0"}], ids=["no time", "0"])
def test_a_service_that_bears_few_calls_at_once_gets_few(
    crowd: Remote, pool_settings: PoolSettings, at_once: int, retry_after: dict[str, str]
) -> None:
    """Everybody is served, and the service is not asked in vain for long."""
    room = threading.Semaphore(at_once)
    refusals = itertools.count()

    def answer(seen: Seen) -> Reply:
        if not room.acquire(blocking=False):
            next(refusals)
            return Reply({"error": "too many"}, 429, retry_after)
        try:
            time.sleep(0.003)  # a call takes its time
            return good(seen)
        finally:
            room.release()

    with remote_pool(pool_settings, crowd.url, max_batch_texts=1) as pool:
        crowd.answer = answer
        texts = [f"text {'x' * i}" for i in range(160)]
        with ThreadPoolExecutor(32) as callers:
            found = list(callers.map(lambda text: ask(pool, "m", text).vectors[0], texts))
        np.testing.assert_array_equal(found, [vector(text) for text in texts])
        assert next(refusals) < len(texts) / 2
        assert pool.find("m").snapshot()["counters"]["errors"] == {}


def test_a_pause_that_nobody_can_wait_for_is_told_at_once(remote: Remote, pool_settings: PoolSettings) -> None:
    """To those who were refused, to those who wait behind them, and at the door; and nobody calls meanwhile."""
    asked, answered = threading.Event(), threading.Event()

    def answer(seen: Seen) -> Reply:
        asked.set()
        assert answered.wait(20)
        return Reply({"error": f"too much of {seen.body['texts']}"}, 429, {"Retry-After": "3000"})

    with remote_pool(pool_settings, remote.url, slots=1) as pool:
        remote.answer = answer
        remote.seen.clear()
        with ThreadPoolExecutor(2) as callers:
            first = callers.submit(ask, pool, "m", "of one")
            assert asked.wait(20)
            second = callers.submit(ask, pool, "m", "of another")
            wait_until(pool.find("m").queue.qsize)
            answered.set()
            errors = [first.exception(), second.exception()]
        with pytest.raises(UpstreamError) as caught:
            ask(pool, "m", "at the door")
        for error in (*errors, caught.value):
            assert isinstance(error, UpstreamError)
            assert error.status == 429
            assert 2900 < (error.retry_after_s or 0) <= 3000
        assert "of one" in errors[0].message
        assert "of one" not in f"{errors[1].message} {caught.value.message}"
        assert len(remote.seen) == 1
        assert pool.find("m").snapshot()["rest_s"] > 2900
        assert pool.find("m").state == "ready"


def test_whoever_can_wait_is_served_after_the_pause(remote: Remote, pool_settings: PoolSettings) -> None:
    """One with a deadline before its end is told at once."""
    with remote_pool(pool_settings, remote.url) as pool:
        remote.script = [Reply({}, 429, {"Retry-After": "1"})]
        with ThreadPoolExecutor(2) as callers:
            patient = callers.submit(ask_within, pool, 20, "patient")
            wait_until(lambda: pool.find("m").replicas.rest_s)
            with pytest.raises(UpstreamError, match="pause"):
                ask_within(pool, 0.1, "hasty")
            np.testing.assert_array_equal(patient.result().vectors, [vector("patient")])


def test_a_full_queue_tells_the_time_of_the_pause(remote: Remote, pool_settings: PoolSettings) -> None:
    """It will not be less full before."""
    with remote_pool(pool_settings, remote.url, queue=2) as pool:
        remote.answer = lambda seen: Reply({}, 429, {"Retry-After": "15"})
        with ThreadPoolExecutor(2) as callers:
            waiting = [callers.submit(ask_within, pool, 20, f"text {i}") for i in range(2)]
            served = pool.find("m")
            wait_until(lambda: served.replicas.rest_s and served.queue.full())  # not before the first was refused
            with pytest.raises(Overloaded) as caught:
                ask_within(pool, 20, "one more")
            assert 5 < (caught.value.retry_after_s or 0) <= 15
            pool.stop()
            assert all(future.exception() for future in waiting)


def test_another_address_serves_while_one_rests(
    remote: Remote, second: Remote, opened: Callable[..., HttpDriver]
) -> None:
    """And none is called before its pause is over."""
    driver = opened(base_url=remote.url, base_urls=(second.url,), retries=1)
    wait_until(lambda: list(driver.facts.description["base_urls"].values()) == ["serves", "serves"])
    remote.seen.clear()
    remote.answer = lambda seen: Reply({}, 429, {"Retry-After": "1000"})
    for _ in range(10):
        run(driver, ["a"])
    assert len(remote.seen) <= 1
    assert driver.takes_a_batch()
    second.answer = remote.answer
    for _ in range(3):
        with pytest.raises(UpstreamError) as caught:
            run(driver, ["a"])
        assert caught.value.is_busy
    assert not driver.takes_a_batch()
    assert driver.rest_s() > 900
    assert not driver.reasons


def test_lines_wait_for_a_pause(remote: Remote, pool_settings: PoolSettings, tmp_path: Path) -> None:
    """A refusal in the middle of the lines is none of a line's errors."""
    calls = itertools.count()

    def answer(seen: Seen) -> Reply:
        return Reply({"error": "slow down"}, 429) if next(calls) % 3 == 2 else good(seen)

    model = f"model: m, driver: {{type: http, config: {{base_url: '{remote.url}', normalize: false}}}}"
    with web_serving(tmp_path, pool_settings, model) as web:
        settle(web.pool)
        remote.answer = answer
        texts = [f"text {i} {'x' * (i % 50)}" for i in range(1000)]
        body = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
        sent = web.post("/embed?model=m", data=body, content_type="application/x-ndjson")
        found = [json.loads(line) for line in sent.text.splitlines()]
        sent.close()
        assert [line.get("vector") for line in found] == [vector(text) for text in texts]
        assert next(calls) > 15


def test_a_pause_that_is_asked_for_at_the_start_is_kept(remote: Remote, pool_settings: PoolSettings) -> None:
    """The model fails to load with the time to come back, and is not tried before."""
    remote.answer = lambda seen: Reply({"error": "too much"}, 429, {"Retry-After": "3000"})
    with remote_pool(pool_settings, remote.url) as pool:
        served = pool.find("m")
        assert served.state == "failed"
        assert served.replicas.retry_after_s > 2900
        with pytest.raises(ModelFailed) as caught:
            ask(pool, "m", "a")
        assert (caught.value.retry_after_s or 0) > 2900
        assert len(remote.seen) == 1


def test_a_pause_that_ends_while_it_is_looked_at_is_still_one(
    remote: Remote, opened: Callable[..., HttpDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call is refused for now, and no text of it is blamed."""
    driver = opened(retries=0)
    rests = itertools.chain([0.001], itertools.repeat(0.0))
    monkeypatch.setattr(Upstream, "rest_s", property(lambda self: next(rests)))
    with pytest.raises(UpstreamError) as refused:
        run(driver, ["a"])
    assert (refused.value.is_busy, refused.value.retry_after_s) == (True, 0.0)
    assert remote.seen == []
    assert len(run(driver, ["a"]).rows) == 1
