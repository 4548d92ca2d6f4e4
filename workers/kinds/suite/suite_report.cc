// The result of test.run: counts, and as many cases as its bound allows.

#include <algorithm>
#include <map>

#include "queue/base/json.h"
#include "queue/base/utf8.h"
#include "workers/kinds/fields.h"
#include "workers/kinds/suite/suite.h"

namespace machina::kinds {
namespace {

int rank(Outcome outcome) {
  switch (outcome) {
    case Outcome::failed:
    case Outcome::error:
      return 0;
    case Outcome::missing:
      return 1;
    case Outcome::flaky:
      return 2;
    default:
      return 3;
  }
}

void append_case(std::string& out, const Case& one) {
  out += "{\"id\":";
  json::quote(out, one.id);
  if (one.nth > 1) out += ",\"nth\":" + std::to_string(one.nth);
  out += ",\"outcome\":\"";
  out += name(one.outcome);
  out +=
      "\",\"duration_ms\":" + std::to_string(one.duration_ms) + ",\"message\":";
  json::quote(out, one.message);
  out += '}';
}

}  // namespace

namespace {

// Of each id, its cases by number; a case in two elements (its body and its
// teardown failed) passed in none.
using ById = std::map<std::string, std::map<std::uint32_t, bool>>;

ById passes_of(const std::vector<Case>& cases) {
  ById out;
  for (const Case& one : cases) {
    if (one.of_run || one.outcome == Outcome::missing) continue;
    const bool good =
        one.outcome == Outcome::passed || one.outcome == Outcome::flaky;
    const auto [at, added] = out[one.id].emplace(one.nth, good);
    at->second = at->second && good;
  }
  return out;
}

}  // namespace

void merge_rerun(TestOutcome& all, const Suite& rerun) {
  const ById first = passes_of(all.suite.cases);
  const ById again = passes_of(rerun.cases);
  for (Case& one : all.suite.cases) {
    if (rank(one.outcome) != 0 || one.of_run) continue;
    const auto at = again.find(one.id);
    if (at == again.end()) continue;
    const auto& then = first.at(one.id);
    std::uint32_t nth = one.nth;
    if (at->second.size() != then.size()) {
      // Only those that failed ran again: the first of them is number 1.
      std::uint32_t failing = 0, mine = 0;
      for (const auto& [number, good] : then) {
        failing += good ? 0 : 1;
        if (number == one.nth) mine = failing;
      }
      if (at->second.size() != failing) continue;
      nth = mine;
    }
    const auto now = at->second.find(nth);
    if (now == at->second.end() || !now->second) continue;
    auto& count =
        one.outcome == Outcome::failed ? all.suite.failed : all.suite.errors;
    if (count > 0) --count;
    one.outcome = one.body = Outcome::flaky;
    one.teardown = false;
    ++all.flaky;
  }
}

namespace {

auto by_id_and_number(Suite& suite) {
  std::map<std::pair<std::string_view, std::uint32_t>, Case*> out;
  for (Case& one : suite.cases)
    out.emplace(std::pair(std::string_view(one.id), one.nth), &one);
  return out;
}

}  // namespace

void place_cases(Suite& suite, const Suite& record) {
  const auto there = by_id_and_number(suite);
  for (const Case& one : record.cases) {
    const auto at = there.find({one.id, one.nth});
    if (at != there.end()) at->second->where = one.message;
  }
}

void expect_cases(Suite& suite, const Suite& record) {
  const auto there = by_id_and_number(suite);
  // A test may have given its case another name in the report. So one that
  // ended is held to be missing only where the report has too few.
  const bool too_few = suite.dropped == 0 && there.size() < record.skipped;
  std::vector<Case> missing;
  for (const Case& one : record.cases) {
    const auto at = there.find({one.id, one.nth});
    const bool reached = one.outcome == Outcome::skipped;
    if (at != there.end()) at->second->where = one.message;
    if (reached && (at != there.end() || !too_few)) continue;
    Case lost;
    lost.id = one.id;
    lost.nth = one.nth;
    lost.outcome = lost.body = Outcome::missing;
    lost.where = one.message;
    missing.push_back(std::move(lost));
  }
  suite.missing += static_cast<std::uint32_t>(missing.size());
  suite.complete =
      suite.missing == 0 && record.dropped == 0 && suite.dropped == 0;
  suite.cases.insert(suite.cases.end(),
                     std::make_move_iterator(missing.begin()),
                     std::make_move_iterator(missing.end()));
}

const Case* run_error(const TestOutcome& all) {
  for (const Case& one : all.suite.cases) {
    if (one.of_run) return &one;
  }
  return nullptr;
}

std::string some_ids(const std::vector<std::string>& ids) {
  constexpr std::size_t kShown = 3;
  std::string out;
  for (std::size_t i = 0; i < ids.size() && i < kShown; ++i) {
    out += (i > 0 ? ", " : "") + printable(ids[i]);
  }
  if (ids.size() > kShown) {
    out += " and " + std::to_string(ids.size() - kShown) + " more";
  }
  return out;
}

void add_error(TestOutcome& all, const std::string& id,
               const std::string& message) {
  Case one;
  one.id = id;
  one.of_run = true;
  one.outcome = one.body = Outcome::error;
  one.message = utf8_head(message, kCaseMessageBytesMax);
  all.suite.cases.push_back(std::move(one));
  ++all.suite.errors;
  all.broken = true;
}

bool passed(const TestOutcome& all) {
  return all.suite.failed == 0 && all.suite.errors == 0 &&
         all.suite.missing == 0 && !all.timed_out;
}

std::string summary(const TestOutcome& all) {
  const Suite& s = all.suite;
  std::string text = std::to_string(s.passed) + " passed";
  const auto more = [&](std::uint32_t n, const char* what) {
    if (n > 0) text += ", " + std::to_string(n) + " " + what;
  };
  more(s.failed, "failed");
  more(s.errors, s.errors == 1 ? "error" : "errors");
  more(s.skipped, "skipped");
  more(s.missing, "missing");
  more(all.flaky, "flaky");
  if (all.timed_out) text += ", timed out";
  return text;
}

// None of these is counted yet, and an unknown number is not 0.
std::string side_effects_json() {
  std::string out = "{";
  for (const char* what :
       {"files_created", "files_modified", "files_deleted", "bytes_written",
        "connects_allowed", "connects_denied", "denied_syscalls"}) {
    if (out.size() > 1) out += ',';
    out += '"';
    out += what;
    out += "\":\"unavailable\"";
  }
  return out + "}";
}

std::string test_result(const TestOutcome& all, const Usage& usage,
                        std::size_t cases_bytes_max) {
  const Suite& s = all.suite;
  std::vector<const Case*> order;
  order.reserve(s.cases.size());
  for (const Case& one : s.cases) order.push_back(&one);
  std::stable_sort(order.begin(), order.end(),
                   [](const Case* a, const Case* b) {
                     return rank(a->outcome) < rank(b->outcome);
                   });
  std::string cases = "[";
  bool truncated = s.dropped > 0;
  for (const Case* one : order) {
    const std::size_t before = cases.size();
    if (before > 1) cases += ',';
    append_case(cases, *one);
    if (cases.size() > cases_bytes_max) {
      cases.resize(before);
      truncated = true;
      break;
    }
  }
  cases += ']';
  const auto number = [](auto n) { return std::to_string(n); };
  return std::string("{\"ok\":") + (passed(all) ? "true" : "false") +
         ",\"passed\":" + number(s.passed) + ",\"failed\":" + number(s.failed) +
         ",\"errors\":" + number(s.errors) +
         ",\"skipped\":" + number(s.skipped) +
         ",\"flaky\":" + number(all.flaky) +
         ",\"missing\":" + number(s.missing) +
         ",\"timeout\":" + number(all.timed_out ? 1 : 0) +
         ",\"duration_ms\":" + number(all.duration_ms) +
         ",\"coverage\":null,\"cases\":" + cases +
         ",\"cases_truncated\":" + (truncated ? "true" : "false") +
         ",\"side_effects\":" + side_effects_json() +
         ",\"metrics\":{\"peak_memory_bytes\":" + number(usage.max_rss_bytes) +
         ",\"cpu_ms\":" + number(usage.cpu_ms) +
         ",\"output_bytes\":" + number(usage.output_bytes) +
         ",\"disk_bytes\":" + number(usage.disk_bytes) + "}}";
}

}  // namespace machina::kinds
