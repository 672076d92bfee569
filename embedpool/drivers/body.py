"""The body of a route: what a runtime computes of its modules. A head makes rows of what that gives, see heads.py."""

from __future__ import annotations

import dataclasses

from embedpool.drivers.late_interaction import MASK
from embedpool.drivers.layout import (
    EMBED,
    LAST_VECTOR,
    MULTIVECTOR,
    MULTIVECTOR_LAYER,
    SCORING,
    SPARSE,
    SPARSE_LAYER,
    TRANSFORMER,
    TRANSFORMERS,
    Layout,
    Module,
)  # fmt: skip
from embedpool.drivers.model_files import read_json
from embedpool.tasks.hybrid import Hybrid
from embedpool.tasks.late_chunking import Tokens

VECTORS, TOKENS, SCORES = "sentence_embedding", "token_embeddings", "scores"  # where modules put what they give
POOLING, NORMALIZE, SPLADE, AUTO_ENCODER = "Pooling", "Normalize", "SpladePooling", "SparseAutoEncoder"


@dataclasses.dataclass(frozen=True)
class Body:
    """`output` is where the last of its modules puts what is read. Modules of kinds in `left_out` are no part of it.

    One without a `vocabulary` is a masked language model that ends before its last layer.
    """

    output: str
    left_out: frozenset[str] = frozenset()
    vocabulary: bool = True


def body_of(layout: Layout, route: str) -> Body | None:
    """None where only the library itself can compute a route."""
    kinds = [step.kind for step in layout.routes[route]]
    if layout.kind in SCORING:
        return Body(SCORES)
    if layout.kind == SPARSE:
        if len(kinds) == 2 and kinds[0] in TRANSFORMERS and kinds[1] == SPLADE:
            return Body(TOKENS, frozenset({SPLADE}), vocabulary=False)
        return Body(VECTORS, frozenset({AUTO_ENCODER})) if len(kinds) > 1 and kinds[-1] == AUTO_ENCODER else None
    if layout.kind == MULTIVECTOR:
        return Body(TOKENS, frozenset({MASK})) if set(kinds) <= {TRANSFORMER, "Dense", MASK, NORMALIZE} else None
    return Body(TOKENS, frozenset({POOLING, NORMALIZE})) if has_three(layout) else Body(VECTORS)


def shared_route(layout: Layout, route: str) -> str:
    """The first route with the same modules: what is computed is the same, and is there once."""
    return next(name for name, steps in layout.routes.items() if steps == layout.routes[route])


def tokens_are_read(layout: Layout, route: str) -> bool:
    """Whether a dense route has vectors of tokens before it pools them."""
    kinds = [step.kind for step in layout.routes[route]]
    return layout.kind == EMBED and kinds[0] in TRANSFORMERS and POOLING in kinds


def tasks_of(layout: Layout) -> list[str]:
    """What a model can be asked for."""
    if has_three(layout):
        return [EMBED, SPARSE, MULTIVECTOR, Hybrid.name, Tokens.name]
    if all(tokens_are_read(layout, route) for route in layout.routes):
        return [EMBED, Tokens.name]
    return [layout.kind]


def no_late_chunking(layout: Layout, route: str) -> str | None:
    """Why chunks cannot be embedded late; None if they can: the model takes the mean of its tokens' vectors."""
    if not tokens_are_read(layout, route):
        return "it gives no vectors of tokens"
    if layout.assumed and LAST_VECTOR in layout.assumed:
        return f"it does not take the mean of its tokens' vectors, but {LAST_VECTOR}"
    _, *others = layout.routes[route]
    if pools_by(others[0]) != "mean":
        return f"it does not take the mean of its tokens' vectors, but pools by {pools_by(others[0])}"
    further = [step.kind for step in others[1:] if step.kind != NORMALIZE]
    return f"it makes something else of the mean, by {further[0]}" if further else None


def pools_by(module: Module) -> str:
    """The way in which a Pooling makes a vector of those of tokens; of several the names joined by a plus."""
    config = read_json(module.folder / "config.json")
    if named := config.get("pooling_mode"):
        return str(named) if isinstance(named, str) else "+".join(map(str, named))
    on = [name.removeprefix("pooling_mode_") for name in config if name.startswith("pooling_mode_") and config[name]]
    return "+".join(name.removesuffix("_tokens").removesuffix("_token") for name in on) or "mean"


def most_active(module: Module, of_model: int | None) -> int:
    """How many values of a sparse row an auto-encoder gives: as the model's settings say, or its own."""
    return of_model or int(read_json(module.folder / "config.json").get("k", 8))


def has_three(layout: Layout) -> bool:
    """Whether a dense model gives sparse and multi-vector rows, too: it has BGE-M3's layers and pools as that does."""
    if layout.kind != EMBED or layout.assumed or list(layout.routes) != [""]:
        return False
    steps = layout.routes[""]
    kinds = [step.kind for step in steps]
    return (
        kinds in ([TRANSFORMER, POOLING], [TRANSFORMER, POOLING, NORMALIZE])
        and pools_by(steps[1]) == "cls"
        and all((layout.folder / name).is_file() for name in (SPARSE_LAYER, MULTIVECTOR_LAYER))
    )
