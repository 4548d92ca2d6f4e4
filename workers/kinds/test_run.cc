#include "workers/kinds/test_run.h"

#include <algorithm>
#include <chrono>

#include "workers/kinds/fields.h"

namespace machina::kinds {
namespace {

constexpr std::size_t kSetupMax = 16;
constexpr int kRetriesMax = 10;
constexpr char kReport[] = ".machina/junit.xml";  // below /work
constexpr std::size_t kOutputTailBytes = 1500;    // of a message
constexpr char kNoHttps[] =
    "https repositories need the network, which is not available yet; use a "
    "path or a name below a repository root";

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

TestPayload::Runner runner_of(Fields& fields) {
  const std::string runner = fields.text("runner", 64, "pytest");
  if (runner == "pytest") return TestPayload::Runner::pytest;
  if (runner == "command") return TestPayload::Runner::command;
  if (runner == "unittest" || runner == "ctest" || runner == "node" ||
      runner == "tap") {
    fields.fail(
        "runner",
        "\"" + runner + "\" is not available yet; pytest and command are");
  } else {
    fields.fail("runner", "\"" + runner +
                              "\" is none of pytest, unittest, ctest, node, "
                              "tap, command");
  }
  return TestPayload::Runner::pytest;
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
  const bool command = out.runner == TestPayload::Runner::command;
  if (command && (out.command.empty() || out.command[0].empty())) {
    fields.fail("command", "the command runner needs one");
  }
  if (!command && fields.has("command")) {
    fields.fail("command", "belongs to the runner command");
  }
  for (const char* name : {"args", "select"}) {
    if (command && fields.has(name)) {
      fields.fail(name, "belongs to the runner pytest");
    }
  }
}

Result<TestPayload> parse_test(const std::string& payload,
                               const KindSettings& settings) {
  Fields fields(payload);
  fields.only({"repo", "files", "base_rev", "cwd", "runner", "args", "command",
               "env", "setup", "select", "scenario", "severity", "retries",
               "coverage"});
  TestPayload out;
  if (fields.text("repo", kPathBytesMax).starts_with("https:")) {
    fields.fail("repo", kNoHttps);
  }
  out.repo = fields.text("repo", kPathBytesMax);
  out.files = files(fields, "files");
  out.base_rev = read_base_rev(fields);
  read_suite(fields, out);
  if (fields.has("repo") == fields.has("files")) {
    fields.fail("repo", "exactly one of repo and files is needed");
  }
  if (fields.has("files") && out.files.empty()) {
    fields.fail("files", "is empty");
  }
  if (fields.has("base_rev") && fields.has("files")) {
    fields.fail("base_rev", "belongs to repo");
  }
  if (auto good = fields.done(); !good) return good.error();
  if (!out.repo.empty() && repo_candidates(out.repo, settings).empty()) {
    return Error{Code::invalid,
                 "repo: \"" + out.repo.substr(0, 200) +
                     "\" is not below one of the repository roots"};
  }
  return out;
}

namespace {

using Clock = std::chrono::steady_clock;

constexpr Millis kParseMs = 20'000;

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
    if (shown) run_.output += ran.out;
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
      return failed(code_of_git(ran.err), "check-out: git exited with " +
                                              std::to_string(ran.exit_code) +
                                              ": " +
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
    return payload_.runner == TestPayload::Runner::pytest ? run_pytest()
                                                          : run_command();
  }

  // --- pytest ---

  std::vector<std::string> pytest_argv(bool again) const {
    std::vector<std::string> argv = {
        "python3", "-m", "pytest", std::string("--junitxml=/work/") + kReport};
    if (options_.retries == 0) {
      argv.insert(argv.end(), {"-p", "no:cacheprovider"});
    } else {
      // pytest itself remembers what failed, outside the check-out.
      argv.insert(argv.end(), {"-o", "cache_dir=/work/.machina/cache"});
      if (again) {
        argv.insert(argv.end(),
                    {"--last-failed", "--last-failed-no-failures=none"});
      }
    }
    argv.insert(argv.end(), payload_.args.begin(), payload_.args.end());
    // Also where `args` put it away: without it nothing runs again.
    if (options_.retries > 0) {
      argv.insert(argv.end(), {"-p", "cacheprovider"});
    }
    argv.insert(argv.end(), payload_.select.begin(), payload_.select.end());
    return argv;
  }

