"""Find the dense FFNs of a model by watching its data flow, and prove each one before accepting it (decision D6). No names are involved.

Letters: R sampled rows (tokens), D model width, F FFN width.

Every pass is one forward of the whole model with hooks on its linear leaves:

1. *Watch*: record what enters and leaves every leaf. A leaf `down` whose input equals act(z) of an earlier leaf's output z, or act(g) * u
   of two leaves that read the same input (or of the two halves of one leaf), is a candidate.
2. *Drive*: replace every candidate's z (g, u) by a wide grid of values, read what arrives at `down`, and pin the output of `down` to what
   it was in pass 1. The first shows that nothing but one known elementwise function stands between the projections, at values where the
   functions differ (near zero, where an untrained model lives, gelu(z) and silu(z) are both z/2). The second shows that nobody else reads
   the neurons: all that follows must be as in pass 1.
3. *Narrow*: let the first projections of what was proven give zeros of width 1, as in a converted model. Code that does not run with
   these works with explicit sizes (`FFNSite.explicit_width`).
4. *Explain*, only if a wide pair of leaves was left over: move some tokens and some neurons of it and see which others move along.

Then the formula with the site's weights must give what `down` gave in pass 1. What fails is refused with the reason.

The MLPs in the places of replaced linear layers (`projection.py`) are ours: what they compute is known, and only that they ran is asked.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .formula import ACTIVATIONS, ffn_dense
from .probe import Call, Leaf, Probe, Trace, eval_mode, linear_leaves, sampled_rows
from .projection import projection_mlps, projection_site
from .site import FFNSite, FFNWeights, site_weights

_SCREENED_VALUES = 256  # values per candidate compared in pass 1; pass 2 compares all that were kept
_WINDOW = 8  # how many leaf calls before `down` its projections may lie; an adapter's two leaves on each of gate and up make 6
_ROUNDINGS = 16.0  # accepted distance from a formula, in units of the last place of the values that enter it
_FORWARD_TOLERANCE = 0.01  # relative distance that two forwards of one model may have: 0 on a CPU, atomics on a GPU
_SILENT = "its neurons are all zero in the probe forward, so nothing shows what it computes"
_MEASURED = re.compile(r" \(relative error [^)]*\)")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # cannot hold a new child: they run, or list, whatever they contain


@dataclass(frozen=True)
class Refusal:
    """A part of the model that looks like an FFN and cannot be converted."""

    path: str
    """Module path of the near miss."""
    reason: str
    """Why, in words; the same for every layer that is refused for the same cause, but for a measured "(relative error 0.3)"."""


@dataclass(frozen=True)
class Discovery:
    """What one look at a model found."""

    sites: tuple[FFNSite, ...]
    """Proven FFNs in execution order."""
    refused: tuple[Refusal, ...]
    """Near misses, native MoEs included."""


def find_ffn_sites(model: nn.Module, example_inputs: Mapping[str, Any]) -> list[FFNSite]:
    """The dense FFNs of a model, in execution order, each proven by a probe.

    Args:
        model: any module with materialised weights. It is left as it was, also on an error: training flags, hooks and random state.
        example_inputs: keyword arguments of one forward; a few tokens are enough. Only what runs in this forward can be found.

    Returns:
        At least one site. An FFN whose neurons are all zero in that forward is left out with a warning: nothing shows what it computes.

    Raises:
        UnsupportedModelError: no FFN can be converted (names each near miss and its reason), or the weights are on the meta device.

    Cost: three forwards of ``example_inputs``, four where something was left to explain (one more per site if neurons are read twice, or
        if one works with explicit sizes);
        memory for a few rows of every linear layer's input and output, and for the whole outputs of the down projections.
    """
    return proven_sites(discover(model, example_inputs), of=type(model).__name__)


def proven_sites(found: Discovery, *, of: str) -> list[FFNSite]:
    """What `find_ffn_sites` returns, warns of or raises where this was found in a model of the class ``of``."""
    if not found.sites:
        misses = _summary(found.refused) or "no two of its linear layers compute act(x W1) W2 in this forward"
        raise UnsupportedModelError(f"no FFN of {of} can be converted: {misses}.")
    for refusal in found.refused:
        if refusal.reason == _SILENT:
            warnings.warn(f"'{refusal.path}' is left as it is: {_SILENT}.", stacklevel=3)
    return list(found.sites)


def discover(model: nn.Module, example_inputs: Mapping[str, Any]) -> Discovery:
    """Like `find_ffn_sites`, but tells what was refused too, and an empty result is no error."""
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedModelError(f"{type(model).__name__} has parameters on the meta device: load its weights before looking for FFNs.")
    probe = Probe(model, example_inputs, _leaves(model))
    refused: list[Refusal] = []
    with torch.no_grad(), eval_mode(model):
        watched = probe.run(keep=_possible_downs(probe.leaves))
        proposed = _propose(probe.leaves, watched)
        candidates = _refuse_by_structure(probe, watched, proposed, refused)
        candidates = _prove_driven(probe, watched, candidates, refused)
        misses = _left_over(probe, watched, proposed)
        refused += _explain(probe, watched, misses)
        sites = [_site(probe, c) for c in candidates]
        sites = [site for site in sites if _prove_formula(probe, watched, site, refused)]
        sites = _tell_widths(probe, watched, sites)
    sites = _refuse_heads(sites, watched, example_inputs, refused)
    own = _own_sites(model, watched, refused)
    order = {site.name: watched.calls[site.name if site in own else site.up].order for site in (*sites, *own)}
    sites = sorted((*sites, *own), key=lambda site: order[site.name])
    return Discovery(tuple(sites), tuple(dict.fromkeys(refused)))


def _leaves(model: nn.Module) -> dict[str, Leaf]:
    """The linear leaves; what stands in the place of a replaced one is a leaf, too, as a whole, and never part of another FFN."""
    own = projection_mlps(model)
    leaves = {path: leaf for path, leaf in linear_leaves(model).items() if path.rpartition(".")[0] not in own}
    problem = "was replaced by an MLP"
    return leaves | {name: Leaf(mlp, mlp.in_features, mlp.out_features, -1, problem) for name, mlp in own.items()}


def _own_sites(model: nn.Module, watched: Trace, refused: list[Refusal]) -> list[FFNSite]:
    """The MLPs in the places of replaced layers that ran in the forward."""
    leaves, owners = linear_leaves(model), _parameter_owners(model)
    found = []
    for name, mlp in projection_mlps(model).items():
        if name not in watched.calls:
            continue
        problems = [f"'{part}' {p}" for part in ("up", "down") if (p := _own_problem(leaves.get(f"{name}.{part}"), owners))]
        try:
            site = projection_site(name, mlp)
        except UnsupportedModelError as error:
            problems.append(str(error).rstrip("."))
        if problems:
            refused.append(Refusal(name, problems[0]))
        else:
            found.append(site)
    return found


def _own_problem(leaf: Leaf | None, owners: Mapping[int, set[int]]) -> str | None:
    if leaf is None:
        return "is no linear layer any more"
    if leaf.problem:
        return leaf.problem
    if any(len(owners[id(p)]) > 1 for p in leaf.module.parameters()):
        return "shares its weight with another module"
    return None


# ---- pass 1: candidates


@dataclass(frozen=True)
class _Wiring:
    """Leaves that may be the projections of one FFN; fields as in `FFNSite`."""

    down: str
    up: str
    gate: str | None = None
    fused: Literal["gate_up", "up_gate"] | None = None

    @property
    def first(self) -> tuple[str, ...]:
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def leaves(self) -> tuple[str, ...]:
        return (*self.first, self.down)

    def inputs(self, calls: Mapping[str, Call]) -> tuple[Tensor | None, Tensor]:
        """What enters the activation, and what multiplies it: (g, u) in fp64; (None, z) where there is no gate."""
        up = _exact(calls[self.up].y_RF)
        if self.gate is not None:
            return _exact(calls[self.gate].y_RF), up
        if self.fused is None:
            return None, up
        halves = up.chunk(2, dim=-1)
        return (halves[0], halves[1]) if self.fused == "gate_up" else (halves[1], halves[0])


@dataclass(frozen=True)
class _Candidate:
    wiring: _Wiring
    host: str
    activation: str = ""


def _possible_downs(leaves: Mapping[str, Leaf]) -> frozenset[str]:
    """Leaves that undo another leaf's change of width: the only ones that can close an FFN."""
    shapes = {(leaf.d_in, leaf.d_out) for leaf in leaves.values()}
    return frozenset(p for p, leaf in leaves.items() if shapes & {(leaf.d_out, leaf.d_in), (leaf.d_out, 2 * leaf.d_in)})


