#include "workers/kinds/patch/patch_rollback.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <memory>

#include "tests/workers/worker/isolated_fixture.h"
#include "workers/kinds/run.h"
#include "workers/kinds/suite/suite.h"

namespace machina {
namespace {

using kinds::hunks_in_region;
using kinds::parse_rollback;
using nlohmann::json;
using testing::HasSubstr;

const std::string kId = "019aa122-be01-7400-8000-000000000001";

TEST(PatchRollback, APayloadIsReadStrictly) {
  auto good = parse_rollback(R"({"patch_id":")" + kId + R"("})");
  ASSERT_TRUE(good) << good.error().text();
  EXPECT_EQ(good->patch_id, kId);
  EXPECT_EQ(good->path, "");
  good = parse_rollback(R"({"patch_id":")" + kId +
                        R"(","region":{"path":"a/b.py","start_line":3}})");
  ASSERT_TRUE(good) << good.error().text();
  EXPECT_EQ(good->start_line, 3);
  EXPECT_EQ(good->end_line, 3);
  EXPECT_TRUE(good->own_test);
  EXPECT_FALSE(good->block);
  good = parse_rollback(R"({"patch_id":")" + kId +
                        R"(","test":null,"on_conflict":"block"})");
  ASSERT_TRUE(good) << good.error().text();
  EXPECT_FALSE(good->own_test);
  EXPECT_FALSE(good->test);
  EXPECT_TRUE(good->block);
  good = parse_rollback(R"({"patch_id":")" + kId +
                        R"(","test":{"select":["t.py"]}})");
  ASSERT_TRUE(good) << good.error().text();
  EXPECT_FALSE(good->own_test);
  ASSERT_TRUE(good->test);
  EXPECT_EQ(good->test->select, std::vector<std::string>({"t.py"}));
  for (const auto& [payload, field] :
       std::vector<std::pair<std::string, std::string>>{
           {"{}", "patch_id"},
           {R"({"patch_id":"latest"})", "patch_id"},
           {R"({"patch_id":7})", "patch_id"},
           {R"({"patch_id":")" + kId + R"(","force":true})", "force"},
           {R"({"patch_id":")" + kId + R"(","region":"a"})", "region"},
           {R"({"patch_id":")" + kId + R"(","test":[]})", "test"},
           {R"({"patch_id":")" + kId + R"(","test":{"repo":"r"}})",
            "test.repo"},
           {R"({"patch_id":")" + kId + R"(","test":{"retries":-1}})",
            "test.retries"},
           {R"({"patch_id":")" + kId + R"(","on_conflict":"merge"})",
            "on_conflict"},
           {R"({"patch_id":")" + kId + R"(","region":{}})", "region.path"},
           {R"({"patch_id":")" + kId + R"(","region":{"path":"../a"}})",
            "region.path"},
           {R"({"patch_id":")" + kId +
                R"(","region":{"path":"a","start_line":0}})",
            "region.start_line"},
           {R"({"patch_id":")" + kId +
                R"(","region":{"path":"a","end_line":4}})",
            "region.end_line"},
           {R"({"patch_id":")" + kId +
                R"(","region":{"path":"a","start_line":5,"end_line":4}})",
            "region.end_line"}}) {
    auto bad = parse_rollback(payload);
    ASSERT_FALSE(bad) << payload;
    EXPECT_EQ(bad.error().field, field)
        << payload << ": " << bad.error().text();
  }
}

// Old side: what the patch left. Lines 2-3 changed, lines removed by the patch
// after 6, line 10 added by it.
const std::string kHead = "diff --git a/f b/f\n--- a/f\n+++ b/f\n";
const std::string kFirst = "@@ -2,2 +2 @@ def f():\n-x\n-y\n+@@ -9 odd\n";
const std::string kGap = "@@ -6,0 +6,2 @@\n+a\n+b\n";
const std::string kLast = "@@ -10 +11,0 @@\n-new\n\\ No newline\n";

TEST(PatchRollback, OnlyHunksThatTouchTheRegionAreTaken) {
  const std::string diff = kHead + kFirst + kGap + kLast;
  EXPECT_EQ(hunks_in_region(diff, 1, 100), diff);
  EXPECT_EQ(hunks_in_region(diff, 1, 1), "");
  EXPECT_EQ(hunks_in_region(diff, 2, 2), kHead + kFirst);
  EXPECT_EQ(hunks_in_region(diff, 3, 5), kHead + kFirst);
  EXPECT_EQ(hunks_in_region(diff, 4, 5), "");
  EXPECT_EQ(hunks_in_region(diff, 6, 6), kHead + kGap);
  EXPECT_EQ(hunks_in_region(diff, 7, 9), kHead + kGap);
  EXPECT_EQ(hunks_in_region(diff, 8, 9), "");
  EXPECT_EQ(hunks_in_region(diff, 9, 10), kHead + kLast);
  EXPECT_EQ(hunks_in_region("", 1, 9), "");
}

