"""A task's pooled sums over the examples of all ranks.

Dense sums are added up. Sparse ones, counts of scores, are too large to be: each rank merges its scores to a number of
them, and writes these into its part of a table, whose sum over the ranks holds the scores of all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.loop.exchange import ROWS
from trainer.tasks.metrics import FLOATS, merge_scores

SCORES = 8192  # of a label, of all ranks together; scores of fewer examples are exact
MIN_SCORES = 512  # of a label, of one rank
MAX_PENDING = 1 << 20  # scores that are kept one by one before equal ones are counted together


class PooledSums:
    """Sums a task's pooled sums on one rank.

    Args:
        like: those of any example, from which the names and shapes are learnt.
    """

    def __init__(self, like: Mapping[str, Tensor]):
        # In the order of the task on all ranks, since their tables are added up one after the other.
        dense = {name: part for name, part in like.items() if part.layout == torch.strided}
        self.dense = {name: torch.zeros_like(part, dtype=torch.float64) for name, part in dense.items()}
        self.sparse = {name: [torch.zeros_like(part)] for name, part in like.items() if name not in dense}
        self.pending = 0

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add the pooled sums of some examples."""
        for name, total in self.dense.items():
            total += parts[name]
        for name, found in self.sparse.items():
            found.append(parts[name])
            self.pending += parts[name]._nnz()
        if self.pending > MAX_PENDING:
            self.sparse = {name: [_sum(found)] for name, found in self.sparse.items()}
            self.pending = 0

    def tables(self, rank: int, world_size: int, most: int = SCORES) -> dict[str, Tensor]:
        """Return float64 tables, whose sums over all ranks `totals` takes.

        Args:
            rank: number of this rank among those that have a part.
            world_size: number of those ranks.
            most: scores that any of them can have of a label, the same on all.
        """
        limit = min(max(SCORES // world_size, MIN_SCORES), most)
        tables = dict(self.dense)
        for name, found in self.sparse.items():
            counts = merge_scores(_sum(found), limit)
            table = torch.zeros(world_size, len(counts) * limit, 4, dtype=torch.float64)
            table[rank, : counts._nnz()] = torch.cat((counts.indices().T, counts.values()), 1).double()
            tables[f"{name}{ROWS}"] = table.flatten(0, 1)
        return tables


def totals(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the pooled sums of all ranks from the sums of their `PooledSums.tables`."""
    dense = {name: table for name, table in tables.items() if not name.endswith(ROWS)}
    return dense | {name.removesuffix(ROWS): _counts(table) for name, table in tables.items() if name not in dense}


def _counts(rows: Tensor) -> Tensor:
    """Return sparse counts [labels, FLOATS, 2] from rows of a label, a score, and two counts; empty rows have none."""
    rows = rows[rows[:, 2:].sum(1) > 0]
    cells = rows[:, :2].T.long()
    labels = int(cells[0].max()) + 1 if len(rows) else 1
    return torch.sparse_coo_tensor(cells, rows[:, 2:], (labels, FLOATS, 2), check_invariants=False).coalesce()


def _sum(parts: list[Tensor]) -> Tensor:
    """Sum sparse tensors."""
    cells, values = torch.cat([part._indices() for part in parts], 1), torch.cat([part._values() for part in parts])
    return torch.sparse_coo_tensor(cells, values, parts[0].shape, check_invariants=False).coalesce()
