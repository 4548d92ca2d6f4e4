// doctor: what isolation this host really gives to whoever runs it, and why
// not more. It makes a spawner and a sandbox, has the canary attack from
// inside, and reads the rest of the host's facts beside that.

#include <fcntl.h>
#include <linux/landlock.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <thread>

#include "tools/cli/cli.h"
#include "tools/cli/pool_settings.h"
#include "tools/root.h"
#include "workers/kinds/kinds.h"
#include "workers/sandbox/sandbox.h"

namespace machina::cli {
namespace {

using Json = nlohmann::ordered_json;
namespace fs = std::filesystem;
using std::chrono::duration_cast;
using std::chrono::microseconds;
using std::chrono::steady_clock;

// The last slot, so that a pool of the same host is not in the way.
constexpr int kDoctorSlot = 63;
constexpr int kSyncSamples = 40;

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
          {"root", dir},
          {"file_system", file_system_name(dir)},
          {"sync_us", sync},
          {"tools", tools_there()}};
}

// --- isolation -------------------------------------------------------------

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

Result<sandbox::Report> examine(const Config& config, const TempDir& dir) {
  if (dir.path().empty()) {
    return Error{Code::io, "/var/tmp: no directory can be made there"};
  }
  register_built_in_handlers();
  sandbox::SpawnerOptions options;
  options.root = dir.path();
  options.repo_roots = {dir.path() + "/repos"};
  options.slot_uid_base =
      static_cast<std::uint32_t>(config.number("MACHINA_SLOT_UID_BASE"));
  options.seccomp_enable = config.flag("MACHINA_SECCOMP_ENABLE");
  options.self_exe = self_exe();
  auto spawner = sandbox::Spawner::start(options);
  if (!spawner) return spawner.error();
  auto channel = (*spawner)->open_slot(kDoctorSlot);
  if (!channel) return channel.error();
  auto slot = sandbox::Slot::attach(*channel);
  if (!slot) return slot.error();
  return sandbox::run_canary(**slot);
}

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
    return root ? "" : "runs as you: run as root for a uid per slot";
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
          {"attacks", attacks}};
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
  auto wanted = config.number("MACHINA_SANDBOX_MIN_LEVEL");
  std::cout << "This host gives " << level << " to uid " << ::geteuid() << ": "
            << meaning(got) << ".\n";
  if (got < wanted) {
    std::cout << "The " << config.text("MACHINA_PROFILE") << " profile needs "
              << config.text("MACHINA_SANDBOX_MIN_LEVEL")
              << ": change what the table names, or accept less on purpose "
                 "with MACHINA_SANDBOX_MIN_LEVEL="
              << level << ".\n";
  }
}

int doctor(const Settings& settings) {
  auto config = load(settings);
  if (!config) return kUsage;
  TempDir dir;
  auto report = examine(*config, dir);  // forks: before curl or a thread is
  Json host = host_facts(config->text("MACHINA_ROOT"));
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
  if (settings.json) {
    isolation["host"] = host;
    std::cout << isolation.dump() << "\n";
    return kOk;
  }
  show_host(host);
  if (!report) {
    std::cout << "No sandbox could be made: " << harmless(report.error().what)
              << "\n\n";
  } else {
    show_isolation(isolation);
  }
  show_verdict(isolation, *config);
  return kOk;
}

}  // namespace

void add_doctor(CLI::App& app, int* exit) {
  auto settings = std::make_shared<Settings>();
  CLI::App* verb = app.add_subcommand(
      "doctor", "Attack a sandbox of this host and say what held");
  add_setting(*verb, settings, "--root", "MACHINA_ROOT", "whose disk to time");
  add_setting(*verb, settings, "--profile", "MACHINA_PROFILE", "dev or prod");
  add_common(*verb, settings);
  verb->callback([settings, exit] { *exit = doctor(*settings); });
}

}  // namespace machina::cli