// --- real git in real sandboxes; what the suite does is played ---

constexpr char kSuite[] = "the-suite";
using Played = std::function<sandbox::StepResult()>;

class PlayedSession final : public sandbox::Session {
 public:
  PlayedSession(std::unique_ptr<sandbox::Session> real, const Played& suite)
      : real_(std::move(real)), suite_(suite) {}
  sandbox::StepResult run(const sandbox::Step& step,
                          const sandbox::Watch& watch) override {
    const bool ours = !step.argv.empty() && step.argv[0] == kSuite;
    return ours ? suite_() : real_->run(step, watch);
  }
  Result<int> start_service(const sandbox::Step& program) override {
    return real_->start_service(program);
  }
  sandbox::StepResult wait_service(Millis timeout_ms) override {
    return real_->wait_service(timeout_ms);
  }
  Result<void> put(const std::string& path, std::string_view bytes) override {
    return real_->put(path, bytes);
  }
  Result<std::string> collect(const std::string& path,
                              std::size_t max_bytes) override {
    return real_->collect(path, max_bytes);
  }

 private:
  std::unique_ptr<sandbox::Session> real_;
  const Played& suite_;
};

class RollbackHost final : public kinds::Host {
 public:
  RollbackHost(std::unique_ptr<sandbox::Slot> slot, const std::string& repos)
      : slot_(std::move(slot)) {
    settings_.repo_roots = {repos};
  }
  Result<std::unique_ptr<sandbox::Session>> open(
      const sandbox::SessionSpec& spec) override {
    auto real = slot_->open(spec);
    if (!real) return real.error();
    return std::unique_ptr<sandbox::Session>(
        std::make_unique<PlayedSession>(std::move(*real), suite_));
  }
  sandbox::Watch watch() override { return {}; }
  bool cancelled() const override { return false; }
  void progress(int, const std::string&) override {}
  // The runs are told apart by what is said of them.
  void log(std::string_view bytes) override {
    if (bytes.starts_with("== ")) phase_ = bytes, run_ = 0;
  }
  Result<void> artifact(const std::string&, std::string_view) override {
    return {};
  }
  Result<std::string> fetch_artifact(const std::string&, const std::string&,
                                     std::size_t) override {
    return Error{Code::not_found, "none"};
  }
  Result<std::string> fetch_patch(const std::string&, bool reverse) override {
    if (reverse) return Error{Code::not_found, "none"};
    return record;
  }
  const KindSettings& settings() const override { return settings_; }

  std::string record;
  // One letter a run, the last for all further ones: p passes, f fails, k is
  // killed, t is cut off when its time is over.
  std::string tip = "p", after = "p", base = "p";
  int base_runs = 0;

 private:
  sandbox::StepResult play() {
    const bool at_base = phase_.find("before the patch") != std::string::npos;
    const bool at_tip = phase_.find("before the rollback") != std::string::npos;
    base_runs += at_base;
    const std::string& plan = at_base ? base : at_tip ? tip : after;
    const char how = plan[std::min(run_++, plan.size() - 1)];
    sandbox::StepResult out;
    out.ended = how == 'k'   ? sandbox::Ended::signalled
                : how == 't' ? sandbox::Ended::timeout
                             : sandbox::Ended::exited;
    out.signal = how == 'k' ? 9 : 0;
    out.exit_code = how == 'f' ? 1 : 0;
    return out;
  }

  std::unique_ptr<sandbox::Slot> slot_;
  KindSettings settings_;
  std::string phase_;
  std::size_t run_ = 0;
  const Played suite_ = [this] { return play(); };
};

class RollbackRunTest : public IsolatedTest {
 protected:
  // The patch makes a two of the one in a.txt.
  void SetUp() override {
    IsolatedTest::SetUp();
    repo_ = repos_ + "/demo";
    sh("git init -q -b main " + repo_);
    sh("cd " + repo_ + " && echo one >a.txt");
    commit("base");
    git("checkout -q -b review/x");
    sh("cd " + repo_ + " && echo two >a.txt");
    commit("patch");
    patch_ = tip();
    git("checkout -q main");
    auto slot = sandbox::Slot::attach(*spawner_->open_slot(1));
    ASSERT_TRUE(slot);
    host_ = std::make_unique<RollbackHost>(std::move(*slot), repos_);
    host_->record = json{
        {"outcome", "applied"},
        {"repo", "demo"},
        {"branch", "review/x"},
        {"commit", patch_},
        {"base_commit", ref("refs/heads/main")},
        {"description", "d"},
        {"pushed", true},
        {"rolled_back_by", nullptr},
        {"files",
         {{{"path", "a.txt"},
           {"sha256_before", kinds::sha256_hex("one\n")},
           {"sha256_after", kinds::sha256_hex("two\n")}}}},
        {"rollbacks",
         json::array()}}.dump();
  }
  void TearDown() override {
    host_.reset();
    IsolatedTest::TearDown();
  }

