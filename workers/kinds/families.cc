// The table of families: one row each. A new family is a folder and a row.

#include "workers/kinds/kinds.h"
#include "workers/kinds/noop.h"
#include "workers/kinds/patch.h"
#include "workers/kinds/shell.h"
#include "workers/kinds/test_run.h"

namespace machina {

Families built_in_families() {
  static constexpr MakeFamily kAll[] = {
      kinds::noop_family,
      kinds::tool_family,
      kinds::test_family,
      kinds::patch_family,
  };
  return kAll;
}

}  // namespace machina
