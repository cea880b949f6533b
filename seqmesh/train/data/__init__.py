"""Text to training batches: source -> documents -> packed sequences -> the micro-batches of each rank.

    source      text files, JSON lines, parquet, a `datasets` folder                  sources.py, rows.py
    documents   tokens that lie on disk and are read when a rank needs them           text_files.py,
                                                                                      token_folder.py
    sequences   the documents' tokens end to end, by seed and epoch, cut every        packing.py
                `seq_len`
    ranks       a step's sequences, dealt so that no data-parallel rank waits long    ../evening.py

       document A        B    C                    D
    |a a a a a a a a $|b b $|c c c c c c c c c c c $|d ...        $ = end of document
    |-- sequence 0 --------|-- sequence 1 ---------|-- ...        C is cut: its rest is a document of its own

All ranks know how long every document is, and so what every rank computes; only the ranks that compute with a
document read it. Nothing but lengths and their order is held in memory.

Tokens are bytes (tokens.py), or those of a Hugging Face tokenizer (tokenizer.py).
"""

from seqmesh.train.data.corpus import Contents, Corpus, Document, Piece
from seqmesh.train.data.packing import Epoch, area_of, assemble, check_enough, lengths_of, sequences
from seqmesh.train.data.sources import read
from seqmesh.train.data.text_files import STDLIB
from seqmesh.train.data.tokenizer import Tokenizer, copy_in, tokenizer_of
from seqmesh.train.data.tokens import (
    BYTE_OFFSET,
    BYTES,
    EOS_ID,
    VOCAB_SIZE,
    TokenIds,
    decode,
    encode,
)

__all__ = [
    "BYTES",
    "BYTE_OFFSET",
    "EOS_ID",
    "STDLIB",
    "VOCAB_SIZE",
    "Contents",
    "Corpus",
    "Document",
    "Epoch",
    "Piece",
    "TokenIds",
    "Tokenizer",
    "area_of",
    "assemble",
    "check_enough",
    "copy_in",
    "decode",
    "encode",
    "lengths_of",
    "read",
    "sequences",
    "tokenizer_of",
]
