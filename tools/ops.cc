#include "tools/ops.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <ctime>
#include <nlohmann/json.hpp>

#include "queue/base/fd.h"
#include "queue/base/rfc3339.h"
#include "tools/trust.h"

namespace machina {
namespace {

using Json = nlohmann::ordered_json;
using std::chrono::duration_cast;
using std::chrono::milliseconds;
using Steady = std::chrono::steady_clock;

constexpr std::size_t kFileBytesMax = 1 << 20;
constexpr std::int64_t kVanishMs = 5'000;  // of what dies with its parent
constexpr int kPollMs = 20;

std::int64_t now_ms() {
  return duration_cast<milliseconds>(Steady::now().time_since_epoch()).count();
}

Error system_error(const std::string& what) {
  return Error{Code::io, what + ": " + std::strerror(errno)};
}

// Root works for the root's owner: what it makes there is the owner's, who
// could not write it again otherwise. By descriptor: a name may be another's by
// now.
struct Owner {
  uid_t uid = 0;
  gid_t gid = 0;
};
bool give(int fd, const Owner& owner) {
  return ::geteuid() != 0 || owner.uid == 0 ||
         ::fchown(fd, owner.uid, owner.gid) == 0;
}

struct OpsDir {
  Fd fd;
  Owner owner;  // of the root
};

// <root>/ops, made where its root is one; never through a link.
Result<OpsDir> open_ops(const std::string& root, bool make) {
  Fd top(::open(root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  struct stat status {
  }, queue{};
  if (!top || ::fstat(top.get(), &status) != 0) return system_error(root);
  bool made = make &&
              ::fstatat(top.get(), "queue", &queue, AT_SYMLINK_NOFOLLOW) == 0 &&
              ::mkdirat(top.get(), "ops", 0700) == 0;
  OpsDir dir{Fd(::openat(top.get(), "ops",
                         O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW)),
             {status.st_uid, status.st_gid}};
  if (!dir.fd || (made && !give(dir.fd.get(), dir.owner))) {
    return system_error(root + "/ops");
  }
  return dir;
}

Result<void> write_whole(const OpsDir& dir, const std::string& name,
                         const std::string& text) {
  std::string temporary = "." + name + "." + std::to_string(::getpid());
  ::unlinkat(dir.fd.get(), temporary.c_str(), 0);
  int fd = ::openat(dir.fd.get(), temporary.c_str(),
                    O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) return system_error("ops/" + name);
  bool ok = give(fd, dir.owner) && ::write(fd, text.data(), text.size()) ==
                                       static_cast<ssize_t>(text.size());
  ok = ::close(fd) == 0 && ok;
  ok = ok && ::renameat(dir.fd.get(), temporary.c_str(), dir.fd.get(),
                        name.c_str()) == 0;
  if (ok) return {};
  Error error = system_error("ops/" + name);
  ::unlinkat(dir.fd.get(), temporary.c_str(), 0);
  return error;
}

Result<std::string> read_whole(int dir, const std::string& name) {
  Fd fd(::openat(dir, name.c_str(),
                 O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!fd) {
    return Error{errno == ENOENT ? Code::not_found : Code::io,
                 "ops/" + name + ": " + std::strerror(errno)};
  }
  return read_file(fd.get(), kFileBytesMax, "ops/" + name);
}

const char* role_name(const std::string& role) {
  return role == "serve" ? "machina_serve" : "machina_pool";
}

// `file`: its pid file, or null. What it runs may not be ours to see (a server
// that holds secrets is not dumpable): it wrote that down itself.
Json process_json(const OurProcess& ours,
                  const std::optional<PidFile>* file = nullptr) {
  const Process& p = ours.process;
  const bool told = p.id.exe_inode == 0 && file != nullptr && *file &&
                    (*file)->id.pid == p.id.pid;
  const ProcessId& exe = told ? (*file)->id : p.id;
  return {{"pid", p.id.pid},
          {"ppid", p.parent},
          {"etimes", p.age_s},
          {"role", ours.role},
          {"repo_owned", true},  // it belongs to this root
          {"protected", false},
          {"cmd", p.command},
          {"uid", p.id.uid},
          {"start_ticks", p.id.start_ticks},
          {"exe", exe.exe},
          {"exe_device", exe.exe_device},
          {"exe_inode", exe.exe_inode},
          {"exe_replaced", p.exe_readable && p.exe_replaced}};
}

// The process that is `recorded` and may be ended for `root`, or why not.
Result<Process> verify(const ProcessId& recorded, const struct stat& root) {
  auto seen = look_at(recorded.pid);
  if (!seen) return Error{Code::not_found, "it has ended"};
  if (auto why = difference(recorded, *seen); !why.empty()) {
    return Error{Code::not_found, why};
  }
  if (root.st_uid != 0 && seen->id.uid != root.st_uid) {
    return Error{Code::not_found, "it runs as uid " +
                                      std::to_string(seen->id.uid) +
                                      ", the root belongs to uid " +
                                      std::to_string(root.st_uid)};
  }
  return std::move(*seen);
}

// O1 to O3 and O6: the process that `file` names, or why it is none of ours.
// `root` is the directory below which the file was found.
Result<OurProcess> identify(const PidFile& file, const struct stat& root) {
  if (file.root_device != root.st_dev || file.root_inode != root.st_ino) {
    return Error{Code::not_found,
                 "it was written for another directory, of which this root is "
                 "a copy"};
  }
  auto seen = verify(file.id, root);
  if (!seen) return seen.error();
  return OurProcess{std::move(*seen), role_name(file.role)};
}

void look_for(const std::string& root, const std::string& role,
              const struct stat& status, Detected* found,
              std::optional<PidFile>* file,
              std::optional<OurProcess>* process) {
  auto read = read_pid_file(root, role);
  if (!read) {
    if (read.error().code != Code::not_found) {
      found->stale.push_back({role + ".pid", read.error().what, 0});
    }
    return;
  }
  auto ours = identify(*read, status);
  if (ours) {
    *process = std::move(*ours);
  } else {
    found->stale.push_back({role + ".pid", ours.error().what, read->id.pid});
  }
  *file = std::move(*read);
}

void add_children(Detected* found) {
  if (!found->running()) return;
  auto all = all_processes();
  for (const auto* top : {&found->serve, &found->pool}) {
    if (!*top) continue;
    for (auto& child : descendants(all, (*top)->process.id.pid)) {
      // A server's pool is below it, and counted once.
      bool known = found->pool && child.id.pid == found->pool->process.id.pid;
      for (const auto& other : found->children) {
        known = known || other.process.id.pid == child.id.pid;
      }
      if (!known) {
        found->children.push_back({std::move(child), "machina_child"});
      }
    }
  }
}

std::string pids_text(const std::vector<pid_t>& pids) {
  std::string text;
  for (pid_t pid : pids) text += " " + std::to_string(pid);
  return text.empty() ? " none" : text;
}

}  // namespace

std::string ops_dir(const std::string& root) { return root + "/ops"; }

// --- Pid files -------------------------------------------------------------

Result<void> write_pid_file(const std::string& root, const PidFile& file) {
  auto dir = open_ops(root, true);
  if (!dir) return dir.error();
  struct stat top {};
  if (::fstatat(dir->fd.get(), "..", &top, AT_SYMLINK_NOFOLLOW) != 0) {
    return system_error(root);
  }
  Json json = {{"role", file.role},
               {"root_device", top.st_dev},
               {"root_inode", top.st_ino},
               {"pid", file.id.pid},
               {"start_ticks", file.id.start_ticks},
               {"boot_id", file.id.boot_id},
               {"uid", file.id.uid},
               {"exe", file.id.exe},
               {"exe_device", file.id.exe_device},
               {"exe_inode", file.id.exe_inode},
               {"version", file.version},
               {"started_at", file.started_at}};
  if (file.role == "serve") {
    json["host"] = file.host;
    json["port"] = file.port;
    json["workers"] = file.workers;
    json["profile"] = file.profile;
    json["cwd"] = file.cwd;
    json["argv"] = file.argv;
    json["environment"] = file.environment;
    json["secrets"] = file.secrets;
    json["supervisor"] = file.supervisor;
    json["settings"] = file.settings;
  }
  // A path may hold bytes that are no UTF-8.
  return write_whole(
      *dir, file.role + ".pid",
      json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
}

Result<PidFile> read_pid_file(const std::string& root,
                              const std::string& role) {
  auto dir = open_ops(root, false);
  if (!dir) return Error{Code::not_found, dir.error().what};
  auto text = read_whole(dir->fd.get(), role + ".pid");
  if (!text) return text.error();
  // A pool that gave up root can empty its file, not remove it.
  if (text->empty()) return Error{Code::not_found, role + ".pid is empty"};
  Json json = Json::parse(*text, nullptr, false);
  PidFile file;
  try {
    file.role = json.at("role");
    file.id.pid = json.at("pid");
    file.id.start_ticks = json.at("start_ticks");
    file.id.boot_id = json.at("boot_id");
    file.id.uid = json.at("uid");
    file.id.exe = json.at("exe");
    file.id.exe_device = json.at("exe_device");
    file.id.exe_inode = json.at("exe_inode");
    file.root_device = json.at("root_device");
    file.root_inode = json.at("root_inode");
    file.version = json.value("version", "");
    file.started_at = json.value("started_at", "");
    file.host = json.value("host", "");
    file.port = json.value("port", 0);
    file.workers = json.value("workers", 0);
    file.profile = json.value("profile", "");
    file.cwd = json.value("cwd", "");
    file.argv = json.value("argv", std::vector<std::string>());
    file.environment = json.value("environment", std::vector<std::string>());
    file.secrets = json.value("secrets", std::vector<std::string>());
    file.supervisor = json.value("supervisor", "");
    file.settings =
        json.value("settings", std::map<std::string, std::string>());
  } catch (const Json::exception&) {
    return Error{Code::corrupt, role + ".pid is no pid file of this program"};
  }
  if (file.role != role || file.id.pid <= 1 || file.id.start_ticks == 0) {
    return Error{Code::corrupt, role + ".pid names no process"};
  }
  return file;
}

void remove_pid_file(const std::string& root, const std::string& role) {
  struct stat status {};
  auto file = read_pid_file(root, role);
  if (!file || file->id.pid != ::getpid()) return;
  if (::stat(root.c_str(), &status) != 0 || !identify(*file, status)) return;
  remove_report(root, role + ".pid");
}

// --- The verbs' lock -------------------------------------------------------

namespace {

// ops.lock, opened, and made where it is missing.
int open_ops_lock(const OpsDir& ops) {
  const int dir = ops.fd.get();
  constexpr int kFlags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
  int fd = ::openat(dir, "ops.lock", kFlags);
  if (fd >= 0 || errno != ENOENT) return fd;
  fd = ::openat(dir, "ops.lock", kFlags | O_CREAT | O_EXCL, 0600);
  if (fd < 0 && errno == EEXIST) return ::openat(dir, "ops.lock", kFlags);
  if (fd >= 0) (void)give(fd, ops.owner);
  return fd;
}

}  // namespace

Result<OpsLock> OpsLock::take(const std::string& root, int wait_ms) {
  auto dir = open_ops(root, false);
  if (!dir) {
    return Error{errno == ENOENT ? Code::not_found : Code::io,
                 dir.error().what};
  }
  int fd = open_ops_lock(*dir);
  if (fd < 0) return system_error(root + "/ops/ops.lock");
  OpsLock lock(fd);
  std::int64_t until = now_ms() + wait_ms;
  while (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK && errno != EINTR) {
      return system_error(root + "/ops/ops.lock");
    }
    if (now_ms() >= until) {
      return Error{Code::conflict,
                   "another machina ops (start, kill or restart) runs on " +
                       root +
                       " and has not ended yet; nothing was changed: wait for "
                       "it or end it, then try again"};
    }
    ::usleep(kPollMs * 1000);
  }
  return lock;
}

OpsLock::~OpsLock() {
  if (fd_ >= 0) ::close(fd_);
}

// --- Detecting -------------------------------------------------------------

Result<Detected> detect(const std::string& root) {
  if (auto ok = check_trusted("MACHINA_ROOT", root, true); !ok) {
    return ok.error();
  }
  char* real = ::realpath(root.c_str(), nullptr);
  Detected found;
  found.root = root;
  if (real == nullptr && (errno == ENOENT || errno == ENOTDIR)) {
    found.missing = true;
    return found;
  }
  if (real == nullptr) return system_error("MACHINA_ROOT: \"" + root + "\"");
  found.root = real;
  std::free(real);
  struct stat status {};
  if (::stat(found.root.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) {
    return Error{Code::invalid,
                 "MACHINA_ROOT: \"" + root + "\" is not a directory"};
  }
  // "Nothing runs" would be a guess.
  if (::access((found.root + "/ops/.").c_str(), X_OK) != 0 && errno == EACCES) {
    return Error{Code::io, "MACHINA_ROOT: " + found.root +
                               " is closed to us; it belongs to uid " +
                               std::to_string(status.st_uid) +
                               ": ask as that user, or as root"};
  }
  look_for(found.root, "serve", status, &found, &found.serve_file,
           &found.serve);
  look_for(found.root, "pool", status, &found, &found.pool_file, &found.pool);
  add_children(&found);
  return found;
}

// --- A report from before --------------------------------------------------

namespace {

// Who may have written what root is about to believe: the root's owner, who
// can be led only to processes of its own (O3), we ourselves, or root.
Result<std::string> read_trusted(const std::string& path, uid_t owner) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status {};
  if (!fd || ::fstat(fd.get(), &status) != 0) {
    return Error{Code::invalid,
                 "--from: " + path + ": " + std::strerror(errno)};
  }
  if (!S_ISREG(status.st_mode)) {
    return Error{Code::invalid, "--from: " + path + " is not a file"};
  }
  if (status.st_uid != owner && status.st_uid != 0 &&
      status.st_uid != ::geteuid()) {
    return Error{Code::invalid,
                 "--from: " + path + " belongs to uid " +
                     std::to_string(status.st_uid) + ", the root to uid " +
                     std::to_string(owner) + ": its word is not taken"};
  }
  if ((status.st_mode & 022) != 0) {
    return Error{Code::invalid, "--from: " + path +
                                    " can be written by others: chmod 600 it, "
                                    "or take another report"};
  }
  if (status.st_size > static_cast<off_t>(kFileBytesMax)) {
    return Error{Code::invalid, "--from: " + path + " has " +
                                    std::to_string(status.st_size) +
                                    " bytes, a report at most " +
                                    std::to_string(kFileBytesMax)};
  }
  std::string text(static_cast<std::size_t>(status.st_size), '\0');
  ssize_t got = ::read(fd.get(), text.data(), text.size());
  if (got < 0) return system_error("--from: " + path);
  text.resize(static_cast<std::size_t>(got));
  return text;
}

template <class T>
bool read_number(const Json& object, const char* name, T* to) {
  auto at = object.find(name);
  if (at == object.end() || !at->is_number_unsigned()) return false;
  *to = at->get<T>();
  return true;
}

// What a report says of one process, with the boot it was seen in.
bool read_recorded(const Json& entry, const std::string& boot, ProcessId* to) {
  to->boot_id = boot;
  auto exe = entry.find("exe");
  if (exe != entry.end() && exe->is_string()) to->exe = exe->get<std::string>();
  return read_number(entry, "pid", &to->pid) && to->pid > 1 &&
         read_number(entry, "start_ticks", &to->start_ticks) &&
         read_number(entry, "uid", &to->uid) &&
         read_number(entry, "exe_device", &to->exe_device) &&
         read_number(entry, "exe_inode", &to->exe_inode) && to->exe_inode != 0;
}

}  // namespace

Result<Detected> detect_from(const std::string& root, const std::string& path) {
  auto now = detect(root);
  if (!now) return now;
  struct stat status {};
  if (::stat(now->root.c_str(), &status) != 0) return system_error(root);
  auto text = read_trusted(path, status.st_uid);
  if (!text) return text.error();
  const auto bad = [&](const std::string& what) {
    return Error{Code::invalid,
                 "--from: " + path + ": " + what +
                     "; `machina ops detect` writes one that can be used"};
  };
  const Json report = Json::parse(*text, nullptr, false);
  if (!report.is_object()) return bad("it is not JSON, or no object");
  auto of = report.find("root");
  auto boot = report.find("boot_id");
  auto processes = report.find("processes");
  if (of == report.end() || !of->is_string() || boot == report.end() ||
      !boot->is_string() || processes == report.end() ||
      !processes->is_array()) {
    return bad(
        "root, boot_id or processes is missing: it is no report of this "
        "version's detect");
  }
  std::uint64_t device = 0, inode = 0;
  if (!read_number(report, "root_device", &device) ||
      !read_number(report, "root_inode", &inode)) {
    return bad("root_device or root_inode is missing");
  }
  if (of->get<std::string>() != now->root || device != status.st_dev ||
      inode != status.st_ino) {
    return bad("it is about " + of->get<std::string>() + ", this is " +
               now->root + ": name that with --root");
  }
  Detected found;
  found.root = now->root;
  std::size_t at = 0;
  for (const Json& entry : *processes) {
    const std::string where = "processes[" + std::to_string(at++) + "]";
    auto role = entry.is_object() ? entry.find("role") : entry.end();
    if (!entry.is_object() || role == entry.end() || !role->is_string()) {
      return bad(where + " has no role");
    }
    // What is below them dies with them.
    const bool server = *role == "machina_serve";
    if (!server && *role != "machina_pool") continue;
    ProcessId recorded;
    if (!read_recorded(entry, boot->get<std::string>(), &recorded)) {
      return bad(where +
                 ": pid, start_ticks, uid, exe_device or exe_inode is "
                 "missing");
    }
    auto seen = verify(recorded, status);
    if (seen && seen->id.uid != recorded.uid) {
      seen = Error{Code::not_found,
                   "it runs as uid " + std::to_string(seen->id.uid) +
                       ", then as uid " + std::to_string(recorded.uid)};
    }
    if (!seen) {
      found.stale.push_back({where, seen.error().what, recorded.pid});
      continue;
    }
    auto& to = server ? found.serve : found.pool;
    if (to) return bad(where + ": a second " + role->get<std::string>());
    to = OurProcess{std::move(*seen), role->get<std::string>()};
  }
  // Who supervises it is the pid file's to say, where that is still its own.
  if (found.serve) {
    found.serve_file =
        now->serve && now->serve->process.id.pid == found.serve->process.id.pid
            ? now->serve_file
            : PidFile();
  }
  add_children(&found);
  return found;
}

int detect_exit(const Detected& found) {
  if (!found.running()) return kOpsNotRunning;
  if (!found.serve) return kOpsPartial;
  bool wants_pool = found.serve_file && found.serve_file->workers > 0;
  return wants_pool && !found.pool ? kOpsPartial : kOpsOk;
}

Json to_json(const Detected& found) {
  Json processes = Json::array(), stale = Json::array();
  if (found.serve) {
    processes.push_back(process_json(*found.serve, &found.serve_file));
  }
  if (found.pool) {
    processes.push_back(process_json(*found.pool, &found.pool_file));
  }
  for (const auto& child : found.children) {
    processes.push_back(process_json(child));
  }
  for (const auto& each : found.stale) {
    stale.push_back(
        {{"file", each.file}, {"pid", each.pid}, {"why", each.why}});
  }
  // With these a later kill --from knows what it was (detect_from).
  struct stat status {};
  const bool there = ::stat(found.root.c_str(), &status) == 0;
  Json json = {{"ts", rfc3339_now()},
               {"root", found.root},
               {"root_device", there ? status.st_dev : 0},
               {"root_inode", there ? status.st_ino : 0},
               {"boot_id", boot_id()},
               {"running", found.running()},
               {"count", processes.size()},
               {"processes", processes},
               {"stale", stale}};
  if (found.serve) {
    json["serve_host"] = found.serve_file->host;
    json["serve_port"] = found.serve_file->port;
    json["version"] = found.serve_file->version;
    json["started_at"] = found.serve_file->started_at;
    json["supervisor"] = found.serve_file->supervisor;
  }
  return json;
}

std::string to_text(const Detected& found) {
  std::string text;
  auto line = [&](const OurProcess& ours) {
    const Process& p = ours.process;
    text += ours.role + " " + std::to_string(p.id.pid) + ", for " +
            std::to_string(p.age_s) + " s" +
            (p.exe_readable && p.exe_replaced
                 ? ", its program was replaced on disk since"
                 : "") +
            ": " + p.command + "\n";
  };
  if (found.serve) line(*found.serve);
  if (found.pool) line(*found.pool);
  if (!found.children.empty()) {
    text += std::to_string(found.children.size()) +
            " processes below (spawner, workers, sandboxes)\n";
  }
  for (const auto& each : found.stale) {
    text += each.file + " is stale and ignored (" + std::to_string(each.pid) +
            "): " + each.why + "\n";
  }
  if (!found.running()) {
    text += found.missing ? "there is no directory " + found.root + "\n"
                          : "nothing of " + found.root + " is running\n";
  }
  return text;
}

// --- Ending ----------------------------------------------------------------

namespace {

// At the end of what the pool wrote: it is not there to write it itself, or is
// about to be killed.
void say_asked_to_leave(const std::string& root) {
  const int fd = ::open((root + "/pool.lock").c_str(),
                        O_WRONLY | O_APPEND | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0) return;
  const std::string line = std::string(kAskedToLeave) + "\n";
  (void)!::write(fd, line.data(), line.size());
  ::close(fd);
}

// One kill: what is held, and what has become of it.
class Killing {
 public:
  Killing(const Detected& found, std::int64_t term_ms)
      : root_(found.root), term_ms_(term_ms) {
    for (const auto* each : {&found.serve, &found.pool}) {
      if (*each)
        take((*each)->process, each == &found.serve ? &serve_ : &pool_);
    }
    for (const auto& child : found.children) {
      children_.push_back(child.process);
      // One that became a job since is still the same process.
      children_.back().id.exe_inode = 0;
    }
  }

  Killed run() {
    std::int64_t began = now_ms();
    std::int64_t until = began + term_ms_;
    term(serve_);
    // The server drains first: jobs end with it, and it sends its pool away.
    // One that is stopped cannot; one that hangs has had half the grace.
    for (;;) {
      if (!serve_ || serve_->ended(0) || stopped(*serve_) ||
          now_ms() >= began + term_ms_ / 2) {
        term(pool_);
      }
      if (!alive() || now_ms() >= until) break;
      wait(until);
    }
    bury(&done_.terminated);
    for (auto* held : {&serve_, &pool_}) kill(*held);
    std::int64_t gone = now_ms() + kVanishMs;
    while (alive() && now_ms() < gone) wait(gone);
    bury(&done_.killed);
    for (auto* held : {&serve_, &pool_}) {
      if (*held) leave((*held)->process(), "it does not end");
    }
    end_children();
    done_.took_ms = now_ms() - began;
    return std::move(done_);
  }

 private:
  void take(const Process& process, std::optional<Held>* held) {
    done_.targets.push_back(process);
    auto got = Held::hold(process.id);
    if (got) {
      *held = std::move(*got);
    } else {  // it ended between the two looks
      done_.terminated.push_back(process.id.pid);
    }
  }
  void term(std::optional<Held>& held) {
    if (!held || std::count(termed_.begin(), termed_.end(),
                            held->process().id.pid) != 0) {
      return;
    }
    termed_.push_back(held->process().id.pid);
    if (auto ok = held->signal(SIGTERM); !ok) {
      leave(held->process(), ok.error().what);
      held.reset();
    }
  }
  void kill(std::optional<Held>& held) {
    if (!held) return;
    if (&held == &pool_) say_asked_to_leave(root_);
    if (auto ok = held->signal(SIGKILL); !ok) {
      leave(held->process(), ok.error().what);
      held.reset();
    }
  }
  // By SIGSTOP or a debugger.
  static bool stopped(const Held& held) {
    auto seen = look_at(held.process().id.pid);
    return seen && (seen->state == 'T' || seen->state == 't');
  }
  bool alive() const {
    return (serve_ && !serve_->ended(0)) || (pool_ && !pool_->ended(0));
  }
  // Until one that lives has ended, or a moment has passed.
  void wait(std::int64_t until) const {
    int most = static_cast<int>(
        std::clamp<std::int64_t>(until - now_ms(), 0, kPollMs * 5));
    const auto& next = serve_ && !serve_->ended(0) ? serve_ : pool_;
    if (next) next->ended(most);
  }
  void bury(std::vector<pid_t>* where) {
    for (auto* held : {&serve_, &pool_}) {
      if (!*held || !(*held)->ended(0)) continue;
      where->push_back((*held)->process().id.pid);
      held->reset();
    }
  }
  void leave(const Process& process, const std::string& why) {
    done_.left.push_back({process.id.pid, why});
  }

  // Workers and sandboxes die with their parents: that is looked for, and
  // what is left is killed too.
  std::vector<Held> still_there() const {
    std::vector<Held> left;
    for (const auto& child : children_) {
      auto held = Held::hold(child.id);
      if (held && !held->ended(0)) left.push_back(std::move(*held));
    }
    return left;
  }
  void end_children() {
    if (!done_.left.empty()) return;  // their parents live
    std::int64_t until = now_ms() + kVanishMs;
    auto left = still_there();
    while (!left.empty() && now_ms() < until) {
      left.front().ended(kPollMs);
      left = still_there();
    }
    for (const auto& held : left) {
      const Process& process = held.process();
      if (auto ok = held.signal(SIGKILL); !ok) {
        leave(process, ok.error().what);
      } else if (held.ended(static_cast<int>(kVanishMs))) {
        done_.killed.push_back(process.id.pid);
      } else {
        leave(process, "it does not end");
      }
    }
  }

  const std::string root_;
  std::int64_t term_ms_;
  std::optional<Held> serve_, pool_;
  std::vector<Process> children_;
  std::vector<pid_t> termed_;
  Killed done_;
};

}  // namespace

Killed kill_all(const Detected& found, std::int64_t term_ms) {
  return Killing(found, term_ms).run();
}

void signal_pool(const std::string& root, int signal) {
  struct stat status {};
  auto file = read_pid_file(root, "pool");
  if (!file || ::stat(root.c_str(), &status) != 0) return;
  if (!identify(*file, status)) return;
  auto held = Held::hold(file->id);
  if (!held) return;
  if (signal == SIGKILL) say_asked_to_leave(root);
  (void)held->signal(signal);
}

Json to_json(const Killed& killed) {
  Json targets = Json::array(), left = Json::array();
  for (const auto& target : killed.targets) {
    targets.push_back({{"pid", target.id.pid}, {"cmd", target.command}});
  }
  for (const auto& each : killed.left) {
    left.push_back({{"pid", each.pid}, {"why", each.why}});
  }
  return {{"ts", rfc3339_now()},
          {"targets", targets},
          {"terminated", killed.terminated},
          {"killed", killed.killed},
          {"left", left},
          {"took_ms", killed.took_ms}};
}

std::string to_text(const Killed& killed, const std::string& root) {
  std::string text = rfc3339_now() + " ended what ran on " + root + "\n";
  for (const auto& target : killed.targets) {
    text += "target " + std::to_string(target.id.pid) + ": " + target.command +
            "\n";
  }
  text += "ended after TERM:" + pids_text(killed.terminated) + "\n";
  text += "ended after KILL:" + pids_text(killed.killed) + "\n";
  for (const auto& each : killed.left) {
    text += "left: " + std::to_string(each.pid) + ": " + each.why + "\n";
  }
  return text + "took " + std::to_string(killed.took_ms) + " ms\n";
}

// --- Reports ---------------------------------------------------------------

Result<void> write_report(const std::string& root, const std::string& name,
                          const std::string& text) {
  struct stat status {};
  if (::stat((root + "/queue").c_str(), &status) != 0) return {};
  auto dir = open_ops(root, true);
  if (!dir) return dir.error();
  return write_whole(*dir, name, text);
}

void remove_report(const std::string& root, const std::string& name) {
  auto dir = open_ops(root, false);
  if (!dir) return;
  ::unlinkat(dir->fd.get(), name.c_str(), 0);
}

}  // namespace machina
