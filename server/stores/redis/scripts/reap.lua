-- max_lost, max_crashes, poison: how many jobs were queued again
local max_lost, max_crashes, poison = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]

expire_late()

local silent = {}
for _, stream in ipairs(call('SMEMBERS', P .. 'streams')) do
  if call('EXISTS', stream) == 0 then
    call('SREM', P .. 'streams', stream)
  else
    for _, pending in ipairs(call('XPENDING', stream, GROUP, 'IDLE', LEASE, '-', '+', BATCH)) do
      local entry = call('XRANGE', stream, pending[1], pending[1])[1]
      local job = entry and load(entry[2][2])
      if job and job.status == 'running' and job.entry == pending[1] then
        silent[#silent + 1] = job
      else
        drop(stream, pending[1])
      end
    end
    first(stream)
  end
end
table.sort(silent, function(a, b) return tonumber(a.created) < tonumber(b.created) end)
local queued = 0
for _, job in ipairs(silent) do
  job.lost = job.lost + 1
  queued = queued + requeue(job, max_lost, max_crashes, poison)
end

-- jobs whose stream somebody deleted: no lease and no entry speaks for them any more
for _, id in ipairs(call('SRANDMEMBER', P .. 'taken', BATCH)) do
  local job = open(id)
  if not job then
    call('SREM', P .. 'taken', id)
  elseif #call('XRANGE', job.stream, job.entry, job.entry) == 0 then
    queued = queued + requeue(job, max_lost, max_crashes, poison)
  end
end
return queued
