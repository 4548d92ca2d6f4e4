// queue/base/numbers.h
//
// A text that is a number and nothing else.
//
//   NU1  parse_number() takes the whole text or nothing: no white space, no
//   sign
//        but '-', no digits behind the type's range.
//        (NumbersTest.TheWholeTextIsANumberOrNothing)

#pragma once

#include <charconv>
#include <cstdint>
#include <optional>
#include <string_view>

namespace machina {

template <class Number = std::int64_t>
std::optional<Number> parse_number(std::string_view text) {
  Number value{};
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end) return std::nullopt;
  return value;
}

}  // namespace machina
