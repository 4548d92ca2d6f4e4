// What a step used, and what it may use, against measures taken from outside:
// memory, processor time, the buffers of sockets, and files that it shares with
// others. As root (L3) and as an ordinary user (L2).

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "tests/workers/sandbox/sandbox_fixture.h"

namespace machina::sandbox {

class UsageTest : public AnyIdentity {};
INSTANTIATE_TEST_SUITE_P(Usage, UsageTest,
                         testing::Values(Identity::root, Identity::user),
                         identity_name);

namespace {

constexpr std::uint64_t kMiB = 1 << 20;

SessionSpec roomy() {
  SessionSpec spec;
  spec.limits.memory_mb = 600;
  spec.limits.disk_mb = 256;
  spec.limits.pids = 64;
  return spec;
}

// Without control groups, whoever runs the test.
SpawnerOptions no_groups() {
  SpawnerOptions options;
  options.force_off = {"cgroup_memory", "cgroup_pids"};
  return options;
}

void expect_near(std::uint64_t got, std::uint64_t wanted, double share,
                 std::uint64_t slack, const StepResult& r) {
  EXPECT_GE(got + static_cast<std::uint64_t>(share * wanted) + slack, wanted)
      << shown(r);
  EXPECT_LE(got, wanted + static_cast<std::uint64_t>(share * wanted) + slack)
      << shown(r);
}

}  // namespace

// --- C14: what no group charges by itself ---

// The kernel's own memory as the job found it and as it left it: the sockets
// are still there when it looks.
constexpr char kFill[] = R"py(
import socket, struct, sys, time
def kernel():
    return sum(int(l.split()[1]) for l in open('/proc/meminfo')
               if l.startswith(('SUnreclaim:',))) // 1024
kept, before = [], kernel()
def big(s):
    for o in (socket.SO_RCVBUF, socket.SO_SNDBUF): s.setsockopt(1, o, 1 << 30)
    s.setblocking(False); kept.append(s); return s
def pump(act, n):
    try:
        for _ in range(n): act()
    except OSError: pass
kind = sys.argv[1]
for i in range(300):
    if kind.startswith('udp'):
        six = kind == 'udp6'
        s = big(socket.socket(socket.AF_INET6 if six else socket.AF_INET,
                              socket.SOCK_DGRAM))
        s.bind(('::1' if six else '127.0.0.1', 0)); to = s.getsockname()
        pump(lambda: s.sendto(b'x' * 3896, to), 100)
    elif kind == 'tcp':
        l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(); kept.append(l)
        c = big(socket.create_connection(l.getsockname()))
        kept.append(l.accept()[0])
        pump(lambda: c.send(b'x' * 65536), 100)
    else:
        s = big(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
        s.bind((0, 0))
        ask = struct.pack('IHHIIBxHiII', 32, 18, 1, 1, 0, 0, 0, 1, 0, 0)
        pump(lambda: s.send(ask), 1000)
    if kernel() - before > 400: break
time.sleep(.3)
print('grew', kernel() - before)
)py";

TEST_P(UsageTest, F14_SocketBuffersAreBounded) {
  with([&] {
    for (const char* kind : {"udp", "udp6", "tcp", "netlink"}) {
      Stand stand;
      SessionSpec spec = roomy();
      spec.limits.memory_mb = 64;
      spec.limits.disk_mb = 16;
      auto session = stand.open(spec);
      const auto r = session->run(
          command({"/usr/bin/python3", "-c", kFill, kind}), Watch{});
      if (r.ended == Ended::oom) continue;
      ASSERT_EQ(r.ended, Ended::exited) << kind << shown(r);
      ASSERT_TRUE(r.out.starts_with("grew ")) << kind << shown(r);
      // Others on this host take and give memory too.
      EXPECT_LT(std::stol(r.out.substr(5)), 64 + 16 + 100) << kind << shown(r);
    }
  });
}

// Each of them is stopped by what is in force here, and is seen to be.
TEST_P(UsageTest, F14_WithoutGroupsSocketsCountAsMemory) {
  with([&] {
    Stand stand(no_groups());
    for (const char* kind : {"udp", "netlink"}) {
      SessionSpec spec = roomy();
      spec.limits.memory_mb = 64;
      auto session = stand.open(spec);
      const auto r = session->run(
          command({"/usr/bin/python3", "-c", kFill, kind}), Watch{});
      EXPECT_EQ(r.ended, Ended::oom) << kind << shown(r);
      EXPECT_EQ(sh(*session, "echo alive").out, "alive\n");
    }
  });
}

// --- C15: files that a job and others share ---

TEST_P(UsageTest, F15_AJobSeesObjectsAndNoLockOfItsMirror) {
  with([&] {
    Stand stand;
    const std::string name(64, 'a');
    const std::string mirror = stand.root + "/mirrors/" + name;
    std::filesystem::create_directories(mirror + "/objects/pack");
    std::ofstream(mirror + "/objects/pack/one") << "object";
    std::ofstream(mirror + "/machina.lock") << "";
    std::ofstream(mirror + "/HEAD") << "ref: refs/heads/main\n";
    SessionSpec spec = roomy();
    spec.mirror = name;
    {
      auto session = stand.open(spec);
      EXPECT_EQ(sh(*session, "cat /mirror/objects/pack/one").out, "object");
      EXPECT_EQ(sh(*session, "ls -A /mirror").out, "objects\n");
    }
    std::ofstream(mirror + "/shallow") << "0123\n";
    auto session = stand.open(spec);
    EXPECT_EQ(sh(*session, "ls -A /mirror; cat /mirror/shallow").out,
              "objects\nshallow\n0123\n");
    EXPECT_NE(sh(*session, "echo x > /mirror/shallow").exit_code, 0);
  });
}

TEST_P(UsageTest, F15_LeasesAndNoticesAreRefused) {
  with([&] {
    Stand stand;
    auto session = stand.open(roomy());
    const auto r = python(*session, R"py(
import fcntl, os
open('/work/own', 'w')
for path in ('/work/own', '/usr/bin/env'):
    fd = os.open(path, os.O_RDONLY)
    for order, value in ((1024, fcntl.F_RDLCK), (1026, 1), (1040, 0)):
        try: print('got', path, order, fcntl.fcntl(fd, order, value))
        except PermissionError: pass
d = os.open('/work', os.O_RDONLY)
try: print('got', fcntl.fcntl(d, 1026, 1))
except PermissionError: pass
fcntl.fcntl(os.open('/work/own', os.O_RDWR), fcntl.F_SETFD, 1)
print('done')
)py");
    EXPECT_EQ(r.out, "done\n") << shown(r);
  });
}

// As root a sandbox has inodes of its own for all that is the host's.
TEST_P(UsageTest, F15_LocksAndWatchesOnTheHostsFilesReachNobody) {
  if (!as_root()) GTEST_SKIP() << "declared in docs/isolation.md";
  with([&] {
    Stand stand;
    auto session = stand.open(roomy());
    std::atomic<bool> done{false}, held{false};
    std::string out;
    std::thread host([&] {
      // While the job runs: the host's own use of the same files.
      while (!done) {
        for (const char* path :
             {"/usr/bin/env", "/etc/ld.so.cache", "/dev/null"}) {
          const int fd = open(path, O_RDONLY | O_CLOEXEC);
          if (fd < 0) continue;
          if (flock(fd, LOCK_EX | LOCK_NB) < 0) held = true;
          close(fd);
        }
        usleep(1000);
      }
    });
    const auto r = python(*session, R"py(
import ctypes, fcntl, os, time
for path in ('/usr/bin/env', '/etc/ld.so.cache', '/dev/null'):
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX); globals()[path] = fd
c = ctypes.CDLL(None)
n = c.inotify_init1(os.O_NONBLOCK)
for path in (b'/usr/bin', b'/etc', b'/dev/null', b'/usr/bin/env'):
    assert c.inotify_add_watch(n, path, 0x20) >= 0
os.close(os.open('/usr/bin/env', os.O_RDONLY)); own = len(os.read(n, 65536))
time.sleep(.5)
try: print('saw', len(os.read(n, 65536)))
except BlockingIOError: print('nothing', own > 0)
)py");
    done = true;
    host.join();
    EXPECT_EQ(r.out, "nothing True\n") << shown(r);
    EXPECT_FALSE(held);
    struct stat st {};
    ASSERT_EQ(stat("/usr/bin/env", &st), 0);
    EXPECT_NE(sh(*session, "stat -Lc %d /usr/bin/env").out,
              std::to_string(st.st_dev) + "\n");
  });
}

