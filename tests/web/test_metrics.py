"""GET /metrics."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.web.conftest import MODEL, NAME, MakeWeb, Web


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
            if family.name != "embedpool_reloads":
                assert "model" in sample.labels
    return found


def test_requests_are_counted(web: Web) -> None:
    """Requests, texts, tokens, truncated texts and errors appear under the model's name, not its alias."""
    web.embed("a b", "c")
    web.embed("a b c d", max_seq_length=4)
    web.embed("a", whatever=1)
    found = samples(web)
    assert found["embedpool_requests_total", NAME] == 3
    assert found["embedpool_texts_total", NAME] == 3
    assert found["embedpool_tokens_total", NAME] == 4 + 3 + 4
    assert found["embedpool_truncated_total", NAME] == 1
    assert found["embedpool_errors_total", "unsupported_option", NAME] == 1
    assert found["embedpool_batches_total", NAME] >= 2
    assert found["embedpool_padded_tokens_total", NAME] >= found["embedpool_batch_tokens_total", NAME] == 11
    assert found["embedpool_compute_seconds_total", NAME] >= 0


def test_state_replicas_queue_and_reloads(make_web: MakeWeb) -> None:
    """The state of each model is 1 for one of the states and 0 for the others; replicas, queues and reloads count."""
    web = make_web(MODEL, "model: off, enabled: false")
    found = samples(web)
    states = {key: value for key, value in found.items() if key[0] == "embedpool_model_state"}
    assert {key[1:] for key, value in states.items() if value == 1} == {(NAME, "ready"), ("off", "disabled")}
    assert {key[2] for key in states} == {"idle", "loading", "ready", "failed", "disabled", "draining"}
    assert found["embedpool_replicas", "idle", NAME] == 1
    assert found["embedpool_queue_texts", NAME] == 0
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
    assert samples(make_web()) == {("embedpool_reloads_total", "ok"): 1}
