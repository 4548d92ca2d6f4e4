#include "workers/kinds/tool/shell.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <optional>

#include "queue/base/json.h"
#include "queue/base/utf8.h"
#include "workers/kinds/fields.h"
#include "workers/kinds/run.h"

namespace machina::kinds {
namespace {

// What prod allows where nothing is set: tools that read and sort. Nothing that
// runs other programs on request (a shell, python, awk, sed, find, rg, a build
// tool, a compiler, git, zip) and no network client.
constexpr std::array kProdTools = {
    "true", "echo", "sleep", "cat",    "head",     "tail",
    "ls",   "pwd",  "wc",    "sort",   "uniq",     "tr",
    "diff", "date", "uname", "whoami", "hostname", "grep"};
constexpr std::array kPath = {"/usr/local/bin/", "/usr/bin/", "/bin/"};

// Of a regular, executable file.
std::optional<std::string> canonical(const std::string& path) {
  std::error_code error;
  const auto real = std::filesystem::canonical(path, error);
  struct stat info {};
  if (error || ::stat(real.c_str(), &info) != 0 || !S_ISREG(info.st_mode) ||
      (info.st_mode & 0111) == 0) {
    return {};
  }
  return real.string();
}

std::optional<std::string> look_up(const std::string& program) {
  if (program.find('/') != std::string::npos) return canonical(program);
  for (const char* folder : kPath) {
    if (auto real = canonical(folder + program)) return real;
  }
  return {};
}

}  // namespace

Checked<std::string> allowed_executable(const std::string& program,
                                        const KindSettings& settings) {
  const auto refuse = [&](const std::string& why) {
    return BadField{"argv[0]",
                    "\"" + std::string(utf8_head(program, 200)) + "\" " + why};
  };
  if (program.find('/') != std::string::npos && program[0] != '/') {
    return refuse("is neither an absolute path nor a bare name");
  }
  const auto real = look_up(program);
  if (!real) return refuse("is not an executable file on this host");
  if (!settings.shell_allowed_exe.empty()) {
    for (const std::string& allowed : settings.shell_allowed_exe) {
      if (look_up(allowed) == real) return *real;
    }
    return refuse("(" + *real + ") is not in MACHINA_SHELL_ALLOWED_EXE");
  }
  if (!settings.prod) {
    if (real->starts_with("/usr/")) return *real;
    return refuse("(" + *real + ") is not below /usr");
  }
  for (const char* allowed : kProdTools) {
    if (look_up(allowed) == real) return *real;
  }
  return refuse("(" + *real +
                ") is not among the programs that the prod profile allows; "
                "set MACHINA_SHELL_ALLOWED_EXE to choose them");
}

namespace {

// Variables by which a program of kProdTools could be made to load or run
// something else.
bool redirects(std::string_view name) {
  static constexpr std::array kNames = {"BASH_ENV",       "ENV",     "PATH",
                                        "GCONV_PATH",     "LOCPATH", "NLSPATH",
                                        "GLIBC_TUNABLES", "IFS"};
  return name.starts_with("LD_") || name.starts_with("PYTHON") ||
         std::find(kNames.begin(), kNames.end(), name) != kNames.end();
}

// The rest of prod's rule, where no list of the operator replaces it.
Checked<void> check_prod_rule(const ShellPayload& payload) {
  for (const std::string& variable : payload.env) {
    const std::string name = variable.substr(0, variable.find('='));
    if (redirects(name)) {
      return BadField{"env." + name,
                      "changes what programs load or run; the prod profile "
                      "refuses it unless MACHINA_SHELL_ALLOWED_EXE is set"};
    }
  }
  if (!payload.argv[0].ends_with("/sort")) return {};
  for (std::size_t i = 1; i < payload.argv.size(); ++i) {
    // --compress-program and each of its short forms.
    if (payload.argv[i].starts_with("--co")) {
      return BadField{"argv[" + std::to_string(i) + "]",
                      "sort --compress-program runs another program; the prod "
                      "profile refuses it unless MACHINA_SHELL_ALLOWED_EXE is "
                      "set"};
    }
  }
  return {};
}

}  // namespace

Checked<ShellPayload> read_shell(const std::string& payload) {
  Fields fields(payload);
  fields.only({"argv", "stdin", "env", "cwd", "files"});
  ShellPayload out;
  out.argv = fields.texts("argv", kArgumentsMax, kArgumentBytesMax);
  out.input = fields.text("stdin", kPayloadBytesMax);
  out.env = environment(fields, "env");
  out.cwd = directory(fields, "cwd");
  out.files = files(fields, "files");
  if (out.argv.empty() || out.argv[0].empty()) {
    fields.fail("argv", "needs a program to run");
  }
  if (auto good = fields.done(); !good) return good.error();
  return out;
}

Checked<ShellPayload> parse_shell(const std::string& payload,
                                  const KindSettings& settings) {
  auto out = read_shell(payload);
  if (!out) return out;
  auto real = allowed_executable(out->argv[0], settings);
  if (!real) return real.error();
  out->argv[0] = *real;
  if (settings.prod && settings.shell_allowed_exe.empty()) {
    if (auto good = check_prod_rule(*out); !good) return good.error();
  }
  return out;
}

namespace {

// Both streams within the result's bound even where every byte is escaped.
std::string shell_result(const sandbox::StepResult& step,
                         const KindSettings& settings) {
  const auto bound = [](std::uint64_t set) {
    return static_cast<std::size_t>(std::min<std::uint64_t>(set, 1u << 20));
  };
  std::size_t out_max = bound(settings.shell_stdout_max);
  std::size_t err_max = bound(settings.shell_stderr_max);
  for (;;) {
    const bool cut = step.out.size() > out_max || step.err.size() > err_max;
    const bool exited = step.ended == sandbox::Ended::exited;
    std::string text = "{\"exit_code\":";
    text += exited ? std::to_string(step.exit_code) : "null";
    text += ",\"stdout\":";
    json::quote(text, head_and_tail(step.out, out_max));
    text += ",\"stderr\":";
    json::quote(text, head_and_tail(step.err, err_max));
    text += ",\"truncated\":";
    text += step.truncated || cut ? "true}" : "false}";
    if (text.size() <= kResultBytesMax) return text;
    out_max /= 2;
    err_max /= 2;
  }
}

}  // namespace

namespace {

End run_shell(const Attempt& attempt, Host& host) {
  auto payload = parse_shell(attempt.payload, host.settings());
  if (!payload) return bad_payload(payload.error());

  sandbox::SessionSpec spec;
  spec.limits = attempt.limits;
  spec.min_level = attempt.required;
  auto session = host.open(spec);
  if (!session) return failed(EndCode::sandbox, session.error().what);
  for (const auto& [path, text] : payload->files) {
    if (auto put = (*session)->put(path, text); !put) {
      return failed(code_of_put(put.error()),
                    "files." + path + ": " + put.error().what);
    }
  }

  sandbox::Step step;
  step.argv = std::move(payload->argv);
  step.env = std::move(payload->env);
  for (auto& variable : trace_variables(attempt)) {
    step.env.push_back(std::move(variable));
  }
  if (!payload->cwd.empty()) step.cwd = "/work/" + payload->cwd;
  step.stdin_data = std::move(payload->input);
  step.timeout_ms = attempt.timeout_ms;
  const sandbox::StepResult ran = (*session)->run(step, host.watch());

  End end;
  end.usage.add(ran);
  end.code = code_of(ran.ended);
  if (end.code != EndCode::none) {
    end.message = describe(ran, attempt.limits, attempt.timeout_ms);
  } else if (ran.exit_code != 0) {
    end.code = EndCode::verdict;
    end.message = describe(ran, attempt.limits, attempt.timeout_ms);
  }
  if (end.code != EndCode::isolation_unavailable &&
      end.code != EndCode::sandbox) {
    end.result = shell_result(ran, host.settings());
  }
  return end;
}

}  // namespace

Family tool_family(const KindSettings& settings) {
  Kind shell;
  shell.name = "tool.shell";
  shell.run = run_shell;
  shell.timeout_ms = settings.shell_timeout_ms;
  shell.limits = {512, 256, 64, 0, 1 << 20};
  shell.check = [](const std::string& payload) -> Checked<Kind::Kept> {
    if (auto good = read_shell(payload); !good) return good.error();
    return Kind::Kept{};
  };
  shell.resolve =
      [settings](const std::string& payload) -> Checked<Kind::Kept> {
    if (auto good = parse_shell(payload, settings); !good) return good.error();
    return Kind::Kept{};
  };
  return {{std::move(shell)}, {}};
}

}  // namespace machina::kinds
