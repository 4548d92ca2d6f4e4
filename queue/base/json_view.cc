#include "queue/base/json_view.h"

#include <charconv>

#include "queue/base/utf8.h"

namespace machina::json {
namespace {

void skip_space(std::string_view text, std::size_t& at) {
  while (at < text.size() && (text[at] == ' ' || text[at] == '\t' ||
                              text[at] == '\n' || text[at] == '\r')) {
    ++at;
  }
}

// `at` is on the opening quote; afterwards behind the closing one.
bool skip_string(std::string_view text, std::size_t& at) {
  for (++at; at < text.size(); ++at) {
    if (text[at] == '\\') {
      ++at;
    } else if (text[at] == '"') {
      ++at;
      return true;
    }
  }
  return false;
}

// Any value, without recursion: brackets are counted, not matched.
bool skip_value(std::string_view text, std::size_t& at) {
  int depth = 0;
  const std::size_t begin = at;
  while (at < text.size()) {
    const char c = text[at];
    if (c == '"') {
      if (!skip_string(text, at)) return false;
      if (depth == 0) return true;
      continue;
    }
    if (c == '{' || c == '[') {
      ++depth;
    } else if (c == '}' || c == ']') {
      if (depth == 0) return at > begin;
      if (--depth == 0) {
        ++at;
        return true;
      }
    } else if (depth == 0 &&
               (c == ',' || c == ' ' || c == '\n' || c == '\r' || c == '\t')) {
      return at > begin;
    }
    ++at;
  }
  return depth == 0 && at > begin;
}

bool hex4(std::string_view raw, std::size_t at, std::uint32_t& out) {
  if (at + 4 > raw.size()) return false;
  const auto end =
      std::from_chars(raw.data() + at, raw.data() + at + 4, out, 16);
  return end.ec == std::errc() && end.ptr == raw.data() + at + 4;
}

void append_utf8(std::string& out, std::uint32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xC0 | (c >> 6));
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xE0 | (c >> 12));
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | (c >> 18));
    out += static_cast<char>(0x80 | ((c >> 12) & 0x3F));
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  }
}

}  // namespace

bool members(std::string_view object, const EachMember& each) {
  std::size_t at = 0;
  skip_space(object, at);
  if (at >= object.size() || object[at] != '{') return false;
  ++at;
  skip_space(object, at);
  if (at < object.size() && object[at] == '}') return true;
  while (at < object.size() && object[at] == '"') {
    const std::size_t key = at;
    if (!skip_string(object, at)) return false;
    const std::string_view name = object.substr(key + 1, at - key - 2);
    skip_space(object, at);
    if (at >= object.size() || object[at] != ':') return false;
    ++at;
    skip_space(object, at);
    const std::size_t value = at;
    if (!skip_value(object, at)) return false;
    if (!each(name, object.substr(value, at - value))) return false;
    skip_space(object, at);
    if (at >= object.size()) return false;
    if (object[at] == '}') return true;
    if (object[at] != ',') return false;
    ++at;
    skip_space(object, at);
  }
  return false;
}

bool elements(std::string_view array, const EachElement& each) {
  std::size_t at = 0;
  skip_space(array, at);
  if (at >= array.size() || array[at] != '[') return false;
  ++at;
  skip_space(array, at);
  if (at < array.size() && array[at] == ']') return true;
  while (at < array.size()) {
    const std::size_t value = at;
    if (!skip_value(array, at)) return false;
    if (!each(array.substr(value, at - value))) return false;
    skip_space(array, at);
    if (at >= array.size()) return false;
    if (array[at] == ']') return true;
    if (array[at] != ',') return false;
    ++at;
    skip_space(array, at);
  }
  return false;
}

std::optional<std::string> string(std::string_view raw) {
  if (raw.size() < 2 || raw.front() != '"' || raw.back() != '"') return {};
  raw = raw.substr(1, raw.size() - 2);
  std::string out;
  out.reserve(raw.size());
  for (std::size_t at = 0; at < raw.size(); ++at) {
    if (raw[at] != '\\') {
      out += raw[at];
      continue;
    }
    if (++at >= raw.size()) return {};
    switch (raw[at]) {
      case 'b':
        out += '\b';
        break;
      case 'f':
        out += '\f';
        break;
      case 'n':
        out += '\n';
        break;
      case 'r':
        out += '\r';
        break;
      case 't':
        out += '\t';
        break;
      case 'u': {
        std::uint32_t c = 0, low = 0;
        if (!hex4(raw, at + 1, c)) return {};
        at += 4;
        if (c >= 0xD800 && c < 0xDC00 && at + 2 < raw.size() &&
            raw[at + 1] == '\\' && raw[at + 2] == 'u' &&
            hex4(raw, at + 3, low) && low >= 0xDC00 && low < 0xE000) {
          c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
          at += 6;
        }
        append_utf8(out, c >= 0xD800 && c < 0xE000 ? 0xFFFD : c);
        break;
      }
      default:
        out += raw[at];
    }
  }
  return out;
}

std::optional<std::int64_t> integer(std::string_view raw) {
  std::int64_t value = 0;
  const auto end = std::from_chars(raw.data(), raw.data() + raw.size(), value);
  if (raw.empty() || end.ec != std::errc() ||
      end.ptr != raw.data() + raw.size()) {
    return {};
  }
  return value;
}

std::optional<bool> boolean(std::string_view raw) {
  if (raw == "true") return true;
  if (raw == "false") return false;
  return {};
}

void quote(std::string& out, std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  out += '"';
  for (std::size_t at = 0; at < text.size();) {
    const unsigned char c = static_cast<unsigned char>(text[at]);
    if (c >= 0x80) {
      const std::size_t length = utf8_length(text.substr(at));
      if (length == 0) {
        out += "\xEF\xBF\xBD";
        ++at;
      } else {
        out.append(text, at, length);
        at += length;
      }
      continue;
    }
    ++at;
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (c < 0x20 || c == 0x7F) {
      out += "\\u00";
      out += kHex[c >> 4];
      out += kHex[c & 15];
    } else {
      out += static_cast<char>(c);
    }
  }
  out += '"';
}

std::string quoted(std::string_view text) {
  std::string out;
  out.reserve(text.size() + 2);
  quote(out, text);
  return out;
}

}  // namespace machina::json
