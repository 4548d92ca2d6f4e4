#include "tools/cli/start_conditions.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "queue/base/line_file.h"
#include "queue/verify/verify.h"
#include "server/api/server.h"
#include "tools/cli/ops_common.h"
#include "tools/cli/pool_settings.h"
#include "tools/ops.h"
#include "tools/promises.h"
#include "tools/root.h"
#include "workers/kinds/kinds.h"

namespace machina::cli {
namespace {

namespace fs = std::filesystem;

constexpr long kAskMs = 3000;  // a server that runs
// The last slot, so that a pool of the same host is not in the way.
constexpr int kTrialSlot = 63;
constexpr int kLocked = 75, kDamaged = 65, kIoFailed = 74;

class TempDir {
 public:
  TempDir() {
    path_ = "/var/tmp/machina-doctor-XXXXXX";
    if (::mkdtemp(path_.data()) == nullptr) path_.clear();
    if (!path_.empty()) {
      for (const char* sub : {"mirrors", "repos"}) {
        fs::create_directory(path_ + "/" + sub);
      }
    }
  }
  ~TempDir() {
    std::error_code error;
    if (!path_.empty()) fs::remove_all(path_, error);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

Result<void> listening_fault(Result<void> tried) {
  if (tried || tried.error().code != Code::conflict) return tried;
  return Error{Code::conflict,
               "MACHINA_PORT: " + tried.error().what +
                   "; another program has it (ss -ltnp shows which): end that "
                   "one, or choose another port"};
}

// The address is another's: not of the server that is to be replaced.
Result<void> check_port(const Config& config, const Detected* running) {
  const std::string& host = config.typed().host;
  const int port = config.typed().port;
  if (running != nullptr && running->serve_file->host == host &&
      running->serve_file->port == port) {
    return {};
  }
  return listening_fault(can_listen(host, port));
}

// What lies in a root in the place of what a start opens or makes there.
StartFault files_fault(const std::string& root, bool pool) {
  struct Place {
    const char* name;
    mode_t type;
    const char* is;
    bool follow;
    int exit;
  };
  constexpr Place kPlaces[] = {
      {"machina.sock", S_IFSOCK, "a socket", false, kUsage},
      {"patches", S_IFDIR, "a directory", true, kIoFailed},
      {"patches/patches.db", S_IFREG, "a regular file", true, kIoFailed},
      {"pool.lock", S_IFREG, "a regular file", false, kUsage},
  };
  for (const Place& place : kPlaces) {
    if (!pool && std::string_view(place.name) == "pool.lock") continue;
    const std::string path = root + "/" + place.name;
    struct stat status {};
    if ((place.follow ? ::stat(path.c_str(), &status)
                      : ::lstat(path.c_str(), &status)) != 0) {
      continue;
    }
    const bool is = (status.st_mode & S_IFMT) == place.type;
    if (is && ::access(path.c_str(), R_OK | W_OK) == 0) continue;
    return {place.exit,
            "MACHINA_ROOT: " + path +
                (is ? " cannot be read and written by this user; chown it"
                    : std::string(" is there and is not ") + place.is +
                          ", which a start needs there; move it away")};
  }
  return {};
}

// Of a server that runs the workers have proven a level, and they stay; else
// it is tried out, as the pool's workers would.
Result<void> check_level(const Settings& settings, const Config& config,
                         const Detected* running, bool no_pool) {
  const auto least = static_cast<int>(config.typed().sandbox_min_level);
  if (!config.prod() || config.typed().workers == 0) return {};
  const auto word = [](int level) { return "L" + std::to_string(level); };
  int has = -1;
  if (running != nullptr) {
    OpsOptions asking;
    *asking.settings = settings;
    has = look_at_workers(asking, root_socket(running->root), kAskMs).level;
  }
  const bool known = has >= 0;
  if (!known && no_pool) return {};
  if (!known) {
    auto tried = try_isolation(config);
    if (!tried) {
      return Error{Code::invalid,
                   "MACHINA_SANDBOX_MIN_LEVEL: no sandbox can be made here: " +
                       tried.error().what + "; machina doctor says more"};
    }
    has = tried->level;
  }
  if (has >= least) return {};
  return Error{Code::invalid,
               "MACHINA_SANDBOX_MIN_LEVEL: " + word(least) +
                   " is asked for, and " +
                   (known ? "the workers that run here have proven "
                          : "a sandbox of this user reaches ") +
                   word(has) +
                   "; machina doctor says what to change, or accept less on "
                   "purpose"};
}

}  // namespace

std::vector<std::string> settings_faults(const Config& config) {
  std::vector<std::string> lines = start_refusals(config);
  // A malformed pattern would silently allow nothing.
  for (const auto& pattern : config.typed().kinds_allowed) {
    if (!valid_kind_pattern(pattern)) {
      lines.push_back("MACHINA_KINDS_ALLOWED: \"" + pattern +
                      "\" must be a kind, or one that ends in .*");
    }
  }
  return lines;
}

std::string log_file_fault(const std::string& what) {
  return "MACHINA_LOG_FILE: " + what +
         "; name a file below a directory that this user may write, such as "
         "<root>/logs/server.log";
}

Result<void> probe_port(const Config& config) {
  std::error_code error;
  if (fs::exists(config.typed().root + "/queue", error)) return {};
  return check_port(config, nullptr);
}

StartFault place_fault(const Settings& settings, const Config& config,
                       bool unsafe_fs, bool no_pool, long* takes_over) {
  const std::string& path = config.typed().root;
  const auto fault = [](const std::string& what) {
    return StartFault{kUsage, what};
  };
  *takes_over = 0;
  if (auto ok = examine_root(path, config.prod(), unsafe_fs); !ok) {
    return fault(ok.error().what);
  }
  const std::string& log = config.typed().log_file;
  if (!log.empty()) {
    auto ok = check_log_file(log);
    if (ok) ok = LineFile::examine(log);
    if (!ok) return fault(log_file_fault(ok.error().what));
  }
  const bool pool = !no_pool && config.typed().workers != 0;
  if (auto found = files_fault(path, pool); !found.what.empty()) return found;
  auto found = detect(path);
  const Detected* running = found && found->serve ? &*found : nullptr;
  if (running != nullptr) {
    *takes_over = running->serve->process.id.pid;
  } else if (auto free = hold_log(path + "/queue");
             !free && free.error().code == Code::conflict) {
    return {kLocked, free.error().what};
  } else if (auto whole = examine_log(path + "/queue"); !whole) {
    return {kDamaged, whole.error().what};
  }
  // Before the address: libuv, once it has begun, closes in every child of a
  // fork the numbers that its pipes have here, which are others' in a spawner.
  if (auto ok = check_level(settings, config, running, no_pool); !ok) {
    return fault(ok.error().what);
  }
  if (auto ok = check_port(config, running); !ok) {
    return fault(ok.error().what);
  }
  return {};
}

Result<sandbox::Report> try_isolation(const Config& config) {
  TempDir dir;
  if (dir.path().empty()) {
    return Error{Code::io, "/var/tmp: no directory can be made there"};
  }
  register_handlers(built_in_families());
  sandbox::SpawnerOptions options;
  options.root = dir.path();
  options.repo_roots = {dir.path() + "/repos"};
  options.slot_uid_base = config.typed().slot_uid_base;
  options.seccomp_enable = config.typed().seccomp_enable;
  options.self_exe = self_exe();
  if (auto trouble = sandbox::host_trouble(options); trouble.any()) {
    return Error{Code::unavailable,
                 trouble.reason + "; to mend it: " + trouble.remedy};
  }
  auto spawner = sandbox::Spawner::start(options);
  if (!spawner) return spawner.error();
  auto channel = (*spawner)->open_slot(kTrialSlot);
  if (!channel) return channel.error();
  auto slot = sandbox::Slot::attach(*channel);
  if (!slot) return slot.error();
  return sandbox::run_canary(**slot);
}

}  // namespace machina::cli
