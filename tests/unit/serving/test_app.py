"""The server in process: presets by request, one at a time and in packed batches; what it refuses; a real one that ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny import byte_tokenizer, convert_tiny, save_dense_tiny, tiny_llama
from transformers import BertConfig, BertModel, LlamaForCausalLM

import moeify
from moeify.errors import CheckpointError, ConfigError, MoeifyError
from moeify.presets import Preset
from moeify.select import TopK
from moeify.serving import ServeConfig, app
from moeify.serving.app import build, is_loopback, requested_preset

pytest.importorskip("fastapi")
from fastapi import FastAPI
from starlette.testclient import TestClient

LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")
PROMPT = "The quick brown fox jumps over the lazy dog."  # longer than a block of the packed cache, so that a prefix could be shared
PACKED = {"continuous_batching": True, "cb_num_blocks": 64, "cb_block_size": 16, "cb_max_batch_tokens": 128}
MODES = [pytest.param({}, id="one at a time"), pytest.param(PACKED, id="packed")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Six experts a layer: all of them by default, one in "fast", three in "balanced"."""
    folder = tmp_path_factory.mktemp("serving") / "tiny"
    model = convert_tiny(tiny_llama(), rule=TopK(k=6))
    kept = [Preset(name=n, rules=dict.fromkeys(LAYERS, TopK(k=k)), active_fraction=k / 6) for n, k in (("balanced", 3), ("fast", 1))]
    moeify.set_presets(model, kept)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(checkpoint):
    """Greedy continuations of `PROMPT` by preset, as generate makes them."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(checkpoint), byte_tokenizer()
    found = {}
    for preset in (None, "balanced", "fast"):
        if preset:
            moeify.set_rule(model, preset)
        ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=12, do_sample=False)
        found[preset or "default"] = tokenizer.decode(ids[0, len(PROMPT) :], skip_special_tokens=True)
    assert len(set(found.values())) == 3, "the presets tell apart"
    return found


@pytest.fixture(scope="module", params=MODES)
def client(request, checkpoint):
    served = build(checkpoint, ServeConfig(**request.param))
    with TestClient(served.app) as found:
        yield found
    served.stop()


def complete(client, **fields):
    return client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields})


def test_each_request_gets_its_presets_text_whoever_is_served_beside_it(client, texts):
    wanted = ["fast", "default", "fast", "balanced", "default", "fast", "balanced", "default"]

    def ask(preset):
        fields = {"model": "tiny"} if preset == "default" else {"model": f"tiny@{preset}"}
        answer = complete(client, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"], answer.headers["x-moeify-preset"]

    with ThreadPoolExecutor(max_workers=4) as pool:
        answers = list(pool.map(ask, wanted))
    assert answers == [(texts[preset], preset) for preset in wanted]


def test_a_preset_by_a_field_without_a_model_and_streamed(client, texts):
    answer = complete(client, moeify_preset="fast", stream=True)
    chunks = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == texts["fast"].rstrip("\N{REPLACEMENT CHARACTER}"), (
        "half a letter is held back"
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    # one id for two requests at once is the client's right
    same = {"headers": {"x-request-id": "mine"}, "json": {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}}
    with ThreadPoolExecutor(max_workers=2) as pool:
        asked = [
            pool.submit(client.post, "/v1/completions", **{**same, "json": {**same["json"], "model": m}}) for m in ("tiny", "tiny@fast")
        ]
    assert [a.result().json()["choices"][0]["text"] for a in asked] == [texts["default"], texts["fast"]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "tiny@fats"}, "unknown preset 'fats'; did you mean 'fast'?"),
        ({"moeify_preset": 3}, "moeify_preset must be the name of a preset, got 3."),
        ({"model": "gpt-5"}, "this server has the model 'tiny', not 'gpt-5'."),
        (
            {"model": "tiny@fast", "moeify_preset": "balanced"},
            "the model's name asks for the preset 'fast', moeify_preset for 'balanced'; name one.",
        ),
    ],
)
def test_bad_requests_are_one_line(client, fields, message):
    answer = complete(client, **fields)
    assert (answer.status_code, answer.json()) == (400, {"detail": message})


def test_models_health_and_what_is_closed(client):
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny", "tiny@default", "tiny@balanced", "tiny@fast"]
    assert client.get("/health").json() == {"status": "ok"}
    assert [client.post(path, json={"model": "gpt2"}).status_code for path in ("/load_model", "/reset")] == [403, 403]
    spoken = client.post("/v1/audio/transcriptions", data={"model": "openai/whisper-tiny"}, files={"file": ("a.wav", b"RIFF")})
    assert (spoken.status_code, client.get("/docs").status_code) == (403, 403)
    left = {route.path for route in client.app.routes if route.endpoint.__name__ != "closed"}
    assert left == {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/systemone", "/v1/models", "/health"}


def text(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_a_seed_is_its_requests_alone(checkpoint):
    served = build(checkpoint, ServeConfig(temperature=1.0))

    def ask(seed):
        return text(complete(client, temperature=None, max_tokens=32, seed=seed))

    with TestClient(served.app) as client:
        alone = [ask(1), ask(2)]
        assert alone[0] != alone[1]
        with ThreadPoolExecutor(max_workers=2) as pool:
            assert list(pool.map(ask, (1, 2, 1, 2))) == alone * 2
        after = []
        for _ in range(2):
            ask(1)
            after.append(ask(None))
        assert after[0] != after[1], "who gives no seed does not get a neighbour's"
        for seed in (1.5, True, "1", 2**64):
            answer = complete(client, seed=seed)
            assert (answer.status_code, answer.json()["detail"][:25]) == (400, "seed must be a whole numb")
        answer = complete(client, temperature="hot")
        assert answer.json() == {"detail": "options of generation cannot be read: could not convert string to float: 'hot'"}
    served.stop()


def test_no_request_of_a_packed_batch_decides_how_others_are_drawn(checkpoint, texts):
    served = build(checkpoint, ServeConfig(**PACKED))
    with TestClient(served.app) as client:
        for fields, named in (
            ({"temperature": 0.7}, "temperature: requests that share forwards are all drawn alike, with do_sample False here, not True;"),
            ({"temperature": None, "generation_config": '{"do_sample": true}'}, "generation_config's do_sample: "),
            ({"stop": ["fox"]}, "stop: "),
            ({"frequency_penalty": 0.5}, "frequency_penalty: "),
            ({"generation_config": '{"num_beams": 2}'}, "generation_config's num_beams: "),
        ):
            answer = complete(client, **fields)  # the first one, too
            assert (answer.status_code, answer.json()["detail"][: len(named)]) == (400, named)
        assert text(complete(client)) == texts["default"]
        same = {"seed": 3, "frequency_penalty": 0, "top_p": 0.5, "generation_config": '{"do_sample": false, "max_new_tokens": 3}'}
        assert text(complete(client, **same)) == texts["default"], "what changes nothing is no reason to refuse"
    served.stop()


def test_packed_batches_sample_as_the_server_was_told(checkpoint):
    served = build(checkpoint, ServeConfig(temperature=0.8, top_p=0.9, **PACKED))
    with TestClient(served.app) as client:
        greedy = complete(client).json()["detail"]
        assert greedy.startswith("temperature: requests that share forwards are all drawn alike, with do_sample True here,")
        assert complete(client, temperature=0.8, top_p=0.5).json()["detail"].startswith("top_p: ")
        assert complete(client, temperature=0.8, seed=1).json()["detail"].startswith("seed: ")
        answers = {text(complete(client, temperature=temperature, max_tokens=32)) for temperature in (0.8, None)}
        assert len(answers) == 2, "sampled"
    served.stop()


def test_a_server_of_one_preset_runs_it_for_everybody(checkpoint, texts):
    served = build(checkpoint, ServeConfig(presets=("fast",), **PACKED))
    with TestClient(served.app) as client:
        assert complete(client).json()["choices"][0]["text"] == texts["fast"]
        assert complete(client, model="tiny@default").status_code == 400
    served.stop()


def test_presets_that_may_be_named_and_their_default():
    ask = {"names": ("tiny", "/a/tiny"), "presets": ("fast",), "default": "fast"}
    assert requested_preset({}, **ask) == requested_preset({"model": "/a/tiny@main"}, **ask) == "fast"
    with pytest.raises(ConfigError, match="unknown preset 'default'"):
        requested_preset({"model": "tiny@default"}, **ask)


def test_what_cannot_be_served_is_refused(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="presets: unknown name 'slow'; known: default, balanced, fast"):
        build(checkpoint, ServeConfig(presets=("slow",)))
    with pytest.raises(CheckpointError, match="is not a folder"):
        build(tmp_path / "none", ServeConfig())
    encoder = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9))
    encoder.save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="holds a BertModel, which generates no text"):
        build(tmp_path / "bert", ServeConfig())
    tiny_llama().save_pretrained(tmp_path / "no-tokenizer")
    with pytest.raises(CheckpointError, match="no-tokenizer' cannot be served"):
        build(tmp_path / "no-tokenizer", ServeConfig())
    save_dense_tiny(tmp_path / "a@b")
    with pytest.raises(CheckpointError, match="rename the folder"):
        build(tmp_path / "a@b", ServeConfig())

    from transformers.cli import serve as theirs

    monkeypatch.setattr(theirs, "Serve", type("Serve", (), {"__init__": lambda self, model: None}))
    with pytest.raises(MoeifyError, match=r"serves in a way that moeify does not know \(no Serve\(force_model=\)\); install one from 5.17"):
        build(checkpoint, ServeConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, "port"),
        ({"presets": ("a", "a")}, "'a' twice"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, "top_p"),
        ({"cb_num_blocks": 4}, "cb_num_blocks must be at least 1 and is for"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        ServeConfig(**options)


def test_addresses_that_only_this_machine_reaches():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "localhost", "LOCALHOST", "::1", "[::1]", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.2", "example.com")))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]"])
def test_on_this_machine_alone_other_names_for_it_are_refused(monkeypatch, host):
    class Listener:
        def getsockname(self):
            return ("127.0.0.1", 8000)

        def listen(self, _backlog):
            pass

    asked = {}

    def run(server, **_):
        client = TestClient(server.config.app)
        hosts = (
            "127.0.0.1:8000",
            "localhost",
            "localhost:8000",
            "[::1]:8000",
            "[::1]",
            "evil.example",
            "[::1].evil.example",
            "evil.example:1",
            "",
        )
        asked.update({name: client.get("/", headers={"host": name}).status_code for name in hosts})

    page = FastAPI()
    page.get("/")(lambda: "served")
    served = app.Served(app=page, names=("tiny",), presets=("default",), stop=lambda: None)
    monkeypatch.setattr(app, "build", lambda *_, **__: served)
    monkeypatch.setattr(app, "_listening", lambda *_: contextlib.nullcontext(Listener()))
    monkeypatch.setattr("uvicorn.Server.run", run)
    assert app.serve("tiny", ServeConfig(host=host), say=lambda _: None) == 0
    assert {name for name, status in asked.items() if status == 200} == {
        "127.0.0.1:8000",
        "localhost",
        "localhost:8000",
        "[::1]:8000",
        "[::1]",
    }
    assert set(asked.values()) == {200, 400}


def test_a_real_server_says_where_it_listens_and_ends_at_sigterm(checkpoint, texts):
    command = [sys.executable, "-m", "moeify", "serve", str(checkpoint), "--port", "0", "--host", "0.0.0.0", "--preset", "fast"]
    environment = {**os.environ, "HF_HUB_CACHE": "/nonexistent/hub"}
    with subprocess.Popen([*command, "--continuous-batching"], stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                if line.startswith("serving "):
                    break
            assert lines[-1].startswith("serving tiny at http://0.0.0.0:"), lines
            assert "no authentication, no TLS, no rate limits" in "".join(lines)
            url = lines[-1].split()[3].rstrip(";").replace("0.0.0.0", "127.0.0.1")
            assert json.load(urllib.request.urlopen(f"{url}/models", timeout=60))["data"][0]["id"] == "tiny"
            body = json.dumps({"prompt": PROMPT, "max_tokens": 12, "temperature": 0}).encode()
            request = urllib.request.Request(f"{url}/completions", data=body, headers={"content-type": "application/json"})
            assert json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["text"] == texts["fast"]
            server.send_signal(signal.SIGTERM)
            rest = server.stderr.read()
            assert server.wait(timeout=60) == 0, rest
        finally:
            server.kill()  # where an assertion failed, nobody else ends it
    assert "Traceback" not in rest
