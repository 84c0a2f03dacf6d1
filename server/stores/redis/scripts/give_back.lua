-- id, worker, attempt, crashed, alone, max_lost, max_crashes, poison: 1 when it was queued, 2 when it failed
local job = held(ARGV[3], ARGV[4], ARGV[5])
if not job then return 0 end
if ARGV[6] == '1' then
  local counter = ARGV[7] == '1' and 'crashes' or 'lost'
  job[counter] = job[counter] + 1
end
return requeue(job, tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10]) == 1 and 1 or 2
