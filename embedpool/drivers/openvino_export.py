"""A route's whole pipeline becomes an OpenVINO graph, in a process of its own: the server never loads torch for it.

What is exported is compared with what the model's own library gives before anybody may use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from embedpool.config.spec import LocalStConfig
from embedpool.drivers import fidelity
from embedpool.drivers.body import POOLING, TOKENS, VECTORS, shared_route, tokens_are_read
from embedpool.drivers.heads import Vocabulary
from embedpool.drivers.layout import SCORING, TRANSFORMERS, Layout, read_layout
from embedpool.drivers.library import Library
from embedpool.drivers.openvino_graph import Graph, graph_file, import_openvino, keep_beside, pipeline_of
from embedpool.drivers.static import is_static
from embedpool.drivers.tokenizer import OFFSET_POSITIONS, FolderTokenizer, tokenizers_of
from embedpool.drivers.torch_run import Headless
from embedpool.errors import ModelFailed

logger = logging.getLogger(__name__)

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PACKED_INPUTS = ("input_ids", "position_ids", "text_ids", "token_places")
OF_TEXTS = ("token_places", "pooled_mask")  # have a row for each text; in what is packed, others have rows of several
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
    tokenizers = [found for route, found in tokenizers_of(layout).items() if not is_static(layout.routes[route])]
    for route in dict.fromkeys(shared_route(layout, tokenizer.route) for tokenizer in tokenizers):
        with _source(library, route, [t for t in tokenizers if shared_route(layout, t.route) == route]) as source:
            _export_route(source, graph_file(new, route))


def _export_route(source: Source, file: Path) -> None:
    for convert in (packed, padded) if source.can_be_packed else (padded,):
        try:
            fault = _try(source, file, convert)
        except Exception as error:
            if convert is padded:
                raise
            fault = f"{type(error).__name__}: {error}"
        if fault is None:
            return
        logger.info("%s: %s", convert.__name__, fault)
    route = source.tokenizer.route
    raise ModelFailed(f"the exported graph{f' of route {route}' if route else ''}: {fault}")


@dataclasses.dataclass(frozen=True)
class Source:
    """A route, and the tokenizers of all routes that have the same modules, with what the library gives for each.

    `constants` is what the modules want to know beside their inputs, `vocabulary` the layer that was taken off.
    """

    layout: Layout
    modules: Sequence[Any]
    output: str
    tokenizers: Sequence[FolderTokenizer]
    probes: Sequence[Sequence[fidelity.Probe]]
    of_nothing: Any
    constants: Mapping[str, Any]
    vocabulary: Vocabulary | None

    @property
    def tokenizer(self) -> FolderTokenizer:
        """The first of them."""
        return self.tokenizers[0]

    @property
    def reads_tokens(self) -> bool:
        """Whether the vectors of tokens are an output beside those of texts."""
        return self.output == VECTORS and tokens_are_read(self.layout, self.tokenizer.route)

    @property
    def can_be_packed(self) -> bool:
        """Whether texts may share rows in it."""
        if self.layout.kind in SCORING or any(each.hides_expansion for each in self.tokenizers):
            return False
        first = self.modules[0]
        return (
            type(first).__name__ in TRANSFORMERS
            and getattr(first.model.config, "model_type", None) in TEXTS_SHARE_ROWS
            and getattr(first.model.config, "position_embedding_type", "absolute") in ("absolute", None)
        )


@contextlib.contextmanager
def _source(library: Library, route: str, tokenizers: Sequence[FolderTokenizer]) -> Iterator[Source]:
    """What the library gives is asked first: it may need the layer that is taken off, as other routes may after it."""
    probes = [list(fidelity.probes(library, tokenizer)) for tokenizer in tokenizers]
    of_nothing = fidelity.vector_of_nothing(library, tokenizers[0])
    body, modules = library.body(route)
    headless = None if body.vocabulary else Headless(modules[0].model)
    vocabulary = headless.vocabulary if headless else None
    try:
        yield Source(
            library.layout, modules, body.output, tokenizers, probes, of_nothing, library.constants, vocabulary
        )
    finally:
        if headless:
            headless.restore()


def _try(source: Source, file: Path, convert: Callable[[Source], Any]) -> str | None:
    """Write a graph, with what lies beside it; what differs from the library, if anything."""
    converted = convert(source)
    try:
        import_openvino().save_model(converted, file, compress_to_fp16=False)
    except RuntimeError as error:  # of a full disk it says no more than that a stream has failed
        raise ModelFailed(f"the graph cannot be written to {file.parent.parent.parent}: {error}") from None
    keep_beside(file, source.of_nothing, source.vocabulary)
    graph = Graph(file, "float32", threads=1)
    faults = [
        fidelity.difference(probes, pipeline_of(source.layout, tokenizer, graph), "float32")
        for tokenizer, probes in zip(source.tokenizers, source.probes, strict=True)
    ]
    return next(filter(None, faults), None)


class Steps(torch.nn.Module):  # type: ignore[misc]
    """A route's modules, the last of which puts its rows where the source's `output` says."""

    def __init__(self, source: Source, modules: Sequence[Any]) -> None:
        super().__init__()
        self.steps = torch.nn.ModuleList(modules)
        self.output = source.output
        self.reads_tokens = source.reads_tokens

    def rows(self, features: dict[str, Any], pooled_mask: Any) -> Any:
        """What they make of the features. Where the pooling leaves a prompt out, it reads a mask of its own."""
        tokens = None
        for step in self.steps:
            if type(step).__name__ == POOLING:
                tokens = features[TOKENS] if tokens is None else tokens
                features["attention_mask"] = features["attention_mask"] if pooled_mask is None else pooled_mask
            features = step(features)
        return (features[self.output], tokens) if self.reads_tokens else features[self.output]


class Padded(Steps):
    """A row of tokens for each text."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, source.modules)
        self.constants = source.constants

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None, pooled_mask: Any = None) -> Any:
        """Of the arrays that `padding.pad` makes."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        features = {name: value for name, value in given.items() if value is not None}
        return self.rows({**features, **self.constants}, pooled_mask)


class Packed(Steps):
    """Texts that share rows in the first module's `model`, which takes any mask; behind it each has a row again."""

    def __init__(self, source: Source) -> None:
        first, *others = source.modules
        super().__init__(source, others)
        self.inner = first.model
        config = first.model.config
        self.first_position = config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0

    def forward(
        self, input_ids: Any, position_ids: Any, text_ids: Any, token_places: Any, pooled_mask: Any = None
    ) -> Any:
        """Of the arrays that `packing.pack` makes."""
        same = text_ids[:, None, :, None] == text_ids[:, None, None, :]
        found = self.inner(
            input_ids=input_ids,
            attention_mask=torch.where(same, 0.0, torch.finfo(torch.float32).min),
            position_ids=position_ids + self.first_position,
            token_type_ids=torch.zeros((1, 1), dtype=torch.long),  # of all tokens, whose vector is then a constant
        )[0]
        tokens = found.reshape(-1, found.shape[-1])[token_places.clamp(min=0)]
        features = {"token_embeddings": tokens, "attention_mask": (token_places >= 0).long()}
        return self.rows(features, pooled_mask)


