#include <sys/random.h>

#include <cerrno>
#include <cstdint>
#include <utility>

#include "queue/base/check.h"
#include "queue/base/clock.h"

namespace machina {
namespace {

class SystemRandom : public Random {
 public:
  std::uint64_t next() override {
    if (used_ == kWords) refill();
    return std::exchange(words_[used_++], 0);
  }

 private:
  static constexpr std::size_t kWords = 32;  // 256 bytes: never a short read

  void refill() {
    ssize_t got;
    do {
      got = getrandom(words_, sizeof(words_), 0);
    } while (got < 0 && errno == EINTR);
    CHECK(got == static_cast<ssize_t>(sizeof(words_)));
    used_ = 0;
  }

  std::uint64_t words_[kWords] = {};
  std::size_t used_ = kWords;
};

}  // namespace

Random& system_random() {
  static SystemRandom* random = new SystemRandom;
  return *random;
}

}  // namespace machina
