#include "server/api/store.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>

namespace machina {
namespace {

namespace fs = std::filesystem;

class StoreTest : public testing::Test {
 protected:
  StoreTest() {
    char path[] = "/tmp/machina-store-XXXXXX";
    root_ = mkdtemp(path);
    open();
  }
  ~StoreTest() override { fs::remove_all(root_); }
  void open() {
    auto store = Store::open(root_);
    ASSERT_TRUE(store);
    store_ = std::move(*store);
  }
  Result<Artifact> put(Fence fence, const JobId& job, const std::string& name,
                       const std::string& bytes) {
    auto upload = store_->begin_upload(fence, name);
    EXPECT_TRUE(upload);
    EXPECT_TRUE((*upload)->append(bytes));
    return (*upload)->commit(job);
  }
  std::string read(const OpenedFile& file) {
    auto bytes = read_piece(*file.fd, 0, 1 << 20);
    return bytes ? *bytes : "";
  }
  std::size_t objects() {
    std::size_t n = 0;
    for (auto& e :
         fs::recursive_directory_iterator(root_ + "/artifacts/objects")) {
      n += e.is_regular_file();
    }
    return n;
  }
  // All that the sweep would ask about if an hour and more had passed.
  std::vector<Store::Kept> old() {
    std::vector<Store::Kept> all;
    for (int b = 0; b < 256; ++b) {
      for (auto& k : store_->kept(b, std::time(nullptr) + kSweepAgeS + 10)) {
        all.push_back(k);
      }
    }
    return all;
  }

  std::string root_;
  std::unique_ptr<Store> store_;
  JobId one_ = make_job_id(1000, 1, 0x1111),
        two_ = make_job_id(1000, 1, 0x2222);
};

TEST_F(StoreTest, TheLaterOfTwoUploadsOfOneNameCounts) {
  Fence fence = make_fence(1, 5);
  ASSERT_TRUE(put(fence, one_, "a", "first"));
  ASSERT_TRUE(put(fence, one_, "a", "second"));
  ASSERT_TRUE(put(fence, one_, "b", "first"));
  ASSERT_TRUE(put(fence, one_, "b", "first"));
  open();  // nothing of it was only in memory
  auto artifacts = store_->artifacts(fence);
  ASSERT_TRUE(artifacts);
  ASSERT_EQ(artifacts->size(), 2u);
  EXPECT_EQ((*artifacts)[0].name, "a");
  auto file = store_->open_artifact((*artifacts)[0]);
  ASSERT_TRUE(file);
  EXPECT_EQ(read(*file), "second");
  EXPECT_EQ(store_->artifacts(make_fence(1, 6))->size(), 0u);
}

TEST_F(StoreTest, AnUploadThatIsGivenUpLeavesNothing) {
  {
    auto upload = store_->begin_upload(make_fence(1, 1), "a");
    ASSERT_TRUE(upload);
    ASSERT_TRUE((*upload)->append("half"));
  }
  EXPECT_TRUE(fs::is_empty(root_ + "/artifacts/tmp"));
  std::ofstream(root_ + "/artifacts/tmp/77") << "left by a crash";
  open();
  EXPECT_TRUE(fs::is_empty(root_ + "/artifacts/tmp"));
}

TEST_F(StoreTest, DigestIsOfTheBytes) {
  auto artifact = put(make_fence(1, 1), one_, "abc", "abc");
  ASSERT_TRUE(artifact);
  EXPECT_EQ(artifact->sha256,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(artifact->size, 3u);
}

TEST_F(StoreTest, ArtifactsOfAnAttemptAreBounded) {
  Fence fence = make_fence(1, 1);
  for (std::size_t i = 0; i < kArtifactsStagedMax; ++i) {
    ASSERT_TRUE(put(fence, one_, "a" + std::to_string(i), "x"));
  }
  auto more = put(fence, one_, "more", "x");
  ASSERT_FALSE(more);
  EXPECT_EQ(more.error().code, Code::too_large);
  EXPECT_TRUE(put(fence, one_, "a0", "y"));  // in the place of another
}

TEST_F(StoreTest, LogTakesOnlyWhatJoins) {
  Fence fence = make_fence(1, 1);
  EXPECT_EQ(*store_->write_log(one_, 1, fence, 0, "abc"), 3u);
  EXPECT_EQ(*store_->write_log(one_, 1, fence, 1, "bc"), 3u);
  EXPECT_EQ(store_->write_log(one_, 1, fence, 4, "x").error().code,
            Code::invalid);
  EXPECT_EQ(store_->write_log(one_, 1, fence, kLogBytesMax, "x").error().code,
            Code::invalid);
  EXPECT_EQ(read(*store_->open_log(one_, 1)), "abc");
  EXPECT_EQ(store_->open_log(two_, 0).error().code, Code::not_found);
  // Given back and leased again under the same number: the later counts.
  EXPECT_TRUE(store_->write_log(one_, 1, make_fence(1, 9), 0, "later"));
  EXPECT_TRUE(store_->write_log(one_, 2, make_fence(2, 0), 0, "second"));
  EXPECT_EQ(read(*store_->open_log(one_, 1)), "later");
  EXPECT_EQ(read(*store_->open_log(one_, 0)), "second");
}

TEST_F(StoreTest, SweepTakesWhatBelongsToNobody) {
  Fence first = make_fence(1, 1), second = make_fence(1, 2);
  ASSERT_TRUE(put(first, one_, "same", "shared"));
  ASSERT_TRUE(put(first, one_, "own", "of one"));
  ASSERT_TRUE(put(second, two_, "same", "shared"));
  ASSERT_TRUE(store_->write_log(one_, 1, first, 0, "log"));
  EXPECT_EQ(objects(), 2u);
  // What is young is not looked at.
  for (int b = 0; b < 256; ++b) {
    EXPECT_TRUE(store_->kept(b, std::time(nullptr)).empty());
  }
  auto all = old();
  ASSERT_EQ(all.size(), 3u);
  for (const auto& kept : all) {
    if (kept.job == one_) store_->forget(kept);
  }
  EXPECT_EQ(objects(), 1u);
  EXPECT_EQ(store_->open_log(one_, 0).error().code, Code::not_found);
  EXPECT_TRUE(store_->artifacts(first)->empty());
  auto left = store_->artifacts(second);
  ASSERT_EQ(left->size(), 1u);
  EXPECT_EQ(read(*store_->open_artifact((*left)[0])), "shared");
  for (const auto& kept : old()) store_->forget(kept);
  EXPECT_EQ(objects(), 0u);
  EXPECT_TRUE(old().empty());
}

}  // namespace
}  // namespace machina
