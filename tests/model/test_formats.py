"""Weights of few bits: what a product gives, that every vector unit gives it, and how weights come from files."""

import copy
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import layerskip
import tiny
from layerskip.errors import UserError
from layerskip.model import load as models
from layerskip.model.native import int4, int8, stored, tiles
from layerskip.model.native import kernels as compiled
from layerskip.model.native.bfloat16 import Bfloat16, bfloat16, compiles_bfloat16
from layerskip.model.native.formats import FORMATS, require_format
from layerskip.model.native.stack import NativeStack
from rounds import decode

needs_compiler = pytest.mark.skipif(compiled.kernels() is None, reason="no C++ compiler")
KINDS = {"int8": int8.Int8, "int4": int4.Int4}
WHOLE = {"bfloat16": Bfloat16} if compiles_bfloat16() else {}
PRODUCTS = {**KINDS, **WHOLE}
SIZES = [(576, 576), (40, 70), (17, 33), (16, 32), (1, 1), (5, 31)]  # outputs, inputs
PROMPTS = [[5, 9, 20, 33], list(range(7, 18)), [40]]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_8_bits(x):
    """What the products make of their inputs: 32 of a row share a scale."""
    rows, size = x.shape
    by = F.pad(x.float(), (0, -size % 32)).view(rows, -1, 32)
    most = by.abs().amax(-1, keepdim=True)
    whole = torch.where(most > 0, by * (127 / most), 0.0).round()
    return (whole * most / 127).flatten(1)[:, :size]


def linear_of(name, out, size, bias=True):
    weight = numbers(out, size).bfloat16() if name in WHOLE else numbers(out, size)
    return PRODUCTS[name].of(compiled.kernels(), weight, numbers(out).bfloat16() if bias else None)


# -- products ------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(("out", "size"), SIZES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_of_rounded_inputs_and_weights(name, out, size):
    for bias in (True, False):
        linear = linear_of(name, out, size, bias)
        for rows in (1, 2, 9, 13, 33):
            x, h = numbers(rows, size, seed=1).bfloat16(), numbers(rows, out, seed=2).bfloat16()
            wanted = (x if name in WHOLE else in_8_bits(x)).double() @ linear.dense().double().T
            wanted = wanted + (linear.bias.double() if bias else 0)
            scale = float(wanted.abs().max())
            assert (linear(x) - wanted).abs().max() <= 0.004 * scale + 1e-6  # half a step of bfloat16
            assert (linear.added_to(h, x) - wanted - h.double()).abs().max() <= 0.004 * (scale + 4)


@needs_compiler
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_row_has_the_same_bits_in_any_company(name):
    for out, size in SIZES:
        linear, x, h = linear_of(name, out, size), numbers(40, size).bfloat16(), numbers(40, out).bfloat16()
        alone = torch.cat([linear(x[i : i + 1]) for i in range(40)])
        added = torch.cat([linear.added_to(h[i : i + 1], x[i : i + 1]) for i in range(40)])
        for rows in range(1, 41):
            assert torch.equal(linear(x[:rows]), alone[:rows]), (out, size, rows)
            assert torch.equal(linear.added_to(h[:rows], x[:rows]), added[:rows])


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("sizes", [
    pytest.param([(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)], id="smollm2-135m"),
    pytest.param([(1152, 896), (896, 896), (9728, 896), (896, 4864)], id="qwen2-0.5b"),
    pytest.param([(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)], id="llama-3.2-1b"),
])  # fmt: skip
@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_of_real_models_have_the_same_bits_in_any_company(name, sizes):
    for out, size in sizes:
        linear, x = linear_of(name, out, size, bias=False), numbers(32, size).bfloat16()
        alone = torch.cat([linear(x[i : i + 1]) for i in range(32)])
        for rows in range(1, 33):
            assert torch.equal(linear(x[:rows]), alone[:rows]), (out, size, rows)


@needs_compiler
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_value_that_is_no_number_spoils_its_own_row_alone(name):
    linear, x = linear_of(name, 40, 70), numbers(5, 70).bfloat16()
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[3, 40] = bad
        y = linear(x)
        assert not y[3].isfinite().any()
        assert y[[0, 1, 2, 4]].isfinite().all()
    x[3, 40] = torch.finfo(torch.bfloat16).max
    assert not linear(x)[3].isnan().any()
    assert torch.equal(linear(torch.zeros(2, 70).bfloat16()), linear.bias.expand(2, -1))


@pytest.mark.parametrize("name", KINDS)
def test_a_weight_that_is_no_number_is_refused(name):
    weight = numbers(4, 64).bfloat16()
    for bad in (float("nan"), float("inf")):
        weight[1, 2] = bad
        with pytest.raises(UserError, match="NaN or infinite"):
            FORMATS[name].make(weight, None)


