#include "tools/checklist.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include "tools/promises.h"

namespace machina {
namespace {

constexpr std::size_t kSecretBytesMin = 16;
constexpr std::uint64_t kDiskFailBytes = 1ull << 30;

class List {
 public:
  List(const Config& config, const ProductionFacts& facts)
      : config_(config), facts_(facts) {}

  std::vector<Check> take() {
    user();
    profile();
    running_settings();
    root();
    shell();
    kinds();
    repo_roots();
    http_hosts();
    policies();
    isolation();
    seccomp();
    bwrap();
    log_export();
    access_log();
    leases();
    plugins();
    metrics();
    authentication();
    secrets();
    address();
    rate_limits();
    durability();
    disk();
    verify();
    backup();
    return std::move(checks_);
  }

 private:
  void pass(const char* name, const std::string& what) {
    checks_.push_back({name, Verdict::pass, what, ""});
  }
  void warn(const char* name, const std::string& what,
            const std::string& remedy) {
    checks_.push_back({name, Verdict::warn, what, remedy});
  }
  // Of a part that is not there: `set` are its variables that somebody set.
  void none(const char* name, const std::string& what,
            std::initializer_list<const char*> variables = {}) {
    std::string set;
    for (const char* variable : variables) {
      if (is_default(variable)) continue;
      set += (set.empty() ? "" : ", ") + std::string(variable);
    }
    checks_.push_back({name, Verdict::none,
                       what + (set.empty() ? "" : "; no effect yet: " + set),
                       ""});
  }
  void fail(const char* name, const std::string& what,
            const std::string& remedy) {
    checks_.push_back({name, Verdict::fail, what, remedy});
  }
  const std::string& text(const char* name) const { return config_.text(name); }
  std::string path() const { return text("MACHINA_ROOT"); }
  // By profile or built in: nobody chose it.
  bool is_default(const char* name) const {
    return config_.values().find(name)->second.is_default();
  }

  void user() {
    if (facts_.uid != 0) return pass("user", "not root");
    // Not a failure: without a delegated control group only root reaches L3,
    // and what runs foreign code has given root up.
    warn("user",
         std::string(facts_.server_runs ? "the server runs" : "it would run") +
             " as root: pool, workers and jobs give that up for uids from "
             "MACHINA_SLOT_UID_BASE on, the server and the spawner keep it",
         "run as a user of its own: ops/install.sh makes one, with units that "
         "delegate it a control group");
  }

  // The other lines are about the settings of the server that runs, if any.
  void running_settings() {
    if (!facts_.server_runs) {
      return pass("running_settings",
                  "no server runs; these are of one that would be started");
    }
    if (facts_.running_differs.empty()) {
      return pass("running_settings",
                  "the server runs with this configuration");
    }
    constexpr std::size_t kNamed = 3;
    std::string what = "the server runs with other settings than configured: ";
    for (std::size_t i = 0; i < facts_.running_differs.size(); ++i) {
      if (i == kNamed) {
        what += "; and " + std::to_string(facts_.running_differs.size() - i) +
                " more";
        break;
      }
      what += (i == 0 ? "" : "; ") + facts_.running_differs[i];
    }
    fail("running_settings", what,
         "machina ops restart (or systemctl reload machina) takes what is "
         "configured; what was given at its start belongs into the "
         "configuration");
  }

  void profile() {
    if (facts_.server_runs && facts_.running_profile != "prod") {
      return fail("profile", "the server runs as " + facts_.running_profile,
                  facts_.configured_profile == "prod"
                      ? "the configuration says prod: machina ops restart"
                      : "set MACHINA_PROFILE=prod in the configuration file, "
                        "then machina ops restart");
    }
    if (facts_.configured_profile == "prod") return pass("profile", "prod");
    fail("profile", "a server would start as " + facts_.configured_profile,
         "set MACHINA_PROFILE=prod in the configuration file");
  }

