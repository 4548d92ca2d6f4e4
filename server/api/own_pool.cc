#include "server/api/own_pool.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <fstream>

#include "queue/base/logger.h"

namespace machina {
namespace {

constexpr int kPoolLocked = 75;
// It cannot serve here, and has said why in <root>/pool.trouble.
constexpr int kPoolUnusable = 69;
constexpr int kUnusableTries = 3;
constexpr Millis kUnusableRetryMs = 60'000;
constexpr Millis kBackoffMinMs = 250, kBackoffMaxMs = 30'000;
constexpr Millis kLockedRetryMs = 5'000, kRanWellMs = 10'000;

}  // namespace

OwnPool::OwnPool(const ServerOptions& options, Clock& clock, Loop& loop,
                 Pools& pools)
    : options_(options),
      clock_(clock),
      loop_(loop),
      pools_(pools),
      began_(clock.mono_ms()) {}

// False where the lock is another process's: a pool is there.
bool OwnPool::lock_is_free() const {
  const std::string path = options_.root + "/pool.lock";
  int fd = open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0) return true;
  bool is_free = flock(fd, LOCK_EX | LOCK_NB) == 0;
  close(fd);  // lets go of it
  return is_free;
}

// Whether the pool that was heard of, started by somebody else, is no more:
// its lock is free.
bool OwnPool::has_left() {
  Millis now = clock_.mono_ms();
  if (now - looked_ < kPoolLookMs) return false;
  looked_ = now;
  if (!lock_is_free()) return false;
  LogLine(Severity::info, "pool_left", "the pool has left");
  pools_.forget();
  return true;
}

void OwnPool::pool_serves() { unusable_times_ = 0; }

// A pool would wait for a server that does not come back, so one that has not
// heard of the drain in time (it was just starting, or between two calls) is
// told by a signal. To be killed is for those that stay even then: a service
// manager starts again whoever did not end by itself.
bool OwnPool::stays(Millis now, Millis leave_until) {
  if (!options_.events.end_pool) return running_;
  if (!running_ && lock_is_free()) return false;
  if (!asked_ && now >= leave_until - kPoolLeaveMs + kPoolHearMs) {
    asked_ = true;
    options_.events.end_pool(false);
  }
  return true;
}

void OwnPool::end_left_behind() {
  if (running_) ::kill(pid_, SIGKILL);  // ours, and not reaped
  if (!options_.events.end_pool || lock_is_free()) return;
  LogLine(Severity::warn, "pool_killed",
          "the pool did not leave within " + std::to_string(kPoolLeaveMs) +
              " ms and is killed");
  options_.events.end_pool(true);
}

void OwnPool::back_off(Millis now) {
  backoff_ = std::clamp(backoff_ * 2, kBackoffMinMs, kBackoffMaxMs);
  start_at_ = now + backoff_;
}

void OwnPool::supervise() {
  if (pools_.draining() || running_ || pools_.target() == 0 ||
      options_.pool_argv.empty()) {
    return;
  }
  const Millis now = clock_.mono_ms();
  if (now < start_at_ || (pools_.heard() && !has_left())) return;
  // One that outlived the last server has the lock and will call soon.
  if (now - began_ < kPoolGraceMs && !lock_is_free()) {
    start_at_ = now + 250;
    return;
  }
  Loop::Child child;
  child.argv = options_.pool_argv;
  // As many as there are to be, from the first: none is started for nothing.
  child.argv.insert(child.argv.end(),
                    {"--workers", std::to_string(pools_.target())});
  child.env = options_.pool_env;
  child.output = options_.root + "/logs/pool.log";
  started_ = now;
  auto started = loop_.start(child, [this](int code) { ended(code); });
  if (!started) {
    back_off(now);
    LogLine(Severity::error, "pool_not_started", started.error().what);
    return;
  }
  pid_ = *started;
  running_ = true;
}

void OwnPool::ended(int code) {
  running_ = false;
  const Millis now = clock_.mono_ms();
  if (code == kPoolLocked) {
    start_at_ = now + kLockedRetryMs;
    return;
  }
  if (now - started_ > kRanWellMs) backoff_ = 0;
  back_off(now);
  pools_.forget();  // whatever it reported is no longer so
  if (pools_.draining()) return loop_.wake();
  if (code == kPoolUnusable) {
    unusable();
    if (unusable_times_ >= kUnusableTries) return;
  } else {
    unusable_times_ = 0;
  }
  LogLine(Severity::error, "pool_ended",
          "the pool ended with code " + std::to_string(code) + "; see " +
              options_.root + "/pool.log; starting another in " +
              std::to_string(backoff_) + " ms")
      .with("code", code);
}

// It has ended because it cannot serve here.
void OwnPool::unusable() {
  std::ifstream file(options_.root + "/pool.trouble");
  std::string reason, remedy;
  std::getline(file, reason);
  std::getline(file, remedy);
  if (reason.empty()) reason = "the pool cannot serve here; see its log";
  reason.resize(std::min(reason.size(), kTroubleBytesMax));
  remedy.resize(std::min(remedy.size(), kTroubleBytesMax));
  pools_.ours_has_trouble({reason, remedy});
  if (++unusable_times_ < kUnusableTries) return;
  start_at_ = clock_.mono_ms() + kUnusableRetryMs;
  if (unusable_times_ > kUnusableTries) return;
  LogLine(Severity::error, "pool_unusable",
          "no job can run here, and the pool is not started again but once a "
          "minute: " +
              reason)
      .with("remedy", remedy);
}

}  // namespace machina
