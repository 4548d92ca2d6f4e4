// The spawner: forked by the pool before any thread exists, and the only part
// that keeps its privilege. It forks a keeper per slot, and when a keeper ends
// it proves the slot empty before it tells the pool.

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

#include "queue/base/check.h"
#include "queue/base/logger.h"
#include "workers/sandbox/landlock.h"
#include "workers/sandbox/launch.h"

extern char** environ;

namespace machina::sandbox {

namespace {

constexpr int kAnswerMs = 10'000;
constexpr char kRemedyIds[] =
    "run it as the host's root or as an ordinary user, outside of that "
    "namespace; or map these ids into it (unshare --map-auto, newuidmap); or "
    "set MACHINA_SLOT_UID_BASE so that they lie within what is mapped";

std::map<std::string, Builtin, std::less<>>& builtins() {
  static std::map<std::string, Builtin, std::less<>> all;
  return all;
}

// --- the spawner's own process ---

class SpawnerProcess {
 public:
  SpawnerProcess(const SpawnerOptions& options, int control, int events,
                 pid_t pool)
      : options_(options), control_(control), events_(events), pool_(pool) {}

  [[noreturn]] void run() {
    host_ = find_host(options_);
    set_logger("spawner");
    LogLine(Severity::debug, "started", "sandboxes can be made")
        .with("pid", getpid())
        .with("uid", geteuid());
    set_slots(options_.slots);
    // Orphans of a keeper that died come to us, to be waited for.
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    if (send_struct(control_, Status{})) leave();
    sigset_t chld;
    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    sigprocmask(SIG_BLOCK, &chld, nullptr);
    // An ignored signal, its default, would not end the wait below: a slot
    // would be found empty only at the next tick.
    signal(SIGCHLD, [](int) {});
    for (;;) {
      pollfd item{control_, POLLIN, 0};
      timespec tick{1, 0};
      sigset_t none;
      sigemptyset(&none);
      const int n = ppoll(&item, 1, &tick, &none);
      reap();
      tell();
      if (n > 0 && item.revents && !serve()) leave();
      // Whoever else holds the pool's end of our socket, the pool has gone.
      if (getppid() != pool_) leave();
    }
  }

 private:
  struct Keeper {
    pid_t pid = 0;       // 0: none, or reaped
    bool ended = false;  // reaped, and its slot not yet emptied
    int link = -1;       // the spawner's end of KeeperLink
  };

  // False: the pool has gone. A request that could not be served is answered.
  bool serve() {
    OpenSlot request;
    int channel[1] = {-1};
    std::size_t count = 0;
    if (!recv_struct(control_, request, channel, &count)) return false;
    Status status{0, request.number};
    if (request.slot == kConnectServer && count == 0) {
      const int fd = connect_unix(options_.socket_path);
      if (fd >= 0) {
        status.error = send_struct(control_, status, std::span(&fd, 1));
        close(fd);
        if (status.error == 0) return true;
        if (gone(status.error)) return false;
      } else {
        status.error = -fd;
      }
      return send_struct(control_, status) == 0;
    }
    if (request.slot == kSetSlots && count == 0) {
      set_slots(request.count);
      return send_struct(control_, status) == 0;
    }
    if (count != 1 || request.slot < 0 || request.slot >= kSlotsMax) {
      status.error = EINVAL;
    } else if (keepers_[static_cast<std::size_t>(request.slot)].link >= 0) {
      status.error = EBUSY;
    } else {
      status.error = start_keeper(request.slot, channel[0]);
    }
    if (status.error != 0) {
      LogLine(Severity::warn, "slot_failed", std::strerror(status.error))
          .with("slot", request.slot);
    }
    if (count) close(channel[0]);
    return send_struct(control_, status) == 0;
  }

