#include "queue/base/json.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

namespace machina {
namespace {

bool accepts(const std::string& text) {
  JsonDoc doc;
  return !doc.parse(text).has_value();
}

TEST(JsonTest, TakesWhatTheStandardAllows) {
  for (const char* text : {"{}",
                           "[]",
                           "null",
                           "true",
                           "false",
                           "0",
                           "-0",
                           "12",
                           "-1.5e+10",
                           "1E2",
                           "\"\"",
                           "\"a\\u00e9\\n\"",
                           "\"\xc3\xa9\"",
                           " [ 1 , 2 ] ",
                           "{\"a\":{\"b\":[{}]}}",
                           "\"\\ud83d\\ude00\"",
                           "\"\x7f\"",
                           "\t{\r\n\"a\" : 1 }",
                           "\"\\/\\b\\f\"",
                           "[[],[[]]]"}) {
    EXPECT_TRUE(accepts(text)) << text;
  }
}

TEST(JsonTest, RefusesWhatTheStandardForbids) {
  for (const char* text : {"",
                           " ",
                           "{",
                           "}",
                           "[1,]",
                           "{\"a\":1,}",
                           "[1 2]",
                           "{\"a\" 1}",
                           "01",
                           "1.",
                           ".5",
                           "-",
                           "+1",
                           "1e",
                           "nul",
                           "True",
                           "\"",
                           "\"\\x\"",
                           "\"\\u12g4\"",
                           "\"\\ud800\"",
                           "\"\\udc00\"",
                           "\"\\ud800\\u0041\"",
                           "\"\t\"",
                           "'a'",
                           "{a:1}",
                           "[1]]",
                           "{} {}",
                           "NaN",
                           "Infinity",
                           "\"\xff\"",
                           "\"\xc0\xaf\"",
                           "\"\xed\xa0\x80\"",
                           "\"\xf5\x80\x80\x80\"",
                           "\"\xc3\"",
                           "// c\n1",
                           "[1,,2]",
                           "{\"a\":}",
                           "\xef\xbb\xbf{}",
                           "0x10",
                           "--1",
                           "1e+",
                           "\"abc",
                           "\"abc\\",
                           "\"\\u00"}) {
    EXPECT_FALSE(accepts(text)) << text;
  }
}

TEST(JsonTest, DuplicateKeysAreNamed) {
  JsonDoc doc;
  auto error = doc.parse(R"({"a":{"k":1,"b":2,"\u006b":3}})");
  ASSERT_TRUE(error);
  EXPECT_EQ(error->duplicate, "k");
  EXPECT_TRUE(accepts(R"({"a":{"k":1},"b":{"k":1}})"));
  std::string many = "{";
  for (int i = 0; i < 40; ++i) many += "\"k" + std::to_string(i) + "\":0,";
  EXPECT_TRUE(accepts(many + "\"last\":1}"));
  EXPECT_FALSE(accepts(many + "\"k3\":1}"));
  EXPECT_FALSE(accepts(many + "\"k39\":1}"));
}

TEST(JsonTest, DepthIsBounded) {
  auto nested = [](int n) {
    return std::string(static_cast<std::size_t>(n), '[') +
           std::string(static_cast<std::size_t>(n), ']');
  };
  EXPECT_TRUE(accepts(nested(kJsonDepthMax)));
  EXPECT_FALSE(accepts(nested(kJsonDepthMax + 1)));
  EXPECT_FALSE(accepts(nested(1'000'000)));
  EXPECT_FALSE(accepts(std::string(1'000'000, '[')));
}

TEST(JsonTest, AValueKnowsHowDeepItIs) {
  JsonDoc doc;
  ASSERT_FALSE(doc.parse(R"({"flat":[1,"[[["],"deep":[0,{"a":[[]]}]})"));
  EXPECT_FALSE(doc.root().nests_deeper_than(5));
  EXPECT_TRUE(doc.root().nests_deeper_than(4));
  const JsonValue flat = doc.root().find("flat"),
                  deep = doc.root().find("deep");
  EXPECT_FALSE(flat.nests_deeper_than(1));
  EXPECT_TRUE(flat.nests_deeper_than(0));
  EXPECT_FALSE(flat.first().nests_deeper_than(0));
  EXPECT_FALSE(deep.nests_deeper_than(4));
  EXPECT_TRUE(deep.nests_deeper_than(3));
  ASSERT_FALSE(doc.parse("[1]"));  // a document may be reused
  EXPECT_FALSE(doc.root().nests_deeper_than(1));
}

TEST(JsonTest, RawTextIsWhatWasSent) {
  JsonDoc doc;
  std::string text = R"( { "p" : { "x" : [ 1 , 2.50 ] } , "s":"a\"b", "n":-7})";
  ASSERT_FALSE(doc.parse(text));
  EXPECT_EQ(doc.root().find("p").raw(), R"({ "x" : [ 1 , 2.50 ] })");
  EXPECT_EQ(doc.root().find("s").as_string(), "a\"b");
  EXPECT_EQ(doc.root().find("n").as_integer(), -7);
  EXPECT_FALSE(doc.root().find("nothing"));
  EXPECT_EQ(doc.root().size(), 3u);
}

TEST(JsonTest, IntegersDoNotOverflow) {
  JsonDoc doc;
  for (const char* text : {"9223372036854775808", "1.0", "1e3", "-9e99"}) {
    ASSERT_FALSE(doc.parse(text));
    EXPECT_FALSE(doc.root().as_integer()) << text;
  }
  ASSERT_FALSE(doc.parse("9223372036854775807"));
  EXPECT_EQ(doc.root().as_integer(), INT64_MAX);
}

std::pair<std::uint64_t, std::uint64_t> digest(const std::string& text) {
  JsonDoc doc;
  EXPECT_FALSE(doc.parse(text)) << text;
  std::uint64_t d[2];
  canonical_digest(doc.root(), d);
  return {d[0], d[1]};
}

TEST(JsonTest, DigestIgnoresOrderAndSpacing) {
  EXPECT_EQ(digest(R"({"a":1,"b":{"c":[1,2],"d":"x"}})"),
            digest(R"( { "b" : {"d":"x", "c":[ 1, 2 ]}, "a" : 1 } )"));
  EXPECT_EQ(digest(R"({"a":"\u0041\/"})"), digest(R"({"\u0061":"A/"})"));
  EXPECT_EQ(digest("[1.0,2e0,-0]"), digest("[1,2.0,0]"));
  EXPECT_EQ(digest("[1.5]"), digest("[15e-1]"));
}

TEST(JsonTest, DigestSeesEveryDifference) {
  const char* different[] = {"{}",
                             "[]",
                             R"({"a":1})",
                             R"({"a":2})",
                             R"({"a":"1"})",
                             R"({"b":1})",
                             "[1,2]",
                             "[2,1]",
                             "[[1],2]",
                             "[[1,2]]",
                             "null",
                             "false",
                             "true",
                             R"({"a":null})",
                             "\"\"",
                             "[12]",
                             "[\"1,2\"]",
                             R"({"a":{}})",
                             R"({"a":[]})",
                             "[9007199254740993]",
                             "[9007199254740992]"};
  for (const char* a : different) {
    for (const char* b : different) {
      if (a != b) {
        EXPECT_NE(digest(a), digest(b)) << a << " " << b;
      }
    }
  }
}

// The scanner and nlohmann::json must agree on every text without duplicate
// keys; mutations of sound texts reach most of the corners.
TEST(JsonTest, AgreesWithAnotherParserOnMutations) {
  const std::string seeds[] = {
      R"({"kind":"noop","payload":{"x":[1,-2.5e3,"aé\u00e9\ud83d\ude00"]}})",
      R"([true,false,null,{"a":{"b":{"c":[]}}},0,-0.0,1E5,"\\\"\/\b"])",
      "{\"k\": \"\xf0\x9f\x98\x80 and \xe2\x82\xac\", \"z\" : [ ] }",
      R"([12345678901234567890,1e400,"",{}])"};
  const char bytes[] = "{}[]\",:\\0123456789.eE+-tfn u\xc3\xa9\x80\xff\n\t/";
  std::mt19937 random(20261120);
  int sound = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string text = seeds[random() % 4];
    for (unsigned n = random() % 4; n > 0; --n) {
      std::size_t at = random() % text.size();
      switch (random() % 3) {
        case 0:
          text[at] = bytes[random() % (sizeof bytes - 1)];
          break;
        case 1:
          text.erase(at, 1 + random() % 3);
          break;
        default:
          text.insert(at, 1, bytes[random() % (sizeof bytes - 1)]);
      }
      if (text.empty()) text = "0";
    }
    JsonDoc doc;
    auto error = doc.parse(text);
    if (error && !error->duplicate.empty()) continue;
    // Numbers beyond a double are RFC 8259 texts; nlohmann refuses them.
    auto other = nlohmann::json::parse(text, nullptr, false);
    bool out_of_range = false;
    if (other.is_discarded() && !error) {
      try {
        other = nlohmann::json::parse(text);
      } catch (const nlohmann::json::out_of_range&) {
        out_of_range = true;
      } catch (const nlohmann::json::exception&) {
      }
    }
    if (out_of_range) continue;
    ASSERT_EQ(!error, !other.is_discarded())
        << text << (error ? " " + error->what : "");
    if (!error) {
      ++sound;
      // What we kept is the same value.
      EXPECT_EQ(nlohmann::json::parse(doc.root().raw()), other) << text;
    }
  }
  EXPECT_GT(sound, 1500);
}

