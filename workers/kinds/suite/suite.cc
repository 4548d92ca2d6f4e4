#include "workers/kinds/suite/suite.h"

#include <algorithm>
#include <chrono>

#include "queue/base/hex.h"
#include "queue/base/utf8.h"
#include "workers/kinds/fields.h"
#include "workers/kinds/suite/pytest_watch.h"
#include "workers/kinds/suite/tap.h"

namespace machina::kinds {
namespace {

constexpr std::size_t kSetupMax = 16;
constexpr int kRetriesMax = 10;
constexpr char kOwnDir[] = ".machina/";  // below /work, beside the check-out
constexpr std::size_t kOutputTailBytes = 1500;  // of a message

void refuse_later_features(Fields& fields) {
  if (fields.has("scenario")) {
    fields.fail("scenario", "scenarios are not available yet");
  }
  if (fields.has("severity")) {
    fields.fail("severity", "belongs to scenario, which is not available yet");
  }
  if (fields.flag("coverage", false)) {
    fields.fail("coverage", "true is not available yet; false is");
  }
}

Runner runner_of(Fields& fields) {
  const std::string runner = fields.text("runner", 64, "pytest");
  if (const auto known = runner_named(runner)) return *known;
  fields.fail("runner",
              "\"" + printable(runner) + "\" is none of " + all_runners());
  return Runner::pytest;
}

void read_report_member(Fields& fields, TestPayload& out) {
  if (!fields.has("report")) return;
  if (out.runner != Runner::command) {
    return fields.fail("report", "belongs to the runner command; " +
                                     std::string(name(out.runner)) +
                                     " has a report of its own");
  }
  Fields report = fields.object("report");
  report.only({"format", "path"});
  const std::string format = report.text("format", 64);
  if (format == "junit") out.report = TestPayload::Format::junit;
  if (format == "tap") out.report = TestPayload::Format::tap;
  if (out.report == TestPayload::Format::none) {
    report.fail("format",
                "\"" + printable(format) + "\" is neither junit nor tap");
  }
  out.report_path = report.text("path", kPathBytesMax);
  const bool plain =
      std::none_of(out.report_path.begin(), out.report_path.end(),
                   [](unsigned char c) { return c < ' ' || c == 0x7F; });
  if (!plain || !safe_relative_path(out.report_path)) {
    report.fail("path", "\"" + printable(out.report_path) +
                            "\" is not the path of a file below the top of "
                            "the work tree: relative, without . and .. and "
                            "control characters, at most 1024 bytes");
  }
  fields.take_error(report);
}

}  // namespace

std::string read_base_rev(Fields& fields) {
  std::string rev = fields.text("base_rev", 256, "HEAD");
  const bool good = !rev.empty() && rev[0] != '-' && rev[0] != '^' &&
                    std::none_of(rev.begin(), rev.end(), [](unsigned char c) {
                      return c <= ' ' || c == 0x7F;
                    });
  if (!good) {
    fields.fail("base_rev",
                "\"" + printable(rev) +
                    "\" is no revision: a branch, a tag or a commit, without "
                    "spaces and control characters, not beginning with - or ^");
  }
  return rev;
}

void read_test_member(Fields& fields, TestPayload& out) {
  fields.only({"cwd", "runner", "args", "command", "report", "env", "setup",
               "select", "scenario", "severity", "retries", "coverage"});
  read_suite(fields, out);
}

void read_suite(Fields& fields, TestPayload& out) {
  refuse_later_features(fields);
  out.cwd = directory(fields, "cwd");
  out.runner = runner_of(fields);
  out.args = fields.texts("args", kArgumentsMax, kArgumentBytesMax);
  out.command = fields.texts("command", kArgumentsMax, kArgumentBytesMax);
  out.env = environment(fields, "env");
  out.setup = fields.commands("setup", kSetupMax);
  out.select = fields.texts("select", kArgumentsMax, kArgumentBytesMax);
  out.retries = static_cast<int>(fields.number("retries", 0, kRetriesMax, 0));
  for (const std::string& id : out.select) {
    if (id.empty() || id[0] == '-') {
      fields.fail("select", "\"" + id + "\" is an option, not a test");
    }
  }
  const bool command =
      out.runner == Runner::command || out.runner == Runner::tap;
  if (command && (out.command.empty() || out.command[0].empty())) {
    fields.fail("command", "the runner " + std::string(name(out.runner)) +
                               " needs a program to run");
  }
  if (!command && fields.has("command")) {
    fields.fail("command", "belongs to the runners command and tap");
  }
  for (const char* member : {"args", "select"}) {
    if (command && fields.has(member)) {
      fields.fail(member,
                  "belongs to the runners pytest, unittest, ctest and "
                  "node; the arguments of a command are its own");
    }
  }
  for (std::size_t i = 0; i < out.args.size(); ++i) {
    const std::string why = argument_problem(out.runner, out.args[i]);
    if (!why.empty()) {
      fields.fail("args[" + std::to_string(i) + "]",
                  "\"" + printable(out.args[i]) + "\" " + why);
    }
  }
  read_report_member(fields, out);
  if (out.report != TestPayload::Format::none) {
    const std::string why = command_problem(out.command);
    if (!why.empty()) fields.fail("command", why);
  }
}

namespace {

using Clock = std::chrono::steady_clock;

constexpr Millis kParseMs = 20'000;
constexpr Millis kParseAfterEndMs = 3'000;  // when the run's time is over
constexpr std::string_view kPythonPath = "PYTHONPATH=";

class SuiteRunner {
 public:
  SuiteRunner(const TestPayload& payload, const Checkout& checkout,
              const SuiteOptions& options, const Attempt& attempt, Host& host)
      : payload_(payload),
        checkout_(checkout),
        options_(options),
        attempt_(attempt),
        host_(host),
        deadline_(Clock::now() +
                  std::chrono::milliseconds(options.timeout_ms)) {}

