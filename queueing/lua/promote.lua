-- Lift requests that have waited too long to level 0, where their age puts them at the head.
-- ARGV: now limit. Returns how many.
drain_first()
local t, limit = clock(), tonumber(ARGV[2])
local cut = whole(t - setting('promote_after', 5) * 1000000)
local lifted = 0
for _, band in ipairs(redis.call('ZRANGE', BANDS, 0, -1)) do
  if band % BAND_WIDTH > 0 then
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue_key(band), '-inf', cut, 'LIMIT', 0, limit - lifted)) do
      local r = load_request(id)
      if r and r.state == 'Q' then
        dequeue(r)
        r.level = 0
        redis.call('HSET', request_key(id), 'level', 0, 'spent', 0)
        enqueue(r)
        lifted = lifted + 1
      end
    end
  end
end
return lifted
