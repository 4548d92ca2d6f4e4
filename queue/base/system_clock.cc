#include <xxhash.h>

#include <algorithm>
#include <ctime>
#include <fstream>
#include <string>

#include "queue/base/check.h"
#include "queue/base/clock.h"

namespace machina {
namespace {

Millis read_clock(clockid_t id) {
  timespec now{};
  CHECK(clock_gettime(id, &now) == 0);
  return static_cast<Millis>(now.tv_sec) * 1000 + now.tv_nsec / 1'000'000;
}

class SystemClock : public Clock {
 public:
  Millis wall_ms() override { return read_clock(CLOCK_REALTIME); }
  Millis mono_ms() override { return read_clock(CLOCK_BOOTTIME); }
  std::uint64_t boot() override {
    std::ifstream file("/proc/sys/kernel/random/boot_id");
    std::string id;
    if (!(file >> id)) return 0;
    return std::max<std::uint64_t>(1, XXH3_64bits(id.data(), id.size()));
  }
};

}  // namespace

Clock& system_clock() {
  static SystemClock* clock = new SystemClock;  // outlives every static
  return *clock;
}

}  // namespace machina
