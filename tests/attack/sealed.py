"""Sealed connections under load and under attack: every nonce written down, every touched frame refused.

    python -m tests.attack.sealed --frames 10000000 --workers 2

Real servers (`fastim serve`), two of them with one static key, and a client that speaks the wire by hand.

traffic   connections come, agree on keys, authenticate, say PING, ask for new keys, leave and come back,
          until so many SEALED and SEALED_DOWN were exchanged. Of each the pair (fingerprint of key and nonce
          prefix, counter) is marked in a bitmap: ours when it is written, the server's when it has come and
          opened. A pair that was marked before is a repeated nonce. Of the server's frames every 5,000th is
          opened by `cryptography` too, with a nonce made here: the counter on the wire is the nonce in use.
attack    frames that are replayed, reordered, cut at each length, flipped in each bit, and more: after each
          one the server says 4509 and nothing else.

Exits 1 if a nonce was repeated, a frame did not open, or an attack was answered otherwise. The last line
holds the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgpack
import uvloop
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fastim._core.cipher import Opener, Sealer
from fastim._core.frame import SEALED_HEADER_BYTES, split
from fastim._core.sealed import SealedStream
from fastim.auth import create_dev_key, mint
from fastim.protocol import Auth, CloseCode, Keys, Op, Ping, decode, encode
from fastim.sealing import Offer, StaticKey
from tests.system.served import Served

PING: Final = encode(Ping())
BINARY, CLOSE = 2, 8
CONNECTIONS: Final = 16
REST_S: Final = 1.05
"""A server gives new keys once a second."""
CHANGES: Final = 3
CHECK_EVERY: Final = 5_000
PATIENCE_S: Final = 20.0
ALONE: Final = (CLOSE, struct.pack(">H", CloseCode.BAD_FRAME))
"""A close frame with the code and nothing else."""

Pair = tuple[bytes, bytes]
"""key, nonce prefix"""


class Nonces:
    """Which (key, counter) were used: a bit for each."""

    def __init__(self) -> None:
        self._used: dict[bytes, bytearray] = {}
        self.frames = 0
        self.repeated = 0

    @property
    def keys(self) -> int:
        return len(self._used)

    def of(self, pair: Pair) -> bytearray:
        """The bitmap of a key; the same again if the key comes again."""
        return self._used.setdefault(hashlib.sha256(b"".join(pair)).digest(), bytearray())

    def use(self, bitmap: bytearray, counter: int) -> None:
        at, bit = counter >> 3, 1 << (counter & 7)
        if at >= len(bitmap):
            bitmap.extend(bytes(at + 512 - len(bitmap)))
        if bitmap[at] & bit:
            self.repeated += 1
        bitmap[at] |= bit
        self.frames += 1


class Socket(asyncio.Protocol):
    """WebSocket frames of one connection, unmasked as a server sends them."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._upgraded = False
        self.frames: list[tuple[int, bytes]] = []
        self.ended = False
        self._changed = asyncio.Event()
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.write(
            b"GET /v1/ws HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        if not self._upgraded:
            head, end, rest = bytes(buffer).partition(b"\r\n\r\n")
            if not end:
                return
            assert head.startswith(b"HTTP/1.1 101 "), head
            self._upgraded = True
            buffer[:] = rest
        at, size = 0, len(buffer)
        while size - at >= 2:
            n, start = buffer[at + 1], at + 2
            if n == 126:
                if size - at < 4:
                    break
                n, start = buffer[at + 2] << 8 | buffer[at + 3], at + 4
            elif n == 127:
                if size - at < 10:
                    break
                n, start = int.from_bytes(buffer[at + 2 : at + 10], "big"), at + 10
            if size - start < n:
                break
            self.frames.append((buffer[at] & 0x0F, bytes(buffer[start : start + n])))
            at = start + n
        del buffer[:at]
        self._changed.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = True
        self._changed.set()

    async def take(self) -> list[tuple[int, bytes]]:
        """What has come; at least one frame, or none when the connection has ended."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.frames and not self.ended:
                self._changed.clear()
                await self._changed.wait()
        frames, self.frames = self.frames, []
        return frames

    def write(self, *packets: bytes) -> None:
        """A mask of zeros is one."""
        self.transport.write(b"".join([_masked(packet) for packet in packets]))

    async def gone(self) -> None:
        self.transport.abort()
        async with asyncio.timeout(PATIENCE_S):
            while not self.ended:
                self._changed.clear()
                await self._changed.wait()


def _masked(packet: bytes) -> bytes:
    n = len(packet)
    if n < 126:
        return bytes((0x82, 0x80 | n)) + b"\0\0\0\0" + packet
    return b"\x82\xfe" + n.to_bytes(2, "big") + b"\0\0\0\0" + packet


class Connection:
    """One sealed connection, every nonce of which is noted."""

    def __init__(self, run: Run, socket: Socket) -> None:
        self.run = run
        self.socket = socket
        self.stream: SealedStream
        self.sent = 0
        self.pongs = 0
        self._up = self._down = bytearray()
        self._gcm: tuple[AESGCM, bytes]
        self._next: tuple[Pair, Pair] | None = None
        self._offer: Offer | None = None
        self.agreed_at = 0.0

    async def agree(self) -> None:
        offer = Offer(self.run.static.seal_key(), 1)
        self.socket.write(encode(offer.rekey))
        ((_, packet),) = await self.socket.take()
        up, down = self._accept(offer, packet)
        self.stream = SealedStream(1, Sealer(*up), Opener(*down), client=True)
        self._keys(up, down)

    def _accept(self, offer: Offer, frame: bytes) -> tuple[Pair, Pair]:
        keys = decode(Op.KEYS, frame)
        assert isinstance(keys, Keys)
        return offer.accept(keys)._take()

    def _keys(self, up: Pair, down: Pair) -> None:
        self._up, self._down = self.run.nonces.of(up), self.run.nonces.of(down)
        self._gcm = AESGCM(down[0]), down[1]
        self.agreed_at = time.monotonic()

    async def login(self, user: str) -> None:
        self.say(encode(Auth(1, 1, self.run.tokens[user], "d0")))
        while True:
            if any(op == Op.HELLO for packet in await self.packets() for op, _, _ in split(packet)):
                return

    def seal(self, packet: bytes) -> bytes:
        sealed = self.stream.seal(packet)
        self.run.nonces.use(self._up, int.from_bytes(sealed[8:16], "big"))
        return sealed

    def say(self, *packets: bytes) -> None:
        self.sent += len(packets)
        self.socket.write(*map(self.seal, packets))

    async def packets(self) -> list[bytes]:
        """What the server said, opened."""
        frames = await self.socket.take()
        assert frames, "the server closed the connection"
        return [self._open(kind, sealed) for kind, sealed in frames]

    def _open(self, kind: int, sealed: bytes) -> bytes:
        assert kind == BINARY, (kind, sealed)
        run = self.run
        counter = int.from_bytes(sealed[8:16], "big")
        packet = self.stream.open(sealed)
        run.nonces.use(self._down, counter)
        run.down += 1
        if run.down % CHECK_EVERY == 0:
            gcm, prefix = self._gcm
            head = sealed[:SEALED_HEADER_BYTES]
            assert gcm.decrypt(prefix + counter.to_bytes(8, "big"), sealed[len(head) :], head) == packet
            run.checked += 1
        if self._offer is not None and split(packet)[-1][0] == Op.KEYS:
            up, down = self._accept(self._offer, packet[split(packet)[-1][1] :])
            self.stream.renew(self._offer.rekey.key_id, Sealer(*up), Opener(*down))
            self._offer = None
            self._keys(up, down)
            run.renewed += 1
        return packet

    def new_keys_if_due(self) -> None:
        """Ask; the old ones are in use until KEYS has come."""
        if self._offer is not None or time.monotonic() - self.agreed_at < REST_S:
            return
        self._offer = Offer(self.run.static.seal_key(), self.stream.key_id + 1)
        self.say(encode(self._offer.rekey))

    async def ping(self, count: int) -> None:
        """So many packets of one PING each, and all their answers."""
        wanted = self.pongs + count
        self.say(*[PING] * count)
        while self.pongs < wanted:
            for packet in await self.packets():
                self.pongs += sum(op == Op.PONG for op, _, _ in split(packet))


class Run:
    """Everything that is counted."""

    def __init__(self, servers: list[Served], static: StaticKey, frames: int, seed: int) -> None:
        self.servers = servers
        self.static = static
        self.wanted = frames
        self.rng = random.Random(seed)
        self.nonces = Nonces()
        self.connections = self.renewed = self.down = self.checked = self.attacks = self.answered = 0
        self.tokens: dict[str, str] = {}

    async def connect(self, user: str) -> Connection:
        """To one of the servers."""
        server = self.rng.choice(self.servers)
        loop = asyncio.get_running_loop()
        _, socket = await loop.create_connection(Socket, "127.0.0.1", server.ws_port)
        self.connections += 1
        connection = Connection(self, socket)
        await connection.agree()
        await connection.login(user)
        return connection

    # -- traffic

    async def traffic(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(CONNECTIONS - 1):
                group.create_task(self._device(f"user{number}"))
            group.create_task(self._steady(f"user{CONNECTIONS - 1}"))

    def _burst(self) -> int:
        """Mostly one: the server joins the answers of a tick, and its frames are to be many."""
        return 1 if self.rng.random() < 0.97 else self.rng.randrange(1, 400)

    async def _steady(self, user: str) -> None:
        """One connection that never leaves, and changes its keys again and again."""
        connection = await self.connect(user)
        while self.nonces.frames < self.wanted or connection.stream.key_id < CHANGES:
            await connection.ping(self._burst())
            connection.new_keys_if_due()
        await connection.socket.gone()

    async def _device(self, user: str) -> None:
        while self.nonces.frames < self.wanted:
            connection = await self.connect(user)
            life = self.rng.randrange(50, 60_000 if self.wanted > 1_000_000 else 4_000)
            while connection.sent < life and self.nonces.frames < self.wanted:
                await connection.ping(self._burst())
                connection.new_keys_if_due()
            await connection.socket.gone()

    # -- attack

    async def attack(self) -> None:
        for name, forge in forgeries(self.rng):
            connection = await self.connect("mallory")
            connection.socket.write(*forge(connection))
            got: list[tuple[int, bytes]] = []
            while frames := await connection.socket.take():
                got += frames
                if frames[-1][0] == CLOSE:
                    break
            # What the server had said before (its first pages) may still be under way.
            while got and got[0][0] == BINARY:
                connection._open(*got.pop(0))
            self.attacks += 1
            if got != [ALONE]:
                self.answered += 1
                print(f"FAIL {name}: {got}")
            await connection.socket.gone()

    def figures(self) -> str:
        return (
            f"frames={self.nonces.frames} up={self.nonces.frames - self.down} down={self.down} "
            f"keys={self.nonces.keys} connections={self.connections} renewed={self.renewed} "
            f"checked={self.checked} repeated={self.nonces.repeated} "
            f"attacks={self.attacks} answered={self.answered}"
        )


Forge = Callable[[Connection], list[bytes]]


def forgeries(rng: random.Random) -> Iterator[tuple[str, Forge]]:
    """(name, what to write instead of one honest PING)"""

    def of_one(change: Callable[[bytes], bytes]) -> Forge:
        return lambda connection: [change(connection.seal(PING))]

    size = SEALED_HEADER_BYTES + len(PING) + 16
    for bit in range(size * 8):
        yield f"bit {bit} flipped", of_one(lambda sealed, bit=bit: _flip(sealed, bit))  # type: ignore[misc]
    for cut in range(size):
        yield f"cut after {cut}", of_one(lambda sealed, cut=cut: sealed[:cut])  # type: ignore[misc]
    yield "replayed", lambda connection: [sealed := connection.seal(PING), sealed]
    yield "the first frame replayed", _first_again
    yield "reordered", lambda connection: list(reversed([connection.seal(PING) for _ in range(2)]))
    yield "reordered far", lambda connection: _shuffled(rng, [connection.seal(PING) for _ in range(20)])
    yield "one dropped", lambda connection: [connection.seal(PING) for _ in range(2)][1:]
    yield "a byte behind it", of_one(lambda sealed: sealed + b"\xc0")
    yield "twice in a packet", of_one(lambda sealed: sealed + sealed)
    yield "an element more", of_one(lambda sealed: b"\x95" + sealed[1:] + b"\xc0")
    yield "written otherwise", of_one(lambda sealed: msgpack.packb(msgpack.unpackb(sealed)))
    yield "in clear", lambda connection: [PING]
    yield "a seal in a seal", lambda connection: [connection.seal(connection.seal(PING))]
    yield "random bytes", lambda connection: [rng.randbytes(rng.randrange(1, 200))]
    yield "REKEY in clear", lambda connection: [encode(Offer(connection.run.static.seal_key(), 2).rekey)]


def _flip(sealed: bytes, bit: int) -> bytes:
    touched = bytearray(sealed)
    touched[bit // 8] ^= 1 << bit % 8
    return bytes(touched)


def _first_again(connection: Connection) -> list[bytes]:
    frames = [connection.seal(PING) for _ in range(5)]
    return [*frames, frames[0]]


def _shuffled(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    """In another order, from the first frame on."""
    mixed = frames[1:]
    rng.shuffle(mixed)
    return [*mixed, frames[0]]


async def live(frames: int, workers: int, seed: int, directory: Path) -> Run:
    """Both parts; the servers are gone afterwards."""
    static = StaticKey.generate("2026-01")
    (directory / "seal.pem").write_bytes(static.pem())
    signing = create_dev_key(directory)
    servers: list[Served] = []
    try:
        for number in range(workers):
            home = directory / f"worker{number}"
            (home / "data").mkdir(parents=True)
            # All of them believe the same tokens.
            shutil.copy(directory / "dev-key.pem", home / "data")
            config = home / "fastim.toml"
            row = f'{{ name = "2026-01", file = "{directory}/seal.pem" }}'
            config.write_text(f"[node]\nseal_keys = [{row}]\n")
            servers.append(Served(home, "--plain", "--config", str(config)))
        for server in servers:
            server.announced()
        run = Run(servers, static, frames, seed)
        now_s = int(time.time())
        for user in ("mallory", *(f"user{number}" for number in range(CONNECTIONS))):
            run.tokens[user] = mint(signing, user, audience="fastim", ttl_s=86_400, now_s=now_s)
        await run.traffic()
        await run.attack()
        return run
    finally:
        for server in servers:
            server.end()


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.attack.sealed", description=__doc__)
    parser.add_argument("--frames", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(given)


def main() -> int:
    args = arguments()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        run = uvloop.run(live(args.frames, args.workers, args.seed, Path(directory)))
    print(f"{time.monotonic() - started:.0f} s")
    print(run.figures())
    return int(bool(run.nonces.repeated or run.answered or run.nonces.frames < args.frames))


if __name__ == "__main__":
    sys.exit(main())
