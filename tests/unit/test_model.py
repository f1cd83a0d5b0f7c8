"""The words: ids, conversations, msg_id, kinds, deadlines, held to tests/vectors/words.json."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastim import model
from fastim.errors import PeerError
from fastim.model import DEFAULT_KINDS, Fate, Flag, Kind, KindRule, Message
from fastim.store.base import SHARDS, ObligationState, shard_of
from tests.vectors.notation import expand, load

WORDS = load("words")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.@-"
IDS = st.text(ALPHABET, min_size=1, max_size=64)
TOP = model.MAX_SAFE_INT

# --------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("case", WORDS["ids"], ids=lambda case: repr(case["value"])[:24])
def test_an_id_is_1_to_64_characters_of_a_small_alphabet(case: dict[str, Any]) -> None:
    value = expand(case["value"])
    if case["ok"]:
        assert model.check_id("user", value) == value
        return
    with pytest.raises(PeerError) as refused:
        model.check_id("user", value)
    assert refused.value.code == "bad_id"
    assert "1-64 characters of A-Za-z0-9_.@-" in refused.value.detail
    assert repr(str(value)[:80]) in refused.value.detail


@given(st.text(max_size=70))
@example("a" * 64 + "\n")
def test_check_id_accepts_exactly_the_alphabet(text: str) -> None:
    try:
        accepted = model.check_id("user", text) == text
    except PeerError:
        accepted = False
    assert accepted == (1 <= len(text) <= 64 and set(text) <= set(ALPHABET))


def test_a_refusal_never_repeats_a_long_value() -> None:
    with pytest.raises(PeerError) as refused:
        model.check_id("user", "x" * 10_000)
    assert len(refused.value.detail) < 200
    with pytest.raises(PeerError) as refused:
        model.parse_conv("g:" + "x" * 10_000)
    assert len(refused.value.detail) < 400


# ------------------------------------------------------------------------------------------ conversations


@pytest.mark.parametrize("case", WORDS["convs"], ids=lambda case: case["conv"][:24])
def test_a_canonical_conversation_parses(case: dict[str, Any]) -> None:
    conv = model.parse_conv(case["conv"])
    assert (conv.name, conv.type, conv.ident) == (case["conv"], case["type"], case["ident"])
    assert conv.members == (None if case["members"] is None else tuple(case["members"]))
    assert conv.is_stored == (case["type"] != "r")


@pytest.mark.parametrize("case", WORDS["bad_convs"], ids=lambda case: repr(case["conv"])[:24])
def test_any_other_form_of_a_conversation_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(PeerError) as refused:
        model.parse_conv(expand(case["conv"]))
    assert refused.value.code == case["code"]
    assert "p:<a>:<b> with a < b" in refused.value.detail


@pytest.mark.parametrize("case", WORDS["pairs"], ids=lambda case: f"{case['user']}+{case['other']}")
def test_two_users_have_one_conversation(case: dict[str, Any]) -> None:
    assert model.pair_conv(case["user"], case["other"]) == case["conv"]


def test_nobody_has_a_conversation_with_himself() -> None:
    with pytest.raises(PeerError, match="bad_conv"):
        model.pair_conv("alice", "alice")


@given(IDS, IDS)
def test_a_pair_is_the_same_from_both_sides_and_its_own_parse(user: str, other: str) -> None:
    if user == other:
        return
    name = model.pair_conv(user, other)
    assert name == model.pair_conv(other, user)
    first, second = model.parse_conv(name).members or ("", "")
    assert {first, second} == {user, other}
    assert first.encode() < second.encode()
    with pytest.raises(PeerError):
        model.parse_conv(f"p:{second}:{first}")


@given(st.text(max_size=140))
def test_what_parses_is_its_own_name(text: str) -> None:
    try:
        conv = model.parse_conv(text)
    except PeerError:
        return
    assert conv.name == text == f"{conv.type}:{conv.ident}"


def test_the_longest_conversation_name_is_131_characters() -> None:
    assert len(model.parse_conv(f"p:{'a' * 64}:{'b' * 64}").name) == 131


# ----------------------------------------------------------------------------------------- msg_id, shards


@pytest.mark.parametrize("case", WORDS["msg_ids"], ids=lambda case: str(case["msg_id"]))
def test_a_msg_id_is_41_bits_of_time_6_of_shard_6_of_counter(case: dict[str, Any]) -> None:
    msg_id = case["msg_id"]
    assert msg_id & ((1 << model.MSG_ID_COUNTER_BITS) - 1) == case["counter"]
    assert (msg_id >> model.MSG_ID_COUNTER_BITS) & ((1 << model.MSG_ID_SHARD_BITS) - 1) == case["shard"]
    low_bits = model.MSG_ID_COUNTER_BITS + model.MSG_ID_SHARD_BITS
    assert (msg_id >> low_bits) + model.EPOCH_MS == case["ms"]
    assert msg_id <= TOP


@pytest.mark.parametrize("case", WORDS["shards"], ids=lambda case: case["conv"][:24])
def test_a_conversation_lives_on_its_shard_for_ever(case: dict[str, Any]) -> None:
    """Store.S9: a changed value would lose every conversation stored before."""
    assert shard_of(case["conv"]) == case["shard"]


@given(IDS)
def test_every_shard_is_below_64(ident: str) -> None:
    assert 0 <= shard_of(f"g:{ident}") < SHARDS == 64


# ------------------------------------------------------------------------------------------------ client_id


def test_a_client_id_is_16_bytes_and_its_text_32_hex_digits() -> None:
    raw = bytes(range(16))
    assert model.check_client_id(raw) == raw
    assert model.client_id_text(raw) == "000102030405060708090a0b0c0d0e0f"


@pytest.mark.parametrize(
    ("value", "said"), [(b"", "0 bytes"), (b"x" * 15, "15 bytes"), (b"x" * 17, "17 bytes"), ("x" * 16, "str")]
)
def test_another_client_id_is_refused(value: object, said: str) -> None:
    with pytest.raises(PeerError, match=said) as refused:
        model.check_client_id(value)
    assert refused.value.code == "bad_client_id"


# --------------------------------------------------------------------------------------------- deadlines


@pytest.mark.parametrize("case", WORDS["deadlines"], ids=lambda c: f"{c['loss_time_ms']}@{c['now_ms']}")
def test_a_deadline_expires_strictly_after_itself_and_0_never(case: dict[str, Any]) -> None:
    assert model.is_expired(case["loss_time_ms"], case["now_ms"]) is case["expired"]


@given(st.integers(0, TOP), st.integers(-TOP, TOP))
@example(0, TOP)
@example(TOP, TOP)
def test_expiry_is_what_the_rule_says(loss_time_ms: int, now_ms: int) -> None:
    assert model.is_expired(loss_time_ms, now_ms) == (loss_time_ms != 0 and now_ms > loss_time_ms)
    assert message(loss_time_ms).expired(now_ms) == model.is_expired(loss_time_ms, now_ms)
    assert not model.is_expired(0, now_ms)
    assert not model.is_expired(now_ms, now_ms)


@given(st.integers(1, TOP), st.integers(0, TOP), st.integers(0, TOP))
def test_what_has_expired_stays_expired(loss_time_ms: int, now_ms: int, more_ms: int) -> None:
    if model.is_expired(loss_time_ms, now_ms):
        assert model.is_expired(loss_time_ms, now_ms + more_ms)


def message(loss_time_ms: int) -> Message:
    return Message("p:a:b", 1, 1, 1, 1, "a", bytes(16), Kind.TEXT, 0, 0, loss_time_ms, b"")


# ------------------------------------------------------------------------------------------- kinds, fates


def test_the_eight_kinds_exist_and_control_events_are_not_among_them() -> None:
    assert set(DEFAULT_KINDS) == set(range(1, 9))
    assert [DEFAULT_KINDS[kind].name for kind in sorted(DEFAULT_KINDS)] == [
        "text", "image", "voice", "video", "file", "location", "card", "custom",
    ]  # fmt: skip
    assert all(kind >= 32 for kind in (Kind.MEMBER, Kind.RECALL, Kind.EDIT, Kind.DELETE))
    for kind, rule in DEFAULT_KINDS.items():
        assert (rule.kind, rule.ttl_ms, rule.countable, rule.push) == (kind, 0, True, True)
        assert rule.max_body_bytes <= model.MAX_BODY_BYTES


def test_a_kind_rule_takes_no_unknown_field() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"kind": 9, "name": "x", "colour": "red"}, KindRule)


def test_fates_are_states_of_an_obligation_under_the_same_number() -> None:
    for fate in Fate:
        assert ObligationState[fate.name] == fate


# ------------------------------------------------------------------------------------------------ preview


@pytest.mark.parametrize(
    ("kind", "flags", "body", "shown"),
    [
        (Kind.TEXT, 0, "你好  bob\n how\tare you".encode(), "你好 bob how are you"),
        (Kind.TEXT, 0, b"x" * 200, "x" * 20),
        (Kind.TEXT, 0, "漢".encode() * 200, "漢" * 20),
        (Kind.TEXT, 0, b"", "[message]"),
        (Kind.TEXT, 0, b"\xff\xfe", "[message]"),
        (Kind.TEXT, Flag.SEALED, b"secret", "[message]"),
        (Kind.IMAGE, 0, b"\x80", "[image]"),
        (Kind.IMAGE, Flag.SEALED, b"secret", "[message]"),
        (Kind.CUSTOM, 0, b"whatever", "[message]"),
        (Kind.MEMBER, 0, b"whatever", "[message]"),
        (999, 0, b"whatever", "[message]"),
    ],
)
def test_a_preview_shows_text_words_for_other_kinds_and_never_what_is_sealed(
    kind: int, flags: int, body: bytes, shown: str
) -> None:
    assert model.preview(kind, flags, body, DEFAULT_KINDS, 20) == shown


def test_a_preview_of_no_characters_shows_no_text() -> None:
    assert model.preview(Kind.TEXT, 0, b"secret", DEFAULT_KINDS, 0) == "[message]"
