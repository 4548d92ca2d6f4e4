// tools/duration.h
//
// A span of time as people write it: "5s", "10m", "1h30m", "1.5s", "250ms".
// The one reader of such texts, for options of the command line and for the
// variables whose names end in _MS or _SEC.
//
// tests/tools/duration_test.cc has a test for each form.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace machina {

// In milliseconds. Units: d, h, m, s, ms, the larger one first, each at most
// once. A plain number counts in `plain_unit_ms`. Nothing for any other text,
// for what is no whole number of milliseconds, and for what does not fit.
std::optional<std::int64_t> parse_duration_ms(std::string_view text,
                                              std::int64_t plain_unit_ms);

// "0..86400000 ms": a range in `unit` ("ms" or "s"), and how else to write it.
std::string duration_range(std::int64_t min_ms, std::int64_t max_ms,
                           const std::string& unit);

}  // namespace machina
