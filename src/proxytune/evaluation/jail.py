"""The process that runs generated programs, one after the other, each in a locked child of its own.

:mod:`proxytune.evaluation.sandbox` starts it as a script. It uses only the standard library, reads jobs and writes
verdicts, as JSON lines. The child of a job locks itself before the program's first instruction:

- rlimits: CPU time, address space, the size of a file, open files, no core dumps;
- Landlock (where the kernel has it, version 3 or newer): reads below the interpreter and the system's libraries, writes
  in its scratch folder alone, no folders, links or devices made;
- seccomp: a list of system calls that may pass. No process, program, socket, signal to others or new limit is on it.
  Without Landlock no file can be opened for writing either.

This process watches from outside: wall time, output, files, threads. In the end it always kills the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from typing import Any

__all__ = ["main"]

# -- system calls: (x86-64, arm64) --------------------------------------------------------------------------------
_HERE = {"x86_64": 0, "aarch64": 1}
_ARCH = (0xC000003E, 0xC00000B7)  # AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64
_Numbers = dict[str, tuple[int | None, int | None]]

_ALLOWED: _Numbers = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pread64": (17, 67),
    "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "preadv": (295, 69), "pwritev": (296, 70),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "pipe": (22, None), "pipe2": (293, 59),
    "select": (23, None), "pselect6": (270, 72), "poll": (7, None), "ppoll": (271, 73), "sched_yield": (24, 124),
    "mremap": (25, 216), "msync": (26, 227), "mincore": (27, 232), "madvise": (28, 233), "membarrier": (324, 283),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pause": (34, None), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "getpgrp": (111, None),
    "getpgid": (121, 155), "getsid": (124, 156), "getresuid": (118, 148), "getresgid": (120, 150),
    "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "fadvise64": (221, 223), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "readlink": (89, None), "readlinkat": (267, 78),
    "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43),
    "fstatfs": (138, 44), "umask": (95, 166), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "getrusage": (98, 165), "getrlimit": (97, 163),
    "sysinfo": (99, 179), "uname": (63, 160), "getcpu": (309, 168), "getpriority": (140, 141),
    "sched_getaffinity": (204, 123), "sched_getparam": (143, 121), "sched_getscheduler": (145, 120),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126), "set_tid_address": (218, 96),
    "set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293), "restart_syscall": (219, 128),
    "exit": (60, 93), "exit_group": (231, 94), "futex": (202, 98), "futex_waitv": (449, 449),
    "arch_prctl": (158, None), "getrandom": (318, 278), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19), "timerfd_create": (283, 85),
    "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87), "close_range": (436, 436),
    "copy_file_range": (326, 285), "sendfile": (40, 71), "get_mempolicy": (239, 236), "capget": (125, 90),
}  # fmt: skip
# Landlock limits the files for these calls; without it they are refused.
_FILES: _Numbers = {
    "open": (2, None), "openat": (257, 56), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "ftruncate": (77, 46), "fallocate": (285, 47),
}  # fmt: skip
# Calls in no list give EPERM, which Python raises as PermissionError. From this number on, calls are newer than these
# lists and give ENOSYS, so that libraries fall back to older ones (from clone3 to clone).
_NEWER = 424
# These are allowed or not depending on their arguments: see _seccomp.
_CLONE, _KILL, _TGKILL, _PRLIMIT = (56, 220), (62, 129), (234, 131), (302, 261)
_FCNTL, _IOCTL, _PRCTL = (72, 25), (16, 29), (157, 167)
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)  # none that asks for signals to be sent
_IOCTL_REQUESTS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # sizes, blocking, close on exec
_PRCTL_OPTIONS = (15, 16)  # a thread's name

_ALLOW, _EPERM, _ENOSYS, _KILL_PROCESS = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLONE_THREAD = 0x10000

_Instructions = list[tuple[int, int, int, int]]


def _seccomp(here: int, pid: int, *, threads: bool, landlock: bool) -> bytes:
    """The filter as BPF: for each call, compare its number, then return the decision."""

    def argument(index: int, high: bool = False) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, 16 + 8 * index + 4 * high)

    def one_of(index: int, values: tuple[int, ...]) -> _Instructions:
        body: _Instructions = [argument(index)]
        for value in values:
            body += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
        return [*body, (_RETURN, 0, 0, _EPERM)]

    def unless_bits(index: int, bits: int) -> _Instructions:
        return [argument(index), (_ANY_BIT, 0, 1, bits), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]

    def when(numbers: tuple[int | None, int | None], body: _Instructions) -> _Instructions:
        number = numbers[here]
        return [] if number is None else [(_EQUAL, 0, len(body), number), *body]

    program: _Instructions = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCH[here]), (_RETURN, 0, 0, _KILL_PROCESS)]
    program += [(_LOAD, 0, 0, 0)]
    for numbers in [*_ALLOWED.values(), *(_FILES.values() if landlock else ())]:
        program += when(numbers, [(_RETURN, 0, 0, _ALLOW)])
    if not landlock:
        program += when(_FILES["open"], unless_bits(1, _WRITING)) + when(_FILES["openat"], unless_bits(2, _WRITING))
    if threads:
        thread = [argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)]
        program += when(_CLONE, thread)
    program += when(_KILL, one_of(0, (pid,))) + when(_TGKILL, one_of(0, (pid,)))  # itself alone: abort() does
    program += when(_FCNTL, one_of(1, _FCNTL_COMMANDS)) + when(_IOCTL, one_of(1, _IOCTL_REQUESTS))
    program += when(_PRCTL, one_of(0, _PRCTL_OPTIONS))
    # Limits may be read (the new limit is a null pointer), but not set.
    no_new = [argument(2), (_EQUAL, 0, 3, 0), argument(2, high=True), (_EQUAL, 0, 1, 0), (_RETURN, 0, 0, _ALLOW)]
    program += when(_PRLIMIT, [*no_new, (_RETURN, 0, 0, _EPERM)])
    program += [(_AT_LEAST, 0, 1, _NEWER), (_RETURN, 0, 0, _ENOSYS), (_RETURN, 0, 0, _EPERM)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


# -- what a child does to itself ----------------------------------------------------------------------------------
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_ALL_ACCESS = (1 << 15) - 1  # what version 3 knows
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE_FILE, _REMOVE_FILE, _MAKE_FILE, _TRUNCATE = 1 << 1, 1 << 5, 1 << 8, 1 << 14
_SYSTEM = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/dev/null", "/dev/zero",
    "/dev/urandom", "/dev/random", "/proc/cpuinfo", "/proc/meminfo", "/proc/self", "/sys/devices/system",
)  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _prctl(option: int, *values: Any) -> None:
    padded = [ctypes.c_ulong(v) if isinstance(v, int) else v for v in values] + [ctypes.c_ulong(0)] * (4 - len(values))
    _check(_libc.prctl(option, *padded), f"prctl {option}")


def landlock_version() -> int:
    """The version that the kernel has; 0 if it has none."""
    if platform.system() != "Linux":
        return 0
    return max(0, _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def _landlock(scratch: str | None) -> None:
    """Reads below what Python needs, writes in the scratch folder."""
    handled = struct.pack("=Q", _ALL_ACCESS)
    ruleset = _check(_libc.syscall(_LANDLOCK_CREATE, handled, ctypes.c_size_t(8), ctypes.c_uint32(0)), "Landlock")
    reads = {*_SYSTEM, sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path}
    rules = [(path, _READ_FILE | _READ_DIR) for path in sorted(reads) if path]
    rules.append(("/dev/null", _READ_FILE | _WRITE_FILE))
    if scratch is not None:
        rules.append((scratch, _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE_FILE | _MAKE_FILE | _TRUNCATE))
    for path, access in rules:
        try:
            where = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        wanted = access if os.path.isdir(path) else access & ~_READ_DIR
        rule = struct.pack("=Qi", wanted, where)
        _check(_libc.syscall(_LANDLOCK_ADD, ruleset, ctypes.c_int(1), rule, ctypes.c_uint32(0)), f"Landlock for {path}")
        os.close(where)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0)), "Landlock")
    os.close(ruleset)


def _lock(job: dict[str, Any], scratch: str) -> None:
    """Give up everything that a program must not have. This cannot be undone."""
    limits, guarded, space = job["limits"], job["guarded"], 0
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as statm:
        space = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    cpu = max(1, round(limits["cpu_seconds"]))
    for name, value in (
        ("CPU", (cpu, cpu + 1)),
        ("AS", (space + limits["memory"],) * 2),
        ("FSIZE", (limits["file_size"],) * 2),
        ("NOFILE", (limits["open_files"],) * 2),
        ("CORE", (0, 0)),
    ):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), value)
        except (AttributeError, OSError, ValueError):
            if guarded:
                raise
    if not guarded:
        return
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if job["landlock"]:
        _landlock(scratch if job["scratch"] else None)
    code = _seccomp(_HERE[platform.machine()], os.getpid(), threads=job["threads"], landlock=job["landlock"])
    buffer = ctypes.create_string_buffer(code, len(code))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))))


def _run(program: str) -> tuple[str, str]:
    """Run a program to its end in this process, and return the result."""
    try:
        # As in the public harnesses: the module has no name, so `if __name__ == "__main__"` does not run.
        exec(compile(program, "<program>", "exec"), {})
    except MemoryError:
        return "out of memory", ""
    except PermissionError as error:
        return "forbidden", _said(error)
    except BaseException as error:
        return "failed", _said(error)
    return "passed", ""


def _said(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:
        text = ""
    name = type(error).__name__
    return f"{name}: {text}"[:500] if text else name


def _child(job: dict[str, Any], scratch: str, nonce: str, verdict: int, output: int) -> None:
    """The forked child: never returns."""
    end, write, dumps = os._exit, os.write, json.dumps  # the program may replace them
    try:
        os.setsid()
        if job["guarded"]:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in range(1, signal.NSIG):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.chdir(scratch)
        os.umask(0o077)
        null = os.open(os.devnull, os.O_RDONLY)
        for here, there in ((null, 0), (output, 1), (output, 2)):
            os.dup2(here, there)
        os.dup2(verdict, 3) if verdict != 3 else os.set_inheritable(3, True)
        os.closerange(4, 4096)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(n, "rw"[n > 0], encoding="utf-8", closefd=False) for n in range(3)
        )
        sys.dont_write_bytecode = True
        os.environ.update(HOME=scratch, TMPDIR=scratch, MPLCONFIGDIR=scratch)
        tempfile.tempdir = scratch
        _lock(job, scratch)
    except BaseException as error:
        write(3, dumps({"nonce": nonce, "outcome": "not locked", "detail": _said(error)}).encode())
        end(1)
    outcome, detail = _run(job["program"])
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    write(3, dumps({"nonce": nonce, "outcome": outcome, "detail": detail}).encode())
    end(0)


# -- what is seen from outside ------------------------------------------------------------------------------------
def _files_in(scratch: str) -> tuple[int, int]:
    """The number of files in a folder, and their bytes."""
    found = [entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(scratch)]
    return len(found), sum(found)


def _threads_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/task"))
    return 1


def _watch(pid: int, job: dict[str, Any], scratch: str, verdict: int, output: int) -> tuple[str, bytes, int]:
    """Wait until a child ends or exceeds a limit. Afterwards it and everything that it started is dead.

    Returns:
        The limit that it exceeded or "", the verdict that it sent, and its wait status.
    """
    limits, waited, last = job["limits"], 0.0, time.monotonic()
    said, written, passed, status = b"", 0, "", None
    poll = select.poll()
    poll.register(0, 0)  # a hang-up: the caller is gone
    poll.register(verdict, select.POLLIN)
    poll.register(output, select.POLLIN)
    ended = -1
    with contextlib.suppress(AttributeError, OSError):  # where there is none, the next tick sees the end
        ended = os.pidfd_open(pid)
        poll.register(ended, select.POLLIN)
    while status is None and not passed:
        for descriptor, event in poll.poll(20):
            if descriptor == 0:
                _kill(pid)
                _remove(scratch)
                os._exit(1)
            data = os.read(descriptor, 65536) if event & select.POLLIN and descriptor != ended else b""
            if not data:
                poll.unregister(descriptor)
            elif descriptor == output:
                written += len(data)
            else:
                said += data[: 65536 - len(said)]
        # If this process itself was delayed (a busy or suspended machine), this is not the program's fault.
        now = time.monotonic()
        waited, last = waited + min(now - last, 0.2), now
        done, ending = os.waitpid(pid, os.WNOHANG)
        if done:
            status = ending
        elif waited > limits["wall_seconds"]:
            passed = "timed out"
        elif written > limits["output"]:
            passed = "too much output"
        elif job["threads"] and _threads_of(pid) > limits["threads"]:
            passed = "too many threads"
        elif job["scratch"]:
            with contextlib.suppress(OSError):  # a file that went away meanwhile
                count, size = _files_in(scratch)
                if count > limits["files"] or size > limits["disk"]:
                    passed = "too many files" if count > limits["files"] else "too much disk"
    if status is None:
        status = _kill(pid)
    else:
        with contextlib.suppress(OSError):  # without a lock it may have left children
            os.killpg(pid, signal.SIGKILL)
    for descriptor, _ in poll.poll(0):  # what was still in the pipes
        if descriptor == verdict:
            said += os.read(verdict, 65536)
        elif descriptor == output:
            written += len(os.read(output, 65536))
    if ended >= 0:
        os.close(ended)
    return passed or ("too much output" if written > limits["output"] else ""), said, status


def _kill(pid: int) -> int:
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):  # before it had a group of its own
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _remove(scratch: str) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    if os.path.lexists(scratch):  # folders too deep for Python, which only an unguarded program can make
        subprocess.run(["rm", "-rf", "--", scratch], check=False, stderr=subprocess.DEVNULL)


def _judge(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job and return its verdict."""
    scratch = tempfile.mkdtemp(prefix="proxytune-program-")
    nonce = os.urandom(16).hex()
    started = time.monotonic()
    verdict, verdict_end = os.pipe()
    output, output_end = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            _child(job, scratch, nonce, verdict_end, output_end)
        os.close(verdict_end)
        os.close(output_end)
        passed, said, status = _watch(pid, job, scratch, verdict, output)
    finally:
        os.close(verdict)
        os.close(output)
        _remove(scratch)
    outcome, detail = "failed", "it ended before its tests did"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        told = json.loads(said)
        if told["nonce"] == nonce:
            outcome, detail = told["outcome"], told["detail"]
    if passed:
        outcome, detail = passed, ""
    elif os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        timed = number in (signal.SIGXCPU, signal.SIGKILL)  # the soft and the hard limit of CPU time
        outcome, detail = ("timed out", "") if timed else ("crashed", signal.Signals(number).name)
    return {"outcome": outcome, "detail": detail, "seconds": round(time.monotonic() - started, 3)}


def main() -> None:
    """Answer jobs until there is no more input. The first output line says which protections this machine has."""
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for module in json.loads(sys.argv[1]):
        with contextlib.suppress(ImportError):
            __import__(module)
    able = platform.system() == "Linux" and platform.machine() in _HERE and sys.byteorder == "little"
    print(json.dumps({"linux": able, "landlock": landlock_version()}), file=answers, flush=True)
    for line in sys.stdin.buffer:
        print(json.dumps(_judge(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
