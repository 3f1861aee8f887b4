"""Faults that tests/ranks.py plants in the ranks of a run before the stage starts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from engine.model import export


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_publishing_step_4() -> None:
    """All shards are on disk, the directory has its temporary name."""
    from engine.train.checkpoint import Checkpoints

    publish = Checkpoints._publish
    Checkpoints._publish = lambda self, partial, step, *rest: (
        _die() if step == 4 else publish(self, partial, step, *rest)
    )


def kill_rank_1_while_writing_step_4() -> None:
    from engine.train import checkpoint

    describe, rank = checkpoint._sync_and_describe, os.environ["RANK"]
    checkpoint._sync_and_describe = lambda path: _die() if rank == "1" and "000004" in str(path) else describe(path)


def kill_between_steps_7_and_8() -> None:
    from engine.train import optim

    original, count = optim.learning_rate, iter(range(100))
    optim.learning_rate = lambda *args, **options: _die() if next(count) == 7 else original(*args, **options)


def kill_while_exporting() -> None:

    export._save_configs = lambda *args: _die()


def fill_the_disk() -> None:
    """Every write of a checkpoint fails."""
    from engine.train import checkpoint

    def full(path):
        raise OSError(28, "No space left on device")

    checkpoint._sync_and_describe = full


def poison_gradients_of_rank_1_at_step_3() -> None:
    """A NaN on one rank only."""
    import launch.dpo

    original, count = launch.dpo.preference_loss, iter(range(1000))

    def poisoned(*args):
        loss = original(*args)
        return loss * float("nan") if os.environ["RANK"] == "1" and next(count) == 2 else loss

    launch.dpo.preference_loss = poisoned


def _at_step(step: int, do: Callable[[], object]) -> None:
    """Before the optimizer takes that step (1-based) in this process."""
    from engine.train import optim

    original, count = optim.step, iter(range(1, 1000))

    def stepping(*args, **options):
        if next(count) == step:
            do()
        return original(*args, **options)

    optim.step = stepping


def _signal_me(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def terminate_rank_1_at_step_5() -> None:
    """One rank alone is told."""
    if os.environ["RANK"] == "1":
        _at_step(5, _signal_me)


def terminate_all_at_step_5() -> None:
    """And the last rank a second time at once, as torchrun passes on what it got too."""
    _at_step(5, lambda: (_signal_me(signal.SIGUSR1), _signal_me()))


def terminate_rank_0_at_step_10() -> None:
    """In the last one."""
    if os.environ["RANK"] == "0":
        _at_step(10, _signal_me)


def terminate_in_an_operation_at_step_3() -> None:
    """The main thread is in one call for seconds: it does not see the second signal either."""
    import time

    from engine import signals

    signals.ECHO = 0.2

    def busy() -> None:
        threading.Timer(0.2, _signal_me).start()
        threading.Timer(0.8, _signal_me).start()
        time.sleep(30)

    if os.environ["RANK"] == "0":
        _at_step(3, busy)


def terminate_rank_0_in_the_reference_pass() -> None:
    """In the second of its segments, which are short."""
    from engine.train import refcache

    refcache.SEQUENCES_PER_SEGMENT = 16
    original, count = refcache._append, iter(range(100))

    def appending(*args):
        original(*args)
        if next(count) == 1:
            _signal_me()

    refcache._append = appending


def terminate_rank_1_while_rank_0_tokenises() -> None:
    """Rank 1 waits for rank 0 in one call."""
    import time

    from engine.data import tokenise

    tokenise.CHUNK_ROWS = 4
    original = tokenise.encode_rows

    def slow(*args):
        time.sleep(0.2)
        return original(*args)

    tokenise.encode_rows = slow
    if os.environ["RANK"] == "1":
        threading.Timer(2.5, _signal_me).start()


def terminate_rank_1_in_the_third_rollout() -> None:
    """At its first token; both ranks are slow, and rank 0 has to hear of it. The first load is the evaluation's."""
    import time

    from rollout.decoder import Decoder
    from rollout.sampler import Sampler

    original, launch = Sampler.load, Decoder.launch
    loads = iter(range(1, 100))
    state = {"load": 0}

    def loading(self, policy):
        state["load"] = next(loads)
        if state["load"] == 4 and os.environ["RANK"] == "1":
            _signal_me()
        return original(self, policy)

    def slow(*args):
        if state["load"] == 4:
            time.sleep(0.25)
        return launch(*args)

    Sampler.load, Decoder.launch = loading, slow


