"""Drive an engine in tests and collect what it did."""

from collections import Counter
from dataclasses import dataclass, field

from layerskip.decode.engine import Engine
from layerskip.decode.round import Request


@dataclass
class Record:
    """Tokens and rounds per prompt, and how often each accepted count and EOS offset occurred."""

    tokens: list
    rounds: list
    accepted: Counter = field(default_factory=Counter)  # (draft length, accepted) of full-length drafts
    eos_offsets: Counter = field(default_factory=Counter)  # place of an accepted EOS in its draft
    rejected_eos: int = 0  # an EOS was drafted and the target wanted something else

    @property
    def acceptance(self):
        drafted = sum(r.drafted for rounds in self.rounds for r in rounds)
        return sum(r.accepted for rounds in self.rounds for r in rounds) / max(1, drafted)


def decode(stack, prompts, new=48, exit_layer=None, draft_length=0, rows=None, capacity=None, **options):
    """Decode prompts with one engine (`rows` at a time); returns a `Record`."""
    draft_head, chunk = options.pop("draft_head", None), options.pop("prefill_chunk", 512)
    capacity = capacity or max(map(len, prompts)) + new
    engine = Engine(
        stack, rows=rows or len(prompts), capacity=capacity, draft_head=draft_head, prefill_chunk=chunk
    )
    waiting = [
        Request(prompt, new, exit_layer, draft_length, index=index, **options)
        for index, prompt in enumerate(prompts)
    ]
    record = Record([[] for _ in prompts], [[] for _ in prompts])
    running = {}
    while waiting or running:
        while waiting and len(running) < len(engine.cache.lengths):
            request = waiting.pop(0)
            running[engine.add(request)] = request
        for round in engine.step():
            request = running[round.row]
            record.tokens[request.index] += round.tokens
            record.rounds[request.index].append(round)
            _note(record, round, request.eos)
            if round.finish_reason:
                del running[round.row]
    assert not engine.busy
    return record


def _note(record, round, eos):
    if len(round.draft) == round.draft_length:
        record.accepted[round.draft_length, round.accepted] += 1
    if round.draft and round.draft[-1] in eos:
        if round.finish_reason == "eos" and round.accepted == len(round.draft):
            record.eos_offsets[len(round.draft) - 1] += 1
        elif round.accepted < len(round.draft):
            record.rejected_eos += 1
