"""node, dispatch and api as processes of their own, over real Kafka, Redis and PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Servers
from tests.system.cluster_world import Cluster, eventually
from tests.system.served import run_command

AB = "p:alice:bob"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Node a (two workers), node b, two dispatchers, an api. A test that ends one starts it again."""
    servers = Servers()
    try:
        found = Cluster(tmp_path_factory.mktemp("cluster"), servers)
        try:
            found.dispatcher(1)
            found.dispatcher(2)
            found.node("a", workers=2)
            found.node("b")
            found.api()
            yield found
        finally:
            found.close()
    finally:
        servers.close()


def adoptions(cluster: Cluster) -> str:
    """What dispatchers said of them. (One of them may also grow while the other does: all lines, sorted.)"""
    logs = [cluster.parts[f"dispatch-{number}"].logged() for number in (1, 2)]
    return "".join(sorted(line for log in logs for line in log.splitlines() if "adopting the inbox" in line))


async def test_people_on_different_nodes_talk_in_order(cluster: Cluster) -> None:
    async with cluster.person("alice", "a") as alice, cluster.person("bob", "b") as bob:
        asked = [f"question {n}" for n in range(50)]
        answered = [f"answer {n}" for n in range(50)]
        sent, _ = await asyncio.gather(alice.say(AB, *asked), bob.say(AB, *answered))
        await eventually(lambda: bob.texts(AB) == asked and alice.texts(AB) == answered)
        await cluster.until_state(sent[-1], "bob", "acked")


async def test_rest_sends_to_somebody_online_and_traces_it(cluster: Cluster) -> None:
    async with cluster.person("carol", "b") as carol:
        answer = await cluster.rest(
            "POST", "/v1/messages", {"conv": "s:carol", "sender": "shop", "body": "on its way"}
        )
        assert answer.status_code == 201
        await eventually(lambda: carol.texts("s:carol") == ["on its way"])
        await cluster.until_state(answer.json()["msg_id"], "carol", "acked")
        online = (await cluster.rest("GET", "/v1/users/carol/online")).json()
        assert len(online["devices"]) == 1


async def test_who_is_away_finds_everything_when_he_comes(cluster: Cluster) -> None:
    async with cluster.person("dave", "a"):
        pass
    async with cluster.person("erin", "b") as erin:
        sent = await erin.say("p:dave:erin", "one", "two", "three")
        # An orderly leave has four seconds of grace before anything is parked.
        await cluster.until_state(sent[-1], "dave", "parked")
        async with cluster.person("dave", "b", "d1") as dave:
            await eventually(lambda: dave.texts("p:dave:erin") == ["one", "two", "three"])
            await cluster.until_state(sent[-1], "dave", "acked")


async def test_killed_worker_loses_nothing_and_its_clients_go_on_elsewhere(cluster: Cluster) -> None:
    node = cluster.parts["node-a"]
    conv = "p:frank:grace"
    async with cluster.person("frank", "a") as frank, cluster.person("grace", "b") as grace:
        await frank.say(conv, "before")
        await eventually(lambda: grace.texts(conv) == ["before"])
        before = set(node.workers())
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        # Into the inbox of a node that is dead, until it is adopted or back.
        await grace.say(conv, *(f"meanwhile {n}" for n in range(20)))
        await eventually(lambda: len(set(node.workers()) - before) == 2)
        await eventually(lambda: frank.texts(conv) == [f"meanwhile {n}" for n in range(20)])
        sent = await frank.say(conv, "after")
        await eventually(lambda: grace.texts(conv) == ["before", "after"])
        await cluster.until_state(sent[0], "grace", "acked")


