"""Where a value comes from, and what is wrong with it, in sentences.

Flags win over the environment (FASTIM_NODE__LISTEN), that over the TOML file, that over the defaults. Every
problem that can be found is found at once.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsConfigDict, SettingsError

from fastim.config.coherence import Role, contradictions
from fastim.config.schema import ENV_PREFIX, Config, bounds, known_keys, tables
from fastim.errors import UsageError

NOT_SETTINGS: Final = frozenset(
    {
        "FASTIM_CONFIG", "FASTIM_TOKEN", "FASTIM_BUILD", "FASTIM_REQUIRE",
        "FASTIM_KAFKA", "FASTIM_KAFKA3", "FASTIM_POSTGRES", "FASTIM_POSTGRES2", "FASTIM_REDIS",
        "FASTIM_VALKEY",
    }
)  # fmt: skip
"""The file to read, the token of a command, what the build and the tests look at, and where the servers of
development are (deploy/dev/servers env)."""


class ConfigError(UsageError):
    """What is wrong with the configuration; one sentence each, secrets left out."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def load(flags: Mapping[str, Any] | None = None, file: Path | None = None, role: Role = "serve") -> Config:
    """The configuration, checked for a process of that role. flags: nested tables of what the command line
    named.

    Raises ConfigError with every problem that was found.
    """
    problems = _unknown_environment()
    if file is not None:
        _read_toml(file)  # a sentence of our own for a file that is missing or not TOML

    class _Located(Config):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        config = _Located(**(flags or {}))
    except ValidationError as error:
        wrong = [_sentence(detail, flags or {}, file) for detail in error.errors(include_url=False)]
        raise ConfigError(problems + wrong) from None
    except SettingsError as error:
        found = re.search(r'field "([a-z_]+)"', str(error))
        name = found[1] if found else "a table"
        text = f"the environment's value of {name} is not JSON, which lists and tables need"
        raise ConfigError([*problems, text]) from None
    problems += list(contradictions(config, role))
    if problems:
        raise ConfigError(problems)
    return config


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError([f"{file}: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file} is not TOML: {error}"]) from None


def _unknown_environment() -> list[str]:
    """Names that pydantic never looks at. Those inside a table it refuses by itself."""
    known = {f"{ENV_PREFIX}{key.replace('.', '__')}".upper(): key for key in known_keys()}
    sections = {prefix.partition(".")[0] for prefix, _ in tables(Config) if prefix} | {"kinds"}
    problems = []
    for name in sorted(os.environ):
        upper = name.upper()
        if not upper.startswith(ENV_PREFIX) or upper in NOT_SETTINGS or upper in known:
            continue
        if upper.removeprefix(ENV_PREFIX).partition("__")[0].lower() in sections:
            continue
        problems.append(f"the environment has {name}, an unknown key{_did_you_mean(upper, list(known))}")
    return problems


def _did_you_mean(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.7)
    return f"; did you mean {near[0]}?" if near else ""


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        if part == "[key]":
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _model_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The table that a location's last name stands in."""
    model: type[BaseModel] = Config
    names = [part for part in location if isinstance(part, str)]
    for part in names[:-1]:
        field = model.model_fields.get(part)
        if field is None:
            continue
        found = [
            m for m in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(m, type)
        ]
        model = next((m for m in found if issubclass(m, BaseModel)), model)
    return model


def _sentence(detail: ErrorDetails, flags: Mapping[str, Any], file: Path | None) -> str:
    """One problem: the key, its value unless secret, what it must be, where it was set."""
    location = detail["loc"]
    key, kind = _dotted(location), detail["type"]
    where = _origin_of(location, flags, file)
    model = _model_at(location)
    leaf = next((part for part in reversed(location) if isinstance(part, str)), "")
    if kind == "extra_forbidden":
        prefix = key[: len(key) - len(leaf)]
        local = _did_you_mean(key, [prefix + name for name in model.model_fields])
        return f"{key} is an unknown key{local or _did_you_mean(key, known_keys())}{where}"
    if kind == "missing":
        return f"{key} is missing{where}"
    field = model.model_fields.get(leaf)
    value = detail["input"]
    if not isinstance(value, (str, int, float, bool)) or _may_hold_secret(field):
        what = f"{key} is not as it must be"
    else:
        what = f"{key} is {value[:120]!r}" if isinstance(value, str) else f"{key} is {value!r}"
    return f"{what}; {_rule(detail, field)}{where}"


def _may_hold_secret(field: FieldInfo | None) -> bool:
    """A secret, or a whole table in whose place something else stands."""
    if field is None:
        return False
    kinds = (field.annotation, *get_args(field.annotation))
    return any(isinstance(kind, type) and issubclass(kind, (SecretStr, BaseModel)) for kind in kinds)


def _rule(detail: ErrorDetails, field: Any) -> str:
    low, high = bounds(field)
    if detail["type"].startswith(("greater_than", "less_than")):
        if low is not None:
            return f"must be {low:,}-{high:,}"
        context = detail.get("ctx", {})
        limits = [
            f"{word} {context[name]:,}"
            for name, word in (("ge", "at least"), ("le", "at most"))
            if name in context
        ]
        return f"must be {' and '.join(limits)}"
    if detail["type"] == "string_pattern_mismatch":
        return f"must match {detail['ctx']['pattern']}"
    text = detail["msg"].removeprefix("Value error, ")
    text = text.removeprefix("Input should be ")
    return text if text.startswith(("must", "the ")) else f"must be {text}"


def _origin_of(location: tuple[int | str, ...], flags: Mapping[str, Any], file: Path | None) -> str:
    if _holds(flags, location):
        return " (command line)"
    name = ENV_PREFIX + "__".join(str(part).upper() for part in location)
    for length in range(len(location), 0, -1):
        name = ENV_PREFIX + "__".join(str(part).upper() for part in location[:length])
        if name in os.environ:
            return f" (environment, {name})"
    return f" ({file})" if file is not None and _holds(_read_toml(file), location) else ""


def _holds(tables: Any, location: tuple[int | str, ...]) -> bool:
    for part in location:
        listed = isinstance(tables, (list, tuple)) and isinstance(part, int) and part < len(tables)
        if listed or (isinstance(tables, Mapping) and part in tables):
            tables = tables[part]
        else:
            return isinstance(tables, (list, tuple))
    return True
