// tools/cli/verb.h
//
// A verb of the command line and its options. The parser is CLI11, which costs
// seconds in each file that includes it: verb.cc is the only one that does.

#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace machina::cli {

// A value that an option cannot take; `what` says what it must be.
struct BadValue : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A handle. The option lives as long as the parser.
class Option {
 public:
  explicit Option(CLI::Option* option) : option_(option) {}
  Option required();
  Option excludes(std::initializer_list<const char*> others);
  Option range(std::int64_t min, std::int64_t max);
  Option one_of(std::vector<std::string> values);
  Option shown_as(const std::string& value);  // in the help, such as "FILE"

 private:
  CLI::Option* option_;
};

// A handle. The verb lives as long as the parser; so must what its options
// fill.
class Verb {
 public:
  Verb(CLI::App* app, int* exit) : app_(app), exit_(exit) {}

  Verb add_verb(const std::string& name, const std::string& help);
  // There must be a verb below this one on the command line.
  void require_verb();
  // `names`: "--long,-s", or a plain word for what has its place in the line.
  // T: std::string, a vector of them, int, int64, uint64, or an optional of
  // string, int or int64.
  template <class T>
  Option add_option(const std::string& names, T& to, const std::string& help);
  // `take` may throw BadValue.
  Option add_option(const std::string& names,
                    std::function<void(const std::string&)> take,
                    const std::string& help);
  Option add_flag(const std::string& names, bool& to, const std::string& help);
  // What the verb does; the result is the program's exit code.
  void run(std::function<int()> body);

 private:
  CLI::App* app_;
  int* exit_;
};

// Parses and runs. `add` adds the verbs. Returns the exit code.
int run_command_line(int argc, char** argv, const char* about,
                     const std::function<void(Verb&)>& add);

}  // namespace machina::cli