async def test_inbox_of_a_dead_node_is_adopted_and_its_users_find_everything_elsewhere(
    cluster: Cluster,
) -> None:
    conv = "p:quinn:rosa"
    part = cluster.parts["node-b"]
    async with cluster.person("rosa", "a") as rosa:
        async with cluster.person("quinn", "b") as quinn:
            await rosa.say(conv, "before")
            await eventually(lambda: quinn.texts(conv) == ["before"])
            part.end(signal.SIGKILL)
        # Presence still shows him there for some seconds, and nobody reads that inbox.
        sent = await rosa.say(conv, *(f"into the dead inbox {n}" for n in range(10)))
        await cluster.until_state(sent[-1], "quinn", "parked", 30)
        async with cluster.person("quinn", "a") as quinn:
            await eventually(lambda: len(quinn.texts(conv)) == 11)
            assert [seq for _, seq, _ in quinn.shown] == list(range(1, 12))
            await cluster.until_state(sent[-1], "quinn", "acked")
    part.start()


async def test_dispatcher_that_is_killed_is_replaced_by_the_other(cluster: Cluster) -> None:
    conv = "p:heidi:ivan"
    async with cluster.person("heidi", "a") as heidi, cluster.person("ivan", "b") as ivan:
        for round_ in (1, 2):
            going = asyncio.gather(*(heidi.say(conv, f"{round_}.{n}") for n in range(30)))
            await asyncio.sleep(0.01)
            part = cluster.parts[f"dispatch-{round_}"]
            assert part.end(signal.SIGKILL) == -signal.SIGKILL
            await going
            part.start()
        wanted = sorted(f"{round_}.{n}" for round_ in (1, 2) for n in range(30))
        await eventually(lambda: sorted(ivan.texts(conv)) == wanted)
        assert [seq for _, seq, _ in ivan.shown] == list(range(1, 61))


async def test_rolling_restart_of_every_process_keeps_everything(cluster: Cluster) -> None:
    conv = "p:judy:kim"
    async with cluster.person("judy", "a") as judy, cluster.person("kim", "b") as kim:
        said = 0

        async def talk(stop: asyncio.Event) -> None:
            nonlocal said
            while not stop.is_set():
                await judy.client.send(conv, f"{said}")
                said += 1
                await asyncio.sleep(0.02)

        stop = asyncio.Event()
        talking = asyncio.create_task(talk(stop))
        for name in ("dispatch-1", "node-b", "dispatch-2", "node-a", "api"):
            part = cluster.parts[name]
            assert await asyncio.to_thread(part.end) == 0, part.logged()
            await asyncio.to_thread(part.start)
        stop.set()
        await talking
        await eventually(lambda: kim.texts(conv) == [str(n) for n in range(said)], 60)
        assert said > 50


async def test_late_answer_is_202_with_a_trace_that_finds_it_later(cluster: Cluster) -> None:
    dispatchers = [cluster.parts["dispatch-1"], cluster.parts["dispatch-2"]]
    for part in dispatchers:
        part.send(signal.SIGSTOP)
    try:
        answer = await cluster.rest(
            "POST", "/v1/messages", {"conv": "s:lena", "sender": "shop", "body": "late"}
        )
    finally:
        for part in dispatchers:
            part.send(signal.SIGCONT)
    assert answer.status_code == 202
    await cluster.until_traced(answer.json()["trace"])


async def test_node_that_stood_still_is_fenced_and_comes_back_with_a_new_boot(cluster: Cluster) -> None:
    conv = "p:mike:nina"
    part = cluster.parts["node-b"]
    boot = re.findall(r"who=b boot=(\d+)", part.logged())[-1]  # an older one may be adopted meanwhile
    async with cluster.person("mike", "b") as mike, cluster.person("nina", "a") as nina:
        await mike.say(conv, "before")
        part.send(signal.SIGSTOP)
        try:
            await nina.say(conv, "meanwhile")
            await eventually(lambda: re.search(rf"node=b boot={boot}\b", adoptions(cluster)) is not None)
        finally:
            part.send(signal.SIGCONT)
        await eventually(lambda: "the node is back" in part.logged())
        await eventually(lambda: mike.texts(conv) == ["meanwhile"])
        sent = await mike.say(conv, "after")
        await eventually(lambda: nina.texts(conv) == ["before", "after"])
        await cluster.until_state(sent[0], "nina", "acked")


