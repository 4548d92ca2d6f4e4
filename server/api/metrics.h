// server/api/metrics.h
//
// Numbers for /metrics and /stats that the server itself counts. Never by job
// id; label values come from a bounded set (kLabelSetsMax), the rest are
// "other". Nothing here scans a table or a directory.

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/buckets.h"
#include "queue/shard/shard.h"

namespace machina {

constexpr std::size_t kLabelSetsMax = 200;
// What machina_http_rate_limited_total counts.
constexpr const char* kLimitNames[] = {"requests", "enqueue", "run_sync",
                                       "credentials"};

class Histogram {
 public:
  void observe(double seconds);
  // What somebody else observed: `buckets` has kBuckets + 1 counts.
  void add(const std::uint64_t* buckets, double seconds);
  // Lines in the Prometheus text format; `labels` is `kind="x"` or empty.
  void append(std::string* out, std::string_view name,
              std::string_view labels) const;
  std::uint64_t count() const { return count_; }
  double sum() const { return sum_; }

 private:
  std::uint64_t buckets_[kBuckets + 1] = {};
  std::uint64_t count_ = 0;
  double sum_ = 0;
};

struct WorkerNumbers {
  int configured = 0, reported = 0, busy = 0;
  int level = -1;  // the least reported; -1: none reported
};

struct ConnectionNumbers {
  int open = 0;
  std::uint64_t unsent_bytes = 0;  // of their answers
};

// What a pool says of its sandboxes: sums since the pool began
// (workers/worker/sandbox_counts.h).
struct PoolCounts {
  std::uint64_t starts[kBuckets + 1] = {};
  std::uint64_t starts_us = 0;
  std::map<std::string, std::uint64_t> denied;  // at most kDeniedMax
  std::uint64_t log_dropped = 0;
};
constexpr std::size_t kDeniedMax = 16;
constexpr std::size_t kPoolsCountedMax = 256;

class Metrics {
 public:
  void enqueued(const std::string& kind, const std::string& queue);
  void enqueue_took(double seconds) { enqueue_.observe(seconds); }
  // An attempt of a tool.* kind that its worker reported.
  void tool_ended(const std::string& kind, bool ok, Millis ms);
  // Adds what is new since this pool's last report, however often it comes.
  void pool_counts(const std::string& pool, const PoolCounts& counts);
  void request(int status) { ++by_status_[status / 100 % 6]; }
  void unauthorized() { ++unauthorized_; }
  // `limit`: an index of kLimitNames.
  void limited(std::size_t limit) { ++limited_[limit]; }
  void connection_refused() { ++connections_refused_; }
  void cut_off() { ++stalled_cut_; }

  // Takes the samples that a ShardStats carries; each is counted once.
  void absorb(const ShardStats& stats);
  std::string text(const ShardStats& stats, const WorkerNumbers& workers,
                   const ConnectionNumbers& connections, Millis now_ms,
                   Millis uptime_ms, bool ready,
                   const std::string& version) const;

 private:
  std::map<std::pair<std::string, std::string>, std::uint64_t> enqueued_;
  std::uint64_t* last_ = nullptr;  // the counter that was used last
  std::pair<std::string, std::string> last_key_;
  std::uint64_t by_status_[6] = {};
  std::uint64_t unauthorized_ = 0, connections_refused_ = 0, stalled_cut_ = 0;
  std::uint64_t limited_[4] = {};
  Histogram enqueue_, sync_;
  std::map<std::string, Histogram> wait_, run_;
  struct Tool {
    std::uint64_t ok = 0, fail = 0, ms = 0;
  };
  std::map<std::string, Tool> tools_;
  std::map<std::string, PoolCounts> pools_;  // their last reports
  Histogram sandbox_start_;
  std::map<std::string, std::uint64_t> denied_;
  std::uint64_t pools_dropped_ = 0;
};

// A label value, escaped.
std::string label_value(std::string_view value);

}  // namespace machina
