// `machina wal` with the real binary, on a root that a real server wrote.

#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

namespace fs = std::filesystem;

class Wal : public EndToEnd {
 protected:
  Ended wal(std::vector<std::string> args) {
    args.insert(args.begin(), "wal");
    args.push_back("--root");
    args.push_back(p().root());
    return p().run(args, {}, 60'000);
  }
  std::map<std::string, std::string> bytes() const {
    std::map<std::string, std::string> all;
    std::string dir = product_->root() + "/queue";
    for (const auto& entry : fs::recursive_directory_iterator(dir)) {
      if (!entry.is_regular_file()) continue;
      std::ifstream file(entry.path(), std::ios::binary);
      all[entry.path()] = std::string(std::istreambuf_iterator<char>(file), {});
    }
    return all;
  }
  // A server has been there, with jobs of an outside kind.
  void make() {
    Serve serve;
    serve.workers = 0;
    serve.env["MACHINA_WAL_FSYNC"] = "1";  // without it a gap may be a crash's
    start(serve);
    for (int i = 0; i < 20; ++i) {
      Json job = {{"kind", "ext.wal"}, {"payload", {{"word", "unseen"}}}};
      if (i < 3) job["concurrency_key"] = "turns";
      p().call("POST", "/v1/jobs", job.dump(),
               {"X-Request-Id: trace-" + std::to_string(i)});
    }
    Answer leases = p().post(
        "/v1/leases", {{"worker", "w"}, {"kinds", {"ext.*"}}, {"max", 2}});
    const Json granted = leases.json();
    ASSERT_EQ(granted["leases"].size(), 2u) << granted;
    for (const Json& lease : granted["leases"]) {
      token_ = lease["token"];
      p().call("POST", "/v1/leases/" + token_ + "/complete", "{}");
    }
  }
  std::string segment() const {
    std::string last;
    for (const auto& [name, content] : bytes()) {
      if (name.ends_with(".seg")) last = name;
    }
    return last;
  }

  std::string token_;
};

TEST_P(Wal, VerifyOfAWholeLog) {
  make();
  Ended live = wal({"verify"});
  EXPECT_EQ(live.code, 75) << live.out;
  EXPECT_NE(live.err.find(std::to_string(p().server())), std::string::npos)
      << live.err;
  ASSERT_EQ(p().stop_server(), 0);
  auto before = bytes();
  Ended whole = wal({"verify"});
  EXPECT_EQ(whole.code, 0) << whole.out << whole.err;
  EXPECT_NE(whole.out.find("18 live jobs"), std::string::npos) << whole.out;
  EXPECT_NE(whole.out.find("verdict: whole"), std::string::npos) << whole.out;
  Json json = Json::parse(wal({"verify", "--json"}).out, nullptr, false);
  EXPECT_EQ(json.value("verdict", ""), "whole");
  EXPECT_EQ(json.value("live_jobs", 0), 18);
  EXPECT_TRUE(json["torn_acknowledged"].is_null()) << json;
  EXPECT_TRUE(json["torn_first_lsn"].is_null()) << json;
  EXPECT_TRUE(before == bytes());
}

TEST_P(Wal, VerifyOfADamagedOne) {
  make();
  p().kill_server();
  std::string name = segment(), content = bytes()[name];
  std::string bad = content;
  bad[8192 + 100] ^= 4;
  std::ofstream(name, std::ios::binary) << bad;
  auto before = bytes();
  Ended damaged = wal({"verify"});
  EXPECT_EQ(damaged.code, 65) << damaged.out;
  std::string file = "wal/" + fs::path(name).filename().string();
  EXPECT_NE(damaged.out.find("damage: " + file + ": offset 8192, lsn "),
            std::string::npos)
      << damaged.out;
  EXPECT_NE(damaged.out.find("refuse to start"), std::string::npos);
  EXPECT_TRUE(before == bytes());
  EXPECT_EQ(p().run({"serve", "--root", p().root(), "--port", "0"}).code, 65);
  std::ofstream(name, std::ios::binary) << content;
  EXPECT_EQ(wal({"verify"}).code, 0);
}

// After a kill nobody can tell a last batch that the crash cut off from one
// that was acknowledged and has rotted since; nobody says that he can.
TEST_P(Wal, VerifySaysWhatCannotBeKnownOfATornTail) {
  make();
  p().kill_server();
  std::string name = segment(), bad = bytes()[name];
  std::size_t end = bad.find_last_not_of('\0');
  ASSERT_NE(end, bad.npos);
  bad[end] ^= 4;
  std::ofstream(name, std::ios::binary) << bad;
  Json json = Json::parse(wal({"verify", "--json"}).out, nullptr, false);
  EXPECT_EQ(json["verdict"], "torn");
  EXPECT_EQ(json["starts"], true);
  EXPECT_EQ(json["shut_down_clean"], false);
  EXPECT_EQ(json["torn_acknowledged"], "unknown");
  EXPECT_EQ(json["torn_first_lsn"], json["last_lsn"].get<int>() + 1);
  EXPECT_GE(json["torn_last_lsn"], json["torn_first_lsn"]);
  Ended text = wal({"verify"});
  EXPECT_EQ(text.code, 0) << text.out;
  EXPECT_NE(text.out.find("verdict: torn"), std::string::npos) << text.out;
  EXPECT_NE(text.out.find("may have been acknowledged"), std::string::npos)
      << text.out;
  EXPECT_EQ(text.out.find("never"), std::string::npos) << text.out;
}

TEST_P(Wal, InspectTellsAJobsStory) {
  make();
  auto shown = [this](std::vector<std::string> more) {
    more.insert(more.begin(), "inspect");
    return wal(std::move(more));
  };
  Ended all = shown({});  // beside the running server
  EXPECT_EQ(all.code, 0) << all.err;
  EXPECT_NE(all.out.find("kind=ext.wal"), std::string::npos) << all.out;
  EXPECT_EQ(all.out.find("unseen"), std::string::npos);
  EXPECT_EQ(all.out.find(token_.substr(token_.find('-') + 1)),
            std::string::npos);
  EXPECT_NE(shown({"--payload"}).out.find("unseen"), std::string::npos);
  Ended traced = shown({"--request-id", "trace-0", "--json"});
  std::istringstream lines(traced.out);
  std::vector<std::string> types;
  for (std::string line; std::getline(lines, line);) {
    Json record = Json::parse(line, nullptr, false);
    ASSERT_TRUE(record.is_object()) << line;
    types.push_back(record["type"]);
  }
  EXPECT_EQ(types, (std::vector<std::string>{"enqueue", "grant", "end"}))
      << traced.out;
  EXPECT_EQ(shown({"--limit", "2", "--type", "enqueue"}).out.find("grant"),
            std::string::npos);
  EXPECT_EQ(shown({"--job", "x"}).code, 2);
  EXPECT_EQ(shown({"--from", "9", "--to", "3"}).code, 2);
  EXPECT_EQ(shown({"--type", "thing"}).code, 2);
}

TEST_P(Wal, NoRootAndNoLog) {
  Ended none = p().run({"wal", "verify", "--root", p().root() + "-none"});
  EXPECT_EQ(none.code, 3) << none.err;
  EXPECT_EQ(p().run({"wal", "verify", "--prot"}).code, 2);
  EXPECT_EQ(p().run({"wal"}).code, 2);
  EXPECT_FALSE(fs::exists(p().root() + "-none"));
}

TEST_P(Wal, ASecondServerNamesTheLogsLock) {
  Serve serve;
  serve.workers = 0;
  start(serve);
  Ended second =
      p().run({"serve", "--root", p().root(), "--port", "0", "--workers", "0"});
  EXPECT_EQ(second.code, 75) << second.err;
  EXPECT_NE(second.err.find("queue/wal/LOCK"), std::string::npos) << second.err;
  EXPECT_NE(second.err.find(std::to_string(p().server())), std::string::npos)
      << second.err;
}

MACHINA_BOTH(Wal);

}  // namespace
}  // namespace machina::e2e
