-- id, claim, delay_ms or '' when it was delivered, 1 when it was put off
local delivery = P .. 'delivery:' .. ARGV[3]
if call('HGET', delivery, 'claim') ~= ARGV[4] then return 0 end
if ARGV[5] == '' then
  call('ZREM', P .. 'outbox', ARGV[3])
  call('DEL', delivery)
else
  if ARGV[6] == '1' then call('HINCRBY', delivery, 'attempt', -1) end
  call('ZADD', P .. 'outbox', NOW + ARGV[5], ARGV[3])
end
return 1
