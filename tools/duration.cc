#include "tools/duration.h"

namespace machina {
namespace {

struct Unit {
  std::string_view name;
  std::int64_t ms;
};
// "ms" before "m": the longer name is looked for first.
constexpr Unit kUnits[] = {
    {"d", 86'400'000}, {"h", 3'600'000}, {"ms", 1}, {"m", 60'000}, {"s", 1000}};
constexpr std::int64_t kFractionMax = 1'000'000'000;

// Digits from the front of `text`. False: none, or too many.
bool take_digits(std::string_view* text, std::int64_t* value,
                 std::int64_t* scale) {
  std::size_t n = 0;
  for (; n < text->size() && (*text)[n] >= '0' && (*text)[n] <= '9'; ++n) {
    if (scale != nullptr && *scale >= kFractionMax) return false;
    if (__builtin_mul_overflow(*value, 10, value) ||
        __builtin_add_overflow(*value, (*text)[n] - '0', value)) {
      return false;
    }
    if (scale != nullptr) *scale *= 10;
  }
  text->remove_prefix(n);
  return n > 0;
}

}  // namespace

std::optional<std::int64_t> parse_duration_ms(std::string_view text,
                                              std::int64_t plain_unit_ms) {
  std::int64_t total = 0, last = INT64_MAX;
  if (text.empty()) return std::nullopt;
  for (bool first = true; !text.empty(); first = false) {
    std::int64_t whole = 0, part = 0, scale = 1;
    if (!take_digits(&text, &whole, nullptr)) return std::nullopt;
    if (text.starts_with('.')) {
      text.remove_prefix(1);
      if (!take_digits(&text, &part, &scale)) return std::nullopt;
    }
    std::int64_t unit = 0;
    if (text.empty() && first) {
      unit = plain_unit_ms;
    } else {
      for (const Unit& each : kUnits) {
        if (!text.starts_with(each.name)) continue;
        unit = each.ms;
        text.remove_prefix(each.name.size());
        break;
      }
    }
    if (unit == 0 || unit >= last) return std::nullopt;
    last = unit;
    std::int64_t ms = 0, fraction = 0;
    if (__builtin_mul_overflow(whole, unit, &ms) ||
        __builtin_mul_overflow(part, unit, &fraction) ||
        fraction % scale != 0 ||
        __builtin_add_overflow(ms, fraction / scale, &ms) ||
        __builtin_add_overflow(total, ms, &total)) {
      return std::nullopt;
    }
  }
  return total;
}

std::string duration_range(std::int64_t min_ms, std::int64_t max_ms,
                           const std::string& unit) {
  const auto in_unit = [&](std::int64_t ms) {
    if (unit == "ms") return std::to_string(ms);
    std::string text = std::to_string(ms / 1000);
    if (ms % 1000 == 0) return text;
    std::string part = std::to_string(1000 + ms % 1000).substr(1);
    while (part.ends_with('0')) part.pop_back();
    return text + "." + part;
  };
  return in_unit(min_ms) + ".." + in_unit(max_ms) + " " + unit +
         ", also as 5s, 10m or 1h30m";
}

}  // namespace machina
