"""``transformers serve`` in this process, for one converted model whose presets requests may name.

transformers builds the server: model, handlers, routes. What is ours is put around them:

    loading          is `load_model`'s, with all its checks, and the model is handed over
    handle_request   reads the preset off the request, gives the request an id that begins with it
    one at a time    the thread that runs the model puts the preset's rules in place before each request
    packed batches   a hook before the model's forward reads off the requests' ids which tokens are whose
    sampling         a request's seed is set on that thread; packed batches draw all tokens by the server's options
    /v1/models       this model and its presets
    routes           those of `_ROUTES` alone are left; the rest answer 403: whoever may ask may not choose what is loaded

Presets must not disturb each other where requests share more than a forward, either: keys and values are made under a preset's rules, so
packed batches share no prefixes where there are several presets, and no CUDA graph, which holds the rules' numbers.
"""

import contextlib
import contextvars
import inspect
import ipaddress
import os
import signal
import socket
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from .. import _config
from .._config import did_you_mean
from .._random import seeded
from ..errors import CheckpointError, ConfigError, MoeifyError
from ..hf.load import load_model, model_class
from ..pipeline.names import torch_device, torch_dtype
from ..presets import RESERVED
from ..presets import presets as presets_of
from ..select import Rule
from .config import ServeConfig
from .rules import PresetRules
from .sampling import SEED, PackedSampling, drawn, set_sampling, take_seed

_HEADER = "x-moeify-preset"
_HANDLERS = ("_chat_handler", "_completion_handler", "_response_handler", "_systemone_handler")
_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/systemone", "/health")
"""Of transformers, and left open: each is of one of `_HANDLERS`, which are told the model, or reads nothing from the request."""
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_GRACE_S = 10
"""Seconds that requests in flight have to finish after a signal."""
_PRESET: contextvars.ContextVar[str | None] = contextvars.ContextVar("moeify_preset", default=None)


@dataclass(kw_only=True)
class Served:
    """A server that was built and does not listen yet."""

    app: Any
    """The ASGI application (FastAPI)."""
    names: tuple[str, ...]
    """What requests may call the model."""
    presets: tuple[str, ...]
    """What presets they may name, the default first."""
    stop: Callable[[], None] = field(repr=False)
    """End what runs in the background; forwards in flight end at their next token."""


def build(directory: str | os.PathLike[str], config: ServeConfig, *, device: str = "cpu", dtype: str = "auto") -> Served:
    """Load a checkpoint into the server of transformers, presets around it; nothing listens yet.

    Args:
        directory: checkpoint of a language model with its tokenizer: converted, thinned or dense.
        config: see its fields; host and port are not used.
        device: "cpu", "cuda" or "cuda:1".
        dtype: of the weights; "auto" as the checkpoint has them.

    Raises:
        CheckpointError: nothing that can be served is there; as `moeify.load_model`.
        ConfigError: a preset that the checkpoint has not, an unknown device or type.
        MoeifyError: packages are missing, or this transformers serves in a way that is not known here.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"'{directory}' is not a folder; give the folder of a checkpoint.")
    if "@" in str(path) or str(path).endswith(".gguf"):
        raise CheckpointError(f"'{directory}': the server reads '@' in a name as a revision; rename the folder.")
    cls = model_class(path)
    if not (hasattr(cls, "can_generate") and cls.can_generate()):
        raise CheckpointError(f"'{directory}' holds a {cls.__name__}, which generates no text; serve a language model.")
    place = torch_device(device)
    kind: Any = "auto" if dtype == "auto" else torch_dtype(dtype)
    serve_class = _serve_class()
    options = {key: value for key, value in vars(config).items() if key.startswith("cb_")}
    model, processor = load_model(path, dtype=kind)  # not the server's own loading, which fills what is missing with random numbers
    if processor is None:
        raise CheckpointError(f"'{directory}' cannot be served: it has no tokenizer; save one in that folder.")
    try:
        serve = serve_class(
            force_model=None,
            continuous_batching=config.continuous_batching,
            device=device,
            dtype=dtype,
            log_level="error",
            non_blocking=True,
            **options,
        )
        _hand_over(serve._model_manager, str(path), model.to(place), processor)
    except MoeifyError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError) as error:
        raise CheckpointError(f"'{directory}' cannot be served: {' '.join(str(error).split())[:300]}") from error
    return _with_presets(serve, path, config)


def _hand_over(manager: Any, name: str, model: Any, processor: Any) -> None:
    """Make a loaded model the one that transformers' manager of models knows, for good."""
    import transformers

    needed = ("_load_model", "_load_processor", "load_model_and_processor", "process_model_name", "model_timeout")
    if lacks := next((attribute for attribute in needed if not hasattr(manager, attribute)), None):
        raise MoeifyError(_unknown_version(transformers.__version__, f"ModelManager.{lacks}"))
    manager.force_model, manager.model_timeout = name, -1
    manager._load_model, manager._load_processor = (lambda *_, **__: model), (lambda *_, **__: processor)
    manager.load_model_and_processor(manager.process_model_name(name))