  SuiteRun run() {
    sandbox::SessionSpec spec;
    spec.limits = attempt_.limits;
    spec.min_level = attempt_.required;
    spec.mirror = checkout_.mirror;
    auto session = host_.open(spec);
    if (!session) {
      run_.end = failed(EndCode::sandbox, session.error().what);
      return std::move(run_);
    }
    session_ = std::move(*session);
    End end = fill_workspace();
    run_.started = end.code == EndCode::none;
    if (end.code == EndCode::none) end = run_setup();
    if (end.code == EndCode::none && !setup_failed_) end = run_runner();
    session_.reset();  // proven empty before anyone hears of the end
    end.usage = usage_;
    run_.end = std::move(end);
    return std::move(run_);
  }

 private:
  Millis left() const {
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(
                        deadline_ - Clock::now())
                        .count();
    return std::max<Millis>(1, ms);
  }

  // --- steps ---

  sandbox::StepResult step(sandbox::Step step, bool shown) {
    step.timeout_ms = left();
    sandbox::Watch watch = host_.watch();
    if (!shown) watch.on_output = nullptr;
    sandbox::StepResult ran = session_->run(step, watch);
    usage_.add(ran);
    if (shown) run_.output += ran.out + ran.err;
    return ran;
  }

  sandbox::Step project_step(std::vector<std::string> argv) const {
    sandbox::Step step;
    step.argv = std::move(argv);
    step.cwd = "/work/repo";
    if (!payload_.cwd.empty()) step.cwd += "/" + payload_.cwd;
    step.env = payload_.env;
    for (auto& variable : trace_variables(attempt_)) {
      step.env.push_back(std::move(variable));
    }
    step.merge_stderr = true;
    return step;
  }

  // What a step that did not exit by itself makes of the attempt.
  End ended(const sandbox::StepResult& ran, const std::string& what) {
    const EndCode code = code_of(ran.ended);
    if (code == EndCode::none) return {};
    run_.tests.timed_out = code == EndCode::timeout;
    return failed(
        code,
        what + ": " + describe(ran, attempt_.limits, options_.timeout_ms));
  }

