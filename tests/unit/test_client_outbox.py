"""fastim.client.outbox: what is sent next, and what answers mean for what waits behind."""

from __future__ import annotations

import random

from fastim.client.outbox import RESEND_LEAST_MS, RESEND_MS, Outbox, Unsent
from fastim.protocol import MAX_PACKET_BYTES, MAX_SEND_BATCH, Error, Op, Send, encode

CONV = "p:alice:bob"


def unsent(n: int, conv: str = CONV, body: bytes = b"hi", read_seq: int = 0) -> Unsent:
    return Unsent(n, n.to_bytes(16, "big"), conv, 1, body, 0, 0, (), read_seq, 0)


def outbox(*entries: Unsent) -> Outbox:
    box = Outbox(random.Random(1), MAX_PACKET_BYTES)
    for entry in entries:
        box.add(entry)
    return box


def numbers(send: Send) -> list[int]:
    return [int.from_bytes(item.client_id, "big") for item in send.items]


def error(n: int | None, *, retryable: bool, retry_after_ms: int = 0, conv: str = CONV) -> Error:
    client_id = b"" if n is None else n.to_bytes(16, "big")
    return Error(int(Op.SEND), "code", "detail", retryable, retry_after_ms, client_id, 0, conv)


def test_one_send_per_conversation_is_under_way_and_others_do_not_wait_for_it() -> None:
    box = outbox(unsent(1), unsent(2, "g:team"))
    assert [(send.conv, numbers(send)) for send in box.due(0)] == [(CONV, [1]), ("g:team", [2])]
    box.add(unsent(3))
    assert box.due(1) == []
    box.remove(unsent(1).client_id)
    assert [numbers(send) for send in box.due(2)] == [[3]]


def test_a_send_holds_at_most_32_messages_in_order() -> None:
    box = outbox(*(unsent(n) for n in range(1, 50)))
    (send,) = box.due(0)
    assert numbers(send) == list(range(1, MAX_SEND_BATCH + 1))


def test_a_send_never_exceeds_a_frame() -> None:
    box = outbox(*(unsent(n, body=bytes(30_000)) for n in range(1, 6)), unsent(6, body=bytes(61_440)))
    sizes = []
    while len(box):
        (send,) = box.due(0)
        sizes.append(len(send.items))
        assert len(encode(send)) <= MAX_PACKET_BYTES
        for item in send.items:
            box.remove(item.client_id)
    assert sizes == [2, 2, 1, 1]


def test_silence_repeats_the_same_ids_after_growing_waits_with_full_jitter() -> None:
    box = outbox(unsent(1), unsent(2))
    now = 0
    for longest in (*RESEND_MS, RESEND_MS[-1]):
        (send,) = box.due(now)
        assert numbers(send) == [1, 2]
        due = box.next_due_ms()
        assert due is not None
        assert RESEND_LEAST_MS <= due - now <= longest
        assert box.due(due - 1) == []
        box.add(unsent(now + 100))  # what is written meanwhile waits for its turn
        now = due


def test_waits_are_spread_over_the_whole_range() -> None:
    waits = []
    for seed in range(200):
        box = Outbox(random.Random(seed), MAX_PACKET_BYTES)
        box.add(unsent(1))
        box.due(0)
        waits.append(box.next_due_ms() or 0)
    assert min(waits) < 400
    assert max(waits) > 1_800


def test_a_new_connection_repeats_what_was_under_way_at_once() -> None:
    box = outbox(unsent(1))
    box.due(0)
    box.connected(10)
    assert [numbers(send) for send in box.due(10)] == [[1]]


def test_what_was_accepted_is_not_in_the_repeat() -> None:
    box = outbox(unsent(1), unsent(2), unsent(3))
    box.due(0)
    box.remove(unsent(1).client_id)
    box.connected(10)
    assert [numbers(send) for send in box.due(10)] == [[2, 3]]


def test_a_final_refusal_leaves_the_outbox_and_what_was_not_reached_is_sent_again() -> None:
    box = outbox(unsent(1), unsent(2), unsent(3))
    box.due(0)
    box.remove(unsent(1).client_id)
    (refused,) = box.refused(error(2, retryable=False), 10)
    assert (refused.n, refused.refused, refused.detail) == (2, "code", "detail")
    assert box.refused(error(3, retryable=True), 10) == []
    due = box.next_due_ms()
    assert due is not None
    assert [numbers(send) for send in box.due(due)] == [[3]]


def test_a_retryable_refusal_waits_at_least_as_long_as_the_server_says() -> None:
    box = outbox(unsent(1))
    box.due(0)
    assert box.refused(error(1, retryable=True, retry_after_ms=7_000), 100) == []
    due = box.next_due_ms()
    assert due is not None
    assert due >= 7_100


def test_a_refusal_of_a_whole_frame_is_narrowed_down_to_the_message() -> None:
    box = outbox(unsent(1), unsent(2), unsent(3))
    box.due(0)
    assert box.refused(error(None, retryable=False), 10) == []
    assert [numbers(send) for send in box.due(10)] == [[1]]
    box.remove(unsent(1).client_id)
    assert [numbers(send) for send in box.due(11)] == [[2]]
    assert [entry.n for entry in box.refused(error(None, retryable=False), 12)] == [2]
    assert [numbers(send) for send in box.due(13)] == [[3]]


def test_a_refusal_of_a_message_that_is_not_here_changes_nothing() -> None:
    box = outbox(unsent(1))
    box.due(0)
    assert box.refused(error(9, retryable=False), 10) == []
    assert len(box) == 1


def test_read_seq_of_a_batch_is_the_highest() -> None:
    box = outbox(unsent(1, read_seq=4), unsent(2, read_seq=9), unsent(3))
    (send,) = box.due(0)
    assert send.read_seq == 9


def test_an_empty_outbox_has_nothing_to_wait_for() -> None:
    box = outbox(unsent(1))
    assert box.next_due_ms() == 0
    box.remove(unsent(1).client_id)
    assert box.next_due_ms() is None
    assert box.entries() == []