  void root() {
    if (!facts_.root_there) {
      fail("root", path() + " is not there",
           "install -d -m 700 -o machina " + path());
    } else if (facts_.root_owner != facts_.uid) {
      fail("root",
           path() + " belongs to uid " + std::to_string(facts_.root_owner) +
               ", this is uid " + std::to_string(facts_.uid),
           "run doctor as the user that serves, or chown the root");
    } else if (!facts_.root_fault.empty()) {
      fail("root", facts_.root_fault,
           "name the root by a path that nobody else can change");
    } else if ((facts_.root_mode & 077) != 0) {
      char mode[8];
      std::snprintf(mode, sizeof mode, "%04o", facts_.root_mode & 07777);
      fail("root", path() + " is open to others (mode " + mode + ")",
           "chmod 700 " + path());
    } else {
      pass("root", path() + ", ours alone");
    }
    if (!facts_.file_system_trusted) {
      fail("root_file_system", "the root lies on " + facts_.file_system,
           "put it on a local disk (ext4, xfs): what forgets or is another "
           "machine's keeps no promise");
    } else {
      pass("root_file_system", facts_.file_system);
    }
    if (!facts_.mounts_below.empty()) {
      fail(
          "root_mount",
          facts_.mounts_below.front() + " is mounted below the root" +
              (facts_.mounts_below.size() > 1
                   ? ", and " + std::to_string(facts_.mounts_below.size() - 1) +
                         " more are"
                   : ""),
          "umount it, or mount it elsewhere: the root is Machina's alone");
    } else if (facts_.root_is_mount) {
      pass("root_mount", "a file system of its own");
    } else {
      warn("root_mount", "the root shares its file system with others",
           "mount a volume of its own at " + path() +
               ": a full /var then stops neither");
    }
  }

  void shell() {
    static constexpr std::array kAnything = {"sh",  "bash", "dash", "zsh",
                                             "ksh", "env",  "sudo", "busybox"};
    for (const auto& exe : config_.typed().shell_allowed_exe) {
      std::string base = exe.substr(exe.rfind('/') + 1);
      if (std::find(kAnything.begin(), kAnything.end(), base) !=
          kAnything.end()) {
        return fail(
            "shell_allow_list",
            "MACHINA_SHELL_ALLOWED_EXE holds " + exe + ", which runs anything",
            "name the programs that jobs need, and no shell");
      }
    }
    pass("shell_allow_list", text("MACHINA_SHELL_ALLOWED_EXE").empty()
                                 ? "the prod profile's own short list"
                                 : text("MACHINA_SHELL_ALLOWED_EXE"));
  }

  void kinds() {
    const auto& list = config_.typed().kinds_allowed;
    if (list.empty()) {
      return warn("kinds_allow_list", "every kind is accepted",
                  "set MACHINA_KINDS_ALLOWED to those that are used, such as "
                  "test.*,patch.*");
    }
    if (std::find(list.begin(), list.end(), "*") != list.end()) {
      return fail("kinds_allow_list",
                  "MACHINA_KINDS_ALLOWED holds *, which allows every kind",
                  "name those that are used, such as test.*,patch.*");
    }
    pass("kinds_allow_list", text("MACHINA_KINDS_ALLOWED"));
  }

  void repo_roots() {
    for (const auto& dir : config_.typed().repo_roots) {
      bool home = dir == "/home" || dir == "/root";
      bool top = std::count(dir.begin(), dir.end(), '/') < 2;
      if (top || home) {
        return fail("repo_roots", "MACHINA_REPO_ROOTS opens " + dir,
                    "name the directories that hold the repositories");
      }
    }
    pass("repo_roots",
         "<root>/repos" + (text("MACHINA_REPO_ROOTS").empty()
                               ? ""
                               : ", " + text("MACHINA_REPO_ROOTS")));
  }

  void http_hosts() {
    none("http_allow_list", "jobs have no network in this version",
         {"MACHINA_HTTP_ALLOWED_HOSTS", "MACHINA_HTTP_DEFAULT_DENY"});
  }

  void policies() {
    none("policies_pinned", "this version runs no policies",
         {"MACHINA_POLICY_CMD", "MACHINA_POLICY_ALLOWED_EXE",
          "MACHINA_POLICY_ALLOWED_SCRIPT_ROOT"});
  }

