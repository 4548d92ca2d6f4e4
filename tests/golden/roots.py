#!/usr/bin/env python3
"""Golden roots: what the binary of a version left on the disk.

    python3 tests/golden/roots.py check path/to/machina path/to/libwall_clock_shim.so
    sudo python3 tests/golden/roots.py make path/to/machina VERSION

`check` opens each root with that binary and compares what it answers for each job,
log, patch and reverse diff with what the binary that wrote the root answered. The
shim sets the server's clock to the time of writing, so that no retention has passed.

`make` writes <VERSION>-<name>.tar.xz (the root) and <VERSION>-<name>.json (the
answers) for each of NAMES. Files that are there are left as they are: they are what
users have. It needs root, so that jobs have the same level everywhere, and strace.
"""

import hashlib, http.client, json, os, shutil, signal, socket, subprocess, sys
import tempfile, time

HERE = os.path.dirname(os.path.abspath(__file__))
GIT = ["git", "-c", "user.name=Golden", "-c", "user.email=golden@localhost"]
# A lease that a root holds must not run out while it is opened.
ENV = {"MACHINA_LEASE_MS": "3600000", "MACHINA_DRAIN_MS": "500"}


def boot_id():
    return open("/proc/sys/kernel/random/boot_id").read().strip()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, binary, root, workers, under=(), env={}):
        self.root, self.port = root, free_port()
        self.log = open(root + ".log", "a")
        self.process = subprocess.Popen(
            [*under, binary, "serve", "--root", root, "--port", str(self.port),
             "--workers", str(workers)],
            env=dict(os.environ, **ENV, **env), stdout=self.log, stderr=self.log)
        end = time.time() + 20
        while self.call("GET", "/ready")[0] != 200:
            assert time.time() < end, open(root + ".log").read()[-2000:]
            time.sleep(0.05)

    def call(self, method, path, body=None, headers={}):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError:
            return 0, b""
        finally:
            connection.close()

    def json(self, method, path, body=None):
        status, text = self.call(method, path, body)
        assert 200 <= status < 300, (method, path, status, text)
        return json.loads(text) if text else {}

    def submit(self, kind, payload=None, **members):
        return self.json("POST", "/v1/jobs",
                         {"kind": kind, "payload": payload or {}, **members})["id"]

    def until(self, id, *states):
        end = time.time() + 120
        while True:
            job = self.json("GET", "/v1/jobs/" + id)
            if job["state"] in states:
                return job
            assert time.time() < end, job
            time.sleep(0.05)

    def lease(self, kind):
        got = self.json("POST", "/v1/leases",
                        {"worker": "golden", "kinds": [kind], "wait_ms": 5000})
        return got["leases"][0]["token"]

    def stop(self):
        self.process.terminate()
        assert self.process.wait(60) == 0, open(self.root + ".log").read()[-2000:]

    def kill(self):
        """The server, its pool and their workers, at once."""
        for pid in family(self.root):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()


def family(root):
    out = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\0")
        except OSError:
            continue
        if root.encode() in words and int(pid) != os.getpid():
            out.append(int(pid))
    return out


def repository(root):
    repo = root + "/repos/app"
    os.makedirs(repo)
    for name, text in {
            "m.py": "def f():\n    return 1\n",
            "test_m.py": "from m import f\n\n\ndef test_f():\n    assert f() > 0\n",
    }.items():
        open(os.path.join(repo, name), "w").write(text)
    run = lambda *words: subprocess.run([*GIT, "-C", repo, *words], check=True,
                                        stdout=subprocess.DEVNULL)
    run("init", "-q", "-b", "main", "--template=")
    run("add", "-A")
    run("commit", "-q", "-m", "base")


def diff(to):
    return ("--- a/m.py\n+++ b/m.py\n@@ -1,2 +1,2 @@\n def f():\n"
            f"-    return 1\n+    return {to}\n")


