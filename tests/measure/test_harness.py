"""lm-eval through our model: the last layer has the numbers of lm-eval's own, an exit has others."""

import json

import pytest

lm_eval = pytest.importorskip("lm_eval")

from lm_eval import models  # noqa: E402, F401 - names its own
from lm_eval.tasks import TaskManager  # noqa: E402

from layerskip.errors import UserError  # noqa: E402
from layerskip.measure.tasks.harness import LayerSkipLM  # noqa: E402

HEAD = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICES = """\
task: pick
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no", "maybe so"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """\
task: roll
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
WRITING = """\
task: write
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["\\n", "b"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    lines = [
        {
            "question": f"Is {i} more than {i * 7 % 5}? ",
            "answer": i % 3,
            "text": f"some words {i}, more words " * 3,
        }
        for i in range(9)
    ]
    (place / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in (("pick", CHOICES), ("roll", ROLLING), ("write", WRITING)):
        (place / f"{name}.yaml").write_text((HEAD + text).format(file=place / "lines.jsonl"))
    return place


def evaluated(tasks, model, arguments, cache, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    told = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=["pick", "roll", "write"], task_manager=manager,
        bootstrap_iters=0, log_samples=True, device="cpu",
    )  # fmt: skip
    numbers = {
        name: {key: value for key, value in found.items() if isinstance(value, float) and "stderr" not in key}
        for name, found in told["results"].items()
    }
    return numbers, {
        name: [one["filtered_resps"] for one in told["samples"][name]] for name in ("pick", "write")
    }


def test_the_last_layer_has_lm_evals_own_numbers_and_an_exit_others(folder, tasks, tmp_path, monkeypatch):
    theirs, said = evaluated(tasks, "hf", f"pretrained={folder},dtype=float32", tmp_path, monkeypatch)
    ours, own = evaluated(
        tasks, "layerskip", f"pretrained={folder},dtype=float32,drafter=auto", tmp_path, monkeypatch
    )
    assert own["write"] == said["write"]
    assert ours.keys() == theirs.keys() == {"pick", "roll", "write"}
    for name, found in theirs.items():
        assert ours[name] == pytest.approx(found, rel=1e-4)
    at_exit, _ = evaluated(
        tasks, "layerskip", f"pretrained={folder},dtype=float32,likelihood_exit=1", tmp_path, monkeypatch
    )
    assert at_exit["roll"] != pytest.approx(theirs["roll"], rel=1e-2)


def test_arguments_are_checked_before_anything_is_computed(folder):
    with pytest.raises(UserError, match="unknown model argument 'draftlength'"):
        LayerSkipLM(str(folder), draftlength=3)
    with pytest.raises(UserError, match="out of range"):
        LayerSkipLM(str(folder), likelihood_exit=99)
    with pytest.raises(UserError, match="out of range"):
        LayerSkipLM(str(folder), exit_layer=99)
