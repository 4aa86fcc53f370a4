"""
Devices and processes: one process, or those that torchrun has started, on CUDA, CPU, PyTorch/XLA (Trainium) or
TorchNeuron. Notable: counts, losses and signals travel between processes by Gloo and never go to the device.
"""

import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from configurator import fail, fast_dtype, first_line, torch_device, under_torchrun
from pretrained import decoder_layers

rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if under_torchrun() else (0, 1)
host_group = None


@dataclass
class Processes:
    device: object  # of this process
    kind: str  # cpu, cuda, mps, neuron or xla
    dtype: str  # float32 or bfloat16, of the frozen weights and of matrix products
    rank: int = 0
    world: int = 1  # number of processes


def print0(line):
    """The first process prints; where nobody listens any more (Ctrl-C ends `| tee log` too) the run goes on."""
    if rank == 0:
        try:
            print(line, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")


def start(device, dtype, fsdp, gradient_accumulation_steps):
    """Sets up the device of a `device` setting and, under torchrun, the process group. Exits with one line where
    something is missing or does not go together."""
    global host_group
    if device == "trainium":
        if not (find_spec("torch_neuronx") and find_spec("torch_xla")):
            fail("device is trainium, which takes torch-neuronx on PyTorch/XLA: pip install -r "
                 "requirements-trainium.txt, on a Trn1, Trn1n or Trn2 instance (docs/trainium.md); with "
                 "TorchNeuron --device=neuron")
        os.environ.setdefault("PJRT_DEVICE", "NEURON")
    if device == "xla" and not find_spec("torch_xla"):
        fail("device is xla, which takes PyTorch/XLA: pip install torch==2.9.0 torch_xla==2.9.0")
    kind = "xla" if device in ("trainium", "xla") else torch_device(device).split(":")[0]
    dtype = dtype or fast_dtype(device)
    if dtype not in ("float32", "bfloat16"):
        fail(f"dtype is float32 or bfloat16, not '{dtype}'")
    p = Processes(torch_device(device) if kind != "xla" else None, kind, dtype)
    if under_torchrun():
        if kind == "cuda":
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                fail(f"there are more processes than GPUs ({torch.cuda.device_count()}) on this machine")
            p.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(p.device)
        if kind == "mps":
            fail("one mps device takes one process")
        if kind == "xla":
            import torch_xla.distributed.xla_backend  # noqa: F401 (registers "xla")
        dist.init_process_group({"cuda": "nccl", "neuron": "neuron", "xla": "xla"}.get(kind, "gloo"),
                                init_method="xla://" if kind == "xla" else None)
        host_group = dist.new_group(backend="gloo")
        p.rank, p.world = dist.get_rank(), dist.get_world_size()
        if p.world != world:
            fail(f"torchrun has started {world} processes, PyTorch/XLA sees {p.world}: its "
                 "devices cannot be split among them")
    if kind == "xla":
        import torch_xla.core.xla_model as xm
        import transformers.masking_utils
        p.device = xm.xla_device()
        # transformers would ask every mask whether it hides anything at all, which fetches it from the device
        transformers.masking_utils.is_tracing = lambda *_: True
    if fsdp and (kind == "xla" or p.world == 1):
        fail("fsdp=True takes several processes (torchrun), and a device other than trainium or xla")
    if gradient_accumulation_steps % p.world:
        fail(f"gradient_accumulation_steps={gradient_accumulation_steps} does not divide among {p.world} processes: "
             f"make it a multiple of {p.world}, and batch_size smaller for the same step")
    return p


def host_sum(numbers):
    """The sum of the numbers over all processes, which wait for one another."""
    numbers = torch.as_tensor(numbers, dtype=torch.float64)
    if world > 1:
        try:
            dist.all_reduce(numbers, group=host_group)
        except RuntimeError as e:  # another process has failed, and has said why
            sys.exit(f"process {dist.get_rank()} has lost the others: {first_line(e)}")
    return numbers


def share(x=None):
    """Waits for all processes. Returns the first one's x in each."""
    if world == 1:
        return x
    box = [x]
    try:
        dist.broadcast_object_list(box)
        dist.barrier()
    except RuntimeError:  # another process has failed, and has said why
        sys.exit(1)
    return box[0]


def run_script(name, **settings):
    """Runs another script of ours, by itself: not as one of torchrun's processes."""
    here = os.path.dirname(os.path.abspath(__file__))
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    subprocess.run([sys.executable, f"{here}/{name}", *(f"--{key}={value}" for key, value in settings.items())],
                   check=True, env=env)


def stop(message):
    """Ends every process, for what all of them have found; the first one says it."""
    fail(message) if rank == 0 else sys.exit(1)


def leave():
    """Ends this process."""
    if world > 1:
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # next to Gloo's threads an interpreter that shuts down now and then aborts
    sys.exit()


class Signals:
    """SIGTERM and Ctrl-C, which between listen() and restore() end a run after its step. A second Ctrl-C quits at once;
    under torchrun, which sends several, none does."""

    name = None

    def listen(self):
        signal.signal(signal.SIGTERM, self.take)
        signal.signal(signal.SIGINT, self.take)

    def take(self, number, _):
        self.name = signal.Signals(number).name
        if rank == 0:
            with suppress(BrokenPipeError):
                os.write(1, f"{self.name}: finishing the step\n".encode())  # print() may be at work itself
        if world == 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def caught(self):
        """Whether any process has got one; all have to ask."""
        return host_sum(self.name is not None) > 0

    def until_caught(self, items):
        """Yields the items, of which all processes have as many, until one of them has got a signal."""
        for item in items:
            if self.caught():
                return
            yield item

    def restore(self):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class StepLosses:
    """Losses and gradient norms of training steps. They stay on the device until fetch(), which on XLA ends the graph.
    window: their sums since the last line of the log, which a checkpoint keeps."""

    def __init__(self, names, processes):
        self.names, self.rank, self.world, self.unfetched = names, processes.rank, processes.world, []
        self.clear_window()

    def clear_window(self):
        self.window = dict(sums=torch.zeros(len(self.names), dtype=torch.float64), steps=0)

    def add(self, step, losses, norm):
        """losses (micro-batches, names) of this process, norm of the whole gradient."""
        self.unfetched.append((step, losses, norm))

    def fetch(self):
        """Adds the steps since the last call to the window. Returns (step, losses (processes, micro-batches, names),
        norm) of the first that is not finite, which does not count, else None."""
        bad = None
        for step, mine, norm in self.unfetched:
            losses = torch.zeros(self.world, *mine.shape, dtype=torch.float64)
            losses[self.rank] = mine.cpu()
            losses, norm = host_sum(losses) / self.world, norm.item()
            if math.isfinite(norm) and losses.isfinite().all():
                self.window["sums"] += losses.sum(dim=(0, 1))
                self.window["steps"] += 1
                self.window["grad_norm"] = norm
            else:
                bad = bad or (step, losses, norm)
        self.unfetched.clear()
        return bad

    def means(self):
        """{name: mean of the window's steps}, and the last gradient norm; {} when no step counts."""
        n = self.window["steps"]
        means = {name: value / n for name, value in zip(self.names, self.window["sums"].tolist())} if n else {}
        return means | {"grad_norm": self.window["grad_norm"]} if n else {}


def backbones(model):
    """The transformers within a ScaleDown model: the generator and those that its compressor is made of."""
    return [model.generator, *(m for m in model.compressor.children() if isinstance(m, PreTrainedModel))]


def place(model, processes, fsdp):
    """Moves a ScaleDown model to the device. fsdp: spreads all parameters over the processes' devices (FSDP2). Every
    decoder layer is gathered when it is used and released after it (with gradient checkpointing; without, autocast's
    bfloat16 copies of trained weights stay until the backward pass); what is no layer (embeddings, head, projection) is
    gathered for the whole pass."""
    if not fsdp:
        model.to(processes.device)
    else:
        mesh = dist.device_mesh.init_device_mesh(processes.kind, (processes.world,))
        for layer in chain(*map(decoder_layers, backbones(model))):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(model, "generate")
    if processes.kind == "xla":  # autocast knows no other attention there
        for backbone in backbones(model):
            backbone.set_attn_implementation(backbone.config._attn_implementation.replace("sdpa", "eager"))


def enable_gradient_checkpointing(model, kind="cpu"):
    """Recomputes activations in the backward pass: less memory, about a third more time. Exits with one line for a
    compressor that reads with the generator's own layers, which would be computed again with the wrong adapter."""
    if getattr(model.compressor, "shares_generator", False):
        fail(f"gradient_checkpointing=True does not go with compressor_type={model.config.compressor_type}")
    if kind == "xla":
        from torch_xla.utils.checkpoint import checkpoint
    else:
        checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    for backbone in backbones(model):
        backbone._set_gradient_checkpointing(gradient_checkpointing_func=checkpoint)


def whole_state(model, optimizer):
    """What is trained, and the optimiser's state (None before its first step), whole and on the CPU, however FSDP2 has
    spread them. Every process has to call it."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    # asked for its state before its first step, torch would make that step
    moments = get_optimizer_state_dict(model, optimizer, options=whole) if optimizer.state else None
    return get_model_state_dict(model, options=whole), moments


def load_optimizer_state(model, optimizer, state):
    """What whole_state() has returned, on this run's device and processes."""
    if state:
        for group, own in zip(state["param_groups"], optimizer.param_groups):
            group.update({name: value for name, value in own.items() if name != "params"})  # fused is this device's
        # strict would refuse a parameter of the user's own compressor that has had no gradient yet
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(model, optimizer, state, options=options)
