"""Which adds of a captured graph are residual sites: the definition, written out by brute force.

This is the specification in executable form, to compare the detector with. It imports nothing of
the library and builds no index: every question (does t depend on x, is u a function of x stream
by stream, ...) is answered by walking the graph. Tiny graphs only.

The definitions, on a torch-level graph as Dynamo hands it to a backend:

- **Dead code**, what no output depends on, holds no sites.
- **In-place.** After `x += f` or `x.add_(f)` every later use of x means the sum.
- **Sum tree.** An add of two float tensors of one shape. An inner add that only the outer add
  uses belongs to the outer tree, unless it is a residual add of another stream: judged by itself
  it is residual with skip x, and no other term of the whole tree is a branch of that x (depends
  on it through an operation that mixes channels or tokens).
- **Stream-wise.** A step from a node to the operand u it transforms one stream at a time: a cast,
  a dropout, a pointwise function whose other operands do not depend on the base of u, a norm over
  the channels, a view that keeps the channel axis. The base of u is where such steps end; a
  residual add is always a base. Where a step may go on to a weight or to something else, it goes
  on to the something else.
- **Position.** A weight that some earlier step did not go on to for that reason. It is no x.
- **Residual.** In a sum tree a term s, the skip, leads back stream-wise to x, on which other terms
  depend through operations that mix channels or tokens (the nearest such x), and none of those
  is a state of the stream s belongs to. Of several such terms the one whose x comes first.
- **State.** The states of a stream: what is reached from it going back stream-wise, and on from a
  residual add to its x. Two terms with a state in common are states of one stream.
- **Branch.** What lies between a residual add's x and its other terms. It reads a mixture of the
  streams of x, so residual adds in it that start from that x start a chain of their own.
- **Chain.** Residual adds linked by z -> stream-wise -> x, unless that leaves a branch. A chain of
  one is rejected. So is a recurrence: a chain that starts at a constant and in whose branches no
  weight acts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

POINTWISE = set(
    "add sub rsub mul truediv div neg pos abs pow square sqrt rsqrt reciprocal exp log sin cos "
    "tanh "
    "sigmoid relu gelu silu elu softplus erf clamp where masked_fill lerp addcmul clone contiguous "
    "to float double half bfloat16 type type_as dropout alpha_dropout round long int mod remainder "
    "floordiv ge gt le lt eq ne invert and or".split()
)
NORMS = {"layer_norm", "rms_norm"}
RESHAPES = set("reshape view flatten unflatten unsqueeze squeeze".split())
PERMUTATIONS = set("transpose permute swapaxes movedim t mT".split())
SLICES = set(
    "getitem select narrow chunk split cat stack concat unbind expand repeat roll flip".split()
)
REDUCTIONS = set(
    "mean sum amax amin max min argmax softmax log_softmax norm var std normalize".split()
)
CONSTANTS = set(
    "zeros ones full empty zeros_like ones_like new_zeros new_ones new_full arange eye".split()
)
CASTS = set("to float double half bfloat16 type type_as".split())
IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}
NOT_MIXING = POINTWISE | NORMS | RESHAPES | PERMUTATIONS | SLICES | REDUCTIONS | CONSTANTS

SITE = "site"
CHAIN_OF_ONE = "chain of one"
RECURRENT = "recurrent"


class Residual(NamedTuple):
    """What makes an add residual: the state x, and the other terms of the sum."""

    x: fx.Node
    terms: list[fx.Node]


Adds = dict[fx.Node, Residual]  # the residual adds found so far


@dataclass(frozen=True)
class Found:
    """A residual add: its x, the chain it belongs to, and what becomes of it."""

    add: fx.Node
    x: fx.Node
    chain: int
    verdict: str


def accepted(graph: fx.Graph) -> list[str]:
    """Names of the adds that are sites, in the order of the graph."""
    return [found.add.name for found in residual_adds(graph) if found.verdict == SITE]


def residual_adds(graph: fx.Graph) -> list[Found]:
    """Every residual add of the graph, in its order, with its verdict."""
    return Oracle(graph).residual_adds()


class Oracle:
    """The definitions above, each a method."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.operands: dict[fx.Node, list[fx.Node]] = {}
        now: dict[fx.Node, fx.Node] = {}  # what a mutated tensor means from here on
        for node in self.nodes:
            self.operands[node] = []
            for operand in [] if op_name(node) in CONSTANTS else inputs(node):
                while operand in now:
                    operand = now[operand]
                self.operands[node].append(operand)
            if is_in_place(node):
                now[self.operands[node][0]] = node
        self.ancestors: dict[fx.Node, set[fx.Node]] = {}  # a node and all that it is computed from
        for node in self.nodes:
            above = [self.ancestors[operand] for operand in self.operands[node]]
            self.ancestors[node] = {node}.union(*above)
        live = self.ancestors[self.nodes[-1]]
        self.nodes = [node for node in self.nodes if node in live]

    # -- dependence ------------------------------------------------------------------------------

    def depends(self, t: fx.Node, x: fx.Node) -> bool:
        """Whether t is x or is computed from it."""
        return x in self.ancestors[t]

    def depends_mixing(self, t: fx.Node, x: fx.Node) -> bool:
        """Whether some way from x to t passes an operation that mixes channels or tokens."""
        return bool({n for n in self.between(x, t) if is_mixing(n)})

    def between(self, x: fx.Node, t: fx.Node) -> set[fx.Node]:
        """The nodes on the ways from x to t, t among them, x not."""
        return {n for n in self.ancestors[t] if self.depends(n, x)} - {x}

    # -- streams ---------------------------------------------------------------------------------

    def steps(self, u: fx.Node) -> list[tuple[fx.Node, list[fx.Node]]]:
        """Operands that u may transform stream by stream, each with the operands beside it."""
        name, operands = op_name(u), self.operands[u]
        if not is_float(u) or not operands:
            return []
        if (squared := self.normalised_by_hand(u)) is not None:
            return [(squared, [])]
        if name in NORMS:
            return [(operands[0], operands[1:])] if normalised_axes(u) == 1 else []
        if name in CASTS | PERMUTATIONS:
            return [(operands[0], [])] if is_float(operands[0]) else []
        if name in RESHAPES:
            return [(operands[0], [])] if shape(operands[0])[-1:] == shape(u)[-1:] else []
        if name not in POINTWISE:
            return []
        return [
            (operand, [other for other in operands if other is not operand])
            for operand in dict.fromkeys(operands)
            if is_float(operand) and shape(operand) == shape(u)
        ]

    def walks(self, u: fx.Node, residual: Adds) -> list[list[fx.Node]]:
        """Every stream-wise way back from u: the nodes passed, u first and the base last."""
        to_weights, to_others = self.walks_by_base(u, residual)
        return to_others or to_weights or [[u]]

    def walks_by_base(
        self, u: fx.Node, residual: Adds
    ) -> tuple[list[list[fx.Node]], list[list[fx.Node]]]:
        """The ways back from u that end at a weight, and those that end at something else."""
        found = [
            [u, *walk]
            for operand, others in ([] if u in residual else self.steps(u))
            for walk in self.walks(operand, residual)
            if not any(self.depends(other, walk[-1]) for other in others)
        ]
        to_weights = [walk for walk in found if is_weight(walk[-1])]
        return to_weights, [walk for walk in found if walk not in to_weights]

    def is_position(self, base: fx.Node, add: fx.Node, residual: Adds) -> bool:
        """Whether a base is a weight that a step before this add did not go on to."""
        if not is_weight(base):
            return False
        for u in self.nodes[: self.nodes.index(add)]:
            to_weights, to_others = self.walks_by_base(u, residual)
            if to_others and base in {walk[-1] for walk in to_weights}:
                return True
        return False

    def states(self, u: fx.Node, residual: Adds) -> set[fx.Node]:
        """The states of u's stream up to u."""
        found: set[fx.Node] = set()
        for walk in self.walks(u, residual):
            found.update(walk)
            if walk[-1] in residual:
                found |= self.states(residual[walk[-1]].x, residual)
        return found

    def are_states(self, s: fx.Node, t: fx.Node, residual: Adds) -> bool:
        """Whether two terms are states of one stream."""
        return bool(self.states(s, residual) & self.states(t, residual))

    def normalised_by_hand(self, u: fx.Node) -> fx.Node | None:
        """v where u = v * rsqrt(mean(v^2) + eps), or v / sqrt(mean(v^2) + eps)."""
        if op_name(u) not in {"mul", "truediv", "div"} or len(self.operands[u]) != 2:
            return None
        for v, factor in (self.operands[u], self.operands[u][::-1]):
            if op_name(factor) != ("rsqrt" if op_name(u) == "mul" else "sqrt"):
                continue
            (total,) = self.operands[factor]
            if op_name(total) != "add" or op_name(self.operands[total][0]) != "mean":
                continue
            (square,) = self.operands[self.operands[total][0]]
            squared = {self.before_casts(o) for o in self.operands[square]}
            if op_name(square) in {"pow", "square", "mul"} and squared == {self.before_casts(v)}:
                return v
        return None

    def before_casts(self, node: fx.Node) -> fx.Node:
        """What a node is a cast of, itself if it is none."""
        while op_name(node) in CASTS:
            node = self.operands[node][0]
        return node

    # -- sum trees -------------------------------------------------------------------------------

    def is_add(self, node: fx.Node) -> bool:
        """Whether a node adds two float tensors of one shape."""
        tensors = self.operands[node]
        return (
            op_name(node) == "add"
            and len(tensors) == 2
            and all(is_float(t) and shape(t) == shape(node) for t in tensors)
        )

    def is_inner(self, node: fx.Node) -> bool:
        """Whether a node is an add whose only use is another add."""
        if not self.is_add(node):
            return False
        users = [user for user in self.operands for o in self.operands[user] if o is node]
        return len(users) == 1 and self.is_add(users[0])

    def leaves(self, node: fx.Node) -> list[fx.Node]:
        """The terms below a term, all inner adds opened."""
        if not self.is_inner(node):
            return [node]
        return [leaf for operand in self.operands[node] for leaf in self.leaves(operand)]

    def terms(self, add: fx.Node, outside: list[fx.Node], residual: Adds) -> list[fx.Node]:
        """The terms of an add; `outside` are the terms of the tree that stand above it."""
        found = []
        left, right = self.operands[add]
        for operand, beside in ((left, right), (right, left)):
            siblings = outside + self.leaves(beside)
            if not self.is_inner(operand) or self.stands_alone(operand, siblings, residual):
                found.append(operand)
            else:
                found += self.terms(operand, siblings, residual)
        return found

    def stands_alone(self, inner: fx.Node, siblings: list[fx.Node], residual: Adds) -> bool:
        """Whether an inner add is a residual add of another stream than its siblings'."""
        alone = self.judge(inner, residual).get(inner)
        return alone is not None and not any(self.depends_mixing(t, alone.x) for t in siblings)

    def judge(self, add: fx.Node, residual: Adds) -> Adds:
        """`residual`, with the residual adds of the tree whose outermost add this is."""
        terms = self.terms(add, [], residual)
        for term in terms:
            if self.is_inner(term):
                residual = self.judge(term, residual)
        found = self.residual(add, terms, residual)
        return residual if found is None else {**residual, add: found}

    def residual(self, add: fx.Node, terms: list[fx.Node], residual: Adds) -> Residual | None:
        """What makes this sum of terms residual, or None where it is not."""
        found = []
        for i, s in enumerate(terms):
            others = terms[:i] + terms[i + 1 :]
            for walk in self.walks(s, residual):
                nearest = [x for x in walk if any(self.depends_mixing(t, x) for t in others)][:1]
                found += [
                    Residual(x, others)
                    for x in nearest
                    if not self.is_position(walk[-1], add, residual)
                    and not any(
                        self.depends_mixing(t, x) and self.are_states(s, t, residual)
                        for t in others
                    )
                ]
        return min(found, key=lambda f: self.nodes.index(f.x), default=None)

    # -- chains ----------------------------------------------------------------------------------

    def residual_adds(self) -> list[Found]:
        """Every residual add with its verdict."""
        residual: Adds = {}
        for node in self.nodes:
            if self.is_add(node) and not self.is_inner(node):
                residual = self.judge(node, residual)
        found = []
        chains = self.chains(residual)
        for add in sorted(residual, key=self.nodes.index):
            (number,) = (i for i, chain in enumerate(chains) if add in chain)
            verdict = self.verdict(chains[number], residual)
            found.append(Found(add, residual[add].x, number, verdict))
        return found

    def chains(self, residual: Adds) -> list[set[fx.Node]]:
        """Residual adds linked by their streams."""
        chains: list[set[fx.Node]] = []
        for add in residual:
            together = {add}
            around = self.branches_around(add, residual)
            for walk in self.walks(residual[add].x, residual):
                if walk[-1] in residual and not around & set(walk):
                    together.add(walk[-1])
            for chain in [chain for chain in chains if chain & together]:
                chains.remove(chain)
                together |= chain
            chains.append(together)
        return chains

    def branches_around(self, add: fx.Node, residual: Adds) -> set[fx.Node]:
        """The x of every residual add in whose branch an add stands."""
        return {
            outer.x
            for outer in residual.values()
            if any(add in self.between(outer.x, term) for term in outer.terms)
        }

    def verdict(self, chain: set[fx.Node], residual: Adds) -> str:
        """What becomes of the adds of a chain."""
        if all(self.is_weightless(residual[add]) for add in chain) and any(
            op_name(walk[-1]) in CONSTANTS
            for add in chain
            for walk in self.walks(residual[add].x, residual)
        ):
            return RECURRENT
        return SITE if len(chain) > 1 else CHAIN_OF_ONE

    def is_weightless(self, found: Residual) -> bool:
        """Whether no weight acts in a branch."""
        nodes = {node for term in found.terms for node in self.between(found.x, term)}
        return not any(is_weight(operand) for node in nodes for operand in self.operands[node])


def inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes a node reads, each as often as it reads it."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def is_in_place(node: fx.Node) -> bool:
    """Whether a node overwrites its first operand."""
    name = raw_name(node)
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return name in IN_PLACE


def op_name(node: fx.Node) -> str:
    """The operation's name, the same for all spellings of it."""
    name = raw_name(node)
    return IN_PLACE.get(name, name.strip("_"))


def raw_name(node: fx.Node) -> str:
    """The name a node's target goes by."""
    return node.target if isinstance(node.target, str) else node.target.__name__


def is_mixing(node: fx.Node) -> bool:
    """Whether an operation mixes channels or tokens; whatever is not known does."""
    return node.op in {"call_function", "call_method"} and op_name(node) not in NOT_MIXING


def is_weight(node: fx.Node) -> bool:
    """Whether a node is a parameter of the model."""
    return isinstance(node.meta.get("example_value"), torch.nn.Parameter)


def is_float(node: fx.Node) -> bool:
    """Whether a node is a floating-point tensor."""
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def shape(node: fx.Node) -> tuple[int, ...]:
    """A tensor node's shape."""
    return tuple(node.meta["example_value"].shape)


def normalised_axes(node: fx.Node) -> int:
    """Over how many axes a layer_norm or rms_norm goes."""
    return len(node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"])
