"""Training the exit adapter: what is learnt is what the engine drafts with, and the model stays as it is."""

import hashlib
import itertools
import json
import shutil
import signal
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import layerskip
import tiny
import training
from layerskip.checkpoint.delta import apply_delta, make_delta
from layerskip.checkpoint.facts import fingerprint
from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.measure.exits.continuations import Continuation, observed
from layerskip.measure.exits.replay import replay
from layerskip.train.data.encoding import IGNORED
from layerskip.train.data.states import StatesFile, made_by
from layerskip.train.job import export
from layerskip.train.job.recipe import as_yaml, read_recipe
from layerskip.train.job.run import finish, prepare
from layerskip.train.objective.binding import shape
from layerskip.train.objective.exit_adapter import embedded
from layerskip.train.objective.exits import ExitTraining
from layerskip.train.objective.objective import Objective
from layerskip.train.objective.schedule import Schedule
from layerskip.train.objective.store import StateStore
from layerskip.watch import silent


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- from data to a folder that drafts -----------------------------------------------------------------------


E = 0  # the recipe's
PROMPTS = [f"say {n} {word} {n * n}" for n in range(30) for word in ("abc", "and")]


@pytest.fixture(scope="module")
def own(folder, tmp_path_factory):
    """What distill-data writes: prompts and the model's own answers."""
    lm, file = layerskip.load(str(folder), dtype="float32"), tmp_path_factory.mktemp("own") / "own.jsonl"
    lines = []
    for prompt in PROMPTS:
        ids = lm.encode(prompt)
        made = lm.generate(ids, mode="ar", max_new_tokens=40)
        text, tokens = made.text, made.tokens
        mask = [0] * len(ids) + [1] * len(tokens)
        told = {"prompt": prompt, "completion": text, "finish_reason": made.finish_reason}
        lines.append(json.dumps({**told, "input_ids": ids + tokens, "completion_mask": mask}))
    file.write_text("\n".join(lines) + "\n")
    return file


def recipe(folder, own, output, *more):
    settings = [
        f"model={folder}", f"data={own}", f"output={output}", "length=96", "template=off", "dtype=float32",
        "epochs=12", "batch_size=4", "exit_vocab=40", "learning_rate=1e-2", "hold_out=8", *more,
    ]  # fmt: skip
    return read_recipe("exit-adapter", settings)


@pytest.fixture(scope="module")
def made(folder, own, tmp_path_factory):
    run = prepare(recipe(folder, own, tmp_path_factory.mktemp("made") / "out"))
    return run, finish(run)


def test_a_run_leaves_the_weights_as_they_were_and_a_folder_that_drafts(made, folder):
    run, result = made
    kept = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert kept
    for name, content in kept.items():
        assert hashlib.sha256((run.output / name).read_bytes()).digest() == hashlib.sha256(content).digest()
    lm = layerskip.load(str(run.output), dtype="float32")
    assert (lm.facts.exits, lm.facts.exit_adapter) == ((E,), "exit_adapter.safetensors")
    head = lm.draft_head(Options(exit_layer=E, draft_length=3))
    assert head.adapter is not None
    assert head.size == 40
    plain = lm.generate(PROMPTS[3], mode="ar", max_new_tokens=40)
    drafted = lm.generate(PROMPTS[3], exit_layer=E, draft_length=3, max_new_tokens=40)
    assert drafted.tokens == plain.tokens
    assert drafted.stats["accepted"] > 0
    assert (
        plain.tokens
        == layerskip.load(str(folder), dtype="float32")
        .generate(PROMPTS[3], mode="ar", max_new_tokens=40)
        .tokens
    )
    assert {"draft_1_agreement", "tokens_per_round"} <= result.keys()


