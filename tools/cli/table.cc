// How an answer is shown to a person: columns, times, harmless text.

#include <algorithm>
#include <cstdio>
#include <ctime>

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

std::int64_t parse_time_ms(const std::string& rfc3339) {
  std::tm parts{};
  int millis = 0;
  int fields =
      std::sscanf(rfc3339.c_str(), "%4d-%2d-%2dT%2d:%2d:%2d.%3dZ",
                  &parts.tm_year, &parts.tm_mon, &parts.tm_mday, &parts.tm_hour,
                  &parts.tm_min, &parts.tm_sec, &millis);
  if (fields < 6) return -1;
  parts.tm_year -= 1900;
  parts.tm_mon -= 1;
  return static_cast<std::int64_t>(::timegm(&parts)) * 1000 + millis;
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

std::string harmless(std::string text) {
  for (char& c : text) {
    auto byte = static_cast<unsigned char>(c);
    if ((byte < 0x20 && c != '\n' && c != '\t') || byte == 0x7f) c = '?';
  }
  // C1 controls, which some terminals obey, are C2 80..9f in UTF-8.
  for (std::size_t at = 0; at + 1 < text.size(); ++at) {
    auto next = static_cast<unsigned char>(text[at + 1]);
    if (text[at] == '\xc2' && next >= 0x80 && next <= 0x9f) {
      text.replace(at, 2, "?");
    }
  }
  return text;
}

Table::Table(std::vector<std::string> head) { add(std::move(head)); }

void Table::add(std::vector<std::string> row) {
  for (auto& cell : row) {
    cell = harmless(std::move(cell));
    std::replace(cell.begin(), cell.end(), '\n', ' ');
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
