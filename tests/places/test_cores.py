"""How many cores a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from embedpool.places import cores
from embedpool.places.cores import available_cores, limit_numpy

V1 = {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"}


def machine(
    monkeypatch: pytest.MonkeyPatch, root: Path, *, affinity: int, own: str, groups: dict[str, dict[str, str]]
) -> None:
    """One with these files of cgroups."""
    for name, files in groups.items():
        (root / "fs" / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (root / "fs" / name / file).write_text(text)
    (root / "cgroup").write_text(own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setattr(cores, "CGROUPS", root / "fs")
    monkeypatch.setattr(cores, "OWN_GROUPS", root / "cgroup")


@pytest.mark.parametrize(("affinity", "quota", "found"), [
    (8, "max 100000", 8), (8, "150000 100000", 2), (2, "400000 100000", 2), (8, "10000 100000", 1),
    (3, "nonsense", 3), (3, "100 0", 3), (3, "", 3),
])  # fmt: skip
def test_cores_are_those_of_the_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, affinity: int, quota: str, found: int
) -> None:
    """Threads are sized by affinity and by the cgroup's quota, whichever is less, never by the host."""
    machine(monkeypatch, tmp_path, affinity=affinity, own="0::/\n", groups={"": {"cpu.max": quota}})
    assert available_cores() == found


@pytest.mark.parametrize(("own", "groups", "found"), [
    ("0::/system.slice/embedpool.service\n", {"system.slice/embedpool.service": {"cpu.max": "200000 100000"}}, 2),
    ("0::/system.slice/embedpool.service\n", {"system.slice": {"cpu.max": "300000 100000"}}, 3),
    ("0::/a/b\n", {"a": {"cpu.max": "400000 100000"}, "a/b": {"cpu.max": "100000 100000"}}, 1),
    ("0::/elsewhere\n", {"a": {"cpu.max": "100000 100000"}}, 8),
    ("0::/of/the/host\n", {"": {"cpu.max": "100000 100000"}}, 1),  # the mount's root is the container's own
    ("4:cpu,cpuacct:/docker/x\n5:memory:/docker/x\n", {"cpu,cpuacct/docker/x": V1}, 2),
    ("4:cpu,cpuacct:/docker/x\n", {"cpu,cpuacct": V1}, 2),  # likewise
    ("4:cpuacct,cpu:/docker/x\n", {"cpu/docker/x": V1}, 2),  # of which the mount has the names in the other order
    ("4:cpu:/\n", {"cpu": {**V1, "cpu.cfs_quota_us": "-1"}}, 8),
    ("5:memory:/x\n", {"memory/x": V1}, 8),
    ("", {}, 8),
    ("nonsense\n\n::\n", {}, 8),
])  # fmt: skip
def test_the_groups_above_count_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str, groups: dict[str, dict[str, str]], found: int
) -> None:
    """systemd sets a quota at the unit, orchestrators at the pod above the container."""
    machine(monkeypatch, tmp_path, affinity=8, own=own, groups=groups)
    assert available_cores() == found


def test_a_machine_without_cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Has its affinity."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "none")
    monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "none")
    assert available_cores() == 3


def test_numpy_multiplies_with_the_cores_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it has a thread for each core of the host, which a quota would stop in turns."""
    monkeypatch.setattr(cores, "available_cores", lambda: 1)
    with threadpool_limits(2, "blas"):
        limit_numpy()
        blas = ThreadpoolController().select(user_api="blas").info()
        assert blas
        assert {library["num_threads"] for library in blas} == {1}
