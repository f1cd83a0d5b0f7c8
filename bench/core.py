"""C1-C4: what the compiled core's hot operations cost, each with its gate. The loops are C (corebench.pyx).

C1  parse: split PING and ACK, read ACK, write the head of MSG              <= 10 ns each
C2  cipher: seal 128 bytes                                                  <= 300 ns
C3  acks, 1,000,000 in flight: insert, ack, expire                          <= 20, 40, 25 ns
C4  wheel of 1,000,000: touch; sweep                                        <= 3 ns; 0.5 ms
C5  fan-out: publish one message (the sends are `bench fanout`'s)           <= 150 ns

Each figure is the median of rounds and stands beside the least and the largest of them: on a machine that
does other work the least is the better one. Sessions and slots are visited in disorder, so that memory is as
cold as it is with a million of them.

The cipher is also built anew, on its own, with headers of OpenSSL that do not compile in front of the
system's: the product needs none. --short leaves that out.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import uvloop

from bench import facts
from bench.server import ROOT
from fastim._core import acks, cipher, conn, fanout, frame, sealed, wheel
from fastim._core.cipher import Opener, Sealer
from fastim._core.conn import CoreConnection, CoreHub
from fastim._core.fanout import Fanout
from fastim.clock import SystemClock
from fastim.node.server import Listener, ListenerConfig
from fastim.node.service import encode_error
from fastim.protocol import Ack, Ping, Send, SendItem, encode

SLACK: Final = 1.15
"""Of the short form: CI's machine does other work."""
MODULES: Final = (acks, cipher, conn, fanout, frame, sealed, wheel)
PACKET: Final = b"\x91\x2e" + b"x" * 126


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--short", action="store_true", help="5 rounds, 15 %% slack, no build of the cipher")
    parser.add_argument("--json", type=Path, help="write the result here")


# ------------------------------------------------------------------------------------------------- building

_BUILD: Final = """
import sys
from Cython.Build import cythonize
from setuptools import Distribution, Extension
name, source, lib, work, *include = sys.argv[1:]
extension = Extension(name, [source], include_dirs=include, extra_compile_args=["-O3"],
                      define_macros=[("NDEBUG", "1")])
directives = {"language_level": 3, "boundscheck": False, "wraparound": False, "nonecheck": False,
              "cdivision": True, "auto_pickle": False, "autotestdict": False}
made = cythonize([extension], build_dir=work, compiler_directives=directives, quiet=True, force=True)
build = Distribution({"ext_modules": made}).get_command_obj("build_ext")
build.build_lib, build.build_temp = lib, work
build.ensure_finalized()
build.run()
"""


def build(name: str, source: Path, lib: Path, env: dict[str, str] | None = None) -> Path:
    """Translate and compile one extension, as setup.py does in release. Returns what can be imported."""
    lib.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", _BUILD, name, str(source.relative_to(ROOT)), str(lib), str(lib / "work")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | (env or {}), check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} was not built:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return next(lib.rglob(f"{name.rpartition('.')[2]}.*.so"))


