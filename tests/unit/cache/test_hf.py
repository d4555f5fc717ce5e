from __future__ import annotations

import torch

from amphista.cache.hf import as_transformers_cache
from amphista.cache.static import KVCache


def test_a_transformers_cache_writes_into_ours():
    ours = KVCache(2)
    theirs = as_transformers_cache(ours)
    for layer in range(2):
        keys, values = theirs.update(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), layer)
        assert keys.shape == values.shape == (1, 2, 3, 4) and bool((keys == 1).all()) and bool((values == 0).all())
    assert ours.num_rows == theirs.get_seq_length() == 3
    assert theirs.layers[0].get_mask_sizes(2) == (5, 0)
    assert theirs.layers[0].get_mask_sizes(torch.arange(2)) == (5, 0), "older versions pass positions"
    assert theirs.layers[0].get_max_length() == theirs.layers[0].get_max_cache_shape() == -1, "no limit of its own"
