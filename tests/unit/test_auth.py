"""Nobody gets in: the bypass table, secrets, keys, revocation, and the one authoriser."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import stat
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fastim import auth
from fastim.auth import Action, Algorithm, Authenticator, Identity, Scope, SigningKey, Verdict
from fastim.errors import PeerError, UsageError

NOW_S = 1_800_000_000
AUDIENCE = "fastim"
SECRET = bytes(range(7, 256, 5))[:40] + b"\x91\x03\xee\x1c"


class StoppedClock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def mono_ms(self) -> int:
        return self.now_s * 1000

    def wall_ms(self) -> int:
        return self.now_s * 1000


ED = SigningKey("https://id.example", "ed-1", Algorithm.EDDSA, Ed25519PrivateKey.generate())
HS = SigningKey("https://other.example", "hs-1", Algorithm.HS256, secrets.token_bytes(32))
CLIENTS_ONLY = SigningKey(
    "https://clients.example",
    "ed-1",
    Algorithm.EDDSA,
    Ed25519PrivateKey.generate(),
    frozenset({Scope.CLIENT}),
)


def authenticator(clock: StoppedClock | None = None) -> Authenticator:
    keys = [ED.verifier(), HS.verifier(), CLIENTS_ONLY.verifier()]
    return Authenticator(keys, AUDIENCE, clock or StoppedClock())


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def good_claims(**changes: Any) -> dict[str, Any]:
    claims: dict[str, Any] = {
        "iss": ED.issuer,
        "aud": AUDIENCE,
        "sub": "alice",
        "exp": NOW_S + 60,
        "scope": "client",
        "jti": "t1",
    }
    claims.update(changes)
    return {name: value for name, value in claims.items() if value is not ...}


def signed(
    claims: Any = None,
    header: dict[str, Any] | None = None,
    key: SigningKey = ED,
    *,
    raw_claims: bytes | None = None,
    **changes: Any,
) -> str:
    """A token whose signature is right for whatever header and claims are asked for."""
    head = {"alg": key.algorithm.value, "typ": "JWT", "kid": key.kid} | (header or {})
    head = {name: value for name, value in head.items() if value is not ...}
    body = raw_claims or json.dumps(good_claims(**changes) if claims is None else claims).encode()
    text = f"{b64(json.dumps(head).encode())}.{b64(body)}"
    if isinstance(key.material, bytes):
        signature = hmac.new(key.material, text.encode(), hashlib.sha256).digest()
    else:
        signature = key.material.sign(text.encode())
    return f"{text}.{b64(signature)}"


def public_pem(key: SigningKey) -> bytes:
    assert isinstance(key.material, Ed25519PrivateKey)
    return key.material.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def public_raw(key: SigningKey) -> bytes:
    assert isinstance(key.material, Ed25519PrivateKey)
    return key.material.public_key().public_bytes_raw()


def hs_with(material: bytes, kid: str = ED.kid, issuer: str = ED.issuer) -> str:
    return signed(good_claims(iss=issuer), key=SigningKey(issuer, kid, Algorithm.HS256, material))


def unsigned(alg: str, signature: str = "") -> str:
    head = b64(json.dumps({"alg": alg, "typ": "JWT", "kid": ED.kid}).encode())
    return f"{head}.{b64(json.dumps(good_claims()).encode())}.{signature}"


def tampered() -> str:
    head, _, signature = signed().split(".")
    return f"{head}.{b64(json.dumps(good_claims(sub='root')).encode())}.{signature}"


def foreign(algorithm: str) -> str:
    """Signed with a key of the attacker's own, of another algorithm."""
    private: Any
    if algorithm == "ES256":
        private = ec.generate_private_key(ec.SECP256R1())
    else:
        private = rsa.generate_private_key(65537, 2048)
    return jwt.encode(good_claims(), private, algorithm=algorithm, headers={"kid": ED.kid})


def own_jwk() -> str:
    attacker = SigningKey(ED.issuer, ED.kid, Algorithm.EDDSA, Ed25519PrivateKey.generate())
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": b64(public_raw(attacker))}
    return signed(header={"jwk": jwk}, key=attacker)


