-- End a request. ARGV: now id nonce outcome(F|E|C|T) generated fence('' = whoever has it)
-- Returns 1, or 0 when it had ended before, is unknown or the claim is stale.
drain_first()
local id, nonce, outcome, generated, fence = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local r = load_request(id)
if not r then return 0 end
if not is_live(r) then
  return r.nonce == nonce and 1 or 0 -- the first reply was lost
end
if fence ~= '' and not is_claimed_under(r, fence) then return 0 end
end_request(r, outcome, generated)
redis.call('HSET', request_key(id), 'nonce', nonce)
return 1
