"""Random residual programs: a small tree, written out as Python source, run as an nn.Module.

`programs()` is a hypothesis strategy of `Program`. A program is data (frozen dataclasses, which
hypothesis shrinks); `program.source()` is the module it stands for, as text that a person can
read, run and step through; `program.build()` executes that text. So a failing example prints as
ordinary code:

    class Main(nn.Module):
        ...
        def forward(self, inp, cond):
            x = inp
            mem = self.mem0(cond)
            h1 = self.norm0(x)
            f2 = self.mlp1(h1)
            x = x + f2
            return x

Streams have the layout [batch, tokens, width] ("btc"), [batch * tokens, width] ("flat"),
[tokens, batch, width] ("tbc") or [batch, width, tokens] ("bct"). Everything is float64.

Each thing a program contains is tagged: `program.build().features` counts them, `FEATURES` names
all there are.
"""

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

BATCH, VOCABULARY, ATTENTION_HEADS = 2, 11, 2
Layout = Literal["btc", "flat", "tbc", "bct"]

# -- branches that are modules ---------------------------------------------------------------------


def spelled_gelu(u: Tensor) -> Tensor:
    """The tanh approximation of GELU, written out; its inner add looks residual and is not."""
    return 0.5 * u * (1.0 + torch.tanh(0.7978845608 * (u + 0.044715 * u**3)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "spelled_gelu": spelled_gelu,
}


class SpelledNorm(nn.Module):
    """RMSNorm in elementary operations, in one of three spellings."""

    def __init__(self, width: int, spelling: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == 0:
            variance = x.to(torch.float64).pow(2).mean(-1, keepdim=True)
            return self.weight * (x * torch.rsqrt(variance + 1e-6))
        if self.spelling == 1:
            return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-6) * self.weight
        dtype = x.dtype
        x = x.double()
        x = x * torch.rsqrt(torch.mean(torch.square(x), -1, keepdim=True) + 1e-6)
        return (x * self.weight).to(dtype)


class Mlp(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width + 3), nn.Linear(width + 3, width)
        self.activation = activation

    def forward(self, h: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(h)))


class Glu(nn.Module):
    """A gated linear unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return F.silu(self.gate(h)) * self.value(h)


class SelfGate(nn.Module):
    """The input times a gate computed from it, as in squeeze-and-excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(self.gate(h))


class Attention(nn.Module):
    """Attention over the last axis but one; rotary and an additive bias are options."""

    def __init__(self, width: int, tokens: int, kind: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.kind, self.size = kind, width // ATTENTION_HEADS
        angles = torch.arange(tokens)[:, None] * 0.7 ** torch.arange(self.size)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.bias = nn.Parameter(torch.randn(tokens, tokens)) if kind == "bias" else None

    def rotate(self, q: Tensor) -> Tensor:
        half = self.size // 2
        turned = torch.cat((-q[..., half:], q[..., :half]), dim=-1)
        return q * self.cos + turned * self.sin

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (
            project(h).view(*h.shape[:-1], ATTENTION_HEADS, self.size).transpose(-2, -3)
            for project in (self.q, self.k, self.v)
        )
        if self.kind == "rotary":
            q, k = self.rotate(q), self.rotate(k)
        if self.kind == "sdpa":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-1, -2) / self.size**0.5
            if self.bias is not None:
                scores = scores + self.bias
            mixed = torch.matmul(F.softmax(scores, dim=-1), v)
        return self.out(mixed.transpose(-2, -3).reshape(h.shape))


class CrossAttention(nn.Module):
    """Every token attends to all tokens of a memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, h: Tensor, mem: Tensor) -> Tensor:
        k, v = self.kv(mem.reshape(-1, h.shape[-1])).chunk(2, dim=-1)
        return F.softmax(self.q(h) @ k.t(), dim=-1) @ v


class Conv(nn.Module):
    """Convolution over tokens of [batch, width, tokens] or [width, tokens]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h)


