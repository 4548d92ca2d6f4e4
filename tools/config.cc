#include "tools/config.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <optional>
#include <set>
#include <thread>

#include "queue/base/check.h"
#include "queue/base/fd.h"
#include "queue/base/numbers.h"
#include "queue/base/utf8.h"
#include "tools/duration.h"
#include "tools/trust.h"

extern char** environ;  // NOLINT: the only way to the whole of it

namespace machina {
namespace {

using Type = Setting::Type;

constexpr std::size_t kTextBytesMax = 4096;
constexpr std::size_t kFileBytesMax = 1 << 20;

Error invalid(std::string what) {
  return Error{Code::invalid, std::move(what)};
}

constexpr std::string_view kFileSuffix = "_FILE";

// MACHINA_API_TOKEN of MACHINA_API_TOKEN_FILE; null where it is no such name.
const Setting* secret_of_file_name(std::string_view name, SettingTable table) {
  if (!name.ends_with(kFileSuffix)) return nullptr;
  name.remove_suffix(kFileSuffix.size());
  const Setting* row = find_setting(name, table);
  return row != nullptr && row->type == Type::secret ? row : nullptr;
}

bool is_name(std::string_view name, SettingTable table) {
  return find_setting(name, table) != nullptr ||
         secret_of_file_name(name, table) != nullptr;
}

Error unknown_variable(std::string_view name, std::string_view origin,
                       SettingTable table) {
  return invalid(std::string(name) + " (" + std::string(origin) +
                 ") is not a variable of machina; the nearest is " +
                 nearest_variable(name, table));
}

bool printable(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](unsigned char c) { return c >= 0x20 && c != 0x7f; });
}

// The unit of a number that is a span of time, by the name that it was given
// under: "ms", "s", or empty for what is none.
std::string time_unit(const Setting& row, std::string_view name) {
  if (row.type != Type::number) return "";
  if (name.ends_with("_MS")) return "ms";
  const bool seconds = name.ends_with("_SEC") || name.ends_with("_S") ||
                       name.ends_with("_TIMEOUT");
  return seconds ? "s" : "";
}

// "5s" of a variable in milliseconds is 5000: everything behind this reads
// plain numbers. What cannot be said in the variable's unit stays as it is,
// and is refused.
std::string plain_number(const std::string& unit, const std::string& text) {
  if (unit.empty() || text.find_first_of("dhms") == std::string::npos) {
    return text;
  }
  const std::int64_t unit_ms = unit == "s" ? 1000 : 1;
  auto ms = parse_duration_ms(text, unit_ms);
  if (!ms || *ms % unit_ms != 0) return text;
  return std::to_string(*ms / unit_ms);
}

std::string number_complaint(const Setting& row, const std::string& unit,
                             std::string_view text) {
  auto number = parse_number(text);
  if (number && *number >= row.min && *number <= row.max) return "";
  if (!unit.empty()) {
    const std::int64_t unit_ms = unit == "s" ? 1000 : 1;
    return "must be " +
           duration_range(row.min * unit_ms, row.max * unit_ms, unit);
  }
  return "must be a whole number from " + std::to_string(row.min) + " to " +
         std::to_string(row.max);
}

// Whether `text` is one of `choices`, which are separated by '|'.
bool is_choice(std::string_view choices, std::string_view text) {
  const std::string all = "|" + std::string(choices) + "|";
  return text.find('|') == std::string_view::npos &&
         all.find("|" + std::string(text) + "|") != std::string::npos;
}

// What is wrong with `text` as a value of `row` whatever its length, as "must
// be ...", or empty.
std::string type_complaint(const Setting& row, const std::string& unit,
                           std::string_view text) {
  switch (row.type) {
    case Type::number:
      return number_complaint(row, unit, text);
    case Type::flag:
      return text == "0" || text == "1" ? "" : "must be 0 or 1";
    case Type::choice:
      return is_choice(row.choices, text)
                 ? ""
                 : "must be one of " + std::string(row.choices);
    case Type::level:
      return text.size() == 2 && text[0] == 'L' && text[1] >= '0' &&
                     text[1] <= '4'
                 ? ""
                 : "must be one of L0, L1, L2, L3, L4";
    case Type::paths:
      for (const auto& part : setting_list(text)) {
        if (part[0] != '/') return "must be absolute paths separated by commas";
      }
      return "";
    case Type::secret:
      for (unsigned char c : text) {
        if (c <= 0x20 || c >= 0x7f) {
          return "must be printable ASCII without spaces";
        }
      }
      return text.empty() ? "must not be empty" : "";
    case Type::path:
      // The rest of a shell variable that is not set is no place.
      return text.empty() && *row.fallback != '\0' ? "must not be empty" : "";
    case Type::text:
    case Type::list:
      return "";
  }
  return "";
}

