"""A whole cluster on this machine: three servers, four nodes, two dispatchers, an api. Until Ctrl-C.

    deploy/dev/cluster [--dir DIR] [--port BASE]

Kafka, Redis and PostgreSQL (two databases) come from deploy/dev/servers; then two `fastim node --workers 2`,
two `fastim dispatch` and one `fastim api`, each a process of its own, with development keys in DIR (default
.dev/cluster). What ends by itself is started again after a second. The servers' data stay: the next start has
the messages of this one. --port: the first of the ports of fastim itself (default 8443; REST at + 2, status
pages from + 10 on).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SERVERS = ("kafka", "redis", "postgres")
START_S = 60.0
STOP_S = 35.0
AGAIN_S = 1.0
USERS = ("alice", "bob")


class Member:
    """One process of fastim."""

    def __init__(self, name: str, command: list[str], announces: int, directory: Path) -> None:
        self.name = name
        self.command = command
        self.log = directory / f"{name}.log"
        self.announced: list[str] = []
        """The lines that it prints when it is there."""
        self._announces = announces
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.announced = []
        with self.log.open("a") as log:
            # A session of its own: Ctrl-C comes once, through us.
            self.process = subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, start_new_session=True
            )
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.announced.append(line.rstrip())

    @property
    def ready(self) -> bool:
        return len(self.announced) >= self._announces

    @property
    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-5:])


class Cluster:
    def __init__(self, directory: Path, port: int) -> None:
        self.directory = directory
        self.port = port
        self.config = directory / "fastim.toml"
        self.members: list[Member] = []
        self.stopping = threading.Event()

    def servers(self, verb: str) -> str:
        command = [str(HERE / "servers"), verb, "--dir", str(self.directory)]
        if verb == "start":
            command += ["--port", "0"]  # ports that are free; remembered for the next start
        if verb != "env":
            command += SERVERS
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.returncode)
        return done.stdout

    def configure(self) -> None:
        """One file for all processes; their names and addresses are on their command lines."""
        urls = dict(shlex.split(line)[1].split("=", 1) for line in self.servers("env").splitlines())
        databases = [urls["FASTIM_POSTGRES"], urls["FASTIM_POSTGRES2"]]
        self.config.write_text(
            f"dev = true\ndata_dir = {json.dumps(str(self.directory / 'fastim'))}\n\n"
            f"[store]\nurl = {json.dumps(databases)}\n\n"
            f"[bus]\nurl = {json.dumps(urls['FASTIM_KAFKA'])}\n\n"
            f"[presence]\nurl = {json.dumps(urls['FASTIM_REDIS'])}\n\n"
            # What a development machine has file descriptors for.
            f"[node]\nmax_connections = 5000\n\n"
            f'[api]\nlisten = "127.0.0.1:{self.port + 2}"\n'
        )

    def fastim(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "fastim", *arguments, "--config", str(self.config)]

    def start(self) -> None:
        """In order: the first of each kind makes what the others find."""
        host, port = "127.0.0.1", self.port
        for number in (1, 2):
            status = f"{host}:{port + 9 + number}"
            command = self.fastim("dispatch", "--name", f"d{number}", "--status-listen", status)
            self._await(Member(f"dispatch-{number}", command, 1, self.directory))
        for number, letter in enumerate("ab"):
            status = f"{host}:{port + 12 + 2 * number}"
            command = self.fastim(
                "node", "--name", letter, "--workers", "2", "--listen", f"{host}:{port + number}",
                "--status-listen", status,
            )  # fmt: skip
            self._await(Member(f"node-{letter}", command, 2, self.directory))
        self._await(Member("api", self.fastim("api"), 1, self.directory))

    def _await(self, member: Member) -> None:
        self.members.append(member)
        member.start()
        deadline = time.monotonic() + START_S
        while not member.ready and not self.stopping.is_set():
            if member.ended or time.monotonic() > deadline:
                raise SystemExit(f"{member.name} did not start; {member.log} says:\n{member.tail()}")
            time.sleep(0.05)

    def announce(self) -> None:
        for member in self.members:
            for line in member.announced:
                print(f"  {line.partition(' (')[0]}")
        print(f"\n{self.directory}/*.log is what they write, {self.config} their configuration.\n")
        own = f"{os.path.relpath(Path(sys.executable).parent / 'fastim')}"
        where = f"--config {os.path.relpath(self.config)}"
        print("Development tokens, good for a day:")
        for user in USERS:
            token = subprocess.run(
                self.fastim("token", user), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
            ).stdout.strip()
            print(f"  {user:<6}{token}")
        print("\nTalk across nodes, each in a terminal of its own:")
        for number, user in enumerate(USERS):
            print(f"  {own} chat {user} {where} --url wss://127.0.0.1:{self.port + number}/v1/ws")
        print(f"\nIs everything well?\n  {own} doctor {where}\n\nCtrl-C stops all of it.", flush=True)

    def watch(self) -> None:
        """Until somebody stops us: what ends by itself is started again."""
        while not self.stopping.wait(0.2):
            for member in self.members:
                if member.ended:
                    assert member.process is not None
                    code = member.process.returncode
                    print(
                        f"{member.name} ended with {code} and is started again; see {member.log}", flush=True
                    )
                    if not self.stopping.wait(AGAIN_S):
                        member.start()

    def stop(self) -> None:
        """Clients first, so that what they still say is stored."""
        print("\nstopping", flush=True)
        for kind in ("node", "api", "dispatch"):
            chosen = [one.process for one in self.members if one.name.startswith(kind) and one.process]
            for process in chosen:
                if process.poll() is None:
                    process.terminate()
            deadline = time.monotonic() + STOP_S
            for process in chosen:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="deploy/dev/cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=ROOT / ".dev" / "cluster")
    parser.add_argument("--port", type=int, default=8443)
    asked = parser.parse_args()
    cluster = Cluster(asked.dir.resolve(), asked.port)

    def on_signal(number: int, frame: FrameType | None) -> None:
        cluster.stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        print("starting Kafka, Redis and PostgreSQL", flush=True)
        cluster.servers("start")
        cluster.configure()
        cluster.start()
        if not cluster.stopping.is_set():
            cluster.announce()
            cluster.watch()
    finally:
        cluster.stop()
        cluster.servers("stop")
    return 0


if __name__ == "__main__":
    sys.exit(main())
