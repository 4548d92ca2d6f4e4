// The promises of workers/sandbox/sandbox.h, each by an act that would break
// it, as root and as an ordinary user.

#include "workers/sandbox/sandbox.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <thread>

#include "tests/workers/sandbox/sandbox_fixture.h"
#include "workers/sandbox/launch.h"
#include "workers/sandbox/output.h"

namespace machina::sandbox {
namespace {

namespace fs = std::filesystem;

class SandboxTest : public AnyIdentity {};
INSTANTIATE_TEST_SUITE_P(Sandbox, SandboxTest,
                         testing::Values(Identity::root, Identity::user),
                         identity_name);

SessionSpec small() {
  SessionSpec spec;
  spec.limits.memory_mb = 64;
  spec.limits.disk_mb = 16;
  spec.limits.pids = 32;
  spec.limits.output_bytes = 64 << 10;
  return spec;
}

// --- what a step is ---

TEST_P(SandboxTest, ExitCodesAndStreamsArriveWhole) {
  with([&] {
    Stand stand;
    auto session = stand.open();
    const auto r = sh(*session, "echo out; echo err >&2; pwd; exit 7");
    EXPECT_EQ(r.ended, Ended::exited) << shown(r);
    EXPECT_EQ(r.exit_code, 7);
    EXPECT_EQ(r.out, "out\n/work\n");
    EXPECT_EQ(r.err, "err\n");
    EXPECT_FALSE(r.truncated);
    EXPECT_EQ(r.output_bytes, 14U);

    Step step = command({"sh", "-c", "cat; echo more >&2"});
    step.stdin_data = "given\n";
    step.merge_stderr = true;
    const auto merged = session->run(step, Watch{});
    EXPECT_EQ(merged.out, "given\nmore\n") << shown(merged);

    const auto missing = session->run(command({"/no/such/program"}), Watch{});
    EXPECT_EQ(missing.ended, Ended::exited);
    EXPECT_EQ(missing.exit_code, 127) << shown(missing);
    const auto killed = sh(*session, "kill -SEGV $$");
    EXPECT_EQ(killed.ended, Ended::signalled);
    EXPECT_EQ(killed.signal, SIGSEGV) << shown(killed);
  });
}

TEST_P(SandboxTest, OnlyTheDeclaredVariablesAndThreeDescriptors) {  // B5
  setenv("MACHINA_TOKEN", "very-secret", 1);
  with([&] {
    Stand stand;
    auto session = stand.open();
    Step step = command({"/usr/bin/env"});
    step.env = {"EXTRA=1", "HOME=/tmp"};
    const auto env = session->run(step, Watch{});
    std::vector<std::string> lines;
    std::istringstream in(env.out);
    for (std::string line; std::getline(in, line);) lines.push_back(line);
    std::sort(lines.begin(), lines.end());
    EXPECT_EQ(lines, (std::vector<std::string>{
                         "EXTRA=1", "HOME=/tmp", "LANG=C.UTF-8",
                         "PATH=/usr/local/bin:/usr/bin:/bin", "TMPDIR=/tmp"}))
        << shown(env);
    const auto fds =
        python(*session,
               "import os\nfor i in range(4096):\n try: os.fstat(i); print(i)\n"
               " except OSError: pass");
    EXPECT_EQ(fds.out, "0\n1\n2\n") << shown(fds);
  });
  unsetenv("MACHINA_TOKEN");
}

TEST_P(SandboxTest, TheWorkspaceOutlivesAStepAndNotTheSession) {
  with([&] {
    Stand stand;
    {
      auto session = stand.open();
      sh(*session, "echo a > /work/x; echo b > /tmp/x; echo c > /dev/shm/x");
      EXPECT_EQ(sh(*session, "cat /work/x /tmp/x /dev/shm/x").out, "a\nb\nc\n");
    }
    auto session = stand.open();
    const auto r = sh(*session, "ls -A /work /tmp /dev/shm /var/tmp");
    EXPECT_EQ(r.out, "/dev/shm:\n\n/tmp:\n\n/var/tmp:\n\n/work:\n") << shown(r);
  });
}

TEST_P(SandboxTest, NothingOfTheHostIsThere) {
  with([&] {
    Stand stand;
    auto session = stand.open();
    const auto r = sh(*session, "ls /; ls /home /root /var /proc | wc -l");
    for (const char* name : {"root", "home", "sys", "mnt", "opt", "srv"}) {
      EXPECT_EQ(r.out.find(std::string("\n") + name + "\n"), std::string::npos)
          << r.out;
    }
    const auto outside = sh(*session, "cat " + stand.root + "/repos");
    EXPECT_NE(outside.exit_code, 0);
  });
}

TEST_P(SandboxTest, OrdinaryProgramsRun) {
  with([&] {
    Stand stand;
    auto session = stand.open();
    auto r = python(*session, R"py(
import subprocess, threading, socket, tempfile, multiprocessing, os
print(subprocess.check_output(["echo", "sub"]).decode().strip())
t = threading.Thread(target=lambda: print("thread")); t.start(); t.join()
s = socket.create_server(("127.0.0.1", 0))
c = socket.create_connection(s.getsockname()); print("tcp")
u = socket.socket(socket.AF_UNIX); u.bind("/tmp/u"); u.listen(); print("unix")
with tempfile.NamedTemporaryFile() as f: f.write(b"x"); print("temp")
with multiprocessing.Pool(2) as p: print(p.map(abs, [-1, -2]))
print(socket.gethostbyname("localhost"), socket.gethostname())
import pwd; print(pwd.getpwuid(os.getuid()).pw_name)
)py");
    EXPECT_EQ(r.out,
              "sub\nthread\ntcp\nunix\ntemp\n[1, 2]\n127.0.0.1 sandbox\njob\n")
        << shown(r);
    r = sh(*session,
           "set -e; git init -q a; cd a; git config user.email a@b; git config "
           "user.name n; echo 1 > f; git add f; git commit -qm one; cd ..; git "
           "clone -q a b; cd b; printf '%s\\n' '--- a/f' '+++ b/f' '@@ -1 +1 "
           "@@' '-1' '+2' > ../p; git apply ../p; cat f");
    EXPECT_EQ(r.out, "2\n") << shown(r);
    r = sh(*session,
           "printf '#include <stdio.h>\\nint main(){puts(\"built\");}' > m.c; "
           "gcc -O1 m.c -o m && ./m");
    EXPECT_EQ(r.out, "built\n") << shown(r);
  });
}

// Installed, upgraded by a rename and removed while the slot's keeper lives: a
// job that begins afterwards sees it, though one before it has looked there.
TEST_P(SandboxTest, F03_AJobSeesTheHostsFilesAsTheyAreAtItsStart) {
  char name[] = "/usr/local/machina-test-XXXXXX";
  if (mkdtemp(name) == nullptr) GTEST_SKIP() << "/usr/local is not ours";
  const std::string dir = name;
  fs::create_directories(dir + "/lib/deep");
  for (const char* below : {"", "/lib", "/lib/deep"}) {
    fs::permissions(dir + below, fs::perms(0777));
  }
  with([&] {
    const auto put = [&](const std::string& file, const char* text) {
      std::ofstream(dir + file) << text;
      fs::permissions(dir + file, fs::perms(0666));
    };
    put("/lib/deep/replaced", "old\n");
    put("/lib/deep/removed", "old\n");
    Stand stand;
    const auto seen = [&] {
      auto session = stand.open();
      return sh(*session, "cd " + dir +
                              "/lib && ls deep; cat deep/replaced; "
                              "cat deep/removed || echo none; "
                              "cat deep/new || echo none; "
                              "cat later/new || echo none")
          .out;
    };
    EXPECT_EQ(seen(), "removed\nreplaced\nold\nold\nnone\nnone\n");
    put("/lib/deep/new", "new\n");
    put("/replaced", "new\n");
    fs::rename(dir + "/replaced", dir + "/lib/deep/replaced");
    fs::remove(dir + "/lib/deep/removed");
    fs::create_directory(dir + "/lib/later");
    fs::permissions(dir + "/lib/later", fs::perms(0777));
    put("/lib/later/new", "new\n");
    EXPECT_EQ(seen(), "new\nreplaced\nnew\nnone\nnew\nnew\n");
  });
  fs::remove_all(dir);
}

TEST_P(SandboxTest, SignalsHaveTheirDefaults) {
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    const auto r = sh(*session, "grep -E 'Sig(Ign|Blk)' /proc/self/status");
    EXPECT_EQ(r.out, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n")
        << shown(r);
  });
}

// --- how a step ends ---

TEST_P(SandboxTest, TimeoutKillsWhatIgnoresEverything) {
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    auto r =
        sh(*session, "trap '' TERM INT HUP; while :; do sleep 1; done", 300);
    EXPECT_EQ(r.ended, Ended::timeout) << shown(r);
    EXPECT_LT(r.wall_ms, 3300);
    r = sh(*session, "kill -STOP $$; echo on", 300);
    EXPECT_EQ(r.ended, Ended::timeout) << shown(r);
    EXPECT_LT(r.wall_ms, 3300);
    EXPECT_EQ(sh(*session, "echo next").out, "next\n");
  });
}

