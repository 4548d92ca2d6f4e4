// The reader of diffs beside git itself: what `git apply` takes is understood
// as git understands it. The diffs are made by git and by `diff -u`, in every
// form that a person sends.

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "workers/kinds/patch/diff.h"

namespace machina::kinds {
namespace {

namespace fs = std::filesystem;

// Makes $1/cases/NAME.diff, beside it NAME.p (the option for git apply, or
// nothing) and, where git takes it so, NAME.tree and NAME.paths.
constexpr char kMake[] = R"sh(
set -eu
cd "$1"
export HOME="$1" GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null LC_ALL=C
export GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t GIT_COMMITTER_NAME=t
export GIT_COMMITTER_EMAIL=t TZ=UTC
mkdir cases repo
cd repo
git init -q -b main
mkdir -p dir/sub a
seq 1 9 >a.txt; seq 1 9 >dir/b.txt; seq 11 19 >dir/sub/c.txt
utf=$(printf 'dir/\303\251\346\227\245.txt')
seq 21 29 >'with space.txt'; seq 31 39 >"$utf"
seq 41 49 >'q"uote\.txt'; seq 51 59 | sed 's/$/\r/' >crlf.txt
printf 'x\ny' >noeol.txt; : >empty.txt; seq 61 69 >a/a.txt; seq 71 79 >a/b
echo '#!/bin/sh' >run.sh; chmod 755 run.sh; ln -s dir/b.txt link
seq 81 89 >"a b"; seq 91 99 >'dir/trail .txt'
git add -A; git commit -q -m base
base=$(git rev-parse HEAD)
reset() { git reset -q --hard; git clean -fdq; }

oracle() {  # NAME [OPTION]: what git makes of cases/NAME.diff
  echo "${2-}" >../cases/$1.p
  if GIT_INDEX_FILE=../index git read-tree HEAD &&
     GIT_INDEX_FILE=../index git apply --cached ${2-} ../cases/$1.diff \
       2>../cases/$1.err; then
    GIT_INDEX_FILE=../index git write-tree >../cases/$1.tree
    git diff-tree -r --no-renames --name-only -z HEAD \
      $(cat ../cases/$1.tree) >../cases/$1.paths
  fi
}
formats() {  # NAME [more]: of the change that is in the work tree
  git add -A
  git diff --cached -M >../cases/$1.plain.diff
  git diff --cached -M --no-prefix >../cases/$1.bare.diff
  git -c core.quotePath=false diff --cached -C --find-copies-harder \
    --full-index --no-prefix >../cases/$1.copies.diff
  more=
  [ -z "${2-}" ] || {
    more='letters words crlf'
    git -c diff.mnemonicPrefix=true diff --cached -M >../cases/$1.letters.diff
    git diff --cached -M --src-prefix=old/ --dst-prefix=new/ -U1 \
      >../cases/$1.words.diff
    sed 's/$/\r/' ../cases/$1.plain.diff >../cases/$1.crlf.diff
  }
  reset
  for f in plain $more; do oracle $1.$f; done
  for f in bare copies; do oracle $1.$f -p0; done
}
edit() { sed -i "s/^\(.\)5/\15 changed/;s/^5/5 changed/" "$1"; }
edit a.txt; edit dir/b.txt; formats edit
edit 'with space.txt'; edit "$utf"; formats names
edit 'q"uote\.txt'; edit 'dir/trail .txt'; edit 'a b'; formats quotes
edit a/a.txt; edit a/b; formats below-a
seq 1 3 >new.txt; seq 1 3 >dir/new.txt; mkdir n; echo x >'n/n w'; formats make
: >nothing.txt; : >dir/nothing; formats make-empty
git rm -q a.txt dir/b.txt empty.txt 'with space.txt'; formats remove
git rm -q empty.txt; formats remove-empty
git mv a.txt c.txt; formats rename more
git mv a.txt dir/a.txt; formats rename-into
git mv dir/b.txt b.txt; git mv 'with space.txt' 'and another.txt'; formats rename-out
git mv a/a.txt a/c.txt; edit a/c.txt; formats rename-edit
git mv 'a b' 'b a b'; git mv 'q"uote\.txt' 'dir/q".txt'; formats rename-names
git mv dir moved; formats rename-dir
cp a.txt copy.txt; edit copy.txt; edit a.txt; formats copy
chmod 755 a.txt; chmod 644 run.sh; formats modes
chmod 755 a.txt; edit a.txt; formats mode-edit
printf 'x\ny\n' >noeol.txt; printf '1\n2' >a.txt; formats no-newline
printf 'x\nz' >noeol.txt; formats still-none
edit crlf.txt; formats crlf more
ln -sf dir/sub/c.txt link; formats link
edit a.txt; git mv dir/b.txt dir/z.txt; git rm -q empty.txt; seq 1 4 >n1
chmod 755 noeol.txt; formats all more

# What `diff -u` and others write: a tree beside this one, one file edited.
gnu() {  # NAME: standard input
  cat >../cases/$1.diff
  oracle $1 "${2-}"
}
cp -r . ../side; rm -rf ../side/.git; cd ../side
ed() { cp "$1" "$1$2"; edit "$1"; }
both() {  # NAME SUFFIX FILE [more]: as `cp FILE FILE.orig; edit FILE; diff -u`
  ed "$3" "$2"
  diff -u "$3$2" "$3" >../one.diff || true
  diff -u --label "$3$2" --label "$3" "$3$2" "$3" >../two.diff || true
  cd ../repo; gnu $1.time0 -p0 <../one.diff; gnu $1.label <../two.diff
  [ -z "${4-}" ] || rest $1
  cd ../side; cp "$3$2" "$3"; rm "$3$2"
}
rest() {
  gnu $1.time <../one.diff
  sed 's/\t/ /' ../one.diff | gnu $1.spaces
  sed 's/\(^---.*\)\t\(.*\)\.[0-9]* .*/\1\t\2/' ../one.diff | gnu $1.short
  sed 's/^\(---\|+++\) /&a\//' ../two.diff | gnu $1.a
  sed 's/^--- /&a\//;s/^+++ /&b\//' ../one.diff | gnu $1.ab
  sed 's/^\(---\|+++\) /&.\//' ../one.diff | gnu $1.dot
  sed 's/^--- /&proj.orig\//;s/^+++ /&proj\//' ../two.diff | gnu $1.proj
}
both orig .orig a.txt more; both tilde '~' dir/b.txt more; both bak .bak 'with space.txt'
both deep .orig dir/sub/c.txt; both utf .orig "$utf"
both cr .orig crlf.txt; both eol .orig 'a b'
# The other way round: the new one has the longer name.
cp a.txt a.txt.new; edit a.txt.new
diff -u a.txt a.txt.new >../one.diff || true
(cd ../repo; gnu longer <../one.diff)
cp a.txt other.txt; edit a.txt
diff -u other.txt a.txt >../one.diff || true
(cd ../repo; gnu other <../one.diff)
cd ..
rm -rf old new; cp -r repo old; rm -rf old/.git; cp -r old new
edit new/a.txt; edit new/dir/b.txt; seq 1 3 >new/dir/made; rm new/a/b
rm new/link old/link
diff -ru old new >tree.diff || true
diff -ruN old new >tree-n.diff || true
TZ=Asia/Tokyo diff -ruN old new >tree-east.diff || true
TZ=America/New_York diff -ruN old new >tree-west.diff || true
cd repo
gnu tree <../tree.diff
for n in n east west; do gnu tree-$n <../tree-$n.diff; done
sed 's/^\(diff\|---\|+++\)\(.*\) old\/\(.*\)/\1\2 new\/\3/' ../tree.diff | gnu tree-same
sed 's/^--- old/--- new/' ../tree-n.diff | grep -v '^diff' | gnu tree-n-same
{ echo 'Index: dir/b.txt'; echo ======; echo '--- dir/b.txt	(revision 1)'
  echo '+++ dir/b.txt	(working copy)'; printf '@@ -1,3 +1,3 @@\n 1\n-2\n+two\n 3\n'
} | gnu svn -p0
)sh";

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string line_of(const fs::path& path) {
  std::string text = read(path);
  return text.substr(0, text.find('\n'));
}

class DiffGitTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = "/tmp/machina-diff-XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    top_ = name;
    std::ofstream(top_ / "make.sh") << kMake;
    ASSERT_EQ(run("sh " + (top_ / "make.sh").string() + " " + name + " >" +
                  name + "/out 2>&1"),
              0)
        << read(top_ / "out");
  }
  void TearDown() override { fs::remove_all(top_); }

  static int run(const std::string& command) {
    return std::system(command.c_str());
  }

  // The tree that git makes with -p<strip>; empty: it does not take it.
  std::string tree_of(const std::string& name, int strip) {
    const std::string out = (top_ / "tree").string();
    const std::string git =
        "cd " + (top_ / "repo").string() + " && GIT_INDEX_FILE=../index git ";
    const bool good =
        run(git + "read-tree HEAD") == 0 &&
        run(git + "apply --cached --whitespace=nowarn -p" +
            std::to_string(strip) + " ../cases/" + name +
            ".diff 2>/dev/null && GIT_INDEX_FILE=../index git write-tree >" +
            out) == 0;
    return good ? line_of(out) : "";
  }

  fs::path top_;
};

