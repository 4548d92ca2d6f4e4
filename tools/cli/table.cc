// How an answer is shown to a person: columns, times, harmless text.

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <iterator>

#include "queue/base/rfc3339.h"
#include "queue/base/utf8.h"
#include "tools/cli/cli.h"

namespace machina::cli {
namespace {

std::int64_t now_ms() {
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1000 + now.tv_nsec / 1'000'000;
}

std::string local_time(std::int64_t ms, const char* format) {
  std::time_t seconds = static_cast<std::time_t>(ms / 1000);
  std::tm parts{};
  ::localtime_r(&seconds, &parts);
  char text[40];
  std::size_t length = std::strftime(text, sizeof text, format, &parts);
  return std::string(text, length);
}

}  // namespace

std::int64_t parse_time_ms(const std::string& text) {
  return parse_rfc3339(text).value_or(-1);
}

std::string readable_ms(std::int64_t ms) {
  char text[40];
  if (ms < 0) return "-" + readable_ms(-ms);
  if (ms < 1000) {
    std::snprintf(text, sizeof text, "%lld ms", static_cast<long long>(ms));
  } else if (ms < 60'000) {
    std::snprintf(text, sizeof text, "%.1f s", static_cast<double>(ms) / 1000);
  } else if (ms < 3'600'000) {
    std::snprintf(text, sizeof text, "%lld min %02lld s",
                  static_cast<long long>(ms / 60'000),
                  static_cast<long long>(ms / 1000 % 60));
  } else if (ms < 86'400'000) {
    std::snprintf(text, sizeof text, "%lld h %02lld min",
                  static_cast<long long>(ms / 3'600'000),
                  static_cast<long long>(ms / 60'000 % 60));
  } else {
    std::snprintf(text, sizeof text, "%lld days",
                  static_cast<long long>(ms / 86'400'000));
  }
  return text;
}

std::string readable_clock(const std::string& rfc3339) {
  std::int64_t ms = parse_time_ms(rfc3339);
  if (ms < 0) return "-";
  bool today = local_time(ms, "%F") == local_time(now_ms(), "%F");
  return local_time(ms, today ? "%T" : "%F %R");
}

std::string readable_time(const std::string& rfc3339) {
  std::int64_t ms = parse_time_ms(rfc3339);
  if (ms < 0) return "-";
  std::int64_t age = now_ms() - ms;
  return local_time(ms, "%F %T") + (age >= 0
                                        ? " (" + readable_ms(age) + " ago)"
                                        : " (in " + readable_ms(-age) + ")");
}

namespace {

// One character at the front of `text`: its bytes, and its code point, or -1
// where these bytes are no UTF-8.
std::size_t decode(std::string_view text, std::int32_t* code) {
  const auto byte = [&](std::size_t i) {
    return static_cast<unsigned char>(text[i]);
  };
  *code = -1;
  const unsigned first = byte(0);
  if (first < 0x80) {
    *code = static_cast<std::int32_t>(first);
    return 1;
  }
  const std::size_t size = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() < size) return 1;
  std::int32_t value = static_cast<std::int32_t>(first & (0xFF >> (size + 1)));
  for (std::size_t i = 1; i < size; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 1;
    value = value << 6 | static_cast<std::int32_t>(byte(i) & 0x3F);
  }
  const bool shortest =
      size == 2 || (size == 3 && value >= 0x800) || value >= 0x10000;
  if (!shortest || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) {
    return 1;
  }
  *code = value;
  return size;
}

// What a terminal would obey, or not show: controls, marks of direction,
// characters of no width, other ends of lines.
bool harmful(std::int32_t c) {
  static constexpr std::int32_t kRanges[][2] = {
      {0x00, 0x08},     {0x0B, 0x1F},     {0x7F, 0x9F},     {0xAD, 0xAD},
      {0x61C, 0x61C},   {0x180E, 0x180E}, {0x200B, 0x200F}, {0x2028, 0x202E},
      {0x2060, 0x206F}, {0xFEFF, 0xFEFF}, {0xFFF9, 0xFFFB}, {0xE0000, 0xE007F},
  };
  return std::any_of(std::begin(kRanges), std::end(kRanges),
                     [&](const auto& r) { return c >= r[0] && c <= r[1]; });
}

// `wide` writes a harmful character that has more than 16 bits.
template <typename Wide>
std::string escaped(std::string_view text, Wide wide) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    std::int32_t code = 0;
    const std::size_t size = decode(text, &code);
    char escape[16];
    if (code < 0) {
      std::snprintf(escape, sizeof escape, "\\x%02x",
                    static_cast<unsigned>(static_cast<unsigned char>(text[0])));
      out += escape;
    } else if (harmful(code)) {
      const auto value = static_cast<unsigned>(code);
      if (value > 0xFFFF) {
        wide(escape, sizeof escape, value);
      } else {
        std::snprintf(escape, sizeof escape, "\\u%04x", value);
      }
      out += escape;
    } else {
      out += text.substr(0, size);
    }
    text.remove_prefix(size);
  }
  return out;
}

}  // namespace

std::string harmless(std::string_view text) {
  return escaped(text, [](char* to, std::size_t size, unsigned code) {
    std::snprintf(to, size, "\\U%08x", code);
  });
}

std::string harmless_json(std::string_view json) {
  return escaped(json, [](char* to, std::size_t size, unsigned code) {
    code -= 0x10000;
    std::snprintf(to, size, "\\u%04x\\u%04x", 0xD800 + (code >> 10),
                  0xDC00 + (code & 0x3FF));
  });
}

std::string first_line(std::string_view text, std::size_t max) {
  text = text.substr(0, text.find('\n'));
  return std::string(utf8_whole_end(text.substr(0, max)));
}

Table::Table(std::vector<std::string> head) { add(std::move(head)); }

void Table::add(std::vector<std::string> row) {
  for (auto& cell : row) {
    cell = harmless(cell);
    std::replace(cell.begin(), cell.end(), '\n', ' ');
    std::replace(cell.begin(), cell.end(), '\t', ' ');
    if (cell.empty()) cell = "-";
  }
  rows_.push_back(std::move(row));
}

std::string Table::text() const {
  std::vector<std::size_t> widths;
  for (const auto& row : rows_) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) {
      widths[i] = std::max(widths[i], row[i].size());
    }
  }
  std::string out;
  for (const auto& row : rows_) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      out += row[i];
      if (i + 1 < row.size()) out.append(widths[i] + 2 - row[i].size(), ' ');
    }
    out += '\n';
  }
  return out;
}

}  // namespace machina::cli
