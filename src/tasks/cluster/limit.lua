-- The ring of limits::quota, in a hash: bucket number -> count. Never over, at most one bucket late.
-- KEYS[1] the counter; ARGV[1] how much is allowed; ARGV[2] milliseconds of a bucket
-- Returns: does one more fit (and was taken), what is left, milliseconds until it fits, until all is back.
local most, width = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local bucket = math.floor(now / width)
local counts, sum = {}, 0
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local number, count = tonumber(all[i]), tonumber(all[i + 1])
  if number <= bucket - 10 then
    redis.call('HDEL', KEYS[1], all[i])
  else
    counts[#counts + 1] = { number, count }
    sum = sum + count
  end
end
if sum < most then
  redis.call('HINCRBY', KEYS[1], bucket, 1)
  redis.call('PEXPIRE', KEYS[1], 10 * width)
  return { 1, most - sum, 0, (bucket + 10) * width - now }
end
table.sort(counts, function(a, b) return a[1] < b[1] end)
local excess, wait, reset = sum + 1 - most, 0, 0
for _, count in ipairs(counts) do
  reset = (count[1] + 10) * width - now
  if excess > 0 then
    wait = reset
    excess = excess - count[2]
  end
end
return { 0, 0, wait, reset }
