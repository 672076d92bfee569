"""Sparse and multi-vector models of the zoo give their library's rows, and dense ones late chunks, on each runtime."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpool.errors import InvalidRequest, UnsupportedOption, UnsupportedTask
from embedpool.pool.pool import Pool
from embedpool.pool.request import Call, Result
from embedpool.tasks.by_vectors import MaxSim
from embedpool.tasks.embed import EmbedOptions
from embedpool.tasks.hybrid import task_for
from embedpool.tasks.late_chunking import Chunking, LateChunking, Tokens
from embedpool.tasks.rows import Rows
from embedpool.tasks.score import ScoreOptions
from embedpool.tasks.task import Task
from tests.drivers.conftest import serving
from tests.drivers.test_zoo import TEXTS
from tests.zoo import ZOO, Animal

OTHERS = [name for name, animal in ZOO.items() if animal.kind in ("sparse", "multivector")]
RUNTIMES = ("torch", "openvino")
LONG = "pool embed server model token vector short long texts programs: " * 60
WAYS = ("encode", "encode_query", "encode_document")
IN_A_PROCESS = ("splade", "sparse, queries cost nothing", "colbert", "bge-m3")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def loaded(animal: Animal, made: Callable[[str], Path]) -> Any:
    """In its own library, where that has such models."""
    import sentence_transformers

    name = {"sparse": "SparseEncoder", "multivector": "MultiVectorEncoder"}.get(animal.kind, "SentenceTransformer")
    if not hasattr(sentence_transformers, name):
        pytest.skip(f"this sentence-transformers has no {name}")
    kind = getattr(sentence_transformers, name)
    return kind(str(made(animal.name)), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"})


@pytest.fixture(scope="session")
def library(made: Callable[[str], Path]) -> Callable[[str], Any]:
    return functools.cache(lambda name: loaded(ZOO[name], made))


class Served:
    """A model in a pool, beside its library."""

    def __init__(self, name: str, runtime: str, pool: Pool, model: Any) -> None:
        self.animal = ZOO[name]
        self.runtime = runtime
        self.pool = pool
        self.model = model

    def run(self, task: Task) -> Result:
        return self.pool.submit("m", task, Call(self.pool.clock(), 60))

    def ask(self, texts: Sequence[str], *outputs: str, **options: Any) -> Result:
        return self.run(task_for(outputs or (self.animal.kind,), texts, EmbedOptions(**options)))

    def expected(self, texts: Sequence[str], way: str = "encode", **options: Any) -> list[Any]:
        """A row for each text: dense and as wide as the vocabulary, or its vectors."""
        encode = getattr(self.model, way)
        if self.animal.kind == "sparse":
            options["convert_to_sparse_tensor"] = False
        return [np.asarray(row) for row in encode(list(texts), show_progress_bar=False, **options)]


@pytest.fixture(scope="module", params=[(name, runtime) for name in OTHERS for runtime in RUNTIMES], ids="-".join)
def served(
    request: pytest.FixtureRequest, made: Callable[[str], Path], library: Callable[[str], Any], cache: Path
) -> Iterator[Served]:
    name, runtime = request.param
    yield from serving_as(name, runtime, made, library, cache)


def serving_as(
    name: str, runtime: str, made: Callable[[str], Path], library: Callable[[str], Any], cache: Path
) -> Iterator[Served]:
    if runtime == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    model = library(name)
    backend = "auto" if ZOO[name].by_encode and runtime == "openvino" else runtime
    with serving(ZOO[name], made(name), cache, backend=backend) as pool:
        assert pool.models[0].state == "ready", pool.models[0].replicas.trouble
        yield Served(name, runtime, pool, model)


def rows_of(rows: Rows) -> list[Any]:
    """The vectors of each ragged row, or the indices and values of each sparse one."""
    assert rows.splits is not None
    spans = [slice(a, b) for a, b in zip(rows.splits[:-1], rows.splits[1:], strict=True)]
    if rows.indices is None:
        return [rows.values[span] for span in spans]
    return [(rows.indices[span], rows.values[span]) for span in spans]


def require_the_same(rows: Rows, expected: Sequence[Any]) -> None:
    """To the last digits but one: the same tokens, each with the same value, or the same vectors in the same order."""
    assert len(rows) == len(expected)
    for got, wanted in zip(rows_of(rows), expected, strict=True):
        if rows.indices is None:
            assert got.shape == wanted.shape
            np.testing.assert_allclose(got, wanted, atol=1e-5)
            continue
        indices, values = got
        assert indices.tolist() == np.flatnonzero(wanted).tolist()
        np.testing.assert_allclose(values, wanted[indices], atol=1e-5, rtol=1e-5)


def word_for(way: str) -> dict[str, Any]:
    """`encode` alone says nothing of what texts are for; a multi-vector model is served as if they were documents."""
    return {"encode": {}, "encode_query": {"input_type": "query"}, "encode_document": {"input_type": "document"}}[way]


def test_it_runs_where_it_should(served: Served) -> None:
    """On the runtime that was asked for, by token ids; else /status says why not."""
    shown = served.pool.models[0].snapshot()["runs_on"]
    assert shown["kind"] == served.animal.kind
    if served.animal.static:
        assert shown["backend"] == "numpy"
    elif served.runtime == "openvino" and served.animal.by_encode:
        assert (shown["backend"], shown["why"][:9]) == ("torch", "openvino:")
    else:
        assert shown["backend"] == served.runtime
    assert ("by_encode" in shown) is served.animal.by_encode, shown


@pytest.mark.parametrize("way", WAYS)
def test_texts_alone_together_and_too_long(served: Served, way: str) -> None:
    """A text's row is the library's, alone, in a mixed batch, and cut where the model cuts, whatever it is for."""
    for texts in (TEXTS[:1], [*TEXTS, LONG, ""], [LONG] * 3):
        library_way = "encode_document" if served.animal.kind == "multivector" and way == "encode" else way
        require_the_same(served.ask(texts, **word_for(way)).rows, served.expected(texts, library_way))


def test_a_prompt_of_a_request(served: Served) -> None:
    """In the place of the model's own."""
    if served.animal.static or "pylate" in served.animal.name or "stanford" in served.animal.name:
        return
    for way in WAYS[1:]:
        got = served.ask(TEXTS, prompt="pool: ", **word_for(way)).rows
        require_the_same(got, served.expected(TEXTS, way, prompt="pool: "))


