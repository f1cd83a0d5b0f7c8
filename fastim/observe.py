"""What operators see: every metric, defined once, and log lines that hold no secret.

Hides Prometheus and logging. Other modules import a metric from here and move it; none defines its own.
Numbers that C code counts (frames, packets) are read at scrape time, so counting costs an increment in C.

O1  a metric is defined in this file only                    tests/unit/test_observe.py
O2  no token, body or key reaches a log line                 same, and the suite's own logs (promise P21)
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable
from typing import Final, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

# --------------------------------------------------------------------------------------------- metrics

REGISTRY: Final = CollectorRegistry(auto_describe=True)

_FINE: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def _counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
    return Counter(f"fastim_{name}", text, tuple(labels), registry=REGISTRY)


def _gauge(name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
    return Gauge(f"fastim_{name}", text, tuple(labels), registry=REGISTRY)


def _histogram(name: str, text: str, buckets: Iterable[float], labels: Iterable[str] = ()) -> Histogram:
    return Histogram(f"fastim_{name}", text, tuple(labels), buckets=tuple(buckets), registry=REGISTRY)


class Tally(Collector):
    """A counter whose parts are counted elsewhere (in C) and read only when somebody scrapes.

    Sources come and go with their owner; what a source had reached when it left stays in the sum, so the
    counter never goes back.
    """

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = f"fastim_{name}", text
        self._sources: dict[object, Callable[[], int]] = {}
        self._left = 0
        REGISTRY.register(self)

    def attach(self, owner: object, read: Callable[[], int]) -> None:
        """Count what `read` returns for as long as `owner` is attached."""
        self._sources[owner] = read

    def detach(self, owner: object) -> None:
        """Forget `owner`; what it counted stays."""
        read = self._sources.pop(owner, None)
        if read is not None:
            self._left += read()

    def value(self) -> int:
        return self._left + sum(read() for read in self._sources.values())

    def collect(self) -> Iterable[CounterMetricFamily]:
        yield CounterMetricFamily(self._name, self._text, value=self.value())


# Flows of obligations (message, user). Their sums agree with `fastim audit` in a run without kills.
OBLIGATIONS_CREATED = _counter("obligations_created", "Obligations (message, user) that append created")
OBLIGATIONS_MOVED = _counter(
    "obligations_moved",
    "Obligations moved to a fate, as far as one process sees: acked expired; once per device of a user",
    ["fate"],
)

# The access node's sockets.
CONNECTIONS = _gauge("connections", "Open WebSocket connections")
CONNECTIONS_OPENED = _counter("connections_opened", "WebSocket connections that finished the upgrade")
CONNECTIONS_CLOSED = _counter(
    "connections_closed", "WebSocket connections that ended, by close code", ["code"]
)
UPGRADES_REFUSED = _counter(
    "upgrades_refused",
    "Upgrades refused: path method header origin query version source overload rate timeout tls internal",
    ["reason"],
)
AUTH_REFUSED = _counter("auth_refused", "Tokens refused, by reason; peers never learn it", ["reason"])
FRAMES_IN = Tally("frames_in", "Frames received from clients")
FRAMES_OUT = Tally("frames_out", "Frames written to clients")
PACKETS_IN = Tally("packets_in", "WebSocket messages received")
PACKETS_OUT = Tally(
    "packets_out", "WebSocket messages written; frames_out / packets_out is what corking saves"
)
BYTES_IN = Tally("bytes_in", "Payload bytes received")
BYTES_OUT = Tally("bytes_out", "Payload bytes written")
PINGS = Tally("pings", "PING frames answered in C")
ACK_FRAMES = Tally("ack_frames", "ACK and ACKS frames resolved in C")
OVERFLOWS = Tally("write_overflows", "Connections aborted because their write buffer passed the hard bound")
SEALED = _counter("sealed", "Agreements on keys of sealed connections: new renewed refused", ["how"])
BAD_SEALS = Tally("bad_seals", "Connections closed because a sealed frame did not open or was missing")
ERRORS_SENT = _counter("errors_sent", "ERROR frames and problem bodies, by code", ["code"])

# Sessions and delivery.
SESSIONS = _gauge("sessions", "Sessions, connected or waiting to be resumed")
SESSIONS_OPENED = _counter("sessions_opened", "Sessions by how they began: new hot cold", ["how"])
KICKS = _counter("kicks", "Connections closed by policy", ["reason"])
EVICTIONS = _counter("evictions", "Connections closed by the node: idle half_open slow", ["reason"])
ACKS = _counter("acks", "Messages acknowledged, once per device")
PROBES = _counter("probes", "Probes sent because an ack was late")
UNDELIVERED = _counter("undelivered", "Conversations reported undelivered, by reason", ["reason"])
BEHIND = _counter("behind", "Conversations put into pull mode, by reason", ["reason"])
IN_FLIGHT = _gauge("in_flight_frames", "Tagged frames written and not yet acknowledged")
FLUSH_SECONDS = _histogram("flush_seconds", "Duration of a node's flush of cursors, fate and due rows", _FINE)

# Dispatch and push.
SUBMITTED = _counter("submitted", "Messages offered to the submit queue, by way in", ["way"])
APPENDED = _counter("appended", "What append did with messages", ["status"])
STORE_BATCH = _histogram("store_batch_frames", "Frames in one append commit", _SIZES)
APPEND_SECONDS = _histogram("append_seconds", "Duration of one append commit", _FINE)
NUDGES = _counter("nudges", "Nudges sent to nodes")
PARKS = _counter("parks", "(user, conversation) pairs parked")
PUSHES = _counter(
    "pushes", "Vendor pushes by outcome: ok gone retry gave_up expired no_vendor silent", ["outcome"]
)
BUS_LAG = _gauge("bus_lag", "Records not yet settled", ["topic"])
BUS_ALARMS = _counter(
    "bus_alarms",
    "Partitions whose reader lost records (gap), or left one unsettled for a tenth of its days (retention)",
    ["what"],
)

FLOWS = _counter("flows", "What node and dispatch counted beside the above", ["part", "name"])

LOOP_LAG = _histogram("loop_lag_seconds", "How late the event loop ran a 250 ms tick", _FINE)


def exposition() -> bytes:
    """Everything in Prometheus' text format."""
    return generate_latest(REGISTRY)


