from typing import Final

DEBUG: Final[bool]
OP_PING: Final[int]
OP_ACK: Final[int]
OP_MSG: Final[int]
MAX_PACKET_BYTES: Final[int]
MAX_FRAMES: Final[int]
MAX_DEPTH: Final[int]
MAX_ARRAY: Final[int]
MAX_MAP: Final[int]
MAX_OP: Final[int]
MSG_PREFIX_BYTES: Final[int]

def live() -> dict[str, int]: ...
def split(data: bytes | bytearray | memoryview) -> list[tuple[int, int, int]]: ...
def parse_ack(data: bytes | bytearray | memoryview) -> int: ...
def msg_prefix(tag: int, dup: bool) -> bytes: ...
def build_msg(tag: int, dup: bool, tail: bytes) -> bytes: ...
def ranges(values: list[int]) -> list[tuple[int, int]]: ...
