"""Sparse and multi-vector rows in the hands of users: the client, the command line, and other embedpools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpool import client as client_module
from embedpool import in_process
from embedpool.cli import embed as cli_embed
from embedpool.cli import files as cli_files
from embedpool.cli.common import UsageError
from embedpool.client import Client
from embedpool.config.settings import Paths, Settings
from embedpool.errors import EmbedpoolError
from embedpool.jobs.sources import Row
from embedpool.outputs import SparseRow
from embedpool.pool.pool import Pool
from embedpool.pool.request import Call
from embedpool.pool.settings import PoolSettings
from embedpool.tasks.by_vectors import MaxSim
from embedpool.tasks.embed import EmbedOptions
from embedpool.tasks.hybrid import task_for
from tests.conftest import settle
from tests.drivers.remote import remote_pool
from tests.test_client import Served
from tests.web.conftest import MODEL, Web, serving
from tests.web.test_outputs import COLBERT, SPARSE, THREE, WIDTH

HALF = f"model: half, driver: {{type: fake, config: {{task: hybrid, dim: {WIDTH}, dtype: float16}}}}"
TEXTS = ["one two two", "three", "", "one"]


@pytest.fixture
def web(tmp_path: Path, pool_settings: PoolSettings) -> Iterator[Web]:
    with serving(tmp_path, pool_settings, MODEL, SPARSE, COLBERT, THREE, HALF) as made:
        settle(made.pool)
        yield made


@pytest.fixture
def url(web: Web) -> Iterator[str]:
    served = Served(web.app)
    yield served.url
    served.close()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, timeout_s=20) as made:
        yield made


def plain(row: Any) -> Any:
    """As JSON has it."""
    if isinstance(row, SparseRow):
        return {"indices": row.indices.tolist(), "values": row.values.tolist()}
    return row.tolist()


# --- the client


def test_rows_are_those_of_the_server(client: Client, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they come in several calls, and the space is told."""
    monkeypatch.setattr(client_module, "TEXTS_PER_CALL", 3)
    sparse = client.embed_sparse(TEXTS, model="s")
    assert [plain(row) for row in sparse] == web.embed(*TEXTS, model="s").json["vectors"]
    assert (sparse[0].indices.dtype, sparse[0].values.dtype) == (np.int32, np.float32)
    assert client.space
    vectors = client.embed_multivector(TEXTS, model="colbert", input_type="query")
    wanted = web.embed(*TEXTS, model="colbert", input_type="query").json["vectors"]
    for got, of_server in zip(vectors, wanted, strict=True):
        np.testing.assert_allclose(got, of_server, atol=1e-6)
    both = client.embed_hybrid(TEXTS, model="m3", outputs=["dense", "sparse", "multivector"])
    assert both["dense"].shape == (len(TEXTS), WIDTH)
    assert [plain(row) for row in both["sparse"]] == web.embed(*TEXTS, model="m3", output="sparse").json["vectors"]
    assert [row.shape for row in both["multivector"]] == [(5, WIDTH), (3, WIDTH), (2, WIDTH), (3, WIDTH)]


def test_each_input_for_itself(client: Client, web: Web) -> None:
    """One that is broken has no row, the others have theirs, whatever the output."""
    texts = ["one two", "\ud800", "three"]
    for model, output in (("s", "sparse"), ("colbert", "multivector")):
        each = client.embed_each(texts, model=model, output=output)
        assert set(each.errors) == {1}
        good = web.embed(texts[0], texts[2], model=model).json["vectors"]
        for row, of_server in zip([each.values[0], each.values[2]], good, strict=True):
            if output == "sparse":
                assert plain(row) == of_server
            else:
                np.testing.assert_allclose(row, of_server, atol=1e-6)
    packed = client.embed_each(texts, model="colbert", precision="int8").values
    assert (packed[0].dtype, packed[0].shape) == (np.int8, (4, WIDTH))
    several = client.embed_each(texts, model="m3", output=["dense", "sparse"]).values
    assert set(several[0]) == {"dense", "sparse"}
    assert isinstance(several[2]["sparse"], SparseRow)


@pytest.mark.parametrize("output", [["multivector"], ["dense", "multivector"]])
def test_half_precision_is_read_as_what_it_is(client: Client, output: list[str]) -> None:
    """Be it asked for, or the model's own type."""
    whole = client.embed_each(["one two"], model="m3", output=output).values[0]
    for model, options in (("m3", {"dtype": "float16"}), ("half", {})):
        half = client.embed_each(["one two"], model=model, output=output, **options).values[0]
        for got, wanted in [(half, whole)] if len(output) == 1 else [(half[name], whole[name]) for name in output]:
            assert got.dtype == np.float16
            np.testing.assert_allclose(got, wanted, atol=2e-3)


def test_an_error_is_the_servers(client: Client) -> None:
    """With its code."""
    with pytest.raises(EmbedpoolError, match="it can sparse") as caught:
        client.embed(TEXTS, model="s")  # which gives vectors alone
    assert caught.value.code == "unsupported_task"


# --- the command line


def arguments(**given: Any) -> dict[str, Any]:
    names = ("--in", "--out", "--column", "--query-column", "--id-column", "--output", "--model", "--config")
    return {**dict.fromkeys(names), "MORE": [], "--set": [], "--local": False, "--resume": False, **given}