  void isolation() {
    auto wanted = config_.typed().sandbox_min_level;
    std::string level = "L" + std::to_string(facts_.level);
    if (facts_.level < 0) {
      return fail("isolation", "no sandbox could be made: " + facts_.level_why,
                  "the table above names what to change");
    }
    if (facts_.level < wanted) {
      return fail("isolation",
                  "this host gives " + level + ", jobs wait for " +
                      text("MACHINA_SANDBOX_MIN_LEVEL"),
                  "the table above names what to change");
    }
    if (facts_.level < 3 || wanted < 3) {
      return warn("isolation",
                  level + " here, " + text("MACHINA_SANDBOX_MIN_LEVEL") +
                      " is enough for a job",
                  "reach L3 (the table above), and unset "
                  "MACHINA_SANDBOX_MIN_LEVEL");
    }
    pass("isolation", level + ", and no job runs with less than " +
                          text("MACHINA_SANDBOX_MIN_LEVEL"));
  }

  void seccomp() {
    if (!config_.typed().seccomp_enable) {
      return fail("seccomp", "MACHINA_SECCOMP_ENABLE=0: no allow-list",
                  "set it to 1");
    }
    pass("seccomp", "an allow-list, without sockets");
  }

  void bwrap() {
    if (config_.typed().bwrap_required) {
      return fail("sandbox_required",
                  "MACHINA_BWRAP_REQUIRED=1: this version has its own "
                  "launcher, not bubblewrap, and does not start",
                  "unset it");
    }
    pass("sandbox_required",
         "always: the built-in launcher fails closed, a job without its level "
         "does not run");
  }

  void log_export() {
    const std::string& file = text("MACHINA_LOG_FILE");
    const bool lost = facts_.log_goes_to == "/dev/null" ||
                      facts_.log_goes_to.starts_with("/dev/pts/") ||
                      facts_.log_goes_to.starts_with("/dev/tty");
    if (file.empty() && lost) {
      fail("log_export",
           "the server's lines go to " + facts_.log_goes_to +
               ", where nobody keeps them",
           "set MACHINA_LOG_FILE, or start it by systemd or machina ops start");
    } else if (text("MACHINA_LOG_LEVEL") == "error" &&
               !is_default("MACHINA_LOG_LEVEL")) {
      fail(
          "log_export",
          "MACHINA_LOG_LEVEL=error: what was done, and by whom, leaves no line",
          "set it to info");
    } else if (text("MACHINA_LOG_FORMAT") != "json") {
      warn("log_export", "the log is text",
           "set MACHINA_LOG_FORMAT=json, and collect it");
    } else if (file.empty() && !facts_.supervised) {
      warn("log_export",
           "the server's lines go to " + (facts_.log_goes_to.empty()
                                              ? "standard error"
                                              : facts_.log_goes_to),
           "set MACHINA_LOG_FILE, or run it under systemd");
    } else {
      pass("log_export",
           file.empty() ? "JSON, kept by systemd" : "JSON, " + file);
    }
    log_rotation(file);
  }

  void log_rotation(const std::string& file) {
    std::uint64_t most = config_.typed().log_max_bytes;
    std::uint64_t total = config_.typed().log_total_bytes;
    if (total > facts_.disk_bytes / 4) {
      return fail(
          "log_rotation",
          "MACHINA_LOG_TOTAL_BYTES is more than a quarter of the disk",
          "lower it to at most " + std::to_string(facts_.disk_bytes / 4));
    }
    if (file.empty()) {
      if (facts_.supervised) {
        return pass("log_rotation", "by systemd's journal");
      }
      // machina ops start has the server keep this one within its bounds.
      if (facts_.log_goes_to.ends_with("/ops/serve.log")) {
        return pass("log_rotation", "by the server: " + facts_.log_goes_to);
      }
      return warn("log_rotation",
                  "the server's lines go to standard error: who keeps them "
                  "must rotate them",
                  "set MACHINA_LOG_FILE, or run it under systemd");
    }
    if (!facts_.log_problem.empty()) {
      return fail("log_rotation", facts_.log_problem,
                  "make its directory with: install -d -m 750 -o " +
                      std::to_string(facts_.uid) + " " +
                      file.substr(0, file.rfind('/')));
    }
    // The file that is written may be over by a line, and a server that starts
    // trims what was there.
    if (facts_.log_bytes > total + most) {
      return fail("log_rotation",
                  file + " and its older files have " +
                      std::to_string(facts_.log_bytes) + " bytes, more than " +
                      std::to_string(total) +
                      ": something else writes them, or nothing rotates them",
                  "find who holds them (fuser -v " + file +
                      "*), remove the oldest, and restart the server");
    }
    pass("log_rotation", "at " + text("MACHINA_LOG_MAX_BYTES") +
                             " bytes a file, " +
                             text("MACHINA_LOG_TOTAL_BYTES") + " in all");
  }

