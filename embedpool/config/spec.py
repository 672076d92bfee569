"""Frozen descriptions of what the pool should be, and the difference between two of them.

Every key of pool.yml is declared here once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Iterable
from typing import Any, ClassVar

import marshmallow as ma
from marshmallow import fields, validate

from embedpool.config.checks import (
    DNS,
    MODEL_SLOT,
    SECRET_PREFIX,
    TEXT_SLOT,
    TEXTS_SLOT,
    absolute,
    as_json,
    holds_a_text,
    holds_texts,
    proxy_url,
    remote_url,
    remote_urls,
    secret_variable,
    secret_variables,
)
from embedpool.config.fields import StrictSchema, option, schema_of

PROTOCOLS_OF_TASK = {  # of the others each protocol
    "rerank": ("embedpool", "cohere", "jina", "tei"),
    "sparse": ("embedpool", "tei"),
    "multivector": ("embedpool", "tei", "jina"),
}
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,199}\Z"

PLACES = ("thread", "process", "ray")
ISOLATION = ("thread", "process")


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """The part of a driver.config that all drivers of local models have.

    Of every driver's the pool reads `is_remote`, `max_batch_texts`, `max_batch_chars`, `max_seq_length`, `normalize`,
    `dtype`, `prompts`.
    """

    is_remote: ClassVar = False
    max_batch_texts: ClassVar = None
    max_batch_chars: ClassVar = None

    isolation: str | None = option(None, "older spelling of the model's `place`", choices=ISOLATION, loads=True)
    max_rss_mb: int | None = option(
        None, "memory of a child process (`place: process`) above which embedpool replaces it", minimum=1
    )
    batch_timeout_s: float | None = option(
        None,
        "run time of a batch after which embedpool replaces the child process; default defaults.request_timeout_s",
        minimum=0.001,
    )


@dataclasses.dataclass(frozen=True)
class LocalStConfig(LocalConfig):
    """driver.config of a local SentenceTransformer model."""

    max_seq_length: int | None = option(None, "number of tokens kept of a text; default: the model's own", minimum=1)
    normalize: bool = option(True, "vectors of length 1")
    dtype: str = option("float32", "type of the vectors given out", choices=("float32", "float16"))
    prompts: dict[str, str] = option({}, "named prompts, which add to the model's own or replace them")
    path: str | None = option(None, "folder of the model, instead of looking up its name", check=absolute, loads=True)
    revision: str | None = option(None, "branch, tag or commit of the model", loads=True)
    backend: str = option(
        "auto",
        "runtime; auto: openvino if it is installed and gives the same vectors, else torch",
        choices=("auto", "torch", "openvino", "onnx"),
        loads=True,
    )
    compute_dtype: str = option(
        "auto",
        "arithmetic of the model; auto is float32",
        choices=("auto", "float32", "bfloat16", "float16"),
        loads=True,
    )
    profile: str = option(
        "exact",
        "exact: the float32 vectors of encode; fast: bfloat16 on OpenVINO if that is measurably faster, /status shows "
        "the cosine; an explicit compute_dtype takes precedence",
        choices=("exact", "fast"),
        loads=True,
    )
    device: str = option("cpu", "torch device", loads=True)
    trust_remote_code: bool = option(False, "run code shipped with the model; only from this file", loads=True)
    task: str | None = option(
        None,
        "what the model is served for; default: what its files say; embed: its encoder, whatever its kind",
        choices=("embed", "rerank", "classify", "sparse", "multivector"),
        loads=True,
    )


@dataclasses.dataclass(frozen=True)
class HttpConfig:
    """driver.config of a remote embedding service."""

    is_remote: ClassVar = True
    max_seq_length: ClassVar = None

    base_url: str = option(dataclasses.MISSING, "address; its form depends on `protocol`", check=remote_url, loads=True)
    base_urls: tuple[str, ...] = option(
        (),
        "further addresses of the same model; embedpool uses one while it returns the same vectors as the first; "
        f"with {DNS} before it a URL stands for all addresses of its host's name, which is looked up every few seconds",
        check=remote_urls,
        loads=True,
    )
    protocol: str = option(
        "embedpool",
        "embedpool, template: the full URL; openai, jina, voyage: ends in /v1; tei, cohere, ollama: the server's root",
        choices=("embedpool", "openai", "tei", "cohere", "jina", "voyage", "ollama", "template"),
        loads=True,
    )
    task: str = option(
        "embed",
        "what it is asked for; all but embed not of every protocol",
        choices=("embed", "rerank", "sparse", "multivector"),
        loads=True,
    )
    request: dict[str, Any] = option(
        {},
        f"body of a call (template): {MODEL_SLOT} and {TEXTS_SLOT} stand for the name there and the list of texts; "
        f"a list of one entry with {TEXT_SLOT} in it gets an entry for each text",
        check=as_json,
        loads=True,
    )
    vectors: str | None = option(
        None,
        "where the vectors stand in the answer (template), such as data[].embedding",
        pattern=r"^(\w[\w-]*(\.\w[\w-]*)*)?(\[\](\.\w[\w-]*)*)*\Z",
        loads=True,
    )
    remote_model: str | None = option(None, "the model's name there; default its name here", loads=True)
    timeout_s: float = option(60, "time-out of a call", minimum=0.001)
    retries: int = option(
        2,
        "retries after a connection error or 5xx, possibly at another address; over time at most a fifth of calls",
        minimum=0,
        maximum=20,
    )
    max_batch_texts: int = option(64, "texts in one call", minimum=1)
    max_batch_chars: int | None = option(
        None, "characters of the texts in one call; a longer text goes alone; default: no limit", minimum=1
    )
    api_key: str | None = option(
        None,
        f"name of the environment variable ({SECRET_PREFIX}…) with the bearer key",
        check=secret_variable,
        loads=True,
    )
    headers: dict[str, str] = option(
        {},
        f"header → name of the environment variable ({SECRET_PREFIX}…) with its value",
        check=secret_variables,
        loads=True,
    )
    proxy: str | None = option(
        None,
        "a proxy's http:// or https:// URL, or env: what HTTP_PROXY, HTTPS_PROXY and NO_PROXY say; loopback addresses "
        "are always reached directly",
        check=proxy_url,
        loads=True,
    )
    normalize: bool = option(True, "vectors of length 1")
    dtype: str = option("float32", "type of the vectors given out", choices=("float32", "float16"))
    prompts: dict[str, str] = option({}, "named prompts, which embedpool puts before the text")

    def __post_init__(self) -> None:
        able = PROTOCOLS_OF_TASK.get(self.task)
        if able and self.protocol not in able:
            raise ma.ValidationError({"protocol": [f"of task {self.task} is one of {', '.join(able)}"]})
        if self.proxy and any(url.startswith(DNS) for url in self.addresses):
            raise ma.ValidationError({"proxy": [f"looks names up itself, so it cannot stand beside {DNS}"]})
        is_template = self.protocol == "template"
        for name in ("request", "vectors"):
            if bool(getattr(self, name)) != is_template:
                says = "is needed by" if is_template else "is for"
                raise ma.ValidationError({name: [f"{says} protocol template"]})
        if not is_template or holds_texts(self.request):
            return
        if self.max_batch_texts > 1 or not holds_a_text(self.request):
            message = f"has no {TEXTS_SLOT}, nor a list of one entry with {TEXT_SLOT}"
            raise ma.ValidationError({"request": [f"{message}; with {TEXT_SLOT} elsewhere max_batch_texts must be 1"]})

    @property
    def addresses(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys((self.base_url, *self.base_urls)))


@dataclasses.dataclass(frozen=True)
class FakeConfig(LocalConfig):
    """driver.config of the deterministic stand-in: tests, demos, load tests of everything else."""

    dim: int = option(384, "size of its vectors", minimum=1, maximum=65536, loads=True)
    task: str = option(
        "embed",
        "what it stands for; hybrid: a model that gives dense, sparse and multi-vector rows",
        choices=("embed", "rerank", "classify", "sparse", "multivector", "hybrid"),
        loads=True,
    )
    labels: int = option(3, "labels of a classifier", minimum=2, maximum=1000, loads=True)
    delay_ms: float = option(0, "time a batch takes", minimum=0, loads=True)
    delay_ms_per_text: float = option(0, "further time per text", minimum=0, loads=True)
    load_delay_ms: float = option(0, "time loading takes", minimum=0, loads=True)
    fault: str = option(
        "none",
        "what goes wrong: batches that raise, return NaN or too few vectors, never end, hold on to memory, or crash "
        "their process; or loading itself",
        choices=("none", "raise", "nan", "short", "hang", "grow", "crash", "load"),
        loads=True,
    )
    fault_text: str = option("", "only texts that contain this are at fault", loads=True)
    max_seq_length: int | None = option(None, "tokens kept of a text; default 512", minimum=1, maximum=512)
    normalize: bool = option(True, "vectors of length 1")
    dtype: str = option("float32", "type of the vectors given out", choices=("float32", "float16"))
    prompts: dict[str, str] = option({}, "named prompts")


DriverConfig = LocalStConfig | HttpConfig | FakeConfig
DRIVER_CONFIGS: dict[str, type[Any]] = {"local_st": LocalStConfig, "http": HttpConfig, "fake": FakeConfig}


@dataclasses.dataclass(frozen=True)
class DriverSpec:
    """What runs the model; the class of `config` goes with `type`."""

    type: str
    config: DriverConfig


class DriverSchema(StrictSchema):
    """`type` chooses the schema of `config`."""

    type = fields.String(
        required=True,
        validate=validate.OneOf(tuple(DRIVER_CONFIGS), error=f"must be one of {', '.join(DRIVER_CONFIGS)}"),
    )
    config = fields.Dict(load_default=dict)

    @ma.post_load
    def build(self, data: dict[str, Any], **kwargs: Any) -> DriverSpec:
        """The driver's spec, its config checked by the schema of its type."""
        try:
            config_class: Any = DRIVER_CONFIGS[data["type"]]
            config = schema_of(config_class)().load(data["config"])
        except ma.ValidationError as error:
            raise ma.ValidationError({"config": error.messages}) from None
        return DriverSpec(data["type"], config)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Replicas of a model. A replica is one driver instance, the unit of memory."""

    min: int = option(
        1, "minimum number of replicas; 0 loads the model at first use and unloads it when idle", minimum=0, maximum=64
    )
    max: int = option(1, "maximum number of replicas (never below min)", minimum=1, maximum=64)
    idle_ttl_s: float = option(30, "how long a replica above min may be idle", minimum=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max", max(self.min, self.max))


@dataclasses.dataclass(frozen=True)
class QueueSpec:
    """The model's queue."""

    max_size: int | None = option(None, "longest queue, in texts; default defaults.max_queue_per_model", minimum=1)
    max_inflight_per_replica: int | None = option(
        None, "batches at once in a replica; default by driver", minimum=1, maximum=256
    )


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a replica of `place: ray` asks of its cluster."""

    num_cpus: float = option(1, "CPUs of a node; whole ones from 1 on", minimum=0.01, loads=True)
    num_gpus: float = option(0, "GPUs of a node; a part of one, or whole ones", minimum=0, loads=True)
    memory_mb: int | None = option(
        None, "memory that Ray counts for it; default: none is counted", minimum=1, loads=True
    )
    custom: dict[str, float] = option(
        {}, "further resources, by the names that the cluster's nodes give them", loads=True
    )


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One entry of pool.yml."""

    model: str = option(dataclasses.MISSING, "name: a Hugging Face id for local models", pattern=NAME_PATTERN)
    driver: DriverSpec = option(dataclasses.MISSING, "what runs the model", schema=DriverSchema)
    alias: str | None = option(None, "second name, unique among names and aliases", pattern=NAME_PATTERN)
    place: str = option(
        "thread",
        "where a local model runs; thread: in the server's process; process: each replica in a child process, whose "
        "crash, hang or growth ends nothing else; ray: each on a node of a Ray cluster, see `ray` in config.yml",
        choices=PLACES,
    )
    resources: Resources = dataclasses.field(default_factory=Resources)
    enabled: bool = option(True, "whether the model is served")
    cache: str = option(
        "auto",
        "whether its rows are kept in the cache (`cache` in config.yml); auto: those of a local model that computes, "
        "not those of a remote one, which may change unseen",
        choices=("auto", "on", "off"),
    )
    scaling: Scaling = dataclasses.field(default_factory=Scaling)
    queue: QueueSpec = dataclasses.field(default_factory=QueueSpec)

    def __post_init__(self) -> None:
        if self.alias == self.model:
            object.__setattr__(self, "alias", None)
        config = self.driver.config
        if self.place != "thread" and config.is_remote:
            raise ma.ValidationError({"place": ["a remote service runs elsewhere already: place is for local models"]})
        if self.place != "ray" and self.resources != Resources():
            raise ma.ValidationError({"resources": ["are of place: ray"]})
        if isinstance(config, LocalConfig) and config.isolation is not None:
            if self.place not in ("thread", config.isolation):
                raise ma.ValidationError(
                    {"place": [f"contradicts driver.config.isolation, which is {config.isolation}"]}
                )
            object.__setattr__(self, "place", config.isolation)  # two spellings of a spec are equal
            driver = dataclasses.replace(self.driver, config=dataclasses.replace(config, isolation=None))
            object.__setattr__(self, "driver", driver)

    @property
    def names(self) -> tuple[str, ...]:
        """The names a request may use."""
        return (self.model, self.alias) if self.alias else (self.model,)

    @property
    def load_key(self) -> Hashable:
        """Equal for specs that one loaded model can serve; everything else applies at once."""
        config = self.driver.config
        values = [
            (field.name, getattr(part, field.name))
            for part in (config, self.resources)
            for field in dataclasses.fields(part)
            if field.metadata["loads"]
        ]
        loaded = tuple((name, json.dumps(v, sort_keys=True) if isinstance(v, dict) else v) for name, v in values)
        return self.model, self.enabled, self.place, self.driver.type, loaded


