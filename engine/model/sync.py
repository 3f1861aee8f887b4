"""When weights are gathered and gradients reduced: the mode of `Root.sync_gradients` that a machine has room for."""

from __future__ import annotations

from engine.flags import MemoryFlags
from engine.model.policy import Policy, Root
from engine.model.shards import local
from engine.world import World
from losses.logprobs import default_chunk_rows


def choose_gradient_sync(
    requested: str, root: Root, world: World, models: int = 1, working: int = 0
) -> tuple[str, str]:
    """(mode, why) of `Root.sync_gradients`: the one of the fewest collectives that fits.

    last: whole weights in the dtype they travel in, and fp32 gradients of what is trained, take at most half of the
    memory that this rank's shards of weights, gradients and moments and `working` bytes (activations, the head) leave;
    keep: the weights alone do; else every. Times `models` where so many like `root` are trained at once. One rank
    gathers nothing, but FSDP casts and copies all weights for every pass: on a GPU it keeps the copy where that fits,
    on a CPU memory counts for more. Reckoned from sizes, not measured: a run that resumes must choose the same.
    """
    if requested != "auto":
        return requested, "as asked"
    alone = world.size == 1
    if alone and not local(next(root.parameters())).is_cuda:
        return "every", "one rank has nothing to gather"
    memory = min(world.gather(world.memory))  # ranks that chose differently would wait for each other for ever
    travels = [
        root.gathered_dtype if root.gathered_dtype and p.is_floating_point() else p.dtype for p in root.parameters()
    ]
    gathered = models * sum(p.numel() * dtype.itemsize for p, dtype in zip(root.parameters(), travels, strict=True))
    gradients = models * 4 * root.num_trained
    state = (models * sum(p.numel() * p.dtype.itemsize for p in root.parameters()) + 3 * gradients) // world.size
    room = max(0, memory - state - working) / 2
    mode = "last" if not alone and gathered + gradients <= room else "keep" if gathered <= room else "every"
    gib = [f"{n / 2**30:.3g}" for n in (gathered, gradients, room, memory)]
    why = f"whole weights {gib[0]} GiB, whole gradients {gib[1]}, room for them {gib[2]} of {gib[3]}"
    return mode, f"one rank, which keeps or copies; {why}" if alone else why


def working_memory(flags: MemoryFlags, policy: Policy) -> int:
    """About what a full micro-batch takes, in bytes: an upper estimate, since what it decides (`--gradient_sync auto`)
    must not run out of memory.

    An eager layer keeps some 5.5 (D + F) numbers of a token (launch.plan, Llama 8B), 6 here; selective recomputation
    keeps 0.55 of that, full D numbers and one whole layer. The head takes its chunk of logits 3.5 times. D hidden, F
    intermediate size.
    """
    shape = policy.lm.config
    hidden, inner = shape.hidden_size, getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    numbers = 6 * (hidden + inner)
    kept = {"none": numbers, "selective": 0.55 * numbers, "full": hidden}[flags.gradient_checkpointing]
    wide = policy.gathered_dtype or next(p.dtype for p in policy.parameters() if p.dtype.itemsize > 1)
    head = policy.lm.get_output_embeddings().weight
    layers = (kept * shape.num_hidden_layers + numbers) * wide.itemsize
    return round(flags.micro_batch_tokens * layers + 3.5 * 4 * head.shape[0] * default_chunk_rows(head))
