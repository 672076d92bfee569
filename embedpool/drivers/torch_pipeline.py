"""A SentenceTransformer's own modules on torch: fed with padded token ids, its weights laid out for this processor."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np

from embedpool.drivers.measure import fastest_s

PREPACKED_LEAST_GAIN = 1.1
TRIED_ROWS = 256  # tokens of the call that is timed


def torch_run(model: Any) -> Any:
    """A function from padded inputs to float32 vectors (texts, dim)."""
    import torch

    names = set(model.tokenizer.model_input_names)

    def run(inputs: dict[str, Any]) -> Any:
        with torch.inference_mode():
            features = {k: torch.from_numpy(v).to(model.device) for k, v in inputs.items() if k in names}
            return model(features)["sentence_embedding"].float().cpu().numpy()

    return run


def prepacking_gain(model: Any) -> float:
    """How many times as fast the largest linear layer is with its weights in oneDNN's layout; 0 if it cannot have it.

    torch gives fp32 to MKL, which on some processors is half as fast as oneDNN; on others there is nothing to gain.
    """
    import torch

    layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
    if not layers or not torch.backends.mkldnn.is_available():
        return 0.0
    layer = max(layers, key=lambda m: m.weight.numel())
    if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return 0.0
    packed = _mkldnn().to_mkldnn(copy.deepcopy(layer))
    x = torch.from_numpy(np.ones((TRIED_ROWS, layer.in_features), np.float32))
    with torch.inference_mode():
        return fastest_s(lambda: layer(x), tries=5) / fastest_s(lambda: packed(x), tries=5)


def prepack(model: Any) -> None:
    """Put the weights of all linear layers into oneDNN's layout, in place; vectors stay the same."""
    _mkldnn().to_mkldnn(model)


def _mkldnn() -> Any:
    """torch's public door to that layout, without its own use of what torch has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.utils import mkldnn
    return mkldnn