@pytest.mark.parametrize(
    "settings",
    [
        ("exit-adapter",),
        (
            "finetune",
            "exit_map=true",
            "exit_vocab=40",
            "exits=[2]",
            "curriculum=fixed",
            "p_max=0",
            "freeze=embeddings",
        ),
    ],
)
def test_a_sharded_run_is_gathered_with_what_was_put_on_the_model(settings):
    """Shards are those of FSDP2 elsewhere; here the model is whole and said to be sharded."""
    chosen, model = read_recipe(settings[0], ["model=x", "data=x", *settings[1:]]), training.model()
    schedule = Schedule(tiny.NUM_LAYERS, curriculum="fixed", weighting="uniform", exits=tuple(chosen.exits))
    shape(Objective.of(chosen), model, schedule)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    trainer = SimpleNamespace(
        is_fsdp_enabled=True, model=model, args=SimpleNamespace(process_index=0),
        exits=SimpleNamespace(hf=model, schedule=schedule),
        accelerator=SimpleNamespace(
            unwrap_model=lambda model, **_: model, get_state_dict=lambda model: model.state_dict()
        ),
    )  # fmt: skip
    gathered = export._whole(trainer, chosen)
    assert gathered is not model
    assert training.difference(gathered.state_dict(), model.state_dict()) == 0.0
    assert {"exit_adapter", "exit_map"} & {name.split(".")[0] for name in gathered.state_dict()}


def test_an_adapter_learns_from_prompts_too_and_is_judged_on_answers(made, own):
    run, _ = made
    (row,) = (run.train_rows[i] for i in range(1))
    assert (
        (row["labels"] != IGNORED) == (row["position_ids"] > 0)
    ).all()  # nothing predicts a text's first token
    held = [run.eval_rows[i] for i in range(len(run.eval_rows))]
    assert run.plan["held_out"] == 8
    kept = [json.loads(line)["completion_mask"] for line in own.read_text().splitlines()]
    sizes = {(len(mask), sum(mask)) for mask in kept}
    for row in held:
        begins = [*(row["position_ids"] == 0).nonzero()[:, 0].tolist(), len(row["labels"])]
        for first, last in itertools.pairwise(begins):
            learnt = row["labels"][first:last] != IGNORED
            assert (last - first, int(learnt.sum())) in sizes


def test_what_one_pass_says_is_what_rounds_do(made):
    """`doctor` and `tune` predict from one pass: here its rounds are the engine's."""
    lm = layerskip.load(str(made[0].output), dtype="float32")
    for length in (1, 3, 8):
        kept, told = [], []
        for prompt in (PROMPTS[7], "abc abc", PROMPTS[40]):
            ids, budget = lm.encode(prompt), 40
            plain = lm.generate(ids, mode="ar", max_new_tokens=budget)
            found = [Continuation(ids, plain.tokens, plain.finish_reason != "length")]
            seen = observed(lm, found, [E], [40], [E], silent)
            made_of = replay(seen.bits[E, 40][0], length, budget - 1)
            told.append(made_of.accepted.tolist())
            rounds = lm.generate(ids, exit_layer=E, draft_length=length, max_new_tokens=budget).rounds[1:]
            kept.append([round.accepted for round in rounds])
        assert told == kept
        assert sum(itertools.chain(*kept)) > 0


def test_an_adapter_that_does_not_fit_is_refused(made, tmp_path):
    lm = layerskip.load(str(made[0].output), dtype="float32")
    lm.facts = replace(lm.facts, exit_adapter="config.json")
    lm._heads.clear()
    with pytest.raises(UserError, match="cannot read the exit adapter"):
        lm.draft_head(Options(exit_layer=E, draft_length=3))


# -- states kept on the disk ---------------------------------------------------------------------------------


def test_kept_states_train_what_computed_ones_train(folder, own, made, tmp_path):
    """With AdamW: Muon works in bfloat16 and makes the last bit's difference larger.

    The first rows were run alone, for the regression, and are kept so: other sums than in a batch.
    """
    kept = prepare(recipe(folder, own, tmp_path / "kept", "optimizer=adamw"))
    finish(kept)
    anew = prepare(recipe(folder, own, tmp_path / "anew", "optimizer=adamw", "states_gb=0"))
    finish(anew)
    one, other = (load_file(run.output / "exit_adapter.safetensors") for run in (kept, anew))
    assert training.difference(one, other) < 10 * training.SAME
    assert not (kept.output / ".states").exists()


