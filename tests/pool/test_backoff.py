"""How long a driver that failed is left alone."""

from __future__ import annotations

import pytest

from embedpool.errors import UpstreamError
from embedpool.pool import backoff
from embedpool.pool.backoff import LOSSES_TO_FIND_AN_ITEM, Backoff
from embedpool.pool.runner import DriverBroken, DriverLost
from embedpool.tasks.driver import NoRoom


@pytest.fixture(autouse=True)
def _real_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_S", 0.5)
    monkeypatch.setattr(backoff, "LONGEST_S", 60.0)


@pytest.mark.parametrize(
    ("error", "longest_s"),
    [(OSError("down"), 60), (DriverBroken("broken"), 1), (UpstreamError("down"), 5), (NoRoom("4 CPU"), 1)],
)
def test_the_pause_doubles_up_to_a_bound(error: Exception, longest_s: float) -> None:
    """Retries begin half a second apart and are never more than a minute apart, less where they cost little."""
    found, pauses = Backoff(), []
    assert found.pause_s == 0
    for _ in range(5000):
        found.failed(error)
        pauses.append(found.pause_s)
    assert pauses[:9] == [min(s, longest_s) for s in (0.5, 1, 2, 4, 8, 16, 32, 60, 60)]
    assert pauses[-1] == longest_s
    found.served()
    assert found.pause_s == 0


def test_finding_an_item_that_ends_places_is_not_slowed_down() -> None:
    """As many losses as it takes to find one are followed by no pause; more of them in a row are, of up to a second."""
    found, pauses = Backoff(), []
    for _ in range(LOSSES_TO_FIND_AN_ITEM + 4):
        found.failed(DriverLost("its process was ended by SIGSEGV"))
        pauses.append(found.pause_s)
    assert pauses == [0.0] * LOSSES_TO_FIND_AN_ITEM + [0.5, 1, 1, 1]
    assert found.failures == 0
    found.served()
    found.failed(DriverLost("its process was ended by SIGSEGV"))
    assert found.pause_s == 0
