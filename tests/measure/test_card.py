"""The roofline card: what a token reads, and the bandwidth it divides."""

import pytest
import torch

import tiny
from layerskip.measure.speed import card as cards
from layerskip.measure.speed.card import Card, bandwidth, card
from layerskip.model.huggingface import HuggingFaceStack


def test_a_plain_token_reads_layers_head_and_context_but_not_the_table():
    made = Card(
        device="x",
        device_type="cpu",
        dtype="float32",
        quantisation=None,
        stack="hf",
        threads=1,
        layers=10,
        layer_bytes=100,
        head_bytes=50,
        table_bytes=70,
        context=5,
        token_bytes=8,
        bandwidth_gb_s=2.18,
    )
    assert made.weight_bytes == 1120
    assert made.bytes_per_token == 1090
    assert made.roofline_tokens_per_s == pytest.approx(2e6)
    assert made.as_record()["roofline_tokens_per_s"] == made.roofline_tokens_per_s


@pytest.mark.parametrize("tied", [False, True])
def test_the_card_counts_every_weight_of_a_model_once(monkeypatch, tied):
    monkeypatch.setattr(cards, "BUFFER_BYTES", 2**16)
    model = tiny.random_model("llama", tie_word_embeddings=tied)
    stack = HuggingFaceStack(model)
    made = card(stack, context=7, token_bytes=3)
    norm = model.model.norm.weight.numel() * 4  # read too, and too small to be worth a field
    assert made.weight_bytes + norm == sum(p.numel() * 4 for p in model.parameters())
    assert (made.stack, made.dtype, made.layers, made.table_bytes == 0) == ("hf", "float32", 5, tied)


def test_bandwidth_is_a_positive_number_of_gigabytes_per_second():
    assert bandwidth(torch.device("cpu"), 2**16) > 0
