// queue/base/json.h
//
// Reads and writes JSON at high rate: the server's requests, the workers' and
// the pool's messages. One strict pass over a text leaves a flat tree of places
// in the text, so a payload is kept exactly as it was sent. The scanner is our
// own because no library here gives these four together: the raw text of any
// value, refusal of duplicate keys, a bounded depth, no allocation per value
// (docs/decisions/0020-a-scanner-for-requests.md).
//
//   JS1  Accepts exactly RFC 8259 texts in valid UTF-8 without duplicate keys
//        and nested at most `depth_max` deep. (JsonTest.TakesWhatTheStandard-
//        Allows, RefusesWhatTheStandardForbids, AgreesWithAnotherParser)
//   JS2  A value's raw() is the bytes that were sent.
//   JS3  What is written is JSON in UTF-8 for any bytes: each byte that is no
//        UTF-8 becomes U+FFFD. (JsonTest.StringsAreEscaped)
//   JS4  nests_deeper_than() looks at one value; it costs nothing where the
//        whole text is flat enough. (JsonTest.AValueKnowsHowDeepItIs)

#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/ids.h"
#include "queue/base/rfc3339.h"

namespace machina {

constexpr int kJsonDepthMax = 64;  // of a request
// Of a message between the server, the pool and a worker. Such a message wraps
// what requests brought in: a lease has its payload four levels down.
constexpr int kJsonMessageDepthMax = kJsonDepthMax + 8;

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
  // Whether arrays and objects nest more than `depth` deep, this one included.
  bool nests_deeper_than(int depth) const;

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
  // `text` must outlive the values. A document may be reused: it keeps its
  // memory.
  std::optional<JsonError> parse(std::string_view text,
                                 int depth_max = kJsonDepthMax);
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
  int depth_ = 0;  // of the whole text
};

// XXH3-128 of the value's canonical form: members by key, no white space,
// strings and numbers in one spelling.
void canonical_digest(const JsonValue& value, std::uint64_t digest[2]);

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

namespace json {

// A value of that type; nothing of any other type.
std::optional<std::string> string(const JsonValue& value);  // unescaped
std::optional<std::int64_t> integer(const JsonValue& value);
std::optional<bool> boolean(const JsonValue& value);

// Calls `each(key, value)` for every member until `each` says false. False: not
// an object, or `each` said false. The key and the value are valid during the
// call; value.raw() is valid as long as the text.
template <class Each>
bool members(const JsonValue& object, Each&& each) {
  if (!object || !object.is_object()) return false;
  for (JsonValue v = object.first(); v; v = v.next()) {
    if (!each(v.key(), v)) return false;
  }
  return true;
}
// The same of a message that is not parsed yet. Nothing is called when the text
// is not JSON.
template <class Each>
bool members(std::string_view text, Each&& each) {
  JsonDoc doc;
  return !doc.parse(text, kJsonMessageDepthMax) && members(doc.root(), each);
}

template <class Each>
bool elements(const JsonValue& array, Each&& each) {
  if (!array || !array.is_array()) return false;
  for (JsonValue v = array.first(); v; v = v.next()) {
    if (!each(v)) return false;
  }
  return true;
}

// Appends `text` as a JSON string.
void quote(std::string& out, std::string_view text);
std::string quoted(std::string_view text);

}  // namespace json

}  // namespace machina
