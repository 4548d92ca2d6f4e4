#include "server/api/patches.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "queue/history/sqlite.h"

namespace machina {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

constexpr Millis kNow = 1'763'640'000'000;
const std::string kHash(64, 'a');
const std::string kOtherHash(64, 'b');
const std::string kCommit(40, 'c');

class PatchesTest : public testing::Test {
 protected:
  PatchesTest() {
    char name[] = "/tmp/machina_patches_XXXXXX";
    root_ = mkdtemp(name);
    dir_ = root_ + "/patches";
    auto store = Store::open(root_);
    EXPECT_TRUE(store);
    store_ = std::move(*store);
    open();
  }
  ~PatchesTest() override {
    patches_.reset();
    fs::remove_all(root_);
  }

  void open() {
    patches_.reset();
    auto opened = Patches::open(dir_, store_.get(), limits_);
    ASSERT_TRUE(opened) << opened.error().what;
    patches_ = std::move(*opened);
  }

  static Json payload() {
    return {{"repo", "/srv/repo"},
            {"base_rev", "main"},
            {"diff", "abc"},
            {"description", "a fix"},
            {"author", "ann"}};
  }
  static Json applied() {
    return {{"outcome", "applied"},
            {"commit", kCommit},
            {"branch", "review/x"},
            {"base_commit", std::string(40, 'd')},
            {"files",
             {{{"path", "a.py"},
               {"added", 3},
               {"removed", 1},
               {"sha256_before", kHash},
               {"sha256_after", kOtherHash}}}},
            {"tests",
             {{"before", {{"passed", 10}, {"failed", 0}, {"cases", {1, 2}}}},
              {"after", {{"passed", 11}, {"failed", 0}}},
              {"newly_failing", Json::array()},
              {"newly_passing", {"t::new"}}}}};
  }

  // How a job ended; ids are in order of creation.
  HistoryChange ended(const Json& payload, const Json& result,
                      State state = State::succeeded,
                      std::string_view kind = kPatchKind) {
    ++next_;
    EnqueueRecord body;
    body.id = make_job_id(kNow + static_cast<Millis>(next_), next_, next_);
    body.created_ms = kNow + static_cast<Millis>(next_);
    body.job.kind = kind;
    body.job.payload = payload.dump();
    body.job.keep_result_ms = 0;
    EndRecord end;
    end.id = body.id;
    end.state = state;
    end.fence = make_fence(1, next_);
    end.outcome.result = result.is_null() ? "" : result.dump();
    if (state != State::succeeded) end.outcome.message = "it went wrong";
    HistoryChange change;
    change.id = body.id;
    change.lsn = next_ * 10;
    change.finished_ms = body.created_ms + 1000;
    change.body = std::make_shared<EnqueueRecord>(body);
    change.end = std::make_shared<EndRecord>(end);
    return change;
  }
  HistoryChange unblocked(const JobId& id, const std::string& actor,
                          const std::string& input) {
    HistoryChange change;
    change.id = id;
    change.lsn = ++next_ * 10;
    change.finished_ms = kNow + 500;
    change.unblock =
        std::make_shared<UnblockRecord>(UnblockRecord{id, input, actor});
    return change;
  }
  static HistoryChange left(const JobId& id, Lsn lsn) {
    HistoryChange change;
    change.id = id;
    change.lsn = lsn;
    return change;
  }
  void take(const std::vector<HistoryChange>& changes) {
    auto taken = patches_->take(changes);
    ASSERT_TRUE(taken) << taken.error().what;
  }
  std::string put(const Json& payload, const Json& result,
                  State state = State::succeeded) {
    HistoryChange change = ended(payload, result, state);
    take({change});
    return to_string(change.id);
  }
  std::optional<PatchRecord> find(const std::string& id) {
    auto found = patches_->find(id);
    EXPECT_TRUE(found) << found.error().what;
    return found ? *found : std::nullopt;
  }
  std::vector<std::string> ids(const PatchQuery& query) {
    auto page = patches_->list(query);
    EXPECT_TRUE(page) << page.error().what;
    std::vector<std::string> out;
    if (!page) return out;
    for (const auto& patch : page->patches) out.push_back(patch.patch_id);
    return out;
  }
  // Stages `bytes` as an artifact of the change's attempt and claims it.
  void stage(HistoryChange* change, const std::string& name,
             const std::string& bytes) {
    auto upload = store_->begin_upload(change->end->fence, name);
    ASSERT_TRUE(upload);
    ASSERT_TRUE((*upload)->append(bytes));
    ASSERT_TRUE((*upload)->commit(change->id));
    EndRecord end = *change->end;
    end.outcome.artifacts.push_back(name);
    change->end = std::make_shared<EndRecord>(end);
  }

