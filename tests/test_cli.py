"""The command line, in process, on a tiny checkpoint folder: what it prints, and where."""

import json

import pytest
import torch

import tiny
from layerskip.cli.show.rounds import KEPT, show, statistics_line
from layerskip.cli.show.terminal import out

L = tiny.NUM_LAYERS
SPECULATIVE = ("--exit-layer", "2", "--draft-length", "3")


@pytest.fixture
def one(run):
    """Generate with --json; returns the only line's object."""

    def call(*arguments, stdin=""):
        code, printed, message = run("generate", *arguments, "--json", stdin=stdin)
        assert code == 0, message
        [line] = printed.splitlines()
        return json.loads(line)

    return call


# -- generate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ar", "early-exit", "self-speculative"])
def test_json_is_one_line_with_exactly_these_keys(one, folder, mode):
    got = one(folder, "hello", "--mode", mode, "--max-new-tokens", 12)
    assert list(got) == ["text", "tokens", "finish_reason", "stats"]
    assert (got["stats"]["mode"], got["finish_reason"], len(got["tokens"])) == (mode, "length", 12)
    assert got["text"] == tiny.tokenizer().decode(got["tokens"], skip_special_tokens=True)


def test_self_speculative_tokens_are_those_of_plain_decoding(one, folder):
    plain = one(folder, "hello", "--mode", "ar", "--max-new-tokens", 32)
    for exit_layer, draft_length in ((1, 3), (2, 5), (4, 0)):
        options = ("--exit-layer", exit_layer, "--draft-length", draft_length)
        assert one(folder, "hello", *options, "--max-new-tokens", 32)["tokens"] == plain["tokens"]
    narrow = one(folder, "hello", *SPECULATIVE, "--draft-vocab", 90, "--max-new-tokens", 32)
    assert narrow["tokens"] == plain["tokens"]
    assert 0 < narrow["stats"]["acceptance"] < 1


