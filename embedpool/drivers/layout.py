"""What a model's folder holds: its kind, its modules and their order, prompts and limits; or why it is not served.

It is read from small files and the headers of weights alone, without torch and without running code of the model's.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from embedpool.config.spec import LocalStConfig
from embedpool.errors import ModelFailed

LFS_POINTER = b"version https://git-lfs"

EMBED = "embed"
KINDS = {
    EMBED: "an embedder",
    "rerank": "a reranker",
    "classify": "a classifier",
    "sparse": "a sparse encoder",
    "multivector": "a multi-vector model",
}
OTHER_HEADS = {
    "HF_ColBERT": "multivector",
    "ForRetrieval": "a model of images",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a finder of answers",
    "ForMultipleChoice": "a chooser among answers",
    "ForImageClassification": "a classifier of images",
}

# model_type in config_sentence_transformers.json → kind; what has none is an embedder.
ARCHETYPES = {
    "CrossEncoder": "rerank",
    "SparseEncoder": "sparse",
    "MultiVectorEncoder": "multivector",
    "ColBERT": "multivector",
}
# Class of a module → kind. Classes have moved between packages, so their last names count.
TELLING_MODULES = {
    "SpladePooling": "sparse",
    "MLMTransformer": "sparse",
    "SparseStaticEmbedding": "sparse",
    "SparseAutoEncoder": "sparse",
    "CSRSparsity": "sparse",
    "IDF": "sparse",
    "LogitScore": "rerank",
    "MultiVectorMask": "multivector",
}
ROUTERS = ("Router", "Asym")
TRANSFORMER, STATIC = "Transformer", "StaticEmbedding"
NOT_FROM_TEXT_IDS = {
    "CLIPModel": "reads images beside texts",
    "WordEmbeddings": "splits texts into words by itself",
    "BoW": "splits texts into words by itself",
}
WITH_WEIGHTS = (TRANSFORMER, STATIC, "Dense", "LSTM", "CNN", "LayerNorm", "WeightedLayerPooling")

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "sparse_linear", "colbert_linear", "scaler")
CONVERT = (
    'convert it with `python -c "from sentence_transformers import SentenceTransformer as S; '
    "S('OLD').save_pretrained('NEW')\"`, where OLD is a model that you trust, and set driver.config.path to NEW"
)
TRUSTED = "if you trust its authors and have read it, set driver.config.trust_remote_code to true in pool.yml"

# Names that sentence-transformers has given to a Transformer's settings, in the order in which it looks for them.
TRANSFORMER_SETTINGS = [
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
NOT_HONOURED = ("query_length", "document_length", "query_expansion")


@dataclasses.dataclass(frozen=True)
class Module:
    """A step of a model; `kind` is the last name of its class, `type` all of it."""

    type: str
    folder: Path

    @property
    def is_known(self) -> bool:
        """Whether it is the library's own, not code that comes with a model."""
        return "." not in self.type or self.type.startswith("sentence_transformers.")

    @property
    def kind(self) -> str:
        """The class without its package."""
        return self.type.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A folder that is served.

    `routes` are the ways through the model by name: one that is called "" where it treats all texts alike. `by_task`
    names the route for what texts are for (query, document, …), and at "" where nothing is said, if the model allows
    it. `dimensions` are how many numbers of a vector it gives by default, None for all. `assumed` says what no file
    says.
    """

    folder: Path
    kind: str
    routes: Mapping[str, Sequence[Module]]
    by_task: Mapping[str, str]
    prompts: Mapping[str, str]
    default_prompt_name: str
    dimensions: int | None
    assumed: str | None


def read_layout(folder: Path, config: LocalStConfig) -> Layout:
    """Raises ModelFailed with the reason, and what mends it, for a folder that is not served."""
    settings = read_json(folder / "config_sentence_transformers.json")
    modules = _modules(folder)
    kind, assumed = _kind_of(folder, settings, modules, config)
    if not modules or assumed:
        modules = _assumed_modules(folder)
    routes, by_task = _routes(modules)
    steps = [module for route in routes.values() for module in route]
    if not config.trust_remote_code:
        _require_known_code(steps)
    _require_served(steps)
    _require_safetensors(folder, steps, config)
    prompts = {k: v for k, v in (settings.get("prompts") or {}).items() if isinstance(v, str)}
    return Layout(
        folder,
        kind,
        routes,
        by_task,
        {} if assumed else prompts,  # those of another kind of model would be another's
        "" if assumed else settings.get("default_prompt_name") or "",
        None if assumed else settings.get("truncate_dim"),
        assumed,
    )


# --- its kind


def _kind_of(
    folder: Path, settings: Mapping[str, Any], modules: Sequence[Module], config: LocalStConfig
) -> tuple[str, str | None]:
    """The kind, and what is assumed of pooling where no file says it. Raises ModelFailed for one that is not served."""
    found, why = _found(folder, settings, modules)
    if EMBED not in (found, config.task):
        what = KINDS.get(found, found)
        raise ModelFailed(
            f"{folder} is {what}: {why}. embedpool serves embedders; to serve its encoder as one, whose vectors its "
            "authors may never have meant, set driver.config.task to embed"
        )
    if modules and found == EMBED:
        return EMBED, None
    if is_model2vec(folder):
        return EMBED, None
    architecture = _architecture(folder)
    is_causal = architecture.endswith("ForCausalLM") and read_json(folder / "config.json").get("is_causal", True)
    pooling = "the last token's vector is taken" if is_causal else "token vectors are averaged"
    reason = "no modules.json says how" if found == EMBED else f"it is {KINDS.get(found, found)}, served by task: embed"
    return EMBED, f"{pooling}, as sentence-transformers does: {reason}"


def _found(folder: Path, settings: Mapping[str, Any], modules: Sequence[Module]) -> tuple[str, str]:
    """The kind that the files tell, and by what."""
    archetype = str(settings.get("model_type") or "")
    if archetype in ARCHETYPES:
        return ARCHETYPES[archetype], f"its config_sentence_transformers.json says {archetype}"
    for module in _with_routes(modules):
        if module.kind in TELLING_MODULES:
            return TELLING_MODULES[module.kind], f"its modules.json names {module.kind}"
    return (EMBED, "it has a modules.json") if modules else _of_architecture(folder)


def _of_architecture(folder: Path) -> tuple[str, str]:
    """The kind of a folder that only transformers knows, and by what."""
    config, architecture = read_json(folder / "config.json"), _architecture(folder)
    says = f"its config.json says {architecture}"
    if architecture.endswith("ForSequenceClassification"):
        labels = config.get("num_labels") or len(config.get("id2label") or (0, 0))
        return ("rerank" if labels == 1 else "classify"), f"{says} with {labels} label{'s' * (labels != 1)}"
    kind = next((kind for end, kind in OTHER_HEADS.items() if architecture.endswith(end)), EMBED)
    return kind, says


def _architecture(folder: Path) -> str:
    architectures = read_json(folder / "config.json").get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def is_model2vec(folder: Path) -> bool:
    """Whether its weights are a table in model2vec's form."""
    file = folder / "model.safetensors"
    return file.is_file() and "embeddings" in weight_names(file)