def _propose(leaves: Mapping[str, Leaf], watched: Trace) -> list[_Wiring]:
    """For every leaf the wiring, if any, that explains its input as an activation of earlier leaves."""
    found = []
    for down in watched.calls:
        best = min(
            ((error, i, w) for i, w in enumerate(_wirings(leaves, watched, down)) if (error := _screen(w, watched)) <= _ROUNDINGS),
            default=None,
        )
        if best is not None:
            found.append(best[2])
    return found


def _wirings(leaves: Mapping[str, Leaf], watched: Trace, down: str) -> Iterator[_Wiring]:
    """Wirings that shapes and order allow, nearest first."""
    end = watched.calls[down]
    before = [
        path
        for path, call in watched.calls.items()
        if end.order - _WINDOW <= call.order < end.order and call.num_rows == end.num_rows and call.y_RF is not None
    ][::-1]
    width = leaves[down].d_in
    narrow = [path for path in before if leaves[path].d_out == width]
    for path in before:
        if leaves[path].d_out == width:
            yield _Wiring(down, path)
        elif leaves[path].d_out == 2 * width:
            yield _Wiring(down, path, fused="gate_up")
            yield _Wiring(down, path, fused="up_gate")
    for up, gate in permutations(narrow, 2):
        if torch.equal(watched.calls[up].x_RD, watched.calls[gate].x_RD):
            yield _Wiring(down, up, gate)


