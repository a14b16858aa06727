"""Jobs that a test runs in one process and this script in two: `python training_ranks.py FOLDER PORT`.

Both ranks are forked from one process that has imported everything. A rank writes its results and leaves at
once: the threads of gloo do not survive an orderly end of the interpreter.
"""

import datetime
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import tiny
import training
from layerskip.errors import UserError
from layerskip.train.objective.exits import ExitTraining
from layerskip.train.objective.schedule import Schedule

ROTATING = {"p_max": 0.5, "curriculum": "rotational", "rotation": 2}
STEEP = {"p_max": 0.9, "drop_depth": "uniform", "exits": [2, 3]}  # most ranks keep no row of most layers
EARLY = {
    "p_max": 0.5,
    "exits": [2],
    "last_every": 8,
}  # at each step one rank has no row that goes all the way
ADAPTER = {
    "exit_adapter": True,
    "freeze": "model",
    "exits": [2],
    "curriculum": "fixed",
    "weighting": "uniform",
    "exit_loss": "kl",
    "adapter_hidden": 24,
}
TIMEOUT_S = 240


def replicated(folder, ranks, batch=8, accumulate=1, **recipe):
    """DDP through the trainer, the same global batch however many ranks."""
    run = training.trainer(
        folder,
        data=training.counting(64, masked=True),
        per_device_train_batch_size=batch // ranks // accumulate,
        gradient_accumulation_steps=accumulate,
        **recipe,
    )
    run.train()
    wrapped = type(run.model_wrapped).__name__
    return {"weights": training.weights(run), "loss": training.losses(run), "wrapped": wrapped}