// --- C17: what is claimed of a step ---

// All hold theirs at one time, and for long enough to be seen.
constexpr char kFourOfSixty[] = R"py(
import os, time
ready, there = os.pipe(); leave, hold = os.pipe()
for i in range(4):
    if os.fork() == 0:
        os.close(hold)
        b = bytearray(60 << 20); b[::4096] = b'1' * len(b[::4096])
        os.write(there, b'x'); os.read(leave, 1); os._exit(0)
for i in range(4): os.read(ready, 1)
time.sleep(.4); os.close(hold)
for i in range(4): os.wait()
)py";
constexpr char kMemfd[] = R"py(
import os
fd = os.memfd_create('x')
for i in range(200): os.write(fd, bytes(1 << 20))
)py";
constexpr char kFiles[] = R"py(
import os, time
with open('/tmp/f', 'wb') as f:
    for i in range(200): f.write(bytes(1 << 20))
time.sleep(.3); os.unlink('/tmp/f')
)py";

TEST_P(UsageTest, F17_PeakMemoryIsTheTreesAtOneTime) {
  with([&] {
    Stand stand;
    auto session = stand.open(roomy());
    auto r = python(*session, kFourOfSixty);
    ASSERT_EQ(r.ended, Ended::exited) << shown(r);
    expect_near(r.max_rss_bytes, 240 * kMiB, 0.05, 12 * kMiB, r);
    r = python(*session, kFiles);
    expect_near(r.max_rss_bytes, 200 * kMiB, 0.05, 12 * kMiB, r);
    // One after the other is not at one time; and each step begins anew.
    r = python(*session,
               "for i in range(4):\n b = bytearray(b'1') * (60 << 20)\n del b");
    expect_near(r.max_rss_bytes, 60 * kMiB, 0.05, 20 * kMiB, r);
    if (!as_root()) return;  // memory that no process maps: declared
    r = python(*session, kMemfd);
    expect_near(r.max_rss_bytes, 200 * kMiB, 0.05, 12 * kMiB, r);
  });
}