def _screen(wiring: _Wiring, watched: Trace) -> float:
    """Smallest distance of the recorded input of `down` from any activation, in roundings, on a part of the values."""
    h_RF = _exact(watched.calls[wiring.down].x_RD)
    step = max(1, h_RF.numel() // _SCREENED_VALUES)
    gate, up = wiring.inputs(watched.calls)
    gate, up, h_RF = (None if gate is None else gate[:, ::step]), up[:, ::step], h_RF[:, ::step]
    eps = _eps(watched.calls[wiring.down].x_RD)
    return min(_distance(h_RF, gate, up, name, eps=eps, eps_in=eps)[0] for name in watched.activations)


def _distance(h_RF: Tensor, gate_RF: Tensor | None, up_RF: Tensor, activation: str, *, eps: float, eps_in: float) -> tuple[float, float]:
    """Distance of h from act(z) or act(g) * u: the largest one in roundings, and the relative one in norm.

    A rounding is ``eps |h| + eps_in |z|``: the functions are sums whose terms are as large as their argument.
    """
    if not bool(torch.isfinite(h_RF).all()):
        return float("inf"), float("inf")
    z, u = (up_RF, None) if gate_RF is None else (gate_RF, up_RF)
    wanted, size = ACTIVATIONS[activation](z), z.abs()
    if u is not None:
        wanted, size = wanted * u, size * u.abs()
    gap = (h_RF - wanted).abs()
    unit = eps * torch.maximum(h_RF.abs(), wanted.abs()) + eps_in * size + torch.finfo(torch.float32).tiny
    return float((gap / unit).max()), float(gap.norm() / h_RF.norm().clamp_min(1e-30))


# ---- refusals that need no further forward


def _refuse_by_structure(probe: Probe, watched: Trace, proposed: list[_Wiring], refused: list[Refusal]) -> list[_Candidate]:
    """Drop what can be judged from shapes, module tree and parameters, and what would collide with an earlier site."""
    experts = _expert_lists(probe, watched, proposed)
    refused += [Refusal(path, "native MoE: one 3-D parameter holds the weights of all experts") for path in sorted(watched.banks)]
    refused += [Refusal(path, "native MoE: a list of expert modules, each called with the tokens routed to it") for path in sorted(experts)]
    owners = _parameter_owners(probe.model)
    kept: list[_Candidate] = []
    for wiring in proposed:
        host = _host(probe.model, wiring)
        candidate = _Candidate(wiring, host)
        if any(_inside(host, path) for path in experts):
            continue
        if reason := _structural_reason(probe, watched.banks | experts, owners, candidate, kept):
            refused.append(Refusal(host or wiring.down, reason))
        else:
            kept.append(candidate)
    return kept


def _structural_reason(
    probe: Probe, moe: Set[str], owners: Mapping[int, set[int]], candidate: _Candidate, kept: list[_Candidate]
) -> str | None:
    wiring, host = candidate.wiring, candidate.host
    d_in, d_out = probe.leaves[wiring.up].d_in, probe.leaves[wiring.down].d_out
    if any(_beside(path, block) for path in moe for block in {host, host.rpartition(".")[0]}):
        return "native MoE: a shared or dense FFN beside routed experts"
    if d_in != d_out:
        return f"not an FFN of the residual stream: reads width {d_in}, writes width {d_out}"
    for path in wiring.leaves:
        if problem := probe.leaves[path].problem:
            return f"'{_relative(path, host)}' {problem}"
        for parameter in probe.leaves[path].module.parameters():
            if len(owners[id(parameter)]) > 1:
                return f"'{_relative(path, host)}' shares its weight with another module"
    if isinstance(probe.model.get_submodule(host), _CONTAINERS):
        return f"the model itself is a {type(probe.model).__name__}: wrap it in a module of your own"
    for other in kept:
        if shared := set(wiring.leaves) & set(other.wiring.leaves):
            return f"'{_relative(min(shared), host)}' belongs to another FFN too"
        if host == other.host:
            return "a second FFN in the same module; one can be converted"
    return None


def _expert_lists(probe: Probe, watched: Trace, proposed: list[_Wiring]) -> set[str]:
    """Containers of FFNs that share out one set of tokens: lists of experts, unlike the list of a model's layers."""
    members = defaultdict(list)
    for wiring in proposed:
        parent = _host(probe.model, wiring).rpartition(".")[0]
        if isinstance(probe.model.get_submodule(parent), (nn.ModuleList, nn.ModuleDict)):
            members[parent].append(watched.calls[wiring.up])
    found = set()
    for parent, calls in members.items():
        # one common token is none: it may be padding that every layer sets to the same value
        common_tokens = _num_distinct(*calls) < sum(_num_distinct(call) for call in calls) - (len(calls) - 1)
        outside = [call for path, call in watched.calls.items() if not _inside(path, parent)]
        if common_tokens or any(_is_shared_out(call, calls) for call in outside):
            found.add(parent)
    return found


def _is_shared_out(whole: Call, parts: list[Call]) -> bool:
    """Whether every part reads some, but not all, of the tokens that ``whole`` reads (a router's input)."""
    return all(part.num_rows < whole.num_rows and _num_distinct(whole, part) == _num_distinct(whole) for part in parts)


def _num_distinct(*calls: Call) -> int:
    """Number of different tokens among those that leaves read."""
    return len(torch.unique(torch.cat([call.tokens.cpu() for call in calls])))


def _parameter_owners(model: nn.Module) -> dict[int, set[int]]:
    owners = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(id(module))
    return owners


# ---- pass 2: the proof


def _prove_driven(probe: Probe, watched: Trace, candidates: list[_Candidate], refused: list[Refusal]) -> list[_Candidate]:
    """Keep the candidates that compute a known function at driven values and whose neurons nobody else reads."""
    if not candidates:
        return []
    driven, untouched = _drive(probe, watched, candidates)
    proven = []
    for candidate in candidates:
        named = _recognise(probe, candidate, driven)
        if isinstance(named, str):
            is_silent = not bool(watched.calls[candidate.wiring.down].x_RD.any())  # any wiring explains that, maybe not the right one
            refused.append(Refusal(candidate.host, _SILENT if is_silent else named))
        elif untouched or _drive(probe, watched, [candidate])[1]:
            proven.append(named)
        else:
            refused.append(Refusal(candidate.host, "its neurons are read by something else than the down projection"))
    return proven


def _drive(probe: Probe, watched: Trace, candidates: list[_Candidate]) -> tuple[Trace, bool]:
    """Forward with wide values in the candidates' neurons, their outputs pinned; and whether all else was as in pass 1."""
    pins = {c.wiring.down: watched.outputs[c.wiring.down] for c in candidates}
    driven = probe.run(edit={path: _wide_values for c in candidates for path in c.wiring.first}, pins=pins)
    same = [path for path in watched.calls if path not in pins]
    return driven, (
        watched.calls.keys() == driven.calls.keys()
        and all(_close(watched.calls[path].x_RD, driven.calls[path].x_RD) for path in same)
        and len(watched.result) == len(driven.result)
        and all(_close(a, b) for a, b in zip(watched.result, driven.result, strict=True))
    )


def _recognise(probe: Probe, candidate: _Candidate, driven: Trace) -> _Candidate | str:
    """The candidate with its activation, or why there is none."""
    wiring = candidate.wiring
    call = driven.calls[wiring.down]
    error, relative, name, wiring = _nearest(wiring, driven, swap=False)
    if error <= _ROUNDINGS:
        return replace(candidate, activation=name)
    if not bool(torch.isfinite(call.x_RD).all()):
        return "non-finite activations in the probe forward"
    return f"looks like {name} near zero but differs at larger values (relative error {relative:.1g})"


def _nearest(wiring: _Wiring, trace: Trace, *, swap: bool) -> tuple[float, float, str, _Wiring]:
    """Known function nearest to what arrives at `down`: its distance in roundings, its relative one, its name, the wiring.

    With ``swap``, gate and up are tried in both roles.
    """
    wirings = [wiring]
    if swap and wiring.gate is not None:
        wirings.append(replace(wiring, up=wiring.gate, gate=wiring.up))
    if swap and wiring.fused is not None:
        wirings.append(replace(wiring, fused="gate_up" if wiring.fused == "up_gate" else "up_gate"))
    h_RF = trace.calls[wiring.down].x_RD
    found = []
    for option in wirings:
        gate, up = option.inputs(trace.calls)
        for name in trace.activations:
            error, relative = _distance(_exact(h_RF), gate, up, name, eps=_eps(h_RF), eps_in=_eps(torch.float32))
            found.append((error, relative, name, option))
    exact = min(found, key=lambda entry: entry[0])
    return exact if exact[0] <= _ROUNDINGS else min(found, key=lambda entry: entry[1])


def _prove_formula(probe: Probe, watched: Trace, site: FFNSite, refused: list[Refusal]) -> bool:
    """Whether the site's weights, put in the formula in fp64, give what `down` gave.

    Accepted: a relative error of 0.2 % (as much as TF32 may cost), or eight units of the last place of a 16-bit type.
    """
    weights = site_weights(probe.model, site)
    exact = FFNWeights(*(None if w is None else _exact(w) for w in vars(weights).values()))  # type: ignore[arg-type]
    x_RD, y_RD = watched.calls[site.up].x_RD, watched.calls[site.down].y_RF
    assert y_RD is not None
    wanted_RD = ffn_dense(_exact(x_RD), exact, activation=site.activation)
    error = float((wanted_RD - _exact(y_RD)).norm() / wanted_RD.norm().clamp_min(1e-30))
    if error <= max(2e-3, 8 * _eps(y_RD)):
        return True
    refused.append(Refusal(site.name, f"its projections do more than multiply by their weights (relative error {error:.1g})"))
    return False


def _site(probe: Probe, candidate: _Candidate) -> FFNSite:
    wiring = candidate.wiring
    return FFNSite(
        name=candidate.host,
        up=wiring.up,
        down=wiring.down,
        gate=wiring.gate,
        fused=wiring.fused,
        activation=candidate.activation,
        d_model=probe.leaves[wiring.up].d_in,
        d_ff=probe.leaves[wiring.down].d_in,
        d_out=probe.leaves[wiring.down].d_out,
    )


def _refuse_heads(sites: list[FFNSite], watched: Trace, inputs: Mapping[str, Any], refused: list[Refusal]) -> list[FFNSite]:
    """Drop an FFN outside every stack of layers that sees one vector per sequence while others of its width see all tokens."""
    batch_size = next((t.shape[0] for t in inputs.values() if isinstance(t, Tensor) and t.dim()), 0)
    rows = {site.name: watched.calls[site.up].num_rows for site in sites}
    widest: dict[int, int] = defaultdict(int)
    stacks: dict[str, int] = defaultdict(int)
    for site in sites:
        widest[site.d_model] = max(widest[site.d_model], rows[site.name])
        stacks[_pattern(site.name)] += 1
    kept = []
    for site in sites:
        if rows[site.name] <= batch_size < widest[site.d_model] and stacks[_pattern(site.name)] == 1:
            refused.append(Refusal(site.name, "a pooling head: it sees one vector per sequence"))
        else:
            kept.append(site)
    return kept


# ---- pass 3: what the code between the projections makes of a stand-in


def _tell_widths(probe: Probe, watched: Trace, sites: list[FFNSite]) -> list[FFNSite]:
    if not sites or _runs_narrow(probe, watched, sites):
        return sites
    return [site if _runs_narrow(probe, watched, [site]) else replace(site, explicit_width=True) for site in sites]


def _runs_narrow(probe: Probe, watched: Trace, sites: Iterable[FFNSite]) -> bool:
    """Whether the model gives what it gave in pass 1 when these sites' neurons are stand-ins, and their outputs those of pass 1."""
    widths = {path: 2 if site.fused else 1 for site in sites for path in site.first}
    try:
        result = probe.run_narrow(widths, pins={site.down: watched.outputs[site.down] for site in sites})
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):  # how sizes that do not fit show in a model's own code
        return False
    return len(result) == len(watched.result) and all(_close(a, b) for a, b in zip(watched.result, result, strict=True))


