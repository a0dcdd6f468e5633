"""Stage 1: SpidR pretraining from raw audio, with or without interleaved supervision (SpidR; SpidR-Adapt,
"multi-task pretraining": [SSL] without, [SSL/SL] with --alignments).

    python pretrain.py                                              the toy world, the tiny preset: minutes on a laptop
    torchrun --nproc_per_node=16 pretrain.py --manifest train.csv   the paper's run: 400,000 steps of 16 x 237.5 s

Writes to --out: config.json, metrics.jsonl, last.pt, step_N.pt. The same command again resumes, bit for bit on a CPU.
A healthy run: the loss falls, target_ppl dips and recovers. Collapse: target_ppl falls toward 1 and stays.
"""

import argparse
import inspect
import itertools
import json
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import model as spidr
from model import Config, InputError, SpidR, all_sum, require

# ======== options ========


@dataclass
class Options:
    """The papers' numbers. A comment is also the option's help."""

    preset: str = ""  # base or tiny; the one of --init's size; without, base with a manifest or audio, tiny without
    manifest: str = ""  # CSV, TSV or folder of audio; without one: the toy world and the tiny preset
    alignments: str = ""  # phone alignments: turns on interleaved supervision
    valid: str = ""  # a manifest to report the loss on
    init: str = ""  # a run or a checkpoint to start from; without one: random weights
    out: str = "runs/pretrain"  # the run's folder
    toy: str = "runs/toy"  # where the toy world is written
    seed: int = 0  # of the weights, the order, the crops and the masks
    steps: int = 400_000  # optimizer steps; the schedule below is stretched along unless it is given too
    lr: float = 5e-4  # peak learning rate
    lr_floor: float = 0.01  # part of the peak that warm-up starts from and decay ends at
    warmup_steps: int = 12_000  # linear warm-up
    hold_steps: int = 188_000  # at the peak
    decay_steps: int = 200_000  # exponential decay
    freeze_step: int = 200_000  # from this step on the downsampler and the projection are frozen
    betas: tuple = (0.9, 0.95)  # AdamW
    eps: float = 1e-6  # AdamW
    weight_decay: float = 0.01  # AdamW, on everything
    clip: float = 10.0  # gradient norm
    batch_samples: int = 3_800_000  # at most so many samples in a micro-batch (237.5 s)
    max_samples: int = 320_000  # longest crop (20 s)
    min_samples: int = 2_000  # shortest recording
    crop_multiple: int = 1_600  # crops are cut to a multiple: fewer shapes, so compiled graphs are reused
    mask_prob: float = 0.8  # masked spans x span / frames
    mask_span: int = 10  # frames in a span
    supervised_every: int = 10  # every so many steps one is supervised instead, if there are alignments; 0: none
    supervised_layer: int = 8  # whose output the phoneme classifiers read
    accumulate: int = 1  # micro-batches a step and rank: ranks x accumulate makes the global batch
    device: str = ""  # cuda, cuda:1, mps, cpu; the best there is unless given
    bf16: bool = True  # bfloat16 autocast, on GPUs
    compile: bool = False  # torch.compile
    loaders: int = 2  # processes that read audio, for each rank
    log_every: int = 100  # steps
    save_every: int = 1_000  # steps between checkpoints (last.pt)
    keep_every: int = 50_000  # steps between checkpoints that are kept (step_N.pt)
    restart: bool = False  # move a run of other options aside and start over
    benchmark: int = 0  # time so many steps on random audio, print one JSON line, write nothing


# tiny departs from the papers in numbers only, so that minutes show something: small steps (four crops of 8 s each) at
# a higher rate, shorter spans, and a supervised step in three instead of ten, on layer 3 of 4. (With half the batch
# few codewords live: target_ppl 14 instead of 21.)
PRESETS = {
    "base": {},
    "tiny": dict(steps=1200, lr=1.5e-3, lr_floor=0.05, warmup_steps=120, hold_steps=480, decay_steps=600,
                 freeze_step=1200, batch_samples=512_000, max_samples=128_000, crop_multiple=16_000, mask_prob=0.6,
                 mask_span=8, supervised_every=3, supervised_layer=3, log_every=50, save_every=250, keep_every=0),
}
SCHEDULE = ("warmup_steps", "hold_steps", "decay_steps", "freeze_step")
# What a resumed run may change: what is computed stays the same, but for rounding and the draws of dropout.
FREE = ("out device compile loaders log_every save_every keep_every restart benchmark accumulate items "
        "items_audio").split()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def json_list(text):
    return tuple(json.loads(text))


