"""The composition root: the only place that names implementations.

compose   the parts, their start and their end
process   the event loop, signals, fatal errors, exit codes
figures   what the parts count, as metrics
"""

from fastim.app.compose import App
from fastim.app.process import run

__all__ = ["App", "run"]
