#!lua flags=allow-oom
-- What changes when this server may have lost something: its key when it was flushed, its run_id when it was
-- restarted or a replica was promoted.
--
-- KEYS  1 the epoch
-- ARGV  1 a fresh random name for it
local epoch = redis.call('GET', KEYS[1])
if not epoch then
  epoch = ARGV[1]
  redis.call('SET', KEYS[1], epoch)
end
return epoch .. ':' .. string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
