-- id ...: of each that ended, id, status and ms since its acceptance; of each that is unknown, id and ''
local ends = {}
for i = 3, #ARGV do
  local status, created, since = unpack(call('HMGET', P .. 'job:' .. ARGV[i], 'status', 'created', 'since'))
  if not status then
    ends[#ends + 1] = { ARGV[i], '', 0 }
  elseif status ~= 'queued' and status ~= 'running' then
    ends[#ends + 1] = { ARGV[i], status, since - created }
  end
end
return ends