TEST_P(SandboxTest, CancelSendsTermAndThenKill) {
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    for (const bool polite : {true, false}) {
      std::atomic<bool> cancel = false;
      Watch watch;
      watch.cancel = &cancel;
      watch.on_output = [&](int, std::span<const std::byte>) { cancel = true; };
      const auto r = session->run(
          command({"/bin/sh", "-c",
                   polite ? "trap 'echo bye; exit 3' TERM; echo up; sleep 60 & "
                            "wait"
                          : "trap '' TERM; echo up; while :; do sleep 1; done"},
                  60'000),
          watch);
      EXPECT_EQ(r.ended, Ended::cancelled) << shown(r);
      EXPECT_EQ(r.out, polite ? "up\nbye\n" : "up\n");
      EXPECT_LT(r.wall_ms, polite ? 1500 : 4000);
    }
  });
}

TEST_P(SandboxTest, MemoryEndsAsOom) {
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    auto r = python(*session, "x = bytearray(b'1') * (300 << 20); input()");
    EXPECT_EQ(r.ended, Ended::oom) << shown(r);
    r = python(*session, R"py(
import subprocess, sys, time
for _ in range(8):
    subprocess.Popen([sys.executable, "-c",
                      "x = bytearray(b'1') * (30 << 20); input()"],
                     stdin=subprocess.PIPE)
time.sleep(3); sys.exit(1)
)py");
    EXPECT_EQ(r.ended, Ended::oom) << shown(r);
    EXPECT_EQ(sh(*session, "echo alive").out, "alive\n");
  });
}

// Without a cgroup: what forks share is one memory, not one per process.
TEST_P(SandboxTest, SharedMemoryIsCountedOnce) {
  with([&] {
    SpawnerOptions options;
    options.force_off = {"cgroup_memory", "cgroup_pids"};
    Stand stand(options);
    auto session = stand.open(small());
    const auto r = python(*session, R"py(
import os, time
x = bytearray(b'1') * (30 << 20)
for _ in range(10):
    if os.fork() == 0:
        time.sleep(60)
time.sleep(0.7)
print("shared")
)py");
    EXPECT_EQ(r.ended, Ended::exited) << shown(r);
    EXPECT_EQ(r.out, "shared\n");
  });
}

