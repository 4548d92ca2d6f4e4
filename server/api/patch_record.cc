#include "server/api/patch_record.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "queue/base/numbers.h"
#include "queue/base/utf8.h"
#include "server/api/store.h"

namespace machina {
namespace {

std::string text_in(const JsonValue& object, std::string_view name,
                    std::size_t max = kPatchNameBytesMax) {
  JsonValue v = object ? object.find(name) : JsonValue();
  return v && v.is_string() ? cut(v.as_string(), max) : std::string();
}

bool flag_in(const JsonValue& object, std::string_view name, bool absent) {
  JsonValue v = object ? object.find(name) : JsonValue();
  return v && v.is_bool() ? v.as_bool() : absent;
}

std::int64_t number_in(const JsonValue& object, std::string_view name) {
  JsonValue v = object ? object.find(name) : JsonValue();
  if (!v || !v.is_number()) return 0;
  return std::max<std::int64_t>(0, v.as_integer().value_or(0));
}

JsonValue member(const JsonValue& object, std::string_view name,
                 JsonValue::Type type) {
  JsonValue v = object ? object.find(name) : JsonValue();
  return v && v.type() == type ? v : JsonValue();
}

bool lower_hex(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
  });
}

// A SHA-256, with or without what says so; else nothing.
std::string sha256_in(const JsonValue& object, std::string_view name) {
  constexpr std::string_view kPrefix = "sha256:";
  std::string text = text_in(object, name, 128);
  std::string_view hex = text;
  if (hex.starts_with(kPrefix)) hex.remove_prefix(kPrefix.size());
  return hex.size() == 64 && lower_hex(hex) ? std::string(hex) : std::string();
}

// A commit's name, or nothing.
std::string commit_in(const JsonValue& object, std::string_view name) {
  std::string text = text_in(object, name, 128);
  bool good = (text.size() == 40 || text.size() == 64) && lower_hex(text);
  return good ? text : std::string();
}

bool plain_word(std::string_view text) {
  return !text.empty() && text.size() <= 32 &&
         std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= 'a' && c <= 'z') || c == '_'; });
}

// The whole numbers and truths of a test report's summary.
std::string counts(const JsonValue& report) {
  if (!report) return {};
  std::string out;
  JsonWriter json(out);
  json.begin_object();
  int n = 0;
  for (JsonValue m = report.first(); m && n < 16; m = m.next()) {
    if (!plain_word(m.key())) continue;
    if (m.is_bool()) {
      json.key(m.key()).boolean(m.as_bool());
    } else if (auto number = m.is_number() ? m.as_integer() : std::nullopt) {
      json.key(m.key()).number(*number);
    } else {
      continue;
    }
    ++n;
  }
  json.end_object();
  return out;
}

// A list of names: the first kPatchCasesMax, and how many there were.
std::string names(const JsonValue& list, std::int64_t* count) {
  std::string out;
  JsonWriter json(out);
  json.begin_array();
  for (JsonValue v = list ? list.first() : JsonValue(); v; v = v.next()) {
    if (++*count > static_cast<std::int64_t>(kPatchCasesMax)) continue;
    if (v.is_string()) json.string(cut(v.as_string(), kPatchNameBytesMax));
  }
  json.end_array();
  return out;
}

void read_files(const JsonValue& list, PatchRecord* patch) {
  for (JsonValue v = list ? list.first() : JsonValue();
       v && patch->files.size() < kPatchFilesMax; v = v.next()) {
    if (!v.is_object()) continue;
    PatchFile file;
    file.path = text_in(v, "path");
    file.old_path = text_in(v, "old_path");
    file.added = number_in(v, "added");
    file.removed = number_in(v, "removed");
    file.sha256_before = sha256_in(v, "sha256_before");
    file.sha256_after = sha256_in(v, "sha256_after");
    if (file.path.empty()) continue;
    patch->lines_added += file.added;
    patch->lines_removed += file.removed;
    patch->files.push_back(std::move(file));
  }
  patch->file_count = static_cast<std::int64_t>(patch->files.size());
}

double real_of(const JsonValue& v) {
  const double value = parse_number<double>(v.raw()).value_or(0);
  return std::isfinite(value) ? value : 0;
}

// An array of texts, cut to its bounds; empty where there is none.
std::string texts(const JsonValue& list) {
  if (!list) return {};
  std::string out;
  JsonWriter json(out);
  json.begin_array();
  std::size_t n = 0;
  for (JsonValue v = list.first(); v && n < kAlertsMax; v = v.next()) {
    if (!v.is_string()) continue;
    json.string(cut(v.as_string(), kPatchNameBytesMax));
    ++n;
  }
  json.end_array();
  return n == 0 ? std::string() : out;
}

