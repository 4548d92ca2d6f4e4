// tools/trust.h's promises by number. The halves with other users need root.

#include "tools/trust.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "tools/config.h"
#include "tools/ops.h"
#include "tools/root.h"

namespace machina {
namespace {

namespace fs = std::filesystem;

constexpr uid_t kStranger = 65432;

class Trust : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/var/tmp/machina_trust_test.XXXXXX";
    ASSERT_NE(::mkdtemp(name), nullptr);
    dir_ = name;
    fs::create_directories(dir_ + "/a/b/root");
    for (const char* each : {"", "/a", "/a/b", "/a/b/root"}) {
      ASSERT_EQ(::chmod((dir_ + each).c_str(), 0755), 0);
    }
  }
  void TearDown() override { fs::remove_all(dir_); }

  std::string refusal(const std::string& path, bool of_others = false) {
    auto ok = check_trusted("MACHINA_ROOT", path, of_others);
    return ok ? "" : ok.error().what;
  }
  static bool has(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  }

  std::string dir_;
};

TEST_F(Trust, F21_ADirectoryOnTheWayThatOthersMayWriteIsRefused) {  // T2
  const std::string root = dir_ + "/a/b/root";
  EXPECT_EQ(refusal(root), "");
  for (mode_t mode : {0775, 0757, 0777, 0720}) {
    ASSERT_EQ(::chmod((dir_ + "/a").c_str(), mode), 0);
    const std::string why = refusal(root);
    EXPECT_TRUE(has(why, dir_ + "/a may be written by others")) << why;
    EXPECT_TRUE(has(why, "chmod go-w " + dir_ + "/a,")) << why;
    EXPECT_TRUE(has(why, "MACHINA_ROOT")) << why;
  }
  ASSERT_EQ(::chmod((dir_ + "/a").c_str(), 01777), 0);  // as /tmp
  EXPECT_EQ(refusal(root), "");
}

TEST_F(Trust, F21_LinksAreFollowedComponentByComponent) {  // T1
  fs::create_directories(dir_ + "/open/inner");
  fs::create_directory_symlink("inner", dir_ + "/open/link");
  fs::create_directory_symlink(dir_ + "/open/link", dir_ + "/way");
  EXPECT_EQ(refusal(dir_ + "/way"), "");
  // The directory that holds the second link, which no text names.
  ASSERT_EQ(::chmod((dir_ + "/open").c_str(), 0777), 0);
  EXPECT_TRUE(has(refusal(dir_ + "/way"), dir_ + "/open may be written"))
      << refusal(dir_ + "/way");
  // By way of "..", too.
  fs::create_directory_symlink("../open/inner", dir_ + "/a/up");
  EXPECT_TRUE(has(refusal(dir_ + "/a/up/x"), dir_ + "/open may be written"));
}

TEST_F(Trust, F21_WhatIsNotThereIsNotJudged) {  // T4
  EXPECT_EQ(refusal(dir_ + "/a/none/at/all"), "");
  fs::create_directory_symlink("loop", dir_ + "/loop");
  EXPECT_EQ(refusal(dir_ + "/loop/x"), "");
}

TEST_F(Trust, F21_WhatBelongsToAnotherUserIsRefused) {  // T1, T3
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to give files away";
  const std::string root = dir_ + "/a/b/root";
  ASSERT_EQ(::chown((dir_ + "/a").c_str(), kStranger, kStranger), 0);
  const std::string why = refusal(root);
  EXPECT_TRUE(has(why, dir_ + "/a is a directory that belongs to uid 65432"))
      << why;
  EXPECT_TRUE(has(why, "mode 0755")) << why;
  // The stranger's own directory is theirs to show to root, but only by way of
  // what is theirs or root's.
  ASSERT_EQ(::chown(root.c_str(), kStranger, kStranger), 0);
  EXPECT_EQ(refusal(root, true), "");
  EXPECT_NE(refusal(root, false), "");
  ASSERT_EQ(::chown((dir_ + "/a/b").c_str(), kStranger + 1, 0), 0);
  EXPECT_TRUE(has(refusal(root, true), "belongs to uid 65433"));
}

TEST_F(Trust, F21_ALinkOfAnotherUserIsRefused) {  // T1
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to give files away";
  fs::create_directory_symlink(dir_ + "/a/b/root", dir_ + "/link");
  EXPECT_EQ(refusal(dir_ + "/link"), "");
  ASSERT_EQ(::lchown((dir_ + "/link").c_str(), kStranger, kStranger), 0);
  const std::string why = refusal(dir_ + "/link");
  EXPECT_TRUE(has(why, "is a symbolic link that belongs to uid 65432")) << why;
}

// Each door asks: a root that serves, one that is looked at, files.
TEST_F(Trust, F21_RootsSecretsAndConfigurationAreAskedAbout) {
  const std::string root = dir_ + "/a/b/root";
  ASSERT_EQ(::chmod(root.c_str(), 0700), 0);
  std::ofstream(dir_ + "/a/b/token") << "0123456789abcdef0123456789abcdef\n";
  ASSERT_EQ(::chmod((dir_ + "/a/b/token").c_str(), 0600), 0);
  std::ofstream(dir_ + "/a/b/m.yaml") << "MACHINA_PORT: 1\n";
  const std::vector<std::string> secret = {"MACHINA_API_TOKEN_FILE=" + dir_ +
                                           "/a/b/token"};
  EXPECT_TRUE(prepare_root(root, false, true));
  EXPECT_TRUE(detect(root));
  EXPECT_TRUE(Config::load(secret, {}, dir_ + "/a/b/m.yaml"));
  ASSERT_EQ(::chmod((dir_ + "/a").c_str(), 0777), 0);
  const std::string word = dir_ + "/a may be written by others (mode 0777)";
  const auto says = [&](const auto& result, const std::string& name) {
    ASSERT_FALSE(result) << name;
    EXPECT_TRUE(has(result.error().what, word)) << result.error().what;
    EXPECT_TRUE(has(result.error().what, name)) << result.error().what;
  };
  says(prepare_root(root, false, true), "MACHINA_ROOT");
  says(examine_root(root, false, true), "MACHINA_ROOT");
  says(examine_root(dir_ + "/a/b/new", false, true), "MACHINA_ROOT");
  says(detect(root), "MACHINA_ROOT");
  says(Config::load(secret, {}, ""), "MACHINA_API_TOKEN_FILE");
  says(Config::load({}, {}, dir_ + "/a/b/m.yaml"), "--config");
}

}  // namespace
}  // namespace machina
