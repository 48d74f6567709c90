"""The sandbox: what programs may do, what they may not, and that nothing of them is left. Real programs, really run."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from layerskip.errors import RequestError
from layerskip.evaluate import sandbox
from layerskip.evaluate.bubblewrap import Limits
from layerskip.evaluate.sandbox import Outcome, run
from layerskip.evaluate.tasks import humaneval

HUMANEVAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "prompts" / "humaneval.jsonl"
pytestmark = pytest.mark.usefixtures("bubblewrap")
_numbers = itertools.count(os.getpid() % 1000 * 1000)


@pytest.fixture
def limits() -> Iterator[Limits]:
    """Short ones that no other test has, so that their processes can be told; nothing may be left of them."""
    found = Limits(seconds=3, cpu_seconds=1, memory=(128 << 20) + next(_numbers))
    yield found
    assert processes(found) == []


def processes(limits: Limits) -> list[int]:
    """The processes, of any user, that run under these limits."""
    mark = str(limits.memory)
    return [each.pid for each in psutil.process_iter(["cmdline"]) if mark in (each.info["cmdline"] or [])]


def test_a_program_that_ends_has_passed(limits: Limits) -> None:
    assert run("import math\nprint(math.pi)\nassert {'a', 'b'}", limits=limits) == Outcome("passed")
    assert run("print('x' * 70_000)  # more than a pipe holds", limits=limits).passed
    assert run("x = 0\n" * 50_000, limits=limits).passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("open('x', 'w').write('\\ud800')", "UnicodeEncodeError: .*surrogates not allowed"),
        ("def f(): f()\nf()", "RecursionError: .*"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("input()", "EOFError: EOF when reading a line"),
        ("if __name__ == '__main__': pass\nelse: raise OSError(__name__)", "OSError: program"),
    ],
)
def test_a_program_that_raises_has_failed(limits: Limits, program: str, reason: str) -> None:
    found = run(program, limits=limits)
    assert found.status == "failed"
    assert re.fullmatch(reason, found.reason), found.reason


@pytest.mark.parametrize(
    "leave",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "quit = exit = None\nimport os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, sys; os.execv(sys.executable, ['python', '-c', ''])",
        "import os\nif os.fork(): os._exit(0)\nelse: os._exit(0)",
        "import os; os.write(1, b'ready\\n'); os._exit(0)",
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'passed')\n    except OSError: pass\nos._exit(0)",
    ],
)
def test_leaving_before_the_tests_is_failing(limits: Limits, leave: str) -> None:
    found = run(f"{leave}\nassert False, 'the tests'", limits=limits)
    assert not found.passed
    assert "the tests" not in found.reason


def test_an_endless_loop_ends(limits: Limits) -> None:
    assert run("while True: pass", limits=limits).status == "timed out"


def test_a_program_that_only_waits_ends(limits: Limits) -> None:
    began = time.monotonic()
    assert run("import time\ntry: time.sleep(600)\nexcept BaseException: time.sleep(600)", limits=limits) == Outcome(
        "timed out", "more than 3 s, or 1 s of the processor"
    )
    assert time.monotonic() - began >= limits.seconds


FORK_BOMB = """
import os, signal
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
while True:
    try: os.fork()
    except OSError: pass