std::optional<double> real_in(const JsonValue& object, std::string_view name) {
  JsonValue v = object ? object.find(name) : JsonValue();
  if (!v || !v.is_number()) return std::nullopt;
  return real_of(v);
}

void add_contributors(PatchRecord* patch) {
  std::map<std::pair<std::string, std::string>, double> sums;
  for (const PatchSource& source : patch->sources) {
    if (source.vector_id.empty()) continue;
    sums[{source.vector_id, source.session_id}] += source.influence;
  }
  for (const auto& [who, influence] : sums) {
    patch->contributors.push_back({who.first, who.second, influence});
  }
}

void read_sources(const JsonValue& list, PatchRecord* patch) {
  std::int64_t position = 0;
  for (JsonValue v = list ? list.first() : JsonValue();
       v && patch->sources.size() < kPatchSourcesMax; v = v.next()) {
    PatchSource source;
    source.position = position++;
    if (!v.is_object()) continue;
    source.origin = text_in(v, "origin");
    source.vector_id = text_in(v, "vector_id");
    source.license = text_in(v, "license", 256);
    source.license_fingerprint = sha256_in(v, "license_fingerprint");
    if (JsonValue text = member(v, "license_text", JsonValue::Type::string)) {
      source.license_fingerprint = sha256_of(text.as_string());
    }
    source.session_id = text_in(v, "session_id");
    source.retrieved_at = text_in(v, "retrieved_at", 64);
    source.semantic_alerts =
        texts(member(v, "semantic_alerts", JsonValue::Type::array));
    JsonValue influence = member(v, "influence", JsonValue::Type::number);
    if (influence) {
      source.has_influence = true;
      source.influence = real_of(influence);
    }
    patch->sources.push_back(std::move(source));
  }
}

// The document of `text` where it is an object; else one without members.
JsonValue parse_object(JsonDoc* doc, std::string_view text) {
  if (text.empty() || doc->parse(text) || !doc->root().is_object()) return {};
  return doc->root();
}

void text_or_null(JsonWriter& json, std::string_view key,
                  const std::string& text) {
  json.key(key);
  if (text.empty()) {
    json.null();
  } else {
    json.string(text);
  }
}

void raw_or(JsonWriter& json, std::string_view key, const std::string& raw,
            std::string_view absent) {
  json.key(key).raw(raw.empty() ? absent : std::string_view(raw));
}

PatchMetrics read_metrics(const PatchRecord& patch, const JsonValue& context,
                          const JsonValue& after) {
  PatchMetrics out;
  const auto whole = [](const JsonValue& object,
                        std::string_view name) -> std::optional<std::int64_t> {
    JsonValue v = object ? object.find(name) : JsonValue();
    if (!v || !v.is_number()) return std::nullopt;
    return v.as_integer();
  };
  out.tests_passed = whole(after, "passed");
  out.tests_failed = whole(after, "failed");
  out.errors = whole(after, "errors");
  out.flaky = whole(after, "flaky");
  out.error_trace_count = out.tests_failed.value_or(0) + out.errors.value_or(0);
  out.lines_changed = patch.lines_added + patch.lines_removed;
  out.context_tokens = whole(context, "context_tokens");
  out.patch_difficulty = real_in(context, "patch_difficulty");
  out.effort_estimate = real_in(context, "effort_estimate");
  out.roi_tag = text_in(context, "roi_tag", 64);
  out.enhancement_name = text_in(context, "enhancement_name");
  out.start_ms = patch.created_ms;
  out.time_to_completion_ms =
      std::max<Millis>(0, patch.finished_ms - patch.created_ms);
  if (out.tests_passed) out.enhancement_score = enhancement_score(out);
  return out;
}

// What is kept of a rollback's tests.
std::string rollback_tests(const JsonValue& tests) {
  if (!tests) return {};
  std::string out;
  JsonWriter json(out);
  json.begin_object();
  for (const char* when : {"before", "after"}) {
    raw_or(json, when, counts(member(tests, when, JsonValue::Type::object)),
           "null");
  }
  for (const char* list : {"newly_failing", "failing_again"}) {
    std::int64_t count = 0;
    const std::string all =
        names(member(tests, list, JsonValue::Type::array), &count);
    raw_or(json, list, all, "[]");
    json.key(std::string(list) + "_count").number(count);
  }
  json.end_object();
  return out;
}

