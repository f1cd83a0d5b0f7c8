"""A wire inside a wire: packets are sealed on their way to the server, whoever ends TLS in between.

Hides REKEY, KEYS and SEALED from everybody above: what comes out is the packets of an unsealed connection.

 DIALLED ──REKEY──▶ waiting for KEYS ──proof fits──▶ SEALED ──limit or age──▶ REKEY inside ──KEYS──▶ SEALED
                        └──refused, no proof, silence──▶ DialError: no AUTH was sent

A refusal in clear may be anybody's, so it never stops the client for good; it only makes it wait. Nor does a
close with 4509 and no reason: that is what the server says when somebody on the way touched a frame.

S1  no token leaves before the server has proved its static key      tests/unit/test_client_sealed.py
S2  a frame that does not open ends the connection                   same
S3  new keys come in time, and nothing sent meanwhile is lost        tests/system/test_sealed.py
Source: docs/protocol.md, "Sealing"; docs/adr/0031.
"""

from __future__ import annotations

import asyncio
from typing import Final

from fastim._core.frame import split
from fastim._core.sealed import SealedStream
from fastim.client.wire import ABNORMAL, Dial, DialError, Receiver, Wire
from fastim.clock import Clock
from fastim.errors import PeerError
from fastim.protocol import MAX_SEALED_BYTES, CloseCode, Error, Keys, Op, decode, encode
from fastim.sealing import REKEY_FRAMES, REKEY_MS, Offer, SealKey

AGREE_TIMEOUT_S: Final = 5.0
REFUSED_REST_S: Final = 60.0
"""After a refusal: the server counts failures per address, and a key that it does not hold stays away."""
REKEY_LEAST_MS: Final = 1_000


