// top: a live view of a server. One thread asks the server, the main one owns
// the terminal, so that keys and resizes are answered while the server is
// slow, away, or being restarted.

#include <fcntl.h>
#include <langinfo.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <cerrno>
#include <clocale>
#include <csignal>
#include <cstring>
#include <iostream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "tools/cli/cli.h"
#include "tools/cli/show.h"
#include "tools/cli/top_view.h"

namespace machina::cli {
namespace {

constexpr long kAskMs = 2000;
constexpr int kRunningShown = 50;
constexpr int kRunningPagesMax = 20;  // that are looked through for them

struct TopOptions {
  std::shared_ptr<Settings> settings = std::make_shared<Settings>();
  double interval_s = 1;
  bool once = false;
};

std::int64_t clock_ms(clockid_t clock) {
  timespec now{};
  ::clock_gettime(clock, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1000 + now.tv_nsec / 1'000'000;
}

// --- Asking ------------------------------------------------------------------

// `refused`: the server's answer where it refused, or nothing.
TopSample take_sample(Client& client, Client::Answer* refused) {
  TopSample sample;
  sample.where = client.where();
  sample.wall_ms = clock_ms(CLOCK_REALTIME);
  sample.mono_ms = clock_ms(CLOCK_MONOTONIC);
  auto get = [&](const std::string& path, std::string* body) {
    Client::Request request;
    request.path = path;
    request.timeout_ms = kAskMs;
    auto answer = client.call(request);
    if (!answer) {
      sample.why = answer.error().what;
      return false;
    }
    if (answer->status != 200) {
      sample.why = path + " answered " + std::to_string(answer->status);
      if (refused != nullptr) *refused = *answer;
      return false;
    }
    *body = std::move(answer->body);
    return true;
  };
  std::string body;
  if (!get("/stats", &body)) return sample;
  sample.stats = std::move(body);
  if (!get("/metrics", &body)) return sample;
  sample.histograms = read_histograms(body);
  if (!get("/v1/workers", &body)) return sample;
  sample.workers = std::move(body);
  // A page may be empty before the list ends: the next ones are asked for.
  std::string cursor;
  for (int page = 0; page < kRunningPagesMax; ++page) {
    if (!get("/v1/jobs?state=running&limit=" + std::to_string(kRunningShown) +
                 (cursor.empty() ? "" : "&cursor=" + url_escape(cursor)),
             &body)) {
      return sample;
    }
    const Json jobs = Json::parse(body, nullptr, false);
    if (!jobs.is_object() || !jobs.value("jobs", Json::array()).empty()) break;
    cursor = text_of(jobs, "cursor");
    if (cursor.empty()) break;
  }
  sample.running = std::move(body);
  sample.reached = true;
  return sample;
}

// --- The terminal ------------------------------------------------------------

// What signal handlers need: set before they are.
termios g_before;
int g_pipe[2] = {-1, -1};
constexpr char kEnter[] = "\x1b[?1049h\x1b[?25l";
constexpr char kLeave[] = "\x1b[0m\x1b[?25h\x1b[?1049l";

// Async-signal-safe.
void leave_screen() {
  (void)!::write(STDOUT_FILENO, kLeave, sizeof kLeave - 1);
  ::tcsetattr(STDIN_FILENO, TCSANOW, &g_before);
}

void enter_screen() {
  termios raw = g_before;
  raw.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
  raw.c_cc[VMIN] = 0;
  raw.c_cc[VTIME] = 0;
  ::tcsetattr(STDIN_FILENO, TCSANOW, &raw);
  (void)!::write(STDOUT_FILENO, kEnter, sizeof kEnter - 1);
}

// To the main thread, which may take its time.
void on_news(int signal) {
  int saved = errno;
  char byte = static_cast<char>(signal);
  (void)!::write(g_pipe[1], &byte, 1);
  errno = saved;
}

// A fault of ours: the terminal comes first, then what would have happened.
void on_crash(int signal) {
  leave_screen();
  ::signal(signal, SIG_DFL);
  ::raise(signal);
}

void take_signals() {
  struct sigaction news {};
  news.sa_handler = on_news;
  news.sa_flags = SA_RESTART;
  for (int s : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT, SIGWINCH}) {
    ::sigaction(s, &news, nullptr);
  }
  for (int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) {
    ::signal(s, on_crash);
  }
  ::signal(SIGPIPE, SIG_IGN);  // a terminal that is gone ends us by POLLHUP
}

class Top {
 public:
  Top(std::unique_ptr<Client> client, double interval_s, bool color)
      : client_(std::move(client)),
        interval_ms_(static_cast<std::int64_t>(interval_s * 1000)),
        color_(color) {}

  // Until a key or a signal ends it; the exit code.
  int run() {
    if (::pipe2(g_pipe, O_CLOEXEC | O_NONBLOCK) != 0) return kUsage;
    ::tcgetattr(STDIN_FILENO, &g_before);
    take_signals();
    enter_screen();
    latest_.where = client_->where();
    latest_.why = "no answer yet";
    std::thread([this] { ask(); }).detach();
    int code = -1;
    while (code < 0) {
      draw();
      code = wait();
    }
    leave_screen();
    return code;
  }

