"""What no single value shows: that somebody can log in, that no plain socket is open to the internet, that no
secret is short or somebody's example, that a stopping server is gone within 30 s, that processes which are to
work together can meet.

A process is asked for what its role needs and no more: a dispatcher has no certificate.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Final, Literal

from fastim.auth import check_secret
from fastim.config.backends import SERVERS
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

Role = Literal["serve", "node", "dispatch", "api", "client"]
"""What a process is: all parts in one, one of them, or a command that only looks where things are."""


def contradictions(config: Config, role: Role) -> Iterator[str]:
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
    yield from _backends(config, role)
    if role in ("serve", "node"):
        yield from _tls_pair("node", node.tls_cert, node.tls_key)
        yield from _node_exposure(config)
        yield from _sealing(config)
    if role in ("serve", "api"):
        yield from _tls_pair("api", api.tls_cert, api.tls_key)
        yield from _api_exposure(config)
    yield from _kind_problems(config.kinds)
    if role != "dispatch":
        yield from _issuers(config)
    if role in ("serve", "dispatch"):
        yield from _webhook(config)


def _backends(config: Config, role: Role) -> Iterator[str]:
    """Separate processes meet on three servers; one process has all of them inside, or none."""
    absent = [name for name, there in config.on_servers.items() if not there]
    if role in ("node", "dispatch", "api"):
        if absent:
            wanted = ", ".join(f"{name}.url = {SERVERS[name]}" for name in SERVERS)
            yield (
                f"`fastim {role}` works with other processes on three servers, and {', '.join(absent)} "
                f"{'is' if len(absent) == 1 else 'are'} embedded in one; set {wanted}; or run `fastim serve`"
            )
        names = [config.node.name, config.api.name]
        if len(set(names)) < len(names):
            yield f"node.name and api.name are both {names[0]!r}; each has an inbox of its own name"
    elif 0 < len(absent) < len(SERVERS):
        there = [f"{name}.url" for name in SERVERS if name not in absent]
        yield (
            f"{' and '.join(there)} name{'s' if len(there) == 1 else ''} a server, "
            f"{' and '.join(f'{name}.url' for name in absent)} not; all three do, or none"
        )
    bus = config.bus
    yield from _tls_pair("bus", bus.tls_cert, bus.tls_key)
    if (bus.tls_ca or bus.tls_cert) and not bus.tls:
        yield "bus.tls_ca and bus.tls_cert are for bus.tls, which is not set"
    if bool(bus.sasl) != bool(bus.user) or bool(bus.sasl) != bool(bus.password.get_secret_value()):
        yield "bus.sasl, bus.user and bus.password go together"
    if bus.sasl == "PLAIN" and not bus.tls and not config.dev:
        yield "bus.sasl is PLAIN without bus.tls: the password would be sent in clear"


def _tls_pair(name: str, cert: str, key: str) -> Iterator[str]:
    if bool(cert) != bool(key):
        absent = "key" if cert else "cert"
        yield f"{name}.tls_cert and {name}.tls_key go together; {name}.tls_{absent} is missing"
    for what, path in (("cert", cert), ("key", key)):
        if path and not os.access(path, os.R_OK):
            yield f"{name}.tls_{what} is {path!r}; cannot be read"


def _node_exposure(config: Config) -> Iterator[str]:
    node = config.node
    if node.plain and not (config.dev and is_loopback(split_address(node.listen)[0])):
        yield f"node.plain needs --dev and a loopback address; node.listen is {node.listen!r}"
    if node.proxy_protocol and not node.balancers:
        yield "node.proxy_protocol needs node.balancers: who may say for whom he speaks"
    if not config.dev and not node.tls_cert and not node.balancers:
        yield "node.tls_cert is empty; outside --dev set it and node.tls_key, or node.balancers that end TLS"


def _api_exposure(config: Config) -> Iterator[str]:
    api = config.api
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


def _issuers(config: Config) -> Iterator[str]:
    """Keys that can be loaded."""
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


def _webhook(config: Config) -> Iterator[str]:
    """A secret that nobody can guess."""
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
