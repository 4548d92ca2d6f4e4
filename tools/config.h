// tools/config.h
//
// Configuration: command line, then environment, then file, then profile, then
// built-in defaults. One table (config.cc) names every variable with its type,
// range and defaults; nothing reads getenv() elsewhere.
//
//   G1  An unknown variable that starts with MACHINA_ is an error that names
//       the nearest known one.
//   G2  A value out of range is an error that names variable, value and range.
//   G3  A set variable always wins over a profile.
//   G4  Secrets are read from <NAME>_FILE too and are never printed.
//
// tests/tools/config_test.cc has a test for each.

#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/result.h"

namespace machina {

// A row of the table.
struct Variable {
  enum class Type : std::uint8_t {
    text,    // any printable text
    path,    // text without a newline; absolute where `absolute`
    number,  // a decimal integer in [min, max]
    flag,    // 0 or 1
    choice,  // one of `choices`, separated by '|'
    level,   // L0..L4
    list,    // values separated by commas
    paths,   // absolute paths separated by commas
    secret,  // printable ASCII; also as <NAME>_FILE
  };
  const char* name;
  Type type;
  const char* fallback;       // the built-in default
  const char* dev = nullptr;  // the profiles' values, where they set it
  const char* prod = nullptr;
  std::int64_t min = 0, max = 0;
  const char* choices = nullptr;
};
std::span<const Variable> config_table();  // lives for ever
// Whether any part of this version reads it; false: it is "no effect yet".
bool has_effect(std::string_view name);

class Config {
 public:
  struct Value {
    std::string text;
    std::string origin;  // "command line", "environment", "file F", "profile
                         // prod", "default"
    bool is_default() const;  // by profile or built in: nobody set it
    // How near to the user it was set: command line 3, environment 2, file 1,
    // nowhere 0.
    int nearness() const;
  };
  // `environment`: the process's; `overrides`: from the command line, by
  // variable name; `file`: path of a YAML file or empty. Fails with
  // Code::invalid and one line that says what to change.
  static Result<Config> load(
      const std::vector<std::string>& environment,
      const std::map<std::string, std::string>& overrides,
      const std::string& file);

  const std::string& text(std::string_view name) const;  // CHECKs a known name
  std::int64_t number(std::string_view name) const;  // of a level, its digit
  bool flag(std::string_view name) const;
  std::vector<std::string> list(std::string_view name) const;  // by comma
  bool prod() const;
  // A line for each file of a secret that others than its owner may read.
  const std::vector<std::string>& open_secrets() const;
  std::string print() const;  // a line per variable with its origin
  const std::map<std::string, Value, std::less<>>& values() const;

  // "NAME=value" for those of `names` that somebody set: what a child process
  // is given. CHECKs that none is a secret.
  std::vector<std::string> environment(
      std::span<const char* const> names) const;

 private:
  std::map<std::string, Value, std::less<>> values_;
  std::vector<std::string> open_secrets_;
};

// The known variable whose name is least different from `name`.
std::string nearest_variable(std::string_view name);

// Takes the secrets out of this process's environment, text included, so that
// neither a child nor /proc/self/environ has them. Before any thread exists.
void scrub_secrets_from_environment();

}  // namespace machina
