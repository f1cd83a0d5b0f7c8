"""The command line as people use it: in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastim
from fastim.auth import Authenticator, Scope, create_dev_key
from fastim.clock import SystemClock
from fastim.config import load
from tests.system.served import environment, run_command


def test_version_is_printed_without_loading_a_server() -> None:
    assert run_command("version").stdout == f"fastim {fastim.__version__}\n"
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, fastim.cli; print(*sys.modules)"],
        capture_output=True, text=True, env=environment(), check=True,
    ).stdout.split()  # fmt: skip
    assert not {"uvloop", "pydantic", "apsw", "blacksheep", "httpx", "cryptography"} & set(loaded)


def test_help_names_every_command() -> None:
    text = run_command("--help").stdout
    for name in (
        "serve", "token", "send", "chat", "why", "audit", "genconfig", "checkconfig", "health", "version",
    ):  # fmt: skip
        assert f"\n  {name} " in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dance"], "dance"),
        (["serve", "--speed", "9"], "--speed"),
        (["token"], "USER"),
        (["token", "alice", "--data", "{tmp}"], "dev-key.pem does not exist"),
        (["token", "a b", "--data", "{dev}"], "'a b'"),
        (["token", "alice", "--scope", "king", "--data", "{dev}"], "'king'"),
        (["token", "alice", "--ttl", "soon", "--data", "{dev}"], "'soon' is no length of time"),
        (["token", "alice", "--ttl", "900d", "--data", "{dev}"], "ttl is"),
        (["token", "alice", "--kid", "k", "--data", "{dev}"], "go with --key-file"),
        (["token", "alice", "--key-file", "{tmp}/none"], "needs --issuer and --kid"),
        (["token", "alice", "--key-file", "{tmp}/none", "--issuer", "i", "--kid", "k"], "No such file"),
        (["audit", "--data", "{tmp}/none"], "is no data directory"),
        (["why", "12", "--data", "{tmp}/none"], "is no data directory"),
        (["why", "12", "--url", "ftp://x", "--token", "t"], "must start with http"),
        (["send", "bob", "hi"], "--as is missing"),
        (["send", "bob", "hi", "--token", "t"], "needs --as"),
        (["send", "alice", "hi", "--as", "alice", "--data", "{dev}"], "needs two users"),
        (
            ["send", "bob", "hi", "--as", "alice", "--data", "{dev}", "--url", "http://h:port"],
            "is no address",
        ),
        (["checkconfig", "{tmp}/none.toml"], "No such file"),
        (["genconfig", "-o", "{tmp}/no/where.toml"], "No such file"),
        (["serve", "--config", "{tmp}/none.toml"], "No such file"),
        (["serve", "--data", "{tmp}"], "auth.issuers is empty"),
        (["serve", "--dev", "--listen", "here", "--data", "{tmp}"], "node.listen is 'here'"),
        (["serve", "--dev", "--log-level", "loud", "--data", "{tmp}"], "log.level is 'LOUD'"),
        (["serve", "--dev", "--data", "/proc/none"], "data_dir is '/proc/none'"),
    ],
)
def test_mistake_is_one_sentence_and_exit_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "dev").mkdir()
    create_dev_key(tmp_path / "dev")
    typed = [text.format(tmp=tmp_path, dev=tmp_path / "dev") for text in arguments]
    done = run_command(*typed, cwd=tmp_path, code=2)
    assert words in done.stderr, done.stderr
    assert done.stdout == ""


def test_server_that_is_not_there_is_one_sentence_and_exit_1(tmp_path: Path) -> None:
    create_dev_key(tmp_path)
    nowhere = ["--url", "http://127.0.0.1:1", "--data", str(tmp_path)]
    for arguments in (["health"], ["send", "bob", "hi", "--as", "alice"]):
        done = run_command(*arguments, *nowhere, code=1)
        assert "http://127.0.0.1:1" in done.stderr
        assert done.stderr.count("\n") == 1


def test_minted_token_is_believed_by_a_server_of_the_same_directory(tmp_path: Path) -> None:
    key = create_dev_key(tmp_path)
    text = run_command(
        "token", "alice", "--scope", "client", "--scope", "service", "--ttl", "5m", "--device", "d0",
        "--data", str(tmp_path),
    ).stdout.strip()  # fmt: skip
    identity = Authenticator([key.verifier()], "fastim", SystemClock()).verify(text)
    assert (identity.user, identity.device) == ("alice", "d0")
    assert identity.scopes == {Scope.CLIENT, Scope.SERVICE}
    assert 290_000 < identity.expires_ms - time.time() * 1000 <= 300_000


def test_token_of_a_secret_file_is_believed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(os.urandom(32).hex())
    text = run_command(
        "token", "bob", "--key-file", str(secret), "--issuer", "me", "--kid", "k1"
    ).stdout.strip()
    issuer = {"issuer": "me", "kid": "k1", "algorithm": "HS256", "key_file": str(secret)}
    keys = load({"dev": True, "auth": {"issuers": [issuer]}}).token_keys()
    assert Authenticator(keys, "fastim", SystemClock()).verify(text).user == "bob"


def test_generated_configuration_is_good_once_somebody_can_log_in(tmp_path: Path) -> None:
    path = tmp_path / "fastim.toml"
    run_command("genconfig", "-o", str(path))
    assert path.read_text() == run_command("genconfig").stdout
    assert "already" not in run_command("checkconfig", str(path), code=2).stdout
    assert "File exists" in run_command("genconfig", "-o", str(path), code=2).stderr
    path.write_text(path.read_text().replace("#dev = false", "dev = true"))
    assert "is good (development" in run_command("checkconfig", str(path)).stdout


def test_every_problem_of_a_configuration_gets_a_line(tmp_path: Path) -> None:
    path = tmp_path / "fastim.toml"
    path.write_text("dev = true\n[node]\nprobe_ms = 1\nlistne = 'x'\n")
    done = run_command("checkconfig", str(path), code=2)
    assert done.stderr.count("\nfastim: ") == 1
    assert "did you mean node.listen?" in done.stderr


def test_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m fastim genconfig | head -1", shell=True, capture_output=True, text=True,
        env=environment(), timeout=60,
    )  # fmt: skip
    assert done.stdout.startswith("# fastim")
    assert done.stderr == ""


def test_configuration_file_may_come_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "fastim.toml"
    path.write_text(f"data_dir = {json.dumps(str(tmp_path / 'elsewhere'))}\n")
    done = run_command("token", "alice", code=2, FASTIM_CONFIG=str(path))
    assert "elsewhere/dev-key.pem" in done.stderr
