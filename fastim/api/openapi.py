"""The table's row, and the OpenAPI 3.1 document that is made of the table.

There is no page that shows the document: the usual ones load their program from somebody else's server.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

import fastim
from fastim.api.problems import Problem, status_of
from fastim.api.shapes import Given, NoQuery, Taken

_REF: Final = "#/components/schemas/{name}"


class Endpoint(msgspec.Struct, frozen=True):
    """One operation. name: of the method that does the work, and the operationId."""

    method: str
    path: str
    name: str
    summary: str
    token: bool = False
    query: type[Taken] = NoQuery
    body: type[Taken] | None = None
    answer: type[Given] | None = None
    refusals: tuple[str, ...] = ()
    head: bool = False
    status: int = 200
    """Of the answer."""
    taken: type[Given] | None = None
    """The answer with 202: it will be done."""

    @property
    def methods(self) -> tuple[str, ...]:
        return (self.method, "HEAD") if self.head else (self.method,)


@functools.cache
def path_pattern(path: str) -> re.Pattern[str]:
    """Matches a request's raw path: this spelling and no other."""
    return re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path)))


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The whole document."""
    kinds: list[type] = [Problem]
    for one in endpoints:
        kinds += [kind for kind in (one.query, one.body, one.answer, one.taken) if kind is not None]
    _, components = msgspec.json.schema_components(list(dict.fromkeys(kinds)), ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for one in endpoints:
        query = components[one.query.__name__] if one.query is not NoQuery else {}
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one, query)
    used = {name: schema for name, schema in components.items() if not name.endswith("Query")}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fastim",
            "version": fastim.__version__,
            "description": "Errors are application/problem+json: look at `code`, repeat what is `retryable`.",
        },
        "paths": paths,
        "components": {
            "schemas": used,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


def _operation(one: Endpoint, query: dict[str, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", one.path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in query.get("properties", {}).items()
    ]
    operation: dict[str, Any] = {"operationId": one.name, "summary": one.summary}
    if parameters:
        operation["parameters"] = parameters
    if one.body is not None:
        operation["requestBody"] = {"required": True, "content": _content("application/json", one.body)}
    operation["responses"] = _responses(one)
    if one.token:
        operation["security"] = [{"token": []}]
    return operation


def _responses(one: Endpoint) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": "Done"}
    if one.answer is not None:
        answer["content"] = _content("application/json", one.answer)
    responses: dict[str, Any] = {str(one.status): answer}
    if one.taken is not None:
        responses["202"] = {"description": "Taken", "content": _content("application/json", one.taken)}
    by_status: dict[int, list[str]] = {}
    for code in dict.fromkeys(one.refusals):
        by_status.setdefault(status_of(code), []).append(code)
    for status, codes in sorted(by_status.items()):
        responses[str(status)] = {
            "description": ", ".join(codes),
            "content": _content("application/problem+json", Problem),
        }
    return responses


def _content(media: str, kind: type) -> dict[str, Any]:
    return {media: {"schema": {"$ref": _REF.format(name=kind.__name__)}}}
