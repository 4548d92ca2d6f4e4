// The one door of new jobs (server/api/new_jobs.h), with a kind that looks at
// the host and may hang there until the test lets it go.

#include "server/api/new_jobs.h"

#include <condition_variable>
#include <mutex>

#include "tests/server/api/server_fixture.h"

namespace machina::test {
namespace {

// What a hung mount is: who comes in stays until it is opened.
class Mount {
 public:
  void enter() {
    std::unique_lock lock(mutex_);
    ++inside_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
  }
  bool wait_for(int inside) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(30),
                             [&] { return inside_ >= inside; });
  }
  void open() {
    std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int inside_ = 0;
  bool open_ = false;
};

// N2: what it refers to it owns.
KindFacts looking(std::shared_ptr<Mount> mount) {
  KindFacts looks;
  looks.check = [](const std::string&) -> Checked<KindFacts::Kept> {
    return KindFacts::Kept{};
  };
  looks.resolve =
      [mount](const std::string& payload) -> Checked<KindFacts::Kept> {
    if (payload.find("hang") != payload.npos) mount->enter();
    if (payload.find("gone") != payload.npos) return BadField{"repo", "no"};
    return KindFacts::Kept{R"({"seen":true})", "thing:x"};
  };
  return looks;
}

class NewJobsTest : public ServerTest {
 protected:
  NewJobsTest() { options_.kinds["looks"] = looking(mount_); }
  ~NewJobsTest() override { mount_->open(); }

  std::size_t jobs() { return local().get("/v1/jobs").json()["jobs"].size(); }

  std::shared_ptr<Mount> mount_ = std::make_shared<Mount>();
};

constexpr char kHangs[] = R"({"kind":"looks","payload":{"hang":1}})";
constexpr char kGood[] = R"({"kind":"looks","payload":{"a":1}})";
constexpr char kGone[] = R"({"kind":"looks","payload":{"gone":1}})";

TEST_F(NewJobsTest, WhatWasFoundIsKept) {
  start();
  Client c = tcp();
  EXPECT_EQ(c.post("/v1/jobs", kGood).status, 201);
  EXPECT_EQ(control_.last_job().payload, R"({"seen":true})");
  EXPECT_EQ(control_.last_job().concurrency_key, "thing:x");
  const Reply gone = c.post("/v1/jobs", kGone);
  EXPECT_EQ(gone.status, 400);
  EXPECT_EQ(gone.code(), "invalid-payload");
  EXPECT_EQ(gone.field(), "payload.repo");
  EXPECT_EQ(gone.json()["detail"], "payload.repo: no");
  const Reply keyed = c.post(
      "/v1/jobs", R"({"kind":"looks","payload":{},"concurrency_key":"mine"})");
  EXPECT_EQ(keyed.field(), "concurrency_key") << keyed.body;
}

TEST_F(NewJobsTest, AResolveThatHangsIsGivenUpAndStopsNobody) {
  options_.resolve_ms = 100;
  start();
  // All the threads there are.
  std::vector<Client> stuck;
  for (int i = 0; i < kResolveThreads; ++i) {
    stuck.push_back(tcp());
    stuck.back().start("POST", "/v1/jobs", kHangs);
  }
  ASSERT_TRUE(mount_->wait_for(kResolveThreads));
  Client c = tcp();
  const Reply made = c.post("/v1/jobs", R"({"kind":"noop","payload":{}})");
  EXPECT_EQ(made.status, 201);
  // File threads answer this one.
  const std::string id = made.json()["id"];
  EXPECT_EQ(c.get("/v1/jobs/" + id + "/artifacts").status, 200);
  // No thread is left, and this one is not waited for any longer than the rest.
  stuck.push_back(tcp());
  stuck.back().start("POST", "/run_sync", kGood);
  for (Client& one : stuck) {
    Reply r = one.reply();
    EXPECT_EQ(r.status, 503) << r.body;
    EXPECT_EQ(r.code(), "resolve-timeout");
    EXPECT_NE(r.json()["detail"].get<std::string>().find("100 ms"),
              std::string::npos);
    EXPECT_EQ(r.headers["retry-after"], "1");
  }
  EXPECT_EQ(jobs(), 1u);
  mount_->open();
  // The threads are back as soon as they have left the mount.
  Reply r;
  for (int i = 0; i < 1000 && r.status != 201; ++i) {
    r = c.post("/v1/jobs", kGood);
  }
  EXPECT_EQ(r.status, 201);
}

TEST_F(NewJobsTest, RequestsOfOneConnectionKeepTheirOrder) {
  options_.resolve_ms = 60'000;
  start();
  Client c = tcp();
  c.start("POST", "/v1/jobs", kHangs);
  c.start("POST", "/v1/jobs", R"({"kind":"noop","payload":{}})");
  ASSERT_TRUE(mount_->wait_for(1));
  EXPECT_EQ(jobs(), 0u);
  mount_->open();
  const Reply first = c.reply(), second = c.reply();
  EXPECT_EQ(first.json()["kind"], "looks") << first.body;
  EXPECT_EQ(second.json()["kind"], "noop") << second.body;
  EXPECT_LT(first.json()["id"], second.json()["id"]);
}

TEST_F(NewJobsTest, EachJobOfABulkRequestHasItsOwnAnswerInOrder) {
  start();
  Client c = tcp();
  const std::string body = std::string("[") + kGood + "," + kGone +
                           R"(,{"kind":"noop","payload":{"bad":1}},)" +
                           R"({"kind":"noop","payload":{}},)" + kGood + "]";
  const Json all = c.post("/v1/jobs", body).json();
  EXPECT_EQ(all["accepted"], 3) << all;
  EXPECT_EQ(all["rejected"], 2);
  ASSERT_EQ(all["jobs"].size(), 5u);
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(all["jobs"][i]["index"], i);
    EXPECT_EQ(all["jobs"][i].contains("problem"), i == 1 || i == 2) << all;
  }
  EXPECT_EQ(all["jobs"][1]["problem"]["field"], "payload.repo");
  EXPECT_EQ(all["jobs"][1]["problem"]["index"], 1);
  EXPECT_EQ(all["jobs"][2]["problem"]["field"], "payload.bad");
  const Json none = c.post("/v1/jobs", std::string("[") + kGone + "]").json();
  EXPECT_EQ(none["accepted"], 0) << none;
  EXPECT_EQ(none["rejected"], 1);
}

