"""The page's files and its data: ten minutes of samples, one document a sample, and nothing for whom it is not."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from embedpool.config.settings import Settings, Ui
from embedpool.pool.settings import PoolSettings
from embedpool.pool.stats import SECONDS, ModelStats
from embedpool.web import ui
from embedpool.web.history import HISTORY, KEPT, PERCENTILES, STEP_S, History, percentiles
from tests.conftest import settle
from tests.web.conftest import MakeWeb, Web, serving

VENDOR = ui.FOLDER / "vendor"
EMBEDDER = "model: em, alias: e"
RERANKER = "model: rr, driver: {type: fake, config: {task: rerank}}"
BROKEN = "model: broken, driver: {type: fake, config: {fault: load}}"


@pytest.fixture
def web(make_web: MakeWeb) -> Web:
    return make_web(EMBEDDER, RERANKER)


def live(web: Web, since: int | None = None, **arguments: Any) -> dict[str, Any]:
    """With `since` as a page asks that knows so many samples of this process."""
    query = {} if since is None else {"since": since, "process": web.get("/live").json["process"]}
    answer = web.get("/live", query_string=query, **arguments)
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json
    return found


def entry(document: dict[str, Any], model: str) -> dict[str, Any]:
    return next(one for one in document["models"] if one["model"] == model)


class Clock:
    """It stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


# --- samples


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def history(web: Web, clock: Clock) -> History:
    """Of a pool that serves, by a clock of the test's own."""
    return History(web.pool, clock)


def sample(history: History, clock: Clock, times: int = 1) -> None:
    for _ in range(times):
        history.sample_if_due()
        clock.advance(STEP_S)


def test_a_sample_is_taken_every_two_seconds(history: History, clock: Clock) -> None:
    """However often it is asked for; after a pause it goes on as before."""
    for _ in range(5):
        history.sample_if_due()
    assert history.number == 1
    clock.advance(STEP_S - 0.01)
    history.sample_if_due()
    assert history.number == 1
    clock.advance(0.01)
    history.sample_if_due()
    assert history.number == 2
    clock.advance(100 * STEP_S)
    for _ in range(5):
        history.sample_if_due()
    assert history.number == 3


def test_rates_are_those_of_a_minute(web: Web, history: History, clock: Clock) -> None:
    """And are gone when it is over; the counters stay."""
    served = web.pool.find("em")
    sample(history, clock)
    for _ in range(3):
        web.post("/embed", {"model": "em", "texts": ["a", "b"]})
    web.post("/embed", {"model": "em", "texts": ["w " * 600], "options": {"truncate": "error"}})
    sample(history, clock)
    found = history.last_minute(served)
    assert (found["seconds"], found["texts_s"], found["requests_s"]) == (4.0, 6 / 4, 1.0)
    assert found["errors"] == {"text_too_long": 1}
    assert found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"]
    assert found["texts_a_batch"] == 2
    assert found["padding"] == 0
    assert history.series(served, 0)["texts_s"] == [0.0, 3.0]
    sample(history, clock, 31)
    after = history.last_minute(served)
    assert (after["seconds"], after["texts_s"], after["p99_ms"], after["errors"]) == (60.0, 0.0, None, {})
    assert sum(history.series(served, 0)["texts_s"]) == 3.0


@hypothesis.given(st.lists(st.floats(0, 300), min_size=1, max_size=40))
def test_a_percentile_is_the_bound_of_its_bucket(times_s: list[float]) -> None:
    """The least bound of /metrics that so many were no longer than; nothing beyond the last is made up."""
    stats = ModelStats()
    for spent_s in times_s:
        stats.batch(1, 1, 1, spent_s)
    found = percentiles(np.array(stats.counted()[0]), "batch")
    for name, share in PERCENTILES.items():
        fits = [bound for bound in SECONDS if sum(one <= bound for one in times_s) >= share * len(times_s)]
        assert found[name] == (1000 * fits[0] if fits else None)


def test_only_ten_minutes_are_kept(web: Web, history: History, clock: Clock) -> None:
    """And a page that knows some of them is told the others alone."""
    served = web.pool.find("em")
    sample(history, clock, KEPT + 20)
    assert {len(points) for points in history.series(served, 0).values()} == {KEPT}
    assert {len(points) for points in history.series(served, history.number - 3).values()} == {3}
    assert {len(points) for points in history.series(served, history.number).values()} == {0}


def test_a_model_that_is_registered_anew_begins_anew(web: Web, history: History, clock: Clock) -> None:
    """Its counters do, and no rate is less than nothing."""
    web.post("/embed", {"model": "em", "texts": ["a"] * 5})
    sample(history, clock, 3)
    web.delete("/models/em")
    web.post("/models/register", {"model": "em", "driver_type": "fake"})
    settle(web.pool)
    served = web.pool.find("em")
    assert history.last_minute(served)["texts_s"] == 0
    sample(history, clock)
    assert history.series(served, 0)["texts_s"] == [0.0]
    assert history.last_minute(served)["texts_s"] == 0


# --- /live