class TokenMix(nn.Module):
    """A learned matrix over tokens, as in MLP-Mixer."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, tokens) / tokens)

    def forward(self, h: Tensor) -> Tensor:
        return self.weight @ h


class DeltaRule(nn.Module):
    """A recurrence over tokens whose state is multiplied by data, never by a weight.

    Its state update looks residual (the state, plus something computed from it by a matmul) and
    is not: the state starts at a constant.
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(width, width), nn.Linear(width, width)
        self.tokens = min(tokens, 3)

    def forward(self, h: Tensor) -> Tensor:
        k, v = 0.3 * self.k(h), self.v(h)
        state = h.new_zeros((*h.shape[:-2], h.shape[-1], h.shape[-1]))
        read = h
        for t in range(self.tokens):
            key = k[..., t, :].unsqueeze(-1)
            state = state + (v[..., t, :].unsqueeze(-1) - state @ key) @ key.transpose(-1, -2)
            read = k @ state
        return read


class IntegerAdd(nn.Module):
    """Adds integers in the form of a residual; gradients stop at the rounding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        i = torch.round(3 * h).long()
        i = i + i.cumsum(-2)
        return self.out(0.1 * i.to(h.dtype))


# -- the tree --------------------------------------------------------------------------------------

NORMS = ("layer_norm", "rms_norm", "spelled_norm")
IN_PLACE = ("iadd_stream", "iadd_branch", "add__stream", "add__branch")
SPELLINGS = ("plus", "torch_add", "method_add", "alpha", *IN_PLACE)
BRANCHES = (
    "linear", "matmul", "mlp", "spelled_gelu", "attention", "sdpa", "rotary", "bias", "conv",
    "cumsum",
    "token_mix", "glu", "self_gate", "cross", "memory", "delta_rule",
    "integer_add",
)  # fmt: skip
STREAM_OPS = (
    "layer_norm", "rms_norm", "spelled_norm", "same_cast", "dropout", "relu", "tanh", "constant",
    "learned", "position", "broadcast_position", "conditioned", "float32_cast",
)  # fmt: skip
SCALES = ("constant", "learned", "conditioned")
SKIPS = (*SCALES, "dropout", "layer_norm", "same_cast")
INPUTS = ("float", "linear", "embed_sum", "embed_integer_add")
HEADS = ("none", "linear", "norm_linear", "pool")
REJECTED = ("gated", "self_gated", "projection", "pointwise", "broadcast", "independent")


@dataclass(frozen=True)
class Branch:
    """F of a site: norm, core, norm, scale, dropout."""

    core: str
    norm: str | None = None
    after: str | None = None
    scale: str | None = None
    dropout: bool = False
    cast: str | None = None
    inner: "tuple[Step, ...]" = ()
    inner_out: bool = True


@dataclass(frozen=True)
class Site:
    """x = skip(x) + F(x) [+ G(x) [+ H(x)]], the terms in any order and association."""

    branches: tuple[Branch, ...]
    order: tuple[int, ...]
    merges: tuple[int, ...]
    spellings: tuple[str, ...]
    skip: str | None = None
    branch_reads_skip: bool = False
    after: str | None = None


@dataclass(frozen=True)
class Stream:
    """Stream-wise operations on the stream."""

    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Rejected:
    """An add that looks residual to a careless reader, and ends the stream or passes it on."""

    kind: str
    branch: Branch


@dataclass(frozen=True)
class Around:
    """Steps between two uses of one state: `outer` k + F(x), `states` k + x, `stale` x + F(k)."""

    kind: Literal["outer", "states", "stale"]
    steps: "tuple[Step, ...]"
    branch: Branch


@dataclass(frozen=True)
class Call:
    """Steps in a module of their own, applied once or repeatedly."""

    steps: "tuple[Step, ...]"
    times: int


@dataclass(frozen=True)
class Relayout:
    """Another layout from here to the end of the module, or of the next relayout."""

    layout: Layout


@dataclass(frozen=True)
class Hidden:
    """The state here is returned too."""


FEATURES = frozenset(
    [
        *("input_" + kind for kind in INPUTS),
        *("head_" + kind for kind in HEADS),
        *("branch_" + kind for kind in (*BRANCHES, "chain")),
        *("stream_" + kind for kind in STREAM_OPS),
        *("skip_" + kind for kind in SKIPS),
        *("rejected_" + kind for kind in REJECTED),
        *("around_" + kind for kind in ("outer", "states", "stale")),
        *("layout_" + kind for kind in ("flat", "tbc", "bct")),
        *NORMS,
        *SPELLINGS,
        *("pre_norm", "branch_after_norm", "sandwich_norm", "post_norm", "branch_cast"),
        *("branch_scale_constant", "branch_scale_learned", "branch_dropout", "float32_cast"),
        *("parallel_2", "parallel_3", "nested_module", "shared_module", "inner_chain_of_one"),
        *("encoder", "hidden_state", "training", "evaluation"),
    ]
)
"""Every tag that a program can have."""

Step = Site | Stream | Rejected | Around | Call | Relayout | Hidden


@dataclass(frozen=True)
class Program:
    """A whole model: input, memory (for cross attention), steps, head."""

    steps: tuple[Step, ...]
    encoder: tuple[Step, ...] = ()
    source_of: str = "float"
    head: str = "none"
    training: bool = False
    width: int = 8
    tokens: int = 3
    n: int = 2
    seed: int = field(default=0, repr=False)

    @cached_property
    def written(self) -> "tuple[str, Counter[str]]":
        """The program's text and the count of each feature in it."""
        main = Writer("Main", self, arguments="inp, cond")
        main.write_main()
        return "\n\n".join([*main.classes, main.text()]), main.features

    def source(self) -> str:
        """The program as Python."""
        return self.written[0]

    @property
    def features(self) -> Counter[str]:
        """How often each feature occurs."""
        return self.written[1]

    @property
    def exact(self) -> bool:
        """Whether all of it is computed in float64."""
        return not self.features["float32_cast"]

    def build(self, *, exact: bool = False) -> nn.Module:
        """A fresh module in float64; the same parameters each time.

        Args:
            exact: with casts to float64 instead of those to float32.
        """
        torch.manual_seed(self.seed)
        source = self.source().replace(".float()", ".double()" if exact else ".float()")
        file = f"<program {hash(source):x}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        # A module that can be imported: Dynamo looks a function's globals up that way.
        module = sys.modules["fuzz_program"] = ModuleType("fuzz_program")
        module.__dict__.update({k: v for k, v in globals().items() if not k.startswith("__")})
        exec(compile(source, file, "exec"), module.__dict__)
        return module.Main().double().train(self.training)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Example inputs: token ids or floats [batch, tokens, ...], and a second sequence."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (BATCH, self.tokens)
        cond = torch.randn(*shape, self.width, generator=generator, dtype=torch.float64)
        if self.source_of.startswith("embed"):
            return torch.randint(VOCABULARY, shape, generator=generator), cond
        size = 5 if self.source_of == "linear" else self.width
        return torch.randn(*shape, size, generator=generator, dtype=torch.float64), cond

    def __repr__(self) -> str:
        return f"# n = {self.n}, training = {self.training}\n{self.source()}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what hypothesis prints
        printer.text("\n" + repr(self))


