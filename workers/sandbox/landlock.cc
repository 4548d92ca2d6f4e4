#include "workers/sandbox/landlock.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <initializer_list>

namespace machina::sandbox {

namespace {

constexpr long kCreate = 444, kAddRule = 445, kRestrict = 446;
constexpr std::uint32_t kVersionFlag = 1;
constexpr int kPathBeneath = 1;

constexpr std::uint64_t kExecute = 1 << 0, kWriteFile = 1 << 1,
                        kReadFile = 1 << 2, kReadDir = 1 << 3,
                        kMakeChar = 1 << 6, kMakeBlock = 1 << 11,
                        kRefer = 1 << 13, kTruncate = 1 << 14,
                        kIoctlDev = 1 << 15;
constexpr std::uint64_t kAbi1 = (1 << 13) - 1;
constexpr std::uint64_t kScopeAbstract = 1 << 0, kScopeSignal = 1 << 1;

struct RulesetAttr {
  std::uint64_t fs = 0, net = 0, scoped = 0;
};
struct __attribute__((packed)) BeneathAttr {
  std::uint64_t allowed = 0;
  std::int32_t parent = -1;
};

std::uint64_t handled_by(int abi) {
  std::uint64_t rights = kAbi1;
  if (abi >= 2) rights |= kRefer;
  if (abi >= 3) rights |= kTruncate;
  if (abi >= 5) rights |= kIoctlDev;
  return rights;
}

int allow(int ruleset, const char* path, std::uint64_t rights) {
  BeneathAttr rule;
  rule.allowed = rights;
  rule.parent = open(path, O_PATH | O_CLOEXEC);
  if (rule.parent < 0) return errno;
  const long code = syscall(kAddRule, ruleset, kPathBeneath, &rule, 0);
  const int error = code < 0 ? errno : 0;
  close(rule.parent);
  return error;
}

}  // namespace

int landlock_abi(int* error) {
  const long abi = syscall(kCreate, nullptr, 0, kVersionFlag);
  if (error) *error = abi < 0 ? errno : 0;
  return abi < 0 ? 0 : static_cast<int>(abi);
}

int landlock_ruleset(int abi, const char* writable) {
  RulesetAttr attr;
  attr.fs = handled_by(abi);
  if (abi >= 6) attr.scoped = kScopeAbstract | kScopeSignal;
  // A kernel refuses a struct longer than the one it knows unless the rest is
  // zero; the size is matched to the version all the same.
  const std::size_t size = abi >= 6   ? sizeof(attr)
                           : abi >= 4 ? offsetof(RulesetAttr, scoped)
                                      : offsetof(RulesetAttr, net);
  const long created = syscall(kCreate, &attr, size, 0);
  if (created < 0) return -errno;
  const auto ruleset = static_cast<int>(created);
  const std::uint64_t all = attr.fs & ~(kMakeChar | kMakeBlock | kIoctlDev);
  int error = allow(ruleset, "/", kReadFile | kReadDir | kExecute);
  for (const char* path : {"/work", "/tmp", "/dev/shm"}) {
    if (!error) error = allow(ruleset, path, all);
  }
  if (!error && writable) error = allow(ruleset, writable, all);
  for (const char* path :
       {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"}) {
    const std::uint64_t rights =
        kReadFile | kWriteFile | (attr.fs & (kIoctlDev | kTruncate));
    if (!error) error = allow(ruleset, path, rights);
  }
  if (error) {
    close(ruleset);
    return -error;
  }
  return ruleset;
}

int landlock_enter(int ruleset) {
  return syscall(kRestrict, ruleset, 0) < 0 ? errno : 0;
}

}  // namespace machina::sandbox
