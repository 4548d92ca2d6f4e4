// One job, all the way, as docs/ARCHITECTURE.md tells it: bytes on a socket,
// request, command, decision, record, batch, answer, worker, completion, log,
// history. The real server, shard, core, log and SQLite in one process; the
// worker is this test, speaking HTTP as any worker may. What the log and the
// history then hold is read with the server gone.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <future>
#include <regex>
#include <sstream>
#include <thread>

#include "queue/base/storage.h"
#include "queue/history/history.h"
#include "queue/wal/log.h"
#include "server/api/server.h"
#include "tests/server/api/server_fixture.h"
#include "tests/support/places.h"

namespace machina::test {
namespace {

class JobInTheLog : public testing::Test {
 protected:
  JobInTheLog() {
    char path[] = "/var/tmp/machina-life-XXXXXX";
    root_ = mkdtemp(path);
    for (const char* dir : {"queue", "history", "logs", "artifacts"}) {
      std::filesystem::create_directory(root_ + "/" + dir);
    }
  }
  ~JobInTheLog() override {
    std::error_code ignored;
    std::filesystem::remove_all(root_, ignored);
  }

  // Runs the server on a thread while `during` talks to it; its exit code.
  template <class During>
  int serve(During during) {
    ServerOptions options;
    options.root = root_;
    options.port = 0;
    options.socket_path = root_ + "/machina.sock";
    options.shard.core.fsync = options.shard.log.fsync = true;
    options.shard.history_dir = root_ + "/history";
    std::unique_ptr<Storage> storage;
    ServerHooks hooks;
    hooks.signals = false;
    hooks.open_shard =
        [&](RecoveryReport* report) -> Result<std::unique_ptr<Shard>> {
      auto opened = open_posix_storage(root_ + "/queue");
      if (!opened) return opened.error();
      storage = std::move(*opened);
      return Shard::open(*storage, system_clock(), system_random(),
                         options.shard, report);
    };
    std::promise<int> listening;
    hooks.listening = [&](int port) { listening.set_value(port); };
    int exit_code = -1;
    std::thread thread([&] { exit_code = run_server(options, hooks); });
    during(Client::tcp(listening.get_future().get()));
    Client::local(options.socket_path).post("/shutdown", "{}");
    thread.join();
    return exit_code;
  }

  // What the log holds, in order, as a later start would read it.
  std::vector<Record> log() {
    auto storage = open_posix_storage(root_ + "/queue");
    EXPECT_TRUE(storage);
    std::vector<Record> records;
    RecoveryReport report;
    LogOptions options;
    auto log = FileLog::open(
        **storage, options, 0,
        [](Lsn, std::span<const std::byte>) { return Result<void>{}; },
        [&](const Record& record) {
          records.push_back(record);
          return Result<void>{};
        },
        &report);
    EXPECT_TRUE(log) << log.error().what;
    EXPECT_TRUE(report.clean) << report.text;
    return records;
  }

  std::string root_;
};

TEST_F(JobInTheLog, IsThreeRecordsAndOneRow) {
  std::string id, fence;
  const int exit_code = serve([&](Client client) {
    // Steps 1 to 6: bytes in, 201 out, and by then it is synced.
    Reply made = client.post(
        "/v1/jobs", R"({"kind":"ext.life","payload":{"n":[1,2.50,"x"]}})");
    ASSERT_EQ(made.status, 201) << made.body;
    id = made.json()["id"];
    EXPECT_EQ(made.headers["location"], "/v1/jobs/" + id);
    EXPECT_EQ(made.json()["state"], "ready");
    EXPECT_EQ(made.json()["durability"], "fsync");

    // Step 7: a worker gets it, payload as it was sent.
    Reply leased =
        client.post("/v1/leases", R"({"worker":"w1","kinds":["ext.*"]})");
    ASSERT_EQ(leased.status, 200) << leased.body;
    EXPECT_NE(leased.body.find(R"({"n":[1,2.50,"x"]})"), std::string::npos);
    const Json lease = leased.json()["leases"][0];
    EXPECT_EQ(lease["job"]["id"], id);
    EXPECT_EQ(lease["job"]["attempt"], 1);
    fence = lease["fence"];
    const std::string token = lease["token"];
    EXPECT_EQ(token.substr(0, 16), fence);

    // Step 8: it ends, once; a repeat gets the same answer, a thief none.
    const std::string end = R"({"result":{"ok":true}})";
    Reply ended = client.post("/v1/leases/" + token + "/complete", end);
    ASSERT_EQ(ended.status, 200) << ended.body;
    EXPECT_EQ(ended.json()["state"], "succeeded");
    EXPECT_EQ(client.post("/v1/leases/" + token + "/complete", end).status,
              200);
    EXPECT_EQ(
        client.post("/v1/leases/" + fence + "-0000000000000000/complete", end)
            .code(),
        "stale-lease");
    Reply seen = client.get("/v1/jobs/" + id);
    EXPECT_EQ(seen.json()["result"]["ok"], true);
  });
  EXPECT_EQ(exit_code, 0);

  // Step 9, seen from outside: three records and one row.
  std::vector<Record> records = log();
  std::erase_if(records, [](const Record& record) {
    return std::holds_alternative<ClockRecord>(record.body);  // of no job
  });
  ASSERT_EQ(records.size(), 3u);
  EXPECT_EQ(to_string(std::get<EnqueueRecord>(records[0].body).id), id);
  const auto& grant = std::get<GrantRecord>(records[1].body);
  EXPECT_EQ(fence_hex(grant.fence), fence);
  EXPECT_EQ(grant.worker, "w1");
  const auto& end = std::get<EndRecord>(records[2].body);
  EXPECT_EQ(end.fence, grant.fence);
  EXPECT_EQ(end.outcome.result, R"({"ok":true})");
  EXPECT_EQ(end.body_place, records[0].place);

  auto history = History::open(root_ + "/history");
  ASSERT_TRUE(history) << history.error().what;
  EXPECT_GE((*history)->applied(), records[2].lsn);
  auto row = (*history)->find(*parse_job_id(id), system_clock().wall_ms());
  ASSERT_TRUE(row && *row);
  EXPECT_EQ((*row)->body.job.payload, R"({"n":[1,2.50,"x"]})");
  EXPECT_EQ((*row)->end.state, State::succeeded);
}

// The page that tells the story names files and functions; they exist.
TEST_F(JobInTheLog, ThePageNamesWhatIsThere) {
  const std::string tree = kSourceDir;
  std::stringstream page;
  page << std::ifstream(tree + "/docs/ARCHITECTURE.md").rdbuf();
  const std::string text = page.str();
  const std::size_t from = text.find("## The life of a job");
  const std::size_t to = text.find("\n## ", from + 5);
  ASSERT_NE(to, std::string::npos);
  const std::string story = text.substr(from, to - from);

  const std::regex named(R"(`([A-Za-z_:]+)`\s*(?:in|\()\s*`([a-z0-9_/.]+)`)");
  int found = 0;
  for (std::sregex_iterator at(story.begin(), story.end(), named), end;
       at != end; ++at, ++found) {
    std::string function = (*at)[1];
    function = function.substr(function.rfind(':') + 1);
    std::stringstream source;
    source << std::ifstream(tree + "/" + std::string((*at)[2])).rdbuf();
    EXPECT_NE(source.str().find(function + "("), std::string::npos)
        << (*at)[2] << " has no " << (*at)[1];
  }
  EXPECT_GE(found, 9);
}

}  // namespace
}  // namespace machina::test
