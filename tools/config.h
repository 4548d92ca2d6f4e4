// tools/config.h
//
// Configuration: where the values of settings come from. Command line, then
// environment, then file, then profile, then built-in defaults. The table of
// settings (tools/settings.h) has names, types, ranges and defaults; nothing
// else reads the environment.
//
//   G1  An unknown variable that starts with MACHINA_ is an error that names
//       the nearest known one.
//   G2  A value out of range is an error that names variable, value and range.
//   G3  A set variable always wins over a profile.
//   G4  Secrets are read from <NAME>_FILE too and are never printed.
//   G5  A setting with two names takes either. The nearest source wins,
//       whichever name it used; one source with both names and two values is
//       an error that names both.
//
// tests/tools/config_test.cc has a test for each.

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/result.h"
#include "tools/settings.h"

namespace machina {

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
  // Code::invalid and one line that says what to change. `table` must outlive
  // the result.
  static Result<Config> load(
      const std::vector<std::string>& environment,
      const std::map<std::string, std::string>& overrides,
      const std::string& file, SettingTable table = settings_table());

  const SettingValues& typed() const { return typed_; }
  bool prod() const { return typed_.profile == "prod"; }
  // As it was written; of settings without a field too. CHECKs a known name.
  const std::string& text(std::string_view name) const;
  SettingTable table() const { return table_; }
  // A line for each file of a secret that others than its owner may read.
  const std::vector<std::string>& open_secrets() const;
  std::string print() const;  // a line per variable with its origin
  const std::map<std::string, Value, std::less<>>& values() const;

  // "NAME=value" for each setting that one of `readers` reads and that somebody
  // set: what a child process is given. Never a secret.
  std::vector<std::string> environment(std::uint8_t readers) const;

 private:
  SettingTable table_;
  SettingValues typed_{};
  std::map<std::string, Value, std::less<>> values_;
  std::vector<std::string> open_secrets_;
};

// The known variable whose name is least different from `name`.
std::string nearest_variable(std::string_view name,
                             SettingTable table = settings_table());

// Takes the secrets out of this process's environment, text included, so that
// neither a child nor /proc/self/environ has them. Before any thread exists.
void scrub_secrets_from_environment();

}  // namespace machina
