// Whether a patch is good, and the result that says so.

#include <algorithm>
#include <map>
#include <set>

#include "queue/base/json.h"
#include "queue/base/utf8.h"
#include "workers/kinds/patch/patch.h"
#include "workers/kinds/suite/pytest_watch.h"

namespace machina::kinds {
namespace {

// A result is below 1 MiB: what each part of it may take.
constexpr std::size_t kFilesBytesMax = 192 << 10;
constexpr std::size_t kConflictBytesMax = 64 << 10;
constexpr std::size_t kNamesBytesMax = 64 << 10;  // each of the lists
constexpr std::size_t kBeforeBytesMax = 160 << 10;
constexpr std::size_t kAfterBytesMax = 256 << 10;
constexpr std::size_t kReasonBytesMax = 4 << 10;
constexpr std::size_t kApprovalBytesMax = 48 << 10;

constexpr char kOneCase[] =
    "the suite failed before the patch, and nothing tells its cases apart: let "
    "the command write a report and name it (test.report), or use a runner "
    "that has one";

bool fails(Outcome outcome) {
  return outcome == Outcome::failed || outcome == Outcome::error;
}
bool passes(Outcome outcome) {
  return outcome == Outcome::passed || outcome == Outcome::flaky;
}

// What one run says of one case.
struct Seen {
  Outcome body = Outcome::missing;
  bool teardown = false;  // failed
  std::string where;
};
// By id, in the order of the run.
using Table = std::map<std::string, std::vector<Seen>>;

constexpr std::uint32_t kNthMax = 1'000'000;

// `all`: or only what was to be reached and was not.
Table table_of(const TestOutcome& tests, bool all) {
  Table out;
  for (const Case& one : tests.suite.cases) {
    if (one.of_run || one.nth == 0 || one.nth > kNthMax) continue;
    const bool missing = one.outcome == Outcome::missing;
    if (!all && !missing) continue;
    auto& cases = out[one.id];
    if (cases.size() < one.nth) cases.resize(one.nth);
    Seen& seen = cases[one.nth - 1];
    if (!one.where.empty()) seen.where = one.where;
    if (missing) continue;
    // A second element of one case tells of its teardown.
    if (!fails(seen.body)) seen.body = one.body;
    seen.teardown = seen.teardown || one.teardown;
  }
  return out;
}

// Whether a line of this file defines `name`: as Python does with `word`, or in
// quotes as JavaScript does.
bool defines_in(const std::string& path, const std::string& line,
                std::string_view word, const std::string& name) {
  if (!names_tests_in_quotes(path)) return defines(line, word, name);
  for (const char quote : {'\'', '"', '`'}) {
    if (line.find(quote + name + quote) != std::string::npos) return true;
  }
  return false;
}

// Whether the patch removes the line that defines `name` there, and adds none
// that defines that name in the same file.
bool line_is_gone(const TakenAway& taken, const std::string& path,
                  std::uint64_t number, std::string_view word,
                  const std::string& name) {
  const auto gone = taken.gone.find(path);
  if (number == 0 || name.empty() || gone == taken.gone.end()) return false;
  // A call may have its name on the next line.
  const std::uint64_t last = number + names_tests_in_quotes(path);
  const auto defines_it = [&](const TakenAway::Line& line) {
    return defines_in(path, line.text, word, name);
  };
  auto at = std::lower_bound(
      gone->second.begin(), gone->second.end(), number,
      [](const auto& line, std::uint64_t n) { return line.number < n; });
  bool found = false;
  for (; at != gone->second.end() && at->number <= last; ++at) {
    found = found || defines_it(*at);
  }
  const auto come = taken.come.find(path);
  return found &&
         (come == taken.come.end() ||
          std::none_of(come->second.begin(), come->second.end(), defines_it));
}

// "tests.test_a::b" and "tests.test_a.TestB::c" are of tests/test_a.py.
bool of_module(const std::string& id, const std::string& path) {
  if (!path.ends_with(".py")) return false;
  std::string module = path.substr(0, path.size() - 3);
  std::replace(module.begin(), module.end(), '/', '.');
  return id.starts_with(module + ".") || id.starts_with(module + "::");
}

// Whether the patch removes or renames the test that defines the case. Where
// that cannot be told it is no.
bool removed_by(const TakenAway& taken, const std::string& id,
                const std::string& where, bool id_is_module) {
  const DefinedAt at = read_where(where);
  const auto file_is_gone = [&](const std::string& path) {
    return taken.files.count(path) > 0;
  };
  if (at.file.empty()) {
    return id_is_module &&
           std::any_of(taken.files.begin(), taken.files.end(),
                       [&](const auto& path) { return of_module(id, path); });
  }
  // A class that inherits its tests goes with its own line.
  return file_is_gone(at.file) || file_is_gone(at.definition) ||
         line_is_gone(taken, at.definition, at.line, "def", at.name) ||
         std::any_of(at.classes.begin(), at.classes.end(),
                     [&](const auto& outer) {
                       return line_is_gone(taken, at.file, outer.line, "class",
                                           outer.name);
                     });
}

std::string cases_text(std::size_t n, const std::string& rest_one,
                       const std::string& rest_many) {
  return std::to_string(n) +
         (n == 1 ? " case " + rest_one : " cases " + rest_many);
}

std::string text_or_null(const std::string& text) {
  if (text.empty()) return "null";
  return json::quoted(utf8_head(text, kReasonBytesMax));
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

std::string phase_json(const TestPhase* phase, bool valid,
                       std::size_t bytes_max) {
  if (phase == nullptr || !phase->ran) return "null";
  std::string out =
      test_result(phase->run.tests, phase->run.end.usage, bytes_max);
  out.pop_back();
  return out + ",\"valid\":" + flag(valid) +
         ",\"complete\":" + flag(phase->run.tests.suite.complete) +
         ",\"problem\":" +
         text_or_null(valid == phase->valid ? phase->problem : kOneCase) + "}";
}

}  // namespace

bool tells(const TestPhase& phase) {
  return phase.valid && (!phase.one_case || passed(phase.run.tests));
}

const char* report_name(const TestPhase& phase, bool after) {
  if (phase.run.tap) return after ? "report-after.tap" : "report-before.tap";
  return after ? "junit-after.xml" : "junit-before.xml";
}

std::string tests_json(const TestPhase* before, const TestPhase* after,
                       const std::vector<NamedCases>& lists) {
  if (after == nullptr || !(after->ran || before->ran)) return "null";
  std::string out =
      "{\"before\":" + phase_json(before, tells(*before), kBeforeBytesMax) +
      ",\"after\":" + phase_json(after, after->valid, kAfterBytesMax);
  for (const auto& [name, list] : lists) {
    out += std::string(",\"") + name + "\":";
    const bool cut =
        append_list(out, *list, kNamesBytesMax,
                    [&](const auto& key) { json::quote(out, shown(key)); });
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
  phase.one_case = !tells_cases(suite);
  // Below another directory nobody knows what the ids are relative to.
  phase.id_is_module = suite.runner == Runner::command &&
                       suite.report == TestPayload::Format::junit &&
                       suite.cwd.empty();
  phase.alone = suite.runner == Runner::pytest;
  phase.run = run_suite(suite, checkout, options, attempt, host);
  usage.add(phase.run.end.usage);
  const TestOutcome& tests = phase.run.tests;
  const Suite& s = tests.suite;
  switch (phase.run.end.code) {
    case EndCode::none: {
      const bool some = s.passed + s.failed + tests.flaky > 0;
      phase.valid = phase.run.reported && (some || !tests.broken);
      if (!phase.valid) {
        phase.problem = "no test ran, or no report was left";
        if (const Case* error = run_error(tests)) {
          phase.problem =
              error->id + ": " + head_and_tail(error->message, 1000);
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

std::optional<End> list_again(TestPhase& listed, const TestPayload& suite,
                              const Checkout& checkout, Millis left_ms,
                              const Attempt& attempt, Host& host,
                              Usage& usage) {
  if (!tells_cases(suite)) return std::nullopt;
  SuiteOptions options;
  options.timeout_ms = std::min(left_ms, kListMs);
  options.percent = 90;
  options.what = "listing the cases before the change again";
  options.list_only = true;
  if (auto end = run_test_phase(listed, suite, checkout, options, attempt, host,
                                usage)) {
    return end;
  }
  // A run that did not reach all of its cases is no list.
  if (suite.runner != Runner::pytest &&
      !(listed.run.reported && listed.run.tests.suite.complete)) {
    listed = TestPhase();
  }
  return std::nullopt;
}

std::string shown(const CaseKey& key) {
  return key.nth > 1 ? key.id + "#" + std::to_string(key.nth) : key.id;
}

std::set<CaseKey> failing_cases(const TestPhase& phase) {
  std::set<CaseKey> out;
  if (phase.one_case) return out;
  for (const auto& [id, cases] : table_of(phase.run.tests, true)) {
    for (std::uint32_t i = 0; i < cases.size(); ++i) {
      if (fails(cases[i].body)) out.insert({id, i + 1, false});
      if (cases[i].teardown) out.insert({id, i + 1, true});
    }
  }
  return out;
}

namespace {

// Compares what two runs say of the cases.
class Comparison {
 public:
  Comparison(const TestPhase& before, const TestPhase& after, bool baseline,
             const TakenAway& taken, Gate& gate)
      : taken_(taken), gate_(gate), id_is_module_(before.id_is_module) {
    const Table base = baseline && before.ran
                           ? table_of(before.run.tests, tells(before))
                           : Table();
    const Table now = table_of(after.run.tests, true);
    static const std::vector<Seen> kNone;
    // In the order of the run after the patch, then of the one before.
    std::set<std::string_view> seen;
    for (const TestPhase* phase : {&after, &before}) {
      for (const Case& one : phase->run.tests.suite.cases) {
        const auto then = base.find(one.id), at = now.find(one.id);
        const bool was = then != base.end(), is = at != now.end();
        if ((!was && !is) || !seen.insert(one.id).second) continue;
        if (!is) gate.only_before.push_back(one.id);
        if (!was) gate.only_after.push_back(one.id);
        compare(one.id, was ? then->second : kNone, is ? at->second : kNone);
      }
    }
  }

  std::size_t still_failing = 0, removed = 0;
  bool some_pass = false;

 private:
  void compare(const std::string& id, const std::vector<Seen>& then,
               const std::vector<Seen>& now) {
    for (const Seen& seen : now) some_pass = some_pass || passes(seen.body);
    if (then.size() == now.size() || then.empty() || now.empty()) {
      for (std::uint32_t i = 0; i < std::max(then.size(), now.size()); ++i) {
        compare_one({id, i + 1, false}, i < then.size() ? &then[i] : nullptr,
                    i < now.size() ? &now[i] : nullptr);
      }
    } else {
      compare_counts(id, then, now);
    }
  }

  void compare_one(CaseKey key, const Seen* then, const Seen* now) {
    const bool failed = then != nullptr && fails(then->body);
    if (now == nullptr || now->body == Outcome::missing) {
      if (failed) return;
      // Passed before, was not reached before, or is new and not reached.
      if (then != nullptr && then->body == Outcome::skipped) return;
      if (now == nullptr &&
          removed_by(taken_, key.id, then->where, id_is_module_)) {
        ++removed;
      } else {
        gate_.missing.push_back(key);
      }
      return;
    }
    const bool bad_teardown =
        now->teardown && !(then != nullptr && then->teardown);
    if (fails(now->body)) {
      if (failed) ++still_failing;
      if (!failed) gate_.newly_failing.push_back(key);
      if (!failed || !bad_teardown) return;
    }
    if (bad_teardown) {
      key.teardown = true;
      gate_.newly_failing.push_back(key);
    } else if (now->body == Outcome::skipped) {
      if (then != nullptr && passes(then->body)) {
        gate_.newly_failing.push_back(key);
      }
    } else if (now->teardown) {
      ++still_failing;
    } else if (failed || (then != nullptr && then->teardown)) {
      gate_.newly_passing.push_back(key);
    }
  }

  // Nobody knows which is which: more failures than before are new ones, and
  // fewer passes are missing.
  void compare_counts(const std::string& id, const std::vector<Seen>& then,
                      const std::vector<Seen>& now) {
    struct Counts {
      std::size_t fail = 0, pass = 0, teardown = 0;
    };
    const auto count = [](const std::vector<Seen>& cases, bool unknown) {
      Counts n;
      for (const Seen& one : cases) {
        n.fail += fails(one.body);
        n.pass += passes(one.body) || (unknown && one.body == Outcome::missing);
        n.teardown += one.teardown;
      }
      return n;
    };
    const Counts a = count(then, true), b = count(now, false);
    std::size_t fresh = b.fail - std::min(a.fail, b.fail);
    std::size_t teardowns = b.teardown - std::min(a.teardown, b.teardown);
    std::size_t gone = a.pass - std::min(a.pass, b.pass);
    gone -= std::min(gone, fresh);
    still_failing += std::min(a.fail, b.fail);
    for (std::uint32_t i = 0; i < now.size(); ++i) {
      if (now[i].body == Outcome::missing) {
        gate_.missing.push_back({id, i + 1, false});
        gone -= gone > 0;
      }
    }
    for (auto i = static_cast<std::uint32_t>(now.size()); i > 0; --i) {
      if (fresh > 0 && fails(now[i - 1].body)) {
        --fresh;
        gate_.newly_failing.push_back({id, i, false});
      } else if (teardowns > 0 && now[i - 1].teardown) {
        --teardowns;
        gate_.newly_failing.push_back({id, i, true});
      }
    }
    if (gone > 0 && removed_by(taken_, id, then.back().where, id_is_module_)) {
      removed += gone;
      return;
    }
    for (std::size_t i = 0; i < gone; ++i) {
      gate_.missing.push_back(
          {id, static_cast<std::uint32_t>(now.size() + i + 1), false});
    }
  }

  const TakenAway& taken_;
  Gate& gate_;
  const bool id_is_module_;
};

std::vector<std::string> shown_all(const std::vector<CaseKey>& keys) {
  std::vector<std::string> out;
  out.reserve(keys.size());
  for (const CaseKey& key : keys) out.push_back(shown(key));
  return out;
}

// With every word that has a digit in it as "#": what is left of an id where
// addresses, numbers and times are taken out.
std::string without_numbers(std::string_view id) {
  const auto of_word = [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
           (c >= 'A' && c <= 'Z');
  };
  std::string out;
  while (!id.empty()) {
    std::size_t n = 0;
    while (n < id.size() && of_word(id[n])) ++n;
    const std::string_view word = id.substr(0, std::max<std::size_t>(n, 1));
    const bool digits =
        word.find_first_of("0123456789") != std::string_view::npos;
    out += digits ? "#" : std::string(word);
    id.remove_prefix(word.size());
  }
  return out;
}

}  // namespace

bool newly_fails(const TestPhase& before, const TestOutcome& after) {
  TestPhase now;
  now.run.tests = after;
  Gate gate;
  const TakenAway nothing;
  const Comparison compared(before, now, true, nothing, gate);
  // What is skipped now is no failure that another run could mend.
  const std::set<CaseKey> failing = failing_cases(now);
  return std::any_of(
      gate.newly_failing.begin(), gate.newly_failing.end(),
      [&](const CaseKey& key) { return failing.count(key) > 0; });
}

bool ids_may_change(const Gate& gate) {
  return !gate.accepted && !gate.only_before.empty() &&
         !gate.only_after.empty() &&
         (!gate.missing.empty() || !gate.newly_failing.empty());
}

std::string changing_ids(const Gate& gate, const TestPhase* listed) {
  std::vector<std::string> changing;
  const bool proven = listed != nullptr &&
                      listed->run.end.code == EndCode::none &&
                      !listed->run.tests.suite.cases.empty();
  if (proven) {
    const Table again = table_of(listed->run.tests, true);
    for (const std::string& id : gate.only_before) {
      if (again.count(id) == 0) changing.push_back(id);
    }
  } else {
    std::map<std::string, std::string> after;
    for (const std::string& id : gate.only_after) {
      after.emplace(without_numbers(id), id);
    }
    for (const std::string& id : gate.only_before) {
      const auto at = after.find(without_numbers(id));
      if (at == after.end()) continue;
      changing.push_back(id);
      changing.push_back(at->second);
    }
  }
  if (changing.empty()) return "";
  return (proven ? "ids of cases change from run to run, also without the "
                   "patch, and so cannot be compared: "
                 : "ids of cases may change from run to run (some before and "
                   "after the patch differ in numbers alone), and then cannot "
                   "be compared: ") +
         some_ids(changing) +
         "; give these cases ids that stay (in pytest: ids=... of parametrize)";
}

void note_changing_ids(Gate& gate, const TestPhase& listed) {
  const std::string why = changing_ids(gate, listed.ran ? &listed : nullptr);
  if (!why.empty()) gate.reason = why + "; " + gate.reason;
}

std::string flaky_note(const TestPhase& after) {
  std::vector<std::string> flaky;
  for (const Case& one : after.run.tests.suite.cases) {
    if (one.outcome != Outcome::flaky) continue;
    flaky.push_back(shown({one.id, one.nth, false}));
  }
  if (flaky.empty()) return "";
  return cases_text(flaky.size(), "failed and passed when it was run again",
                    "failed and passed when they were run again") +
         (after.alone ? " without the others: " : ": ") + some_ids(flaky);
}

Gate judge_patch(const TestPhase& before, const TestPhase& after, bool baseline,
                 const TakenAway& taken) {
  Gate gate;
  const bool known = baseline && tells(before);
  const Comparison compared(before, after, baseline, taken, gate);
  const TestOutcome& tests = after.run.tests;
  const auto note = [&gate](const std::string& what) {
    gate.reason += (gate.reason.empty() ? "" : "; ") + what;
  };
  const auto error_of = [](const TestOutcome& run) {
    const Case* error = run_error(run);
    if (error == nullptr) return std::string("it is not known to be complete");
    return error->id + " " +
           error->message.substr(0, error->message.find('\n'));
  };
  const std::size_t dropped =
      tests.suite.dropped + (known ? before.run.tests.suite.dropped : 0);
  const bool whole = after.valid && !tests.broken && tests.suite.complete;
  gate.accepted = whole && dropped == 0 && gate.newly_failing.empty() &&
                  gate.missing.empty();
  if (!after.valid) {
    note("the tests gave no verdict after the patch: " + after.problem);
  } else {
    if (!gate.newly_failing.empty()) {
      note(known ? cases_text(gate.newly_failing.size(),
                              "fails or is skipped, and did not fail before",
                              "fail or are skipped, and did not fail before")
                 : cases_text(gate.newly_failing.size(), "fails", "fail"));
    }
    if (!gate.missing.empty()) {
      note(cases_text(gate.missing.size(), "is", "are") +
           " missing after the patch, and the diff does not remove " +
           (gate.missing.size() == 1 ? "it: " : "them: ") +
           some_ids(shown_all(gate.missing)));
    }
    if (!whole) {
      note("the tests gave no whole verdict after the patch: " +
           error_of(tests));
    }
    if (dropped > 0) {
      note(std::to_string(dropped) +
           " cases more than can be compared: run fewer with `select`");
    }
  }
  if (const std::string flaky = flaky_note(after);
      gate.accepted && !flaky.empty()) {
    note(flaky);
  }
  if (gate.accepted && compared.still_failing > 0) {
    // Accepted, and no praise: these say nothing about the patch.
    note(cases_text(compared.still_failing, "failed before and still fails",
                    "failed before and still fail") +
         (compared.some_pass ? "" : ", and none passes"));
  }
  if (gate.accepted && compared.removed > 0) {
    note(cases_text(compared.removed,
                    "that passed before is removed or renamed by the diff",
                    "that passed before are removed or renamed by the diff"));
  }
  if (baseline && !known) {
    note(before.valid
             ? kOneCase
             : "the tests gave no verdict before the patch: " + before.problem);
  } else if (baseline && before.ran &&
             (before.run.tests.broken || !before.run.tests.suite.complete)) {
    note(
        "the tests gave no whole verdict before the patch (what was not "
        "reached then excuses nothing): " +
        error_of(before.run.tests));
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
                     {"newly_passing", &report.gate.newly_passing},
                     {"missing", &report.gate.missing}});
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