def test_the_largest_values(served: Served) -> None:
    """`top_k` keeps as many as `max_active_dims` does."""
    if served.animal.kind != "sparse":
        return
    for count in (1, 5):
        rows = rows_of(served.ask(TEXTS, top_k=count).rows)
        for (indices, values), wanted in zip(rows, served.expected(TEXTS, max_active_dims=count), strict=True):
            assert len(indices) == np.count_nonzero(wanted)
            np.testing.assert_allclose(np.sort(values), np.sort(wanted[wanted != 0]), atol=1e-5)


def test_fewer_dimensions_of_each_vector(served: Served) -> None:
    """They are cut, and have length 1 again."""
    if served.animal.kind != "multivector":
        return
    whole, few = served.ask(TEXTS).rows, served.ask(TEXTS, dimensions=8).rows
    assert few.splits is not None
    assert whole.splits is not None
    assert few.splits.tolist() == whole.splits.tolist()
    cut = whole.values[:, :8]
    np.testing.assert_allclose(few.values, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-5)


def test_scores_are_those_of_the_library(served: Served) -> None:
    """Of one query with many documents, one of which has nothing that counts."""
    if served.animal.kind != "multivector":
        return
    query, documents = "what is the capital of France?", [*TEXTS, LONG]
    pairs = [(query, document) for document in documents]
    got = served.run(MaxSim(pairs, ScoreOptions())).vectors
    of_query, of_documents = served.model.encode_query([query]), served.model.encode_document(documents)
    wanted = served.model.similarity(of_query, of_documents)[0].numpy()
    np.testing.assert_allclose(got[:, 0], wanted, atol=1e-4)
    with pytest.raises(UnsupportedOption, match="long_documents"):
        served.run(MaxSim(pairs, ScoreOptions(long_documents="chunk")))