def adapted(folder, ranks):
    """An adapter on a frozen model under DDP; one rank's first rows have nothing to learn."""
    rows = training.counting(32, masked=True)
    settings = {"per_device_train_batch_size": 8 // ranks, "max_steps": 3, "eval_dataset": rows[:7]}
    run = training.trainer(folder, data=rows, **ADAPTER, **settings)
    run.train()
    told = {key: value for key, value in run.evaluate().items() if "draft" in key or "round" in key}
    return {"weights": training.weights(run), "told": told, "wrapped": type(run.model_wrapped).__name__}


def evaluated(folder, ranks):
    """Seven rows do not fill the last batch of two ranks: what fills it must not count twice."""
    rows = training.counting(7, masked=True, seed=1)
    run = training.trainer(folder, eval_dataset=rows, per_device_eval_batch_size=2, exits=[2, 3])
    return {name: value for name, value in run.evaluate().items() if "exit" in name or "loss" in name}


class Wish(TrainerCallback):
    """One rank alone is told to stop."""

    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == args.world_size - 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def interrupted(folder, ranks):
    settings = {**ROTATING, "per_device_train_batch_size": 8 // ranks, "optim": "adamw_torch"}
    first = training.trainer(folder, callbacks=[Wish()], **settings)
    first.train()
    second = training.trainer(folder, start=training.model(seed=1), **settings)
    try:
        second.train(resume_from_checkpoint=True)
    except RuntimeError as error:  # transformers up to 5.17 and a bit: "cpu:0" is no place to load to
        if "restore data location" not in str(error):
            raise
        return None
    return {
        "stopped": (first.interrupted, first.state.global_step),
        "left": sorted(path.name for path in folder.iterdir()),
        "weights": training.weights(second),
        "straight": training.trained(folder, **settings),
    }


def poisoned(folder, ranks):
    """One row of one rank has a token whose embedding is not finite: all ranks must refuse, none may hang."""
    data = training.counting(64)
    data[10]["input_ids"] = torch.full_like(data[10]["input_ids"], tiny.VOCAB - 1)
    start = training.model()
    with torch.no_grad():
        start.model.embed_tokens.weight[tiny.VOCAB - 1] = float("nan")
    run = training.trainer(
        folder, data=data, start=start, per_device_train_batch_size=8 // ranks, max_steps=8
    )
    try:
        run.train()
    except UserError as error:
        return error.message
    return "trained on"


def sharded(folder, ranks, recompute=False, **recipe):
    """FSDP2 over each layer and the rest, with the exits attached before, as the trainer does."""
    rank, steps, rows = (dist.get_rank() if ranks > 1 else 0), 3, 4
    model = training.model().train()
    if recompute:
        model.gradient_checkpointing_enable()
    options = {"curriculum": "all", **recipe}
    exits = ExitTraining(model, Schedule(tiny.NUM_LAYERS, **options), distributed=ranks > 1)
    exits.attach()
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data, norms = training.counting(steps * rows, masked=True), []
    for step in range(steps):
        batch = data[step * rows : (step + 1) * rows]
        tokens = sum(int((row["labels"][1:] != -100).sum()) for row in batch)
        part = batch[rank * rows // ranks : (rank + 1) * rows // ranks]
        exits.begin(step, steps, rank * rows // ranks)
        named = {key: torch.stack([row[key] for row in part]) for key in ("input_ids", "labels")}
        loss = model(**named, num_items_in_batch=tokens).loss * ranks  # FSDP averages over ranks
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)))
        optimizer.step()
        optimizer.zero_grad()
    named = dict(model.named_parameters())
    return {
        "weights": {name: p.full_tensor() if ranks > 1 else p.detach() for name, p in named.items()},
        "sharded": all(isinstance(p, DTensor) for p in named.values()),
        "norms": norms,
        "calls": len(calls),
    }


def by_accelerate(folder, ranks):
    """FSDP2 as users start it, on one GPU or two; saves, and goes on from what it saved."""
    settings = {
        **ROTATING,
        "use_cpu": False,
        "per_device_train_batch_size": 8 // ranks,
        "save_strategy": "steps",
        "save_steps": 2,
        "fsdp": "full_shard",
        "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    }
    run = training.trainer(folder, **settings)
    run.train()
    again = training.trainer(folder, start=training.model(seed=1), **settings)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    whole = [
        {name: p.full_tensor().cpu() for name, p in one.model.named_parameters()} for one in (run, again)
    ]
    return {
        "weights": whole[0],
        "resumed": whole[1],
        "sharded": all(isinstance(p, DTensor) for p in run.model.parameters()),
        "loss": training.losses(run),
    }


def launched(name, *options):
    """What `accelerate launch` makes of a settings file of ours: arguments, and the variables it sets."""
    file = str(training.TESTS.parent / "examples" / "accelerate" / name)
    words = ["--config_file", file, *options, "--main_process_port", "0", "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


@contextmanager
def sharding_on_cpus():
    """Our settings for FSDP2, and accelerate takes processes on CPUs for GPUs: else it shards on no CPU."""
    made = PartialState.__init__

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    variables = prepare_multi_gpu_env(launched("fsdp2.yaml"))
    sharding = {key: value for key, value in variables.items() if "FSDP" in key}
    with mock.patch.object(PartialState, "__init__", init), mock.patch.dict(os.environ, sharding):
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def accelerated(folder, ranks):
    """FSDP2 as `accelerate launch` sets it up, through the trainer; saves, and goes on from what it saved."""
    if ranks == 1:
        return replicated(folder, ranks, **ROTATING)
    data = training.counting(64, masked=True)
    settings = {**ROTATING, "per_device_train_batch_size": 8 // ranks, "data": data}
    with sharding_on_cpus():
        run = training.trainer(folder / "sgd", **settings)
        run.train()
        settings |= {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
        straight = training.trainer(folder, **settings)
        straight.train()
        again = training.trainer(folder, start=training.model(seed=1), **settings)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        whole = [
            {name: p.full_tensor() for name, p in one.model.named_parameters()}
            for one in (run, straight, again)
        ]
    return {
        "weights": whole[0],
        "straight": whole[1],
        "resumed": whole[2],
        "loss": training.losses(run),
        "sharded": all(isinstance(p, DTensor) for p in run.model.parameters()),
    }


JOBS = {
    "replicated": (replicated, ROTATING),
    "replicated, accumulated": (replicated, {**ROTATING, "accumulate": 2}),
    "replicated, steep": (replicated, {**STEEP, "batch": 2}),
    "replicated, steep, recomputed": (replicated, {**STEEP, "batch": 2, "gradient_checkpointing": True}),
    "replicated, early rows": (replicated, EARLY),
    "replicated, early rows, recomputed": (replicated, {**EARLY, "gradient_checkpointing": True}),
    "replicated, plain": (replicated, {"e_scale": 0.0}),
    "adapted": (adapted, {}),
    "evaluated": (evaluated, {}),
    "interrupted": (interrupted, {}),
    "poisoned": (poisoned, {}),
    "sharded": (sharded, {"p_max": 0.5, "drop_depth": "uniform"}),
    "sharded, steep": (sharded, STEEP),
    "sharded, early rows": (sharded, EARLY),
    "sharded, recomputed": (sharded, {"recompute": True}),
    "accelerated": (accelerated, {}),
}
QUICK = ("replicated", "evaluated", "sharded")  # one of each kind, for `make test`
ON_DEVICES = {"by accelerate": (by_accelerate, {})}


def run_job(name, folder, ranks):
    job, options = {**JOBS, **ON_DEVICES}[name]
    folder.mkdir(exist_ok=True)
    return job(folder, ranks, **options)


def rank_main(rank, ranks, folder, port, backend):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.set_num_threads(1)
    results = {}
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        jobs = JOBS if os.environ.get("LAYERSKIP_FULL") == "1" else QUICK
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=60))
        for name in jobs if backend == "gloo" else ON_DEVICES:
            results[name] = run_job(name, folder / name, ranks)
    except BaseException:  # noqa: BLE001 - told to the test
        results["error"] = traceback.format_exc()
    torch.save(results, folder / f"rank{rank}.pt")
    sys.stdout.flush()
    os._exit(0)


def main(folder, port, ranks="2", backend="gloo"):
    children = []
    for rank in range(int(ranks)):
        if (child := os.fork()) == 0:
            rank_main(rank, int(ranks), Path(folder), port, backend)
        children.append(child)
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(child, signal.SIGKILL) for child in children])
    signal.alarm(TIMEOUT_S)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
