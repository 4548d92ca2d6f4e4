// Who may do what at the server's door: programs that name somebody else's
// worker, that ask oddly, that hang up, that do not read.

#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <memory>
#include <vector>

#include "tests/e2e/fixture.h"
#include "tests/support/places.h"

namespace machina::e2e {
namespace {

class Front : public EndToEnd {
 protected:
  // Over the Unix socket.
  int local_post(const std::string& path, const std::string& body) {
    return p().shell("curl -s -o /dev/null --fail-with-body --unix-socket " +
                     p().root() + "/machina.sock http://localhost" + path +
                     " -d '" + body + "'");
  }
};

TEST_P(Front, F20_NamingAPoolsWorkerTakesNothingFromIt) {
  Serve serve;
  serve.workers = 1;
  serve.token = "front-token-of-the-test";
  start(serve);
  const std::string id = p().submit({{"kind", "noop"},
                                     {"payload", {{"sleep_ms", 4000}}},
                                     {"max_attempts", 1}});
  const Json running = p().wait_state(id, "running");
  const std::string worker = running["worker"];
  const Json ask = {
      {"worker", worker}, {"kinds", {"no.such"}}, {"holding", Json::array()}};
  Json guess = ask;
  guess["session"] = std::string(32, '0');
  for (const Json& body : {ask, guess}) {
    EXPECT_EQ(p().post("/v1/leases", body).status, 204);
    EXPECT_EQ(p().post("/v1/leases/complete",
                       {{"items", Json::array()}, {"lease", body}})
                  .status,
              200);
    EXPECT_EQ(local_post("/v1/leases", body.dump()), 0);
  }
  EXPECT_EQ(p().post("/v1/pools/evil/sync", {{"gone", {worker}}}).status, 501);
  EXPECT_EQ(
      local_post(
          "/v1/pools/evil/sync",
          Json({{"workers", {{{"name", worker}}}}, {"gone", {worker}}}).dump()),
      0);
  EXPECT_EQ(
      p().post("/v1/leases", {{"worker", "x"}, {"kinds", {"noop"}}}).status,
      204);
  const Json end = p().wait_end(id);
  EXPECT_EQ(end["state"], "succeeded") << end;
  EXPECT_EQ(end["attempt"], 1);
  EXPECT_EQ(end["worker"], worker);
}

// What a worker was given and never heard of it gives back, also after the
// server was killed; nobody else can.
TEST_P(Front, F20_ASessionOutlivesTheServer) {
  Serve serve;
  serve.workers = 0;
  start(serve);
  const std::string id = p().submit({{"kind", "ext.a"}});
  Json ask = {{"worker", "w"}, {"kinds", {"ext.a"}}};
  Answer leased = p().post("/v1/leases", ask);
  ASSERT_EQ(leased.status, 200);
  ask["holding"] = Json::array();
  ask["kinds"] = {"ext.none"};
  p().kill_server();
  restart();
  EXPECT_EQ(p().post("/v1/leases", ask).status, 204);
  EXPECT_EQ(p().job(id)["state"], "running");
  ask["session"] = leased.json()["session"];
  EXPECT_EQ(local_post("/v1/leases", ask.dump()), 0);  // it came over TCP
  EXPECT_EQ(p().job(id)["state"], "running");
  EXPECT_EQ(p().post("/v1/leases", ask).status, 204);
  EXPECT_EQ(p().job(id)["state"], "ready");
  EXPECT_EQ(p().job(id)["attempt"], 0);
}

TEST_P(Front, F24_AListIsEmptyOnlyAtItsEnd) {
  Serve serve;
  serve.workers = 0;
  start(serve);
  // What ends leaves its place; those come first.
  std::string jobs;
  for (int i = 0; i < 2500; ++i) jobs += "{\"kind\":\"ext.a\"}\n";
  ASSERT_EQ(
      p().call("POST", "/v1/jobs", jobs, {"Content-Type: application/x-ndjson"})
          .status,
      200);
  const std::string last = p().submit({{"kind", "ext.last"}});
  Json ask = {{"worker", "w"}, {"kinds", {"ext.a"}}, {"max", 256}};
  Json body = {{"items", Json::array()}, {"lease", ask}};
  for (int left = 2500; left > 0;) {
    const Json got = p().post("/v1/leases/complete", body).json();
    ASSERT_FALSE(got["leases"].empty());
    body["items"] = Json::array();
    for (const Json& lease : got["leases"]) {
      body["items"].push_back({{"token", lease["token"]}});
      --left;
    }
  }
  p().post("/v1/leases/complete", body);
  std::string cursor;
  int seen = 0;
  do {
    const Json page = p().get("/v1/jobs?limit=900&cursor=" + cursor).json();
    if (cursor.empty()) {
      EXPECT_EQ(page["jobs"][0]["id"], last) << page["cursor"];
    }
    EXPECT_TRUE(!page["jobs"].empty() || page["cursor"].is_null());
    seen += static_cast<int>(page["jobs"].size());
    cursor = page["cursor"].is_null() ? "" : page["cursor"].get<std::string>();
  } while (!cursor.empty());
  EXPECT_EQ(seen, 2501);
  const Json failed = p().get("/v1/jobs?state=failed").json();
  EXPECT_TRUE(failed["cursor"].is_null()) << failed;
}

TEST_P(Front, F28_AKindThatNobodyServesSaysSo) {
  Serve serve;
  serve.workers = 1;
  start(serve);
  Json job = p().post("/v1/jobs", {{"kind", "ext.nobody"}}).json();
  EXPECT_EQ(job["served"], false);
  EXPECT_EQ(p().job(job["id"])["served"], false);
  EXPECT_EQ(p().get("/stats").json()["unserved"][0]["kind"], "ext.nobody");
  job = p().post("/v1/jobs", {{"kind", "noop"}}).json();
  EXPECT_EQ(job["served"], true);
  const Json leased =
      p().post("/v1/leases", {{"worker", "w"}, {"kinds", {"ext.*"}}}).json();
  EXPECT_EQ(p().post("/v1/jobs", {{"kind", "ext.other"}}).json()["served"],
            true);
  EXPECT_NE(p().get("/v1/jobs?state=running,odd").body.find("scheduled"),
            std::string::npos);
  // A drain would wait for it.
  const std::string token = leased["leases"][0]["token"];
  EXPECT_EQ(p().post("/v1/leases/" + token + "/release", Json::object()).status,
            200);
}

TEST_P(Front, F22_HowAskedMattersNot) {
  Serve serve;
  serve.workers = 0;
  start(serve);
  auto status = [&](const std::string& bytes) { return p().raw(bytes).status; };
  const std::string host = "Host: localhost\r\nConnection: close\r\n";
  EXPECT_EQ(status("GET /health HTTP/1.2\r\n" + host + "\r\n"), 505);
  EXPECT_EQ(status("FOO /health HTTP/1.1\r\n" + host + "\r\n"), 501);
  EXPECT_EQ(status("PATCH /health HTTP/1.1\r\n" + host + "\r\n"), 405);
  EXPECT_EQ(status("GET /health HTTP/1.1\r\n" + host +
                   "Transfer---Encoding: chunked\r\n\r\n"),
            400);
  EXPECT_EQ(status("POST /v1/jobs HTTP/1.0\r\nOrigin: http://evil.com\r\n"
                   "Content-Length: 14\r\n\r\n{\"kind\":\"n.i\"}"),
            403);
  EXPECT_EQ(status("GET /v1/jobs?limit=1&limit=1 HTTP/1.1\r\n" + host + "\r\n"),
            400);
  EXPECT_EQ(status("POST /v1/jobs HTTP/1.1\r\n" + host +
                   "Transfer-Encoding: chunked\r\n\r\ne ;a=b\r\n"
                   "{\"kind\":\"n.i\"}\r\n0\r\n\r\n"),
            201);
}

TEST_P(Front, F06_TheServerTakesTheDescriptorsThatItMayHave) {
  rlimit had{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &had), 0);
  rlimit low = had;
  low.rlim_cur = 300;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &low), 0);
  Serve serve;
  serve.workers = 1;
  start(serve);
  EXPECT_EQ(setrlimit(RLIMIT_NOFILE, &had), 0);
  const Json shares = p().get("/stats").json()["descriptors"];
  EXPECT_GT(shares["limit"], 300) << shares;
  EXPECT_NE(p().log().find("(were 300)"), std::string::npos);
  // Too few: no start, and it says how many are needed.
  EXPECT_EQ(
      p().shell("ulimit -n 150; " + std::string(kBinary) + " serve --root " +
                p().root() + " --port 0 --workers 0 2>" + p().root() + "/why"),
      2);
  const std::string why = read_file(p().root() + "/why");
  EXPECT_NE(why.find("LimitNOFILE"), std::string::npos) << why;
}