 private:
  void ask() {
    sigset_t all;  // they are the main thread's
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
    for (;;) {
      std::int64_t begun = clock_ms(CLOCK_MONOTONIC);
      TopSample sample = take_sample(*client_, nullptr);
      {
        std::lock_guard lock(mutex_);
        // While it is away the last that was seen stays on the screen.
        if (!sample.reached) {
          sample.stats = latest_.stats;
          sample.workers = latest_.workers;
          sample.running = latest_.running;
        }
        before_ = std::exchange(latest_, std::move(sample));
      }
      on_news(0);
      std::int64_t rest = begun + interval_ms_ - clock_ms(CLOCK_MONOTONIC);
      if (rest > 0) ::usleep(static_cast<useconds_t>(rest * 1000));
    }
  }

  void draw() {
    winsize size{};
    TopScreen screen;
    screen.color = color_;
    if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_row > 0 &&
        size.ws_col > 0) {
      screen.rows = size.ws_row;
      screen.columns = size.ws_col;
    }
    std::vector<std::string> lines;
    {
      std::lock_guard lock(mutex_);
      lines = top_frame(latest_, before_.reached ? &before_ : nullptr, screen);
    }
    std::string out = "\x1b[H";
    for (std::size_t i = 0; i < lines.size(); ++i) {
      if (i > 0) out += "\r\n";
      out += lines[i] + "\x1b[K";
    }
    out += "\x1b[J";
    std::string_view rest = out;
    while (!rest.empty()) {
      ssize_t n = ::write(STDOUT_FILENO, rest.data(), rest.size());
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return;
      rest.remove_prefix(static_cast<std::size_t>(n));
    }
  }

  // -1: draw again.
  int wait() {
    pollfd items[2] = {{STDIN_FILENO, POLLIN, 0}, {g_pipe[0], POLLIN, 0}};
    if (::poll(items, 2, 5000) < 0) return -1;
    if ((items[0].revents & POLLIN) != 0) {
      char keys[64];
      ssize_t n = ::read(STDIN_FILENO, keys, sizeof keys);
      if (n == 0) return kOk;  // no terminal any more
      for (ssize_t i = 0; i < n; ++i) {
        if (keys[i] == 'q' || keys[i] == 'Q' || keys[i] == 3) return kOk;
      }
    } else if ((items[0].revents & (POLLHUP | POLLERR | POLLNVAL)) != 0) {
      return kOk;
    }
    char news[64];
    ssize_t n = ::read(g_pipe[0], news, sizeof news);
    for (ssize_t i = 0; i < n; ++i) {
      switch (news[i]) {
        case SIGINT:
          return kOk;
        case SIGTERM:
        case SIGHUP:
        case SIGQUIT:
          return 128 + news[i];
        case SIGTSTP:
          leave_screen();
          ::raise(SIGSTOP);
          break;
        case SIGCONT:
          ::tcgetattr(STDIN_FILENO, &g_before);
          enter_screen();
          break;
        default:
          break;
      }
    }
    return -1;
  }

  std::unique_ptr<Client> client_;  // the asking thread's
  const std::int64_t interval_ms_;
  const bool color_;
  std::mutex mutex_;
  TopSample latest_, before_;
};

// --- Once --------------------------------------------------------------------

int once(const TopOptions& options, Client& client) {
  Client::Answer refused;
  TopSample first = take_sample(client, &refused);
  if (!first.reached) {
    if (refused.status >= 400) return show_refusal(*options.settings, refused);
    return fail(kUnreachable,
                first.why +
                    "; is a server running there? (machina serve, "
                    "--server, --root, MACHINA_SERVER, MACHINA_ROOT)");
  }
  ::usleep(static_cast<useconds_t>(options.interval_s * 1'000'000));
  TopSample now = take_sample(client, nullptr);
  const TopSample* before = &first;
  if (!now.reached) {
    now = first;
    before = nullptr;
  }
  if (options.settings->json) {
    std::cout << top_json(now, before) << "\n";
    return kOk;
  }
  TopScreen screen;
  screen.rows = 1000;
  screen.columns = 132;
  for (const auto& line : top_frame(now, before, screen)) {
    std::cout << line << "\n";
  }
  return kOk;
}

int top(const TopOptions& options) {
  auto config = load(*options.settings);
  if (!config) return kUsage;
  auto client = Client::open(*config);
  if (!client) return fail(kUsage, client.error().what);
  // How wide a character is: by the user's locale, or else by UTF-8's bytes
  // being no characters at all.
  std::setlocale(LC_CTYPE, "");
  if (std::strcmp(nl_langinfo(CODESET), "UTF-8") != 0) {
    std::setlocale(LC_CTYPE, "C");
  }
  if (options.once || options.settings->json || !::isatty(STDOUT_FILENO) ||
      !::isatty(STDIN_FILENO)) {
    return once(options, **client);
  }
  Top view(std::move(*client), options.interval_s, wants_color());
  // The asking thread may be in the middle of a call: nothing is torn down.
  std::_Exit(view.run());
}

}  // namespace

void add_top(Verb& app) {
  auto options = std::make_shared<TopOptions>();
  Verb verb = app.add_verb(
      "top", "A live view of queues, rates, workers and running jobs");
  add_duration(
      verb, "--interval", 200, 60'000, "s",
      [options](std::int64_t ms) {
        options->interval_s = static_cast<double>(ms) / 1000;
      },
      "between looks (1 s)");
  verb.add_flag("--once", options->once,
                "print one frame and exit; so too where there is no terminal");
  add_client_settings(verb, options->settings);
  verb.run([options] { return top(*options); });
}

}  // namespace machina::cli
