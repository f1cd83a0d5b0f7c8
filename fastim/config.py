"""Every setting, its default, its range, and where its value came from.

Hides pydantic. Flags win over the environment (FASTIM_NODE__LISTEN), that over the TOML file, that over
the defaults. An unknown key is an error wherever it stands; a value out of range is shown with its limit, a
secret never. `load` also checks what no single value can show: that somebody can log in, that a plain socket
is not open to the internet, that no secret is short or somebody's example.

C1  flags > environment > file > defaults; unknown keys are refused everywhere    tests/unit/test_config.py
C2  no error and no repr shows a secret                                           same
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import annotated_types
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from fastim.auth import Key, check_secret, load_key
from fastim.errors import UsageError
from fastim.model import DEFAULT_KINDS, MAX_BODY_BYTES, KindRule

ENV_PREFIX: Final = "FASTIM_"
NOT_SETTINGS: Final = frozenset({"FASTIM_CONFIG", "FASTIM_TOKEN", "FASTIM_BUILD", "FASTIM_REQUIRE"})
"""The file to read, the token of a command, and what the build and the tests look at."""
FIRST_CUSTOM_KIND: Final = 64
LAST_CUSTOM_KIND: Final = 65_535


class ConfigError(UsageError):
    """What is wrong with the configuration; one sentence each, secrets left out."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


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


class Section(BaseModel):
    """A table of the configuration."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)


# ------------------------------------------------------------------------------------------------ sections


class LogSection(Section):
    """Log lines go to standard error, redacted."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least level that is logged."
    )
    as_json: bool = Field(default=False, description="One JSON object a line instead of key=value.")


