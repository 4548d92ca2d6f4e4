// How the store of patches is filled anew, with a shard that the test plays.

#include "server/api/patch_rebuild.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

namespace machina::test {
namespace {

class PatchRebuildTest : public testing::Test {
 protected:
  void SetUp() override {
    char path[] = "/tmp/machina-rebuild-XXXXXX";
    dir_ = mkdtemp(path);
    auto store = Store::open(dir_);
    ASSERT_TRUE(store);
    store_ = std::move(*store);
    auto patches = Patches::open(dir_ + "/patches", store_.get());
    ASSERT_TRUE(patches);
    patches_ = std::move(*patches);
    auto loop = Loop::make(false);
    ASSERT_TRUE(loop);
    loop_ = std::move(*loop);
    threads_ = std::make_unique<FileThreads>(1);
    rebuild_ = std::make_unique<PatchRebuild>(
        *patches_, *threads_, *loop_, system_clock(),
        [this](Request request, std::function<void(Response)> then) {
          asked(std::move(request), std::move(then));
        });
  }
  void TearDown() override {
    threads_.reset();
    loop_.reset();
    std::filesystem::remove_all(dir_);
  }
  // Answers in a later turn, as the shard does.
  void asked(Request request, std::function<void(Response)> then) {
    EXPECT_EQ(open_++, 0) << "one at a time (PR2)";
    ++asks_;
    Response response;
    if (const auto* list = std::get_if<ListQuery>(&request.what)) {
      kinds_.push_back(list->kind);
      response.views.resize(2);
    } else {
      ++reads_;  // answered as a job that has expired
    }
    loop_->post([this, then = std::move(then), response]() mutable {
      --open_;
      if (stop_early_) rebuild_->stop();
      then(std::move(response));
      if (stop_early_) loop_->post([this] { loop_->stop(); });
    });
  }

  std::string dir_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<Patches> patches_;
  std::unique_ptr<Loop> loop_;
  std::unique_ptr<FileThreads> threads_;
  std::unique_ptr<PatchRebuild> rebuild_;
  int open_ = 0, asks_ = 0, reads_ = 0;
  bool stop_early_ = false;
  std::vector<std::string> kinds_;
};

TEST_F(PatchRebuildTest, PatchesComeFirstAndOneRequestAtATime) {
  loop_->every(10, [this] {
    if (!patches_->rebuild_owed()) loop_->stop();
  });
  rebuild_->look();
  rebuild_->look();  // one pass at a time, too
  loop_->run();
  EXPECT_EQ(kinds_, (std::vector<std::string>{std::string(kPatchKind),
                                              std::string(kRollbackKind)}));
  EXPECT_EQ(reads_, 4);
  rebuild_->look();  // none is owed
  EXPECT_EQ(asks_, 6);
}

TEST_F(PatchRebuildTest, NothingIsAskedAfterStop) {
  stop_early_ = true;
  rebuild_->look();
  loop_->run();
  EXPECT_EQ(asks_, 1);
  EXPECT_TRUE(patches_->rebuild_owed());
}

}  // namespace
}  // namespace machina::test