  void set_slots(int count) {
    const int before = slots_;
    slots_ = std::clamp(count, 1, kSlotsMax);
    for (const auto& keeper : keepers_) {
      if (keeper.link >= 0) send_struct(keeper.link, Slots{slots_});
    }
    const std::uint64_t part = pids_part(host_.pids, slots_);
    if (slots_ == before || part >= options_.pids_max) return;
    LogLine(
        Severity::warn, "pids_bounded",
        std::to_string(slots_) + " workers of up to " +
            std::to_string(options_.pids_max) +
            " processes a job (MACHINA_SANDBOX_MAX_PIDS) are more than this "
            "host has (" +
            host_.pids.what +
            ", an eighth of which stays the host's): a job gets at most " +
            std::to_string(part))
        .with("workers", slots_)
        .with("pids", static_cast<std::int64_t>(part));
  }

  int start_keeper(int slot, int channel) {
    std::string where;
    if (const int error = host_.cgroups.make_slot(slot, &where)) {
      LogLine(Severity::error, "control_group_failed",
              "cannot make the control group " + where + ": " +
                  std::strerror(error));
      return error;
    }
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0,
                   ends) < 0) {
      return errno;
    }
    const KeeperLink link{ends[0], ends[1]};
    const pid_t parent = getpid();
    const pid_t pid = fork();
    if (pid < 0) {
      const int error = errno;
      close(link.keeper);
      close(link.spawner);
      return error;
    }
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
      if (getppid() != parent) _exit(1);
      signal(SIGCHLD, SIG_DFL);
      sigset_t none;
      sigemptyset(&none);
      sigprocmask(SIG_SETMASK, &none, nullptr);
      if (close_all_but({channel, link.keeper, link.spawner})) _exit(1);
      keeper_main(host_, slot, channel, link, slots_);
    }
    close(link.keeper);
    auto& keeper = keepers_[static_cast<std::size_t>(slot)];
    keeper.pid = pid;
    keeper.link = link.spawner;
    return 0;
  }

  // Every child that has ended is reaped here or in empty(), and nowhere
  // unseen: `pid` of a keeper is a child's that is not reaped, so its number
  // is no other process's.
  void collect() {
    for (;;) {
      const pid_t pid = waitpid(-1, nullptr, WNOHANG | __WALL);
      if (pid <= 0) return;
      for (auto& keeper : keepers_) {
        if (keeper.pid != pid) continue;
        keeper.pid = 0;
        keeper.ended = true;
      }
    }
  }

  void reap() {
    collect();
    for (int slot = 0; slot < kSlotsMax; ++slot) {
      auto& keeper = keepers_[static_cast<std::size_t>(slot)];
      if (!keeper.ended) continue;
      empty(slot);  // more may end meanwhile: the next round is theirs
      untold_[static_cast<std::size_t>(slot)] = true;
    }
  }

  // A pool that does not read its events must not stop us: what does not fit
  // is told at a later tick.
  void tell() {
    for (int slot = 0; slot < kSlotsMax; ++slot) {
      auto& untold = untold_[static_cast<std::size_t>(slot)];
      if (untold && send_struct(events_, SlotEmpty{slot}) == 0) untold = false;
    }
  }

  // B4. A keeper that ended by itself left nothing; one that was killed left
  // an init, now our child, dying of its parent's death. Being able to wait
  // for it proves that its namespace is empty.
  void empty(int slot) {
    auto& keeper = keepers_[static_cast<std::size_t>(slot)];
    Status ignored;
    int init[1] = {-1};
    std::size_t count = 0;
    recv_message(keeper.link, std::as_writable_bytes(std::span(&ignored, 1)),
                 init, &count, false);
    if (count) {
      kill_by_pidfd(init[0]);
      bury_by_pidfd(init[0]);
      close(init[0]);
    }
    close(keeper.link);
    keeper = Keeper{};
    for (int round = 0; round < 200 && !host_.cgroups.kill_all(slot); ++round) {
      collect();
      usleep(5000);
    }
  }

  [[noreturn]] void leave() {
    for (int slot = 0; slot < kSlotsMax; ++slot) {
      auto& keeper = keepers_[static_cast<std::size_t>(slot)];
      if (keeper.pid != 0) {
        kill(keeper.pid, SIGKILL);  // ours, and not reaped
        while (waitpid(keeper.pid, nullptr, __WALL) < 0 && errno == EINTR) {
        }
      }
      if (keeper.pid != 0 || keeper.ended) empty(slot);
    }
    host_.cgroups.remove();
    _exit(0);
  }

  const SpawnerOptions options_;
  const int control_, events_;
  const pid_t pool_;
  int slots_ = 0;  // that there are to be
  Host host_;
  std::array<Keeper, kSlotsMax> keepers_{};
  std::array<bool, kSlotsMax> untold_{};
};

