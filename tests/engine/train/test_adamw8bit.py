"""8-bit moments: against float64 loops and bitsandbytes' own optimizer, by any number of ranks, and through
checkpoints.
"""

from __future__ import annotations

import bisect
import math
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from engine.model.bnb import bitsandbytes
from engine.train import adamw8bit, optim
from tests import oracles
from tests.engine.train.test_optim import Alone, adamw
from tests.families import save_family
from tests.launch.test_equivalence import Runs, digest, rows, trajectory, weights_of
from tests.ranks import context

pytest.importorskip("bitsandbytes")
MAPS = {
    key: bitsandbytes().functional.create_dynamic_map(signed=signed)
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False))
}
# bitsandbytes looks codes up on a CPU, in a table of this resolution of a block's scale; 0 is held as 2e-5 of it
TABLE = 2**-15
# of a block's scale: how far off a number in it can be
HALF_GAP = {key: values.diff().max().item() / 2 + TABLE for key, values in MAPS.items()}


def one(
    *shape: int, dtype: torch.dtype = torch.float32, decay: float = 0.0
) -> tuple[nn.Parameter, adamw8bit.AdamW8bit]:
    generator = torch.Generator().manual_seed(3)
    module = nn.ParameterList([nn.Parameter(torch.randn(shape, generator=generator).to(dtype))])
    return module[0], adamw(module, decay, "adamw_8bit")


def step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    optim.step(optimizer, Alone(), lr=lr, max_norm=0)


