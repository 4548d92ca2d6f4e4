// The production checklist: each item is made to say WARN or FAIL by one
// setting or one fact (K2), everything else being in order.

#include "tools/checklist.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <tuple>

namespace machina {
namespace {

namespace fs = std::filesystem;

class ChecklistTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/var/tmp/machina_checklist_test.XXXXXX";
    ASSERT_NE(::mkdtemp(name), nullptr);
    dir_ = name;
    write_secret("token", "0123456789abcdef0123456789abcdef", 0600);
    write_secret("short", "0123", 0600);
    write_secret("open", "0123456789abcdef0123456789abcdef", 0644);
    settings_ = {{"MACHINA_PROFILE", "prod"},
                 {"MACHINA_ROOT", "/var/lib/machina"},
                 {"MACHINA_API_TOKEN_FILE", dir_ + "/token"},
                 {"MACHINA_API_RPM", "600"},
                 {"MACHINA_KINDS_ALLOWED", "test.*"},
                 {"MACHINA_LOG_FORMAT", "json"},
                 {"MACHINA_LOG_FILE", "/var/log/machina.log"}};
    facts_.configured_profile = facts_.running_profile = "prod";
    facts_.uid = facts_.root_owner = 990;
    facts_.root_there = facts_.root_is_mount = true;
    facts_.root_mode = 0700;
    facts_.file_system = "ext4";
    facts_.disk_bytes = 100ull << 30;
    facts_.disk_free_bytes = 60ull << 30;
    facts_.level = 3;
    facts_.server_runs = facts_.metrics_answer = true;
    facts_.request_id_echoed = facts_.request_id_logged = 1;
    facts_.scraped_ago_s = 10;
    facts_.log_begun = true;
    facts_.verified.ago_s = facts_.backup.ago_s = 3600;
  }
  void TearDown() override { fs::remove_all(dir_); }

  void write_secret(const std::string& name, const std::string& text,
                    mode_t mode) {
    std::ofstream(dir_ + "/" + name) << text;
    ::chmod((dir_ + "/" + name).c_str(), mode);
  }
  std::vector<Check> checks() {
    std::vector<std::string> environment;
    for (const auto& [name, value] : settings_) {
      environment.push_back(name + "=" + value);
    }
    auto config = Config::load(environment, {}, "");
    EXPECT_TRUE(config) << (config ? "" : config.error().what);
    return config ? production_checklist(*config, facts_)
                  : std::vector<Check>();
  }
  static const Check* find(const std::vector<Check>& all,
                           const std::string& name) {
    for (const auto& check : all) {
      if (check.name == name) return &check;
    }
    return nullptr;
  }

  // Of which this version has no part.
  static const std::set<std::string>& not_there() {
    static const std::set<std::string> kNames = {
        "http_allow_list", "policies_pinned", "leases_enforced",
        "plugins_pinned", "plugin_capabilities"};
    return kNames;
  }

  std::string dir_;
  std::map<std::string, std::string> settings_;
  ProductionFacts facts_;
};

TEST_F(ChecklistTest, AllIsWellWhereAllIsWell) {
  auto all = checks();
  EXPECT_GE(all.size(), 20u);
  for (const auto& check : all) {
    EXPECT_EQ(check.verdict, not_there().count(check.name) != 0 ? Verdict::none
                                                                : Verdict::pass)
        << check.name << ": " << check.what;
    EXPECT_FALSE(check.what.empty()) << check.name;
    EXPECT_TRUE(check.remedy.empty()) << check.name;
  }
  EXPECT_FALSE(any_failed(all));
}

// K1: whatever is set, what is not there neither passes nor fails; that the
// variable has no effect is said.
TEST_F(ChecklistTest, F27_WhatIsNotThereIsNeverJudged) {
  for (const auto& [name, value, item] :
       std::vector<std::tuple<std::string, std::string, std::string>>{
           {"MACHINA_HTTP_DEFAULT_DENY", "0", "http_allow_list"},
           {"MACHINA_HTTP_ALLOWED_HOSTS", "*", "http_allow_list"},
           {"MACHINA_POLICY_CMD", "python3 p.py", "policies_pinned"},
           {"MACHINA_LEASE_ENFORCE", "1", "leases_enforced"},
           {"MACHINA_LEASE_ENFORCE", "0", "leases_enforced"},
           {"MACHINA_GENESIS_ENABLE", "1", "plugins_pinned"},
           {"MACHINA_TOOLHOST_ISOLATE", "0", "plugin_capabilities"}}) {
    const auto before = settings_;
    settings_[name] = value;
    const auto all = checks();
    const Check* check = find(all, item);
    ASSERT_NE(check, nullptr) << item;
    EXPECT_EQ(check->verdict, Verdict::none) << name;
    EXPECT_NE(check->what.find("no effect yet: " + name), std::string::npos)
        << check->what;
    EXPECT_FALSE(any_failed(all)) << name;
    settings_ = before;
  }
  facts_.server_runs = false;
  facts_.request_id_echoed = -1;
  facts_.log_begun = false;
  facts_.verified = facts_.backup = Evidence{};
  const auto all = checks();
  for (const char* item : {"metrics", "request_id", "log_verified", "backup"}) {
    EXPECT_EQ(find(all, item)->verdict, Verdict::none) << item;
  }
  EXPECT_STREQ(name(Verdict::none), "N/A");
}