"""


def test_a_fork_bomb_is_contained(limits: Limits) -> None:
    found: list[Outcome] = []
    bomb = threading.Thread(target=lambda: found.append(run(FORK_BOMB, limits=limits)))
    bomb.start()
    most = 0
    while bomb.is_alive():
        most = max(most, len(processes(limits)))
        time.sleep(0.05)
    bomb.join()
    assert found[0].status in ("timed out", "killed")
    # the program's, process 1, and the two of bwrap while it starts
    assert limits.processes // 2 < most <= limits.processes + 4


def test_what_runs_on_behind_the_program_is_ended(limits: Limits) -> None:
    program = "import os, time\nfor _ in range(3):\n    if not os.fork():\n        os.setsid(); time.sleep(600)"
    assert run(program, limits=limits).passed
    assert processes(limits) == []


def test_threads_are_counted_too(limits: Limits) -> None:
    program = "import threading, time\nfor _ in range(50): threading.Thread(target=time.sleep, args=(9,)).start()"
    assert run(program, limits=limits) == Outcome("failed", "RuntimeError: can't start new thread")


def test_a_memory_bomb_is_contained(limits: Limits) -> None:
    assert run("x = []\nwhile True: x.append(bytearray(1 << 22))", limits=limits) == Outcome("failed", "MemoryError")


@pytest.mark.parametrize("call", ["memfd_create('x')", "unshare", "shmget(0, 1 << 30, 0o1600)", "ptrace(0, 0, 0, 0)"])
def test_memory_that_no_limit_counts_is_refused(limits: Limits, call: str) -> None:
    if not sandbox.filter_program():
        pytest.skip("the calls of this machine's processor are not listed")
    arguments = call if "(" in call else f"{call}(0x10000000)"
    program = f"import ctypes, errno\nc = ctypes.CDLL(None, use_errno=True)\nassert c.{arguments} == -1\n"
    program = program.replace("'x'", "b'x', 0")
    assert run(f"{program}assert ctypes.get_errno() == errno.EPERM", limits=limits) == Outcome("passed")


def test_the_disk_is_small_and_the_only_place_to_write(limits: Limits, tmp_path: Path) -> None:
    assert run("open('/tmp/fine', 'w').write('fine')", limits=limits).passed
    assert not Path("/tmp/fine").exists()
    full = run("for i in range(9): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))", limits=limits)
    assert full == Outcome("failed", "OSError: [Errno 28] No space left on device")
    tmp_path.chmod(0o777)
    library = Path(os.__file__).parent
    for place in (tmp_path, "/", "/root", "/home", "/dev", "/proc", "/usr/lib", library, library / "site-packages"):
        found = run(f"open('{place}/written', 'w').write('x')", limits=limits)
        assert found.status == "failed", place
        assert found.reason.split(":")[0] in ("OSError", "FileNotFoundError", "PermissionError"), place
        assert not Path(place, "written").exists()


def test_no_file_of_the_host_can_be_read(limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "a key")
    home = Path.home() if os.access(Path.home(), os.W_OK) else tmp_path
    with tempfile.NamedTemporaryFile("w", dir=home) as secret:
        secret.write("a key")
        secret.flush()
        Path(secret.name).chmod(0o644)
        for path in (secret.name, "/etc/passwd", __file__, "/usr/bin/env", "/proc/1/root" + secret.name, "/sys"):
            assert run(f"import os; os.stat({path!r})", limits=limits).reason.startswith("FileNotFoundError"), path
    environment = "import os\nassert set(os.environ) <= {'PYTHONHASHSEED', 'PWD', 'LC_CTYPE'}, os.environ"
    assert run(environment, limits=limits) == Outcome("passed")
    seen = "import os\nassert [name for name in os.listdir('/proc') if name.isdigit()] == ['1', '2']"
    assert run(seen, limits=limits) == Outcome("passed")


def test_no_network(limits: Limits) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as abstract:
        name = f"\0layerskip-{limits.memory}"
        abstract.bind(name)
        abstract.listen()
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()  # from here it can be reached
        listener.accept()[0].close()
        for connect in (
            f"socket.create_connection(('127.0.0.1', {port}), 2)",
            "socket.create_connection(('198.51.100.7', 80), 2)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('198.51.100.7', 53))",
            f"socket.socket(socket.AF_UNIX).connect({name!r})",
            "socket.getaddrinfo('example.org', 80)",
        ):
            found = run(f"import socket\n{connect}", limits=limits)
            assert found.status == "failed", connect
            assert found.reason.startswith(("OSError", "ConnectionRefusedError", "socket.gaierror")), found.reason
        for silent in (listener, abstract):
            silent.settimeout(0.1)
            with pytest.raises(TimeoutError):
                silent.accept()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_of_output_is_stopped(limits: Limits, stream: str) -> None:
    found = run(f"import sys\nwhile True: sys.{stream}.write('x' * 65536)", limits=limits)
    assert found == Outcome("killed", "wrote more than 1,048,576 bytes")


def test_two_at_a_time_do_not_share_their_limits(limits: Limits) -> None:
    started = "import threading, time\nfor _ in range(5): threading.Thread(target=time.sleep, args=(1,)).start()"
    found: list[Outcome] = []
    runs = [threading.Thread(target=lambda: found.append(run(started, limits=limits))) for _ in range(3)]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    assert found == [Outcome("passed")] * 3


def test_a_dying_parent_takes_the_sandbox_along(limits: Limits) -> None:
    code = (
        "import sys, json\nfrom layerskip.evaluate.sandbox import run\n"
        "from layerskip.evaluate.bubblewrap import Limits\n"
        "run('import time; time.sleep(600)', limits=Limits(**json.loads(sys.argv[1])))"
    )
    asked = json.dumps({**vars(limits), "seconds": 500})
    parent = subprocess.Popen([sys.executable, "-c", code, asked])
    try:
        assert soon(lambda: len(processes(limits)) >= 3, seconds=60)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert soon(lambda: not processes(limits), seconds=20)
    finally:
        parent.kill()
        parent.wait()


def soon(condition: object, *, seconds: float) -> bool:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(done)


# --- where there is no such isolation


@pytest.fixture
def _forgotten() -> Iterator[None]:
    sandbox.check.cache_clear()
    yield
    sandbox.check.cache_clear()


@pytest.mark.usefixtures("_forgotten")
def test_without_bwrap_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError, match=r"^code written by a model .* there is no bwrap on this machine; install"):
        run("pass")


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo bwrap: No permissions to create a new namespace >&2; exit 1", "bwrap: No permissions to create"),
        ("exit 0", "it did not start"),
        # no isolation at all: the program would run as this user
        ('while [ "$1" != -S ]; do last=$1; shift; done; exec "$last" "$@"', "AssertionError: |.*Permission denied"),
    ],
)
def test_where_bwrap_cannot_isolate_nothing_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, reason: str
) -> None:
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bwrap").chmod(0o755)
    if os.geteuid() == 0:  # who runs it as another user
        for folder in [tmp_path, *tmp_path.parents][:-2]:
            folder.chmod(folder.stat().st_mode | 0o055)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RequestError, match=f"^code written by a model is only run in a sandbox, .* here: ({reason})"):
        run("open('/tmp/layerskip-was-here', 'w')")
    assert not Path("/tmp/layerskip-was-here").exists()


# --- HumanEval


def solved(indices: slice) -> list[tuple[str, Outcome]]:
    if not HUMANEVAL.is_file():
        pytest.skip(f"needs HumanEval, and there is no {HUMANEVAL}")
    items = humaneval(HUMANEVAL).items[indices]
    found = [(item.prompt, run(item.answer.program(item.shown))) for item in items]
    return [(prompt, outcome) for prompt, outcome in found if not outcome.passed]


def test_canonical_solutions_pass() -> None:
    assert solved(slice(0, None, 21)) == []


@pytest.mark.slow
def test_all_canonical_solutions_pass() -> None:
    assert solved(slice(None)) == []


def test_other_solutions_fail() -> None:
    if not HUMANEVAL.is_file():
        pytest.skip(f"needs HumanEval, and there is no {HUMANEVAL}")
    task = humaneval(HUMANEVAL)
    assert len(task.items) == 164
    assert task.scorer is not None
    for text in ("    return None\n", "    pass", "", "    import sys\n    sys.exit(0)\n", "\nimport os; os._exit(0)"):
        assert task.scorer(text, task.items[0].answer) == {"pass@1": 0.0}
    assert task.scorer(task.items[0].shown or "", task.items[0].answer) == {"pass@1": 1.0}
