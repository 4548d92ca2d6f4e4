#!/usr/bin/env bash
# ops/install.sh: installs machina on this machine, or upgrades what is
# installed: the program, the systemd units, a user, a configuration with a
# fresh token, and a root directory. Run it again as often as you like: what is
# there and right is left alone, and a configuration is never overwritten.
#
#   --prefix DIR    where the program goes (/usr/local)
#   --root DIR      the directory that holds all state (/var/lib/machina)
#   --user NAME     who serves (machina)
#   --binary FILE   what to install (this tree's build, else build it: ops/demo.sh)
#   --destdir DIR   install below DIR, for packages and tests: no user is made,
#                   no owner changed, systemd not told
#   --dry-run       say what would be done, and do nothing
#   --uninstall     remove program and units; keep configuration and data
set -euo pipefail
umask 022

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
prefix=/usr/local root=/var/lib/machina user=machina binary='' destdir=''
dry=no uninstall=no

say() { printf '%s\n' "$*"; }
die() { printf 'install.sh: %s\n' "$*" >&2; exit "${2:-1}"; }
usage() { printf 'install.sh: %s\n' "$*" >&2; exit 2; }

while [ $# -gt 0 ]; do
  case $1 in
    --prefix | --root | --user | --binary | --destdir)
      [ $# -ge 2 ] || usage "$1 needs a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    --dry-run) dry=yes; shift ;;
    --uninstall) uninstall=yes; shift ;;
    -h | --help) sed -n '2,/^set -e/{s/^# \{0,1\}//;/^set/d;p}' "$0"; exit 0 ;;
    *) usage "\"$1\" is no option; --help lists them" ;;
  esac