# -- writing it out --------------------------------------------------------------------------------

TO: dict[Layout, str] = {
    "btc": "",
    "flat": ".reshape(-1, {width})",
    "tbc": ".transpose(0, 1)",
    "bct": ".permute(0, 2, 1)",
}
FROM: dict[Layout, str] = {
    "btc": "",
    "flat": ".view(-1, {tokens}, {width})",
    "tbc": ".permute(1, 0, 2)",
    "bct": ".transpose(1, 2)",
}
TOKEN_AXIS: dict[Layout, int] = {"btc": 1, "flat": 0, "tbc": 0, "bct": 2}


class Writer:
    """Writes one module class; `x` is the stream in its forward."""

    def __init__(
        self,
        name: str,
        program: Program,
        arguments: str = "x, mem",
        layout: Layout = "btc",
        parent: "Writer | None" = None,
    ) -> None:
        self.name, self.program, self.arguments = name, program, arguments
        self.width, self.tokens = program.width, program.tokens
        self.classes: list[str] = parent.classes if parent else []
        self.features: Counter[str] = parent.features if parent else Counter()
        self.number = count()
        self.class_number: count[int] = parent.class_number if parent else count()
        self.layout: Layout = layout
        self.owned = False  # whether x's storage is ours to overwrite: no backward formula reads it
        self.attributes: list[str] = []
        self.body: list[str] = []
        self.states: list[str] = []

    # text

    def text(self) -> str:
        """The class."""
        lines = [f"class {self.name}(nn.Module):", "    def __init__(self):"]
        lines += [f"        {line}" for line in ["super().__init__()", *self.attributes]]
        lines += ["", f"    def forward(self, {self.arguments}):"]
        lines += [f"        {line}" for line in self.body]
        return "\n".join(lines) + "\n"

    def let(self, prefix: str, expression: str) -> str:
        """Assigns to a new variable; returns its name."""
        name = f"{prefix}{next(self.number)}"
        self.body.append(f"{name} = {expression}")
        return name

    def own(self, prefix: str, expression: str) -> str:
        """Makes an attribute; returns `self.name`."""
        name = f"self.{prefix}{next(self.number)}"
        self.attributes.append(f"{name} = {expression}")
        return name

    def parameter(self, prefix: str, value: str) -> str:
        return self.own(prefix, f"nn.Parameter({value})")

    def set_stream(self, expression: str, *, owned: bool = False) -> None:
        if expression != "x":
            self.body.append(f"x = {expression}")
        self.owned = owned

    def tag(self, *features: str | None) -> None:
        self.features.update(f for f in features if f)

    # shapes

    def to(self, layout: Layout) -> str:
        return TO[layout].format(width=self.width, tokens=self.tokens)

    def back(self, layout: Layout) -> str:
        return FROM[layout].format(width=self.width, tokens=self.tokens)

    def length(self) -> int:
        """The size of the axis that a branch takes for tokens."""
        return {"flat": BATCH * self.tokens, "tbc": BATCH}.get(self.layout, self.tokens)

    def shape(self) -> tuple[int, ...]:
        """The stream's shape."""
        b, t, c = BATCH, self.tokens, self.width
        shapes = {"btc": (b, t, c), "flat": (b * t, c), "tbc": (t, b, c), "bct": (b, c, t)}
        return shapes[self.layout]

    def channels_last(self, expression: str, function: str) -> str:
        """function(expression), the function working on the last axis."""
        if self.layout != "bct":
            return f"{function}({expression})"
        return f"{function}({expression}.transpose(1, 2)).transpose(1, 2)"

    def relayout(self, layout: Layout) -> None:
        if layout != self.layout:
            self.set_stream("x" + self.back(self.layout))
            self.layout = "btc"
            if layout != "btc":
                self.set_stream("x" + self.to(layout))
                self.layout = layout

    # pieces

    def norm(self, kind: str) -> str:
        """Makes a norm over the channels; returns what to call."""
        self.tag(kind)
        if kind == "spelled_norm":
            return self.own("norm", f"SpelledNorm({self.width}, {next(self.number) % 3})")
        name = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}[kind]
        return self.own("norm", f"nn.{name}({self.width})")

    def linear(self, prefix: str, size_in: int | None = None) -> str:
        return self.own(prefix, f"nn.Linear({size_in or self.width}, {self.width})")

    def core(self, branch: Branch, h: str) -> str:
        """The expression of a branch's core, on [..., tokens, width]."""
        width, length, kind = self.width, self.length(), branch.core
        self.tag("branch_" + kind, "inner_chain_of_one" if len(branch.inner) == 1 else None)
        if kind == "linear":
            return f"{self.linear('linear')}({h})"
        if kind == "matmul":
            return f"{h} @ {self.parameter('w', f'torch.randn({width}, {width}) / {width}')}"
        if kind == "cumsum":
            return f"0.3 * torch.cumsum({h}, dim=-2)"
        if kind == "conv":
            conv = self.own("conv", f"Conv({width})")
            return f"{conv}({h}.transpose(-1, -2)).transpose(-1, -2)"
        if kind == "cross":
            return f"{self.own('cross', f'CrossAttention({width})')}({h}, mem)"
        if kind == "memory":
            layout = "btc" if self.layout == "bct" else self.layout
            return f"{self.linear('side')}(mem){self.to(layout)}"
        if kind == "chain":
            return f"{self.own('inner', self.inner(branch) + '()')}({h}, mem)"
        modules = {
            "mlp": f"Mlp({width}, 'gelu')",
            "spelled_gelu": f"Mlp({width}, 'spelled_gelu')",
            "token_mix": f"TokenMix({length})",
            "glu": f"Glu({width})",
            "self_gate": f"SelfGate({width})",
            "delta_rule": f"DeltaRule({width}, {length})",
            "integer_add": f"IntegerAdd({width})",
        }
        made = modules.get(kind, f"Attention({width}, {length}, '{kind}')")
        return f"{self.own(kind, made)}({h})"

    def inner(self, branch: Branch) -> str:
        """Writes a branch that is a residual chain itself; returns its class."""
        layout: Layout = "btc" if self.layout == "bct" else self.layout
        inner = Writer(f"Inner{next(self.class_number)}", self.program, layout=layout, parent=self)
        inner.set_stream(f"{inner.linear('inp')}(x)")
        inner.steps(branch.inner)
        inner.relayout(layout)
        if branch.inner_out:
            inner.set_stream(f"{inner.linear('out')}(x)")
        inner.body.append("return x")
        self.classes.append(inner.text())
        return inner.name

    def branch(self, branch: Branch, x: str, *, copy: bool = False) -> str:
        """Writes F(x), for x in the stream's layout; returns its variable."""
        h = self.let("h", f"{x}.clone()") if copy else x
        if self.layout == "bct":
            h = f"{h}.transpose(1, 2)"
        if branch.cast == "same":
            self.tag("branch_cast")
            h = f"{h}.to(torch.float64)"
        if branch.cast == "float32":
            self.tag("branch_cast", "float32_cast")
            h = f"{h}.float().double()"
        if branch.norm:
            self.tag("pre_norm")
            h = f"{self.norm(branch.norm)}({h})"
        f = self.let("f", self.core(branch, h if h.isidentifier() else self.let("h", h)))
        if branch.after:
            self.tag("sandwich_norm" if branch.norm else "branch_after_norm")
            f = self.let("f", f"{self.norm(branch.after)}({f})")
        if branch.scale:
            self.tag("branch_scale_" + branch.scale)
            f = self.let("f", f"{f} * {self.scale(branch.scale)}")
        if branch.dropout:
            self.tag("branch_dropout")
            f = self.let("f", f"{self.own('drop', 'nn.Dropout(0.2)')}({f})")
        if branch.cast == "same":
            f = self.let("f", f"{f}.to(torch.float64)")
        return self.let("f", f"{f}.transpose(1, 2)") if self.layout == "bct" else f

    def scale(self, kind: str, *, stream: bool = False) -> str:
        """A factor: a constant, or one learned number per channel."""
        if kind == "constant":
            return "0.8"
        g = self.parameter("scale", f"1 + 0.3 * torch.randn({self.width})")
        return f"{g}[:, None]" if stream and self.layout == "bct" else g

    # steps

    def write_main(self) -> None:
        """Writes the whole forward."""
        self.write_source()
        mem = self.let("mem", f"{self.linear('memory')}(cond)")
        if self.program.encoder:
            self.tag("encoder")
            self.body.append(f"mem = {self.module(self.program.encoder, 'Encoder')}({mem}, cond)")
            self.states.append("mem")
        else:
            self.body.append(f"mem = {mem}")
        self.steps(self.program.steps)
        self.write_head()

    def write_source(self) -> None:
        """Writes how the stream starts."""
        kind = self.program.source_of
        self.tag("input_" + kind)
        if kind == "float":
            return self.set_stream("inp")
        if kind == "linear":
            return self.set_stream(f"{self.linear('patch', 5)}(inp)")
        if kind == "embed_integer_add":
            self.body.append(f"inp = (inp + inp.cumsum(-1)) % {VOCABULARY}")
        self.set_stream(f"{self.own('embed', f'nn.Embedding({VOCABULARY}, {self.width})')}(inp)")
        if kind == "embed_sum":
            other = self.own("types", f"nn.Embedding({VOCABULARY}, {self.width})")
            self.set_stream(f"x + {other}(inp // 2)")

    def write_head(self) -> None:
        """Writes what happens after the last step."""
        kind, x = self.program.head, "x"
        self.tag("head_" + kind, "training" if self.program.training else "evaluation")
        if kind != "none":
            x += self.back(self.layout)
        if kind == "norm_linear":
            x = f"{self.norm('layer_norm')}({x})"
        if kind == "pool":
            x = f"{x}.mean(1)"
        if kind != "none":
            x = f"{self.linear('head')}({x})"
        self.body.append(f"return {', '.join([x, *self.states])}")

    def steps(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            getattr(self, "write_" + type(step).__name__.lower())(step)

    def module(self, steps: tuple[Step, ...], prefix: str) -> str:
        """Writes a module class for steps; returns the attribute that holds one."""
        writer = Writer(
            f"{prefix}{next(self.class_number)}", self.program, layout=self.layout, parent=self
        )
        writer.steps(steps)
        writer.relayout(self.layout)
        writer.body.append("return x")
        self.classes.append(writer.text())
        return self.own(prefix.lower(), f"{writer.name}()")

    def write_call(self, call: Call) -> None:
        self.tag("nested_module", "shared_module" if call.times > 1 else None)
        block = self.module(call.steps, "Block")
        if call.times == 1:
            return self.set_stream(f"{block}(x, mem)")
        self.body += [f"for _ in range({call.times}):", f"    x = {block}(x, mem)"]
        self.owned = False

    def write_hidden(self, _: Hidden) -> None:
        self.tag("hidden_state")
        self.states.append(self.let("state", "x"))

    def write_relayout(self, step: Relayout) -> None:
        if step.layout not in ("btc", self.layout):
            self.tag("layout_" + step.layout)
        self.relayout(step.layout)

    def write_stream(self, step: Stream) -> None:
        for kind in step.kinds:
            self.tag("stream_" + kind)
            self.set_stream(self.stream_op(kind, "x"), owned=kind in SCALES)

    def stream_op(self, kind: str, x: str) -> str:
        """A stream-wise operation on x, as an expression."""
        if kind in NORMS:
            return self.channels_last(x, self.norm(kind))
        if kind in {"constant", "learned"}:
            return f"{x} * {self.scale(kind, stream=True)}"
        if kind == "position":
            return f"{x} + {self.parameter('pos', f'torch.randn{self.shape()}')}"
        if kind == "broadcast_position":
            return f"{x} + {self.parameter('pos', f'torch.randn{self.shape()[1:]}')}".replace(
                ",)", ")"
            )
        if kind == "conditioned":
            return f"torch.sigmoid({self.linear('gate')}(mem){self.to(self.layout)}) * {x}"
        self.tag("float32_cast" if kind == "float32_cast" else None)
        return {
            "same_cast": f"{x}.to(torch.float64)",
            "float32_cast": f"{x}.float().to(torch.float64)",
            "dropout": f"F.dropout({x}, 0.1, self.training)",
            "relu": f"F.relu({x})",
            "tanh": f"torch.tanh({x})",
        }[kind]

    def write_rejected(self, step: Rejected) -> None:
        self.tag("rejected_" + step.kind)
        if step.kind == "pointwise":
            return self.set_stream("x + torch.sin(x)", owned=True)
        if step.kind == "independent":
            side = f"{self.linear('side')}(mem){self.to(self.layout)}"
            return self.set_stream(f"x + {side}", owned=True)
        f = self.branch(step.branch, "x")
        if step.kind == "broadcast":
            axis = TOKEN_AXIS[self.layout]
            return self.set_stream(f"x + {f}.mean({axis}, keepdim=True)", owned=True)
        if step.kind == "projection":
            skip = self.channels_last("x", self.linear("shortcut"))
        elif step.kind == "gated":
            skip = f"torch.sigmoid({self.channels_last('x', self.linear('gate'))}) * x"
        else:
            skip = "x * torch.sigmoid(x)"
        self.set_stream(f"{skip} + {f}", owned=True)

    def write_around(self, step: Around) -> None:
        self.tag("around_" + step.kind)
        k, layout = self.let("k", "x"), self.layout
        self.steps(step.steps)
        self.relayout(layout)
        if step.kind == "outer":
            self.set_stream(f"{k} + {self.branch(step.branch, 'x')}", owned=True)
        elif step.kind == "stale":
            self.set_stream(f"x + {self.branch(step.branch, k)}", owned=True)
        else:
            self.set_stream(f"0.5 * (x + {k})", owned=True)

    def write_site(self, site: Site) -> None:
        """Writes the branches, then their sum with the skip."""
        in_place = site.spellings[-1] in {"iadd_stream", "add__stream"}
        if in_place and not self.owned:
            self.set_stream("x * 0.9", owned=True)
        s = "x"
        if site.skip:
            self.tag("skip_" + site.skip)
            s = self.let("s", self.stream_op(site.skip, "x"))
        read = s if site.branch_reads_skip else "x"
        fs = [self.branch(branch, read, copy=in_place) for branch in site.branches]
        self.tag(f"parallel_{len(fs)}" if len(fs) > 1 else None)
        ours = {f for f, branch in zip(fs, site.branches, strict=True) if branch_owns(branch)}
        if (s == "x" and self.owned) or site.skip in SCALES:
            ours.add(s)
        terms = [[s, *fs][i] for i in site.order]
        for merge, spelling in zip(site.merges, site.spellings, strict=True):
            i = merge % (len(terms) - 1)
            terms[i : i + 2] = [
                self.add(terms[i], terms[i + 1], spelling, s, ours, len(terms) == 2)
            ]
        self.set_stream(terms[0], owned=True)
        if site.after:
            self.tag("post_norm")
            self.set_stream(self.stream_op(site.after, "x"))

    def add(self, a: str, b: str, spelling: str, s: str, ours: set[str], last: bool) -> str:
        """Writes a + b in a spelling, or plainly where that spelling cannot be; returns the sum."""
        if spelling == "torch_add":
            self.tag(spelling)
            return self.let("z", f"torch.add({a}, {b})")
        if spelling == "method_add":
            self.tag(spelling)
            return self.let("z", f"{a}.add({b})")
        if spelling == "alpha" and not b.startswith("z"):
            self.tag(spelling)
            return self.let("z", f"torch.add({a}, {b}, alpha=0.5)")
        if last and spelling.endswith(("_stream", "_branch")):
            on_stream = spelling.endswith("_stream")
            for target, other in ((a, b), (b, a)):
                if target in ours and (target == s) == on_stream:
                    self.tag(spelling)
                    plus = f"{target} += {other}"
                    self.body.append(plus if "iadd" in spelling else f"{target}.add_({other})")
                    return target
        self.tag("plus")
        return self.let("z", f"{a} + {b}")


def branch_owns(branch: Branch) -> bool:
    """Whether no backward formula reads the branch's result, so that it may be overwritten."""
    return branch.core != "chain" or branch.inner_out


# -- drawing ---------------------------------------------------------------------------------------


def mostly(usual: Any, rare: Sequence[Any], share: float) -> st.SearchStrategy[Any]:
    """`usual`, or in `share` of the draws one of `rare`; shrinks to `usual`."""
    return st.sampled_from([usual] * round(len(rare) * (1 - share) / share) + list(rare))


@st.composite
def branches(draw: st.DrawFn, depth: int) -> Branch:
    """A branch; with depth left it may be a residual chain itself."""
    core = draw(mostly("chain", BRANCHES, 0.85) if depth else st.sampled_from(BRANCHES))
    chain = st.lists(sites(0), min_size=1, max_size=2)
    return Branch(
        core=core,
        norm=draw(mostly(None, NORMS, 0.5)),
        after=draw(mostly(None, NORMS, 0.25)),
        scale=draw(mostly(None, ["constant", "learned"], 0.3)),
        dropout=draw(mostly(False, [True], 0.2)),
        cast=draw(mostly(None, ["same", "same", "float32"], 0.15)),
        inner=tuple(draw(chain)) if core == "chain" else (),
        inner_out=core != "chain" or draw(st.booleans()),
    )


@st.composite
def sites(draw: st.DrawFn, depth: int) -> Site:
    """A residual site of one to three branches."""
    size = draw(mostly(1, [2, 3], 0.3))
    return Site(
        branches=tuple(draw(branches(depth)) for _ in range(size)),
        order=tuple(draw(st.permutations(range(size + 1)))),
        merges=tuple(draw(st.integers(0, 2)) for _ in range(size)),
        spellings=tuple(draw(st.sampled_from(SPELLINGS + IN_PLACE)) for _ in range(size)),
        skip=draw(mostly(None, SKIPS, 0.6)),
        branch_reads_skip=draw(st.booleans()),
        after=draw(mostly(None, [*NORMS, "relu"], 0.2)),
    )


def steps(depth: int, *, top: bool = False) -> st.SearchStrategy[Step]:
    """One step of a module; `top` in the outermost one."""
    stream_ops = st.lists(st.sampled_from(STREAM_OPS), min_size=1, max_size=3).map(tuple)
    kinds = [
        *[sites(depth)] * 8,
        *[st.builds(Stream, stream_ops)] * 5,
        *[st.builds(Rejected, st.sampled_from(REJECTED), branches(0))] * 3,
        *[st.builds(Relayout, st.sampled_from(["btc", "flat", "tbc", "bct"]))] * 2,
    ]
    if top:
        kinds.append(st.just(Hidden()))
    if depth:
        inner = st.lists(steps(depth - 1), min_size=1, max_size=3).map(tuple)
        around = st.sampled_from(["outer", "states", "stale"])
        kinds += [st.builds(Around, around, inner, branches(0))] * 3
        kinds += [st.builds(Call, inner, st.integers(1, 3))] * 2
    return st.one_of(kinds)


def programs() -> st.SearchStrategy[Program]:
    """Programs of 2 to 20 adds."""
    encoder = st.lists(steps(1), min_size=1, max_size=3).map(tuple)
    program = st.builds(
        Program,
        steps=st.lists(steps(2, top=True), min_size=3, max_size=8).map(tuple),
        encoder=st.one_of(st.just(()), st.just(()), encoder),
        source_of=st.sampled_from(INPUTS),
        head=st.sampled_from(HEADS),
        training=st.booleans(),
        width=st.sampled_from([8, 12]),
        tokens=st.sampled_from([3, 5]),
        n=st.sampled_from([2, 3, 4]),
    )
    return program.filter(lambda p: 2 <= adds(p) <= 20)


def adds(step: Any) -> int:
    """How many adds a step, a branch or a program runs, those inside a core not counted."""
    match step:
        case Program():
            return sum(map(adds, step.encoder + step.steps))
        case Branch():
            return sum(map(adds, step.inner))
        case Site():
            return len(step.branches) + sum(map(adds, step.branches))
        case Around():
            return 1 + sum(map(adds, step.steps))
        case Call():
            return step.times * sum(map(adds, step.steps))
        case Rejected():
            return 1
    return 0
