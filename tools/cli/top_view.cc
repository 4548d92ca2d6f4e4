#include "tools/cli/top_view.h"

#include <wchar.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <optional>

#include "tools/cli/cli.h"

namespace machina::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kBold = "\x1b[1m";
constexpr const char* kRed = "\x1b[31;1m";
constexpr const char* kReverse = "\x1b[7m";
constexpr const char* kPlain = "\x1b[0m";

// A sample, read. What is no JSON is null.
struct View {
  explicit View(const TopSample& s)
      : reached(s.reached),
        why(s.why),
        where(s.where),
        mono_ms(s.mono_ms),
        wall_ms(s.wall_ms),
        stats(read(s.stats)),
        workers(read(s.workers)),
        running(read(s.running)),
        histograms(s.histograms) {}
  static Json read(const std::string& text) {
    Json json = Json::parse(text, nullptr, false);
    return json.is_discarded() ? Json() : json;
  }
  bool reached;
  const std::string &why, &where;
  std::int64_t mono_ms, wall_ms;
  Json stats, workers, running;
  const std::map<std::string, TopHistogram>& histograms;
};

std::optional<View> view_of(const TopSample* sample) {
  if (sample == nullptr) return std::nullopt;
  return View(*sample);
}

// --- reading what the server said; whatever it is, it is no reason to fail ---

const Json& at(const Json& json, const char* name) {
  static const Json none;
  if (!json.is_object()) return none;
  auto found = json.find(name);
  return found == json.end() ? none : *found;
}

double number(const Json& json) {
  if (json.is_number()) return json.get<double>();
  if (json.is_string()) {
    return std::strtod(json.get<std::string>().c_str(), nullptr);
  }
  return 0;
}

std::string text(const Json& json) {
  return json.is_string() ? json.get<std::string>() : "";
}

// --- words ---

std::string count_words(double n) {
  char out[32];
  if (n < 100'000) {
    std::snprintf(out, sizeof out, "%.0f", n);
  } else if (n < 10'000'000) {
    std::snprintf(out, sizeof out, "%.0fk", n / 1000);
  } else {
    std::snprintf(out, sizeof out, "%.0fM", n / 1'000'000);
  }
  return out;
}

std::string rate_words(double per_second) {
  if (per_second < 0) return "-";
  char out[32];
  std::snprintf(out, sizeof out, per_second < 10 ? "%.1f/s" : "%.0f/s",
                per_second);
  return out;
}

std::string bytes_words(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024 && unit < 4) bytes /= 1024, ++unit;
  char out[32];
  std::snprintf(out, sizeof out,
                unit == 0 || bytes >= 100 ? "%.0f %s" : "%.1f %s", bytes,
                units[unit]);
  return out;
}

std::string seconds_words(double seconds) {
  if (seconds < 0) return "-";
  char out[32];
  if (seconds < 0.0995) {
    std::snprintf(out, sizeof out, "%.1fms", seconds * 1000);
  } else if (seconds < 1) {
    std::snprintf(out, sizeof out, "%.0fms", seconds * 1000);
  } else {
    std::snprintf(out, sizeof out, "%.1fs", seconds);
  }
  return out;
}

// --- lines of a width ---

// One character at the front of `in`: its bytes, and its columns (< 0: not to
// be shown as it is).
std::size_t character(std::string_view in, int* columns) {
  wchar_t wide = 0;
  mbstate_t state{};
  std::size_t n = mbrtowc(&wide, in.data(), in.size(), &state);
  if (n == 0 || n > in.size()) {
    *columns = -1;
    return 1;
  }
  *columns = wcwidth(wide);
  return n;
}

