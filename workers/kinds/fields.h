// workers/kinds/fields.h
//
// Strict reading of a payload: every member is known, has its type and lies in
// its bounds, or the first that does not is named with value and bound. For
// the .cc files of kinds only.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "queue/base/kind.h"

namespace machina::kinds {

// Reads members of one object; keeps the first error. `prefix` goes before
// member names in messages ("payload" level: empty).
class Fields {
 public:
  // `json` is kept by the object.
  explicit Fields(const std::string& json);
  // A member that is an object, read by itself; its messages begin with
  // `prefix`. What was found wrong in it is told by take_error().
  Fields(const nlohmann::json& object, std::string prefix);

  // Refuses members that are not in the list.
  void only(std::initializer_list<std::string_view> names);
  bool has(const char* name) const;
  bool is_null(const char* name) const;
  void fail(const std::string& field, const std::string& what);

  std::string text(const char* name, std::size_t bytes_max,
                   const std::string& absent = "");
  bool flag(const char* name, bool absent);
  std::int64_t number(const char* name, std::int64_t least, std::int64_t most,
                      std::int64_t absent);
  std::vector<std::string> texts(const char* name, std::size_t count_max,
                                 std::size_t bytes_max);
  // A list of commands, each a non-empty list of strings.
  std::vector<std::vector<std::string>> commands(const char* name,
                                                 std::size_t count_max);
  // name -> text, in the order of names.
  std::vector<std::pair<std::string, std::string>> map(const char* name,
                                                       std::size_t count_max,
                                                       std::size_t bytes_max);
  // A member that is an object; an empty one where it is absent or wrong.
  Fields object(const char* name);
  // A member that is a list of objects.
  std::vector<Fields> objects(const char* name, std::size_t count_max);
  // Refuses a value that is longer than this as JSON.
  void at_most(const char* name, std::size_t bytes_max);
  void finite(const char* name);  // a number, where it is there
  // The first thing found wrong in a part is this object's too.
  void take_error(const Fields& part);

  Checked<void> done() const;

 private:
  const nlohmann::json* find(const char* name) const;
  std::vector<std::string> list(const std::string& field,
                                const nlohmann::json& value,
                                std::size_t count_max, std::size_t bytes_max);

  nlohmann::json object_;
  std::string prefix_;  // of a part: "test."
  std::optional<BadField> error_;
};

// Bounds that kinds share.
constexpr std::size_t kArgumentsMax = 512;
constexpr std::size_t kArgumentBytesMax = 128 << 10;
constexpr std::size_t kVariablesMax = 128;
constexpr std::size_t kVariableBytesMax = 32 << 10;
constexpr std::size_t kFilesMax = 1000;
constexpr std::size_t kPathBytesMax = 1024;

// A name or value as a message can carry it, whatever it holds: control
// characters as \u00xx, cut at 200 bytes.
std::string printable(const std::string& text);

// A relative path that stays below where it starts, component by component.
bool safe_relative_path(std::string_view path);

// Checks `env` (names [A-Za-z_][A-Za-z0-9_]*) and returns "NAME=value".
std::vector<std::string> environment(Fields& fields, const char* name);
// Checks `files`: relative paths without control characters, none of them a
// directory of another.
std::vector<std::pair<std::string, std::string>> files(Fields& fields,
                                                       const char* name);
// "" or a relative path.
std::string directory(Fields& fields, const char* name);

}  // namespace machina::kinds
