#!/usr/bin/env bash
# Runs the blocks of docs/operating.md that are marked <!-- run -->, as they
# stand, in a mount and network namespace of their own: /etc, /usr/local and
# /var/lib are copies or empty there, so nothing of this machine changes.
#   operating_test.sh BINARY
set -euo pipefail
binary=$(realpath "$1")
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

if [ "$(id -u)" -ne 0 ]; then
  echo "SKIPPED: needs root, for a mount namespace"
  exit 77
fi
if [ "${2-}" != inside ]; then
  work=$(mktemp -d /var/tmp/machina-operating-XXXXXX)
  trap 'rm -rf "$work"' EXIT
  mkdir "$work"/{etc,local,lib}
  cp -a /etc/. "$work/etc/"
  rm -rf "$work/etc/machina"
  mkdir -p "$work/local/bin"
  WORK=$work unshare --mount --net "$0" "$binary" inside && code=0 || code=$?
  exit "$code"
fi

ip link set lo up 2>/dev/null || python3 - <<'PY'
import fcntl, socket, struct
s = socket.socket()
fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 0x49))  # SIOCSIFFLAGS: up
PY
# shellcheck disable=SC2153  # from outside
mount --make-rprivate /
mount --bind "$WORK/etc" /etc
mount --bind "$WORK/lib" /var/lib
mount --bind "$WORK/local" /usr/local
export PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
unset "${!MACHINA_@}"
chmod 755 "$WORK" "$WORK/local" "$WORK/local/bin" "$WORK/lib" "$WORK/etc"
cd "$tree"

# What is started here ends here, whatever happens.
finish() {
  for root in /var/lib/machina /var/lib/machina.broken; do
    [ ! -d "$root" ] || "$binary" ops kill --root "$root" >/dev/null 2>&1 || true
  done
  umount /usr/local /var/lib /etc || true
}
trap finish EXIT

awk '/^<!-- run -->$/ { marked = 1; next }
     marked && /^```sh$/ { on = 1; marked = 0; next }
     on && /^```$/ { on = 0; next }
     on { print }' docs/operating.md >"$WORK/commands"
[ "$(wc -l <"$WORK/commands")" -ge 15 ] || { echo "too few commands found"; exit 1; }

while IFS= read -r line; do
  echo "\$ $line"
  # The one change: which build is installed.
  case $line in
    ops/install.sh* | *"/ops/install.sh"*)
      case $line in
        *--uninstall*) ;;
        *) line="$line --binary $binary" ;;
      esac
      ;;
  esac
  bash -euo pipefail -c "$line" </dev/null || {
    code=$?
    echo "FAILED ($code): $line"
    tail -20 /var/lib/machina/ops/serve.log 2>/dev/null || true
    exit 1
  }
done <"$WORK/commands"

# What the chapter says is left.
[ ! -e /usr/local/bin/machina ]
[ -e /etc/machina/token ]
[ "$(stat -c '%a %U' /etc/machina/token)" = "600 machina" ]
[ "$(stat -c '%a %U' /var/lib/machina)" = "700 machina" ]
[ ! -e /var/lib/machina/ops/serve.pid ]
# Those that have ended and wait for their parent are none.
if ps -o stat=,pid=,args= -u machina | grep -v '^Z'; then
  echo "these processes are left"
  exit 1
fi
echo "all commands of docs/operating.md did what it says"
