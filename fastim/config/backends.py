"""Where the store, the bus and presence are: embedded in the process, or servers that processes share.

A URL may hold a password, so it is a secret as a whole: no error and no repr shows it, `shown` says what may
be said. Which servers go with which process is coherence's to say.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from pydantic_settings import NoDecode

EMBEDDED_STORE: Final = "sqlite:"
EMBEDDED: Final = "memory:"
SERVERS: Final = {
    "bus": "kafka://host:9092,host:9092",
    "presence": "redis://host:6379",
    "store": "postgresql://user@host/database",
}
"""What to write for each backend that is to be a server."""

_KAFKA: Final = re.compile(r"kafka://[^\s/,@?]+(,[^\s/,@?]+)*/?")
_REDIS: Final = re.compile(r"rediss?(\+cluster)?://\S+")
_POSTGRES: Final = re.compile(r"postgres(ql)?://\S+")


class Section(BaseModel):
    """A table of the configuration."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)


def shown(url: str) -> str:
    """A URL as logs and people may see it: without its password and its options."""
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        return url
    place = rest.partition("?")[0]
    credentials, at, hosts = place.rpartition("@")
    user = credentials.partition(":")[0]
    return f"{scheme}://{user}{at}{hosts}"


def _bus(url: SecretStr) -> SecretStr:
    text = url.get_secret_value()
    if text != EMBEDDED and not _KAFKA.fullmatch(text):
        raise ValueError(
            f"must be {EMBEDDED} or {SERVERS['bus']} (user and password are bus.user, bus.password)"
        )
    return url


def _presence(url: SecretStr) -> SecretStr:
    text = url.get_secret_value()
    if text != EMBEDDED and not _REDIS.fullmatch(text):
        raise ValueError(
            f"must be {EMBEDDED}, {SERVERS['presence']}, rediss:// or redis+cluster://host:6379,…"
        )
    return url


def _listed(value: Any) -> Any:
    """One URL is a list of one. The environment's lists are JSON."""
    if not isinstance(value, str):
        return value
    if not value.startswith("["):
        return (value,)
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("must be a URL, or a JSON list of them") from None


def _store(urls: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    texts = [url.get_secret_value() for url in urls]
    if len(texts) == 1 and texts[0].startswith(EMBEDDED_STORE):
        return urls
    if not texts or not all(_POSTGRES.fullmatch(text) for text in texts):
        raise ValueError(f"must be sqlite:, sqlite:/a/directory, or one {SERVERS['store']} per database")
    if len(set(texts)) < len(texts):
        raise ValueError("must name each database once")
    return urls


class StoreSection(Section):
    """Where messages are kept."""

    url: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_listed), AfterValidator(_store)] = Field(
        default=(SecretStr(EMBEDDED_STORE),),
        description="sqlite: (in data_dir) or sqlite:/another/directory; or a list of "
        f"{SERVERS['store']}, one per database, always the same ones.",
    )
    pool_size: int = Field(
        default=8, ge=2, le=1_000, description="Connections of this process to each PostgreSQL database."
    )


class BusSection(Section):
    """What carries records between the parts."""

    url: Annotated[SecretStr, AfterValidator(_bus)] = Field(
        default=SecretStr(EMBEDDED),
        description=f"memory: is the embedded one; {SERVERS['bus']} names brokers to begin with.",
    )
    bound_records: int = Field(
        default=200_000,
        ge=1_000,
        le=10_000_000,
        description="Records a topic of memory: may hold; then senders are refused.",
    )
    tls: bool = Field(default=False, description="Speak TLS to the brokers.")
    tls_ca: str = Field(
        default="", description="PEM file of who signs their certificates; else the system's."
    )
    tls_cert: str = Field(default="", description="PEM file of a certificate to show them.")
    tls_key: str = Field(default="", description="PEM file with its private key.")
    sasl: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        default="", description="How to log in at the brokers; empty: not."
    )
    user: str = Field(default="", description="As whom.")
    password: SecretStr = Field(default=SecretStr(""), description="Its password.")
    submit_partitions: int = Field(
        default=16,
        ge=1,
        le=10_000,
        description="Of the topic submit, for ever: no more dispatchers than this share the work.",
    )
    undelivered_partitions: int = Field(
        default=4, ge=1, le=10_000, description="Of the topic undelivered, for ever."
    )
    replication: int = Field(
        default=0, ge=0, le=9, description="Copies of each topic that is made; 0: as the brokers have it."
    )


class PresenceSection(Section):
    """Who is connected where."""

    url: Annotated[SecretStr, AfterValidator(_presence)] = Field(
        default=SecretStr(EMBEDDED),
        description=f"memory: is the embedded one; {SERVERS['presence']}, rediss:// with TLS, "
        "redis+cluster://host:6379,host:6379; user:password@ before the host; ?prefix= before every key.",
    )
    lease_ms: int = Field(
        default=6_000, ge=1_000, le=60_000, description="A node that does not renew is gone after it."
    )
    renew_ms: int = Field(default=2_000, ge=100, le=20_000, description="How often a node renews its lease.")
