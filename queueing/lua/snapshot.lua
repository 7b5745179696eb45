-- What there is. ARGV: now. Returns {workers as {id, field, value, ...}, levels as {requests,
-- tokens, age of the oldest in microseconds}}.
local t = clock()
local workers = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', WORKERS, '(' .. whole(t), '+inf')) do
  local w = redis.call('HGETALL', worker_key(id))
  table.insert(w, 1, id)
  workers[#workers + 1] = w
end

local levels = {}
for level = 0, setting('levels', 1) - 1 do
  local counts = redis.call('HMGET', COUNTS, 'n' .. level, 't' .. level)
  local first = redis.call('ZRANGE', ages_key(level), 0, 0, 'WITHSCORES')
  levels[level + 1] = { tonumber(counts[1] or 0), tonumber(counts[2] or 0), t - (first[2] or t) }
end
return { workers, levels }