done
for name in prefix root; do
  case ${!name} in
    /*) ;;
    *) usage "--$name must be an absolute path, not \"${!name}\"" ;;
  esac
  # These go into unit files and YAML as they are.
  [[ ${!name} =~ ^[A-Za-z0-9/._-]+$ ]] ||
    usage "--$name: \"${!name}\" may hold letters, digits and / . _ - only"
done
[[ $user =~ ^[a-z_][a-z0-9_-]*$ ]] || usage "--user: \"$user\" is no user name"
[ -z "$destdir" ] || destdir=$(realpath -m "$destdir")
if [ -z "$destdir" ] && [ "$dry" = no ] && [ "$(id -u)" -ne 0 ]; then
  die "not root: run it with sudo, or name a --destdir"
fi

# Does it, or with --dry-run says it.
run() {
  if [ "$dry" = yes ]; then
    say "would: $*"
  else
    "$@"
  fi
}

# put MODE OWNER FILE TO: replaces TO in one step, if it differs.
put() {
  local mode=$1 owner=$2 from=$3 to=$4
  if cmp -s "$from" "$to" && [ "$(stat -c %a "$to")" = "$mode" ]; then
    say "unchanged: $to"
    return
  fi
  changed=yes
  if [ "$dry" = yes ]; then
    say "would install: $to (mode $mode)"
    return
  fi
  mkdir -p "$(dirname "$to")"
  install -m "$mode" "$from" "$to.new.$$"
  [ -n "$destdir" ] || chown "$owner" "$to.new.$$"
  # What runs from the old file goes on with it.
  mv -f "$to.new.$$" "$to"
  say "installed: $to"
}

# The same, but what is there stays, whatever it holds.
put_once() {
  if [ -e "$4" ]; then
    say "kept: $4"
  else
    put "$@"
  fi
}

program=$destdir$prefix/bin/machina
units=$destdir$prefix/lib/systemd/system
# systemd looks below these two prefixes only.
case $prefix in
  /usr | /usr/local) ;;
  *) units=$destdir/etc/systemd/system ;;
esac
docs=$destdir$prefix/share/doc/machina
etc=$destdir/etc/machina
state=$destdir$root

tell_systemd() {
  if [ -z "$destdir" ] && [ -d /run/systemd/system ]; then
    run systemctl daemon-reload
  fi
}

if [ "$uninstall" = yes ]; then
  if [ "$dry" = no ] && [ -x "$program" ] && [ -z "$destdir" ] && [ -d "$state" ]; then
    found=0
    "$program" ops detect --root "$state" >/dev/null 2>&1 || found=$?
    [ "$found" -eq 3 ] ||  # nothing runs, neither server nor pool
      die "machina runs on $state: systemctl disable --now machina machina-pool, or $program ops kill --root $state, first"
  fi
  for file in "$program" "$units/machina.service" \
    "$units/machina-pool.service" "$docs/operating.md"; do
    [ ! -e "$file" ] || { run rm -f "$file"; say "removed: $file"; }
  done
  [ ! -d "$docs" ] || run rmdir --ignore-fail-on-non-empty "$docs"
  tell_systemd
  say "kept: $etc, $state and the user $user"
  exit 0
fi

if [ -z "$binary" ]; then
  binary=$tree/build/release/machina
  [ -x "$binary" ] || die "there is no $binary: build it (cmake --preset release && cmake --build --preset release --target machina), or name one with --binary"
fi
version=$("$binary" version) || die "$binary does not run here"
was=
[ ! -x "$program" ] || was=$("$program" version 2>/dev/null || true)
say "$version, to $program${was:+ (there: $was)}"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The user first: files are given to it.
if [ -z "$destdir" ] && ! id -u "$user" >/dev/null 2>&1; then
  # Not the root for a home: what is somebody's home is no root.
  run useradd --system --user-group --home-dir /nonexistent --no-create-home \
    --shell /usr/sbin/nologin "$user"
  [ "$dry" = yes ] || say "made: the user $user"
fi

# Where it does not serve as root its jobs have uids of their own only if the
# user has subordinate ids: one for each of 64 slots.
subids_of() { # FILE
  [ -r "$1" ] && awk -F: -v user="$user" \
    '$1 == user && $3 >= 64 { found = 1 } END { exit !found }' "$1"
}
if [ -z "$destdir" ] && [ "$user" != root ]; then
  if subids_of /etc/subuid && subids_of /etc/subgid; then
    say "unchanged: subordinate ids of $user"
  else
    # Behind all that are given away.
    first=$(cat /etc/subuid /etc/subgid 2>/dev/null |
      awk -F: '{ end = $2 + $3; if (end > last) last = end } END { print (last > 300000 ? last : 300000) }')
    run usermod --add-subuids "$first-$((first + 63))" \
      --add-subgids "$first-$((first + 63))" "$user"
    [ "$dry" = yes ] || say "made: subordinate ids $first-$((first + 63)) of $user"
  fi
  [ -x /usr/bin/newuidmap ] ||
    say "missing: newuidmap (Debian: apt-get install uidmap); without it jobs share $user's uid"
fi

changed=no
put 755 root:root "$binary" "$program"
program_changed=$changed

for unit in machina.service machina-pool.service; do
  sed -e "s|/usr/local|$prefix|g" -e "s|/var/lib/machina|$root|g" \
    -e "s|^User=machina|User=$user|" -e "s|^Group=machina|Group=$user|" \
    "$tree/ops/systemd/$unit" >"$work/$unit"
  put 644 root:root "$work/$unit" "$units/$unit"
done
put 644 root:root "$tree/docs/operating.md" "$docs/operating.md"

cat >"$work/machina.yaml" <<YAML
# machina's configuration: a map from variable to value. What is not set here
# has the prod profile's value; machina serve --config FILE --print-config shows
# all of them, and where each comes from.
MACHINA_PROFILE: prod
MACHINA_ROOT: $root
MACHINA_HOST: 127.0.0.1
MACHINA_PORT: 8080
MACHINA_API_TOKEN_FILE: /etc/machina/token
# MACHINA_WORKERS: 4
# MACHINA_KINDS_ALLOWED: noop,test.*,patch.*
# MACHINA_SHELL_ALLOWED_EXE: make,pytest-3
# MACHINA_REPO_ROOTS: /srv/git
YAML
put_once 644 root:root "$work/machina.yaml" "$etc/machina.yaml"
if [ ! -e "$etc/token" ]; then
  (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$work/token")
fi
put_once 600 "$user:$user" "$work/token" "$etc/token"

if [ -d "$state" ]; then
  say "kept: $state"
else
  run mkdir -p "$(dirname "$state")"
  run install -d -m 700 "$state"
  [ -n "$destdir" ] || run chown "$user:$user" "$state"
  [ "$dry" = yes ] || say "made: $state"
fi
tell_systemd

[ "$dry" = no ] || { say "nothing was changed"; exit 0; }
say
if [ -n "$was" ] && [ "$program_changed" = yes ]; then
  say "The program was replaced; what runs goes on with the old one. Hand over:"
  say "  systemctl reload machina && systemctl restart machina-pool"
  say "  or, without systemd: runuser -u $user -- $prefix/bin/machina ops restart --pool --config /etc/machina/machina.yaml"
elif [ -z "$was" ]; then
  say "Check, then start:"
  say "  runuser -u $user -- $prefix/bin/machina doctor --profile prod --config /etc/machina/machina.yaml"
  say "  systemctl enable --now machina"
  say "  or, without systemd: runuser -u $user -- $prefix/bin/machina ops start --config /etc/machina/machina.yaml"
fi
