-- Starts of nodes whose inbox may hold something (Store.S12).
CREATE TABLE open_boot (node TEXT NOT NULL, boot INTEGER NOT NULL, PRIMARY KEY (node, boot)) WITHOUT ROWID;
