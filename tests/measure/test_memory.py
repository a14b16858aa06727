"""The growth of memory while something runs."""

import sys

import pytest
import torch

from layerskip.measure.speed.memory import growth, module_bytes

MB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_counts_what_was_freed_before_the_end():
    with growth(torch.device("cpu")) as grown:
        torch.ones(64 * MB // 4)
    if grown.num_bytes is None:
        pytest.skip("this kernel does not let a process reset its peak")
    assert 60 * MB <= grown.num_bytes <= 96 * MB
    with growth(torch.device("cpu")) as grown:
        torch.ones(1)
    assert grown.num_bytes < 16 * MB, "an earlier peak does not count"


def test_a_device_nobody_can_ask_gives_no_number():
    with growth(torch.device("meta")) as grown:
        pass
    assert grown.num_bytes is None


def test_shared_weights_count_once():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    assert module_bytes(module) == 128
    module[1].weight = module[0].weight
    assert module_bytes(module) == 64