# --- its modules


def _modules(folder: Path) -> list[Module]:
    entries = read_json(folder / "modules.json", list)
    try:
        return [Module(str(entry["type"]), _inside(folder, str(entry.get("path") or ""))) for entry in entries]
    except (KeyError, TypeError, AttributeError):
        raise ModelFailed(f"{folder / 'modules.json'} is no list of modules with type and path") from None


def _inside(folder: Path, name: str) -> Path:
    """A folder below another. Raises ModelFailed for one elsewhere."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelFailed(f"{folder} names a module outside of it: {name!r}")
    return folder / name


def _assumed_modules(folder: Path) -> list[Module]:
    """Of a folder that has no modules.json, or one for another kind of model."""
    if is_model2vec(folder):
        return [Module(STATIC, folder)]
    if not (folder / "config.json").exists() and not _other_format(folder):
        raise ModelFailed(f"{folder} holds no model: it has neither modules.json nor config.json")
    return [Module(TRANSFORMER, folder), Module("Pooling", folder / "1_Pooling")]


def _with_routes(modules: Iterable[Module]) -> list[Module]:
    """All of them, those of a router's routes too."""
    found: list[Module] = []
    for module in modules:
        found.append(module)
        if module.kind in ROUTERS:
            found += [Module(str(type_), module.folder / name) for name, type_ in _router(module)["types"].items()]
    return found


def _routes(modules: Sequence[Module]) -> tuple[dict[str, list[Module]], dict[str, str]]:
    """The ways through the model, and which one is for what."""
    routers = [module for module in modules if module.kind in ROUTERS]
    if not routers:
        return {"": list(modules)}, {"": ""}
    if modules[0] is not routers[0] or len(routers) > 1:
        raise ModelFailed(f"{routers[-1].folder}: a router is served as the first module alone")
    router = _router(routers[0])
    routes: dict[str, list[Module]] = {}
    for name, ids in router["structure"].items():
        steps = [Module(str(router["types"][i]), _inside(routers[0].folder, i)) for i in ids]
        routes[str(name)] = [*steps, *modules[1:]]
    return routes, _by_task(router.get("parameters") or {}, routes)


