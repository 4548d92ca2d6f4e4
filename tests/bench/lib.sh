# tests/bench/lib.sh: what the measuring scripts share. Sourced, not run.
#
# Everything is on loopback, on free ports, below one fresh directory (the same
# file system for all sides), bounded in time, and stopped by process id at the
# end of the script, whatever ended it.
#
#   MACHINA_BUILD   build directory with the binary and the drivers
#                   (default build/release)
#   BENCH_DIR       where the data of all sides lies (default /var/tmp)
#   BENCH_REFERENCE_ONLY=1  measure the references alone

set -euo pipefail
bench_source=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$bench_source/../.." && pwd)
build=${MACHINA_BUILD:-$repo/build/release}
unset MACHINA_BUILD  # the program would refuse a variable it does not know
machina=$build/machina
reference_only=${BENCH_REFERENCE_ONLY:-0}
dir=$(mktemp -d "${BENCH_DIR:-/var/tmp}/machina-bench-XXXXXX")
chmod 755 "$dir"
pids=()

fail() { echo "$*" >&2; exit 1; }

need() {  # need COMMAND PACKAGE
  command -v "$1" >/dev/null || fail "$1 is missing: apt-get install $2"
}

stop_pid() {  # SIGTERM, 45 s, then SIGKILL
  local pid=$1 i
  kill -TERM "$pid" 2>/dev/null || return 0
  for ((i = 0; i < 450; i++)); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
}

cleanup() {
  local code=$? pid
  for pid in "${pids[@]}"; do stop_pid "$pid"; done
  if [[ $code != 0 && -f $dir/machina.log ]]; then
    echo "--- the end of machina's log" >&2
    tail -n 20 "$dir/machina.log" >&2
  fi
  rm -rf "$dir"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

check_build() {
  local driver
  for driver in "$@"; do
    [[ -x $build/bench_$driver ]] ||
      fail "$build/bench_$driver is missing: cmake --preset release && cmake --build --preset release"
  done
  [[ $reference_only = 1 || -x $machina ]] ||
    fail "$machina is missing: cmake --preset release && cmake --build --preset release"
}

# A port that nobody listens on now. Two calls never give the same one.
given_ports=" "
free_port() {
  local p
  while :; do
    p=$((20000 + RANDOM % 12000))
    [[ $given_ports == *" $p "* ]] && continue
    (exec 3<>"/dev/tcp/127.0.0.1/$p") 2>/dev/null && continue
    given_ports+="$p "
    port=$p
    return
  done
}

wait_port() {  # wait_port PORT WHAT
  local i
  for ((i = 0; i < 200; i++)); do
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && return
    sleep 0.05
  done
  fail "$2 does not answer on port $1"
}

value() {  # value NAME "name=value name=value": that value
  local word
  for word in $2; do
    [[ $word == "$1="* ]] && { echo "${word#*=}"; return; }
  done
  fail "no $1 in: $2"
}

median() { printf '%s\n' "$@" | sort -g | awk '{v[NR]=$1} END {print v[int((NR+1)/2)]}'; }
# "-" where a side was not measured.
ratio() { awk -v a="$1" -v b="$2" 'BEGIN {if (a == "-") print a; else printf "%.2f", (b > 0) ? a / b : 0}'; }

start_nginx() {  # sets nginx_port
  need nginx nginx-light
  free_port; nginx_port=$port
  mkdir -p "$dir/nginx"
  cat >"$dir/nginx/nginx.conf" <<CONF
worker_processes 1;
daemon off;
pid $dir/nginx/pid;
error_log /dev/null;
events { worker_connections 1024; }
http {
  access_log off;
  keepalive_requests 100000000;
  client_body_temp_path $dir/nginx/body;
  proxy_temp_path $dir/nginx/proxy;
  fastcgi_temp_path $dir/nginx/fastcgi;
  uwsgi_temp_path $dir/nginx/uwsgi;
  scgi_temp_path $dir/nginx/scgi;
  server {
    listen 127.0.0.1:$nginx_port;
    location / { return 202 '{"id":"01234567-89ab-7def-8123-456789abcdef","state":"ready"}'; }
  }
}
CONF
  nginx -c "$dir/nginx/nginx.conf" 2>"$dir/nginx/log" &
  pids+=($!)
  wait_port "$nginx_port" nginx
}

start_redis() {  # sets redis_port; AOF, synced at every write
  need redis-server redis-server
  free_port; redis_port=$port
  mkdir -p "$dir/redis"
  redis-server --port "$redis_port" --bind 127.0.0.1 --dir "$dir/redis" \
    --appendonly yes --appendfsync always --save '' >"$dir/redis/log" &
  pids+=($!)
  wait_port "$redis_port" redis-server
}

# start_machina WORKERS: prod profile, a token, fsync on, rate limits on (and so
# high that they refuse nothing), an empty root. Sets machina_port, machina_pid,
# token.
start_machina() {
  local i
  free_port; machina_port=$port
  token=bench-$(od -An -N12 -tx1 /dev/urandom | tr -d " \n")
  mkdir -m 700 "$dir/root"
  MACHINA_API_TOKEN=$token MACHINA_API_RPM=1000000000 \
    MACHINA_API_ENQUEUE_RPM=1000000000 "$machina" serve --profile prod \
    --root "$dir/root" --host 127.0.0.1 --port "$machina_port" \
    --workers "$1" >"$dir/machina.log" 2>&1 &
  machina_pid=$!
  pids+=("$machina_pid")
  for ((i = 0; i < 400; i++)); do
    kill -0 "$machina_pid" 2>/dev/null || fail "machina ended at its start"
    curl -sf -o "$dir/ready" "http://127.0.0.1:$machina_port/ready" && return
    sleep 0.05
  done
  fail "machina is not ready after 20 s: $(curl -s "http://127.0.0.1:$machina_port/ready")"
}

measure_disk() {  # sets disk
  disk=$("$build/bench_sync_rate" "$dir" 1)
}

print_disk() {
  echo "disk: 4 KiB pwrite+fdatasync $(value fdatasync_us "$disk") us" \
    "(p50 $(value fdatasync_p50_us "$disk"), p99 $(value fdatasync_p99_us "$disk"))," \
    "O_DIRECT|O_DSYNC $(value dsync_us "$disk") us" \
    "(p50 $(value dsync_p50_us "$disk"), p99 $(value dsync_p99_us "$disk"))"
  echo "machine: $(nproc) cores, $(awk -F': ' '/model name/ {print $2; exit}' /proc/cpuinfo), Linux $(uname -r), $(stat -f -c %T "$dir")"
}
