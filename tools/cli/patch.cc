// patch submit and patch show: one patch, from a diff to its verdict. What
// became of all patches is asked with `machina patches` (patches.cc).

#include <algorithm>
#include <filesystem>
#include <functional>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "tools/cli/cli.h"
#include "tools/cli/show.h"

namespace machina::cli {
namespace {

namespace fs = std::filesystem;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr std::size_t kCasesShown = 50;

struct SubmitOptions {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  std::string file, repo = ".", base, test, report, branch, author, description;
  std::string parent, dedup_key, min_level, approval = "auto";
  std::vector<std::string> setup;
  bool push = false, no_baseline = false, no_wait = false, all = false;
  std::int64_t timeout_ms = -1, wait_ms = 86'400'000;
};

// --- a command line in one text ---------------------------------------------

// The words of `text` as a shell would split them. Nothing where it needs a
// shell (a pipe, a variable, a pattern ...) or a quote is not closed.
std::optional<std::vector<std::string>> words_of(const std::string& text) {
  std::vector<std::string> words;
  std::string word;
  bool open = false;  // a word has begun, and may be empty
  char quote = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quote == '\'') {
      if (c == quote) {
        quote = 0;
      } else {
        word += c;
      }
    } else if (c == '\\') {
      if (++i == text.size()) return std::nullopt;
      open = true;
      // Within "..." a backslash means itself but before these.
      if (quote != 0 &&
          std::string_view("\"\\$`").find(text[i]) == std::string_view::npos) {
        word += c;
      }
      word += text[i];
    } else if (quote == '"') {
      if (c == '$' || c == '`') return std::nullopt;
      if (c == quote) {
        quote = 0;
      } else {
        word += c;
      }
    } else if (c == '\'' || c == '"') {
      quote = c;
      open = true;
    } else if (c == ' ' || c == '\t') {
      if (open) words.push_back(std::move(word));
      word.clear();
      open = false;
    } else if (std::string_view("|&;<>()$`*?~#{}[]!\n").find(c) !=
               std::string_view::npos) {
      // pytest's own names of cases have brackets; nothing is expanded there.
      if (c != '[' && c != ']') return std::nullopt;
      word += c;
      open = true;
    } else {
      word += c;
      open = true;
    }
  }
  if (quote != 0) return std::nullopt;
  if (open) words.push_back(std::move(word));
  return words;
}

std::vector<std::string> command_of(const std::string& text) {
  auto words = words_of(text);
  if (words && !words->empty()) return std::move(*words);
  return {"sh", "-c", text};
}

bool is_assignment(const std::string& word) {
  const std::size_t equals = word.find('=');
  if (equals == 0 || equals == std::string::npos) return false;
  return std::all_of(word.begin(),
                     word.begin() + static_cast<std::ptrdiff_t>(equals),
                     [](unsigned char c) {
                       return std::isalnum(c) != 0 || c == '_';
                     }) &&
         std::isdigit(static_cast<unsigned char>(word[0])) == 0;
}

std::string base_name(const std::string& path) {
  return path.substr(path.rfind('/') + 1);
}

// The runner of test.run that this command line is, and how many of its words
// name the runner. `command`: any other program.
std::pair<std::string, std::size_t> runner_of(
    const std::vector<std::string>& words) {
  const std::string program = base_name(words.front());
  if (program == "pytest" || program == "pytest-3" || program == "py.test") {
    return {"pytest", 1};
  }
  if (program == "ctest") return {"ctest", 1};
  if (words.size() < 2) return {"command", 0};
  if (program == "node" && words[1] == "--test") return {"node", 2};
  if (program.starts_with("python") && words[1] == "-m" && words.size() > 2 &&
      (words[2] == "pytest" || words[2] == "unittest")) {
    return {words[2], 3};
  }
  return {"command", 0};
}

