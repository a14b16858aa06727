"""Every family of the table learns to exit early, and leaves a checkpoint that anything opens."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import tiny
import training
from layerskip.errors import UserError
from layerskip.train.objective.exits import ExitTraining
from layerskip.train.objective.schedule import Schedule


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_twenty_steps_teach_an_early_exit_and_leave_a_plain_checkpoint(tmp_path, family):
    run = training.trainer(
        tmp_path,
        start=training.model(family),
        data=training.counting(160),
        max_steps=20,
        optim="adamw_torch",
        learning_rate=0.01,
        p_max=0.2,
        curriculum="rotational",
        exits=[2, 3],
    )
    run.train()
    for k in (2, 3, tiny.NUM_LAYERS):
        falling = training.losses(run, f"exit_{k}_loss")
        assert min(falling[-2:]) < falling[0] - 0.3, f"exit {k}"
    run.save_model(str(tmp_path / "final"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokens = torch.arange(5, 13)[None]
    assert torch.equal(model(tokens).logits, run.model.eval()(input_ids=tokens).logits)
    made = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert made.shape == (1, 12)


def test_a_mixture_of_experts_is_refused_for_its_routers_loss_would_be_lost():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="mixture of experts"):
        ExitTraining(AutoModelForCausalLM.from_config(config), Schedule(2, weighting="uniform"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_parameter_has_a_gradient_and_the_deepest_layer_too(family):
    """A published recipe counted the inputs of layers, so that its last layer learnt nothing."""
    model = training.model(family).train()
    rows = training.counting(4)
    with ExitTraining(model, Schedule(tiny.NUM_LAYERS, p_max=0.0, curriculum="all")) as exits:
        exits.begin(0, 10)
        model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for layer in exits.layers:
        assert max(float(p.grad.abs().max()) for p in layer.parameters()) > 1e-6
