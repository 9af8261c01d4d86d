"""Data and models for tests of training."""

import torch
from torch import nn

F32 = {"compute": "float32"}


class Rows:
    """Training data from fixed tensors (N, ...); a batch is cut to its longest sequence, as a collator pads to it."""

    def __init__(self, **tensors):
        self.tensors = tensors
        self.seen = []

    def __len__(self):
        return len(next(iter(self.tensors.values())))

    def batch(self, rows, *, generator):
        self.seen.append(list(rows))
        batch = {key: value[rows] for key, value in self.tensors.items()}
        if "attention_mask" in batch:
            longest = int(batch["attention_mask"].sum(1).max())
            batch = {key: value[:, :longest].contiguous() if value.dim() == 2 else value for key, value in batch.items()}
        return batch


def text(*, rows=11, length=12, vocab=64, seed=0, padded=True):
    """Right-padded sequences of different lengths; every token is a label."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, length), generator=random)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=random) if padded else torch.full((rows, 1), length)
    mask = (torch.arange(length) < lengths).long()
    return Rows(input_ids=ids * mask, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))


def emotions(*, rows=11, seed=0):
    data = text(rows=rows, seed=seed)
    return Rows(**data.tensors | {"labels": torch.randint(0, 3, (rows,), generator=torch.Generator().manual_seed(seed))})


def tiny_classifier(**options):
    from transformers import BertConfig, BertForSequenceClassification

    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=32,
                num_labels=3,
                **config,
            )
        )


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Dies(Exception):  # noqa: N818 - stands for a kill
    pass


class DyingData:
    """Data that cannot be read at one step."""

    def __init__(self, data, *, at):
        self.data, self.calls, self.at = data, 0, at

    def __len__(self):
        return len(self.data)

    def batch(self, rows, *, generator):
        self.calls += 1
        if self.calls == self.at:
            raise Dies
        return self.data.batch(rows, generator=generator)


class _Examples(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        return row


def trainer_of(model, data, config, folder, *, callbacks=(), **options):
    """A quiet transformers Trainer with the settings of a `TrainConfig`; ``options`` are TrainingArguments'."""
    import transformers

    micro = config.micro_sequences or config.batch_sequences
    settings = {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": config.batch_sequences // micro,
        "learning_rate": config.lr,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "max_grad_norm": config.clip,
        "optim": "adamw_torch_fused",
        "seed": config.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings | options),
        train_dataset=_Examples(data),
        data_collator=lambda rows: data.batch(rows, generator=None),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trainer_losses(trainer):
    """Trains, and gives the loss of every step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