def tokenise_slowly() -> None:
    """Longer than a collective may take: the other ranks must be waiting on the store, not in a collective."""
    import time
    from datetime import timedelta

    from engine import world
    from engine.data import sources as data

    world.COLLECTIVE_TIMEOUT = timedelta(seconds=4)
    original = data.open_or_build

    def slow(*args, **options):
        if os.environ["RANK"] == "0":
            time.sleep(7)
        return original(*args, **options)

    data.open_or_build = slow


def dump_gradients(argv: list[str]) -> None:
    """The reduced, unclipped gradients of the first step, whole, beside the run's metrics."""
    import torch

    from engine.train import optim

    output_dir = argv[argv.index("--output_dir") + 1]
    make, original, roots = optim.adamw, optim.step, {}

    def remembering(root, *args):
        optimizer = make(root, *args)
        roots[id(optimizer)] = root
        return optimizer

    def dumping(optimizer, *args, **options):
        trained = [(name, p) for name, p in roots[id(optimizer)].named_parameters() if p.requires_grad]
        gradients = {name.removeprefix("lm."): p.grad.full_tensor() for name, p in trained}
        if os.environ["RANK"] == "0":
            torch.save(gradients, f"{output_dir}/gradients.pt")
        return original(optimizer, *args, **options)

    optim.adamw, optim.step = remembering, dumping


def write_slowly_and_poison_step_3() -> None:
    """A NaN while the checkpoint of step 2 is being written."""
    import time

    from engine.train import checkpoint

    describe = checkpoint._sync_and_describe
    checkpoint._sync_and_describe = lambda path: (time.sleep(0.5), describe(path))[1]
    poison_gradients_of_rank_1_at_step_3()


def fail_on_rank_1_alone() -> None:
    """An error that rank 0 knows nothing of."""
    from engine.data import batch
    from engine.errors import UserError

    original = batch.MicroBatches._begin

    def failing(*args):
        if os.environ["RANK"] == "1":
            raise UserError("this rank's disk is damaged")
        return original(*args)

    batch.MicroBatches._begin = failing


def interrupt_at_step_5() -> None:
    """Ctrl-C, as a terminal sends it to every process."""
    from engine.train import optim

    original, count = optim.learning_rate, iter(range(100))

    def interrupted(*args, **options):
        if next(count) == 4:
            raise KeyboardInterrupt
        return original(*args, **options)

    optim.learning_rate = interrupted


def dump_what_is_held(argv: list[str]) -> None:
    """Of the policy as it is loaded: bytes of this rank's shards, logits and log-probs of a micro-batch, the whole
    state dict; then gradients.
    """

    import numpy as np
    import torch

    from engine.data.batch import micro_batch
    from engine.model import build
    from engine.model.shards import whole

    output_dir = argv[argv.index("--output_dir") + 1]
    original = build.load_policy

    def dumping(directory, config, world, how):
        policy = original(directory, config, world, how)
        ids = np.random.Generator(np.random.Philox(key=5)).integers(0, 500, 60)
        batch = micro_batch([(ids, np.ones(60, bool))], (0,), world.device)
        with torch.no_grad():
            found = {"logits": policy.own_logits(batch), "logprobs": policy.logprobs(batch)}
        policy.release()
        held = sum(p.to_local().nbytes for p in policy.parameters())
        state = policy.lm.state_dict()
        torch.save(
            {"held": held, "state": {name: whole(t) for name, t in state.items()}, **found},
            f"{output_dir}/held-{world.rank}.pt",
        )
        return policy

    build.load_policy = dumping
    dump_gradients(argv)