def numbers(state: dict, key: str) -> list[float]:
    """A moment's numbers, written out."""
    values, scales = MAPS[key].tolist(), state[f"{key}_scale"].tolist()
    return [values[c] * scales[i // 256] for i, c in enumerate(state[key].flatten().tolist())]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_step_is_a_float64_loop_over_the_moments_as_they_are_held():
    """Each of some steps from the state before it: weights to fp32 rounding, and moments to the nearest value that a
    byte has.
    """
    p, optimizer = one(45, 101, decay=0.1)
    generator = torch.Generator().manual_seed(4)
    for t in range(1, 6):
        p.grad = torch.randn(p.shape, generator=generator) * torch.logspace(-4, 0, 45)[:, None]
        g, w, state = p.grad.flatten().tolist(), p.detach().flatten().tolist(), optimizer.state[p]
        m, v = (numbers(state, key) if state else [0.0] * len(w) for key in MAPS)
        step(optimizer, 0.01)
        moved, held, rounding = p.detach().flatten().tolist(), {key: numbers(state, key) for key in MAPS}, 1e-6
        for i in range(len(w)):
            exact = {"exp_avg": 0.9 * m[i] + 0.1 * g[i], "exp_avg_sq": 0.999 * v[i] + 0.001 * g[i] ** 2}
            denominator = math.sqrt(exact["exp_avg_sq"] / (1 - 0.999**t)) + 1e-8
            expected = w[i] * (1 - 0.01 * 0.1) - 0.01 * exact["exp_avg"] / (1 - 0.9**t) / denominator
            assert moved[i] == pytest.approx(expected, rel=rounding, abs=rounding)
            for key, values in MAPS.items():
                scale = state[f"{key}_scale"][i // 256].item()
                x = exact[key] / scale
                at = bisect.bisect(values.tolist(), x)
                nearest = min(values.tolist()[max(0, at - 1) : at + 1], key=lambda q: abs(q - x))
                assert abs(held[key][i] / scale - x) <= abs(nearest - x) + TABLE
    assert optimizer.state[p]["exp_avg"].dtype == torch.uint8 and optimizer.state[p]["step"] == 5


def test_many_steps_stay_in_the_band_of_the_quantiser():
    """Errors of one rounding are at most half a gap of the block's scale; intervals carry them through the
    recurrences.
    """
    steps, lr = 30, 0.01
    p, optimizer = one(16, 257)
    generator = torch.Generator().manual_seed(5)
    start, sign = p.detach().flatten().tolist(), (torch.rand(p.shape, generator=generator) < 0.5) * 2.0 - 1
    gradients = [(0.5 + torch.rand(p.shape, generator=generator) / 2) * sign for _ in range(steps)]
    n = len(start)
    m, v, m_off, v_off, band = ([0.0] * n for _ in range(5))
    for t, gradient in enumerate(gradients, 1):
        p.grad = gradient.clone()
        step(optimizer, lr)
        scales = {key: optimizer.state[p][f"{key}_scale"].tolist() for key in MAPS}
        for i, g in enumerate(gradient.flatten().tolist()):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
            m_off[i], v_off[i] = 0.9 * m_off[i], 0.999 * v_off[i]
            update = lambda m, v, t=t: m / (1 - 0.9**t) / (math.sqrt(max(v, 0) / (1 - 0.999**t)) + 1e-8)
            ends = [update(m[i] + a * m_off[i], v[i] + b * v_off[i]) for a in (-1, 1) for b in (-1, 1)]
            band[i] += lr * max(abs(end - update(m[i], v[i])) for end in ends)
            m_off[i] += HALF_GAP["exp_avg"] * scales["exp_avg"][i // 256]
            v_off[i] += HALF_GAP["exp_avg_sq"] * scales["exp_avg_sq"][i // 256]
    flat = [g.flatten().tolist() for g in gradients]
    expected = oracles.adamw(list(start), lambda _, t: flat[t - 1], steps, lambda t: lr)
    moved = p.detach().flatten().tolist()
    assert all(abs(a - b) <= band[i] + 1e-5 for i, (a, b) in enumerate(zip(moved, expected, strict=True)))
    assert max(band) < 0.2 * steps * lr  # the band says something
    assert max(abs(a - b) for a, b in zip(moved, expected, strict=True)) > 1e-5  # and moments are rounded


CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_the_bit_of_bitsandbytes_own_optimizer(dtype, device):
    """Also the tensors that stay in fp32, rows that never get a gradient, and a last block that is not whole."""
    make = lambda: nn.Sequential(
        nn.Linear(64, 100), nn.LayerNorm(100), nn.Linear(100, 61, bias=False), nn.Linear(61, 7)
    ).to(device, dtype)
    torch.manual_seed(1)
    ours = make()
    theirs = make()
    theirs.load_state_dict(ours.state_dict())
    optimizer = adamw(ours, 0.1, "adamw_8bit")
    groups = [
        {"params": [p for p in theirs.parameters() if (p.dim() < 2) == flat], "weight_decay": 0.0 if flat else 0.1}
        for flat in (False, True)
    ]
    reference = bitsandbytes().optim.AdamW8bit(groups, lr=0.01)
    for _ in range(12):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            p.grad[:20] = 0
            q.grad = p.grad.clone()
        step(optimizer, 0.01)
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    kept = {p.dtype for state in optimizer.state.values() for name, p in state.items()}
    assert kept == {torch.uint8, torch.float32}


@pytest.mark.parametrize("shape", [(64, 64), (10, 10)])
def test_bfloat16_weights_are_rounded_once_a_step(shape):
    p, optimizer = one(*shape, dtype=torch.bfloat16)
    q, wide = one(*shape)
    for t in range(4):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t)).bfloat16()
        q.data, q.grad = p.detach().float(), p.grad.float()
        step(optimizer, 0.01)
        step(wide, 0.01)
        assert torch.equal(p, q.bfloat16())
    for a, b in zip(optimizer.state[p].values(), wide.state[q].values(), strict=True):
        assert torch.equal(a, b) and a.dtype in (torch.uint8, torch.float32)


def test_a_norm_that_is_not_finite_changes_nothing():
    p, optimizer = one(64, 64)
    p.grad = torch.ones_like(p)
    step(optimizer, 0.1)
    before, state = p.detach().clone(), {k: t.clone() for k, t in optimizer.state[p].items()}
    p.grad = torch.full_like(p, float("inf"))
    step(optimizer, 0.1)
    assert torch.equal(p, before) and all(torch.equal(t, state[k]) for k, t in optimizer.state[p].items())


def test_what_is_held_in_8_bits_and_what_it_costs(capsys):
    model = nn.Sequential(
        nn.Linear(512, 128), nn.Linear(63, 65, bias=False), nn.Linear(64, 64, bias=False)
    ).requires_grad_(True)
    model.append(nn.Linear(500, 500).requires_grad_(False))

    class Speaking(Alone):
        say = staticmethod(print)

    optimizer = adamw(model, 0.0, "adamw_8bit", Speaking())
    said = capsys.readouterr().out
    for p in (p for p in model.parameters() if p.requires_grad):
        p.grad = torch.ones_like(p)
    step(optimizer, 0.1)
    cost = lambda p: sum(t.nbytes for name, t in optimizer.state[p].items() if name != "step") / p.numel()
    bias, matrix, under, just = model[0].bias, model[0].weight, model[1].weight, model[2].weight
    assert [cost(p) for p in (bias, matrix, under, just)] == [8, 2.03125, 8, 2.03125] and len(optimizer.state) == 4
    n = [p.numel() for p in (bias, matrix, under, just)]
    per_number = (8 * (n[0] + n[2]) + 2.03125 * (n[1] + n[3])) / sum(n)
    assert (
        f"8-bit moments for 2 of 4 tensors ({(n[1] + n[3]) / sum(n):.1%} of the numbers), {per_number:.2f} bytes a"
        " number" in said
    )
    assert "fp32 for 2 with under 4096 numbers a rank, the first 1.weight" in said


# --- on several ranks, and through checkpoints ------------------------------------------------------------------------

# by 1, 2, 3 ranks: blocks of the whole tensor (the last rank may be short or empty); blocks of a shard; the moments'
# type changes
SHAPES = {
    "aligned": (48, 256),
    "short": (47, 512),
    "empty": (4, 4096),
    "moving": (91, 151),
    "crossing": (30, 301),
    "small": (2,),
    "bias": (300,),
}
ALIGNED = ("aligned", "short", "empty", "small", "bias")
STEPS, SAVED = 6, 4


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.lm = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
        )
        self.frozen = nn.Parameter(torch.zeros(5000, 3), requires_grad=False)


def _child(rank: int, ranks: int, port: int, root: Path, resumed: int, dtype: torch.dtype, kind: str) -> None:
    os.environ.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    sys.stdout = sys.stderr = open(root / f"log-{resumed}-{ranks}.txt", "a", buffering=1)  # noqa: SIM115 - until the process ends
    torch.set_num_threads(1)
    from torch.distributed import destroy_process_group

    from engine import world
    from engine.model import build
    from engine.model.shards import local, local_rows, sharded_like, whole
    from engine.train.checkpoint import Checkpoints

    here = world.start()
    module = Module().to(dtype)
    build.shard(module, nn.ModuleList(), here, dtype)
    optimizer = adamw(module, 0.1, kind, here)
    output_dir = root / f"{resumed}-{ranks}"
    output_dir.mkdir(exist_ok=True)
    checkpoints = Checkpoints(output_dir, here, {"policy": (module, optimizer)}, keep=2, identity={}, settings={})
    state = (
        checkpoints.resume(str(root / f"0-{resumed}" / "checkpoints" / f"step-{SAVED:06d}")) if resumed else {"step": 0}
    )
    names = {p: name.removeprefix("lm.") for name, p in module.named_parameters()}
    for t in range(state["step"], STEPS):
        if t == SAVED:  # as it is saved, or as it was resumed
            held = {
                names[p]: {k: local(moment) for k, moment in moments.items()} for p, moments in optimizer.state.items()
            }
            torch.save(held, root / f"held-{resumed}-{ranks}-{rank}.pt")
        generator = torch.Generator().manual_seed(100 + t)
        gradients = {name: torch.randn(shape, generator=generator) * 10.0 ** (t % 3) for name, shape in SHAPES.items()}
        for p, name in names.items():
            if p.requires_grad:
                p.grad = sharded_like(gradients[name][local_rows(p)].to(dtype), p)
        optim.step(optimizer, here, lr=0.01, max_norm=0)
        if t + 1 == SAVED and not resumed:
            checkpoints.save(t + 1, {})
            checkpoints.wait()
    final = {name: whole(p).detach().clone() for p, name in names.items()}
    if here.is_main:
        torch.save(final, root / f"final-{resumed}-{ranks}.pt")
    destroy_process_group()


def on_ranks(
    ranks: int, root: Path, resumed: int = 0, dtype: torch.dtype = torch.float32, kind: str = "adamw_8bit"
) -> tuple[dict[str, torch.Tensor], str]:
    """(the weights after STEPS steps, what was said); resumed: from the checkpoint that so many ranks wrote."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        context.Process(target=_child, args=(rank, ranks, port, root, resumed, dtype, kind)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    alive = [process for process in processes if process.exitcode is None]
    for process in alive:
        process.kill()
    said = (root / f"log-{resumed}-{ranks}.txt").read_text()
    assert all(process.exitcode == 0 for process in processes), said
    return torch.load(root / f"final-{resumed}-{ranks}.pt"), said


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    root = tmp_path_factory.mktemp("sharded")
    return root, {ranks: on_ranks(ranks, root)[0] for ranks in (1, 2, 3)}


def test_shards_are_updated_as_the_whole_where_their_blocks_are_its(sharded):
    _, final = sharded
    for name in ALIGNED:
        assert torch.equal(final[1][name], final[2][name]) and torch.equal(final[1][name], final[3][name]), name
    assert not torch.equal(final[1]["moving"], final[2]["moving"])
    for name, before in Module().lm.items():
        apart = (final[1][name] - final[3][name]).norm() / (final[1][name] - before).norm()
        assert apart <= 0.02, (name, apart)


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(sharded):
    root, _ = sharded
    for ranks in (1, 2, 3):
        found: dict[str, int] = {}
        for path in (root / f"0-{ranks}" / "checkpoints" / f"step-{SAVED:06d}").glob("*.safetensors"):
            with safe_open(path, "pt") as f:
                for key in f.keys():  # noqa: SIM118 - not a dict
                    found[key] = found.get(key, 0) + math.prod(f.get_slice(key).get_shape())
        expected = {}
        for name, shape in SHAPES.items():
            per_rank = -(-shape[0] // ranks) * math.prod(shape[1:])
            expected |= {f"policy.{kind}.lm.{name}": math.prod(shape) for kind in ("master", *MAPS)}
            if per_rank >= 4096:
                expected |= {f"policy.{key}_scale.lm.{name}": ranks * math.ceil(per_rank / 256) for key in MAPS}
        assert found == expected


def test_resumed_by_as_many_ranks_to_the_bit(sharded):
    root, final = sharded
    resumed, said = on_ranks(2, root, resumed=2)
    assert all(torch.equal(resumed[name], final[2][name]) for name in final[2]) and "requantised" not in said


def whole_moments(root: Path, ranks: int, resumed: int) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """name → moment → (numbers, scale of each one's block or 0 in fp32) from the ranks' own codes, by indexing
    alone.
    """
    parts = [torch.load(root / f"held-{resumed}-{ranks}-{rank}.pt") for rank in range(ranks)]
    found: dict = {}
    for name in SHAPES:
        for key, values in MAPS.items():
            pieces = []
            for part in parts:
                held = part[name][key].flatten().numpy()
                if held.dtype == np.uint8:
                    scales = part[name][f"{key}_scale"].numpy()[np.arange(len(held)) // 256]
                    pieces.append((values.numpy()[held] * scales, scales))
                else:
                    pieces.append((held, np.zeros_like(held)))
            found.setdefault(name, {})[key] = tuple(np.concatenate(side) for side in zip(*pieces, strict=True))
    return found


@pytest.mark.parametrize("then, now, rounded", [(2, 1, 2), (2, 3, 1), (3, 2, 2)])
def test_resumed_by_other_ranks(then, now, rounded, sharded):
    """Where blocks stay, nothing changes; where they move, a moment is off by half a gap of its new block's scale at
    most.
    """
    root, final = sharded
    resumed, said = on_ranks(now, root, resumed=then)
    assert f"resuming a run of {then} ranks on {now}" in said
    assert f"8-bit moments were requantised: block boundaries moved ({rounded} of {len(SHAPES)} tensors)" in said
    before, after = whole_moments(root, then, 0), whole_moments(root, now, then)
    for name in SHAPES:
        for key in MAPS:
            (old, _), (new, scales) = before[name][key], after[name][key]
            exact = name in ALIGNED or (name, now) == ("crossing", 3)
            assert (np.abs(new - old) <= (0 if exact else HALF_GAP[key] * scales)).all(), (name, key)
    for where, ranks in ((before, then), (after, now)):  # 0: no scale, fp32
        assert [name for name in SHAPES if not where[name]["exp_avg"][1].any()] == (
            ["small", "bias"] if ranks < 3 else ["crossing", "small", "bias"]
        )
    for name in ALIGNED:
        assert torch.equal(resumed[name], final[then][name]), name
    for name in ("moving", "crossing"):
        apart = (resumed[name] - final[then][name]).norm() / (final[then][name] - Module().lm[name]).norm()
        assert apart <= 0.02, (name, apart)


@pytest.mark.parametrize("kind, now", [("adamw_8bit", 2), ("adamw", 3)])
def test_bfloat16_weights_through_a_checkpoint(kind, now, tmp_path):
    final, _ = on_ranks(2, tmp_path, dtype=torch.bfloat16, kind=kind)
    resumed, _ = on_ranks(now, tmp_path, resumed=2, dtype=torch.bfloat16, kind=kind)
    assert all(torch.equal(resumed[name], final[name]) and final[name].dtype == torch.bfloat16 for name in final)


# --- through the entry points -----------------------------------------------------------------------------------------


def runs_of(stage: str, root: Path, embedded_dir) -> Runs:
    """A model of which 2 ranks hold the embeddings and the MLP in 8 bits and 3 ranks the embeddings alone, with other
    blocks.
    """
    model = save_family(
        "llama",
        root / "model",
        embedded_dir.model,
        hidden_size=72,
        intermediate_size=176,
        head_dim=18,
        initializer_range=0.05,
    )
    data = embedded_dir.train_pairs if stage == "dpo" else embedded_dir.train_conversations
    flags = {
        "model_name_or_path": model,
        "cache_dir": root / "cache",
        "dataset_name": data,
        "batch_size": 12,
        "max_steps": 10,
        "learning_rate": 2e-3,
        "micro_batch_tokens": 500,
        "warmup_ratio": 0.1,
        "optimizer": "adamw_8bit",
        "save_steps": 4,
    }
    return Runs(stage, root, flags | ({"sample_tokens": 0} if stage == "sft" else {}))


@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=pytest.mark.drill)])
def test_a_killed_run_ends_in_the_same_bits_and_on_other_ranks_in_the_band(stage, tmp_path, embedded_dir):
    runs = runs_of(stage, tmp_path, embedded_dir)
    whole = runs.launch("whole", 2)
    assert whole.ok and "optimizer: 8-bit moments for 8 of 21 tensors" in whole.output, whole.output
    assert not runs.launch("killed", 2, "kill_between_steps_7_and_8").ok
    for ranks in (2, 3, 1) if stage == "sft" else (2,):
        name = f"killed-{ranks}"
        shutil.copytree(runs.root / "killed", runs.root / name)
        again = runs.launch(name, ranks)
        assert again.ok and "resuming after step 4" in again.output, again.output
        assert ("8-bit moments were requantised: block boundaries moved" in again.output) == (ranks != 2)
        if ranks == 2:
            assert digest(runs.root / name) == digest(runs.root / "whole")
            assert trajectory(runs.root / name) == trajectory(runs.root / "whole")
            continue
        for x, y in zip(rows(runs.root / "whole"), rows(runs.root / name), strict=True):
            assert y["loss"] == pytest.approx(x["loss"], rel=1e-3)
        w, w0, w1 = (
            weights_of(d) for d in (runs.root / "whole" / "final", runs.root / "model", runs.root / name / "final")
        )
        assert (w1 - w).norm() <= 0.02 * (w - w0).norm()  # found: 0.006


def test_another_optimizer_on_resume_is_refused(tmp_path, embedded_dir):
    runs = runs_of("sft", tmp_path, embedded_dir)
    assert not runs.launch("out", 1, "kill_between_steps_7_and_8").ok
    refused = runs.launch("out", 1, log="out.2", optimizer="adamw")
    assert refused.codes == [2] and "--optimizer adamw_8bit, now it is adamw" in refused.output


def test_it_learns_as_well_as_with_moments_in_fp32(tmp_path):
    """The embedded SFT run, 60 steps: a held-out loss within one standard deviation over seeds, 0.011 (found: 0.004
    lower).
    """
    flags = {"cache_dir": tmp_path / "cache", "max_steps": 60, "sample_tokens": 0}
    runs, loss = Runs("sft", tmp_path, flags), {}
    for optimizer in ("adamw", "adamw_8bit"):
        before, loss[optimizer] = (
            row["eval/loss"] for row in rows(runs.run(optimizer, optimizer=optimizer)) if "eval/loss" in row
        )
        assert loss[optimizer] < 0.25 * before
    assert 0 < abs(loss["adamw_8bit"] - loss["adamw"]) < 0.011
