// queue/base/logger.h and queue/base/line_file.h. Each test that changes what
// this process says of itself does so in a process of its own.

#include "queue/base/logger.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <sstream>
#include <thread>
#include <vector>

#include "queue/base/line_file.h"

namespace machina {
namespace {

namespace fs = std::filesystem;

class LoggerTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/logger_test_XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    dir_ = name;
  }
  void TearDown() override { fs::remove_all(dir_); }

  std::string path(const std::string& name) const { return dir_ + "/" + name; }
  static std::string read(const std::string& path) {
    std::ifstream in(path);
    std::stringstream text;
    text << in.rdbuf();
    return text.str();
  }
  static std::vector<std::string> lines(const std::string& text) {
    std::vector<std::string> all;
    std::istringstream in(text);
    for (std::string line; std::getline(in, line);) all.push_back(line);
    return all;
  }
  // Runs `what` in a child whose standard error is the file "err"; its exit
  // code.
  int child(const std::function<int()>& what) const {
    pid_t pid = fork();
    if (pid == 0) {
      int fd = ::open(path("err").c_str(),
                      O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
      dup2(fd, 2);
      _exit(what());
    }
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  std::string dir_;
};

TEST_F(LoggerTest, ALineHasItsPartsInText) {
  child([] {
    LoggerOptions o;
    o.component = "server";
    set_logger(o);
    LogLine(Severity::warn, "request", "Not Found")
        .with("path", "/a b")
        .with("status", 404)
        .with("request_id", "r-1")
        .with("job", "");
    LogLine(Severity::debug, "request", "not kept");
    return 0;
  });
  auto all = lines(read(path("err")));
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].substr(24),
            " warn server request: Not Found path=\"/a b\" status=404 "
            "request_id=r-1");
  EXPECT_EQ(all[0][10], 'T');
  EXPECT_EQ(all[0][23], 'Z');
}

