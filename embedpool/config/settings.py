"""config.yml → frozen Settings. Every key is declared here once, with its default and its meaning."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedpool.config.checks import SECRET_PREFIX, origins, secret_variable
from embedpool.config.fields import option

logger = logging.getLogger(__name__)

DEFAULT_CONFIG_YML = ".config/config.yml"
FORM_BYTES = 1 << 20  # of the form around an uploaded file


def secret_value(variable: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The secret in an environment variable, without the blanks and line ends that mounted files bring."""
    raw = environ.get(variable, "")
    value = raw.strip()
    if value != raw:
        logger.warning("the secret in %s is used without the blanks or line ends around it", variable)
    if (value[:1] in "\"'" and value) or value.lower().startswith("bearer "):
        logger.warning("the secret in %s begins like a quotation or a header, which is taken as part of it", variable)
    return value or None


@dataclasses.dataclass(frozen=True)
class Client:
    """How the command line finds the server."""

    base_url: str | None = option(
        None, "address of the server for the CLI, if no pid file names one; default: server.host and server.port"
    )
    api_key_env: str | None = option(None, "name of the environment variable with the key that the command line sends")


@dataclasses.dataclass(frozen=True)
class Server:
    """Where and how the server listens."""

    host: str = option("127.0.0.1", "address to bind")
    port: int = option(8876, "port to bind", minimum=0, maximum=65535)
    server: str = option("gunicorn", "WSGI server", choices=("gunicorn", "waitress"))
    threads: int = option(0, "request threads; 0 = max_inflight_global + max_streams + 16", minimum=0, maximum=4096)
    workers: int = option(1, "gunicorn worker processes; each holds its own models", minimum=1, maximum=64)
    connection_limit: int = option(
        2000, "connections per process; at the limit the longest idle one is closed", minimum=10, maximum=100000
    )
    idle_connection_s: int = option(120, "the server closes a connection that is idle for so long", minimum=1)
    drain_delay_s: int = option(
        0,
        "how long /ready answers 503 before a server that stops accepts nothing more, for balancers to see it",
        minimum=0,
    )
    graceful_timeout_s: int = option(30, "how long a stop then waits for accepted requests", minimum=0)
    cors_origins: tuple[str, ...] = option(
        (),
        "origins of web pages that may embed, such as https://app.example; *: all, while no key is needed; never the "
        "management",
        check=origins,
    )

    @property
    def longest_stop_s(self) -> int:
        """Until no request is left."""
        return self.drain_delay_s + self.graceful_timeout_s

    def __post_init__(self) -> None:
        if self.host.startswith("[") and self.host.endswith("]"):  # as an IPv6 address stands in a URL
            object.__setattr__(self, "host", self.host[1:-1])


@dataclasses.dataclass(frozen=True)
class Paths:
    """Files and folders; relative ones are relative to the folder that holds `root`."""

    root: str = option(".config", "folder of everything below")
    pool_yml: str = option(".config/pool.yml", "the models: the state of the pool")
    config_yml: str = option(DEFAULT_CONFIG_YML, "this file")
    state_dir: str = option(".config/state", "pid file and other state of a running server")
    logs_dir: str = option(".config/logs", "log of a detached server")
    cache_dir: str = option(".config/cache", "exported model graphs, and the rows of `cache`")


@dataclasses.dataclass(frozen=True)
class Process:
    """The server's process."""

    pid_file: str = option(".config/state/pool.pid", "pid, address and start time of the running server")


@dataclasses.dataclass(frozen=True)
class Logging:
    """The server's log, on standard error."""

    level: str = option("info", "least severe level logged", choices=("debug", "info", "warning", "error"))
    format: str = option("text", "lines for people, or JSON objects", choices=("text", "json"))
    requests: bool = option(True, "a line for each request, at level info")


@dataclasses.dataclass(frozen=True)
class OpenAI:
    """The API of OpenAI."""

    token_ids: str = option(
        "decode",
        "token ids as input; decode: those of cl100k_base become the text they stand for; refuse: an error",
        choices=("decode", "refuse"),
    )


@dataclasses.dataclass(frozen=True)
class Tei:
    """The API of text-embeddings-inference."""

    default_model: str | None = option(
        None, "name or alias of the model at the root of the server; default: the only one there is"
    )


