"""A repository of the Hugging Face hub: its files from the cache, else from the hub, else the reason in a sentence."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from embedpool.errors import near_names
from embedpool.tasks.driver import Progress, Report, unheard

UNSAFE_OR_UNUSED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.ot", "*.msgpack", "onnx/*", "openvino/*"]
CONVERTED = ("*.bin", "*.pt")  # by `embedpool pull --convert`
MOST_SEARCHED = 50
WAIT_S = 20.0  # for a connection, and for each part of an answer

NO_REPOSITORY = (
    "the hub has no repository {repo!r}, or a private one: check the name, and for a private one set HF_TOKEN in the "
    "server's environment"
)

# What a failure is told as, by the name of an exception or by status, the first that fits; each says what to do.
REASONS = {
    "GatedRepoError": "its authors ask for consent: accept the terms at {hub}/{repo}, and set HF_TOKEN in the server's "
    "environment",
    "DisabledRepoError": "the hub has disabled {repo!r}",
    "RevisionNotFoundError": "the hub has no revision {revision!r} of it: set driver.config.revision to one it has",
    "401": NO_REPOSITORY,
    "403": "the hub refuses access to {repo!r} (403): check what the token in HF_TOKEN may read",
    "404": NO_REPOSITORY,
    "429": "the hub asks for a pause (429); embedpool tries again",
    "HfHubHTTPError": "the hub fails ({status}); embedpool tries again",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE forbids to ask it: copy the model into the cache, or into a folder for "
    "driver.config.path",
    "ProxyError": "the proxy refuses ({words}): check HTTPS_PROXY and NO_PROXY",
    "TimeoutException": "{hub} does not answer within {wait_s:.0f} s; embedpool tries again",
    "ConnectError": "{hub} cannot be reached ({words}); embedpool tries again",
    "JSONDecodeError": "{hub} gives an answer that is none of a hub: check HF_ENDPOINT, and whether a proxy asks for a "
    "login",
}


class NotToBeHad(Exception):
    """The files are not in the cache and cannot be fetched; the message says why."""


def snapshot(repo: str, revision: str | None, report: Report = unheard, *, pickles: bool = False) -> Path:
    """The folder with the repository's files, without those that embedpool never loads. Raises NotToBeHad.

    With `pickles` weights in that form are fetched, too, to be converted.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # The look-up leaves out what the download leaves out: else it takes what is there for the half of it.
    ignored = [pattern for pattern in UNSAFE_OR_UNUSED if not (pickles and pattern in CONVERTED)]
    found = functools.partial(snapshot_download, repo, revision=revision, ignore_patterns=ignored)
    try:
        try:
            folder = found(local_files_only=not pickles)  # which the cache does not tell to be whole
            if not pickles and not any(Path(folder).rglob("*.safetensors")):
                raise LocalEntryNotFoundError(f"{folder} holds no weights: a download was interrupted")
        except LocalEntryNotFoundError:
            _bound_the_wait()
            folder = found(tqdm_class=_reporting(report))
    except Exception as error:  # the library raises many kinds
        raise NotToBeHad(_reason(error, repo, revision)) from None
    return Path(folder)


def _reporting(report: Report) -> type[Any]:
    """A progress bar that shows nothing, and reports instead how many bytes are there of how many."""
    from tqdm import tqdm

    most = Progress("download", 0, 0)

    class Bar(tqdm):  # type: ignore[misc]
        """The library makes several; those that count bytes count the same ones, one of them not all."""

        monitor_interval = 0  # no thread to draw it

        def display(self, *arguments: Any, **options: Any) -> None:
            nonlocal most
            if self.unit == "B" and self.total:
                done, total = max(most.done_bytes or 0, int(self.n)), max(most.total_bytes or 0, int(self.total))
                most = Progress("download", done, total)
                report(most)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            self.display()

        def close(self) -> None:
            pass

    return Bar


def _bound_the_wait() -> None:
    """The library waits for some answers without end."""
    from huggingface_hub import get_session

    hooks: dict[str, list[Any]] = getattr(get_session(), "event_hooks", {})
    if "request" in hooks and _with_time_out not in hooks["request"]:
        hooks["request"].append(_with_time_out)


def _with_time_out(request: Any) -> None:
    """A hook of the library's HTTP client."""
    given = request.extensions.get("timeout") or {}
    bounds = {kind: given.get(kind) or WAIT_S for kind in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": bounds}


def _reason(error: BaseException, repo: str, revision: str | None) -> str:
    from huggingface_hub import constants

    chain = _chain(error)
    statuses = [getattr(getattr(found, "response", None), "status_code", None) for found in chain]
    status = next((found for found in statuses if found), None)
    kinds = {str(status), *(kind.__name__ for found in chain for kind in type(found).__mro__)}
    says = next((says for kind, says in REASONS.items() if kind in kinds), "{words_first}")
    near = _near(repo) if says is NO_REPOSITORY else []
    words_first, words = _first_line(error), _first_line(chain[-1])
    return says.format(
        hub=constants.ENDPOINT, repo=repo, revision=revision, status=status, wait_s=WAIT_S, words=words,
        words_first=words_first,
    ) + (f"; did you mean {' or '.join(near)}?" if near else "")  # fmt: skip


def _near(repo: str) -> list[str]:
    """Names like it, as far as the hub tells."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().list_models(search=repo.rpartition("/")[2], limit=MOST_SEARCHED)
        return near_names(repo, [model.id for model in found])
    except Exception:  # it has just refused once
        return []


def _chain(error: BaseException) -> list[BaseException]:
    """The error and those behind it."""
    chain = [error]
    while (behind := chain[-1].__cause__ or chain[-1].__context__) and behind not in chain:
        chain.append(behind)
    return chain


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