def test_what_it_cannot_do(served: Served) -> None:
    """No output is taken for another, nor fewer values for more."""
    if served.animal.name == "csr":
        with pytest.raises(InvalidRequest, match="top_k: must be at most"):
            served.ask(TEXTS, top_k=1000)
    other = {"sparse": "multivector", "multivector": "sparse"}[served.animal.kind]
    for output in ("dense", other):
        with pytest.raises(UnsupportedTask):
            served.ask(TEXTS, output)
    odd = {"sparse": {"normalize": True}, "multivector": {"top_k": 3}}[served.animal.kind]
    with pytest.raises(UnsupportedOption):
        served.ask(TEXTS, **odd)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("shared", ["all", "the first"])
def test_routes_that_share_modules(shared: str, runtime: str, cache: Path, tmp_path: Path) -> None:
    """On torch the library runs them, for it needs the layer that embedpool would take off; the rows are the same."""
    from sentence_transformers.sentence_transformer.modules import Router
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    from tests.zoo import masked_lm, sparse

    if runtime == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    folder = tmp_path / "shared"
    steps = [masked_lm(folder), SpladePooling()]
    others = steps if shared == "all" else [steps[0], SpladePooling("sum")]
    sparse(folder, Router.for_query_document(query_modules=steps, document_modules=others))
    animal = Animal("shared", sparse, kind="sparse")
    with serving(animal, folder, cache, backend=runtime) as pool:
        served = Served("splade", runtime, pool, loaded(animal, lambda name: folder))
        for way in WAYS[1:]:
            require_the_same(served.ask(TEXTS, **word_for(way)).rows, served.expected(TEXTS, way))


