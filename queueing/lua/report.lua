-- A worker's batched report: renews the worker and its leases, charges service to MLFQ levels, and to
-- lanes the output that was not expected.
-- ARGV: now worker epoch load, then quadruples id fence generated served
-- Returns {verdict, level, ...}, or nil when the registry does not know this epoch.
drain_first()
local t, worker, epoch = clock(), ARGV[2], ARGV[3]
local w = redis.call('HMGET', worker_key(worker), 'epoch', 'ttl')
if w[1] ~= epoch then return nil end
redis.call('ZADD', WORKERS, t + tonumber(w[2]), worker)
redis.call('HSET', worker_key(worker), 'load', ARGV[4])

-- Without settings (the server has just lost its data) nobody is demoted.
local c = redis.call('HMGET', CONFIG, 'levels', 'quantum', 'ratio')
local levels, quantum, ratio = tonumber(c[1] or 1), tonumber(c[2] or 1), tonumber(c[3] or 1)
local expiry = t + setting('lease_ttl', 10) * 1000000

-- Where a length was predicted, the order counts on it: a request sinks when it has outlived the
-- prediction, and again each time it has outlived the double. Else it sinks by quanta of service.
local function charge(r, generated, served)
  local spent = tonumber(r.spent)
  if r.predicted ~= '' then
    while r.level < levels - 1 and generated > r.predicted * 2 ^ r.level do r.level = r.level + 1 end
  else
    spent = spent + math.max(0, served - r.served)
    while r.level < levels - 1 and spent >= quantum * ratio ^ r.level do
      spent = spent - quantum * ratio ^ r.level
      r.level = r.level + 1
    end
  end
  local tokens = r.tokens
  if generated > tonumber(r.generated) then -- its prompt is through
    release_tokens(r)
    tokens = 0
  end
  generated = math.max(generated, r.generated)
  if generated > tonumber(r.expected or generated) then
    local bill = bill_of(r)
    correct_lane(r, bill, math.max(bill.charged, cost_at(r, bill, generated)))
  end
  redis.call('HSET', request_key(r.id), 'generated', generated, 'served', served,
    'spent', spent, 'level', r.level, 'tokens', tokens)
end

local function judge(id, fence, generated, served)
  local r = load_request(id)
  if not r then return 'S', 0 end
  if not is_live(r) then return 'X', r.level end
  if r.worker ~= worker then
    -- A decode worker that reserved room for a request still in prefill reports it under the
    -- prefill worker's claim: right, but nothing to charge or renew.
    return r.fence == fence and r.state == 'P' and '=' or 'S', r.level
  end
  -- Between hand-off and activation the decode worker knows only the claim it was reserved under.
  if r.fence ~= fence and not (r.state == 'D' and r.handed == fence) then return 'S', r.level end
  charge(r, generated, served)
  redis.call('ZADD', LEASES, 'XX', expiry, id)
  return '=', r.level
end

local out = {}
for i = 5, #ARGV, 4 do
  local verdict, level = judge(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]))
  out[#out + 1] = verdict
  out[#out + 1] = tostring(level)
end
return out
