"""TLS: certificates and how newer ones replace them; accepted sockets on their way through a handshake.

    accepted ──admit──▶ [PROXY header ──admit the client──▶] [TLS ──▶] protocol          each ≤ timeout_s

Hides aiofastnet, whose own server spins when descriptors run out, and which reports every peer that leaves
during its handshake as an error of this program.

V4  a bad certificate pair never replaces a good one              tests/system/test_tls.py
V5  a handshake ends within its time-out, whatever the peer does, and is heard of only by `failed`       same
Source: promises, "Limits to ship", "Security rules"; docs/adr/0040.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import aiofastnet
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fastim.errors import PeerError, UsageError
from fastim.node.proxied import Source, read_source

_log = logging.getLogger("fastim.node.tls")

_ACCEPTS_AT_ONCE: Final = 64
_REST_S: Final = 0.5
"""How long nothing is accepted after descriptors ran out."""
_SHUTDOWN_S: Final = 1.0


class _ServerContext(ssl.SSLContext):
    key_kind: str = ""
    """OpenSSL keeps a pair per kind of key, so a pair of another kind would not replace the old one."""


def make_server_context(cert: Path, key: Path) -> ssl.SSLContext:
    """A server context: TLS 1.2 and up, forward secrecy, no compression, no renegotiation."""
    context = _ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    # A phone that loses its network sends no close_notify; that is an end of TCP, not an attack on frames
    # that carry their own length.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_IGNORE_UNEXPECTED_EOF
    context.set_alpn_protocols(["http/1.1"])
    reload_certificate(context, cert, key)
    return context


def reload_certificate(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Use the pair for the next handshakes; open connections keep theirs. For SIGHUP.

    Raises UsageError, and leaves `context` as it was, when the pair cannot be loaded or its key is of another
    kind than the one in use. It is tried on a scratch context first, because OpenSSL takes a certificate
    before it finds that the key does not fit.
    """
    try:
        kind = type(x509.load_pem_x509_certificate(cert.read_bytes()).public_key()).__name__
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ValueError, ssl.SSLError) as error:
        raise UsageError(f"certificate {cert} with key {key} cannot be used: {error}") from None
    if isinstance(context, _ServerContext):
        if context.key_kind not in ("", kind):
            raise UsageError(
                f"{cert} has a {kind}, the pair in use a {context.key_kind}; restart to change it"
            )
        context.key_kind = kind
    context.load_cert_chain(cert, key)


def dev_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for this machine in `directory`: (certificate, key), made when missing.

    Made again when it ends within a week or does not name this host.
    """
    cert_path, key_path = directory / "dev-tls-cert.pem", directory / "dev-tls-key.pem"
    host = socket.gethostname()
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    if host != "localhost" and len(host) <= 64 and host.isascii():
        names.append(x509.DNSName(host))
    names += [x509.IPAddress(ipaddress.ip_address(text)) for text in ("127.0.0.1", "::1")]
    if _still_good(cert_path, key_path, names, now):
        return cert_path, key_path
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fastim development")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=365))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(private, hashes.SHA256())
    )
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    key_path.unlink(missing_ok=True)
    with os.fdopen(os.open(key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    cert_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return cert_path, key_path


def _still_good(cert: Path, key: Path, names: list[x509.GeneralName], now: datetime.datetime) -> bool:
    try:
        found = x509.load_pem_x509_certificate(cert.read_bytes())
        covered = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ValueError, x509.ExtensionNotFound, ssl.SSLError):
        return False
    return set(names) <= set(covered) and now + datetime.timedelta(days=7) < found.not_valid_after_utc


class _Loop:
    """The event loop as aiofastnet sees it: peers do not reach its exception handler.

    aiofastnet 1.2 keeps its own rule for a class in place of an exception (a peer that leaves during its
    handshake), and so would report each.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._loop, name)
        setattr(self, name, found)
        return found

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) or (isinstance(error, type) and issubclass(error, OSError)):
            _log.debug("%s: %r", context.get("message"), error)
        else:
            self._loop.call_exception_handler(context)


class Handshakes:
    """One listening socket, and its accepted ones until their handshake is done.

    context  None: plain
    proxied  whether a peer, by its address, has to begin with a PROXY header
    admit    asked for every accepted socket, by its address, and again for the client it speaks for
    failed   told of every handshake that did not end well: address, reason (source, tls), and whether the
             peer left (True) or is late or speaks something else (False)
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None,
        protocol: Callable[[Source | None], asyncio.BaseProtocol],
        *,
        timeout_s: float,
        proxied: Callable[[str], bool],
        admit: Callable[[str], bool],
        failed: Callable[[str, str, bool], None],
    ) -> None:
        self._sock = sock
        self._context = context
        self._protocol = protocol
        self._timeout_s = timeout_s
        self._proxied = proxied
        self._admit = admit
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._seen = cast(asyncio.AbstractEventLoop, _Loop(self._loop))
        self._pending: dict[asyncio.Task[None], socket.socket] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def start(self, backlog: int) -> None:
        self._sock.listen(backlog)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def close(self) -> None:
        """Stop listening; handshakes go on. Idempotent."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def hang_up(self) -> None:
        """End the handshakes that are under way; each is over within a turn of the loop or two."""
        for sock in self._pending.values():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                # Out of descriptors or memory. The socket stays readable: without a rest this would spin.
                _log.error("accept failed", extra={"why": error.strerror})
                self._loop.remove_reader(self._sock.fileno())
                self._loop.call_later(_REST_S, self._again)
                return
            if not self._admit(address[0]):
                sock.close()
                continue
            sock.setblocking(False)
            task = self._loop.create_task(self._handshake(sock, address[0]), name="tls handshake")
            self._pending[task] = sock
            task.add_done_callback(self._pending.pop)

    def _again(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    async def _handshake(self, sock: socket.socket, address: str) -> None:
        try:
            source = await self._source(sock) if self._proxied(address) else None
        except OSError as error:
            sock.close()
            self._failed(address, "source", not isinstance(error, TimeoutError))
            return
        except PeerError as error:
            sock.close()
            _log.warning("PROXY header refused", extra={"peer": address, "reason": error.detail})
            self._failed(address, "source", False)
            return
        if source is not None:
            address = source[0]
            if not self._admit(address):
                sock.close()
                return
        try:
            if self._context is None:
                await self._loop.connect_accepted_socket(lambda: self._protocol(source), sock)
                return
            await aiofastnet.connect_accepted_socket(
                self._seen,
                lambda: self._protocol(source),
                sock,
                ssl=self._context,
                ssl_handshake_timeout=self._timeout_s,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
        except OSError as error:
            # ssl.SSLError is one. The late are ConnectionAbortedError; the transport closes the socket.
            self._failed(address, "tls", isinstance(error, ConnectionResetError | BrokenPipeError))

    async def _source(self, sock: socket.socket) -> Source | None:
        async with asyncio.timeout(self._timeout_s):
            return await read_source(sock)
