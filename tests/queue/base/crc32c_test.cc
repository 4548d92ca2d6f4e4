#include "queue/base/crc32c.h"

#include <gtest/gtest.h>

#include <string_view>
#include <vector>

#include "tests/support/sim_storage.h"

namespace machina {
namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

TEST(Crc32c, KnownAnswers) {  // RFC 3720, B.4, and the usual check value
  EXPECT_EQ(crc32c(0, bytes_of("123456789")), 0xe3069283u);
  std::vector<std::byte> zeros(32), ones(32, std::byte{0xff});
  EXPECT_EQ(crc32c(0, zeros), 0x8a9136aau);
  EXPECT_EQ(crc32c(0, ones), 0x62a8ab43u);
  EXPECT_EQ(crc32c(0, {}), 0u);
}

TEST(Crc32c, TableAndInstructionAgreeAtEveryLengthAndCut) {
  SeededRandom random(7);
  std::vector<std::byte> bytes(300);
  for (auto& b : bytes) b = std::byte(random.next());
  for (std::size_t n = 0; n <= bytes.size(); ++n) {
    auto all = std::span<const std::byte>(bytes).first(n);
    auto seed = static_cast<std::uint32_t>(random.next());
    std::uint32_t crc = crc32c(seed, all);
    EXPECT_EQ(crc, crc32c_portable(seed, all));
    std::size_t cut = n == 0 ? 0 : random.below(n);
    EXPECT_EQ(crc, crc32c(crc32c(seed, all.first(cut)), all.subspan(cut)));
  }
}

}  // namespace
}  // namespace machina
