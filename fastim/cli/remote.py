"""Commands that talk to a server over REST."""

from __future__ import annotations

import ssl
import time
from typing import Any

import httpx
import msgspec

from fastim.cli.tokens import duration_s, token_for
from fastim.cli.where import rest_url
from fastim.config import Config
from fastim.errors import PeerError, Unavailable, UsageError
from fastim.model import pair_conv

_DEADLINE_S = 70.0
"""Longer than any reply timeout of a server."""


def call(
    method: str, url: str, *, token: str = "", body: dict[str, Any] | None = None,
    query: dict[str, str] | None = None,
) -> tuple[int, Any]:  # fmt: skip
    """(status, decoded body). Raises Unavailable when nobody answers."""
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        # No proxies of the environment; OpenSSL's own SSL_CERT_FILE counts.
        trust = ssl.create_default_context()
        with httpx.Client(timeout=_DEADLINE_S, trust_env=False, verify=trust) as client:
            response = client.request(method, url, json=body, params=query, headers=headers)
    except httpx.InvalidURL as error:
        raise UsageError(f"{url[:200]!r} is no address: {error}") from None
    except httpx.HTTPError as error:
        raise Unavailable(url.partition("?")[0], str(error) or type(error).__name__) from None
    try:
        return response.status_code, msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        raise Unavailable(url, f"it answered {response.status_code} and no JSON") from None


def ask(method: str, url: str, **options: Any) -> Any:
    """The answer. Raises PeerError for a problem."""
    status, answer = call(method, url, **options)
    if status not in (200, 201, 202):
        raise problem(status, answer)
    return answer


def problem(status: int, answer: Any) -> PeerError:
    fields = answer if isinstance(answer, dict) else {}
    detail = str(fields.get("detail", f"status {status}"))
    if fields.get("retryable") and fields.get("client_id"):
        detail += f"; repeat it with --client-id {fields['client_id']}"
    return PeerError(str(fields.get("code", status)), detail)


def send_message(
    config: Config, to: str, text: str, *, sender: str, service: bool, client_id: str, expires: str,
    token: str, url: str, as_json: bool,
) -> None:  # fmt: skip
    if not sender and (service or not token):
        raise UsageError("--as is missing: who sends it?")
    if ":" not in to and not sender:
        raise UsageError("a user as target needs --as; or name the conversation, p:a:b")
    try:
        conv = to if ":" in to else pair_conv(sender, to)
    except PeerError as error:
        raise UsageError(error.detail) from None
    body: dict[str, Any] = {"conv": conv, "body": text}
    if sender:
        body["sender"] = sender
    if client_id:
        body["client_id"] = client_id
    if expires:
        body["loss_time_ms"] = (int(time.time()) + duration_s(expires)) * 1000
    scope = "service" if service else "client"
    bearer = token_for(config, token, sender, scope)
    answer = ask("POST", f"{rest_url(config, url)}/v1/messages", token=bearer, body=body)
    if as_json:
        print(msgspec.json.encode(answer).decode())
    elif "msg_id" not in answer:
        print(f"taken, not stored yet  client_id {answer['client_id']}  trace {answer['trace']}")
    else:
        print(f"msg_id {answer['msg_id']}  seq {answer['seq']}  client_id {answer['client_id']}")


def ask_health(config: Config, *, url: str, as_json: bool) -> int:
    """Print both answers; 0 if the server is alive and ready."""
    base = rest_url(config, url)
    found: dict[str, Any] = {}
    good = True
    for name in ("health", "ready"):
        status, answer = call("GET", f"{base}/{name}")
        fields = answer if isinstance(answer, dict) else {}
        found[name] = fields.get("status") if status == 200 else fields.get("detail", f"status {status}")
        good = good and status == 200
    if as_json:
        print(msgspec.json.encode(found | {"good": good}).decode())
    else:
        print(f"{base}: health {found['health']}, ready {found['ready']}")
    return 0 if good else 1