def test_live_shows_the_pool(web: Web) -> None:
    """What it is, what it did in the last minute, and who answers."""
    web.post("/embed", {"model": "em", "texts": ["a", "b"]})
    document = live(web)
    em, rr = entry(document, "em"), entry(document, "rr")
    assert (em["alias"], em["state"], em["kinds"], rr["kinds"]) == ("e", "ready", ["embed"], ["rerank"])
    assert em["runs_on"]["dim"] == web.status("em")["runs_on"]["dim"]
    assert em["counters"] == web.status("em")["counters"]
    assert (em["space"], em["queue_max"]) == (web.status("em")["space"], web.status("em")["queue_max"])
    assert em["replicas_on"] == [{"replica": "em#1", "state": "ready"}]
    assert document["admin"] is True
    assert {"pid", "host", "reload"} <= set(document)
    assert document["step_s"] == STEP_S


def test_it_is_made_once_a_sample(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pages ask; counters that changed meanwhile come with the next."""
    history = web.app.extensions[HISTORY]
    first = web.get("/live").data
    web.post("/embed", {"model": "em", "texts": ["a"]})
    monkeypatch.setattr(history, "_next_at", float("inf"))
    assert web.get("/live").data == first
    monkeypatch.setattr(history, "_next_at", 0.0)
    assert entry(live(web), "em")["counters"]["texts"] == 1


def test_a_page_is_told_what_is_new(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is far behind, or ahead, as after a restart, is told everything."""
    history = web.app.extensions[HISTORY]
    for _ in range(20):
        monkeypatch.setattr(history, "_next_at", 0.0)
        history.sample_if_due()
    monkeypatch.setattr(history, "_next_at", float("inf"))
    for since, told in ((19, 1), (20, 0), (16, 4), (3, 20), (21, 20), (0, 20)):
        document = live(web, since)
        assert len(entry(document, "em")["series"]["queue"]) == told
        assert document["since"] == (since if told < 20 else 0)
    process = live(web)["process"]
    for nonsense in ("x", "-1", "9" * 30, "²"):
        assert web.get(f"/live?since={nonsense}&process={process}").json["since"] == 0


def test_a_number_is_one_of_its_process(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page has of another process, which counts nearly alike, is nothing here."""
    history = web.app.extensions[HISTORY]
    for _ in range(9):
        monkeypatch.setattr(history, "_next_at", 0.0)
        history.sample_if_due()
    monkeypatch.setattr(history, "_next_at", float("inf"))
    web.post("/embed", {"model": "em", "texts": ["a"]})
    process = live(web)["process"]
    for query, told, requests in ((f"process={process}", 1, 0), ("process=abcdef", 9, 1), ("", 9, 1)):
        document = web.get(f"/live?since=8&{query}").json
        assert (document["since"], len(entry(document, "em")["series"]["queue"])) == (8 if told == 1 else 0, told)
        log = web.get(f"/log?since=1&{query}").json
        assert (log["process"], len(log["requests"])) == (process, requests)


def test_the_lines_alone_are_made_for_those_who_know_some(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever pages know already, a model is looked at once a sample."""
    history = web.app.extensions[HISTORY]
    for _ in range(9):
        monkeypatch.setattr(history, "_next_at", 0.0)
        history.sample_if_due()
    monkeypatch.setattr(history, "_next_at", float("inf"))
    looked = []
    last_minute = history.last_minute
    monkeypatch.setattr(history, "last_minute", lambda served: looked.append(served.spec.model) or last_minute(served))
    documents = [live(web, since) for since in (0, 5, 6, 7, 8, 9)]
    assert looked == ["em", "rr"]
    assert [len(entry(document, "em")["series"]["queue"]) for document in documents] == [9, 4, 3, 2, 1, 0]
    alike = [{**document, "since": 0, "models": None} for document in documents]
    assert alike == [alike[0]] * 6


def test_what_only_those_see_who_may_manage(make_web: MakeWeb) -> None:
    """Process, host, paths and texts of errors; a stranger on the network sees that something is wrong."""
    web = make_web(EMBEDDER, BROKEN)
    stranger = live(web, environ_base={"REMOTE_ADDR": "192.0.2.7"})
    assert stranger["admin"] is False
    assert not {"pid", "host", "reload", "candidates"} & set(stranger)
    assert entry(stranger, "broken")["in_trouble"] is True
    assert not {"last_error", "replicas_on"} & set(entry(stranger, "broken"))
    assert "fault: load" not in json.dumps(stranger)
    assert "fault: load" in entry(live(web), "broken")["last_error"]
    assert entry(stranger, "broken")["error_age_s"] >= 0
    assert entry(stranger, "broken")["retry_s"] >= 1
    assert (entry(stranger, "em")["error_age_s"], entry(stranger, "em")["retry_s"]) == (None, None)
    proxied = live(web, headers={"X-Forwarded-For": "192.0.2.7"})
    assert proxied["admin"] is False


# --- /log


def test_the_log_shows_the_last_requests(web: Web) -> None:
    """Newest last, without texts; not those of the page itself and of probes that went well."""
    for path in ("/live", "/log", "/ui", "/ui/app.js", "/health", "/metrics"):
        assert web.get(path).status_code == 200
    assert web.get("/log").json == {"number": 0, "requests": [], "process": live(web)["process"]}
    web.post("/embed", {"model": "em", "texts": ["secret words"]})
    web.post("/rerank", {"model": "rr", "query": "secret", "documents": ["words"]})
    answer = web.get("/log").json
    assert [(one["path"], one["status"], one["model"], one["number"]) for one in answer["requests"]] == [
        ("/embed", 200, "em", 1), ("/rerank", 200, "rr", 2),
    ]  # fmt: skip
    assert "secret" not in json.dumps(answer)
    process = answer["process"]
    assert [one["number"] for one in web.get(f"/log?since=1&process={process}").json["requests"]] == [2]
    for _ in range(520):
        web.post("/embed", {})
    answer = web.get("/log").json
    assert (len(answer["requests"]), answer["number"]) == (500, 522)


def test_the_log_is_for_those_who_may_manage(web: Web) -> None:
    """Without keys for this machine."""
    assert web.get("/log", environ_base={"REMOTE_ADDR": "192.0.2.7"}).status_code == 403
    assert web.get("/log", headers={"Host": "evil.example"}).status_code == 403


# --- files


def test_every_file_is_there_with_its_type_and_the_policy(web: Web) -> None:
    """And a second time only if it has changed."""
    names = ["index.html", *(file.relative_to(ui.FOLDER).as_posix() for file in ui.FOLDER.rglob("*.js"))]
    assert "vendor/lit-html/lit-html.js" in names
    for name in names:
        answer = web.get(f"/ui/{name}")
        assert (answer.status_code, answer.headers["Content-Security-Policy"]) == (200, ui.POLICY)
        assert answer.mimetype == ("text/html" if name.endswith(".html") else "text/javascript")
        again = web.get(f"/ui/{name}", headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status_code, again.data) == (304, b"")
    assert web.get("/ui").data == web.get("/ui/").data == web.get("/ui/index.html").data
    assert web.get("/ui/ui/app.js").data == web.get("/ui/app.js").data  # what /ui/ asks for


def test_it_is_light() -> None:
    """All of it, compressed as a proxy would."""
    files = [file.read_bytes() for file in ui.FOLDER.rglob("*") if file.suffix in ui.TYPES]
    assert sum(len(gzip.compress(content)) for content in files) < 120_000


@pytest.mark.parametrize("scheme", [0, 1])
def test_numbers_of_the_heat_map_are_legible(scheme: int) -> None:
    """The contrast of the ink with each of the 21 shades, in the light and the dark scheme."""
    css = (ui.FOLDER / "style.css").read_text()

    def colour(name: str) -> np.ndarray:
        found = re.search(rf"--{name}: light-dark\((#\w+), (#\w+)\)", css)
        assert found
        digits = found[1 + scheme].removeprefix("#")
        digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
        return np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])

    def luminance(srgb: np.ndarray) -> float:
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    assert "color-mix(in srgb, var(--heat) var(--part), var(--card)); color: var(--ink)" in css
    parts = {int(number): int(part) / 100 for number, part in re.findall(r"\.shade-(\d+) { --part: (\d+)%; }", css)}
    assert sorted(parts) == list(range(21))
    ink = luminance(colour("ink"))
    for number, part in parts.items():
        ground = luminance(part * colour("heat") + (1 - part) * colour("card"))
        contrast = (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05)
        assert contrast >= 4.5, f"shade {number}: {contrast:.2f}"


