// tools/cli/cli.h
//
// What the verbs share: exit codes, configuration, and how an answer is shown.
// Each add_*() hangs one verb, or a family of them, on the program's.

#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "queue/base/result.h"
#include "tools/cli/client.h"
#include "tools/cli/verb.h"
#include "tools/config.h"

namespace machina::cli {

constexpr int kOk = 0;
constexpr int kNotSucceeded = 1;  // the job did not succeed
constexpr int kUsage = 2;         // or configuration
constexpr int kUnreachable = 3;
constexpr int kRefused = 4;  // by the server

void add_serve(Verb& app);
void add_pool(Verb& app);
void add_worker(Verb& app);
// detect, kill, start, restart, healthcheck
void add_ops(Verb& app);
void add_doctor(Verb& app);
void add_version(Verb& app);
void add_sign(Verb& app);
// wal verify, wal inspect
void add_wal(Verb& app);
// enqueue, get, list, logs, cancel, retry, unblock
void add_job_verbs(Verb& app);
// scale, stats
void add_operator_verbs(Verb& app);
// patches list|show|ancestry|search
void add_patch_verbs(Verb& app);
// patch submit|show
void add_patch_submit(Verb& app);
void add_top(Verb& app);

// The options of a verb that fill configuration. Lives as long as the parser.
struct Settings {
  std::map<std::string, std::string> overrides;  // by variable name
  std::string file;                              // --config
  bool json = false;
};
// Adds `flag` (such as "--root"), which sets `variable`.
void add_setting(Verb verb, std::shared_ptr<Settings> settings,
                 const std::string& flag, const std::string& variable,
                 const std::string& help);
void add_common(Verb verb, std::shared_ptr<Settings> settings);
// --server, --root, --config, --json
void add_client_settings(Verb verb, std::shared_ptr<Settings> settings);

// Adds an option that takes a span of time: "5s", "10m", "1h30m", or a plain
// number of `unit` ("ms" or "s"). `take` gets milliseconds.
void add_duration(Verb verb, const std::string& names, std::int64_t min_ms,
                  std::int64_t max_ms, const std::string& unit,
                  std::function<void(std::int64_t ms)> take,
                  const std::string& help);

// This process's environment, as Config::load wants it.
std::vector<std::string> environment();
// Loads; on failure says why on stderr.
Result<Config> load(const Settings& settings);
// The path of this program.
std::string self_exe();

int fail(int exit, const std::string& what);  // "machina: what", then `exit`

// Loads, connects and asks. On failure says why on stderr and leaves the exit
// code in *exit; then the answer is empty.
struct Asked {
  bool ok = false;
  Client::Answer answer;
};
Asked ask(const Settings& settings, const Client::Request& request, int* exit);
// Says a refusal (status >= 400): problem JSON to stdout with --json, else one
// line that says what to do next. Returns kRefused.
int show_refusal(const Settings& settings, const Client::Answer& answer);

// `now` and `then` as people read them.
std::string readable_time(const std::string& rfc3339);   // local, with an age
std::string readable_clock(const std::string& rfc3339);  // local, short
std::int64_t parse_time_ms(const std::string& text);     // -1: no such time
std::string readable_ms(std::int64_t ms);

// Text that somebody else wrote, made harmless for a terminal: control
// characters other than newline and tab, marks of writing direction and
// characters of no width are shown as escapes (\u202e), bytes that are no UTF-8
// as \x9b. All that verbs show of others goes through here.
std::string harmless(std::string_view text);
// The same for JSON, which stays the same JSON: escapes within its strings.
std::string harmless_json(std::string_view json);
// The first line, at most `max` bytes of whole characters.
std::string first_line(std::string_view text, std::size_t max);

// Columns padded to their widest cell; the last is left ragged.
class Table {
 public:
  explicit Table(std::vector<std::string> head);
  void add(std::vector<std::string> row);
  std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace machina::cli
