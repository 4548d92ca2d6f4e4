#!/bin/bash
# tests/bench/t5.sh: T5, latency through an idle system.
#
# From a client's first byte of an enqueue to the moment a worker, whose lease
# call waits, has the job: durable before anyone hears of it. Beside it, in the
# same rests between two jobs, the disk's own 4 KiB write and fdatasync. COUNT
# jobs, one at a time.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
count=${COUNT:-400}
check_build sync_rate idle_latency
[[ $reference_only = 1 ]] && fail "t5.sh has no reference but the disk: bench_sync_rate"
start_machina 0
measure_disk
echo "T5 enqueue to the worker's handler, idle system, $count jobs one at a time"
print_disk
line=$(timeout 120 "$build/bench_idle_latency" --port "$machina_port" \
  --dir "$dir" --count "$count" --header "Authorization: Bearer $token")
s=$(value sync_p50_us "$line")
p50=$(value p50_us "$line") p99=$(value p99_us "$line")
printf '%-12s %10s %10s\n' "" p50_us p99_us
printf '%-12s %10s %10s\n' machina "$p50" "$p99"
printf '%-12s %10s %10s\n' fdatasync "$s" "$(value sync_p99_us "$line")"
printf '%-12s %10s %10s   of the median fdatasync\n' ratio "$(ratio "$p50" "$s")" "$(ratio "$p99" "$s")"
echo "target: p50 < 2 x, p99 < 5 x one fdatasync"