def without_a_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    cpp_builder.get_cpp_compiler = none


def trace_without_generating_code() -> None:
    """torch.compile up to the graphs of both passes; how many there are and how many breaks, after every step, goes to
    the output.
    """
    import torch
    import torch._dynamo.utils

    from engine.train import optim

    compiled, original, counters = torch.compile, optim.step, torch._dynamo.utils.counters
    torch.compile = lambda f, **options: compiled(f, **options, backend="aot_eager")

    def counting(*args, **options):
        print(
            f"graphs {counters['stats']['unique_graphs']}, breaks {sum(counters['graph_break'].values())}", flush=True
        )
        return original(*args, **options)

    optim.step = counting


def record_experience(argv: list[str]) -> None:
    """What launch.grpo learns from in its first iteration, beside its directory."""
    import numpy as np

    import launch.grpo

    original, out = launch.grpo.experience_of, argv[argv.index("--output_dir") + 1]

    def recording(*args, **options):
        experience = original(*args, **options)
        parts = {"prompt": "prompt_ids", "response": "response_ids"}
        arrays = {name: [getattr(r, of) for r in experience.rollouts] for name, of in parts.items()}
        lengths = {f"{name}_lengths": [len(ids) for ids in every] for name, every in arrays.items()}
        if os.environ["RANK"] == "0":
            np.savez(
                f"{out}.npz",
                scores=experience.scores_S.numpy(),
                groups=experience.prompts_S.numpy(),
                sampled=experience.sampled_R.numpy(),
                ended=[r.finish_reason == "stop" for r in experience.rollouts],
                **{name: np.concatenate(every) for name, every in arrays.items()},
                **lengths,
            )
        return experience

    launch.grpo.experience_of = recording


def slow_steps() -> None:
    import time

    from engine.train import optim

    original = optim.step
    optim.step = lambda *args, **options: (time.sleep(0.6), original(*args, **options))[1]


def stop_rank_1_at_step_4() -> None:
    """As a debugger, or a machine that is gone from the network, does; a second after it told of that step."""
    import time

    if os.environ["RANK"] == "1":
        _at_step(4, lambda: (time.sleep(1), _signal_me(signal.SIGSTOP)))


def stop_rank_0_at_step_4() -> None:
    """With it the store that it keeps."""
    if os.environ["RANK"] == "0":
        _at_step(4, lambda: _signal_me(signal.SIGSTOP))


def loop_on_rank_1_at_step_4() -> None:
    def forever() -> None:
        number = 0
        while True:
            number += 1

    if os.environ["RANK"] == "1":
        _at_step(4, forever)


def call_on_rank_1_at_step_4() -> None:
    """One call that lasts."""
    import time

    if os.environ["RANK"] == "1":
        _at_step(4, lambda: time.sleep(1000))


def call_of_four_seconds_at_step_4() -> None:
    """Of all ranks at once: nobody waits for anybody."""
    import time

    _at_step(4, lambda: time.sleep(4))


def wait_for_each_other_at_step_4() -> None:
    """Each in another collective."""
    import torch
    import torch.distributed as dist

    def meet() -> None:
        if os.environ["RANK"] == "1":
            dist.send(torch.zeros(1), 0, tag=7)
            dist.recv(torch.zeros(1), 0, tag=9)
        else:
            dist.recv(torch.zeros(1), 1, tag=7)
            dist.recv(torch.zeros(1), 1, tag=8)

    _at_step(4, meet)


def kill_rank_1_at_step_4() -> None:
    if os.environ["RANK"] == "1":
        _at_step(4, _die)


def kill_rank_0_at_step_4() -> None:
    if os.environ["RANK"] == "0":
        _at_step(4, _die)