TEST(JsonTest, StringsAreEscaped) {
  std::string out;
  json::quote(out, std::string_view("a\"\\\n\x01\x7f\xc3\xa9\xff\0", 10));
  auto back = nlohmann::json::parse(out);
  EXPECT_EQ(back.get<std::string>(),
            std::string("a\"\\\n\x01\x7f\xc3\xa9\xef\xbf\xbd\0", 12));
}

TEST(JsonTest, StringsComeThroughBothWays) {
  for (const std::string& text :
       {std::string("plain"), std::string("\"\\/\n\r\t\x01\x7f"),
        std::string("\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80"),
        std::string("a\0b", 3)}) {
    const std::string quoted = json::quoted(text);
    EXPECT_EQ(nlohmann::json::parse(quoted).get<std::string>(), text);
    JsonDoc doc;
    ASSERT_FALSE(doc.parse(quoted));
    EXPECT_EQ(json::string(doc.root()), text);
  }
  // Broken UTF-8 is mended, each byte by itself.
  EXPECT_EQ(
      json::quoted("\xff\xC3(\xED\xA0\x80"),
      "\"\xEF\xBF\xBD\xEF\xBF\xBD(\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\"");
}

TEST(JsonTest, MembersAreVisitedWithTheirTypes) {
  std::string seen;
  const auto visit = [&](std::string_view key, const JsonValue& value) {
    seen += std::string(key) + "=" +
            json::string(value).value_or(
                std::to_string(json::integer(value).value_or(-1))) +
            (json::boolean(value).value_or(false) ? "!" : "") + ";";
    return key != "end";
  };
  EXPECT_TRUE(
      json::members(R"({"\u0061":"x\n","b":7,"c":true,"d":1.5})", visit));
  EXPECT_EQ(seen, "a=x\n;b=7;c=-1!;d=-1;");
  EXPECT_FALSE(json::members(R"({"end":1,"after":2})", visit));
  EXPECT_EQ(seen, "a=x\n;b=7;c=-1!;d=-1;end=1;");
  // Nothing is visited of what is not an object.
  for (const char* text : {"", "[]", "7", R"({"a":1)", R"({"a":1}x)"}) {
    EXPECT_FALSE(json::members(text, visit)) << text;
  }
  EXPECT_EQ(seen, "a=x\n;b=7;c=-1!;d=-1;end=1;");
  EXPECT_FALSE(json::members(JsonValue(), visit));
  EXPECT_FALSE(json::elements(JsonValue(), [](auto) { return true; }));
}

