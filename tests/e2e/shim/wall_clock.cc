// Preloaded into a server under test (LD_PRELOAD): its wall clock is so many
// seconds off as the file named by WALL_CLOCK_SHIFT_FILE says. Nothing of the
// host is changed, and its monotonic clocks are left alone; but with
// WALL_CLOCK_SHIFT_BOOT set the clock since the boot is off as much.

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include <cstdlib>

namespace {

long shift_s() {
  const char* path = std::getenv("WALL_CLOCK_SHIFT_FILE");
  if (path == nullptr) return 0;
  const long fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY);
  if (fd < 0) return 0;
  char text[32] = {};
  const long n = syscall(SYS_read, fd, text, sizeof text - 1);
  syscall(SYS_close, fd);
  return n > 0 ? std::strtol(text, nullptr, 10) : 0;
}

}  // namespace

extern "C" {

int clock_gettime(clockid_t id, struct timespec* at) noexcept {
  const int result = static_cast<int>(syscall(SYS_clock_gettime, id, at));
  const bool wall = id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE;
  const bool boot =
      id == CLOCK_BOOTTIME && std::getenv("WALL_CLOCK_SHIFT_BOOT") != nullptr;
  if (result == 0 && (wall || boot)) at->tv_sec += shift_s();
  return result;
}

time_t time(time_t* out) noexcept {
  timespec at{};
  clock_gettime(CLOCK_REALTIME, &at);
  if (out != nullptr) *out = at.tv_sec;
  return at.tv_sec;
}

int gettimeofday(struct timeval* out, void*) noexcept {
  timespec at{};
  clock_gettime(CLOCK_REALTIME, &at);
  out->tv_sec = at.tv_sec;
  out->tv_usec = at.tv_nsec / 1000;
  return 0;
}

}  // extern "C"
