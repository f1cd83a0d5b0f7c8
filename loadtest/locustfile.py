"""People who chat over msgpack-wss, and a service that pushes over REST, as locust users.

    make serve                                                              # in one terminal
    locust -f loadtest/locustfile.py --headless -u 500 -t 60s               # in another
    locust -f loadtest/locustfile.py                                        # with the page on port 8089

Latencies appear as requests of type `wss`: SENT (from handing a message to the app until the server stored
it) and DELIVERED (until the peer's screen shows it). At the end the clients' own account is printed, and the
command fails when anything was lost, repeated or out of order. See README.md beside this file.
"""

from __future__ import annotations

import logging
import random
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import gevent
from locust import HttpUser, User, between, constant_throughput, events, task
from locust.env import Environment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastim.auth import Scope, create_dev_key, mint
from fastim.client.events import Message
from loadtest.judge import Judge, Verdict
from loadtest.phone import Phone, uuid7

_log = logging.getLogger("fastim.loadtest")
RUN = uuid.uuid4().hex[:6]
JUDGE = Judge()
PHONES: list[Phone] = []
SENT_AT: dict[bytes, tuple[float, str]] = {}
"""client_id -> (when it was handed over, who is owed it)."""
OTHERS = Verdict()
"""What the workers of a distributed run have reported."""
SETTLE_S = 30.0
FORGIVEN = frozenset({"rate_limited", "expired"})


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    group = parser.add_argument_group("fastim")
    group.add_argument(
        "--data", default="fastim-data", help="the server's data directory: its dev key mints tokens"
    )
    group.add_argument("--rest", default="http://127.0.0.1:8080", help="the REST address")


def token(environment: Environment, user: str, scope: Scope) -> str:
    key = create_dev_key(Path(environment.parsed_options.data))
    return mint(key, user, [scope], audience="fastim", ttl_s=86_400, now_s=int(time.time()))


def report(
    environment: Environment, name: str, started: float, error: Exception | None = None, size: int = 0
) -> None:
    environment.events.request.fire(
        request_type="wss", name=name, response_time=(time.monotonic() - started) * 1_000,
        response_length=size, exception=error, context={},
    )  # fmt: skip


class ChatUser(User):
    """A person with one device: 1:1 conversations, thinking in between, sometimes a burst or a tunnel."""

    host = "wss://127.0.0.1:8443"
    weight = 9
    wait_time = between(1.0, 5.0)
    count = 0

    def on_start(self) -> None:
        ChatUser.count += 1
        self.name = f"lt-{RUN}-{ChatUser.count}"
        options = self.environment.parsed_options
        certificate = Path(options.data) / "dev-tls-cert.pem"
        self.phone = Phone(
            f"{self.host}/v1/ws", token(self.environment, self.name, Scope.CLIENT), self.name,
            str(certificate) if certificate.exists() else None, self._shown, self._answered, self._trouble,
        )  # fmt: skip
        started = time.monotonic()
        try:
            self.phone.start()
        except ConnectionError as error:
            report(self.environment, "CONNECT", started, error)
            return
        report(self.environment, "CONNECT", started)
        PHONES.append(self.phone)

    def _shown(self, message: Message) -> None:
        if message.sender == self.name:
            return
        JUDGE.shown(self.name, message.conv, message.seq, message.msg_id)
        head, _, _ = message.body.partition(b" ")
        try:
            started = float(head)
        except ValueError:
            return
        report(self.environment, "DELIVERED", started, size=len(message.body))

    def _answered(self, client_id: bytes, msg_id: int, code: str) -> None:
        started, peer = SENT_AT.pop(client_id)
        if msg_id:
            JUDGE.accepted(msg_id, peer)
            report(self.environment, "SENT", started)
        else:
            JUDGE.refused += 1
            report(self.environment, "SENT", started, None if code in FORGIVEN else RuntimeError(code))

    def _trouble(self, what: str) -> None:
        report(self.environment, "CONNECTION", time.monotonic(), RuntimeError(what))

    def _say(self, peer: Phone) -> None:
        first, second = sorted((self.name, peer.user))
        started = time.monotonic()
        body = f"{started:.6f} {'x' * random.randint(1, 160)}".encode()
        client_id = uuid7()
        SENT_AT[client_id] = (started, peer.user)
        self.phone.send(client_id, f"p:{first}:{second}", body)

    def _peer(self) -> Phone | None:
        others = [phone for phone in random.sample(PHONES, min(3, len(PHONES))) if phone is not self.phone]
        return others[0] if others else None

    @task(20)
    def chat(self) -> None:
        if peer := self._peer():
            self._say(peer)

    @task(3)
    def burst(self) -> None:
        """Half a dozen lines to one person without a breath."""
        if peer := self._peer():
            for _ in range(random.randint(3, 8)):
                self._say(peer)

    @task(1)
    def tunnel(self) -> None:
        """The network goes away; most come back with their session, some with a new one."""
        self.phone.cut(forget=random.random() < 0.3)


