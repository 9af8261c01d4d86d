"""Rotations of a dense model's hidden spaces after which the columns of its linear layers are as orthogonal as common rotations make them.

Letters: R sampled tokens, K input channels, N outputs, D width of the residual stream, C channels of the values of one attention.

What dropping input channels costs a layer, || W (x - m x) ||^2, is the sum of x_k^2 ||W[:, k]||^2 over the dropped ones, WINA's score,
where W's columns are orthogonal. Two spaces of a Transformer can be rotated without a trace outside of them and without a new matrix:

- *Residual stream* of a model of RMS norms: rms(Q x) = rms(x), so with the norms' gains moved into the layers that read them everything
  that reads becomes W diag(g) Q^T, everything that writes Q W and Q b, embeddings E Q^T. Q holds the eigenvectors of the sum of the
  readers' Gram matrices, each over its trace, for all of them read the one stream.
- *Values* of each key-value head: attention mixes tokens, not channels, so v becomes R v, and o's columns of all query heads that read it
  W R^T; R holds the eigenvectors of the sum of their Gram matrices.

Neurons of FFNs cannot be rotated: they pass a nonlinear function. Which layer reads and writes what is watched, not looked up by name;
whoever calls `rotate` compares the model's output before and after (`moeify.sparsity.transform`).

Source: the rotation of the residual stream is that of SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024, section 3.2), the aim that of WINA
(Chen et al. 2025, arXiv:2505.19427), whose code rotates each layer by itself and adds a matrix to every residual connection.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..sites import LinearSite, linear_weight
from ..sites.probe import Leaf, Probe, Trace, eval_mode, linear_leaves, row_keys
from ..sites.site import is_transposed

_log = logging.getLogger(__name__)

_AWAY = "use transform='none'"
_CONSTANT = 1e-6
"""Relative spread below which a norm's gains are one number, which commutes with a rotation."""


@dataclass
class _Norm:
    """A module that scales each token to unit root mean square, and its channels by gains."""

    name: str
    module: nn.Module
    tokens: Tensor
    """Keys of the rows that it gave."""
    gain_D: Tensor
    unit: float
    """What its parameter holds where the gain is 1: 1, or 0 where the gain is 1 + w."""
    readers: list[str] = field(default_factory=list)

    @property
    def is_constant(self) -> bool:
        return float(self.gain_D.max() - self.gain_D.min()) <= _CONSTANT * float(self.gain_D.abs().max())


@torch.no_grad()
def rotate(model: nn.Module, example_inputs: Mapping[str, Any], sites: Sequence[LinearSite]) -> None:
    """Rotate residual stream and values, in place. A tied head is untied where the final norm's gains move into it.

    Parameters get new data and keep their identity, but for an untied head's.

    Args:
        model: dense model, weights floating, best in fp32.
        example_inputs: keyword arguments of one forward, a few tokens, in which every part of the model runs.
        sites: all of `find_linear_sites`, whatever their role.

    Raises:
        UnsupportedModelError: no token embedding, a part that did not run, a norm that is no RMS norm or whose gains cannot move into
            linear layers, or a layer that reads or writes something else than the stream.

    Cost: three forwards, and the eigenvectors of one D x D matrix in fp64.
    """
    probe = Probe(model, example_inputs, linear_leaves(model))
    with eval_mode(model):
        watched, norms, embeddings, width = _watch(probe)
        values = _find_values(probe, sites)
    _check(probe, watched, sites, norms, embeddings, width)
    untied = _fold(model, probe.leaves, norms, embeddings)
    readers = [model.get_submodule(site.name) for site in sites if site.role in ("attn_in", "ffn_in")]
    q_DD = _directions(_gram(linear) for linear in readers)
    writers = [model.get_submodule(site.name) for site in sites if site.role in ("attn_out", "ffn_hidden")]
    _rotate_stream(model, norms, embeddings, writers, q_DD)
    for linear_v, linear_o, heads in values:
        _rotate_values(model.get_submodule(linear_v), model.get_submodule(linear_o), heads)
    attentions = sum(site.role == "attn_out" for site in sites)
    _log.info(
        "rotated the residual stream (width %d) and the values of %d of %d attentions%s",
        width,
        len(values),
        attentions,
        "; the head, tied to the embeddings before, is a matrix of its own now" if untied else "",
    )


# -- what reads and writes the stream


