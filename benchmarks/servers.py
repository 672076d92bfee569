"""The servers that are measured: how each is installed, started, asked and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.environments import CACHE, HERE, Absent, install, plain
from benchmarks.llama_cpp import llama_cpp
from benchmarks.texts import model_folder

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
GRAPHS = CACHE / "graphs"  # embedpool's exports, shared with reference.py
BASELINE = "@baseline"  # ends the name of a server of another checkout
STARTS_WITHIN_S, STOPS_WITHIN_S = 240, 40
EMBEDPOOL = [sys.executable, "-P", "-m", "embedpool"]  # PYTHONPATH says whose; an installed one comes after it
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(CACHE / "hf"), "DO_NOT_TRACK": "1", "PYTHONWARNINGS": "ignore"}


@dataclass(frozen=True)
class Server:
    """How one server is run. `command` gets the folder it may write to and its port.

    A server with a `checkout` runs that checkout's embedpool, whose `init` has written to the folder before.
    """

    name: str
    about: str
    command: Callable[[Path, int], list[str]]
    venv: str | None = None  # the name of its requirements file; else it runs in this interpreter's environment
    checkout: Path | None = None
    path: str = "/embed"
    texts_key: str = "texts"
    model_folder: Callable[[], Path] = model_folder
    environment: dict[str, str] = field(default_factory=dict)  # beside what all get
    cache: dict[str, Any] = field(default_factory=lambda: {"enabled": False})  # config.yml: the texts come again
    first_start: str | None = None  # the variable that names the folder in which a first start keeps work for the next

    def body(self, texts: list[str]) -> bytes:
        """A request for the vectors of `texts`, on one line."""
        return json.dumps({"model": MODEL, self.texts_key: texts}).encode()

    def vectors(self, answer: bytes) -> list[list[float]]:
        """The vectors of an answer."""
        document = json.loads(answer)
        return document["vectors"] if "vectors" in document else [item["embedding"] for item in document["data"]]


@dataclass
class Running:
    """A server that has answered, `startup_s` seconds after it was started."""

    server: Server
    port: int
    process: psutil.Process
    startup_s: float

    def ask(self, texts: list[str], timeout_s: float = 300) -> list[list[float]]:
        """The vectors of `texts`."""
        url = f"http://127.0.0.1:{self.port}{self.server.path}"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, self.server.body(texts), headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return self.server.vectors(answer.read())

    def cpu_s(self) -> float:
        """CPU seconds used so far by the server and its children."""
        return sum(sum(process.cpu_times()[:2]) for process in self._tree())

    def peak_mb(self) -> float:
        """Peak resident memory in MB, summed over its processes; shared pages count in each."""
        return sum(_peak_bytes(process) for process in self._tree()) / 1e6

    def pss_mb(self) -> float:
        """Memory in MB, summed over its processes; a page that several share is divided among them."""
        infos = [process.memory_full_info() for process in self._tree()]
        return sum(getattr(info, "pss", info.uss) for info in infos) / 1e6  # macOS does not tell PSS

    def _tree(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


@contextlib.contextmanager
def running(server: Server, *, first_start: bool = False) -> Iterator[Running]:
    """The server from its start to its stop, if need be as one that has never started here. Raises Absent."""
    if server.venv:
        install(server.venv)
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _free_port()
        environment = {**os.environ, **QUIET, "MODEL_FOLDER": str(server.model_folder()), "PORT": str(port)}
        environment |= {"PYTHONPATH": str(server.checkout or HERE / "apps"), "EMBEDPOOL_SERVER__PORT": str(port)}
        environment |= {"EMBEDPOOL_PATHS__CACHE_DIR": str(GRAPHS), **server.environment}
        if first_start and server.first_start:
            environment[server.first_start] = str(folder / "first_start")
        if server.checkout:
            init = [*EMBEDPOOL, "init"]
            subprocess.run(init, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
            _set_cache(folder / ".config" / "config.yml", server.cache)
        command = server.command(folder, port)
        with open(folder / "log", "wb") as log:
            start_s = time.perf_counter()
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            up = Running(server, port, psutil.Process(process.pid), 0.0)
            _wait(up, process, folder / "log")
            up.startup_s = time.perf_counter() - start_s
            yield up
        finally:
            _stop(process)


def _set_cache(file: Path, cache: dict[str, Any]) -> None:
    """Of a checkout that has a cache."""
    config = yaml.safe_load(file.read_text())
    if "cache" in config:
        config["cache"] |= cache
        file.write_text(yaml.safe_dump(config))


def of_baseline(server: Server, checkout: Path) -> Server:
    """The same server with the code of another checkout of embedpool."""
    return replace(server, name=f"{server.name}{BASELINE}", checkout=checkout)


def _embedpool(config: str = "", *arguments: str) -> Callable[[Path, int], list[str]]:
    def command(folder: Path, port: int) -> list[str]:
        pool_yml = f"models:\n  - model: {MODEL}\n    driver: {{type: local_st, config: {{{config}}}}}\n"
        (folder / ".config" / "pool.yml").write_text(f"version: 1\n{pool_yml}")
        return [*EMBEDPOOL, "pool", "start", *arguments]

    return command


def naive(app: str = "naive") -> Callable[[Path, int], list[str]]:
    """One of the Flask apps below apps/."""

    def command(folder: Path, port: int) -> list[str]:
        options = f"--worker-class gthread --threads 32 --timeout 600 --bind 127.0.0.1:{port} --no-control-socket"
        return [sys.executable, "-m", "gunicorn", *options.split(), f"{app}:app"]

    return command


def infinity(engine: str, folder_of: Callable[[], Path] = model_folder) -> Callable[[Path, int], list[str]]:
    """infinity with one of its engines."""

    def command(folder: Path, port: int) -> list[str]:
        model = str(folder_of())
        if engine == "optimum":  # it finds the graph only below the working directory, and would not pool by itself
            for file in onnx_folder().iterdir():
                (folder / file.name).symlink_to(file)
            model = ". --pooling-method mean"
        options = f"--model-id {model} --served-model-name {MODEL} --engine {engine} --device cpu --dtype float32"
        program = CACHE / f"infinity-{engine}" / "bin" / "infinity_emb"
        return [str(program), "v2", *options.split(), "--host", "127.0.0.1", "--port", str(port)]

    return command


def vllm(dtype: str) -> Callable[[Path, int], list[str]]:
    """vLLM's server; its command cannot be used, which looks for a package of another name than that for CPUs."""

    def command(folder: Path, port: int) -> list[str]:
        program = [str(CACHE / "vllm" / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
        options = f"--model {model_folder()} --served-model-name {MODEL} --runner pooling --dtype {dtype}"
        options += f" --gpu-memory-utilization 0.3 --host 127.0.0.1 --port {port}"  # the share of the machine's memory
        return [*program, *options.split()]

    return command


def onnx_folder() -> Path:
    """The model as an ONNX graph with fused layers, exported once for infinity's optimum engine. Raises Absent."""
    folder = CACHE / "onnx"
    if not (folder / "model.onnx").exists():
        program = [str(CACHE / "infinity-optimum" / "bin" / "optimum-cli"), "export", "onnx", "--optimize", "O2"]
        options = ["--library-name", "transformers", "--task", "feature-extraction", "--model", str(model_folder())]
        done = subprocess.run([*program, *options, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Absent(f"the ONNX export failed: {plain(done.stderr)}")
    return folder


def _app(name: str) -> Callable[[Path, int], list[str]]:
    program = [str(CACHE / name / "bin" / "python"), str(HERE / "apps" / f"{name}_app.py")]
    return lambda folder, port: program


OURS: dict[str, Any] = {"checkout": HERE.parent, "first_start": "EMBEDPOOL_PATHS__CACHE_DIR"}
OPENAI: dict[str, Any] = {"path": "/embeddings", "texts_key": "input"}
V1: dict[str, Any] = {**OPENAI, "path": "/v1/embeddings"}
# vLLM leaves a core to others if it is not told, and takes 4 GB and more for a cache that these models do not use.
VLLM: dict[str, Any] = {
    **V1,
    "venv": "vllm",
    "first_start": "VLLM_CACHE_ROOT",
    "environment": {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",  # its 5 s end connections that a client is just about to use
    },
}


def serving(entry: dict[str, Any], **more: Any) -> Server:
    """This checkout's embedpool with one model: MODEL, with the rest of its entry of pool.yml."""

    def command(folder: Path, port: int) -> list[str]:
        pool = {"version": 1, "models": [{"model": MODEL, **entry}]}
        (folder / ".config" / "pool.yml").write_text(json.dumps(pool))
        return [*EMBEDPOOL, "pool", "start"]

    return Server("embedpool", "", command, **OURS, **more)


_ALL = (
    Server("embedpool-default", "exact fp32, backend auto", _embedpool(), **OURS),
    Server("embedpool-fast", "compute_dtype bfloat16", _embedpool("compute_dtype: bfloat16"), **OURS),
    Server("embedpool-waitress", "as default, without gunicorn", _embedpool("", "--server", "waitress"), **OURS),
    Server("embedpool-process", "as default, the model in a child process", _embedpool("isolation: process"), **OURS),
    Server("naive", "Flask on gunicorn gthread, encode per request", naive()),
    Server("infinity-torch", "infinity 0.0.78, BetterTransformer", infinity("torch"), "infinity-torch", **OPENAI),
    Server("infinity-optimum", "infinity 0.0.78, ONNX Runtime", infinity("optimum"), "infinity-optimum", **OPENAI),
    Server("llama-f32", "llama.cpp's server, F32", llama_cpp("f32"), "llama-cpp", **V1),
    Server("llama-q8", "llama.cpp's server, Q8_0, which loses", llama_cpp("q8_0"), "llama-cpp", **V1),
    Server("vllm-fp32", "vLLM 0.32, float32", vllm("float32"), **VLLM),
    Server("vllm-bf16", "vLLM 0.32, bfloat16", vllm("bfloat16"), **VLLM),
    Server("mosec", "mosec 0.9.8, 32 requests a batch", _app("mosec"), "mosec", path="/inference"),
    Server("litserve", "LitServe 0.2.19, 32 requests a batch", _app("litserve"), "litserve", path="/predict"),
)
SERVERS = {server.name: server for server in _ALL}


def _wait(up: Running, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers a request. Raises Absent with the end of its log."""
    deadline_s, reason = time.monotonic() + STARTS_WITHIN_S, "no answer"
    while process.poll() is None and time.monotonic() < deadline_s:
        try:
            up.ask(["Is there anybody?"])
            return
        except (OSError, ValueError) as error:  # refused, 5xx while loading, half an answer
            reason = str(error)
        time.sleep(0.1)
    ended = "" if process.returncode is None else f"it ended with {process.returncode}; "
    raise Absent(f"{ended}{reason}; its log ends: {plain(log.read_text(errors='replace'))}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL to whatever of its session is left."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOPS_WITHIN_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _peak_bytes(process: psutil.Process) -> int:
    """The kernel's own high-water mark, where it tells it."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return process.memory_info().rss


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
