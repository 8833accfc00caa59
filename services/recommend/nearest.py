"""Search in a big item table: a coarse look at every item, an exact one at the best of them.

For the coarse look each number of the table is one of the 16 values that fit its column best, half
a byte, which a core scans by table lookups inside its registers (André et al. 2017, "Accelerated
nearest neighbor search with quick ADC"). The best of that, some hundreds, are then scored exactly:
only which items those are is approximate, and how many it takes is found out whenever a version is
loaded. Of a million items of width 24, learned ones and random ones of their lengths and biases, a
coarse look for 800 takes 1.6 ms, scoring everything 20. Clusters (IVF) took 1.8 ms for a recall of
.986 and 2.8 for .997; with eight bits a number 8.6 for .977.

Importing faiss takes a moment, so it happens when an index is built.

Shapes: V catalog rows (row 0 is no item), D width, S sampled queries, K candidates.
"""

import importlib
import logging
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from services.core.models.sequences import N_GAPS, N_TYPES
from services.core.models.serving import ServingStudent

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]

RECALL: Final = 0.99  # what is promised of the best DEPTH, against exact search
WANTED: Final = 0.995  # what is asked for on queries of the model's own, to keep that for others
DEPTH: Final = 100
QUERIES: Final = 64
NARROW: Final = 1 / 8  # of the catalog: fewer items than this are scored one and all
_MOST: Final = 1 / 8  # of the catalog: with more candidates than this, all might as well be scored
_BITS: Final = 4
_TRAINING_ROWS: Final = 20_000  # to find a column's 16 values
_FEW_EXCLUDED: Final = 1_000  # looked for among the candidates, not kept from becoming some

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Nearest:
    """One version's table for the coarse look: (D + 2) / 2 bytes an item, and 8 of its row."""

    n_candidates: int
    recall: float  # of the best DEPTH, as measured when it was built
    _index: Any

    @classmethod
    def build(cls, student: ServingStudent, popularity_V: Floats) -> Self | None:
        """None where a coarse look doesn't help: too many items would be left to be scored."""
        faiss = _faiss()
        faiss.omp_set_num_threads(1)  # of this thread: others are answering
        vectors = _vectors(student)
        queries = _queries(student, popularity_V)
        depth = min(DEPTH, len(vectors))
        exact = 1 + faiss.knn(queries, vectors, depth, metric=faiss.METRIC_INNER_PRODUCT)[1]
        index = _scannable(faiss, vectors)
        n_candidates, recall = depth, 0.0
        while recall < WANTED:
            n_candidates += n_candidates // 2
            if n_candidates > len(vectors) * _MOST:
                log.warning("a coarse look doesn't help with %d items", len(vectors))
                return None
            found = index.search(queries, n_candidates)[1]
            hits = sum(map(len, map(np.intersect1d, exact, found)))
            recall = hits / exact.size
        return cls(n_candidates, recall, index)

    def candidates(self, h_D: Floats, *, excluded: Rows, among: Rows | None) -> Rows:
        """The rows (K,) to be scored, ascending, some of the `excluded` perhaps among them.

        `among`: only these, if not None. The search itself leaves out what doesn't pass.
        """
        query = np.append(h_D, np.ones(2, np.float32))[None]
        if among is None and len(excluded) <= _FEW_EXCLUDED:
            rows = self._index.search(query, self.n_candidates + len(excluded))[1][0]
        else:
            faiss = _faiss()
            passes = np.full(1 + self._index.ntotal, among is None)
            if among is not None:
                passes[among] = True
            passes[excluded] = False
            bits = np.packbits(passes, bitorder="little")
            how = faiss.SearchParametersIVF(sel=faiss.IDSelectorBitmap(bits), nprobe=1)
            rows = self._index.search(query, self.n_candidates, params=how)[1][0]
        return np.sort(rows[rows > 0])


def _faiss() -> Any:
    return importlib.import_module("faiss")  # its annotations are not those of what it exports


def _vectors(student: ServingStudent) -> Floats:
    """(V - 1, D + 2), from row 1 on: the table, and the bias as a coarse number and a fine one.

    Biases are spread several times wider than what else makes a score. With 16 values for them the
    best 400 of a million hold .93 of the best 100, with 16 times 16 values .97; 800 .98 and .99.
    """
    bias = student.bias_V[1:]
    least, step = bias.min(), np.ptp(bias) / 16
    coarse = least + step * (np.minimum(15, (bias - least) // step) + 0.5) if step else bias
    columns = (student.table_VD[1:], coarse[:, None], (bias - coarse)[:, None])
    return np.concatenate(columns, axis=1, dtype=np.float32)


def _scannable(faiss: Any, vectors: Floats) -> Any:
    """A flat index; as one list of an inverted file, since that takes filters."""
    width = vectors.shape[1]
    whole = faiss.IndexFlatIP(width)
    whole.add(np.zeros((1, width), np.float32))
    index = faiss.IndexIVFPQFastScan(whole, width, 1, width, _BITS, faiss.METRIC_INNER_PRODUCT)
    index.by_residual = False
    index.train(vectors[:: -(-len(vectors) // _TRAINING_ROWS)])
    index.add_with_ids(vectors, np.arange(1, 1 + len(vectors)))
    return index


def _queries(student: ServingStudent, popularity_V: Floats) -> Floats:
    """(S, D + 2): users of random histories as this model sees them; popular items come oftener."""
    random = np.random.default_rng(0)
    weight = np.sqrt(np.maximum(popularity_V[1:].astype(np.float64), 0)) + 0.1
    cumulative = np.cumsum(weight)
    queries = np.ones((QUERIES, student.table_VD.shape[1] + 2), np.float32)
    for query in queries:
        n_events = random.integers(1, student.max_events + 1)
        rows = 1 + np.searchsorted(cumulative, random.random(n_events) * cumulative[-1])
        types = random.integers(1, N_TYPES, n_events)
        gaps = random.integers(0, N_GAPS, n_events)
        query[:-2] = student.state(np.minimum(rows, len(weight)), types, gaps)
    return queries
