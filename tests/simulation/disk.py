"""A disk that can lose its power: what was not synced is lost, kept, or torn, write by write.

An apsw VFS over ordinary files in a RAM directory (SQLite's own locks and shared memory work as always).
Beside the files it keeps, per file, the image that is safe (last xSync) and the writes since. `cut` draws
what a power cut leaves of them; `copy` is what a mere kill -9 leaves (the page cache survives). Either
becomes the directory of the next start; whatever still holds the old files meets I/O errors.
Source: promises.md P2; docs/adr/0060.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import apsw

SECTOR: int = 512
_numbers = itertools.count(1)


def ram_directory() -> str:
    """A fresh directory in memory where the machine has one."""
    return tempfile.mkdtemp(prefix="fastim-sim-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


class _Safe:
    """One file: the synced bytes, and what was written after."""

    __slots__ = ("image", "since")

    def __init__(self, image: bytes) -> None:
        self.image = bytearray(image)
        self.since: list[tuple[int, bytes | None]] = []
        """(offset, data); data None = truncate to offset."""

    def sync(self) -> None:
        for offset, data in self.since:
            _apply(self.image, offset, data)
        self.since.clear()


def _apply(image: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del image[offset:]
        return
    if len(image) < offset:
        image.extend(bytes(offset - len(image)))
    image[offset : offset + len(data)] = data


class Disk:
    """The disk of one start of a process. `vfs` is the name to open databases with."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.vfs = f"sim-disk-{next(_numbers)}"
        self.dead = False
        self.full = False
        """ENOSPC for every write that would grow a file (and, as SQLite sees it, for every commit)."""
        self.writes = 0
        self.syncs = 0
        self.trap: tuple[int, Callable[[], None]] | None = None
        """(writes from now, what to call then): for a power cut inside a commit."""
        self._files: dict[str, _Safe] = {}
        for path in self.directory.iterdir():
            self._files[str(path)] = _Safe(path.read_bytes())
        self._vfs = _Vfs(self)

    def safe(self, name: str) -> _Safe:
        found = self._files.get(name)
        if found is None:
            found = self._files[name] = _Safe(b"")
        return found

    def check(self) -> None:
        """Before each write."""
        if self.dead:
            raise apsw.IOError("the power is off")
        if self.full:
            raise apsw.FullError("no space left")
        self.writes += 1
        if self.trap is not None:
            left, call = self.trap
            if left <= 0:
                self.trap = None
                call()
                raise apsw.IOError("the power went off")
            self.trap = (left - 1, call)

    def deleted(self, name: str) -> None:
        self._files.pop(name, None)

    def cut(self, rng: random.Random, target: str) -> None:
        """Write into `target` what a power cut leaves."""
        self.dead = True
        keep = rng.choice((0.0, 0.5, 0.9, 1.0))
        for name, file in self._files.items():
            if name.endswith("-shm"):
                continue
            image = bytearray(file.image)
            for offset, data in file.since:
                if rng.random() < keep:
                    if data is not None and rng.random() < 0.3:
                        data = data[: rng.randrange(0, len(data) + 1, SECTOR)]
                    _apply(image, offset, data)
            (Path(target) / Path(name).name).write_bytes(image)

    def copy(self, target: str) -> None:
        """Write into `target` what a kill -9 leaves: everything written."""
        self.dead = True
        for name, file in self._files.items():
            if not name.endswith("-shm"):
                file.sync()
                (Path(target) / Path(name).name).write_bytes(file.image)

    def remove(self) -> None:
        self.dead = True
        self._vfs.unregister()
        shutil.rmtree(self.directory, ignore_errors=True)


class _Vfs(apsw.VFS):
    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        super().__init__(disk.vfs, "unix")

    def excepthook(self, _kind: object, _error: object, _trace: object) -> None:
        """SQLite already has the error code; closing a database whose power is off raises nowhere."""

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        return _File(self.disk, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        self.disk.check()
        super().xDelete(filename, syncdir)
        self.disk.deleted(filename)


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        super().__init__("unix", name, flags)
        self.disk = disk
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self.safe = disk.safe(path) if path else None

    def excepthook(self, _kind: object, _error: object, _trace: object) -> None:
        """SQLite already has the error code; closing a database whose power is off raises nowhere."""

    def xWrite(self, data: bytes, offset: int) -> None:
        self.disk.check()
        super().xWrite(data, offset)
        if self.safe is not None:
            self.safe.since.append((offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:
        self.disk.check()
        super().xTruncate(newsize)
        if self.safe is not None:
            self.safe.since.append((newsize, None))

    def xSync(self, flags: int) -> None:
        if self.disk.dead:
            raise apsw.IOError("the power is off")
        self.disk.syncs += 1
        if self.safe is not None:
            self.safe.sync()