// The member `test` for a command line: the cases of a runner that is known,
// of another program those of --report, or one case by its exit code.
Result<Json> test_of(const SubmitOptions& options) {
  auto text = read_argument("--test", options.test);
  if (!text) return text.error();
  if (text->find_first_not_of(" \t\r\n") == std::string::npos) {
    return Error{Code::invalid,
                 "--test: it is empty; name what runs the tests, such as "
                 "'pytest -q', or leave the option out"};
  }
  Json test = Json::object();
  if (text->front() == '{') {
    test = Json::parse(*text, nullptr, false);
    if (!test.is_object()) return Error{Code::invalid, "--test: not JSON"};
  } else {
    std::vector<std::string> words = command_of(*text);
    while (words.size() > 1 && is_assignment(words.front())) {
      const std::size_t equals = words.front().find('=');
      test["env"][words.front().substr(0, equals)] =
          words.front().substr(equals + 1);
      words.erase(words.begin());
    }
    auto [runner, skipped] = runner_of(words);
    if (!options.report.empty()) runner = "command";
    if (options.report == "tap") runner = "tap";
    test["runner"] = runner;
    if (runner == "command" || runner == "tap") {
      test["command"] = words;
    } else if (words.size() > skipped) {
      words.erase(words.begin(),
                  words.begin() + static_cast<std::ptrdiff_t>(skipped));
      test["args"] = words;
    }
  }
  if (!options.report.empty() && options.report != "tap") {
    const std::size_t colon = options.report.find(':');
    if (colon == std::string::npos || colon == 0 ||
        colon + 1 == options.report.size()) {
      return Error{Code::invalid, "--report: \"" + options.report +
                                      "\" must be FORMAT:PATH, such as "
                                      "junit:report.xml, or tap, for TAP on "
                                      "standard output"};
    }
    test["report"] = {{"format", options.report.substr(0, colon)},
                      {"path", options.report.substr(colon + 1)}};
  }
  for (const auto& command : options.setup) {
    test["setup"].push_back(command_of(command));
  }
  return test;
}

// A path means this machine's repository that it lies in; anything else is a
// name that the server knows.
Result<std::string> repository_of(const std::string& given) {
  if (given.empty()) return Error{Code::invalid, "--repo: it is empty"};
  if (given[0] != '/' && given[0] != '.') return given;
  std::error_code error;
  const fs::path from = fs::canonical(given, error);
  if (error) {
    // The server may be on another machine.
    if (given[0] == '/') return given;
    return Error{Code::invalid, "--repo: " + given + ": " + error.message()};
  }
  for (fs::path at = from;; at = at.parent_path()) {
    const bool bare = fs::is_regular_file(at / "HEAD", error) &&
                      fs::is_directory(at / "objects", error);
    if (bare || fs::exists(at / ".git", error)) return at.string();
    if (at == at.root_path()) break;
  }
  return Error{
      Code::invalid,
      "--repo: there is no git repository at or above " + from.string()};
}

Result<Json> job_of(const SubmitOptions& options) {
  if (options.file == "-" && options.test == "@-") {
    return Error{Code::invalid,
                 "--test: standard input is the diff already (FILE is -)"};
  }
  auto diff = read_bounded("FILE", options.file);
  if (!diff) return diff.error();
  if (diff->empty()) {
    return Error{Code::invalid,
                 "FILE: the diff is empty: there is nothing to submit"};
  }
  try {
    (void)Json(*diff).dump();
  } catch (const Json::exception&) {
    return Error{Code::invalid,
                 "FILE: the diff is not UTF-8; a file in another encoding "
                 "cannot be part of a patch"};
  }
  auto repo = repository_of(options.repo);
  if (!repo) return repo.error();
  Json payload = {{"repo", *repo}, {"diff", std::move(*diff)}};
  const auto put = [&](const char* name, const std::string& value) {
    if (!value.empty()) payload[name] = value;
  };
  put("base_rev", options.base);
  put("branch", options.branch);
  put("author", options.author);
  put("description", options.description);
  put("parent_patch_id", options.parent);
  if (options.approval != "auto") payload["approval"] = options.approval;
  if (options.push) payload["push"] = true;
  if (options.no_baseline) payload["baseline"] = false;
  if (!options.test.empty()) {
    auto test = test_of(options);
    if (!test) return test.error();
    payload["test"] = std::move(*test);
  } else if (!options.setup.empty() || !options.report.empty()) {
    return Error{Code::invalid, "--setup, --report: only with --test"};
  }
  Json job = {{"kind", "patch.apply"}, {"payload", std::move(payload)}};
  if (!options.dedup_key.empty()) job["dedup_key"] = options.dedup_key;
  if (options.timeout_ms > 0) job["timeout_ms"] = options.timeout_ms;
  if (!options.min_level.empty()) {
    job["sandbox"] = {{"min_level", options.min_level}};
  }
  return job;
}