  End fill_workspace() {
    if (!checkout_.commit.empty()) {
      if (!checkout_.pack.empty()) {
        if (auto put = session_->put(kPackFile, checkout_.pack); !put) {
          return failed(code_of_put(put.error()),
                        "check-out: " + put.error().what);
        }
      }
      const auto ran = step(checkout_step(checkout_), false);
      if (End end = ended(ran, "check-out"); end.code != EndCode::none) {
        return end;
      }
      if (ran.exit_code == 0) return {};
      return failed(code_of_git(ran), "check-out: git exited with " +
                                          std::to_string(ran.exit_code) + ": " +
                                          head_and_tail(ran.err, 500));
    }
    for (const auto& [path, text] : payload_.files) {
      if (auto put = session_->put("repo/" + path, text); !put) {
        return failed(code_of_put(put.error()),
                      "files." + path + ": " + put.error().what);
      }
    }
    return {};
  }

  End run_setup() {
    for (std::size_t i = 0; i < payload_.setup.size(); ++i) {
      const std::string what = "setup[" + std::to_string(i) + "]";
      host_.progress(options_.percent, what);
      const auto ran = step(project_step(payload_.setup[i]), true);
      if (End end = ended(ran, what); end.code != EndCode::none) return end;
      if (ran.exit_code != 0) {
        add_error(tests_, what,
                  "exited with " + std::to_string(ran.exit_code) + "\n" +
                      tail(ran.out));
        setup_failed_ = true;
        return {};
      }
    }
    return {};
  }

  End run_runner() {
    host_.progress(options_.percent, options_.what);
    if (payload_.runner == Runner::pytest) return run_pytest();
    if (tells_cases(payload_)) return run_reported();
    return options_.list_only ? End{} : run_command();
  }

  // --- a runner that leaves a report ---

  std::string who() const { return std::string(name(payload_.runner)); }

  End run_reported() {
    run_.tap = payload_.runner == Runner::tap ||
               payload_.report == TestPayload::Format::tap;
    sandbox::StepResult ran;
    auto suite = reported_once(ran);
    if (End end = ended(ran, who()); end.code != EndCode::none) return end;
    if (!suite) {
      add_error(tests_, who(), suite.error().what + "\n" + tail(said(ran)));
      return {};
    }
    run_.reported = true;
    tests_.suite = std::move(*suite);
    const std::string contrary = contradiction(tests_.suite, ran);
    const std::string lost = unreached(tests_.suite);
    for (int i = 0; i < options_.retries && again(); ++i) {
      host_.progress(90, "running the suite again");
      sandbox::StepResult again;
      suite = reported_once(again);
      if (End end = ended(again, who()); end.code != EndCode::none) return end;
      // It is judged as the first run is: one that crashed says nothing.
      if (suite && contradiction(*suite, again).empty() &&
          unreached(*suite).empty()) {
        merge_rerun(tests_, *suite);
      }
    }
    if (contrary.empty() && lost.empty()) return {};
    add_error(tests_, who(),
              (contrary.empty() ? lost : contrary) + "\n" + tail(said(ran)));
    tests_.suite.complete = false;
    run_.reported = contrary.empty();
    return {};
  }

  // The report and the exit code have to say the same. Empty: they do.
  std::string contradiction(const Suite& s,
                            const sandbox::StepResult& ran) const {
    const bool failing = s.failed + s.errors > 0;
    const std::string exited = "exited with " + std::to_string(ran.exit_code);
    if (payload_.runner == Runner::unittest && ran.exit_code == 2) {
      return "the run stopped before all of its cases had run";
    }
    if (!failing && s.passed == 0) return exited + ", and no test ran";
    if (ran.exit_code != 0 && !failing) {
      return exited + ", though its report has no failure";
    }
    if (ran.exit_code == 0 && failing) {
      return exited + ", though its report has failures";
    }
    return "";
  }

