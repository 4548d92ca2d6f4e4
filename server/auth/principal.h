// server/auth/principal.h
//
// Who asks: the tenant, the name and the scopes that belong to a credential.
//
//   PR1  A principal sees the jobs of its tenant only. What belongs to another
//        tenant is answered as what does not exist
//        (tests/server/api/tenants_test.cc).
//   PR2  The one who calls over the Unix socket is the host's own user: it sees
//        all tenants, because workers must (the same test).
//   PR3  What a credential has no scope for is refused with 403 (the same
//        test). Credentials of the configuration have all scopes.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace machina {

struct Principal {
  enum Scope : std::uint8_t {
    client = 1,   // jobs, logs, artifacts, patches
    worker = 2,   // leases of every tenant's jobs
    operate = 4,  // numbers, workers, scaling, shutdown
    all = 7,
  };
  std::string tenant = "default";
  std::string name = "local";
  std::uint8_t scopes = all;
  bool all_tenants = false;

  bool sees(std::string_view of) const { return all_tenants || of == tenant; }
  // The tenant to filter by; empty: all of them.
  std::string filter() const { return all_tenants ? std::string() : tenant; }
};

// A bearer token and who shows it.
struct Credential {
  std::string token;
  Principal principal;
};

}  // namespace machina
