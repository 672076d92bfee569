"""A route's whole pipeline becomes an OpenVINO graph, in a process of its own: the server never loads torch for it.

What is exported is compared with what the model's own library gives before anybody may use it.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedpool.config.spec import LocalStConfig
from embedpool.drivers import fidelity
from embedpool.drivers.layout import EMBED, read_layout
from embedpool.drivers.library import Library
from embedpool.drivers.openvino_graph import Graph, graph_file, import_openvino, pipeline_of
from embedpool.drivers.static import is_static
from embedpool.drivers.tokenizer import OFFSET_POSITIONS, FolderTokenizer, tokenizers_of
from embedpool.errors import ModelFailed

logger = logging.getLogger(__name__)

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PACKED_INPUTS = ("input_ids", "position_ids", "text_ids", "token_places")
# Models whose texts can share a row: they take any mask, and the place of a token is added to it, and nothing else.
TEXTS_SHARE_ROWS = ("bert", "roberta", "xlm-roberta", "camembert")


def _main() -> None:
    """The process's life: what is to be done comes from the standard input, which ends with whoever asked."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    folder, config, new = pickle.load(sys.stdin.buffer)  # noqa: S301  (from the process that started this one)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    fault = None
    try:
        export(folder, config, new)
    except ModelFailed as error:
        fault = error.message
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    answer.write(json.dumps({"fault": fault}))
    answer.flush()
    os._exit(0)  # nothing is left worth waiting for


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def export(folder: Path, config: LocalStConfig, new: Path) -> None:
    """Write a graph for each route of the model that computes anything, into the folder `new`.

    Raises ModelFailed if one gives other vectors than the library, or cannot be written.
    """
    layout = read_layout(folder, config)
    library = Library(layout, config, "float32", "torch")  # every dtype is computed from the same graph
    for route, tokenizer in tokenizers_of(layout).items():
        if is_static(layout.routes[route]):
            continue
        probes = list(fidelity.probes(library, tokenizer))
        for convert in (packed, padded) if _can_be_packed(library, tokenizer) else (padded,):
            try:
                fault = _try(library, tokenizer, new, probes, convert)
            except Exception as error:
                if convert is padded:
                    raise
                fault = f"{type(error).__name__}: {error}"
            if fault is None:
                break
            logger.info("%s: %s", convert.__name__, fault)
        else:
            raise ModelFailed(f"the exported graph{f' of route {route}' if route else ''}: {fault}")


def _try(
    library: Library,
    tokenizer: FolderTokenizer,
    new: Path,
    probes: Sequence[fidelity.Probe],
    convert: Callable[[Library, FolderTokenizer], Any],
) -> str | None:
    """Write a route's graph, and the vector of a text without tokens; what differs from the library, if anything."""
    file, converted = graph_file(new, tokenizer.route), convert(library, tokenizer)
    try:
        import_openvino().save_model(converted, file, compress_to_fp16=False)
    except RuntimeError as error:  # of a full disk it says no more than that a stream has failed
        raise ModelFailed(f"the graph cannot be written to {new.parent.parent}: {error}") from None
    of_nothing = fidelity.vector_of_nothing(library, tokenizer)
    if of_nothing is not None:
        np.save(file.with_suffix(".npy"), of_nothing, allow_pickle=False)
    return fidelity.difference(probes, pipeline_of(tokenizer, Graph(file, "float32", threads=1)), "float32")


def _can_be_packed(library: Library, tokenizer: FolderTokenizer) -> bool:
    modules = library.modules(tokenizer.route)
    first = modules[0]
    return (
        library.layout.kind == EMBED
        and type(first).__name__ == "Transformer"
        and getattr(first.model.config, "model_type", None) in TEXTS_SHARE_ROWS
        and getattr(first.model.config, "position_embedding_type", "absolute") in ("absolute", None)
    )


class Steps(torch.nn.Module):  # type: ignore[misc]
    """A route's modules, the last of which puts its rows where `output` says."""

    def __init__(self, modules: Sequence[Any], output: str) -> None:
        super().__init__()
        self.steps = torch.nn.ModuleList(modules)
        self.output = output

    def rows(self, features: dict[str, Any], pooled_mask: Any) -> Any:
        """What they make of the features. Where the pooling leaves a prompt out, it reads a mask of its own."""
        for step in self.steps:
            if pooled_mask is not None and type(step).__name__ == "Pooling":
                features["attention_mask"] = pooled_mask
            features = step(features)
        return features[self.output]


