-- (id, worker, attempt, step, previews, (image, index, data) ...) ...: the tokens of those to stop
-- A preview takes time to encode: a later step may have been told before, and progress never goes back.
local stop, i = {}, 3
while i <= #ARGV do
  local id, told, previews = ARGV[i], tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4])
  local job = held(id, ARGV[i + 1], ARGV[i + 2])
  if job then
    local before = tonumber(job.step)
    local step = math.max(before, told)
    for k = i + 5, i + 2 + 3 * previews, 3 do
      tell(id, 'step', step, 'image', ARGV[k], 'index', ARGV[k + 1], 'data', ARGV[k + 2])
    end
    if step > before then
      save(job, 'step', step)
      tell(id, 'step', step)
    end
  else
    stop[#stop + 1] = id .. '/' .. ARGV[i + 2]
  end
  i = i + 5 + 3 * previews
end
return stop