def findings(cluster: Cluster, code: int, *arguments: str) -> list[dict[str, Any]]:
    done = run_command("doctor", "--config", str(cluster.config), "--json", *arguments, code=code)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_doctor_finds_everything_well(cluster: Cluster) -> None:
    found = findings(cluster, 0)
    assert all(one["good"] for one in found)
    subjects = {one["subject"] for one in found}
    assert {"bus", "bus submit", "bus undelivered", "presence", "store 1", "store 2"} <= subjects


def test_doctor_says_which_topic_is_not_as_configured(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(cluster.config.read_text().replace("submit_partitions = 4", "submit_partitions = 6"))
    done = run_command("doctor", "--config", str(other), code=1)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
    assert "bus submit" in line
    assert "4 partitions, but bus.submit_partitions is 6" in line


def test_process_with_another_number_of_partitions_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(cluster.config.read_text().replace("submit_partitions = 4", "submit_partitions = 6"))
    done = run_command("dispatch", "--name", "d9", "--config", str(other), code=2)
    assert "submit has 4 partitions, not 6" in done.stderr


def test_audit_and_why_read_the_databases_and_nothing_is_under_way_at_rest(cluster: Cluster) -> None:
    deadline = time.monotonic() + 20
    while True:
        report = json.loads(run_command("audit", "--config", str(cluster.config), "--json").stdout)
        assert report["ok"]
        assert report["obligations"] > 100
        if not report["in_flight"] and report["settled_mark"] == report["head_msg_id"]:
            break
        assert time.monotonic() < deadline, report
    message = str(report["head_msg_id"])
    story = json.loads(run_command("why", message, "--config", str(cluster.config), "--json").stdout)
    assert str(story["message"]["msg_id"]) == message


def test_status_page_of_a_dispatcher_answers(cluster: Cluster) -> None:
    base = f"http://127.0.0.1:{cluster.ports['status']}"
    for path, words in (("/health", b"ok"), ("/ready", b"ok"), ("/metrics", b"fastim_bus_lag")):
        with urllib.request.urlopen(f"{base}{path}", timeout=5) as answer:
            assert words in answer.read()


@pytest.mark.parametrize("server", ["redis", "postgres", "kafka"])
async def test_server_that_is_away_makes_doctor_red_and_costs_neither_a_message_nor_a_connection(
    cluster: Cluster, server: str
) -> None:
    conv = f"p:olga:pete-{server}"
    adopted = adoptions(cluster)
    workers = cluster.parts["node-a"].workers()
    async with cluster.person("olga", "a") as olga, cluster.person(f"pete-{server}", "b") as pete:
        await olga.say(conv, "before")
        await asyncio.to_thread(cluster.servers.stop, server)
        try:
            going = []
            looking = asyncio.create_task(asyncio.to_thread(findings, cluster, 1))
            for n in range(30):
                going.append(await olga.client.send(conv, f"{n}"))
                await asyncio.sleep(0.1)
                assert olga.client.connected
                assert pete.client.connected
            bad = [one for one in await looking if not one["good"]]
        finally:
            await asyncio.to_thread(cluster.servers.start, server)
        async with asyncio.timeout(10):
            for outgoing in going:
                await outgoing.accepted()
        await eventually(lambda: pete.texts(conv) == ["before", *(str(n) for n in range(30))], 10)
    assert [
        part.name for part in cluster.parts.values() if part.process and part.process.poll() is not None
    ] == []
    assert cluster.parts["node-a"].workers() == workers
    assert adoptions(cluster) == adopted
    subject = {"redis": "presence", "postgres": "store", "kafka": "bus"}[server]
    assert bad
    assert all(one["subject"].startswith(subject) and "answer" in one["text"] for one in bad), bad
