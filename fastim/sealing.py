"""Agree on the keys of a sealed connection: from two public keys and a name to a key per direction.

    client                                        server
    REKEY{key_id, ephemeral, static, shared} ───▶ knows the private half of `static`
       ◀─── KEYS{key_id, ephemeral, proof}        both: HKDF-SHA256 over ee, es, the pre-shared key

The shape is Noise NK: the client knows the server's static key beforehand and is known to nobody until its
AUTH comes, sealed. Each agreement has new ephemerals, so a static key that is stolen later opens nothing of
today. Hop encryption, not end-to-end: it keeps out whoever ends TLS on the way; the server reads everything.

E1  both ends derive the same keys exactly when they agree on every name and key  tests/unit/test_sealing.py
E2  a public key of low order, an unknown name, a proof that does not fit: the same refusal           same
E3  no key is shown by repr or by an error                                                             same
Pure but for the random numbers. Source: RFC 7748, RFC 5869; docs/protocol.md, "Sealing"; docs/adr/0031.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fastim._core.cipher import KEY_BYTES, MAX_FRAMES_PER_KEY, PREFIX_BYTES, REKEY_FRAMES, Opener, Sealer
from fastim.errors import PeerError, UsageError
from fastim.protocol import Keys, Rekey

__all__ = ["REKEY_FRAMES", "REKEY_MS", "Agreed", "Offer", "SealKey", "SealKeys", "SharedKey", "StaticKey"]

LABEL: Final = b"fastim-sealing-1"
REKEY_MS: Final = 3_600_000
"""New keys are due after so long, or after REKEY_FRAMES in one direction."""
PROOF_BYTES: Final = 16
SECRET_BYTES: Final = 32
REFUSED: Final = "no keys were agreed"
_OKM_BYTES: Final = 2 * (KEY_BYTES + PREFIX_BYTES) + PROOF_BYTES
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}\Z")
_HEX = re.compile(r"[0-9a-fA-F]{64}\Z")


def _refused() -> PeerError:
    return PeerError("bad_seal", REFUSED)


def _check_name(what: str, name: str) -> str:
    if not _NAME.match(name):
        raise UsageError(f"the name of a {what} is {name[:80]!r}; must be 1-64 of A-Za-z0-9_.@-")
    return name


# ------------------------------------------------------------------------------------------------- keys


class SharedKey:
    """A pre-shared key: 32 random bytes that both ends hold. Mixed in, never used alone."""

    __slots__ = ("name", "secret")

    def __init__(self, name: str, secret: bytes) -> None:
        self.name = _check_name("pre-shared key", name)
        if len(secret) != SECRET_BYTES:
            raise UsageError(f"pre-shared key {name!r} is {len(secret)} bytes; must be {SECRET_BYTES}")
        self.secret = bytes(secret)

    @classmethod
    def from_file(cls, name: str, path: Path) -> SharedKey:
        """A file of 64 hex digits (`openssl rand -hex 32`). Raises UsageError that shows nothing of it."""
        text = _read(path).strip()
        if not _HEX.match(text):
            raise UsageError(f"{path} does not hold 64 hex digits; make it with: openssl rand -hex 32")
        return cls(name, bytes.fromhex(text))

    def __repr__(self) -> str:
        return f"SharedKey({self.name!r})"


class SealKey:
    """What a client knows of a server: name and public half of its static key, perhaps a pre-shared key."""

    __slots__ = ("name", "public", "shared")

    def __init__(self, name: str, public: bytes, shared: SharedKey | None = None) -> None:
        self.name = _check_name("static key", name)
        if len(public) != KEY_BYTES:
            raise UsageError(f"static key {name!r} is {len(public)} bytes; must be {KEY_BYTES}")
        self.public = bytes(public)
        self.shared = shared

    @classmethod
    def from_text(cls, text: str, shared: SharedKey | None = None) -> SealKey:
        """`name:64 hex digits`, as a server prints it."""
        name, _, digits = text.strip().rpartition(":")
        if not _HEX.match(digits):
            raise UsageError(f"the static key is {text[:140]!r}; must be a name, a colon and 64 hex digits")
        return cls(name, bytes.fromhex(digits), shared)

    def __str__(self) -> str:
        return f"{self.name}:{self.public.hex()}"

    def __repr__(self) -> str:
        return f"SealKey({str(self)!r}, {self.shared!r})"


class StaticKey:
    """A server's static key."""

    __slots__ = ("name", "private", "public")

    def __init__(self, name: str, private: X25519PrivateKey) -> None:
        self.name = _check_name("static key", name)
        self.private = private
        self.public = private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, name: str) -> StaticKey:
        return cls(name, X25519PrivateKey.generate())

    @classmethod
    def from_file(cls, name: str, path: Path) -> StaticKey:
        """A PEM file (`openssl genpkey -algorithm X25519`). Raises UsageError that shows nothing of it."""
        pem = _read(path).encode()
        try:
            private = serialization.load_pem_private_key(pem, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise UsageError(f"{path} is not an unencrypted PEM private key") from None
        if not isinstance(private, X25519PrivateKey):
            raise UsageError(f"{path} is a {type(private).__name__}; sealing needs X25519")
        return cls(name, private)

    @classmethod
    def of_directory(cls, name: str, directory: Path) -> StaticKey:
        """The one in `directory`/`name`-seal-key.pem, made with mode 0600 at the first call."""
        path = directory / f"{_check_name('static key', name)}-seal-key.pem"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return cls.from_file(name, path)
        key = cls.generate(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.pem())
            file.flush()
            os.fsync(file.fileno())
        return key

    def pem(self) -> bytes:
        return self.private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def seal_key(self, shared: SharedKey | None = None) -> SealKey:
        """What clients need to know."""
        return SealKey(self.name, self.public, shared)

    def __repr__(self) -> str:
        return f"StaticKey({self.name!r}, public {self.public.hex()})"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(f"{path}: {reason}") from None


# -------------------------------------------------------------------------------------------- agreement


class Agreed:
    """What an agreement gives. Taken once: two objects that count for one key would repeat its nonces."""

    __slots__ = ("_okm", "key_id", "proof")

    def __init__(self, key_id: int, okm: bytes) -> None:
        self.key_id = key_id
        self.proof = okm[-PROOF_BYTES:]
        self._okm = okm

    def server(self, frames: int = MAX_FRAMES_PER_KEY) -> tuple[Sealer, Opener]:
        """The server's sealer and opener. frames: how many a key is good for."""
        up, down = self._take()
        return Sealer(*down, frames=frames), Opener(*up, frames=frames)

    def client(self, frames: int = MAX_FRAMES_PER_KEY) -> tuple[Sealer, Opener]:
        """The client's."""
        up, down = self._take()
        return Sealer(*up, frames=frames), Opener(*down, frames=frames)

    def _take(self) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
        """(key, nonce prefix) up and down."""
        okm, self._okm = self._okm, b""
        if not okm:
            raise UsageError("the keys of this agreement were taken")
        keys, prefixes = okm[: 2 * KEY_BYTES], okm[2 * KEY_BYTES :]
        up = keys[:KEY_BYTES], prefixes[:PREFIX_BYTES]
        return up, (keys[KEY_BYTES:], prefixes[PREFIX_BYTES : 2 * PREFIX_BYTES])


def _exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    """The shared secret. Raises PeerError for a key of low order, whose secret everybody knows."""
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise _refused() from None
    if not any(secret):
        raise _refused()
    return secret


def _derive(rekey: Rekey, static_public: bytes, server: bytes, ee: bytes, es: bytes, psk: bytes) -> Agreed:
    transcript = hashlib.sha256(
        LABEL
        + rekey.key_id.to_bytes(4, "big")
        + _sized(rekey.static)
        + _sized(rekey.shared)
        + static_public
        + rekey.ephemeral
        + server
    ).digest()
    kdf = HKDF(hashes.SHA256(), _OKM_BYTES, salt=transcript, info=LABEL + b" keys" + transcript)
    return Agreed(rekey.key_id, kdf.derive(ee + es + psk))


def _sized(name: str) -> bytes:
    raw = name.encode()
    return bytes([len(raw)]) + raw


class Offer:
    """The client's half: send `rekey`, give what is answered to `accept`. ephemeral: for tests."""

    __slots__ = ("_ephemeral", "_seal", "rekey")

    def __init__(self, seal: SealKey, key_id: int, ephemeral: X25519PrivateKey | None = None) -> None:
        self._seal = seal
        self._ephemeral = ephemeral or X25519PrivateKey.generate()
        public = self._ephemeral.public_key().public_bytes_raw()
        self.rekey = Rekey(key_id, public, seal.name, seal.shared.name if seal.shared else "")

    def accept(self, keys: Keys) -> Agreed:
        """The keys. Raises PeerError("bad_seal") unless whoever answered holds the server's static key.

        ~50 us: two X25519.
        """
        seal = self._seal
        if keys.key_id != self.rekey.key_id or len(keys.ephemeral) != KEY_BYTES:
            raise _refused()
        ee = _exchange(self._ephemeral, keys.ephemeral)
        es = _exchange(self._ephemeral, seal.public)
        psk = seal.shared.secret if seal.shared else b""
        agreed = _derive(self.rekey, seal.public, keys.ephemeral, ee, es, psk)
        if not hmac.compare_digest(agreed.proof, keys.proof):
            raise _refused()
        return agreed


K = TypeVar("K", StaticKey, SharedKey)


class SealKeys:
    """The server's half: the static and pre-shared keys it holds, by name.

    required: AUTH in clear is refused. frames: how many frames a key is good for.
    """

    def __init__(
        self,
        statics: Iterable[StaticKey],
        shared: Iterable[SharedKey] = (),
        *,
        required: bool = False,
        frames: int = MAX_FRAMES_PER_KEY,
    ) -> None:
        self._statics = _by_name(statics)
        self._shared = _by_name(shared)
        self.required = required
        self.frames = frames
        if not self._statics:
            raise UsageError("there is no static key; at least 1")

    @property
    def public(self) -> list[SealKey]:
        """What clients need to know."""
        return [key.seal_key() for key in self._statics.values()]

    def answer(self, rekey: Rekey, ephemeral: X25519PrivateKey | None = None) -> tuple[Keys, Agreed]:
        """KEYS for a REKEY, and the keys. Raises PeerError("bad_seal"), without a reason.

        ~70 us: three X25519, which is why whoever may call this is limited. ephemeral: for tests.
        """
        static = self._statics.get(rekey.static)
        shared = self._shared.get(rekey.shared) if rekey.shared else None
        if static is None or (rekey.shared and shared is None):
            raise _refused()
        private = ephemeral or X25519PrivateKey.generate()
        public = private.public_key().public_bytes_raw()
        ee = _exchange(private, rekey.ephemeral)
        es = _exchange(static.private, rekey.ephemeral)
        agreed = _derive(rekey, static.public, public, ee, es, shared.secret if shared else b"")
        return Keys(rekey.key_id, public, agreed.proof), agreed


def _by_name(keys: Iterable[K]) -> dict[str, K]:
    found: dict[str, K] = {}
    for key in keys:
        if key.name in found:
            raise UsageError(f"two keys are named {key.name!r}")
        found[key.name] = key
    return found
