// The table of settings: tools/settings.h's promises by number.

#include "tools/settings.h"

#include <gtest/gtest.h>

#include <cctype>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <set>

#include "tests/support/places.h"
#include "tools/config.h"
#include "tools/promises.h"

namespace machina {
namespace {

namespace fs = std::filesystem;
using Strings = std::vector<std::string>;

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

// MACHINA_LEASE_MS -> lease_ms
std::string field_name(const Setting& row) {
  std::string name = std::string(row.name).substr(std::strlen("MACHINA_"));
  for (char& c : name) c = static_cast<char>(std::tolower(c));
  return name;
}

// The fields that some source text reads: typed().x, or set.x of a group.
std::set<std::string> fields_read(const std::string& source) {
  static const std::regex kRead(R"((?:typed\(\)|\bset)\s*\.\s*([a-z_0-9]+))");
  std::set<std::string> names;
  for (std::sregex_iterator at(source.begin(), source.end(), kRead), end;
       at != end; ++at) {
    names.insert((*at)[1]);
  }
  if (source.find("prod()") != std::string::npos) names.insert("profile");
  return names;
}

// The body of the function that starts with `head`.
std::string function(const std::string& source, const std::string& head) {
  const std::size_t from = source.find(head);
  EXPECT_NE(from, std::string::npos) << head;
  if (from == std::string::npos) return "";
  return source.substr(from, source.find("\n}\n", from) - from);
}

TEST(Settings, ANameStandsForOneRow) {
  std::set<std::string> names;
  for (const auto& row : settings_table()) {
    EXPECT_TRUE(std::string(row.name).starts_with("MACHINA_")) << row.name;
    EXPECT_TRUE(names.insert(row.name).second) << row.name;
    if (row.also != nullptr) {
      EXPECT_TRUE(names.insert(row.also).second) << row.also;
      EXPECT_EQ(find_setting(row.also), &row);
    }
    EXPECT_EQ(find_setting(row.name), &row);
    EXPECT_NE(std::string(row.help), "") << row.name;
  }
  EXPECT_EQ(find_setting("MACHINA_"), nullptr);
}

// Every default is itself within its range, in both profiles.
TEST(Settings, DefaultsObeyTheirOwnRanges) {
  for (const auto& row : settings_table()) {
    for (const char* value : {row.fallback, row.dev, row.prod}) {
      if (value == nullptr || *value == '\0') continue;
      auto config = Config::load({}, {{row.name, value}}, "");
      EXPECT_TRUE(config) << config.error().what;
    }
  }
}

TEST(Settings, V1_AFieldHasAReader) {
  std::set<std::string> read_fields;
  for (const auto& entry :
       fs::recursive_directory_iterator(fs::path(kSourceDir) / "tools")) {
    const std::string name = entry.path().filename().string();
    // What only judges settings is no reader of them.
    if (entry.path().extension() != ".cc" || name == "config.cc" ||
        name == "checklist.cc") {
      continue;
    }
    read_fields.merge(fields_read(read(entry.path())));
  }
  auto config = Config::load({}, {}, "");
  ASSERT_TRUE(config);
  const std::string shown = config->print();
  for (const auto& row : settings_table()) {
    EXPECT_EQ(read_fields.count(field_name(row)) > 0, row.has_effect())
        << row.name;
    EXPECT_EQ(row.readers != 0, row.has_effect()) << row.name;
    const std::size_t at = shown.find(std::string(row.name) + "=");
    const std::string line = shown.substr(at, shown.find('\n', at) - at);
    EXPECT_EQ(line.ends_with("; no effect yet"), !row.has_effect()) << line;
  }
}

TEST(Settings, V2_AProcessIsGivenWhatItReads) {
  const fs::path cli = fs::path(kSourceDir) / "tools/cli";
  const std::string shared_file = read(cli / "pool_settings.cc");
  const std::set<std::string> shared = fields_read(
      function(shared_file, "std::vector<std::string> repo_roots(") +
      function(shared_file, "LoggerOptions logger_options("));
  for (auto [file, reader] : {std::pair("pool.cc", Setting::kPool),
                              {"worker.cc", Setting::kWorker}}) {
    std::set<std::string> wanted = fields_read(read(cli / file));
    wanted.insert(shared.begin(), shared.end());
    // An argument, and what the server says over its socket.
    wanted.erase("root");
    wanted.erase("workers");
    std::set<std::string> given;
    for (const auto& row : settings_table()) {
      if ((row.readers & reader) != 0) given.insert(field_name(row));
      EXPECT_FALSE((row.readers & reader) != 0 &&
                   row.type == Setting::Type::secret)
          << row.name << ": no pool and no worker holds a secret";
    }
    EXPECT_EQ(given, wanted) << file;
  }
}

// profiles/*.env are for people to read: they must say what the table does.
TEST(Settings, V4_ProfileFilesRepeatTheTable) {
  for (std::string profile : {"dev", "prod"}) {
    std::map<std::string, std::string> listed, known;
    std::ifstream file(std::string(kSourceDir) + "/profiles/" + profile +
                       ".env");
    ASSERT_TRUE(file);
    for (std::string line; std::getline(file, line);) {
      if (line.empty() || line[0] == '#') continue;
      auto equals = line.find('=');
      ASSERT_NE(equals, std::string::npos) << line;
      listed[line.substr(0, equals)] = line.substr(equals + 1);
    }
    for (const auto& row : settings_table()) {
      const char* value = profile == "dev" ? row.dev : row.prod;
      if (value != nullptr) known[row.name] = value;
    }
    EXPECT_EQ(listed, known) << profile;
  }
}

TEST(Settings, V4_ThePageRepeatsTheTable) {
  const std::string page = std::string(kSourceDir) + "/docs/settings.md";
  if (read(page) == settings_page()) return;
  const std::string fresh = testing::TempDir() + "settings.md";
  std::ofstream(fresh) << settings_page();
  FAIL() << "docs/settings.md is not what the table says: cp " << fresh << " "
         << page;
}

// One row, and nothing else, makes a setting: it is read from each source,
// checked, shown, filled into its field, and given to whom it names. The field
// is that of MACHINA_DRAIN_MS, whose row is left out.
TEST(Settings, ARowMakesASetting) {
  std::vector<Setting> table;
  for (const auto& row : settings_table()) {
    if (std::string(row.name) != "MACHINA_DRAIN_MS") table.push_back(row);
  }
  Setting extra{"MACHINA_NAP_MS", Setting::Type::number, "7", "a nap"};
  extra.readers = Setting::kPool;
  extra.fill = [](SettingValues* values, const std::string& text) {
    values->drain_ms = setting_number(text);
  };
  extra.min = 5;
  extra.max = 9000;
  table.push_back(extra.by(nullptr, "8").or_named("MACHINA_NAP"));

  auto load = [&](const Strings& environment,
                  std::map<std::string, std::string> overrides = {}) {
    auto config = Config::load(environment, overrides, "", table);
    EXPECT_TRUE(config) << config.error().what;
    return std::move(*config);
  };
  EXPECT_EQ(load({}).typed().drain_ms, 7);
  EXPECT_EQ(load({"MACHINA_PROFILE=prod"}).typed().drain_ms, 8);
  EXPECT_EQ(load({"MACHINA_NAP_MS=2s"}).typed().drain_ms, 2000);
  EXPECT_EQ(load({"MACHINA_NAP=6"}).typed().drain_ms, 6);
  const Config set = load({"MACHINA_NAP_MS=10"}, {{"MACHINA_NAP_MS", "11"}});
  EXPECT_EQ(set.typed().drain_ms, 11);
  EXPECT_NE(set.print().find("MACHINA_NAP_MS=11 "), std::string::npos);
  EXPECT_EQ(set.environment(Setting::kPool), Strings{"MACHINA_NAP_MS=11"});
  EXPECT_EQ(set.environment(Setting::kWorker), Strings{});
  EXPECT_EQ(load({}).environment(Setting::kPool), Strings{});

  auto refused = Config::load({"MACHINA_NAP_MS=4"}, {}, "", table);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().what,
            "MACHINA_NAP_MS (environment): \"4\" must be 5..9000 ms, also as "
            "5s, 10m or 1h30m");
  refused = Config::load({"MACHINA_NAB_MS=5"}, {}, "", table);
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().what.find("nearest is MACHINA_NAP_MS"),
            std::string::npos);
  // And the program's own table does not know it.
  EXPECT_FALSE(Config::load({"MACHINA_NAP_MS=5"}, {}, ""));
}

