"""The space of a model: an identifier of whose numbers its vectors are. Vectors of two spaces are never compared.

A local model's is a hash of its files. A remote's is given when its vectors of known texts are first seen, and kept
with them: they are compared, never hashed, since a service's noise would make another hash of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from embedpool.drivers.measure import cosine

logger = logging.getLogger(__name__)

SAME_SPACE_COSINE = 0.999
SPACE_BYTES = 16
FOLDER = "spaces"
# Of a model's files those that decide no number: texts for people, and weights in other formats beside safetensors.
NO_PART = (".md", ".gitattributes", ".gitignore", ".lock", ".png", ".jpg")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_RUNTIMES = ("onnx", "openvino")  # folders; a graph may also lie beside the rest

Array = NDArray[Any]  # of shape (texts, width)


def hashed(*facts: str) -> str:
    """A space that facts decide."""
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=SPACE_BYTES).hexdigest()


def of_files(folder: Path, task: str) -> str:
    """The space of a local model: weights, tokenizer and configurations, byte for byte, and what it is asked for."""
    facts = [task]
    for file in sorted(folder.rglob("*")):
        if file.is_file() and _is_part(file, folder):
            with file.open("rb") as stream:
                name = file.relative_to(folder).as_posix()
                facts.append(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}")
    return hashed(*facts)


def _is_part(file: Path, folder: Path) -> bool:
    """Whether it may decide the numbers of the model in `folder`."""
    parts = file.relative_to(folder).parts
    if file.suffix in NO_PART or any(part.startswith(".") or part == "__pycache__" for part in parts):
        return False
    if parts[0] in OTHER_RUNTIMES or file.suffix == ".onnx":
        return not any(folder.glob("*.safetensors"))
    return file.suffix not in PICKLES or not any(file.parent.glob("*.safetensors"))


def of_probes(state_dir: Path, probes: Array) -> str:
    """The space of a remote model that gave these vectors of the probe texts: that of the same ones seen before.

    Any number of processes may ask at once.
    """
    space, folder = uuid.uuid4().hex, state_dir / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            best = max(((likeness(probes, seen), known) for known, seen in _seen(folder)), default=(0.0, ""))
            if best[0] >= SAME_SPACE_COSINE:
                return best[1]
            _keep(probes, folder / f"{space}.npy")
    except OSError as error:
        logger.warning("space %s will have another name after a restart: it cannot be kept: %s", space, error)
    return space


def likeness(probes: Array, reference: Array) -> float:
    """The least cosine of two models' vectors of the same texts; 0 where these have other widths."""
    if probes.shape != reference.shape:
        return 0.0
    return min(cosine(a, b) for a, b in zip(probes, reference, strict=True))


def _keep(probes: Array, file: Path) -> None:
    new = file.with_suffix(".new")
    with new.open("wb") as stream:
        np.save(stream, probes, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)


def _seen(folder: Path) -> list[tuple[str, Array]]:
    found: list[tuple[str, Array]] = []
    for file in folder.glob("*.npy"):
        with contextlib.suppress(OSError, ValueError, EOFError):  # a disk may break any file
            found.append((file.stem, np.load(file, allow_pickle=False)))
    return found
