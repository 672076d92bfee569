"""Where a driver runs: in the server's threads, in a process, on a cluster. To add a place, add a file and a line."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

from embedpool.config.settings import Ray
from embedpool.config.spec import ModelSpec
from embedpool.places.process import ProcessPlace
from embedpool.places.ray_place import RayDriver, RayPlace
from embedpool.tasks.driver import Driver, Place, Report, unheard


def open_place(
    spec: ModelSpec,
    make_driver: Callable[[], Driver],
    *,
    prepare_child: Callable[[], None] | None = None,
    longest_batch_s: float = math.inf,
    report: Report = unheard,
    ray: Ray = Ray(),  # noqa: B008  (it cannot be changed)
    state_dir: Path = Path(),
) -> Place:
    """The place that the spec names, with an open driver in it. Raises whatever opening the driver raises.

    `report` is told how far the driver is.
    A process of its own calls `prepare_child` before anything else, and is ended when a batch takes longer than
    `longest_batch_s`. Both callables must then be picklable. `ray` says which cluster is meant; what is known of one
    that is started here stands below `state_dir`.
    """
    if spec.place == "ray":
        make_ray_driver = functools.partial(RayDriver, spec, make_driver, ray, state_dir)
        return RayPlace(spec, make_ray_driver, prepare_child, longest_batch_s, report)
    if spec.place == "process":
        return ProcessPlace(spec, make_driver, prepare_child, longest_batch_s, report)
    return Place(make_driver(), report)
