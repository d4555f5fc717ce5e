"""What a configuration alone decides: refused with its reason, or let through."""

from __future__ import annotations

import pytest
from transformers import (
    BloomConfig,
    FalconConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    MambaConfig,
    MptConfig,
    RwkvConfig,
    T5Config,
)

from amphista.errors import TargetError
from amphista.target.families import kept_by_layers, refuse_unsupported
from tests.tiny import FAMILIES

RECURRENT = "keep one recurrent state"


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_keys_and_values_pass(family):
    config = FAMILIES[family]()
    refuse_unsupported(config)
    assert len(kept_by_layers(config)) == config.num_hidden_layers


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: BloomConfig(), "ALiBi"),
        (lambda: MptConfig(), "ALiBi"),
        (lambda: FalconConfig(alibi=True), "ALiBi"),
        (lambda: MambaConfig(), RECURRENT),
        (lambda: RwkvConfig(), RECURRENT),
        (lambda: JambaConfig(), RECURRENT),
        (lambda: Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2), RECURRENT),
        (lambda: T5Config(), "encoder-decoder"),
    ],
)
def test_refused_with_the_reason(config, reason):
    with pytest.raises(TargetError, match=reason):
        refuse_unsupported(config())


def test_falcon_without_alibi_passes():
    refuse_unsupported(FalconConfig(alibi=False))


def hybrid(*kinds):
    return GraniteMoeHybridConfig(
        layer_types=list(kinds), num_hidden_layers=len(kinds), mamba_n_heads=4, mamba_d_head=1024, mamba_expand=1
    )


def test_a_hybrid_class_is_judged_by_the_layers_it_has():
    refuse_unsupported(hybrid("attention", "attention"))
    with pytest.raises(TargetError, match=RECURRENT):
        refuse_unsupported(hybrid("attention", "mamba"))
