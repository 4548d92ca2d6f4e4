// tests/server/api/server_fixture.h
//
// A real server on a thread of its own, port 0, a fresh root, a FakeShard; and
// a client that sees every byte.

#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <future>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

#include "server/api/server.h"
#include "tests/server/api/fake_shard.h"

namespace machina::test {

using Json = nlohmann::json;

struct Reply {
  int status = 0;
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;
  Json json() const { return Json::parse(body, nullptr, false); }
  std::string code() const { return json().value("code", ""); }
  std::string field() const { return json().value("field", ""); }
};

class Client {
 public:
  explicit Client(int fd) : fd_(fd) {}
  Client(Client&& other) noexcept : fd_(other.fd_), in_(std::move(other.in_)) {
    other.fd_ = -1;
  }
  ~Client() { shut(); }

  static Client tcp(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(static_cast<std::uint16_t>(port));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
    return Client(fd);
  }
  static Client local(const std::string& path) {
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    path.copy(to.sun_path, sizeof to.sun_path - 1);
    EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
    return Client(fd);
  }

  void shut() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  void end() { shutdown(fd_, SHUT_WR); }
  void reset() {
    const linger at_once{1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    shut();
  }
  void send(std::string_view bytes) {
    while (!bytes.empty()) {
      ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return;  // the server may have hung up: the reply tells
      bytes.remove_prefix(static_cast<std::size_t>(n));
    }
  }
  // False at the end of the stream, or after `wait_ms`.
  bool more(int wait_ms = 10'000) {
    pollfd p{fd_, POLLIN, 0};
    if (poll(&p, 1, wait_ms) != 1) return false;
    char bytes[65536];
    ssize_t n = recv(fd_, bytes, sizeof bytes, 0);
    if (n <= 0) return false;
    in_.append(bytes, static_cast<std::size_t>(n));
    return true;
  }
  bool at_end(int wait_ms = 10'000) {
    while (more(wait_ms)) {
    }
    pollfd p{fd_, POLLIN, 0};
    char c;
    return poll(&p, 1, 0) == 1 && recv(fd_, &c, 1, MSG_PEEK) <= 0;
  }
  bool quiet(int wait_ms) { return in_.empty() && !more(wait_ms); }

  Reply reply_without_body() { return reply(10'000, false); }
  Reply reply(int wait_ms = 10'000, bool body = true) {
    Reply r;
    std::size_t end;
    while ((end = in_.find("\r\n\r\n")) == in_.npos) {
      if (!more(wait_ms)) return r;
    }
    std::string head = in_.substr(0, end + 2);
    in_.erase(0, end + 4);
    r.status = std::atoi(head.c_str() + 9);
    std::size_t at = head.find("\r\n") + 2;
    while (at < head.size()) {
      std::size_t colon = head.find(':', at), stop = head.find("\r\n", at);
      std::string name = head.substr(at, colon - at);
      for (char& c : name) c = static_cast<char>(std::tolower(c));
      r.headers[name] = head.substr(colon + 2, stop - colon - 2);
      at = stop + 2;
    }
    if (r.status == 100 || !body) return r;
    std::size_t length =
        r.headers.count("content-length")
            ? std::strtoul(r.headers["content-length"].c_str(), nullptr, 10)
            : 0;
    while (in_.size() < length) {
      if (!more(wait_ms)) break;
    }
    r.body = in_.substr(0, length);
    in_.erase(0, length);
    return r;
  }

  void start(std::string_view method, std::string_view path,
             std::string_view body = {}, std::string_view headers = {}) {
    std::string text;
    text.append(method).append(" ").append(path).append(" HTTP/1.1\r\n");
    text += "Host: localhost\r\n";
    text += headers;
    if (!body.empty() || method != "GET") {
      text += "Content-Length: " + std::to_string(body.size()) + "\r\n";
    }
    text += "\r\n";
    text += body;
    send(text);
  }
  Reply call(std::string_view method, std::string_view path,
             std::string_view body = {}, std::string_view headers = {}) {
    start(method, path, body, headers);
    return reply();
  }
  Reply get(std::string_view path) { return call("GET", path); }
  Reply post(std::string_view path, std::string_view body,
             std::string_view headers = {}) {
    return call("POST", path, body, headers);
  }

 private:
  int fd_;
  std::string in_;
};

class ServerTest : public testing::Test {
 protected:
  ServerTest() {
    char path[] = "/tmp/machina-server-XXXXXX";
    root_ = mkdtemp(path);
    std::filesystem::create_directory(root_ + "/queue");
    options_.root = root_;
    options_.port = 0;
    options_.socket_path = root_ + "/machina.sock";
    options_.scan_ms = 50;
    options_.drain_ms = 300;
    KindFacts noop;
    noop.timeout_ms = 4321;
    noop.check = [](const std::string& payload) -> Checked<KindFacts::Kept> {
      if (payload.find("\"bad\"") != payload.npos) {
        return BadField{"bad", "\"bad\" is not a member"};
      }
      return KindFacts::Kept{};
    };
    options_.kinds["noop"] = noop;
    KindFacts turns;
    turns.check = [](const std::string& payload) -> Checked<KindFacts::Kept> {
      return KindFacts::Kept{"", "thing:" + payload};
    };
    options_.kinds["takes.turns"] = turns;
  }
  ~ServerTest() override {
    if (thread_.joinable()) stop();
    std::error_code ignored;
    std::filesystem::remove_all(root_, ignored);
  }

  void start() {
    ServerHooks hooks;
    hooks.signals = false;
    hooks.open_shard =
        [this](RecoveryReport*) -> Result<std::unique_ptr<Shard>> {
      return std::unique_ptr<Shard>(new FakeShard(control_));
    };
    std::promise<int> listening;
    std::shared_future<int> port = listening.get_future().share();
    hooks.listening = [&](int p) { listening.set_value(p); };
    thread_ = std::thread([this, hooks] {
      exit_code_ = run_server(options_, hooks);
      exited_ = true;
    });
    while (port.wait_for(std::chrono::milliseconds(10)) !=
           std::future_status::ready) {
      if (exited_) return;  // port_ stays 0
    }
    port_ = port.get();
  }
  // Drains where it still runs; the exit code.
  int stop() {
    if (!exited_) {
      control_.hold = false;
      control_.poke();
      Client c = local();
      c.post("/shutdown", "{}");
    }
    return join();
  }
  int join() {
    thread_.join();
    return exit_code_;
  }
  Client tcp() { return Client::tcp(port_); }
  Client local() { return Client::local(options_.socket_path); }

  // One job, leased; its token.
  std::string leased_token(Client& c, const std::string& kind = "ext.a") {
    EXPECT_EQ(c.post("/v1/jobs", R"({"kind":")" + kind + R"("})").status, 201);
    Reply r = c.post("/v1/leases", R"({"worker":"w","kinds":["*"]})");
    EXPECT_EQ(r.status, 200) << r.body;
    last_job_ = r.json()["leases"][0]["job"]["id"];
    return r.json()["leases"][0]["token"];
  }

  std::string root_;
  ServerOptions options_;
  FakeControl control_;
  int port_ = 0;
  int exit_code_ = -1;
  std::atomic<bool> exited_{false};
  std::string last_job_;
  std::thread thread_;
};

}  // namespace machina::test
