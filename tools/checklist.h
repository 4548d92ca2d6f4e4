// tools/checklist.h
//
// The production checklist: what to have right before others depend on a
// server, one line per item. `machina doctor --profile prod` prints it.
//
//   K1  Every item is in every list, whatever the settings: an item that has no
//       part here (this version has none, nothing runs yet) says N/A, and never
//       anything else.
//   K2  Each other item can be made to say WARN or FAIL by one setting or one
//       fact, and each that production must have, FAIL;
//       tests/tools/checklist_test.cc does exactly that, for each.
//   K3  What is WARN or FAIL names what to change.
//   K4  What was done is believed by what its record says, never by a file's
//       time.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tools/config.h"

namespace machina {

enum class Verdict : std::uint8_t { pass, warn, fail, none };

struct Check {
  std::string name;  // stable: scripts may look for it
  Verdict verdict = Verdict::pass;
  std::string what;    // what was found
  std::string remedy;  // K3; empty with PASS and N/A
};

// What a record of something that was done says.
struct Evidence {
  std::int64_t ago_s = -1;  // -1: there is no record, or none that counts
  std::string problem;      // why a record that is there does not count
};

// What is looked at beside the settings.
struct ProductionFacts {
  // The profile that a server gets by itself: doctor is told another one; and
  // that of the server that runs, or empty.
  std::string configured_profile, running_profile;
  // Of the server that runs, which the settings of the list are then: what it
  // has otherwise than the configuration, "NAME=value (configured: other)".
  std::vector<std::string> running_differs;
  bool running_is_open = false;  // it asks for no credential
  std::int64_t uid = 0;  // of the server that runs, else of whoever asks
  bool root_there = false;
  std::string root_fault;  // who could lead it elsewhere (tools/trust.h)
  std::int64_t root_owner = 0;
  int root_mode = 0;           // permission bits
  bool root_is_mount = false;  // a file system of its own
  // Other file systems that are mounted below it.
  std::vector<std::string> mounts_below;
  std::string file_system;
  bool file_system_trusted = true;
  std::uint64_t disk_free_bytes = 0, disk_bytes = 0;
  // Of the server that runs: its disk level ("ok", "soft", ..), what it says of
  // that, and the bounds that it goes by; empty and 0: not known.
  std::string disk_level, disk_says;
  std::uint64_t disk_soft_bytes = 0, disk_hard_bytes = 0;
  int level = -1;  // what a sandbox reached here; -1: none could be made
  std::string level_why;
  bool server_runs = false;
  bool supervised = false;  // by systemd
  // Of the server that runs: what its standard error is ("/dev/null",
  // "/dev/pts/0", a file, "pipe:[..]"), or empty.
  std::string log_goes_to;
  // Of MACHINA_LOG_FILE: why it cannot be written or rotated, or empty; and the
  // bytes of it and those it was renamed to.
  std::string log_problem;
  std::uint64_t log_bytes = 0;
  // A request with an id of ours: whether the answer had it, and the log (where
  // that is a file). -1: not looked at.
  int request_id_echoed = -1, request_id_logged = -1;
  bool metrics_answer = false;      // of the server that runs
  std::int64_t scraped_ago_s = -1;  // -1: not known, or never
  bool log_begun = false;  // there is a log that could be checked and saved
  Evidence verified, backup;
};

constexpr std::int64_t kVerifyEveryS = 8 * 86'400;  // weekly, and a day's grace
constexpr std::int64_t kBackupEveryS = 2 * 86'400;
constexpr int kTooOld = 4;  // times as long ago: no longer done at all

std::vector<Check> production_checklist(const Config& config,
                                        const ProductionFacts& facts);
// Whether one of them is FAIL.
bool any_failed(const std::vector<Check>& checks);
const char* name(Verdict verdict);  // PASS, WARN, FAIL, N/A

}  // namespace machina
