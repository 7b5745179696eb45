-- The prefix map: what gateways tell each other of the prefix caches of workers.
-- ARGV: now since keep most read_limit, then per worker: worker epoch count key ...
-- Returns {time, worker, epoch, {key, ...}, ...} with what was told `since`, the newest first; then tells the
-- keys of this call, the most recently used first. `most` keys of all workers stay, none for longer than `keep`.
--
-- On a full server nothing is told: it needs its memory for requests. Reading goes on.
local t, since, keep = clock(), ARGV[2], tonumber(ARGV[3])
local most, read_limit = tonumber(ARGV[4]), tonumber(ARGV[5])
local workers = redis.call('ZRANGEBYSCORE', WORKERS, '(' .. whole(t), '+inf')
local share = math.max(1, math.floor(most / math.max(1, #workers)))
local read_share = math.max(1, math.floor(read_limit / math.max(1, #workers)))

local CHUNK = 256 -- keys of one command
local full = false

local function tell(worker, first, last)
  local name = prefixes_key(worker)
  local told = {}
  for i = first, last do
    told[#told + 1] = whole(t + last - i) -- ends of prompts are dropped before beginnings
    told[#told + 1] = ARGV[i]
    if #told == 2 * CHUNK or i == last then
      local reply = redis.pcall('ZADD', name, unpack(told))
      if type(reply) == 'table' and reply.err then full = true; return end
      told = {}
    end
  end
  redis.call('ZREMRANGEBYRANK', name, 0, -share - 1)
  redis.call('ZREMRANGEBYSCORE', name, '-inf', whole(t - keep))
  redis.call('PEXPIRE', name, math.ceil(keep / 1000))
end

local out = { whole(t) }
for _, worker in ipairs(workers) do
  local found = redis.call('ZREVRANGEBYSCORE', prefixes_key(worker), '+inf', since, 'LIMIT', 0, read_share)
  if found[1] then
    out[#out + 1] = worker
    out[#out + 1] = redis.call('HGET', worker_key(worker), 'epoch')
    out[#out + 1] = found
  end
end
local i = 6
while ARGV[i] and not full do
  local worker, epoch, count = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  if redis.call('HGET', worker_key(worker), 'epoch') == epoch then tell(worker, i + 3, i + 2 + count) end
  i = i + 3 + count
end
return out
