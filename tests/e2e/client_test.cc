// The command line as a person meets it: which server it speaks to, what it
// shows, what it asks before it changes something, and what it says of
// settings that do not hold.

#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>

#include "tests/e2e/fixture.h"
#include "tests/support/places.h"

namespace machina::e2e {
namespace {

namespace fs = std::filesystem;

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

class Client : public EndToEnd {
 protected:
  void accept_only() {
    Serve serve;
    serve.workers = 0;
    start(serve);
  }
  Ended cli(std::vector<std::string> args) {
    args.insert(args.end(), {"--root", p().root()});
    return p().run(args, {}, 60000);
  }
  // For verbs that make a sandbox: a range that the harness knows as ours.
  std::map<std::string, std::string> env(
      std::map<std::string, std::string> more = {}) {
    if (as_root()) {
      more["MACHINA_SLOT_UID_BASE"] =
          std::to_string(300000 + static_cast<unsigned>(getpid()) % 1000 * 100);
    }
    return more;
  }
  // A job of `kind` in the hands of a worker outside; its lease.
  Json leased(const Json& job) {
    p().submit(job);
    return p()
        .post("/v1/leases", {{"worker", "played"},
                             {"isolation_level", "L4"},
                             {"kinds", {job["kind"]}}})
        .json()["leases"][0];
  }
  std::string blocked(const Json& job, const Json& block) {
    const Json lease = leased(job);
    const Answer answer = p().post(
        "/v1/leases/" + lease["token"].get<std::string>() + "/block", block);
    EXPECT_EQ(answer.status, 200) << answer.body;
    return lease["job"]["id"];
  }
  std::string state(const std::string& id) { return p().job(id)["state"]; }
  void write(const std::string& path, const std::string& text,
             mode_t mode = 0600) {
    std::ofstream(path) << text;
    chmod(path.c_str(), mode);
    if (geteuid() == 0) {
      EXPECT_EQ(chown(path.c_str(), p().uid(), p().uid()), 0);
    }
  }
};

// --- which server ------------------------------------------------------------

TEST_P(Client, F23_WhatWasNamedIsNeverReplacedByAnother) {
  accept_only();
  const std::string here = std::to_string(p().port());
  const std::string b = p().dir() + "/b";
  ASSERT_EQ(p().shell("mkdir -m 700 " + b), 0);
  write(p().dir() + "/b.yaml", "MACHINA_ROOT: " + b + "\n");
  const std::string id = p().submit({{"kind", "ext.a"}});
  const auto jobs = [&] {
    return p().get("/v1/jobs?limit=1000").json()["jobs"].size();
  };
  const std::size_t before = jobs();
  // The address is that of a server that runs, and the root, which is named
  // nearer or as near, has none.
  for (const std::vector<std::string>& verb :
       std::vector<std::vector<std::string>>{{"enqueue", "noop"},
                                             {"list"},
                                             {"get", id},
                                             {"logs", id},
                                             {"cancel", id},
                                             {"retry", id},
                                             {"unblock", id},
                                             {"scale", "3"},
                                             {"stats"},
                                             {"top", "--once"},
                                             {"patches", "list"},
                                             {"patch", "show", id}}) {
    std::vector<std::string> args = verb;
    args.insert(args.end(), {"--root", b});
    const Ended ended = p().run(args, {{"MACHINA_PORT", here}});
    EXPECT_EQ(ended.code, 3) << verb[0] << ended.out << ended.err;
    EXPECT_TRUE(has(ended.err, b + "/machina.sock")) << ended.err;
  }
  EXPECT_EQ(p().run({"enqueue", "noop"},
                    {{"MACHINA_ROOT", b}, {"MACHINA_PORT", here}})
                .code,
            3);
  EXPECT_EQ(
      p().run({"enqueue", "noop", "--root", b}, {{"MACHINA_SERVER", p().url()}})
          .code,
      3);
  EXPECT_EQ(
      p().run({"enqueue", "noop", "--config", p().dir() + "/b.yaml"}, {}).code,
      3);
  EXPECT_EQ(jobs(), before);
  EXPECT_EQ(state(id), "ready");
  // The address counts where it is what was named, or named nearer.
  for (const std::map<std::string, std::string>& env :
       std::vector<std::map<std::string, std::string>>{
           {{"MACHINA_PORT", here}},
           {{"MACHINA_PORT", here}, {"MACHINA_HOST", "0.0.0.0"}}}) {
    EXPECT_EQ(p().run({"get", id}, env).code, 0);
    EXPECT_EQ(p().run({"get", id, "--config", p().dir() + "/b.yaml"}, env).code,
              0);
  }
  EXPECT_EQ(
      p().run({"get", id, "--server", p().url()}, {{"MACHINA_ROOT", b}}).code,
      0);
  // What is left of a variable that is not set names nothing, and is no reason
  // to speak to whoever is at the default address.
  // (An empty variable of the environment is one that is not set.)
  for (const char* option : {"--server", "--root"}) {
    const Ended empty =
        p().run({"enqueue", "noop", option, ""}, {{"MACHINA_PORT", here}});
    EXPECT_EQ(empty.code, 2) << empty.out << empty.err;
    EXPECT_TRUE(has(empty.err, "empty")) << empty.err;
  }
  EXPECT_EQ(jobs(), before);
  EXPECT_EQ(
      p().run({"get", id, "--server", p().url()}, {{"MACHINA_SERVER", ""}})
          .code,
      0);
  const Ended none = p().run({"list"}, {{"MACHINA_PORT", "0"}});
  EXPECT_EQ(none.code, 2);
  EXPECT_TRUE(has(none.err, "MACHINA_PORT")) << none.err;
}

// --- lists -------------------------------------------------------------------

TEST_P(Client, F24_AListGoesOnUntilItsLimitOrTheEnd) {
  accept_only();
  Json jobs = Json::array();
  for (int i = 0; i < 3000; ++i) {
    jobs.push_back({{"kind", i % 1000 == 999 ? "ext.stays" : "ext.ends"}});
  }
  ASSERT_EQ(p().call("POST", "/v1/jobs", jobs.dump()).status, 200);
  Json lease = {{"worker", "played"}, {"kinds", {"ext.ends"}}, {"max", 256}};
  Json leases = p().post("/v1/leases", lease).json()["leases"];
  while (!leases.empty()) {
    Json items = Json::array();
    for (const Json& each : leases) items.push_back({{"token", each["token"]}});
    const Answer next =
        p().post("/v1/leases/complete", {{"items", items}, {"lease", lease}});
    ASSERT_EQ(next.status, 200) << next.body;
    leases = next.json()["leases"];
  }
  const auto rows = [&](const std::vector<std::string>& more) {
    std::vector<std::string> args = {"list", "--json"};
    args.insert(args.end(), more.begin(), more.end());
    const Ended ended = cli(args);
    EXPECT_EQ(ended.code, 0) << ended.err;
    return Json::parse(ended.out, nullptr, false);
  };
  EXPECT_EQ(rows({})["jobs"].size(), 50u);
  EXPECT_EQ(rows({"--limit", "3"})["jobs"].size(), 3u);
  EXPECT_EQ(rows({"--state", "ready"})["jobs"].size(), 3u);
  EXPECT_EQ(rows({"--kind", "ext.stays"})["jobs"].size(), 3u);
  const Json all = rows({"--kind", "ext.stays", "--limit", "1000"});
  EXPECT_EQ(all["jobs"].size(), 3u);
  EXPECT_TRUE(all["cursor"].is_null());
  EXPECT_EQ(rows({"--kind", "ext.none"})["jobs"].size(), 0u);
  const Json some = rows({"--state", "succeeded", "--limit", "2"});
  EXPECT_EQ(some["jobs"].size(), 2u);
  const Json next = rows({"--state", "succeeded", "--limit", "2", "--cursor",
                          some["cursor"].get<std::string>()});
  EXPECT_NE(next["jobs"][0]["id"], some["jobs"][0]["id"]);
}

// --- unblock -----------------------------------------------------------------

TEST_P(Client, F25_LookingChangesNothing) {
  accept_only();
  const Json data = {{"question", "which colour shall it be"},
                     {"choices", {"crimson", "teal"}}};
  for (const char* reason : {"ask", "approval", "conflict"}) {
    const std::string id =
        blocked({{"kind", "ext.ask"}}, {{"reason", reason}, {"data", data}});
    const std::string token = p().job(id)["blocked"]["token"];
    for (const std::vector<std::string>& more :
         std::vector<std::vector<std::string>>{
             {}, {"--json"}, {"--token", token}}) {
      std::vector<std::string> args = {"unblock", id};
      args.insert(args.end(), more.begin(), more.end());
      const Ended looked = cli(args);
      EXPECT_EQ(looked.code, 2) << looked.out << looked.err;
      EXPECT_TRUE(has(looked.out, "which colour shall it be")) << looked.out;
      EXPECT_TRUE(has(looked.out, "crimson")) << looked.out;
      EXPECT_TRUE(has(looked.err, "no decision was given")) << looked.err;
      EXPECT_EQ(state(id), "blocked") << reason;
    }
    const Ended done = cli({"unblock", id, "--input", R"({"colour":"teal"})"});
    EXPECT_EQ(done.code, 0) << done.err;
    EXPECT_EQ(state(id), "ready");
    EXPECT_EQ(p().job(id)["input"]["colour"], "teal");
    EXPECT_EQ(cli({"cancel", id}).code, 0);
  }
}

TEST_P(Client, F25_AnApprovalShowsTheDiffWithDigestAndBase) {
  accept_only();
  const std::string diff =
      "--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n same\n-old\x1b[2J\n+new\u202e\n";
  const std::string base(40, 'b');
  const std::string text = p().dir() + "/text";
  write(text, diff, 0644);
  ASSERT_EQ(p().shell("sha256sum " + text + " | cut -c1-64 >" + text + ".sum"),
            0);
  const std::string digest = "sha256:" + read_file(text + ".sum").substr(0, 64);
  ASSERT_EQ(p().shell("mkdir -p " + p().root() + "/repos/r/.git"), 0);
  const std::string id = blocked(
      {{"kind", "patch.apply"}, {"payload", {{"repo", "r"}, {"diff", diff}}}},
      {{"reason", "approval"},
       {"data", {{"digest", digest}, {"base_commit", base}}}});
  const Ended looked = cli({"unblock", id});
  EXPECT_EQ(looked.code, 2);
  for (const std::string& word :
       {digest, base, std::string("  -old\\u001b[2J"),
        std::string("  +new\\u202e"), "--approve --digest " + digest,
        std::string("--deny")}) {
    EXPECT_TRUE(has(looked.out, word)) << word << "\n" << looked.out;
  }
  EXPECT_FALSE(has(looked.out, "\x1b")) << "colours only on a terminal";
  EXPECT_FALSE(has(looked.err, "warning")) << looked.err;
  EXPECT_EQ(state(id), "blocked");
  // On a terminal, in colours, unless they are not wanted.
  const auto on_terminal = [&](const std::string& env) {
    const std::string file = p().dir() + "/typescript";
    p().shell("TERM=xterm " + env + " script -qec '" + p().dir() +
              "/machina unblock " + id + " --root " + p().root() +
              "' /dev/null >" + file + " </dev/null 2>&1");
    return read_file(file);
  };
  const std::string coloured = on_terminal("");
  EXPECT_TRUE(has(coloured, "\x1b[32m+new")) << coloured;
  EXPECT_TRUE(has(coloured, "\x1b[31m-old\\u001b[2J\x1b[0m")) << coloured;
  EXPECT_FALSE(has(on_terminal("NO_COLOR=1"), "\x1b[32m"));
  // What is approved is told of first.
  const Ended approved = cli({"unblock", id, "--approve"});
  EXPECT_EQ(approved.code, 0) << approved.err;
  EXPECT_TRUE(has(approved.out, "  +new")) << approved.out;
  EXPECT_TRUE(has(approved.out, digest)) << approved.out;
  EXPECT_EQ(p().job(id)["input"]["base_commit"], base);
}

// The server's half: nothing that says no decision is one.
TEST_P(Client, F25_AnUnblockThatDecidesNothingIsRefused) {
  accept_only();
  const auto unblock = [&](const std::string& id, const Json& input) {
    return p().post(
        "/v1/jobs/" + id + "/unblock",
        {{"token", p().job(id)["blocked"]["token"]}, {"input", input}});
  };
  std::string id = blocked({{"kind", "ext.deploy"}},
                           {{"reason", "approval"}, {"data", {{"ask", "x"}}}});
  Answer answer = unblock(id, nullptr);
  EXPECT_EQ(answer.status, 400) << answer.body;
  EXPECT_EQ(answer.json()["field"], "input");
  EXPECT_EQ(state(id), "blocked");
  EXPECT_EQ(unblock(id, {{"approve", true}}).status, 200);
  // A rollback that cannot be merged.
  id = blocked(
      {{"kind", "patch.rollback"},
       {"payload", {{"patch_id", "01900000-0000-7000-8000-000000000001"}}}},
      {{"reason", "conflict"},
       {"data", {{"digest", nullptr}, {"conflicts", Json::array()}}}});
  for (const Json& input :
       std::vector<Json>{nullptr, Json::object(), {{"comment", "hm"}}}) {
    answer = unblock(id, input);
    EXPECT_EQ(answer.status, 400) << input << answer.body;
    EXPECT_EQ(state(id), "blocked");
  }
  EXPECT_EQ(answer.json()["field"], "input.approve");
  EXPECT_EQ(unblock(id, {{"approve", true}}).status, 200);
}

// --- settings that do not hold
// -------------------------------------------------

TEST_P(Client, F27_ACheckSaysWhatAStartWouldSay) {
  write(p().dir() + "/token", "0123456789abcdef0123456789abcdef");
  std::map<std::string, std::string> prod =
      env({{"MACHINA_PROFILE", "prod"},
           {"MACHINA_API_TOKEN_FILE", p().dir() + "/token"},
           {"MACHINA_PORT", "0"},
           {"MACHINA_WORKERS", "2"}});
  // With no level set prod wants L3, which a user reaches where control groups
  // are delegated and root reaches: whatever it is, both say the same.
  const Ended check =
      p().run({"serve", "--check", "--root", p().root()}, prod, 60000);
  const Ended begun =
      p().run({"ops", "start", "--launcher", "nohup", "--root", p().root()},
              prod, 90000);
  EXPECT_EQ(check.code, begun.code) << check.err << begun.out << begun.err;
  if (check.code != 0) {
    EXPECT_EQ(check.code, 2);
    EXPECT_TRUE(has(check.err, "MACHINA_SANDBOX_MIN_LEVEL: L3")) << check.err;
    const Ended dry = p().run({"ops", "start", "--dry-run", "--launcher",
                               "nohup", "--root", p().root()},
                              prod, 60000);
    EXPECT_EQ(dry.code, 2) << dry.err;
  }
  p().run({"ops", "kill", "--root", p().root()}, prod, 60000);
  prod["MACHINA_KINDS_ALLOWED"] = "test.*x";
  EXPECT_EQ(p().run({"serve", "--check", "--root", p().root()}, prod).code, 2);
  EXPECT_EQ(p().run({"ops", "start", "--dry-run", "--launcher", "nohup",
                     "--root", p().root()},
                    prod)
                .code,
            2);
}

// What lies in the root in the place of what a start opens there.
TEST_P(Client, F27_ACheckLooksAtWhatAStartOpens) {
  struct {
    std::string make, names;
    int code;
  } const each[] = {
      {"touch machina.sock", "machina.sock", 2},
      {"mkdir machina.sock", "machina.sock", 2},
      {"mkdir pool.lock", "pool.lock", 2},
      {"mkdir -p patches/patches.db", "patches.db", 74},
      {"touch patches", "patches", 74},
      {"mkdir -p queue/wal; echo junk > queue/wal/0000000000000001.seg",
       "MANIFEST", 65},
  };
  int n = 0;
  for (const auto& [make, names, code] : each) {
    const std::string root = p().dir() + "/r" + std::to_string(n++);
    ASSERT_EQ(p().shell("mkdir -m 700 " + root + "; cd " + root +
                        "; umask 077; " + make),
              0);
    for (const char* how : {"check", "start"}) {
      std::vector<std::string> args = {"serve", "--root",    root, "--port",
                                       "0",     "--workers", "1"};
      if (std::string(how) == "check") args.push_back("--check");
      // A pool that cannot start ends apart from its server.
      if (std::string(how) == "start" && names == "pool.lock") continue;
      const Ended ended = p().run(args, env(), 20000);
      EXPECT_EQ(ended.code, code) << how << ": " << make << "\n" << ended.err;
      EXPECT_TRUE(has(ended.err, names)) << how << ": " << ended.err;
    }
  }
}

// Two cases with one id are told apart by their number, whatever their order.
TEST_P(Client, F29_TheTableFollowsACasesNumber) {
  accept_only();
  const auto one = [](int nth, const char* outcome) {
    Json out = {{"id", "t::a"}, {"outcome", outcome}};
    if (nth > 1) out["nth"] = nth;
    return out;
  };
  const Json lease = leased({{"kind", "patch.play"}});
  const Json before = {{"missing", 3},
                       {"passed", 1},
                       {"cases", {one(1, "failed"), one(2, "passed")}}};
  const Json after = {{"cases", {one(2, "failed"), one(1, "passed")}}};
  const Answer done =
      p().post("/v1/leases/" + lease["token"].get<std::string>() + "/complete",
               {{"result",
                 {{"outcome", "tests_failed"},
                  {"tests",
                   {{"before", before},
                    {"after", after},
                    {"newly_failing", {"t::a#2"}},
                    {"newly_passing", {"t::a"}}}}}}});
  ASSERT_EQ(done.status, 200) << done.body;
  const Ended shown =
      cli({"patch", "show", lease["job"]["id"].get<std::string>()});
  EXPECT_EQ(shown.code, 0) << shown.err;
  std::istringstream lines(shown.out);
  std::vector<std::vector<std::string>> rows;
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with("t::a")) continue;
    std::istringstream words(line);
    rows.emplace_back(std::istream_iterator<std::string>(words),
                      std::istream_iterator<std::string>());
  }
  using Row = std::vector<std::string>;
  ASSERT_EQ(rows.size(), 2u) << shown.out;
  EXPECT_EQ(std::set(rows.begin(), rows.end()),
            (std::set<Row>{{"t::a", "failed", "passed", "passes", "now"},
                           {"t::a#2", "passed", "failed", "fails", "newly"}}))
      << shown.out;
  EXPECT_TRUE(has(shown.out, "3 missing")) << shown.out;
}

