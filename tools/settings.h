// tools/settings.h
//
// The table of settings: a setting is one row in settings.cc and, once some
// part of the program reads the setting, one typed field here.
//
//   V1  A row without a field has no effect yet, and every place that shows
//       settings says so. A field has a reader.
//   V2  A row names the processes that read the setting. A pool and a worker
//       are given exactly the settings that name them.
//   V3  A row's range fits its field (checked when settings.cc is compiled).
//   V4  docs/settings.md and profiles/*.env say what the table says.
//
// tests/tools/settings_test.cc has a test for each but V3.

#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/job.h"

namespace machina {

// The fields, in groups. A field is called as its variable is, in lower case
// and without MACHINA_. Values come from the table alone: a field has no
// default here.
struct ProcessSettings {
  std::string profile, root, host, server;
  int port, workers;
  bool io_uring;
  std::string log_file, log_format, log_level, log_access;
  std::uint64_t log_max_bytes, log_total_bytes;
};

struct QueueSettings {
  bool wal_enable, wal_fsync;
  Millis wal_checkpoint_ms;
  Millis dedup_ttl_ms;
  std::uint64_t queue_max;
  Millis retry_min_ms, retry_max_ms;
  int max_attempts;
  Millis lease_ms, drain_ms, pool_orphan_ms, serve_scan_ms;
  std::uint64_t payload_cache_bytes, history_lag_max_bytes;
};

struct SandboxSettings {
  bool seccomp_enable, bwrap_required;
  Level sandbox_min_level;
  std::uint64_t sandbox_max_memory_mb, sandbox_max_cpu_ms, sandbox_max_pids,
      sandbox_max_disk_mb, sandbox_max_output_bytes;
  std::uint32_t slot_uid_base;
};

struct KindsSettings {
  std::vector<std::string> kinds_allowed, repo_roots;
  Millis shell_timeout_ms;
  std::uint64_t shell_stdout_max, shell_stderr_max;
  std::vector<std::string> shell_allowed_exe;
};

struct ApiSettings {
  std::string api_token, api_hmac_secret, api_credentials;
  std::int64_t api_hmac_ttl_sec;
  std::uint32_t api_rpm, api_enqueue_rpm, api_runsync_rpm;
  int api_connections, api_connections_per_address;
  std::uint64_t api_max_body_bytes;
};

struct SettingValues : ProcessSettings,
                       QueueSettings,
                       SandboxSettings,
                       KindsSettings,
                       ApiSettings {};

// A row of the table.
struct Setting {
  enum class Type : std::uint8_t {
    text,    // any printable text
    path,    // text without a newline
    number,  // a decimal integer in [min, max]
    flag,    // 0 or 1
    choice,  // one of `choices`, separated by '|'
    level,   // L0..L4
    list,    // values separated by commas
    paths,   // absolute paths separated by commas
    secret,  // printable ASCII; also as <NAME>_FILE
  };
  // Who reads a setting: bits of `readers`.
  enum Reader : std::uint8_t {
    kServer = 1,
    kPool = 2,    // from its environment, which the server makes
    kWorker = 4,  // from its environment, which the pool makes
    kClient = 8,  // the verbs that speak to a server, and those of ops
  };

  const char* name;
  Type type;
  const char* fallback;  // the built-in default
  const char* help;
  std::uint8_t readers = 0;
  // Puts a checked value into its field; null: no effect yet.
  void (*fill)(SettingValues* values, const std::string& text) = nullptr;
  std::int64_t min = 0, max = 0;
  const char* choices = nullptr;
  const char* dev = nullptr;  // the profiles' values, where they set it
  const char* prod = nullptr;
  const char* also = nullptr;  // a second name, as the original had it

  bool has_effect() const { return fill != nullptr; }
  // The row with what the profiles set.
  constexpr Setting by(const char* dev_value, const char* prod_value) const {
    Setting row = *this;
    row.dev = dev_value;
    row.prod = prod_value;
    return row;
  }
  constexpr Setting or_named(const char* second_name) const {
    Setting row = *this;
    row.also = second_name;
    return row;
  }
};

using SettingTable = std::span<const Setting>;

SettingTable settings_table();  // lives for ever
// The row of that name, by either spelling; null where there is none.
const Setting* find_setting(std::string_view name,
                            SettingTable table = settings_table());

// What a value says; checked before, so that a bad one is a CHECK.
std::int64_t setting_number(std::string_view text);  // of a level, its digit
// By comma; blanks around a part do not count, nor do empty parts.
std::vector<std::string> setting_list(std::string_view text);

// The whole of docs/settings.md.
std::string settings_page();

}  // namespace machina
