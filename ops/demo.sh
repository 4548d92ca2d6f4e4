#!/usr/bin/env bash
# ops/demo.sh: installs, builds, and shows real jobs going the whole way:
# HTTP, log, worker process, sandbox, result. What it does then is ops/demo.py.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
no_options "$@"

ops/setup.sh
say "building (release)"
configure release
cmake --build --preset release -j "$(nproc)" --target machina
exec /usr/bin/python3 ops/demo.py build/release/machina
