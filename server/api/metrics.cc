#include "server/api/metrics.h"

#include <algorithm>
#include <cstdio>

#include "queue/base/logger.h"

namespace machina {
namespace {

std::string real(double v) {
  char text[40];
  std::snprintf(text, sizeof text, "%.9g", v);
  return text;
}

class Lines {
 public:
  explicit Lines(std::string* out) : out_(*out) {}
  void head(std::string_view name, std::string_view type,
            std::string_view help) {
    out_.append("# HELP ").append(name).append(" ").append(help).append("\n");
    out_.append("# TYPE ").append(name).append(" ").append(type).append("\n");
  }
  void value(std::string_view name, std::string_view labels,
             std::uint64_t value) {
    line(name, labels, std::to_string(value));
  }
  void value(std::string_view name, std::string_view labels, double value) {
    line(name, labels, real(value));
  }
  void counter(std::string_view name, std::string_view help, std::uint64_t v) {
    head(name, "counter", help);
    value(name, "", v);
  }
  void gauge(std::string_view name, std::string_view help, std::uint64_t v) {
    head(name, "gauge", help);
    value(name, "", v);
  }

 private:
  void line(std::string_view name, std::string_view labels,
            const std::string& value) {
    out_ += name;
    if (!labels.empty()) out_.append("{").append(labels).append("}");
    out_.append(" ").append(value).append("\n");
  }
  std::string& out_;
};

template <class T>
T& bounded(std::map<std::string, T>* map, const std::string& kind) {
  auto found = map->find(kind);
  if (found != map->end()) return found->second;
  return (*map)[map->size() < kLabelSetsMax ? kind : "other"];
}

}  // namespace

std::string label_value(std::string_view value) {
  std::string out = "\"";
  for (char c : value) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
  return out + "\"";
}

void Histogram::observe(double seconds) {
  ++buckets_[bucket_of(seconds)];
  ++count_;
  sum_ += seconds;
}

void Histogram::add(const std::uint64_t* buckets, double seconds) {
  for (std::size_t i = 0; i <= kBuckets; ++i) {
    buckets_[i] += buckets[i];
    count_ += buckets[i];
  }
  sum_ += seconds;
}

void Histogram::append(std::string* out, std::string_view name,
                       std::string_view labels) const {
  Lines lines(out);
  std::string prefix(labels);
  if (!prefix.empty()) prefix += ",";
  std::string bucket = std::string(name) + "_bucket";
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < kBuckets; ++i) {
    total += buckets_[i];
    lines.value(bucket, prefix + "le=\"" + real(kSecondsBuckets[i]) + "\"",
                total);
  }
  lines.value(bucket, prefix + "le=\"+Inf\"", count_);
  lines.value(std::string(name) + "_sum", labels, sum_);
  lines.value(std::string(name) + "_count", labels, count_);
}

void Metrics::enqueued(const std::string& kind, const std::string& queue) {
  // Mostly the same kind and queue as before.
  if (last_ == nullptr || last_key_.first != kind ||
      last_key_.second != queue) {
    last_key_ = {kind, queue};
    auto found = enqueued_.find(last_key_);
    if (found == enqueued_.end()) {
      bool room = enqueued_.size() < kLabelSetsMax;
      last_ = &enqueued_[room ? last_key_
                              : std::pair<std::string, std::string>("other",
                                                                    "other")];
    } else {
      last_ = &found->second;
    }
  }
  ++*last_;
}

void Metrics::tool_ended(const std::string& kind, bool ok, Millis ms) {
  if (!kind.starts_with("tool.")) return;
  Tool& tool = bounded(&tools_, kind);
  ++(ok ? tool.ok : tool.fail);
  tool.ms += static_cast<std::uint64_t>(std::max<Millis>(ms, 0));
}

void Metrics::pool_counts(const std::string& pool, const PoolCounts& now) {
  if (pools_.size() >= kPoolsCountedMax && pools_.count(pool) == 0) {
    // Pools come and go; one that reports again after this is counted twice.
    pools_.clear();
  }
  PoolCounts& last = pools_[pool];
  // A sum that fell is no sum of this pool's.
  auto news = [](std::uint64_t& before, std::uint64_t after) {
    std::uint64_t n = after > before ? after - before : 0;
    before = std::max(before, after);
    return n;
  };
  std::uint64_t starts[kBuckets + 1];
  for (std::size_t i = 0; i <= kBuckets; ++i) {
    starts[i] = news(last.starts[i], now.starts[i]);
  }
  sandbox_start_.add(
      starts, static_cast<double>(news(last.starts_us, now.starts_us)) / 1e6);
  for (const auto& [what, count] : now.denied) {
    if (denied_.size() >= kDeniedMax && denied_.count(what) == 0) continue;
    denied_[what] += news(last.denied[what], count);
  }
  pools_dropped_ += news(last.log_dropped, now.log_dropped);
}

