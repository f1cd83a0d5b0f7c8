from typing import Final

DEBUG: Final[bool]
OP_PING: Final[int]
OP_ACK: Final[int]
OP_ACKS: Final[int]
OP_MSG: Final[int]
OP_PONG: Final[int]
OP_SEALED: Final[int]
OP_SEALED_DOWN: Final[int]
SEALED_HEADER_BYTES: Final[int]
MAX_ACK_IDS: Final[int]
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
def parse_acks(data: bytes | bytearray | memoryview) -> list[int]: ...
def pong(server_ms: int, last_tag: int, user_cursor: int) -> bytes: ...
def msg_prefix(tag: int, dup: bool) -> bytes: ...
def build_msg(tag: int, dup: bool, tail: bytes) -> bytes: ...
def ranges(values: list[int]) -> list[tuple[int, int]]: ...
