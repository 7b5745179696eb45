-- A gateway is alive, and these are its settings. Returns 1 if the server knew it, else 0.
-- ARGV: now gateway nonce ttl, then pairs of config field and value
drain_first()
local t, gateway, nonce = clock(), ARGV[2], ARGV[3]
local known = redis.call('ZSCORE', GATEWAYS, gateway) and redis.call('EXISTS', answer_key(nonce)) == 0
redis.call('ZADD', GATEWAYS, t + tonumber(ARGV[4]), gateway)
redis.call('HSET', CONFIG, unpack(ARGV, 5))
if not known then redis.call('SET', answer_key(nonce), '0', 'EX', 10) end
return known and 1 or 0