def _watch(probe: Probe) -> tuple[Trace, list[_Norm], list[nn.Embedding], int]:
    """One forward: its linear layers, the norms in order, the embeddings, and the width of the stream."""
    model = probe.model
    first = cast(Any, model).get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(first, nn.Embedding):
        raise UnsupportedModelError(f"{type(model).__name__} has no token embedding whose output could be rotated; {_AWAY}.")
    width, given, ran = first.embedding_dim, dict[str, Tensor](), set[nn.Module]()

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ran.add(module)
        if name not in given and module not in linear and _is_norm(module, width) and len(args) == 1 and isinstance(output, Tensor):
            given[name] = row_keys(output.flatten(0, -2))

    linear = {leaf.module for leaf in probe.leaves.values()}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if any(p is not None for p in module._parameters.values()):
                stack.callback(module.register_forward_hook(partial(note, name)).remove)
        watched = probe.run()
    used = {p for module in ran for p in module._parameters.values()}  # a table of embeddings may hang at two places, and run at one
    for name, module in model.named_modules():
        if any(p is not None and p not in used for p in module._parameters.values()):
            raise UnsupportedModelError(
                f"'{name}' did not run on the example, so nothing shows what a rotation has to change there; {_AWAY}."
            )
    norms = [_norm(name, model.get_submodule(name), tokens) for name, tokens in given.items()]
    for path, call in watched.calls.items():
        leaf = probe.leaves[path]
        if leaf.d_in == width and leaf.channel_dim == -1:
            source = next((n for n in reversed(norms) if bool(torch.isin(call.tokens, n.tokens).all())), None)
            if source is not None:
                source.readers.append(path)
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.embedding_dim == width]
    return watched, norms, embeddings, width


def _is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module's own parameters are vectors of the stream's width, ``weight`` among them, as those of norms are."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    return "weight" in own and all(p.shape == (width,) for p in own.values())


def _norm(name: str, module: nn.Module, tokens: Tensor) -> _Norm:
    """The gains of a norm, from what it makes of random numbers.

    Raises:
        UnsupportedModelError: it is no RMS norm.
    """
    weight_D = cast(Tensor, module.weight).detach()
    x_RD = torch.randn(8, len(weight_D), generator=torch.Generator().manual_seed(0)).to(weight_D) * 1e3  # its epsilon is nothing beside
    y_RD = module(x_RD).double()
    unit_RD = x_RD.double() / x_RD.double().square().mean(1, keepdim=True).sqrt()
    for unit in (1.0, 0.0):
        gain_D = weight_D.double() + (1 - unit)
        if float((y_RD - unit_RD * gain_D).norm()) <= 1e-4 * float(y_RD.norm()):
            return _Norm(name, module, tokens, gain_D, unit)
    centred_RD = unit_RD - unit_RD.mean(1, keepdim=True)
    shift_D = module._parameters.get("bias")
    centred_RD = centred_RD / centred_RD.square().mean(1, keepdim=True).sqrt() * weight_D + (0 if shift_D is None else shift_D)
    if float((y_RD - centred_RD).norm()) <= 1e-4 * float(y_RD.norm()):
        what = "subtracts the mean of the channels (LayerNorm), which a rotation changes"
    else:
        what = "is no RMS norm with one gain for each channel"
    raise UnsupportedModelError(f"'{name}' {what}; {_AWAY}.")


def _check(
    probe: Probe, watched: Trace, sites: Sequence[LinearSite], norms: Sequence[_Norm], embeddings: Sequence[nn.Embedding], width: int
) -> None:
    """Refuse what a rotation cannot pass, before anything is changed."""
    read = {path for norm in norms for path in norm.readers}
    for norm in norms:
        if not norm.readers and not norm.is_constant:
            raise UnsupportedModelError(f"no linear layer reads '{norm.name}' directly, so its gains cannot move into weights; {_AWAY}.")
    for site in sites:
        if site.role in ("attn_in", "ffn_in") and site.name not in read:
            raise UnsupportedModelError(f"'{site.name}' does not read the residual stream through an RMS norm; {_AWAY}.")
        if site.role in ("attn_out", "ffn_hidden") and site.d_out != width:
            raise UnsupportedModelError(f"'{site.name}' writes width {site.d_out}, the residual stream has {width}; {_AWAY}.")
    owners = defaultdict(set)
    for path, leaf in probe.leaves.items():
        for parameter in leaf.module.parameters(recurse=False):
            owners[parameter].add(path)
    tied = {embedding.weight for embedding in embeddings}
    for path in [*read, *(site.name for site in sites)]:
        leaf = probe.leaves[path]
        if leaf.problem:
            raise UnsupportedModelError(f"'{path}' {leaf.problem}; its weights cannot be rotated. Merge or remove it first.")
        if any(len(owners[p]) > 1 or (p in tied and path not in read) for p in leaf.module.parameters(recurse=False)):
            raise UnsupportedModelError(f"'{path}' shares its weight with another layer, which reads or writes something else; {_AWAY}.")


