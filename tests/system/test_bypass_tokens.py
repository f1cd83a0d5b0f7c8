"""Tokens that are not good, shown at every door: AUTH, REST, and REFRESH in a session (P20).

Whatever is wrong with one, the same bytes come back, and whoever it named, after the same time.
"""

from __future__ import annotations

import json
import statistics
import string
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from fastim.protocol import Op
from tests.system.bypass_world import (
    CLOSED_WS,
    MARK,
    NOW,
    REFUSED_REST,
    REFUSED_WS,
    World,
    auth,
    b64,
    running,
)
from tests.unit.conn_world import BINARY, REQUEST, ws

HEADER: Final = '{"alg": "EdDSA", "kid": "k1"}'
ALPHABET: Final = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield from running(tmp_path_factory.mktemp("bypass"))


def _payload_changed(w: World) -> str:
    head, _, signature = w.token(sub="mallory").split(".")
    return f"{head}.{b64(json.dumps(w.claims(sub='alice')).encode())}.{signature}"


def _duplicate(w: World, what: str) -> str:
    """The claims say it twice."""
    claims = json.dumps(w.claims(sub="mallory"))[:-1] + f', "{what}": {json.dumps(w.claims()[what])}' + "}"
    return w.sign(HEADER, claims)


def _other_spelling(w: World) -> str:
    """Of the same signature: its 64 bytes leave 4 bits of the last character unused."""
    token = w.token()
    return token[:-1] + ALPHABET[ALPHABET.index(token[-1]) ^ 1]