  // Of a runner that tells what there is to run: what it did not come to.
  std::string unreached(const Suite& s) const {
    if (payload_.runner == Runner::ctest) {
      if (!unknown_.empty()) {
        return "select: no test is named " + some_ids(unknown_);
      }
      if (s.missing > 0) return "ended before it reached " + missing_in(s);
      if (!s.complete) return "gave no whole list of its tests (ctest -N)";
    }
    if (payload_.runner == Runner::node) {
      std::vector<std::string> files;
      for (const Case& one : s.cases) {
        if (one.outcome == Outcome::error && one.id.ends_with(kNodeFile)) {
          files.push_back(one.id.substr(0, one.id.size() - kNodeFile.size()));
        }
      }
      if (!files.empty()) {
        return "which tests there are is not known of " + some_ids(files);
      }
    }
    return "";
  }

  static std::string missing_in(const Suite& s) {
    std::vector<std::string> ids;
    for (const Case& one : s.cases) {
      if (one.outcome == Outcome::missing) ids.push_back(one.id);
    }
    return std::to_string(s.missing) +
           (s.missing == 1 ? " case: " : " cases: ") + some_ids(ids);
  }

  // The tests that ctest is about to run: a preset may end the run at the
  // first failure, and the report does not say so.
  Result<Suite> list_ctest() {
    sandbox::Step list = project_step({"/bin/sh", "-c", kListCtest, "list"});
    const auto argv = ctest_list(payload_.args, payload_.select);
    list.argv.insert(list.argv.end(), argv.begin(), argv.end());
    list.merge_stderr = false;
    const auto ran = step(std::move(list), false);
    if (ran.ended != sandbox::Ended::exited || ran.truncated) {
      return Error{Code::unavailable, "it did not end by itself"};
    }
    auto record = parse(ran.out, false, kParseMs);
    unknown_.clear();
    if (!record) return record;
    // A preset may make ctest quiet.
    if (record->skipped == 0) return Error{Code::invalid, "it is empty"};
    for (const std::string& name : payload_.select) {
      const bool there =
          record->dropped > 0 ||
          std::any_of(record->cases.begin(), record->cases.end(),
                      [&](const Case& one) {
                        return one.id == utf8_head(name, kCaseIdBytesMax);
                      });
      if (!there) unknown_.push_back(name);
    }
    return record;
  }

  // One run, from an empty place for its report to what the report says.
  Result<Suite> reported_once(sandbox::StepResult& ran) {
    const bool theirs = payload_.runner == Runner::command;
    const bool from_file = payload_.runner != Runner::tap;
    const std::string report = theirs ? "repo/" + payload_.report_path
                                      : kOwnDir + random_hex(32) + ".xml";
    RunnerCall call;
    if (theirs || !from_file) {
      call.argv = payload_.command;
    } else {
      call = call_runner(payload_.runner, payload_.args, payload_.select,
                         "/work/" + report, kOwnDir + random_hex(32) + ".cjs");
    }
    // What was there before the run is not its report; a name that nobody knows
    // needs its directory alone.
    ran.ended = sandbox::Ended::exited;
    if (theirs && !clear(report)) {
      return Error{Code::invalid, "what lies at the report's place, " +
                                      payload_.report_path +
                                      ", cannot be removed before the run"};
    }
    if (!theirs && from_file) {
      if (call.file.empty()) call.file = kOwnDir + random_hex(32);
      if (auto put = session_->put(call.file, call.file_text); !put) {
        ran.ended = put.error().code == Code::full ? sandbox::Ended::disk
                                                   : sandbox::Ended::failed;
        ran.detail = put.error().what;
        return put.error();
      }
    }
    Result<Suite> record = Error{Code::not_found, "there is no list"};
    if (payload_.runner == Runner::ctest) record = list_ctest();
    sandbox::Step one = project_step(call.argv);
    one.stdin_data = std::move(call.stdin_data);
    one.merge_stderr = from_file;
    ran = step(std::move(one), true);
    tests_.duration_ms += ran.wall_ms;
    if (ran.ended != sandbox::Ended::exited) {
      return Error{Code::unavailable, "it did not end by itself"};
    }
    const std::string exited = "exited with " + std::to_string(ran.exit_code);
    if (not_there(ran)) {
      return Error{Code::not_found,
                   what_to_install(payload_.runner, call.argv[0])};
    }
    if (!from_file && ran.truncated) {
      return Error{Code::too_large,
                   exited +
                       ", and its output, which is the report, is longer "
                       "than output_bytes"};
    }
    auto text = from_file ? session_->collect(report, kJunitXmlBytesMax)
                          : Result<std::string>(ran.out);
    if (!text) {
      return Error{Code::invalid,
                   exited + " and left no report (" + text.error().what + ")"};
    }
    auto suite = parse(*text, run_.tap, kParseMs);
    if (run_.report.empty()) run_.report = std::move(*text);
    if (!suite) {
      return Error{
          suite.error().code,
          exited + "; its report is not accepted: " + suite.error().what};
    }
    if (payload_.runner == Runner::unittest ||
        payload_.runner == Runner::node) {
      const auto places = read_xml(places_of(report), nullptr, kParseMs);
      if (places) place_cases(*suite, *places);
    }
    suite->complete = payload_.runner != Runner::ctest && suite->dropped == 0;
    if (record) expect_cases(*suite, *record);
    return suite;
  }

