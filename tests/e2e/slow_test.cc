// Clients that hold connections and send nothing, or next to nothing: the caps
// say no to one more, the deadlines give the places back, and whoever behaves
// is served meanwhile.

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cerrno>
#include <memory>
#include <vector>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

constexpr int kPatienceMs = 60'000;  // the longest deadline is 15 s

// A TCP connection to the server, from an address of this host.
class Held {
 public:
  explicit Held(int port, const char* from = "127.0.0.1") {
    fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in a{};
    a.sin_family = AF_INET;
    inet_pton(AF_INET, from, &a.sin_addr);
    EXPECT_EQ(bind(fd_, reinterpret_cast<sockaddr*>(&a), sizeof a), 0);
    inet_pton(AF_INET, "127.0.0.1", &a.sin_addr);
    a.sin_port = htons(static_cast<std::uint16_t>(port));
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&a), sizeof a), 0);
    fcntl(fd_, F_SETFL, O_NONBLOCK);
  }
  ~Held() { close(fd_); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  void send(const std::string& bytes) const {
    (void)!::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  // Takes what has come; true once the server has ended the connection.
  bool ended() {
    char bytes[4096];
    for (;;) {
      ssize_t n = recv(fd_, bytes, sizeof bytes, 0);
      if (n < 0 && errno == EAGAIN) return ended_;
      if (n <= 0) return ended_ = true;
      said_.append(bytes, static_cast<std::size_t>(n));
    }
  }
  bool waits_end() {
    return eventually([&] { return ended(); }, kPatienceMs);
  }
  // One request on a connection that stays.
  bool ask() {
    said_.clear();
    send("GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
    return eventually([&] { return ended() || said_.find("}") != said_.npos; },
                      kPatienceMs) &&
           said_.starts_with("HTTP/1.1 200 ");
  }
  const std::string& said() const { return said_; }

 private:
  int fd_ = -1;
  bool ended_ = false;
  std::string said_;
};

class Slow : public EndToEnd {};

TEST_P(Slow, TheCapHoldsTheDeadlinesFreeAndOthersAreServed) {
  constexpr int kCap = 16;
  Serve serve;
  serve.workers = 1;
  serve.env = {{"MACHINA_API_CONNECTIONS", std::to_string(kCap)}};
  start(serve);
  Held steady(p().port());  // one that behaves
  // The harness's own connections end a moment after their answers.
  ASSERT_TRUE(eventually([&] { return steady.ask(); }, kPatienceMs));
  sleep_ms(500);

  std::vector<std::unique_ptr<Held>> stalled;
  const std::string post =
      "POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
  for (int i = 1; i < kCap; ++i) {
    stalled.push_back(std::make_unique<Held>(p().port()));
    const std::string starts[] = {
        "", "GET /hea",
        post + "X-Slow: ", post + "Content-Length: 4000\r\n\r\n{\"kind\":\"no"};
    stalled.back()->send(starts[i % 4]);
  }
  // Each trickles on: a byte now and then buys no time.
  auto trickle = [&] {
    for (std::size_t i = 0; i < stalled.size(); ++i) {
      if ((i + 1) % 4 == 2) stalled[i]->send("s");
    }
  };

  Held more(p().port());
  EXPECT_TRUE(more.waits_end());
  EXPECT_TRUE(more.said().starts_with("HTTP/1.1 503 ")) << more.said();
  EXPECT_NE(more.said().find("\r\nRetry-After: "), std::string::npos)
      << more.said();
  EXPECT_NE(more.said().find("Connection: close"), std::string::npos);
  for (auto& each : stalled) EXPECT_FALSE(each->ended()) << each->said();

  // Meanwhile: over a connection that was there, and over the Unix socket, by
  // which the workers come too.
  EXPECT_TRUE(steady.ask()) << steady.said();
  Ended job = p().run({"enqueue", "noop", "--wait", "--wait-s", "30",
                       "--server", p().root() + "/machina.sock"},
                      {}, kPatienceMs);
  EXPECT_EQ(job.code, 0) << job.out << job.err;

  // Heads are over after 5 s, bodies and silence after 15 s.
  EXPECT_TRUE(eventually(
      [&] {
        trickle();
        sleep_ms(100);
        return p().get("/health").status == 200;
      },
      kPatienceMs));
  for (std::size_t i = 0; i < stalled.size(); ++i) {
    Held& each = *stalled[i];
    EXPECT_TRUE(each.waits_end());
    // Who asked nothing is told nothing.
    const bool silent = (i + 1) % 4 == 0;
    EXPECT_TRUE(silent ? each.said().empty()
                       : each.said().starts_with("HTTP/1.1 408 "))
        << i << ": " << each.said();
  }
  EXPECT_EQ(p().get("/v1/jobs").json()["jobs"].size(), 1u);
}

TEST_P(Slow, OneAddressCannotTakeAllPlaces) {
  Serve serve;
  serve.workers = 0;
  serve.env = {{"MACHINA_API_CONNECTIONS_PER_ADDRESS", "4"}};
  start(serve);
  sleep_ms(500);
  std::vector<std::unique_ptr<Held>> stalled;
  for (int i = 0; i < 4; ++i) {
    stalled.push_back(std::make_unique<Held>(p().port()));
    stalled.back()->send("GET /hea");
  }
  Held more(p().port());
  EXPECT_TRUE(more.waits_end());
  EXPECT_TRUE(more.said().starts_with("HTTP/1.1 503 ")) << more.said();
  Held other(p().port(), "127.0.0.2");
  EXPECT_TRUE(other.ask()) << other.said();
  for (auto& each : stalled) EXPECT_FALSE(each->ended()) << each->said();
  stalled.clear();
  EXPECT_TRUE(eventually([&] { return p().get("/health").status == 200; },
                         kPatienceMs));
}

INSTANTIATE_TEST_SUITE_P(, Slow, testing::Values(Who::user), identity);

}  // namespace
}  // namespace machina::e2e
