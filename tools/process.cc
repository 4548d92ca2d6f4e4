#include "tools/process.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>

namespace machina {
namespace {

constexpr std::size_t kCommandBytesMax = 512;

// A file of /proc, whole; they have no size.
std::optional<std::string> read_proc(const std::string& path) {
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return std::nullopt;
  std::string all;
  char buffer[4096];
  ssize_t got = 0;
  while ((got = ::read(fd, buffer, sizeof buffer)) > 0 && all.size() < 65536) {
    all.append(buffer, static_cast<std::size_t>(got));
  }
  ::close(fd);
  if (got < 0) return std::nullopt;
  return all;
}

std::string command_of(const std::string& proc) {
  std::string text = read_proc(proc + "/cmdline").value_or("");
  while (!text.empty() && text.back() == '\0') text.pop_back();
  text.resize(std::min(text.size(), kCommandBytesMax));
  for (char& c : text) {
    if (c == '\0') {
      c = ' ';
    } else if (static_cast<unsigned char>(c) < 0x20 ||
               static_cast<unsigned char>(c) >= 0x7f) {
      c = '?';
    }
  }
  return text;
}

// The real uid, from "Uid:\t<real>\t...".
bool read_uid(const std::string& proc, uid_t* uid) {
  std::string status = read_proc(proc + "/status").value_or("");
  std::size_t at = status.find("\nUid:");
  if (at == std::string::npos) return false;
  *uid = static_cast<uid_t>(std::strtoul(status.c_str() + at + 5, nullptr, 10));
  return true;
}

void read_exe(const std::string& proc, Process* process) {
  std::string link = proc + "/exe";
  struct stat status {};
  char path[4096];
  ssize_t length = ::readlink(link.c_str(), path, sizeof path);
  if (length < 0 || ::stat(link.c_str(), &status) != 0) {
    process->exe_readable = false;
    return;
  }
  process->id.exe.assign(path, static_cast<std::size_t>(length));
  process->id.exe_device = status.st_dev;
  process->id.exe_inode = status.st_ino;
  constexpr std::string_view kDeleted = " (deleted)";
  if (process->id.exe.ends_with(kDeleted)) {
    process->id.exe.resize(process->id.exe.size() - kDeleted.size());
  }
  struct stat there {};
  process->exe_replaced = ::stat(process->id.exe.c_str(), &there) != 0 ||
                          there.st_dev != status.st_dev ||
                          there.st_ino != status.st_ino;
}

double uptime_s() {
  return std::strtod(read_proc("/proc/uptime").value_or("0").c_str(), nullptr);
}

}  // namespace

std::string boot_id() {
  std::string id = read_proc("/proc/sys/kernel/random/boot_id").value_or("");
  while (!id.empty() && id.back() == '\n') id.pop_back();
  return id;
}

std::optional<Process> look_at(pid_t pid) {
  std::string proc = "/proc/" + std::to_string(pid);
  auto stat = read_proc(proc + "/stat");
  if (!stat) return std::nullopt;
  // The name may hold anything, brackets too: fields count from the last one.
  std::size_t at = stat->rfind(')');
  if (at == std::string::npos) return std::nullopt;
  std::istringstream fields(stat->substr(at + 1));
  Process process;
  process.id.pid = pid;
  std::string skipped;
  fields >> process.state >> process.parent;       // fields 3 and 4
  for (int i = 5; i < 22; ++i) fields >> skipped;  // to field 22
  fields >> process.id.start_ticks;
  if (!fields || process.state == 'Z' || process.state == 'X') {
    return std::nullopt;
  }
  if (!read_uid(proc, &process.id.uid)) return std::nullopt;
  process.id.boot_id = boot_id();
  double started = static_cast<double>(process.id.start_ticks) /
                   static_cast<double>(::sysconf(_SC_CLK_TCK));
  process.age_s = std::max<std::int64_t>(
      0, static_cast<std::int64_t>(uptime_s() - started));
  process.command = command_of(proc);
  read_exe(proc, &process);
  return process;
}

ProcessId this_process() {
  auto self = look_at(::getpid());
  return self ? self->id : ProcessId{};
}

std::vector<Process> all_processes() {
  std::vector<Process> all;
  DIR* proc = ::opendir("/proc");
  if (proc == nullptr) return all;
  while (dirent* entry = ::readdir(proc)) {  // NOLINT(concurrency-mt-unsafe)
    pid_t pid = std::atoi(entry->d_name);
    if (pid <= 0) continue;
    if (auto process = look_at(pid)) all.push_back(std::move(*process));
  }
  ::closedir(proc);
  return all;
}

std::vector<Process> descendants(const std::vector<Process>& all, pid_t top) {
  std::multimap<pid_t, const Process*> by_parent;
  for (const auto& process : all) by_parent.emplace(process.parent, &process);
  std::vector<Process> found;
  std::vector<pid_t> open = {top};
  while (!open.empty()) {
    pid_t parent = open.back();
    open.pop_back();
    auto [from, to] = by_parent.equal_range(parent);
    for (auto at = from; at != to; ++at) {
      if (found.size() > all.size()) return found;  // a cycle cannot be
      found.push_back(*at->second);
      open.push_back(at->second->id.pid);
    }
  }
  return found;
}

std::string difference(const ProcessId& recorded, const Process& seen) {
  if (recorded.boot_id != seen.id.boot_id) {
    return "it was written before this boot";
  }
  if (recorded.start_ticks != seen.id.start_ticks) {
    return "that number is another process's now, started at another time";
  }
  if (recorded.exe_inode != 0 && seen.exe_readable &&
      (recorded.exe_inode != seen.id.exe_inode ||
       recorded.exe_device != seen.id.exe_device)) {
    return "that number runs another executable, " + seen.id.exe;
  }
  return "";
}

Result<Held> Held::hold(const ProcessId& recorded) {
  // The descriptor first, the look after: what is seen is what is held.
  int fd = static_cast<int>(::syscall(SYS_pidfd_open, recorded.pid, 0));
  if (fd < 0) {
    return Error{Code::not_found,
                 "process " + std::to_string(recorded.pid) + ": " +
                     (errno == ESRCH ? "it has ended" : std::strerror(errno))};
  }
  auto seen = look_at(recorded.pid);
  std::string why = seen ? difference(recorded, *seen) : "it has ended";
  if (!why.empty()) {
    ::close(fd);
    return Error{Code::not_found,
                 "process " + std::to_string(recorded.pid) + ": " + why};
  }
  Held held(fd, std::move(*seen));
  return held;
}

Held::Held(Held&& other) noexcept
    : fd_(other.fd_), process_(std::move(other.process_)) {
  other.fd_ = -1;
}

Held& Held::operator=(Held&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(process_, other.process_);
  return *this;
}

Held::~Held() {
  if (fd_ >= 0) ::close(fd_);
}

Result<void> Held::signal(int number) const {
  if (::syscall(SYS_pidfd_send_signal, fd_, number, nullptr, 0) == 0 ||
      errno == ESRCH) {
    return {};  // one that has ended needs no signal
  }
  return Error{Code::io, "signal process " + std::to_string(process_.id.pid) +
                             ": " + std::strerror(errno)};
}

bool Held::ended(int timeout_ms) const {
  pollfd item{fd_, POLLIN, 0};
  return ::poll(&item, 1, timeout_ms) > 0;
}

}  // namespace machina