def parse_options(options, presets, config=None, argv=None, without=""):
    """(options, config): the dataclasses' defaults, over them the preset's numbers, over those the command line's.
    `without`: fields that a stage inherits but has no use for."""
    manual = sys.modules[options.__module__].__doc__
    parser = Parser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for kind in filter(None, (options, config)):
        group, helps = parser.add_argument_group(kind.__name__), {}
        for cls in reversed(kind.__mro__[:-1]):  # what a later class says of an option wins
            helps |= re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M)
        for field in fields(kind):
            if field.name in without.split():
                continue
            how = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(type=json_list)}
            group.add_argument("--" + field.name.replace("_", "-"),
                               help=f"{helps[field.name]} [{field.default}]".replace("%", "%%"),
                               **how.get(field.type, dict(type=field.type)))
    given = vars(parser.parse_args(argv))
    given = {name: value.rstrip("/") or value if isinstance(value, str) else value for name, value in given.items()}
    without_init = "base" if given.get("manifest") or given.get("audio") else "tiny"
    preset = given.setdefault("preset", preset_of(given.get("init", getattr(options, "init", ""))) or without_init)
    require(preset in presets, f"--preset {preset}: one of {', '.join(presets)}")
    require(given.get("seed", 0) >= 0, f"--seed {given.get('seed')}: not negative")
    betas = given.get("betas", (0, 0))
    require(len(betas) == 2 and all(isinstance(b, (int, float)) and 0 <= b < 1 for b in betas),
            f"--betas {betas}: two numbers in [0, 1)")
    names = [field.name for field in fields(options)]
    chosen = replace(options(), **presets[preset])
    stretch = given.get("steps", chosen.steps) / chosen.steps if chosen.steps else 1
    scaled = {name: round(getattr(chosen, name) * stretch) for name in SCHEDULE if hasattr(chosen, name)}
    options = replace(chosen, **scaled | {name: value for name, value in given.items() if name in names})
    if config:
        config = config(**spidr.PRESETS[preset] | {name: value for name, value in given.items() if name not in names})
    return options, config


def preset_of(init):
    """The preset whose network a run or checkpoint has, if one has: its numbers are made for that size."""
    for path in (Path(init, "config.json"), Path(init).parent / "config.json"):
        if init and path.is_file():
            config = spidr.read_config(path)
            sizes = {name: Config(**changes) for name, changes in spidr.PRESETS.items()}
            return next((n for n, c in sizes.items() if (c.dim, c.layers) == (config.dim, config.layers)), None)
    return None


def check_options(o, config):
    positive = "steps accumulate batch_samples max_samples log_every save_every crop_multiple mask_span".split()
    for name in (*positive, "loaders", "keep_every", "supervised_every", "benchmark", *SCHEDULE):
        value, least = getattr(o, name), int(name in positive)
        require(value >= least, f"--{name.replace('_', '-')} {value}: {'at least 1' if least else 'not negative'}")
    require(o.weight_decay >= 0 and o.eps > 0, "weight_decay is not negative, eps is positive")
    require(0 <= o.lr_floor <= 1, f"--lr-floor {o.lr_floor}: from 0 to 1")
    require(o.lr > 0 and o.clip > 0 and 0 < o.mask_prob < 1, "lr and clip are positive, mask_prob lies in (0, 1)")
    require(1 <= o.supervised_layer <= config.layers,
            f"--supervised-layer {o.supervised_layer}: from 1 to {config.layers}")
    require(o.max_samples >= o.min_samples, "--max-samples is less than --min-samples")
    require(o.batch_samples >= o.max_samples, f"--batch-samples {o.batch_samples} is less than a crop of --max-samples "
            f"{o.max_samples}: raise the one or lower the other")
    require(spidr.num_frames(o.min_samples, config) >= 2, f"--min-samples {o.min_samples} makes no two frames")


# ======== setup ========


