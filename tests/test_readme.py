"""README tells the truth: its code runs as it stands, and what it promises is checked somewhere.

Two tables to edit with README: `BLOCKS`, what each code block needs, and `PROMISES`, what checks
each sentence that promises something. A sentence promises something if it holds one of the words of
`PROMISE`.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mhc_compile
from mhc_compile import _torch
from mhc_compile.passes import pipeline
from mhc_compile.passes.runner import Tier
from tests import checks
from tests.zoo.rewritten import partition

from .test_huggingface import llama

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# --- code blocks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """What a code block is.

    Attributes:
        begins: its first line.
        goes_on: whether it goes on where the one before it ended.
        given: the names that it takes for granted, of `given` below.
        not_run: why it is not executed by this file; "" if it is.
    """

    begins: str
    given: tuple[str, ...] = ()
    goes_on: bool = False
    not_run: str = ""


BLOCKS = [
    Block("pip install .", not_run="needs a network and minutes: a fresh clone does it, make demo"),
    Block("import torch, mhc_compile", given=("model", "ids")),
    Block("LlamaForCausalLM: 4 sites in 1 chain", not_run="what the first one prints first"),
    Block("LlamaForCausalLM: 4 sites, n = 4: all is well", not_run="what it prints then"),
    Block('compiled = torch.compile(model, backend="mhc"', given=("model", "ids", "torch")),
    Block(
        "mhc_compile.transform(model, n=4)",
        given=("model", "mhc_compile", "Trainer", "arguments", "dataset"),
    ),
    Block(
        'mhc_compile.save(model, "adapter")',
        given=("transformed as model", "plain", "mhc_compile"),
    ),
    Block(
        'model.save_pretrained("folder")',
        given=("transformed as model", "AutoModelForCausalLM", "mhc_compile"),
    ),
]


def blocks() -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def given(name: str, folder: Path) -> Any:
    """What README's blocks take for granted, at its smallest."""
    torch.manual_seed(0)
    plain = llama(hidden_size=64)
    ids = torch.randint(1, plain.config.vocab_size, (2, 7))
    if name in ("model", "plain"):
        return plain
    if name == "transformed":
        return mhc_compile.transform(plain, n=4)
    if name == "ids":
        return ids
    if name == "dataset":
        return [{"input_ids": row, "labels": row} for row in ids]
    if name == "arguments":
        from transformers import TrainingArguments

        return TrainingArguments(str(folder), max_steps=1, report_to=[], use_cpu=True)
    if name == "Trainer":
        from transformers import Trainer

        return Trainer
    if name == "AutoModelForCausalLM":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM
    return {"torch": torch, "mhc_compile": mhc_compile}[name]


def execute(number: int, folder: Path) -> tuple[dict[str, Any], str]:
    """Run a block, and those that it goes on from; its names and what it printed."""
    block, (_, text) = BLOCKS[number], blocks()[number]
    names = execute(number - 1, folder)[0] if block.goes_on else {}
    for name in block.given:
        source, _, target = name.partition(" as ")
        names[target or source] = given(source, folder)
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(text, f"README.md, block {number}", "exec"), names)
    return names, printed.getvalue()


def test_every_block_is_in_the_table_in_order() -> None:
    found = [text for _, text in blocks()]
    assert len(found) == len(BLOCKS)
    for text, block in zip(found, BLOCKS, strict=True):
        assert text.startswith(block.begins)
    assert README.count("```") == 2 * len(BLOCKS)


