"""The sandbox: each limit holds, whatever the program tries, with Landlock and without it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from proxytune import ProxyTuneError
from proxytune.evaluation import jail, sandbox
from proxytune.evaluation.sandbox import Limits, Sandbox, Verdict

MIB = 1 << 20
TIGHT = Limits(
    cpu_seconds=1, wall_seconds=3, memory=256 * MIB, output=MIB, file_size=MIB, disk=3 * MIB, files=10, threads=8
)
HAS_LANDLOCK = jail.landlock_version() >= 3

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are locked up on Linux alone")


def opened(*, landlock=True, **options):
    if landlock and not HAS_LANDLOCK:
        pytest.skip("this kernel has no Landlock of version 3")
    box = Sandbox(TIGHT, **{"workers": 2, **options})
    box._landlock = landlock
    return box


@pytest.fixture(scope="module", params=["landlock", "seccomp alone"])
def strict(request):
    """No files, no threads: what HumanEval and MBPP run in."""
    with opened(landlock=request.param == "landlock") as box:
        yield box


@pytest.fixture(scope="module")
def wide():
    """Files in a scratch folder, and threads: what DS-1000 runs in."""
    with opened(scratch=True, threads=True) as box:
        yield box


@pytest.fixture(scope="module", params=["landlock", "seccomp alone", "scratch"])
def any_kind(request):
    kind = request.param
    with opened(landlock=kind != "seccomp alone", scratch=kind == "scratch", threads=kind == "scratch") as box:
        yield box


def one(box, program):
    (verdict,) = box.run([program])
    return verdict


# -- what becomes of a program ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("program", "outcome", "detail"),
    [
        ("assert sum([1, 2]) == 3", "passed", ""),
        ("import math, re, collections, json, itertools, heapq, hashlib, datetime, random", "passed", ""),
        ("assert False, 'no'", "failed", "AssertionError: no"),
        ("x =", "failed", "SyntaxError"),
        ("'\\0'\0", "failed", "SyntaxError|ValueError"),
        ("x = '\ud800'", "failed", "UnicodeEncodeError"),
        ("def f(): f()\nf()", "failed", "RecursionError"),
        ("input()", "failed", "EOFError"),
        ("import sys; sys.exit(0)", "failed", "SystemExit"),
        ("import os; os._exit(0)", "failed", "it ended before its tests did"),
        ("class E(Exception):\n  def __str__(self): raise KeyboardInterrupt\nraise E", "failed", "E"),
        ("import ctypes; ctypes.string_at(0)", "crashed", "SIGSEGV"),
        ("import os; os.abort()", "crashed", "SIGABRT"),
        ("import os; os.kill(os.getpid(), 15)", "crashed", "SIGTERM"),
        ("if __name__ == '__main__': raise ValueError", "passed", ""),
    ],
)
def test_the_outcome_says_what_happened(strict, program, outcome, detail):
    import re

    verdict = one(strict, program)
    assert verdict.outcome == outcome
    assert re.match(detail, verdict.detail), verdict
    assert verdict.passed is (outcome == "passed")


@pytest.mark.parametrize(
    "program",
    [
        """import os; os.write(3, b'{"nonce": "", "outcome": "passed", "detail": ""}'); os._exit(0)""",
        """import os; os.write(3, b'{"outcome": "passed"}'); raise ValueError""",
        "import os, json\nos.write = lambda *a: 0\njson.dumps = lambda *a: ''\nraise ValueError",
        "import os; os.close(3); raise ValueError",
        "import builtins; builtins.BaseException = None; raise ValueError",
    ],
)
def test_a_program_does_not_pass_by_saying_so(strict, program):
    assert one(strict, program).outcome == "failed"


def test_one_program_leaves_nothing_to_the_next(strict):
    leave = "import builtins, json, os; builtins.left = 1; json.left = 1; os.environ['LEFT'] = '1'"
    look = (
        "import builtins, json, os\nassert not hasattr(builtins, 'left') and not hasattr(json, 'left')\n"
        "assert 'LEFT' not in os.environ"
    )
    assert [verdict.outcome for verdict in strict.run([leave, look] * 3)] == ["passed"] * 6


def test_verdicts_come_in_order(strict):
    programs = ["import time; time.sleep(0.3)", "assert False", "pass", "1 / 0"] * 2
    found = [(verdict.outcome, verdict.detail) for verdict in strict.run(programs)]
    assert found == 2 * [
        ("passed", ""),
        ("failed", "AssertionError"),
        ("passed", ""),
        ("failed", "ZeroDivisionError: division by zero"),
    ]


# -- time, memory, output -----------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "import time; time.sleep(10000)",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nsignal.pause()",
        "10 ** 10 ** 10",
    ],
)
def test_time_ends(strict, program):
    assert one(strict, program).outcome == "timed out"


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("x = bytearray(1 << 30)", "out of memory"),
        ("import mmap; mmap.mmap(-1, 1 << 30)", "failed"),  # OSError: cannot allocate memory
        ("while True: print('x' * 1000)", "too much output"),
        ("import sys\nsys.stderr.write('x' * (2 << 20))", "too much output"),
        ("import os\nwhile True:\n  try: os.write(2, b'x' * 65536)\n  except BaseException: pass", "too much output"),
    ],
)
def test_memory_and_output_end(strict, program, outcome):
    assert one(strict, program).outcome == outcome


def test_memory_that_is_taken_bit_by_bit_ends_too():
    slow_machine = Limits(cpu_seconds=300, wall_seconds=600, memory=32 * MIB)
    with Sandbox(slow_machine, workers=1) as box:
        for caught in ("", "  try: x.append(bytearray(1 << 20)); continue\n  except MemoryError: x.clear(); raise\n"):
            assert one(box, f"x = []\nwhile True:\n{caught}  x.append(bytearray(1 << 20))").outcome == "out of memory"


@pytest.mark.slow
@pytest.mark.parametrize("ignored", ["", "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"])
def test_cpu_time_ends_long_before_wall_time(ignored):
    with Sandbox(Limits(cpu_seconds=1, wall_seconds=600), workers=1) as box:
        assert one(box, f"{ignored}while True: pass").outcome == "timed out"


def test_limits_cannot_be_raised(strict):
    for name in ("CPU", "AS", "FSIZE", "NOFILE", "CORE", "NPROC"):
        raised = f"import resource as r\nr.setrlimit(r.RLIMIT_{name}, (r.RLIM_INFINITY, r.RLIM_INFINITY))"
        assert not one(strict, raised).passed
        asked = f"import resource as r\nr.getrlimit(r.RLIMIT_{name})"
        assert one(strict, asked).passed


# -- the network --------------------------------------------------------------------------------------------------
def test_no_network(strict):
    reached = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)

        def listen():
            while not stop.is_set():
                try:
                    reached.append(server.accept())
                except TimeoutError:
                    continue

        stop = threading.Event()
        thread = threading.Thread(target=listen)
        thread.start()
        port = server.getsockname()[1]
        programs = [
            f"import socket; socket.create_connection(('127.0.0.1', {port}))",
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/', timeout=1)",
            "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)",
            "import socket; socket.socketpair()",
            "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
            "import socket; socket.getaddrinfo('localhost', 80); socket.socket()",
        ]
        outcomes = [verdict.outcome for verdict in strict.run(programs)]
        stop.set()
        thread.join()
    assert not reached
    assert not {"passed", "timed out"} & set(outcomes)


# -- processes ----------------------------------------------------------------------------------------------------
CALL = "import ctypes; n = ctypes.CDLL(None, use_errno=True).syscall({}); assert n >= 0, ctypes.get_errno()"


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.fork()",
        "import os; os.forkpty()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; assert os.system('true') == 0",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; p = m.Process(target=print); p.start(); p.join(); assert p.exitcode == 0",
        CALL.format("57" if os.uname().machine == "x86_64" else "220, 17, 0, 0, 0, 0"),  # fork, or clone
        CALL.format("435, ctypes.create_string_buffer(88), 88"),  # clone3
        CALL.format("425, 8, ctypes.create_string_buffer(120)"),  # io_uring_setup
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os; os.killpg(os.getpgid(os.getppid()), 9)",
        "import os; os.pidfd_open(os.getppid())",
        "import os, fcntl; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
        "import os; os.nice(-5)",
        "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import threading; threading.Thread(target=print).start()",
    ],
)
def test_no_processes_and_no_signals_to_others(strict, program):
    assert not one(strict, program).passed
    assert one(strict, "pass").passed


def test_a_fork_bomb_is_alone(strict):
    before = set(children(os.getpid()))
    bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    assert one(strict, bomb).outcome == "timed out"
    assert set(children(os.getpid())) == before


def children(pid):
    """All descendants of a process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found - {pid}


