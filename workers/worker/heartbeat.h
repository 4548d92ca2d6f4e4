// workers/worker/heartbeat.h
//
// Keeps leases alive from a thread and a connection of its own, and hears of
// cancels at once: each beat is a long poll of a third of the lease's time.
//
//   hold() -> kQuietMs later: beat, beat, ... -> drop() / hold() of others
//
//   Y1  An attempt shorter than kQuietMs costs no call.
//   Y2  stop_of() says `cancelled` or `lost` from the moment the server said
//       so; alarm() is set and wake_fd() readable from then on.
//   Y3  A server that is away stops nothing: beats are retried.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "queue/base/job.h"
#include "workers/worker/http_client.h"
#include "workers/worker/protocol.h"

namespace machina {

enum class Stop {
  none,
  cancelled,  // end it and say so
  lost,       // the lease is another's: end it and say nothing
  released,   // this worker is leaving: end it and give the lease back
};

class Heartbeat {
 public:
  static constexpr Millis kQuietMs = 100;

  // `on_busy`: once an attempt has outlasted kQuietMs its job's id, and "" at
  // its end. Called on either thread, in order; must not wait.
  Heartbeat(HttpClient::Connect connect,
            std::function<void(const std::string& job_id)> on_busy);
  ~Heartbeat();

  // Replaces what is held.
  void hold(const std::vector<Lease>& leases);
  void drop(const std::string& token);
  void drop_all() { hold({}); }

  void progress(const std::string& token, int percent,
                const std::string& message);
  Stop stop_of(const std::string& token) const;
  // Every held lease is to be given back.
  void release_all();

  const std::atomic<bool>* alarm() const { return &alarm_; }
  int wake_fd() const { return wake_fd_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Held {
    Stop stop = Stop::none;
    HeartbeatItem item;
    bool fresh = false;  // progress that was not sent yet
  };

  void loop();
  void beat(std::unique_lock<std::mutex>& lock);
  void take_answers(const std::string& body);
  void raise_alarm();

  HttpClient client_;
  std::function<void(const std::string&)> on_busy_;
  const int wake_fd_;
  std::atomic<bool> alarm_{false};

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, Held> held_;
  std::string job_id_;  // of the first held
  Millis lease_ms_ = 30'000;
  Clock::time_point due_, progress_sent_;
  bool in_call_ = false, busy_ = false, quit_ = false;
  std::thread thread_;
};

}  // namespace machina
