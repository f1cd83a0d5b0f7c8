"""Metrics are defined once and only go up; no secret reaches a log line."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastim import observe
from fastim.protocol import Auth, Send, SendItem

TOKEN = "eyJhbGciOiJFZERTQSIsImtpZCI6ImsifQ.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJlLXdpdGgtNjQ"
BODY = "my salary is 12345"
PEM = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ1hPlanted\n-----END PRIVATE KEY-----"
PLANTED = (TOKEN, TOKEN[:30], BODY, "salary", "MC4CAQAw", "Planted", "hunter2hunter2")


class Log:
    """The configured root logger with its output."""

    def __init__(self, as_json: bool) -> None:
        self.stream = io.StringIO()
        observe.set_up_logging("DEBUG", as_json=as_json, stream=self.stream)
        self.logger = logging.getLogger("fastim.test")

    def text(self) -> str:
        return self.stream.getvalue()

    def lines(self) -> list[str]:
        return self.text().splitlines()


@pytest.fixture(params=[False, True], ids=["key=value", "json"])
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    yield from configured(request.param)


@pytest.fixture
def json_log() -> Iterator[Log]:
    yield from configured(as_json=True)


def configured(as_json: bool) -> Iterator[Log]:
    root, own = logging.getLogger(), logging.getLogger("fastim")
    handlers, levels = list(root.handlers), (root.level, own.level)
    yield Log(as_json)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def boom() -> None:
    secret = "hunter2hunter2"
    raise ValueError(f"token={TOKEN} secret={secret!r} body={BODY.encode()!r}")


PLANTS: list[Callable[[logging.Logger], None]] = [
    lambda log: log.info("token %s refused", TOKEN),
    lambda log: log.info("refused %r", Auth(1, 1, TOKEN, "phone")),
    lambda log: log.info("send %s", Send("p:a:b", [SendItem(bytes(16), 1, BODY.encode())])),
    lambda log: log.info("packet %r", BODY.encode()),
    lambda log: log.info("packet %s", memoryview(BODY.encode())),
    lambda log: log.info("GET /v1/ws?token=hunter2hunter2&x=1"),
    lambda log: log.info("headers {'Authorization': 'Bearer hunter2hunter2'}"),
    lambda log: log.info("Authorization: Bearer %s", "hunter2hunter2"),
    lambda log: log.info('{"password": "hunter2hunter2", "a": 1}'),
    lambda log: log.info("config secret='hunter2hunter2' port=1"),
    lambda log: log.info("key is %s", PEM),
    lambda log: log.info("cut key -----BEGIN EC PRIVATE KEY-----\nMC4CAQAwPlanted"),
    lambda log: log.info("user", extra={"token": TOKEN, "peer": "1.2.3.4:5"}),
    lambda log: log.info("user", extra={"Authorization": "hunter2hunter2"}),
    lambda log: log.info("user", extra={"body": BODY, "size_bytes": 18}),
    lambda log: log.info("user", extra={"frame": BODY.encode()}),
    lambda log: log.info("user", extra={"seen": {"token": "hunter2hunter2"}}),
    lambda log: log.info("%(token)s and %(user)s", {"token": "hunter2hunter2", "user": "alice"}),
    lambda log: log.info("push to api_key=hunter2hunter2"),
    lambda log: log.info("cookie: hunter2hunter2"),
    lambda log: log.info("store at postgresql://fastim:hunter2hunter2@db:5432/x is away"),
    lambda log: log.info("POST https://hunter2hunter2@hooks.example/push"),
]


@pytest.mark.parametrize("plant", PLANTS)
def test_secret_never_reaches_a_line(log: Log, plant: Callable[[logging.Logger], None]) -> None:
    plant(log.logger)
    assert len(log.lines()) == 1
    assert not [word for word in PLANTED if word in log.text()], log.text()


def test_secret_in_an_exception_is_redacted_and_the_traceback_stays(log: Log) -> None:
    try:
        boom()
    except ValueError:
        log.logger.exception("it failed")
    assert len(log.lines()) == 1
    assert not [word for word in PLANTED if word in log.text()], log.text()
    assert "ValueError" in log.text()
    assert "in boom" in log.text()


@pytest.mark.parametrize(
    "library", ["httpx", "httpcore.http11", "aiokafka.admin.client", "redis", "asyncpg", "asyncio"]
)
def test_libraries_are_heard_from_warning_on(log: Log, library: str) -> None:
    """Below that they log the URL of each call (a webhook's may hold a secret), headers and bodies."""
    logging.getLogger(library).debug("wire %s", "S3CRET")
    logging.getLogger(library).info("HTTP Request: POST https://hooks.example/S3CRET")
    assert log.lines() == []
    logging.getLogger(library).warning("it is away")
    assert len(log.lines()) == 1


def test_what_is_no_secret_stays(log: Log) -> None:
    log.logger.info("listening on %s, %d links", "127.0.0.1", 5, extra={"port": 8443, "conv": "p:a:b"})
    for word in ("listening on 127.0.0.1, 5 links", "8443", "p:a:b", "fastim.test", "info"):
        assert word in log.text()


def test_message_cannot_forge_a_line_or_a_field(log: Log) -> None:
    log.logger.info("first\nlevel=critical msg=second", extra={"peer": 'x" admin=true\r\n'})
    assert len(log.lines()) == 1
    assert not re.search(r"(?m)^level=critical", log.text())
    assert " admin=true" not in log.text().replace('\\" admin=true', "")


def test_json_lines_are_json(json_log: Log) -> None:
    json_log.logger.warning("late", extra={"lag_ms": 12, "peer": "1.2.3.4:5"})
    found = json.loads(json_log.text())
    shown = found["level"], found["msg"], found["lag_ms"], found["peer"]
    assert shown == ("warning", "late", 12, "1.2.3.4:5")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found["ts"])


