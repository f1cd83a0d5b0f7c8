"""The REST interface over real sockets: what may be asked, by whom, and what is answered."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest

from tests.leaks import MARK
from tests.system.rest_world import ALICE, BOB, MALLORY, ROOT, SHOP, problem, world

CONV = "p:alice:bob"
CLIENT_ID = "0192f3a4b5c67d8e9f00112233445566"
MESSAGE = {"conv": CONV, "sender": "alice", "body": MARK, "client_id": CLIENT_ID}

# ------------------------------------------------------------------------------------------------- sending


async def test_service_sends_for_anybody_and_gets_ids(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        answer = await here.send(MESSAGE)
        assert answer.status_code == 201
        found = answer.json()
        assert (found["seq"], found["client_id"], found["conv"]) == (1, CLIENT_ID, CONV)
        assert 0 < found["msg_id"] < 1 << 53
        stored = await here.store.find(msg_id=found["msg_id"])
        assert (stored.body, stored.sender, stored.client_id.hex()) == (MARK.encode(), "alice", CLIENT_ID)


async def test_client_sends_as_himself_to_a_user_who_is_known(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        problem(await here.send({"conv": CONV, "body": "hi"}, ALICE), 404, "unknown_user")
        await here.store.register_device("bob", "d0", "app", 1)
        assert (await here.send({"conv": CONV, "body": "hi"}, ALICE)).json()["seq"] == 1
        problem(await here.send({"conv": CONV, "body": "hi", "sender": "bob"}, ALICE), 403, "forbidden")
        problem(await here.send({"conv": "s:alice", "body": "hi"}, ALICE), 403, "forbidden")
        problem(await here.send({"conv": CONV, "body": "hi"}, MALLORY), 403, "forbidden")


async def test_service_writes_to_s_conversations(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        assert (await here.send({"conv": "s:bob", "sender": "shop", "body": "paid"})).json()["seq"] == 1


async def test_repeat_gets_the_first_answer_and_other_content_a_conflict(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        first = (await here.send(MESSAGE)).json()
        assert (await here.send(MESSAGE)).json() == first
        uuid = f"{CLIENT_ID[:8]}-{CLIENT_ID[8:12]}-{CLIENT_ID[12:16]}-{CLIENT_ID[16:20]}-{CLIENT_ID[20:]}"
        assert (await here.send(MESSAGE | {"client_id": uuid.upper()})).json() == first
        refused = problem(await here.send(MESSAGE | {"body": "other"}), 409, "conflict")
        assert refused["client_id"] == CLIENT_ID


async def test_missing_client_id_is_made_and_told(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        body = {key: value for key, value in MESSAGE.items() if key != "client_id"}
        first, second = (await here.send(body)).json(), (await here.send(body)).json()
        assert (first["seq"], second["seq"]) == (1, 2)
        assert len(first["client_id"]) == 32
        assert first["client_id"][12] == "7"


async def test_binary_body_kind_and_flags_are_stored_as_sent(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        raw = bytes(range(256))
        body = MESSAGE | {"body": None, "body_base64": base64.b64encode(raw).decode(), "kind": "card"}
        answer = await here.send(body | {"flags": 3, "mentions": ["bob"], "loss_time_ms": 1 << 52})
        stored = await here.store.find(msg_id=answer.json()["msg_id"])
        assert (stored.body, stored.kind, stored.flags) == (raw, 7, 3)
        assert (stored.mentions, stored.loss_time_ms) == (("bob",), 1 << 52)


async def test_expired_message_is_gone(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        problem(await here.send(MESSAGE | {"loss_time_ms": 1}), 410, "expired")


async def test_strangers_to_a_group_are_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        problem(await here.send({"conv": "g:none", "sender": "bob", "body": "x"}), 404, "unknown_group")
        await here.post("/v1/groups", {"group": "team", "owner": "alice", "members": ["bob"]}, SHOP)
        problem(await here.send({"conv": "g:team", "body": "x"}, MALLORY), 403, "not_member")
        assert (await here.send({"conv": "g:team", "body": "x"}, ALICE)).status_code == 201


@pytest.mark.parametrize(
    ("change", "status", "code", "words"),
    [
        ({"conv": "p:bob:alice"}, 400, "bad_conv", "a < b"),
        ({"conv": "r:lobby"}, 501, "unsupported", "rooms"),
        ({"conv": 5}, 400, "bad_request", "$.conv"),
        ({"sender": "a b"}, 400, "bad_id", "'a b'"),
        ({"sender": ""}, 400, "bad_request", "sender is missing"),
        ({"sender": "carol"}, 403, "not_member", "member"),
        ({"kind": "songs"}, 400, "unknown_kind", "'songs'"),
        ({"kind": 32}, 400, "unknown_kind", "'32'"),
        ({"client_id": "xyz"}, 400, "bad_client_id", "'xyz'"),
        ({"client_id": CLIENT_ID + "00"}, 400, "bad_client_id", "32 hexadecimal"),
        ({"loss_time_ms": -1}, 400, "bad_request", "$.loss_time_ms"),
        ({"loss_time_ms": 1 << 53}, 400, "bad_request", "9007199254740991"),
        ({"loss_time": 5}, 400, "bad_request", "loss_time"),
        ({"flags": 16}, 400, "bad_request", "<= 15"),
        ({"mentions": ["x"] * 51}, 400, "bad_request", "<= 50"),
        ({"mentions": ["x y"]}, 400, "bad_id", "'x y'"),
        ({"body": None}, 400, "bad_request", "one of body and body_base64"),
        ({"body_base64": "aGk="}, 400, "bad_request", "one of body and body_base64"),
        ({"body": None, "body_base64": "?"}, 400, "bad_request", "base64"),
        ({"body": "x" * 61_441}, 413, "too_big", "61,441 bytes; limit 61,440"),
    ],
)
async def test_bad_message_is_refused_with_value_and_limit(
    tmp_path: Path, change: dict[str, Any], status: int, code: str, words: str
) -> None:
    async with world(tmp_path) as here:
        found = problem(await here.send(MESSAGE | change), status, code)
        assert words in found["detail"]
        assert await here.store.head_msg_id() == 0


async def test_message_that_is_not_stored_in_time_is_retryable_under_its_key(tmp_path: Path) -> None:
    async with world(tmp_path, reply_timeout_ms=50, dispatching=False) as here:
        answer = await here.send({"conv": CONV, "sender": "alice", "body": "late"})
        found = problem(answer, 503, "unavailable")
        assert found["retryable"]
        assert answer.headers["retry-after"] == "1"
        await here.dispatch.start()
        repeated = {"conv": CONV, "sender": "alice", "body": "late", "client_id": found["client_id"]}
        for _ in range(100):
            answer = await here.send(repeated)
            if answer.status_code == 201:
                break
        assert answer.json()["seq"] == 1
        assert len(await here.store.scan(0, 10)) == 1


async def test_message_that_a_durable_bus_took_is_answered_with_where_its_trace_is(tmp_path: Path) -> None:
    async with world(tmp_path, reply_timeout_ms=50, dispatching=False, durable=True) as here:
        answer = await here.send({"conv": CONV, "sender": "alice", "body": "late"})
        assert answer.status_code == 202
        taken = answer.json()
        assert taken["conv"] == CONV
        assert (await here.get(taken["trace"], SHOP)).status_code == 404
        await here.dispatch.start()
        for _ in range(100):
            found = await here.get(taken["trace"], SHOP)
            if found.status_code == 200:
                break
            await asyncio.sleep(0.02)
        assert found.json()["message"]["client_id"] == taken["client_id"]
        repeated = {"conv": CONV, "sender": "alice", "body": "late", "client_id": taken["client_id"]}
        assert (await here.send(repeated)).json()["seq"] == 1


async def test_people_are_limited_and_services_are_not(tmp_path: Path) -> None:
    async with world(tmp_path, rate=(1, 2)) as here:
        await here.store.register_device("bob", "d0", "app", 1)
        codes = [(await here.send({"conv": CONV, "body": "x"}, ALICE)).status_code for _ in range(3)]
        assert codes == [201, 201, 429]
        answer = await here.send({"conv": CONV, "body": "x"}, ALICE)
        assert problem(answer, 429, "rate_limited")["retryable"]
        assert int(answer.headers["retry-after"]) >= 1
        for _ in range(5):
            assert (await here.send(MESSAGE)).status_code == 201


async def test_draining_server_takes_no_sends_and_says_so(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        here.status.draining = "restart"
        found = problem(await here.send(MESSAGE), 503, "draining")
        assert found["retryable"]
        assert found["client_id"] == CLIENT_ID


# ------------------------------------------------------------------------------------------------- reading


async def test_members_read_history_in_pages(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        for n in range(5):
            await here.sent(CONV, f"m{n}", "alice")
        path = f"/v1/conversations/{CONV}/messages"
        newest = (await here.get(path, BOB, params={"limit": 2})).json()
        assert [message["body"] for message in newest["messages"]] == ["m3", "m4"]
        assert newest["more"]
        older = (await here.get(path, BOB, params={"limit": 3, "before_seq": 4})).json()
        assert [message["seq"] for message in older["messages"]] == [1, 2, 3]
        assert not older["more"]
        newer = (await here.get(path, ALICE, params={"after_seq": 1, "limit": 1})).json()
        assert [message["seq"] for message in newer["messages"]] == [2]
        quoted = await here.get(path.replace(":", "%3A"), ALICE, params={"after_seq": 4})
        assert quoted.json()["messages"][0]["sender"] == "alice"
        problem(await here.get(path, MALLORY), 403, "forbidden")
        problem(await here.get(path, SHOP), 403, "forbidden")
        problem(await here.get(path), 401, "unauthenticated")
        assert len((await here.get(path, ROOT, params={"user": "bob"})).json()["messages"]) == 5
        problem(await here.get(path, ALICE, params={"user": "bob"}), 403, "forbidden")


async def test_page_of_large_messages_ends_early_and_says_that_there_is_more(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        for n in range(20):
            await here.sent(CONV, str(n % 10) * 61_000, "alice")
        path = f"/v1/conversations/{CONV}/messages"
        page = (await here.get(path, BOB, params={"limit": 200})).json()
        assert page["more"]
        assert [message["seq"] for message in page["messages"]] == list(range(4, 21))
        first = (await here.get(path, BOB, params={"limit": 200, "after_seq": 1})).json()
        assert [message["seq"] for message in first["messages"]] == list(range(2, 19))
        assert first["more"]


async def test_what_is_no_text_comes_in_base64(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        raw = base64.b64encode(b"\xff\x00").decode()
        for kind in ("text", "image"):
            await here.send({"conv": CONV, "sender": "alice", "body_base64": raw, "kind": kind})
        page = (await here.get(f"/v1/conversations/{CONV}/messages", BOB)).json()
        assert [message.get("body_base64") for message in page["messages"]] == [raw, raw]
        assert [message["kind"] for message in page["messages"]] == ["text", "image"]


async def test_conversations_and_unread_of_a_user(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.sent(CONV, "one", "alice")
        await here.sent(CONV, "two", "alice")
        await here.sent("s:bob", "paid", "shop")
        page = (await here.get("/v1/users/bob/conversations", BOB)).json()
        rows = {row["conv"]: row for row in page["conversations"]}
        assert set(rows) == {CONV, "s:bob"}
        assert (rows[CONV]["head"], rows[CONV]["unread"]) == (2, 2)
        assert rows[CONV]["last"]["preview"] == "two"
        assert not page["more"]
        since = {"since": page["version"]}
        assert (await here.get("/v1/users/bob/conversations", BOB, params=since)).json()[
            "conversations"
        ] == []
        unread = (await here.get("/v1/users/bob/unread", BOB)).json()
        assert unread["badge"] == 3
        assert {row["conv"]: row["unread"] for row in unread["conversations"]} == {CONV: 2, "s:bob": 1}
        one = (await here.get("/v1/users/bob/unread", BOB, params={"conv": "s:bob"})).json()
        assert one["conversations"] == [{"conv": "s:bob", "unread": 1}]
        own = (await here.get("/v1/users/alice/unread", ALICE)).json()
        assert own == {"user": "alice", "badge": 0, "conversations": []}


async def test_service_sees_which_conversations_there_are_and_not_what_is_in_them(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.sent(CONV, "private", "alice")
        page = await here.get("/v1/users/bob/conversations", SHOP)
        assert page.json()["conversations"][0]["unread"] == 1
        assert "private" not in page.text
        assert "private" in (await here.get("/v1/users/bob/conversations", ROOT)).text


async def test_online_names_the_devices_that_are_connected(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        assert (await here.get("/v1/users/bob/online", BOB)).json() == {
            "user": "bob", "online": False, "devices": [],
        }  # fmt: skip
        await here.presence.open_lease("n1", 1, 60_000)
        await here.presence.attach("bob", "d0", "app", "n1", 1, "s1")
        found = (await here.get("/v1/users/bob/online", SHOP)).json()
        assert found["online"]
        assert [device["device"] for device in found["devices"]] == ["d0"]


@pytest.mark.parametrize("what", ["conversations", "online", "unread"])
async def test_questions_about_a_user_are_his_own_a_services_or_an_admins(tmp_path: Path, what: str) -> None:
    async with world(tmp_path) as here:
        path = f"/v1/users/bob/{what}"
        for good in (BOB, SHOP, ROOT):
            assert (await here.get(path, good)).status_code == 200
        problem(await here.get(path, MALLORY), 403, "forbidden")
        problem(await here.get(path), 401, "unauthenticated")
        problem(await here.get(f"/v1/users/b%00b/{what}", ROOT), 400, "bad_id")


async def test_trace_tells_members_their_part_and_operators_everything(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.post("/v1/groups", {"group": "team", "owner": "alice", "members": ["bob", "carol"]}, SHOP)
        sent = await here.sent("g:team", "secret words", "alice")
        for name in (sent["msg_id"], sent["client_id"]):
            answer = await here.get(f"/v1/messages/{name}/trace", SHOP)
            found = answer.json()
            assert found["message"]["msg_id"] == sent["msg_id"]
            assert {one["user"] for one in found["obligations"]} == {"bob", "carol"}
            assert "secret words" not in answer.text
        path = f"/v1/messages/{sent['msg_id']}/trace"
        own = (await here.get(path, BOB)).json()
        assert [one["user"] for one in own["obligations"]] == ["bob"]
        assert (await here.get(path, ROOT, params={"user": "carol"})).json()["obligations"][0][
            "user"
        ] == "carol"
        problem(await here.get(path, BOB, params={"user": "carol"}), 403, "forbidden")
        problem(await here.get(path, MALLORY), 404, "not_found")
        problem(await here.get("/v1/messages/77/trace", ROOT), 404, "not_found")
        problem(await here.get("/v1/messages/x/trace", ROOT), 400, "bad_client_id")
        problem(await here.get(path), 401, "unauthenticated")


async def test_trace_of_a_shared_client_id_prefers_the_callers_own(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        own = await here.sent(CONV, "mine", "alice", client_id=CLIENT_ID)
        await here.sent("p:mallory:zed", "theirs", "mallory", client_id=CLIENT_ID)
        found = (await here.get(f"/v1/messages/{CLIENT_ID}/trace", ALICE)).json()
        assert found["message"]["msg_id"] == own["msg_id"]
        named = await here.get(f"/v1/messages/{CLIENT_ID}/trace", ROOT, params={"sender": "alice"})
        assert named.json()["message"]["msg_id"] == own["msg_id"]


async def test_group_is_made_once(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        body = {"group": "team", "owner": "alice", "members": ["bob", "alice"]}
        made = await here.post("/v1/groups", body, SHOP)
        assert made.json() == {"group": "team", "conv": "g:team", "seq": 1}
        assert (await here.post("/v1/groups", body, ROOT)).json() == made.json()
        problem(await here.post("/v1/groups", body | {"members": ["carol"]}, SHOP), 409, "conflict")
        problem(await here.post("/v1/groups", body, ALICE), 403, "forbidden")
        problem(await here.post("/v1/groups", body | {"group": "a/b"}, SHOP), 400, "bad_id")
        many = [f"u{n}" for n in range(500)]
        found = problem(await here.post("/v1/groups", body | {"members": many}, SHOP), 400, "bad_request")
        assert "501 members; limit 500" in found["detail"]
