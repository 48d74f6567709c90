"""What surrounds a program that nobody has read: the command that makes it, and what runs the program inside.

Bubblewrap (`bwrap`, a package of the distribution) makes user, process, mount, network, IPC and UTS namespaces. Inside
there are the interpreter and its standard library, read-only, a small /tmp, no network and no other process. Limits
hold for root too: a kernel does not count root's processes, so root runs the sandbox as a user of no other purpose.

Knows bwrap's options and where Python lies. Does not know programs, nor how they end.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NOBODY = 65534
"""The user inside."""

_HOST_USER = 60706  # outside, for root: of a range that distributions leave free
_SPARE = "/mnt"  # where root shows the sandbox's user an interpreter that lies in root's home


@dataclass(frozen=True)
class Limits:
    """How much a program may use.

    Args:
        seconds: from its start, whatever it waits for.
        cpu_seconds: of the processor, for each process.
        memory: bytes of address space of each process; all of them together have at most `processes` times as much.
        processes: processes and threads at a time.
        disk: bytes of /tmp, the only place to write to, and of each file there.
        output: bytes written to standard output and error.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory: int = 256 << 20
    processes: int = 8
    disk: int = 8 << 20
    output: int = 1 << 20


# Process 1 of the sandbox. It takes the program from standard input, runs it in a child, and when that has ended ends
# too: the kernel then ends whatever else is left. Only a program that ran to its end has the token written.
_RUNNER = """
import os, resource, signal, sys, traceback, types

seconds, cpu, memory, processes, disk = map(int, sys.argv[1:])
token, program = sys.stdin.buffer.read().split(b"\\n", 1)
signal.signal(signal.SIGALRM, lambda *_: os._exit(124))
signal.alarm(seconds)
os.write(1, b"ready\\n")
child = os.fork()
if child:
    while (ended := os.wait())[0] != child:
        pass
    code = os.waitstatus_to_exitcode(ended[1])
    os._exit(code if code >= 0 else 128 - code)
signal.alarm(0)
signal.signal(signal.SIGALRM, signal.SIG_DFL)
report = os.dup(1)
os.dup2(2, 1)
os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
sys.argv[:] = ["program"]
for name, value in (
    ("CPU", cpu), ("AS", memory), ("FSIZE", disk), ("CORE", 0), ("NOFILE", 64), ("NPROC", processes + 1)
):
    limit = getattr(resource, "RLIMIT_" + name)
    most = resource.getrlimit(limit)[1]
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(limit, (value, value + 1 if name == "CPU" and value != most else value))
module = sys.modules["program"] = types.ModuleType("program")
code = 1
try:
    exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
    sys.stdout.flush()
    os.write(report, token)
    code = 0
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
os._exit(code)
"""


def command(limits: Limits, *, seccomp: int | None, info: int) -> tuple[list[str], dict[str, object]]:
    """The command that runs a program of standard input, and as which user to start it.

    Args:
        limits: what the program may use.
        seccomp: an open file with a filter of system calls.
        info: an open file that bwrap writes the number of process 1 to.

    Returns:
        The words, and arguments of `subprocess.Popen`.
    """
    python, library = _interpreter()
    root = Path(sys.base_prefix)
    hidden = os.geteuid() == 0 and not all(map(_open_to_all, (python, library)))
    shown = Path(_SPARE) if hidden else root

    def place(path: Path) -> str:  # where bwrap finds what lies in the interpreter's folder
        return str(shown / path.relative_to(root)) if path.is_relative_to(root) else str(path)

    binds: list[tuple[str, ...]] = [
        ("--ro-bind", place(path), str(path)) for path in (python, library, *root.glob("lib/libpython*"))
    ]
    packages = library / "site-packages"
    if packages.is_dir():
        binds += [("--tmpfs", str(packages)), ("--remount-ro", str(packages))]
    bwrap = [
        shutil.which("bwrap") or "bwrap",
        *("--unshare-all", "--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY)),
        *("--die-with-parent", "--new-session", "--as-pid-1", "--info-fd", str(info)),
        *(() if seccomp is None else ("--seccomp", str(seccomp))),
        *(word for bind in (*_libraries(), *binds) for word in bind),
        *("--proc", "/proc", "--dev", "/dev", "--size", str(limits.disk), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--clearenv", "--setenv", "PYTHONHASHSEED", "0"),
        *(str(python), "-S", "-s", "-P", "-B", "-X", "utf8", "-c", _RUNNER),
        # process 1 looks after the time itself, should nobody outside be left to
        *map(str, (int(limits.seconds) + 2, limits.cpu_seconds, limits.memory, limits.processes, limits.disk)),
    ]
    if not hidden:
        user = {"user": _HOST_USER, "group": _HOST_USER, "extra_groups": []} if os.geteuid() == 0 else {}
        return bwrap, user
    # In a mount namespace of its own, which ends with it; `exec` keeps the process, so that it still dies with ours.
    become = f"setpriv --reuid {_HOST_USER} --regid {_HOST_USER} --clear-groups"
    script = f'mount --bind "$0" {_SPARE} && exec {become} -- "$@"'
    return ["unshare", "--mount", "--", "sh", "-c", script, str(root), *bwrap], {}


def _interpreter() -> tuple[Path, Path]:
    """The interpreter outside of any virtual environment, and its standard library."""
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    return python, Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))


def _libraries() -> Iterator[tuple[str, ...]]:
    """The shared libraries of the system: links as links, folders read-only."""
    for folder in map(Path, ("/usr/lib", "/usr/lib64", "/lib", "/lib64")):
        if folder.is_symlink():
            yield "--symlink", os.readlink(folder), str(folder)
        elif folder.is_dir():
            yield "--ro-bind", str(folder), str(folder)
    yield "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"


def _open_to_all(path: Path) -> bool:
    """Whether every user may read it."""
    return bool(path.stat().st_mode & stat.S_IROTH) and all(
        parent.stat().st_mode & stat.S_IXOTH for parent in path.parents
    )
