-- n
local claimed = {}
for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'outbox', '-inf', NOW, 'LIMIT', 0, ARGV[3])) do
  local delivery = P .. 'delivery:' .. id
  call('ZADD', P .. 'outbox', NOW + LEASE, id)
  local claim, attempt = call('HINCRBY', delivery, 'claim', 1), call('HINCRBY', delivery, 'attempt', 1)
  local fields = call('HMGET', delivery, 'tenant', 'url', 'status', 'ended')
  claimed[#claimed + 1] = { id, claim, attempt, NOW - fields[4], unpack(fields) }
end
return claimed
