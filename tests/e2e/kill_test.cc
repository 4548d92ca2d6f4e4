// kill -9 of everything at every phase of patch.apply and patch.rollback. The
// moment is seen in the process tree, not guessed: a phase is held still by
// SIGSTOP, then the victim is killed. After each kill: the job's end is right,
// and nothing else has changed anywhere.

#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <random>
#include <sstream>

#include "tests/e2e/fixture.h"

namespace machina::e2e {
namespace {

enum class Victim {
  server,   // and started again
  pool,     // with it, all its sandboxes
  worker,   // that holds the job
  shell,    // the phase's own process: its script, or the suite
  program,  // what that started: a git, or a part of the suite
  init,     // the sandbox's first process
};
constexpr const char* kVictims[] = {"server", "pool",    "worker",
                                    "shell",  "program", "init"};

// A phase is known by the name ($0) of the script that it runs.
struct Phase {
  const char* kind;
  const char* script;
  bool tested = false;  // a rollback of a patch that came with a suite
};
constexpr Phase kApplyPhases[] = {{"patch.apply", "prepare"},
                                  {"patch.apply", "apply"},
                                  {"patch.apply", "suite-before"},
                                  {"patch.apply", "suite-after"},
                                  {"patch.apply", "land"}};
constexpr Phase kRollbackPhases[] = {{"patch.rollback", "prepare"},
                                     {"patch.rollback", "look"},
                                     {"patch.rollback", "commit"},
                                     {"patch.rollback", "land"}};
// At the branch's tip the suite is the patch's, after the rollback the old one.
constexpr Phase kTipSuite = {"patch.rollback", "suite-after", true};
constexpr Phase kBackSuite = {"patch.rollback", "suite-before", true};

std::vector<pid_t> children(pid_t pid) {
  const std::string at = std::to_string(pid);
  std::istringstream in(read_file("/proc/" + at + "/task/" + at + "/children"));
  return {std::istream_iterator<pid_t>(in), std::istream_iterator<pid_t>()};
}

std::vector<std::string> words_of(pid_t pid) {
  std::istringstream in(read_file("/proc/" + std::to_string(pid) + "/cmdline"));
  std::vector<std::string> words;
  for (std::string word; std::getline(in, word, '\0');) words.push_back(word);
  return words;
}

// Follows `root`, which stands still by SIGSTOP, and all that it starts, until
// they have ended; kills the first of them that becomes a program which
// `is_it` knows. ptrace stops each process inside its execve(), before the new
// program runs an instruction, so that even a git that lives for a millisecond
// cannot be missed. False: no such program was started within `ms`.
bool kill_at_exec(pid_t root, const std::function<bool(pid_t)>& is_it,
                  double ms) {
  constexpr long kFollow = PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK |
                           PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC;
  if (ptrace(PTRACE_SEIZE, root, nullptr, kFollow) != 0) {
    ADD_FAILURE() << "ptrace: " << strerror(errno);
    return false;
  }
  kill(root, SIGCONT);
  std::set<pid_t> followed{root};
  bool struck = false;
  const double end = now_ms() + ms;
  while (!followed.empty() && now_ms() < end) {
    bool any = false;
    for (const pid_t pid : std::set<pid_t>(followed)) {
      int status = 0;
      if (waitpid(pid, &status, WNOHANG | __WALL) != pid) continue;
      any = true;
      if (!WIFSTOPPED(status)) {
        followed.erase(pid);
        continue;
      }
      const int event = status >> 16;
      int deliver = 0;
      if (event == PTRACE_EVENT_EXEC) {
        if (!struck && is_it(pid)) struck = kill(pid, SIGKILL) == 0;
      } else if (event == PTRACE_EVENT_FORK || event == PTRACE_EVENT_VFORK ||
                 event == PTRACE_EVENT_CLONE) {
        unsigned long child = 0;
        ptrace(PTRACE_GETEVENTMSG, pid, nullptr, &child);
        followed.insert(static_cast<pid_t>(child));
      } else if (event == 0) {
        deliver = WSTOPSIG(status);
      }
      ptrace(PTRACE_CONT, pid, nullptr, deliver);
    }
    if (!any) usleep(200);
  }
  EXPECT_TRUE(followed.empty()) << "still followed after " << ms << " ms";
  return struck;
}

class Kills : public EndToEnd {
 protected:
  void SetUp() override {
    EndToEnd::SetUp();
    if (!product_) return;
    repo_ = p().root() + "/repos/r";
    ASSERT_EQ(
        p().shell(
            "set -e; git init -q -b main " + repo_ + "; cd " + repo_ +
            "; echo \"exec sh -c 'cat suite && cat b.txt && :' suite-before\" "
            ">suite; printf '# %s\\n' 1 2 3 4 5 6 >>suite; echo keep >b.txt; "
            "git add -A; " +
            kGit +
            " commit -q -m base; echo mine >>b.txt; "
            "git add b.txt; echo more >>b.txt; echo x >new"),
        0);
    begin_ = std::time(nullptr);
    start_prod(
        1, {{"MACHINA_RETRY_MIN_MS", "20"}, {"MACHINA_RETRY_MAX_MS", "100"}});
    before_ = checkout();
  }

