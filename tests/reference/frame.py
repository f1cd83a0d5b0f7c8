"""The slow twin of fastim._core.frame: recursive, obvious, checks the same limits."""

from __future__ import annotations

import struct

from fastim.errors import PeerError


class Walker:
    """Reads values off a buffer; raises PeerError for what the wire does not allow."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count]
        if len(part) < count:
            raise PeerError("bad_frame", "truncated")
        self.at += count
        return part

    def number(self, layout: str) -> int:
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def integer(self) -> int:
        lead = self.number(">B")
        if lead <= 0x7F:
            return lead
        if lead >= 0xE0:
            return lead - 256
        layouts = dict(zip(range(0xCC, 0xD4), (">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True))
        if lead not in layouts:
            raise PeerError("bad_frame", "not an integer")
        return self.number(layouts[lead])

    def array(self) -> int:
        lead = self.number(">B")
        if 0x90 <= lead <= 0x9F:
            count = lead & 0x0F
        elif lead in (0xDC, 0xDD):
            count = self.number(">H" if lead == 0xDC else ">I")
        else:
            raise PeerError("bad_frame", "not an array")
        if count > 256:
            raise PeerError("bad_frame", "array")
        return count

    def skip(self, depth: int) -> None:
        """Step over one value that sits in a container `depth` deep."""
        lead = self.data[self.at] if self.at < len(self.data) else self.take(1)[0]
        if lead <= 0x7F or lead >= 0xE0 or lead in (0xC0, 0xC2, 0xC3):
            self.at += 1
        elif 0x90 <= lead <= 0x9F or lead in (0xDC, 0xDD):
            self.skip_many(self.array(), depth + 1)
        elif lead <= 0x8F or lead in (0xDE, 0xDF):
            self.at += 1
            count = lead & 0x0F if lead <= 0x8F else self.number(">H" if lead == 0xDE else ">I")
            if count > 64:
                raise PeerError("bad_frame", "map")
            self.skip_many(2 * count, depth + 1)
        elif lead <= 0xBF:
            self.take(1 + (lead & 0x1F))
        elif lead in (0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB):
            self.at += 1
            self.take(self.number({4: ">B", 5: ">H", 6: ">I", 9: ">B", 10: ">H", 11: ">I"}[lead & 0x0F]))
        elif 0xCC <= lead <= 0xD3:
            self.integer()
        elif lead in (0xCA, 0xCB):
            self.take(5 if lead == 0xCA else 9)
        else:
            raise PeerError("bad_frame", "extension or reserved")

    def skip_many(self, count: int, depth: int) -> None:
        if depth > 8:
            raise PeerError("bad_frame", "depth")
        for _ in range(count):
            self.skip(depth)


def split(data: bytes) -> list[tuple[int, int, int]]:
    if len(data) > 65_536:
        raise PeerError("bad_frame", "packet bytes")
    walker = Walker(data)
    spans = []
    while walker.at < len(data):
        start = walker.at
        count = walker.array()
        if count == 0:
            raise PeerError("bad_frame", "no op")
        op = walker.integer()
        if not 0 <= op <= 127:
            raise PeerError("bad_frame", "op")
        walker.skip_many(count - 1, 1)
        spans.append((op, start, walker.at))
    if not 1 <= len(spans) <= 64:
        raise PeerError("bad_frame", "frames")
    return spans


def parse_ack(data: bytes) -> int:
    walker = Walker(data)
    count = walker.array()
    if count < 2 or walker.integer() != 3:
        raise PeerError("bad_frame", "ack")
    tag = walker.integer()
    if not 0 <= tag <= 0xFFFFFFFF:
        raise PeerError("bad_frame", "tag")
    return tag


def ranges(values: list[int]) -> list[tuple[int, int]]:
    present = set(values)
    firsts = [value for value in values if value - 1 not in present]
    lasts = [value for value in values if value + 1 not in present]
    return list(zip(firsts, lasts, strict=True))