@dataclasses.dataclass(frozen=True)
class Tracing:
    """Spans by OpenTelemetry; the extra `otel`."""

    enabled: bool = option(False, "export spans, as OpenTelemetry's OTEL_… variables say")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What holds where a request or a model says nothing else."""

    request_timeout_s: float = option(120, "deadline of a request", minimum=0.001)
    max_queue_per_model: int = option(1000, "queue bound of a model, in texts", minimum=1)
    max_streams: int = option(32, "bodies of lines (NDJSON) answered at once; above it 429", minimum=1)
    probe_idle_s: float = option(60, "how often an idle replica runs a probe text; 0: never", minimum=0)
    max_inflight_global: int = option(256, "requests served at once; above it 429", minimum=1)


@dataclasses.dataclass(frozen=True)
class HotReload:
    """How edits of pool.yml are noticed."""

    enabled: bool = option(True, "watch pool.yml")
    observer: str = option("native", "the system's file events, or polling", choices=("native", "polling"))
    poll_interval_s: float = option(2, "the server also looks at the file this often", minimum=0.05)
    debounce_ms: int = option(200, "how long the file must stay unchanged after an event", minimum=0)


@dataclasses.dataclass(frozen=True)
class Batching:
    """How waiting texts become batches."""

    max_batch_texts: int = option(64, "texts in a batch", minimum=1)
    max_batch_tokens: int = option(16384, "padded tokens in a batch; bounds memory", minimum=1)
    max_batch_ms: float = option(
        0,
        "longest run time planned for a batch, estimated from timings at warm-up: a new query may have to wait "
        "this long; 0 = 50 ms or 10 times the fixed cost of a call, whichever is larger, half of it while requests "
        "with one text wait beside other work, and a quarter for a batch that begins with one of them",
        minimum=0,
    )
    max_wait_ms: float = option(
        0, "how long a free replica waits for more texts; 0: not at all, load makes the batches", minimum=0
    )


@dataclasses.dataclass(frozen=True)
class Cache:
    """Vectors and scores that were computed before. Texts are never kept, only hashes of them."""

    enabled: bool = option(True, "keep and use them; a model's own `cache` in pool.yml overrides what is kept of it")
    memory_mb: int = option(32, "memory for them, of each worker; 0: none", minimum=0)
    disk_mb: int = option(0, "disk for them, of all workers together; 0: none; needs the extra `cache`", minimum=0)
    path: str | None = option(
        None, "folder on the disk, for servers with this pool.yml alone; default: `rows` in paths.cache_dir"
    )
    share: str = option(
        "key",
        "who finds an entry; key: requests with the API key whose request made it; all: everybody, who can then tell "
        "by the time of an answer what others have asked",
        choices=("key", "all"),
    )


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a request."""

    max_body_bytes: int = option(67_108_864, "size of a request body", minimum=1)
    max_bodies_bytes: int = option(
        268_435_456, "bodies of all requests that are being answered, without those of lines; above it 429", minimum=1
    )
    max_stream_body_bytes: int = option(1_073_741_824, "size of a request body of lines (NDJSON)", minimum=1)
    max_file_bytes: int = option(536_870_912, "size of an uploaded file of a batch", minimum=1)
    max_batch_requests: int = option(1_000_000, "requests in such a file", minimum=1)
    max_files_bytes: int = option(
        10_737_418_240, "files and results of batches on the disk, together; above it 507", minimum=1
    )
    max_answer_bytes: int = option(536_870_912, "size of an answer, estimated beforehand; not of lines", minimum=1)
    max_spooled_bytes: int = option(
        4_294_967_296,
        "bodies over 1 MiB, lines too, from their first byte until they are answered; above it 429",
        minimum=1,
    )
    max_texts_per_request: int = option(20_000, "texts in a request", minimum=1)
    max_chars_per_text: int = option(1_000_000, "characters in a text", minimum=1)


