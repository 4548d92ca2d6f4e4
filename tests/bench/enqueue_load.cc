// tests/bench/enqueue_load.cc
//
// A closed-loop HTTP load generator: N keep-alive connections, one request in
// flight on each. Runs for --seconds, or until --count answers are in. Prints
// one line of `name=value`. Every answer is checked: a status other than 2xx,
// or one without each --expect text, is an error and makes the exit code 1.

#include <sys/epoll.h>

#include <algorithm>
#include <memory>

#include "http_client.h"

namespace {

using namespace machina::bench;

constexpr char kUsage[] =
    "usage: bench_enqueue_load --port P [--connections 64] [--seconds 5 |"
    " --count N]\n"
    "  [--path /v1/jobs] [--body JSON] [--header 'Name: value']..."
    " [--expect TEXT]...";

std::string default_body() {
  return R"({"kind":"ext.bench","payload":{"x":")" + std::string(216, 'x') +
         R"("}})";
}

struct Connection {
  int fd = -1;
  double sent = 0;
  Answer answer;
};

struct Load {
  std::string bytes;
  std::vector<std::string> expect;
  long count = 0;
  double seconds = 5;

  long sent = 0, done = 0, errors = 0;
  double first = 0, last = 0;
  std::string first_error;
  std::vector<float> latency_us;

  bool may_send(double at) const {
    return count > 0 ? sent < count : at - first < seconds;
  }
  void send(Connection& c) {
    c.answer.clear();
    c.sent = now();
    ++sent;
    send_all(c.fd, bytes);
  }
  void check(const Answer& answer) {
    bool ok = answer.status() / 100 == 2;
    for (const auto& text : expect) {
      ok = ok && answer.body().find(text) != std::string_view::npos;
    }
    if (ok) return;
    if (errors++ == 0) {
      first_error = std::to_string(answer.status()) + " " +
                    std::string(answer.body().substr(0, 600));
    }
  }
};

void run(Load& load, int port, int connections) {
  int epoll = epoll_create1(EPOLL_CLOEXEC);
  if (epoll < 0) die("epoll_create1");
  std::vector<std::unique_ptr<Connection>> all;
  for (int i = 0; i < connections; ++i) {
    auto c = std::make_unique<Connection>();
    c->fd = connect_loopback(port);
    epoll_event e{};
    e.events = EPOLLIN;
    e.data.ptr = c.get();
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &e) != 0) die("epoll_ctl");
    all.push_back(std::move(c));
  }
  load.first = now();
  long in_flight = 0;
  for (auto& c : all) {
    if (!load.may_send(load.first)) break;
    load.send(*c);
    ++in_flight;
  }
  std::vector<Connection*> again;
  epoll_event events[256];
  char buffer[65536];
  double deadline = load.first + (load.count > 0 ? 300 : load.seconds + 35);
  while (in_flight > 0) {
    if (now() > deadline) fail("the load did not end in time");
    int n = epoll_wait(epoll, events, 256, 1000);
    if (n < 0 && errno != EINTR) die("epoll_wait");
    for (int i = 0; i < n; ++i) {
      auto& c = *static_cast<Connection*>(events[i].data.ptr);
      ssize_t got = recv(c.fd, buffer, sizeof buffer, 0);
      if (got < 0) die("recv");
      if (got == 0) fail("the server closed the connection");
      c.answer.feed(buffer, static_cast<std::size_t>(got));
      if (!c.answer.complete()) continue;
      load.last = now();
      load.latency_us.push_back(static_cast<float>((load.last - c.sent) * 1e6));
      load.check(c.answer);
      ++load.done;
      --in_flight;
      again.push_back(&c);
    }
    // Sent together, after all that has arrived is read: as wrk does.
    for (Connection* c : again) {
      if (!load.may_send(load.last)) break;
      load.send(*c);
      ++in_flight;
    }
    again.clear();
  }
  for (auto& c : all) close(c->fd);
  close(epoll);
}

}  // namespace

int main(int argc, char** argv) {
  Options options(argc, argv, kUsage);
  int port = static_cast<int>(options.number("port", 0));
  int connections = static_cast<int>(options.number("connections", 64));
  if (port <= 0 || connections <= 0) fail(kUsage);
  Load load;
  load.count = options.number("count", 0);
  load.seconds = std::atof(options.text("seconds", "5").c_str());
  load.expect = options.all("expect");
  load.bytes =
      request("POST", options.text("path", "/v1/jobs"), options.all("header"),
              options.text("body", default_body()));
  run(load, port, connections);

  auto& l = load.latency_us;
  std::sort(l.begin(), l.end());
  if (l.empty()) fail("no answer at all");
  std::printf(
      "done=%ld errors=%ld rate=%.0f p50_us=%.0f p99_us=%.0f first=%.6f "
      "last=%.6f\n",
      load.done, load.errors,
      static_cast<double>(load.done) / (load.last - load.first),
      l[l.size() / 2], l[l.size() * 99 / 100], load.first, load.last);
  if (load.errors > 0) {
    std::fprintf(stderr, "first error: %s\n", load.first_error.c_str());
    return 1;
  }
  return 0;
}
