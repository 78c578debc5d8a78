"""Hugging Face models, transformed, used the way their users use them.

Each test looks twice where that says more than once: at initialisation the transformed model equals
the plain one; with all mHC parameters moved far away it must differ from it, and agree with itself
whichever way it is run.
"""

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils import _pytree as pytree

import mhc_compile
from mhc_compile import MhcError
from tests.zoo.checks import perturb

hf.logging.set_verbosity_error()
VOCAB, WIDTH, LAYERS = 64, 32, 2


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def llama(make: Any = hf.LlamaForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return make(hf.LlamaConfig(**sizes, **heads, **tokens, **options)).eval()


def bert(make: Any = hf.BertForMaskedLM, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    rest = {"vocab_size": VOCAB, "num_attention_heads": 4, "max_position_embeddings": 64}
    return make(hf.BertConfig(**sizes, **rest, **options)).eval()


def t5(make: Any = hf.T5ForConditionalGeneration, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4}
    tokens = {"vocab_size": VOCAB, "decoder_start_token_id": 0, "eos_token_id": None}
    return make(hf.T5Config(**sizes, **tokens, **options)).eval()


MODELS = {"llama": (llama, 4), "bert": (bert, 4), "t5": (t5, 10)}


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def inputs_of(name: str) -> dict[str, Tensor]:
    decoder = {"decoder_input_ids": tokens(length=4)} if name == "t5" else {}
    return {"input_ids": tokens(), **decoder}


def transformed(plain: nn.Module, **options: Any) -> Any:
    return mhc_compile.transform(copy.deepcopy(plain), **options)


def mhc_keys(model: nn.Module) -> set[str]:
    return {key for key in model.state_dict() if "mhc." in key}


def assert_equal(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """The same structure of outputs, of the same class, tensors equal to rounding."""
    assert type(actual) is type(expected)
    torch.testing.assert_close(
        pytree.tree_leaves(as_tuple(actual)),
        pytree.tree_leaves(as_tuple(expected)),
        rtol=tolerance,
        atol=tolerance,
    )


def as_tuple(output: Any) -> Any:
    """Caches compare by identity: only tensors, in the order in which they are returned."""
    values = output.to_tuple() if isinstance(output, hf.utils.ModelOutput) else output
    return tuple(v for v in values if not isinstance(v, hf.Cache))


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# --- generate ------------------------------------------------------------------------------------

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}


def assert_greedy(model: Any, prompt: Tensor, mask: Tensor, generated: Any) -> None:
    """Every new token is the one that the uncached model, called on what precedes it, prefers.

    One uncached call of the causal model on the whole sequence answers for all positions.
    """
    sequence = generated.sequences
    mask = torch.cat([mask, mask.new_ones(len(mask), NEW)], -1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(sequence, attention_mask=mask, position_ids=positions, use_cache=False).logits
    start = prompt.shape[1]
    assert sequence[:, start:].equal(logits[:, start - 1 : -1].argmax(-1))
    torch.testing.assert_close(
        torch.stack(generated.logits, 1), logits[:, start - 1 : -1], rtol=1e-4, atol=1e-5
    )


def padded_prompt() -> tuple[Tensor, Tensor]:
    """Two prompts, the second two tokens shorter and padded on the left."""
    prompt = tokens(2, 5)
    prompt[1, :2] = 0
    return prompt, (prompt != 0).long()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache: str) -> None:
    plain = llama()
    model = transformed(plain)
    prompt, mask = padded_prompt()
    how = {**GREEDY, "attention_mask": mask, "output_logits": True}
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}

    expected, generated = plain.generate(prompt, **how), model.generate(prompt, **how)
    assert generated.sequences.equal(expected.sequences)
    assert_equal(generated.logits, expected.logits)

    perturb(model)
    generated = model.generate(prompt, **how)
    assert_greedy(model, prompt, mask, generated)
    assert relative(generated.logits[0], expected.logits[0]) > 1e-2


def test_generate_compiles_its_decode_step_with_this_backend() -> None:
    plain = llama()
    model = transformed(plain)
    prompt, mask = padded_prompt()
    compile_config = hf.CompileConfig()
    compile_config._compile_all_devices = True  # the library does it by itself on GPUs only
    how = {**GREEDY, "attention_mask": mask, "output_logits": True}
    static = {**how, "cache_implementation": "static", "compile_config": compile_config}
    counters.clear()

    expected, generated = plain.generate(prompt, **how), model.generate(prompt, **static)
    assert sum(counters["inductor"].values()) > 0, "the decode step did not go through Inductor"
    assert generated.sequences.equal(expected.sequences)
    assert_equal(generated.logits, expected.logits)

    perturb(model)
    assert_greedy(model, prompt, mask, model.generate(prompt, **static))


def test_generate_of_an_encoder_decoder() -> None:
    plain = t5()
    model = transformed(plain)
    expected = plain.generate(tokens(), output_logits=True, **GREEDY)
    generated = model.generate(tokens(), output_logits=True, **GREEDY)
    assert generated.sequences.equal(expected.sequences)
    assert_equal(generated.logits, expected.logits)

    perturb(model)
    generated = model.generate(tokens(), output_logits=True, **GREEDY)
    with torch.no_grad():
        uncached = model(
            input_ids=tokens(), decoder_input_ids=generated.sequences[:, :-1], use_cache=False
        ).logits
    assert generated.sequences[:, 1:].equal(uncached.argmax(-1))
    assert relative(uncached, torch.stack(expected.logits, 1)) > 1e-2


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_output_that_can_be_asked_for_equals_the_plain_one(name: str) -> None:
    """At the very first call, where the library installs the hooks that collect outputs."""
    make, sites = MODELS[name]
    plain = make(attn_implementation="eager")
    model = transformed(plain)
    assert len(mhc_keys(model)) == 3 * sites
    inputs, flags = inputs_of(name), {"output_hidden_states": True, "output_attentions": True}
    expected = plain(**inputs, **flags)
    states = [key for key in expected if key.endswith(("hidden_states", "attentions"))]
    assert len(states) >= 2

    actual = model(**inputs, **flags)
    assert actual.keys() == expected.keys()
    assert [len(actual[key]) for key in states] == [len(expected[key]) for key in states]
    assert_equal(actual, expected)
    assert_equal(model(**inputs, return_dict=False), plain(**inputs, return_dict=False))

    perturb(model)
    moved = model(**inputs, **flags)
    assert_equal(moved.logits, model(**inputs, return_dict=False)[0])
    for key in (key for key in states if key.endswith("hidden_states")):
        assert relative(moved[key][-1], expected[key][-1]) > 1e-2


def test_outputs_asked_for_by_the_configuration_or_by_one_call_do_not_stay() -> None:
    plain = bert()
    plain.config.output_hidden_states = True
    model = transformed(plain)
    assert len(model(**inputs_of("bert")).hidden_states) == LAYERS + 1
    assert model(**inputs_of("bert"), output_hidden_states=False).hidden_states is None


def test_explain_takes_the_arguments_of_a_call() -> None:
    explanation = mhc_compile.explain(llama(), tokens(), output_hidden_states=True, use_cache=False)
    branches = ("self_attn", "mlp")
    expected = [f"model.layers.{i}.{branch}" for i in range(LAYERS) for branch in branches]
    assert [site.name for site in explanation.sites] == expected
    assert all("modeling_llama.py:" in site.location for site in explanation.sites)


# --- parts of a model ----------------------------------------------------------------------------


def test_the_model_without_its_head_can_be_called_by_itself() -> None:
    plain = llama()
    model = transformed(plain)
    assert_equal(model.model(tokens()), plain.model(tokens()))
    perturb(model)
    hidden = model.model(tokens()).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(tokens()).logits, rtol=1e-5, atol=1e-6)
    assert relative(hidden, plain.model(tokens()).last_hidden_state) > 1e-2


