"""A whole model that stays what it was, judged by its state at the exit: price, Fisher information, gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F

import training
from layerskip.errors import UserError
from layerskip.model.families import parts_of
from layerskip.train.data.encoding import IGNORED
from layerskip.train.job.recipe import recipe_from
from layerskip.train.objective.anchor import Anchor, anchor_of, fisher_information, live_tokens
from layerskip.train.objective.binding import bound
from layerskip.train.objective.exits import ExitTraining
from layerskip.train.objective.objective import Objective

ROWS, TOKENS, EXIT = 6, 9, 2
OBJECTIVE = Objective(last_loss="anchor", freeze="above")
ANCHORED = {"freeze": "above", "last_loss": "anchor", "curriculum": "fixed", "exits": [EXIT], "p_max": 0.0}


def schedule(layers, **changes):
    return training.one_exit(layers, EXIT, **{"e_scale": 0.25, **changes})


@pytest.fixture
def tokens():
    return torch.randint(0, 30, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["llama", "gemma2", "gpt2", "opt"])
def model(request):
    return training.model(request.param).train()


def batch(tokens):
    return {"input_ids": tokens, "labels": tokens}


def state(model, tokens):
    with torch.no_grad():
        return model.base_model(tokens, output_hidden_states=True, use_cache=False).hidden_states[EXIT]


def test_before_training_the_copy_says_what_the_model_says_and_the_price_is_nothing(model, tokens):
    anchor = anchor_of(model, EXIT, [batch(tokens[:1])])
    unmoved = anchor.unmoved(input_ids=tokens)
    model.eval()
    torch.testing.assert_close(unmoved, state(model, tokens))
    live = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    assert anchor.price(unmoved, state(model, tokens), live) < 1e-6
    moved = unmoved + torch.randn(unmoved.shape, generator=torch.Generator().manual_seed(1))
    d = (moved - unmoved).flatten(0, 1)
    assert float(anchor.price(unmoved, moved, live)) == pytest.approx(
        float(0.5 * (d @ anchor.fisher * d).sum()), rel=1e-4
    )


def test_the_price_is_the_divergence_of_the_output_for_small_moves(tokens):
    model = training.model().eval()
    one = tokens[:1]
    fisher = fisher_information(model, EXIT, [batch(one.expand(1500, -1))], seed=3)
    layer = model.model.layers[EXIT - 1]
    with torch.no_grad():
        before = model(one).logits.log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    true = priced = 0.0
    for at in range(1, TOKENS):  # one token at a time, as F is a mean over them
        d = 0.05 * torch.randn(20, model.config.hidden_size, generator=generator)
        moved = torch.zeros(len(d), TOKENS, d.shape[1])
        moved[:, at] = d
        hook = layer.register_forward_hook(lambda _, args, out, by=moved: out + by)
        with torch.no_grad():
            after = model(one.expand(len(d), -1)).logits.log_softmax(-1)
        hook.remove()
        true += float(F.kl_div(after, before.expand_as(after), log_target=True, reduction="sum"))
        priced += float(0.5 * torch.linalg.vecdot(d @ fisher, d).sum())
    assert priced == pytest.approx(true, rel=0.15)


def test_the_loss_is_the_exits_and_the_price_of_the_last_layers_weight(tokens):
    model = training.model().train()
    plan = schedule(len(model.model.layers), last_every=3)
    objective = bound(OBJECTIVE, model, plan, [batch(tokens[:1])])
    anchor = objective.anchor
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter += 0.05
    exits = ExitTraining(model, plan, objective)
    labels = tokens.clone()
    labels[:, :3] = IGNORED
    with exits:
        exits.begin(1, 10)
        loss = model(input_ids=tokens, labels=labels).loss
    model.eval()
    logits = model.model.norm(state(model, tokens))[:, :-1] @ model.lm_head.weight.T
    count = ROWS * (TOKENS - 3)
    ce = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    live = torch.arange(TOKENS).expand(ROWS, -1) > 0
    price = anchor.price(anchor.unmoved(input_ids=tokens), state(model, tokens), live)
    assert price > 0.01
    torch.testing.assert_close(loss, (0.2 * ce + 0.8 * price) / count)


def test_padding_and_first_tokens_have_no_price():
    labels = torch.tensor([[IGNORED, 5, IGNORED, 6, IGNORED, IGNORED]])
    positions = torch.tensor([[0, 1, 0, 1, 0, 1]])
    assert live_tokens(labels, positions).tolist() == [[False, True, False, True, False, False]]
    assert live_tokens(labels, None).tolist() == [[False, True, True, True, False, False]]


def test_nothing_above_the_exit_learns_and_measuring_leaves_no_trace(model, tokens):
    plan, was = schedule(model.config.num_hidden_layers), copy.deepcopy(model.state_dict())
    objective = bound(OBJECTIVE, model, plan, [batch(tokens[:1])])
    assert model.training
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    below = {parameter for layer in parts_of(model)[1][:EXIT] for parameter in layer.parameters()}
    assert names == {name for name, parameter in model.named_parameters() if parameter in below}
    exits = ExitTraining(model, plan, objective)
    with exits:
        exits.begin(0, 10)
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(torch.equal(value, was[name]) for name, value in model.state_dict().items())
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == names


def test_the_same_seed_gives_the_same_information(tokens):
    model = training.model()
    one, other, third = (fisher_information(model, EXIT, [batch(tokens)], seed) for seed in (0, 0, 1))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    torch.testing.assert_close(one, one.T)


@pytest.mark.parametrize(
    "changes",
    [{"freeze": "embeddings"}, {"curriculum": "all"}, {"lora": {}}, {"p_max": 0.1}],
    ids=lambda c: next(iter(c)),
)
def test_a_recipe_in_which_the_layers_above_would_move_is_refused(changes):
    with pytest.raises(UserError, match="anchor needs"):
        recipe_from({**ANCHORED, **changes})


def test_an_anchor_is_a_function_and_a_matrix():
    anchor = Anchor(lambda **inputs: inputs["x"], torch.eye(2))
    x = torch.zeros(1, 2, 2)
    assert float(anchor.price(x, x + 1, torch.tensor([[True, False]]))) == 1.0
