-- End a request. ARGV: now gateway id nonce outcome(F|E|C|T) generated fence('' = whoever has it)
-- Returns 1, or 0 when it had ended before, is unknown or another gateway's, or the claim is stale.
drain_first()
local gateway, id, nonce, outcome = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local generated, fence = tonumber(ARGV[6]), ARGV[7]
local r = load_request(id)
if not r or r.gateway ~= gateway then return 0 end -- two gateways may be asked for one id
if not is_live(r) then
  return r.nonce == nonce and 1 or 0 -- the first reply was lost
end
if fence ~= '' and not is_claimed_under(r, fence) then return 0 end
end_request(r, outcome, generated)
redis.call('HSET', request_key(id), 'nonce', nonce)
return 1