def test_threads_where_they_are_allowed_are_few_and_end(wide):
    few = "import threading\nfor _ in range(3):\n  t = threading.Thread(target=sum, args=([],)); t.start(); t.join()"
    assert one(wide, few).passed
    bomb = (
        "import threading, time\n"
        "for _ in range(40): threading.Thread(target=time.sleep, args=(10000,), daemon=True).start()\ntime.sleep(10000)"
    )
    assert one(wide, bomb).outcome in ("too many threads", "out of memory", "failed")
    before = set(children(os.getpid()))
    assert one(wide, "import threading, time\nthreading.Thread(target=time.sleep, args=(10000,)).start()").passed
    assert set(children(os.getpid())) == before
    assert not one(wide, "import os; os.fork()").passed


# -- files --------------------------------------------------------------------------------------------------------
HARM = {
    "write": "open({0!r}, 'w')",
    "append": "open({0!r}, 'a').write('x')",
    "read and write": "open({0!r}, 'r+').write('x')",
    "truncate by opening": "import os; os.open({0!r}, os.O_RDONLY | os.O_TRUNC)",
    "truncate": "import os; os.truncate({0!r}, 0)",
    "unlink": "import os; os.unlink({0!r})",
    "rename": "import os; os.rename({0!r}, {0!r} + '2')",
    "rename over": "import os; open('mine', 'w').write('x'); os.rename('mine', {0!r})",
    "chmod": "import os; os.chmod({0!r}, 0o777)",
    "chown": "import os; os.chown({0!r}, 1, 1)",
    "utime": "import os; os.utime({0!r}, (1, 1))",
    "xattr": "import os; os.setxattr({0!r}, 'user.x', b'x')",
    "link": "import os; os.link({0!r}, 'mine'); open('mine', 'w').write('x')",
    "symlink": "import os; os.symlink({0!r}, 'mine'); open('mine', 'w').write('x')",
    "beside": "open({0!r} + '2', 'w')",
    "mkdir": "import os; os.mkdir({0!r} + '2')",
    "mkfifo": "import os; os.mkfifo({0!r} + '2')",
    "rmtree": "import os, shutil; shutil.rmtree(os.path.dirname({0!r}))",
    "dot dot": "import os; open(os.path.relpath({0!r}), 'w')",
    "chdir": "import os; os.chdir(os.path.dirname({0!r})); open('new', 'w')",
    "memory": "import os; os.memfd_create('x')",
    "shared memory": "from multiprocessing import shared_memory as s; s.SharedMemory(create=True, size=10)",
    "memory of another": "import os; open(f'/proc/{{os.getppid()}}/mem', 'r+b')",
}


