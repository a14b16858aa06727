"""A model and its prefix draft in vLLM: JSON in, a line of JSON out. It runs in vLLM's environment, see engines.py.

VLLM_ENV/bin/python vllm_draft.py '{"model": "out/model", "draft": "out/draft", "drafts": 4, "prompts": [[1, 2]]}'
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams, __version__

    asked = json.loads(sys.argv[1])
    how = None
    if asked.get("draft"):
        how = {
            "method": "draft_model", "model": asked["draft"], "num_speculative_tokens": asked["drafts"],
        }  # fmt: skip
    engine = LLM(
        asked["model"], dtype="float32", max_model_len=2048, max_num_seqs=1, enforce_eager=True,
        gpu_memory_utilization=0.4, speculative_config=how, disable_log_stats=False,
    )  # fmt: skip
    law = SamplingParams(temperature=0, max_tokens=asked.get("budget", 32), ignore_eos=True)
    answers = [
        engine.generate({"prompt_token_ids": ids}, law, use_tqdm=False)[0].outputs[0].token_ids
        for ids in asked["prompts"]
    ]
    counts = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
    drafted = counts.get("vllm:spec_decode_num_draft_tokens")
    accepted = counts.get("vllm:spec_decode_num_accepted_tokens")
    told = {"version": __version__, "tokens": [list(one) for one in answers]}
    print("answer " + json.dumps(told | {"drafted": drafted, "accepted": accepted}), flush=True)


if __name__ == "__main__":
    main()
