#include "server/api/patch_rebuild.h"

#include "queue/base/logger.h"
#include "server/api/problem.h"

namespace machina {
namespace {

constexpr Millis kRebuildRetryMs = 60'000;
constexpr int kRebuildPage = 1000;

EndedJob ended_job(const JobView& view) {
  EndedJob job;
  job.id = view.id;
  job.kind = view.kind;
  job.tenant = view.tenant;
  job.payload = view.payload;
  job.result = view.result;
  job.state = view.state;
  job.message = view.error_message;
  job.fence = view.fence;
  job.artifacts = view.artifacts;
  job.created_ms = view.created_ms;
  job.finished_ms = view.finished_ms;
  return job;
}

}  // namespace

// Patches that history still has, one request at a time: first all patch.apply
// jobs, then all patch.rollback jobs, which need the former's rows.
struct PatchRebuild::Pass {
  bool rollbacks = false;
  std::string cursor;
  std::vector<JobId> ids;  // of the page, to be read
  std::uint64_t kept = 0;
};

PatchRebuild::PatchRebuild(Patches& patches, FileThreads& threads, Loop& loop,
                           Clock& clock, Ask ask)
    : patches_(patches),
      threads_(threads),
      loop_(loop),
      clock_(clock),
      ask_(std::move(ask)) {}

void PatchRebuild::look() {
  if (running_ || stopped_ || clock_.mono_ms() < next_at_ ||
      !patches_.rebuild_owed()) {
    return;
  }
  running_ = true;
  auto pass = std::make_shared<Pass>();
  on_patches([](Patches& patches) { return patches.begin_rebuild(); },
             [this, pass] { read_page(pass); });
}

// Runs `work` on a store thread and goes on with `then`; where it failed the
// rebuild is left and begun again later.
void PatchRebuild::on_patches(std::function<Result<void>(Patches&)> work,
                              std::function<void()> then) {
  Patches* patches = &patches_;
  bool taken = threads_.run(
      [this, patches, work = std::move(work), then = std::move(then)] {
        auto done = std::make_shared<Result<void>>(work(*patches));
        loop_.post([this, done, then] {
          if (stopped_) return;
          if (*done) return then();
          leave(done->error().what);
        });
      });
  if (!taken) leave("too many file operations are waiting");
}

void PatchRebuild::leave(const std::string& why) {
  LogLine(Severity::warn, "patches_rebuild",
          "tried again in " + std::to_string(kRebuildRetryMs / 1000) +
              " s: " + why);
  running_ = false;
  next_at_ = clock_.mono_ms() + kRebuildRetryMs;
}

void PatchRebuild::read_page(std::shared_ptr<Pass> pass) {
  if (stopped_) return;
  Request request;
  ListQuery list;
  list.kind = pass->rollbacks ? kRollbackKind : kPatchKind;
  list.states = {State::succeeded, State::failed, State::cancelled,
                 State::dead};
  list.limit = kRebuildPage;
  list.cursor = pass->cursor;
  request.what = std::move(list);
  request.with_payload = false;
  ask_(std::move(request), [this, pass](Response response) {
    if (stopped_) return;
    if (auto p = failure_of(response)) return leave(p->detail);
    for (const JobView& view : response.views) pass->ids.push_back(view.id);
    pass->cursor = response.cursor;
    read_next(pass);
  });
}

void PatchRebuild::read_next(std::shared_ptr<Pass> pass) {
  if (stopped_) return;
  if (pass->ids.empty()) {
    if (pass->cursor.empty()) {
      if (pass->rollbacks) return end(pass);
      pass->rollbacks = true;
    }
    return read_page(pass);
  }
  Request request;
  GetQuery get;
  get.id = pass->ids.back();
  pass->ids.pop_back();
  request.what = get;
  ask_(std::move(request), [this, pass](Response response) {
    if (stopped_) return;
    if (auto p = failure_of(response)) return leave(p->detail);
    // It may have expired, or live again.
    if (response.views.empty() || response.views.front().id.is_nil() ||
        !is_final(response.views.front().state)) {
      return read_next(pass);
    }
    ++pass->kept;
    auto job = std::make_shared<EndedJob>(ended_job(response.views.front()));
    on_patches([job](Patches& patches) { return patches.add(*job); },
               [this, pass] { read_next(pass); });
  });
}

void PatchRebuild::end(std::shared_ptr<Pass> pass) {
  on_patches([](Patches& patches) { return patches.end_rebuild(); },
             [this, pass] {
               running_ = false;
               if (pass->kept == 0) return;
               LogLine(Severity::info, "patches_rebuilt",
                       "rebuilt from " + std::to_string(pass->kept) +
                           " jobs of the history");
             });
}

}  // namespace machina
