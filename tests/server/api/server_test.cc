// Starting, authentication, draining, poison: a whole life of a server.

#include <sys/stat.h>

#include <fstream>

#include "server/api/service.h"
#include "server/auth/tokens.h"
#include "tests/server/api/server_fixture.h"

namespace machina::test {
namespace {

class ServerLife : public ServerTest {};

TEST_F(ServerLife, BearerIsNeededOnTcpOnly) {
  options_.api_token = "s3cret";
  start();
  Client c = tcp();
  for (const char* header :
       {"", "Authorization: Bearer wrong\r\n", "Authorization: Bearer \r\n",
        "Authorization: Basic s3cret\r\n", "Authorization: Bearer s3cre\r\n",
        "Authorization: Bearer s3crets3cret\r\n",
        "Authorization: s3cret\r\n"}) {
    for (const char* path : {"/v1/jobs", "/stats", "/nowhere"}) {
      Reply r = c.call("GET", path, {}, header);
      EXPECT_EQ(r.status, 401) << header;
      EXPECT_EQ(r.headers["www-authenticate"], "Bearer");
      EXPECT_EQ(r.code(), "unauthorized");
    }
    EXPECT_EQ(c.post("/v1/jobs", R"({"kind":"a"})", header).status, 401);
  }
  EXPECT_EQ(
      c.call("GET", "/v1/jobs", {}, "Authorization: Bearer s3cret\r\n").status,
      200);
  EXPECT_EQ(
      c.call("GET", "/v1/jobs", {}, "authorization: bearer s3cret\r\n").status,
      200);
  for (const char* open : {"/health", "/ready", "/metrics"}) {
    EXPECT_EQ(c.get(open).status, 200);
  }
  Client l = local();
  EXPECT_EQ(l.get("/v1/jobs").status, 200);
}

TEST_F(ServerLife, WithoutATokenWebPagesAreKeptOut) {
  start();
  auto ask = [&](std::string_view headers, const char* path = "/v1/jobs") {
    Client c = tcp();
    c.send("GET " + std::string(path) + " HTTP/1.1\r\n" + std::string(headers) +
           "\r\n");
    return c.reply().status;
  };
  std::string port = std::to_string(port_);
  EXPECT_EQ(ask("Host: localhost:" + port + "\r\n"), 200);
  EXPECT_EQ(ask("Host: 127.0.0.1:" + port + "\r\n"), 200);
  EXPECT_EQ(ask("Host: [::1]:" + port + "\r\n"), 200);
  EXPECT_EQ(ask("Host: localhost:1\r\nOrigin: http://localhost:1\r\n"), 200);
  EXPECT_EQ(ask("Host: localhost:1\r\nOrigin: http://localhost:2\r\n"), 403);
  EXPECT_EQ(ask("Host: localhost\r\nOrigin: https://evil.test\r\n"), 403);
  EXPECT_EQ(ask("Host: localhost\r\nOrigin: null\r\n"), 403);
  EXPECT_EQ(ask("Host: evil.test\r\n"), 403);
  EXPECT_EQ(ask("Host: localhost.evil.test\r\n"), 403);
  EXPECT_EQ(ask("Host: 127.0.0.1.evil.test\r\n"), 403);
  EXPECT_EQ(ask("Host: evil.test\r\n", "/health"), 200);
  EXPECT_EQ(ask("Host: evil.test\r\n", "/nothing"), 403);
  Client l = local();
  l.send("GET /v1/jobs HTTP/1.1\r\nHost: machina\r\n\r\n");
  EXPECT_EQ(l.reply().status, 200);
}

TEST_F(ServerLife, HeadIsGetWithoutItsBody) {
  start();
  Client c = tcp();
  std::string token = leased_token(c);
  c.call("PUT", "/v1/leases/" + token + "/artifacts/a.txt", "hello");
  for (const std::string& path :
       {std::string("/health"), std::string("/v1/jobs"),
        "/v1/jobs/" + last_job_, "/v1/jobs/" + last_job_ + "/artifacts/a.txt",
        std::string("/v1/jobs/0")}) {
    Reply whole = c.get(path);
    c.send("HEAD " + path + " HTTP/1.1\r\nHost: localhost\r\n\r\n");
    Reply head = c.reply_without_body();
    EXPECT_EQ(head.status, whole.status) << path;
    EXPECT_EQ(head.headers["content-length"], whole.headers["content-length"])
        << path;
    EXPECT_EQ(head.headers["content-type"], whole.headers["content-type"]);
  }
  c.send("HEAD /enqueue HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(c.reply_without_body().status, 405);
  EXPECT_EQ(c.get("/health").json()["ok"], true);
}

TEST_F(ServerLife, UnauthorizedBodiesAreNotWaitedFor) {
  options_.api_token = "s3cret";
  start();
  Client c = tcp();
  c.send(
      "POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n"
      "Expect: 100-continue\r\n\r\n");
  EXPECT_EQ(c.reply().status, 401);
}

TEST_F(ServerLife, SocketIsOursAlone) {
  start();
  struct stat info;
  ASSERT_EQ(stat(options_.socket_path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST_F(ServerLife, StaleSocketIsReplacedButNothingElse) {
  {
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    options_.socket_path.copy(to.sun_path, sizeof to.sun_path - 1);
    ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
    close(fd);
  }
  start();
  EXPECT_EQ(local().get("/health").status, 200);
  EXPECT_EQ(stop(), 0);
  std::ofstream(options_.socket_path) << "mine";
  exited_ = false;
  start();
  EXPECT_EQ(join(), 2);
  EXPECT_TRUE(std::filesystem::is_regular_file(options_.socket_path));
}

TEST_F(ServerLife, PortFileNamesThePort) {
  options_.port_file = root_ + "/port";
  start();
  int port = 0;
  std::ifstream(options_.port_file) >> port;
  EXPECT_EQ(port, port_);
}

TEST_F(ServerLife, TakenPortIsExit2) {
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&at), sizeof at), 0);
  ASSERT_EQ(listen(fd, 1), 0);
  socklen_t size = sizeof at;
  getsockname(fd, reinterpret_cast<sockaddr*>(&at), &size);
  options_.port = ntohs(at.sin_port);
  start();
  EXPECT_EQ(join(), 2);
  EXPECT_EQ(control_.closed, 1);  // the log was left clean
  close(fd);
}

TEST_F(ServerLife, OpenAddressWithoutTokenIsExit2) {
  options_.host = "0.0.0.0";
  start();
  EXPECT_EQ(join(), 2);
  EXPECT_EQ(control_.closed, 0);
}

TEST_F(ServerLife, OpenErrorsHaveTheirExitCodes) {
  const std::pair<Code, int> cases[] = {{Code::conflict, 75},
                                        {Code::corrupt, 65},
                                        {Code::newer, 2},
                                        {Code::invalid, 2},
                                        {Code::io, 74}};
  for (const auto& [code, exit_code] : cases) {
    ServerHooks hooks;
    hooks.signals = false;
    Code c = code;
    hooks.open_shard = [c](RecoveryReport*) -> Result<std::unique_ptr<Shard>> {
      return Error{c, "no"};
    };
    EXPECT_EQ(run_server(options_, hooks), exit_code);
  }
}

TEST_F(ServerLife, TokenKeySurvivesRestartsAndIsOurs) {
  start();
  Client c = local();
  std::string token = leased_token(c);
  c.shut();
  stop();
  struct stat info;
  ASSERT_EQ(stat((root_ + "/queue/token.key").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  EXPECT_EQ(info.st_size, 32);
  auto tokens = Tokens::open(root_ + "/queue/token.key");
  ASSERT_TRUE(tokens);
  EXPECT_TRUE((*tokens)->check(token).ours);
  auto others = Tokens::open(root_ + "/other.key");
  ASSERT_TRUE(others);
  EXPECT_TRUE((*others)->check(token).formed);
  EXPECT_FALSE((*others)->check(token).ours);
  chmod((root_ + "/queue/token.key").c_str(), 0644);
  auto loose = Tokens::open(root_ + "/queue/token.key");
  ASSERT_FALSE(loose);
  EXPECT_EQ(loose.error().code, Code::corrupt);
}

TEST_F(ServerLife, DrainLetsJobsFinish) {
  options_.drain_ms = 5000;
  start();
  Client w = local(), parked = local(), pool = local(), c = tcp();
  std::string token = leased_token(w);
  parked.start("POST", "/v1/leases",
               R"({"worker":"v","kinds":["zzz"],"wait_ms":30000})");
  pool.post("/v1/pools/p/sync", R"({"wait_ms":30000})");
  pool.start("POST", "/v1/pools/p/sync", R"({"wait_ms":30000})");
  EXPECT_TRUE(pool.quiet(50));
  Reply r = c.post("/shutdown", R"({"mode":"drain"})");
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(pool.reply(2000).json()["drain"], true);
  EXPECT_EQ(parked.reply(2000).status, 204);
  r = c.get("/ready");
  EXPECT_EQ(r.status, 503);
  EXPECT_NE(r.body.find("draining"), std::string::npos);
  EXPECT_EQ(parked.post("/v1/leases", R"({"worker":"v","kinds":["*"]})").status,
            503);
  EXPECT_FALSE(exited_);
  EXPECT_EQ(w.post("/v1/leases/" + token + "/complete", "").status, 200);
  pool.shut();
  EXPECT_EQ(join(), 0);
  EXPECT_EQ(control_.released, 0);
  EXPECT_EQ(control_.closed, 1);
}

TEST_F(ServerLife, DrainGivesBackWhatDoesNotFinish) {
  options_.drain_ms = 100;
  start();
  Client w = local();
  leased_token(w);
  EXPECT_EQ(w.post("/shutdown", "").status, 200);
  EXPECT_EQ(join(), 0);
  EXPECT_EQ(control_.released, 1);
}

TEST_F(ServerLife, HandoverLeavesJobsAndPoolsAlone) {
  start();
  Client w = local(), pool = local();
  leased_token(w);
  pool.post("/v1/pools/p/sync", R"({"wait_ms":30000})");
  pool.start("POST", "/v1/pools/p/sync", R"({"wait_ms":30000})");
  EXPECT_EQ(w.post("/shutdown", R"({"mode":"handover"})").status, 200);
  EXPECT_EQ(pool.reply(2000).json()["drain"], false);
  EXPECT_EQ(join(), 0);
  EXPECT_EQ(control_.released, 0);
}

TEST_F(ServerLife, ShutdownIsStrict) {
  start();
  Client c = tcp();
  EXPECT_EQ(c.post("/shutdown", R"({"mode":"now"})").field(), "mode");
  EXPECT_EQ(c.post("/shutdown", R"({"moed":"drain"})").code(), "unknown-field");
  EXPECT_EQ(c.get("/ready").status, 200);
}

TEST_F(ServerLife, PoisonAnswersUnknownAndExits74) {
  start();
  control_.hold = true;
  Client c = tcp();
  c.start("POST", "/v1/jobs", R"({"kind":"a"})");
  EXPECT_TRUE(c.quiet(50));
  control_.poison = true;
  control_.poke();
  Reply r = c.reply(2000);
  EXPECT_EQ(r.status, 503);
  EXPECT_EQ(r.code(), "poisoned");
  EXPECT_EQ(join(), 74);
  EXPECT_EQ(control_.closed, 0);
}

TEST_F(ServerLife, ProdIsReadyOnceAWorkerProvedItsLevel) {
  options_.prod = true;
  options_.workers = 1;
  options_.min_level = 3;
  start();
  Client c = local();
  Reply r = c.get("/ready");
  EXPECT_EQ(r.status, 503);
  EXPECT_NE(r.body.find("L3"), std::string::npos);
  c.post("/v1/pools/p/sync", R"({"workers":[{"name":"w","level":"L3"}]})");
  EXPECT_EQ(c.get("/ready").status, 200);
}

TEST_F(ServerLife, ProdWithTooWeakSandboxIsExit2) {
  options_.prod = true;
  options_.workers = 2;
  options_.min_level = 3;
  start();
  Client c = local();
  c.post("/v1/pools/p/sync", R"({"workers":[{"name":"w","level":"L1"}]})");
  usleep(700'000);
  EXPECT_FALSE(exited_);  // the other may be better
  c.post("/v1/pools/p/sync", R"({"workers":[{"name":"w","level":"L1"},)"
                             R"({"name":"v","level":"L2"}]})");
  c.shut();
  EXPECT_EQ(join(), 2);
}

TEST_F(ServerLife, PoolIsStartedAndStartedAgain) {
  options_.workers = 1;
  options_.pool_argv = {"/bin/sh", "-c", "echo up $X $* >> \"$0\"; exit 3",
                        root_ + "/starts"};
  options_.pool_env = {"X=env"};
  start();
  const std::string line = "up env --workers 1\n";
  std::string text;
  for (int i = 0; i < 300; ++i) {
    std::ifstream in(root_ + "/starts");
    text.assign(std::istreambuf_iterator<char>(in), {});
    if (text.size() >= 2 * line.size()) break;
    usleep(10'000);
  }
  // It is told how many there are to be.
  EXPECT_EQ(text.substr(0, 2 * line.size()), line + line);
}

TEST_F(ServerLife, ConnectionsAreCapped) {
  options_.connections_max = 2;
  start();
  Client w = local(), v = local(), u = local();  // take no client's place
  for (Client* c : {&w, &v, &u}) EXPECT_EQ(c->get("/health").status, 200);
  Client a = tcp(), b = tcp();
  EXPECT_EQ(a.get("/health").status, 200);
  EXPECT_EQ(b.get("/health").status, 200);
  Client d = tcp();
  Reply r = d.reply();
  EXPECT_EQ(r.status, 503);
  EXPECT_TRUE(d.at_end());
  EXPECT_EQ(local().get("/health").status, 200);  // workers still get in
  a.shut();
  for (int i = 0; i < 50; ++i) {
    Client e = tcp();
    if (e.get("/health").status == 200) return;
    usleep(10'000);
  }
  FAIL() << "no room was made";
}

TEST_F(ServerLife, TheUnixSocketHasPlacesOfItsOwn) {
  options_.connections_max = 16;
  start();
  std::vector<Client> all;
  for (int i = 0; i < 256; ++i) {
    all.push_back(local());
    ASSERT_EQ(all.back().get("/health").status, 200) << i;
  }
  Client more = local();
  EXPECT_EQ(more.reply().status, 503);
  EXPECT_TRUE(more.at_end());
  EXPECT_EQ(tcp().get("/health").status, 200);
  // Places that were left are given again; the fixture needs one, too.
  all.clear();
  int served = 0;
  for (int i = 0; i < 1000 && served < 20; ++i) {
    all.push_back(local());
    if (all.back().get("/health").status == 200) {
      ++served;
    } else {
      all.pop_back();
      usleep(10'000);
    }
  }
  EXPECT_EQ(served, 20);
}

TEST_F(ServerLife, HalfClosedClientStillGetsItsAnswer) {
  start();
  Client c = tcp();
  c.start("POST", "/v1/jobs", R"({"kind":"a"})");
  c.end();
  EXPECT_EQ(c.reply().status, 201);
  EXPECT_TRUE(c.at_end());
}

// Requests and end in one packet, so that they are read in one turn; answers
// that are made at once are sent all the same.
TEST_F(ServerLife, F09_TheEndInTheSameTurnLosesNoAnswer) {
  start();
  for (int i = 0; i < 20; ++i) {
    for (const auto& [text, status] : std::vector<std::pair<std::string, int>>{
             {"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 200},
             {"GET /nope HTTP/1.1\r\nHost: localhost\r\n\r\n", 404},
             {"GET /health HTTP/1.1\r\nHost: a b\r\n\r\n", 400},
             {"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n"
              "Content-Length: 99999999\r\n\r\n{",
              413}}) {
      for (bool over_tcp : {true, false}) {
        Client c = over_tcp ? tcp() : local();
        c.send(text);
        c.end();
        EXPECT_EQ(c.reply().status, status) << text;
        EXPECT_TRUE(c.at_end());
      }
    }
  }
}

// A bare end is all that is seen of one that is gone; one that still reads is
// told how things are. Either way nothing is waited for.
TEST_F(ServerLife, F09_AHalfClosedWaitIsAnsweredAtOnce) {
  start();
  Client a = tcp();
  a.start("POST", "/v1/jobs", R"({"kind":"zzz.a"})", "Prefer: wait=60\r\n");
  a.end();
  EXPECT_EQ(a.reply(5000).status, 202);
  EXPECT_TRUE(a.at_end());
  Client b = tcp();
  b.start("POST", "/v1/leases",
          R"({"worker":"w","kinds":["none"],"wait_ms":30000})");
  EXPECT_TRUE(b.quiet(50));
  b.end();
  EXPECT_EQ(b.reply(5000).status, 204);
  Client w = tcp();
  const std::string token = leased_token(w);
  Client h = tcp();
  h.start("POST", "/v1/leases/heartbeat",
          R"({"items":[{"token":")" + token + R"("}],"wait_ms":30000})");
  EXPECT_TRUE(h.quiet(50));
  h.end();
  EXPECT_EQ(h.reply(5000).status, 200);
  Client p = local();
  p.post("/v1/pools/p/sync", "{}");
  p.start("POST", "/v1/pools/p/sync", R"({"wait_ms":30000})");
  EXPECT_TRUE(p.quiet(50));
  p.end();
  EXPECT_EQ(p.reply(5000).status, 200);
}

// Also where nothing is read any more: 64 requests are open.
TEST_F(ServerLife, F09_AnEndIsSeenWhileReadingIsPaused) {
  start();
  Client c = tcp();
  const std::string ask = R"({"worker":"w","kinds":["none"],"wait_ms":30000})";
  for (int i = 0; i < 100; ++i) c.start("POST", "/v1/leases", ask);
  EXPECT_TRUE(c.quiet(50));
  c.end();
  for (int i = 0; i < 100; ++i) ASSERT_EQ(c.reply(5000).status, 204) << i;
  EXPECT_TRUE(c.at_end());
}

TEST_F(ServerLife, F09_WhatIsBroughtForNoLeaseIsNotKept) {
  start();
  Client w = tcp();
  const std::string token = leased_token(w);
  EXPECT_EQ(w.post("/v1/leases/" + token + "/complete", "").status, 200);
  const std::string never = "0123456789abcdef-0123456789abcdef";
  const std::string many(1u << 20, 'x');
  auto files = [&] {
    int n = 0;
    for (const auto& each :
         std::filesystem::recursive_directory_iterator(root_)) {
      n += each.is_regular_file() && each.file_size() >= kUploadHeldMax / 4;
    }
    return n;
  };
  for (const std::string& of : {token, never}) {
    Client asks = tcp();
    asks.send("PUT /v1/leases/" + of +
              "/artifacts/a HTTP/1.1\r\nHost: localhost\r\n"
              "Expect: 100-continue\r\nContent-Length: 60000000\r\n\r\n");
    EXPECT_EQ(asks.reply().status, 409);
    Client c = tcp();
    EXPECT_EQ(c.call("PUT", "/v1/leases/" + of + "/artifacts/a", many).status,
              409);
    EXPECT_EQ(c.post("/v1/leases/" + of + "/log?offset=0", "text").status, 409);
  }
  EXPECT_EQ(files(), 0);
  // An end that is told again has its stored answer.
  EXPECT_EQ(w.post("/v1/leases/" + token + "/complete", "").status, 200);
  EXPECT_EQ(w.post("/v1/leases/" + never + "/complete", "").status, 409);
  EXPECT_EQ(w.post("/v1/leases/nonsense/complete", "").status, 404);
}

// Pipelined, unread: each connection holds a bounded part, and others do not
// wait for it.
TEST_F(ServerLife, F08_UnreadAnswersAreBounded) {
  start();
  std::string jobs;
  for (int i = 0; i < 300; ++i) {
    jobs += R"({"kind":"a","labels":{"k":")" + std::string(250, 'v') + R"("}})";
    jobs += '\n';
  }
  Client c = tcp();
  ASSERT_EQ(
      c.call("POST", "/v1/jobs", jobs, "Content-Type: application/x-ndjson\r\n")
          .status,
      200);
  auto unsent = [&] {
    Client m = local();
    const std::string text = m.get("/metrics").body;
    const std::string name = "\nmachina_http_unsent_bytes ";
    return std::stoull(text.substr(text.find(name) + name.size()));
  };
  std::string lists, metrics;
  for (int i = 0; i < 64; ++i) {
    lists += "GET /v1/jobs?limit=300 HTTP/1.1\r\nHost: localhost\r\n\r\n";
    metrics += "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
  }
  std::vector<Client> deaf;
  for (int i = 0; i < 60; ++i) {
    deaf.push_back(tcp());
    deaf.back().send(i % 2 == 0 ? lists : metrics);
  }
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(c.get("/health").status, 200);
    EXPECT_LT(unsent(), kUnsentAllMax + (8u << 20));
  }
  // Who reads gets all of them, also while there are some who do not.
  Client reads = tcp();
  reads.send(lists);
  int got = 0;
  while (got < 64 && reads.reply(30'000).status == 200) ++got;
  EXPECT_EQ(got, 64);
}

}  // namespace
}  // namespace machina::test
