"""Stage 1: SpidR pretraining from raw audio, and the step that every stage shares.

    python pretrain.py      the toy world and a tiny model, half of its steps on phone labels
    torchrun --nproc_per_node=16 pretrain.py --manifest train.csv [--alignments phones.csv]

The second is the papers' run: 400,000 steps of 16 x 237.5 s. SpidR (arXiv 2512.20308) learns
without phone labels. With --alignments every tenth step is supervised by phones instead, as in the
"multi-task pretraining" of SpidR-Adapt (arXiv 2512.21204): [SSL] without, [SSL/SL] with.

Each optimizer step, with the equations' numbers in model.py and README.md:

    for each micro-batch:  loss, stats = model(wav, mask)           (1) to (4), or (7)
                           the gradients of the loss and the stats are added up
    over all ranks:        gradients and stats are summed
    optimizer.step()                                                moves the student
    model.update_codebooks(stats)                                   (5), not after a supervised step
    decay = model.update_teacher(step)                              (6)

The run's folder, --out, holds config.json, metrics.jsonl, last.pt, step_N.pt. The same command
again resumes, on a CPU to the same bits. In a healthy run the loss falls, and target_ppl dips and
recovers. If target_ppl falls toward 1 and stays, the codebooks have collapsed.
"""

import argparse
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import model as networks
from model import (
    Config, InputError, SpidR, all_sum, backward_and_sum, barrier, option, read_checkpoint, require,
    save)

# ======== options ========


@dataclass
class RunOptions:
    """What every run has."""

    preset: str = option("", "base, small or tiny; else --init's, tiny on the toy world, or base")
    out: str = option("runs/pretrain", "the run's folder")
    seed: int = option(0, "of the weights, the order, the crops, the masks and dropout")
    device: str = option("", "cuda, cuda:1, mps or cpu; unless given the best there is")
    bf16: bool = option(True, "bfloat16 autocast, on GPUs and on CPUs that have it")
    accumulate: int = option(1, "micro-batches of a step on each rank")
    log_every: int = option(100, "steps between records in metrics.jsonl")
    restart: bool = option(False, "rename the run that is in --out, to OUT.1, and start over")
    lr: float = option(5e-4, "peak learning rate")
    lr_floor: float = option(0.01, "part of the peak where warm-up starts and decay ends")
    warmup_steps: int = option(12_000, "linear warm-up")
    hold_steps: int = option(188_000, "at the peak")
    decay_steps: int = option(200_000, "exponential decay")
    betas: tuple = option((0.9, 0.95), "AdamW's")
    eps: float = option(1e-6, "AdamW's")
    weight_decay: float = option(0.01, "AdamW's, on everything")
    clip: float = option(10.0, "largest norm of the gradient")


@dataclass
class StageOptions(RunOptions):
    """What every stage has: batches of masked audio."""

    toy: str = option("runs/toy", "where the toy world is written")
    loaders: int = option(6, "processes that read audio, for each rank")
    compile: bool = option(False, "torch.compile")
    batch_samples: int = option(3_800_000, "most samples in a micro-batch (237.5 s)")
    max_samples: int = option(320_000, "longest crop (20 s)")
    min_samples: int = option(2_000, "shortest recording")
    crop_multiple: int = option(1_600, "crops are cut to a multiple of this: few distinct shapes")
    codebook_start: str = option("noise", "fresh codewords; targets: those of the first step")
    mask_prob: float = option(0.8, "masked spans x span / frames")
    mask_span: int = option(10, "frames of a span")


@dataclass
class Options(StageOptions):
    """The numbers are the papers'."""

    manifest: str = option("", "CSV, TSV or folder of audio; without one the toy world")
    alignments: str = option("", "phone alignments; with them supervision is interleaved")
    valid: str = option("", "a manifest to report the loss on")
    init: str = option("", "a run or a checkpoint to start from; without one random weights")
    steps: int = option(400_000, "optimizer steps; warm-up, hold, decay, freeze_step scale along")
    freeze_step: int = option(200_000, "from then on the downsampler and projection are frozen")
    mel_steps: int = option(0, "before the first step: fit the front end to log-mel spectra")
    supervised_every: int = option(10, "with alignments: one supervised step in so many; 0: none")
    supervised_layer: int = option(8, "whose output the phone classifiers read")
    save_every: int = option(1_000, "steps between checkpoints (last.pt)")
    keep_every: int = option(50_000, "steps between checkpoints that are kept (step_N.pt)")


