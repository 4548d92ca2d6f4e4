#!/usr/bin/env bash
# ops/start.sh: starts a server in the background and waits until it is ready.
# Options, reports and exit codes: machina ops start --help, docs/operating.md.
source "$(dirname "${BASH_SOURCE[0]}")/binary.sh"
exec "$(machina_binary)" ops start "$@"
