// The verbs about patches: list, show, ancestry, search.

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "tools/cli/cli.h"
#include "tools/cli/show.h"

namespace machina::cli {
namespace {

constexpr char kPatchIdHelp[] =
    "the patch's id, which is its job's; a part of it that no other has will "
    "do";

struct PatchOptions {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  std::string id, license, vector, path, repo, outcome, cursor;
  std::string license_fingerprint, session, diff_digest;
  int limit = 50;
};

std::string inner(const Json& object, const char* outer, const char* name) {
  auto found = object.find(outer);
  if (found == object.end() || !found->is_object()) return "";
  return text_of(*found, name);
}

std::string lines_of(const Json& object) {
  std::string added = text_of(object, "added");
  return added.empty() ? "" : "+" + added + " -" + text_of(object, "removed");
}

// Asks; false: *exit says why not. With --json the answer is shown as it is.
bool fetch(const Settings& settings, const std::string& path, int* exit,
           Json* answer) {
  Client::Request request;
  request.path = path;
  Asked asked = ask(settings, request, exit);
  if (!asked.ok) return false;
  *answer = Json::parse(asked.answer.body, nullptr, false);
  if (!answer->is_object()) {
    *exit = fail(kRefused, "the answer is not JSON");
    return false;
  }
  if (settings.json) std::cout << harmless_json(answer->dump()) << "\n";
  return true;
}

void show_table(const Json& patches, bool provenance) {
  std::vector<std::string> head = {"PATCH", "OUTCOME", "FINISHED", "LINES",
                                   "REPO",  "BRANCH",  "WHAT"};
  if (provenance) head.insert(head.begin() + 6, "FROM");
  Table table(head);
  for (const auto& patch : patches) {
    std::string outcome = text_of(patch, "outcome");
    if (!text_of(patch, "rolled_back_by").empty()) outcome += ", rolled back";
    std::string branch = text_of(patch, "branch");
    if (!branch.empty() && !patch.value("pushed", false)) branch += " (bundle)";
    std::string what = text_of(patch, "description");
    if (what.empty()) what = text_of(patch, "reason");
    std::vector<std::string> row = {
        text_of(patch, "patch_id"),
        outcome,
        readable_clock(text_of(patch, "finished_at")),
        patch.contains("lines") ? lines_of(patch["lines"]) : "",
        text_of(patch, "repo"),
        branch,
        first_line(what, 60)};
    if (provenance) {
      std::string from;
      auto sources = patch.find("provenance");
      if (sources != patch.end() && !sources->empty()) {
        const Json& first = sources->front();
        from = text_of(first, "vector_id");
        if (from.empty()) from = text_of(first, "origin");
        if (sources->size() > 1) {
          from += " and " + std::to_string(sources->size() - 1) + " more";
        }
      }
      row.insert(row.begin() + 6, from);
    }
    table.add(std::move(row));
  }
  std::cout << table.text();
}

int list(const PatchOptions& options, const char* verb) {
  std::string path = "/v1/patches";
  std::string again;
  auto add = [&](const char* name, const std::string& value) {
    if (value.empty()) return;
    path += (path.find('?') == path.npos ? "?" : "&") + std::string(name) +
            "=" + url_escape(value);
    std::string option(name);
    std::replace(option.begin(), option.end(), '_', '-');
    again += " --" + option + " " + value;
  };
  add("license", options.license);
  add("vector", options.vector);
  add("path", options.path);
  add("license_fingerprint", options.license_fingerprint);
  add("session", options.session);
  add("diff_digest", options.diff_digest);
  add("repo", options.repo);
  add("outcome", options.outcome);
  int exit = kOk;
  Json page;
  if (!fetch_pages(*options.settings, path, "patches", options.limit,
                   options.cursor, &page, &exit)) {
    return exit;
  }
  if (options.settings->json) {
    std::cout << harmless_json(page.dump()) << "\n";
    return kOk;
  }
  show_table(page["patches"], false);
  std::string cursor = text_of(page, "cursor");
  if (!cursor.empty()) {
    std::cout << "there is more: machina patches " << verb << harmless(again)
              << " --cursor " << harmless(cursor) << "\n";
  }
  return kOk;
}

void show_tests(const Json& patch) {
  auto tests = patch.find("tests");
  if (tests == patch.end() || !tests->is_object()) return;
  for (const char* when : {"before", "after"}) {
    auto counts = tests->find(when);
    if (counts == tests->end() || !counts->is_object()) continue;
    std::string line;
    for (const auto& [name, value] : counts->items()) {
      line += (line.empty() ? "" : ", ") + name + " " + value.dump();
    }
    show_line(when[0] == 'b' ? "tests before" : "tests after", " " + line);
  }
  for (const char* name : {"newly_failing", "newly_passing"}) {
    auto names = tests->find(name);
    if (names == tests->end()) continue;
    for (const auto& one : *names) {
      show_line(name[6] == 'f' ? "now fails" : "now passes",
                one.is_string() ? one.get<std::string>() : one.dump());
    }
  }
}

// Of a rollback: "1 of 2 pass, 1 fails as before the patch".
std::string tests_of(const Json& rollback) {
  auto tests = rollback.find("tests");
  if (tests == rollback.end() || !tests->is_object()) return "";
  const Json after = tests->value("after", Json());
  if (!after.is_object() || !after.value("valid", true)) return "no verdict";
  const int passed = after.value("passed", 0);
  const int all = passed + after.value("failed", 0) + after.value("errors", 0) +
                  after.value("flaky", 0);
  std::string out =
      std::to_string(passed) + " of " + std::to_string(all) + " pass";
  for (const auto& [name, what] :
       {std::pair{"newly_failing_count", " because of it"},
        std::pair{"failing_again_count", " as before the patch"}}) {
    const int n = tests->value(name, 0);
    if (n == 0) continue;
    out += ", " + std::to_string(n) + (n == 1 ? " fails" : " fail") + what;
  }
  return out;
}

// What is counted of it and what it said of its making.
void show_metrics(const Json& patch) {
  auto found = patch.find("metrics");
  if (found == patch.end() || !found->is_object()) return;
  for (auto [label, member] : {std::pair{"score", "enhancement_score"},
                               {"difficulty", "patch_difficulty"},
                               {"effort", "effort_estimate"},
                               {"tokens", "context_tokens"},
                               {"tag", "roi_tag"},
                               {"enhancement", "enhancement_name"}}) {
    show_line(label, text_of(*found, member));
  }
  show_line("took", text_of(*found, "time_to_completion_ms") + " ms");
}

std::string when(const Json& object, const char* name) {
  std::string at = text_of(object, name);
  return at.empty() ? "" : readable_time(at);
}

void show_patch(const Json& patch) {
  show_line("patch", text_of(patch, "patch_id"));
  show_line("outcome", text_of(patch, "outcome") + "  (job " +
                           text_of(patch, "state") + ")");
  for (auto [label, member] : {std::pair{"reason", "reason"},
                               {"what", "description"},
                               {"author", "author"},
                               {"repo", "repo"},
                               {"base", "base_commit"},
                               {"commit", "commit"},
                               {"branch", "branch"}}) {
    show_line(label, text_of(patch, member));
  }
  if (!text_of(patch, "branch").empty()) {
    show_line("pushed", patch.value("pushed", false)
                            ? "yes"
                            : "no; the branch is in the job's bundle");
  }
  show_line("diff", text_of(patch, "diff_digest"));
  std::string approval = inner(patch, "approval", "state");
  std::string actor = inner(patch, "approval", "actor");
  if (approval != "not_required") {
    if (!actor.empty()) approval += " by " + actor;
    std::string comment = inner(patch, "approval", "comment");
    show_line("approval", approval + (comment.empty() ? "" : ": " + comment));
  }
  show_line("parent", text_of(patch, "parent_patch_id"));
  show_line("created", when(patch, "created_at"));
  show_line("finished", when(patch, "finished_at"));
  show_line("rolled back", text_of(patch, "rolled_back_by").empty()
                               ? ""
                               : "by job " + text_of(patch, "rolled_back_by"));
  show_metrics(patch);
  show_tests(patch);
  auto list = [&](const char* name) {
    auto found = patch.find(name);
    return found != patch.end() && found->is_array() ? *found : Json::array();
  };
  if (Json files = list("files"); !files.empty()) {
    Table table({"FILE", "LINES", "SHA-256 BEFORE", "AFTER"});
    for (const auto& file : files) {
      table.add({text_of(file, "path"), lines_of(file),
                 text_of(file, "sha256_before").substr(0, 12),
                 text_of(file, "sha256_after").substr(0, 12)});
    }
    std::cout << "\n" << table.text();
  }
  if (Json sources = list("provenance"); !sources.empty()) {
    Table table({"ORIGIN", "VECTOR", "INFLUENCE", "LICENCE", "TEXT", "SESSION",
                 "ALERTS"});
    for (const auto& source : sources) {
      std::string alerts;
      for (const auto& alert : source.value("semantic_alerts", Json::array())) {
        alerts += (alerts.empty() ? "" : "; ") +
                  (alert.is_string() ? alert.get<std::string>() : "");
      }
      table.add({text_of(source, "origin"), text_of(source, "vector_id"),
                 text_of(source, "influence"), text_of(source, "license"),
                 text_of(source, "license_fingerprint").substr(0, 12),
                 text_of(source, "session_id"), first_line(alerts, 60)});
    }
    std::cout << "\n" << table.text();
  }
  if (Json all = list("contributors"); !all.empty()) {
    Table table({"CONTRIBUTOR", "SESSION", "INFLUENCE"});
    for (const auto& one : all) {
      table.add({text_of(one, "vector_id"), text_of(one, "session_id"),
                 text_of(one, "influence")});
    }
    std::cout << "\n" << table.text();
  }
  if (Json log = list("branch_log"); !log.empty()) {
    Table table({"WHEN", "BRANCH", "WAS", "COMMIT", "BY JOB"});
    for (const auto& entry : log) {
      table.add({readable_clock(text_of(entry, "at")), text_of(entry, "branch"),
                 text_of(entry, "action"),
                 text_of(entry, "commit").substr(0, 12),
                 text_of(entry, "job_id")});
    }
    std::cout << "\n" << table.text();
  }
  if (Json rollbacks = list("rollbacks"); !rollbacks.empty()) {
    Table table({"ROLLBACK", "OUTCOME", "REGION", "WHEN", "TESTS", "WHY"});
    for (const auto& rollback : rollbacks) {
      table.add({text_of(rollback, "job_id"), text_of(rollback, "outcome"),
                 text_of(rollback, "region"),
                 readable_clock(text_of(rollback, "finished_at")),
                 tests_of(rollback),
                 first_line(text_of(rollback, "reason"), 60)});
    }
    std::cout << "\n" << table.text();
  }
}

int show(PatchOptions options) {
  int exit = kOk;
  if (!resolve_id(*options.settings, true, &options.id, &exit)) return exit;
  return show_patch_record(*options.settings, options.id);
}

int ancestry(PatchOptions options) {
  int exit = kOk;
  Json answer;
  if (!resolve_id(*options.settings, true, &options.id, &exit)) return exit;
  if (!fetch(*options.settings,
             "/v1/patches/" + url_escape(options.id) + "/ancestry", &exit,
             &answer) ||
      options.settings->json) {
    return exit;
  }
  show_table(answer["patches"], true);
  if (answer.value("truncated", false)) {
    std::cout << "there is more: ask for the ancestry of the last one\n";
  }
  if (answer.value("cycle", false)) {
    std::cout << "the parent of the last one is in this list: a cycle\n";
  }
  std::string missing = text_of(answer, "missing");
  if (!missing.empty()) {
    std::cout << "the parent of the last one is not known: "
              << harmless(missing) << "\n";
  }
  return kOk;
}

void add_page(Verb verb, const std::shared_ptr<PatchOptions>& options) {
  verb.add_option("--repo", options->repo,
                  "a path, or a name below a repository root");
  verb.add_option("--outcome", options->outcome,
                  "such as applied, conflict, rejected or tests_failed");
  verb.add_option("--limit", options->limit, "patches that are shown (50)")
      .range(1, 1000);
  verb.add_option("--cursor", options->cursor, "of the page before");
  add_client_settings(verb, options->settings);
}

}  // namespace

int show_patch_record(const Settings& settings, const std::string& id) {
  int exit = kOk;
  Json patch;
  if (fetch(settings, "/v1/patches/" + url_escape(id), &exit, &patch) &&
      !settings.json) {
    show_patch(patch);
  }
  return exit;
}

void add_patch_verbs(Verb& app) {
  Verb patches =
      app.add_verb("patches", "Where patches came from, and their fate");
  patches.require_verb();

  auto listed = std::make_shared<PatchOptions>();
  Verb verb = patches.add_verb("list", "List patches");
  add_page(verb, listed);
  verb.run([listed] { return list(*listed, "list"); });

  auto shown = std::make_shared<PatchOptions>();
  verb = patches.add_verb("show", "Show a patch");
  verb.add_option("id", shown->id, kPatchIdHelp).required();
  add_client_settings(verb, shown->settings);
  verb.run([shown] { return show(*shown); });

  auto traced = std::make_shared<PatchOptions>();
  verb = patches.add_verb("ancestry",
                          "A patch, its parent, and so on to the root");
  verb.add_option("id", traced->id, kPatchIdHelp).required();
  add_client_settings(verb, traced->settings);
  verb.run([traced] { return ancestry(*traced); });

  auto sought = std::make_shared<PatchOptions>();
  verb = patches.add_verb(
      "search", "Patches by what they were made from or what they touch");
  verb.add_option("--license", sought->license, "SPDX, such as MIT");
  verb.add_option("--vector", sought->vector, "a vector's id");
  verb.add_option("--path", sought->path, "a file's path in the repository");
  verb.add_option("--license-fingerprint", sought->license_fingerprint,
                  "SHA-256 of a licence's text");
  verb.add_option("--session", sought->session, "a session's id");
  verb.add_option("--diff-digest", sought->diff_digest,
                  "SHA-256 of a diff: was it tried before?");
  add_page(verb, sought);
  verb.run([sought] {
    if (sought->license.empty() && sought->vector.empty() &&
        sought->path.empty() && sought->license_fingerprint.empty() &&
        sought->session.empty() && sought->diff_digest.empty()) {
      return fail(kUsage,
                  "patches search: --license, --license-fingerprint, "
                  "--vector, --session, --diff-digest or --path is needed");
    }
    return list(*sought, "search");
  });
}

}  // namespace machina::cli