def _fold(model: nn.Module, leaves: Mapping[str, Leaf], norms: Sequence[_Norm], embeddings: Sequence[nn.Embedding]) -> bool:
    """Move the norms' gains into the layers that read them; True where a tied head had to become a matrix of its own.

    Gains that are one number commute with a rotation and stay.
    """
    untied = False
    for norm in norms:
        if norm.is_constant:
            continue
        for path in norm.readers:
            linear = leaves[path].module
            if any(linear.weight is embedding.weight for embedding in embeddings):
                _untie(model, path, linear)
                untied = True
            _set_weight(linear, _exact(linear_weight(linear)) * _exact(norm.gain_D))
        weight_D = cast(nn.Parameter, norm.module.weight)
        weight_D.data = torch.full_like(weight_D, norm.unit)
    return untied


def _untie(model: nn.Module, path: str, head: nn.Module) -> None:
    """Give a head a weight of its own, and have the config say so, by which transformers ties again when it loads."""
    head.weight = nn.Parameter(cast(Tensor, head.weight).detach().clone(), requires_grad=cast(Tensor, head.weight).requires_grad)
    for config in tying_configs(model):
        config.tie_word_embeddings = False
    if isinstance(tied := getattr(model, "all_tied_weights_keys", None), dict):
        cast(Any, model).all_tied_weights_keys = {key: source for key, source in tied.items() if key != f"{path}.weight"}


def tying_configs(model: nn.Module) -> list[Any]:
    """The configs of a model that say whether its head is tied: its own, and that of its text part."""
    config, text = getattr(model, "config", None), _text_config(model)
    return [c for c in ((config,) if text is config else (config, text)) if hasattr(c, "tie_word_embeddings")]


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _rotate_stream(
    model: nn.Module, norms: Sequence[_Norm], embeddings: Sequence[nn.Embedding], writers: Sequence[nn.Module], q_DD: Tensor
) -> None:
    done = set()
    for weight in (embedding.weight for embedding in embeddings):
        if weight not in done:
            weight.data = _like(_exact(weight) @ q_DD.t().to(weight.device), weight)
            done.add(weight)
    for linear in (model.get_submodule(path) for norm in norms for path in norm.readers):
        if linear.weight not in done:  # a head that is still tied
            weight_ND = _exact(linear_weight(linear))
            _set_weight(linear, weight_ND @ q_DD.t().to(weight_ND.device))
    for linear in writers:
        weight_DK = _exact(linear_weight(linear))
        _set_weight(linear, q_DD.to(weight_DK.device) @ weight_DK)
        if (bias_D := linear._parameters.get("bias")) is not None:
            bias_D.data = _like(q_DD.to(weight_DK.device) @ _exact(bias_D), bias_D)


# -- values


def _find_values(probe: Probe, sites: Sequence[LinearSite]) -> list[tuple[str, str, list[tuple[list[int], list[int]]]]]:
    """(v, o, heads) of every attention that only mixes the tokens of its values; a head is (channels of o's input, channels of v it reads).

    Two driven forwards. Attention weights add up to 1: where all tokens have the same values, o reads those, and which number arrives at a
    channel says where it came from. Where all channels of a token have the same value, o's channels of one head read the same, and others
    something else. What does not behave so (values fused with queries, normed, gated) is left out, for its values are not rotated.
    """
    first: dict[str, tuple[str, int]] = {}
    codes: dict[str, Tensor] = {}
    ends: dict[str, int] = defaultdict(lambda: 1)
    for site in sites:
        if site.role == "attn_in":
            start = ends[site.block]
            ends[site.block] = start + site.d_out
            code = torch.arange(start, start + site.d_out, dtype=torch.float32)
            codes[site.name] = torch.where(code % 2 == 0, code, -code)  # of both signs, so that no ReLU passes for the identity
            first[site.name] = site.block, start
    driven = probe.run(edit={name: partial(_everywhere, code) for name, code in codes.items()}).calls
    found = []
    for site in sites:
        if site.role != "attn_out" or site.name not in driven:
            continue
        x_RK = driven[site.name].x_RD.double().cpu()
        signed_K = x_RK[0].round()
        if not bool(((x_RK - signed_K).abs() < 0.25).all()):
            continue
        for name, (block, start) in first.items():
            source_K = signed_K.abs().long() - start
            inside = block == site.block and bool(((source_K >= 0) & (source_K < len(codes[name]))).all())
            if inside and bool((signed_K == codes[name][source_K]).all()):
                found.append((name, site.name, source_K.tolist()))
    patterns = probe.run(edit={name: _each_token for name, _, _ in found}).calls
    values = []
    for name_v, name_o, source in found:
        heads = _heads(patterns[name_o].x_RD.double().cpu(), source)
        expected = getattr(_text_config(probe.model), "num_attention_heads", len(heads))
        if len(heads) == expected and _is_partition([channels for _, channels in heads], len(codes[name_v])):
            values.append((name_v, name_o, heads))
    return values


