#include "queue/base/fd.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cerrno>
#include <thread>

namespace machina {
namespace {

bool is_open(int fd) { return ::fcntl(fd, F_GETFD) >= 0; }

Fd memory(std::string_view bytes) {
  Fd fd(memfd_create("test", MFD_CLOEXEC));
  EXPECT_TRUE(write_all(fd.get(), bytes));
  EXPECT_EQ(::lseek(fd.get(), 0, SEEK_SET), 0);
  return fd;
}

TEST(FdTest, ADescriptorHasOneOwner) {
  Fd a = memory("a"), b = memory("b");
  const int first = a.get(), second = b.get();
  a = std::move(b);
  EXPECT_FALSE(b);
  EXPECT_EQ(a.get(), second);
  EXPECT_FALSE(is_open(first));
  const Fd c(a.release());
  EXPECT_FALSE(a);
  EXPECT_TRUE(is_open(second));
  EXPECT_TRUE(c);
}

TEST(FdTest, EveryByteGoesThroughAPipe) {
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  Fd out(ends[0]), in(ends[1]);
  const std::string sent(1 << 20, 'x');  // more than a pipe holds
  std::thread writer([&] {
    EXPECT_TRUE(write_all(in.get(), sent));
    in.reset();
  });
  std::string got(sent.size(), '\0');
  EXPECT_TRUE(read_all(out.get(), got.data(), got.size()));
  writer.join();
  EXPECT_EQ(got, sent);
  EXPECT_FALSE(read_all(out.get(), got.data(), 1));  // the end
  EXPECT_EQ(errno, 0);
  EXPECT_FALSE(read_all(-1, got.data(), 1));
  EXPECT_EQ(errno, EBADF);
  EXPECT_FALSE(write_all(out.get(), "x"));  // opened for reading
}

TEST(FdTest, AWriteAtAnOffsetLeavesTheRest) {
  const Fd fd = memory("abcdef");
  EXPECT_TRUE(write_all_at(fd.get(), "XY", 2));
  const auto text = read_file(fd.get(), 6, "f");
  ASSERT_TRUE(text);
  EXPECT_EQ(*text, "abXYef");
}

TEST(FdTest, AFileIsReadUpToItsBound) {
  const Fd fd = memory("abcdef");
  const auto over = read_file(fd.get(), 5, "the file");
  ASSERT_FALSE(over);
  EXPECT_EQ(over.error().code, Code::too_large);
  EXPECT_EQ(over.error().what, "the file: more than 5 bytes");
  const Fd dir(::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  const auto other = read_file(dir.get(), 5, "/");
  ASSERT_FALSE(other);
  EXPECT_EQ(other.error().what, "/: not a regular file");
}

}  // namespace
}  // namespace machina
