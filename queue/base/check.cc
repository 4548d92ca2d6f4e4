#include "queue/base/check.h"

#include <cstdio>
#include <cstdlib>

namespace machina {

void check_failed(const char* expression, const char* file, int line) {
  std::fprintf(stderr, "machina: CHECK failed: %s (%s:%d)\n", expression, file,
               line);
  std::abort();
}

}  // namespace machina