TEST_F(DiffGitTest, F30_WhatGitAppliesIsUnderstoodAsGitDoes) {
  int taken = 0;
  for (const auto& entry : fs::directory_iterator(top_ / "cases")) {
    if (entry.path().extension() != ".diff") continue;
    const std::string name = entry.path().stem().string();
    const fs::path base = top_ / "cases" / name;
    const std::string tree = line_of(base.string() + ".tree");
    if (tree.empty()) continue;  // not for git either
    ++taken;
    const std::string text = read(entry.path());
    Diff diff = read_diff(text);
    ASSERT_EQ(diff.verdict, Diff::Verdict::ok)
        << name << ": " << diff.problem << "\n"
        << text;
    std::string option = line_of(base.string() + ".p");
    if (option != "-p" + std::to_string(diff.strip) &&
        tree_of(name, diff.strip) != tree) {
      // Read the one way it applies to nothing; so the other way counts.
      EXPECT_EQ(tree_of(name, diff.strip), "") << name << "\n" << text;
      ASSERT_GE(diff.other_strip, 0) << name << "\n" << text;
      diff = read_diff(text, diff.other_strip);
      ASSERT_EQ(diff.verdict, Diff::Verdict::ok)
          << name << ": " << diff.problem;
      EXPECT_EQ(tree_of(name, diff.strip), tree) << name << "\n" << text;
    }
    std::istringstream paths(read(base.string() + ".paths"));
    for (std::string path; std::getline(paths, path, '\0');) {
      EXPECT_EQ(diff.paths.count(path), 1u) << name << ": " << path << "\n"
                                            << text;
    }
  }
  EXPECT_GE(taken, 100);
}

}  // namespace
}  // namespace machina::kinds
