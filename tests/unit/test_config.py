"""fastim.config: where values come from, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import secrets
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fastim.app.access import seal_keys
from fastim.config import Config, ConfigError, Role, load, shown, split_address, template
from fastim.config.schema import known_keys
from fastim.model import DEFAULT_KINDS
from fastim.sealing import StaticKey

DEV = {"dev": True}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("FASTIM_")]:
        monkeypatch.delenv(name)


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fastim.toml"
    path.write_text(text)
    return path


def problems(flags: dict[str, Any] | None = None, path: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(flags, path)
    return list(caught.value.problems)


def public_key() -> str:
    key = Ed25519PrivateKey.generate().public_key()
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


def production(**tables: Any) -> dict[str, Any]:
    """Flags that are good enough outside --dev."""
    issuer = {"issuer": "https://login.example.org", "kid": "k1", "key": public_key()}
    return {"auth": {"issuers": [issuer]}, "node": {"balancers": ["10.0.0.0/8"]}} | tables


# ------------------------------------------------------------------------------------------- precedence


def test_flags_win_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path, "[node]\nprobe_ms = 1001\nack_timeout_ms = 5001\nslow_ms = 5002\nname = 'filed'\n")
    monkeypatch.setenv("FASTIM_NODE__ACK_TIMEOUT_MS", "6001")
    monkeypatch.setenv("FASTIM_NODE__SLOW_MS", "6002")
    config = load({"dev": True, "node": {"slow_ms": 7002}}, path)
    node = config.node
    assert (node.name, node.probe_ms, node.ack_timeout_ms, node.slow_ms) == ("filed", 1001, 6001, 7002)
    assert node.heartbeat_ms == 10_000


def test_development_needs_nothing_but_the_flag() -> None:
    config = load(DEV)
    assert config.dev
    assert config.token_keys() == []
    assert config.store_path == config.data_path == Path("fastim-data")


def test_store_may_live_in_another_directory() -> None:
    assert load(DEV | {"store": {"url": "sqlite:/srv/im"}}).store_path == Path("/srv/im")


SERVERS = {
    "bus": {"url": "kafka://h1:9092,h2:9092"},
    "presence": {"url": "redis://im:hush@h:6379"},
    "store": {"url": ["postgresql://im:hush@h1/d", "postgresql://im:hush@h2/d"]},
}


def test_backends_are_chosen_by_url() -> None:
    assert load(DEV).embedded
    config = load(DEV | SERVERS)
    assert not config.embedded
    assert config.store_urls == SERVERS["store"]["url"]
    assert load(DEV | SERVERS | {"store": {"url": "postgresql://h/d"}}).store_urls == ["postgresql://h/d"]


@pytest.mark.parametrize("text", ["postgresql://im:hush@h/d", '["postgresql://im:hush@h/d"]'])
def test_environment_names_databases_alone_or_as_a_list(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FASTIM_STORE__URL", text)
    monkeypatch.setenv("FASTIM_BUS__URL", "kafka://h:9092")
    monkeypatch.setenv("FASTIM_PRESENCE__URL", "redis://h")
    assert load(DEV).store_urls == ["postgresql://im:hush@h/d"]


@pytest.mark.parametrize("role", ["node", "dispatch", "api"])
def test_process_of_a_cluster_says_which_servers_it_needs(role: Role) -> None:
    with pytest.raises(ConfigError) as caught:
        load(DEV | {"presence": {"url": "redis://h"}}, role=role)
    (problem,) = caught.value.problems
    assert f"`fastim {role}` works with other processes on three servers" in problem
    assert "bus, store are embedded" in problem
    for words in ("bus.url = kafka://", "presence.url = redis://", "store.url = postgresql://"):
        assert words in problem
    load(DEV | SERVERS, role=role)


def test_process_is_asked_for_what_its_role_needs_and_no_more() -> None:
    load(SERVERS, role="dispatch")
    with pytest.raises(ConfigError, match=r"auth\.issuers is empty") as caught:
        load(SERVERS, role="api")
    assert len(caught.value.problems) == 1
    with pytest.raises(ConfigError, match=r"node\.tls_cert is empty"):
        load(SERVERS, role="node")


def test_urls_of_servers_are_shown_without_their_passwords() -> None:
    config = load(DEV | SERVERS)
    assert "hush" not in repr(config)
    assert [shown(url) for url in (config.presence_url, *config.store_urls)] == [
        "redis://im@h:6379", "postgresql://im@h1/d", "postgresql://im@h2/d",
    ]  # fmt: skip
    assert shown("redis://:hush@h:1/0?prefix=x") == "redis://@h:1/0"
    for wrong in ("mysql://im:hush@h/d", ["postgresql://im:hush@h/d", "x"]):
        assert "hush" not in " ".join(problems(DEV | SERVERS | {"store": {"url": wrong}}))


def test_production_loads_with_a_key_and_a_balancer() -> None:
    (key,) = load(production()).token_keys()
    assert (key.issuer, key.kid) == ("https://login.example.org", "k1")


def test_key_is_read_from_a_file(tmp_path: Path) -> None:
    pem = tmp_path / "login.pem"
    pem.write_text(public_key())
    flags = production()
    flags["auth"]["issuers"][0] |= {"key": "", "key_file": str(pem)}
    assert len(load(flags).token_keys()) == 1


def test_kinds_of_the_file_are_laid_over_the_built_in_ones(tmp_path: Path) -> None:
    path = file(tmp_path, "[kinds.order]\nkind = 64\nttl_ms = 60000\n[kinds.voice]\nmax_body_bytes = 1000\n")
    rules = load(DEV, path).kind_rules
    assert (rules[64].name, rules[64].ttl_ms, rules[64].preview) == ("order", 60_000, "[message]")
    assert (rules[3].name, rules[3].max_body_bytes, rules[3].preview) == ("voice", 1_000, "[voice]")
    assert rules[1] == DEFAULT_KINDS[1]


# -------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes = 1\n", "nodes is an unknown key"),
        ("[node]\nlisten_on = 'x'\n", "node.listen_on is an unknown key"),
        ("[node]\nheartbeat = 1\n", "did you mean node.heartbeat_ms?"),
        ("[push.webhook]\nkey = 'x'\n", "push.webhook.key is an unknown key"),
        ("[kinds.order]\nkind = 64\nweight = 3\n", "weight is an unknown key"),
        (
            "[[auth.issuers]]\nissuer='i'\nkid='k'\nkey='x'\njwks_url='http://x'\n",
            "jwks_url is an unknown key",
        ),
    ],
)
def test_unknown_key_of_the_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = file(tmp_path, text)
    found = problems(DEV, path)
    assert any(words in problem and str(path) in problem for problem in found), found


def test_unknown_key_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTIM_NODE__LISTN", "127.0.0.1:1")
    monkeypatch.setenv("FASTIM_DATADIR", "/srv")
    assert problems(DEV) == [
        "the environment has FASTIM_DATADIR, an unknown key; did you mean FASTIM_DATA_DIR?",
        "node.listn is an unknown key; did you mean node.listen? (environment, FASTIM_NODE__LISTN)",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "FASTIM_CONFIG", "FASTIM_TOKEN", "FASTIM_BUILD", "FASTIM_REQUIRE",
        "FASTIM_KAFKA", "FASTIM_KAFKA3", "FASTIM_POSTGRES", "FASTIM_POSTGRES2", "FASTIM_REDIS",
        "FASTIM_VALKEY",
    ],
)  # fmt: skip
def test_names_that_are_no_settings_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "anything")
    load(DEV)


def test_every_key_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in known_keys():
        value = Config.model_construct().model_dump()
        for part in key.split("."):
            value = value[part]
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            monkeypatch.setenv("FASTIM_" + key.upper().replace(".", "__"), str(value))
    assert load(DEV).node == load(DEV).node


# -------------------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"node": {"heartbeat_ms": 1}}, "node.heartbeat_ms is 1; must be 100-300,000 (command line)"),
        ({"node": {"listen": "8443"}}, "node.listen is '8443'; must be host:port"),
        ({"node": {"listen": "h:99999"}}, "the port must be 0-65535"),
        ({"node": {"name": "no spaces"}}, "node.name is 'no spaces'; must match"),
        ({"node": {"balancers": ["10.0.0.0/99"]}}, "node.balancers[0]"),
        ({"node": {"origins": ["https://Example.org/"]}}, "must be an origin as browsers send it"),
        ({"node": {"heartbeat_ms": "often"}}, "node.heartbeat_ms is 'often'"),
        ({"node": {"idle_ms": 15_000}}, "node.idle_ms is 15,000; must be at least twice node.heartbeat_ms"),
        ({"node": {"ack_timeout_ms": 3_000}}, "node.ack_timeout_ms is 3,000; must be above node.probe_ms"),
        ({"presence": {"lease_ms": 3_000}}, "presence.lease_ms is 3,000; must be at least twice"),
        (
            {"node": {"drain_window_ms": 20_000}},
            "node.drain_window_ms and dispatch.stop_ms are 30,000 together; must be at most 25,000",
        ),
        ({"store": {"url": "mysql://x"}}, "store.url is not as it must be; must be sqlite:, sqlite:/a/dir"),
        ({"store": {"url": ["sqlite:", "sqlite:/b"]}}, "or one postgresql://user@host/database per database"),
        ({"store": {"url": ["postgresql://u@h/d"] * 2}}, "must name each database once"),
        ({"bus": {"url": "kafka:"}}, "bus.url is not as it must be; must be memory: or kafka://host:9092"),
        ({"bus": {"url": "kafka://u:pw@h:9092"}}, "user and password are bus.user, bus.password"),
        ({"bus": {"sasl": "PLAIN"}}, "bus.sasl, bus.user and bus.password go together"),
        ({"bus": {"tls_ca": "ca.pem"}}, "bus.tls_ca and bus.tls_cert are for bus.tls, which is not set"),
        ({"presence": {"url": "http://h"}}, "presence.url is not as it must be; must be memory:, redis://"),
        (
            {"presence": {"url": "redis://h"}},
            "presence.url names a server, bus.url and store.url not; all three do, or none",
        ),
        ({"dispatch": {"backoff_ms": []}}, "dispatch.backoff_ms"),
        ({"dispatch": {"backoff_jitter": 1.5}}, "dispatch.backoff_jitter is 1.5; must be 0.0-1.0"),
        ({"api": {"tls_cert": "c.pem"}}, "api.tls_cert and api.tls_key go together; api.tls_key is missing"),
        ({"log": {"level": "LOUD"}}, "log.level is 'LOUD'"),
        (
            {"kinds": {"order": {}}},
            "kinds.order.kind is missing; a kind of your own has a number of 64-65,535",
        ),
        ({"kinds": {"order": {"kind": 9}}}, "kinds.order.kind is 9"),
        ({"kinds": {"text": {"kind": 2}}}, "kinds.text.kind is 2; text is 1 for ever"),
        ({"kinds": {"a": {"kind": 64}, "b": {"kind": 64}}}, "kinds.b.kind is 64, which kinds.a has"),
        ({"kinds": {"Order": {"kind": 64}}}, "kinds.Order"),
        (
            {"kinds": {"text": {"max_body_bytes": 61_441}}},
            "kinds.text.max_body_bytes is 61441; must be 1-61,440",
        ),
    ],
)
def test_bad_value_is_shown_with_its_limit(flags: dict[str, Any], words: str) -> None:
    found = problems(DEV | flags)
    assert any(words in problem for problem in found), found


def test_all_problems_are_told_at_once() -> None:
    found = problems({"dev": True, "node": {"probe_ms": 0, "slow_ms": 0}, "api": {"listen": "?"}})
    assert len(found) == 3


def test_environment_is_named_where_its_value_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTIM_NODE__PROBE_MS", "0")
    assert problems(DEV) == ["node.probe_ms is '0'; must be 10-60,000 (environment, FASTIM_NODE__PROBE_MS)"]


def test_list_in_the_environment_must_be_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTIM_NODE__ORIGINS", '["https://chat.example.org"]')
    assert load(DEV).node.origins == ["https://chat.example.org"]
    monkeypatch.setenv("FASTIM_NODE__ORIGINS", "https://chat.example.org")
    (problem,) = problems(DEV)
    assert "not JSON" in problem


def test_file_that_is_missing_or_no_toml_is_one_sentence(tmp_path: Path) -> None:
    assert problems(DEV, tmp_path / "none.toml") == [f"{tmp_path / 'none.toml'}: No such file or directory"]
    (problem,) = problems(DEV, file(tmp_path, json.dumps({"node": {"listen": "127.0.0.1:1"}})))
    assert "is not TOML" in problem
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (problem,) = problems(DEV, tmp_path / "binary.toml")
    assert "is not TOML" in problem


# ----------------------------------------------------------------------------------------------- exposure


def test_nothing_configured_is_refused_outside_dev() -> None:
    found = problems()
    assert any("auth.issuers is empty" in problem for problem in found)
    assert any("node.tls_cert is empty" in problem for problem in found)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            production(node={"plain": True, "balancers": ["10.0.0.1"]}),
            "node.plain needs --dev and a loopback",
        ),
        (DEV | {"node": {"plain": True, "listen": "0.0.0.0:8443"}}, "node.plain needs --dev and a loopback"),
        (DEV | {"node": {"proxy_protocol": True}}, "node.proxy_protocol needs node.balancers"),
        (production(api={"listen": "0.0.0.0:8080"}), "api.listen is '0.0.0.0:8080', open to other machines"),
        (
            production(push={"webhook": {"url": "http://h", "secret": "0" * 64}}),
            "does not start with https://",
        ),
        (DEV | {"node": {"tls_cert": "/none.pem", "tls_key": "/none.pem"}}, "'/none.pem'; cannot be read"),
    ],
)
def test_open_doors_are_refused(flags: dict[str, Any], words: str) -> None:
    found = problems(flags)
    assert any(words in problem for problem in found), found


def test_keys_to_seal_with_are_read_from_their_files(tmp_path: Path) -> None:
    pem, psk = tmp_path / "seal.pem", tmp_path / "psk"
    pem.write_bytes(StaticKey.generate("k").pem())
    psk.write_text("ab" * 32)
    node = {
        "balancers": ["10.0.0.0/8"],
        "seal_keys": [{"name": "2026-01", "file": str(pem)}],
        "seal_shared": [{"name": "factory", "file": str(psk)}],
        "require_sealed": True,
    }
    seals = seal_keys(load(production(node=node)))
    assert seals is not None
    assert [key.name for key in seals.public] == ["2026-01"]
    assert seals.required
    assert seal_keys(load(production())) is None


def test_development_makes_a_key_to_seal_with_where_none_is_named(tmp_path: Path) -> None:
    config = load({"dev": True, "data_dir": str(tmp_path)})
    made, again = seal_keys(config), seal_keys(config)
    assert made is not None
    assert again is not None
    assert str(made.public[0]) == str(again.public[0])
    assert made.public[0].name == "dev"
    assert not made.required


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"require_sealed": True}, "node.require_sealed is set and node.seal_keys is empty"),
        (
            {"seal_shared": [{"name": "a", "file": __file__}]},
            "node.seal_shared is set and node.seal_keys is empty",
        ),
        (
            {"seal_keys": [{"name": "a", "file": "/nowhere"}]},
            "node.seal_keys[0].file is '/nowhere'; cannot be read",
        ),
        (
            {"seal_keys": [{"name": "a", "file": __file__}, {"name": "a", "file": __file__}]},
            "node.seal_keys has the name 'a' twice",
        ),
        ({"seal_keys": [{"name": "a:b", "file": __file__}]}, "node.seal_keys[0].name is 'a:b'; must match"),
        ({"seal_keys": [{"name": "a"}]}, "node.seal_keys[0].file is missing"),
    ],
)
def test_keys_that_cannot_seal_are_refused(node: dict[str, Any], words: str) -> None:
    flags = production(node={"balancers": ["10.0.0.0/8"], **node})
    assert any(words in problem for problem in problems(flags)), problems(flags)


def test_rest_beyond_loopback_is_allowed_behind_a_balancer_that_ends_tls() -> None:
    assert load(production(api={"listen": "0.0.0.0:8080", "plain": True})).api.plain


@pytest.mark.parametrize(("text", "parts"), [("[::1]:80", ("::1", 80)), ("h.example:0", ("h.example", 0))])
def test_address_is_split(text: str, parts: tuple[str, int]) -> None:
    assert split_address(text) == parts


# ------------------------------------------------------------------------------------------------- secrets


def test_weak_secret_is_refused_and_not_shown() -> None:
    for weak in ("changeme", "secretsecretsecretsecretsecretsecret", "0123456789abcdef" * 4):
        issuer = {"issuer": "i", "kid": "k", "algorithm": "HS256", "key": weak}
        for flags in (
            production(auth={"issuers": [issuer]}),
            production(push={"webhook": {"url": "https://h/x", "secret": weak}}),
        ):
            found = problems(flags)
            assert found
            assert weak not in " ".join(found)


def test_random_secret_is_taken() -> None:
    secret = secrets.token_hex(32)
    flags = production(push={"webhook": {"url": "https://h/x", "secret": secret}})
    flags["auth"]["issuers"].append({"issuer": "i", "kid": "k", "algorithm": "HS256", "key": secret})
    config = load(flags)
    assert secret not in repr(config)
    assert secret not in str(config)
    assert secret not in repr(config.token_keys())


@pytest.mark.parametrize(
    "flags",
    [
        {"auth": {"issuers": "S3CRET-VALUE"}},
        {"auth": {"issuers": ["S3CRET-VALUE"]}},
        {"auth": {"issuers": [{"issuer": "i", "kid": "k", "key": ["S3CRET-VALUE"]}]}},
        {"auth": {"issuers": [{"issuer": "i", "kid": "k", "key": {"a": "S3CRET-VALUE"}}]}},
        {"auth": {"issuers": [{"issuer": "i", "kid": "k", "key": "S3CRET-VALUE"}]}},
        {"push": {"webhook": "S3CRET-VALUE"}},
        {"push": "S3CRET-VALUE"},
        {"push": {"webhook": {"secret": ["S3CRET-VALUE"]}}},
        {"push": {"webhook": {"url": "https://h", "secret": "S3CRET-VALUE"}}},
    ],
)
def test_no_problem_shows_a_secret(flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(DEV | flags)
    assert "S3CRET" not in str(caught.value)
    assert "S3CRET" not in repr(caught.value)


def test_secret_of_the_environment_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTIM_AUTH__ISSUERS", '[{"key": "S3CRET-VALUE"')
    assert "S3CRET" not in " ".join(problems(DEV))


def test_same_issuer_and_kid_twice_is_refused() -> None:
    flags = production()
    flags["auth"]["issuers"] *= 2
    (problem,) = problems(flags)
    assert "twice" in problem


def test_key_and_key_file_exclude_each_other(tmp_path: Path) -> None:
    flags = production()
    flags["auth"]["issuers"][0]["key_file"] = str(tmp_path / "k.pem")
    assert problems(flags) == ["auth.issuers[0] needs one of key and key_file"]
    flags["auth"]["issuers"][0]["key"] = ""
    (problem,) = problems(flags)
    assert "No such file" in problem


# ------------------------------------------------------------------------------------------------ template


def test_template_is_a_configuration_of_the_defaults(tmp_path: Path) -> None:
    assert load(DEV, file(tmp_path, template())).model_dump() == load(DEV).model_dump()


def test_template_holds_every_key_at_its_default(tmp_path: Path) -> None:
    scalars = (
        template().partition("#[[auth.issuers]]")[0]
        + "[push.webhook]"
        + (template().partition("[push.webhook]")[2].partition("#[kinds.order]")[0])
    )
    text = "\n".join(line.removeprefix("#") if line[:2] != "# " else "" for line in scalars.splitlines())
    parsed = tomllib.loads(text)
    keys = {f"{table}.{key}" for table, rows in parsed.items() if isinstance(rows, dict) for key in rows}
    assert load({}, file(tmp_path, text.replace("dev = false", "dev = true"))).model_dump() == (
        load(DEV).model_dump()
    )
    absent = {key for key in known_keys() if key.count(".") == 1} - keys
    assert absent == {"auth.issuers"}


def test_templates_examples_are_taken_when_uncommented(tmp_path: Path) -> None:
    pem = tmp_path / "login.pem"
    pem.write_text(public_key())
    text = template().replace("/etc/fastim/login.pem", str(pem)).replace("#dev = false", "dev = true")
    text = "\n".join(line.removeprefix("#") if line[:2] != "# " else "" for line in text.splitlines())
    config = load({}, file(tmp_path, text.replace("dev = false", "dev = true")))
    assert config.kind_rules[64].name == "order"
    assert len(config.token_keys()) == 1
