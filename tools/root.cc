#include "tools/root.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "tools/trust.h"

namespace machina {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSubdirectories[] = {
    "queue", "history", "logs", "ops", "artifacts", "repos", "mirrors"};

// Directories that hold other things than a queue.
constexpr const char* kShared[] = {
    "/",        "/bin",     "/boot",      "/etc",       "/home",     "/lib",
    "/lib32",   "/lib64",   "/media",     "/mnt",       "/opt",      "/root",
    "/run",     "/sbin",    "/srv",       "/tmp",       "/usr",      "/var",
    "/usr/bin", "/usr/lib", "/usr/local", "/usr/share", "/usr/sbin", "/var/lib",
    "/var/tmp", "/var/log", "/var/cache", "/var/run",   "/run/user",
};
// Trees in which nothing of ours may lie.
constexpr const char* kForbiddenTrees[] = {"/proc", "/sys", "/dev", "/etc",
                                           "/boot"};

Error refuse(const std::string& path, const std::string& why) {
  return Error{Code::invalid, "MACHINA_ROOT: \"" + path + "\" " + why};
}

std::string system_error(const char* act) {
  return std::string(act) + ": " + std::strerror(errno);
}

bool dangerous(const std::string& path) {
  for (const char* shared : kShared) {
    if (path == shared) return true;
  }
  for (const char* tree : kForbiddenTrees) {
    if (path == tree || path.starts_with(std::string(tree) + "/")) return true;
  }
  // Somebody's home, the caller's own too: /home/<user>.
  if (path.starts_with("/home/") &&
      path.find('/', std::strlen("/home/")) == std::string::npos) {
    return true;
  }
  const char* home = std::getenv("HOME");  // NOLINT(concurrency-mt-unsafe)
  return home != nullptr && path == home;
}

std::string absolute(const std::string& path) {
  std::error_code error;
  fs::path full = fs::absolute(path, error).lexically_normal();
  std::string text = full.string();
  while (text.size() > 1 && text.back() == '/') text.pop_back();
  return text;
}

struct Kind {
  unsigned long magic;
  const char* name;
  const char* fault;  // null: trusted
};
constexpr const char* kForgets = "does not outlive a reboot";
constexpr const char* kOverlay =
    "may lose a sync when its layers are copied up";
constexpr const char* kRemote = "leaves locks and syncs to another machine";
constexpr Kind kKinds[] = {
    {0x0000EF53, "ext4", nullptr},   {0x58465342, "xfs", nullptr},
    {0x9123683E, "btrfs", nullptr},  {0x2FC12FC1, "zfs", nullptr},
    {0xF2F52010, "f2fs", nullptr},   {0x01021994, "tmpfs", kForgets},
    {0x858458F6, "ramfs", kForgets}, {0x794C7630, "overlay", kOverlay},
    {0x00006969, "nfs", kRemote},    {0xFF534D42, "cifs", kRemote},
    {0xFE534D42, "smb2", kRemote},   {0x01021997, "9p", kRemote},
    {0x65735546, "fuse", kRemote},   {0x00C36400, "ceph", kRemote},
};

const Kind* file_system_kind(const std::string& path, unsigned long* magic) {
  struct statfs status {};
  if (::statfs(path.c_str(), &status) != 0) return nullptr;
  *magic = static_cast<unsigned long>(status.f_type) & 0xFFFFFFFFul;
  for (const auto& kind : kKinds) {
    if (kind.magic == *magic) return &kind;
  }
  return nullptr;
}

// R2. `what` is how the directory is called in the refusal.
Result<void> check_owner(const std::string& path) {
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) {
    return refuse(path, "cannot be examined: " + system_error("lstat"));
  }
  if (!S_ISDIR(status.st_mode)) return refuse(path, "is not a directory");
  if (status.st_uid != ::geteuid()) {
    return refuse(path, "belongs to uid " + std::to_string(status.st_uid) +
                            ", not to us (uid " + std::to_string(::geteuid()) +
                            ")");
  }
  if ((status.st_mode & 022) != 0) {
    char mode[8];
    std::snprintf(mode, sizeof mode, "%04o", status.st_mode & 07777);
    return refuse(path, std::string("may be written by others (mode ") + mode +
                            "); chmod go-w it");
  }
  return {};
}

Result<void> check_socket_path(const std::string& root) {
  std::string path = root_socket(root);
  if (path.size() <= kSocketPathBytesMax) return {};
  return refuse(root, "is too long: its socket " + path + " has " +
                          std::to_string(path.size()) +
                          " bytes, the bound is " +
                          std::to_string(kSocketPathBytesMax));
}

Result<void> make_root(const std::string& path, bool prod) {
  struct stat status {};
  if (::stat(path.c_str(), &status) == 0) return {};
  if (errno != ENOENT) {
    return refuse(path, "cannot be reached: " + system_error("stat"));
  }
  if (prod) {
    return refuse(path,
                  "does not exist; the prod profile wants it made on purpose: "
                  "mkdir -m 700 " +
                      path);
  }
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return refuse(path, "cannot be made: " + system_error("mkdir"));
  }
  return {};
}

