"""Short training runs of tiny models on counting sequences, shared by the tests of the trainer."""

import os
import sys
from pathlib import Path

import torch
from filelock import FileLock

import tiny
from layerskip.train.job.recipe import read_recipe
from layerskip.train.objective.schedule import Schedule
from layerskip.train.trainer import LayerSkipArguments, LayerSkipTrainer

TESTS = Path(__file__).parent
LENGTH = 12

# Two runs that sum over the same tokens in another order: a unit in the last place of weights of order one (1.2e-7
# measured, after four steps of gradient descent). A micro-batch weighted wrongly, or masks drawn for other rows,
# change weights by 1e-2.
SAME = 1e-6


def counting(num_rows, masked=False, seed=0):
    """Rows that count up by 1 to 3; `masked` leaves between one and all tokens with a label."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        start, pace, hidden = (int(torch.randint(n, (), generator=generator)) for n in (20, 3, LENGTH - 1))
        tokens = torch.arange(LENGTH) * (pace + 1) + start
        labels = tokens.clone()
        if masked:
            labels[:hidden] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def tiny_recipe(folder, data, output, *settings):
    """The smoke recipe on a tiny checkpoint and data for it."""
    return read_recipe(
        "tiny",
        [f"model={folder}", f"data={data}", f"output={output}", "exits=[2, 3]", "length=48", "log_every=1",
         "template=off", "dtype=float32", *settings],
    )  # fmt: skip


def model(family="llama", **changes):
    made = tiny.random_model(family, **changes)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.25)  # tiny's matrices are large, so that exits differ; training wants less
    return made


def one_exit(layers, exit_layer, **changes):
    """A schedule with one exit on at every step and no layer dropout."""
    settings = {"p_max": 0.0, "weighting": "uniform", "curriculum": "fixed", "exits": (exit_layer,)}
    return Schedule(layers, **{**settings, **changes})


def arguments(output, **changes):
    """Four steps of eight rows on the CPU; plain gradient descent shows an error of scale that Adam hides."""
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.1,
        "max_grad_norm": 100.0,  # clipping too would hide a wrong scale
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "p_max": 0.0,
        "curriculum": "all",
    }
    return LayerSkipArguments(str(output), **{**settings, **changes})


def trainer(output, data=None, start=None, eval_dataset=None, callbacks=(), **changes):
    return LayerSkipTrainer(
        model=model() if start is None else start,
        args=arguments(output, **changes),
        train_dataset=counting(64) if data is None else data,
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
    )


def trained(output, **options):
    """Weights after a run, by name."""
    run = trainer(output, **options)
    run.train()
    return weights(run)


def weights(run):
    return {name: value.detach().clone() for name, value in run.exits.hf.state_dict().items()}


def difference(one, other):
    """Worst difference of two runs' weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def losses(run, key="loss"):
    return [entry[key] for entry in run.state.log_history if key in entry]


def once(tmp_path_factory, name, make):
    """A folder that `make` filled once, however many processes pytest runs on."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder


def in_tests(*arguments):
    """Command line and environment of a script of this folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    return [sys.executable, *map(str, arguments)], environment
