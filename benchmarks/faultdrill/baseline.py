"""The same damage against a plain `transformers` Trainer and against stock torch.distributed.checkpoint."""

DAMAGE: dict = {}