@dataclass
class Place:
    """Where this process stands."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self):
        return self.rank == 0


def setup(o):
    env = os.environ.get  # torchrun's
    world, rank, local = int(env("WORLD_SIZE", 1)), int(env("RANK", 0)), int(env("LOCAL_RANK", 0))
    try:
        device = torch.device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        require(device.type in ("cuda", "cpu", "mps"), f"--device {o.device}: cuda, cpu or mps")
        if device.type == "cuda":
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {o.device}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what is left in float32 may use TF32
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Place(rank, world, device)


def provenance(o, config, model, place):
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:
        commit = None
    name = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else platform.processor() or "cpu"
    return {
        "model": spidr.released_config(config) if isinstance(config, Config) else config,
        "options": asdict(o), "ranks": place.world, "commit": commit, "torch": torch.__version__,
        "python": platform.python_version(), "device": name,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def open_run(o, config, model, place, rows=()):
    """The run's folder: new, or to be resumed with the same options and audio. Returns its checkpoint, or None."""
    audio = {"recordings": len(rows), "samples": sum(row.num_samples for row in rows)}
    out, record = Path(o.out), json.loads(json.dumps(provenance(o, config, model, place) | {"audio": audio}))
    advice = "give another --out, or --restart"
    require(not out.exists() or out.is_dir(), f"--out {out} is a file")
    traces = [name for name in ("config.json", "last.pt", "metrics.jsonl") if (out / name).exists()]
    if place.first and traces and o.restart:
        number = next(i for i in range(1, 10**6) if not Path(f"{out}.{i}").exists())
        os.rename(out, f"{out}.{number}")
        print(f"the run that was there is {out}.{number} now")
    if traces and not o.restart:
        require("config.json" in traces, f"{out} holds {traces[0]} but no config.json: {advice}")
        try:
            old = json.loads((out / "config.json").read_text())
            then, now = ({**r["options"], **r["model"], **r.get("audio", {}),
                          "ranks x accumulate": r["ranks"] * r["options"]["accumulate"]} for r in (old, record))
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{out}/config.json is damaged: {advice}") from None
        differs = [f"{k} was {then.get(k)}, now {v}" for k, v in now.items() if then.get(k) != v and k not in FREE]
        require(not differs, f"{out} holds a run of other options or audio: {advice}. {'; '.join(differs)}")
        if (out / "last.pt").exists():
            checkpoint = spidr.read_checkpoint(out / "last.pt")[1]
            require({"step", "log"} <= set(checkpoint), f"{out}/last.pt is no checkpoint to resume from")
            return checkpoint
        require(not list(out.glob("step_*.pt")), f"{out} holds checkpoints but no last.pt: {advice}")
    barrier()
    if place.first:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "config.json", json.dumps(record, indent=1))
            write_text(out / "metrics.jsonl", json.dumps({"step": 0, **record}) + "\n")
        except OSError as error:
            raise InputError(f"--out {out} cannot be written: {error}") from None
    return None


def write_text(path, text):
    """All of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def seed_step(*numbers):
    """Dropout is a function of (seed, step, rank): no generator's state has to be saved."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


# ======== data ========


def make_toy(o, place):
    if place.first and not Path(o.toy, "toy.json").exists():
        print(f"making the toy world in {o.toy}", flush=True)
        data.toy(o.toy)
    barrier()
    data.check_toy(o.toy)


def read_data(o, place, inventory=None):
    """All rows, the labelled ones, their phones as classes, and the phone inventories: those given, or found."""
    manifest, alignments = o.manifest, o.alignments
    if not manifest:
        make_toy(o, place)
        manifest, alignments = Path(o.toy) / "train.csv", alignments or Path(o.toy) / "train_alignments.csv"
    rows = data.check_audio(data.read_manifest(manifest), o.min_samples)
    if not (alignments and o.supervised_every):
        return rows, [], {}, inventory or {}
    found = data.read_alignments(alignments)
    labelled = data.aligned_rows(rows, found, alignments)
    inventory = data.inventories(found) | (inventory or {})
    classes, unknown = data.phone_classes(found, inventory)
    if unknown and place.first:
        print(f"{alignments}: {unknown} frames of unknown phones are ignored", file=sys.stderr)
    return rows, labelled, classes, inventory


