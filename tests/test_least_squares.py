"""Where an adapter's training begins: the solution of a linear regression, for any norm in front of the head."""

import warnings
from types import SimpleNamespace

import pytest
import torch

import tiny
import training
from layerskip.errors import UserError
from layerskip.model.adapter import scaled
from layerskip.train.objective.exit_adapter import adapter_of, places_of
from layerskip.train.objective.exits import ExitTraining
from layerskip.train.objective.least_squares import RIDGE, STRENGTH, affine, calm, solved
from layerskip.train.objective.objective import Objective
from layerskip.train.objective.schedule import Schedule
from training_ranks import ADAPTER

WIDTH = 32


@pytest.mark.parametrize("kind", [torch.nn.RMSNorm, torch.nn.LayerNorm])
def test_gain_and_shift_of_a_norm_are_found(kind):
    norm = kind(WIDTH, eps=1e-6)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    if (shift := getattr(norm, "bias", None)) is not None:
        torch.nn.init.normal_(shift)
    gain, found = affine(norm, torch.zeros(1, WIDTH))
    torch.testing.assert_close(gain, norm.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, torch.zeros(WIDTH) if shift is None else shift, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exit_layer", [0, 2])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_solution_is_that_of_all_positions_stacked(family, exit_layer):
    model = tiny.random_model(family)
    schedule = Schedule(
        tiny.NUM_LAYERS, exits=(exit_layer,), curriculum="fixed", weighting="uniform", p_max=0.0
    )
    objective = Objective(exit_adapter=True, freeze="model", exit_loss="kl", adapter_hidden=24)
    exits = ExitTraining(model, schedule, objective)
    rows = [
        {"input_ids": ids, "labels": ids.clone()}
        for ids in torch.randint(0, tiny.VOCAB, (6, 1, 20), generator=torch.Generator().manual_seed(1))
    ]
    rows[0]["labels"][:, :10] = -100
    with exits:
        found = solved(exits, rows)
    inputs, outputs = [], []
    for row in rows:
        told = model(input_ids=row["input_ids"], output_hidden_states=True).hidden_states
        early, final = told[exit_layer][0].float(), told[-1][0].float()  # the last one is behind the norm
        at = places_of(row["labels"][:, 1:] >= 0, None, 1)
        gain, shift = affine(exits.read, early)
        inputs.append(torch.cat([scaled(early[at]), scaled(final[at - 1])], -1))
        outputs.append((final[at] - shift) / gain)
    x, y = torch.cat(inputs).double(), torch.cat(outputs).double()
    left = torch.cat([x, (RIDGE * len(x)) ** 0.5 * torch.eye(2 * WIDTH, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(left, torch.cat([y, torch.zeros(2 * WIDTH, WIDTH).double()])).solution.T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


def test_rows_without_labels_have_no_solution():
    exits = SimpleNamespace(hf=SimpleNamespace(device=torch.device("cpu")))
    ids = torch.zeros(1, 5, dtype=torch.long)
    assert solved(exits, [{"input_ids": ids, "labels": torch.full_like(ids, -100)}]) is None


def test_a_trainer_begins_there_once(tmp_path):
    run = training.trainer(tmp_path, **ADAPTER, max_steps=1, learning_rate=0.0)
    adapter = adapter_of(run.exits.hf)
    before = adapter.join.weight.detach().clone()
    run.train()
    begun = adapter.join.weight.detach().clone()
    assert not torch.equal(begun, before)
    adapter.join.weight.data.zero_()
    run.train()  # as a run does that goes on with smaller batches
    assert not adapter.join.weight.any()


def test_muon_steps_an_adapter_and_refuses_a_whole_model(tmp_path):
    run = training.trainer(
        tmp_path / "adapter", **ADAPTER, max_steps=2, optimizer="muon", optim="adamw_torch"
    )
    run.train()
    assert type(run.optimizer.optimizer) is torch.optim.Muon
    with pytest.raises(UserError, match="Muon steps matrices"):
        training.trainer(tmp_path / "model", max_steps=1, optimizer="muon").train()


@pytest.mark.parametrize("gain", [0.01, 1.0, 30.0])
def test_a_strong_head_is_taught_in_smaller_steps(gain):
    """Steps of a rate are felt alike: logits move apart by no more than before the head the rate suits."""
    model = tiny.random_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, gain)
    schedule = Schedule(tiny.NUM_LAYERS, exits=(0,), curriculum="fixed", weighting="uniform", p_max=0.0)
    exits = ExitTraining(model, schedule, Objective(exit_adapter=True, freeze="model", exit_loss="kl"))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    with exits, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        calm(exits, optimizer)
    rate = optimizer.param_groups[0]["lr"] / 2
    moved = model.lm_head.weight.detach() * gain
    felt = float((moved - moved.mean(0)).norm(dim=1).square().mean().sqrt())
    assert rate == pytest.approx(min(1, STRENGTH / felt), rel=1e-3)
    assert (
        (rate < 1) == (felt > STRENGTH) == any("the learning rate is lowered" in str(w.message) for w in told)
    )
    calm(ExitTraining(tiny.random_model("llama"), Schedule(tiny.NUM_LAYERS), Objective()), optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * rate)
