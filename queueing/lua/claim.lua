-- Give waiting requests of one gateway to a worker, in the order of the whole pool.
-- ARGV: now gateway nonce worker epoch only limit look_ahead [tenant ...]
-- Returns {id, fence, level, generated, attempt, ...}; empty also when the worker is gone or drains.
-- Without a worker ('') nothing is claimed: returns {id, ...}, whatever room there is.
--
-- Only a request's own gateway has its prompt, so only that one can claim it. To keep the order
-- anyway, a claim walks the queue from the head and subtracts what requests of other live gateways
-- will need; it ends at the first request that does not fit, whoever owns it. So nothing
-- overtakes, and a long prompt gets its turn when the worker runs empty: then the first one always
-- fits (it will be cut into chunks). What the walk passes counts for its lane in thought only.
-- With tenants, only their lanes are walked. With an id in `only` the gateway keeps its other requests for
-- other workers: they are passed, and take no capacity.
drain_first()
local t, gateway, nonce, worker, epoch = clock(), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local only, limit, look_ahead = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])

local answered = redis.call('GET', answer_key(nonce))
if answered then return cjson.decode(answered) end

local free, idle, state = math.huge, true, 'P'
if worker ~= '' then
  local w = redis.call('HMGET', worker_key(worker), 'epoch', 'draining', 'role', 'capacity_tokens', 'tokens')
  if w[1] ~= epoch or w[2] == '1' then return {} end
  if w[3] == 'decode' then state = 'D' end -- it prefills by itself
  free, idle = w[4] - w[5], w[5] == '0'
end
local lease = setting('lease_ttl', 10) * 1000000

local open_to = #ARGV >= 9 and {} or nil
for i = 9, #ARGV do open_to[ARGV[i]] = true end

local alive = {}
local function is_alive(owner)
  if alive[owner] == nil then
    alive[owner] = tonumber(redis.call('ZSCORE', GATEWAYS, owner) or 0) > t
  end
  return alive[owner]
end

-- A lane as this walk has changed it in thought: `items` from its queue, `at` the next of them.
local PAGE = 16
local function refill(lane)
  if lane.at <= #lane.items then return true end
  local more = redis.call('ZRANGE', queue_key(lane.name), lane.read, lane.read + PAGE - 1)
  lane.items, lane.at, lane.read = more, 1, lane.read + #more
  return #more > 0
end

local function open_lane(priority, turn)
  local tenant = string.sub(turn, PLACE + 1)
  local name = priority .. '/' .. tenant
  local tag = tonumber(redis.call('HGET', lane_key(name), 'tag') or 0)
  return { name = name, tenant = tenant, priority = priority, tag = tag, items = {}, at = 1, read = 0 }
end

local function stands_before(a, b)
  if a.bucket ~= b.bucket then return a.bucket < b.bucket end
  return a.turn < b.turn
end

local taken, changed, seen = {}, {}, 0

-- Look at the head of a lane. Returns true when the walk is over.
local function visit(lane)
  local id = string.sub(lane.items[lane.at], PLACE + 1)
  local r = load_request(id)
  seen = seen + 1
  if not r or r.state ~= 'Q' then
    changed[lane] = changed[lane] or {}
    table.insert(changed[lane], lane.items[lane.at]) -- its record is lost: heal
  elseif is_alive(r.gateway) and (r.deadline == '' or tonumber(r.deadline) > t) then
    local mine = r.gateway == gateway
    if not mine or only == '' or only == id then
      local need = math.max(1, r.prompt + r.generated - r.cached)
      if need > free and not idle then return true end
      free, idle = free - need, false
      if mine then taken[#taken + 1] = { r, need, lane } end
    end
    lane.tag = lane.tag + cost_of_claim(r, bill_of(r))
  end
  lane.at = lane.at + 1
  return #taken == limit or seen >= look_ahead
end

-- Walk one class: the lanes as they stand there, merged with those that the walk has moved on.
local function walk(priority)
  local standing, read = {}, 0
  local moved = {}
  while true do
    if not standing[1] then
      local more = redis.call('ZRANGE', lanes_key(priority), read, read + PAGE - 1, 'WITHSCORES')
      for i = 1, #more, 2 do standing[#standing + 1] = { turn = more[i], bucket = tonumber(more[i + 1]) } end
      read = read + #standing
    end
    local best, index = standing[1], 0
    for i, lane in ipairs(moved) do
      if not best or stands_before(lane, best) then best, index = lane, i end
    end
    if not best then return false end
    local lane = table.remove(index == 0 and standing or moved, math.max(index, 1))
    if index == 0 then lane = open_lane(priority, lane.turn) end
    if (not open_to or open_to[lane.tenant]) and refill(lane) then
      if visit(lane) then return true end
      if refill(lane) then
        lane.turn = string.sub(lane.items[lane.at], 1, PLACE) .. lane.tenant
        lane.bucket = bucket_of(lane.tag)
        moved[#moved + 1] = lane
      end
    end
  end
end

for _, priority in ipairs(redis.call('ZRANGE', CLASSES, 0, -1)) do
  if walk(priority) then break end
end

local out = {}
if worker == '' then
  for _, one in ipairs(taken) do out[#out + 1] = one[1].id end
  return out
end
for _, one in ipairs(taken) do
  local r, need, lane = one[1], one[2], one[3]
  changed[lane] = changed[lane] or {}
  local fence = next_fence(t)
  unlist(r)
  local tag = charge_lane(r)
  if tag > tonumber(redis.call('HGET', VIRTUAL, r.priority) or 0) then
    redis.call('HSET', VIRTUAL, r.priority, whole(tag))
  end
  attach(r, state, worker, epoch, fence, need, t + lease)
  redis.call('HINCRBY', worker_key(worker), 'tokens', need)
  for _, value in ipairs({ r.id, fence, tostring(r.level), r.generated, tostring(r.faults + 1) }) do
    out[#out + 1] = value
  end
end
for lane, lost in pairs(changed) do
  for _, item in ipairs(lost) do redis.call('ZREM', queue_key(lane.name), item) end
  settle(lane.priority, lane.tenant, false)
end
if #taken > 0 then redis.call('SET', answer_key(nonce), cjson.encode(out), 'EX', 10) end
return out