[[noreturn]] void spawner_process(const SpawnerOptions& options, int control,
                                  int events, pid_t pool) {
  // With the pool's end of `control` in our own hands its end-of-file would
  // never come.
  if (const int error = close_all_but({control, events})) {
    send_struct(control, Status{error, 0});
    _exit(1);
  }
  fcntl(events, F_SETFL, O_NONBLOCK);
  const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  if (null >= 0) {
    dup2(null, 0);
    dup2(null, 1);
    close(null);
  }
  prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
  prctl(PR_SET_NAME, "machina-spawner", 0, 0, 0);
  // Steps that run without exec inherit our memory: no token may lie in it.
  for (char** variable = environ; variable && *variable; ++variable) {
    std::memset(*variable, 0, std::strlen(*variable));
  }
  environ = nullptr;
  for (int s : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) signal(s, SIG_IGN);
  SpawnerProcess(options, control, events, pool).run();
}

// --- the pool's end ---

class SpawnerHandle : public Spawner {
 public:
  SpawnerHandle(pid_t pid, int control, int events, int answer_ms)
      : pid_(pid), control_(control), events_(events), answer_ms_(answer_ms) {}

  ~SpawnerHandle() override {
    close(control_);  // its end-of-file: kill everything and leave
    close(events_);
    for (int round = 0; round < 500; ++round) {
      if (waitpid(pid_, nullptr, WNOHANG) != 0) return;
      usleep(10'000);
    }
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }

  int pid() const override { return pid_; }

  Result<int> open_slot(int n) override {
    if (n < 0 || n >= kSlotsMax) {
      return Error{Code::invalid, "slot: outside 0..63"};
    }
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
      return Error{Code::io, std::string("slot: ") + std::strerror(errno)};
    }
    const auto status = ask({n, 0}, std::span(&pair[1], 1));
    close(pair[1]);
    if (!status || status->error) close(pair[0]);
    const std::string which = "slot " + std::to_string(n) + ": ";
    if (!status) return Error{status.error().code, which + status.error().what};
    if (status->error) {
      return Error{status->error == EBUSY ? Code::conflict : Code::io,
                   which + std::strerror(status->error)};
    }
    return pair[0];
  }

  Result<void> set_slots(int count) override {
    const auto status = ask({kSetSlots, count});
    if (!status) return status.error();
    return {};
  }

  Result<int> connect_server() override {
    int fd = -1;
    const auto status = ask({kConnectServer}, {}, &fd);
    if (!status) return status.error();
    if (status->error || fd < 0) {
      return Error{Code::unavailable, std::string("connect to the server: ") +
                                          std::strerror(status->error)};
    }
    return fd;
  }

  int events_fd() const override { return events_; }

  std::vector<int> take_empty() override {
    std::vector<int> slots;
    SlotEmpty event;
    while (recv_message(events_, std::as_writable_bytes(std::span(&event, 1)),
                        {}, nullptr, false) == sizeof(event)) {
      slots.push_back(event.slot);
    }
    return slots;
  }

 private:
  // An answer to an earlier request, which came after we had given that up, is
  // nobody's any more.
  Result<Status> ask(OpenSlot request, std::span<const int> with = {},
                     int* answer = nullptr) {
    request.number = ++number_;
    const int error = send_struct(control_, request, with);
    if (error && !gone(error)) {
      return Error{
          Code::unavailable,
          std::string("the request cannot be sent: ") + std::strerror(error)};
    }
    while (!error && readable_within(control_, answer_ms_)) {
      Status status;
      int fd[1] = {-1};
      std::size_t count = 0;
      if (!recv_struct(control_, status, fd, &count)) break;
      if (status.number == number_ && answer) {
        *answer = fd[0];
      } else if (count) {
        close(fd[0]);
      }
      if (status.number == number_) return status;
    }
    return Error{Code::unavailable, "the spawner does not answer"};
  }

