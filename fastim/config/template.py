"""A configuration file with every key, what it means, its range and its default.

A line that begins with "# " explains; one that begins with "#" alone is a setting at its default, to be
uncommented and changed.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Final, get_args

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fastim.config.schema import (
    ENV_PREFIX,
    FIRST_CUSTOM_KIND,
    Config,
    IssuerSection,
    KindSection,
    bounds,
    tables,
)

_WIDTH: Final = 100
_EXAMPLE: Final[dict[str, Any]] = {
    "issuer": "https://login.example.org",
    "kid": "2026-01",
    "key_file": "/etc/fastim/login.pem",
    "kind": FIRST_CUSTOM_KIND,
    "ttl_ms": 0,
    "countable": True,
    "push": True,
    "preview": "[order]",
    "max_body_bytes": 61_440,
}
"""Values of keys that have no default of their own."""


def template() -> str:
    """The text of the file."""
    lines = [
        "# fastim configuration. What is commented out stands at its default.",
        *_wrapped(
            f"Flags of the command line win over the environment, that over this file. In the environment "
            f"node.listen is {ENV_PREFIX}NODE__LISTEN; lists and tables are JSON there."
        ),
        "",
    ]
    for prefix, model in tables(Config):
        if prefix:
            lines += [*_wrapped(_about(model)), f"[{prefix.rstrip('.')}]"]
        lines += _settings(model)
        lines.append("")
        if prefix == "auth.":
            lines += [*_wrapped("One [[auth.issuers]] table for each key."), "#[[auth.issuers]]"]
            lines += [*_settings(IssuerSection), ""]
    lines += [
        *_wrapped(f"{Config.model_fields['kinds'].description} {_about(KindSection)}"),
        "#[kinds.order]",
    ]
    lines += _settings(KindSection)
    return "\n".join(lines) + "\n"


def _settings(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        if name in ("issuers", "kinds"):
            continue
        yield from _wrapped(_meaning(field))
        yield f"#{name} = {_toml(_default(name, field))}"


def _about(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _wrapped(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH)]


def _meaning(field: FieldInfo) -> str:
    """The description, and what values there are."""
    text = field.description or ""
    low, high = bounds(field)
    if low is not None:
        return f"{text} {low:,}-{high:,}." if isinstance(low, int) else f"{text} {low}-{high}."
    choices = [word for word in get_args(field.annotation) if isinstance(word, str) and word]
    return f"{text} One of {', '.join(choices)}." if choices else text


def _default(name: str, field: FieldInfo) -> Any:
    value = field.default
    if isinstance(value, SecretStr):
        return value.get_secret_value()  # a default is no secret
    if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], SecretStr):
        return value[0].get_secret_value()
    if value is PydanticUndefined or value is None or (name in _EXAMPLE and value == ""):
        return _EXAMPLE[name]
    return value


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, bool) or not isinstance(value, int):
        return json.dumps(value)
    return f"{value:_}" if value >= 1_000 else str(value)