TEST_F(NewJobsTest, ChildrenComeByTheSameDoor) {
  start();
  Client c = tcp();
  const auto with_child = [](const char* child) {
    return std::string("{\"enqueue\":[{\"kind\":\"ext.b\"},") + child + "]}";
  };
  std::string token = leased_token(c);
  Reply r = c.post("/v1/leases/" + token + "/complete", with_child(kGone));
  EXPECT_EQ(r.status, 400);
  EXPECT_EQ(r.field(), "enqueue[1].payload.repo");
  EXPECT_EQ(r.json()["detail"], "enqueue[1]: payload.repo: no");
  r = c.post("/v1/leases/" + token + "/complete", with_child(kGood));
  EXPECT_EQ(r.status, 200) << r.body;
  // Again, and the host is not asked for what is there already.
  const auto item = [](const std::string& of, const char* child) {
    return "{\"token\":\"" + of + "\",\"enqueue\":[" + child + "]}";
  };
  const std::string other = leased_token(c), third = leased_token(c);
  r = c.post("/v1/leases/complete", "{\"items\":[" + item(token, kGone) + "," +
                                        item(other, kGone) + "," +
                                        item(third, kGood) + "]}");
  const Json items = r.json()["items"];
  ASSERT_EQ(items.size(), 3u) << r.body;
  EXPECT_NE(items[0].value("problem", Json())["code"], "invalid-payload");
  EXPECT_EQ(items[1]["problem"]["field"], "enqueue[0].payload.repo");
  EXPECT_EQ(items[2]["state"], "succeeded") << r.body;
}

