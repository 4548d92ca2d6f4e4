// server/metrics.h
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

#include "queue/shard.h"

namespace machina {

constexpr std::size_t kLabelSetsMax = 200;

class Histogram {
 public:
  void observe(double seconds);
  // Lines in the Prometheus text format; `labels` is `kind="x"` or empty.
  void append(std::string* out, std::string_view name,
              std::string_view labels) const;
  std::uint64_t count() const { return count_; }
  double sum() const { return sum_; }

 private:
  static constexpr double kBounds[] = {
      0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
      0.25,   0.5,     1,      2.5,   5,      10,    30,   60,    300};
  static constexpr std::size_t kBuckets = sizeof kBounds / sizeof *kBounds;
  std::uint64_t buckets_[kBuckets + 1] = {};
  std::uint64_t count_ = 0;
  double sum_ = 0;
};

struct WorkerNumbers {
  int configured = 0, reported = 0, busy = 0;
  int level = -1;  // the least reported; -1: none reported
};

class Metrics {
 public:
  void enqueued(const std::string& kind, const std::string& queue);
  void enqueue_took(double seconds) { enqueue_.observe(seconds); }
  // An attempt of a tool.* kind that its worker reported.
  void tool_ended(const std::string& kind, bool ok, Millis ms);
  void request(int status) { ++by_status_[status / 100 % 6]; }

  // Takes the samples that a ShardStats carries; each is counted once.
  void absorb(const ShardStats& stats);
  std::string text(const ShardStats& stats, const WorkerNumbers& workers,
                   int connections, Millis now_ms,
                   const std::string& version) const;

 private:
  std::map<std::pair<std::string, std::string>, std::uint64_t> enqueued_;
  std::uint64_t* last_ = nullptr;  // the counter that was used last
  std::pair<std::string, std::string> last_key_;
  std::uint64_t by_status_[6] = {};
  Histogram enqueue_, sync_;
  std::map<std::string, Histogram> wait_, run_;
  struct Tool {
    std::uint64_t ok = 0, fail = 0, ms = 0;
  };
  std::map<std::string, Tool> tools_;
};

// A label value, escaped.
std::string label_value(std::string_view value);

}  // namespace machina
