// queue/history/end_sink.h
//
// Who keeps something of finished jobs beside history, and for longer: it is
// given what history is given, just before.
//
//   S1  Changes come in the order of the log, and only durable ones.
//   S2  At least once: history's applied() moves only when take() has
//       succeeded, so that after a crash in between the same changes come
//       again. What is made of them must come out the same (by id and lsn).
//   S3  After an Error the same changes come again in a while, and history
//       waits with them. A sink that cannot go on for long has to give up by
//       itself: a queue must not stand still for it.
//   S4  A job whose bytes are damaged in the log is left out, as in history.

#pragma once

#include <vector>

#include "queue/base/result.h"
#include "queue/history/history.h"

namespace machina {

class EndSink {
 public:
  virtual ~EndSink() = default;
  // On the history thread; blocks it for as long as it takes.
  virtual Result<void> take(const std::vector<HistoryChange>& changes) = 0;
};

}  // namespace machina
