// The little JSON and HTTP of a worker, against text that is not what it
// should be.

#include "workers/worker/protocol.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "queue/base/json.h"
#include "workers/worker/http_client.h"

namespace machina {
namespace {

constexpr char kReply[] = R"({"leases":[{"token":"0000000000000001-0a",
"fence":"0000000000000001","expires_at":"x","lease_ms":30000,"job":{
"id":"01","kind":"noop","attempt":2,"labels":{"a":"]}"},
"payload":{"echo":"\"}{"},"timeout_ms":null,"sandbox":null,
"traceparent":null}},{"token":"b","lease_ms":5,"job":{"kind":"tool.shell",
"timeout_ms":7,"sandbox":{"pids":1}}}]})";

TEST(ProtocolTest, LeasesAreRead) {
  const auto leases = parse_leases(kReply);
  ASSERT_TRUE(leases) << leases.error().what;
  ASSERT_EQ(leases->size(), 2);
  EXPECT_EQ((*leases)[0].payload, R"({"echo":"\"}{"})");
  EXPECT_EQ((*leases)[0].attempt, 2);
  EXPECT_EQ((*leases)[0].timeout_ms, 0);
  EXPECT_EQ((*leases)[0].sandbox, "");
  EXPECT_EQ((*leases)[1].timeout_ms, 7);
  EXPECT_EQ((*leases)[1].sandbox, R"({"pids":1})");
  EXPECT_TRUE(parse_leases(R"({"items":[],"leases":[]})")->empty());
}

TEST(ProtocolTest, TextThatIsNotJsonIsRefusedAndNeverOverread) {
  const std::string good = kReply;
  for (std::size_t size = 0; size < good.size(); ++size) {
    EXPECT_FALSE(parse_leases(std::string(good, 0, size))) << size;
  }
  std::mt19937 random(3);
  for (int round = 0; round < 20'000; ++round) {
    std::string bent = good;
    bent[random() % bent.size()] = static_cast<char>(random());
    (void)parse_leases(bent).has_value();
  }
}

// A payload may be as deep as a request may be. The lease wraps it.
TEST(ProtocolTest, ALeaseCarriesTheDeepestPayload) {
  const std::string payload = "{\"a\":" + std::string(kJsonDepthMax - 2, '[') +
                              std::string(kJsonDepthMax - 2, ']') + "}";
  const auto leases = parse_leases(
      R"({"leases":[{"token":"t","lease_ms":5,"job":{"kind":"noop","payload":)" +
      payload + "}}]}");
  ASSERT_TRUE(leases) << leases.error().what;
  EXPECT_EQ(leases->at(0).payload, payload);
}

TEST(ProtocolTest, AnItemsRefusalIsRead) {
  const auto items = parse_items(
      R"({"items":[{"token":"a","problem":null},
{"token":"b","problem":{"status":409,"title":"lease-lost"}}]})");
  ASSERT_TRUE(items);
  ASSERT_EQ(items->size(), 2);
  EXPECT_EQ((*items)[0].problem, "");
  EXPECT_EQ((*items)[1].problem, R"({"status":409,"title":"lease-lost"})");
  EXPECT_EQ((*items)[1].status, 409);
  EXPECT_FALSE(parse_items(R"({"items":{}})"));
  EXPECT_FALSE(parse_heartbeat(R"({"items":[{"token":"a","token":"b"}]})"));
}

TEST(ProtocolTest, CompletionIsValidJsonWhateverTheMessage) {
  kinds::End end;
  end.code = EndCode::verdict;
  end.message = std::string(10'000, '\xff');
  end.result = R"({"a":1})";
  end.artifacts = {"a.log", "b.xml"};
  std::string item;
  append_completion(item, "t", end, R"({"level":"L3"})");
  const auto parsed = nlohmann::json::parse(item);
  EXPECT_EQ(parsed["verdict"], "fail");
  EXPECT_LE(parsed["message"].get<std::string>().size(), kMessageBytesMax);
  EXPECT_EQ(parsed["artifacts"].size(), 2);
  end.code = EndCode::oom;
  end.retry = false;
  const auto failure = nlohmann::json::parse(write_failure(end, ""));
  EXPECT_EQ(failure["code"], "oom");
  EXPECT_EQ(failure["retry"], false);
}

// A peer that answers each request with the next of `replies`.
class Peer {
 public:
  explicit Peer(std::vector<std::string> replies)
      : replies_(std::move(replies)) {}
  ~Peer() {
    for (auto& thread : threads_) thread.join();
  }
  Result<int> connect() {
    int pair[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    ++connections;
    threads_.emplace_back([this, fd = pair[1]] {
      char buffer[4096];
      while (next_ < replies_.size() &&
             recv(fd, buffer, sizeof buffer, 0) > 0) {
        const std::string reply = replies_[next_++];
        if (reply == "hang") {
          while (recv(fd, buffer, sizeof buffer, 0) > 0) {
          }
          break;
        }
        send(fd, reply.data(), reply.size(), MSG_NOSIGNAL);
        if (reply.find("close") != std::string::npos) break;
      }
      close(fd);
    });
    return pair[0];
  }
  int connections = 0;

 private:
  std::vector<std::string> replies_;
  std::atomic<std::size_t> next_{0};
  std::vector<std::thread> threads_;
};

TEST(HttpClientTest, OneConnectionServesManyCalls) {
  Peer peer({"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab",
             "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No\r\n\r\n",
             "HTTP/1.1 409 X\r\nContent-Length:0\r\nConnection: close\r\n\r\n",
             "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nz"});
  HttpClient client([&] { return peer.connect(); });
  EXPECT_EQ(client.post("/", "{}")->body, "ab");
  EXPECT_EQ(client.post("/", "{}")->status, 204);
  EXPECT_EQ(peer.connections, 1);
  EXPECT_EQ(client.post("/", "{}")->status, 409);
  EXPECT_EQ(client.post("/", "{}")->body, "z");
  EXPECT_EQ(peer.connections, 2);
}

TEST(HttpClientTest, WhatIsNoAnswerIsAnError) {
  const std::vector<std::string> bad = {
      "HTTP/1.1 200 OK\r\n\r\n",
      "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
      "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
      "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
      "nonsense\r\n\r\n",
      "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
  };
  for (const auto& reply : bad) {
    Peer peer({reply});
    HttpClient client([&] { return peer.connect(); });
    const auto answer = client.post("/", "{}", 300);
    ASSERT_FALSE(answer) << reply;
    EXPECT_EQ(answer.error().code, Code::unavailable);
  }
}

TEST(HttpClientTest, CallEndsByItsTimeOrByInterrupt) {
  Peer peer({"hang", "hang"});
  HttpClient client([&] { return peer.connect(); });
  auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(client.post("/", "{}", 100).error().code, Code::unavailable);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(2));
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    client.interrupt();
  });
  begin = std::chrono::steady_clock::now();
  EXPECT_EQ(client.post("/", "{}", 20'000).error().code, Code::conflict);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(2));
  other.join();
}

}  // namespace
}  // namespace machina
