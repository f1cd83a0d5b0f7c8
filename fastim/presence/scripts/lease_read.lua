#!lua flags=no-writes
-- The leases that live.
--
-- KEYS  1 the leases
-- Returns {node, boot|opened, node, boot|opened, ...}.
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local live = {}
local leases = redis.call('HGETALL', KEYS[1])
for at = 1, #leases, 2 do
  local lease, ends_ms = string.match(leases[at + 1], '^(%d+|%d+)|(%d+)$')
  if leases[at] ~= '' and tonumber(ends_ms) > now_ms then
    live[#live + 1] = leases[at]
    live[#live + 1] = lease
  end
end
return live