std::string outcome_of(const JsonValue& result, State state) {
  std::string outcome = text_in(result, "outcome", 64);
  return plain_word(outcome) ? outcome : std::string(name(state));
}

void append_rollback(JsonWriter& json, const RollbackRecord& rollback) {
  json.begin_object();
  json.key("job_id").string(rollback.job_id);
  json.key("state").string(rollback.state);
  json.key("outcome").string(rollback.outcome);
  raw_or(json, "region", rollback.region, "null");
  json.key("restored").number(rollback.restored);
  json.key("verified").boolean(rollback.verified);
  raw_or(json, "tests", rollback.tests, "null");
  text_or_null(json, "branch", rollback.branch);
  text_or_null(json, "commit", rollback.commit);
  json.key("pushed").boolean(rollback.pushed);
  text_or_null(json, "reason", rollback.reason);
  json.key("created_at").time(rollback.created_ms);
  json.key("finished_at").time(rollback.finished_ms);
  json.end_object();
}

void number_or_null(JsonWriter& json, std::string_view key,
                    const std::optional<std::int64_t>& value) {
  json.key(key);
  if (value) {
    json.number(*value);
  } else {
    json.null();
  }
}

void real_or_null(JsonWriter& json, std::string_view key,
                  const std::optional<double>& value) {
  json.key(key);
  if (value) {
    json.real(*value);
  } else {
    json.null();
  }
}

void append_metrics(JsonWriter& json, const PatchMetrics& metrics) {
  json.begin_object();
  number_or_null(json, "tests_passed", metrics.tests_passed);
  number_or_null(json, "tests_failed", metrics.tests_failed);
  number_or_null(json, "errors", metrics.errors);
  number_or_null(json, "flaky", metrics.flaky);
  json.key("error_trace_count").number(metrics.error_trace_count);
  json.key("lines_changed").number(metrics.lines_changed);
  number_or_null(json, "context_tokens", metrics.context_tokens);
  real_or_null(json, "patch_difficulty", metrics.patch_difficulty);
  real_or_null(json, "effort_estimate", metrics.effort_estimate);
  text_or_null(json, "roi_tag", metrics.roi_tag);
  text_or_null(json, "enhancement_name", metrics.enhancement_name);
  real_or_null(json, "enhancement_score", metrics.enhancement_score);
  json.key("start_time").time(metrics.start_ms);
  json.key("time_to_completion_ms").number(metrics.time_to_completion_ms);
  json.end_object();
}

void append_sources(JsonWriter& json, const std::vector<PatchSource>& sources) {
  json.begin_array();
  for (const PatchSource& source : sources) {
    json.begin_object();
    json.key("position").number(source.position);
    text_or_null(json, "origin", source.origin);
    text_or_null(json, "vector_id", source.vector_id);
    json.key("influence");
    if (source.has_influence) {
      json.real(source.influence);
    } else {
      json.null();
    }
    text_or_null(json, "license", source.license);
    text_or_null(json, "license_fingerprint", source.license_fingerprint);
    text_or_null(json, "session_id", source.session_id);
    text_or_null(json, "retrieved_at", source.retrieved_at);
    raw_or(json, "semantic_alerts", source.semantic_alerts, "[]");
    json.end_object();
  }
  json.end_array();
}

void append_details(JsonWriter& json, const PatchRecord& patch) {
  json.key("files").begin_array();
  for (const PatchFile& file : patch.files) {
    json.begin_object();
    json.key("path").string(file.path);
    if (!file.old_path.empty()) json.key("old_path").string(file.old_path);
    json.key("added").number(file.added);
    json.key("removed").number(file.removed);
    text_or_null(json, "sha256_before", file.sha256_before);
    text_or_null(json, "sha256_after", file.sha256_after);
    json.end_object();
  }
  json.end_array();
  json.key("provenance");
  append_sources(json, patch.sources);
  json.key("contributors").begin_array();
  for (const PatchContributor& one : patch.contributors) {
    json.begin_object();
    json.key("vector_id").string(one.vector_id);
    text_or_null(json, "session_id", one.session_id);
    json.key("influence").real(one.influence);
    json.end_object();
  }
  json.end_array();
  json.key("metrics");
  if (patch.metrics) {
    append_metrics(json, *patch.metrics);
  } else {
    json.null();
  }
  raw_or(json, "test", patch.suite, "null");
  json.key("branch_log").begin_array();
  for (const BranchEntry& entry : patch.branch_log) {
    json.begin_object();
    json.key("action").string(entry.action);
    json.key("job_id").string(entry.job_id);
    text_or_null(json, "branch", entry.branch);
    text_or_null(json, "commit", entry.commit);
    json.key("at").time(entry.at_ms);
    json.end_object();
  }
  json.end_array();
  json.key("rollbacks").begin_array();
  for (const RollbackRecord& rollback : patch.rollbacks) {
    append_rollback(json, rollback);
  }
  json.end_array();
}

}  // namespace

