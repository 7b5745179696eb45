-- Lift requests that have waited too long to level 0, where their age puts them at the head of their
-- lane, and those whose deadline is near before all levels. ARGV: now limit. Returns how many.
drain_first()
local t, limit = clock(), tonumber(ARGV[2])
local lifted = 0

local function lift(index, cut, change)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', whole(cut), 'LIMIT', 0, limit - lifted)) do
    local r = load_request(id)
    if r and r.state == 'Q' then
      unlist(r)
      change(r)
      enqueue(r, t, false)
      lifted = lifted + 1
    else
      redis.call('ZREM', index, id) -- its record is lost: heal
    end
  end
end

lift(DEADLINES, t, function(r)
  r.urgent = '1'
  redis.call('HSET', request_key(r.id), 'urgent', '1')
end)
for level = 1, setting('levels', 1) - 1 do
  lift(ages_key(level), t - setting('promote_after', 5) * 1000000, function(r)
    r.level = 0
    redis.call('HSET', request_key(r.id), 'level', 0, 'spent', 0)
  end)
end
return lifted
