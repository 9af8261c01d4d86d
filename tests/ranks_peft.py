"""What `ranks` runs in each process: adapters under FSDP2, and the script of docs/peft.md."""

import os
import warnings
from copy import deepcopy
from unittest.mock import patch

import peft
import tiny
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moeify.controls import record_active, store_by_shape
from moeify.layers import moe_layers
from moeify.select import TopK


def _quiet():
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft 0.21 asks a model what transformers 5.23 calls by another name


def gradients_under_fsdp2(targets):
    """Largest relative difference of a gradient from that of one process with the whole batch, and the active fraction."""
    _quiet()
    rank = torch.distributed.get_rank()
    model = tiny.convert_tiny(tiny.tiny_llama(), rule=TopK(k=3))
    if targets:
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    whole, ids = deepcopy(model), torch.arange(48).reshape(4, 12) * 7 % tiny.VOCAB
    whole(input_ids=ids, labels=ids).loss.backward()
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    store_by_shape(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.base_model.model if targets else model).model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    part = ids[2 * rank : 2 * rank + 2]
    with record_active(model) as stats:
        model(input_ids=part, labels=part).loss.backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    error = max(float((found[name] - grad).abs().max() / grad.abs().max()) for name, grad in wanted.items())
    return {"error": error, "active": stats.active_fraction(), "gradients": len(found), "layers": len(moe_layers(model))}


def run_script(script, folder):
    """As ``accelerate launch --cpu`` runs it; gives the last loss, the mean of all processes'."""
    _quiet()
    os.chdir(folder)
    namespace = {}
    with patch.dict(os.environ, ACCELERATE_USE_CPU="true"):
        exec(script, namespace)
    return {"loss": float(namespace["loss"]), "processes": namespace["accelerator"].num_processes}