TEST_P(Client, F27_EvidenceIsWhatWasCheckedAndNotATouchedFile) {
  accept_only();
  p().submit({{"kind", "ext.a"}});
  ASSERT_EQ(p().stop_server(), 0);
  const std::string root = p().root(), copy = p().dir() + "/copy";
  const auto checks = [&] {
    const Ended e =
        p().run({"doctor", "--profile", "prod", "--json", "--root", root},
                env(), 60000);
    std::map<std::string, std::string> verdicts;
    const Json json = Json::parse(e.out, nullptr, false);
    for (const Json& check : json["checks"]) {
      verdicts[check["name"]] = check["verdict"];
    }
    return verdicts;
  };
  ASSERT_EQ(p().shell("mkdir -p -m 700 " + root + "/ops; touch " + root +
                      "/ops/wal.verified " + root + "/ops/backup.taken"),
            0);
  auto seen = checks();
  EXPECT_EQ(seen["log_verified"], "WARN");
  EXPECT_EQ(seen["backup"], "WARN");
  EXPECT_EQ(seen["plugins_pinned"], "N/A");
  EXPECT_EQ(seen["metrics"], "N/A");

  const auto verify = [&](const std::string& what) {
    return p().run({"wal", "verify", "--root", what, "--record", root});
  };
  ASSERT_EQ(p().shell("cp -a --no-target-directory " + root + " " + copy), 0);
  // A damaged copy leaves no record.
  std::string segment;
  for (const auto& entry : fs::directory_iterator(copy + "/queue/wal")) {
    if (entry.path().extension() == ".seg") segment = entry.path();
  }
  ASSERT_FALSE(segment.empty());
  ASSERT_EQ(p().shell("cp -p " + segment + " " + p().dir() +
                      "/whole; printf '\\377\\377\\377\\377' | dd of=" +
                      segment + " bs=1 seek=8 conv=notrunc 2>/dev/null"),
            0);
  EXPECT_EQ(verify(copy).code, 65);
  EXPECT_EQ(read_file(root + "/ops/wal.verified"), "");
  ASSERT_EQ(p().shell("cp -p " + p().dir() + "/whole " + segment), 0);
  const Ended good = verify(copy);
  EXPECT_EQ(good.code, 0) << good.err;
  const Json record =
      Json::parse(read_file(root + "/ops/backup.taken"), nullptr, false);
  ASSERT_TRUE(record.is_object());
  EXPECT_EQ(record["root"], copy);
  EXPECT_EQ(record["digest"].get<std::string>().size(), 64u);
  EXPECT_GE(record["last_lsn"], 1);
  seen = checks();
  EXPECT_EQ(seen["log_verified"], "PASS");
  EXPECT_EQ(seen["backup"], "PASS");
  // Of another log it says nothing.
  ASSERT_EQ(p().shell("sed -i 's/\"log_uuid\": \"./\"log_uuid\": \"z/' " +
                      root + "/ops/backup.taken"),
            0);
  EXPECT_EQ(checks()["backup"], "WARN");
}

