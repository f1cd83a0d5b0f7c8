"""Where presence is, who may ask it, and over which wire."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastim.errors import PresenceUnavailable, UsageError
from fastim.presence.shards import Target
from tests.presence.servers import asked, free_port, presence_at, server, with_prefix

Need = Callable[..., None]


@pytest.fixture
def program(need: Need) -> str:
    need("redis-server")
    found = shutil.which("redis-server")
    assert found is not None
    return found


async def works(url: str) -> bool:
    """One of everything."""
    async with presence_at(url) as presence:
        await presence.open_lease("n1", 1, 60_000)
        attachment, _ = await presence.attach("alice", "phone", "app", "n1", 1, "s1")
        await presence.attach("alice", "phone", "app", "n1", 1, "s1")
        await presence.enter("lobby", "n1", 1, 1)
        watcher = presence.watch()
        await watcher.watch(["alice"], ["lobby"])
        assert await presence.renew("n1", 1, 60_000)
        await presence.leave("lobby", "n1", 1)
        assert (await watcher.changes()).rooms == {"lobby"}
        await presence.detach("alice", "phone", attachment.generation)
        found = (await presence.locate(["alice"]))["alice"]
        await presence.end_lease("n1", 1)
        return len(found.attachments) == 1


# ------------------------------------------------------------------------------------------------ addresses


def test_a_url_names_one_server() -> None:
    target = Target("redis://im:p%40ss@example.org:7000/3?prefix=im:")
    assert (target.seeds, target.user, target.password) == ([("example.org", 7000)], "im", "p@ss")
    assert (target.database, target.prefix, target.cluster, target.tls) == (3, "im:", False, False)


def test_a_url_names_a_cluster_by_any_of_its_servers() -> None:
    target = Target("rediss+cluster://:secret@h1:7000,[2001:db8::1]:7001,h3?ssl_ca_certs=/etc/ca.pem")
    assert target.seeds == [("h1", 7000), ("2001:db8::1", 7001), ("h3", 6379)]
    assert (target.user, target.password, target.cluster, target.tls) == (None, "secret", True, True)
    assert (target.prefix, target.tls_options) == ("fastim:", {"ssl_ca_certs": "/etc/ca.pem"})


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://h:1/0", r"scheme of presence.url is 'http'"),
        ("redis://h1:1,h2:2/0", r"2 servers; more than 1 is redis\+cluster"),
        ("redis://h1:1/zero", "database of presence.url is 'zero'"),
        ("redis+cluster://h1:1/2", "0 in a cluster"),
        ("redis://h1:port/0", "'h1:port'; must be host:port"),
        ("redis://h1:1/0?protocol=3", "unknown settings: protocol"),
        ("redis://h1:1/0?ssl_ca_certs=/etc/ca.pem", "unknown settings: ssl_ca_certs"),
    ],
)
def test_a_url_that_cannot_be_followed_is_refused(url: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Target(url)


async def test_a_password_is_in_no_error() -> None:
    async with presence_at(f"redis://im:hunter2@127.0.0.1:{free_port()}/0") as presence:
        with pytest.raises(PresenceUnavailable) as error:
            await presence.nodes()
        assert "hunter2" not in str(error.value)


# ------------------------------------------------------------------------------------------ who may ask

DECISION = Path(__file__).parents[2] / "docs" / "adr" / "0090-redis-presence.md"


def documented_rights() -> list[str]:
    """What follows the password in the ACL line of the decision."""
    (line,) = [line for line in DECISION.read_text().splitlines() if line.strip().startswith("ACL SETUSER")]
    return line.split(">PASSWORD")[1].split()


async def test_a_user_with_the_documented_rights_can_do_everything(program: str, tmp_path: Path) -> None:
    port = free_port()
    with server(program, tmp_path / "redis", "--port", str(port)):
        url = f"redis://im:secret@127.0.0.1:{port}/0"
        with asked(url) as admin:
            admin.execute_command("ACL", "SETUSER", "im", "on", ">secret", *documented_rights())
        assert await works(url)


async def test_a_user_without_rights_is_unavailable(program: str, tmp_path: Path) -> None:
    port = free_port()
    with server(program, tmp_path / "redis", "--port", str(port)):
        url = f"redis://im:secret@127.0.0.1:{port}/0"
        with asked(url) as admin:
            admin.execute_command("ACL", "SETUSER", "im", "on", ">secret", "-@all", "+@connection")
        async with presence_at(url) as presence:
            with pytest.raises(PresenceUnavailable, match="NoPermission"):
                await presence.nodes()


async def test_keys_begin_with_the_prefix_and_nothing_else(redis_server: str) -> None:
    url = with_prefix(redis_server)
    async with presence_at(url) as presence:
        await presence.open_lease("n1", 1, 60_000)
        await presence.attach("alice", "phone", "app", "n1", 1, "s1")
        await presence.enter("lobby", "n1", 1, 1)
    prefix = Target(url).prefix
    with asked(url) as redis:
        keys = sorted(key.removeprefix(prefix) for key in redis.scan_iter(f"{prefix}*"))
    assert keys == ["epoch:{0}", "leases", "r:lobby", "u:alice"]


# ------------------------------------------------------------------------------------------------- TLS


@pytest.fixture
def certificates(tmp_path: Path, need: Need) -> Iterator[Path]:
    """ca.pem, and server.pem with server.key for 127.0.0.1."""
    need("openssl")
    here = tmp_path / "tls"
    here.mkdir()

    new = ("req", "-newkey", "ed25519", "-nodes", "-keyout")
    sign = ("x509", "-req", "-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial", "1")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=here, check=True, capture_output=True)

    openssl(*new, "ca.key", "-x509", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test ca")
    openssl(*new, "other.key", "-x509", "-out", "other.pem", "-days", "2", "-subj", "/CN=other ca")
    openssl(*new, "server.key", "-out", "server.csr", "-subj", "/CN=server")
    (here / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(*sign, "-in", "server.csr", "-out", "server.pem", "-days", "2", "-extfile", "san")
    return here


async def test_everything_works_over_tls_with_both_sides_proved(
    program: str, certificates: Path, tmp_path: Path
) -> None:
    port = free_port()
    files = {"cert-file": "server.pem", "key-file": "server.key", "ca-cert-file": "ca.pem"}
    tls = ["--port", "0", "--tls-port", str(port)]
    for name, file in files.items():
        tls += [f"--tls-{name}", str(certificates / file)]
    with server(program, tmp_path / "redis", *tls):
        mine = f"ssl_certfile={certificates}/server.pem&ssl_keyfile={certificates}/server.key"
        url = f"rediss://127.0.0.1:{port}/0?{mine}&ssl_ca_certs={certificates}"
        assert await works(f"{url}/ca.pem")
        async with presence_at(f"{url}/other.pem") as stranger:
            with pytest.raises(PresenceUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.nodes()