void Metrics::absorb(const ShardStats& stats) {
  for (std::uint64_t us : stats.log.sync_us) {
    sync_.observe(static_cast<double>(us) / 1e6);
  }
  for (const auto& [kind, seconds] : stats.wait_seconds) {
    bounded(&wait_, kind).observe(seconds);
  }
  for (const auto& [kind, seconds] : stats.run_seconds) {
    bounded(&run_, kind).observe(seconds);
  }
}

std::string Metrics::text(const ShardStats& stats, const WorkerNumbers& workers,
                          const ConnectionNumbers& connections, Millis now_ms,
                          Millis uptime_ms, bool ready,
                          const std::string& version) const {
  std::string out;
  Lines lines(&out);

  lines.head("machina_jobs_enqueued_total", "counter", "Jobs accepted.");
  for (const auto& [key, count] : enqueued_) {
    lines.value(
        "machina_jobs_enqueued_total",
        "kind=" + label_value(key.first) + ",queue=" + label_value(key.second),
        count);
  }
  const CoreTotals& totals = stats.totals;
  lines.counter("machina_jobs_duplicate_total",
                "Submissions that met a live dedup key.", totals.duplicates);
  std::uint64_t processed = 0;
  for (std::uint64_t n : totals.ended_by_code) processed += n;
  lines.counter("machina_jobs_processed_total", "Jobs that ended.", processed);
  lines.counter("machina_jobs_ok_total", "Jobs that succeeded.",
                totals.ended_by_code[0]);
  lines.head("machina_jobs_fail_total", "counter",
             "Failures by code: jobs that ended so, attempts retried.");
  for (int i = 1; i < kEndCodes; ++i) {
    lines.value("machina_jobs_fail_total",
                "code=" + label_value(name(static_cast<EndCode>(i))),
                totals.attempts_failed_by_code[i]);
  }
  lines.counter("machina_jobs_retried_total",
                "Attempts that failed and were put back.", totals.retried);
  lines.counter("machina_jobs_dead_total", "Jobs out of attempts.",
                totals.dead);

  const struct {
    const char* name;
    State state;
  } sizes[] = {{"inbox", State::ready},     {"processing", State::running},
               {"retry", State::scheduled}, {"failed", State::failed},
               {"dlq", State::dead},        {"blocked", State::blocked},
               {"waiting", State::waiting}};
  for (const auto& size : sizes) {
    std::string metric = std::string("machina_queue_") + size.name + "_size";
    lines.head(metric, "gauge", "Jobs in this state.");
    // Zeroes are shown, also before the first job.
    if (stats.queues.empty())
      lines.value(metric, "queue=\"default\"", std::uint64_t{0});
    for (const QueueCounts& queue : stats.queues) {
      lines.value(metric, "queue=" + label_value(queue.queue),
                  queue.by_state[static_cast<int>(size.state)]);
    }
  }
  lines.head("machina_queue_oldest_ready_seconds", "gauge",
             "Age of the job that is ready longest.");
  for (const QueueCounts& queue : stats.queues) {
    double age =
        queue.oldest_ready_ms == 0
            ? 0
            : static_cast<double>(now_ms - queue.oldest_ready_ms) / 1000;
    lines.value("machina_queue_oldest_ready_seconds",
                "queue=" + label_value(queue.queue), age < 0 ? 0 : age);
  }

  lines.gauge("machina_workers_configured", "Workers asked for.",
              static_cast<std::uint64_t>(workers.configured));
  lines.gauge("machina_workers_busy", "Workers that run a job.",
              static_cast<std::uint64_t>(workers.busy));
  if (workers.level >= 0) {
    lines.gauge("machina_isolation_level",
                "The least level that a worker reported.",
                static_cast<std::uint64_t>(workers.level));
  }

  const struct {
    const char* name;
    const char* help;
    const Histogram& histogram;
  } plain[] = {
      {"machina_enqueue_seconds", "From a request's last byte to its reply.",
       enqueue_},
      {"machina_wal_sync_seconds", "One write and sync of a batch.", sync_},
      {"machina_sandbox_start_seconds",
       "From asking for a sandbox to having it.", sandbox_start_}};
  for (const auto& h : plain) {
    lines.head(h.name, "histogram", h.help);
    h.histogram.append(&out, h.name, "");
  }
  const struct {
    const char* name;
    const char* help;
    const std::map<std::string, Histogram>& by_kind;
  } kinds[] = {{"machina_job_wait_seconds", "From ready to leased.", wait_},
               {"machina_job_run_seconds", "From leased to ended.", run_}};
  for (const auto& k : kinds) {
    lines.head(k.name, "histogram", k.help);
    for (const auto& [kind, histogram] : k.by_kind) {
      histogram.append(&out, k.name, "kind=" + label_value(kind));
    }
  }

  const struct {
    const char* name;
    const char* help;
    std::uint64_t Tool::*value;
  } tools[] = {
      {"machina_tool_ok_total", "Attempts of a tool that passed.", &Tool::ok},
      {"machina_tool_fail_total", "Attempts of a tool that did not.",
       &Tool::fail},
      {"machina_tool_duration_ms_total", "Time that a tool's attempts took.",
       &Tool::ms}};
  for (const auto& t : tools) {
    lines.head(t.name, "counter", t.help);
    for (const auto& [kind, tool] : tools_) {
      lines.value(t.name, "aid=" + label_value(kind), tool.*t.value);
    }
  }

  lines.head("machina_sandbox_denied_total", "counter",
             "Steps that a sandbox stopped, by what they ran into; system "
             "calls refused with an error are not counted.");
  for (const auto& [what, count] : denied_) {
    lines.value("machina_sandbox_denied_total", "what=" + label_value(what),
                count);
  }

  lines.gauge("machina_wal_durable_lsn", "The last record known synced.",
              stats.durable);
  lines.gauge("machina_wal_batch_records", "Records in the last batch.",
              stats.log.last_batch_records);
  lines.gauge("machina_wal_segments", "Segments kept.", stats.log.segments);
  lines.counter("machina_wal_batches_total", "Batches written.",
                stats.log.batches);
  lines.counter("machina_wal_records_total", "Records written.",
                stats.log.records);
  lines.counter("machina_wal_bytes_total", "Bytes written.", stats.log.bytes);
  lines.gauge("machina_history_lag_bytes", "Log bytes not yet in history.",
              stats.history_lag_bytes);
  lines.gauge("machina_disk_free_bytes", "Room on the root's file system.",
              stats.disk_free_bytes);
  lines.gauge("machina_disk_held_bytes",
              "Log room that is allocated already, for what was accepted.",
              stats.disk.held_bytes);
  lines.gauge("machina_disk_level",
              "0 all is taken, 1 no new jobs and uploads, 2 only ends, 3 "
              "nothing.",
              static_cast<std::uint64_t>(stats.disk.level));
  lines.gauge("machina_live_jobs", "Jobs that have not ended.",
              stats.live_jobs);
  lines.gauge("machina_connections", "Open connections.",
              static_cast<std::uint64_t>(connections.open));
  lines.gauge("machina_http_unsent_bytes",
              "Of answers, not yet taken by their clients.",
              connections.unsent_bytes);
  lines.counter("machina_http_stalled_cut_total",
                "Connections cut off that took nothing while room was short.",
                stalled_cut_);
  lines.head("machina_http_replies_total", "counter", "Replies by class.");
  for (int i = 1; i < 6; ++i) {
    lines.value("machina_http_replies_total",
                "class=\"" + std::to_string(i) + "xx\"", by_status_[i]);
  }
  lines.counter("machina_http_unauthorized_total",
                "Requests without a right credential.", unauthorized_);
  lines.head("machina_http_rate_limited_total", "counter",
             "Requests answered 429 by a rate limit.");
  for (std::size_t i = 0; i < std::size(kLimitNames); ++i) {
    lines.value("machina_http_rate_limited_total",
                "limit=" + label_value(kLimitNames[i]), limited_[i]);
  }
  lines.counter("machina_http_connections_refused_total",
                "Connections over a cap.", connections_refused_);
  lines.head("machina_log_dropped_total", "counter",
             "Lines that could not be written to the log.");
  lines.value("machina_log_dropped_total", "component=\"server\"",
              log_lines_dropped());
  lines.value("machina_log_dropped_total", "component=\"pool\"",
              pools_dropped_);
  lines.gauge("machina_ready", "1 while /ready answers 200.",
              std::uint64_t{ready ? 1u : 0u});
  lines.gauge("machina_log_poisoned", "1 after a write of the log failed.",
              std::uint64_t{stats.poisoned ? 1u : 0u});
  lines.counter("machina_clock_steps_total",
                "How often the wall clock was set, by half a second or more.",
                stats.clock_steps);
  lines.gauge("machina_uptime_seconds", "Since this server started.",
              static_cast<std::uint64_t>(uptime_ms / 1000));
  lines.head("machina_build_info", "gauge", "This program.");
  lines.value("machina_build_info", "version=" + label_value(version),
              std::uint64_t{1});
  return out;
}

}  // namespace machina