TEST(JsonTest, AWriterLeavesExactlyItsText) {
  std::string out = "before ";
  const std::string wide(5000, 'w');
  const std::string escaped = "\"\\\n" + std::string(3000, '\x01');
  {
    JsonWriter json(out);
    json.begin_object();
    json.key("wide").string(wide);
    json.key("escaped").string(escaped);
    json.key_escaped("a\"b").begin_array();
    json.number(-1).number(std::uint64_t{18446744073709551615u}).real(0.5);
    json.boolean(true).null().raw("{\"raw\": 1}").time(1).time(1).time(0);
    json.begin_array().end_array().begin_object().end_object();
    json.end_array();
    json.end_object();
    // Whole as soon as the outermost ends, with the writer still there.
    ASSERT_EQ(out.substr(0, 8), "before {");
    EXPECT_EQ(json.size(), out.size());
    out += " after";
  }
  ASSERT_EQ(out.substr(out.size() - 7), "} after");
  auto read = nlohmann::json::parse(out.substr(7, out.size() - 13));
  EXPECT_EQ(read["wide"], wide);
  EXPECT_EQ(read["escaped"], escaped);
  EXPECT_EQ(read["a\"b"].dump(),
            "[-1,18446744073709551615,0.5,true,null,{\"raw\":1},"
            "\"1970-01-01T00:00:00.001Z\",\"1970-01-01T00:00:00.001Z\",null,"
            "[],{}]");
  std::string scalar;
  JsonWriter json(scalar);
  json.string("alone");
  EXPECT_EQ(scalar, "\"alone\"");
}

}  // namespace
}  // namespace machina