TEST_P(Client, F27_SettingsWithoutEffectSaySo) {
  const Ended text = p().run({"serve", "--print-config"});
  EXPECT_EQ(text.code, 0);
  for (const char* name : {"MACHINA_POLICY_CMD=", "MACHINA_EMBED_NPROC=0",
                           "MACHINA_GENESIS_GUARD=", "MACHINA_GPU_DIM="}) {
    const std::size_t at = text.out.find(name);
    ASSERT_NE(at, std::string::npos) << name;
    EXPECT_TRUE(
        has(text.out.substr(at, text.out.find('\n', at) - at), "no effect yet"))
        << name;
  }
  const Json json =
      Json::parse(p().run({"serve", "--print-config", "--json"}).out);
  EXPECT_EQ(json["MACHINA_HTTP_TIMEOUT_MS"]["no_effect_yet"], true);
  EXPECT_FALSE(json["MACHINA_PORT"].contains("no_effect_yet"));
}

TEST_P(Client, F21_TheClientsSocketIsReachedByTrustedWaysOnly) {
  accept_only();
  const std::string way = p().dir() + "/way";
  ASSERT_EQ(p().shell("mkdir " + way + "; chmod 777 " + way + "; ln -s " +
                      p().root() + " " + way + "/link"),
            0);
  for (const std::vector<std::string>& args :
       std::vector<std::vector<std::string>>{
           {"list", "--root", way + "/link"},
           {"list", "--server", way + "/link/machina.sock"},
           {"ops", "detect", "--root", way + "/link"},
           {"wal", "verify", "--root", way + "/link"},
           {"wal", "inspect", "--root", way + "/link"},
           {"serve", "--check", "--root", p().root(), "--port-file",
            way + "/port"},
           {"serve", "--check", "--root", way + "/link"}}) {
    const Ended ended = p().run(args);
    EXPECT_EQ(ended.code, 2) << args[0] << ended.out << ended.err;
    EXPECT_TRUE(has(ended.err, way + " may be written by others (mode 0777)"))
        << ended.err;
  }
  const Ended logged = p().run({"serve", "--check", "--root", p().root()},
                               {{"MACHINA_LOG_FILE", way + "/server.log"}});
  EXPECT_EQ(logged.code, 2) << logged.err;
  EXPECT_TRUE(has(logged.err, "MACHINA_LOG_FILE: its path: ")) << logged.err;
  const Ended doctor = p().run(
      {"doctor", "--profile", "prod", "--root", way + "/link"}, env(), 60000);
  EXPECT_TRUE(has(doctor.out, way + " may be written by others (mode 0777)"))
      << doctor.out;
  EXPECT_EQ(p().stop_server(), 0);
  const Ended recorded = p().run(
      {"wal", "verify", "--root", p().root(), "--record", way + "/link"});
  EXPECT_EQ(recorded.code, 2) << recorded.err;
  EXPECT_TRUE(has(recorded.err, "--record: ")) << recorded.err;
  EXPECT_FALSE(fs::exists(p().root() + "/ops/wal.verified"));
  std::string why;
  ASSERT_TRUE(p().restart(&why)) << why;
  ASSERT_EQ(p().shell("chmod 755 " + way), 0);
  EXPECT_EQ(p().run({"list", "--root", way + "/link"}).code, 0);
}

