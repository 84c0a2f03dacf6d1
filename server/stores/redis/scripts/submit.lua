-- id, model, task, tenant, priority, n, cost_us, steps, deadline_ms, webhook, data, key, fingerprint
local job = {
  id = ARGV[3], model = ARGV[4], task = ARGV[5], tenant = ARGV[6], priority = ARGV[7], n = ARGV[8],
  cost_us = ARGV[9], steps = ARGV[10], deadline = ARGV[11], webhook = ARGV[12], data = ARGV[13], key = ARGV[14],
}
if job.key ~= '' then
  job.key = P .. 'key:' .. job.key
  local known = call('HMGET', job.key, 'fingerprint', 'job')
  if known[1] then return { known[1] == ARGV[15] and 'replayed' or 'conflict', known[2] } end
end
if call('EXISTS', P .. 'job:' .. job.id) == 1 then return { 'exists', job.id } end
if job.deadline ~= '' then
  job.deadline = NOW + job.deadline
  call('ZADD', P .. 'deadlines', job.deadline, job.id)
end
if job.key ~= '' then call('HSET', job.key, 'fingerprint', ARGV[15], 'job', job.id) end

job.stream = P .. 'lane:' .. job.priority .. ':' .. job.model .. ':' .. job.tenant
job.entry = append(job.stream, job.id)
local ms, seq = string.match(job.entry, '(%d+)-(%d+)')
job.member = string.format('%09d:%s', seq, job.id)
call('ZADD', P .. 'queue:' .. job.model .. ':' .. job.tenant, ms - job.priority * PRIORITY_MS, job.member)
tenant_waits(job.tenant)

job.status, job.created, job.since = 'queued', NOW, NOW
job.attempt, job.lost, job.crashes, job.step, job.worker = 0, 0, 0, 0, ''
local fields = {}
for name, value in pairs(job) do
  fields[#fields + 1] = name
  fields[#fields + 1] = value
end
save(job, unpack(fields))
count(job, 1)
total(job, 'accepted')
tell(job.id, 'queued', 0)
call('PUBLISH', P .. 'told', '+')
return { 'accepted', job.id }
