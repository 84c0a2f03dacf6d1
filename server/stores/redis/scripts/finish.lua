-- id, worker, attempt, result
local job = held(ARGV[3], ARGV[4], ARGV[5])
if not job then return 0 end
finish(job, 'succeeded', job.steps, 'result', ARGV[6])
return 1