# ---- pass 4: what was left over


def _left_over(probe: Probe, watched: Trace, proposed: list[_Wiring]) -> list[_Wiring]:
    """Pairs that widen and narrow again, called one after the other, and are no FFN: near misses, or attention."""
    leaves, order = probe.leaves, list(watched.calls)
    explained = {wiring.down for wiring in proposed}
    found = []
    for down, call in watched.calls.items():
        leaf = leaves[down]
        if down in explained or leaf.d_in <= leaf.d_out or leaf.channel_dim != -1 or call.y_RF is None:
            continue
        options = [
            w
            for w in _wirings(leaves, watched, down)
            if all(leaves[path].d_in == leaf.d_out for path in w.first) and _adjacent(leaves, order, w)
        ]
        found += [w for w in options if w.gate is not None][:1] or options[:1]
    hosts = [_host(probe.model, w) for w in (*proposed, *found)]
    return [w for w in found if not any(host != (own := _host(probe.model, w)) and _inside(host, own) for host in hosts)]


def _adjacent(leaves: Mapping[str, Leaf], order: list[str], wiring: _Wiring) -> bool:
    """Whether no other leaf is called between the wiring's; those of an adapter around one of them do not count."""
    ends = sorted(order.index(path) for path in wiring.leaves)
    around = {path.rpartition(".")[0] + "." for path in wiring.leaves if leaves[path].problem}
    between = set(order[ends[0] : ends[-1]]) - set(wiring.leaves)
    return not any(not path.startswith(tuple(around)) for path in between)