// Memory that no process has mapped.
TEST_P(SandboxTest, HiddenMemoryIsCountedByTheCgroup) {
  if (!as_root()) GTEST_SKIP() << "needs a memory cgroup";
  with([&] {
    Stand stand;
    for (const char* script :
         {"import os\nfds=[]\nwhile True:\n f=os.memfd_create('x')\n "
          "fds.append(f)\n for _ in range(8): os.write(f, bytes(1<<20))",
          "import socket\nall=[]\nwhile True:\n a,b=socket.socketpair()\n "
          "all+=[a,b]\n a.setsockopt(1,7,1<<22)\n a.setblocking(False)\n "
          "try:\n  while True: a.send(bytes(65536))\n except "
          "BlockingIOError: pass"}) {
      auto session = stand.open(small());
      const auto r = python(*session, script);
      EXPECT_EQ(r.ended, Ended::oom) << script << shown(r);
      EXPECT_EQ(sh(*session, "echo alive").out, "alive\n");
    }
  });
}

TEST_P(SandboxTest, ForksEndAsPids) {
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    auto r = python(*session,
                    "import os, time\nwhile True:\n if os.fork() == 0: "
                    "time.sleep(60)");
    EXPECT_EQ(r.ended, Ended::pids) << shown(r);
    EXPECT_EQ(sh(*session, "echo alive").out, "alive\n");
    // One that never gives up is stopped long before its time.
    r = python(*session,
               "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
               15'000);
    EXPECT_EQ(r.ended, Ended::pids) << shown(r);
    EXPECT_LT(r.wall_ms, 14'000);
    EXPECT_EQ(sh(*session, "echo alive").out, "alive\n");
  });
}

TEST_P(SandboxTest, AFullWorkspaceEndsAsDisk) {
  with([&] {
    Stand stand;
    for (const char* fill :
         {"dd if=/dev/zero of=/work/f bs=1M", "dd if=/dev/zero of=/tmp/f bs=1M",
          "dd if=/dev/zero of=/dev/shm/f bs=1M",
          "exec truncate -s 1T /work/sparse",
          "exec python3 -c 'import os\nfor i in range(99999): "
          "os.mkdir(str(i))'"}) {
      auto session = stand.open(small());
      const auto r = sh(*session, std::string(fill) + " 2>/dev/null");
      EXPECT_EQ(r.ended, Ended::disk) << fill << "\n" << shown(r);
      EXPECT_EQ(r.detail, std::string(fill).find("mkdir") != std::string::npos
                              ? kDetailInodes
                              : "")
          << fill;
      EXPECT_LE(r.disk_bytes, 16U << 20);
    }
  });
}

TEST_P(SandboxTest, AFloodEndsAsOutputAndKeepsBothEnds) {
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    auto r = sh(*session, "echo FIRST; yes flood");
    EXPECT_EQ(r.ended, Ended::output) << shown(r).substr(0, 300);
    EXPECT_TRUE(r.truncated);
    EXPECT_TRUE(r.out.starts_with("FIRST\n"));
    EXPECT_LT(r.out.size(), (64U << 10) + 100);
    r = sh(*session, "echo FIRST; yes more | head -c 500000; echo LAST");
    EXPECT_EQ(r.ended, Ended::exited);
    EXPECT_TRUE(r.truncated);
    EXPECT_TRUE(r.out.starts_with("FIRST\n"));
    EXPECT_TRUE(r.out.ends_with("LAST\n"));
    EXPECT_NE(r.out.find(" bytes are missing here "), std::string::npos);
  });
}

TEST_P(SandboxTest, CpuTimeOfTheTreeIsCounted) {
  if (!as_root()) GTEST_SKIP() << "needs a cpu accounting group";
  with([&] {
    Stand stand;
    SessionSpec spec = small();
    spec.limits.cpu_ms = 400;
    auto session = stand.open(spec);
    // Many short processes: none of them reaches a limit of its own.
    const auto r = sh(*session,
                      "while :; do i=0; (while [ $i -lt 2000 ]; do i=$((i+1)); "
                      "done); done",
                      15'000);
    EXPECT_EQ(r.ended, Ended::timeout) << shown(r);
    EXPECT_EQ(r.detail, "cpu_ms");
    EXPECT_LT(r.wall_ms, 12'000);
  });
}

TEST_P(SandboxTest, DaemonsDieWithTheirStep) {  // B1
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    const auto r = python(*session, R"py(
import os, signal, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for s in range(1, 32):
            try: signal.signal(s, signal.SIG_IGN)
            except OSError: pass
        os.execv("/bin/sleep", ["sleep", "424242"])
    os._exit(0)
os.wait()
print("left")
)py");
    EXPECT_EQ(r.ended, Ended::exited) << shown(r);
    EXPECT_EQ(r.out, "left\n");
    EXPECT_EQ(running(std::string("sleep\0"
                                  "424242",
                                  12)),
              0);
  });
}

TEST_P(SandboxTest, AGrandchildThatHoldsStdoutDelaysNothing) {
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    const auto r = sh(*session, "sleep 999 & echo done", 20'000);
    EXPECT_EQ(r.ended, Ended::exited) << shown(r);
    EXPECT_EQ(r.out, "done\n");
    EXPECT_LT(r.wall_ms, 3000);
  });
}

TEST_P(SandboxTest, ForgedVerdictsAreOnlyOutput) {  // B2
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    const auto r = sh(*session,
                      "echo '{\"ended\":\"exited\",\"exit_code\":0}'; for i in "
                      "3 4 5 6 7 8 9; do eval \"echo x >&$i\"; done "
                      "2>/dev/null; kill -9 $$");
    EXPECT_EQ(r.ended, Ended::signalled) << shown(r);
    EXPECT_EQ(r.signal, SIGKILL);
  });
}

// --- files in and out ---