  void git(const std::string& args) {
    sh("git -C " + repo_ + " -c user.name=n -c user.email=a@b " + args);
  }
  void commit(const std::string& message) {
    git("add -A");
    git("commit -q -m " + message);
  }
  std::string ref(const std::string& name) {
    std::ifstream file(repo_ + "/.git/" + name);
    std::string commit;
    file >> commit;
    return commit;
  }
  std::string tip() { return ref("refs/heads/review/x"); }
  void commit_beside() {
    git("checkout -q review/x");
    sh("cd " + repo_ + " && echo later >later.txt");
    commit("later");
    git("checkout -q main");
  }

  json roll_back(const json& more, const std::string& input = "") {
    json payload = {{"patch_id", kId}};
    payload.update(more);
    kinds::Attempt attempt;
    attempt.job_id = "019aa122-be01-7400-8000-00000000000" +
                     std::to_string(2 + attempts_++ % 8);
    attempt.kind = "patch.rollback";
    attempt.payload = payload.dump();
    attempt.input = input;
    attempt.timeout_ms = 120'000;
    const kinds::End end = kinds::run_rollback(attempt, *host_);
    EXPECT_FALSE(end.result.empty()) << end.message << end.block_reason;
    return json::parse(end.result, nullptr, false);
  }
  json roll_back_tested() {
    return roll_back(
        {{"test", {{"runner", "command"}, {"command", {kSuite}}}}});
  }
  void expect_refused(const json& result) {
    EXPECT_EQ(result["outcome"], "tests_failed") << result.dump(2);
    EXPECT_EQ(result["verified"], false);
    EXPECT_TRUE(result["commit"].is_null());
    EXPECT_THAT(result["reason"].get<std::string>(),
                HasSubstr("longer timeout_ms"));
  }

  std::string repo_, patch_;
  std::unique_ptr<RollbackHost> host_;
  int attempts_ = 0;
};

// Each run has a share of the job's time. One that is cut off there says that
// the time was short, and excuses nothing.
TEST_F(RollbackRunTest, ARunThatWasCutOffIsNoVerdict) {
  // The rollback's files are all those from before the patch.
  for (const char* after : {"t", "ft"}) {
    host_->after = after;
    expect_refused(roll_back_tested());
    EXPECT_EQ(tip(), patch_) << after;
  }
  // They are not, and the base is asked.
  commit_beside();
  const std::string later = tip();
  for (const auto& [after, base] :
       std::vector<std::pair<const char*, const char*>>{
           {"t", "t"}, {"t", "k"}, {"k", "t"}, {"f", "t"}, {"f", "ft"}}) {
    host_->after = after;
    host_->base = base;
    host_->base_runs = 0;
    expect_refused(roll_back_tested());
    EXPECT_EQ(tip(), later) << after << ", base " << base;
    EXPECT_EQ(host_->base_runs > 0, after[0] != 't') << after;
  }
  // What fails after a tip that was cut off is judged by the base alone.
  host_->tip = "t";
  host_->after = "f";
  host_->base = "p";
  json result = roll_back_tested();
  EXPECT_EQ(result["outcome"], "tests_failed") << result.dump(2);
  EXPECT_EQ(tip(), later);
  // A suite that died by itself before the patch too says nothing of what came
  // later.
  host_->tip = "p";
  host_->after = host_->base = "k";
  result = roll_back_tested();
  EXPECT_EQ(result["outcome"], "tests_failed") << result.dump(2);
  EXPECT_EQ(tip(), later);
}

// Nothing came later: the files are those from before the patch.
TEST_F(RollbackRunTest, F01_ADeadSuiteOfTheVeryFilesFromBeforeIsNoReason) {
  host_->after = host_->base = "k";
  const json result = roll_back_tested();
  EXPECT_EQ(result["outcome"], "rolled_back") << result.dump(2);
  EXPECT_NE(tip(), patch_);
}

// Blocked for a merge that somebody then made needless, and denied.
TEST_F(RollbackRunTest, ADenialEndsItWhateverTheBranchHasBecome) {
  const json block = {{"test", nullptr}, {"on_conflict", "block"}};
  json result = roll_back(block, R"({"approve":false})");
  EXPECT_EQ(result["outcome"], "conflict") << result.dump(2);
  EXPECT_EQ(result["pushed"], false);
  EXPECT_EQ(result["restored"], json::array());
  EXPECT_THAT(result["reason"].get<std::string>(), HasSubstr("denied"));
  EXPECT_EQ(tip(), patch_);
  result = roll_back(block, R"({"approve":true})");
  EXPECT_EQ(result["outcome"], "rolled_back") << result.dump(2);
  EXPECT_NE(tip(), patch_);
}

}  // namespace
}  // namespace machina