class NodeSection(Section):
    """The access node: client sockets, sessions, delivery."""

    name: str = Field(
        default="n1", pattern=r"^[A-Za-z0-9_-]{1,32}$", description="This node's id; never change it."
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
    origins: list[Origin] = Field(default=[], description="Origins that browsers may connect from.")
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
        default=65_536, ge=4_096, le=4_194_304, description="SO_SNDBUF of client sockets."
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

    batch_records: int = Field(
        default=512, ge=1, le=8_192, description="Sends that become one store transaction."
    )
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


class StoreSection(Section):
    """Where messages are kept."""

    url: str = Field(
        default="sqlite:",
        pattern=r"^sqlite:",
        description="sqlite: (in data_dir) or sqlite:/another/directory.",
    )


class BusSection(Section):
    """What carries records between the parts."""

    url: str = Field(default="memory:", pattern=r"^memory:$", description="memory: is the embedded one.")
    bound_records: int = Field(
        default=200_000,
        ge=1_000,
        le=10_000_000,
        description="Records a topic may hold; then senders are refused.",
    )


class PresenceSection(Section):
    """Who is connected where."""

    url: str = Field(default="memory:", pattern=r"^memory:$", description="memory: is the embedded one.")
    lease_ms: int = Field(
        default=6_000, ge=1_000, le=60_000, description="A node that does not renew is gone after it."
    )
    renew_ms: int = Field(default=2_000, ge=100, le=20_000, description="How often a node renews its lease.")


class ApiSection(Section):
    """The REST interface."""

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
        description="Wait for a message to be stored before 503; then repeat it.",
    )
    max_body_bytes: int = Field(
        default=262_144, ge=1_024, le=1_048_576, description="Size of a request body."
    )
    max_waiting: int = Field(
        default=10_000, ge=1, le=1_000_000, description="Sends that may wait for their store."
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
    def store_path(self) -> Path:
        """The directory of the store's files."""
        return Path(self.store.url.removeprefix("sqlite:") or self.data_dir)

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


# -------------------------------------------------------------------------------------------------- loading


def load(flags: Mapping[str, Any] | None = None, file: Path | None = None) -> Config:
    """The configuration, checked. flags: nested tables of what the command line named.

    Raises ConfigError with every problem that was found.
    """
    problems = _unknown_environment()
    if file is not None:
        _read_toml(file)  # a sentence of our own for a file that is missing or not TOML

    class _Located(Config):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        config = _Located(**(flags or {}))
    except ValidationError as error:
        wrong = [_sentence(detail, flags or {}, file) for detail in error.errors(include_url=False)]
        raise ConfigError(problems + wrong) from None
    except SettingsError as error:
        found = re.search(r'field "([a-z_]+)"', str(error))
        name = found[1] if found else "a table"
        text = f"the environment's value of {name} is not JSON, which lists and tables need"
        raise ConfigError([*problems, text]) from None
    problems += list(_contradictions(config))
    if problems:
        raise ConfigError(problems)
    return config


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError([f"{file}: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file} is not TOML: {error}"]) from None


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


def _unknown_environment() -> list[str]:
    known = {f"{ENV_PREFIX}{key.replace('.', '__')}".upper(): key for key in known_keys()}
    problems = []
    for name in sorted(os.environ):
        upper = name.upper()
        if not upper.startswith(ENV_PREFIX) or upper in NOT_SETTINGS or upper in known:
            continue
        section = upper.removeprefix(ENV_PREFIX).lower()
        if upper.startswith("FASTIM_KINDS__") or section in dict(_sections()):
            continue
        problems.append(f"the environment has {name}, an unknown key{_did_you_mean(upper, list(known))}")
    return problems


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    return ((name.rstrip(".").replace(".", "__"), model) for name, model in tables(Config) if name)


def _did_you_mean(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.7)
    return f"; did you mean {near[0]}?" if near else ""


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        if part == "[key]":
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _model_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The table that a location's last part stands in."""
    model: type[BaseModel] = Config
    for part in location[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            continue
        found = [
            m for m in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(m, type)
        ]
        model = next((m for m in found if issubclass(m, BaseModel)), model)
    return model


def _sentence(detail: ErrorDetails, flags: Mapping[str, Any], file: Path | None) -> str:
    """One problem: the key, its value unless secret, what it must be, where it was set."""
    location = detail["loc"]
    key, kind = _dotted(location), detail["type"]
    where = _origin_of(location, flags, file)
    model = _model_at(location)
    leaf = str(location[-1]) if location else ""
    if kind == "extra_forbidden":
        prefix = key[: len(key) - len(leaf)]
        local = _did_you_mean(key, [prefix + name for name in model.model_fields])
        return f"{key} is an unknown key{local or _did_you_mean(key, known_keys())}{where}"
    if kind == "missing":
        return f"{key} is missing{where}"
    field = model.model_fields.get(leaf)
    secret = field is not None and field.annotation is SecretStr
    value = detail["input"]
    shown = (
        not secret and isinstance(value, (str, int, float, bool)) and not key.startswith("auth.issuers.key")
    )
    what = f"{key} is {str(value)[:120]!r}" if shown and isinstance(value, str) else f"{key} is {value!r}"
    if not shown:
        what = f"{key} is not as it must be"
    return f"{what}; {_rule(detail, field)}{where}"


def _rule(detail: ErrorDetails, field: Any) -> str:
    low, high = bounds(field)
    if detail["type"].startswith(("greater_than", "less_than")):
        if low is not None:
            return f"must be {low:,}-{high:,}"
        context = detail.get("ctx", {})
        limits = [
            f"{word} {context[name]:,}"
            for name, word in (("ge", "at least"), ("le", "at most"))
            if name in context
        ]
        return f"must be {' and '.join(limits)}"
    if detail["type"] == "string_pattern_mismatch":
        return f"must match {detail['ctx']['pattern']}"
    text = detail["msg"].removeprefix("Value error, ")
    text = text.removeprefix("Input should be ")
    return text if text.startswith(("must", "the ")) else f"must be {text}"


def bounds(field: Any) -> tuple[Any, Any]:
    low = high = None
    for mark in getattr(field, "metadata", ()):
        low = getattr(mark, "ge", low)
        high = getattr(mark, "le", high)
    return (low, high) if low is not None and high is not None else (None, None)


def _origin_of(location: tuple[int | str, ...], flags: Mapping[str, Any], file: Path | None) -> str:
    if _holds(flags, location):
        return " (command line)"
    name = ENV_PREFIX + "__".join(str(part).upper() for part in location)
    for length in range(len(location), 0, -1):
        name = ENV_PREFIX + "__".join(str(part).upper() for part in location[:length])
        if name in os.environ:
            return f" (environment, {name})"
    return f" ({file})" if file is not None and _holds(_read_toml(file), location) else ""


def _holds(tables: Any, location: tuple[int | str, ...]) -> bool:
    for part in location:
        listed = isinstance(tables, (list, tuple)) and isinstance(part, int) and part < len(tables)
        if listed or (isinstance(tables, Mapping) and part in tables):
            tables = tables[part]
        else:
            return isinstance(tables, (list, tuple))
    return True


def _contradictions(config: Config) -> Iterator[str]:
    """What only several values together show."""
    node, api = config.node, config.api
    if node.idle_ms < 2 * node.heartbeat_ms:
        least = f"at least twice node.heartbeat_ms ({node.heartbeat_ms:,})"
        yield f"node.idle_ms is {node.idle_ms:,}; must be {least}"
    if node.ack_timeout_ms <= node.probe_ms:
        least = f"above node.probe_ms ({node.probe_ms:,})"
        yield f"node.ack_timeout_ms is {node.ack_timeout_ms:,}; must be {least}"
    if config.presence.lease_ms < 2 * config.presence.renew_ms:
        yield (
            f"presence.lease_ms is {config.presence.lease_ms:,}; must be at least twice presence.renew_ms "
            f"({config.presence.renew_ms:,})"
        )
    for name, section in (("node", node), ("api", api)):
        yield from _tls_pair(name, section.tls_cert, section.tls_key)
    yield from _exposure(config)
    yield from _kind_problems(config.kinds)
    yield from _secrets(config)


def _tls_pair(name: str, cert: str, key: str) -> Iterator[str]:
    if bool(cert) != bool(key):
        absent = "key" if cert else "cert"
        yield f"{name}.tls_cert and {name}.tls_key go together; {name}.tls_{absent} is missing"
    for what, path in (("cert", cert), ("key", key)):
        if path and not os.access(path, os.R_OK):
            yield f"{name}.tls_{what} is {path!r}; cannot be read"


def _exposure(config: Config) -> Iterator[str]:
    node, api = config.node, config.api
    if node.plain and not (config.dev and is_loopback(split_address(node.listen)[0])):
        yield f"node.plain needs --dev and a loopback address; node.listen is {node.listen!r}"
    if not config.dev and not node.tls_cert and not node.balancers:
        yield "node.tls_cert is empty; outside --dev set it and node.tls_key, or node.balancers that end TLS"
    if not is_loopback(split_address(api.listen)[0]) and not api.tls_cert and not api.plain:
        yield (
            f"api.listen is {api.listen!r}, open to other machines; set api.tls_cert and api.tls_key, or "
            f"api.plain where a balancer ends TLS"
        )


def _kind_problems(kinds: Mapping[str, KindSection]) -> Iterator[str]:
    numbers = {rule.name: int(rule.kind) for rule in DEFAULT_KINDS.values()}
    taken: dict[int, str] = {number: name for name, number in numbers.items()}
    span = f"a kind of your own has a number of {FIRST_CUSTOM_KIND}-{LAST_CUSTOM_KIND:,}"
    for name, row in kinds.items():
        if name in numbers:
            if row.kind not in (None, numbers[name]):
                yield f"kinds.{name}.kind is {row.kind}; {name} is {numbers[name]} for ever"
            continue
        if row.kind is None:
            yield f"kinds.{name}.kind is missing; {span}"
        elif row.kind < FIRST_CUSTOM_KIND:
            yield f"kinds.{name}.kind is {row.kind}; {span}"
        elif row.kind in taken:
            yield f"kinds.{name}.kind is {row.kind}, which kinds.{taken[row.kind]} has"
        else:
            taken[row.kind] = name


def _secrets(config: Config) -> Iterator[str]:
    """Keys that can be loaded, secrets that nobody can guess."""
    try:
        keys = config.token_keys()
    except UsageError as error:
        yield str(error)
        return
    if not keys and not config.dev:
        yield "auth.issuers is empty: nobody could log in; name a key, or start with --dev"
    named = [(key.issuer, key.kid) for key in keys]
    for pair in dict.fromkeys(pair for pair in named if named.count(pair) > 1):
        yield f"auth.issuers has issuer {pair[0]!r} with kid {pair[1]!r} twice"
    webhook = config.push.webhook
    secret = webhook.secret.get_secret_value()
    if not webhook.url:
        return
    if config.dev:
        if len(secret) < 32:
            yield f"push.webhook.secret is {len(secret)} bytes; must be at least 32"
        return
    if not webhook.url.startswith("https://"):
        yield f"push.webhook.url is {webhook.url!r}; outside --dev it must start with https://"
    try:
        check_secret("push.webhook.secret", secret)
    except UsageError as error:
        yield str(error)
