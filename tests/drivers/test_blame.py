"""What a remote service cannot bear fails alone: one caller, one text, one error, and nobody else reads its words."""

from __future__ import annotations

import functools
import itertools
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpool.drivers import http, pace
from embedpool.drivers.http import HttpDriver
from embedpool.errors import FAILED_INPUTS_HEADER, EmbedpoolError, UpstreamError
from embedpool.pool.settings import PoolSettings
from tests.conftest import ask, run, settle, wait_until
from tests.drivers.remote import DROP, Remote, Reply, Seen, at_once, good, remote_pool, vector
from tests.web.conftest import serving as web_serving

pool_of = functools.partial(remote_pool, retries=0)


def told(outcome: Any) -> str:
    """All that a caller can read of an answer or an error."""
    if isinstance(outcome, EmbedpoolError):
        return f"{outcome.message} {outcome.fields} {outcome}"
    return " ".join(error.message for error in outcome.errors.values())


# --- a service that names the text


@pytest.mark.parametrize("how", ["in its answer", "in a header"])
def test_a_text_that_is_named_costs_no_search(remote: Remote, pool_settings: PoolSettings, how: str) -> None:
    """An embedpool does so, in whichever protocol."""

    def answer(seen: Seen) -> Reply:
        texts = seen.body["texts"]
        bad = [i for i, text in enumerate(texts) if "poison" in text]
        if bad and how == "in a header":
            said = {"error": {"message": f"it cannot bear {texts[bad[0]]}"}}
            return Reply(said, 500, {FAILED_INPUTS_HEADER: f"{bad[0]}"})
        errors = [{"index": i, "code": "text_too_long", "message": f"{texts[i]} is too long"} for i in bad]
        vectors = [None if i in bad else vector(text) for i, text in enumerate(texts)]
        return Reply({"vectors": vectors, "errors": errors})

    with pool_of(pool_settings, remote.url) as pool:
        remote.answer = answer
        remote.seen.clear()
        texts = [f"text {'x' * i}" for i in range(64)]
        texts[41] = "my poison"
        (error,) = at_once(pool, [texts])
        assert isinstance(error, UpstreamError)
        assert (error.inputs, set(error.fields)) == ((41,), {"texts[41]"})
        assert error.status == (502 if how == "in a header" else 422)
        assert "my poison" in error.message  # all of the call was its caller's
        assert len(remote.seen) <= 2
        remote.seen.clear()
        (result,) = at_once(pool, [texts], on_error="partial")
        assert list(result.errors) == [41]
        np.testing.assert_array_equal(np.delete(result.vectors, 41, 0), [vector(t) for t in texts if t != "my poison"])
        assert len(remote.seen) <= 2


@pytest.mark.parametrize("bad", [[0], [63], [5, 6, 60], list(range(0, 64, 2))], ids=str)
def test_every_named_text_fails_by_its_place_in_its_own_request(
    remote: Remote, opened: Callable[..., HttpDriver], bad: list[int]
) -> None:
    """What the service says of places outside the call is not believed."""
    driver = opened()
    errors = [{"index": i, "code": "inference_failed", "message": "no"} for i in [*bad, 64, 1000]]
    vectors = [None if i in bad else [1.0, 2.0, 3.0] for i in range(64)]
    remote.script = [Reply({"vectors": vectors, "errors": errors})]
    answer = run(driver, ["x"] * 64)
    assert sorted(i for i in answer.errors if i < 64) == bad
    assert np.flatnonzero(~answer.rows.finite()).tolist() == bad


def test_a_call_may_fail_in_all_of_its_texts(remote: Remote, opened: Callable[..., HttpDriver]) -> None:
    """Then there is no vector to tell the width by."""
    errors = [{"index": i, "code": "odd code", "message": "no"} for i in range(2)]
    driver = opened()
    remote.script = [Reply({"vectors": [None, None], "errors": errors})]
    answer = run(driver, ["a", "b"])
    assert (list(answer.errors), answer.rows.width) == ([0, 1], 3)
    assert "odd code" not in answer.errors[0].message  # only known words are passed on to everybody


