"""Training runs that kill themselves at a bad moment, each in a fork: `training_kills.py FOLDER MOMENT...`."""

import os
import signal
import sys
from pathlib import Path

import torch
import transformers.modeling_utils
from transformers import TrainerCallback

import training

SETTINGS = {
    "p_max": 0.5,
    "curriculum": "rotational",
    "rotation": 2,
    "optim": "adamw_torch",
    "lr_scheduler_type": "cosine",
    "learning_rate": 0.01,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run(folder, start=None, callbacks=(), **changes):
    """A run over an epoch and a half, with everything in it that has a state."""
    data = training.counting(36, masked=True)
    return training.trainer(folder, data=data, start=start, callbacks=callbacks, **{**SETTINGS, **changes})


def half(write, name, when):
    """Let a writing function stop for ever in the middle of its `when`-th file called `name`."""
    seen = []

    def writing(content, path, *args, **kwargs):
        write(content, path, *args, **kwargs)
        if Path(path).name == name:
            seen.append(path)
            if len(seen) == when:
                os.truncate(path, os.path.getsize(path) // 2)
                die()

    return writing


class InStep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            die()


def in_step(folder):
    run(folder, callbacks=[InStep()]).train()


def in_weights(folder):
    module = transformers.modeling_utils
    module.safe_save_file = half(module.safe_save_file, "model.safetensors", 2)
    run(folder).train()


def in_optimizer(folder):
    torch.save = half(torch.save, "optimizer.pt", 2)
    run(folder).train()


def before_the_name(folder):
    rename = Path.rename

    def dying(self, target):
        if Path(target).name == "checkpoint-4":
            die()
        return rename(self, target)

    Path.rename = dying
    run(folder).train()


MOMENTS = (in_step, in_weights, in_optimizer, before_the_name)


def main(root, *names):
    for moment in (moment for moment in MOMENTS if moment.__name__ in names):
        folder = Path(root) / moment.__name__
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            moment(folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{moment.__name__} survived"
        assert os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    main(*sys.argv[1:])