def test_the_prompt_comes_from_the_argument_a_file_or_standard_input(one, folder, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("héllo\n", encoding="utf-8")
    wanted = one(folder, "héllo\n", "--max-new-tokens", 8)
    assert one(folder, "--prompt-file", file, "--max-new-tokens", 8)["tokens"] == wanted["tokens"]
    for arguments in ((), ("-",)):
        got = one(folder, *arguments, "--max-new-tokens", 8, stdin="héllo\n")
        assert got["tokens"] == wanted["tokens"]


def test_a_prompt_is_wrapped_as_a_message_unless_told_otherwise(one, folder):
    wrapped, bare = one(folder, "hello", "--max-new-tokens", 2), one(folder, "hello", "--no-chat")
    assert wrapped["stats"]["prompt_tokens"] > bare["stats"]["prompt_tokens"] == len("hello")
    written_out = one(folder, "user: hello<|im_end|>assistant: ", "--no-chat", "--max-new-tokens", 2)
    assert written_out["tokens"] == wrapped["tokens"]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_batch_file_gives_one_line_per_item_in_input_order(run, one, folder, tmp_path, size):
    messages = [{"role": "user", "content": "and\u2028you?"}]  # a line separator to Python, not to JSON
    items = [{"prompt": "hello", "task": "chat"}, {"messages": messages}, {"prompt": "a", "id": 7}]
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    file.write_text("\ufeff" + "\r\n\n".join(lines) + "\n", encoding="utf-8")
    arguments = ("--batch-file", file, "--batch-size", size, *SPECULATIVE, "--max-new-tokens", 10)
    code, printed, _ = run("generate", folder, *arguments, "--json")
    got = [json.loads(line) for line in printed.splitlines()]
    texts = ("hello", "and\u2028you?", "a")
    singles = [one(folder, text, "--mode", "ar", "--max-new-tokens", 10) for text in texts]
    assert code == 0
    assert [item["tokens"] for item in got] == [single["tokens"] for single in singles]
    code, printed, message = run("generate", folder, *arguments)
    assert printed == "".join(single["text"] + "\n" for single in singles)
    assert [line.split(":")[0] for line in message.splitlines()[1:]] == ["self-speculative"] * 3


def test_streamed_text_is_the_text_and_the_statistics_go_to_stderr(run, one, folder):
    arguments = (folder, "hello", "--max-new-tokens", 40)
    for options in (("--mode", "ar"), SPECULATIVE, ("--mode", "early-exit")):
        wanted = one(*arguments, *options)
        code, printed, message = run("generate", *arguments, *options)
        assert (code, printed) == (0, wanted["text"] + "\n")
        loading, told = message.splitlines()
        assert loading == f"loading {folder}"
        assert told.startswith(f"{wanted['stats']['mode']}: {len(wanted['tokens'])} tokens · prefill ")
    assert "E 1, not verified" in message
    code, _, message = run("generate", *arguments, *SPECULATIVE)
    assert all(part in message for part in ("exit E 2, K 3 ", "% kept ·", "tokens/round"))


def test_the_prefill_rate_of_a_turn_counts_what_was_computed(one, folder):
    """A second turn computes a few tokens of a long prompt; dividing the whole prompt by its time flattered it."""
    stats = {**one(folder, "hello", "--max-new-tokens", 2)["stats"], "prompt_tokens": 50, "prefill_s": 0.5}
    assert "prefill 100.0 tokens/s" in statistics_line(stats)
    assert "prefill 20.0 tokens/s" in statistics_line(stats, prefilled=10)


def test_text_is_shown_as_it_is_and_drafts_in_colour(monkeypatch, capsys):
    """Rich's `Text` turned tabs into spaces and dropped carriage returns: a Makefile came out broken."""
    text = "all:\n\tcc -c\r\n  [b]x[/b]  \x0c" + "y" * 300 + "\n"
    show(text)
    show("")
    assert capsys.readouterr().out == text
    monkeypatch.setattr(out, "_color_system", 1)  # a terminal with colours
    show("draft", KEPT["exit"])
    show("own")
    assert capsys.readouterr().out == "\x1b[32mdraft\x1b[0mown"


def test_a_stop_string_ends_the_text_before_it(run, one, folder):
    whole = one(folder, "hello", "--max-new-tokens", 40)["text"]
    stops = [whole[20:22], whole[30:32]]
    got = one(folder, "hello", "--max-new-tokens", 40, "--stop", stops[1], "--stop", stops[0], *SPECULATIVE)
    assert got["text"] == whole[: min(whole.index(stop) for stop in stops)]
    assert got["finish_reason"] == "stop"
    code, printed, _ = run("generate", folder, "hello", "--max-new-tokens", 40, "--stop", stops[0])
    assert (code, printed) == (0, whole[: whole.index(stops[0])] + "\n")


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_an_exit_that_the_model_has_not_is_refused_before_it_is_loaded(run, folder, verb, monkeypatch):
    """A slip cost fifteen seconds of loading."""
    monkeypatch.setattr("layerskip.decode.load.load", None)
    prompt = ("hello",) if verb == "generate" else ()
    code, _, message = run(verb, folder, *prompt, "--exit-layer", tiny.NUM_LAYERS)
    assert code == 2
    assert (
        f"exit layer {tiny.NUM_LAYERS} is out of range\n  choose one from 1 to {tiny.NUM_LAYERS - 1}"
        in message
    )


def test_sampling_without_a_seed_draws_one_and_tells_it(one, folder, run):
    """Two runs with a temperature gave the identical text: the seed was 0 unless given."""
    hot = ("--temperature", 1.5, "--max-new-tokens", 20)
    first, second = one(folder, "hello", *hot), one(folder, "hello", *hot)
    assert first["tokens"] != second["tokens"]
    assert first["stats"]["seed"] != second["stats"]["seed"]
    again = one(folder, "hello", *hot, "--seed", first["stats"]["seed"])
    assert again["tokens"] == first["tokens"]
    assert one(folder, "hello")["stats"]["seed"] is None
    _, text, told = run("generate", folder, "hello", *hot)
    seed = told.rsplit("seed ", 1)[1].split()[0]
    assert run("generate", folder, "hello", *hot, "--seed", seed)[1] == text
    assert "seed" not in run("generate", folder, "hello")[2]


def test_sampling_is_repeatable_per_seed_and_shaped_by_its_flags(one, folder):
    def tokens(*options):
        return one(folder, "hello", "--max-new-tokens", 20, *SPECULATIVE, *options)["tokens"]

    greedy, hot = tokens(), ("--temperature", 1.5)
    assert tokens(*hot, "--seed", 0) == tokens(*hot, "--seed", 0) != tokens(*hot, "--seed", 1)
    assert tokens(*hot, "--seed", 0) != greedy
    for flags in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 0.999)):
        assert tokens(*hot, *flags) == greedy
    assert tokens("--repetition-penalty", 1.8) != greedy


# -- chat ----------------------------------------------------------------------------------------------------


