"""route(): every obligation of a batch gets exactly one next step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastim.bus.records import Deliver, Submit, decode_inbox
from fastim.dispatch.limits import DispatchLimits
from fastim.dispatch.router import Plan, Routable, route
from fastim.model import Message
from fastim.presence.base import Attachment, Location
from fastim.protocol import encode_msg_tail
from fastim.store.base import DueRequest

NOW = 1_790_000_000_000
LIMITS = DispatchLimits()


def at(user: str, *places: tuple[str, str], boot: int = 1) -> Location:
    """places: (node, session)"""
    return Location(
        tuple(
            Attachment(user, f"device-{session}", "app", node, boot, session, 1 + n, NOW)
            for n, (node, session) in enumerate(places)
        )
    )


def message(conv: str, seq: int, sender: str = "alice", loss_time_ms: int = 0) -> Message:
    return Message(conv, seq, 1_000 + seq, seq, 1, sender, bytes(16), 1, 0, NOW, loss_time_ms, b"hi")


def routable(
    members: str, *seqs: int, conv: str = "g:team", session: str = "sa", loss: int = 0, pushes: bool = True
) -> Routable:
    submit = Submit(conv, "alice", "phone", session, "inbox.n1.1", [])
    messages = [message(conv, seq, loss_time_ms=loss) for seq in seqs]
    return Routable(submit, tuple(members.split()), messages, pushes)


def delivers(plan: Plan) -> list[tuple[str, Deliver]]:
    found = []
    for out in plan.delivers:
        record = decode_inbox(out.value)
        assert isinstance(record, Deliver)
        found.append((out.topic, record))
    return found


def test_a_group_of_mixed_presence_gets_one_deliver_per_node() -> None:
    located = {
        "alice": at("alice", ("n1", "sa")),
        "bob": at("bob", ("n1", "sb")),
        "carol": at("carol", ("n1", "sc1"), ("n2", "sc2")),
        "dave": at("dave", ("n2", "sd")),
        "erin": Location((), NOW + 2_000),
    }
    plan = route([routable("alice bob carol dave erin frank", 7)], located, NOW, 0, LIMITS)
    assert [(topic, record.users) for topic, record in delivers(plan)] == [
        ("inbox.n1.1", ["bob", "carol"]),
        ("inbox.n2.1", ["carol", "dave"]),
    ]
    assert plan.due == {("erin", "g:team"): DueRequest("erin", "g:team", 7, NOW + 2_000)}
    assert plan.parks == {("frank", "g:team"): (7, 7, True)}
    assert plan.obligations == 5


def test_a_deliver_carries_the_tail_that_every_recipient_shares() -> None:
    plan = route([routable("alice bob", 7)], {"bob": at("bob", ("n1", "sb"))}, NOW, 0, LIMITS)
    ((_, record),) = delivers(plan)
    assert record.tail == encode_msg_tail(message("g:team", 7))
    assert (record.conv, record.seq, record.msg_id, record.sender) == ("g:team", 7, 1_007, "alice")
    assert record.skip_session == "sa"


def test_the_sender_alone_with_one_session_costs_no_record() -> None:
    plan = route([routable("alice", 7)], {"alice": at("alice", ("n1", "sa"))}, NOW, 0, LIMITS)
    assert (plan.delivers, plan.parks, plan.due, plan.obligations) == ([], {}, {}, 0)


def test_the_senders_other_devices_get_the_message_without_an_obligation() -> None:
    located = {"alice": at("alice", ("n1", "sa"), ("n2", "sa2"))}
    plan = route([routable("alice", 7)], located, NOW, 0, LIMITS)
    assert [(topic, r.users, r.skip_session) for topic, r in delivers(plan)] == [
        ("inbox.n2.1", ["alice"], "sa")
    ]
    assert plan.obligations == 0


def test_a_sender_who_is_nowhere_is_neither_parked_nor_due() -> None:
    plan = route([routable("alice bob", 7)], {"bob": at("bob", ("n1", "sb"))}, NOW, 0, LIMITS)
    assert (plan.parks, plan.due) == ({}, {})


def test_parks_of_a_batch_are_one_per_user_and_conversation() -> None:
    batch = [
        routable("alice bob", 7, pushes=False),
        routable("alice bob", 8, 9),
        routable("alice bob", 3, conv="p:alice:bob", pushes=False),
    ]
    plan = route(batch, {}, NOW, 0, LIMITS)
    assert plan.parks == {("bob", "g:team"): (7, 9, True), ("bob", "p:alice:bob"): (3, 3, False)}


def test_while_push_is_held_the_absent_get_a_due_row_at_its_end() -> None:
    plan = route([routable("alice bob", 7)], {}, NOW, NOW + 20_000, LIMITS)
    assert plan.parks == {}
    assert plan.due["bob", "g:team"].due_at_ms == NOW + 20_000


def test_presence_away_parks_nobody() -> None:
    plan = route([routable("alice bob carol", 7, 8)], None, NOW, 0, LIMITS)
    assert (plan.parks, plan.delivers) == ({}, [])
    assert plan.due == {
        (user, "g:team"): DueRequest(user, "g:team", 7, NOW + LIMITS.first_due_ms)
        for user in ("bob", "carol")
    }


def test_what_expired_meanwhile_is_not_delivered_but_accounted_for() -> None:
    plan = route([routable("alice bob", 7, loss=NOW - 1)], {"bob": at("bob", ("n1", "sb"))}, NOW, 0, LIMITS)
    assert plan.delivers == []
    assert plan.due == {("bob", "g:team"): DueRequest("bob", "g:team", 7, NOW, urgent=True)}
    assert plan.expired == 1


def test_a_service_conversation_has_one_member_and_no_sending_member() -> None:
    plan = route([routable("bob", 7, conv="s:bob")], {"bob": at("bob", ("n1", "sb"))}, NOW, 0, LIMITS)
    assert [record.users for _, record in delivers(plan)] == [["bob"]]
    assert plan.obligations == 1


PLACES = st.lists(st.tuples(st.sampled_from(["n1", "n2", "n3"]), st.integers(0, 3)), max_size=3)


@given(
    where=st.dictionaries(st.sampled_from("abcdef"), st.one_of(st.none(), PLACES), max_size=6),
    graced=st.sets(st.sampled_from("abcdef")),
    answered=st.booleans(),
)
def test_no_obligation_has_no_next_step_or_a_wrong_one(
    where: dict[str, list[tuple[str, int]] | None], graced: set[str], answered: bool
) -> None:
    located = {}
    for user, places in where.items():
        location = at(user, *((node, f"{user}{session}") for node, session in places or ()))
        until_ms = NOW + 4_000 if user in graced else 0
        located[user] = Location(location.attachments, until_ms)
    members = " ".join(sorted({"alice", *where}))
    plan = route([routable(members, 4, 5)], located if answered else None, NOW, 0, LIMITS)
    told: dict[str, set[int]] = {}
    for topic, record in delivers(plan):
        assert len(set(record.users)) == len(record.users)
        for user in record.users:
            assert topic in {f"inbox.{node}.1" for node, _ in where[user] or ()}
            told.setdefault(user, set()).add(record.seq)
    for user in where:
        steps = [told.get(user) == {4, 5}, (user, "g:team") in plan.parks, (user, "g:team") in plan.due]
        assert sum(steps) == 1
        if answered:
            assert steps[0] == bool(where[user])
