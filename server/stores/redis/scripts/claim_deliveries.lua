-- n
local claimed = {}
for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'outbox', '-inf', NOW, 'LIMIT', 0, ARGV[3])) do
  local delivery = P .. 'delivery:' .. id
  call('ZADD', P .. 'outbox', NOW + LEASE, id)
  local attempt = call('HINCRBY', delivery, 'attempt', 1)
  local fields = call('HMGET', delivery, 'tenant', 'url', 'status', 'ended')
  claimed[#claimed + 1] = { id, attempt, unpack(fields) }
end
return claimed
