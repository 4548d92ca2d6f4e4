// The one main: a list of verbs. Each is a file beside this one.

#include "tools/cli/cli.h"
#include "tools/cli/verb.h"

int main(int argc, char** argv) {
  using namespace machina::cli;
  return run_command_line(argc, argv,
                          "Machina: a durable job queue with sandboxed workers",
                          [](Verb& machina) {
                            add_serve(machina);
                            add_pool(machina);
                            add_worker(machina);
                            add_ops(machina);
                            add_doctor(machina);
                            add_job_verbs(machina);
                            add_operator_verbs(machina);
                            add_sign(machina);
                            add_patch_submit(machina);
                            add_patch_verbs(machina);
                            add_wal(machina);
                            add_top(machina);
                            add_version(machina);
                          });
}
