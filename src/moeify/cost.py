"""What a model costs: FLOPs per token, weight bytes per decoded token, and a roofline estimate.

Letters: D model width, F FFN width, E experts, S sequence (context) length.

Convention: one multiply and one add are 2 FLOPs (fvcore and the MoEfication papers count 1 MAC instead: half of our numbers). Counted are
matrix multiplications, convolutions and the two products of attention, as the full S x S rectangle also where a mask hides half of it (as
`torch.utils.flop_counter` does). Not counted: biases, norms, activations, softmax, embedding look-ups.

Nothing here knows a model family. One forward is watched op by op, and each op is booked by where it ran: a projection of an FFN site, a
module that computes attention (it runs a softmax over scores, or a fused attention), the output head, or elsewhere.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from .sites import FFNSite, ProjectionMLP, projection_mlps

Active = float | Mapping[str, float]
"""Active fraction in [0, 1]: one for all MoE layers and all linear layers that skip channels, or by name (a layer that is not named runs
whole)."""

_FUSED_ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "flex_attention")
_SCORE_PRODUCTS = ("bmm", "baddbmm")


@dataclass(frozen=True, kw_only=True)
class MoECost:
    """What cost has to know about one converted FFN."""

    num_experts: int
    """E."""
    router_flops: float
    """FLOPs of the router for one token. One that computes a projection of the FFN (the gate) counts all of it, and the experts that run
    count theirs in full: they compute their rows again."""


@dataclass(frozen=True, kw_only=True)
class FFNCost:
    """FLOPs of one FFN site in the watched forward."""

    dense_flops: float
    """All neurons, all calls."""
    router_flops: float = 0.0
    """Router, all calls; 0 for an FFN that was not converted."""
    is_moe: bool = False
    """Whether the active fraction applies."""
    replaced_flops: float | None = None
    """Where it stands in the place of a linear layer (`moeify.sites.ProjectionMLP`): FLOPs of that layer, all calls."""

    @property
    def is_projection(self) -> bool:
        """Whether it stands in the place of a linear layer."""
        return self.replaced_flops is not None

    @property
    def original_flops(self) -> float:
        """What the model had in its place before any layer was replaced."""
        return self.dense_flops if self.replaced_flops is None else self.replaced_flops

    def flops(self, active_fraction: float) -> float:
        """Router and active experts. Linear in the neurons that run: biases are not counted, so an expert is its share of the dense FFN."""
        return self.router_flops + self.dense_flops * active_fraction if self.is_moe else self.dense_flops


@dataclass(frozen=True, kw_only=True)
class ChannelCost:
    """FLOPs of one linear layer that skips input channels, in the watched forward."""

    dense_flops: float
    """All channels, all calls."""
    part: str
    """What it is a part of: "ffn", "projections" (an MLP in the place of a linear layer), or another key of `CostBreakdown.lines`."""


@dataclass(frozen=True, kw_only=True)
class CostBreakdown:
    """FLOPs of one forward by part; `lines`, `flops_per_token` and the fractions are what to read.

    Of a model whose linear layers were replaced by MLPs (`moeify.sites.ProjectionMLP`), "dense" is the model from before: fractions compare
    with it, whatever the MLPs cost.
    """

    tokens: int
    """Tokens of the forward: elements of ``input_ids``; for other inputs, the most positions that an FFN saw."""
    context: int
    """Longest sequence S of the forward; attention scores are quoted for it."""
    ffns: Mapping[str, FFNCost]
    """By site name; the MLPs in the places of linear layers are among them."""
    attention_proj_flops: float
    """Query, key, value and output projections, but for those that were replaced by MLPs and are among ``ffns``."""
    attention_score_flops: float
    """Query times key, and probabilities times value."""
    head_flops: float
    """Vocabulary projection or classifier."""
    other_flops: float
    """Everything else: patch embedding, poolers, rotary tables, FFNs that are no site."""
    channels: Mapping[str, ChannelCost] = field(default_factory=dict)
    """By the name of the linear layer; contained in the parts above. Comparing channels with their levels is no matrix product: not
    counted."""

    @property
    def dense_ffn_flops(self) -> float:
        """All FFN sites, and the linear layers that MLPs have replaced, dense, of the whole forward."""
        return sum(ffn.original_flops for ffn in self.ffns.values())

    @property
    def dense_projection_flops(self) -> float:
        """Of `dense_ffn_flops`, the linear layers that MLPs have replaced."""
        return sum(ffn.original_flops for ffn in self.ffns.values() if ffn.is_projection)

    @property
    def dense_flops(self) -> float:
        """The whole forward, dense."""
        return self.dense_ffn_flops + sum(self._rest(1.0).values())

    @property
    def dense_flops_per_token(self) -> float:
        """`dense_flops` over the number of tokens."""
        return self.dense_flops / self.tokens

    def ffn_flops(self, active: Active) -> float:
        """Routers, active experts and kept channels of all FFN sites, of the whole forward; an FFN that was not converted counts dense."""
        skipped = self._skipped(active, "ffn") + self._skipped(active, "projections")
        return sum(ffn.flops(_fraction_of(active, name)) for name, ffn in self.ffns.items()) - skipped

    def projection_flops(self, active: Active) -> float:
        """Of `ffn_flops`, what the MLPs in the places of linear layers cost: their routers and active experts."""
        costs = (ffn.flops(_fraction_of(active, name)) for name, ffn in self.ffns.items() if ffn.is_projection)
        return sum(costs) - self._skipped(active, "projections")

    def projection_flops_fraction(self, active: Active) -> float | None:
        """(experts + routers) of the MLPs / linear layers that they replaced; None where there are none."""
        dense = self.dense_projection_flops
        return self.projection_flops(active) / dense if dense else None

    def ffn_flops_fraction(self, active: Active) -> float:
        """(experts + routers + kept channels) / dense FFNs; above 1 where the routers cost more than the idle experts save.

        Raises:
            ValueError: no FFN site was given.
        """
        if not self.ffns:
            raise ValueError("the cost was estimated without FFN sites.")
        return self.ffn_flops(active) / self.dense_ffn_flops

    def flops_fraction(self, active: Active) -> float:
        """FLOPs of the whole model / those of the dense model."""
        return (self.ffn_flops(active) + sum(self._rest(active).values())) / self.dense_flops

    def flops_per_token(self, active: Active) -> float:
        """FLOPs of the whole model per token."""
        return (self.ffn_flops(active) + sum(self._rest(active).values())) / self.tokens

    def lines(self, active: Active = 1.0) -> dict[str, float]:
        """FLOPs per token by part, in the order to print them; all but ``ffn_dense`` and ``projections_dense``, given for comparison, add
        up to `flops_per_token`.

        Only where linear layers were replaced by MLPs there are ``projections``, their routers and active experts, which the lines of FFNs
        leave out then, and ``projections_dense``, the layers themselves, contained in ``ffn_dense``.
        """
        ffns = [ffn for ffn in self.ffns.values() if not ffn.is_projection]
        unconverted = sum(ffn.dense_flops for ffn in ffns if not ffn.is_moe) - self._skipped(active, "ffn")
        router = sum(ffn.router_flops for ffn in ffns)
        projections = self.projection_flops(active)
        replaced = {"projections_dense": self.dense_projection_flops, "projections": projections}
        parts = {
            "ffn_dense": self.dense_ffn_flops,
            "ffn_unconverted": unconverted,
            "experts": self.ffn_flops(active) - projections - router - unconverted,
            "router": router,
            **(replaced if len(ffns) < len(self.ffns) else {}),
            **self._rest(active),
        }
        return {name: flops / self.tokens for name, flops in parts.items()}

    def at_context(self, context: int) -> "CostBreakdown":
        """The same tokens in sequences of ``context`` positions: attention scores per token grow linearly with S, nothing else does.

        So a short forward gives the cost at any length. Exact where every attention layer computes the whole rectangle, masked or not; for
        models that compute local attention in blocks, watch a forward of the real length instead.
        """
        return replace(self, context=context, attention_score_flops=self.attention_score_flops * context / self.context)

    def _rest(self, active: Active) -> dict[str, float]:
        """All but the FFNs, by part."""
        dense = {
            "attention_proj": self.attention_proj_flops,
            "attention_scores": self.attention_score_flops,
            "head": self.head_flops,
            "other": self.other_flops,
        }
        return {part: flops - self._skipped(active, part) for part, flops in dense.items()}

    def _skipped(self, active: Active, part: str) -> float:
        """Of a part, what belongs to skipped channels."""
        return sum(c.dense_flops * (1 - _fraction_of(active, name)) for name, c in self.channels.items() if c.part == part)


@torch.no_grad()
def estimate_flops(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    *,
    sites: Iterable[FFNSite] = (),
    moe: Mapping[str, MoECost] | None = None,
    channels: Iterable[str] = (),
) -> CostBreakdown:
    """FLOPs of ``model(**example_inputs)`` by part, watched in one dense forward.

    Args:
        model: any module; a converted model must be in dense mode (its experts are then priced from ``moe``).
        example_inputs: keyword arguments; one short sequence is enough for text (`CostBreakdown.at_context`). ``labels`` are left out.
        sites: the FFNs, to tell them from attention projections. The MLPs in the places of linear layers that run are known without.
        moe: what runs in place of the dense FFN, by site name.
        channels: names of linear layers that skip input channels, none of them within a converted FFN.

    Returns:
        The breakdown; its dense total equals torch's FlopCounterMode with `register_formulas`, on the model from before any layer was
        replaced.

    Raises:
        ValueError: ``moe`` names no site, or a site did not run in the forward.

    Cost: one forward.
    """
    by_name, moe = {site.name: site for site in sites}, dict(moe or {})
    if unknown := set(moe) - set(by_name):
        raise ValueError(f"moe names '{min(unknown)}', which is not among the sites.")
    register_formulas()
    device = next((parameter.device for parameter in model.parameters()), None)
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in example_inputs.items() if name != "labels"}
    was_training = model.training
    model.eval()
    try:
        with _watch(model) as counter:
            model(**inputs)
    finally:
        model.train(was_training)
    replaced = projection_mlps(model)
    places = {path: site.name for site in by_name.values() for path in (*site.first, site.down)}
    others = [name for name in replaced if name not in by_name]
    places |= {f"{name}.{part}": name for name in others for part in ("up", "down")}
    ffn, parts, linears = _book(model, counter, places, replaced, channels)
    for name in others:
        if ffn[name] == 0:  # asked for by nobody, and not a part of this forward
            del ffn[name]
    if silent := [name for name, flops in ffn.items() if flops == 0]:
        raise ValueError(f"FFN '{silent[0]}' did not run in the forward that was watched; is the model in dense mode?")
    if silent := [name for name in channels if name not in linears]:
        raise ValueError(f"'{silent[0]}' did not run in the forward that was watched.")

    rows = {name: ffn[name] / site_flops_per_token(site) for name, site in by_name.items()}
    router = {name: rows[name] * cost.router_flops for name, cost in moe.items()}
    ids, most_rows = inputs.get("input_ids"), int(max(rows.values(), default=1))
    return CostBreakdown(
        tokens=ids.numel() if isinstance(ids, Tensor) else most_rows,
        context=ids.shape[-1] if isinstance(ids, Tensor) else max(1, most_rows // _batch_size(inputs)),
        ffns={
            name: FFNCost(
                dense_flops=flops,
                router_flops=router.get(name, 0.0),
                is_moe=name in moe,
                replaced_flops=_replaced_flops(replaced[name], flops) if name in replaced else None,
            )
            for name, flops in ffn.items()
        },
        attention_proj_flops=parts["attention_proj"],
        attention_score_flops=parts["attention_scores"],
        head_flops=parts["head"],
        other_flops=parts["other"],
        channels=linears,
    )


def _book(
    model: nn.Module, counter: "_Counter", owner: Mapping[str, str], replaced: Collection[str], channels: Iterable[str]
) -> tuple[dict[str, int], dict[str, int], dict[str, ChannelCost]]:
    """FLOPs of each FFN by its name, of everything else by part, and once more of the linear layers in ``channels``.

    ``owner`` names the FFN of each of its projections; where those of ``replaced`` lie, inside of attention, says nothing of where the FFN
    does.
    """
    attention = _attention_roots(counter.attention, [path for path, name in owner.items() if name not in replaced])
    heads = _head_paths(model)
    ffn = dict.fromkeys(owner.values(), 0)
    parts = dict.fromkeys(("attention_proj", "attention_scores", "head", "other"), 0)
    names, linears = set(channels), dict[str, ChannelCost]()
    for (path, op), flops in counter.flops.items():
        if path in owner:
            part = "projections" if owner[path] in replaced else "ffn"
        elif path in counter.attention and (op.startswith(_FUSED_ATTENTION) or op in _SCORE_PRODUCTS):
            part = "attention_scores"
        elif _inside(path, attention):
            part = "attention_proj"
        else:
            part = "head" if _inside(path, heads) else "other"
        if path in owner:
            ffn[owner[path]] += flops
        else:
            parts[part] += flops
        if path in names:
            before = linears[path].dense_flops if path in linears else 0.0
            linears[path] = ChannelCost(dense_flops=before + flops, part=part)
    return ffn, parts, linears


def _replaced_flops(mlp: ProjectionMLP, flops: int) -> float:
    """What the linear layer would cost where the MLP costs ``flops``: K N in place of P (K + N)."""
    return flops * mlp.in_features * mlp.out_features / (mlp.width * (mlp.in_features + mlp.out_features))


def site_flops_per_token(site: FFNSite) -> int:
    """Dense FLOPs of one FFN for one token: 2 F (D + D_out), gated 2 F (2 D + D_out)."""
    return 2 * site.d_ff * (site.d_model * (2 if site.is_gated else 1) + site.d_out)


@dataclass(frozen=True, kw_only=True)
class WeightCost:
    """Parameters and bytes of a model by part; what one decoded token reads at batch size 1."""

    ffn: Mapping[str, tuple[int, int]]
    """(parameters, bytes) of each FFN site's projections, their biases included."""
    router: Mapping[str, tuple[int, int]]
    """(parameters, bytes) of each MoE layer's router."""
    embedding: tuple[int, int]
    """(parameters, bytes) of look-up tables; a token reads one row of each. A table that is also the head counts as ``rest``."""
    embedding_row_bytes: int
    """Bytes of one row of each table."""
    rest: tuple[int, int]
    """(parameters, bytes) of everything else: attention, head, norms."""
    channels: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the weight of each linear layer that skips input channels; contained in the parts above."""
    router_shares: Mapping[str, float] = field(default_factory=dict)
    """Share of an FFN's weights that its router reads for every token (the gate of CATS and CHESS); 0 where it is not named."""

    @property
    def num_params(self) -> int:
        """All parameters, shared ones once."""
        return self._sum(0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters, shared ones once."""
        return self._sum(1)

    def read_bytes_per_token(self, active: Active = 1.0) -> float:
        """Weight bytes that decoding one token reads, each once: active experts, kept channels, routers and what of the FFN they
        read, one row of each table, and all the rest."""
        experts = 0.0
        for name, (_, size) in self.ffn.items():
            share = self.router_shares.get(name, 0.0) if name in self.router else 1.0
            experts += size * (share + (1 - share) * _fraction_of(active, name))
        skipped = sum(size * (1 - _fraction_of(active, name)) for name, size in self.channels.items())
        return experts + sum(size for _, size in self.router.values()) + self.embedding_row_bytes + self.rest[1] - skipped

    def read_bytes_fraction(self, active: Active = 1.0) -> float:
        """`read_bytes_per_token` over that of the dense model, which has no routers."""
        return self.read_bytes_per_token(active) / (self.read_bytes_per_token(1.0) - sum(size for _, size in self.router.values()))

    def _sum(self, i: int) -> int:
        parts = [*self.ffn.values(), *self.router.values(), self.embedding, self.rest]
        return sum(part[i] for part in parts)


def estimate_weights(
    model: nn.Module,
    *,
    sites: Iterable[FFNSite] = (),
    routers: Mapping[str, nn.Module] | None = None,
    channels: Iterable[str] = (),
    router_shares: Mapping[str, float] | None = None,
) -> WeightCost:
    """Parameters and bytes of a model by part; works on meta tensors.

    Args:
        model: any module.
        sites: the FFNs.
        routers: router module of each converted FFN by site name.
        channels: names of linear layers that skip input channels.
        router_shares: share of the FFN's weights that each router reads for every token, in [0, 1]; 0 where it is not named.
    """
    head = _output_embeddings(model)
    head_ids = {id(p) for p in head.parameters()} if head is not None else set()
    router_ids = {id(p): name for name, router in (routers or {}).items() for p in router.parameters()}
    ffn_ids = {id(p): site.name for site in sites for path in (*site.first, site.down) for p in model.get_submodule(path).parameters()}
    table_ids = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - head_ids
    ffn = dict.fromkeys(ffn_ids.values(), (0, 0))
    router = dict.fromkeys(routers or {}, (0, 0))
    embedding = rest = (0, 0)
    row_bytes = 0
    for p in model.parameters():
        count, size = p.numel(), p.numel() * p.element_size()
        if name := ffn_ids.get(id(p)):
            ffn[name] = (ffn[name][0] + count, ffn[name][1] + size)
        elif name := router_ids.get(id(p)):
            router[name] = (router[name][0] + count, router[name][1] + size)
        elif id(p) in table_ids:
            embedding = (embedding[0] + count, embedding[1] + size)
            row_bytes += size // p.shape[0]
        else:
            rest = (rest[0] + count, rest[1] + size)
    weights = {name: cast(Tensor, model.get_submodule(name).weight) for name in channels}
    return WeightCost(
        ffn=ffn,
        router=router,
        embedding=embedding,
        embedding_row_bytes=row_bytes,
        rest=rest,
        channels={name: weight.numel() * weight.element_size() for name, weight in weights.items()},
        router_shares=dict(router_shares or {}),
    )


def roofline_s(*, flops: float, num_bytes: float, peak_flops_per_s: float, peak_bytes_per_s: float) -> float:
    """Least time of work that computes ``flops`` and moves ``num_bytes``: max(flops / peak FLOP rate, bytes / bandwidth), in seconds.

    Source: Williams et al. 2009, doi:10.1145/1498765.1498785.
    """
    return max(flops / peak_flops_per_s, num_bytes / peak_bytes_per_s)


def register_formulas() -> None:
    """Teach `torch.utils.flop_counter` the ops that it counts as 0: attention on CPU and grouped matrix multiplication. Idempotent.

    The counter's table is torch's own global one, so FlopCounterMode is right afterwards, too; ops that torch knows already are left alone.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula  # not above: it loads triton

    aten = torch.ops.aten
    for target, formula in (
        (aten._scaled_dot_product_flash_attention_for_cpu, _attention_flops),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward_flops),
        (aten._grouped_mm, _grouped_mm_flops),
    ):
        if target not in flop_registry:
            register_flop_formula(target)(formula)