def corebench() -> ModuleType:
    """The loops, built into build/bench when anything they are made of is newer."""
    lib, source = ROOT / "build" / "bench" / "lib", ROOT / "bench" / "corebench.pyx"
    made_of = [source, *(ROOT / "fastim" / "_core").glob("*.pxd")]
    found = next(lib.glob("corebench.*.so"), None)
    if found is None or found.stat().st_mtime < max(path.stat().st_mtime for path in made_of):
        found = build("corebench", source, lib)
    spec = importlib.util.spec_from_file_location("corebench", found)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cipher_without_openssl() -> str:
    """Build the cipher where OpenSSL's headers cannot be used, import it and seal; what it says of itself."""
    with tempfile.TemporaryDirectory(prefix="fastim-cipher-") as directory:
        poisoned = Path(directory, "include", "openssl")
        poisoned.mkdir(parents=True)
        for header in ("aes.h", "crypto.h", "err.h", "evp.h", "modes.h", "ssl.h"):
            (poisoned / header).write_text(f"#error openssl/{header} is not to be used\n")
        lib = Path(directory, "lib")
        found = build(
            "fastim._core.cipher",
            ROOT / "fastim" / "_core" / "cipher.pyx",
            lib,
            {"CPATH": str(poisoned.parent)},
        )
        program = (
            "import importlib.util, sys\n"
            "spec = importlib.util.spec_from_file_location('fastim._core.cipher', sys.argv[1])\n"
            "cipher = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(cipher)\n"
            "sealer = cipher.Sealer(bytes(range(32)), b'abcd')\n"
            "box = sealer.seal(b'head', b'text')\n"
            "opener = cipher.Opener(bytes(range(32)), b'abcd')\n"
            "assert opener.open(1, b'head', box) == b'text'\n"
            "print(cipher.BACKEND)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(found)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else f"failed: {done.stderr[-500:]}"


# ------------------------------------------------------------------------------------------------ measuring


class Figures:
    """Name -> rounds of it, with their gate."""

    def __init__(self, rounds: int, slack: float) -> None:
        self._rounds = rounds
        self._slack = slack
        self.found: list[dict[str, Any]] = []

    def take(self, name: str, measure: Callable[[], float], gate: float = 0.0, unit: str = "ns") -> None:
        """gate 0: none."""
        measure()
        self.add(name, [measure() for _ in range(self._rounds)], gate, unit)

    def add(self, name: str, rounds: list[float], gate: float = 0.0, unit: str = "ns") -> None:
        median = statistics.median(rounds)
        self.found.append(
            {
                "name": name, "median": round(median, 3), "least": round(min(rounds), 3),
                "most": round(max(rounds), 3), "unit": unit, "gate": gate, "rounds": len(rounds),
                "good": not gate or median <= gate * self._slack,
            }
        )  # fmt: skip


def parse(loops: ModuleType, figures: Figures) -> None:
    count = 1_000_000
    send = encode(Send("p:alice:bob", [SendItem(bytes(16), 1, b"x" * 128)]))
    figures.take("C1 split PING", lambda: loops.split(encode(Ping()), count), 10)
    figures.take("C1 split ACK", lambda: loops.split(encode(Ack(70_000)), count), 10)
    figures.take("C1 read ACK", lambda: loops.parse_ack(encode(Ack(70_000)), count), 10)
    figures.take("C1 head of MSG", lambda: loops.msg_head(count), 10)
    figures.take("   write PONG", lambda: loops.pong(count))
    figures.take("   split SEND of 128 bytes", lambda: loops.split(send, count))


def seals(loops: ModuleType, figures: Figures) -> None:
    key = secrets.token_bytes(32)

    def both(size: int) -> float:
        found: float = loops.seal_and_open(Sealer(key, b"abcd"), Opener(key, b"abcd"), size, 50_000)
        return found

    def packets(size: int) -> float:
        stream = sealed.SealedStream(1, Sealer(key, b"abcd"), Opener(key, b"efgh"), client=False)
        found: float = loops.seal_packet(stream, size, 50_000)
        return found

    figures.take("C2 seal 128 bytes", lambda: loops.seal(Sealer(key, b"abcd"), 128, 50_000), 300)
    figures.take("   seal and open 128 bytes", lambda: both(128))
    figures.take("   seal a packet of 128 bytes", lambda: packets(128))
    figures.take("   seal 1,024 bytes", lambda: loops.seal(Sealer(key, b"abcd"), 1_024, 50_000))


def in_flight(loops: ModuleType, figures: Figures, rounds: int) -> None:
    """10,000 sessions with a window of 100; what is acked or expired is sent anew."""
    found: dict[str, list[float]] = {"insert": [], "ack": [], "expire": []}
    table = loops.InFlight(10_000, 100)
    entries = table.entries()
    for _ in range(rounds):
        found["ack"].append(statistics.mean(table.ack() for _ in range(10)))
        found["expire"].append(table.expire(10))
        found["insert"].append(statistics.mean(table.insert() for _ in range(20)))
    if not table.entries() == entries == 1_000_000:
        raise SystemExit(f"{table.entries():,} entries are in flight")
    for name, gate in (("insert", 20), ("ack", 40), ("expire", 25)):
        figures.add(f"C3 {name}", found[name], gate)
    figures.add("   take all of a session", [table.take_all()])
    figures.add("C3 entry", [loops.ENTRY_BYTES], 32, "bytes")


def beats(loops: ModuleType, figures: Figures) -> None:
    full = loops.Full(1_000_000)
    figures.take("C4 touch", full.touch, 3)
    figures.take("C4 sweep of 1,000,000", full.sweep_ms, 0.5, "ms")


async def publishes(loops: ModuleType, figures: Figures, rounds: int) -> None:
    """Into the log of a fan-out with one member; the log is written between the rounds."""
    loop = asyncio.get_running_loop()
    hub = CoreHub(loop, acks.AckTable(), wheel.Wheel(), encode_error=encode_error)
    entered: asyncio.Future[CoreConnection] = loop.create_future()
    hub.accept = lambda link: _Nobody(entered, link)
    listener = Listener(ListenerConfig(port=0, dev=True), hub, SystemClock())
    await listener.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.addresses[0][1])
    writer.write(
        b"GET /v1/ws HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    link = await entered
    link.authenticated = True
    fan = Fanout(hub)
    fan.add(link)
    await reader.readuntil(b"\r\n\r\n")
    found = []
    for _ in range(rounds + 1):
        ns, taken = loops.publish(fan, PACKET)
        found.append(ns)
        await reader.readexactly(taken * (4 + len(PACKET)))
    figures.add("C5 publish 128 bytes", found[1:], 150)
    link.abort()
    listener.stop_accepting()
    await listener.close_all(1001)
    writer.close()


class _Nobody:
    def __init__(self, entered: asyncio.Future[CoreConnection], link: CoreConnection) -> None:
        entered.set_result(link)

    def on_command(self, op: int, frame: bytes) -> None:
        pass

    def on_closed(self, code: int, orderly: bool) -> None:
        pass


def run(args: argparse.Namespace) -> int:
    checked = [module.__name__ for module in MODULES if module.DEBUG]
    if checked:
        raise SystemExit(f"a debug build would be measured: {', '.join(checked)}")
    rounds = min(args.rounds, 5) if args.short else args.rounds
    result: dict[str, Any] = {"bench": "core", "short": args.short, **facts.gather()}
    loops = corebench()
    figures = Figures(rounds, SLACK if args.short else 1.0)
    parse(loops, figures)
    seals(loops, figures)
    in_flight(loops, figures, rounds)
    beats(loops, figures)
    uvloop.run(publishes(loops, figures, rounds))
    result["figures"] = figures.found
    result["cipher_backend"] = cipher.BACKEND
    result["failures"] = failures(figures.found)
    if not args.short:
        result["cipher_without_openssl"] = cipher_without_openssl()
        if result["cipher_without_openssl"] != cipher.BACKEND:
            result["failures"].append(f"the cipher built alone: {result['cipher_without_openssl']}")
    result["good"] = not result["failures"]
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["good"] else 1


def failures(found: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['name'].strip()}: {row['median']} {row['unit']}; gate {row['gate']}"
        for row in found
        if not row["good"]
    ]


def show(result: dict[str, Any]) -> None:
    print(f"core: commit {result['commit']}, {result['cpu']}, load {result['load_before']}")
    print(f"{'':28}{'median':>10}{'least':>10}{'most':>10}       {'gate':>6}")
    for row in result["figures"]:
        gate = f"{row['gate']:>6}" if row["gate"] else "     -"
        rounds = f"{row['median']:>10.2f}{row['least']:>10.2f}{row['most']:>10.2f}"
        print(f"{row['name']:28}{rounds} {row['unit']:6}{gate}")
    print(f"cipher: {result['cipher_backend']}", end="")
    built = result.get("cipher_without_openssl")
    print(f"; built without OpenSSL's headers: {built}" if built else "")
    for text in result["failures"]:
        print(f"FAILED: {text}")