  // --- what is asked for ---

  std::string submit_patch(bool test, int attempts = 20) {
    Json payload = {{"repo", "r"},
                    {"push", true},
                    {"diff",
                     "--- a/suite\n+++ b/suite\n@@ -1,4 +1,4 @@\n"
                     "-exec sh -c 'cat suite && cat b.txt && :' suite-before\n"
                     "+exec sh -c 'cat suite && cat b.txt && :' suite-after\n"
                     " # 1\n # 2\n # 3\n"}};
    if (test) {
      payload["test"] = {{"runner", "command"},
                         {"command", {"/bin/sh", "suite"}}};
    }
    return p().submit({{"kind", "patch.apply"},
                       {"max_attempts", attempts},
                       {"payload", payload}});
  }
  std::string submit_rollback(const std::string& patch,
                              const char* on_conflict = "fail") {
    return p().submit(
        {{"kind", "patch.rollback"},
         {"max_attempts", 20},
         {"payload", {{"patch_id", patch}, {"on_conflict", on_conflict}}}});
  }
  // A commit on the patch's branch that touches its file elsewhere, and leaves
  // no other trace.
  void change_since(const std::string& patch) {
    const std::string branch = "review/" + patch;
    ASSERT_EQ(
        p().shell("set -e; cd " + repo_ + "; export GIT_INDEX_FILE=" +
                  p().dir() + "/index; git read-tree " + branch +
                  "; blob=$({ git show " + branch +
                  ":suite; echo '# since'; } | git hash-object -w --stdin); "
                  "git update-index --cacheinfo 100644,$blob,suite; " +
                  kGit + " -c core.logAllRefUpdates=false update-ref " +
                  "refs/heads/" + branch + " $(" + kGit +
                  " commit-tree $(git write-tree) -p " + branch +
                  " -m since); rm " + p().dir() + "/index"),
        0);
  }

  // --- the moment ---

  pid_t pool() {
    for (const pid_t pid : p().processes_with("pool")) {
      // The spawner and its keepers have the pool's command line.
      const std::string of =
          read_file("/proc/" + std::to_string(pid) + "/comm");
      if (of.find("spawner") == std::string::npos) return pid;
    }
    return 0;
  }

  // The pool's processes, to the leaves.
  template <class Visit>
  bool walk(pid_t pid, pid_t init, int depth, Visit visit) {
    for (const pid_t child : children(pid)) {
      // pool, spawner, keeper, init, then what the job is.
      if (depth >= 3 && visit(child, depth == 3 ? pid : init)) return true;
      if (walk(child, depth == 2 ? child : init, depth + 1, visit)) return true;
    }
    return false;
  }

  struct Held {
    pid_t shell = 0, init = 0;
  };
  // Waits for the phase and stops its process; nothing held where the job was
  // over before it was seen.
  Held hold(const std::string& id, const Phase& phase) {
    Held held;
    const pid_t from = pool();
    const double end = now_ms() + 60000;
    for (int round = 1; held.shell == 0 && now_ms() < end; ++round) {
      walk(from, 0, 0, [&](pid_t pid, pid_t init) {
        const auto words = words_of(pid);
        if (words.size() < 4 || words[3] != phase.script) return false;
        if (kill(pid, SIGSTOP) != 0) return false;
        held = {pid, init};
        return true;
      });
      if (round % 64 == 0 && is_final(p().job(id))) break;
    }
    return held;
  }

