// doctor: what isolation this host really gives to whoever runs it, and why
// not more. It makes a spawner and a sandbox, has the canary attack from
// inside, and reads the rest of the host's facts beside that.

#include <fcntl.h>
#include <grp.h>
#include <linux/landlock.h>
#include <pwd.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <thread>

#include "queue/verify/verify.h"
#include "server/http/descriptors.h"
#include "tools/checklist.h"
#include "tools/cli/cli.h"
#include "tools/cli/client.h"
#include "tools/cli/ops_common.h"
#include "tools/cli/pool_settings.h"
#include "tools/cli/start_conditions.h"
#include "tools/ops.h"
#include "tools/root.h"
#include "tools/trust.h"

namespace machina::cli {
namespace {

using Json = nlohmann::ordered_json;
namespace fs = std::filesystem;
using std::chrono::duration_cast;
using std::chrono::microseconds;
using std::chrono::steady_clock;

constexpr int kSyncSamples = 40;
constexpr std::size_t kEvidenceBytesMax = 64 << 10;
constexpr std::int64_t kClockGraceS = 300;

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// --- facts of the host -----------------------------------------------------

std::string user_namespaces() {
  if (first_line("/proc/sys/user/max_user_namespaces") == "0") {
    return "off (user.max_user_namespaces = 0)";
  }
  if (first_line("/proc/sys/kernel/unprivileged_userns_clone") == "0") {
    return "for root only (kernel.unprivileged_userns_clone = 0)";
  }
  if (first_line("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") ==
      "1") {
    return "restricted by AppArmor "
           "(kernel.apparmor_restrict_unprivileged_userns = 1)";
  }
  return fs::exists("/proc/self/ns/user") ? "allowed" : "not in this kernel";
}

std::string control_groups() {
  std::error_code error;
  std::string v2 = first_line("/sys/fs/cgroup/cgroup.controllers");
  if (!v2.empty()) return "v2 (" + v2 + ")";
  std::string v1;
  for (const char* name : {"memory", "pids", "cpu", "freezer"}) {
    if (fs::is_directory(std::string("/sys/fs/cgroup/") + name, error)) {
      v1 += (v1.empty() ? "" : " ") + std::string(name);
    }
  }
  if (v1.empty()) return "none mounted";
  bool may_write = ::access("/sys/fs/cgroup/memory", W_OK) == 0;
  return "v1 (" + v1 + ")" + (may_write ? "" : ", not ours to write");
}

std::string landlock() {
  long abi = ::syscall(SYS_landlock_create_ruleset, nullptr, 0,
                       LANDLOCK_CREATE_RULESET_VERSION);
  return abi > 0 ? "ABI " + std::to_string(abi) : "not in this kernel";
}

// How many all jobs may have together, and why.
std::string processes() {
  const sandbox::PidsBound bound = sandbox::pids_bound();
  return std::to_string(bound.most) + " for all jobs together (" + bound.what +
         ", less an eighth); with N workers each job has an N-th at most";
}

std::string container() {
  if (fs::exists("/.dockerenv")) return "docker";
  if (fs::exists("/run/.containerenv")) return "podman";
  std::string by_systemd = first_line("/run/systemd/container");
  return by_systemd.empty() ? "none seen" : by_systemd;
}

// The median time of one 4 KiB write with fdatasync below `dir`; -1: it could
// not be measured.
std::int64_t sync_us(const std::string& dir) {
  std::string name = dir + "/.machina-doctor-XXXXXX";
  int fd = ::mkstemp(name.data());
  if (fd < 0) return -1;
  ::unlink(name.c_str());
  std::vector<std::int64_t> times;
  std::string block(4096, 'x');
  for (int i = 0; i < kSyncSamples; ++i) {
    auto from = steady_clock::now();
    if (::pwrite(fd, block.data(), block.size(), i * 4096) != 4096 ||
        ::fdatasync(fd) != 0) {
      ::close(fd);
      return -1;
    }
    auto took = steady_clock::now() - from;
    times.push_back(duration_cast<microseconds>(took).count());
  }
  ::close(fd);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

bool in_path(const char* program) {
  for (const char* dir : {"/usr/local/bin/", "/usr/bin/", "/bin/"}) {
    if (::access((std::string(dir) + program).c_str(), X_OK) == 0) return true;
  }
  return false;
}

std::string tools_there() {
  std::string there, missing;
  for (const char* program : {"git", "python3", "pytest-3", "pytest"}) {
    std::string& list = in_path(program) ? there : missing;
    list += (list.empty() ? "" : " ") + std::string(program);
  }
  return there + (missing.empty() ? "" : " (not there: " + missing + ")");
}

Json host_facts(const std::string& root) {
  utsname name{};
  ::uname(&name);
  std::error_code error;
  std::string dir = fs::is_directory(root, error) ? root : "/var/tmp";
  std::int64_t sync = sync_us(dir);
  return {{"kernel", std::string(name.release) + " " + name.machine},
          {"uid", static_cast<std::int64_t>(::geteuid())},
          {"processors", std::thread::hardware_concurrency()},
          {"container", container()},
          {"user_namespaces", user_namespaces()},
          {"cgroups", control_groups()},
          {"landlock", landlock()},
          {"processes", processes()},
          {"root", dir},
          {"file_system", file_system_name(dir)},
          {"sync_us", sync},
          {"tools", tools_there()}};
}

// --- isolation -------------------------------------------------------------

const char* state_name(sandbox::MechanismState state) {
  switch (state) {
    case sandbox::MechanismState::active:
      return "active";
    case sandbox::MechanismState::degraded:
      return "degraded";
    case sandbox::MechanismState::disabled:
      return "disabled";
    case sandbox::MechanismState::unavailable:
      return "unavailable";
  }
  return "?";
}

std::string user_name() {
  passwd entry{};
  passwd* user = nullptr;
  char text[4096];
  if (::getpwuid_r(::geteuid(), &entry, text, sizeof text, &user) == 0 &&
      user != nullptr) {
    return user->pw_name;
  }
  return "uid " + std::to_string(::geteuid());
}

// What to change where a mechanism is not active; empty: nothing need be.
std::string advice(const sandbox::Mechanism& mechanism) {
  if (mechanism.state == sandbox::MechanismState::active) return "";
  bool root = ::geteuid() == 0;
  const std::string& name = mechanism.name;
  if (name == "userns") {
    if (root) return "none needed: each slot has a uid of its own";
    return "allow user namespaces: sysctl user.max_user_namespaces=15000; on "
           "Ubuntu 24.04 load an AppArmor profile with `userns,`; in Docker "
           "allow unshare in its seccomp profile";
  }
  if (name == "cgroup_memory" || name == "cgroup_pids") {
    if (root) return "mount cgroups with the memory and pids controllers";
    if (first_line("/sys/fs/cgroup/cgroup.controllers").empty()) {
      return "run as root: this host has cgroups v1, which cannot be delegated "
             "safely";
    }
    return "run as root, or delegate a cgroup: Delegate=yes in the unit, or "
           "systemd-run --user --scope -p Delegate=yes";
  }
  if (name == "landlock") {
    return "boot with landlock in lsm=, on kernel 5.13 or newer";
  }
  if (name == "seccomp") return "set MACHINA_SECCOMP_ENABLE=1";
  if (name == "uid") {
    if (root) return "";
    return "jobs share your uid: for one of their own install uidmap and have "
           "root run: usermod --add-subuids 300000-300063 --add-subgids "
           "300000-300063 " +
           user_name() +
           (mechanism.error == EPERM
                ? " (newuidmap failed: does NoNewPrivileges= of a unit, or a "
                  "container, forbid it?)"
                : "") +
           "; or run as root";
  }
  return root ? "needs CAP_SYS_ADMIN here: an unconfined root, not one in a "
                "container"
              : "comes with user namespaces";
}

Json isolation_facts(const sandbox::Report& report) {
  Json mechanisms = Json::object(), attacks = Json::object();
  for (const auto& each : report.mechanisms) {
    Json row = {{"state", state_name(each.state)}};
    if (each.error != 0) row["errno"] = each.error;
    if (!each.why.empty()) row["why"] = each.why;
    if (auto what = advice(each); !what.empty()) row["advice"] = what;
    mechanisms[each.name] = row;
  }
  for (const auto& [name, withstood] : report.attacks) {
    attacks[name] = withstood;
  }
  return {{"level", "L" + std::to_string(report.level)},
          {"provider", report.provider},
          {"mechanisms", mechanisms},
          {"attacks", attacks},
          {"reason", report.trouble.reason},
          {"remedy", report.trouble.remedy}};
}

const char* meaning(int level) {
  switch (level) {
    case 0:
      return "no isolation";
    case 1:
      return "Landlock, seccomp and limits, but no namespaces of its own";
    case 2:
      return "namespaces, seccomp and Landlock, but no cgroup limits or only "
             "the always-deny list";
    case 3:
      return "namespaces, allow-list seccomp, Landlock and cgroup limits";
    default:
      return "a virtual machine";
  }
}

void show_host(const Json& host) {
  Table table({"HOST", "WHAT WAS FOUND"});
  for (const auto& [name, value] : host.items()) {
    std::string text =
        value.is_string() ? value.get<std::string>() : value.dump();
    if (name == "sync_us") {
      text = value.get<std::int64_t>() < 0
                 ? "could not be measured"
                 : text + " us for 4 KiB and fdatasync (median)";
    }
    table.add({name, text});
  }
  std::cout << table.text() << "\n";
}

void show_isolation(const Json& isolation) {
  Table table({"MECHANISM", "STATE", "WHY", "WHAT TO CHANGE"});
  for (const auto& [name, each] : isolation["mechanisms"].items()) {
    std::string why = each.value("why", "");
    if (why.empty() && each.contains("errno")) {
      why = std::strerror(each["errno"].get<int>());
    }
    table.add({name, each["state"], why, each.value("advice", "")});
  }
  std::cout << table.text() << "\n";
  Table attacks({"ATTACK", "WITHSTOOD"});
  for (const auto& [name, withstood] : isolation["attacks"].items()) {
    attacks.add({name, withstood.get<bool>() ? "yes" : "NO"});
  }
  std::cout << attacks.text() << "\n";
}

void show_verdict(const Json& isolation, const Config& config) {
  std::string level = isolation["level"];
  int got = level[1] - '0';
  auto wanted = config.typed().sandbox_min_level;
  std::cout << "This host gives " << level << " to uid " << ::geteuid() << ": "
            << meaning(got) << ".\n";
  if (const std::string why = isolation.value("reason", ""); !why.empty()) {
    std::cout << "No job can run here: " << why
              << "\nTo mend it: " << isolation.value("remedy", "") << "\n";
  }
  if (got < wanted) {
    std::cout << "The " << config.typed().profile << " profile needs "
              << config.text("MACHINA_SANDBOX_MIN_LEVEL")
              << ": change what the table names, or accept less on purpose "
                 "with MACHINA_SANDBOX_MIN_LEVEL="
              << level << ".\n";
  }
}

// --- the production checklist ----------------------------------------------

// What `wal verify --record` wrote. Only what it says counts, not that the file
// is there: somebody may have touched it, or it is about another log.
Evidence read_evidence(const std::string& path, const std::string& log_uuid) {
  Evidence found;
  std::ifstream file(path, std::ios::binary);
  if (!file) return found;
  std::string text(kEvidenceBytesMax, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(file.gcount()));
  const Json json = Json::parse(text, nullptr, false);
  const auto word = [&](const char* name) {
    return json.is_object() && json.contains(name) && json[name].is_string()
               ? json[name].get<std::string>()
               : std::string();
  };
  const std::int64_t at = parse_time_ms(word("ts"));
  const std::int64_t now = ::time(nullptr);
  if (at < 0 || word("digest").size() != 64 || !json.contains("last_lsn") ||
      !json["last_lsn"].is_number_unsigned()) {
    found.problem = path + " does not say what was checked, and when";
  } else if (word("log_uuid") != log_uuid) {
    found.problem = path + " is about another log";
  } else if (at / 1000 > now + kClockGraceS) {
    found.problem = path + " is of the future: " + word("ts");
  } else {
    found.ago_s = std::max<std::int64_t>(0, now - at / 1000);
  }
  return found;
}

void look_at_evidence(const std::string& root, ProductionFacts* facts) {
  auto log = log_identity(root + "/queue");
  facts->log_begun = static_cast<bool>(log);
  if (!log) return;
  facts->verified = read_evidence(ops_dir(root) + "/wal.verified", log->uuid);
  facts->backup = read_evidence(ops_dir(root) + "/backup.taken", log->uuid);
}

// Another file system than its parent's.
bool is_mount(const std::string& path) {
  struct stat here {
  }, above{};
  return ::stat(path.c_str(), &here) == 0 &&
         ::stat((path + "/..").c_str(), &above) == 0 &&
         here.st_dev != above.st_dev;
}

// /proc/self/mountinfo writes spaces and the like as \ooo.
std::string unescaped(const std::string& field) {
  std::string out;
  for (std::size_t i = 0; i < field.size(); ++i) {
    if (field[i] == '\\' && i + 3 < field.size()) {
      out += static_cast<char>((field[i + 1] - '0') * 64 +
                               (field[i + 2] - '0') * 8 + (field[i + 3] - '0'));
      i += 3;
    } else {
      out += field[i];
    }
  }
  return out;
}

std::vector<std::string> mounts_below(const std::string& root) {
  std::error_code error;
  const std::string top = fs::weakly_canonical(root, error).string() + "/";
  std::vector<std::string> found;
  std::ifstream file("/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string skipped, where;
    fields >> skipped >> skipped >> skipped >> skipped >> where;
    where = unescaped(where);
    if (where.starts_with(top)) found.push_back(where);
  }
  return found;
}

// Whether `uid` is in that group. One whose groups are not known is given the
// benefit of the doubt.
bool in_group(std::int64_t uid, gid_t group) {
  passwd entry{};
  passwd* user = nullptr;
  char text[4096];
  if (::getpwuid_r(static_cast<uid_t>(uid), &entry, text, sizeof text, &user) !=
          0 ||
      user == nullptr) {
    return true;
  }
  gid_t groups[256];
  int count = 256;
  if (::getgrouplist(user->pw_name, user->pw_gid, groups, &count) < 0) {
    return true;
  }
  return std::find(groups, groups + count, group) != groups + count;
}

// Whether user `uid` may make and rename files there, by owner, group and mode.
bool may_write(const struct stat& dir, std::int64_t uid) {
  if (uid == 0 || ::geteuid() == uid) return true;  // access() tells
  if (dir.st_uid == uid) return (dir.st_mode & 0300) == 0300;
  if ((dir.st_mode & 0030) == 0030 && in_group(uid, dir.st_gid)) return true;
  return (dir.st_mode & 0003) == 0003;
}

void look_at_log(const Config& config, ProductionFacts* facts) {
  const std::string& path = config.typed().log_file;
  if (path.empty()) return;
  std::error_code error;
  const fs::path dir = fs::path(path).parent_path();
  struct stat status {};
  if (::stat(dir.c_str(), &status) != 0) {
    facts->log_problem = dir.string() + ": " + std::strerror(errno);
  } else if (!S_ISDIR(status.st_mode)) {
    facts->log_problem = dir.string() + " is no directory";
  } else if (!may_write(status, facts->uid) ||
             (::geteuid() == facts->uid &&
              ::access(dir.c_str(), W_OK | X_OK) != 0)) {
    facts->log_problem = dir.string() + " cannot be written by uid " +
                         std::to_string(facts->uid) +
                         ": files there are neither made nor renamed";
  } else if (::lstat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) {
    facts->log_problem = path + " is no regular file: it is not rotated";
  }
  const std::string name = fs::path(path).filename().string();
  for (const auto& entry : fs::directory_iterator(dir, error)) {
    const std::string other = entry.path().filename().string();
    if (other == name || other.starts_with(name + ".")) {
      const auto size = entry.file_size(error);
      if (!error) facts->log_bytes += size;
    }
  }
}

// The last of `path`, where a line that was just written is.
bool ends_with_line_of(const std::string& path, const std::string& word) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return false;
  const std::streamoff size = file.tellg(), back = 1 << 20;
  file.seekg(std::max<std::streamoff>(0, size - back));
  std::string text((std::istreambuf_iterator<char>(file)), {});
  return text.find(word) != std::string::npos;
}

// One request with an id of its own, and a look at what became of the id.
void follow_request_id(const Settings& settings, const Config& config,
                       const std::string& socket, ProductionFacts* facts) {
  Settings there = settings;
  there.overrides["MACHINA_SERVER"] = socket;
  auto to = Config::load(environment(), there.overrides, there.file);
  if (!to) return;
  auto client = Client::open(*to);
  if (!client) return;
  const std::string id = "doctor-" + std::to_string(::getpid()) + "-" +
                         std::to_string(steady_ms());
  Client::Request request;
  request.path = "/v1/jobs?limit=1";
  request.headers = {"X-Request-Id: " + id};
  request.timeout_ms = 3000;
  auto answer = (*client)->call(request);
  if (!answer) return;
  facts->request_id_echoed = answer->headers["x-request-id"] == id ? 1 : 0;
  const std::string& log = config.typed().log_file;
  std::error_code error;
  if (log.empty()) return;
  if (!fs::exists(log, error)) {
    facts->request_id_logged = 0;
    return;
  }
  if (::access(log.c_str(), R_OK) != 0) return;
  // It is written by another thread, a moment later; of a busy server's sampled
  // lines ours may be one that is left out, so it is asked again.
  for (int i = 0; i < 40; ++i) {
    if (i % 8 == 7) (void)(*client)->call(request);
    facts->request_id_logged = ends_with_line_of(log, id) ? 1 : 0;
    if (facts->request_id_logged == 1) return;
    ::usleep(50'000);
  }
}

void look_at_root(const std::string& root, ProductionFacts* facts) {
  struct stat status {};
  if (::stat(root.c_str(), &status) == 0 && S_ISDIR(status.st_mode)) {
    facts->root_there = true;
    if (auto ok = check_trusted("MACHINA_ROOT", root, true); !ok) {
      facts->root_fault = ok.error().what;
    }
    facts->root_owner = status.st_uid;
    facts->root_mode = static_cast<int>(status.st_mode & 07777);
    facts->root_is_mount = is_mount(root);
    facts->mounts_below = mounts_below(root);
  }
  std::error_code error;
  std::string there = facts->root_there ? root : "/";
  facts->file_system = file_system_name(there);
  facts->file_system_trusted =
      !facts->root_there || file_system_fault(there).empty();
  struct statvfs disk {};
  if (::statvfs(there.c_str(), &disk) == 0) {
    facts->disk_free_bytes =
        static_cast<std::uint64_t>(disk.f_bavail) * disk.f_frsize;
    facts->disk_bytes =
        static_cast<std::uint64_t>(disk.f_blocks) * disk.f_frsize;
  }
  look_at_evidence(root, facts);
}

void look_at_server(const Settings& settings, const Config& config,
                    const std::string& root, ProductionFacts* facts) {
  auto found = detect(root);
  if (!found || !found->serve) return;
  facts->server_runs = true;
  facts->supervised = found->serve_file->supervisor == "systemd";
  facts->running_profile = found->serve_file->profile;
  facts->uid = found->serve->process.id.uid;
  std::error_code error;
  facts->log_goes_to =
      fs::read_symlink(
          "/proc/" + std::to_string(found->serve->process.id.pid) + "/fd/2",
          error)
          .string();
  std::string socket = root_socket(found->root);
  Probe stats = probe(settings, socket, "/stats");
  facts->metrics_answer = probe(settings, socket, "/metrics").status == 200;
  auto numbers = nlohmann::json::parse(stats.body, nullptr, false);
  if (numbers.is_object() && numbers.contains("scraped_at") &&
      numbers["scraped_at"].is_string()) {
    std::int64_t at = parse_time_ms(numbers["scraped_at"]);
    if (at >= 0) facts->scraped_ago_s = ::time(nullptr) - at / 1000;
  }
  if (numbers.is_object() && numbers.contains("disk") &&
      numbers["disk"].is_object()) {
    const auto& disk = numbers["disk"];
    facts->disk_level = disk.value("level", "");
    facts->disk_says = disk.value("says", "");
    facts->disk_soft_bytes = disk.value("soft_bytes", std::uint64_t{0});
    facts->disk_hard_bytes = disk.value("hard_bytes", std::uint64_t{0});
  }
  follow_request_id(settings, config, socket, facts);
}

// `config` with what the server that runs has otherwise. Its port and workers
// are nobody's concern here, and its profile is told of by itself.
Config as_running(const Settings& settings, const Config& config,
                  ProductionFacts* facts) {
  auto found = detect(config.typed().root);
  if (!found || !found->serve) return config;
  static const std::set<std::string> kOthers = {
      "MACHINA_PROFILE", "MACHINA_ROOT", "MACHINA_PORT", "MACHINA_WORKERS",
      "MACHINA_SERVER"};
  const auto& running = found->serve_file->settings;
  Settings there = settings;
  bool asks = running.empty();
  for (const auto& row : config.table()) {
    const auto has = running.find(row.name);
    if (has == running.end() || kOthers.count(row.name) > 0) continue;
    if (row.type == Setting::Type::secret) {
      asks = asks || !has->second.empty();
      continue;
    }
    const std::string& configured = config.text(row.name);
    if (has->second == configured) continue;
    // What `ops start` gives a server whose log has no other place.
    if (std::string(row.name) == "MACHINA_LOG_FILE" &&
        has->second == ops_dir(found->root) + "/serve.log") {
      continue;
    }
    there.overrides[row.name] = has->second;
    facts->running_differs.push_back(
        std::string(row.name) + "=" + has->second +
        " (configured: " + (configured.empty() ? "nothing" : configured) + ")");
  }
  facts->running_is_open = !asks;
  auto judged = Config::load(environment(), there.overrides, there.file);
  return judged ? *judged : config;
}

std::vector<Check> checklist(const Settings& settings, const Config& config,
                             const Json& isolation) {
  ProductionFacts facts;
  Settings own = settings;  // without what doctor alone was told
  own.overrides.erase("MACHINA_PROFILE");
  auto configured = Config::load(environment(), own.overrides, own.file);
  facts.configured_profile = configured ? configured->typed().profile : "dev";
  facts.uid = ::geteuid();
  if (isolation.contains("error")) {
    facts.level_why = isolation["error"];
  } else {
    facts.level = isolation["level"].get<std::string>()[1] - '0';
  }
  look_at_root(config.typed().root, &facts);
  look_at_server(settings, config, config.typed().root, &facts);
  look_at_log(config, &facts);  // where the next server would write
  const Config judged = as_running(settings, config, &facts);
  return production_checklist(judged, facts);
}

Json checks_json(const std::vector<Check>& checks) {
  Json all = Json::array();
  for (const auto& check : checks) {
    Json row = {{"name", check.name},
                {"verdict", name(check.verdict)},
                {"what", check.what}};
    if (!check.remedy.empty()) row["remedy"] = check.remedy;
    all.push_back(row);
  }
  return all;
}

// One line per item; the remedy is on it.
void show_checks(const std::vector<Check>& checks) {
  int warned = 0, failed = 0, none = 0;
  for (const auto& check : checks) {
    std::string label = check.name;
    label.resize(std::max<std::size_t>(label.size(), 20), ' ');
    std::string verdict = name(check.verdict);
    verdict.resize(4, ' ');
    std::cout << verdict << "  " << label << "  " << harmless(check.what)
              << (check.remedy.empty() ? "" : " -- " + harmless(check.remedy))
              << "\n";
    warned += check.verdict == Verdict::warn ? 1 : 0;
    failed += check.verdict == Verdict::fail ? 1 : 0;
    none += check.verdict == Verdict::none ? 1 : 0;
  }
  std::cout << "\n"
            << checks.size() << " items: " << failed << " FAIL, " << warned
            << " WARN, " << none << " N/A\n";
}

int doctor(const Settings& settings) {
  auto config = load(settings);
  if (!config) return kUsage;
  auto report = try_isolation(*config);  // forks: before curl or a thread is
  Json host = host_facts(config->typed().root);
  // As a server would share them out that is started from here.
  auto files = take_descriptors(config->typed().api_connections,
                                config->typed().workers);
  host["open_files"] = files ? files->text() : files.error().what;
  Json isolation;
  if (report) {
    isolation = isolation_facts(*report);
  } else {
    isolation = {{"level", "L0"},
                 {"provider", "none"},
                 {"error", report.error().what},
                 {"mechanisms", Json::object()},
                 {"attacks", Json::object()}};
  }
  std::vector<Check> checks;
  if (config->prod()) checks = checklist(settings, *config, isolation);
  int exit = any_failed(checks) ? kNotSucceeded : kOk;
  if (settings.json) {
    isolation["host"] = host;
    if (config->prod()) isolation["checks"] = checks_json(checks);
    std::cout << isolation.dump() << "\n";
    return exit;
  }
  show_host(host);
  if (!report) {
    std::cout << "No sandbox could be made: " << harmless(report.error().what)
              << "\n\n";
  } else {
    show_isolation(isolation);
  }
  show_verdict(isolation, *config);
  if (config->prod()) {
    std::cout << "\n";
    show_checks(checks);
  }
  return exit;
}

}  // namespace

void add_doctor(Verb& app) {
  auto settings = std::make_shared<Settings>();
  Verb verb = app.add_verb(
      "doctor",
      "Attack a sandbox of this host and say what held; in the prod profile "
      "also the production checklist");
  add_setting(verb, settings, "--root", "MACHINA_ROOT",
              "whose disk to time and root to check");
  add_setting(verb, settings, "--profile", "MACHINA_PROFILE", "dev or prod");
  add_common(verb, settings);
  verb.run([settings] { return doctor(*settings); });
}

}  // namespace machina::cli
