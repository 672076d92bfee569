"""Count the cores that this process may use."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")

_most: int | None = None  # that this process was given


def limit_cores(most: int) -> None:
    """This process shares its machine by agreement, not by a quota."""
    global _most  # noqa: PLW0603  (it is the process that is limited)
    _most = most


def available_cores() -> int:
    """Cores this process may use, by affinity and by the quotas of its cgroup and of those above it, never the host's.

    Reads version 2 of cgroups and version 1, in a container or below a unit of systemd.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min([cores, _most or cores, *map(math.ceil, _quotas())]), 1)


def limit_numpy() -> None:
    """Have numpy multiply with as many threads as this process has cores: by itself it counts the host's."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(available_cores(), "blas")


def _quotas() -> Iterator[float]:
    """Each in cores."""
    for folder in _folders():
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                yield int(quota) / int(period)
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota = (folder / "cpu.cfs_quota_us").read_text()
            if int(quota) > 0:
                yield int(quota) / int((folder / "cpu.cfs_period_us").read_text())


def _folders() -> Iterator[Path]:
    """Of the process's groups and of those above them. In a container the mount's root may be the group itself."""
    yield CGROUPS
    groups: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        groups = OWN_GROUPS.read_text().splitlines()
    for line in groups:  # such as 0::/a/b, or 4:cpu,cpuacct:/a/b
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = PurePosixPath(path.lstrip("/"))
        # Version 1 is mounted under the names of its controllers, in either order, and under each of them.
        for root in {CGROUPS / controllers, CGROUPS / "cpu"} if controllers else {CGROUPS}:
            for level in (group, *group.parents):
                yield root / level
