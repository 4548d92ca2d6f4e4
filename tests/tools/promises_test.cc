// What a server refuses to start with, and what it says it does not promise.

#include "tools/promises.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>

namespace machina {
namespace {

Config with(const std::map<std::string, std::string>& settings) {
  auto config = Config::load({}, settings, "");
  EXPECT_TRUE(config) << (config ? "" : config.error().what);
  return *config;
}

std::string refusals(std::map<std::string, std::string> settings) {
  std::string all;
  for (const auto& line : start_refusals(with(settings))) all += line + "\n";
  return all;
}

const std::map<std::string, std::string> kGoodProd = {
    {"MACHINA_PROFILE", "prod"}, {"MACHINA_API_TOKEN", "sixteen-bytes-ok"}};

std::string prod_with(const std::string& name, const std::string& value) {
  auto settings = kGoodProd;
  settings[name] = value;
  return refusals(settings);
}

TEST(StartRefusals, DefaultsAndAGoodProdMayStart) {
  EXPECT_EQ(refusals({}), "");
  EXPECT_EQ(refusals(kGoodProd), "");
}

TEST(StartRefusals, ProdWithoutAuthentication) {
  EXPECT_NE(refusals({{"MACHINA_PROFILE", "prod"}}).find("MACHINA_API_TOKEN"),
            std::string::npos);
}

TEST(StartRefusals, ASecretForSignaturesIsAuthentication) {
  EXPECT_EQ(
      refusals({{"MACHINA_API_HMAC_SECRET", "s"}, {"MACHINA_HOST", "0.0.0.0"}}),
      "");
  EXPECT_EQ(refusals({{"MACHINA_PROFILE", "prod"},
                      {"MACHINA_API_HMAC_SECRET", "sixteen-bytes-ok"}}),
            "");
  EXPECT_NE(prod_with("MACHINA_API_HMAC_SECRET", "s")
                .find("MACHINA_API_HMAC_SECRET has 1 bytes"),
            std::string::npos);
}

TEST(StartRefusals, AllCredentialsAreTwo) {
  EXPECT_NE(prod_with("MACHINA_API_CREDENTIALS", "all").find("both"),
            std::string::npos);
  EXPECT_EQ(refusals({{"MACHINA_API_CREDENTIALS", "all"},
                      {"MACHINA_API_TOKEN", "t"},
                      {"MACHINA_API_HMAC_SECRET", "s"}}),
            "");
}

TEST(StartRefusals, ProdWithoutDurability) {
  EXPECT_NE(prod_with("MACHINA_WAL_FSYNC", "0").find("MACHINA_WAL_FSYNC"),
            std::string::npos);
  EXPECT_NE(prod_with("MACHINA_WAL_ENABLE", "0").find("MACHINA_WAL_ENABLE"),
            std::string::npos);
}

TEST(StartRefusals, ProdBelowItsLevel) {
  EXPECT_NE(prod_with("MACHINA_SECCOMP_ENABLE", "0").find("L2"),
            std::string::npos);
  auto lowered = kGoodProd;
  lowered["MACHINA_SECCOMP_ENABLE"] = "0";
  lowered["MACHINA_SANDBOX_MIN_LEVEL"] = "L2";  // on purpose
  EXPECT_EQ(refusals(lowered), "");
}

TEST(StartRefusals, WhatThisVersionCannotHonour) {
  EXPECT_NE(refusals({{"MACHINA_BWRAP_REQUIRED", "1"}}).find("bwrap"),
            std::string::npos);
  EXPECT_NE(refusals({{"MACHINA_SANDBOX_MIN_LEVEL", "L4"}}).find("L4"),
            std::string::npos);
}

TEST(StartRefusals, AnOpenAddressWithoutAToken) {
  EXPECT_NE(refusals({{"MACHINA_HOST", "0.0.0.0"}}).find("0.0.0.0"),
            std::string::npos);
  EXPECT_EQ(refusals({{"MACHINA_HOST", "0.0.0.0"}, {"MACHINA_API_TOKEN", "t"}}),
            "");
  for (const char* host : {"127.0.0.1", "127.1.2.3", "::1", "localhost"}) {
    EXPECT_EQ(refusals({{"MACHINA_HOST", host}}), "") << host;
  }
}

TEST(StartRefusals, AHostThatIsNoAddress) {
  for (const char* host : {"bogus", "300.1.1.1", "127.0.0.1:80", "[::1]"}) {
    std::string all = refusals({{"MACHINA_HOST", host}});
    EXPECT_NE(all.find("is not an address"), std::string::npos) << host;
    EXPECT_EQ(all.find("outside"), std::string::npos) << all;
  }
}

TEST(StartRefusals, ATokenThatCanBeGuessedInProd) {
  std::string all = prod_with("MACHINA_API_TOKEN", "fifteen-bytes-x");
  EXPECT_NE(all.find("15 bytes"), std::string::npos) << all;
  EXPECT_NE(all.find("at least 16"), std::string::npos) << all;
  EXPECT_EQ(all.find("fifteen"), std::string::npos) << "it was printed";
  EXPECT_EQ(refusals({{"MACHINA_API_TOKEN", "t"}}), "");  // dev
}

TEST(StartRefusals, ASecretsFileThatOthersMayReadInProd) {
  char name[] = "/tmp/machina_promises_test.XXXXXX";
  int fd = ::mkstemp(name);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(::write(fd, "sixteen-bytes-ok\n", 17), 17);
  std::map<std::string, std::string> prod = {{"MACHINA_PROFILE", "prod"}};
  for (mode_t mode : {0640, 0604, 0660}) {
    ASSERT_EQ(::fchmod(fd, mode), 0);
    auto config =
        Config::load({std::string("MACHINA_API_TOKEN_FILE=") + name}, prod, "");
    ASSERT_TRUE(config) << config.error().what;
    auto lines = start_refusals(*config);
    ASSERT_EQ(lines.size(), 1u);
    EXPECT_NE(lines[0].find(name), std::string::npos) << lines[0];
    EXPECT_NE(lines[0].find("chmod 600"), std::string::npos) << lines[0];
    char digits[8];
    std::snprintf(digits, sizeof digits, "%04o", mode);
    EXPECT_NE(lines[0].find(digits), std::string::npos) << lines[0];
    auto dev =
        Config::load({std::string("MACHINA_API_TOKEN_FILE=") + name}, {}, "");
    ASSERT_TRUE(dev);
    EXPECT_TRUE(start_refusals(*dev).empty());
    EXPECT_EQ(dev->open_secrets(), lines);  // what the warning says
    // One that is not in force does no harm.
    prod["MACHINA_API_TOKEN"] = "another-of-sixteen";
    auto other =
        Config::load({std::string("MACHINA_API_TOKEN_FILE=") + name}, prod, "");
    ASSERT_TRUE(other);
    EXPECT_TRUE(start_refusals(*other).empty());
    prod.erase("MACHINA_API_TOKEN");
  }
  ASSERT_EQ(::fchmod(fd, 0600), 0);
  auto config =
      Config::load({std::string("MACHINA_API_TOKEN_FILE=") + name}, prod, "");
  ASSERT_TRUE(config);
  EXPECT_TRUE(start_refusals(*config).empty());
  ::close(fd);
  ::unlink(name);
}

TEST(NotPromised, NamesEachWeakSetting) {
  std::string dev = not_promised(with({}));
  for (const char* part : {"power cut", "MACHINA_SANDBOX_MIN_LEVEL=L0",
                           "MACHINA_SECCOMP_ENABLE=0", "MACHINA_API_TOKEN"}) {
    EXPECT_NE(dev.find(part), std::string::npos) << dev;
  }
  std::string prod = not_promised(with(kGoodProd));
  EXPECT_EQ(prod.find("power cut"), std::string::npos) << prod;
  EXPECT_NE(prod.find("only once"), std::string::npos) << prod;
  EXPECT_EQ(prod.find('\n'), std::string::npos);  // one line
}

}  // namespace
}  // namespace machina
