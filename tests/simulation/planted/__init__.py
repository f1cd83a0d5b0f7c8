"""Errors that the design could have had, as patches over the real code. Each must be caught on a pinned seed.

A patch is the smallest change that makes the mistake; nothing in the product knows of it. `kinds` are the
violations (checkers.py) that count as catching it. Each has a directed nemesis, a small stage on which the
error matters, because most of them are rare under random faults; the seed draws its timing.
"""

from tests.simulation.planted import cluster, device, dispatch, node, store
from tests.simulation.planted.stage import PLANTED, Planted

__all__ = ["PLANTED", "Planted", "cluster", "device", "dispatch", "node", "store"]
