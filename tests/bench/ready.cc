// tests/bench/ready.cc
//
// How long a server takes from its start to its first good answer. Starts the
// command, asks every 100 us on a new connection until the answer begins with
// --expect, and prints the milliseconds; then ends the server with SIGTERM and
// waits for it (SIGKILL after 40 s, which makes the exit code 1).
//
//   bench_ready --port P --send 'GET /ready HTTP/1.0\r\n\r\n'
//               --expect 'HTTP/1.1 200' -- COMMAND [ARGUMENT]...

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>

#include <csignal>
#include <cstdint>

#include "http_client.h"

extern char** environ;

namespace {

using namespace machina::bench;

constexpr double kStartSeconds = 30, kStopSeconds = 40;

std::string unescape(const std::string& text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 1 < text.size()) {
      char c = text[++i];
      out += c == 'r' ? '\r' : c == 'n' ? '\n' : c;
    } else {
      out += text[i];
    }
  }
  return out;
}

// Whether one try got an answer that starts as expected.
bool answers(int port, const std::string& bytes, const std::string& expect) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) die("socket");
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_port = htons(static_cast<std::uint16_t>(port));
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string got;
  if (connect(fd, reinterpret_cast<sockaddr*>(&a), sizeof a) == 0 &&
      send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL) > 0) {
    pollfd p{fd, POLLIN, 0};
    char buffer[256];
    while (got.size() < expect.size() && poll(&p, 1, 2000) > 0) {
      ssize_t n = recv(fd, buffer, sizeof buffer, 0);
      if (n <= 0) break;
      got.append(buffer, static_cast<std::size_t>(n));
    }
  }
  close(fd);
  return got.compare(0, expect.size(), expect) == 0;
}

bool ended(pid_t pid, double seconds) {
  for (double end = now() + seconds; now() < end; usleep(2000)) {
    if (waitpid(pid, nullptr, WNOHANG) == pid) return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  int dashes = 1;
  while (dashes < argc && std::strcmp(argv[dashes], "--") != 0) ++dashes;
  if (dashes + 1 >= argc) fail("usage: bench_ready ... -- COMMAND");
  Options options(dashes, argv, "usage: bench_ready --port P ... -- COMMAND");
  int port = static_cast<int>(options.number("port", 0));
  std::string bytes = unescape(options.text("send", ""));
  std::string expect = options.text("expect", "");

  double start = now();
  pid_t pid = 0;
  errno = posix_spawnp(&pid, argv[dashes + 1], nullptr, nullptr,
                       argv + dashes + 1, environ);
  if (errno != 0) die(argv[dashes + 1]);
  double ready = 0;
  while (ready == 0 && now() - start < kStartSeconds) {
    if (answers(port, bytes, expect)) ready = now();
    if (waitpid(pid, nullptr, WNOHANG) == pid) fail("the command ended early");
    if (ready == 0) usleep(100);
  }
  kill(pid, SIGTERM);
  bool stopped = ended(pid, kStopSeconds);
  if (!stopped) {
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
  }
  if (ready == 0) fail("never ready");
  std::printf("ready_ms=%.2f\n", (ready - start) * 1e3);
  if (!stopped) fail("it did not end on SIGTERM");
  return 0;
}