  std::string root_, dir_;
  std::unique_ptr<Store> store_;
  PatchLimits limits_;
  std::unique_ptr<Patches> patches_;
  std::uint64_t next_ = 0;
};

TEST_F(PatchesTest, AnAppliedPatchIsRememberedWhole) {
  Json asked = payload();
  asked["push"] = true;
  asked["parent_patch_id"] = "01900000-0000-7000-8000-000000000001";
  asked["provenance"] = {
      {{"origin", "o1"}, {"vector_id", "v1"}, {"influence", 0.25}},
      {{"origin", "o2"}, {"vector_id", "v2"}, {"license", "MIT"}},
      {{"origin", "o3"}, {"influence", 0.75}, {"license", "GPL-3.0-only"}}};
  HistoryChange change = ended(asked, applied());
  take({change});
  auto patch = find(to_string(change.id));
  ASSERT_TRUE(patch);
  EXPECT_EQ(patch->state, "succeeded");
  EXPECT_EQ(patch->outcome, "applied");
  EXPECT_EQ(patch->repo, "/srv/repo");
  EXPECT_EQ(patch->base_rev, "main");
  EXPECT_EQ(patch->base_commit, std::string(40, 'd'));
  EXPECT_EQ(patch->commit, kCommit);
  EXPECT_EQ(patch->branch, "review/x");
  EXPECT_TRUE(patch->pushed);
  EXPECT_EQ(patch->description, "a fix");
  EXPECT_EQ(patch->author, "ann");
  EXPECT_EQ(patch->parent_patch_id, "01900000-0000-7000-8000-000000000001");
  // sha256 of "abc"
  EXPECT_EQ(patch->diff_digest,
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f2"
            "0015ad");
  EXPECT_EQ(patch->approval.state, "not_required");
  EXPECT_EQ(patch->lines_added, 3);
  EXPECT_EQ(patch->lines_removed, 1);
  ASSERT_EQ(patch->files.size(), 1u);
  EXPECT_EQ(patch->files[0].sha256_before, kHash);
  EXPECT_EQ(patch->files[0].sha256_after, kOtherHash);
  EXPECT_EQ(patch->tests_before, R"({"failed":0,"passed":10})");
  EXPECT_EQ(patch->newly_passing, R"(["t::new"])");
  EXPECT_EQ(patch->newly_passing_count, 1);
  ASSERT_EQ(patch->sources.size(), 3u);
  EXPECT_EQ(patch->sources[0].origin, "o3");
  EXPECT_EQ(patch->sources[1].origin, "o1");
  EXPECT_EQ(patch->sources[1].position, 0);
  EXPECT_EQ(patch->sources[2].origin, "o2");
  EXPECT_FALSE(patch->sources[2].has_influence);
  ASSERT_EQ(patch->branch_log.size(), 2u);
  EXPECT_EQ(patch->branch_log[0].action, "committed");
  EXPECT_EQ(patch->branch_log[1].action, "pushed");
  EXPECT_EQ(patch->created_ms, change.body->created_ms);
  EXPECT_EQ(patch->finished_ms, change.finished_ms);
}

TEST_F(PatchesTest, EveryEndHasARow) {
  Json conflict = {{"outcome", "conflict"}, {"reason", "a.py: hunk 1"}};
  std::string a = put(payload(), conflict, State::failed);
  std::string b = put(payload(), nullptr, State::dead);
  std::string c = put(payload(), nullptr, State::cancelled);
  std::string d = put(Json::array(), "text", State::failed);
  EXPECT_EQ(find(a)->outcome, "conflict");
  EXPECT_EQ(find(a)->reason, "a.py: hunk 1");
  EXPECT_FALSE(find(a)->pushed);
  EXPECT_EQ(find(b)->outcome, "dead");
  EXPECT_EQ(find(b)->reason, "it went wrong");
  EXPECT_EQ(find(c)->state, "cancelled");
  EXPECT_EQ(find(d)->outcome, "failed");
  EXPECT_EQ(find(d)->repo, "");
  HistoryChange other = ended(payload(), applied(), State::succeeded, "noop");
  take({other});
  EXPECT_FALSE(find(to_string(other.id)));
  EXPECT_EQ(ids({}), (std::vector<std::string>{d, c, b, a}));
}

// What came from outside never breaks the row.
TEST_F(PatchesTest, ValuesOfAnotherShapeAreLeftOut) {
  Json result = applied();
  result["outcome"] = "Not A Word";
  result["commit"] = "; rm -rf /";
  result["branch"] = Json::array({1});
  result["files"] = {
      1, {{"path", "b"}, {"added", -7}, {"sha256_after", "x"}}, {{"added", 1}}};
  result["tests"] = {{"before", "all good"}, {"newly_failing", {1, "t"}}};
  Json asked = payload();
  asked["description"] = std::string(kPatchTextBytesMax - 1, 'x') + "\u00e9";
  asked["provenance"] = {{{"influence", "much"}, {"license", 7}}, 3};
  std::string id = put(asked, result);
  auto patch = find(id);
  ASSERT_TRUE(patch);
  EXPECT_EQ(patch->outcome, "succeeded");
  EXPECT_EQ(patch->commit, "");
  EXPECT_EQ(patch->branch, "");
  ASSERT_EQ(patch->files.size(), 1u);
  EXPECT_EQ(patch->files[0].added, 0);
  EXPECT_EQ(patch->files[0].sha256_after, "");
  EXPECT_EQ(patch->tests_before, "");
  EXPECT_EQ(patch->newly_failing, R"(["t"])");
  EXPECT_EQ(patch->newly_failing_count, 2);
  EXPECT_EQ(patch->description, std::string(kPatchTextBytesMax - 1, 'x'));
  ASSERT_EQ(patch->sources.size(), 1u);
  EXPECT_FALSE(patch->sources[0].has_influence);
}

TEST_F(PatchesTest, ListsAreCutAtTheirBounds) {
  Json asked = payload(), result = applied();
  for (std::size_t i = 0; i < kPatchSourcesMax + 5; ++i) {
    asked["provenance"].push_back({{"origin", std::to_string(i)}});
  }
  for (std::size_t i = 0; i < kPatchCasesMax + 5; ++i) {
    result["tests"]["newly_failing"].push_back("t" + std::to_string(i));
  }
  result["files"] = Json::array();
  for (std::size_t i = 0; i < kPatchFilesMax + 5; ++i) {
    result["files"].push_back({{"path", "f" + std::to_string(i)}});
  }
  auto patch = find(put(asked, result));
  ASSERT_TRUE(patch);
  EXPECT_EQ(patch->sources.size(), kPatchSourcesMax);
  EXPECT_EQ(patch->files.size(), kPatchFilesMax);
  EXPECT_EQ(patch->newly_failing_count,
            static_cast<std::int64_t>(kPatchCasesMax + 5));
  EXPECT_EQ(Json::parse(patch->newly_failing).size(), kPatchCasesMax);
}

// --- P1, P2: crashes and replays ---

TEST_F(PatchesTest, TheSameChangesAgainLeaveTheSameRows) {
  HistoryChange change = ended(payload(), applied());
  std::vector<HistoryChange> all = {
      unblocked(change.id, "boss", R"({"approve":true})"), change};
  all[1].lsn = all[0].lsn + 10;
  take(all);
  auto before = find(to_string(change.id));
  open();  // a crash before history knew
  take(all);
  take(all);
  auto after = find(to_string(change.id));
  ASSERT_TRUE(before && after);
  std::string a, b;
  JsonWriter wa(a), wb(b);
  append_patch(wa, *before, ShowPatch::all);
  append_patch(wb, *after, ShowPatch::all);
  EXPECT_EQ(a, b);
  EXPECT_EQ(ids({}).size(), 1u);
  // The end alone, where the log has lost the rest: the approval stays.
  take({all[1]});
  EXPECT_EQ(find(to_string(change.id))->approval.actor, "boss");
}

TEST_F(PatchesTest, ARetryTakesTheRowAwayUntilTheJobEndsAgain) {
  HistoryChange first =
      ended(payload(), {{"outcome", "conflict"}}, State::failed);
  const std::string id = to_string(first.id);
  take({first});
  HistoryChange again = left(first.id, first.lsn + 1);
  take({again});
  EXPECT_FALSE(find(id));
  EXPECT_TRUE(ids({}).empty());
  HistoryChange second = ended(payload(), applied());
  second.id = first.id;
  EnqueueRecord body = *second.body;
  body.id = first.id;
  second.body = std::make_shared<EnqueueRecord>(body);
  second.lsn = first.lsn + 2;
  take({second});
  EXPECT_EQ(find(id)->outcome, "applied");
  // All of it once more, from the start of the log: the same at the end.
  take({first});
  EXPECT_EQ(find(id)->outcome, "applied") << "an older end won";
  take({again});
  EXPECT_TRUE(find(id)) << "an older retry won";
  take({second});
  EXPECT_EQ(find(id)->outcome, "applied");
}

TEST_F(PatchesTest, WhoApprovedIsKeptAcrossAReopenUntilTheEnd) {
  Json asked = payload();
  asked["approval"] = "required";
  HistoryChange change = ended(asked, applied());
  const std::string digest = "sha256:" + kHash;
  take({unblocked(change.id, "ann", R"({"approve":false})"),
        unblocked(change.id, "bob",
                  Json{{"approve", true}, {"digest", digest}, {"comment", "ok"}}
                      .dump())});
  open();
  change.lsn = 1000;
  take({change});
  auto patch = find(to_string(change.id));
  ASSERT_TRUE(patch);
  EXPECT_EQ(patch->approval.state, "approved");
  EXPECT_EQ(patch->approval.actor, "bob");
  EXPECT_EQ(patch->approval.comment, "ok");
  EXPECT_EQ(patch->approval.digest, digest);
  EXPECT_EQ(patch->approval.at_ms, kNow + 500);

  HistoryChange denied =
      ended(asked, {{"outcome", "approval_denied"}}, State::failed);
  take({unblocked(denied.id, "eve", R"({"approve":false})")});
  denied.lsn = 2000;
  take({denied});
  EXPECT_EQ(find(to_string(denied.id))->approval.state, "denied");
  EXPECT_EQ(find(to_string(denied.id))->approval.actor, "eve");
  // Nobody answered.
  std::string never = put(asked, nullptr, State::dead);
  EXPECT_EQ(find(never)->approval.state, "required");
  EXPECT_EQ(find(never)->approval.actor, "");
  // An applied one was approved, also where nobody knows any more by whom.
  std::string forgotten = put(asked, applied());
  EXPECT_EQ(find(forgotten)->approval.state, "approved");
  EXPECT_EQ(find(forgotten)->approval.actor, "");
}

// --- rollbacks ---

TEST_F(PatchesTest, ARollbackIsWrittenDownBesideItsPatch) {
  std::string id = put(payload(), applied());
  Json ask = {{"patch_id", id}};
  Json done = {{"outcome", "rolled_back"},
               {"restored", {{{"path", "a.py"}}}},
               {"verified", true},
               {"branch", "review/x"},
               {"commit", std::string(40, 'e')},
               {"pushed", true}};
  Json region = ask;
  region["region"] = {{"path", "a.py"}, {"start_line", 1}, {"end_line", 2}};
  HistoryChange part = ended(region, done, State::succeeded, kRollbackKind);
  take({part});
  EXPECT_EQ(find(id)->rolled_back_by, "");
  HistoryChange whole = ended(ask, done, State::succeeded, kRollbackKind);
  HistoryChange again = ended(ask,
                              {{"outcome", "already_rolled_back"},
                               {"restored", Json::array()},
                               {"verified", true}},
                              State::succeeded, kRollbackKind);
  HistoryChange refused =
      ended(ask, {{"outcome", "conflict"}, {"reason", "a.py"}}, State::failed,
            kRollbackKind);
  take({whole, again, refused});
  auto patch = find(id);
  ASSERT_TRUE(patch);
  EXPECT_EQ(patch->rolled_back_by, to_string(whole.id));
  ASSERT_EQ(patch->rollbacks.size(), 4u);
  EXPECT_EQ(patch->rollbacks[0].outcome, "conflict");
  EXPECT_EQ(patch->rollbacks[0].reason, "a.py");
  EXPECT_EQ(patch->rollbacks[2].job_id, to_string(whole.id));
  EXPECT_EQ(patch->rollbacks[2].restored, 1);
  EXPECT_TRUE(patch->rollbacks[2].verified);
  EXPECT_EQ(Json::parse(patch->rollbacks[3].region)["end_line"], 2);
  std::vector<std::string> actions;
  for (const auto& entry : patch->branch_log) actions.push_back(entry.action);
  EXPECT_EQ(actions, (std::vector<std::string>{
                         "committed", "region_rolled_back", "rolled_back"}));
  EXPECT_EQ(ids({}).front(), id);
  // Replayed, and of a patch that nobody knows.
  take({whole, again, refused});
  take(
      {ended({{"patch_id", "nobody"}}, done, State::succeeded, kRollbackKind)});
  EXPECT_EQ(find(id)->rollbacks.size(), 4u);
  EXPECT_EQ(find(id)->branch_log.size(), 3u);
}

TEST_F(PatchesTest, OnlyTheLastRollbacksOfAPatchAreKept) {
  std::string id = put(payload(), applied());
  std::vector<HistoryChange> many;
  for (std::size_t i = 0; i < kPatchRollbacksMax + 20; ++i) {
    many.push_back(ended({{"patch_id", id}}, {{"outcome", "conflict"}},
                         State::failed, kRollbackKind));
  }
  take(many);
  auto patch = find(id);
  ASSERT_EQ(patch->rollbacks.size(), kPatchRollbacksMax);
  EXPECT_EQ(patch->rollbacks[0].job_id, to_string(many.back().id));
}

TEST_F(PatchesTest, TheReverseDiffOutlivesTheJobsArtifacts) {
  Json result = applied();
  result["reverse_diff_artifact"] = "reverse.diff";
  HistoryChange change = ended(payload(), result);
  stage(&change, "reverse.diff", "--- a\n+++ b\n");
  take({change});
  const std::string id = to_string(change.id);
  EXPECT_EQ(find(id)->reverse_diff_bytes, 12u);
  fs::remove_all(root_ + "/artifacts");
  open();
  take({change});  // replayed when the artifact is gone
  auto diff = patches_->reverse_diff(id);
  ASSERT_TRUE(diff);
  ASSERT_TRUE(*diff);
  EXPECT_EQ(**diff, "--- a\n+++ b\n");
  auto none = patches_->reverse_diff(to_string(JobId{}));
  ASSERT_TRUE(none);
  EXPECT_FALSE(*none);
}

// --- P3: bounds ---

TEST_F(PatchesTest, TheOldestGoWhereThereAreTooMany) {
  limits_.patches_max = 3;
  open();
  std::vector<std::string> all;
  for (int i = 0; i < 5; ++i) all.push_back(put(payload(), applied()));
  EXPECT_EQ(ids({}), (std::vector<std::string>{all[4], all[3], all[2]}));
  EXPECT_FALSE(find(all[0]));
  PatchQuery by_path;
  by_path.path = "a.py";
  EXPECT_EQ(ids(by_path).size(), 3u);
  open();  // the count is kept
  all.push_back(put(payload(), applied()));
  EXPECT_EQ(ids({}).size(), 3u);
}

TEST_F(PatchesTest, TheOldestReverseDiffsGoFirst) {
  limits_.reverse_bytes_max = 250;
  open();
  std::vector<std::string> all;
  for (int i = 0; i < 4; ++i) {
    Json result = applied();
    result["reverse_diff_artifact"] = "r";
    HistoryChange change = ended(payload(), result);
    stage(&change, "r", std::string(100, static_cast<char>('0' + i)));
    take({change});
    all.push_back(to_string(change.id));
  }
  EXPECT_EQ(ids({}).size(), 4u);
  EXPECT_EQ(find(all[0])->reverse_diff_bytes, 0u);
  EXPECT_EQ(find(all[1])->reverse_diff_bytes, 0u);
  EXPECT_EQ(find(all[2])->reverse_diff_bytes, 100u);
  EXPECT_EQ(find(all[3])->reverse_diff_bytes, 100u);
  auto gone = patches_->reverse_diff(all[0]);
  ASSERT_TRUE(gone);
  EXPECT_FALSE(*gone);
}

// --- reads ---

TEST_F(PatchesTest, FiltersGiveOnlyMatchesAndTogetherTheirMeet) {
  auto with = [&](const std::string& license, const std::string& vector,
                  const std::string& path, const std::string& repo) {
    Json asked = payload(), result = applied();
    asked["repo"] = repo;
    asked["provenance"] = {{{"license", license}, {"vector_id", vector}},
                           {{"license", license}, {"vector_id", "common"}}};
    result["files"][0]["path"] = path;
    return put(asked, result);
  };
  std::string a = with("MIT", "v1", "a.py", "/r1");
  std::string b = with("GPL-3.0-only", "v2", "b.py", "/r1");
  std::string c = with("MIT", "v2", "b.py", "/r2");
  using Ids = std::vector<std::string>;
  PatchQuery q;
  q.license = "MIT";
  EXPECT_EQ(ids(q), (Ids{c, a}));
  q.license = "mit";  // one word in any case
  EXPECT_EQ(ids(q), (Ids{c, a}));
  q.license = "MI";
  EXPECT_EQ(ids(q), Ids{});
  q.license = "MIT";
  q.vector = "v2";
  EXPECT_EQ(ids(q), (Ids{c}));
  q.vector = "common";
  q.repo = {"/r1"};
  EXPECT_EQ(ids(q), (Ids{a}));
  q.repo = {"other", "/r1"};
  EXPECT_EQ(ids(q), (Ids{a}));
  q = {};
  q.path = "b.py";
  EXPECT_EQ(ids(q), (Ids{c, b}));
  q.license = "GPL-3.0-only";
  EXPECT_EQ(ids(q), (Ids{b}));
  q = {};
  q.repo = {"/r1"};
  q.outcome = "applied";
  EXPECT_EQ(ids(q), (Ids{b, a}));
  q.repo = {"/r2", "none", "/r1"};  // spellings of one repository
  EXPECT_EQ(ids(q), (Ids{c, b, a}));
  q.limit = 2;
  auto page = patches_->list(q);
  ASSERT_TRUE(page);
  EXPECT_EQ(page->cursor, b);
  q.cursor = b;
  EXPECT_EQ(ids(q), (Ids{a}));
  q.outcome = "conflict";
  EXPECT_EQ(ids(q), Ids{});
}

TEST_F(PatchesTest, PagesCoverEachPatchOnce) {
  std::vector<std::string> all;
  for (int i = 0; i < 25; ++i) {
    Json asked = payload();
    asked["provenance"] = {{{"license", "MIT"}}, {{"license", "MIT"}}};
    all.push_back(put(asked, applied()));
  }
  std::reverse(all.begin(), all.end());
  for (const char* license : {"", "MIT"}) {
    PatchQuery query;
    query.license = license;
    query.limit = 7;
    std::vector<std::string> seen;
    int pages = 0;
    do {
      auto page = patches_->list(query);
      ASSERT_TRUE(page);
      for (const auto& patch : page->patches) seen.push_back(patch.patch_id);
      query.cursor = page->cursor;
      ASSERT_LT(++pages, 10);
    } while (!query.cursor.empty());
    EXPECT_EQ(pages, 4);
    EXPECT_EQ(seen, all);
  }
}

TEST_F(PatchesTest, AncestryGoesFromTheChildToTheRoot) {
  std::vector<std::string> chain;
  for (int i = 0; i < 5; ++i) {
    Json asked = payload();
    if (i > 0) asked["parent_patch_id"] = chain.back();
    asked["provenance"] = {{{"origin", "weak"}, {"influence", 0.1}},
                           {{"origin", "strong"}, {"influence", 0.9}}};
    chain.push_back(put(asked, applied()));
  }
  auto found = patches_->ancestry(chain.back());
  ASSERT_TRUE(found);
  ASSERT_EQ(found->patches.size(), 5u);
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(found->patches[i].patch_id, chain[4 - i]);
    EXPECT_EQ(found->patches[i].sources.at(0).origin, "strong");
  }
  EXPECT_FALSE(found->truncated);
  EXPECT_FALSE(found->cycle);
  EXPECT_EQ(found->missing, "");
}

