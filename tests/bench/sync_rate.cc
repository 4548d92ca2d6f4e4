// tests/bench/sync_rate.cc
//
// What the disk itself can do, measured where the log will be: one 4 KiB write
// made durable at a time, in sequence over a pre-zeroed file, once with
// pwrite + fdatasync and once with O_DIRECT|O_DSYNC. Prints one line; "0" where
// the file system has no O_DIRECT.

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdint>

#include "http_client.h"

namespace {

using namespace machina::bench;

constexpr std::size_t kBlock = 4096;
constexpr off_t kFileBytes = 64 << 20;

struct Figure {
  double mean_us = 0, p50_us = 0, p99_us = 0;
};

Figure measure(int fd, void* block, bool sync, double seconds) {
  std::vector<double> each;
  double start = now(), at = start;
  off_t offset = 0;
  while (at - start < seconds) {
    if (pwrite(fd, block, kBlock, offset) != static_cast<ssize_t>(kBlock)) {
      die("pwrite");
    }
    if (sync && fdatasync(fd) != 0) die("fdatasync");
    double end = now();
    each.push_back((end - at) * 1e6);
    at = end;
    offset = (offset + static_cast<off_t>(kBlock)) % kFileBytes;
  }
  Figure f;
  f.mean_us = (at - start) / static_cast<double>(each.size()) * 1e6;
  std::sort(each.begin(), each.end());
  f.p50_us = each[each.size() / 2];
  f.p99_us = each[each.size() * 99 / 100];
  return f;
}

void zero(int fd, void* block) {
  for (off_t at = 0; at < kFileBytes; at += kBlock) {
    if (pwrite(fd, block, kBlock, at) < 0) die("pwrite");
  }
  if (fsync(fd) != 0) die("fsync");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) fail("usage: bench_sync_rate DIRECTORY [SECONDS]");
  double seconds = argc > 2 ? std::atof(argv[2]) : 1.0;
  std::string path =
      std::string(argv[1]) + "/sync_rate." + std::to_string(getpid());
  void* block = nullptr;
  if (posix_memalign(&block, kBlock, kBlock) != 0) fail("no memory");
  std::memset(block, 0, kBlock);
  int fd = open(path.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0) die(path.c_str());
  int direct = open(path.c_str(), O_RDWR | O_DIRECT | O_DSYNC | O_CLOEXEC);
  unlink(path.c_str());
  zero(fd, block);
  std::memset(block, 0x5a, kBlock);
  Figure s = measure(fd, block, true, seconds);
  Figure d;
  if (direct >= 0) d = measure(direct, block, false, seconds);
  std::printf(
      "fdatasync_us=%.0f fdatasync_p50_us=%.0f fdatasync_p99_us=%.0f "
      "dsync_us=%.0f dsync_p50_us=%.0f dsync_p99_us=%.0f\n",
      s.mean_us, s.p50_us, s.p99_us, d.mean_us, d.p50_us, d.p99_us);
  return 0;
}