  // The program to run is not in the sandbox.
  static bool not_there(const sandbox::StepResult& ran) {
    return ran.exit_code == 127 && !ran.detail.empty();
  }

  // What the run printed, on both streams.
  static std::string said(const sandbox::StepResult& ran) {
    return ran.err.empty() ? ran.out : ran.out + "\n" + ran.err;
  }

  // Whether nothing is left at a path below /work. It runs as the job may.
  bool clear(const std::string& path) {
    sandbox::Step remove;
    remove.argv = {"/bin/rm", "-f", "--", "/work/" + path};
    const auto ran = step(std::move(remove), false);
    return ran.ended == sandbox::Ended::exited && ran.exit_code == 0;
  }

  // --- pytest ---

  // What one run writes, below /work. Fresh names for each run: nothing that
  // was there before it can be taken for its own.
  struct Paths {
    std::string report = kOwnDir + random_hex(32) + ".xml";
    std::string record = kOwnDir + random_hex(32) + ".xml";
    std::string dir = kOwnDir + random_hex(32);
    std::string module = "machina_" + random_hex(32);
  };

  std::vector<std::string> pytest_argv(const Paths& paths, bool again) const {
    std::vector<std::string> argv = {"python3", "-m", "pytest", "-p",
                                     paths.module};
    // What pytest remembers of failures lies outside of the check-out, where
    // nothing can have been committed.
    argv.insert(argv.end(), {"-o", "cache_dir=/work/" + cache_});
    if (again) {
      argv.insert(argv.end(),
                  {"--last-failed", "--last-failed-no-failures=none"});
    }
    // Of an option that is given twice the last counts. Behind "--" there are
    // no options.
    const auto dashes =
        std::find(payload_.args.begin(), payload_.args.end(), "--");
    argv.insert(argv.end(), payload_.args.begin(), dashes);
    argv.push_back("--junitxml=/work/" + paths.report);
    if (options_.list_only) {
      argv.insert(argv.end(), {"--collect-only", "-q"});
    }
    // Also where `args` put it away: without it nothing runs again.
    if (options_.retries > 0) {
      argv.insert(argv.end(), {"-p", "cacheprovider"});
    }
    argv.insert(argv.end(), dashes, payload_.args.end());
    argv.insert(argv.end(), payload_.select.begin(), payload_.select.end());
    return argv;
  }