Result<void> make_subdirectories(const std::string& root) {
  for (const char* name : kSubdirectories) {
    std::string path = root + "/" + name;
    if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
      return refuse(path, "cannot be made: " + system_error("mkdir"));
    }
    // The repositories may well be somebody else's; all else is ours alone.
    if (std::string_view(name) == "repos") continue;
    if (auto ok = check_owner(path); !ok) return ok;
  }
  return {};
}

// What can be said of a path before anything is there.
Result<void> check_wanted(const std::string& path, const std::string& wanted) {
  if (path.empty() || dangerous(wanted)) {  // R1
    return refuse(wanted,
                  "is not a directory to keep a queue in; name one of "
                  "its own, such as /var/lib/machina");
  }
  // R5. What is there already may be a link to a shorter path: that one is
  // asked about later.
  struct stat status {};
  if (::lstat(wanted.c_str(), &status) != 0) {
    if (auto ok = check_socket_path(wanted); !ok) return ok;
  }
  return check_trusted("MACHINA_ROOT", path, false);  // R6
}

// A root that is there.
Result<Root> look_at_root(const std::string& wanted, bool prod,
                          bool unsafe_fs) {
  char* real = ::realpath(wanted.c_str(), nullptr);
  if (real == nullptr) {
    return refuse(wanted, "cannot be resolved: " + system_error("realpath"));
  }
  Root root;
  root.path = real;
  std::free(real);
  if (dangerous(root.path)) {  // R1, by whatever path
    return refuse(root.path,
                  "is not a directory to keep a queue in; name one "
                  "of its own, such as /var/lib/machina");
  }
  if (auto ok = check_owner(root.path); !ok) return ok.error();

  root.socket_path = root.path + "/machina.sock";
  // R5 again: a symbolic link may lead to a longer path.
  if (auto ok = check_socket_path(root.path); !ok) return ok.error();

  unsigned long magic = 0;
  root.file_system = file_system_name(root.path);
  const Kind* kind = file_system_kind(root.path, &magic);
  if (kind != nullptr && kind->fault != nullptr) {
    std::string fault =
        std::string("lies on ") + kind->name + ", which " + kind->fault;
    if (prod && !unsafe_fs) {
      return refuse(root.path, fault +
                                   "; choose a local disk, or say "
                                   "--unsafe-fs");
    }
    root.warnings.push_back("MACHINA_ROOT " + fault);
  }
  return root;
}

}  // namespace

Result<Root> prepare_root(const std::string& path, bool prod, bool unsafe_fs) {
  std::string wanted = absolute(path);
  if (auto ok = check_wanted(path, wanted); !ok) return ok.error();
  if (auto ok = make_root(wanted, prod); !ok) return ok.error();
  auto root = look_at_root(wanted, prod, unsafe_fs);
  if (!root) return root;
  if (auto ok = make_subdirectories(root->path); !ok) return ok.error();
  return root;
}

Result<void> examine_root(const std::string& path, bool prod, bool unsafe_fs) {
  std::string wanted = absolute(path);
  if (auto ok = check_wanted(path, wanted); !ok) return ok;
  struct stat status {};
  if (::stat(wanted.c_str(), &status) != 0) {
    if (errno != ENOENT || prod) return make_root(wanted, prod);
    std::string parent = fs::path(wanted).parent_path().string();
    if (::access(parent.c_str(), W_OK | X_OK) == 0) return {};
    return refuse(wanted, "cannot be made: " + system_error("mkdir"));
  }
  auto root = look_at_root(wanted, prod, unsafe_fs);
  if (!root) return root.error();
  for (const char* name : kSubdirectories) {
    std::string below = root->path + "/" + name;
    if (std::string_view(name) == "repos") continue;
    if (::lstat(below.c_str(), &status) != 0 && errno == ENOENT) continue;
    if (auto ok = check_owner(below); !ok) return ok;
  }
  if (::access(root->path.c_str(), W_OK | X_OK) != 0) {
    return refuse(root->path, "cannot be written: " + system_error("access"));
  }
  return {};
}

std::string root_socket(const std::string& path) {
  return absolute(path) + "/machina.sock";
}

std::string file_system_fault(const std::string& path) {
  unsigned long magic = 0;
  const Kind* kind = file_system_kind(path, &magic);
  return kind != nullptr && kind->fault != nullptr ? kind->fault : "";
}

std::string file_system_name(const std::string& path) {
  unsigned long magic = 0;
  const Kind* kind = file_system_kind(path, &magic);
  if (kind != nullptr) return kind->name;
  char text[24];
  std::snprintf(text, sizeof text, "0x%lx", magic);
  return text;
}

}  // namespace machina
