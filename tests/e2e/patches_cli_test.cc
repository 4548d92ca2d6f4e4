// The verbs about patches as a person at a terminal meets them: machina
// patches list, show, ancestry, search, and unblock. The patches are the work
// of a worker played over HTTP, so that they can say anything.

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

class PatchesCli : public EndToEnd {
 protected:
  void SetUp() override {
    EndToEnd::SetUp();
    if (!product_) return;
    Serve serve;
    serve.workers = 0;
    start(serve);
    ASSERT_EQ(p().shell("mkdir -p " + p().root() + "/repos/r/.git"), 0);
  }

  Ended cli(std::vector<std::string> args) {
    return p().run(std::move(args), {{"MACHINA_ROOT", p().root()}});
  }
  Ended patches(std::vector<std::string> args) {
    args.insert(args.begin(), "patches");
    return cli(std::move(args));
  }

  // A patch.apply job in a worker's hands; its lease.
  Json leased(const Json& more = Json::object()) {
    Json payload = {{"repo", "r"},
                    {"diff", "--- a/f\n+++ b/f\n@@ -1 +1 @@\n-a\n+b\n"}};
    payload.update(more);
    p().submit({{"kind", "patch.apply"}, {"payload", payload}});
    const Answer answer = p().post("/v1/leases", {{"worker", "played"},
                                                  {"isolation_level", "L4"},
                                                  {"kinds", {"patch.apply"}}});
    EXPECT_EQ(answer.status, 200) << answer.body;
    return answer.json()["leases"][0];
  }
  static std::string at(const Json& lease) {
    return "/v1/leases/" + lease["token"].get<std::string>();
  }
  // The id of a patch that ended so.
  std::string patch(const Json& payload = Json::object(),
                    const Json& result = Json::object()) {
    const Json lease = leased(payload);
    Json all = {{"outcome", "applied"},
                {"commit", std::string(40, 'c')},
                {"base_commit", std::string(40, 'b')},
                {"branch", "review/x"},
                {"pushed", true},
                {"files",
                 {{{"path", "f"},
                   {"added", 2},
                   {"removed", 1},
                   {"sha256_before", std::string(64, '1')},
                   {"sha256_after", std::string(64, '2')}}}}};
    all.update(result);
    const bool good = all["outcome"] == "applied";
    const Answer answer =
        p().post(at(lease) + "/complete",
                 {{"verdict", good ? "pass" : "fail"}, {"result", all}});
    EXPECT_EQ(answer.status, 200) << answer.body;
    sleep_ms(2);  // ids are in order of the millisecond
    return lease["job"]["id"];
  }
  static bool has(const std::string& text, const std::string& what) {
    return text.find(what) != std::string::npos;
  }
  static int lines(const std::string& text) {
    return static_cast<int>(std::count(text.begin(), text.end(), '\n'));
  }
};

TEST_P(PatchesCli, AnEmptyListIsAHeadAndAnEmptyArray) {
  Ended ended = patches({"list"});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_EQ(lines(ended.out), 1) << ended.out;
  EXPECT_TRUE(ended.out.starts_with("PATCH  OUTCOME")) << ended.out;
  ended = patches({"list", "--json"});
  EXPECT_EQ(ended.code, 0);
  EXPECT_EQ(Json::parse(ended.out)["patches"], Json::array());
}

