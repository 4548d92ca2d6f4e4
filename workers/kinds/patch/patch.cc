#include "workers/kinds/patch/patch.h"

#include <algorithm>
#include <chrono>

#include "queue/base/hex.h"
#include "queue/base/ids.h"
#include "queue/base/json.h"
#include "workers/kinds/patch/patch_rollback.h"

namespace machina::kinds {
namespace {

using Clock = std::chrono::steady_clock;

class PatchRun {
 public:
  PatchRun(PatchPayload payload, const Attempt& attempt, Host& host)
      : payload_(std::move(payload)),
        attempt_(attempt),
        host_(host),
        deadline_(Clock::now() +
                  std::chrono::milliseconds(attempt.timeout_ms)) {}

  End run() {
    if (auto end = read()) return finish(std::move(*end));
    if (payload_.approval) {
      if (auto end = approve()) return finish(std::move(*end));
    }
    if (auto end = prepare_and_apply()) return finish(std::move(*end));
    if (auto end = may_land()) return finish(std::move(*end));
    if (payload_.test) {
      if (auto end = test()) return finish(std::move(*end));
    }
    return finish(publish());
  }

 private:
  using MaybeEnd = std::optional<End>;

  Millis left() const {
    return std::max<Millis>(
        1, std::chrono::duration_cast<std::chrono::milliseconds>(deadline_ -
                                                                 Clock::now())
               .count());
  }

  // --- check ---

  MaybeEnd read() {
    if (!payload_.artifact_job.empty()) {
      host_.progress(0, "fetching the diff");
      auto diff = host_.fetch_artifact(payload_.artifact_job,
                                       payload_.artifact_name, kDiffBytesMax);
      if (!diff && diff.error().code == Code::too_large) {
        return outcome("rejected", "diff_artifact: " + diff.error().what);
      }
      if (!diff && diff.error().code == Code::unavailable) {
        return failed(EndCode::cancelled, diff.error().what);
      }
      if (!diff) {
        return failed(EndCode::invalid_payload,
                      "diff_artifact: " + diff.error().what);
      }
      payload_.diff = std::move(*diff);
    }
    diff_ = read_diff(payload_.diff);
    if (diff_.verdict == Diff::Verdict::malformed) {
      return failed(EndCode::invalid_payload,
                    "diff_artifact: not a unified diff: " + diff_.problem);
    }
    if (diff_.verdict == Diff::Verdict::refused) {
      return outcome("rejected", diff_.problem);
    }
    return std::nullopt;
  }

  // --- approval ---

  // Said yes to is this diff on this commit. What base_rev names may move
  // while the job waits, so it is resolved before, and never again.
  MaybeEnd approve() {
    const std::string digest = "sha256:" + sha256_hex(payload_.diff);
    bool denied = false, approved = true;
    std::string given, commit;
    json::members(attempt_.input, [&](auto key, auto value) {
      if (key == "approve") {
        approved = json::boolean(value).value_or(false);
        denied = !json::boolean(value).value_or(true);
      }
      if (key == "digest") given = json::string(value).value_or("");
      if (key == "base_commit") commit = json::string(value).value_or("");
      return true;
    });
    if (denied) return outcome("approval_denied", "the approval was denied");
    if (approved && given == digest && is_commit_name(commit)) {
      approved_base_ = commit;
      return std::nullopt;
    }
    if (auto end = prepare(payload_.base_rev)) return end;
    End end;
    end.block_reason = "approval";
    end.block_data = approval_data(digest, base_.commit, diff_);
    return end;
  }

  // --- prepare, apply ---

  MaybeEnd prepare_and_apply() {
    branch_ =
        payload_.branch.empty() ? "review/" + attempt_.job_id : payload_.branch;
    // An earlier attempt may have landed it and died before it said so; HEAD
    // may have moved since. Its base is the one then.
    if (attempt_.number > 1 && payload_.push && approved_base_.empty()) {
      MaybeEnd ignored = try_base("refs/heads/" + branch_ + "^1");
      if (!ignored && applied_.how == Applied::How::committed &&
          land(true).how == Landed::How::done) {
        return std::nullopt;
      }
      if (host_.cancelled()) return failed(EndCode::cancelled, "cancelled");
      // No time is left for another look.
      if (ignored && ignored->code == EndCode::timeout) return ignored;
    }
    if (auto end = try_base(approved_base_.empty() ? payload_.base_rev
                                                   : approved_base_)) {
      return end;
    }
    switch (applied_.how) {
      case Applied::How::committed:
        return std::nullopt;
      case Applied::How::unchanged:
        return outcome("no_change", applied_.reason);
      case Applied::How::conflict:
        return outcome("conflict", applied_.reason);
      case Applied::How::refused:
        return outcome("rejected", applied_.reason);
      case Applied::How::failed:
        break;
    }
    return std::move(applied_.end);
  }

