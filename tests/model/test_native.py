"""The native stack: what it takes, what it refuses, what it frees; its compiled regions against torch's."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers as hf

import tiny
from conftest import AGREED, CLOSE
from layerskip.errors import UserError
from layerskip.model import load as models
from layerskip.model.native import kernels as compiled
from layerskip.model.native import load as native_load
from layerskip.model.native.attention import Attention
from layerskip.model.native.layer import BY_TORCH
from layerskip.model.native.stack import NativeStack
from layerskip.model.step import Step

needs_compiler = pytest.mark.skipif(compiled.kernels() is None, reason="no C++ compiler")


def saved(tmp_path, family="llama", **changes):
    tiny.random_model(family, **changes).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", native_load.FAMILIES)
def test_every_native_family_passes_the_comparison_with_hugging_face(family):
    assert native_load.native_reason(tiny.random_model(family)) is None


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5,
                   "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4,
                   "original_max_position_embeddings": 24}, "max_position_embeddings": 24}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["+native", "+torch"])
def test_flags_of_a_family_change_nothing_about_the_logits(family, changes, kind):
    model = tiny.random_model(family, **changes)
    for parameter in model.parameters():  # biases and gains of zero or one would hide a mistake
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    assert native_load.native_reason(model) is None
    ours = tiny.stack(family + kind, model=model)
    tokens = torch.arange(3, 23)[None]
    with torch.inference_mode():
        wanted, cache, got = model(tokens).logits, ours.new_cache(1, 20), []
        for start, count in ((0, 12), (12, 1), (13, 5), (18, 2)):
            step = Step.span([0], [start], [count], ours.device, spill=20)
            h, _ = ours.run(
                ours.embed(tokens[:, start : start + count], step), 0, tiny.NUM_LAYERS, step, cache
            )
            got.append(ours.logits(h))
    torch.testing.assert_close(torch.cat(got, 1), wanted, rtol=0, atol=CLOSE[torch.float32])


def test_what_is_not_llama_shaped_gets_the_hugging_face_stack_and_says_why_when_native_is_asked_for(tmp_path):
    folder = saved(tmp_path, "gpt2")
    assert models.load(folder, dtype=torch.float32)[0].name == "hf"
    with pytest.raises(UserError, match="'gpt2' is not among llama"):
        models.load(folder, dtype=torch.float32, kind="native")
    with pytest.raises(UserError, match="int8, which needs the native stack"):
        models.load(folder, dtype=torch.bfloat16, quantize="int8")
    with pytest.raises(UserError, match="unknown stack 'naitve'"):
        models.load(folder, dtype=torch.float32, kind="naitve")


def test_a_checkpoint_of_the_family_runs_natively_unless_refused_and_frees_the_model_it_came_from(tmp_path):
    folder = saved(tmp_path)
    ours, shell = models.load(folder, dtype=torch.float32)
    assert ours.name == "native"
    kept = sum(p.numel() for p in shell.model.layers.parameters())
    assert kept == 0, "weights are held once"
    assert models.load(folder, dtype=torch.float32, kind="hf")[0].name == "hf"


def test_a_native_stack_that_would_compute_something_else_is_not_trusted(tmp_path, monkeypatch):
    """The comparison on a tiny model stands between a changed release of transformers and wrong text."""
    model = tiny.random_model("qwen3")
    monkeypatch.setattr(native_load, "_verdicts", {})
    monkeypatch.setattr(Attention, "_turned", lambda self, qkv, cos, sin: qkv)
    monkeypatch.setattr("layerskip.model.native.stack.kernels", lambda: None)
    assert "tiny model of its kind" in native_load.native_reason(model)
    with pytest.raises(UserError, match="parity check"):
        native_load.native_stack(model)


def test_a_kind_of_configuration_is_compared_once_per_process(monkeypatch):
    seen = []
    monkeypatch.setattr(native_load, "_verdicts", {})
    monkeypatch.setattr(native_load, "_compare_tiny", lambda config, kind: seen.append(kind))
    for _ in range(3):
        native_load.native_reason(tiny.random_model("llama"))
    native_load.native_reason(tiny.random_model("llama", attention_bias=True))
    assert len(seen) == 2


def test_a_comparison_that_agreed_is_kept_for_this_code_on_this_machine(tmp_path, monkeypatch):
    seen, model = [], tiny.random_model("llama")
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    monkeypatch.setattr(native_load, "_agreed", AGREED)
    monkeypatch.setattr(native_load, "_compare_tiny", lambda config, kind: seen.append(kind))

    def another_process():
        monkeypatch.setattr(native_load, "_verdicts", {})
        return native_load.native_reason(model)

    assert [another_process(), another_process()] == [None, None]
    assert len(seen) == 1
    monkeypatch.setattr(native_load, "decoders", lambda: "another version")
    assert another_process() is None
    assert len(seen) == 2

    def differs(config, kind):
        seen.append(kind)
        raise UserError("different logits")

    monkeypatch.setattr(native_load, "_compare_tiny", differs)
    monkeypatch.setattr(native_load, "decoders", lambda: "a broken version")
    assert "different logits" in another_process()
    assert "different logits" in another_process()
    assert len(seen) == 4, "what differs is not kept: the next process may have another library"


def test_an_unknown_activation_or_another_attention_is_left_to_hugging_face():
    assert "relu" in native_load.native_reason(tiny.random_model("llama", hidden_act="relu"))
    model = tiny.random_model("llama")
    model.set_attn_implementation("eager")
    assert "attention" in native_load.native_reason(model)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_regions_give_what_torch_gives(dtype):
    found, close = compiled.kernels(), 1e-5 if dtype == torch.float32 else 2e-2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 200, generator=generator).to(dtype)
    gain = torch.randn(200, generator=generator).to(dtype)
    wanted = torch.nn.functional.rms_norm(x.double(), (200,), gain.double(), 1e-5)
    torch.testing.assert_close(found.norm(x, gain, 1e-5).double(), wanted, rtol=close, atol=close)
    gate, up = (x * 9).double().chunk(2, -1)
    for name in compiled.GATES:
        wanted = BY_TORCH[name](gate) * up
        torch.testing.assert_close(found.glu(name, x * 9).double(), wanted, rtol=close, atol=close)


def by_calls_of(stack, tokens, counts):
    """The last states of tokens [1, T], read so many at a time."""
    outputs, total = [], tokens.shape[1]
    for count in counts:
        cache, parts = stack.new_cache(1, total), []
        for start in range(0, total, count):
            step = Step.span([0], [start], [count], stack.device, spill=total)
            h = stack.embed(tokens[:, start : start + count], step)
            parts.append(stack.run(h, 0, stack.num_layers, step, cache)[0])
        outputs.append(torch.cat(parts, 1))
    return outputs


@needs_compiler
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_gate_of_another_kind_is_exact_row_by_row(dtype, activation, is_compiled):
    """torch takes another kernel for one row than for several, and shares rows out to threads anywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model = tiny.random_model("llama", hidden_act=activation, intermediate_size=16384, dtype=dtype)
        stack = NativeStack(model, compiled=is_compiled)
        outputs = by_calls_of(stack, torch.arange(16)[None] % 40 + 4, (16, 8, 4, 2, 1))
    finally:
        torch.set_num_threads(before)
    if not stack.row_exact:
        assert not is_compiled, "the kernels are exact"
        return
    assert all(torch.equal(outputs[0], other) for other in outputs)


