#include "tools/cli/show.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

namespace machina::cli {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr std::size_t kArgumentBytesMax = 4u << 20;
constexpr int kWaitStepSeconds = 20;
constexpr int kPageMax = 1000;
constexpr std::size_t kCandidatesShown = 5;

// Without dashes, in lower case; empty where `text` can be no part of an id.
std::string hex_of(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '-') continue;
    if (c >= 'A' && c <= 'F') c = static_cast<char>(c + 32);
    if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) return "";
    out += c;
  }
  return out;
}

}  // namespace

bool is_short_id(const std::string& text) {
  const std::size_t size = hex_of(text).size();
  return size >= kShortIdMin && size < 32;
}

bool is_part_of_id(const std::string& part, const std::string& id) {
  const std::string digits = hex_of(part), hex = hex_of(id);
  return hex.starts_with(digits) || hex.ends_with(digits);
}

std::string whole_id(const std::string& text) {
  std::string id = hex_of(text);
  if (id.size() != 32) return text;
  for (std::size_t at : {20, 16, 12, 8}) id.insert(at, "-");
  return id;
}

std::string text_of(const Json& object, const char* name) {
  if (!object.is_object()) return "";
  auto found = object.find(name);
  if (found == object.end() || found->is_null()) return "";
  return found->is_string() ? found->get<std::string>() : found->dump();
}

void show_line(const char* name, const std::string& value) {
  if (value.empty()) return;
  std::string label(name);
  label.resize(std::max<std::size_t>(label.size() + 1, 12), ' ');
  std::cout << label << harmless(value) << "\n";
}

bool is_final(const std::string& state) {
  return state == "succeeded" || state == "failed" || state == "cancelled" ||
         state == "dead";
}

std::string counts_of(const Json& run) {
  std::string line;
  if (!run.is_object()) return line;
  for (const char* name :
       {"passed", "failed", "errors", "missing", "flaky", "skipped"}) {
    auto found = run.find(name);
    if (found == run.end() || !found->is_number_integer()) continue;
    const bool shown = *found != 0 || std::string_view(name) == "passed";
    if (shown) line += (line.empty() ? "" : ", ") + found->dump() + " " + name;
  }
  return line;
}

bool wants_color() {
  bool color = true, term = false;
  for (const auto& entry : environment()) {
    if (entry.starts_with("NO_COLOR=") && entry.size() > 9) color = false;
    if (entry.starts_with("TERM=")) term = entry != "TERM=dumb";
  }
  return color && term;
}

void show_diff(const std::string& diff, const std::string& indent) {
  const bool color = ::isatty(STDOUT_FILENO) != 0 && wants_color();
  std::istringstream lines(diff);
  for (std::string line; std::getline(lines, line);) {
    const char* paint = nullptr;
    if (line.starts_with("diff ") || line.starts_with("--- ") ||
        line.starts_with("+++ ")) {
      paint = "\x1b[1m";
    } else if (line.starts_with("@@")) {
      paint = "\x1b[36m";
    } else if (line.starts_with("+")) {
      paint = "\x1b[32m";
    } else if (line.starts_with("-")) {
      paint = "\x1b[31m";
    }
    const bool painted = color && paint != nullptr;
    std::cout << indent << (painted ? paint : "") << harmless(line)
              << (painted ? "\x1b[0m" : "") << "\n";
  }
}

Result<std::string> read_bounded(const std::string& option,
                                 const std::string& file) {
  std::ifstream stream;
  std::istream* from = &std::cin;
  if (file != "-") {
    stream.open(file, std::ios::binary);
    // A directory opens, and cannot be read.
    if (!stream || stream.peek() == std::char_traits<char>::eof()) {
      std::error_code error;
      if (!stream || std::filesystem::is_directory(file, error)) {
        return Error{Code::invalid, option + ": cannot read " + file};
      }
      stream.clear();
    }
    from = &stream;
  }
  std::string bytes(kArgumentBytesMax + 1, '\0');
  from->read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  bytes.resize(static_cast<std::size_t>(from->gcount()));
  if (bytes.size() > kArgumentBytesMax) {
    std::error_code unknown;
    const auto size = std::filesystem::file_size(file, unknown);
    return Error{
        Code::too_large,
        option + ": " + file + ": " +
            (unknown ? "more" : std::to_string(size) + " bytes, more") +
            " than " + std::to_string(kArgumentBytesMax) +
            " bytes; a patch's diff may be an artifact of another job "
            "instead (diff_artifact)"};
  }
  return bytes;
}

Result<std::string> read_argument(const std::string& option,
                                  const std::string& given) {
  if (!given.starts_with('@')) return given;
  return read_bounded(option, given.substr(1));
}

