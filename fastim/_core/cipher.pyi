from typing import Final, Self, final

from typing_extensions import disjoint_base

DEBUG: Final[bool]
BACKEND: Final[str]
KEY_BYTES: Final[int]
TAG_BYTES: Final[int]
PREFIX_BYTES: Final[int]
REKEY_FRAMES: Final[int]
MAX_FRAMES_PER_KEY: Final[int]

def live() -> dict[str, int]: ...

@disjoint_base
class Aead:
    def __new__(
        cls, key: bytes, prefix: bytes, *, backend: str = ..., counter: int = ..., frames: int = ...
    ) -> Self: ...
    @property
    def counter(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def left(self) -> int: ...

@final
class Sealer(Aead):
    def seal(self, aad: bytes, data: bytes) -> bytes: ...

@final
class Opener(Aead):
    def open(self, counter: int, aad: bytes, box: bytes) -> bytes: ...
