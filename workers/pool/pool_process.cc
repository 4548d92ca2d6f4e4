#include "workers/pool/pool_process.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/close_range.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "workers/sandbox/wire.h"

namespace machina {
namespace {

Error failure(const std::string& what) {
  return {Code::io, what + ": " + strerror(errno)};
}

bool no_capability() {
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2] = {};
  if (syscall(SYS_capget, &header, data) != 0) return false;
  for (const auto& d : data) {
    if (d.effective != 0 || d.permitted != 0 || d.inheritable != 0) {
      return false;
    }
  }
  return true;
}

// A copy that anyone may execute, where the file itself is for its owner only.
Result<int> private_copy(int fd, const std::string& path, off_t size) {
  const int copy = memfd_create("machina", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (copy < 0) return failure("copy " + path);
  off_t at = 0;
  while (at < size) {
    const ssize_t n =
        sendfile(copy, fd, &at, static_cast<std::size_t>(size - at));
    if (n <= 0) {
      close(copy);
      return failure("copy " + path);
    }
  }
  fchmod(copy, 0755);
  fcntl(copy, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW);
  // A writable descriptor would make the execution ETXTBSY.
  const int again = ::open(("/proc/self/fd/" + std::to_string(copy)).c_str(),
                           O_RDONLY | O_CLOEXEC);
  close(copy);
  if (again < 0) return failure("reopen the copy of " + path);
  return again;
}

// Between fork and exec: system calls only.
[[noreturn]] void become(int program, const char* path, char* const* argv,
                         char* const* env, int channel, int facts,
                         pid_t parent) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  signal(SIGPIPE, SIG_DFL);
  dup2(1, 2);  // the pipe to the pool, which writes the file
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);
  // Out of the way of 3 and 4 first, then onto them.
  const int c = fcntl(channel, F_DUPFD, 16);
  const int f = fcntl(facts, F_DUPFD, 16);
  const int p = fcntl(program, F_DUPFD_CLOEXEC, 16);
  if (c < 0 || f < 0 || p < 0) _exit(126);
  if (dup2(c, kWorkerChannelFd) < 0 || dup2(f, kWorkerFactsFd) < 0) _exit(126);
  // The pool opens everything close-on-exec; this is for what it inherited.
  if (syscall(SYS_close_range, kWorkerFactsFd + 1, ~0U, CLOSE_RANGE_CLOEXEC) !=
          0 &&
      sandbox::close_all_but({kWorkerChannelFd, kWorkerFactsFd, p}) != 0) {
    _exit(126);
  }
  syscall(SYS_execveat, p, "", argv, env, AT_EMPTY_PATH);
  execve(path, argv, env);  // a script has no descriptor to read itself from
  _exit(127);
}

std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (const auto& text : texts) out.push_back(const_cast<char*>(text.c_str()));
  out.push_back(nullptr);
  return out;
}

}  // namespace

Result<void> drop_privilege(std::uint32_t uid) {
  if (geteuid() != 0) {
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    return {};
  }
  if (uid == 0) return Error{Code::invalid, "the pool's uid must not be 0"};
  if (setgroups(0, nullptr) != 0) return failure("drop groups");
  if (setresgid(uid, uid, uid) != 0) return failure("set the pool's gid");
  if (setresuid(uid, uid, uid) != 0) return failure("set the pool's uid");
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  uid_t r, e, s;
  gid_t rg, eg, sg;
  if (getresuid(&r, &e, &s) != 0 || getresgid(&rg, &eg, &sg) != 0 || r != uid ||
      e != uid || s != uid || rg != uid || eg != uid || sg != uid ||
      getgroups(0, nullptr) != 0 || !no_capability() || setuid(0) == 0) {
    return Error{Code::io, "the pool still holds privilege after dropping it"};
  }
  return {};
}

Result<Program> Program::open(const std::string& path) {
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return failure("open " + path);
  struct stat info {};
  if (fstat(fd, &info) != 0) return failure("stat " + path);
  if (geteuid() == 0 && (info.st_mode & S_IXOTH) == 0) {
    auto copy = private_copy(fd, path, info.st_size);
    close(fd);
    if (!copy) return copy.error();
    fd = *copy;
  }
  return Program(fd, path);
}

Program::Program(Program&& other) noexcept
    : fd_(other.fd_), path_(std::move(other.path_)) {
  other.fd_ = -1;
}

Program::~Program() {
  if (fd_ >= 0) close(fd_);
}

Result<int> Program::start(const std::vector<std::string>& argv,
                           const std::vector<std::string>& env, int channel,
                           int facts) const {
  const auto args = pointers(argv);
  const auto variables = pointers(env);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) return failure("fork a worker");
  if (pid == 0) {
    become(fd_, path_.c_str(), args.data(), variables.data(), channel, facts,
           parent);
  }
  return pid;
}

}  // namespace machina
