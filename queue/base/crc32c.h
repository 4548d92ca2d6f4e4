// queue/base/crc32c.h
//
// CRC-32C (Castagnoli), as the log uses it: SSE 4.2 where the processor has
// it, else a table. Both give the same numbers
// (tests/queue/base/crc32c_test.cc).

#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace machina {

// The checksum of `bytes` after bytes whose checksum was `crc`:
// crc32c(crc32c(seed, a), b) == crc32c(seed, ab). The customary seed is 0.
std::uint32_t crc32c(std::uint32_t crc, std::span<const std::byte> bytes);

// The table alone, for comparison.
std::uint32_t crc32c_portable(std::uint32_t crc,
                              std::span<const std::byte> bytes);

}  // namespace machina
