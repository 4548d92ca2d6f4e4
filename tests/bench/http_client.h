// tests/bench/http_client.h
//
// What the benchmark drivers share: a connection that speaks just enough
// HTTP/1.1 to be fast (one request in flight, keep-alive, Content-Length
// answers), and the clock. No library, so that the drivers measure the server
// and not a client.
//
//   C1  An answer is believed only when its whole body is there.
//   C2  Any I/O error ends the run with a message and exit code 1: a benchmark
//       that lost a connection has no figure.

#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace machina::bench {

[[noreturn]] inline void die(const char* what) {
  std::fprintf(stderr, "%s: %s\n", what, std::strerror(errno));
  std::exit(1);
}

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

// Monotonic; the same for all processes of one machine, so that figures of
// several drivers can be put on one line.
inline double now() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) / 1e9;
}

inline int connect_loopback(int port) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) die("socket");
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_port = htons(static_cast<std::uint16_t>(port));
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, reinterpret_cast<sockaddr*>(&a), sizeof a) != 0) {
    die("connect");
  }
  int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  return fd;
}

inline void send_all(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    ssize_t n = send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) die("send");
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
}

inline std::string request(const std::string& method, const std::string& path,
                           const std::vector<std::string>& headers,
                           const std::string& body) {
  std::string r = method + " " + path + " HTTP/1.1\r\nHost: 127.0.0.1\r\n";
  for (const auto& h : headers) r += h + "\r\n";
  r += "Content-Type: application/json\r\n";
  r += "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n";
  return r + body;
}

// An answer as it arrives. feed() until complete().
class Answer {
 public:
  void clear() {
    bytes_.clear();
    head_ = body_bytes_ = 0;
    status_ = 0;
  }
  void feed(const char* data, std::size_t n) {
    bytes_.append(data, n);
    if (head_ == 0) parse_head();
  }
  bool complete() const {
    return head_ != 0 && bytes_.size() >= head_ + body_bytes_;
  }
  int status() const { return status_; }
  std::string_view body() const {
    return std::string_view(bytes_).substr(head_, body_bytes_);
  }

 private:
  void parse_head() {
    std::size_t end = bytes_.find("\r\n\r\n");
    if (end == std::string::npos) return;
    head_ = end + 4;
    if (bytes_.size() < 12) fail("an answer without a status line");
    status_ = std::atoi(bytes_.c_str() + 9);
    for (std::size_t at = 0; at < end;) {
      std::size_t eol = bytes_.find("\r\n", at);
      const char* line = bytes_.c_str() + at;
      if (strncasecmp(line, "content-length:", 15) == 0) {
        body_bytes_ = static_cast<std::size_t>(std::atoll(line + 15));
      } else if (strncasecmp(line, "transfer-encoding:", 18) == 0) {
        fail("a chunked answer: this client reads Content-Length only");
      }
      at = eol + 2;
    }
  }

  std::string bytes_;
  std::size_t head_ = 0, body_bytes_ = 0;
  int status_ = 0;
};

// One blocking trip. The answer's body stays valid until the next trip.
inline void round_trip(int fd, const std::string& bytes, Answer& answer) {
  send_all(fd, bytes);
  answer.clear();
  char buffer[65536];
  while (!answer.complete()) {
    ssize_t n = recv(fd, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) die("recv");
    if (n == 0) fail("the server closed the connection");
    answer.feed(buffer, static_cast<std::size_t>(n));
  }
}

// --name value pairs of a command line.
class Options {
 public:
  Options(int argc, char** argv, const char* usage) : usage_(usage) {
    for (int i = 1; i < argc; ++i) args_.push_back(argv[i]);
    if (args_.size() == 1 && args_[0] == "--help") {
      std::puts(usage);
      std::exit(0);
    }
    if (args_.size() % 2 != 0) fail(usage_);
  }
  std::string text(const std::string& name, const std::string& otherwise) {
    for (std::size_t i = 0; i + 1 < args_.size(); i += 2) {
      if (args_[i] == "--" + name) return args_[i + 1];
    }
    return otherwise;
  }
  std::vector<std::string> all(const std::string& name) {
    std::vector<std::string> found;
    for (std::size_t i = 0; i + 1 < args_.size(); i += 2) {
      if (args_[i] == "--" + name) found.push_back(args_[i + 1]);
    }
    return found;
  }
  long number(const std::string& name, long otherwise) {
    std::string t = text(name, "");
    return t.empty() ? otherwise : std::atol(t.c_str());
  }

 private:
  std::vector<std::string> args_;
  std::string usage_;
};

}  // namespace machina::bench