BYPASSES: list[tuple[str, Callable[[], Any], str]] = [
    ("no token", lambda: "", "missing"),
    ("not text", lambda: None, "missing"),
    ("bytes", lambda: signed().encode(), "missing"),
    ("garbage", lambda: "\x00\xff garbage", "not_a_jws"),
    ("one part", lambda: "eyJhbGciOiJub25lIn0", "not_a_jws"),
    ("two parts", lambda: signed().rpartition(".")[0], "not_a_jws"),
    ("four parts", lambda: signed() + ".AAAA", "not_a_jws"),
    ("newline at the end", lambda: signed() + "\n", "not_a_jws"),
    ("space in front", lambda: " " + signed(), "not_a_jws"),
    ("one megabyte", lambda: "A" * 1_000_000, "too_long"),
    ("one megabyte of claims", lambda: signed(good_claims(pad="x" * 700_000)), "too_long"),
    ("header is no JSON", lambda: f"{b64(b'{')}.{b64(b'{}')}.AAAA", "encoding"),
    ("header is a list", lambda: f"{b64(b'[]')}.{b64(b'{}')}.AAAA", "not_an_object"),
    ("claims are a list", lambda: signed(["sub", "alice"]), "not_an_object"),
    ("claims nested deeply", lambda: signed(raw_claims=b"[" * 3000 + b"]" * 3000), "nesting"),
    ("claims twice", lambda: signed(raw_claims=b'{"sub":"a","sub":"b"}'), "duplicate_member"),
    ("claims with NaN", lambda: signed(raw_claims=b'{"exp":NaN}'), "json"),
    ("claims not UTF-8", lambda: signed(raw_claims=b'{"sub":"\xff\xfe"}'), "encoding"),
    ("alg none", lambda: unsigned("none", "AAAA"), "alg"),
    ("alg None", lambda: unsigned("None", "AAAA"), "alg"),
    ("alg none, no signature", lambda: unsigned("none"), "not_a_jws"),
    ("alg missing", lambda: signed(header={"alg": ...}), "alg"),
    ("alg a list", lambda: signed(header={"alg": ["EdDSA"]}), "alg"),
    ("HS256 with the public key (PEM)", lambda: hs_with(public_pem(ED)), "alg"),
    ("HS256 with the public key (raw)", lambda: hs_with(public_raw(ED)), "alg"),
    ("HS512 for an HS256 key", lambda: signed(good_claims(iss=HS.issuer), {"alg": "HS512"}, HS), "alg"),
    ("EdDSA for an HS256 key", lambda: signed(good_claims(iss=HS.issuer), {"kid": "hs-1"}, ED), "alg"),
    ("ES256", lambda: foreign("ES256"), "alg"),
    ("RS256", lambda: foreign("RS256"), "alg"),
    ("tampered claims", tampered, "signature"),
    ("signature of zeros", lambda: unsigned("EdDSA", b64(bytes(64))), "signature"),
    ("signature cut", lambda: signed()[:-4], "signature"),
    ("kid missing", lambda: signed(header={"kid": ...}), "kid"),
    ("kid a number", lambda: signed(header={"kid": 1}), "kid"),
    ("kid a path", lambda: signed(header={"kid": "../../../dev/null"}), "kid"),
    ("kid SQL", lambda: signed(header={"kid": "x' UNION SELECT 'key"}), "kid"),
    ("kid a URL", lambda: signed(header={"kid": "https://evil.example/key"}), "kid"),
    ("kid with NUL", lambda: signed(header={"kid": "ed-1\x00"}), "kid"),
    ("kid unknown", lambda: signed(header={"kid": "ed-2"}), "unknown_key"),
    ("same kid, other issuer's key", lambda: signed(good_claims(), key=CLIENTS_ONLY), "signature"),
    ("swapped issuers", lambda: signed(good_claims(iss=HS.issuer)), "unknown_key"),
    ("issuer missing", lambda: signed(good_claims(iss=...)), "kid"),
    ("issuer a list", lambda: signed(good_claims(iss=[ED.issuer])), "kid"),
    ("issuer with a slash more", lambda: signed(good_claims(iss=ED.issuer + "/")), "unknown_key"),
    ("jku", lambda: signed(header={"jku": "https://evil.example/jwks"}), "header"),
    ("x5u", lambda: signed(header={"x5u": "https://evil.example/cert"}), "header"),
    ("x5c", lambda: signed(header={"x5c": ["MIIB"]}), "header"),
    ("jwk of the attacker", own_jwk, "header"),
    ("crit", lambda: signed(header={"crit": ["exp"], "exp": 1}), "header"),
    ("b64 false", lambda: signed(header={"b64": False}), "header"),
    ("zip", lambda: signed(header={"zip": "DEF"}), "header"),
    ("typ of another token", lambda: signed(header={"typ": "id_token+jwt"}), "typ"),
    ("typ a number", lambda: signed(header={"typ": 1}), "typ"),
    ("exp missing", lambda: signed(exp=...), "exp"),
    ("exp null", lambda: signed(exp=None), "exp"),
    ("exp float", lambda: signed(exp=NOW_S + 60.5), "exp"),
    ("exp text", lambda: signed(exp=str(NOW_S + 60)), "exp"),
    ("exp true", lambda: signed(exp=True), "exp"),
    ("exp negative", lambda: signed(exp=-1), "exp"),
    ("exp infinite", lambda: signed(raw_claims=b'{"iss":"https://id.example","exp":1e999}'), "aud"),
    ("exp beyond 2^53", lambda: signed(exp=1 << 60), "exp"),
    ("expired", lambda: signed(exp=NOW_S - 1), "exp"),
    ("expires now", lambda: signed(exp=NOW_S), "exp"),
    ("nbf in the future", lambda: signed(nbf=NOW_S + 60), "nbf"),
    ("nbf float", lambda: signed(nbf=0.5), "nbf"),
    ("iat in the future", lambda: signed(iat=NOW_S + 3600), "iat"),
    ("aud missing", lambda: signed(aud=...), "aud"),
    ("aud of another service", lambda: signed(aud="billing"), "aud"),
    ("aud a prefix", lambda: signed(aud="fastim2"), "aud"),
    ("aud an empty list", lambda: signed(aud=[]), "aud"),
    ("aud an object", lambda: signed(aud={"fastim": 1}), "aud"),
    ("aud list with a number", lambda: signed(aud=["fastim", 1]), "aud"),
    ("sub missing", lambda: signed(sub=...), "sub"),
    ("sub a number", lambda: signed(sub=7), "sub"),
    ("sub empty", lambda: signed(sub=""), "sub"),
    ("sub with NUL", lambda: signed(sub="alice\x00"), "sub"),
    ("sub with braces", lambda: signed(sub="{}:*"), "sub"),
    ("sub a look-alike", lambda: signed(sub="аlice"), "sub"),
    ("sub of 10 KB", lambda: signed(sub="a" * 5_000), "sub"),
    ("device with a slash", lambda: signed(device="a/b"), "sub"),
    ("jti a number", lambda: signed(jti=5), "jti"),
    ("scope missing", lambda: signed(scope=...), "scope"),
    ("scope a list", lambda: signed(scope=["admin"]), "scope"),
    ("scope unknown", lambda: signed(scope="root"), "scope"),
    ("scope above the key's", lambda: signed(
        good_claims(iss=CLIENTS_ONLY.issuer, scope="client admin"), key=CLIENTS_ONLY), "scope"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), [row[1:] for row in BYPASSES], ids=[row[0] for row in BYPASSES])