// A connection that is used by hand.
class Wire {
 public:
  explicit Wire(int port) {
    fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(static_cast<std::uint16_t>(port));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
    timeval patience{20, 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  }
  ~Wire() { close(fd_); }
  Wire(const Wire&) = delete;
  void send(const std::string& bytes) const {
    EXPECT_EQ(::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(bytes.size()));
  }
  void end() const { shutdown(fd_, SHUT_WR); }
  std::string rest() const {  // up to the end, or 20 s without a byte
    std::string all;
    char bytes[65536];
    for (ssize_t n; (n = recv(fd_, bytes, sizeof bytes, 0)) > 0;) {
      all.append(bytes, static_cast<std::size_t>(n));
    }
    return all;
  }

 private:
  int fd_;
};

std::string request(const std::string& line, const std::string& body = "",
                    const std::string& headers = "") {
  return line + " HTTP/1.1\r\nHost: localhost\r\n" + headers +
         "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

TEST_P(Front, F09_AHalfClosedClientHearsItsAnswers) {
  Serve serve;
  serve.workers = 0;
  start(serve);
  for (int i = 0; i < 20; ++i) {
    Wire c(p().port());
    c.send(request("GET /health") + request("GET /nope") +
           request("POST /v1/jobs", R"({"kind":"ext.a"})"));
    c.end();
    const std::string all = c.rest();
    for (const char* status : {"1.1 200", "1.1 404", "1.1 201"}) {
      EXPECT_NE(all.find(status), std::string::npos) << all;
    }
  }
  // A wait is over, and its place is free, when its client has hung up.
  const double began = now_ms();
  Wire waits(p().port());
  waits.send(
      request("POST /v1/jobs", R"({"kind":"ext.a"})", "Prefer: wait=60\r\n"));
  waits.end();
  EXPECT_EQ(waits.rest().substr(9, 3), "202");
  EXPECT_LT(now_ms() - began, 20'000);
}

TEST_P(Front, F08_UnreadAnswersCostLittle) {
  Serve serve;
  serve.workers = 0;
  start(serve);
  std::string asks;
  for (int i = 0; i < 64; ++i) asks += request("GET /metrics");
  auto resident_mib = [&] {
    const std::string text =
        read_file("/proc/" + std::to_string(p().server()) + "/status");
    return std::stoi(text.substr(text.find("VmRSS:") + 6)) / 1024;
  };
  std::string queues;  // so that there is much to say
  for (int i = 0; i < 150; ++i) {
    queues += R"({"kind":"ext.a","queue":"queue-)" + std::to_string(i) +
              std::string(30, 'b') + "\"}\n";
  }
  ASSERT_EQ(p().call("POST", "/v1/jobs", queues,
                     {"Content-Type: application/x-ndjson"})
                .status,
            200);
  const int before = resident_mib();
  std::vector<std::unique_ptr<Wire>> deaf;
  for (int i = 0; i < 200; ++i) {
    deaf.push_back(std::make_unique<Wire>(p().port()));
    deaf.back()->send(asks);
  }
  for (int i = 0; i < 10; ++i) EXPECT_EQ(p().get("/health").status, 200);
  EXPECT_LT(resident_mib() - before, 100);
}

// Whatever asks for a job that is large, and does not read.
TEST_P(Front, F08_UnreadJobsCostLittle) {
  Serve serve;
  serve.workers = 0;
  start(serve);
  const std::string text = "{\"t\":\"" + std::string(900'000, 'x') + "\"}";
  const std::string job =
      R"({"kind":"ext.a","dedup_key":"k","payload":)" + text + "}";
  const Answer made = p().call("POST", "/v1/jobs", job, {});
  ASSERT_EQ(made.status, 201);
  const std::string path = "/v1/jobs/" + std::string(made.json()["id"]);
  const Answer leased =
      p().post("/v1/leases", {{"worker", "w"}, {"kinds", {"ext.a"}}});
  ASSERT_EQ(leased.status, 200);
  const std::string lease =
      "/v1/leases/" + std::string(leased.json()["leases"][0]["token"]);
  const std::string wait = "Prefer: wait=300\r\n";
  const std::string bulk = "[" + [] {
    std::string items = "1";
    for (int i = 1; i < 1000; ++i) items += ",1";
    return items;
  }() + "]";
  auto resident_mib = [&] {
    const std::string status =
        read_file("/proc/" + std::to_string(p().server()) + "/status");
    return std::stoi(status.substr(status.find("VmRSS:") + 6)) / 1024;
  };
  const int before = resident_mib();
  int most = 0;
  std::vector<std::unique_ptr<Wire>> deaf;
  auto ask = [&](const std::string& one) {
    std::string asks;
    for (int i = 0; i < 64; ++i) asks += one;
    for (int i = 0; i < 4; ++i) {
      deaf.push_back(std::make_unique<Wire>(p().port()));
      deaf.back()->send(asks);
    }
    for (int i = 0; i < 10; ++i) {
      EXPECT_EQ(p().get("/health").status, 200);
      most = std::max(most, resident_mib() - before);
    }
  };
  const std::string cancel = request("POST " + path + "/cancel");
  ask(request("GET " + path));
  ask(cancel);
  ask(request("GET " + path, "", wait));  // it ends below
  ASSERT_EQ(
      p().call("POST", lease + "/complete", "{\"result\":" + text + "}", {})
          .status,
      200);
  ask(request("GET " + path, "", wait));
  ask(request("POST " + lease + "/complete", "{}"));
  ask(request("POST /v1/jobs", bulk));
  EXPECT_LT(most, 100);
}

MACHINA_BOTH(Front);

}  // namespace
}  // namespace machina::e2e