@needs_compiler
@pytest.mark.parametrize("name", PRODUCTS)
def test_some_outputs_are_those_of_all(name):
    linear, x, ids = linear_of(name, 70, 40), numbers(3, 40).bfloat16(), torch.tensor([69, 3, 3, 17])
    assert torch.equal(linear.rows(ids)(x), linear(x)[:, ids])
    again = tiles.restored(PRODUCTS[name], (70, 40), linear.state)
    assert torch.equal(again(x), linear(x))
    assert again.num_bytes == linear.num_bytes


def test_weights_are_rounded_to_half_a_step():
    weight = numbers(40, 64)
    weight[3] = 0
    rounded, scales = int8.symmetric(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded * scales[:, None] - weight).abs() <= 0.501 * step).all()
    whole, scale, least = int4.grouped(weight)
    back = whole * scale.float()[..., None] + least.float()[..., None]
    groups = weight.view(40, 2, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    assert ((back - groups).abs() <= 0.51 * step[..., None] + 0.001).all()


@needs_compiler
def test_weights_that_were_of_4_bits_are_found_again_exactly():
    whole = torch.randint(0, 16, (40, 3, 32), generator=torch.Generator().manual_seed(0))
    whole[..., 0], whole[..., 1] = 0, 15  # as rounding between the least and the largest leaves them
    scale, least = numbers(40, 3).abs().half() / 8, numbers(40, 3, seed=1).half()
    weight = (whole * scale.float()[..., None] + least.float()[..., None]).flatten(1)
    assert torch.equal(int4.Int4.of(compiled.kernels(), weight, None).dense(), weight)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("out", "size"), SIZES)
