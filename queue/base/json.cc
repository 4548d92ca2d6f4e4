#include "queue/base/json.h"

#include <xxhash.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include "queue/base/check.h"
#include "queue/base/hex.h"
#include "queue/base/numbers.h"
#include "queue/base/utf8.h"

namespace machina {

using Type = JsonValue::Type;

namespace {

// Up to so many keys, duplicates are looked for by comparing all pairs.
constexpr std::size_t kFewKeys = 12;

void append_utf8(std::string* out, std::uint32_t c) {
  if (c < 0x80) {
    *out += static_cast<char>(c);
  } else if (c < 0x800) {
    *out += static_cast<char>(0xc0 | (c >> 6));
    *out += static_cast<char>(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    *out += static_cast<char>(0xe0 | (c >> 12));
    *out += static_cast<char>(0x80 | ((c >> 6) & 0x3f));
    *out += static_cast<char>(0x80 | (c & 0x3f));
  } else {
    *out += static_cast<char>(0xf0 | (c >> 18));
    *out += static_cast<char>(0x80 | ((c >> 12) & 0x3f));
    *out += static_cast<char>(0x80 | ((c >> 6) & 0x3f));
    *out += static_cast<char>(0x80 | (c & 0x3f));
  }
}

std::uint32_t hex4(const char* p) {
  std::uint32_t v = 0;
  for (int i = 0; i < 4; ++i) {
    v = v << 4 | static_cast<std::uint32_t>(hex_value(p[i]));
  }
  return v;
}

// `s` was scanned: its escapes are sound.
void append_unescaped(std::string* out, std::string_view s) {
  for (std::size_t i = 0; i < s.size(); ++i) {
    if (s[i] != '\\') {
      *out += s[i];
      continue;
    }
    switch (char c = s[++i]) {
      case 'n':
        *out += '\n';
        break;
      case 't':
        *out += '\t';
        break;
      case 'r':
        *out += '\r';
        break;
      case 'b':
        *out += '\b';
        break;
      case 'f':
        *out += '\f';
        break;
      case 'u': {
        std::uint32_t v = hex4(&s[i + 1]);
        i += 4;
        if (v >= 0xd800 && v < 0xdc00) {
          v = 0x10000 + ((v - 0xd800) << 10) + (hex4(&s[i + 3]) - 0xdc00);
          i += 6;
        }
        append_utf8(out, v);
        break;
      }
      default:
        *out += c;  // " \ /
    }
  }
}

}  // namespace

// --- Scanning --------------------------------------------------------------

class JsonScanner {
 public:
  JsonScanner(JsonDoc& doc, std::string_view text, int depth_max)
      : doc_(doc),
        text_(text),
        p_(text.data()),
        end_(p_ + text.size()),
        depth_max_(depth_max) {}

  std::optional<JsonError> run() {
    skip_space();
    if (value(0, 0, 0, false)) {
      skip_space();
      if (p_ != end_) fail("text after the value");
    }
    return std::move(error_);
  }

 private:
  std::uint32_t at() const {
    return static_cast<std::uint32_t>(p_ - text_.data());
  }
  bool fail(std::string what) {
    if (!error_) error_ = JsonError{at(), std::move(what), {}};
    return false;
  }
  void skip_space() {
    while (p_ < end_ &&
           (*p_ == ' ' || *p_ == '\n' || *p_ == '\r' || *p_ == '\t')) {
      ++p_;
    }
  }

  bool value(int depth, std::uint32_t key_begin, std::uint32_t key_end,
             bool key_escaped) {
    if (p_ == end_) return fail("the text ends where a value should be");
    auto index = static_cast<std::uint32_t>(doc_.nodes_.size());
    doc_.nodes_.push_back(
        {at(), 0, key_begin, key_end, 0, Type::null, key_escaped, false});
    Type type = Type::null;
    bool escapes = false, ok = false;
    switch (*p_) {
      case '{':
        type = Type::object;
        ok = object(depth + 1, index);
        break;
      case '[':
        type = Type::array;
        ok = array(depth + 1);
        break;
      case '"':
        type = Type::string;
        ok = string(&escapes);
        break;
      case 't':
        type = Type::boolean;
        ok = word("true");
        break;
      case 'f':
        type = Type::boolean;
        ok = word("false");
        break;
      case 'n':
        ok = word("null");
        break;
      default:
        type = Type::number;
        ok = number();
    }
    if (!ok) return false;
    JsonDoc::Node& node = doc_.nodes_[index];
    node.end = at();
    node.type = type;
    node.escapes = escapes;
    node.next = static_cast<std::uint32_t>(doc_.nodes_.size());
    return true;
  }

