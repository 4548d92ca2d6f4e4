// Hostile test suites, one act each: contained, reported under a code of their
// own, the machine and the other jobs unharmed, nothing left behind (that part
// is TearDown's, for every test).

#include <fstream>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

constexpr char kSecret[] = "planted-secret-5f2c81";

class Hostile : public EndToEnd {
 protected:
  void SetUp() override {
    EndToEnd::SetUp();
    if (!product_) return;
    Serve serve;
    serve.profile = "prod";
    serve.token = "e2e-token-of-the-operator";
    serve.env["E2E_SECRET"] = kSecret;
    if (!as_root()) serve.env["MACHINA_SANDBOX_MIN_LEVEL"] = "L2";
    start(serve);
  }

  // One suite of one file, one attempt.
  Json run(const std::string& python, const Json& more = Json::object()) {
    Json request = {{"kind", "test.run"},
                    {"max_attempts", 1},
                    {"timeout_ms", 60000},
                    {"payload",
                     {{"runner", "pytest"},
                      {"args", {"-s", "-p", "no:cacheprovider"}},
                      {"files", {{"test_hostile.py", python}}}}}};
    request.update(more);
    id_ = p().submit(request);
    return p().wait_end(id_, 90000);
  }

  std::string output() { return p().get("/v1/jobs/" + id_ + "/logs").body; }

  // How the job ended: its code, or its state where it has none.
  static std::string code(const Json& job) {
    if (job.contains("error") && job["error"].is_object()) {
      return job["error"].value("code", "");
    }
    return job.value("state", "");
  }

  void expect_others_unharmed() {
    Json noop = p().wait_end(p().submit({{"kind", "noop"}}), 20000);
    EXPECT_EQ(noop["state"], "succeeded") << noop.dump(1);
    Json shell = p().wait_end(
        p().submit({{"kind", "tool.shell"},
                    {"payload", {{"argv", {"/bin/echo", "alive"}}}}}),
        20000);
    EXPECT_EQ(shell["state"], "succeeded") << shell.dump(1);
  }

  std::string id_;
};

TEST_P(Hostile, ReadsNeitherShadowNorAnyonesEnvironment) {
  Json job = run(R"(
import os

def read(path):
    try:
        with open(path, 'rb') as f:
            return f.read()
    except OSError:
        return b''

def test_shadow():
    for path in ('/etc/shadow', '/etc/gshadow', '/proc/1/root/etc/shadow',
                 '/proc/self/root/etc/shadow', '../../../../etc/shadow'):
        assert read(path) == b'', path

def test_environments():
    seen = 0
    for pid in os.listdir('/proc'):
        if pid.isdigit():
            seen += 1
            env = read('/proc/%s/environ' % pid)
            assert b'planted' not in env and b'MACHINA_API_TOKEN' not in env
            assert b'e2e-token' not in env and b'e2e-token' not in read('/proc/%s/cmdline' % pid)
    assert seen < 12, 'processes of others are visible: %d' % seen
    assert 'planted' not in str(os.environ)
)");
  EXPECT_EQ(job["state"], "succeeded")
      << job.dump(1).substr(0, 3000) << end_of(output());
  EXPECT_EQ(output().find(kSecret), std::string::npos);
}

TEST_P(Hostile, ReachesNoNetworkAndNotItsServer) {
  std::string text = R"(
import os, socket

def refused(family, kind, proto=0):
    try:
        socket.socket(family, kind, proto).close()
    except OSError:
        return True
    return False

def unreachable(host, port):
    s = socket.socket()
    s.settimeout(3)
    try:
        s.connect((host, port))
    except OSError:
        return True
    finally:
        s.close()
    return False

def test_families():
    assert refused(socket.AF_PACKET, socket.SOCK_RAW)
    assert refused(40, socket.SOCK_STREAM)                # AF_VSOCK
    assert refused(38, socket.SOCK_SEQPACKET)             # AF_ALG
    assert refused(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    assert refused(socket.AF_NETLINK, socket.SOCK_RAW, 9) # audit

def test_out():
    assert unreachable('127.0.0.1', SERVER_PORT)
    assert unreachable('192.0.2.1', 80)
    assert unreachable('1.1.1.1', 53)
    assert unreachable('169.254.169.254', 80)

def test_server_socket():
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect('SERVER_ROOT/machina.sock')
        assert False, 'the server answers a job'
    except OSError:
        pass
    assert not os.path.exists('SERVER_ROOT/queue')

def test_own_loopback_works():
    a = socket.socket(); a.bind(('127.0.0.1', 0)); a.listen()
    b = socket.create_connection(a.getsockname(), 3)
    b.close(); a.close()
)";
  auto replace = [&](const std::string& what, const std::string& with) {
    for (std::size_t at; (at = text.find(what)) != std::string::npos;) {
      text.replace(at, what.size(), with);
    }
  };
  replace("SERVER_PORT", std::to_string(p().port()));
  replace("SERVER_ROOT", p().root());
  Json job = run(text);
  EXPECT_EQ(job["state"], "succeeded")
      << job.dump(1).substr(0, 3000) << end_of(output());
}

