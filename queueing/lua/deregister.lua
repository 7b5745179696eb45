-- A worker leaves the registry in good order: what it held is requeued without blame.
-- ARGV: now worker epoch
drain_first()
local t, worker = clock(), ARGV[2]
if redis.call('HGET', worker_key(worker), 'epoch') ~= ARGV[3] then return end
requeue_held(worker, t, false)
redis.call('DEL', worker_key(worker), prefixes_key(worker))
redis.call('ZREM', WORKERS, worker)
