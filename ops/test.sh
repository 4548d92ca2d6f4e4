#!/usr/bin/env bash
# ops/test.sh: installs, builds with warnings as errors, and runs all tests.
#
#   asan     address and undefined-behaviour sanitizers: what parses outside
#            bytes and what keeps them (queue, sim, server, tools)
#   tsan     the thread sanitizer: the queue's log and store threads (the core's
#            tests, seeded stories and wal verify use one thread, but for one test
#            of frozen state, and are not built)
#   release  everything, with the real binary; its summary comes last
#
# The sandbox's own tests run in release only: a sanitizer's runtime needs
# system calls that the sandbox is there to deny.
#
# ops/test.sh --quick leaves the sanitizers out.
# ops/test.sh --repeat N --folder F [--filter REGEX] runs the tests of tests/F, or
# those whose name matches, N times in a row beside a busy loop on each core, and
# stops at the first failure: a test that fails then fails by itself.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

shopt -s globstar
quick=no repeat='' folder='' filter=.
while [ $# -gt 0 ]; do
  case "$1" in
    --quick) quick=yes ;;
    -h | --help) script_help; exit 0 ;;
    --repeat | --folder | --filter)
      [ $# -ge 2 ] || die_usage "$1 needs a value; --help says more"
      case "$1" in
        --repeat) repeat=$2 ;;
        --folder) folder=$2 ;;
        --filter) filter=$2 ;;
      esac
      shift ;;
    *) die_usage "\"$1\" is no option; --help lists them" ;;
  esac
  shift
done
if [ -n "$repeat$folder" ] || [ "$filter" != . ]; then
  [[ $repeat =~ ^[1-9][0-9]{0,4}$ ]] || die_usage "--repeat must be 1 to 99999"
  [[ $folder =~ ^[a-z0-9]+$ ]] &&
    compgen -G "tests/$folder/**/*_test.cc" >/dev/null ||
    die_usage "--folder \"$folder\": there is no tests/$folder with tests"
fi
jobs=$(nproc)
started=$SECONDS

ops/setup.sh

# Only targets whose folder has tests exist.
targets() {
  local folder
  for folder in "$@"; do
    compgen -G "tests/$folder/**/*.cc" >/dev/null && printf 'test_%s ' "$folder"
  done
}

# sanitized PRESET FOLDERS...: builds and runs only those folders' tests.
sanitized() {
  local preset=$1 labels
  shift
  say "$preset: building the tests of $*"
  configure "$preset" -DMACHINA_WERROR=ON
  # shellcheck disable=SC2046
  cmake --build --preset "$preset" -j "$jobs" --target $(targets "$@")
  labels=$(IFS='|'; echo "$*")
  say "$preset: testing $*"
  ctest --test-dir "build/$preset" -j "$jobs" --output-on-failure \
    --no-tests=error -L "^($labels)\$"
}

if [ -n "$repeat" ]; then
  say "release: building the tests of $folder"
  configure release -DMACHINA_WERROR=ON
  cmake --build --preset release -j "$jobs" --target "test_$folder"
  busy=()
  for ((i = 0; i < jobs; i++)); do
    timeout 6h bash -c 'while :; do :; done' &
    busy+=($!)
  done
  trap 'kill "${busy[@]}" 2>/dev/null' EXIT
  say "release: $repeat times the tests of $folder, beside $jobs busy loops"
  ctest --test-dir build/release -j "$jobs" --output-on-failure \
    --no-tests=error -L "^$folder\$" -R "$filter" --repeat "until-fail:$repeat"
  exit
fi

if [ "$quick" = no ]; then
  sanitized asan queue sim server tools
  sanitized tsan queue
fi

say "release: building everything"
configure release -DMACHINA_WERROR=ON
cmake --build --preset release -j "$jobs"
say "release: testing everything ($((SECONDS - started)) s so far)"
exec ctest --test-dir build/release -j "$jobs" --output-on-failure \
  --no-tests=error
