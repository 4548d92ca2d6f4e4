// server/http/json.h
//
// JSON in and out. Reading: one strict pass over the text leaves a flat tree of
// places in it, so that a payload is kept exactly as it was sent. It is a
// scanner of its own because four things are needed at once that no library
// here gives together: raw text of any value, refusal of duplicate keys, a
// bounded depth, and no allocation per value. tests/server/http/json_test.cc
// holds it against nlohmann::json on a corpus and on random mutations.
//
//   J1  Accepts exactly RFC 8259 texts in valid UTF-8 without duplicate keys
//       and nested at most kJsonDepthMax deep.
//   J2  A value's raw() is the bytes that were sent.
//
// Writing: JsonWriter appends to a string; strings are escaped, commas placed.

#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/ids.h"
#include "queue/base/result.h"

namespace machina {

constexpr int kJsonDepthMax = 64;

class JsonDoc;

// A place in a parsed document; valid while the document and its text are.
class JsonValue {
 public:
  enum class Type : std::uint8_t {
    null,
    boolean,
    number,
    string,
    array,
    object
  };
  JsonValue() = default;

  explicit operator bool() const { return doc_ != nullptr; }
  Type type() const;
  bool is_object() const { return type() == Type::object; }
  bool is_array() const { return type() == Type::array; }
  bool is_string() const { return type() == Type::string; }
  bool is_null() const { return type() == Type::null; }
  bool is_bool() const { return type() == Type::boolean; }
  bool is_number() const { return type() == Type::number; }

  std::string_view raw() const;
  bool as_bool() const;  // of a boolean
  // Of a number without fraction and exponent that fits.
  std::optional<std::int64_t> as_integer() const;
  std::string as_string() const;          // of a string, unescaped
  std::string_view plain_string() const;  // between the quotes, as sent
  bool has_escapes() const;

  // Iterating: of an array or object, in order; false-like at the end.
  JsonValue first() const;
  JsonValue next() const;
  std::string_view key() const;  // of a member, unescaped
  std::size_t size() const;      // elements or members: O(n)
  JsonValue find(std::string_view key) const;

 private:
  friend class JsonDoc;
  JsonValue(const JsonDoc* doc, std::uint32_t at, std::uint32_t end)
      : doc_(doc), at_(at), end_(end) {}
  const JsonDoc* doc_ = nullptr;
  std::uint32_t at_ = 0;
  std::uint32_t end_ = 0;  // where the siblings end
};

struct JsonError {
  std::size_t offset = 0;
  std::string what;       // for a person
  std::string duplicate;  // the key that is there twice, or empty
};

class JsonDoc {
 public:
  // `text` must outlive the values. A document may be reused.
  std::optional<JsonError> parse(std::string_view text);
  JsonValue root() const;

 private:
  friend class JsonValue;
  friend class JsonScanner;
  struct Node {
    std::uint32_t begin, end;          // in the text
    std::uint32_t key_begin, key_end;  // in the text, or in keys_ if escaped
    std::uint32_t next;                // the node after this one's subtree
    JsonValue::Type type;
    bool key_escaped, escapes;
  };
  std::string_view key_of(const Node& node) const {
    const std::string_view in = node.key_escaped ? keys_ : text_;
    return in.substr(node.key_begin, node.key_end - node.key_begin);
  }
  std::string_view text_;
  std::string keys_;  // unescaped keys that needed it
  std::vector<Node> nodes_;
};

// XXH3-128 of the value's canonical form: members by key, no white space,
// strings and numbers in one spelling.
void canonical_digest(const JsonValue& value, std::uint64_t digest[2]);

constexpr std::size_t kRfc3339Text = 24;

// Appends one value, with all that is in it, to a string. The string is longer
// meanwhile and ends with the value when its outermost object or array does.
class JsonWriter {
 public:
  explicit JsonWriter(std::string& out) : out_(out) {}
  ~JsonWriter() { finish(); }
  JsonWriter(const JsonWriter&) = delete;

  JsonWriter& begin_object() { return open('{'); }
  JsonWriter& end_object() { return close('}'); }
  JsonWriter& begin_array() { return open('['); }
  JsonWriter& end_array() { return close(']'); }
  // `key` needs no escaping.
  JsonWriter& key(std::string_view key) {
    room(key.size() + 4);
    if (comma_) *at_++ = ',';
    *at_++ = '"';
    copy(key);
    *at_++ = '"';
    *at_++ = ':';
    comma_ = false;
    return *this;
  }
  JsonWriter& key_escaped(std::string_view key);
  JsonWriter& string(std::string_view value) {
    begin_value();
    quoted(value);
    return end_value();
  }
  JsonWriter& number(std::int64_t value);
  JsonWriter& number(std::uint64_t value);
  JsonWriter& number(int value) {
    return number(static_cast<std::int64_t>(value));
  }
  JsonWriter& real(double value);
  JsonWriter& boolean(bool value) { return raw(value ? "true" : "false"); }
  JsonWriter& null() { return raw("null"); }
  JsonWriter& raw(std::string_view json) {
    begin_value();
    room(json.size());
    copy(json);
    return end_value();
  }
  JsonWriter& id(const JobId& id) {
    begin_value();
    room(kJobIdText + 2);
    *at_++ = '"';
    write_job_id(id, at_);
    at_ += kJobIdText;
    *at_++ = '"';
    return end_value();
  }
  // RFC 3339 in UTC with milliseconds; 0 is null.
  JsonWriter& time(Millis wall_ms);

  // Of the string so far.
  std::size_t size() const {
    return at_ == nullptr ? out_.size()
                          : static_cast<std::size_t>(at_ - out_.data());
  }

 private:
  static constexpr std::size_t kRoom = 1024;  // at least, when there is none
  void room(std::size_t bytes) {
    if (static_cast<std::size_t>(end_ - at_) < bytes) grow(bytes);
  }
  void grow(std::size_t bytes);
  void finish() {
    if (at_ == nullptr) return;
    out_.resize(size());
    at_ = end_ = nullptr;
  }
  void copy(std::string_view text) {
    std::memcpy(at_, text.data(), text.size());
    at_ += text.size();
  }
  void quoted(std::string_view value);
  void begin_value() {
    room(1);
    if (comma_) *at_++ = ',';
  }
  JsonWriter& end_value() {
    comma_ = true;
    if (depth_ == 0) finish();
    return *this;
  }
  JsonWriter& open(char c) {
    begin_value();
    room(1);
    *at_++ = c;
    comma_ = false;
    ++depth_;
    return *this;
  }
  JsonWriter& close(char c) {
    room(1);
    *at_++ = c;
    --depth_;
    return end_value();
  }

  std::string& out_;
  char* at_ = nullptr;  // in out_; null: out_ is as long as its text
  char* end_ = nullptr;
  int depth_ = 0;
  bool comma_ = false;
  Millis last_ms_ = 0;  // job times repeat: the last one's text
  char last_time_[kRfc3339Text];
};

void append_json_string(std::string* out, std::string_view value);
// The value of "2026-11-20T14:00:00.123Z" (fraction optional, 1 to 9 digits;
// Z or an offset). Nothing for any other text.
std::optional<Millis> parse_rfc3339(std::string_view text);
void append_rfc3339(std::string* out, Millis wall_ms);
void write_rfc3339(char* text, Millis wall_ms);  // kRfc3339Text bytes

}  // namespace machina
