#include "workers/worker/heartbeat.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

#include "queue/base/check.h"

namespace machina {
namespace {

using std::chrono::milliseconds;

constexpr Millis kProgressEveryMs = 500;
constexpr Millis kRetryMs = 100;

}  // namespace

Heartbeat::Heartbeat(HttpClient::Connect connect,
                     std::function<void(const std::string&)> on_busy)
    : client_(std::move(connect)),
      on_busy_(std::move(on_busy)),
      wake_fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  CHECK(wake_fd_ >= 0);
  thread_ = std::thread([this] { loop(); });
}

Heartbeat::~Heartbeat() {
  {
    std::lock_guard lock(mutex_);
    quit_ = true;
    client_.interrupt();
  }
  changed_.notify_all();
  thread_.join();
  ::close(wake_fd_);
}

void Heartbeat::hold(const std::vector<Lease>& leases) {
  bool was_busy = false;
  {
    std::lock_guard lock(mutex_);
    held_.clear();
    for (const Lease& lease : leases) {
      Held& held = held_[lease.token];
      held.item.token = lease.token;
    }
    job_id_ = leases.empty() ? "" : leases.front().job_id;
    if (!leases.empty()) lease_ms_ = leases.front().lease_ms;
    due_ = Clock::now() + milliseconds(kQuietMs);
    progress_sent_ = {};
    std::swap(was_busy, busy_);
    if (in_call_) client_.interrupt();
    alarm_ = false;
    std::uint64_t ignored;
    (void)!::read(wake_fd_, &ignored, sizeof ignored);
    if (was_busy) on_busy_("");
  }
  changed_.notify_all();
}

void Heartbeat::drop(const std::string& token) {
  std::lock_guard lock(mutex_);
  held_.erase(token);
  if (in_call_) client_.interrupt();
}

void Heartbeat::progress(const std::string& token, int percent,
                         const std::string& message) {
  std::lock_guard lock(mutex_);
  const auto at = held_.find(token);
  if (at == held_.end()) return;
  at->second.item.percent = std::clamp(percent, 0, 100);
  at->second.item.message = message;
  at->second.fresh = true;
  // Before the first beat nothing is sooner than that one.
  if (!in_call_ && progress_sent_ == Clock::time_point()) return;
  // Two words of progress within the pause: the second follows after it, or
  // the job would show the first until the next beat.
  const auto next = progress_sent_ + milliseconds(kProgressEveryMs);
  due_ = in_call_ ? next : std::min(due_, next);
  if (in_call_) client_.interrupt();
  changed_.notify_all();
}

Stop Heartbeat::stop_of(const std::string& token) const {
  std::lock_guard lock(mutex_);
  const auto at = held_.find(token);
  return at == held_.end() ? Stop::none : at->second.stop;
}

void Heartbeat::release_all() {
  std::lock_guard lock(mutex_);
  for (auto& [token, held] : held_) {
    if (held.stop == Stop::none) held.stop = Stop::released;
  }
  raise_alarm();
}

void Heartbeat::raise_alarm() {
  alarm_ = true;
  const std::uint64_t one = 1;
  (void)!::write(wake_fd_, &one, sizeof one);
}

void Heartbeat::loop() {
  std::unique_lock lock(mutex_);
  while (!quit_) {
    if (held_.empty()) {
      changed_.wait(lock);
    } else if (Clock::now() < due_) {
      changed_.wait_until(lock, due_);
    } else {
      beat(lock);
    }
  }
}

void Heartbeat::beat(std::unique_lock<std::mutex>& lock) {
  std::vector<HeartbeatItem> items;
  bool parked = true;
  for (auto& [token, held] : held_) {
    items.push_back(held.item);
    if (held.fresh) progress_sent_ = Clock::now();
    held.fresh = false;
    // The server has no reason to hold a beat for what it has answered.
    parked = parked && held.stop == Stop::none;
  }
  if (!busy_) on_busy_(job_id_);
  busy_ = true;
  const Millis interval = std::max<Millis>(lease_ms_ / 3, 1);
  const Millis wait_ms = parked ? std::min<Millis>(interval, 30'000) : 0;
  const auto sent = Clock::now();
  in_call_ = true;
  client_.resume();
  if (quit_) client_.interrupt();
  lock.unlock();
  const auto reply = client_.post(
      "/v1/leases/heartbeat", write_heartbeat(items, wait_ms), wait_ms + 5000);
  lock.lock();
  in_call_ = false;
  if (!reply) {
    const bool ours = reply.error().code == Code::conflict;
    due_ = std::max(due_, Clock::now() + milliseconds(ours ? 0 : kRetryMs));
    return;
  }
  if (reply->status == 200) take_answers(reply->body);
  // An answer long before its time with nothing new: keep to the interval.
  const bool early = Clock::now() - sent < milliseconds(interval / 2);
  due_ = std::max(due_, early ? sent + milliseconds(interval) : Clock::now());
}

void Heartbeat::take_answers(const std::string& body) {
  const auto answers = parse_heartbeat(body);
  if (!answers) return;
  for (const HeartbeatAnswer& answer : *answers) {
    const auto at = held_.find(answer.token);
    if (at == held_.end() || at->second.stop != Stop::none) continue;
    if (answer.lost) {
      at->second.stop = Stop::lost;
    } else if (answer.cancel) {
      at->second.stop = Stop::cancelled;
    } else {
      continue;
    }
    raise_alarm();
  }
}

}  // namespace machina