// --- the verdict -------------------------------------------------------------

// Outcomes by "id", or "id#2" for the second of that id, as the lists of the
// verdict name them. The cases' own order says nothing: failures come first.
using Cases = std::map<std::string, std::string>;

Cases cases_of(const Json& tests, const char* when,
               const std::function<void(const std::string&)>& seen) {
  Cases cases;
  auto run = tests.find(when);
  if (run == tests.end() || !run->is_object()) return cases;
  for (const auto& one : run->value("cases", Json::array())) {
    if (!one.is_object()) continue;
    const std::string nth = text_of(one, "nth");
    const std::string key =
        text_of(one, "id") + (nth.empty() || nth == "1" ? "" : "#" + nth);
    cases.emplace(key, text_of(one, "outcome"));
    seen(key);
  }
  return cases;
}

void show_cases(const Json& tests, bool all) {
  std::vector<std::string> order;
  std::set<std::string> known;
  const auto seen = [&](const std::string& key) {
    if (known.insert(key).second) order.push_back(key);
  };
  const Cases after = cases_of(tests, "after", seen);
  const Cases before = cases_of(tests, "before", seen);
  std::map<std::string, std::string> notes;
  for (auto [member, note] : {std::pair{"newly_failing", "fails newly"},
                              {"newly_passing", "passes now"},
                              {"failing_again", "fails as before the patch"},
                              {"missing", "missing"}}) {
    for (const auto& one : tests.value(member, Json::array())) {
      const std::string key =
          one.is_string() ? one.get<std::string>() : text_of(one, "id");
      notes.emplace(key, note);
      seen(key);
    }
  }
  if (order.empty()) return;
  const auto at = [](const Cases& cases, const std::string& key) {
    auto found = cases.find(key);
    return found == cases.end() ? std::string("-") : found->second;
  };
  const auto plain = [&](const std::string& key) {
    return at(after, key) == "passed" && notes.count(key) == 0;
  };
  // What decides the verdict first.
  std::stable_sort(order.begin(), order.end(),
                   [&](const auto& a, const auto& b) {
                     return std::pair(notes.count(a) == 0, plain(a)) <
                            std::pair(notes.count(b) == 0, plain(b));
                   });
  Table table({"CASE", "BEFORE", "AFTER", "WHAT"});
  std::size_t shown = 0;
  for (const auto& key : order) {
    if (!all && shown == kCasesShown) break;
    auto note = notes.find(key);
    table.add({key, at(before, key), at(after, key),
               note == notes.end() ? "" : note->second});
    ++shown;
  }
  std::cout << "\n" << table.text();
  if (shown < order.size()) {
    std::cout << "and " << order.size() - shown
              << " more cases (--all shows them)\n";
  }
  for (const char* when : {"before", "after"}) {
    auto run = tests.find(when);
    if (run != tests.end() && run->is_object() &&
        run->value("cases_truncated", false)) {
      std::cout << "of the run " << when
                << " the patch some cases are counted only\n";
    }
  }
}

void show_verdict(const Json& job, bool all) {
  const Json result = job.value("result", Json());
  const std::string state = text_of(job, "state");
  show_line("patch", text_of(job, "id"));
  std::string verdict = result.is_object() ? text_of(result, "outcome") : "";
  show_line("verdict",
            (verdict.empty() ? "none yet" : verdict) + "  (job " + state + ")");
  if (!result.is_object()) {
    auto progress = job.find("progress");
    if (progress != job.end() && progress->is_object()) {
      show_line("progress", text_of(*progress, "percent") + " % " +
                                text_of(*progress, "message"));
    }
    auto error = job.find("error");
    if (error != job.end() && error->is_object()) {
      show_line("error",
                text_of(*error, "code") + ": " + text_of(*error, "message"));
    }
    if (state == "blocked") {
      show_line("to decide", "machina unblock " + text_of(job, "id"));
    }
    return;
  }
  for (auto [label, member] : {std::pair{"reason", "reason"},
                               {"base", "base_commit"},
                               {"branch", "branch"},
                               {"commit", "commit"},
                               {"diff", "diff_digest"}}) {
    show_line(label, text_of(result, member));
  }
  if (!text_of(result, "branch").empty() &&
      !text_of(result, "commit").empty()) {
    show_line("pushed", result.value("pushed", false)
                            ? "yes"
                            : "no; the branch is in the artifact patch.bundle");
  }
  for (const auto& one : result.value("conflicts", Json::array())) {
    const std::string hunk = text_of(one, "hunk");
    show_line("conflict", text_of(one, "path") +
                              (hunk.empty() ? "" : ", hunk " + hunk) + ": " +
                              text_of(one, "reason"));
  }
  for (const auto& file : result.value("files", Json::array())) {
    show_line("file", text_of(file, "path") + "  +" + text_of(file, "added") +
                          " -" + text_of(file, "removed"));
  }
  auto tests = result.find("tests");
  if (tests == result.end() || !tests->is_object()) return;
  for (auto [label, when] :
       {std::pair{"tests before", "before"}, {"tests after", "after"}}) {
    auto run = tests->find(when);
    if (run == tests->end() || !run->is_object()) continue;
    const std::string problem = text_of(*run, "problem");
    show_line(label, counts_of(*run) + (problem.empty() ? "" : "; " + problem));
  }
  show_cases(*tests, all);
}

