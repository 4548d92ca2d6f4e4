// workers/sandbox/landlock.h
//
// Landlock with constants of our own (Debian 12's header stops at ABI 2), cut
// to what the running kernel knows. A ruleset is built once per session, after
// pivot_root; stage 2 applies it.

#pragma once

#include <cstdint>

namespace machina::sandbox {

// 0 where the kernel has none; *error then says why.
int landlock_abi(int* error);

// Read and execute everywhere; everything but devices below /work, /tmp and
// /dev/shm (and `writable` where it is not null); the five devices; signals and
// abstract sockets only among its own. A descriptor, or -errno.
int landlock_ruleset(int abi, const char* writable);

// 0 or errno; a system call only.
int landlock_enter(int ruleset);

}  // namespace machina::sandbox
