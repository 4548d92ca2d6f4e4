// queue/base/rfc3339.h
//
// Times as text, in UTC with milliseconds: 2026-11-20T14:00:00.123Z.
//
//   RF1  What is written is read back as the same time, for all of 1970 to
//        9999. (Rfc3339Test.TimesAreRfc3339)
//   RF2  Reading takes RFC 3339 alone: existing days, Z or an offset, 1 to 9
//        digits of a fraction. (Rfc3339Test.OtherTextsAreRefused)

#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "queue/base/clock.h"

namespace machina {

constexpr std::size_t kRfc3339Text = 24;

void write_rfc3339(char* text, Millis wall_ms);  // kRfc3339Text bytes
void append_rfc3339(std::string* out, Millis wall_ms);
std::string rfc3339(Millis wall_ms);
std::string rfc3339_now();
std::optional<Millis> parse_rfc3339(std::string_view text);

}  // namespace machina