def _attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Query times key and probabilities times value, for every query head; shapes (batch, heads, sequence, head width)."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def _attention_backward_flops(
    _grad: tuple[int, ...], query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """Five products: the scores again, and the gradients of probabilities, value, query and key."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (3 * width + 2 * value[-1])


def _grouped_mm_flops(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """(T, D) x (E, D, G), (E, M, D) x (D, T) or (M, T) x (T, N): each of the T meets one group only; two batches are a plain bmm."""
    return 2 * a[-2] * a[-1] * b[-1] * (a[0] if len(a) == len(b) == 3 else 1)


class _Counter(TorchDispatchMode):
    """Books the FLOPs of each op under the innermost module that is running."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # not above: it loads triton

        super().__init__()
        self.formulas = flop_registry
        self.stack = [""]
        self.flops: dict[tuple[str, str], int] = {}
        self.attention: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        name = packet.__name__
        if packet not in self.formulas:
            # Composite ops reach us whole under inference_mode; their parts are what has formulas.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if name.startswith(_FUSED_ATTENTION) or (name in ("_softmax", "_safe_softmax") and args[0].dim() >= 3):
            self.attention.add(self.stack[-1])
        if packet in self.formulas:
            key = (self.stack[-1], name)
            self.flops[key] = self.flops.get(key, 0) + int(self.formulas[packet](*args, **kwargs, out_val=out))
        return out