def _explain(probe: Probe, watched: Trace, misses: list[_Wiring]) -> Iterator[Refusal]:
    """Say what stands between the projections of each near miss; silent about attention and about leaves that do not feed each other."""
    if not misses:
        return
    moved = probe.run(
        edit={path: partial(_move_some, width=probe.leaves[wiring.down].d_in) for wiring in misses for path in wiring.first},
        pins={wiring.down: watched.outputs[wiring.down] for wiring in misses},
    )
    for wiring in misses:
        if reason := _reason(probe.leaves, wiring, watched, moved):
            yield Refusal(_host(probe.model, wiring) or wiring.down, reason)


def _reason(leaves: Mapping[str, Leaf], wiring: _Wiring, watched: Trace, moved: Trace) -> str | None:
    for path in wiring.leaves:
        if problem := leaves[path].problem:
            return f"'{path.rpartition('.')[2]}' {problem}"
    before, after = watched.calls[wiring.down], moved.calls[wiring.down]
    if not bool(torch.isfinite(before.x_RD).all()):
        return "non-finite activations in the probe forward"
    h_RF, new_RF = _exact(before.x_RD), _exact(after.x_RD)
    tokens, neurons = _moved(before.num_rows, h_RF)
    if _close(h_RF[tokens], new_RF[tokens]):
        return None
    if not _close(h_RF[~tokens], new_RF[~tokens]):
        readers = [path for path, call in watched.calls.items() if torch.equal(call.x_RD, watched.calls[wiring.up].x_RD)]
        return "tokens mix between its projections (a convolution or the like)" if readers == [wiring.up] else None
    if not _close(h_RF[:, ~neurons], new_RF[:, ~neurons]):
        return "its neurons are not independent: a norm, a top-k or the like works across them, between the projections"
    _, relative, name, _ = _nearest(wiring, moved, swap=True)
    return f"unknown activation, or one with parameters or multipliers; nearest is {name} (relative error {relative:.1g})"


