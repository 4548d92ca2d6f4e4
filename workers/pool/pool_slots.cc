#include "workers/pool/pool_slots.h"

#include <algorithm>

#include "queue/base/check.h"
#include "queue/base/json.h"
#include "queue/base/rfc3339.h"

namespace machina {
int PoolSlots::alive() const {
  return static_cast<int>(
      std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) {
        return s.phase == Phase::running || s.phase == Phase::leaving;
      }));
}

int PoolSlots::pending() const {
  return static_cast<int>(
      std::count_if(slots_.begin(), slots_.end(),
                    [](const Slot& s) { return s.phase != Phase::empty; }));
}

int PoolSlots::staying() const {
  return static_cast<int>(
      std::count_if(slots_.begin(), slots_.end(),
                    [](const Slot& s) { return s.phase == Phase::running; }));
}

std::vector<int> PoolSlots::to_start(int target, Millis now_ms) const {
  std::vector<int> out;
  int missing = target - staying();
  for (int i = 0; i < kSlotsMax && missing > 0; ++i) {
    const Slot& slot = slots_[static_cast<std::size_t>(i)];
    // A dying slot will be empty in a moment; it is waited for, so that a
    // replacement takes the place of what it replaces.
    if (slot.phase == Phase::dying) --missing;
    if (slot.phase != Phase::empty || missing <= 0) continue;
    --missing;
    if (now_ms >= slot.not_before_ms) out.push_back(i);
  }
  return out;
}

Millis PoolSlots::next_start_ms(int target, Millis now_ms) const {
  if (staying() >= target) return -1;
  Millis first = -1;
  for (const Slot& slot : slots_) {
    if (slot.phase != Phase::empty || slot.not_before_ms <= now_ms) continue;
    if (first < 0 || slot.not_before_ms < first) first = slot.not_before_ms;
  }
  return first;
}

std::vector<int> PoolSlots::to_stop(int target) const {
  std::vector<int> out;
  int extra = staying() - target;
  for (const bool busy : {false, true}) {
    for (int i = kSlotsMax - 1; i >= 0 && extra > 0; --i) {
      const Slot& slot = slots_[static_cast<std::size_t>(i)];
      if (slot.phase != Phase::running || slot.job.empty() == busy) continue;
      out.push_back(i);
      --extra;
    }
  }
  return out;
}

void PoolSlots::started(int slot, const std::string& name, int pid,
                        Millis now_ms, Millis wall_ms) {
  Slot& s = at(slot);
  CHECK(s.phase == Phase::empty);
  s.phase = Phase::running;
  s.killed = false;
  s.name = name;
  s.pid = pid;
  s.started_ms = now_ms;
  s.started_wall_ms = wall_ms;
  s.isolation.clear();
  s.job.clear();
}

void PoolSlots::leaving(int slot) {
  CHECK(at(slot).phase == Phase::running);
  at(slot).phase = Phase::leaving;
}

void PoolSlots::pause(Slot& slot, Millis now_ms) {
  ++slot.early_deaths;
  // The first replacement is at once: a worker that was killed is missed.
  if (slot.early_deaths == 1) return;
  Millis pause = kBackoffMinMs;
  for (int i = 2; i < slot.early_deaths && pause < kBackoffMaxMs; ++i) {
    pause *= 2;
  }
  slot.not_before_ms = now_ms + std::min(pause, kBackoffMaxMs);
}

void PoolSlots::not_started(int slot, Millis now_ms) {
  pause(at(slot), now_ms);
}

const PoolSlots::Slot* PoolSlots::find(int pid) const {
  const auto at =
      std::find_if(slots_.begin(), slots_.end(),
                   [&](const Slot& slot) { return slot.pid == pid; });
  return pid > 0 && at != slots_.end() ? &*at : nullptr;
}

int PoolSlots::exited(int pid, Millis now_ms) {
  for (int i = 0; i < kSlotsMax; ++i) {
    Slot& slot = at(i);
    if (slot.pid != pid) continue;
    if (slot.phase == Phase::leaving || now_ms - slot.started_ms >= kLivedMs) {
      slot.early_deaths = 0;
    }
    if (slot.phase == Phase::running && now_ms - slot.started_ms < kLivedMs) {
      pause(slot, now_ms);
    }
    slot.phase = Phase::dying;
    slot.pid = -1;
    slot.job.clear();
    return i;
  }
  return -1;
}

