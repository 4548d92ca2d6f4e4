#include "workers/kinds/suite/runners.h"

#include <algorithm>
#include <array>
#include <utility>

#include "workers/kinds/suite/pytest_watch.h"

namespace machina::kinds {
namespace {

// Runs what `python3 -m unittest` would run with the same arguments, and writes
// what came of each case. It comes on standard input, so nothing of it lies
// where `setup` could change it. Every outcome is one of unittest's own calls
// of the result. Cases that a class or module did not let begin are told with
// what that said; where others were not reached the exit code is 2. Beside the
// report goes the list of where its cases are defined (place_cases()).
constexpr char kUnittest[] =
    R"py(import collections, os, re, sys, time, unittest

REPORT = sys.argv[1]
PLACES = r'''@PLACES@'''
MAIN = os.getpid()
sys.argv[:] = ["python3 -m unittest"] + sys.argv[2:]
sys.path[0] = os.getcwd()
WORST = ["passed", "skipped", "failed", "error"]
BAD = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
FIXTURE = re.compile(r"(\w+) \((.*)\)")


def escaped(text):
    text = BAD.sub("?", str(text))
    for char in "&<>\"\n\r\t":
        text = text.replace(char, "&#%d;" % ord(char))
    return text


def name_of(test):
    if isinstance(test, unittest.loader._FailedTest):
        return test._testMethodName, "import"
    if type(test).__name__ == "_ErrorHolder":
        match = FIXTURE.fullmatch(test.id())
        return (match[2], match[1]) if match else ("", test.id())
    if type(test).__name__ == "_SubTest":
        group, name = name_of(test.test_case)
        return group, ADDRESS.sub(" at 0x", name + " " + test._subDescription())
    if type(test).__name__ == "ModuleSkipped":
        return test._testMethodName, "module"
    group, _, name = test.id().rpartition(".")
    return group, name or str(test)


def origin(test):
    return type(test), getattr(test, "_testMethodName", "")


def tests_in(suite):
    try:
        parts = list(suite)
    except TypeError:
        return [] if suite is None else [suite]
    return [test for part in parts for test in tests_in(part)]


class Result(unittest.TextTestResult):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cases, self.current, self.begun = [], None, collections.Counter()
        self.fixtures = []

    def startTest(self, test):
        self.begun[name_of(test)] += 1
        self.current = [name_of(test), "passed", [], time.monotonic(), 0, False]
        super().startTest(test)

    def stopTest(self, test):
        super().stopTest(test)
        name, outcome, notes, since, broken, ended = self.current
        if broken and WORST.index(outcome) < 2:
            outcome = "failed"
            notes = ["%d of its subtests failed" % broken]
        elif not ended and outcome == "passed":
            outcome, notes = "error", ["it ended without an outcome"]
        seconds = time.monotonic() - since
        self.cases.append((name, outcome, "\n".join(notes), seconds, origin(test)))
        self.current = None

    def note(self, test, outcome, text=""):
        if self.current is None or type(test).__name__ == "_ErrorHolder":
            if outcome != "skipped":
                self.cases.append((name_of(test), outcome, text, 0, origin(test)))
            self.fixtures.append((name_of(test), outcome))
        elif type(test).__name__ == "_SubTest":
            self.cases.append((name_of(test), outcome, text, 0, origin(test.test_case)))
            self.current[4] += outcome in ("failed", "error")
        else:
            self.current[5] = True
            if WORST.index(outcome) > WORST.index(self.current[1]):
                self.current[1] = outcome
            if text:
                self.current[2].append(text)

    def said(self, error, test):
        return self._exc_info_to_string(error, test)

    def addSuccess(self, test):
        super().addSuccess(test)
        self.note(test, "passed")

    def addError(self, test, err):
        super().addError(test, err)
        self.note(test, "error", self.said(err, test))

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.note(test, "failed", self.said(err, test))

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.note(test, "skipped", reason)

    def addExpectedFailure(self, test, err):
        super().addExpectedFailure(test, err)
        self.note(test, "skipped", "expected failure")

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self.note(test, "failed", "unexpected success")

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is None:
            self.note(subtest, "passed")
        else:
            failed = issubclass(err[0], test.failureException)
            self.note(subtest, "failed" if failed else "error", self.said(err, test))


class Runner(unittest.TextTestRunner):
    resultclass = Result