  void access_log() {
    if (text("MACHINA_LOG_ACCESS") == "off") {
      return fail("request_id", "requests leave no line with their id",
                  "set MACHINA_LOG_ACCESS=sampled, and have clients send "
                  "X-Request-Id");
    }
    if (facts_.request_id_echoed == 0) {
      return fail("request_id",
                  "the server that runs did not answer a request with the id "
                  "that was sent",
                  "machina ops restart: it may be of an earlier version");
    }
    if (facts_.request_id_logged == 0) {
      return fail("request_id",
                  "a request was answered, and no line with its id came to " +
                      text("MACHINA_LOG_FILE"),
                  "machina ops restart: the server that runs may log elsewhere "
                  "(MACHINA_LOG_FILE, MACHINA_LOG_LEVEL, MACHINA_LOG_ACCESS)");
    }
    if (facts_.request_id_echoed < 0 && facts_.server_runs) {
      return fail("request_id", "the server that runs did not answer",
                  "machina ops healthcheck says what it does");
    }
    if (facts_.request_id_echoed < 0) {
      return none("request_id", "no server runs here");
    }
    pass("request_id",
         facts_.request_id_logged > 0
             ? "one was sent: the answer has it, and so has the log"
             : "one was sent, and the answer has it; the log is no file that "
               "could be looked at");
  }

  void leases() {
    none("leases_enforced",
         "workers' leases are always enforced; this version has no leases of "
         "tools",
         {"MACHINA_LEASE_ENFORCE"});
  }

  void plugins() {
    none("plugins_pinned", "this version loads no plugins",
         {"MACHINA_GENESIS_ENABLE", "MACHINA_GENESIS_GUARD",
          "MACHINA_GENESIS_PROD_MODE"});
    none("plugin_capabilities", "this version loads no plugins",
         {"MACHINA_TOOLHOST_ISOLATE"});
  }

  void metrics() {
    if (!facts_.server_runs) {
      none("metrics", "no server runs here");
    } else if (!facts_.metrics_answer) {
      fail("metrics", "GET /metrics does not answer",
           "machina ops healthcheck says what is wrong");
    } else if (facts_.scraped_ago_s < 0) {
      warn("metrics", "GET /metrics answers; whether anybody asks is not known",
           "scrape it (ops/prometheus), and load the alerts");
    } else {
      pass("metrics",
           "scraped " + std::to_string(facts_.scraped_ago_s) + " s ago");
    }
  }

  void authentication() {
    bool token = !text("MACHINA_API_TOKEN").empty();
    bool hmac = !text("MACHINA_API_HMAC_SECRET").empty();
    if (facts_.running_is_open) {
      return fail("authentication", "the server that runs asks for none",
                  "set MACHINA_API_TOKEN_FILE, then machina ops restart");
    }
    if (!token && !hmac) {
      return fail("authentication", "no token and no signature secret is set",
                  "openssl rand -hex 32 > FILE; chmod 600 FILE; "
                  "MACHINA_API_TOKEN_FILE=FILE");
    }
    for (const char* name : {"MACHINA_API_TOKEN", "MACHINA_API_HMAC_SECRET"}) {
      std::size_t bytes = text(name).size();
      if (bytes > 0 && bytes < kSecretBytesMin) {
        return fail("authentication",
                    std::string(name) + " has " + std::to_string(bytes) +
                        " bytes, less than " + std::to_string(kSecretBytesMin),
                    "openssl rand -hex 32 makes a good one");
      }
    }
    pass("authentication", token && hmac ? "token and signatures"
                           : token       ? "token"
                                         : "signatures");
  }

  void secrets() {
    if (!config_.open_secrets().empty()) {
      return fail("secrets", config_.open_secrets().front(),
                  "chmod 600 the file");
    }
    for (const char* name : {"MACHINA_API_TOKEN", "MACHINA_API_HMAC_SECRET"}) {
      const auto& value = config_.values().find(name)->second;
      if (!value.text.empty() && !value.origin.ends_with("_FILE")) {
        return warn(
            "secrets",
            std::string(name) + " comes from the " + value.origin + " itself",
            "put it into a file of mode 0600 and set " + std::string(name) +
                "_FILE");
      }
    }
    pass("secrets", "in files of their owner's");
  }