TEST_F(LoggerTest, WhatAClientSentCannotLookLikeALine) {
  for (bool json : {false, true}) {
    fs::remove(path("err"));
    child([&] {
      LoggerOptions o;
      o.json = json;
      o.component = "server";
      set_logger(o);
      LogLine(Severity::info, "request", "x\n2026-01-01T00:00:00.000Z error")
          .with("path",
                "/\r\n\x1b[2J\x7f\xc2\x9b\xff\"\\ {\"level\":\"error\"}")
          .with("big", std::string(100'000, '\n'))
          .with("utf8", "gr\xc3\xbc\xc3\x9f")
          .with("long", "\xe0\x80\xaf|\xed\xa0\x80|\xf0\x80\x80\xaf");
      return 0;
    });
    std::string text = read(path("err"));
    ASSERT_EQ(lines(text).size(), 1u) << text;
    EXPECT_LE(text.size(), kLogLineBytesMax);
    EXPECT_NE(text.find("/\\u000d\\n\\u001b[2J\\u007f\\u009b\\ufffd\\\"\\\\ "
                        "{\\\"level\\\":\\\"error\\\"}"),
              text.npos)
        << text;
    EXPECT_NE(text.find("gr\xc3\xbc\xc3\x9f"), text.npos);
    // No other spelling of '/', no half of a pair.
    EXPECT_NE(text.find("\\ufffd\\ufffd\\ufffd|\\ufffd\\ufffd\\ufffd|"),
              text.npos)
        << text;
    EXPECT_NE(text.find("..."), text.npos);
    for (char c : text.substr(0, text.size() - 1)) {
      EXPECT_TRUE(static_cast<unsigned char>(c) >= 0x20 && c != 0x7f);
    }
  }
}

TEST_F(LoggerTest, ManyFieldsNeverMakeALineTooLong) {
  child([] {
    LogLine line(Severity::info, "many", std::string(10'000, 'm'));
    for (int i = 0; i < 100; ++i) line.with("name", std::string(900, 'v'));
    return 0;
  });
  std::string text = read(path("err"));
  EXPECT_EQ(lines(text).size(), 1u);
  EXPECT_LE(text.size(), kLogLineBytesMax);
  EXPECT_GT(text.size(), 2000u);
}

TEST_F(LoggerTest, AStillReaderHoldsNobodyUpAndTheLossIsCounted) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  int code = child([&] {
    dup2(ends[1], 2);
    start_logger(nullptr);
    // Far more than pipe and queue hold; nobody reads.
    std::string text(1000, 'x');
    for (int i = 0; i < 20'000; ++i) LogLine(Severity::info, "flood", text);
    bool dropped = log_lines_dropped() > 1000;
    stop_logger(500);  // ends although nobody reads
    return dropped ? 0 : 1;
  });
  EXPECT_EQ(code, 0);
  close(ends[0]);
  close(ends[1]);
}

TEST_F(LoggerTest, AReaderThatWentAwayKillsNobody) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  close(ends[0]);
  int code = child([&] {
    signal(SIGPIPE, SIG_DFL);
    dup2(ends[1], 2);
    start_logger(nullptr);
    LogLine(Severity::info, "gone", "nobody hears");
    stop_logger(5000);
    return log_lines_dropped() == 1 ? 0 : 1;
  });
  close(ends[1]);
  EXPECT_EQ(code, 0);
}

// Each of the lines is in the file, or in the count that follows the first line
// that finds room again; the notice itself is in neither.
TEST_F(LoggerTest, AFullDiskCostsLinesAndIsToldOfLater) {
  constexpr std::size_t kLines = 100;
  const auto kept = [&] {
    std::string text = read(path("log"));
    return static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
  };
  int code = child([&] {
    signal(SIGXFSZ, SIG_IGN);
    auto file = LineFile::open(path("log"), 1 << 20, 1 << 22);
    if (!file) return 1;
    rlimit small{1000, RLIM_INFINITY}, none{RLIM_INFINITY, RLIM_INFINITY};
    setrlimit(RLIMIT_FSIZE, &small);  // from here on writes fail
    start_logger(std::move(*file));
    for (std::size_t i = 0; i < kLines; ++i) {
      LogLine(Severity::info, "before", std::string(100, 'b'));
    }
    for (int i = 0; i < 3000 && kept() + log_lines_dropped() < kLines; ++i) {
      usleep(10'000);
    }
    if (kept() + log_lines_dropped() != kLines) return 2;
    setrlimit(RLIMIT_FSIZE, &none);
    LogLine(Severity::info, "after", "room again");
    stop_logger(5000);
    return 0;
  });
  ASSERT_EQ(code, 0);
  auto all = lines(read(path("log")));
  ASSERT_GE(all.size(), 4u);
  const std::size_t whole = all.size() - 3;
  EXPECT_NE(all[0].find(" before: bbb"), std::string::npos);
  EXPECT_EQ(all[whole].find(std::string(100, 'b')), std::string::npos)
      << "the torn one";
  EXPECT_NE(all[whole + 1].find(" after: room again"), std::string::npos)
      << "on a line of its own, behind the torn one";
  const std::string lost = std::to_string(kLines - whole);
  EXPECT_TRUE(all.back().ends_with(
      " log_dropped: lines were dropped count=" + lost + " total=" + lost))
      << all.back() << ", but " << whole << " are there";
}

// The same on standard error, and before there is a thread that writes.
TEST_F(LoggerTest, AFullDiskUnderStandardErrorIsToldOfToo) {
  for (bool background : {false, true}) {
    SCOPED_TRACE(background);
    fs::remove(path("err"));
    int code = child([&] {
      signal(SIGXFSZ, SIG_IGN);
      rlimit small{40, RLIM_INFINITY}, none{RLIM_INFINITY, RLIM_INFINITY};
      setrlimit(RLIMIT_FSIZE, &small);
      if (background) start_logger(nullptr);
      LogLine(Severity::info, "before", std::string(100, 'b'));
      LogLine(Severity::info, "before", std::string(100, 'b'));
      for (int i = 0; i < 3000 && log_lines_dropped() < 2; ++i) usleep(10'000);
      if (log_lines_dropped() != 2) return 2;
      setrlimit(RLIMIT_FSIZE, &none);
      LogLine(Severity::info, "after", "room again");
      stop_logger(5000);
      return 0;
    });
    ASSERT_EQ(code, 0);
    auto all = lines(read(path("err")));
    ASSERT_EQ(all.size(), 3u) << read(path("err"));
    EXPECT_NE(all[1].find(" after: room again"), std::string::npos);
    EXPECT_TRUE(all[2].ends_with("lines were dropped count=2 total=2"))
        << all[2];
  }
}

TEST_F(LoggerTest, LinesOfOthersComeThroughThePipe) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  int code = child([&] {
    auto file = LineFile::open(path("log"), 1 << 20, 1 << 22);
    start_logger(std::move(*file), ends[0]);
    std::vector<pid_t> writers;
    for (int w = 0; w < 4; ++w) {
      writers.push_back(fork());
      if (writers.back() == 0) {
        for (int i = 0; i < 200; ++i) {
          std::string line = "w" + std::to_string(w) + "-" + std::to_string(i) +
                             " " + std::string(200, 'a' + w) + "\n";
          if (i == 0) line.insert(2, 1, '\x1b');
          (void)!::write(ends[1], line.data(), line.size());
        }
        _exit(0);
      }
    }
    for (pid_t pid : writers) waitpid(pid, nullptr, 0);
    LogLine(Severity::info, "last", "mine");
    stop_logger(5000);
    return 0;
  });
  ASSERT_EQ(code, 0);
  std::string text = read(path("log"));
  EXPECT_EQ(text.find('\x1b'), text.npos);
  std::set<std::string> seen;
  for (const auto& line : lines(text)) {
    if (line[0] == 'w') {
      seen.insert(line.substr(0, line.find(' ')));
      EXPECT_EQ(line.substr(line.find(' ') + 1),
                std::string(200, static_cast<char>('a' + (line[1] - '0'))));
    }
  }
  EXPECT_EQ(seen.size(), 800u);
  EXPECT_NE(text.find("last: mine"), text.npos);
  close(ends[0]);
  close(ends[1]);
}

// F1, F2: nothing is lost but what is oldest, and the sum stays in its bound.
TEST_F(LoggerTest, AFileIsRenamedAsideAndTheOldestGo) {
  auto file = LineFile::open(path("log"), 1000, 3500);
  ASSERT_TRUE(file);
  for (int i = 0; i < 500; ++i) {
    std::string line = "line " + std::to_string(i) + "\n";
    ASSERT_TRUE((*file)->append(line + line.substr(0, 4) + "'\n"));
    std::uint64_t total = 0;
    for (const auto& entry : fs::directory_iterator(dir_)) {
      total += entry.file_size();
      EXPECT_LE(entry.file_size(), 1000u + 20);
    }
    ASSERT_LE(total, 3500u);
  }
  int next = -1;
  for (const char* name : {"log.2", "log.1", "log"}) {
    for (const auto& line : lines(read(path(name)))) {
      if (line == "line'") continue;
      int n = std::stoi(line.substr(5));
      if (next >= 0) {
        EXPECT_EQ(n, next) << name;
      }
      next = n + 1;
    }
  }
  EXPECT_EQ(next, 500);
  EXPECT_FALSE(fs::exists(path("log.3")));
}

// What is there from before, or was put there meanwhile, counts too.
TEST_F(LoggerTest, TheBoundHoldsFromTheFirstMomentOn) {
  const auto litter = [&] {
    for (int n = 1; n <= 9; ++n) {
      std::ofstream(path("log." + std::to_string(n)))
          << std::string(900, static_cast<char>('0' + n));
    }
  };
  const auto check = [&] {
    EXPECT_TRUE(fs::exists(path("log.2")));
    EXPECT_EQ(read(path("log.1"))[0], '1') << "the newest stay";
    for (int n = 3; n <= 9; ++n) {
      EXPECT_FALSE(fs::exists(path("log." + std::to_string(n)))) << n;
    }
  };
  litter();
  auto file = LineFile::open(path("log"), 1000, 3500);
  ASSERT_TRUE(file);
  check();
  litter();
  (*file)->reopen();
  check();
}

// One file never takes all that there may be: turning over leaves what was said
// last.
TEST_F(LoggerTest, AFileIsAtMostHalfOfAll) {
  auto file = LineFile::open(path("log"), 1 << 20, 4000);
  ASSERT_TRUE(file);
  const std::string line = std::string(99, 'x') + "\n";
  for (int i = 0; i < 200; ++i) {
    ASSERT_EQ((*file)->append(line), line.size());
    std::uint64_t total = 0;
    for (const auto& entry : fs::directory_iterator(dir_)) {
      total += entry.file_size();
    }
    ASSERT_LE(total, 4000u);
    if (i >= 20) {
      ASSERT_GE(total, 2000u) << i;
    }
  }
}

// Another's file of our name is not turned over by us.
TEST_F(LoggerTest, OnlyOurOwnFileIsRenamedAside) {
  auto file = LineFile::open(path("log"), 1000, 10'000);
  ASSERT_TRUE(file);
  (*file)->append(std::string(999, 'a') + "\n");
  fs::rename(path("log"), path("elsewhere"));
  std::ofstream(path("log")) << "theirs\n";
  (*file)->append("b\n");  // the one that we had is full
  EXPECT_FALSE(fs::exists(path("log.1")));
  EXPECT_EQ(read(path("log")), "theirs\nb\n");
}

TEST_F(LoggerTest, AFileThatWasMovedAwayIsBegunAnewOnReopen) {
  auto file = LineFile::open(path("log"), 1 << 20, 1 << 22);
  ASSERT_TRUE(file);
  (*file)->append("one\n");
  fs::rename(path("log"), path("elsewhere"));
  (*file)->append("two\n");
  (*file)->reopen();
  (*file)->append("three\n");
  EXPECT_EQ(read(path("elsewhere")), "one\ntwo\n");
  EXPECT_EQ(read(path("log")), "three\n");
}

TEST_F(LoggerTest, OnlyARegularFileOfItsOwnIsWritten) {
  fs::create_symlink("/etc/passwd", path("link"));
  EXPECT_FALSE(LineFile::open(path("link"), 1000, 4000));
  ASSERT_EQ(mkfifo(path("fifo").c_str(), 0600), 0);
  EXPECT_FALSE(LineFile::open(path("fifo"), 1000, 4000));
  std::ofstream(path("mine")) << "x";
  fs::create_hard_link(path("mine"), path("hard"));
  EXPECT_FALSE(LineFile::open(path("hard"), 1000, 4000));
  EXPECT_FALSE(LineFile::open(path("no/such"), 1000, 4000));
}

TEST_F(LoggerTest, AnAllowanceCountsWhatItRefuses) {
  Allowance two(2);
  EXPECT_TRUE(two.take(5000));
  EXPECT_TRUE(two.take(5001));
  EXPECT_FALSE(two.take(5002));
  EXPECT_FALSE(two.take(5999));
  EXPECT_TRUE(two.take(6000));
  EXPECT_EQ(two.suppressed(), 2u);
  EXPECT_EQ(two.suppressed(), 0u);
}

}  // namespace
}  // namespace machina