// `text`, made harmless, as exactly `width` columns: cut, or filled up with
// spaces. What this terminal cannot show is a '?', one column.
std::string cell(std::string_view text, int width) {
  const std::string safe = harmless(text);
  std::string_view in = safe;
  std::string out;
  int used = 0;
  while (!in.empty() && used < width) {
    int columns = 0;
    std::size_t bytes = character(in, &columns);
    auto first = static_cast<unsigned char>(in[0]);
    if (columns < 0 || first < 0x20 || first == 0x7f) {
      out += '?';
      columns = 1;
    } else if (used + columns > width) {
      break;
    } else {
      out += in.substr(0, bytes);
    }
    used += columns;
    in.remove_prefix(bytes);
  }
  out.append(static_cast<std::size_t>(std::max(0, width - used)), ' ');
  return out;
}

class Frame {
 public:
  explicit Frame(const TopScreen& screen) : screen_(screen) {}

  bool room() const { return left() > 0; }
  int left() const { return screen_.rows - static_cast<int>(lines_.size()); }
  void line(std::string_view content, const char* look = nullptr) {
    if (!room()) return;
    std::string out = cell(content, screen_.columns);
    while (!out.empty() && out.back() == ' ' && look != kReverse)
      out.pop_back();
    if (screen_.color && look != nullptr && !out.empty()) {
      out = look + out + kPlain;
    }
    lines_.push_back(std::move(out));
  }
  std::vector<std::string> take() { return std::move(lines_); }

 private:
  const TopScreen& screen_;
  std::vector<std::string> lines_;
};

// A table whose first column takes what the others leave.
struct Grid {
  struct Column {
    const char* head;
    int width;
    bool right;
  };
  std::vector<Column> columns;  // without the first
  const char* head;
  int first_min = 8;

  std::string row(const std::vector<std::string>& cells, int width) const {
    int rest = width;
    std::size_t shown = 0;
    // What does not fit is left out from the right.
    while (shown < columns.size() &&
           rest - columns[shown].width - 1 >= first_min) {
      rest -= columns[shown++].width + 1;
    }
    std::string out = cell(cells[0], rest);
    for (std::size_t i = 0; i < shown; ++i) {
      const Column& c = columns[i];
      std::string one = cells[i + 1];
      int have = static_cast<int>(one.size());
      if (c.right && have < c.width) {
        one.insert(0, static_cast<std::size_t>(c.width - have), ' ');
      }
      out += ' ' + cell(one, c.width);
    }
    return out;
  }
  std::string heading(int width) const {
    std::vector<std::string> cells = {head};
    for (const auto& c : columns) cells.emplace_back(c.head);
    return row(cells, width);
  }
};

// --- rates ---

double ended(const Json& totals) {
  double sum = number(at(totals, "succeeded"));
  for (const auto& [code, n] : at(totals, "ended_by_code").items()) {
    sum += number(n);
  }
  return sum;
}

double failed(const Json& totals) {
  double sum = 0;
  for (const auto& [code, n] : at(totals, "attempts_failed_by_code").items()) {
    sum += number(n);
  }
  return sum;
}

struct Rates {
  double enqueued = -1, done = -1, failed = -1, retried = -1, lsn = -1;
};

bool same_run(const View& now, const View* before) {
  return before != nullptr && before->reached && now.reached &&
         now.mono_ms > before->mono_ms &&
         number(at(now.stats, "uptime_ms")) >=
             number(at(before->stats, "uptime_ms"));
}

Rates rates_of(const View& now, const View* before) {
  Rates rates;
  if (!same_run(now, before)) return rates;
  double seconds = static_cast<double>(now.mono_ms - before->mono_ms) / 1000;
  auto per_second = [&](double a, double b) {
    return a < b ? -1 : (a - b) / seconds;
  };
  const Json &t = at(now.stats, "totals"), &u = at(before->stats, "totals");
  rates.enqueued =
      per_second(number(at(t, "enqueued")), number(at(u, "enqueued")));
  rates.done = per_second(ended(t), ended(u));
  rates.failed = per_second(failed(t), failed(u));
  rates.retried =
      per_second(number(at(t, "retried")), number(at(u, "retried")));
  rates.lsn = per_second(number(at(at(now.stats, "log"), "durable_lsn")),
                         number(at(at(before->stats, "log"), "durable_lsn")));
  return rates;
}

