"""
A model's checkpoint, and the checkpoints of a training run,

    out_dir/last       what --init_from=resume goes on from
    out_dir/previous   the one before it, used when last/ is damaged
    out_dir/best       that of the lowest validation loss, without what only resuming needs
    out_dir/damaged    a last/ that was found damaged, put aside

A checkpoint holds config.json (settings, fingerprints of the frozen models, the prompt), compressor.safetensors, the
LoRA in PEFT's format, SHA256SUMS and, in last/ and previous/, optimizer.pt. The frozen generator is not copied.
"""

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configurator import fail, first_line
from distributed import print0
from files import file_sha256, must_fit, read_json, read_tensors, replacing, replacing_folder
from lora import load_lora, save_lora
from pretrained import ModelError, note

# ---- a model's checkpoint


def save_weights(model, folder, tensors=None):
    """Writes config.json, compressor.safetensors and the LoRA in PEFT's format; not the frozen generator. tensors: see
    ScaleDown.save()."""
    tensors = tensors or dict(model.named_parameters())
    tensors = {name: tensors[name] for name, p in model.named_parameters() if p.requires_grad}  # no buffers
    adapter = {name.removeprefix("generator."): t for name, t in tensors.items() if name.startswith("generator.")}
    save_lora(model.generator, folder, model.config.generator, adapter)
    tensors = {name: t.detach().cpu() for name, t in tensors.items() if not name.startswith("generator.")}
    save_file(tensors, f"{folder}/compressor.safetensors")
    with open(f"{folder}/config.json", "w") as f:
        json.dump({**asdict(model.config), **{f"{part}_identity": x for part, x in model.identities.items()},
                   "prompt": model.kept_prompt}, f, indent=2)


def load_weights(model, folder):
    """Loads the weights of a checkpoint into a model, and the prompt that they were trained with; RR stays as it is
    where the checkpoint has none, and of a checkpoint of another mode the LoRA is all that is loaded. Raises ValueError
    when they are of another backbone, of other sizes or another lora_alpha, OSError when there is no checkpoint."""
    saved, settings = read_config(folder, type(model.config))
    for part, now in model.identities.items():
        then = saved[f"{part}_identity"]
        # a compressor has one where its backbone is frozen; of older checkpoints only the sizes can be compared
        if then and now and any(then[key] != now[key] for key in then.keys() & now.keys()):
            raise ValueError(f"the checkpoint {folder} was trained with another {part}: its is {then}, this is {now}")
    c = model.config
    same_mode = settings["mode"] == c.mode
    must_equal = ["lora_alpha", "prompt_style"]
    if same_mode:
        must_equal += ["compressor_layout", "sep_after_last"] + ["compressor_norm"] * (c.compressor_type == "n_layers")
    for name in must_equal:
        if settings[name] != getattr(c, name):
            raise ValueError(f"the checkpoint {folder} was trained with {name}={settings[name]}, this is "
                             f"{getattr(c, name)}")
    if same_mode:
        path = f"{folder}/compressor.safetensors"
        tensors = read_tensors(path)
        # a released compressor has embeddings of its own, and so has one of ours from before they were frozen
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or name in tensors)
        own = {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("generator.")}
        if not settings["enable_reranking"]:
            own = {name: p for name, p in own.items() if not name.startswith(("compressor.rr_", "compressor.score_"))}
        must_fit(path, tensors, own)
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(tensors[name])
    else:
        note(f"{folder} was trained with mode={settings['mode']}: of it only the LoRA is loaded")
    load_lora(model.generator, folder)
    if saved["prompt"]:
        model.use_prompt(saved["prompt"])
    if saved["prompt"] != model.template_prompt:
        template = f"prompt.py and the chat template of {model.config.generator}"
        note(f"{folder} was trained with another prompt than {template} write now: its own is used"
             if saved["prompt"] else f"{folder} was made before prompts were kept: its prompt is taken from {template}")


def read_config(folder, config_class):
    """config.json of a checkpoint -> the dict that it is, and the settings in it. Settings that are younger than the
    checkpoint have their default. Raises OSError, ValueError."""
    path = f"{folder}/config.json"
    if not os.path.isfile(path):
        hint = (f"; {os.path.join(folder, 'best')} holds one" if os.path.isfile(f"{folder}/best/config.json") else
                ": python train.py config/toy.py makes the toy" * path.startswith("out/toy/"))
        raise FileNotFoundError(f"{folder} holds no checkpoint: {path} does not exist{hint}")
    saved = read_json(path)
    defaults, others = asdict(config_class()), {"generator_identity", "compressor_identity", "prompt"}
    if "generator_identity" not in saved or saved.keys() - defaults - others:
        raise ValueError(f"{path} is not the config.json of a ScaleDown checkpoint")
    return dict.fromkeys(others) | saved, {name: saved.get(name, default) for name, default in defaults.items()}


