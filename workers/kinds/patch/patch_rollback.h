// workers/kinds/patch/patch_rollback.h
//
// patch.rollback: takes an applied patch back, all of it or a region of one
// file, by a commit on the branch that it landed on.
//
//   record   the server's (GET /v1/patches/{id})
//   prepare  as the repository's owner: the mirror, the branch's tip
//   look     what the patch's files are at the tip: as the patch left them, as
//            they were before it, as an earlier rollback left them, or else
//   commit   the pre-image on top of the tip, its hashes checked
//   test     the patch's suite at the tip and at that commit, each in a session
//            of its own; nothing of the project has run before
//   land     the branch is moved from that tip, or not at all (patch_land.cc)
//
//   B1  What changed since by another hand is a conflict, and nothing moves.
//       Where the payload says so, the job waits instead and shows what a
//       three-way merge would give, and lands that if somebody says yes to it.
//   B2  Twice is a no-op: what is back already succeeds and changes nothing.
//   B3  The commit's id depends on the job, the tip and the patch alone, so
//       landing twice is landing once.
//   B4  Nothing moves where a case fails that neither fails at the tip nor
//       failed before the patch.

#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "queue/base/result.h"
#include "workers/kinds/run.h"
#include "workers/kinds/suite/suite.h"

namespace machina::kinds {

struct RollbackPayload {
  std::string patch_id;
  std::string path;                           // empty: all of the patch
  std::int64_t start_line = 0, end_line = 0;  // 0: the whole path
  // Absent with own_test: the suite that the patch came with; without: none.
  std::optional<TestPayload> test;
  bool own_test = true;
  bool block = false;  // on a conflict
};
Checked<RollbackPayload> parse_rollback(const std::string& payload);
End run_rollback(const Attempt& attempt, Host& host);
Kind patch_rollback();

// Of a diff of one file without context, from the patch's result to what was
// before: only the hunks that touch lines start..end of the old side (a hunk
// without old lines lies between `at` and `at`+1). Empty: there is none.
std::string hunks_in_region(const std::string& diff, std::int64_t start,
                            std::int64_t end);

}  // namespace machina::kinds
