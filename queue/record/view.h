// queue/record/view.h
//
// Builds a JobView from the records that a job left in the log: what its body
// says, what its end says, what it waits for. The live part comes from
// Core::look(); these fill in the rest.

#pragma once

#include "queue/base/job.h"
#include "queue/record/record.h"

namespace machina {

// What the client asked for. Does not touch state, attempt or times that live
// entries have newer values of, except created_ms and, where it is 0,
// run_at_ms.
void fill_from_body(const EnqueueRecord& body, bool with_payload,
                    JobView* view);

// How it ended: state, attempt, times, outcome.
void fill_from_end(const EndRecord& end, Millis finished_ms, JobView* view);

// A BlockRecord or UnblockRecord that the live entry points to.
void fill_from_note(const Record& note, JobView* view);

// All of a fresh view: of a job that was enqueued just now, by its record.
void fill_from_new(EnqueueRecord&& body, bool fsync, bool with_payload,
                   JobView* view);

}  // namespace machina
