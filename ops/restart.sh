#!/usr/bin/env bash
# ops/restart.sh: replaces the server; its pool and the running jobs stay.
# Options, reports and exit codes: machina ops restart --help, docs/operating.md.
source "$(dirname "${BASH_SOURCE[0]}")/binary.sh"
exec "$(machina_binary)" ops restart "$@"