void PoolSlots::emptied(int slot) {
  if (slot < 0 || slot >= kSlotsMax) return;
  Slot& s = at(slot);
  if (s.phase != Phase::dying) return;
  s.phase = Phase::empty;
  (s.killed ? ended_ : gone_).push_back(s.name);
}

void PoolSlots::killed() {
  for (Slot& slot : slots_) slot.killed = slot.killed || slot.pid > 0;
}

void PoolSlots::inherit(const std::vector<std::string>& gone,
                        const std::vector<std::string>& ended) {
  gone_.insert(gone_.end(), gone.begin(), gone.end());
  ended_.insert(ended_.end(), ended.begin(), ended.end());
}

std::vector<std::string> PoolSlots::unreported() const {
  std::vector<std::string> out;
  const auto add = [&out](const std::string& name, std::string_view fate) {
    out.emplace_back(name).append(fate);
  };
  for (const std::string& name : gone_) add(name, kDied);
  for (const std::string& name : ended_) add(name, kEnded);
  for (const Slot& slot : slots_) {
    if (slot.phase == Phase::empty) continue;
    add(slot.name, slot.killed                  ? kEnded
                   : slot.phase == Phase::dying ? kDied
                                                : "");
  }
  return out;
}

void PoolSlots::reported(const std::vector<std::string>& names) {
  for (auto* list : {&gone_, &ended_}) {
    std::erase_if(*list, [&](const std::string& name) {
      return std::find(names.begin(), names.end(), name) != names.end();
    });
  }
}

std::string PoolSlots::sync_body(const std::string& host,
                                 const std::string& session,
                                 const std::string& counts,
                                 const std::string& trouble,
                                 std::uint64_t pids_max, Millis wait_ms) const {
  std::string out = "{\"host\":" + json::quoted(host) +
                    ",\"session\":" + json::quoted(session) + ",\"workers\":[";
  bool first = true;
  for (int i = 0; i < kSlotsMax; ++i) {
    const Slot& slot = slots_[static_cast<std::size_t>(i)];
    if (slot.phase == Phase::empty) continue;
    const char* state = slot.phase == Phase::dying     ? "dying"
                        : slot.phase == Phase::leaving ? "leaving"
                        : slot.isolation.empty()       ? "starting"
                        : slot.job.empty()             ? "idle"
                                                       : "busy";
    if (!first) out += ',';
    first = false;
    out += "{\"name\":" + json::quoted(slot.name) +
           ",\"slot\":" + std::to_string(i) +
           ",\"pid\":" + std::to_string(slot.pid) + ",\"state\":\"" + state +
           "\",\"started_at\":\"" + rfc3339(slot.started_wall_ms) +
           "\",\"pids_max\":" + std::to_string(pids_max);
    if (!slot.job.empty()) out += ",\"job\":" + json::quoted(slot.job);
    if (!slot.isolation.empty()) {
      // The level beside the whole, for those who look for nothing else.
      json::members(slot.isolation, [&](auto key, auto value) {
        if (key == "level") out += ",\"level\":" + std::string(value.raw());
        return true;
      });
      out += ",\"isolation\":" + slot.isolation;
    }
    out += '}';
  }
  const auto names = [&out](const std::vector<std::string>& list) {
    for (std::size_t i = 0; i < list.size(); ++i) {
      if (i > 0) out += ',';
      json::quote(out, list[i]);
    }
  };
  out += "],\"gone\":[";
  names(gone_);
  // Left out where there is none: a server before it does not know the member.
  if (!ended_.empty()) {
    out += "],\"ended\":[";
    names(ended_);
  }
  out += ']';
  if (!trouble.empty()) out += ",\"trouble\":" + trouble;
  return out + ",\"counts\":" + counts +
         ",\"wait_ms\":" + std::to_string(wait_ms) + "}";
}

}  // namespace machina
