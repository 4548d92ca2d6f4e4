#include "tools/cli/ops_common.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "queue/base/rfc3339.h"
#include "queue/base/utf8.h"
#include "tools/root.h"

namespace machina::cli {
namespace {

constexpr int kFirstFd = 3;
constexpr off_t kLogBytesMax = 4 << 20;
constexpr std::size_t kTailBytes = 2000;
constexpr int kPollMs = 25;
constexpr std::int64_t kProgressMs = 2000;
// It may try a sandbox, on a host that has other work.
constexpr std::int64_t kTrialMs = 30'000;
constexpr int kAgainMs = 100;    // between two looks at a server's health
constexpr long kProbeMs = 3000;  // the most that one answer is waited for

bool only_for_us(const std::string& entry) {
  for (const char* name : {"NOTIFY_SOCKET=", "WATCHDOG_PID=", "WATCHDOG_USEC=",
                           "LISTEN_PID=", "LISTEN_FDS=", "LISTEN_FDNAMES=",
                           "SYSTEMD_EXEC_PID=", "INVOCATION_ID="}) {
    if (entry.starts_with(name)) return true;
  }
  return false;
}

std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (const auto& text : texts) out.push_back(const_cast<char*>(text.c_str()));
  out.push_back(nullptr);
  return out;
}

// The child's half; no other thread exists. `report` gets errno.
[[noreturn]] void become(const Launch& launch, int log, int report) {
  ::setsid();
  sigset_t none;
  sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  for (int signal : {SIGPIPE, SIGINT, SIGQUIT, SIGTERM, SIGHUP}) {
    ::signal(signal, SIG_DFL);
  }
  auto environment = launch.environment;
  if (!launch.sockets.empty()) {
    std::string names;
    for (const auto& socket : launch.sockets) {
      names += (names.empty() ? "" : ":") + socket.name;
    }
    environment.push_back("LISTEN_PID=" + std::to_string(::getpid()));
    environment.push_back("LISTEN_FDS=" +
                          std::to_string(launch.sockets.size()));
    environment.push_back("LISTEN_FDNAMES=" + names);
  }
  // Out of the way of 3 and up first, then onto them.
  int base = 64;
  std::vector<int> moved;
  for (const auto& socket : launch.sockets) {
    moved.push_back(::fcntl(socket.fd, F_DUPFD_CLOEXEC, base));
  }
  report = ::fcntl(report, F_DUPFD_CLOEXEC, base);
  int null = ::open("/dev/null", O_RDONLY);
  ::dup2(null, 0);
  ::dup2(log, 1);
  ::dup2(log, 2);
  for (int fd = kFirstFd; fd < base; ++fd) ::close(fd);
  for (std::size_t i = 0; i < moved.size(); ++i) {
    ::dup2(moved[i], kFirstFd + static_cast<int>(i));
  }
  auto argv = pointers(launch.argv);
  auto envp = pointers(environment);
  // One that is closed to us by now costs relative paths only.
  if (!launch.cwd.empty()) (void)!::chdir(launch.cwd.c_str());
  ::execve(argv[0], argv.data(), envp.data());
  int error = errno;
  (void)!::write(report, &error, sizeof error);
  ::_exit(127);
}

// The value that a server with this command line and environment would have.
std::string log_file_of(const Launch& launch) {
  std::string file;
  for (std::size_t i = 0; i + 1 < launch.argv.size(); ++i) {
    if (launch.argv[i] == "--config") file = launch.argv[i + 1];
  }
  auto config = Config::load(launch.environment, {}, file);
  // What is wrong with it the server will say.
  return config ? config->typed().log_file : "";
}

// `kept`: the server itself turns it over.
Result<int> open_log(const std::string& root, bool kept, std::string* path) {
  std::string dir = ops_dir(root);
  if (::mkdir(dir.c_str(), 0700) != 0 && errno != EEXIST) {
    return Error{Code::io, dir + ": " + std::strerror(errno)};
  }
  *path = dir + "/serve.log";
  struct stat status {};
  if (!kept && ::lstat(path->c_str(), &status) == 0 &&
      status.st_size > kLogBytesMax) {
    ::rename(path->c_str(), (*path + ".1").c_str());
  }
  int fd = ::open(path->c_str(),
                  O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) return Error{Code::io, *path + ": " + std::strerror(errno)};
  return fd;
}

}  // namespace