def test_without_a_compiler_torch_multiplies_the_same_weights(name, out, size, monkeypatch):
    for module in (tiles, stored):
        monkeypatch.setattr(module, "kernels", lambda: None)
    weight, bias, x = numbers(out, size), numbers(out).bfloat16(), numbers(4, size, seed=1).bfloat16()
    linear, h = FORMATS[name].make(weight, bias), numbers(4, out, seed=2).bfloat16()
    if name == "int8":
        rounded, scales = int8.symmetric(weight)
        dense = rounded * scales[:, None]
    else:
        whole, scale, least = int4.grouped(weight)
        dense = (whole * scale.float()[..., None] + least.float()[..., None]).flatten(1)[:, :size]
    wanted = F.linear(x.float(), dense, bias.float())
    assert (linear(x) - wanted).norm() <= 0.02 * wanted.norm()
    assert (linear.added_to(h, x) - wanted - h).norm() <= 0.02 * (wanted + h).norm()
    assert torch.equal(linear.rows(torch.tensor([out - 1]))(x), linear(x)[:, -1:])
    spread = x.repeat_interleave(2, -1)[:, ::2]  # not contiguous
    assert torch.equal(linear(spread), linear(x))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "dtype"), [("-DLAYERSKIP_PAIRS", "bfloat16"), ("--param=avoid-fma-max-bits=512", "float32")]
)
def test_what_other_processors_are_compiled_for_is_as_exact(flag, dtype):
    """Zen multiplies bfloat16 in pairs; before Zen 4 GCC does not fuse what a loop adds to one sum alone."""
    known = [*compiled.compiler(), flag, "-x", "c++", "-fsyntax-only", os.devnull]
    if subprocess.run(known, capture_output=True, check=False).returncode:
        pytest.skip(f"this compiler has no {flag}")
    files = (str(Path(__file__).with_name(name)) for name in ("test_attention.py", "test_formats.py"))
    command = [sys.executable, "-m", "pytest", "-n1", *files, "-m", "not slow", "-k", dtype]
    environment = os.environ | {"CXX": shlex.join([*compiled.compiler(), flag])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


# -- stacks --------------------------------------------------------------------------------------------------


def test_formats_are_of_bfloat16_on_the_cpu_and_anything_else_says_so(tmp_path):
    tiny.random_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bfloat16 activations, not float32"):
        models.load(tmp_path, dtype=torch.float32, quantize="int8")
    with pytest.raises(UserError, match="unknown quantisation 'int3'"):
        models.load(tmp_path, dtype=torch.bfloat16, quantize="int3")
    with pytest.raises(UserError, match="no kernel on meta"):
        require_format("int8", torch.bfloat16, torch.device("meta"))


@pytest.mark.parametrize("quantize", [None, *KINDS])
@pytest.mark.parametrize("tied", [True, False])
def test_a_reduced_head_gives_the_same_numbers_for_its_tokens(quantize, tied):
    model = tiny.random_model("llama", tie_word_embeddings=tied).to(torch.bfloat16)
    ours, ids = NativeStack(model, quantize=quantize), [3, 9, 40, 63]
    head, h = ours.reduced_head(ids), numbers(5, ours.width).bfloat16()
    with torch.inference_mode():
        full, reduced = ours.logits(h), ours.logits(h, head)
    torch.testing.assert_close(reduced, full[:, ids], rtol=0, atol=0.05)


@needs_compiler
def test_what_drafts_alone_is_held_in_8_bits_where_that_is_compiled():
    model = tiny.random_model("llama", dtype=torch.bfloat16)
    stack = NativeStack(copy.deepcopy(model))
    assert stack.draft_format == "int8"
    assert isinstance(stack.reduced_head([3, 9, 40], numbers(3, stack.width)).project, int8.Int8)
    for other in (NativeStack(model, compiled=False), tiny.stack("llama+native"), tiny.stack("llama")):
        assert other.draft_format is None


def test_a_native_stack_tells_the_bytes_it_holds():
    model = tiny.random_model("llama", dtype=torch.bfloat16)
    plain = NativeStack(copy.deepcopy(model))
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    own = NativeStack(copy.deepcopy(model), compiled=False)
    assert tiny.NUM_LAYERS * own.layer_bytes == 2 * layers
    assert own.layer_bytes <= plain.layer_bytes < 2 * own.layer_bytes, "tiles are filled up"
    assert plain.table_bytes == tiny.VOCAB * plain.width * 2
    for name in KINDS:
        assert NativeStack(copy.deepcopy(model), quantize=name).layer_bytes < plain.layer_bytes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    tiny.random_model("llama", tie_word_embeddings=True, attention_bias=True).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


@needs_compiler
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma"])
@pytest.mark.parametrize("name", KINDS)
def test_a_stack_from_files_is_that_of_the_model_and_kept_for_the_next_time(
    family, name, tmp_path, monkeypatch
):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    model = tiny.calibrated(family)
    model.save_pretrained(tmp_path)
    kept = tmp_path / "cache" / "formats"
    first, shell = models.load(tmp_path, dtype=torch.bfloat16, quantize=name)
    assert shell.generation_config.to_dict() == model.generation_config.to_dict()
    (file,) = kept.iterdir()
    made = decode(first, PROMPTS, 16)
    with monkeypatch.context() as patch:
        patch.setattr(stored, "_Files", None)  # nothing is read from the checkpoint's weights
        again, _ = models.load(tmp_path, dtype=torch.bfloat16, quantize=name)
    for record in (
        decode(again, PROMPTS, 16),
        decode(again, PROMPTS, 16, 2, 3),
        decode(first, PROMPTS, 16, 2, 3),
    ):
        assert record.tokens == made.tokens
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.warns(UserWarning, match="is damaged"):
        repaired, _ = models.load(tmp_path, dtype=torch.bfloat16, quantize=name)
    assert decode(repaired, PROMPTS, 16).tokens == made.tokens


@needs_compiler
def test_other_weights_are_another_file_and_a_cache_that_cannot_be_written_costs_time_alone(
    folder, tmp_path, monkeypatch
):
    models.load(folder, dtype=torch.bfloat16, quantize="int4")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: 2 * value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    models.load(folder, dtype=torch.bfloat16, quantize="int4")
    assert len([*(tmp_path / "cache" / "formats").iterdir()]) == 2
    monkeypatch.setenv("LAYERSKIP_CACHE", str(folder / "config.json"))  # a file
    with pytest.warns(UserWarning, match="cannot be kept"):
        models.load(folder, dtype=torch.bfloat16, quantize="int8")


@needs_compiler
def test_weights_of_another_shape_or_none_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(
        {**weights, name: weights[name][:, :5].contiguous()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"layers.1.mlp.down_proj.weight is \["):
        models.load(folder, dtype=torch.bfloat16, quantize="int4")
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        models.load(folder, dtype=torch.bfloat16, quantize="int4")


@needs_compiler
def test_a_quantised_model_is_a_language_model(folder):
    lm = layerskip.load(folder, quantize="int4", progress=False)
    plain = lm.generate([5, 9, 20], max_new_tokens=12, mode="ar").tokens
    assert lm.generate([5, 9, 20], max_new_tokens=12, exit_layer=2, draft_length=3).tokens == plain


@pytest.mark.skipif(not WHOLE, reason="no compiled product of bfloat16")
def test_a_compiled_product_that_is_wrong_is_not_used(monkeypatch):
    """It ended the load, and its advice was to leave out an option that nobody had given."""
    weight = numbers(70, 64).bfloat16()
    assert bfloat16(weight, None) is not None
    monkeypatch.setattr(tiles, "MATCHES", -1.0)
    with pytest.warns(RuntimeWarning, match="gives wrong numbers here: torch multiplies instead"):
        assert bfloat16(weight, None) is None
    with pytest.raises(UserError, match="the compiled int8 product gives wrong numbers"):
        tiles.made(int8.Int8, weight, None)
