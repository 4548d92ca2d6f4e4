#include "tools/cli/verb.h"

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>

#include "tools/cli/cli.h"

namespace machina::cli {

Option Option::required() {
  option_->required();
  return *this;
}

Option Option::excludes(std::initializer_list<const char*> others) {
  for (const char* other : others) option_->excludes(other);
  return *this;
}

Option Option::range(std::int64_t min, std::int64_t max) {
  option_->check(CLI::Range(min, max));
  return *this;
}

Option Option::one_of(std::vector<std::string> values) {
  option_->check(CLI::IsMember(std::move(values)));
  return *this;
}

Option Option::shown_as(const std::string& value) {
  option_->type_name(value);
  return *this;
}

Verb Verb::add_verb(const std::string& name, const std::string& help) {
  return Verb(app_->add_subcommand(name, help), exit_);
}

void Verb::require_verb() { app_->require_subcommand(1); }

template <class T>
Option Verb::add_option(const std::string& names, T& to,
                        const std::string& help) {
  return Option(app_->add_option(names, to, help));
}
template Option Verb::add_option(const std::string&, std::string&,
                                 const std::string&);
template Option Verb::add_option(const std::string&, std::vector<std::string>&,
                                 const std::string&);
template Option Verb::add_option(const std::string&, int&, const std::string&);
template Option Verb::add_option(const std::string&, std::uint64_t&,
                                 const std::string&);

Option Verb::add_option(const std::string& names,
                        std::function<void(const std::string&)> take,
                        const std::string& help) {
  const std::string name = names.substr(0, names.find(','));
  return Option(app_->add_option_function<std::string>(
      names,
      [name, take = std::move(take)](const std::string& text) {
        try {
          take(text);
        } catch (const BadValue& bad) {
          throw CLI::ValidationError(name, bad.what());
        }
      },
      help));
}

Option Verb::add_flag(const std::string& names, bool& to,
                      const std::string& help) {
  return Option(app_->add_flag(names, to, help));
}

void Verb::run(std::function<int()> body) {
  app_->callback([exit = exit_, body = std::move(body)] { *exit = body(); });
}

int run_command_line(int argc, char** argv, const char* about,
                     const std::function<void(Verb&)>& add) {
  CLI::App app{about, "machina"};
  app.set_version_flag("--version", "machina " MACHINA_VERSION);
  int exit = kOk;
  Verb machina(&app, &exit);
  machina.require_verb();
  add(machina);

  // Said here, because the parser would only say that a verb is missing. Where
  // a verb may stand, `help` asks for help: `machina help ops start` and
  // `machina ops help start` are `machina ops start --help`.
  std::vector<std::string> words(argv + 1, argv + argc);
  bool help = false;
  CLI::App* at = &app;
  std::string path = "machina";
  for (std::size_t i = 0; i < words.size();) {
    const std::string word = words[i];
    if (word.starts_with('-')) break;
    auto verbs = at->get_subcommands([](CLI::App*) { return true; });
    if (verbs.empty()) break;
    if (word == "help") {
      help = true;
      words.erase(words.begin() + static_cast<std::ptrdiff_t>(i));
      continue;
    }
    auto named = std::find_if(
        verbs.begin(), verbs.end(),
        [&](const CLI::App* verb) { return verb->get_name() == word; });
    if (named == verbs.end()) {
      return fail(kUsage, "there is no verb \"" + harmless(word) + "\"; " +
                              path + " --help lists them");
    }
    at = *named;
    path += " " + at->get_name();
    ++i;
  }
  if (help) {
    std::erase_if(words,
                  [](const auto& word) { return word.starts_with('-'); });
    words.emplace_back("--help");
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

}  // namespace machina::cli
