"""
Overrides a script's settings, nanoGPT's way: its module-level globals are the settings, and

    python train.py config/toy.py --batch_size=16

first runs config/toy.py and takes the globals it sets, then the --key=value arguments, in the order given.
Unlike nanoGPT's configurator an unknown key or a value of another type is an error that names the nearest setting, and
--help prints the settings, as the other arguments leave them, with their comments.
"""

import ast
import difflib
import os
import sys
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch

# huge pages, with which a training step on a CPU takes up to a tenth less time; torch reads it at its first tensor
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def fail(message):
    """Bad input: one clear line on stderr, exit status 1."""
    sys.exit(f"error: {message}")


def configure(settings, argv=None):
    """Applies argv (default: the command line) to `settings`, a script's globals(), in place.

    Settings are the globals of type int, float, bool and str whose names do not begin with "_"; an override must have
    the setting's type (an int is taken for a float).
    Returns {name: value} of all settings. Exits with one line on an unknown setting, a wrong type or a missing file.
    """
    names = [k for k, v in settings.items() if not k.startswith("_") and type(v) in (int, float, bool, str)]

    def override(name, value, where):
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            fail(f"{where}: unknown setting '{name}'"
                 + (f", did you mean '{near[0]}'?" if near else ": the settings stand at the top of the script"))
        wanted = type(settings[name])
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            fail(f"{where}: {name} takes a value of type {wanted.__name__}, not {value!r}")
        if wanted is int and not -2**63 <= value < 2**63:
            fail(f"{where}: {name}={value} has more than 64 bits")
        settings[name] = os.path.expanduser(value) if wanted is str else value  # no shell does it after a "="

    argv = sys.argv[1:] if argv is None else argv
    for arg in argv:
        if arg in ("-h", "--help"):
            continue
        try:
            arg.encode()
        except UnicodeEncodeError:
            fail(f"{ascii(arg)} is not UTF-8")
        if not arg.startswith("-"):
            path = os.path.expanduser(arg)
            if not os.path.isfile(path):  # started from another folder: the script's own configs are meant
                path = os.path.join(os.path.dirname(settings.get("__file__", "")), path)
            if not os.path.isfile(path):
                fail(f"config file {arg} does not exist (a setting is written --name=value)")
            scope = run_config(path, arg)
            for name, value in scope.items():
                if not name.startswith("_") and not isinstance(value, ModuleType) and not callable(value):
                    override(name, value, arg)
        else:
            if not arg.startswith("--") or "=" not in arg:
                fail(f"'{arg}': a setting is written --name=value; they stand at the top of the script")
            name, text = arg[2:].split("=", 1)
            value = text
            if type(settings.get(name)) is not str:
                try:
                    value = ast.literal_eval(text)
                except (SyntaxError, ValueError, TypeError):
                    pass  # stays a string, which override() refuses with the type it wanted
            override(name, value, arg)
    if {"-h", "--help"} & {*argv}:
        print_help(settings)
        sys.exit()
    return {name: settings[name] for name in names}


def run_config(path, name):
    """The globals of a config file, which may import its neighbours. name: as the user wrote it."""
    scope = {"__file__": path, "__name__": "config"}
    folder, modules = os.path.dirname(os.path.abspath(path)), {*sys.modules}
    sys.path.insert(0, folder)
    try:
        with open(path, encoding="utf-8-sig") as f:
            tree = ast.parse(f.read(), path)
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and node.value is None:
                fail(f"config file {name}, line {node.lineno}: '{ast.unparse(node)}' sets nothing: a setting is "
                     "written name = value")
        exec(compile(tree, path, "exec"), scope)
    except Exception as e:
        fail(f"config file {name}: {type(e).__name__}: {' '.join(str(e).split())}")
    finally:
        sys.path.remove(folder)
        for module in {*sys.modules} - modules:  # another config's neighbour may have the same name
            if os.path.dirname(getattr(sys.modules[module], "__file__", None) or "") == folder:
                del sys.modules[module]
    return scope


def print_help(settings):
    """A script's first lines and its settings, which stand between two lines of dashes, with their comments."""
    print(settings["__doc__"])
    with open(settings["__file__"], encoding="utf-8") as f:
        _, block, _ = f.read().split("# " + "-" * 77 + "\n")
    for line in block.splitlines():
        name, is_setting, rest = line.partition(" = ")
        if is_setting and not line.startswith("#"):
            _, _, comment = rest.partition("  # ")
            line = f"  --{name}={settings[name]}".ljust(40) + f"  {comment}"
        print(line.rstrip())


def first_line(error):
    """An exception in one line: its first line with words, after its type unless it is one that speaks to users."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = " ".join(lines[:3] if lines and lines[0].endswith(":") else lines[:1])
    return line if isinstance(error, (ValueError, OSError)) and line else f"{type(error).__name__}: {line}"


@contextmanager
def fail_on(*errors):
    """Within it an error of these classes ends the script, with its first line."""
    try:
        yield
    except errors as e:
        fail(first_line(e))


def under_torchrun():
    """Whether torchrun has started this process. Other launchers set some of its variables, too."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def import_or_fail(name, setting):
    """A module that only one setting needs. Exits with one line when it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        fail(f"{setting} needs {name}: pip install {name}")


def at_least(settings, **least):
    """Exits with one line when one of the named settings is smaller than the number given for it."""
    for name, number in least.items():
        if settings[name] < number:
            fail(f"{name} must be at least {number}, not {settings[name]}")


def torch_device(name):
    """The torch name of a device setting (gpu is cuda). Exits with one line when there is no such device here."""
    name = {"gpu": "cuda"}.get(name, name)
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps", "neuron"):
        fail(f"device is cpu, cuda (gpu), mps, neuron or, for train.py, trainium or xla, not '{name}'")
    if kind == "cuda" and not torch.cuda.is_available() or kind == "mps" and not torch.backends.mps.is_available():
        fail(f"device is {name}, but torch finds none")
    if kind == "neuron" and not (hasattr(torch, "neuron") and torch.neuron.is_available()):
        fail("device is neuron, but torch finds none: that takes a Trn2 or Trn3 instance and TorchNeuron, which is "
             "torch-neuronx 2.13 or later (docs/trainium.md); on Trn1 --device=trainium")
    return name


def fast_dtype(device):
    """bfloat16 on a device that multiplies it faster than float32 (CUDA, Trainium, a CPU with AMX or AVX512-BF16), else
    float32."""
    amx = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    fast = device.split(":")[0] in ("cuda", "gpu", "neuron", "trainium") or device == "cpu" and amx
    return "bfloat16" if fast else "float32"


def attention_for_training(device, dtype, config, num_documents):
    """On a CPU in bfloat16 the backward pass of torch's fused attention is slower than that of matrix products and a
    softmax, which are chosen there for sequences of up to 1,024 positions: they keep L x L numbers a head and layer."""
    read = num_documents * (config.doc_tokens if config.mode == "full" else config.num_memory_tokens + 1)
    longest = config.query_tokens + config.answer_tokens + max(config.doc_tokens, read)
    plain = device == "cpu" and dtype == "bfloat16" and longest <= 1024
    torch.backends.cuda.enable_flash_sdp(not plain)  # these switches are the CPU's, too
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain)
