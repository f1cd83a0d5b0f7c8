"""What no single value shows: that somebody can log in, that no plain socket is open to the internet, that no
secret is short or somebody's example, that a stopping server is gone within 30 s.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Final

from fastim.auth import check_secret
from fastim.config.schema import (
    FIRST_CUSTOM_KIND,
    LAST_CUSTOM_KIND,
    Config,
    KindSection,
    is_loopback,
    split_address,
)
from fastim.errors import UsageError
from fastim.model import DEFAULT_KINDS

MAX_STOPPING_MS: Final = 25_000


def contradictions(config: Config) -> Iterator[str]:
    """What only several values together show."""
    node, api = config.node, config.api
    if node.idle_ms < 2 * node.heartbeat_ms:
        least = f"at least twice node.heartbeat_ms ({node.heartbeat_ms:,})"
        yield f"node.idle_ms is {node.idle_ms:,}; must be {least}"
    if node.ack_timeout_ms <= node.probe_ms:
        least = f"above node.probe_ms ({node.probe_ms:,})"
        yield f"node.ack_timeout_ms is {node.ack_timeout_ms:,}; must be {least}"
    if config.presence.lease_ms < 2 * config.presence.renew_ms:
        yield (
            f"presence.lease_ms is {config.presence.lease_ms:,}; must be at least twice presence.renew_ms "
            f"({config.presence.renew_ms:,})"
        )
    stopping_ms = node.drain_window_ms + config.dispatch.stop_ms
    if stopping_ms > MAX_STOPPING_MS:
        yield (
            f"node.drain_window_ms and dispatch.stop_ms are {stopping_ms:,} together; must be at most "
            f"{MAX_STOPPING_MS:,}, so that a stop takes no longer than 30 s"
        )
    for name, section in (("node", node), ("api", api)):
        yield from _tls_pair(name, section.tls_cert, section.tls_key)
    yield from _exposure(config)
    yield from _sealing(config)
    yield from _kind_problems(config.kinds)
    yield from _secrets(config)


def _tls_pair(name: str, cert: str, key: str) -> Iterator[str]:
    if bool(cert) != bool(key):
        absent = "key" if cert else "cert"
        yield f"{name}.tls_cert and {name}.tls_key go together; {name}.tls_{absent} is missing"
    for what, path in (("cert", cert), ("key", key)):
        if path and not os.access(path, os.R_OK):
            yield f"{name}.tls_{what} is {path!r}; cannot be read"


def _exposure(config: Config) -> Iterator[str]:
    node, api = config.node, config.api
    if node.plain and not (config.dev and is_loopback(split_address(node.listen)[0])):
        yield f"node.plain needs --dev and a loopback address; node.listen is {node.listen!r}"
    if node.proxy_protocol and not node.balancers:
        yield "node.proxy_protocol needs node.balancers: who may say for whom he speaks"
    if not config.dev and not node.tls_cert and not node.balancers:
        yield "node.tls_cert is empty; outside --dev set it and node.tls_key, or node.balancers that end TLS"
    if not is_loopback(split_address(api.listen)[0]) and not api.tls_cert and not api.plain:
        yield (
            f"api.listen is {api.listen!r}, open to other machines; set api.tls_cert and api.tls_key, or "
            f"api.plain where a balancer ends TLS"
        )


def _sealing(config: Config) -> Iterator[str]:
    node = config.node
    if not node.seal_keys and not config.dev:
        for name, wants in (("require_sealed", node.require_sealed), ("seal_shared", bool(node.seal_shared))):
            if wants:
                yield f"node.{name} is set and node.seal_keys is empty: there is nothing to seal with"
    for name, rows in (("seal_keys", node.seal_keys), ("seal_shared", node.seal_shared)):
        names = [row.name for row in rows]
        for twice in dict.fromkeys(found for found in names if names.count(found) > 1):
            yield f"node.{name} has the name {twice!r} twice"
        for number, row in enumerate(rows):
            if not os.access(row.file, os.R_OK):
                yield f"node.{name}[{number}].file is {row.file!r}; cannot be read"


def _kind_problems(kinds: Mapping[str, KindSection]) -> Iterator[str]:
    numbers = {rule.name: int(rule.kind) for rule in DEFAULT_KINDS.values()}
    taken: dict[int, str] = {number: name for name, number in numbers.items()}
    span = f"a kind of your own has a number of {FIRST_CUSTOM_KIND}-{LAST_CUSTOM_KIND:,}"
    for name, row in kinds.items():
        if name in numbers:
            if row.kind not in (None, numbers[name]):
                yield f"kinds.{name}.kind is {row.kind}; {name} is {numbers[name]} for ever"
            continue
        if row.kind is None:
            yield f"kinds.{name}.kind is missing; {span}"
        elif row.kind < FIRST_CUSTOM_KIND:
            yield f"kinds.{name}.kind is {row.kind}; {span}"
        elif row.kind in taken:
            yield f"kinds.{name}.kind is {row.kind}, which kinds.{taken[row.kind]} has"
        else:
            taken[row.kind] = name


def _secrets(config: Config) -> Iterator[str]:
    """Keys that can be loaded, secrets that nobody can guess."""
    try:
        keys = config.token_keys()
    except UsageError as error:
        yield str(error)
        return
    if not keys and not config.dev:
        yield "auth.issuers is empty: nobody could log in; name a key, or start with --dev"
    named = [(key.issuer, key.kid) for key in keys]
    for pair in dict.fromkeys(pair for pair in named if named.count(pair) > 1):
        yield f"auth.issuers has issuer {pair[0]!r} with kid {pair[1]!r} twice"
    webhook = config.push.webhook
    secret = webhook.secret.get_secret_value()
    if not webhook.url:
        return
    if config.dev:
        if len(secret) < 32:
            yield f"push.webhook.secret is {len(secret)} bytes; must be at least 32"
        return
    if not webhook.url.startswith("https://"):
        yield "push.webhook.url does not start with https://, as it must outside --dev"
    try:
        check_secret("push.webhook.secret", secret)
    except UsageError as error:
        yield str(error)
