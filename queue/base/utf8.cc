#include "queue/base/utf8.h"

namespace machina {

std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) -> unsigned {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0;
  };
  const auto more = [&](std::size_t i) { return (byte(i) & 0xC0) == 0x80; };
  const unsigned first = byte(0);
  if (text.empty()) return 0;
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first <= 0xDF) return more(1) ? 2 : 0;
  if (first >= 0xE0 && first <= 0xEF) {
    const bool overlong = first == 0xE0 && byte(1) < 0xA0;
    const bool surrogate = first == 0xED && byte(1) > 0x9F;
    return more(1) && more(2) && !overlong && !surrogate ? 3 : 0;
  }
  if (first >= 0xF0 && first <= 0xF4) {
    const bool out_of_range =
        (first == 0xF0 && byte(1) < 0x90) || (first == 0xF4 && byte(1) > 0x8F);
    return more(1) && more(2) && more(3) && !out_of_range ? 4 : 0;
  }
  return 0;
}

bool valid_utf8(std::string_view text) {
  while (!text.empty()) {
    const std::size_t length = utf8_length(text);
    if (length == 0) return false;
    text.remove_prefix(length);
  }
  return true;
}

std::string_view utf8_whole_end(std::string_view text) {
  for (std::size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const auto byte = static_cast<unsigned char>(text[text.size() - back]);
    if (byte < 0x80) break;
    if (byte < 0xC0) continue;
    const std::size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : 2;
    return text.substr(0, text.size() - (length > back ? back : 0));
  }
  return text;
}

std::string_view utf8_whole_begin(std::string_view text) {
  for (int i = 0; i < 3 && !text.empty() &&
                  (static_cast<unsigned char>(text[0]) & 0xC0) == 0x80;
       ++i) {
    text.remove_prefix(1);
  }
  return text;
}

std::string_view utf8_head(std::string_view text, std::size_t most) {
  return text.size() <= most ? text : utf8_whole_end(text.substr(0, most));
}

std::string_view utf8_tail(std::string_view text, std::size_t most) {
  return text.size() <= most
             ? text
             : utf8_whole_begin(text.substr(text.size() - most));
}

}  // namespace machina
