-- Queue a request in its tenant's lane, at the level and with the handicap that the policy gives it.
-- Not safe at maxmemory on purpose: a full server refuses.
-- ARGV: now gateway nonce id tenant prompt cached priority time_to_live('' = none)
-- handicap cost predicted('' = none) token_cost expected longest
-- Returns {OK, level} | {EXISTS} | {UNKNOWN} gateway | {FULL, requests|tokens|tenant}
local t, gateway, nonce, id, tenant = clock(), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local prompt, cached, priority = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
local due, cost = whole(t + tonumber(ARGV[10])), whole(math.max(1, tonumber(ARGV[11])))

local before = redis.call('HMGET', request_key(id), 'nonce', 'first_level')
if before[1] == nonce then return { 'OK', before[2] } end -- the first reply was lost
local old = load_request(id)
if old and is_live(old) then return { 'EXISTS' } end
if not redis.call('ZSCORE', GATEWAYS, gateway) then return { 'UNKNOWN' } end

local c = redis.call('HMGET', CONFIG, 'levels', 'quantum', 'ratio', 'prefill_seconds_base',
  'prefill_seconds_per_token', 'max_queued_requests', 'max_queued_tokens', 'max_requests_per_tenant')
local skips = redis.call('HGET', CONFIG, 'policy') == 'skip-join-mlfq'
for i = 1, #c do c[i] = tonumber(c[i]) end
local levels, quantum, ratio = c[1], c[2], c[3]

local requests, tokens = 0, 0
local counts = redis.call('HGETALL', COUNTS)
for i = 1, #counts, 2 do
  if string.sub(counts[i], 1, 1) == 'n' then requests = requests + counts[i + 1]
  else tokens = tokens + counts[i + 1] end
end
if requests >= c[6] then return { 'FULL', 'requests' } end
if tokens + prompt > c[7] then return { 'FULL', 'tokens' } end
if tonumber(redis.call('HGET', TENANTS, tenant) or 0) >= c[8] then return { 'FULL', 'tenant' } end

local first_iteration = c[4] + (prompt - cached) * c[5]
local level = 0
while skips and level < levels - 1 and first_iteration > quantum * ratio ^ level do level = level + 1 end

local deadline = ''
if ARGV[9] ~= '' then deadline = whole(t + tonumber(ARGV[9])) end
redis.call('HSET', request_key(id), 'state', 'Q', 'gateway', gateway, 'tenant', tenant,
  'priority', priority, 'prompt', prompt, 'cached', cached, 'deadline', deadline, 'queued_at', whole(t),
  'level', level, 'first_level', level, 'spent', 0, 'generated', 0, 'faults', 0, 'fence', '0',
  'worker', '', 'epoch', '0', 'tokens', 0, 'served', 0, 'handed', '', 'nonce', nonce,
  'due', due, 'cost', cost, 'predicted', ARGV[12], 'expected', ARGV[14],
  'bill', '0 0 ' .. ARGV[13] .. ' ' .. ARGV[15], 'urgent', '0')
if old then -- an ended request had this name, and its record an end
  redis.call('PERSIST', request_key(id))
  redis.call('HDEL', request_key(id), 'given_back')
end
redis.call('HINCRBY', TENANTS, tenant, 1)
redis.call('ZADD', live_key(gateway), deadline == '' and '+inf' or deadline, id)
local r = { id = id, tenant = tenant, level = level, priority = priority, prompt = prompt,
  queued_at = whole(t), due = due, cost = cost, deadline = deadline, urgent = '0' }
count_in_lane(r, 1)
enqueue(r, t, true)
return { 'OK', tostring(level) }
