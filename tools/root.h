// tools/root.h
//
// MACHINA_ROOT: the one directory that holds all state. Everything here is a
// question asked before anything is opened, so that a wrong root is one clear
// line and not half a queue in somebody's home.
//
//   R1  A directory that others need (/, /home, /var/tmp, a user's home ...)
//       is refused, by whatever path it was reached.
//   R2  So is one that is not ours, or that others may write.
//   R3  dev makes the root (0700); prod wants it made on purpose.
//   R4  A file system that may forget (tmpfs, overlay) or whose locks and
//       syncs are another machine's word (NFS and its like) is refused in prod
//       unless it is asked for by name, and warned of in dev.
//   R5  Its Unix socket's path fits into a sockaddr_un.
//   R6  Nobody but root and ourselves could put another directory in its
//       place: every component and link on the way is looked at (trust.h).

#pragma once

#include <string>
#include <vector>

#include "queue/base/result.h"

namespace machina {

constexpr std::size_t kSocketPathBytesMax = 107;

struct Root {
  std::string path;         // absolute, no symbolic link in it
  std::string socket_path;  // <root>/machina.sock
  std::string file_system;  // "ext4", "tmpfs" ..., or its magic number
  std::vector<std::string> warnings;
};

// Makes (R3) and checks the root and makes the directories below it that every
// part expects: queue history logs ops artifacts repos mirrors, 0700.
Result<Root> prepare_root(const std::string& path, bool prod, bool unsafe_fs);

// The same checks, making nothing: whether prepare_root() would succeed just
// now. Of a root that dev would make, the directory it would be made in.
Result<void> examine_root(const std::string& path, bool prod, bool unsafe_fs);

// The same path as others see it, without making or demanding anything: for
// clients that look for the socket.
std::string root_socket(const std::string& path);

// What statfs(2) calls the file system of `path`.
std::string file_system_name(const std::string& path);
// Why that one keeps no promise (R4); empty: nothing is known against it.
std::string file_system_fault(const std::string& path);

}  // namespace machina
