"""Agreement on keys: published vectors under the slow twin, and the product against twin and golden file."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from fastim import sealing
from fastim._core.sealed import SealedStream
from fastim.errors import PeerError, UsageError
from fastim.protocol import Keys, Rekey
from fastim.sealing import Offer, SealKey, SealKeys, SharedKey, StaticKey
from tests.reference import sealing as slow
from tests.vectors.notation import load

GOLDEN = load("sealing")
AGREEMENTS = {case["name"]: case for case in GOLDEN["agreements"]}
STATIC = StaticKey("k1", X25519PrivateKey.from_private_bytes(bytes(range(32))))
SHARED = SharedKey("factory", bytes(range(100, 132)))
KEYS = SealKeys([STATIC, StaticKey.generate("k2")], [SHARED])


def private(raw: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(raw)


def refused(call: Any, *arguments: Any) -> None:
    with pytest.raises(PeerError) as error:
        call(*arguments)
    assert (error.value.code, error.value.detail, error.value.retryable) == (
        "bad_seal", "no keys were agreed", False,
    )  # fmt: skip
    assert error.value.__cause__ is None


# ------------------------------------------------------------------------------------- published vectors

RFC_7748_5_2 = (
    (
        "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
        "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
        "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
    ),
    (
        "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
        "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
        "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
    ),
)


@pytest.mark.parametrize(("scalar", "point", "result"), RFC_7748_5_2)
def test_x25519_is_that_of_rfc_7748(scalar: str, point: str, result: str) -> None:
    wanted = bytes.fromhex(result)
    assert slow.x25519(bytes.fromhex(scalar), bytes.fromhex(point)) == wanted
    key = private(bytes.fromhex(scalar))
    assert key.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(point))) == wanted


def test_x25519_iterated_is_that_of_rfc_7748() -> None:
    k = u = slow.BASE
    for _ in range(1_000):
        k, u = private(k).exchange(X25519PublicKey.from_public_bytes(u)), k
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_the_agreement_of_rfc_7748() -> None:
    """Section 6.1."""
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    publics = (
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
    )
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert tuple(slow.public_of(raw).hex() for raw in (alice, bob)) == publics
    assert tuple(StaticKey("k", private(raw)).public.hex() for raw in (alice, bob)) == publics
    for own, other in ((alice, publics[1]), (bob, publics[0])):
        assert slow.x25519(own, bytes.fromhex(other)).hex() == shared
        assert sealing._exchange(private(own), bytes.fromhex(other)).hex() == shared


# RFC 5869, test cases 1-3: ikm, salt, info, length, prk, okm
RFC_5869 = (
    (
        "0b" * 22, "000102030405060708090a0b0c", "f0f1f2f3f4f5f6f7f8f9", 42,
        "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(), bytes(range(0x60, 0xB0)).hex(), bytes(range(0xB0, 0x100)).hex(), 82,
        "06a6b88c5853361a06104c9ceb35b45cef760014904671014a193f40c15fc244",
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        "0b" * 22, "", "", 42,
        "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
)  # fmt: skip


@pytest.mark.parametrize(("ikm", "salt", "info", "length", "prk", "okm"), RFC_5869)
def test_hkdf_is_that_of_rfc_5869(ikm: str, salt: str, info: str, length: int, prk: str, okm: str) -> None:
    raw = [bytes.fromhex(text) for text in (ikm, salt, info)]
    assert slow.hkdf_extract(raw[1], raw[0]).hex() == prk
    assert slow.hkdf_expand(bytes.fromhex(prk), raw[2], length).hex() == okm
    assert HKDF(hashes.SHA256(), length, salt=raw[1], info=raw[2]).derive(raw[0]).hex() == okm


# ------------------------------------------------------------------------------------------ golden file


@pytest.mark.parametrize("case", AGREEMENTS.values(), ids=AGREEMENTS)
def test_an_agreement_gives_the_golden_keys(case: dict[str, Any]) -> None:
    raw = {name: bytes.fromhex(text) for name, text in case.items() if isinstance(text, str) and name not in (
        "name", "static", "shared")}  # fmt: skip
    shared = SharedKey(case["shared"], raw["psk"]) if case["shared"] else None
    static = StaticKey(case["static"], private(raw["static_private"]))
    assert static.public == raw["static_public"]
    offer = Offer(static.seal_key(shared), case["key_id"], private(raw["client_private"]))
    assert offer.rekey == Rekey(case["key_id"], raw["client_public"], case["static"], case["shared"])
    server = SealKeys([static], [shared] if shared else [])
    keys, agreed = server.answer(offer.rekey, private(raw["server_private"]))
    assert keys == Keys(case["key_id"], raw["server_public"], raw["proof"])
    wanted = (raw["up_key"], raw["up_prefix"]), (raw["down_key"], raw["down_prefix"])
    assert agreed._take() == wanted
    assert offer.accept(keys)._take() == wanted


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_stream_writes_and_reads_the_golden_frames(direction: str) -> None:
    def halves(name: str, client: bool) -> Any:
        case = AGREEMENTS[name]
        static = StaticKey(case["static"], private(bytes.fromhex(case["static_private"])))
        offer = Offer(static.seal_key(), case["key_id"], private(bytes.fromhex(case["client_private"])))
        keys, agreed = SealKeys([static]).answer(offer.rekey, private(bytes.fromhex(case["server_private"])))
        return offer.accept(keys).client() if client else agreed.server()

    writer = SealedStream(1, *halves("plain", direction == "up"), client=direction == "up")
    reader = SealedStream(1, *halves("plain", direction == "down"), client=direction == "down")
    name = "plain"
    for case in GOLDEN["frames"]:
        if case["direction"] != direction:
            continue
        if case["agreement"] != name:
            name = case["agreement"]
            writer.renew(AGREEMENTS[name]["key_id"], *halves(name, direction == "up"))
            reader.renew(AGREEMENTS[name]["key_id"], *halves(name, direction == "down"))
        assert writer.seal(bytes.fromhex(case["packet"])).hex() == case["hex"]
        assert reader.open(bytes.fromhex(case["hex"])).hex() == case["packet"]
    assert name == "rekeyed"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, (1 << 32) - 1), st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32),
    st.binary(min_size=32, max_size=32), st.one_of(st.just(b""), st.binary(min_size=32, max_size=32)),
)  # fmt: skip
def test_both_ends_derive_what_the_slow_twin_derives(
    key_id: int, static_raw: bytes, client_raw: bytes, server_raw: bytes, psk: bytes
) -> None:
    shared = SharedKey("psk", psk) if psk else None
    static = StaticKey("k", private(static_raw))
    offer = Offer(static.seal_key(shared), key_id, private(client_raw))
    keys, agreed = SealKeys([static], [shared] if shared else []).answer(offer.rekey, private(server_raw))
    wanted = slow.client_secrets(
        key_id, "k", "psk" if psk else "", static.public, client_raw, keys.ephemeral, psk
    )
    assert keys.proof == wanted.proof
    taken = (wanted.up_key, wanted.up_prefix), (wanted.down_key, wanted.down_prefix)
    assert agreed._take() == taken == offer.accept(keys)._take()


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("point", GOLDEN["low_order"])
def test_a_public_key_of_low_order_is_refused_by_both_ends(point: str) -> None:
    low = bytes.fromhex(point)
    refused(KEYS.answer, Rekey(1, low, "k1"))
    offer = Offer(STATIC.seal_key(), 1)
    keys, _ = KEYS.answer(offer.rekey)
    refused(offer.accept, Keys(1, low, keys.proof))
    refused(Offer(SealKey("k1", low), 1).accept, keys)
    # Also with the bit that X25519 ignores.
    refused(KEYS.answer, Rekey(1, low[:31] + bytes([low[31] | 0x80]), "k1"))


@pytest.mark.parametrize(
    ("static", "shared"), [("k3", ""), ("", ""), ("K1", ""), ("k1", "other"), ("k1", "k1"), ("k1", "Factory")]
)
def test_a_name_that_the_server_does_not_hold_is_refused(static: str, shared: str) -> None:
    refused(KEYS.answer, Rekey(1, Offer(STATIC.seal_key(), 1).rekey.ephemeral, static, shared))


def test_an_answer_of_somebody_else_is_refused() -> None:
    """Whoever does not hold the static key can make an ephemeral, and no proof."""
    imposter = SealKeys([StaticKey.generate("k1")], [SHARED])
    for shared in (None, SHARED):
        offer = Offer(STATIC.seal_key(shared), 1)
        refused(offer.accept, imposter.answer(offer.rekey)[0])


def test_another_pre_shared_key_is_refused() -> None:
    offer = Offer(STATIC.seal_key(SharedKey("factory", bytes(32))), 1)
    refused(offer.accept, KEYS.answer(offer.rekey)[0])


def test_each_touched_part_of_the_exchange_is_refused() -> None:
    offer = Offer(STATIC.seal_key(SHARED), 7)
    rekey = offer.rekey
    other = bytes([rekey.ephemeral[0] ^ 1]) + rekey.ephemeral[1:]
    for touched in (
        Rekey(8, rekey.ephemeral, "k1", "factory"), Rekey(7, other, "k1", "factory"),
        Rekey(7, rekey.ephemeral, "k2", "factory"), Rekey(7, rekey.ephemeral, "k1", ""),
    ):  # fmt: skip
        keys, _ = KEYS.answer(touched)
        refused(offer.accept, Keys(7, keys.ephemeral, keys.proof))
    keys, _ = KEYS.answer(rekey)
    for bad in (
        Keys(8, keys.ephemeral, keys.proof), Keys(7, keys.ephemeral, b""), Keys(7, b"", keys.proof),
        Keys(7, keys.ephemeral[:31], keys.proof), Keys(7, keys.ephemeral, keys.proof[:15]),
        Keys(7, keys.ephemeral, bytes(16)), Keys(7, rekey.ephemeral, keys.proof),
    ):  # fmt: skip
        refused(offer.accept, bad)
    offer.accept(keys)


def test_every_agreement_has_keys_of_its_own() -> None:
    seen = set()
    for _ in range(50):
        offer = Offer(STATIC.seal_key(), 1)
        keys, agreed = KEYS.answer(offer.rekey)
        assert agreed.proof == keys.proof
        up, down = agreed._take()
        seen |= {up[0], down[0]}
    assert len(seen) == 100


def test_the_keys_of_an_agreement_are_taken_once() -> None:
    offer = Offer(STATIC.seal_key(), 1)
    keys, agreed = KEYS.answer(offer.rekey)
    agreed.server()
    for again in (agreed.server, agreed.client):
        with pytest.raises(UsageError, match="were taken"):
            again()
    offer.accept(keys).client()


# -------------------------------------------------------------------------------------------------- keys


def test_a_key_of_a_directory_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    made = StaticKey.of_directory("dev", tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    again = StaticKey.of_directory("dev", tmp_path)
    assert again.public == made.public
    assert StaticKey.from_file("other", path).public == made.public


def test_what_a_server_prints_is_what_a_client_reads() -> None:
    text = str(STATIC.seal_key())
    assert text == f"k1:{STATIC.public.hex()}"
    found = SealKey.from_text(f" {text}\n", SHARED)
    assert (found.name, found.public, found.shared) == ("k1", STATIC.public, SHARED)
    for bad in ("", "k1", f"k1{STATIC.public.hex()}", text[:-1], f"{text}0", f"k 1:{STATIC.public.hex()}"):
        with pytest.raises(UsageError):
            SealKey.from_text(bad)


def test_a_pre_shared_key_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "psk"
    path.write_text(f"{'ab' * 32}\n")
    assert SharedKey.from_file("p", path).secret == b"\xab" * 32
    for text in ("", "ab" * 31, "secret" * 10, "ab" * 33):
        path.write_text(text)
        with pytest.raises(UsageError, match="64 hex digits") as error:
            SharedKey.from_file("p", path)
        assert not text or text not in str(error.value)


def test_a_file_that_holds_no_x25519_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    with pytest.raises(UsageError, match="No such file"):
        StaticKey.from_file("k", path)
    path.write_text("nothing of the kind")
    with pytest.raises(UsageError, match="not an unencrypted PEM"):
        StaticKey.from_file("k", path)
    path.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    with pytest.raises(UsageError, match="needs X25519"):
        StaticKey.from_file("k", path)


@pytest.mark.parametrize("name", ["", "a b", "a:b", "x" * 65, "ключ", "k\n"])
def test_a_name_is_of_the_ids_alphabet(name: str) -> None:
    for make in (
        lambda: SharedKey(name, bytes(32)),
        lambda: SealKey(name, bytes(32)),
        lambda: StaticKey.generate(name),
    ):
        with pytest.raises(UsageError, match="must be 1-64"):
            make()


def test_sizes_doubles_and_an_empty_ring_are_the_callers_fault() -> None:
    for size in (0, 31, 33):
        with pytest.raises(UsageError, match="must be 32"):
            SealKey("k", bytes(size))
        with pytest.raises(UsageError, match="must be 32"):
            SharedKey("k", bytes(size))
    with pytest.raises(UsageError, match="two keys are named"):
        SealKeys([STATIC, STATIC])
    with pytest.raises(UsageError, match="two keys are named"):
        SealKeys([STATIC], [SHARED, SHARED])
    with pytest.raises(UsageError, match="no static key"):
        SealKeys([])


def test_no_secret_is_shown() -> None:
    offer = Offer(STATIC.seal_key(SHARED), 1)
    keys, agreed = KEYS.answer(offer.rekey)
    shown = " ".join(
        map(repr, (STATIC, SHARED, KEYS, offer, agreed, STATIC.seal_key(SHARED), offer.rekey, keys))
    )
    up, down = agreed._take()
    secrets = (SHARED.secret, STATIC.private.private_bytes_raw(), up[0], down[0])
    for secret in secrets:
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown


def test_what_is_agreed_is_freed() -> None:
    """Nothing keeps keys but the connection that uses them."""
    gc.collect()
    before = sum(isinstance(thing, sealing.Agreed) for thing in gc.get_objects())
    for _ in range(5):
        KEYS.answer(Offer(STATIC.seal_key(), 1).rekey)
    gc.collect()
    assert sum(isinstance(thing, sealing.Agreed) for thing in gc.get_objects()) == before
