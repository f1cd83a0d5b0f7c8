"""Who somebody is, and what he may do: tokens, keys, secrets, and one authoriser for WebSocket and REST.

Hides JWT: which algorithms, claims and headers are believed, and how keys are found. A token is checked
without any I/O, only with keys that the configuration named, each pinned to one algorithm and to the scopes
it may grant. Whatever is wrong with a token, the peer hears the same sentence; the reason only moves a
counter.

A1  no algorithm comes from the token, no key from a header            tests/unit/test_auth.py
A2  every refusal is the same PeerError("unauthenticated")             same
A3  a conversation is decided in one place for both ways in            same
Source: promises, "Security rules", P20.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import hmac
import itertools
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fastim.clock import Clock
from fastim.errors import PeerError, UsageError
from fastim.model import MAX_SAFE_INT, Conv, check_id, parse_conv

MAX_TOKEN_BYTES: Final = 8_192
MAX_NESTING: Final = 8
NBF_LEEWAY_S: Final = 5
"""How far ahead an issuer's clock may be for nbf and iat; exp has no leeway."""
MIN_SECRET_BYTES: Final = 32
MAX_TTL_S: Final = 366 * 86_400
REFUSAL: Final = "the token is not valid"


class Scope(enum.StrEnum):
    """What a token is for."""

    CLIENT = "client"
    """A person's device: WebSocket, and REST about himself."""
    SERVICE = "service"
    """A caller of the REST ingress: may send as anyone and for anyone; no WebSocket."""
    ADMIN = "admin"
    """Operators: audit, trace, kick, broadcast."""


class Algorithm(enum.StrEnum):
    """The two that are believed."""

    EDDSA = "EdDSA"
    HS256 = "HS256"


# ---------------------------------------------------------------------------------------------- secrets

_KNOWN_BAD: Final = (
    "changeme", "secret", "password", "passw0rd", "default", "example", "admin", "test", "fastim",
    "openim123", "letmein", "qwerty", "your256bitsecret", "yoursecretkey", "supersecret", "keyboardcat",
    "topsecret", "jwtsecret", "replaceme",
)  # fmt: skip
_HEX = re.compile(r"[0-9a-fA-F]+\Z")
_BASE64 = re.compile(r"[A-Za-z0-9+/_=-]+\Z")


