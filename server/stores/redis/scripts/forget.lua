-- id
local id = ARGV[3]
local job = load(id)
if job and job.key == '' and job.status ~= 'queued' and job.status ~= 'running' then
  call('DEL', P .. 'job:' .. id, P .. 'events:' .. id)
end
