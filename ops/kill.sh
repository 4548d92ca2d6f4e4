#!/usr/bin/env bash
# ops/kill.sh: ends what runs on a root: TERM, then KILL after a grace.
# Options, reports and exit codes: machina ops kill --help, docs/operating.md.
source "$(dirname "${BASH_SOURCE[0]}")/binary.sh"
exec "$(machina_binary)" ops kill "$@"
