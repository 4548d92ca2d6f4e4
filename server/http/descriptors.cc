#include "server/http/descriptors.h"

#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace machina {
namespace {

constexpr int kUsefulMax = 1 << 20;  // more is no use, and some kernels' most

}  // namespace

std::string Descriptors::text() const {
  return "descriptors " + std::to_string(limit) +
         (before == limit ? "" : " (were " + std::to_string(before) + ")") +
         ": " + std::to_string(connections) + " connections, " +
         std::to_string(local) + " local, " + std::to_string(files) +
         " files, " + std::to_string(kOwnDescriptors) + " own";
}

Result<Descriptors> share_descriptors(int limit, int connections, int workers) {
  const int rest = limit - kOwnDescriptors;
  const int for_workers = 3 * workers + 8;  // and an operator's few
  if (limit < kDescriptorsMin || for_workers > rest / 2) {
    const int needed =
        std::max(kDescriptorsMin, kOwnDescriptors + 2 * for_workers);
    return Error{Code::invalid,
                 "open files: the hard limit is " + std::to_string(limit) +
                     "; with " + std::to_string(workers) +
                     " workers at least " + std::to_string(needed) +
                     " are needed, and 8192 are good: ulimit -Hn, or "
                     "LimitNOFILE= in the unit"};
  }
  Descriptors d;
  d.before = d.limit = limit;
  d.files = std::min(kOpenFilesMax, rest / 6);
  d.local = std::min(kLocalConnectionsMax, std::max(rest / 4, for_workers));
  d.connections = std::min(connections, rest - d.files - d.local);
  d.fewer = d.connections < connections;
  return d;
}

Result<Descriptors> take_descriptors(int connections, int workers) {
  rlimit has{};
  if (getrlimit(RLIMIT_NOFILE, &has) != 0) {
    return Error{Code::io, std::string("open files: ") + std::strerror(errno)};
  }
  auto number = [](rlim_t n) {
    return static_cast<int>(std::min<rlim_t>(n, kUsefulMax));
  };
  const int before = number(has.rlim_cur);
  if (has.rlim_cur < has.rlim_max) {
    has.rlim_cur = std::min<rlim_t>(has.rlim_max, kUsefulMax);
    (void)setrlimit(RLIMIT_NOFILE, &has);
    if (getrlimit(RLIMIT_NOFILE, &has) != 0) has.rlim_cur = rlim_t(before);
  }
  auto shared = share_descriptors(number(has.rlim_cur), connections, workers);
  if (shared) shared->before = before;
  return shared;
}

}  // namespace machina