class SealedWire:
    """The receiver of the wire below, and the wire of the connection above."""

    max_packet_bytes = MAX_SEALED_BYTES

    def __init__(
        self,
        seal: SealKey,
        receiver: Receiver,
        clock: Clock,
        *,
        rekey_frames: int = REKEY_FRAMES,
        rekey_ms: int = REKEY_MS,
        rekey_least_ms: int = REKEY_LEAST_MS,
    ) -> None:
        self._seal = seal
        self._receiver = receiver
        self._clock = clock
        self._rekey_frames = rekey_frames
        self._rekey_ms = rekey_ms
        self._rekey_least_ms = rekey_least_ms
        self._below: Wire | None = None
        self._offer: Offer | None = None
        """REKEY is under way."""
        self._stream: SealedStream | None = None
        self._agreed_mono_ms = 0
        self._settled = asyncio.Event()
        self._failure: DialError | None = None
        self._fault = ""

    # -- agreeing

    async def agree(self, below: Wire) -> None:
        """Have keys. Raises DialError: then only REKEY was sent, and the wire below is to be dropped."""
        self._below = below
        if self._failure is None:
            self._offer = Offer(self._seal, 1)
            below.send(encode(self._offer.rekey))
            try:
                async with asyncio.timeout(AGREE_TIMEOUT_S):
                    await self._settled.wait()
            except TimeoutError:
                self._failure = DialError("the server did not agree on keys in time")
        if self._failure is not None:
            raise self._failure

    def _answered(self, packet: bytes) -> None:
        """The answer to the first REKEY, in clear."""
        if self._settled.is_set():
            return
        try:
            self._failure = self._judge(packet)
        except PeerError as error:
            self._failure = DialError(f"the server's answer to REKEY is no good: {error.detail}")
        self._settled.set()

    def _judge(self, packet: bytes) -> DialError | None:
        offer = self._offer
        op, _, end = split(packet)[0]
        frame = decode(op, packet[:end])
        if isinstance(frame, Error):
            words = f"the server does not seal with {self._seal.name!r}: {frame.code}: {frame.detail}"
            return DialError(words, REFUSED_REST_S)
        if offer is None or not isinstance(frame, Keys) or end != len(packet):
            return DialError(f"the server answered REKEY with op {op}")
        try:
            agreed = offer.accept(frame)
        except PeerError:
            words = f"whoever answered does not hold the static key {self._seal.name!r}"
            return DialError(words, REFUSED_REST_S)
        self._stream = SealedStream(offer.rekey.key_id, *agreed.client(), client=True)
        self._offer = None
        self._agreed_mono_ms = self._clock.mono_ms()
        return None

    def _renew_if_due(self) -> None:
        stream = self._stream
        if stream is None or self._offer is not None or self._below is None:
            return
        age_ms = self._clock.mono_ms() - self._agreed_mono_ms
        if age_ms < self._rekey_least_ms or (age_ms < self._rekey_ms and stream.used < self._rekey_frames):
            return
        self._offer = Offer(self._seal, stream.key_id + 1)
        self._below.send(stream.seal(encode(self._offer.rekey)))

    def _take_keys(self, packet: bytes) -> bytes:
        """While new keys are asked for: the packet without KEYS, which is its last frame when it comes."""
        op, start, _ = split(packet)[-1]
        if op != Op.KEYS:
            return packet
        keys = decode(op, packet[start:])
        assert isinstance(keys, Keys)
        assert self._offer is not None
        assert self._stream is not None
        if not keys.room:
            agreed = self._offer.accept(keys)
            self._stream.renew(keys.key_id, *agreed.client())
            self._offer = None
            self._agreed_mono_ms = self._clock.mono_ms()
        return packet[:start]

    # -- wire.Receiver

    def on_packet(self, packet: bytes) -> None:
        stream = self._stream
        if stream is None:
            self._answered(packet)
            return
        if self._fault:
            return
        try:
            inner = stream.open(packet)
            if self._offer is not None:
                inner = self._take_keys(inner)
        except PeerError:
            self._fault = "the seal of the connection was broken on the way"
            self.abort()
            return
        if inner:
            self._receiver.on_packet(inner)
            self._renew_if_due()

    def on_closed(self, code: int, reason: str) -> None:
        if self._stream is None:
            self._failure = self._failure or DialError(f"closed while keys were agreed ({code})")
            self._settled.set()
        elif code == CloseCode.BAD_FRAME and not reason:
            self._receiver.on_closed(ABNORMAL, "the seal of the connection was broken on the way")
        else:
            self._receiver.on_closed(code, self._fault or reason)

    # -- wire.Wire

    def send(self, packet: bytes) -> None:
        stream, below = self._stream, self._below
        if stream is None or below is None:
            return
        if stream.left == 0:
            self._fault = self._fault or "the server gave no new keys"
            below.abort()
            return
        below.send(stream.seal(packet))
        self._renew_if_due()

    def close(self, code: int) -> None:
        if self._below is not None:
            self._below.close(code)

    def abort(self) -> None:
        if self._below is not None:
            self._below.abort()

    def pause(self) -> None:
        if self._below is not None:
            self._below.pause()

    def resume(self) -> None:
        if self._below is not None:
            self._below.resume()

    def buffered_bytes(self) -> int:
        return self._below.buffered_bytes() if self._below is not None else 0

    async def gone(self) -> None:
        if self._below is not None:
            await self._below.gone()


def sealed_dial(
    dial: Dial,
    seal: SealKey,
    clock: Clock,
    *,
    rekey_frames: int = REKEY_FRAMES,
    rekey_ms: int = REKEY_MS,
    rekey_least_ms: int = REKEY_LEAST_MS,
) -> Dial:
    """A dial whose wires are sealed. The limits are lowered in tests."""

    async def dial_sealed(receiver: Receiver) -> Wire:
        wire = SealedWire(
            seal, receiver, clock, rekey_frames=rekey_frames, rekey_ms=rekey_ms, rekey_least_ms=rekey_least_ms
        )
        below = await dial(wire)
        try:
            await wire.agree(below)
        except BaseException:
            below.abort()
            await below.gone()
            raise
        return wire

    return dial_sealed