def check_secret(what: str, secret: str | bytes) -> bytes:
    """Return the secret's bytes if it can stand as a 256-bit key.

    Hex digits count 4 bits each, base64 characters 6, raw bytes 8. Raises UsageError that never shows it.
    """
    raw = secret.encode() if isinstance(secret, str) else bytes(secret)
    if len(raw) < MIN_SECRET_BYTES:
        raise UsageError(f"{what} is {len(raw)} bytes; must be at least {MIN_SECRET_BYTES} (256 bits)")
    text = raw.decode("latin-1")
    if re.sub(r"[^a-z0-9]", "", text.lower()).startswith(_KNOWN_BAD):
        raise UsageError(
            f"{what} begins like a default or example secret; generate one: openssl rand -hex 32"
        )
    bits = len(text) * (4 if _HEX.match(text) else 6 if _BASE64.match(text) else 8)
    if bits < 256:
        raise UsageError(f"{what} can hold at most {bits} bits in its encoding; must hold 256")
    if any(text == (text[:period] * (len(text) // period + 1))[: len(text)] for period in range(1, 17)):
        raise UsageError(f"{what} repeats a pattern of at most 16 bytes; generate one: openssl rand -hex 32")
    steps = Counter((b - a) % 256 for a, b in itertools.pairwise(raw))
    counts = Counter(raw)
    entropy = -sum(n / len(raw) * math.log2(n / len(raw)) for n in counts.values()) * len(raw)
    if entropy < 96 or steps.most_common(1)[0][1] > len(raw) // 2:
        raise UsageError(f"{what} is too regular to be random; generate one: openssl rand -hex 32")
    return raw


def same_secret(left: str | bytes, right: str | bytes) -> bool:
    """Compare two secrets in time that depends on neither content nor length."""
    digest = [hashlib.sha256(v.encode() if isinstance(v, str) else v).digest() for v in (left, right)]
    return hmac.compare_digest(digest[0], digest[1])


# ------------------------------------------------------------------------------------------------- keys


class Key(msgspec.Struct, frozen=True):
    """A key that verifies: one issuer, one kid, one algorithm, and the scopes its tokens may carry."""

    issuer: str
    kid: str
    algorithm: Algorithm
    material: Ed25519PublicKey | bytes
    scopes: frozenset[Scope] = frozenset({Scope.CLIENT})

    def __repr__(self) -> str:
        return f"Key(issuer={self.issuer!r}, kid={self.kid!r}, algorithm={self.algorithm.value})"


class SigningKey(msgspec.Struct, frozen=True):
    """A key that mints: only for development, tools and tests; production nodes hold public keys."""

    issuer: str
    kid: str
    algorithm: Algorithm
    material: Ed25519PrivateKey | bytes
    scopes: frozenset[Scope] = frozenset(Scope)

    def __repr__(self) -> str:
        return f"SigningKey(issuer={self.issuer!r}, kid={self.kid!r}, algorithm={self.algorithm.value})"

    def verifier(self) -> Key:
        """The key that believes this one's tokens."""
        material = self.material if isinstance(self.material, bytes) else self.material.public_key()
        return Key(self.issuer, self.kid, self.algorithm, material, self.scopes)


def load_key(
    issuer: str, kid: str, algorithm: str, material: str | bytes, scopes: Iterable[str] = ("client",)
) -> Key:
    """Build a Key from configuration: a PEM public key (EdDSA) or a secret (HS256).

    Raises UsageError that names the key and never shows its material.
    """
    what = f"key {kid!r} of issuer {issuer!r}"
    if not issuer or not _KID.match(kid):
        raise UsageError(f"{what}: issuer must not be empty, kid must be {_KID_RULE}")
    try:
        pinned, granted = Algorithm(algorithm), frozenset(Scope(scope) for scope in scopes)
    except ValueError as error:
        raise UsageError(f"{what}: {error}; algorithms EdDSA HS256, scopes client service admin") from None
    if pinned is Algorithm.HS256:
        return Key(issuer, kid, pinned, check_secret(what, material), granted)
    pem = material.encode() if isinstance(material, str) else material
    try:
        public = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"{what} is not a PEM public key") from None
    if not isinstance(public, Ed25519PublicKey):
        raise UsageError(f"{what} is a {type(public).__name__}; EdDSA needs Ed25519")
    return Key(issuer, kid, pinned, public, granted)


def create_dev_key(directory: Path, issuer: str = "fastim-dev", kid: str = "dev") -> SigningKey:
    """The development key in `directory`/dev-key.pem, made with mode 0600 at the first call."""
    path = directory / "dev-key.pem"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        loaded = serialization.load_pem_private_key(path.read_bytes(), None)
        if not isinstance(loaded, Ed25519PrivateKey):
            raise UsageError(f"{path} does not hold an Ed25519 key; remove it to have one made") from None
        return SigningKey(issuer, kid, Algorithm.EDDSA, loaded)
    private = Ed25519PrivateKey.generate()
    with os.fdopen(descriptor, "wb") as file:
        file.write(
            private.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        file.flush()
        os.fsync(file.fileno())
    return SigningKey(issuer, kid, Algorithm.EDDSA, private)


def mint(
    key: SigningKey,
    user: str,
    scopes: Iterable[str] = ("client",),
    *,
    audience: str,
    ttl_s: int,
    now_s: int,
    device: str = "",
) -> str:
    """A token for `user`. Raises UsageError for scopes that the key may not grant or a ttl out of range."""
    wanted = frozenset(Scope(scope) for scope in scopes)
    if not wanted or not wanted <= key.scopes:
        raise UsageError(f"key {key.kid!r} may grant {sorted(key.scopes)}; asked {sorted(wanted)}")
    if not 0 < ttl_s <= MAX_TTL_S:
        raise UsageError(f"ttl is {ttl_s} s; must be 1-{MAX_TTL_S}")
    claims: dict[str, object] = {
        "iss": key.issuer,
        "aud": audience,
        "sub": check_id("user", user),
        "iat": now_s,
        "exp": now_s + ttl_s,
        "jti": secrets.token_hex(12),
        "scope": " ".join(sorted(wanted)),
    }
    if device:
        claims["device"] = check_id("device", device)
    return jwt.encode(claims, key.material, algorithm=key.algorithm.value, headers={"kid": key.kid})


# ----------------------------------------------------------------------------------------------- tokens


class Identity(msgspec.Struct, frozen=True):
    """Who a verified token speaks for."""

    user: str
    scopes: frozenset[Scope]
    expires_ms: int
    issuer: str
    token_id: str
    """jti, else a hash of the token: the handle by which one token is revoked."""
    device: str = ""
    """The only device that may use the token; "" = any."""

    @property
    def is_service(self) -> bool:
        return Scope.SERVICE in self.scopes

    @property
    def is_admin(self) -> bool:
        return Scope.ADMIN in self.scopes


class _Refused(Exception):
    """Why a token was refused; never leaves this module."""


_KID_RULE: Final = "1-64 characters of A-Za-z0-9_.-"
_KID = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_SEGMENTS = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\Z")
_HEADER_MEMBERS: Final = frozenset({"alg", "kid", "typ"})
"""Anything else (jku, x5u, jwk, x5c, crit, b64, zip, enc …) could bring keys or change meaning: refused."""
_TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt"})


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused("duplicate_member")
    return found


def _no_constant(name: str) -> object:
    raise _Refused("json")


def _bytes_of(segment: str) -> bytes:
    """Decode base64url in its one spelling; raises ValueError.

    The last character may have bits behind the last byte. Were they ignored, up to 16 texts would stand for
    one signature, and fifteen of them would outlive the revocation of the token by its hash.
    """
    raw = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != segment:
        raise ValueError("bits behind the last byte")
    return raw


def _segment(text: str) -> dict[str, object]:
    """Decode one base64url JSON object; strict about duplicates, NaN and depth."""
    try:
        raw = _bytes_of(text)
        if raw.count(b"[") + raw.count(b"{") > 64:
            raise _Refused("nesting")
        value = json.loads(raw, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _Refused("encoding") from None
    if not isinstance(value, dict):
        raise _Refused("not_an_object")
    return value


def _seconds(claims: Mapping[str, object], name: str) -> int | None:
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if type(value) is not int or not 0 <= value <= MAX_SAFE_INT // 1000:
        raise _Refused(name)
    return value


class Authenticator:
    """Verifies tokens with the configured keys.

    failures counts refusals by reason, for operators and tests; peers never learn the reason.
    """

    def __init__(
        self,
        keys: Iterable[Key],
        audience: str,
        clock: Clock,
        *,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        if not audience:
            raise UsageError("audience is empty; tokens would be good everywhere")
        self._audience = audience
        self._clock = clock
        self._on_failure = on_failure
        self._keys = self._index(keys)
        self._revoked: dict[str, int] = {}
        self._watchers: list[Callable[[str], None]] = []
        self.failures: Counter[str] = Counter()

    @staticmethod
    def _index(keys: Iterable[Key]) -> dict[tuple[str, str], Key]:
        index: dict[tuple[str, str], Key] = {}
        for key in keys:
            if (key.issuer, key.kid) in index:
                raise UsageError(f"two keys have issuer {key.issuer!r} and kid {key.kid!r}")
            if isinstance(key.material, bytes) != (key.algorithm is Algorithm.HS256):
                raise UsageError(f"key {key.kid!r} does not fit its algorithm {key.algorithm.value}")
            index[key.issuer, key.kid] = key
        return index

    def replace_keys(self, keys: Iterable[Key]) -> None:
        """Take a new set of keys (rotation); all or nothing."""
        self._keys = self._index(keys)

    def verify(self, token: str, *, need: Scope | None = None) -> Identity:
        """Who `token` speaks for. ~100 us for EdDSA, no I/O.

        need: a scope it must carry (WebSocket: CLIENT). Raises PeerError("unauthenticated"), always with
        the same words.
        """
        try:
            identity = self._verify(token)
            if need is not None and need not in identity.scopes:
                raise _Refused("scope")
        except _Refused as refused:
            reason = str(refused)
            self.failures[reason] += 1
            if self._on_failure is not None:
                self._on_failure(reason)
            raise PeerError("unauthenticated", REFUSAL) from None
        return identity

    def _verify(self, token: object) -> Identity:
        if not isinstance(token, str) or not token:
            raise _Refused("missing")
        if len(token) > MAX_TOKEN_BYTES:
            raise _Refused("too_long")
        if not _SEGMENTS.match(token):
            raise _Refused("not_a_jws")
        header_text, claims_text, signature = token.split(".")
        key, claims = self._key_of(_segment(header_text), _segment(claims_text))
        try:
            _bytes_of(signature)
            # The claims were parsed above by our own rules; PyJWT only proves the signature over them.
            jwt.PyJWS(algorithms=[key.algorithm.value]).decode_complete(
                token, key.material, algorithms=[key.algorithm.value]
            )
        except (jwt.PyJWTError, ValueError, TypeError):
            raise _Refused("signature") from None
        return self._identity(key, claims, token)

    def _key_of(self, header: dict[str, object], claims: dict[str, object]) -> tuple[Key, dict[str, object]]:
        if not header.keys() <= _HEADER_MEMBERS:
            raise _Refused("header")
        kind, kid, issuer = header.get("typ", "JWT"), header.get("kid"), claims.get("iss")
        if not isinstance(kind, str) or kind.lower() not in _TYPES:
            raise _Refused("typ")
        if not isinstance(kid, str) or not _KID.match(kid) or not isinstance(issuer, str):
            raise _Refused("kid")
        key = self._keys.get((issuer, kid))
        if key is None:
            raise _Refused("unknown_key")
        if header.get("alg") != key.algorithm.value:
            raise _Refused("alg")
        return key, claims

    def _identity(self, key: Key, claims: dict[str, object], token: str) -> Identity:
        now_s = self._clock.wall_ms() // 1000
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        if self._audience not in audiences or not all(isinstance(one, str) for one in audiences):
            raise _Refused("aud")
        expires, not_before, issued = (_seconds(claims, name) for name in ("exp", "nbf", "iat"))
        if expires is None or expires <= now_s:
            raise _Refused("exp")
        if not_before is not None and not_before > now_s + NBF_LEEWAY_S:
            raise _Refused("nbf")
        if issued is not None and issued > now_s + NBF_LEEWAY_S:
            raise _Refused("iat")
        try:
            user = check_id("sub", claims.get("sub"))
            device = check_id("device", claims["device"]) if "device" in claims else ""
        except PeerError:
            raise _Refused("sub") from None
        token_id = claims.get("jti", "")
        if not isinstance(token_id, str) or len(token_id) > 128:
            raise _Refused("jti")
        token_id = token_id or hashlib.sha256(token.encode()).hexdigest()
        if self.is_revoked(token_id):
            raise _Refused("revoked")
        return Identity(user, self._scopes(key, claims), expires * 1000, key.issuer, token_id, device)

    @staticmethod
    def _scopes(key: Key, claims: dict[str, object]) -> frozenset[Scope]:
        text = claims.get("scope")
        if not isinstance(text, str):
            raise _Refused("scope")
        asked = frozenset(Scope(word) for word in text.split() if word in Scope.__members__.values())
        if not asked or not asked <= key.scopes:
            raise _Refused("scope")
        return asked

    # -- revocation

    def on_revoked(self, watcher: Callable[[str], None]) -> None:
        """Call `watcher(token_id)` at each revocation: the node closes that token's sockets (4505)."""
        self._watchers.append(watcher)

    def revoke(self, token_id: str, until_ms: int) -> None:
        """Refuse the token from now on. until_ms: its own expiry, after which the entry is forgotten."""
        self._forget_expired()
        self._revoked[token_id] = max(until_ms, self._revoked.get(token_id, 0))
        for watcher in self._watchers:
            watcher(token_id)

    def is_revoked(self, token_id: str) -> bool:
        return token_id in self._revoked

    def _forget_expired(self) -> None:
        now_ms = self._clock.wall_ms()
        for token_id in [key for key, until_ms in self._revoked.items() if until_ms < now_ms]:
            del self._revoked[token_id]


# ----------------------------------------------------------------------------------------- authorisation


class Action(enum.StrEnum):
    """What somebody wants to do. One list for frames and REST."""

    SEND = "send"
    READ = "read"
    """History, pull, catch-up, read marks, unread of one conversation."""
    CONNECT = "connect"
    """Open a WebSocket session."""
    SELF = "self"
    """REST about one user: badge, sessions, offline messages, device tokens."""
    LOOK = "look"
    """REST about one user, nothing that he wrote or reads: online, badge, which conversations he has."""
    GROUP = "group"
    """Make a group, name its members."""
    TRACE = "trace"
    """Where any message went. Members see their own part of it without this."""
    ADMIN = "admin"
    """Audit, trace, kick of others, broadcast."""


class Verdict(enum.Enum):
    """Allowed now, or allowed if the store says that the user is a member."""

    ALLOWED = 1
    IF_MEMBER = 2


def authorise(
    identity: Identity, action: Action, *, conv: Conv | str | None = None, user: str | None = None
) -> Verdict:
    """Decide. Pure; the only place that knows the rules.

    conv: for SEND and READ. user: on whose behalf (SEND by a service), or about whom (SELF).
    Raises PeerError("forbidden"), or "unsupported" for rooms, or "bad_conv".
    """
    match action:
        case Action.SEND:
            return may_send(identity, _need(conv), user)
        case Action.READ:
            return may_read(identity, _need(conv), user)
        case Action.CONNECT:
            allowed = Scope.CLIENT in identity.scopes
        case Action.SELF:
            allowed = identity.is_admin or (Scope.CLIENT in identity.scopes and user == identity.user)
        case Action.LOOK:
            himself = Scope.CLIENT in identity.scopes and user == identity.user
            allowed = identity.is_admin or identity.is_service or himself
        case Action.GROUP | Action.TRACE:
            allowed = identity.is_admin or identity.is_service
        case Action.ADMIN:
            allowed = identity.is_admin
    if not allowed:
        raise _forbidden(action, "this token's scope does not cover it")
    return Verdict.ALLOWED


def may_send(identity: Identity, conv: Conv | str, sender: str | None = None) -> Verdict:
    """Whether `identity` may send into `conv` as `sender` (None: as himself)."""
    target = parse_conv(conv) if isinstance(conv, str) else conv
    if target.type == "r":
        raise PeerError("unsupported", "rooms are not supported by this server")
    if identity.is_service:
        # What a person may write is checked against the person; a service writes for anybody, to anybody.
        return Verdict.ALLOWED
    if Scope.CLIENT not in identity.scopes:
        raise _forbidden(Action.SEND, "this token's scope does not cover it")
    if sender is not None and sender != identity.user:
        raise _forbidden(Action.SEND, "the sender is somebody else")
    if target.type == "s":
        raise _forbidden(Action.SEND, "s: conversations are written by services")
    return _member(identity.user, target, Action.SEND)


def may_read(identity: Identity, conv: Conv | str, user: str | None = None) -> Verdict:
    """Whether `identity` may read `conv` as `user` (None: as himself)."""
    target = parse_conv(conv) if isinstance(conv, str) else conv
    if target.type == "r":
        raise PeerError("unsupported", "rooms are not supported by this server")
    if identity.is_admin:
        return Verdict.ALLOWED
    if Scope.CLIENT not in identity.scopes:
        raise _forbidden(Action.READ, "this token's scope does not cover it")
    if user is not None and user != identity.user:
        raise _forbidden(Action.READ, "the reader is somebody else")
    return _member(identity.user, target, Action.READ)


def _member(user: str, conv: Conv, action: Action) -> Verdict:
    if conv.members is None:
        return Verdict.IF_MEMBER
    if user in conv.members:
        return Verdict.ALLOWED
    raise _forbidden(action, "not a member of this conversation")


def _need(conv: Conv | str | None) -> Conv | str:
    if conv is None:
        raise UsageError("this action needs a conversation")
    return conv


def _forbidden(action: Action, why: str) -> PeerError:
    return PeerError("forbidden", f"{action.value} is refused: {why}")
