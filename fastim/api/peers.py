"""Whose request this is: the address that failures are counted against, and whether it came from here.

A request is local when it came from a loopback address and nobody forwarded it: whoever asks can then log in
to this machine.
"""

from __future__ import annotations

from typing import Final

from blacksheep import Request

from fastim.node.upgrade import Address, Balancers, address_of

_PROXIES: Final = frozenset({b"forwarded", b"via", b"x-real-ip"})
"""Beside X-Forwarded-*: what proxies add. Via they must (RFC 9110, 7.6.3)."""


class _Forwarded:
    """The X-Forwarded-For values, as Balancers reads headers."""

    def __init__(self, values: list[str]) -> None:
        self._values = values

    def getall(self, name: str, default: list[str]) -> list[str]:
        return self._values or default


def _socket_peer(request: Request) -> str:
    client = request.scope.get("client") if request.scope else None
    return client[0] if client else ""


def address_behind(request: Request, balancers: Balancers) -> Address | None:
    """The client's address; only a listed balancer's word counts for another than the socket's."""
    address = address_of(_socket_peer(request))
    if address is None or address not in balancers:
        return address
    values = [value.decode("latin-1") for value in request.get_headers(b"x-forwarded-for")]
    return balancers.client(_Forwarded(values)) or address


def is_local(request: Request) -> bool:
    address = address_of(_socket_peer(request))
    if address is None or not address.is_loopback:
        return False
    names = [name.lower() for name, _ in request.headers]
    return not any(name in _PROXIES or name.startswith(b"x-forwarded") for name in names)
