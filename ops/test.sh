#!/usr/bin/env bash
# ops/test.sh: installs, builds with warnings as errors, and runs all tests.
#
#   asan     address and undefined-behaviour sanitizers: what parses outside
#            bytes and what keeps them (queue, sim, server, tools)
#   tsan     the thread sanitizer: the queue's log and store threads (its seeded
#            stories and wal verify use one thread and are left out)
#   release  everything, with the real binary; its summary comes last
#
# The sandbox's own tests run in release only: a sanitizer's runtime needs
# system calls that the sandbox is there to deny.
#
# ops/test.sh --quick leaves the sanitizers out.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

quick=no
case "${1-}" in
  "") ;;
  --quick) quick=yes ;;
  -h | --help) script_help; exit 0 ;;
  *) die_usage "\"$1\" is no option; there is only --quick" ;;
esac
[ $# -le 1 ] || die_usage "\"$2\" is one option too many; there is only --quick"
jobs=$(nproc)
started=$SECONDS

ops/setup.sh

# Only targets whose folder has tests exist.
targets() {
  local folder
  for folder in "$@"; do
    compgen -G "tests/$folder/*.cc" >/dev/null && printf 'test_%s ' "$folder"
  done
}

# sanitized PRESET EXCEPT FOLDERS...: builds and runs only those folders' tests,
# without those whose name matches EXCEPT.
sanitized() {
  local preset=$1 except=$2 labels
  shift 2
  say "$preset: building the tests of $*"
  configure "$preset" -DMACHINA_WERROR=ON
  # shellcheck disable=SC2046
  cmake --build --preset "$preset" -j "$jobs" --target $(targets "$@")
  labels=$(IFS='|'; echo "$*")
  say "$preset: testing $*"
  ctest --test-dir "build/$preset" -j "$jobs" --output-on-failure \
    --no-tests=error -L "^($labels)\$" -E "$except"
}

if [ "$quick" = no ]; then
  sanitized asan '^$' queue sim server tools
  sanitized tsan '^(LogUnderChance|CoreRandom|Verify)' queue
fi

say "release: building everything"
configure release -DMACHINA_WERROR=ON
cmake --build --preset release -j "$jobs"
say "release: testing everything ($((SECONDS - started)) s so far)"
exec ctest --test-dir build/release -j "$jobs" --output-on-failure \
  --no-tests=error
