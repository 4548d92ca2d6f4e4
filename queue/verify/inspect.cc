#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "queue/base/storage.h"
#include "queue/record/record.h"
#include "queue/verify/verify.h"
#include "queue/wal/manifest.h"
#include "queue/wal/recovery.h"
#include "queue/wal/segment.h"
#include "queue/wal/window.h"

namespace machina {
namespace {

using Type = RecordField::Type;

constexpr std::size_t kIdsShown = 8;

struct HashId {
  std::size_t operator()(const JobId& id) const {
    std::size_t hash;
    std::memcpy(&hash, id.bytes.data() + 8, sizeof(hash));
    return hash;
  }
};

// What a line says of each type of record. Tokens are left out.
class Describe {
 public:
  Describe(RecordLine* line, bool payload) : line_(*line), payload_(payload) {}

  void operator()(const EnqueueRecord& r) {
    const NewJob& job = r.job;
    line_.type = "enqueue";
    line_.id = r.id;
    text("kind", job.kind);
    text("queue", job.queue);
    if (job.tenant != "default") text("tenant", job.tenant);
    text("state", name(r.state));
    number("priority", job.priority);
    if (job.min_level > 0)
      text("min_level", "L" + std::to_string(job.min_level));
    if (r.revived != 0) {
      text("revived_from", name(static_cast<State>(r.revived)));
      number("attempt", r.attempt);
    }
    if (job.run_at_ms > 0) time("run_at", job.run_at_ms);
    number("max_attempts", job.max_attempts);
    if (job.timeout_ms > 0) number("timeout_ms", job.timeout_ms);
    ids("depends_on", job.depends_on);
    if (!r.unmet.empty()) number("unmet", r.unmet.size());
    text("dedup_key", job.dedup_key);
    if (!job.concurrency_key.empty()) {
      text("concurrency_key", job.concurrency_key);
      number("concurrency_limit", job.concurrency_limit);
      text("concurrency_key_of", job.kind_key ? "kind" : "client");
    }
    for (const auto& [key, value] : job.labels) text("label." + key, value);
    text("request_id", job.request_id);
    text("traceparent", job.traceparent);
    json("sandbox", job.sandbox);
    data("payload", job.payload);
  }
  void operator()(const GrantRecord& r) {
    line_.type = "grant";
    line_.id = r.id;
    text("fence", fence_hex(r.fence));
    number("attempt", r.attempt);
    text("worker", r.worker);
    text("level", "L" + std::to_string(r.level));
  }
  void operator()(const EndRecord& r) {
    line_.type = "end";
    line_.id = r.id;
    text("state", name(r.state));
    if (r.outcome.code != EndCode::none) text("code", name(r.outcome.code));
    if (r.fence != 0) text("fence", fence_hex(r.fence));
    number("attempt", r.attempt);
    text("worker", r.worker);
    if (r.started_ms > 0) time("started", r.started_ms);
    text("message", r.outcome.message);
    if (!r.outcome.artifacts.empty()) {
      number("artifacts", r.outcome.artifacts.size());
    }
    std::vector<JobId> children;
    for (const EnqueueRecord& child : r.children) children.push_back(child.id);
    ids("children", children);
    data("result", r.outcome.result);
    data("side_effects", r.outcome.side_effects);
  }
  void operator()(const RetryRecord& r) {
    line_.type = "retry";
    line_.id = r.id;
    text("code", name(r.code));
    text("fence", fence_hex(r.fence));
    number("attempt", r.attempt);
    if (r.run_at_ms > 0) time("run_at", r.run_at_ms);
    text("message", r.message);
  }
  void operator()(const ReleaseRecord& r) {
    line_.type = "release";
    line_.id = r.id;
    text("fence", fence_hex(r.fence));
  }
  void operator()(const BlockRecord& r) {
    line_.type = "block";
    line_.id = r.id;
    text("fence", fence_hex(r.fence));
    text("reason", r.reason);
    if (r.deadline_ms > 0) time("deadline", r.deadline_ms);
    data("data", r.data);
  }
  void operator()(const UnblockRecord& r) {
    line_.type = "unblock";
    line_.id = r.id;
    text("actor", r.actor);
    data("input", r.input);
  }
  void operator()(const CancelRecord& r) {
    line_.type = "cancel";
    line_.id = r.id;
  }
  void operator()(const PromoteRecord& r) {
    line_.type = "promote";
    ids("jobs", r.ids);
  }
  void operator()(const ClockRecord& r) {
    line_.type = "clock";
    text("offset_ms", std::to_string(r.offset_ms));
    if (r.boot != 0) text("boot", fence_hex(r.boot));
    if (r.boot != 0) text("boot_ms", std::to_string(r.boot_ms));
  }
  void operator()(const ForgetRecord& r) {
    line_.type = "forget";
    time("until", r.until_ms);
    number("count", r.count);
  }

