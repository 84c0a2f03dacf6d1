-- id, worker, attempt, failure
local job = held(ARGV[3], ARGV[4], ARGV[5])
if not job then return 0 end
fail(job, ARGV[6])
return 1