bool fetch_pages(const Settings& settings, const std::string& path,
                 const char* member, int limit, const std::string& cursor,
                 Json* page, int* exit) {
  *page = {{member, Json::array()}, {"cursor", nullptr}, {"scanned", 0}};
  Json& entries = (*page)[member];
  std::int64_t scanned = 0;
  std::string at = cursor;
  for (;;) {
    const int left = limit - static_cast<int>(entries.size());
    Client::Request request;
    request.path = path + (path.find('?') == path.npos ? "?" : "&") +
                   "limit=" + std::to_string(std::min(left, kPageMax));
    if (!at.empty()) request.path += "&cursor=" + url_escape(at);
    Asked asked = ask(settings, request, exit);
    if (!asked.ok) return false;
    Json part = Json::parse(asked.answer.body, nullptr, false);
    if (!part.is_object() || !part.contains(member) ||
        !part[member].is_array()) {
      *exit =
          fail(kRefused, std::string("the answer is not a list of ") + member);
      return false;
    }
    const bool any = !part[member].empty();
    for (auto& entry : part[member]) entries.push_back(std::move(entry));
    scanned += part.value("scanned", std::int64_t{0});
    const std::string next = text_of(part, "cursor");
    if (next.empty() || static_cast<int>(entries.size()) >= limit) {
      (*page)["cursor"] = part.contains("cursor") ? part["cursor"] : Json();
      (*page)["scanned"] = scanned;
      return true;
    }
    // Without this a fault of a server would be asked about for ever.
    if (!any && next == at) {
      *exit = fail(kRefused,
                   "the list does not go on: the server gave the cursor " + at +
                       " again, with an empty page");
      return false;
    }
    at = next;
  }
}

bool resolve_id(const Settings& settings, bool patches, std::string* id,
                int* exit, bool* none) {
  *id = whole_id(*id);
  if (!is_short_id(*id)) return true;
  const char* member = patches ? "patches" : "jobs";
  const char* name = patches ? "patch_id" : "id";
  std::vector<std::string> found;
  std::string cursor;
  int looked_at = 0;
  do {
    Json page;
    if (!fetch_pages(settings, std::string("/v1/") + member, member, kPageMax,
                     cursor, &page, exit)) {
      return false;
    }
    for (const auto& entry : page[member]) {
      const std::string whole = text_of(entry, name);
      if (is_part_of_id(*id, whole) &&
          std::find(found.begin(), found.end(), whole) == found.end()) {
        found.push_back(whole);
      }
    }
    looked_at += static_cast<int>(page[member].size());
    cursor = text_of(page, "cursor");
  } while (!cursor.empty() && looked_at < kShortIdLookMax &&
           found.size() <= kCandidatesShown);
  if (found.size() == 1 && cursor.empty()) {
    *id = found.front();
    return true;
  }
  if (found.empty() && none != nullptr) return *none = true;
  const std::string what = patches ? "patch" : "job";
  const std::string list = patches ? "machina patches list" : "machina list";
  if (found.empty()) {
    *exit =
        fail(kRefused,
             "no " + what + "'s id begins or ends with \"" + *id + "\"" +
                 (cursor.empty() ? ""
                                 : " among the " + std::to_string(looked_at) +
                                       " that were looked at") +
                 "; " + list + " shows the whole ids");
    return false;
  }
  std::string candidates;
  for (std::size_t i = 0; i < std::min(found.size(), kCandidatesShown); ++i) {
    candidates += (i == 0 ? "" : ", ") + found[i];
  }
  if (found.size() > kCandidatesShown) candidates += " and more";
  *exit = fail(kUsage,
               found.size() == 1
                   ? "\"" + *id + "\" may be " + candidates +
                         ", but there are more " + what + "s than the " +
                         std::to_string(looked_at) +
                         " that were looked at: give the whole id"
                   : "\"" + *id + "\" is a part of several ids: " + candidates +
                         "; give more of it, from its beginning or its end");
  return false;
}

void warn_not_served(const Json& job) {
  auto served = job.find("served");
  if (served == job.end() || !served->is_boolean() || served->get<bool>()) {
    return;
  }
  std::cerr << "machina: warning: no worker that is connected serves the kind "
            << harmless(text_of(job, "kind"))
            << "; the job waits until one comes (machina stats shows the "
               "workers)\n";
}

int wait_for_end(const Settings& settings, const std::string& id,
                 steady_clock::time_point deadline, std::string* last,
                 const std::function<bool(const Json&)>& seen) {
  auto config = load(settings);
  if (!config) return kUsage;
  auto client = Client::open(*config);
  if (!client) return fail(kUsage, client.error().what);
  auto away_since = steady_clock::time_point::max();
  while (steady_clock::now() < deadline) {
    auto asked_at = steady_clock::now();
    auto left =
        std::chrono::duration_cast<std::chrono::seconds>(deadline - asked_at);
    auto step =
        std::clamp<std::int64_t>(left.count(), 1, seen ? 1 : kWaitStepSeconds);
    Client::Request request;
    request.path = "/v1/jobs/" + url_escape(id);
    request.headers = {"Prefer: wait=" + std::to_string(step)};
    request.timeout_ms = static_cast<long>(step) * 1000 + 10'000;
    auto answer = (*client)->call(request);
    if (!answer) {
      if (away_since == steady_clock::time_point::max()) away_since = asked_at;
      if (asked_at - away_since > std::chrono::seconds(30)) {
        return fail(kUnreachable, answer.error().what);
      }
      std::this_thread::sleep_for(milliseconds(250));
      continue;
    }
    away_since = steady_clock::time_point::max();
    if (answer->status == 503) {
      std::this_thread::sleep_for(milliseconds(250));
      continue;
    }
    if (answer->status >= 400) return show_refusal(settings, *answer);
    *last = answer->body;
    Json job = Json::parse(answer->body, nullptr, false);
    if (seen && job.is_object() && !seen(job)) break;
    if (!job.is_object() || is_final(text_of(job, "state"))) break;
    if (steady_clock::now() - asked_at < milliseconds(100)) {
      std::this_thread::sleep_for(milliseconds(200));
    }
  }
  return kOk;
}

}  // namespace machina::cli
