"""The slow twins of fastim.sealing and fastim._core.sealed, from the RFCs alone.

X25519 is the ladder of RFC 7748 on Python's integers, HKDF is RFC 5869 on hmac, AES-GCM is pycryptodome's
public API, msgpack is the plain library. Nothing of fastim is used but the error.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import NamedTuple

import msgpack
from Crypto.Cipher import AES

from fastim.errors import PeerError

P = 2**255 - 19
LABEL = b"fastim-sealing-1"
BASE = (9).to_bytes(32, "little")
UP, DOWN = 24, 51


# ------------------------------------------------------------------------------------------- RFC 7748


def _inverse(value: int) -> int:
    return pow(value, P - 2, P)


def x25519(scalar: bytes, point: bytes) -> bytes:
    """RFC 7748, section 5."""
    k = int.from_bytes(bytes([scalar[0] & 248]) + scalar[1:31] + bytes([scalar[31] & 127 | 64]), "little")
    u = int.from_bytes(point, "little") & ((1 << 255) - 1)
    x1, x2, z2, x3, z3, swap = u, 1, 0, u, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a, b * b, d * a, c * b
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % P, x1 * (da - cb) ** 2 % P
        x2, z2 = aa * bb % P, e * (aa + 121_665 * e) % P
    if swap:
        x2, z2 = x3, z3
    return (x2 * _inverse(z2) % P).to_bytes(32, "little")


def public_of(private: bytes) -> bytes:
    return x25519(private, BASE)


# ------------------------------------------------------------------------------------------- RFC 5869


def hkdf_extract(salt: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), ikm, "sha256")


def hkdf_expand(prk: bytes, info: bytes, length: int) -> bytes:
    block, okm = b"", b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(prk, block + info + bytes([number]), "sha256")
        okm += block
    return okm[:length]


# -------------------------------------------------------------------------------------- the agreement


class Secrets(NamedTuple):
    transcript: bytes
    up_key: bytes
    down_key: bytes
    up_prefix: bytes
    down_prefix: bytes
    proof: bytes


def secrets(
    key_id: int, static: str, shared: str, static_public: bytes, client: bytes, server: bytes, ee: bytes,
    es: bytes, psk: bytes,
) -> Secrets:  # fmt: skip
    """docs/protocol.md, "Sealing", line by line."""
    transcript = hashlib.sha256(
        LABEL
        + key_id.to_bytes(4, "big")
        + bytes([len(static)]) + static.encode()
        + bytes([len(shared)]) + shared.encode()
        + static_public + client + server
    ).digest()  # fmt: skip
    okm = hkdf_expand(hkdf_extract(transcript, ee + es + psk), LABEL + b" keys" + transcript, 88)
    return Secrets(transcript, okm[:32], okm[32:64], okm[64:68], okm[68:72], okm[72:])


def client_secrets(
    key_id: int, static: str, shared: str, static_public: bytes, private: bytes, server: bytes,
    psk: bytes = b"",
) -> Secrets:  # fmt: skip
    """What the client makes of KEYS."""
    ee, es = x25519(private, server), x25519(private, static_public)
    return secrets(key_id, static, shared, static_public, public_of(private), server, ee, es, psk)


def server_secrets(
    key_id: int, static: str, shared: str, static_private: bytes, client: bytes, private: bytes,
    psk: bytes = b"",
) -> Secrets:  # fmt: skip
    """What the server makes of REKEY."""
    ee, es = x25519(private, client), x25519(static_private, client)
    static_public, server = public_of(static_private), public_of(private)
    return secrets(key_id, static, shared, static_public, client, server, ee, es, psk)


# ----------------------------------------------------------------------------------------- the stream


class Stream:
    """One direction, either end: frames in order, each key with its first frame."""

    def __init__(self, op: int, key_id: int, key: bytes, prefix: bytes) -> None:
        self.op = op
        self.counter = 0
        self.renew(key_id, key, prefix)

    def renew(self, key_id: int, key: bytes, prefix: bytes) -> None:
        self.key_id, self.key, self.prefix = key_id, key, prefix

    def _gcm(self, counter: int, aad: bytes) -> AES.GcmMode:
        cipher = AES.new(self.key, AES.MODE_GCM, nonce=self.prefix + counter.to_bytes(8, "big"))
        cipher.update(aad)
        return cipher

    def seal(self, packet: bytes, pack: Callable[[list[object]], bytes] | None = None) -> bytes:
        """pack: how a peer may write the integers; default: as fastim does."""
        self.counter += 1
        if pack is None:
            head = b"\x94" + bytes([self.op]) + b"\xce" + self.key_id.to_bytes(4, "big")
            head += (
                b"\xcf" + self.counter.to_bytes(8, "big") + b"\xc5" + (len(packet) + 16).to_bytes(2, "big")
            )
        else:
            whole = pack([self.op, self.key_id, self.counter, bytes(len(packet) + 16)])
            head = whole[: len(whole) - len(packet) - 16]
        box, tag = self._gcm(self.counter, head).encrypt_and_digest(packet)
        return head + box + tag

    def open(self, frame: bytes) -> bytes:
        try:
            read = msgpack.unpackb(frame, raw=False)
        except Exception:
            raise PeerError("bad_seal", "") from None
        good = isinstance(read, list) and len(read) == 4 and isinstance(read[3], bytes) and len(read[3]) >= 16
        if not good or read[:3] != [self.op, self.key_id, self.counter + 1] or not frame.endswith(read[3]):
            raise PeerError("bad_seal", "")
        box = read[3]
        try:
            packet = self._gcm(self.counter + 1, frame[: len(frame) - len(box)]).decrypt_and_verify(
                box[:-16], box[-16:]
            )
        except ValueError:
            raise PeerError("bad_seal", "") from None
        self.counter += 1
        return packet
