#include "workers/sandbox/census.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

namespace machina::sandbox {

namespace {

constexpr std::uint64_t kTicksUs = 20'000;  // N1: of user and of system time
constexpr std::uint64_t kTickUs = 10'000;   // USER_HZ is 100 on all Linux
constexpr std::uint64_t kManyTcp = 16;      // sockets

bool read_of(int dir, const char* name, const char* file, char* text,
             std::size_t size) {
  char path[64];
  const int n = std::snprintf(path, sizeof(path), "%s%s", name, file);
  if (n < 0 || n >= static_cast<int>(sizeof(path))) return false;
  const int fd = openat(dir, path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const ssize_t got = read(fd, text, size - 1);
  close(fd);
  if (got <= 0) return false;
  text[got] = 0;
  return true;
}

// Every process of this /proc but PID 1.
template <class Act>
void each_process(int proc, Act act) {
  const int dir = openat(proc, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (dir < 0) return;
  alignas(8) char names[8192];
  for (;;) {
    const long n = syscall(SYS_getdents64, dir, names, sizeof(names));
    if (n <= 0) break;
    for (long at = 0; at < n;) {
      unsigned short length;
      std::memcpy(&length, names + at + 16, sizeof(length));
      const char* name = names + at + 19;
      if (name[0] >= '1' && name[0] <= '9' && std::strcmp(name, "1") != 0) {
        act(dir, name);
      }
      at += length;
    }
  }
  close(dir);
}

std::uint64_t microseconds(const timespec& t) {
  return static_cast<std::uint64_t>(t.tv_sec) * 1'000'000 +
         static_cast<std::uint64_t>(t.tv_nsec) / 1000;
}

std::uint64_t now_us() {
  timespec t{};
  clock_gettime(CLOCK_BOOTTIME, &t);
  return microseconds(t);
}

// Of one socket: "bytes" and "bytes" in two columns, or, where `second` is -1,
// "sent:received" in hexadecimal.
std::uint64_t queued_in(const char* line, int first, int second) {
  std::uint64_t sum = 0;
  for (int column = 0; *line; ++column) {
    line += std::strspn(line, " ");
    if (column == first && second < 0) {
      char* colon = nullptr;
      sum = std::strtoull(line, &colon, 16);
      return *colon == ':' ? sum + std::strtoull(colon + 1, nullptr, 16) : sum;
    }
    if (column == first || column == second) {
      sum += std::strtoull(line, nullptr, 10);
    }
    line += std::strcspn(line, " ");
  }
  return sum;
}

// Over the lines of a table but its heading.
std::uint64_t queued(int proc, const char* table, int first, int second) {
  const int fd = openat(proc, table, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  std::uint64_t sum = 0;
  std::string rest;
  char buffer[16384];
  bool heading = true;
  for (ssize_t n; (n = read(fd, buffer, sizeof(buffer))) > 0;) {
    rest.append(buffer, static_cast<std::size_t>(n));
    std::size_t at = 0;
    for (std::size_t end; (end = rest.find('\n', at)) != std::string::npos;
         at = end + 1) {
      rest[end] = 0;
      if (!heading) sum += queued_in(rest.data() + at, first, second);
      heading = false;
    }
    rest.erase(0, at);
  }
  close(fd);
  return sum;
}

std::uint64_t in_use(int proc, const char* file, const char* key) {
  char text[1024];
  if (!read_of(proc, file, "", text, sizeof(text))) return 0;
  const char* at = std::strstr(text, key);
  return at ? std::strtoull(at + std::strlen(key), nullptr, 10) : 0;
}

}  // namespace

std::uint64_t queued_bytes(int proc_fd, bool inet) {
  std::uint64_t sum = queued(proc_fd, "self/net/netlink", 4, 5);
  if (!inet) return sum;
  sum += queued(proc_fd, "self/net/udp", 4, -1) +
         queued(proc_fd, "self/net/udp6", 4, -1);
  // Milliseconds each, since the kernel looks through those of the whole host:
  // not for a few sockets.
  if (in_use(proc_fd, "self/net/sockstat", "TCP: inuse ") +
          in_use(proc_fd, "self/net/sockstat6", "TCP6: inuse ") >=
      kManyTcp) {
    sum += queued(proc_fd, "self/net/tcp", 4, -1) +
           queued(proc_fd, "self/net/tcp6", 4, -1);
  }
  return sum;
}

Census::Sum Census::count(bool exactly) const {
  Sum sum;
  each_process(proc_, [&](int dir, const char* name) {
    char text[4096];
    const auto value = [&](const char* key) -> std::uint64_t {
      const char* at = std::strstr(text, key);
      return at ? std::strtoull(at + std::strlen(key), nullptr, 10) : 0;
    };
    if (exactly && read_of(dir, name, "/smaps_rollup", text, sizeof(text))) {
      sum.anon_kb += value("\nPss_Anon:");
      sum.shmem_kb += value("\nPss_Shmem:");
    } else if (read_of(dir, name, "/status", text, sizeof(text))) {
      sum.anon_kb += value("\nRssAnon:");
      sum.shmem_kb += value("\nRssShmem:");
      sum.threads += value("\nThreads:");
    }
  });
  return sum;
}

bool Census::read_process(int dir, const char* name, Process* out) {
  char text[1024];
  if (!read_of(dir, name, "/stat", text, sizeof(text))) return false;
  // The name in parentheses is the job's own and may hold anything.
  const char* rest = std::strrchr(text, ')');
  if (!rest) return false;
  int parent = 0;
  unsigned long long user = 0, system = 0, start = 0;
  long long gone_user = 0, gone_system = 0;
  if (std::sscanf(rest + 1,
                  " %*c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu %lld "
                  "%lld %*d %*d %*d %*d %llu",
                  &parent, &user, &system, &gone_user, &gone_system,
                  &start) != 6) {
    return false;
  }
  out->parent = parent;
  out->start = start;
  out->collected_us =
      static_cast<std::uint64_t>(gone_user + gone_system) * kTickUs;
  // To the nanosecond; any process's clock may be read.
  const auto pid = static_cast<pid_t>(std::atoi(name));
  clockid_t clock;
  timespec own{};
  if (clock_getcpuclockid(pid, &clock) == 0 &&
      clock_gettime(clock, &own) == 0) {
    out->own_us = microseconds(own);
  } else {
    out->own_us = (user + system) * kTickUs;
  }
  return true;
}

Census::Processes Census::look() const {
  Processes now;
  each_process(proc_, [&](int dir, const char* name) {
    Process p;
    if (read_process(dir, name, &p)) now[std::atoi(name)] = p;
  });
  return now;
}

void Census::begin() {
  *this = Census(proc_);
  looked_us_ = now_us();
}

std::uint64_t Census::cpu_us(std::uint64_t reaped_us, bool alone) {
  Processes now;
  if (!alone) now = look();
  const std::uint64_t at = now_us();
  const std::uint64_t interval = at - looked_us_;
  const auto less = [](std::uint64_t a, std::uint64_t b) {
    return a - std::min(a, b);
  };
  const auto survives = [&](pid_t pid) {
    const auto before = last_.find(pid);
    const auto after = now.find(pid);
    return before != last_.end() && after != now.end() &&
           before->second.start == after->second.start;
  };
  // What arrived at each that is still there. PID 1 is told by wait4().
  std::map<pid_t, std::uint64_t> arrived;
  arrived[1] = less(reaped_us, reaped_us_);
  std::uint64_t total = reaped_us;
  for (auto& [pid, p] : now) {
    total += p.own_us + p.collected_us;
    if (survives(pid)) {
      const Process& before = last_[pid];
      p.tail_us = less(p.own_us, before.own_us) / 2;
      arrived[pid] = less(p.collected_us, before.collected_us);
    } else {
      // One that lives for less than an interval is seen that much more
      // seldom: once it is seen it stands for an interval.
      const std::uint64_t age =
          std::max<std::uint64_t>(less(at, p.start * kTickUs), 1);
      p.tail_us = less(interval * std::min(p.own_us, age) / age, p.own_us);
    }
  }
  // Its time is to arrive at the nearest ancestor that is still there; where
  // that is not its parent it may have been left to another instead.
  struct Gone {
    std::uint64_t used_us = 0, orphans_us = 0;
  };
  std::map<pid_t, Gone> gone;
  for (const auto& [pid, p] : last_) {
    if (survives(pid)) continue;
    pid_t heir = p.parent;
    while (heir > 1 && !survives(heir)) {
      const auto up = last_.find(heir);
      heir = up == last_.end() ? 1 : up->second.parent;
    }
    heir = std::max<pid_t>(heir, 1);
    gone[heir].used_us += p.own_us + p.collected_us;
    if (heir != p.parent) gone[heir].orphans_us += p.own_us + p.collected_us;
    tails_[heir] += p.tail_us;
  }
  std::uint64_t surplus = 0;
  for (const auto& [pid, came] : arrived) {
    const std::uint64_t owed = debts_[pid] + gone[pid].used_us;
    surplus += less(came, owed);
    debts_[pid] = less(owed, came);
  }
  for (const auto& [pid, came] : arrived) {
    std::uint64_t& debt = debts_[pid];
    const std::uint64_t elsewhere =
        std::min({debt, gone[pid].orphans_us, surplus});
    debt -= elsewhere;
    surplus -= elsewhere;
    if (debt > kTicksUs) {
      lost_us_ += debt + tails_[pid];
      debt = tails_[pid] = 0;
    } else if (debt == 0) {
      tails_[pid] = 0;
    }
  }
  for (const auto& [pid, p] : last_) {
    if (survives(pid)) continue;
    debts_.erase(pid);
    tails_.erase(pid);
  }
  last_ = std::move(now);
  reaped_us_ = reaped_us;
  looked_us_ = at;
  total_us_ = std::max(total_us_, total + lost_us_);
  return total_us_;
}

}  // namespace machina::sandbox