  // False: what should die was gone already.
  bool strike(Victim victim, const Held& held) {
    switch (victim) {
      case Victim::server:
        p().kill_server();
        kill(held.shell, SIGCONT);
        restart();
        return true;
      case Victim::pool:
        return kill(pool(), SIGKILL) == 0;
      case Victim::worker: {
        bool any = false;
        for (const pid_t pid : p().worker_pids()) {
          any = kill(pid, SIGKILL) == 0 || any;
        }
        return any;
      }
      case Victim::shell:
        return kill(held.shell, SIGKILL) == 0;
      case Victim::init:
        return kill(held.init, SIGKILL) == 0;
      case Victim::program:
        break;
    }
    // It starts one after the other: the next one that is seen.
    kill(held.shell, SIGCONT);
    while (kill(held.shell, 0) == 0) {
      for (const pid_t pid : children(held.shell)) {
        if (kill(pid, SIGKILL) == 0) return true;
      }
    }
    return false;
  }

  // --- what must be so afterwards ---

  std::string out(const std::string& line) {
    const std::string file = p().dir() + "/out";
    EXPECT_EQ(p().shell("{ " + line + "; } >" + file + " 2>&1"), 0)
        << line << "\n"
        << read_file(file);
    return read_file(file);
  }

  // All that is the user's: files with mode and time, index, HEAD, reflogs,
  // configuration and refs; without the branches that were asked for.
  std::string checkout() {
    return out("cd " + repo_ +
               "; find . -path ./.git/objects -prune -o -path "
               "./.git/refs/heads/review -prune -o -type f -printf "
               "'%m %U %T@ %s %p\\n' | sort; find . -path ./.git/objects "
               "-prune -o -path ./.git/refs/heads/review -prune -o -type f "
               "-print0 | sort -z | xargs -0 sha256sum; find . -path "
               "./.git/objects -prune -o -path ./.git/refs/heads/review "
               "-prune -o ! -type f -printf '%y %m %p %l\\n' | sort");
  }

  void expect_clean() {
    EXPECT_EQ(checkout(), before_);
    std::string refs;
    for (const std::string& id : landed_)
      refs += "refs/heads/review/" + id + "\n";
    EXPECT_EQ(out("cd " + repo_ +
                  "; git for-each-ref --format='%(refname)' | grep -v "
                  "refs/heads/main || :"),
              refs);
    EXPECT_EQ(out("cd " + repo_ +
                  "; find .git/refs ! -type d -name '*.lock*'; "
                  "find .git/objects -type f | grep -vE "
                  "'objects/([0-9a-f]{2}/[0-9a-f]{38}|pack/|info/)' || :; "
                  "ls .git/worktrees 2>/dev/null || :; git fsck --no-dangling; "
                  "find " +
                  p().root() +
                  "/mirrors '(' -name '*.lock' -o -name "
                  "'tmp_*' -o -name '*.tmp' -o -name 'incoming-*' ')' ! -name "
                  "machina.lock; ls " +
                  p().root() +
                  "/artifacts/tmp; "
                  // The host's own temporary directories: of slots and pools,
                  // and of a user that nobody else is.
                  "find /tmp /var/tmp -maxdepth 1 -newermt @" +
                  std::to_string(begin_) + " '(' -uid +299998 " +
                  (p().uid() != geteuid()
                       ? "-o -uid " + std::to_string(p().uid()) + " "
                       : "") +
                  "')' ! -name 'machina-e2e-*' 2>/dev/null || :"),
              "");
    // Of the job no process, and one spawner's control groups.
    std::string still;
    EXPECT_TRUE(eventually(
        [&] {
          still.clear();
          walk(pool(), 0, 0, [&](pid_t pid, pid_t) {
            for (const auto& word : words_of(pid))
              still += word.substr(0, 40) + " ";
            return false;
          });
          return still.empty();
        },
        10000))
        << still;
    expect_one_spawner();
  }

