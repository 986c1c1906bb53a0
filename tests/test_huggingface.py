"""`load_safetensors` on models that Hugging Face's transformers has made and saved.

They have random weights and tiny sizes. Needs PyTorch, which `.ci/run` installs.
"""

import json
import os
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, load_safetensors

from .helpers import assert_close


os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 37
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 16,
}
GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
T5 = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 16,
    "d_ff": 24,
    "d_kv": 8,
    "num_layers": 1,
    "num_heads": 2,
}
OPT = SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16}

# The class of the model, the settings of its configuration, and the name of its input embeddings.
MODELS = {
    "GPT-2": ("GPT2LMHeadModel", GPT2, "transformer.wte.weight"),
    "GPT-2 without head": ("GPT2Model", GPT2, "wte.weight"),
    "Llama": ("LlamaForCausalLM", SIZES, "model.embed_tokens.weight"),
    "Llama tied": (
        "LlamaForCausalLM",
        SIZES | {"tie_word_embeddings": True},
        "model.embed_tokens.weight",
    ),
    "Llama without head": ("LlamaModel", SIZES, "embed_tokens.weight"),
    "Mistral": ("MistralForCausalLM", SIZES, "model.embed_tokens.weight"),
    "Qwen2": ("Qwen2ForCausalLM", SIZES, "model.embed_tokens.weight"),
    "Gemma": ("GemmaForCausalLM", SIZES, "model.embed_tokens.weight"),
    "Gemma 2": ("Gemma2ForCausalLM", SIZES, "model.embed_tokens.weight"),
    "BERT": ("BertForMaskedLM", SIZES, "bert.embeddings.word_embeddings.weight"),
    "BERT without head": ("BertModel", SIZES, "embeddings.word_embeddings.weight"),
    "T5": ("T5ForConditionalGeneration", T5, "shared.weight"),
    "OPT": ("OPTForCausalLM", OPT, "model.decoder.embed_tokens.weight"),
    "GPT-NeoX": ("GPTNeoXForCausalLM", SIZES, "gpt_neox.embed_in.weight"),
    "GPT-NeoX without head": ("GPTNeoXModel", SIZES, "embed_in.weight"),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A model of random weights, and the folder that it is saved to."""
    made = {}

    def make(kind):
        if kind not in made:
            name, sizes, tensor = MODELS[kind]
            torch.manual_seed(0)
            cls = getattr(transformers, name)
            model = cls(cls.config_class(**sizes)).eval()
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            made[kind] = SimpleNamespace(model=model, folder=folder, tensor=tensor)
        return made[kind]

    return make


def as_numpy(tensor):
    return tensor.detach().float().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_the_input_embeddings_of_an_architecture_are_found(kind, make):
    saved = make(kind)
    expected = as_numpy(saved.model.get_input_embeddings().weight)
    assert expected.shape == (VOCAB_SIZE, 16)
    for table in load_safetensors(saved.folder), load_safetensors(saved.folder, saved.tensor):
        assert table.axis_names == ("vocabulary", "embedding")
        np.testing.assert_array_equal(table.embeddings, expected)


TOKENS = np.array([[1, 5, 36, 0], [2, 2, 9, 17]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GPT-2", "Llama", "Llama tied", "Gemma", "Gemma 2", "OPT"])
def test_our_decode_of_the_last_hidden_state_gives_the_logits_of_the_model(kind, make):
    saved = make(kind)
    with torch.no_grad():
        output = saved.model(torch.tensor(TOKENS), output_hidden_states=True)
    untied = kind == "Llama"
    table = load_safetensors(saved.folder, "lm_head.weight" if untied else None)
    soft_cap = getattr(saved.model.config, "final_logit_softcapping", None)
    assert (soft_cap is not None) == (kind == "Gemma 2")
    hidden = jnp.asarray(as_numpy(output.hidden_states[-1]))
    logits = EmbeddingDecode(table, soft_cap=soft_cap)(hidden)
    assert_close(logits, as_numpy(output.logits))
    assert np.ptp(logits) > 0.1


@pytest.mark.parametrize("kind, scale", [("Llama", 1), ("Gemma", 4)])
def test_our_lookup_gives_what_enters_the_first_layer(kind, scale, make):
    saved = make(kind)
    with torch.no_grad():
        output = saved.model(torch.tensor(TOKENS), output_hidden_states=True)
    vectors = EmbeddingLookup(load_safetensors(saved.folder))(TOKENS)
    # Gemma multiplies them by the root of their size
    assert_close(vectors * scale, as_numpy(output.hidden_states[0]))


def test_an_untied_model_has_two_tables_and_a_tied_one_a_single_one(make):
    untied, tied = make("Llama"), make("Llama tied")
    head = load_safetensors(untied.folder, "lm_head.weight")
    np.testing.assert_array_equal(head.embeddings, as_numpy(untied.model.lm_head.weight))
    assert not np.any(head.embeddings == load_safetensors(untied.folder).embeddings)
    with pytest.raises(ValueError, match="has no tensor 'lm_head.weight'"):
        load_safetensors(tied.folder, "lm_head.weight")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_in_several_files_and_any_dtype_loads(dtype, make, tmp_path):
    saved = make("Llama")
    model = type(saved.model)(saved.model.config)
    model.load_state_dict(saved.model.state_dict())
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["model.embed_tokens.weight"] != index["lm_head.weight"]
    table = load_safetensors(tmp_path)
    assert table.embeddings.dtype == dtype
    expected = as_numpy(model.get_input_embeddings().weight)
    np.testing.assert_array_equal(np.asarray(table.embeddings, np.float32), expected)