const struct {
  const char* word;
  const char* metric;
} kLatencies[] = {{"enqueue", "machina_enqueue_seconds"},
                  {"sync", "machina_wal_sync_seconds"},
                  {"wait", "machina_job_wait_seconds"},
                  {"run", "machina_job_run_seconds"},
                  {"start", "machina_sandbox_start_seconds"}};

double latency(const View& now, const View* before, const char* metric,
               double q) {
  auto found = now.histograms.find(metric);
  if (found == now.histograms.end()) return -1;
  const TopHistogram* old = nullptr;
  if (same_run(now, before)) {
    auto earlier = before->histograms.find(metric);
    if (earlier != before->histograms.end()) old = &earlier->second;
  }
  double recent = quantile(found->second, old, q);
  // Nothing happened since the last look: since the server's start, then.
  return recent >= 0 ? recent : quantile(found->second, nullptr, q);
}

// --- parts of a frame ---

void add_head(Frame& frame, const View& now, const View* before) {
  const Json& s = now.stats;
  std::string first = "machina " + text(at(s, "version")) + "  " + now.where;
  if (!now.reached) {
    frame.line(first, kReverse);
    frame.line("reconnecting: " + now.why, kRed);
    return;
  }
  bool ready = at(s, "ready").is_boolean() && at(s, "ready").get<bool>();
  first += "  " + text(at(s, "profile")) + ", durability " +
           text(at(s, "durability")) + "  up " +
           readable_ms(static_cast<std::int64_t>(number(at(s, "uptime_ms"))));
  frame.line(first, kReverse);
  Rates r = rates_of(now, before);
  frame.line("enqueue " + rate_words(r.enqueued) + "  done " +
             rate_words(r.done) + "  fail " + rate_words(r.failed) +
             "  retry " + rate_words(r.retried) + "  live " +
             count_words(number(at(s, "live_jobs"))) +
             (ready ? "  ready" : "  NOT READY"));
  std::string line;
  for (const auto& l : kLatencies) {
    if (!line.empty()) line += "  ";
    line += l.word + std::string(" ") +
            seconds_words(latency(now, before, l.metric, 0.5)) + "/" +
            seconds_words(latency(now, before, l.metric, 0.99));
  }
  frame.line("p50/p99: " + line);
  const Json &log = at(s, "log"), &workers = at(s, "workers");
  double busy = number(at(workers, "busy"));
  double configured = number(at(workers, "configured"));
  std::string level = text(at(workers, "isolation_level"));
  frame.line("lsn " + count_words(number(at(log, "durable_lsn"))) + " (" +
             rate_words(r.lsn) + ")  lag " +
             bytes_words(number(at(at(s, "history"), "lag_bytes"))) +
             "  disk " + bytes_words(number(at(s, "disk_free_bytes"))) +
             "  workers " + count_words(busy) + "/" + count_words(configured) +
             "  isolation " + (level.empty() ? "-" : level));
  const Json& disk = at(s, "disk");
  const std::string fullness = text(at(disk, "level"));
  if (fullness.empty() || fullness == "ok") return;
  frame.line("disk " + fullness + ": make room; new jobs need " +
                 bytes_words(number(at(disk, "soft_bytes"))) +
                 " free, leases " + bytes_words(number(at(disk, "hard_bytes"))),
             kRed);
}

void more(Frame& frame, std::size_t shown, std::size_t all) {
  if (shown < all) {
    frame.line("  ... " + std::to_string(all - shown) + " more");
  }
}