    def run(self, test):
        expected = collections.Counter(map(name_of, tests_in(test)))
        result = super().run(test)
        cases = result.cases
        stopped = False
        # What a class or module did not let begin is known to be so.
        for (group, name), count in (expected - result.begun).items():
            why = None
            for (where, fixture), outcome in result.fixtures:
                if group == where or group.startswith(where + "."):
                    why = (outcome, fixture)
            if why is None:
                stopped = True
                continue
            for _ in range(count):
                text = "%s: %s" % (why[1], why[0])
                cases.append(((group, name), why[0], text, 0, origin(None)))
        result.stopped_early = stopped
        return result


def create(path):
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8")


def place_of(kind, name):
    try:
        own = _inside(sys.modules[kind.__module__].__file__)
        return _place(own, kind.__qualname__.split("."), name, getattr(kind, name))
    except Exception:
        return ""


def write_places(cases):
    # Imported now: before the run these names are the suite's to take.
    exec(PLACES, globals())
    with create(REPORT + ".where") as out:
        out.write("<testsuite>\n")
        for (group, name), _, _, _, test in cases:
            out.write('<testcase classname="%s" name="%s"><skipped message="%s"/></testcase>\n'
                      % (escaped(group), escaped(name), escaped(place_of(*test))))
        out.write("</testsuite>\n")


def write(cases):
    words = {"failed": "failure", "error": "error", "skipped": "skipped"}
    with create(REPORT) as out:
        out.write('<testsuites><testsuite name="unittest" tests="%d">\n' % len(cases))
        for (group, name), outcome, text, seconds, _ in cases:
            out.write('<testcase classname="%s" name="%s" time="%.3f">'
                      % (escaped(group), escaped(name), seconds))
            if outcome in words:
                out.write('<%s message="%s"/>' % (words[outcome], escaped(text[-4000:])))
            out.write("</testcase>\n")
        out.write("</testsuite></testsuites>\n")


program = unittest.main(module=None, argv=list(sys.argv), testRunner=Runner, exit=False)
if os.getpid() != MAIN:
    os._exit(1)
try:
    write_places(program.result.cases)
except Exception as error:
    print("where the cases are defined is not known: %s" % error, file=sys.stderr)
write(program.result.cases)
if program.result.stopped_early:
    print("the run stopped before all tests had run", file=sys.stderr)
    sys.exit(2)
sys.exit(not program.result.wasSuccessful())
)py";

// A reporter of node's own interface: it runs in the process of the runner and
// not in those of the tests. A file that ends before its tests, or during them,
// is node's own idea of a pass; here it is an error. It is also loaded first in
// each process of a test file, and notes how that ended: one that left by
// itself may have had tests to come.
constexpr char kNode[] = R"js('use strict';
const { resolve } = require('node:path');
const fs = require('node:fs');
const ends = __filename + '.ends';
if (process.env.NODE_TEST_CONTEXT && require('node:worker_threads').isMainThread) {
  const [parent, path] = [process.ppid, resolve(process.argv[1] ?? '')];
  const { appendFileSync } = fs;
  process.once('beforeExit', () => {
    try { appendFileSync(ends, JSON.stringify([parent, path]) + '\n'); } catch {}
  });
}
const top = '/work/repo/';
const escaped = (text) => String(text)
  .replace(/[^\t\n\r\x20-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu, '?')
  .replace(/[&<>"\n\r\t]/g, (c) => `&#${c.charCodeAt(0)};`);
const known = new Map();
const fileOf = (path) => {
  const key = path ?? '';
  if (!known.has(key)) known.set(key, { names: [], lines: [], begun: 0, ended: 0, run: false, told: false });
  return known.get(key);
};
const shown = (path) => !path ? '' : path.startsWith(top) ? path.slice(top.length) : path;
const whole = (data) => data.nesting === 0 && data.file !== undefined &&
  (data.name === data.file || resolve(data.name) === data.file);
const places = [];
// Names that this form cannot hold are left out.
function whereOf(data) {
  const path = shown(data.file), { names, lines } = fileOf(data.file);
  const outer = names.slice(0, data.nesting), name = data.name;
  if (!data.file?.startsWith(top) || [...outer, name].some((n) => /\n|::/.test(n))) return '';
  return [path, path, data.line, outer.join('::'), name, lines.slice(0, data.nesting)].join('\n');
}
function testcase(file, name, outcome, message, ms, where = '') {
  const named = `<testcase classname="${escaped(shown(file))}" name="${escaped(name)}"`;
  places.push(`${named}><skipped message="${escaped(where)}"/></testcase>\n`);
  const open = `${named} time="${(Number(ms) || 0) / 1000}">`;
  const note = outcome === 'passed' ? '' : `<${outcome} message="${escaped(message.slice(-4000))}"/>`;
  return `${open}${note}</testcase>\n`;
}
function said(details) {
  const error = details?.error?.cause ?? details?.error;
  const text = error?.stack ?? error?.message ?? error ?? '';
  return String(text).includes(String(error?.message ?? '')) ? String(text) : `${error.message}\n${text}`;
}
function ended(data, pass) {
  const file = fileOf(data.file);
  const ms = data.details?.duration_ms;
  if (whole(data)) {
    file.told = true;
    return pass
      ? testcase(data.file, '(file)', 'error', 'the file ended before any test of it was reported', ms)
      : testcase(data.file, '(file)', 'error', said(data.details), ms);
  }
  ++file.ended;
  const failure = data.details?.error?.failureType;
  if (data.details?.type === 'suite' && (pass || failure === 'subtestsFailed')) return '';
  const name = [...file.names.slice(0, data.nesting), data.name].join(' > ');
  const marked = (mark) => data[mark] !== undefined && data[mark] !== false;
  const why = (mark) => typeof data[mark] === 'string' ? `: ${data[mark]}` : '';
  if (marked('skip')) return testcase(data.file, name, 'skipped', `skip${why('skip')}`, ms);
  if (marked('todo')) return testcase(data.file, name, 'skipped', `todo${why('todo')}`, ms);
  return testcase(data.file, name, pass ? 'passed' : 'failure', said(data.details), ms, whereOf(data));
}
function drained() {
  try {
    return new Set(fs.readFileSync(ends, 'utf8').split('\n').filter(Boolean).map((line) => JSON.parse(line))
      .filter(([parent]) => parent === process.pid).map(([, path]) => path));
  } catch { return new Set(); }
}
module.exports = async function* report(source) {
  yield '<?xml version="1.0" encoding="UTF-8"?>\n<testsuites><testsuite name="node">\n';
  for await (const { type, data } of source) {
    if (type === 'test:enqueue') {
      if (whole(data)) fileOf(data.file).run = true;
      else ++fileOf(data.file).begun;
    } else if (type === 'test:start') {
      const { names, lines } = fileOf(data.file);
      names.length = lines.length = data.nesting;
      names[data.nesting] = data.name;
      lines[data.nesting] = data.line ?? 0;
    } else if (type === 'test:pass' || type === 'test:fail') {
      yield ended(data, type === 'test:pass');
    }
  }
  const natural = drained();
  for (const [path, file] of known) {
    if (file.begun > file.ended) {
      yield testcase(path, '(file)', 'error', `${file.begun - file.ended} of its tests began and did not end`, 0);
    } else if (file.run && !file.told && !natural.has(path)) {
      yield testcase(path, '(file)', 'error', 'its process left before its event loop was empty (process.exit?): tests that it had not declared by then are not known', 0);
    }
  }
  try {
    fs.writeFileSync('@RECORD@', `<testsuite>\n${places.join('')}</testsuite>\n`, { flag: 'wx' });
  } catch { /* where the cases are defined is not known then */ }
  yield '</testsuite></testsuites>\n';
};
)js";

constexpr std::array<std::pair<Runner, std::string_view>, 6> kNames = {{
    {Runner::pytest, "pytest"},
    {Runner::unittest, "unittest"},
    {Runner::ctest, "ctest"},
    {Runner::node, "node"},
    {Runner::tap, "tap"},
    {Runner::command, "command"},
}};

// One of these names, as a regular expression of CMake's.
std::string any_of(const std::vector<std::string>& names) {
  std::string out = "^(";
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (i > 0) out += '|';
    for (const char c : names[i]) {
      if (std::string_view("\\^$.|?*+()[]").find(c) != std::string_view::npos) {
        out += '\\';
      }
      out += c;
    }
  }
  return out + ")$";
}

}  // namespace

// A preset may make it quiet: then nothing is listed, and nothing is believed.
const char kListCtest[] = R"sh(
echo '<testsuite>'
ctest "$@" -N | sed -n '/^ *Test *#[0-9]*: / {
  s/^ *Test *#[0-9]*: //
  s/ (Disabled)$//
  s/&/\&amp;/g
  s/</\&lt;/g
  s/"/\&quot;/g
  s|.*|<testcase name="&"><skipped/></testcase>|
  p
}'
echo '</testsuite>'
)sh";

