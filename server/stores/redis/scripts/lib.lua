-- What every transition shares. KEYS[1]: prefix of all keys; ARGV[1], ARGV[2]: result_ttl and lease, in ms.
-- Redis runs a script as a whole, so each transition happens or does not.
--
--   job:<id>                   hash    the job, its state, its result
--   events:<id>                stream  its history, replayed by entry id
--   key:<len>:<tenant>:<key>   hash    idempotency key -> fingerprint, job
--   lane:<p>:<model>:<tenant>  stream  accepted jobs not yet claimed, and the leases on those that are (the group's PEL)
--   returned:<model>           stream  jobs that were claimed before, ahead of every lane
--   streams                    set     the lanes and returned streams there are
--   queue:<model>:<tenant>     zset    order within a tenant: member <seq>:<id>, score ms of acceptance - priority
--   tenants                    zset    tenants with queued jobs -> predicted seconds served
--   waiting, served, level     hash, hash, string: queued jobs a tenant; seconds of idle tenants; of the last served
--   taken                      set     jobs claimed at least once that have not ended
--   deadlines                  zset    open jobs with a deadline -> ms
--   backlog, backlog:<tenant>  hash    open jobs, rows and cost, of all and of each tenant that has some
--   work:<model>               hash    the same, of each model that has some
--   totals                     hash    jobs accepted and ended
--   outbox, delivery:<id>      zset    webhooks -> ms when due; hash
--   workers, offer:<worker>    set     who is there; string: what it has ready, expires with its silence
--   told                       channel ids of jobs at every event, "!" <id> at their end, "+" when one is queued
local P, GROUP = KEYS[1], 'workers'
local TTL, LEASE = tonumber(ARGV[1]), tonumber(ARGV[2])
local PRIORITY_MS, MIN_COST_US = 60000, 1000
local BATCH = 100
local clock = redis.call('TIME')
local NOW = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function call(...) return redis.call(...) end

local function load(id)
  local flat = call('HGETALL', P .. 'job:' .. id)
  if #flat == 0 then return nil end
  local job = {}
  for i = 1, #flat, 2 do job[flat[i]] = flat[i + 1] end
  return job
end

local function save(job, ...) call('HSET', P .. 'job:' .. job.id, ...) end

local function open(id)
  local job = load(id)
  if job and (job.status == 'queued' or job.status == 'running') then return job end
end

-- the fence
local function held(id, worker, attempt)
  local job = load(id)
  if job and job.status == 'running' and job.worker == worker and job.attempt == attempt then return job end
end

local function past(job) return job.deadline ~= '' and NOW >= tonumber(job.deadline) end

local function tell(id, kind, step, ...)
  call('XADD', P .. 'events:' .. id, '*', 'type', kind, 'step', step, ...)
  call('PUBLISH', P .. 'told', id)
end

-- ---- streams

local function append(stream, id)
  if call('EXISTS', stream) == 0 then call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM') end
  call('SADD', P .. 'streams', stream)
  return call('XADD', stream, '*', 'job', id)
end

-- only ever for delivered entries: an undelivered one that vanishes would falsify the group's lag
local function drop(stream, entry)
  if call('EXISTS', stream) == 0 then return end
  call('XACK', stream, GROUP, entry)
  call('XDEL', stream, entry)
  if call('XLEN', stream) == 0 then
    call('DEL', stream)
    call('SREM', P .. 'streams', stream)
  end
end

-- delivers the next entry of a stream to a worker: entry, id
local function read(stream, worker)
  if call('EXISTS', stream) == 0 then return nil end
  local reply = call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', 1, 'STREAMS', stream, '>')
  if not reply or not reply[1] then return nil end
  local entry = reply[1][2][1]
  return entry[1], entry[2][2]
end

-- the next undelivered entry, left where it is
local function peek(stream)
  if call('EXISTS', stream) == 0 then return nil end
  local group = call('XINFO', 'GROUPS', stream)[1]
  for i = 1, #group, 2 do
    if group[i] == 'last-delivered-id' then
      local entry = call('XRANGE', stream, '(' .. group[i + 1], '+', 'COUNT', 1)[1]
      if entry then return entry[1], entry[2][2] end
    end
  end
end

-- the next job of a stream that is still queued there; entries of jobs that ended before are taken out
local function first(stream)
  local entry, id = peek(stream)
  while entry do
    local job = load(id)
    if job and job.status == 'queued' and job.entry == entry then return job end
    drop(stream, (read(stream, 'sweeper')))
    entry, id = peek(stream)
  end
end

-- ---- turns of tenants

local function tenant_waits(tenant)
  if call('HINCRBY', P .. 'waiting', tenant, 1) > 1 then return end
  local level = tonumber(call('GET', P .. 'level') or 0)
  local served = tonumber(call('HGET', P .. 'served', tenant) or 0)
  call('ZADD', P .. 'tenants', math.max(level, served), tenant)
end

local function tenant_left(tenant)
  if call('HINCRBY', P .. 'waiting', tenant, -1) > 0 then return end
  call('HDEL', P .. 'waiting', tenant)
  call('HSET', P .. 'served', tenant, call('ZSCORE', P .. 'tenants', tenant) or 0)
  call('ZREM', P .. 'tenants', tenant)
end

local function leave_queue(job)
  if job.member ~= '' and call('ZREM', P .. 'queue:' .. job.model .. ':' .. job.tenant, job.member) == 1 then
    tenant_left(job.tenant)
  end
end

-- ---- ends

local function count_in(backlog, job, sign)
  call('HINCRBY', backlog, 'rows', sign * job.n)
  call('HINCRBY', backlog, 'cost_us', sign * job.cost_us)
  return call('HINCRBY', backlog, 'jobs', sign)
end

local function count(job, sign)
  count_in(P .. 'backlog', job, sign)
  for _, own in ipairs({ P .. 'backlog:' .. job.tenant, P .. 'work:' .. job.model }) do
    if count_in(own, job, sign) <= 0 then call('DEL', own) end
  end
end

local function total(job, what) call('HINCRBY', P .. 'totals', job.model .. ' ' .. job.task .. ' ' .. what, 1) end

local function finish(job, status, step, ...)
  if job.status == 'queued' then leave_queue(job) else drop(job.stream, job.entry) end
  save(job, 'status', status, 'since', NOW, 'worker', '', 'member', '', 'step', step, ...)
  call('ZREM', P .. 'deadlines', job.id)
  call('SREM', P .. 'taken', job.id)
  count(job, -1)
  total(job, status)
  if job.webhook ~= '' then
    local delivery = P .. 'delivery:' .. job.id
    call('HSET', delivery, 'tenant', job.tenant, 'url', job.webhook, 'status', status, 'ended', NOW, 'attempt', 0)
    call('ZADD', P .. 'outbox', NOW, job.id)
  end
  tell(job.id, status, step)
  call('PUBLISH', P .. 'told', '!' .. job.id)
  call('PEXPIRE', P .. 'job:' .. job.id, TTL)
  call('PEXPIRE', P .. 'events:' .. job.id, TTL)
  if job.key ~= '' then call('PEXPIRE', job.key, TTL) end
end

local function expire(job) finish(job, 'expired', job.step) end

-- open jobs past their deadline
local function expire_late()
  for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'deadlines', '-inf', NOW, 'LIMIT', 0, BATCH)) do
    local job = open(id)
    if job then expire(job) else call('ZREM', P .. 'deadlines', id) end
  end
end

local function fail(job, failure) finish(job, 'failed', job.step, 'failure', failure) end

-- queues a running job again; one that took too much with it fails with ``poison``. 1 when it was queued
local function requeue(job, max_lost, max_crashes, poison)
  if tonumber(job.lost) >= max_lost or tonumber(job.crashes) >= max_crashes then
    fail(job, poison)
    return 0
  end
  drop(job.stream, job.entry)
  local stream = P .. 'returned:' .. job.model
  local entry = append(stream, job.id)
  save(job, 'status', 'queued', 'worker', '', 'since', NOW, 'step', 0, 'stream', stream, 'entry', entry,
    'lost', job.lost, 'crashes', job.crashes)
  tell(job.id, 'queued', 0)
  call('PUBLISH', P .. 'told', '+')
  return 1
end
