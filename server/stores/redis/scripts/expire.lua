-- id, worker, attempt
local job = held(ARGV[3], ARGV[4], ARGV[5])
if not job or not past(job) then return 0 end
expire(job)
return 1