std::string complaint(const Setting& row, const std::string& unit,
                      std::string_view text) {
  std::string what = type_complaint(row, unit, text);
  if (!what.empty()) return what;
  if (text.size() > kTextBytesMax) {
    return "must be at most " + std::to_string(kTextBytesMax) + " bytes";
  }
  return printable(text) ? "" : "must not hold control characters";
}

// `name`: what the source called the setting.
Result<void> check_value(const Setting& row, const std::string& name,
                         const std::string& text, const std::string& origin) {
  std::string what = complaint(row, time_unit(row, name), text);
  if (what.empty()) return {};
  // A secret is not repeated, not even a bad one (G4).
  std::string shown = row.type == Type::secret
                          ? std::string("its value")
                          : "\"" + std::string(utf8_head(text, 200)) + "\"";
  return invalid(name + " (" + origin + "): " + shown + " " + what);
}

// A file of at most `max` bytes; no directory, device or pipe.
Result<std::string> read_file(const std::string& path, std::size_t max,
                              mode_t* mode = nullptr) {
  const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return Error{Code::io, path + ": " + std::strerror(errno)};
  struct stat status {};
  if (mode != nullptr && ::fstat(fd.get(), &status) == 0) {
    *mode = status.st_mode & 07777;
  }
  return machina::read_file(fd.get(), max, path);
}

using Values = std::map<std::string, Config::Value, std::less<>>;
using OpenSecrets = std::map<std::string, std::string>;

// One source of settings: names checked, <NAME>_FILE resolved, values checked.
class Source {
 public:
  Source(SettingTable table, std::string origin)
      : table_(table), origin_(std::move(origin)) {}
  // One that is a file: a secret in it is as open as the file is.
  Source(SettingTable table, std::string origin, std::string path, mode_t mode)
      : table_(table),
        origin_(std::move(origin)),
        path_(std::move(path)),
        mode_(mode) {}

  Result<void> add(const std::string& name, const std::string& text) {
    if (const Setting* secret = secret_of_file_name(name, table_)) {
      return add_secret_file(*secret, name, text);
    }
    const Setting* row = find_setting(name, table_);
    if (row == nullptr) return unknown_variable(name, origin_, table_);
    if (!seen_.insert(name).second) {
      return invalid(name + " (" + origin_ + ") is set twice");
    }
    const std::string plain = plain_number(time_unit(*row, name), text);
    if (auto ok = check_value(*row, name, plain, origin_); !ok) return ok;
    if (auto ok = check_other_name(*row, name, plain); !ok) return ok;
    // A second name is shown where it was used.
    const bool own = name == row->name;
    values_[row->name] = {plain, own ? origin_ : origin_ + ", " + name};
    if (row->type == Type::secret) note_if_open(*row, name, path_, mode_);
    return {};
  }

  // G4: one source may not give a secret in both ways; which would be meant?
  Result<void> finish() const {
    for (const auto& [name, from] : secret_files_) {
      if (seen_.count(name) != 0) {
        return invalid("both " + name + " and " + name + "_FILE are set (" +
                       origin_ + "); keep one");
      }
    }
    return {};
  }

  void merge_into(Values* values, OpenSecrets* open) const {
    for (const auto& [name, value] : secret_files_) (*values)[name] = value;
    for (const auto& [name, value] : values_) (*values)[name] = value;
    // Only of the file that is in force is there anything to say.
    for (const auto& [name, value] : secret_files_) open->erase(name);
    for (const auto& [name, value] : values_) open->erase(name);
    for (const auto& [name, line] : open_secrets_) (*open)[name] = line;
  }

 private:
  // G5: both names of a setting, with two values: which would be meant?
  Result<void> check_other_name(const Setting& row, const std::string& name,
                                const std::string& plain) const {
    auto before = values_.find(std::string_view(row.name));
    if (before == values_.end() || before->second.text == plain) return {};
    const std::string other = name == row.name ? row.also : row.name;
    return invalid(other + " (" + origin_ + "): \"" + before->second.text +
                   "\" and " + name + " (" + origin_ + "): \"" + plain +
                   "\" are two names of one setting; keep one");
  }

  Result<void> add_secret_file(const Setting& secret, const std::string& name,
                               const std::string& path) {
    mode_t mode = 0;
    // Who could put another file in its place would choose the secret.
    // The mode of the file itself is judged by note_if_open().
    if (auto ok = check_trusted(name + " (" + origin_ + ")", path, true, false);
        !ok) {
      return ok;
    }
    auto bytes = read_file(path, kTextBytesMax, &mode);
    if (!bytes)
      return invalid(name + " (" + origin_ + "): " + bytes.error().what);
    while (bytes->ends_with('\n') || bytes->ends_with('\r')) bytes->pop_back();
    const std::string origin = origin_ + ", " + name;
    if (auto ok = check_value(secret, secret.name, *bytes, origin); !ok) {
      return ok;
    }
    secret_files_[secret.name] = {*bytes, origin};
    note_if_open(secret, name, path, mode);
    return {};
  }

