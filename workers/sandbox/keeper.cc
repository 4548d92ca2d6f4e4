// The keeper of one slot: forked by the spawner, a member of the slot's control
// groups from its first breath, so that every sandbox it clones is born inside
// them. It answers the slot's worker, holds the privilege the worker must not
// have, and reads nothing but our own structs.

#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>

#include "queue/base/hex.h"
#include "workers/sandbox/launch.h"

namespace machina::sandbox {

namespace {

constexpr int kBuildMs = 10'000;
// What keeper and init themselves need beside the job.
constexpr std::uint64_t kSlackBytes = 16 << 20;

bool hex_name(const std::string& name) {
  return name.size() == kMirrorName && is_hex(name);
}

std::string text_of(const char* data, std::size_t size) {
  return std::string(data, strnlen(data, size));
}

class Keeper {
 public:
  Keeper(const Host& host, int slot, int channel, const KeeperLink& link,
         int slots)
      : host_(host),
        slot_(slot),
        channel_(channel),
        link_(link),
        slots_(slots) {}

  [[noreturn]] void run() {
    for (;;) {
      pollfd items[2] = {{channel_, POLLIN, 0}, {pidfd_, POLLIN, 0}};
      poll(items, pidfd_ >= 0 ? 2 : 1, -1);
      if (pidfd_ >= 0 && items[1].revents) bury();
      if (!items[0].revents) continue;
      KeeperRequest request;
      int passed[1] = {-1};
      std::size_t count = 0;
      const ssize_t n =
          recv_message(channel_, std::as_writable_bytes(std::span(&request, 1)),
                       passed, &count, true);
      if (n <= 0) {  // B4: the worker has gone
        end_session();
        _exit(0);
      }
      KeeperReply reply = blank_reply();
      int answer = -1;
      if (n != sizeof(request)) {
        reply.stage = Stage::request;
        reply.error = EINVAL;
      } else {
        serve(request, count ? passed[0] : -1, &reply, &answer);
      }
      if (count) close(passed[0]);
      int error = send_struct(channel_, reply,
                              std::span(&answer, answer >= 0 ? 1U : 0U));
      if (answer >= 0) close(answer);
      if (answer >= 0 && error != 0 && !gone(error)) {
        // No room for a descriptor in flight: this request has failed.
        reply.stage = Stage::request;
        reply.error = error;
        error = send_struct(channel_, reply);
      }
      if (error != 0) {  // a worker without an answer would wait for ever
        end_session();
        _exit(0);
      }
    }
  }

 private:
  KeeperReply blank_reply() const {
    KeeperReply reply;
    reply.level = host_.level;
    std::copy(std::begin(host_.mechs), std::end(host_.mechs), reply.mechs);
    std::memcpy(reply.provider, "native", 7);
    return reply;
  }

  void serve(const KeeperRequest& request, int passed, KeeperReply* reply,
             int* answer) {
    Failure failure;
    switch (request.op) {
      case KeeperOp::connect_server:
        *answer = connect_unix(host_.options.socket_path);
        if (*answer < 0) failure = {Stage::request, -*answer};
        break;
      case KeeperOp::close:
        end_session();
        break;
      case KeeperOp::open:
        end_session();
        if (host_.level < request.min_level) {
          reply->too_weak = 1;
          break;
        }
        failure = open_session(request, passed);
        reply->pids = ground_.limits.pids;
        if (!failure.ok()) {
          end_session();
          blame(failure, reply);
        }
        break;
      default:
        failure = {Stage::request, EINVAL};
    }
    reply->stage = failure.stage;
    reply->error = failure.error;
  }

  Failure open_session(const KeeperRequest& request, int control) {
    ground_ = Ground{};
    ground_.slot = slot_;
    if (request.role > static_cast<std::uint8_t>(Role::land)) {
      return {Stage::request, EINVAL};
    }
    ground_.role = static_cast<Role>(request.role);
    ground_.limits = Limits{request.memory_mb, request.disk_mb, request.pids,
                            request.cpu_ms};
    ground_.repo = text_of(request.repo, sizeof(request.repo));
    ground_.mirror = text_of(request.mirror, sizeof(request.mirror));
    if (control < 0) return {Stage::request, EBADF};
    const Limits& l = ground_.limits;
    if (l.memory_mb == 0 || l.memory_mb > kMegabytesMax || l.disk_mb == 0 ||
        l.disk_mb > kMegabytesMax || l.pids == 0 || l.pids > kPidsMax) {
      return {Stage::request, ERANGE};
    }
    if (!ground_.mirror.empty() && !hex_name(ground_.mirror)) {
      return {Stage::request, EINVAL};
    }
    take_part_of_pids();
    if (const int error = choose_identity()) return {Stage::paths, error};
    if (const int error = host_.cgroups.limit(
            slot_, ((l.memory_mb + l.disk_mb) << 20) + kSlackBytes,
            socket_bytes(l), ground_.limits.pids + kSlackPids)) {
      return {Stage::cgroup, error};
    }
    return clone_init(control);
  }