def fill(server):
    """Jobs of every state, and patches of every fate. Gives the jobs' ids."""
    ids, patches = [], []
    job = lambda *a, **k: ids.append(server.submit(*a, **k)) or ids[-1]

    def patch(to, **members):
        payload = {"repo": "app", "diff": diff(to), "test": {}}
        payload.update(members.pop("payload", {}))
        patches.append(job("patch.apply", payload, max_attempts=1, **members))
        return patches[-1]

    # Ended.
    server.until(job("noop", labels={"team": "a", "b": "c"}), "succeeded")
    server.until(job("noop", dedup_key="k-1", dedup_ttl_ms=86400000), "succeeded")
    server.until(job("tool.shell", {"argv": ["sh", "-c", "echo out; echo err >&2"]}),
                 "succeeded")
    server.until(job("test.run", {"files": {"test_a.py": "def test_a(): assert 0\n"}},
                     max_attempts=1), "failed")
    server.until(job("tool.shell", {"argv": ["false"]}, max_attempts=1), "dead",
                 "failed")
    gone = server.submit("noop", keep_result_ms=0)
    end = time.time() + 60
    while server.call("GET", "/v1/jobs/" + gone)[0] != 404:
        assert time.time() < end
        time.sleep(0.1)
    cancelled = job("ext.never")
    server.json("POST", f"/v1/jobs/{cancelled}/cancel", {})

    # Patches: applied and pushed, failing, denied, approved, rolled back, gone.
    first = patch(2, payload={"push": True, "description": "two", "provenance": [
        {"vector_id": "v1", "influence": 0.5, "license": "MIT",
         "origin": "https://example.org/a"}]})
    server.until(first, "succeeded")
    server.until(patch(0), "failed")
    for answer in ("approve", "deny"):
        id = patch(3, payload={"approval": "required"})
        blocked = server.until(id, "blocked")["blocked"]
        yes = answer == "approve"
        given = {"approve": yes, "comment": "as discussed"}
        if yes:
            given["digest"] = blocked["data"]["digest"]
        server.json("POST", f"/v1/jobs/{id}/unblock",
                    {"token": blocked["token"], "actor": "ann", "input": given})
        server.until(id, "succeeded" if yes else "failed")
    server.until(job("patch.rollback", {"patch_id": first}, max_attempts=1),
                 "succeeded")
    short = patch(4, keep_result_ms=1)
    ids.remove(short)
    end = time.time() + 60
    while server.call("GET", "/v1/jobs/" + short)[0] != 404:
        assert time.time() < end
        time.sleep(0.1)
    server.until(patch(5, payload={"approval": "required"}), "blocked")
    patches.pop()

    # Not ended.
    job("ext.ready", {"text": "x" * 100}, priority=9, queue="other")
    job("ext.later", delay_ms=3600000)
    root = job("ext.root")
    job("ext.after", depends_on=[root])
    again = job("ext.again", retry_min_ms=3000000, retry_max_ms=3600000)
    server.json("POST", f"/v1/leases/{server.lease('ext.again')}/fail",
                {"code": "upstream", "message": "not yet"})
    server.until(again, "scheduled")
    for _ in range(3):
        job("ext.keyed", concurrency_key="one at a time", concurrency_limit=1)
    server.lease("ext.keyed")
    held = job("ext.held")
    token = server.lease("ext.held")
    server.json("POST", "/v1/leases/heartbeat", {"items": [
        {"token": token, "progress": {"percent": 40, "message": "half"}}]})
    stopping = job("ext.stopping")
    server.lease("ext.stopping")
    server.json("POST", f"/v1/jobs/{stopping}/cancel", {})
    return ids, patches


def short(value):
    """Long texts as their digest."""
    if isinstance(value, dict):
        return {k: short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [short(v) for v in value]
    if isinstance(value, str) and len(value) > 2000:
        return "sha256:" + hashlib.sha256(value.encode()).hexdigest()
    return value


def copied(root, to):
    shutil.copytree(root, to, symlinks=True, ignore=shutil.ignore_patterns("*.sock"))


def answers(server, jobs, patches):
    """What the server says of them, by path."""
    out = {}
    paths = ["/v1/jobs/" + id + more for id in jobs
             for more in ("", "/logs", "/artifacts")]
    paths += ["/v1/patches/" + id + more for id in patches
              for more in ("", "/ancestry", "/reverse_diff")]
    for path in paths:
        status, text = server.call("GET", path)
        try:
            text = json.loads(text)
        except ValueError:
            text = text.decode()
        out[path] = [status, short(text)]
    return out


def dump(binary, root, jobs, patches):
    copy = root + "-copy"
    copied(root, copy)
    server = Server(binary, copy, 0)
    out = {"written_at": int(time.time()), "boot_id": boot_id(), "jobs": jobs, "patches": patches,
           "answers": answers(server, jobs, patches)}
    server.stop()
    shutil.rmtree(copy)
    return out


def clean(binary, root):
    server = Server(binary, root, 2)
    made = fill(server)
    server.stop()
    return made


def crashed(binary, root):
    server = Server(binary, root, 2)
    made = fill(server)
    server.kill()
    return made


def handed_over(binary, root):
    server = Server(binary, root, 2)
    made = fill(server)
    server.json("POST", "/shutdown", {"mode": "handover"})
    server.process.wait(60)
    server.kill()
    return made


def rotating(binary, root):
    """Killed as the next segment is about to get its name."""
    server = Server(binary, root, 2)
    ids, patches = fill(server)
    server.kill()
    # Killed as it gives the next segment its name, which is the lsn that a run
    # without a kill gives it.
    wal = lambda: {n for n in os.listdir(copy + "/queue/wal") if n.endswith(".seg")}
    copy, name = root + "-try", ""
    for _ in range(10):
        copied(root, copy)
        more, under = [], []
        if name:
            under = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", "wal/" + name,
                     "-e", "trace=renameat", "-e", "inject=renameat:signal=KILL"]
        server = Server(binary, copy, 0, under)
        before = wal()
        body = {"kind": "ext.big", "payload": {"text": "y" * 900000}}
        while len(more) < 90 and (name or wal() == before):
            status, text = server.call("POST", "/v1/jobs", body)
            if status != 201:
                break
            more.append(json.loads(text)["id"])
        if name and status != 201 and wal() == before:
            server.process.wait()
            shutil.rmtree(root)
            os.rename(copy, root)
            return ids + more[-4:], patches
        server.kill()
        name = max(wal() - before, default=name)
        shutil.rmtree(copy)
    raise SystemExit("no kill fell into a rotation")


