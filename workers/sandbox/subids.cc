// Subordinate ids: another host uid for jobs where the pool is not root. The
// kernel lets only a privileged helper map them (newuidmap, newgidmap, Debian's
// package uidmap), and only those that /etc/subuid and /etc/subgid give to our
// user.
//
// A keeper moves into a user namespace of its own once, before its first
// session, in which its slot's id and our own are mapped; from there on it can
// map both into every sandbox by itself.

#include <fcntl.h>
#include <pwd.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "workers/sandbox/launch.h"

namespace machina::sandbox {

namespace {

constexpr char kUidHelper[] = "/usr/bin/newuidmap";
constexpr char kGidHelper[] = "/usr/bin/newgidmap";

// The first id of a range that has one for each slot; 0: there is none.
std::uint64_t first_of(const char* path, const std::string& user, uid_t uid) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const auto a = line.find(':');
    const auto b = line.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos) continue;
    const std::string owner = line.substr(0, a);
    if (owner != user && owner != std::to_string(uid)) continue;
    const std::uint64_t first = std::strtoull(&line[a + 1], nullptr, 10);
    const std::uint64_t count = std::strtoull(&line[b + 1], nullptr, 10);
    if (first > 0 && count >= kSlotsMax) return first;
  }
  return 0;
}

// In a child of its own. 0 where the helper did it.
int run_helper(const char* helper, pid_t pid, std::uint64_t job,
               std::uint64_t own) {
  const pid_t child = fork();
  if (child < 0) return errno;
  if (child == 0) {
    std::string words[] = {helper,
                           std::to_string(pid),
                           std::to_string(kInnerUid),
                           std::to_string(job),
                           "1",
                           std::to_string(kOwnerUid),
                           std::to_string(own),
                           "1"};
    char* argv[std::size(words) + 1] = {};
    for (std::size_t i = 0; i < std::size(words); ++i) argv[i] = &words[i][0];
    char* env[] = {nullptr};
    execve(helper, argv, env);
    _exit(127);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return 0;
  return WIFEXITED(status) && WEXITSTATUS(status) == 127 ? ENOENT : EPERM;
}

}  // namespace

int enter_subids(const Host& host, int slot) {
  int ready[2];
  if (pipe2(ready, O_CLOEXEC) < 0) return errno;
  const pid_t self = getpid();
  const auto n = static_cast<std::uint64_t>(slot);
  const pid_t helper = fork();
  if (helper == 0) {
    close(ready[1]);
    char byte;
    if (read(ready[0], &byte, 1) != 1) _exit(EPERM);
    int error = run_helper(kUidHelper, self, host.sub_uid + n, host.uid);
    if (!error)
      error = run_helper(kGidHelper, self, host.sub_gid + n, host.gid);
    _exit(error);
  }
  int error = helper < 0 ? errno : 0;
  close(ready[0]);
  // The helpers look at who owns our files in /proc.
  prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
  if (!error && unshare(CLONE_NEWUSER) < 0) error = errno;
  if (!error && write(ready[1], "g", 1) != 1) error = EPIPE;
  close(ready[1]);
  int status = 0;
  while (helper > 0 && waitpid(helper, &status, 0) < 0 && errno == EINTR) {
  }
  prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
  if (error) return error;
  if (!WIFEXITED(status)) return EPERM;
  return WEXITSTATUS(status);
}

int find_subids(Host* host) {
  std::string user;
  passwd entry{};
  passwd* found = nullptr;
  char text[4096];
  if (getpwuid_r(host->uid, &entry, text, sizeof(text), &found) == 0 &&
      found != nullptr) {
    user = found->pw_name;
  }
  if (access(kUidHelper, X_OK) != 0 || access(kGidHelper, X_OK) != 0) {
    return ENOENT;
  }
  host->sub_uid = first_of("/etc/subuid", user, host->uid);
  host->sub_gid = first_of("/etc/subgid", user, host->uid);
  int error = host->sub_uid == 0 || host->sub_gid == 0 ? ENODATA : 0;
  if (!error) {
    // Whether it works is seen by doing it (a service may be forbidden to gain
    // privilege, a container to map ids).
    const pid_t child = fork();
    if (child == 0) _exit(enter_subids(*host, 0));
    int status = 0;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    error = child < 0           ? EAGAIN
            : WIFEXITED(status) ? WEXITSTATUS(status)
                                : EPERM;
  }
  if (error) host->sub_uid = host->sub_gid = 0;
  return error;
}

}  // namespace machina::sandbox
