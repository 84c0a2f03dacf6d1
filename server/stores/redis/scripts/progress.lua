-- (id, worker, attempt, step, previews, (image, index, data) ...) ...: the tokens of those to stop
local stop, i = {}, 3
while i <= #ARGV do
  local id, step, previews = ARGV[i], ARGV[i + 3], tonumber(ARGV[i + 4])
  local job = held(id, ARGV[i + 1], ARGV[i + 2])
  if job then
    for k = i + 5, i + 2 + 3 * previews, 3 do
      tell(id, 'step', step, 'image', ARGV[k], 'index', ARGV[k + 1], 'data', ARGV[k + 2])
    end
    save(job, 'step', step)
    tell(id, 'step', step)
  else
    stop[#stop + 1] = id .. '/' .. ARGV[i + 2]
  end
  i = i + 5 + 3 * previews
end
return stop
