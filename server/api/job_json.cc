#include "server/api/job_json.h"

#include <algorithm>

namespace machina {
namespace {

std::string joined(std::string_view prefix, std::string_view name) {
  if (prefix.empty()) return std::string(name);
  return std::string(prefix) + "." + std::string(name);
}

std::string_view type_name(const JsonValue& v) {
  switch (v.type()) {
    case JsonValue::Type::null:
      return "null";
    case JsonValue::Type::boolean:
      return "a boolean";
    case JsonValue::Type::number:
      return "a number";
    case JsonValue::Type::string:
      return "a string";
    case JsonValue::Type::array:
      return "an array";
    case JsonValue::Type::object:
      return "an object";
  }
  return "?";
}

Problem wrong_type(std::string_view field, const JsonValue& v,
                   std::string_view wanted) {
  return bad_field(field, std::string(type_name(v)) + ", but it takes " +
                              std::string(wanted));
}

Problem too_long(std::string_view field, std::size_t bytes, std::size_t max) {
  Problem p = bad_field(
      field, std::to_string(bytes) + " bytes; at most " + std::to_string(max));
  return p;
}

// The body of a worker may nest deeper than a request, because it wraps values
// that are kept. The values themselves may not: whoever reads one of them alone
// takes kJsonDepthMax.
MaybeProblem too_deep(const JsonValue& v, std::string_view field) {
  if (!v.nests_deeper_than(kJsonDepthMax)) return std::nullopt;
  return bad_field(
      field, "nested more than " + std::to_string(kJsonDepthMax) + " deep");
}

MaybeProblem read_name(const JsonValue& v, std::string_view field,
                       std::size_t max, std::string* out) {
  if (auto p = read_string(v, field, max, out)) return p;
  if (!valid_name(*out)) {
    return bad_field(field, shown(*out) +
                                " is not of the form "
                                "[A-Za-z0-9_][A-Za-z0-9_.:-]*");
  }
  return std::nullopt;
}

// Raw JSON of an object, kept as it was sent.
MaybeProblem read_object(const JsonValue& v, std::string_view field,
                         std::size_t max, std::string* out) {
  if (v.is_null()) {
    out->clear();
    return std::nullopt;
  }
  if (!v.is_object()) return wrong_type(field, v, "an object");
  if (v.raw().size() > max) return too_long(field, v.raw().size(), max);
  if (auto p = too_deep(v, field)) return p;
  out->assign(v.raw());
  return std::nullopt;
}

MaybeProblem read_any(const JsonValue& v, std::string_view field,
                      std::size_t max, std::string* out) {
  if (v.is_null()) {
    out->clear();
    return std::nullopt;
  }
  if (v.raw().size() > max) return too_long(field, v.raw().size(), max);
  if (auto p = too_deep(v, field)) return p;
  out->assign(v.raw());
  return std::nullopt;
}

MaybeProblem read_labels(const JsonValue& v, NewJob* job) {
  if (!v.is_object()) return wrong_type("labels", v, "an object of strings");
  if (v.size() > kLabelsMax) {
    return bad_field("labels", std::to_string(v.size()) + " labels; at most " +
                                   std::to_string(kLabelsMax));
  }
  for (JsonValue label = v.first(); label; label = label.next()) {
    std::string field = joined("labels", label.key());
    if (label.key().size() > kLabelKeyBytesMax || !valid_name(label.key())) {
      return bad_field("labels", "the key " + shown(label.key()) +
                                     " is not of the form "
                                     "[A-Za-z0-9_][A-Za-z0-9_.:-]* with at "
                                     "most " +
                                     std::to_string(kLabelKeyBytesMax) +
                                     " bytes");
    }
    std::string value;
    if (auto p = read_string(label, field, kLabelValueBytesMax, &value)) {
      return p;
    }
    job->labels.emplace_back(std::string(label.key()), std::move(value));
  }
  return std::nullopt;
}

MaybeProblem read_depends_on(const JsonValue& v, NewJob* job) {
  if (!v.is_array()) return wrong_type("depends_on", v, "an array of job ids");
  std::size_t count = v.size();
  if (count > kDependsOnMax) {
    return bad_field("depends_on", std::to_string(count) + " ids; at most " +
                                       std::to_string(kDependsOnMax));
  }
  for (JsonValue item = v.first(); item; item = item.next()) {
    if (!item.is_string()) return wrong_type("depends_on", item, "job ids");
    auto id = parse_job_id(item.plain_string());
    if (!id) {
      return bad_field("depends_on",
                       shown(item.plain_string()) + " is not a job id");
    }
    for (const JobId& other : job->depends_on) {
      if (other == *id) {
        return bad_field("depends_on",
                         shown(item.plain_string()) + " is there twice");
      }
    }
    job->depends_on.push_back(*id);
  }
  return std::nullopt;
}

struct Ceiling {
  std::string_view name;
  std::uint64_t max;  // 0: none
};

MaybeProblem read_sandbox(const JsonValue& v, const ServerOptions& options,
                          NewJob* job, bool* level_set) {
  if (!v.is_object()) return wrong_type("sandbox", v, "an object");
  if (v.raw().size() > kSandboxBytesMax) {
    return too_long("sandbox", v.raw().size(), kSandboxBytesMax);
  }
  const Ceiling ceilings[] = {{"memory_mb", options.max_memory_mb},
                              {"cpu_ms", options.max_cpu_ms},
                              {"pids", options.max_pids},
                              {"disk_mb", options.max_disk_mb},
                              {"output_bytes", options.max_output_bytes}};
  for (JsonValue m = v.first(); m; m = m.next()) {
    std::string field = joined("sandbox", m.key());
    if (m.key() == "profile") {
      std::string profile;
      if (auto p = read_string(m, field, 16, &profile)) return p;
      if (profile == "net") {
        return not_implemented(field,
                               "sandbox.profile: \"net\" needs the egress "
                               "proxy, which this version does not have; "
                               "jobs run without a network");
      }
      if (profile != "strict") {
        return bad_field(field,
                         shown(profile) + " is neither \"strict\" nor \"net\"");
      }
      continue;
    }
    if (m.key() == "min_level") {
      if (auto p = read_level(m, field, &job->min_level)) return p;
      *level_set = true;
      continue;
    }
    if (m.key() == "allow_hosts") {
      if (!m.is_array()) return wrong_type(field, m, "an array of strings");
      if (m.first()) {
        return not_implemented(field,
                               "sandbox.allow_hosts: there is no network in "
                               "this version; only [] is taken");
      }
      continue;
    }
    bool known = false;
    for (const Ceiling& ceiling : ceilings) {
      if (m.key() != ceiling.name) continue;
      known = true;
      constexpr std::int64_t kMost = 1ll << 50;
      std::int64_t value;
      std::int64_t max =
          ceiling.max != 0 ? static_cast<std::int64_t>(ceiling.max) : kMost;
      if (auto p = read_integer(m, field, 1, max, &value)) return p;
    }
    if (!known) return unknown_field(field);
  }
  job->sandbox.assign(v.raw());
  return std::nullopt;
}

MaybeProblem read_kind(const JsonValue& v, const ServerOptions& options,
                       std::string* kind) {
  if (auto p = read_string(v, "kind", kKindBytesMax, kind)) return p;
  if (!valid_kind(*kind)) {
    return bad_field("kind", shown(*kind) +
                                 " is not of the form "
                                 "[a-z][a-z0-9_]*(.[a-z0-9_]+)*");
  }
  if (options.kinds_allowed.empty()) return std::nullopt;
  for (const std::string& pattern : options.kinds_allowed) {
    if (kind_matches(pattern, *kind)) return std::nullopt;
  }
  std::string allowed;
  for (const std::string& pattern : options.kinds_allowed) {
    allowed += (allowed.empty() ? "" : ",") + pattern;
  }
  Problem p = bad_field("kind", shown(*kind) +
                                    " is not allowed here "
                                    "(MACHINA_KINDS_ALLOWED=" +
                                    allowed + ")");
  p.code = "kind-not-allowed";
  return p;
}

constexpr std::size_t kFieldBytesMax = 64;  // of a problem's `field`

Problem invalid_payload(const BadField& bad) {
  // A name that came from the client (a file's, say) may be any text; then the
  // detail alone has it.
  const bool plain = !bad.field.empty() && bad.field.size() <= kFieldBytesMax &&
                     bad.field.find(' ') == std::string::npos;
  Problem p;
  p.code = "invalid-payload";
  p.field = plain ? joined("payload", bad.field) : "payload";
  p.detail = "payload." + bad.text();
  return p;
}

// A kind that must not run twice on one thing says so by itself.
MaybeProblem set_kind_key(const KindFacts& facts, std::string key,
                          NewJob* job) {
  if (key.empty()) return std::nullopt;
  if (!job->concurrency_key.empty()) {
    return bad_field("concurrency_key",
                     "jobs of kind " + job->kind +
                         " have one of their own, and a job has one: leave "
                         "it out");
  }
  if (key.size() > kKindKeyBytesMax) {
    return too_long("payload", key.size(), kKindKeyBytesMax);
  }
  job->concurrency_key = std::move(key);
  job->concurrency_limit = static_cast<std::uint16_t>(
      std::clamp(facts.concurrency_limit, 1, kConcurrencyLimitMax));
  job->kind_key = true;
  return std::nullopt;
}

}  // namespace

// --- Single members --------------------------------------------------------

std::string range_text(std::string_view field, std::int64_t min,
                       std::int64_t max) {
  const char* unit = field.ends_with("_ms")      ? " ms"
                     : field.ends_with("_bytes") ? " bytes"
                     : field.ends_with("_mb")    ? " MB"
                                                 : "";
  return std::to_string(min) + ".." + std::to_string(max) + unit;
}

MaybeProblem read_integer(const JsonValue& v, std::string_view field,
                          std::int64_t min, std::int64_t max,
                          std::int64_t* out) {
  if (!v.is_number()) return wrong_type(field, v, "an integer");
  auto value = v.as_integer();
  if (!value || *value < min || *value > max) {
    return bad_field(field, std::string(v.raw().substr(0, 40)) +
                                " is not an integer in " +
                                range_text(field, min, max));
  }
  *out = *value;
  return std::nullopt;
}

MaybeProblem read_string(const JsonValue& v, std::string_view field,
                         std::size_t max_bytes, std::string* out) {
  if (!v.is_string()) return wrong_type(field, v, "a string");
  if (v.has_escapes()) {
    *out = v.as_string();
  } else {
    out->assign(v.plain_string());
  }
  if (out->size() > max_bytes) return too_long(field, out->size(), max_bytes);
  return std::nullopt;
}

MaybeProblem read_bool(const JsonValue& v, std::string_view field, bool* out) {
  if (!v.is_bool()) return wrong_type(field, v, "true or false");
  *out = v.as_bool();
  return std::nullopt;
}

std::string level_name(Level level) { return "L" + std::to_string(level); }

std::optional<Level> parse_level(std::string_view text) {
  if (text.size() != 2 || text[0] != 'L' || text[1] < '0' ||
      text[1] > '0' + kLevelMax) {
    return std::nullopt;
  }
  return static_cast<Level>(text[1] - '0');
}

MaybeProblem read_level(const JsonValue& v, std::string_view field,
                        Level* out) {
  std::string text;
  if (auto p = read_string(v, field, 16, &text)) return p;
  auto level = parse_level(text);
  if (!level) return bad_field(field, shown(text) + " is not one of L0 to L4");
  *out = *level;
  return std::nullopt;
}

Problem unknown_field(std::string_view field) {
  Problem p;
  p.code = "unknown-field";
  p.field = field;
  p.detail = std::string(field) + ": there is no such member";
  return p;
}

bool valid_artifact_name(std::string_view name) {
  if (name.empty() || name.size() > kArtifactNameBytesMax) return false;
  for (std::size_t i = 0; i < name.size(); ++i) {
    char c = name[i];
    bool word = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                (c >= '0' && c <= '9') || c == '_';
    if (!word && (i == 0 || (c != '.' && c != '-'))) return false;
  }
  return true;
}

// --- Jobs ------------------------------------------------------------------

MaybeProblem read_new_job(const JsonValue& json, const JobContext& context,
                          NewJob* job) {
  const ServerOptions& options = context.options;
  if (!json.is_object()) {
    Problem p;
    p.detail = "a job is an object, not " + std::string(type_name(json));
    return p;
  }
  job->max_attempts = options.max_attempts;
  job->retry_min_ms = options.retry_min_ms;
  job->retry_max_ms = options.retry_max_ms;
  job->dedup_ttl_ms = options.dedup_ttl_ms;
  JsonValue payload, run_at, delay, key, alias;
  bool retry_min_set = false, retry_max_set = false, level_set = false;
  for (JsonValue m = json.first(); m; m = m.next()) {
    std::string_view name = m.key();
    MaybeProblem problem;
    std::int64_t n = 0;
    if (name == "kind") {
      problem = read_kind(m, options, &job->kind);
    } else if (name == "payload") {
      payload = m;
      if (!m.is_object()) {
        problem = wrong_type(name, m, "an object");
      } else if (m.raw().size() > kPayloadBytesMax) {
        problem = too_long(name, m.raw().size(), kPayloadBytesMax);
        problem->status = 413;
        problem->code = "too-large";
        problem->detail += kLargeDiff;
      } else if (!(problem = too_deep(m, name))) {
        job->payload.assign(m.raw());
      }
    } else if (name == "queue") {
      problem = read_name(m, name, kQueueBytesMax, &job->queue);
    } else if (name == "priority") {
      problem = read_integer(m, name, 0, kPriorityMax, &n);
      job->priority = static_cast<int>(n);
    } else if (name == "run_at") {
      run_at = m;
      std::string text;
      problem = read_string(m, name, 64, &text);
      if (!problem) {
        auto at = parse_rfc3339(text);
        if (!at || *at < 0) {
          problem = bad_field(name, shown(text) +
                                        " is not a time of the form "
                                        "2026-01-31T12:00:00.000Z");
        } else if (*at > context.clock.wall_ms() + kDelayMsMax) {
          problem =
              bad_field(name, shown(text) + " is more than " +
                                  std::to_string(kDelayMsMax) + " ms ahead");
        } else {
          job->run_at_ms = *at;
        }
      }
    } else if (name == "delay_ms") {
      delay = m;
      problem = read_integer(m, name, 0, kDelayMsMax, &n);
      job->delay_ms = n;
    } else if (name == "max_attempts") {
      problem = read_integer(m, name, 1, kMaxAttemptsMax, &n);
      job->max_attempts = static_cast<int>(n);
    } else if (name == "retry_min_ms") {
      problem = read_integer(m, name, 0, kRetryMsMax, &job->retry_min_ms);
      retry_min_set = true;
    } else if (name == "retry_max_ms") {
      problem = read_integer(m, name, 0, kRetryMsMax, &job->retry_max_ms);
      retry_max_set = true;
    } else if (name == "timeout_ms") {
      problem = read_integer(m, name, 1, kTimeoutMsMax, &job->timeout_ms);
    } else if (name == "dedup_key" || name == "request_id") {
      (name == "dedup_key" ? key : alias) = m;
      problem = read_string(m, name, kDedupKeyBytesMax, &job->dedup_key);
      if (!problem && job->dedup_key.empty()) {
        problem = bad_field(name, "it is empty");
      }
    } else if (name == "dedup_ttl_ms") {
      problem = read_integer(m, name, 1, kDedupTtlMsMax, &job->dedup_ttl_ms);
    } else if (name == "depends_on") {
      problem = read_depends_on(m, job);
    } else if (name == "labels") {
      problem = read_labels(m, job);
    } else if (name == "keep_result_ms") {
      problem = read_integer(m, name, 0, kKeepMsMax, &job->keep_result_ms);
    } else if (name == "sandbox") {
      problem = read_sandbox(m, options, job, &level_set);
    } else if (name == "concurrency_key") {
      problem =
          read_string(m, name, kConcurrencyKeyBytesMax, &job->concurrency_key);
      if (!problem && job->concurrency_key.empty()) {
        problem = bad_field(name, "it is empty");
      }
    } else if (name == "concurrency_limit") {
      problem = read_integer(m, name, 1, kConcurrencyLimitMax, &n);
      job->concurrency_limit = static_cast<std::uint16_t>(n);
    } else if (name == "callback_url") {
      problem = not_implemented(
          std::string(name),
          std::string(name) + ": this version does not have it");
    } else {
      problem = unknown_field(name);
    }
    if (problem) return problem;
  }
  if (job->kind.empty()) return bad_field("kind", "it is missing");
  if (run_at && delay) {
    return bad_field("delay_ms", "run_at and delay_ms exclude each other");
  }
  if (key && alias) {
    return bad_field("request_id",
                     "dedup_key and its alias request_id exclude each other");
  }
  if (job->concurrency_limit > 0 && job->concurrency_key.empty()) {
    return bad_field("concurrency_limit",
                     "it needs concurrency_key, which says of what jobs");
  }
  if (!job->concurrency_key.empty() && job->concurrency_limit == 0) {
    job->concurrency_limit = 1;
  }
  if (job->retry_max_ms < job->retry_min_ms) {
    // One that was set alone moves the other's default, never the reverse.
    if (retry_min_set && retry_max_set) {
      return bad_field("retry_max_ms", std::to_string(job->retry_max_ms) +
                                           " is less than retry_min_ms, " +
                                           std::to_string(job->retry_min_ms));
    }
    (retry_min_set ? job->retry_max_ms : job->retry_min_ms) =
        retry_min_set ? job->retry_min_ms : job->retry_max_ms;
  }
  if (!context.idempotency_key.empty()) {
    if (job->dedup_key.empty()) {
      job->dedup_key.assign(context.idempotency_key);
    } else if (job->dedup_key != context.idempotency_key) {
      const std::string member = key ? "dedup_key" : "request_id";
      return bad_field("Idempotency-Key",
                       shown(context.idempotency_key) + " is not the body's " +
                           member + ", " + shown(job->dedup_key) +
                           ": send one of them, or the same in both");
    }
  }
  if (!job->dedup_key.empty()) {
    if (payload) {
      canonical_digest(payload, job->payload_digest);
    } else {
      JsonDoc empty;
      empty.parse("{}");
      canonical_digest(empty.root(), job->payload_digest);
    }
  }
  auto facts = options.kinds.find(job->kind);
  if (facts != options.kinds.end()) {
    if (facts->second.check) {
      auto kept = facts->second.check(job->payload);
      // What `resolve` finds counts instead, once it is found.
      if (!kept || !facts->second.resolve) {
        if (auto p = take_kept(options, std::move(kept), job)) return p;
      }
    }
    if (job->timeout_ms == 0) job->timeout_ms = facts->second.timeout_ms;
    if (!level_set) job->min_level = options.min_level;
  }
  job->tenant.assign(context.tenant);
  job->traceparent.assign(context.traceparent);
  job->request_id.assign(context.request_id);
  return std::nullopt;
}

bool needs_host(const ServerOptions& options, const NewJob& job) {
  const auto facts = options.kinds.find(job.kind);
  return facts != options.kinds.end() && facts->second.resolve != nullptr;
}

MaybeProblem take_kept(const ServerOptions& options,
                       Checked<KindFacts::Kept> kept, NewJob* job) {
  if (!kept) return invalid_payload(kept.error());
  if (kept->payload.size() > kPayloadBytesMax) {
    return too_long("payload", kept->payload.size(), kPayloadBytesMax);
  }
  if (!kept->payload.empty()) job->payload = std::move(kept->payload);
  return set_kind_key(options.kinds.at(job->kind),
                      std::move(kept->concurrency_key), job);
}

Problem of_child(Problem problem, std::size_t index) {
  const std::string child = "enqueue[" + std::to_string(index) + "]";
  problem.field = child + (problem.field.empty() ? "" : "." + problem.field);
  problem.detail = child + ": " + problem.detail;
  return problem;
}

// --- Workers' bodies -------------------------------------------------------

namespace {

// An isolation report says one of the levels, or none.
MaybeProblem check_level(const JsonValue& isolation) {
  for (JsonValue m = isolation.first(); m; m = m.next()) {
    if (m.key() != "level") continue;
    if (!m.is_string() || !parse_level(m.as_string())) {
      return bad_field("isolation.level", "it is one of L0 to L4");
    }
  }
  return std::nullopt;
}

// Members that completions and failures share. False: not one of them.
bool read_outcome_member(const JsonValue& m, Outcome* outcome,
                         MaybeProblem* problem) {
  constexpr std::size_t kFactsBytesMax = 64 * 1024;
  std::string_view name = m.key();
  if (name == "message") {
    *problem = m.is_null()
                   ? std::nullopt
                   : read_string(m, name, kMessageBytesMax, &outcome->message);
  } else if (name == "result") {
    *problem = read_any(m, name, kResultBytesMax, &outcome->result);
    if (*problem && m.raw().size() > kResultBytesMax) {
      (*problem)->status = 413;
      (*problem)->code = "too-large";
    }
  } else if (name == "isolation") {
    *problem = read_object(m, name, kFactsBytesMax, &outcome->isolation);
    if (!*problem) *problem = check_level(m);
  } else if (name == "usage") {
    *problem = read_object(m, name, kFactsBytesMax, &outcome->usage);
  } else if (name == "side_effects") {
    *problem = read_object(m, name, kFactsBytesMax, &outcome->side_effects);
  } else {
    return false;
  }
  return true;
}

MaybeProblem read_artifacts(const JsonValue& v, Outcome* outcome) {
  if (!v.is_array()) return wrong_type("artifacts", v, "an array of names");
  for (JsonValue item = v.first(); item; item = item.next()) {
    std::string name;
    if (auto p = read_string(item, "artifacts", kArtifactNameBytesMax, &name)) {
      return p;
    }
    if (!valid_artifact_name(name)) {
      return bad_field("artifacts", shown(name) +
                                        " is not of the form "
                                        "[A-Za-z0-9_][A-Za-z0-9._-]{0,127}");
    }
    if (outcome->artifacts.size() >= kArtifactsPerAttemptMax) {
      return bad_field("artifacts",
                       "more than " + std::to_string(kArtifactsPerAttemptMax));
    }
    outcome->artifacts.push_back(std::move(name));
  }
  return std::nullopt;
}

MaybeProblem read_children(const JsonValue& v, const JobContext& context,
                           std::vector<NewJob>* children) {
  constexpr std::size_t kChildrenMax = 1000;
  if (!v.is_array()) return wrong_type("enqueue", v, "an array of jobs");
  std::size_t index = 0;
  for (JsonValue item = v.first(); item; item = item.next(), ++index) {
    if (children->size() >= kChildrenMax) {
      return bad_field("enqueue",
                       "more than " + std::to_string(kChildrenMax) + " jobs");
    }
    children->emplace_back();
    if (auto p = read_new_job(item, context, &children->back())) {
      return of_child(std::move(*p), index);
    }
  }
  return std::nullopt;
}

MaybeProblem not_an_object(const JsonValue& json) {
  if (json.is_object()) return std::nullopt;
  Problem p;
  p.detail = "the body is " + std::string(type_name(json)) +
             ", but an object is taken here";
  return p;
}

MaybeProblem read_patterns(const JsonValue& v, std::string_view field,
                           bool kinds, std::vector<std::string>* out) {
  if (!v.is_array()) return wrong_type(field, v, "an array of strings");
  for (JsonValue item = v.first(); item; item = item.next()) {
    std::string text;
    if (auto p = read_string(item, field, kKindBytesMax, &text)) return p;
    if (kinds ? !valid_kind_pattern(text) : !valid_name(text)) {
      return bad_field(field, shown(text) + (kinds ? " is not a kind, \"*\" or "
                                                     "a kind ending in \".*\""
                                                   : " is not a queue's name"));
    }
    if (out->size() >= kPatternsMax) {
      return bad_field(field, "more than " + std::to_string(kPatternsMax));
    }
    out->push_back(std::move(text));
  }
  return std::nullopt;
}

}  // namespace

MaybeProblem read_completion(const JsonValue& json, const JobContext& context,
                             CompleteCommand::Item* item, std::string* token) {
  if (auto p = not_an_object(json)) return p;
  for (JsonValue m = json.first(); m; m = m.next()) {
    std::string_view name = m.key();
    MaybeProblem problem;
    if (read_outcome_member(m, &item->outcome, &problem)) {
    } else if (name == "verdict") {
      std::string verdict;
      problem = read_string(m, name, 16, &verdict);
      if (!problem && verdict != "pass" && verdict != "fail") {
        problem = bad_field(
            name, shown(verdict) + " is neither \"pass\" nor \"fail\"");
      }
      item->outcome.code = verdict == "fail" ? EndCode::verdict : EndCode::none;
    } else if (name == "artifacts") {
      problem = read_artifacts(m, &item->outcome);
    } else if (name == "enqueue") {
      problem = read_children(m, context, &item->children);
    } else if (name == "token" && token != nullptr) {
      problem = read_string(m, name, 64, token);
    } else {
      problem = unknown_field(name);
    }
    if (problem) return problem;
  }
  if (token != nullptr && token->empty()) {
    return bad_field("token", "it is missing");
  }
  return std::nullopt;
}

MaybeProblem read_failure(const JsonValue& json, Outcome* outcome) {
  if (auto p = not_an_object(json)) return p;
  for (JsonValue m = json.first(); m; m = m.next()) {
    std::string_view name = m.key();
    MaybeProblem problem;
    if (read_outcome_member(m, outcome, &problem)) {
    } else if (name == "code") {
      std::string code;
      problem = read_string(m, name, 64, &code);
      auto parsed = parse_end_code(code);
      if (!problem &&
          (!parsed || *parsed == EndCode::none ||
           *parsed == EndCode::dependency || *parsed == EndCode::verdict)) {
        problem = bad_field(name, shown(code) +
                                      " is no code that an attempt can fail "
                                      "with");
      }
      if (parsed) outcome->code = *parsed;
    } else if (name == "retry") {
      problem = read_bool(m, name, &outcome->retry);
    } else if (name == "retry_after_ms") {
      problem = read_integer(m, name, 0, kRetryMsMax, &outcome->retry_after_ms);
    } else if (name == "artifacts") {
      problem = read_artifacts(m, outcome);
    } else {
      problem = unknown_field(name);
    }
    if (problem) return problem;
  }
  if (outcome->code == EndCode::none) {
    return bad_field("code", "it is missing");
  }
  return std::nullopt;
}

MaybeProblem read_block(const JsonValue& json, BlockCommand* block) {
  if (auto p = not_an_object(json)) return p;
  for (JsonValue m = json.first(); m; m = m.next()) {
    std::string_view name = m.key();
    MaybeProblem problem;
    if (name == "reason") {
      problem = read_string(m, name, kBlockReasonBytesMax, &block->reason);
    } else if (name == "data") {
      problem = read_any(m, name, kBlockDataBytesMax, &block->data);
    } else if (name == "deadline_ms") {
      problem = read_integer(m, name, 1, kDelayMsMax, &block->deadline_ms);
    } else {
      problem = unknown_field(name);
    }
    if (problem) return problem;
  }
  if (block->reason.empty()) return bad_field("reason", "it is missing");
  return std::nullopt;
}

MaybeProblem read_session(const JsonValue& v, std::string* secret) {
  if (v.is_null()) return std::nullopt;
  if (auto p = read_string(v, "session", kSessionBytesMax, secret)) return p;
  const bool good = secret->size() >= kSessionBytesMin &&
                    std::all_of(secret->begin(), secret->end(), [](char c) {
                      return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
                             (c >= 'A' && c <= 'Z') || c == '-' || c == '_' ||
                             c == '.';
                    });
  if (good) return std::nullopt;
  return bad_field("session", std::to_string(kSessionBytesMin) + " to " +
                                  std::to_string(kSessionBytesMax) +
                                  " of A-Za-z0-9-_. are needed: what a "
                                  "lease's answer said, or a secret of your "
                                  "own");
}

MaybeProblem read_lease(const JsonValue& json, LeaseBody* lease) {
  if (auto p = not_an_object(json)) return p;
  LeaseCommand& command = lease->command;
  bool kinds = false;
  for (JsonValue m = json.first(); m; m = m.next()) {
    std::string_view name = m.key();
    MaybeProblem problem;
    std::int64_t n = 0;
    if (name == "worker") {
      problem = read_name(m, name, kWorkerBytesMax, &command.worker);
    } else if (name == "kinds") {
      problem = read_patterns(m, name, true, &command.kinds);
      kinds = !command.kinds.empty();
    } else if (name == "queues") {
      problem = read_patterns(m, name, false, &command.queues);
    } else if (name == "max") {
      problem = read_integer(m, name, 1, kLeasesPerCallMax, &n);
      command.max = static_cast<int>(n);
    } else if (name == "wait_ms") {
      problem = read_integer(m, name, 0, kWaitMsMax, &lease->wait_ms);
    } else if (name == "isolation_level") {
      problem = read_level(m, name, &command.level);
    } else if (name == "session") {
      problem = read_session(m, &lease->session);
    } else if (name == "holding") {
      if (!m.is_array()) return wrong_type(name, m, "an array of tokens");
      lease->holding.emplace();
      for (JsonValue item = m.first(); item; item = item.next()) {
        std::string token;
        if (auto p = read_string(item, name, 64, &token)) return p;
        if (lease->holding->size() >= kLeasesPerCallMax) {
          return bad_field(name,
                           "more than " + std::to_string(kLeasesPerCallMax));
        }
        lease->holding->push_back(std::move(token));
      }
    } else {
      problem = unknown_field(name);
    }
    if (problem) return problem;
  }
  if (command.worker.empty()) return bad_field("worker", "it is missing");
  if (!kinds) return bad_field("kinds", "it is missing or empty");
  return std::nullopt;
}

MaybeProblem read_heartbeat(const JsonValue& json, HeartbeatBody* out) {
  if (auto p = not_an_object(json)) return p;
  JsonValue items;
  for (JsonValue m = json.first(); m; m = m.next()) {
    if (m.key() == "items") {
      items = m;
    } else if (m.key() == "wait_ms") {
      if (auto p = read_integer(m, "wait_ms", 0, kWaitMsMax, &out->wait_ms)) {
        return p;
      }
    } else {
      return unknown_field(m.key());
    }
  }
  if (!items) return bad_field("items", "it is missing");
  if (!items.is_array()) return wrong_type("items", items, "an array");
  for (JsonValue item = items.first(); item; item = item.next()) {
    if (out->items.size() >= kLeasesPerCallMax) {
      return bad_field("items",
                       "more than " + std::to_string(kLeasesPerCallMax));
    }
    if (!item.is_object()) return wrong_type("items", item, "objects");
    HeartbeatBody::Item one;
    for (JsonValue m = item.first(); m; m = m.next()) {
      if (m.key() == "token") {
        if (auto p = read_string(m, "items.token", 64, &one.token)) return p;
      } else if (m.key() == "progress") {
        if (m.is_null()) continue;
        if (!m.is_object()) return wrong_type("items.progress", m, "an object");
        for (JsonValue f = m.first(); f; f = f.next()) {
          std::int64_t n = -1;
          MaybeProblem p;
          if (f.key() == "percent") {
            p = read_integer(f, "items.progress.percent", 0, 100, &n);
            one.percent = static_cast<int>(n);
          } else if (f.key() == "message") {
            p = read_string(f, "items.progress.message", 1024, &one.message);
          } else {
            p = unknown_field(joined("items.progress", f.key()));
          }
          if (p) return p;
        }
      } else {
        return unknown_field(joined("items", m.key()));
      }
    }
    if (one.token.empty()) return bad_field("items.token", "it is missing");
    out->items.push_back(std::move(one));
  }
  return std::nullopt;
}

// --- Out -------------------------------------------------------------------

namespace {

void raw_or_null(JsonWriter& json, std::string_view key,
                 const std::string& raw) {
  json.key(key);
  if (raw.empty()) {
    json.null();
  } else {
    json.raw(raw);
  }
}

void string_or_null(JsonWriter& json, std::string_view key,
                    const std::string& text) {
  json.key(key);
  if (text.empty()) {
    json.null();
  } else {
    json.string(text);
  }
}

void append_blocked(JsonWriter& json, const JobView& job) {
  json.key("blocked");
  if (job.state != State::blocked) {
    json.null();
    return;
  }
  json.begin_object();
  json.key("reason").string(job.blocked_reason);
  raw_or_null(json, "data", job.blocked_data);
  json.key("token").string(job.blocked_token);
  json.key("deadline_at").time(job.blocked_deadline_ms);
  json.end_object();
}

void append_error(JsonWriter& json, const JobView& job) {
  json.key("error");
  if (job.error_code == EndCode::none) {
    json.null();
  } else {
    json.begin_object();
    json.key("code").string(name(job.error_code));
    json.key("message").string(job.error_message);
    json.key("attempt").number(job.error_attempt);
    json.end_object();
  }
}

// What a dedup key remembers of a job that is past its retention.
void append_forgotten(JsonWriter& json, const JobView& job) {
  json.begin_object();
  json.key("id").id(job.id);
  json.key("kind").string(job.kind);
  json.key("queue").string(job.queue);
  json.key("tenant").string(job.tenant);
  json.key("state").string(name(job.state));
  json.key("attempt").number(job.attempt);
  json.key("created_at").time(job.created_ms);
  json.key("finished_at").time(job.finished_ms);
  append_error(json, job);
  json.key("dedup_key").string(job.dedup_key);
  json.key("duplicate").boolean(job.duplicate);
  json.key("past_retention").boolean(true);
  json.end_object();
}

}  // namespace

void append_job(JsonWriter& json, const JobView& job, Show show,
                std::optional<bool> served, std::string_view waiting_reason) {
  if (job.past_retention) return append_forgotten(json, job);
  json.begin_object();
  json.key("id").id(job.id);
  json.key("kind").string(job.kind);
  if (served) json.key("served").boolean(*served);
  json.key("queue").string(job.queue);
  json.key("tenant").string(job.tenant);
  json.key("state").string(name(job.state));
  json.key("priority").number(job.priority);
  json.key("attempt").number(job.attempt);
  json.key("max_attempts").number(job.max_attempts);
  json.key("created_at").time(job.created_ms);
  json.key("run_at").time(job.run_at_ms);
  json.key("started_at").time(job.started_ms);
  json.key("finished_at").time(job.finished_ms);
  json.key("timeout_ms");
  if (job.timeout_ms > 0) {
    json.number(static_cast<std::int64_t>(job.timeout_ms));
  } else {
    json.null();
  }
  if (show == Show::all) raw_or_null(json, "payload", job.payload);
  if (show != Show::summary) raw_or_null(json, "result", job.result);
  append_error(json, job);
  json.key("progress");
  if (job.progress_percent < 0 && job.progress_message.empty()) {
    json.null();
  } else {
    json.begin_object();
    json.key("percent");
    if (job.progress_percent < 0) {
      json.null();
    } else {
      json.number(job.progress_percent);
    }
    json.key("message").string(job.progress_message);
    json.end_object();
  }
  json.key("labels").begin_object();
  for (const auto& [key, value] : job.labels) {
    json.key_escaped(key).string(value);
  }
  json.end_object();
  string_or_null(json, "dedup_key", job.dedup_key);
  json.key("duplicate").boolean(job.duplicate);
  json.key("depends_on").begin_array();
  for (const JobId& id : job.depends_on) json.id(id);
  json.end_array();
  json.key("artifacts").begin_array();
  for (const std::string& artifact : job.artifacts) json.string(artifact);
  json.end_array();
  json.key("durability").string(job.fsync ? "fsync" : "os");
  json.key("min_level").string(level_name(job.min_level));
  if (job.waiting_for_level) json.key("waiting_for_level").boolean(true);
  if (!waiting_reason.empty()) {
    json.key("waiting_reason").string(waiting_reason);
  }
  if (!job.concurrency_key.empty()) {
    json.key("concurrency_key").string(job.concurrency_key);
    json.key("concurrency_limit").number(job.concurrency_limit);
    json.key("concurrency_key_of").string(job.kind_key ? "kind" : "client");
  }
  if (job.waiting_for_concurrency) {
    json.key("waiting_for_concurrency").boolean(true);
  }
  if (!job.sandbox.empty()) json.key("sandbox").raw(job.sandbox);
  raw_or_null(json, "isolation", job.isolation);
  raw_or_null(json, "usage", job.usage);
  raw_or_null(json, "side_effects", job.side_effects);
  append_blocked(json, job);
  if (!job.input.empty()) json.key("input").raw(job.input);
  json.key("cancel_requested").boolean(job.cancel_requested);
  string_or_null(json, "worker", job.worker);
  string_or_null(json, "traceparent", job.traceparent);
  string_or_null(json, "request_id", job.request_id);
  json.end_object();
}

}  // namespace machina
