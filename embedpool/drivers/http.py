"""A remote embedding service at one or several addresses: which address to call, retries, and checks of the answers."""

from __future__ import annotations

import itertools
import logging
import random
import threading
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from embedpool.bounds import CallBudget
from embedpool.config.spec import HttpConfig, ModelSpec
from embedpool.drivers.addresses import Address, Addresses
from embedpool.drivers.measure import probe_batch
from embedpool.drivers.protocols import MULTIVECTOR, RERANK, SPARSE, Reading, protocol_of
from embedpool.drivers.remote_rows import Array, as_one, mark_of, rows_of, several_of, sparse_of
from embedpool.drivers.space import SAME_SPACE_COSINE, likeness, of_probes
from embedpool.drivers.upstream import NOT_ASKED, RETRY_RESERVE, RETRY_SHARE, Upstream, secret
from embedpool.errors import REFUSALS, UpstreamError
from embedpool.tasks.driver import PROBE_TEXT, Driver, Facts, Folders, Report, describe
from embedpool.tasks.item import Batch
from embedpool.tasks.rows import Answer, Rows
from embedpool.tasks.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SLOTS = 8  # calls at once
LARGEST_VECTOR_BYTES = 1 << 21  # in JSON: 65,536 numbers of 32 characters
LARGEST_REST_BYTES = 1 << 20  # of an answer
BACKOFF_FACTOR_S = 0.2
LONGEST_RETRY_AFTER_S = 30
RECHECK_S = 5.0
LOOKUP_S = 3.0
CHECKS_OF_THE_FAULTY = 12  # rounds, of which the last is one of all addresses
PROOF_TIMEOUT_S = 10.0  # where there are other addresses
PROBE_TEXTS = (PROBE_TEXT, "How much does the train to the coast cost?", "Die Sonne scheint.")
NOT_FINITE = "the remote service gives vectors that are not finite"


class RemoteTokenizer(Tokenizer):
    """The remote service makes the token ids."""

    def __init__(self, task: str = "embed") -> None:
        self.tasks = (task,)

    @override
    def encode(self, texts: Sequence[str]) -> None:
        return None


