// Health, readiness, numbers and the end.

#include "server/api/service.h"

namespace machina {

static void get_health(Service& s, const Exchange& call) {
  s.reply(call.peer, call.sequence, 200, R"({"status":"ok","ok":true})");
}

std::string Service::unready() const {
  if (poisoned_) return "poisoned";
  if (draining_) return "draining";
  if (DiskState disk = shard_->disk(); disk.level == DiskLevel::full)
    return disk.says;
  if (const PoolTrouble* why =
          pools_.target() > 0 ? pools_.trouble() : nullptr) {
    return "no job can run here: " + why->reason +
           "; to mend it: " + why->remedy;
  }
  if (options_.prod && pools_.target() > 0 && options_.min_level > 0 &&
      !pools_.level_passed()) {
    return "no worker has proven isolation level " +
           level_name(options_.min_level) + " yet";
  }
  return "";
}

// A low disk is no reason to send nobody here: ends are still taken.
void Service::add_disk(const DiskState& disk, JsonWriter* json) {
  json->begin_object();
  json->key("level").string(name(disk.level));
  json->key("free_bytes").number(disk.free_bytes);
  json->key("soft_bytes").number(disk.soft_bytes);
  json->key("hard_bytes").number(disk.hard_bytes);
  json->key("held_bytes").number(disk.held_bytes);
  json->key("promised_bytes").number(disk.promised_bytes);
  if (!disk.says.empty()) json->key("says").string(disk.says);
  json->end_object();
}

static void get_ready(Service& s, const Exchange& call) {
  std::string why = s.unready();
  if (why.empty()) {
    std::string body;
    JsonWriter json(body);
    json.begin_object();
    json.key("ready").boolean(true);
    json.key("disk");
    s.add_disk(s.shard_->disk(), &json);
    json.end_object();
    s.reply(call.peer, call.sequence, 200, body);
    return;
  }
  Problem p;
  p.status = 503;
  p.code = "not-ready";
  p.detail = why;
  p.retry_after = 1;
  s.refuse(call.peer, call.sequence, p);
}

static void get_root(Service& s, const Exchange& call) {
  std::string body;
  JsonWriter json(body);
  json.begin_object();
  json.key("name").string("machina");
  json.key("version").string(s.options_.version);
  json.end_object();
  s.reply(call.peer, call.sequence, 200, body);
}

static void get_stats(Service& s, const Exchange& call) {
  ShardStats stats = s.shard_->stats();
  s.metrics_.absorb(stats);
  WorkerNumbers workers = s.pools_.numbers();
  std::string body;
  JsonWriter json(body);
  json.begin_object();
  json.key("version").string(s.options_.version);
  json.key("profile").string(s.options_.prod ? "prod" : "dev");
  json.key("durability").string(s.options_.shard.log.fsync ? "fsync" : "os");
  json.key("uptime_ms").number(s.clock_.mono_ms() - s.started_mono_);
  json.key("time").time(s.clock_.wall_ms());
  std::string why = s.unready();
  json.key("ready").boolean(why.empty());
  json.key("recovery")
      .string(stats.recovery.empty() ? s.recovery_ : stats.recovery);
  json.key("live_jobs").number(stats.live_jobs);
  json.key("queues").begin_object();
  for (const QueueCounts& queue : stats.queues) {
    json.key_escaped(queue.queue).begin_object();
    for (int i = 0; i < kStates; ++i) {
      json.key(name(static_cast<State>(i))).number(queue.by_state[i]);
    }
    json.key("oldest_ready_at").time(queue.oldest_ready_ms);
    json.end_object();
  }
  json.end_object();
  // What is ready and waits for a worker that nobody is.
  json.key("unserved").begin_array();
  std::size_t unserved = 0;
  for (const auto& [kind, ready] : s.shard_->ready_kinds()) {
    if (s.served(kind) || ++unserved > kUnservedMax) continue;
    json.begin_object();
    json.key("kind").string(kind);
    json.key("ready").number(ready);
    json.end_object();
  }
  json.end_array();
  json.key("totals").begin_object();
  json.key("enqueued").number(stats.totals.enqueued);
  json.key("duplicates").number(stats.totals.duplicates);
  json.key("leases").number(stats.totals.grants);
  json.key("retried").number(stats.totals.retried);
  json.key("dead").number(stats.totals.dead);
  json.key("succeeded").number(stats.totals.ended_by_code[0]);
  json.key("ended_by_code").begin_object();
  for (int i = 1; i < kEndCodes; ++i) {
    json.key(name(static_cast<EndCode>(i)))
        .number(stats.totals.ended_by_code[i]);
  }
  json.end_object();
  json.key("attempts_failed_by_code").begin_object();
  for (int i = 1; i < kEndCodes; ++i) {
    json.key(name(static_cast<EndCode>(i)))
        .number(stats.totals.attempts_failed_by_code[i]);
  }
  json.end_object().end_object();
  json.key("workers").begin_object();
  json.key("configured").number(workers.configured);
  json.key("reported").number(workers.reported);
  json.key("busy").number(workers.busy);
  json.key("isolation_level");
  if (workers.level < 0) {
    json.null();
  } else {
    json.string(level_name(static_cast<Level>(workers.level)));
  }
  json.end_object();
  json.key("clock").begin_object();
  json.key("steps").number(stats.clock_steps);
  json.key("last_step_ms")
      .number(static_cast<std::int64_t>(stats.last_clock_step_ms));
  json.end_object();
  json.key("log").begin_object();
  json.key("applied_lsn").number(stats.applied);
  json.key("durable_lsn").number(stats.durable);
  json.key("segments").number(stats.log.segments);
  json.key("batches").number(stats.log.batches);
  json.key("records").number(stats.log.records);
  json.key("bytes").number(stats.log.bytes);
  json.end_object();
  json.key("history").begin_object();
  json.key("applied_lsn").number(stats.history_applied);
  json.key("lag_bytes").number(stats.history_lag_bytes);
  json.end_object();
  json.key("scraped_at");
  if (s.scraped_wall_ == 0) {
    json.null();
  } else {
    json.time(s.scraped_wall_);
  }
  json.key("disk_free_bytes").number(stats.disk_free_bytes);
  json.key("reserved_bytes").number(stats.reserved_bytes);
  json.key("disk");
  s.add_disk(stats.disk, &json);
  json.key("connections").number(s.connections_);
  json.key("descriptors").begin_object();
  json.key("limit").number(s.descriptors_.limit);
  json.key("connections").number(s.descriptors_.connections);
  json.key("local").number(s.descriptors_.local);
  json.key("files").number(s.descriptors_.files);
  json.key("own").number(kOwnDescriptors);
  json.end_object();
  json.end_object();
  s.reply(call.peer, call.sequence, 200, body);
}

static void get_metrics(Service& s, const Exchange& call) {
  if (!call.peer.local) s.scraped_wall_ = s.clock_.wall_ms();
  // Made once a turn, however many ask.
  if (s.metrics_text_.empty()) {
    ShardStats stats = s.shard_->stats();
    s.metrics_.absorb(stats);
    s.metrics_text_ = s.metrics_.text(
        stats, s.pools_.numbers(), {s.connections_, s.loop_->unsent_bytes()},
        s.clock_.wall_ms(), s.clock_.mono_ms() - s.started_mono_,
        s.unready().empty(), s.options_.version);
  }
  Extras extras;
  extras.content_type = "text/plain; version=0.0.4; charset=utf-8";
  s.reply(call.peer, call.sequence, 200, s.metrics_text_, extras);
}

static void post_shutdown(Service& s, const Exchange& call) {
  JsonValue json;
  if (!s.parse_body(call, true, &json)) return;
  std::string mode = "drain";
  for (JsonValue m = json.first(); m; m = m.next()) {
    MaybeProblem p = m.key() == "mode" ? read_string(m, "mode", 16, &mode)
                                       : unknown_field(m.key());
    if (!p && mode != "drain" && mode != "handover") {
      p = bad_field("mode",
                    shown(mode) + " is neither \"drain\" nor \"handover\"");
    }
    if (p) return s.refuse(call.peer, call.sequence, *p);
  }
  s.reply(call.peer, call.sequence, 200,
          "{\"ok\":true,\"mode\":\"" + mode + "\"}");
  s.begin_drain(mode == "handover");
}

void not_built(Service& s, const Exchange& call) {
  s.refuse(call.peer, call.sequence,
           not_implemented("", std::string(name(call.head.method)) + " " +
                                   std::string(call.peer.route->pattern) +
                                   ": this version does not have it"));
}

std::span<const Route> ops_routes() {
  static constexpr Route kRows[] = {
      {Method::get, "/health", get_health, Route::open},
      {Method::get, "/ready", get_ready, Route::open},
      {Method::get, "/stats", get_stats, Route::operate, 0, kJobWeight},
      {Method::get, "/metrics", get_metrics, Route::open, 0, kJobWeight},
      {Method::post, "/shutdown", post_shutdown, Route::operate},
      {Method::get, "/", get_root, Route::open},
      {Method::get, "/openapi.json", not_built, Route::open},
      {Method::get, "/v1/queues", not_built},
      {Method::put, "/v1/queues/{}", not_built},
      {Method::post, "/v1/queues/{}/pause", not_built},
      {Method::post, "/v1/queues/{}/resume", not_built},
      {Method::get, "/v1/schedules/{}", not_built},
      {Method::put, "/v1/schedules/{}", not_built},
      {Method::del, "/v1/schedules/{}", not_built},
      {Method::get, "/v1/events", not_built},
  };
  return kRows;
}

}  // namespace machina
