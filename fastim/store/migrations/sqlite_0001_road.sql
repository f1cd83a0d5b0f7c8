-- Names become small integers once, so that every index entry below is a few bytes (docs/adr/0020).
-- One integer key, one seek: `pair` is (person << 32) | conv, so a person's rows lie together; `seat` is
-- (conv << 32) | person and `spot` (conv << 32) | device, so that the acks of one message by all members of a
-- group touch few pages.

CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
-- settled    msg_id up to which every obligation has a fate row or a due row
-- projected  msg_id up to which the timeline is projected into user_conv
-- minted     the newest id that was minted for a change that is no message
-- ahead      how many ms the time in a msg_id was at most ahead of its message's ts_ms
INSERT INTO meta VALUES ('settled', 0), ('projected', 0), ('minted', 0), ('ahead', 0);

CREATE TABLE person (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);

CREATE TABLE device (
    id INTEGER PRIMARY KEY,
    person INTEGER NOT NULL,
    name TEXT NOT NULL,
    class TEXT NOT NULL,
    first_seen_ms INTEGER NOT NULL,
    last_seen_ms INTEGER NOT NULL,
    level INTEGER NOT NULL DEFAULT 0,
    UNIQUE (person, name)
);

CREATE TABLE conv (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, epoch INTEGER NOT NULL);

-- Groups only; the members of p: and s: are in the name. number = join order.
CREATE TABLE member (
    conv INTEGER NOT NULL,
    number INTEGER NOT NULL,
    person INTEGER NOT NULL,
    role INTEGER NOT NULL,
    join_seq INTEGER NOT NULL,
    leave_seq INTEGER NOT NULL,
    PRIMARY KEY (conv, number)
) WITHOUT ROWID;
CREATE INDEX member_person ON member (person, conv);

-- The timeline. Appended at the end by msg_id; client_id is time-ordered, so only message_seq is random.
-- There is no row per conversation: its head is a seek in message_seq.
CREATE TABLE message (
    msg_id INTEGER PRIMARY KEY,
    conv INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    cseq INTEGER NOT NULL,
    sender INTEGER NOT NULL,
    client_id BLOB NOT NULL,
    kind INTEGER NOT NULL,
    flags INTEGER NOT NULL,
    countable INTEGER NOT NULL,
    recalled INTEGER NOT NULL,
    ts_ms INTEGER NOT NULL,
    loss_time_ms INTEGER NOT NULL,
    content BLOB NOT NULL,           -- hash of the fields as sent
    mentions TEXT,                   -- names by line; '' = @all only; NULL = nobody
    body BLOB NOT NULL
);
CREATE UNIQUE INDEX message_seq ON message (conv, seq);
CREATE UNIQUE INDEX message_client ON message (client_id, sender, conv);
CREATE INDEX message_mention ON message (conv, seq) WHERE mentions IS NOT NULL;
CREATE INDEX message_recalled ON message (conv, seq) WHERE recalled;

-- Up to which seq a device has settled everything.
CREATE TABLE cursor (spot INTEGER PRIMARY KEY, seq INTEGER NOT NULL);

-- What became of obligations: ranges of at most 1,000 seqs, so that a look-up of one seq reads a bounded
-- stretch. The same fact written twice is one row. device 0 = none (parked, expired on the way).
CREATE TABLE fate (
    seat INTEGER NOT NULL,
    to_seq INTEGER NOT NULL,
    fate INTEGER NOT NULL,
    device INTEGER NOT NULL,
    from_seq INTEGER NOT NULL,
    node TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    ts_ms INTEGER NOT NULL,
    PRIMARY KEY (seat, to_seq, fate, device, from_seq)
) WITHOUT ROWID;

-- ready_ms: when it may be claimed: due_at_ms, or the end of the claim while holder is not NULL.
CREATE TABLE due (
    pair INTEGER PRIMARY KEY,
    from_seq INTEGER NOT NULL,
    due_at_ms INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    holder TEXT,
    ready_ms INTEGER NOT NULL
);
CREATE INDEX due_ready ON due (ready_ms);

-- ready_ms NULL: nothing to push; the row stays until idle_ms to remember last_ms for the collapse window.
-- again_ms: what was asked for while the push was out.
CREATE TABLE push (
    pair INTEGER PRIMARY KEY,
    serial INTEGER NOT NULL,
    ready_ms INTEGER,
    attempt INTEGER NOT NULL,
    holder TEXT,
    again_ms INTEGER NOT NULL,
    collapse_ms INTEGER NOT NULL,
    last_ms INTEGER NOT NULL,
    idle_ms INTEGER NOT NULL
);
CREATE INDEX push_ready ON push (ready_ms) WHERE ready_ms IS NOT NULL;
CREATE INDEX push_idle ON push (idle_ms) WHERE ready_ms IS NULL;

-- A user's conversation: the change index (version), a projection of the timeline up to seq `head`, and the
-- read mark. own: his own countable messages up to head; base_cseq, base_own: the same sums up to base_seq,
-- which follows read_seq lazily.
CREATE TABLE user_conv (
    pair INTEGER PRIMARY KEY,
    person INTEGER NOT NULL,
    version INTEGER NOT NULL,
    head INTEGER NOT NULL,
    cseq INTEGER NOT NULL,
    own INTEGER NOT NULL,
    read_seq INTEGER NOT NULL,
    base_seq INTEGER NOT NULL,
    base_cseq INTEGER NOT NULL,
    base_own INTEGER NOT NULL
);
CREATE INDEX user_conv_version ON user_conv (person, version);

CREATE TABLE boot (node TEXT PRIMARY KEY, boot INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE fence (
    node TEXT NOT NULL,
    boot INTEGER NOT NULL,
    holder TEXT NOT NULL,
    claim_until_ms INTEGER NOT NULL,
    PRIMARY KEY (node, boot)
) WITHOUT ROWID;