 private:
  void add(std::string name, std::string value, Type type) {
    line_.fields.push_back({std::move(name), std::move(value), type});
  }
  void text(std::string name, std::string_view value) {
    if (!value.empty()) add(std::move(name), std::string(value), Type::text);
  }
  template <class Number>
  void number(std::string name, Number value) {
    add(std::move(name), std::to_string(value), Type::number);
  }
  void time(std::string name, Millis ms) {
    add(std::move(name), std::to_string(ms), Type::time);
  }
  void json(std::string name, const std::string& value) {
    if (!value.empty()) add(std::move(name), value, Type::json);
  }
  // A client's or a job's own: its size, and itself where it was asked for.
  void data(const std::string& name, const std::string& value) {
    if (value.empty()) return;
    number(name + "_bytes", value.size());
    if (payload_) json(name, value);
  }
  // The first few, and how many.
  void ids(std::string name, const std::vector<JobId>& all) {
    if (all.empty()) return;
    std::string shown;
    for (std::size_t i = 0; i < std::min(all.size(), kIdsShown); ++i) {
      shown += (i ? "," : "") + to_string(all[i]);
    }
    if (all.size() > kIdsShown) {
      shown += ",+" + std::to_string(all.size() - kIdsShown);
    }
    text(std::move(name), shown);
  }

  RecordLine& line_;
  bool payload_;
};

class Inspector {
 public:
  Inspector(Storage& storage, const InspectFilter& filter,
            const std::function<bool(const RecordLine&)>& visit)
      : storage_(storage), filter_(filter), visit_(visit) {}

  // The log below a directory: what was cut off is left out.
  Result<InspectEnd> run_all() {
    auto names = storage_.list("wal");
    if (!names) return names.error();
    std::vector<FoundSegment> found;
    for (const std::string& name : *names) {
      if (!name.ends_with(".seg")) continue;
      auto header = header_of("wal/" + name);
      if (header) {
        found.push_back({"wal/" + name, *header});
      } else if (header.error().code != Code::not_found) {
        note("wal/" + name + ": " + header.error().what);
      }
    }
    Chain chain = link_segments(std::move(found));
    std::sort(chain.kept.begin(), chain.kept.end(),
              [](const FoundSegment& a, const FoundSegment& b) {
                return a.header.first_lsn < b.header.first_lsn;
              });
    for (const FoundSegment& segment : chain.kept) {
      auto go_on = segment_records(segment, ~std::uint64_t{0}, ~Lsn{0});
      if (!go_on) return go_on.error();
      if (!*go_on) return std::move(end_);
    }
    for (std::size_t i = 0; i < chain.live.size(); ++i) {
      bool last = i + 1 == chain.live.size();
      // Those before --from need not be read.
      if (!last && chain.live[i + 1].header.first_lsn <= filter_.from &&
          !follows()) {
        continue;
      }
      const ChainLink next = last ? ChainLink{} : chain.live[i + 1].header.prev;
      auto go_on = segment_records(chain.live[i],
                                   last ? ~std::uint64_t{0} : next.batch_seq,
                                   last ? ~Lsn{0} : next.last_lsn);
      if (!go_on) return go_on.error();
      if (!*go_on) return std::move(end_);
    }
    return std::move(end_);
  }

  Result<InspectEnd> run_one(const std::string& name) {
    auto header = header_of(name);
    if (!header) return header.error();
    auto go_on = segment_records({name, *header}, ~std::uint64_t{0}, ~Lsn{0});
    if (!go_on) return go_on.error();
    return std::move(end_);
  }

 private:
  bool follows() const {
    return !filter_.kind.empty() || !filter_.request_id.empty();
  }
  void note(std::string what) {
    end_.notes.push_back(std::move(what));
    end_.damaged = true;
  }

  Result<SegmentHeader> header_of(const std::string& name) {
    auto file = storage_.open(name, OpenMode::read);
    if (!file) return file.error();
    std::vector<std::byte> bytes(kSegmentDataOffset);
    auto got = (*file)->read_at(0, bytes);
    if (!got) return got.error();
    bytes.resize(*got);
    return decode_segment_headers(bytes);
  }