# tiny departs from the papers in numbers only, so that minutes show something: small steps (four
# crops of 4 s) at a higher rate, shorter spans, and half of the steps supervised, on layer 3 of 4.
# On two cores loaders would slow down the training by more than they save.
TINY = dict(batch_samples=256_000, max_samples=64_000, crop_multiple=16_000, mask_prob=0.6,
            mask_span=8, loaders=0)
# small, for real speech: steps of 32 s, recordings of 1.5 s and more, and a start that has heard
# speech (mel_steps and codebook_start: extras/small_batches.py).
SMALL = TINY | dict(batch_samples=512_000, crop_multiple=8_000, min_samples=24_000,
                    codebook_start="targets")
PRESETS = {
    "base": {},
    "tiny": TINY | dict(
        steps=1200, lr=1.2e-3, lr_floor=0.05, warmup_steps=70, hold_steps=730, decay_steps=400,
        freeze_step=1200, supervised_every=2, supervised_layer=3, save_every=250, keep_every=0),
    "small": SMALL | dict(
        steps=2400, lr=1e-3, lr_floor=0.05, warmup_steps=150, hold_steps=1440, decay_steps=810,
        freeze_step=2400, mel_steps=200, supervised_every=4, supervised_layer=3, save_every=200,
        keep_every=400),
}


# ======== the step that every stage shares ========


def train_step(model, optimizer, micro_batches, step, lr, options, ranks, supervised_layer=None):
    """Optimizer step `step`, counted from 1. It is supervised if `supervised_layer` is given: the
    layer whose output the phone classifier reads.

    The loss is a mean over the frames of all micro-batches and ranks. A micro-batch gives the mean
    over its own frames, so its gradients are weighted by their number, and the sum of all gradients
    is divided by the number of all frames. How a batch is spread over ranks and micro-batches then
    changes nothing but rounding and the draws of dropout."""
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = lr
    stats = {}  # sums over the frames of all micro-batches, for (5) and the log
    for i, batch in enumerate(micro_batches, 1):
        wav = batch["wav"].to(ranks.device, non_blocking=True)
        with autocast(options, ranks):
            if supervised_layer:
                phones = batch["phones"].to(ranks.device, non_blocking=True)
                loss, part = model.supervised_loss(
                    wav, batch["mask"], phones, batch["language"], supervised_layer)  # (7)
            else:
                loss, part = model(wav, batch["mask"])  # (1) to (4)
        last = i == len(micro_batches)
        backward_and_sum(loss * part["frames"], model, ranks.group, last)
        stats = {name: stats.get(name, 0) + value for name, value in part.items()}
    all_sum(list(stats.values()), ranks.group)
    metrics = average_and_clip(optimizer, stats["frames"], options)
    optimizer.step()
    if supervised_layer:
        for name in "phone_loss", "phone_accuracy":
            metrics[name] = stats[name] / stats["frames"]
    else:
        model.update_codebooks(stats)  # (5)
        metrics |= model.health(stats)
    decay = model.update_teacher(step)  # (6)
    return metrics | {"lr": torch.tensor(lr), "ema": torch.tensor(decay)}


def average_and_clip(optimizer, count, options):
    """Makes means of the gradients, which are sums over `count` frames, and clips their norm. If
    one is not finite, the optimizer will skip its step."""
    gradients = [p.grad for p in trained(optimizer) if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) / count
    torch._foreach_mul_(gradients, (options.clip / (norm + 1e-6)).clamp(max=1.0) / count)
    # AdamW(fused=True) skips its update where found_inf is 1. That flag is a tensor on the GPU, so
    # the CPU does not have to wait for it. A sum is not finite on all ranks or on none, so they all
    # skip the same steps.
    skipped = (~norm.isfinite()).float()
    optimizer.found_inf = skipped
    return {"grad_norm": norm, "skipped": skipped}


def make_optimizer(model, options):
    parameters = [p for name, p in model.named_parameters() if not name.startswith("teacher.")]
    return torch.optim.AdamW(parameters, lr=options.lr, betas=tuple(options.betas),
                             eps=options.eps, weight_decay=options.weight_decay, fused=True)


