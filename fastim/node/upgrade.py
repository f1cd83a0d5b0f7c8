"""Which upgrade requests are taken, and from whom.

Hides HTTP: the checks of RFC 6455 4.2.1 and ours, what a refusal answers, whose word about the client's
address counts, and how failures are limited per address. Opens no socket and counts no connection.

V2  only failures are limited per address; whoever authenticates is never counted
                                                                  tests/system/test_listener.py
Source: promises, "Limits to ship"; docs/adr/0040.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Final, Protocol

from picows import WSUpgradeRequest

from fastim.clock import Clock
from fastim.errors import UsageError
from fastim.protocol import SUBPROTOCOL

WS_PATH: Final = b"/v1/ws"
HEALTH_PATH: Final = b"/health"
RETRY_AFTER_S: Final = 5

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

RETRY: Final = (("Retry-After", str(RETRY_AFTER_S)),)
VERSION: Final = (("Sec-WebSocket-Version", "13"),)


class Refusal(Exception):
    """An answer instead of 101. `reason` is a label of observe.UPGRADES_REFUSED."""

    def __init__(
        self,
        status: HTTPStatus,
        reason: str,
        detail: str,
        *,
        headers: tuple[tuple[str, str], ...] = (),
        fault: bool = True,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail
        """The body: the rule, never what the peer sent."""
        self.headers = headers
        self.fault = fault
        """Whether it counts against the address."""


class FailureLimit:
    """A token bucket of failures per address: empty means refused until it has filled a little.

    Only failures take tokens: a carrier puts a city behind one address. Forgets full buckets, so memory is
    bounded by who failed within the last minute.
    """

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self._capacity = float(per_minute)
        self._per_ms = per_minute / 60_000
        self._clock = clock
        self._buckets: dict[int, tuple[float, int]] = {}
        self._forget_at = 1_024

    @staticmethod
    def key(address: Address) -> int:
        """IPv6 hosts own a /64; IPv4 sits below 2^32, and a v6 prefix shifted above it."""
        if isinstance(address, ipaddress.IPv6Address):
            if address.ipv4_mapped is not None:
                return int(address.ipv4_mapped)
            return (int(address) >> 64) + (1 << 32)
        return int(address)

    def blocked(self, address: Address) -> bool:
        key = self.key(address)
        return key in self._buckets and self._level(key) < 1.0

    def failed(self, address: Address) -> None:
        """Take a token."""
        key = self.key(address)
        self._buckets[key] = (max(0.0, self._level(key) - 1.0), self._clock.mono_ms())
        if len(self._buckets) >= self._forget_at:
            self.forget()
            self._forget_at = max(1_024, 2 * len(self._buckets))

    def forget(self) -> None:
        """Drop full buckets. O(addresses that failed lately)."""
        for key in [key for key in self._buckets if self._level(key) >= self._capacity]:
            del self._buckets[key]

    def __len__(self) -> int:
        return len(self._buckets)

    def _level(self, key: int) -> float:
        level, at_ms = self._buckets.get(key, (self._capacity, 0))
        return min(self._capacity, level + (self._clock.mono_ms() - at_ms) * self._per_ms)


def address_of(text: str) -> Address | None:
    """An IP address, without its zone; None for anything else."""
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


class Balancers:
    """Who may end TLS for us, and whose X-Forwarded-For is believed."""

    def __init__(self, texts: Iterable[str]) -> None:
        try:
            self._networks: tuple[Network, ...] = tuple(ipaddress.ip_network(text) for text in texts)
        except ValueError as error:
            raise UsageError(f"node.balancers: {error}") from None

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __contains__(self, address: Address) -> bool:
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)

    def client(self, headers: Headers) -> Address | None:
        """The nearest address in X-Forwarded-For that is no balancer's.

        Read from the right: a hop appends whom it saw, and whatever stands left of the first stranger is that
        stranger's own word. None when the balancer named nobody.
        """
        hops = [hop.strip() for hop in ",".join(headers.getall("X-Forwarded-For", [])).split(",")]
        for hop in reversed(hops):
            address = address_of(hop)
            if address is None or address not in self:
                return address
        return None


class Headers(Protocol):
    """What is used of multidict.CIMultiDict."""

    def getall(self, name: str, default: list[str]) -> list[str]: ...


def check_request(request: WSUpgradeRequest, origins: frozenset[str]) -> Mapping[str, str]:
    """The checks of RFC 6455 4.2.1 and ours; returns the headers of the 101. Raises Refusal.

    Rewrites Connection and Upgrade in the request: picows compares the whole header, and Firefox sends
    "keep-alive, Upgrade".
    """
    path, question, _ = request.path.partition(b"?")
    headers = request.headers
    if path != WS_PATH:
        raise Refusal(HTTPStatus.NOT_FOUND, "path", f"WebSocket connections are taken at {WS_PATH.decode()}")
    if question:
        # Query strings end in logs of proxies; a token belongs into AUTH.
        raise Refusal(HTTPStatus.BAD_REQUEST, "query", "no query string is taken; a token belongs into AUTH")
    found = headers.getall("Origin", [])
    if found and (len(found) > 1 or found[0] not in origins):
        raise Refusal(HTTPStatus.FORBIDDEN, "origin", "this Origin is not allowed (node.origins)")
    if len(headers.getall("Host", [])) != 1:
        raise Refusal(HTTPStatus.BAD_REQUEST, "header", "exactly one Host is required")
    if not _says(headers, "Upgrade", "websocket") or not _says(headers, "Connection", "upgrade"):
        raise Refusal(
            HTTPStatus.UPGRADE_REQUIRED,
            "method",
            "Upgrade: websocket and Connection: Upgrade are required",
            headers=(("Upgrade", "websocket"), *VERSION),
        )
    if headers.getall("Sec-WebSocket-Version", []) != ["13"]:
        raise Refusal(
            HTTPStatus.UPGRADE_REQUIRED, "version", "Sec-WebSocket-Version must be 13", headers=VERSION
        )
    if not _is_key(headers.getall("Sec-WebSocket-Key", [])):
        raise Refusal(HTTPStatus.BAD_REQUEST, "header", "Sec-WebSocket-Key must be 16 bytes in base64")
    headers["Connection"] = "Upgrade"
    headers["Upgrade"] = "websocket"
    offered = [
        word.strip() for line in headers.getall("Sec-WebSocket-Protocol", []) for word in line.split(",")
    ]
    return {"Sec-WebSocket-Protocol": SUBPROTOCOL} if SUBPROTOCOL in offered else {}


def _words(headers: Headers, name: str) -> list[str]:
    return [word.strip() for line in headers.getall(name, []) for word in line.split(",")]


def _says(headers: Headers, name: str, word: str) -> bool:
    return any(found.lower() == word for found in _words(headers, name))


def _is_key(values: list[str]) -> bool:
    """One key: 16 bytes in base64."""
    try:
        return len(values) == 1 and len(base64.b64decode(values[0], validate=True)) == 16
    except (ValueError, binascii.Error):
        return False