TEST_P(PatchesCli, ListsFiltersAndPages) {
  const std::string a = patch({{"description", "the first\nand more"}});
  const std::string b =
      patch({{"repo", p().root() + "/repos/r"}},
            {{"outcome", "conflict"}, {"branch", nullptr}, {"pushed", false}});
  const std::string c = patch();
  Ended ended = patches({"list"});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_EQ(lines(ended.out), 4) << ended.out;
  EXPECT_LT(ended.out.find(c), ended.out.find(b));  // newest first
  EXPECT_LT(ended.out.find(b), ended.out.find(a));
  EXPECT_TRUE(has(ended.out, "the first\n")) << ended.out;
  EXPECT_TRUE(has(ended.out, "+2 -1")) << ended.out;

  ended = patches({"list", "--outcome", "conflict", "--json"});
  Json page = Json::parse(ended.out);
  ASSERT_EQ(page["patches"].size(), 1u) << ended.out;
  EXPECT_EQ(page["patches"][0]["patch_id"], b);
  // A repository by each of its names.
  for (const std::string& repo :
       {std::string("r"), p().root() + "/repos/r", p().root() + "/repos/r/"}) {
    ended = patches({"list", "--repo", repo});
    EXPECT_EQ(lines(ended.out), 4) << repo << ended.out << ended.err;
  }

  ended = patches({"list", "--limit", "2"});
  EXPECT_TRUE(
      has(ended.out, "there is more: machina patches list --cursor " + b))
      << ended.out;
  ended = patches({"list", "--limit", "2", "--cursor", b});
  EXPECT_EQ(lines(ended.out), 2) << ended.out;
  EXPECT_TRUE(has(ended.out, a));
}

TEST_P(PatchesCli, WhatIsWrongIsSaidWithItsValueAndWhatThereIs) {
  struct Row {
    std::vector<std::string> args;
    int code;
    std::vector<std::string> words;
  };
  const std::string none = "01900000-0000-7000-8000-000000000001";
  for (const Row& row : std::vector<Row>{
           {{"list", "--outcome", "zzz"},
            4,
            {"outcome", "zzz", "tests_failed"}},
           {{"list", "--repo", "/etc"}, 4, {"repo", "/etc", "/repos"}},
           {{"list", "--limit", "0"}, 2, {"--limit"}},
           {{"list", "--cursor", "x"}, 4, {"cursor"}},
           {{"search"}, 2, {"--license", "--vector", "--path"}},
           {{"show", none}, 4, {none, "not known"}},
           {{"show", "latest"}, 4, {"latest", "machina patches list"}},
           {{"ancestry", none}, 4, {none, "not known"}},
           {{"show"}, 2, {"id"}},
           {{}, 2, {"subcommand"}},
       }) {
    const Ended ended = patches(row.args);
    EXPECT_EQ(ended.code, row.code) << ended.out << ended.err;
    EXPECT_EQ(ended.out, "");
    for (const std::string& word : row.words) {
      EXPECT_TRUE(has(ended.err, word)) << word << ": " << ended.err;
    }
  }
  // As JSON the refusal is the answer.
  const Ended ended = patches({"show", none, "--json"});
  EXPECT_EQ(ended.code, 4);
  EXPECT_EQ(Json::parse(ended.out)["status"], 404) << ended.out;
}