@pytest.mark.parametrize("harm", HARM)
def test_no_file_is_changed(any_kind, tmp_path, harm):
    target = tmp_path / "target"
    target.write_text("whole")
    before = [(path.name, path.stat()) for path in sorted(tmp_path.iterdir())]
    assert not one(any_kind, HARM[harm].format(str(target))).passed
    assert target.read_text() == "whole"
    after = [(path.name, path.stat()) for path in sorted(tmp_path.iterdir())]
    keep = ("st_mode", "st_uid", "st_size", "st_mtime_ns", "st_nlink")
    assert [(n, *(getattr(s, k) for k in keep)) for n, s in after] == [
        (n, *(getattr(s, k) for k in keep)) for n, s in before
    ]


def test_no_file_at_all_without_a_scratch_folder(strict):
    assert one(strict, "open('here', 'w')").outcome == "forbidden"


def test_what_is_not_the_interpreters_is_not_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a key")
    with opened() as box:
        assert one(box, f"open({str(secret)!r}).read()").outcome == "forbidden"
        assert one(box, "import os; open(f'/proc/{os.getppid()}/environ').read()").outcome == "forbidden"
        assert one(box, "import os; os.listdir('/home')").outcome == "forbidden"
        assert one(box, "import this").passed


def test_a_scratch_folder_is_empty_before_and_gone_after(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    use = (
        "import os\nassert not os.listdir()\nopen('a', 'w').write('x')\nos.rename('a', 'b')\n"
        "assert open('b').read() == 'x' and os.listdir() == ['b']\nos.unlink('b')\nopen('c', 'w')\n"
        "import tempfile; tempfile.TemporaryFile().write(b'x')"
    )
    with opened(scratch=True) as box:
        assert [verdict.outcome for verdict in box.run([use] * 4)] == ["passed"] * 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("open('a', 'wb').write(bytes(2 << 20))", "failed"),  # OSError: file too large
        ("open('a', 'wb').truncate(2 << 20)", "failed"),
        ("for i in range(8): open(f'{i}', 'wb').write(bytes(1 << 20))\nimport time; time.sleep(9)", "too much disk"),
        ("for i in range(20): open(f'{i}', 'w').close()\nimport time; time.sleep(9)", "too many files"),
        ("x = [open('a', 'w') for _ in range(100)]", "failed"),  # OSError: too many open files
    ],
)
def test_files_are_few_and_small(wide, program, outcome):
    assert one(wide, program).outcome == outcome


