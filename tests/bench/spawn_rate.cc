// tests/bench/spawn_rate.cc
//
// Starts a command N times, one after the other, with posix_spawn, and waits
// for each. Prints the rate. A run that does not exit 0 ends the measurement.

#include <spawn.h>
#include <sys/wait.h>

#include "http_client.h"

extern char** environ;

int main(int argc, char** argv) {
  using namespace machina::bench;
  if (argc < 3) fail("usage: bench_spawn_rate COUNT COMMAND [ARGUMENT]...");
  int count = std::atoi(argv[1]);
  if (count <= 0) fail("COUNT must be at least 1");
  double start = now();
  for (int i = 0; i < count; ++i) {
    pid_t pid = 0;
    errno = posix_spawnp(&pid, argv[2], nullptr, nullptr, argv + 2, environ);
    if (errno != 0) die(argv[2]);
    int status = 0;
    if (waitpid(pid, &status, 0) != pid) die("waitpid");
    if (status != 0) fail(std::string(argv[2]) + " did not exit 0");
  }
  double each = (now() - start) / count;
  std::printf("rate=%.0f each_us=%.0f\n", 1 / each, each * 1e6);
  return 0;
}
