"""`embedpool embed --in …` and `embedpool rerank --in …`: files in, a file out, on a server or in this process."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedpool.cli.common import (
    FAILED,
    NOT_RUNNING,
    OK,
    Arguments,
    UsageError,
    assignments,
    client_of,
    read_settings,
)
from embedpool.errors import EmbedpoolError, ServerUnreachable

if TYPE_CHECKING:
    from embedpool.client import Client
    from embedpool.config.settings import Settings
    from embedpool.jobs.file_job import Compute, FileJob, Progress
    from embedpool.jobs.sources import Row

TEXT, QUERY, DOCUMENT = "text", "query", "document"
OUT = ".vectors.jsonl", ".scores.jsonl"
PATIENCE_S = 300.0  # with a server that is busy, or being started anew
LONGEST_CALL_S = 3600.0  # the server has a deadline of its own
ASK_EVERY_S = 1.0


def from_files(arguments: Arguments, *, pairs: bool, choose: Callable[[list[dict[str, Any]]], str]) -> int:
    """Run the job; `choose` names the model where the command does not."""
    from embedpool.jobs.file_job import FileJob
    from embedpool.jobs.sinks import SCORE, VECTOR, sink_of
    from embedpool.jobs.sources import Files

    options = options_of(arguments)
    if odd := {"model", "on_error", "encoding"} & set(options):
        raise UsageError(f"not an option of a job: {', '.join(sorted(odd))}")
    columns = [arguments["--query-column"] or QUERY, arguments["--column"] or DOCUMENT] if pairs else [
        arguments["--column"] or TEXT
    ]  # fmt: skip
    given = [*arguments["--in"], *arguments["MORE"]]  # where the shell has made several of a glob
    files = Files(given, columns, arguments["--id-column"])
    out = Path(arguments["--out"] or Path(given[0]).name + OUT[pairs])
    settings = read_settings(arguments)
    with contextlib.ExitStack() as stack:
        client = None if arguments["--local"] else client_of(settings)
        if client is None and not arguments["--local"]:
            print("not running; --local computes in this process", file=sys.stderr)
            return NOT_RUNNING
        if client is not None:
            stack.enter_context(client)
        model = arguments["--model"] or choose(_models(settings, client))
        work = {"model": model, "options": options, "columns": columns, "id_column": arguments["--id-column"]}
        job = FileJob(files, sink_of(out, SCORE if pairs else VECTOR), work)
        _require_a_fresh_place(job, out, resume=arguments["--resume"])
        if client is not None:
            compute = _of_a_server(client, model, options, pairs=pairs)
        else:
            from embedpool.in_process import computing

            compute = stack.enter_context(computing(settings, model, options, pairs=pairs))
        began_s = time.monotonic()
        with _shown(job) as tell:
            try:
                done = job.run(compute, tell)
            except OSError as error:
                raise EmbedpoolError(
                    f"{error.strerror}: {error.filename or out}; --resume goes on where it was"
                ) from None
            except KeyboardInterrupt:
                print(f"stopped after {job.progress.rows:,} inputs; --resume goes on", file=sys.stderr)
                return FAILED
    _sum_up(job, done, out, time.monotonic() - began_s)
    return FAILED if done.failed else OK


def options_of(arguments: Arguments) -> dict[str, Any]:
    """What --set says, and --output."""
    found = assignments(arguments)
    if named := arguments["--output"]:
        found["output"] = named.split(",")
    return found


def _models(settings: Settings, client: Client | None) -> list[dict[str, Any]]:
    """What the pool has, in /status' words; of a pool.yml only the names are known."""
    if client is not None:
        models: list[dict[str, Any]] = client.status()["models"]
        return models
    from embedpool.config.pool_yml import PoolFile

    spec = PoolFile(settings.file(settings.paths.pool_yml)).read()
    return [{"model": model.model, "kinds": []} for model in spec.models]


def _require_a_fresh_place(job: FileJob, out: Path, *, resume: bool) -> None:
    """Raises UsageError where something would be lost."""
    if job.has_begun and not resume:
        raise UsageError(f"{out}: a job has begun to write it; --resume goes on, or delete {out}.job")
    if not job.has_begun and out.exists():
        raise UsageError(f"{out} exists" + ("; its job is done" if resume else ""))


def _of_a_server(client: Client, model: str, options: dict[str, Any], *, pairs: bool) -> Compute:
    """Each of the threads has a connection of its own. A server that is started anew is waited for."""
    from embedpool.jobs.file_job import Computed

    def compute(rows: Sequence[Row]) -> Computed:
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                with client.again(timeout_s=LONGEST_CALL_S, retry_s=PATIENCE_S) as own:
                    if pairs:
                        each = own.score_each([(row.parts[0], row.parts[1]) for row in rows], model=model, **options)
                    else:
                        each = own.embed_each([row.parts[0] for row in rows], model=model, **options)
                return Computed(each.values, each.errors, each.space, each.tokens, len(each.truncated))
            except ServerUnreachable:
                if time.monotonic() >= until_s:
                    raise
                time.sleep(ASK_EVERY_S)

    return compute


@contextlib.contextmanager
def _shown(job: FileJob) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal: inputs, their rate, the time that is left by the bytes that are, failures."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from tqdm import tqdm

    from embedpool.jobs.speed import Speed

    bar = tqdm(total=job.total_bytes, file=sys.stderr, leave=False, bar_format="{percentage:3.0f}% |{bar}| {desc}")
    speed: Speed | None = None
    rows = 0

    def tell(progress: Progress) -> None:
        nonlocal speed, rows
        says = f"{progress.rows:,} inputs"
        if speed is None:  # what an earlier run has done is not of this speed
            speed = Speed(progress.bytes, job.total_bytes)
        else:
            speed.add(progress.bytes, progress.rows - rows)
            says += f", {speed.requests_s:,.0f}/s, {bar.format_interval(speed.seconds_left)} left"
        rows = progress.rows
        says += f", {progress.failed:,} failed" if progress.failed else ""
        bar.set_description_str(says, refresh=False)
        bar.n = progress.bytes
        bar.refresh()

    try:
        yield tell
    finally:
        bar.close()


def _sum_up(job: FileJob, done: Progress, out: Path, seconds: float) -> None:
    """On stderr."""
    says = [f"{done.rows - done.failed:,} inputs in {out}", f"{done.tokens:,} tokens", f"{seconds:.1f} s"]
    if done.truncated:
        says.append(f"{done.truncated:,} truncated")
    if done.failed:
        says.append(f"{done.failed:,} failed, see {job.failures}")
    print(", ".join(says), file=sys.stderr)
