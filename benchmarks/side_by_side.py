"""This package beside other engines, on the same checkpoints, prompts and tokens.

    python -m benchmarks.side_by_side 15m 110m --dtype bfloat16

A checkpoint is one of the sizes of `agreement`, which is made where it is missing; "shipped", the model of the package;
or a folder. Each engine runs in a process of its own; they take turns, and a speedup is a ratio within one round. Texts
go on past their end, so all engines generate the same number of tokens. An engine that is not installed or cannot load
the checkpoint is skipped by name. A run that was stopped goes on after its last whole round.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.agreement import RECORD, Wanted, make
from benchmarks.contest import Contest, Way, start
from benchmarks.figures import summary, versions
from benchmarks.peers import FLOATS, OWN, PEERS, QUANTISED, Draft
from benchmarks.questions import Question, questions
from benchmarks.table import write_table
from benchmarks.weights import SIZES
from benchmarks.worker import PeerFailed
from layerskip import environment
from layerskip.errors import LayerSkipError, RequestError
from layerskip.evaluate.bandwidth import measure_bandwidth
from layerskip.evaluate.record import digest, read, write
from layerskip.llm.recommended import recommended
from layerskip.model.checkpoint import read_config
from layerskip.model.shape import Shape
from layerskip.pretrained import embedded

SHIPPED = "shipped"
QUANTISED_BYTES = 1 + 2 / 32  # of a weight, with its share of a scale
_ENDS = 1 << 20  # bytes of a file that are looked at, at either end
UTTERANCES = Path(__file__).parent / "utterances.txt"


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is measured.

    Args:
        dtype: element type of all engines' weights, which they compute in if it is not int8.
        threads: of each engine.
        pairs: rounds.
        prompts: of a round, each once by every way.
        new_tokens: for each prompt, at most.
        exit: E of other engines' self-speculation, and where our own drafts begin to choose.
        draft_tokens: K to try; each engine goes on with its fastest.
        peers: engines to ask for.
        until_end: fewer new tokens where a text ends.
    """

    dtype: str
    threads: int
    pairs: int
    prompts: int
    new_tokens: int
    exit: int
    draft_tokens: tuple[int, ...]
    peers: tuple[str, ...]
    until_end: bool

    def record(self) -> dict[str, Any]:
        """The same as JSON gives it back."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


def compare(
    name: str,
    folder: Path,
    settings: Settings,
    *,
    file: Path | None,
    output: Path,
    work: Path,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Measures a checkpoint, or goes on where that was left.

    Args:
        name: what reports call the checkpoint.
        folder: that holds it.
        settings: how it is measured.
        file: with prompts; None is the checkpoint's own.
        output: folder of the record, side-by-side-NAME-DTYPE.json.
        work: folder for logs, and for what engines read instead of the checkpoint.
        say: takes lines about what is going on.

    Returns:
        The record.

    Raises:
        RequestError: prompts are missing, or the record there has other settings, or was begun with other versions.
        PeerFailed: our own engine fails.
    """
    path = output / f"side-by-side-{name}-{settings.dtype}.json"
    record: dict[str, Any] = read(path) if path.is_file() else {}
    asked = questions(
        folder, file=file, count=settings.prompts, new_tokens=settings.new_tokens, until_end=settings.until_end
    )
    beginning = head(name, folder, settings) | {"digests": digests(folder, asked)}
    for key in ("settings", "model", "controlled", "digests"):
        if record and record.get(key, beginning[key]) != beginning[key]:  # older records have no digests
            raise RequestError(f"{path} was measured with other {key}; move it away, or choose another --output")
    if record and len(record["rounds"]) >= settings.pairs:
        say(f"{path} is complete")
        return record
    if record and any(record[key] != beginning[key] for key in ("commit", "versions", "machine")):
        raise RequestError(f"{path} was begun with another commit, versions or machine; move it away to begin anew")
    work.mkdir(parents=True, exist_ok=True)
    # engines that were left out of the first rounds stay out: every ratio is of whole rounds
    names = [peer for peer in settings.peers if peer not in record.get("skipped", {})]
    workers, skipped, loaded = start(names, folder, dtype=settings.dtype, threads=settings.threads, work=work, say=say)
    contest = Contest(workers, asked, record.get("skipped", {}) | skipped)
    try:
        if not record:
            record = beginning | {"loaded": loaded, "rounds": []}
            record["questions"] = [{"prompt": len(one.prompt), "new": one.new_tokens} for one in asked]
            record["trials"] = contest.trials(exit=settings.exit, draft_tokens=settings.draft_tokens)
        ways = ways_of(settings.peers, record["trials"], exit=settings.exit)
        contest.warm(ways)
        while len(record["rounds"]) < settings.pairs:
            number = len(record["rounds"])
            found: dict[str, Any] = {"ways": contest.round(ways, number=number)}
            found["bandwidth"] = measure_bandwidth().bytes_per_second  # here: its buffer is no engine's memory
            record["rounds"].append(found)
            record["skipped"] = contest.skipped
            for peer, worker in contest.workers.items():
                record["loaded"][peer]["memory"]["end"] = worker.ask("memory")
            record |= summary(record, ways)
            write(path, record)
            say(f"{name} {settings.dtype}: round {number + 1} of {settings.pairs}")
    finally:
        contest.close()
    return record