// How a patch goes on, on standard error: each step once.
class Steps {
 public:
  bool operator()(const Json& job) {
    const std::string state = text_of(job, "state");
    std::string step = state;
    auto progress = job.find("progress");
    if (state == "running" && progress != job.end() && progress->is_object()) {
      step =
          text_of(*progress, "percent") + " % " + text_of(*progress, "message");
    }
    if (state == "blocked") {
      step = "it waits for a decision: machina unblock " + text_of(job, "id");
    }
    if (job.value("waiting_for_concurrency", false)) {
      step += ", behind another patch of this repository";
    }
    if (step != last_) std::cerr << "machina: " << harmless(step) << "\n";
    last_ = step;
    return true;
  }

 private:
  std::string last_;
};

int show_end(const Settings& settings, const std::string& body, bool all,
             Json* job) {
  *job = Json::parse(body, nullptr, false);
  if (!job->is_object()) return fail(kRefused, "the answer is not a job");
  if (settings.json) {
    std::cout << harmless_json(job->dump()) << "\n";
  } else {
    show_verdict(*job, all);
  }
  return kOk;
}

int follow(const Settings& settings, const std::string& id,
           std::int64_t wait_ms, bool all, std::string last) {
  const auto deadline = steady_clock::now() + milliseconds(wait_ms);
  int exit = wait_for_end(settings, id, deadline, &last, Steps());
  if (exit != kOk) return exit;
  Json job;
  if (int shown = show_end(settings, last, all, &job); shown != kOk) {
    return shown;
  }
  const std::string state = text_of(job, "state");
  if (!is_final(state)) {
    return fail(kNotSucceeded, "it has not ended within " +
                                   readable_ms(wait_ms) + " and is " + state +
                                   " still; machina patch show " + id +
                                   " --follow goes on");
  }
  return state == "succeeded" ? kOk : kNotSucceeded;
}

int submit(SubmitOptions options) {
  int exit = kOk;
  if (!resolve_id(*options.settings, true, &options.parent, &exit)) return exit;
  auto body = job_of(options);
  if (!body) return fail(kUsage, body.error().what);
  Client::Request request;
  request.method = "POST";
  request.path = "/v1/jobs";
  request.body = body->dump();
  Asked asked = ask(*options.settings, request, &exit);
  if (!asked.ok) return exit;
  const Json job = Json::parse(asked.answer.body, nullptr, false);
  if (!job.is_object()) return fail(kRefused, "the answer is not a job");
  const std::string id = text_of(job, "id");
  warn_not_served(job);
  if (options.no_wait) {
    std::cout << (options.settings->json ? harmless_json(job.dump()) : id)
              << "\n";
    return kOk;
  }
  std::cerr << "machina: patch " << harmless(id)
            << (job.value("duplicate", false) ? " was submitted already\n"
                                              : " is submitted\n");
  return follow(*options.settings, id, options.wait_ms, options.all,
                asked.answer.body);
}

// --- show
// ----------------------------------------------------------------------

struct ShowOptions {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  std::string id;
  bool follow = false, all = false;
  std::int64_t wait_ms = 86'400'000;
};

