"""What the trainer takes for granted of Hugging Face's `Trainer`, though no document promises it."""

import inspect

import pytest
import transformers
from transformers import Trainer

import training
from layerskip.errors import UserError
from layerskip.train import supported
from layerskip.train.trainer import LayerSkipMixin


@pytest.mark.parametrize("name", supported.PRIVATE_METHODS)
def test_a_private_method_of_trainer_has_the_parameters_that_are_used(name):
    """Five of them were overridden without a check: another version could have trained something else silently."""
    parameters = [*inspect.signature(getattr(Trainer, name)).parameters][1:]
    assert tuple(parameters) == supported.PRIVATE_METHODS[name]


def test_every_private_method_that_the_mixin_overrides_is_in_the_table():
    own = {name for name in vars(LayerSkipMixin) if name.startswith("_") and not name.endswith("__")}
    assert {name for name in own if hasattr(Trainer, name)} <= {*supported.PRIVATE_METHODS}


@pytest.mark.parametrize(
    ("changed", "told"),
    [(None, "_get_grad_norm is missing"), (lambda self, model: 0.0, "_get_grad_norm takes \\(model\\)")],
)
def test_a_version_with_another_trainer_is_refused_before_any_work(tmp_path, monkeypatch, changed, told):
    monkeypatch.setattr(Trainer, "_get_grad_norm", changed)
    if changed is None:
        monkeypatch.delattr(Trainer, "_get_grad_norm")
    with pytest.raises(UserError, match=told) as refusal:
        training.trainer(tmp_path)
    assert transformers.__version__ in refusal.value.message
    assert supported.TESTED in refusal.value.hint