class HttpDriver(Driver):
    """Raises UpstreamError with the remote's status and message, never its key.

    One of several addresses is asked once it gives the same vectors for PROBE_TEXTS as the first that ever answered,
    and left alone after failures in a row until it does so again. When none is left the driver says that it is lost.
    `shared` is what the drivers of a served model share: whose vectors the first address gave. What its space is, is
    remembered in `state_dir`.
    """

    def __init__(self, model: str, config: HttpConfig, state_dir: Path, shared: dict[str, Any]) -> None:
        self._description: dict[str, object] = {}
        self._dim: int | None = None
        self._lost: str | None = None
        self._model = config.remote_model or model
        self._config = config
        self._protocol = protocol_of(config)
        self._state_dir = state_dir
        self._shared = shared
        self._headers: dict[str, str] = {}
        self._addresses = Addresses(config.addresses, self._upstream_at)
        self._budget = CallBudget(RETRY_SHARE, RETRY_RESERVE)
        self._over = threading.Event()  # closed or lost
        self._wake = threading.Event()  # there is something to prove
        self._call_ended = threading.Condition()  # its lock is held for a look at the addresses

    @override
    def open(self, on_lost: Callable[[str], None]) -> Facts:
        self._on_lost = on_lost
        self._headers = {name: secret(variable) for name, variable in self._config.headers.items()}
        if self._config.api_key:
            self._headers["Authorization"] = f"Bearer {secret(self._config.api_key)}"
        try:
            self._addresses.refresh()
            self._find_one()
        except BaseException:
            self.close()
            raise
        self._description |= describe(
            kind=self._config.task, protocol=self._config.protocol, dim=None if self._is_reranker else self._dim
        )
        if self._addresses.are_several:
            threading.Thread(target=self._check, name=f"check-{self._model}", daemon=True).start()
        if self._addresses.are_names:
            threading.Thread(target=self._follow, name=f"follow-{self._model}", daemon=True).start()
        space = self._shared.get("space") or of_probes(self._state_dir, self._shared["reference"][1])
        self._shared["space"] = space
        return Facts(
            {self._config.task: self._dim}, space, slots=SLOTS, pads=False, paces=True, description=self._description
        )

    @override
    def configure(self, config: HttpConfig) -> None:
        self._config = config

    @override
    def run(self, batch: Batch) -> Answer:
        """One call, and where it fails for a reason that may pass, or that another address may not have, a few more.

        An address that asks for a pause is not called before it is over; if all do, this raises an error that says so.
        """
        texts = [item.parts[-1] for item in batch.items]  # of a pair the document
        may_be_a_text = batch.is_search or len(texts) > 1
        body = self._protocol.body(self._model, texts, batch.options)
        tried: dict[Upstream, str] = {}  # what is told of their failure, if that is no text's
        attempts = 0
        upstream = self._least_busy(())
        self._budget.earn()
        while True:
            if upstream is None:
                raise self._nobody_to_ask()
            try:
                with upstream.call(may_be_a_text=may_be_a_text):
                    answer = self._ask(upstream, body, len(texts), self._config.timeout_s)
            except UpstreamError as error:
                tried[upstream] = error.for_the_log if error.content_may_cause and may_be_a_text else ""
                attempts += 1
                self._publish()
                another = self._least_busy(tried)
                if not self._is_worth_another(batch, error, attempts, upstream, another):
                    raise
                if another is None:
                    self._over.wait(_pause_s(error, attempts))
                upstream = another or upstream
            else:
                for failed, reason in tried.items():
                    if failed is not upstream and reason:
                        failed.count_failure(reason)  # with texts that another address has served
                        self._publish()
                return answer

    def _is_worth_another(
        self, batch: Batch, error: UpstreamError, attempts: int, upstream: Upstream, another: Upstream | None
    ) -> bool:
        """Whether a call that failed is followed by one more, to `another` or else to the same address."""
        is_alone = len(batch.items) == 1
        most = self._config.retries
        if batch.is_search:  # one that is alone is not blamed for a lost connection, or a broken address
            most = min(most, 1) if is_alone and (another or _is_of_the_way(error)) else 0
        if attempts > most or error.rows or error.remote_status in REFUSALS:
            return False
        if another is None:
            may_be_a_text = batch.is_search or not is_alone
            if may_be_a_text and error.content_may_cause and not _is_of_the_way(error):
                return False  # finding the text is a better use of further calls
            if upstream.fault or not error.passing:
                return False
        return self._budget.spend()

    @override
    def probe(self) -> None:
        try:
            known = PROBE_TEXTS if self._is_reranker else PROBE_TEXTS[:1]  # of one score nobody tells whose it is
            rows = self.run(probe_batch(known)).rows
        except UpstreamError as error:
            if not error.is_busy:  # else it is there
                raise
            return
        if not rows.finite().all():
            raise UpstreamError(NOT_FINITE)
        if self._addresses.are_several:
            return  # each of them proves itself from time to time
        if difference := self._difference(self._upstreams[0], mark_of(rows)):
            raise UpstreamError(difference)

    @override
    def close(self) -> None:
        self._end()
        self._addresses.close()

    def _end(self) -> None:
        self._over.set()
        self._wake.set()

    @override
    def rest_s(self) -> float:
        return min((u.rest_s for u in self._upstreams if not u.fault), default=0.0)

    @override
    def takes_a_batch(self, within_s: float = 0.0) -> bool:
        def has_turn() -> bool:
            return self._lost is not None or any(u.takes_a_call for u in self._upstreams if not u.fault)

        with self._call_ended:
            return self._call_ended.wait_for(has_turn, min(within_s, self.rest_s() or within_s))

    def _upstream_at(self, address: Address) -> Upstream:
        path, proxy = self._protocol.path, self._config.proxy
        return Upstream(address.url, path, self._headers, proxy, self._notify, ip=address.ip)

    @property
    def _upstreams(self) -> tuple[Upstream, ...]:
        return self._addresses.current

    @property
    def _is_reranker(self) -> bool:
        return self._config.task == RERANK

    def _notify(self) -> None:
        with self._call_ended:
            self._call_ended.notify_all()

    def _nobody_to_ask(self) -> UpstreamError:
        if any(not upstream.fault for upstream in self._upstreams):  # they rest, or did so a moment ago
            says = "the remote service asks for a pause"
            return UpstreamError(says, remote_status=429, retry_after_s=self.rest_s())
        return UpstreamError(self._lost or "the remote service is not asked")

    def _least_busy(self, tried: Container[Upstream]) -> Upstream | None:
        """The best address that is in use, does not rest, and is not in `tried`."""
        serving = [u for u in self._upstreams if not u.fault and not u.rest_s and u not in tried]
        random.shuffle(serving)  # among equals the first is taken
        return min(serving, key=lambda u: (not u.takes_a_call, u.outstanding), default=None)

    def _ask(self, upstream: Upstream, body: dict[str, Any], count: int, timeout_s: float) -> Answer:
        """One attempt. The answer must hold a vector of the known dimension for each of `count` texts."""
        response = upstream.post(body, timeout_s, count * LARGEST_VECTOR_BYTES + LARGEST_REST_BYTES)
        try:
            document = response.json()
            if isinstance(document, dict) and document.get("error"):
                raise UpstreamError(
                    "the remote service answered 200 with an error",
                    said=upstream.words_of(response),
                    content_may_cause=True,
                )
            read = self._protocol.read(document)
            rows = self._rows_of(read)
            if not isinstance(read.tokens, int | None) or not all(isinstance(i, int) for i in read.truncated):
                raise TypeError("counts must be whole numbers")
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            says = f"the remote service's answer is not one of protocol {self._config.protocol!r}"
            raise UpstreamError(f"{says} ({type(error).__name__})", content_may_cause=True) from None
        if rows.fault(count, None) or not (rows.width or rows.indices is not None):
            says = f"the remote service gave vectors of shape {rows.values.shape} for {count} texts"
            raise UpstreamError(says, content_may_cause=True)
        if self._dim is not None and rows.width != self._dim:
            says = f"the remote service's vectors went from {self._dim} to {rows.width} numbers"
            raise UpstreamError(says, content_may_cause=True)
        return Answer(rows, read.tokens, [i for i in read.truncated if 0 <= i < count], read.errors)

    def _rows_of(self, read: Reading) -> Rows:
        """Raises ValueError, TypeError and OverflowError."""
        if self._config.task == SPARSE:
            return sparse_of(read.vectors)
        if self._config.task == MULTIVECTOR:
            return several_of(read.vectors, self._dim)
        return Rows(rows_of(read.vectors, self._dim, may_be_none=bool(read.errors)))

    # --- which addresses are asked

    def _find_one(self) -> None:
        """Admit the first that answers as it should. Raises what the first of them says if none does."""
        errors = []
        for upstream in self._upstreams:
            try:
                self._prove(upstream)
            except UpstreamError as error:
                errors.append(error)
            else:
                return self._publish()
        raise errors[0]

    def _prove(self, upstream: Upstream) -> None:
        """Admit an address that gives the vectors of PROBE_TEXTS, or stop asking it. Raises UpstreamError."""
        timeout_s = self._config.timeout_s
        if self._addresses.are_several:
            timeout_s = min(timeout_s, PROOF_TIMEOUT_S)
        step, parts = self._config.max_batch_texts, []
        for start in range(0, len(PROBE_TEXTS), step):
            texts = PROBE_TEXTS[start : start + step]
            body = self._protocol.body(self._model, texts, {})
            try:
                answer = self._ask(upstream, body, len(texts), timeout_s)
            except UpstreamError as error:
                upstream.note(error)
                raise
            for failed in answer.errors.values():
                raise failed
            parts.append(mark_of(answer.rows))
        vectors = np.concatenate(parts)
        if not np.isfinite(vectors).all():
            raise UpstreamError(NOT_FINITE)
        if difference := self._difference(upstream, vectors):
            upstream.fault = difference
            raise UpstreamError(difference)
        self._dim = None if self._config.task == SPARSE else vectors.shape[1]
        upstream.admit()

    def _difference(self, upstream: Upstream, vectors: Array) -> str | None:
        """What keeps these vectors of PROBE_TEXTS, or of the first, from standing beside those that were first given.

        Whose they are is remembered as long as the model is served: a driver that replaces this one, or another
        replica's, must not take up with another model.
        """
        if self._is_reranker:
            vectors = as_one(vectors)
        if not np.linalg.norm(vectors, axis=1).all():
            return "it gives vectors of length zero"
        name, reference = self._shared.setdefault("reference", (upstream.name, vectors))
        worst = likeness(vectors, reference[: len(vectors)])
        if worst >= SAME_SPACE_COSINE:
            return None
        return (
            f"it gives other vectors than {name} did: a cosine of {worst:.4f}; "
            "if it is to serve these from now on, switch the model off and on"
        )

    def _check(self) -> None:
        """The life of a thread: addresses that are not asked may prove themselves, and those that are must, too."""
        rounds = itertools.count()
        while not self._over.is_set():
            self._wake.clear()
            all_of_them = next(rounds) % CHECKS_OF_THE_FAULTY == CHECKS_OF_THE_FAULTY - 1
            for upstream in sorted(self._upstreams, key=lambda one: one.fault != NOT_ASKED):
                fault = upstream.fault
                if self._over.is_set() or upstream.rest_s or not (fault or all_of_them):
                    continue
                try:
                    self._prove(upstream)
                    if fault:
                        logger.info("%s: %s is asked from now on", self._model, upstream.name)
                except UpstreamError as error:
                    if fault:
                        upstream.fault = error.for_the_log
                except Exception:  # nobody looks at an address again if this thread dies
                    logger.exception("%s: %s could not be checked", self._model, upstream.name)
            self._publish()
            if not self._over.is_set():
                self._wake.wait(RECHECK_S)

    def _follow(self) -> None:
        """The life of a thread: addresses come and go behind a name."""
        while not self._over.wait(LOOKUP_S):
            try:
                if self._addresses.refresh():
                    self._publish()
                    self._wake.set()
            except Exception:
                logger.exception("%s: its addresses could not be looked up", self._model)

    def _publish(self) -> None:
        """Update /status with the addresses in use, and say if none is left."""
        if self._addresses.are_several:
            self._description["base_urls"] = {u.name: u.fault or "serves" for u in self._upstreams}
        if self._lost is None and not self._over.is_set() and all(u.fault for u in self._upstreams):
            faults = dict.fromkeys(str(u.fault) for u in self._upstreams)
            self._lost = f"left alone after failures in a row: {'; '.join(faults)}"
            self._end()
            self._on_lost(self._lost)


def _is_of_the_way(error: UpstreamError) -> bool:
    """Whether the network or a proxy is likelier to be at fault than a text."""
    return error.passing and error.remote_status != 500


def _pause_s(error: UpstreamError, attempts: int) -> float:
    """Seconds to wait before calling the same address again."""
    if error.retry_after_s is not None:
        return min(error.retry_after_s, LONGEST_RETRY_AFTER_S)
    return BACKOFF_FACTOR_S * (1 << (attempts - 1)) * (1 + random.random())  # noqa: S311  (no secret)


def make_driver(spec: ModelSpec, folders: Folders, shared: dict[str, Any]) -> Driver:
    """Called by the table of drivers, in drivers/__init__.py."""
    assert isinstance(spec.driver.config, HttpConfig)
    return HttpDriver(spec.model, spec.driver.config, folders.state, shared)


def open_tokenizer(spec: ModelSpec, folders: Folders, report: Report) -> Tokenizer:
    """Called by the table of drivers, in drivers/__init__.py."""
    assert isinstance(spec.driver.config, HttpConfig)
    return RemoteTokenizer(spec.driver.config.task)