def ways_of(peers: tuple[str, ...], trials: dict[str, Any], *, exit: int) -> list[Way]:
    """Each engine plainly, and with its fastest draft; our own first, also choosing drafts itself, from `exit` on."""
    ways: list[Way] = []
    for peer in peers:
        ways.append(Way(peer))
        if peer in trials:
            fastest = Draft(**trials[peer][0]["draft"])
            ways += [Way(peer, fastest), *([Way(peer, replace(fastest, exit=exit, auto=True))] if peer == OWN else [])]
    return ways


def head(name: str, folder: Path, settings: Settings) -> dict[str, Any]:
    """What the record begins with."""
    shape = Shape.from_config(read_config(folder))
    parts = shape.parameters()
    made = folder / RECORD
    return {
        "kind": "side-by-side",
        "command": shlex.join(["python", "-m", "benchmarks.side_by_side", *sys.argv[1:]]),
        "commit": environment.revision(),
        "versions": versions(settings.peers),
        "machine": environment.machine(),
        "model": {
            "name": name,
            "parameters": parts["total"],
            "layers": shape.layers,
            "width": shape.width,
            "vocabulary": shape.vocab,
            "context": shape.context,
            "dtype": settings.dtype,
            # an embedding is looked up, a tied one is read as the head
            "step_bytes": (parts["total"] - (0 if shape.tied else parts["embedding"]))
            * (QUANTISED_BYTES if settings.dtype == QUANTISED else getattr(torch, settings.dtype).itemsize),
        },
        "controlled": json.loads(made.read_text(encoding="utf-8")) if made.is_file() else None,
        "settings": settings.record(),
    }


def digests(folder: Path, asked: Sequence[Question]) -> dict[str, str]:
    """What tells other weights and other prompts of one name apart: the ends of the files, and all ids."""
    weights = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            begin = file.read(_ENDS)
            file.seek(max(path.stat().st_size - _ENDS, 0))
            weights.append((path.name, path.stat().st_size, begin, file.read()))
    return {"weights": digest(weights), "prompts": digest((one.prompt, one.new_tokens) for one in asked)}


def checkpoint(name: str, checkpoints: Path) -> tuple[str, Path, Path | None]:
    """What a word of the command line means: what reports call it, its folder, and a file of prompts if not its own."""
    if name == SHIPPED:
        return name, embedded(), UTTERANCES
    if name in SIZES:
        folder = checkpoints / name
        make(folder, Wanted(name))
        return name, folder, None
    folder = Path(name)
    if not folder.is_dir():
        raise RequestError(f"{name} is no folder and no size; use {', '.join(SIZES)}, {SHIPPED} or a folder")
    return folder.resolve().name, folder, None


def exit_of(folder: Path) -> int:
    """The exit that a checkpoint recommends. Raises RequestError where it recommends none."""
    found = recommended(folder)
    if found is None:
        raise RequestError(f"{folder} recommends no exit; give --exit")
    return found.exit


def main() -> None:
    """Measures what the command line names, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help=f"{', '.join(SIZES)}, {SHIPPED} or a folder")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=[*FLOATS, QUANTISED])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--items", type=int, default=4, help="prompts of a round")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--exit", type=int, help="E; what the checkpoint recommends if left out")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 3, 4, 6], help="K to try")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--prompts", type=Path, help="file with one prompt a line instead of the checkpoint's own")
    parser.add_argument("--until-end", action="store_true", help="stop where plain decoding ends the text")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", type=Path, default=Path("runs"), help="for checkpoints, logs and engines' own files")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    try:
        for word in asked.checkpoints:
            name, folder, file = checkpoint(word, asked.work / "checkpoints")
            for dtype in asked.dtype:
                settings = Settings(
                    dtype=dtype,
                    threads=asked.threads,
                    pairs=asked.pairs,
                    prompts=asked.items,
                    new_tokens=asked.new_tokens,
                    exit=asked.exit or exit_of(folder),
                    draft_tokens=tuple(asked.draft_tokens),
                    peers=tuple(dict.fromkeys((OWN, *asked.peers))),
                    until_end=asked.until_end or name == SHIPPED,
                )
                work = asked.work / "side-by-side" / name
                compare(name, folder, settings, file=asked.prompts or file, output=asked.output, work=work)
        print(f"wrote {write_table(asked.output)}")
    except (LayerSkipError, PeerFailed) as error:
        parser.exit(2 if isinstance(error, RequestError) else 1, f"{error}\n")


if __name__ == "__main__":
    main()