// K4: a record counts by what it says.
TEST_F(ChecklistTest, F27_ARecordThatSaysNothingDoesNotCount) {
  facts_.verified = {-1, "ops/wal.verified does not say what was checked"};
  facts_.backup = {-1, "ops/backup.taken is about another log"};
  const auto all = checks();
  for (const char* item : {"log_verified", "backup"}) {
    const Check* check = find(all, item);
    EXPECT_EQ(check->verdict, Verdict::warn) << item;
    EXPECT_NE(check->what.find("ops/"), std::string::npos) << check->what;
    EXPECT_NE(check->remedy.find("wal verify"), std::string::npos) << item;
  }
}

struct Spoil {
  const char* item;
  Verdict verdict;
  std::function<void(std::map<std::string, std::string>&, ProductionFacts&)>
      how;
};

TEST_F(ChecklistTest, EachItemCanBeMadeToComplain) {  // K2
  using S = std::map<std::string, std::string>&;
  using F = ProductionFacts&;
  constexpr auto kWarn = Verdict::warn;
  constexpr auto kFail = Verdict::fail;
  auto set = [](const char* name, const char* value) {
    return [=](S s, F) { s[name] = value; };
  };
  const std::string dir = dir_;
  const std::vector<Spoil> kSpoils = {
      {"user", kWarn, [](S, F f) { f.uid = f.root_owner = 0; }},
      {"profile", kFail, [](S, F f) { f.configured_profile = "dev"; }},
      {"profile", kFail, [](S, F f) { f.running_profile = "dev"; }},
      {"running_settings", kFail,
       [](S, F f) {
         f.running_differs = {"MACHINA_SANDBOX_MIN_LEVEL=L1 (configured: L3)"};
       }},
      {"root", kFail, [](S, F f) { f.root_there = false; }},
      {"root", kFail, [](S, F f) { f.root_owner = 1; }},
      {"root", kFail, [](S, F f) { f.root_fault = "led elsewhere"; }},
      {"root", kFail, [](S, F f) { f.root_mode = 0750; }},
      {"root_file_system", kFail,
       [](S, F f) { f.file_system_trusted = false; }},
      {"root_mount", kWarn, [](S, F f) { f.root_is_mount = false; }},
      {"root_mount", kFail,
       [](S, F f) { f.mounts_below = {"/var/lib/machina/repos/home"}; }},
      {"shell_allow_list", kFail,
       set("MACHINA_SHELL_ALLOWED_EXE", "make,/bin/bash")},
      {"kinds_allow_list", kWarn,
       [](S s, F) { s.erase("MACHINA_KINDS_ALLOWED"); }},
      {"kinds_allow_list", kFail, set("MACHINA_KINDS_ALLOWED", "noop,*")},
      {"repo_roots", kFail, set("MACHINA_REPO_ROOTS", "/srv/git,/home")},
      {"isolation", kFail, [](S, F f) { f.level = -1; }},
      {"isolation", kFail, [](S, F f) { f.level = 2; }},
      {"isolation", kWarn, set("MACHINA_SANDBOX_MIN_LEVEL", "L2")},
      {"seccomp", kFail, set("MACHINA_SECCOMP_ENABLE", "0")},
      {"sandbox_required", kFail, set("MACHINA_BWRAP_REQUIRED", "1")},
      {"log_export", kWarn, set("MACHINA_LOG_FORMAT", "text")},
      {"log_export", kWarn, set("MACHINA_LOG_FILE", "")},
      {"log_export", kFail, set("MACHINA_LOG_LEVEL", "error")},
      {"log_export", kFail,
       [](S s, F f) {
         s["MACHINA_LOG_FILE"] = "";
         f.log_goes_to = "/dev/null";
       }},
      {"log_rotation", kWarn, set("MACHINA_LOG_FILE", "")},
      {"log_rotation", kFail,
       [](S, F f) { f.log_problem = "/var/log cannot be written"; }},
      {"log_rotation", kFail, [](S, F f) { f.log_bytes = 2ull << 30; }},
      {"log_rotation", kFail, set("MACHINA_LOG_TOTAL_BYTES", "1099511627776")},
      {"request_id", kFail, set("MACHINA_LOG_ACCESS", "off")},
      {"request_id", kFail, [](S, F f) { f.request_id_echoed = 0; }},
      {"request_id", kFail, [](S, F f) { f.request_id_logged = 0; }},
      {"request_id", kFail, [](S, F f) { f.request_id_echoed = -1; }},
      {"metrics", kFail, [](S, F f) { f.metrics_answer = false; }},
      {"metrics", kWarn, [](S, F f) { f.scraped_ago_s = -1; }},
      {"authentication", kFail, [](S, F f) { f.running_is_open = true; }},
      {"authentication", kFail,
       [](S s, F) { s.erase("MACHINA_API_TOKEN_FILE"); }},
      {"authentication", kFail,
       [=](S s, F) { s["MACHINA_API_TOKEN_FILE"] = dir + "/short"; }},
      {"secrets", kFail,
       [=](S s, F) { s["MACHINA_API_TOKEN_FILE"] = dir + "/open"; }},
      {"secrets", kWarn,
       [](S s, F) {
         s.erase("MACHINA_API_TOKEN_FILE");
         s["MACHINA_API_TOKEN"] = "0123456789abcdef0123456789abcdef";
       }},
      {"address", kWarn, set("MACHINA_HOST", "0.0.0.0")},
      {"rate_limits", kWarn, set("MACHINA_API_RPM", "0")},
      {"durability", kFail, set("MACHINA_WAL_FSYNC", "0")},
      {"disk", kWarn, [](S, F f) { f.disk_free_bytes = 8ull << 30; }},
      {"disk", kFail, [](S, F f) { f.disk_free_bytes = 1ull << 29; }},
      {"disk", kFail, [](S, F f) { f.disk_level = "soft"; }},
      {"log_verified", kWarn, [](S, F f) { f.verified.ago_s = 30 * 86400; }},
      {"log_verified", kFail, [](S, F f) { f.verified.ago_s = 60 * 86400; }},
      {"backup", kFail, [](S, F f) { f.backup.ago_s = 9 * 86400; }},
      {"backup", kWarn, [](S, F f) { f.backup.ago_s = -1; }},
  };
  const auto settings = settings_;
  const auto facts = facts_;
  std::set<std::string> spoiled;
  for (const auto& spoil : kSpoils) {
    settings_ = settings;
    facts_ = facts;
    spoil.how(settings_, facts_);
    auto all = checks();
    const Check* check = find(all, spoil.item);
    ASSERT_NE(check, nullptr) << spoil.item;
    EXPECT_EQ(check->verdict, spoil.verdict) << spoil.item << check->what;
    EXPECT_FALSE(check->remedy.empty()) << spoil.item << ": K3";
    EXPECT_EQ(any_failed(all), spoil.verdict == kFail) << spoil.item;
    for (const auto& other : all) {
      // Who keeps the log rotates it, too.
      const bool both = other.name.starts_with("log_") &&
                        std::string(spoil.item).starts_with("log_");
      if (other.name == spoil.item || both) continue;
      if (not_there().count(other.name) != 0) continue;
      EXPECT_EQ(other.verdict, Verdict::pass)
          << other.name << " complains of what is " << spoil.item
          << "'s: " << other.what;
    }
    spoiled.insert(spoil.item);
  }
  settings_ = settings;
  facts_ = facts;
  for (const auto& check : checks()) {
    if (not_there().count(check.name) != 0) continue;
    EXPECT_EQ(spoiled.count(check.name), 1u)
        << check.name << " cannot complain";
  }
}

TEST_F(ChecklistTest, NoSecretIsShown) {
  settings_.erase("MACHINA_API_TOKEN_FILE");
  settings_["MACHINA_API_TOKEN"] = "not-to-be-shown-anywhere";
  for (const auto& check : checks()) {
    EXPECT_EQ((check.what + check.remedy).find("not-to-be-shown"),
              std::string::npos)
        << check.name;
  }
}

}  // namespace
}  // namespace machina