  MaybeEnd prepare(const std::string& rev) {
    host_.progress(2, "preparing the repository");
    const bool approved = !approved_base_.empty();
    Prepared prepared =
        prepare_repo(payload_.repo, rev, attempt_, host_, left(), approved);
    usage_.add(prepared.end.usage);
    if (prepared.good) {
      base_ = prepared.checkout;
      return std::nullopt;
    }
    if (approved && prepared.no_commit) {
      return outcome(
          "rejected",
          "base_commit: " + rev +
              " is what was approved, and the repository no longer has it: "
              "submit the patch again for a commit that is there");
    }
    return std::move(prepared.end);
  }

  MaybeEnd try_base(const std::string& rev) {
    if (auto end = prepare(rev)) return end;
    host_.progress(8, "applying the diff");
    applied_ = apply_diff(payload_.diff, diff_, words(), base_, attempt_, host_,
                          left());
    usage_.add(applied_.end.usage);
    if (applied_.how == Applied::How::conflict) read_otherwise();
    return std::nullopt;
  }

  // Where the names say in one way only how they are to be read, and the files
  // are not there: the other way, which is git's own first. Not where somebody
  // said yes to paths.
  void read_otherwise() {
    if (diff_.other_strip < 0 || payload_.approval) return;
    Diff other = read_diff(payload_.diff, diff_.other_strip);
    if (other.verdict != Diff::Verdict::ok) return;
    Applied applied = apply_diff(payload_.diff, other, words(), base_, attempt_,
                                 host_, left());
    usage_.add(applied.end.usage);
    if (applied.how != Applied::How::committed &&
        applied.how != Applied::How::unchanged) {
      return;
    }
    applied_ = std::move(applied);
    diff_ = std::move(other);
  }

  CommitWords words() const {
    CommitWords words;
    words.branch = branch_;
    words.author_name = words.author_email = "";
    const std::size_t open = payload_.author.find(" <");
    if (open == std::string::npos) {
      words.author_name = "Machina";
      words.author_email = "machina@localhost";
    } else {
      words.author_name = payload_.author.substr(0, open);
      words.author_email =
          payload_.author.substr(open + 2, payload_.author.size() - open - 3);
    }
    words.message = payload_.description;
    while (!words.message.empty() &&
           (words.message.back() == '\n' || words.message.back() == ' ')) {
      words.message.pop_back();
    }
    if (words.message.empty()) words.message = "Apply a patch";
    words.message += "\n\nMachina-Patch: " + attempt_.job_id + "\n";
    if (const auto id = parse_job_id(attempt_.job_id)) {
      words.seconds = created_ms(*id) / 1000;
    }
    return words;
  }

  // --- tests ---

  MaybeEnd run_phase(TestPhase& phase, const Checkout& checkout,
                     const SuiteOptions& options) {
    return run_test_phase(phase, *payload_.test, checkout, options, attempt_,
                          host_, usage_);
  }

  MaybeEnd test() {
    if (payload_.baseline) {
      SuiteOptions options;
      options.timeout_ms = left() / 2;
      options.retries = payload_.test->retries;
      options.percent = 15;
      options.what = "the tests before the patch";
      if (auto end = run_phase(before_, base_, options)) return end;
    }
    SuiteOptions options;
    const Millis rest = left();
    options.timeout_ms = rest - std::min(kLandReserveMs, rest / 10);
    options.retries = std::max(kRerunsMin, payload_.test->retries);
    options.percent = 55;
    options.what = "the tests after the patch";
    options.again = [this](const TestOutcome& tests) {
      return newly_fails(before_, tests);
    };
    Checkout patched = base_;
    patched.commit = applied_.commit;
    patched.pack = pack_of(applied_.bundle);
    if (auto end = run_phase(after_, patched, options)) return end;
    Gate& gate = report_.gate;
    gate = judge_patch(before_, after_, payload_.baseline,
                       read_taken_away(applied_.reverse_diff));
    if (ids_may_change(gate)) {
      TestPhase listed;
      if (auto end = list_again(listed, *payload_.test, base_, left(), attempt_,
                                host_, usage_)) {
        return end;
      }
      note_changing_ids(gate, listed);
    }
    if (!gate.accepted) {
      return outcome("tests_failed", report_.gate.reason);
    }
    return std::nullopt;
  }

  // --- landing ---

  Landed land(bool check_only) {
    Landed landed = land_branch(branch_, applied_.commit, applied_.bundle,
                                base_, check_only, attempt_, host_, left());
    usage_.add(landed.end.usage);
    return landed;
  }