@pytest.mark.parametrize("name", ["nothing.js", "../access.py", "%2e%2e/access.py", "vendor/uplot/LICENSE", "vendor"])
def test_nothing_else_is_given_away(web: Web, name: str) -> None:
    """Whatever lies beside them on the disk."""
    assert web.get(f"/ui/{name}").status_code == 404


def test_the_files_of_others_are_as_they_were_published() -> None:
    """Their hashes are listed with name, version and path."""
    listed = {}
    for line in (VENDOR / "VENDORED").read_text().splitlines():
        if line and not line.startswith("#"):
            digest, file, *_ = line.split()
            listed[file] = digest
    found = {
        file.relative_to(VENDOR).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in VENDOR.rglob("*")
        if file.is_file() and file.name != "VENDORED"
    }
    assert found == listed


def test_the_page_may_be_switched_off(tmp_path: Path, pool_settings: PoolSettings) -> None:
    """With its data; people are sent to the API's page."""
    with serving(tmp_path, pool_settings, EMBEDDER, settings=Settings(ui=Ui(enabled=False))) as web:
        for path in ("/ui", "/ui/app.js", "/live", "/log"):
            assert web.get(path).status_code == 404
        answer = web.get("/", headers={"Accept": "text/html"})
        assert (answer.status_code, answer.headers["Location"]) == (302, "docs")


def test_people_are_sent_to_the_page(web: Web) -> None:
    """A program is told that it is there."""
    answer = web.get("/", headers={"Accept": "text/html"})
    assert (answer.status_code, answer.headers["Location"]) == (302, "ui")
    assert web.get("/", headers={"Accept": "application/json"}).json["links"]["ui"] == "ui"