  // All slots together must leave the host process numbers, so each has its
  // part of what there is, whatever its job may ask for.
  void take_part_of_pids() {
    Slots said;
    while (recv_message(link_.keeper,
                        std::as_writable_bytes(std::span(&said, 1)), {},
                        nullptr, false) == sizeof(said)) {
      slots_ = said.count;
    }
    ground_.limits.pids =
        std::min(ground_.limits.pids, pids_part(host_.pids, slots_));
  }

  // Whose uid the steps have; for prepare also makes the mirror's directory.
  int choose_identity() {
    ground_.uid = host_.root
                      ? host_.options.slot_uid_base + static_cast<uid_t>(slot_)
                      : kInnerUid;
    if (host_.sub_uid != 0) {
      ground_.other_uid = ground_.role == Role::job;
      if (!ground_.other_uid) ground_.uid = kOwnerUid;
    }
    ground_.gid = static_cast<gid_t>(ground_.uid);
    if (ground_.role == Role::job) {
      return ground_.repo.empty() ? 0 : EINVAL;
    }
    if (ground_.repo.empty()) return EINVAL;
    const int repo = open_repo(host_, ground_.repo);
    if (repo < 0) return -repo;
    struct stat st {};
    const int error = fstat(repo, &st) < 0 ? errno : 0;
    close(repo);
    if (error) return error;
    if (host_.root) {
      ground_.uid = st.st_uid;
      ground_.gid = st.st_gid;
    }
    if (ground_.mirror.empty()) return 0;
    if (ground_.role == Role::land) return EINVAL;  // it needs none
    return make_mirror(st.st_uid, st.st_gid);
  }

