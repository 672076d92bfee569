"""What the tests of the pool share: drivers and loads that do what a test says, requests in threads of their own."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from embedpool.config.spec import DriverSpec, FakeConfig, ModelSpec, QueueSpec, Scaling
from embedpool.drivers.fake import FakeTokenizer
from embedpool.pool.model_queue import ModelQueue
from embedpool.pool.pool import Pool
from embedpool.pool.request import Call, Request, Result
from embedpool.pool.served_model import ServedModel
from embedpool.pool.settings import PoolSettings
from embedpool.tasks.driver import Facts, Loss, Place, Report, unheard
from embedpool.tasks.embed import LOCAL, Embed, EmbedOptions
from embedpool.tasks.item import Batch, Group, Item, Keys
from embedpool.tasks.rows import Answer, Rows
from embedpool.tasks.task import Measured

PATIENCE_S = 10  # before a test gives up; nothing waits that long when all is well
FACTS, OPTIONS = Facts(), EmbedOptions()
A_WHILE_S = 0.3  # for what must not happen: a right implementation only waits it out, on any machine


def vector_of(text: str) -> np.ndarray:
    """The right answer for a text."""
    return np.random.default_rng(zlib.crc32(text.encode())).standard_normal(8, dtype=np.float32)


def vectors_of(texts: Sequence[str]) -> np.ndarray:
    return np.stack([vector_of(text) for text in texts])


class Scripted(Place):
    """An open place: gives `vector_of` each text, unless `on_run(texts)` raises or gives something else."""

    def __init__(
        self,
        on_run: Callable[[list[str]], Answer | np.ndarray | None] = lambda texts: None,
        *,
        on_probe: Callable[[], None] = lambda: None,
        on_close: Callable[[], None] = lambda: None,
        rest_s: Callable[[], float] = lambda: 0.0,
        facts: Facts = FACTS,
    ) -> None:
        self.facts = facts
        self.calls: list[list[str]] = []
        self.options: list[Mapping[str, Any]] = []
        self.probes = 0
        self.closed = threading.Event()
        self._on_run, self._on_probe, self._on_close, self._rest_s = on_run, on_probe, on_close, rest_s

    def run(self, batch: Batch) -> Answer:
        self.calls.append(batch.texts)
        self.options.append(batch.options)
        answer = self._on_run(batch.texts)
        if isinstance(answer, Answer):
            return answer
        return Answer(Rows(vectors_of(batch.texts) if answer is None else answer))

    def probe(self) -> None:
        self.probes += 1
        self._on_probe()

    def rest_s(self) -> float:
        return self._rest_s()

    def takes_a_batch(self, within_s: float = 0.0) -> bool:
        return not self._rest_s()

    def configure(self, config: Any) -> None:
        pass

    def lose(self, reason: str, *, innocent: bool = False) -> None:
        """As if its process had ended."""
        self._lose(Loss(reason, innocent))

    def close(self) -> None:
        assert not self.closed.is_set(), "a place is closed once"
        self._on_close()
        self.closed.set()


class Gate:
    """Holds every batch until it is opened; `entered` counts those that arrived."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self._open = threading.Event()

    def __call__(self, texts: object = None) -> None:
        self.entered.release()
        assert self._open.wait(PATIENCE_S)

    def arrived(self) -> None:
        """Wait for one batch more."""
        assert self.entered.acquire(timeout=PATIENCE_S)

    def open(self) -> None:
        self._open.set()


class Opener:
    """`open_place`: each load follows the next step of the script: an error is raised, a place is given,
    something callable makes one. After the script, every load gives a new place that works."""

    def __init__(self, *script: Any) -> None:
        self._script = list(script)
        self._lock = threading.Lock()
        self.loads = threading.Semaphore(0)
        self.specs: list[ModelSpec] = []
        self.opened: list[Scripted] = []

    def __call__(self, spec: ModelSpec, memory: dict[str, Any] | None = None, report: Report = unheard) -> Scripted:
        with self._lock:
            self.specs.append(spec)
            step = self._script.pop(0) if self._script else Scripted
        self.loads.release()
        if isinstance(step, BaseException):
            raise step
        driver = step if isinstance(step, Scripted) else step()
        self.opened.append(driver)
        return driver

    def wait_for_load(self) -> None:
        """Wait for one load more to begin."""
        assert self.loads.acquire(timeout=PATIENCE_S)


def settings_of(open_place: Callable[..., Place], **given: Any) -> PoolSettings:
    open_tokenizer = given.pop("open_tokenizer", lambda spec, report: FakeTokenizer())
    return PoolSettings(open_place, open_tokenizer, **{"request_timeout_s": 20, **given})


def model_spec(
    name: str = "m",
    *,
    alias: str | None = None,
    enabled: bool = True,
    max_size: int | None = None,
    inflight: int | None = None,
    config: Mapping[str, Any] | None = None,
    **scaling: Any,
) -> ModelSpec:
    """A model whose vectors come out as its driver made them."""
    return ModelSpec(
        name,
        DriverSpec("fake", FakeConfig(**{"normalize": False, **(config or {})})),
        alias=alias,
        enabled=enabled,
        scaling=Scaling(**scaling),
        queue=QueueSpec(max_size, inflight),
    )


def ask(
    where: Pool | ServedModel,
    *texts: str,
    model: str = "m",
    timeout_s: float = 20,
    call: Mapping[str, Any] | None = None,
    **options: Any,
) -> Result:
    """The answer to a request for the texts; `call` holds further fields of its Call."""
    clock = where.clock if isinstance(where, Pool) else where._settings.clock
    made = Call(arrived_at=clock(), timeout_s=timeout_s, **(call or {}))
    task = Embed(texts, EmbedOptions(**options))
    return where.submit(model, task, made) if isinstance(where, Pool) else where.admission.serve(task, made)


def in_thread(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Run the call in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="asking", daemon=True).start()
    return future


def puts_of(served: ServedModel) -> threading.Semaphore:
    """Released once for each item that gets into the queue from now on."""
    puts = threading.Semaphore(0)
    put = served.queue._put

    def counted(item: Item) -> None:
        put(item)
        puts.release()

    served.queue._put = counted  # type: ignore[method-assign]
    return puts


def assert_answers(result: Result, *texts: str) -> None:
    np.testing.assert_array_equal(result.vectors, vectors_of(texts))


def broken_on(text: str) -> Scripted:
    """A driver that fails on a text and then on its probe."""

    def on_run(texts: list[str]) -> None:
        if text in texts:
            raise RuntimeError("out of order")

    def on_probe() -> None:
        raise RuntimeError("out of order")

    return Scripted(on_run, on_probe=on_probe)


class Asked(Request):
    """A request for texts whose items are at hand; a text's length stands for its tokens."""

    __slots__ = ("items",)

    def __init__(self, *texts: str, group: Group = LOCAL, options: EmbedOptions = OPTIONS, **call: Any) -> None:
        super().__init__(Embed(texts, options), Call(**{"arrived_at": 0.0, "timeout_s": 1e9, **call}))
        keys = Keys(group)
        self.items = [
            Item((text,), len(text), group=group, key=keys.of(None, text), index=i) for i, text in enumerate(texts)
        ]
        self.expect(Measured(self.items, [], {}))

    @property
    def texts(self) -> Sequence[str]:
        return self.task.texts

    def admitted_to(self, queue: ModelQueue) -> Asked:
        """Itself, whose items wait in the queue."""
        assert queue.admit(self.items) == len(self.items)
        return self


def texts_of(items: Sequence[Item]) -> list[str]:
    return [item.parts[0] for item in items]
