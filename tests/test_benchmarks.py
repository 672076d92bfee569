"""What `benchmarks.run --baseline` says of two checkouts; the measurements themselves are no tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, run


def _round(texts_s: float, **workloads: dict[str, float]) -> dict[str, Any]:
    short = {"texts_s": texts_s, "p50_ms": 10.0, "p99_ms": 20.0, "cpu_s_per_1000": 4.0}
    return {"peak_mb": 700.0, "pss_mb": 2 * texts_s, "workloads": {"short-1": short, **workloads}}


def test_a_ratio_is_taken_within_its_round() -> None:
    """A machine that is slower in one round is so for both."""
    rounds = {"a": [_round(100), _round(220), _round(330)], "a@baseline": [_round(200), _round(200), _round(300)]}
    text = report.compared(rounds)
    assert "| a | short-1 | 3 of 3 | 1.100 (0.500, 1.100) | 1.000 (1.000, 1.000) |" in text
    assert "PSS 1.100 (0.500, 1.100), peak 1.000 (1.000, 1.000)" in text


def test_a_round_that_failed_on_one_side_does_not_count() -> None:
    """It is counted among the rounds, and where all failed the table says so."""
    measured, failed = _round(100)["workloads"]["short-1"], {"failed": 1}
    rounds = {"a": [_round(100, w=measured), _round(100, w=failed)], "a@baseline": [_round(100, w=measured)] * 2}
    assert "| a | w | 1 of 2 | 1.000 (1.000, 1.000) |" in report.compared(rounds)
    rounds["a"] = [_round(100, w=failed)] * 2
    assert "| a | w | 0 of 2 | failed |" in report.compared(rounds)


@pytest.mark.parametrize(("more", "says"), [(["--write"], "is refused"), ([], "is not a checkout of embedpool")])
def test_a_baseline_that_cannot_be_is_refused(
    more: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a sentence, before anything is measured."""
    monkeypatch.setattr(sys, "argv", ["run", "--baseline", str(tmp_path), *more])
    with pytest.raises(SystemExit, match=says):
        run.main()
