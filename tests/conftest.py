"""Shared by all tests: one thread each (two processes run side by side), the sizes of the matrix, tolerances."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from layerskip.model.huggingface import HuggingFaceStack

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

FULL = os.environ.get("LAYERSKIP_FULL") == "1"

# Two ways of computing the same numbers (one call or several, whole or sliced) differ by rounding only: a few units
# in the last place of numbers of order ten, through five layers. In float64 too Hugging Face's eager softmax and
# its norms round to float32.
CLOSE = {torch.float32: 2e-4, torch.float64: 1e-6}


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "full" in item.keywords and not FULL:
            item.add_marker(pytest.mark.skip(reason="LAYERSKIP_FULL=1 runs the whole matrix"))


@pytest.fixture(scope="session")
def llama():
    """A calibrated tiny model and its stack."""
    import tiny

    model = tiny.calibrated("llama")
    return model, HuggingFaceStack(model)