def test_words_about_a_named_text_are_for_its_caller_alone(remote: Remote, pool_settings: PoolSettings) -> None:
    """A service that is none of ours may say anything there."""
    together = threading.Barrier(2)

    def answer(seen: Seen) -> Reply:
        texts = seen.body["texts"]
        errors = [{"index": i, "code": "inference_failed", "message": f"cannot: {texts}"} for i in range(len(texts))]
        return Reply({"vectors": [None] * len(texts), "errors": errors})

    with pool_of(pool_settings, remote.url, slots=1) as pool:
        remote.answer = answer
        pool.find("m").queue.mutex.acquire()  # until both wait
        try:
            with ThreadPoolExecutor(2) as callers:

                def send(text: str) -> Any:
                    together.wait(20)
                    try:
                        return ask(pool, "m", text)
                    except EmbedpoolError as error:
                        return error

                found = [callers.submit(send, text) for text in ("secret of one", "secret of another")]
                pool.find("m").queue.mutex.release()
                errors = [future.result() for future in found]
        finally:
            if pool.find("m").queue.mutex.locked():
                pool.find("m").queue.mutex.release()
        for mine, other, error in (("one", "another", errors[0]), ("another", "one", errors[1])):
            assert f"secret of {other}" not in told(error), mine


def outage(seen: Seen) -> Reply:
    """An embedpool whose own service is down: no text is at fault."""
    errors = [
        {"index": i, "code": "upstream_error", "message": "down", "at_fault": False}
        for i in range(len(seen.body["texts"]))
    ]
    return Reply({"vectors": [None] * len(errors), "errors": errors})


def test_an_outage_behind_another_embedpool_is_no_texts_fault(
    remote: Remote, second: Remote, opened: Callable[..., HttpDriver]
) -> None:
    """Another address serves, and this one is left alone after a while."""
    driver = opened(base_url=remote.url, base_urls=(second.url,), retries=1)
    wait_until(lambda: list(driver.facts.description["base_urls"].values()) == ["serves", "serves"])
    remote.answer = outage
    for _ in range(60):
        assert run(driver, ["a"]).errors == {}
    wait_until(lambda: next(iter(driver.facts.description["base_urls"].values())) != "serves")


def test_an_outage_behind_the_only_address_names_no_text(remote: Remote, pool_settings: PoolSettings) -> None:
    """Nor does the known text pass for one that was served."""
    with pool_of(pool_settings, remote.url) as pool:
        remote.answer = outage
        (error,) = at_once(pool, [["a", "b"]])
        assert isinstance(error, EmbedpoolError)
        assert not error.inputs


def test_whose_fault_it_was_is_told(web_of: Callable[..., Any]) -> None:
    """In the errors of a partial answer."""
    web = web_of("model: m, driver: {type: fake, config: {fault: raise, fault_text: bad}}")
    (error,) = web.embed("a", "bad", on_error="partial").json["errors"]
    assert (error["index"], error["at_fault"]) == (1, True)
    (error,) = web.embed("a", "w " * 600, truncate="error", on_error="partial").json["errors"]
    assert (error["index"], error["at_fault"]) == (1, True)


@pytest.fixture
def web_of(tmp_path: Path, pool_settings: PoolSettings) -> Iterator[Callable[..., Any]]:
    with ExitStack() as stack:

        def make(model: str) -> Any:
            web = stack.enter_context(web_serving(tmp_path, pool_settings, model))
            settle(web.pool)
            return web

        yield make


# --- an address that fails with texts that another serves


def test_a_text_alone_is_tried_at_another_address_before_it_is_blamed(
    remote: Remote, second: Remote, pool_settings: PoolSettings
) -> None:
    """One that is broken for everybody blames nobody."""
    with pool_of(pool_settings, remote.url, base_urls=(second.url,), retries=1) as pool:
        description = pool.find("m").replicas.counts
        wait_until(lambda: list(description()["runs_on"]["base_urls"].values()) == ["serves", "serves"])
        remote.answer = lambda seen: Reply({}, 500)
        second.answer = lambda seen: Reply({}, 500) if "poison" in seen.body["texts"] else good(seen)
        for number in range(12):
            texts = [f"{number} text {i}" for i in range(15)] + ["poison"]
            outcomes = at_once(pool, [[text] for text in texts])
            assert [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Exception)] == [15]


@pytest.mark.parametrize("failure", [Reply({}, 500), Reply({}, 503), DROP], ids=["500", "503", "dropped"])
def test_an_address_that_fails_beside_another_is_left_alone(
    remote: Remote, second: Remote, opened: Callable[..., HttpDriver], failure: Reply
) -> None:
    """No text is at fault in what the other one has served, however many there were in the call."""
    driver = opened(base_url=remote.url, base_urls=(second.url,), retries=1)
    wait_until(lambda: list(driver.facts.description["base_urls"].values()) == ["serves", "serves"])
    remote.answer = lambda seen: failure if len(seen.body["texts"]) > 1 else good(seen)
    for _ in range(200):
        assert len(run(driver, ["a", "b"]).rows) == 2
        if next(iter(driver.facts.description["base_urls"].values())) != "serves":
            return
    pytest.fail("it is called on and on")


