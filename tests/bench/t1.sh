#!/bin/bash
# tests/bench/t1.sh: T1, durable enqueue, one job a request.
#
# machina (prod profile, token, rate limits on, 201 after the sync) beside nginx's empty POST
# and Redis LPUSH with its AOF synced always; 64 and 256 connections; the sides
# take turns, ROUNDS rounds of SECONDS each, medians.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
rounds=${ROUNDS:-5}
seconds=${SECONDS_EACH:-3}
need wrk wrk
need redis-benchmark redis-tools
check_build sync_rate

http() {  # http PORT CONNECTIONS: sets line
  line=$(wrk -t1 -c"$2" -d"${seconds}s" -s "$bench_source/post.lua" \
    "http://127.0.0.1:$1/" | grep -E '^(INVALID|rate=)')
  [[ $line != *INVALID* ]] || fail "port $1: $line"
}

lpush() {  # lpush CONNECTIONS: sets line
  line=$(redis-benchmark -p "$redis_port" -c "$1" -n "$lpushes" -d 256 \
    -t lpush -q --csv | awk -F'","|"' '/LPUSH/ {printf "rate=%.0f", $3}')
}

start_nginx
start_redis
[[ $reference_only = 1 ]] || start_machina 0
export BENCH_TOKEN=${token:-none}
measure_disk
lpushes=$((seconds * 40000))

echo "T1 durable enqueue, 256-byte jobs, $rounds rounds of $seconds s, medians"
print_disk
printf '%-12s %10s %10s %10s %8s %8s %9s %9s\n' connections machina nginx \
  lpush /nginx /lpush p50_us p99_us
worst=0
for connections in 64 256; do
  m=() n=() r=() p50=() p99=()
  for ((round = 0; round < rounds; round++)); do
    if [[ $reference_only != 1 ]]; then
      http "$machina_port" "$connections"
      m+=("$(value rate "$line")")
      p50+=("$(value p50_us "$line")")
      p99+=("$(value p99_us "$line")")
    fi
    http "$nginx_port" "$connections"; n+=("$(value rate "$line")")
    lpush "$connections"; r+=("$(value rate "$line")")
  done
  mm=$(median "${m[@]:--}") nn=$(median "${n[@]}") rr=$(median "${r[@]}")
  printf '%-12s %10s %10s %10s %8s %8s %9s %9s\n' "$connections" "$mm" "$nn" \
    "$rr" "$(ratio "$mm" "$nn")" "$(ratio "$mm" "$rr")" \
    "$(median "${p50[@]:--}")" "$(median "${p99[@]:--}")"
done
echo "latencies: closed loop, of a saturated server, by wrk"
echo "target: at 64 connections 0.60 x nginx, at 256 0.75 x nginx; 1.2 x LPUSH; p99 < 5000 us"
