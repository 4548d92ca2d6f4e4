// run_server() with the real shard: the directory, the storage and the log of
// <root>/queue.

#include <malloc.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>

#include "queue/base/storage.h"
#include "server/api/server.h"
#include "server/http/loop.h"

namespace machina {

namespace {

// Each batch of requests takes some memory and gives it back together; by
// default the heap would shrink and grow with every batch, a page fault for
// each page.
void keep_heap() {
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
  mallopt(M_TOP_PAD, 4 << 20);
  mallopt(M_MMAP_THRESHOLD, 4 << 20);
}

}  // namespace

Result<void> can_listen(const std::string& host, int port) {
  auto loop = Loop::make();
  if (!loop) return loop.error();
  auto bound = (*loop)->listen_tcp(host, port);
  if (!bound) return bound.error();
  return {};
}

int run_server(const ServerOptions& options) {
  keep_heap();
  std::unique_ptr<Storage> storage;  // outlives the shard
  bool locked = false;
  ServerHooks hooks;
  hooks.open_shard =
      [&](RecoveryReport* report) -> Result<std::unique_ptr<Shard>> {
    std::string dir = options.root + "/queue";
    if (mkdir(dir.c_str(), 0700) != 0 && errno != EEXIST) {
      return Error{Code::io, "mkdir " + dir + ": " + std::strerror(errno)};
    }
    auto opened = open_posix_storage(dir);
    if (!opened) return opened.error();
    storage = std::move(*opened);
    ShardOptions shard = options.shard;
    shard.log.on_locked = [&] {
      locked = true;
      if (options.events.locked) options.events.locked();
    };
    if (shard.history_dir.empty()) {
      shard.history_dir = options.root + "/history";
    }
    return Shard::open(*storage, system_clock(), system_random(), shard,
                       report);
  };
  int code = run_server(options, hooks);
  // What another server keeps on this root is not ours to remove.
  if (locked && options.events.left) options.events.left();
  return code;
}

}  // namespace machina