// Every variable of the original's operating manual.
Strings original() {
  Strings entries;
  std::ifstream file(std::string(kSourceDir) + "/tests/support/original.env");
  EXPECT_TRUE(file);
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line[0] != '#') entries.push_back(line);
  }
  EXPECT_GE(entries.size(), 71u);
  return entries;
}

TEST(Settings, TheOriginalsVariablesExportedWholeStartTheServer) {
  Strings entries = original();
  auto config = Config::load(entries, {}, "");
  ASSERT_TRUE(config) << config.error().what;
  EXPECT_EQ(start_refusals(*config), Strings{});
  for (const auto& entry : entries) {
    const Setting* row = find_setting(entry.substr(0, entry.find('=')));
    ASSERT_NE(row, nullptr) << entry;
    EXPECT_TRUE(
        config->values().at(row->name).origin.starts_with("environment"))
        << entry;
  }
  ASSERT_EQ(std::erase(entries, "MACHINA_BWRAP_REQUIRED=0"), 1u);
  entries.emplace_back("MACHINA_BWRAP_REQUIRED=1");
  EXPECT_EQ(start_refusals(*Config::load(entries, {}, "")).size(), 1u);
  // Each choice and each profile of its tables is known.
  for (const char* entry :
       {"MACHINA_PROFILE=dev", "MACHINA_CHAT_BACKEND=oai_compat",
        "MACHINA_EMBED_PROVIDER=hash", "MACHINA_SELECTOR=HEURISTIC",
        "MACHINA_MAX_CYCLES=100", "MACHINA_PULSE_BUDGET_S=3600",
        "MACHINA_SHELL_TIMEOUT_MS=30000", "MACHINA_POLICY_TIMEOUT_MS=60000",
        "MACHINA_GPU_DIM=128", "MACHINA_AUTONOMIC_APPROVE_ALL_ASK=1"}) {
    auto loaded = Config::load({entry}, {}, "");
    EXPECT_TRUE(loaded) << loaded.error().what;
  }
  EXPECT_FALSE(Config::load({"MACHINA_SELECTOR=GPU"}, {}, ""));
}