std::int64_t steady_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int give_report(const OpsOptions& options, const std::string& root,
                const std::string& file, const OpsJson& json,
                const std::string& text, int exit) {
  auto whole = [&](int indent) {
    return json.dump(indent, ' ', false, OpsJson::error_handler_t::replace);
  };
  if (!options.dry_run && !file.empty() && !root.empty()) {
    auto ok = write_report(root, file, whole(1) + "\n");
    if (!ok) fail(exit, "the report could not be kept: " + ok.error().what);
  }
  if (options.text) {
    std::cout << text;
  } else {
    std::cout << whole(-1) << "\n";
  }
  return exit;
}

std::vector<std::string> child_environment() {
  std::vector<std::string> kept;
  for (auto& entry : environment()) {
    if (!only_for_us(entry)) kept.push_back(std::move(entry));
  }
  return kept;
}

Result<Launched> Launched::start(const Launch& asked) {
  Launched launched;
  Launch launch = asked;
  const std::string own = ops_dir(launch.root) + "/serve.log";
  // What an earlier start has set, and the server before has passed on, is not
  // somebody's wish.
  std::erase(launch.environment, "MACHINA_LOG_FILE=" + own);
  const std::string set = log_file_of(launch);
  if (set.empty()) {
    // An empty one that is set already would come first.
    std::erase_if(launch.environment, [](const std::string& entry) {
      return entry.starts_with("MACHINA_LOG_FILE=");
    });
    launch.environment.push_back("MACHINA_LOG_FILE=" + own);
  }
  auto log =
      open_log(launch.root, set.empty() || set == own, &launched.log_path_);
  if (!log) return log.error();
  struct stat status {};
  ::fstat(*log, &status);
  launched.log_from_ = status.st_size;
  int report[2];
  if (::pipe2(report, O_CLOEXEC) != 0) {
    ::close(*log);
    return Error{Code::io, std::string("pipe: ") + std::strerror(errno)};
  }
  pid_t pid = ::fork();
  if (pid == 0) become(launch, *log, report[1]);
  ::close(*log);
  ::close(report[1]);
  int error = pid < 0 ? errno : 0;
  // Nothing comes where the program was started.
  if (pid > 0 && ::read(report[0], &error, sizeof error) != sizeof error) {
    error = 0;
  }
  ::close(report[0]);
  if (error != 0) {
    if (pid > 0) ::waitpid(pid, nullptr, 0);
    return Error{Code::io,
                 "start " + launch.argv[0] + ": " + std::strerror(error)};
  }
  launched.pid_ = pid;
  return launched;
}

// What it prints is kept in memory: a trial leaves nothing on the root.
Result<void> try_launch(Launch trial) {
  trial.argv.emplace_back("--check");
  std::erase(trial.environment,
             "MACHINA_LOG_FILE=" + ops_dir(trial.root) + "/serve.log");
  const int said = ::memfd_create("serve-check", MFD_CLOEXEC);
  const int unread = ::open("/dev/null", O_WRONLY | O_CLOEXEC);
  if (said < 0 || unread < 0) {
    return Error{Code::io,
                 std::string("serve --check: ") + std::strerror(errno)};
  }
  const pid_t pid = ::fork();
  if (pid == 0) become(trial, said, unread);
  int status = 0;
  const std::int64_t until = steady_ms() + kTrialMs;
  bool ended = pid < 0;
  while (!ended && steady_ms() < until) {
    ended = ::waitpid(pid, &status, WNOHANG) == pid;
    if (!ended) ::usleep(5'000);
  }
  if (!ended) {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, &status, 0);
  }
  std::string text(kTailBytes, '\0');
  const off_t size = ::lseek(said, 0, SEEK_END);
  const auto tail = static_cast<off_t>(kTailBytes);
  const ssize_t n =
      ::pread(said, text.data(), text.size(), std::max<off_t>(0, size - tail));
  text.resize(static_cast<std::size_t>(std::max<ssize_t>(n, 0)));
  ::close(said);
  ::close(unread);
  if (!ended) return Error{Code::unavailable, "serve --check did not end"};
  if (pid > 0 && WIFEXITED(status) && WEXITSTATUS(status) == kOk) return {};
  return Error{Code::invalid,
               text.empty() ? "cannot start " + trial.argv[0] : harmless(text)};
}

