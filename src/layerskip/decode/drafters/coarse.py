"""Draft heads of 8 bits, one for every decoder that a drafter drafts for. Exact: only proposals depend on them."""

from __future__ import annotations

import threading
import weakref

from layerskip.decode.draft import Rows
from layerskip.errors import RequestError
from layerskip.model.decoder import Decoder
from layerskip.model.narrow import CoarseHead


class Coarse:
    """Heads of 8 bits, made when they are first needed. One may serve several batches and threads."""

    def __init__(self) -> None:
        self._heads: weakref.WeakKeyDictionary[Decoder, CoarseHead] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def check(self, decoder: Decoder) -> None:
        """Raises RequestError where the kernels have no head to quantise."""
        if decoder.layout != "native":
            raise RequestError(
                f"a draft head of 8 bits is made from native weights, and these are {decoder.layout}; leave it out"
            )

    def head(self, rows: Rows) -> CoarseHead:
        """The head for a round of these rows."""
        with self._lock:
            found = self._heads.get(rows.decoder)
            if found is None:
                found = self._heads[rows.decoder] = CoarseHead(rows.decoder)
            return found

    def leave(self, key: int) -> None:
        """It keeps nothing of a row."""