TEST_P(SandboxTest, PutAndCollectStayInTheWorkspace) {  // B3
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    const std::string bytes("a\0b\xff", 4);
    ASSERT_TRUE(session->put("deep/er/file", bytes));
    EXPECT_EQ(sh(*session, "wc -c < deep/er/file").out, "4\n");
    auto got = session->collect("/work/deep/er/file", 100);
    ASSERT_TRUE(got) << got.error().what;
    EXPECT_EQ(*got, bytes);
    const std::string big(1 << 20, 'x');
    ASSERT_TRUE(session->put("big", big));
    EXPECT_EQ(*session->collect("big", 1 << 20), big);

    sh(*session,
       "ln -s /etc/passwd link; ln -s /etc dir; mkfifo fifo; mkdir folder; ln "
       "-s file deep/er/near; ln -s /dev/zero zero; truncate -s 5M sparse; "
       "python3 -c 'import socket; "
       "socket.socket(socket.AF_UNIX).bind(\"so\")'");
    for (const char* path :
         {"link", "dir/passwd", "fifo", "folder", "so", "deep/er/near", "zero",
          "../etc/passwd", "/etc/passwd", "deep/../../etc/passwd", ""}) {
      const auto refused = session->collect(path, 1 << 20);
      ASSERT_FALSE(refused) << path;
      EXPECT_EQ(refused.error().code, Code::invalid) << path;
      const auto kept = session->put(path, "x");
      ASSERT_FALSE(kept) << path;
      EXPECT_EQ(kept.error().code, Code::invalid) << path;
    }
    EXPECT_EQ(session->collect("none", 10).error().code, Code::not_found);
    EXPECT_EQ(session->collect("sparse", 1 << 20).error().code,
              Code::too_large);
    EXPECT_EQ(session->collect("big", 1000).error().code, Code::too_large);
    EXPECT_EQ(session->put("huge", std::string(20 << 20, 'x')).error().code,
              Code::full);
    // A full workspace does not hide what is in it.
    EXPECT_EQ(session->collect("none", 10).error().code, Code::not_found);
    EXPECT_EQ(session->collect("deep/er/file", 10)->size(), 4U);
  });
}

// --- repositories ---

TEST_P(SandboxTest, PrepareSeesItsRepositoryAndNothingElse) {
  with([&] {
    Stand stand;
    const std::string repo = stand.root + "/repos/one";
    fs::create_directories(repo);
    std::ofstream(repo + "/file") << "kept\n";
    fs::create_symlink("/etc", stand.root + "/repos/link");
    fs::create_directories(stand.root + "/elsewhere");
    const std::string name(64, 'a');
    SessionSpec spec = small();
    spec.role = Role::prepare;
    spec.repo = repo;
    spec.mirror = name;
    {
      auto session = stand.open(spec);
      ASSERT_TRUE(session);
      const auto r = sh(*session,
                        "cat /repo/file; echo x > /repo/no; mkdir "
                        "/mirror/objects; echo m > /mirror/objects/yes; "
                        "echo l > /mirror/lock; ls /");
      EXPECT_TRUE(r.out.starts_with("kept\n")) << shown(r);
      EXPECT_EQ(r.out.find("home"), std::string::npos);
    }
    EXPECT_FALSE(fs::exists(repo + "/no"));
    EXPECT_TRUE(fs::exists(stand.root + "/mirrors/" + name + "/objects/yes"));
    {
      SessionSpec job = small();
      job.mirror = name;
      auto session = stand.open(job);
      ASSERT_TRUE(session);
      const auto r = sh(*session,
                        "cat /mirror/objects/yes; echo n > /mirror/objects/no; "
                        "ls /mirror /repo");
      EXPECT_EQ(r.out, "m\n/mirror:\nobjects\n") << shown(r);
    }
    EXPECT_FALSE(fs::exists(stand.root + "/mirrors/" + name + "/objects/no"));
    for (const std::string& bad :
         {stand.root + "/repos/link", stand.root + "/elsewhere",
          stand.root + "/repos/one/../../elsewhere", stand.root + "/repos",
          std::string("/etc"), std::string()}) {
      spec.repo = bad;
      EXPECT_FALSE(stand.slot->open(spec)) << bad;
    }
    spec.repo = repo;
    for (const std::string& bad : {std::string("../x"), std::string(64, 'g')}) {
      spec.mirror = bad;
      EXPECT_FALSE(stand.slot->open(spec)) << bad;
    }
    if (as_root()) {
      ASSERT_EQ(chown(repo.c_str(), 4321, 4322), 0);
      spec.mirror = std::string(64, 'b');
      const auto r = sh(*stand.open(spec), "id -u; id -g; touch /mirror/mine");
      EXPECT_EQ(r.out, "4321\n4322\n") << shown(r);
      EXPECT_EQ(r.exit_code, 0);
    }
    // The slot is as good as before.
    EXPECT_EQ(sh(*stand.open(small()), "echo fine").out, "fine\n");
  });
}

// --- services ---

int upper(int in, int out) {
  char text[64];
  for (;;) {
    const ssize_t n = read(in, text, sizeof(text));
    if (n <= 0) return 5;
    if (text[0] == '!') abort();
    for (ssize_t i = 0; i < n; ++i) text[i] = static_cast<char>(text[i] - 32);
    if (write(out, text, static_cast<std::size_t>(n)) != n) return 6;
  }
}