TOKENS: Final[dict[str, Callable[[World], str]]] = {
    "garbage": lambda w: MARK,
    "three empty parts": lambda w: "..",
    "two parts": lambda w: w.token().rpartition(".")[0],
    "four parts": lambda w: w.token() + "." + MARK,
    "a space behind": lambda w: w.token() + " ",
    "padding": lambda w: w.token() + "==",
    "no signature": lambda w: w.token().rpartition(".")[0] + ".",
    "half a signature": lambda w: w.token()[:-40],
    "signature of another": lambda w: w.token(key=w.stranger),
    "payload changed": _payload_changed,
    "alg none": lambda w: w.token({"alg": "none"}).rpartition(".")[0] + ".",
    "alg None": lambda w: w.token({"alg": "None"}),
    "alg nOnE": lambda w: w.token({"alg": "nOnE"}),
    "alg missing": lambda w: w.token({"alg": ...}),
    "alg a list": lambda w: w.token({"alg": ["EdDSA"]}),
    "HS256 with the public key": lambda w: w.token({"alg": "HS256"}, key=w.pem(w.a).encode()),
    "HS256 with the raw public key": lambda w: w.token(
        {"alg": "HS256"}, key=w.a.public_key().public_bytes_raw()
    ),
    "EdDSA where HS256 is pinned": lambda w: w.token(iss="https://b.example"),
    "HS512 where HS256 is pinned": lambda w: w.token(
        {"alg": "HS512"}, key=w.secret.encode(), iss="https://b.example"
    ),
    "kid unknown": lambda w: w.token({"kid": "k2"}),
    "kid missing": lambda w: w.token({"kid": ...}),
    "kid a path": lambda w: w.token({"kid": "../../dev-key.pem"}),
    "kid /dev/null": lambda w: w.token({"kid": "/dev/null"}, key=b""),
    "kid SQL": lambda w: w.token({"kid": "k1' OR '1'='1"}),
    "kid a URL": lambda w: w.token({"kid": "https://evil.example/key.pem"}, key=w.stranger),
    "kid a number": lambda w: w.token({"kid": 1}),
    "same kid, another issuer's key": lambda w: w.token(
        {"alg": "HS256"}, key=w.secret.encode(), iss="https://a.example"
    ),
    "kid of operations, issuer of clients": lambda w: w.token({"kid": "ops"}, key=w.ops),
    "issuer unknown": lambda w: w.token(iss="https://c.example"),
    "issuer missing": lambda w: w.token(iss=...),
    "issuer with a slash": lambda w: w.token(iss="https://a.example/"),
    "jwk": lambda w: w.token({"jwk": {"kty": "OKP", "crv": "Ed25519", "x": "AA"}}, key=w.stranger),
    "jku": lambda w: w.token({"jku": "https://evil.example/jwks.json"}, key=w.stranger),
    "x5u": lambda w: w.token({"x5u": "https://evil.example/cert.pem"}, key=w.stranger),
    "x5c": lambda w: w.token({"x5c": ["AA=="]}, key=w.stranger),
    "crit": lambda w: w.token({"crit": ["exp"]}),
    "b64 false": lambda w: w.token({"b64": False, "crit": ["b64"]}),
    "zip": lambda w: w.token({"zip": "DEF"}),
    "typ of an ID token": lambda w: w.token({"typ": "id_token"}),
    "typ of a logout token": lambda w: w.token({"typ": "logout+jwt"}),
    "expired": lambda w: w.token(exp=NOW - 1),
    "expired a moment ago": lambda w: w.token(exp=int(time.time())),
    "not yet": lambda w: w.token(nbf=NOW + 3_600),
    "issued tomorrow": lambda w: w.token(iat=NOW + 86_400),
    "exp missing": lambda w: w.token(exp=...),
    "exp null": lambda w: w.token(exp=None),
    "exp a float": lambda w: w.token(exp=NOW + 0.5 + 3_600),
    "exp a text": lambda w: w.token(exp=str(NOW + 3_600)),
    "exp true": lambda w: w.token(exp=True),
    "exp infinite": lambda w: w.token(exp=float("inf")),
    "exp negative": lambda w: w.token(exp=-1),
    "exp enormous": lambda w: w.token(exp=1 << 70),
    "audience of another": lambda w: w.token(aud="billing"),
    "audience missing": lambda w: w.token(aud=...),
    "audience a prefix": lambda w: w.token(aud="fastim-evil"),
    "audience a list of others": lambda w: w.token(aud=["billing", "FASTIM"]),
    "audience an object": lambda w: w.token(aud={"fastim": 1}),
    "no user": lambda w: w.token(sub=...),
    "user empty": lambda w: w.token(sub=""),
    "user with NUL": lambda w: w.token(sub="alice\0"),
    "user with a line": lambda w: w.token(sub="alice\nbob"),
    "user in look-alikes": lambda w: w.token(sub="\u0430lice"),
    "user of 10 KB": lambda w: w.token(sub="a" * 5_000),
    "user a pattern": lambda w: w.token(sub="{}:*"),
    "user of topic characters": lambda w: w.token(sub="inbox/../n1"),
    "user a list": lambda w: w.token(sub=["alice"]),
    "user a number": lambda w: w.token(sub=0),
    "user twice": lambda w: _duplicate(w, "sub"),
    "expiry twice": lambda w: _duplicate(w, "exp"),
    "no scope": lambda w: w.token(scope=...),
    "scope unknown": lambda w: w.token(scope="root"),
    "scope a list": lambda w: w.token(scope=["client"]),
    "scope beyond its key": lambda w: w.token(scope="client admin"),
    "scope service beyond its key": lambda w: w.token(scope="service"),
    "deeply nested": lambda w: w.sign("[" * 1_000, "{" * 1_000),
    "token identifier too long": lambda w: w.token(jti="j" * 500),
    "payload no object": lambda w: w.sign(HEADER, "1"),
    "payload no JSON": lambda w: w.sign(HEADER, MARK),
    "header twice": lambda w: w.sign('{"alg": "none", ' + HEADER[1:], json.dumps(w.claims())),
    "kid twice": lambda w: w.sign('{"kid": "ops", ' + HEADER[1:], json.dumps(w.claims())),
    "another spelling of the signature": _other_spelling,
    "for another device": lambda w: w.token(device="laptop"),
    "a session of a service": lambda w: w.operations("service"),
    "a session of an admin": lambda w: w.operations("admin"),
    "a session of both": lambda w: w.operations("service admin"),
}


REST_TAKES: Final = {
    "a space behind",  # at the end of a header it is none of the value
    "for another device",  # REST has no devices
    "a session of a service",
    "a session of an admin",
    "a session of both",
}


@pytest.mark.parametrize("make", TOKENS.values(), ids=TOKENS.keys())
def test_a_token_that_is_not_good_opens_no_session(world: World, make: Callable[[World], str]) -> None:
    token = make(world)
    world.tried.append(token)
    with world.dial() as one:
        one.auth(token)
        assert [*one.frames()] == [REFUSED_WS, CLOSED_WS]


@pytest.mark.parametrize("name", TOKENS.keys() - REST_TAKES)
def test_a_token_that_is_not_good_is_refused_by_rest(world: World, name: str) -> None:
    token = TOKENS[name](world)
    world.tried.append(token)
    assert world.raw_ask("GET", "/v1/users/alice/unread", token) == (401, REFUSED_REST)


