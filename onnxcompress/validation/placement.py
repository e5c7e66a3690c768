"""Did a requested provider really run? A session that lists a provider proves nothing: the nodes it took do."""

from __future__ import annotations

import collections
from collections.abc import Callable

from onnxcompress.errors import ModelError, RuntimeUnavailable
from onnxcompress.runtime.session import Session

# Records which provider each node was given, before fusion (seen in onnxruntime 1.32).
RECORD = {"session.record_ep_graph_assignment_info": "1"}


def placed(session: Session) -> dict[str, int] | None:
    """Nodes by provider (onnxruntime's names) of a session opened with `RECORD`; None when it does not tell."""
    ask = getattr(session.raw, "get_provider_graph_assignment_info", None)
    if ask is None:
        return None
    counts: collections.Counter[str] = collections.Counter()
    for part in ask():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)


def attempt(provider: str, open_it: Callable[[], Session]) -> tuple[Session | None, dict[str, int], str | None]:
    """Open a session on `provider` (onnxruntime's name) and see which nodes it took.

    Returns the session and the nodes by provider, or None and in one line why nothing of the model runs there.
    """
    try:
        session = open_it()
    except (RuntimeUnavailable, ModelError) as error:
        return None, {}, str(error)
    nodes = placed(session)
    if nodes and nodes.get(provider):
        return session, nodes, None
    session.close()
    if nodes is None:
        return None, {}, "this onnxruntime does not tell which nodes a provider takes; install a newer one"
    taken = ", ".join(f"{name}: {count}" for name, count in nodes.items())
    return None, nodes, f"took no node of this model ({taken or 'there are none'})"
