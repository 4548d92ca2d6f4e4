// Configuration: tools/config.h's promises by number, and the profiles' files.

#include "tools/config.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <map>

namespace machina {
namespace {

using Strings = std::vector<std::string>;
using Overrides = std::map<std::string, std::string>;

Config load(const Strings& environment, const Overrides& overrides = {},
            const std::string& file = "") {
  auto config = Config::load(environment, overrides, file);
  EXPECT_TRUE(config) << (config ? "" : config.error().what);
  return config ? *config : *Config::load({}, {}, "");
}

std::string refusal(const Strings& environment, const Overrides& overrides = {},
                    const std::string& file = "") {
  auto config = Config::load(environment, overrides, file);
  EXPECT_FALSE(config) << "was accepted";
  return config ? "" : config.error().what;
}

class TempFile {
 public:
  explicit TempFile(const std::string& text) {
    char name[] = "/tmp/machina_config_test.XXXXXX";
    int fd = ::mkstemp(name);
    EXPECT_GE(fd, 0);
    EXPECT_EQ(::write(fd, text.data(), text.size()),
              static_cast<ssize_t>(text.size()));
    ::close(fd);
    path_ = name;
  }
  ~TempFile() { ::unlink(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

#define EXPECT_SAYS(text, part) \
  EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST(Config, UnknownVariableNamesTheNearest) {  // G1
  std::string what = refusal({"MACHINA_WAL_FSNYC=1"});
  EXPECT_SAYS(what, "MACHINA_WAL_FSNYC");
  EXPECT_SAYS(what, "nearest is MACHINA_WAL_FSYNC");
  EXPECT_SAYS(refusal({"MACHINA_API_TOKEN_FIL=/x"}), "MACHINA_API_TOKEN_FILE");
  EXPECT_SAYS(refusal({"MACHINA_="}), "nearest");
}

TEST(Config, OtherVariablesAreNotOurs) {
  load({"PATH=/bin", "MACHIN_ROOT=/", "XMACHINA_ROOT=/", "MACHINA_BARE"});
}

TEST(Config, OutOfRangeNamesVariableValueAndRange) {  // G2
  std::string what = refusal({"MACHINA_MAX_ATTEMPTS=1001"});
  EXPECT_SAYS(what, "MACHINA_MAX_ATTEMPTS");
  EXPECT_SAYS(what, "\"1001\"");
  EXPECT_SAYS(what, "from 1 to 1000");
  EXPECT_SAYS(refusal({}, {{"MACHINA_WORKERS", "65"}}), "from 0 to 64");
  EXPECT_SAYS(refusal({"MACHINA_PROFILE=production"}), "dev|prod");
  EXPECT_SAYS(refusal({"MACHINA_SANDBOX_MIN_LEVEL=L5"}), "L0, L1, L2, L3, L4");
  EXPECT_SAYS(refusal({"MACHINA_WAL_FSYNC=yes"}), "must be 0 or 1");
  EXPECT_SAYS(refusal({"MACHINA_REPO_ROOTS=/ok,relative"}), "absolute");
}

TEST(Config, NumbersAreWholeAndNothingElse) {
  for (const char* bad :
       {"5x", " 5", "+5", "5.0", "0x5", "99999999999999999999999"}) {
    refusal({std::string("MACHINA_MAX_ATTEMPTS=") + bad});
  }
}

TEST(Config, ASetVariableWinsOverTheProfile) {  // G3
  Config config = load({"MACHINA_PROFILE=prod", "MACHINA_SHELL_TIMEOUT_MS=7"});
  EXPECT_TRUE(config.prod());
  EXPECT_EQ(config.typed().shell_timeout_ms, 7);
  EXPECT_EQ(config.values().at("MACHINA_SHELL_TIMEOUT_MS").origin,
            "environment");
  EXPECT_EQ(config.typed().sandbox_min_level, 3);
  EXPECT_EQ(config.values().at("MACHINA_SANDBOX_MIN_LEVEL").origin,
            "profile prod");
}

TEST(Config, StrongerSourceWinsAtEachStep) {
  TempFile file(
      "MACHINA_LEASE_MS: 1001\nMACHINA_DRAIN_MS: 1001\n"
      "MACHINA_POOL_ORPHAN_MS: 1001\n");
  Config config = load({"MACHINA_LEASE_MS=1002", "MACHINA_DRAIN_MS=1002"},
                       {{"MACHINA_LEASE_MS", "1003"}}, file.path());
  EXPECT_EQ(config.typed().lease_ms, 1003);
  EXPECT_EQ(config.typed().drain_ms, 1002);
  EXPECT_EQ(config.typed().pool_orphan_ms, 1001);
  EXPECT_EQ(config.values().at("MACHINA_POOL_ORPHAN_MS").origin,
            "file " + file.path());
}

TEST(Config, AnEmptyVariableIsNotSet) {
  EXPECT_EQ(load({"MACHINA_LEASE_MS="}).typed().lease_ms, 30000);
}

TEST(Config, FileMayHoldListsAndIsHeldToTheSameTable) {
  TempFile file("MACHINA_KINDS_ALLOWED: [test.*, noop]\n");
  EXPECT_EQ(load({}, {}, file.path()).typed().kinds_allowed,
            (Strings{"test.*", "noop"}));
  TempFile unknown("MACHINA_LEASE_S: 3\n");
  EXPECT_SAYS(refusal({}, {}, unknown.path()), "nearest is MACHINA_LEASE_MS");
  TempFile twice("MACHINA_LEASE_MS: 300\nMACHINA_LEASE_MS: 400\n");
  EXPECT_SAYS(refusal({}, {}, twice.path()), "set twice");
  TempFile nested("MACHINA_LEASE_MS: {a: 1}\n");
  EXPECT_SAYS(refusal({}, {}, nested.path()), "MACHINA_LEASE_MS");
  TempFile short_name("port: 1\n");
  EXPECT_SAYS(refusal({}, {}, short_name.path()), "nearest is MACHINA_PORT");
  TempFile tree("api:\n  token: x\n");
  EXPECT_SAYS(refusal({}, {}, tree.path()), "api (file");
  TempFile broken("MACHINA_LEASE_MS: [1\n");
  EXPECT_SAYS(refusal({}, {}, broken.path()), "line");
  EXPECT_SAYS(refusal({}, {}, "/nonexistent/machina.yaml"), "--config");
  EXPECT_SAYS(refusal({}, {}, "/tmp"), "not a regular file");
}

TEST(Config, SecretsComeFromFilesAndAreNeverPrinted) {  // G4
  TempFile file("s3cret-token\n");
  Config config = load({"MACHINA_API_TOKEN_FILE=" + file.path()});
  EXPECT_EQ(config.text("MACHINA_API_TOKEN"), "s3cret-token");
  EXPECT_EQ(config.print().find("s3cret-token"), std::string::npos);
  EXPECT_SAYS(config.print(), "MACHINA_API_TOKEN=(set)");
  EXPECT_SAYS(
      refusal({"MACHINA_API_TOKEN_FILE=" + file.path(), "MACHINA_API_TOKEN=x"}),
      "keep one");
  std::string what = refusal({"MACHINA_API_TOKEN=has space"});
  EXPECT_EQ(what.find("has space"), std::string::npos) << what;
  TempFile empty("\n");
  refusal({"MACHINA_API_TOKEN_FILE=" + empty.path()});
}

TEST(Config, ASecretInAConfigurationFileIsAsOpenAsTheFile) {
  TempFile file("MACHINA_API_HMAC_SECRET: s3cret-of-file\n");
  ASSERT_EQ(chmod(file.path().c_str(), 0644), 0);
  Config open = load({}, {}, file.path());
  EXPECT_EQ(open.text("MACHINA_API_HMAC_SECRET"), "s3cret-of-file");
  EXPECT_EQ(open.print().find("s3cret-of-file"), std::string::npos);
  ASSERT_EQ(open.open_secrets().size(), 1u);
  EXPECT_SAYS(open.open_secrets()[0], "chmod 600");
  ASSERT_EQ(chmod(file.path().c_str(), 0600), 0);
  EXPECT_TRUE(load({}, {}, file.path()).open_secrets().empty());
  // Where a stronger source gives the secret the file's is not in force.
  ASSERT_EQ(chmod(file.path().c_str(), 0644), 0);
  EXPECT_TRUE(load({"MACHINA_API_HMAC_SECRET=x"}, {}, file.path())
                  .open_secrets()
                  .empty());
}

TEST(Config, CrossedBoundsAreRefused) {
  EXPECT_SAYS(
      refusal({"MACHINA_RETRY_MIN_MS=5000", "MACHINA_RETRY_MAX_MS=4000"}),
      "MACHINA_RETRY_MAX_MS");
}

TEST(Config, ChildrenAreGivenWhatWasSetAndNothingElse) {
  Config config = load({"MACHINA_LEASE_MS=500", "MACHINA_DRAIN_MS=600",
                        "MACHINA_QUEUE_MAX=7", "MACHINA_API_TOKEN=t"});
  EXPECT_EQ(config.environment(Setting::kWorker),
            (Strings{"MACHINA_LEASE_MS=500"}));
  EXPECT_EQ(config.environment(Setting::kPool | Setting::kWorker),
            (Strings{"MACHINA_LEASE_MS=500", "MACHINA_DRAIN_MS=600"}));
  for (const auto& entry : config.environment(0xff)) {
    EXPECT_FALSE(entry.starts_with("MACHINA_API_TOKEN")) << entry;
  }
}

TEST(Config, ScrubbingLeavesNoSecretInTheEnvironment) {
  ASSERT_EQ(::setenv("MACHINA_API_TOKEN", "hunter2hunter2", 1), 0);
  const char* text = ::getenv("MACHINA_API_TOKEN");
  scrub_secrets_from_environment();
  EXPECT_EQ(::getenv("MACHINA_API_TOKEN"), nullptr);
  EXPECT_EQ(std::string(text), "");  // overwritten where it stood
}

TEST(Config, F28_DurationsAreReadInTheVariablesUnit) {
  Config config = load({"MACHINA_DRAIN_MS=5s", "MACHINA_LEASE_MS=1m30s",
                        "MACHINA_API_HMAC_TTL_SEC=2m"});
  EXPECT_EQ(config.typed().drain_ms, 5000);
  EXPECT_EQ(config.typed().lease_ms, 90'000);
  EXPECT_EQ(config.typed().api_hmac_ttl_sec, 120);
  EXPECT_SAYS(refusal({"MACHINA_DRAIN_MS=2d"}), "0..86400000 ms");
  EXPECT_SAYS(refusal({"MACHINA_DRAIN_MS=5x"}),
              "\"5x\" must be 0..86400000 ms");
  EXPECT_SAYS(refusal({"MACHINA_API_HMAC_TTL_SEC=500ms"}), "1..3600 s");
  EXPECT_SAYS(refusal({"MACHINA_QUEUE_MAX=5s"}), "must be a whole number");
}

TEST(Config, EitherNameSetsASetting) {  // G5
  for (std::string tool : {"POLICY", "HTTP"}) {
    for (auto [name, second] : {std::pair("CPU", "CPU_SEC"),
                                {"AS", "AS_MB"},
                                {"FSIZE", "FSIZE_MB"}}) {
      const std::string own = "MACHINA_" + tool + "_RLIMIT_" + name;
      const std::string also = "MACHINA_" + tool + "_RLIMIT_" + second;
      EXPECT_EQ(load({own + "=41"}).text(own), "41");
      EXPECT_EQ(load({}, {{also, "42"}}).text(own), "42");
      TempFile file(also + ": 43\n");
      EXPECT_EQ(load({}, {}, file.path()).text(own), "43");
      const Config config = load({also + "=44"});
      EXPECT_EQ(config.text(own), "44");
      EXPECT_EQ(config.values().at(own).origin, "environment, " + also);
      EXPECT_FALSE(config.values().at(own).is_default());
      EXPECT_SAYS(config.print(), own + "=44");
      EXPECT_EQ(config.print().find("\n" + also), std::string::npos);
    }
    for (std::string name : {"NOFILE", "NPROC"}) {
      const std::string own = "MACHINA_" + tool + "_RLIMIT_" + name;
      EXPECT_EQ(load({own + "=45"}).text(own), "45");
    }
  }
  EXPECT_EQ(
      load({"MACHINA_HTTP_RLIMIT_CPU_SEC=1m"}).text("MACHINA_HTTP_RLIMIT_CPU"),
      "60");
  EXPECT_SAYS(refusal({"MACHINA_HTTP_RLIMIT_AS_MB=x"}),
              "MACHINA_HTTP_RLIMIT_AS_MB (environment): \"x\" must be");
  EXPECT_SAYS(refusal({"MACHINA_HTTP_RLIMIT_AS_M=1"}),
              "nearest is MACHINA_HTTP_RLIMIT_AS_MB");
}

TEST(Config, BothNamesInOneSourceMustAgree) {  // G5
  const Strings equal = {"MACHINA_POLICY_RLIMIT_CPU=3",
                         "MACHINA_POLICY_RLIMIT_CPU_SEC=3s"};
  EXPECT_EQ(load(equal).text("MACHINA_POLICY_RLIMIT_CPU"), "3");
  // Both orders: both names, both values, and where they came from.
  for (const Strings& two : {Strings{"MACHINA_POLICY_RLIMIT_CPU=3",
                                     "MACHINA_POLICY_RLIMIT_CPU_SEC=4"},
                             Strings{"MACHINA_POLICY_RLIMIT_CPU_SEC=4",
                                     "MACHINA_POLICY_RLIMIT_CPU=3"}}) {
    const std::string what = refusal(two);
    EXPECT_SAYS(what, "MACHINA_POLICY_RLIMIT_CPU (environment): \"3\"");
    EXPECT_SAYS(what, "MACHINA_POLICY_RLIMIT_CPU_SEC (environment): \"4\"");
    EXPECT_SAYS(what, "keep one");
  }
  TempFile file("MACHINA_HTTP_RLIMIT_AS: 1\nMACHINA_HTTP_RLIMIT_AS_MB: 2\n");
  EXPECT_SAYS(refusal({}, {}, file.path()),
              "MACHINA_HTTP_RLIMIT_AS_MB (file " + file.path() + "): \"2\"");
}

TEST(Config, TheNearestSourceWinsWhicheverNameItUsed) {  // G5
  TempFile file("MACHINA_POLICY_RLIMIT_AS: 1\n");
  const std::string own = "MACHINA_POLICY_RLIMIT_AS";
  const std::string also = "MACHINA_POLICY_RLIMIT_AS_MB";
  EXPECT_EQ(load({also + "=2"}, {}, file.path()).text(own), "2");
  EXPECT_EQ(load({also + "=2"}, {{own, "3"}}, file.path()).text(own), "3");
  EXPECT_EQ(load({own + "=2"}, {{also, "3"}}, file.path()).text(own), "3");
}

}  // namespace
}  // namespace machina
