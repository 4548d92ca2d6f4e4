// Seeing what the product does: the log, request ids, metrics and those who
// read them, and machina top in a terminal.

#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <regex>

#include "tests/e2e/fixture.h"
#include "tests/support/places.h"

namespace machina::e2e {
namespace {

namespace fs = std::filesystem;

class WatchTest : public EndToEnd {
 protected:
  std::string pool_log() const {
    return read_file(product_->root() + "/pool.log");
  }
  // The bytes of every file below <root>/queue.
  std::string wal() const {
    std::string all;
    for (const auto& entry :
         fs::recursive_directory_iterator(product_->root() + "/queue")) {
      if (entry.is_regular_file()) all += read_file(entry.path().string());
    }
    return all;
  }
};
MACHINA_BOTH(WatchTest);

Json line_with(const std::string& log, const std::string& event,
               const std::string& needle) {
  std::istringstream in(log);
  for (std::string line; std::getline(in, line);) {
    Json json = Json::parse(line, nullptr, false);
    if (json.is_object() && json.value("event", "") == event &&
        line.find(needle) != line.npos) {
      return json;
    }
  }
  return {};
}

// A42: one grep.
TEST_P(WatchTest, ARequestIdIsFoundFromTheRequestToTheResult) {
  Serve serve;
  serve.env["MACHINA_LOG_FORMAT"] = "json";
  start(serve);
  const std::string rid = "watch-rid-4711";
  Json job = {{"kind", "tool.shell"},
              {"payload", {{"argv", {"sh", "-c", "echo in=$JOB_REQUEST_ID"}}}}};
  Answer made =
      p().call("POST", "/v1/jobs", job.dump(), {"X-Request-Id: " + rid});
  ASSERT_EQ(made.status, 201) << made.body;
  EXPECT_EQ(made.headers["x-request-id"], rid);
  std::string id = made.json()["id"];
  Json ended = p().wait_end(id);
  EXPECT_EQ(ended["state"], "succeeded") << ended;
  EXPECT_EQ(ended["request_id"], rid);
  EXPECT_NE(ended["result"].dump().find("in=" + rid), std::string::npos)
      << ended["result"];
  EXPECT_NE(wal().find(rid), std::string::npos);

  EXPECT_TRUE(eventually(
      [&] { return !line_with(p().log(), "request", rid).is_null(); }, 5000));
  Json request = line_with(p().log(), "request", rid);
  EXPECT_EQ(request["component"], "server");
  EXPECT_EQ(request["method"], "POST");
  EXPECT_EQ(request["path"], "/v1/jobs");
  EXPECT_EQ(request["status"], 201);
  EXPECT_EQ(request["job"], id);
  EXPECT_TRUE(request["duration_ms"].is_number());
  EXPECT_EQ(request["remote"].get<std::string>().rfind("127.0.0.1:", 0), 0u);

  EXPECT_TRUE(eventually(
      [&] { return !line_with(pool_log(), "attempt_ended", rid).is_null(); },
      5000));
  Json attempt = line_with(pool_log(), "attempt_ended", rid);
  EXPECT_EQ(attempt["component"], "worker");
  EXPECT_EQ(attempt["job"], id);
  EXPECT_EQ(attempt["attempt"], 1);
  EXPECT_EQ(attempt["code"], "ok");
  // The result outlives the server: history has it too.
  EXPECT_EQ(p().stop_server(), 0);
  restart();
  EXPECT_EQ(p().job(id)["request_id"], rid);
  // One that the server made is handed on the same way.
  made = p().post("/v1/jobs", job);
  EXPECT_EQ(made.json()["request_id"], made.headers["x-request-id"]);
}

// Y4: at the most talkative level, with everything told of.
TEST_P(WatchTest, NoSecretIsInAnyLog) {
  Serve serve;
  serve.profile = "dev";
  serve.token = "tok-5ecret-5ecret-5ecret";
  serve.env["MACHINA_LOG_LEVEL"] = "debug";
  serve.env["MACHINA_LOG_ACCESS"] = "all";
  start(serve);
  Json job = {{"kind", "tool.shell"},
              {"payload",
               {{"argv", {"sh", "-c", "echo pay-5ecret; exit 1"}},
                {"env", {{"KEY", "pay-5ecret"}}}}},
              {"labels", {{"l", "label-5ecret"}}},
              {"max_attempts", 1}};
  p().wait_end(p().submit(job));
  p().get("/v1/jobs?q=query-5ecret&label.x=query-5ecret");
  p().call("GET", "/nosuch?token=query-5ecret");
  std::string basic = "Authorization: Basic basic-5ecret";
  p().raw("GET /v1/jobs HTTP/1.1\r\nHost: x\r\n" + basic + "\r\n\r\n");
  p().raw(
      "GET /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
      "guess-5ecret\r\n\r\n");
  // A lease of ours, used and misused.
  p().post("/v1/jobs", {{"kind", "ext.mine"}});
  Answer leased =
      p().post("/v1/leases", {{"worker", "me"}, {"kinds", {"ext.mine"}}});
  ASSERT_EQ(leased.status, 200) << leased.body;
  std::string token = leased.json()["leases"][0]["token"];
  p().post("/v1/leases/" + token + "/nosuch", Json::object());
  EXPECT_EQ(
      p().post("/v1/leases/" + token + "/complete", Json::object()).status,
      200);
  EXPECT_TRUE(eventually(
      [&] {
        return p().log().find("/v1/leases/{}/complete") != std::string::npos;
      },
      5000))
      << p().log();
  EXPECT_NE(p().log().find("status=401"), std::string::npos)
      << "a refusal is told of";
  for (const std::string& log : {p().log(), pool_log()}) {
    EXPECT_EQ(log.find("5ecret"), log.npos) << log;
    EXPECT_EQ(log.find(token), log.npos);
    EXPECT_EQ(log.find(token.substr(17)), log.npos) << "its secret half";
  }
}

// A path is said as it came only where it is one of ours and plain; a lease's
// never, and what is none of ours is no lease's.
TEST_P(WatchTest, PathsInTheLogAreOursOrOther) {
  Serve serve;
  serve.workers = 0;
  serve.env["MACHINA_LOG_FORMAT"] = "json";
  start(serve);
  const std::vector<std::pair<std::string, std::string>> kPaths = {
      {"/v1/jobs/plain-id_1", "/v1/jobs/plain-id_1"},
      {"/v1/jobs", "/v1/jobs"},
      {"/v1/%6aobs", "/v1/jobs"},
      {"/v1/jobs/a%20b", "/v1/jobs/{}"},
      {"/v1/jobs/%e2%80%ae", "/v1/jobs/{}"},
      {"/nosuch", "other"},
      {"/no%73uch/%20", "other"},
      {"/v1/jobs/a%2fb", "other"},
      {"/v1/jobs/%zz", "other"},
      {"/v1/leases/seems-a-token/nosuch", "other"},
      {"/v1/leases/seems-a-token/complete", "other"},  // not with GET
  };
  for (std::size_t i = 0; i < kPaths.size(); ++i) {
    const auto& [path, said] = kPaths[i];
    const std::string id = "path-" + std::to_string(i) + "-end";
    ASSERT_NE(p().call("GET", path, "", {"X-Request-Id: " + id}).status, 0);
    ASSERT_TRUE(eventually(
        [&] { return !line_with(p().log(), "request", id).is_null(); }, 5000))
        << path << "\n"
        << p().log();
    EXPECT_EQ(line_with(p().log(), "request", id)["path"], said) << path;
  }
  EXPECT_EQ(p().log().find("seems-a-token"), std::string::npos);
}

// The product goes on with its log on a disk that is full.
TEST_P(WatchTest, AFullLogDiskHarmsNobody) {
  if (access("/dev/full", W_OK) != 0) GTEST_SKIP() << "no /dev/full here";
  Serve serve;
  serve.args = {};
  start(serve);
  // The log file's name leads nowhere writable: refused at the start.
  Ended ended = p().run({"serve", "--root", p().root() + "x", "--port", "0"},
                        {{"MACHINA_LOG_FILE", "/dev/full"}});
  EXPECT_EQ(ended.code, 2);
  EXPECT_NE(ended.err.find("MACHINA_LOG_FILE"), std::string::npos) << ended.err;
  EXPECT_EQ(p().wait_end(p().submit({{"kind", "noop"}}))["state"], "succeeded");
}

// --- Metrics and those who read them -----------------------------------------

struct Known {
  std::set<std::string> names, labels;
};

Known known(const std::string& metrics) {
  Known out;
  std::istringstream in(metrics);
  std::regex type(R"(# TYPE (\w+) (\w+))"), label(R"re((\w+)=")re");
  for (std::string line; std::getline(in, line);) {
    std::smatch m;
    if (std::regex_match(line, m, type)) {
      out.names.insert(m[1]);
      if (m[2] == "histogram") {
        for (const char* part : {"_bucket", "_sum", "_count"}) {
          out.names.insert(m[1].str() + part);
        }
      }
    } else if (line[0] != '#') {
      for (std::sregex_iterator i(line.begin(), line.end(), label), end;
           i != end; ++i) {
        out.labels.insert((*i)[1]);
      }
    }
  }
  for (const char* l : {"job", "instance"}) out.labels.insert(l);
  return out;
}

// Names and labels in expressions that `known` does not have.
std::vector<std::string> strangers(const std::string& all, const Known& known,
                                   int* seen) {
  // Prose is for people.
  const std::string text = std::regex_replace(
      all, std::regex(R"re((?:description|summary): "[^\n]*)re"), "");
  std::vector<std::string> out;
  auto each = [&](const char* pattern, auto&& take) {
    std::regex regex(pattern);
    for (std::sregex_iterator i(text.begin(), text.end(), regex), end; i != end;
         ++i) {
      take((*i)[1].str());
    }
  };
  each(R"((?:^|[^\w:/])(machina_\w+))", [&](const std::string& name) {
    ++*seen;
    if (known.names.count(name) == 0) out.push_back(name);
  });
  auto label = [&](const std::string& name) {
    if (known.labels.count(name) == 0) out.push_back("label " + name);
  };
  each(R"((?:by|on) \(([^)]*)\))", [&](const std::string& list) {
    std::regex word(R"(\w+)");
    for (std::sregex_iterator i(list.begin(), list.end(), word), end; i != end;
         ++i) {
      label(i->str());
    }
  });
  each(R"re([{,]\s*(\w+)\s*(?:=|!=|=~|!~)\s*\\?")re", label);
  each(R"(\$labels\.(\w+))", label);
  return out;
}

TEST_P(WatchTest, RulesAndDashboardUseOnlyWhatMetricsHas) {
  start();
  p().wait_end(p().submit({{"kind", "noop"}}));
  p().wait_end(
      p().submit({{"kind", "tool.shell"}, {"payload", {{"argv", {"true"}}}}}));
  std::string metrics;
  // Counts of sandboxes come with the pool's next report.
  EXPECT_TRUE(eventually(
      [&] {
        metrics = p().get("/metrics").body;
        return std::regex_search(
            metrics, std::regex("machina_sandbox_start_seconds_count [1-9]"));
      },
      10'000));
  Known all = known(metrics);
  for (const char* name : {"machina_jobs_enqueued_total",
                           "machina_jobs_duplicate_total",
                           "machina_jobs_processed_total",
                           "machina_jobs_ok_total",
                           "machina_jobs_fail_total",
                           "machina_jobs_retried_total",
                           "machina_jobs_dead_total",
                           "machina_queue_inbox_size",
                           "machina_queue_processing_size",
                           "machina_queue_retry_size",
                           "machina_queue_failed_size",
                           "machina_queue_dlq_size",
                           "machina_queue_blocked_size",
                           "machina_queue_waiting_size",
                           "machina_queue_oldest_ready_seconds",
                           "machina_workers_configured",
                           "machina_workers_busy",
                           "machina_tool_ok_total",
                           "machina_tool_fail_total",
                           "machina_tool_duration_ms_total",
                           "machina_enqueue_seconds",
                           "machina_wal_sync_seconds",
                           "machina_job_wait_seconds",
                           "machina_job_run_seconds",
                           "machina_sandbox_start_seconds",
                           "machina_wal_durable_lsn",
                           "machina_wal_batch_records",
                           "machina_wal_segments",
                           "machina_history_lag_bytes",
                           "machina_disk_free_bytes",
                           "machina_sandbox_denied_total",
                           "machina_isolation_level",
                           "machina_build_info"}) {
    EXPECT_EQ(all.names.count(name), 1u) << name;
  }
  EXPECT_TRUE(std::regex_search(
      metrics,
      std::regex(R"re(machina_tool_ok_total\{aid="tool.shell"\} 1)re")));
  const std::string ops = std::string(kSourceDir) + "/ops/";
  for (const char* file :
       {"prometheus/machina.rules.yml", "grafana/machina.json"}) {
    int seen = 0;
    EXPECT_EQ(strangers(read_file(ops + file), all, &seen),
              std::vector<std::string>())
        << file;
    EXPECT_GT(seen, 15) << file;
  }
  int seen = 0;  // this test can fail
  EXPECT_EQ(
      strangers("sum by (queue, tenant) (machina_nosuch_total{code=\"x\"})",
                all, &seen),
      (std::vector<std::string>{"machina_nosuch_total", "label tenant"}));
  Json board = Json::parse(read_file(ops + "grafana/machina.json"));
  EXPECT_EQ(board["uid"], "machina");
  std::set<int> ids;
  for (const Json& panel : board["panels"]) {
    EXPECT_TRUE(ids.insert(panel["id"].get<int>()).second);
    if (panel["type"] == "row") continue;
    EXPECT_EQ(panel["datasource"]["uid"], "${datasource}");
    for (const Json& target : panel["targets"]) {
      EXPECT_NE(target["expr"].get<std::string>().find("machina_"),
                std::string::npos);
    }
  }
}

TEST_P(WatchTest, PromtoolFindsNoFault) {
  start();
  if (p().shell("command -v promtool >/dev/null 2>&1") != 0) {
    GTEST_SKIP() << "promtool is missing: ops/setup.sh installs prometheus";
  }
  p().wait_end(
      p().submit({{"kind", "tool.shell"}, {"payload", {{"argv", {"true"}}}}}));
  const std::string file = p().root() + "-metrics.txt";
  std::ofstream(file) << p().get("/metrics").body;
  Ended checked;
  const std::string out = p().root() + "-promtool.txt";
  p().shell("promtool check metrics < " + file + " > " + out + " 2>&1");
  // The name is the contract's; promtool would have it in seconds.
  std::istringstream said(read_file(out));
  for (std::string line; std::getline(said, line);) {
    EXPECT_EQ(line,
              "machina_tool_duration_ms_total metric names should not contain "
              "abbreviated units");
  }
  const std::string ops = std::string(kSourceDir) + "/ops/prometheus/";
  for (const std::string& command :
       {"check config " + ops + "prometheus.yml",
        "test rules " + ops + "machina.test.yml"}) {
    // As whoever tests: the tree may be for nobody else.
    EXPECT_EQ(
        std::system(("promtool " + command + " > /dev/null 2>&1").c_str()), 0)
        << command;
  }
}

// --- machina top
// -----------------------------------------------------------------

class Terminal {
 public:
  Terminal(const std::vector<std::string>& argv, int rows, int columns) {
    winsize size{};
    size.ws_row = static_cast<unsigned short>(rows);
    size.ws_col = static_cast<unsigned short>(columns);
    pid_ = forkpty(&fd_, nullptr, nullptr, &size);
    if (pid_ == 0) {
      setenv("TERM", "xterm", 1);
      std::vector<char*> args;
      for (const auto& a : argv) args.push_back(const_cast<char*>(a.c_str()));
      args.push_back(nullptr);
      execv(args[0], args.data());
      _exit(127);
    }
    fcntl(fd_, F_SETFL, O_NONBLOCK);
  }
  ~Terminal() {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    close(fd_);
  }
  void type(const std::string& keys) {
    (void)!write(fd_, keys.data(), keys.size());
  }
  void resize(int rows, int columns) {
    winsize size{};
    size.ws_row = static_cast<unsigned short>(rows);
    size.ws_col = static_cast<unsigned short>(columns);
    ioctl(fd_, TIOCSWINSZ, &size);
  }
  const std::string& read() {
    char buffer[65536];
    ssize_t n;
    while ((n = ::read(fd_, buffer, sizeof buffer)) > 0) {
      all_.append(buffer, static_cast<std::size_t>(n));
    }
    return all_;
  }
  // True once a whole frame that came after now satisfies `good`.
  bool shows(const std::function<bool(const std::string&)>& good,
             int timeout_ms = 20'000) {
    std::size_t from = read().size();
    return eventually(
        [&] {
          const std::string& all = read();
          std::size_t end = all.rfind("\x1b[J");
          if (end == all.npos || end < from) return false;
          std::size_t begin = all.rfind("\x1b[H", end);
          if (begin == all.npos || begin < from) return false;
          return good(all.substr(begin + 3, end - begin - 3));
        },
        timeout_ms);
  }
  int wait() {  // exit code; 128 + signal
    int status = 0;
    bool ended = eventually(
        [&] {
          read();
          return waitpid(pid_, &status, WNOHANG) == pid_;
        },
        20'000);
    if (!ended) return -1;
    pid_ = 0;
    read();
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  bool restored() {
    termios now{};
    tcgetattr(fd_, &now);
    return (now.c_lflag & ICANON) != 0 && (now.c_lflag & ECHO) != 0 &&
           read().rfind("\x1b[?1049l") > read().rfind("\x1b[?1049h") &&
           read().rfind("\x1b[?25h") > read().rfind("\x1b[?25l");
  }
  pid_t pid() const { return pid_; }

 private:
  int fd_ = -1;
  pid_t pid_ = 0;
  std::string all_;
};

auto has(const std::string& text) {
  return [text](const std::string& frame) {
    return frame.find(text) != frame.npos;
  };
}

TEST_P(WatchTest, TopSurvivesResizeAndRestartAndGivesTheTerminalBack) {
  start();
  std::vector<std::string> argv = {kBinary,   "top",        "--server",
                                   p().url(), "--interval", "0.2"};
  Terminal top(argv, 24, 80);
  EXPECT_TRUE(top.shows(has("RUNNING JOB"))) << top.read();
  p().submit({{"kind", "tool.shell"},
              {"payload", {{"argv", {"sleep", "3"}}}},
              {"labels", {{"evil", "\x1b[2J\x1b]0;x\x07"}}}});
  EXPECT_TRUE(top.shows(has("tool.shell"))) << top.read();

  top.resize(7, 30);
  EXPECT_TRUE(top.shows([](const std::string& frame) {
    std::string plain =
        std::regex_replace(frame, std::regex("\x1b\\[[?0-9;]*[A-Za-z]"), "");
    std::istringstream in(plain);
    int lines = 0;
    for (std::string line; std::getline(in, line); ++lines) {
      while (line.ends_with('\r')) line.pop_back();
      if (line.size() > 30) return false;
    }
    return lines <= 7 && lines >= 4;
  })) << top.read();
  top.resize(24, 80);

  p().kill_server();
  EXPECT_TRUE(top.shows(has("reconnecting: "))) << top.read();
  restart();
  EXPECT_TRUE(top.shows([](const std::string& frame) {
    return frame.find("reconnecting") == frame.npos &&
           frame.find("  ready") != frame.npos;
  })) << top.read();

  // Stopped and continued, as by a shell.
  kill(top.pid(), SIGTSTP);
  EXPECT_TRUE(eventually([&] { return top.restored(); }, 10'000));
  kill(top.pid(), SIGCONT);
  EXPECT_TRUE(top.shows(has("RUNNING JOB")));
  EXPECT_FALSE(top.restored());

  top.type("q");
  EXPECT_EQ(top.wait(), 0);
  EXPECT_TRUE(top.restored());
}

TEST_P(WatchTest, TopGivesTheTerminalBackHoweverItEnds) {
  start();
  for (int signal : {SIGINT, SIGTERM, SIGABRT}) {
    Terminal top({kBinary, "top", "--server", p().url()}, 24, 80);
    EXPECT_TRUE(top.shows(has("RUNNING JOB"))) << top.read();
    if (signal == SIGINT) {
      top.type("\x03");
    } else {
      kill(top.pid(), signal);
    }
    EXPECT_EQ(top.wait(), signal == SIGINT ? 0 : 128 + signal);
    EXPECT_TRUE(top.restored()) << signal;
  }
}

TEST_P(WatchTest, TopOncePrintsOnePlainFrame) {
  start();
  p().wait_end(p().submit({{"kind", "noop"}}));
  Ended plain = p().run({"top", "--server", p().url(), "--once"});
  EXPECT_EQ(plain.code, 0) << plain.err;
  EXPECT_EQ(plain.out.find('\x1b'), plain.out.npos);
  EXPECT_NE(plain.out.find("QUEUE"), plain.out.npos);
  Ended json = p().run({"top", "--server", p().url(), "--json"});
  Json all = Json::parse(json.out, nullptr, false);
  EXPECT_EQ(all["stats"]["totals"]["succeeded"], 1) << json.out;
  EXPECT_TRUE(all["latency"]["run"]["p50_ms"].is_number()) << json.out;
  Ended away = p().run({"top", "--server", "http://127.0.0.1:1", "--once"});
  EXPECT_EQ(away.code, 3) << away.err;
}

}  // namespace
}  // namespace machina::e2e
