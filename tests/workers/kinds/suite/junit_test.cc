// Reports as runners write them, and as an attacker would.

#include "workers/kinds/suite/junit.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <random>
#include <thread>

#include "queue/base/utf8.h"

namespace machina::kinds {
namespace {

using testing::HasSubstr;

Result<Suite> parse(const std::string& xml) {
  return decode_junit(encode_junit(xml));
}

constexpr char kReport[] = R"XML(<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" tests="5" time="0.1">
<testcase classname="a.TestX" name="test_one" time="0.012" />
<testcase classname="a.TestX" name="test_two[a&lt;b]" time="1.5">
<failure message="assert 1 == 2">def test_two():
&gt; assert 1 == 2</failure></testcase>
<testcase classname="" name="a" time="0"><error message="collection failure">
no module</error></testcase>
<testcase classname="a" name="later" time="0.0"><skipped type="pytest.skip"
message="not now">a.py:3</skipped></testcase>
<testcase classname="a" name="teardown" time="0.0">
<failure message="f">x</failure><error message="e">y</error></testcase>
</testsuite></testsuites>)XML";

TEST(JunitTest, EachOutcomeIsRead) {
  const auto suite = parse(kReport);
  ASSERT_TRUE(suite) << suite.error().what;
  EXPECT_EQ(suite->passed, 1);
  EXPECT_EQ(suite->failed, 1);
  EXPECT_EQ(suite->errors, 2);
  EXPECT_EQ(suite->skipped, 1);
  ASSERT_EQ(suite->cases.size(), 5);
  // What failed comes first; the order is otherwise the report's.
  EXPECT_EQ(suite->cases[0].id, "a.TestX::test_two[a<b]");
  EXPECT_EQ(suite->cases[0].duration_ms, 1500);
  EXPECT_EQ(suite->cases[0].message,
            "assert 1 == 2\ndef test_two():\n> assert 1 == 2");
  EXPECT_EQ(suite->cases[1].id, "a");
  EXPECT_EQ(parse("<testsuite><testcase classname='test_a' name='test_a'/>"
                  "</testsuite>")
                ->cases[0]
                .id,
            "test_a::test_a");
  EXPECT_EQ(suite->cases[2].outcome, Outcome::error);
  EXPECT_EQ(suite->cases[3].id, "a.TestX::test_one");
  EXPECT_EQ(suite->cases[3].duration_ms, 12);
}

// As ctest 3.25 writes it: what could not be run is "skipped" there, and its
// exit code says that it failed.
TEST(JunitTest, F03_WhatDidNotRunHasNotPassed) {
  const auto suite = parse(R"XML(<testsuite name="x">
<testcase name="good" classname="good" time="0.01" status="run"/>
<testcase name="bad" classname="bad" time="0.01" status="fail">
<failure message=""/><system-out>it said no</system-out></testcase>
<testcase name="missing" classname="missing" time="0" status="notrun">
<skipped message="Unable to find executable"/></testcase>
<testcase name="dis" classname="dis" time="0" status="disabled">
<system-out>Disabled</system-out></testcase>
<testcase name="s77" classname="s77" time="0" status="notrun">
<skipped message="SKIP_RETURN_CODE=77"/></testcase>
<testcase name="DISABLED_x" classname="g" status="notrun" result="suppressed"/>
</testsuite>)XML");
  ASSERT_TRUE(suite) << suite.error().what;
  EXPECT_EQ(suite->passed, 1);
  EXPECT_EQ(suite->failed, 1);
  EXPECT_EQ(suite->errors, 1);
  EXPECT_EQ(suite->skipped, 3);
  EXPECT_EQ(suite->cases[0].id, "bad");
  EXPECT_EQ(suite->cases[0].message, "it said no");
  EXPECT_EQ(suite->cases[1].id, "missing");
  EXPECT_EQ(suite->cases[1].outcome, Outcome::error);
}

TEST(JunitTest, F02_AReportThatContradictsItselfIsNone) {
  const std::string one = "<testcase classname='a' name='b'/>";
  const std::string prefix = "<x:testcase xmlns:x='u' name='b'/>";
  for (const auto& [xml, why] :
       std::vector<std::pair<std::string, std::string>>{
           {"<testsuite name='s' tests='10' failures='0'>" + one +
                "</testsuite>",
            "\"s\" counts 10 tests and lists 1"},
           {"<testsuites tests='3'><testsuite>" + one +
                "</testsuite><testsuite>" + one + "</testsuite></testsuites>",
            "counts 3 tests and lists 2"},
           {"<testsuite tests='4' skipped='2'>" + one + "</testsuite>",
            "counts 4 tests and lists 1"},
           {"<testsuite tests='1' failures='1'>" + one + "</testsuite>",
            "counts 1 failures or errors and lists 0"},
           {"<testsuites errors='2'><testsuite errors='2'>" + one +
                "</testsuite></testsuites>",
            "counts 2 failures or errors and lists 0"},
           {"<testsuite><properties><failure/></properties>" + one +
                "</testsuite>",
            "it has a <failure> where none can be"},
           {"<testsuite><testcase name='b'><properties><failure/></properties>"
            "</testcase></testsuite>",
            "it has a <failure> where none can be"},
           {"<testsuite>" + prefix + one + "</testsuite>",
            "names with a prefix"}}) {
    const auto suite = parse(xml);
    ASSERT_FALSE(suite) << xml;
    EXPECT_THAT(suite.error().what, HasSubstr(why)) << xml;
  }
  // Of a suite itself: one more case.
  const auto suite = parse(
      "<testsuites><testsuite name='q' errors='1'><error message='setUpClass'>"
      "no</error></testsuite><testsuite>" +
      one + "</testsuite></testsuites>");
  ASSERT_TRUE(suite) << suite.error().what;
  EXPECT_EQ(suite->passed, 1u);
  ASSERT_EQ(suite->errors, 1u);
  EXPECT_EQ(suite->cases[0].id, "q::(suite)");
  EXPECT_EQ(suite->cases[0].message, "setUpClass\nno");
}

// What tools count is not always their list of cases.
TEST(JunitTest, F02_CountsOfKnownToolsAreTaken) {
  for (const std::string xml :
       {// pytest: the teardown, and each subtest, counts too
        "<testsuites><testsuite name='pytest' tests='5' errors='1'><testcase "
        "name='a'><error message='failed on teardown with x'/></testcase>"
        "</testsuite></testsuites>",
        "<testsuite name='mine' tests='2' errors='1'><testcase name='a'><error "
        "message='failed on teardown with x'/></testcase></testsuite>",
        // gtest
        "<testsuites tests='2' failures='1' disabled='1' errors='0'><testsuite "
        "name='A' tests='2' failures='1' disabled='1' skipped='0' errors='0'>"
        "<testcase name='x' status='run' result='completed' classname='A'>"
        "<failure message='1'/><failure message='2'/></testcase><testcase "
        "name='DISABLED_y' status='notrun' result='suppressed' classname='A'/>"
        "</testsuite></testsuites>",
        // jest-junit, go-junit-report, surefire
        "<testsuites name='jest tests' tests='2' failures='0' errors='0'>"
        "<testsuite name='u' errors='0' failures='0' skipped='1' tests='2'>"
        "<testcase classname='a' name='a'/><testcase classname='b' name='b'>"
        "<skipped/></testcase></testsuite></testsuites>",
        "<testsuites tests='3' failures='1'><testsuite name='p' tests='2' "
        "failures='1'><testcase name='a'><failure/></testcase><testcase "
        "name='b'/></testsuite><testsuite name='q' tests='1'><testcase "
        "name='c'/></testsuite></testsuites>",
        "<testsuite tests='3' errors='0' skipped='1' failures='1' flakes='1'>"
        "<properties/><testcase name='a'><flakyFailure><stackTrace/>"
        "<system-out/></flakyFailure></testcase><testcase name='b'><failure/>"
        "<rerunFailure/></testcase></testsuite>",
        // Catch2 and doctest count assertions
        "<testsuites><testsuite name='x' errors='0' failures='2' tests='40' "
        "hostname='tbd'><testcase name='a'><failure/><failure/></testcase>"
        "</testsuite></testsuites>",
        "<testsuites><testsuite name='x' errors='0' failures='0' tests='40'>"
        "<testcase name='a' status='run'/></testsuite></testsuites>",
        // no counts, or no numbers
        "<testsuite><testcase name='a'/></testsuite>",
        "<testsuite tests='' failures='x'><testcase name='a'/></testsuite>"}) {
    const auto suite = parse(xml);
    EXPECT_TRUE(suite) << suite.error().what << "\n" << xml;
  }
}

TEST(JunitTest, F30_MessagesAndNamesAreCutBetweenCharacters) {
  for (int pad = 0; pad < 3; ++pad) {
    std::string many(static_cast<std::size_t>(pad), 'x');
    for (int i = 0; i < 20'000; ++i) many += "\u65e5";
    const auto suite = parse("<testsuite><testcase classname=\"a\" name=\"" +
                             many + "\"><failure message=\"" + many + "\">" +
                             many + "</failure></testcase></testsuite>");
    ASSERT_TRUE(suite) << suite.error().what;
    EXPECT_TRUE(valid_utf8(suite->cases.at(0).id)) << pad;
    EXPECT_TRUE(valid_utf8(suite->cases.at(0).message)) << pad;
    EXPECT_GT(suite->cases.at(0).message.size(), 1900u);
  }
}

TEST(JunitTest, TruncatedReportIsNoReport) {
  const std::string whole = kReport;
  for (const std::size_t size : {0ul, 1ul, 50ul, 200ul, whole.size() - 1}) {
    const auto suite = parse(whole.substr(0, size));
    ASSERT_FALSE(suite) << size;
    EXPECT_THAT(suite.error().what, HasSubstr("not a JUnit report"));
  }
}

TEST(JunitTest, EntitiesCannotBeDeclared) {
  const auto laughs = parse(
      R"(<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;"><!ENTITY d "&c;&c;&c;&c;&c;&c;&c;">]>
<testsuite><testcase name="&d;"/></testsuite>)");
  ASSERT_FALSE(laughs);
  EXPECT_THAT(laughs.error().what, HasSubstr("document type"));
  const auto file = parse(
      R"(<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>
<testsuite><testcase name="&e;"/></testsuite>)");
  EXPECT_FALSE(file);
}

TEST(JunitTest, DepthIsBounded) {
  std::string deep = "<testsuite>";
  for (int i = 0; i < 100'000; ++i) deep += "<a>";
  const auto suite = parse(deep);
  ASSERT_FALSE(suite);
  EXPECT_THAT(suite.error().what, HasSubstr("nested"));
}

TEST(JunitTest, AnotherRootIsNoReport) {
  EXPECT_FALSE(parse("<html><testcase name='x'/></html>"));
  EXPECT_FALSE(parse("TAP version 13\nok 1\n"));
}

TEST(JunitTest, HugeNamesAndMessagesAreCut) {
  const std::string huge(3'000'000, 'x');
  const auto suite = parse("<testsuite><testcase classname='" + huge +
                           "' name='n'><failure message='" + huge + "'>" +
                           huge + "END</failure></testcase></testsuite>");
  ASSERT_TRUE(suite) << suite.error().what;
  EXPECT_EQ(suite->cases[0].id.size(), kCaseIdBytesMax);
  EXPECT_LE(suite->cases[0].message.size(), kCaseMessageBytesMax);
  EXPECT_TRUE(suite->cases[0].message.ends_with("END"));
}

TEST(JunitTest, FailuresAreKeptThoughPassesFillTheirShare) {
  std::string xml = "<testsuite>";
  const std::string module(250, 'm');
  for (int i = 0; i < 200'000; ++i) {
    xml += "<testcase classname='" + module + "' name='" + std::to_string(i) +
           "'/>";
  }
  xml +=
      "<testcase classname='a' name='bad'><failure message='m'/></testcase>"
      "</testsuite>";
  const std::string frames = encode_junit(xml);
  EXPECT_LE(frames.size(), kJunitReplyBytesMax);
  const auto suite = decode_junit(frames);
  ASSERT_TRUE(suite);
  EXPECT_EQ(suite->passed, 200'000);
  EXPECT_EQ(suite->failed, 1);
  EXPECT_EQ(suite->cases[0].id, "a::bad");
  EXPECT_EQ(suite->dropped + suite->cases.size(), 200'001);
  EXPECT_GT(suite->dropped, 0);
}

TEST(JunitTest, OddNumbersAreNoDurations) {
  for (const char* time : {"nan", "inf", "-5", "1e300", "x", ""}) {
    const auto suite = parse("<testsuite><testcase name='a' time='" +
                             std::string(time) + "'/></testsuite>");
    ASSERT_TRUE(suite) << time;
    EXPECT_TRUE(suite->cases[0].duration_ms == 0 ||
                suite->cases[0].duration_ms == 4'000'000'000)
        << time;
  }
}

// The worker does not trust the handler either.
TEST(JunitTest, MalformedFramesAreRefused) {
  const std::string good = encode_junit(kReport);
  for (std::size_t size = 0; size < good.size(); ++size) {
    EXPECT_FALSE(decode_junit(std::string_view(good).substr(0, size))) << size;
  }
  EXPECT_FALSE(decode_junit(good + "C"));
  std::mt19937 random(7);
  for (int round = 0; round < 20'000; ++round) {
    std::string bent = good;
    for (int i = 0; i < 3; ++i) {
      bent[random() % bent.size()] = static_cast<char>(random());
    }
    (void)decode_junit(bent).has_value();  // must not read outside
  }
}

TEST(JunitTest, BentXmlNeverCrashesTheParser) {
  std::mt19937 random(11);
  const std::string good = kReport;
  for (int round = 0; round < 5000; ++round) {
    std::string bent = good;
    for (int i = 0; i < 4; ++i) {
      bent[random() % bent.size()] = static_cast<char>(random());
    }
    const auto suite = parse(bent);
    if (suite) {
      EXPECT_LE(suite->cases.size(), 6);
    }
  }
}

TEST(JunitTest, HandlerAnswersOverItsSocket) {
  int pair[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
  std::thread handler([&] { EXPECT_EQ(junit_handler(pair[1], pair[1]), 0); });
  // Larger than a socket holds, either way.
  std::string xml = "<testsuite>";
  for (int i = 0; i < 50'000; ++i) {
    xml += "<testcase classname='c' name='" + std::to_string(i) + "'/>";
  }
  const auto suite = ask_junit(pair[0], xml + "</testsuite>", 10'000);
  handler.join();
  close(pair[1]);
  ASSERT_TRUE(suite) << suite.error().what;
  EXPECT_EQ(suite->passed, 50'000);
}

TEST(JunitTest, SilentHandlerIsNotWaitedForForEver) {
  int pair[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
  const auto suite = ask_junit(pair[0], "<testsuite/>", 100);
  EXPECT_FALSE(suite);
  close(pair[1]);
}

}  // namespace
}  // namespace machina::kinds
