-- worker, rows, model ...
local worker, rows = ARGV[3], tonumber(ARGV[4])
local models, leases, MOST = {}, {}, 1000
for i = 5, #ARGV do models[#models + 1] = ARGV[i] end

-- delivers the entry of this job. Those ahead of it were cancelled, as a rule; whatever somebody else did to the
-- stream, the loop is bounded, for nothing else runs while a script does
local function deliver(job)
  if #call('XRANGE', job.stream, job.entry, job.entry) == 0 then job.entry = append(job.stream, job.id) end
  for _ = 1, call('XLEN', job.stream) do
    local entry, id = read(job.stream, worker)
    if not entry then break end
    if id == job.id then
      job.entry = entry
      return
    end
    local other = load(id)
    if other and other.status == 'queued' and other.entry == entry then
      call('HSET', P .. 'job:' .. id, 'entry', append(job.stream, id))
    end
    drop(job.stream, entry)
  end
  call('XCLAIM', job.stream, GROUP, worker, 0, job.entry, 'FORCE', 'JUSTID')
end

local function lease(job)
  deliver(job)
  leave_queue(job)
  call('SADD', P .. 'taken', job.id)
  local attempt, alone = job.attempt + 1, (job.lost ~= '0' or job.crashes ~= '0') and 1 or 0
  save(job, 'status', 'running', 'worker', worker, 'attempt', attempt, 'entry', job.entry, 'member', '',
    'since', NOW, 'step', 0)
  tell(job.id, 'running', 0)
  rows = rows - job.n
  local left = job.deadline ~= '' and job.deadline - NOW or ''
  leases[#leases + 1] = { job.id, job.data, job.created, attempt, NOW - job.created, alone, left }
  return alone == 1
end

local function next_returned()
  local oldest, from
  for _, model in ipairs(models) do
    local stream = P .. 'returned:' .. model
    local job = first(stream)
    if job and (not oldest or tonumber(job.created) < tonumber(oldest.created)) then oldest = job end
  end
  return oldest
end

local function next_of(tenant)
  local id, least
  for _, model in ipairs(models) do
    local queue = P .. 'queue:' .. model .. ':' .. tenant
    local head = call('ZRANGE', queue, 0, 0, 'WITHSCORES')
    if head[1] and (not least or tonumber(head[2]) < least) then
      id, least = string.match(head[1], '^%d+:(.*)$'), tonumber(head[2])
    end
  end
  return id and load(id)
end

local function next_fair()
  local at, chunk = 0, 32
  while true do
    local tenants = call('ZRANGE', P .. 'tenants', at, at + chunk - 1)
    for _, tenant in ipairs(tenants) do
      local job = next_of(tenant)
      if job then return job end
    end
    if #tenants < chunk then return nil end
    at = at + chunk
  end
end

for _ = 1, MOST do
  local job = next_returned()
  local returned = job ~= nil
  job = job or next_fair()
  if not job then break end
  if past(job) then
    expire(job)
  else
    local suspect = job.lost ~= '0' or job.crashes ~= '0'
    if tonumber(job.n) > rows or (suspect and #leases > 0) then break end
    if not returned then
      call('SET', P .. 'level', call('ZSCORE', P .. 'tenants', job.tenant))
      call('ZINCRBY', P .. 'tenants', math.max(job.cost_us, MIN_COST_US) / 1e6, job.tenant)
    end
    if lease(job) then break end
  end
end
return leases
