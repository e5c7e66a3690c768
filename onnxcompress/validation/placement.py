"""Did a requested provider really run, and what share? A session that lists a provider proves nothing.

Proof are the nodes it was given (before fusion), the multiply-accumulates they hold, and the kernels in the profile of
one run (after fusion: what a provider compiled is one kernel).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence

from onnxcompress.model.cost import NodeCost
from onnxcompress.runtime.providers import PROVIDERS, short_name
from onnxcompress.runtime.session import Session
from onnxcompress.targets import TARGETS
from onnxcompress.validation.agreement import OutputAgreement
from onnxcompress.validation.verdict import Finding, Score, Verdict

# Records which provider each node was given, before fusion (seen in onnxruntime 1.32).
RECORD = {"session.record_ep_graph_assignment_info": "1"}
LEAST_SHARE = 0.9  # of the multiply-accumulates: a provider that ran less is told so in the reasons
FIXED = ("qnn", "nnapi", "vitisai")  # providers that take nodes of fixed shapes alone
_SHAPES = ("Shape", "Size", "NonZero")
_NAMED = 3  # nodes in a line


@dataclasses.dataclass(frozen=True)
class Node:
    """A node as ONNX Runtime placed it. `provider`: short name."""

    name: str
    op_type: str
    provider: str


@dataclasses.dataclass(frozen=True)
class FellBack:
    """Nodes of one operator that the requested provider did not take. `reason`: None where it cannot be known."""

    op_type: str
    nodes: tuple[str, ...]
    provider: str
    reason: str | None = None

    def __str__(self) -> str:
        more = f" and {len(self.nodes) - _NAMED} more" if len(self.nodes) > _NAMED else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.op_type} x {len(self.nodes)} on {self.provider} ({', '.join(self.nodes[:_NAMED])}{more}{why})"


@dataclasses.dataclass(frozen=True)
class ProviderRow:
    """A requested execution provider: did it really run nodes of the compressed model, and if not, why.

    `nodes`: how many nodes each provider took; `macs`: share of the multiply-accumulates each ran (those whose place is
    not known make them sum to less than 1; None: the model has none, or ONNX Runtime does not tell); `kernels`: how
    many each executed in one call. `fell_back`: nodes left to another provider. `agreement`: outputs there against the
    original on the CPU; `score`: the metric there. `latency_p50`: median seconds of one call there, of `batch`
    samples. `memory`, `device_memory`: bytes that loading and one call took, of this process and of NVIDIA devices.
    """

    provider: str
    ran: bool
    reason: str | None = None
    nodes: dict[str, int] = dataclasses.field(default_factory=dict)
    agreement: tuple[OutputAgreement, ...] = ()
    macs: dict[str, float] | None = None
    kernels: dict[str, int] | None = None
    fell_back: tuple[FellBack, ...] = ()
    score: Score | None = None
    latency_p50: float | None = None
    batch: int | None = None
    memory: int | None = None
    device_memory: int | None = None


def placed(session: Session) -> list[Node] | None:
    """Every node of a session opened with `RECORD`, and where it went; None when ONNX Runtime does not tell."""
    ask = getattr(session.raw, "get_provider_graph_assignment_info", None)
    if ask is None:
        return None
    return [Node(node.name, node.op_type, short_name(part.ep_name)) for part in ask() for node in part.get_nodes()]


def executed(profile: str | os.PathLike[str]) -> dict[str, int] | None:
    """Kernels by provider (short names) in the profile of one call; None when it shows none."""
    try:
        with open(profile, encoding="utf-8", errors="replace") as file:
            events = json.load(file)
    except (OSError, ValueError):
        return None
    names = [
        event["args"]["provider"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["args"].get("provider")
    ]
    return dict(collections.Counter(short_name(name) for name in names)) or None


def counted(nodes: Iterable[Node]) -> dict[str, int]:
    """Nodes by provider."""
    return dict(collections.Counter(node.provider for node in nodes))


def macs_shares(nodes: Sequence[Node], costs: Sequence[NodeCost]) -> dict[str, float] | None:
    """Share of the multiply-accumulates by provider; None for a model without any.

    ONNX Runtime optimizes before it places, so that a node may have a longer name (MatMul and Add made one) or another
    one altogether; that is found by its operator, where all of these went to one provider.
    """
    total = sum(cost.macs or 0 for cost in costs)
    if not total or not nodes:
        return None
    only = set(counted(nodes))
    if len(only) == 1:
        return {only.pop(): 1.0}
    by_name = {node.name: node.provider for node in nodes if node.name}
    by_operator: dict[str, set[str]] = {}
    for node in nodes:
        by_operator.setdefault(node.op_type, set()).add(node.provider)
    found: collections.Counter[str] = collections.Counter()
    for cost in costs:
        if cost.macs:
            provider = by_name.get(cost.name) or _renamed(cost, nodes) or _alone(by_operator.get(cost.op_type, set()))
            if provider is not None:
                found[provider] += cost.macs
    return {provider: found.get(provider, 0) / total for provider in sorted(only)}


def fallen(provider: str, nodes: Sequence[Node], *, free: Sequence[str] = ()) -> tuple[FellBack, ...]:
    """Nodes that `provider` (short name) left to others, by operator. `free`: inputs with a free dimension."""
    groups: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        if node.provider != provider:
            groups.setdefault((node.op_type, node.provider), []).append(node.name or "(unnamed)")
    return tuple(
        FellBack(op_type, tuple(names), where, _why(provider, op_type, free))
        for (op_type, where), names in sorted(groups.items(), key=lambda item: -len(item[1]))
    )


def took_none(provider: str, nodes: Sequence[Node] | None, *, free: Sequence[str] = ()) -> str:
    """Why a session that has `provider` (short name) does not run on it, in one line."""
    if nodes is None:
        return "this onnxruntime does not tell which nodes a provider takes; install a newer one"
    taken = ", ".join(f"{PROVIDERS.get(name, name)}: {count}" for name, count in counted(nodes).items())
    why = f": {_fixed(provider, free)}" if provider in FIXED and free else ""
    return f"took no node of this model ({taken or 'there are none'}){why}"


def judge_row(row: ProviderRow) -> Finding:
    """FAIL for a provider that did not run; a line on what it did not run, where that is much."""
    if not row.ran:
        return Finding(Verdict.FAIL, (f"provider {row.provider} did not run: {row.reason}",))
    own = row.provider.partition(":")[0]
    share = None if row.macs is None else row.macs.get(own, 0.0)
    if share is None or share >= LEAST_SHARE:
        return Finding(Verdict.PASS, ())
    left = "; ".join(map(str, row.fell_back[:_NAMED]))
    told = f"{row.nodes.get(own, 0)} of {sum(row.nodes.values())} nodes"
    if share == 0:
        said = f"provider {row.provider} ran {told} and none of the multiply-accumulates; not taken: {left}"
        return Finding(Verdict.FAIL, (said,))
    said = f"provider {row.provider} ran {share:.1%} of the multiply-accumulates ({told}); not taken: {left}"
    return Finding(Verdict.PASS, (said,))


def _renamed(cost: NodeCost, nodes: Sequence[Node]) -> str | None:
    """The provider of the node that `cost` became part of, or that stands in a body under its bare name."""
    found = {
        node.provider
        for node in nodes
        if node.name
        and (
            node.name.startswith(f"{cost.name}/")
            or (node.op_type == cost.op_type and cost.name.endswith(f"/{node.name}"))
        )
    }
    return _alone(found)


def _alone(providers: set[str]) -> str | None:
    return next(iter(providers)) if len(providers) == 1 else None


def _why(provider: str, op_type: str, free: Sequence[str]) -> str | None:
    target = TARGETS.get(provider)
    if target is not None and op_type in target.refused:
        return f"{provider} has no such operator"
    if provider in FIXED and free:
        return _fixed(provider, free)
    return "ONNX Runtime keeps shapes on the CPU" if op_type in _SHAPES else None


def _fixed(provider: str, free: Sequence[str]) -> str:
    return f"{provider} takes fixed shapes alone, and input {free[0]!r} has a free dimension"
