"""The wire against the golden vectors: both halves of the codec, with plain msgpack as a third reader.

The vectors are data (tests/vectors/README.md); nothing here writes them.
"""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastim import protocol
from fastim._core import frame as core
from fastim.errors import PeerError
from fastim.model import MAX_BODY_BYTES, Flag, Kind, Message, SkipReason
from fastim.protocol import CloseCode, Frame, Op
from tests.vectors.notation import expand, load, unhex

FRAMES = load("frames")["frames"]
PACKETS = load("packets")
NUMBERS = load("numbers")

TYPES = {kind.__name__: kind for kind in protocol._FRAME_TYPES.values()}


def named(cases: list[dict[str, Any]], key: str = "name") -> Any:
    return pytest.mark.parametrize("case", cases, ids=[str(case[key]) for case in cases])


def fields(value: Any) -> Any:
    """A decoded frame as the vectors write it: fields by name, all the way down."""
    if isinstance(value, msgspec.Struct):
        return {name: fields(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list | tuple):
        return [fields(inner) for inner in value]
    return value


# ------------------------------------------------------------------------------------------------ frames


@named(FRAMES)
def test_a_golden_frame_decodes_to_its_fields(case: dict[str, Any]) -> None:
    data = unhex(case["hex"])
    assert core.split(data) == [(case["op"], 0, len(data))]
    found = protocol.decode(case["op"], data)
    assert type(found) is TYPES[case["type"]]
    assert fields(found) == expand(case["decoded"])


@named(FRAMES)
def test_plain_msgpack_reads_the_same_values(case: dict[str, Any]) -> None:
    read = msgpack.unpackb(unhex(case["hex"]), raw=False, strict_map_key=True)
    assert read == [case["op"], *expand(case["values"])]


def built(kind: type, values: Any) -> Any:
    """The reverse of fields(): a Struct from values by name."""
    if isinstance(values, dict):
        types = {field.name: field.type for field in msgspec.structs.fields(kind)}
        return kind(**{name: built(types[name], inner) for name, inner in values.items()})
    if isinstance(values, list):
        inner_type = msgspec.inspect.type_info(kind)
        item = getattr(getattr(inner_type, "item_type", None), "cls", object)
        if isinstance(values and values[0], dict):
            return [built(item, inner) for inner in values]
    return values


@named([case for case in FRAMES if case["canonical"]])
def test_the_encoder_writes_the_golden_bytes(case: dict[str, Any]) -> None:
    found = built(TYPES[case["type"]], expand(case["decoded"]))
    if not isinstance(found, protocol.Msg):
        assert protocol.encode(found) == unhex(case["hex"])
        return
    message = Message(
        found.conv, found.seq, found.msg_id, found.cseq, found.epoch, found.sender, found.client_id,
        found.kind, found.flags, found.ts_ms, found.loss_time_ms, found.body, tuple(found.mentions),
    )  # fmt: skip
    tail = protocol.encode_msg_tail(message)
    assert protocol.encode_msg(found.tag, found.dup, tail) == unhex(case["hex"])
    assert core.build_msg(found.tag, found.dup, tail) == unhex(case["hex"])


@named([case for case in FRAMES if case["type"] == "Ack"])
def test_the_core_reads_the_same_tag(case: dict[str, Any]) -> None:
    assert core.parse_ack(unhex(case["hex"])) == case["decoded"]["tag"]


def test_every_op_has_a_layout_and_a_golden_frame_with_nothing_left_to_defaults() -> None:
    assert set(protocol._FRAME_TYPES) == set(Op)
    full = {case["op"] for case in FRAMES if case["canonical"]}
    assert full == set(Op)
    for case in FRAMES:
        assert TYPES[case["type"]].__struct_config__.tag == case["op"]


def test_a_layout_only_ever_grows_defaults_at_its_end() -> None:
    """So a short array of an older peer is always readable: every default is behind every required field."""
    for kind in TYPES.values():
        required = [field.required for field in msgspec.structs.fields(kind)]
        assert required == sorted(required, reverse=True), kind


@named([case for case in FRAMES if not case["name"].endswith("trailing")])
def test_elements_of_a_later_version_are_ignored(case: dict[str, Any]) -> None:
    longer = msgpack.packb([case["op"], *fields_in_order(case), {"later": [1]}, None])
    assert fields(protocol.decode(case["op"], longer)) == expand(case["decoded"])


def fields_in_order(case: dict[str, Any]) -> list[Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return [plain(inner) for inner in value.values()]
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    return [plain(value) for value in expand(case["decoded"]).values()]


def test_the_largest_message_fits_a_packet() -> None:
    (case,) = (case for case in FRAMES if case["name"] == "msg-dup-limits")
    assert len(expand(case["decoded"])["body"]) == MAX_BODY_BYTES
    assert len(unhex(case["hex"])) <= protocol.MAX_PACKET_BYTES


# ------------------------------------------------------------------------------------------------ packets


@named(PACKETS["good"])
def test_a_packet_splits_into_its_frames(case: dict[str, Any]) -> None:
    assert [list(span) for span in core.split(unhex(case["hex"]))] == case["frames"]


@named(PACKETS["bad_packets"])
def test_a_malformed_packet_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(PeerError) as refused:
        core.split(unhex(case["hex"]))
    assert refused.value.code == case["code"]


@named(PACKETS["bad_frames"])
def test_a_malformed_frame_is_refused_with_its_op(case: dict[str, Any]) -> None:
    data = unhex(case["hex"])
    if case.get("level") == "packet":
        with pytest.raises(PeerError, match=case["code"]):
            core.split(data)
    else:
        assert core.split(data) == [(case["op"], 0, len(data))]
    with pytest.raises(PeerError) as refused:
        protocol.decode(case["op"], data)
    assert refused.value.code == case["code"]
    assert f"op {case['op']}" in refused.value.detail


@named([case for case in PACKETS["bad_frames"] if case["op"] == Op.ACK])
def test_the_core_refuses_the_same_acks(case: dict[str, Any]) -> None:
    with pytest.raises(PeerError, match="bad_frame"):
        core.parse_ack(unhex(case["hex"]))


def test_an_op_that_is_not_the_frames_own_is_refused() -> None:
    with pytest.raises(PeerError, match="bad_frame"):
        protocol.decode(Op.JOIN, protocol.encode(protocol.Leave(1, "lobby")))


@given(st.sampled_from(sorted(Op)), st.binary(max_size=80), st.booleans())
@example(Op.READ, b"\xa1\xff\x01", True)
@settings(max_examples=3_000, deadline=None)
def test_no_bytes_raise_anything_but_a_peer_error(op: Op, data: bytes, with_head: bool) -> None:
    """Anything else would be taken for our own bug and end the process."""
    whole = bytes([0x90 + 1 + len(data) % 14, op]) + data if with_head else data
    try:
        assert isinstance(protocol.decode(op, whole), Frame)
    except PeerError as error:
        assert error.code == "bad_frame"  # noqa: PT017


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.sampled_from(sorted(Op)), st.lists(JUNK, max_size=16))
@settings(max_examples=2_000, deadline=None)
def test_no_values_raise_anything_but_a_peer_error(op: Op, values: list[Any]) -> None:
    try:
        protocol.decode(op, msgpack.packb([op, *values]))
    except PeerError as error:
        assert error.code == "bad_frame"  # noqa: PT017


# ------------------------------------------------------------------------------------------------ numbers


def test_the_ops_are_what_is_written_down() -> None:
    assert [(case["op"], case["name"]) for case in NUMBERS["ops"]] == [(int(op), op.name) for op in Op]
    for case in NUMBERS["ops"]:
        assert (case["to"] == "server") == (case["op"] < 32)
        if case["to"] == "server":
            assert case["reserved"] == (case["op"] in protocol.RESERVED), case["name"]
        assert case["op"] <= core.MAX_OP


def test_the_unions_of_both_directions_are_complete() -> None:
    up = {kind.__struct_config__.tag for kind in protocol.ClientFrame.__args__}
    down = {kind.__struct_config__.tag for kind in protocol.ServerFrame.__args__}
    assert up == {op for op in Op if op < 32}
    assert down == {op for op in Op if op >= 32}


@named(NUMBERS["close_codes"], "code")
def test_a_close_code_says_whether_to_connect_again(case: dict[str, Any]) -> None:
    assert protocol.reconnects(case["code"]) is case["reconnect"]
    if case["name"]:
        assert CloseCode[case["name"]] == case["code"]


def test_every_number_on_the_wire_is_written_down() -> None:
    assert {case["code"] for case in NUMBERS["close_codes"]} >= set(CloseCode)
    assert {(case["kind"], case["name"]) for case in NUMBERS["kinds"]} == {(int(k), k.name) for k in Kind}
    assert {(case["flag"], case["name"]) for case in NUMBERS["flags"]} == {(int(f), f.name) for f in Flag}
    reasons = {(case["reason"], case["name"]) for case in NUMBERS["skip_reasons"]}
    assert reasons == {(int(reason), reason.name) for reason in SkipReason}