  bool word(std::string_view w) {
    if (std::string_view(p_, static_cast<std::size_t>(end_ - p_))
            .substr(0, w.size()) != w) {
      return fail("not a JSON value");
    }
    p_ += w.size();
    return true;
  }

  static bool digit(char c) { return c >= '0' && c <= '9'; }
  bool number() {
    const char* start = p_;
    if (p_ < end_ && *p_ == '-') ++p_;
    if (p_ == end_ || !digit(*p_)) {
      p_ = start;
      return fail("not a JSON value");
    }
    if (*p_ == '0') {
      ++p_;
    } else {
      while (p_ < end_ && digit(*p_)) ++p_;
    }
    if (p_ < end_ && *p_ == '.') {
      ++p_;
      if (p_ == end_ || !digit(*p_)) return fail("a number ends in its point");
      while (p_ < end_ && digit(*p_)) ++p_;
    }
    if (p_ < end_ && (*p_ == 'e' || *p_ == 'E')) {
      ++p_;
      if (p_ < end_ && (*p_ == '+' || *p_ == '-')) ++p_;
      if (p_ == end_ || !digit(*p_)) return fail("a number has no exponent");
      while (p_ < end_ && digit(*p_)) ++p_;
    }
    return true;
  }

  // Eight plain bytes at a time: none below 0x20, none above 0x7e, no quote,
  // no backslash.
  static bool eight_plain(const char* p) {
    std::uint64_t w;
    std::memcpy(&w, p, 8);
    constexpr std::uint64_t kOnes = 0x0101010101010101, kHigh = kOnes << 7;
    auto zero = [](std::uint64_t x) { return (x - kOnes) & ~x; };
    std::uint64_t bad = w | zero(w ^ (kOnes * '"')) | zero(w ^ (kOnes * '\\')) |
                        (w - kOnes * 0x20);
    return (bad & kHigh) == 0;
  }

  // At the opening quote; leaves p_ after the closing one.
  bool string(bool* escapes) {
    ++p_;
    while (true) {
      while (end_ - p_ >= 8 && eight_plain(p_)) p_ += 8;
      if (p_ == end_) return fail("a string has no end");
      auto c = static_cast<unsigned char>(*p_);
      if (c == '"') {
        ++p_;
        return true;
      }
      if (c == '\\') {
        *escapes = true;
        if (!escape()) return false;
      } else if (c < 0x20) {
        return fail("a control byte in a string");
      } else if (c < 0x80) {
        ++p_;
      } else {
        std::size_t n = utf8_length({p_, static_cast<std::size_t>(end_ - p_)});
        if (n == 0) return fail("a string is not valid UTF-8");
        p_ += n;
      }
    }
  }

  bool hex_escape(std::uint32_t* v) {
    if (end_ - p_ < 6 || p_[0] != '\\' || p_[1] != 'u') return false;
    for (int i = 2; i < 6; ++i) {
      if (hex_value(p_[i]) < 0) return false;
    }
    *v = hex4(p_ + 2);
    p_ += 6;
    return true;
  }

  bool escape() {
    if (end_ - p_ < 2) return fail("a string has no end");
    if (std::strchr("\"\\/bfnrt", p_[1]) != nullptr && p_[1] != '\0') {
      p_ += 2;
      return true;
    }
    std::uint32_t high, low;
    if (!hex_escape(&high)) return fail("an unknown escape in a string");
    if (high >= 0xdc00 && high < 0xe000) return fail("a lone surrogate");
    if (high >= 0xd800 && high < 0xdc00) {
      if (!hex_escape(&low) || low < 0xdc00 || low >= 0xe000) {
        return fail("a lone surrogate");
      }
    }
    return true;
  }

