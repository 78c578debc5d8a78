"""Hugging Face models, transformed, used the way their users use them.

At initialisation a transformed model equals the plain one, whatever happens to its parameters on
the way. Most tests therefore look a second time with all mHC parameters moved far away: then it
must differ from the plain model, and agree with itself whichever way it is run.
"""

import copy
import functools
import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils import _pytree as pytree

import mhc_compile
from mhc_compile import MhcError, _torch
from mhc_compile.errors import ChainBrokenError
from tests.checks import assert_moves

hf.logging.set_verbosity_error()
VOCAB, WIDTH, LAYERS = 64, 32, 2
SITES = {"llama": 2 * LAYERS, "bert": 2 * LAYERS, "t5": 2 + 3}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def llama(**options: Any) -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, **heads, **tokens, **options}))


def bert(**options: Any) -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    rest = {"vocab_size": VOCAB, "num_attention_heads": 4, "max_position_embeddings": 64}
    return hf.BertForMaskedLM(hf.BertConfig(**sizes, **rest, **options))


def t5(**options: Any) -> Any:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    tokens = {"vocab_size": VOCAB, "decoder_start_token_id": 0, "eos_token_id": None}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **tokens, **options))


MAKERS = {"llama": llama, "bert": bert, "t5": t5}


def plain_model(name: str, **options: Any) -> Any:
    """A model with the same random weights at every call, in eval mode."""
    torch.manual_seed(0)
    return MAKERS[name](**options).eval()


def transformed(name: str, **options: Any) -> Any:
    """The same model, transformed. A copy, so that its sites are searched for only once."""
    return copy.deepcopy(_transformed(name, **options))


@functools.cache
def _transformed(name: str, **options: Any) -> Any:
    return mhc_compile.transform(plain_model(name, **options))


def moved(model: Any, inputs: dict[str, Tensor] | None = None) -> Any:
    """The model itself, with all mHC parameters far from where they started, and seen to act."""
    assert_moves(model, inputs or inputs_of(model.config.model_type))
    return model


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def inputs_of(name: str) -> dict[str, Tensor]:
    decoder = {"decoder_input_ids": tokens(length=4)} if name == "t5" else {}
    return {"input_ids": tokens(), **decoder}


def mhc_keys(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if "mhc." in name}


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
        logits = model(
            sequence, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
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
    plain, model = plain_model("llama"), transformed("llama")
    prompt, mask = padded_prompt()
    how = {**GREEDY, "attention_mask": mask, "output_logits": True}
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}

    expected, generated = plain.generate(prompt, **how), model.generate(prompt, **how)
    assert generated.sequences.equal(expected.sequences)
    assert_equal(generated.logits, expected.logits)

    generated = moved(model).generate(prompt, **how)
    assert_greedy(model, prompt, mask, generated)
    assert relative(generated.logits[0], expected.logits[0]) > 1e-2


def test_generate_compiles_its_decode_step_with_this_backend() -> None:
    one = {"num_hidden_layers": 1}
    plain, model = plain_model("llama", **one), transformed("llama", **one)
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

    assert_greedy(model, prompt, mask, moved(model).generate(prompt, **static))


