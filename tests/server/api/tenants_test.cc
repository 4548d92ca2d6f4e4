// Two tenants on one server: what belongs to the other one does not exist
// (PR1 to PR3, RT1). The log, history and the store are real; two tokens that
// the test makes are the two principals, and the worker is played.

#include <algorithm>

#include "queue/base/storage.h"
#include "server/api/route.h"
#include "tests/server/api/server_fixture.h"

namespace machina::test {
namespace {

constexpr char kOurs[] = "Authorization: Bearer ours-0123456789\r\n";
constexpr char kTheirs[] = "Authorization: Bearer theirs-0123456789\r\n";

// A row for each route that a client may call. `{}` is replaced by an id; a
// second `{}` by the name of an artifact.
struct Row {
  std::string_view method, pattern, body;
  enum Is { names_an_id, lists, makes } is = names_an_id;
};
constexpr Row kRows[] = {
    {"POST", "/v1/jobs", R"({"kind":"ext.a"})", Row::makes},
    {"POST", "/enqueue", R"({"kind":"ext.a"})", Row::makes},
    {"POST", "/run_sync", R"({"kind":"ext.a"})", Row::makes},
    {"GET", "/v1/jobs", "", Row::lists},
    {"GET", "/v1/jobs/{}", ""},
    {"GET", "/v1/jobs/{}/logs", ""},
    {"GET", "/v1/jobs/{}/artifacts", ""},
    {"GET", "/v1/jobs/{}/artifacts/{}", ""},
    {"GET", "/v1/patches", "", Row::lists},
    {"GET", "/v1/patches/{}", ""},
    {"GET", "/v1/patches/{}/ancestry", ""},
    {"GET", "/v1/patches/{}/reverse_diff", ""},
    {"POST", "/v1/jobs/{}/unblock", R"({"token":"t"})"},
    {"POST", "/v1/jobs/{}/retry", "{}"},
    {"POST", "/v1/jobs/{}/cancel", "{}"},
};

std::string with(std::string text, std::string_view what, std::string_view by) {
  for (std::size_t at = 0; (at = text.find(what, at)) != text.npos;) {
    text.replace(at, what.size(), by);
    at += by.size();
  }
  return text;
}

class Tenants : public ServerTest {
 protected:
  void SetUp() override {
    ServerHooks hooks;
    hooks.signals = false;
    hooks.credentials = {
        {"ours-0123456789", {"ours", "we", Principal::client}},
        {"theirs-0123456789", {"theirs", "they", Principal::client}}};
    hooks.open_shard =
        [this](RecoveryReport* report) -> Result<std::unique_ptr<Shard>> {
      auto opened = open_posix_storage(root_ + "/queue");
      if (!opened) return opened.error();
      storage_ = std::move(*opened);
      ShardOptions shard;
      shard.log.fsync = shard.core.fsync = false;
      shard.history_dir = root_ + "/history";
      return Shard::open(*storage_, system_clock(), system_random(), shard,
                         report);
    };
    std::promise<int> listening;
    hooks.listening = [&](int p) { listening.set_value(p); };
    thread_ = std::thread([this, hooks] {
      exit_code_ = run_server(options_, hooks);
      exited_ = true;
    });
    port_ = listening.get_future().get();
    host_.emplace(local());
    ours_.emplace(tcp());
    theirs_.emplace(tcp());
  }
  void TearDown() override {
    if (thread_.joinable()) stop();  // before the storage goes
  }
  Reply we(std::string_view method, std::string_view path,
           std::string_view body = {}) {
    return ours_->call(method, path, body, kOurs);
  }
  Reply they(std::string_view method, std::string_view path,
             std::string_view body = {}, const std::string& headers = {}) {
    return theirs_->call(method, path, body, kTheirs + headers);
  }
  // A patch of ours that has ended, with a log and an artifact; its id.
  std::string our_patch() {
    const Reply made = we("POST", "/v1/jobs",
                          R"({"kind":"patch.apply","payload":{"repo":"r"}})");
    EXPECT_EQ(made.status, 201) << made.body;
    EXPECT_EQ(made.json()["tenant"], "ours");
    Reply r =
        host_->post("/v1/leases", R"({"worker":"w","kinds":["patch.apply"]})");
    EXPECT_EQ(r.status, 200) << r.body;
    const std::string at =
        "/v1/leases/" + r.json()["leases"][0]["token"].get<std::string>();
    EXPECT_EQ(host_->post(at + "/log?offset=0", "line").status, 200);
    EXPECT_EQ(host_->call("PUT", at + "/artifacts/reverse.diff", "x").status,
              200);
    r = host_->post(at + "/complete",
                    R"({"result":{"outcome":"applied",)"
                    R"("reverse_diff_artifact":"reverse.diff"},)"
                    R"("artifacts":["reverse.diff"]})");
    EXPECT_EQ(r.status, 200) << r.body;
    return made.json()["id"];
  }
  std::string our_job() {
    return we("POST", "/v1/jobs", R"({"kind":"ext.a"})").json()["id"];
  }
  // Each row with an id: ours is there for us; for them it is answered as an id
  // that nobody has.
  void try_rows(const std::string& id, const std::string& unknown,
                std::string_view below) {
    for (const Row& row : kRows) {
      if (row.is != Row::names_an_id || !row.pattern.starts_with(below)) {
        continue;
      }
      SCOPED_TRACE(row.pattern);
      auto path = [&](const std::string& of) {
        std::string text(row.pattern);
        text.replace(text.find("{}"), 2, of);
        return with(text, "{}", "reverse.diff");
      };
      const Reply none = they(row.method, path(unknown), row.body);
      const Reply hidden = they(row.method, path(id), row.body);
      EXPECT_EQ(none.status, 404) << none.body;
      EXPECT_EQ(hidden.status, 404) << hidden.body;
      EXPECT_EQ(with(hidden.body, id, "ID"), with(none.body, unknown, "ID"));
      const Reply own = we(row.method, path(id), row.body);
      EXPECT_NE(with(own.body, id, "ID"), with(none.body, unknown, "ID"));
      EXPECT_LT(own.status, 500) << own.body;
    }
  }