def serve(
    directory: str | os.PathLike[str],
    config: ServeConfig,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    say: Callable[[str], object] = print,
) -> int:
    """Serve a checkpoint until SIGTERM or Ctrl-C; requests in flight have some seconds to finish.

    Args:
        directory, config, device, dtype: as in `build`.
        say: told where the server listens, and what it does not protect.

    Returns:
        The signal that ended it; 0 where none did.

    Raises:
        MoeifyError: as in `build`, or the address cannot be listened on.
    """
    with _listening(config.host, config.port) as listener:  # before the model is loaded: a port in use is found at once
        if not is_loopback(config.host):
            say(
                f"warning: {config.host} can be reached from other machines, and nothing here protects the server: no authentication, no "
                "TLS, no rate limits, no limit on the length of answers; put a proxy that has them in front."
            )
        served = build(directory, config, device=device, dtype=dtype)
        import uvicorn

        host, port = listener.getsockname()[:2]
        if is_loopback(config.host):
            served.app.add_middleware(_LoopbackHosts)
        bracketed = f"[{host}]" if ":" in host else host
        settings = uvicorn.Config(
            served.app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_S
        )
        listener.listen(128)  # so that whoever reads the line can connect
        say(f"serving {served.names[0]} at http://{bracketed}:{port}/v1; presets: {', '.join(served.presets)}.")
        with _caught_signals() as caught:
            try:
                uvicorn.Server(settings).run(sockets=[listener])
            finally:
                served.stop()
    return caught[0] if caught else 0


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host.lower() == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


# -- what is put around transformers' server -----------------------------------------------------------------------------------------


def _serve_class() -> type[Any]:
    """transformers' own server, built but not started.

    Raises:
        MoeifyError: the extra is missing, or this version has not what is needed.
    """
    import transformers

    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
        from transformers.cli.serve import Serve
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise MoeifyError(f"serving needs more packages ({error}); pip install 'moeify[serve]'.") from error
    if not is_serve_available():
        raise MoeifyError("serving needs more packages (transformers finds some of its own missing); pip install 'moeify[serve]'.")
    parameters = inspect.signature(Serve).parameters
    wanted = ("force_model", "continuous_batching", "device", "dtype", "log_level", "non_blocking", "cb_block_size", "cb_num_blocks")
    lacks = [f"Serve({name}=)" for name in wanted if name not in parameters] + ["Serve.start_server"] * (not hasattr(Serve, "start_server"))
    if lacks:
        raise MoeifyError(_unknown_version(transformers.__version__, lacks[0]))

    class Built(Serve):
        def start_server(self) -> None:
            """Not yet."""

    return Built


def _unknown_version(version: str, lacks: str) -> str:
    return f"transformers {version} serves in a way that moeify does not know (no {lacks}); install one from 5.17 to 5.23."


