// tests/bench/idle_latency.cc
//
// How long a job takes through an idle server: from the moment a client begins
// to send it until a worker, whose lease call waits on another connection, has
// it whole. Between two jobs nothing happens for --pause-ms (and up to as much
// again, by chance), so that each meets a system at rest; in the middle of each
// pause one 4 KiB block is written and synced to a file of --dir in the same
// rest, to have both figures from the same minutes. Prints one line, in us.

#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <random>
#include <thread>

#include "http_client.h"

namespace {

using namespace machina::bench;

constexpr char kUsage[] =
    "usage: bench_idle_latency --port P --dir D [--count 400] [--pause-ms 8]\n"
    "  [--kind ext.idle] [--header 'Name: value']...";
constexpr std::size_t kBlock = 4096;
constexpr off_t kBlocks = 4096;

// The blocks are there, and of zeros, before the first is measured: as a log
// that is pre-zeroed.
class Disk {
 public:
  explicit Disk(const std::string& dir) {
    std::string path = dir + "/idle_latency." + std::to_string(getpid());
    fd_ = open(path.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    if (fd_ < 0) die(path.c_str());
    unlink(path.c_str());
    std::vector<char> zeros(kBlock * kBlocks);
    if (pwrite(fd_, zeros.data(), zeros.size(), 0) !=
            static_cast<ssize_t>(zeros.size()) ||
        fsync(fd_) != 0) {
      die("pwrite");
    }
  }
  double sync_us() {
    char block[kBlock];
    std::memset(block, 0x5a, kBlock);
    double start = now();
    if (pwrite(fd_, block, kBlock, at_) != static_cast<ssize_t>(kBlock) ||
        fdatasync(fd_) != 0) {
      die("fdatasync");
    }
    at_ = (at_ + static_cast<off_t>(kBlock)) % (kBlocks * kBlock);
    return (now() - start) * 1e6;
  }

 private:
  int fd_ = -1;
  off_t at_ = 0;
};

double at(std::vector<double>& all, int percent) {
  std::sort(all.begin(), all.end());
  return all[(all.size() - 1) * static_cast<std::size_t>(percent) / 100];
}

std::string token_in(std::string_view body) {
  constexpr std::string_view kKey = "\"token\":\"";
  std::size_t begin = body.find(kKey);
  if (begin == body.npos) return "";
  begin += kKey.size();
  return std::string(body.substr(begin, body.find('"', begin) - begin));
}

}  // namespace

int main(int argc, char** argv) {
  Options options(argc, argv, kUsage);
  const int port = static_cast<int>(options.number("port", 0));
  const std::string dir = options.text("dir", "");
  if (port <= 0 || dir.empty()) fail(kUsage);
  const auto headers = options.all("header");
  const long count = options.number("count", 400);
  const long pause_us = options.number("pause-ms", 8) * 1000;
  const std::string kind = options.text("kind", "ext.idle");
  const std::string lease = request("POST", "/v1/leases", headers,
                                    R"({"worker":"idle","kinds":[")" + kind +
                                        R"("],"max":1,"wait_ms":20000})");
  const std::string job =
      request("POST", "/v1/jobs", headers,
              R"({"kind":")" + kind + R"(","payload":{"x":")" +
                  std::string(216, 'x') + R"("}})");

  std::atomic<long> asked{0}, begun{0};
  std::atomic<double> begun_at{0};
  std::thread worker([&] {
    int fd = connect_loopback(port);
    Answer answer;
    for (long i = 0; i < count; ++i) {
      asked = i + 1;
      do {
        round_trip(fd, lease, answer);
      } while (answer.status() == 204 ||
               (answer.status() == 200 && token_in(answer.body()).empty()));
      begun_at = now();
      begun = i + 1;
      if (answer.status() != 200) {
        fail("lease: " + std::to_string(answer.status()));
      }
      std::string path = "/v1/leases/" + token_in(answer.body()) + "/complete";
      round_trip(fd, request("POST", path, headers, "{}"), answer);
      if (answer.status() != 200) {
        fail("complete: " + std::to_string(answer.status()) + " " +
             std::string(answer.body().substr(0, 600)));
      }
    }
  });

  int fd = connect_loopback(port);
  Answer answer;
  Disk disk(dir);
  std::mt19937 chance(1);
  auto rest = [&] {
    usleep(static_cast<useconds_t>(
        pause_us + static_cast<long>(chance() % (pause_us + 1))));
  };
  std::vector<double> latency, sync;
  for (long i = 0; i < count; ++i) {
    while (asked.load() <= i) usleep(200);
    rest();
    sync.push_back(disk.sync_us());
    rest();
    double start = now();
    round_trip(fd, job, answer);
    if (answer.status() != 201) {
      fail("enqueue: " + std::to_string(answer.status()) + " " +
           std::string(answer.body().substr(0, 600)));
    }
    while (begun.load() <= i) usleep(50);
    latency.push_back((begun_at.load() - start) * 1e6);
  }
  worker.join();
  std::printf("p50_us=%.0f p99_us=%.0f sync_p50_us=%.0f sync_p99_us=%.0f\n",
              at(latency, 50), at(latency, 99), at(sync, 50), at(sync, 99));
  return 0;
}