def test_bypass_is_refused_with_the_same_words(make: Callable[[], Any], reason: str) -> None:
    checker = authenticator()
    with pytest.raises(PeerError) as caught:
        checker.verify(make())
    assert (caught.value.code, caught.value.detail) == ("unauthenticated", auth.REFUSAL)
    assert not caught.value.retryable
    assert caught.value.__suppress_context__
    assert dict(checker.failures) == {reason: 1}


@pytest.mark.parametrize("key", [ED, HS], ids=["EdDSA", "HS256"])
def test_minted_token_is_believed(key: SigningKey) -> None:
    token = auth.mint(key, "alice", ["client"], audience=AUDIENCE, ttl_s=60, now_s=NOW_S, device="phone")
    identity = authenticator().verify(token)
    assert identity.user == "alice"
    assert identity.scopes == {Scope.CLIENT}
    assert identity.expires_ms == (NOW_S + 60) * 1000
    assert identity.issuer == key.issuer
    assert identity.device == "phone"
    assert identity.token_id


def test_token_of_another_library_is_believed() -> None:
    token = jwt.encode(good_claims(aud=["x", AUDIENCE]), ED.material, "EdDSA", {"kid": ED.kid})
    assert authenticator().verify(token).user == "alice"


def test_small_clock_difference_of_the_issuer_is_forgiven_for_nbf_but_not_for_exp() -> None:
    checker = authenticator()
    assert checker.verify(signed(nbf=NOW_S + 3, iat=NOW_S + 3)).user == "alice"
    with pytest.raises(PeerError):
        checker.verify(signed(exp=NOW_S))