  const pid_t pid_;
  const int control_, events_, answer_ms_;
  std::uint32_t number_ = 0;
};

}  // namespace

std::unique_ptr<Spawner> spawner_at(pid_t pid, int control, int events,
                                    int answer_ms) {
  return std::make_unique<SpawnerHandle>(pid, control, events, answer_ms);
}

void register_builtin(const std::string& name, Builtin run) {
  CHECK(!name.empty() && name.size() <= kBuiltinNameMax);
  builtins()[name] = run;
  CHECK(builtins().size() <= kBuiltinsMax);
}

Builtin find_builtin(std::string_view name) {
  const auto found = builtins().find(name);
  return found == builtins().end() ? nullptr : found->second;
}

namespace {

// A blank in a name stands there as an escape: such a path is none of those
// that a sandbox is shown.
std::vector<std::string> mount_points() {
  std::vector<std::string> all;
  std::ifstream in("/proc/self/mounts");
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string device, where;
    if (words >> device >> where) all.push_back(where);
  }
  return all;
}

}  // namespace

bool Host::forced_off(const char* name) const {
  const auto& off = options.force_off;
  return std::find(off.begin(), off.end(), name) != off.end();
}

Host find_host(const SpawnerOptions& options) {
  Host host;
  host.options = options;
  host.uid = geteuid();
  host.gid = getegid();
  host.root = host.uid == 0;
  const auto set = [&](Mech m, MechanismState state, int error = 0) {
    host.mech(m) = MechWire{static_cast<std::uint8_t>(state), error};
  };
  using enum MechanismState;
  constexpr std::pair<Mech, const char*> kNamespaces[] = {
      {Mech::userns, "userns"}, {Mech::mountns, "mountns"},
      {Mech::pidns, "pidns"},   {Mech::netns, "netns"},
      {Mech::ipcns, "ipcns"},   {Mech::utsns, "utsns"}};
  for (const auto& [mech, name] : kNamespaces) {
    if (host.forced_off(name)) {
      set(mech, unavailable, EPERM);
    } else {
      set(mech, active);
    }
  }
  if (host.root) set(Mech::userns, disabled);

  int error = 0;
  host.landlock_abi = landlock_abi(&error);
  if (host.forced_off("landlock")) host.landlock_abi = 0, error = EOPNOTSUPP;
  set(Mech::landlock, host.landlock_abi ? active : unavailable, error);

  auto deny = compile_deny_filter();
  auto allow = compile_allow_filter();
  if (host.forced_off("seccomp") || !deny || !allow) {
    set(Mech::seccomp, unavailable, EINVAL);
  } else {
    host.deny = std::move(*deny);
    if (options.seccomp_enable) host.allow = std::move(*allow);
    set(Mech::seccomp, options.seccomp_enable ? active : degraded);
  }
  host.cgroups.find(host.forced_off("cgroup_memory"),
                    host.forced_off("cgroup_pids"),
                    host.forced_off("cgroup_cpu"));
  set(Mech::cgroup_memory, host.cgroups.memory() ? active : unavailable,
      host.cgroups.memory_error());
  set(Mech::cgroup_pids, host.cgroups.pids() ? active : unavailable,
      host.cgroups.pids_error());
  host.mounts = mount_points();
  // Not as root, and without subordinate ids, all slots share our uid, parted
  // by their user namespaces.
  const int no_ids = host.root                   ? 0
                     : host.forced_off("subids") ? ENODATA
                                                 : find_subids(&host);
  set(Mech::uid, no_ids ? degraded : active, no_ids);
  set(Mech::caps, active);
  set(Mech::rlimits, active);
  host.pids = pids_bound();
  host.cgroups.limit_all(host.pids.most);
  host.level = level_of(host.mechs);
  return host;
}

