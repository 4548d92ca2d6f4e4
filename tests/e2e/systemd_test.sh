#!/usr/bin/env bash
# The units, under a systemd of their own: start, reload, kill -9, restart,
# ops restart, stop. In namespaces (mounts, processes, control groups, network,
# IPC), where /etc, /usr/local and /var/lib are copies or empty: nothing of this
# machine changes, and all of it ends with this script.
#   systemd_test.sh BINARY
set -euo pipefail
binary=$(realpath "$1")
self=$(realpath "${BASH_SOURCE[0]}")
tree=$(cd "$(dirname "$self")/../.." && pwd)
manager=/lib/systemd/systemd
[ -x $manager ] || { echo "SKIPPED: no $manager here (ops/setup.sh)"; exit 77; }
[ "$(id -u)" -eq 0 ] || { echo "SKIPPED: needs root, for namespaces"; exit 77; }
fail() { echo "FAILED: $*"; exit 1; }

# --- outside: where it runs, and what is left of it ---------------------------

if [ "${2-}" = "" ]; then
  groups=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
  [ -n "$groups" ] || { echo "SKIPPED: no cgroup2 is mounted"; exit 77; }
  work=$(mktemp -d /var/tmp/machina-systemd-XXXXXX)
  group=$groups/machina-test-$$
  mkdir "$group" 2>/dev/null ||
    { rm -rf "$work"; echo "SKIPPED: no control group may be made"; exit 77; }
  init='' outer=''
  # shellcheck disable=SC2317  # the trap's
  finish() {
    [ -z "$init" ] || kill -KILL "$init" 2>/dev/null || true  # and all with it
    [ -z "$outer" ] || wait "$outer" 2>/dev/null || true
    find "$group" -depth -type d -exec rmdir {} \; 2>/dev/null || true
    rm -rf "$work"
  }
  trap finish EXIT
  mkdir "$work"/{etc,local,lib}
  cp -a /etc/. "$work/etc/"
  rm -rf "$work/etc/machina" "$work/etc/systemd/system"
  mkdir -p "$work/local/bin" "$work/etc/systemd/system"
  chmod 755 "$work" "$work"/*
  (
    echo "$BASHPID" >"$group/cgroup.procs"
    WORK=$work exec unshare --pid --fork --mount --cgroup --uts --ipc --net \
      --kill-child=KILL --mount-proc "$self" "$binary" boot
  ) >"$work/boot.log" 2>&1 &
  outer=$!
  for _ in $(seq 300); do
    init=$(cat "/proc/$outer/task/$outer/children" 2>/dev/null | tr -d ' ') || true
    [ -n "$init" ] && [ "$(cat "/proc/$init/comm" 2>/dev/null)" = systemd ] &&
      WORK=$work nsenter -t "$init" -a systemctl is-system-running 2>/dev/null |
        grep -Eq 'running|degraded' && break
    kill -0 "$outer" 2>/dev/null ||
      { cat "$work/boot.log"; echo "SKIPPED: no systemd of its own runs here"; exit 77; }
    sleep 0.1
  done
  WORK=$work timeout 200 nsenter -t "$init" -a "$self" "$binary" inside && exit 0
  code=$?
  tail -n 15 "$work"/*.log
  exit "$code"
fi

# --- as its process 1, before it is systemd -----------------------------------

if [ "$2" = boot ]; then
  mount --make-rprivate /
  mount --bind "$WORK/etc" /etc
  mount --bind "$WORK/lib" /var/lib
  mount --bind "$WORK/local" /usr/local
  mount -t tmpfs -o mode=755 tmpfs /run
  umount -R /sys/fs/cgroup 2>/dev/null || mount -t tmpfs tmpfs /sys/fs/cgroup
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
  # Only what the units name, and of that no more than the name.
  mount -t tmpfs tmpfs /lib/systemd/system
  for name in sysinit basic shutdown multi-user network local-fs umount final t; do
    printf '[Unit]\nDescription=%s\nDefaultDependencies=no\n' $name \
      >"/lib/systemd/system/$name.target"
  done
  "$tree/ops/install.sh" --binary "$binary"
  for unit in machina machina-pool; do
    mkdir "/etc/systemd/system/$unit.service.d"
    # Its control groups may have no controllers here.
    printf '[Service]\nEnvironment=MACHINA_SANDBOX_MIN_LEVEL=L1\nStandardOutput=append:%s\nStandardError=append:%s\n' \
      "$WORK/$unit.log" "$WORK/$unit.log" \
      >"/etc/systemd/system/$unit.service.d/test.conf"
  done
  mount --make-rshared /  # credentials are mounted by a child of systemd's
  exec env -i container=docker PATH=/usr/bin:/bin:/usr/sbin:/sbin $manager \
    --system --unit=t.target --log-target=console --show-status=false
fi

# --- inside -------------------------------------------------------------------

ip link set lo up 2>/dev/null || python3 - <<'PY'
import fcntl, socket, struct
s = socket.socket()
fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 0x49))  # SIOCSIFFLAGS: up
PY
export PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
m() {
  runuser -u machina -- env MACHINA_API_TOKEN_FILE=/etc/machina/token \
    /usr/local/bin/machina "$@" --config /etc/machina/machina.yaml
}
of() { systemctl show -p "$2" --value "$1"; }
both() {
  for unit in machina machina-pool; do
    [ "$(systemctl is-active $unit)" = "$1" ] || fail "$2: $unit is not $1"
  done
}
works() { m enqueue noop --wait --wait-s 30 >/dev/null || fail "$1: no job runs"; }
until_true() { for _ in $(seq 300); do "$@" && return; sleep 0.1; done; fail "never: $*"; }

timeout 60 systemctl start machina || fail "start"
both active start
works start
server=$(of machina MainPID) pool=$(of machina-pool MainPID)
[ "$(of machina NFileDescriptorStore)" = 2 ] || fail "the sockets are not kept"

# Handed over: a job runs on, and nobody who connects is refused.
m enqueue tool.shell --payload '{"argv":["/bin/sleep","3"]}' >/dev/null
until_true sh -c 'ls /sys/fs/cgroup/system.slice/machina-pool.service >/dev/null'
(
  for _ in $(seq 100); do
    python3 -c 'import socket; s = socket.create_connection(("127.0.0.1", 8080), 20)
s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); assert b" 200 " in s.recv(99)' ||
      exit 1
  done
) &
asking=$!
systemctl reload machina || fail "reload"
handed_over() { [ "$(of machina MainPID)" != "$server" ] && [ "$(of machina ActiveState)" = active ]; }
until_true handed_over
wait $asking || fail "reload: a connection was refused"
[ "$(of machina-pool MainPID)" = "$pool" ] || fail "reload: another pool"
[ "$(of machina NFileDescriptorStore)" = 2 ] || fail "reload: the sockets are not kept"
slept() { m list --kind tool.shell | grep -q 'succeeded  *1/'; }
until_true slept
echo "reload: handed over"

# With settings that do not hold nothing is touched.
server=$(of machina MainPID)
cp -a /etc/machina/machina.yaml "$WORK/machina.yaml"
echo "MACHINA_WORKERS: 900" >>/etc/machina/machina.yaml
! systemctl reload machina 2>>"$WORK/ops.log" || fail "reload: 900 workers"
! m ops restart >>"$WORK/ops.log" 2>&1 || fail "ops restart: 900 workers"
cp -a "$WORK/machina.yaml" /etc/machina/machina.yaml
refused() {
  code=0
  m ops "$@" >>"$WORK/ops.log" 2>&1 || code=$?
  [ "$code" -eq 2 ] || fail "ops $*: $code, not 2"
}
refused restart --workers 1
refused restart --pool
refused kill
[ "$(of machina MainPID)" = "$server" ] || fail "refused: another server"
both active refused
works refused
echo "refused: nothing touched"

# A server that dies is started again, and takes no pool with it.
server=$(of machina MainPID)
kill -KILL "$server"
until_true handed_over
[ "$(of machina-pool MainPID)" = "$pool" ] || fail "kill -9: another pool"
works "kill -9"
echo "kill -9: started again"

# A drain sends the pool away; whoever starts the server again has it back.
for round in 1 2 3; do
  timeout 60 systemctl restart machina || fail "restart $round"
  both active "restart $round"
done
works restart
echo "restart: drained and back, pool and all"

server=$(of machina MainPID) pool=$(of machina-pool MainPID)
m ops restart --text >"$WORK/ops.log" 2>&1 || fail "ops restart"
until_true handed_over  # ready is said at the next turn
[ "$(of machina-pool MainPID)" = "$pool" ] || fail "ops restart: another pool"
timeout 60 systemctl restart machina-pool || fail "restart of the pool"
works "restart of the pool"

left() { [ "$(of machina-pool ActiveState)" = inactive ]; }
for _ in 1 2 3; do  # a pool that has just started leaves as well
  timeout 60 systemctl stop machina || fail "stop"
  until_true left
  sleep 1.5  # longer than what ended otherwise is left down
  both inactive stop
  timeout 60 systemctl start machina || fail "start after stop"
done
timeout 60 systemctl stop machina || fail "stop"
until_true left
both inactive stop
[ "$(of machina Result)" = success ] || fail "stop: $(of machina Result)"
echo "the units do what they say"
