// The systemd unit of a root: whether there is one, and starting it. Asked of
// systemctl, by argv, as an operator would.

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include "tools/cli/ops_common.h"

namespace machina::cli {
namespace {

constexpr char kUnit[] = "machina.service";
constexpr std::int64_t kAskMs = 10'000;
constexpr std::int64_t kStartMs = 16 * 60'000;  // the unit's TimeoutStartSec
constexpr std::size_t kAnswerMax = 256 << 10;

struct Answer {
  int code = -1;  // of systemctl; -1: it is not there, or took too long
  std::string out;
};

Answer systemctl(const std::vector<std::string>& arguments,
                 std::int64_t limit_ms) {
  Answer answer;
  int pipes[2];
  if (::pipe2(pipes, O_CLOEXEC) != 0) return answer;
  std::vector<std::string> words = {"systemctl", "--no-ask-password"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (auto& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    ::dup2(pipes[1], 1);
    ::dup2(pipes[1], 2);
    ::execvp(argv[0], argv.data());
    ::_exit(127);
  }
  ::close(pipes[1]);
  const std::int64_t until = steady_ms() + limit_ms;
  bool open = child > 0;
  while (open) {
    pollfd ready{pipes[0], POLLIN, 0};
    const std::int64_t left = until - steady_ms();
    if (left <= 0) break;
    if (::poll(&ready, 1, static_cast<int>(left)) <= 0) continue;
    char bytes[4096];
    const ssize_t got = ::read(pipes[0], bytes, sizeof bytes);
    if (got <= 0) break;
    if (answer.out.size() < kAnswerMax) {
      answer.out.append(bytes, static_cast<std::size_t>(got));
    }
  }
  ::close(pipes[0]);
  if (child < 0) return answer;
  int status = 0;
  while (::waitpid(child, &status, WNOHANG) == 0) {
    if (steady_ms() >= until) {
      ::kill(child, SIGKILL);
      ::waitpid(child, &status, 0);
      return answer;
    }
    ::usleep(5'000);
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) != 127) {
    answer.code = WEXITSTATUS(status);
  }
  return answer;
}

// "Name=value" a line.
std::map<std::string, std::string> properties(const std::string& text) {
  std::map<std::string, std::string> out;
  std::size_t at = 0;
  while (at < text.size()) {
    std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string line = text.substr(at, end - at);
    at = end + 1;
    const std::size_t equals = line.find('=');
    if (equals != std::string::npos) {
      out[line.substr(0, equals)] = line.substr(equals + 1);
    }
  }
  return out;
}

// The words of "{ path=... ; argv[]=/usr/bin/machina serve --config F ; ...".
std::vector<std::string> words_of(const std::string& exec_start) {
  std::vector<std::string> out;
  const std::size_t from = exec_start.find("argv[]=");
  if (from == std::string::npos) return out;
  std::string words = exec_start.substr(from + 7);
  words.resize(std::min(words.find(" ;"), words.size()));
  std::size_t at = 0;
  while (at < words.size()) {
    const std::size_t end = std::min(words.find(' ', at), words.size());
    if (end > at) out.push_back(words.substr(at, end - at));
    at = end + 1;
  }
  return out;
}

// The root that the unit's server would take: from its arguments, its
// environment, its configuration file.
Result<std::string> root_of(std::map<std::string, std::string>& unit) {
  std::map<std::string, std::string> overrides;
  std::string file;
  const auto words = words_of(unit["ExecStart"]);
  for (std::size_t i = 0; i + 1 < words.size(); ++i) {
    if (words[i] == "--config") file = words[i + 1];
    if (words[i] == "--root") overrides["MACHINA_ROOT"] = words[i + 1];
  }
  std::vector<std::string> environment;
  for (const char* name : {"MACHINA_ROOT=", "MACHINA_CONFIG="}) {
    const std::string& all = unit["Environment"];
    const std::size_t from = (" " + all).find(" " + std::string(name));
    if (from == std::string::npos) continue;
    std::string word = all.substr(from);
    word.resize(std::min(word.find(' '), word.size()));
    environment.push_back(word);
  }
  auto config = Config::load(environment, overrides, file);
  if (!config) return config.error();
  return config->typed().root;
}

bool same_place(const std::string& a, const std::string& b) {
  std::error_code error;
  return std::filesystem::weakly_canonical(a, error) ==
         std::filesystem::weakly_canonical(b, error);
}

}  // namespace

Unit look_at_unit(const std::string& root) {
  Unit unit;
  const Answer answer = systemctl(
      {"show", "--property=LoadState,ExecStart,Environment", kUnit}, kAskMs);
  if (answer.code != 0) {
    unit.why_not =
        answer.code == -1
            ? "systemctl is not there, or does not answer: use --launcher nohup"
            : "systemd does not run this machine: use --launcher nohup";
    return unit;
  }
  auto shown = properties(answer.out);
  if (shown["LoadState"] != "loaded") {
    unit.why_not = std::string(kUnit) + " is not installed (" +
                   shown["LoadState"] + "): ops/install.sh installs it";
    return unit;
  }
  auto serves = root_of(shown);
  if (!serves) {
    unit.why_not =
        std::string(kUnit) +
        " has a configuration that cannot be read here: " + serves.error().what;
  } else if (!same_place(*serves, root)) {
    unit.why_not = std::string(kUnit) + " serves " + *serves + ", not " + root;
  }
  return unit;
}

Result<void> start_unit(bool restart) {
  const Answer answer =
      systemctl({restart ? "restart" : "start", kUnit}, kStartMs);
  if (answer.code == 0) return {};
  std::string why = answer.out;
  while (!why.empty() && why.back() == '\n') why.pop_back();
  return Error{
      Code::io,
      std::string("systemctl ") + (restart ? "restart " : "start ") + kUnit +
          (answer.code == -1 ? ": it did not end in time"
                             : " exited with " + std::to_string(answer.code) +
                                   ": " + harmless(why)) +
          " (journalctl -u machina says more)"};
}

}  // namespace machina::cli
