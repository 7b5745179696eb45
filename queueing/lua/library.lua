-- Shared by all scripts, after the key names from keys.py.
--
-- Conventions. ARGV[1] is the time in microseconds, or '' for the server's clock. Times and fences
-- have 16 digits: as numbers they are exact, but .. and tostring() round to 14, so whole(x) spells
-- them. Scripts check their arguments before the first write, because Redis rolls nothing back.
-- Scripts that must work on a full server begin with drain_first().

local function whole(x) return string.format('%.0f', x) end

local function clock()
  if ARGV[1] ~= '' then return tonumber(ARGV[1]) end
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

-- At maxmemory a script may write once its first write was a command that frees memory.
local function drain_first() redis.call('UNLINK', PREFIX .. 'nothing') end

local function setting(name, default)
  return tonumber(redis.call('HGET', CONFIG, name) or default)
end

local slack -- read once per call
local function bucket_of(tag)
  slack = slack or math.max(1, setting('fairness_slack', 0.5) * 1000000)
  return math.floor(tag / slack)
end

-- Claim fences and worker epochs. After a loss of data they go on above all earlier ones.
local function next_fence(t)
  local fence = redis.call('INCR', FENCE)
  if fence == 1 then
    redis.call('SET', FENCE, whole(t))
    fence = t
  end
  return whole(fence)
end

-- A request as its fields, all strings except the level; nil when unknown. HGETALL, because finding
-- fields by name in a small hash is slower than reading it whole.
local function load_request(id)
  local values = redis.call('HGETALL', request_key(id))
  if not values[1] then return nil end
  local r = { id = id }
  for i = 1, #values, 2 do r[values[i]] = values[i + 1] end
  r.level = tonumber(r.level)
  return r
end

-- States: Q waiting, P with a prefill worker, D with a decode worker; ended: F, E, C, T.
local function is_claimed(r) return r.state == 'P' or r.state == 'D' end

local function is_live(r) return r.state == 'Q' or is_claimed(r) end

local function is_claimed_under(r, fence) return is_claimed(r) and r.fence == fence end

-- The order of waiting requests. Priority first: each has a class of its own. In a class each tenant
-- has a lane, in which the policy decides, and lanes take turns by the service they have had (start-time
-- fair queueing): a lane's tag is the service in microseconds that its claims cost: what is expected, until
-- reports and ends tell what they generated.
-- Lanes whose tags are within `fairness_slack` of each other stand in the policy's order too.
--
-- A place is 18 digits, two of slot and 16 of time, and then a name; members of equal score sort as text.
-- Slot 0 is for requests whose deadline is near, slot n + 1 for level n.
local PLACE = 18
local function lane_of(r) return r.priority .. '/' .. r.tenant end

local function place(r)
  if r.urgent == '1' then return string.format('%02d%016.0f', 0, r.deadline) end
  return string.format('%02d%016.0f', r.level + 1, r.due)
end

-- Put a lane where its head and its tag belong. One that comes back to an empty queue with `lift` starts
-- level with the others: service that it did not ask for cannot be saved up. That begins an era of the lane;
-- `surplus` is how far its tag was over the virtual time then.
local function settle(priority, tenant, lift)
  local name = priority .. '/' .. tenant
  local lane = redis.call('HMGET', lane_key(name), 'tag', 'turn', 'era')
  local tag, turn = tonumber(lane[1] or 0), lane[2] or ''
  local head = redis.call('ZRANGE', queue_key(name), 0, 0)[1]
  if not head then
    if turn == '' then return end
    redis.call('HSET', lane_key(name), 'turn', '')
    redis.call('ZREM', lanes_key(priority), turn)
    if redis.call('EXISTS', lanes_key(priority)) == 0 then redis.call('ZREM', CLASSES, priority) end
    return
  end
  local new = string.sub(head, 1, PLACE) .. tenant
  if turn == '' then
    redis.call('ZADD', CLASSES, -priority, priority)
    if lift then
      local surplus = tag - (redis.call('HGET', VIRTUAL, priority) or 0)
      tag = tag - math.min(0, surplus)
      redis.call('HSET', lane_key(name), 'tag', whole(tag), 'era', (lane[3] or 0) + 1, 'surplus', whole(surplus))
    end
  elseif turn ~= new then
    redis.call('ZREM', lanes_key(priority), turn)
  end
  redis.call('ZADD', lanes_key(priority), bucket_of(tag), new)
  if turn ~= new then redis.call('HSET', lane_key(name), 'turn', new) end
