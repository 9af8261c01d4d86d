"""How the tokens of a request are drawn: from its own seed, or as everybody's where requests share forwards.

One request at a time: its seed is set on the thread that runs the model, for its tokens alone; the numbers of others go on as if it had not
been there. transformers would set it for the whole process as soon as a request arrives, in the middle of another's text.

Packed batches: transformers draws the tokens of all requests by one configuration, that of whichever request came first, from one stream of
random numbers. Here it is the server's own, so that what a request gets does not depend on who was there before it, and requests that ask
for another are refused.
"""

import contextvars
import copy
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError

SEED: contextvars.ContextVar[int | None] = contextvars.ContextVar("moeify_seed", default=None)
"""Of the request in whose task it is asked."""

_SEEDS = range(-(2**63), 2**64)  # what torch takes
_NEW_TOKENS = 1024  # of requests that say nothing, as in transformers
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""What greedy decoding does not read."""
_OF_REQUESTS = ("max_new_tokens", "eos_token_id")
"""What every request of a packed batch has for itself."""
_WITHOUT_EFFECT = (
    *_OF_REQUESTS,
    *("pad_token_id", "bos_token_id", "use_cache", "cache_implementation", "transformers_version", "early_stopping", "length_penalty"),
)
_FIELDS = {
    "do_sample": "temperature",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop_strings": "stop",
    "repetition_penalty": "frequency_penalty",
    "sequence_bias": "logit_bias",
}
"""A generation config's name -> the field of a request that sets it."""


def take_seed(body: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """A request without its seed, and the seed.

    Raises:
        ConfigError: it is no whole number that torch takes.
    """
    seed = body.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed not in _SEEDS):
        raise ConfigError(f"seed must be a whole number from -2^63 to 2^64 - 1, got {str(seed)[:100]!r}.")
    return {key: value for key, value in body.items() if key != "seed"}, seed


def set_sampling(config: Any, *, temperature: float | None, top_p: float | None) -> None:
    """Put a server's options into its model's generation config; None leaves what the checkpoint says."""
    if temperature is not None:
        config.do_sample = temperature > 0
        config.temperature = temperature or None
    if top_p is not None:
        config.top_p = top_p


class PackedSampling:
    """The one way in which packed batches draw tokens.

    Args:
        own: generation config of the served model; what it leaves open is as `generate` has it.
    """

    def __init__(self, own: Any) -> None:
        self._config = copy.deepcopy(own)
        self._config.update(**own._get_default_generation_params(), defaults_only=True)
        self._config.use_cache = False  # packed batches have one of their own
        self._values = _values(self._config)

    def of_request(self, asked: Any, body: Mapping[str, Any]) -> Any:
        """The generation config by which a request runs: the server's, with the request's length and ends of text.

        Args:
            asked: generation config as the request wants it.
            body: the request, which names its fields.

        Raises:
            ConfigError: the request asks to be drawn in another way; names the field. Or it has a seed and tokens are sampled.
        """
        mine, wanted = dict(self._values), {**self._values, **_values(asked)}
        if body.get("temperature"):  # whoever gives one wants sampling, which for transformers is another field
            wanted["do_sample"] = True
        if not (mine["do_sample"] or wanted["do_sample"]):
            mine, wanted = ({k: v for k, v in side.items() if k not in _OF_SAMPLING} for side in (mine, wanted))
        for name, value in wanted.items():
            if value != mine.get(name):
                field = _FIELDS.get(name, name)
                field = field if body.get(field) is not None else f"generation_config's {name}"
                raise ConfigError(
                    f"{field}: requests that share forwards are all drawn alike, with {name} {mine.get(name)!r:.60} here, not "
                    f"{value!r:.60}; leave it out, or ask a server with another --temperature or --top-p, or without continuous batching."
                )
        if mine["do_sample"] and SEED.get() is not None:
            raise ConfigError("seed: requests that share forwards share their random numbers; ask a server without continuous batching.")
        config = copy.deepcopy(self._config)
        for name in _OF_REQUESTS:
            if getattr(asked, name) is not None:
                setattr(config, name, getattr(asked, name))
        config.max_new_tokens = config.max_new_tokens or _NEW_TOKENS
        return config


def drawn(build_config: Callable[..., Any], packed: PackedSampling, *, refuse: Any) -> Callable[..., Any]:
    """A handler's ``_build_generation_config``, with packed requests drawn alike.

    Args:
        build_config: the handler's own; makes a generation config from (body, model's config, use_cb=).
        packed: how tokens of packed batches are drawn.
        refuse: FastAPI's HTTPException, for what a request may not ask for and what nobody can read.
    """

    def of_request(body: dict[str, Any], own: Any, use_cb: bool = False) -> Any:
        try:
            asked = build_config(body, own, use_cb=use_cb)
            return packed.of_request(asked, body) if use_cb else asked
        except ConfigError as error:
            raise refuse(status_code=400, detail=str(error)) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise refuse(status_code=400, detail=f"options of generation cannot be read: {str(error)[:300]}") from error

    return of_request


def _values(config: Any) -> dict[str, Any]:
    """What decides how tokens are drawn and when a text ends, where it is set."""
    found = {k: v for k, v in config.to_dict().items() if v is not None and k not in _WITHOUT_EFFECT and not k.startswith("_")}
    if not found.get("do_sample", True):
        found.pop("temperature", None)  # 0, which is how a request says so
    return found