// --- small things ------------------------------------------------------------

TEST_P(Client, F28_IdsInPartHelpDurationsAndQuiet) {
  accept_only();
  const Ended quiet =
      cli({"enqueue", "ext.a", "-q", "--delay", "1h30m", "--timeout-ms", "2m"});
  ASSERT_EQ(quiet.code, 0) << quiet.err;
  ASSERT_EQ(quiet.out.size(), 37u) << quiet.out;
  const std::string id = quiet.out.substr(0, 36);
  const Json job = p().job(id);
  EXPECT_EQ(job["state"], "scheduled");
  EXPECT_EQ(job["timeout_ms"], 120'000);
  const std::string other = p().submit({{"kind", "ext.b"}});
  // An id's beginning is its time, which the two share; their ends differ.
  for (const std::string& part :
       {id.substr(28), id.substr(24), id.substr(19), id}) {
    const Ended got = cli({"get", part, "--json"});
    EXPECT_EQ(got.code, 0) << part << got.err;
    EXPECT_EQ(Json::parse(got.out)["id"], id);
  }
  const Ended both = cli({"get", id.substr(0, 6)});
  EXPECT_EQ(both.code, 2) << both.out;
  EXPECT_TRUE(has(both.err, id) && has(both.err, other)) << both.err;
  EXPECT_EQ(cli({"cancel", id.substr(0, 6)}).code, 2);
  EXPECT_EQ(state(id), "scheduled");
  EXPECT_EQ(cli({"cancel", id.substr(24)}).code, 0);
  EXPECT_EQ(state(id), "cancelled");
  EXPECT_EQ(cli({"retry", id.substr(24)}).code, 0);
  std::string upper = id;
  for (char& c : upper) c = static_cast<char>(::toupper(c));
  EXPECT_EQ(cli({"get", upper}).code, 0);
  const Ended after = cli({"enqueue", "ext.c", "--depends-on", id.substr(24),
                           "--depends-on", other, "--json"});
  EXPECT_EQ(after.code, 0) << after.err;
  EXPECT_EQ(Json::parse(after.out)["depends_on"], Json({id, other}));
  EXPECT_EQ(cli({"enqueue", "ext.c", "--depends-on", "fedcba9876"}).code, 4);
  const Ended story = cli({"wal", "inspect", "--job", id.substr(24)});
  EXPECT_EQ(story.code, 0) << story.err;
  EXPECT_EQ(story.out, cli({"wal", "inspect", "--job", upper}).out);
  EXPECT_TRUE(has(story.out, id) && !has(story.out, other + " ")) << story.out;
  EXPECT_EQ(cli({"wal", "inspect", "--job", id.substr(0, 6)}).code, 2);
  EXPECT_EQ(cli({"wal", "inspect", "--job", "fedcba9876"}).code, 2);
  EXPECT_EQ(cli({"get", "fedcba9876"}).code, 4);
  EXPECT_TRUE(has(cli({"get", "fedcba9876"}).err, "machina list"));

  struct {
    std::vector<std::string> args;
    std::string says;
  } const bad[] = {
      {{"enqueue", "ext.a", "--delay-ms", "5 s"}, "0..315360000000 ms"},
      {{"enqueue", "ext.a", "--timeout", "8d"}, "1..604800000 ms"},
      {{"enqueue", "ext.a", "--wait", "--wait-s", "0"}, "1..10000000 s"},
      {{"ops", "kill", "--term-seconds", "2d"}, "0..86400 s"},
      {{"top", "--interval", "2m"}, "0.2..60 s"},
  };
  for (const auto& each : bad) {
    const Ended ended = cli(each.args);
    EXPECT_EQ(ended.code, 2) << ended.out;
    EXPECT_TRUE(has(ended.err, each.says)) << ended.err;
  }
  for (const std::vector<std::string>& args :
       std::vector<std::vector<std::string>>{{"help"},
                                             {"help", "enqueue"},
                                             {"help", "ops", "start"},
                                             {"help", "help"},
                                             {"ops", "help"},
                                             {"ops", "help", "start"},
                                             {"-h"},
                                             {"list", "-h"},
                                             {"wal", "verify", "-h"},
                                             {"patch", "submit", "-h"}}) {
    const Ended ended = p().run(args);
    EXPECT_EQ(ended.code, 0) << args[0] << ended.err;
    EXPECT_TRUE(has(ended.out, "Usage: machina")) << ended.out;
  }
  EXPECT_TRUE(has(p().run({"help", "ops", "start"}).out, "--launcher"));
  EXPECT_EQ(p().run({"help", "nosuch"}).code, 2);
}

TEST_P(Client, F28_AKindThatNobodyServesIsSaidAtOnce) {
  accept_only();
  const Ended ended = cli({"enqueue", "ext.nobody", "-q"});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_TRUE(has(ended.err,
                  "warning: no worker that is connected serves the "
                  "kind ext.nobody"))
      << ended.err;
  const std::string id = ended.out.substr(0, 36);
  EXPECT_TRUE(has(cli({"get", id}).out, "no worker that is connected serves"));
  EXPECT_TRUE(has(cli({"stats"}).out, "ext.nobody"));
  const Ended waited =
      cli({"enqueue", "ext.nobody", "--wait", "--wait-s", "1s"});
  EXPECT_EQ(waited.code, 1);
  EXPECT_TRUE(has(waited.err, "warning: no worker")) << waited.err;
  const Ended state = cli({"list", "--state", "done"});
  EXPECT_EQ(state.code, 4);
  for (const char* known :
       {"\"done\"", "waiting", "ready", "running", "blocked", "succeeded",
        "failed", "dead", "cancelled"}) {
    EXPECT_TRUE(has(state.err, known)) << known << ": " << state.err;
  }
}

TEST(F28_Scripts, HelpDoesNothingElseAndUnknownOptionsAreRefused) {
  const auto run = [](const std::string& line, std::string* out) {
    FILE* pipe = popen(
        ("cd " + std::string(kSourceDir) + " && " + line + " 2>&1").c_str(),
        "r");
    char bytes[4096];
    out->clear();
    while (std::size_t n = fread(bytes, 1, sizeof bytes, pipe)) {
      out->append(bytes, n);
    }
    const int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  };
  for (const char* script : {"setup.sh", "demo.sh", "test.sh", "install.sh"}) {
    std::string out;
    for (const char* option : {"--help", "-h"}) {
      EXPECT_EQ(run(std::string("ops/") + script + " " + option, &out), 0);
      EXPECT_TRUE(out.starts_with(std::string("ops/") + script + ":")) << out;
      EXPECT_FALSE(has(out, "== ")) << out;  // what say() prints
    }
    EXPECT_EQ(run(std::string("ops/") + script + " --nosuch", &out), 2) << out;
    EXPECT_TRUE(has(out, "--nosuch")) << out;
  }
}

// --- patch submit
// ----------------------------------------------------------------

class PatchSubmit : public Client {
 protected:
  void make_project() {
    start();
    repo_ = p().root() + "/repos/calc";
    must("set -e; mkdir -p " + repo_ + "/sub; cd " + repo_ +
         "; printf 'def add(a, b):\\n    return a + b\\n' >calc.py; printf "
         "'from calc import add\\n\\ndef test_small():\\n    assert add(1, 2) "
         "== 3\\n\\ndef test_zero():\\n    assert add(0, 0) == 0\\n' "
         ">test_calc.py; git init -q -b main .; git add -A; git -c "
         "user.name=E2E -c user.email=e2e@localhost commit -qm first");
  }
  void must(const std::string& line) {
    ASSERT_EQ(p().shell(line), 0) << line << "\n"
                                  << read_file(p().dir() + "/shell.log");
  }
  // A shell line in the project, with `machina` in it; what it printed.
  Ended shell(const std::string& line) {
    const std::string base = p().dir() + "/line";
    Ended ended;
    ended.code = p().shell("cd " + repo_ + "; machina() { " + p().dir() +
                           "/machina \"$@\" --root " + p().root() + "; }; " +
                           line + " >" + base + ".out 2>" + base + ".err");
    ended.out = read_file(base + ".out");
    ended.err = read_file(base + ".err");
    return ended;
  }
  std::string repo_;
};

TEST_P(PatchSubmit, F29_ADiffComesBackAsAVerdictWithItsCases) {
  make_project();
  // From a pipe, in a directory below the repository, by its path.
  Ended good = shell(
      "sed -i 's/a + b/b + a/' calc.py; git diff >../good.diff; cd sub; git "
      "diff | machina patch submit - --repo . --test 'python3 -m pytest -q'");
  EXPECT_EQ(good.code, 0) << good.out << good.err;
  for (const char* word : {"verdict     applied", "(job succeeded)", "CASE",
                           "test_small", "test_zero", "passed", "calc.py"}) {
    EXPECT_TRUE(has(good.out, word)) << word << "\n" << good.out;
  }
  EXPECT_TRUE(has(good.err, "is submitted")) << good.err;
  const std::size_t at = good.out.find("patch       ");
  ASSERT_NE(at, std::string::npos);
  const std::string id = good.out.substr(at + 12, 36);
  // One that breaks a case: 1, and the case is named first.
  const Ended bad = shell(
      "sed -i 's/b + a/a + b + 1/' calc.py; git diff >../bad.diff; machina "
      "patch submit ../bad.diff --repo calc --test 'pytest -q' --json");
  EXPECT_EQ(bad.code, 1) << bad.out << bad.err;
  const Json job = Json::parse(bad.out, nullptr, false);
  ASSERT_TRUE(job.is_object()) << bad.out;
  EXPECT_EQ(job["result"]["outcome"], "tests_failed");
  const Ended shown =
      cli({"patch", "show", job["id"].get<std::string>().substr(20)});
  EXPECT_EQ(shown.code, 0) << shown.err;
  EXPECT_TRUE(has(shown.out, "tests_failed  (job failed)")) << shown.out;
  EXPECT_TRUE(has(shown.out, "fails newly")) << shown.out;
  EXPECT_EQ(cli({"patch", "show", id, "--follow"}).code, 0);
  EXPECT_EQ(cli({"patch", "show", job["id"], "-f"}).code, 1);
  // What cannot be submitted says so before anything is.
  EXPECT_EQ(shell("machina patch submit /nowhere.diff").code, 2);
  EXPECT_EQ(shell("machina patch submit - </dev/null").code, 2);
  EXPECT_EQ(shell("machina patch submit ../bad.diff --repo ./none").code, 2);
  EXPECT_EQ(shell("machina patch submit ../bad.diff --repo /tmp").code, 2);
  EXPECT_EQ(shell("machina patch submit ../bad.diff --repo other").code, 4);
  EXPECT_EQ(p().run({"patch", "submit", p().root() + "/repos/bad.diff",
                     "--repo", "calc", "--root", p().dir() + "/none"})
                .code,
            3);
}

MACHINA_BOTH(Client);
MACHINA_BOTH(PatchSubmit);

}  // namespace
}  // namespace machina::e2e