class PushUser(HttpUser):
    """A service that tells people something, under a client_id that it repeats until there is an answer."""

    host = "http://127.0.0.1:8080"
    weight = 1
    wait_time = constant_throughput(1)

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.rest = options.rest.rstrip("/")
        self.headers = {"Authorization": f"Bearer {token(self.environment, 'loadtest', Scope.SERVICE)}"}

    @task
    def push(self) -> None:
        if not PHONES:
            return
        peer = random.choice(PHONES)
        started = time.monotonic()
        body = {
            "sender": "loadtest", "conv": f"s:{peer.user}", "kind": "text", "client_id": uuid.uuid4().hex,
            "body": f"{started:.6f} a note from the service",
        }  # fmt: skip
        for _ in range(10):
            with self.client.post(
                f"{self.rest}/v1/messages", json=body, headers=self.headers, name="POST /v1/messages",
                catch_response=True,
            ) as answer:  # fmt: skip
                if answer.status_code == 503:
                    answer.success()  # not stored yet: the same key again
                    gevent.sleep(1.0)
                    continue
                if answer.status_code in (200, 201):
                    JUDGE.accepted(int(answer.json()["msg_id"]), peer.user)
                else:
                    answer.failure(f"{answer.status_code} {answer.text[:200]}")
                return


# -------------------------------------------------------------------------------- the clients' account


def at_rest() -> bool:
    return JUDGE.missing() == 0 and not any(phone.unanswered for phone in PHONES)


def own_verdict() -> Verdict:
    return JUDGE.verdict(sum(phone.unanswered for phone in PHONES))


@events.test_stop.add_listener
def settle(environment: Environment, **_more: Any) -> None:
    """Let everything arrive that is under way, then judge."""
    deadline = time.monotonic() + SETTLE_S
    while not at_rest() and time.monotonic() < deadline:
        gevent.sleep(0.1)
    for phone in PHONES:
        phone.stop()


@events.quitting.add_listener
def judge(environment: Environment, **_more: Any) -> None:
    verdict = own_verdict()
    verdict.add(vars(OTHERS))
    print(f"fastim: {verdict.line()}", flush=True)
    if not verdict.good or not verdict.shown:
        environment.process_exit_code = 1


@events.report_to_master.add_listener
def to_master(client_id: str, data: dict[str, Any]) -> None:
    data["fastim"] = (client_id, vars(own_verdict()))


REPORTS: dict[str, dict[str, int]] = {}


@events.worker_report.add_listener
def from_worker(client_id: str, data: dict[str, Any]) -> None:
    REPORTS[client_id] = data["fastim"][1]
    OTHERS.__init__()  # type: ignore[misc]
    for figures in REPORTS.values():
        OTHERS.add(figures)


@events.init.add_listener
def add_page(environment: Environment, **_more: Any) -> None:
    """/fastim on locust's own page: the account so far."""
    if environment.web_ui is None:
        return

    @environment.web_ui.app.route("/fastim")
    def account() -> dict[str, int]:
        verdict = own_verdict()
        verdict.add(vars(OTHERS))
        return vars(verdict)