std::vector<std::string> ctest_list(std::vector<std::string> args,
                                    const std::vector<std::string>& select) {
  if (!select.empty()) {
    args.insert(args.end(), {"-R", any_of(select)});
  }
  return args;
}

std::string_view name(Runner runner) {
  return kNames[static_cast<std::size_t>(runner)].second;
}

std::optional<Runner> runner_named(std::string_view text) {
  for (const auto& [runner, known] : kNames) {
    if (known == text) return runner;
  }
  return std::nullopt;
}

std::string all_runners() {
  std::string out;
  for (const auto& [runner, known] : kNames) {
    out += (out.empty() ? "" : ", ") + std::string(known);
  }
  return out;
}

std::string places_of(const std::string& report) { return report + ".where"; }

std::string argument_problem(Runner runner, std::string_view argument) {
  const auto is = [&](std::string_view option) {
    return argument == option ||
           (argument.starts_with(option) && argument[option.size()] == '=');
  };
  if (runner == Runner::ctest) {
    if (is("--output-junit") || is("--no-tests")) {
      return "is set by the runner, which reads the report";
    }
    if (is("--stop-on-failure") || is("-N") || is("--show-only")) {
      return "leaves cases out, and what did not run says nothing";
    }
  }
  if (runner == Runner::node) {
    if (is("--test-reporter") || is("--test-reporter-destination")) {
      return "is set by the runner, which reads the report";
    }
    if (is("--watch") || is("--test-force-exit")) {
      return "ends or repeats the run at its own time";
    }
  }
  return "";
}

