-- Sweep what has expired. ARGV: now gateway read_up_to limit
-- Returns {workers, news, fence of the last news, timed out}: all workers that expired, but only
-- this gateway's own news and deadlines. News stay until the gateway says it has read them
-- (read_up_to, a fence), timed-out requests until it finishes them, so no lost reply hides any.
drain_first()
local t, gateway, read_up_to, limit = clock(), ARGV[2], ARGV[3], tonumber(ARGV[4])
local now = whole(t)

local workers = redis.call('ZRANGEBYSCORE', WORKERS, '-inf', now, 'LIMIT', 0, 16)
for _, worker in ipairs(workers) do
  -- Leases end now; the loop below requeues within its limit, the next sweep goes on.
  for _, id in ipairs(redis.call('SMEMBERS', held_key(worker))) do redis.call('ZADD', LEASES, 'XX', 0, id) end
  redis.call('ZREM', WORKERS, worker)
  redis.call('DEL', worker_key(worker), prefixes_key(worker))
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, limit)) do
  local r = load_request(id)
  if r and is_claimed(r) then requeue_and_tell(r, t, true)
  else redis.call('ZREM', LEASES, id) end
end

-- Nobody is left to tell the client of a dead gateway: its requests end, and workers stop them.
for _, dead in ipairs(redis.call('ZRANGEBYSCORE', GATEWAYS, '-inf', now, 'LIMIT', 0, 4)) do
  if dead ~= gateway then
    for _, id in ipairs(redis.call('ZRANGE', live_key(dead), 0, limit - 1)) do
      local r = load_request(id)
      if r and is_live(r) then end_request(r, 'C', 0) else redis.call('ZREM', live_key(dead), id) end
    end
    if redis.call('EXISTS', live_key(dead)) == 0 then
      redis.call('DEL', news_key(dead))
      redis.call('ZREM', GATEWAYS, dead)
    end
  end
end

redis.call('ZREMRANGEBYSCORE', news_key(gateway), '-inf', read_up_to)
local news, last = {}, read_up_to
local raw = redis.call('ZRANGE', news_key(gateway), 0, limit - 1, 'WITHSCORES')
for i = 1, #raw, 2 do
  news[#news + 1] = raw[i]
  last = whole(raw[i + 1])
end
local timed_out = redis.call('ZRANGEBYSCORE', live_key(gateway), '-inf', now, 'LIMIT', 0, limit)
return { workers, news, last, timed_out }
