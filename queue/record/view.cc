#include "queue/record/view.h"

#include <type_traits>
#include <utility>

namespace machina {

namespace {

// `part` of a body that is given up, or a copy of one that is not.
template <class Body>
void take(auto* to, auto& part) {
  if constexpr (std::is_const_v<Body>) {
    *to = part;
  } else {
    *to = std::move(part);
  }
}

template <class Body>
void fill(Body& body, bool with_payload, JobView* view) {
  auto& job = body.job;
  view->id = body.id;
  take<Body>(&view->kind, job.kind);
  take<Body>(&view->queue, job.queue);
  take<Body>(&view->tenant, job.tenant);
  view->priority = job.priority;
  view->max_attempts = body.attempt + job.max_attempts;  // a retry renews them
  view->created_ms = body.created_ms;
  // Of a scheduled job the live entry knows better: it may wait for a retry.
  if (view->run_at_ms == 0 || view->state != State::scheduled) {
    view->run_at_ms = job.run_at_ms != 0 ? job.run_at_ms : body.created_ms;
  }
  view->timeout_ms = job.timeout_ms;
  if (with_payload) take<Body>(&view->payload, job.payload);
  take<Body>(&view->concurrency_key, job.concurrency_key);
  view->concurrency_limit = job.concurrency_limit;
  view->kind_key = job.kind_key;
  take<Body>(&view->labels, job.labels);
  take<Body>(&view->dedup_key, job.dedup_key);
  take<Body>(&view->depends_on, job.depends_on);
  view->min_level = job.min_level;
  take<Body>(&view->sandbox, job.sandbox);
  take<Body>(&view->traceparent, job.traceparent);
  take<Body>(&view->request_id, job.request_id);
}

}  // namespace

void fill_from_body(const EnqueueRecord& body, bool with_payload,
                    JobView* view) {
  fill(body, with_payload, view);
}

void fill_from_end(const EndRecord& end, Millis finished_ms, JobView* view) {
  const Outcome& outcome = end.outcome;
  view->state = end.state;
  view->attempt = end.attempt;
  view->started_ms = end.started_ms;
  view->finished_ms = finished_ms;
  view->result = outcome.result;
  view->isolation = outcome.isolation;
  view->usage = outcome.usage;
  view->side_effects = outcome.side_effects;
  view->artifacts = outcome.artifacts;
  view->error_code = outcome.code;
  if (outcome.code != EndCode::none) {
    view->error_message = outcome.message;
    view->error_attempt = end.attempt;
  }
  view->worker = end.worker;
  view->fence = end.fence;
}

void fill_from_note(const Record& note, JobView* view) {
  if (auto* block = std::get_if<BlockRecord>(&note.body)) {
    view->blocked_reason = block->reason;
    view->blocked_data = block->data;
    view->blocked_token = block->token;
  } else if (auto* unblock = std::get_if<UnblockRecord>(&note.body)) {
    view->input = unblock->input;
  }
}

void fill_from_new(EnqueueRecord&& body, bool fsync, bool with_payload,
                   JobView* view) {
  fill(body, with_payload, view);
  view->state = body.state;
  view->attempt = body.attempt;
  view->fsync = fsync;
}

}  // namespace machina
