-- id, failure
local job = open(ARGV[3])
if not job then return 0 end
fail(job, ARGV[4])
return 1
