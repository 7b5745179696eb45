-- A worker takes no new claims. ARGV: now worker epoch
drain_first()
if redis.call('HGET', worker_key(ARGV[2]), 'epoch') == ARGV[3] then
  redis.call('HSET', worker_key(ARGV[2]), 'draining', 1)
end