def find_folders(config, out_dir):
    """Makes the models' folders, whose paths count from where the training was started, paths from here."""
    for name in ("generator", "compressor_model"):
        path = getattr(config, name)
        above = (folder / path for folder in Path(out_dir).resolve().parents if (folder / path).is_dir())
        if not os.path.isdir(path):
            setattr(config, name, str(next(above, path)))
    return config


def open_checkpoint(model_class, config_class, folder, device, dtype, overrides):
    """A model from its checkpoint; see ScaleDown.from_pretrained()."""
    saved, settings = read_config(folder, config_class)
    config = find_folders(config_class(**{**settings, **overrides}), folder)
    dtype = dtype or (torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
    try:
        model = model_class(config, dtype, saved["prompt"])
    except ModelError as e:
        moved = "" if os.path.isdir(config.generator) else " (--generator=FOLDER says where it lies now)"
        raise ModelError(f"{e}{moved}") from e
    model.load(folder)
    for p in model.parameters():  # not .to(dtype): it would round the rotary embeddings' frequencies too
        p.data = p.data.to(dtype)
    return model.to(device).eval()


# ---- the checkpoints of a training run

# what may change when a run is resumed: data as long as its contents are the same, batch_size and
# gradient_accumulation_steps as long as their product is
MAY_DIFFER = {*"""out_dir init_from eval_only eval_interval eval_examples eval_samples log_interval sample_at_end
    wandb_log wandb_project wandb_run_name train_data val_data generator compressor_model gradient_checkpointing
    batch_size gradient_accumulation_steps epochs max_iters skip_nonfinite device dtype compile fsdp
    peak_tflops""".split(), "sha256 of val_data"}


def may_differ(run):
    """Names of settings that may be others when a run, with these settings, is resumed or evaluated."""
    return MAY_DIFFER | ({"num_layers", "compressor_norm"} if run["compressor_type"] == "modernbert" else
                         {"projection_hidden"}) | (set() if run["enable_reranking"] else {"rerank_lambda"})


def damage(checkpoint):
    """What is wrong with the files of a checkpoint; None when they are those that were written."""
    try:
        if not os.path.isdir(checkpoint):
            return "is missing"
        with open(f"{checkpoint}/SHA256SUMS") as f:
            sums = {line[66:-1]: line[:64] for line in f}
        return next((f"{name} is not as it was written" for name in
                     ("adapter_config.json", "adapter_model.safetensors", "compressor.safetensors", "config.json",
                      "optimizer.pt") if file_sha256(f"{checkpoint}/{name}") != sums.get(name)), None)
    except (ValueError, OSError) as e:
        return str(e)


class Checkpoints:
    """The checkpoints in out_dir. step: that of last/, as far as this run has written or read one."""

    def __init__(self, out_dir):
        if os.path.exists(out_dir) and not os.path.isdir(out_dir):
            fail(f"out_dir={out_dir} is not a folder")
        self.out_dir, self.step, self.metrics, self.lock_file = out_dir, 0, f"{out_dir}/metrics.jsonl", None
        self.went_back = False  # to the previous checkpoint, which best/ may be newer than
        self.last, self.previous, self.best, self.damaged = (
            f"{out_dir}/{name}" for name in ("last", "previous", "best", "damaged"))

    def must_not_exist(self):
        if any(map(os.path.isdir, (self.last, self.previous, self.best))):
            fail(f"{self.out_dir} holds a run already: --init_from=resume goes on with it; for a new one choose "
                 "another --out_dir or remove the folder")

    def describe(self):
        if not self.step:
            return "no checkpoint was written yet"
        return f"{self.last} holds the checkpoint of step {self.step:,}"

    def compare_model(self, config, config_class):
        """Fails where the checkpoint in out_dir itself, which is to be evaluated, has other settings of the model."""
        for name, value in read_config(self.out_dir, config_class)[1].items():
            if name not in may_differ(config) and value != config[name]:
                fail(f"the checkpoint {self.out_dir} has {name}={value}, this run {name}={config[name]}")
        print0(f"evaluating {self.out_dir}")

    def read_state(self, run, defaults):
        """What save() has kept of a run, to go on with. run: the settings of this one; defaults: those that settings
        younger than the checkpoint had. Says which differ, and fails for those that decide what is trained."""
        state = torch.load(f"{self.last}/optimizer.pt", map_location="cpu", weights_only=True)
        saved = {**defaults, "sha256 of val_data": run["sha256 of val_data"], **state["run"]}
        differs = {name: f"{name}={saved.get(name)} (now {value})" for name, value in run.items()
                   if value != saved.get(name)}
        if wrong := [text for name, text in differs.items() if name not in may_differ(run)]:
            fail(f"{self.last} was trained with {', '.join(wrong)}: resume with its settings, or choose another "
                 "out_dir")
        differs.pop("init_from", None)
        if differs:
            print0(f"not as in {self.last}: {', '.join(differs.values())}")
        if {"sha256 of val_data", "eval_examples"} & differs.keys():
            print0("validation is on other examples: best/ is what is best on them from here on")
            state["best_val_loss"] = float("inf")
        return state

    def recover(self):
        """Sees to it that the checkpoint in last/ is whole: the previous one takes the place of a damaged one."""
        if not os.path.isdir(self.last) and not os.path.isdir(self.previous):
            fail(f"{self.out_dir} holds no checkpoint to resume from")
        self.lock()  # a run that still lives may be about to write last/
        if wrong := damage(self.last):
            if damage(self.previous):
                fail(f"{self.last}: {wrong}; {self.previous}: {damage(self.previous)}: nothing to resume from")
            if os.path.isdir(self.last):
                shutil.rmtree(self.damaged, ignore_errors=True)
                os.rename(self.last, self.damaged)
                self.went_back = True
            os.rename(self.previous, self.last)
            print0(f"{self.last}: {wrong}: the previous checkpoint is used")

    def lock(self):
        """Keeps other processes out of out_dir until this one ends."""
        if self.lock_file:
            return
        self.lock_file = open(f"{self.out_dir}/.lock", "a")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # such as one that outlived a torchrun that was killed
            fail(f"another train.py is at work in {self.out_dir}")
        except OSError as e:
            print0(f"{self.out_dir} cannot be locked ({e.strerror}): see to it that no other train.py works in it")

    @contextmanager
    def writing(self, what, step):
        """A full disk and its like: one line that says which checkpoint is left."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as e:  # torch.save raises RuntimeError for a failed write
            shutil.rmtree(f"{self.last}.tmp", ignore_errors=True)
            shutil.rmtree(f"{self.best}.tmp", ignore_errors=True)
            while e.__context__:  # torch.save hides the reason in errors of its own
                e = e.__context__
            fail(f"step {step:,}: {what} could not be written: {first_line(e)}; {self.describe()}")

    def save(self, model, tensors, state):
        """Writes last/: the model with `tensors` (see ScaleDown.save()) and optimizer.pt with `state`."""
        with self.writing("the checkpoint", state["step"]), replacing_folder(self.last, self.previous) as folder:
            model.save(folder, tensors)
            with open(f"{folder}/optimizer.pt", "wb") as f:
                torch.save(state, f)

    def copy_to_best(self):
        """best/ as the checkpoint in last/, but for what is only there to resume from."""
        with self.writing("best/", self.step), replacing_folder(self.best) as folder:
            # copyfile, for some file systems know no permissions
            for name in {*os.listdir(self.last)} - {"optimizer.pt", "SHA256SUMS"}:
                shutil.copyfile(f"{self.last}/{name}", f"{folder}/{name}")

    def open(self, step, is_best):
        """Makes the folder ready for a run that goes on after `step`. is_best: whether last/ is to be in best/, too."""
        with self.writing("the folder", step):
            os.makedirs(self.out_dir, exist_ok=True)
            self.lock()
            if is_best and not (self.went_back and os.path.isdir(self.best)):
                self.copy_to_best()  # it may have been killed when it was about to
            kept = []
            if step > 0 and os.path.isfile(self.metrics):  # what came after the checkpoint is said again
                with open(self.metrics, errors="replace") as f:
                    kept = [line for line in f if line.endswith("\n") and step_of(line) <= step]
            with replacing(self.metrics, "w") as f:
                f.writelines(kept)

    def log(self, entry, step):
        """Adds a line to metrics.jsonl, on the disk before any checkpoint that it leads to."""
        with self.writing("metrics.jsonl", step), open(self.metrics, "a") as f:
            f.write(json.dumps(entry) + "\n")
            f.flush()
            os.fsync(f.fileno())


def step_of(line):
    """The step of a line of metrics.jsonl; of what a crash has left of a line, none that is kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
