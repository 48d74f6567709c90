"""Which draft is fastest here: acceptance of every exit, times the cost of a round, checked by measuring.

    Tuning(llm, prompts, grid, settings=Settings(1, 64), repeat=5, measure=5).run() -> a record

Knows acceptance, costs and measurements. Does not know files but the record's own, nor how results look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layerskip.decode.drafters import EarlyExit
from layerskip.decode.drafters.coarse import has_coarse
from layerskip.errors import RequestError
from layerskip.evaluate import record, shortlists
from layerskip.evaluate.acceptance import Continuation, continuations, count
from layerskip.evaluate.bench import Ours, cells
from layerskip.evaluate.cell import Cell, Measured
from layerskip.evaluate.contest import PLAIN, Contest, Settings, Step, at_least_one
from layerskip.evaluate.cost import Costs, measure_costs
from layerskip.evaluate.drafts import Draft, Grid, Prediction, Setting, choose, draft, predict, side_by_side
from layerskip.evaluate.shortlists import Gained, gained
from layerskip.evaluate.verdict import Checked, checked, fastest, reason
from layerskip.evaluate.ways import Way
from layerskip.llm import LLM

FILE = "tune.json"
"""Its name in the folder of results."""

UNFINISHED = "tune.unfinished"
"""The name of what is kept there until all is measured."""

OTHER = {
    "kind": "another kind of record",
    "commit": "another state of the code",
    "versions": "other versions",
    "machine": "another machine or number of threads",
    "model": "another model",
    "settings": "other settings, prompts or weights",
}
"""What a run must have in common with the one it goes on with, and what it is called where it has not."""


Repeat = dict[str, dict[str, Any]]
"""Runs by name, as JSON has them."""


@dataclass
class Parts:
    """What is finished, as JSON has it.

    Args:
        looked: acceptance.
        costs: of a round.
        repeats: of what is measured.
        narrow: repeats of the best setting with other draft heads.
    """

    looked: dict[str, Any] | None = None
    costs: dict[str, Any] | None = None
    repeats: list[Repeat] = field(default_factory=list)
    narrow: list[Repeat] = field(default_factory=list)


class Tuning:
    """A search for the fastest draft, finished or not.

    Args:
        llm: the model.
        prompts: ids, as many as rows decode side by side or more.
        grid: what is tried.
        settings: rows side by side, and how a text ends.
        repeat: runs of each setting that is measured.
        measure: how many are measured.
        vocabulary: sizes of a draft vocabulary that are tried with the best setting; None is a few that fit, where the
            head is heavy. There a head of 8 bits is tried as well, if weights are native and this is not empty.
        ranked: tokens by frequency, for them.
        source: where the prompts come from.
        folder: keeps the record after every part; None keeps it nowhere.
        tell: called with what begins.
        see: called before each run that is measured.

    Raises:
        RequestError: what cannot be tuned, or a record of another run in the folder.
    """

    def __init__(
        self,
        llm: LLM,
        prompts: Sequence[Sequence[int]],
        grid: Grid,
        *,
        settings: Settings,
        repeat: int,
        measure: int,
        vocabulary: Sequence[int] | None = None,
        ranked: Sequence[int] = (),
        source: str = "given",
        folder: Path | None = None,
        tell: Callable[[str], None] = lambda text: None,
        see: Callable[[Step], None] | None = None,
    ) -> None:
        grid.check(llm, max_tokens=settings.max_tokens)
        self.llm, self.prompts, self.grid, self.settings = llm, prompts, grid, settings
        self.repeat, self.measure = at_least_one("repeat", repeat), at_least_one("measure", measure)
        self.vocabulary, self.ranked = vocabulary, ranked
        for size in vocabulary or ():
            EarlyExit(1, vocabulary=size, ranked=ranked).check(llm.decoder, exit=llm.decoder.shape.layers)
        self._tell, self._see, self._folder = tell, see, folder
        self.head = {**record.about("tune", llm), "settings": self._settings(source)}
        Contest([Ours(llm, Way(PLAIN, None))], prompts, settings=settings, device=llm.decoder.device)  # refuses at once
        self.parts = Parts()
        self.finished = None if folder is None else self._earlier(folder)

    def run(self) -> dict[str, Any]:
        """Does what is left to do, and returns the record.

        Raises:
            CapacityError: so many rows do not fit in memory side by side.
            NumericalError: the model's logits are not finite.
            StorageError: the folder cannot be written.
            KeyboardInterrupt: Ctrl-C; finished parts stay kept.
        """
        if self.finished is not None:
            return self.finished
        self._keep()
        drafts, exits, plain = self._look()
        costs = self._cost()
        predictions = [Prediction(d.setting, d.tokens_per_round, predict(d, costs, plain=plain)) for d in drafts]
        chosen = choose(predictions, self.measure)
        measured = self._measure(chosen)
        best = fastest(measured)
        narrow = [] if best is None else self._narrow(best.prediction.setting)
        whole = {
            **self.head,
            "exits": exits,
            "costs": costs.record(),
            "predicted": [each.record() for each in predictions],
            "measured": [each.record() for each in measured],
            "narrow": [each.record() for each in narrow],
            "recommended": shortlists.recommended(best, shortlists.best(narrow)),
            "reason": reason(measured, {e["exit"]: e["agreement"] for e in exits}, costs, self.llm.decoder.shape)
            + shortlists.remark(narrow),
        }
        if self._folder is not None:
            record.write(self._folder / FILE, whole)
            (self._folder / UNFINISHED).unlink()
        return whole

    # -- parts

    def _look(self) -> tuple[list[Draft], list[dict[str, Any]], int]:
        """Every setting's rounds, what each exit is worth, and the rounds of plain decoding."""
        if self.parts.looked is None:
            grid, batch = self.grid, self.settings.batch
            self._tell(f"acceptance: {len(self.prompts)} texts at {len(grid.exits)} exits")
            most = max(grid.draft_tokens)
            texts = continuations(
                self.llm,
                self.prompts,
                exits=grid.exits,
                max_tokens=self.settings.max_tokens,
                stop=self.settings.stop,
                beyond=most - 1 if grid.confidences else 0,
            )
            plain = side_by_side([[0] * len(t.guesses[grid.exits[0]].right) for t in texts], batch=batch)
            self.parts.looked = {
                "plain": plain[0],
                "exits": [_exit(texts, exit, most) for exit in grid.exits],
                "drafts": [asdict(draft(texts, setting, batch=batch)) for setting in grid.settings()],
            }
            self._keep()
        looked = self.parts.looked
        drafts = [
            Draft(Setting(**d["setting"]), d["tokens_per_round"], {int(k): n for k, n in d["widths"].items()})
            for d in looked["drafts"]
        ]
        return drafts, looked["exits"], looked["plain"]

    def _cost(self) -> Costs:
        if self.parts.costs is None:
            self._tell("costs: rounds of a few settings, in turns")
            self.parts.costs = measure_costs(
                self.llm,
                self.prompts,
                exits=self.grid.exits,
                draft_tokens=self.grid.draft_tokens,
                confident=bool(self.grid.confidences),
                settings=self.settings,
            ).record()
            self._keep()
        return Costs(**self.parts.costs)

    def _measure(self, chosen: Sequence[Prediction]) -> list[Checked]:
        found = self._repeat([each.setting.way() for each in chosen], self.parts.repeats)
        return [checked(each, found[each.setting.name]) for each in chosen]

    def _narrow(self, setting: Setting) -> list[Gained]:
        """The setting with draft vocabularies and a head of 8 bits, beside itself without."""
        decoder, given = self.llm.decoder, self.vocabulary
        sizes = shortlists.sizes(decoder.shape, exit=setting.exit) if given is None else given
        asked = given is None or bool(given)
        coarse = asked and has_coarse(decoder) and shortlists.heavy(decoder.shape, exit=setting.exit)
        heads = [*sizes, *([None] if coarse else [])]
        tried = shortlists.candidates(setting, heads, draft_tokens=self.grid.draft_tokens)
        if not tried:
            return []
        parts = [f"draft vocabularies of {', '.join(map(str, sizes))} tokens"] if sizes else []
        parts += ["a draft head of 8 bits"] if coarse else []
        self._tell(f"{', '.join(parts)}, with {setting.name}")
        found = self._repeat([setting.way(), *(each.way(self.ranked) for each in tried)], self.parts.narrow)
        return [gained(each, found, without=setting) for each in tried]

    def _repeat(self, ways: Sequence[Way], done: list[Repeat]) -> dict[str, Cell]:
        """Runs ways and plain decoding in turns, as often as is left to do; what they come to, by name."""
        runners = [Ours(self.llm, way) for way in (Way(PLAIN, None), *ways)]
        contest = Contest(runners, self.prompts, settings=self.settings, device=self.llm.decoder.device, see=self._see)
        if len(done) < self.repeat:
            contest.warm_up()
        while len(done) < self.repeat:
            done.append({name: asdict(run) for name, run in contest.repeat(len(done)).items()})
            self._keep()
        repeats = [{name: Measured(**run) for name, run in runs.items()} for runs in done]
        return {cell.name: cell for cell in cells([r.who for r in runners], repeats, batch=self.settings.batch)}

    # -- keeping

    def _settings(self, source: str) -> dict[str, Any]:
        return {
            "prompts": source,
            "items": len(self.prompts),
            "prompt_tokens": sum(map(len, self.prompts)),
            "prompt_digest": record.digest(map(list, self.prompts)),
            "weights_digest": record.weights_digest(self.llm.decoder),
            "batch": self.settings.batch,
            "max_tokens": self.settings.max_tokens,
            "stop": list(self.settings.stop),
            "repeat": self.repeat,
            "measure": self.measure,
            "exits": list(self.grid.exits),
            "draft_tokens": list(self.grid.draft_tokens),
            "confidence": list(self.grid.confidences),
            "draft_vocabulary": None if self.vocabulary is None else list(self.vocabulary),
            "ranked_digest": record.digest(self.ranked),
        }

    def _keep(self) -> None:
        if self._folder is not None:
            record.write(self._folder / UNFINISHED, {**self.head, "parts": asdict(self.parts)})

    def _earlier(self, folder: Path) -> dict[str, Any] | None:
        """A finished record of the same run; the parts of one that is not are taken up."""
        path = next((folder / name for name in (FILE, UNFINISHED) if (folder / name).exists()), None)
        if path is None:
            return None
        earlier = record.read(path)
        for key, other in OTHER.items():
            if earlier.get(key) != self.head[key]:
                raise RequestError(f"{path} has {other}; choose another --output, or delete it to measure anew")
        if path.name == FILE:
            self._tell(f"{path} is finished: nothing is measured; delete it to measure anew")
            return earlier
        self.parts = Parts(**earlier["parts"])
        self._tell(f"{path}: going on with what is measured")
        return None


def _exit(texts: Sequence[Continuation], exit: int, most: int) -> dict[str, Any]:
    """What an exit is worth: how often it agrees with the model along its texts, and how far its drafts get."""
    counts = count(texts, exit=exit, tokens=most)
    pairs = zip(counts.accepted_at, counts.drafted_at, strict=True)
    right = [ok for text in texts for ok in text.guesses[exit].right]
    return {
        "exit": exit,
        "rate_by_position": [accepted / drafted for accepted, drafted in pairs],
        "agreement": sum(right) / len(right),
        "loss": None,
    }