  void address() {
    if (!names_loopback(text("MACHINA_HOST"))) {
      return warn("address",
                  text("MACHINA_HOST") + " is reached from outside, in clear",
                  "bind 127.0.0.1 and put a proxy with TLS in front");
    }
    pass("address", text("MACHINA_HOST"));
  }

  void rate_limits() {
    if (config_.typed().api_rpm == 0 && config_.typed().api_enqueue_rpm == 0) {
      return warn("rate_limits", "none: one client may take all",
                  "set MACHINA_API_RPM, MACHINA_API_ENQUEUE_RPM");
    }
    pass("rate_limits", text("MACHINA_API_RPM") + " a minute, enqueue " +
                            text("MACHINA_API_ENQUEUE_RPM"));
  }

  void durability() {
    if (!config_.typed().wal_enable || !config_.typed().wal_fsync) {
      return fail("durability", "what was acknowledged may be forgotten",
                  "set MACHINA_WAL_ENABLE=1 and MACHINA_WAL_FSYNC=1");
    }
    pass("durability", "a 201 survives a power cut");
  }

  void disk() {
    std::string free = std::to_string(facts_.disk_free_bytes >> 20) +
                       " MiB of " + std::to_string(facts_.disk_bytes >> 20) +
                       " are free";
    if (facts_.disk_soft_bytes > 0) {
      free += "; the server takes no new jobs below " +
              std::to_string(facts_.disk_soft_bytes >> 20) +
              " MiB, and only ends below " +
              std::to_string(facts_.disk_hard_bytes >> 20);
    }
    if (!facts_.disk_level.empty() && facts_.disk_level != "ok") {
      return fail(
          "disk",
          "level " + facts_.disk_level + ": " + facts_.disk_says + "; " + free,
          "make room, or a larger disk; it heals by itself");
    }
    if (facts_.disk_free_bytes < kDiskFailBytes ||
        facts_.disk_free_bytes < facts_.disk_bytes / 20) {
      return fail("disk", free, "make room, or a larger disk");
    }
    if (facts_.disk_free_bytes < facts_.disk_bytes / 10) {
      return warn("disk", free, "make room soon");
    }
    pass("disk", free);
  }

  void verify() {
    aged("log_verified", facts_.verified, kVerifyEveryS, "the log was checked",
         "weekly: machina wal verify --root BACKUP --record " + path());
  }
  void backup() {
    aged("backup", facts_.backup, kBackupEveryS, "a backup was checked",
         "docs/operating.md has one that works; machina wal verify --root "
         "BACKUP --record " +
             path() + " notes that it is whole");
  }
  void aged(const char* name, const Evidence& evidence, std::int64_t most_s,
            const std::string& what, const std::string& remedy) {
    if (!facts_.log_begun) return none(name, "no log has begun here");
    if (!evidence.problem.empty()) return warn(name, evidence.problem, remedy);
    if (evidence.ago_s < 0) return warn(name, "no record that " + what, remedy);
    std::string when =
        what + " " + std::to_string(evidence.ago_s / 3600) + " h ago";
    if (evidence.ago_s > kTooOld * most_s) return fail(name, when, remedy);
    if (evidence.ago_s > most_s) return warn(name, when, remedy);
    pass(name, when);
  }

  const Config& config_;
  const ProductionFacts& facts_;
  std::vector<Check> checks_;
};

}  // namespace

std::vector<Check> production_checklist(const Config& config,
                                        const ProductionFacts& facts) {
  return List(config, facts).take();
}

bool any_failed(const std::vector<Check>& checks) {
  return std::any_of(checks.begin(), checks.end(), [](const Check& check) {
    return check.verdict == Verdict::fail;
  });
}

const char* name(Verdict verdict) {
  switch (verdict) {
    case Verdict::pass:
      return "PASS";
    case Verdict::warn:
      return "WARN";
    case Verdict::fail:
      return "FAIL";
    case Verdict::none:
      return "N/A";
  }
  return "?";
}

}  // namespace machina
