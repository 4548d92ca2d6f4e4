# shellcheck shell=bash
# ops/binary.sh: which machina the operating scripts run: the one built in this
# tree, else the installed one. Source it.

set -euo pipefail

machina_binary() {
  local here candidate
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  for candidate in "$here/build/release/machina" "$here/build/debug/machina" \
    "$here/bin/machina"; do
    if [ -x "$candidate" ]; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  command -v machina || {
    printf '%s: there is no machina: build one (ops/demo.sh) or install one (ops/install.sh)\n' \
      "$(basename "$0")" >&2
    exit 2
  }
}
