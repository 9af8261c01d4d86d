"""The linear layers of a model's Transformer blocks, whose input channels may be skipped: those of its FFNs and of its attention.

Letters: K input channels, N outputs.

As with FFNs no names are involved: a forward shows which layers run and which of them read the same input.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from .._config import LATER
from ..errors import UnsupportedModelError
from .discover import find_ffn_sites
from .probe import Call, Probe, eval_mode, linear_leaves
from .projection import projection_mlps
from .site import FFNSite

Role = Literal["attn_in", "attn_out", "ffn_in", "ffn_hidden"]
"""What a layer reads: the block's hidden state on its way into attention (q, k, v, fused or not), what attention made of it (o), the FFN's
input (gate, up), its neurons (down)."""
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, kw_only=True)
class LinearSite:
    """One linear layer of a block: ``y = x W^T + b``."""

    name: str
    """Module path from the model's root."""
    role: Role
    """What it reads."""
    reads: str
    """Name of the first layer that reads the same input: its own, or for example q's in k and v."""
    block: str
    """Module path of the block."""
    d_in: int
    """Number K of input channels."""
    d_out: int
    """Number N of outputs."""
    ffn: FFNSite | None = field(default=None, metadata=LATER)
    """Of the down projection of a gated FFN the FFN, whose layers may run as one; None in all others."""


def find_linear_sites(
    model: nn.Module, example_inputs: Mapping[str, Any], *, ffn_sites: Sequence[FFNSite] | None = None
) -> list[LinearSite]:
    """The linear layers of all blocks that have an FFN, in execution order; heads, embeddings and native MoE layers are none.

    Args:
        model: any module with materialised weights; left as it was.
        example_inputs: keyword arguments of one forward; only what runs in it is found.
        ffn_sites: what `find_ffn_sites` found with them; None looks.

    Returns:
        At least the layers of one FFN.

    Raises:
        UnsupportedModelError: as `find_ffn_sites`; or a layer of a block cannot be read directly (adapter, hook, quantised): names it.

    Cost: one forward of ``example_inputs``, and those of `find_ffn_sites`.
    """
    if ffn_sites is None:
        ffn_sites = find_ffn_sites(model, example_inputs)
    probe = Probe(model, example_inputs, linear_leaves(model))
    with torch.no_grad(), eval_mode(model):
        calls = probe.run().calls
    roles: dict[str, tuple[Role, str]] = {}
    gated = {site.down: site for site in ffn_sites if site.is_gated}
    own = projection_mlps(model)  # parts of a block's attention, which tell nothing of where it ends
    blocks = block_paths([site for site in ffn_sites if site.name not in own] or ffn_sites)
    block_of = {path: next((block for block in blocks if path.startswith(f"{block}.")), "") for path in calls}
    for site in ffn_sites:
        for path in site.first:
            roles[path] = ("ffn_in", site.first[0])
        roles[site.down] = ("ffn_hidden", site.down)
    others: dict[str, list[str]] = {}
    for path in calls:
        if path not in roles and block_of[path] and probe.leaves[path].channel_dim == -1:  # no convolution over single positions
            others.setdefault(block_of[path], []).append(path)
    for paths in others.values():
        roles |= _attention_roles(paths, calls)
    found = []
    for path in calls:  # in execution order
        if path not in roles:
            continue
        leaf = probe.leaves[path]
        if leaf.problem:
            raise UnsupportedModelError(f"'{path}' {leaf.problem}; its input cannot be made sparse. Merge or remove it first.")
        role, reads = roles[path]
        sizes = {"d_in": leaf.d_in, "d_out": leaf.d_out}
        found.append(LinearSite(name=path, role=role, reads=reads, block=block_of[path], **sizes, ffn=gated.get(path)))
    return found


def block_paths(sites: Sequence[FFNSite]) -> list[str]:
    """Every FFN's block: the outermost element of a list in which no other FFN lies; of a list whose elements have several, the element."""
    blocks = []
    for site in sites:
        parts = site.down.split(".")
        prefixes = [".".join(parts[: i + 1]) for i, part in enumerate(parts) if re.fullmatch(r"\d+", part)]
        alone = (p for p in prefixes if sum(other.down.startswith(f"{p}.") for other in sites) == 1)
        blocks.append(next(alone, prefixes[-1] if prefixes else site.name))
    return blocks


def _attention_roles(paths: Sequence[str], calls: Mapping[str, Call]) -> dict[str, tuple[Role, str]]:
    """Roles of a block's layers outside of its FFNs, in execution order.

    Layers that read the same input read the hidden state (q, k, v). One that reads something of its own is what closes an attention if it
    is the last to run of the smallest part of the model that holds it and another (q alone, where k and v read an encoder, is the first).
    """
    roles: dict[str, tuple[Role, str]] = {}
    for path in paths:
        first = next(p for p in paths if _same_input(calls[p], calls[path]))
        shared = sum(_same_input(calls[p], calls[path]) for p in paths) > 1
        last = not shared and _siblings(path, paths)[-1] == path
        roles[path] = ("attn_out" if last and len(paths) > 1 else "attn_in", first)
    return roles


def _same_input(one: Call, other: Call) -> bool:
    return one.num_rows == other.num_rows and torch.equal(one.tokens, other.tokens)


def _siblings(path: str, paths: Sequence[str]) -> list[str]:
    """Layers within the smallest module that holds this one and another, in execution order."""
    parent = path
    while parent:
        parent = parent.rpartition(".")[0]
        inside = [p for p in paths if p.startswith(f"{parent}." if parent else "")]
        if len(inside) > 1:
            return inside
    return list(paths)
