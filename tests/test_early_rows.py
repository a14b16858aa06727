"""Rows that end at an early exit, and a last layer that stays what it was: recipe keys beyond the paper."""

import copy

import pytest
import torch
import torch.nn.functional as F

import training
from layerskip.errors import UserError
from layerskip.train.objective.binding import bound
from layerskip.train.objective.exits import ExitTraining
from layerskip.train.objective.objective import Objective

ROWS, TOKENS, EXIT = 6, 9, 2


def schedule(layers, **changes):
    return training.one_exit(layers, EXIT, **{"last_every": 3, **changes})


@pytest.fixture
def model():
    return training.model().train()


@pytest.fixture
def tokens():
    return torch.randint(0, 30, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


def states(model, tokens):
    """What the head reads after the exit and at the end."""
    with torch.no_grad():
        out = model.base_model(tokens, output_hidden_states=True, use_cache=False)
    return model.base_model.norm(out.hidden_states[EXIT]), out.last_hidden_state


def summed(head, hidden, tokens):
    return F.cross_entropy((hidden[:, :-1] @ head.T).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def test_every_nth_row_is_whole_and_each_place_has_its_turn():
    plan = schedule(5)
    seen = torch.tensor([plan.whole(step, 0, ROWS) for step in range(3)])
    assert (seen.sum(1) == ROWS // 3).all()
    assert (seen.sum(0) == 1).all()
    assert plan.whole(4, 2, 4) == plan.whole(4, 0, ROWS)[2:]


def test_the_loss_is_the_exits_over_all_rows_and_the_last_layers_over_whole_ones(model, tokens):
    exits = ExitTraining(model, schedule(len(model.model.layers)))
    early, last = states(model, tokens)
    whole = torch.tensor(exits.schedule.whole(1, 0, ROWS))
    head, count = model.lm_head.weight, ROWS * (TOKENS - 1)
    wanted = (0.5 * summed(head, early, tokens) + 3 * 0.5 * summed(head, last[whole], tokens[whole])) / count
    with exits:
        exits.begin(1, 10)
        loss = model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(loss, wanted)
    assert exits.totals.tokens == {EXIT: 16, len(model.model.layers): 16}  # figures: whole rows


def test_over_a_turn_the_mean_loss_is_that_without_early_rows(model, tokens):
    def mean(**changes):
        exits = ExitTraining(model, schedule(len(model.model.layers), **changes))
        with exits:
            found = []
            for step in range(3):
                exits.begin(step, 10)
                found.append(float(model(input_ids=tokens, labels=tokens).loss.detach()))
        return sum(found) / 3

    assert mean() == pytest.approx(mean(last_every=1), rel=1e-5)


def test_layers_above_the_exit_run_whole_rows_only(model, tokens):
    exits = ExitTraining(model, schedule(len(model.model.layers)))
    seen = []
    with exits:
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
        model(input_ids=tokens, labels=tokens)
    assert seen == [ROWS] * EXIT + [ROWS // 3] * (len(model.model.layers) - EXIT)


def test_early_rows_tell_only_the_given_tokens_apart(model, tokens):
    ids = list(range(0, 30, 2))
    plan = schedule(len(model.model.layers), last_every=1000)
    exits = ExitTraining(model, plan, Objective(exit_vocab=ids))
    early, _ = states(model, tokens)
    kept = tokens[:, 1:] % 2 == 0
    logits = (early[:, :-1] @ model.lm_head.weight[ids].T)[kept]
    wanted = F.cross_entropy(logits, tokens[:, 1:][kept] // 2, reduction="sum") * 0.5 / (ROWS * (TOKENS - 1))
    with exits:
        exits.begin(1, 10)  # no row is whole
        loss = model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    above = model.model.layers[-1].mlp.up_proj.weight.grad
    assert above is None or not above.any()


@pytest.mark.parametrize("adapters", [False, True])
def test_a_last_layer_that_is_to_stay_learns_from_the_model_before_training(model, tokens, adapters):
    tuned = model
    if adapters:
        from layerskip.train.job.lora import with_adapters
        from layerskip.train.job.recipe import Lora

        tuned = with_adapters(model, Lora(rank=2, ranks={1: 4}))
    hf = tuned.get_base_model() if adapters else model
    plan = schedule(len(hf.model.layers), e_scale=1.0)
    objective = bound(Objective(last_loss="kl", freeze="embeddings"), tuned, plan)
    before = objective.reference
    was = copy.deepcopy(states(hf, tokens)[1])
    torch.testing.assert_close(before(input_ids=tokens).float(), was, rtol=0.05, atol=0.05)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and (not adapters or "lora_B" in name):
                parameter += 0.05
    exits = ExitTraining(tuned, plan, objective)
    with exits:
        exits.begin(0, 10)
        hf(input_ids=tokens, labels=tokens)
    now = states(hf, tokens)[1]
    whole = torch.tensor(exits.schedule.whole(0, 0, ROWS))
    head = hf.lm_head.weight
    old, new = ((x[whole][:, :-1] @ head.T).log_softmax(-1) for x in (before(input_ids=tokens).float(), now))
    divergence = F.kl_div(new, old, log_target=True, reduction="sum")
    torch.testing.assert_close(exits.totals.kl[len(hf.model.layers)], divergence, rtol=0.02, atol=1e-4)
    assert divergence > 0.01


def test_settings_that_leave_an_early_row_without_a_teacher_are_refused(model):
    with pytest.raises(UserError, match="no last layer"):
        ExitTraining(model, schedule(len(model.model.layers)), Objective(exit_loss="ce+kl"))
    with pytest.raises(UserError, match="last_every is 0"):
        schedule(5, last_every=0)