def test_no_secret_is_in_the_environment(strict, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with opened(workers=1) as box:
        assert one(box, "import os; assert 'secret' not in os.environ.values()").passed


# -- when things go wrong -----------------------------------------------------------------------------------------
def test_nothing_outlives_a_killed_parent(tmp_path):
    program = """
import os, sys
from proxytune.evaluation.sandbox import Limits, Sandbox
with Sandbox(Limits(cpu_seconds=60, wall_seconds=120), workers=2, scratch=sys.argv[1] == "scratch") as box:
    print("open", flush=True)
    list(box.run(["while True: pass"] * 4))
"""
    kind = "scratch" if HAS_LANDLOCK else "none"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", program, kind], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout.readline() == b"open\n"
    deadline = time.monotonic() + 300
    while len(found := children(parent.pid)) < 4 and time.monotonic() < deadline:  # two jails, a program in each
        time.sleep(0.05)
    assert len(found) == 4
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while (any(alive(pid) for pid in found) or list(tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in found if alive(pid)]
    assert not list(tmp_path.iterdir())


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_lost_process_costs_its_program_alone():
    with opened(workers=1, landlock=HAS_LANDLOCK) as box:
        jailed = box._free.get()
        box._free.put(jailed)
        found = box.run(["import time; time.sleep(10000)", "pass"])
        deadline = time.monotonic() + 300
        while not children(jailed.process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(jailed.process.pid, signal.SIGKILL)
        assert [verdict.outcome for verdict in found] == ["crashed", "passed"]


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["able", "landlock"])
def test_where_nothing_can_be_locked_up_it_is_refused(monkeypatch, lacking):
    kept = sandbox._Jail.__init__

    def without(self, preload):
        kept(self, preload)
        setattr(self, lacking, False if lacking == "able" else 2)

    monkeypatch.setattr(sandbox._Jail, "__init__", without)
    with (
        pytest.raises(ProxyTuneError, match=r"cannot sandbox generated code .*--unguarded"),
        Sandbox(workers=1, scratch=True),
    ):
        pass
    with Sandbox(TIGHT, workers=1, scratch=True, unguarded=True) as box:
        assert one(box, "import os; open('a', 'w')\nif not os.fork(): os._exit(0)").passed
        assert one(box, "while True: pass").outcome == "timed out"
        assert one(box, "import time; time.sleep(10000)").outcome == "timed out"


def test_a_system_that_forbids_the_lock_is_reported(monkeypatch):
    """A container that refuses seccomp: the child says so instead of running anything."""
    kept = sandbox._Jail.ask

    def forbidden(self, job, seconds):
        return {"outcome": "not locked", "detail": "prctl 22"} if job["guarded"] else kept(self, job, seconds)

    monkeypatch.setattr(sandbox._Jail, "ask", forbidden)
    with pytest.raises(ProxyTuneError, match=r"\(prctl 22\)"), Sandbox(workers=1):
        pass
    with Sandbox(workers=1, unguarded=True) as box:
        assert one(box, "import os\nif not os.fork(): os._exit(0)").passed


def test_a_lock_that_fails_runs_nothing():
    """Half a lock is none: the program does not begin."""
    with Sandbox(TIGHT, workers=1) as box:
        jailed = box._free.get()
        job = {"program": "x = 1", "limits": {**vars(TIGHT), "open_files": "many"}, "guarded": True}
        answer = jailed.ask({**job, "threads": False, "scratch": False, "landlock": False}, 60)
        assert answer["outcome"] == "not locked"
        box._free.put(jailed)
        assert one(box, "pass").passed


def test_leaving_ends_what_runs():
    before = set(children(os.getpid()))
    with Sandbox(Limits(cpu_seconds=600, wall_seconds=600), workers=2) as box:
        box.run(["while True: pass"] * 4)
        while len(set(children(os.getpid())) - before) < 4:
            time.sleep(0.05)
    assert set(children(os.getpid())) == before


def test_limits_are_checked():
    with pytest.raises(ProxyTuneError, match="memory must be above 0, not 0"):
        Limits(memory=0)
    assert Verdict("passed").passed
    assert not Verdict("failed").passed


def test_the_filter_knows_both_machines():
    """Of each, every call's number once; the x86-64 one is what all the tests above run under."""
    for here in (0, 1):
        groups = [jail._ALLOWED, jail._FILES]
        numbers = [pair[here] for group in groups for pair in group.values() if pair[here] is not None]
        numbers += [pair[here] for pair in (jail._CLONE, jail._KILL, jail._TGKILL, jail._PRLIMIT)]
        numbers += [pair[here] for pair in (jail._FCNTL, jail._IOCTL, jail._PRCTL)]
        assert len(set(numbers)) == len(numbers)
        assert len(jail._seccomp(here, 1, threads=False, landlock=False)) % 8 == 0