TEST_P(UsageTest, F17_PeakMemoryWithoutAGroup) {
  with([&] {
    Stand stand(no_groups());
    auto session = stand.open(roomy());
    auto r = python(*session, kFourOfSixty);
    expect_near(r.max_rss_bytes, 240 * kMiB, 0.05, 12 * kMiB, r);
    // What forks share is one memory.
    r = python(*session, R"py(
import os, time
b = bytearray(b'1') * (100 << 20)
for i in range(6):
    if os.fork() == 0:
        time.sleep(.5); os._exit(0)
for i in range(6): os.wait()
)py");
    expect_near(r.max_rss_bytes, 100 * kMiB, 0.05, 20 * kMiB, r);
  });
}

// About 1.2 s of processor time in children of 0.2 s, each ended while its
// parent ignores SIGCHLD, waits, or leaves it to init.
std::string burn(const char* how, const char* seconds = "1.2") {
  return std::string(R"py(
import os, signal, sys, time
how, total = ')py") +
         how + "', " + seconds + R"py(
if how == 'ignored': signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def child():
    if how == 'left' and os.fork(): os._exit(0)
    while time.process_time() < .2: pass
    os._exit(0)
r, w = os.pipe()
n = round(total / .2)
for i in range(n):
    if os.fork() == 0: child()
    if how == 'waited': os.wait()
    elif how == 'ignored':
        try: os.wait()
        except ChildProcessError: pass
    else: os.wait()
os.close(w); os.read(r, 1)
print(time.process_time())
)py";
}

TEST_P(UsageTest, F17_CpuTimeIsTheTrees) {
  with([&] {
    for (const bool groups : {true, false}) {
      SpawnerOptions options;
      // cpu accounting is a group of its own: taken away with all of them.
      if (!groups)
        options.force_off = {"cgroup_memory", "cgroup_pids", "cgroup_cpu"};
      Stand stand(options);
      auto session = stand.open(roomy());
      for (const char* how : {"waited", "ignored", "left"}) {
        const auto r = python(*session, burn(how));
        ASSERT_EQ(r.ended, Ended::exited) << how << shown(r);
        const auto own =
            static_cast<std::uint64_t>(1000 * std::atof(r.out.c_str()));
        // Hidden children are estimated where no group counts.
        const bool guessed = std::string(how) == "ignored" && !groups;
        expect_near(static_cast<std::uint64_t>(r.cpu_ms), 1200 + own, 0.05,
                    guessed ? 150 : 40, r);
      }
    }
  });
}

TEST_P(UsageTest, F17_CpuLimitIsTheTrees) {
  with([&] {
    SpawnerOptions options;
    options.force_off = {"cgroup_memory", "cgroup_pids", "cgroup_cpu"};
    Stand stand(options);
    SessionSpec spec = roomy();
    spec.limits.cpu_ms = 600;
    auto session = stand.open(spec);
    for (const char* how : {"waited", "ignored", "left"}) {
      const auto r = python(*session, burn(how, "20"), 60'000);
      EXPECT_EQ(r.ended, Ended::timeout) << how << shown(r);
      EXPECT_EQ(r.detail, kDetailCpu) << how;
      EXPECT_LT(r.cpu_ms, 1000) << how;
    }
  });
}

TEST_P(UsageTest, F17_SigxcpuOfItsOwnIsASignal) {
  with([&] {
    Stand stand;
    SessionSpec spec = roomy();
    for (const std::uint64_t limit : {0, 5000}) {
      spec.limits.cpu_ms = limit;
      auto session = stand.open(spec);
      const auto r = sh(*session, "kill -XCPU $$");
      EXPECT_EQ(r.ended, Ended::signalled) << shown(r);
      EXPECT_EQ(r.signal, SIGXCPU);
    }
    // The kernel's own, by the limit: of the counter.
    spec.limits.cpu_ms = 100;
    auto session = stand.open(spec);
    const auto r = sh(*session, "while :; do :; done");
    EXPECT_EQ(r.ended, Ended::timeout) << shown(r);
    EXPECT_EQ(r.detail, kDetailCpu);
  });
}

}  // namespace machina::sandbox