def test_an_encoder_can_be_called_by_itself() -> None:
    plain = t5()
    model = transformed(plain)
    assert_equal(model.get_encoder()(tokens()), plain.get_encoder()(tokens()))
    perturb(model)
    encoded = model.get_encoder()(tokens())
    assert relative(encoded[0], plain.get_encoder()(tokens())[0]) > 1e-2
    decoder = {"decoder_input_ids": tokens(length=4)}
    whole = model(input_ids=tokens(), **decoder)
    torch.testing.assert_close(whole.encoder_last_hidden_state, encoded[0], rtol=1e-5, atol=1e-6)
    assert_equal(model(encoder_outputs=encoded, **decoder).logits, whole.logits)


def test_a_layer_called_by_itself_raises() -> None:
    model = transformed(llama())
    hidden, positions = torch.randn(1, 3, WIDTH), torch.arange(3)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    with pytest.raises(MhcError):
        model.model.layers[0](hidden, position_embeddings=rotary, position_ids=positions)


# --- gradient checkpointing ----------------------------------------------------------------------


def kept_for_backward(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result of a call and the bytes of the memory that autograd keeps for it."""
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        kept[memory.data_ptr()] = (tensor, memory.nbytes())  # alive: no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return result, sum(size for _, size in kept.values())


def train_step(model: nn.Module) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Loss, bytes kept and gradients of one call with dropout, from one random state."""
    model.train().zero_grad()
    torch.manual_seed(3)
    ids = tokens(4, 16)
    loss, size = kept_for_backward(lambda: model(input_ids=ids, labels=ids).loss)
    loss.backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), size, gradients


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    make, _ = MODELS[name]
    plain = make(**({"attention_dropout": 0.1} if name == "llama" else {}))
    model = transformed(plain)
    plain_loss, _, plain_gradients = train_step(plain)
    loss, _, gradients = train_step(model)
    torch.testing.assert_close(loss, plain_loss)
    perturb(model)
    loss, size, gradients = train_step(model)
    assert gradients.keys() > plain_gradients.keys()

    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed_loss, checkpointed_size, checkpointed_gradients = train_step(model)
    assert checkpointed_size < size / 2
    torch.testing.assert_close(checkpointed_loss, loss)
    assert_equal(checkpointed_gradients, gradients)

    model.gradient_checkpointing_disable()
    again, size_again, _ = train_step(model)
    assert again.equal(loss) and size_again == size


