// The verbs about single jobs: enqueue, get, list, logs, cancel, retry,
// unblock.

#include <pwd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <thread>

#include "queue/base/utf8.h"
#include "server/auth/signature.h"
#include "tools/cli/cli.h"
#include "tools/cli/show.h"

namespace machina::cli {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

std::string ran_for(const Json& job) {
  std::int64_t from = parse_time_ms(text_of(job, "started_at"));
  std::int64_t to = parse_time_ms(text_of(job, "finished_at"));
  return from < 0 || to < 0 ? "" : readable_ms(to - from);
}

std::string error_line(const Json& job) {
  auto error = job.find("error");
  if (error == job.end() || !error->is_object()) return "";
  std::string message = text_of(*error, "message");
  return text_of(*error, "code") + (message.empty() ? "" : ": " + message);
}

void show_job(const Json& job) {
  show_line("job", text_of(job, "id"));
  // Of a job that is past its retention not all is known.
  const bool gone = job.value("past_retention", false);
  show_line("kind", text_of(job, "kind") + "  (queue " + text_of(job, "queue") +
                        (gone ? "" : ", priority " + text_of(job, "priority")) +
                        ")");
  std::string state = text_of(job, "state");
  if (job.value("cancel_requested", false) && !is_final(state)) {
    state += ", cancel requested";
  }
  if (job.value("waiting_for_level", false)) {
    state += ", no worker is at its isolation level";
  }
  if (const std::string why = job.value("waiting_reason", ""); !why.empty()) {
    state += ", no worker can run it: " + why;
  }
  if (job.value("waiting_for_concurrency", false)) {
    state += ", others with its concurrency key run";
  }
  if (job.contains("served") && !job.value("served", true)) {
    state += ", no worker that is connected serves its kind";
  }
  if (job.value("duplicate", false)) {
    state += gone ? "  (it was there already, and is past its retention)"
                  : "  (it was there already)";
  }
  show_line("state", state);
  show_line("error", error_line(job));
  show_line("attempt", text_of(job, "attempt") +
                           (gone ? "" : " of " + text_of(job, "max_attempts")));
  for (auto [label, member] : {std::pair{"created", "created_at"},
                               {"runs at", "run_at"},
                               {"started", "started_at"},
                               {"finished", "finished_at"}}) {
    std::string at = text_of(job, member);
    if (!at.empty()) show_line(label, readable_time(at));
  }
  show_line("ran for", ran_for(job));
  show_line("durability", text_of(job, "durability"));
  if (auto isolation = job.find("isolation");
      isolation != job.end() && isolation->is_object()) {
    show_line("isolation", text_of(*isolation, "level") + " of " +
                               text_of(*isolation, "requested") +
                               " asked for, by " +
                               text_of(*isolation, "provider"));
  }
  show_line("worker", text_of(job, "worker"));
  show_line("request", text_of(job, "request_id"));
  for (const char* member :
       {"progress", "blocked", "labels", "dedup_key", "depends_on", "usage"}) {
    auto found = job.find(member);
    if (found == job.end() || found->empty()) continue;
    show_line(member, text_of(job, member));
  }
  for (const char* member : {"payload", "result"}) {
    auto found = job.find(member);
    if (found == job.end() || found->is_null()) continue;
    std::cout << member << "\n" << harmless(found->dump(2)) << "\n";
  }
}

// Prints an answer that is a job. False when it is not one.
bool show_answer(const Settings& settings, const std::string& body, Json* job) {
  *job = Json::parse(body, nullptr, false);
  if (!job->is_object()) {
    fail(kRefused, "the answer is not a job");
    return false;
  }
  if (settings.json) {
    std::cout << harmless_json(job->dump()) << "\n";
  } else {
    show_job(*job);
  }
  return true;
}

// What the server takes.
constexpr std::int64_t kDelayMsMax = 3650LL * 86'400'000;
constexpr std::int64_t kTimeoutMsMax = 7LL * 86'400'000;

// --- enqueue ---------------------------------------------------------------

struct EnqueueOptions {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  std::string kind, payload = "{}", queue, dedup_key, run_at, min_level;
  std::string concurrency_key;
  int priority = -1, max_attempts = -1;
  int concurrency_limit = -1;
  std::int64_t delay_ms = -1, timeout_ms = -1;
  std::vector<std::string> depends_on, labels;
  bool wait = false, quiet = false;
  std::int64_t wait_ms = 86'400'000;
};

// The request's body. The payload goes in as it was written: the server is to
// see its duplicate keys and long numbers, not this parser's view of them.
Result<std::string> enqueue_body(const EnqueueOptions& options) {
  auto payload = read_argument("--payload", options.payload);
  if (!payload) return payload;
  if (!Json::accept(*payload)) {
    return Error{Code::invalid, "--payload: not JSON (@FILE reads a file)"};
  }
  Json body = {{"kind", options.kind}};
  if (!options.queue.empty()) body["queue"] = options.queue;
  if (!options.dedup_key.empty()) body["dedup_key"] = options.dedup_key;
  if (!options.concurrency_key.empty()) {
    body["concurrency_key"] = options.concurrency_key;
  }
  if (options.concurrency_limit >= 0) {
    body["concurrency_limit"] = options.concurrency_limit;
  }
  if (!options.run_at.empty()) body["run_at"] = options.run_at;
  if (options.priority >= 0) body["priority"] = options.priority;
  if (options.delay_ms >= 0) body["delay_ms"] = options.delay_ms;
  if (options.max_attempts >= 0) body["max_attempts"] = options.max_attempts;
  if (options.timeout_ms >= 0) body["timeout_ms"] = options.timeout_ms;
  if (!options.depends_on.empty()) body["depends_on"] = options.depends_on;
  if (!options.min_level.empty()) {
    body["sandbox"] = {{"min_level", options.min_level}};
  }
  for (const auto& label : options.labels) {
    std::size_t equals = label.find('=');
    if (equals == std::string::npos) {
      return Error{Code::invalid, "--label: \"" + label + "\" must be K=V"};
    }
    body["labels"][label.substr(0, equals)] = label.substr(equals + 1);
  }
  std::string text = body.dump();
  text.pop_back();
  return text + ",\"payload\":" + *payload + "}";
}

int enqueue(EnqueueOptions options) {
  int exit = kOk;
  for (std::string& id : options.depends_on) {
    if (!resolve_id(*options.settings, false, &id, &exit)) return exit;
  }
  auto body = enqueue_body(options);
  if (!body) return fail(kUsage, body.error().what);
  Client::Request request;
  request.method = "POST";
  request.path = "/v1/jobs";
  request.body = *body;
  Asked asked = ask(*options.settings, request, &exit);
  if (!asked.ok) return exit;
  std::string last = asked.answer.body;
  Json job = Json::parse(last, nullptr, false);
  if (!job.is_object()) return fail(kRefused, "the answer is not a job");
  warn_not_served(job);
  // At once, so that who waits can look at it meanwhile.
  if (options.quiet) std::cout << text_of(job, "id") << std::endl;
  if (options.wait && !is_final(text_of(job, "state"))) {
    auto deadline = steady_clock::now() + milliseconds(options.wait_ms);
    exit = wait_for_end(*options.settings, text_of(job, "id"), deadline, &last);
    if (exit != kOk) return exit;
  }
  if (options.quiet) {
    job = Json::parse(last, nullptr, false);
  } else if (!show_answer(*options.settings, last, &job)) {
    return kRefused;
  }
  if (!options.wait) return kOk;
  if (!is_final(text_of(job, "state"))) {
    return fail(kNotSucceeded,
                "it has not ended within " + readable_ms(options.wait_ms) +
                    " and is " + text_of(job, "state") +
                    " still; machina get " + text_of(job, "id") +
                    " shows it later" +
                    (text_of(job, "state") == "ready"
                         ? "; does a worker serve this kind? (machina stats)"
                         : ""));
  }
  return text_of(job, "state") == "succeeded" ? kOk : kNotSucceeded;
}

void add_enqueue(Verb& app) {
  auto options = std::make_shared<EnqueueOptions>();
  Verb verb = app.add_verb("enqueue", "Submit a job");
  verb.add_option("kind", options->kind, "such as test.run").required();
  verb.add_option("--payload", options->payload, "JSON, @FILE, or @- (stdin)");
  verb.add_option("--queue", options->queue, "default: default");
  verb.add_option("--priority", options->priority, "0..9, 9 first").range(0, 9);
  add_duration(
      verb, "--delay-ms,--delay", 0, kDelayMsMax, "ms",
      [options](std::int64_t ms) { options->delay_ms = ms; },
      "not before so long");
  verb.add_option("--run-at", options->run_at, "RFC 3339 UTC");
  verb.add_option("--max-attempts", options->max_attempts, "default: 5")
      .range(1, 1000);
  add_duration(
      verb, "--timeout-ms,--timeout", 1, kTimeoutMsMax, "ms",
      [options](std::int64_t ms) { options->timeout_ms = ms; },
      "of an attempt; default: its kind's");
  verb.add_option("--dedup-key", options->dedup_key,
                  "the same key again is the same job");
  verb.add_option("--concurrency-key", options->concurrency_key,
                  "at most so many of its jobs run at a time");
  verb.add_option("--concurrency-limit", options->concurrency_limit,
                  "how many (1)")
      .range(1, 10'000);
  verb.add_option("--depends-on", options->depends_on,
                  "ids of jobs, or parts of them that no other has");
  verb.add_option("--label", options->labels, "K=V");
  verb.add_option("--min-level", options->min_level, "L0..L4");
  verb.add_flag("--wait", options->wait,
                "wait for its end; exit 1 unless it succeeded");
  add_duration(
      verb, "--wait-s", 1000, 10'000'000'000, "s",
      [options](std::int64_t ms) { options->wait_ms = ms; },
      "how long --wait waits (86400)");
  verb.add_flag("-q,--quiet", options->quiet, "print the id only");
  add_client_settings(verb, options->settings);
  verb.run([options] { return enqueue(*options); });
}

// --- get, cancel, retry, unblock -------------------------------------------

constexpr char kIdHelp[] =
    "the job's id, or a part of it from its beginning or end that no other has";

struct JobOptions {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  std::string id;
  bool ignore_dependencies = false;  // retry
  // unblock
  std::string token, input, actor, digest, comment;
  bool approve = false, deny = false;
};

int one_job(const JobOptions& options, const std::string& method,
            const std::string& action, const std::string& body) {
  int exit = kOk;
  std::string id = options.id;
  if (!resolve_id(*options.settings, false, &id, &exit)) return exit;
  Client::Request request;
  request.method = method;
  request.path = "/v1/jobs/" + url_escape(id) + action;
  request.body = body;
  Asked asked = ask(*options.settings, request, &exit);
  if (!asked.ok) return exit;
  Json job;
  return show_answer(*options.settings, asked.answer.body, &job) ? kOk
                                                                 : kRefused;
}

// The diff that the job carries, or that it names; empty: none can be shown.
std::string diff_of(const Settings& settings, const Json& job) {
  auto payload = job.find("payload");
  if (payload == job.end() || !payload->is_object()) return "";
  if (std::string diff = text_of(*payload, "diff"); !diff.empty()) return diff;
  const std::string from = text_of(*payload, "diff_artifact");
  const std::size_t slash = from.find('/');
  if (slash == std::string::npos) return "";
  Client::Request request;
  request.path = "/v1/jobs/" + url_escape(from.substr(0, slash)) +
                 "/artifacts/" + url_escape(from.substr(slash + 1));
  int exit = kOk;
  Asked asked = ask(settings, request, &exit);
  return asked.ok ? asked.answer.body : "";
}

void show_files(const Json& data) {
  auto files = data.find("files");
  if (files == data.end() || !files->is_array()) return;
  for (const auto& file : *files) {
    if (!file.is_object()) {
      show_line("file",
                file.is_string() ? file.get<std::string>() : file.dump());
      continue;
    }
    std::string line = text_of(file, "path");
    if (file.contains("added")) {
      line += "  +" + text_of(file, "added") + " -" + text_of(file, "removed");
    }
    show_line("file", line);
  }
  if (data.value("files_truncated", false)) {
    show_line("file", "... and more than can be listed");
  }
}

// What the job waits for, for whoever decides.
void show_block(const Settings& settings, const Json& job,
                const Json& blocked) {
  const std::string reason = text_of(blocked, "reason");
  show_line("job", text_of(job, "id"));
  show_line("blocked", reason);
  std::string deadline = text_of(blocked, "deadline_at");
  if (!deadline.empty()) show_line("until", readable_time(deadline));
  auto data = blocked.find("data");
  if (data == blocked.end() || data->is_null()) return;
  // A worker of any kind may ask in its own words.
  if (!data->is_object() || (reason != "approval" && reason != "conflict")) {
    std::cout << "data\n" << harmless(data->dump(2)) << "\n";
    return;
  }
  show_line("digest", text_of(*data, "digest"));
  show_line("base", text_of(*data, "base_commit"));
  show_line("branch", text_of(*data, "branch"));
  show_line("tip", text_of(*data, "tip"));
  auto conflicts = data->find("conflicts");
  if (conflicts != data->end() && conflicts->is_array()) {
    for (const auto& one : *conflicts) {
      show_line("conflict",
                text_of(one, "path") + ": " + text_of(one, "reason") +
                    (text_of(one, "merges") == "true"
                         ? ", and merges"
                         : ", and does not merge: mend the branch first"));
    }
    show_diff(text_of(*data, "diff"), "  ");
    if (data->value("diff_truncated", false)) {
      std::cout << "  ... and more than can be shown\n";
    }
  }
  show_files(*data);
  if (!text_of(job, "kind").starts_with("patch.")) {
    std::cout << "data\n" << harmless(data->dump(2)) << "\n";
    return;
  }
  if (reason == "conflict") return;
  const std::string diff = diff_of(settings, job);
  if (diff.empty()) return;
  std::cout << "diff\n";
  show_diff(diff, "  ");
  const HexDigest hex = Sha256::of(diff);
  if (text_of(*data, "digest") !=
      "sha256:" + std::string(hex.data(), hex.size())) {
    std::cerr << "machina: warning: the diff above is not the one with this "
                 "digest: compare the digest with what you were sent\n";
  }
}

std::string this_user() {
  passwd entry;
  passwd* found = nullptr;
  char buffer[4096];
  if (getpwuid_r(getuid(), &entry, buffer, sizeof(buffer), &found) != 0 ||
      found == nullptr) {
    return "uid " + std::to_string(getuid());
  }
  return found->pw_name;
}

// How to decide, with what was shown filled in.
std::string how_to_decide(const std::string& id, const Json& blocked,
                          bool approval) {
  if (!approval) return "--input JSON gives the job what it waits for";
  std::string digest;
  auto data = blocked.find("data");
  if (data != blocked.end() && data->is_object()) {
    digest = text_of(*data, "digest");
  }
  return "machina unblock " + id + " --approve" +
         (digest.empty() ? "" : " --digest " + digest) +
         ", or machina unblock " + id + " --deny";
}

// Shows what the job waits for; changes nothing. Who reads JSON gets what is to
// be decided, and what is missing.
int no_decision(const JobOptions& options, const Json& blocked, bool approval) {
  const bool merge = text_of(blocked, "reason") == "conflict";
  const std::string what =
      "job " + options.id +
      (merge      ? " waits with a conflict"
       : approval ? " waits for approval"
                  : " waits (" + text_of(blocked, "reason") + ")") +
      " and no decision was given: " +
      (approval ? "--approve or --deny" : "--input");
  if (options.settings->json) {
    const Json missing = {{"code", "decision-missing"},
                          {"detail", what},
                          {"field", approval ? "--approve" : "--input"},
                          {"id", options.id},
                          {"blocked", blocked}};
    std::cout << harmless_json(missing.dump()) << "\n";
  } else {
    show_line("to decide", how_to_decide(options.id, blocked, approval));
  }
  return fail(kUsage, what);
}

// The token belongs to this one block: what is decided about what is shown
// here cannot become a decision about something else. Without a decision
// (--approve, --deny or --input) nothing is sent.
int unblock_job(JobOptions options) {
  std::string token = options.token;
  Json input = nullptr;
  std::string raw_input;
  if (!options.input.empty()) {
    auto given = read_argument("--input", options.input);
    if (!given || !Json::accept(*given)) {
      return fail(kUsage, given ? "--input: not JSON" : given.error().what);
    }
    raw_input = *given;
  }
  const bool decided = options.approve || options.deny;
  if (!options.digest.empty() && !options.approve) {
    return fail(kUsage, "--digest: only with --approve");
  }
  if (!options.comment.empty() && !decided) {
    return fail(kUsage, "--comment: only with --approve or --deny");
  }
  int exit = kOk;
  if (!resolve_id(*options.settings, false, &options.id, &exit)) return exit;
  if (token.empty() || raw_input.empty()) {
    Client::Request request;
    request.path = "/v1/jobs/" + url_escape(options.id);
    Asked asked = ask(*options.settings, request, &exit);
    if (!asked.ok) return exit;
    Json job = Json::parse(asked.answer.body, nullptr, false);
    auto blocked = job.find("blocked");
    if (!job.is_object() || blocked == job.end() || !blocked->is_object()) {
      return fail(kRefused, "job " + options.id + " is not blocked: it is " +
                                text_of(job, "state"));
    }
    // A rollback that meets what changed since waits for a decision, too.
    const bool merge = text_of(*blocked, "reason") == "conflict" &&
                       text_of(job, "kind").starts_with("patch.");
    const bool approval = text_of(*blocked, "reason") == "approval" || merge;
    if (!options.settings->json) {
      show_block(*options.settings, job, *blocked);
    }
    if (decided && !approval) {
      return fail(kUsage, "the job does not wait for approval: use --input");
    }
    if (!decided && raw_input.empty()) {
      return no_decision(options, *blocked, approval);
    }
    if (token.empty()) token = text_of(*blocked, "token");
    if (decided) {
      input = {{"approve", options.approve}};
      auto data = blocked->find("data");
      std::string digest =
          options.digest.empty() && data != blocked->end() && data->is_object()
              ? text_of(*data, "digest")
              : options.digest;
      if (options.approve && !digest.empty()) input["digest"] = digest;
      if (!options.comment.empty()) input["comment"] = options.comment;
    }
  }
  Json body = {{"token", token},
               {"actor", options.actor.empty() ? this_user() : options.actor}};
  std::string text = body.dump();
  text.pop_back();
  text += ",\"input\":" + (raw_input.empty() ? input.dump() : raw_input) + "}";
  return one_job(options, "POST", "/unblock", text);
}

void add_unblock(Verb& app);

Verb job_verb(Verb app, const char* name, const char* help,
              std::shared_ptr<JobOptions> options) {
  Verb verb = app.add_verb(name, help);
  verb.add_option("id", options->id, kIdHelp).required();
  add_client_settings(verb, options->settings);
  return verb;
}

void add_simple_verbs(Verb& app) {
  auto get = std::make_shared<JobOptions>();
  job_verb(app, "get", "Show a job", get).run([get] {
    return one_job(*get, "GET", "", "");
  });
  auto cancel = std::make_shared<JobOptions>();
  job_verb(app, "cancel", "Cancel a job; a running one is stopped", cancel)
      .run([cancel] { return one_job(*cancel, "POST", "/cancel", "{}"); });
  auto retry = std::make_shared<JobOptions>();
  Verb again = job_verb(app, "retry",
                        "Run a failed, dead or cancelled job again", retry);
  again.add_flag("--ignore-dependencies", retry->ignore_dependencies,
                 "also where a job that it depends on did not succeed");
  again.run([retry] {
    return one_job(
        *retry, "POST", "/retry",
        retry->ignore_dependencies ? "{\"ignore_dependencies\":true}" : "{}");
  });
  add_unblock(app);
}

void add_unblock(Verb& app) {
  auto unblock = std::make_shared<JobOptions>();
  Verb verb =
      job_verb(app, "unblock",
               "Show what a blocked job waits for, or decide it", unblock);
  verb.add_flag("--approve", unblock->approve,
                "what a job that waits for approval asks for");
  verb.add_flag("--deny", unblock->deny, "say no to it")
      .excludes({"--approve"});
  verb.add_option("--digest", unblock->digest,
                  "approve only if this is what the job asks for");
  verb.add_option("--comment", unblock->comment, "why; kept with the patch");
  verb.add_option("--token", unblock->token,
                  "the job's blocked.token; looked up where it is left out");
  verb.add_option("--input", unblock->input, "JSON for the job, or @FILE")
      .excludes({"--approve", "--deny"});
  verb.add_option("--actor", unblock->actor,
                  "who decided (the user at this terminal)");
  verb.run([unblock] { return unblock_job(*unblock); });
}

// --- list ------------------------------------------------------------------

struct ListOptions {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  std::string state, kind, queue, since, until, cursor;
  std::vector<std::string> labels;
  int limit = 50;
};

std::string list_path(const ListOptions& options) {
  std::string path = "/v1/jobs?";
  auto add = [&](const std::string& name, const std::string& value) {
    if (value.empty()) return;
    path += (path.ends_with('?') ? "" : "&") + name + "=" + url_escape(value);
  };
  add("state", options.state);
  add("kind", options.kind);
  add("queue", options.queue);
  add("since", options.since);
  add("until", options.until);
  for (const auto& label : options.labels) {
    std::size_t equals = std::min(label.find('='), label.size());
    add("label." + label.substr(0, equals),
        label.substr(std::min(equals + 1, label.size())));
  }
  if (path.ends_with('?')) path.pop_back();
  return path;
}

// The options that say which jobs, as they were given.
std::string list_options(const ListOptions& options) {
  std::string again;
  auto add = [&](const char* name, const std::string& value) {
    if (!value.empty()) again += std::string(" --") + name + " " + value;
  };
  add("state", options.state);
  add("kind", options.kind);
  add("queue", options.queue);
  add("since", options.since);
  add("until", options.until);
  for (const auto& label : options.labels) add("label", label);
  if (options.limit != 50) add("limit", std::to_string(options.limit));
  return again;
}

int list(const ListOptions& options) {
  int exit = kOk;
  for (const auto& label : options.labels) {
    const std::size_t equals = label.find('=');
    if (equals == std::string::npos || equals == 0) {
      return fail(kUsage, "--label: \"" + harmless(label) + "\" must be K=V");
    }
  }
  Json page;
  if (!fetch_pages(*options.settings, list_path(options), "jobs", options.limit,
                   options.cursor, &page, &exit)) {
    return exit;
  }
  if (options.settings->json) {
    std::cout << harmless_json(page.dump()) << "\n";
    return kOk;
  }
  Table table({"JOB", "KIND", "STATE", "ATTEMPT", "CREATED", "RAN FOR", "WHY"});
  for (const auto& job : page["jobs"]) {
    table.add({text_of(job, "id"), text_of(job, "kind"), text_of(job, "state"),
               text_of(job, "attempt") + "/" + text_of(job, "max_attempts"),
               readable_clock(text_of(job, "created_at")), ran_for(job),
               first_line(error_line(job), 60)});
  }
  std::cout << table.text();
  std::string cursor = text_of(page, "cursor");
  if (!cursor.empty()) {
    std::cout << "there is more: machina list"
              << harmless(list_options(options)) << " --cursor "
              << harmless(cursor) << "\n";
  }
  return kOk;
}

void add_list(Verb& app) {
  auto options = std::make_shared<ListOptions>();
  Verb verb = app.add_verb("list", "List jobs");
  verb.add_option("--state", options->state, "such as ready or failed");
  verb.add_option("--kind", options->kind, "such as test.run");
  verb.add_option("--queue", options->queue, "of this queue");
  verb.add_option("--label", options->labels, "K=V");
  verb.add_option("--since", options->since, "created since, RFC 3339");
  verb.add_option("--until", options->until, "created until, RFC 3339");
  verb.add_option("--limit", options->limit, "jobs that are shown (50)")
      .range(1, 1000);
  verb.add_option("--cursor", options->cursor, "of the page before");
  add_client_settings(verb, options->settings);
  verb.run([options] { return list(*options); });
}

// --- logs ------------------------------------------------------------------

struct LogOptions {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  std::string id;
  int attempt = 0;
  bool follow = false;
};

// What a job printed may hold anything: a terminal gets it harmless, a pipe
// gets it as it is.
void write_log(const std::string& text) {
  std::cout << (::isatty(STDOUT_FILENO) != 0 ? harmless(text) : text)
            << std::flush;
}

int logs(const LogOptions& options) {
  int exit = kOk;
  std::string id = options.id;
  if (!resolve_id(*options.settings, false, &id, &exit)) return exit;
  Client::Request request;
  request.path = "/v1/jobs/" + url_escape(id) + "/logs";
  if (options.attempt > 0) {
    request.path += "?attempt=" + std::to_string(options.attempt);
  }
  Client::Request state;
  state.path = "/v1/jobs/" + url_escape(id);
  std::size_t shown = 0;
  for (bool last = !options.follow;;) {
    // The state first: what is logged before the end is then in the log.
    if (!last) {
      Asked job = ask(*options.settings, state, &exit);
      if (!job.ok) return exit;
      Json view = Json::parse(job.answer.body, nullptr, false);
      last = !view.is_object() || is_final(text_of(view, "state"));
    }
    Asked log = ask(*options.settings, request, &exit);
    if (!log.ok) return exit;
    if (options.settings->json) {
      if (last) {
        const Json whole = {{"id", id}, {"log", log.answer.body}};
        std::cout << harmless_json(whole.dump(-1, ' ', false,
                                              Json::error_handler_t::replace))
                  << "\n";
      }
    } else if (log.answer.body.size() > shown) {
      // The rest of a character may come with the next look.
      const std::size_t end = last ? log.answer.body.size()
                                   : utf8_whole_end(log.answer.body).size();
      if (end > shown) write_log(log.answer.body.substr(shown, end - shown));
      shown = std::max(shown, end);
    }
    if (last) return kOk;
    std::this_thread::sleep_for(milliseconds(500));
  }
}

void add_logs(Verb& app) {
  auto options = std::make_shared<LogOptions>();
  Verb verb = app.add_verb("logs", "Print what a job printed");
  verb.add_option("id", options->id, kIdHelp).required();
  verb.add_option("--attempt", options->attempt, "default: the last")
      .range(1, 1 << 30);
  verb.add_flag("-f,--follow", options->follow, "until the job has ended");
  add_client_settings(verb, options->settings);
  verb.run([options] { return logs(*options); });
}

}  // namespace

void add_job_verbs(Verb& app) {
  add_enqueue(app);
  add_list(app);
  add_simple_verbs(app);
  add_logs(app);
}

}  // namespace machina::cli
