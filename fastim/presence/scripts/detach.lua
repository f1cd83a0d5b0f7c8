#!lua flags=allow-oom
-- Take away exactly this generation. The last to leave in good order leaves its grace behind.
--
-- KEYS  1 the user, see attach
-- ARGV  1 device  2 generation  3 grace_until_ms, 0 for none
-- Returns what was taken away, or nil.
local entry = redis.call('HGET', KEYS[1], ARGV[1])
if not entry or string.match(entry, '^%d+') ~= ARGV[2] then
  return nil
end
local grace = redis.call('HGET', KEYS[1], '')
local others = redis.call('HLEN', KEYS[1]) - (grace and 2 or 1)
local grace_until_ms = math.max(tonumber(ARGV[3]), tonumber(grace or 0))
redis.call('SPUBLISH', KEYS[1], '')
if grace_until_ms > 0 then
  redis.call('HSET', KEYS[1], '', string.format('%.0f', grace_until_ms))
end
-- Last: the key may be gone then, and a slot that moves away must not be asked for a key that is gone.
redis.call('HDEL', KEYS[1], ARGV[1])
if grace_until_ms > 0 and others == 0 then
  -- Ten minutes more: the nodes' clocks say when a grace is over, not this server's.
  redis.call('PEXPIREAT', KEYS[1], string.format('%.0f', grace_until_ms + 600000))
end
return entry
