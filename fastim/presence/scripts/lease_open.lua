#!lua flags=allow-oom
-- Open a node's lease, or go on with it if it lives. A new one begins above every generation so far, so nothing
-- that an earlier lease of the node carried is ever valid again.
--
-- KEYS  1 the leases: node -> boot|opened|ends_ms, and '' -> the newest generation; also the name of the
--         channel on which every lease that begins, or ends in good order, is told
-- ARGV  1 node  2 boot  3 ttl_ms  4 the newest generation that the caller has seen
-- Returns {1, opened}, or {0, boot} when a newer boot has the lease.
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local boot, ttl_ms = tonumber(ARGV[2]), tonumber(ARGV[3])
local opened
local leases = redis.call('HGETALL', KEYS[1])
for at = 1, #leases, 2 do
  if leases[at] ~= '' then
    local held_boot, held_opened, ends_ms = string.match(leases[at + 1], '^(%d+)|(%d+)|(%d+)$')
    if tonumber(ends_ms) <= now_ms then
      redis.call('HDEL', KEYS[1], leases[at])
    elseif leases[at] == ARGV[1] then
      if tonumber(held_boot) > boot then
        return {0, tonumber(held_boot)}
      elseif tonumber(held_boot) == boot then
        opened = tonumber(held_opened)
      end
    end
  end
end
if not opened then
  -- The clock is the floor, so a server that lost its data does not begin below what it has given out.
  local newest = tonumber(redis.call('HGET', KEYS[1], '') or 0)
  opened = math.max(newest, tonumber(ARGV[4]), now_ms * 1024) + 1
  redis.call('HSET', KEYS[1], '', string.format('%.0f', opened))
  redis.call('SPUBLISH', KEYS[1], '')
end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d|%.0f|%.0f', boot, opened, now_ms + ttl_ms))
return {1, opened}
