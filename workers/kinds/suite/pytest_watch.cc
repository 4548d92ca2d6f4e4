#include "workers/kinds/suite/pytest_watch.h"

#include <charconv>

namespace machina::kinds {
namespace {

// Where a case is defined. A class is looked up in the file's own syntax tree:
// a line of a text may look like one.
constexpr char kPlaces[] = R"py(import ast
import functools
import inspect
import linecache
import os
import re

TOP = "/work/repo/"


@functools.lru_cache(None)
def _inside(path):
    path = os.path.realpath(path)
    return path[len(TOP) :] if path.startswith(TOP) else ""


@functools.lru_cache(None)
def _names(own):
    # The lines of the definitions in a file, by "Class.Inner"; 0: there are two.
    lines = {}

    def look(node, prefix):
        for part in ("body", "orelse", "handlers", "finalbody"):
            for child in getattr(node, part, ()):
                kind = type(child).__name__
                if kind in ("ClassDef", "FunctionDef", "AsyncFunctionDef"):
                    name = prefix + child.name
                    lines[name] = 0 if name in lines else child.lineno
                    if kind == "ClassDef":
                        look(child, name + ".")
                else:
                    look(child, prefix)

    with open(TOP + own, "rb") as file:
        look(ast.parse(file.read()), "")
    return lines


def _place(own, classes, name, function):
    definition, line = "", 0
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is not None:
        definition = _inside(code.co_filename)
        start = re.compile(r"\s*(async\s+)?def\s+%s\b" % re.escape(name))
        for n in range(code.co_firstlineno, code.co_firstlineno + 200):
            if start.match(linecache.getline(code.co_filename, n)):
                line = n
                break
    lines = []
    for i in range(len(classes)):
        try:
            lines.append(str(_names(own).get(".".join(classes[: i + 1]), 0)))
        except Exception:
            lines.append("0")
    return "\n".join(
        [own, definition, str(line), "::".join(classes), name, ",".join(lines)]
    )
)py";

constexpr char kPlugin[] =
    R"py('''Written by Machina for one run of a suite: says which cases were
selected, and which of them came to their end.'''
import collections
from xml.sax.saxutils import quoteattr

import pytest

@PLACES@
RECORD = "@RECORD@"

PLACES = "machina_places"
_active = False
_expected = []  # (node id, its element up to the outcome, where)
_bodies = collections.Counter()  # that ran, or whose setup was no success
_finished = collections.Counter()
_torn_down = set()


def _leave_no_trace():
    # What the suite starts need not find this module.
    own = os.path.dirname(os.path.abspath(__file__))
    path = os.environ.get("PYTHONPATH", "")
    if path == own:
        del os.environ["PYTHONPATH"]
    elif path.endswith(":" + own):
        os.environ["PYTHONPATH"] = path[: -len(own) - 1]


_leave_no_trace()


def _xml(text):
    # As pytest's own report has it.
    text = re.sub(
        "[^\t\n\r -\ud7ff\ue000-\ufffd]",
        lambda found: "#x%02X" % ord(found.group()),
        text,
    )
    return quoteattr(text)


def _case(nodeid, prefix):
    path, bracket, params = nodeid.partition("[")
    names = path.split("::")
    names[0] = re.sub(r"\.py$", "", names[0].replace("/", "."))
    names[-1] += bracket + params
    if prefix:
        names.insert(0, prefix)
    return "<testcase classname=%s name=%s>" % (
        _xml(".".join(names[:-1])),
        _xml(names[-1]),
    )


def _where(item):
    try:
        own = _inside(str(getattr(item, "path", None) or item.fspath))
        if hasattr(item, "dtest"):
            # A doctest: "module.Class.method" is where its text is.
            module = item.dtest.globs["__name__"] + "."
            names = item.dtest.name.removeprefix(module).split(".")
            parts = _place(own, names, names[-1], None).split("\n")
            parts[1:3] = [own, parts[5].rpartition(",")[2]]
            return "\n".join(parts)
        name = getattr(item, "originalname", None)
        name = name or item.name.partition("[")[0]
        classes = item.nodeid.partition("[")[0].split("::")[1:-1]
        return _place(own, classes, name, getattr(item, "function", None))
    except Exception:
        return ""


def _write():
    left = collections.Counter(_finished)
    for nodeid in _torn_down:
        left[nodeid] = max(left[nodeid], 1)
    lines = ["<testsuite>"]
    for nodeid, case, where in _expected:
        reached = left[nodeid] > 0
        left[nodeid] -= 1
        outcome = "skipped" if reached else "error"
        lines.append("%s<%s message=%s/></testcase>" % (case, outcome, where))
    lines.append("</testsuite>\n")
    try:
        with open(RECORD + ".part", "w", encoding="utf-8") as out:
            out.write("\n".join(lines))
        os.replace(RECORD + ".part", RECORD)
    except OSError:
        pass  # no record: nothing is known then


def _go_on(session):
    session.config.option.maxfail = 0
    for name in ("shouldstop", "shouldfail"):
        if getattr(session, name, False):
            # Newer versions refuse to unset the property.
            inner = "_" + name
            setattr(session, inner if hasattr(session, inner) else name, False)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    global _active
    config.option.maxfail = 0
    for name in ("stepwise", "stepwise_skip"):
        if hasattr(config.option, name):
            setattr(config.option, name, False)
    _active = not hasattr(config, "workerinput")


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_collection(session):
    session.config.option.maxfail = 0
    yield


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session):
    if not _active:
        # A worker of pytest-xdist: whoever asked has no items.
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output[PLACES] = {item.nodeid: _where(item) for item in session.items}
        return
    if _expected:
        return
    prefix = getattr(session.config.option, "junitprefix", None)
    for item in session.items:
        where = _xml(_where(item))
        _expected.append((item.nodeid, _case(item.nodeid, prefix), where))
    _write()


# pytest-xdist: the items are in its workers.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    if _active and not _expected:
        prefix = getattr(node.config.option, "junitprefix", None)
        for nodeid in ids:
            _expected.append((nodeid, _case(nodeid, prefix), '""'))
        _write()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    places = (getattr(node, "workeroutput", None) or {}).get(PLACES, {})
    for i, (nodeid, case, where) in enumerate(_expected):
        if where == '""' and places.get(nodeid):
            _expected[i] = (nodeid, case, _xml(places[nodeid]))


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtestloop(session):
    _go_on(session)
    yield


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    yield
    _go_on(item.session)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    # --setup-only and the like end cases whose body nobody ran.
    if report.when == "call":
        _bodies[report.nodeid] += 1
    elif report.when == "setup" and report.outcome != "passed":
        _bodies[report.nodeid] += 1
    elif report.when == "teardown" and _bodies[report.nodeid]:
        _torn_down.add(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    if _finished[nodeid] < _bodies[nodeid]:
        _finished[nodeid] += 1


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish():
    if _expected:
        _write()
)py";

}  // namespace

std::string pytest_watch(const std::string& record) {
  return filled(filled(kPlugin, "@PLACES@", kPlaces), "@RECORD@", record);
}

std::string python_places() { return kPlaces; }

std::string filled(std::string text, const std::string& mark,
                   const std::string& with) {
  return text.replace(text.find(mark), mark.size(), with);
}

DefinedAt read_where(std::string_view where) {
  DefinedAt out;
  std::string line, classes, lines;
  for (std::string* part :
       {&out.file, &out.definition, &line, &classes, &out.name, &lines}) {
    const std::size_t end = where.find('\n');
    *part = std::string(where.substr(0, end));
    where.remove_prefix(end == std::string_view::npos ? where.size() : end + 1);
  }
  std::from_chars(line.data(), line.data() + line.size(), out.line);
  const char* at = lines.data();
  const char* const end = at + lines.size();
  for (std::string_view left = classes; !left.empty();) {
    DefinedAt::Class one;
    const std::size_t stop = left.find("::");
    one.name = std::string(left.substr(0, stop));
    left.remove_prefix(stop == std::string_view::npos ? left.size() : stop + 2);
    at = std::from_chars(at, end, one.line).ptr;
    if (at < end && *at == ',') ++at;
    out.classes.push_back(std::move(one));
  }
  return out;
}

}  // namespace machina::kinds
