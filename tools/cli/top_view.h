// tools/cli/top_view.h
//
// What `machina top` shows, without a terminal: two samples of a server make
// the lines of one frame. Text that a client or a job chose is made harmless
// before it is shown.
//
//   T1  A frame has at most `rows` lines of at most `columns` columns, whatever
//       was sampled and however small the terminal is.
//   T2  No byte below 0x20 or of a C1 control is in a line but the colours that
//       are put there here.
//   T3  Counters that fell (the server restarted) show no rate for one frame.
//
// tests/tools/top_test.cc

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace machina::cli {

// A histogram of /metrics, its label sets added up.
struct TopHistogram {
  std::map<double, double> upto;  // by upper bound, cumulative
  double count = 0;
};

struct TopSample {
  bool reached = false;
  std::string why;           // why not
  std::string where;         // the server's address
  std::int64_t mono_ms = 0;  // when it was taken, and
  std::int64_t wall_ms = 0;
  // What was answered, as text: /stats, /v1/workers, /v1/jobs?state=running.
  std::string stats, workers, running;
  std::map<std::string, TopHistogram> histograms;  // by name
};

// The histograms in a text of /metrics.
std::map<std::string, TopHistogram> read_histograms(const std::string& metrics);
// Of what was counted between the two; < 0: nothing was.
double quantile(const TopHistogram& now, const TopHistogram* before, double q);

struct TopScreen {
  int rows = 24, columns = 80;
  bool color = false;
};
// `before`: of some time ago, or null.
std::vector<std::string> top_frame(const TopSample& now,
                                   const TopSample* before,
                                   const TopScreen& screen);
// The same for programs: what was sampled, with rates and latencies.
std::string top_json(const TopSample& now, const TopSample* before);

}  // namespace machina::cli
