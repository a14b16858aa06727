"""Two processes train what one trains: DDP through the trainer, FSDP2 over the model with exits attached."""

import os
import socket
import subprocess

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

import training
import training_ranks
from layerskip.train.job.recipe import FSDP_SETTINGS
from training_ranks import JOBS, QUICK


def jobs(kind):
    """The jobs of a kind; one of them is quick."""
    names = (name for name in JOBS if name.startswith(kind))
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def started(folder, *arguments):
    """Run the script over its jobs; the results of each rank, by job."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command, environment = training.in_tests(training.TESTS / "training_ranks.py", folder, port, *arguments)
    with open(folder / "output", "w") as output:
        subprocess.run(command, env=environment, stdout=output, stderr=output, check=True)


def results(folder, ranks):
    found = [
        torch.load(path, weights_only=True) if path.exists() else {"error": (folder / "output").read_text()}
        for path in (folder / f"rank{rank}.pt" for rank in range(ranks))
    ]
    errors = [result["error"] for result in found if "error" in result]
    assert not errors, errors[0]
    return found


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    if not hasattr(os, "fork") or not torch.distributed.is_available():
        pytest.skip("needs fork and torch.distributed")
    return results(training.once(tmp_path_factory, "ranks", started), 2)


@pytest.mark.parametrize("name", jobs("replicated"))
def test_two_replicas_train_what_one_process_trains(two, tmp_path, name):
    one = training_ranks.run_job(name, tmp_path, 1)
    for rank in two:
        assert rank[name]["wrapped"] == "DistributedDataParallel"
        assert training.difference(rank[name]["weights"], one["weights"]) < training.SAME
        for ours, theirs in zip(rank[name]["loss"], one["loss"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
    assert training.difference(one["weights"], training.model().state_dict()) > 1e-2


@pytest.mark.slow
def test_two_replicas_train_the_adapter_that_one_process_trains(two, tmp_path):
    one = training_ranks.run_job("adapted", tmp_path, 1)
    for rank in two:
        assert rank["adapted"]["wrapped"] == "DistributedDataParallel"
        assert training.difference(rank["adapted"]["weights"], one["weights"]) < training.SAME
        assert rank["adapted"]["told"] == pytest.approx(one["told"])
    assert one["told"]["eval_tokens_per_round"] >= 1.0


def test_rows_that_fill_up_a_batch_are_not_measured_twice(two, tmp_path):
    """Accelerate repeats rows to make the last batch of all ranks even; sums over tokens counted them again."""
    one = training_ranks.run_job("evaluated", tmp_path, 1)
    for rank in two:
        assert rank["evaluated"] == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_they_resume_exactly(two):
    for rank in two:
        if (result := rank["interrupted"]) is None:
            pytest.skip("this transformers cannot resume several processes on a CPU")
        assert result["stopped"] == (True, 2)
        assert result["left"] == ["checkpoint-2"]
        assert training.difference(result["weights"], result["straight"]) == 0.0


@pytest.mark.slow
def test_all_ranks_refuse_a_loss_that_is_not_finite_on_one(two, tmp_path):
    one = training_ranks.run_job("poisoned", tmp_path, 1)
    assert one.startswith("the loss of exit 2, exit 3, exit 4, the final layer is not finite at step")
    assert [rank["poisoned"] for rank in two] == [one, one]


@pytest.mark.parametrize("name", jobs("sharded"))
def test_two_shards_train_what_one_process_trains(two, tmp_path, name):
    one = training_ranks.run_job(name, tmp_path, 1)
    for rank in two:
        assert rank[name]["sharded"]
        assert training.difference(rank[name]["weights"], one["weights"]) < training.SAME
        assert rank[name]["norms"] == pytest.approx(one["norms"], rel=1e-5)
    assert training.difference(one["weights"], training.model().state_dict()) > 1e-2


@pytest.mark.slow
def test_sharded_layers_are_recomputed_where_asked(two):
    """FSDP gives each layer a class of its own; a forward bound before lost its checkpointing, silently."""
    for rank in two:
        assert rank["sharded, recomputed"]["calls"] == 2 * 3


@pytest.mark.slow
def test_shards_of_our_accelerate_settings_train_what_one_process_trains(two, tmp_path):
    one = training_ranks.run_job("accelerated", tmp_path, 1)
    for rank in two:
        result = rank["accelerated"]
        assert result["sharded"]
        assert training.difference(result["weights"], one["weights"]) < training.SAME
        assert result["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert training.difference(result["straight"], result["resumed"]) == 0.0


@pytest.mark.parametrize(
    ("file", "method"), [("fsdp2.yaml", "use_fsdp"), ("zero3.yaml", "use_deepspeed")], ids=["FSDP2", "ZeRO-3"]
)
def test_accelerate_reads_every_line_of_our_settings(file, method):
    """Launch silently passes over keys that it does not know inside fsdp_config and deepspeed_config."""
    path = training.TESTS.parent / "examples" / "accelerate" / file
    config, launched = load_config_from_file(str(path)), training_ranks.launched(file)
    [inner] = [part for part in (config.fsdp_config, config.deepspeed_config) if part]
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert inner.keys() <= known.keys()
    assert all(getattr(launched, key) == value for key, value in inner.items())
    assert getattr(launched, method)
    assert launched.mixed_precision == "bf16"


def test_both_settings_for_sharding_are_the_same():
    ours = training.TESTS.parent / "examples" / "accelerate" / "fsdp2.yaml"
    assert yaml.safe_load(ours.read_text()) == yaml.safe_load(FSDP_SETTINGS.read_text())


@pytest.mark.gpu
def test_sharding_by_accelerate_trains_saves_and_resumes(tmp_path):
    ranks = min(2, torch.cuda.device_count())
    started(tmp_path, ranks, "nccl")
    one = training.trainer(tmp_path / "one", use_cpu=False, **training_ranks.ROTATING)
    one.train()
    for rank in results(tmp_path, ranks):
        result = rank["by accelerate"]
        assert result["sharded"]
        assert training.difference(result["weights"], result["resumed"]) == 0.0
        assert result["loss"] == pytest.approx(training.losses(one), abs=1e-4)