NAMES = {"clean": clean, "crashed": crashed, "handed-over": handed_over,
         "rotating": rotating}


def write_lines(path, out):
    """As JSON, an answer a line."""
    lines = lambda d: ",\n".join(f"{json.dumps(k)}: {json.dumps(d[k], sort_keys=True)}"
                                 for k in sorted(d))
    head = {k: v for k, v in out.items() if k != "answers"}
    with open(path, "w") as file:
        file.write("{\n" + lines(head) + ',\n"answers": {\n' + lines(out["answers"])
                   + "\n}\n}\n")


def make(binary, version):
    for name, write in NAMES.items():
        base = os.path.join(HERE, f"{version}-{name}")
        if os.path.exists(base + ".json"):
            print(name, "is there")
            continue
        print(name, flush=True)
        with tempfile.TemporaryDirectory(prefix="machina-golden-", dir="/var/tmp") as top:
            root = top + "/root"
            os.mkdir(root)
            repository(root)
            jobs, patches = write(binary, root)
            out = dump(binary, root, jobs, patches)
            subprocess.run(["tar", "-cJf", base + ".tar.xz", "--sparse",
                            "--hole-detection=raw", "--exclude=*.sock", "--owner=0",
                            "--group=0", "--numeric-owner", "-C", root, "."],
                           check=True)
        write_lines(base + ".json", out)


def differences(was, now, path=""):
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            # Whether a worker is connected is no matter of the root.
            if key != "served":
                yield from differences(was.get(key), now.get(key), f"{path} {key}")
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for i, (a, b) in enumerate(zip(was, now)):
            yield from differences(a, b, f"{path} {i}")
    elif was != now:
        yield f"{path}: was {json.dumps(was)}, is {json.dumps(now)}"


def check_one(binary, shim, name):
    was = json.load(open(os.path.join(HERE, name + ".json")))
    with tempfile.TemporaryDirectory(prefix="machina-golden-", dir="/var/tmp") as top:
        root = top + "/root"
        os.mkdir(root)
        subprocess.run(["tar", "-xf", os.path.join(HERE, name + ".tar.xz"),
                        "--no-same-owner", "-C", root], check=True)
        shift = was["written_at"] - int(time.time())
        with open(top + "/shift", "w") as file:
            file.write(str(shift))
        env = {"LD_PRELOAD": shim, "WALL_CLOCK_SHIFT_FILE": top + "/shift"}
        # On the boot that wrote the root the server would know by the clock since
        # the boot how much time has passed.
        if was["boot_id"] == boot_id():
            env["WALL_CLOCK_SHIFT_BOOT"] = "1"
        # Twice: what the first opening wrote must read the same too. The first is
        # killed, for a stop would give back what is leased.
        wrong = []
        for opening in ("first", "second"):
            server = Server(binary, root, 0, env=env)
            try:
                now = answers(server, was["jobs"], was["patches"])
            finally:
                if opening == "first" or sys.exc_info()[0]:
                    server.kill()
            wrong += [f"{opening} opening:{line}"
                      for line in differences(was["answers"], now)]
        server.stop()
        verify = subprocess.run([binary, "wal", "verify", "--root", root],
                                capture_output=True, text=True)
        if verify.returncode != 0:
            wrong.append("wal verify: " + verify.stdout[-500:] + verify.stderr[-500:])
    return wrong


def check(binary, shim):
    names = sorted(n[:-5] for n in os.listdir(HERE) if n.endswith(".json"))
    assert names, "there are no golden roots"
    failed = False
    for name in names:
        wrong = check_one(binary, os.path.abspath(shim), name)
        print(f"{name}: {'reads as it did' if not wrong else 'DIFFERS'}", flush=True)
        for line in wrong[:20]:
            print("  " + line)
        failed = failed or bool(wrong)
    return 1 if failed else 0


def main():
    os.umask(0o077)
    verb, binary, more = sys.argv[1], os.path.abspath(sys.argv[2]), sys.argv[3]
    if verb == "make":
        make(binary, more)
        return 0
    return check(binary, more)


sys.exit(main())