# ------------------------------------------------------------------------------------------------ logs

REDACTED: Final = "[redacted]"
SECRET_FIELDS: Final = frozenset(
    {
        "token", "access_token", "refresh_token", "id_token", "jwt", "authorization", "cookie", "set-cookie",
        "secret", "password", "passwd", "passphrase", "api_key", "apikey", "key", "private_key",
        "signing_key", "material", "credential", "body", "payload", "preview", "content", "text", "plaintext",
        "nonce", "psk",
    }
)  # fmt: skip
_NAMES = "|".join(sorted((re.escape(name) for name in SECRET_FIELDS), key=len, reverse=True))
_VALUE = r"""(?:\[redacted\]|b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*"|[^\s,;)}\]&]+)"""
_RULES: Final = (
    # PEM first: it spans lines; then user and password in a URL, tokens wherever they stand, then name=value
    # and "name": value.
    (re.compile(r"-----BEGIN [^-]{1,40}-----.*?(?:-----END [^-]{1,40}-----|\Z)", re.DOTALL), REDACTED),
    (re.compile(r"(?<=://)[^\s/?#'\"@]+(?=@)"), REDACTED),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*){0,4}"), REDACTED),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]+", re.IGNORECASE), rf"\1 {REDACTED}"),
    (
        re.compile(rf"""(?<![A-Za-z0-9])((?:{_NAMES})['"]?\s*[=:]\s*){_VALUE}""", re.IGNORECASE),
        rf"\1{REDACTED}",
    ),
)
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def redact(text: str) -> str:
    """`text` without tokens, key blocks and the values of secret fields. Idempotent."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def _field(name: str, value: object) -> object:
    """One structured field as it may be logged; bytes are never shown, only counted."""
    if name.lower() in SECRET_FIELDS:
        return REDACTED
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    return redact(str(value))


class RedactingFilter(logging.Filter):
    """Renders and redacts a record before any handler sees it.

    Arguments that are bytes are replaced by their length first: a body never becomes text.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, dict):
            record.args = {name: _field(str(name), value) for name, value in record.args.items()}
        elif record.args:
            record.args = tuple(_field("", value) for value in record.args)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = str(record.msg)
        record.msg, record.args = redact(message), None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
            record.exc_info = None
        elif record.exc_text:
            record.exc_text = redact(record.exc_text)
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        for name in vars(record).keys() - _STANDARD:
            setattr(record, name, _field(name, getattr(record, name)))
        return True


def _parts(record: logging.LogRecord) -> dict[str, object]:
    moment = time.gmtime(record.created)
    parts: dict[str, object] = {
        "ts": f"{time.strftime('%Y-%m-%dT%H:%M:%S', moment)}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "msg": record.getMessage(),
    }
    parts.update((name, value) for name, value in vars(record).items() if name not in _STANDARD)
    if record.exc_text:
        parts["exception"] = record.exc_text
    if record.stack_info:
        parts["stack"] = record.stack_info
    return parts


class KeyValueFormatter(logging.Formatter):
    """One line of key=value; quoted where needed, so that no value can forge a line or a field."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{name}={self._quote(value)}" for name, value in _parts(record).items())

    @staticmethod
    def _quote(value: object) -> str:
        text = str(value)
        return text if re.fullmatch(r"[A-Za-z0-9_.:/@<>+-]+", text) else json.dumps(text, ensure_ascii=True)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_parts(record), ensure_ascii=False, default=str)


def set_up_logging(
    level: str = "INFO", *, as_json: bool = False, stream: TextIO | None = None
) -> logging.Handler:
    """Send the root logger to `stream` (stderr), redacted, one line a record. Replaces earlier handlers.

    level: of our own records. Libraries are heard from WARNING on: below, clients of HTTP, Kafka, Redis and
    PostgreSQL write down what they carry, URLs with passwords and whole bodies among it.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.addFilter(RedactingFilter())
    handler.setFormatter(JsonFormatter() if as_json else KeyValueFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    own = logging.getLogger("fastim")
    own.setLevel(level)
    root.setLevel(max(logging.WARNING, own.level))
    return handler