def test_a_token_that_is_not_good_refreshes_nothing(world: World) -> None:
    """The session goes on as who it was."""
    refused = [Op.ERROR, int(Op.REFRESH), *REFUSED_WS[2:]]
    with world.session("alice") as alice:
        for name, make in TOKENS.items():
            alice.send([int(Op.REFRESH), make(world)])
            error = alice.get(Op.ERROR)
            assert error == refused or (name, error[2]) == ("for another device", "forbidden"), name
        alice.send([int(Op.REFRESH), world.token()])
        assert alice.get(Op.REFRESHED)


def test_good_tokens_are_taken_or_all_of_this_would_prove_nothing(world: World) -> None:
    hs256 = world.token({"alg": "HS256"}, key=world.secret.encode(), iss="https://b.example", sub="bob")
    assert world.ask("GET", "/v1/users/alice/unread", world.token())[0] == 200
    assert world.ask("GET", "/v1/users/bob/unread", hs256)[0] == 200
    with world.dial() as one:
        one.auth(hs256)
        assert one.get(Op.HELLO)[3] == "bob"


def test_no_token_opens_nothing(world: World) -> None:
    with world.dial() as one:
        one.auth("")
        assert [*one.frames()] == [REFUSED_WS, CLOSED_WS]
    status, answer = world.ask("GET", "/v1/users/alice/unread")
    assert (status, answer["code"]) == (401, "unauthenticated")


def test_a_good_token_behind_a_bad_one_comes_too_late(world: World) -> None:
    with world.dial() as one:
        one.send(auth(world.token(key=world.stranger)), auth(world.token()))
        assert [*one.frames()] == [REFUSED_WS, CLOSED_WS]


@pytest.mark.parametrize(
    "line",
    [
        "Authorization: Bearer {}",
        "Cookie: token={}",
        "Sec-WebSocket-Protocol: fastim.v1, {}",
        "X-User: alice",
    ],
)
def test_a_token_in_the_upgrade_opens_no_session(world: World, line: str) -> None:
    head = REQUEST + line.format(world.token()).encode() + b"\r\n\r\n"
    with world.dial(head) as one:
        one.send([int(Op.HISTORY), 1, "p:alice:bob"])
        error, close = one.frames()
        assert (error[0], error[2], close) == (Op.ERROR, "unauthenticated", CLOSED_WS)


@pytest.mark.parametrize("size", [8_193, 60_000])
def test_a_token_above_8_kb_is_not_even_looked_at(world: World, size: int) -> None:
    with world.dial() as one:
        one.auth(MARK + "x" * size)
        (_, _, code, detail, *_), close = one.frames()
        assert (code, close) == ("bad_frame", (4509, b"bad_frame"))
        assert MARK not in detail
    status, _ = world.raw_ask("GET", "/v1/users/alice/unread", MARK + "x" * size)
    assert status == (401 if size < 16_000 else 431)


def test_a_token_of_a_megabyte_ends_the_connection(world: World) -> None:
    with world.dial() as one:
        one.raw(ws(BINARY, b"\x95\x01\x01\x01\xdb\x00\x10\x00\x00" + b"x" * 1_048_576))
        assert [*one.frames()][-1][0] == 1009
    head = b"GET /v1/users/alice/unread HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
    assert world.raw_http(head + b"x" * 1_048_576).startswith(b"HTTP/1.1 431")


def test_a_token_that_ends_ends_its_session(world: World) -> None:
    """Everywhere else a token ends with its connection; here it ends first."""
    with world.dial() as one:
        one.auth(world.token(exp=int(time.time()) + 2), "watch")
        assert one.get(Op.HELLO)
        assert [*one.frames()][-1] == (4501, b"token_expired")


def test_refusals_take_the_same_time_whoever_the_token_names(world: World) -> None:
    """By medians of many in turns: a look-up of somebody who exists would show."""
    took: dict[str, list[float]] = {"alice": [], "nobody": []}
    tokens = {user: world.token(key=world.stranger, sub=user) for user in took}
    for _ in range(200):
        for user, token in tokens.items():
            with world.dial() as one:
                began = time.perf_counter()
                one.auth(token)
                assert [*one.frames()] == [REFUSED_WS, CLOSED_WS]
                took[user].append(time.perf_counter() - began)
    known, unknown = (statistics.median(found) for found in took.values())
    assert abs(known - unknown) < 0.2 * max(known, unknown), (known, unknown)
