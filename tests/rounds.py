"""Drive an engine in tests and collect what it did."""

from collections import Counter
from dataclasses import dataclass, field, replace

from layerskip.decode.engine import Engine
from layerskip.decode.request import Request
from layerskip.decode.scheduler import Scheduler, raising

ENGINE_OPTIONS = ("draft_head", "prefill_chunk", "device_rounds")


@dataclass
class Record:
    """Tokens and rounds per prompt, and how often each accepted count and EOS offset occurred."""

    tokens: list
    rounds: list
    engine: Engine
    accepted: Counter = field(default_factory=Counter)  # (draft length, accepted) of full-length drafts
    eos_offsets: Counter = field(default_factory=Counter)  # place of an accepted EOS in its draft
    rejected_eos: int = 0  # an EOS was drafted and the target wanted something else

    @property
    def acceptance(self):
        drafted = sum(r.drafted for rounds in self.rounds for r in rounds)
        return sum(r.accepted for rounds in self.rounds for r in rounds) / max(1, drafted)


def decode(stack, prompts, new=48, exit_layer=None, draft_length=0, rows=None, capacity=None, **options):
    """Decode prompts with one engine (`rows` at a time); returns a `Record`.

    `each(index)` gives further options of one request; `capture` stands in for CUDA graphs.
    """
    given = {name: options.pop(name) for name in ENGINE_OPTIONS if name in options}
    capture, each = options.pop("capture", None), options.pop("each", lambda index: {})
    capacity = capacity or max(map(len, prompts)) + new
    engine = Engine(stack, rows=rows or len(prompts), capacity=capacity, **given)
    if capture is not None:
        engine.device_rounds.graphs.capture = capture
    requests = [
        replace(Request(prompt, new, exit_layer, draft_length, index=index, **options), **each(index))
        for index, prompt in enumerate(prompts)
    ]
    record = Record([[] for _ in prompts], [[] for _ in prompts], engine)
    for place, event in raising(Scheduler(engine).run(requests)):
        record.tokens[place] += event.tokens
        record.rounds[place].append(event)
        _note(record, event, requests[place].eos)
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


class Replayed:
    """Stand in for CUDA graphs: replay by running the function again, on the same buffers into the same output."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, function):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        function()  # the trial run
        outputs = function()

        def replay():
            outputs.copy_(function())
            return outputs

        return replay