@needs_compiler
def test_compiled_regions_let_nan_and_infinity_through():
    found = compiled.kernels()
    for bad in (torch.nan, torch.inf):
        x = torch.ones(2, 64)
        x[0, 3] = bad
        assert not found.norm(x, torch.ones(64), 1e-5)[0].isfinite().all()
        for name in compiled.GATES:
            assert not found.glu(name, x)[0].isfinite().all()
        assert found.norm(x.bfloat16(), torch.ones(64).bfloat16(), 1e-5)[1].isfinite().all()


def test_without_a_compiler_decoding_works_and_is_only_slower(monkeypatch):
    from rounds import decode

    monkeypatch.setattr("layerskip.model.native.stack.kernels", lambda: None)
    bare = NativeStack(tiny.calibrated("llama"))
    assert bare.kernels is None
    assert decode(bare, [[5, 6, 7]], 24, 2, 3).tokens == decode(tiny.stack("llama"), [[5, 6, 7]], 24).tokens


def test_a_broken_compiler_is_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    for setting in ({"CXX": "false"}, {"CXX": str(tmp_path / "nowhere")}, {"LAYERSKIP_KERNELS": "off"}):
        for name, value in setting.items():
            monkeypatch.setenv(name, value)
        compiled.kernels.cache_clear()
        if "CXX" in setting:
            with pytest.warns(UserWarning, match="the compiled regions cannot be had"):
                assert compiled.kernels() is None
        assert compiled.kernels() is None
        assert compiled.kernels_reason()
    compiled.kernels.cache_clear()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Find the compiled regions as a new process with a cache of its own does; the compiler is one that copies."""
    if compiled.kernels() is None:
        pytest.skip("no C++ compiler")
    content = Path(
        compiled.kernels().library._name
    ).read_bytes()  # not any library of the cache: others are old
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    runs = []

    def compile(compiler, folder):
        runs.append(folder)
        (built := folder / "kernels.so").write_bytes(content)
        built.chmod(0o700)
        return built

    monkeypatch.setattr(compiled, "_compiled", compile)

    def find():
        compiled.kernels.cache_clear()
        runs.clear()
        return compiled.kernels(), list(runs)

    yield find
    compiled.kernels.cache_clear()


@needs_compiler
def test_two_libraries_in_one_process_are_two(tmp_path):
    """Files under one descriptor were one library to the loader: the second was the first, whatever it held."""
    content, handles = Path(compiled.kernels().library._name).read_bytes(), set()
    for more in (b"", b"\0"):
        path = tmp_path / f"x-{compiled._digest(content + more)}.so"
        path.write_bytes(content + more)
        path.chmod(0o700)
        handles.add(compiled._loaded(path)._handle)
    assert len(handles) == 2


@needs_compiler
def test_the_library_is_compiled_once_into_a_folder_that_is_ones_own(fresh, tmp_path, recwarn):
    found, runs = fresh()
    assert found is not None
    assert compiled.kernels_reason() is None
    assert runs[0].is_relative_to(tmp_path)
    folder = tmp_path / "cache" / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # as an older version may have left it
    found, runs = fresh()
    assert found is not None
    assert not runs
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not recwarn.list


@needs_compiler
@pytest.mark.parametrize("how", ["writable", "changed", "cut off", "link", "pipe"])
def test_a_library_that_others_could_have_written_is_not_loaded(fresh, tmp_path, how, monkeypatch):
    """It was loaded by a predictable name, without a look at it, and so ran as the user."""
    fresh()
    [library] = (tmp_path / "cache" / "kernels").iterdir()
    opened, real = [], compiled.ctypes.CDLL
    monkeypatch.setattr(
        compiled.ctypes, "CDLL", lambda path: opened.append(os.path.realpath(path)) or real(path)
    )
    if how == "writable":
        library.chmod(0o777)
    elif how in ("changed", "cut off"):
        content, mode = library.read_bytes(), library.stat().st_mode
        library.unlink()  # another file: this process runs what stands in the old one
        library.write_bytes(content[:-100] + (b"x" * 100 if how == "changed" else b""))
        library.chmod(mode)
    else:
        planted = tmp_path / "planted.so"
        library.rename(planted)
        library.symlink_to(planted) if how == "link" else os.mkfifo(library)
    with pytest.warns(UserWarning, match="compiled"):
        _, runs = fresh()
    assert runs, "compiled anew"
    assert opened
    assert "planted" not in opened[0]


@needs_compiler
def test_where_the_cache_is_another_users_the_library_is_compiled_in_private(fresh, tmp_path, monkeypatch):
    mine = os.geteuid()
    monkeypatch.setattr(compiled.os, "geteuid", lambda: mine + 1)
    (tmp_path / "cache" / "kernels").mkdir(parents=True)
    real = compiled._shared
    monkeypatch.setattr(compiled, "_shared", lambda found, path: real(
        os.stat_result([found.st_mode, 0, 0, 0, mine + 2, 0, 0, 0, 0, 0]), path))  # fmt: skip
    with pytest.warns(UserWarning, match="belongs to another user"):
        found, runs = fresh()
    assert found is not None
    assert not runs[0].is_relative_to(tmp_path / "cache")
    assert not runs[0].exists()


def test_a_language_model_on_the_native_stack_keeps_its_ends_and_facts(tmp_path, monkeypatch):
    import layerskip
    from layerskip.decode.options import Options

    folder = saved(tmp_path)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [3, 4]}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layerskip": {"exits": [2], "exit_layer": 2}}))
    lm = layerskip.load(folder, dtype="float32")
    assert lm.stack.name == "native"
    assert lm.facts.trained
    assert lm.eos_ids(Options()) == {3, 4}


def test_a_moved_capacity_rebuilds_the_rotary_tables():
    model = tiny.random_model("llama")
    ours, tokens = NativeStack(model), torch.arange(2, 62).repeat(3)[None]
    for length in (10, 180):
        cache = ours.new_cache(1, length)
        step = Step.span([0], [0], [length], ours.device, spill=length)
        with torch.inference_mode():
            h, _ = ours.run(ours.embed(tokens[:, :length], step), 0, tiny.NUM_LAYERS, step, cache)
            wanted = model(tokens[:, :length]).logits
        torch.testing.assert_close(ours.logits(h), wanted, rtol=0, atol=CLOSE[torch.float32])


def test_transformers_names_of_the_native_families_are_in_the_table():
    assert set(native_load.FAMILIES) <= set(hf.CONFIG_MAPPING)


@needs_compiler
@pytest.mark.parametrize("heads", [1, 5])
def test_a_group_that_torch_could_not_pad_is_exact_where_attention_is_compiled(heads):
    """Such models decoded in float32 by default: what holds for torch's kernel was asked of ours."""
    changes = {
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_size": 16 * heads,
    }
    stack = NativeStack(tiny.random_model("llama", dtype=torch.bfloat16, **changes))
    assert stack.row_exact
    outputs = by_calls_of(stack, torch.arange(16)[None] % 40 + 4, (16, 8, 4, 2, 1))
    assert all(torch.equal(outputs[0], other) for other in outputs)
    assert not NativeStack(tiny.random_model("llama", **changes), compiled=False).row_exact
