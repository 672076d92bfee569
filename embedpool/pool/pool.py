"""Names and aliases → ServedModel. Requests take no lock: routing is one immutable mapping, swapped whole."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from embedpool.config.spec import ModelSpec, PoolSpec, diff
from embedpool.errors import Forbidden, ModelNotFound, Overloaded, ShuttingDown, UnsupportedTask
from embedpool.pool.model_queue import QueueClosed
from embedpool.pool.request import Call, Result
from embedpool.pool.served_model import ServedModel
from embedpool.pool.settings import PoolSettings
from embedpool.tasks.task import Task

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0  # for replicas to close


class Pool:
    """`submit` is called by request threads; `apply` by reconcile alone; `prepared` around a registration."""

    def __init__(self, settings: PoolSettings, *, max_inflight_global: int = 256) -> None:
        self.max_inflight_global = max_inflight_global
        self.request_timeout_s = settings.request_timeout_s
        self.clock = settings.clock
        self.cache = settings.cache
        self.draining = False  # set by the server when it begins to stop: not ready any more, but serving
        self.stopping = False
        self.catch_up: Callable[[str], bool] = lambda name: False  # set by the server: see Reconciler
        self._settings = dataclasses.replace(settings, max_inflight_global=max_inflight_global)
        self._permits = threading.BoundedSemaphore(max_inflight_global)
        # Guards everything below but `_routes`, which is replaced whole and read without it. Taken by whoever changes
        # the pool: reconcile's thread, one that registers, a replica's thread that promotes a successor. Inside it a
        # model's own locks may be taken; no thread waits inside it for a load, a request or another thread's end.
        self._lock = threading.RLock()
        self._spec = PoolSpec()
        self._served: dict[str, ServedModel] = {}
        self._routes: Mapping[str, ServedModel] = MappingProxyType({})
        self._candidates: dict[ServedModel, bool] = {}  # being prepared; whether `apply` may adopt it: it is loaded
        self._leaving: dict[ServedModel, threading.Thread] = {}
        self._holders: dict[str, ServedModel] = {}  # of aliases whose new model is still loading

    # --- the road of a request

    def submit(self, model: str, task: Task, call: Call) -> Result:
        """Serve one request in the calling thread. Raises the errors of the contract."""
        with self.permit():
            while True:
                try:
                    served = self.find(model)
                    call.require(served.spec)
                    return served.admission.serve(task, call)
                except UnsupportedTask as error:
                    raise self._naming_those_that_can(task, call, error) from None
                except (QueueClosed, ModelNotFound) as gone:
                    if self.stopping:
                        raise ShuttingDown("the server is stopping") from None
                    if isinstance(gone, ModelNotFound):
                        raise
                # The model was replaced between look-up and admission; its successor is routed already.

    def _naming_those_that_can(self, task: Task, call: Call, error: UnsupportedTask) -> UnsupportedTask:
        """The error, with the models that the caller may ask instead."""
        able: list[str] = []
        asleep: list[str] = []
        for served in self.models:
            with contextlib.suppress(Forbidden):
                call.require(served.spec)
                able += [served.spec.model] if task.name in served.kinds else []
                asleep += [] if served.kinds else [served.spec.model]
        told = f"models that can: {', '.join(able)}" if able else "no registered model can"
        if asleep and not able:
            told = f"models that may, which nobody has asked yet: {', '.join(asleep)}"
        return UnsupportedTask(f"{error.message}; {told}")

    @contextlib.contextmanager
    def permit(self) -> Iterator[None]:
        """One of the requests that may be served at once. Raises Overloaded and ShuttingDown."""
        if not self._permits.acquire(blocking=False):
            raise Overloaded(f"{self.max_inflight_global} requests are being served already", retry_after_s=1.0)
        try:
            if self.stopping:
                raise ShuttingDown("the server is stopping")
            yield
        finally:
            self._permits.release()

    def clear_cache(self, model: str | None = None) -> None:
        """Forget what is known of a model's rows, or of all. Raises ModelNotFound."""
        if model is None:
            self.cache.clear()
        else:
            served = self.find(model)
            self.cache.clear(served.spec.model, served.cache.scope)

    def find(self, name: str) -> ServedModel:
        """The model of this name or alias. Raises ModelNotFound."""
        served = self._routes.get(name)
        if served is None and self.catch_up(name):
            served = self._routes.get(name)
        if served is None:
            raise ModelNotFound(name, self._routes)
        return served

    def knows(self, name: str) -> bool:
        """Whether a model has this name or alias."""
        return name in self._routes

    # --- the live pool follows the spec

    @contextlib.contextmanager
    def prepared(self, spec: ModelSpec, timeout_s: float) -> Iterator[None]:
        """Hold a loaded but unrouted model of this spec, which any `apply` meanwhile adopts; then drop it if none did.

        Raises ModelFailed with the reason if it does not load; nothing is lost then.
        """
        candidate = ServedModel(spec, self._settings)
        with self._lock:
            if self.stopping:
                raise ShuttingDown("the server is stopping")
            self._candidates[candidate] = False
        try:
            candidate.start(prove=True)
            candidate.require_loaded(timeout_s)
            self._candidates[candidate] = True
            yield
        finally:
            with self._lock:
                if self._candidates.pop(candidate, None) is not None:
                    self._drain_in_background(candidate)

    def apply(self, spec: PoolSpec) -> None:
        """Make the live pool what `spec` says, by diff. Never waits for a load.

        A changed model keeps serving until its successor is loaded; a prepared model that fits is adopted.
        """
        with self._lock:
            if self.stopping:
                return
            change = diff(self._spec, spec)
            leaving = [s for name in change.removed if (s := self._served.pop(name, None))]
            leaving += [s.successor for s in leaving if s.successor]
            for model in change.added:
                self._served[model.model] = self._candidate_for(model) or self._new(model)
            for model in change.changed:
                leaving += self._change(model)
            self._spec = spec
            leaving += self._hold_aliases()
            self._route()
            self._let_go(leaving)
            self._prune_cache()

    def _prune_cache(self) -> None:
        """Forget the rows of what no model is any more."""
        self.cache.keep_only({name: served.cache.scope for name, served in self._served.items()})

    def _hold_aliases(self) -> list[ServedModel]:
        """An alias that moves to a model which has not loaded yet stays where it is until then; gives who held one."""
        held: dict[str, ServedModel] = {}
        for owner in self._served.values():
            alias = owner.spec.alias
            before = self._routes.get(alias) if alias else None
            waits = owner.spec.enabled and not owner.takes_requests
            if alias and before not in (None, owner) and before.takes_requests and waits:
                held[alias] = before
        holders, self._holders = self._holders, held
        return list(holders.values())

    def _let_go(self, leaving: list[ServedModel]) -> None:
        """End these, but for what is served still, if only under an alias."""
        kept = {*self._served.values(), *self._holders.values(), *self._leaving}
        for served in {*leaving} - kept:
            self._drain_in_background(served)

    def _loaded(self, served: ServedModel) -> None:
        """On a replica's thread: an alias that waited for this model moves."""
        with self._lock:
            alias = served.spec.alias
            if alias in self._holders and self._served.get(served.spec.model) is served:
                before = self._holders.pop(alias)
                self._route()
                self._let_go([before])
                logger.info("%s: the model is loaded, and %s is its alias from now on", served.spec.model, alias)
            self._prune_cache()

    def _change(self, model: ModelSpec) -> list[ServedModel]:
        """Bring one served model to its new spec; gives what leaves."""
        live = self._served[model.model]
        leaving = [live.successor] if live.successor else []
        live.successor = None
        if live.spec.load_key == model.load_key:
            live.update(model)
            return leaving
        candidate = self._candidate_for(model)
        if candidate is None and model.enabled and live.takes_requests:
            # The old one goes on, under the new alias, until the successor is loaded.
            live.update(dataclasses.replace(live.spec, alias=model.alias))
            live.successor = ServedModel(model, self._settings, on_ready=self._promote)
            live.successor.start(prove=True)
            return leaving
        self._served[model.model] = candidate or self._new(model)
        return [*leaving, live]

    def _new(self, model: ModelSpec) -> ServedModel:
        return ServedModel(model, self._settings, on_ready=self._loaded).start()

    def _candidate_for(self, model: ModelSpec) -> ServedModel | None:
        for candidate, is_loaded in self._candidates.items():
            if is_loaded and candidate.spec.load_key == model.load_key:
                del self._candidates[candidate]
                candidate.update(model)
                return candidate
        return None

    def _promote(self, successor: ServedModel) -> None:
        """On the successor's replica thread, when it is ready. Until then the old one goes on; /status shows why."""
        with self._lock:
            name = successor.spec.model
            old = self._served.get(name)
            if old is None or old.successor is not successor:
                return
            self._served[name], old.successor = successor, None
            self._route()
            self._drain_in_background(old)
            self._prune_cache()
        logger.info("%s: the changed model is loaded and takes over", name)

    def _route(self) -> None:
        routes = {alias: s for s in self._served.values() if (alias := s.spec.alias)} | self._holders
        self._routes = MappingProxyType({**routes, **{s.spec.model: s for s in self._served.values()}})

    # --- leaving

    def _drain_in_background(self, served: ServedModel) -> None:
        """Called under the lock, so that a stop sees the model either here or there."""

        def drain() -> None:
            served.drain(self._settings.request_timeout_s)
            with self._lock:
                self._leaving.pop(served, None)

        served.close()
        self._leaving[served] = threading.Thread(target=drain, name=f"drain-{served.spec.model}", daemon=True)
        self._leaving[served].start()

    def stop(self, grace_s: float = 0.0) -> int:
        """Refuse new requests, wait up to `grace_s` for those inside, fail the rest, stop every replica.

        Gives the number of requests that got 503 instead of their vectors. After it no thread of the pool is left but
        those hung in a driver.
        """
        with self._lock:
            self.stopping = True
            leaving = {*self._served.values(), *self._leaving, *self._candidates, *self._holders.values()}
            leaving |= {s.successor for s in leaving if s.successor}
            threads = list(self._leaving.values())
            self._routes, self._served, self._holders = MappingProxyType({}), {}, {}
        given_up: list[int] = []
        for served in leaving:
            threads.append(threading.Thread(target=lambda s=served: given_up.append(s.drain(grace_s)), name="stop"))
            threads[-1].start()
        for thread in threads:
            thread.join(grace_s + STOP_TIMEOUT_S)
        self.cache.close()
        return sum(given_up)

    # --- what can be seen

    @property
    def models(self) -> list[ServedModel]:
        """Every model, in the order of pool.yml."""
        served = self._served
        return [found for m in self._spec.models if (found := served.get(m.model))]

    @property
    def candidates(self) -> list[ServedModel]:
        """Models that prove themselves before they are taken into the pool, as a registration does."""
        with self._lock:
            return list(self._candidates)

    @property
    def booted(self) -> bool:
        """Whether every enabled model has finished its first load or failed."""
        return all(s.settled for s in self.models)