void add_queues(Frame& frame, const View& now, int columns, int rows) {
  static const Grid kGrid{{{"READY", 7, true},
                           {"RUN", 6, true},
                           {"DEAD", 6, true},
                           {"SCHED", 6, true},
                           {"BLOCKED", 7, true},
                           {"WAITING", 7, true},
                           {"FAILED", 7, true},
                           {"OLDEST", 8, true}},
                          "QUEUE"};
  const Json& queues = at(now.stats, "queues");
  frame.line("");
  frame.line(kGrid.heading(columns), kBold);
  struct Row {
    std::string name;
    const Json* queue;
    double busy;
  };
  std::vector<Row> all;
  if (queues.is_object()) {
    for (const auto& [name, queue] : queues.items()) {
      all.push_back(
          {name, &queue,
           number(at(queue, "ready")) + number(at(queue, "running"))});
    }
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const Row& a, const Row& b) { return a.busy > b.busy; });
  std::size_t fit = static_cast<std::size_t>(std::max(1, rows - 2));
  if (all.size() > fit && fit > 1) --fit;
  std::size_t shown = 0;
  for (; shown < all.size() && shown < fit; ++shown) {
    const Json& q = *all[shown].queue;
    auto n = [&](const char* state) {
      return count_words(number(at(q, state)));
    };
    std::int64_t since = parse_time_ms(text(at(q, "oldest_ready_at")));
    std::string oldest =
        since <= 0 ? "-"
                   : seconds_words(static_cast<double>(std::max<std::int64_t>(
                                       0, now.wall_ms - since)) /
                                   1000);
    frame.line(kGrid.row({all[shown].name, n("ready"), n("running"), n("dead"),
                          n("scheduled"), n("blocked"), n("waiting"),
                          n("failed"), oldest},
                         columns),
               number(at(q, "dead")) > 0 ? kRed : nullptr);
  }
  more(frame, shown, all.size());
}

void add_jobs(Frame& frame, const View& now, int columns, int rows) {
  static const Grid kGrid{{{"FOR", 8, true},
                           {"KIND", 14, false},
                           {"TRY", 3, true},
                           {"WORKER", 15, false},
                           {"QUEUE", 12, false},
                           {"PROGRESS", 24, false}},
                          "RUNNING JOB",
                          36};
  frame.line("");
  frame.line(kGrid.heading(columns), kBold);
  const Json& jobs = at(now.running, "jobs");
  std::size_t all = jobs.is_array() ? jobs.size() : 0, shown = 0;
  std::size_t fit = static_cast<std::size_t>(std::max(1, rows - 2));
  if (all > fit && fit > 1) --fit;
  for (; shown < all && shown < fit; ++shown) {
    const Json& job = jobs[shown];
    std::int64_t since = parse_time_ms(text(at(job, "started_at")));
    const Json& progress = at(job, "progress");
    std::string how = text(at(progress, "message"));
    if (at(progress, "percent").is_number()) {
      how =
          count_words(std::clamp(number(at(progress, "percent")), 0.0, 100.0)) +
          "% " + how;
    }
    frame.line(kGrid.row(
        {text(at(job, "id")),
         since <= 0 ? "-"
                    : seconds_words(static_cast<double>(std::max<std::int64_t>(
                                        0, now.wall_ms - since)) /
                                    1000),
         text(at(job, "kind")), count_words(number(at(job, "attempt"))),
         text(at(job, "worker")), text(at(job, "queue")), how},
        columns));
  }
  more(frame, shown, all);
}

void add_workers(Frame& frame, const View& now, int columns, int rows) {
  static const Grid kGrid{{{"STATE", 8, false},
                           {"LEVEL", 5, false},
                           {"JOB", 36, false},
                           {"PID", 8, true}},
                          "WORKER",
                          16};
  const Json& workers = at(now.workers, "workers");
  frame.line("");
  frame.line(kGrid.heading(columns), kBold);
  std::size_t all = workers.is_array() ? workers.size() : 0, shown = 0;
  std::size_t fit = static_cast<std::size_t>(std::max(1, rows - 2));
  if (all > fit && fit > 1) --fit;
  for (; shown < all && shown < fit; ++shown) {
    const Json& w = workers[shown];
    std::string job = text(at(w, "job")), level = text(at(w, "level"));
    frame.line(kGrid.row(
        {text(at(w, "name")), text(at(w, "state")), level.empty() ? "-" : level,
         job.empty() ? "-" : job, count_words(number(at(w, "pid")))},
        columns));
  }
  more(frame, shown, all);
}

}  // namespace