def test_need_refuses_a_service_token_on_websocket() -> None:
    checker = authenticator()
    token = signed(scope="service")
    assert checker.verify(token).is_service
    with pytest.raises(PeerError, match="unauthenticated"):
        checker.verify(token, need=Scope.CLIENT)


def test_failure_reasons_reach_the_operator_only() -> None:
    heard: list[str] = []
    checker = Authenticator([ED.verifier()], AUDIENCE, StoppedClock(), on_failure=heard.append)
    with pytest.raises(PeerError):
        checker.verify(signed(exp=NOW_S - 9))
    assert heard == ["exp"]


def test_revoked_token_is_refused_and_watchers_hear_it_until_it_expires() -> None:
    clock, heard = StoppedClock(), []
    checker = authenticator(clock)
    checker.on_revoked(heard.append)
    identity = checker.verify(signed())
    checker.revoke(identity.token_id, identity.expires_ms)
    assert heard == [identity.token_id]
    with pytest.raises(PeerError):
        checker.verify(signed())
    clock.now_s += 120
    checker.revoke("other", clock.wall_ms() + 1)
    assert not checker.is_revoked(identity.token_id)
    assert checker.is_revoked("other")


def test_token_without_jti_can_be_revoked_by_its_hash() -> None:
    checker = authenticator()
    one, other = signed(jti=...), signed(jti=..., sub="bob")
    checker.revoke(checker.verify(one).token_id, NOW_S * 1000 + 60_000)
    with pytest.raises(PeerError):
        checker.verify(one)
    assert checker.verify(other).user == "bob"


@pytest.mark.parametrize("key", [ED, HS], ids=["EdDSA", "HS256"])
def test_another_spelling_of_a_token_is_another_token(key: SigningKey) -> None:
    """The last character of its signature has unused bits: a revoked token must not live on in them."""
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    token = signed(good_claims(iss=key.issuer, jti=...), key=key)
    checker = authenticator()
    checker.revoke(checker.verify(token).token_id, NOW_S * 1000 + 60_000)
    unused = 4 if key is ED else 2
    for bits in range(1, 1 << unused):
        other = token[:-1] + alphabet[alphabet.index(token[-1]) ^ bits]
        assert signature_of(other) == signature_of(token)
        with pytest.raises(PeerError):
            checker.verify(other)
    assert checker.failures == {"signature": (1 << unused) - 1}


def signature_of(token: str) -> bytes:
    return base64.urlsafe_b64decode(token.rpartition(".")[2] + "==")


def test_rotated_keys_replace_the_old_ones_at_once() -> None:
    checker = authenticator()
    newer = SigningKey(ED.issuer, "ed-9", Algorithm.EDDSA, Ed25519PrivateKey.generate())
    checker.replace_keys([newer.verifier()])
    with pytest.raises(PeerError):
        checker.verify(signed())
    assert checker.verify(signed(key=newer)).user == "alice"


def test_two_keys_of_one_name_are_refused_and_the_old_set_stays() -> None:
    checker = authenticator()
    with pytest.raises(UsageError, match="two keys"):
        checker.replace_keys([ED.verifier(), ED.verifier()])
    assert checker.verify(signed()).user == "alice"


def test_key_of_the_wrong_type_for_its_algorithm_is_refused() -> None:
    key = auth.Key("i", "k", Algorithm.HS256, Ed25519PrivateKey.generate().public_key())
    with pytest.raises(UsageError, match="does not fit"):
        Authenticator([key], AUDIENCE, StoppedClock())


def test_empty_audience_is_refused() -> None:
    with pytest.raises(UsageError, match="audience"):
        Authenticator([ED.verifier()], "", StoppedClock())


