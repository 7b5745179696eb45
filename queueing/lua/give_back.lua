-- Return a claimed request to the queue. ARGV: now id fence generated fault(0|1)
-- Returns 1, or 0 when the claim is stale, the request has ended or its attempts are used up.
drain_first()
local t, id, fence, generated, fault = clock(), ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5] == '1'
local r = load_request(id)
if not r or not is_live(r) then return 0 end
if r.given_back == fence then return 1 end -- the first reply was lost
if not is_claimed_under(r, fence) then return 0 end
r.generated = math.max(generated, r.generated)
redis.call('HSET', request_key(id), 'generated', r.generated, 'given_back', fence)
local state = requeue(r, t, fault)
return state == 'Q' and 1 or 0
