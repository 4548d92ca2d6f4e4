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

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "queue/result.h"

namespace machina {

class Config {
 public:
  struct Value {
    std::string text;
    std::string origin;  // "command line", "environment", "file F", "profile
                         // prod", "default"
  };
  // `environment`: the process's; `overrides`: from the command line, by
  // variable name; `file`: path of a YAML file or empty.
  static Result<Config> load(const std::vector<std::string>& environment,
                             const std::map<std::string, std::string>& overrides,
                             const std::string& file);

  const std::string& text(std::string_view name) const;  // CHECKs a known name
  std::int64_t number(std::string_view name) const;
  bool flag(std::string_view name) const;
  std::vector<std::string> list(std::string_view name) const;  // by comma
  bool prod() const;
  std::string print() const;  // a line per variable with its origin
  const std::map<std::string, Value, std::less<>>& values() const;

 private:
  std::map<std::string, Value, std::less<>> values_;
};

}  // namespace machina
