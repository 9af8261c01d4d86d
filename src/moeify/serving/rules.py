"""Which rules run for whose tokens, where requests of one model name different presets.

Letters: T tokens of one forward.

One request at a time (`PresetRules.apply`): its rules are put in place before it runs, on the thread that runs the model. Many in one
packed batch (`PresetRules.apply_batch`): where all have the same preset likewise, else every token gets its request's rules
(`moeify.select.PerToken`). Nothing is copied, and rules read one token at a time, so what a request gets does not depend on who is served
beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..channels import SparseInput, sparse_inputs
from ..layers import MoEFFN, moe_layers
from ..select import PerToken, Rule, Selection


class PresetRules:
    """The rules of every layer of one model, by preset.

    Not for several threads at once: whoever runs the model sets its rules.

    Args:
        model: converted, thinned or dense model; of a dense one there is nothing to choose.
        presets: preset's name -> layer's name -> rule; layers that a preset does not name keep the rule that they have.
    """

    def __init__(self, model: nn.Module, presets: Mapping[str, Mapping[str, Rule]]) -> None:
        self._layers: dict[str, MoEFFN | SparseInput] = {**sparse_inputs(model), **moe_layers(model)}
        self._own = {name: layer.rule for name, layer in self._layers.items()}
        self._rules = {preset: {**self._own, **named} for preset, named in presets.items()}
        self._current: str | None = None
        self._has_starts = any(layer.first_dense for layer in self._layers.values() if isinstance(layer, SparseInput))

    @property
    def depend_on_batch(self) -> bool:
        """Whether a packed batch must be looked at before it runs: for presets, or for tokens at the start of a sequence."""
        return bool(self._layers) and (len(self._rules) > 1 or self._has_starts)

    def apply(self, name: str) -> None:
        """Put the rules of one preset in place."""
        if self._current != name:
            self._put(self._rules[name].__getitem__)
            self._current = name

    def apply_batch(self, requests: Sequence[tuple[str, int]], positions_T: Tensor) -> None:
        """Put the rules in place for one forward of packed requests.

        Args:
            requests: (preset, tokens) of each, in the batch's order. Tokens of the batch behind them are padding.
            positions_T: position of each token in its own sequence.
        """
        used = list(dict.fromkeys(preset for preset, _ in requests))
        if len(used) == 1:
            self.apply(used[0])
        elif used:
            choices = [used.index(preset) for preset, tokens in requests for _ in range(tokens)]
            choices += [0] * (len(positions_T) - len(choices))
            choice_T = torch.tensor(choices, device=positions_T.device)
            mixes: dict[tuple[Rule, ...], PerToken] = {}  # layers whose rules are alike share one, and its search for rows

            def mixed(layer: str) -> Selection:
                rules = tuple(self._rules[preset][layer] for preset in used)
                if rules not in mixes:
                    mixes[rules] = PerToken(rules, choice_T)
                return rules[0] if len(set(rules)) == 1 else mixes[rules]

            self._put(mixed)
            self._current = None
        if self._has_starts:
            starts: dict[int, Tensor] = {}
            for layer in self._layers.values():
                if isinstance(layer, SparseInput) and layer.first_dense:
                    if layer.first_dense not in starts:
                        start_T = positions_T < layer.first_dense
                        starts[layer.first_dense] = start_T if bool(start_T.any()) else start_T[:0]
                    layer.start_T = starts[layer.first_dense]

    def restore(self) -> None:
        """Leave the model as it was."""
        self._put(self._own.__getitem__)
        self._current = None
        for layer in self._layers.values():
            if isinstance(layer, SparseInput):
                layer.start_T = None

    def _put(self, rule_of: Callable[[str], Selection]) -> None:
        for name, layer in self._layers.items():
            layer.rule = cast(Rule, rule_of(name))  # forwards ask no more of it, and nobody else sees it
