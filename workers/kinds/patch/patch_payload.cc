// The payload of patch.apply: what is checked at submission and again in the
// worker.

#include "queue/base/hex.h"
#include "queue/base/ids.h"
#include "workers/kinds/fields.h"
#include "workers/kinds/patch/patch.h"

namespace machina::kinds {
namespace {

constexpr std::size_t kDescriptionBytesMax = 16 << 10;
constexpr std::size_t kBranchBytesMax = 200;
constexpr std::size_t kAuthorBytesMax = 200;
constexpr std::size_t kProvenanceMax = 256;
constexpr std::size_t kProvenanceBytesMax = 1024;
constexpr std::size_t kLicenseTextMax = 128 << 10;
constexpr std::size_t kAlertsMax = 32;
constexpr std::size_t kContextBytesMax = 256 << 10;

bool control(unsigned char c) { return c < 0x20 || c == 0x7F; }

std::string in_quotes(const std::string& text) {
  return "\"" + printable(text) + "\"";
}

bool artifact_name(const std::string& name) {
  if (name.empty() || name.size() > 128 || name[0] == '.' || name[0] == '-') {
    return false;
  }
  for (const char c : name) {
    const bool good = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                      (c >= '0' && c <= '9') || c == '.' || c == '_' ||
                      c == '-';
    if (!good) return false;
  }
  return true;
}

void read_source(Fields& fields, PatchPayload& out) {
  if (fields.has("diff") == fields.has("diff_artifact")) {
    fields.fail("diff", "exactly one of diff and diff_artifact is needed");
    return;
  }
  if (fields.has("diff")) {
    out.diff = fields.text("diff", kDiffBytesMax);
    if (out.diff.size() > kDiffBytesMax) return;
    const Diff diff = read_diff(out.diff);
    if (diff.verdict == Diff::Verdict::malformed) {
      fields.fail("diff", "not a unified diff: " + diff.problem);
    }
    return;
  }
  const std::string where = fields.text("diff_artifact", 256);
  const std::size_t slash = where.find('/');
  if (slash != std::string::npos) {
    out.artifact_job = where.substr(0, slash);
    out.artifact_name = where.substr(slash + 1);
  }
  if (!parse_job_id(out.artifact_job) || !artifact_name(out.artifact_name)) {
    fields.fail("diff_artifact",
                in_quotes(where) +
                    " is not \"<job id>/<artifact's name>\", such as "
                    "\"01900000-0000-7000-8000-000000000001/fix.diff\"");
  }
}

void read_author(Fields& fields, PatchPayload& out) {
  out.author = fields.text("author", kAuthorBytesMax);
  if (!fields.has("author")) return;
  const std::size_t open = out.author.find(" <");
  bool good = open != std::string::npos && open > 0 &&
              out.author.ends_with('>') &&
              out.author.find_first_of("<>") == open + 1 &&
              out.author.find('>') == out.author.size() - 1 &&
              out.author.find_first_not_of(" .,:;<>\"\\'") < open;
  for (const char c : out.author) {
    good = good && !control(static_cast<unsigned char>(c));
  }
  if (!good) {
    fields.fail("author", in_quotes(out.author) +
                              " is not \"Name <email>\", such as \"Ann Bee "
                              "<ann@example.com>\"");
  }
}

// The licence's text is not kept, only what it hashes to.
void read_fingerprint(Fields& item) {
  item.text("license_text", kLicenseTextMax);
  std::string given = item.text("license_fingerprint", 128);
  if (item.has("license_text") && item.has("license_fingerprint")) {
    item.fail("license_fingerprint",
              "it is what license_text hashes to: give one of the two");
    return;
  }
  if (!item.has("license_fingerprint")) return;
  std::string_view hex = given;
  if (hex.starts_with("sha256:")) hex.remove_prefix(7);
  if (!is_sha256(hex)) {
    item.fail("license_fingerprint",
              in_quotes(given) +
                  " is no SHA-256 of a licence's text: 64 hexadecimal digits "
                  "in lower case");
  }
}

// RFC 3339: 2026-01-31T12:00:00[.5](Z|+01:00).
bool is_date_and_time(std::string_view text) {
  constexpr std::string_view kForm = "dddd-dd-ddTdd:dd:dd";
  const auto fits = [](std::string_view part, std::string_view form) {
    if (part.size() != form.size()) return false;
    for (std::size_t i = 0; i < part.size(); ++i) {
      const bool digit = part[i] >= '0' && part[i] <= '9';
      if (form[i] == 'd' ? !digit : part[i] != form[i]) return false;
    }
    return true;
  };
  if (!fits(text.substr(0, kForm.size()), kForm)) return false;
  const auto number = [&](std::size_t at) {
    return (text[at] - '0') * 10 + (text[at + 1] - '0');
  };
  if (number(5) < 1 || number(5) > 12 || number(8) < 1 || number(8) > 31 ||
      number(11) > 23 || number(14) > 59 || number(17) > 60) {
    return false;
  }
  text.remove_prefix(kForm.size());
  if (text.starts_with('.')) {
    const std::size_t end = text.find_first_not_of("0123456789", 1);
    if (end == 1 || end == std::string_view::npos) return false;
    text.remove_prefix(end);
  }
  return text == "Z" || fits(text, "+dd:dd") || fits(text, "-dd:dd");
}

void read_provenance(Fields& fields) {
  for (Fields& item : fields.objects("provenance", kProvenanceMax)) {
    item.only({"origin", "vector_id", "influence", "license",
               "license_fingerprint", "license_text", "session_id",
               "retrieved_at", "semantic_alerts"});
    for (const char* name : {"origin", "vector_id", "license", "session_id"}) {
      item.text(name, kProvenanceBytesMax);
    }
    item.finite("influence");
    read_fingerprint(item);
    const std::string at = item.text("retrieved_at", 64);
    if (item.has("retrieved_at") && !is_date_and_time(at)) {
      item.fail("retrieved_at", in_quotes(at) +
                                    " is no date and time of RFC 3339, such "
                                    "as \"2026-01-31T12:00:00Z\"");
    }
    item.texts("semantic_alerts", kAlertsMax, kProvenanceBytesMax);
    fields.take_error(item);
  }
}

}  // namespace

std::string branch_problem(const std::string& name) {
  if (name.size() > kBranchBytesMax) {
    return std::to_string(name.size()) + " bytes; at most " +
           std::to_string(kBranchBytesMax);
  }
  bool good = !name.empty() && name[0] != '-' && name != "HEAD" &&
              name != "@" && !name.starts_with("refs/") &&
              name.find("..") == std::string::npos &&
              name.find("@{") == std::string::npos && !name.ends_with('.');
  for (const char c : name) {
    const auto byte = static_cast<unsigned char>(c);
    good = good && byte > 0x20 && byte < 0x7F &&
           std::string_view("~^:?*[\\").find(c) == std::string_view::npos;
  }
  std::string_view rest = name;
  while (good) {
    const std::size_t slash = rest.find('/');
    const std::string_view part = rest.substr(0, slash);
    good = !part.empty() && part[0] != '.' && !part.ends_with(".lock") &&
           !is_dot_git(part);
    if (slash == std::string_view::npos) break;
    rest.remove_prefix(slash + 1);
  }
  if (good) return "";
  return in_quotes(name) +
         " is no branch's name (printable ASCII without spaces, .., @{, ~ ^ : "
         "? * [ \\; no part empty, beginning with . or ending in .lock)";
}

Checked<PatchPayload> parse_patch(const std::string& payload,
                                  const KindSettings& settings) {
  Fields fields(payload);
  fields.only({"repo", "base_rev", "diff", "diff_artifact", "description",
               "test", "baseline", "branch", "author", "push",
               "parent_patch_id", "provenance", "approval", "context"});
  PatchPayload out;
  out.repo = fields.text("repo", kPathBytesMax);
  if (out.repo.empty()) {
    fields.fail("repo",
                "it is missing: a path or a name below a repository "
                "root");
  }
  if (out.repo.starts_with("https:")) {
    fields.fail("repo",
                "https repositories need the network, which is not available "
                "yet; use a path or a name below a repository root");
  }
  out.base_rev = read_base_rev(fields);
  out.description = fields.text("description", kDescriptionBytesMax);
  if (out.description.find('\0') != std::string::npos) {
    fields.fail("description", "holds a NUL character");
  }
  if (fields.has("test")) {
    Fields test = fields.object("test");
    read_test_member(test, out.test.emplace());
    fields.take_error(test);
  }
  out.baseline = fields.flag("baseline", true);
  out.push = fields.flag("push", false);
  out.branch = fields.text("branch", kPathBytesMax);
  if (fields.has("branch")) {
    if (const std::string why = branch_problem(out.branch); !why.empty()) {
      fields.fail("branch", why);
    }
  }
  read_author(fields, out);
  out.parent_patch_id = fields.text("parent_patch_id", 64);
  if (fields.has("parent_patch_id") && !parse_job_id(out.parent_patch_id)) {
    fields.fail("parent_patch_id",
                in_quotes(out.parent_patch_id) +
                    " is not a patch's id, which is the id of its patch.apply "
                    "job");
  }
  read_provenance(fields);
  const std::string approval = fields.text("approval", 64, "auto");
  if (approval != "auto" && approval != "required") {
    fields.fail("approval",
                in_quotes(approval) + " is neither \"auto\" nor \"required\"");
  }
  out.approval = approval == "required";
  const Fields context = fields.object("context");
  fields.take_error(context);
  fields.at_most("context", kContextBytesMax);
  if (auto good = fields.done(); !good) return good.error();
  if (repo_candidates(out.repo, settings).empty()) {
    return BadField{"repo", in_quotes(out.repo) +
                                " is not below one of the repository roots"};
  }
  read_source(fields, out);  // last: the one check that takes time
  if (auto good = fields.done(); !good) return good.error();
  return out;
}

}  // namespace machina::kinds