@dataclasses.dataclass(frozen=True)
class Security:
    """Who may manage the pool."""

    admin_key_env: str | None = option(
        None,
        f"name of the variable ({SECRET_PREFIX}…) with the key that management requires; without one only this "
        "machine may manage",
        check=secret_variable,
    )
    embed_key_env: str | None = option(
        None,
        f"name of the variable ({SECRET_PREFIX}…) with a key for embedding; `keys_file` holds further ones",
        check=secret_variable,
    )
    keys_file: str = option(".config/keys.yml", "keys as hashes, with scopes, models and limits; see `embedpool key`")
    keys: str = option(
        "auto",
        "who is asked for a key; auto: everybody, as soon as a key of any scope exists; required: everybody, and "
        "without keys.yml the server does not start; off: nobody",
        choices=("auto", "required", "off"),
    )
    model_roots: tuple[str, ...] = option((), "allowlist of folders for `driver.config.path`; empty: any folder")
    remote_hosts: tuple[str, ...] = option(
        (), "allowlist of hosts for remote models, with * for a part; empty: all but link-local and metadata addresses"
    )
    insecure: bool = option(False, "listen on other than loopback addresses although no key exists")
    allowed_hosts: tuple[str, ...] = option(
        (), "further Host names that management accepts, beside loopback names and `server.host`"
    )


@dataclasses.dataclass(frozen=True)
class Ray:
    """The cluster of models with `place: ray`. Whoever reaches it runs code there, so it is chosen here alone."""

    address: str | None = option(
        None,
        "host:port of a cluster's head, of which this machine is a node; auto: the one that runs here; default: one is "
        "started on this machine alone, for as long as the server runs",
        pattern=r"^(auto|[A-Za-z0-9._:\[\]-]+:[0-9]+)\Z",
    )
    namespace: str = option("embedpool", "Ray's namespace of the actors")
    wait_for_room_s: float = option(
        30,
        "how long a replica waits for room on the cluster; then it says what is missing, and is tried again",
        minimum=1,
        maximum=540,
    )
    object_store_mb: int = option(256, "shared memory of a cluster that embedpool starts", minimum=80)


@dataclasses.dataclass(frozen=True)
class Ui:
    """The page for people."""

    enabled: bool = option(True, "the page at /ui, with its data at /live and /log")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of config.yml. `base_dir` is the folder that relative paths are relative to."""

    version: int = option(1, "format of this file", minimum=1, maximum=1)
    client: Client = dataclasses.field(default_factory=Client)
    server: Server = dataclasses.field(default_factory=Server)
    paths: Paths = dataclasses.field(default_factory=Paths)
    process: Process = dataclasses.field(default_factory=Process)
    logging: Logging = dataclasses.field(default_factory=Logging)
    tracing: Tracing = dataclasses.field(default_factory=Tracing)
    openai: OpenAI = dataclasses.field(default_factory=OpenAI)
    tei: Tei = dataclasses.field(default_factory=Tei)
    defaults: Defaults = dataclasses.field(default_factory=Defaults)
    hot_reload: HotReload = dataclasses.field(default_factory=HotReload)
    batching: Batching = dataclasses.field(default_factory=Batching)
    cache: Cache = dataclasses.field(default_factory=Cache)
    limits: Limits = dataclasses.field(default_factory=Limits)
    security: Security = dataclasses.field(default_factory=Security)
    ray: Ray = dataclasses.field(default_factory=Ray)
    ui: Ui = dataclasses.field(default_factory=Ui)
    base_dir: Path = dataclasses.field(default=Path(), init=False, compare=False)

    def file(self, relative: str) -> Path:
        """A path of this file, made absolute."""
        return self.base_dir / relative

    @property
    def base_url(self) -> str:
        """Where the command line looks for a server that no pid file names."""
        return self.client.base_url or url_at(self.server.host, self.server.port)

    @property
    def threads(self) -> int:
        """Request threads: one for each admitted request and each body of lines, and a reserve for management."""
        return self.server.threads or self.defaults.max_inflight_global + self.defaults.max_streams + 16


def url_at(host: str, port: int) -> str:
    """The URL at which a program on this machine reaches a server that listens at this address."""
    return f"http://{shown({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host))}:{port}"  # noqa: S104


def shown(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


SECTIONS: dict[str, type[Any]] = {
    f.name: f.default_factory  # type: ignore[misc]
    for f in dataclasses.fields(Settings)
    if f.default_factory is not dataclasses.MISSING
}
