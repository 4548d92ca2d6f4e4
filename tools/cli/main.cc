// The one main: a list of verbs. Each is a file beside this one.

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <iostream>
#include <string>

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
  add_patch_verbs(app, &exit);
  add_wal(app, &exit);
  add_top(app, &exit);
  add_version(app, &exit);

  // Said here, because the parser would only say that a verb is missing.
  CLI::App* at = &app;
  std::string path = "machina";
  for (int i = 1; i < argc && argv[i][0] != '-'; ++i) {
    auto verbs = at->get_subcommands([](CLI::App*) { return true; });
    if (verbs.empty()) break;
    auto named = std::find_if(
        verbs.begin(), verbs.end(),
        [&](const CLI::App* verb) { return verb->get_name() == argv[i]; });
    if (named == verbs.end()) {
      return fail(kUsage, "there is no verb \"" + harmless(argv[i]) + "\"; " +
                              path + " --help lists them");
    }
    at = *named;
    path += " " + at->get_name();
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked_for_help) {
    return app.exit(asked_for_help);
  } catch (const CLI::ParseError& error) {
    return fail(kUsage,
                std::string(error.what()) + " (see " + path + " --help)");
  }
  return exit;
}