# --- dtypes --------------------------------------------------------------------------------------

DTYPES = [torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_casts(dtype: torch.dtype, when: str) -> None:
    plain = llama()
    exact = plain(tokens()).logits
    if when == "before":
        model = transformed(plain.to(dtype))
    else:
        model = transformed(plain).to(dtype)
        plain.to(dtype)
    parameters = torch.float64 if dtype is torch.float64 else torch.float32
    assert {p.dtype for p in mhc_compile.parameters(model)} == {parameters}
    assert mhc_keys(model) == mhc_keys(transformed(llama()))
    assert model.dtype is dtype

    expected, actual = plain(tokens()).logits, model(tokens()).logits
    assert actual.dtype is dtype
    # No farther from the plain float32 model than the plain model of this dtype, to a rounding.
    assert relative(actual, exact) < 1.5 * relative(expected, exact) + 1e-6

    perturb(model)
    moved = model(tokens()).logits
    assert relative(moved, expected) > 5e-2
    exact_moved = copy.deepcopy(model).float()(tokens()).logits
    assert relative(moved, exact_moved) < max(10 * torch.finfo(dtype).eps, 1e-5)


def test_t5_in_half_precision_has_the_sites_of_t5() -> None:
    """In float16 its forward clamps the stream after each sub-layer, where isinf finds a number."""
    plain = t5().half()
    model = transformed(plain)
    assert mhc_keys(model) == mhc_keys(transformed(t5()))
    expected, actual = plain(**inputs_of("t5")).logits, model(**inputs_of("t5")).logits
    assert actual.dtype is torch.float16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    perturb(model)
    moved = model(**inputs_of("t5")).logits
    assert relative(moved, expected) > 5e-2
    assert relative(moved, model.float()(**inputs_of("t5")).logits) < 1e-2


# --- parameters ----------------------------------------------------------------------------------


def test_tied_weights_stay_one_object() -> None:
    plain = llama(tie_word_embeddings=True)
    model = transformed(plain)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert each.lm_head.weight is each.model.embed_tokens.weight
    extra = sum(p.numel() for p in mhc_compile.parameters(model))
    assert model.num_parameters() == plain.num_parameters() + extra
    model.resize_token_embeddings(VOCAB + 8)
    assert model(tokens() + 8).logits.shape[-1] == VOCAB + 8
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_base_parameters_train_only_the_mhc_ones(when: str) -> None:
    plain = llama()
    if when == "before":
        model = transformed(plain.requires_grad_(False))
    else:
        model = transformed(plain)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("mhc." in key)
    ids = tokens()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in mhc_compile.parameters(model)}
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert moved and moved <= mhc_keys(model)
    assert {key for key in moved if key.endswith("bias")} == {
        key for key in mhc_keys(model) if key.endswith("bias")
    }
    assert all(p.grad is None for key, p in model.named_parameters() if "mhc." not in key)


