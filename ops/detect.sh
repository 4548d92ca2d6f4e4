#!/usr/bin/env bash
# ops/detect.sh: what runs on a root, as JSON.
# Options, reports and exit codes: machina ops detect --help, docs/operating.md.
source "$(dirname "${BASH_SOURCE[0]}")/binary.sh"
exec "$(machina_binary)" ops detect "$@"