@pytest.mark.parametrize("name", ["splade", "csr", "sparse, queries cost nothing"])
def test_in_bfloat16_it_is_close(
    name: str, made: Callable[[str], Path], library: Callable[[str], Any], cache: Path
) -> None:
    """What the library gives is asked for in that type, too. Of an auto-encoder other values may be the largest."""
    most = 0.5 if name == "csr" else 0.1
    with serving(ZOO[name], made(name), cache, backend="torch", compute_dtype="bfloat16") as pool:
        assert pool.models[0].state == "ready", pool.models[0].replicas.trouble
        served = Served(name, "torch", pool, library(name))
        for (indices, values), wanted in zip(rows_of(served.ask(TEXTS).rows), served.expected(TEXTS), strict=True):
            got = np.zeros_like(wanted)
            got[indices] = values
            assert np.linalg.norm(got - wanted) <= most * np.linalg.norm(wanted) + 1e-3


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_pylates_first_folders_name_no_type(
    runtime: str, made: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    """They are told by their prefixes, as the library tells them."""
    name = "colbert of pylate"
    folder = tmp_path / "early"

    def make(name: str) -> Path:
        config_file = shutil.copytree(made(name), folder) / "config_sentence_transformers.json"
        config = json.loads(config_file.read_text())
        del config["model_type"]
        config_file.write_text(json.dumps(config))
        return folder

    model = loaded(ZOO[name], make)
    with serving(ZOO[name], folder, cache, backend=runtime) as pool:
        served = Served(name, runtime, pool, model)
        for way in WAYS[1:]:
            require_the_same(served.ask(TEXTS, **word_for(way)).rows, served.expected(TEXTS, way))


# --- several outputs of one pass


@pytest.fixture(scope="module", params=RUNTIMES)
def three(
    request: pytest.FixtureRequest, made: Callable[[str], Path], library: Callable[[str], Any], cache: Path
) -> Iterator[Served]:
    yield from serving_as("bge-m3", request.param, made, library, cache)


def of_flag_embedding(model: Any, folder: Path, texts: Sequence[str]) -> tuple[list[Any], list[Any], list[Any]]:
    """Dense, sparse (token → weight) and multi-vector rows as FlagEmbedding's BGE-M3 makes them, on torch."""
    import torch
    from safetensors.torch import load_file

    tokenizer, inner = model[0].tokenizer, model[0].model
    sparse, colbert = (load_file(folder / f"{name}_linear.safetensors") for name in ("sparse", "colbert"))
    unused = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    given = tokenizer(list(texts), padding=True, truncation=True, max_length=512, return_tensors="pt")
    found: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    with torch.inference_mode():
        hidden = inner(input_ids=given["input_ids"], attention_mask=given["attention_mask"])[0]
        dense = torch.nn.functional.normalize(hidden[:, 0], dim=-1)
        weights = torch.relu(torch.nn.functional.linear(hidden, sparse["weight"], sparse["bias"]))[..., 0]
        vectors = torch.nn.functional.linear(hidden[:, 1:], colbert["weight"], colbert["bias"])
        vectors = torch.nn.functional.normalize(vectors * given["attention_mask"][:, 1:, None], dim=-1)
    for i, ids in enumerate(given["input_ids"].tolist()):
        of_text: dict[int, float] = {}
        count = int(given["attention_mask"][i].sum())
        for token, weight in zip(ids[:count], weights[i].tolist()[:count], strict=True):
            if token not in unused and weight > 0:
                of_text[token] = max(of_text.get(token, 0.0), weight)
        found[0].append(dense[i].numpy())
        found[1].append(of_text)
        found[2].append(vectors[i, : count - 1].numpy())
    return found


def test_one_pass_gives_dense_sparse_and_multivector(three: Served, made: Callable[[str], Path]) -> None:
    """Together and each alone they are those of the model's own library."""
    texts = [*TEXTS, LONG]
    dense, sparse, vectors = of_flag_embedding(three.model, made("bge-m3"), texts)
    together = three.ask(texts, "dense", "sparse", "multivector").rows.also
    assert set(together) == {"embed", "sparse", "multivector"}
    alone = {"embed": "dense", "sparse": "sparse", "multivector": "multivector"}
    for rows in (together, {task: three.ask(texts, output).rows for task, output in alone.items()}):
        np.testing.assert_allclose(rows["embed"].values, np.stack(dense), atol=1e-5)
        require_the_same(rows["multivector"], vectors)
        for (indices, values), wanted in zip(rows_of(rows["sparse"]), sparse, strict=True):
            assert indices.tolist() == sorted(wanted)
            np.testing.assert_allclose(values, [wanted[i] for i in sorted(wanted)], atol=1e-5)
    np.testing.assert_allclose(three.model.encode(texts), np.stack(dense), atol=1e-5)


def test_several_outputs_are_one_batch(three: Served) -> None:
    """A text is run once, whatever is asked of it at once; options count for the output that they are for."""
    before = three.pool.models[0].snapshot()["counters"]["rows"]
    rows = three.ask(TEXTS, "dense", "sparse", top_k=2, dimensions=8).rows.also
    assert three.pool.models[0].snapshot()["counters"]["rows"] == before + len(TEXTS)
    assert rows["embed"].values.shape == (len(TEXTS), 8)
    assert all(len(indices) <= 2 for indices, _ in rows_of(rows["sparse"]))


def test_its_scores_are_means(three: Served, made: Callable[[str], Path]) -> None:
    """As its library scores by the vectors of tokens."""
    _, _, vectors = of_flag_embedding(three.model, made("bge-m3"), TEXTS[:4])
    got = three.run(MaxSim([(TEXTS[0], text) for text in TEXTS[:4]])).vectors[:, 0]
    wanted = [(vectors[0] @ document.T).max(axis=1).sum() / len(vectors[0]) for document in vectors]
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_a_process_of_its_own_gives_the_same(
    name: str, made: Callable[[str], Path], library: Callable[[str], Any], cache: Path
) -> None:
    """Rows of every kind, and several of them, come through a child's shared memory as they are."""
    library(name)
    outputs = ("dense", "sparse", "multivector") if ZOO[name].outputs else (ZOO[name].kind,)
    found = []
    for place in ("thread", "process"):
        with serving(ZOO[name], made(name), cache, backend="torch", place=place) as pool:
            served = Served(name, "torch", pool, None)
            found.append(served.ask([*TEXTS, LONG], *outputs, input_type="document").rows.arrays())
    here, there = found
    assert here.keys() == there.keys()
    for array_name, array in here.items():
        np.testing.assert_allclose(array, there[array_name], atol=1e-5, rtol=1e-4)


# --- the vectors of tokens, and late chunks

PARTS = (
    [
        "Berlin is the capital of Germany.",
        "Its more than 3 million people",
        "make it the largest city  ",
        " of the EU.",
    ],
    ["日本語の文章を", "埋め込む。", "机器学习模型", "한국어 문장"],
    ["Привет, мир!", "مرحبا بالعالم", "naïve café — “quoted”"],
    ["👩‍👩‍👧‍👦 🏳️‍🌈", "🙂 Straße", "a" * 90, "\tline\nbreak "],
)
MEANS = ("bert, prompts", "roberta", "xlm-roberta", "modernbert", "gpt2, no special tokens", "bert, short limit")


@pytest.fixture(scope="module", params=[(name, runtime) for name in MEANS for runtime in RUNTIMES], ids="-".join)
def means(
    request: pytest.FixtureRequest, made: Callable[[str], Path], library: Callable[[str], Any], cache: Path
) -> Iterator[Served]:
    yield from serving_as(*request.param, made, library, cache)


def vectors_of_tokens(model: Any, text: str) -> tuple[Any, list[int]]:
    """What the library has before it pools, of a text that it reads as a whole, and where each token starts."""
    first = model[0]
    given = first.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=False)
    model.max_seq_length, before = 512, model.max_seq_length
    vectors = model.encode(text, output_value="token_embeddings", prompt="").numpy()
    model.max_seq_length = before
    starts = [
        -1 if special else start + len(text[start:stop]) - len(text[start:stop].lstrip() or text[start:stop])
        for (start, stop), special in zip(given["offset_mapping"], given["special_tokens_mask"], strict=True)
    ]
    return vectors, starts


