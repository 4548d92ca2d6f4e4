// queue/base/json_view.h
//
// Reading and writing the little JSON that a worker handles at high rate: spans
// of the text itself, no tree, no allocation but for what is kept. It is for
// text that the server has already validated; on text that is not JSON it
// answers false or nullopt and never reads outside the view.

#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

namespace machina::json {

// Calls `each(key, value)` with the raw text of every value; the key is raw
// too, without its quotes. False: not an object, or `each` said false.
using EachMember =
    std::function<bool(std::string_view key, std::string_view value)>;
bool members(std::string_view object, const EachMember& each);

using EachElement = std::function<bool(std::string_view value)>;
bool elements(std::string_view array, const EachElement& each);

std::optional<std::string> string(std::string_view raw);  // unescaped
std::optional<std::int64_t> integer(std::string_view raw);
std::optional<bool> boolean(std::string_view raw);

// Appends `text` as a JSON string; bytes that are not UTF-8 become U+FFFD.
void quote(std::string& out, std::string_view text);
std::string quoted(std::string_view text);

}  // namespace machina::json
