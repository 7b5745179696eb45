-- A gateway is alive, and these are its settings. Returns 1 if the server knew it, else 0.
-- ARGV: now gateway ttl, then pairs of config field and value
drain_first()
local t, gateway = clock(), ARGV[2]
local known = redis.call('ZSCORE', GATEWAYS, gateway)
redis.call('ZADD', GATEWAYS, t + tonumber(ARGV[3]), gateway)
redis.call('HSET', CONFIG, unpack(ARGV, 4))
return known and 1 or 0
