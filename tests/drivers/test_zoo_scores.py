"""Every model of the zoo that scores gives its own library's numbers, on each runtime, down the road of a request."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedpool.errors import TextTooLong, UnsupportedOption, UnsupportedTask
from embedpool.pool.pool import Pool
from embedpool.pool.request import Call, Result
from embedpool.tasks.embed import Embed
from embedpool.tasks.score import SCORES, ScoreOptions
from tests.drivers.conftest import serving
from tests.zoo import ZOO, Animal

SCORING = [name for name, animal in ZOO.items() if animal.kind in ("rerank", "classify")]
RUNTIMES = ("torch", "openvino")
QUERY = "what is the capital of France?"
DOCUMENTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Fox",
    "",
    "What is the CAPITAL of France? Le vif renard brun saute par-dessus le chien paresseux, 3 fois.",
    "[CLS] pool </s> and [SEP] are special; ﬁne café — “quoted” 日本語 🙂",
    " begins and ends with blanks \n",
    "pool embed server model token vector short long texts programs " * 3,
)
LONG = "pool embed server model token vector short long texts programs: " * 60
ROUNDING = 2e-5  # of logits near zero, in float32
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # older transformers use it


class Served:
    """A model in a pool, beside its library."""

    def __init__(self, animal: Animal, folder: Path, pool: Pool) -> None:
        from sentence_transformers import CrossEncoder

        self.animal = animal
        self.pool = pool
        self.model = CrossEncoder(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"})

    def ask(self, parts: Sequence[tuple[str, ...]], **options: Any) -> Result:
        task = SCORES[self.animal.kind](parts, ScoreOptions(**options))
        return self.pool.submit("m", task, Call(self.pool.clock(), 60))

    def logits(self, pairs: Sequence[tuple[str, ...]], **options: Any) -> np.ndarray:
        import torch

        found = self.model.predict([list(pair) for pair in pairs], activation_fn=torch.nn.Identity(), **options)
        return np.asarray(found).reshape(len(pairs), -1)

    def require(self, parts: Sequence[tuple[str, ...]], expected: np.ndarray, **options: Any) -> None:
        """These are the logits of the parts, and the scores are made of them once, as torch does it."""
        import torch

        rows = self.ask(parts, **options).vectors
        labels = rows.shape[1] // 2
        np.testing.assert_allclose(rows[:, labels:], expected, rtol=1e-4, atol=ROUNDING)
        activation = {"sigmoid": torch.nn.Sigmoid(), "softmax": torch.nn.Softmax(dim=-1)}
        scores = activation[self.pool.models[0].tokenizer().activation](torch.tensor(expected))
        np.testing.assert_allclose(rows[:, :labels], scores, atol=1e-5)

    def logits_of_ids(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Those of a language model, which the library does not cut."""
        import torch

        first, last = self.model[0], self.model[-1]
        with torch.inference_mode():
            found = [first.model(input_ids=torch.tensor([list(ids)])).logits[:, -1:] for ids in rows]
            return np.array([last({last.module_input_name: one})["scores"].numpy()[0] for one in found])


@pytest.fixture(scope="module", params=[(n, r) for n in SCORING for r in RUNTIMES], ids=lambda p: f"{p[0]}-{p[1]}")
def served(request: pytest.FixtureRequest, made: Callable[[str], Path], cache: Path) -> Iterator[Served]:
    name, runtime = request.param
    if runtime == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    with serving(ZOO[name], made(name), cache, backend=runtime) as pool:
        assert pool.models[0].state == "ready", pool.models[0].replicas.trouble
        assert "by_encode" not in pool.models[0].snapshot()["runs_on"]
        yield Served(ZOO[name], made(name), pool)


def pairs_of(*documents: str, query: str = QUERY) -> list[tuple[str, str]]:
    return [(query, document) for document in documents]


def test_pairs_alone_and_together(served: Served) -> None:
    """A pair has predict's logit alone, in a mixed batch, and whichever side is empty; its score is of one sigmoid, or
    of one softmax."""
    for pairs in (pairs_of(DOCUMENTS[0]), pairs_of(*DOCUMENTS), pairs_of(*DOCUMENTS, query="")):
        served.require(pairs, served.logits(pairs, prompt=""), instruction="")
    assert served.ask(pairs_of(*DOCUMENTS)).model == "m"
    assert served.pool.models[0].kinds == [served.animal.kind]


def test_pairs_of_many_callers_share_batches(served: Served) -> None:
    """Sixteen callers at once, each with its own query, get their own scores."""
    queries = [f"{QUERY} {i}" * (1 + i % 3) for i in range(16)]
    with ThreadPoolExecutor(16) as threads:
        asked = [pairs_of(*DOCUMENTS, LONG, query=query) for query in queries]
        expected = [served.logits(pairs, prompt="") for pairs in asked]
        list(threads.map(lambda both: served.require(*both, instruction=""), zip(asked, expected, strict=True)))


def test_a_long_document_is_cut(served: Served) -> None:
    """As the library cuts it, since the query is the shorter part; which ones is told."""
    pairs = pairs_of(*DOCUMENTS, LONG)
    result = served.ask(pairs, instruction="")
    assert len(DOCUMENTS) in result.truncated
    served.require(pairs, served.logits(pairs, prompt=""), instruction="")
    with pytest.raises(TextTooLong, match=rf"documents\[{len(DOCUMENTS)}\] has \d+ tokens"):
        served.ask(pairs_of(*DOCUMENTS[:3], *DOCUMENTS[3:], LONG), truncate="error", instruction="")


