-- id: how many jobs are expected to be claimed before it; nil when it is not queued
local job = open(ARGV[3])
if not job or job.status ~= 'queued' then return nil end
if job.member == '' then return 0 end
local ahead = call('ZRANK', P .. 'queue:' .. job.model .. ':' .. job.tenant, job.member) or 0
local sum = ahead
for _, tenant in ipairs(call('ZRANGE', P .. 'tenants', 0, -1)) do
  if tenant ~= job.tenant then
    sum = sum + math.min(ahead, call('ZCARD', P .. 'queue:' .. job.model .. ':' .. tenant))
  end
end
return sum
