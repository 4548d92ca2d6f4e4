#include "tools/cli/cli.h"

#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "tools/duration.h"

extern char** environ;  // NOLINT: the only way to the whole of it

namespace machina::cli {

void add_setting(Verb verb, std::shared_ptr<Settings> settings,
                 const std::string& flag, const std::string& variable,
                 const std::string& help) {
  verb.add_option(
          flag,
          [settings, variable](const std::string& value) {
            settings->overrides[variable] = value;
          },
          help)
      .shown_as(variable);
}

void add_common(Verb verb, std::shared_ptr<Settings> settings) {
  verb.add_option("--config", settings->file, "a YAML file of variables")
      .shown_as("FILE");
  verb.add_flag("--json", settings->json, "print JSON");
}

void add_client_settings(Verb verb, std::shared_ptr<Settings> settings) {
  add_setting(verb, settings, "--server", "MACHINA_SERVER",
              "http://HOST:PORT or the path of a socket");
  add_setting(verb, settings, "--root", "MACHINA_ROOT",
              "where to look for machina.sock");
  add_common(verb, settings);
}

void add_duration(Verb verb, const std::string& names, std::int64_t min_ms,
                  std::int64_t max_ms, const std::string& unit,
                  std::function<void(std::int64_t ms)> take,
                  const std::string& help) {
  const std::int64_t unit_ms = unit == "s" ? 1000 : 1;
  verb.add_option(
          names,
          [=, take = std::move(take)](const std::string& text) {
            auto ms = parse_duration_ms(text, unit_ms);
            if (!ms || *ms < min_ms || *ms > max_ms) {
              throw BadValue("\"" + harmless(text) + "\" must be " +
                             duration_range(min_ms, max_ms, unit));
            }
            take(*ms);
          },
          help)
      .shown_as(unit == "s" ? "SECONDS" : "MS");
}

std::vector<std::string> environment() {
  std::vector<std::string> all;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    all.emplace_back(*entry);
  }
  return all;
}

Result<Config> load(const Settings& settings) {
  auto config = Config::load(environment(), settings.overrides, settings.file);
  if (!config) fail(kUsage, config.error().what);
  return config;
}

std::string self_exe() {
  std::string path(4096, '\0');
  ssize_t got = ::readlink("/proc/self/exe", path.data(), path.size());
  path.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
  // Replaced since: what is at its path now is what to start.
  constexpr std::string_view kDeleted = " (deleted)";
  if (path.ends_with(kDeleted)) path.resize(path.size() - kDeleted.size());
  return path;
}

int fail(int exit, const std::string& what) {
  std::cerr << "machina: " << harmless(what) << "\n";
  return exit;
}

Asked ask(const Settings& settings, const Client::Request& request, int* exit) {
  Asked asked;
  auto config = load(settings);
  if (!config) {
    *exit = kUsage;
    return asked;
  }
  auto client = Client::open(*config);
  if (!client) {
    *exit = fail(kUsage, client.error().what);
    return asked;
  }
  auto answer = (*client)->call(request);
  if (!answer) {
    bool unknown = answer.error().code == Code::io && request.method != "GET";
    *exit =
        fail(kUnreachable,
             answer.error().what +
                 (unknown ? "; whether it took effect is unknown: ask again "
                            "with the same --dedup-key, or look"
                          : "; is a server running there? (machina serve, "
                            "--server, --root, MACHINA_SERVER, MACHINA_ROOT)"));
    return asked;
  }
  if (answer->status >= 400) {
    *exit = show_refusal(settings, *answer);
    return asked;
  }
  asked.ok = true;
  asked.answer = std::move(*answer);
  return asked;
}

int show_refusal(const Settings& settings, const Client::Answer& answer) {
  auto problem = nlohmann::json::parse(answer.body, nullptr, false);
  if (settings.json && !problem.is_discarded()) {
    std::cout << harmless_json(problem.dump()) << "\n";
    return kRefused;
  }
  std::string code, detail;
  if (problem.is_object()) {
    code = problem.value("code", "");
    detail = problem.value("detail", problem.value("title", ""));
  }
  std::string hint;
  if (answer.status == 401 || answer.status == 403) {
    hint =
        "; set MACHINA_API_TOKEN or MACHINA_API_HMAC_SECRET (or ..._FILE), or "
        "use the server's socket";
  } else if (answer.status == 404) {
    hint = detail.starts_with("patch:")
               ? "; machina patches list shows the patches there are"
               : "; machina list shows the jobs there are";
  } else if (auto after = answer.headers.find("retry-after");
             after != answer.headers.end()) {
    hint = "; try again in " + after->second + " s";
  }
  return fail(kRefused, "refused, " + std::to_string(answer.status) +
                            (code.empty() ? "" : " " + harmless(code)) +
                            (detail.empty() ? "" : ": " + harmless(detail)) +
                            hint);
}

void add_version(Verb& app) {
  auto settings = std::make_shared<Settings>();
  Verb verb = app.add_verb("version", "Print the version");
  verb.add_flag("--json", settings->json, "print JSON");
  verb.run([settings] {
    if (settings->json) {
      std::cout << nlohmann::json{{"version", MACHINA_VERSION}}.dump() << "\n";
    } else {
      std::cout << "machina " << MACHINA_VERSION << "\n";
    }
    return kOk;
  });
}

}  // namespace machina::cli
