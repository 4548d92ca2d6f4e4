#include "workers/sandbox/cgroup.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <set>
#include <sstream>

#include "workers/sandbox/wire.h"

namespace machina::sandbox {

namespace {

constexpr char kPrefix[] = "machina.";
constexpr char kSocketLimit[] = "/memory.kmem.tcp.limit_in_bytes";

int write_file(const std::string& path, const std::string& text) {
  const int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) return errno;
  const ssize_t n = write(fd, text.data(), text.size());
  const int error = n < 0 ? errno : 0;
  close(fd);
  return error;
}

std::string read_all(const std::string& path) {
  std::ifstream in(path);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

bool exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

bool make_dir(const std::string& path, int* error) {
  if (mkdir(path.c_str(), 0755) == 0 || errno == EEXIST) return true;
  *error = errno;
  return false;
}

// One that was killed and that nobody has waited for yet makes nothing more.
bool alive(pid_t pid) {
  if (kill(pid, 0) != 0 && errno != EPERM) return false;
  const std::string stat = read_all("/proc/" + std::to_string(pid) + "/stat");
  const std::size_t name_end = stat.rfind(") ");
  const char state = name_end == std::string::npos ? '?' : stat[name_end + 2];
  return state != 'Z' && state != 'X';
}

struct flock whole_file(short type) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  return lock;
}

// Not flock(2): a child that outlives its spawner must not hold it on.
int lock_dir(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  struct flock lock = whole_file(F_RDLCK);
  if (fd >= 0) (void)fcntl(fd, F_SETLK, &lock);
  return fd;
}

// Of somebody else's: to close a descriptor of one's own drops one's lock.
bool locked_by_another(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return false;
  struct flock lock = whole_file(F_WRLCK);
  const bool locked = fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
  close(fd);
  return locked;
}

void remove_tree(const std::string& base) {
  for (int slot = 0; slot < kSlotsMax; ++slot) {
    rmdir((base + "/slot-" + std::to_string(slot)).c_str());
  }
  rmdir(base.c_str());
}

std::set<long> members(const std::string& dir) {
  std::set<long> all;
  std::istringstream procs(read_all(dir + "/cgroup.procs"));
  for (long pid; procs >> pid;) all.insert(pid);
  return all;
}

// Kills every process of a group; true where there was none. A number in the
// list may be another process's by the time it is used: so processes are taken
// hold of first, and those are killed whose number is still in the list then.
bool kill_members(const std::string& dir) {
  const std::set<long> seen = members(dir);
  if (seen.empty()) return true;
  if (exists(dir + "/cgroup.kill") &&
      write_file(dir + "/cgroup.kill", "1") == 0) {
    return false;
  }
  std::vector<std::pair<long, int>> held;
  for (const long pid : seen) {
    if (pid <= 1) continue;
    const long fd = syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0);
    if (fd >= 0) held.emplace_back(pid, static_cast<int>(fd));
  }
  const std::set<long> still = members(dir);
  for (const auto& [pid, fd] : held) {
    if (still.count(pid)) kill_by_pidfd(fd);
    close(fd);
  }
  return false;
}

// Kills what is left in the groups of a maker that is gone: a sandbox whose
// keeper and spawner were killed with it may still be dying.
void kill_stale(const std::string& base) {
  for (int slot = 0; slot < kSlotsMax; ++slot) {
    kill_members(base + "/slot-" + std::to_string(slot));
  }
}

void empty_and_remove(const std::string& path) {
  for (int round = 0; round < 200 && exists(path); ++round) {
    if (round > 0) usleep(10'000);
    kill_stale(path);
    remove_tree(path);
  }
}

// G3. Directories whose maker is gone are emptied and removed: the pool that
// starts now may tell its server that the old one's workers hold nothing.
void sweep(const std::string& parent) {
  if (access(parent.c_str(), W_OK) != 0) return;  // another user's
  DIR* dir = opendir(parent.c_str());
  if (!dir) return;
  std::vector<std::string> stale;
  while (const dirent* entry = readdir(dir)) {
    if (std::strncmp(entry->d_name, kPrefix, sizeof(kPrefix) - 1) != 0) {
      continue;
    }
    const long pid = std::atol(entry->d_name + sizeof(kPrefix) - 1);
    const std::string path = parent + "/" + entry->d_name;
    if (pid > 0 && !alive(static_cast<pid_t>(pid)) &&
        !locked_by_another(path)) {
      stale.push_back(path);
    }
  }
  closedir(dir);
  for (const auto& path : stale) empty_and_remove(path);
}

// What the kernel must be told so that `base` and its slots have a controller.
int enable(const std::string& dir, const char* controller) {
  return write_file(dir + "/cgroup.subtree_control",
                    std::string("+") + controller);
}

std::uint64_t number_after(const char* text, const char* key) {
  const std::size_t n = std::strlen(key);
  for (const char* line = text; line;) {
    if (std::strncmp(line, key, n) == 0 && line[n] == ' ') {
      return std::strtoull(line + n + 1, nullptr, 10);
    }
    line = std::strchr(line, '\n');
    if (line) ++line;
  }
  return 0;
}

bool read_at(int fd, char* text, std::size_t size) {
  if (fd < 0) return false;
  const ssize_t n = pread(fd, text, size - 1, 0);
  if (n <= 0) return false;
  text[n] = 0;
  return true;
}

bool has_word(const std::string& list, const std::string& word, char gap) {
  std::istringstream in(list);
  for (std::string item; std::getline(in, item, gap);) {
    if (item == word) return true;
  }
  return false;
}

}  // namespace