def packed(source: Source) -> Any:
    """A route whose texts share rows, as an OpenVINO model. Raises whatever the conversion raises."""
    return _traced(Packed(source), _named(PACKED_INPUTS, source))


def padded(source: Source) -> Any:
    """A route as an OpenVINO model of padded inputs."""
    modules = source.modules
    names = _named([name for name in INPUTS if name in modules[0].tokenizer.model_input_names], source)
    inside: list[Any] = [inner for module in modules if (inner := getattr(module, "model", None)) is not None]
    for inner in inside:
        if getattr(inner, "config", None) is not None:
            inner.config.use_cache = False  # of a generator: nothing is generated
    if source.tokenizer.pads_left:  # then the first places attend to nothing
        _mask_by_numbers(inside)
    steps = Padded(source).eval()
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


def _named(names: Sequence[str], source: Source) -> list[str]:
    """The inputs of a graph. Raises ModelFailed for a pooling that weighs tokens by their places behind the prompt."""
    if not source.tokenizer.excludes_prompt:
        return list(names)
    for module in source.modules:
        modes = getattr(module, "pooling_mode", ())
        if "weightedmean" in ((modes,) if isinstance(modes, str) else modes):
            raise ModelFailed("a weighted mean without the prompt is not exported")
    return [*names, "pooled_mask"]


def _traced(steps: Steps, names: Sequence[str]) -> Any:
    example = dict.fromkeys(names, torch.ones((2, 8), dtype=torch.long))
    rows, texts = _shape(), _shape()
    shapes = [(name, texts if name in OF_TEXTS else rows) for name in names]
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        graph = import_openvino().convert_model(steps.eval(), example_input=example, input=shapes)
    _drop_reshapes_to_same(graph)
    for port, name in zip(graph.inputs, names, strict=True):
        port.set_names({name})  # inputs that are reshaped before anything else have forgotten them, or have more
    return graph


def _shape() -> Any:
    """Two unknown sizes, known to be the same in all inputs that are given them: no reshape has to compute them."""
    openvino = import_openvino()
    sizes = [openvino.Dimension(-1), openvino.Dimension(-1)]
    for size in sizes:
        size.set_symbol(openvino.Symbol())
    return openvino.PartialShape(sizes)


def _drop_reshapes_to_same(graph: Any) -> None:
    """Reshapes to the shape that there is: OpenVINO keeps them where it does not know all sizes, and fuses nothing."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Reshape" or not node.get_attributes()["special_zero"]:
            continue
        given, wanted = node.input_values()
        if wanted.get_node().get_type_name() != "Constant" or given.get_partial_shape().rank.is_dynamic:
            continue
        sizes = [-1 if size.is_dynamic else size.get_length() for size in given.get_partial_shape()]
        pattern = wanted.get_node().get_data().tolist()
        if len(pattern) == len(sizes) and all(to in (0, size) for to, size in zip(pattern, sizes, strict=True)):
            node.output(0).replace(given)


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