def test_a_killed_run_goes_on_with_the_states_it_had(folder, own, made, tmp_path):
    """Bit for bit: the run of `made`, which nothing stopped, has the same adapter."""
    script = (
        "import os, signal, sys\n"
        "from layerskip.train.job.recipe import read_recipe\n"
        "from layerskip.train.job.run import finish, prepare\n"
        "from transformers import TrainerCallback\n"
        "class Kill(TrainerCallback):\n"
        "    def on_pre_optimizer_step(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 17: os.kill(os.getpid(), signal.SIGKILL)\n"
        "finish(prepare(read_recipe(sys.argv[1])), [Kill()])\n"
    )
    settings = recipe(folder, own, tmp_path / "out", "save_every=10")
    (tmp_path / "recipe.yaml").write_text(as_yaml(settings))
    command, environment = training.in_tests("-c", script, tmp_path / "recipe.yaml")
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "out" / ".states").exists()
    run = prepare(settings, resume=True)
    assert run.checkpoint.name == "checkpoint-10"
    finish(run)
    one, other = (load_file(r.output / "exit_adapter.safetensors") for r in (run, made[0]))
    assert training.difference(one, other) == 0.0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_what_the_first_layer_reads_is_found_without_running_it(family):
    hf = training.model(family).eval()
    tokens = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    with torch.no_grad():
        wanted = hf.base_model(tokens, output_hidden_states=True).hidden_states[0]
        assert torch.equal(embedded(hf, tokens), wanted)


def with_states(folder, own, tmp_path, name="own.jsonl"):
    """The data of `own` with the states of the model of `folder` beside them, of this file name."""
    lm = layerskip.load(str(folder), dtype="float32", stack="hf")
    lines = [json.loads(line) for line in own.read_text().splitlines()]
    made = made_by(fingerprint(folder), torch.float32)
    with StatesFile(tmp_path / "own.states", [], made) as file:
        for line in lines:
            with torch.no_grad():
                final = lm.hf.base_model(torch.tensor([line["input_ids"]])).last_hidden_state[0]
            line["states"] = file.append(final[:-1])
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / name


@pytest.mark.parametrize("lost", ["none", "some", "others"])
def test_states_that_came_with_the_data_train_what_computed_ones_train(
    folder, own, tmp_path, lost, monkeypatch
):
    """A bad disk loses some (read at the start, then in both epochs), or all are another model's."""
    data = with_states(folder, own, tmp_path)
    if lost == "some":
        with (tmp_path / "own.states").open("r+b") as file:
            file.write(b"xx")
    if lost == "others":
        data.write_text(data.read_text().replace('"of": "', '"of": "0'))
    runs = []
    for name, source in (("given", data), ("computed", own)):
        settings = recipe(folder, source, tmp_path / name, "optimizer=adamw", "exits=[0]", "epochs=2")
        run, passes = prepare(settings), []

        def counted(exits, inputs, wanted, inner=ExitTraining.states_of, passes=passes):
            passes.append(len(inputs["input_ids"]))
            return inner(exits, inputs, wanted)

        with monkeypatch.context() as patch:
            patch.setattr(ExitTraining, "states_of", counted)
            finish(run)
        runs.append((run, sum(passes)))
    one, other = (load_file(run.output / "exit_adapter.safetensors") for run, _ in runs)
    assert training.difference(one, other) < 10 * training.SAME
    (given, rows), (_, all_rows) = runs
    judged = len(given.eval_rows)
    assert all_rows == len(given.train_rows) + judged
    assert rows - judged == {"none": 0, "some": 3, "others": len(given.train_rows)}[lost]


