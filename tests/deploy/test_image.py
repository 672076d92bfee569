"""The image, built on a base of Debian's own packages and run with no rights at all. Takes minutes: --long runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.deploy.conftest import CONF, said, tool
from tests.docs import ROOT
from tests.live.conftest import MINILM, wait_until

SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}  # of Debian, by the Python in it
PACKAGES = "python3,python3-venv,ca-certificates"
STATE = "/var/lib/embedpool"
KEY = "a-key-of-the-test"
GRACE_S = 60
CONFINED = [
    "--no-healthcheck",  # of the engine: without systemd there is no timer for it
    "--ulimit=nofile=1024:1024",
    "--ulimit=nproc=4096:4096",
    "--read-only",
    "--read-only-tmpfs=false",
    "--tmpfs=/tmp",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--network=none",
]
ANSWERS = "import sys, urllib.request as u; print(u.urlopen('http://127.0.0.1:8876' + sys.argv[1], timeout=60).status)"

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


class Engine:
    """podman and buildah with a store of their own, which goes with the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        store = [f"--root={folder / 'store'}", f"--runroot={folder / 'run'}"]
        self._buildah = [tool("buildah"), *store]
        self._podman = [tool("podman"), *store, f"--tmpdir={folder / 'tmp'}", "--cgroup-manager=cgroupfs"]
        self._podman += ["--runtime=runc"] if shutil.which("runc") else []

    def podman(self, *arguments: str | Path, code: int = 0) -> str:
        return said(*self._podman, *arguments, code=code)

    def build(self, base: str, wheels: Path, tag: str, *arguments: str, code: int = 0) -> str:
        command = [*self._buildah, "bud", "--isolation=chroot", "--format=docker", "--layers"]
        command += ["--build-arg", f"PYTHON_IMAGE={base}", "--build-arg=PIP_NO_INDEX=1"]
        command += ["--build-arg=PIP_FIND_LINKS=/wheels", f"--volume={wheels}:/wheels:ro", f"--tag={tag}"]
        return said(*command, *arguments, f"--file={CONF / 'docker' / 'Dockerfile'}", str(ROOT), code=code)

    def clear(self) -> None:
        for what in (["rm"], ["volume", "rm"], ["rmi"]):
            subprocess.run([*self._podman, *what, "--all", "--force"], capture_output=True, check=False)
        # The store is a mount of its own; without this nobody could remove the folder of the test.
        subprocess.run(["umount", self._folder / "store" / "overlay"], capture_output=True, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclasses.dataclass
class Container:
    """One that runs."""

    engine: Engine
    name: str

    def exec(self, *command: str, code: int = 0) -> str:
        return self.engine.podman("exec", self.name, *command, code=code)

    def vectors(self, model: str, *texts: str) -> np.ndarray:
        lines = self.exec("embedpool", "embed", "--model", model, *texts).splitlines()
        return np.array([json.loads(line) for line in lines])

    def wait_ready(self) -> None:
        with self.saying_why():
            wait_until(lambda: self.is_running() and self.answers("/ready"))

    def answers(self, path: str) -> bool:
        command = [*self.engine._podman, "exec", self.name, "python3", "-c", ANSWERS, path]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def is_running(self) -> bool:
        assert self._inspect("{{.State.Status}}") != "exited"
        return self._inspect("{{.State.Running}}") == "true"

    def stops_by_itself(self) -> None:
        """SIGTERM ends it within its time: after that it is killed, which gives another code."""
        with self.saying_why():
            self.engine.podman("stop", f"--time={GRACE_S}", self.name)
            assert self._inspect("{{.State.ExitCode}}") == "0"

    @contextlib.contextmanager
    def saying_why(self) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.engine.podman('logs', self.name)}") from None

    def _inspect(self, what: str) -> str:
        return self.engine.podman("inspect", "--format", what, self.name).strip()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if os.geteuid():
        pytest.skip("needs root: the engines are tried with it alone")
    made = Engine(tmp_path_factory.mktemp("engine"))
    yield made
    made.clear()


