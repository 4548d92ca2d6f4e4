#include "workers/kinds/test/test_run.h"

#include <algorithm>
#include <chrono>

#include "queue/base/utf8.h"
#include "workers/kinds/fields.h"
#include "workers/kinds/suite/suite.h"
#include "workers/kinds/suite/tap.h"

namespace machina::kinds {
namespace {

constexpr char kNoHttps[] =
    "https repositories need the network, which is not available yet; use a "
    "path or a name below a repository root";

Checked<TestPayload> parse_test(const std::string& payload,
                                const KindSettings& settings) {
  Fields fields(payload);
  fields.only({"repo", "files", "base_rev", "cwd", "runner", "args", "command",
               "report", "env", "setup", "select", "scenario", "severity",
               "retries", "coverage"});
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
    return BadField{"repo", "\"" + std::string(utf8_head(out.repo, 200)) +
                                "\" is not below one of the repository roots"};
  }
  return out;
}

void stage(Host& host, End& end, const std::string& name,
           const std::string& bytes) {
  if (bytes.empty() || host.cancelled()) return;
  if (host.artifact(name, bytes)) end.artifacts.push_back(name);
}

End run_tests(const Attempt& attempt, Host& host) {
  auto payload = parse_test(attempt.payload, host.settings());
  if (!payload) return bad_payload(payload.error());
  using Clock = std::chrono::steady_clock;
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
  stage(host, end, run.tap ? "report.tap" : "junit.xml", run.report);
  end.side_effects = side_effects_json();
  if (end.code == EndCode::none || end.code == EndCode::verdict ||
      run.tests.timed_out) {
    end.result = test_result(run.tests, usage, kCasesBytesMax);
  }
  host.progress(100, summary(run.tests));
  return end;
}

}  // namespace

Family test_family(const KindSettings& settings) {
  Kind run;
  run.name = "test.run";
  run.run = run_tests;
  run.timeout_ms = 300'000;
  run.limits = {1024, 1024, 256, 0, 8 << 20};
  run.check = [settings](const std::string& payload) -> Checked<Kind::Kept> {
    if (auto good = parse_test(payload, settings); !good) return good.error();
    return Kind::Kept{};
  };
  run.resolve = [settings](const std::string& payload) -> Checked<Kind::Kept> {
    const auto good = parse_test(payload, settings);
    if (!good) return good.error();
    if (good->repo.empty()) return Kind::Kept{};
    const auto found = find_repo(good->repo, settings);
    if (!found) return found.error();
    return Kind::Kept{with_repo(payload, found->kept), ""};
  };
  return {{std::move(run)},
          {{kJunitHandler, junit_handler}, {kTapHandler, tap_handler}}};
}

}  // namespace machina::kinds