  // Before minutes of tests: would the repository take the branch?
  MaybeEnd may_land() {
    if (!payload_.push) return std::nullopt;
    Landed landed = land(true);
    if (landed.how == Landed::How::failed) return std::move(landed.end);
    if (landed.how == Landed::How::refused) return not_landed(landed.reason);
    return std::nullopt;
  }

  End not_landed(const std::string& why) {
    published_ = true;
    stage_all();
    return outcome("conflict",
                   "push: " + why +
                       "; nothing was pushed, the commit is in the artifact " +
                       kBundleName);
  }

  End publish() {
    published_ = true;
    // Staged first: from the landing on nothing may fail any more.
    stage_all();
    if (payload_.push) {
      if (host_.cancelled()) return failed(EndCode::cancelled, "cancelled");
      host_.progress(95, "landing the branch");
      Landed landed = land(false);
      if (landed.how == Landed::How::failed) return std::move(landed.end);
      if (landed.how == Landed::How::refused) return not_landed(landed.reason);
      report_.pushed = true;
    }
    return outcome("applied", report_.gate.reason);
  }

  // --- the end ---

  End outcome(const std::string& name, const std::string& reason) {
    End end;
    report_.outcome = name;
    report_.reason = reason;
    if (name != "applied" && name != "no_change") {
      end.code = EndCode::verdict;
      end.message = name + (reason.empty() ? "" : ": " + reason);
    }
    return end;
  }

  void stage(const std::string& name, const std::string& bytes) {
    if (bytes.empty() || host_.cancelled()) return;
    if (std::find(staged_.begin(), staged_.end(), name) != staged_.end()) {
      return;
    }
    if (host_.artifact(name, bytes)) staged_.push_back(name);
  }

  bool is_staged(const char* name) const {
    return std::find(staged_.begin(), staged_.end(), name) != staged_.end();
  }

  void stage_all() {
    stage(kDiffName, payload_.diff);
    stage("output-before.log", before_.run.output);
    stage(report_name(before_, false), before_.run.report);
    stage("output-after.log", after_.run.output);
    stage(report_name(after_, true), after_.run.report);
    if (!published_) return;
    stage(kReverseName, applied_.reverse_diff);
    stage(kBundleName, applied_.bundle);
  }

  End finish(End end) {
    end.usage = usage_;
    if (!end.block_reason.empty()) return end;
    if (end.code != EndCode::none && end.code != EndCode::verdict) {
      return end;
    }
    stage_all();
    end.artifacts = staged_;
    end.side_effects = side_effects_json();
    if (published_) {
      report_.commit = applied_.commit;
      report_.branch = branch_;
    }
    if (!payload_.diff.empty()) {
      report_.diff_digest = "sha256:" + sha256_hex(payload_.diff);
    }
    report_.base_commit = base_.commit;
    report_.files = std::move(applied_.files);
    report_.conflicts = std::move(applied_.conflicts);
    report_.before = &before_;
    report_.after = &after_;
    report_.has_reverse = is_staged(kReverseName);
    report_.has_bundle = is_staged(kBundleName);
    end.result = patch_result(attempt_.job_id, report_);
    host_.progress(100, report_.outcome);
    return end;
  }

  PatchPayload payload_;
  const Attempt& attempt_;
  Host& host_;
  const Clock::time_point deadline_;
  Diff diff_;
  std::string branch_;
  std::string approved_base_;  // the commit that was said yes to; or empty
  Checkout base_;
  Applied applied_;
  TestPhase before_, after_;
  bool published_ = false;
  std::vector<std::string> staged_;
  PatchReport report_;
  Usage usage_;
};

}  // namespace

namespace {

End run_patch(const Attempt& attempt, Host& host) {
  auto payload = parse_patch(attempt.payload, host.settings());
  if (!payload) return bad_payload(payload.error());
  return PatchRun(std::move(*payload), attempt, host).run();
}

Kind patch_apply(const KindSettings& settings) {
  Kind apply;
  apply.name = "patch.apply";
  apply.run = run_patch;
  apply.timeout_ms = 300'000;
  apply.limits = {1024, 1024, 256, 0, 8 << 20};
  apply.check = [settings](const std::string& payload) -> Checked<Kind::Kept> {
    if (auto good = parse_patch(payload, settings); !good) return good.error();
    return Kind::Kept{};
  };
  apply.resolve =
      [settings](const std::string& payload) -> Checked<Kind::Kept> {
    const auto good = parse_patch(payload, settings);
    if (!good) return good.error();
    const auto found = find_repo(good->repo, settings);
    if (!found) return found.error();
    return Kind::Kept{with_repo(payload, found->kept), "patch:" + found->real};
  };
  return apply;
}

}  // namespace

Family patch_family(const KindSettings& settings) {
  return {{patch_apply(settings), patch_rollback()},
          {{kLandHandler, land_handler}}};
}

}  // namespace machina::kinds
