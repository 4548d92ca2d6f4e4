// ops: what runs on a root, and how it is started, ended, restarted and looked
// at. The scripts ops/*.sh are these verbs.

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <random>

#include "queue/base/rfc3339.h"
#include "tools/cli/ops_common.h"
#include "tools/cli/start_conditions.h"
#include "tools/root.h"

namespace machina::cli {
namespace {

constexpr long kLookMs = 3000;
// Canaries take a moment each. A server that is ready is not waited for longer.
constexpr std::int64_t kWorkersWaitMs = 10'000;

// The root these verbs are about, looked at. Nothing and *exit where the
// settings are not usable.
std::optional<Detected> look(const OpsOptions& options, int* exit) {
  auto config = load(*options.settings);
  if (!config) {
    *exit = kOpsUsage;
    return std::nullopt;
  }
  const std::string& root = config->typed().root;
  auto found =
      options.from.empty() ? detect(root) : detect_from(root, options.from);
  if (!found) {
    *exit = fail(kOpsUsage, found.error().what);
    return std::nullopt;
  }
  *exit = kOk;
  return std::move(*found);
}

// systemd starts again what it was asked to keep running: whoever believes it
// to have ended would copy or remove a root in use.
bool supervised(const Detected& found) {
  return found.serve && found.serve_file->supervisor == "systemd";
}

int ops_detect(const OpsOptions& options) {
  int exit = 0;
  auto found = look(options, &exit);
  if (!found) return exit;
  return give_report(options, found->root, "pids.current.json", to_json(*found),
                     to_text(*found), detect_exit(*found));
}

int ops_kill(const OpsOptions& options) {
  int exit = 0;
  auto found = look(options, &exit);
  if (!found) return exit;
  std::optional<OpsLock> lock;
  if (!options.dry_run) {
    auto taken = OpsLock::take(found->root, kOpsLockWaitMs);
    if (taken) {
      lock.emplace(std::move(*taken));
      found = look(options, &exit);  // another verb may just have changed it
      if (!found) return exit;
    } else if (taken.error().code == Code::conflict) {
      return fail(kOpsPartial, taken.error().what);
    } else if (found->running()) {  // ending must not need a writable disk
      std::cerr << "machina: going on without a lock: " << taken.error().what
                << "\n";
    }
  }
  if (!options.dry_run && supervised(*found)) {
    return fail(kOpsUsage,
                "systemd runs this server and would start it again; nothing "
                "was ended: systemctl stop machina");
  }
  Killed killed;
  if (options.dry_run) {
    for (const auto* each : {&found->serve, &found->pool}) {
      if (*each) killed.targets.push_back((*each)->process);
    }
  } else {
    killed = kill_all(*found,
                      static_cast<std::int64_t>(options.term_seconds * 1000));
  }
  if (!found->running()) {
    exit = kOpsNotRunning;
  } else {
    exit = killed.left.empty() ? kOpsOk : kOpsPartial;
  }
  OpsJson json = to_json(killed);
  json["root"] = found->root;
  json["term_seconds"] = options.term_seconds;
  json["dry_run"] = options.dry_run;
  if (!options.from.empty()) {
    json["from"] = options.from;
    OpsJson skipped = OpsJson::array();
    for (const auto& each : found->stale) {
      skipped.push_back(
          {{"entry", each.file}, {"pid", each.pid}, {"why", each.why}});
    }
    json["skipped"] = skipped;
  }
  std::string text;
  if (!found->running()) {
    text = to_text(*found);
  } else if (!options.dry_run) {
    text = to_text(killed, found->root);
  } else {
    text = "would end, on " + found->root + ":\n";
    for (const auto& target : killed.targets) {
      text += std::to_string(target.id.pid) + ": " + target.command + "\n";
    }
  }
  if (!options.dry_run) {
    // What is left of them names nobody any more.
    for (const char* role : {"serve", "pool"}) {
      auto file = read_pid_file(found->root, role);
      auto now = detect(found->root);
      if (file && now && !now->running()) {
        remove_report(found->root, std::string(role) + ".pid");
      }
    }
    (void)write_report(found->root, "kill.report.txt", text);
  }
  return give_report(options, found->root, "pids.killed.json", json, text,
                     exit);
}

int ops_healthcheck(const OpsOptions& options) {
  int exit = 0;
  auto found = look(options, &exit);
  if (!found) return exit;
  Health health = await_health(options, *found);
  return give_report(options, found->root, "health.report.json", *health.json,
                     health.text, health.exit);
}

// --- start -----------------------------------------------------------------

std::string random_id() {
  std::random_device random;
  char text[20];
  std::snprintf(text, sizeof text, "%08x", random());
  return text;
}

std::vector<std::string> serve_argv(const OpsOptions& options,
                                    const std::string& root) {
  static const std::map<std::string, std::string> kFlags = {
      {"MACHINA_HOST", "--host"},
      {"MACHINA_PORT", "--port"},
      {"MACHINA_WORKERS", "--workers"},
      {"MACHINA_PROFILE", "--profile"}};
  std::vector<std::string> argv = {self_exe(), "serve", "--root", root};
  for (const auto& [name, value] : options.settings->overrides) {
    if (auto flag = kFlags.find(name); flag != kFlags.end()) {
      argv.push_back(flag->second);
      argv.push_back(value);
    }
  }
  if (!options.settings->file.empty()) {
    std::error_code error;
    argv.emplace_back("--config");
    argv.push_back(
        std::filesystem::absolute(options.settings->file, error).string());
  }
  if (options.unsafe_fs) argv.emplace_back("--unsafe-fs");
  return argv;
}

OpsJson start_json(const OpsOptions& options, const std::string& root) {
  return {
      {"ts", rfc3339_now()},
      {"stack_id", options.stack_id.empty() ? random_id() : options.stack_id},
      {"root", root},
      {"serve_pid", nullptr},
      {"bot_pid", nullptr},
      {"serve_host", nullptr},
      {"serve_port", nullptr},
      {"serve_log", ops_dir(root) + "/serve.log"},
      {"bot_log", nullptr},
      {"already_running", false},
      {"ready", false},
      {"launcher", "nohup"},
      {"workers", nullptr},
      {"dry_run", options.dry_run}};
}

void fill_server(OpsJson* json, const std::string& root) {
  auto found = detect(root);
  if (!found || !found->serve) return;
  (*json)["serve_pid"] = found->serve->process.id.pid;
  (*json)["serve_host"] = found->serve_file->host;
  (*json)["serve_port"] = found->serve_file->port;
  (*json)["version"] = found->serve_file->version;
  if (found->pool) (*json)["pool_pid"] = found->pool->process.id.pid;
}

// One that runs is left as it is: with other settings it would be another's.
int already_running(const OpsOptions& options, const Detected& found) {
  Probe ready = probe(*options.settings, root_socket(found.root), "/ready");
  OpsJson json = start_json(options, found.root);
  fill_server(&json, found.root);
  json["already_running"] = true;
  json["ready"] = ready.status == 200;
  WorkersThere workers;
  if (ready.status == 200) {
    workers = look_at_workers(options, root_socket(found.root), kLookMs);
  }
  json["workers"] = workers.json();
  std::string text =
      "a server runs there already, process " +
      std::to_string(found.serve->process.id.pid) +
      (ready.status == 200 ? ", and is ready, " + workers.text()
                           : ", and is not ready") +
      "; nothing was changed (machina ops restart replaces it)\n";
  if (!options.text) std::cerr << "machina: " << text;
  return give_report(options, found.root, "", json, text,
                     ready.status == 200 ? kOpsOk : kOpsPartial);
}

// The lock, and the directory it is in.
Result<OpsLock> lock_for_start(const std::string& root) {
  std::string dir = ops_dir(root);
  if (::mkdir(dir.c_str(), 0700) != 0 && errno != EEXIST) {
    return Error{Code::io, dir + ": " + std::strerror(errno)};
  }
  return OpsLock::take(root, kOpsLockWaitMs);
}

// A server that somebody started by hand meanwhile has the root: ours finds
// it locked and ends.
void end_loser(Launched* ours) {
  std::int64_t until = steady_ms() + 5'000;
  while (ours->ended() == -1 && steady_ms() < until) ::usleep(10'000);
  if (ours->ended() == -1) ::kill(ours->pid(), SIGKILL);
}

int start_failed(const OpsOptions& options, const std::string& root,
                 OpsJson json, const std::string& why, int exit) {
  json["error"] = why;
  (void)write_report(root, "start.error", rfc3339_now() + " " + why + "\n");
  if (!options.text) fail(exit, why);  // else the report says it
  return give_report(options, root, "pids.started.json", json, why + "\n",
                     exit);
}

// --force: what runs there is ended, with the same grace as `ops kill`.
int end_first(const OpsOptions& options, const std::string& root,
              OpsJson* ended) {
  auto found = detect(root);
  if (!found) return fail(kOpsPartial, found.error().what);
  if (!found->running()) return kOpsOk;
  if (supervised(*found)) {
    return fail(kOpsUsage,
                "--force: systemd runs this server and would start it again; "
                "nothing was ended: systemctl restart machina");
  }
  Killed killed =
      kill_all(*found, static_cast<std::int64_t>(options.term_seconds * 1000));
  *ended = to_json(killed);
  (void)write_report(found->root, "kill.report.txt",
                     to_text(killed, found->root));
  if (killed.left.empty()) return kOpsOk;
  return fail(kOpsPartial, "--force: process " +
                               std::to_string(killed.left.front().pid) +
                               " was not ended (" + killed.left.front().why +
                               "); nothing was started");
}

std::string systemctl_line(bool restart) {
  return std::string("systemctl ") + (restart ? "restart" : "start") +
         " machina.service";
}

// `named`: the root as it was asked for.
int by_systemd(const OpsOptions& options, const std::string& named,
               const Result<Detected>& running) {
  const std::string root = running ? running->root : named;
  if (options.unsafe_fs || !options.settings->file.empty() ||
      options.settings->overrides.size() >
          options.settings->overrides.count("MACHINA_ROOT")) {
    return fail(kOpsUsage,
                "machina.service serves this root with settings of its own: "
                "change its configuration, or use --launcher nohup");
  }
  const bool theirs =
      running && running->serve && running->serve_file->supervisor == "systemd";
  OpsJson json = start_json(options, root);
  json["launcher"] = "systemd";
  json["serve_log"] = nullptr;  // journalctl has it
  // What somebody started by hand has the root. A pool whose server is gone is
  // the unit's, and its jobs run on.
  const bool end = options.force && running && running->running() && !theirs;
  if (options.dry_run) {
    json["systemctl"] = systemctl_line(theirs);
    std::string text = end ? "would end first:\n" + to_text(*running) : "";
    text += "would run: " + systemctl_line(theirs) + "\n";
    return give_report(options, "", "", json, text, kOpsOk);
  }
  // A root that no server has used yet has no place for a lock, and none of
  // ours is made in it: it may be another user's.
  auto lock = OpsLock::take(root, kOpsLockWaitMs);
  if (!lock && (end || lock.error().code == Code::conflict)) {
    return fail(kOpsPartial, lock.error().what);
  }
  if (end) {
    OpsJson ended;
    int exit = end_first(options, root, &ended);
    if (exit != kOpsOk) return exit;
    json["ended"] = ended;
  }
  if (auto done = start_unit(theirs); !done) {
    return start_failed(options, root, json, done.error().what, kOpsPartial);
  }
  Ready state = await_ready(options, root_socket(root), nullptr);
  json["took_ms"] = state.took_ms;
  json["ready"] = state.ready;
  fill_server(&json, root);
  if (!state.ready) {
    return start_failed(options, root, json,
                        "machina.service was started and is " + state.why,
                        kOpsPartial);
  }
  WorkersThere workers =
      await_workers(options, root_socket(root), kWorkersWaitMs);
  json["workers"] = workers.json();
  std::string text = "started by systemd, ready, " + workers.text() +
                     "; journalctl -u machina has its log\n";
  remove_report(root, "start.error");
  return give_report(options, root, "pids.started.json", json, text,
                     workers.none() ? kOpsPartial : kOpsOk);
}

// It is ready, and takes jobs. Whether anybody works on them is said too.
int started(const OpsOptions& options, const std::string& root, OpsJson json,
            const Ready& state, const Launched& launched) {
  const auto limit = static_cast<std::int64_t>(options.wait_seconds * 1000);
  WorkersThere workers = await_workers(
      options, root_socket(root),
      std::clamp<std::int64_t>(limit - state.took_ms, 0, kWorkersWaitMs));
  json["workers"] = workers.json();
  fill_server(&json, root);
  std::string text = "started, process " + std::to_string(launched.pid()) +
                     ", ready after " + std::to_string(state.took_ms) +
                     " ms, " + workers.text() + "; its log is " +
                     launched.log_path() + "\n";
  if (workers.none()) {
    text +=
        "no worker has come: " + root + "/pool.log says why, and jobs wait\n";
    if (!options.text) std::cerr << "machina: " << text;
  }
  return give_report(options, root, "pids.started.json", json, text,
                     workers.none() ? kOpsPartial : kOpsOk);
}

}  // namespace

int ops_start(const OpsOptions& options) {
  auto config = load(*options.settings);
  if (!config) return kOpsUsage;
  // The unit has a configuration of its own, and refuses by itself.
  auto refusals = options.launcher == "systemd" ? std::vector<std::string>()
                                                : settings_faults(*config);
  for (const auto& line : refusals) fail(kOpsUsage, line);
  if (!refusals.empty()) return kOpsUsage;
  const std::string& named = config->typed().root;
  auto running = detect(named);
  if (running && running->serve && !options.force) {
    return already_running(options, *running);
  }
  if (options.launcher != "nohup") {
    Unit unit = look_at_unit(named);
    if (!unit.why_not.empty() && options.launcher == "systemd") {
      return fail(kOpsUsage, "--launcher systemd: " + unit.why_not);
    }
    if (unit.why_not.empty()) return by_systemd(options, named, running);
  }
  Launch launch;
  launch.environment = child_environment();
  OpsJson ended;
  std::optional<OpsLock> lock;
  if (options.force && running && running->running() && !options.dry_run) {
    auto taken = OpsLock::take(running->root, kOpsLockWaitMs);
    if (!taken) return fail(kOpsPartial, taken.error().what);
    lock.emplace(std::move(*taken));
    launch.root = running->root;
    launch.argv = serve_argv(options, launch.root);
    if (auto ok = try_launch(launch); !ok) {
      return fail(kOpsUsage,
                  "--force: a server would not start with these settings; "
                  "nothing was ended. It said:\n" +
                      ok.error().what);
    }
    int exit = end_first(options, named, &ended);
    if (exit != kOpsOk) return exit;
  }
  if (options.dry_run) {
    std::error_code error;
    launch.root =
        std::filesystem::weakly_canonical(config->typed().root, error);
    if (running && running->serve && !options.force) {
      return already_running(options, *running);
    }
  } else {
    auto root =
        prepare_root(config->typed().root, config->prod(), options.unsafe_fs);
    if (!root) return fail(kOpsUsage, root.error().what);
    launch.root = root->path;
    if (!lock) {
      auto taken = lock_for_start(launch.root);
      if (!taken) return fail(kOpsPartial, taken.error().what);
      lock.emplace(std::move(*taken));
    }
    if (auto found = detect(launch.root); found && found->serve) {
      return already_running(options, *found);
    }
  }
  launch.argv = serve_argv(options, launch.root);
  OpsJson json = start_json(options, launch.root);
  json["argv"] = launch.argv;
  json["ended"] = ended;
  if (options.dry_run) {
    if (auto ok = try_launch(launch); !ok) {
      const std::string why =
          "a server would not start with these settings. It said:\n" +
          ok.error().what;
      json["error"] = why;
      if (!options.text) fail(kOpsUsage, why);
      return give_report(options, "", "", json, why + "\n", kOpsUsage);
    }
    std::string text;
    if (options.force && running && running->running()) {
      text += "would end first:\n" + to_text(*running);
    }
    text += "would start:";
    for (const auto& word : launch.argv) text += " " + word;
    return give_report(options, "", "", json, text + "\n", kOpsOk);
  }
  auto launched = Launched::start(launch);
  if (!launched) {
    return start_failed(options, launch.root, json, launched.error().what,
                        kOpsPartial);
  }
  json["serve_pid"] = launched->pid();
  Ready state = await_ready(options, root_socket(launch.root), &*launched);
  json["took_ms"] = state.took_ms;
  json["ready"] = state.ready;
  if (!state.ready) {
    int code = launched->ended();
    if (code != -1) json["exit_code"] = code;
    json["log_tail"] = launched->log_tail();
    return start_failed(options, launch.root, json,
                        "the server was started and " +
                            std::string(code != -1 ? "" : "is ") + state.why +
                            "; its log ends:\n" + launched->log_tail(),
                        code == kUsage ? kOpsUsage : kOpsPartial);
  }
  auto found = detect(launch.root);
  if (found && found->serve &&
      found->serve->process.id.pid != launched->pid()) {
    end_loser(&*launched);
    return already_running(options, *found);
  }
  if (!found || !found->serve) {
    end_loser(&*launched);
    return start_failed(
        options, launch.root, json,
        "another server, of which no record is here, answers on this root; "
        "the one that was started has ended: " +
            launched->log_tail(),
        kOpsPartial);
  }
  remove_report(launch.root, "start.error");
  return started(options, launch.root, std::move(json), state, *launched);
}

// --- the parser ------------------------------------------------------------

namespace {

using Run = int (*)(const OpsOptions&);

Verb add_verb(Verb ops, const std::string& name, const std::string& what,
              std::shared_ptr<OpsOptions> options, Run run) {
  Verb verb = ops.add_verb(name, what);
  add_setting(verb, options->settings, "--root", "MACHINA_ROOT",
              "whose processes");
  add_setting(verb, options->settings, "--profile", "MACHINA_PROFILE",
              "dev or prod");
  add_common(verb, options->settings);
  verb.add_flag("--text", options->text, "print text instead of JSON");
  verb.add_flag("--dry-run", options->dry_run,
                "say what would be done; change nothing, write no report");
  verb.run([options, run] { return run(*options); });
  return verb;
}

// `owner` keeps `*to` for as long as the parser lives.
void add_seconds(Verb verb, const std::string& name, std::int64_t min_ms,
                 double* to, std::shared_ptr<OpsOptions> owner,
                 const std::string& help) {
  add_duration(
      verb, name, min_ms, 86'400'000, "s",
      [to, owner = std::move(owner)](std::int64_t ms) {
        *to = static_cast<double>(ms) / 1000;
      },
      help);
}

void add_wait(Verb verb, std::shared_ptr<OpsOptions> options) {
  add_seconds(verb, "--wait-seconds", 100, &options->wait_seconds, options,
              "how long it may take until all is well");
}

void add_listen(Verb verb, std::shared_ptr<OpsOptions> options) {
  add_setting(verb, options->settings, "--host,--serve-host", "MACHINA_HOST",
              "address to bind");
  add_setting(verb, options->settings, "--port,--serve-port", "MACHINA_PORT",
              "0: any free one");
  add_setting(verb, options->settings, "--workers", "MACHINA_WORKERS", "0..64");
}

void add_disk(Verb verb, std::shared_ptr<OpsOptions> options) {
  verb.add_option("--min-free-mb", options->min_free_mb,
                  "less free disk than that is a failure")
      .range(0, 1 << 30);
}

}  // namespace

void add_ops(Verb& app) {
  Verb ops = app.add_verb(
      "ops", "Detect, start, end, restart and check what runs on a root");
  ops.require_verb();
  auto detecting = std::make_shared<OpsOptions>();
  add_verb(ops, "detect", "Say what runs there", detecting, ops_detect);

  auto killing = std::make_shared<OpsOptions>();
  Verb kill =
      add_verb(ops, "kill", "End it: TERM, then KILL", killing, ops_kill);
  kill.add_option("--from", killing->from,
                  "end only what this report of detect names and still is "
                  "that process");
  add_seconds(kill, "--term-seconds", 0, &killing->term_seconds, killing,
              "grace between TERM and KILL, in which running jobs may end; "
              "default: 8");

  auto starting = std::make_shared<OpsOptions>();
  Verb start = add_verb(ops, "start", "Start a server in the background",
                        starting, ops_start);
  add_listen(start, starting);
  add_wait(start, starting);
  start.add_flag("--unsafe-fs", starting->unsafe_fs,
                 "accept NFS, overlay or tmpfs in the prod profile");
  start.add_option("--stack-id", starting->stack_id,
                   "a name for this start in its report");
  start
      .add_option("--launcher", starting->launcher,
                  "nohup: in the background, in a session of its own; "
                  "systemd: the installed unit; auto: systemd where its unit "
                  "serves this root, else nohup")
      .one_of({"auto", "nohup", "systemd"});
  start.add_flag("--force", starting->force,
                 "end what runs there first, as kill does");

  auto restarting = std::make_shared<OpsOptions>();
  Verb restart = add_verb(
      ops, "restart", "Replace the server; its pool and the running jobs stay",
      restarting, ops_restart);
  add_listen(restart, restarting);
  add_wait(restart, restarting);
  add_disk(restart, restarting);
  restart.add_flag("--pool", restarting->replace_pool,
                   "then replace the pool too, as its jobs end");
  add_seconds(restart, "--handover-seconds", 100, &restarting->handover_seconds,
              restarting, "how long the old server may take to let go");

  add_doctor(ops);

  auto checking = std::make_shared<OpsOptions>();
  Verb check = add_verb(ops, "healthcheck", "Say whether it is well", checking,
                        ops_healthcheck);
  add_disk(check, checking);
  checking->wait_seconds = 5;
  add_wait(check, checking);
}

}  // namespace machina::cli
