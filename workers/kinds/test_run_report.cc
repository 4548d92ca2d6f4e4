// The result of test.run: counts, and as many cases as its bound allows.

#include <algorithm>
#include <unordered_map>

#include "workers/json_view.h"
#include "workers/kinds/test_run.h"

namespace machina::kinds {
namespace {

int rank(Outcome outcome) {
  switch (outcome) {
    case Outcome::failed:
    case Outcome::error:
      return 0;
    case Outcome::flaky:
      return 1;
    default:
      return 2;
  }
}

void append_case(std::string& out, const Case& one) {
  out += "{\"id\":";
  json::quote(out, one.id);
  out += ",\"outcome\":\"";
  out += name(one.outcome);
  out +=
      "\",\"duration_ms\":" + std::to_string(one.duration_ms) + ",\"message\":";
  json::quote(out, one.message);
  out += '}';
}

}  // namespace

void merge_rerun(TestOutcome& all, const Suite& rerun) {
  std::unordered_map<std::string, Outcome> again;
  for (const Case& one : rerun.cases) {
    // Listed twice with different outcomes: the worse one counts.
    const auto [at, added] = again.emplace(one.id, one.outcome);
    if (!added && rank(one.outcome) == 0) at->second = one.outcome;
  }
  for (Case& one : all.suite.cases) {
    const auto at = again.find(one.id);
    if (rank(one.outcome) != 0 || at == again.end() ||
        at->second != Outcome::passed) {
      continue;
    }
    auto& count =
        one.outcome == Outcome::failed ? all.suite.failed : all.suite.errors;
    if (count > 0) --count;
    one.outcome = Outcome::flaky;
    ++all.flaky;
  }
}

void add_error(TestOutcome& all, const std::string& id,
               const std::string& message) {
  Case one;
  one.id = id;
  one.outcome = Outcome::error;
  one.message = message.substr(0, kCaseMessageBytesMax);
  all.suite.cases.push_back(std::move(one));
  ++all.suite.errors;
  all.broken = true;
}

bool passed(const TestOutcome& all) {
  return all.suite.failed == 0 && all.suite.errors == 0 && !all.timed_out;
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
