// queue/base/ids.h
//
// The numbers that name things, and their text forms.

#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace machina {

using Lsn = std::uint64_t;    // a record's place in the order; 0 is before all
using Place = std::uint64_t;  // a record's logical byte position in the log;
                              // 0 is none
using Fence = std::uint64_t;  // writer_epoch (24 bits), counter (40); 0 is none

constexpr Fence make_fence(std::uint32_t epoch, std::uint64_t counter) {
  return (static_cast<Fence>(epoch) << 40) | (counter & ((1ULL << 40) - 1));
}

// A UUIDv7 (RFC 9562, 5.7): 48 bits of Unix milliseconds, version, 74 bits
// more. Of these the ten lowest of rand_a's twelve name the shard (0 today),
// the 32 lowest of rand_b count (6.2), the other 32 are chance.
struct JobId {
  std::array<std::uint8_t, 16> bytes{};
  auto operator<=>(const JobId&) const = default;
  bool is_nil() const { return *this == JobId{}; }
};

// Of `random_a` two bits are used, of `random_b` the 62 lowest.
JobId make_job_id(std::int64_t unix_ms, std::uint64_t random_a,
                  std::uint64_t random_b);
// Where an id belongs in a table. Ids that were made one after another come to
// lie side by side, sixteen at a time: a run of new jobs touches few lines of
// memory. Which sixteen places, and in which order, is as good as chance, so
// that any regular choice among the ids spreads evenly.
std::uint64_t place_of(const JobId& id);
constexpr std::size_t kJobIdText = 36;
std::string to_string(const JobId& id);          // 8-4-4-4-12, lower case
void write_job_id(const JobId& id, char* text);  // kJobIdText bytes of that
// Nothing for any text that to_string() would not have written.
std::optional<JobId> parse_job_id(std::string_view text);
std::int64_t created_ms(const JobId& id);

std::string fence_hex(Fence fence);  // 16 lower-case hex digits
std::optional<Fence> parse_fence_hex(std::string_view text);

}  // namespace machina
