"""Tokens a second of LoRA on a transformer: a batch of clients, and one after another.

python -m benchmarks.language [--turns 5] [--threads 1] [--memory]

Each client does one SGD step, on rows of its own, of the adapters of rank 8 on all
linear layers of the blocks of a GPT. Contenders take turns; medians and their ratios
are printed. Every one gets the same numbers of layers, units, clients and tokens.

    batched         fedcore: all clients in one batch, from a recording
    one by one      fedcore: the same step, one client after another, as written
    peft            transformers + peft, the plain loop: PyTorch's autograd and SGD
    peft, batched   fedcore with that model

With --memory the largest resident set of a process that trains so many clients at once.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional

from benchmarks.tables import print_head, print_row
from fedcore import Examples, FederatedData, Task
from fedcore.local import local_sgd, steps_run_by
from fedcore.models.gpt import Gpt
from fedcore.models.huggingface import HuggingFace
from fedcore.models.lora import LoraSettings, with_lora
from fedcore.models.text import TextShape
from fedcore.speed.recording import Recorder
from fedcore.token_metrics import next_token_loss, num_targets
from fedcore.types import Batches, Params

VOCABULARY, RANK, STEP = 65, 8, 0.1
WARM_UP = 2  # turns that do not count
OURS = ("qkv", "proj", "fc1", "fc2")
THEIRS = ("c_attn", "c_proj", "c_fc")
CLIENTS = (10, 50, 100)  # whose memory is measured


class Size(NamedTuple):
    """Clients, rows of each, tokens of a row, units and layers of the model."""

    clients: int
    rows: int
    length: int
    width: int
    layers: int

    @property
    def tokens(self) -> int:
        return self.clients * self.rows * self.length

    @property
    def heads(self) -> int:
        return max(self.width // 32, 1)


SIZES = [
    Size(8, 1, 32, 128, 4),
    Size(32, 1, 32, 128, 4),
    Size(32, 2, 32, 64, 2),
    Size(8, 4, 64, 128, 4),
]

Turn = Callable[[], object]
"""One step of every client."""


class Clients:
    """The same random text for all contenders."""

    def __init__(self, size: Size) -> None:
        draw = torch.Generator().manual_seed(0)
        shape = (size.clients * size.rows, size.length + 1)
        ids = torch.randint(0, VOCABULARY, shape, generator=draw)
        self.size, self.x, self.y = size, ids[:, :-1].clone(), ids[:, 1:].clone()
        self.shape = TextShape(VOCABULARY + 1, size.length, VOCABULARY)

    def task(self, model: torch.nn.Module) -> Task:
        clients, rows = self.size.clients, self.size.rows
        examples = Examples(self.x, self.y)
        offsets = np.arange(clients + 1) * rows
        data = FederatedData(examples, examples, np.arange(len(self.x)), offsets)
        return Task(model, data, next_token_loss, size=num_targets)

    def batches(self) -> Batches:
        """One batch a client, [clients, 1, rows, ...]."""
        shape = (self.size.clients, 1, self.size.rows)
        x, y = self.x.unflatten(0, shape), self.y.unflatten(0, shape)
        return Batches(x, y, torch.ones(shape))


def our_model(clients: Clients) -> torch.nn.Module:
    size = clients.size
    model = Gpt(width=size.width, layers=size.layers, heads=size.heads)
    lora = LoraSettings(rank=RANK, targets=OURS)
    return with_lora(model.build_text(clients.shape), lora)


def their_model(clients: Clients) -> torch.nn.Module:
    """The same sizes, as transformers and peft have them, for fedcore."""
    size = clients.size
    config = {"model_type": "gpt2", "n_embd": size.width, "n_layer": size.layers}
    model = HuggingFace(config={**config, "n_head": size.heads})
    lora = LoraSettings(rank=RANK, targets=THEIRS)
    return with_lora(model.build_text(clients.shape), lora)


def batched(clients: Clients, model: torch.nn.Module) -> Turn:
    """Clients whose parameters differ, as in all local steps but the first."""
    task, batches, recorder = clients.task(model), clients.batches(), Recorder("loss")
    own: Params = {}
    for name, value in task.init_params().items():
        own[name] = value.expand(clients.size.clients, *value.shape).clone()

    def step(params: Params, batches: Batches) -> Params:
        return local_sgd(task.loss, params, batches, STEP).params

    def turn() -> Params:
        with steps_run_by(recorder):
            outputs: Params = vmap(step)(own, batches)
        return outputs

    turn()
    (recording,) = recorder._recordings.values()
    if recording.code is None:
        raise RuntimeError("the step is not recorded")
    return turn


def one_by_one(clients: Clients, model: torch.nn.Module) -> Turn:
    task, (x, y, mask) = clients.task(model), clients.batches()
    params = task.init_params()

    def turn() -> None:
        for i in range(clients.size.clients):
            local_sgd(task.loss, params, Batches(x[i], y[i], mask[i]), STEP)

    return turn


def plain_peft(clients: Clients, attention: str) -> Turn:
    """transformers and peft alone, as their users write it."""
    import peft
    import transformers

    size = clients.size
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY + 1,
        n_positions=size.length,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    base = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention
    )
    lora = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(THEIRS),
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model: Any = peft.get_peft_model(base, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, STEP)
    x, y, _ = clients.batches()

    def turn() -> None:
        for i in range(size.clients):
            with torch.no_grad():
                for parameter, value in zip(trained, start, strict=True):
                    parameter.copy_(value)
            optimizer.zero_grad()
            logits: Tensor = model(input_ids=x[i, 0], use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), y[i, 0].flatten())
            loss.backward()
            optimizer.step()

    return turn


def contenders(size: Size) -> dict[str, Turn]:
    torch.manual_seed(0)
    clients = Clients(size)
    ours, theirs = our_model(clients), their_model(clients)
    return {
        "batched": batched(clients, ours),
        "one by one": one_by_one(clients, ours),
        "peft (sdpa)": plain_peft(clients, "sdpa"),
        "peft (eager)": plain_peft(clients, "eager"),
        "peft, batched": batched(clients, theirs),
        "peft, one by one": one_by_one(clients, theirs),
    }


def medians(turns: dict[str, Turn], count: int) -> dict[str, float]:
    """Seconds of each contender's turn; they take turns."""
    # On one thread that of its own work, whatever else the machine does.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(WARM_UP + count):
        for name, turn in turns.items():
            begin = clock()
            turn()
            if i >= WARM_UP:
                seconds[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_speed(turns: int) -> None:
    names = list(contenders(Size(1, 1, 8, 32, 1)))
    gains = ["batched / peft", "peft, batched / peft"]
    print_head(["clients x rows x tokens, model", *names, *gains])
    for size in SIZES:
        seconds = medians(contenders(size), turns)
        speeds = [f"{size.tokens / seconds[name]:,.0f}" for name in names]
        # Against the faster of the two kinds of attention.
        rival = min(seconds["peft (sdpa)"], seconds["peft (eager)"])
        ratios = [rival / seconds["batched"], rival / seconds["peft, batched"]]
        label = f"{size.clients} x {size.rows} x {size.length}, "
        label += f"{size.width} x {size.layers}"
        print_row([label, *speeds, *(f"{ratio:.1f}" for ratio in ratios)])
    print(flush=True)


def print_memory() -> None:
    """The largest resident set, of a process each, so that none sees another's."""
    print_head(["clients at once", "MB above an idle process", "MB a client"])
    idle = _peak(0)
    for count in CLIENTS:
        used = _peak(count) - idle
        print_row([str(count), f"{used:.0f}", f"{used / count:.1f}"])
    print(flush=True)


def _peak(clients: int) -> float:
    """MB of a process that trains so many clients in one batch."""
    command = [sys.executable, "-m", "benchmarks.language", "--peak", str(clients)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(clients: int) -> None:
    """For `_peak`: without clients the model alone is made."""
    size = Size(max(clients, 1), 1, 32, 128, 4)
    made = Clients(size)
    model = our_model(made)
    if clients:
        turn = batched(made, model)
        turn()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    words = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(words.threads)
    if words.peak is not None:
        print_peak(words.peak)
    elif words.memory:
        print_memory()
    else:
        print_speed(words.turns)


if __name__ == "__main__":
    main()
