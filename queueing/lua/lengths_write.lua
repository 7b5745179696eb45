-- Compare and swap of what the length predictors of a shape share.
-- ARGV: now shape nonce expected ttl data. Returns {1, version}, or {0, version} when somebody else
-- has written since `expected`. A retry is known by its nonce.
local key, nonce, expected = lengths_key(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local held = redis.call('HMGET', key, 'version', 'nonce')
local version = tonumber(held[1] or 0)
if held[2] == nonce then return { 1, version } end
if version ~= expected then return { 0, version } end
redis.call('HSET', key, 'version', version + 1, 'nonce', nonce, 'data', ARGV[6])
redis.call('PEXPIRE', key, ARGV[5])
return { 1, version + 1 }