  void note_if_open(const Setting& secret, const std::string& name,
                    const std::string& path, mode_t mode) {
    // systemd's own directory is closed; a file's group bits there are the
    // mask of an access list.
    if ((mode & 077) == 0 || path.starts_with("/run/credentials/")) return;
    char digits[16];
    std::snprintf(digits, sizeof digits, "%04o", mode);
    open_secrets_[secret.name] = name + " (" + origin_ + "): \"" + path +
                                 "\" is open to others (mode " + digits +
                                 "); chmod 600 it";
  }

  SettingTable table_;
  std::string origin_, path_;
  mode_t mode_ = 0;
  std::set<std::string> seen_;
  Values values_, secret_files_;
  OpenSecrets open_secrets_;  // by the secret's name
};

std::string yaml_scalar(const YAML::Node& node) {
  if (node.IsScalar()) return node.Scalar();
  std::string joined;  // a sequence is a list: by comma
  for (const auto& part : node) {
    if (!joined.empty()) joined += ',';
    joined += part.Scalar();
  }
  return joined;
}

Result<void> add_file(SettingTable table, const std::string& path,
                      Values* values, OpenSecrets* open) {
  mode_t mode = 0;
  if (auto ok = check_trusted("--config", path, true); !ok) return ok;
  auto bytes = read_file(path, kFileBytesMax, &mode);
  if (!bytes) return invalid("--config: " + bytes.error().what);
  Source source(table, "file " + path, path, mode);
  try {
    YAML::Node top = YAML::Load(*bytes);
    if (top.IsNull()) return {};
    if (!top.IsMap()) {
      return invalid("file " + path + ": must be a map from variable to value");
    }
    for (const auto& entry : top) {
      if (!entry.first.IsScalar()) {
        return invalid("file " + path + ": a name must be a plain word");
      }
      std::string name = entry.first.Scalar();
      if (!is_name(name, table)) {
        return unknown_variable(name, "file " + path, table);
      }
      bool plain = entry.second.IsScalar() || entry.second.IsSequence();
      for (const auto& part : entry.second) {
        plain = plain && entry.second.IsSequence() && part.IsScalar();
      }
      if (!plain) {
        return invalid(name + " (file " + path +
                       "): must be a value or a list of values");
      }
      auto ok = source.add(name, yaml_scalar(entry.second));
      if (!ok) return ok;
    }
  } catch (const YAML::Exception& error) {
    return invalid("file " + path + ", line " +
                   std::to_string(error.mark.line + 1) + ": " + error.msg);
  }
  if (auto ok = source.finish(); !ok) return ok;
  source.merge_into(values, open);
  return {};
}

Result<void> add_environment(SettingTable table,
                             const std::vector<std::string>& environment,
                             Values* values, OpenSecrets* open) {
  Source source(table, "environment");
  for (const auto& entry : environment) {
    std::size_t equals = entry.find('=');
    std::string name = entry.substr(0, equals);
    if (!name.starts_with("MACHINA_") || equals == std::string::npos) continue;
    std::string text = entry.substr(equals + 1);
    // `NAME=` in a unit file or a shell means "not set".
    if (text.empty() && is_name(name, table)) continue;
    if (auto ok = source.add(name, text); !ok) return ok;
  }
  if (auto ok = source.finish(); !ok) return ok;
  source.merge_into(values, open);
  return {};
}

void add_profile_and_defaults(SettingTable table, Values* values) {
  auto chosen = values->find("MACHINA_PROFILE");
  std::string profile = chosen == values->end() ? "dev" : chosen->second.text;
  for (const auto& row : table) {
    if (values->count(row.name) != 0) continue;  // G3
    const char* by_profile = profile == "prod" ? row.prod : row.dev;
    Config::Value value{row.fallback, "default"};
    if (by_profile != nullptr) value = {by_profile, "profile " + profile};
    if (std::string_view(row.name) == "MACHINA_WORKERS") {
      unsigned processors = std::thread::hardware_concurrency();
      value.text = std::to_string(std::clamp(processors, 1u, 64u));
    }
    (*values)[row.name] = std::move(value);
  }
}

// What no single row can say.
Result<void> check_together(const SettingValues& set) {
  if (set.retry_min_ms > set.retry_max_ms) {
    return invalid("MACHINA_RETRY_MIN_MS: " + std::to_string(set.retry_min_ms) +
                   " must not be above MACHINA_RETRY_MAX_MS, which is " +
                   std::to_string(set.retry_max_ms));
  }
  return {};
}

