#!/bin/bash
# tests/bench/t4.sh: T4, enqueue -> lease -> complete of no-ops, all durable.
#
# machina: COUNT jobs from one load generator (64 connections, one job a
# request) while two worker processes lease and complete them; the rate is COUNT
# over the time from the first request to the last completion's answer. BullMQ
# on a Redis with its AOF synced always: 1/(1/add + 1/process). The sides take
# turns, ROUNDS rounds, medians.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
rounds=${ROUNDS:-3}
count=${COUNT:-100000}
bullmq_count=${BULLMQ_COUNT:-20000}
lease_max=${LEASE_MAX:-128}
check_build sync_rate enqueue_load noop_worker
need node nodejs
need npm npm

# Never into the tree: a cache that later runs find again.
modules=${XDG_CACHE_HOME:-$HOME/.cache}/machina-bench
if [[ ! -d $modules/node_modules/bullmq ]]; then
  mkdir -p "$modules"
  (cd "$modules" && npm install --no-audit --no-fund --silent bullmq ioredis) ||
    fail "npm could not install bullmq into $modules"
fi

bullmq() {  # sets line
  line=$(cd "$modules" && timeout 120 node "$bench_source/bullmq.mjs" \
    "$redis_port" "$bullmq_count" 64)
}

ours() {  # sets line: rate=
  local auth="Authorization: Bearer $token" w1 w2 load first last total
  timeout 300 "$build/bench_noop_worker" --port "$machina_port" --name w1 \
    --max "$lease_max" --header "$auth" >"$dir/w1" & w1=$!
  timeout 300 "$build/bench_noop_worker" --port "$machina_port" --name w2 \
    --max "$lease_max" --header "$auth" >"$dir/w2" & w2=$!
  pids+=("$w1" "$w2")
  load=$(timeout 300 "$build/bench_enqueue_load" --port "$machina_port" \
    --connections 64 --count "$count" --header "$auth")
  wait "$w1" || fail "worker 1 failed"
  wait "$w2" || fail "worker 2 failed"
  total=$(($(value completed "$(cat "$dir/w1")") + $(value completed "$(cat "$dir/w2")")))
  [[ $total = "$count" ]] || fail "$count jobs were enqueued, $total completed"
  first=$(value first "$load")
  last=$(printf '%s\n' "$(value last "$(cat "$dir/w1")")" \
    "$(value last "$(cat "$dir/w2")")" | sort -g | tail -1)
  line="rate=$(awk -v n="$count" -v a="$first" -v b="$last" 'BEGIN {printf "%.0f", n / (b - a)}')"
  line+=" enqueue=$(value rate "$load") p99_us=$(value p99_us "$load")"
}

start_redis
[[ $reference_only = 1 ]] || start_machina 0
measure_disk
echo "T4 enqueue -> lease -> complete, $count no-ops, two worker processes, $rounds rounds, medians"
print_disk
m=() b=() add=() run=()
for ((round = 0; round < rounds; round++)); do
  if [[ $reference_only != 1 ]]; then
    ours; m+=("$(value rate "$line")")
    echo "  machina: $line"
  fi
  bullmq; b+=("$(value both "$line")")
  echo "  bullmq:  $line"
done
mm=$(median "${m[@]:--}") bb=$(median "${b[@]}")
printf '%10s %10s %8s\n' machina bullmq ratio
printf '%10s %10s %8s\n' "$mm" "$bb" "$(ratio "$mm" "$bb")"
echo "target: 3 x BullMQ, taken as 1/(1/add + 1/process)"
