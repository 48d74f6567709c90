"""An engine in a process of its own, asked line by line: threads, allocators and memory of engines do not mix.

`Worker` is the parent's side. Run as a program, this file is the other side: it reads one JSON object a line from
standard input, does what it says and writes one back. What the engine itself prints goes to the log, as does the
traceback of a failure, which ends the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import Draft, PeerRun, peer

ROOT = Path(__file__).resolve().parents[1]


class PeerFailed(Exception):
    """An engine that ended instead of answering; says the last line it wrote."""


class Worker:
    """A running process.

    Args:
        name: of the engine, one of `peers.PEERS`.
        threads: that it may use.
        log: file for what it prints.
    """

    def __init__(self, name: str, *, threads: int, log: Path) -> None:
        self.name, self._log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as printed:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", name],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
            )

    def ask(self, verb: str, **given: Any) -> Any:
        """What the other side answers. Raises PeerFailed where it ends instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it ended before it was asked: there is no answer
            self._process.stdin.write(json.dumps({"verb": verb, **given}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailed(self._last_words())
        return json.loads(line)

    def run(self, prompt: list[int], *, new_tokens: int, draft: Draft | None) -> PeerRun:
        """Continues a prompt. Raises PeerFailed where it ends, or gives another number of tokens."""
        given = None if draft is None else asdict(draft)
        run = PeerRun(**self.ask("run", prompt=prompt, new_tokens=new_tokens, draft=given))
        if len(run.tokens) != new_tokens:
            raise PeerFailed(f"{self.name} gave {len(run.tokens)} of {new_tokens} tokens")
        return run

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it had ended, and what it was asked then is still to be written
            self._process.stdin.close()
        self._process.wait()

    def _last_words(self) -> str:
        status = self._process.wait()
        lines = [line.strip() for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines()]
        last = next((line for line in reversed(lines) if line), f"it ended with status {status}")
        return f"{last} (see {self._log})"


def serve(name: str) -> None:
    """Answers until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what engines print to standard output is no answer
    engine = peer(name)
    for line in sys.stdin:
        asked = json.loads(line)
        verb = asked.pop("verb")
        found: Any = None
        if verb == "prepare":
            found = engine.prepare(Path(asked["folder"]), dtype=asked["dtype"], work=Path(asked["work"]))
        elif verb == "load":
            began = time.perf_counter()
            engine.load(Path(asked["folder"]), dtype=asked["dtype"], threads=asked["threads"], work=Path(asked["work"]))
            found = time.perf_counter() - began
        elif verb == "drafts":
            found = [asdict(draft) for draft in engine.drafts(exit=asked["exit"], tokens=asked["tokens"])]
        elif verb == "run":
            draft = None if asked["draft"] is None else Draft(**asked["draft"])
            found = asdict(engine.run(asked["prompt"], new_tokens=asked["new_tokens"], draft=draft))
        else:
            assert verb == "memory", verb
            found = memory()
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def memory() -> dict[str, int | None]:
    """Bytes of this process in memory, now and at most so far; the latter as Linux tells it, elsewhere None."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        status = ""
    peaks = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
    return {"now": int(psutil.Process().memory_info().rss), "peak": peaks[0] if peaks else None}


if __name__ == "__main__":
    serve(sys.argv[1])