TEST_P(SandboxTest, AServiceTalksAndItsEndIsKnown) {
  Step service;
  service.builtin = "upper";
  register_builtin(service.builtin, upper);
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    for (const char* last : {"", "!"}) {
      auto socket = session->start_service(service);
      ASSERT_TRUE(socket) << socket.error().what;
      char text[4] = {};
      ASSERT_EQ(write(*socket, "abc", 3), 3);
      ASSERT_EQ(read(*socket, text, 3), 3);
      EXPECT_STREQ(text, "ABC");
      EXPECT_EQ(sh(*session, "echo").ended, Ended::failed);
      if (*last) {
        ASSERT_EQ(write(*socket, last, 1), 1);
        EXPECT_EQ(read(*socket, text, 3), 0);
      }
      close(*socket);
      const auto r = session->wait_service(5000);
      if (*last) {
        EXPECT_EQ(r.ended, Ended::signalled) << shown(r);
        EXPECT_EQ(r.signal, SIGABRT);
      } else {
        EXPECT_EQ(r.ended, Ended::exited) << shown(r);
        EXPECT_EQ(r.exit_code, 5);
      }
    }
  });
  register_builtin(service.builtin, nullptr);
}

// --- slots, pool and spawner ---

TEST_P(SandboxTest, AWorkersDeathEmptiesItsSlotAndIsTold) {  // B4
  with([&] {
    Stand stand;
    const pid_t worker = fork();
    if (worker == 0) {
      auto session = stand.slot->open({});
      sh(**session, "sleep 525252", 60'000);
      _exit(0);
    }
    // The parent's copy of the channel must not keep the slot.
    stand.slot.reset();
    for (int i = 0; i < 200 && running("525252") == 0; ++i) usleep(20'000);
    ASSERT_GT(running("525252"), 0);
    EXPECT_FALSE(stand.spawner->open_slot(0)) << "still taken";
    EXPECT_TRUE(stand.spawner->take_empty().empty());
    kill(worker, SIGKILL);
    waitpid(worker, nullptr, 0);
    pollfd item{stand.spawner->events_fd(), POLLIN, 0};
    ASSERT_EQ(poll(&item, 1, 3000), 1);
    EXPECT_EQ(stand.spawner->take_empty(), std::vector<int>{0});
    EXPECT_EQ(running("525252"), 0);
    stand.slot = stand.attach(0);
    EXPECT_EQ(sh(*stand.open(), "echo again").out, "again\n");
  });
}

// Every mapping of a handler that runs without exec which it could write to and
// somebody outside could read.
int shared_memory(int, int out) {
  std::ifstream maps("/proc/self/maps");
  std::string found = "maps\n";
  for (std::string line; std::getline(maps, line);) {
    const std::size_t at = line.find(' ') + 1;
    if (line[at + 1] == 'w' && line[at + 3] == 's') found += line + "\n";
  }
  return write(out, found.data(), found.size()) < 0;
}

TEST_P(SandboxTest, F16_AHandlerSharesNoMemoryThatItCanWrite) {
  with([&] {
    register_builtin("shared_memory", shared_memory);
    Stand stand;
    auto session = stand.open(small());
    Step step;
    step.builtin = "shared_memory";
    const auto r = session->run(step, Watch{});
    EXPECT_EQ(r.out, "maps\n") << shown(r);
  });
}

std::vector<pid_t> children_of(pid_t pid) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/task/" +
                   std::to_string(pid) + "/children");
  return {std::istream_iterator<pid_t>(in), {}};
}

// Until as many slots were told as are wanted; the slots.
std::vector<int> told(Spawner& spawner, std::size_t wanted) {
  std::vector<int> slots;
  for (int i = 0; i < 500 && slots.size() < wanted; ++i) {
    pollfd item{spawner.events_fd(), POLLIN, 0};
    poll(&item, 1, 20);
    for (const int slot : spawner.take_empty()) slots.push_back(slot);
  }
  std::sort(slots.begin(), slots.end());
  return slots;
}

TEST_P(SandboxTest, F16_AKilledKeepersSandboxIsKilledByTheSpawner) {
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    const auto keepers = children_of(stand.spawner->pid());
    ASSERT_EQ(keepers.size(), 1u);
    std::thread killer([&] {
      for (int i = 0; i < 500 && running("535353") == 0; ++i) usleep(20'000);
      kill(keepers[0], SIGKILL);
    });
    const auto r = session->run(command({"/bin/sleep", "535353"}), Watch{});
    killer.join();
    EXPECT_EQ(r.ended, Ended::failed) << shown(r);
    EXPECT_EQ(told(*stand.spawner, 1), std::vector<int>{0});
    EXPECT_EQ(running("535353"), 0);
    EXPECT_TRUE(children_of(stand.spawner->pid()).empty());
    session.reset();
    stand.slot = stand.attach(0);
    EXPECT_EQ(sh(*stand.open(small()), "echo again").out, "again\n");
  });
}

TEST_P(SandboxTest, F16_SlotsThatEndTogetherAreAllEmptied) {
  with([&] {
    Stand stand;
    constexpr int kSlots = 6;
    for (int round = 0; round < 3; ++round) {
      std::vector<std::unique_ptr<Slot>> slots;
      for (int n = 1; n <= kSlots; ++n) {
        slots.push_back(stand.attach(n));
        ASSERT_TRUE(slots.back());
        auto session = slots.back()->open(small());
        ASSERT_TRUE(session) << session.error().what;
        ASSERT_EQ(sh(**session, "echo in").out, "in\n");
      }
      // With their sandboxes, in one moment.
      for (const pid_t keeper : children_of(stand.spawner->pid())) {
        kill(keeper, SIGKILL);
      }
      slots.clear();
      const auto empty = told(*stand.spawner, kSlots + 1);
      ASSERT_EQ(empty, (std::vector<int>{0, 1, 2, 3, 4, 5, 6}));
      stand.slot = stand.attach(0);
    }
  });
}

// --- hosts that refuse close_range() ---

bool refuse_close_range(int error) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_close_range, 0, 1),
      BPF_STMT(BPF_RET | BPF_K,
               SECCOMP_RET_ERRNO | static_cast<unsigned>(error)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  const sock_fprog filter{std::size(program), program};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         syscall(SYS_seccomp, 1, 0, &filter) == 0;
}