  int make_mirror(uid_t uid, gid_t gid) const {
    const std::string parent = host_.options.root + "/mirrors";
    mkdir(parent.c_str(), 0755);
    const int dir =
        open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (dir < 0) return errno;
    int error = 0;
    if (mkdirat(dir, ground_.mirror.c_str(), 0755) == 0) {
      const int made = openat(dir, ground_.mirror.c_str(),
                              O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
      // Slots read it, whatever umask we were started with.
      if (made < 0 || fchmod(made, 0755) < 0 ||
          (host_.root && fchown(made, uid, gid) < 0)) {
        error = errno;
      }
      if (made >= 0) close(made);
    } else if (errno != EEXIST) {
      error = errno;
    }
    close(dir);
    return error;
  }

  std::uint64_t clone_flags() const {
    std::uint64_t flags = CLONE_PIDFD | CLONE_CLEAR_SIGHAND | CLONE_NEWNS |
                          CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWCGROUP;
    if (host_.active(Mech::ipcns)) flags |= CLONE_NEWIPC;
    if (host_.active(Mech::utsns)) flags |= CLONE_NEWUTS;
    if (!host_.root) flags |= CLONE_NEWUSER;
    return flags;
  }

  // A mechanism without which no sandbox can be made was taken away (tests).
  bool clone_forbidden() const {
    for (Mech m : {Mech::userns, Mech::mountns, Mech::pidns, Mech::netns}) {
      const bool needed = m != Mech::userns || !host_.root;
      if (needed && !host_.active(m)) return true;
    }
    return false;
  }

  // The host refused a mechanism that find_host() could only hope for (a
  // profile may let clone pass and refuse the mount after it). A lack of room
  // is not a refusal: the next attempt may succeed.
  void blame(const Failure& failure, KeeperReply* reply) const {
    switch (failure.error) {
      case ENOMEM:
      case ENOSPC:
      case EAGAIN:
      case EMFILE:
      case ENFILE:
      case EPIPE:
        return;
      default:
        break;
    }
    Mech mech = Mech::mountns;
    switch (failure.stage) {
      case Stage::clone:
      case Stage::idmap:
        mech = host_.root ? Mech::pidns : Mech::userns;
        break;
      case Stage::root_fs:
      case Stage::binds:
      case Stage::etc:
      case Stage::dev:
      case Stage::proc:
      case Stage::scratch:
      case Stage::pivot:
        break;
      case Stage::loopback:
        mech = Mech::netns;
        break;
      case Stage::landlock_rules:
        mech = Mech::landlock;
        break;
      case Stage::init_caps:
        mech = Mech::caps;
        break;
      default:
        return;  // the request's fault, or nobody's
    }
    auto& wire = reply->mechs[static_cast<std::size_t>(mech)];
    if (wire.state == 0) wire = MechWire{3, failure.error};
    reply->level = 0;
  }

  Failure clone_init(int control) {
    if (clone_forbidden()) return {Stage::clone, EPERM};
    int release[2], report[2];
    if (pipe2(release, O_CLOEXEC) < 0) return {Stage::clone, errno};
    if (pipe2(report, O_CLOEXEC) < 0) {
      const int error = errno;
      close(release[0]);
      close(release[1]);
      return {Stage::clone, error};
    }
    InitFds fds{control, report[1], release[0],
                host_.cgroups.open_counters(slot_)};
    clone_args args{};
    int pidfd = -1;
    args.flags = clone_flags();
    args.pidfd = reinterpret_cast<std::uint64_t>(&pidfd);
    args.exit_signal = SIGCHLD;
    // Its files in /proc are ours to write only while it is dumpable.
    if (!host_.root) prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    const long pid = syscall(SYS_clone3, &args, sizeof(args));
    const int clone_error = errno;
    if (pid == 0) {
      const auto c = fds.counters.all();
      if (close_all_but({fds.control, fds.report, fds.release, c[0], c[1], c[2],
                         c[3], c[4], c[5], c[6]})) {
        _exit(1);
      }
      init_main(host_, ground_, fds);
    }
    close(release[0]);
    close(report[1]);
    for (int fd : fds.counters.all()) {
      if (fd >= 0) close(fd);
    }
    Failure failure;
    if (pid < 0) {
      failure = {Stage::clone, clone_error};
    } else {
      pidfd_ = pidfd;
      // Before it is released, so that none runs that the spawner could not
      // kill after us.
      if (const int error =
              send_struct(link_.keeper, Status{}, std::span(&pidfd, 1))) {
        failure = {Stage::clone, error};
      } else if (const int bad = host_.root ? 0 : map_identity(pid)) {
        failure = {Stage::idmap, bad};
      }
      if (failure.ok()) {
        const bool released = write(release[1], "g", 1) == 1;
        failure = {Stage::lost, EPIPE};
        // On end-of-file before a report the failure above stands.
        if (released && readable_within(report[0], kBuildMs)) {
          Failure got;
          if (read(report[0], &got, sizeof(got)) == sizeof(got)) failure = got;
        }
      }
    }
    if (!host_.root) prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    close(release[1]);
    close(report[0]);
    return failure;
  }

  int map_identity(long pid) const {
    // The pid cannot be another's: it is our child and not yet waited for.
    char line[96], path[64];
    const auto put = [&](const char* name, const char* text) {
      std::snprintf(path, sizeof(path), "/proc/%ld/%s", pid, name);
      const int fd = open(path, O_WRONLY | O_CLOEXEC);
      if (fd < 0) return errno;
      const int error = write(fd, text, std::strlen(text)) < 0 ? errno : 0;
      close(fd);
      return error;
    };
    if (host_.sub_uid != 0) {
      // Ours to map: both are mapped where we are.
      std::snprintf(line, sizeof(line), "%u %u 1\n%u %u 1", kInnerUid,
                    kInnerUid, kOwnerUid, kOwnerUid);
      const int bad = put("gid_map", line);
      return bad ? bad : put("uid_map", line);
    }
    int error = put("setgroups", "deny");
    std::snprintf(line, sizeof(line), "%u %u 1", kInnerUid, host_.gid);
    if (!error) error = put("gid_map", line);
    std::snprintf(line, sizeof(line), "%u %u 1", kInnerUid, host_.uid);
    if (!error) error = put("uid_map", line);
    return error;
  }

  // Returns once the kernel has reaped the whole pid namespace: init can be
  // waited for only then.
  void end_session() {
    if (pidfd_ < 0) return;
    kill_by_pidfd(pidfd_);
    bury();
  }

  void bury() {
    bury_by_pidfd(pidfd_);
    Status ignored;
    int put[1] = {-1};
    std::size_t count = 0;
    recv_message(link_.spawner, std::as_writable_bytes(std::span(&ignored, 1)),
                 put, &count, false);
    if (count) close(put[0]);
    close(pidfd_);
    pidfd_ = -1;
  }

  const Host& host_;
  const int slot_;
  const int channel_;
  const KeeperLink link_;
  int slots_;
  int pidfd_ = -1;
  Ground ground_;
};

}  // namespace

void keeper_main(Host& host, int slot, int channel, const KeeperLink& link,
                 int slots) {
  if (host.cgroups.join(slot)) _exit(2);
  if (host.sub_uid != 0 && enter_subids(host, slot)) _exit(3);
  Keeper(host, slot, channel, link, slots).run();
}

}  // namespace machina::sandbox
