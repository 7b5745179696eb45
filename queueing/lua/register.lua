-- A worker enters the registry. ARGV: now worker nonce ttl, then pairs of field and value
-- Returns its epoch.
drain_first()
local t, worker, nonce, ttl = clock(), ARGV[2], ARGV[3], tonumber(ARGV[4])
local before = redis.call('HMGET', worker_key(worker), 'nonce', 'epoch')
if before[1] == nonce then return before[2] end -- the first reply was lost

local epoch = next_fence(t)
local adopted = {}
for _, id in ipairs(redis.call('SMEMBERS', held_key(worker))) do
  local r = load_request(id)
  if r and is_live(r) and r.worker == worker then
    if r.epoch == '0' then adopted[#adopted + 1] = id -- reconciled before its worker came back
    else requeue_and_tell(r, t, true) end
  end
end
redis.call('DEL', worker_key(worker), held_key(worker), prefixes_key(worker))
for _, id in ipairs(adopted) do
  redis.call('HSET', request_key(id), 'epoch', epoch)
  redis.call('SADD', held_key(worker), id)
end
redis.call('HSET', worker_key(worker), 'nonce', nonce, 'epoch', epoch, 'ttl', ttl, 'draining', 0,
  'tokens', 0, 'load', '', unpack(ARGV, 5))
redis.call('ZADD', WORKERS, t + ttl, worker)
return epoch