// Names of parts that are still to come, in the design of the API and the
// kinds: a file that sets them starts this version too.
TEST(Settings, TheDesignsVariablesAreKnown) {
  for (const char* name : {"EMBED_DRIVERS",
                           "INDEX_MAX_BYTES",
                           "WAL_FRAMED",
                           "WAL_GROUP_MS",
                           "AUTOPILOT_MAX_ATTEMPTS",
                           "AUTOPILOT_BACKOFF_BASE_MS",
                           "AUTOPILOT_BACKOFF_MULT",
                           "AUTOPILOT_BACKOFF_MAX_MS",
                           "AUTOPILOT_BACKOFF_JITTER_MS",
                           "GENESIS_AUTOTRIGGER",
                           "GENESIS_AUTOSTUB",
                           "GENESIS_COMPILE_RETRIES",
                           "PROC_WRAPPER",
                           "PROC_WRAPPER_ENABLE",
                           "FS_WRITE_ROOT",
                           "POLICY_ALLOW_UNSAFE",
                           "POLICY_LLM_URL",
                           "PLUGIN_ABI_LAX",
                           "DETERMINISTIC_RUN_ID",
                           "PERMISSION_MODE",
                           "PERMISSION_OVERRIDES",
                           "STRIPE_API_BASE"}) {
    const Setting* row = find_setting(std::string("MACHINA_") + name);
    ASSERT_NE(row, nullptr) << name;
    EXPECT_FALSE(row->has_effect()) << name;
  }
}

}  // namespace
}  // namespace machina
