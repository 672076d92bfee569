"""The bodies of all requests together are bounded; who comes too late is refused before anything is parsed."""

from __future__ import annotations

import pytest

from embedpool.config.settings import Limits, Settings
from embedpool.errors import Overloaded
from embedpool.web.intake import FREE_BYTES, INTAKE, Intake
from tests.web.conftest import MODEL, MakeWeb


def test_bodies_share_a_bound() -> None:
    """One that exceeds it goes alone; small ones are not counted."""
    intake = Intake(1_000_000)
    held = intake.take(5_000_000)
    with pytest.raises(Overloaded) as refused:
        intake.take(FREE_BYTES + 1)
    assert refused.value.retry_after_s
    assert intake.take(FREE_BYTES) == 0
    intake.give_back(held)
    assert intake.take(600_000) == 600_000
    with pytest.raises(Overloaded):
        intake.take(600_000)


def test_a_body_counts_until_it_is_answered(make_web: MakeWeb) -> None:
    """Whatever the answer is."""
    web = make_web(MODEL, settings=Settings(limits=Limits(max_bodies_bytes=300_000)))
    intake: Intake = web.app.extensions[INTAKE]
    text = "a" * 200_000
    for _ in range(2):
        assert web.embed(text).status_code == 200
        assert web.embed(text, model="none").status_code == 404
    held = intake.take(200_000)
    answer = web.embed(text)
    assert (answer.status_code, answer.json["error"]["code"]) == (429, "overloaded")
    assert int(answer.headers["Retry-After"]) > 0
    intake.give_back(held)
    assert web.embed(text).status_code == 200