  void expect_one_spawner() {
    std::string groups;
    EXPECT_TRUE(eventually(
        [&] {
          const auto now = p().control_groups();
          groups.clear();
          for (const auto& group : now) groups += group + "\n";
          std::set<std::string> names;
          for (const auto& group : now) {
            names.insert(group.substr(group.rfind('/')));
          }
          return names.size() <= 1;
        },
        10000))
        << groups;
  }

  // The record, once it has come.
  Json record_of(const Json& job) {
    const std::string kind = job["kind"], id = job["id"];
    const std::string patch =
        kind == "patch.apply" ? id
                              : job["payload"]["patch_id"].get<std::string>();
    Json found;
    eventually(
        [&] {
          const Json record = p().get("/v1/patches/" + patch).json();
          if (!record.is_object()) return false;
          if (kind == "patch.apply") found = record;
          for (const Json& one : record.value("rollbacks", Json::array())) {
            if (one["job_id"] == id) found = one;
          }
          return found.is_object();
        },
        10000);
    return found;
  }

  // What is true of every end.
  void expect_honest(const Json& job) {
    ASSERT_TRUE(is_final(job)) << job.dump(1);
    const std::string id = job["id"];
    const bool apply = job["kind"] == "patch.apply";
    const Json record = record_of(job);
    ASSERT_TRUE(record.is_object()) << "no record of " << id;
    EXPECT_EQ(record["state"], job["state"]);
    if (!job["result"].is_object()) {
      // A cancel needs no more words.
      EXPECT_TRUE(job["state"] == "cancelled" ||
                  !job["error"].value("message", "").empty())
          << job.dump(1);
      EXPECT_EQ(record["outcome"], job["state"]);
      return;
    }
    for (const char* name : {"outcome", "commit"}) {
      EXPECT_EQ(record[name], job["result"][name]) << name << record.dump(1);
    }
    EXPECT_EQ(record["pushed"], job["result"]["pushed"]);
    if (!apply || job["result"]["pushed"] != true) return;
    landed_.insert(id);
    EXPECT_EQ(out("cd " + repo_ + "; git rev-parse review/" + id +
                  "; git rev-parse review/" + id +
                  "^; git rev-list --count "
                  "main..review/" +
                  id),
              job["result"]["commit"].get<std::string>() + "\n" +
                  out("git -C " + repo_ + " rev-parse main") + "1\n");
  }

  void expect_applied(const Json& job) {
    ASSERT_EQ(job["state"], "succeeded") << job.dump(1).substr(0, 4000);
    EXPECT_EQ(job["result"]["outcome"], "applied");
    EXPECT_EQ(job["result"]["pushed"], true);
  }
  void expect_rolled_back(const Json& job) {
    ASSERT_EQ(job["state"], "succeeded") << job.dump(1).substr(0, 4000);
    EXPECT_EQ(job["result"]["outcome"], "rolled_back") << job.dump(1);
    EXPECT_EQ(job["result"]["verified"], true);
    const std::string branch = job["result"]["branch"];
    EXPECT_EQ(out("cd " + repo_ + "; git rev-parse " + branch +
                  "^{tree}; "
                  "git rev-list --count main.." +
                  branch),
              out("git -C " + repo_ + " rev-parse 'main^{tree}'") + "2\n");
  }

  static bool tests(const Phase& phase) {
    return std::string_view(phase.script).starts_with("suite");
  }