std::string cut(std::string_view text, std::size_t max) {
  return std::string(utf8_head(text, max));
}

double enhancement_score(const PatchMetrics& m) {
  const auto whole = [](const std::optional<std::int64_t>& value) {
    return static_cast<double>(value.value_or(0));
  };
  return m.patch_difficulty.value_or(0) -
         0.5 * static_cast<double>(m.time_to_completion_ms) / 1000 +
         2.0 * whole(m.tests_passed) - whole(m.tests_failed) -
         1.5 * static_cast<double>(m.error_trace_count) +
         0.5 * m.effort_estimate.value_or(0);
}

PatchRecord read_patch(const EndedJob& job, std::string* reverse_diff) {
  using Type = JsonValue::Type;
  PatchRecord patch;
  JsonDoc asked, answered;
  const JsonValue payload = parse_object(&asked, job.payload);
  const JsonValue result = parse_object(&answered, job.result);
  patch.patch_id = to_string(job.id);
  patch.tenant = job.tenant;
  patch.state = name(job.state);
  patch.outcome = outcome_of(result, job.state);
  patch.reason = text_in(result, "reason", kPatchTextBytesMax);
  if (patch.reason.empty() && job.state != State::succeeded) {
    patch.reason = cut(job.message, kPatchTextBytesMax);
  }
  patch.repo = text_in(payload, "repo", kPatchTextBytesMax);
  patch.base_rev = text_in(payload, "base_rev");
  if (patch.base_rev.empty()) patch.base_rev = "HEAD";
  patch.base_commit = commit_in(result, "base_commit");
  patch.commit = commit_in(result, "commit");
  patch.branch = text_in(result, "branch");
  const bool applied = patch.outcome == "applied";
  patch.pushed =
      applied && flag_in(result, "pushed", flag_in(payload, "push", false));
  patch.description = text_in(payload, "description", kPatchTextBytesMax);
  patch.author = text_in(payload, "author");
  patch.parent_patch_id = text_in(payload, "parent_patch_id", 64);

  patch.diff_digest = sha256_in(result, "diff_digest");
  if (JsonValue diff = member(payload, "diff", Type::string);
      diff && patch.diff_digest.empty()) {
    patch.diff_digest = sha256_of(diff.as_string());
  }
  if (!patch.diff_digest.empty()) {
    patch.diff_digest.insert(0, "sha256:");
  }
  if (text_in(payload, "approval", 16) == "required") {
    // Nothing is applied before the yes. Who gave it is told by the job's
    // unblock, where that is at hand (read_approval).
    const bool given = applied || patch.outcome == "tests_failed" ||
                       patch.outcome == "conflict" ||
                       patch.outcome == "no_change";
    patch.approval.state = given ? "approved" : "required";
  }
  if (patch.outcome == "approval_denied") patch.approval.state = "denied";

  read_files(member(result, "files", Type::array), &patch);
  read_sources(member(payload, "provenance", Type::array), &patch);
  const JsonValue tests = member(result, "tests", Type::object);
  patch.tests_before = counts(member(tests, "before", Type::object));
  patch.tests_after = counts(member(tests, "after", Type::object));
  patch.newly_failing = names(member(tests, "newly_failing", Type::array),
                              &patch.newly_failing_count);
  patch.newly_passing = names(member(tests, "newly_passing", Type::array),
                              &patch.newly_passing_count);
  patch.created_ms = job.created_ms;
  patch.finished_ms = job.finished_ms;
  if (JsonValue suite = member(payload, "test", Type::object);
      suite && suite.raw().size() <= kSuiteBytesMax) {
    patch.suite = suite.raw();
  }
  add_contributors(&patch);
  patch.metrics = read_metrics(patch, member(payload, "context", Type::object),
                               member(tests, "after", Type::object));
  *reverse_diff = applied ? text_in(result, "reverse_diff_artifact") : "";
  if (applied) {
    const std::string by = patch.patch_id;
    patch.branch_log.push_back(
        {by, "committed", patch.branch, patch.commit, job.finished_ms});
    if (patch.pushed) {
      patch.branch_log.push_back(
          {by, "pushed", patch.branch, patch.commit, job.finished_ms});
    }
  }
  return patch;
}

