"""A row for each text of a batch, filled up to the length of the longest; packing.py lets texts share rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pad(
    ids: Sequence[Sequence[int]], pad_id: int, seconds: Sequence[int | None] = (), *, left: bool = False
) -> dict[str, NDArray[np.int64]]:
    """int64 arrays of shape (texts, longest): input_ids, attention_mask, token_type_ids.

    Padded at the right, or at the `left`. A type is 0, and 1 from the index in `seconds` on, where the second part
    begins.
    """
    lengths = np.fromiter((len(i) for i in ids), dtype=np.int64, count=len(ids))
    places = np.arange(lengths.max())
    mask = places >= (lengths.max() - lengths)[:, None] if left else places < lengths[:, None]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = np.concatenate([np.asarray(i, dtype=np.int64) for i in ids])
    types = np.zeros_like(input_ids)
    if seconds:
        begins = np.fromiter((lengths[i] if at is None else at for i, at in enumerate(seconds)), np.int64, len(seconds))
        types[mask & (np.arange(mask.shape[1]) >= begins[:, None])] = 1
    return {"input_ids": input_ids, "attention_mask": mask.astype(np.int64), "token_type_ids": types}
