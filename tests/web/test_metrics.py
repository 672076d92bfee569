"""GET /metrics."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from embedpool.web.metrics import CACHE_SAYS, SHARED_DIR, UNTIL_0_2, forget_worker, share, unshare
from tests.web.conftest import MODEL, NAME, MakeWeb, Web

EMBED = "embed"
OF_NO_MODEL = {
    f"embedpool_{name}"
    for name in (
        "reloads", "http_requests", "worker", "batch_job_requests", "batch_jobs_ended", "batch_jobs", "files_bytes",
        "files_max_bytes", "cache_evictions",
        *(f"cache_{layer}_{name}" for layer in ("memory", "disk") for name in CACHE_SAYS),
    )
}  # fmt: skip
CONF = Path(__file__).parents[2] / "conf"


def samples(web: Web) -> dict[tuple[str, ...], float]:
    """(series, label values in the order of their names) → value."""
    answer = web.get("/metrics")
    assert answer.mimetype == "text/plain"
    families = list(text_string_to_metric_families(answer.text))
    assert all(family.documentation for family in families)
    found = {}
    for family in families:
        for sample in family.samples:
            key = (sample.name, *(v for _, v in sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
            assert family.name in OF_NO_MODEL or "model" in sample.labels
    return found


def test_requests_are_counted(web: Web) -> None:
    """Requests, texts, tokens, truncated texts and errors appear under the model's name, not its alias."""
    web.embed("a b", "c")
    web.embed("a b c d", max_seq_length=4)
    web.embed("a", whatever=1)
    found = samples(web)
    assert found["embedpool_requests_total", NAME, EMBED] == 3
    assert found["embedpool_items_total", NAME, EMBED] == 3
    assert found["embedpool_tokens_total", NAME, EMBED] == 4 + 3 + 4
    assert found["embedpool_truncated_total", NAME, EMBED] == 1
    assert found["embedpool_errors_total", "unsupported_option", NAME, EMBED] == 1
    assert found["embedpool_batch_items_count", NAME] >= 2
    assert found["embedpool_batch_items_sum", NAME] == 3
    assert found["embedpool_batch_seconds_count", NAME] == found["embedpool_batch_items_count", NAME]
    assert found["embedpool_padded_tokens_total", NAME] >= found["embedpool_batch_tokens_total", NAME] == 11
    assert found["embedpool_request_seconds_count", NAME, EMBED] == found["embedpool_queue_seconds_count", NAME] == 2


def test_tasks_are_told_apart(make_web: MakeWeb) -> None:
    """What reranks and what embeds, also where a model does both."""
    web = make_web(MODEL, "model: rr, driver: {type: fake, config: {task: rerank}}")
    web.post("/rerank", {"model": "rr", "query": "a", "documents": ["a", "b c"]})
    web.post("/rerank", {"model": "m", "query": "a", "documents": ["a"]})
    found = samples(web)
    assert found["embedpool_items_total", "rr", "rerank"] == 2
    assert found["embedpool_request_seconds_count", "rr", "rerank"] == 1
    assert found["embedpool_errors_total", "unsupported_task", NAME, "rerank"] == 1
    assert ("embedpool_items_total", "rr", EMBED) not in found


def test_answers_are_counted_by_route(web: Web) -> None:
    """Every answer appears under its route, status and error code; paths that are none are all one."""
    web.embed("a")
    web.embed("a", model="invented")
    web.get("/invented")
    web.get(f"/models/{NAME}")
    found = samples(web)
    assert found["embedpool_http_requests_total", "", "POST /embed", "200"] == 1
    assert found["embedpool_http_requests_total", "model_not_found", "POST /embed", "404"] == 1
    assert found["embedpool_http_requests_total", "not_found", "unknown", "404"] == 1
    assert found["embedpool_http_requests_total", "", "GET /models/<path:name>", "200"] == 1


def test_a_known_model_has_every_series_from_the_start(web: Web) -> None:
    """A rate needs a first value, and an alert a series to look at."""
    found = samples(web)
    assert found["embedpool_requests_total", NAME, EMBED] == 0
    assert found["embedpool_request_seconds_count", NAME, EMBED] == 0
    assert found["embedpool_truncated_total", NAME, EMBED] == 0


def test_state_replicas_queue_and_reloads(make_web: MakeWeb) -> None:
    """The state of each model is 1 for one of the states and 0 for the others; replicas, queues and reloads count."""
    web = make_web(MODEL, "model: off, enabled: false")
    found = samples(web)
    states = {key: value for key, value in found.items() if key[0] == "embedpool_model_state"}
    assert {key[1:] for key, value in states.items() if value == 1} == {(NAME, "ready"), ("off", "disabled")}
    assert {key[2] for key in states} == {"idle", "loading", "ready", "failed", "disabled", "draining"}
    assert found["embedpool_replicas", NAME, "idle"] == 1
    assert found["embedpool_queue_items", NAME] == 0
    assert found["embedpool_queue_max_items", NAME] == 1000
    assert found["embedpool_reloads_total", "ok"] == 1


