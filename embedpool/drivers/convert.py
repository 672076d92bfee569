"""Weights that a model has as pickles become safetensors, the only form that is loaded: `embedpool pull --convert`.

A pickle may run code when it is read. torch reads these in a way that makes tensors and nothing else.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from embedpool.drivers.layout import MULTIVECTOR_LAYER, SPARSE_LAYER
from embedpool.errors import ModelFailed

WEIGHTS, INDEX = "pytorch_model*.bin", "pytorch_model.bin.index.json"
LAYERS = {"sparse_linear.pt": SPARSE_LAYER, "colbert_linear.pt": MULTIVECTOR_LAYER}
UNUSED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.ot", "*.msgpack", "onnx", "openvino", ".*", INDEX)


def converted(folder: Path, to: Path) -> list[str]:
    """Copy a model into the folder `to`, its pickles as safetensors; the names of what was converted.

    Raises ModelFailed for a pickle that holds more than tensors.
    """
    shutil.copytree(folder, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*UNUSED))
    made: list[str] = []
    for where in [folder, *(found for found in folder.rglob("*") if found.is_dir())]:
        if any(part.startswith(".") or part in ("onnx", "openvino") for part in where.relative_to(folder).parts):
            continue
        into = to / where.relative_to(folder)
        pickles = sorted(where.glob(WEIGHTS))
        if pickles and not any(where.glob("model*.safetensors")):
            made += _weights(pickles, into)
        for name, layer in LAYERS.items():
            if (where / name).is_file() and not (where / layer).exists():
                _save(_tensors(where / name), into / layer)
                made.append(layer)
    return made


def _weights(pickles: list[Path], into: Path) -> list[str]:
    """Of a model, in as many files as it has."""
    if len(pickles) == 1:
        _save(_tensors(pickles[0]), into / "model.safetensors")
        return ["model.safetensors"]
    places: dict[str, str] = {}
    names, size = [], 0
    for number, pickle in enumerate(pickles, 1):
        tensors = _tensors(pickle)
        names.append(f"model-{number:05}-of-{len(pickles):05}.safetensors")
        _save(tensors, into / names[-1])
        places |= dict.fromkeys(tensors, names[-1])
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (into / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return names


def _tensors(file: Path) -> dict[str, Any]:
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling raises
        raise ModelFailed(f"{file} cannot be converted: it holds more than tensors, or is broken: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ModelFailed(f"{file} cannot be converted: it holds no tensors by name")
    return found


def _save(tensors: dict[str, Any], file: Path) -> None:
    """Each with memory of its own, as the form wants it; torch's mark tells transformers whose they are."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