end

-- One more, or one less, live request of a lane; it is forgotten with its last one.
local function count_in_lane(r, change)
  if redis.call('HINCRBY', lane_key(lane_of(r)), 'live', change) <= 0 then
    redis.call('DEL', lane_key(lane_of(r)))
  end
end

-- What the lane of a request has paid for it and in which of its eras, and how the cost follows from its
-- tokens: one field, because reports read every field of every request and seldom need these.
local function bill_of(r)
  local charged, era, each, longest = string.match(r.bill or '', '^(%S+) (%S+) (%S+) (%S+)$')
  return { charged = tonumber(charged or r.cost), era = era or '0', each = tonumber(each or 0),
    longest = tonumber(longest or 0) }
end

local function spell(bill)
  return table.concat({ whole(bill.charged), bill.era, whole(bill.each), whole(bill.longest) }, ' ')
end

-- What a request costs with so many output tokens: `cost` counts on `expected` of them.
local function cost_at(r, bill, generated)
  if bill.each == 0 then return tonumber(r.cost) end
  return math.max(1, r.cost + bill.each * (math.min(generated, bill.longest) - r.expected))
end

-- What its lane pays when it is claimed.
local function cost_of_claim(r, bill) return math.max(r.cost, cost_at(r, bill, r.generated)) end

-- Its lane pays for a claim; attach() writes the bill. Returns the tag before.
local function charge_lane(r)
  local bill, name = bill_of(r), lane_key(lane_of(r))
  bill.charged, bill.era = cost_of_claim(r, bill), redis.call('HGET', name, 'era') or '0'
  r.bill = spell(bill)
  return redis.call('HINCRBY', name, 'tag', whole(bill.charged)) - bill.charged
end

-- One that comes back is refunded.
local function refund_lane(r)
  local bill = bill_of(r)
  redis.call('HINCRBY', lane_key(lane_of(r)), 'tag', whole(-bill.charged))
  bill.charged = 0
  redis.call('HSET', request_key(r.id), 'bill', spell(bill))
end

-- The lane pays `cost` for a request, not what it has paid so far. Of what was claimed before the lane came
-- back last only that counts which would have changed its tag then: else an idle tenant could save up what
-- was charged too much. A lane that is gone stays gone.
local function correct_lane(r, bill, cost)
  local change = cost - bill.charged
  if change == 0 then return end
  local name = lane_key(lane_of(r))
  local lane = redis.call('HMGET', name, 'tag', 'turn', 'era', 'surplus')
  if not lane[1] then return end
  bill.charged = cost
  redis.call('HSET', request_key(r.id), 'bill', spell(bill))
  if r.state ~= 'Q' and bill.era ~= (lane[3] or '0') then
    local before = tonumber(lane[4] or 0)
    redis.call('HSET', name, 'surplus', whole(before + change))
    change = math.max(0, before + change) - math.max(0, before)
    if change == 0 then return end
  end
  redis.call('HINCRBY', name, 'tag', whole(change))
  local bucket = bucket_of(lane[1] + change)
  if (lane[2] or '') ~= '' and bucket ~= bucket_of(lane[1]) then
    redis.call('ZADD', lanes_key(r.priority), 'XX', bucket, lane[2])
  end
end