// In a child: a filter stays.
void in_child(const std::function<void()>& body) {
  const pid_t pid = fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    body();
    fflush(stdout);
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST_P(SandboxTest, F18_WithoutCloseRangeTheSpawnerStillLeaves) {
  with([&] {
    for (const int error : {EPERM, ENOSYS}) {
      in_child([&] {
        ASSERT_TRUE(refuse_close_range(error));
        for (int i = 0; i < 40; ++i) (void)open("/dev/null", O_RDONLY);
        {
          Stand stand;
          const pid_t spawner = stand.spawner->pid();
          auto session = stand.open(small());
          ASSERT_TRUE(session);
          const auto r = python(*session,
                                "import os\nfor i in range(3, 4096):\n try: "
                                "os.fstat(i); print(i)\n except OSError: pass");
          EXPECT_EQ(r.out, "") << shown(r);
          EXPECT_EQ(r.ended, Ended::exited) << shown(r);
          session.reset();
          stand.slot.reset();
          // An orderly end: by the end-of-file of the pool's socket.
          const int pidfd =
              static_cast<int>(syscall(SYS_pidfd_open, spawner, 0));
          std::thread ending([&] { stand.spawner.reset(); });
          pollfd item{pidfd, POLLIN, 0};
          EXPECT_EQ(poll(&item, 1, 4000), 1) << "it had to be killed";
          ending.join();
          close(pidfd);
        }
      });
    }
  });
}

TEST(SandboxHostTest, F18_WhatCannotBeClosedStartsNothing) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root";
  in_child([&] {
    ASSERT_EQ(unshare(CLONE_NEWNS), 0);
    ASSERT_EQ(mount("", "/", nullptr, MS_REC | MS_PRIVATE, nullptr), 0);
    ASSERT_EQ(mount("none", "/proc", "tmpfs", 0, nullptr), 0);
    ASSERT_TRUE(refuse_close_range(EPERM));
    const auto spawner = Spawner::start({});
    ASSERT_FALSE(spawner);
    EXPECT_NE(spawner.error().what.find("close_range"), std::string::npos)
        << spawner.error().what;
  });
}

// --- jobs of our own uid ---

// The kernel counts descriptors in flight over all processes of a user.
TEST_P(SandboxTest, F13_DescriptorsInFlightStopNobodyElse) {
  with([&] {
    Stand stand;
    auto session = stand.open(small());
    auto other = stand.attach(1);
    std::atomic<bool> done = false;
    std::string printed;
    std::thread attacker([&] {
      Watch watch;
      watch.cancel = &done;
      watch.on_output = [&](int, std::span<const std::byte> bytes) {
        printed.append(reinterpret_cast<const char*>(bytes.data()),
                       bytes.size());
      };
      const std::string code = R"py(
import array, os, resource, socket, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
fd = os.open("/dev/null", 0); keep = []; n = 0
try:
  while n < 50000:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.setblocking(False); keep += [a, b]
    try:
      for i in range(60): a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd] * 250))]); n += 250
    except BlockingIOError: pass
except OSError as e: pass
print("in flight", n, flush=True)
time.sleep(60)
)py";
      session->run(command({"/usr/bin/python3", "-c", code}, 60'000), watch);
    });
    for (int round = 0; round < 5; ++round) {
      auto mine = other->open(small());
      EXPECT_TRUE(mine) << mine.error().what;
      if (mine) {
        for (int i = 0; i < 3; ++i) {
          const auto r = sh(**mine, "echo fine; sleep 0.1");
          EXPECT_EQ(r.out, "fine\n") << shown(r);
        }
      }
    }
    auto third = stand.attach(2);
    EXPECT_TRUE(third);
    done = true;
    attacker.join();
    EXPECT_NE(printed.find("in flight"), std::string::npos) << printed;
  });
}

// As a user with a name and subordinate ids, told by files of this test's own.
void with_subids(const std::function<void()>& body) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root";
  if (access("/usr/bin/newuidmap", X_OK) != 0) GTEST_SKIP() << "needs uidmap";
  in_child([&] {
    ASSERT_EQ(unshare(CLONE_NEWNS), 0);
    ASSERT_EQ(mount("", "/", nullptr, MS_REC | MS_PRIVATE, nullptr), 0);
    ASSERT_EQ(mount("none", "/mnt", "tmpfs", 0, "mode=755"), 0);
    const std::string uid = std::to_string(kUserUid);
    std::ofstream("/mnt/passwd")
        << "root:x:0:0::/:/bin/sh\nmachinatest:x:" + uid + ":" + uid +
               "::/:/bin/sh\n";
    std::ofstream("/mnt/ids") << "other:1:5\nmachinatest:410000:64\n";
    for (const auto& [from, to] : {std::pair{"/mnt/passwd", "/etc/passwd"},
                                   std::pair{"/mnt/ids", "/etc/subuid"},
                                   std::pair{"/mnt/ids", "/etc/subgid"}}) {
      ASSERT_EQ(mount(from, to, nullptr, MS_BIND, nullptr), 0) << to;
    }
    as_user(body);
  });
}

uid_t uid_of(const std::string& marker) {
  for (const auto& entry : fs::directory_iterator("/proc")) {
    std::ifstream line(entry.path() / "cmdline");
    const std::string words((std::istreambuf_iterator<char>(line)), {});
    if (words.find("sleep") != 0 && words.find("/bin/sleep") != 0) continue;
    if (words.find(marker) == std::string::npos) continue;
    std::ifstream status(entry.path() / "status");
    for (std::string word; status >> word;) {
      if (word == "Uid:" && status >> word) {
        return static_cast<uid_t>(std::stoul(word));
      }
    }
  }
  return 0;
}

