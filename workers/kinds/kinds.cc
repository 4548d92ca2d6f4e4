#include "workers/kinds/kinds.h"

#include "queue/base/check.h"

namespace machina {

KindMap kinds_of(Families families, const KindSettings& settings) {
  KindMap all;
  for (const MakeFamily make : families) {
    for (Kind& kind : make(settings).kinds) {
      const std::string name = kind.name;
      CHECK(all.emplace(name, std::move(kind)).second);
    }
  }
  return all;
}

void register_handlers(Families families) {
  std::map<std::string, sandbox::Builtin> all;
  for (const MakeFamily make : families) {
    for (const auto& [name, run] : make(KindSettings()).handlers) {
      CHECK(all.emplace(name, run).second);
      sandbox::register_builtin(name, run);
    }
  }
}

}  // namespace machina