TEST_P(PatchesCli, ShowsAPatchWholeAndItsAncestry) {
  const std::string kAbc =  // sha256("abc")
      "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  const std::string root = patch({{"description", "root"}});
  const std::string child =
      patch({{"description", "child"},
             {"author", "Ann Bee <ann@example.com>"},
             {"parent_patch_id", root},
             {"provenance",
              {{{"origin", "model"},
                {"vector_id", "v7"},
                {"influence", 0.5},
                {"license", "MIT"},
                {"license_text", "abc"},
                {"session_id", "s-42"},
                {"retrieved_at", "2026-01-31T12:00:00Z"},
                {"semantic_alerts", {"looks like a secret"}}},
               {{"origin", "weak"}, {"influence", 0.1}}}},
             {"context", {{"context_tokens", 1234}, {"roi_tag", "high-ROI"}}}},
            {{"tests",
              {{"before", {{"passed", 3}, {"failed", 1}}},
               {"after", {{"passed", 4}, {"failed", 0}}},
               {"newly_failing", Json::array()},
               {"newly_passing", {"test_m::test_two"}}}}});
  Ended ended = patches({"show", child});
  EXPECT_EQ(ended.code, 0) << ended.err;
  for (const std::string& word :
       {child, root, std::string("applied"), std::string("Ann Bee"),
        std::string(40, 'b'), std::string(40, 'c'), std::string("review/x"),
        std::string("test_m::test_two"), std::string("111111111111"),
        std::string("v7"), std::string("MIT"), std::string("committed"),
        std::string("ba7816bf8f01"), std::string("s-42"),
        std::string("looks like a secret"), std::string("CONTRIBUTOR"),
        std::string("tokens      1234"), std::string("tag         high-ROI"),
        std::string("pushed      yes")}) {
    EXPECT_TRUE(has(ended.out, word)) << word << "\n" << ended.out;
  }
  ended = patches({"show", child, "--json"});
  EXPECT_EQ(Json::parse(ended.out), p().get("/v1/patches/" + child).json());

  ended = patches({"ancestry", child});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_EQ(lines(ended.out), 3) << ended.out;
  EXPECT_LT(ended.out.find("child"), ended.out.find("root"));
  EXPECT_TRUE(has(ended.out, "v7 and 1 more")) << ended.out;
  const std::string stranger = "01900000-0000-7000-8000-0000000000ff";
  const std::string orphan = patch({{"parent_patch_id", stranger}});
  ended = patches({"ancestry", orphan});
  EXPECT_TRUE(has(ended.out, "not known: " + stranger)) << ended.out;

  for (const auto& [flag, value] :
       std::vector<std::pair<std::string, std::string>>{
           {"--license", "mit"},
           {"--vector", "v7"},
           {"--license-fingerprint", kAbc},
           {"--session", "s-42"}}) {
    ended = patches({"search", flag, value});
    EXPECT_EQ(ended.code, 0) << ended.err;
    EXPECT_EQ(lines(ended.out), 2) << ended.out;
    EXPECT_TRUE(has(ended.out, child)) << ended.out;
  }
  // What a source may hold is checked where it is submitted.
  for (const auto& [member, value] : std::vector<std::pair<std::string, Json>>{
           {"license_fingerprint", "abc"},
           {"retrieved_at", "yesterday"},
           {"retrieved_at", "2026-13-01T00:00:00Z"},
           {"semantic_alerts", "one"},
           {"session_id", 7},
           {"weight", 1}}) {
    const Answer answer = p().post(
        "/v1/jobs", {{"kind", "patch.apply"},
                     {"payload",
                      {{"repo", "r"},
                       {"diff", "--- a/f\n+++ b/f\n@@ -1 +1 @@\n-a\n+b\n"},
                       {"provenance", {{{member, value}}}}}}});
    EXPECT_EQ(answer.status, 400) << answer.body;
    EXPECT_EQ(answer.json().value("field", ""),
              "payload.provenance[0]." + member)
        << answer.body;
  }
  const Json record = p().get("/v1/patches/" + child).json();
  ended = patches(
      {"search", "--diff-digest", record["diff_digest"].get<std::string>()});
  EXPECT_EQ(lines(ended.out), 4) << ended.out << ended.err;
  ended = patches({"search", "--license-fingerprint", kAbc, "--json"});
  EXPECT_EQ(Json::parse(ended.out)["patches"].size(), 1u);
  EXPECT_EQ(lines(patches({"search", "--path", "f"}).out), 4);
  ended = patches({"search", "--path", "f", "--limit", "1"});
  EXPECT_TRUE(has(ended.out, "machina patches search --path f --cursor"))
      << ended.out;
  EXPECT_EQ(lines(patches({"search", "--vector", "none"}).out), 1);
}

