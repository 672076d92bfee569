"""What a model's folder holds: its kind, its modules and their order, prompts and limits; or why it is not served.

It is read from small files and the headers of weights alone, without torch and without running code of the model's.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedpool.config.spec import LocalStConfig
from embedpool.drivers import late_interaction
from embedpool.drivers.late_interaction import DOCUMENT, MASK, QUERY, LateInteraction, read_late_interaction
from embedpool.drivers.model_files import (
    idf_file,
    is_model2vec,
    labels_of,
    read_json,
    transformer_settings,
    weight_names,
)
from embedpool.errors import ModelFailed

EMBED, RERANK, CLASSIFY, SPARSE, MULTIVECTOR = "embed", "rerank", "classify", "sparse", "multivector"
SERVED = (EMBED, RERANK, CLASSIFY, SPARSE, MULTIVECTOR)
SCORING = (RERANK, CLASSIFY)
KINDS = {
    EMBED: "an embedder",
    RERANK: "a reranker",
    CLASSIFY: "a classifier",
    SPARSE: "a sparse encoder",
    MULTIVECTOR: "a multi-vector model",
}
STANFORD = "HF_ColBERT"  # the architecture of a ColBERT that Stanford's library has saved
OTHER_HEADS = {
    STANFORD: MULTIVECTOR,
    "ForRetrieval": "a model of images",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a finder of answers",
    "ForMultipleChoice": "a chooser among answers",
    "ForImageClassification": "a classifier of images",
}

CROSS_ENCODER = "CrossEncoder"  # a reranker or a classifier, by the number of its labels
# model_type in config_sentence_transformers.json → kind; what has none is an embedder.
ARCHETYPES = {"SparseEncoder": SPARSE, "MultiVectorEncoder": MULTIVECTOR, late_interaction.PYLATE: MULTIVECTOR}
LOGIT_SCORE = "LogitScore"
LAST_VECTOR = "the last token's vector"  # what is assumed of language models
# Class of a module → kind. Classes have moved between packages, so their last names count.
TELLING_MODULES = {
    "SpladePooling": SPARSE,
    "MLMTransformer": SPARSE,
    "SparseStaticEmbedding": SPARSE,
    "SparseAutoEncoder": SPARSE,
    "CSRSparsity": SPARSE,
    "IDF": SPARSE,
    LOGIT_SCORE: RERANK,
    MASK: MULTIVECTOR,
}
ROUTERS = ("Router", "Asym")
TRANSFORMER, STATIC, SPARSE_STATIC = "Transformer", "StaticEmbedding", "SparseStaticEmbedding"
TRANSFORMERS = (TRANSFORMER, "MLMTransformer")
NOT_FROM_TEXT_IDS = {
    "CLIPModel": "reads images beside texts",
    "WordEmbeddings": "splits texts into words by itself",
    "BoW": "splits texts into words by itself",
}
# Linear layers that give a dense model further outputs, in the files that `embedpool pull --convert` writes.
SPARSE_LAYER, MULTIVECTOR_LAYER = "sparse_linear.safetensors", "colbert_linear.safetensors"
WITH_WEIGHTS = (
    *TRANSFORMERS, STATIC, SPARSE_STATIC, "SparseAutoEncoder", "Dense", "LSTM", "CNN", "LayerNorm",
    "WeightedLayerPooling",
)  # fmt: skip

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "sparse_linear", "colbert_linear", "scaler")
CONVERT = (
    "convert it with `embedpool pull --convert --to NEW MODEL`, or a folder with `--set path=OLD`, and set "
    "driver.config.path to NEW"
)
TRUSTED = "if you trust its authors and have read it, set driver.config.trust_remote_code to true in pool.yml"

NOT_HONOURED = ("query_length", "document_length", "query_expansion")  # of models that are not multi-vector
PYLATE_DENSE = "pylate.models.Dense.Dense"  # which sentence-transformers reads as its own


@dataclasses.dataclass(frozen=True)
class Module:
    """A step of a model; `kind` is the last name of its class, `type` all of it."""

    type: str
    folder: Path

    @property
    def is_known(self) -> bool:
        """Whether it is the library's own, not code that comes with a model."""
        return "." not in self.type or self.type.startswith("sentence_transformers.") or self.type == PYLATE_DENSE

    @property
    def kind(self) -> str:
        """The class without its package."""
        return self.type.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A folder that is served.

    `routes` are the ways through the model by name: one that is called "" where it treats all texts alike. `by_task`
    names the route for what texts are for (query, document, …), and at "" where nothing is said, if the model allows
    it. `dimensions` are how many numbers of a vector it gives by default, None for all, `most_active` how many values
    of a sparse row. `assumed` says what no file says, `activation` what the files of a model that scores name,
    `interaction` how a multi-vector model treats texts.
    """

    folder: Path
    kind: str
    routes: Mapping[str, Sequence[Module]]
    by_task: Mapping[str, str]
    prompts: Mapping[str, str]
    default_prompt_name: str
    dimensions: int | None
    assumed: str | None
    activation: str | None
    most_active: int | None = None
    interaction: LateInteraction | None = None

    def shares_first(self, route: str) -> bool:
        """Whether another route has the same first module, which is loaded once for both."""
        first = self.routes[route][0]
        return any(steps[0] == first for name, steps in self.routes.items() if name != route)

    @property
    def is_causal(self) -> bool:
        """Whether it is a language model that scores pairs by its next token."""
        return any(module.kind == LOGIT_SCORE for route in self.routes.values() for module in route)


def read_layout(folder: Path, config: LocalStConfig) -> Layout:
    """Raises ModelFailed with the reason, and what mends it, for a folder that is not served."""
    settings = read_json(folder / "config_sentence_transformers.json")
    modules = _modules(folder)
    kind, assumed = _kind_of(folder, settings, modules, config)
    if not modules or assumed:
        modules = _assumed_modules(folder, kind)
    routes, by_task = _routes(modules)
    steps = [module for route in routes.values() for module in route]
    if not config.trust_remote_code:
        _require_known_code(steps)
    _require_served(steps, kind)
    _require_safetensors(folder, steps, config)
    prompts = {k: v for k, v in (settings.get("prompts") or {}).items() if isinstance(v, str)}
    default_prompt = settings.get("default_prompt_name") or ""
    interaction = None
    if kind == MULTIVECTOR:
        mask = next((step.folder for step in steps if step.kind == MASK), None)
        of_stanford = _architecture(folder) == STANFORD and not _modules(folder)
        interaction = read_late_interaction(folder, settings, steps[0].folder, mask, of_stanford=of_stanford)
        prompts = dict(interaction.prompts)
        if list(routes) == [""]:
            routes = dict.fromkeys((DOCUMENT, QUERY), routes[""])
            by_task = {"": DOCUMENT, DOCUMENT: DOCUMENT, QUERY: QUERY}
        default_prompt = DOCUMENT if DOCUMENT in prompts else ""
    if "corpus" in prompts and not prompts.keys() & {DOCUMENT, "passage"}:
        prompts[DOCUMENT] = prompts["corpus"]  # what encode_document takes then
    return Layout(
        folder,
        kind,
        routes,
        by_task,
        {} if assumed else prompts,  # those of another kind of model would be another's
        "" if assumed else default_prompt,
        None if assumed else settings.get("truncate_dim"),
        assumed,
        _activation(settings, folder) if kind in SCORING else None,
        settings.get("max_active_dims") if kind == SPARSE else None,
        interaction,
    )


# --- its kind


def _kind_of(
    folder: Path, settings: Mapping[str, Any], modules: Sequence[Module], config: LocalStConfig
) -> tuple[str, str | None]:
    """The kind, and what is assumed of pooling where no file says it. Raises ModelFailed for one that is not served."""
    found, why = _found(folder, settings, modules)
    what = KINDS.get(found, found)
    if config.task not in (None, EMBED, found):
        raise ModelFailed(f"{folder} is {what}: {why}. It cannot be served with driver.config.task {config.task}")
    if EMBED not in (found, config.task):
        if found in SERVED:
            return found, None
        raise ModelFailed(
            f"{folder} is {what}: {why}. embedpool does not serve it; to serve its encoder as an embedder, whose "
            "vectors its authors may never have meant, set driver.config.task to embed"
        )
    if modules and found == EMBED:
        return EMBED, None
    if is_model2vec(folder):
        return EMBED, None
    architecture = _architecture(folder)
    is_causal = architecture.endswith("ForCausalLM") and read_json(folder / "config.json").get("is_causal", True)
    pooling = f"{LAST_VECTOR} is taken" if is_causal else "token vectors are averaged"
    reason = "no modules.json says how" if found == EMBED else f"it is {KINDS.get(found, found)}, served by task: embed"
    return EMBED, f"{pooling}, as sentence-transformers does: {reason}"


def _found(folder: Path, settings: Mapping[str, Any], modules: Sequence[Module]) -> tuple[str, str]:
    """The kind that the files tell, and by what."""
    archetype = str(settings.get("model_type") or "")
    if archetype == CROSS_ENCODER:
        return _of_labels(folder, modules, f"its config_sentence_transformers.json says {archetype}")
    if archetype in ARCHETYPES:
        return ARCHETYPES[archetype], f"its config_sentence_transformers.json says {archetype}"
    if late_interaction.is_of_pylate(settings):
        return MULTIVECTOR, "its config_sentence_transformers.json has PyLate's settings"
    for module in _with_routes(modules):
        if module.kind in TELLING_MODULES:
            return TELLING_MODULES[module.kind], f"its modules.json names {module.kind}"
    return (EMBED, "it has a modules.json") if modules else _of_architecture(folder)


def _of_architecture(folder: Path) -> tuple[str, str]:
    """The kind of a folder that only transformers knows, and by what."""
    architecture = _architecture(folder)
    says = f"its config.json says {architecture}"
    if architecture.endswith("ForSequenceClassification"):
        return _of_labels(folder, [], says)
    kind = next((kind for end, kind in OTHER_HEADS.items() if architecture.endswith(end)), EMBED)
    return kind, says


def _of_labels(folder: Path, modules: Sequence[Module], says: str) -> tuple[str, str]:
    """A model that scores: with one label it reranks, with more it classifies."""
    if any(module.kind == LOGIT_SCORE for module in modules):
        return RERANK, says
    count = len(labels_of(modules[0].folder if modules else folder))
    return (RERANK if count == 1 else CLASSIFY), f"{says} with {count} label{'s' * (count != 1)}"


def _architecture(folder: Path) -> str:
    architectures = read_json(folder / "config.json").get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


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


def _assumed_modules(folder: Path, kind: str) -> list[Module]:
    """Of a folder that has no modules.json, or one for another kind of model."""
    if is_model2vec(folder):
        return [Module(STATIC, folder)]
    if not (folder / "config.json").exists() and not _other_format(folder):
        raise ModelFailed(f"{folder} holds no model: it has neither modules.json nor config.json")
    pooling = [Module("Pooling", folder / "1_Pooling")] if kind == EMBED else []
    return [Module(TRANSFORMER, folder), *pooling]


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


def _activation(settings: Mapping[str, Any], folder: Path) -> str | None:
    """The last name of the activation that the files name; None if they name none."""
    config = read_json(folder / "config.json")
    older = (config.get("sentence_transformers") or {}).get("activation_fn")
    named = settings.get("activation_fn") or older or config.get("sbert_ce_default_activation_function")
    return str(named).rpartition(".")[2] if named else None


# --- what is not served


def _require_known_code(steps: Iterable[Module]) -> None:
    for module in steps:
        if not module.is_known:
            raise ModelFailed(f"its module {module.type} is code that comes with the model: {TRUSTED}")


def _require_served(steps: Iterable[Module], kind: str) -> None:
    for module in steps:
        if reason := NOT_FROM_TEXT_IDS.get(module.kind):
            raise ModelFailed(f"its module {module.kind} {reason}, which embedpool does not serve")
        if module.kind not in TRANSFORMERS or kind == MULTIVECTOR:
            continue
        settings = transformer_settings(module.folder)
        if unserved := [name for name in NOT_HONOURED if settings.get(name)]:
            raise ModelFailed(f"{module.folder} sets {' and '.join(unserved)}, which embedpool does not honour yet")


def _require_safetensors(folder: Path, steps: Iterable[Module], config: LocalStConfig) -> None:
    """One rule for each module, be it from the hub or a folder."""
    for module in steps:
        if module.kind not in WITH_WEIGHTS or (module.kind == TRANSFORMER and config.backend == "onnx"):
            continue
        if module.kind == SPARSE_STATIC and idf_file(module.folder) is not None:
            continue
        where = module.folder.relative_to(folder).as_posix()
        of_it = f"the module {where} of {folder}" if where != "." else str(folder)
        if other := _other_format(module.folder):
            raise ModelFailed(f"{of_it} {other}")
        files = _weights_in(module.folder)
        if not files:
            raise ModelFailed(f"{of_it} has no weights in safetensors; if the model has others, {CONVERT}")
        for file in files:
            weight_names(file)


def _weights_in(folder: Path) -> list[Path]:
    """The files of a module's own weights."""
    return sorted(file for file in folder.glob("*.safetensors") if file.name not in (SPARSE_LAYER, MULTIVECTOR_LAYER))


def _other_format(folder: Path) -> str | None:
    """What a folder has instead of a model's safetensors, and what to do."""
    if (folder / "adapter_config.json").exists():
        return "is an adapter: merge it into its base model with peft's merge_and_unload, and save that"
    if _weights_in(folder):
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
