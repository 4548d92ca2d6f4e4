// Whether a patch is good, and the result that says so.

#include <algorithm>
#include <unordered_map>

#include "workers/json_view.h"
#include "workers/kinds/patch.h"

namespace machina::kinds {
namespace {

// A result is below 1 MiB: what each part of it may take.
constexpr std::size_t kFilesBytesMax = 192 << 10;
constexpr std::size_t kConflictBytesMax = 64 << 10;
constexpr std::size_t kNamesBytesMax = 96 << 10;  // each of the two lists
constexpr std::size_t kBeforeBytesMax = 160 << 10;
constexpr std::size_t kAfterBytesMax = 256 << 10;
constexpr std::size_t kReasonBytesMax = 4 << 10;
constexpr std::size_t kApprovalBytesMax = 48 << 10;

using Outcomes = std::unordered_map<std::string, Outcome>;

bool fails(Outcome outcome) {
  return outcome == Outcome::failed || outcome == Outcome::error;
}

// By id; of several with one id the worst counts.
Outcomes outcomes_of(const TestOutcome& tests) {
  Outcomes out;
  for (const Case& one : tests.suite.cases) {
    const auto [at, added] = out.emplace(one.id, one.outcome);
    if (!added && fails(one.outcome)) at->second = one.outcome;
  }
  return out;
}

bool failed_in(const Outcomes& outcomes, const std::string& id) {
  const auto at = outcomes.find(id);
  return at != outcomes.end() && fails(at->second);
}

bool passed_in(const Outcomes& outcomes, const std::string& id) {
  const auto at = outcomes.find(id);
  return at != outcomes.end() &&
         (at->second == Outcome::passed || at->second == Outcome::flaky);
}

// "tests/test_a.py" stands for the cases "tests.test_a::..." and below; run
// from a directory further down, for "test_a::...".
bool file_of(const std::string& id, const std::string& path) {
  std::string dotted = path.substr(0, path.rfind('.'));
  std::replace(dotted.begin(), dotted.end(), '/', '.');
  while (true) {
    if (id.starts_with(dotted) &&
        (id.size() == dotted.size() || id[dotted.size()] == '.' ||
         id[dotted.size()] == ':')) {
      return true;
    }
    const std::size_t dot = dotted.find('.');
    if (dot == std::string::npos) return false;
    dotted.erase(0, dot + 1);
  }
}

std::string cases_text(std::size_t n, const std::string& rest_one,
                       const std::string& rest_many) {
  return std::to_string(n) +
         (n == 1 ? " case " + rest_one : " cases " + rest_many);
}

std::string text_or_null(const std::string& text) {
  if (text.empty()) return "null";
  return json::quoted(text.substr(0, kReasonBytesMax));
}

// A list of items with a bound; whether some were left out.
template <class List, class Write>
bool append_list(std::string& out, const List& list, std::size_t bytes_max,
                 Write write) {
  const std::size_t begin = out.size();
  out += '[';
  for (const auto& item : list) {
    const std::size_t before = out.size();
    if (before > begin + 1) out += ',';
    write(item);
    if (out.size() - begin > bytes_max) {
      out.resize(before);
      out += ']';
      return true;
    }
  }
  out += ']';
  return false;
}

const char* flag(bool value) { return value ? "true" : "false"; }

std::string phase_json(const TestPhase* phase, std::size_t bytes_max) {
  if (phase == nullptr || !phase->ran) return "null";
  std::string out =
      test_result(phase->run.tests, phase->run.end.usage, bytes_max);
  out.pop_back();
  return out + ",\"valid\":" + flag(phase->valid) +
         ",\"problem\":" + text_or_null(phase->problem) + "}";
}

}  // namespace

std::string tests_json(const TestPhase* before, const TestPhase* after,
                       const std::vector<NamedCases>& lists) {
  if (after == nullptr || !(after->ran || before->ran)) return "null";
  std::string out = "{\"before\":" + phase_json(before, kBeforeBytesMax) +
                    ",\"after\":" + phase_json(after, kAfterBytesMax);
  for (const auto& [name, list] : lists) {
    out += std::string(",\"") + name + "\":";
    const bool cut = append_list(out, *list, kNamesBytesMax,
                                 [&](const auto& id) { json::quote(out, id); });
    out += std::string(",\"") + name + "_truncated\":" + flag(cut);
  }
  return out + "}";
}

std::optional<End> run_test_phase(TestPhase& phase, const TestPayload& suite,
                                  const Checkout& checkout,
                                  const SuiteOptions& options,
                                  const Attempt& attempt, Host& host,
                                  Usage& usage) {
  host.log("== " + options.what + " ==\n");
  phase.ran = true;
  phase.run = run_suite(suite, checkout, options, attempt, host);
  usage.add(phase.run.end.usage);
  const TestOutcome& tests = phase.run.tests;
  const Suite& s = tests.suite;
  switch (phase.run.end.code) {
    case EndCode::none: {
      const bool some = s.passed + s.failed + s.skipped + tests.flaky > 0;
      phase.valid = phase.run.reported && (some || !tests.broken);
      if (!phase.valid) {
        phase.problem = "no test ran, or no report was left";
        if (!s.cases.empty()) {
          phase.problem = s.cases.back().id + ": " +
                          head_and_tail(s.cases.back().message, 1000);
        }
      }
      return std::nullopt;
    }
    case EndCode::timeout:
    case EndCode::oom:
    case EndCode::pids:
    case EndCode::disk:
    case EndCode::output:
    case EndCode::signal:
      if (!phase.run.started) break;
      phase.out_of_time = phase.run.end.code == EndCode::timeout;
      phase.problem = phase.run.end.message;
      return std::nullopt;
    default:
      break;
  }
  return std::move(phase.run.end);
}

std::set<std::string> failing_cases(const TestPhase& phase) {
  std::set<std::string> out;
  for (const auto& [id, outcome] : outcomes_of(phase.run.tests)) {
    if (fails(outcome)) out.insert(id);
  }
  return out;
}

bool newly_fails(const TestPhase& before, const TestOutcome& after) {
  const Outcomes base =
      before.valid ? outcomes_of(before.run.tests) : Outcomes();
  return std::any_of(after.suite.cases.begin(), after.suite.cases.end(),
                     [&](const Case& one) {
                       return fails(one.outcome) && !failed_in(base, one.id);
                     });
}

Gate judge_patch(const TestPhase& before, const TestPhase& after, bool baseline,
                 const std::vector<ChangedFile>& files) {
  Gate gate;
  const bool known = baseline && before.valid;
  const Outcomes base = known ? outcomes_of(before.run.tests) : Outcomes();
  const Outcomes now = outcomes_of(after.run.tests);
  bool new_error = false, some_pass = false;
  std::size_t still_failing = 0;
  std::vector<std::string> lost;  // passed before; gone or skipped now
  std::set<std::string> seen;
  for (const Case& one : after.run.tests.suite.cases) {
    if (!seen.insert(one.id).second) continue;
    if (failed_in(now, one.id) && !failed_in(base, one.id)) {
      gate.newly_failing.push_back(one.id);
      new_error = new_error || now.at(one.id) == Outcome::error;
    }
    still_failing += failed_in(now, one.id) && failed_in(base, one.id);
    some_pass = some_pass || passed_in(now, one.id);
    if (passed_in(now, one.id) && failed_in(base, one.id)) {
      gate.newly_passing.push_back(one.id);
    }
  }
  seen.clear();
  if (known && after.run.tests.suite.dropped == 0) {
    for (const Case& one : before.run.tests.suite.cases) {
      if (passed_in(base, one.id) && !passed_in(now, one.id) &&
          !failed_in(now, one.id) && seen.insert(one.id).second) {
        lost.push_back(one.id);
      }
    }
  }
  // A test that the diff itself edits may go or be skipped, and is told of.
  // What else no longer passes was put out of action.
  const auto counts = [&](const std::string& id) {
    return new_error || !after.valid || !some_pass ||
           std::none_of(
               files.begin(), files.end(),
               [&](const ChangedFile& file) { return file_of(id, file.path); });
  };
  const auto told = std::stable_partition(lost.begin(), lost.end(), counts);
  gate.newly_failing.insert(gate.newly_failing.end(), lost.begin(), told);
  lost.erase(lost.begin(), told);
  gate.accepted = after.valid && gate.newly_failing.empty();
  const auto and_before = [&] {
    if (baseline && !before.valid) {
      gate.reason += gate.reason.empty() ? "" : "; ";
      gate.reason +=
          "the tests gave no verdict before the patch: " + before.problem;
    }
  };
  if (!after.valid) {
    gate.reason = "the tests gave no verdict after the patch: " + after.problem;
    and_before();
  } else if (!gate.accepted) {
    gate.reason = known
                      ? cases_text(gate.newly_failing.size(),
                                   "fails, is gone or skipped, and did not "
                                   "fail before",
                                   "fail, are gone or skipped, and did not "
                                   "fail before")
                      : cases_text(gate.newly_failing.size(), "fails", "fail");
    and_before();
  } else {
    if (still_failing > 0) {
      // Accepted, and no praise: these say nothing about the patch.
      gate.reason = cases_text(still_failing, "failed before and still fails",
                               "failed before and still fail");
      if (!some_pass) gate.reason += ", and none passes";
    }
    if (!lost.empty()) {
      gate.reason += gate.reason.empty() ? "" : "; ";
      gate.reason += cases_text(
          lost.size(), "that passed before is gone or skipped by the diff",
          "that passed before are gone or skipped by the diff");
    }
    and_before();
  }
  return gate;
}

std::string patch_result(const std::string& patch_id,
                         const PatchReport& report) {
  std::string out = "{\"patch_id\":";
  json::quote(out, patch_id);
  out += ",\"outcome\":" + json::quoted(report.outcome);
  out += ",\"diff_digest\":" + text_or_null(report.diff_digest);
  out += ",\"base_commit\":" + text_or_null(report.base_commit);
  out += ",\"commit\":" + text_or_null(report.commit);
  out += ",\"branch\":" + text_or_null(report.branch);
  out += std::string(",\"pushed\":") + flag(report.pushed);
  out += ",\"files\":";
  const auto number = [](std::int64_t n) {
    return n < 0 ? std::string("null") : std::to_string(n);
  };
  bool cut = append_list(
      out, report.files, kFilesBytesMax, [&](const ChangedFile& file) {
        out += "{\"path\":";
        json::quote(out, file.path);
        out += ",\"added\":" + number(file.added) +
               ",\"removed\":" + number(file.removed) +
               ",\"sha256_before\":" + text_or_null(file.sha256_before) +
               ",\"sha256_after\":" + text_or_null(file.sha256_after) + "}";
      });
  out += std::string(",\"files_truncated\":") + flag(cut);
  out += ",\"tests\":";
  out += tests_json(report.before, report.after,
                    {{"newly_failing", &report.gate.newly_failing},
                     {"newly_passing", &report.gate.newly_passing}});
  out += ",\"alignment\":null,\"reverse_diff_artifact\":" +
         text_or_null(report.has_reverse ? kReverseName : "") +
         ",\"bundle_artifact\":" +
         text_or_null(report.has_bundle ? kBundleName : "") + ",\"conflicts\":";
  cut = append_list(
      out, report.conflicts, kConflictBytesMax, [&](const Conflict& one) {
        out += "{\"path\":" + text_or_null(one.path) + ",\"hunk\":" +
               (one.hunk > 0 ? std::to_string(one.hunk) : "null") +
               ",\"reason\":" + text_or_null(one.reason) + "}";
      });
  out += std::string(",\"conflicts_truncated\":") + flag(cut);
  return out + ",\"reason\":" + text_or_null(report.reason) + "}";
}

std::string approval_data(const std::string& digest,
                          const std::string& base_commit, const Diff& diff) {
  std::string out = "{\"digest\":" + json::quoted(digest) +
                    ",\"base_commit\":" + json::quoted(base_commit) +
                    ",\"files\":";
  const bool cut = append_list(
      out, diff.files, kApprovalBytesMax, [&](const DiffFile& file) {
        out += "{\"path\":";
        json::quote(out, file.new_path.empty() ? file.old_path : file.new_path);
        out += ",\"added\":" + std::to_string(file.added) +
               ",\"removed\":" + std::to_string(file.removed) + "}";
      });
  return out + ",\"files_truncated\":" + flag(cut) +
         ",\"added\":" + std::to_string(diff.added) +
         ",\"removed\":" + std::to_string(diff.removed) + "}";
}

}  // namespace machina::kinds
