#!lua
-- Give an attachment its generation, which only a node with a live lease gets.
--
-- KEYS  1 the leases
-- ARGV  1 node  2 boot  3 the newest generation that the caller has seen
-- Returns the generation, or 0.
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local boot, ends_ms = string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '', '^(%d+)|%d+|(%d+)$')
if boot ~= ARGV[2] or tonumber(ends_ms) <= now_ms then
  return 0
end
local newest = tonumber(redis.call('HGET', KEYS[1], '') or 0)
local generation = math.max(newest, tonumber(ARGV[3]), now_ms * 1024) + 1
redis.call('HSET', KEYS[1], '', string.format('%.0f', generation))
return generation