@pytest.fixture(scope="module")
def image(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """cpu-demo, and with it cpu, which is the same without the model. Built without an index, from wheels alone."""
    suite = SUITES.get(sys.version_info[:2])
    if suite is None:
        pytest.skip("Debian has no base with this Python, for which the wheels are")
    folder = tmp_path_factory.mktemp("image")
    said(tool("mmdebstrap"), "--variant=minbase", f"--include={PACKAGES}", suite, folder / "base.tar")
    base = "localhost/embedpool-test-base:1"
    engine.podman("import", folder / "base.tar", base)
    (folder / "base.tar").unlink()
    wheels = folder / "wheels"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--constraint", ROOT / "conf" / "constraints.txt"]
    said(*download, "--dest", wheels, f"{ROOT}[demo,openvino]", "setuptools>=68", "wheel")
    engine.build(base, wheels, "localhost/embedpool-test:cpu")
    engine.build(base, wheels, "localhost/embedpool-test:cpu-demo", "--target=cpu-demo")
    if torch.version.cuda is None:  # as are the wheels: an image for GPUs that has no use for them is no image
        assert "torch without CUDA" in engine.build(base, wheels, "embedpool-test:cuda", "--target=cuda", code=1)
    yield "localhost/embedpool-test:cpu-demo"
    shutil.rmtree(wheels)


@pytest.fixture
def run(engine: Engine, image: str) -> Iterator[Callable[..., Container]]:
    """Start the image, confined; what the test gives stands before the image's name, such as a mount."""
    started: list[str] = []

    def start(*options: str, image: str = image, user: str = "10001:0", arguments: Sequence[str] = ()) -> Container:
        name = f"embedpool-test-{len(started)}"
        started.append(name)
        secret = f"--env=EMBEDPOOL_SECRET_ADMIN={KEY}"
        engine.podman(
            "run", "--detach", f"--name={name}", *CONFINED, f"--user={user}", secret, *options, image, *arguments
        )
        return Container(engine, name)

    yield start
    for name in started:
        engine.podman("rm", "--force", "--volumes", name)


def file_for_all(file: Path, text: str) -> Path:
    """A file that a container of any uid may read and write."""
    file.write_text(text)
    file.chmod(0o666)
    return file


@pytest.mark.parametrize("user", ["10001:0", "123456:0"], ids=["the image's user", "any user"])
def test_the_image_needs_no_rights(run: Callable[..., Container], user: str) -> None:
    """No root, no capability, no network and nothing to write but its state: it gets ready, embeds, and ends with 0."""
    server = run(f"--volume={STATE}", image="localhost/embedpool-test:cpu", user=user)
    server.wait_ready()
    server.exec("embedpool", "register", "--model", "m", "--type", "fake")
    assert server.vectors("m", "hello").shape == (1, 384)
    status = server.exec("cat", "/proc/1/status")
    assert set(re.findall(r"^Cap\w+:\s+(\w+)", status, flags=re.MULTILINE)) == {"0" * 16}
    assert re.search(r"^Uid:\s+(\d+)", status, flags=re.MULTILINE)[1] == user.partition(":")[0]
    server.exec("touch", "/etc/embedpool/here", code=1)
    server.stops_by_itself()


def test_a_request_without_the_key_is_refused(run: Callable[..., Container]) -> None:
    """The image listens at every address, so it lets nobody in who has no key; /health needs none."""
    server = run(f"--volume={STATE}")
    server.wait_ready()
    assert server.answers("/health")
    assert not server.answers("/status")
    server.stops_by_itself()


def test_the_health_check_of_the_image(engine: Engine, run: Callable[..., Container]) -> None:
    """What docker and compose ask succeeds while a server runs, and fails in a container without one."""
    server = run(f"--volume={STATE}")
    server.wait_ready()
    found = engine.podman("image", "inspect", "--format={{json .HealthCheck.Test}}", "localhost/embedpool-test:cpu")
    kind, *command = json.loads(found)
    assert kind == "CMD"
    server.exec(*command)
    idle = run(f"--volume={STATE}", "--entrypoint=sleep", arguments=["600"])
    idle.exec(*command, code=3)
    server.stops_by_itself()


def test_files_mounted_by_themselves_can_be_changed(run: Callable[..., Container], tmp_path: Path) -> None:
    """A pool.yml and a keys.yml that are mounts of their own cannot be replaced; the server writes into them."""
    pool = file_for_all(tmp_path / "pool.yml", "version: 1\nmodels: []\n")
    keys = file_for_all(tmp_path / "keys.yml", "version: 1\nkeys: []\n")
    mounts = [f"--volume={file}:{STATE}/{file.name}" for file in (pool, keys)]
    server = run(f"--volume={STATE}", *mounts)
    server.wait_ready()
    server.exec("embedpool", "register", "--model", "m", "--type", "fake")
    server.exec("embedpool", "key", "create", "--name", "somebody")
    assert "model: m" in pool.read_text()
    assert "somebody" in keys.read_text()
    file_for_all(pool, "version: 1\nmodels:\n  - {model: n, driver: {type: fake}}\n")
    with server.saying_why():
        wait_until(lambda: server.answers("/ready?models=n"))
    server.stops_by_itself()


def test_the_settings_of_the_pods_work_in_the_image(run: Callable[..., Container]) -> None:
    """With Kubernetes' files where its pods have them, and a state that is an empty folder at first."""
    base = CONF / "kubernetes" / "base"
    server = run(
        f"--volume={base / 'config.yml'}:/etc/embedpool/config.yml:ro",
        f"--volume={base / 'pool.yml'}:/etc/embedpool-pool/pool.yml:ro",
        f"--tmpfs={STATE}:mode=2770",
        "--env=EMBEDPOOL_SECRET_EMBED=another-key",
    )
    server.wait_ready()
    assert server.vectors("minilm-l6", "hello").shape == (1, 384)
    assert "storage_error" in server.exec("embedpool", "register", "--model", "m", "--type", "fake", "--json", code=1)
    server.stops_by_itself()


def system_calls(group: str) -> Iterator[str]:
    """Of a group of systemd's, such as @system-service."""
    for line in said(tool("systemd-analyze"), "--no-pager", "syscall-filter", group).splitlines()[1:]:
        name = line.strip()
        if name.startswith("@"):
            yield from system_calls(name)
        elif name and not name.startswith("#"):
            yield name


@pytest.mark.parametrize("place", ["thread", "process"])
def test_the_unit_lets_a_model_run(run: Callable[..., Container], tmp_path: Path, place: str) -> None:
    """With the system calls that conf/embedpool.service allows and no others, the packaged model gives real vectors."""
    (group,) = re.findall(r"^SystemCallFilter=(\S+)$", (CONF / "embedpool.service").read_text(), flags=re.MULTILINE)
    allowed = {"names": sorted(set(system_calls(group))), "action": "SCMP_ACT_ALLOW"}
    profile = tmp_path / "seccomp.json"
    refused = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1}  # EPERM, as the unit says
    profile.write_text(json.dumps({**refused, "syscalls": [allowed]}))
    server = run(f"--volume={STATE}", f"--security-opt=seccomp={profile}")
    server.wait_ready()
    if place == "process":
        server.exec("embedpool", "register", "--model", MINILM, "--type", "local_st", "--replace", "--place", place)
    cat, kitten, law = server.vectors(MINILM, "a cat", "a kitten", "the tax law of 1913")
    assert cat.shape == (384,)
    assert np.isclose(cat @ cat, 1, atol=1e-4)
    assert cat @ kitten > 0.6 > 0.3 > cat @ law
    server.stops_by_itself()
