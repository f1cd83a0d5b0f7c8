"""The two models of the simulation: one process on a disk, and a cluster of processes between servers."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from tests.simulation.cluster import Cluster
from tests.simulation.planted import Planted
from tests.simulation.scenario import Plan, draw, draw_cluster
from tests.simulation.world import Outcome, World

MODELS: Final[dict[str, tuple[type[World], Callable[[int], Plan]]]] = {
    "single": (World, draw),
    "cluster": (Cluster, draw_cluster),
}


def run_seed(
    seed: int,
    planted: Planted | None = None,
    verbose: bool = False,
    *,
    control: bool = False,
    model: str = "single",
) -> Outcome:
    """Draw, run, judge. control: the stage of a planted error without the error.

    The garbage collector waits, so that it runs at the same place in every run.
    """
    world_of, draw_plan = MODELS[planted.model if planted is not None else model]
    plan = draw_plan(seed)
    if planted is not None and planted.plan is not None:
        planted.plan(plan)
    was_enabled = gc.isenabled()
    gc.disable()
    quiet = sys.unraisablehook
    sys.unraisablehook = lambda _args: None
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            # A killed process leaves coroutines that never ran.
            warnings.simplefilter("ignore", RuntimeWarning)
            if planted is not None and not control:
                planted.plant(stack)
            world = world_of(plan, planted, verbose)
            outcome = world.run()
            if verbose:
                outcome.trace[:0] = plan.lines()
            del world
            gc.collect()
    finally:
        sys.unraisablehook = quiet
        if was_enabled:
            gc.enable()
    return outcome
