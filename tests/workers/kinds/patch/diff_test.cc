// What the reader of diffs lets pass and what it does not: a table of diffs as
// git, diff and people write them, and of those that would do harm.

#include "workers/kinds/patch/diff.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace machina::kinds {
namespace {

using testing::HasSubstr;
using Verdict = Diff::Verdict;

const std::string kBody = "@@ -1,2 +1,2 @@\n a\n-b\n+c\n";

std::string edit(const std::string& a, const std::string& b) {
  return "diff --git " + a + " " + b + "\n--- " + a + "\n+++ " + b + "\n" +
         kBody;
}
std::string make(const std::string& name, const std::string& mode = "100644",
                 const std::string& text = "x") {
  return "diff --git a/" + name + " b/" + name + "\nnew file mode " + mode +
         "\nindex 0000000..1111111\n--- /dev/null\n+++ b/" + name +
         "\n@@ -0,0 +1 @@\n+" + text + "\n\\ No newline at end of file\n";
}

TEST(DiffTest, ReadsWhatGitWrites) {
  const std::string text =
      "From 0123 Mon Sep 17 00:00:00 2001\nSubject: [PATCH] x\n\n---\n"
      " m.py | 2 +-\n\n"
      "diff --git a/m.py b/m.py\nindex 1111111..2222222 100644\n"
      "--- a/m.py\n+++ b/m.py\n@@ -1,3 +1,4 @@ def f():\n a\n-b\n+c\n+d\n e\n"
      "@@ -10 +11 @@\n-x\n\\ No newline at end of file\n+x\n"
      "diff --git a/old name b/new name\nsimilarity index 100%\n"
      "rename from old name\nrename to new name\n"
      "diff --git a/run b/run\nold mode 100644\nnew mode 100755\n"
      "diff --git a/empty b/empty\nnew file mode 100644\n"
      "index 0000000..e69de29\n"
      "diff --git a/gone b/gone\ndeleted file mode 100755\n"
      "index 1111111..0000000\n--- a/gone\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n"
      "diff --git \"a/t\\303\\274r\" \"b/t\\303\\274r\"\n"
      "--- \"a/t\\303\\274r\"\n+++ \"b/t\\303\\274r\"\n" +
      kBody + "-- \n2.39.5\n\n";
  const Diff diff = read_diff(text);
  ASSERT_EQ(diff.verdict, Verdict::ok) << diff.problem;
  ASSERT_EQ(diff.files.size(), 6u);
  EXPECT_EQ(diff.strip, 1);
  EXPECT_EQ(diff.files[0].hunks.size(), 2u);
  EXPECT_EQ(diff.files[0].added, 3u);
  EXPECT_EQ(diff.files[0].removed, 2u);
  EXPECT_EQ(diff.files[0].hunks[1].old_start, 10u);
  EXPECT_TRUE(diff.files[1].renamed);
  EXPECT_EQ(diff.files[1].old_path, "old name");
  EXPECT_EQ(diff.files[1].new_path, "new name");
  EXPECT_EQ(diff.files[2].new_mode, 0100755u);
  EXPECT_TRUE(diff.files[3].created);
  EXPECT_TRUE(diff.files[4].deleted);
  EXPECT_EQ(diff.files[4].new_path, "");
  EXPECT_EQ(diff.files[5].new_path, "t\303\274r");
  EXPECT_EQ(diff.paths,
            (std::set<std::string>{"m.py", "old name", "new name", "run",
                                   "empty", "gone", "t\303\274r"}));
}

TEST(DiffTest, ReadsPlainAndUnprefixedOnes) {
  const Diff plain = read_diff(
      "--- a/m.py\t2026-01-01 00:00:00 +0000\n"
      "+++ b/m.py\t2026-01-02 00:00:00 +0000\n" +
      kBody);
  ASSERT_EQ(plain.verdict, Verdict::ok) << plain.problem;
  EXPECT_EQ(plain.strip, 1);
  EXPECT_EQ(plain.files[0].new_path, "m.py");
  const Diff bare = read_diff(edit("src/m.py", "src/m.py"));
  ASSERT_EQ(bare.verdict, Verdict::ok) << bare.problem;
  EXPECT_EQ(bare.strip, 0);
  EXPECT_EQ(bare.files[0].new_path, "src/m.py");
  EXPECT_EQ(read_diff("--- m.py\n+++ m.py\n" + kBody).strip, 0);
  const Diff crlf = read_diff(
      "diff --git a/m b/m\r\n--- a/m\r\n+++ b/m\r\n"
      "@@ -1 +1 @@\r\n-a\r\n+b\r\n");
  EXPECT_EQ(crlf.verdict, Verdict::ok) << crlf.problem;
  EXPECT_EQ(*crlf.paths.begin(), "m");
  // An empty line is an empty context line that lost its space.
  EXPECT_EQ(
      read_diff("--- a/m\n+++ b/m\n@@ -1,3 +1,3 @@\n a\n\n-b\n+c\n").verdict,
      Verdict::ok);
}

struct Bad {
  std::string diff, why;
};

TEST(DiffTest, RefusesWhatWouldDoHarm) {
  const std::string up = "a/../../etc/passwd", up_b = "b/../../etc/passwd";
  const std::vector<Bad> table = {
      {edit(up, up_b), ".."},
      {edit("../../etc/x", "../../etc/x"), ".."},
      {edit("../x", "../x"), ".."},
      {"--- ../../etc/x\n+++ ../../etc/x\n" + kBody, ".."},
      {edit("/etc/passwd", "/etc/passwd"), "absolute"},
      {edit("a//etc/passwd", "b//etc/passwd"), "absolute"},
      {edit("a/x//y", "b/x//y"), "empty component"},
      {edit("a/x/./y", "b/x/./y"), "\".\""},
      {edit("a/x\\..\\..\\y", "b/x\\..\\..\\y"), ".."},
      {make(".git/hooks/post-checkout", "100755"), ".git"},
      {make("sub/.git/config"), ".git"},
      {make(".GIT/config"), ".git"},
      {make(".Git/config"), ".git"},
      {make("git~1/config"), ".git"},
      {make("GIT~1/config"), ".git"},
      {make(".git./config"), ".git"},
      {make(".git . /config"), ".git"},
      {make(".git::$INDEX_ALLOCATION/config"), ".git"},
      {make(".git:x/config"), ".git"},
      {make("x\\.git\\config"), ".git"},
      {make(".g\342\200\214it/config"), ".git"},
      {make("\357\273\277.git/config"), ".git"},
      {make(".gi\342\200\215t/config"), ".git"},
      {make(".gitmodules"), "submodules"},
      {edit("a/.gitmodules", "b/.gitmodules"), "submodules"},
      {make("sub", "160000"), "submodules"},
      {"diff --git a/s b/s\nindex 1111111..2222222 160000\n--- a/s\n+++ b/s\n" +
           kBody,
       "submodules"},
      {make("x", "100600"), "mode"},
      {make("x", "040000"), "mode"},
      {make("x", "104755"), "mode"},
      {make("x", "100666"), "mode"},
      {make("link", "120000", "/etc/passwd"), "absolute"},
      {make("link", "120000", "../x"), "leaves"},
      {make("d/link", "120000", "../../x"), "leaves"},
      {make("link", "120000", "d/../../x"), "leaves"},
      {make("link", "120000", "d/../x"), "leaves"},
      {make("link", "120000", ".git/hooks"), ".git"},
      {make("link", "120000", "sub") + make("link/x"), "lies below"},
      {make("link/x") + make("link", "120000", "sub"), "lies below"},
      {make("file") + make("file/x"), "lies below"},
      {"diff --git a/l b/l\nnew file mode 120000\nindex 0000000..e69de29\n",
       "target"},
      {"diff --git a/b b/b\nindex 1..2 100644\nGIT binary patch\nliteral 0\n",
       "binary"},
      {"diff --git a/b b/b\nindex 1111111..2222222 100644\n"
       "Binary files a/b and b/b differ\n",
       "binary"},
      {"diff --git a/x b/x\n--- a/x\n+++ b/y\n" + kBody, "two files"},
      {"diff --git a/x b/x\n--- a/y\n+++ b/y\n" + kBody, "disagree"},
      {"diff --git a/x b/x\n--- a/.git/y\n+++ b/.git/y\n" + kBody, ""},
      {"diff --git a/x b/y\nrename from x\nrename to z\n", "disagree"},
      {"diff --git a/x b/../../y\nrename from x\nrename to ../../y\n", ".."},
      {"diff --git a/x b/.git/y\ncopy from x\ncopy to .git/y\n", ".git"},
      {"diff --git a/x b/x\nrename from x\nrename to x2\n--- a/x\n+++ b/x\n" +
           kBody,
       "two files"},
      {"diff --git a/x b/x\nnew file mode 100644\n--- a/x\n+++ b/x\n" + kBody,
       "disagree"},
      {"diff --git a/x b/x\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+a\n",
       "disagree"},
      {"diff --git a/x b/x\nold mode 100644\nnew mode 100755\n"
       "new mode 100644\n",
       "two different modes"},
      {edit("\"a/x\\ny\"", "\"b/x\\ny\""), "control"},
      {edit("\"a/\\056git/x\"", "\"b/\\056git/x\""), ".git"},
      {edit("\"a/\\056\\056/x\"", "\"b/\\056\\056/x\""), ".."},
      {edit("\"a/\\377\"", "\"b/\\377\""), "UTF-8"},
      {edit("a/x\ty", "b/x\ty").substr(0, 0) + make("x\001y"), "control"},
      {make(std::string(2000, 'x')), "at most"},
      {make(std::string(300, 'x')), "at most 255"},
      {edit("a/x", "b/x") + edit("y/z", "y/z"), "prefix"},
      {"diff --cc x\nindex 1,2..3\n--- a/x\n+++ b/x\n@@@ -1 -1 +1 @@@\n",
       "combined"},
  };
  for (const Bad& bad : table) {
    const Diff diff = read_diff(bad.diff);
    EXPECT_EQ(diff.verdict, Verdict::refused) << bad.diff << diff.problem;
    EXPECT_THAT(diff.problem, HasSubstr(bad.why)) << bad.diff;
  }
}

TEST(DiffTest, ANulIsNoPath) {
  const std::string nul("--- a/x\0y\n+++ b/x\0y\n", 20);
  EXPECT_EQ(read_diff(nul + kBody).verdict, Verdict::refused);
}

TEST(DiffTest, ANulIsNoText) {
  // In a line that comes, goes or stays: git takes such a file for binary.
  for (const char mark : {'+', '-', ' '}) {
    std::string text = "--- a/d/f\n+++ b/d/f\n@@ -1,2 +1,2 @@\n-x\n+y\n";
    text += mark;
    text += std::string("a\0b", 3) + "\n";
    if (mark == '+') text.replace(text.find("-1,2"), 4, "-1,1");
    if (mark == '-') text.replace(text.find("+1,2"), 4, "+1,1");
    const Diff diff = read_diff(text);
    EXPECT_EQ(diff.verdict, Diff::Verdict::refused) << mark << diff.problem;
    EXPECT_EQ(diff.problem.rfind("line 6: the text of \"d/f\" holds a NUL", 0),
              0u)
        << diff.problem;
    EXPECT_NE(diff.problem.find("binary"), std::string::npos);
  }
  // Outside of hunks it is noise.
  EXPECT_EQ(read_diff(std::string("a mail\0\n", 8) +
                      "--- a/f\n+++ b/f\n@@ -1 +1 @@\n-x\n+y\n")
                .verdict,
            Diff::Verdict::ok);
}

TEST(DiffTest, AllowsWhatOnlyLooksBad) {
  for (const std::string& good :
       {make(".github/x"), make(".gitignore"), make(".gitattributes"),
        make("git/x"), make("..x"), make("a..b"), make("gitx~1"),
        make("link", "120000", "d/x"), make("d/link", "120000", "../x"),
        make("d/link", "120000", "../../x").substr(0, 0) +
            make("d/e/link", "120000", "../../x"),
        edit("\"a/\\\"q\\\"\"", "\"b/\\\"q\\\"\""),
        std::string("diff --git a/a b b/a b\nold mode 100644\n"
                    "new mode 100755\n"),
        std::string("diff --git a/x b/x2\ncopy from x\ncopy to x2\n")}) {
    const Diff diff = read_diff(good);
    EXPECT_EQ(diff.verdict, Verdict::ok) << good << diff.problem;
  }
}

TEST(DiffTest, SaysWhereItIsNoDiff) {
  const std::vector<Bad> table = {
      {"", "names no file"},
      {"hello\nworld\n", "names no file"},
      {"--- a/x\n+++ b/x\nno hunk\n", "names no file"},
      {kBody, "line 1: a hunk that belongs to no file"},
      {"diff --git a/x b/x\n" + kBody, "line 2: a hunk without"},
      {"--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n a\n-b\n", "line 3: the hunk ends"},
      {"--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n a\nb\n+c\n", "line 5: inside"},
      {"--- a/x\n+++ b/x\n@@ -1,1 +1,1 @@\n-a\n-b\n+c\n", "more lines"},
      {"--- a/x\n+++ b/x\n@@ -1,x +1 @@\n", "line 3: not a hunk's head"},
      {"diff --git a/x b/x\n", "neither hunks nor"},
      {"diff --git a/x b/y\n", "does not name one file"},
      {"diff --git a/x b/x\nrename from x\n", "needs both"},
  };
  for (const Bad& bad : table) {
    const Diff diff = read_diff(bad.diff);
    EXPECT_EQ(diff.verdict, Verdict::malformed) << bad.diff << diff.problem;
    EXPECT_THAT(diff.problem, HasSubstr(bad.why)) << bad.diff;
  }
}

TEST(DiffTest, EveryCountHasABound) {
  EXPECT_THAT(read_diff(std::string(kDiffBytesMax + 1, ' ')).problem,
              HasSubstr("bytes; at most"));
  std::string many;
  for (std::size_t i = 0; i <= kDiffFilesMax; ++i) {
    many += make("f" + std::to_string(i));
  }
  EXPECT_THAT(read_diff(many).problem, HasSubstr("more than 1000 files"));
  many = "--- a/x\n+++ b/x\n";
  for (std::size_t i = 0; i <= kDiffHunksMax; ++i) {
    many += "@@ -" + std::to_string(2 * i + 1) + " +1 @@\n-a\n+b\n";
  }
  EXPECT_THAT(read_diff(many).problem, HasSubstr("more than 20000 hunks"));
  std::string deep = "d";
  for (std::size_t i = 0; i < kDiffDepthMax; ++i) deep += "/d";
  EXPECT_THAT(read_diff(make(deep)).problem, HasSubstr("directories deep"));
}

// Whatever is cut off or changed: an answer, never a crash (asan looks on).
TEST(DiffTest, AnyPieceOfADiffIsRead) {
  const std::string whole = make("link", "120000", "d/x") +
                            edit("\"a/\\303\\274\"", "\"b/\\303\\274\"") +
                            "diff --git a/x b/y\nrename from x\nrename to y\n";
  for (std::size_t i = 0; i <= whole.size(); ++i) {
    (void)read_diff(std::string_view(whole).substr(0, i));
    (void)read_diff(std::string_view(whole).substr(i));
    std::string changed = whole;
    if (i < whole.size()) changed[i] = static_cast<char>(changed[i] ^ 0x15);
    (void)read_diff(changed);
  }
}

}  // namespace
}  // namespace machina::kinds