TEST_F(NewJobsTest, AClientThatHangsUpHasItsJob) {
  options_.resolve_ms = 60'000;
  start();
  // One may still read; the other is gone.
  Client silent = tcp(), gone = tcp();
  for (Client* one : {&silent, &gone}) {
    one->start("POST", "/v1/jobs", kHangs, "Prefer: wait=60\r\n");
  }
  ASSERT_TRUE(mount_->wait_for(2));
  const int before = control_.abandoned;
  silent.end();
  gone.reset();
  while (control_.abandoned == before) std::this_thread::yield();
  mount_->open();
  EXPECT_EQ(silent.reply().status, 202) << "it is not waited for";
  Client c = local();
  std::size_t there = 0;
  for (int i = 0; i < 10'000 && there < 2; ++i) {
    there = c.get("/v1/jobs").json()["jobs"].size();
  }
  EXPECT_EQ(there, 2u);
}

TEST_F(NewJobsTest, ADrainAnswersAndWaitsForNoResolve) {
  options_.resolve_ms = 60'000;
  start();
  Client c = tcp();
  c.start("POST", "/v1/jobs", kHangs);
  ASSERT_TRUE(mount_->wait_for(1));
  local().post("/shutdown", "{}");
  const Reply r = c.reply();
  EXPECT_EQ(r.status, 503) << r.body;
  EXPECT_EQ(r.code(), "resolve-timeout");
  EXPECT_EQ(join(), 0);
}

// The good ones of a bulk request are carried out: that must be answered too.
TEST_F(NewJobsTest, ADrainAnswersABulkRequestWhosePartHangs) {
  options_.resolve_ms = 60'000;
  start();
  Client c = tcp();
  c.start("POST", "/v1/jobs",
          "[" + std::string(kHangs) + R"(,{"kind":"ext.a"}])");
  ASSERT_TRUE(mount_->wait_for(1));
  local().post("/shutdown", "{}");
  const Reply r = c.reply();
  ASSERT_EQ(r.status / 100, 2) << r.body;
  EXPECT_EQ(r.json()["accepted"], 1) << r.body;
  EXPECT_NE(r.body.find("the server ends"), std::string::npos) << r.body;
  EXPECT_EQ(join(), 0);
}

TEST(ResolverTest, TooMuchThatWaitsIsRefused) {
  auto mount = std::make_shared<Mount>();
  Resolver resolver({{"looks", looking(mount)}}, system_clock(), 60'000,
                    [](const std::function<void()>&) {});
  const auto then = [](const Resolver::Found&) {};
  const std::string large(kResolveBytesMax / 2 + 1, 'x');
  ASSERT_TRUE(resolver.run({{"looks", "hang"}}, then));
  ASSERT_TRUE(resolver.run({{"looks", large}}, then));
  EXPECT_FALSE(resolver.run({{"looks", large}}, then));
  EXPECT_TRUE(resolver.run({{"looks", "{}"}}, then));
  resolver.give_up(true);
  EXPECT_TRUE(resolver.run({{"looks", large}}, then)) << "its room came back";
  mount->open();
}

TEST(ResolverTest, TooManyThatWaitAreRefused) {
  auto mount = std::make_shared<Mount>();
  std::mutex mutex;
  std::deque<std::function<void()>> posted;
  int told = 0;
  std::vector<bool> found;
  {
    Resolver resolver({{"looks", looking(mount)}}, system_clock(), 60'000,
                      [&](std::function<void()> run) {
                        std::lock_guard lock(mutex);
                        posted.push_back(std::move(run));
                      });
    const auto then = [&](Resolver::Found all) {
      ++told;
      found.push_back(all.at(0).has_value());
    };
    for (std::size_t i = 0; i < kResolvesMax; ++i) {
      ASSERT_TRUE(resolver.run({{"looks", "hang"}}, then));
    }
    EXPECT_FALSE(resolver.run({{"looks", "{}"}}, then));
    ASSERT_TRUE(mount->wait_for(kResolveThreads));
    resolver.give_up(false);
    EXPECT_EQ(told, 0) << "their time is not over";
    resolver.give_up(true);
    EXPECT_EQ(told, static_cast<int>(kResolvesMax));
    EXPECT_TRUE(resolver.run({{"looks", "{}"}}, then));
  }
  // Its end did not wait for those that hang, and they tell nobody any more.
  EXPECT_EQ(std::count(found.begin(), found.end(), true), 0);
  mount->open();
}

}  // namespace
}  // namespace machina::test