  End run_pytest() {
    Paths paths;
    sandbox::StepResult ran;
    std::string why;
    auto suite = pytest_once(paths, false, ran, why);
    const auto not_put = [&] {
      return failed(
          suite.error().code == Code::full ? EndCode::disk : EndCode::sandbox,
          "pytest: " + why);
    };
    if (!why.empty()) return not_put();
    End end = ended(ran, "pytest");
    if (end.code == EndCode::cancelled) return end;
    const bool at_end = end.code != EndCode::none;
    if (suite) {
      run_.reported = true;
      tests_.suite = std::move(*suite);
    }
    // Also of a run that was killed: what it was to reach is not known to pass.
    const auto record =
        read_xml(paths.record, nullptr, at_end ? kParseAfterEndMs : kParseMs);
    if (record) expect_cases(tests_.suite, *record);
    if (at_end || options_.list_only) return end;
    if (!run_.reported) {
      const bool missing =
          not_there(ran) ||
          ran.out.find("No module named pytest") != std::string::npos;
      add_error(tests_, "pytest",
                "exited with " + std::to_string(ran.exit_code) +
                    " and left no report (" + suite.error().what + ")\n" +
                    (missing ? what_to_install(Runner::pytest, "pytest") + "\n"
                             : "") +
                    tail(ran.out));
      return {};
    }
    const std::string what = doubt(tests_.suite, ran, record.has_value());
    for (int i = 0; i < options_.retries && again(); ++i) {
      host_.progress(90, "running what failed again");
      sandbox::StepResult again;
      const Paths others;
      suite = pytest_once(others, true, again, why);
      if (!why.empty()) return not_put();
      end = ended(again, "pytest");
      if (end.code != EndCode::none) return end;
      if (!suite) continue;
      // It is judged as the first run is: one that crashed says nothing.
      const auto list = read_xml(others.record, nullptr, kParseMs);
      if (list) expect_cases(*suite, *list);
      if (doubt(*suite, again, list.has_value()).empty()) {
        merge_rerun(tests_, *suite);
      }
    }
    if (!what.empty()) add_error(tests_, "pytest", what + "\n" + tail(ran.out));
    return {};
  }

  // What the report does not explain; or empty.
  static std::string doubt(const Suite& s, const sandbox::StepResult& ran,
                           bool listed) {
    const bool failures = s.failed + s.errors > 0;
    const bool ran_some = failures || s.passed > 0;
    std::string what;
    if (ran.exit_code != (failures ? 1 : 0) || !ran_some) {
      what = "exited with " + std::to_string(ran.exit_code);
      if (!ran_some) {
        what += s.skipped > 0 ? ", and no test ran: all were skipped"
                              : ", and no test ran";
      } else if (ran.exit_code == 0) {
        what += ", though its report has failures";
      } else if (ran.exit_code == 1) {
        what += ", though its report has no failure";
      }
    }
    if (s.missing > 0) {
      what += (what.empty() ? "ended before it reached " : "; did not reach ") +
              missing_in(s);
    } else if (!s.complete) {
      what += std::string(what.empty() ? "left" : "; left") +
              (listed ? " more cases than can be compared"
                      : " no list of the cases that it was to reach");
    }
    return what;
  }

  // `why`: not empty where Machina's own part could not be put in place.
  Result<Suite> pytest_once(const Paths& paths, bool again,
                            sandbox::StepResult& ran, std::string& why) {
    if (auto put = session_->put(paths.dir + "/" + paths.module + ".py",
                                 pytest_watch("/work/" + paths.record));
        !put) {
      why = put.error().what;
      return put.error();
    }
    sandbox::Step run = project_step(pytest_argv(paths, again));
    const std::string dir = "/work/" + paths.dir;
    const auto theirs = std::find_if(
        run.env.rbegin(), run.env.rend(),
        [](const auto& variable) { return variable.starts_with(kPythonPath); });
    if (theirs == run.env.rend()) {
      run.env.push_back(std::string(kPythonPath) + dir);
    } else {
      *theirs += (theirs->size() > kPythonPath.size() ? ":" : "") + dir;
    }
    ran = step(std::move(run), true);
    tests_.duration_ms += ran.wall_ms;
    if (ran.ended != sandbox::Ended::exited) {
      return Error{Code::unavailable, "it did not end by itself"};
    }
    return read_xml(paths.report, run_.report.empty() ? &run_.report : nullptr,
                    kParseMs);
  }

