-- id, attempt, delay_ms or '' when it was delivered
local delivery = P .. 'delivery:' .. ARGV[3]
if call('HGET', delivery, 'attempt') ~= ARGV[4] then return 0 end
if ARGV[5] == '' then
  call('ZREM', P .. 'outbox', ARGV[3])
  call('DEL', delivery)
else
  call('ZADD', P .. 'outbox', NOW + ARGV[5], ARGV[3])
end
return 1