TEST(SandboxSubIds, F13_AJobHasAnotherUidThanThePool) {
  with_subids([] {
    Stand stand;
    auto other = stand.attach(5);
    const auto report = run_canary(*stand.slot);
    ASSERT_TRUE(report) << report.error().what;
    EXPECT_GE(report->level, 2);
    for (const auto& m : report->mechanisms) {
      if (m.name == "uid") {
        EXPECT_EQ(m.state, MechanismState::active) << m.error;
      }
    }
    for (const auto& [name, held] : report->attacks) EXPECT_TRUE(held) << name;
    auto session = stand.open(small());
    ASSERT_TRUE(session);
    ASSERT_TRUE(session->put("a", "text"));
    const auto who = sh(*session, "id -u; id -G; cat a; echo b >b; ls -n b");
    EXPECT_EQ(who.out.find("1000\n1000\ntext-rw-r--r-- 1 1000 1000"), 0u)
        << shown(who);
    EXPECT_EQ(*session->collect("b", 100), "b\n");
    std::atomic<bool> done = false;
    Watch watch;
    watch.cancel = &done;
    std::thread sleeper([&] {
      session->run(command({"/bin/sleep", "545454"}, 60'000), watch);
    });
    uid_t seen = 0;
    for (int i = 0; i < 500 && seen == 0; ++i) {
      usleep(20'000);
      seen = uid_of("545454");
    }
    EXPECT_EQ(seen, 410000u);
    done = true;
    sleeper.join();
    EXPECT_TRUE(gone("545454", 3000));
    // Each slot its own.
    auto second = other->open(small());
    ASSERT_TRUE(second) << second.error().what;
    done = false;
    std::thread again([&] {
      (*second)->run(command({"/bin/sleep", "555555"}, 60'000), watch);
    });
    seen = 0;
    for (int i = 0; i < 500 && seen == 0; ++i) {
      usleep(20'000);
      seen = uid_of("555555");
    }
    EXPECT_EQ(seen, 410005u);
    done = true;
    again.join();
    second = Error{Code::io, ""};
    session.reset();
    // The owner of a repository is who the pool is.
    fs::create_directories(stand.root + "/repos/one");
    chmod((stand.root + "/repos/one").c_str(), 0700);
    std::ofstream(stand.root + "/repos/one/f") << "private";
    SessionSpec spec = small();
    spec.role = Role::prepare;
    spec.repo = stand.root + "/repos/one";
    spec.mirror = std::string(64, 'a');
    auto prepare = stand.open(spec);
    ASSERT_TRUE(prepare);
    const auto r = sh(*prepare, "cat /repo/f; echo made >/mirror/x");
    EXPECT_EQ(r.out, "private") << shown(r);
    EXPECT_TRUE(fs::exists(stand.root + "/mirrors/" + spec.mirror + "/x"));
  });
}

// Memory is watched, and everything killed, over that border, too.
TEST(SandboxSubIds, F13_LimitsHoldForAnotherUid) {
  with_subids([] {
    Stand stand;
    auto session = stand.open(small());
    ASSERT_TRUE(session);
    const auto r = python(
        *session, "b = bytearray(200 << 20)\nimport time\ntime.sleep(5)");
    EXPECT_EQ(r.ended, Ended::oom) << shown(r);
    const auto daemon = sh(*session, "setsid sleep 565656 & echo left");
    EXPECT_EQ(daemon.out, "left\n") << shown(daemon);
    EXPECT_TRUE(gone("565656", 3000));
  });
}

// A slot's part of the host's process numbers, whatever its job asks for.
TEST_P(SandboxTest, F18_AllSlotsTogetherLeaveTheHostProcessNumbers) {
  with([&] {
    const PidsBound bound = pids_bound();
    ASSERT_GT(bound.most, 0u);
    EXPECT_NE(bound.what, "");
    const std::uint64_t part = bound.most / 64;
    if (part > 2000) GTEST_SKIP() << "too many to start: " << bound.what;
    SpawnerOptions options;
    options.slots = 64;
    Stand stand(options);
    SessionSpec spec = small();
    spec.limits.memory_mb = 512;
    spec.limits.pids = 1 << 20;
    const char* const kCode = R"py(
import threading, time
threading.stack_size(65536)
n = 0
try:
  for i in range(2100): threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); n += 1
except RuntimeError: pass
print(n, flush=True)
time.sleep(0.3)  # for whoever only looks now and then
import os; os._exit(3)
)py";
    auto session = stand.open(spec);
    ASSERT_TRUE(session);
    const auto r = python(*session, kCode, 60'000);
    EXPECT_LE(std::stoul("0" + r.out), part) << shown(r);
    EXPECT_GT(std::stoul("0" + r.out), part / 2) << shown(r);
    EXPECT_EQ(r.ended, Ended::pids) << shown(r);
    EXPECT_NE(r.detail.find("it was given"), std::string::npos) << r.detail;
    session.reset();
    // Fewer slots, larger parts: for sessions from now on.
    ASSERT_TRUE(stand.spawner->set_slots(16));
    session = stand.open(spec);
    ASSERT_TRUE(session);
    const auto more = python(*session, kCode, 60'000);
    EXPECT_GT(std::stoul("0" + more.out), part) << shown(more);
  });
}

// A spawner that answers when the pool has given a request up: what comes late
// is no later request's answer.
TEST(SpawnerHandleTest, F05_ALateAnswerIsNobodysAnyMore) {
  int control[2], events[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, control), 0);
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, events), 0);
  const pid_t pid = fork();
  if (pid == 0) _exit(0);
  const auto spawner = spawner_at(pid, control[0], events[0], 0);
  OpenSlot request;
  EXPECT_FALSE(spawner->connect_server());
  ASSERT_TRUE(recv_struct(control[1], request));
  const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
  send_struct(control[1], Status{0, request.number}, std::span(&null, 1));
  close(null);
  send_struct(control[1], Status{EBUSY, request.number + 1});
  const auto busy = spawner->open_slot(3);
  ASSERT_FALSE(busy) << "the connection's answer";
  EXPECT_EQ(busy.error().code, Code::conflict) << busy.error().what;
  send_struct(control[1], Status{EBUSY, request.number + 1});
  send_struct(control[1], Status{0, request.number + 2});
  EXPECT_TRUE(spawner->set_slots(4));
  EXPECT_FALSE(spawner->connect_server()) << "nobody has answered this";
  close(control[1]);
  close(events[1]);
}

TEST_P(SandboxTest, TheSpawnersDeathKillsEverything) {
  with([&] {
    Stand stand;
    auto session = stand.open();
    Step step = command({"/bin/sleep", "626262"}, 60'000);
    Watch watch;
    std::thread killer([&] {
      for (int i = 0; i < 200 && running("626262") == 0; ++i) usleep(20'000);
      kill(stand.spawner->pid(), SIGKILL);
    });
    const auto r = session->run(step, watch);
    killer.join();
    EXPECT_EQ(r.ended, Ended::failed) << shown(r);
    EXPECT_LT(r.wall_ms, 10'000);
    EXPECT_TRUE(gone("626262", 3000));
    EXPECT_FALSE(stand.slot->open({}));
  });
}

TEST_P(SandboxTest, SlotsDoNotSeeEachOther) {
  with([&] {
    Stand stand;
    auto other = stand.attach(1);
    auto a = stand.open(small());
    auto b = other->open(small());
    ASSERT_TRUE(b);
    std::thread server([&] {
      python(*a,
             "import socket, time\ns = socket.create_server((\"127.0.0.1\", "
             "7777))\nopen(\"/tmp/mine\", \"w\")\ntime.sleep(1)",
             5000);
    });
    usleep(400'000);
    const auto r = python(**b, R"py(
import socket, os
try: socket.create_connection(("127.0.0.1", 7777)); print("reached")
except OSError: print("alone")
print(os.path.exists("/tmp/mine"), len([p for p in os.listdir("/proc") if p.isdigit()]))
)py");
    server.join();
    EXPECT_EQ(r.out, "alone\nFalse 1\n") << shown(r);
  });
}

TEST_P(SandboxTest, TheSpawnerConnectsForThoseWithoutTheRight) {
  with([&] {
    Stand stand;
    EXPECT_FALSE(stand.slot->connect_server());
    const int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, (stand.root + "/machina.sock").c_str());
    ASSERT_EQ(
        bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(address)),
        0);
    ASSERT_EQ(listen(listener, 4), 0);
    for (auto fd :
         {stand.slot->connect_server(), stand.spawner->connect_server()}) {
      ASSERT_TRUE(fd) << fd.error().what;
      const int end = accept(listener, nullptr, nullptr);
      ASSERT_EQ(write(*fd, "hi", 2), 2);
      char text[2];
      EXPECT_EQ(read(end, text, 2), 2);
      close(*fd);
      close(end);
    }
    close(listener);
  });
}

TEST_P(SandboxTest, WeakerThanRequiredRunsNothing) {  // B6
  with([&] {
    Stand stand;
    SessionSpec spec = small();
    spec.min_level = 4;
    auto session = stand.open(spec);
    ASSERT_TRUE(session);
    const auto r = sh(*session, "echo ran");
    EXPECT_EQ(r.ended, Ended::isolation) << shown(r);
    EXPECT_EQ(r.out, "");
    EXPECT_FALSE(session->put("x", "y"));
  });
}

TEST(HeadAndTailTest, KeepsBothEndsOfAnyLength) {
  for (std::size_t total : {0U, 5U, 10U, 11U, 25U, 1000U}) {
    std::string all;
    for (std::size_t i = 0; i < total; ++i) all += char('a' + i % 26);
    HeadAndTail kept(10);
    for (std::size_t i = 0; i < total; i += 7) {
      const auto piece = std::string_view(all).substr(i, 7);
      kept.add(std::as_bytes(std::span(piece)));
    }
    EXPECT_EQ(kept.total(), total);
    EXPECT_EQ(kept.truncated(), total > 10);
    if (total <= 10) {
      EXPECT_EQ(kept.text(), all);
    } else {
      EXPECT_TRUE(kept.text().starts_with(all.substr(0, 5)));
      EXPECT_TRUE(kept.text().ends_with(all.substr(total - 5)));
      EXPECT_NE(kept.text().find(std::to_string(total - 10)),
                std::string::npos);
    }
  }
}

TEST(HeadAndTailTest, F30_KeepsNoPartOfACharacter) {
  for (const std::string unit : {"\u00e9", "\u65e5", "\U0001F600"}) {
    for (std::size_t pad = 0; pad < 4; ++pad) {
      std::string all(pad, 'x');
      for (int i = 0; i < 50; ++i) all += unit;
      HeadAndTail kept(41);
      for (std::size_t i = 0; i < all.size(); i += 7) {
        const auto piece = std::string_view(all).substr(i, 7);
        kept.add(std::as_bytes(std::span(piece)));
      }
      EXPECT_TRUE(valid_utf8(kept.text())) << kept.text();
      const std::size_t shown = kept.text().find("\n[... ");
      const std::size_t rest =
          kept.text().size() - kept.text().rfind("]\n") - 2;
      EXPECT_NE(
          kept.text().find(
              "\n[... " + std::to_string(all.size() - shown - rest) + " bytes"),
          std::string::npos)
          << kept.text();
    }
  }
}

}  // namespace
}  // namespace machina::sandbox