# ---- values that passes 2 and 3 put in


def _wide_values(output: Tensor, seed: int) -> Tensor:
    """Half of the values uniform in [-12, 12] (beyond the kinks of relu6 and clipped gelu), half near zero where smooth functions bend."""
    random = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(output.dtype, torch.float32)
    wide = torch.rand(output.shape, generator=random) * 24 - 12
    near = torch.randn(output.shape, generator=random) * 1.5
    return torch.where(torch.rand(output.shape, generator=random) < 0.5, wide, near).to(output.device, dtype)


def _move_some(output: Tensor, seed: int, *, width: int) -> Tensor:
    """Every second neuron of every second token, moved; `_moved` finds them again."""
    random = torch.Generator().manual_seed(seed)
    step = (torch.rand(output.shape, generator=random) + 1).to(output.device, output.dtype)
    flat = step.view(-1, step.shape[-1])
    flat[1::2] = 0
    flat[:, torch.arange(flat.shape[1], device=flat.device) % width % 2 == 1] = 0
    return output + step


def _moved(num_rows: int, h_RF: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of the sampled tokens and of the neurons that `_move_some` moves."""
    even_rows = sampled_rows(num_rows) % 2 == 0
    return even_rows.to(h_RF.device), torch.arange(h_RF.shape[1], device=h_RF.device) % 2 == 0


# ---- tensors and paths


def _exact(x: Tensor | None) -> Tensor:
    assert x is not None
    return (x.cpu() if x.device.type == "mps" else x).double()


def _eps(x: Tensor | torch.dtype) -> float:
    """Unit in the last place, relative; never below fp32's: activations written in Python carry constants of that precision."""
    dtype = x.dtype if isinstance(x, Tensor) else x
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = _exact(a), _exact(b)
    return torch.equal(a, b) or float((a - b).norm()) <= _FORWARD_TOLERANCE * float(a.norm())


def _host(model: nn.Module, wiring: _Wiring) -> str:
    """Path of the innermost module that contains the wiring's leaves and can take a new child."""
    parts = [path.split(".")[:-1] for path in wiring.leaves]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    while common and isinstance(model.get_submodule(".".join(common)), _CONTAINERS):
        common.pop()
    return ".".join(common)


def _inside(path: str, block: str) -> bool:
    return not block or path == block or path.startswith(block + ".")


def _beside(path: str, block: str) -> bool:
    """Whether a module is part of a block and not of a layer in a stack inside it."""
    return _inside(path, block) and not any(part.isdigit() for part in _relative(path, block).split("."))


def _relative(path: str, host: str) -> str:
    return path.removeprefix(host + ".") if host else path


def _pattern(path: str) -> str:
    """A path with every index as '*': the same for all layers of a stack."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def _summary(refused: Iterable[Refusal]) -> str:
    """One line: each place with its reason, the layers of a stack together."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for refusal in refused:
        places[_pattern(refusal.path), _MEASURED.sub("", refusal.reason)].append(refusal.reason)
    return "; ".join(
        f"'{path}' ({len(why)} of them): {why[0]}" if len(why) > 1 else f"'{path}': {why[0]}" for (path, _), why in places.items()
    )
