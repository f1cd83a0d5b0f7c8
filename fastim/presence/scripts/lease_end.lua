#!lua flags=allow-oom
-- End a lease now.
--
-- KEYS  1 the leases, see lease_open
-- ARGV  1 node  2 boot
if string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '', '^%d+') == ARGV[2] then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('SPUBLISH', KEYS[1], '')
end
return 1
