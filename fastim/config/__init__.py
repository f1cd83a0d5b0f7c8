"""Every setting, its default, its range, and where its value came from.

    schema      the tables
    backends    those of store, bus and presence, whose URLs are secrets
    coherence   what only several values together show
    loading     flags > environment > file > defaults, and one sentence for each problem
    template    a file with every key, its meaning and its default

C1  flags > environment > file > defaults; unknown keys are refused everywhere    tests/unit/test_config.py
C2  no error and no repr shows a secret                                           same
C3  the template is a configuration, of the defaults                              same
"""

from fastim.config.backends import shown
from fastim.config.coherence import Role
from fastim.config.loading import ConfigError, load
from fastim.config.schema import Config, is_loopback, split_address
from fastim.config.template import template

__all__ = ["Config", "ConfigError", "Role", "is_loopback", "load", "shown", "split_address", "template"]
