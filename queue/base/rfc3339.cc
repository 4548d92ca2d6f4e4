#include "queue/base/rfc3339.h"

#include <cstring>

namespace machina {
namespace {

// Days since 1970-01-01 of a date of the Gregorian calendar (H. Hinnant).
std::int64_t days_of(std::int64_t y, unsigned m, unsigned d) {
  y -= m <= 2;
  std::int64_t era = (y >= 0 ? y : y - 399) / 400;
  auto yoe = static_cast<unsigned>(y - era * 400);
  unsigned doy = (153 * (m > 2 ? m - 3 : m + 9) + 2) / 5 + d - 1;
  unsigned doe = yoe * 365 + yoe / 4 - yoe / 100 + doy;
  return era * 146097 + static_cast<std::int64_t>(doe) - 719468;
}

void put(char* at, int width, std::int64_t value) {
  for (int i = width - 1; i >= 0; --i, value /= 10) {
    at[i] = static_cast<char>('0' + value % 10);
  }
}

bool take(std::string_view* text, int width, int* value) {
  if (text->size() < static_cast<std::size_t>(width)) return false;
  *value = 0;
  for (int i = 0; i < width; ++i) {
    char c = (*text)[static_cast<std::size_t>(i)];
    if (c < '0' || c > '9') return false;
    *value = *value * 10 + (c - '0');
  }
  text->remove_prefix(static_cast<std::size_t>(width));
  return true;
}

bool take(std::string_view* text, std::string_view any_of) {
  if (text->empty() || any_of.find(text->front()) == any_of.npos) return false;
  text->remove_prefix(1);
  return true;
}

}  // namespace

void append_rfc3339(std::string* out, Millis wall_ms) {
  char text[kRfc3339Text];
  write_rfc3339(text, wall_ms);
  out->append(text, sizeof text);
}

std::string rfc3339(Millis wall_ms) {
  std::string text;
  append_rfc3339(&text, wall_ms);
  return text;
}

std::string rfc3339_now() { return rfc3339(system_clock().wall_ms()); }

void write_rfc3339(char* text, Millis wall_ms) {
  std::int64_t days = wall_ms / 86'400'000;
  std::int64_t ms = wall_ms % 86'400'000;
  if (ms < 0) {
    ms += 86'400'000;
    --days;
  }
  std::int64_t z = days + 719468;
  std::int64_t era = (z >= 0 ? z : z - 146096) / 146097;
  auto doe = static_cast<unsigned>(z - era * 146097);
  unsigned yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
  unsigned doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
  unsigned mp = (5 * doy + 2) / 153;
  unsigned d = doy - (153 * mp + 2) / 5 + 1;
  unsigned m = mp < 10 ? mp + 3 : mp - 9;
  std::int64_t y = static_cast<std::int64_t>(yoe) + era * 400 + (m <= 2);
  std::memcpy(text, "0000-00-00T00:00:00.000Z", kRfc3339Text);
  put(text, 4, y);
  put(text + 5, 2, m);
  put(text + 8, 2, d);
  put(text + 11, 2, ms / 3'600'000);
  put(text + 14, 2, ms / 60'000 % 60);
  put(text + 17, 2, ms / 1000 % 60);
  put(text + 20, 3, ms % 1000);
}

std::optional<Millis> parse_rfc3339(std::string_view text) {
  int y, mo, d, h, mi, s;
  if (!take(&text, 4, &y) || !take(&text, "-") || !take(&text, 2, &mo) ||
      !take(&text, "-") || !take(&text, 2, &d) || !take(&text, "Tt ") ||
      !take(&text, 2, &h) || !take(&text, ":") || !take(&text, 2, &mi) ||
      !take(&text, ":") || !take(&text, 2, &s)) {
    return std::nullopt;
  }
  static constexpr int kDays[] = {31, 28, 31, 30, 31, 30,
                                  31, 31, 30, 31, 30, 31};
  bool leap = (y % 4 == 0 && y % 100 != 0) || y % 400 == 0;
  if (mo < 1 || mo > 12 || d < 1 || h > 23 || mi > 59 || s > 60 ||
      d > kDays[mo - 1] + (mo == 2 && leap ? 1 : 0)) {
    return std::nullopt;
  }
  int ms = 0;
  if (take(&text, ".")) {
    int digits = 0;
    while (!text.empty() && text[0] >= '0' && text[0] <= '9') {
      if (++digits > 9) return std::nullopt;
      if (digits <= 3) ms = ms * 10 + (text[0] - '0');
      text.remove_prefix(1);
    }
    if (digits == 0) return std::nullopt;
    for (; digits < 3; ++digits) ms *= 10;
  }
  std::int64_t offset = 0;
  if (!take(&text, "Zz")) {
    int oh, om;
    bool behind = !text.empty() && text[0] == '-';
    if (!take(&text, "+-") || !take(&text, 2, &oh) || !take(&text, ":") ||
        !take(&text, 2, &om) || oh > 23 || om > 59) {
      return std::nullopt;
    }
    offset = (oh * 60 + om) * (behind ? -1 : 1);
  }
  if (!text.empty()) return std::nullopt;
  std::int64_t seconds =
      days_of(y, static_cast<unsigned>(mo), static_cast<unsigned>(d)) * 86400 +
      h * 3600 + mi * 60 + s - offset * 60;
  return seconds * 1000 + ms;
}

}  // namespace machina
