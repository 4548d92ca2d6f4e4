// What is asked about patches. The store is read on store threads; the loop
// only carries bytes.

#include "queue/base/hex.h"
#include "queue/base/numbers.h"
#include "server/api/service.h"

namespace machina {
namespace {

Problem no_patch(std::string_view id) {
  Problem p;
  p.status = 404;
  p.code = "not-found";
  p.detail = "patch: " + shown(id) +
             " is not known; a patch is known when its patch.apply job has "
             "ended";
  return p;
}

// What a result can say (docs/kinds/patch.apply.md); without one, how the job
// ended.
constexpr std::string_view kOutcomes[] = {
    "applied",           "no_change",       "conflict", "rejected",
    "tests_failed",      "approval_denied", "failed",   "dead",
    "blocked_alignment", "cancelled",       "succeeded"};

MaybeProblem read_outcome(const std::string& value, PatchQuery* query) {
  std::string all;
  for (std::string_view one : kOutcomes) {
    if (value == one) {
      query->outcome = value;
      return std::nullopt;
    }
    all += (all.empty() ? "" : ", ") + std::string(one);
  }
  return bad_field("outcome", shown(value) + " is none of " + all);
}

// A repository may have been named by its path or by its name below a root:
// both are looked for.
MaybeProblem read_repo(std::string value, const std::vector<std::string>& roots,
                       PatchQuery* query) {
  while (value.size() > 1 && value.ends_with('/')) value.pop_back();
  query->repo = {value};
  std::string all;
  bool below = false;
  for (std::string root : roots) {
    all += (all.empty() ? "" : ", ") + root;
    if (!root.ends_with('/')) root += '/';
    if (!value.starts_with('/')) {
      query->repo.push_back(root + value);
    } else if (value.starts_with(root) && value.size() > root.size()) {
      below = true;
      query->repo.push_back(value.substr(root.size()));
    }
  }
  if (!value.starts_with('/') || below || roots.empty()) return std::nullopt;
  return bad_field(
      "repo", shown(value) + " is not below one of the repository roots (" +
                  all + "): give a path below one, or the name there");
}

// A SHA-256, with "sha256:" before it or not.
MaybeProblem read_digest(const std::string& name, const std::string& value,
                         PatchQuery* query) {
  constexpr std::string_view kPrefix = "sha256:";
  std::string hex = value;
  if (hex.starts_with(kPrefix)) hex.erase(0, kPrefix.size());
  if (!is_sha256(hex)) {
    return bad_field(name, shown(value) +
                               " is no SHA-256: 64 hexadecimal digits in lower "
                               "case, with or without \"sha256:\" before them");
  }
  if (name == "diff_digest") {
    query->diff_digest = std::string(kPrefix) + hex;
  } else {
    query->license_fingerprint = hex;
  }
  return std::nullopt;
}

MaybeProblem read_filter(const std::string& name, const std::string& value,
                         const std::vector<std::string>& roots,
                         PatchQuery* query) {
  struct {
    std::string_view name;
    std::string* to;
    std::size_t max;
  } const texts[] = {{"license", &query->license, 256},
                     {"vector", &query->vector, kPatchNameBytesMax},
                     {"path", &query->path, kPatchNameBytesMax},
                     {"session", &query->session, kPatchNameBytesMax},
                     {"license_fingerprint", nullptr, 71},
                     {"diff_digest", nullptr, 71},
                     {"repo", nullptr, kPatchTextBytesMax},
                     {"outcome", nullptr, 64}};
  for (const auto& text : texts) {
    if (name != text.name) continue;
    if (value.empty()) return bad_field(name, "it is empty");
    if (value.size() > text.max) {
      return bad_field(name, std::to_string(value.size()) + " bytes; at most " +
                                 std::to_string(text.max));
    }
    if (name == "repo") return read_repo(value, roots, query);
    if (name == "outcome") return read_outcome(value, query);
    if (text.to == nullptr) return read_digest(name, value, query);
    *text.to = value;
    return std::nullopt;
  }
  if (name == "limit") {
    const auto limit = parse_number<int>(value);
    if (!limit || *limit < 1 || *limit > 1000) {
      return bad_field(name,
                       shown(value) + " is not an integer from 1 to 1000");
    }
    query->limit = *limit;
    return std::nullopt;
  }
  if (name == "cursor") {
    if (!parse_job_id(value)) {
      return bad_field(name, "it does not come from this server's last page");
    }
    query->cursor = value;
    return std::nullopt;
  }
  return unknown_field(name);
}

// A body made on a store thread; nothing: there is no such patch.
using MadeBody = Result<std::optional<std::string>>;

}  // namespace

// Goes on when what had ended by now was fed, or after the shard's patience
// with lists: a list of finished jobs waits for that. This one has no rows.
void Service::when_fed(std::function<void()> then) {
  Request request;
  ListQuery list;
  list.states = {State::succeeded, State::failed, State::cancelled,
                 State::dead};
  list.since_ms = clock_.wall_ms() + kDelayMsMax;
  list.limit = 1;
  request.what = std::move(list);
  request.with_payload = false;
  ask(std::move(request),
      [then = std::move(then)](const Response&) { then(); });
}

static void list_patches(Service& s, const Exchange& call) {
  auto parameters = parse_query(call.head.query);
  MaybeProblem problem;
  PatchQuery query;
  query.tenant = call.principal.filter();
  if (!parameters) {
    problem = bad_field("query", "malformed percent-encoding");
    parameters.emplace();
  }
  for (const auto& [name, value] : *parameters) {
    if (problem) break;
    problem = read_filter(name, value, s.options_.repo_roots, &query);
  }
  if (problem) return s.refuse(call.peer, call.sequence, *problem);
  struct Made {
    std::string body, next;
  };
  Where where{call.peer.id, call.sequence};
  std::string rest = without_cursor(call.head.query);
  Patches* patches = s.patches_.get();
  auto make = [patches, query]() -> Result<Made> {
    auto page = patches->list(query);
    if (!page) return page.error();
    Made made;
    made.next = page->cursor;
    JsonWriter json(made.body);
    json.begin_object();
    json.key("patches").begin_array();
    for (const PatchRecord& patch : page->patches) {
      append_patch(json, patch, ShowPatch::summary);
    }
    json.end_array();
    json.key("cursor");
    if (page->cursor.empty()) {
      json.null();
    } else {
      json.string(page->cursor);
    }
    json.key("scanned").number(page->scanned);
    json.end_object();
    return made;
  };
  auto show = [&s, where, rest](Result<Made> made) {
    if (!made) return s.refuse_error(where, made.error());
    Extras extras;
    if (!made->next.empty()) {
      extras.headers = "Link: </v1/patches?" + rest + "cursor=" + made->next +
                       ">; rel=\"next\"\r\n";
    }
    if (Peer* p = s.peer(where.peer)) {
      s.reply(*p, where.sequence, 200, made->body, extras);
    }
  };
  s.when_fed(
      [&s, where, make, show] { s.on_store<Result<Made>>(where, make, show); });
}

// The half that the reads of one patch share.
void Service::show_patch(
    const Exchange& call,
    std::function<Result<std::optional<std::string>>(const std::string&)> make,
    Extras extras) {
  const std::string id(call.args[0]);
  if (!parse_job_id(id)) {
    return refuse(call.peer, call.sequence, no_patch(id));
  }
  if (!call.head.query.empty()) {
    return refuse(
        call.peer, call.sequence,
        unknown_field(call.head.query.substr(0, call.head.query.find('='))));
  }
  Where where{call.peer.id, call.sequence};
  auto show = [this, where, id, extras](MadeBody made) {
    if (!made) return refuse_error(where, made.error());
    if (!*made) return refuse(where, no_patch(id));
    if (Peer* p = peer(where.peer)) {
      reply(*p, where.sequence, 200, **made, extras);
    }
  };
  when_fed([this, where, id, make = std::move(make), show] {
    on_store<MadeBody>(
        where, [id, make] { return make(id); }, show);
  });
}

static void get_patch(Service& s, const Exchange& call) {
  Patches* patches = s.patches_.get();
  s.show_patch(call,
               [patches, tenant = call.principal.filter()](
                   const std::string& id) -> MadeBody {
                 auto patch = patches->find(id, tenant);
                 if (!patch) return patch.error();
                 if (!*patch) return std::optional<std::string>();
                 std::string body;
                 JsonWriter json(body);
                 append_patch(json, **patch, ShowPatch::all);
                 return std::optional<std::string>(std::move(body));
               });
}

static void get_ancestry(Service& s, const Exchange& call) {
  Patches* patches = s.patches_.get();
  s.show_patch(call,
               [patches, tenant = call.principal.filter()](
                   const std::string& id) -> MadeBody {
                 auto found = patches->ancestry(id, tenant);
                 if (!found) return found.error();
                 if (found->patches.empty())
                   return std::optional<std::string>();
                 std::string body;
                 JsonWriter json(body);
                 json.begin_object();
                 json.key("patches").begin_array();
                 for (const PatchRecord& patch : found->patches) {
                   append_patch(json, patch, ShowPatch::ancestor);
                 }
                 json.end_array();
                 json.key("truncated").boolean(found->truncated);
                 json.key("cycle").boolean(found->cycle);
                 json.key("missing");
                 if (found->missing.empty()) {
                   json.null();
                 } else {
                   json.string(found->missing);
                 }
                 json.end_object();
                 return std::optional<std::string>(std::move(body));
               });
}

// What takes the patch back, for as long as it is kept.
static void get_reverse_diff(Service& s, const Exchange& call) {
  Patches* patches = s.patches_.get();
  Extras extras;
  extras.content_type = "text/x-diff";
  extras.headers =
      "X-Content-Type-Options: nosniff\r\n"
      "Content-Disposition: attachment; filename=\"reverse.diff\"\r\n";
  s.show_patch(
      call,
      [patches, tenant = call.principal.filter()](const std::string& id) {
        return patches->reverse_diff(id, tenant);
      },
      std::move(extras));
}

std::span<const Route> patch_routes() {
  static constexpr Route kRows[] = {
      {Method::get, "/v1/patches", list_patches, 0, 0, kListWeight},
      {Method::get, "/v1/patches/{}", get_patch, 0, 0, kPageWeight},
      {Method::get, "/v1/patches/{}/ancestry", get_ancestry, 0, 0, kPageWeight},
      {Method::get, "/v1/patches/{}/reverse_diff", get_reverse_diff, 0, 0,
       kDiffWeight},
  };
  return kRows;
}

}  // namespace machina
