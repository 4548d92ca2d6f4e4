// MACHINA_ROOT: tools/root.h's promises by number.

#include "tools/root.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

namespace machina {
namespace {

namespace fs = std::filesystem;

class RootTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/var/tmp/machina_root_test.XXXXXX";
    ASSERT_NE(::mkdtemp(name), nullptr);
    dir_ = name;
  }
  void TearDown() override { fs::remove_all(dir_); }

  std::string refusal(const std::string& path, bool prod = false,
                      bool unsafe_fs = true) {
    auto root = prepare_root(path, prod, unsafe_fs);
    EXPECT_FALSE(root) << path << " was accepted";
    return root ? "" : root.error().what;
  }

  std::string dir_;
};

#define EXPECT_SAYS(text, part) \
  EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST_F(RootTest, DirectoriesThatOthersNeedAreRefused) {  // R1
  for (const char* path : {"/", "/home", "/usr", "/etc", "/var", "/tmp",
                           "/root", "/var/tmp", "/home/someone", "/etc/machina",
                           "/proc/self", "/usr/", "/var/tmp/..", "//", ""}) {
    EXPECT_SAYS(refusal(path), "MACHINA_ROOT");
  }
}

TEST_F(RootTest, ALinkToADangerousDirectoryIsRefused) {  // R1
  fs::create_symlink("/var", dir_ + "/link");
  EXPECT_SAYS(refusal(dir_ + "/link"), "\"/var\"");
}

TEST_F(RootTest, DevMakesItProdDoesNot) {  // R3
  EXPECT_SAYS(refusal(dir_ + "/new", true), "mkdir -m 700");
  EXPECT_FALSE(fs::exists(dir_ + "/new"));
  auto root = prepare_root(dir_ + "/new", false, true);
  ASSERT_TRUE(root) << root.error().what;
  struct stat status {};
  ASSERT_EQ(::stat((dir_ + "/new").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700u);
  for (const char* sub :
       {"queue", "history", "logs", "artifacts", "repos", "mirrors"}) {
    ASSERT_EQ(::stat((dir_ + "/new/" + sub).c_str(), &status), 0) << sub;
    EXPECT_EQ(status.st_mode & 0777, 0700u) << sub;
  }
  EXPECT_TRUE(prepare_root(dir_ + "/new", true, true));  // and again, in prod
}

TEST_F(RootTest, WritableByOthersIsRefused) {  // R2
  ASSERT_EQ(::chmod(dir_.c_str(), 0770), 0);
  EXPECT_SAYS(refusal(dir_), "0770");
  ASSERT_EQ(::chmod(dir_.c_str(), 0707), 0);
  EXPECT_SAYS(refusal(dir_), "0707");
}

TEST_F(RootTest, SomebodyElsesIsRefused) {  // R2
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown(dir_.c_str(), 65534, 65534), 0);
    EXPECT_SAYS(refusal(dir_), "belongs to uid 65534");
  } else {
    EXPECT_SAYS(refusal("/usr/share/doc"), "belongs to uid 0");
  }
}

TEST_F(RootTest, ASubdirectoryThatIsALinkIsRefused) {
  fs::create_directory(dir_ + "/elsewhere");
  fs::create_symlink(dir_ + "/elsewhere", dir_ + "/queue");
  EXPECT_SAYS(refusal(dir_), "/queue");
}

TEST_F(RootTest, AFileIsNoRoot) {
  std::string file = dir_ + "/file";
  fclose(fopen(file.c_str(), "w"));
  EXPECT_SAYS(refusal(file), "not a directory");
}

TEST_F(RootTest, SocketPathThatDoesNotFitIsRefusedByName) {  // R5
  std::string longest = dir_ + "/";
  longest.resize(kSocketPathBytesMax - std::string("/machina.sock").size(),
                 'r');
  auto fits = prepare_root(longest, false, true);
  EXPECT_TRUE(fits) << fits.error().what;
  EXPECT_SAYS(refusal(longest + "x"), "/machina.sock has 108 bytes");
  EXPECT_FALSE(fs::exists(longest + "x")) << "made, then refused";
}

// R4, on a tmpfs of a mount namespace of our own. Exits 0, or with the number
// of the expectation that failed.
int try_tmpfs(const std::string& dir) {
  if (::unshare(CLONE_NEWNS) != 0) return 77;
  if (::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
      ::mount("tmpfs", dir.c_str(), "tmpfs", 0, "mode=0700") != 0) {
    return 77;
  }
  auto refused = prepare_root(dir, true, false);
  if (refused) return 1;
  if (refused.error().what.find("tmpfs") == std::string::npos) return 2;
  if (refused.error().what.find("--unsafe-fs") == std::string::npos) return 3;
  auto allowed = prepare_root(dir, true, true);
  if (!allowed || allowed->warnings.size() != 1) return 4;
  auto warned = prepare_root(dir, false, false);
  return warned && warned->warnings.size() == 1 ? 0 : 5;
}

TEST_F(RootTest, AForgetfulFileSystemIsRefusedInProd) {  // R4
  pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) ::_exit(try_tmpfs(dir_));
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == 77) GTEST_SKIP() << "may not mount a tmpfs here";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace machina
