// server/api/problem.h
//
// What a client is told when the answer is no: RFC 9457, one shape everywhere.
// `detail` names the field, the value and the bound.

#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace machina {

struct Response;

struct Problem {
  int status = 400;
  std::string_view code = "bad-request";  // a literal
  std::string detail;
  std::string field;
  int index = -1;       // in an array or NDJSON request
  int retry_after = 0;  // seconds
  std::string allow;    // 405
};

std::string_view reason_phrase(int status);
// A short text for a person: "not implemented" for not-implemented.
std::string title_of(std::string_view code);
void append_problem(std::string* out, const Problem& problem);

Problem not_implemented(std::string field, std::string detail);
// 400 bad-request about one field: "<field>: <detail>".
Problem bad_field(std::string_view field, std::string_view detail);
// A value as it may be shown in an error: quoted where it is text, cut.
std::string shown(std::string_view value);

Problem no_such_job();  // 404
// Why the shard did not do what it was asked to; nothing: it did.
std::optional<Problem> failure_of(const Response& response);

}  // namespace machina
