"""The composition root: the only place that names implementations.

compose     which parts a process has, their start and their end
backends    which store, bus and presence a URL means
ground      what the parts stand on
access, dispatching, answering    the parts: node, dispatcher, api
process     the event loop, signals, fatal errors, exit codes
supervisor  several nodes of one machine on one address
figures     what the parts count, as metrics
statuspage  health and metrics of a process without REST
"""

from fastim.app.compose import App
from fastim.app.process import run

__all__ = ["App", "run"]