TEST_F(PatchesTest, AncestryEndsAtACycleAStrangerAndItsBound) {
  // Ids are made by the server, so a cycle takes a forged row.
  HistoryChange a = ended(payload(), applied());
  HistoryChange b = ended(payload(), applied());
  auto set_parent = [](HistoryChange* change, const std::string& parent) {
    EnqueueRecord body = *change->body;
    Json asked = payload();
    asked["parent_patch_id"] = parent;
    body.job.payload = asked.dump();
    change->body = std::make_shared<EnqueueRecord>(body);
  };
  set_parent(&a, to_string(b.id));
  set_parent(&b, to_string(a.id));
  HistoryChange c = ended(payload(), applied());
  set_parent(&c, to_string(c.id));
  const std::string stranger = "01900000-0000-7000-8000-000000000001";
  HistoryChange d = ended(payload(), applied());
  set_parent(&d, stranger);
  take({a, b, c, d});
  auto found = patches_->ancestry(to_string(a.id));
  ASSERT_TRUE(found);
  EXPECT_EQ(found->patches.size(), 2u);
  EXPECT_TRUE(found->cycle);
  found = patches_->ancestry(to_string(c.id));
  EXPECT_EQ(found->patches.size(), 1u);
  EXPECT_TRUE(found->cycle);
  found = patches_->ancestry(to_string(d.id));
  EXPECT_EQ(found->patches.size(), 1u);
  EXPECT_EQ(found->missing, stranger);
  EXPECT_TRUE(patches_->ancestry(stranger)->patches.empty());

  std::vector<HistoryChange> chain;
  for (int i = 0; i < kAncestryMax + 3; ++i) {
    HistoryChange one = ended(payload(), applied());
    if (i > 0) set_parent(&one, to_string(chain.back().id));
    chain.push_back(one);
  }
  take(chain);
  found = patches_->ancestry(to_string(chain.back().id));
  EXPECT_EQ(found->patches.size(), static_cast<std::size_t>(kAncestryMax));
  EXPECT_TRUE(found->truncated);
  EXPECT_FALSE(found->cycle);
}