def test_a_conversation_through_a_pipe(run, one, folder, tmp_path):
    script = "hello\n/stats\n\nwhy\n/stats\n/rest\n/reset\n/stats\nhello\n/exit\nnever read\n"
    options = (*SPECULATIVE, "--max-new-tokens", 8)
    code, printed, message = run("chat", folder, "--system", "be brief", *options, stdin=script)
    turns = [{"role": "system", "content": "be brief"}]
    answers = []
    for text in ("hello", "why"):
        turns.append({"role": "user", "content": text})
        file = tmp_path / "turns.jsonl"
        file.write_text(json.dumps({"messages": turns}))
        answers.append(one(folder, "--batch-file", file, "--max-new-tokens", 8))
        turns.append({"role": "assistant", "content": answers[-1]["text"]})
    first, second = (answer["text"] + "\n" for answer in answers)
    assert (code, printed) == (0, first + second + first)
    _, greeting, stats, again, unknown, reset, none = message.splitlines()
    assert all(command in greeting for command in ("/reset", "/stats", "/exit"))
    lengths = [answer["stats"]["prompt_tokens"] for answer in answers]
    assert f"prompt of {lengths[0]} tokens, {lengths[0]} computed anew" in stats
    computed = int(again.split(f"prompt of {lengths[1]} tokens, ")[1].split()[0])
    assert computed <= lengths[1] - lengths[0]
    assert unknown.startswith("unknown command /rest: did you mean '/reset'")
    assert (reset, none) == ("forgotten", "nothing yet")


def test_a_turn_that_does_not_fit_does_not_end_the_conversation(run, folder):
    script = "hello\n" + "x" * 300 + "\nhello"
    code, printed, message = run("chat", folder, "--context", 128, "--max-new-tokens", 4, stdin=script)
    assert code == 0
    assert "the context is 128" in message
    assert "Traceback" not in message
    assert len(printed.splitlines()) >= 2


def test_a_closed_standard_input_is_an_empty_one(run, fails, folder):
    assert "the prompt is empty" in fails("generate", folder, stdin=None)
    code, printed, _ = run("chat", folder, stdin=None)
    assert (code, printed) == (0, "")


def test_input_that_is_not_text_is_an_error_and_no_traceback(run, fails, folder):
    raw = b"hello\n\xff\xfe\n"
    assert "standard input is not text" in fails("generate", folder, stdin=raw)
    code, _, message = run("chat", folder, "--max-new-tokens", 2, stdin=raw)
    assert code == 0
    assert "not text" in message


# -- models, env, demo ---------------------------------------------------------------------------------------


def test_models_are_listed_for_people_and_for_machines(run, monkeypatch, tmp_path):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    code, printed, message = run("models", "--json")
    assert (code, message) == (0, "")
    builtin, base = json.loads(printed)
    assert set(builtin) == {"name", "description", "licence", "download_bytes", "path"}
    assert (builtin["name"], builtin["path"]) == ("smollm2-135m", None)
    assert (base["name"], base["path"]) == ("smollm2-135m-base", None)
    code, printed, _ = run("models")
    assert code == 0
    assert "smollm2-135m" in printed
    assert "not downloaded yet" in printed


def test_the_environment_is_shown_for_people_and_for_machines(run, monkeypatch, tmp_path):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    code, printed, _ = run("env", "--json")
    facts = json.loads(printed)
    assert code == 0
    assert facts["torch"] == torch.__version__
    assert facts["cache folder"] == str(tmp_path)
    code, printed, _ = run("env")
    assert code == 0
    assert all(key in printed for key in facts)


def test_the_demo_gives_equality_before_speed(run, folder):
    arguments = ("demo", folder, "--exit-layer", 2, "--draft-length", 3, "--max-new-tokens", 6)
    monkey = {"code": "a", "chat": "b"}  # the real prompts do not fit the tiny context
    from layerskip.measure.speed import contests as demo

    original, demo.PROMPTS = demo.PROMPTS, monkey
    try:
        code, printed, _ = run(*arguments, "--json")
        record = json.loads(printed)
        text_code, text, _ = run(*arguments)
    finally:
        demo.PROMPTS = original
    assert (code, text_code) == (0, 0)
    assert list(record) == ["model", "trained_exits", "equal", "prompts"]
    assert (record["equal"], record["trained_exits"]) == (2, False)
    assert [prompt["task"] for prompt in record["prompts"]] == ["code", "chat"]
    assert all(prompt["speedup"] > 0 for prompt in record["prompts"])
    assert record["prompts"][0]["self_speculative"]["exit_layer"] == 2
    assert "equality: 2 of 2 outputs" in text
    assert text.index("equality") < text.index("speed-up")
    assert "E = 2 of 5 layers, K = 3, greedy, float32 on cpu" in text
    assert "no trained exits" in text
