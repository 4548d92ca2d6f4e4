// Where text may be cut: between two characters, whatever they are.

#include "queue/base/utf8.h"

#include <gtest/gtest.h>

#include <string>

namespace machina {
namespace {

TEST(Utf8Test, F30_ACutNeverFallsInsideACharacter) {
  for (const std::string unit :
       {"x", "\u00e9", "\u65e5", "\U0001F600", "e\u0301\u65e5"}) {
    std::string text;
    for (int i = 0; i < 12; ++i) text += unit;
    for (std::size_t most = 0; most <= text.size() + 1; ++most) {
      const auto head = utf8_head(text, most), tail = utf8_tail(text, most);
      ASSERT_TRUE(valid_utf8(head) && valid_utf8(tail)) << unit << " " << most;
      ASSERT_LE(head.size(), most);
      ASSERT_LE(tail.size(), most);
      ASSERT_GE(head.size() + 3, std::min(most, text.size()));
      ASSERT_GE(tail.size() + 3, std::min(most, text.size()));
      ASSERT_TRUE(text.starts_with(head));
      ASSERT_TRUE(text.ends_with(tail));
    }
  }
}

TEST(Utf8Test, F30_APartOfACharacterAtAnEndIsLeftOut) {
  EXPECT_EQ(utf8_whole_end("ab\xe2\x82"), "ab");
  EXPECT_EQ(utf8_whole_end("ab\xe2\x82\xac"), "ab\u20ac");
  EXPECT_EQ(utf8_whole_end("ab\xf0\x9f\x98"), "ab");
  EXPECT_EQ(utf8_whole_end("\x82\x82\x82\x82").size(), 4u);  // never UTF-8
  EXPECT_EQ(utf8_whole_end(""), "");
  EXPECT_EQ(utf8_whole_begin("\x82\xac"
                             "ab"),
            "ab");
  EXPECT_EQ(utf8_whole_begin("\u20ac"), "\u20ac");
}

// Bytes that are no UTF-8 stay as they are, but for at most three at the cut.
TEST(Utf8Test, F30_OtherBytesAreCutToo) {
  for (const unsigned char byte : {0x80, 0xBF, 0xC3, 0xE9, 0xF0, 0xFF}) {
    const std::string text(50, static_cast<char>(byte));
    EXPECT_GE(utf8_head(text, 20).size(), 17u) << int{byte};
    EXPECT_GE(utf8_tail(text, 20).size(), 17u) << int{byte};
    EXPECT_EQ(utf8_head(text, 50), text);
    EXPECT_EQ(utf8_tail(text, 50), text);
    EXPECT_FALSE(valid_utf8(text));
  }
}

TEST(Utf8Test, F30_KnowsWhatACharacterIs) {
  for (const char* good :
       {"a", "\u007f", "\u0080", "\u07ff", "\u0800", "\ud7ff", "\ue000",
        "\uffff", "\U00010000", "\U0010ffff"}) {
    EXPECT_EQ(utf8_length(good), std::string_view(good).size());
  }
  for (const char* bad :
       {"", "\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xE0\x9F\xBF",
        "\xED\xA0\x80", "\xED\xBF\xBF", "\xF0\x80\x80\x80", "\xF4\x90\x80\x80",
        "\xF5\x80\x80\x80", "\xC3", "\xE6\x97", "\xF0\x9F\x98", "\xC3x"}) {
    EXPECT_EQ(utf8_length(bad), 0u) << bad;
  }
}

}  // namespace
}  // namespace machina