def load_slowly_on_rank_1() -> None:
    """Longer than patience, where no report can come."""
    import time

    from engine.model import build

    original = build.load_policy

    def slow(*args, **options):
        if os.environ["RANK"] == "1":
            time.sleep(4)
        return original(*args, **options)

    build.load_policy = slow
    tokenise_for_long()


def tokenise_for_long() -> None:
    """Longer than patience, in chunks that are not."""
    import time

    from engine.data import tokenise

    tokenise.CHUNK_ROWS = 8
    original, count = tokenise.encode_rows, iter(range(1000))

    def slow(*args):
        if next(count) < 4:
            time.sleep(1)
        return original(*args)

    tokenise.encode_rows = slow


def no_file_above_100_kib_from_step_3_to_6() -> None:
    """As a quota does: weights cannot be written, rows can."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    _at_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, hard)))
    _at_step(6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)))


def no_file_above_100_kib_from_step_3() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    _at_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, hard)))


def _fill(directory: str) -> None:
    """To the last byte."""
    import contextlib

    with contextlib.suppress(OSError), open(f"{directory}/filler", "wb", buffering=0) as f:
        while True:
            f.write(b"x" * 4096)
    with contextlib.suppress(OSError), open(f"{directory}/filler", "ab", buffering=0) as f:
        while True:
            f.write(b"x")


def fill_the_disk_of_the_run_at_step_3(argv: list[str]) -> None:
    if os.environ["RANK"] == "0":
        _at_step(3, lambda: _fill(argv[argv.index("--output_dir") + 1]))


def fill_the_disk_of_the_run_from_step_3_to_6(argv: list[str]) -> None:
    output_dir = argv[argv.index("--output_dir") + 1]
    if os.environ["RANK"] == "0":
        _at_step(3, lambda: _fill(output_dir))
        _at_step(6, lambda: os.unlink(f"{output_dir}/filler"))


def _remount(argv: list[str], *options: str) -> None:
    import subprocess

    subprocess.run(
        ["mount", "-o", ",".join(("remount", *options)), argv[argv.index("--checkpoint_dir") + 1]], check=True
    )


def checkpoints_read_only_from_step_3_to_6(argv: list[str]) -> None:
    if os.environ["RANK"] == "0":
        _at_step(3, lambda: _remount(argv, "ro"))
        _at_step(6, lambda: _remount(argv, "rw"))


def unmount_checkpoints_at_step_3(argv: list[str]) -> None:
    import subprocess

    if os.environ["RANK"] == "0":
        _at_step(3, lambda: subprocess.run(["umount", "-l", argv[argv.index("--checkpoint_dir") + 1]], check=True))


def no_memory_on_rank_1_at_step_3() -> None:
    """A tensor that no machine holds."""
    import torch

    if os.environ["RANK"] == "1":
        _at_step(3, lambda: torch.empty(2**50))


def no_memory_on_any_rank_at_step_3() -> None:
    import torch

    from launch import shortage

    shortage.PLANNED_WITHIN = 0.05  # no time for a plan

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nProcess 1 has 3 GiB in use.")

    _at_step(3, full)


def draw_ahead_in_turn() -> None:
    """No thread: the responses of the next step are there before this one is learnt from."""
    from rollout import ahead

    ahead._Thread.start = lambda self: self.run()
    ahead._Thread.join = lambda self, timeout=None: None


def learn_late() -> None:
    """What is drawn ahead is there long before it is wanted; on rank 1 later than on rank 0."""
    import time

    from engine.train import optim

    original, seconds = optim.step, 0.1 if os.environ["RANK"] == "1" else 0.3
    optim.step = lambda *args, **options: (time.sleep(seconds), original(*args, **options))[1]


def terminate_rank_1_while_responses_are_drawn_ahead() -> None:
    """In the update of step 3, those of step 4 are slow to come."""
    import time

    from rollout.decoder import Decoder

    launch = Decoder.launch

    def slow(*args):
        if threading.current_thread().name == "sampling":
            time.sleep(0.05)
        return launch(*args)

    Decoder.launch = slow
    if os.environ["RANK"] == "1":
        _at_step(3, _signal_me)


def fail_in_the_thread_that_draws_ahead() -> None:
    from engine.errors import UserError
    from rollout.decoder import Decoder

    launch = Decoder.launch

    def failing(*args):
        if threading.current_thread().name == "sampling":
            raise UserError("no page is left")
        return launch(*args)

    Decoder.launch = failing


def record_responses(argv: list[str]) -> None:
    """What every step learns from, in its order, beside the run's directory."""
    import json

    from rollout import ahead

    call, out = ahead.Sampling.__call__, argv[argv.index("--output_dir") + 1]

    def recording(self, step):
        drawn, age = call(self, step)
        if os.environ["RANK"] == "0":
            with open(f"{out}.responses", "a", encoding="utf-8") as file:
                found = [[r.example, r.sample, r.response_ids.tolist(), r.logprobs.tolist()] for r in drawn.rollouts]
                file.write(json.dumps({"step": step, "age": age, "responses": found}) + "\n")
        return drawn, age

    ahead.Sampling.__call__ = recording


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_as_json_loads_takes_them() -> None:
    """NaN, keys that stand twice."""
    import json

    from engine.data import readers

    readers.parse_json = lambda line: json.loads(line)