class Padded(Steps):
    """A row of tokens for each text; `constants` is what the modules want to know beside the inputs."""

    def __init__(self, modules: Sequence[Any], output: str, constants: Mapping[str, Any]) -> None:
        super().__init__(modules, output)
        self.constants = constants

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None, pooled_mask: Any = None) -> Any:
        """Of the arrays that `tokenizer.pad` makes."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        features = {name: value for name, value in given.items() if value is not None}
        return self.rows({**features, **self.constants}, pooled_mask)


class Packed(Steps):
    """Texts that share rows in the first module's `model`, which takes any mask; behind it each has a row again."""

    def __init__(self, modules: Sequence[Any], output: str, first_position: int) -> None:
        super().__init__(modules[1:], output)
        self.inner = modules[0].model
        self.first_position = first_position

    def forward(
        self, input_ids: Any, position_ids: Any, text_ids: Any, token_places: Any, pooled_mask: Any = None
    ) -> Any:
        """Of the arrays that `packing.pack` makes."""
        same = text_ids[:, None, :, None] == text_ids[:, None, None, :]
        found = self.inner(
            input_ids=input_ids,
            attention_mask=torch.where(same, 0.0, torch.finfo(torch.float32).min),
            position_ids=position_ids + self.first_position,
            token_type_ids=torch.zeros_like(input_ids),
        )[0]
        tokens = found.reshape(-1, found.shape[-1])[token_places.clamp(min=0)]
        features = {"token_embeddings": tokens, "attention_mask": (token_places >= 0).long()}
        return self.rows(features, pooled_mask)


def packed(library: Library, tokenizer: FolderTokenizer) -> Any:
    """A route whose texts share rows, as an OpenVINO model. Raises whatever the conversion raises."""
    modules = library.modules(tokenizer.route)
    config = modules[0].model.config
    first_position = config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0
    return _traced(Packed(modules, library.output, first_position), _named(PACKED_INPUTS, modules, tokenizer))


def padded(library: Library, tokenizer: FolderTokenizer) -> Any:
    """A route as an OpenVINO model of padded inputs."""
    modules = library.modules(tokenizer.route)
    names = _named([name for name in INPUTS if name in modules[0].tokenizer.model_input_names], modules, tokenizer)
    inside: list[Any] = [inner for module in modules if (inner := getattr(module, "model", None)) is not None]
    for inner in inside:
        if getattr(inner, "config", None) is not None:
            inner.config.use_cache = False  # of a generator: nothing is generated
    if tokenizer.pads_left:  # then the first places attend to nothing
        _mask_by_numbers(inside)
    steps = Padded(modules, library.output, library.constants).eval()
    try:
        return _traced(steps, names)
    except Exception as error:
        logger.info("the model cannot be traced, and is exported in another way: %s", error)
    _mask_by_numbers(inside)  # models whose masks are made by functions cannot be traced
    sizes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in names}
    example = {name: torch.ones((3, 9), dtype=torch.long) for name in names}
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            exported = torch.export.export(steps, (), example, dynamic_shapes=sizes, strict=False)
            return import_openvino().convert_model(exported)
    except Exception as error:
        raise ModelFailed(f"the model cannot be exported: {_in_short(error)}") from None


def _named(names: Sequence[str], modules: Sequence[Any], tokenizer: FolderTokenizer) -> list[str]:
    """The inputs of a graph. Raises ModelFailed for a pooling that weighs tokens by their places behind the prompt."""
    if not tokenizer.excludes_prompt:
        return list(names)
    for module in modules:
        modes = getattr(module, "pooling_mode", ())
        if "weightedmean" in ((modes,) if isinstance(modes, str) else modes):
            raise ModelFailed("a weighted mean without the prompt is not exported")
    return [*names, "pooled_mask"]


def _traced(steps: Steps, names: Sequence[str]) -> Any:
    example = dict.fromkeys(names, torch.ones((2, 8), dtype=torch.long))
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        graph = import_openvino().convert_model(steps.eval(), example_input=example)
    for port, name in zip(graph.inputs, names, strict=True):
        port.set_names({name})  # it forgets those of inputs that are reshaped before anything else
    return graph


def _mask_by_numbers(inside: Sequence[Any]) -> None:
    """Where a token attends to nothing, minus infinity for all would make it no number; the least number does not."""
    for inner in inside:
        if hasattr(inner, "set_attn_implementation"):
            inner.set_attn_implementation("eager")


def _in_short(error: Exception) -> str:
    """What OpenVINO says at the end of many lines, else the first line of an error."""
    lines = str(error).strip().splitlines()
    said = [line.removeprefix("-- ") for line in lines if line.startswith("-- ") and not line.endswith("a message:")]
    return "; ".join(said) or next(iter(lines), type(error).__name__)


if __name__ == "__main__":
    _main()