def test_generate_of_an_encoder_decoder_and_its_encoder_alone() -> None:
    plain, model = plain_model("t5"), transformed("t5")
    how = {**GREEDY, "output_logits": True}
    expected, generated = plain.generate(tokens(), **how), model.generate(tokens(), **how)
    assert generated.sequences.equal(expected.sequences)
    assert_equal(generated.logits, expected.logits)
    expected_encoded = plain.get_encoder()(tokens())
    assert_equal(model.get_encoder()(tokens()), expected_encoded)

    generated = moved(model).generate(tokens(), **how)
    decoder_input_ids = generated.sequences[:, :-1]
    with torch.no_grad():
        uncached = model(tokens(), decoder_input_ids=decoder_input_ids, use_cache=False)
    assert generated.sequences[:, 1:].equal(uncached.logits.argmax(-1))
    assert relative(uncached.logits, torch.stack(expected.logits, 1)) > 1e-2
    encoded = model.get_encoder()(tokens())
    assert relative(encoded[0], expected_encoded[0]) > 1e-2
    assert_equal(encoded[0], uncached.encoder_last_hidden_state)


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_every_output_that_can_be_asked_for_equals_the_plain_one(name: str) -> None:
    """At the very first call, where the library installs the hooks that collect outputs."""
    eager = {"attn_implementation": "eager"}
    plain, model = plain_model(name, **eager), transformed(name, **eager)
    assert len(mhc_keys(model)) == 3 * SITES[name]
    inputs, flags = inputs_of(name), {"output_hidden_states": True, "output_attentions": True}
    expected = plain(**inputs, **flags)
    states = [key for key in expected if key.endswith(("hidden_states", "attentions"))]
    assert len(states) >= 2

    try:
        actual = model(**inputs, **flags)
    except ChainBrokenError as error:  # older Dynamos break the graph where outputs are collected
        assert torch.__version__ < "2.13" and "output_capturing.py" in str(error)
        return
    assert actual.keys() == expected.keys()
    assert [len(actual[key]) for key in states] == [len(expected[key]) for key in states]
    assert_equal(actual, expected)
    assert_equal(model(**inputs, return_dict=False), plain(**inputs, return_dict=False))

    actual = moved(model)(**inputs, **flags)
    assert_equal(actual.logits, model(**inputs, return_dict=False)[0])
    for key in (key for key in states if key.endswith("hidden_states")):
        assert relative(actual[key][-1], expected[key][-1]) > 1e-2


def test_outputs_asked_for_by_the_configuration() -> None:
    plain = plain_model("bert")
    plain.config.output_hidden_states = True
    model = mhc_compile.transform(plain)
    assert len(model(tokens()).hidden_states) == LAYERS + 1
    assert "hidden_states" not in model(tokens(), output_hidden_states=False)


def test_explain_takes_the_arguments_of_a_call() -> None:
    plain = plain_model("llama")
    explanation = mhc_compile.explain(plain, tokens(), output_hidden_states=True, use_cache=False)
    branches = ("self_attn", "mlp")
    expected = [f"model.layers.{i}.{branch}" for i in range(LAYERS) for branch in branches]
    assert [site.name for site in explanation.sites] == expected
    assert all("modeling_llama.py:" in site.location for site in explanation.sites)


# --- parts of a model ----------------------------------------------------------------------------


def test_the_model_without_its_head_can_be_called_by_itself() -> None:
    plain, model = plain_model("llama"), transformed("llama")
    expected = plain.model(tokens())
    assert_equal(model.model(tokens()), expected)
    hidden = moved(model).model(tokens()).last_hidden_state
    assert_equal(model.lm_head(hidden), model(tokens()).logits)
    assert relative(hidden, expected.last_hidden_state) > 1e-2


def test_a_layer_called_by_itself_raises() -> None:
    model = transformed("llama")
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


TRAINING = {"input_ids": tokens(4, 16), "labels": tokens(4, 16)}