  // A suite that was killed has said nothing: before the patch that is told,
  // after it it is no yes.
  void expect_end(const Json& job, const Phase& phase, Victim victim) {
    const std::string script = phase.script;
    const bool suite = tests(phase);
    const std::string last = phase.tested ? "suite-before" : "suite-after";
    if (script == last && victim == Victim::shell) {
      EXPECT_EQ(job["state"], "failed") << job.dump(1).substr(0, 4000);
      EXPECT_EQ(job["result"]["outcome"], "tests_failed");
      EXPECT_NE(job["result"].value("reason", "").find("signal 9"),
                std::string::npos)
          << job["result"]["reason"];
      return;
    }
    if (script == last && victim == Victim::program) {
      // It failed once, and passed when it ran again.
      EXPECT_EQ(job["result"]["tests"]["after"]["flaky"], 1)
          << job.dump(1).substr(0, 4000);
    }
    if (job["kind"] == "patch.apply") {
      expect_applied(job);
      if (suite && victim == Victim::shell) {
        EXPECT_NE(job["result"].value("reason", "").find("signal 9"),
                  std::string::npos)
            << job["result"]["reason"];
      }
    } else {
      expect_rolled_back(job);
    }
    if (victim == Victim::server) {
      EXPECT_EQ(job["attempt"], 1) << "its workers ran on";
    } else if (!suite || victim == Victim::pool || victim == Victim::worker ||
               victim == Victim::init) {
      EXPECT_GE(job["attempt"], 2);
    }
  }

  void one(const Phase& phase, Victim victim) {
    SCOPED_TRACE(std::string(kVictims[static_cast<int>(victim)]) +
                 " killed in " + phase.kind + ", " + phase.script);
    const bool rollback = std::string(phase.kind) == "patch.rollback";
    for (int round = 0; round < 20; ++round) {
      ASSERT_TRUE(eventually(
          [&] { return pool() != 0 && !p().worker_pids().empty(); }, 20000));
      std::string id;
      if (rollback) {
        const Json patch = p().wait_end(submit_patch(phase.tested));
        expect_honest(patch);
        expect_applied(patch);
        id = submit_rollback(patch["id"]);
      } else {
        id = submit_patch(true);
      }
      const Held held = hold(id, phase);
      const bool struck = held.shell != 0 && strike(victim, held);
      if (!struck && held.shell != 0) kill(held.shell, SIGCONT);
      const Json job = p().wait_end(id, 60000);
      expect_honest(job);
      if (HasFatalFailure()) return;
      if (!struck) continue;
      // A signal also reaches a program that is at its end already, with all
      // its work done: another one is tried. (What a suite's program did is in
      // its cases.)
      if (victim == Victim::program && !tests(phase) && job["attempt"] == 1) {
        continue;
      }
      expect_end(job, phase, victim);
      expect_clean();
      return;
    }
    FAIL() << "the moment never came";
  }

  // --- at random ---

  unsigned below(unsigned n) { return static_cast<unsigned>(chance_()) % n; }

  // The pool's processes and how deep they are: the pool, its spawner and
  // workers, keepers, inits, then what the job is.
  void gather(pid_t pid, int depth, std::vector<std::pair<int, pid_t>>& into) {
    into.emplace_back(depth, pid);
    for (const pid_t child : children(pid)) gather(child, depth + 1, into);
  }
  static std::string what_is(int depth, pid_t pid) {
    constexpr const char* kOurs[] = {"pool", "", "keeper", "init"};
    const auto words = words_of(pid);
    if (depth == 1) {
      return words.size() > 1 && words[1] == "worker" ? "worker" : "spawner";
    }
    if (depth < 4) return kOurs[depth];
    if (words.size() > 3 && words[1] == "-c") return words[3];
    if (words.size() > 1 && words[0].ends_with("machina")) return "handler";
    return words.empty() ? "gone" : words[0].substr(0, words[0].find(' '));
  }

  // Kills one thing; whether it may have been a part of the suite.
  bool strike_at_random(const std::string& id) {
    const pid_t from = pool();
    switch (below(8)) {
      case 0:
        ++seen_["server"];
        p().kill_server();
        sleep_ms(static_cast<int>(below(300)));
        restart();
        return false;
      case 1:
        if (from == 0) return false;
        ++seen_["pool"];
        kill(from, SIGKILL);
        return false;
      case 2:
        if (below(4) != 0) break;
        ++seen_["cancel"];
        p().post("/v1/jobs/" + id + "/cancel", Json::object());
        cancelled_ = true;
        return false;
      default:
        break;
    }
    if (from == 0) return false;
    // Mostly a part of the job, as soon as one is seen.
    const bool job = below(4) != 0;
    std::vector<std::pair<int, pid_t>> some;
    for (const double end = now_ms() + 200; now_ms() < end && some.empty();) {
      gather(from, 0, some);
      if (!job) break;
      std::erase_if(some, [](const auto& one) { return one.first < 4; });
    }
    if (some.empty()) return false;
    const auto [depth, pid] = some[below(static_cast<unsigned>(some.size()))];
    const std::string what = what_is(depth, pid);
    if (kill(pid, SIGKILL) != 0) return false;
    ++seen_[what];
    return true;
  }