def _everywhere(code_N: Tensor, output: Tensor, _seed: int) -> Tensor:
    return code_N.to(output).expand_as(output)


def _each_token(output: Tensor, _seed: int) -> Tensor:
    random = torch.rand(output.shape[:-1], generator=torch.Generator().manual_seed(0))
    return random[..., None].to(output).expand_as(output)


def _heads(x_RK: Tensor, source: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Neighbouring channels that read the same, each with where it comes from."""
    changes = (x_RK[:, 1:] - x_RK[:, :-1]).abs().max(0).values > 1e-5
    starts = [0, *(changes.nonzero().flatten() + 1).tolist(), x_RK.shape[1]]
    return [(list(range(a, b)), list(source[a:b])) for a, b in zip(starts, starts[1:], strict=False)]


def _is_partition(groups: Iterable[Sequence[int]], size: int) -> bool:
    """Whether the groups are of one size, equal or disjoint, and make up 0 ... size - 1."""
    distinct = {tuple(group) for group in groups}
    return sorted(i for group in distinct for i in group) == list(range(size)) and len({len(group) for group in distinct}) == 1


def _rotate_values(linear_v: nn.Module, linear_o: nn.Module, heads: Sequence[tuple[list[int], list[int]]]) -> None:
    readers: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for channels_o, channels_v in heads:
        readers[tuple(channels_v)].append(channels_o)
    weight_CK, weight_DK = _exact(linear_weight(linear_v)).clone(), _exact(linear_weight(linear_o)).clone()
    bias = linear_v._parameters.get("bias")
    bias_C = None if bias is None else _exact(bias).clone()
    for values, of_heads in readers.items():
        rows = list(values)
        r = _directions(weight_DK[:, columns].t() @ weight_DK[:, columns] for columns in of_heads)
        weight_CK[rows] = r.to(weight_CK.device) @ weight_CK[rows]
        if bias_C is not None:
            bias_C[rows] = r.to(bias_C.device) @ bias_C[rows]
        for columns in of_heads:
            weight_DK[:, columns] = weight_DK[:, columns] @ r.t()
    _set_weight(linear_v, weight_CK)
    _set_weight(linear_o, weight_DK)
    if bias is not None and bias_C is not None:
        bias.data = _like(bias_C, bias)


# -- matrices


def _gram(linear: nn.Module) -> Tensor:
    """W^T W over its trace."""
    weight_NK = _exact(linear_weight(linear))
    gram_KK = weight_NK.t() @ weight_NK
    return gram_KK / gram_KK.trace().clamp_min(torch.finfo(torch.float64).tiny)


def _directions(grams: Iterable[Tensor]) -> Tensor:
    """Rows are the eigenvectors of the sum of some symmetric matrices, the largest eigenvalue first."""
    total: Tensor | None = None
    for gram in grams:
        total = gram if total is None else total + gram.to(total.device)
    if total is None or not math.isfinite(float(total.sum())):
        raise UnsupportedModelError("the weights hold NaN or infinity; they cannot be rotated.")
    vectors: Tensor = torch.linalg.eigh(total).eigenvectors
    return vectors.flip(1).t().contiguous()


def _exact(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()


def _like(exact: Tensor, parameter: Tensor) -> Tensor:
    return exact.to(parameter.device, parameter.dtype).contiguous()


def _set_weight(linear: nn.Module, weight_NK: Tensor) -> None:
    weight = cast(nn.Parameter, linear.weight)
    weight.data = _like(weight_NK.t() if is_transposed(linear) else weight_NK, weight)
