"""Inside `model.generate`: what is refused, and that the model is left as it was."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
)

import layerskip
import tiny
from hf_calls import ONE, RAGGED, L, greedy, own, plain
from layerskip import UserError, custom_generate
from layerskip.decode.load import stack_of

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


@pytest.fixture(scope="module")
def model():
    return tiny.calibrated("llama")


# -- what cannot be honoured ---------------------------------------------------------------------------------


def filled_cache(model):
    return model(ONE[:, :2], past_key_values=DynamicCache(config=model.config)).past_key_values


REFUSED = {
    "beams": {"num_beams": 2},
    "scores": {"output_scores": True, "return_dict_in_generate": True},
    "logits": {"output_logits": True, "return_dict_in_generate": True},
    "attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "guidance": {"guidance_scale": 1.5},
    "draft schedule": {"num_assistant_tokens_schedule": "heuristic"},
    "confidence": {"assistant_confidence_threshold": 0.7},
    "filled cache": {"past_key_values": filled_cache},
    "positions": {"position_ids": torch.tensor([[3, 4, 5, 6]])},
    "exit layer 0": {"assistant_early_exit": 0},
    "exit layer -1": {"assistant_early_exit": -1},
    "exit layer L": {"assistant_early_exit": L},
    "exit layer L+1": {"assistant_early_exit": L + 1},
    "draft length -1": {"num_assistant_tokens": -1},
    "context": {"max_new_tokens": tiny.CONTEXT},
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_options_that_cannot_be_honoured_are_refused(model, name):
    options = {key: value(model) if callable(value) else value for key, value in REFUSED[name].items()}
    with pytest.raises(UserError) as caught:
        plain(model, custom_generate=custom_generate, **{"assistant_early_exit": 2, **options})
    assert caught.value.hint
    assert torch.equal(own(model), greedy()), "the next call is right"


def test_embeddings_instead_of_tokens_are_refused(model):
    embeds = model.get_input_embeddings()(ONE).detach()
    for extra in ({}, {"input_ids": ONE}):
        with pytest.raises(UserError, match="inputs_embeds"):
            model.generate(
                inputs_embeds=embeds, custom_generate=custom_generate, assistant_early_exit=2, **extra
            )


def test_only_padding_on_the_left_can_be_honoured(model):
    for hidden in (3, 1):
        mask = torch.ones_like(ONE)
        mask[0, hidden] = 0
        with pytest.raises(UserError, match="start of their row"):
            model.generate(ONE, attention_mask=mask, custom_generate=custom_generate, assistant_early_exit=2)


def test_a_model_in_training_mode_is_refused_and_then_accepted():
    model = tiny.random_model("llama")
    wanted = plain(model)
    model.train()
    with pytest.raises(UserError, match=r"model\.eval"):
        own(model)
    assert model.training
    assert torch.equal(own(model.eval()), wanted)


# -- the model is left as it was -----------------------------------------------------------------------------


class Fails(LogitsProcessor):
    calls = 0  # of the class: processors are copied, so that rejected drafts leave no trace in them

    def __call__(self, input_ids, scores):
        Fails.calls += 1
        if Fails.calls >= 5:
            raise ZeroDivisionError("in the middle")
        return scores


def test_the_model_is_untouched_even_by_a_failure_in_the_middle():
    model = tiny.random_model("llama")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    def looks():
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        return model.config.to_dict(), model.generation_config.to_dict(), model(ONE).logits.detach(), weights

    config, generation_config, logits, weights = looks()
    with pytest.raises(ZeroDivisionError):
        own(model, logits_processor=LogitsProcessorList([Fails()]))
    own(model)
    after = looks()
    assert after[:2] == (config, generation_config)
    assert model.config.num_hidden_layers == len(model.model.layers) == L
    assert torch.equal(after[2], logits)
    assert all(torch.equal(after[3][name], value) for name, value in weights.items())
    assert not model.training
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    model.train()(ONE, labels=ONE).loss.backward()  # nothing made in inference mode stayed in the model
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_that_moved_or_was_dropped_is_not_confused_with_its_stack():
    model = tiny.random_model("llama")
    assert stack_of(model) is stack_of(model)
    assert torch.equal(own(model), plain(model))
    model.double()
    assert torch.equal(own(model), plain(model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def replace_head(model):
    model.set_output_embeddings(torch.nn.Linear(32, tiny.VOCAB, bias=False).eval())


def replace_layer(model):
    model.model.layers[3] = tiny.random_model("llama", seed=5).model.layers[3]


@pytest.mark.parametrize(
    "change", [replace_head, replace_layer, lambda m: m.set_attn_implementation("eager")]
)
def test_a_model_that_was_changed_is_looked_at_again(change):
    """The cached stack held the modules and the attention mode of the first call: silently other tokens."""
    model = tiny.random_model("llama")
    own(model)
    change(model)
    assert torch.equal(own(model), plain(model))


@pytest.mark.parametrize("exit_layer", [2, 4])
def test_layers_offloaded_by_accelerate_decode_as_if_they_were_in_memory(model, tmp_path, exit_layer):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys([*parts, *(f"model.layers.{i}" for i in range(L))], "cpu")
    places["model.layers.3"] = "disk"
    kwargs = {"device_map": places, "offload_folder": tmp_path / "offload"}
    split = type(model).from_pretrained(tmp_path, **kwargs)
    split.generation_config.eos_token_id = None
    assert split.model.layers[3].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(own(split, RAGGED, exit_layer=exit_layer), greedy(padded=True))


def test_a_model_offloaded_whole_decodes_and_says_that_its_head_cannot_be_reduced(model):
    accelerate = pytest.importorskip("accelerate")
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert torch.equal(own(away), greedy())
    with pytest.raises(UserError, match="offloaded"):
        layerskip.generate(away, [5, 9], mode="self-speculative", draft_vocab=16, max_new_tokens=4)