int show(ShowOptions options) {
  const Settings& settings = *options.settings;
  int exit = kOk;
  bool none = false;
  if (!resolve_id(settings, false, &options.id, &exit, &none)) return exit;
  // The job may be past its retention, and the patch is kept on.
  if (none && !resolve_id(settings, true, &options.id, &exit)) return exit;
  auto config = load(settings);
  if (!config) return kUsage;
  auto client = Client::open(*config);
  if (!client) return fail(kUsage, client.error().what);
  Client::Request request;
  request.path = "/v1/jobs/" + url_escape(options.id);
  auto answer = (*client)->call(request);
  if (answer && answer->status == 404) {
    return show_patch_record(settings, options.id);
  }
  Asked asked = ask(settings, request, &exit);
  if (!asked.ok) return exit;
  const Json job = Json::parse(asked.answer.body, nullptr, false);
  if (job.is_object() && !text_of(job, "kind").starts_with("patch.")) {
    return fail(kUsage, "job " + options.id + " is no patch but a " +
                            text_of(job, "kind") + "; machina get shows it");
  }
  if (options.follow) {
    return follow(settings, options.id, options.wait_ms, options.all,
                  asked.answer.body);
  }
  Json shown;
  return show_end(settings, asked.answer.body, options.all, &shown);
}

void add_wait_s(Verb verb, std::function<void(std::int64_t)> take) {
  add_duration(verb, "--wait-s", 1000, 10'000'000'000, "s", std::move(take),
               "how long to wait for the verdict (86400)");
}

}  // namespace

void add_patch_submit(Verb& app) {
  Verb patch = app.add_verb(
      "patch", "One patch, from a diff to its verdict (patches: all of them)");
  patch.require_verb();

  auto given = std::make_shared<SubmitOptions>();
  Verb verb = patch.add_verb("submit",
                             "Submit a diff, follow it, and print the verdict");
  verb.add_option("file", given->file, "the unified diff; - is standard input")
      .required();
  verb.add_option("--repo", given->repo,
                  "a path in the repository (this directory), or a name "
                  "below a repository root");
  verb.add_option("--test", given->test,
                  "what runs the tests, such as 'pytest -q'; or the member "
                  "test of patch.apply as JSON or @FILE; without it none run")
      .shown_as("COMMAND");
  verb.add_option("--report", given->report,
                  "where another command leaves its cases: junit:PATH, "
                  "tap:PATH, or tap for its standard output")
      .shown_as("FORMAT:PATH");
  verb.add_option("--setup", given->setup, "a command to run before; several")
      .shown_as("COMMAND");
  verb.add_option("--base", given->base, "the commit the diff is for (HEAD)");
  verb.add_option("--branch", given->branch, "default: review/<patch id>");
  verb.add_flag("--push", given->push, "make the branch in the repository");
  verb.add_flag("--no-baseline", given->no_baseline,
                "do not run the tests before: all must pass after");
  verb.add_option("--approval", given->approval, "auto or required")
      .one_of({"auto", "required"});
  verb.add_option("--author", given->author, "\"Name <email>\"");
  verb.add_option("-m,--description", given->description,
                  "the commit's message");
  verb.add_option("--parent", given->parent, "the patch this one builds on");
  verb.add_option("--dedup-key", given->dedup_key,
                  "the same key again is the same patch");
  verb.add_option("--min-level", given->min_level, "L0..L4");
  add_duration(
      verb, "--timeout-ms,--timeout", 1, 604'800'000, "ms",
      [given](std::int64_t ms) { given->timeout_ms = ms; },
      "of an attempt (300 s)");
  verb.add_flag("--no-wait", given->no_wait, "print the id and do not follow");
  add_wait_s(verb, [given](std::int64_t ms) { given->wait_ms = ms; });
  verb.add_flag("--all", given->all, "show all cases");
  add_client_settings(verb, given->settings);
  verb.run([given] { return submit(*given); });

  auto shown = std::make_shared<ShowOptions>();
  verb = patch.add_verb("show", "Show a patch's verdict and its cases");
  verb.add_option("id", shown->id,
                  "the patch's id, which is its job's; a part of it that no "
                  "other has will do")
      .required();
  verb.add_flag("-f,--follow", shown->follow,
                "until it has ended; exit 1 unless it succeeded");
  add_wait_s(verb, [shown](std::int64_t ms) { shown->wait_ms = ms; });
  verb.add_flag("--all", shown->all, "show all cases");
  add_client_settings(verb, shown->settings);
  verb.run([shown] { return show(*shown); });
}

}  // namespace machina::cli
