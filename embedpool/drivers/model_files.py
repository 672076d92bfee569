"""The files of a model's folder: JSON documents, weights, and what is said of those that cannot be read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from embedpool.errors import ModelFailed

LFS_POINTER = b"version https://git-lfs"
# Names that sentence-transformers has given to a Transformer's settings, in the order in which it looks for them.
TRANSFORMER_SETTINGS = [
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]


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


def labels_of(folder: Path) -> list[str]:
    """The labels of a classifier in their order; two where its config.json says nothing, as transformers has it."""
    config = read_json(folder / "config.json")
    names = config.get("id2label")
    if isinstance(names, dict) and names:
        return [str(names[key]) for key in sorted(names, key=int)]
    return [f"LABEL_{i}" for i in range(int(config.get("num_labels") or 2))]


def is_model2vec(folder: Path) -> bool:
    """Whether its weights are a table in model2vec's form."""
    file = folder / "model.safetensors"
    return file.is_file() and "embeddings" in weight_names(file)


def idf_file(folder: Path) -> Path | None:
    """The JSON file with the weight of each token, of a SparseStaticEmbedding that has one; None of one with a table.

    Raises ModelFailed where it is not there.
    """
    named = read_json(folder / "config.json").get("path")
    if not isinstance(named, str) or not named.endswith(".json"):
        return None
    found = (where / Path(named).name for where in (folder, folder.parent))
    file = next((one for one in found if one.is_file()), None)
    if file is None:
        raise ModelFailed(f"{folder} names the weights {named!r}, which are not in the model's folder")
    return file


def tensors_of(file: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file. Raises ModelFailed."""
    try:
        with safe_open(str(file), framework="np") as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118  (it is no dict)
    except TypeError as error:  # a type that numpy has not, such as bfloat16
        raise ModelFailed(f"{file}: {error}") from None