  bool too_deep(int depth) {
    if (depth <= depth_max_) {
      doc_.depth_ = std::max(doc_.depth_, depth);
      return false;
    }
    fail("nested more than " + std::to_string(depth_max_) + " deep");
    return true;
  }

  bool array(int depth) {
    if (too_deep(depth)) return false;
    ++p_;
    skip_space();
    if (p_ < end_ && *p_ == ']') {
      ++p_;
      return true;
    }
    while (true) {
      skip_space();
      if (!value(depth, 0, 0, false)) return false;
      skip_space();
      if (p_ == end_) return fail("an array has no end");
      char c = *p_;
      if (c != ',' && c != ']') return fail("expected , or ] in an array");
      ++p_;
      if (c == ']') return true;
    }
  }

  bool object(int depth, std::uint32_t index) {
    if (too_deep(depth)) return false;
    ++p_;
    skip_space();
    if (p_ < end_ && *p_ == '}') {
      ++p_;
      return true;
    }
    std::size_t members = 0;
    while (true) {
      skip_space();
      if (p_ == end_) return fail("an object has no end");
      if (*p_ != '"') return fail("expected a member's name");
      std::uint32_t begin = at() + 1;
      bool escapes = false;
      if (!string(&escapes)) return false;
      std::uint32_t end = at() - 1;
      if (escapes) {
        std::string_view as_sent = text_.substr(begin, end - begin);
        begin = static_cast<std::uint32_t>(doc_.keys_.size());
        append_unescaped(&doc_.keys_, as_sent);
        end = static_cast<std::uint32_t>(doc_.keys_.size());
      }
      skip_space();
      if (p_ == end_ || *p_ != ':') return fail("expected : after a name");
      ++p_;
      skip_space();
      auto member = static_cast<std::uint32_t>(doc_.nodes_.size());
      if (members < kFewKeys &&
          seen(index, member,
               escapes ? std::string_view(doc_.keys_).substr(begin, end - begin)
                       : text_.substr(begin, end - begin))) {
        return false;
      }
      ++members;
      if (!value(depth, begin, end, escapes)) return false;
      skip_space();
      if (p_ == end_) return fail("an object has no end");
      char c = *p_;
      if (c != ',' && c != '}') return fail("expected , or } in an object");
      ++p_;
      if (c == '}') break;
    }
    return members <= kFewKeys || many_keys_differ(index);
  }

  bool duplicate(std::string_view key) {
    std::string text(key);
    fail("member \"" + text + "\" is there twice");
    error_->duplicate = std::move(text);
    return false;
  }
  // Whether a member of the object at `index` before node `until` has `key`.
  bool seen(std::uint32_t index, std::uint32_t until, std::string_view key) {
    for (std::uint32_t i = index + 1; i < until; i = doc_.nodes_[i].next) {
      if (doc_.key_of(doc_.nodes_[i]) == key) return !duplicate(key);
    }
    return false;
  }
  bool many_keys_differ(std::uint32_t index) {
    std::vector<std::string_view> keys;
    for (std::uint32_t i = index + 1; i < doc_.nodes_.size();
         i = doc_.nodes_[i].next) {
      keys.push_back(doc_.key_of(doc_.nodes_[i]));
    }
    std::sort(keys.begin(), keys.end());
    auto twice = std::adjacent_find(keys.begin(), keys.end());
    return twice == keys.end() || duplicate(*twice);
  }

