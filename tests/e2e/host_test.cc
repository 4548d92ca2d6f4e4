// Hosts that give no sandbox, and those that give less than usual: nothing is
// leased that cannot run, nothing is tried for ever, and everybody who asks is
// told why and what to change.

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iterator>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

// In a child: what is taken from it is not given back.
void in_child(const std::function<void()>& body) {
  const pid_t pid = fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    try {
      body();
    } catch (const std::exception& e) {
      ADD_FAILURE() << e.what();
    }
    fflush(stdout);
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

bool filter(std::vector<sock_filter> program) {
  const sock_fprog all{static_cast<unsigned short>(program.size()),
                       program.data()};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         syscall(SYS_seccomp, 1, 0, &all) == 0;
}

// As a container's profile does: clone3 is not there, clone and unshare with
// namespaces are refused.
bool refuse_namespaces() {
  constexpr unsigned kNamespaces =
      CLONE_NEWNS | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET;
  const unsigned args = offsetof(seccomp_data, args);
  return filter({BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
                 BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 0, 1),
                 BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
                 BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 1, 0),
                 BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_unshare, 0, 3),
                 BPF_STMT(BPF_LD | BPF_W | BPF_ABS, args),
                 BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, kNamespaces, 0, 1),
                 BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
                 BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)});
}

// Everything that must be so where no job can run; `word` is in the reason.
void expect_told(Product& p, const std::string& word) {
  const std::string id =
      p.submit({{"kind", "tool.shell"}, {"payload", {{"argv", {"true"}}}}});
  EXPECT_TRUE(eventually([&] { return p.get("/ready").status == 503; }, 20'000))
      << end_of(p.log());
  const std::string ready = p.get("/ready").body;
  EXPECT_NE(ready.find("no job can run here"), std::string::npos) << ready;
  EXPECT_NE(ready.find(word), std::string::npos) << ready;
  EXPECT_NE(ready.find("to mend it"), std::string::npos) << ready;
  const Json trouble = p.get("/v1/workers").json()["trouble"];
  ASSERT_TRUE(trouble.is_object());
  EXPECT_NE(trouble.value("reason", "").find(word), std::string::npos);
  EXPECT_NE(trouble.value("remedy", ""), "");
  const Json job = p.job(id);
  EXPECT_EQ(job["state"], "ready") << job;
  EXPECT_EQ(job["attempt"], 0) << job;
  EXPECT_NE(job.value("waiting_reason", "").find(word), std::string::npos)
      << job;
  const Ended doctor = p.run({"doctor"});
  EXPECT_NE((doctor.out + doctor.err).find(word), std::string::npos)
      << doctor.out << doctor.err;
}

std::size_t count(const std::string& text, const std::string& word) {
  std::size_t n = 0;
  for (std::size_t at = text.find(word); at != std::string::npos;
       at = text.find(word, at + 1)) {
    ++n;
  }
  return n;
}

class Host : public EndToEnd {};
MACHINA_BOTH(Host);

TEST_P(Host, F19_WithoutNamespacesNothingIsLeasedAndTheReasonIsSaid) {
  product_.reset();
  const Who who = GetParam();
  in_child([who] {
    ASSERT_TRUE(refuse_namespaces());
    Product p(who);
    std::string why;
    ASSERT_TRUE(p.start({}, &why)) << why;
    expect_told(p, "sandbox: clone");
    // It has stopped trying: one worker a minute.
    const std::string before = read_file(p.root() + "/pool.log");
    sleep_ms(1500);
    const std::string after = read_file(p.root() + "/pool.log");
    EXPECT_EQ(count(before, "start_failed"), count(after, "start_failed"));
    EXPECT_LE(count(after, "\"no_sandbox\"") + count(after, "event=no_sandbox"),
              12u)
        << after;
    EXPECT_TRUE(p.worker_pids().empty());
    EXPECT_EQ(p.stop_server(), 0);
  });
}

TEST(HostOfOneId, F19_TheRootOfSuchAUserNamespaceIsToldSo) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root";
  in_child([] {
    ASSERT_EQ(unshare(CLONE_NEWUSER), 0);
    const auto put = [](const char* path, const char* text) {
      const int fd = open(path, O_WRONLY | O_CLOEXEC);
      const bool good = write(fd, text, std::strlen(text)) > 0;
      close(fd);
      return good;
    };
    ASSERT_TRUE(put("/proc/self/setgroups", "deny"));
    ASSERT_TRUE(put("/proc/self/uid_map", "0 0 1"));
    ASSERT_TRUE(put("/proc/self/gid_map", "0 0 1"));
    Product p(Who::root);
    std::string why;
    ASSERT_TRUE(p.start({}, &why)) << why;
    expect_told(p, "user namespace");
    // Three times, and then once a minute.
    EXPECT_TRUE(
        eventually([&] { return count(p.log(), "pool_unusable") > 0; }, 20'000))
        << end_of(p.log());
    EXPECT_LE(count(p.log(), "pool_ended"), 3u) << p.log();
    EXPECT_EQ(p.stop_server(), 0);
  });
}

}  // namespace
}  // namespace machina::e2e
