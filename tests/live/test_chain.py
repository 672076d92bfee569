"""Three embedpools in a row, over each protocol: a text that the last model cannot bear fails alone, by its place."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.live.conftest import Server, fake

TEMPLATE = {"request": {"model": "{model}", "texts": "{texts}"}, "vectors": "vectors"}
PROTOCOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "embedpool": ("/embed", {}),
    "openai": ("/v1", {}),
    "jina": ("/v1", {}),
    "voyage": ("/v1", {}),
    "tei": ("/tei/{model}", {}),
    "cohere": ("", {}),
    "ollama": ("", {}),
    "template": ("/embed", TEMPLATE),
}
BAD = 41


def hop(protocol: str, to: Server, model: str) -> dict[str, Any]:
    """A model of the protocol's name that is this one of the next server."""
    path, further = PROTOCOLS[protocol]
    url = to.url + path.format(model=model)
    config = {"protocol": protocol, "base_url": url, "remote_model": model, **further}
    return {"model": protocol, "driver": {"type": "http", "config": config}}


@pytest.fixture
def row(make_server: Callable[..., Server]) -> list[Server]:
    """The nearest server first; each but the last reaches the next by every protocol."""
    far, middle, near = (make_server(name) for name in ("far", "middle", "near"))
    far.write_pool(fake("m", fault="raise", fault_text="poison", dim=16))
    far.start()
    far.wait_ready()
    middle.write_pool(*(hop(protocol, far, "m") for protocol in PROTOCOLS))
    middle.start()
    middle.wait_ready()
    near.write_pool(*(hop(protocol, middle, protocol) for protocol in PROTOCOLS))
    near.start()
    near.wait_ready()
    return [near, middle, far]


def test_a_poisoned_text_among_64(row: list[Server]) -> None:
    """Whether one caller sends all of them, or each caller one; few calls find it."""
    near, _, far = row
    for protocol in PROTOCOLS:
        texts = [f"{protocol} text {i}" for i in range(64)]
        expected = far.vectors("m", texts)
        texts[BAD] = f"{protocol} poison of mine"
        rows = far.status("m")["counters"]["rows"]

        whole = near.embed(protocol, texts)
        assert whole.status_code in (500, 502), (protocol, whole.text)
        assert list(whole.json()["error"]["fields"]) == [f"texts[{BAD}]"], (protocol, whole.text)
        assert whole.headers["X-Embedpool-Failed"] == str(BAD)

        partial = near.embed(protocol, texts, on_error="partial").json()
        assert [error["index"] for error in partial["errors"]] == [BAD], protocol
        assert partial["vectors"][BAD] is None
        others = [i for i in range(64) if i != BAD]
        np.testing.assert_allclose([partial["vectors"][i] for i in others], [expected[i] for i in others], atol=1e-5)
        assert far.status("m")["counters"]["rows"] - rows <= 8 * 64, protocol

        def alone(text: str, model: str = protocol) -> Any:
            return near.embed(model, [text])

        with ThreadPoolExecutor(64) as callers:
            answers = list(callers.map(alone, texts))
        assert [i for i, answer in enumerate(answers) if answer.status_code != 200] == [BAD], protocol
        np.testing.assert_allclose(
            [answers[i].json()["vectors"][0] for i in others], [expected[i] for i in others], atol=1e-5
        )
        assert not any("poison" in answers[i].text for i in others)
    for server in row[:2]:
        assert "poison" not in server.log.read_text()