# -------------------------------------------------------------------------------------- keys and secrets


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "short",
        "a" * 64,
        "0123456789abcdef" * 4,
        "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "changeme" + secrets.token_urlsafe(48),
        "Change-Me!" + secrets.token_urlsafe(48),
        "your-256-bit-secret" + secrets.token_urlsafe(32),
        "password password password password password",
        secrets.token_hex(16),
        secrets.token_urlsafe(24),
        bytes(32),
        b"\x00\x01" * 16,
        bytes(range(40)),
    ],
)
def test_weak_secret_is_refused_and_not_shown(secret: str | bytes) -> None:
    with pytest.raises(UsageError) as caught:
        auth.check_secret("auth.secret", secret)
    assert "auth.secret" in str(caught.value)
    shown = secret if isinstance(secret, str) else secret.decode("latin-1")
    assert len(shown) < 6 or shown[:6] not in str(caught.value)


@pytest.mark.parametrize("make", [secrets.token_bytes, secrets.token_hex, secrets.token_urlsafe])
def test_random_256_bits_are_taken_in_any_encoding(make: Callable[[int], str | bytes]) -> None:
    for _ in range(200):
        secret = make(32)
        if isinstance(secret, bytes) and secret.decode("latin-1").isascii():
            continue
        assert auth.check_secret("s", secret)


def test_same_secret() -> None:
    assert auth.same_secret("a" * 40, b"a" * 40)
    assert not auth.same_secret("a" * 40, "a" * 41)


def test_load_key_takes_what_configuration_holds() -> None:
    key = auth.load_key(ED.issuer, ED.kid, "EdDSA", public_pem(ED).decode(), ["client", "admin"])
    assert Authenticator([key], AUDIENCE, StoppedClock()).verify(signed()).user == "alice"
    assert auth.load_key("i", "k", "HS256", secrets.token_urlsafe(32)).algorithm is Algorithm.HS256