def test_wrong_arguments_do_not_lose_the_line(log: Log) -> None:
    log.logger.info("a %d b", "not a number")
    assert "a %d b" in log.text()


def test_redact_twice_is_redact_once() -> None:
    text = f"token={TOKEN} Bearer abc {PEM} body=b'x y'"
    assert observe.redact(observe.redact(text)) == observe.redact(text)


def test_redact_is_linear_on_hostile_text() -> None:
    assert observe.redact("token=" * 20_000 + "'" * 20_000)
    assert observe.redact("-----BEGIN A-----" * 2_000)
    assert observe.redact("eyJaaaaa" * 10_000)


# ---------------------------------------------------------------------------------------------- metrics


def test_exposition_holds_the_flows() -> None:
    observe.OBLIGATIONS_CREATED.inc(3)
    observe.OBLIGATIONS_MOVED.labels("acked").inc(2)
    text = observe.exposition().decode()
    assert "fastim_obligations_created_total" in text
    assert 'fastim_obligations_moved_total{fate="acked"}' in text
    for name in ("frames_in", "sessions", "acks", "undelivered", "nudges", "parks", "pushes", "store_batch"):
        assert f"fastim_{name}" in text


def test_tally_never_goes_back_when_its_source_leaves() -> None:
    counted = {"a": 5, "b": 7}
    before = observe.PINGS.value()
    observe.PINGS.attach("a", lambda: counted["a"])
    observe.PINGS.attach("b", lambda: counted["b"])
    assert observe.PINGS.value() == before + 12
    observe.PINGS.detach("a")
    counted["a"] = 0
    counted["b"] += 1
    assert observe.PINGS.value() == before + 13
    observe.PINGS.detach("b")
    observe.PINGS.detach("b")
    assert f"fastim_pings_total {float(before + 13)}" in observe.exposition().decode()


def test_metrics_are_defined_in_one_file_only() -> None:
    root = Path(observe.__file__).parent
    elsewhere = [
        path.name
        for path in root.rglob("*.py")
        if path.name != "observe.py" and "prometheus_client" in path.read_text()
    ]
    assert elsewhere == []
