// workers/kinds/tool/shell.h
//
// tool.shell: one program with arguments, in a sandbox of its own.
//
//   payload := {"argv":[...],"stdin","env":{},"cwd","files":{"name":"text"}}
//   result  := {"exit_code","stdout","stderr","truncated"}
//
//   S1  argv[0] runs only where its canonical path is allowed: a link named
//       after an allowed program does not help.
//   S2  An exit code other than 0 is a verdict; whatever killed it is a failure
//       of the attempt with its own code.

#pragma once

#include <string>
#include <utility>
#include <vector>

#include "workers/kinds/kinds.h"

namespace machina::kinds {

Family tool_family(const KindSettings& settings);

struct ShellPayload {
  std::vector<std::string> argv;  // argv[0] canonical
  std::string input, cwd;
  std::vector<std::string> env;  // "NAME=value"
  std::vector<std::pair<std::string, std::string>> files;
};
// By the payload alone: argv[0] is as it was given.
Checked<ShellPayload> read_shell(const std::string& payload);
// Looks at the host, too.
Checked<ShellPayload> parse_shell(const std::string& payload,
                                  const KindSettings& settings);

// The canonical path of `program` where the settings allow it. A bare name is
// looked up where a job's PATH points.
Checked<std::string> allowed_executable(const std::string& program,
                                        const KindSettings& settings);

}  // namespace machina::kinds
