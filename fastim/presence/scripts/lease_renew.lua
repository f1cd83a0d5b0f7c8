#!lua flags=allow-oom
-- Lengthen a lease that lives.
--
-- KEYS  1 the leases
-- ARGV  1 node  2 boot  3 ttl_ms
-- Returns opened, or 0 when it has ended or another boot has it.
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local boot, opened, ends_ms = string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '', '^(%d+)|(%d+)|(%d+)$')
if boot ~= ARGV[2] or tonumber(ends_ms) <= now_ms then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%s|%s|%.0f', boot, opened, now_ms + tonumber(ARGV[3])))
return tonumber(opened)
