#!/bin/bash
# tests/bench/t8.sh: T8, /bin/true in a sandbox at L3 through the whole queue.
#
# machina: COUNT tool.shell jobs of ["/bin/true"] from CONNECTIONS connections,
# each waiting for its end (Prefer: wait), on WORKERS workers; every answer must
# say succeeded at L3. Beside it a loop of bwrap --unshare-all and one of
# posix_spawn alone. As root (L3).
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
rounds=${ROUNDS:-3}
count=${COUNT:-1500}
workers=${WORKERS:-4}
connections=${CONNECTIONS:-$((workers * 2))}
check_build sync_rate enqueue_load spawn_rate
need bwrap bubblewrap
[[ $reference_only = 1 || $(id -u) = 0 ]] || fail "t8.sh needs root: L3 is measured"

ours() {  # sets line
  line=$(timeout 200 "$build/bench_enqueue_load" --port "$machina_port" \
    --connections "$connections" --count "$count" \
    --header "Authorization: Bearer $token" --header "Prefer: wait=60" \
    --body '{"kind":"tool.shell","payload":{"argv":["/bin/true"]}}' \
    --expect '"state":"succeeded"' --expect '"level":"L3"')
}

bwrap_loop() {
  line=$("$build/bench_spawn_rate" "$1" bwrap --ro-bind /usr /usr \
    --symlink usr/lib /lib --symlink usr/lib64 /lib64 --symlink usr/bin /bin \
    --proc /proc --dev /dev --tmpfs /tmp --unshare-all --die-with-parent \
    --new-session /bin/true)
}

[[ $reference_only = 1 ]] || start_machina "$workers"
measure_disk
echo "T8 sandboxed /bin/true at L3 through the whole queue, $workers workers, $rounds rounds, medians"
print_disk
m=() b=() s=()
for ((round = 0; round < rounds; round++)); do
  if [[ $reference_only != 1 ]]; then
    ours; m+=("$(value rate "$line")")
    echo "  machina: $line"
  fi
  bwrap_loop 300; b+=("$(value rate "$line")")
  line=$("$build/bench_spawn_rate" 1000 /bin/true); s+=("$(value rate "$line")")
done
mm=$(median "${m[@]:--}") bb=$(median "${b[@]}") ss=$(median "${s[@]}")
printf '%10s %10s %12s %8s %12s\n' machina bwrap posix_spawn /bwrap /posix_spawn
printf '%10s %10s %12s %8s %12s\n' "$mm" "$bb" "$ss" "$(ratio "$mm" "$bb")" \
  "$(ratio "$mm" "$ss")"
echo "target: 3 x bwrap's rate (start <= 2 x posix_spawn)"
