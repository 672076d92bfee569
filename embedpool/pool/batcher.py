"""Waiting jobs → batches that one driver call serves well. Pure: owns no thread and no clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from embedpool.pool.job import Job, Row


@dataclasses.dataclass(frozen=True)
class Batcher:
    """Cuts batches of at most `max_texts` rows and, where they have two, `max_tokens` padded tokens."""

    max_texts: int
    max_tokens: int

    def plan(self, jobs: Sequence[Job]) -> list[list[Row]]:
        """A partition of all rows of `jobs` into batches. Rows of similar length share a batch; groups never mix."""
        groups: dict[object, list[Row]] = {}
        for job in jobs:
            groups.setdefault(job.group, []).extend(Row(job, i) for i in range(len(job)))
        return [batch for rows in groups.values() for batch in self._cut(rows)]

    def _cut(self, rows: list[Row]) -> list[list[Row]]:
        rows.sort(key=lambda row: row.tokens)
        batches: list[list[Row]] = []
        batch: list[Row] = []
        for row in rows:  # in ascending length, so this row's length is what the batch would be padded to
            if batch and (len(batch) >= self.max_texts or (len(batch) + 1) * row.tokens > self.max_tokens):
                batches.append(batch)
                batch = []
            batch.append(row)
        if batch:
            batches.append(batch)
        return batches
