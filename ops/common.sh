# ops/common.sh: what the scripts here share. Source it; it changes into the
# repository, wherever it was called from.

set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Another clone of the same source finds what this one has compiled.
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
# It stays right with precompiled headers.
export CCACHE_SLOPPINESS=pch_defines,time_macros

# no_options "$@": for a script without options. -h and --help print its head
# and end; anything else is refused, before anything is done.
no_options() {
  case "${1-}" in
    "") ;;
    -h | --help) script_help; exit 0 ;;
    *) die_usage "\"$1\" is no option; --help says what this does" ;;
  esac
}
# The comment at the head of the script that runs.
script_help() { sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "$script"; }
die_usage() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 2; }

say() { printf '== %s\n' "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# configure PRESET [cmake options]: one clear line when it cannot be.
configure() {
  local preset=$1 log
  shift
  log=$(mktemp)
  if ! cmake --preset "$preset" "$@" >"$log" 2>&1; then
    cat "$log" >&2
    rm -f "$log"
    die "configuring the $preset build failed (see above; is ops/setup.sh done?)"
  fi
  rm -f "$log"
}
