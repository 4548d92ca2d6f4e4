// A root on a small disk of its own that somebody else fills to the last byte
// and empties again, under load and with kills: what was accepted ends in its
// right state, the server never ends by itself, and room heals it. Longer:
// tests/e2e/disk.

#include <fcntl.h>
#include <signal.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <thread>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

namespace fs = std::filesystem;

class Disk : public EndToEnd {
 protected:
  void TearDown() override {
    if (product_ != nullptr && mounted_) {
      if (p().server() > 0) {
        EXPECT_EQ(p().stop_server(), 0) << "a drain exits 0\n"
                                        << end_of(p().log());
      }
      EXPECT_TRUE(eventually(
          [&] { return run("umount " + p().root() + " 2>&1"); }, 10'000))
          << "the disk is still in use";
      run("umount -l " + p().root() + " 2>/dev/null");
    }
    EndToEnd::TearDown();
  }

  // An ext4 of `mib` in a file, mounted as the root. False, with the reason in
  // why_: it cannot be had here.
  bool mount(int mib) {
    const std::string image = p().dir() + "/disk.img";
    if (!run("truncate -s " + std::to_string(mib) + "M " + image +
             " && mkfs.ext4 -q -F -m 0 -E "
             "lazy_itable_init=0,lazy_journal_init=0 " +
             image + " >/dev/null 2>&1")) {
      why_ = "mkfs.ext4 makes no file system";
      return false;
    }
    if (!run("mount -o loop " + image + " " + p().root() + " 2>/dev/null")) {
      why_ = "no loop device can be mounted";
      return false;
    }
    mounted_ = true;
    return run("rmdir " + p().root() + "/lost+found; chmod 700 " + p().root());
  }

  static bool run(const std::string& line) {
    return std::system(line.c_str()) == 0;
  }

  std::uint64_t free_bytes() const {
    struct statvfs disk {};
    EXPECT_EQ(::statvfs(product_->root().c_str(), &disk), 0);
    return static_cast<std::uint64_t>(disk.f_bavail) * disk.f_frsize;
  }

  // To the last byte.
  void fill() {
    int fd = ::open(filler().c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    ASSERT_GE(fd, 0);
    off_t at = 0;
    for (off_t step = 64 << 20; step >= 4096;) {
      if (::posix_fallocate(fd, at, step) == 0) {
        at += step;
      } else {
        step /= 2;
      }
    }
    ::close(fd);
  }
  void empty() { fs::remove(filler()); }
  std::string filler() const { return product_->root() + "/filler"; }

  std::string level() {
    Json stats = p().get("/stats").json();
    return stats.is_object() && stats.contains("disk")
               ? stats["disk"].value("level", "")
               : "";
  }
  bool takes_jobs() {
    Answer answer = p().post("/v1/jobs", {{"kind", "noop"}});
    if (answer.status == 201) add(answer.json()["id"]);
    return answer.status == 201;
  }
  void add(const std::string& id) {
    std::lock_guard<std::mutex> lock(mutex_);
    acknowledged_.push_back(id);
  }

  // Jobs for the pool's workers and for one of our own, until stopped. What is
  // leased is completed until the server has said yes or that it is too late.
  void submit() {
    for (int n = 0; !stop_; ++n) {
      Json job = {{"kind", n % 2 == 0 ? "noop" : "ext.big"},
                  {"max_attempts", 100}};
      if (n % 2 != 0)
        job["payload"] = {{"text", std::string(n % 7 * 300, 'x')}};
      if (n % 5 == 0) job["delay_ms"] = 200;
      Answer answer = p().post("/v1/jobs", job);
      if (answer.status == 201) add(answer.json()["id"]);
      ++(answer.status == 201   ? taken_
         : answer.status == 507 ? refused_
         : answer.status == 0   ? unanswered_
                                : others_);
      sleep_ms(answer.status == 201 ? 2 : 20);
    }
  }
  void work() {
    for (int n = 0; !stop_;) {
      Answer leased = p().post(
          "/v1/leases", {{"worker", "w1"}, {"kinds", {"ext.*"}}, {"max", 4}});
      if (leased.status != 200) {
        sleep_ms(20);
        continue;
      }
      const Json got = leased.json();
      for (const Json& lease : got["leases"]) {
        const std::string at =
            "/v1/leases/" + lease["token"].get<std::string>();
        ++(p().call("PUT", at + "/artifacts/big", std::string(300'000, 'a'))
                       .status == 507
               ? uploads_refused_
               : uploads_);
        // Large ones now and then: history keeps all, and 500 cycles must fit.
        const std::size_t large = n++ % 64 == 0 ? 40'000 : 0;
        const Json end = {{"result", {{"text", std::string(large, 'r')}}}};
        while (!stop_) {
          int status = p().post(at + "/complete", end).status;
          if (status == 200 || status / 100 == 4) break;
          if (status == 507) ++ends_refused_;
          sleep_ms(50);
        }
      }
    }
  }

  // What takes the room.
  std::string files() {
    p().shell("cd " + p().root() + "; du -ak . | sort -rn | head -60 >" +
              p().dir() + "/files");
    return "\n" + read_file(p().dir() + "/files");
  }

  bool mounted_ = false;
  std::string why_;
  std::atomic<bool> stop_{false};
  std::atomic<int> taken_{0}, refused_{0}, unanswered_{0}, others_{0};
  std::atomic<int> uploads_{0}, uploads_refused_{0}, ends_refused_{0};
  std::mutex mutex_;
  std::vector<std::string> acknowledged_;
};

TEST_P(Disk, F05_FilledAndFreedUnderLoadWithKills) {
  const char* wanted = std::getenv("MACHINA_DISK_CYCLES");
  const int cycles = wanted != nullptr ? std::atoi(wanted) : 8;
  if (!mount(256)) GTEST_SKIP() << "no disk to fill: " << why_;
  Serve serve;
  serve.env["MACHINA_WAL_FSYNC"] = "1";
  // A job that waits for its next attempt, or whose lease's answer was lost
  // with a server, keeps its segment: not for longer than a cycle waits for
  // room.
  serve.env["MACHINA_RETRY_MIN_MS"] = "50";
  serve.env["MACHINA_RETRY_MAX_MS"] = "500";
  serve.env["MACHINA_LEASE_MS"] = "2000";
  start(serve);
  ASSERT_TRUE(takes_jobs());
  std::vector<std::thread> load;
  load.emplace_back([this] { submit(); });
  load.emplace_back([this] { work(); });
  int kills = 0;
  for (int cycle = 0; cycle < cycles && !HasFailure(); ++cycle) {
    fill();
    EXPECT_TRUE(eventually([&] { return level() == "hard"; }, 10'000))
        << cycle << ": " << level();
    if (cycle % 3 == 1) {
      ++kills;
      p().kill_server();
      std::string why;
      EXPECT_TRUE(p().restart(&why)) << "on a full disk: " << why;
    }
    if (cycle % 3 == 2) sleep_ms(300);  // it goes on for a while
    EXPECT_EQ(p().get("/health").status, 200) << cycle << end_of(p().log());
    empty();
    EXPECT_TRUE(eventually([&] { return takes_jobs(); }, 10'000))
        << cycle << ": " << p().get("/ready").body << files();
  }
  stop_ = true;
  for (std::thread& thread : load) thread.join();
  stop_ = false;
  std::thread rest([this] { work(); });
  const double until = now_ms() + 60'000 + cycles * 200;
  std::size_t lost = 0;
  for (const std::string& id : acknowledged_) {
    while (p().job(id).value("state", "") != "succeeded" && now_ms() < until) {
      sleep_ms(20);
    }
    Json job = p().job(id);
    if (job.value("state", "") == "succeeded") continue;
    if (++lost < 4) ADD_FAILURE() << id << " is lost: " << job.dump();
  }
  stop_ = true;
  rest.join();
  EXPECT_EQ(lost, 0u);
  EXPECT_GT(refused_, 0);
  EXPECT_GT(taken_, 0);
  EXPECT_GT(uploads_, 0);
  EXPECT_EQ(others_, 0) << "answers other than 201 and 507";
  EXPECT_EQ(p().log().find("poison"), std::string::npos) << end_of(p().log());
  std::printf(
      "%d cycles, %d kills: %zu jobs acknowledged, %zu lost; enqueue: %d "
      "taken, "
      "%d refused (507), %d unanswered; uploads: %d taken, %d refused; ends "
      "refused for a while: %d\n",
      cycles, kills, acknowledged_.size(), lost, taken_.load(), refused_.load(),
      unanswered_.load(), uploads_.load(), uploads_refused_.load(),
      ends_refused_.load());
}

TEST_P(Disk, F05_OnAFullDiskEndsAreTakenUploadsAreNotAndItIsSaid) {
  if (!mount(256)) GTEST_SKIP() << "no disk to fill: " << why_;
  Serve quiet;
  quiet.workers = 0;
  quiet.env["MACHINA_WAL_FSYNC"] = "1";
  start(quiet);
  for (int i = 0; i < 40; ++i) p().submit({{"kind", "ext.a"}});
  std::string waiting = p().submit({{"kind", "ext.b"}});
  Json leases = p().post("/v1/leases",
                         {{"worker", "w"}, {"kinds", {"ext.a"}}, {"max", 40}})
                    .json()["leases"];
  ASSERT_EQ(leases.size(), 40u);
  ASSERT_TRUE(eventually(
      [&] {
        Json disk = p().get("/stats").json()["disk"];
        return disk["held_bytes"] > disk["promised_bytes"];
      },
      10'000));
  fill();
  ASSERT_TRUE(eventually([&] { return level() == "hard"; }, 10'000));
  Json disk = p().get("/ready").json()["disk"];
  EXPECT_EQ(disk["level"], "hard");
  EXPECT_GT(disk["soft_bytes"], disk["hard_bytes"]);
  EXPECT_NE(disk.value("says", "").find("make room"), std::string::npos);
  EXPECT_EQ(p().post("/v1/jobs", {{"kind", "noop"}}).status, 507);
  const std::string first =
      "/v1/leases/" + leases[0]["token"].get<std::string>();
  Answer upload = p().call("PUT", first + "/artifacts/a", "x");
  EXPECT_EQ(upload.status, 507);
  EXPECT_EQ(upload.json().value("code", ""), "disk-low") << upload.body;
  EXPECT_EQ(p().call("POST", first + "/log?offset=0", "x").status, 507);
  // A result of the size that is held for each, and of every lease.
  for (std::size_t i = 0; i < leases.size(); ++i) {
    const std::string at =
        "/v1/leases/" + leases[i]["token"].get<std::string>();
    Answer ended =
        i % 4 == 3
            ? p().post(at + "/fail", {{"code", "exit"}, {"message", "no"}})
            : p().post(at + "/complete",
                       {{"result", {{"t", std::string(60'000, 'r')}}}});
    EXPECT_EQ(ended.status, 200) << i << ended.body;
  }
  EXPECT_EQ(p().post("/v1/jobs/" + waiting + "/cancel", Json::object()).status,
            200);
  Ended top = p().run({"top", "--once", "--server", p().url()});
  EXPECT_NE(top.out.find("disk hard"), std::string::npos) << top.out << top.err;
  p().kill_server();
  restart();  // still full
  EXPECT_EQ(level(), "hard");
  EXPECT_EQ(p().job(leases[0]["job"]["id"])["state"], "succeeded");
  EXPECT_EQ(p().job(waiting)["state"], "cancelled");
  empty();
  EXPECT_TRUE(eventually([&] { return takes_jobs(); }, 10'000));
  EXPECT_EQ(level(), "ok");
  EXPECT_EQ(p().log().find("poison"), std::string::npos) << end_of(p().log());
}

// A unit of what is held is as large as a segment on so small a file system.
TEST_P(Disk, F01_StartsOfAnIdleRootHoldNoMoreEachTime) {
  if (!mount(160)) GTEST_SKIP() << "no disk to fill: " << why_;
  Serve quiet;
  quiet.workers = 0;
  quiet.env["MACHINA_WAL_FSYNC"] = "1";
  start(quiet);
  const auto held = [&] {
    int files = 0;
    for (const auto& entry :
         fs::directory_iterator(p().root() + "/queue/wal")) {
      const std::string name = entry.path().filename();
      files += name.starts_with("held-") || name.starts_with("spare-");
    }
    return files;
  };
  for (int i = 0; i < 16; ++i) {
    ASSERT_TRUE(eventually([&] { return held() >= 2; }, 10'000)) << i;
    p().kill_server();
    restart();
  }
  EXPECT_LE(held(), 3);  // one of each, and one that is being made
  EXPECT_EQ(level(), "ok");
  EXPECT_TRUE(takes_jobs());
  // What many starts of an earlier version left goes back at the next.
  p().kill_server();
  const std::string wal = p().root() + "/queue/wal/";
  for (int n = 100; free_bytes() > (30 << 20); ++n) {
    ASSERT_TRUE(run("s=$(stat -c %s " + wal + "spare-*.tmp | head -1); " +
                    "fallocate -l $s " + wal + "held-" + std::to_string(n) +
                    ".tmp"));
  }
  restart();
  EXPECT_TRUE(eventually([&] { return level() == "ok"; }, 10'000)) << held();
  EXPECT_TRUE(takes_jobs());
}

INSTANTIATE_TEST_SUITE_P(, Disk, testing::Values(Who::root), identity);

}  // namespace
}  // namespace machina::e2e
