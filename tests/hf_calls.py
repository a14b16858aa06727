"""Calls of transformers' `generate` on a tiny model, plain and with ours inside, for tests/decode/test_hf_*.py."""

import functools

import torch

import tiny
from layerskip import custom_generate

L, NEW = tiny.NUM_LAYERS, 16
ONE = torch.tensor([[5, 9, 20, 33]])
RAGGED = torch.tensor([[0, 0, 0, 5, 9, 20], [5, 9, 20, 33, 7, 8], [0, 0, 0, 0, 0, 40]])  # 0 pads on the left


def masked(ids):
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def plain(model, ids=ONE, **options):
    return model.generate(**masked(ids), **{"max_new_tokens": NEW, "do_sample": False, **options})


def own(model, ids=ONE, generate=custom_generate, exit_layer=2, **options):
    return plain(model, ids, custom_generate=generate, assistant_early_exit=exit_layer, **options)


@functools.cache
def greedy(padded=False):
    """What `generate` says, without any option."""
    return plain(tiny.calibrated("llama"), RAGGED if padded else ONE)
