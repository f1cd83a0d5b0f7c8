-- One database of several (docs/adr/0095). `shard` is shard_of(conv), for what belongs to a conversation, or
-- shard_of(user), shard_of(node). It is the partition key of every large table, and would be the distribution
-- column of Citus, so it is part of every primary key and every unique index.
-- All names are compared bytewise: no locale of a machine ever decides what an index finds.

-- The shards that live here: their clocks, and the locks of whoever appends. A row is locked from before the
-- first id of a transaction is given until its commit, so within a shard ids are committed in order.
CREATE TABLE shard (
    shard SMALLINT PRIMARY KEY,
    last BIGINT NOT NULL DEFAULT 0,      -- the newest id that was given, or that others must stay above
    newest BIGINT NOT NULL DEFAULT 0,    -- the newest message
    ahead_ms BIGINT NOT NULL DEFAULT 0,  -- how much the time in a msg_id was at most ahead of its ts_ms
    turn BIGINT NOT NULL DEFAULT 0       -- drawn anew by each append: who remembers it knows all heads
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- Up to which id the timeline is projected into user_conv; locked by who projects.
CREATE TABLE projection (
    shard SMALLINT PRIMARY KEY,
    upto BIGINT NOT NULL DEFAULT 0
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- settled    msg_id up to which every obligation of this database has a fate row or a due row
CREATE TABLE mark (name TEXT PRIMARY KEY, value BIGINT NOT NULL);
INSERT INTO mark VALUES ('settled', 0);

CREATE TABLE conv (
    shard SMALLINT NOT NULL,
    conv TEXT COLLATE "C" NOT NULL,
    epoch INT NOT NULL,
    PRIMARY KEY (conv, shard)
) PARTITION BY RANGE (shard);

-- Groups only; the members of p: and s: are in the name. number = join order.
CREATE TABLE member (
    shard SMALLINT NOT NULL,
    conv TEXT COLLATE "C" NOT NULL,
    number INT NOT NULL,
    user_id TEXT COLLATE "C" NOT NULL,
    role SMALLINT NOT NULL,
    join_seq BIGINT NOT NULL,
    leave_seq BIGINT NOT NULL,
    PRIMARY KEY (conv, number, shard)
) PARTITION BY RANGE (shard);
CREATE INDEX member_user ON member (conv, user_id);

-- The timeline. Of its indexes only message_seq is random: msg_id and client_id grow with time.
-- There is no row per conversation that an append would write: its head is a seek in message_seq.
CREATE TABLE message (
    msg_id BIGINT NOT NULL,
    seq BIGINT NOT NULL,
    cseq BIGINT NOT NULL,
    ts_ms BIGINT NOT NULL,
    loss_time_ms BIGINT NOT NULL,
    kind INT NOT NULL,
    flags INT NOT NULL,
    shard SMALLINT NOT NULL,
    countable BOOLEAN NOT NULL,
    recalled BOOLEAN NOT NULL DEFAULT FALSE,
    conv TEXT COLLATE "C" NOT NULL,
    sender TEXT COLLATE "C" NOT NULL,
    client_id BYTEA NOT NULL,
    content BYTEA NOT NULL,              -- hash of the fields as sent
    mentions TEXT COLLATE "C",           -- names by line; '' = @all only; NULL = nobody
    body BYTEA NOT NULL,
    PRIMARY KEY (shard, msg_id)
) PARTITION BY RANGE (shard);
ALTER TABLE message ALTER COLUMN body SET STORAGE EXTERNAL;
CREATE UNIQUE INDEX message_seq ON message (conv, seq, shard);
CREATE UNIQUE INDEX message_client ON message (client_id, sender, conv, shard);
CREATE INDEX message_mention ON message (conv, seq) WHERE mentions IS NOT NULL;
CREATE INDEX message_recalled ON message (conv, seq) WHERE recalled;

-- Up to which seq a device has settled everything.
CREATE TABLE cursor (
    seq BIGINT NOT NULL,
    shard SMALLINT NOT NULL,
    conv TEXT COLLATE "C" NOT NULL,
    user_id TEXT COLLATE "C" NOT NULL,
    device TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (conv, user_id, device, shard)
) PARTITION BY RANGE (shard);

-- What became of obligations: ranges of at most 1,000 seqs, so that a look-up of one seq reads a bounded
-- stretch. The same fact written twice is one row. device '' = none (parked, expired on the way).
CREATE TABLE fate (
    to_seq BIGINT NOT NULL,
    from_seq BIGINT NOT NULL,
    ts_ms BIGINT NOT NULL,
    attempt INT NOT NULL,
    fate SMALLINT NOT NULL,
    shard SMALLINT NOT NULL,
    conv TEXT COLLATE "C" NOT NULL,
    user_id TEXT COLLATE "C" NOT NULL,
    device TEXT COLLATE "C" NOT NULL,
    node TEXT NOT NULL,
    PRIMARY KEY (conv, user_id, to_seq, fate, device, from_seq, shard)
) PARTITION BY RANGE (shard);

-- A user's conversation: the change index (version), a projection of the timeline up to seq `head`, and the
-- read mark. own: his own countable messages up to head; read_cseq, read_own: the same sums up to read_seq.
CREATE TABLE user_conv (
    version BIGINT NOT NULL DEFAULT 0,
    head BIGINT NOT NULL DEFAULT 0,
    cseq BIGINT NOT NULL DEFAULT 0,
    own BIGINT NOT NULL DEFAULT 0,
    read_seq BIGINT NOT NULL DEFAULT 0,
    read_cseq BIGINT NOT NULL DEFAULT 0,
    read_own BIGINT NOT NULL DEFAULT 0,
    shard SMALLINT NOT NULL,
    conv TEXT COLLATE "C" NOT NULL,
    user_id TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (conv, user_id, shard)
) PARTITION BY RANGE (shard);
CREATE INDEX user_conv_version ON user_conv (user_id, version);

DO $$
DECLARE
    part TEXT;
    filled TEXT;
BEGIN
    FOREACH part IN ARRAY ARRAY['conv', 'member', 'message', 'cursor', 'fate', 'user_conv'] LOOP
        filled := CASE WHEN part IN ('cursor', 'user_conv') THEN ' WITH (fillfactor = 80)' ELSE '' END;
        FOR number IN 0..7 LOOP
            EXECUTE format('CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%s) TO (%s)%s',
                part || '_' || number, part, number * 8, number * 8 + 8, filled);
        END LOOP;
    END LOOP;
END $$;

-- ready_ms: when it may be claimed: due_at_ms, or the end of the claim while holder is not NULL.
CREATE TABLE due (
    from_seq BIGINT NOT NULL,
    due_at_ms BIGINT NOT NULL,
    ready_ms BIGINT NOT NULL,
    attempt INT NOT NULL,
    shard SMALLINT NOT NULL,
    conv TEXT COLLATE "C" NOT NULL,
    user_id TEXT COLLATE "C" NOT NULL,
    holder TEXT,
    PRIMARY KEY (conv, user_id, shard)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX due_ready ON due (ready_ms);

-- ready_ms NULL: nothing to push; the row stays until idle_ms to remember last_ms for the collapse window.
-- again_ms: what was asked for while the push was out.
CREATE TABLE push (
    serial BIGINT NOT NULL,
    ready_ms BIGINT,
    again_ms BIGINT NOT NULL DEFAULT 0,
    last_ms BIGINT NOT NULL DEFAULT 0,
    idle_ms BIGINT NOT NULL DEFAULT 0,
    collapse_ms BIGINT NOT NULL,
    attempt INT NOT NULL DEFAULT 0,
    shard SMALLINT NOT NULL,
    conv TEXT COLLATE "C" NOT NULL,
    user_id TEXT COLLATE "C" NOT NULL,
    holder TEXT,
    PRIMARY KEY (conv, user_id, shard)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX push_ready ON push (ready_ms) WHERE ready_ms IS NOT NULL;
CREATE INDEX push_idle ON push (idle_ms) WHERE ready_ms IS NULL;

-- By the shard of the user. number = order of registration.
CREATE TABLE device (
    number BIGINT GENERATED ALWAYS AS IDENTITY,
    first_seen_ms BIGINT NOT NULL,
    last_seen_ms BIGINT NOT NULL,
    level BIGINT NOT NULL DEFAULT 0,
    shard SMALLINT NOT NULL,
    user_id TEXT COLLATE "C" NOT NULL,
    device TEXT COLLATE "C" NOT NULL,
    class TEXT NOT NULL,
    PRIMARY KEY (user_id, device, shard)
);

-- By the shard of the node. open_boot: whose inbox may hold something.
CREATE TABLE open_boot (
    shard SMALLINT NOT NULL,
    node TEXT COLLATE "C" NOT NULL,
    boot BIGINT NOT NULL,
    PRIMARY KEY (node, boot, shard)
);
CREATE TABLE boot (
    shard SMALLINT NOT NULL,
    node TEXT COLLATE "C" NOT NULL,
    boot BIGINT NOT NULL,
    PRIMARY KEY (node, shard)
);
CREATE TABLE fence (
    shard SMALLINT NOT NULL,
    node TEXT COLLATE "C" NOT NULL,
    boot BIGINT NOT NULL,
    holder TEXT NOT NULL,
    claim_until_ms BIGINT NOT NULL,
    PRIMARY KEY (node, boot, shard)
);