def test_the_command_prints_a_row_a_line(
    client: Client, web: Web, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """As the server has it in JSON: with --output several, with tokens by name."""
    monkeypatch.setattr(cli_embed, "client_of", lambda settings: client)
    monkeypatch.setattr(cli_embed, "read_settings", lambda given: None)
    for output, options in (("sparse", ["tokens=true"]), ("dense,multivector", [])):
        given = arguments(**{"TEXT": TEXTS[:2], "--model": "m3", "--output": output, "--set": options})
        assert cli_embed.embed(given) == 0
        lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
        answer = web.embed(*TEXTS[:2], model="m3", output=output, **({"tokens": True} if options else {})).json
        rows = answer.get("vectors") or [
            dict(zip(answer["outputs"], row, strict=True)) for row in zip(*answer["outputs"].values(), strict=True)
        ]
        assert lines == rows


def test_pairs_are_scored_in_this_process(
    client: Client, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the vectors of tokens, as a server does it."""
    settings = Settings(paths=Paths(pool_yml=str(web.pool_yml)))
    object.__setattr__(settings, "base_dir", tmp_path)
    rows = [Row(i, i, ("one two", text), 0) for i, text in enumerate(TEXTS[:2])]
    with in_process.computing(settings, "colbert", {}, pairs=True) as compute:
        here = compute(rows).values
    there = client.score(["one two"], TEXTS[:2], model="colbert")
    np.testing.assert_allclose(np.asarray(here).reshape(-1), there, atol=1e-5)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("output", [None, "sparse", "multivector", "dense,sparse"])
def test_files_hold_rows_of_every_kind(
    client: Client, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None, local: bool
) -> None:
    """On a server and in this process, which give the same; without --output what the model is for."""
    model = "s" if output is None else "m3"
    settings = Settings(paths=Paths(pool_yml=str(web.pool_yml)))
    object.__setattr__(settings, "base_dir", tmp_path)
    monkeypatch.setattr(cli_files, "client_of", lambda settings: client.again())
    monkeypatch.setattr(cli_files, "read_settings", lambda given: settings)
    (tmp_path / "in.txt").write_text("\n".join(TEXTS[:2]) + "\n")
    given = {"--in": [str(tmp_path / "in.txt")], "--model": model, "--output": output, "--local": local}
    out = tmp_path / "out.jsonl"
    assert cli_files.from_files(arguments(**given, **{"--out": str(out)}), pairs=False, choose=lambda _: model) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    options = {} if output is None else {"output": output.split(",")}
    answer = web.embed(*TEXTS[:2], model=model, **options).json
    if output == "dense,sparse":
        assert [line["outputs"]["sparse"] for line in lines] == answer["outputs"]["sparse"]
    elif output == "multivector":
        for line, row in zip(lines, answer["vectors"], strict=True):
            np.testing.assert_allclose(line["vector"], row, atol=1e-6)
    else:
        assert [line["vector"] for line in lines] == answer["vectors"]


def test_a_matrix_holds_no_sparse_rows(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what does."""
    monkeypatch.setattr(cli_files, "client_of", lambda settings: client.again())
    monkeypatch.setattr(cli_files, "read_settings", lambda given: None)
    (tmp_path / "in.txt").write_text("one\n")
    given = {"--in": [str(tmp_path / "in.txt")], "--out": str(tmp_path / "out.npy"), "--model": "s"}
    with pytest.raises(EmbedpoolError, match="jsonl or parquet") as caught:
        cli_files.from_files(arguments(**given, **{"--output": "sparse"}), pairs=False, choose=lambda _: "s")
    assert not isinstance(caught.value, UsageError)


# --- behind another name

REMOTES = {
    "embedpool, sparse": {"path": "/embed", "remote_model": "s", "task": "sparse"},
    "tei, sparse": {"path": "/tei/s", "protocol": "tei", "task": "sparse"},
    "embedpool, multivector": {"path": "/embed", "remote_model": "colbert", "task": "multivector"},
    "embedpool, multivector in half precision": {"path": "/embed", "remote_model": "half", "task": "multivector"},
    "tei, multivector": {"path": "/tei/colbert", "protocol": "tei", "task": "multivector"},
    "jina, multivector": {"path": "/v1", "protocol": "jina", "remote_model": "colbert", "task": "multivector"},
}


@pytest.mark.parametrize("name", REMOTES)
def test_a_remote_service_gives_them(name: str, url: str, web: Web, pool_settings: PoolSettings) -> None:
    """In its own words; their numbers are those of the service, and so are scores of pairs."""
    config = dict(REMOTES[name])
    output = config["task"]
    model = "s" if output == "sparse" else "m3" if config.get("remote_model") == "half" else "colbert"
    with remote_pool(pool_settings, url + config.pop("path"), **config) as pool:
        assert pool.models[0].kinds == [output]

        def ask(of: Pool, at: str, **options: Any) -> Any:
            task = task_for([output], TEXTS, EmbedOptions(**options))
            return of.submit(at, task, Call(of.clock(), 20))

        here, there = ask(pool, "m").rows, ask(web.pool, model).rows
        assert here.arrays().keys() == there.arrays().keys()
        for part, array in there.arrays().items():
            np.testing.assert_allclose(here.arrays()[part], array, atol=1e-6)
        if output == "sparse":
            assert len(ask(pool, "m", top_k=1).rows.values) == 3
        elif "tei" not in name:
            pairs = [("one two", text) for text in TEXTS]
            scores = [
                of.submit(at, MaxSim(pairs), Call(of.clock(), 20)).vectors
                for of, at in ((pool, "m"), (web.pool, model))
            ]
            np.testing.assert_allclose(*scores, atol=1e-5)
