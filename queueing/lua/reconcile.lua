-- Recreate a gateway's requests after the server lost its data, or ended them because the gateway
-- was silent for too long; live records are left alone.
-- ARGV: now gateway, then per request: id tenant prompt cached priority time_to_live level
-- generated worker fence attempt ('' for no worker) age handicap cost predicted
-- token_cost expected longest.
-- Returns how many were created.
drain_first()
local t, gateway = clock(), ARGV[2]
local lease = setting('lease_ttl', 10) * 1000000
local created = 0

local function hold(r, worker, fence)
  if tonumber(redis.call('GET', FENCE) or 0) < tonumber(fence) then redis.call('SET', FENCE, fence) end
  local w = redis.call('HMGET', worker_key(worker), 'epoch', 'role')
  -- An unknown worker may be about to register again: epoch 0 lets it keep the request.
  charge_lane(r)
  attach(r, w[2] == 'decode' and 'D' or 'P', worker, w[1] or '0', fence, 0, t + lease)
end

for i = 3, #ARGV, 18 do
  local id, tenant, ttl, worker, fence = ARGV[i], ARGV[i + 1], ARGV[i + 5], ARGV[i + 8], ARGV[i + 9]
  local old = load_request(id)
  if not old or (old.gateway == gateway and not is_live(old)) then
    redis.call('UNLINK', request_key(id))
    local deadline = ttl ~= '' and whole(t + tonumber(ttl)) or ''
    local since = t - tonumber(ARGV[i + 11])
    local r = { id = id, tenant = tenant, prompt = ARGV[i + 2], priority = ARGV[i + 4],
      level = tonumber(ARGV[i + 6]), queued_at = whole(since), due = whole(since + ARGV[i + 12]),
      cost = whole(math.max(1, tonumber(ARGV[i + 13]))), deadline = deadline, urgent = '0',
      generated = ARGV[i + 7], expected = ARGV[i + 16], bill = '0 0 ' .. ARGV[i + 15] .. ' ' .. ARGV[i + 17] }
    redis.call('HSET', request_key(id), 'state', 'Q', 'gateway', gateway, 'tenant', tenant,
      'priority', r.priority, 'prompt', r.prompt, 'cached', ARGV[i + 3], 'deadline', deadline,
      'queued_at', r.queued_at, 'level', r.level, 'first_level', r.level, 'spent', 0,
      'generated', ARGV[i + 7], 'faults', ARGV[i + 10] - 1, 'fence', '0', 'worker', '', 'epoch', '0',
      'tokens', 0, 'served', 0, 'handed', '', 'due', r.due, 'cost', r.cost,
      'predicted', ARGV[i + 14], 'expected', r.expected, 'bill', r.bill, 'urgent', '0')
    count_in_lane(r, 1)
    redis.call('HINCRBY', TENANTS, tenant, 1)
    redis.call('ZADD', live_key(gateway), deadline == '' and '+inf' or deadline, id)
    if worker == '' then enqueue(r, t, true) else hold(r, worker, fence) end
    created = created + 1
  end
end
return created
