"""Layer dropout: rows skip layers, their work is saved, and nobody else notices."""

import numpy as np
import pytest
import torch

import tiny
from layerskip.model.families import parts_of
from layerskip.train.objective.dropout import LayerDropout, keep_masks, sliced

ROWS = 6


def layers_of(model):
    return parts_of(model)[1]


def dropped(model, kept, rates=None, **options):
    dropout = LayerDropout(layers_of(model), **options)
    dropout.attach()
    dropout.set(rates or [0.5] * tiny.NUM_LAYERS, kept, torch.device("cpu"))
    return dropout


def inputs(family):
    """As many rows as positions, so that telling a per-sample tensor by its size alone would go wrong."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, tiny.VOCAB, (ROWS, ROWS), generator=generator)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]).repeat(3, 1)  # half of the rows packed
    return {"input_ids": tokens} | ({} if family == "opt" else {"position_ids": positions})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_row_gets_what_it_gets_alone(family):
    """Every per-sample argument is cut alike: a row's logits are those of a model without its dropped layers."""
    model = tiny.random_model(family)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    kept = keep_masks([0.0, 0.3, 0.5, 0.5, 0.7], 3, 0, 0, ROWS)
    assert 0 < kept.sum() < kept.size
    dropout = dropped(model, kept)
    given = inputs(family)
    with torch.no_grad():
        together = model(**given, use_cache=False).logits
        for row in range(ROWS):
            dropout.set([0.5] * tiny.NUM_LAYERS, kept[:, row : row + 1], torch.device("cpu"))
            alone = model(**{name: t[row : row + 1] for name, t in given.items()}, use_cache=False).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_dropped_row_costs_nothing():
    model = tiny.random_model("llama").train()
    kept = keep_masks([0.5] * tiny.NUM_LAYERS, 0, 0, 0, ROWS)
    ran = []
    for layer in layers_of(model):
        layer.mlp.register_forward_pre_hook(lambda module, args: ran.append(len(args[0])))
    dropped(model, kept)
    model(**inputs("llama"), use_cache=False)
    assert ran == [int(count) for count in kept.sum(1) if count]
    assert sum(ran) == int(kept.sum())


@pytest.mark.parametrize("distributed", [False, True])
def test_a_layer_without_rows_is_not_called_unless_ranks_must_agree(distributed):
    kept = np.ones((tiny.NUM_LAYERS, ROWS), dtype=bool)
    kept[2] = False
    model = tiny.random_model("llama").train()
    layers, calls, states = layers_of(model), [], []
    layers[2].mlp.register_forward_hook(lambda *_: calls.append(1))
    layers[2].register_forward_pre_hook(lambda layer, args: states.append(args[0]))
    layers[3].register_forward_pre_hook(lambda layer, args: states.append(args[0]))
    dropped(model, kept, distributed=distributed)
    model(**inputs("llama"), use_cache=False).logits.sum().backward()
    gradient = layers[2].mlp.up_proj.weight.grad
    assert torch.equal(*states)
    assert len(calls) == int(distributed)
    assert gradient is None or (distributed and torch.count_nonzero(gradient) == 0)
    assert distributed == (gradient is not None)


def test_evaluation_mode_runs_every_layer():
    model = tiny.random_model("llama")
    plain = model(**inputs("llama")).logits
    dropout = dropped(model, np.zeros((tiny.NUM_LAYERS, ROWS), dtype=bool))
    assert torch.equal(model(**inputs("llama")).logits, plain)
    dropout.detach()
    assert "forward" not in layers_of(model)[0].__dict__
    assert torch.equal(model.train()(**inputs("llama")).logits, plain)


def test_inverse_scale_keeps_the_expected_output():
    """A kept layer's effect is divided by its chance to be kept; nothing else changes."""
    model = tiny.random_model("llama").train()
    kept = np.ones((tiny.NUM_LAYERS, ROWS), dtype=bool)
    seen = {}
    for name in ("none", "inverse"):
        dropout = dropped(model, kept, [0.0, 0.25, 0.0, 0.0, 0.0], residual_scale=name)
        hook = layers_of(model)[2].register_forward_pre_hook(
            lambda module, args, key=name: seen.update({key: args[0]})
        )
        first = layers_of(model)[1].register_forward_pre_hook(lambda module, args: seen.update(start=args[0]))
        model(**inputs("llama"), use_cache=False)
        hook.remove()
        first.remove()
        dropout.detach()
    effect = seen["none"] - seen["start"]
    torch.testing.assert_close(seen["inverse"] - seen["start"], effect * 4 / 3, rtol=1e-4, atol=1e-5)


def test_masks_are_addressed_by_row_and_step():
    """However the rows of a step are cut into calls, each row meets its own fate."""
    rates = [0.5] * 7
    whole = keep_masks(rates, 1, 5, 0, 8)
    parts = [keep_masks(rates, 1, 5, first, 2) for first in (0, 2, 4, 6)]
    assert np.array_equal(whole, np.concatenate(parts, axis=1))
    assert not np.array_equal(whole, keep_masks(rates, 1, 6, 0, 8))
    assert not np.array_equal(whole, keep_masks(rates, 2, 5, 0, 8))


def test_masks_keep_as_often_as_told():
    rates = [0.0, 0.1, 0.5, 1.0]
    kept = keep_masks(rates, 0, 0, 0, 20_000).mean(axis=1)
    assert kept[0] == 1.0
    assert kept[3] == 0.0
    assert kept[1:3] == pytest.approx([0.9, 0.5], abs=0.015)  # four standard errors


def test_rows_of_other_shape_than_told_are_our_mistake():
    model = tiny.random_model("llama").train()
    dropped(model, np.ones((tiny.NUM_LAYERS, 2), dtype=bool))
    with pytest.raises(RuntimeError, match="set for 2 rows"):
        model(**inputs("llama"), use_cache=False)


def test_slicing_cuts_what_is_per_sample_only():
    chosen = torch.tensor([0, 2])
    given = {
        "mask": torch.zeros(3, 1, 3, 3),
        "shared": torch.zeros(1, 3, 8),
        "cache_position": torch.arange(3),
        "pair": (torch.zeros(3, 4), None),
        "flag": True,
    }
    cut = sliced(given, chosen, 3)
    assert cut["mask"].shape == (2, 1, 3, 3)
    assert cut["shared"].shape == (1, 3, 8)
    assert len(cut["cache_position"]) == 3
    assert cut["pair"][0].shape == (2, 4)
    assert cut["flag"] is True