def test_the_document_is_cut_and_the_query_stays(served: Served) -> None:
    """On either side, and to fewer tokens than the model's own; `max_tokens_per_doc` counts the document's alone."""
    tokenizer = served.pool.models[0].tokenizer()
    (whole,) = tokenizer.whole([(QUERY, LONG)])
    query, document = whole.ids[whole.first], whole.ids[whole.last]
    alone = tokenizer.bare([LONG])[0]
    assert served.model.tokenizer.decode(document).split() == served.model.tokenizer.decode(alone).split()
    head, middle = whole.ids[: whole.first.start], whole.ids[whole.first.stop : whole.last.start]
    tail = whole.ids[whole.last.stop :]
    limit = 2 * len(query) + 24  # else the query would take more than half
    room = limit - len(query) - len(head) - len(middle) - len(tail)
    kept = {"right": document[:room], "left": document[-room:]}
    for side, part in kept.items():
        (item,) = _items(served, pairs_of(LONG), max_seq_length=limit, truncate=side)
        assert list(item.ids) == [*head, *query, *middle, *part, *tail]
    (item,) = _items(served, pairs_of(LONG), max_tokens_per_doc=5)
    assert list(item.ids) == [*head, *query, *middle, *document[:5], *tail]
    (item,) = _items(served, pairs_of(LONG, query=LONG), max_seq_length=limit)
    room = limit - len(head) - len(middle) - len(tail)
    (other,) = tokenizer.whole([(LONG, LONG)])
    first, last = other.ids[other.first], other.ids[other.last]
    assert list(item.ids) == [*head, *first[: room // 2], *middle, *last[: room - room // 2], *tail]
    if served.animal.causal:
        rows = [[*head, *query, *middle, *part, *tail] for part in kept.values()]
        for side, row in zip(kept, served.logits_of_ids(rows), strict=True):
            served.require(pairs_of(LONG), row[None], max_seq_length=limit, truncate=side, instruction="")


def _items(served: Served, pairs: Sequence[tuple[str, ...]], **options: Any) -> Any:
    (model,) = served.pool.models
    task = SCORES[served.animal.kind](pairs, ScoreOptions(**{"instruction": "", **options}))
    return task.measure(model.spec.driver.config, model.tokenizer()).items


def test_the_best_part_of_a_long_document(served: Served) -> None:
    """`long_documents: chunk` gives the greatest logit of all parts; with several labels none is the best."""
    (model,) = served.pool.models
    pairs = pairs_of(LONG, DOCUMENTS[0])
    if served.animal.kind == "classify":
        with pytest.raises(UnsupportedOption, match="no part of a text has all labels"):
            served.ask(pairs, long_documents="chunk")
        return
    result = served.ask(pairs, long_documents="chunk", instruction="")
    items = _items(served, pairs, long_documents="chunk")
    assert sum(item.index == 0 for item in items) > 1
    labels = result.vectors.shape[1] // 2
    assert result.truncated == []
    assert result.tokens == sum(len(item.ids) for item in items)
    if served.animal.causal:
        best = served.logits_of_ids([item.ids for item in items if item.index == 0]).max()
        np.testing.assert_allclose(result.vectors[0, labels:], best, rtol=1e-4, atol=ROUNDING)
    elif not any(word in served.animal.name for word in ("roberta", "deberta")):  # whose ids come back from texts
        parts = [served.model.tokenizer.decode(item.ids[item.second : -1]) for item in items if item.index == 0]
        best = served.logits(pairs_of(*parts), prompt="").max()
        np.testing.assert_allclose(result.vectors[0, labels:], best, rtol=1e-3, atol=1e-3)
    assert model.kinds == [served.animal.kind]


def test_an_instruction_and_the_default_prompt(served: Served) -> None:
    """Go before the query, as predict puts them."""
    pairs = pairs_of(*DOCUMENTS[:3])
    served.require(pairs, served.logits(pairs, prompt="find: "), instruction="find: ")
    served.require(pairs, served.logits(pairs))


def test_a_classifier_takes_texts(served: Served) -> None:
    """Alone, as transformers' own model reads them; its labels stand in their order."""
    import torch

    if served.animal.causal:
        return

    tokenizer, model = served.model.tokenizer, served.model.model
    with torch.inference_mode():
        given = tokenizer(list(DOCUMENTS), padding=True, truncation=True, return_tensors="pt")
        expected = model(**given).logits.numpy()
    served.require([(text,) for text in DOCUMENTS], expected, instruction="")
    labels = list(served.pool.models[0].tokenizer().labels)
    assert labels == (["LABEL_0"] if served.animal.kind == "rerank" else [f"kind {i}" for i in range(3)])


def test_what_it_cannot_do_is_told(served: Served) -> None:
    """With what it can."""
    with pytest.raises(UnsupportedTask, match=f"cannot embed; it can {served.animal.kind}; no registered model can"):
        served.pool.submit("m", Embed(["a"]), Call(served.pool.clock(), 60))


@pytest.mark.parametrize("name", SCORING)
def test_a_process_of_its_own_gives_the_same(
    name: str, made: Callable[[str], Path], cache: Path, pytestconfig: pytest.Config
) -> None:
    """`place: process` changes no number; with --long for every animal."""
    if name not in ("reranker, bert", "classifier") and not pytestconfig.getoption("long"):
        pytest.skip("with --long")
    with serving(ZOO[name], made(name), cache, place="process") as pool:
        served = Served(ZOO[name], made(name), pool)
        pairs = pairs_of(*DOCUMENTS, LONG)
        served.require(pairs, served.logits(pairs, prompt=""), instruction="")