Trouble host_trouble(const SpawnerOptions& options) {
  if (geteuid() != 0) return {};
  // Those of the pool and of every slot.
  const std::uint64_t first = options.slot_uid_base - 1;
  const std::uint64_t last = options.slot_uid_base + kSlotsMax - 1;
  std::ifstream setgroups("/proc/self/setgroups");
  std::string word;
  if (setgroups >> word && word == "deny") {
    return {
        "this root is uid 0 of a user namespace in which setgroups is "
        "denied (/proc/self/setgroups): it cannot become another user",
        kRemedyIds};
  }
  for (const char* file : {"/proc/self/uid_map", "/proc/self/gid_map"}) {
    std::ifstream map(file);
    bool mapped = false, any = false;
    for (std::uint64_t inside, outside, count;
         map >> inside >> outside >> count;) {
      any = true;
      mapped = mapped || (inside <= first && last < inside + count);
    }
    if (any && !mapped) {
      return {"this root is uid 0 of a user namespace that does not map ids " +
                  std::to_string(first) + " to " + std::to_string(last) +
                  ", one for the pool and one for each slot (" + file + ")",
              kRemedyIds};
    }
  }
  return {};
}

PidsBound pids_bound() {
  PidsBound bound{std::uint64_t{1} << 22, "the kernel's 4194304"};
  const auto at_most = [&](std::uint64_t most, const std::string& what) {
    if (most == 0 || most >= bound.most) return;
    bound = {most, what + " " + std::to_string(most)};
  };
  const auto number = [](const std::string& path) {
    std::ifstream file(path);
    std::uint64_t n = 0;
    file >> n;  // "max" is none
    return file ? n : 0;
  };
  at_most(number("/proc/sys/kernel/pid_max"), "kernel.pid_max");
  at_most(number("/proc/sys/kernel/threads-max"), "kernel.threads-max");
  for (std::string group : own_pids_groups()) {
    for (; group.size() > std::strlen("/sys/fs/cgroup");
         group.resize(group.rfind('/'))) {
      at_most(number(group + "/pids.max"), group + "/pids.max");
    }
  }
  rlimit processes{};
  if (geteuid() != 0 && getrlimit(RLIMIT_NPROC, &processes) == 0 &&
      processes.rlim_cur != RLIM_INFINITY) {
    at_most(processes.rlim_cur, "RLIMIT_NPROC");
  }
  bound.most -= bound.most / 8;
  return bound;
}

std::uint64_t pids_part(const PidsBound& bound, int slots) {
  const std::uint64_t part =
      bound.most / static_cast<std::uint64_t>(std::max(slots, 1));
  return part > kSlackPids + 1 ? part - kSlackPids : 1;
}

Result<std::unique_ptr<Spawner>> Spawner::start(const SpawnerOptions& options) {
  if (!find_builtin(kCollectBuiltin)) {
    register_builtin(kCollectBuiltin, collect_builtin);
  }
  if (!find_builtin(kCanaryBuiltin)) {
    register_builtin(kCanaryBuiltin, canary_builtin);
  }
  raise_descriptor_limit();
  int control[2], events[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, control) < 0) {
    return Error{Code::io, std::string("spawner: ") + std::strerror(errno)};
  }
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, events) < 0) {
    const int error = errno;
    close(control[0]);
    close(control[1]);
    return Error{Code::io, std::string("spawner: ") + std::strerror(error)};
  }
  const pid_t pool = getpid();
  const pid_t pid = fork();
  if (pid == 0) spawner_process(options, control[1], events[1], pool);
  const int error = errno;
  close(control[1]);
  close(events[1]);
  if (pid < 0) {
    close(control[0]);
    close(events[0]);
    return Error{Code::io, std::string("spawner: ") + std::strerror(error)};
  }
  auto handle = spawner_at(pid, control[0], events[0], kAnswerMs);
  Status status;
  if (!readable_within(control[0], kAnswerMs) ||
      !recv_struct(control[0], status)) {
    return Error{Code::unavailable, "spawner: did not start"};
  }
  if (status.error) {
    return Error{Code::unavailable,
                 "spawner: cannot close what it inherits: close_range is "
                 "refused here and /proc/self/fd cannot be read: " +
                     std::string(std::strerror(status.error))};
  }
  return handle;
}

}  // namespace machina::sandbox
