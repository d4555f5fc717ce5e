from __future__ import annotations

import torch

from amphista.cache.hf import as_transformers_cache
from amphista.cache.static import KVCache


def test_a_transformers_cache_writes_into_ours():
    ours = KVCache(2)
    theirs = as_transformers_cache([ours.layers], [3])
    for layer in range(2):
        keys, values = theirs.update(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), layer)
        assert keys.shape == values.shape == (1, 2, 3, 4) and bool((keys == 1).all()) and bool((values == 0).all())
    assert ours.num_rows == theirs.get_seq_length() == 3
    assert theirs.layers[0].get_mask_sizes(2) == (5, 0)
    assert theirs.layers[0].get_mask_sizes(torch.arange(2)) == (5, 0), "older versions pass positions"
    assert theirs.layers[0].get_max_length() == theirs.layers[0].get_max_cache_shape() == -1, "no limit of its own"


def test_rows_of_several_sequences_go_each_to_its_own():
    ours = [KVCache(2), KVCache(2)]
    ours[0].layers[1].append(torch.full((1, 2, 1, 4), 7.0), torch.full((1, 2, 1, 4), 7.0))
    theirs = as_transformers_cache([cache.layers for cache in ours], [2, 1])
    new = torch.arange(3.0)[None, None, :, None].expand(1, 2, 3, 4)
    keys, values = theirs.update(new, -new, 1)
    assert keys[0, 0, :, 0].tolist() == [7, 0, 1, 2] and values[0, 1, :, 3].tolist() == [7, 0, -1, -2]
    assert [cache.layers[1].num_rows for cache in ours] == [3, 1] and theirs.layers[1].get_seq_length() == 4
