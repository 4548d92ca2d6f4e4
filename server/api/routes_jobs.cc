// What clients ask about jobs: submit, look, list, cancel, retry, unblock.

#include <algorithm>
#include <ctime>

#include "queue/base/hex.h"
#include "queue/base/numbers.h"
#include "queue/base/utf8.h"
#include "server/api/service.h"

namespace machina {
namespace {

// How an enqueue is answered.
enum Form : std::uint8_t { kPlain, kEnqueueForm, kRunSync };

struct Waited final : PendingExtra {
  int seconds = 0;
};

// Which lines of a bulk request went to the shard, and what became of the rest.
struct Bulk final : PendingExtra {
  struct Item {
    int index = 0;
    MaybeProblem problem;  // nothing: the next of the shard's answers
    std::string kind, queue;
  };
  std::vector<Item> items;
};

struct ListPage final : PendingExtra {
  std::string query;  // without its cursor
};

// version-traceid-parentid-flags, lower-case hex (W3C Trace Context); empty
// where it is none. A version to come may have more behind a dash, which says
// nothing to this one.
std::string_view known_traceparent(std::string_view text) {
  constexpr std::size_t kKnown = 55;
  const bool more =
      text.size() > kKnown && !text.starts_with("00") && text[kKnown] == '-';
  if (text.size() != kKnown && !more) return {};
  text = text.substr(0, kKnown);
  for (std::size_t i = 0; i < text.size(); ++i) {
    bool dash = i == 2 || i == 35 || i == 52;
    char c = text[i];
    bool hex = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
    if (dash ? c != '-' : !hex) return {};
  }
  const bool good = text.substr(0, 2) != "ff" &&
                    text.substr(3, 32).find_first_not_of('0') != text.npos &&
                    text.substr(36, 16).find_first_not_of('0') != text.npos;
  return good ? text : std::string_view();
}

// A client that sent the header meant a key; what filled it in had none.
bool empty_key(const Head& head) {
  return head.has_idempotency_key && head.idempotency_key.empty();
}
constexpr char kEmptyKey[] = "it is empty; name a key, or leave the header out";

// What a dedup key remembers of a job that is past its retention, beside the
// state.
void append_end(JsonWriter& json, const std::string& kind,
                const ItemAnswer& answer) {
  json.key("kind").string(kind);
  json.key("attempt").number(answer.attempt);
  json.key("created_at").time(created_ms(answer.id));
  json.key("finished_at").time(answer.finished_ms);
  json.key("past_retention").boolean(true);
}

std::string location_of(const JobId& id) {
  constexpr std::string_view kHead = "Location: /v1/jobs/";
  std::string line;
  line.reserve(kHead.size() + kJobIdText + 2);
  line = kHead;
  line.resize(kHead.size() + kJobIdText);
  write_job_id(id, line.data() + kHead.size());
  return line += "\r\n";
}

Problem malformed(const JsonError& error) {
  Problem p;
  if (!error.duplicate.empty()) {
    p.code = "unknown-field";
    p.field = error.duplicate;
    p.detail = error.duplicate + ": the member is there twice (byte " +
               std::to_string(error.offset) + ")";
    return p;
  }
  p.code = "malformed-json";
  p.detail = "malformed JSON at byte " + std::to_string(error.offset) + ": " +
             error.what;
  return p;
}

// The second halves, defined below.
Answerer* enqueue_answer(std::uint8_t form);
Answerer enqueued_many, listed;

}  // namespace

bool is_ndjson(std::string_view content_type) {
  std::string_view type = content_type.substr(0, content_type.find(';'));
  while (!type.empty() && type.back() == ' ') type.remove_suffix(1);
  return equals_ignoring_case(type, "application/x-ndjson") ||
         equals_ignoring_case(type, "application/ndjson");
}

int preferred_wait(std::string_view prefer) {
  while (!prefer.empty()) {
    std::size_t end = std::min(prefer.find(','), prefer.size());
    std::string_view one = prefer.substr(0, end);
    prefer.remove_prefix(std::min(end + 1, prefer.size()));
    while (!one.empty() && one.front() == ' ') one.remove_prefix(1);
    while (!one.empty() && one.back() == ' ') one.remove_suffix(1);
    if (one.size() < 6 || !equals_ignoring_case(one.substr(0, 5), "wait=")) {
      continue;
    }
    const std::string_view seconds = one.substr(5);
    if (seconds.find_first_not_of("0123456789") != seconds.npos) continue;
    // What is no int is too large for one.
    return std::min(parse_number<int>(seconds).value_or(kWaitSecondsMax),
                    kWaitSecondsMax);
  }
  return -1;
}

// --- Bodies ----------------------------------------------------------------

bool Service::parse_body(const Exchange& call, bool empty_is_object,
                         JsonValue* json, int depth_max) {
  std::string_view text = call.body;
  if (text.empty() && empty_is_object) text = "{}";
  if (auto error = doc_.parse(text, depth_max)) {
    refuse(call.peer, call.sequence, malformed(*error));
    return false;
  }
  *json = doc_.root();
  if (empty_is_object && !json->is_object()) {
    Problem p;
    p.detail = "the body must be an object";
    refuse(call.peer, call.sequence, p);
    return false;
  }
  return true;
}

// For actions that take no members.
bool Service::no_members(const Exchange& call) {
  JsonValue json;
  if (!parse_body(call, true, &json)) return false;
  if (JsonValue m = json.first()) {
    refuse(call.peer, call.sequence, unknown_field(m.key()));
    return false;
  }
  return true;
}

JobContext Service::context_of(const Exchange& call) {
  JobContext context{options_, clock_};
  context.tenant = call.principal.tenant;
  context.traceparent = known_traceparent(call.head.traceparent);
  Pending* pending = call.peer.connection.pending(call.sequence);
  context.request_id =
      std::string_view(pending->request_id, pending->request_id_bytes);
  return context;
}

std::optional<JobId> Service::job_of(const Exchange& call) {
  auto id = parse_job_id(call.args[0]);
  if (!id) {
    Problem p;
    p.status = 404;
    p.code = "not-found";
    p.detail = "job: " + shown(call.args[0]) + " is no job's id";
    refuse(call.peer, call.sequence, p);
  }
  return id;
}

// Until this turn; one that was answered without the shard took no time.
void Service::took(const Pending& pending) {
  if (now_us_ <= pending.begun_us) return;
  metrics_.enqueue_took(static_cast<double>(now_us_ - pending.begun_us) / 1e6);
}

// --- Submitting ------------------------------------------------------------

static void post_jobs(Service& s, const Exchange& call) {
  if (is_ndjson(call.head.content_type)) return s.enqueue_many(call, true);
  JsonValue json;
  if (!s.parse_body(call, false, &json)) return;
  if (json.is_array()) return s.enqueue_many(call, false);
  int wait = preferred_wait(call.head.prefer);
  if (wait >= 0) {
    auto waited = std::make_unique<Waited>();
    waited->seconds = wait;
    call.peer.connection.pending(call.sequence)->extra = std::move(waited);
  }
  s.enqueue_one(call, json, wait > 0 ? wait * Millis{1000} : 0, kPlain);
}

static void post_enqueue(Service& s, const Exchange& call) {
  JsonValue json;
  if (!s.parse_body(call, false, &json)) return;
  s.enqueue_one(call, json, 0, kEnqueueForm);
}

static void post_run_sync(Service& s, const Exchange& call) {
  JsonValue json;
  if (!s.parse_body(call, false, &json)) return;
  s.enqueue_one(call, json, kRunSyncWaitMs, kRunSync);
}

void Service::enqueue_one(const Exchange& call, const JsonValue& json,
                          Millis wait_ms, std::uint8_t form) {
  JobContext context = context_of(call);
  if (empty_key(call.head)) {
    return refuse(call.peer, call.sequence,
                  bad_field("Idempotency-Key", kEmptyKey));
  }
  if (call.head.idempotency_key.size() > kDedupKeyBytesMax) {
    return refuse(
        call.peer, call.sequence,
        bad_field("Idempotency-Key",
                  std::to_string(call.head.idempotency_key.size()) +
                      " bytes; at most " + std::to_string(kDedupKeyBytesMax)));
  }
  if (!call.head.idempotency_key.empty() &&
      !valid_utf8(call.head.idempotency_key)) {
    return refuse(call.peer, call.sequence,
                  bad_field("Idempotency-Key", "it is not valid UTF-8"));
  }
  context.idempotency_key = call.head.idempotency_key;
  EnqueueCommand command;
  command.jobs.emplace_back();
  if (auto p = read_new_job(json, context, &command.jobs.front())) {
    return refuse(call.peer, call.sequence, *p);
  }
  Pending* pending = call.peer.connection.pending(call.sequence);
  pending->then = enqueue_answer(form);
  if (wait_ms == 0 && form != kEnqueueForm) keep_room(call);
  Request request = request_of(call);
  request.what.emplace<Command>(std::move(command));
  request.wait_ms = wait_ms;
  request.with_payload = form != kEnqueueForm;
  submit_new(std::move(request));
}

namespace {

template <Form form>
void enqueued(Service& s, Peer& peer, std::uint64_t sequence, Pending& pending,
              Response& response) {
  s.took(pending);
  const ItemAnswer answer = response.items.empty()
                                ? ItemAnswer{Answer::need_facts, {}, {}, {}, {}}
                                : response.items.front();
  if (auto p = s.problem_of(answer, "job")) return s.refuse(peer, sequence, *p);
  pending.job = answer.id;
  bool duplicate = answer.answer == Answer::duplicate;
  if (form == kEnqueueForm) {
    std::string body;
    JsonWriter json(body);
    json.begin_object();
    json.key("ok").boolean(true);
    json.key("id").id(answer.id);
    json.key(duplicate ? "deduplicated" : "queued").boolean(true);
    if (!response.views.empty() && response.views.front().past_retention) {
      const JobView& view = response.views.front();
      json.key("state").string(name(view.state));
      append_end(json, view.kind, answer);
    }
    json.end_object();
    return s.reply(peer, sequence, 200, body);
  }
  if (response.views.empty()) {
    // Its job ended and was forgotten (keep_result_ms 0) while we waited.
    Problem p;
    p.status = 404;
    p.code = "not-found";
    p.detail = "job: " + to_string(answer.id) + " is past its retention";
    return s.refuse(peer, sequence, p);
  }
  JobView& view = response.views.front();
  if (!duplicate) s.metrics_.enqueued(view.kind, view.queue);
  view.duplicate = duplicate;
  int status = duplicate ? 200 : 201;
  std::string headers = location_of(answer.id);
  if (pending.extra != nullptr) {
    int seconds = static_cast<Waited&>(*pending.extra).seconds;
    headers += "Preference-Applied: wait=" + std::to_string(seconds) + "\r\n";
    if (seconds > 0) status = is_final(view.state) ? 200 : 202;
  }
  if (form == kRunSync) status = is_final(view.state) ? 200 : 202;
  s.reply_job(peer, sequence, status, response, Show::all, std::move(headers));
}

Answerer* enqueue_answer(std::uint8_t form) {
  return form == kPlain         ? enqueued<kPlain>
         : form == kEnqueueForm ? enqueued<kEnqueueForm>
                                : enqueued<kRunSync>;
}

}  // namespace

// An array, or a job a line. What can be read goes to the shard in one
// command: one commit; the rest is answered with its problem.
void Service::enqueue_many(const Exchange& call, bool lines) {
  if (call.head.has_idempotency_key) {
    return refuse(call.peer, call.sequence,
                  bad_field("Idempotency-Key",
                            "it names one job; give each job of a bulk "
                            "request its own dedup_key"));
  }
  auto bulk = std::make_unique<Bulk>();
  EnqueueCommand command;
  JobContext context = context_of(call);
  bool too_many = false;
  auto add = [&](int index, const JsonValue* json, MaybeProblem problem) {
    if (index >= kBatchMax) {
      too_many = true;
      return;
    }
    NewJob job;
    if (!problem) problem = read_new_job(*json, context, &job);
    bulk->items.push_back({index, std::move(problem), job.kind, job.queue});
    if (!bulk->items.back().problem) command.jobs.push_back(std::move(job));
  };
  if (lines) {
    std::string_view left = call.body;
    int index = 0;
    while (!left.empty() && !too_many) {
      std::size_t end = std::min(left.find('\n'), left.size());
      std::string_view line = left.substr(0, end);
      left.remove_prefix(std::min(end + 1, left.size()));
      if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
      if (line.find_first_not_of(" \t") == line.npos) continue;
      auto error = doc_.parse(line);
      JsonValue json = doc_.root();
      add(index++, &json,
          error ? MaybeProblem(malformed(*error)) : std::nullopt);
    }
  } else {
    int index = 0;
    for (JsonValue v = doc_.root().first(); v && !too_many; v = v.next()) {
      add(index++, &v, std::nullopt);
    }
  }
  if (too_many) {
    Problem p;
    p.status = 413;
    p.code = "too-large";
    p.detail = "more than " + std::to_string(kBatchMax) + " jobs in a request";
    return refuse(call.peer, call.sequence, p);
  }
  Pending* pending = call.peer.connection.pending(call.sequence);
  door_->spend_jobs(call.peer.visitor, &pending->limits, command.jobs.size());
  bool nothing = command.jobs.empty();
  pending->then = enqueued_many;
  pending->extra = std::move(bulk);
  if (nothing) {
    Response none;
    return enqueued_many(*this, call.peer, call.sequence, *pending, none);
  }
  Request request = request_of(call);
  request.what.emplace<Command>(std::move(command));
  request.with_payload = false;
  submit_new(std::move(request), [](Pending& p, auto& problems) {
    note_problems(static_cast<Bulk&>(*p.extra).items, problems);
  });
}

namespace {

void enqueued_many(Service& s, Peer& peer, std::uint64_t sequence,
                   Pending& pending, Response& response) {
  s.took(pending);
  auto& bulk = static_cast<Bulk&>(*pending.extra);
  int accepted = 0, duplicates = 0, rejected = 0;
  std::string jobs;
  JsonWriter json(jobs);
  json.begin_array();
  std::size_t next = 0;
  for (Bulk::Item& item : bulk.items) {
    MaybeProblem problem = std::move(item.problem);
    json.begin_object();
    json.key("index").number(item.index);
    if (!problem) {
      std::size_t at = next++;
      const ItemAnswer answer =
          at < response.items.size()
              ? response.items[at]
              : ItemAnswer{Answer::need_facts, {}, {}, {}, {}};
      problem = s.problem_of(answer, "job");
      if (!problem) {
        bool duplicate = answer.answer == Answer::duplicate;
        ++(duplicate ? duplicates : accepted);
        if (!duplicate) s.metrics_.enqueued(item.kind, item.queue);
        json.key("id").id(answer.id);
        json.key("state").string(name(answer.state));
        json.key("duplicate").boolean(duplicate);
        if (at < response.views.size() && response.views[at].past_retention) {
          append_end(json, item.kind, answer);
        } else if (!is_final(answer.state) && !s.served(item.kind)) {
          json.key("served").boolean(false);
        }
      }
    }
    if (problem) {
      ++rejected;
      problem->index = item.index;
      std::string text;
      append_problem(&text, *problem);
      json.key("problem").raw(text);
    }
    json.end_object();
  }
  json.end_array();
  std::string body = "{\"accepted\":" + std::to_string(accepted) +
                     ",\"duplicates\":" + std::to_string(duplicates) +
                     ",\"rejected\":" + std::to_string(rejected) +
                     ",\"jobs\":" + jobs + "}";
  s.reply(peer, sequence, 200, body);
}

}  // namespace

// --- Looking ---------------------------------------------------------------

namespace {

void found(Service& s, Peer& peer, std::uint64_t sequence, Pending& pending,
           Response& response) {
  if (!response.views.empty() &&
      !pending.principal->sees(response.views.front().tenant)) {
    response.views.clear();
  }
  got<Show::all>(s, peer, sequence, pending, response);
}

}  // namespace

static void get_job(Service& s, const Exchange& call) {
  auto id = s.job_of(call);
  if (!id) return;
  Pending* pending = call.peer.connection.pending(call.sequence);
  pending->then = found;
  Request request = s.request_of(call);
  GetQuery get;
  get.id = *id;
  const int wait = preferred_wait(call.head.prefer);
  if (wait <= 0) {
    request.what = get;
    return s.submit(std::move(request));
  }
  get.until_final = true;
  get.wait_ms = request.wait_ms = wait * Millis{1000};
  request.what = get;
  auto waited = std::make_unique<Waited>();
  waited->seconds = wait;
  pending->extra = std::move(waited);
  if (call.principal.all_tenants) return s.submit(std::move(request));
  // Another tenant's job is not waited for: the wait would tell that it exists.
  s.with_job(Where{call.peer.id, call.sequence}, *id,
             [&s, request](JobView&) { s.submit(request); });
}

template <Show show>
void got(Service& s, Peer& peer, std::uint64_t sequence, Pending& pending,
         Response& response) {
  if (response.views.empty() || response.views.front().id.is_nil()) {
    return s.refuse(peer, sequence, no_such_job());
  }
  std::string headers;
  int status = 200;
  const JobView& view = response.views.front();
  if (pending.extra != nullptr) {
    int seconds = static_cast<Waited&>(*pending.extra).seconds;
    headers = "Preference-Applied: wait=" + std::to_string(seconds) + "\r\n";
    if (!is_final(view.state)) status = 202;
  }
  s.reply_job(peer, sequence, status, response, show, std::move(headers));
}

template void got<Show::all>(Service&, Peer&, std::uint64_t, Pending&,
                             Response&);
template void got<Show::no_payload>(Service&, Peer&, std::uint64_t, Pending&,
                                    Response&);

namespace {

// One parameter of a list request.
MaybeProblem read_parameter(const std::string& name, const std::string& value,
                            ListQuery* query) {
  auto time = [&](Millis* out) -> MaybeProblem {
    auto at = parse_rfc3339(value);
    if (!at || *at < 0) {
      return bad_field(name, shown(value) +
                                 " is not a time of the form "
                                 "2026-01-31T12:00:00.000Z");
    }
    *out = *at;
    return std::nullopt;
  };
  if (name == "state") {
    std::string_view left = value;
    while (!left.empty()) {
      std::size_t end = std::min(left.find(','), left.size());
      auto state = parse_state(left.substr(0, end));
      if (!state) {
        std::string known;
        for (int i = 0; i < kStates; ++i) {
          known += (known.empty() ? "" : ", ") +
                   std::string(machina::name(static_cast<State>(i)));
        }
        return bad_field(name, shown(left.substr(0, end)) +
                                   " is no state; the states are " + known);
      }
      query->states.push_back(*state);
      left.remove_prefix(std::min(end + 1, left.size()));
    }
    return std::nullopt;
  }
  if (name == "kind") {
    if (!valid_kind(value))
      return bad_field(name, shown(value) + " is no kind");
    query->kind = value;
    return std::nullopt;
  }
  if (name == "queue") {
    if (!valid_name(value)) {
      return bad_field(name, shown(value) + " is no queue's name");
    }
    query->queue = value;
    return std::nullopt;
  }
  if (name == "since") return time(&query->since_ms);
  if (name == "until") return time(&query->until_ms);
  if (name == "limit") {
    const auto limit = parse_number<int>(value);
    if (!limit || *limit < 1 || *limit > 1000) {
      return bad_field(name, shown(value) + " is not an integer in 1..1000");
    }
    query->limit = *limit;
    return std::nullopt;
  }
  if (name == "cursor") {
    if (value.size() > 512) {
      return bad_field(name,
                       std::to_string(value.size()) + " bytes; at most 512");
    }
    query->cursor = value;
    return std::nullopt;
  }
  if (name == "q") {
    return not_implemented("q", "q: this version has no text search");
  }
  if (name.rfind("label.", 0) == 0) {
    std::string key = name.substr(6);
    if (!valid_name(key)) return bad_field(name, "no label's key");
    query->labels.emplace_back(std::move(key), value);
    return std::nullopt;
  }
  return unknown_field(name);
}

MaybeProblem read_list(std::string_view text, ListQuery* query,
                       std::string* rest) {
  auto parameters = parse_query(text);
  if (!parameters) {
    Problem p;
    p.detail = "query: malformed percent-encoding";
    return p;
  }
  for (const auto& [name, value] : *parameters) {
    if (auto p = read_parameter(name, value, query)) return p;
  }
  if (!query->labels.empty()) {
    bool finished = !query->states.empty() &&
                    std::all_of(query->states.begin(), query->states.end(),
                                [](State s) { return is_final(s); });
    if (!finished) {
      return not_implemented(
          "label." + query->labels.front().first,
          "label: this version filters finished jobs only; add state= with "
          "final states");
    }
  }
  // The next page's address: as it was asked, but for the cursor.
  *rest = without_cursor(text);
  return std::nullopt;
}

std::string percent_encoded(std::string_view text) {
  std::string out;
  for (unsigned char c : text) {
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
        (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.') {
      out += static_cast<char>(c);
    } else {
      out += '%';
      out += "0123456789ABCDEF"[c >> 4];
      out += "0123456789ABCDEF"[c & 15];
    }
  }
  return out;
}

}  // namespace

static void list_jobs(Service& s, const Exchange& call) {
  ListQuery query;
  auto page = std::make_unique<ListPage>();
  if (auto p = read_list(call.head.query, &query, &page->query)) {
    return s.refuse(call.peer, call.sequence, *p);
  }
  Pending* pending = call.peer.connection.pending(call.sequence);
  pending->then = listed;
  pending->extra = std::move(page);
  Request request = s.request_of(call);
  request.what = std::move(query);
  request.with_payload = false;
  s.submit(std::move(request));
}

namespace {

void listed(Service& s, Peer& peer, std::uint64_t sequence, Pending& pending,
            Response& response) {
  std::string body;
  JsonWriter json(body);
  json.begin_object();
  json.key("jobs").begin_array();
  for (const JobView& view : response.views) {
    if (!pending.principal->sees(view.tenant)) continue;
    append_job(json, view, Show::summary, s.served(view.kind),
               s.pools_.waiting_reason(view));
  }
  json.end_array();
  json.key("cursor");
  Extras extras;
  if (response.cursor.empty()) {
    json.null();
  } else {
    json.string(response.cursor);
    extras.headers =
        "Link: </v1/jobs?" + static_cast<ListPage&>(*pending.extra).query +
        "cursor=" + percent_encoded(response.cursor) + ">; rel=\"next\"\r\n";
  }
  json.key("scanned").number(response.scanned);
  json.end_object();
  s.reply(peer, sequence, 200, body, extras);
}

}  // namespace

// --- Acting ----------------------------------------------------------------

namespace {

template <class T>
void act(Service& s, const Where& where, T command) {
  Pending* pending = s.pending_at(where);
  if (pending == nullptr) return;
  pending->then = acted<Show::all>;
  Request request;
  request.from = Address{0, where.peer, where.sequence};
  request.what.emplace<Command>(std::move(command));
  s.submit(std::move(request));
}

// The tenant of a job never changes, so the look holds when the command is
// decided. With one tenant there is no look: the command reaches the shard
// before what its connection sends next.
template <class T>
void act_on_own(Service& s, const Exchange& call, const JobId& id, T command) {
  const Where where{call.peer.id, call.sequence};
  if (call.principal.all_tenants || s.door_->gate().one_tenant()) {
    return act(s, where, std::move(command));
  }
  s.with_job(where, id,
             [&s, where, command](JobView&) { act(s, where, command); });
}

}  // namespace

static void cancel_job(Service& s, const Exchange& call) {
  auto id = s.job_of(call);
  if (!id || !s.no_members(call)) return;
  act_on_own(s, call, *id, CancelCommand{*id});
}

static void retry_job(Service& s, const Exchange& call) {
  auto id = s.job_of(call);
  JsonValue json;
  if (!id || !s.parse_body(call, true, &json)) return;
  RetryCommand retry;
  retry.id = *id;
  for (JsonValue m = json.first(); m; m = m.next()) {
    MaybeProblem p = m.key() == "ignore_dependencies"
                         ? read_bool(m, m.key(), &retry.ignore_dependencies)
                         : unknown_field(m.key());
    if (p) return s.refuse(call.peer, call.sequence, *p);
  }
  act_on_own(s, call, retry.id, retry);
}

namespace {

Problem mismatch(const std::string& field, const std::string& detail) {
  Problem p;
  p.status = 422;
  p.code = "digest-mismatch";
  p.field = field;
  p.detail = field + ": " + detail + "; the job stays blocked";
  return p;
}

constexpr char kApprovalForm[] =
    "{\"approve\":true,\"digest\":\"<blocked.data.digest>\"} or "
    "{\"approve\":false}";

// The unblock of a job that waits for approval says what it approves: the
// digest that the job was blocked with. A denial needs none. The commit that
// the job was blocked with goes into the input, so that what runs next is what
// was shown.
MaybeProblem check_approval(const JobView& job, UnblockCommand* unblock) {
  // A rollback that waits with a merge is asked for a yes to just that; where
  // there is none, to look again.
  const bool merge =
      job.kind == kRollbackKind && job.blocked_reason == "conflict";
  if (job.state != State::blocked ||
      (job.blocked_reason != "approval" && !merge)) {
    return std::nullopt;
  }
  if (!same_secret(job.blocked_token, unblock->token)) {
    return std::nullopt;  // the core says so
  }
  JsonDoc data_doc, input_doc;
  std::string bound, base;
  if (!job.blocked_data.empty() && !data_doc.parse(job.blocked_data) &&
      data_doc.root().is_object()) {
    JsonValue digest = data_doc.root().find("digest");
    if (digest && digest.is_string()) bound = digest.as_string();
    JsonValue commit = data_doc.root().find("base_commit");
    if (commit && commit.is_string()) base = commit.as_string();
    if (!is_commit_name(base)) base.clear();
  }
  const bool empty = unblock->input.empty();
  // An approval is never given by saying nothing. What a worker of another kind
  // asks for without a digest may be answered in any words.
  if (bound.empty() && !job.kind.starts_with("patch.")) {
    if (!empty) return std::nullopt;
    return bad_field("input",
                     "it is missing; the job waits for approval: send what "
                     "blocked.data asks for");
  }
  if (empty || input_doc.parse(unblock->input) ||
      !input_doc.root().is_object()) {
    return bad_field("input",
                     (empty ? "it is missing"
                            : shown(unblock->input) + " is not an object") +
                         std::string("; the job waits for approval: "
                                     "send ") +
                         kApprovalForm);
  }
  bool approve = true, decided = false;
  std::string given, comment, commit;
  for (JsonValue m = input_doc.root().first(); m; m = m.next()) {
    MaybeProblem p;
    if (m.key() == "approve") {
      p = read_bool(m, "input.approve", &approve);
      decided = true;
    } else if (m.key() == "digest") {
      p = read_string(m, "input.digest", 256, &given);
    } else if (m.key() == "base_commit") {
      p = read_string(m, "input.base_commit", 64, &commit);
    } else if (m.key() == "comment") {
      p = read_string(m, "input.comment", 1024, &comment);
    } else {
      p = unknown_field("input." + std::string(m.key()));
    }
    if (p) return p;
  }
  if (!commit.empty() && commit != base) {
    return mismatch(
        "input.base_commit",
        shown(commit) + " is not blocked.data.base_commit" +
            (base.empty() ? ", which this job has not" : ", " + shown(base)));
  }
  const bool looks_again = merge && bound.empty();
  if (looks_again && given.empty() && !decided) {
    return bad_field("input.approve",
                     "it is missing; the job waits for a decision: send "
                     "{\"approve\":true} to look again or "
                     "{\"approve\":false}");
  }
  if (given.empty() && (!approve || looks_again)) return std::nullopt;
  if (bound.empty()) {
    return mismatch("input.digest",
                    "blocked.data names no digest to approve: deny it with "
                    "{\"approve\":false}, or cancel the job");
  }
  if (given.empty()) {
    return mismatch("input.digest",
                    "it is missing: send blocked.data.digest, " + shown(bound) +
                        ", which is what is approved");
  }
  if (!same_secret(bound, given)) {
    return mismatch(
        "input.digest",
        shown(given) + " is not blocked.data.digest, " + shown(bound));
  }
  if (base.empty()) return std::nullopt;
  unblock->input.clear();
  JsonWriter json(unblock->input);
  json.begin_object();
  json.key("approve").boolean(approve);
  json.key("digest").string(given);
  json.key("base_commit").string(base);
  if (!comment.empty()) json.key("comment").string(comment);
  json.end_object();
  return std::nullopt;
}

}  // namespace

static void unblock_job(Service& s, const Exchange& call) {
  auto id = s.job_of(call);
  JsonValue json;
  if (!id || !s.parse_body(call, true, &json)) return;
  UnblockCommand unblock;
  unblock.id = *id;
  for (JsonValue m = json.first(); m; m = m.next()) {
    MaybeProblem p;
    if (m.key() == "token") {
      p = read_string(m, "token", 128, &unblock.token);
    } else if (m.key() == "actor") {
      p = read_string(m, "actor", 256, &unblock.actor);
    } else if (m.key() == "input") {
      unblock.input = m.is_null() ? "" : std::string(m.raw());
      if (unblock.input.size() > kBlockDataBytesMax) {
        p = bad_field("input", std::to_string(unblock.input.size()) +
                                   " bytes; at most " +
                                   std::to_string(kBlockDataBytesMax));
      }
    } else {
      p = unknown_field(m.key());
    }
    if (p) return s.refuse(call.peer, call.sequence, *p);
  }
  if (unblock.token.empty()) {
    return s.refuse(
        call.peer, call.sequence,
        bad_field("token", "it is missing: send the job's blocked.token"));
  }
  // What it waits for decides what the input has to say. The token is of this
  // one block, so that the core's look at it makes this look hold.
  Where where{call.peer.id, call.sequence};
  s.with_job(where, *id, [&s, where, unblock](const JobView& job) mutable {
    if (auto p = check_approval(job, &unblock)) return s.refuse(where, *p);
    act(s, where, std::move(unblock));
  });
}

// Of clients' and of workers' actions alike: done, so show the job.
template <Show show>
void acted(Service& s, Peer& peer, std::uint64_t sequence, Pending&,
           Response& response) {
  if (response.items.empty()) {
    return s.refuse(peer, sequence,
                    *s.problem_of({Answer::need_facts, {}, {}, {}, {}}, "job"));
  }
  const ItemAnswer& answer = response.items.front();
  if (auto p = s.problem_of(answer, "job")) return s.refuse(peer, sequence, *p);
  constexpr bool worker = show == Show::no_payload;
  if (!response.views.empty() && !response.views.front().id.is_nil()) {
    const JobView& job = response.views.front();
    // Given back and blocked attempts did not fail.
    if (worker && job.error_code != EndCode::none &&
        job.error_attempt == job.attempt) {
      const Millis end = job.finished_ms ? job.finished_ms : s.clock_.wall_ms();
      s.metrics_.tool_ended(job.kind, false,
                            job.started_ms ? end - job.started_ms : 0);
    }
    return s.reply_job(peer, sequence, 200, response,
                       worker ? Show::no_payload : Show::all);
  }
  s.reply_with_job(peer, sequence, answer.id, !worker);
}

template void acted<Show::all>(Service&, Peer&, std::uint64_t, Pending&,
                               Response&);
template void acted<Show::no_payload>(Service&, Peer&, std::uint64_t, Pending&,
                                      Response&);

// --- The rows ---------------------------------------------------------------

namespace {

// What is to be kept free for the answer before the request is begun.
std::uint64_t weight_of_jobs(const Head& head, std::string_view body) {
  const std::size_t first = body.find_first_not_of(" \t\r\n");
  const bool lines = is_ndjson(head.content_type);
  if (!lines && (first == body.npos || body[first] != '[')) return 0;
  const auto items = static_cast<std::uint64_t>(
      std::count(body.begin(), body.end(), lines ? '\n' : ','));
  return std::min<std::uint64_t>(items + 1, kBatchMax) * kItemWeight;
}

// A request that waits long has no answer yet that would need room.
std::uint64_t weight_of_job(const Head& head, std::string_view) {
  return preferred_wait(head.prefer) > 0 ? 0 : kJobWeight;
}

}  // namespace

std::span<const Route> job_routes() {
  static constexpr Route kRows[] = {
      {Method::post, "/v1/jobs", post_jobs, Route::enqueue | Route::may_wait, 0,
       0, weight_of_jobs},
      {Method::get, "/v1/jobs", list_jobs, 0, 0, kListWeight},
      {Method::get, "/v1/jobs/{}", get_job, 0, 0, kJobWeight, weight_of_job},
      {Method::post, "/v1/jobs/cancel", not_built},
      {Method::post, "/v1/jobs/retry", not_built},
      {Method::post, "/v1/jobs/delete", not_built},
      {Method::post, "/v1/jobs/{}/cancel", cancel_job},
      {Method::post, "/v1/jobs/{}/retry", retry_job},
      {Method::post, "/v1/jobs/{}/unblock", unblock_job},
      {Method::post, "/enqueue", post_enqueue, Route::enqueue | Route::plain},
      {Method::post, "/run_sync", post_run_sync, Route::enqueue | Route::waits},
  };
  return kRows;
}

}  // namespace machina
