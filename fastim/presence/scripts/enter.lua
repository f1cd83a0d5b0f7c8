#!lua
-- Say how many members of a room a node holds. Of two words the newer counts, whatever order they come in.
--
-- KEYS  1 the room: node -> opened|stamp|boot|members; also the name of its channel
-- ARGV  1 node  2 opened, of the node's lease  3 stamp  4 boot|members  5 keep_ms
local held = redis.call('HGET', KEYS[1], ARGV[1])
local opened, stamp, word = string.match(held or '0|0|', '^(%d+)|(%d+)|(.*)$')
opened, stamp = tonumber(opened), tonumber(stamp)
local my_opened, my_stamp = tonumber(ARGV[2]), tonumber(ARGV[3])
if opened > my_opened or (opened == my_opened and stamp > my_stamp) then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. '|' .. ARGV[3] .. '|' .. ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
if opened ~= my_opened or word ~= ARGV[4] then
  redis.call('SPUBLISH', KEYS[1], '')
end
return 1
