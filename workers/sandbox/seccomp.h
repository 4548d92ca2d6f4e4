// workers/sandbox/seccomp.h
//
// The system-call filters, compiled once when the spawner starts and installed
// raw by stage 2. Two programs, because the kernel takes the stricter answer of
// all installed filters and libseccomp cannot express "allowed but for these
// arguments" in one:
//
//   allow   by number; whatever it does not know answers ENOSYS, so that
//           runtimes fall back instead of dying
//   deny    known-dangerous calls and arguments answer EPERM (clone3, io_uring
//           ENOSYS; foreign socket families EAFNOSUPPORT); everything else
//           passes. Installed last: on a tie its errno is the one that is seen.
//
// With MACHINA_SECCOMP_ENABLE=0 only `deny` is installed.
//
// In front of `deny` stand the rules that libseccomp has no words for ("not one
// of these values"): sockets of no protocol but TCP and UDP, no pair but of
// Unix sockets, nobody's limits, priority, affinity or I/O class but the job's
// own, and no call that is newer than this list.
//
//   S1  Every int argument is compared in its low 32 bits only: the kernel
//       looks at no more, and a 64-bit compare is bypassed by setting high
//       bits.
//   S2  Only a foreign architecture (i386, x32) is killed.

#pragma once

#include <linux/filter.h>

#include <vector>

#include "queue/base/result.h"

namespace machina::sandbox {

using Bpf = std::vector<sock_filter>;

Result<Bpf> compile_allow_filter();
Result<Bpf> compile_deny_filter();

}  // namespace machina::sandbox