Counters read_counters(const CounterFds& fds) {
  Counters c;
  char text[1024];
  if (read_at(fds.oom, text, sizeof(text))) {
    c.oom_kills = number_after(text, "oom_kill");
  }
  if (read_at(fds.pids, text, sizeof(text))) {
    c.pids_hits = number_after(text, "max");
  }
  if (read_at(fds.cpu, text, sizeof(text))) {
    c.cpu_us = std::strchr(text, ' ') ? number_after(text, "usage_usec")
                                      : std::strtoull(text, nullptr, 10) / 1000;
  }
  return c;
}

namespace {

std::uint64_t number_in(int fd) {
  char text[64];
  return read_at(fd, text, sizeof(text)) ? std::strtoull(text, nullptr, 10) : 0;
}

std::uint64_t less(std::uint64_t a, std::uint64_t b) {
  return a > b ? a - b : 0;
}

}  // namespace

std::uint64_t MemoryMeter::cached() const {
  char text[8192];
  if (!read_at(fds_.memory_stat, text, sizeof(text))) return 0;
  // Both hold what lies in a tmpfs or a memfd, which is the job's.
  return less(number_after(text, fds_.v2 ? "file" : "cache"),
              number_after(text, "shmem"));
}

void MemoryMeter::set_base() {
  if (works()) base_ = less(number_in(fds_.memory), cached());
}

void MemoryMeter::begin() {
  peak_ = most_cached_ = 0;
  peak_was_reset_ = works() && fds_.memory_peak >= 0 &&
                    pwrite(fds_.memory_peak, "0", 1, 0) == 1;
}

void MemoryMeter::look() {
  if (!works()) return;
  const std::uint64_t files = cached();
  most_cached_ = std::max(most_cached_, files);
  const std::uint64_t now =
      less(number_in(fds_.memory), files) + number_in(fds_.sockets);
  std::uint64_t found = now;
  if (peak_was_reset_) {
    found = std::max(found, less(number_in(fds_.memory_peak), most_cached_));
  }
  peak_ = std::max(peak_, less(found, base_));
}

std::string Cgroups::slot_dir(const Hierarchy& h, int slot) const {
  return h.base + "/slot-" + std::to_string(slot);
}

std::vector<std::string> own_pids_groups() {
  std::vector<std::string> groups;
  std::istringstream self(read_all("/proc/self/cgroup"));
  for (std::string line; std::getline(self, line);) {
    const auto a = line.find(':');
    const auto b = line.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos) continue;
    const std::string path = line.substr(b + 1);
    const std::string names = line.substr(a + 1, b - a - 1);
    const std::string end = path == "/" ? "" : path;
    if (has_word(names, "pids", ',')) {
      groups.push_back("/sys/fs/cgroup/pids" + end);
    } else if (names.empty()) {
      groups.push_back("/sys/fs/cgroup" + end);
    }
  }
  return groups;
}