  void at_random() {
    ASSERT_TRUE(eventually(
        [&] { return pool() != 0 && !p().worker_pids().empty(); }, 30000));
    const bool rollback = below(3) == 0;
    cancelled_ = false;
    std::string id, patch;
    if (rollback) {
      const Json job = p().wait_end(submit_patch(false));
      expect_honest(job);
      expect_applied(job);
      if (HasFailure()) return;
      patch = job["id"];
      id = submit_rollback(patch);
    } else {
      id = submit_patch(below(4) != 0);
    }
    bool suite = false;
    for (unsigned strikes = 1 + below(3); strikes > 0; --strikes) {
      usleep(below(4) == 0 ? below(700'000) : below(250'000));
      suite = strike_at_random(id) || suite;
    }
    const Json job = p().wait_end(id, 60000);
    ++seen_["= " + job.value("state", "none")];
    expect_honest(job);
    if (HasFatalFailure()) return;
    const std::string outcome =
        job["result"].is_object() ? job["result"].value("outcome", "") : "";
    if (job["state"] == "cancelled") {
      EXPECT_TRUE(cancelled_) << job.dump(1);
    } else if (outcome == "tests_failed") {
      EXPECT_TRUE(suite) << job.dump(1);
      EXPECT_NE(job["result"].value("reason", "").find("no verdict after"),
                std::string::npos)
          << job.dump(1);
    } else if (rollback) {
      expect_rolled_back(job);
    } else {
      expect_applied(job);
    }
    expect_clean();
  }

  std::mt19937 chance_;
  std::map<std::string, int> seen_;
  bool cancelled_ = false;