@contextmanager
def _watch(model: nn.Module) -> Iterator[_Counter]:
    names = {id(module): name for name, module in model.named_modules()}
    counter = _Counter()

    def enter(module: nn.Module, _args: Any) -> None:
        if id(module) in names:
            counter.stack.append(names[id(module)])

    def leave(module: nn.Module, _args: Any, _out: Any) -> None:
        if id(module) in names:
            counter.stack.pop()

    # Global hooks, so that no module carries one: a hooked projection runs another path (decision D7).
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        with counter:
            yield counter
    finally:
        for handle in handles:
            handle.remove()


def _attention_roots(scoring: Iterable[str], ffn_paths: Iterable[str]) -> tuple[str, ...]:
    """The whole attention modules around those that compute scores: BERT's output projection sits one level above its softmax.

    Climbs until the next level is an item of a list (a layer) or holds an FFN.
    """
    roots = set()
    for path in scoring:
        while "." in path:
            parent = path.rpartition(".")[0]
            is_layer = parent.rpartition(".")[2].isdigit()
            if is_layer or not any(p.rpartition(".")[2].isdigit() for p in _ancestors(parent)) or _inside_any(ffn_paths, parent):
                break
            path = parent
        roots.add(path)
    return tuple(roots)


def _ancestors(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _inside_any(paths: Iterable[str], root: str) -> bool:
    return any(_inside(path, (root,)) for path in paths)


def _inside(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """The vocabulary projection, by the transformers protocol."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def _head_paths(model: nn.Module) -> tuple[str, ...]:
    """The vocabulary projection, and what stands beside the body of a transformers model (``base_model_prefix``)."""
    head = _output_embeddings(model)
    paths = [name for name, module in model.named_modules() if module is head]
    body = getattr(model, "base_model_prefix", "")
    if body and isinstance(getattr(model, body, None), nn.Module):
        paths += [name for name, _ in model.named_children() if name != body]
    return tuple(paths)


def _fraction_of(active: Active, name: str) -> float:
    return active.get(name, 1.0) if isinstance(active, Mapping) else active


def _batch_size(inputs: Mapping[str, Any]) -> int:
    return next((int(value.shape[0]) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 1)