def _router(module: Module) -> dict[str, Any]:
    found = read_json(module.folder / "router_config.json") or read_json(module.folder / "config.json")
    if not isinstance(found.get("types"), dict) or not isinstance(found.get("structure"), dict):
        raise ModelFailed(f"{module.folder / 'router_config.json'} names no types and structure of its routes")
    return dict(found)


def _by_task(parameters: Mapping[str, Any], routes: Mapping[str, Any]) -> dict[str, str]:
    """What sentence-transformers' router finds for texts, for each task that it knows."""
    mappings: dict[Any, str] = {}
    for key, route in (parameters.get("route_mappings") or {}).items():
        with contextlib.suppress(ValueError, SyntaxError):  # the library skips it, too
            mappings[ast.literal_eval(key)] = route
    default = parameters.get("default_route")
    if default is None and parameters.get("allow_empty_key", True):
        default = next(iter(routes))
    tasks = dict.fromkeys([None, "query", "document", *routes, *(key[0] for key in mappings)])
    found: dict[str, str] = {}
    for task in tasks:
        keys = ((task, "text"), (task, None), (None, "text"), (None, None))
        mapped = next((mappings[key] for key in keys if key in mappings), None)
        route = mapped or (task if task in routes else "text" if "text" in routes else None if task else default)
        if route in routes:
            found[task or ""] = str(route)
    return found


# --- what is not served


def _require_known_code(steps: Iterable[Module]) -> None:
    for module in steps:
        if not module.is_known:
            raise ModelFailed(f"its module {module.type} is code that comes with the model: {TRUSTED}")


def _require_served(steps: Iterable[Module]) -> None:
    for module in steps:
        if reason := NOT_FROM_TEXT_IDS.get(module.kind):
            raise ModelFailed(f"its module {module.kind} {reason}, which embedpool does not serve")
        if module.kind != TRANSFORMER:
            continue
        settings = transformer_settings(module.folder)
        if unserved := [name for name in NOT_HONOURED if settings.get(name)]:
            raise ModelFailed(f"{module.folder} sets {' and '.join(unserved)}, which embedpool does not honour yet")


def _require_safetensors(folder: Path, steps: Iterable[Module], config: LocalStConfig) -> None:
    """One rule for each module, be it from the hub or a folder."""
    for module in steps:
        if module.kind not in WITH_WEIGHTS or (module.kind == TRANSFORMER and config.backend == "onnx"):
            continue
        where = module.folder.relative_to(folder).as_posix()
        of_it = f"the module {where} of {folder}" if where != "." else str(folder)
        if other := _other_format(module.folder):
            raise ModelFailed(f"{of_it} {other}")
        files = sorted(module.folder.glob("*.safetensors"))
        if not files:
            raise ModelFailed(f"{of_it} has no weights in safetensors; if the model has others, {CONVERT}")
        for file in files:
            weight_names(file)


def _other_format(folder: Path) -> str | None:
    """What a folder has instead of a model's safetensors, and what to do."""
    if (folder / "adapter_config.json").exists():
        return "is an adapter: merge it into its base model with peft's merge_and_unload, and save that"
    if any(folder.glob("*.safetensors")):
        return None
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if weights := [name for name in pickles if not name.startswith(NO_WEIGHTS)]:
        return (
            f"has its weights in {weights[0]} alone, a pickle, which may run code when it is loaded; embedpool loads "
            f"safetensors: {CONVERT}"
        )
    if any(folder.glob("*.gguf")):
        return "has its weights in GGUF alone: let Ollama or llama.cpp serve it, and register that as type http"
    return None


# --- its files


def transformer_settings(folder: Path) -> dict[str, Any]:
    """A Transformer's own settings, such as max_seq_length."""
    found = (read_json(folder / name) for name in TRANSFORMER_SETTINGS)
    return next((settings for settings in found if settings), {})


def weight_names(file: Path) -> list[str]:
    """The names of the weights in a safetensors file. Raises ModelFailed, which names the file."""
    try:
        with safe_open(str(file), framework="np") as weights:
            return list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise ModelFailed(f"{file} {what_is_broken(file, error)}") from None


def read_json(file: Path, kind: type[Any] = dict) -> Any:
    """Its document, an empty one if there is no such file. Raises ModelFailed, which names the file."""
    try:
        text = file.read_text(encoding="utf-8")
        document = json.loads(text)
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError) as error:
        raise ModelFailed(f"{file} {what_is_broken(file, error)}") from None
    if not isinstance(document, kind):
        raise ModelFailed(f"{file} holds {type(document).__name__}, not {kind.__name__}")
    return document


def what_is_broken(file: Path, error: Exception) -> str:
    """What is wrong with a file that a library cannot read."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            return "is a pointer of Git LFS in the place of the file: fetch it with `git lfs pull`"
    return f"cannot be read: {error}"
