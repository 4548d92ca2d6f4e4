// Control groups' directories: whose they are when two pools share a hierarchy
// and not their PID namespace, what is left of one that was killed, and what
// somebody else removed. As root, on the hierarchies of this host.

#include "workers/sandbox/cgroup.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace machina::sandbox {
namespace {

namespace fs = std::filesystem;

// A process with control groups of its own, and what it says of them: a line
// for each base. It ends when told to, without removing anything.
class Maker {
 public:
  explicit Maker(bool own_pids) {
    int out[2], in[2];
    if (pipe(out) != 0 || pipe(in) != 0) abort();
    outer_ = fork();
    if (outer_ == 0) {
      close(out[0]);
      close(in[1]);
      if (own_pids && (unshare(CLONE_NEWPID) != 0 || fork() != 0)) {
        close(out[1]);
        wait(nullptr);
        _exit(0);
      }
      make(out[1], in[0]);
    }
    close(out[1]);
    close(in[0]);
    tell_ = in[1];
    char text[4096];
    for (ssize_t n; (n = read(out[0], text, sizeof text)) > 0;) {
      said_.append(text, static_cast<std::size_t>(n));
      if (said_.find("end\n") != std::string::npos) break;
    }
    close(out[0]);
  }
  ~Maker() { end(); }
  Maker(const Maker&) = delete;

  std::vector<std::string> bases() const {
    std::vector<std::string> all;
    std::istringstream lines(said_);
    for (std::string line; std::getline(lines, line) && line != "end";) {
      all.push_back(line);
    }
    return all;
  }
  // As kill -9 would: nothing is tidied up.
  void end() {
    if (tell_ < 0) return;
    (void)!write(tell_, "x", 1);  // later ones hold a copy of this end
    close(tell_);
    tell_ = -1;
    waitpid(outer_, nullptr, 0);
  }

 private:
  [[noreturn]] static void make(int out, int in) {
    Cgroups groups;
    groups.find(false, false);
    std::string text, where;
    for (const auto& base : groups.bases()) text += base + "\n";
    text += groups.make_slot(3, &where) == 0 ? "end\n" : "failed\nend\n";
    (void)!write(out, text.data(), text.size());
    char byte;
    (void)!read(in, &byte, 1);
    _exit(0);
  }

  pid_t outer_ = 0;
  int tell_ = -1;
  std::string said_;
};

class CgroupTest : public testing::Test {
 protected:
  void SetUp() override {
    if (geteuid() != 0) GTEST_SKIP() << "needs root";
    Cgroups groups;
    groups.find(false, false);
    const bool none = groups.bases().empty();
    groups.remove();
    if (none) GTEST_SKIP() << "no control groups may be made here";
  }
  static bool all_there(const std::vector<std::string>& bases) {
    for (const auto& base : bases) {
      if (!fs::exists(base + "/slot-3")) return false;
    }
    return !bases.empty();
  }
  static bool none_there(const std::vector<std::string>& bases) {
    for (const auto& base : bases) {
      if (fs::exists(base)) return false;
    }
    return !bases.empty();
  }
};

TEST_F(CgroupTest, OneOfAnotherPidNamespaceIsNotTakenForDead) {  // G3
  Maker here(false);
  ASSERT_TRUE(all_there(here.bases()));
  // Its number means nothing in there, and another process's here.
  Maker there(true), beside(true);
  EXPECT_TRUE(all_there(here.bases()));
  ASSERT_TRUE(all_there(there.bases()));
  ASSERT_TRUE(all_there(beside.bases()));
  for (const auto& base : there.bases()) {
    for (const auto& other : beside.bases()) EXPECT_NE(base, other);
  }
  Maker last(false);
  EXPECT_TRUE(all_there(there.bases()));
  EXPECT_TRUE(all_there(beside.bases()));
  there.end();
  beside.end();
  here.end();
  last.end();
  // The one that looks next in a namespace where they are dead removes them.
  Maker sweeper(false);
  EXPECT_TRUE(none_there(here.bases()));
  EXPECT_TRUE(none_there(last.bases()));
  for (const auto* left : {&there, &beside}) {
    for (const auto& base : left->bases()) {
      fs::remove(base + "/slot-3");
      fs::remove(base);
    }
  }
  Maker end(true);
  for (const auto& base : sweeper.bases()) EXPECT_TRUE(fs::exists(base));
  sweeper.end();
  end.end();
  for (const auto* left : {&sweeper, &end}) {
    for (const auto& base : left->bases()) {
      fs::remove(base + "/slot-3");
      fs::remove(base);
    }
  }
}

TEST_F(CgroupTest, WhatSomebodyRemovedIsMadeAgain) {  // G4
  Cgroups groups;
  groups.find(false, false);
  std::string where;
  ASSERT_EQ(groups.make_slot(0, &where), 0) << where;
  for (const auto& base : groups.bases()) {
    fs::remove(base + "/slot-0");
    fs::remove(base);
  }
  EXPECT_EQ(groups.make_slot(0, &where), 0) << where;
  for (const auto& base : groups.bases()) {
    EXPECT_TRUE(fs::exists(base + "/slot-0")) << base;
  }
  groups.remove();
  EXPECT_TRUE(none_there(groups.bases()));
}

}  // namespace
}  // namespace machina::sandbox