// The number of single-letter insertions, removals, replacements and swaps of
// neighbours between two names.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<std::size_t>> d(
      a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) d[i][0] = i;
  for (std::size_t j = 0; j <= b.size(); ++j) d[0][j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    for (std::size_t j = 1; j <= b.size(); ++j) {
      std::size_t replace = a[i - 1] == b[j - 1] ? 0 : 1;
      d[i][j] = std::min(
          {d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + replace});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
  }
  return d[a.size()][b.size()];
}

}  // namespace

std::string nearest_variable(std::string_view name, SettingTable table) {
  std::string full(name.substr(0, 128));  // the table's longest is 35
  if (!full.starts_with("MACHINA_")) {
    // `port` in a file is meant as MACHINA_PORT.
    for (char& c : full) {
      c = c == '-' || c == '.'   ? '_'
          : c >= 'a' && c <= 'z' ? static_cast<char>(c - 32)
                                 : c;
    }
    if (!full.starts_with("MACHINA_")) full = "MACHINA_" + full;
  }
  std::string best;
  std::size_t least = SIZE_MAX;
  auto consider = [&](const std::string& known) {
    std::size_t distance = edit_distance(full, known);
    if (distance < least) {
      least = distance;
      best = known;
    }
  };
  for (const auto& row : table) {
    consider(row.name);
    if (row.also != nullptr) consider(row.also);
    if (row.type == Type::secret) {
      consider(std::string(row.name) + std::string(kFileSuffix));
    }
  }
  return best;
}

bool Config::Value::is_default() const {
  return origin == "default" || origin.starts_with("profile ");
}

int Config::Value::nearness() const {
  if (is_default()) return 0;
  return origin.starts_with("command line")  ? 3
         : origin.starts_with("environment") ? 2
                                             : 1;
}

Result<Config> Config::load(const std::vector<std::string>& environment,
                            const std::map<std::string, std::string>& overrides,
                            const std::string& file, SettingTable table) {
  Config config;
  config.table_ = table;
  OpenSecrets open;
  // Weakest first; what comes later replaces what came before.
  if (!file.empty()) {
    if (auto ok = add_file(table, file, &config.values_, &open); !ok)
      return ok.error();
  }
  if (auto ok = add_environment(table, environment, &config.values_, &open);
      !ok) {
    return ok.error();
  }
  Source command_line(table, "command line");
  for (const auto& [name, text] : overrides) {
    if (auto ok = command_line.add(name, text); !ok) return ok.error();
  }
  command_line.merge_into(&config.values_, &open);
  for (auto& [name, line] : open) {
    config.open_secrets_.push_back(std::move(line));
  }
  add_profile_and_defaults(table, &config.values_);
  for (const auto& row : table) {
    if (row.has_effect()) {
      row.fill(&config.typed_, config.values_.at(row.name).text);
    }
  }
  if (auto ok = check_together(config.typed_); !ok) return ok.error();
  return config;
}

const std::string& Config::text(std::string_view name) const {
  auto found = values_.find(name);
  CHECK(found != values_.end());
  return found->second.text;
}

const std::vector<std::string>& Config::open_secrets() const {
  return open_secrets_;
}

std::string Config::print() const {
  std::string out;
  for (const auto& row : table_) {
    const Value& value = values_.at(row.name);
    std::string shown = value.text;
    if (row.type == Type::secret) shown = shown.empty() ? "" : "(set)";
    std::string line = std::string(row.name) + "=" + shown;
    if (line.size() < 48) line.resize(48, ' ');
    out += line + "  # " + value.origin +
           (row.has_effect() ? "" : "; no effect yet") + "\n";
  }
  return out;
}

const Values& Config::values() const { return values_; }

std::vector<std::string> Config::environment(std::uint8_t readers) const {
  std::vector<std::string> out;
  for (const auto& row : table_) {
    if ((row.readers & readers) == 0 || row.type == Type::secret) continue;
    const Value& value = values_.at(row.name);
    if (!value.is_default()) {
      out.push_back(std::string(row.name) + "=" + value.text);
    }
  }
  return out;
}

void scrub_secrets_from_environment() {
  for (const auto& row : settings_table()) {
    if (row.type != Type::secret) continue;
    std::string prefix = std::string(row.name) + "=";
    for (char** entry = environ; entry != nullptr && *entry != nullptr;
         ++entry) {
      if (std::string_view(*entry).starts_with(prefix)) {
        explicit_bzero(*entry + prefix.size(),
                       std::strlen(*entry + prefix.size()));
      }
    }
    ::unsetenv(row.name);
  }
}

}  // namespace machina
