"""Data for training: files and data sets in, token batches out.

    read(Source(...)) -> hold_out -> encode -> pack or cut_stream -> LengthBuckets -> Packed or Padded

Importing it loads torch and tokenizers; `datasets` only where a data set is read.
"""

from layerskip.train.data.augment import recombined, renamed
from layerskip.train.data.encoding import IGNORE, Encoded, Limits, Row, Rows, encode
from layerskip.train.data.examples import Chat, Document, Example, Pair, Turn, digest, hold_out
from layerskip.train.data.order import LengthBuckets, permutation
from layerskip.train.data.packing import Batch, Packed, Padded, StreamedRows, block_diagonal, cut_stream, pack
from layerskip.train.data.sources import Reading, Source, find_files, iterate, read
from layerskip.train.data.tokenizers import train_tokenizer
from layerskip.train.data.topv2 import topv2_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "Chat",
    "Document",
    "Encoded",
    "Example",
    "LengthBuckets",
    "Limits",
    "Packed",
    "Padded",
    "Pair",
    "Reading",
    "Row",
    "Rows",
    "Source",
    "StreamedRows",
    "Turn",
    "block_diagonal",
    "cut_stream",
    "digest",
    "encode",
    "find_files",
    "hold_out",
    "iterate",
    "pack",
    "permutation",
    "read",
    "recombined",
    "renamed",
    "topv2_tokenizer",
    "train_tokenizer",
]
