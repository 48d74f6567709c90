"""The checkpoints that come with the package: one folder each, with its model card, licence and provenance.

Knows where they lie; what they are is in the folders.
"""

from __future__ import annotations

from pathlib import Path

DEFAULT = "topv2-parser"
"""What is used where no model is named: a parser of utterances, such as "set an alarm for 7 am"."""


def embedded(name: str = DEFAULT) -> Path:
    """The folder of a checkpoint of the package."""
    return Path(__file__).parent / name
