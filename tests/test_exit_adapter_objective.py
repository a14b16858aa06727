"""The exit adapter as an objective: the chain of its drafts, what it learns, its checkpoints."""

import pytest
import torch

import tiny
import training
from layerskip.errors import UserError
from layerskip.measure.exits.replay import runs
from layerskip.train.objective.exit_adapter import (
    DRAFTS,
    ExitAdapter,
    adapter_of,
    chained,
    places_of,
    runs_of,
)
from training_ranks import ADAPTER

SETTINGS = {**ADAPTER, "optim": "adamw_torch", "learning_rate": 3e-3}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the chain -----------------------------------------------------------------------------------------------


def test_a_draft_reads_what_the_one_before_it_made():
    early, final = normal(2, 9, 8), normal(2, 9, 8, seed=1)
    adapter = ExitAdapter(8, 1, blocks=1, hidden=6)
    with torch.no_grad():
        adapter.blocks[0].down.weight.normal_()
    places = torch.tensor(
        [4, 5, 8, 12]
    )  # of 18; the last two stand in the second row or at the end of the first

    def read(z):
        return z.tanh()

    states = chained(adapter, read, early, final, places, 3)
    for i, state in enumerate(states):
        for n, place in enumerate(places.tolist()):
            row, at = divmod(place, 9)
            c = final[row, at - i - 1]
            for back in range(i, -1, -1):  # its round began so many positions before
                c = read(adapter(early[row, at - back], c))
            torch.testing.assert_close(state[n], c)


def test_rounds_begin_where_their_drafts_have_enough_of_the_text_before_them():
    learnt = torch.tensor([[0, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], list(range(8))])
    assert places_of(learnt, positions, 2).tolist() == [2, 3, 6, *range(10, 15)]
    assert places_of(learnt[1:], None, 3).tolist() == [3, 4, 5, 6]


def test_rounds_are_counted_by_how_many_drafts_are_right():
    bits = [
        torch.tensor([1, 1, 0, 1]).bool(),
        torch.tensor([1, 1, 1, 1]).bool(),
        torch.tensor([0, 1, 1, 0]).bool(),
    ]
    places = torch.tensor([3, 4, 5, 9])
    # A round whose first draft stands at 3 has its second at 4, its third at 5.
    assert runs_of(bits, places, 12).tolist() == [3, 2, 1]


def test_runs_are_read_along_the_diagonal():
    bits = normal(3, 40).numpy() > -0.5
    found = runs(bits)
    for n in range(40):
        count = 0
        while n + count < 40 and bits[min(count, 2), n + count]:
            count += 1
        assert found[n] == count


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_the_adapter_learns_and_nothing_else_does(tmp_path, family):
    start = training.model(family)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    run = training.trainer(
        tmp_path, start=start, data=training.counting(64), eval_dataset=training.counting(8, seed=1),
        max_steps=40, **SETTINGS,
    )  # fmt: skip
    first = run.evaluate()
    run.train()
    last = run.evaluate()
    after = start.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert last["eval_tokens_per_round"] > first["eval_tokens_per_round"]
    assert last["eval_exit_2_agreement"] == pytest.approx(last["eval_draft_1_agreement"])
    shares = [last[f"eval_draft_{i}_agreement"] for i in range(1, DRAFTS + 1)]
    assert last["eval_tokens_per_round"] == pytest.approx(
        1 + sum(torch.tensor(shares).cumprod(0).tolist()), abs=1e-4
    )
    assert last["eval_loss"] == pytest.approx(first["eval_loss"])  # the last layer's


@pytest.mark.parametrize("loss", ["ce", "kl", "ce+kl"])
@pytest.mark.parametrize("vocabulary", [None, 12])
def test_the_loss_is_that_of_its_definition(tmp_path, loss, vocabulary):
    changes = {**SETTINGS, "exit_loss": loss, "exit_vocab": vocabulary, "adapter_steps": 2}
    run = training.trainer(tmp_path, data=training.counting(16), **changes)
    hf, adapter = run.exits.hf, adapter_of(run.exits.hf)
    with torch.no_grad():
        adapter.blocks[0].down.weight.normal_(0, 0.2)
    rows = training.counting(3, seed=2)
    tokens = torch.stack([row["input_ids"] for row in rows])
    hf.train()
    found = hf(input_ids=tokens, labels=tokens).loss
    with torch.no_grad():
        out = hf.base_model(tokens, output_hidden_states=True)
    early, final, norm = out.hidden_states[2], out.last_hidden_state, hf.base_model.norm
    ids = torch.arange(tiny.VOCAB) if vocabulary is None else torch.tensor(sorted(run.exits.bound.vocabulary))
    rows_of_head, total, count = hf.lm_head.weight[ids], 0.0, 0
    for b in range(3):
        for t in range(2, training.LENGTH - 1):
            wanted = (ids == tokens[b, t + 1]).nonzero()
            if not len(wanted):
                continue
            law, count = (rows_of_head @ final[b, t]).log_softmax(-1), count + 1
            one = norm(adapter(early[b, t], final[b, t - 1]))
            two = norm(adapter(early[b, t], norm(adapter(early[b, t - 1], final[b, t - 2]))))
            for weight, state in ((1 / 1.8, one), (0.8 / 1.8, two)):
                own = (rows_of_head @ state).log_softmax(-1)
                ce, kl = -own[wanted[0, 0]], (law.exp() * (law - own)).sum()
                total = total + weight * {"ce": ce, "kl": kl, "ce+kl": ce + kl}[loss]
    torch.testing.assert_close(found, total / count, rtol=1e-4, atol=1e-5)
    found.backward()
    (wanted_gradient,) = torch.autograd.grad(total / count, [adapter.join.weight])
    torch.testing.assert_close(adapter.join.weight.grad, wanted_gradient, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_holds_the_adapter_alone_and_a_run_goes_on_exactly(tmp_path):
    settings = {
        **SETTINGS,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
        "lr_scheduler_type": "cosine",
    }
    straight = training.trained(tmp_path / "straight", **settings)
    weights = list((tmp_path / "straight" / "checkpoint-3").glob("*.safetensors"))
    assert (
        sum(file.stat().st_size for file in weights)
        < 4 * sum(p.numel() for p in ExitAdapter(32, 2, 1, 24).parameters()) + 2000
    )
    resumed = training.trainer(tmp_path / "straight", **settings)
    resumed.train(str(tmp_path / "straight" / "checkpoint-3"))
    assert training.difference(training.weights(resumed), straight) == 0.0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"freeze": "nothing"}, "exit_adapter needs freeze=model"),
        ({"exits": [1, 2]}, "exit_adapter needs"),
        ({"last_every": 2, "exit_loss": "ce"}, "exit_adapter needs"),
        ({"exit_map": True, "exit_vocab": 8}, "exclude each other"),
        ({"adapter_steps": 0}, "adapter_steps from 1"),
        (
            {"exit_adapter": False, "freeze": "nothing", "exits": [0]},
            "exit 0, the embedding, is for an adapter",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        training.trainer(tmp_path, **{**SETTINGS, **changes})
