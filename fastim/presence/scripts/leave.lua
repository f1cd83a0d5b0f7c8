#!lua flags=allow-oom
-- Take a node out of a room; a newer boot's place, and a newer word of the same boot, stay. Redis deletes what
-- is empty, so that comes last: a slot that moves away must not be asked for a key that is gone.
--
-- KEYS  1 the room, see enter
-- ARGV  1 node  2 boot  3 stamp
local held = redis.call('HGET', KEYS[1], ARGV[1])
local stamp, boot = string.match(held or '', '^%d+|(%d+)|(%d+)|')
if boot ~= ARGV[2] or tonumber(stamp) > tonumber(ARGV[3]) then
  return 0
end
redis.call('SPUBLISH', KEYS[1], '')
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
