"""Runs generated code with limits: one program and its tests in a process that can do no harm.

:class:`Sandbox` keeps a few warm processes (:mod:`proxytune.evaluation.jail`), each of which forks a locked child per
program. That module describes the locks; docs/evaluation.md says what they guarantee and what they do not.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from proxytune.errors import ProxyTuneError

__all__ = ["Limits", "Sandbox", "Verdict", "default_workers"]

_MIB = 1 << 20
_GRACE = 30.0  # after so many seconds beyond a program's wall time, its process is given up


@dataclass(frozen=True)
class Limits:
    """The limits of one program.

    Attributes:
        cpu_seconds: CPU time in whole seconds; the public harness's 3 s, but independent of the load.
        wall_seconds: time from start to end, without the time in which its watcher had to wait too.
        memory: bytes of address space beyond the interpreter's own.
        output: bytes written to stdout and stderr.
        file_size: bytes of one file. disk: bytes of all files in its scratch folder. files: number of files.
        open_files: number of open files.
        threads: number of threads, if threads are allowed.
    """

    cpu_seconds: float = 3.0
    wall_seconds: float = 10.0
    memory: int = 1024 * _MIB
    output: int = 4 * _MIB
    file_size: int = 16 * _MIB
    disk: int = 64 * _MIB
    files: int = 100
    open_files: int = 64
    threads: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ProxyTuneError(f"the limit {name} must be above 0, not {value}")


@dataclass(frozen=True)
class Verdict:
    """The result of a program.

    Attributes:
        outcome: ``passed``, ``failed`` (an exception, or an early end), ``timed out``, ``out of memory``, ``forbidden``
            (a file, a process or the network was refused, and it did not catch that), ``too much output``,
            ``too much disk``, ``too many files``, ``too many threads`` or ``crashed``.
        detail: the exception or the signal. seconds: wall time.
    """

    outcome: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it ran to the end of its tests."""
        return self.outcome == "passed"


def default_workers() -> int:
    """One for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Sandbox:
    """Runs programs, several at the same time.

    Args:
        workers: number of parallel programs.
        scratch: whether a program may write files, in a folder that is empty before and removed afterwards.
        threads: whether it may start threads. (It can never start processes.)
        preload: modules to import before programs run, if they are installed.
        unguarded: run programs even if this system cannot sandbox them. They can then do whatever this user can do,
            within the limits of time, memory and output.

    Raises:
        ProxyTuneError: on opening, if programs cannot be sandboxed here, and ``unguarded`` does not say to run them
            all the same.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        scratch: bool = False,
        threads: bool = False,
        preload: Sequence[str] = (),
        unguarded: bool = False,
    ) -> None:
        self.limits = limits or Limits()
        self.workers = workers or default_workers()
        self.scratch, self.threads, self.preload, self.unguarded = scratch, threads, tuple(preload), unguarded
        self._landlock = True  # tests switch it off, to test the rest without it
        self._guarded, self._closed = True, False
        self._all: list[_Jail] = []
        self._free: queue.SimpleQueue[_Jail] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")

    def __enter__(self) -> Sandbox:
        if not hasattr(os, "fork"):
            raise ProxyTuneError("generated code can run on Linux, or unguarded on macOS, but not on this system")
        try:
            for _ in range(self.workers):
                self._free.put(self._jail())
            try:
                verdict = self._one("import os\nos.getpid()")
                if not verdict.passed:
                    raise _cannot(f"{verdict.outcome}, {verdict.detail}")
            except ProxyTuneError:
                if not self.unguarded:
                    raise
                self._guarded = False
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for jail in self._all:  # also those that run a program: they kill it
            jail.end()
        self._pool.shutdown()
        for jail in self._all:
            jail.close()

    def _jail(self) -> _Jail:
        self._all.append(jail := _Jail(self.preload))
        return jail

    def run(self, programs: Iterable[str]) -> Iterator[Verdict]:
        """The verdict of each program, in order."""
        return self._pool.map(self._one, programs)

    def _one(self, program: str) -> Verdict:
        jail = self._free.get()
        try:
            landlock = jail.landlock >= 3 and self._landlock
            if self._guarded and not jail.able:
                raise _cannot("it is not Linux on x86-64 or arm64")
            if self._guarded and self.scratch and not landlock:
                raise _cannot("without Landlock version 3 (Linux 6.2), programs that write files cannot be confined")
            job = {
                "program": program,
                "limits": asdict(self.limits),
                "threads": self.threads,
                "scratch": self.scratch,
                "guarded": self._guarded,
                "landlock": landlock,
            }
            answer = jail.ask(job, self.limits.wall_seconds + _GRACE)
            if answer is None:
                if not self._closed:
                    jail.close()
                    jail = self._jail()
                return Verdict("crashed", "its process disappeared")
            if answer["outcome"] == "not locked":
                raise _cannot(answer["detail"])
            return Verdict(**answer)
        finally:
            self._free.put(jail)


def _cannot(why: str) -> ProxyTuneError:
    return ProxyTuneError(
        f"this system cannot sandbox generated code ({why}); use Linux, or run inside a container or virtual machine "
        "that may be damaged, and add --unguarded"
    )


class _Jail:
    """One warm process."""

    def __init__(self, preload: Sequence[str]) -> None:
        keep = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "TMPDIR")
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
        fixed = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": ""}
        self.process: Any = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("jail.py")), json.dumps(list(preload))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Its environment has no secrets, and this process handles Ctrl-C.
            env={name: os.environ[name] for name in keep if name in os.environ} | threads | fixed,
            start_new_session=True,
        )
        hello = self._answer(300.0) or {}
        self.able: bool = hello.get("linux", False)
        self.landlock: int = hello.get("landlock", 0)

    def ask(self, job: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer to a job; None if there is none in time."""
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return None
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else b""
        return json.loads(line) if line.endswith(b"\n") else None

    def end(self) -> None:
        """End it. It kills its program when its input ends."""
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """End it and close its output. Nobody may be waiting for an answer."""
        self.end()
        self.process.stdout.close()
