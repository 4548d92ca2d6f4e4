// Stage 1: everything between clone and the first step that gives the sandbox
// its own root. Runs as PID 1 of the new namespaces, fed only by our own
// structs; nothing here looks into a tree a job could have written.

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>

#include "workers/sandbox/landlock.h"
#include "workers/sandbox/launch.h"

namespace machina::sandbox {

namespace {

constexpr std::uint64_t kReadOnly =
    MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
// Where the host's tree is with other inodes. Every /proc has it.
constexpr char kHostTree[] = "/proc/fs";
constexpr char kNothing[] = "nothing";  // an empty directory of the new root

// Attaches a copy of the mount tree at `from` to `to`, its flags already set
// in every submount.
int bind_fd(int dir, const char* from, const char* to, std::uint64_t attrs) {
  const int tree = open_tree(dir, from,
                             OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC |
                                 AT_RECURSIVE | (*from ? 0 : AT_EMPTY_PATH));
  if (tree < 0) return errno;
  mount_attr attr{};
  attr.attr_set = attrs;
  int error = 0;
  if (attrs && mount_setattr(tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr,
                             sizeof(attr)) < 0) {
    error = errno;
  }
  if (!error &&
      move_mount(tree, "", AT_FDCWD, to, MOVE_MOUNT_F_EMPTY_PATH) < 0) {
    error = errno;
  }
  close(tree);
  return error;
}

int bind(const char* from, const char* to, std::uint64_t attrs) {
  if (attrs) return bind_fd(AT_FDCWD, from, to, attrs);
  // One call where no flags are to be there first: there are many of these.
  return mount(from, to, nullptr, MS_BIND | MS_REC, nullptr) < 0 ? errno : 0;
}

int make_dir(const char* path, mode_t mode = 0755) {
  return mkdir(path, mode) < 0 && errno != EEXIST ? errno : 0;
}

int write_new(const char* path, const std::string& text) {
  const int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd < 0) return errno;
  const ssize_t n = write(fd, text.data(), text.size());
  const int error = n == static_cast<ssize_t>(text.size()) ? 0 : EIO;
  close(fd);
  return error;
}

// An overlay of `lower` alone at `to`, read-only. Without an upper layer the
// kernel wants two lower ones.
int overlay_at(const std::string& to, const std::string& lower,
               const std::string& empty) {
  const int context = fsopen("overlay", FSOPEN_CLOEXEC);
  if (context < 0) return errno;
  const std::string layers = lower + ":" + empty;
  int made = -1, error = 0;
  if (fsconfig(context, FSCONFIG_SET_STRING, "lowerdir", layers.c_str(), 0) ==
          0 &&
      fsconfig(context, FSCONFIG_CMD_CREATE, nullptr, nullptr, 0) == 0) {
    made = fsmount(context, FSMOUNT_CLOEXEC, kReadOnly);
  }
  if (made < 0 ||
      move_mount(made, "", AT_FDCWD, to.c_str(), MOVE_MOUNT_F_EMPTY_PATH) < 0) {
    error = errno;
  }
  if (made >= 0) close(made);
  close(context);
  return error;
}

// Read-only copy of a host file, directory or symbolic link, absent where the
// host has none. `tree` is what lies before the path where the host's files are
// shown as other inodes.
int copy_in(const std::string& tree, const std::string& path) {
  const char* to = path.c_str() + 1;  // relative: the new root is our cwd
  struct stat st {};
  if (lstat(path.c_str(), &st) < 0) return errno == ENOENT ? 0 : errno;
  if (S_ISLNK(st.st_mode)) {
    char target[kPathMax] = {};
    if (readlink(path.c_str(), target, sizeof(target) - 1) < 0) return errno;
    return symlink(target, to) < 0 && errno != EEXIST ? errno : 0;
  }
  if (S_ISDIR(st.st_mode)) {
    if (const int error = make_dir(to)) return error;
  } else if (S_ISREG(st.st_mode)) {
    if (const int error = write_new(to, "")) return error;
  } else {
    return 0;
  }
  // A tree of our own has the flags already, and what is bound keeps them.
  return bind((tree + path).c_str(), to, tree.empty() ? kReadOnly : 0);
}

// --- in the order in which build_root calls them ---

int new_root() {
  // /tmp of this mount namespace alone; the host's is untouched.
  if (mount("root", "/tmp", "tmpfs", MS_NOSUID,
            "size=1m,nr_inodes=512,mode=755") < 0) {
    return errno;
  }
  if (chdir("/tmp") < 0) return errno;
  return make_dir(kNothing, 0555);
}

// As root: the files that the job is shown, as inodes that neither the host nor
// another job opens. A lock, a lease or a watch that it puts on one holds
// against itself alone, and a pipe or a socket that lies there leads nowhere.
// Made for each sandbox: an overlay goes on showing what was once looked up in
// it, whatever becomes of that on the host. Returns what lies before a path
// there: nothing where the kernel makes none, and the host's own are shown.
//
// What is mounted elsewhere an overlay of the root directory does not show: it
// is laid over likewise, and where that fails the host's is bound there.
std::string host_tree(const Host& host) {
  if (!host.root || overlay_at(kHostTree, "/", kNothing) != 0) return "";
  for (const std::string& path : host.mounts) {
    const bool shown = path.starts_with("/usr") || path.starts_with("/lib") ||
                       path.starts_with("/bin") || path.starts_with("/sbin") ||
                       path.starts_with("/etc/");
    if (!shown) continue;
    const std::string to = kHostTree + path;
    struct stat st {};
    if (stat(path.c_str(), &st) < 0) continue;
    if (S_ISDIR(st.st_mode) && overlay_at(to, path, kNothing) == 0) continue;
    (void)bind(path.c_str(), to.c_str(), kReadOnly);
  }
  return kHostTree;
}

int programs(const std::string& tree) {
  for (const char* path :
       {"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"}) {
    if (const int error = copy_in(tree, path)) return error;
  }
  return 0;
}

int own_etc(const std::string& tree, const Ground& ground) {
  const std::string uid = std::to_string(ground.uid);
  const std::string gid = std::to_string(ground.gid);
  std::string passwd, group;
  if (ground.uid != 0) passwd = "root:x:0:0:root:/:/usr/sbin/nologin\n";
  if (ground.gid != 0) group = "root:x:0:\n";
  passwd += "job:x:" + uid + ":" + gid + ":job:/work:/bin/sh\n" +
            "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n";
  group += "job:x:" + gid + ":\nnogroup:x:65534:\n";
  int error = make_dir("etc");
  const auto put = [&](const char* name, const std::string& text) {
    if (!error) error = write_new(name, text);
  };
  put("etc/passwd", passwd);
  put("etc/group", group);
  put("etc/hosts",
      "127.0.0.1 localhost sandbox\n::1 localhost ip6-localhost\n");
  put("etc/hostname", "sandbox\n");
  put("etc/host.conf", "multi on\n");
  put("etc/nsswitch.conf",
      "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"
      "services: files\nprotocols: files\n");
  put("etc/resolv.conf", "");
  if (!error) error = make_dir("etc/ssl");
  for (const char* name : {"/etc/ld.so.cache",     "/etc/ld.so.conf",
                           "/etc/ld.so.conf.d",    "/etc/alternatives",
                           "/etc/localtime",       "/etc/timezone",
                           "/etc/os-release",      "/etc/debian_version",
                           "/etc/mime.types",      "/etc/services",
                           "/etc/protocols",       "/etc/python3",
                           "/etc/python3.11",      "/etc/python3.12",
                           "/etc/python3.13",      "/etc/perl",
                           "/etc/ssl/certs",       "/etc/ssl/openssl.cnf",
                           "/etc/java-17-openjdk", "/etc/fonts",
                           "/etc/matplotlibrc"}) {
    if (!error) error = copy_in(tree, name);
  }
  return error;
}

int own_dev() {
  int error = make_dir("dev");
  for (const char* name : {"null", "zero", "full", "random", "urandom"}) {
    const std::string host = std::string("/dev/") + name;
    // A node of our own; without the right to make one (in a user namespace)
    // the host's.
    struct stat st {};
    const bool ours = stat(host.c_str(), &st) == 0 &&
                      mknod(host.c_str() + 1, S_IFCHR | 0666, st.st_rdev) == 0;
    if (!error && !ours) error = write_new(host.c_str() + 1, "");
    // Not nodev: these five are the devices. Read-only bars chmod, not writes.
    if (!error) {
      error = bind(host.c_str() + (ours ? 1 : 0), host.c_str() + 1,
                   MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
    }
  }
  const char* const links[][2] = {{"/proc/self/fd", "dev/fd"},
                                  {"/proc/self/fd/0", "dev/stdin"},
                                  {"/proc/self/fd/1", "dev/stdout"},
                                  {"/proc/self/fd/2", "dev/stderr"}};
  for (const auto& link : links) {
    if (!error && symlink(link[0], link[1]) < 0) error = errno;
  }
  return error ? error : make_dir("dev/shm");
}

int new_proc(bool hide, std::uint64_t attrs) {
  const int context = fsopen("proc", FSOPEN_CLOEXEC);
  if (context < 0) return -errno;
  int made = -1;
  if ((!hide || fsconfig(context, FSCONFIG_SET_STRING, "hidepid", "ptraceable",
                         0) == 0) &&
      fsconfig(context, FSCONFIG_CMD_CREATE, nullptr, nullptr, 0) == 0) {
    made = fsmount(context, FSMOUNT_CLOEXEC, static_cast<unsigned>(attrs));
  }
  const int error = errno;
  close(context);
  return made < 0 ? -error : made;
}

// The one the job sees shows it only its own processes ("invisible" would
// except group 0, which the owner of a repository may have), read-only; the
// other,
// attached nowhere, serves init.
int own_proc(Inside* inside) {
  constexpr std::uint64_t kAttrs =
      MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
  inside->proc = new_proc(false, kAttrs);
  if (inside->proc < 0) return -inside->proc;
  const int seen = new_proc(true, kAttrs | MOUNT_ATTR_RDONLY);
  if (seen < 0) return -seen;
  int error = make_dir("proc");
  if (!error &&
      move_mount(seen, "", AT_FDCWD, "proc", MOVE_MOUNT_F_EMPTY_PATH) < 0) {
    error = errno;
  }
  close(seen);
  for (const char* name :
       {"kcore", "cmdline", "bootconfig", "keys", "key-users", "kmsg",
        "modules", "swaps", "sysrq-trigger", "timer_list", "sched_debug",
        "latency_stats", "kallsyms", "kpagecount", "kpageflags",
        "kpagecgroup"}) {
    const std::string path = std::string("proc/") + name;
    if (!error && access(path.c_str(), F_OK) == 0) {
      error = bind("dev/null", path.c_str(), 0);
    }
  }
  for (const char* name : {"acpi", "asound", "bus", "irq", "scsi"}) {
    const std::string path = std::string("proc/") + name;
    if (!error && access(path.c_str(), F_OK) == 0) {
      error = bind(kNothing, path.c_str(), kReadOnly);
    }
  }
  return error;
}

// One sized tmpfs behind /work, /tmp and /dev/shm.
int own_scratch(const Ground& ground) {
  const std::uint64_t megabytes =
      ground.limits.disk_mb ? ground.limits.disk_mb : 1;
  char options[128];
  std::snprintf(options, sizeof(options), "size=%llum,nr_inodes=%llu,mode=711",
                static_cast<unsigned long long>(megabytes),
                static_cast<unsigned long long>(inodes_max(megabytes)));
  if (const int error = make_dir("scratch")) return error;
  if (mount("scratch", "scratch", "tmpfs", MS_NOSUID | MS_NODEV, options) < 0) {
    return errno;
  }
  const char* const parts[][2] = {{"scratch/work", "work"},
                                  {"scratch/tmp", "tmp"},
                                  {"scratch/shm", "dev/shm"}};
  for (const auto& part : parts) {
    if (mkdir(part[0], 0700) < 0) return errno;
    if (chown(part[0], ground.uid, ground.gid) < 0) return errno;
    if (const int error = make_dir(part[1])) return error;
    if (const int error = bind(part[0], part[1], 0)) return error;
  }
  if (umount2("scratch", MNT_DETACH) < 0) return errno;
  if (rmdir("scratch") < 0) return errno;
  if (const int error = make_dir("var")) return error;
  if (symlink("/tmp", "var/tmp") < 0) return errno;
  return make_dir("run");
}

// The repository and the mirror, opened while the host's tree is still whole.
struct Trees {
  int repo = -1, mirror = -1;

  int open(const Host& host, const Ground& ground) {
    if (!ground.repo.empty()) {
      repo = open_repo(host, ground.repo);
      if (repo < 0) return -repo;
    }
    if (!ground.mirror.empty()) {
      mirror = open_mirror(host, ground.mirror);
      if (mirror < 0) return -mirror;
    }
    return 0;
  }

  int attach(Role role) const {
    constexpr std::uint64_t writable = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
    int error = 0;
    if (repo >= 0) {
      error = make_dir("repo");
      if (!error) {
        error = bind_fd(repo, "", "repo",
                        role == Role::land ? writable : kReadOnly);
      }
    }
    if (mirror >= 0 && !error) error = make_dir("mirror");
    if (mirror >= 0 && !error) {
      error = role == Role::prepare ? bind_fd(mirror, "", "mirror", writable)
                                    : attach_objects();
    }
    return error;
  }

  // A job reads objects. The rest of the mirror, its lock above all, is between
  // `prepare` sessions: a lock needs no more than a descriptor that reads.
  int attach_objects() const {
    int error = make_dir("mirror/objects");
    if (!error) error = bind_fd(mirror, "objects", "mirror/objects", kReadOnly);
    struct stat st {};
    if (!error && fstatat(mirror, "shallow", &st, AT_SYMLINK_NOFOLLOW) == 0 &&
        S_ISREG(st.st_mode)) {
      error = write_new("mirror/shallow", "");
      if (!error)
        error = bind_fd(mirror, "shallow", "mirror/shallow", kReadOnly);
    }
    return error;
  }

  ~Trees() {
    if (repo >= 0) ::close(repo);
    if (mirror >= 0) ::close(mirror);
  }
};

int leave_host() {
  if (syscall(SYS_pivot_root, ".", ".") < 0) return errno;
  if (umount2(".", MNT_DETACH) < 0) return errno;
  if (chdir("/") < 0) return errno;
  mount_attr attr{};
  attr.attr_set = kReadOnly;
  if (mount_setattr(AT_FDCWD, "/", 0, &attr, sizeof(attr)) < 0) return errno;
  return 0;
}

int loopback_up() {
  const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return errno;
  ifreq request{};
  std::memcpy(request.ifr_name, "lo", 3);
  int error = 0;
  if (ioctl(fd, SIOCGIFFLAGS, &request) < 0) {
    error = errno;
  } else {
    request.ifr_flags = static_cast<short>(request.ifr_flags | IFF_UP);
    if (ioctl(fd, SIOCSIFFLAGS, &request) < 0) error = errno;
  }
  close(fd);
  return error;
}

int open_below(const char* base, const std::string& relative) {
  const int dir = open(base, O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (dir < 0) return -errno;
  open_how how{};
  how.flags = O_PATH | O_DIRECTORY | O_CLOEXEC;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
  const long fd =
      syscall(SYS_openat2, dir, relative.c_str(), &how, sizeof(how));
  const int error = errno;
  close(dir);
  return fd < 0 ? -error : static_cast<int>(fd);
}

}  // namespace

int open_repo(const Host& host, const std::string& path) {
  for (const auto& root : host.options.repo_roots) {
    if (path.size() > root.size() + 1 && path.starts_with(root) &&
        path[root.size()] == '/') {
      return open_below(root.c_str(), path.substr(root.size() + 1));
    }
  }
  return -EACCES;
}

int open_mirror(const Host& host, const std::string& name) {
  return open_below((host.options.root + "/mirrors").c_str(), name);
}

Failure build_root(const Host& host, const Ground& ground, Inside* inside) {
  umask(0);
  Failure f;
  const auto stage = [&](Stage name, auto act) {
    if (!f.ok()) return;
    if (const int error = act()) f = Failure{name, error};
  };
  Trees trees;
  std::string tree;
  stage(Stage::root_fs, [] {
    const int code = mount("", "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
    return code < 0 ? errno : 0;
  });
  stage(Stage::repo, [&] { return trees.open(host, ground); });
  stage(Stage::root_fs, new_root);
  if (f.ok()) tree = host_tree(host);
  stage(Stage::binds, [&] { return programs(tree); });
  stage(Stage::etc, [&] { return own_etc(tree, ground); });
  stage(Stage::dev, own_dev);
  stage(Stage::proc, [&] { return own_proc(inside); });
  stage(Stage::scratch, [&] { return own_scratch(ground); });
  stage(Stage::repo, [&] { return trees.attach(ground.role); });
  stage(Stage::pivot, leave_host);
  stage(Stage::pivot, [&] {
    if (!host.active(Mech::utsns)) return 0;
    return sethostname("sandbox", 7) < 0 ? errno : 0;
  });
  stage(Stage::loopback, loopback_up);
  stage(Stage::scratch, [&] {
    inside->scratch = open("/work", O_PATH | O_DIRECTORY | O_CLOEXEC);
    return inside->scratch < 0 ? errno : 0;
  });
  stage(Stage::landlock_rules, [&] {
    if (!host.active(Mech::landlock)) return 0;
    const char* writable = nullptr;
    if (ground.role == Role::prepare && !ground.mirror.empty()) {
      writable = "/mirror";
    }
    if (ground.role == Role::land) writable = "/repo";
    inside->landlock = landlock_ruleset(host.landlock_abi, writable);
    return inside->landlock < 0 ? -inside->landlock : 0;
  });
  return f;
}

}  // namespace machina::sandbox