def test_chunks_are_means_of_the_tokens_that_start_in_them(means: Served) -> None:
    """In every script; special tokens and the prompt belong to none."""
    if means.animal.name == "bert, short limit":
        return
    prompt = "query: " if means.animal.name == "bert, prompts" else ""
    for chunks in PARTS:
        got = means.run(LateChunking([chunks], EmbedOptions(normalize=False, prompt=prompt, max_seq_length=400)))
        assert got.vectors.shape == (len(chunks), 32)
        text, begins = prompt, []
        for chunk in chunks:
            if begins and not text[-1].isspace() and not chunk[0].isspace():
                text += " "
            begins.append(len(text))
            text += chunk
        vectors, starts = vectors_of_tokens(means.model, text)
        for chunk, (begin, end) in enumerate(zip(begins, [*begins[1:], len(text)], strict=True)):
            own = [i for i, start in enumerate(starts) if begin <= start < end]
            np.testing.assert_allclose(got.vectors[chunk], vectors[own].mean(axis=0), atol=1e-5)


def test_a_document_longer_than_the_context_goes_through_it_in_windows(means: Served) -> None:
    """A token's vector is that of the window in whose middle it is; each window is one that the library would read."""
    if means.animal.name != "bert, short limit":  # 8 tokens, two of them special
        return
    words = "pool embed server model token vector short long texts programs query document"
    chunks = [words, words, "fox"]
    got = means.run(LateChunking([chunks], EmbedOptions(normalize=False)))
    tokenizer = means.model[0].tokenizer
    ids = tokenizer(" ".join(chunks), add_special_tokens=False)["input_ids"]
    room, step = 6, 5
    begins = [min(step * i, len(ids) - room) for i in range(-(-(len(ids) - 1) // step))]
    vectors = np.zeros((len(ids), 32), np.float32)
    nearest = np.full(len(ids), -1)
    for begin in begins:
        text = tokenizer.decode(ids[begin : begin + room])
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[begin : begin + room]
        found = means.model.encode(text, output_value="token_embeddings", prompt="").numpy()[1:-1]
        for i, vector in enumerate(found):
            from_edge = min(i if begin else room, room - 1 - i if begin + room < len(ids) else room)
            if from_edge > nearest[begin + i] or (from_edge == nearest[begin + i] and begin):
                nearest[begin + i], vectors[begin + i] = from_edge, vector
    counts = [len(tokenizer(chunk, add_special_tokens=False)["input_ids"]) for chunk in chunks]
    at = 0
    for chunk, count in enumerate(counts):
        np.testing.assert_allclose(got.vectors[chunk], vectors[at : at + count].mean(axis=0), atol=1e-5)
        at += count


def test_a_chunk_alone_is_the_text_without_its_special_tokens(means: Served) -> None:
    """And documents do not know of each other."""
    unit = EmbedOptions(normalize=True)
    alone = [means.run(LateChunking([chunks], unit)).vectors for chunks in PARTS[:2]]
    together = means.run(LateChunking(PARTS[:2], unit)).vectors
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["router", "without the prompt, mean"])
def test_chunks_take_the_route_and_the_prompt_of_their_texts(
    name: str, made: Callable[[str], Path], cache: Path
) -> None:
    """As whole texts do; the prompt belongs to no chunk."""
    with serving(ZOO[name], made(name), cache, backend="torch") as pool:
        served = Served(name, "torch", pool, None)
        for word in ("query", "document"):
            options = EmbedOptions(input_type=word)
            (tokens,) = rows_of(served.run(Tokens(["pool embed server"], options)).rows)
            (bare,) = rows_of(served.run(Tokens(["pool embed server"], EmbedOptions(prompt="", input_type=word))).rows)
            late = served.run(LateChunking([["pool embed server"]], dataclasses.replace(options, normalize=False)))
            own = len(bare) - 2
            np.testing.assert_allclose(late.vectors[0], tokens[-1 - own : -1].mean(axis=0), atol=1e-5)


def test_a_document_may_be_split_by_the_server(means: Served) -> None:
    """Into so many tokens each, of which the last of one are the first of the next; their texts are told."""
    task = LateChunking([["pool embed server model token vector short long"]], chunking=Chunking(3, 1))
    found = means.run(task).vectors
    (plan,) = task.plans
    assert len(found) == len(plan.texts)
    assert plan.chunks[0] == (0, 3)
    assert [start for start, _ in plan.chunks] == list(range(0, 2 * len(plan.chunks), 2))
    assert "pool embed server".startswith(plan.texts[0].strip())


def test_all_tokens_have_vectors(means: Served) -> None:
    """Special ones too: what the library has before it pools, for texts in one batch."""
    texts = list(TEXTS[:4])
    rows = rows_of(means.run(Tokens(texts, EmbedOptions(prompt=""))).rows)
    for text, got in zip(texts, rows, strict=True):
        wanted = means.model.encode(text, output_value="token_embeddings", prompt="").numpy()
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("plain causal lm", "the last token's vector"), ("bert, cls", "pools by cls"), ("bert, dense", "by Dense"),
        ("static", "no vectors of tokens"),
    ],
)  # fmt: skip
def test_models_that_do_not_take_the_mean_refuse_late_chunks(
    name: str, why: str, made: Callable[[str], Path], cache: Path
) -> None:
    """With the reason."""
    with serving(ZOO[name], made(name), cache, backend="auto" if ZOO[name].static else "torch") as pool:
        with pytest.raises(UnsupportedOption, match=why):
            Served(name, "torch", pool, None).run(LateChunking([["a", "b"]]))