def _with_presets(serve: Any, path: Path, config: ServeConfig) -> Served:
    import transformers
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse
    from transformers.cli.serving.utils import GenerateManager

    needed = {"_model_manager": serve, "_generation_state": serve, "server": serve} | dict.fromkeys(_HANDLERS[:2], serve)
    if lacks := next((name for name, owner in needed.items() if not hasattr(owner, name)), None):
        raise MoeifyError(_unknown_version(transformers.__version__, lacks))
    manager, state, app = serve._model_manager, serve._generation_state, serve.server.config.app
    private = [("get_manager", state), ("_cb_config", state), ("loaded_models", manager), ("router", app)]
    private += [("_build_generation_config", serve._chat_handler), ("_get_default_generation_params", transformers.GenerationConfig)]
    for name, owner in private:
        if not hasattr(owner, name):
            raise MoeifyError(_unknown_version(transformers.__version__, f"{type(owner).__name__}.{name}"))

    model = next(iter(manager.loaded_models.values())).model
    stored: dict[str, Mapping[str, Rule]] = {RESERVED: {}}  # what the checkpoint was saved with
    stored |= {name: preset.rules for name, preset in presets_of(model).items()}
    chosen = {name: _config.lookup(stored, name, where="presets") for name in config.presets} or stored
    default = next(iter(chosen))
    rules = PresetRules(model, chosen)
    runner = _Runner(model, rules, state, default)
    set_sampling(model.generation_config, temperature=config.temperature, top_p=config.top_p)
    packed_sampling = PackedSampling(model.generation_config)

    class PresetManager(GenerateManager):
        """Runs one request at a time, each under its preset's rules: the one thread that runs the model sets them."""

        def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return super().submit(runner.under_preset(fn), *args, **kwargs)

        def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return super().async_submit(runner.under_preset(fn), *args, **kwargs)

    options: dict[str, Any] = {}
    if config.continuous_batching and rules.depend_on_batch:
        options = {"allow_block_sharing": False, "use_async_batching": False, "use_cuda_graph": False}
    if config.continuous_batching and model.device.type == "cpu" and config.cb_num_blocks is None:
        options |= {"block_size": config.cb_block_size or 32, "max_batch_tokens": config.cb_max_batch_tokens or 256}
        options["num_blocks"] = max(1, _cpu_cache_tokens(model) // options["block_size"])
    if options:
        state._cb_config = _cb_config(state._cb_config, options)
    original = state.get_manager
    sequential: dict[str, Any] = {}

    def get_manager(model_id: str, use_cb: bool = False) -> Any:
        if use_cb:
            return original(model_id, use_cb=True)
        if model_id not in sequential:
            sequential[model_id] = PresetManager()
        return sequential[model_id]

    state.get_manager = get_manager
    # Two folders of one name are told apart by the path, which the server knows it by, too.
    names = tuple(dict.fromkeys((path.resolve().name, str(path))))

    def choose(body: Mapping[str, Any]) -> tuple[dict[str, Any], str, int | None]:
        try:
            preset = requested_preset(body, names=names, presets=tuple(chosen), default=default)
            body, seed = take_seed(body)
        except ConfigError as error:
            raise HTTPException(status_code=400, detail=str(error)) from error
        return {**{k: v for k, v in body.items() if k != "moeify_preset"}, "model": str(path)}, preset, seed

    for name in _HANDLERS:
        if (handler := getattr(serve, name, None)) is not None:
            packs = config.continuous_batching and name == "_systemone_handler"
            handler.handle_request = _handle(handler.handle_request, choose, refuse=HTTPException if packs else None)
            handler._build_generation_config = drawn(handler._build_generation_config, packed_sampling, refuse=HTTPException)

    created = int(path.stat().st_mtime)
    served = [names[0], *(f"{names[0]}@{preset}" for preset in chosen)]

    def list_models() -> Any:
        """This model, alone and with each preset."""
        data = [{"id": name, "object": "model", "created": created, "owned_by": "moeify"} for name in served]
        return JSONResponse({"object": "list", "data": data})

    def closed() -> Any:
        """What would load another model, or unload this one for everybody."""
        return JSONResponse({"detail": "this server serves one model; start another to serve another."}, status_code=403)

    routes = list(app.router.routes)
    app.router.routes[:] = [route for route in routes if getattr(route, "path", None) in _ROUTES]
    app.get("/v1/models")(list_models)
    # An unknown route may load whatever its requests name, as that of transcriptions does; later versions may bring more of them.
    for path_of_route in {getattr(route, "path", None) for route in routes} - {None, "/v1/models", *_ROUTES}:
        app.api_route(path_of_route, methods=list(_METHODS), include_in_schema=False)(closed)
    return Served(app=app, names=names, presets=tuple(chosen), stop=runner.stop)


def requested_preset(body: Mapping[str, Any], *, names: Sequence[str], presets: Sequence[str], default: str) -> str:
    """The preset that a request asks for: by the model's name, ``NAME@fast``, or by the field ``moeify_preset``.

    Args:
        body: the request, JSON.
        names: what requests may call the model.
        presets: what they may name.
        default: of requests that name none.

    Raises:
        ConfigError: another model, an unknown preset, or two of them.
    """
    model, extra = body.get("model"), body.get("moeify_preset")
    if extra is not None and not isinstance(extra, str):
        raise ConfigError(f"moeify_preset must be the name of a preset, got {extra!r}.")
    suffix = None
    if model is not None and model not in names:
        name, at, suffix = str(model).rpartition("@")
        if not at or name not in names:
            raise ConfigError(f"this server has the model {names[0]!r}, not {str(model)[:200]!r}.")
        if suffix == "main" and suffix not in presets:  # what answers call the model
            suffix = None
    if suffix is not None and extra is not None and suffix != extra:
        raise ConfigError(f"the model's name asks for the preset {suffix!r}, moeify_preset for {extra!r}; name one.")
    preset = extra if suffix is None else suffix
    if preset is None:
        return default
    if preset not in presets:
        raise ConfigError(f"unknown preset {preset[:200]!r}{did_you_mean(preset[:200], presets)}")
    return preset


class _Stopping(Exception):  # noqa: N818 - not an error: the server ends
    pass


class _Runner:
    """Puts rules in place, on the thread that is about to run the model."""

    def __init__(self, model: nn.Module, rules: PresetRules, state: Any, default: str) -> None:
        self._rules, self._state, self._default = rules, state, default
        self._is_stopping = False
        self._device = next(model.parameters()).device
        rules.apply(default)  # where it is the only one, nobody else does for packed batches
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def under_preset(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn``, to be run on another thread, under the preset and the seed of the request in whose task this is called."""
        preset, seed = _PRESET.get() or self._default, SEED.get()

        def run(*args: Any, **kwargs: Any) -> Any:
            self._rules.apply(preset)
            with (
                contextlib.nullcontext() if seed is None else seeded(seed, self._device)
            ):  # a request without one draws from where the process is
                return fn(*args, **kwargs)

        return run

    def stop(self) -> None:
        """End forwards in flight, and the thread of packed batches, which would keep the process alive."""
        self._is_stopping = True
        packed = self._packed()
        if packed is not None and packed.is_running():
            packed.stop(block=True, timeout=_GRACE_S, hard_stop=True)
        self._rules.restore()

    def _packed(self) -> Any:
        """transformers' manager of packed batches, where one runs."""
        return getattr(getattr(self._state, "_cb_manager", None), "_cb", None)

    def _before_forward(self, _model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_stopping:
            raise _Stopping("the server is stopping")
        packed = self._packed()
        if packed is None or not self._rules.depend_on_batch:
            return
        batch = packed.batch_processor.inputs_and_outputs.requests_in_batch
        requests = [(_preset_of(entry.state.request_id) or self._default, entry.query_length) for entry in batch]
        self._rules.apply_batch(requests, kwargs["position_ids"].reshape(-1))


def _preset_of(request_id: str) -> str:
    return request_id.rpartition("/")[0]


def _handle(
    original: Callable[[dict[str, Any], str], Awaitable[Any]],
    choose: Callable[[Mapping[str, Any]], tuple[dict[str, Any], str, int | None]],
    *,
    refuse: Any,
) -> Callable[[dict[str, Any], str], Awaitable[Any]]:
    async def handle_request(body: dict[str, Any], _request_id: str) -> Any:
        body, preset, seed = choose(body)
        if refuse is not None:
            raise refuse(status_code=400, detail="this endpoint runs one request at a time: start the server without continuous batching.")
        set_before = _PRESET.set(preset), SEED.set(seed)
        try:
            # An id of our own: clients may send the same one twice, and a packed batch finds the preset in it.
            response = await original(body, f"{preset}/{uuid.uuid4().hex}")
        finally:
            _PRESET.reset(set_before[0])
            SEED.reset(set_before[1])
        response.headers[_HEADER] = preset
        return response

    return handle_request


def _cpu_cache_tokens(model: Any) -> int:
    """Tokens of the packed batches' cache on a CPU, where transformers would take nearly all memory that is free: a GiB, 65536 at most."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 2 * text.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    return int(min(2**16, 2**30 // token_bytes))


def _cb_config(given: Any, options: Mapping[str, Any]) -> Any:
    import transformers
    from transformers import ContinuousBatchingConfig

    config = given or ContinuousBatchingConfig()
    for name, value in options.items():
        if not hasattr(config, name):
            raise MoeifyError(_unknown_version(transformers.__version__, f"ContinuousBatchingConfig.{name}"))
        setattr(config, name, value)
    return config


class _LoopbackHosts:
    """Refuses requests that reached a loopback address under another name: of a web page in the user's browser (DNS rebinding).

    Starlette's own check of hosts cuts ``[::1]:8000`` at the first colon.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            named = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]
            if len(named) != 1 or not is_loopback(_without_port(named[0])):
                from starlette.responses import PlainTextResponse

                await PlainTextResponse("Invalid host header", status_code=400)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _without_port(host: str) -> str:
    """Of a Host header: ``127.0.0.1:8000``, ``localhost`` or ``[::1]:8000``."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() and not host.endswith("]") else host


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}; 127.0.0.1 is this machine alone.") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port, or 0 for a free one.") from error
        yield listener


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C end the server and nothing else: uvicorn sends them to itself once more when it has ended."""
    caught: list[int] = []

    def note(signum: int, _frame: FrameType | None) -> None:
        caught.append(signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
