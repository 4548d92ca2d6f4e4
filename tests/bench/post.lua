-- wrk: one durable enqueue a request, 256 bytes of JSON. Any answer that is not
-- 2xx makes the run invalid; t1.sh looks for that word.
wrk.method = "POST"
wrk.path = "/v1/jobs"
wrk.headers["Content-Type"] = "application/json"
local token = os.getenv("BENCH_TOKEN")
if token then wrk.headers["Authorization"] = "Bearer " .. token end
wrk.body = '{"kind":"ext.bench","payload":{"x":"' .. string.rep("x", 216) .. '"}}'

done = function(summary, latency)
  local bad = summary.errors.status + summary.errors.connect +
              summary.errors.read + summary.errors.write +
              summary.errors.timeout
  if bad > 0 then io.write("INVALID: ", bad, " answers were not 2xx\n") end
  io.write(string.format("rate=%.0f p50_us=%.0f p99_us=%.0f\n",
    summary.requests / (summary.duration / 1e6),
    latency:percentile(50), latency:percentile(99)))
end
