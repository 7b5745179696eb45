-- Move a request from its prefill worker to a decode worker under a new fence.
-- ARGV: now id fence worker epoch
-- Returns {fence, attempt}; empty when the claim is stale, the request has ended or the worker is gone.
drain_first()
local t, id, fence, worker, epoch = clock(), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local r = load_request(id)
if not r then return {} end
if r.state == 'D' and r.handed == fence and r.worker == worker then -- the first reply was lost
  return { r.fence, tostring(r.faults + 1) }
end
if r.state ~= 'P' or r.fence ~= fence then return {} end
if redis.call('HGET', worker_key(worker), 'epoch') ~= epoch then return {} end
local new = next_fence(t)
detach(r)
attach(r, 'D', worker, epoch, new, 0, t + setting('lease_ttl', 10) * 1000000)
redis.call('HSET', request_key(id), 'handed', fence)
return { new, tostring(r.faults + 1) }
