// ops restart: a new server takes the place of the one that runs.
//
//   1  the new settings and the new program are tried (serve --check): root,
//      log file, address, isolation; the old server is not touched where they
//      do not hold
//   2  SIGUSR2: the old server passes its listening sockets on, answers what it
//      has, makes its log durable and ends with 0; new connections wait
//   3  the new server starts with these sockets and takes the running pool over
//   4  it is ready and well; with --pool the old pool is asked to leave then
//
// Dying at any point loses nothing: between 2 and 3 the sockets are closed
// with this process, clients are refused, and `machina ops start` goes on.

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <iostream>
#include <nlohmann/json.hpp>

#include "queue/base/rfc3339.h"
#include "tools/cli/ops_common.h"
#include "tools/cli/serve_events.h"
#include "tools/root.h"

namespace machina::cli {

namespace {

constexpr int kPollMs = 50;

const std::map<std::string, std::string>& flags() {
  static const std::map<std::string, std::string> kFlags = {
      {"MACHINA_HOST", "--host"},
      {"MACHINA_PORT", "--port"},
      {"MACHINA_WORKERS", "--workers"},
      {"MACHINA_PROFILE", "--profile"}};
  return kFlags;
}

// Sets `flag` to `value` in a command line, in whatever way it was there.
void set_flag(std::vector<std::string>* argv, const std::string& flag,
              const std::string& value) {
  for (std::size_t i = 0; i < argv->size();) {
    if ((*argv)[i] == flag && i + 1 < argv->size()) {
      argv->erase(argv->begin() + static_cast<std::ptrdiff_t>(i),
                  argv->begin() + static_cast<std::ptrdiff_t>(i) + 2);
    } else if ((*argv)[i].starts_with(flag + "=")) {
      argv->erase(argv->begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ++i;
    }
  }
  argv->push_back(flag);
  argv->push_back(value);
}

// A path of the command line `ops restart` was given means our directory, one
// of the old server's means its own.
std::string absolute_path(const std::string& path) {
  char cwd[4096];
  if (path.starts_with("/") || ::getcwd(cwd, sizeof cwd) == nullptr) {
    return path;
  }
  return std::string(cwd) + "/" + path;
}

// Where the old server brings its sockets.
class Taker {
 public:
  explicit Taker(const std::string& root) : path_(handover_socket(root)) {
    sockaddr_un where{};
    where.sun_family = AF_UNIX;
    if (path_.size() >= sizeof where.sun_path) return;  // refused for a moment
    std::memcpy(where.sun_path, path_.c_str(), path_.size());
    ::unlink(path_.c_str());
    int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    mode_t old = ::umask(0177);
    bool bound =
        ::bind(fd, reinterpret_cast<sockaddr*>(&where), sizeof where) == 0 &&
        ::listen(fd, 1) == 0;
    ::umask(old);
    if (bound) {
      fd_ = fd;
    } else {
      ::close(fd);
    }
  }
  ~Taker() {
    if (fd_ >= 0) {
      ::close(fd_);
      ::unlink(path_.c_str());
    }
    for (const auto& socket : sockets_) ::close(socket.fd);
  }
  Taker(const Taker&) = delete;
  Taker& operator=(const Taker&) = delete;

  // Takes what `from` brings; does not wait longer than `timeout_ms`.
  void take(pid_t from, int timeout_ms) {
    pollfd item{fd_, POLLIN, 0};
    if (fd_ < 0 || !sockets_.empty()) {
      ::usleep(static_cast<useconds_t>(timeout_ms) * 1000);
      return;
    }
    if (::poll(&item, 1, timeout_ms) <= 0) return;
    int peer = ::accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
    if (peer < 0) return;
    ucred who{};
    socklen_t size = sizeof who;
    if (::getsockopt(peer, SOL_SOCKET, SO_PEERCRED, &who, &size) == 0 &&
        who.pid == from) {
      sockets_ = receive_fds(peer, 1000);
    }
    ::close(peer);
  }
  const std::vector<NamedFd>& sockets() const { return sockets_; }

 private:
  std::string path_;
  int fd_ = -1;
  std::vector<NamedFd> sockets_;
};

class Restart {
 public:
  Restart(const OpsOptions& options, Detected found)
      : options_(options), found_(std::move(found)), file_(*found_.serve_file) {
    launch_.root = found_.root;
    launch_.cwd = file_.cwd;
    json_ = {{"ts", rfc3339_now()},
             {"root", found_.root},
             {"old_pid", file_.id.pid},
             {"old_version", file_.version},
             {"new_pid", nullptr},
             {"was_running", true},
             {"supervisor", file_.supervisor},
             {"dry_run", options_.dry_run},
             {"ok", false}};
    if (found_.pool) json_["pool_pid"] = found_.pool->process.id.pid;
  }

  int run() {
    if (int exit = plan(); exit != kOpsOk) return exit;
    if (options_.dry_run) {
      std::string text = "would hand over from process " +
                         std::to_string(file_.id.pid) + " to:";
      for (const auto& word : launch_.argv) text += " " + word;
      json_["argv"] = launch_.argv;
      json_["ok"] = true;
      return give_report(options_, found_.root, "", json_, text + "\n", kOpsOk);
    }
    if (int exit = hand_over(); exit != kOpsOk) return exit;
    if (int exit = start_next(); exit != kOpsOk) return exit;
    return look_at_it();
  }

 private:
  // 1: what would be started, and whether it would start.
  int plan() {
    struct stat status {};
    if (::stat(found_.root.c_str(), &status) != 0 ||
        status.st_uid != ::geteuid()) {
      return fail(kOpsUsage, "restart runs as the root's owner, uid " +
                                 std::to_string(status.st_uid) +
                                 ": runuser -u NAME -- machina ops restart");
    }
    if (!file_.supervisor.empty()) {
      if (int exit = refuse_what_systemd_does(); exit != kOpsOk) return exit;
    }
    launch_.argv = {self_exe()};
    std::vector<std::string> rest = file_.argv;
    for (const auto& [name, flag] : flags()) {
      auto set = options_.settings->overrides.find(name);
      if (set != options_.settings->overrides.end()) {
        set_flag(&rest, flag, set->second);
      }
    }
    if (!options_.settings->file.empty()) {
      set_flag(&rest, "--config", absolute_path(options_.settings->file));
    }
    keep_scale(&rest);
    launch_.argv.insert(launch_.argv.end(), rest.begin(), rest.end());
    if (int exit = plan_environment(); exit != kOpsOk) return exit;
    return try_out();
  }

  // What `machina scale` has asked for since the start is asked for on.
  void keep_scale(std::vector<std::string>* argv) {
    if (!file_.supervisor.empty() ||
        options_.settings->overrides.count("MACHINA_WORKERS") > 0) {
      return;
    }
    Probe stats = probe(*options_.settings, root_socket(found_.root), "/stats");
    auto numbers = nlohmann::json::parse(stats.body, nullptr, false);
    if (!numbers.is_object() || !numbers["workers"].is_object()) return;
    const int now = numbers["workers"].value("configured", file_.workers);
    if (now == file_.workers) return;
    set_flag(argv, "--workers", std::to_string(now));
    json_["workers_kept"] = now;
  }

  // It starts the next server itself, as its unit says, and the pool.
  int refuse_what_systemd_does() {
    for (const auto& [name, flag] : flags()) {
      if (options_.settings->overrides.count(name) == 0) continue;
      return failed(flag +
                        ": systemd starts the next server with the unit's "
                        "settings: write " +
                        name + " into the configuration file instead",
                    kOpsUsage);
    }
    if (options_.replace_pool) {
      return failed(
          "--pool: systemd runs the pool: systemctl restart machina-pool",
          kOpsUsage);
    }
    return kOpsOk;
  }

  // systemd may show a unit's credentials to that unit alone: then the trial
  // has what the configuration file names.
  bool hidden_credential(const std::string& entry) const {
    const std::size_t path = entry.find("=/run/credentials/");
    return !file_.supervisor.empty() && path != entry.npos &&
           ::access(entry.c_str() + path + 1, R_OK) != 0;
  }

  // The old server's settings, and secrets from here: they are not recorded.
  int plan_environment() {
    std::vector<std::string> ours = child_environment();
    auto given = [&](const std::string& name) -> std::string {
      for (const auto& entry : ours) {
        if (entry.starts_with(name + "=") && entry.size() > name.size() + 1) {
          return entry;
        }
      }
      return "";
    };
    for (const auto& entry : ours) {
      if (!entry.starts_with("MACHINA_")) launch_.environment.push_back(entry);
    }
    for (const auto& entry : file_.environment) {
      if (!hidden_credential(entry)) launch_.environment.push_back(entry);
    }
    for (const auto& secret : file_.secrets) {
      std::string entry = given(secret);
      if (entry.empty()) entry = given(secret + "_FILE");
      if (entry.empty()) {
        return failed("the running server was given " + secret +
                          " in its environment, which nothing keeps: set it "
                          "here too, or start it with " +
                          secret + "_FILE",
                      kOpsUsage);
      }
      launch_.environment.push_back(entry);
    }
    return kOpsOk;
  }

  int try_out() {
    if (auto ok = try_launch(launch_); !ok) {
      return failed(
          "a server would not start with these settings; the running one was "
          "not touched. It said:\n" +
              ok.error().what,
          kOpsUsage);
    }
    return kOpsOk;
  }

  // 2
  int hand_over() {
    began_ = steady_ms();
    auto old = Held::hold(file_.id);
    if (old) {
      if (auto ok = old->signal(SIGUSR2); !ok) {
        return failed(ok.error().what, kOpsPartial);
      }
      auto until =
          began_ + static_cast<std::int64_t>(options_.handover_seconds * 1000);
      while (!old->ended(0) && steady_ms() < until) {
        taker_.take(file_.id.pid, kPollMs / 5);
      }
      if (!old->ended(0)) {
        return failed("the old server, process " +
                          std::to_string(file_.id.pid) +
                          ", has not let go; it is handing over still. Wait, "
                          "or end it (machina ops kill), then machina ops "
                          "start",
                      kOpsPartial);
      }
    }
    taker_.take(file_.id.pid, 1);
    json_["handover_ms"] = steady_ms() - began_;
    json_["sockets_passed"] = taker_.sockets().size();
    return kOpsOk;
  }

  // 3
  int start_next() {
    if (!file_.supervisor.empty()) return await_supervisor();
    launch_.sockets = taker_.sockets();
    auto launched = Launched::start(launch_);
    if (!launched) return failed(launched.error().what, kOpsPartial);
    json_["new_pid"] = launched->pid();
    Ready state = await_ready(options_, root_socket(found_.root), &*launched);
    json_["serve_log"] = launched->log_path();
    if (!state.ready) {
      json_["log_tail"] = launched->log_tail();
      if (launched->ended() != -1) json_["exit_code"] = launched->ended();
      return failed("the old server has let go and the new one is not ready: " +
                        state.why + "; its log ends:\n" + launched->log_tail(),
                    kOpsPartial);
    }
    json_["restart_ms"] = steady_ms() - began_;
    return kOpsOk;
  }

  // systemd starts the next one, and keeps the sockets meanwhile.
  int await_supervisor() {
    auto until =
        began_ + static_cast<std::int64_t>(options_.wait_seconds * 1000);
    while (steady_ms() < until) {
      auto now = detect(found_.root);
      if (now && now->serve && now->serve_file->id.pid != file_.id.pid) {
        json_["new_pid"] = now->serve_file->id.pid;
        Ready state = await_ready(options_, root_socket(found_.root), nullptr);
        if (!state.ready) return failed(state.why, kOpsPartial);
        json_["restart_ms"] = steady_ms() - began_;
        return kOpsOk;
      }
      ::usleep(kPollMs * 1000);
    }
    return failed(
        "the old server has let go and systemd started no other: systemctl "
        "status machina; its unit needs Restart=always",
        kOpsPartial);
  }

  // 4
  int look_at_it() {
    auto now = detect(found_.root);
    if (!now || !now->serve) {
      return failed("the new server has ended again", kOpsPartial);
    }
    if (json_["new_pid"] != now->serve->process.id.pid) {
      return failed("another server took the root meanwhile, process " +
                        std::to_string(now->serve->process.id.pid),
                    kOpsPartial);
    }
    bool kept = !found_.pool || (now->pool && now->pool->process.id.pid ==
                                                  found_.pool->process.id.pid);
    json_["pool_kept"] = kept;
    if (options_.replace_pool && found_.pool && kept) {
      std::string why = replace_pool();
      if (!why.empty()) return failed(why, kOpsPartial);
      json_["pool_kept"] = false;
      kept = true;  // as was asked
    }
    Health health = await_health(options_, *now);
    (void)write_report(found_.root, "health.report.json",
                       health.json->dump(1) + "\n");
    json_["new_version"] = now->serve_file->version;
    json_["serve_host"] = now->serve_file->host;
    json_["serve_port"] = now->serve_file->port;
    json_["health"] = (*health.json)["checks"];
    if (!kept) return failed("the pool did not outlive this", kOpsPartial);
    if (health.exit != kOpsOk) {
      return failed("the new server is not well:\n" + health.text, kOpsPartial);
    }
    json_["ok"] = true;
    std::string text = "process " + std::to_string(file_.id.pid) +
                       " handed over to " + json_["new_pid"].dump() + " in " +
                       json_["restart_ms"].dump() + " ms\n";
    return give_report(options_, found_.root, "restart.report.json", json_,
                       text, kOpsOk);
  }

  // The server starts another pool as soon as this one has left.
  std::string replace_pool() {
    auto old = Held::hold(found_.pool->process.id);
    if (old) {
      if (auto ok = old->signal(SIGTERM); !ok) return ok.error().what;
      std::int64_t until =
          steady_ms() + static_cast<std::int64_t>(options_.wait_seconds * 1000);
      while (!old->ended(kPollMs) && steady_ms() < until) {
      }
      if (!old->ended(0)) return "the old pool has not left yet";
    }
    std::int64_t until =
        steady_ms() + static_cast<std::int64_t>(options_.wait_seconds * 1000);
    while (steady_ms() < until) {
      auto now = detect(found_.root);
      if (now && now->pool) {
        json_["pool_replaced"] = true;
        json_["new_pool_pid"] = now->pool->process.id.pid;
        return "";
      }
      ::usleep(kPollMs * 1000);
    }
    return "the old pool has left and no other was started";
  }

  int failed(const std::string& why, int exit) {
    json_["error"] = why;
    if (!options_.text) fail(exit, why);  // else the report says it
    return give_report(options_, found_.root, "restart.report.json", json_,
                       why + "\n", exit);
  }

  const OpsOptions& options_;
  Detected found_;
  const PidFile file_;
  Launch launch_;
  OpsJson json_;
  Taker taker_{found_.root};
  std::int64_t began_ = 0;
};

}  // namespace

int ops_restart(const OpsOptions& options) {
  auto config = load(*options.settings);
  if (!config) return kOpsUsage;
  auto found = detect(config->typed().root);
  std::optional<OpsLock> lock;
  if (found) {
    // A trial too: it listens where the old server brings its sockets.
    auto taken = OpsLock::take(found->root, kOpsLockWaitMs);
    if (taken) {
      lock.emplace(std::move(*taken));
      found = detect(found->root);  // another verb may just have changed it
    } else if (found->serve || taken.error().code == Code::conflict) {
      return fail(kOpsPartial, taken.error().what);
    }
  }
  if (!found || !found->serve) {
    lock.reset();  // start takes it itself
    std::cerr << "machina: no server runs there; starting one\n";
    return ops_start(options);
  }
  return Restart(options, std::move(*found)).run();
}

}  // namespace machina::cli