  End run_pytest() {
    sandbox::StepResult ran;
    auto suite = pytest_once(false, ran);
    if (End end = ended(ran, "pytest"); end.code != EndCode::none) return end;
    if (!suite) {
      add_error(tests_, "pytest",
                "exited with " + std::to_string(ran.exit_code) +
                    " and left no report (" + suite.error().what + ")\n" +
                    tail(ran.out));
      return {};
    }
    run_.reported = true;
    tests_.suite = std::move(*suite);
    for (int i = 0; i < options_.retries && again(); ++i) {
      host_.progress(90, "running what failed again");
      sandbox::StepResult again;
      suite = pytest_once(true, again);
      if (End end = ended(again, "pytest"); end.code != EndCode::none) {
        return end;
      }
      if (suite) merge_rerun(tests_, *suite);
    }
    judge_pytest(ran);
    return {};
  }

  // An exit code that the report does not explain is an error of its own.
  void judge_pytest(const sandbox::StepResult& ran) {
    const Suite& s = tests_.suite;
    const bool explained = s.failed + s.errors + tests_.flaky > 0;
    if (ran.exit_code == 5 || (s.passed + s.skipped == 0 && !explained)) {
      add_error(tests_, "pytest", "no test ran\n" + tail(ran.out));
    } else if (ran.exit_code != 0 && (ran.exit_code != 1 || !explained)) {
      add_error(tests_, "pytest",
                "exited with " + std::to_string(ran.exit_code) + "\n" +
                    tail(ran.out));
    }
  }

  Result<Suite> pytest_once(bool again, sandbox::StepResult& ran) {
    if (again) remove_report();
    ran = step(project_step(pytest_argv(again)), true);
    tests_.duration_ms += ran.wall_ms;
    if (ran.ended != sandbox::Ended::exited) {
      return Error{Code::unavailable, "it did not end by itself"};
    }
    auto xml = session_->collect(kReport, kJunitXmlBytesMax);
    if (!xml) return xml.error();
    auto suite = read_report(*xml);
    if (run_.report.empty()) run_.report = std::move(*xml);
    return suite;
  }

  bool again() const {
    return options_.again ? options_.again(tests_) : !passed(tests_);
  }

  void remove_report() {
    sandbox::Step remove;
    remove.argv = {"/bin/rm", "-f", std::string("/work/") + kReport};
    (void)step(std::move(remove), false);
  }

  // The parser runs in this session too: the tree that wrote the report is
  // dead, and the handler can reach no more than that tree could.
  Result<Suite> read_report(const std::string& xml) {
    auto socket = session_->start_service(sandbox::BuiltinId::junit);
    if (!socket) return socket.error();
    auto suite = ask_junit(*socket, xml, kParseMs);
    (void)session_->wait_service(kParseMs);
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
      }
      tests_.suite.cases.assign(1, std::move(one));
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
               : "..." + text.substr(text.size() - kOutputTailBytes);
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
  bool setup_failed_ = false;
};

void stage(Host& host, End& end, const std::string& name,
           const std::string& bytes) {
  if (bytes.empty() || host.cancelled()) return;
  if (host.artifact(name, bytes)) end.artifacts.push_back(name);
}

}  // namespace

SuiteRun run_suite(const TestPayload& payload, const Checkout& checkout,
                   const SuiteOptions& options, const Attempt& attempt,
                   Host& host) {
  return SuiteRunner(payload, checkout, options, attempt, host).run();
}

End run_tests(const Attempt& attempt, Host& host) {
  auto payload = parse_test(attempt.payload, host.settings());
  if (!payload) return failed(EndCode::invalid_payload, payload.error().what);
  const auto started = Clock::now();
  SuiteOptions options;
  options.timeout_ms = attempt.timeout_ms;
  options.retries = payload->retries;
  Checkout checkout;
  Usage usage;
  if (!payload->repo.empty()) {
    host.progress(0, "preparing the repository");
    Prepared prepared = prepare_repo(payload->repo, payload->base_rev, attempt,
                                     host, attempt.timeout_ms);
    if (!prepared.good) return std::move(prepared.end);
    usage = prepared.end.usage;
    checkout = prepared.checkout;
    options.timeout_ms = std::max<Millis>(
        1, attempt.timeout_ms -
               std::chrono::duration_cast<std::chrono::milliseconds>(
                   Clock::now() - started)
                   .count());
  }
  SuiteRun run = run_suite(*payload, checkout, options, attempt, host);
  End end = std::move(run.end);
  usage.add(end.usage);
  end.usage = usage;
  if (end.code == EndCode::none && !passed(run.tests)) {
    end.code = EndCode::verdict;
    end.message = summary(run.tests);
  }
  if (end.code == EndCode::cancelled ||
      end.code == EndCode::isolation_unavailable) {
    return end;
  }
  stage(host, end, "output.log", run.output);
  stage(host, end, "junit.xml", run.report);
  end.side_effects = side_effects_json();
  if (end.code == EndCode::none || end.code == EndCode::verdict ||
      run.tests.timed_out) {
    end.result = test_result(run.tests, usage, kCasesBytesMax);
  }
  host.progress(100, summary(run.tests));
  return end;
}

}  // namespace machina::kinds