@pytest.mark.parametrize("number", [i for i, b in enumerate(BLOCKS) if not b.not_run])
def test_a_block_runs_as_it_stands(number: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Inductor's own work is left out: `test_backend.py` has it."""
    monkeypatch.setattr(_torch, "compile_inductor", partial(partition, saved=[]))
    names, _ = execute(number, tmp_path)
    plain, ids = given("plain", tmp_path), given("ids", tmp_path)
    model = names["model"]
    if "Trainer" in names:  # one step was taken: another function than at the start
        checks.assert_moves(model.eval(), {"input_ids": ids, "labels": ids})
    else:
        inputs = {"input_ids": ids, "labels": ids}
        with_float32 = {"outputs": 1e-5, "gradients": 1e-4}
        checks.assert_transformed(plain.eval(), model.eval(), inputs, **with_float32)


def test_explain_and_check_print_what_readme_shows(tmp_path: Path) -> None:
    """Line numbers, spaces and numbers are those of a version of transformers and of a machine."""

    def shape(text: str) -> list[str]:
        lines = [re.sub(r"\S*(llama/modeling_llama\.py):\d+", r"\1", t) for t in text.splitlines()]
        lines = [re.sub(r"\d+\.\d(e-\d\d)?", "#", line) for line in lines]
        return [" ".join(line.split()) for line in lines if line.strip()]

    shown = "".join(text for _, text in blocks()[2:4])
    assert shape(execute(1, tmp_path)[1]) == shape(shown)


# --- sentences ------------------------------------------------------------------------------------

PROMISE = re.compile(
    r"\b(always|any|anything|cannot|each|every|exact(ly)?|equal|never|nothing|nowhere|only|raises?|"
    r"refused?|same|stays?|works?)\b",
    re.IGNORECASE,
)

_HF, _MODES, _ERRORS = "tests/test_huggingface.py", "tests/test_modes.py", "tests/test_errors.py"
_OWN, _BACKEND, _ZOO = "tests/test_recognize.py", "tests/test_backend.py", "tests/zoo/test_zoo.py"
_SAVE, _DDP = "tests/test_persistence.py", "tests/test_distributed.py"

# How a sentence begins (or a part of it), and the tests and commands that check it.
PROMISES: dict[str, tuple[str, ...]] = {
    "Compiler passes that turn any residual PyTorch model": ("make zoo", "make fuzz"),
    "The model is captured by Dynamo, every residual add": (
        f"{_ZOO}::test_equals_plain_model_in_float64_and_every_group_learns",
        "tests/passes/open_form/test_widen.py::test_perturbed_graph_agrees_with_truth",
    ),
    "It computes nothing and allocates nothing for them": (
        f"{_MODES}::test_transform_changes_neither_state_nor_random_numbers",
        f"{_MODES}::test_a_model_on_the_meta_device",
    ),
    "Without one it warns, the parameters are made at the first call": (
        f"{_MODES}::test_parameters_made_at_the_first_call",
    ),
    "The model stays the object it was": (
        f"{_MODES}::test_copies_are_transformed_and_independent",
        f"{_HF}::test_generate",
        f"{_HF}::test_state_dicts_go_both_ways",
        "tests/test_trainer.py::test_trainer_trains_and_resumes_from_its_checkpoint",
    ),
    "Each site adds three float32 parameters": (
        f"{_MODES}::test_bfloat16_is_no_farther_from_the_truth_than_the_plain_model",
        f"{_HF}::test_state_dicts_go_both_ways",
    ),
    "A plain checkpoint loads as before": (f"{_HF}::test_state_dicts_go_both_ways",),
    "Training, evaluation, autocast, KV caches": (
        f"{_MODES}::test_every_mode_equals_the_plain_model_with_no_more_graphs",
        f"{_MODES}::test_perturbed_every_mode_computes_the_same_function",
        f"{_MODES}::test_ambient_autocast",
        f"{_HF}::test_generate",
        f"{_HF}::test_gradient_checkpointing_with_dropout",
    ),
    "`check` takes the model's own arguments": (
        "tests/inspect/test_check.py::test_a_model_that_computes_plain_residuals",
        "tests/inspect/test_check.py::test_one_site_that_is_not_n_stream",
        "tests/inspect/test_check.py::test_the_model_is_left_as_it_was",
    ),
    "Nothing else is computed in silence": (
        "tests/compiler/test_guard.py::test_every_broken_tie_is_an_error",
        "tests/compiler/test_guard.py::test_a_block_exchanged_for_a_plain_one_is_an_error",
    ),
    "Each captured call is compared with what was declared": (
        "tests/compiler/test_guard.py::test_every_broken_tie_is_an_error",
        "tests/compiler/test_guard.py::test_a_skipped_block_is_not_a_lost_one",
        "tests/compiler/test_guard.py::test_a_block_exchanged_for_a_plain_one_is_an_error",
    ),
    "A `forward` that you replace": (
        "tests/test_ownership.py::test_what_is_done_afterwards_counts",
        "tests/test_ownership.py::test_a_forward_replaced_on_the_class_counts_at_the_next_call",
        "tests/model/test_hooks.py::test_a_hook_on_a_branch_counts_at_the_next_call_and_so_does_removing_it",
    ),
    "Forward and pre-hooks on a block": (
        "tests/model/test_hooks.py::test_a_hook_on_a_block_acts_on_every_stream_and_sees_one",
        "tests/model/test_hooks.py::test_a_hook_that_replaces_a_stream_is_named",
    ),
    "Backward hooks see": (
        "tests/model/test_hooks.py::test_a_hook_on_a_block_acts_on_every_stream_and_sees_one",
        "tests/model/test_hooks.py::test_what_torch_compile_cannot_capture_is_named",
    ),
    "`state_dict`, `torch.save` and `save_pretrained` contain": (
        f"{_SAVE}::test_the_state_of_another_function_is_refused_before_anything_is_loaded",
        f"{_SAVE}::test_a_state_that_does_not_say_what_it_is_loads_with_one_warning",
        "tests/test_pretrained.py::test_a_folder_gives_the_transformed_model_back",
    ),
    "Under the transforms of `torch.func`": (
        f"{_ERRORS}::test_transforms_of_torch_func_are_named",
    ),
    "- **Modes.** An operation keeps the mode": (
        "tests/passes/graph/test_modes.py::test_under_no_grad",
        "tests/passes/graph/test_modes.py::test_under_autocast",
        "tests/passes/graph/test_modes.py::test_a_sum_in_two_modes_is_no_site",
    ),
    "The backend is found by its entry point": (
        f"{_BACKEND}::test_the_backend_is_found_by_its_name",
    ),
    "The compiled object must be a module": (
        f"{_ERRORS}::test_a_plain_function_has_no_place_for_parameters",
        f"{_ERRORS}::test_a_plain_model_must_be_whole",
    ),
    '`model.compile(backend="mhc")` on a model written with hyper-connections': (
        f"{_OWN}::test_deepseek_v4",
        f"{_OWN}::test_glm5_next",
        f"{_OWN}::test_hy_v4",
        f"{_OWN}::test_a_model_that_follows_the_paper",
    ),
    "Parameters and state-dict keys stay; n, variant": (f"{_OWN}::test_deepseek_v4",),
    "A connection that differs stays as it is": (
        f"{_OWN}::test_the_package_hyper_connections",
        f"{_OWN}::test_qwen4_exp",
        f"{_OWN}::test_deepseek_v4_in_bfloat16_is_fused_where_it_does_not_round",
        f"{_OWN}::test_autocast_rounds_the_projection",
        "tests/passes/graph/test_modes.py::test_a_connection_in_two_modes_stays_as_it_is",
    ),
    "Options that describe new connections": (
        f"{_OWN}::test_options_of_new_connections_are_refused",
    ),
    "If Dynamo breaks the graph in front of the streams": (f"{_OWN}::test_graph_breaks",),
    "`--torch_compile_backend mhc` cannot be used": (
        "tests/test_readme.py::test_accelerate_refuses_the_name",
    ),
    "| `explain(model, *args, **kwargs)` |": (
        "tests/inspect/test_report.py::test_the_text_holds_every_add_with_its_reason_and_place",
        "tests/inspect/test_report.py::test_the_html_holds_every_add_with_its_reason_and_place",
    ),
    "| `history` |": (
        f"{_BACKEND}::test_code_is_kept_where_it_is_asked_for",
        "tests/test_config.py::test_how_much_history_is_kept_makes_no_other_configuration",
    ),
    "| `graphs(model)` |": (f"{_BACKEND}::test_graphs_keep_the_whole_history",),
    '`TORCH_LOGS="+mhc_compile"` logs': (
        "tests/compiler/test_partitioned.py::test_what_the_passes_do_is_logged_and_traced",
        "tests/passes/test_runner.py::test_passes_are_logged",
    ),
    "| `n` | 4 |": (
        "tests/test_config.py::test_defaults_are_the_papers",
        f"{_BACKEND}::test_one_stream_leaves_a_plain_model_plain",
    ),
    "| `init` |": (
        "tests/test_config.py::test_every_option_is_documented",
        "tests/model/test_connection.py::test_paper_init_has_the_published_values",
    ),
    "| `include`, `exclude` |": (f"{_MODES}::test_an_excluded_add_stays_plain_on_every_stream",),
    "**Post-norm transformers**": (
        "tests/model/test_connection.py::test_streams_of_a_non_linear_chain_start_apart_by_spread_only",
        f"{_ZOO}::test_streams_part_with_the_first_optimizer_step",
        "tests/model/test_connection.py::test_h_res_learns_from_the_first_step",
    ),
    "Pre-norm models need nothing": (
        "tests/model/test_connection.py::test_no_two_streams_start_alike",
        f"{_ZOO}::test_equals_plain_model_in_float64_and_every_group_learns",
    ),
    "An add `z = x + F(x)` where": (
        "tests/passes/sites/test_detect.py::test_sites_are_those_a_person_counts",
    ),
    "Only the flow of data counts": (
        "tests/passes/sites/test_detect.py::test_sites_are_those_a_person_counts",
    ),
    "- Taken: pre-norm, post-norm and sandwich blocks": (
        "tests/passes/sites/test_detect.py::test_sites_are_those_a_person_counts",
        "make zoo",
    ),
    "- Not taken, each with its reason in `explain`": (
        "tests/passes/sites/test_detect.py::test_rejected_adds_say_why",
        f"{_ZOO}::test_every_rejected_add_has_its_reason",
    ),
    "[docs/errors.md](docs/errors.md) what each error means": (
        "tests/test_readme.py::test_every_error_is_explained",
    ),
    "`print`, `.item()` or a branch on the value of a tensor": (
        f"{_ERRORS}::test_a_graph_break_inside_a_stream_is_located",
        f"{_ERRORS}::test_a_branch_on_a_tensor_says_what_to_write_instead",
        f"{_ERRORS}::test_layers_dropped_by_chance_are_refused_whatever_is_drawn",
    ),
    "Any other backend raises": (
        f"{_ERRORS}::test_another_backend_never_runs_plain_residuals",
        f"{_ERRORS}::test_inductor_never_runs_plain_residuals",
    ),
    "- **Export.**": (
        f"{_ERRORS}::test_export_says_how_to_do_it",
        "tests/test_graph_modules.py::test_an_exported_module_keeps_its_dynamic_shapes",
    ),
    "- **Double backward** raises": (f"{_ERRORS}::test_gradients_of_gradients_are_refused",),
    "`DistributedDataParallel(model)` works": (
        f"{_DDP}::test_two_processes_have_the_gradients_of_one",
    ),
    '`torch.compile(DDP(model), backend="mhc")` is refused': (
        f"{_DDP}::test_compiling_around_ddp_is_refused_in_words",
        f"{_DDP}::test_compiling_inside_ddp_is_whole",
    ),
    "On 2 cores of an Intel Xeon": ("make speed",),
    "A transformed module has a subclass of its class": (
        "tests/model/test_children.py::test_code_that_asks_for_the_exact_class_takes_another_way",
    ),
    "- Owners of sites cannot be called by themselves": (
        f"{_ERRORS}::test_an_owner_called_by_itself_is_only_a_part_of_a_chain",
        f"{_HF}::test_a_layer_called_by_itself_raises",
    ),
    "What a model pays, measured": ("make speed",),
    "`make test` (lint, types, tests; `pytest --order-seed N`": (
        "tests/test_readme.py::test_every_command_of_readme_exists",
    ),
    "Each sets up `.venv` first": ("make setup",),
}


def sentences() -> list[str]:
    """The sentences of README outside of code blocks, each on one line; a row of a table is one."""
    text = re.sub(r"^```.*?^```$", "\n", README, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(\||- )", r"\n\1", text, flags=re.MULTILINE)
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        row = line.startswith("|")
        found += [line] if row else re.split(r"(?<=[.:])\s+(?=[A-Z`*\[])", line)
    return found


def test_every_promise_is_in_the_table() -> None:
    missing = [
        sentence
        for sentence in sentences()
        if PROMISE.search(sentence) and not any(text in sentence for text in PROMISES)
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("text", PROMISES)
def test_a_promise_still_stands_in_readme_and_is_checked(text: str) -> None:
    assert any(text in sentence for sentence in sentences())
    assert PROMISES[text]
    for check in PROMISES[text]:
        path, _, name = check.partition("::")
        if path.startswith("make "):
            target = path.removeprefix("make ")
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        else:
            source = (ROOT / path).read_text()
            assert not name or f"def {name}(" in source, check


def test_accelerate_refuses_the_name() -> None:
    from accelerate.utils import TorchDynamoPlugin

    with pytest.raises(ValueError, match="'MHC' is not a valid DynamoBackend"):
        TorchDynamoPlugin(backend="mhc")


def test_every_error_is_explained() -> None:
    from mhc_compile.passes import errors

    text = (ROOT / "docs" / "errors.md").read_text()
    named = [name for name in errors.__all__ if name.endswith("Error") and name != "MhcError"]
    assert named and [name for name in named if f"`{name}`" not in text] == []


def test_every_command_of_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`?make ([a-z][a-z-]*)", README))
    assert named and all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in named)


def test_every_pass_is_named() -> None:
    """In the list of docs/how_it_works.md all, in the row `disabled` those that may be left out."""
    text = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\d+\. \*\*(\w+)\*\*", text, re.MULTILINE)
    in_graph = [step.name for step in pipeline.EVERY if step not in pipeline.PARTITIONED]
    assert listed == in_graph
    assert all(f"`{step.name}`" in text or f"**{step.name}**" in text for step in pipeline.EVERY)
    (row,) = (line for line in README.splitlines() if line.startswith("| `disabled`"))
    optional = [step.name for step in pipeline.EVERY if step.tier is Tier.OPTIMISATION]
    assert re.findall(r"`(\w+)`", row.split("|")[3]) == optional
