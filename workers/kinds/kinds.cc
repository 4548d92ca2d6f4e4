#include "workers/kinds/kinds.h"

#include "workers/kinds/junit.h"
#include "workers/kinds/noop.h"
#include "workers/kinds/patch.h"
#include "workers/kinds/patch_rollback.h"
#include "workers/kinds/run.h"
#include "workers/kinds/shell.h"
#include "workers/kinds/tap.h"
#include "workers/kinds/test_run.h"

namespace machina {
namespace {

Kind noop() {
  Kind kind;
  kind.warmed = true;
  kind.limits = {256, 1, 4, 0, 1 << 20};  // a sandbox has a MiB at least
  kind.check = [](const std::string& payload) -> Result<Kind::Kept> {
    if (auto good = kinds::parse_noop(payload); !good) return good.error();
    return Kind::Kept{};
  };
  return kind;
}

Kind shell(const KindSettings& settings) {
  Kind kind;
  kind.run = kinds::run_shell;
  kind.timeout_ms = settings.shell_timeout_ms;
  kind.limits = {512, 256, 64, 0, 1 << 20};
  kind.check = [settings](const std::string& payload) -> Result<Kind::Kept> {
    if (auto good = kinds::parse_shell(payload, settings); !good) {
      return good.error();
    }
    return Kind::Kept{};
  };
  return kind;
}

Kind test_run(const KindSettings& settings) {
  Kind kind;
  kind.run = kinds::run_tests;
  kind.timeout_ms = 300'000;
  kind.limits = {1024, 1024, 256, 0, 8 << 20};
  kind.check = [settings](const std::string& payload) -> Result<Kind::Kept> {
    auto good = kinds::parse_test(payload, settings);
    if (!good) return good.error();
    if (good->repo.empty()) return Kind::Kept{};
    const auto found = kinds::find_repo(good->repo, settings);
    if (!found) return found.error();
    return Kind::Kept{kinds::with_repo(payload, found->kept), ""};
  };
  return kind;
}

Kind patch_apply(const KindSettings& settings) {
  Kind kind;
  kind.run = kinds::run_patch;
  kind.timeout_ms = 300'000;
  kind.limits = {1024, 1024, 256, 0, 8 << 20};
  kind.check = [settings](const std::string& payload) -> Result<Kind::Kept> {
    auto good = kinds::parse_patch(payload, settings);
    if (!good) return good.error();
    const auto found = kinds::find_repo(good->repo, settings);
    if (!found) return found.error();
    return Kind::Kept{kinds::with_repo(payload, found->kept),
                      "patch:" + found->real};
  };
  return kind;
}

// Which repository it is of stands in the patch's record alone: no key. The
// branch moves from its expected old value or not at all.
Kind patch_rollback() {
  Kind kind;
  kind.run = kinds::run_rollback;
  kind.timeout_ms = 300'000;
  kind.limits = {1024, 1024, 256, 0, 8 << 20};
  kind.check = [](const std::string& payload) -> Result<Kind::Kept> {
    if (auto good = kinds::parse_rollback(payload); !good) return good.error();
    return Kind::Kept{};
  };
  return kind;
}

}  // namespace

std::map<std::string, Kind> built_in_kinds(const KindSettings& settings) {
  return {{"noop", noop()},
          {"tool.shell", shell(settings)},
          {"test.run", test_run(settings)},
          {"patch.apply", patch_apply(settings)},
          {"patch.rollback", patch_rollback()}};
}

void register_built_in_handlers() {
  using sandbox::BuiltinId;
  sandbox::register_builtin(BuiltinId::noop, kinds::noop_handler);
  sandbox::register_builtin(BuiltinId::junit, kinds::junit_handler);
  sandbox::register_builtin(BuiltinId::land, kinds::land_handler);
  sandbox::register_builtin(BuiltinId::tap, kinds::tap_handler);
}

}  // namespace machina