local function enqueue(r, t, lift)
  if r.deadline ~= '' and r.urgent ~= '1' then
    local urgent_at = r.deadline - setting('urgent_before', 2) * 1000000 - r.cost
    if urgent_at <= t then
      r.urgent = '1'
      redis.call('HSET', request_key(r.id), 'urgent', '1')
    else
      redis.call('ZADD', DEADLINES, urgent_at, r.id)
    end
  end
  redis.call('ZADD', queue_key(lane_of(r)), 0, place(r) .. r.id)
  redis.call('ZADD', ages_key(r.level), r.queued_at, r.id)
  redis.call('HINCRBY', COUNTS, 'n' .. r.level, 1)
  redis.call('HINCRBY', COUNTS, 't' .. r.level, r.prompt)
  settle(r.priority, r.tenant, lift)
end

-- Out of the queue, without a word to its lane.
local function unlist(r)
  redis.call('ZREM', queue_key(lane_of(r)), place(r) .. r.id)
  redis.call('ZREM', ages_key(r.level), r.id)
  if r.deadline ~= '' and r.urgent ~= '1' then redis.call('ZREM', DEADLINES, r.id) end
  redis.call('HINCRBY', COUNTS, 'n' .. r.level, -1)
  redis.call('HINCRBY', COUNTS, 't' .. r.level, -r.prompt)
end

local function dequeue(r)
  unlist(r)
  settle(r.priority, r.tenant, false)
end

-- Prompt tokens count against a worker from the claim until its first new token is reported.
local function release_tokens(r)
  if r.tokens ~= '0' and redis.call('HGET', worker_key(r.worker), 'epoch') == r.epoch then
    redis.call('HINCRBY', worker_key(r.worker), 'tokens', -r.tokens)
  end
end

local function detach(r)
  release_tokens(r)
  redis.call('SREM', held_key(r.worker), r.id)
  redis.call('ZREM', LEASES, r.id)
end

local function attach(r, state, worker, epoch, fence, tokens, expiry)
  redis.call('HSET', request_key(r.id), 'state', state, 'worker', worker, 'epoch', epoch,
    'fence', fence, 'tokens', tokens, 'served', 0, 'bill', r.bill or '')
  redis.call('SADD', held_key(worker), r.id)
  redis.call('ZADD', LEASES, expiry, r.id)
end

local function end_request(r, outcome, generated)
  generated = math.max(generated, r.generated)
  if r.state == 'Q' then dequeue(r) else detach(r) end
  count_in_lane(r, -1)
  if r.state ~= 'Q' or generated > 0 then
    local bill = bill_of(r)
    correct_lane(r, bill, cost_at(r, bill, generated))
  end
  redis.call('ZREM', live_key(r.gateway), r.id)
  if redis.call('HINCRBY', TENANTS, r.tenant, -1) <= 0 then redis.call('HDEL', TENANTS, r.tenant) end
  redis.call('HSET', request_key(r.id), 'state', outcome, 'generated', generated)
  redis.call('EXPIRE', request_key(r.id), math.ceil(setting('keep_ended', 30)))
end

-- Take a claimed request away from its worker, back to its level and its old place. A fault
-- counts an attempt; after the last one the request ends in error. Returns the new state and fence.
local function requeue(r, t, fault)
  local faults = r.faults + (fault and 1 or 0)
  local fence = next_fence(t)
  redis.call('HSET', request_key(r.id), 'faults', faults, 'fence', fence)
  if fault and faults >= setting('max_attempts', 4) then
    end_request(r, 'E', 0)
    return 'E', fence
  end
  detach(r)
  redis.call('HSET', request_key(r.id), 'state', 'Q', 'worker', '', 'epoch', '0', 'tokens', 0)
  refund_lane(r)
  enqueue(r, t, false)
  return 'Q', fence
end

-- Requeue and leave word for the owner, which is not the caller. The fence orders the news.
local function requeue_and_tell(r, t, fault)
  local state, fence = requeue(r, t, fault)
  redis.call('ZADD', news_key(r.gateway), fence, state .. r.id)
end

-- Requeue all that a worker holds.
local function requeue_held(worker, t, fault)
  for _, id in ipairs(redis.call('SMEMBERS', held_key(worker))) do
    local r = load_request(id)
    if r and is_live(r) and r.worker == worker then requeue_and_tell(r, t, fault) end
  end
  redis.call('DEL', held_key(worker))
end