def train_step(model: nn.Module) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Loss, bytes kept and gradients of one call with dropout, from one random state."""
    model.train().zero_grad()
    torch.manual_seed(3)
    loss, size = kept_for_backward(lambda: model(**TRAINING).loss)
    loss.backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), size, gradients


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*:FutureWarning")
@pytest.mark.parametrize(("name", "use_reentrant"), [("llama", False), ("bert", True)])
def test_gradient_checkpointing_with_dropout(name: str, use_reentrant: bool) -> None:
    dropout = {"attention_dropout": 0.1} if name == "llama" else {}
    model = transformed(name, **dropout)
    loss, size, gradients = train_step(model)
    plain_loss, _, plain_gradients = train_step(plain_model(name, **dropout))
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close({k: gradients[k] for k in plain_gradients}, plain_gradients)

    # On the same model: it is traced again as soon as checkpointing is switched.
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    loss, checkpointed_size, checkpointed_gradients = train_step(model)
    assert checkpointed_size < size / 2
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(checkpointed_gradients, gradients)

    loss, _, checkpointed_gradients = train_step(moved(model, TRAINING))
    model.gradient_checkpointing_disable()
    expected, size_again, gradients = train_step(model)
    assert size_again == size
    assert not expected.allclose(plain_loss)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(checkpointed_gradients, gradients)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*:FutureWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_inputs_that_require_gradients_for_checkpointing(frozen: bool, monkeypatch) -> None:
    """A hook on the embedding calls `requires_grad_`, also where nothing is recorded."""
    monkeypatch.setattr(
        _torch, "compile_inductor", lambda graph, inputs, _: aot_eager(graph, inputs)
    )
    model = transformed("llama")
    model.get_input_embeddings().requires_grad_(not frozen)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    moved(model, TRAINING)
    train_step(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()

    model.eval()
    outputs = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            outputs.append(model(tokens()).logits.detach())
    generated = model.generate(tokens(1), **GREEDY).sequences
    assert mhc_compile.check(model, **TRAINING)

    unhooked = transformed("llama")
    unhooked.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = unhooked(tokens()).logits
    for output in outputs:
        torch.testing.assert_close(output, expected)
    assert generated.equal(unhooked.generate(tokens(1), **GREEDY).sequences)


# --- dtypes --------------------------------------------------------------------------------------


@functools.cache
def logits_in_float32(far: bool) -> Tensor:
    """Logits of the transformed Llama, as it starts or with its mHC parameters moved."""
    model = transformed("llama")
    return (moved(model) if far else model)(tokens()).logits.detach()


@pytest.mark.parametrize(
    ("dtype", "when"),
    [
        (torch.bfloat16, "before"),
        (torch.bfloat16, "after"),
        (torch.float16, "after"),
        (torch.float64, "before"),
        (torch.float64, "after"),
    ],
    ids=str,
)
def test_casts_before_and_after_transform(dtype: torch.dtype, when: str) -> None:
    plain = plain_model("llama").to(dtype)
    if when == "before":
        model = mhc_compile.transform(copy.deepcopy(plain))
    else:
        model = transformed("llama").to(dtype)
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    assert {p.dtype for p in mhc_compile.parameters(model)} == {exact}
    assert len(mhc_keys(model)) == 3 * SITES["llama"]
    assert model.dtype is dtype

    expected, actual = plain(tokens()).logits, model(tokens()).logits
    assert actual.dtype is dtype
    # No farther from float32 than the plain model of this dtype is, to a rounding.
    error = relative(expected, logits_in_float32(far=False))
    assert relative(actual, logits_in_float32(far=False)) < 1.5 * error + 1e-6

    actual = moved(model)(tokens()).logits
    assert relative(actual, expected) > 5e-2
    rounding = max(10 * torch.finfo(dtype).eps, 1e-5)
    assert relative(actual, logits_in_float32(far=True)) < rounding


def test_t5_in_half_precision_has_the_sites_of_t5() -> None:
    """In float16 it clamps the stream behind every sub-layer in which isinf finds something."""
    plain = plain_model("t5").half()
    model = mhc_compile.transform(copy.deepcopy(plain))
    assert mhc_keys(model) == mhc_keys(transformed("t5"))
    expected, actual = plain(**inputs_of("t5")).logits, model(**inputs_of("t5")).logits
    assert actual.dtype is torch.float16
    assert relative(actual, expected) < 1e-2
    actual = moved(model)(**inputs_of("t5")).logits
    assert relative(actual, expected) > 5e-2
    assert relative(actual, model.float()(**inputs_of("t5")).logits) < 1e-2


# --- parameters ----------------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_tied_weights_stay_one_object() -> None:
    plain = plain_model("llama", tie_word_embeddings=True)
    model = mhc_compile.transform(copy.deepcopy(plain))
    for each in (model, copy.deepcopy(model), through_pickle(model), through_torch_save(model)):
        assert each.lm_head.weight is each.model.embed_tokens.weight
    extra = sum(p.numel() for p in mhc_compile.parameters(model))
    assert model.num_parameters() == plain.num_parameters() + extra
    model.resize_token_embeddings(VOCAB + 8)
    assert model(tokens() + 8).logits.shape[-1] == VOCAB + 8
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_base_parameters_train_only_the_mhc_ones(when: str) -> None:
    if when == "before":
        model = mhc_compile.transform(plain_model("llama").requires_grad_(False))
    else:
        model = transformed("llama")
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("mhc." in key)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in mhc_compile.parameters(model)}

    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.train()(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]
    assert all(p.grad is None for key, p in model.named_parameters() if "mhc." not in key)
    now = model.state_dict()
    assert {key for key in now if not now[key].equal(before[key])} == mhc_keys(model)
    moved(model)


def test_functional_call_with_other_parameters() -> None:
    plain, model, other = plain_model("llama"), transformed("llama"), moved(transformed("llama"))
    actual = functional_call(model, dict(other.named_parameters()), (tokens(),)).logits
    assert_equal(actual, other(tokens()).logits)

    doubled = {"model.norm.weight": 2 * model.model.norm.weight}
    actual = functional_call(model, doubled, (tokens(),)).logits
    expected = plain(tokens()).logits
    assert_equal(actual, 2 * expected)
    assert_equal(model(tokens()).logits, expected)  # its own are back


# --- copies and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("through", [copy.deepcopy, through_torch_save])
def test_a_copy_is_the_same_model_and_independent(through: Callable[[Any], Any]) -> None:
    model = moved(transformed("bert"))
    expected = model(tokens()).logits  # a model that was called is copied, too
    copied = through(model)
    assert isinstance(copied, hf.BertForMaskedLM)
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert copied(tokens()).logits.equal(expected)
    assert relative(moved(copied)(tokens()).logits, expected) > 1e-3
    assert model(tokens()).logits.equal(expected)


def test_save_pretrained_and_load_restore_the_model_exactly(tmp_path: Path) -> None:
    model = plain_model("llama", tie_word_embeddings=True)
    moved(mhc_compile.transform(model, n=2))
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
    plain, model = plain_model("llama"), transformed("llama")
    parameters = mhc_keys(model)
    keys = parameters | {f"model.layers.{i}.mhc._extra_state" for i in range(LAYERS)}
    assert model.state_dict().keys() == plain.state_dict().keys() | keys
    assert len(parameters) == 3 * SITES["llama"]

    # A plain checkpoint into a transformed model: what is missing is what transform added.
    checkpoint = {key: 0.05 * torch.randn_like(value) for key, value in plain.state_dict().items()}
    result = model.load_state_dict(checkpoint, strict=False)
    assert set(result.missing_keys) == parameters and not result.unexpected_keys
    plain.load_state_dict(checkpoint)
    assert_equal(model(tokens()).logits, plain(tokens()).logits)

    # A transformed checkpoint into a plain model, and into another transformed one.
    checkpoint = moved(model).state_dict()
    result = plain.load_state_dict(checkpoint, strict=False)
    assert set(result.unexpected_keys) == keys and not result.missing_keys
    second = transformed("llama")
    second.load_state_dict(checkpoint)
    assert second(tokens()).logits.equal(model(tokens()).logits)


def test_revert_gives_the_plain_model_back() -> None:
    plain, model = plain_model("bert"), moved(transformed("bert"))
    expected = plain(tokens()).logits
    assert relative(model(tokens()).logits, expected) > 1e-3
    assert mhc_compile.revert(model) is model
    assert type(model) is hf.BertForMaskedLM
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model(tokens()).logits.equal(expected)
