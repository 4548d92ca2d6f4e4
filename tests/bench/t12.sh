#!/bin/bash
# tests/bench/t12.sh: T12, from an empty root to ready, dev profile.
#
# Starts `machina serve` on a fresh root RUNS times for 0 and for 4 workers,
# asks /ready until it is 200, takes the median; beside it Redis (AOF always,
# empty) from its start to its first PONG. Each server is ended before the next.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
runs=${RUNS:-20}
check_build sync_rate ready
need redis-server redis-server
measure_disk
echo "T12 empty root to ready, dev profile, median of $runs"
print_disk

series() {  # series COMMAND...: sets line from the times of `runs` calls
  local i t all=()
  for ((i = 0; i < runs; i++)); do
    t=$("$@") || fail "a start failed: $*"
    all+=("$(value ready_ms "$t")")
  done
  line="median=$(median "${all[@]}") worst=$(printf '%s\n' "${all[@]}" | sort -g | tail -1)"
}

ours() {  # ours WORKERS
  free_port
  local root; root=$(mktemp -d "$dir/root-XXXXXX")
  MACHINA_API_TOKEN='' "$build/bench_ready" --port "$port" \
    --send 'GET /ready HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n' \
    --expect 'HTTP/1.1 200' -- "$machina" serve --profile dev --root "$root" \
    --port "$port" --workers "$1" 2>>"$dir/machina.log"
  rm -rf "$root"
}

redis() {
  free_port
  local root; root=$(mktemp -d "$dir/redis-XXXXXX")
  "$build/bench_ready" --port "$port" --send 'PING\r\n' --expect '+PONG' -- \
    redis-server --port "$port" --bind 127.0.0.1 --dir "$root" \
    --appendonly yes --appendfsync always --save '' --logfile "$root/log"
  rm -rf "$root"
}

if [[ $reference_only != 1 ]]; then
  for workers in 0 4; do
    series ours "$workers"
    echo "machina, $workers workers: median $(value median "$line") ms, worst $(value worst "$line") ms"
    m=$(value median "$line")
  done
fi
series redis
r=$(value median "$line")
echo "redis-server:       median $r ms, worst $(value worst "$line") ms"
[[ $reference_only = 1 ]] || echo "ratio (machina with 4 workers / redis): $(ratio "$m" "$r")"
echo "target: < 50 ms"
