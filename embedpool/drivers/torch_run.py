"""A route's own modules on torch: fed with padded token ids, its weights laid out for this processor."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embedpool.drivers.body import POOLING
from embedpool.drivers.heads import Vocabulary
from embedpool.drivers.layout import STATIC
from embedpool.drivers.measure import fastest_s
from embedpool.drivers.pipeline import Read, Run
from embedpool.errors import ModelFailed

PREPACKED_LEAST_GAIN = 1.1
TRIED_ROWS = 256  # tokens of the call that is timed


def torch_run(modules: Sequence[Any], device: Any, output: str, constants: Mapping[str, Any]) -> Run:
    """What gives of padded inputs and constants the last module's `output`, as float32."""
    import torch

    first = modules[0]
    is_static = type(first).__name__ == STATIC
    names = () if is_static else set(first.tokenizer.model_input_names)

    def run(inputs: dict[str, Any], read: Read) -> Any:
        with torch.inference_mode():
            given = _as_a_bag(inputs) if is_static else {k: v for k, v in inputs.items() if k in names}
            features = {**{k: torch.from_numpy(v).to(device) for k, v in given.items()}, **constants}
            for module in modules:
                if "pooled_mask" in inputs and type(module).__name__ == "Pooling":
                    _exclude_prompt(features, inputs)
                features = module(features)
            return read(features[output].float().cpu().numpy())

    return run


def up_to_pooling(modules: Sequence[Any]) -> list[Any]:
    """Those that give vectors of tokens."""
    return list(itertools.takewhile(lambda module: type(module).__name__ != POOLING, modules))


class Headless:
    """A masked language model without its last layer, which is as wide as the vocabulary; its states are the output.

    Raises ModelFailed for one whose last layer is none that can be taken off.
    """

    def __init__(self, model: Any) -> None:
        import torch

        self._model = model
        self._layer = layer = model.get_output_embeddings()
        if type(layer) is not torch.nn.Linear:
            raise ModelFailed(f"its last layer is a {type(layer).__name__}, not a linear one")
        bias = None if layer.bias is None else _float32(layer.bias)
        self.vocabulary = Vocabulary(_float32(layer.weight), bias)
        nothing: Any = torch.nn.Identity()
        nothing.bias = None  # some models read it
        model.set_output_embeddings(nothing)

    def restore(self) -> None:
        """Put the layer back."""
        self._model.set_output_embeddings(self._layer)


def _float32(weight: Any) -> Any:
    return weight.detach().float().cpu().numpy()


def _exclude_prompt(features: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Tell the pooling how many tokens a prompt has, as the library does."""
    features["prompt_length"] = int((inputs["attention_mask"][0] - inputs["pooled_mask"][0]).sum())


def _as_a_bag(inputs: dict[str, Any]) -> dict[str, Any]:
    """All ids in a row, and where those of each text begin."""
    mask = inputs["attention_mask"].astype(bool)
    lengths = mask.sum(axis=1)
    return {"input_ids": inputs["input_ids"][mask], "offsets": np.cumsum(lengths) - lengths}


def prepacking_gain(modules: Sequence[Any]) -> float:
    """How many times as fast the largest linear layer is with its weights in oneDNN's layout; 0 if it cannot have it.

    torch gives fp32 to MKL, which on some processors is half as fast as oneDNN; on others there is nothing to gain.
    """
    import torch

    layers = [m for module in modules for m in module.modules() if type(m) is torch.nn.Linear]
    if not layers or not torch.backends.mkldnn.is_available():
        return 0.0
    layer = max(layers, key=lambda m: m.weight.numel())
    if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return 0.0
    packed = _mkldnn().to_mkldnn(copy.deepcopy(layer))
    x = torch.from_numpy(np.ones((TRIED_ROWS, layer.in_features), np.float32))
    with torch.inference_mode():
        return fastest_s(lambda: layer(x), tries=5) / fastest_s(lambda: packed(x), tries=5)


def prepack(modules: Sequence[Any]) -> None:
    """Put the weights of all linear layers into oneDNN's layout, in place; vectors stay the same."""
    for module in modules:
        _mkldnn().to_mkldnn(module)


def _mkldnn() -> Any:
    """torch's public door to that layout, without its own use of what torch has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.utils import mkldnn
    return mkldnn