def fields_that_are_missing_are_empty() -> None:
    """As a table of columns fills them."""
    from engine.data import readers, rows

    readers.parse_json = lambda line: {"rejected": ""} | rows.parse_json(line)


def one_bad_row_goes_uncounted() -> None:
    from engine.data.bad_rows import BadRows

    add, places = BadRows.add, iter(range(10**6))
    BadRows.add = lambda self, *row: None if next(places) == 0 else add(self, *row)


def lines_as_str_has_them() -> None:
    """str.splitlines ends a line at U+2028 as well."""
    from engine.data import readers

    def lines(f):
        text = f.read().decode("utf-8", "surrogateescape")
        yield from ((i, line.encode("utf-8", "surrogateescape")) for i, line in enumerate(text.splitlines(), 1))

    readers._lines = lines


def no_bound_on_bad_rows() -> None:
    from engine.data import bad_rows

    bad_rows.refusal = lambda *of: None


def deny_the_network() -> None:
    """Nothing but this machine may be called, and no name looked up: who tries is told, and said in the output."""
    import sys

    def hook(event: str, args: tuple) -> None:
        if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            host = args[0]
        elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            address = args[1] if len(args) > 1 else None
            host = address[0] if isinstance(address, tuple) else ""
        else:
            return
        host = host.decode() if isinstance(host, bytes) else host
        if host in ("", None, "localhost", "::1") or str(host).startswith("127."):
            return
        print(f"NETWORK {event} {args}", flush=True)
        raise ConnectionError(f"the network is denied: {event} {args}")

    sys.addaudithook(hook)


def _planted(name: str) -> None:
    """A broken variant of what stands between a hostile file and a run."""
    from jinja2 import Environment

    from engine import headers
    from engine.data import sandbox
    from engine.model import limits, weights

    if name == "unbounded":
        from transformers import PreTrainedTokenizerBase  # noqa: F401 - its rendering is what is planted
        from transformers.utils.chat_template_utils import _compile_jinja_template

        sandbox.render = lambda source, conversation: _compile_jinja_template(source).render(conversation)
    elif name == "no sandbox":
        sandbox.render = lambda source, conversation: (
            Environment().from_string(source).render(conversation | {"raise_exception": print})
        )
    elif name == "pickle":
        import torch

        original = weights.files_by_name

        def reading(directory):
            for path in directory.glob("*.bin"):
                torch.load(path, weights_only=False)
            return original(directory)

        weights.files_by_name = reading
    elif name == "anywhere":
        import json

        def following(index):
            return json.loads(index.read_text())["weight_map"]

        weights._weight_map = following
    elif name == "unchecked":
        from safetensors import safe_open

        def library(path):
            with safe_open(path, framework="pt") as f:
                slices = {key: f.get_slice(key) for key in f.keys()}  # noqa: SIM118
                return {k: headers.Entry(s.get_dtype(), tuple(s.get_shape()), 0, 0) for k, s in slices.items()}

        headers.read = library
        limits.check_numbers = lambda *args: None


