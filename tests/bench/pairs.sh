#!/bin/bash
# tests/bench/pairs.sh OLD NEW [TARGET...]: is NEW as fast as OLD?
#
# OLD and NEW are two machina binaries. For each TARGET (t1, t1-256, t4, t5, t8,
# t12; all of them unless named; t8 as root) it measures PAIRS (15) pairs. In
# each pair both binaries run on a fresh root, one after the other, and the one
# that goes first changes from pair to pair: machines drift. Printed is the
# median of the pairs' ratios, NEW's speed over OLD's (above 1: NEW is faster),
# and the quartiles. The exit code is 1 where a median is below LEAST (0.97).
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
pairs=${PAIRS:-15}
seconds=${SECONDS_EACH:-2}
least=${LEAST:-0.97}
[[ $# -ge 2 && -x $1 && -x $2 ]] ||
  { sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
old=$(realpath "$1") new=$(realpath "$2")
shift 2
targets=("$@")
[[ $# -gt 0 ]] || targets=(t1 t1-256 t4 t5 t8 t12)
check_build enqueue_load noop_worker idle_latency ready

# Each sets `speed`: greater is better.
load() {  # load CONNECTIONS WORKERS MORE...
  local connections=$1 workers=$2
  shift 2
  start_machina "$workers"
  local line
  line=$(timeout 200 "$build/bench_enqueue_load" --port "$machina_port" \
    --connections "$connections" --header "Authorization: Bearer $token" "$@")
  speed=$(value rate "$line")
}
t1() { load 64 0 --seconds "$seconds"; }
t1_256() { load 256 0 --seconds "$seconds"; }
t8() {
  load 8 4 --count 400 --header "Prefer: wait=60" \
    --body '{"kind":"tool.shell","payload":{"argv":["/bin/true"]}}' \
    --expect '"state":"succeeded"' --expect '"level":"L3"'
}
t4() {
  local count=30000 name worker=() line first last
  start_machina 0
  for name in w1 w2; do
    timeout 100 "$build/bench_noop_worker" --port "$machina_port" --name $name \
      --max 128 --header "Authorization: Bearer $token" >"$dir/$name" &
    worker+=($!)
    pids+=($!)
  done
  line=$(timeout 100 "$build/bench_enqueue_load" --port "$machina_port" \
    --connections 64 --count $count --header "Authorization: Bearer $token")
  wait "${worker[@]}" || fail "a worker failed"
  first=$(value first "$line")
  last=$(printf '%s\n' "$(value last "$(cat "$dir/w1")")" \
    "$(value last "$(cat "$dir/w2")")" | sort -g | tail -1)
  speed=$(awk -v n=$count -v a="$first" -v b="$last" 'BEGIN {print n / (b - a)}')
}
t5() {
  local line
  start_machina 0
  line=$(timeout 120 "$build/bench_idle_latency" --port "$machina_port" \
    --dir "$dir" --count 150 --header "Authorization: Bearer $token")
  # The disk's own sync drifts most: the latency is counted in syncs.
  speed=$(awk -v a="$(value sync_p50_us "$line")" -v b="$(value p50_us "$line")" \
    'BEGIN {print a / b}')
}
t12() {
  local line i all=()
  for ((i = 0; i < 5; i++)); do
    free_port
    line=$(MACHINA_API_TOKEN='' "$build/bench_ready" --port "$port" \
      --send 'GET /ready HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n' \
      --expect 'HTTP/1.1 200' -- "$machina" serve --profile dev \
      --root "$dir/root" --port "$port" --workers 4 2>>"$dir/machina.log")
    all+=("$(value ready_ms "$line")")
    rm -rf "$dir/root"
  done
  speed=$(awk -v ms="$(median "${all[@]}")" 'BEGIN {print 1000 / ms}')
}

measure() {  # measure BINARY TARGET: sets speed
  machina=$1 machina_pid=
  "${2//-/_}"
  [[ -z $machina_pid ]] || stop_pid "$machina_pid"
  rm -rf "$dir/root"
}

measure_disk
print_disk
printf '%-8s %8s %10s %10s %10s  (%s pairs; least %s)\n' target quarter median \
  quarter "old speed" "$pairs" "$least"
slower=0
for target in "${targets[@]}"; do
  declare -F "${target//-/_}" >/dev/null || fail "there is no target $target"
  ratios=() olds=()
  for ((pair = 0; pair < pairs; pair++)); do
    if ((pair % 2 == 0)); then
      measure "$old" "$target"; a=$speed
      measure "$new" "$target"; b=$speed
    else
      measure "$new" "$target"; b=$speed
      measure "$old" "$target"; a=$speed
    fi
    olds+=("$a")
    ratios+=("$(awk -v a="$a" -v b="$b" 'BEGIN {printf "%.4f", b / a}')")
    [[ -t 2 ]] && printf '\r%s %d of %d ' "$target" $((pair + 1)) "$pairs" >&2
  done
  [[ -t 2 ]] && printf '\r\e[K' >&2
  sorted=$(printf '%s\n' "${ratios[@]}" | sort -g)
  line=$(awk '{v[NR]=$1} END {q=int((NR+3)/4); printf "%s %s %s", v[q], v[int((NR+1)/2)], v[NR+1-q]}' <<<"$sorted")
  read -r low mid high <<<"$line"
  printf '%-8s %8s %10s %10s %10.1f\n' "$target" "$low" "$mid" "$high" "$(median "${olds[@]}")"
  awk -v m="$mid" -v l="$least" 'BEGIN {exit !(m < l)}' && slower=1
done
rm -f "$dir/machina.log"  # to be slower is no failure of the server
exit $slower