void Cgroups::find(bool no_memory, bool no_pids, bool no_cpu) {
  hierarchies_.clear();
  // Our own place in each hierarchy: "4:memory:/path", "0::/path".
  std::map<std::string, std::string> own;
  std::istringstream self(read_all("/proc/self/cgroup"));
  for (std::string line; std::getline(self, line);) {
    const auto a = line.find(':');
    const auto b = line.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos) continue;
    std::istringstream names(line.substr(a + 1, b - a - 1));
    const std::string path = line.substr(b + 1);
    if (b == a + 1) own["2"] = path;
    for (std::string name; std::getline(names, name, ',');) own[name] = path;
  }
  std::string v2_mount;
  std::map<std::string, std::string> v1;
  std::istringstream mounts(read_all("/proc/self/mounts"));
  for (std::string line; std::getline(mounts, line);) {
    std::istringstream words(line);
    std::string device, where, type, options;
    words >> device >> where >> type >> options;
    if (type == "cgroup2" && v2_mount.empty()) v2_mount = where;
    if (type != "cgroup") continue;
    for (const char* name : {"memory", "pids", "cpuacct"}) {
      if (has_word(options, name, ',') && !v1.count(name)) v1[name] = where;
    }
  }
  if (v1.count("memory") && !no_memory) {
    add_v1(v1["memory"], own["memory"], "memory");
  }
  if (v1.count("pids") && !no_pids) add_v1(v1["pids"], own["pids"], "pids");
  if (v1.count("cpuacct") && !no_cpu)
    add_v1(v1["cpuacct"], own["cpuacct"], "cpuacct");
  if (!v2_mount.empty()) add_v2(v2_mount, own["2"], no_memory, no_pids, no_cpu);
  if (memory_error_ && memory_why_.empty()) {
    memory_why_ = "no memory controller that this process may use";
  }
}

void Cgroups::add_v1(const std::string& mount, const std::string& own,
                     const std::string& controller) {
  std::string parent = mount + (own == "/" ? "" : own);
  // Inside a container the path may be the host's: then the mount is ours.
  if (!exists(parent + "/cgroup.procs")) parent = mount;
  sweep(parent);
  Hierarchy h;
  h.has_memory = controller == "memory";
  h.has_pids = controller == "pids";
  h.has_cpu = controller == "cpuacct";
  for (const auto& other : hierarchies_) {
    // Co-mounted, as cpu,cpuacct are.
    if (other.base.starts_with(parent + "/" + kPrefix)) return;
  }
  const int error = make_base(parent, &h);
  if (h.has_memory) {
    memory_error_ = error;
    if (error) memory_why_ = "cannot make " + h.base;
  }
  if (h.has_pids) pids_error_ = error;
  if (error == 0) hierarchies_.push_back(h);
}

int Cgroups::make_base(const std::string& parent, Hierarchy* h) {
  const std::string first = parent + "/" + kPrefix + std::to_string(getpid());
  for (int i = 0;; ++i) {
    h->base = i == 0 ? first : first + "." + std::to_string(i);
    if (mkdir(h->base.c_str(), 0755) != 0) {
      if (errno != EEXIST) return errno;
      // Another PID namespace's, or of one that died with our number.
      if (locked_by_another(h->base)) continue;
      empty_and_remove(h->base);
      int error = 0;
      if (!make_dir(h->base, &error)) return error;
    }
    h->lock = lock_dir(h->base);
    return 0;
  }
}

// G4
int Cgroups::make_again(Hierarchy* h) {
  int error = 0;
  if (!make_dir(h->base, &error)) return error;
  if (h->lock >= 0) close(h->lock);
  h->lock = lock_dir(h->base);
  if (h->v2 && h->has_memory) error = enable(h->base, "memory");
  if (h->v2 && h->has_pids && error == 0) error = enable(h->base, "pids");
  return error;
}

void Cgroups::add_v2(const std::string& mount, const std::string& own,
                     bool no_memory, bool no_pids, bool no_cpu) {
  std::vector<std::string> parents;
  if (geteuid() != 0 || own.empty()) {
    parents = {mount + (own == "/" ? "" : own)};
  } else {
    // The root of the hierarchy may hold processes beside groups with
    // controllers; other groups may not.
    parents = {mount, mount + own};
  }
  for (const auto& parent : parents) {
    if (!exists(parent + "/cgroup.procs")) continue;
    sweep(parent);
    Hierarchy h;
    h.v2 = true;
    if (const int error = make_base(parent, &h); error != 0) {
      if (memory_error_) memory_error_ = error;
      if (pids_error_) pids_error_ = error;
      continue;
    }
    // "+memory +pids" must be given by the parent to the base, and by the base
    // to its slots.
    for (const char* name : {"memory", "pids"}) {
      const bool wanted = name[0] == 'm' ? !no_memory && memory_error_ != 0
                                         : !no_pids && pids_error_ != 0;
      std::string list = read_all(parent + "/cgroup.controllers");
      if (!list.empty() && list.back() == '\n') list.pop_back();
      if (!wanted || !has_word(list, name, ' ')) continue;
      int failed = enable(parent, name);
      if (!failed) failed = enable(h.base, name);
      if (name[0] == 'm') {
        memory_error_ = failed;
        h.has_memory = !failed;
        if (failed) memory_why_ = "cannot enable memory in " + parent;
      } else {
        pids_error_ = failed;
        h.has_pids = !failed;
      }
    }
    h.has_cpu = !no_cpu;  // cpu.stat has usage_usec without any controller
    hierarchies_.push_back(h);
    return;
  }
}

