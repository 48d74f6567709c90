"""How many bytes of weights a round of decoding reads.

Counts what a pass over the layers has to fetch from memory, once for all rows and positions of the pass: the layers of
its span, and where it predicts the final norm and the head, tied or not. Keys and values, and the few rows of the
embedding that are looked up, are left out.

Knows parameters and how drafters pass over them. Knows no clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerskip.decode.drafters import EarlyExit, Lookup
from layerskip.evaluate.ticks import Tick
from layerskip.evaluate.ways import Way
from layerskip.model.decoder import Decoder
from layerskip.model.pack import stored_bytes


@dataclass(frozen=True)
class Weights:
    """Bytes.

    Args:
        layers: of each layer.
        head: of the final norm and the head.
        rows: tokens of the head.
    """

    layers: tuple[int, ...]
    head: int
    rows: int = 1

    @classmethod
    def of(cls, decoder: Decoder) -> Weights:
        """Counts them as they are held."""
        return cls(
            tuple(stored_bytes(layer) for layer in decoder.layers),
            stored_bytes(decoder.head) + stored_bytes(decoder.norm),
            decoder.shape.vocab,
        )

    def round(self, way: Way, *, drafted: int) -> int | None:
        """Bytes that a round reads.

        A verification, like a step of plain decoding, passes over all layers and the head once: after an early exit
        the draft's last pass is the lower part of it. Every drafted token costs a pass over the first E layers and the
        head, or as many rows of it as the draft vocabulary has; a copied one costs none.

        Args:
            way: of decoding.
            drafted: tokens drafted in the row that drafted most.

        Returns:
            None for a drafter whose passes are not known here: a second model, a head of 8 bits, or somebody else's.

        Example:
            Four layers of 10 bytes, a head of 7, two tokens drafted with one layer: 47 + 2 x 17.

            >>> Weights((10, 10, 10, 10), 7).round(Way("early-exit:1 K=2", EarlyExit(1)), drafted=2)
            81
        """
        drafter, whole = way.draft, sum(self.layers[: way.exit]) + self.head
        if drafter is None or type(drafter) is Lookup:
            return whole
        if type(drafter) is EarlyExit and drafter.head == "own":
            rows = self.rows if drafter.vocabulary is None else drafter.vocabulary
            return whole + drafted * (sum(self.layers[: drafter.exit]) + self.head * rows // self.rows)
        return None

    def run(self, way: Way, ticks: Sequence[Tick]) -> int | None:
        """Bytes that all rounds of a run read, prompts left out; None where a round's are not known."""
        total = 0
        for tick in ticks:
            count = None if tick.drafted is None else self.round(way, drafted=tick.drafted)
            if count is None:
                return None
            total += count
        return total