  const std::string kGit = "git -c user.name=E2E -c user.email=e2e@localhost";
  std::string repo_, before_;
  std::time_t begin_ = 0;
  std::set<std::string> landed_;
};

using Victims = std::vector<Victim>;
const Victims kAll = {Victim::server, Victim::pool,    Victim::worker,
                      Victim::shell,  Victim::program, Victim::init};

// All of it as root; as a user what is done without root's means.
TEST_P(Kills, OfApply) {
  for (const Phase& phase : kApplyPhases) {
    for (const Victim victim :
         as_root() ? kAll : Victims{Victim::worker, Victim::init}) {
      one(phase, victim);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Kills, OfRollback) {
  for (const Phase& phase : kRollbackPhases) {
    for (const Victim victim :
         as_root() ? Victims{Victim::server, Victim::worker, Victim::program}
                   : Victims{Victim::pool, Victim::worker}) {
      one(phase, victim);
      if (HasFatalFailure()) return;
    }
  }
}

// A suite that dies at the tip has said nothing of it; after the rollback it is
// no yes, and nothing moves.
TEST_P(Kills, OfARollbacksTests) {
  for (const Phase& phase : {kTipSuite, kBackSuite}) {
    for (const Victim victim :
         as_root() ? Victims{Victim::server, Victim::pool, Victim::shell,
                             Victim::program, Victim::init}
                   : Victims{Victim::worker, Victim::shell}) {
      one(phase, victim);
      if (HasFatalFailure()) return;
    }
  }
}

// The merge is made before somebody is asked, and again with the yes.
TEST_P(Kills, OfAMerge) {
  constexpr Phase kMerge = {"patch.rollback", "merge"};
  for (const bool approved : {false, true}) {
    for (const Victim victim :
         as_root() ? Victims{Victim::server, Victim::worker, Victim::program}
                   : Victims{Victim::pool, Victim::init}) {
      SCOPED_TRACE(std::string(kVictims[static_cast<int>(victim)]) +
                   " killed in a merge, " + (approved ? "after" : "before") +
                   " the yes");
      bool struck = false;
      for (int round = 0; round < 20 && !struck; ++round) {
        ASSERT_TRUE(eventually(
            [&] { return pool() != 0 && !p().worker_pids().empty(); }, 20000));
        const Json patch = p().wait_end(submit_patch(false));
        expect_honest(patch);
        change_since(patch["id"]);
        if (HasFatalFailure()) return;
        const std::string id = submit_rollback(patch["id"], "block");
        const auto hit = [&] {
          const Held held = hold(id, kMerge);
          struck = held.shell != 0 && strike(victim, held);
          if (!struck && held.shell != 0) kill(held.shell, SIGCONT);
        };
        if (!approved) hit();
        Json job = p().wait_state(id, "blocked", 60000);
        ASSERT_EQ(job["state"], "blocked") << job.dump(1);
        const Json data = job["blocked"]["data"];
        ASSERT_TRUE(data["digest"].is_string()) << data.dump(1);
        ASSERT_EQ(p().post("/v1/jobs/" + id + "/unblock",
                           {{"token", job["blocked"]["token"]},
                            {"input",
                             {{"approve", true}, {"digest", data["digest"]}}}})
                      .status,
                  200);
        if (approved) hit();
        job = p().wait_end(id, 60000);
        expect_honest(job);
        ASSERT_EQ(job["state"], "succeeded") << job.dump(1).substr(0, 4000);
        EXPECT_EQ(job["result"]["outcome"], "rolled_back") << job.dump(1);
        const std::string branch = job["result"]["branch"];
        EXPECT_EQ(out("cd " + repo_ + "; git show " + branch + ":suite"),
                  out("cd " + repo_ + "; git show main:suite; echo '# since'"));
        EXPECT_EQ(out("cd " + repo_ + "; git rev-list --count main.." + branch),
                  "3\n");
        expect_clean();
      }
      EXPECT_TRUE(struck) << "the moment never came";
      if (HasFailure()) return;
    }
  }
}

// Those gits whose failure is an answer: that a diff does not apply, that a
// commit is not there. One that was killed has given none.
TEST_P(Kills, F31_AGitThatDiesIsNoAnswer) {
  if (!as_root()) GTEST_SKIP() << "it makes no difference who it is";
  for (const auto& [phase, word] : std::vector<std::pair<Phase, std::string>>{
           {kApplyPhases[0], "rev-parse"},
           {kApplyPhases[1], "read-tree"},
           {kApplyPhases[1], "apply"},
           {kApplyPhases[4], "cat-file"},
           {kRollbackPhases[1], "cat-file"},
           {kRollbackPhases[2], "update-index"}}) {
    const auto is_it = [&, word = word](pid_t pid) {
      const auto words = words_of(pid);
      return !words.empty() && words[0] == "git" &&
             std::find(words.begin(), words.end(), word) != words.end();
    };
    SCOPED_TRACE(std::string(phase.script) + ": git " + word);
    const bool rollback = std::string(phase.kind) == "patch.rollback";
    bool struck = false;
    // The phase is seen by looking, so the git may have come before it is held.
    for (int round = 0; round < 30 && !struck; ++round) {
      std::string id = submit_patch(false);
      if (rollback) {
        expect_honest(p().wait_end(id));
        id = submit_rollback(id);
      }
      const Held held = hold(id, phase);
      if (held.shell != 0) struck = kill_at_exec(held.shell, is_it, 60000);
      const Json job = p().wait_end(id, 60000);
      expect_honest(job);
      if (rollback) {
        expect_rolled_back(job);
      } else {
        expect_applied(job);
      }
      EXPECT_EQ(job["attempt"], struck ? 2 : 1);
      if (HasFailure()) return;
    }
    ASSERT_TRUE(struck) << "in 30 jobs it was never met";
  }
  expect_clean();
}

// The worst moment: the branch is there, and nobody has been told. The server
// stands still meanwhile, so that no completion can come through.
TEST_P(Kills, LandedAndNotTold) {
  const auto worker_dies_landed = [&](const std::string& id, const Phase& phase,
                                      const std::string& branch) {
    const std::string ref = repo_ + "/.git/refs/heads/" + branch;
    const std::string before = read_file(ref);
    const Held held = hold(id, phase);
    if (held.shell == 0) return;  // it was over before it was seen
    const std::vector<pid_t> workers = p().worker_pids();
    kill(p().server(), SIGSTOP);
    kill(held.shell, SIGCONT);
    EXPECT_TRUE(eventually([&] { return read_file(ref) != before; }, 20000));
    for (const pid_t pid : workers) kill(pid, SIGKILL);
    kill(p().server(), SIGCONT);
  };
  // The phase may be over before it is seen, and a worker may be so fast that
  // its completion lies in the server's socket before the branch is seen here.
  // Then the job was told, which is right too, and another one is tried.
  const auto untold = [&](const Phase& phase, const auto& submit,
                          const auto& expect_end) {
    Json job;
    for (int round = 0; round < 10; ++round) {
      const auto [id, branch] = submit();
      worker_dies_landed(id, phase, branch);
      job = p().wait_end(id, 60000);
      if (job["state"] != "succeeded" || job["attempt"] != 1) return job;
      expect_honest(job);
      expect_end(job);
    }
    ADD_FAILURE() << "in 10 jobs the worker was always faster";
    return job;
  };
  using Submitted = std::pair<std::string, std::string>;
  const auto applied = [&](const Json& job) { expect_applied(job); };
  const auto rolled_back = [&](const Json& job) { expect_rolled_back(job); };

  Json job = untold(
      kApplyPhases[4],
      [&] {
        const std::string id = submit_patch(true);
        return Submitted(id, "review/" + id);
      },
      applied);
  expect_honest(job);
  expect_applied(job);
  EXPECT_EQ(job["attempt"], 2);
  expect_clean();

  job = untold(
      kRollbackPhases[3],
      [&] {
        const std::string id = submit_patch(true);
        expect_honest(p().wait_end(id, 60000));
        return Submitted(submit_rollback(id), "review/" + id);
      },
      rolled_back);
  expect_honest(job);
  expect_rolled_back(job);
  EXPECT_EQ(job["attempt"], 2);
  expect_clean();

  // No attempt is left that could find out. The job is dead and says why;
  // retried, it finds its own commit.
  job = untold(
      kApplyPhases[4],
      [&] {
        const std::string id = submit_patch(true, 1);
        return Submitted(id, "review/" + id);
      },
      applied);
  EXPECT_EQ(job["state"], "dead");
  EXPECT_EQ(job["error"]["code"], "worker_died");
  EXPECT_FALSE(job["error"].value("message", "").empty());
  const std::string id = job["id"];
  const std::string commit = out("git -C " + repo_ + " rev-parse review/" + id);
  EXPECT_EQ(p().post("/v1/jobs/" + id + "/retry", Json::object()).status, 200);
  job = p().wait_end(id, 60000);
  expect_applied(job);
  EXPECT_EQ(job["result"]["commit"].get<std::string>() + "\n", commit);
  landed_.insert(id);
  expect_clean();
}

// tests/e2e/kills runs this: anything, at any moment, several times, for
// KILLS_SECONDS. KILLS_SEED says which moments; the machine has a say, too.
TEST_P(Kills, DISABLED_AtRandomMoments) {
  const auto number = [](const char* name, unsigned otherwise) {
    const char* text = std::getenv(name);
    return text != nullptr && *text != '\0'
               ? static_cast<unsigned>(std::strtoul(text, nullptr, 10))
               : otherwise;
  };
  const unsigned seed = number("KILLS_SEED", 1);
  const double end = now_ms() + number("KILLS_SECONDS", 30) * 1000.0;
  chance_.seed(seed);
  int jobs = 0;
  while (now_ms() < end && !HasFailure()) {
    SCOPED_TRACE("seed " + std::to_string(seed) + ", job " +
                 std::to_string(jobs));
    at_random();
    ++jobs;
  }
  std::printf("seed %u, %d jobs;", seed, jobs);
  for (const auto& [what, times] : seen_) {
    std::printf(" %s %d", what.c_str(), times);
  }
  std::printf("\n");
}

MACHINA_BOTH(Kills);

}  // namespace
}  // namespace machina::e2e
