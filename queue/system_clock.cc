#include <ctime>

#include "queue/check.h"
#include "queue/clock.h"

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
};

}  // namespace

Clock& system_clock() {
  static SystemClock* clock = new SystemClock;  // outlives every static
  return *clock;
}

}  // namespace machina
