// server/api/patch_rebuild.h
//
// Fills the store of patches anew from the shard's history, where that store
// was lost or is older than this version. The loop's thread only; what touches
// the store runs on a file thread.
//
//   look() -> begin -> a page of ids -> each job -> add -> ... -> end
//                   \-> what fails ends the pass; it is begun again later
//
//   PR1  A store that was lost has every patch again that history still has
//        (PatchRoutes.AMissingStoreIsFilledFromTheHistory).
//   PR2  One request and one piece of work at a time: clients wait for at most
//        one of them (PatchRebuildTest.PatchesComeFirstAndOneRequestAtATime).
//   PR3  After stop() nothing is asked and nothing is written any more
//        (PatchRebuildTest.NothingIsAskedAfterStop).

#pragma once

#include <functional>
#include <memory>
#include <string>

#include "queue/base/clock.h"
#include "queue/shard/shard.h"
#include "server/api/patches.h"
#include "server/api/store.h"
#include "server/http/loop.h"

namespace machina {

class PatchRebuild {
 public:
  // Asks the shard on the server's own behalf.
  using Ask = std::function<void(Request, std::function<void(Response)>)>;

  PatchRebuild(Patches& patches, FileThreads& threads, Loop& loop, Clock& clock,
               Ask ask);
  // Begins where a rebuild is owed. Now and then.
  void look();
  void stop() { stopped_ = true; }

 private:
  struct Pass;
  void read_page(std::shared_ptr<Pass> pass);
  void read_next(std::shared_ptr<Pass> pass);
  void end(std::shared_ptr<Pass> pass);
  void leave(const std::string& why);
  void on_patches(std::function<Result<void>(Patches&)> work,
                  std::function<void()> then);

  Patches& patches_;
  FileThreads& threads_;
  Loop& loop_;
  Clock& clock_;
  Ask ask_;
  bool running_ = false, stopped_ = false;
  Millis next_at_ = 0;
};

}  // namespace machina
