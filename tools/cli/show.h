// tools/cli/show.h
//
// What the verbs about jobs and patches share: reading members of an answer,
// pages of a list, ids that are given in part, waiting for an end, and a diff
// as a person reads it.

#pragma once

#include <chrono>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "tools/cli/cli.h"

namespace machina::cli {

using Json = nlohmann::ordered_json;

// A member as text; empty where it is missing or null.
std::string text_of(const Json& object, const char* name);
// "label       value", made harmless; nothing where the value is empty.
void show_line(const char* name, const std::string& value);
bool is_final(const std::string& state);
// "3 passed, 1 failed" of the result of a test run; empty where it has none.
std::string counts_of(const Json& run);

// A unified diff, line by line, made harmless, each line after `indent`. In
// colours where standard output is a terminal that wants them (NO_COLOR, TERM).
void show_diff(const std::string& diff, const std::string& indent);
bool wants_color();

// "@FILE", "@-" for standard input, or the text itself. At most 4 MiB;
// `option` is named in an error.
Result<std::string> read_argument(const std::string& option,
                                  const std::string& given);
// All of `file` ("-": standard input), within the same bound.
Result<std::string> read_bounded(const std::string& option,
                                 const std::string& file);

// GET `path` (with a query), page after page, until `limit` entries of `member`
// are there or the list ends: a page may be short or empty before the end. The
// answer is one page with all of them, `cursor` and the sum of `scanned`.
// False: *exit says why not.
bool fetch_pages(const Settings& settings, const std::string& path,
                 const char* member, int limit, const std::string& cursor,
                 Json* page, int* exit);

// At least so many characters of an id, from its beginning or its end, stand
// for the whole id where no other has them.
constexpr std::size_t kShortIdMin = 4;
// So many entries are looked at for them.
constexpr int kShortIdLookMax = 20'000;
// Whether it has so many of an id's digits, and not all of them.
bool is_short_id(const std::string& text);
bool is_part_of_id(const std::string& part, const std::string& id);
// As the server writes it, where `text` has all digits of an id; else `text`.
std::string whole_id(const std::string& text);
// Makes *id whole, if it is a part of one: of a job, or with `patches` of a
// patch. A text that can be no part is left as it is, for the server to refuse.
// False: there is none or there are several, and *exit says so. With `none`
// it is set instead where there is none, and the answer is true.
bool resolve_id(const Settings& settings, bool patches, std::string* id,
                int* exit, bool* none = nullptr);

// What is kept of a patch beyond its job; the exit code. patches.cc.
int show_patch_record(const Settings& settings, const std::string& id);

// On standard error, where the job says that nobody who is connected serves
// its kind.
void warn_not_served(const Json& job);

// Asks for the job until it ends, `deadline` passes or `seen` returns false;
// the last answer stays in *last. `seen`, where it is given, is shown the job
// at least once a second. A server that is away for a moment is asked again.
int wait_for_end(const Settings& settings, const std::string& id,
                 std::chrono::steady_clock::time_point deadline,
                 std::string* last,
                 const std::function<bool(const Json&)>& seen = nullptr);

}  // namespace machina::cli
