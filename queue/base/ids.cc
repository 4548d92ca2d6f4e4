#include "queue/base/ids.h"

#include "queue/base/hex.h"

namespace machina {
namespace {

bool is_dash_position(std::size_t i) {
  return i == 8 || i == 13 || i == 18 || i == 23;
}

std::uint64_t mix(std::uint64_t x) {  // splitmix64's finaliser
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

JobId make_job_id(std::int64_t unix_ms, std::uint64_t random_a,
                  std::uint64_t random_b) {
  JobId id;
  for (int i = 0; i < 6; ++i) {
    id.bytes[i] = static_cast<std::uint8_t>(unix_ms >> (8 * (5 - i)));
  }
  // rand_a is 12 bits; its ten lowest name the shard, which is 0.
  id.bytes[6] = static_cast<std::uint8_t>(0x70 | ((random_a & 0x3) << 2));
  id.bytes[7] = 0;
  for (int i = 0; i < 8; ++i) {
    id.bytes[8 + i] = static_cast<std::uint8_t>(random_b >> (8 * (7 - i)));
  }
  id.bytes[8] = static_cast<std::uint8_t>((id.bytes[8] & 0x3f) | 0x80);
  return id;
}

std::uint64_t place_of(const JobId& id) {
  std::uint32_t count = 0;
  for (int i = 12; i < 16; ++i) count = count << 8 | id.bytes[i];
  const std::uint64_t sixteen = mix(count >> 4);
  return sixteen << 4 | ((count ^ sixteen >> 60) & 15);
}

std::string to_string(const JobId& id) {
  std::string text(kJobIdText, '-');
  write_job_id(id, text.data());
  return text;
}

void write_job_id(const JobId& id, char* text) {
  std::size_t at = 0;
  for (std::uint8_t byte : id.bytes) {
    if (is_dash_position(at)) text[at++] = '-';
    text[at++] = kHexDigits[byte >> 4];
    text[at++] = kHexDigits[byte & 15];
  }
}

std::optional<JobId> parse_job_id(std::string_view text) {
  if (text.size() != 36) return std::nullopt;
  JobId id;
  std::size_t at = 0;
  for (std::uint8_t& byte : id.bytes) {
    if (is_dash_position(at) && text[at++] != '-') return std::nullopt;
    int high = lower_hex_value(text[at]);
    int low = lower_hex_value(text[at + 1]);
    if (high < 0 || low < 0) return std::nullopt;
    byte = static_cast<std::uint8_t>(high << 4 | low);
    at += 2;
  }
  return id;
}

std::int64_t created_ms(const JobId& id) {
  std::int64_t ms = 0;
  for (int i = 0; i < 6; ++i) ms = ms << 8 | id.bytes[i];
  return ms;
}

std::string fence_hex(Fence fence) {
  std::string text(16, '0');
  write_hex(text.data(), fence);
  return text;
}

std::optional<Fence> parse_fence_hex(std::string_view text) {
  if (text.size() != 16) return std::nullopt;
  Fence fence = 0;
  for (char c : text) {
    int value = lower_hex_value(c);
    if (value < 0) return std::nullopt;
    fence = fence << 4 | static_cast<Fence>(value);
  }
  return fence;
}

}  // namespace machina