// P6.
TEST_F(PatchesTest, NoReadScansOrSorts) {
  sqlite::Database db;
  ASSERT_TRUE(db.open(dir_ + "/patches.db", {"test"}));
  for (const std::string& sql : Patches::read_statements()) {
    sqlite::Statement plan;
    ASSERT_EQ(plan.prepare(db.get(), "EXPLAIN QUERY PLAN " + sql), sqlite::kOk)
        << sql;
    int steps = 0;
    while (plan.step() == sqlite::kRow) {
      ++steps;
      std::string what(plan.text_at(3));
      EXPECT_EQ(what.rfind("SEARCH ", 0), 0u) << sql << ": " << what;
      bool indexed = what.find("USING") != std::string::npos;
      EXPECT_TRUE(indexed) << sql << ": " << what;
    }
    EXPECT_EQ(steps, 1) << sql << " does more than search";
  }
}

// --- P4, P5: damage ---

TEST_F(PatchesTest, ANewFileOwesARebuildWhichFillsOnlyWhatIsMissing) {
  EXPECT_TRUE(patches_->rebuild_owed());
  HistoryChange known = ended(payload(), applied());
  take({known});
  ASSERT_TRUE(patches_->begin_rebuild());
  EndedJob job;
  job.id = known.id;
  job.kind = kPatchKind;
  job.payload = payload().dump();
  job.result = R"({"outcome":"conflict"})";
  ASSERT_TRUE(patches_->add(job));
  EXPECT_EQ(find(to_string(known.id))->outcome, "applied");
  job.id = make_job_id(kNow - 1000, 1, 99);
  ASSERT_TRUE(patches_->add(job));
  EXPECT_EQ(find(to_string(job.id))->outcome, "conflict");
  open();
  EXPECT_TRUE(patches_->rebuild_owed()) << "it was not ended";
  ASSERT_TRUE(patches_->begin_rebuild());
  ASSERT_TRUE(patches_->end_rebuild());
  EXPECT_FALSE(patches_->rebuild_owed());
  open();
  EXPECT_FALSE(patches_->rebuild_owed());
  EXPECT_EQ(ids({}).size(), 2u);
}

