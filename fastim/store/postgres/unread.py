"""Unread, exactly, in SQL:

    cseq(head) - cseq(mark) - own countable messages above the mark - recalled ones of others above it

mark = the read mark. Own ones are a difference of running sums: `own` up to the projected head, `read_own` up
to the mark. So it is O(1) per conversation but for the recalled ones, which an index of their own holds. For
who was not a member from the first seq to now it is counted in the timeline.

U1  equal to counting the timeline (recount)        tests/contract/store.py (S6)
"""

from __future__ import annotations

from typing import Final

_OWN: Final = (
    "(SELECT count(*) FROM message m WHERE m.shard = {u}.shard AND m.conv = {u}.conv AND m.seq > {above}"
    " AND m.seq <= {upto} AND m.sender = {u}.user_id AND m.countable)"
)
_WHOLE: Final = (
    "(left(u.conv, 1) <> 'g' OR (SELECT count(*) = 1 AND bool_and(b.join_seq <= 1 AND b.leave_seq = 0)"
    " FROM member b WHERE b.shard = u.shard AND b.conv = u.conv AND b.user_id = u.user_id))"
)
_RECALLED: Final = (
    "(SELECT count(*) FROM message m WHERE m.shard = u.shard AND m.conv = u.conv AND m.seq > u.read_seq"
    " AND m.recalled AND m.countable AND m.sender <> u.user_id)"
)
COUNTED: Final = (
    "(SELECT count(*) FROM message m WHERE m.shard = u.shard AND m.conv = u.conv AND m.seq > u.read_seq"
    " AND m.sender <> u.user_id AND m.countable AND NOT m.recalled"
    " AND (left(u.conv, 1) <> 'g' OR EXISTS (SELECT FROM member b WHERE b.shard = u.shard"
    " AND b.conv = u.conv AND b.user_id = u.user_id AND b.join_seq <= m.seq"
    " AND (b.leave_seq = 0 OR m.seq < b.leave_seq))))"
)
"""From the timeline alone, for a row u of user_conv."""


def _unread(cseq: str, own: str) -> str:
    base = f"({cseq} - u.read_cseq - {own} + u.read_own)"
    return f"(CASE WHEN {base} <= 0 THEN 0 WHEN {_WHOLE} THEN {base} - {_RECALLED} ELSE {COUNTED} END)"


PROJECTED: Final = _unread("u.cseq", "u.own")
"""For a row u of user_conv that is projected up to the head."""

LIVE: Final = (
    "SELECT u.read_seq, " + _unread("t.cseq", "t.own") + " FROM (SELECT u.* FROM user_conv u"
    " WHERE u.shard = $1 AND u.conv = $2 AND u.user_id = $3) u CROSS JOIN LATERAL (SELECT"
    " coalesce((SELECT m.cseq FROM message m WHERE m.shard = u.shard AND m.conv = u.conv"
    " ORDER BY m.seq DESC LIMIT 1), 0) AS cseq,"
    f" u.own + {_OWN.format(u='u', above='u.head', upto='9223372036854775807')} AS own) t"
)
"""(read mark, unread) of one conversation, whatever of it is projected."""

MOVE_MARKS: Final = (
    "UPDATE user_conv u SET version = greatest(u.version, w.version), read_seq = w.seq,"
    " read_cseq = (SELECT m.cseq FROM message m WHERE m.shard = w.shard AND m.conv = w.conv"
    " AND m.seq = w.seq), read_own = CASE"
    f" WHEN w.seq >= u.head THEN u.own + {_OWN.format(u='u', above='u.head', upto='w.seq')}"
    " WHEN u.head - w.seq <= w.seq - u.read_seq THEN"
    f" u.own - {_OWN.format(u='u', above='w.seq', upto='u.head')}"
    f" ELSE u.read_own + {_OWN.format(u='u', above='u.read_seq', upto='w.seq')} END"
    " FROM unnest($1::smallint[], $2::text[], $3::text[], $4::bigint[], $5::bigint[])"
    " AS w(shard, conv, user_id, seq, version)"
    " WHERE u.shard = w.shard AND u.conv = w.conv AND u.user_id = w.user_id AND w.seq > u.read_seq"
)
"""Read marks forward. The shard is locked, so nothing can be appended that this statement does not see."""