int Cgroups::make_slot(int slot, std::string* where) {
  for (auto& h : hierarchies_) {
    *where = slot_dir(h, slot);
    int error = 0;
    if (make_dir(*where, &error)) continue;
    if (error != ENOENT) return error;
    if (const int again = make_again(&h); again != 0) return again;
    if (!make_dir(*where, &error)) return error;
  }
  return 0;
}

int Cgroups::join(int slot) const {
  for (const auto& h : hierarchies_) {
    const int error = write_file(slot_dir(h, slot) + "/cgroup.procs", "0");
    // A group of no limit is a convenience; one that limits is not.
    if (error && (h.has_memory || h.has_pids)) return error;
  }
  return 0;
}

int Cgroups::limit(int slot, std::uint64_t memory_bytes,
                   std::uint64_t socket_bytes, std::uint64_t pids) const {
  for (const auto& h : hierarchies_) {
    const std::string dir = slot_dir(h, slot);
    int error = 0;
    if (h.has_memory && h.v2) {
      error = write_file(dir + "/memory.max", std::to_string(memory_bytes));
      if (!error && exists(dir + "/memory.swap.max")) {
        error = write_file(dir + "/memory.swap.max", "0");
      }
    } else if (h.has_memory) {
      // memsw must never be below the plain limit: raise it first.
      const std::string swap = dir + "/memory.memsw.limit_in_bytes";
      const bool has_swap = exists(swap);
      if (has_swap) write_file(swap, "-1");
      error = write_file(dir + "/memory.limit_in_bytes",
                         std::to_string(memory_bytes));
      if (!error && has_swap) {
        error = write_file(swap, std::to_string(memory_bytes));
      }
      // Busy while more than that is charged: sockets of the sandbox before
      // go a moment after it.
      const std::string sockets = dir + kSocketLimit;
      if (!error && exists(sockets)) {
        const std::string most = std::to_string(socket_bytes);
        for (int round = 0; round < 200; ++round) {
          error = write_file(sockets, most);
          if (error != EBUSY) break;
          usleep(5000);
        }
      }
    }
    if (!error && h.has_pids) {
      error = write_file(dir + "/pids.max", std::to_string(pids));
    }
    if (error) return error;
  }
  return 0;
}

void Cgroups::limit_all(std::uint64_t pids) const {
  for (const auto& h : hierarchies_) {
    // Behind what each slot gets: jobs that began with a larger part, before
    // there were more slots, are counted here.
    if (h.has_pids) write_file(h.base + "/pids.max", std::to_string(pids));
  }
}

CounterFds Cgroups::open_counters(int slot) const {
  CounterFds fds;
  for (const auto& h : hierarchies_) {
    const std::string dir = slot_dir(h, slot);
    const auto get = [&](const char* name, int how = O_RDONLY) {
      return open((dir + name).c_str(), how | O_CLOEXEC);
    };
    if (h.has_memory && fds.oom < 0) {
      fds.oom = get(h.v2 ? "/memory.events" : "/memory.oom_control");
      fds.v2 = h.v2;
      fds.memory = get(h.v2 ? "/memory.current" : "/memory.usage_in_bytes");
      fds.memory_stat = get("/memory.stat");
      fds.memory_peak =
          get(h.v2 ? "/memory.peak" : "/memory.max_usage_in_bytes", O_RDWR);
      if (!h.v2) fds.sockets = get("/memory.kmem.tcp.usage_in_bytes");
    }
    if (h.has_pids && fds.pids < 0) fds.pids = get("/pids.events");
    if (h.has_cpu && fds.cpu < 0) {
      fds.cpu = get(h.v2 ? "/cpu.stat" : "/cpuacct.usage");
    }
  }
  return fds;
}

bool Cgroups::kill_all(int slot) const {
  bool empty = true;
  for (const auto& h : hierarchies_) {
    empty = kill_members(slot_dir(h, slot)) && empty;
  }
  return empty;
}

std::vector<std::string> Cgroups::bases() const {
  std::vector<std::string> all;
  for (const auto& h : hierarchies_) all.push_back(h.base);
  return all;
}

void Cgroups::remove() const {
  // A group of a process that was just reaped can be busy for a moment.
  for (int round = 0; round < 20; ++round) {
    bool left = false;
    for (const auto& h : hierarchies_) {
      remove_tree(h.base);
      left = left || exists(h.base);
    }
    if (!left) return;
    usleep(10'000);
  }
}

}  // namespace machina::sandbox
