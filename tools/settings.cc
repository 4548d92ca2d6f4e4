#include "tools/settings.h"

#include <algorithm>
#include <concepts>
#include <type_traits>
#include <utility>

#include "queue/base/check.h"
#include "queue/base/numbers.h"

namespace machina {
namespace {

using Type = Setting::Type;
using V = SettingValues;
using enum Setting::Reader;

constexpr std::int64_t kDay = 86'400'000;
constexpr std::int64_t kHour = 3'600'000;
constexpr std::int64_t kMiB = 1 << 20;
constexpr std::int64_t kBillion = 1'000'000'000;
constexpr std::uint8_t kAll = kServer | kPool | kWorker;

template <auto Field>
using FieldOf = std::remove_reference_t<decltype(std::declval<V&>().*Field)>;

template <auto Field>
void fill(V* values, const std::string& text) {
  using T = FieldOf<Field>;
  if constexpr (std::same_as<T, bool>) {
    values->*Field = text == "1";
  } else if constexpr (std::integral<T>) {
    values->*Field = static_cast<T>(setting_number(text));
  } else if constexpr (std::same_as<T, std::string>) {
    values->*Field = text;
  } else {
    static_assert(std::same_as<T, std::vector<std::string>>);
    values->*Field = setting_list(text);
  }
}

// Rows with a field. What does not fit together (a flag in a number, a range
// that is wider than the field) does not compile.
template <auto Field>
consteval Setting flag(const char* name, const char* fallback,
                       std::uint8_t readers, const char* help) {
  static_assert(std::same_as<FieldOf<Field>, bool>);
  return {name, Type::flag, fallback, help, readers, fill<Field>};
}

template <auto Field>
consteval Setting number(const char* name, const char* fallback,
                         std::int64_t min, std::int64_t max,
                         std::uint8_t readers, const char* help) {
  using T = FieldOf<Field>;
  static_assert(std::integral<T> && !std::same_as<T, bool>);
  if (!std::in_range<T>(min) || !std::in_range<T>(max)) {
    throw "the range is wider than the field";
  }
  return {name, Type::number, fallback, help, readers, fill<Field>, min, max};
}

template <auto Field>
consteval Setting level(const char* name, const char* fallback,
                        std::uint8_t readers, const char* help) {
  static_assert(std::same_as<FieldOf<Field>, Level>);
  return {name, Type::level, fallback, help, readers, fill<Field>};
}

template <auto Field>
consteval Setting choice(const char* name, const char* fallback,
                         const char* choices, std::uint8_t readers,
                         const char* help) {
  static_assert(std::same_as<FieldOf<Field>, std::string>);
  return {name, Type::choice, fallback, help, readers, fill<Field>, 0,
          0,    choices};
}

// text, path, secret; list, paths
template <auto Field>
consteval Setting words(const char* name, Type type, const char* fallback,
                        std::uint8_t readers, const char* help) {
  const bool many = type == Type::list || type == Type::paths;
  if (many != std::same_as<FieldOf<Field>, std::vector<std::string>>) {
    throw "the field is not of the row's type";
  }
  return {name, type, fallback, help, readers, fill<Field>};
}

// Rows without a field: no effect yet.
consteval Setting flag(const char* name, const char* fallback,
                       const char* help) {
  return {name, Type::flag, fallback, help};
}
consteval Setting number(const char* name, const char* fallback,
                         std::int64_t min, std::int64_t max, const char* help) {
  return {name, Type::number, fallback, help, 0, nullptr, min, max};
}
consteval Setting choice(const char* name, const char* fallback,
                         const char* choices, const char* help) {
  return {name, Type::choice, fallback, help, 0, nullptr, 0, 0, choices};
}
consteval Setting words(const char* name, Type type, const char* fallback,
                        const char* help) {
  return {name, type, fallback, help};
}

// The one table. Keep it in groups, with what is set first at the top.
constexpr Setting kTable[] = {
    choice<&V::profile>("MACHINA_PROFILE", "dev", "dev|prod", kAll | kClient,
                        "which defaults hold, and how strict a start is"),
    words<&V::root>("MACHINA_ROOT", Type::path, "./machina-data",
                    kServer | kClient,
                    "where all state is; pools and workers get it as --root"),
    words<&V::host>("MACHINA_HOST", Type::text, "127.0.0.1", kServer | kClient,
                    "the address; without a credential only loopback"),
    number<&V::port>("MACHINA_PORT", "8080", 0, 65535, kServer | kClient,
                     "0: any free one"),
    number<&V::workers>("MACHINA_WORKERS", "", 0, 64, kServer,
                        "empty: one per processor; a pool is told the number "
                        "by its server"),
    words<&V::server>("MACHINA_SERVER", Type::text, "", kClient,
                      "which server the verbs ask: http://HOST:PORT, or the "
                      "path of a socket"),
    flag<&V::io_uring>("MACHINA_IO_URING", "1", kServer,
                       "many sockets in one system call, where the kernel has "
                       "io_uring"),

    words<&V::log_file>("MACHINA_LOG_FILE", Type::path, "", kServer | kClient,
                        "the file of the server's log; empty: standard error"),
    choice<&V::log_format>("MACHINA_LOG_FORMAT", "text", "text|json", kAll,
                           "how a line of the log looks"),
    choice<&V::log_level>("MACHINA_LOG_LEVEL", "info", "debug|info|warn|error",
                          kAll, "the least severity that is logged"),
    choice<&V::log_access>("MACHINA_LOG_ACCESS", "sampled", "off|sampled|all",
                           kServer,
                           "a line for each request: none, at most 100 of "
                           "clients a second, or all"),
    number<&V::log_max_bytes>("MACHINA_LOG_MAX_BYTES", "134217728", 64 * 1024,
                              1LL << 40, kServer | kPool,
                              "a log file of this size is rotated"),
    number<&V::log_total_bytes>("MACHINA_LOG_TOTAL_BYTES", "1073741824",
                                128 * 1024, 1LL << 44, kServer | kPool,
                                "of a log file and its predecessors together"),

    flag<&V::wal_enable>("MACHINA_WAL_ENABLE", "1", kServer,
                         "0 is refused: there is no queue without its "
                         "write-ahead log"),
    flag<&V::wal_fsync>("MACHINA_WAL_FSYNC", "1", kServer,
                        "0: a 201 survives kill -9, not a power cut")
        .by("0", "1"),
    number<&V::wal_checkpoint_ms>("MACHINA_WAL_CHECKPOINT_MS", "5000", 100,
                                  kHour, kServer, "between two checkpoints"),
    flag("MACHINA_WAL_CRC32", "1", "checksums are always on"),
    flag("MACHINA_WAL_FRAMED", "1",
         "the original's other name for checksums; they are always on"),
    number("MACHINA_WAL_GROUP_MS", "2", 0, 1000,
           "how long a batch of records may wait for more"),
    number<&V::dedup_ttl_ms>("MACHINA_DEDUP_TTL_MS", "300000", 0, 30 * kDay,
                             kServer, "how long a dedup key is remembered"),
    number<&V::queue_max>("MACHINA_QUEUE_MAX", "20000000", 1, kBillion, kServer,
                          "live jobs; one more is answered 429"),
    number<&V::retry_min_ms>("MACHINA_RETRY_MIN_MS", "1000", 0, kDay, kServer,
                             "the first backoff of a job that does not say"),
    number<&V::retry_max_ms>("MACHINA_RETRY_MAX_MS", "300000", 0, 30 * kDay,
                             kServer,
                             "the longest backoff of a job that does not say"),
    number<&V::max_attempts>("MACHINA_MAX_ATTEMPTS", "5", 1, 1000, kServer,
                             "of a job that does not say"),
    number("MACHINA_AUTOPILOT_MAX_ATTEMPTS", "5", 1, 1000,
           "attempts of one step of an autopilot run"),
    number("MACHINA_AUTOPILOT_BACKOFF_BASE_MS", "2000", 0, kDay,
           "its first backoff"),
    number("MACHINA_AUTOPILOT_BACKOFF_MULT", "2", 1, 100,
           "by how much each backoff grows"),
    number("MACHINA_AUTOPILOT_BACKOFF_MAX_MS", "60000", 0, kDay,
           "its longest backoff"),
    number("MACHINA_AUTOPILOT_BACKOFF_JITTER_MS", "250", 0, kHour,
           "what chance adds to a backoff at most"),
    number<&V::lease_ms>("MACHINA_LEASE_MS", "30000", 100, kHour, kAll,
                         "how long a silent worker keeps its job"),
    number<&V::drain_ms>("MACHINA_DRAIN_MS", "30000", 0, kDay, kServer | kPool,
                         "how long running jobs may finish after SIGTERM"),
    number<&V::pool_orphan_ms>("MACHINA_POOL_ORPHAN_MS", "60000", 0, kDay,
                               kPool,
                               "how long a pool and its jobs outlive a dead "
                               "server"),
    number<&V::serve_scan_ms>("MACHINA_SERVE_SCAN_MS", "150", 20, 5000, kServer,
                              "longest time between two ticks of housekeeping"),

    flag<&V::seccomp_enable>("MACHINA_SECCOMP_ENABLE", "1", kServer | kPool,
                             "0: only the worst system calls are denied, and "
                             "no job gets above L2")
        .by("0", "1"),
    choice("MACHINA_SECCOMP_PROFILE", "strict", "strict|net",
           "net: jobs may use sockets; shown in what is not promised"),
    flag("MACHINA_SECCOMP_ALLOW_NET", "0",
         "1 is as MACHINA_SECCOMP_PROFILE=net"),
    level<&V::sandbox_min_level>("MACHINA_SANDBOX_MIN_LEVEL", "L3", kAll,
                                 "a built-in kind's job waits for a worker of "
                                 "this level")
        .by("L0", "L3"),
    flag<&V::bwrap_required>("MACHINA_BWRAP_REQUIRED", "0", kServer,
                             "1 is refused: this version has its own launcher "
                             "and no bwrap"),
    number<&V::sandbox_max_memory_mb>("MACHINA_SANDBOX_MAX_MEMORY_MB", "16384",
                                      1, 1 << 24, kServer,
                                      "the most that a job may ask for"),
    number<&V::sandbox_max_cpu_ms>("MACHINA_SANDBOX_MAX_CPU_MS", "86400000", 1,
                                   30 * kDay, kServer,
                                   "the most that a job may ask for"),
    number<&V::sandbox_max_pids>("MACHINA_SANDBOX_MAX_PIDS", "4096", 1, 1 << 22,
                                 kServer | kPool,
                                 "the most that a job may ask for"),
    number<&V::sandbox_max_disk_mb>("MACHINA_SANDBOX_MAX_DISK_MB", "16384", 1,
                                    1 << 24, kServer,
                                    "the most that a job may ask for"),
    number<&V::sandbox_max_output_bytes>("MACHINA_SANDBOX_MAX_OUTPUT_BYTES",
                                         "67108864", 1, 1 << 30, kServer,
                                         "the most that a job may ask for"),
    number<&V::slot_uid_base>("MACHINA_SLOT_UID_BASE", "200000", 1001,
                              4'294'900'000, kServer | kPool,
                              "as root: pool and workers run as this less one, "
                              "slot n as this plus n"),
    words("MACHINA_PROC_WRAPPER", Type::text, "",
          "a command that each job is started with"),
    flag("MACHINA_PROC_WRAPPER_ENABLE", "0", "1: that command is used"),

    words<&V::kinds_allowed>("MACHINA_KINDS_ALLOWED", Type::list, "", kServer,
                             "patterns (test.*); empty: every kind"),
    words<&V::repo_roots>("MACHINA_REPO_ROOTS", Type::paths, "", kAll,
                          "where repositories may lie, beside <root>/repos"),
    number<&V::payload_cache_bytes>("MACHINA_PAYLOAD_CACHE_BYTES", "67108864",
                                    kMiB, 1LL << 40, kServer,
                                    "payloads that are kept in memory"),
    number<&V::history_lag_max_bytes>("MACHINA_HISTORY_LAG_MAX_BYTES",
                                      "1073741824", kMiB, 1LL << 50, kServer,
                                      "how far history may be behind; beyond "
                                      "it new jobs are answered 503"),

    number<&V::shell_timeout_ms>("MACHINA_SHELL_TIMEOUT_MS", "10000", 1, kDay,
                                 kServer | kWorker,
                                 "of a tool.shell job that does not say")
        .by("30000", "10000"),
    number<&V::shell_stdout_max>("MACHINA_SHELL_STDOUT_MAX", "131072", 1,
                                 64 * kMiB, kServer | kWorker,
                                 "bytes of its output in a result"),
    number<&V::shell_stderr_max>("MACHINA_SHELL_STDERR_MAX", "131072", 1,
                                 64 * kMiB, kServer | kWorker,
                                 "bytes of its error output in a result"),
    words<&V::shell_allowed_exe>("MACHINA_SHELL_ALLOWED_EXE", Type::list, "",
                                 kServer | kWorker,
                                 "names of programs; empty: any in dev, none "
                                 "in prod"),
    words("MACHINA_FS_WRITE_ROOT", Type::path, "",
          "where the file tool writes; empty: <root>/work"),

    words("MACHINA_POLICY_CMD", Type::text, "", "the policy driver"),
    number("MACHINA_POLICY_TIMEOUT_MS", "30000", 1, kDay, "of one decision")
        .by("60000", "30000"),
    number("MACHINA_POLICY_STDOUT_MAX", "65536", 1, 64 * kMiB,
           "bytes of its answer"),
    words("MACHINA_POLICY_ALLOWED_EXE", Type::list,
          "python3,python,bash,sh,node", "programs that a driver may be"),
    words("MACHINA_POLICY_ALLOWED_SCRIPT_ROOT", Type::path, "",
          "where its script must lie; empty: <root>/policies"),
    flag("MACHINA_POLICY_ALLOW_UNSAFE", "0", "1: it may lie anywhere"),
    words("MACHINA_POLICY_LLM_URL", Type::text, "",
          "the server that the bundled driver asks"),
    number("MACHINA_POLICY_RLIMIT_CPU", "2", 0, 86'400, "seconds; 0: no limit")
        .or_named("MACHINA_POLICY_RLIMIT_CPU_SEC"),
    number("MACHINA_POLICY_RLIMIT_AS", "768", 0, 1 << 24, "MiB; 0: no limit")
        .or_named("MACHINA_POLICY_RLIMIT_AS_MB"),
    number("MACHINA_POLICY_RLIMIT_FSIZE", "10", 0, 1 << 24, "MiB; 0: no limit")
        .or_named("MACHINA_POLICY_RLIMIT_FSIZE_MB"),
    number("MACHINA_POLICY_RLIMIT_NOFILE", "64", 8, 1 << 20, "open files"),
    number("MACHINA_POLICY_RLIMIT_NPROC", "32", 0, 1 << 22,
           "processes; 0: no limit"),

    words("MACHINA_HTTP_ALLOWED_HOSTS", Type::list, "",
          "hosts that the HTTP tool may ask (*.example.com)"),
    flag("MACHINA_HTTP_DEFAULT_DENY", "1", "1: an empty list allows none")
        .by("0", "1"),
    number("MACHINA_HTTP_TIMEOUT_MS", "3000", 1, kDay, "of one request"),
    number("MACHINA_HTTP_STDOUT_MAX", "131072", 1, 64 * kMiB,
           "bytes of an answer"),
    number("MACHINA_HTTP_RLIMIT_CPU", "2", 0, 86'400, "seconds; 0: no limit")
        .or_named("MACHINA_HTTP_RLIMIT_CPU_SEC"),
    number("MACHINA_HTTP_RLIMIT_AS", "512", 0, 1 << 24, "MiB; 0: no limit")
        .or_named("MACHINA_HTTP_RLIMIT_AS_MB"),
    number("MACHINA_HTTP_RLIMIT_FSIZE", "1", 0, 1 << 24, "MiB; 0: no limit")
        .or_named("MACHINA_HTTP_RLIMIT_FSIZE_MB"),
    number("MACHINA_HTTP_RLIMIT_NOFILE", "32", 8, 1 << 20, "open files"),
    number("MACHINA_HTTP_RLIMIT_NPROC", "16", 0, 1 << 22,
           "processes; 0: no limit"),

    choice("MACHINA_EMBED_PROVIDER", "hash", "hash|cmd",
           "who makes embedding vectors"),
    words("MACHINA_EMBED_CMD", Type::text, "", "the command of provider cmd"),
    number("MACHINA_EMBED_TIMEOUT_MS", "5000", 1, kDay, "of one call"),
    number("MACHINA_EMBED_CPU_MS", "4000", 0, kDay, "of one call; 0: no limit"),
    number("MACHINA_EMBED_AS_MB", "512", 0, 1 << 24, "0: no limit"),
    number("MACHINA_EMBED_NPROC", "0", 0, 1 << 22, "processes; 0: no limit"),
    number("MACHINA_EMBED_DRIVERS", "1", 1, 64, "commands that run at once"),
    number("MACHINA_INDEX_MAX_BYTES", "1073741824", kMiB, 1LL << 40,
           "of all vector indexes in memory"),
    number("MACHINA_GPU_DIM", "128", 8, 2048, "dimensions of a vector"),
    choice("MACHINA_SELECTOR", "HEURISTIC", "HEURISTIC|GPU_CENTROID",
           "who selects a tool where no policy answers"),

    words("MACHINA_CHAT_CMD", Type::text, "", "the chat driver"),
    choice("MACHINA_CHAT_BACKEND", "oai_compat", "oai_compat|anthropic",
           "which API it speaks"),
    number("MACHINA_CHAT_TIMEOUT_MS", "60000", 1, kDay, "of one answer"),
    number("MACHINA_TOOLHOST_TIMEOUT", "90", 1, 86'400,
           "seconds of one call of the tool host"),
    number("MACHINA_CODE_TIMEOUT", "60", 1, 86'400,
           "seconds of one run of code"),
    flag("MACHINA_DEV_EXPLORE", "0", "1: short intervals between explorations"),
    flag("MACHINA_SELF_EVOLVE", "0", "1: patches to its own source"),
    number("MACHINA_MAX_CYCLES", "100", 1, 1'000'000, "cycles of a pulse loop")
        .by("100", "30"),
    number("MACHINA_PULSE_BUDGET_S", "3600", 1, 86'400,
           "seconds of a pulse loop")
        .by("3600", "600"),
    flag("MACHINA_AUTONOMIC_APPROVE_ALL_ASK", "0",
         "1: loops that improve themselves need no approval"),
    words("MACHINA_AUTONOMIC_AUTO_APPROVE_AIDS", Type::list, "",
          "tools that need none"),
    choice("MACHINA_PERMISSION_MODE", "standard",
           "open|standard|locked|supervised", "which tools need an approval"),
    words("MACHINA_PERMISSION_OVERRIDES", Type::text, "",
          "JSON: tool to allow, ask or deny"),

    flag("MACHINA_TOOLHOST_ISOLATE", "0", "1: each tool in its own process")
        .by(nullptr, "1"),
    flag("MACHINA_LEASE_ENFORCE", "0", "1: a tool needs a permission lease")
        .by("0", "0"),
    flag("MACHINA_GENESIS_ENABLE", "0", "1: tools may be generated")
        .by("1", "0"),
    flag("MACHINA_GENESIS_GUARD", "1", "1: what is generated is checked")
        .by("0", "1"),
    flag("MACHINA_GENESIS_PROD_MODE", "0", "1: none is loaded")
        .by(nullptr, "1"),
    flag("MACHINA_GENESIS_AUTOTRIGGER", "0", "1: a missing tool is generated"),
    flag("MACHINA_GENESIS_AUTOSTUB", "0", "1: or a stub of it"),
    number("MACHINA_GENESIS_COMPILE_RETRIES", "3", 0, 100, "of one tool"),
    flag("MACHINA_PLUGIN_ABI_LAX", "0", "1: plugins need not say their ABI"),
    words("MACHINA_DETERMINISTIC_RUN_ID", Type::text, "",
          "the id of every run, for replays"),
    words("MACHINA_STRIPE_API_BASE", Type::text, "",
          "where the payment provider is asked"),

    words<&V::api_token>("MACHINA_API_TOKEN", Type::secret, "",
                         kServer | kClient, "the bearer token"),
    words<&V::api_hmac_secret>("MACHINA_API_HMAC_SECRET", Type::secret, "",
                               kServer | kClient,
                               "the secret of request signatures"),
    choice<&V::api_credentials>("MACHINA_API_CREDENTIALS", "any", "any|all",
                                kServer,
                                "where both are set: is one enough, or are "
                                "both needed?"),
    number<&V::api_hmac_ttl_sec>("MACHINA_API_HMAC_TTL_SEC", "60", 1, 3600,
                                 kServer,
                                 "how far the time of a signature may be off"),
    number<&V::api_rpm>("MACHINA_API_RPM", "0", 0, kBillion, kServer,
                        "requests a minute and client; 0: no limit"),
    number<&V::api_enqueue_rpm>("MACHINA_API_ENQUEUE_RPM", "0", 0, kBillion,
                                kServer, "of them, submissions"),
    number<&V::api_runsync_rpm>("MACHINA_API_RUNSYNC_RPM", "0", 0, kBillion,
                                kServer, "of them, those that wait"),
    number<&V::api_connections>("MACHINA_API_CONNECTIONS", "4096", 16, 60'000,
                                kServer, "more are answered 503"),
    number<&V::api_connections_per_address>(
        "MACHINA_API_CONNECTIONS_PER_ADDRESS", "1024", 1, 60'000, kServer,
        "more are answered 503; behind a proxy as many as in all"),
    number<&V::api_max_body_bytes>("MACHINA_API_MAX_BODY_BYTES", "2097152",
                                   1024, 4 * kMiB, kServer, "of a request"),
};

const char* word(Type type) {
  switch (type) {
    case Type::text:
      return "text";
    case Type::path:
      return "path";
    case Type::number:
      return "number";
    case Type::flag:
      return "0, 1";
    case Type::choice:
      return "choice";
    case Type::level:
      return "L0 .. L4";
    case Type::list:
      return "list";
    case Type::paths:
      return "absolute paths";
    case Type::secret:
      return "secret";
  }
  return "";
}

std::string values_of(const Setting& row) {
  if (row.type == Type::number) {
    return std::to_string(row.min) + " .. " + std::to_string(row.max);
  }
  std::string words = row.type == Type::choice ? row.choices : word(row.type);
  for (std::size_t at; (at = words.find('|')) != std::string::npos;) {
    words.replace(at, 1, ", ");  // a bar would end the cell
  }
  return words;
}

std::string readers_of(const Setting& row) {
  if (!row.has_effect()) return "no effect yet";
  std::string words;
  auto add = [&](Setting::Reader reader, const char* word) {
    if ((row.readers & reader) == 0) return;
    words += (words.empty() ? "" : ", ") + std::string(word);
  };
  add(kServer, "server");
  add(kPool, "pool");
  add(kWorker, "worker");
  add(kClient, "client");
  return words;
}

std::string line_of(const Setting& row) {
  std::string name = row.name;
  if (row.also != nullptr) name += " or " + std::string(row.also);
  if (row.type == Type::secret) name += ", also as " + name + "_FILE";
  std::string fallback = row.fallback;
  if (row.dev != nullptr || row.prod != nullptr) {
    fallback = "dev " + std::string(row.dev != nullptr ? row.dev : fallback) +
               ", prod " + (row.prod != nullptr ? row.prod : fallback);
  }
  return "| " + name + " | " + values_of(row) + " | " +
         (fallback.empty() ? "none" : fallback) + " | " + readers_of(row) +
         " | " + row.help + " |\n";
}

}  // namespace

SettingTable settings_table() { return kTable; }

const Setting* find_setting(std::string_view name, SettingTable table) {
  for (const auto& row : table) {
    if (name == row.name || (row.also != nullptr && name == row.also)) {
      return &row;
    }
  }
  return nullptr;
}

std::int64_t setting_number(std::string_view text) {
  if (text.starts_with('L')) text.remove_prefix(1);
  const auto value = parse_number(text);
  CHECK(value.has_value());
  return *value;
}

std::vector<std::string> setting_list(std::string_view text) {
  std::vector<std::string> parts;
  while (!text.empty()) {
    std::size_t at = std::min(text.find(','), text.size());
    std::string_view part = text.substr(0, at);
    while (!part.empty() && part.front() == ' ') part.remove_prefix(1);
    while (!part.empty() && part.back() == ' ') part.remove_suffix(1);
    if (!part.empty()) parts.emplace_back(part);
    text.remove_prefix(std::min(at + 1, text.size()));
  }
  return parts;
}

std::string settings_page() {
  std::string page =
      "# Settings\n\n"
      "Every setting, as the table in "
      "[tools/settings.cc](../tools/settings.cc) "
      "has it; a\ntest holds this page equal to the table and writes a new one "
      "where it differs\n(`test_tools --gtest_filter='Settings.*'`). "
      "[operating.md](operating.md#settings) says\nwhere values come from, and "
      "more of those that one sets first. A setting with \"no\neffect yet\" is "
      "checked and shown, and no part of this version reads it. Where a\n"
      "setting has two names, either sets it.\n\n"
      "| setting | values | default | read by | what it does |\n"
      "|---|---|---|---|---|\n";
  for (const auto& row : kTable) page += line_of(row);
  return page;
}

}  // namespace machina
