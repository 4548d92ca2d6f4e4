#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <vector>

#include "queue/base/clock.h"
#include "queue/base/storage.h"

namespace machina {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class PosixStorageTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char path[] = "/var/tmp/machina-storage-XXXXXX";
    ASSERT_NE(::mkdtemp(path), nullptr);
    path_ = path;
    auto storage = open_posix_storage(path_);
    ASSERT_TRUE(storage);
    storage_ = std::move(*storage);
  }
  void TearDown() override { std::filesystem::remove_all(path_); }

  std::string path_;
  std::unique_ptr<Storage> storage_;
};

TEST_F(PosixStorageTest, FilesAndNames) {
  ASSERT_TRUE(storage_->make_dir("wal"));
  ASSERT_TRUE(storage_->make_dir("wal")) << "it exists: ok";
  auto file = storage_->open("wal/b", OpenMode::create);
  ASSERT_TRUE(file);
  std::vector<std::byte> bytes(5000, std::byte{3}), back(6000);
  ASSERT_TRUE((*file)->write_at(100, bytes));
  ASSERT_TRUE((*file)->sync());
  EXPECT_EQ(*(*file)->size(), 5100u);
  EXPECT_EQ(*(*file)->read_at(100, back), 5000u) << "to the end";
  EXPECT_EQ(*(*file)->read_at(9000, back), 0u);
  EXPECT_FALSE(storage_->open("wal/b", OpenMode::create)) << "must not exist";
  auto missing = storage_->open("wal/c", OpenMode::read);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, Code::not_found);
  EXPECT_THAT(missing.error().what, HasSubstr("wal/c"));
  ASSERT_TRUE(storage_->rename("wal/b", "wal/a"));
  ASSERT_TRUE(storage_->sync_dir("wal"));
  EXPECT_THAT(*storage_->list("wal"), ElementsAre("a"));
  ASSERT_TRUE(storage_->remove("wal/a"));
  EXPECT_TRUE(storage_->list("wal")->empty());
  EXPECT_GT(*storage_->free_bytes(), 0u);
}

TEST_F(PosixStorageTest, NamesDoNotLeaveTheDirectory) {
  for (const char* name : {"../x", "/etc/hostname", "", "wal/../../x"}) {
    EXPECT_FALSE(storage_->open(name, OpenMode::read)) << name;
    EXPECT_FALSE(storage_->open(name, OpenMode::create)) << name;
    EXPECT_FALSE(storage_->rename("a", name)) << name;
  }
  std::filesystem::create_symlink("/etc/hostname", path_ + "/link");
  EXPECT_FALSE(storage_->open("link", OpenMode::read));
}

TEST_F(PosixStorageTest, WhatIsNoFileIsNotWaitedFor) {
  ASSERT_TRUE(storage_->make_dir("wal"));
  ASSERT_EQ(mkfifo((path_ + "/wal/fifo").c_str(), 0600), 0);
  for (OpenMode mode : {OpenMode::read, OpenMode::settled, OpenMode::write}) {
    auto opened = storage_->open("wal/fifo", mode);
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, Code::io);
    EXPECT_NE(opened.error().what.find("no regular file"), std::string::npos);
  }
}

TEST_F(PosixStorageTest, DurableWritesFromAnyMemoryAndOddReads) {
  ASSERT_TRUE(storage_->open("f", OpenMode::create));
  auto file = storage_->open("f", OpenMode::durable);
  ASSERT_TRUE(file) << file.error().what;
  std::vector<std::byte> memory(3 * 4096 + 1);
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = std::byte(i * 31);
  auto odd = std::span<const std::byte>(memory).subspan(1);
  ASSERT_TRUE((*file)->write_at(4096, odd));
  std::vector<std::byte> back(5000);
  ASSERT_EQ(*(*file)->read_at(4096 + 77, back), 5000u);
  EXPECT_TRUE(std::equal(back.begin(), back.end(), odd.begin() + 77));
  // A buffered reader that looked before sees a later direct write.
  auto reader = storage_->open("f", OpenMode::read);
  ASSERT_EQ(*(*reader)->read_at(4096, back), 5000u);
  std::vector<std::byte> other(4096, std::byte{9});
  ASSERT_TRUE((*file)->write_at(4096, other));
  ASSERT_EQ(*(*reader)->read_at(4096, back), 5000u);
  EXPECT_EQ(back[0], std::byte{9});
  auto settled = storage_->open("f", OpenMode::settled);
  ASSERT_TRUE(settled) << settled.error().what;
  ASSERT_EQ(*(*settled)->read_at(4096, back), 5000u);
  EXPECT_EQ(back[4095], std::byte{9});
}

TEST_F(PosixStorageTest, WhatTheSystemRefusesIsAnErrorThatNamesTheFile) {
  auto file = storage_->open("f", OpenMode::create);
  ASSERT_TRUE(file);
  std::byte one{1};
  auto refused = (*file)->write_at(1ull << 62, {&one, 1});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Code::io);
  EXPECT_THAT(refused.error().what, HasSubstr(path_ + "/f"));
}

TEST_F(PosixStorageTest, LockIsOneOwners) {
  auto lock = storage_->lock("LOCK");
  ASSERT_TRUE(lock);
  auto second = storage_->lock("LOCK");
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, Code::conflict);
  lock->reset();
  EXPECT_TRUE(storage_->lock("LOCK"));
}

TEST(FileSystem, KindsAndWhetherTheyKeepPromises) {
  EXPECT_EQ(filesystem_kind("/dev/shm"), "tmpfs");
  EXPECT_EQ(filesystem_kind("/no/such/path"), "unknown");
  EXPECT_FALSE(filesystem_keeps_promises("tmpfs"));
  EXPECT_FALSE(filesystem_keeps_promises("nfs"));
  EXPECT_FALSE(filesystem_keeps_promises("overlay"));
  EXPECT_TRUE(filesystem_keeps_promises("ext4"));
  EXPECT_TRUE(filesystem_keeps_promises("0x12345"));
}

TEST(SystemClock, RunsAndRandomDiffers) {
  EXPECT_GT(system_clock().wall_ms(), 1'600'000'000'000);
  Millis before = system_clock().mono_ms();
  EXPECT_GE(system_clock().mono_ms(), before);
  std::vector<std::uint64_t> seen;
  for (int i = 0; i < 100; ++i) seen.push_back(system_random().next());
  std::sort(seen.begin(), seen.end());
  EXPECT_EQ(std::unique(seen.begin(), seen.end()), seen.end());
}

}  // namespace
}  // namespace machina
