#!/usr/bin/env bash
# ops/doctor.sh: what this host really isolates and, in the prod profile, the
# production checklist. machina ops doctor --help, docs/operating.md.
source "$(dirname "${BASH_SOURCE[0]}")/binary.sh"
exec "$(machina_binary)" ops doctor "$@"