def fetch(batches, o, place, step, log):
    """Endless micro-batches of this rank, from optimizer step `step` of this kind on; `accumulate` are a step."""
    numbers = itertools.count(step * o.accumulate * place.world + place.rank, place.world)
    return map(log.batch, torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=numbers, num_workers=o.loaders, pin_memory=place.device.type == "cuda",
        prefetch_factor=4 if o.loaders else None, worker_init_fn=data.outlive_signals))


@torch.no_grad()
def validate(model, batches, o, place, most=20):
    """The mean loss over the first batches of a validation set, always the same crops and masks."""
    model.eval()
    sums = torch.zeros(2, device=place.device)
    for i in range(place.rank, min(most, batches.per_epoch), place.world):
        batch = batches[i]
        with autocast(o, place):
            loss, _ = model(batch["wav"].to(place.device), batch["mask"], commit=False)
        frames = batch["mask"].sum().item()
        sums += torch.stack([loss * frames, loss.new_tensor(frames)])
    model.pending = None
    model.train()
    total, frames = all_sum(sums).tolist()
    return total / max(frames, 1)


# ======== log and checkpoints ========


class Log:
    """A record every log_every steps, on the screen and in metrics.jsonl: the metrics' means since the last one."""

    def __init__(self, o, place, step=0, state=None):
        self.o, self.place, self.path, self.seen = o, place, Path(o.out) / "metrics.jsonl", []
        self.state = state or dict(seconds=0.0, audio_seconds=0.0, skipped=0, skipped_in_a_row=0, bad_recordings=0)
        self.samples, self.bad, self.told, self.since, self.record = 0, 0, set(), time.time(), {}
        if place.first:  # what a killed run logged after its last checkpoint comes again
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            write_text(self.path, "".join(f"{line}\n" for line in lines if step_of(line) <= step))
            print(f"{o.out}: {o.preset}, {o.steps} steps on {place.world} x {place.device}"
                  + f", resumed at step {step}" * bool(step), flush=True)
        self.bar = tqdm(total=o.steps, initial=step, unit="step", disable=None if place.first else True)

    def batch(self, batch):
        self.samples += batch["wav"].numel()
        self.bad += len(batch["bad"])
        for path, message in batch["bad"]:
            if path not in self.told:
                print(f"skipped: {message}", file=sys.stderr)
            self.told.add(path)
        return batch

    def step(self, step, metrics, due=False, **more):
        """Logs when it is time, and with each checkpoint, so that what is saved counts everything: the same on all
        ranks. Nothing waits for the GPU before that."""
        self.seen.append(metrics)
        self.bar.update()
        if step % self.o.log_every and step != self.o.steps and not due:
            return
        names = sorted({name for m in self.seen for name in m} - {"layers"})
        means = {name: torch.stack([m[name].float() for m in self.seen if name in m]).nanmean().item()
                 for name in names}
        layers = next((m["layers"] for m in reversed(self.seen) if "layers" in m), {})
        per_layer = {f"{name}_{k}": x for name, values in layers.items() for k, x in enumerate(values.tolist())}
        heard = torch.tensor([self.samples, self.bad], device=self.place.device)
        samples, bad = all_sum(heard).tolist()
        seconds = time.time() - self.since
        if self.place.first and means.get("target_ppl", 9) < 2 and "collapse" not in self.told:
            self.told.add("collapse")
            print(f"warning: target_ppl {means['target_ppl']:.2f} at step {step}: the codebooks are collapsing",
                  file=sys.stderr)
        for m in self.seen:
            skipped = int(m["skipped"])
            self.state["skipped"] += skipped
            self.state["skipped_in_a_row"] = (self.state["skipped_in_a_row"] + 1) * skipped
            require(self.state["skipped_in_a_row"] < 20,
                    f"20 steps in a row up to step {step} had no finite gradient: stopped; the checkpoint in "
                    f"{self.o.out} is from before. Lower the learning rate, or look at the recordings")
        self.state["seconds"] += seconds
        self.state["audio_seconds"] += samples / data.SAMPLE_RATE
        self.state["bad_recordings"] += int(bad)
        self.record = {"step": step, **means, **per_layer, "audio_s_per_s": samples / data.SAMPLE_RATE / seconds,
                       **self.state, **more}
        self.seen, self.samples, self.bad, self.since = [], 0, 0, time.time()
        self.write(self.record)

    def write(self, record):
        if not self.place.first:
            return
        # JSON knows neither NaN nor infinity.
        record = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in record.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        shown = ("meta_update relative_delta loss target_ppl pred_ppl accuracy phone_loss valid_loss lr "
                 "audio_s_per_s").split()
        self.bar.set_postfix({name: f"{record[name]:.3g}" for name in shown if record.get(name)})
        if self.bar.disable:
            print(f"step {record['step']}", *(f"{name} {record[name]:.4g}" for name in shown if record.get(name)),
                  flush=True)

    def close(self):
        """The training is over and saved: from now on a signal ends the process at once."""
        self.bar.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def step_of(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # cut off when the run was killed
        return math.inf


def save_checkpoint(o, place, state, optimizer, step, log, **more):
    if place.first:
        spidr.save(Path(o.out) / "last.pt", state, step=step, optimizer=optimizer.state_dict(), log=log.state, **more)
        if o.keep_every and step % o.keep_every == 0 or step == o.steps:
            spidr.save(Path(o.out) / f"step_{step}.pt", state, step=step, **more)


def finished(o, place):
    if place.first:
        print(f"{o.out}: finished, {o.steps} steps; nothing to do")


def stopped(log, step):
    """After SIGTERM or Ctrl-C."""
    log.close()
    if log.place.first:
        print(f"stopped at step {step}; the same command resumes there")
    sys.exit(143)


class Stop:
    """SIGTERM or Ctrl-C: the ranks agree on a step, save and leave. A second Ctrl-C leaves at once."""

    def __init__(self, place):
        self.place, self.asked = place, False
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, _):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.asked = True

    def agreed(self, step):
        if self.place.world == 1:
            return self.asked
        if step % 10:  # agreeing waits for the GPU: not at every step
            return False
        return all_sum(torch.tensor(float(self.asked), device=self.place.device)).item() > 0


