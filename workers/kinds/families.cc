// The table of families: one row each. A new family is a folder and a row.

#include "workers/kinds/kinds.h"
#include "workers/kinds/noop/noop.h"
#include "workers/kinds/patch/patch.h"
#include "workers/kinds/test/test_run.h"
#include "workers/kinds/tool/shell.h"

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
