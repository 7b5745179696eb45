-- Give waiting requests of one gateway to a worker, in the order of the whole pool.
-- ARGV: now gateway nonce worker epoch limit look_ahead
-- Returns {id, fence, level, generated, attempt, ...}; empty also when the worker is gone or drains.
--
-- Only a request's own gateway has its prompt, so only that one can claim it. To keep the order
-- anyway, a claim walks the queue from the head and subtracts what requests of other live gateways
-- will need; it ends at the first request that does not fit, whoever owns it. So nothing
-- overtakes, and a long prompt gets its turn when the worker runs empty: then the first one always
-- fits (it will be cut into chunks).
drain_first()
local t, gateway, nonce, worker, epoch = clock(), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local limit, look_ahead = tonumber(ARGV[6]), tonumber(ARGV[7])

local answered = redis.call('GET', answer_key(nonce))
if answered then return cjson.decode(answered) end

local w = redis.call('HMGET', worker_key(worker), 'epoch', 'draining', 'role', 'capacity_tokens', 'tokens')
if w[1] ~= epoch or w[2] == '1' then return {} end
local state = w[3] == 'decode' and 'D' or 'P' -- a decode worker prefills by itself
local free, idle = w[4] - w[5], w[5] == '0'
local lease = setting('lease_ttl', 10) * 1000000

local alive = {}
local function is_alive(owner)
  if alive[owner] == nil then
    alive[owner] = tonumber(redis.call('ZSCORE', GATEWAYS, owner) or 0) > t
  end
  return alive[owner]
end

local function take(r, need)
  local fence = next_fence(t)
  dequeue(r)
  attach(r, state, worker, epoch, fence, need, t + lease)
  redis.call('HINCRBY', worker_key(worker), 'tokens', need)
  return { r.id, fence, tostring(r.level), r.generated, tostring(r.faults + 1) }
end

local out, taken, seen = {}, 0, 0
local function walk(band)
  for _, id in ipairs(redis.call('ZRANGE', queue_key(band), 0, look_ahead - seen - 1)) do
    seen = seen + 1
    local r = load_request(id)
    if not r or r.state ~= 'Q' then
      redis.call('ZREM', queue_key(band), id) -- its record is lost: heal
    elseif is_alive(r.gateway) and (r.deadline == '' or tonumber(r.deadline) > t) then
      local need = math.max(1, r.prompt + r.generated - r.cached)
      if need > free and not idle then return true end
      free, idle = free - need, false
      if r.gateway == gateway then
        for _, value in ipairs(take(r, need)) do out[#out + 1] = value end
        taken = taken + 1
        if taken == limit then return true end
      end
    end
  end
  return seen >= look_ahead
end

for _, band in ipairs(redis.call('ZRANGE', BANDS, 0, -1)) do
  if walk(band) then break end
end
if taken > 0 then redis.call('SET', answer_key(nonce), cjson.encode(out), 'EX', 10) end
return out
