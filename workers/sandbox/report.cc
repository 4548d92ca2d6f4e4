// The words for what was found: levels, mechanisms, the job's `isolation`.

#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "workers/sandbox/launch.h"

namespace machina::sandbox {

namespace {

const char* const kNames[kMechs] = {
    "userns", "mountns", "pidns",    "netns",         "ipcns",
    "utsns",  "seccomp", "landlock", "cgroup_memory", "cgroup_pids",
    "uid",    "caps",    "rlimits"};

// What to do about a mechanism that is missing; for doctor.
const char* hint(const std::string& name, MechanismState state) {
  if (name == "cgroup_memory" && state == MechanismState::degraded) {
    return "buffers of sockets are not charged here: use cgroup v2, or a "
           "kernel with memory.kmem.tcp";
  }
  if (name == "userns") {
    return "allow unprivileged user namespaces (sysctl, AppArmor profile)";
  }
  if (name == "mountns" || name == "pidns" || name == "netns") {
    return "allow namespaces and mounts (CAP_SYS_ADMIN, container profile)";
  }
  if (name == "landlock") return "boot with landlock in lsm=";
  if (name.starts_with("cgroup")) {
    return "run as root, or delegate a cgroup with memory and pids";
  }
  if (name == "seccomp") return "set MACHINA_SECCOMP_ENABLE=1";
  if (name == "uid") {
    return "jobs share the pool's uid: give its user subordinate ids "
           "(usermod --add-subuids 300000-300063 --add-subgids 300000-300063 "
           "USER, package uidmap), or run as root";
  }
  return "";
}

const char* word(MechanismState state) {
  switch (state) {
    case MechanismState::active:
      return "active";
    case MechanismState::degraded:
      return "degraded";
    case MechanismState::disabled:
      return "disabled";
    case MechanismState::unavailable:
      break;
  }
  return "unavailable";
}

std::string errno_name(int error) {
  const char* name = strerrorname_np(error);
  return name ? name : std::to_string(error);
}

}  // namespace

std::string remedy_for(Stage stage, int error) {
  const bool root = geteuid() == 0;
  switch (stage) {
    case Stage::clone:
    case Stage::userns:
      if (error == ENOSPC) {
        return "raise the sysctls user.max_user_namespaces, "
               "user.max_mnt_namespaces and their like";
      }
      return root ? "give it CAP_SYS_ADMIN and, in a container, a seccomp "
                    "profile that allows clone and unshare with namespaces"
                  : "allow user namespaces to ordinary users: sysctl "
                    "kernel.unprivileged_userns_clone=1, an AppArmor profile "
                    "with `userns,`, in a container a seccomp profile that "
                    "allows clone and unshare with namespaces; or run as root";
    case Stage::proc:
      return "give it a /proc that nothing is mounted over: in Docker "
             "--security-opt systempaths=unconfined, in Kubernetes procMount: "
             "Unmasked";
    default:
      return "docs/isolation.md, \"What the host must give\", has what this "
             "needs; `machina doctor` shows each part";
  }
}

// Without a root, process and network namespace there is no sandbox of this
// provider's at all: L0. The rest takes from L3 downwards.
Level level_of(const MechWire (&mechs)[kMechs]) {
  const auto state = [&](Mech m) {
    return static_cast<MechanismState>(
        mechs[static_cast<std::size_t>(m)].state);
  };
  const auto active = [&](Mech m) {
    return state(m) == MechanismState::active;
  };
  for (Mech m : {Mech::mountns, Mech::pidns, Mech::netns, Mech::caps}) {
    if (!active(m)) return 0;
  }
  if (state(Mech::userns) == MechanismState::unavailable) return 0;
  if (state(Mech::seccomp) == MechanismState::unavailable) return 0;
  if (!active(Mech::landlock) || !active(Mech::rlimits)) return 1;
  for (Mech m : {Mech::seccomp, Mech::cgroup_memory, Mech::cgroup_pids,
                 Mech::ipcns, Mech::utsns}) {
    if (!active(m)) return 2;
  }
  return 3;
}

std::vector<Mechanism> mechanisms_of(const MechWire (&mechs)[kMechs]) {
  std::vector<Mechanism> all;
  for (std::size_t i = 0; i < kMechs; ++i) {
    Mechanism m;
    m.name = kNames[i];
    m.state = static_cast<MechanismState>(mechs[i].state);
    m.error = mechs[i].error;
    if (m.state == MechanismState::degraded ||
        m.state == MechanismState::unavailable) {
      if (m.error) m.why = std::string(std::strerror(m.error)) + ": ";
      m.why += hint(m.name, m.state);
    }
    all.push_back(std::move(m));
  }
  return all;
}

std::string isolation_json(const Report& report, Level requested) {
  std::string out = "{\"level\":\"L" + std::to_string(report.level) +
                    "\",\"requested\":\"L" + std::to_string(requested) +
                    "\",\"provider\":\"" + report.provider +
                    "\",\"mechanisms\":{";
  bool first = true;
  for (const auto& m : report.mechanisms) {
    if (!first) out += ',';
    first = false;
    out += '"' + m.name + "\":{\"state\":\"" + word(m.state) + '"';
    if (m.error) out += ",\"errno\":\"" + errno_name(m.error) + '"';
    out += '}';
  }
  return out + "},\"denied\":\"unavailable\"}";
}

}  // namespace machina::sandbox
