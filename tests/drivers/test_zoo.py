"""Every model of the zoo is served as its own library serves it, on each runtime, down the road of a request."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from embedpool.errors import InvalidRequest
from embedpool.pool.pool import Pool
from tests.conftest import ask
from tests.drivers.conftest import serving
from tests.zoo import ZOO, Animal

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Fox",
    "What is the CAPITAL of France? Le vif renard brun saute par-dessus le chien paresseux, 3 fois.",
    "[CLS] pool </s> and [SEP] are special; ﬁne café — “quoted” 日本語 🙂",
    " ",
    "pool embed server model token vector short long texts programs " * 3,
)
LONG = "pool embed server model token vector short long texts programs: " * 60
LEAST_COSINE = 0.99999
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # older transformers use it
RUNTIMES = ("torch", "openvino")
IN_A_PROCESS = ("bert, prompts", "without the prompt, mean", "router, static queries", "model2vec, quantised")


class Reference:
    """The model in its own library."""

    def __init__(self, animal: Animal, folder: Path) -> None:
        if animal.of_model2vec:
            model2vec = pytest.importorskip("model2vec")
            self.model: Any = model2vec.StaticModel.from_pretrained(str(folder))
        else:
            from sentence_transformers import SentenceTransformer

            self.model = SentenceTransformer(
                str(folder),
                device="cpu",
                local_files_only=True,
                trust_remote_code=animal.config.get("trust_remote_code", False),
                model_kwargs={"dtype": "float32"},
            )
        self._animal = animal

    def encode(self, texts: Sequence[str], how: str = "encode", **options: Any) -> np.ndarray:
        if self._animal.of_model2vec:
            return np.asarray(self.model.encode(list(texts), max_length=None))
        return np.asarray(getattr(self.model, how)(list(texts), show_progress_bar=False, **options))

    @property
    def first(self) -> Any:
        """The module that reads texts for which nothing is said."""
        first = self.model[0]
        return first.sub_modules[first.default_route][0] if hasattr(first, "sub_modules") else first

    @contextlib.contextmanager
    def limited(self, limit: int, side: str) -> Iterator[None]:
        """As long as this lasts it cuts texts so."""
        first, tokenizer = self.first, self.first.tokenizer
        before = first.max_seq_length, tokenizer.truncation_side
        first.max_seq_length, tokenizer.truncation_side = limit, side
        yield
        first.max_seq_length, tokenizer.truncation_side = before


class Served:
    """A model in a pool, beside its reference."""

    def __init__(self, animal: Animal, runtime: str, folder: Path, pool: Pool, reference: Reference) -> None:
        self.animal = animal
        self.runtime = runtime
        self.folder = folder
        self.pool = pool
        self.reference = reference

    def ask(self, *texts: str, **options: Any) -> Any:
        return ask(self.pool, "m", *texts, **{"normalize": False, **options})

    def require(self, expected: np.ndarray, texts: Sequence[str], **options: Any) -> None:
        """The pool's vectors of the texts are these; a vector of zeros is one of zeros."""
        got = self.ask(*texts, **options).vectors
        assert got.shape == expected.shape
        for text, a, b in zip(texts, got.astype(np.float64), expected.astype(np.float64), strict=True):
            lengths = np.linalg.norm(a), np.linalg.norm(b)
            if lengths[1] == 0:
                assert lengths[0] == 0, text
                continue
            assert a @ b / (lengths[0] * lengths[1]) >= LEAST_COSINE, text
            assert lengths[0] == pytest.approx(lengths[1], rel=1e-3), text

    @property
    def has_limit(self) -> bool:
        """Whether its library cuts texts for it."""
        return not self.animal.of_model2vec and hasattr(self.reference.first.tokenizer, "truncation_side")

    @property
    def prompts(self) -> dict[str, str]:
        return {} if self.animal.of_model2vec else dict(self.reference.model.prompts)

    @property
    def routes(self) -> list[str]:
        file = self.folder / "router_config.json"
        return sorted(json.loads(file.read_text())["structure"]) if file.exists() else []


@pytest.fixture(scope="session")
def references(made: Callable[[str], Path]) -> Callable[[str], Reference]:
    return functools.cache(lambda name: Reference(ZOO[name], made(name)))


def runtimes(animal: Animal) -> tuple[str, ...]:
    return ("auto",) if animal.static else RUNTIMES


