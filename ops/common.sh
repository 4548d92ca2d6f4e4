# ops/common.sh: what the scripts here share. Source it; it changes into the
# repository, wherever it was called from.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Another clone of the same source finds what this one has compiled.
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1

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