# ======== the step that every stage shares ========


def lr_at(step, o):
    """The rate that step `step`, from 0, uses: linear warm-up, hold, exponential decay."""
    if step < o.warmup_steps:
        return o.lr * (o.lr_floor + (1 - o.lr_floor) * step / o.warmup_steps)
    decayed = (step - o.warmup_steps - o.hold_steps) / max(1, o.decay_steps)
    return o.lr * o.lr_floor ** min(max(decayed, 0.0), 1.0)


def make_optimizer(model, o):
    parameters = [p for name, p in model.named_parameters() if not name.startswith("teacher.")]
    return torch.optim.AdamW(parameters, lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay,
                             fused=True)


def autocast(o, place):
    return torch.autocast(place.device.type, torch.bfloat16, enabled=o.bf16 and place.device.type == "cuda")


def train_step(model, optimizer, micro_batches, lr, o, place, layer=0):
    """One optimizer step on the micro-batches of all ranks of model.group; with `layer`, a supervised one.

    The loss is a mean over the frames of all ranks and micro-batches, each part weighs what it has of them, gradients
    are summed: so ranks and accumulation change nothing but rounding. Nothing here waits for the GPU.
    """
    batches = list(micro_batches)
    optimizer.zero_grad(set_to_none=True)
    counts = [float(((b["phones"] >= 0) if layer else b["mask"]).sum()) for b in batches]
    total = all_sum(torch.tensor(sum(counts)).to(place.device, non_blocking=True), model.group)
    sums, metrics = 0, {}
    for i, (batch, count) in enumerate(zip(batches, counts)):
        wav, mask = batch["wav"].to(place.device, non_blocking=True), batch["mask"]
        with autocast(o, place):
            if layer:
                phones = batch["phones"].to(place.device, non_blocking=True)
                loss, part = model.supervised_loss(wav, mask, phones, batch["language"], layer)
                sums = sums + part
            else:
                loss, metrics = model(wav, mask, commit=i == len(batches) - 1)
        (loss * (count / total)).backward()
    if layer:
        loss, hits = all_sum(sums, model.group) / total
        metrics = {"phone_loss": loss, "phone_accuracy": hits}
    return {**metrics, **update(optimizer, lr, o, model.group)}


