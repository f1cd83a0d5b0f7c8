#!lua
-- Put an attachment in the place of the device's older one. The older generation never wins.
--
-- KEYS  1 the user: device -> generation|boot|since_ms|class|node|session, and '' -> grace_until_ms;
--         also the name of his channel
-- ARGV  1 device  2 generation  3 the other fields  4 keep_ms
-- Returns {1, what was replaced or ''}, or {0, the newer entry}.
local old = redis.call('HGET', KEYS[1], ARGV[1])
if old and tonumber(string.match(old, '^%d+')) > tonumber(ARGV[2]) then
  return {0, old}
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. '|' .. ARGV[3])
redis.call('HDEL', KEYS[1], '')
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('SPUBLISH', KEYS[1], '')
return {1, old or ''}