  std::unique_ptr<Storage> storage_;
  std::optional<Client> host_, ours_, theirs_;
};

std::string another(std::string id) {
  id.back() = id.back() == '0' ? '1' : '0';
  return id;
}

TEST(TenantRows, EachRouteOfClientsHasARow) {
  for (const Route& route : routes()) {
    if ((route.flags & (Route::open | Route::worker | Route::operate)) != 0 ||
        route.handle == not_built) {
      continue;
    }
    EXPECT_TRUE(std::any_of(std::begin(kRows), std::end(kRows),
                            [&](const Row& row) {
                              return row.pattern == route.pattern &&
                                     row.method == name(route.method);
                            }))
        << name(route.method) << " " << route.pattern
        << ": give it a row in kRows: whose is what it shows?";
  }
}

TEST_F(Tenants, AJobThatHasEndedIsItsTenantsOnly) {
  const std::string id = our_patch();
  try_rows(id, another(id), "/v1/patches");
  try_rows(id, another(id), "/v1/jobs");
}

TEST_F(Tenants, AJobThatLivesIsItsTenantsOnly) {
  const std::string id = our_job();
  try_rows(id, another(id), "/v1/jobs");
  EXPECT_EQ(we("GET", "/v1/jobs/" + id).json()["state"], "cancelled");
}

TEST_F(Tenants, NobodyCancelsAnotherTenantsJob) {
  const std::string id = our_job();
  EXPECT_EQ(they("POST", "/v1/jobs/" + id + "/cancel", "{}").status, 404);
  EXPECT_EQ(we("GET", "/v1/jobs/" + id).json()["state"], "ready");
}

// A wait would tell that the job exists.
TEST_F(Tenants, AnotherTenantsJobIsNotWaitedFor) {
  const Reply r =
      they("GET", "/v1/jobs/" + our_job(), {}, "Prefer: wait=300\r\n");
  EXPECT_EQ(r.status, 404) << r.body;
}

TEST_F(Tenants, ListsShowWhatIsOnesOwn) {
  const std::string patch = our_patch(), job = our_job();
  for (const Row& row : kRows) {
    if (row.is != Row::lists) continue;
    SCOPED_TRACE(row.pattern);
    const std::string member =
        row.pattern == "/v1/patches" ? "patches" : "jobs";
    const std::size_t all = member == "jobs" ? 2 : 1;
    const Reply own = we("GET", row.pattern);
    EXPECT_EQ(own.json()[member].size(), all) << own.body;
    EXPECT_EQ(host_->get(row.pattern).json()[member].size(), all);
    const Reply r = they("GET", row.pattern);
    EXPECT_EQ(r.status, 200);
    EXPECT_EQ(r.json()[member].size(), 0u) << r.body;
    EXPECT_EQ(r.body.find(patch), r.body.npos);
    EXPECT_EQ(r.body.find(job), r.body.npos);
  }
}

TEST_F(Tenants, ADedupKeyIsOfOneTenant) {
  const std::string body = R"({"kind":"ext.a","dedup_key":"k"})";
  const std::string ours = we("POST", "/v1/jobs", body).json()["id"];
  const Reply theirs = they("POST", "/v1/jobs", body);
  EXPECT_EQ(theirs.status, 201) << theirs.body;
  EXPECT_NE(theirs.json()["id"], ours);
  EXPECT_EQ(we("POST", "/v1/jobs", body).json()["id"], ours);
}

TEST_F(Tenants, JobsOfABulkRequestAreItsSenders) {
  const Reply r = they("POST", "/v1/jobs", R"([{"kind":"ext.a"}])");
  const std::string id = r.json()["jobs"][0]["id"];
  EXPECT_EQ(they("GET", "/v1/jobs/" + id).json()["tenant"], "theirs");
  EXPECT_EQ(we("GET", "/v1/jobs/" + id).status, 404);
}

// The worker is the host's own user; the child is the parent's tenant's.
TEST_F(Tenants, AChildIsOfItsParentsTenant) {
  const std::string parent = our_job();
  Reply r = host_->post("/v1/leases", R"({"worker":"w","kinds":["*"]})");
  const std::string token = r.json()["leases"][0]["token"];
  r = host_->post("/v1/leases/" + token + "/complete",
                  R"({"enqueue":[{"kind":"ext.b"}]})");
  EXPECT_EQ(r.status, 200) << r.body;
  const Json jobs = we("GET", "/v1/jobs").json()["jobs"];
  EXPECT_EQ(jobs.size(), 2u) << jobs.dump();
}

TEST_F(Tenants, DependenciesAreOfOnesOwnTenant) {
  const std::string ended = our_patch(), live = our_job();
  const auto after = [](const std::string& id) {
    return R"({"kind":"ext.c","depends_on":[")" + id + R"("]})";
  };
  for (const std::string& id : {ended, live}) {
    const std::string unknown = another(id);
    const Reply none = they("POST", "/v1/jobs", after(unknown));
    const Reply hidden = they("POST", "/v1/jobs", after(id));
    EXPECT_EQ(none.status, 400) << none.body;
    EXPECT_EQ(hidden.status, 400) << hidden.body;
    EXPECT_EQ(with(hidden.body, id, "ID"), with(none.body, unknown, "ID"));
    EXPECT_EQ(we("POST", "/v1/jobs", after(id)).status, 201);
  }
  // A child is of its parent's tenant, so are the jobs that it waits for.
  EXPECT_EQ(they("POST", "/v1/jobs", R"({"kind":"ext.d"})").status, 201);
  Reply r = host_->post("/v1/leases", R"({"worker":"w","kinds":["ext.d"]})");
  const std::string token = r.json()["leases"][0]["token"];
  r = host_->post("/v1/leases/" + token + "/complete",
                  R"({"enqueue":[)" + after(live) + "]}");
  EXPECT_EQ(r.code(), "unknown-dependency") << r.body;
}

TEST_F(Tenants, ARollbackOfAnotherTenantsPatchLeavesNoTrace) {
  const std::string patch = our_patch();
  const Json before = we("GET", "/v1/patches/" + patch).json();
  EXPECT_EQ(they("POST", "/v1/jobs",
                 R"({"kind":"patch.rollback","payload":{"patch_id":")" + patch +
                     R"("}})")
                .status,
            201);
  Reply r =
      host_->post("/v1/leases", R"({"worker":"w","kinds":["patch.rollback"]})");
  const std::string token = r.json()["leases"][0]["token"];
  EXPECT_EQ(host_
                ->post("/v1/leases/" + token + "/complete",
                       R"({"result":{"outcome":"rolled_back"}})")
                .status,
            200);
  EXPECT_EQ(we("GET", "/v1/patches/" + patch).json(), before);
}

TEST_F(Tenants, WithoutItsScopeARouteIsForbidden) {
  for (const Route& route : routes()) {
    if ((route.flags & (Route::worker | Route::operate)) == 0) continue;
    SCOPED_TRACE(route.pattern);
    const Reply r = they(name(route.method),
                         with(std::string(route.pattern), "{}", "a"), "{}");
    EXPECT_EQ(r.status, 403) << r.body;
  }
}

}  // namespace
}  // namespace machina::test
