-- id
local job = open(ARGV[3])
if not job then return 0 end
finish(job, 'cancelled', job.step)
return 1