@pytest.fixture(
    scope="module",
    params=[
        (name, runtime)
        for name, animal in ZOO.items()
        for runtime in runtimes(animal)
        if animal.has_default and animal.kind == "embed"
    ],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def served(
    request: pytest.FixtureRequest, made: Callable[[str], Path], references: Callable[[str], Reference], cache: Path
) -> Iterator[Served]:
    """Each animal on each runtime; where it cannot be exported, auto must serve it on torch and say why."""
    name, runtime = request.param
    animal, folder = ZOO[name], made(name)
    if runtime == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    backend = "auto" if runtime == "openvino" and not (animal.on_openvino and not animal.by_encode) else runtime
    with serving(animal, folder, cache, backend=backend) as pool:
        (model,) = pool.models
        assert model.state == "ready", model.replicas.trouble
        yield Served(animal, runtime, folder, pool, references(name))


def test_it_runs_where_it_should(served: Served) -> None:
    """On the runtime that was asked for, by token ids; else /status says why not."""
    shown = served.pool.models[0].snapshot()["runs_on"]
    animal = served.animal
    assert shown["kind"] == "embed"
    if animal.static:
        assert shown["backend"] == "numpy"
    elif served.runtime == "openvino" and (animal.by_encode or not animal.on_openvino):
        assert (shown["backend"], shown["why"][:9]) == ("torch", "openvino:")
    else:
        assert shown["backend"] == served.runtime
    assert ("by_encode" in shown) is animal.by_encode, shown
    assert ("assumed" in shown) is ("plain" in animal.name or "as an embedder" in animal.name)


def test_texts_alone_together_and_too_long(served: Served) -> None:
    """A text has the vector of encode alone, in a mixed batch, and cut where the model cuts."""
    for texts in (TEXTS[:1], TEXTS, (*TEXTS, LONG)):
        served.require(served.reference.encode(texts), texts)


def test_an_empty_text(served: Served) -> None:
    """An empty text beside another has encode's vector; alone it has the same."""
    served.require(served.reference.encode(["", TEXTS[0]]), ["", TEXTS[0]])
    (beside, _) = served.ask("", TEXTS[0]).vectors
    (alone,) = served.ask("").vectors
    np.testing.assert_allclose(alone, beside, rtol=1e-3, atol=1e-5)


def test_every_prompt(served: Served) -> None:
    """By its name, by what texts are for, as it is written, and in none of these ways."""
    texts = [*TEXTS[:3], "", LONG]
    for name, prompt in served.prompts.items():
        if prompt and not served.routes:  # of these it also chooses the route
            served.require(served.reference.encode(texts, prompt_name=name), texts, prompt_name=name)
    if not served.animal.of_model2vec:
        for task in ("query", "document"):
            served.require(served.reference.encode(texts, f"encode_{task}"), texts, input_type=task)
        if not served.routes:
            if served.animal.name == "bert, cut at the left":
                texts = texts[:2]  # else the folder's own side cuts the prompt
            served.require(served.reference.encode(texts, prompt="pool: "), texts, prompt="pool: ")
            served.require(served.reference.encode(texts, prompt=""), texts, prompt="")


@pytest.mark.parametrize("side", ["right", "left"])
def test_cut_where_a_request_says(served: Served, side: str) -> None:
    """`max_seq_length` and `truncate` are the library's limit and its truncation side."""
    if not served.has_limit:
        return
    texts = [*TEXTS, LONG]
    with served.reference.limited(6, side):
        expected = served.reference.encode(texts, prompt="")
    got = served.ask(*texts, max_seq_length=6, truncate=side, prompt="")
    assert len(texts) - 1 in got.truncated
    served.require(expected, texts, max_seq_length=6, truncate=side, prompt="")


def test_a_cut_at_the_left_keeps_the_prompt(served: Served) -> None:
    """The text loses its beginning, and the prompt stays."""
    if not served.has_limit or served.animal.by_encode or served.routes:
        return
    prompt = "query: "
    tokenizer = served.reference.first.tokenizer
    ids = tokenizer(prompt + LONG, truncation=False)["input_ids"]
    (got,) = served.ask(LONG, max_seq_length=24, truncate="left", prompt=prompt).vectors
    (all_of_it,) = served.ask(LONG, max_seq_length=24, truncate="left", prompt="").vectors
    (item,) = _items(served, LONG, max_seq_length=24, truncate="left", prompt=prompt)
    count = len(tokenizer(prompt, truncation=False)["input_ids"]) - (ids[-1] in tokenizer.all_special_ids)
    assert list(item.ids)[:count] == ids[:count]
    assert list(item.ids)[count:] == ids[count - 24 :]
    assert not np.allclose(got, all_of_it)


def _items(served: Served, *texts: str, **options: Any) -> Any:
    from embedpool.tasks.embed import Embed, EmbedOptions

    (model,) = served.pool.models
    return Embed(texts, EmbedOptions(**options)).measure(model.spec.driver.config, model.tokenizer()).items


def test_fewer_dimensions(served: Served) -> None:
    """The first numbers of a vector, of the length that was asked for; more than its default where it has a default."""
    whole = served.ask(*TEXTS, dimensions=None).vectors
    for dimensions in (4, whole.shape[1]):
        few = served.ask(*TEXTS, dimensions=dimensions).vectors
        np.testing.assert_allclose(few, whole[:, :dimensions], rtol=1e-3, atol=1e-5)
    if served.animal.name == "truncate_dim":
        expected = served.reference.encode(TEXTS, truncate_dim=32)
        served.require(expected, TEXTS, dimensions=32)
    assert (np.linalg.norm(served.ask(*TEXTS[:3], normalize=True).vectors, axis=1) > 0.999).all()


def test_tokens_are_counted_as_the_library_counts(served: Served) -> None:
    """Special tokens and the prompt included, what was cut left out."""
    if served.animal.by_encode:
        return  # it makes more of a text than its tokens
    for prompt in ("", "query: "):
        for text in (*TEXTS, LONG):
            assert served.ask(text, prompt=prompt).tokens == _counted(served, prompt + text), text


def _counted(served: Served, text: str) -> int:
    if served.animal.of_model2vec:
        words = tokenizers.Tokenizer.from_file(str(served.folder / "tokenizer.json"))  # the library's own cuts
        return len(words.encode(text, add_special_tokens=False).ids)
    tokenizer = served.reference.first.tokenizer
    if served.has_limit:
        return len(_library_ids(served, text))
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def _library_ids(served: Served, text: str) -> list[int]:
    first = served.reference.first
    return list(first.tokenizer(text, truncation=True, max_length=first.max_seq_length)["input_ids"])


def test_the_door_makes_the_librarys_ids(served: Served) -> None:
    """So it is not by luck that the vectors are alike."""
    if not served.has_limit or served.animal.by_encode:
        return
    for text in (*TEXTS, LONG, ""):
        (item,) = _items(served, text, prompt="")
        assert list(item.ids) == _library_ids(served, text)


def test_a_replaced_default_prompt(
    made: Callable[[str], Path], references: Callable[[str], Reference], cache: Path
) -> None:
    """driver.config.prompts replaces the model's own text of a prompt, also where it is the default."""
    name = "bert, prompts"
    with serving(ZOO[name], made(name), cache, backend="torch", prompts={"document": "find: "}) as pool:
        served = Served(ZOO[name], "torch", made(name), pool, references(name))
        served.require(references(name).encode(TEXTS, prompt="find: "), TEXTS)
        served.require(references(name).encode(TEXTS, prompt="query: "), TEXTS, prompt_name="query")


def test_a_graph_is_exported_in_float32_whatever_is_computed_first(
    made: Callable[[str], Path], references: Callable[[str], Reference], tmp_path: Path
) -> None:
    """A model that is served in bfloat16 first leaves no graph of rounded weights for those that ask for float32."""
    name = "bert, dense"
    with serving(ZOO[name], made(name), tmp_path, backend="openvino", compute_dtype="bfloat16") as pool:
        assert ask(pool, "m", *TEXTS).vectors.shape == (len(TEXTS), 24)
    with serving(ZOO[name], made(name), tmp_path, backend="openvino") as pool:
        got = ask(pool, "m", *TEXTS, normalize=False).vectors
    np.testing.assert_allclose(got, references(name).encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("backend", RUNTIMES)
@pytest.mark.parametrize("how", ["input_type", "prompt_name"])
def test_routes_are_taken_by_what_texts_are_for(
    made: Callable[[str], Path], references: Callable[[str], Reference], cache: Path, how: str, backend: str
) -> None:
    """In the words of each dialect; texts of two routes at once do not mix."""
    name = "router"
    with serving(ZOO[name], made(name), cache, backend=backend) as pool:
        served = Served(ZOO[name], backend, made(name), pool, references(name))
        words = {"query": ("query", "search_query", "retrieval.query"), "document": ("document", "search_document")}
        for task, alike in words.items():
            expected = references(name).encode(TEXTS, f"encode_{task}")
            for word in alike if how == "input_type" else alike[:1]:
                served.require(expected, TEXTS, **{how: word})
        served.require(references(name).encode(TEXTS), TEXTS)  # the default route


def test_a_router_without_a_default_asks_what_texts_are_for(made: Callable[[str], Path], cache: Path) -> None:
    """As the library refuses, too, rather than guess."""
    name = "router, no default"
    with serving(ZOO[name], made(name), cache, backend="torch") as pool:
        with pytest.raises(InvalidRequest, match="what the texts are for; known: document, query"):
            ask(pool, "m", *TEXTS)
        assert ask(pool, "m", *TEXTS, input_type="query").vectors.shape == (len(TEXTS), 32)


@pytest.mark.parametrize("name", [name for name, animal in ZOO.items() if animal.kind == "embed"])
def test_a_process_of_its_own_gives_the_same(
    name: str,
    made: Callable[[str], Path],
    references: Callable[[str], Reference],
    cache: Path,
    pytestconfig: pytest.Config,
) -> None:
    """`place: process` changes no number; with --long for every animal."""
    if name not in IN_A_PROCESS and not pytestconfig.getoption("long"):
        pytest.skip("with --long")
    animal = ZOO[name]
    with serving(animal, made(name), cache, place="process") as pool:
        served = Served(animal, "auto", made(name), pool, references(name))
        tasks = ("query", "document") if served.routes or served.prompts.get("query") else ()
        for task in tasks:
            served.require(references(name).encode([*TEXTS, LONG], f"encode_{task}"), [*TEXTS, LONG], input_type=task)
        if animal.has_default:
            served.require(references(name).encode([*TEXTS, LONG]), [*TEXTS, LONG])
