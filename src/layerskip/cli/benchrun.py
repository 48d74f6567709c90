"""A benchmark from its first repeat to its last: batch sizes, peers, what is kept and gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip.cli.benchtables import Progress
from layerskip.cli.flags import ModelFlags
from layerskip.cli.screen import Screen
from layerskip.decode.drafters import EarlyExit
from layerskip.errors import RequestError
from layerskip.evaluate import peers, record, results
from layerskip.evaluate.bandwidth import measure_bandwidth
from layerskip.evaluate.bench import Ours
from layerskip.evaluate.contest import Contest, Runner, Settings
from layerskip.evaluate.peers import Peer
from layerskip.evaluate.results import Results
from layerskip.evaluate.ways import Way
from layerskip.llm import LLM
from layerskip.model import checkpoint
from layerskip.pretrained import embedded


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Args:
        llm: the model.
        model: how it was asked for: peers load it anew.
        ways: ours, plain decoding among them.
        peer_names: whom else.
        source: where the prompts come from.
        prompts: their ids.
        settings: one for each batch size.
    """

    llm: LLM
    model: ModelFlags
    ways: Sequence[Way]
    peer_names: Sequence[str]
    source: str
    prompts: Sequence[Sequence[int]]
    settings: Sequence[Settings]

    def head(self, repeat: int) -> dict[str, Any]:
        """What a record begins with, its settings included."""
        first = self.settings[0]
        return {
            **record.about("bench", self.llm),
            "settings": {
                "prompts": self.source,
                "items": len(self.prompts),
                "prompt_tokens": sum(map(len, self.prompts)),
                "prompt_digest": record.digest(map(list, self.prompts)),
                "weights_digest": record.weights_digest(self.llm.decoder),
                "batch": [settings.batch for settings in self.settings],
                "repeat": repeat,
                "max_tokens": first.max_tokens,
                "stop": list(first.stop),
                "ignore_eos": first.ignore_eos,
                "ways": [way.name for way in self.ways],
                "ways_digest": record.digest(way.key for way in self.ways),
                "peers": list(dict.fromkeys(self.peer_names)),
            },
        }

    def others(self) -> list[Peer]:
        """The peers, around one more copy of the weights.

        Raises:
            RequestError: nothing of ours exits early, so there is nothing to compare an early exit with.
            CheckpointError: transformers cannot load the checkpoint.
        """
        if not self.peer_names:
            return []
        early = next((way.draft for way in self.ways if isinstance(way.draft, EarlyExit)), None)
        if peers.EARLY_EXIT in self.peer_names and early is None:
            raise RequestError(f"{peers.EARLY_EXIT} takes exit and K of ours; add --draft early-exit:E")
        place = embedded() if self.model.model is None else self.model.model
        engine = peers.Transformers(checkpoint.find(place, revision=self.model.revision), self.llm)
        found = []
        for name in dict.fromkeys(self.peer_names):
            if name == peers.EARLY_EXIT and early is not None:
                found.append(peers.early_exit(engine, exit=early.exit, draft_tokens=early.tokens))
            else:
                found.append(peers.plain(engine))
        return found


def measure(plan: Plan, *, repeat: int, output: Path | None, screen: Screen) -> dict[str, Any]:
    """Measures all that is not measured yet.

    Args:
        plan: what.
        repeat: runs of each way.
        output: folder that keeps the record; None keeps it nowhere.
        screen: who waits for it.

    Returns:
        The finished record.

    Raises:
        RequestError: what cannot be measured, or a record of another run in the folder.
        CapacityError: a batch does not fit in memory; what was measured before stays kept.
        StorageError: the folder cannot be written.
        KeyboardInterrupt: Ctrl-C; what was measured before stays kept.
    """
    head = plan.head(repeat)
    found = None if output is None else results.find(output, head)
    if found is not None and found.finished:
        screen.note(f"{found.path} is finished: nothing is measured; delete it to measure anew")
        return found.record
    others = plan.others()
    progress = Progress(screen, repeat=repeat)
    # all at once: what cannot be measured is refused before hours have passed
    entries = [_enter(plan, others, settings, progress) for settings in plan.settings]
    if found is not None:
        kept = found.results()
        screen.note(f"{found.path}: going on with what is measured")
    else:
        path = None if output is None else output / results.FILE
        kept = Results(head, measure_bandwidth(plan.llm.decoder.device), path)
        kept.keep()
    try:
        with progress:
            for entry in entries:
                for reason in entry.left_out:
                    if kept.note(reason):
                        screen.note(reason)
                entry.measure(kept, repeat=repeat)
    except KeyboardInterrupt:
        if kept.path is not None:
            screen.note(f"{kept.path} holds what is measured; the same command goes on with it")
        raise
    return kept.record()


@dataclass(frozen=True)
class _Entry:
    """A batch size: who takes part, and why others do not."""

    contest: Contest
    left_out: list[str]

    def measure(self, kept: Results, *, repeat: int) -> None:
        """The repeats that are still to come."""
        batch = self.contest.settings.batch
        left = range(kept.repeats(batch), repeat)
        if left:
            self.contest.warm_up()
        for number in left:
            kept.add(batch, self.contest.who, self.contest.repeat(number))


def _enter(plan: Plan, others: Sequence[Peer], settings: Settings, progress: Progress) -> _Entry:
    reasons = {peer.who.name: peer.limitation(plan.prompts, settings) for peer in others}
    runners: list[Runner] = [Ours(plan.llm, way) for way in plan.ways]
    runners += [peer for peer in others if reasons[peer.who.name] is None]
    device = plan.llm.decoder.device
    return _Entry(
        Contest(runners, plan.prompts, settings=settings, device=device, see=progress),
        [f"batch {settings.batch}, without {name}: {why}" for name, why in reasons.items() if why is not None],
    )
