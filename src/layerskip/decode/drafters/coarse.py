"""Draft heads of 8 bits, one for every decoder. Exact: only proposals depend on them."""

from __future__ import annotations

import threading
import weakref

from layerskip.decode.draft import Rows
from layerskip.errors import RequestError
from layerskip.model.decoder import Decoder
from layerskip.model.narrow import CoarseHead

_made: weakref.WeakKeyDictionary[Decoder, CoarseHead] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def has_coarse(decoder: Decoder) -> bool:
    """Whether the kernels have a head to quantise."""
    return decoder.layout == "native"


class Coarse:
    """Heads of 8 bits, made when they are first needed and kept as long as their decoder: a drafter that words name is
    made anew for every call, and quantising takes longer than many rounds. May serve several batches and threads."""

    def check(self, decoder: Decoder) -> None:
        """Raises RequestError where the kernels have no head to quantise."""
        if not has_coarse(decoder):
            raise RequestError(
                f"a draft head of 8 bits is made from native weights, and these are {decoder.layout}; leave it out"
            )

    def head(self, rows: Rows) -> CoarseHead:
        """The head for a round of these rows."""
        with _lock:
            found = _made.get(rows.decoder)
            if found is None:
                found = _made[rows.decoder] = CoarseHead(rows.decoder)
            return found

    def leave(self, key: int) -> None:
        """It keeps nothing of a row."""