def update(optimizer, lr, o, ranks=None):
    """The gradients, summed over the ranks and clipped, move the weights, unless they are not finite."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if dist.is_initialized() and dist.get_world_size(ranks) > 1:  # all of them in one message
        flat = all_sum(torch.cat([g.flatten() for g in gradients]), ranks)
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients)])
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (o.clip / (norm + 1e-6)).clamp(max=1.0))
    # A NaN on one rank is a NaN in the sum on every rank: all of them skip, without having to talk about it. The fused
    # AdamW reads found_inf, on the device, and where it is 1 leaves weights, moments and step counts as they are.
    skipped = (~norm.isfinite()).float()
    optimizer.found_inf = skipped
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return {"grad_norm": norm, "skipped": skipped}


# ======== the stage ========


def initial_model(o, config, place):
    """A new network or that of --init, and its phone inventories."""
    if not o.init:
        return SpidR(config).to(place.device), {}
    training = "codebook_decay ema_start ema_timescale ema_threshold layer_drop".split()
    changes = {name: getattr(config, name) for name in training}
    require(config == Config(**spidr.PRESETS[o.preset] | changes),
            f"--init brings its own network: of Config only {', '.join(changes)}")
    model, inventory = spidr.load_init(o.init, **changes)
    check_options(o, model.config)
    return model.to(place.device), inventory


def compile_parts(model, o):
    if o.compile:
        # Student and teacher share their code: shapes, B = 1, depths, no-grad and frozen inputs make a graph each, and
        # after eight torch would silently go on without compiling.
        torch._dynamo.config.recompile_limit = 64
        for part in model.feature_extractor, model.student, model.teacher:
            part.compile()


def main():
    # ---- options, setup
    o, config = parse_options(Options, PRESETS, Config)
    check_options(o, config)
    place = setup(o)
    torch.manual_seed(o.seed)
    model, inventory = initial_model(o, config, place)
    config = model.config
    compile_parts(model, o)
    if o.benchmark:
        return benchmark(o, config, model, place)

    # ---- data
    rows, labelled_rows, classes, inventory = read_data(o, place, inventory)
    group = place.world * o.accumulate
    unlabelled = data.Batches(rows, config, o, group)
    labelled = data.Batches(labelled_rows, config, o, group, classes, stream=(1,)) if labelled_rows else None
    valid_rows = data.check_audio(data.read_manifest(o.valid), o.min_samples) if o.valid else []
    valid = data.Batches(valid_rows, config, o, stream=(2,)) if valid_rows else None

    # ---- model, optimizer
    for language, phones in inventory.items():
        model.add_language(language, len(phones))
    optimizer = make_optimizer(model, o)

    # ---- resume
    checkpoint, first, state = open_run(o, config, model, place, rows), 0, None
    if checkpoint:
        spidr.load_state(model, checkpoint["model"], o.out)
        optimizer.load_state_dict(checkpoint["optimizer"])
        first, state = int(checkpoint["step"]), checkpoint["log"]
        if first >= o.steps:
            return finished(o, place)
    log, stop = Log(o, place, first, state), Stop(place)

    # ---- loop: of supervised_every steps the last is supervised
    every = o.supervised_every if labelled else o.steps + 1
    batches = fetch(unlabelled, o, place, first - first // every, log)
    labelled_batches = fetch(labelled, o, place, first // every, log) if labelled else None
    model.train()
    for step in range(first, o.steps):
        if step >= o.freeze_step:
            model.freeze_front_end()
        seed_step(o.seed, step, place.rank)
        done, lr, supervised = step + 1, lr_at(step, o), (step + 1) % every == 0
        micro_batches = itertools.islice(labelled_batches if supervised else batches, o.accumulate)
        metrics = train_step(model, optimizer, micro_batches, lr, o, place, o.supervised_layer if supervised else 0)
        ema = model.update_teacher(done)
        stopping = stop.agreed(done)
        saving = done % o.save_every == 0 or o.keep_every and done % o.keep_every == 0 or done == o.steps
        more = {"valid_loss": validate(model, valid, o, place)} if valid and saving else {}
        log.step(done, metrics, due=saving or stopping, lr=lr, ema=ema, **more)
        if saving or stopping:
            save_checkpoint(o, place, model.state_dict(), optimizer, done, log, inventories=inventory)
        if stopping and done < o.steps:
            stopped(log, done)
    if place.first:
        ending(o, log)


def ending(o, log):
    """What was trained, what it is worth on the toy world, and what to type next."""
    summary(log, f"{o.steps} steps")
    if not o.manifest:
        import evaluate  # which builds on this file

        evaluate.print_toy_abx(o.toy, {o.out: o.out})
    print(f"next: python meta_train.py --init {o.out}   or   python evaluate.py")


def summary(log, what):
    """What a stage has done, how long it took and how it ended."""
    log.close()
    s = log.state
    print(f"{log.o.out}: {what}, {s['audio_seconds'] / 3600:.1f} h of audio, {s['seconds'] / 60:.1f} min; "
          f"{s['skipped']} steps skipped, {s['bad_recordings']} recordings skipped")
    shown = ("loss", "target_ppl", "pred_ppl", "accuracy", "active", "phone_accuracy", "valid_loss")
    print("last:", *(f"{name} {log.record[name]:.3f}" for name in shown if name in log.record))


# ======== benchmark ========


def flops(config, batch, samples):
    """Floating-point operations of one training step: forward and twice that backward for what is trained, forward
    alone for the teacher; products only. Base at 237.5 s of audio: see the README."""
    o, channels, T, front = config, 1, samples, 0
    for out, kernel, stride in o.conv_layers:
        T = (T - kernel) // stride + 1
        front, channels = front + 2 * T * kernel * channels * out, out
    front += 2 * T * channels * o.dim
    positional = 2 * T * o.pos_depth * (o.pos_kernel // o.pos_depth) * o.dim * o.dim // o.pos_groups
    transformer = positional + o.layers * (2 * T * (4 * o.dim**2 + 2 * o.dim * o.ffn) + 4 * T * T * o.dim)
    codewords = 2 * (T // 2) * o.codebooks * o.dim * o.codewords  # heads, and again the assignment: half of the frames
    return batch * (3 * (front + transformer + codewords) + transformer + codewords)


def benchmark(o, config, model, place):
    """Steps on random audio, so many crops of the longest kind as a micro-batch holds; one JSON line."""
    batch = max(1, o.batch_samples // o.max_samples)
    samples = o.batch_samples // batch
    samples = max(samples // o.crop_multiple * o.crop_multiple, min(samples, o.crop_multiple))
    frames = spidr.num_frames(samples, config)
    wav = torch.randn(batch, samples, device=place.device)
    mask = torch.from_numpy(data.make_mask(batch, frames, np.random.default_rng(0), o.mask_prob, o.mask_span))
    optimizer, on_gpu = make_optimizer(model.train(), o), place.device.type == "cuda"

    def step(number):
        train_step(model, optimizer, [{"wav": wav, "mask": mask}] * o.accumulate, o.lr, o, place)
        model.update_teacher(number)

    times = [timed(lambda: step(number), place.device) for number in range(1, o.benchmark + 4)]
    seconds = float(np.median(times[3:]))  # the first three warm up
    work = flops(config, batch, samples) * o.accumulate
    peak = peak_flops(place.device, o.bf16 and on_gpu)
    unit = 1 if sys.platform == "darwin" else 1024
    memory = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if place.first:
        print(json.dumps({
            "steps_per_s": 1 / seconds,
            "audio_s_per_s": batch * samples * o.accumulate * place.world / data.SAMPLE_RATE / seconds,
            "mfu": work / seconds / peak, "tflop_per_step": work / 1e12, "peak_tflops": peak / 1e12,
            "peak_memory_gib": memory / 2**30, "batch": [batch, samples], "ranks": place.world,
        }))


def peak_flops(device, bf16):
    """Dense peak of the GPU by its data sheet; elsewhere, and in float32, what a large product reaches."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for part, tflops in (("H200", 989), ("H100", 989), ("A100", 312)):
        if part in name and bf16:
            return tflops * 1e12
    x = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return max(2 * 2048**3 / timed(lambda: spidr.linear(x, x), device) for _ in range(5))


def timed(work, device):
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    spidr.run(main)