def test_a_store_gives_back_whole_states_of_the_rows_it_has_room_for(tmp_path):
    given = {
        "rows": range(5),
        "planes": 2,
        "length": 7,
        "width": 3,
        "dtype": torch.bfloat16,
        "budget": 3 * 2 * 7 * 3 * 2 + 1,
        "key": "a",
    }
    store, early, final = (
        StateStore(tmp_path / "s", **given),
        normal(2, 7, 3).bfloat16(),
        normal(2, 7, 3, seed=1).bfloat16(),
    )
    both = torch.stack([early, final], 1)  # [2, P, T, D]
    assert store.get(0, 7) is None
    store.put(0, both[0])
    store.put(2, both[1, :, :4])
    store.put(4, both[0])  # beyond the budget
    assert store.get(4, 7) is None
    for opened in (store, StateStore(tmp_path / "s", **given)):
        assert torch.equal(opened.get(0, 7), both[0])
        assert torch.equal(opened.get(2, 4), both[1, :, :4])
    assert store.get(2, 5) is None  # of another length: never written so
    with (tmp_path / "s" / "states").open("r+b") as file:
        file.seek(3)
        file.write(b"xx")
    assert store.get(0, 7) is None
    assert store.get(2, 4) is not None
    assert StateStore(tmp_path / "s", **{**given, "key": "b"}).get(2, 4) is None
    store.remove()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_holds_an_adapter_and_gives_it_back(folder, made, tmp_path, dtype):
    trained = shutil.copytree(made[0].output, tmp_path / "trained")
    adapter = {
        key: weight.to(dtype) for key, weight in load_file(trained / "exit_adapter.safetensors").items()
    }
    save_file(adapter, trained / "exit_adapter.safetensors")
    report = make_delta(folder, trained, tmp_path / "made.safetensors", 1_000_000, {"licence": "MIT"})
    assert report["kept"] == 1.0
    apply_delta(folder, tmp_path / "made.safetensors", tmp_path / "out")
    for name in ("model.safetensors", "exit_adapter.safetensors"):
        one, other = (load_file(path / name) for path in (trained, tmp_path / "out"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    lm = layerskip.load(str(tmp_path / "out"), dtype="float32")
    told = lm.generate(PROMPTS[3], exit_layer=E, draft_length=3, max_new_tokens=40)
    assert told.stats["accepted"] > 0


def test_a_model_in_memory_learns_to_draft_for_itself(tmp_path):
    model, tokenizer = tiny.speaking()
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learns = [parameter.requires_grad for parameter in model.parameters()]
    plain = layerskip.generate(model, prompts[3], tokenizer=tokenizer, mode="ar", max_new_tokens=32)
    told = layerskip.train_adapter(
        model, tokenizer, prompts, output=tmp_path / "out", max_new_tokens=32, epochs=6, learning_rate=1e-2
    )
    assert {"draft_1_agreement", "tokens_per_round", "predicted_speedup"} <= told.keys()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    own = {id(parameter) for parameter in model.exit_adapter.parameters()}
    assert [p.requires_grad for p in model.parameters() if id(p) not in own] == learns
    options = {"exit_layer": E, "draft_length": 3, "max_new_tokens": 32}
    drafted = layerskip.generate(model, prompts[3], tokenizer=tokenizer, **options)
    assert drafted.tokens == plain.tokens
    assert drafted.stats["accepted"] > 0
    loaded = layerskip.load(str(tmp_path / "out"), dtype="float32", stack="hf").generate(
        prompts[3], **options
    )
    assert [r.draft for r in loaded.rounds] == [r.draft for r in drafted.rounds]
    found = model.generate(
        torch.tensor([prompts[3]]),
        max_new_tokens=32,
        do_sample=False,
        custom_generate=layerskip.custom_generate,
    )
    assert found[0, len(prompts[3]) :].tolist() == plain.tokens


def test_too_few_prompts_are_refused():
    model, tokenizer = tiny.speaking()
    with pytest.raises(UserError, match="3 prompts teach an adapter nothing"):
        layerskip.train_adapter(model, tokenizer, ["a", "b", "c"])
