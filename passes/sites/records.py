"""What becomes of a residual add, each step a record of its own that nobody changes.

ResidualAdd    found                                     ``find``
Site           named, in a chain, with its parameters    ``detect``
OpenSite       in the open form                          ``widen``
FusedSite      in the graph that runs                    ``fused_sites``
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from ...kernels.variants import Variant

__all__ = [
    "Detection",
    "FusedSite",
    "OpenEnd",
    "OpenSite",
    "Place",
    "Reason",
    "Rejected",
    "ResidualAdd",
    "Site",
    "identity_of",
    "location_of",
    "stack_of",
]


class Reason(enum.StrEnum):
    """Why an add of two floating-point tensors is not rewritten.

    The last seven are for models that were written with hyper-connections.
    """

    BROADCAST = "the operands have different shapes"
    INDEPENDENT = "neither operand is computed from the other"
    WEIGHT = "a weight is added to the stream, such as a position embedding"
    POINTWISE_BRANCH = "the branch mixes neither channels nor tokens"
    GATED_SKIP = "the skip is scaled by a gate that depends on the stream"
    PROJECTED_SKIP = "the skip passes through an operation that mixes channels or tokens"
    SUM_OF_STATES = "both operands are states of one stream"
    RECURRENT_STATE = "a recurrent state: it starts at a constant and no weight acts on it"
    PART_OF_SITE = "one of several adds of the same site"
    SHARED_BRANCH = "the branch shares its input with the branch of another site"
    CHAIN_OF_ONE = "the only site of its chain: its streams would be equal and averaged at once"
    UNUSED = "nothing that the model returns or writes is computed from it"
    IN_PLACE = "written in place into memory that something else shows, or in part"
    MODE = "its operations run in different modes (no_grad, inference_mode, ...)"
    CONTROL_FLOW = "inside the body of a control-flow operator"
    LAYOUT = "the channel axis is lost on the way to the next site"
    UNDECLARED = "not a site when the model was transformed"
    EXCLUDED = "excluded by the configuration"
    OWN_CONNECTIONS = "nothing is added to a model that has hyper-connections of its own"
    OWN_NORM = "a hyper-connection whose streams are not normalised together"
    OWN_PROJECTION = "a hyper-connection without one projection of all streams"
    OWN_COEFFICIENTS = "a hyper-connection whose coefficients are those of no known variant"
    OWN_PRECISION = "a hyper-connection that rounds where our operators do not"
    OWN_PLACE = "a hyper-connection whose parts are written in place or recomputed apart"
    OWN_MODE = "a hyper-connection whose parts run in different modes (no_grad, autocast, ...)"


@dataclass(frozen=True, eq=False)
class ResidualAdd:
    """What the detector finds: a residual add ``z = skip(x) + F(x)``.

    Attributes:
        node: z, the outermost add of the site's sum.
        x: the stream state that the branch reads.
        skip: the term of the sum that carries the stream; ``skip_path`` leads from it back
            to x through stream-wise operations (empty when the skip is x itself).
        branch: the other terms, in the order of the graph.
        adds: every add node of the sum, z last.
        ablated: whether a constant stands where F's result was: a hook on the branch put it there.
    """

    node: fx.Node
    x: fx.Node
    skip: fx.Node
    skip_path: tuple[fx.Node, ...]
    branch: tuple[fx.Node, ...]
    adds: tuple[fx.Node, ...]
    ablated: bool = False


@dataclass(frozen=True)
class Place:
    """Where an add belongs.

    Attributes:
        owner: path of the module whose forward contains it ("" for the root).
        owner_key: of the call of that module, as ``nn_module_stack`` has it.
        branch_name: the branch's name within its owner; of an add that is no site, the node's.
        location: ``file:line``.
    """

    owner: str = ""
    owner_key: str = ""
    branch_name: str = ""
    location: str = ""

    @property
    def name(self) -> str:
        """Path of the owner and name of the branch."""
        return f"{self.owner}.{self.branch_name}" if self.owner else self.branch_name


class _Placed:
    """What is asked of a record by way of its place."""

    place: Place

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def owner(self) -> str:
        return self.place.owner

    @property
    def branch_name(self) -> str:
        return self.place.branch_name

    @property
    def location(self) -> str:
        return self.place.location


@dataclass(frozen=True, eq=False)
class Site(_Placed, ResidualAdd):
    """A residual add in its chain: it becomes an n-stream connection.

    Attributes:
        place: whose it is.
        previous: the add of the site whose sum is the state that x comes from, if any.
        channel_in, channel: position of the channel axis in x and in z, from the right.
        width: C, the size of that axis.
        chain, position: number of the chain and the site's place in it.
        length: how many sites the chain has in this graph.
        linear: whether only linear stream-wise operations stand on the chain.
        excluded: whether the configuration leaves this add a plain residual.
        parameters: placeholders of phi, alpha, bias (and of the head's three at a last site);
            empty where they are not inputs of the graph, and for an excluded site.
    """

    place: Place = Place()
    previous: fx.Node | None = None
    channel_in: int = -1
    channel: int = -1
    width: int = 0
    chain: int = -1
    position: int = 0
    length: int = 1
    linear: bool = True
    excluded: bool = False
    parameters: tuple[fx.Node, ...] = ()

    @property
    def reason(self) -> str:
        """Why it was taken, in words."""
        return f"site {self.position + 1} of {self.length} in chain {self.chain}"


@dataclass(frozen=True, eq=False)
class OpenSite:
    """A site in the open form that ``widen`` gives it, for the pass that makes operators of it.

    Its operands are read from the nodes, because passes in between may replace them.

    Attributes:
        site: what was detected.
        variant, eps: of its coefficients.
        flat: x⃗, the flattened streams that the coefficients are computed from.
        parameters: phi, alpha, bias.
        H: H_pre, H_post, H_res.
        h: the branch's input in the dtype of the model.
        end: H_res X + H_postᵀ f in the streams' dtype.
    """

    site: Site
    variant: Variant
    eps: float
    flat: fx.Node
    parameters: tuple[fx.Node, fx.Node, fx.Node]
    H: tuple[fx.Node, fx.Node, fx.Node]
    h: fx.Node
    end: fx.Node


@dataclass(frozen=True, eq=False)
class OpenEnd:
    """Where ``widen`` has made n streams of one, or one of n.

    Attributes:
        kind: ``expand``, or a readout: ``mean``, ``sum``, ``head``.
        node: the result.
        parameters: phi, alpha, bias of a head.
        eps: of a head.
    """

    kind: str
    node: fx.Node
    parameters: tuple[fx.Node, ...] = ()
    eps: float = 0.0


@dataclass(frozen=True, eq=False)
class FusedSite(_Placed):
    """A connection in the graph that runs: what ``widen`` made, or the model's own.

    Attributes:
        place: whose it is.
        n: number of streams.
        width: C.
        chain, position: number of the chain and the place in it.
        reason: in words; of a model's own, what was recognised and what was not.
        parameters: placeholders of its parameters.
        previous: name of the site whose sum its streams are, if any.
        nodes: what it consists of, by the names of the operators: ``coefficients``, ``pre``,
            ``post_res``; what has no operator is not among them.
        excluded: whether it is a plain residual, by the configuration.
    """

    place: Place
    n: int
    width: int
    chain: int
    position: int
    reason: str
    parameters: tuple[fx.Node, ...] = ()
    previous: str | None = None
    nodes: Mapping[str, fx.Node] = field(default_factory=dict)
    excluded: bool = False


@dataclass(frozen=True, eq=False)
class Rejected(_Placed):
    """An add that looks residual and is left alone.

    Attributes:
        detail: what differs, for a hyper-connection of the model's own that is not one of ours.
    """

    node: fx.Node
    reason: Reason
    place: Place = Place()
    width: int = 0
    detail: str = ""


@dataclass(frozen=True)
class Detection:
    """Every residual-looking add of one graph.

    Attributes:
        sites: accepted, in the order of the graph.
        rejected: the others.
        chains: the sites of each chain, in order.
        streamwise: from a node to the operand whose streams it acts on one by one.
    """

    sites: Sequence[Site]
    rejected: Sequence[Rejected]
    chains: Sequence[Sequence[Site]]
    streamwise: Mapping[fx.Node, fx.Node]

    def with_parameters(self, parameters: Mapping[Site, Sequence[fx.Node]]) -> Detection:
        """The same where the sites' parameters have become inputs of the graph."""
        new = {s: replace(s, parameters=tuple(parameters[s])) for s in self.sites}
        chains = [[new[site] for site in chain] for chain in self.chains]
        return replace(self, sites=list(new.values()), chains=chains)


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def location_of(node: fx.Node) -> str:
    """``file:line`` of the user's code that computes a node, "" where there is no trace."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""


_GETATTR = re.compile(r"getattr\((.+?), ['\"]([^'\"]+)['\"]\)")
_ROOT = re.compile(r"^[LG]\['[^']*'\]\.?")


def identity_of(key: str) -> str:
    """The module that a key of ``nn_module_stack`` stands for: its ``id``, without ``@`` the call.

    Calls inside a traced ``GraphModule`` have names in place of ids, which no module answers to.
    """
    return key.split("@")[0]


def stack_of(node: fx.Node) -> list[tuple[str, str]]:
    """The module calls around a node, outermost first: (key of the call, path of the module).

    The path is written from the root of the capture: ``L['self'].layers.0`` -> ``layers.0``. It is
    for people to read, and has many shapes (``L['args'][0].layers.0`` behind a decorator): which
    module a call belongs to is decided by the key, see ``identity_of``.
    """
    stack = node.meta.get("nn_module_stack") or {}
    calls = []
    for key, (path, *_) in stack.items():
        path = str(path)
        while match := _GETATTR.search(path):
            path = path[: match.start()] + f"{match[1]}.{match[2]}" + path[match.end() :]
        calls.append((str(key), _ROOT.sub("", path)))
    return calls
