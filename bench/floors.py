"""The C floors of floor.c: built on demand, run as child processes, asked over pipes.

Without OpenSSL's headers the floors are built without TLS: TLS rows are then void, and say so.

F0  one send(2) of a frame per connection      Fk  k frames in one send       T0  both by SSL_write, TLS 1.3
E0  receive, unmask and send back              H0  E0 - F0: the receiving half
A0  accept, upgrade (and TLS handshake)        M0  kernel memory of an idle socket
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from bench.server import ROOT, free_ports

SERVER_CPU: Final = 0
CLIENT_CPU: Final = 1
_FLAGS: Final = ("-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror")


class BenchError(Exception):
    """A child did not do as it was told; the row is void."""


@functools.cache
def build() -> tuple[Path, bool]:
    """floor.c as a program in build/bench, and whether it can do TLS."""
    source, program = ROOT / "bench" / "floor.c", ROOT / "build" / "bench" / "floor"
    plain = program.with_name("floor-plain")
    program.parent.mkdir(parents=True, exist_ok=True)
    if _compile(source, program, ("-DFLOOR_TLS",), ("-lssl", "-lcrypto")):
        return program, True
    if not _compile(source, plain, (), ()):
        raise BenchError(f"{source} does not compile; gcc is needed")
    return plain, False


def _compile(source: Path, program: Path, flags: Sequence[str], libraries: Sequence[str]) -> bool:
    if program.exists() and program.stat().st_mtime >= source.stat().st_mtime:
        return True
    fresh = program.with_name(f"{program.name}.{os.getpid()}")
    command = ["gcc", *_FLAGS, *flags, "-o", str(fresh), str(source), *libraries]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        fresh.replace(program)
    elif "openssl/" not in done.stderr:
        raise BenchError(done.stderr)
    return done.returncode == 0


class Child:
    """A process that answers each line on its stdin with a line of JSON."""

    def __init__(self, command: Sequence[str], *, cpu: int | None, env: dict[str, str] | None = None):
        self.command = list(command)
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env=os.environ | (env or {}), cwd=ROOT,
        )  # fmt: skip
        if cpu is not None and (os.cpu_count() or 1) > 1:
            os.sched_setaffinity(self.process.pid, {cpu})

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"{' '.join(self.command)} ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{line}\n")
        except BrokenPipeError:
            raise BenchError(f"{' '.join(self.command)} ended with {self.process.wait()}") from None

    def ask(self, line: str) -> dict[str, Any]:
        self.tell(line)
        return self.read()

    def end(self) -> None:
        """Close its stdin, which ends it; kill it when that does not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()
            self.process.wait(5)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def floor(role: str, *arguments: object, cpu: int | None, env: dict[str, str] | None = None) -> Child:
    """A role of floor.c. cpu: the core it is bound to."""
    return Child([str(build()[0]), role, *map(str, arguments)], cpu=cpu, env=env)


class Memo:
    """What fanout and drain of floor.c share; see there."""

    NAMES = ("received", "ready", "lost", "on", "busy_ns")

    def __init__(self, path: Path | None = None) -> None:
        self._made = path is None
        if path is None:
            descriptor, name = tempfile.mkstemp(prefix="fastim-memo-")
            path = Path(name)
            os.ftruncate(descriptor, 4096)
        else:
            descriptor = os.open(path, os.O_RDWR)
        self.path = path
        self._map = mmap.mmap(descriptor, 4096)
        os.close(descriptor)

    def __getitem__(self, name: str) -> int:
        found: int = struct.unpack_from("=Q", self._map, 8 * self.NAMES.index(name))[0]
        return found

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("=Q", self._map, 8 * self.NAMES.index(name), value)

    def close(self) -> None:
        self._map.close()
        if self._made:
            self.path.unlink(missing_ok=True)


def certificate(directory: Path) -> tuple[str, str]:
    """A pair for TLS floors and servers: what `fastim serve --dev` makes."""
    from fastim.node.tls import dev_certificate

    cert, key = dev_certificate(directory)
    return str(cert), str(key)


class EchoServer:
    """The echo floor, listening."""

    def __init__(
        self,
        pair: tuple[str, str] | None = None,
        *,
        cpu: int | None = SERVER_CPU,
        env: dict[str, str] | None = None,
    ):
        (self.port,) = free_ports(1)
        self.tls = pair is not None
        self.child = floor("echo", self.port, *(pair or ()), cpu=cpu, env=env)
        self.child.read()

    def counted(self) -> dict[str, Any]:
        return self.child.ask("counted")

    @property
    def pid(self) -> int:
        return self.child.process.pid


def echo_floor(
    conns: int, seconds: float, size: int, rounds: int = 3, pair: tuple[str, str] | None = None
) -> dict[str, float]:
    """E0: CPU of receive + send at `conns` connections with one message under way each; the median."""
    server = EchoServer(pair)
    found, busy = [], []
    with server.child:
        for _ in range(rounds):
            words = (server.port, conns, seconds, size, *(("tls",) if pair else ()))
            with floor("pound", *words, cpu=CLIENT_CPU) as client:
                # Half a second in, everybody is connected.
                time.sleep(min(0.5, seconds / 4) + conns / 20_000)
                before = server.counted()
                time.sleep(seconds / 2)
                after = server.counted()
                busy.append(client.read()["busy"])
            found.append((after["cpu_s"] - before["cpu_s"]) / (after["echoes"] - before["echoes"]))
    return {"cpu_us": round(statistics.median(found) * 1e6, 4), "client_busy": max(busy)}


def send_floor(conns: int, size: int, rounds: int = 3, pair: tuple[str, str] | None = None) -> float:
    """F0: CPU µs of one send of `size` bytes in all, to each of `conns` connections in turn; the median."""
    memo = Memo()
    (port,) = free_ports(1)
    try:
        with floor("fanout", port, conns, size, memo.path, *(pair or ()), cpu=SERVER_CPU) as server:
            words = (port, conns, memo.path, *(("tls",) if pair else ()))
            with floor("drain", *words, cpu=CLIENT_CPU):
                server.read()
                each = max(4, 100_000 // conns)
                server.ask(f"rounds {max(4, each // 10)} 1")
                found = [server.ask(f"rounds {each} 1") for _ in range(rounds)]
        if memo["lost"] or not all(answer["drained"] for answer in found):
            raise BenchError("the floor's clients did not get everything")
        return round(statistics.median(answer["cpu_us_per_send"] for answer in found), 4)
    finally:
        memo.close()


def _slab_kb() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Slab:"):
            return int(line.split()[1])
    return 0


def accept_floor(conns: int, pair: tuple[str, str] | None = None) -> dict[str, float]:
    """A0 and M0: CPU to accept and upgrade, kernel memory per idle connection and end."""
    memo = Memo()
    try:
        server = EchoServer(pair)
        with server.child:
            slab, before = _slab_kb(), server.counted()
            words = (server.port, conns, memo.path, *(("tls",) if pair else ()))
            with floor("drain", *words, cpu=CLIENT_CPU):
                deadline = time.monotonic() + 120
                while memo["ready"] < conns:
                    if time.monotonic() > deadline:
                        raise BenchError(f"{memo['ready']} of {conns} connections after 120 s")
                    time.sleep(0.02)
                after = server.counted()
                # Both ends of a loopback connection are in this kernel.
                kernel_kb = (_slab_kb() - slab) / conns / 2
        cpu_s = (after["cpu_s"] - before["cpu_s"]) / (after["upgraded"] - before["upgraded"])
        return {"cpu_us": round(cpu_s * 1e6, 2), "kernel_kb": round(kernel_kb, 2)}
    finally:
        memo.close()
