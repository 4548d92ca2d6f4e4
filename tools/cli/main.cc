// The one main: a list of verbs. Each is a file beside this one.

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <iostream>
#include <string>
#include <vector>

#include "tools/cli/cli.h"

int main(int argc, char** argv) {
  using namespace machina::cli;
  CLI::App app{"Machina: a durable job queue with sandboxed workers",
               "machina"};
  app.require_subcommand(1);
  app.set_version_flag("--version", "machina " MACHINA_VERSION);
  int exit = kOk;

  add_serve(app, &exit);
  add_pool(app, &exit);
  add_worker(app, &exit);
  add_ops(app, &exit);
  add_doctor(app, &exit);
  add_job_verbs(app, &exit);
  add_operator_verbs(app, &exit);
  add_sign(app, &exit);
  add_patch_submit(app, &exit);
  add_patch_verbs(app, &exit);
  add_wal(app, &exit);
  add_top(app, &exit);
  add_version(app, &exit);

  // `machina help ops start` is `machina ops start --help`.
  std::vector<std::string> words(argv + 1, argv + argc);
  if (!words.empty() && words.front() == "help") {
    words.erase(words.begin());
    std::erase_if(words, [](const auto& word) { return word[0] == '-'; });
    words.emplace_back("--help");
  }

  // Said here, because the parser would only say that a verb is missing.
  CLI::App* at = &app;
  std::string path = "machina";
  for (const std::string& word : words) {
    if (word.starts_with('-')) break;
    auto verbs = at->get_subcommands([](CLI::App*) { return true; });
    if (verbs.empty()) break;
    auto named = std::find_if(
        verbs.begin(), verbs.end(),
        [&](const CLI::App* verb) { return verb->get_name() == word; });
    if (named == verbs.end()) {
      return fail(kUsage, "there is no verb \"" + harmless(word) + "\"; " +
                              path + " --help lists them");
    }
    at = *named;
    path += " " + at->get_name();
  }
  try {
    std::reverse(words.begin(), words.end());  // as the parser takes them
    app.parse(std::move(words));
  } catch (const CLI::Success& asked_for_help) {
    return app.exit(asked_for_help);
  } catch (const CLI::ParseError& error) {
    return fail(kUsage,
                std::string(error.what()) + " (see " + path + " --help)");
  }
  return exit;
}