  // False: enough was shown. Batches behind `last_batch` are not the log's.
  Result<bool> segment_records(const FoundSegment& segment,
                               std::uint64_t last_batch, Lsn last_lsn) {
    const SegmentHeader& header = segment.header;
    auto file = storage_.open(segment.name, OpenMode::read);
    if (!file) {
      // A running server removes what it no longer needs.
      if (file.error().code == Code::not_found) return true;
      return file.error();
    }
    Window window(**file);
    std::uint64_t at = kSegmentDataOffset, seq = header.first_batch_seq;
    Lsn next = header.first_lsn;
    for (; seq <= last_batch; ++seq) {
      auto head = window.at(at, kBatchHeaderBytes);
      if (!head) return head.error();
      auto batch = decode_batch_header(*head, header, at);
      if (!batch || batch->seq != seq || batch->first_lsn != next) break;
      auto whole = window.at(at, kBatchHeaderBytes + batch->payload_bytes);
      if (!whole) return whole.error();
      auto payload = whole->subspan(std::min(kBatchHeaderBytes, whole->size()));
      if (!payload_holds(*batch, header, at, payload)) break;
      std::size_t in = 0;
      for (std::uint32_t n = 0; n < batch->records; ++n, ++next) {
        std::uint64_t offset = at + kBatchHeaderBytes + in;
        auto rest = payload.subspan(std::min(in, payload.size()));
        auto frame = check_record(rest, header, offset);
        if (!frame) {
          note(segment.name + ": offset " + std::to_string(offset) + ": lsn " +
               std::to_string(next) +
               " does not hold; machina wal verify says more");
          return true;
        }
        if (next > filter_.to) return false;
        auto go_on = record(segment.name, offset, next, *frame,
                            rest.subspan(kRecordHeaderBytes, frame->bytes));
        if (!go_on || !*go_on) return go_on;
        in += record_room(frame->bytes);
      }
      at += pad_to(kBatchHeaderBytes + batch->payload_bytes, kBlockBytes);
    }
    if (last_lsn != ~Lsn{0} && next <= last_lsn) {
      note(segment.name + ": offset " + std::to_string(at) + ": lsn " +
           std::to_string(next) + ".." + std::to_string(last_lsn) +
           " do not hold; machina wal verify says more");
    }
    return true;
  }

  Result<bool> record(const std::string& file, std::uint64_t offset, Lsn lsn,
                      const RecordFrame& frame,
                      std::span<const std::byte> body) {
    ++end_.looked_at;
    if (lsn < filter_.from && !follows()) return true;
    auto decoded = decode(static_cast<RecordType>(frame.type), body);
    RecordLine line;
    line.lsn = lsn;
    line.bytes = frame.bytes;
    line.file = file;
    line.offset = offset;
    if (!decoded) {
      if (lsn < filter_.from || filter_.job || follows()) return true;
      line.type = "unknown";
      line.fields.push_back({"type", std::to_string(frame.type), Type::number});
      line.fields.push_back({"why", decoded.error().what, Type::text});
      return show(line);
    }
    line.time = decoded->time_ms;
    if (!wanted(*decoded) || lsn < filter_.from) return true;
    std::visit(Describe(&line, filter_.payload), decoded->body);
    if (!filter_.type.empty() && line.type != filter_.type) return true;
    return show(line);
  }

  Result<bool> show(const RecordLine& line) {
    ++end_.shown;
    return visit_(line) && end_.shown < filter_.limit;
  }

  bool wanted(const Record& record) {
    bool by_job = !filter_.job;
    bool by_submission = !follows();
    auto see = [&](const JobId& id) {
      by_job |= filter_.job == id;
      by_submission |= follows() && followed_.contains(id);
    };
    auto submit = [&](const EnqueueRecord& r) {
      bool match = (filter_.kind.empty() || r.job.kind == filter_.kind) &&
                   (filter_.request_id.empty() ||
                    r.job.request_id == filter_.request_id);
      if (follows() && match) follow(r.id), by_submission = true;
      see(r.id);
    };
    if (auto* e = std::get_if<EnqueueRecord>(&record.body)) {
      submit(*e);
    } else if (auto* end = std::get_if<EndRecord>(&record.body)) {
      see(end->id);
      for (const EnqueueRecord& child : end->children) submit(child);
    } else if (auto* promote = std::get_if<PromoteRecord>(&record.body)) {
      for (const JobId& id : promote->ids) see(id);
    } else {
      std::visit(
          [&](const auto& body) {
            if constexpr (requires { body.id; }) see(body.id);
          },
          record.body);
    }
    return by_job && by_submission;
  }

  void follow(const JobId& id) {
    if (followed_.size() < kFollowMax) {
      followed_.insert(id);
    } else if (!followed_.contains(id) && !full_) {
      full_ = true;
      end_.notes.push_back("more than " + std::to_string(kFollowMax) +
                           " jobs match: of the others only the submissions "
                           "are shown");
    }
  }

  Storage& storage_;
  const InspectFilter& filter_;
  const std::function<bool(const RecordLine&)>& visit_;
  InspectEnd end_;
  std::unordered_set<JobId, HashId> followed_;
  bool full_ = false;
};

}  // namespace

Result<InspectEnd> inspect_log(
    const std::string& path, const InspectFilter& filter,
    const std::function<bool(const RecordLine&)>& visit) {
  if (!path.ends_with(".seg")) {
    auto storage = open_posix_storage(path);
    if (!storage) return storage.error();
    return Inspector(**storage, filter, visit).run_all();
  }
  std::size_t slash = path.rfind('/');
  std::string dir = slash == path.npos ? "." : path.substr(0, slash + 1);
  auto storage = open_posix_storage(dir);
  if (!storage) return storage.error();
  return Inspector(**storage, filter, visit).run_one(path.substr(slash + 1));
}

}  // namespace machina
