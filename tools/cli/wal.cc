// wal verify and wal inspect: the log at rest, read and never written.

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <iostream>
#include <nlohmann/json.hpp>

#include "queue/base/rfc3339.h"
#include "queue/base/utf8.h"
#include "queue/verify/verify.h"
#include "server/auth/signature.h"
#include "tools/cli/cli.h"
#include "tools/cli/show.h"
#include "tools/ops.h"
#include "tools/root.h"
#include "tools/trust.h"

namespace machina::cli {
namespace {

using Json = nlohmann::ordered_json;
using std::chrono::steady_clock;

constexpr int kDamaged = 65;
constexpr int kNoRoot = 3;
constexpr int kIoFailed = 74;
constexpr int kInUse = 75;
constexpr std::size_t kValueShownMax = 200;

int exit_for(const Error& error) {
  switch (error.code) {
    case Code::not_found:
      return kNoRoot;
    case Code::conflict:
      return kInUse;
    case Code::corrupt:
    case Code::newer:
      return kDamaged;
    case Code::invalid:
      return kUsage;
    default:
      return kIoFailed;
  }
}

// <root>/queue, or why not.
Result<std::string> queue_dir(const Settings& settings, std::string* root) {
  auto config = load(settings);
  if (!config) return Error{Code::invalid, ""};  // said already
  const std::string& named = config->typed().root;
  if (auto ok = check_trusted("MACHINA_ROOT", named, true); !ok) {
    return ok.error();
  }
  std::string socket = root_socket(named);
  *root = socket.substr(0, socket.rfind('/'));
  struct stat info {};
  if (::stat(root->c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    return Error{Code::not_found,
                 "there is no root " + *root + " (--root, MACHINA_ROOT)"};
  }
  std::string dir = *root + "/queue";
  if (::stat(dir.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    return Error{Code::not_found, *root +
                                      " is no root of a server: it has no "
                                      "directory queue (--root, "
                                      "MACHINA_ROOT)"};
  }
  return dir;
}

// How far a long run is, on stderr: never in the first two seconds.
class Progress {
 public:
  explicit Progress(std::string what) : what_(std::move(what)) {}
  ~Progress() {
    if (line_ && terminal_) std::cerr << "\r\033[K";
  }
  void operator()(std::uint64_t done, std::uint64_t of) {
    auto now = steady_clock::now();
    auto pause = std::chrono::milliseconds(!line_      ? 2000
                                           : terminal_ ? 500
                                                       : 10'000);
    if (of == 0 || now - last_ < pause) return;
    last_ = now;
    line_ = true;
    std::cerr << (terminal_ ? "\r" : "") << what_ << ": "
              << static_cast<int>(100.0 * static_cast<double>(done) /
                                  static_cast<double>(of))
              << " %" << (terminal_ ? " " : "\n") << std::flush;
  }

 private:
  std::string what_;
  bool terminal_ = ::isatty(2) != 0;
  bool line_ = false;
  steady_clock::time_point last_ = steady_clock::now();
};

Json finding_json(const LogFinding& f) {
  Json json = {{"file", f.file}, {"offset", f.offset}};
  json["first_lsn"] = f.first ? Json(f.first) : Json(nullptr);
  json["last_lsn"] = f.last ? Json(f.last) : Json(nullptr);
  json["what"] = f.what;
  json["stops_start"] = f.stops_start;
  return json;
}

struct Replayed {
  bool tried = false;
  ReplayReport report;
  std::string failed;  // it did not come to its end: why
};

// Of a process that may stop at a CHECK.
std::string last_line(int fd) {
  std::string text(65536, '\0');
  off_t size = ::lseek(fd, 0, SEEK_END);
  off_t from = std::max<off_t>(0, size - static_cast<off_t>(text.size()));
  ssize_t got = ::pread(fd, text.data(), text.size(), from);
  text.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.substr(text.rfind('\n') + 1);
}

[[noreturn]] void replay_child(const std::string& dir, const LogReport& report,
                               int out, int err) {
  rlimit none{0, 0};
  ::setrlimit(RLIMIT_CORE, &none);  // a core would hold what jobs hold
  int terminal = ::dup(2);
  Progress progress("replaying");
  auto replayed = replay_log(dir, report, [&](auto done, auto of) {
    ::dup2(terminal, 2);
    progress(done, of);
    ::dup2(err, 2);
  });
  Json json;
  if (!replayed) {
    json["failed"] = replayed.error().what;
  } else {
    json["live_jobs"] = replayed->live_jobs;
    json["running"] = replayed->running;
    json["records"] = replayed->records;
    json["findings"] = Json::array();
    for (const LogFinding& f : replayed->findings) {
      json["findings"].push_back({{"file", f.file},
                                  {"offset", f.offset},
                                  {"first", f.first},
                                  {"last", f.last},
                                  {"what", f.what},
                                  {"stops", f.stops_start}});
    }
  }
  std::string text = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  for (std::size_t at = 0; at < text.size();) {
    ssize_t n = ::write(out, text.data() + at, text.size() - at);
    if (n <= 0) break;
    at += static_cast<std::size_t>(n);
  }
  ::_exit(0);
}

// In a process of its own: records that are sound and yet impossible stop it.
Replayed replay(const std::string& dir, const LogReport& report) {
  Replayed replayed;
  replayed.tried = true;
  int ends[2];
  int err = ::memfd_create("machina-replay", MFD_CLOEXEC);
  if (err < 0 || ::pipe2(ends, O_CLOEXEC) != 0) {
    replayed.failed = "no memory for a process that replays";
    return replayed;
  }
  std::cout.flush();
  pid_t child = ::fork();
  if (child == 0) {
    ::dup2(err, 2);
    replay_child(dir, report, ends[1], err);
  }
  ::close(ends[1]);
  std::string text;
  char bytes[65536];
  ssize_t n = 0;
  while (child > 0 && ((n = ::read(ends[0], bytes, sizeof(bytes))) > 0 ||
                       (n < 0 && errno == EINTR))) {
    if (n > 0) text.append(bytes, static_cast<std::size_t>(n));
  }
  ::close(ends[0]);
  int status = 0;
  while (child > 0 && ::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  Json json = Json::parse(text, nullptr, false);
  if (child < 0) {
    replayed.failed = "no process to replay in";
  } else if (!json.is_object()) {
    std::string said = last_line(err);
    replayed.failed = "the replay stopped" + (said.empty() ? "" : ": " + said);
  } else if (json.contains("failed")) {
    replayed.failed = json["failed"].get<std::string>();
  } else {
    replayed.report.live_jobs = json["live_jobs"];
    replayed.report.running = json["running"];
    replayed.report.records = json["records"];
    for (const Json& f : json["findings"]) {
      replayed.report.findings.push_back({f["file"], f["offset"], f["first"],
                                          f["last"], f["what"], f["stops"]});
    }
  }
  ::close(err);
  return replayed;
}

std::string lsns(Lsn first, Lsn last) {
  if (first == 0) return "";
  if (last <= first) return std::to_string(first);
  return std::to_string(first) + ".." + std::to_string(last);
}

const char* verdict_of(const LogReport& report) {
  if (!report.findings.empty()) return "damaged";
  return report.torn_bytes != 0 ? "torn" : "whole";
}

void print_json(const std::string& root, const LogReport& report,
                const Replayed& replayed) {
  Json json = {{"root", root},
               {"verdict", verdict_of(report)},
               {"starts", report.starts()},
               {"shut_down_clean", report.clean_end},
               {"first_lsn", report.first},
               {"last_lsn", report.last},
               {"durable_lsn", report.durable},
               {"checkpoint_lsn", report.checkpoint},
               {"records", report.records},
               {"bytes", report.bytes},
               {"torn_bytes", report.torn_bytes}};
  auto lsn_or_null = [](Lsn lsn) { return lsn ? Json(lsn) : Json(nullptr); };
  json["torn_first_lsn"] = lsn_or_null(report.torn_first);
  json["torn_last_lsn"] = lsn_or_null(report.torn_last);
  // Nothing behind the last batch could vouch for it: verify.h.
  json["torn_acknowledged"] =
      report.torn_bytes ? Json("unknown") : Json(nullptr);
  if (replayed.tried && replayed.failed.empty()) {
    json["replayed_records"] = replayed.report.records;
    json["live_jobs"] = replayed.report.live_jobs;
    json["running_jobs"] = replayed.report.running;
  } else {
    json["replayed_records"] = json["live_jobs"] = json["running_jobs"] =
        nullptr;
  }
  json["files"] = Json::array();
  for (const LogFile& f : report.files) {
    bool has = f.kind == "checkpoint" ? f.first != 0 : f.records != 0;
    json["files"].push_back({{"file", f.name},
                             {"kind", f.kind},
                             {"first_lsn", has ? Json(f.first) : Json(nullptr)},
                             {"last_lsn", has ? Json(f.last) : Json(nullptr)},
                             {"records", f.records},
                             {"bytes", f.bytes},
                             {"verdict", name(f.verdict)},
                             {"note", f.note}});
  }
  json["damage"] = Json::array();
  for (const LogFinding& f : report.findings) {
    json["damage"].push_back(finding_json(f));
  }
  std::cout << json.dump(2, ' ', false, Json::error_handler_t::replace) << "\n";
}

void print_text(const LogReport& report, const Replayed& replayed) {
  Table table({"file", "kind", "lsn", "records", "bytes", "verdict", ""});
  for (const LogFile& f : report.files) {
    bool has = f.kind == "checkpoint" ? f.first != 0 : f.records != 0;
    table.add({harmless(f.name), f.kind, has ? lsns(f.first, f.last) : "-",
               f.kind == "segment" ? std::to_string(f.records) : "-",
               std::to_string(f.bytes), std::string(name(f.verdict)),
               harmless(f.note)});
  }
  std::cout << table.text();
  for (const LogFinding& f : report.findings) {
    std::string lsn = lsns(f.first, f.last);
    std::cout << "damage: " << harmless(f.file) << ": offset " << f.offset
              << (lsn.empty() ? "" : ", lsn " + lsn) << ": " << harmless(f.what)
              << "\n";
  }
  std::cout << "log: " << report.records << " records, " << report.bytes
            << " bytes; ends at lsn " << report.last << ", durable to "
            << report.durable << ", checkpoint at " << report.checkpoint
            << "\n";
  if (replayed.tried && replayed.failed.empty()) {
    std::cout << "replay: " << replayed.report.records << " records, "
              << replayed.report.live_jobs << " live jobs ("
              << replayed.report.running << " running), all invariants hold\n";
  } else if (!replayed.tried) {
    std::cout << "replay: not tried, because a start would be refused\n";
  }
  std::cout << "verdict: ";
  if (report.findings.empty()) {
    std::cout << (report.torn_bytes != 0 ? "torn" : "whole") << "\n";
    if (report.torn_bytes != 0) {
      std::cout
          << "torn tail: " << report.torn_bytes << " bytes from lsn "
          << lsns(report.torn_first, report.torn_last)
          << ", which a start drops. If the crash cut it off, nobody was told "
             "of it and nothing is lost; if it was whole and has been damaged "
             "since, it may have been acknowledged. The log cannot tell which "
             "(docs/operating.md, Damage)\n";
    }
  } else {
    std::cout << "damaged in " << report.findings.size()
              << (report.findings.size() == 1 ? " place; " : " places; ")
              << (report.starts() ? "a server would start, unless its "
                                    "history still needs what is damaged"
                                  : "a server would refuse to start")
              << "; nothing was changed (docs/operating.md, Damage)\n";
  }
}

// What was checked, as a record that doctor believes: <ROOT>/ops/wal.verified,
// and of a copy of ROOT's log <ROOT>/ops/backup.taken.
Result<void> record_verified(const std::string& to, const std::string& root,
                             const std::string& dir, const LogReport& report) {
  // As it was named: what a link leads to says nothing of whose the link is.
  if (auto ok = check_trusted("--record", to, true); !ok) return ok;
  char* real = ::realpath(to.c_str(), nullptr);
  if (real == nullptr) {
    return Error{Code::invalid,
                 "--record: " + to + ": " + std::strerror(errno)};
  }
  const std::string target = real;
  std::free(real);
  auto checked = log_identity(dir);
  if (!checked) return checked.error();
  auto live = log_identity(target + "/queue");
  if (!live) return Error{Code::invalid, "--record: " + live.error().what};
  if (live->uuid != checked->uuid) {
    return Error{Code::invalid, "--record: " + target +
                                    " has another log than " + root +
                                    ", which was checked"};
  }
  std::string files;
  for (const LogFile& f : report.files) {
    files += f.name + " " + std::to_string(f.bytes) + " " +
             std::to_string(f.records) + " " + std::to_string(f.first) + " " +
             std::to_string(f.last) + "\n";
  }
  const HexDigest digest = Sha256::of(checked->uuid + "\n" + files);
  const Json json = {{"ts", rfc3339_now()},
                     {"root", root},
                     {"log_uuid", checked->uuid},
                     {"verdict", verdict_of(report)},
                     {"first_lsn", report.first},
                     {"last_lsn", report.last},
                     {"durable_lsn", report.durable},
                     {"records", report.records},
                     {"bytes", report.bytes},
                     {"digest", std::string(digest.data(), digest.size())}};
  const std::string text = json.dump(1) + "\n";
  if (auto ok = write_report(target, "wal.verified", text); !ok) return ok;
  struct stat here {
  }, there{};
  const bool copy =
      ::stat(root.c_str(), &here) == 0 && ::stat(target.c_str(), &there) == 0 &&
      (here.st_dev != there.st_dev || here.st_ino != there.st_ino);
  return copy ? write_report(target, "backup.taken", text) : Result<void>();
}

int verify(const Settings& settings, const std::string& record) {
  std::string root;
  auto dir = queue_dir(settings, &root);
  if (!dir) {
    return dir.error().what.empty()
               ? kUsage
               : fail(exit_for(dir.error()), dir.error().what);
  }
  struct stat info {};
  if (::stat((*dir + "/wal").c_str(), &info) != 0 && errno == ENOENT) {
    if (settings.json) {
      print_json(root, LogReport{}, Replayed{});
    } else {
      std::cout << root << ": no log has begun here; nothing to verify\n";
    }
    if (!record.empty()) {
      return fail(kUsage, "--record: there is nothing to note of " + root);
    }
    return kOk;
  }
  // No server may start underneath, nor run: its files come and go.
  auto hold = hold_log(*dir);
  if (!hold) {
    bool in_use = hold.error().code == Code::conflict;
    return fail(exit_for(hold.error()),
                hold.error().what +
                    (in_use ? "; stop it first, or verify a copy of the root "
                              "(machina wal inspect reads beside a server)"
                            : ""));
  }
  Result<LogReport> report = [&] {
    Progress progress("verifying");
    return verify_files(*dir, [&](auto done, auto of) { progress(done, of); });
  }();
  if (!report) return fail(exit_for(report.error()), report.error().what);
  Replayed replayed;
  if (report->starts()) {
    replayed = replay(*dir, *report);
    for (const LogFinding& f : replayed.report.findings) {
      report->findings.push_back(f);
    }
    if (!replayed.failed.empty()) {
      report->findings.push_back({"wal", 0, report->checkpoint + 1,
                                  report->last, replayed.failed, true});
    }
  }
  if (settings.json) {
    print_json(root, *report, replayed);
  } else {
    print_text(*report, replayed);
  }
  if (!report->findings.empty()) return kDamaged;
  if (record.empty()) return kOk;
  hold->reset();  // the record may be of this very root
  auto kept = record_verified(record, root, *dir, *report);
  return kept ? kOk : fail(exit_for(kept.error()), kept.error().what);
}

// --- inspect ---------------------------------------------------------------

struct InspectOptions {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  std::string file, job;
  InspectFilter filter;
};

Json value_of(const RecordField& field) {
  switch (field.type) {
    case RecordField::Type::number:
      return Json::parse(field.value);
    case RecordField::Type::time:
      return rfc3339(std::stoll(field.value));
    case RecordField::Type::json: {
      Json value = Json::parse(field.value, nullptr, false);
      return value.is_discarded() ? Json(field.value) : value;
    }
    case RecordField::Type::text:
      break;
  }
  return field.value;
}

bool print_record_json(const RecordLine& line) {
  Json json = {
      {"lsn", line.lsn},
      {"time", line.time ? Json(rfc3339(line.time)) : Json(nullptr)},
      {"type", line.type},
      {"job", line.id.is_nil() ? Json(nullptr) : Json(to_string(line.id))},
      {"file", line.file},
      {"offset", line.offset},
      {"bytes", line.bytes}};
  for (const RecordField& field : line.fields) {
    json[field.name] = value_of(field);
  }
  std::cout << harmless_json(
                   json.dump(-1, ' ', false, Json::error_handler_t::replace))
            << "\n";
  return std::cout.good();
}

bool print_record(const RecordLine& line, bool whole) {
  std::cout << line.lsn << " " << (line.time ? rfc3339(line.time) : "-") << " "
            << line.type;
  if (!line.id.is_nil()) std::cout << " " << to_string(line.id);
  for (const RecordField& field : line.fields) {
    std::string value = field.type == RecordField::Type::time
                            ? rfc3339(std::stoll(field.value))
                            : field.value;
    if (!whole && value.size() > kValueShownMax) {
      value = std::string(utf8_head(value, kValueShownMax)) + "...";
    }
    bool plain = value.find_first_of(" \t\n\r\"") == value.npos;
    if (!plain && field.type == RecordField::Type::text) {
      value = Json(value).dump(-1, ' ', false, Json::error_handler_t::replace);
    }
    std::cout << " " << harmless(field.name) << "=" << harmless(value);
  }
  std::cout << " bytes=" << line.bytes << "\n";
  return std::cout.good();
}

// The one job of these files whose id has that part.
Result<JobId> whole_job(const std::string& path, const std::string& part) {
  constexpr std::size_t kShown = 5;
  std::vector<std::string> found;
  auto end = inspect_log(path, InspectFilter(), [&](const RecordLine& line) {
    if (line.id.is_nil()) return true;
    std::string id = to_string(line.id);
    if (is_part_of_id(part, id) &&
        std::find(found.begin(), found.end(), id) == found.end()) {
      found.push_back(std::move(id));
    }
    return found.size() <= kShown;
  });
  if (!end) return end.error();
  if (found.size() == 1) return *parse_job_id(found.front());
  std::string candidates;
  for (const auto& id : found)
    candidates += (candidates.empty() ? "" : ", ") + id;
  return Error{Code::invalid,
               found.empty() ? "--job: no job of these records has an id that "
                               "begins or ends with \"" +
                                   part + "\""
                             : "--job: \"" + part +
                                   "\" is a part of several "
                                   "ids: " +
                                   candidates + "; give more of it"};
}

int inspect(InspectOptions& options) {
  InspectFilter& filter = options.filter;
  if (!options.job.empty()) {
    filter.job = parse_job_id(whole_id(options.job));
    if (!filter.job && !is_short_id(options.job)) {
      return fail(kUsage, "--job: " + harmless(options.job) + " is no job id");
    }
  }
  if (filter.from > filter.to) {
    return fail(kUsage, "--from " + std::to_string(filter.from) +
                            " is behind --to " + std::to_string(filter.to));
  }
  std::string root, path = options.file;
  if (path.empty()) {
    auto dir = queue_dir(*options.settings, &root);
    if (!dir) {
      return dir.error().what.empty()
                 ? kUsage
                 : fail(exit_for(dir.error()), dir.error().what);
    }
    path = *dir;
    struct stat info {};
    if (::stat((path + "/wal").c_str(), &info) != 0 && errno == ENOENT) {
      return fail(kOk, root + ": no log has begun here");
    }
  } else if (!path.ends_with(".seg")) {
    return fail(kUsage, harmless(path) +
                            " is no segment (....seg); without a file all of "
                            "--root is shown");
  }
  if (!options.job.empty() && !filter.job) {
    auto id = whole_job(path, options.job);
    if (!id) return fail(exit_for(id.error()), id.error().what);
    filter.job = *id;
  }
  auto end = inspect_log(path, filter, [&](const RecordLine& line) {
    return options.settings->json ? print_record_json(line)
                                  : print_record(line, filter.payload);
  });
  std::cout.flush();
  if (!end) return fail(exit_for(end.error()), end.error().what);
  for (const std::string& note : end->notes) fail(kOk, harmless(note));
  return end->damaged ? kDamaged : kOk;
}

}  // namespace

void add_wal(Verb& app) {
  Verb wal =
      app.add_verb("wal", "Look at the log's files; changes none of them");
  wal.require_verb();

  auto settings = std::make_shared<Settings>();
  Verb verb =
      wal.add_verb("verify", "Check every byte of the log of a stopped server");
  add_setting(verb, settings, "--root", "MACHINA_ROOT", "the server's root");
  add_common(verb, settings);
  auto record = std::make_shared<std::string>();
  verb.add_option("--record", *record,
                  "note in this root's ops/ what was checked, where it is "
                  "whole: doctor looks there")
      .shown_as("ROOT");
  verb.run([settings, record] { return verify(*settings, *record); });

  auto options = std::make_shared<InspectOptions>();
  verb = wal.add_verb("inspect", "Show what the log's records say");
  InspectFilter& filter = options->filter;
  verb.add_option("file", options->file, "one segment; otherwise all");
  add_setting(verb, options->settings, "--root", "MACHINA_ROOT",
              "the server's root; it may run");
  verb.add_option("--from", filter.from, "the first lsn")
      .shown_as("LSN")
      .range(1, std::int64_t{1} << 62);
  verb.add_option("--to", filter.to, "the last lsn")
      .shown_as("LSN")
      .range(1, std::int64_t{1} << 62);
  verb.add_option("--job", options->job,
                  "records of this job; a part of its id that no other in the "
                  "log has will do")
      .shown_as("ID");
  verb.add_option("--kind", filter.kind, "records of jobs of this kind");
  verb.add_option("--request-id", filter.request_id,
                  "records of jobs that this request submitted");
  verb.add_option("--type", filter.type, "records of this type")
      .one_of({"enqueue", "grant", "end", "retry", "release", "block",
               "unblock", "cancel", "promote", "forget", "clock"});
  verb.add_option("--limit", filter.limit, "so many records")
      .range(1, 1'000'000'000);
  verb.add_flag("--payload", filter.payload,
                "with payloads, results and other data of jobs");
  add_common(verb, options->settings);
  verb.run([options] { return inspect(*options); });
}

}  // namespace machina::cli