std::string command_problem(const std::vector<std::string>& command) {
  const auto base = [](const std::string& path) {
    return path.substr(path.rfind('/') + 1);
  };
  std::size_t at = 0;
  if (!command.empty() && base(command[0]).starts_with("python")) {
    while (at < command.size() && command[at] != "-m") ++at;
    ++at;
  }
  if (at >= command.size() ||
      (base(command[at]) != "pytest" && base(command[at]) != "py.test")) {
    return "";
  }
  for (++at; at < command.size() && command[at] != "--"; ++at) {
    const std::string& one = command[at];
    // "-x" may stand among other letters that take no value.
    const std::size_t other = one.find_first_not_of("lqsv", 1);
    const bool x = one.size() > 1 && one[0] == '-' &&
                   other != std::string::npos && one[other] == 'x';
    if (x || one == "--exitfirst" || one.starts_with("--maxfail") ||
        one == "--sw" || one.starts_with("--stepwise")) {
      return "\"" + one +
             "\" leaves cases out, and the report does not say so; the runner "
             "pytest knows which there are";
    }
  }
  return "";
}

RunnerCall call_runner(Runner runner, const std::vector<std::string>& args,
                       const std::vector<std::string>& select,
                       const std::string& report, const std::string& file) {
  RunnerCall call;
  const auto add = [&](const std::vector<std::string>& more) {
    call.argv.insert(call.argv.end(), more.begin(), more.end());
  };
  if (runner == Runner::unittest) {
    call.argv = {"python3", "-", report};
    call.stdin_data = filled(kUnittest, "@PLACES@", python_places());
    add(args);
    add(select);
  } else if (runner == Runner::ctest) {
    call.argv = {"ctest"};
    add(ctest_list(args, select));
    add({"--no-tests=error", "--output-on-failure", "--output-junit", report});
  } else if (runner == Runner::node) {
    call.file = file;
    call.file_text = filled(kNode, "@RECORD@", places_of(report));
    call.argv = {"node",
                 "--require=/work/" + file,
                 "--test",
                 "--test-reporter=file:///work/" + file,
                 "--test-reporter-destination=" + report,
                 "--test-reporter=spec",
                 "--test-reporter-destination=stdout"};
    add(args);
    add(select);
  }
  return call;
}

std::string what_to_install(Runner runner, const std::string& program) {
  const char* package = nullptr;
  switch (runner) {
    case Runner::pytest:
      package = "python3-pytest";
      break;
    case Runner::unittest:
      package = "python3";
      break;
    case Runner::ctest:
      package = "cmake";
      break;
    case Runner::node:
      package = "nodejs, version 20 or newer";
      break;
    case Runner::tap:
    case Runner::command:
      break;
  }
  const std::string missing =
      "\"" + program + "\" is not in the sandbox, which sees the host's /usr";
  return package == nullptr
             ? missing + ": install it below /usr"
             : missing + ": install it there (Debian: " + package + ")";
}

}  // namespace machina::kinds