@dataclasses.dataclass(frozen=True)
class PoolSpec:
    """All of pool.yml. Names and aliases are unique together."""

    models: tuple[ModelSpec, ...] = ()

    def find(self, name: str) -> ModelSpec | None:
        """The model of this name, else of this alias."""
        by_name = {m.model: m for m in self.models}
        by_alias = {m.alias: m for m in self.models if m.alias}
        return by_name.get(name) or by_alias.get(name)

    @property
    def names(self) -> list[str]:
        """All names and aliases."""
        return [name for m in self.models for name in m.names]


@dataclasses.dataclass(frozen=True)
class Diff:
    """What changed from one PoolSpec to the next; `changed` holds the new specs."""

    added: tuple[ModelSpec, ...]
    changed: tuple[ModelSpec, ...]
    removed: tuple[str, ...]


def diff(old: PoolSpec | Iterable[ModelSpec], new: PoolSpec) -> Diff:
    """The difference by model name."""
    before = {m.model: m for m in (old.models if isinstance(old, PoolSpec) else old)}
    after = {m.model: m for m in new.models}
    return Diff(
        added=tuple(m for name, m in after.items() if name not in before),
        changed=tuple(m for name, m in after.items() if name in before and before[name] != m),
        removed=tuple(name for name in before if name not in after),
    )
