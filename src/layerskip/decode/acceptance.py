"""How well drafting went: counts over rounds.

The definitions, once for code, reports and docs:

- *round*: one draft and one verification. A step of plain decoding is a round that drafted nothing.
- *drafted*: proposed tokens; in a tree every node. *accepted*: those that the verification kept; in a tree the
  length of the path.
- *rate* = accepted / drafted; 0.0 when nothing was drafted.
- *length* = 1 + accepted / rounds: the tokens that a verification yields on average; 0.0 before the first round.
- *emitted*: the tokens that became output. In the last round of a row it can be less than 1 + accepted (`max_tokens`,
  end of sequence, a stop string cut it), so emitted / rounds is at most *length*.
- *position*: the place in the draft from 0; in a tree the depth, from 0 at the nodes below the root.

Speed is not here: a speedup is only ever against plain decoding measured in the same process.

Knows integers and seconds that are already on the host. Does not know tensors, rows, drafters or clocks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest


@dataclass(kw_only=True)
class Acceptance:
    """Counts over rounds, for one row or for many.

    Args:
        rounds: rounds counted.
        drafted: tokens drafted.
        accepted: drafted tokens accepted.
        emitted: tokens that became output.
        drafted_at: drafted tokens by position.
        accepted_at: accepted tokens by position.
        by_length: how many rounds accepted exactly so many tokens.
        draft_seconds: time spent drafting; who runs the rounds adds to it, as to the next two.
        verify_seconds: time spent verifying.
        rest_seconds: time spent on everything else.

    Example:
        >>> counts = Acceptance()
        >>> counts.add(drafted=4, accepted=4, emitted=5)
        >>> counts.add(drafted=4, accepted=1, emitted=2)
        >>> counts.rate, counts.length, counts.accepted_at, counts.by_length
        (0.625, 3.5, [2, 1, 1, 1], {4: 1, 1: 1})
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    by_length: dict[int, int] = field(default_factory=dict)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    rest_seconds: float = 0.0

    def add(self, *, drafted: int, accepted: int, emitted: int, drafted_depths: Iterable[int] | None = None) -> None:
        """Counts one round of one row.

        Args:
            drafted: tokens in the draft.
            accepted: how many of them were accepted.
            emitted: tokens that became output, at most 1 + accepted.
            drafted_depths: for a tree, the depth of each node, from 0; a chain when None.

        Example:
            >>> counts = Acceptance()
            >>> counts.add(drafted=3, accepted=2, emitted=3, drafted_depths=[0, 0, 1])
            >>> counts.drafted_at, counts.accepted_at
            ([2, 1], [1, 1])
        """
        assert 0 <= accepted <= drafted, (accepted, drafted)
        assert 0 <= emitted <= accepted + 1, (emitted, accepted)
        depths = list(range(drafted) if drafted_depths is None else drafted_depths)
        assert len(depths) == drafted, (depths, drafted)
        assert accepted <= max(depths, default=-1) + 1, (accepted, depths)
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.emitted += emitted
        _count(self.drafted_at, depths)
        # As long as drafted_at, so that the two can be divided position by position.
        _count(self.accepted_at, range(accepted), length=len(self.drafted_at))
        self.by_length[accepted] = self.by_length.get(accepted, 0) + 1

    def merge(self, other: "Acceptance") -> None:
        """Adds the counts and seconds of another one to this one.

        Args:
            other: stays as it is.
        """
        self.rounds += other.rounds
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.emitted += other.emitted
        self.drafted_at = _sums(self.drafted_at, other.drafted_at)
        self.accepted_at = _sums(self.accepted_at, other.accepted_at)
        self.by_length = {
            size: self.by_length.get(size, 0) + other.by_length.get(size, 0)
            for size in sorted(self.by_length.keys() | other.by_length.keys())
        }
        self.draft_seconds += other.draft_seconds
        self.verify_seconds += other.verify_seconds
        self.rest_seconds += other.rest_seconds

    def __add__(self, other: "Acceptance") -> "Acceptance":
        total = Acceptance()
        total.merge(self)
        total.merge(other)
        return total

    @property
    def rate(self) -> float:
        """accepted / drafted; 0.0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def length(self) -> float:
        """1 + accepted / rounds; 0.0 before the first round. Not lowered by a last round that was cut short."""
        return 1 + self.accepted / self.rounds if self.rounds else 0.0

    def as_dict(self) -> dict[str, object]:
        """The counts under the names that serving metrics use, ready for JSON.

        Returns:
            Numbers, lists by position, and the histogram with the accepted counts as strings, as JSON needs keys.

        Example:
            >>> counts = Acceptance()
            >>> counts.add(drafted=2, accepted=1, emitted=2)
            >>> counts.as_dict()["mean_acceptance_length"], counts.as_dict()["acceptance_histogram"]
            (2.0, {'1': 1})
        """
        return {
            "mean_acceptance_length": self.length,
            "draft_acceptance_rate": self.rate,
            "acceptance_histogram": {str(size): self.by_length[size] for size in sorted(self.by_length)},
            "num_spec_steps": self.rounds,
            "num_accepted_draft_tokens": self.accepted,
            "num_draft_tokens": self.drafted,
            "num_emitted_tokens": self.emitted,
            "accepted_by_position": list(self.accepted_at),
            "drafted_by_position": list(self.drafted_at),
            "seconds": {"draft": self.draft_seconds, "verify": self.verify_seconds, "rest": self.rest_seconds},
        }


def _count(counts: list[int], positions: Iterable[int], *, length: int = 0) -> None:
    counts.extend([0] * (length - len(counts)))
    for position in positions:
        counts.extend([0] * (position + 1 - len(counts)))
        counts[position] += 1


def _sums(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(one, other, fillvalue=0)]
