"""The loss at several exits against autograd on whole logits, in every variant."""

import pytest
import torch
import torch.nn.functional as F

import tiny
from layerskip.errors import UserError
from layerskip.train.objective import loss as losses
from layerskip.train.objective.exits import ExitTraining
from layerskip.train.objective.loss import multi_exit_loss
from layerskip.train.objective.objective import Objective
from layerskip.train.objective.schedule import Schedule

WIDTH, VOCAB, TOKENS = 16, 50, 37
WEIGHTS = {2: 0.2, 3: 0.0, 4: 0.3, 6: 0.5}


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
    states = {k: make(TOKENS, WIDTH) for k in WEIGHTS}
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return states, labels, make(VOCAB, WIDTH), make(VOCAB)


def whole(states, labels, head, bias, softcap, exit_loss, divisor, reference=None):
    """The definition, with the logits of every exit in memory."""

    def read(x):
        z = x @ head.T + bias
        return softcap * torch.tanh(z / softcap) if softcap else z

    logits = {k: read(x) for k, x in states.items()}
    last = max(states)
    teacher = logits[last].detach().log_softmax(-1)
    total = 0.0
    for k, z in logits.items():
        ce = F.cross_entropy(z, labels, reduction="sum")
        kl = F.kl_div(z.log_softmax(-1), teacher, log_target=True, reduction="sum")
        parts = {"ce": ce, "kl": kl, "ce+kl": ce + kl}
        if reference is not None:
            law = read(reference).detach().log_softmax(-1)
            ce = F.kl_div(z.log_softmax(-1), law, log_target=True, reduction="sum")
        total = total + WEIGHTS[k] * (ce if k == last else parts[exit_loss]) / divisor
    return total, logits


@pytest.mark.parametrize("exit_loss", ["ce", "kl", "ce+kl"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("stays", [False, True], ids=["the last layer learns", "the last layer stays"])
def test_loss_and_gradients_equal_the_definition(monkeypatch, exit_loss, softcap, stays):
    monkeypatch.setitem(losses.CHUNK, "cpu", 8 * VOCAB)  # several chunks, the last one short
    states, labels, head, bias = case()
    reference = states[6].detach().flip(0) if stays else None
    inputs = [*states.values(), head, bias]
    expected, logits = whole(states, labels, head, bias, softcap, exit_loss, 11, reference)
    wanted = torch.autograd.grad(3.0 * expected, inputs)
    found, sums = multi_exit_loss(states, labels, WEIGHTS, head, bias, softcap, exit_loss, 11, reference)
    gradients = torch.autograd.grad(3.0 * found, inputs)
    # logits and the head's accumulator are float32, whatever the weights are
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    best = logits[6].argmax(-1)
    for place, k in enumerate(sums.exits):
        assert sums.agreement[place] == (logits[k].argmax(-1) == best).sum()
        ce = F.cross_entropy(logits[k], labels, reduction="sum")
        torch.testing.assert_close(sums.ce[place].double(), ce, rtol=1e-5, atol=1e-5)
    assert sums.exits == (2, 3, 4, 6)
    assert sums.tokens == TOKENS


def test_the_teacher_gets_no_gradient():
    states, labels, head, bias = case()
    weights = {2: 1.0, 6: 0.0}
    pair = {2: states[2], 6: states[6]}
    loss, _ = multi_exit_loss(pair, labels, weights, head, bias, exit_loss="kl")
    loss.backward()
    assert torch.count_nonzero(states[6].grad) == 0
    assert torch.count_nonzero(states[2].grad)


def test_no_tokens_give_no_loss_and_no_gradient():
    states, labels, head, bias = case()
    none = {k: x[:0] for k, x in states.items()}
    loss, sums = multi_exit_loss(none, labels[:0], WEIGHTS, head, bias)
    loss.backward()
    assert loss == 0.0
    assert sums.tokens == 0
    assert torch.count_nonzero(head.grad) == 0


def test_a_frozen_head_gets_no_accumulator(monkeypatch):
    """LoRA freezes the head: its gradient, the size of the head, is never made."""
    states, labels, head, bias = case()
    head.requires_grad_(False)
    bias.requires_grad_(False)
    made = []
    original = losses._Work.__init__
    monkeypatch.setattr(
        losses._Work, "__init__", lambda self, *a: (original(self, *a), made.append(self.d_head))[0]
    )
    multi_exit_loss(states, labels, WEIGHTS, head, bias)[0].backward()
    assert made == [None]
    assert states[2].grad is not None


def test_logits_of_all_exits_never_stand_together(monkeypatch):
    """Nothing of size [tokens, vocabulary] is made: the largest float tensor is a chunk or the head."""
    monkeypatch.setitem(losses.CHUNK, "cpu", 2 * VOCAB)
    states, labels, head, bias = case(torch.float32)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t))
            return out

    with Watch():
        multi_exit_loss(states, labels, WEIGHTS, head, bias)[0].backward()
    assert max(seen) <= max(2 * VOCAB, head.numel()) < TOKENS * VOCAB


def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients():
    states, labels, head, bias = case(torch.float32)
    exact, _ = multi_exit_loss(states, labels, WEIGHTS, head, bias)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = multi_exit_loss(states, labels, WEIGHTS, head, bias)
    loss.backward()
    assert loss.dtype == head.grad.dtype == torch.float32
    assert loss != exact  # it did run in 16 bit
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0.0)


def test_an_unknown_loss_is_refused():
    with pytest.raises(UserError, match=r"ce\+kl|'kl'"):
        ExitTraining(tiny.random_model("llama"), Schedule(tiny.NUM_LAYERS), Objective(exit_loss="kll"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_exit_reads_what_generation_reads(family):
    """Loss of an attached model: cross entropy on the stack's own logits at each exit."""
    model = tiny.random_model(family)
    tokens = torch.randint(2, tiny.VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :3] = -100
    stack = tiny.stack(family, model=model)
    from layerskip.model.step import Step

    step = Step.span(range(3), [0] * 3, [8] * 3, stack.device, spill=8)
    exits = (2, 4)
    with torch.no_grad():
        h, taps = stack.run(
            stack.embed(tokens, step), 0, tiny.NUM_LAYERS, step, stack.new_cache(3, 8), taps=exits
        )
    expected = {
        k: F.cross_entropy(stack.logits(x)[:, :-1].reshape(-1, tiny.VOCAB), labels[:, 1:].reshape(-1)).item()
        for k, x in {**taps, tiny.NUM_LAYERS: h}.items()
    }
    with ExitTraining(model, Schedule(tiny.NUM_LAYERS, exits=exits)) as training, torch.no_grad():
        loss = model(input_ids=tokens, labels=labels).loss
        totals = training.drain()
    assert {k: float(total) / totals.tokens[k] for k, total in totals.ce.items()} == pytest.approx(
        expected, rel=1e-4
    )
    assert loss.item() == pytest.approx(expected[tiny.NUM_LAYERS], rel=1e-4)  # evaluation: the final layer's
