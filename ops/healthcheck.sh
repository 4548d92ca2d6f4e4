#!/usr/bin/env bash
# ops/healthcheck.sh: whether what runs on a root is well, as JSON.
# Options, reports and exit codes: machina ops healthcheck --help, docs/operating.md.
source "$(dirname "${BASH_SOURCE[0]}")/binary.sh"
exec "$(machina_binary)" ops healthcheck "$@"