TEST_F(PatchesTest, ADamagedFileIsPutAsideAndBegunAnew) {
  put(payload(), applied());
  ASSERT_TRUE(patches_->end_rebuild());
  patches_.reset();
  std::ofstream(dir_ + "/patches.db", std::ios::trunc) << "no database at all";
  open();
  EXPECT_TRUE(fs::exists(dir_ + "/patches.db.damaged"));
  EXPECT_TRUE(patches_->rebuild_owed());
  EXPECT_TRUE(ids({}).empty());
  std::string id = put(payload(), applied());
  EXPECT_TRUE(find(id));
}

TEST_F(PatchesTest, DamageThatShowsLaterIsPutAsideToo) {
  for (int i = 0; i < 50; ++i) put(payload(), applied());
  patches_.reset();
  {  // every page but the first
    std::fstream file(dir_ + "/patches.db",
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(0, std::ios::end);
    auto size = static_cast<std::size_t>(file.tellp());
    ASSERT_GT(size, 8192u);
    file.seekp(4096);
    file << std::string(size - 4096, '\x5a');
  }
  auto opened = Patches::open(dir_, store_.get(), limits_);
  ASSERT_TRUE(opened) << opened.error().what;
  patches_ = std::move(*opened);
  std::string id = put(payload(), applied());
  EXPECT_TRUE(find(id));
  EXPECT_TRUE(patches_->rebuild_owed());
  EXPECT_TRUE(fs::exists(dir_ + "/patches.db.damaged"));
}

// What the first version made, as it made it, with a patch and its rollback.
constexpr char kVersion1[] = R"(
CREATE TABLE meta(key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta(key,value) VALUES('patches',0),('reverse_bytes',0),
  ('rebuild',1);
CREATE TABLE patches(
  patch_id TEXT NOT NULL PRIMARY KEY, lsn INTEGER NOT NULL, state TEXT NOT NULL,
  outcome TEXT NOT NULL, reason TEXT NOT NULL, repo TEXT NOT NULL,
  base_rev TEXT NOT NULL, base_commit TEXT NOT NULL, commit_id TEXT NOT NULL,
  branch TEXT NOT NULL, pushed INTEGER NOT NULL, description TEXT NOT NULL,
  author TEXT NOT NULL, parent_patch_id TEXT, diff_digest TEXT NOT NULL,
  approval TEXT NOT NULL, approval_actor TEXT NOT NULL,
  approval_comment TEXT NOT NULL, approval_digest TEXT NOT NULL,
  approval_at INTEGER NOT NULL, lines_added INTEGER NOT NULL,
  lines_removed INTEGER NOT NULL, file_count INTEGER NOT NULL,
  tests_before TEXT NOT NULL, tests_after TEXT NOT NULL,
  newly_failing TEXT NOT NULL, newly_passing TEXT NOT NULL,
  newly_failing_count INTEGER NOT NULL, newly_passing_count INTEGER NOT NULL,
  reverse_diff_bytes INTEGER NOT NULL, rolled_back_by TEXT,
  created INTEGER NOT NULL, finished INTEGER NOT NULL);
CREATE INDEX patches_by_repo ON patches(repo, patch_id);
CREATE INDEX patches_by_outcome ON patches(outcome, patch_id);
CREATE TABLE files(
  patch_id TEXT NOT NULL, position INTEGER NOT NULL, path TEXT NOT NULL,
  old_path TEXT NOT NULL, added INTEGER NOT NULL, removed INTEGER NOT NULL,
  sha256_before TEXT NOT NULL, sha256_after TEXT NOT NULL,
  PRIMARY KEY(patch_id, position)) WITHOUT ROWID;
CREATE INDEX files_by_path ON files(path, patch_id);
CREATE TABLE provenance(
  patch_id TEXT NOT NULL, position INTEGER NOT NULL, origin TEXT NOT NULL,
  vector_id TEXT NOT NULL, influence REAL,
  license TEXT NOT NULL COLLATE NOCASE,
  PRIMARY KEY(patch_id, position)) WITHOUT ROWID;
CREATE INDEX provenance_by_license ON provenance(license, patch_id);
CREATE INDEX provenance_by_vector ON provenance(vector_id, patch_id);
CREATE TABLE branch_log(
  patch_id TEXT NOT NULL, ts INTEGER NOT NULL, job_id TEXT NOT NULL,
  action TEXT NOT NULL, branch TEXT NOT NULL, commit_id TEXT NOT NULL,
  PRIMARY KEY(patch_id, ts, job_id, action)) WITHOUT ROWID;
CREATE TABLE rollbacks(
  patch_id TEXT NOT NULL, job_id TEXT NOT NULL, lsn INTEGER NOT NULL,
  state TEXT NOT NULL, outcome TEXT NOT NULL, region TEXT NOT NULL,
  branch TEXT NOT NULL, commit_id TEXT NOT NULL, reason TEXT NOT NULL,
  pushed INTEGER NOT NULL, verified INTEGER NOT NULL,
  restored INTEGER NOT NULL, created INTEGER NOT NULL,
  finished INTEGER NOT NULL, PRIMARY KEY(patch_id, job_id)) WITHOUT ROWID;
CREATE INDEX rollbacks_by_job ON rollbacks(job_id);
CREATE TABLE unblocks(
  job_id TEXT NOT NULL PRIMARY KEY, lsn INTEGER NOT NULL, ts INTEGER NOT NULL,
  actor TEXT NOT NULL, input TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE reverse_diffs(
  patch_id TEXT NOT NULL PRIMARY KEY, bytes BLOB NOT NULL);
)";

// P5: an old file opens, nothing of it is lost, and what is new is filled in
// from the jobs that history still has, once.
TEST_F(PatchesTest, AnEarlierSchemaIsBroughtUpAndFilledIn) {
  patches_.reset();
  fs::remove_all(dir_);
  fs::create_directory(dir_);
  const JobId known = make_job_id(kNow, 1, 1), gone = make_job_id(kNow, 2, 2);
  {
    sqlite::Database db;
    ASSERT_TRUE(db.open(dir_ + "/patches.db", {"test", kVersion1, 1}));
    std::string rows;
    for (const JobId& id : {known, gone}) {
      const std::string name = to_string(id);
      rows +=
          "INSERT INTO patches VALUES('" + name +
          "',70,'succeeded','applied','','r','HEAD','','','review/x',1,'old',"
          "'',NULL,'','approved','ann','','',5,1,1,1,'','','[]','[]',0,0,0,"
          "'back',1,2);"
          "INSERT INTO files VALUES('" +
          name +
          "',0,'a.py','',1,1,'','');"
          "INSERT INTO provenance VALUES('" +
          name +
          "',0,'o','v',0.5,'MIT');"
          "INSERT INTO branch_log VALUES('" +
          name +
          "',1,'j','pushed','b','');"
          "INSERT INTO rollbacks VALUES('" +
          name +
          "','back',80,'succeeded',"
          "'rolled_back','','b','','',1,1,1,3,4);";
    }
    rows +=
        "UPDATE meta SET value=2 WHERE key='patches';"
        "UPDATE meta SET value=0 WHERE key='rebuild';";
    ASSERT_TRUE(db.execute(rows.c_str()));
  }
  open();
  EXPECT_TRUE(patches_->rebuild_owed());
  auto old = find(to_string(gone));
  ASSERT_TRUE(old);
  EXPECT_EQ(old->description, "old");
  EXPECT_EQ(old->rollbacks.size(), 1u);
  EXPECT_EQ(old->sources.size(), 1u);
  EXPECT_FALSE(old->metrics);

  ASSERT_TRUE(patches_->begin_rebuild());
  EndedJob job;
  job.id = known;
  job.kind = kPatchKind;
  Json asked = payload();
  asked["test"] = {{"select", {"t.py"}}};
  asked["provenance"] = {{{"vector_id", "v"},
                          {"influence", 0.5},
                          {"license", "MIT"},
                          {"license_text", "abc"},
                          {"session_id", "s"}}};
  job.payload = asked.dump();
  job.result = applied().dump();
  job.created_ms = kNow;
  job.finished_ms = kNow + 4000;
  ASSERT_TRUE(patches_->add(job));
  ASSERT_TRUE(patches_->end_rebuild());
  auto now = find(to_string(known));
  ASSERT_TRUE(now);
  EXPECT_EQ(now->approval.actor, "ann") << "what was learned since stays";
  EXPECT_EQ(now->rolled_back_by, "back");
  EXPECT_EQ(now->description, "old");
  EXPECT_EQ(now->suite, R"({"select":["t.py"]})");
  ASSERT_EQ(now->sources.size(), 1u);
  EXPECT_EQ(now->sources[0].session_id, "s");
  ASSERT_TRUE(now->metrics);
  EXPECT_EQ(now->metrics->tests_passed, 11);
  // Once: what is written under this schema is not touched again.
  asked["test"] = {{"select", {"other.py"}}};
  job.payload = asked.dump();
  ASSERT_TRUE(patches_->add(job));
  EXPECT_EQ(find(to_string(known))->suite, R"({"select":["t.py"]})");
  PatchQuery query;
  query.session = "s";
  EXPECT_EQ(ids(query), std::vector<std::string>({to_string(known)}));
  // What ends from now on is written whole, beside the old ones.
  open();
  EXPECT_FALSE(patches_->rebuild_owed());
  const std::string fresh = put(asked, applied());
  EXPECT_EQ(ids({}).size(), 3u);
  EXPECT_EQ(find(fresh)->suite, R"({"select":["other.py"]})");
}

// --- P7: the tenant's column, beside a program that has none ---

// What version 0.1.0 added to kVersion1, and its schema's number.
constexpr char kVersion2[] = R"(
ALTER TABLE patches ADD COLUMN suite TEXT NOT NULL DEFAULT '';
ALTER TABLE patches ADD COLUMN written INTEGER NOT NULL DEFAULT 1;
ALTER TABLE rollbacks ADD COLUMN tests TEXT NOT NULL DEFAULT '';
ALTER TABLE provenance ADD COLUMN license_fingerprint TEXT NOT NULL DEFAULT '';
ALTER TABLE provenance ADD COLUMN session_id TEXT NOT NULL DEFAULT '';
ALTER TABLE provenance ADD COLUMN retrieved_at TEXT NOT NULL DEFAULT '';
ALTER TABLE provenance ADD COLUMN semantic_alerts TEXT NOT NULL DEFAULT '';
CREATE INDEX patches_by_digest ON patches(diff_digest, patch_id);
CREATE INDEX provenance_by_fingerprint
  ON provenance(license_fingerprint, patch_id);
CREATE INDEX provenance_by_session ON provenance(session_id, patch_id);
CREATE TABLE contributors(
  patch_id TEXT NOT NULL, vector_id TEXT NOT NULL, session_id TEXT NOT NULL,
  influence REAL NOT NULL,
  PRIMARY KEY(patch_id, vector_id, session_id)) WITHOUT ROWID;
CREATE TABLE metrics(
  patch_id TEXT NOT NULL PRIMARY KEY, tests_passed INTEGER,
  tests_failed INTEGER, errors INTEGER, flaky INTEGER,
  error_trace_count INTEGER NOT NULL, lines_changed INTEGER NOT NULL,
  context_tokens INTEGER, patch_difficulty REAL, effort_estimate REAL,
  roi_tag TEXT NOT NULL, enhancement_name TEXT NOT NULL,
  enhancement_score REAL, start_time INTEGER NOT NULL,
  time_to_completion INTEGER NOT NULL) WITHOUT ROWID;
UPDATE meta SET value=1 WHERE key='rebuild';
)";
constexpr int kVersion2Number = 2;
// How version 0.1.0 reads and writes a patch's row.
constexpr char kVersion2Columns[] =
    "patch_id,state,outcome,reason,repo,base_rev,base_commit,commit_id,branch,"
    "pushed,description,author,parent_patch_id,diff_digest,approval,"
    "approval_actor,approval_comment,approval_digest,approval_at,lines_added,"
    "lines_removed,file_count,tests_before,tests_after,newly_failing,"
    "newly_passing,newly_failing_count,newly_passing_count,reverse_diff_bytes,"
    "rolled_back_by,created,finished";

std::string version2_insert(const std::string& id) {
  return std::string("INSERT OR REPLACE INTO patches(") + kVersion2Columns +
         ",lsn,suite,written) VALUES('" + id +
         "','succeeded','applied','','r','HEAD','','','review/x',1,'old','',"
         "NULL,'','approved','ann','','',5,1,1,1,'','','[]','[]',0,0,0,NULL,1,"
         "2,70,'',2)";
}

TEST_F(PatchesTest, AFileOfVersion010IsOpenedReadAndWritten) {
  patches_.reset();
  fs::remove_all(dir_);
  fs::create_directory(dir_);
  const std::string old = to_string(make_job_id(kNow, 1, 1));
  {
    sqlite::Database db;
    const std::string schema = std::string(kVersion1) + kVersion2;
    ASSERT_TRUE(db.open(dir_ + "/patches.db",
                        {"test", schema.c_str(), kVersion2Number}));
    ASSERT_TRUE(db.execute(version2_insert(old).c_str()));
    ASSERT_TRUE(
        db.execute("UPDATE meta SET value=1 WHERE key='patches';"
                   "UPDATE meta SET value=0 WHERE key='rebuild'"));
  }
  for (int i = 0; i < 2; ++i) {  // the column is added once
    open();
    EXPECT_FALSE(patches_->rebuild_owed());
    ASSERT_TRUE(find(old));
    EXPECT_EQ(find(old)->tenant, "default");
    EXPECT_EQ(find(old)->description, "old");
  }
  next_ = 100;
  EXPECT_EQ(find(put(payload(), applied()))->tenant, "default");
  EXPECT_EQ(ids({}).size(), 2u);
}

TEST_F(PatchesTest, Version010ReadsAndWritesWhatThisVersionWrote) {
  HistoryChange change = ended(payload(), applied());
  EnqueueRecord body = *change.body;
  body.job.tenant = "ours";
  change.body = std::make_shared<EnqueueRecord>(body);
  take({change});
  const std::string ours = to_string(change.id);
  const std::string theirs = to_string(make_job_id(kNow, 1, 1));
  patches_.reset();
  {
    sqlite::Database db;
    // Code::newer where the schema's number is greater.
    auto opened = db.open(dir_ + "/patches.db", {"test", "", kVersion2Number});
    ASSERT_TRUE(opened) << opened.error().what;
    sqlite::Statement row;
    ASSERT_EQ(row.prepare(db.get(), std::string("SELECT ") + kVersion2Columns +
                                        " FROM patches WHERE patch_id=?1"),
              sqlite::kOk);
    row.text(1, ours);
    ASSERT_EQ(row.step(), sqlite::kRow);
    EXPECT_EQ(row.text_at(4), "/srv/repo");
    row.reset();
    ASSERT_TRUE(db.execute(version2_insert(theirs).c_str()));
  }
  open();
  EXPECT_EQ(find(ours)->tenant, "ours");
  EXPECT_EQ(find(theirs)->tenant, "default");
  EXPECT_EQ(find(theirs)->description, "old");
}

// --- BP9: what a patch was made from, and what is counted of it ---

TEST_F(PatchesTest, LicencesSessionsAndDigestsAreFoundAndOnlyThose) {
  // sha256("abc") and sha256("") by sha256sum.
  const std::string abc =
      "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  const std::string none =
      "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
  const auto from = [&](const Json& sources, const std::string& diff) {
    Json asked = payload();
    asked["diff"] = diff;
    asked["provenance"] = sources;
    return put(asked, applied());
  };
  const std::string by_text = from(
      {{{"license", "MIT"}, {"license_text", "abc"}, {"session_id", "s1"}}},
      "abc");
  const std::string by_hash = from({{{"license", "Apache-2.0"},
                                     {"license_fingerprint", "sha256:" + abc},
                                     {"session_id", "s2"}}},
                                   "other");
  const std::string neither = from({{{"license", "MIT-0"}}}, "third");
  const auto found = [&](auto member, const std::string& value) {
    PatchQuery query;
    query.*member = value;
    return ids(query);
  };
  using Ids = std::vector<std::string>;
  EXPECT_EQ(found(&PatchQuery::license_fingerprint, abc),
            Ids({by_hash, by_text}));
  EXPECT_EQ(found(&PatchQuery::license_fingerprint, none), Ids());
  EXPECT_EQ(found(&PatchQuery::license, "mit"), Ids({by_text}));
  EXPECT_EQ(found(&PatchQuery::license, "MIT-0"), Ids({neither}));
  EXPECT_EQ(found(&PatchQuery::session, "s2"), Ids({by_hash}));
  EXPECT_EQ(found(&PatchQuery::session, "s"), Ids());
  EXPECT_EQ(found(&PatchQuery::diff_digest, "sha256:" + abc), Ids({by_text}));
  PatchQuery both;
  both.license_fingerprint = abc;
  both.session = "s1";
  both.diff_digest = "sha256:" + abc;
  EXPECT_EQ(ids(both), Ids({by_text}));
  both.session = "s2";
  EXPECT_EQ(ids(both), Ids());
  EXPECT_EQ(find(by_text)->sources[0].license_fingerprint, abc);
  EXPECT_EQ(find(neither)->sources[0].license_fingerprint, "");
}

TEST_F(PatchesTest, ContributorsAreSummedAndSorted) {
  Json asked = payload();
  asked["provenance"] = {
      {{"vector_id", "a"}, {"influence", 0.25}, {"session_id", "s"}},
      {{"vector_id", "b"}, {"influence", 0.4}, {"session_id", "s"}},
      {{"vector_id", "a"}, {"influence", 0.25}, {"session_id", "s"}},
      {{"vector_id", "a"}, {"influence", 0.125}},
      {{"origin", "a person"}, {"influence", 9}}};
  const std::string id = put(asked, applied());
  const auto patch = find(id);
  ASSERT_EQ(patch->contributors.size(), 3u);
  EXPECT_EQ(patch->contributors[0].vector_id, "a");
  EXPECT_EQ(patch->contributors[0].session_id, "s");
  EXPECT_EQ(patch->contributors[0].influence, 0.5);
  EXPECT_EQ(patch->contributors[1].vector_id, "b");
  EXPECT_EQ(patch->contributors[2].session_id, "");
}

TEST_F(PatchesTest, MetricsAreCountedAndTheScoreIsTheWeightedSum) {
  Json asked = payload();
  asked["context"] = {{"context_tokens", 1200},  {"patch_difficulty", 3.5},
                      {"effort_estimate", 2},    {"roi_tag", "high-ROI"},
                      {"enhancement_name", "n"}, {"else", {1, 2}}};
  Json answered = applied();
  answered["tests"]["after"] = {
      {"passed", 11}, {"failed", 2}, {"errors", 1}, {"flaky", 4}};
  HistoryChange change = ended(asked, answered);
  change.finished_ms = change.body->created_ms + 3000;
  take({change});
  auto metrics = find(to_string(change.id))->metrics;
  ASSERT_TRUE(metrics);
  EXPECT_EQ(metrics->tests_passed, 11);
  EXPECT_EQ(metrics->tests_failed, 2);
  EXPECT_EQ(metrics->errors, 1);
  EXPECT_EQ(metrics->flaky, 4);
  EXPECT_EQ(metrics->error_trace_count, 3);
  EXPECT_EQ(metrics->lines_changed, 4);
  EXPECT_EQ(metrics->context_tokens, 1200);
  EXPECT_EQ(metrics->roi_tag, "high-ROI");
  EXPECT_EQ(metrics->time_to_completion_ms, 3000);
  // 3.5 - 0.5*3 + 2*11 - 2 - 1.5*3 + 0.5*2
  ASSERT_TRUE(metrics->enhancement_score);
  EXPECT_DOUBLE_EQ(*metrics->enhancement_score, 18.5);

  // Without tests there is no score; what is of another shape is left out.
  asked["context"] = {{"context_tokens", "many"},
                      {"patch_difficulty", nullptr}};
  metrics = find(put(asked, {{"outcome", "conflict"}}, State::failed))->metrics;
  ASSERT_TRUE(metrics);
  EXPECT_FALSE(metrics->enhancement_score);
  EXPECT_FALSE(metrics->tests_passed);
  EXPECT_FALSE(metrics->context_tokens);
  EXPECT_FALSE(metrics->patch_difficulty);
}

// An explicit retry takes all of a patch away, the new tables' rows too.
TEST_F(PatchesTest, ARetryLeavesNoContributorsBehind) {
  Json asked = payload();
  asked["provenance"] = {{{"vector_id", "a"}, {"session_id", "one"}}};
  HistoryChange change = ended(asked, applied());
  take({change});
  take({left(change.id, change.lsn + 1)});
  sqlite::Database db;
  ASSERT_TRUE(db.open(dir_ + "/patches.db", {"test"}));
  for (const char* table : {"contributors", "metrics", "provenance"}) {
    sqlite::Statement count;
    ASSERT_EQ(
        count.prepare(db.get(), std::string("SELECT count(*) FROM ") + table),
        sqlite::kOk);
    ASSERT_EQ(count.step(), sqlite::kRow);
    EXPECT_EQ(count.number_at(0), 0) << table;
  }
}

TEST_F(PatchesTest, ALaterSchemaIsRefusedAndUntouched) {
  patches_.reset();
  {
    sqlite::Database db;
    ASSERT_TRUE(db.open(dir_ + "/patches.db", {"test", "", 2}));
    ASSERT_TRUE(db.execute("PRAGMA user_version=99"));
  }
  auto opened = Patches::open(dir_, store_.get(), limits_);
  ASSERT_FALSE(opened);
  EXPECT_EQ(opened.error().code, Code::newer);
  EXPECT_NE(opened.error().what.find("version 99"), std::string::npos);
  EXPECT_FALSE(fs::exists(dir_ + "/patches.db.damaged"));
}

// The queue goes on where this store cannot; what is missing is owed.
TEST_F(PatchesTest, AStoreThatCannotWriteGivesUpAndOwesARebuild) {
  ASSERT_TRUE(patches_->end_rebuild());
  sqlite::Database db;
  ASSERT_TRUE(db.open(dir_ + "/patches.db", {"test", "", 2}));
  ASSERT_TRUE(db.execute(
      "CREATE TRIGGER no BEFORE INSERT ON patches BEGIN SELECT RAISE(ABORT, "
      "'told to'); END"));
  HistoryChange change = ended(payload(), applied());
  for (int i = 1; i < kTakeFailuresMax; ++i) {
    EXPECT_FALSE(patches_->take({change}));
  }
  EXPECT_TRUE(patches_->take({change}));
  EXPECT_TRUE(patches_->take({change})) << "it is not asked for again";
  EXPECT_FALSE(find(to_string(change.id)));
  ASSERT_TRUE(db.execute("DROP TRIGGER no"));
  std::string id = put(payload(), applied());
  EXPECT_TRUE(find(id));
  EXPECT_TRUE(patches_->rebuild_owed());
  open();
  EXPECT_TRUE(patches_->rebuild_owed()) << "forgotten at a restart";
}

// What is no patch costs nothing: no transaction, no sync.
TEST_F(PatchesTest, OtherJobsAreNotWritten) {
  std::vector<HistoryChange> many;
  for (int i = 0; i < 2000; ++i) {
    many.push_back(ended(payload(), applied(), State::succeeded, "noop"));
  }
  auto size = [&] { return fs::file_size(dir_ + "/patches.db-wal"); };
  put(payload(), applied());
  auto before = size();
  auto began = std::chrono::steady_clock::now();
  take(many);
  auto took = std::chrono::steady_clock::now() - began;
  EXPECT_EQ(size(), before);
  EXPECT_LT(took, std::chrono::seconds(2));
}

}  // namespace
}  // namespace machina
