"""One task on every node: what only a node itself can say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ipd_ray.distributed.cluster import NODE_ID, Node
from ipd_ray.errors import UserError
from ipd_ray.storage import marked, troubles

ANSWER_SECONDS = 60.0
"""A worker that has to import torch on a busy machine takes a while."""


@dataclass(frozen=True)
class Member:
    """A machine of the joined cluster."""

    id: str
    name: str
    """Host and the beginning of the id, for messages: two nodes may share a host."""
    offers: Node
    memory: float
    """Bytes that Ray gives out to workers."""
    object_store: float
    """Bytes."""


def members() -> list[Member]:
    """Return the nodes that are alive."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            r = node["Resources"]
            name = f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"
            memory, store = r.get("memory", 0.0), r.get("object_store_memory", 0.0)
            found.append(Member(node["NodeID"], name, Node.of(node), memory, store))
    return sorted(found, key=lambda member: member.name)


def on_every_node(
    function: Callable[..., Any], *args: Any, seconds: float = ANSWER_SECONDS, gpus: float = 0.0
) -> dict[str, Any]:
    """Call a module-level function once on every node that is alive; return {node id: result, or the exception}.

    It takes no CPU, so that busy nodes answer, too. gpus: the share of a GPU it sees where a node has one. A node that
    has not answered within `seconds` has a TimeoutError that names it; one that cannot import the function, the error.
    """
    running = {}
    for member in members():
        here, share = {NODE_ID: member.id}, gpus if member.offers.gpus else 0.0
        task: Any = ray.remote(num_cpus=0, num_gpus=share, max_retries=0, label_selector=here)(function)
        running[task.remote(*args)] = member
    ended, late = ray.wait(list(running), num_returns=len(running), timeout=seconds)
    answers: dict[str, Any] = {}
    for call in ended:
        try:
            answers[running[call].id] = ray.get(call)
        except Exception as error:  # whatever kept that node from answering is the answer
            answers[running[call].id] = error
    for call in late:
        ray.cancel(call, force=True)
        answers[running[call].id] = TimeoutError(
            f"node {running[call].name} has not answered within {seconds:g} s: is it out of memory, or its disk slow?"
        )
    return answers


def require_storage(places: Sequence[str], remedy: str) -> None:
    """Raise UserError, ending in the remedy, where a node cannot use a place, or does not share it with the others.

    Nodes that an autoscaler brings later are not asked, and those that went meanwhile do not matter.
    """
    with marked(places) as marks:
        answers = on_every_node(troubles, marks)
    for member in members():
        answer = answers.get(member.id, {})
        wrong = {"": str(answer)} if isinstance(answer, Exception) else answer
        for place, text in wrong.items():
            if text:
                raise UserError(
                    f"node {member.name}{place and f', {place}'}: {text.strip()}: {remedy}; `ipd-ray doctor` looks at "
                    "all of them."
                )