  JsonDoc& doc_;
  std::string_view text_;
  const char* p_;
  const char* end_;
  int depth_max_;
  std::optional<JsonError> error_;
};

std::optional<JsonError> JsonDoc::parse(std::string_view text, int depth_max) {
  text_ = text;
  keys_.clear();
  nodes_.clear();
  depth_ = 0;
  if (nodes_.capacity() > 64 * 1024) std::vector<Node>().swap(nodes_);
  if (text.size() > UINT32_MAX) return JsonError{0, "longer than 4 GiB", {}};
  return JsonScanner(*this, text, depth_max).run();
}

JsonValue JsonDoc::root() const {
  if (nodes_.empty()) return {};
  return JsonValue(this, 0, static_cast<std::uint32_t>(nodes_.size()));
}

// --- Values ----------------------------------------------------------------

Type JsonValue::type() const { return doc_->nodes_[at_].type; }

std::string_view JsonValue::raw() const {
  const auto& node = doc_->nodes_[at_];
  return doc_->text_.substr(node.begin, node.end - node.begin);
}

bool JsonValue::as_bool() const { return raw() == "true"; }

std::optional<std::int64_t> JsonValue::as_integer() const {
  return parse_number(raw());
}

std::string_view JsonValue::plain_string() const {
  std::string_view text = raw();
  return text.substr(1, text.size() - 2);
}

bool JsonValue::has_escapes() const { return doc_->nodes_[at_].escapes; }

std::string JsonValue::as_string() const {
  if (!has_escapes()) return std::string(plain_string());
  std::string out;
  append_unescaped(&out, plain_string());
  return out;
}

JsonValue JsonValue::first() const {
  std::uint32_t end = doc_->nodes_[at_].next;
  if (at_ + 1 == end) return {};
  return JsonValue(doc_, at_ + 1, end);
}

JsonValue JsonValue::next() const {
  std::uint32_t next = doc_->nodes_[at_].next;
  if (next >= end_) return {};
  return JsonValue(doc_, next, end_);
}

std::string_view JsonValue::key() const {
  return doc_->key_of(doc_->nodes_[at_]);
}

std::size_t JsonValue::size() const {
  std::size_t n = 0;
  for (JsonValue v = first(); v; v = v.next()) ++n;
  return n;
}

JsonValue JsonValue::find(std::string_view key) const {
  for (JsonValue v = first(); v; v = v.next()) {
    if (v.key() == key) return v;
  }
  return {};
}

bool JsonValue::nests_deeper_than(int depth) const {
  if (doc_->depth_ <= depth || (!is_array() && !is_object())) return false;
  if (depth == 0) return true;
  for (JsonValue v = first(); v; v = v.next()) {
    if (v.nests_deeper_than(depth - 1)) return true;
  }
  return false;
}

// --- Canonical form --------------------------------------------------------

namespace {

void append_canonical_number(std::string* out, std::string_view text) {
  if (text.find_first_of(".eE") == text.npos) {
    *out += text == "-0" ? std::string_view("0") : text;
    return;
  }
  double value = 0;
  auto [end, e] =
      std::from_chars(text.data(), text.data() + text.size(), value);
  if (e != std::errc() || !std::isfinite(value)) {
    *out += text;  // out of range: only the same spelling is the same
    return;
  }
  // 2.0 and 2e0 are 2; the bound keeps the conversion exact.
  if (value == std::floor(value) && std::fabs(value) < 9007199254740992.0) {
    *out += std::to_string(static_cast<std::int64_t>(value));
    return;
  }
  char buffer[40];
  auto done = std::to_chars(buffer, buffer + sizeof buffer, value);
  out->append(buffer, done.ptr);
}

void append_canonical(std::string* out, const JsonValue& value) {
  switch (value.type()) {
    case Type::object: {
      std::vector<JsonValue> members;
      for (JsonValue v = value.first(); v; v = v.next()) members.push_back(v);
      std::sort(members.begin(), members.end(),
                [](const JsonValue& a, const JsonValue& b) {
                  return a.key() < b.key();
                });
      *out += '{';
      for (const JsonValue& member : members) {
        json::quote(*out, member.key());
        *out += ':';
        append_canonical(out, member);
        *out += ',';
      }
      *out += '}';
      break;
    }
    case Type::array:
      *out += '[';
      for (JsonValue v = value.first(); v; v = v.next()) {
        append_canonical(out, v);
        *out += ',';
      }
      *out += ']';
      break;
    case Type::string:
      if (value.has_escapes()) {
        json::quote(*out, value.as_string());
      } else {
        json::quote(*out, value.plain_string());
      }
      break;
    case Type::number:
      append_canonical_number(out, value.raw());
      break;
    default:
      *out += value.raw();
  }
}

}  // namespace

void canonical_digest(const JsonValue& value, std::uint64_t digest[2]) {
  std::string text;
  append_canonical(&text, value);
  XXH128_hash_t hash = XXH3_128bits(text.data(), text.size());
  digest[0] = hash.low64;
  digest[1] = hash.high64;
}

// --- Writing ---------------------------------------------------------------

namespace json {

void quote(std::string& out, std::string_view value) {
  out += '"';
  std::size_t plain = 0;
  for (std::size_t i = 0; i < value.size(); ++i) {
    auto c = static_cast<unsigned char>(value[i]);
    if (c >= 0x20 && c != '"' && c != '\\' && c < 0x7f) continue;
    if (c >= 0x80) {
      // What others gave us as text may be no UTF-8; our JSON always is.
      std::size_t n = utf8_length(value.substr(i));
      if (n != 0) {
        i += n - 1;
        continue;
      }
      out.append(value, plain, i - plain);
      out += "\xef\xbf\xbd";
      plain = i + 1;
      continue;
    }
    out.append(value, plain, i - plain);
    plain = i + 1;
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      default:
        out += "\\u00";
        out += kHexDigits[c >> 4];
        out += kHexDigits[c & 15];
    }
  }
  out.append(value, plain, value.size() - plain);
  out += '"';
}

std::string quoted(std::string_view text) {
  std::string out;
  out.reserve(text.size() + 2);
  quote(out, text);
  return out;
}

std::optional<std::string> string(const JsonValue& value) {
  if (!value || !value.is_string()) return std::nullopt;
  return value.as_string();
}

std::optional<std::int64_t> integer(const JsonValue& value) {
  if (!value || !value.is_number()) return std::nullopt;
  return value.as_integer();
}

std::optional<bool> boolean(const JsonValue& value) {
  if (!value || !value.is_bool()) return std::nullopt;
  return value.as_bool();
}

}  // namespace json

void JsonWriter::grow(std::size_t bytes) {
  const std::size_t used = size();
  out_.resize(std::max({used + bytes, 2 * used, used + kRoom}));
  at_ = out_.data() + used;
  end_ = out_.data() + out_.size();
}

void JsonWriter::quoted(std::string_view value) {
  room(value.size() + 2);
  char* const begin = at_;
  *at_++ = '"';
  for (char c : value) {
    auto u = static_cast<unsigned char>(c);
    if (u < 0x20 || u >= 0x7f || c == '"' || c == '\\') {
      at_ = begin;
      std::string text;
      json::quote(text, value);
      room(text.size());
      return copy(text);
    }
    *at_++ = c;
  }
  *at_++ = '"';
}

JsonWriter& JsonWriter::key_escaped(std::string_view key) {
  begin_value();
  quoted(key);
  room(1);
  *at_++ = ':';
  comma_ = false;
  return *this;
}

JsonWriter& JsonWriter::number(std::int64_t value) {
  begin_value();
  room(24);
  at_ = std::to_chars(at_, end_, value).ptr;
  return end_value();
}

JsonWriter& JsonWriter::number(std::uint64_t value) {
  begin_value();
  room(24);
  at_ = std::to_chars(at_, end_, value).ptr;
  return end_value();
}

JsonWriter& JsonWriter::real(double value) {
  if (!std::isfinite(value)) return null();
  begin_value();
  room(40);
  at_ = std::to_chars(at_, end_, value).ptr;
  return end_value();
}

JsonWriter& JsonWriter::time(Millis wall_ms) {
  if (wall_ms == 0) return null();
  if (wall_ms != last_ms_) {
    write_rfc3339(last_time_, wall_ms);
    last_ms_ = wall_ms;
  }
  begin_value();
  room(sizeof last_time_ + 2);
  *at_++ = '"';
  copy(std::string_view(last_time_, sizeof last_time_));
  *at_++ = '"';
  return end_value();
}

}  // namespace machina