RollbackRecord read_rollback(const EndedJob& job) {
  using Type = JsonValue::Type;
  RollbackRecord rollback;
  JsonDoc asked, answered;
  const JsonValue payload = parse_object(&asked, job.payload);
  const JsonValue result = parse_object(&answered, job.result);
  rollback.job_id = to_string(job.id);
  rollback.patch_id = text_in(payload, "patch_id", 64);
  rollback.state = name(job.state);
  rollback.outcome = outcome_of(result, job.state);
  rollback.reason = text_in(result, "reason", kPatchTextBytesMax);
  if (rollback.reason.empty() && job.state != State::succeeded) {
    rollback.reason = cut(job.message, kPatchTextBytesMax);
  }
  rollback.branch = text_in(result, "branch");
  rollback.commit = commit_in(result, "commit");
  rollback.pushed = flag_in(result, "pushed", false);
  rollback.verified = flag_in(result, "verified", false);
  rollback.tests = rollback_tests(member(result, "tests", Type::object));
  if (JsonValue restored = member(result, "restored", Type::array)) {
    rollback.restored = static_cast<std::int64_t>(restored.size());
  }
  if (JsonValue region = member(payload, "region", Type::object);
      region && region.raw().size() <= kRegionBytesMax) {
    rollback.region = region.raw();
  }
  rollback.created_ms = job.created_ms;
  rollback.finished_ms = job.finished_ms;
  return rollback;
}

PatchApproval read_approval(std::string_view input, std::string_view actor,
                            Millis at_ms) {
  PatchApproval approval;
  JsonDoc doc;
  const JsonValue object = parse_object(&doc, input);
  approval.state = flag_in(object, "approve", true) ? "approved" : "denied";
  approval.actor = cut(actor, kPatchNameBytesMax);
  approval.comment = text_in(object, "comment");
  if (std::string digest = sha256_in(object, "digest"); !digest.empty()) {
    approval.digest = "sha256:" + digest;
  }
  approval.at_ms = at_ms;
  return approval;
}

void append_patch(JsonWriter& json, const PatchRecord& patch, ShowPatch show) {
  json.begin_object();
  json.key("patch_id").string(patch.patch_id);
  json.key("state").string(patch.state);
  json.key("outcome").string(patch.outcome);
  text_or_null(json, "reason", patch.reason);
  text_or_null(json, "repo", patch.repo);
  text_or_null(json, "base_rev", patch.base_rev);
  text_or_null(json, "base_commit", patch.base_commit);
  text_or_null(json, "commit", patch.commit);
  text_or_null(json, "branch", patch.branch);
  json.key("pushed").boolean(patch.pushed);
  text_or_null(json, "description", patch.description);
  text_or_null(json, "author", patch.author);
  text_or_null(json, "parent_patch_id", patch.parent_patch_id);
  text_or_null(json, "diff_digest", patch.diff_digest);
  json.key("approval").begin_object();
  json.key("state").string(patch.approval.state);
  text_or_null(json, "actor", patch.approval.actor);
  text_or_null(json, "comment", patch.approval.comment);
  text_or_null(json, "digest", patch.approval.digest);
  json.key("at").time(patch.approval.at_ms);
  json.end_object();
  json.key("lines").begin_object();
  json.key("added").number(patch.lines_added);
  json.key("removed").number(patch.lines_removed);
  json.end_object();
  json.key("file_count").number(patch.file_count);
  json.key("tests").begin_object();
  raw_or(json, "before", patch.tests_before, "null");
  raw_or(json, "after", patch.tests_after, "null");
  json.key("newly_failing_count").number(patch.newly_failing_count);
  json.key("newly_passing_count").number(patch.newly_passing_count);
  if (show == ShowPatch::all) {
    raw_or(json, "newly_failing", patch.newly_failing, "[]");
    raw_or(json, "newly_passing", patch.newly_passing, "[]");
  }
  json.end_object();
  json.key("reverse_diff_bytes").number(patch.reverse_diff_bytes);
  text_or_null(json, "rolled_back_by", patch.rolled_back_by);
  json.key("created_at").time(patch.created_ms);
  json.key("finished_at").time(patch.finished_ms);
  if (show == ShowPatch::all) append_details(json, patch);
  if (show == ShowPatch::ancestor) {
    json.key("provenance");
    append_sources(json, patch.sources);
  }
  json.end_object();
}

}  // namespace machina
