#include "server/api/problem.h"

#include "queue/base/json.h"
#include "queue/base/utf8.h"
#include "queue/shard/shard.h"

namespace machina {

std::string_view reason_phrase(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 201:
      return "Created";
    case 202:
      return "Accepted";
    case 204:
      return "No Content";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 403:
      return "Forbidden";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 409:
      return "Conflict";
    case 413:
      return "Content Too Large";
    case 414:
      return "URI Too Long";
    case 417:
      return "Expectation Failed";
    case 422:
      return "Unprocessable Content";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    case 500:
      return "Internal Server Error";
    case 501:
      return "Not Implemented";
    case 503:
      return "Service Unavailable";
    case 505:
      return "HTTP Version Not Supported";
    case 507:
      return "Insufficient Storage";
    default:
      return "Status";
  }
}

std::string title_of(std::string_view code) {
  std::string title(code);
  for (char& c : title) {
    if (c == '-') c = ' ';
  }
  return title;
}

void append_problem(std::string* out, const Problem& problem) {
  JsonWriter json(*out);
  json.begin_object();
  json.key("type").string("/problems/" + std::string(problem.code));
  json.key("title").string(title_of(problem.code));
  json.key("status").number(problem.status);
  json.key("detail").string(problem.detail);
  json.key("code").string(problem.code);
  if (!problem.field.empty()) json.key("field").string(problem.field);
  if (problem.index >= 0) json.key("index").number(problem.index);
  json.end_object();
}

Problem not_implemented(std::string field, std::string detail) {
  Problem p;
  p.status = 501;
  p.code = "not-implemented";
  p.detail = std::move(detail);
  p.field = std::move(field);
  return p;
}

Problem bad_field(std::string_view field, std::string_view detail) {
  Problem p;
  p.detail = std::string(field) + ": " + std::string(detail);
  p.field = field;
  return p;
}

std::string shown(std::string_view value) {
  constexpr std::size_t kShownMax = 80;
  std::string out;
  json::quote(out, utf8_head(value, kShownMax));
  if (value.size() > kShownMax) out += "...";
  return out;
}

Problem no_such_job() {
  Problem p;
  p.status = 404;
  p.code = "not-found";
  p.detail = "job: unknown, or past its retention";
  return p;
}

std::optional<Problem> failure_of(const Response& response) {
  using Status = Response::Status;
  Problem p;
  p.status = 503;
  p.retry_after = 1;
  p.detail = response.detail;
  switch (response.status) {
    case Status::done:
      return std::nullopt;
    case Status::poisoned:
      p.code = "poisoned";
      p.retry_after = 0;
      p.detail = "the log failed; whether this was done is unknown";
      break;
    case Status::disk_low:
      p.status = 507;
      p.code = "disk-low";
      p.retry_after = 10;
      if (p.detail.empty()) p.detail = "the disk is nearly full";
      break;
    case Status::lagging:
      p.code = "lagging";
      if (p.detail.empty()) {
        p.detail =
            "the history of finished jobs is too far behind "
            "(MACHINA_HISTORY_LAG_MAX_BYTES)";
      }
      break;
    case Status::draining:
      p.code = "draining";
      if (p.detail.empty()) p.detail = "the server is stopping";
      break;
    case Status::bad_cursor:
      p = bad_field("cursor", "it does not come from this server's last page");
      break;
    case Status::failed:
      p.status = 500;
      p.code = "internal";
      p.retry_after = 0;
      break;
  }
  return p;
}

}  // namespace machina
