-- (id, worker, attempt) ...: extends leases; the tokens of those to stop
local stop = {}
for i = 3, #ARGV, 3 do
  local job = held(ARGV[i], ARGV[i + 1], ARGV[i + 2])
  if job then
    if call('EXISTS', job.stream) == 1 then
      call('XCLAIM', job.stream, GROUP, job.worker, 0, job.entry, 'JUSTID')
    end
  else
    stop[#stop + 1] = ARGV[i] .. '/' .. ARGV[i + 2]
  end
end
return stop
