#include "tools/config.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <optional>
#include <set>
#include <thread>

#include "queue/base/check.h"
#include "queue/base/utf8.h"
#include "tools/duration.h"
#include "tools/trust.h"

extern char** environ;  // NOLINT: the only way to the whole of it

namespace machina {
namespace {

using Type = Variable::Type;

constexpr std::int64_t kDay = 86'400'000;
constexpr std::int64_t kMiB = 1 << 20;
constexpr std::size_t kTextBytesMax = 4096;
constexpr std::size_t kFileBytesMax = 1 << 20;

// The one table. docs/operating.md explains them; profiles/*.env repeat the
// dev and prod columns for people to read, and a test keeps both equal.
constexpr Variable kTable[] = {
    {"MACHINA_PROFILE", Type::choice, "dev", nullptr, nullptr, 0, 0,
     "dev|prod"},
    {"MACHINA_ROOT", Type::path, "./machina-data"},
    {"MACHINA_HOST", Type::text, "127.0.0.1"},
    {"MACHINA_PORT", Type::number, "8080", nullptr, nullptr, 0, 65535},
    // Empty: one per processor.
    {"MACHINA_WORKERS", Type::number, "", nullptr, nullptr, 0, 64},
    {"MACHINA_SERVER", Type::text, ""},
    // Many sockets in one system call, where the kernel has io_uring.
    {"MACHINA_IO_URING", Type::flag, "1"},

    // What the processes say of themselves (queue/base/say.h). Empty: the
    // server's lines go to standard error; the pool's go to <root>/pool.log
    // always.
    {"MACHINA_LOG_FILE", Type::path, ""},
    {"MACHINA_LOG_FORMAT", Type::choice, "text", nullptr, nullptr, 0, 0,
     "text|json"},
    {"MACHINA_LOG_LEVEL", Type::choice, "info", nullptr, nullptr, 0, 0,
     "debug|info|warn|error"},
    // A line for each request: none; those of clients, at most 100 a second;
    // all of them.
    {"MACHINA_LOG_ACCESS", Type::choice, "sampled", nullptr, nullptr, 0, 0,
     "off|sampled|all"},
    // Of one file, and of it with those it was renamed to.
    {"MACHINA_LOG_MAX_BYTES", Type::number, "134217728", nullptr, nullptr,
     64 * 1024, 1LL << 40},
    {"MACHINA_LOG_TOTAL_BYTES", Type::number, "1073741824", nullptr, nullptr,
     128 * 1024, 1LL << 44},

    {"MACHINA_WAL_ENABLE", Type::flag, "1"},
    {"MACHINA_WAL_FSYNC", Type::flag, "1", "0", "1"},
    {"MACHINA_WAL_CHECKPOINT_MS", Type::number, "5000", nullptr, nullptr, 100,
     3'600'000},
    {"MACHINA_WAL_CRC32", Type::flag, "1"},
    {"MACHINA_DEDUP_TTL_MS", Type::number, "300000", nullptr, nullptr, 0,
     30 * kDay},
    {"MACHINA_QUEUE_MAX", Type::number, "20000000", nullptr, nullptr, 1,
     1'000'000'000},
    {"MACHINA_RETRY_MIN_MS", Type::number, "1000", nullptr, nullptr, 0, kDay},
    {"MACHINA_RETRY_MAX_MS", Type::number, "300000", nullptr, nullptr, 0,
     30 * kDay},
    {"MACHINA_MAX_ATTEMPTS", Type::number, "5", nullptr, nullptr, 1, 1000},
    {"MACHINA_LEASE_MS", Type::number, "30000", nullptr, nullptr, 100,
     3'600'000},
    {"MACHINA_DRAIN_MS", Type::number, "30000", nullptr, nullptr, 0, kDay},
    {"MACHINA_POOL_ORPHAN_MS", Type::number, "60000", nullptr, nullptr, 0,
     kDay},
    {"MACHINA_SERVE_SCAN_MS", Type::number, "150", nullptr, nullptr, 20, 5000},

    {"MACHINA_SECCOMP_ENABLE", Type::flag, "1", "0", "1"},
    {"MACHINA_SECCOMP_PROFILE", Type::choice, "strict", nullptr, nullptr, 0, 0,
     "strict|net"},
    {"MACHINA_SECCOMP_ALLOW_NET", Type::flag, "0"},
    {"MACHINA_SANDBOX_MIN_LEVEL", Type::level, "L3", "L0", "L3"},
    {"MACHINA_BWRAP_REQUIRED", Type::flag, "0"},
    {"MACHINA_SANDBOX_MAX_MEMORY_MB", Type::number, "16384", nullptr, nullptr,
     1, 1 << 24},
    {"MACHINA_SANDBOX_MAX_CPU_MS", Type::number, "86400000", nullptr, nullptr,
     1, 30 * kDay},
    {"MACHINA_SANDBOX_MAX_PIDS", Type::number, "4096", nullptr, nullptr, 1,
     1 << 22},
    {"MACHINA_SANDBOX_MAX_DISK_MB", Type::number, "16384", nullptr, nullptr, 1,
     1 << 24},
    {"MACHINA_SANDBOX_MAX_OUTPUT_BYTES", Type::number, "67108864", nullptr,
     nullptr, 1, 1 << 30},
    // Pool and workers run as this less one, slot n as this plus n.
    {"MACHINA_SLOT_UID_BASE", Type::number, "200000", nullptr, nullptr, 1001,
     4'294'900'000},

    {"MACHINA_KINDS_ALLOWED", Type::list, ""},
    {"MACHINA_REPO_ROOTS", Type::paths, ""},
    {"MACHINA_PAYLOAD_CACHE_BYTES", Type::number, "67108864", nullptr, nullptr,
     kMiB, 1LL << 40},
    {"MACHINA_HISTORY_LAG_MAX_BYTES", Type::number, "1073741824", nullptr,
     nullptr, kMiB, 1LL << 50},

    {"MACHINA_SHELL_TIMEOUT_MS", Type::number, "10000", "30000", "10000", 1,
     kDay},
    {"MACHINA_SHELL_STDOUT_MAX", Type::number, "131072", nullptr, nullptr, 1,
     64 * kMiB},
    {"MACHINA_SHELL_STDERR_MAX", Type::number, "131072", nullptr, nullptr, 1,
     64 * kMiB},
    {"MACHINA_SHELL_ALLOWED_EXE", Type::list, ""},

    {"MACHINA_POLICY_CMD", Type::text, ""},
    {"MACHINA_POLICY_TIMEOUT_MS", Type::number, "30000", "60000", "30000", 1,
     kDay},
    {"MACHINA_POLICY_STDOUT_MAX", Type::number, "65536", nullptr, nullptr, 1,
     64 * kMiB},
    {"MACHINA_POLICY_ALLOWED_EXE", Type::list, "python3,python,bash,sh,node"},
    {"MACHINA_POLICY_ALLOWED_SCRIPT_ROOT", Type::path, ""},
    {"MACHINA_POLICY_RLIMIT_CPU", Type::number, "2", nullptr, nullptr, 0,
     86'400},
    {"MACHINA_POLICY_RLIMIT_AS", Type::number, "768", nullptr, nullptr, 0,
     1 << 24},
    {"MACHINA_POLICY_RLIMIT_FSIZE", Type::number, "10", nullptr, nullptr, 0,
     1 << 24},
    {"MACHINA_POLICY_RLIMIT_NOFILE", Type::number, "64", nullptr, nullptr, 8,
     1 << 20},
    {"MACHINA_POLICY_RLIMIT_NPROC", Type::number, "32", nullptr, nullptr, 0,
     1 << 22},

    {"MACHINA_HTTP_ALLOWED_HOSTS", Type::list, ""},
    {"MACHINA_HTTP_DEFAULT_DENY", Type::flag, "1", "0", "1"},
    {"MACHINA_HTTP_TIMEOUT_MS", Type::number, "3000", nullptr, nullptr, 1,
     kDay},
    {"MACHINA_HTTP_STDOUT_MAX", Type::number, "131072", nullptr, nullptr, 1,
     64 * kMiB},
    {"MACHINA_HTTP_RLIMIT_CPU", Type::number, "2", nullptr, nullptr, 0, 86'400},
    {"MACHINA_HTTP_RLIMIT_AS", Type::number, "512", nullptr, nullptr, 0,
     1 << 24},
    {"MACHINA_HTTP_RLIMIT_FSIZE", Type::number, "1", nullptr, nullptr, 0,
     1 << 24},
    {"MACHINA_HTTP_RLIMIT_NOFILE", Type::number, "32", nullptr, nullptr, 8,
     1 << 20},
    {"MACHINA_HTTP_RLIMIT_NPROC", Type::number, "16", nullptr, nullptr, 0,
     1 << 22},

    {"MACHINA_EMBED_PROVIDER", Type::choice, "hash", nullptr, nullptr, 0, 0,
     "hash|cmd"},
    {"MACHINA_EMBED_CMD", Type::text, ""},
    {"MACHINA_EMBED_TIMEOUT_MS", Type::number, "5000", nullptr, nullptr, 1,
     kDay},
    {"MACHINA_EMBED_CPU_MS", Type::number, "4000", nullptr, nullptr, 0, kDay},
    {"MACHINA_EMBED_AS_MB", Type::number, "512", nullptr, nullptr, 0, 1 << 24},
    {"MACHINA_EMBED_NPROC", Type::number, "0", nullptr, nullptr, 0, 1 << 22},
    {"MACHINA_GPU_DIM", Type::number, "128", nullptr, nullptr, 8, 2048},

    {"MACHINA_TOOLHOST_ISOLATE", Type::flag, "0", nullptr, "1"},
    {"MACHINA_LEASE_ENFORCE", Type::flag, "0", "0", "0"},
    {"MACHINA_GENESIS_ENABLE", Type::flag, "0", "1", "0"},
    {"MACHINA_GENESIS_GUARD", Type::flag, "1", "0", "1"},
    {"MACHINA_GENESIS_PROD_MODE", Type::flag, "0", nullptr, "1"},

    {"MACHINA_API_TOKEN", Type::secret, ""},
    {"MACHINA_API_HMAC_SECRET", Type::secret, ""},
    // Where both are set: is one enough, or are both needed?
    {"MACHINA_API_CREDENTIALS", Type::choice, "any", nullptr, nullptr, 0, 0,
     "any|all"},
    {"MACHINA_API_HMAC_TTL_SEC", Type::number, "60", nullptr, nullptr, 1, 3600},
    {"MACHINA_API_RPM", Type::number, "0", nullptr, nullptr, 0, 1'000'000'000},
    {"MACHINA_API_ENQUEUE_RPM", Type::number, "0", nullptr, nullptr, 0,
     1'000'000'000},
    {"MACHINA_API_RUNSYNC_RPM", Type::number, "0", nullptr, nullptr, 0,
     1'000'000'000},
    {"MACHINA_API_CONNECTIONS", Type::number, "4096", nullptr, nullptr, 16,
     60'000},
    {"MACHINA_API_CONNECTIONS_PER_ADDRESS", Type::number, "1024", nullptr,
     nullptr, 1, 60'000},
    {"MACHINA_API_MAX_BODY_BYTES", Type::number, "2097152", nullptr, nullptr,
     1024, 4 * kMiB},
};

// Accepted, checked and shown, and read by no part of this version. A name
// that ends in _ stands for all that begin so. tests/tools/config_test.cc
// looks for a reader of every other variable.
constexpr std::string_view kNoEffectYet[] = {"MACHINA_WAL_CRC32",
                                             "MACHINA_SECCOMP_PROFILE",
                                             "MACHINA_SECCOMP_ALLOW_NET",
                                             "MACHINA_POLICY_",
                                             "MACHINA_HTTP_",
                                             "MACHINA_EMBED_",
                                             "MACHINA_GPU_DIM",
                                             "MACHINA_TOOLHOST_ISOLATE",
                                             "MACHINA_LEASE_ENFORCE",
                                             "MACHINA_GENESIS_"};

Error invalid(std::string what) {
  return Error{Code::invalid, std::move(what)};
}

const Variable* find_variable(std::string_view name) {
  for (const auto& row : kTable) {
    if (name == row.name) return &row;
  }
  return nullptr;
}

constexpr std::string_view kFileSuffix = "_FILE";

// MACHINA_API_TOKEN of MACHINA_API_TOKEN_FILE; null where it is no such name.
const Variable* secret_of_file_name(std::string_view name) {
  if (!name.ends_with(kFileSuffix)) return nullptr;
  name.remove_suffix(kFileSuffix.size());
  const Variable* row = find_variable(name);
  return row != nullptr && row->type == Type::secret ? row : nullptr;
}

Error unknown_variable(std::string_view name, std::string_view origin) {
  return invalid(std::string(name) + " (" + std::string(origin) +
                 ") is not a variable of machina; the nearest is " +
                 nearest_variable(name));
}

std::optional<std::int64_t> parse_number(std::string_view text) {
  std::int64_t value = 0;
  const char* end = text.data() + text.size();
  auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc{} || stop != end || text.empty()) return std::nullopt;
  return value;
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  while (!text.empty()) {
    std::size_t at = std::min(text.find(separator), text.size());
    std::string_view part = text.substr(0, at);
    while (!part.empty() && part.front() == ' ') part.remove_prefix(1);
    while (!part.empty() && part.back() == ' ') part.remove_suffix(1);
    if (!part.empty()) parts.emplace_back(part);
    text.remove_prefix(std::min(at + 1, text.size()));
  }
  return parts;
}

bool printable(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](unsigned char c) { return c >= 0x20 && c != 0x7f; });
}

// The unit of a variable that is a span of time, by its name: "ms", "s", or
// empty for what is none.
std::string time_unit(const Variable& row) {
  const std::string_view name = row.name;
  if (row.type != Type::number) return "";
  return name.ends_with("_MS") ? "ms" : name.ends_with("_SEC") ? "s" : "";
}

// "5s" of a variable in milliseconds is 5000: everything behind this reads
// plain numbers. What cannot be said in the variable's unit stays as it is,
// and is refused.
std::string plain_number(const Variable& row, const std::string& text) {
  const std::string unit = time_unit(row);
  if (unit.empty() || text.find_first_of("dhms") == std::string::npos) {
    return text;
  }
  const std::int64_t unit_ms = unit == "s" ? 1000 : 1;
  auto ms = parse_duration_ms(text, unit_ms);
  if (!ms || *ms % unit_ms != 0) return text;
  return std::to_string(*ms / unit_ms);
}

// What is wrong with `text` as a value of `row`, as "must be ...", or empty.
std::string complaint(const Variable& row, std::string_view text) {
  auto number = parse_number(text);
  switch (row.type) {
    case Type::number:
      if (number && *number >= row.min && *number <= row.max) return "";
      if (const std::string unit = time_unit(row); !unit.empty()) {
        const std::int64_t unit_ms = unit == "s" ? 1000 : 1;
        return "must be " +
               duration_range(row.min * unit_ms, row.max * unit_ms, unit);
      }
      return "must be a whole number from " + std::to_string(row.min) + " to " +
             std::to_string(row.max);
    case Type::flag:
      return text == "0" || text == "1" ? "" : "must be 0 or 1";
    case Type::choice: {
      auto choices = split(row.choices, '|');
      bool known =
          std::find(choices.begin(), choices.end(), text) != choices.end();
      return known ? "" : "must be one of " + std::string(row.choices);
    }
    case Type::level:
      return text.size() == 2 && text[0] == 'L' && text[1] >= '0' &&
                     text[1] <= '4'
                 ? ""
                 : "must be one of L0, L1, L2, L3, L4";
    case Type::paths:
      for (const auto& part : split(text, ',')) {
        if (part[0] != '/') {
          return "must be absolute paths separated by commas";
        }
      }
      break;
    case Type::secret:
      for (unsigned char c : text) {
        if (c <= 0x20 || c >= 0x7f) {
          return "must be printable ASCII without spaces";
        }
      }
      if (text.empty()) return "must not be empty";
      break;
    case Type::path:
      // The rest of a shell variable that is not set is no place.
      if (text.empty() && *row.fallback != '\0') return "must not be empty";
      break;
    case Type::text:
    case Type::list:
      break;
  }
  if (text.size() > kTextBytesMax) {
    return "must be at most " + std::to_string(kTextBytesMax) + " bytes";
  }
  return printable(text) ? "" : "must not hold control characters";
}

Result<void> check_value(const Variable& row, const Config::Value& value) {
  std::string what = complaint(row, value.text);
  if (what.empty()) return {};
  // A secret is not repeated, not even a bad one (G4).
  std::string shown =
      row.type == Type::secret
          ? std::string("its value")
          : "\"" + std::string(utf8_head(value.text, 200)) + "\"";
  return invalid(std::string(row.name) + " (" + value.origin + "): " + shown +
                 " " + what);
}

// A file of at most `max` bytes; no directory, device or pipe.
Result<std::string> read_file(const std::string& path, std::size_t max,
                              mode_t* mode = nullptr) {
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return Error{Code::io, path + ": " + std::strerror(errno)};
  std::string bytes(max + 1, '\0');
  std::size_t have = 0;
  struct stat status {};
  ssize_t got = 0;
  bool regular = ::fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
  while (regular && have < bytes.size() &&
         (got = ::read(fd, bytes.data() + have, bytes.size() - have)) > 0) {
    have += static_cast<std::size_t>(got);
  }
  int error = errno;
  ::close(fd);
  if (mode != nullptr) *mode = status.st_mode & 07777;
  if (!regular) return Error{Code::io, path + ": not a regular file"};
  if (got < 0) return Error{Code::io, path + ": " + std::strerror(error)};
  if (have > max) {
    return Error{Code::io,
                 path + ": more than " + std::to_string(max) + " bytes"};
  }
  bytes.resize(have);
  return bytes;
}

using Values = std::map<std::string, Config::Value, std::less<>>;
using OpenSecrets = std::map<std::string, std::string>;

// One source of settings: names checked, <NAME>_FILE resolved, values checked.
class Source {
 public:
  explicit Source(std::string origin) : origin_(std::move(origin)) {}
  // One that is a file: a secret in it is as open as the file is.
  Source(std::string origin, std::string path, mode_t mode)
      : origin_(std::move(origin)), path_(std::move(path)), mode_(mode) {}

  Result<void> add(const std::string& name, const std::string& text) {
    if (const Variable* secret = secret_of_file_name(name)) {
      return add_secret_file(*secret, name, text);
    }
    const Variable* row = find_variable(name);
    if (row == nullptr) return unknown_variable(name, origin_);
    if (!seen_.insert(name).second) {
      return invalid(name + " (" + origin_ + ") is set twice");
    }
    Config::Value value{plain_number(*row, text), origin_};
    if (auto ok = check_value(*row, value); !ok) return ok.error();
    values_[name] = std::move(value);
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
  Result<void> add_secret_file(const Variable& secret, const std::string& name,
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
    Config::Value value{*bytes, origin_ + ", " + name};
    if (auto ok = check_value(secret, value); !ok) return ok.error();
    secret_files_[secret.name] = std::move(value);
    note_if_open(secret, name, path, mode);
    return {};
  }

  void note_if_open(const Variable& secret, const std::string& name,
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

Result<void> add_file(const std::string& path, Values* values,
                      OpenSecrets* open) {
  mode_t mode = 0;
  if (auto ok = check_trusted("--config", path, true); !ok) return ok;
  auto bytes = read_file(path, kFileBytesMax, &mode);
  if (!bytes) return invalid("--config: " + bytes.error().what);
  Source source("file " + path, path, mode);
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
      if (find_variable(name) == nullptr && !secret_of_file_name(name)) {
        return unknown_variable(name, "file " + path);
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

Result<void> add_environment(const std::vector<std::string>& environment,
                             Values* values, OpenSecrets* open) {
  Source source("environment");
  for (const auto& entry : environment) {
    std::size_t equals = entry.find('=');
    std::string name = entry.substr(0, equals);
    if (!name.starts_with("MACHINA_") || equals == std::string::npos) continue;
    std::string text = entry.substr(equals + 1);
    // `NAME=` in a unit file or a shell means "not set".
    if (text.empty() &&
        (find_variable(name) != nullptr || secret_of_file_name(name))) {
      continue;
    }
    if (auto ok = source.add(name, text); !ok) return ok;
  }
  if (auto ok = source.finish(); !ok) return ok;
  source.merge_into(values, open);
  return {};
}

void add_profile_and_defaults(Values* values) {
  auto chosen = values->find("MACHINA_PROFILE");
  std::string profile = chosen == values->end() ? "dev" : chosen->second.text;
  for (const auto& row : kTable) {
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
Result<void> check_together(const Config& config) {
  if (config.number("MACHINA_RETRY_MIN_MS") >
      config.number("MACHINA_RETRY_MAX_MS")) {
    return invalid(
        "MACHINA_RETRY_MIN_MS: " + config.text("MACHINA_RETRY_MIN_MS") +
        " must not be above MACHINA_RETRY_MAX_MS, which is " +
        config.text("MACHINA_RETRY_MAX_MS"));
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

std::span<const Variable> config_table() { return kTable; }

bool has_effect(std::string_view name) {
  return std::none_of(std::begin(kNoEffectYet), std::end(kNoEffectYet),
                      [&](std::string_view none) {
                        return none.ends_with('_') ? name.starts_with(none)
                                                   : name == none;
                      });
}

std::string nearest_variable(std::string_view name) {
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
  for (const auto& row : kTable) {
    consider(row.name);
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
                            const std::string& file) {
  Config config;
  OpenSecrets open;
  // Weakest first; what comes later replaces what came before.
  if (!file.empty()) {
    if (auto ok = add_file(file, &config.values_, &open); !ok)
      return ok.error();
  }
  if (auto ok = add_environment(environment, &config.values_, &open); !ok) {
    return ok.error();
  }
  Source command_line("command line");
  for (const auto& [name, text] : overrides) {
    if (auto ok = command_line.add(name, text); !ok) return ok.error();
  }
  command_line.merge_into(&config.values_, &open);
  for (auto& [name, line] : open) {
    config.open_secrets_.push_back(std::move(line));
  }
  add_profile_and_defaults(&config.values_);
  if (auto ok = check_together(config); !ok) return ok.error();
  return config;
}

const std::string& Config::text(std::string_view name) const {
  auto found = values_.find(name);
  CHECK(found != values_.end());
  return found->second.text;
}

std::int64_t Config::number(std::string_view name) const {
  std::string_view text = this->text(name);
  if (text.starts_with('L')) text.remove_prefix(1);
  auto value = parse_number(text);
  CHECK(value.has_value());  // load() let nothing else in
  return *value;
}

bool Config::flag(std::string_view name) const { return text(name) == "1"; }

std::vector<std::string> Config::list(std::string_view name) const {
  return split(text(name), ',');
}

bool Config::prod() const { return text("MACHINA_PROFILE") == "prod"; }

const std::vector<std::string>& Config::open_secrets() const {
  return open_secrets_;
}

std::string Config::print() const {
  std::string out;
  for (const auto& row : kTable) {
    const Value& value = values_.at(row.name);
    std::string shown = value.text;
    if (row.type == Type::secret) shown = shown.empty() ? "" : "(set)";
    std::string line = std::string(row.name) + "=" + shown;
    if (line.size() < 48) line.resize(48, ' ');
    out += line + "  # " + value.origin +
           (has_effect(row.name) ? "" : "; no effect yet") + "\n";
  }
  return out;
}

const Values& Config::values() const { return values_; }

std::vector<std::string> Config::environment(
    std::span<const char* const> names) const {
  std::vector<std::string> out;
  for (const char* name : names) {
    const Variable* row = find_variable(name);
    CHECK(row != nullptr && row->type != Type::secret);
    const Value& value = values_.find(std::string_view(name))->second;
    if (!value.is_default()) {
      out.push_back(std::string(name) + "=" + value.text);
    }
  }
  return out;
}

void scrub_secrets_from_environment() {
  for (const auto& row : kTable) {
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