TEST_P(Hostile, ForksWithoutEnd) {
  Json job = run(R"(
import os, time

def test_fork():
    while True:
        if os.fork() == 0:
            while True:
                time.sleep(60)
)",
                 {{"sandbox", {{"pids", 64}}}});
  EXPECT_EQ(code(job), "pids") << job.dump(1);
  EXPECT_NE(job["state"], "succeeded");
  expect_others_unharmed();
}

TEST_P(Hostile, FillsMemory) {
  Json job = run(R"(
def test_memory():
    held = []
    while True:
        held.append(bytearray(16 << 20))
)",
                 {{"sandbox", {{"memory_mb", 128}, {"disk_mb", 64}}}});
  EXPECT_EQ(code(job), "oom") << job.dump(1);
  EXPECT_NE(job["state"], "succeeded");
  expect_others_unharmed();
}

TEST_P(Hostile, FillsTheDisk) {
  Json job = run(R"(
def test_disk():
    with open('fill', 'wb') as f:
        while True:
            f.write(b'x' * (1 << 20))
            f.flush()
)",
                 {{"sandbox", {{"disk_mb", 32}}}});
  EXPECT_EQ(code(job), "disk") << job.dump(1);
  expect_others_unharmed();
}

TEST_P(Hostile, FloodsItsOutput) {
  Json job = run(R"(
import os

def test_flood():
    line = b'y' * 65535 + b'\n'
    while True:
        os.write(1, line)
)",
                 {{"sandbox", {{"output_bytes", 1 << 20}}}});
  EXPECT_EQ(code(job), "output") << job.dump(1);
  EXPECT_LT(output().size(), std::size_t{4} << 20);
  expect_others_unharmed();
}

TEST_P(Hostile, StopsItself) {
  double start = now_ms();
  Json job = run(R"(
import os, signal

def test_stop():
    os.kill(os.getpid(), signal.SIGSTOP)
)",
                 {{"timeout_ms", 3000}});
  EXPECT_EQ(code(job), "timeout") << job.dump(1);
  EXPECT_LT(now_ms() - start, 20000);
  expect_others_unharmed();
}

TEST_P(Hostile, StartsADaemonThatShouldOutliveIt) {
  double start = now_ms();
  Json job = run(R"(
import os, subprocess, sys

def test_daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, '-c',
                     'import time; time.sleep(600)', 'e2e-daemon'])
        os._exit(0)
    os.wait()
)");
  // Its end is the suite's end, not that of the pipe which the daemon holds.
  EXPECT_EQ(job["state"], "succeeded") << job.dump(1).substr(0, 3000);
  EXPECT_LT(now_ms() - start, 20000);
  EXPECT_TRUE(eventually(
      [&] { return p().processes_with("e2e-daemon").empty(); }, 2000))
      << "the daemon outlived its job";
  expect_others_unharmed();
}

TEST_P(Hostile, EachActHasACodeOfItsOwn) {
  // In one product, at once: containment must not depend on being alone.
  struct Act {
    const char* python;
    Json sandbox;
    int timeout_ms;
    const char* code;
  };
  const Act acts[] = {
      {"import os, signal\ndef test(): os.kill(os.getpid(), signal.SIGSTOP)\n",
       Json::object(), 3000, "timeout"},
      {"def test():\n f = open('f', 'wb')\n while 1: f.write(b'x' * 65536)\n",
       {{"disk_mb", 16}},
       60000,
       "disk"},
      {"import os\ndef test():\n while 1: os.write(1, b'z' * 65536)\n",
       {{"output_bytes", 65536}},
       60000,
       "output"},
  };
  std::vector<std::string> ids;
  for (const Act& act : acts) {
    ids.push_back(p().submit({{"kind", "test.run"},
                              {"max_attempts", 1},
                              {"timeout_ms", act.timeout_ms},
                              {"sandbox", act.sandbox},
                              {"payload",
                               {{"runner", "pytest"},
                                {"args", {"-s", "-p", "no:cacheprovider"}},
                                {"files", {{"test_act.py", act.python}}}}}}));
  }
  std::string quiet = p().submit({{"kind", "noop"}});
  for (std::size_t i = 0; i < ids.size(); ++i) {
    Json job = p().wait_end(ids[i], 90000);
    EXPECT_EQ(job["state"], "dead") << job.dump(1);
    EXPECT_EQ(code(job), acts[i].code) << job.dump(1);
  }
  EXPECT_EQ(p().wait_end(quiet)["state"], "succeeded");
}

MACHINA_BOTH(Hostile);

}  // namespace
}  // namespace machina::e2e
