"""Running a Python program that nobody has read: in namespaces of its own, with little of everything, for a short time.

Knows programs, how they are watched, and how they ended. What surrounds them is in `bubblewrap`. Does not know tasks,
nor what a program is for.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Literal

from layerskip.errors import RequestError
from layerskip.evaluate.bubblewrap import NOBODY, Limits, command
from layerskip.evaluate.seccomp import filter_program

Status = Literal["passed", "failed", "timed out", "killed"]

_STARTING = 30.0  # seconds for the sandbox itself
_TAIL = 4096  # bytes of output that are kept


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Args:
        status: "passed" where it ran to its end; "failed" where it raised or ended itself; "timed out", or "killed" by
            a signal or for its output.
        reason: the last line it wrote, or what stopped it; empty where it passed.
    """

    status: Status
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.status == "passed"


_PROBE = """
import os, signal
assert os.getuid() == {nobody}, os.getuid()
try:
    for _ in range({processes} + 1):
        if not os.fork():
            signal.pause()
except OSError:
    pass
else:
    raise RuntimeError("processes are not limited")
"""


def run(program: str, *, limits: Limits | None = None) -> Outcome:
    """Runs a Python program to its end, or to its limits. When this returns, none of its processes is left.

    The program sees the standard library and nothing else: no files of this machine, no network, no environment. Sets
    of texts have the same order in every run.

    Args:
        program: its source. It passes by running to its end; leaving early, by `sys.exit(0)` too, is failing.
        limits: what it may use; None is the defaults.

    Raises:
        RequestError: there is no such isolation here; says why.
    """
    check()
    return _run(program, limits or Limits())


@functools.cache
def check() -> None:
    """Tries the sandbox, once in a process.

    Raises:
        RequestError: it cannot be made here, or its limits do not hold.
    """
    if shutil.which("bwrap") is None:
        raise RequestError(
            "code written by a model is only run in a sandbox, and there is no bwrap on this machine; "
            "install bubblewrap"
        )
    limits = Limits()
    outcome = _run(_PROBE.format(nobody=NOBODY, processes=limits.processes), limits)
    if not outcome.passed:
        raise _no_sandbox(outcome.reason)


def _no_sandbox(reason: str) -> RequestError:
    return RequestError(
        f"code written by a model is only run in a sandbox, and bwrap cannot make one here: {reason}; "
        "allow user namespaces, or evaluate on a machine that does"
    )


def _run(program: str, limits: Limits) -> Outcome:
    token = secrets.token_hex(16)
    with ExitStack() as stack:
        source = _in_memory(f"{token}\n{program}".encode("utf-8", "surrogatepass"), stack)
        rules = filter_program()
        passed = [_in_memory(rules, stack)] if rules else []
        info, info_end = os.pipe()
        stack.callback(os.close, info)
        words, user = command(limits, seccomp=passed[0] if passed else None, info=info_end)
        process = subprocess.Popen(
            words,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.defpath},
            cwd="/",
            pass_fds=[*passed, info_end],
            **user,  # type: ignore[call-overload]
        )
        os.close(info_end)
        stack.callback(_end, process, info)
        found = _follow(process, info, limits)
    return _outcome(found, token, limits)


@dataclass
class _Ended:
    """What was seen of a program: `why` is what it was stopped for, if it was."""

    report: bytes = b""
    output: bytes = b""
    written: int = 0
    why: Literal["", "time", "output"] = ""
    code: int = 0


def _follow(process: subprocess.Popen[bytes], info: int, limits: Limits) -> _Ended:
    """Reads what the program writes until it has ended or has to be."""
    assert process.stdout is not None
    assert process.stderr is not None
    found = _Ended()
    deadline = time.monotonic() + _STARTING
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        waiting.register(process.stderr, selectors.EVENT_READ)
        while waiting.get_map() and not found.why:
            ready = waiting.select(max(0.0, deadline - time.monotonic()))
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    waiting.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    if not found.report:  # the program begins here
                        deadline = time.monotonic() + limits.seconds
                    found.report = (found.report + data)[:_TAIL]
                else:
                    found.output = (found.output + data)[-_TAIL:]
                found.written += len(data)
            if found.written > limits.output + _TAIL:
                found.why = "output"
            elif time.monotonic() >= deadline:
                found.why = "time"
    found.code = _end(process, info) if found.why else process.wait()
    return found


def _end(process: subprocess.Popen[bytes], info: int) -> int:
    """Ends the sandbox if it still runs, and waits until nothing of it is left.

    Its process 1 is killed, by the number that bwrap wrote: bwrap waits for that one, and so it has ended when bwrap
    has. Killing bwrap first would leave nobody to wait.
    """
    if process.poll() is None:
        os.set_blocking(info, False)
        inner: list[int] = []
        with suppress(BlockingIOError, ValueError):  # bwrap has not come so far
            inner.append(int(json.loads(os.read(info, 4096))["child-pid"]))
        for number in inner or [process.pid]:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    return process.returncode


def _outcome(found: _Ended, token: str, limits: Limits) -> Outcome:
    ready, _, done = found.report.partition(b"\n")
    lines = found.output.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if ready != b"ready":
        raise _no_sandbox(last or "it did not start in time")
    if found.why == "time" or found.code in (124, 128 + signal.SIGXCPU):
        return Outcome("timed out", f"more than {limits.seconds:g} s, or {limits.cpu_seconds} s of the processor")
    if found.why == "output":
        return Outcome("killed", f"wrote more than {limits.output:,} bytes")
    if found.code > 128:
        return Outcome("killed", f"signal {found.code - 128}")
    if found.code == 0 and done == token.encode():
        return Outcome("passed")
    return Outcome("failed", last if found.code and last else f"ended with status {found.code} before its end")


def _in_memory(content: bytes, stack: ExitStack) -> int:
    """A file in memory that holds `content`, read from its beginning; closed with the stack."""
    number = os.memfd_create("layerskip")
    stack.callback(os.close, number)
    os.write(number, content)
    os.lseek(number, 0, os.SEEK_SET)
    return number
