"""The tables of the configuration: every setting, its default and its range.

Hides pydantic from everybody but its neighbours. A default that is not good enough for production is refused
by coherence.py, not here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import annotated_types
from pydantic import AfterValidator, BaseModel, Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from fastim.auth import Key, load_key
from fastim.config.backends import (
    EMBEDDED,
    EMBEDDED_STORE,
    BusSection,
    PresenceSection,
    Section,
    StoreSection,
)
from fastim.errors import UsageError
from fastim.model import DEFAULT_KINDS, MAX_BODY_BYTES, KindRule

ENV_PREFIX: Final = "FASTIM_"
NAME: Final = r"^[A-Za-z0-9_-]{1,32}$"
FIRST_CUSTOM_KIND: Final = 64
LAST_CUSTOM_KIND: Final = 65_535


# -------------------------------------------------------------------------------------------- value types


def split_address(text: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` as (host, port). Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif not re.fullmatch(r"[A-Za-z0-9.-]+", host):
        raise ValueError("must be host:port or [v6 address]:port")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ValueError("the port must be 0-65535")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(text: str) -> str:
    split_address(text)
    return text


def _network(text: str) -> str:
    ipaddress.ip_network(text)
    return text


def _origin(text: str) -> str:
    if not re.fullmatch(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?", text):
        raise ValueError(
            "must be an origin as browsers send it: https://host or https://host:port, lower case"
        )
    return text


def _url(text: str) -> str:
    if text and not re.match(r"https?://[^\s/]+", text):
        raise ValueError("must start with https:// or http://")
    return text


Address = Annotated[str, AfterValidator(_address)]
Network = Annotated[str, AfterValidator(_network)]
Origin = Annotated[str, AfterValidator(_origin)]
Url = Annotated[str, AfterValidator(_url)]


# ------------------------------------------------------------------------------------------------ sections


class LogSection(Section):
    """Log lines go to standard error, redacted."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least level that is logged."
    )
    as_json: bool = Field(default=False, description="One JSON object a line instead of key=value.")


