-- What the length predictors of a shape share. ARGV: now shape known.
-- Returns {version, data}; no data when `known` is the version. {0} when there is none.
local key = lengths_key(ARGV[2])
local version = tonumber(redis.call('HGET', key, 'version') or 0)
if version == 0 or version == tonumber(ARGV[3]) then return { version } end
return { version, redis.call('HGET', key, 'data') }