def test_a_connection_that_is_lost_once_is_no_texts_fault(remote: Remote, pool_settings: PoolSettings) -> None:
    """Not even while a text is looked for."""
    seen_alone = itertools.count()

    def answer(seen: Seen) -> Reply:
        texts = seen.body["texts"]
        if len(texts) > 1 and "a" in texts:
            return Reply({}, 500)
        return DROP if texts == ["a"] and not next(seen_alone) else good(seen)

    with pool_of(pool_settings, remote.url, retries=1) as pool:
        remote.answer = answer
        np.testing.assert_array_equal(ask(pool, "m", "a", "bb", "ccc").vectors, [vector(t) for t in ("a", "bb", "ccc")])


def test_a_service_that_fails_in_the_middle_of_a_search_costs_no_more_calls(
    remote: Remote, pool_settings: PoolSettings
) -> None:
    """It is not asked about each text, and none is blamed."""
    with pool_of(pool_settings, remote.url, slots=1) as pool:
        remote.seen.clear()
        remote.answer = lambda seen: good(seen) if len(remote.seen) == 2 else Reply({}, 500)  # the first known text
        (error,) = at_once(pool, [[f"text {i}" for i in range(64)]])
        assert isinstance(error, UpstreamError)
        assert not error.inputs
        assert len(remote.seen) <= 2 + 6 + 1


# --- whatever it does, as a function of the text

ROUNDS, CALLERS = 120, 32
FATES = ("500", "html", "empty", "null", "nan", "reset", "short", "429", "200 with an error")
SLOW_SHARE = 0.05  # of them: each takes the time that the server waits, a few times


def fate_of(text: str) -> str | None:
    """What this service does to a text; about one in a hundred is not to its taste."""
    drawn = random.Random(zlib.crc32(text.encode()))
    if drawn.random() >= 0.01:
        return None
    return "slow" if drawn.random() < SLOW_SHARE else drawn.choice(FATES)


class Misbehaving:
    """Answers as its protocol asks for, but for the fates of some texts; a pause is asked for once a text."""

    def __init__(self) -> None:
        self._refused: set[str] = set()

    def __call__(self, seen: Seen) -> Reply:
        texts = seen.body["input"]
        fates = [fate_of(text) for text in texts]
        again = [text for text, fate in zip(texts, fates, strict=True) if fate == "429" and text not in self._refused]
        if again:
            self._refused.update(again)
            return Reply({"error": {"message": f"too many: {texts}"}}, 429)
        if "slow" in fates:
            time.sleep(3)
        if "reset" in fates:
            return DROP
        if "500" in fates:
            return Reply({"error": {"message": f"cannot embed {texts}"}}, 500)
        if "html" in fates:
            return Reply(f"<html>{texts}</html>".encode())
        if "200 with an error" in fates:
            return Reply({"error": f"odd: {texts}"})
        vectors: list[Any] = [vector(text) for text in texts]
        for i, fate in enumerate(fates):
            if fate in ("empty", "null", "nan"):
                vectors[i] = {"empty": [], "null": None, "nan": [float("nan")] * 3}[fate]
        data = [{"index": i, "embedding": found} for i, found in enumerate(vectors)]
        return Reply({"data": data[:-1] if "short" in fates else data})


def test_a_service_that_misbehaves_for_some_texts_harms_no_other(
    crowd: Remote, pool_settings: PoolSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 32 callers at once, time after time: each good text its vector, each bad one its error, and no word of it."""
    monkeypatch.setattr(http, "BACKOFF_FACTOR_S", 0)
    monkeypatch.setattr(pace, "FIRST_PAUSE_S", 0.001)
    crowd.answer = Misbehaving()
    seed = random.Random(16)
    with pool_of(pool_settings, crowd.url, protocol="openai", timeout_s=2, retries=1) as pool:
        bad = 0
        for number in range(ROUNDS):
            requests = [
                [f"caller {caller} round {number} text {i}" for i in range(seed.randint(1, 3))]
                for caller in range(CALLERS)
            ]
            outcomes = at_once(pool, requests, on_error="partial")
            for caller, (texts, outcome) in enumerate(zip(requests, outcomes, strict=True)):
                at_fault = [i for i, text in enumerate(texts) if fate_of(text) not in (None, "429")]
                assert not isinstance(outcome, Exception), (number, caller, outcome)
                assert list(outcome.errors) == at_fault, (number, caller, outcome.errors)
                for i, text in enumerate(texts):
                    if i not in at_fault:
                        np.testing.assert_array_equal(outcome.vectors[i], vector(text))
                for other in range(CALLERS):
                    assert other == caller or f"caller {other} " not in told(outcome)
                bad += len(at_fault)
        assert bad > 50
    assert "caller" not in caplog.text
