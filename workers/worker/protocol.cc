#include "workers/worker/protocol.h"

#include "queue/base/json.h"
#include "queue/base/utf8.h"

namespace machina {
namespace {

// Every reply that this thread reads goes through one document, which keeps its
// memory.
template <class Each>
bool members(std::string_view reply, Each&& each) {
  static thread_local JsonDoc doc;
  return !doc.parse(reply, kJsonMessageDepthMax) &&
         json::members(doc.root(), each);
}

std::string text_or(const JsonValue& value, const char* absent) {
  auto text = json::string(value);
  return text ? std::move(*text) : std::string(absent);
}

std::string raw_or(const JsonValue& value, const char* absent) {
  return std::string(value.is_null() ? absent : value.raw());
}

bool parse_job(const JsonValue& job, Lease& lease) {
  return json::members(job, [&](auto key, auto value) {
    if (key == "id") {
      lease.job_id = text_or(value, "");
    } else if (key == "kind") {
      lease.kind = text_or(value, "");
    } else if (key == "attempt") {
      lease.attempt = static_cast<int>(json::integer(value).value_or(1));
    } else if (key == "timeout_ms") {
      lease.timeout_ms = json::integer(value).value_or(0);
    } else if (key == "payload") {
      lease.payload = raw_or(value, "{}");
    } else if (key == "sandbox") {
      lease.sandbox = raw_or(value, "");
    } else if (key == "tenant") {
      lease.tenant = text_or(value, "");
    } else if (key == "input") {
      lease.input = raw_or(value, "");
    } else if (key == "traceparent") {
      lease.traceparent = text_or(value, "");
    } else if (key == "request_id") {
      lease.request_id = text_or(value, "");
    }
    return true;
  });
}

bool parse_lease(const JsonValue& one, Lease& lease) {
  const bool good = json::members(one, [&](auto key, auto value) {
    if (key == "token") {
      lease.token = text_or(value, "");
    } else if (key == "lease_ms") {
      lease.lease_ms = json::integer(value).value_or(0);
    } else if (key == "job") {
      return parse_job(value, lease);
    }
    return true;
  });
  return good && !lease.token.empty() && !lease.kind.empty() &&
         lease.lease_ms > 0;
}

// What complete and fail have in common.
void append_end(std::string& out, const kinds::End& end,
                const std::string& isolation) {
  if (!end.message.empty()) {
    out += ",\"message\":";
    // A byte that is not UTF-8 takes three when it is quoted.
    json::quote(out, utf8_head(end.message, kMessageBytesMax / 3));
  }
  if (!end.result.empty()) out += ",\"result\":" + end.result;
  if (!isolation.empty()) out += ",\"isolation\":" + isolation;
  out += ",\"usage\":" + end.usage.json();
  if (!end.side_effects.empty()) out += ",\"side_effects\":" + end.side_effects;
  if (!end.artifacts.empty()) {
    out += ",\"artifacts\":[";
    for (std::size_t i = 0; i < end.artifacts.size(); ++i) {
      if (i > 0) out += ',';
      json::quote(out, end.artifacts[i]);
    }
    out += ']';
  }
}

}  // namespace

Result<std::vector<Lease>> parse_leases(std::string_view reply) {
  std::vector<Lease> out;
  const bool good = members(reply, [&](auto key, auto value) {
    if (key != "leases") return true;
    return json::elements(
        value, [&](auto one) { return parse_lease(one, out.emplace_back()); });
  });
  if (!good) {
    return Error{Code::invalid, "leases: the server's reply is malformed"};
  }
  return out;
}

std::string write_lease_request(const LeaseAsk& request) {
  std::string out = "{\"worker\":" + json::quoted(request.worker) +
                    (request.session.empty()
                         ? ""
                         : ",\"session\":" + json::quoted(request.session)) +
                    ",\"kinds\":[";
  for (std::size_t i = 0; i < request.kinds.size(); ++i) {
    if (i > 0) out += ',';
    json::quote(out, request.kinds[i]);
  }
  out += "],\"max\":" + std::to_string(request.max) +
         ",\"wait_ms\":" + std::to_string(request.wait_ms) +
         ",\"isolation_level\":\"" + kinds::level_name(request.level) + '"';
  if (request.forget_others) out += ",\"holding\":[]";
  return out + "}";
}

void append_completion(std::string& out, const std::string& token,
                       const kinds::End& end, const std::string& isolation) {
  out += "{\"token\":";
  json::quote(out, token);
  if (end.code == EndCode::verdict) out += ",\"verdict\":\"fail\"";
  append_end(out, end, isolation);
  out += '}';
}

std::string write_failure(const kinds::End& end, const std::string& isolation) {
  std::string out = "{\"code\":\"" + std::string(name(end.code)) + "\"";
  append_end(out, end, isolation);
  if (!end.retry) out += ",\"retry\":false";
  return out + "}";
}

std::string write_block(const kinds::End& end) {
  std::string out = "{\"reason\":";
  json::quote(out, end.block_reason);
  if (!end.block_data.empty()) out += ",\"data\":" + end.block_data;
  return out + "}";
}

std::string write_heartbeat(const std::vector<HeartbeatItem>& items,
                            Millis wait_ms) {
  std::string out = "{\"items\":[";
  for (const HeartbeatItem& item : items) {
    if (out.back() == '}') out += ',';
    out += "{\"token\":";
    json::quote(out, item.token);
    if (item.percent >= 0) {
      out += ",\"progress\":{\"percent\":" + std::to_string(item.percent) +
             ",\"message\":";
      json::quote(out, item.message);
      out += '}';
    }
    out += '}';
  }
  return out + "],\"wait_ms\":" + std::to_string(wait_ms) + "}";
}

Result<std::vector<HeartbeatAnswer>> parse_heartbeat(std::string_view reply) {
  std::vector<HeartbeatAnswer> out;
  const bool good = members(reply, [&](auto key, auto list) {
    if (key != "items") return true;
    return json::elements(list, [&](auto item) {
      HeartbeatAnswer& answer = out.emplace_back();
      return json::members(item, [&](auto name, auto value) {
        if (name == "token") answer.token = text_or(value, "");
        if (name == "cancel")
          answer.cancel = json::boolean(value).value_or(false);
        if (name == "problem") answer.lost = !value.is_null();
        return true;
      });
    });
  });
  if (!good) return Error{Code::invalid, "heartbeat: malformed reply"};
  return out;
}

Result<std::vector<ItemReply>> parse_items(std::string_view reply) {
  std::vector<ItemReply> out;
  const bool good = members(reply, [&](auto key, auto list) {
    if (key != "items") return true;
    return json::elements(list, [&](auto item) {
      ItemReply& answer = out.emplace_back();
      return json::members(item, [&](auto name, auto value) {
        if (name == "token") answer.token = text_or(value, "");
        if (name == "problem" && !value.is_null()) {
          answer.problem = std::string(utf8_head(value.raw(), 500));
          json::members(value, [&](auto field, auto number) {
            if (field == "status") {
              answer.status =
                  static_cast<int>(json::integer(number).value_or(0));
            }
            return true;
          });
        }
        return true;
      });
    });
  });
  if (!good) return Error{Code::invalid, "complete: malformed reply"};
  return out;
}

}  // namespace machina