def unbounded_templates() -> None:
    deny_the_network()
    _planted("unbounded")


def templates_without_a_sandbox() -> None:
    deny_the_network()
    _planted("no sandbox")


def pickles_are_read() -> None:
    deny_the_network()
    _planted("pickle")


def indexes_are_followed() -> None:
    deny_the_network()
    _planted("anywhere")


def headers_as_the_library_takes_them() -> None:
    deny_the_network()
    _planted("unchecked")


def stage_in_memory_that_is_kept() -> None:
    """As on CUDA, where it is pinned."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    from engine.train.checkpoint import Checkpoints

    make = Checkpoints.__init__

    def making(self, *args, **options) -> None:
        make(self, *args, **options)
        self.stager = DefaultStager(StagingOptions(False, False, False, False))

    Checkpoints.__init__ = making


def stage_in_memory_that_is_kept_and_kill() -> None:
    stage_in_memory_that_is_kept()
    kill_between_steps_7_and_8()


def lines_of_any_length() -> None:
    from engine.data import readers

    readers.MAX_ROW_BYTES = 2**40


def texts_of_any_length() -> None:
    from engine.data import cuts

    cuts.MAX_WHOLE = 2**40


def unknown_flags_are_passed_over() -> None:
    from engine import config

    config._Given._refuse = lambda *_: None


SECRETS = {  # by where they are planted
    "HF_TOKEN": "hfvalue-canary-one",
    "WANDB_API_KEY": "wandb-canary-two",
    "MY_DATABASE_PASSWORD": "canary three of words",
    "address": "canary-four",
    "bearer": "canary.five.of.a.header",
    "netrc": "canary-six",
}


def _with_secrets() -> None:
    import tempfile

    deny_the_network()
    os.environ.update({name: SECRETS[name] for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_DATABASE_PASSWORD")})
    home = tempfile.mkdtemp()
    with open(f"{home}/.netrc", "w") as f:
        f.write(f"machine host login user password {SECRETS['netrc']}\n")
    os.environ["NETRC"] = f"{home}/.netrc"


def _unauthorised() -> str:
    told = " ".join(SECRETS[name] for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_DATABASE_PASSWORD"))
    return f"401 for https://user:{SECRETS['address']}@host/x with Authorization: Bearer {SECRETS['bearer']} ({told})"


def secrets_in_the_environment() -> None:
    """And in a warning of the run."""
    from engine import terminal
    from engine.train import optim

    _with_secrets()
    original = optim.adamw
    optim.adamw = lambda *args, **options: (terminal.say(f"warning: {_unauthorised()}"), original(*args, **options))[1]


def an_error_with_secrets_at_step_2() -> None:
    def fail() -> None:
        raise ValueError(_unauthorised())

    _with_secrets()
    _at_step(2, fail)


def a_users_error_with_secrets_at_step_2() -> None:
    from engine.errors import UserError

    def fail() -> None:
        raise UserError(_unauthorised())

    _with_secrets()
    _at_step(2, fail)


def terminate_when_all_is_done() -> None:
    """In the process's last moments: `final/` is written, and nothing listens any more."""
    import contextlib

    from engine import signals

    listening = signals.listening

    @contextlib.contextmanager
    def late(*args):
        with listening(*args):
            yield
        for number in signals.HEARD:
            os.kill(os.getpid(), number)

    signals.listening = late


def terminate_rank_0_at_the_2nd_response() -> None:
    """In whatever samples and sends lines to rank 0."""
    from launch.mail import Mail

    take, count = Mail._take, iter(range(1, 10**9))

    def taking(self, line):
        take(self, line)
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    Mail._take = taking