class NamedKeySection(Section):
    """A key in a file of its own."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_.@-]{1,64}$", description="What clients call it; a new key has a new name."
    )
    file: str = Field(min_length=1, description="Where it is.")


class NodeSection(Section):
    """The access node: client sockets, sessions, delivery."""

    name: str = Field(
        default="n1", pattern=NAME, description="This node's id, unlike any other's; never change it."
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=256,
        description="Nodes that `fastim node` runs on the one address, a process each: name-1, name-2 ...",
    )
    status_listen: Address | Literal[""] = Field(
        default="",
        description="Where `fastim node` answers /health, /ready and /metrics over HTTP; the next worker one "
        "port higher. Empty: only /health, beside the clients' path.",
    )
    listen: Address = Field(default="127.0.0.1:8443", description="Where WebSocket clients connect.")
    tls_cert: str = Field(
        default="", description="PEM file with the certificate chain; read again on SIGHUP."
    )
    tls_key: str = Field(default="", description="PEM file with the certificate's private key.")
    plain: bool = Field(default=False, description="ws without TLS: loopback with --dev only.")
    balancers: list[Network] = Field(
        default=[],
        description="Addresses that end TLS in front of this node and whose X-Forwarded-For is believed.",
    )
    proxy_protocol: bool = Field(
        default=False, description="Those addresses begin with a PROXY header (v1, v2); nobody else may."
    )
    origins: list[Origin] = Field(default=[], description="Origins that browsers may connect from.")
    seal_keys: list[NamedKeySection] = Field(
        default=[],
        max_length=100,
        description="X25519 private keys (PEM) towards which clients may seal their connections, each "
        '{name = "2026-01", file = "/etc/fastim/seal.pem"}; --dev makes one if there is none.',
    )
    seal_shared: list[NamedKeySection] = Field(
        default=[],
        max_length=10_000,
        description="Pre-shared keys (files of 64 hex digits) that clients may mix in, each the same way.",
    )
    require_sealed: bool = Field(
        default=False, description="Refuse clients that do not seal their connection."
    )
    heartbeat_ms: int = Field(default=10_000, ge=100, le=300_000, description="How often clients send PING.")
    idle_ms: int = Field(
        default=30_000, ge=300, le=900_000, description="A client silent for so long is closed."
    )
    resume_ttl_ms: int = Field(
        default=120_000,
        ge=0,
        le=3_600_000,
        description="How long a session waits for its client to come back.",
    )
    window_messages: int = Field(
        default=128, ge=1, le=4_096, description="Messages under way per session, unacked."
    )
    window_bytes: int = Field(
        default=262_144, ge=65_536, le=16_777_216, description="Bytes under way per session."
    )
    handshake_timeout_ms: int = Field(
        default=5_000, ge=100, le=60_000, description="For the upgrade request."
    )
    tls_timeout_ms: int = Field(default=5_000, ge=100, le=60_000, description="For the TLS handshake.")
    auth_timeout_ms: int = Field(default=5_000, ge=100, le=60_000, description="For the first frame, AUTH.")
    probe_ms: int = Field(default=3_000, ge=10, le=60_000, description="No ack for so long: PROBE.")
    ack_timeout_ms: int = Field(
        default=8_000, ge=20, le=120_000, description="No ack for so long: undelivered."
    )
    slow_ms: int = Field(
        default=10_000, ge=100, le=120_000, description="A full window without progress: closed."
    )
    grace_ms: int = Field(
        default=4_000, ge=0, le=60_000, description="After an orderly leave, before vendor push."
    )
    flush_interval_ms: int = Field(
        default=20, ge=0, le=1_000, description="Longest wait of acknowledged cursors for their transaction."
    )
    rate_per_s: int = Field(default=20, ge=1, le=1_000_000, description="Messages a second a user may send.")
    rate_burst: int = Field(default=60, ge=1, le=1_000_000, description="Messages a user may send at once.")
    devices_per_user: int = Field(
        default=5, ge=1, le=100, description="Devices of one user that may be connected."
    )
    max_connections: int = Field(
        default=20_000, ge=1, le=1_000_000, description="Open connections; more are refused."
    )
    failures_per_minute: int = Field(
        default=100,
        ge=1,
        le=1_000_000,
        description="Failed handshakes and tokens per address; never successful ones.",
    )
    sndbuf_bytes: int = Field(
        default=61_440,
        ge=4_096,
        le=4_194_304,
        description="SO_SNDBUF of client sockets; the kernel doubles it.",
    )
    backlog: int = Field(
        default=4_096, ge=1, le=65_535, description="Sockets the kernel may hold before accept."
    )
    drain_window_ms: int = Field(
        default=5_000,
        ge=0,
        le=20_000,
        description="Over which a stopping node spreads its clients' reconnects.",
    )


class DispatchSection(Section):
    """Storing, routing, retries and push."""

    name: str = Field(
        default="d1", pattern=NAME, description="This dispatcher's id, unlike any other's; never change it."
    )
    status_listen: Address | Literal[""] = Field(
        default="",
        description="Where `fastim dispatch` answers /health, /ready and /metrics; empty: nowhere.",
    )
    batch_records: int = Field(
        default=512, ge=1, le=8_192, description="Sends that become one store transaction."
    )
    linger_ms: int = Field(
        default=2, ge=0, le=1_000, description="From one small batch of sends to the next at least."
    )
    linger_below: int = Field(default=64, ge=0, le=8_192, description="Sends in a batch that is not small.")
    max_unsettled: int = Field(default=4_096, ge=1, le=1_000_000, description="Bus records in hand.")
    store_patience_ms: int = Field(
        default=5_000,
        ge=0,
        le=600_000,
        description="Wait for a store that is away before senders are refused.",
    )
    bus_patience_ms: int = Field(
        default=2_000, ge=0, le=600_000, description="Publishing is tried for so long."
    )
    retry_first_ms: int = Field(
        default=20, ge=1, le=60_000, description="First pause between tries of a backend."
    )
    retry_most_ms: int = Field(default=1_000, ge=1, le=600_000, description="Longest pause between tries.")
    unavailable_retry_ms: int = Field(
        default=2_000, ge=1, le=600_000, description="retry_after_ms told to senders while the store is away."
    )
    backoff_ms: tuple[Annotated[int, annotated_types.Interval(ge=1, le=3_600_000)], ...] = Field(
        default=(1_000, 2_000, 4_000, 8_000, 16_000, 30_000),
        min_length=1,
        max_length=20,
        description="From one retry of an unacknowledged conversation to the next; then it is parked.",
    )
    backoff_jitter: float = Field(
        default=0.2, ge=0.0, le=1.0, description="Share by which each of them varies."
    )
    first_due_ms: int = Field(
        default=1_000, ge=0, le=60_000, description="First retry after an undelivered message."
    )
    due_poll_ms: int = Field(
        default=250, ge=1, le=60_000, description="How often due rows are looked for at rest."
    )
    due_claim_ms: int = Field(
        default=10_000, ge=100, le=600_000, description="How long a claim on due rows lasts."
    )
    due_batch: int = Field(default=256, ge=1, le=10_000, description="Due rows claimed at once.")
    reconnect_window_ms: int = Field(
        default=20_000,
        ge=0,
        le=600_000,
        description="After a start nothing is pushed for so long: phones come back.",
    )
    recover_batch: int = Field(
        default=2_000, ge=1, le=100_000, description="Due rows per transaction of recovery."
    )
    mark_interval_ms: int = Field(
        default=500, ge=1, le=60_000, description="How often the settled mark moves."
    )
    push_collapse_ms: int = Field(
        default=10_000,
        ge=0,
        le=3_600_000,
        description="At most one push per user and conversation in this window.",
    )
    push_claim_ms: int = Field(
        default=30_000, ge=100, le=600_000, description="How long a claim on pushes lasts."
    )
    push_batch: int = Field(default=100, ge=1, le=1_000, description="Pushes handed to a vendor at once.")
    push_deadline_ms: int = Field(default=10_000, ge=10, le=60_000, description="For one call of a vendor.")
    push_backoff_first_ms: int = Field(
        default=2_000, ge=1, le=600_000, description="First repeat of a failed push."
    )
    push_backoff_most_ms: int = Field(
        default=300_000, ge=1, le=86_400_000, description="Longest pause between them."
    )
    push_attempts: int = Field(
        default=10, ge=1, le=1_000, description="Failed pushes before one is given up."
    )
    push_preview_chars: int = Field(
        default=80, ge=0, le=1_000, description="Of a text in a push; 0 shows none."
    )
    stop_ms: int = Field(
        default=10_000, ge=0, le=20_000, description="Longest wait for the batch in hand at a stop."
    )
    unknown_users: Literal["auto", "refuse", "park"] = Field(
        default="auto",
        description="Messages of clients to users nobody has ever seen; auto: refuse, but park with --dev.",
    )


class ApiSection(Section):
    """The REST interface."""

    name: str = Field(
        default="api", pattern=NAME, description="This api's id, unlike any other's or any node's."
    )
    listen: Address = Field(default="127.0.0.1:8080", description="Where REST clients connect.")
    tls_cert: str = Field(
        default="", description="PEM file with the certificate chain; read again on SIGHUP."
    )
    tls_key: str = Field(default="", description="PEM file with the certificate's private key.")
    plain: bool = Field(
        default=False, description="HTTP beyond loopback, because a balancer in front ends TLS."
    )
    origins: list[Origin] = Field(default=[], description="Origins that browsers may call from (CORS).")
    reply_timeout_ms: int = Field(
        default=5_000,
        ge=10,
        le=60_000,
        description="Wait for a message to be stored before 503 (then repeat it), or 202 with Kafka.",
    )
    max_body_bytes: int = Field(
        default=262_144, ge=1_024, le=1_048_576, description="Size of a request body."
    )
    max_waiting: int = Field(
        default=10_000, ge=1, le=1_000_000, description="Sends that may wait for their store."
    )
    max_connections: int = Field(
        default=4_096, ge=1, le=1_000_000, description="Open connections; more are dropped."
    )
    request_timeout_ms: int = Field(
        default=5_000, ge=100, le=60_000, description="For a request's head, and for its body."
    )


class IssuerSection(Section):
    """A key that tokens may be signed with."""

    issuer: str = Field(min_length=1, max_length=200, description="The tokens' iss.")
    kid: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="The tokens' kid.")
    algorithm: Literal["EdDSA", "HS256"] = Field(
        default="EdDSA", description="The only one this key is good for."
    )
    key: SecretStr = Field(
        default=SecretStr(""), description="PEM public key (EdDSA) or a random secret of 256 bits (HS256)."
    )
    key_file: str = Field(default="", description="Or a file that holds it.")
    scopes: list[Literal["client", "service", "admin"]] = Field(
        default=["client"], min_length=1, description="What its tokens may be for."
    )


class AuthSection(Section):
    """Who is believed."""

    audience: str = Field(default="fastim", min_length=1, max_length=200, description="The tokens' aud.")
    issuers: list[IssuerSection] = Field(default=[], max_length=100, description="The keys.")


class WebhookSection(Section):
    """Push notifications as signed JSON to your own service."""

    url: Url = Field(default="", description="Empty: no push.")
    secret: SecretStr = Field(default=SecretStr(""), description="Signs each call; random, 256 bits.")


class PushSection(Section):
    """Phone vendors."""

    webhook: WebhookSection = WebhookSection()


class KindSection(Section):
    """The weight of one message type. Without a value a known kind keeps its own."""

    kind: int | None = Field(
        default=None,
        ge=1,
        le=LAST_CUSTOM_KIND,
        description="Its number; needed for kinds of your own, from 64 on.",
    )
    ttl_ms: int | None = Field(
        default=None,
        ge=0,
        le=31_536_000_000,
        description="Time to live of a message without one; 0: never lost.",
    )
    countable: bool | None = Field(default=None, description="Whether it counts as unread.")
    push: bool | None = Field(default=None, description="Whether it may ring a phone.")
    preview: str | None = Field(
        default=None, max_length=80, description='What lists and phones show; "": the text.'
    )
    max_body_bytes: int | None = Field(default=None, ge=1, le=MAX_BODY_BYTES, description="Size of its body.")


KindName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class Config(BaseSettings):
    """The whole configuration. Made by `load`."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    dev: bool = Field(
        default=False,
        description="For one machine: own keys, a self-signed certificate, two users. Never in production.",
    )
    data_dir: str = Field(
        default="fastim-data", min_length=1, description="Directory of everything that is kept."
    )
    log: LogSection = LogSection()
    node: NodeSection = NodeSection()
    dispatch: DispatchSection = DispatchSection()
    store: StoreSection = StoreSection()
    bus: BusSection = BusSection()
    presence: PresenceSection = PresenceSection()
    api: ApiSection = ApiSection()
    auth: AuthSection = AuthSection()
    push: PushSection = PushSection()
    kinds: dict[KindName, KindSection] = Field(
        default={}, description="Message types: changed ones and your own."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    # -- what the values mean together

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir)

    @property
    def store_urls(self) -> list[str]:
        """With their passwords: only for whoever connects."""
        return [url.get_secret_value() for url in self.store.url]

    @property
    def bus_url(self) -> str:
        return self.bus.url.get_secret_value()

    @property
    def presence_url(self) -> str:
        """With its password: only for whoever connects."""
        return self.presence.url.get_secret_value()

    @property
    def on_servers(self) -> dict[str, bool]:
        """Of store, bus and presence: whether it is a server that processes can share."""
        return {
            "bus": self.bus_url != EMBEDDED,
            "presence": self.presence_url != EMBEDDED,
            "store": not self.store_urls[0].startswith(EMBEDDED_STORE),
        }

    @property
    def embedded(self) -> bool:
        """Everything is in this process. (coherence.py sees to it that nothing is, or all three are.)"""
        return not any(self.on_servers.values())

    @property
    def store_path(self) -> Path:
        """The directory of the embedded store's files."""
        return Path(self.store_urls[0].removeprefix(EMBEDDED_STORE) or self.data_dir)

    @property
    def kind_rules(self) -> dict[int, KindRule]:
        """The table of kinds, overrides laid over the built-in ones."""
        rules = dict(DEFAULT_KINDS)
        known = {rule.name: rule for rule in DEFAULT_KINDS.values()}
        for name, row in self.kinds.items():
            base = known.get(name) or KindRule(row.kind or 0, name, preview="[message]")
            given = {key: value for key, value in row.model_dump().items() if value is not None}
            rules[base.kind] = KindRule(
                **{field: getattr(base, field) for field in base.__struct_fields__} | given
            )
        return rules

    def token_keys(self) -> list[Key]:
        """The keys of auth.issuers. Raises UsageError that names the key and never shows it."""
        return [self._token_key(f"auth.issuers[{n}]", row) for n, row in enumerate(self.auth.issuers)]

    @staticmethod
    def _token_key(where: str, row: IssuerSection) -> Key:
        inline = row.key.get_secret_value()
        if bool(inline) == bool(row.key_file):
            raise UsageError(f"{where} needs one of key and key_file")
        try:
            material = inline or Path(row.key_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{where}.key_file is {row.key_file!r}: {_reason(error)}") from None
        try:
            return load_key(row.issuer, row.kid, row.algorithm, material, row.scopes)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return str(error.strerror) if isinstance(error, OSError) else "not text"


# ------------------------------------------------------------------------------------- looking at the tables


def tables(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted name, model) of this table and those below it."""
    yield prefix, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from tables(field.annotation, f"{prefix}{name}.")


def known_keys() -> list[str]:
    """Every dotted key of the configuration outside lists and the kinds table."""
    return [
        prefix + name
        for prefix, model in tables(Config)
        for name, field in model.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    ]


def bounds(field: Any) -> tuple[Any, Any]:
    low = high = None
    for mark in getattr(field, "metadata", ()):
        low = getattr(mark, "ge", low)
        high = getattr(mark, "le", high)
    return (low, high) if low is not None and high is not None else (None, None)
