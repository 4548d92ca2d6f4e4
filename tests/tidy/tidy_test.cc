// The tree tests itself: which folder may include which, one door per library,
// own header first, a README in every folder, no stray debug output.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "tests/support/places.h"

namespace {

namespace fs = std::filesystem;

const fs::path kTree = machina::kSourceDir;

struct Source {
  std::string path;  // relative to the tree
  std::vector<std::string> lines;
  struct Include {
    std::string name;
    bool quoted = false;
    std::size_t line = 0;
  };
  std::vector<Include> includes;
};

std::vector<std::string> read_lines(const fs::path& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

Source read_source(const fs::path& path) {
  static const std::regex kInclude(R"(^\s*#\s*include\s*([<"])([^>"]+)[>"])");
  Source source;
  source.path = fs::relative(path, kTree).string();
  source.lines = read_lines(path);
  for (std::size_t i = 0; i < source.lines.size(); ++i) {
    std::smatch match;
    if (std::regex_search(source.lines[i], match, kInclude)) {
      source.includes.push_back({match[2], match[1] == "\"", i + 1});
    }
  }
  return source;
}

std::vector<Source> sources_below(const std::vector<std::string>& folders) {
  std::vector<Source> sources;
  for (const auto& folder : folders) {
    if (!fs::exists(kTree / folder)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(kTree / folder)) {
      auto extension = entry.path().extension();
      if (extension == ".h" || extension == ".cc") {
        sources.push_back(read_source(entry.path()));
      }
    }
  }
  return sources;
}

const std::vector<std::string> kProduct = {"queue", "server", "workers",
                                           "tools"};

const std::vector<Source>& product() {
  static const auto sources = sources_below(kProduct);
  return sources;
}

bool starts(const std::string& text, const std::string& prefix) {
  return text.rfind(prefix, 0) == 0;
}

// The rooms, and which others each may include: house rules of
// docs/ARCHITECTURE.md. The queue's rooms stand for what they are named after.
const std::map<std::string, std::vector<std::string>> kRooms = {
    {"queue/base/", {}},
    {"queue/record/", {"queue/base/"}},
    {"queue/core/", {"queue/base/", "queue/record/"}},
    {"queue/wal/", {"queue/base/", "queue/record/"}},
    {"queue/history/", {"queue/base/", "queue/record/"}},
    {"queue/verify/",
     {"queue/base/", "queue/record/", "queue/core/", "queue/wal/"}},
    {"queue/shard/",
     {"queue/base/", "queue/record/", "queue/core/", "queue/wal/",
      "queue/history/"}},
    {"server/http/", {"queue/base/"}},
    {"server/auth/", {"queue/base/", "server/http/"}},
    {"server/api/",
     {"queue/base/", "queue/record/", "queue/core/", "queue/history/",
      "queue/shard/", "server/http/", "server/auth/"}},
    {"tools/", {"queue/base/"}},
    {"workers/sandbox/", {"queue/base/"}},
    {"workers/kinds/", {"queue/base/", "tools/", "workers/sandbox/"}},
    {"workers/kinds/suite/",
     {"queue/base/", "workers/sandbox/", "workers/kinds/"}},
    {"workers/worker/",
     {"queue/base/", "tools/", "workers/sandbox/", "workers/kinds/"}},
    {"workers/pool/",
     {"queue/base/", "tools/", "workers/sandbox/", "workers/kinds/",
      "workers/worker/"}},
    // The verbs put everything together; nothing includes them.
    {"tools/cli/",
     {"queue/base/", "queue/core/", "queue/history/", "queue/shard/",
      "queue/verify/", "server/", "workers/", "tools/"}},
};

const std::string kKinds = "workers/kinds/";
const char kFamilies[] = "workers/kinds/families.cc";
// Each other folder below it is a family's, and has no row of its own.
const std::vector<std::string> kOfAFamily = {"queue/base/", "workers/sandbox/",
                                             "workers/kinds/",
                                             "workers/kinds/suite/"};

// "" where the file is in no room.
std::string room_of(const std::string& path) {
  if (path == kFamilies) return path;
  if (starts(path, kKinds) && path.find('/', kKinds.size()) != path.npos) {
    return path.substr(0, path.find('/', kKinds.size()) + 1);
  }
  std::string room;
  for (const auto& [name, may] : kRooms) {
    if (starts(path, name) && name.size() > room.size()) room = name;
  }
  return room;
}

bool allowed(const std::string& from, const std::string& to) {
  const std::string here = room_of(from), there = room_of(to);
  if (here.empty() || there.empty()) return false;
  if (here == there) return true;
  if (here == kFamilies) return starts(there, kKinds);
  const auto row = kRooms.find(here);
  const auto& may = row == kRooms.end() ? kOfAFamily : row->second;
  return std::any_of(may.begin(), may.end(), [&](const std::string& room) {
    // A whole folder may be named; tools/ does not mean tools/cli/.
    return there == room || (room_of(room).empty() && starts(there, room));
  });
}

TEST(Tidy, ThereIsATreeToLookAt) {
  EXPECT_GT(product().size(), 10u) << "is kSourceDir right?";
}

TEST(Tidy, IncludesFollowTheArrows) {
  for (const auto& source : product()) {
    for (const auto& include : source.includes) {
      if (!include.quoted) continue;
      EXPECT_TRUE(fs::exists(kTree / include.name))
          << source.path << ":" << include.line << ": \"" << include.name
          << "\" is not a path from the top of the tree";
      EXPECT_TRUE(allowed(source.path, include.name))
          << source.path << ":" << include.line << " may not include "
          << include.name;
    }
  }
}

// The arrows as this test knows them, so that a slip in allowed() shows.
TEST(Tidy, TheArrowsForbidWhatTheyShould) {
  EXPECT_FALSE(allowed("queue/core/core.cc", "server/api/server.h"));
  EXPECT_FALSE(allowed("queue/core/core.cc", "queue/wal/log.h"));
  EXPECT_FALSE(allowed("queue/wal/log.cc", "queue/core/core.h"));
  EXPECT_FALSE(allowed("queue/history/history.h", "queue/shard/shard.h"));
  EXPECT_FALSE(allowed("queue/base/job.h", "queue/record/record.h"));
  EXPECT_FALSE(allowed("server/http/loop.cc", "server/api/service.h"));
  EXPECT_FALSE(allowed("server/api/run.cc", "workers/worker/worker.h"));
  EXPECT_FALSE(allowed("server/api/run.cc", "tools/config.h"));
  EXPECT_FALSE(allowed("workers/worker/worker.cc", "queue/core/core.h"));
  EXPECT_FALSE(allowed("workers/worker/worker.cc", "server/api/server.h"));
  EXPECT_FALSE(allowed("workers/worker/worker.cc", "workers/pool/pool.h"));
  EXPECT_FALSE(allowed("workers/worker/worker.cc", "tools/cli/client.h"));
  EXPECT_FALSE(allowed("workers/sandbox/stage2.cc", "workers/worker/worker.h"));
  EXPECT_FALSE(allowed("tools/config.cc", "queue/core/core.h"));
  EXPECT_FALSE(allowed("tools/config.cc", "tools/cli/cli.h"));
  EXPECT_FALSE(allowed("queue/stray.cc", "queue/base/job.h"));
  EXPECT_TRUE(allowed("tools/cli/serve.cc", "server/api/server.h"));
  EXPECT_TRUE(allowed("queue/shard/shard.cc", "queue/wal/log.h"));
}

// The shard knows a log store, not the files of one.
TEST(Tidy, TheShardSeesTheLogStoreAlone) {
  std::set<std::string> seen;
  for (const auto& source : product()) {
    if (!starts(source.path, "queue/shard/")) continue;
    for (const auto& include : source.includes) {
      if (starts(include.name, "queue/wal/")) seen.insert(include.name);
    }
  }
  EXPECT_EQ(seen, std::set<std::string>{"queue/wal/log_store.h"});
}

// The types that a file defines for everyone to see: at the left margin,
// outside unnamed namespaces.
std::vector<std::string> types_of(const Source& source) {
  static const std::regex kType(
      R"(^(?:struct|class|enum class|enum) (\w+)(?: final)?(?: :[^:].*)?(?: \{.*)$)");
  static const std::regex kNamespace(R"(^namespace ([\w:]+) \{)");
  std::vector<std::string> names;
  std::string inside;
  bool hidden = false;
  for (const auto& line : source.lines) {
    std::smatch match;
    if (starts(line, "namespace {")) hidden = true;
    if (starts(line, "}  // namespace")) hidden = false;
    if (std::regex_search(line, match, kNamespace)) inside = match[1];
    if (!hidden && std::regex_search(line, match, kType)) {
      names.push_back(inside + "::" + match[1].str());
    }
  }
  return names;
}

// Two types of one name in two libraries link into one program without a word
// from anybody, and then one's constructor builds the other.
TEST(Tidy, NoTwoTypesShareAName) {
  std::map<std::string, std::string> defined;
  for (const auto& source : product()) {
    for (const auto& name : types_of(source)) {
      auto [at, is_new] = defined.emplace(name, source.path);
      EXPECT_TRUE(is_new) << name << " is defined in " << at->second
                          << " and in " << source.path;
    }
  }
  EXPECT_GT(defined.size(), 50u) << "does it still recognise a type?";
}

// A third-party library is included by one folder's files only where a header
// would spread it, and by one file where it is a door.
TEST(Tidy, OneDoorPerLibrary) {
  const std::map<std::string, std::string> kDoors = {
      {"uv.h", "server/"},       {"llhttp.h", "server/"},
      {"sqlite3.h", "queue/"},   {"seccomp.h", "workers/"},
      {"expat.h", "workers/"},   {"hiredis", "queue/"},
      {"yaml-cpp/", "tools/"},   {"prometheus/", "server/"},
      {"liburing.h", "server/"}, {"CLI/", "tools/cli/"},
  };
  std::map<std::string, std::set<std::string>> seen;
  std::map<std::string, std::set<std::string>> curl_by_folder;
  for (const auto& source : product()) {
    for (const auto& include : source.includes) {
      for (const auto& [library, folder] : kDoors) {
        if (!starts(include.name, library)) continue;
        seen[library].insert(source.path);
        EXPECT_TRUE(starts(source.path, folder))
            << source.path << " includes " << include.name
            << ", whose door is in " << folder;
      }
      // Two programs in one: the client's verbs and the workers.
      if (starts(include.name, "curl/")) {
        curl_by_folder[source.path.substr(0, source.path.find('/'))].insert(
            source.path);
      }
    }
  }
  for (const auto& [library, files] : seen) {
    EXPECT_EQ(files.size(), 1u)
        << library << " has more than one door: " << *files.begin() << ", "
        << *files.rbegin();
  }
  for (const auto& [folder, files] : curl_by_folder) {
    EXPECT_TRUE(folder == "tools" || folder == "workers") << folder;
    EXPECT_EQ(files.size(), 1u) << folder << " includes curl more than once";
  }
}

TEST(Tidy, HeavyLibrariesStayOutOfHeaders) {
  const std::vector<std::string> kHeavy = {
      "nlohmann/json.hpp", "CLI/",      "prometheus/", "yaml-cpp/", "uv.h",
      "llhttp.h",          "sqlite3.h", "curl/",       "expat.h",   "seccomp.h",
      "liburing.h"};
  for (const auto& source : product()) {
    if (fs::path(source.path).extension() != ".h") continue;
    // Seen by the .cc files of kinds alone, all of which read JSON.
    if (source.path == "workers/kinds/fields.h") continue;
    for (const auto& include : source.includes) {
      for (const auto& heavy : kHeavy) {
        EXPECT_FALSE(starts(include.name, heavy))
            << source.path << ":" << include.line << " includes "
            << include.name;
      }
    }
  }
}

TEST(Tidy, OwnHeaderComesFirst) {
  for (const auto& source : product()) {
    fs::path path = source.path;
    if (path.extension() != ".cc") continue;
    std::string own = fs::path(path).replace_extension(".h").string();
    if (!fs::exists(kTree / own)) continue;
    ASSERT_FALSE(source.includes.empty()) << source.path;
    EXPECT_EQ(source.includes[0].name, own) << source.path;
  }
}

TEST(Tidy, HeadersSayWhatTheyAreFor) {
  for (const auto& source : product()) {
    if (fs::path(source.path).extension() != ".h") continue;
    ASSERT_FALSE(source.lines.empty()) << source.path;
    EXPECT_EQ(source.lines[0], "// " + source.path);
    bool once = std::find(source.lines.begin(), source.lines.end(),
                          "#pragma once") != source.lines.end();
    EXPECT_TRUE(once) << source.path << " lacks #pragma once";
  }
}

TEST(Tidy, OnlyTheTableReadsTheEnvironment) {
  static const std::regex kGetenv(R"(\bgetenv\s*\()");
  for (const auto& source : product()) {
    if (source.path == "tools/root.cc") continue;  // HOME, to refuse it
    // What a service manager says to this one process.
    if (source.path == "tools/service_manager.cc") continue;
    // What a pool gives its workers, and no job: their session's secret.
    if (source.path == "tools/cli/worker.cc") continue;
    for (std::size_t i = 0; i < source.lines.size(); ++i) {
      const std::string& line = source.lines[i];
      if (line.find("//") < line.find("getenv")) continue;
      EXPECT_FALSE(std::regex_search(line, kGetenv))
          << source.path << ":" << i + 1
          << " reads the environment; tools/config.h does that";
    }
  }
}

// Each small thing is in queue/base once. A file that needs a word of this
// table for something else is named beside it, and must still have the word.
TEST(Tidy, SmallThingsAreSaidOnce) {
  struct Thing {
    const char* word;  // looked for first: a regular expression is slow
    const char* pattern;
    const char* home;
    std::set<std::string> others;
  };
  const std::vector<Thing> kThings = {
      {"0123456789abcdef", R"("0123456789abcdef")", "queue/base/hex.h", {}},
      {"Fd",
       R"(\b(class|struct)\s+\w*(Owned|Unique|Scoped)?Fd\s*(final\s*)?\{)",
       "queue/base/fd.h",
       {"tools/service_manager.h"}},  // a number and its name
      {"_all",
       R"(\b(bool|void|int|Result<\w+>)\s+(read|write)_all\w*\()",
       "queue/base/fd.{h,cc}, posix_storage.cc (aligned blocks)",
       {"queue/base/fd.h", "queue/base/fd.cc", "queue/base/posix_storage.cc"}},
      {"tim",
       R"(\b(gmtime_r|timegm|strftime)\s*\()",
       "queue/base/rfc3339.h",
       {"server/api/service.cc",  // HTTP's Date
        "tools/cli/table.cc"}},   // local time, for a person
      {"append_utf8",
       R"(\bappend_utf8\s*\(std)",
       "queue/base/json.cc",
       {"queue/base/json.cc"}},
      {"rfc3339",
       R"(\bparse_rfc3339\s*\(std|\brfc3339\w*\s*\((Millis|std::int64_t|\)\s*\{))",
       "queue/base/rfc3339.h",
       {"queue/base/rfc3339.h", "queue/base/rfc3339.cc"}},
  };
  for (const Thing& thing : kThings) {
    const std::regex pattern(thing.pattern);
    std::set<std::string> unused = thing.others;
    bool found = false;
    for (const auto& source : product()) {
      for (std::size_t i = 0; i < source.lines.size(); ++i) {
        const std::string& line = source.lines[i];
        if (line.find(thing.word) == line.npos ||
            !std::regex_search(line, pattern)) {
          continue;
        }
        found = true;
        unused.erase(source.path);
        EXPECT_TRUE(source.path == thing.home ||
                    thing.others.contains(source.path))
            << source.path << ":" << i + 1 << " has again what " << thing.home
            << " has: " << source.lines[i];
      }
    }
    EXPECT_TRUE(found) << thing.pattern << " finds nothing any more";
    for (const auto& path : unused) {
      ADD_FAILURE() << path << " needs no exception from " << thing.pattern;
    }
  }
}

// Standard output is the verbs'; libraries talk through results and logs.
TEST(Tidy, NoStrayDebugOutput) {
  static const std::regex kStdout(
      R"(std::cout|\bprintf\s*\(|\bputs\s*\(|fprintf\s*\(\s*stdout)");
  for (const auto& source : product()) {
    if (starts(source.path, "tools/cli/")) continue;
    for (std::size_t i = 0; i < source.lines.size(); ++i) {
      const std::string& line = source.lines[i];
      std::smatch match;
      if (!std::regex_search(line, match, kStdout)) continue;
      bool comment =
          line.find("//") < static_cast<std::size_t>(match.position());
      EXPECT_TRUE(comment) << source.path << ":" << i + 1 << ": " << line;
    }
  }
}

bool is_build_or_hidden(const fs::path& path) {
  for (const auto& part : path) {
    std::string name = part.string();
    if (name == "build" || name == "__pycache__" || name == "machina-data" ||
        (name.size() > 1 && name[0] == '.')) {
      return true;
    }
  }
  return false;
}

// Each room has its page; folders of tests and data are described by the folder
// above them, but for those that are run by hand.
TEST(Tidy, EveryFolderHasAReadme) {
  const std::set<std::string> kOwnPage = {"tests/sim", "tests/e2e",
                                          "tests/bench", "tests/golden"};
  for (const auto& entry : fs::recursive_directory_iterator(kTree)) {
    fs::path relative = fs::relative(entry.path(), kTree);
    if (!entry.is_directory() || is_build_or_hidden(relative) ||
        fs::is_empty(entry.path())) {
      continue;
    }
    const std::string top = *relative.begin();
    bool own = top == relative.string() ||
               std::count(kProduct.begin(), kProduct.end(), top) > 0 ||
               kOwnPage.count(relative.string()) > 0;
    if (!own) continue;
    EXPECT_TRUE(fs::exists(entry.path() / "README.md"))
        << relative.string() << " has no README.md";
  }
  EXPECT_TRUE(fs::exists(kTree / "README.md"));
}

// A link in a page leads somewhere.
TEST(Tidy, LinksInPagesLeadSomewhere) {
  static const std::regex kLink(R"(\]\(([^)#\s]+)(#[^)]*)?\))");
  for (const auto& entry : fs::recursive_directory_iterator(kTree)) {
    fs::path relative = fs::relative(entry.path(), kTree);
    if (is_build_or_hidden(relative) || relative.extension() != ".md") continue;
    for (const auto& line : read_lines(entry.path())) {
      for (std::sregex_iterator at(line.begin(), line.end(), kLink), end;
           at != end; ++at) {
        std::string target = (*at)[1];
        if (target.find("://") != std::string::npos) continue;
        EXPECT_TRUE(fs::exists(entry.path().parent_path() / target))
            << relative.string() << " links to " << target;
      }
    }
  }
}

}  // namespace