  bool again() const {
    // What was not reached does not run again: it did not fail.
    return options_.again ? options_.again(tests_)
                          : tests_.suite.failed + tests_.suite.errors > 0;
  }

  // The parser runs in this session too: the tree that wrote the file is
  // dead, and the handler can reach no more than that tree could.
  Result<Suite> read_xml(const std::string& path, std::string* keep,
                         Millis timeout_ms) {
    auto xml = session_->collect(path, kJunitXmlBytesMax);
    if (!xml) return xml.error();
    auto suite = parse(*xml, false, timeout_ms);
    if (keep != nullptr) *keep = std::move(*xml);
    return suite;
  }

  Result<Suite> parse(const std::string& text, bool tap, Millis timeout_ms) {
    sandbox::Step reader;
    reader.builtin = tap ? kTapHandler : kJunitHandler;
    auto socket = session_->start_service(reader);
    if (!socket) return socket.error();
    auto suite = ask_junit(*socket, text, static_cast<int>(timeout_ms));
    (void)session_->wait_service(timeout_ms);
    return suite;
  }

  // --- command ---

  End run_command() {
    sandbox::StepResult ran;
    const auto report = [&](Outcome outcome) {
      Case one;
      one.id = "command";
      one.outcome = outcome;
      one.duration_ms = static_cast<std::uint32_t>(ran.wall_ms);
      if (outcome == Outcome::failed) {
        one.message = "exited with " + std::to_string(ran.exit_code) + "\n" +
                      tail(ran.out);
        if (not_there(ran)) {
          one.message = what_to_install(Runner::command, payload_.command[0]) +
                        "\n" + one.message;
        }
      }
      one.body = outcome;
      tests_.suite.cases.assign(1, std::move(one));
      tests_.suite.complete = true;  // one case, and it was reached
      tests_.suite.passed = outcome == Outcome::passed ? 1 : 0;
      tests_.suite.failed = outcome == Outcome::failed ? 1 : 0;
      tests_.flaky = outcome == Outcome::flaky ? 1 : 0;
    };
    for (int i = 0; i == 0 || (i <= options_.retries && again()); ++i) {
      ran = step(project_step(payload_.command), true);
      tests_.duration_ms += ran.wall_ms;
      if (End end = ended(ran, "command"); end.code != EndCode::none) {
        return end;
      }
      run_.reported = true;
      if (ran.exit_code == 0) {
        report(i == 0 ? Outcome::passed : Outcome::flaky);
        return {};
      }
      report(Outcome::failed);
    }
    return {};
  }

  static std::string tail(const std::string& text) {
    return text.size() <= kOutputTailBytes
               ? text
               : "..." + std::string(utf8_tail(text, kOutputTailBytes));
  }

  const TestPayload& payload_;
  const Checkout& checkout_;
  const SuiteOptions& options_;
  const Attempt& attempt_;
  Host& host_;
  const Clock::time_point deadline_;
  std::unique_ptr<sandbox::Session> session_;
  SuiteRun run_;
  TestOutcome& tests_ = run_.tests;
  Usage usage_;
  const std::string cache_ = kOwnDir + random_hex(32);
  std::vector<std::string> unknown_;  // of `select`, not in ctest's list
  bool setup_failed_ = false;
};

}  // namespace

SuiteRun run_suite(const TestPayload& payload, const Checkout& checkout,
                   const SuiteOptions& options, const Attempt& attempt,
                   Host& host) {
  return SuiteRunner(payload, checkout, options, attempt, host).run();
}

}  // namespace machina::kinds