def test_functional_call_with_other_parameters() -> None:
    plain = llama()
    model, other = transformed(plain), perturb_copy(transformed(plain))
    expected = other(tokens()).logits
    parameters = dict(other.named_parameters())
    actual = functional_call(model, parameters, (tokens(),)).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    doubled = {"model.norm.weight": 2 * model.model.norm.weight}
    actual = functional_call(model, doubled, (tokens(),)).logits
    torch.testing.assert_close(actual, 2 * plain(tokens()).logits, rtol=1e-4, atol=1e-5)
    assert_equal(model(tokens()).logits, plain(tokens()).logits)  # its own are back


def perturb_copy(model: Any) -> Any:
    perturb(model)
    return model


# --- copies and files ----------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_the_same_model_and_independent(through: Callable[[Any], Any]) -> None:
    model = perturb_copy(transformed(bert()))
    expected = model(tokens()).logits
    copied = through(model)
    assert isinstance(copied, hf.BertForMaskedLM)
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert copied(tokens()).logits.equal(expected)
    with torch.no_grad():
        for parameter in mhc_compile.parameters(copied):
            parameter.add_(1)
    assert relative(copied(tokens()).logits, expected) > 1e-3
    assert model(tokens()).logits.equal(expected)


def test_save_pretrained_and_load_restore_the_model_exactly(tmp_path: Any) -> None:
    model = perturb_copy(transformed(llama(tie_word_embeddings=True), n=2))
    model.save_pretrained(tmp_path)
    mhc_compile.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]

    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is hf.LlamaForCausalLM and not mhc_keys(plain)
    loaded = mhc_compile.load(plain, tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].equal(value), key
    assert loaded(tokens()).logits.equal(model(tokens()).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_state_dicts_go_both_ways() -> None:
    plain = llama()
    model = transformed(plain)
    keys = mhc_keys(model)
    assert model.state_dict().keys() == plain.state_dict().keys() | keys
    assert len(keys) == 3 * 2 * LAYERS

    # A plain checkpoint into a transformed model: what is missing is what transform added.
    other = {key: torch.randn_like(value) for key, value in plain.state_dict().items()}
    result = model.load_state_dict(other, strict=False)
    assert set(result.missing_keys) == keys and not result.unexpected_keys
    plain.load_state_dict(other)
    assert_equal(model(tokens()).logits, plain(tokens()).logits)

    # A transformed checkpoint into a plain model, and into another transformed one.
    perturb(model)
    result = plain.load_state_dict(model.state_dict(), strict=False)
    assert set(result.unexpected_keys) == keys and not result.missing_keys
    second = transformed(llama())
    second.load_state_dict(model.state_dict())
    assert second(tokens()).logits.equal(model(tokens()).logits)


def test_revert_gives_the_plain_model_back() -> None:
    plain = t5()
    model = perturb_copy(transformed(plain))
    assert relative(model(**inputs_of("t5")).logits, plain(**inputs_of("t5")).logits) > 1e-2
    assert mhc_compile.revert(model) is model
    assert type(model) is hf.T5ForConditionalGeneration
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model(**inputs_of("t5")).logits.equal(plain(**inputs_of("t5")).logits)