@pytest.mark.parametrize(
    ("kid", "algorithm", "material", "scopes"),
    [
        ("k", "none", "x", ["client"]),
        ("k", "RS256", "x", ["client"]),
        ("k", "EdDSA", "not a pem", ["client"]),
        ("k", "HS256", "short", ["client"]),
        ("k", "HS256", secrets.token_urlsafe(32), ["root"]),
        ("../k", "HS256", secrets.token_urlsafe(32), ["client"]),
    ],
)
def test_load_key_refuses(kid: str, algorithm: str, material: str, scopes: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        auth.load_key("issuer", kid, algorithm, material, scopes)
    assert len(material) < 9 or material not in str(caught.value)


def test_load_key_refuses_another_curve() -> None:
    pem = (
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(UsageError, match="Ed25519"):
        auth.load_key("i", "k", "EdDSA", pem)


def test_dev_key_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    first, second = auth.create_dev_key(tmp_path), auth.create_dev_key(tmp_path)
    assert stat.S_IMODE((tmp_path / "dev-key.pem").stat().st_mode) == 0o600
    token = auth.mint(first, "alice", audience=AUDIENCE, ttl_s=60, now_s=NOW_S)
    checker = Authenticator([second.verifier()], AUDIENCE, StoppedClock())
    assert checker.verify(token).user == "alice"


def test_no_repr_shows_a_secret() -> None:
    key = SigningKey("i", "k", Algorithm.HS256, SECRET)
    assert SECRET.hex() not in repr(key) + repr(key.verifier())
    assert "material" not in repr(key) + repr(key.verifier())


def test_mint_refuses_scopes_the_key_may_not_grant_and_odd_ttls() -> None:
    with pytest.raises(UsageError, match="may grant"):
        auth.mint(CLIENTS_ONLY, "alice", ["admin"], audience=AUDIENCE, ttl_s=60, now_s=NOW_S)
    for ttl_s in (0, -1, 10**10):
        with pytest.raises(UsageError, match="ttl"):
            auth.mint(ED, "alice", audience=AUDIENCE, ttl_s=ttl_s, now_s=NOW_S)


# ------------------------------------------------------------------------------------------ authorisation


def who(user: str, *scopes: Scope) -> Identity:
    return Identity(user, frozenset(scopes or (Scope.CLIENT,)), 1, "i", "t")


ALICE = who("alice")
CALLER = who("shop", Scope.SERVICE)
ROOT = who("root", Scope.ADMIN)
OK, ASK = Verdict.ALLOWED, Verdict.IF_MEMBER


@pytest.mark.parametrize(
    ("identity", "action", "resource", "verdict"),
    [
        (ALICE, Action.SEND, {"conv": "p:alice:bob"}, OK),
        (ALICE, Action.SEND, {"conv": "p:alice:bob", "user": "alice"}, OK),
        (ALICE, Action.SEND, {"conv": "p:bob:carol"}, "forbidden"),
        (ALICE, Action.SEND, {"conv": "p:bob:alice"}, "bad_conv"),
        (ALICE, Action.SEND, {"conv": "p:alice:bob", "user": "bob"}, "forbidden"),
        (ALICE, Action.SEND, {"conv": "g:team"}, ASK),
        (ALICE, Action.SEND, {"conv": "s:alice"}, "forbidden"),
        (ALICE, Action.SEND, {"conv": "s:bob"}, "forbidden"),
        (ALICE, Action.SEND, {"conv": "r:lobby"}, "unsupported"),
        (ALICE, Action.SEND, {"conv": "x:1"}, "bad_conv"),
        (ALICE, Action.READ, {"conv": "p:alice:bob"}, OK),
        (ALICE, Action.READ, {"conv": "p:bob:carol"}, "forbidden"),
        (ALICE, Action.READ, {"conv": "p:alice:bob", "user": "bob"}, "forbidden"),
        (ALICE, Action.READ, {"conv": "s:alice"}, OK),
        (ALICE, Action.READ, {"conv": "s:alice2"}, "forbidden"),
        (ALICE, Action.READ, {"conv": "g:team"}, ASK),
        (ALICE, Action.READ, {"conv": "r:lobby"}, "unsupported"),
        (ALICE, Action.CONNECT, {}, OK),
        (ALICE, Action.SELF, {"user": "alice"}, OK),
        (ALICE, Action.SELF, {"user": "bob"}, "forbidden"),
        (ALICE, Action.SELF, {}, "forbidden"),
        (ALICE, Action.ADMIN, {}, "forbidden"),
        (CALLER, Action.SEND, {"conv": "p:bob:carol", "user": "bob"}, OK),
        (CALLER, Action.SEND, {"conv": "s:bob"}, OK),
        (CALLER, Action.SEND, {"conv": "g:team", "user": "bob"}, OK),
        (CALLER, Action.SEND, {"conv": "r:lobby"}, "unsupported"),
        (CALLER, Action.READ, {"conv": "p:bob:carol"}, "forbidden"),
        (CALLER, Action.CONNECT, {}, "forbidden"),
        (CALLER, Action.SELF, {"user": "bob"}, "forbidden"),
        (CALLER, Action.ADMIN, {}, "forbidden"),
        (ALICE, Action.LOOK, {"user": "alice"}, OK),
        (ALICE, Action.LOOK, {"user": "bob"}, "forbidden"),
        (ALICE, Action.LOOK, {}, "forbidden"),
        (ALICE, Action.GROUP, {}, "forbidden"),
        (ALICE, Action.TRACE, {}, "forbidden"),
        (CALLER, Action.LOOK, {"user": "bob"}, OK),
        (CALLER, Action.GROUP, {}, OK),
        (CALLER, Action.TRACE, {}, OK),
        (ROOT, Action.LOOK, {"user": "bob"}, OK),
        (ROOT, Action.GROUP, {}, OK),
        (ROOT, Action.TRACE, {}, OK),
        (ROOT, Action.ADMIN, {}, OK),
        (ROOT, Action.READ, {"conv": "p:bob:carol"}, OK),
        (ROOT, Action.SELF, {"user": "bob"}, OK),
        (ROOT, Action.SEND, {"conv": "p:bob:root"}, "forbidden"),
        (ROOT, Action.CONNECT, {}, "forbidden"),
    ],
)
def test_authorise(identity: Identity, action: Action, resource: dict[str, Any], verdict: Any) -> None:
    if isinstance(verdict, Verdict):
        assert auth.authorise(identity, action, **resource) is verdict
        return
    with pytest.raises(PeerError) as caught:
        auth.authorise(identity, action, **resource)
    assert caught.value.code == verdict


def test_action_about_a_conversation_needs_one() -> None:
    with pytest.raises(UsageError):
        auth.authorise(ALICE, Action.SEND)
