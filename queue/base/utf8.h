// queue/base/utf8.h
//
// Text in UTF-8: what is a character of it, and how to cut between two. Every
// process of the product cuts text for messages, results and tables; a cut
// inside a character would make U+FFFD of what was whole.
//
//   U1  utf8_head and utf8_tail keep at most `most` bytes and never a part of a
//       character at the cut; of bytes that are no UTF-8 they drop at most 3
//       more than they must. (tests/queue/base/utf8_test.cc)

#pragma once

#include <cstddef>
#include <string_view>

namespace machina {

// The bytes of the character at the front (Unicode 15, table 3-7); 0: there is
// none.
std::size_t utf8_length(std::string_view text);
bool valid_utf8(std::string_view text);

// Without the first bytes of a character whose rest is not there.
std::string_view utf8_whole_end(std::string_view text);
// Without the last bytes of a character whose beginning is not there.
std::string_view utf8_whole_begin(std::string_view text);

// `text`, or as much of its beginning or its end as fits into `most` bytes.
std::string_view utf8_head(std::string_view text, std::size_t most);
std::string_view utf8_tail(std::string_view text, std::size_t most);

}  // namespace machina