def trained(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def lr_at(step, options):
    """The rate of step `step`, counted from 0: linear warm-up, hold, exponential decay."""
    peak, floor, warmup = options.lr, options.lr_floor, options.warmup_steps
    if step < warmup:
        return peak * (floor + (1 - floor) * step / warmup)
    decayed = (step - warmup - options.hold_steps) / max(1, options.decay_steps)
    return peak * floor ** min(max(decayed, 0.0), 1.0)


# ======== the stage ========


def main():
    # ======== options, setup ========
    options, config = parse_options(Options, PRESETS, Config)
    ranks = setup(options)
    torch.manual_seed(options.seed)
    model, inventory = initial_model(options, config)
    check_options(options, model.config)
    to_device(model, options, ranks)

    # ======== data ========
    rows, labelled_rows, classes, inventory = read_data(
        options, ranks, inventory, options.supervised_every)
    per_step = ranks.world * options.accumulate
    unlabelled = data.Batches(rows, model.config, options, per_step)
    labelled = labelled_rows and data.Batches(
        labelled_rows, model.config, options, per_step, classes, stream=(data.STREAM_LABELLED,))
    valid = options.valid and data.Batches(
        read_rows(options.valid, options), model.config, options, stream=(data.STREAM_VALID,))

    # ======== model, optimizer ========
    for language, phones in inventory.items():
        model.add_language(language, len(phones))
    networks.send_from_first(model)
    optimizer = make_optimizer(model, options)

    # ======== resume ========
    first, totals = resume(open_run(options, model, ranks, rows), model, optimizer)
    if first >= options.steps:
        return finished(options, ranks)
    log, stop = Log(options, ranks, options.steps, first, totals), Stop(ranks)

    # ======== loop ========
    if first == 0 and not options.init and (options.mel_steps or options.codebook_start != "noise"):
        from extras import small_batches  # base has no need of it
        small_batches.prepare(model, unlabelled, options, ranks)
    supervised_before = first // options.supervised_every if labelled else 0
    unlabelled_steps = fetch(unlabelled, options, ranks, first - supervised_before, log)
    labelled_steps = labelled and fetch(labelled, options, ranks, supervised_before, log)
    model.train()
    for step in range(first, options.steps):
        if step >= options.freeze_step:
            model.freeze_front_end()
        supervised = bool(labelled) and (step + 1) % options.supervised_every == 0
        micro_batches = next(labelled_steps if supervised else unlabelled_steps)
        seed_step(options.seed, step, ranks.rank)
        metrics = train_step(model, optimizer, micro_batches, step + 1, lr_at(step, options),
                             options, ranks, options.supervised_layer if supervised else None)
        log.add(metrics)
        end_of_step(step + 1, options, ranks, optimizer, log, stop,
                    lambda: validate(model, valid, options, ranks),
                    lambda: dict(state=model.state_dict(), inventories=inventory))
    if ranks.first:
        summary(log, f"{options.steps} steps")
        if not options.manifest:
            show("extras/toy.py", "table", options.out)
        print(f"next: python meta_train.py --init {options.out}   or   python extras/page.py")


# ======== plumbing: skip at first reading ========

SCHEDULE = {"warmup_steps", "hold_steps", "decay_steps", "freeze_step"}
# Numbers must be at least 0, and these must be more.
POSITIVE = ("steps accumulate log_every save_every crop_multiple mask_span lr clip eps workers "
            "updates inner_steps").split()
COLLAPSED = 0.4  # of usage_entropy: of 256 codewords, fewer than 10 are in use
# What may change when a run resumes: it computes the same, but for rounding and dropout. (If
# compiled, weight decay also shrinks the norm behind the last layer, which nothing reads.)
FREE = ("out device compile loaders log_every save_every keep_every restart accumulate items "
        "items_audio").split()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def parse_options(options, presets, config=None, argv=None):
    """(options, config): the defaults of the dataclasses, over them the numbers of the preset,
    over those what the command line gives."""
    parser = Parser(description=sys.modules[options.__module__].__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    for kind in filter(None, (options, config)):
        group = parser.add_argument_group(kind.__name__)
        for f in fields(kind):
            how = dict(type=json.loads if f.type is tuple else f.type)
            if f.type is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            meaning = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
            group.add_argument("--" + f.name.replace("_", "-"), help=meaning, **how)
    given = vars(parser.parse_args(argv))
    preset = given.get("preset") or preset_of(given.get("init", getattr(options, "init", "")))
    preset = preset or ("base" if given.get("manifest") or given.get("audio") else "tiny")
    require(preset in presets, f"--preset {preset}: one of {', '.join(presets)}")
    mine = {name: value for name, value in given.items() if hasattr(options, name)}
    sizes = {name: value for name, value in given.items() if name not in mine}
    usual = options(**presets[preset])
    chosen = replace(usual, **mine | dict(preset=preset))
    if chosen.steps and usual.steps:  # a longer or shorter run stretches its schedule along
        for name in SCHEDULE & (vars(chosen).keys() - mine.keys()):
            setattr(chosen, name, round(getattr(usual, name) * (chosen.steps / usual.steps)))
    if not config:
        return chosen, None
    usual = networks.PRESETS[preset]
    if sizes.get("objective") == "dinosr":
        usual = usual | networks.dinosr(config(**usual).ema_timescale)
    try:
        return chosen, config(**usual | sizes)
    except (TypeError, ArithmeticError) as error:
        raise InputError(f"the network's sizes do not fit: {error}") from None


def preset_of(init):
    """The preset whose network a run or checkpoint has. Its numbers are made for that size."""
    if init and networks.locate(init).exists():
        sizes = {Config(**changes).dim: name for name, changes in networks.PRESETS.items()}
        return sizes.get(networks.config_of(init).dim)


def check_numbers(options):
    for name, value in vars(options).items():
        if isinstance(value, (int, float)):
            fits = value > 0 or value == 0 and name not in POSITIVE
            require(fits, f"--{name.replace('_', '-')} {value}: too small")
    betas = np.shape(options.betas) == (2,) and 0 <= min(options.betas) <= max(options.betas) < 1
    require(betas, f"--betas {options.betas}: a list of two numbers in [0, 1)")


def check_options(options, config):
    check_numbers(options)
    o, layer = options, getattr(options, "supervised_layer", 1)
    require(o.codebook_start in ("noise", "targets"),
            f"--codebook-start {o.codebook_start}: noise or targets")
    require(0 < o.mask_prob < 1, f"--mask-prob {o.mask_prob}: between 0 and 1")
    require(1 <= layer <= config.layers, f"--supervised-layer {layer}: from 1 to {config.layers}")
    require(o.min_samples <= o.max_samples <= o.batch_samples,
            f"--min-samples {o.min_samples}, --max-samples {o.max_samples}, --batch-samples "
            f"{o.batch_samples}: none may be larger than the next")
    require(networks.num_frames(o.min_samples, config) >= 2,
            f"--min-samples {o.min_samples}: too short for two frames")


# ======== ranks and devices ========


@dataclass
class Ranks:
    """This process among the ranks of its group, which share every batch."""

    rank: int
    world: int
    device: torch.device
    group: object = None  # None: all ranks, if there are any

    @property
    def first(self):
        return self.rank == 0

    def say(self, message, **how):
        """Prints it once, not on every rank."""
        if self.first:
            print(message, flush=True, **how)


def setup(options):
    env = os.environ.get  # torchrun's
    world, rank, local = int(env("WORLD_SIZE", 1)), int(env("RANK", 0)), int(env("LOCAL_RANK", 0))
    try:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(options.device or best)
        if device.type == "cuda":
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # float32 products may use TF32
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
        raise InputError(f"--device {options.device}: {message}") from None
    if world > 1:
        networks.die_with_parent(signal.SIGTERM)  # torchrun may be killed
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(rank, world, device)


def autocast(options, ranks):
    """bfloat16 on GPUs, and on CPUs that have the instructions: others would only imitate them."""
    kind, has = ranks.device.type, torch.cpu.get_capabilities()
    fast = kind == "cuda" or kind == "cpu" and (has.get("avx512_bf16") or has.get("amx_bf16"))
    return torch.autocast(kind, torch.bfloat16, enabled=bool(options.bf16 and fast))


def seed_step(*numbers):
    """Dropout is a function of (seed, step, rank), so no generator's state has to be saved."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def to_device(model, options, ranks):
    model.to(ranks.device)
    if not options.compile:
        return
    # Layers of the same shapes share their code. There is a graph for each combination of: the
    # first shape or any other, a batch of one or more, with or without gradient. After eight torch
    # would not compile any more.
    torch._dynamo.config.recompile_limit = 64
    how = {
        # By default the backward pass writes GELU's input, in float32, to read it back.
        "realize_reads_threshold": 8,
        # Torch 2.11 ends with an assertion, seen in the code it makes for GPUs, once the batch's
        # size and its length have varied.
        "triton.coalesce_tiling_analysis": False}
    for part in model.modules():
        if isinstance(part, (networks.Downsampler, networks.PositionalConv, networks.Layer)):
            part.compile(options=how)
    model.targets = torch.compile(model.targets, options=how)


# ======== model and data ========


def initial_model(options, config):
    """A new network or that of --init, and its phone inventories."""
    if not options.init:
        return SpidR(config), {}
    training = ("codebook_decay ema_start ema_schedule ema_timescale ema_threshold ema_stop "
                "layer_drop").split()
    changes = {name: getattr(config, name) for name in training}
    require(config == Config(**networks.PRESETS[options.preset] | changes),
            f"--init brings its own network: of Config only {', '.join(changes)}")
    return networks.load_init(options.init, **changes)


def make_toy(options, ranks, part):
    """A part of the toy world, if it is not there."""
    if ranks.first:
        from extras.toy import toy
        toy(options.toy, [part])
    barrier()


def read_recordings(manifest, options):
    rows = data.read_manifest(manifest, minimum=options.min_samples)
    return data.check_audio(rows, options.min_samples)


def read_rows(manifest, options):
    return data.pieces(read_recordings(manifest, options), options.max_samples)


def read_data(options, ranks, inventory, supervised):
    """All recordings in pieces; the labelled ones; their phones as classes; the inventories."""
    manifest, path = options.manifest, options.alignments
    if not manifest:
        make_toy(options, ranks, "train")
        manifest = Path(options.toy) / "train.csv"
        path = path or Path(options.toy) / "train_alignments.csv"
    recordings = read_recordings(manifest, options)
    rows = data.pieces(recordings, options.max_samples)
    if not (path and supervised):
        return rows, [], {}, inventory
    alignments = data.read_alignments(path, {row.fileid: row.language for row in recordings})
    labelled = data.aligned_rows(recordings, alignments, path)
    inventory = data.inventories(alignments) | inventory
    classes, unknown = data.phone_classes(alignments, inventory)
    if unknown:
        ranks.say(f"{path}: {unknown} frames of unknown phones are ignored", file=sys.stderr)
    return rows, data.pieces(labelled, options.max_samples), classes, inventory


def fetch(batches, options, ranks, first, log):
    """Yields the micro-batches of this rank for one step after the other, from `first` on."""
    start = first * options.accumulate * ranks.world + ranks.rank
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=itertools.count(start, ranks.world),
        num_workers=options.loaders, prefetch_factor=4 if options.loaders else None,
        pin_memory=ranks.device.type == "cuda", worker_init_fn=data.loader_init,
        # Forked loaders are children of this process, and end with it.
        multiprocessing_context="fork" if options.loaders else None))
    while True:
        try:
            micro_batches = list(itertools.islice(loader, options.accumulate))
        except ConnectionResetError:  # a loader has ended in the middle of a message
            raise EOFError from None
        log.hear(micro_batches)
        yield micro_batches


@torch.no_grad()
def validate(model, batches, options, ranks):
    """The health of the model on the first batches of held-out audio, if there is any. Their crops
    and masks stay the same. All ranks compute it, so that none has to tell the others."""
    if not batches:
        return {}
    model.eval()
    stats = {}
    for i in range(min(20, batches.per_epoch)):
        with autocast(options, ranks):
            _, part = model(batches[i]["wav"].to(ranks.device), batches[i]["mask"])
        stats = {name: stats.get(name, 0) + value for name, value in part.items()}
    model.train()
    health = model.health(stats)
    return {f"valid_{name}": health[name] for name in ("loss", "accuracy", "target_ppl", "active")}


# ======== the run's folder ========


def open_run(options, model, ranks, rows=(), about=None):
    """Opens the run's folder, a new one or one to go on with. Then options and audio have to be the
    same. Returns the checkpoint to go on from, or None. `about` describes what is trained; by
    default it is the model's configuration."""
    out, described = Path(options.out), Path(options.out, "config.json")
    on_gpu = ranks.device.type == "cuda"
    record = {
        "options": asdict(options), "model": about or networks.released_config(model.config),
        "ranks": ranks.world,
        "audio": {"recordings": len(rows), "samples": sum(row.num_samples for row in rows)},
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "commit": commit(), "torch": torch.__version__, "python": platform.python_version(),
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else str(ranks.device),
    }
    record = json.loads(json.dumps(record))  # as it will be read again
    if ranks.first:
        claim(out, options.restart)
    barrier()
    advice = "give another --out, or --restart"
    if described.exists():
        try:
            old = comparable(json.loads(described.read_text()))
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{described} is damaged: {advice}") from None
        differs = [f"{name} was {old.get(name)}, now {value}"
                   for name, value in comparable(record).items() if old.get(name) != value]
        require(not differs,
                f"{out} holds a run of other options or audio: {advice}. {'; '.join(differs)}")
        if (out / "last.pt").exists():
            return read_checkpoint(out / "last.pt")[1]
    # A run may have been killed in its first save, of which last.pt is written last.
    others = [path for path in out.glob("*.pt") if not path.name.startswith("worker_")]
    require(len(others) <= described.exists(),
            f"{out} holds checkpoints, but has lost its config.json or last.pt: {advice}")
    barrier()
    if ranks.first:
        write_text(described, json.dumps(record, indent=1))
        write_text(out / "metrics.jsonl", json.dumps({"step": 0, **record}) + "\n")
    return None


def commit():
    """The commit of this code, if git knows it."""
    try:
        command = "git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def comparable(record):
    """What has to be the same when a run resumes."""
    ranks = {"ranks x accumulate": record["ranks"] * record["options"]["accumulate"]}
    everything = record["options"] | record["model"] | record["audio"] | ranks
    return {name: value for name, value in everything.items() if name not in FREE}


LOCKED = []  # the open files that this process has locked: closing one would free its lock


def claim(out, restart):
    """One run writes to a folder. The system frees the lock when the process ends, however."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "lock", "a+")
    if not networks.lock(file, wait=False):
        file.seek(0)
        raise InputError(f"{out} is being written by {file.read()}: give another --out")
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
    LOCKED.append(file)
    if restart and [*out.glob("*.json*"), *out.glob("*.pt")]:
        number = next(i for i in itertools.count(1) if not Path(f"{out}.{i}").exists())
        os.rename(out, f"{out}.{number}")
        print(f"the run that was there is {out}.{number} now")
        claim(out, restart)


def write_text(path, text):
    """All of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def resume(checkpoint, model, optimizer, name="model"):
    """(the steps that are done, the log's totals)"""
    if not checkpoint:
        return 0, None
    model.load_state_dict(checkpoint[name])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"], checkpoint["totals"]


def end_of_step(done, options, ranks, optimizer, log, stop, validate, contents):
    """After each step of a loop: what is due of validation, the log and a checkpoint, which holds
    contents()."""
    stopping = stop.agreed(done)
    kept = done == options.steps or options.keep_every > 0 and done % options.keep_every == 0
    saving = stopping or kept or done % options.save_every == 0
    if saving:
        log.add(validate())
    if saving or done % options.log_every == 0:
        log.write(done)
    if saving and ranks.first:
        out, contents = Path(options.out), contents() | dict(step=done)
        if kept:
            save(out / f"step_{done}.pt", **contents)
        save(out / "last.pt", optimizer=optimizer.state_dict(), totals=log.totals, **contents)
    if stopping and done < options.steps:
        barrier()  # the first rank has saved
        ranks.say(f"stopped at step {done}; the same command resumes there")
        sys.exit(143)


# ======== the log ========


class Log:
    """Now and then a record, on the screen and in metrics.jsonl: the means since the last one."""

    def __init__(self, options, ranks, length, first, totals):
        self.options, self.ranks, self.length = options, ranks, length
        self.path = Path(options.out) / "metrics.jsonl"
        self.totals = totals or dict(
            seconds=0.0, audio_seconds=0.0, skipped=0, skipped_in_a_row=0, bad_recordings=0)
        self.metrics, self.record, self.told, self.began = [], {}, set(), time.time()
        self.heard = torch.zeros(2, dtype=torch.float64)  # samples, bad recordings
        if ranks.first:
            # What was logged after the last checkpoint comes again, also a line that was cut off.
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)
            write_text(self.path, "".join(line for line in lines if step_of(line) <= first))
        decay = options.warmup_steps + options.hold_steps
        ranks.say(f"{options.out}: {options.preset}, {length} steps on {ranks.world} x "
                  f"{ranks.device}, from step {first}; rate {options.lr}, warm-up of "
                  f"{options.warmup_steps} steps"
                  + f", decay from step {decay}" * (decay < options.steps))

    def hear(self, micro_batches):
        for batch in micro_batches:
            self.heard += torch.tensor([batch["wav"].numel(), len(batch["bad"])])
            for path, message in batch["bad"]:
                if path not in self.told:
                    print("skipped:", message, file=sys.stderr)
                self.told.add(path)

    def add(self, metrics):
        """Nothing waits for a GPU here."""
        self.metrics.append(metrics)

    def write(self, step):
        """Every rank has to call it, because it sums what all ranks heard. Skipped steps need no
        sum: all ranks skip the same ones."""
        values, totals = defaultdict(list), self.totals
        for metrics in self.metrics:
            for name, value in metrics.items():
                values[name].append(value.float())
        means = {name: torch.stack(x).nanmean().item() for name, x in values.items()}
        for skipped in values["skipped"]:
            totals["skipped"] += int(skipped)
            totals["skipped_in_a_row"] = (totals["skipped_in_a_row"] + 1) * int(skipped)
            require(totals["skipped_in_a_row"] < 20, f"20 steps in a row up to step {step} had no "
                    f"finite gradient; the checkpoint in {self.options.out} is from before. Lower "
                    "the learning rate, or look at the recordings")
        samples, bad = all_sum([self.heard.to(self.ranks.device, torch.float32)])[0].tolist()
        seconds, audio = time.time() - self.began, samples / data.SAMPLE_RATE
        totals["seconds"] += seconds
        totals["audio_seconds"] += audio
        totals["bad_recordings"] += int(bad)
        record = {"step": step, **means, "audio_s_per_s": audio / seconds, **totals}
        # JSON knows neither NaN nor infinity.
        self.record = {name: x if math.isfinite(x) else None for name, x in record.items()}
        self.metrics, self.began = [], time.time()
        self.heard.zero_()
        if self.ranks.first:
            with open(self.path, "a") as file:
                file.write(json.dumps(self.record) + "\n")
            self.show(step)

    def show(self, step):
        names = ("meta_update relative_delta loss target_ppl accuracy phone_loss phone_accuracy "
                 "valid_loss lr audio_s_per_s").split()
        words = [f"{name} {self.record[name]:.4g}" for name in names if self.record.get(name)]
        usage = self.record.get("usage_entropy")
        if usage is not None and usage < COLLAPSED:
            words.append("(warning: the codebooks are collapsing)")
        left = self.totals["seconds"] / max(1, step) * (self.length - step) / 60
        print(f"step {step}/{self.length}", *words, f"{left:.1f} min left", flush=True)


def step_of(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # cut off or damaged when the run was killed
        return math.inf


# ======== how a run ends ========


class Stop:
    """After SIGTERM or Ctrl-C the ranks agree on a step, save and leave. A second Ctrl-C leaves
    at once."""

    def __init__(self, ranks):
        self.ranks, self.asked = ranks, False
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, _):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.asked = True

    def agreed(self, step):
        if self.ranks.world == 1:
            return self.asked
        if step % 10:  # to agree is to wait for the GPU: not at every step
            return False
        asked = torch.tensor(float(self.asked), device=self.ranks.device)
        return all_sum([asked])[0].item() > 0


def finished(options, ranks):
    ranks.say(f"{options.out}: finished; nothing to do")


def summary(log, what):
    totals = log.totals
    hours, minutes = totals["audio_seconds"] / 3600, totals["seconds"] / 60
    print(f"{log.options.out}: {what}, {hours:.1f} h of audio, {minutes:.1f} min; skipped: "
          f"{totals['skipped']} steps, {totals['bad_recordings']} recordings")
    shown = "loss target_ppl pred_ppl accuracy active phone_accuracy valid_loss".split()
    print("last:", *(f"{name} {log.record[name]:.3f}" for name in shown if log.record.get(name)))


def show(script, *arguments):
    """Prints another command and runs it. From now on a signal ends this process at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("$ python", script, *arguments, flush=True)
    done = subprocess.run([sys.executable, Path(__file__).parent / script, *arguments],
                          preexec_fn=lambda: networks.die_with_parent(signal.SIGTERM))
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    networks.run(main)