// A terminal that would turn, hide or obey what a stranger wrote.
TEST_P(PatchesCli, NothingHostileReachesTheTerminal) {
  const std::string evil =
      "a\u202e\u2066\u200b\u200f\u061c\ufeff\u009b2J\x1b[2J\rb";
  const std::string shown =
      "a\\u202e\\u2066\\u200b\\u200f\\u061c\\ufeff\\u009b2J\\u001b[2J\\u000db";
  const std::string id =
      patch({{"description", evil},
             {"provenance",
              {{{"origin", evil}, {"vector_id", evil}, {"license", evil}}}}},
            {{"reason", evil},
             {"branch", evil},
             {"files", {{{"path", evil}, {"added", 1}, {"removed", 0}}}},
             {"tests",
              {{"before", {{"passed", 1}}},
               {"after", {{"passed", 1}}},
               {"newly_failing", {evil}},
               {"newly_passing", {evil}}}}});
  for (const std::vector<std::string>& args :
       std::vector<std::vector<std::string>>{
           {"patches", "list"},
           {"patches", "show", id},
           {"patches", "ancestry", id},
           {"patches", "search", "--path", evil},
           {"get", id}}) {
    const Ended ended = cli(args);
    EXPECT_EQ(ended.code, 0) << ended.err;
    EXPECT_TRUE(has(ended.out, args[0] == "get" ? "\\u202e" : shown))
        << ended.out;
    for (const char* bad : {"\u202e", "\u2066", "\u200b", "\u200f", "\u061c",
                            "\ufeff", "\u009b", "\x1b", "\r"}) {
      EXPECT_FALSE(has(ended.out, bad)) << args[0] << " " << args[1];
    }
  }
  // Programs get what is there.
  const Ended ended = patches({"show", id, "--json"});
  EXPECT_EQ(Json::parse(ended.out)["description"], evil);
  // Nor by way of a message: of a refusal, of what was asked for.
  for (const std::vector<std::string>& args :
       std::vector<std::vector<std::string>>{{"patches", "show", evil},
                                             {"unblock", evil},
                                             {"list", "--state", evil}}) {
    const Ended refused = cli(args);
    EXPECT_EQ(refused.code, 4) << refused.out << refused.err;
    for (const char* bad : {"\u202e", "\u009b", "\x1b", "\r"}) {
      EXPECT_FALSE(has(refused.err, bad)) << refused.err;
    }
  }
}

TEST_P(PatchesCli, UnblockSaysWhatIsAskedAndWhatIsMissing) {
  const std::string digest = "sha256:" + std::string(64, '7');
  const std::string base(40, 'b');
  const Json lease = leased();
  const std::string id = lease["job"]["id"];
  ASSERT_EQ(p().post(at(lease) + "/block",
                     {{"reason", "approval"},
                      {"data",
                       {{"digest", digest},
                        {"base_commit", base},
                        {"files",
                         {{{"path", "f\u202e"}, {"added", 2}, {"removed", 1}}}},
                        {"files_truncated", true}}}})
                .status,
            200);
  Ended ended = cli({"unblock", id});
  EXPECT_EQ(ended.code, 2);
  for (const std::string& word : {digest, base, std::string("f\\u202e  +2 -1"),
                                  std::string("and more")}) {
    EXPECT_TRUE(has(ended.out, word)) << word << "\n" << ended.out;
  }
  EXPECT_TRUE(has(ended.err, "--approve or --deny")) << ended.err;
  ended = cli({"unblock", id, "--json"});
  EXPECT_EQ(ended.code, 2);
  EXPECT_TRUE(has(ended.err, "--approve or --deny")) << ended.err;
  const Json missing = Json::parse(ended.out, nullptr, false);
  ASSERT_TRUE(missing.is_object()) << ended.out;
  EXPECT_EQ(missing["code"], "decision-missing");
  EXPECT_EQ(missing["id"], id);
  EXPECT_TRUE(has(missing["detail"], "--approve or --deny"));
  EXPECT_EQ(missing["blocked"]["data"]["base_commit"], base);
  EXPECT_EQ(p().job(id)["state"], "blocked");

  ended = cli({"unblock", id, "--approve", "--comment", "fine", "--json"});
  EXPECT_EQ(ended.code, 0) << ended.err;
  const Json next = p().post("/v1/leases", {{"worker", "played"},
                                            {"isolation_level", "L4"},
                                            {"kinds", {"patch.apply"}}})
                        .json()["leases"][0];
  const Json input = next["job"]["input"];
  EXPECT_EQ(input["approve"], true);
  EXPECT_EQ(input["digest"], digest);
  EXPECT_EQ(input["base_commit"], base);
  EXPECT_EQ(input["comment"], "fine");
  p().post(at(next) + "/complete", {{"verdict", "pass"}});
}

MACHINA_BOTH(PatchesCli);

}  // namespace
}  // namespace machina::e2e