int Launched::ended() {
  int status = 0;
  if (code_ == -1 && ::waitpid(pid_, &status, WNOHANG) == pid_) {
    code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  return code_;
}

std::string Launched::log_tail() const {
  std::ifstream file(log_path_, std::ios::binary | std::ios::ate);
  // It may have been turned over meanwhile.
  file.seekg(file.tellg() < log_from_ ? std::streamoff{0}
                                      : std::streamoff{log_from_});
  std::string text((std::istreambuf_iterator<char>(file)),
                   std::istreambuf_iterator<char>());
  return harmless(utf8_tail(text, kTailBytes));
}

Probe probe(const Settings& settings, const std::string& where,
            const std::string& path, long timeout_ms) {
  Settings there = settings;
  there.overrides["MACHINA_SERVER"] = where;
  auto config = Config::load(environment(), there.overrides, there.file);
  if (!config) return {0, config.error().what};
  auto client = Client::open(*config);
  if (!client) return {0, client.error().what};
  Client::Request request;
  request.path = path;
  request.timeout_ms = timeout_ms;
  auto answer = (*client)->call(request);
  if (!answer) return {0, answer.error().what};
  return {answer->status, answer->body};
}

Ready await_ready(const OpsOptions& options, const std::string& socket,
                  Launched* launched) {
  Ready state;
  std::int64_t began = steady_ms(), said = began;
  auto limit = static_cast<std::int64_t>(options.wait_seconds * 1000);
  for (;;) {
    state.took_ms = steady_ms() - began;
    if (launched != nullptr && launched->ended() != -1) {
      state.why =
          "it ended with exit code " + std::to_string(launched->ended());
      return state;
    }
    Probe answer =
        probe(*options.settings, socket, "/ready",
              std::clamp<long>(limit - state.took_ms, kPollMs, kProbeMs));
    state.took_ms = steady_ms() - began;
    if (answer.status == 200) {
      state.ready = true;
      return state;
    }
    auto problem = nlohmann::json::parse(answer.body, nullptr, false);
    state.why = problem.is_object() ? problem.value("detail", answer.body)
                                    : answer.body;
    if (state.took_ms >= limit) {
      state.why =
          "not ready after " + std::to_string(limit) + " ms: " + state.why;
      return state;
    }
    if (steady_ms() - said >= kProgressMs) {
      said = steady_ms();
      std::cerr << "machina: waiting, " << state.took_ms / 1000
                << " s: " << harmless(state.why) << "\n";
    }
    ::usleep(kPollMs * 1000);
  }
}

// --- Workers ---------------------------------------------------------------

OpsJson WorkersThere::json() const {
  if (!known) return nullptr;
  return {{"configured", configured}, {"reported", reported}, {"ready", ready}};
}

std::string WorkersThere::text() const {
  if (!known) return "its workers are not known";
  if (configured == 0) return "no workers are configured";
  return std::to_string(ready) + " of " + std::to_string(configured) +
         " workers are ready";
}

WorkersThere look_at_workers(const OpsOptions& options,
                             const std::string& socket, long timeout_ms) {
  WorkersThere there;
  Probe answer = probe(*options.settings, socket, "/v1/workers", timeout_ms);
  OpsJson json = OpsJson::parse(answer.body, nullptr, false);
  if (answer.status != 200 || !json.is_object()) return there;
  there.known = true;
  there.configured = json.value("configured", 0);
  there.reported = json.value("reported", 0);
  for (const auto& worker : json.value("workers", OpsJson::array())) {
    if (!worker.contains("level") || !worker["level"].is_string()) continue;
    ++there.ready;
    const auto word = worker["level"].get<std::string>();  // "L2"
    if (word.size() == 2) there.level = std::max(there.level, word[1] - '0');
  }
  return there;
}

WorkersThere await_workers(const OpsOptions& options, const std::string& socket,
                           std::int64_t limit_ms) {
  const std::int64_t until = steady_ms() + limit_ms;
  for (;;) {
    const long left = static_cast<long>(until - steady_ms());
    WorkersThere there =
        look_at_workers(options, socket, std::clamp<long>(left, 50, kProbeMs));
    if (there.all() || steady_ms() >= until) return there;
    ::usleep(kPollMs * 1000);
  }
}

// --- Health ----------------------------------------------------------------

namespace {

class HealthCheck {
 public:
  // `until`, of steady_ms(): no answer is waited for beyond it.
  HealthCheck(const OpsOptions& options, const Detected& found,
              std::int64_t until)
      : options_(options), found_(found), until_(until) {}

  Health run() {
    Health health;
    std::string socket = root_socket(found_.root);
    std::string url =
        found_.serve ? url_of(found_.serve_file->host, found_.serve_file->port)
                     : "";
    OpsJson serve_pids = OpsJson::array(), pool_pids = OpsJson::array();
    if (found_.serve) serve_pids.push_back(found_.serve->process.id.pid);
    if (found_.pool) pool_pids.push_back(found_.pool->process.id.pid);

    check("server", found_.serve.has_value(), "no server runs on this root");
    Probe tcp, ready, by_socket;
    OpsJson stats;
    if (found_.serve) {
      tcp = ask(url, "/health");
      by_socket = ask(socket, "/health");
      ready = ask(socket, "/ready");
      check("tcp", tcp.status == 200, url + ": " + tcp.body);
      check("socket", by_socket.status == 200, socket + ": " + by_socket.body);
      check("ready", ready.status == 200, ready.body);
      Probe numbers = ask(socket, "/stats");
      stats = OpsJson::parse(numbers.body, nullptr, false);
      check("stats", stats.is_object(), numbers.body);
      check_pool(stats);
      check_level(stats);
    }
    check_disk();

    bool ok = failed_.empty();
    health.exit = !found_.running() ? kOpsNotRunning
                  : ok              ? kOpsOk
                                    : kOpsPartial;
    OpsJson json = {{"ts", rfc3339_now()},
                    {"root", found_.root},
                    {"serve_url", url},
                    {"serve_health_ok", tcp.status == 200},
                    {"serve_health_body", tcp.body},
                    {"bot_pids", OpsJson::array()},
                    {"serve_pids", serve_pids},
                    {"pool_pids", pool_pids},
                    {"ready", ready.status == 200},
                    {"ok", ok},
                    {"checks", checks_},
                    {"disk_free_bytes", disk_free_}};
    if (stats.is_object()) {
      for (const char* name : {"version", "uptime_ms", "workers"}) {
        if (stats.contains(name)) json[name] = stats[name];
      }
    }
    health.json = std::make_shared<OpsJson>(std::move(json));
    for (const auto& each : checks_) {
      health.text += std::string(each["ok"] ? "ok    " : "FAIL  ") +
                     each["name"].get<std::string>();
      std::string detail = each["detail"];
      health.text += (detail.empty() ? "" : ": " + harmless(detail)) + "\n";
    }
    return health;
  }

 private:
  // Each question has its share of the time that is left, so that one which
  // is not answered leaves some to the others.
  Probe ask(const std::string& where, const std::string& path) {
    std::int64_t share = (until_ - steady_ms()) / std::max(1, questions_--);
    return probe(*options_.settings, where, path,
                 std::clamp<long>(share, kLeastProbeMs, kProbeMs));
  }
  void check(const std::string& name, bool ok, const std::string& detail) {
    checks_.push_back(
        {{"name", name}, {"ok", ok}, {"detail", ok ? "" : detail}});
    if (!ok) failed_ += name + " ";
  }
  void check_pool(const OpsJson& stats) {
    int wanted = found_.serve_file->workers, reported = 0;
    if (stats.is_object() && stats.contains("workers")) {
      wanted = stats["workers"].value("configured", wanted);
      reported = stats["workers"].value("reported", 0);
    }
    if (wanted == 0) return;
    check("pool", found_.pool.has_value(),
          std::to_string(wanted) + " workers are configured and no pool runs");
    check("workers", reported > 0, "no worker has reported yet");
  }
  void check_level(const OpsJson& stats) {
    if (!stats.is_object() || !stats.contains("disk")) return;
    check("disk_level", stats["disk"].value("level", "ok") == "ok",
          stats["disk"].value("says", ""));
  }
  void check_disk() {
    struct statvfs disk {};
    if (::statvfs(found_.root.c_str(), &disk) != 0) return;
    disk_free_ = static_cast<std::uint64_t>(disk.f_bavail) * disk.f_frsize;
    std::uint64_t least = static_cast<std::uint64_t>(options_.min_free_mb)
                          << 20;
    check("disk", disk_free_ >= least,
          std::to_string(disk_free_ >> 20) + " MiB are free below " +
              found_.root + ", --min-free-mb is " +
              std::to_string(options_.min_free_mb));
  }

  static constexpr long kLeastProbeMs = 20;

  const OpsOptions& options_;
  const Detected& found_;
  const std::int64_t until_;
  int questions_ = 4;  // that ask() will put
  OpsJson checks_ = OpsJson::array();
  std::string failed_;
  std::uint64_t disk_free_ = 0;
};

}  // namespace

Health await_health(const OpsOptions& options, const Detected& found) {
  const auto until =
      steady_ms() + static_cast<std::int64_t>(options.wait_seconds * 1000);
  Health health = HealthCheck(options, found, until).run();
  while (health.exit == kOpsPartial && steady_ms() + kAgainMs < until) {
    ::usleep(kAgainMs * 1000);
    auto now = detect(found.root);
    Health again = HealthCheck(options, now ? *now : found, until).run();
    // What had no time left says nothing about the server.
    if (again.exit != kOpsPartial || steady_ms() < until) {
      health = std::move(again);
    }
  }
  return health;
}

}  // namespace machina::cli
