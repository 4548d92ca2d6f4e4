#!/usr/bin/env bash
# ops/demo.sh: installs, builds, and shows real jobs going the whole way:
# HTTP, log, worker process, sandbox, result. What it does then is ops/demo.py.
# Its program is compiled at -O1, which takes a fifth less time than Release does,
# and it installs nothing that only tests need.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
no_options "$@"

ops/setup.sh --no-tests
say "building"
configure demo
cmake --build --preset demo -j "$(nproc)" --target machina
exec /usr/bin/python3 ops/demo.py build/demo/machina