def test_only_known_models_become_labels(web: Web) -> None:
    """A model name that a client invented never becomes a label, nor does an alias; unregistered models go."""
    web.embed("a", model="invented-by-a-client")
    web.embed("a", model="m")
    web.get("/models/invented-by-a-client")
    text = web.get("/metrics").text
    assert "invented" not in text
    assert 'model="m"' not in text
    assert NAME in text
    web.delete(f"/models/{NAME}")
    assert NAME not in web.get("/metrics").text


def test_an_empty_pool_has_metrics(make_web: MakeWeb) -> None:
    """A scrape of a pool without models works."""
    assert samples(make_web()) == {
        ("embedpool_reloads_total", "ok"): 1,
        ("embedpool_worker", str(os.getpid())): 1,
        ("embedpool_files_bytes",): 0,
        ("embedpool_files_max_bytes",): 0,
        **{("embedpool_cache_evictions_total", layer): 0 for layer in ("memory", "disk")},
        **{(f"embedpool_cache_{layer}_{name}",): 0 for layer in ("memory", "disk") for name in CACHE_SAYS},
    }


@pytest.mark.parametrize("name", ["alerts.yml", "grafana-dashboard.json"])
def test_conf_names_no_metric_that_is_not_there(web: Web, name: str) -> None:
    """Every series of the dashboard and of the alert rules exists, with the labels by which it is chosen."""
    web.embed("a", whatever=1)
    web.metrics.batches_seen({}, 0, 0)
    web.metrics.lines_ran(1, 0)
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(web.get("/metrics").text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    text = (CONF / name).read_text()
    named = re.findall(r"\b(embedpool_\w+)(?:\{(\w+)=)?", text)
    assert len(named) >= 7
    for series, label in named:
        assert series in labels
        assert not label or label in labels[series]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_prometheus_accepts_the_alert_rules() -> None:
    """Its own tool checks them."""
    subprocess.run(["promtool", "check", "rules", str(CONF / "alerts.yml")], check=True, capture_output=True)


def test_workers_share_their_numbers(make_web: MakeWeb) -> None:
    """Where several processes serve, each shows what all of them counted; the gauges of one that is gone go."""
    share()
    try:
        web = make_web(MODEL)
        web.embed("a")
        other = [sys.executable, "-c", OTHER_WORKER.format(name=NAME)]
        pid = int(subprocess.run(other, check=True, capture_output=True, text=True).stdout)
        found = samples(web)
        assert found["embedpool_requests_total", NAME, EMBED] == 1 + 2
        assert found["embedpool_queue_items", NAME] == 5
        assert found["embedpool_worker", str(os.getpid())] == 1
        forget_worker(pid)
        assert samples(web)["embedpool_queue_items", NAME] == 0
        assert samples(web)["embedpool_requests_total", NAME, EMBED] == 1 + 2
    finally:
        unshare()
    assert SHARED_DIR not in os.environ


def test_what_a_killed_server_left_goes_at_the_next_start() -> None:
    """It is memory that nobody else would give back; the folder of a server that lives is left alone."""
    code = f"import os, time; from embedpool.web.metrics import share; share(); print(os.environ['{SHARED_DIR}']); "
    killed = subprocess.run([sys.executable, "-c", code + "os._exit(9)"], capture_output=True, text=True, check=False)
    left = Path(killed.stdout.strip())
    assert left.is_dir()
    waiting = [sys.executable, "-uc", code + "input()"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        kept = Path(living.stdout.readline().strip())
        share()
        try:
            assert not left.exists()
            assert kept.is_dir()
        finally:
            unshare()
            living.communicate("\n")
    share()
    unshare()
    assert not kept.exists()


OTHER_WORKER = """
import os
from embedpool.web.metrics import Metrics
metrics = Metrics()
metrics.refused("{name}", "embed", "overloaded")
metrics.refused("{name}", "embed", "overloaded")
metrics.refused("invented", "embed", "overloaded")
metrics.queue_items.labels("{name}").set(5)
print(os.getpid())
"""


def test_metrics_that_were_renamed_keep_their_older_names_for_a_release(web: Web) -> None:
    """Dashboards of the release before show the same numbers, histograms included."""
    web.embed("a", "b c")
    found = samples(web)
    for name, older in UNTIL_0_2.items():
        shown = {key: value for key, value in found.items() if key[0].startswith(name)}
        assert shown
        for (series, *labels), value in shown.items():
            assert found[(older + series.removeprefix(name), *labels)] == value
