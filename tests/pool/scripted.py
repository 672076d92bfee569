"""What the tests of the pool share: drivers and loads that do what a test says, requests in threads of their own."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from embedpool.config.spec import DriverSpec, FakeConfig, ModelSpec, QueueSpec, Scaling
from embedpool.drivers.base import Driver, Embeddings, Ids
from embedpool.drivers.fake import open_meter
from embedpool.pool.job import Flow, Job
from embedpool.pool.pool import Pool
from embedpool.pool.replica_set import Engine
from embedpool.pool.request import EmbedOptions, EmbedRequest, EmbedResult
from embedpool.pool.served_model import ServedModel

PATIENCE_S = 10  # before a test gives up; nothing waits that long when all is well
A_WHILE_S = 0.3  # for what must not happen: a right implementation only waits it out, on any machine


def vector_of(text: str) -> np.ndarray:
    """The right answer for a text."""
    return np.random.default_rng(zlib.crc32(text.encode())).standard_normal(8, dtype=np.float32)


def vectors_of(texts: Sequence[str]) -> np.ndarray:
    return np.stack([vector_of(text) for text in texts])


class Scripted(Driver):
    """Gives `vector_of` each text, unless `on_embed(texts)` raises or gives something else."""

    def __init__(
        self,
        on_embed: Callable[[list[str]], Embeddings | np.ndarray | None] = lambda texts: None,
        *,
        on_probe: Callable[[], None] = lambda: None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.calls: list[list[str]] = []
        self.options: list[Mapping[str, Any]] = []
        self.probes = 0
        self.closed = threading.Event()
        self._on_embed, self._on_probe, self._on_close = on_embed, on_probe, on_close

    def open(self) -> None:
        raise AssertionError("a scripted driver is born open")

    def embed(self, texts: Sequence[str], ids: Sequence[Ids] | None, options: Mapping[str, Any]) -> Embeddings:
        self.calls.append(list(texts))
        self.options.append(options)
        answer = self._on_embed(list(texts))
        if isinstance(answer, Embeddings):
            return answer
        return Embeddings(vectors_of(texts) if answer is None else answer)

    def probe(self) -> None:
        self.probes += 1
        self._on_probe()

    def lose(self, reason: str) -> None:
        """As if its process had ended."""
        self.lost = reason
        self._tell_lost()

    def close(self) -> None:
        assert not self.closed.is_set(), "a driver is closed once"
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
    """`open_driver`: each load follows the next step of the script: an error is raised, a driver is given,
    something callable makes one. After the script, every load gives a new driver that works."""

    def __init__(self, *script: Any) -> None:
        self._script = list(script)
        self._lock = threading.Lock()
        self.loads = threading.Semaphore(0)
        self.specs: list[ModelSpec] = []
        self.opened: list[Scripted] = []

    def __call__(self, spec: ModelSpec, memory: dict[str, Any] | None = None) -> Scripted:
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


def engine_of(open_driver: Callable[..., Driver], **settings: Any) -> Engine:
    return Engine(open_driver, settings.pop("open_meter", open_meter), **{"request_timeout_s": 20, **settings})


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


def request_of(*texts: str, model: str = "m", timeout_s: float | None = None, **options: Any) -> EmbedRequest:
    return EmbedRequest(model, texts, EmbedOptions(**options), timeout_s=timeout_s)


def ask(where: Pool | ServedModel, *texts: str, **kwargs: Any) -> EmbedResult:
    request = request_of(*texts, **kwargs)
    return where.submit(request) if isinstance(where, Pool) else where.embed(request)


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
    """Released once for each job that gets into the queue from now on."""
    puts = threading.Semaphore(0)
    put = served.queue._put

    def counted(job: Job) -> None:
        put(job)
        puts.release()

    served.queue._put = counted  # type: ignore[method-assign]
    return puts


def assert_answers(result: EmbedResult, *texts: str) -> None:
    np.testing.assert_array_equal(result.vectors, vectors_of(texts))


def broken_on(text: str) -> Scripted:
    """A driver that fails on a text and then on its probe."""

    def on_embed(texts: list[str]) -> None:
        if text in texts:
            raise RuntimeError("out of order")

    def on_probe() -> None:
        raise RuntimeError("out of order")

    return Scripted(on_embed, on_probe=on_probe)


def job_of(*texts: str, flow: Flow | None = None, offset: int = 0, group: str | None = None) -> Job:
    """A job of such texts; a text's length stands for its tokens."""
    return Job(flow or flow_of(), texts, None, [len(t) for t in texts], offset=offset, group=group)


def flow_of(*, deadline: float = 1e9, weight: float = 1.0, client_gone: Callable[[], bool] = lambda: False) -> Flow:
    return Flow(deadline, weight, client_gone)
