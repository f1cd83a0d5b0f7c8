"""The reader of system-call traces sees a SENT that left too early."""

from __future__ import annotations

import pytest

from tests.shows.trace import SENT_ITEM, Order, judge, read_calls

ID = bytes(range(16))


def hexed(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)


WAL = f"9<{hexed(b'/data/fastim.db-wal')}>"
WRITE = f'1 pwrite64({WAL}, "{hexed(b"row " + ID)}", 20, 0) = 20'
SYNC = f"1 fdatasync({WAL}) = 0"
SYNC_BEGINS, SYNC_ENDS = f"1 fdatasync({WAL} <unfinished ...>", "1 <... fdatasync resumed>) = 0"
SENT = f'2 sendto(7<{hexed(b"socket:[1]")}>, "{hexed(b"!" + SENT_ITEM + ID)}", 20, 0, NULL, 0) = 20'


def order(*lines: str) -> Order:
    return judge(read_calls(lines))


def test_sent_after_its_sync_is_good() -> None:
    found = order(WRITE, SYNC, SENT)
    assert found.bad == []
    assert (list(found.sent), found.synced) == ([ID], 1)


@pytest.mark.parametrize(
    "lines",
    [
        (SENT, WRITE, SYNC),
        (WRITE, SENT, SYNC),
        (SYNC, WRITE, SENT),
        (WRITE, SYNC_BEGINS, SENT, SYNC_ENDS),
        (SYNC_BEGINS, WRITE, SYNC_ENDS, SENT),
        (WRITE, SYNC.replace("= 0", "= -1 EIO (Input/output error)"), SENT),
        (WRITE, SYNC.replace("2d", "2e"), SENT),  # of another file
    ],
)
def test_sent_before_its_sync_is_seen(lines: tuple[str, ...]) -> None:
    assert len(order(*lines).bad) == 1


def test_sync_that_another_thread_interrupts_counts_when_it_has_returned() -> None:
    assert order(WRITE, SYNC_BEGINS, SYNC_ENDS, SENT).bad == []


def test_vector_write_is_joined() -> None:
    first, second = hexed(SENT_ITEM + ID[:5]), hexed(ID[5:])
    vector = f'[{{iov_base="{first}", iov_len=8}}, {{iov_base="{second}"}}]'
    sent = f"2 writev(7<{hexed(b'socket:[1]')}>, {vector}, 2) = 19"
    assert list(order(WRITE, SYNC, sent).sent) == [ID]