std::map<std::string, TopHistogram> read_histograms(
    const std::string& metrics) {
  std::map<std::string, TopHistogram> all;
  std::size_t from = 0;
  while (from < metrics.size()) {
    std::size_t to = std::min(metrics.find('\n', from), metrics.size());
    std::string_view line(metrics.data() + from, to - from);
    from = to + 1;
    std::size_t bucket = line.find("_bucket{");
    std::size_t le = line.find("le=\"");
    std::size_t close = line.rfind("} ");
    if (line.empty() || line[0] == '#' || bucket == line.npos ||
        le == line.npos || close == line.npos) {
      continue;
    }
    std::string bound(line.substr(le + 4, line.find('"', le + 4) - le - 4));
    double value =
        std::strtod(std::string(line.substr(close + 2)).c_str(), nullptr);
    TopHistogram& h = all[std::string(line.substr(0, bucket))];
    if (bound == "+Inf") {
      h.count += value;
    } else {
      h.upto[std::strtod(bound.c_str(), nullptr)] += value;
    }
  }
  return all;
}

double quantile(const TopHistogram& now, const TopHistogram* before, double q) {
  double all = now.count - (before != nullptr ? before->count : 0);
  if (all <= 0) return -1;
  double wanted = q * all, below = 0, lower = 0;
  for (const auto& [bound, n] : now.upto) {
    double upto = n;
    if (before != nullptr) {
      auto old = before->upto.find(bound);
      if (old != before->upto.end()) upto -= old->second;
    }
    if (upto >= wanted) {
      double inside = upto - below;
      double share = inside <= 0 ? 1 : (wanted - below) / inside;
      return lower + (bound - lower) * share;
    }
    below = upto;
    lower = bound;
  }
  return lower;  // over the last bound
}

std::vector<std::string> top_frame(const TopSample& sample,
                                   const TopSample* earlier,
                                   const TopScreen& screen) {
  const View now(sample);
  const auto kept = view_of(earlier);
  const View* before = kept ? &*kept : nullptr;
  Frame frame(screen);
  add_head(frame, now, before);
  if (now.stats.is_object()) {
    // Jobs get what queues and workers leave; each is shown a little.
    int left = frame.left();
    int part = std::max(4, left / 3);
    const Json& queues = at(now.stats, "queues");
    const Json& workers = at(now.workers, "workers");
    int q = std::min(part, static_cast<int>(queues.size()) + 2);
    int w = std::min(part, static_cast<int>(workers.size()) + 2);
    add_queues(frame, now, screen.columns, std::max(3, q));
    add_workers(frame, now, screen.columns, std::max(3, w));
    add_jobs(frame, now, screen.columns, std::max(3, frame.left()));
  }
  return frame.take();
}

std::string top_json(const TopSample& sample, const TopSample* earlier) {
  const View now(sample);
  const auto kept = view_of(earlier);
  const View* before = kept ? &*kept : nullptr;
  Json out;
  out["server"] = now.where;
  out["stats"] = now.stats;
  out["workers"] = at(now.workers, "workers");
  out["running"] = at(now.running, "jobs");
  Rates r = rates_of(now, before);
  auto known = [](double v) { return v < 0 ? Json() : Json(v); };
  out["rates"] = {{"enqueued_per_s", known(r.enqueued)},
                  {"done_per_s", known(r.done)},
                  {"failed_per_s", known(r.failed)},
                  {"retried_per_s", known(r.retried)}};
  for (const auto& l : kLatencies) {
    Json one;
    for (double q : {0.5, 0.95, 0.99}) {
      double v = latency(now, nullptr, l.metric, q);
      char name[16];
      std::snprintf(name, sizeof name, "p%.0f_ms", q * 100);
      one[name] = known(v < 0 ? v : v * 1000);
    }
    out["latency"][l.word] = one;
  }
  return out.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace machina::cli
