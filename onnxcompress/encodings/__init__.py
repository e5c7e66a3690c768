"""How one weight is stored, run and trained. A new encoding is one file here and one line in `recognize.py`."""

from onnxcompress.encodings.affine import Affine
from onnxcompress.encodings.base import Encoding, Tape
from onnxcompress.encodings.codebook import Codebook
from onnxcompress.encodings.dense import Dense, Masked
from onnxcompress.encodings.sparse import Sparse

__all__ = ["Affine", "Codebook", "Dense", "Encoding", "Masked", "Sparse", "Tape"]
