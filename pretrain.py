"""Stage 1: SpidR pretraining from raw audio, and the step that every stage shares.

    python pretrain.py      the toy world and a tiny model, with labels in half of the steps
    torchrun --nproc_per_node=16 pretrain.py --manifest train.csv [--alignments phones.csv]

The second is the papers' run: 400,000 steps of 16 x 237.5 s. SpidR (arXiv 2512.20308) learns
without labels. With --alignments every tenth step is supervised by phones instead, as in the
"multi-task pretraining" of SpidR-Adapt (arXiv 2512.21204): [SSL] without, [SSL/SL] with.

Each optimizer step, with the equations' numbers in model.py and README.md:

    for each micro-batch:  loss, stats = model(wav, mask)           (1) to (4), or (7) with labels
                           the loss' gradients and the stats are added up
    over all ranks:        gradients and stats are summed
    the optimizer moves the student
    model.update_codebooks(stats)                                   (5), not after labels
    model.update_teacher(step)                                      (6)

The run's folder, --out, holds config.json, metrics.jsonl, last.pt, step_N.pt. The same command
again resumes, on a CPU to the same bits. In a healthy run the loss falls, and target_ppl dips and
recovers. If target_ppl falls toward 1 and stays, the codebooks have collapsed.
"""

import argparse
import fcntl
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
import model as spidr
from model import Config, InputError, SpidR, all_sum, backward_and_sum, barrier, option, require

# ======== options ========


@dataclass
class RunOptions:
    """What every run has."""

    preset: str = option("", "base or tiny; by default --init's, or tiny on the toy world, or base")
    out: str = option("runs/pretrain", "the run's folder")
    seed: int = option(0, "of the weights, the order, the crops, the masks and dropout")
    device: str = option("", "cuda, cuda:1, mps or cpu; unless given the best there is")
    bf16: bool = option(True, "bfloat16 autocast, on GPUs")
    accumulate: int = option(1, "micro-batches of a step on each rank")
    log_every: int = option(100, "steps between records in metrics.jsonl")
    restart: bool = option(False, "move the run that is in --out aside and start over")
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
    crop_multiple: int = option(1_600, "crops are cut to a multiple, so that shapes are few")
    mask_prob: float = option(0.8, "masked spans x span / frames")
    mask_span: int = option(10, "frames of a span")


@dataclass
class Options(StageOptions):
    """The numbers are the papers'."""

    manifest: str = option("", "CSV, TSV or folder of audio; without one the toy world")
    alignments: str = option("", "phone alignments; with them supervision is interleaved")
    valid: str = option("", "a manifest to report the loss on")
    init: str = option("", "a run or a checkpoint to start from; without one random weights")
    steps: int = option(400_000, "optimizer steps")
    freeze_step: int = option(200_000, "from then on the downsampler and projection stand still")
    supervised_every: int = option(10, "with alignments: one supervised step in so many; 0: none")
    supervised_layer: int = option(8, "whose output the phone classifiers read")
    save_every: int = option(1_000, "steps between checkpoints (last.pt)")
    keep_every: int = option(50_000, "steps between checkpoints that are kept (step_N.pt)")


# tiny departs from the papers in numbers only, so that minutes show something: small steps (four
# crops of 4 s) at a higher rate, shorter spans, and half of the steps supervised, on layer 3 of 4.
# On two cores loaders would slow down the training by more than they save.
TINY = dict(batch_samples=256_000, max_samples=64_000, crop_multiple=16_000, mask_prob=0.6,
            mask_span=8, loaders=0)
PRESETS = {
    "base": {},
    "tiny": TINY | dict(
        steps=1200, lr=1.2e-3, lr_floor=0.05, warmup_steps=70, hold_steps=730, decay_steps=400,
        freeze_step=1200, supervised_every=2, supervised_layer=3, save_every=250, keep_every=0),
}


# ======== the step that every stage shares ========


def train_step(model, optimizer, micro_batches, step, lr, o, place, layer=0):
    """Optimizer step `step`, counted from 1. With a `layer` it is supervised, from that layer.

    The loss is a mean over the frames of all micro-batches and ranks. A micro-batch knows the mean
    over its own frames. So its gradients are weighted by the number of its frames, and the sum of
    all gradients is divided by the number of all frames. How a batch is spread over ranks and
    micro-batches then changes nothing but rounding and the draws of dropout."""
    optimizer.zero_grad()
    stats = {}
    for i, batch in enumerate(micro_batches, 1):
        wav = batch["wav"].to(place.device, non_blocking=True)
        with autocast(o, place):
            if layer:
                phones = batch["phones"].to(place.device, non_blocking=True)
                loss, part = model.supervised_loss(
                    wav, batch["mask"], phones, batch["language"], layer)  # (7)
            else:
                loss, part = model(wav, batch["mask"])  # (1) to (4)
        last = i == len(micro_batches)
        backward_and_sum(loss * part["frames"], model, place.group, last)
        stats = {name: stats.get(name, 0) + value for name, value in part.items()}
    all_sum(list(stats.values()), place.group)
    gradients = [p.grad for p in trained(optimizer) if p.grad is not None]
    metrics = move(optimizer, gradients, stats["frames"], lr, o)
    if layer:
        for name in "phone_loss", "phone_accuracy":
            metrics[name] = stats[name] / stats["frames"]
    else:
        model.update_codebooks(stats)  # (5)
        metrics |= model.health(stats)
    metrics["ema"] = torch.tensor(model.update_teacher(step))  # (6)
    return metrics


def move(optimizer, gradients, count, lr, o):
    """The gradients are sums over `count` frames. They are divided by that and clipped, and AdamW
    takes a step."""
    norm = torch.nn.utils.get_total_norm(gradients) / count
    torch._foreach_mul_(gradients, (o.clip / (norm + 1e-6)).clamp(max=1.0) / count)
    # If the gradient is not finite on one rank, the sum is not finite on any. So all ranks skip the
    # step and need not agree on it. found_inf tells the fused AdamW to change nothing. It stays on
    # the device, so nothing waits for a GPU. The teacher then follows a student that has not moved.
    skipped = (~norm.isfinite()).float()
    optimizer.found_inf = skipped
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return {"grad_norm": norm, "skipped": skipped, "lr": torch.tensor(lr)}


def make_optimizer(model, o):
    named = model.named_parameters()
    parameters = [p for name, p in named if not name.startswith("teacher.")]
    return torch.optim.AdamW(parameters, lr=o.lr, betas=tuple(o.betas), eps=o.eps,
                             weight_decay=o.weight_decay, fused=True)


def lr_at(step, o):
    """The rate of step `step`, counted from 0: linear warm-up, hold, exponential decay."""
    if step < o.warmup_steps:
        return o.lr * (o.lr_floor + (1 - o.lr_floor) * step / o.warmup_steps)
    decayed = (step - o.warmup_steps - o.hold_steps) / max(1, o.decay_steps)
    return o.lr * o.lr_floor ** min(max(decayed, 0.0), 1.0)


# ======== the stage ========


def main():
    # ======== options, setup ========
    o, config = parse_options(Options, PRESETS, Config)
    place = setup(o)
    torch.manual_seed(o.seed)
    model, inventory = initial_model(o, config)
    check_options(o, model.config)
    to_device(model, o, place)

    # ======== data ========
    rows, labelled_rows, classes, inventory = read_data(o, place, inventory, o.supervised_every)
    per_step = place.world * o.accumulate
    unlabelled = data.Batches(rows, model.config, o, per_step)
    labelled = labelled_rows and data.Batches(
        labelled_rows, model.config, o, per_step, classes, stream=(1,))
    valid = data.Batches(read_rows(o.valid, o), model.config, o, stream=(2,)) if o.valid else None

    # ======== model, optimizer ========
    for language, phones in inventory.items():
        model.add_language(language, len(phones))
    optimizer = make_optimizer(model, o)

    # ======== resume ========
    first, totals = resume(open_run(o, model, place, rows), model, optimizer)
    if first >= o.steps:
        return finished(o, place)
    log, stop = Log(o, place, o.steps, first, totals), Stop(place)

    # ======== loop ========
    every = o.supervised_every if labelled else o.steps + 1  # of so many the last is supervised
    had = first // every  # supervised steps before `first`
    unlabelled = fetch(unlabelled, o, place, first - had, log)
    labelled = labelled and fetch(labelled, o, place, had, log)
    model.train()
    for step in range(first, o.steps):
        if step >= o.freeze_step:
            model.freeze_front_end()
        done, supervised = step + 1, (step + 1) % every == 0
        micro_batches = next(labelled if supervised else unlabelled)
        layer = o.supervised_layer if supervised else 0
        seed_step(o.seed, step, place.rank)
        log.add(train_step(model, optimizer, micro_batches, done, lr_at(step, o), o, place, layer))
        stopping = stop.agreed(done)
        saving = stopping or done % o.save_every == 0 or is_kept(done, o)
        if saving and valid:
            log.add(validate(model, valid, o, place))
        if saving or done % o.log_every == 0:
            log.write(done)
        if saving:
            save_checkpoint(
                o, place, model.state_dict(), optimizer, done, log, inventories=inventory)
        if stopping and done < o.steps:
            leave(place, done)
    if place.first:
        summary(log, f"{o.steps} steps")
        if not o.manifest:
            show("extras/toy.py", "table", o.out)
        print(f"next: python meta_train.py --init {o.out}   or   python extras/page.py")


# ======== plumbing: skip at first reading ========

SCHEDULE = {"warmup_steps", "hold_steps", "decay_steps", "freeze_step"}
# No number is negative, and these are not 0.
POSITIVE = ("steps accumulate log_every save_every crop_multiple mask_span lr clip eps workers "
            "updates inner_steps").split()
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
    o = replace(usual, **mine | dict(preset=preset))
    if o.steps and usual.steps:  # a longer or shorter run stretches its schedule along
        for name in SCHEDULE & (vars(o).keys() - mine.keys()):
            setattr(o, name, round(getattr(usual, name) * (o.steps / usual.steps)))
    return o, config and config(**spidr.PRESETS[preset] | sizes)


def preset_of(init):
    """The preset whose network a run or checkpoint has. Its numbers are made for that size."""
    path = spidr.locate(init)
    if init and path.exists():
        folder = path if path.is_dir() else path.parent
        sizes = {Config(**changes).dim: name for name, changes in spidr.PRESETS.items()}
        return sizes.get(spidr.read_config(folder / "config.json").dim)


def check_optimizer(o):
    for name, value in vars(o).items():
        if isinstance(value, (int, float)):
            fits = value > 0 or value == 0 and name not in POSITIVE
            require(fits, f"--{name.replace('_', '-')} {value}: too small")
    fit = np.shape(o.betas) == (2,) and 0 <= min(o.betas) and max(o.betas) < 1
    require(fit, f"--betas {o.betas}: a list of two numbers in [0, 1)")
    require(0 <= o.lr_floor <= 1, f"--lr-floor {o.lr_floor}: from 0 to 1")


def check_options(o, config):
    check_optimizer(o)
    require(0 < o.mask_prob < 1, f"--mask-prob {o.mask_prob}: between 0 and 1")
    layer = getattr(o, "supervised_layer", 1)
    require(1 <= layer <= config.layers, f"--supervised-layer {layer}: from 1 to {config.layers}")
    require(o.min_samples <= o.max_samples <= o.batch_samples,
            f"--min-samples {o.min_samples}, --max-samples {o.max_samples}, --batch-samples "
            f"{o.batch_samples}: none may be larger than the next")
    require(spidr.num_frames(o.min_samples, config) >= 2,
            f"--min-samples {o.min_samples} makes no two frames")


# ======== where a process stands ========


@dataclass
class Place:
    """This process among the ranks of its group, which share every batch."""

    rank: int
    world: int
    device: torch.device
    group: object = None  # None: all ranks, if there are any

    @property
    def first(self):
        return self.rank == 0


def setup(o):
    env = os.environ.get  # torchrun's
    world, rank, local = int(env("WORLD_SIZE", 1)), int(env("RANK", 0)), int(env("LOCAL_RANK", 0))
    try:
        device = torch.device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # float32 products may use TF32
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {o.device}: {str(error).splitlines()[0]}") from None
    if world > 1:
        spidr.die_with_parent(signal.SIGTERM)  # torchrun may be killed
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Place(rank, world, device)


def autocast(o, place):
    on_gpu = place.device.type == "cuda"
    return torch.autocast(place.device.type, torch.bfloat16, enabled=o.bf16 and on_gpu)


def seed_step(*numbers):
    """Dropout is a function of (seed, step, rank), so no generator's state has to be saved."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def to_device(model, o, place):
    """There, and as fast as it can be there."""
    model.to(place.device)
    spidr.faster(model)
    if o.compile:
        # Layers of the same shapes share their code. There is a graph for each combination of: the
        # first shape or any other, a batch of one or more, with or without gradient. After eight
        # torch would not compile any more.
        torch._dynamo.config.recompile_limit = 64
        options = {
            # By default the backward pass writes GELU's input, in float32, to read it back.
            "realize_reads_threshold": 8,
            # Fails (torch 2.11, on GPUs) once the batch's size and its length have varied.
            "triton.coalesce_tiling_analysis": False}
        for part in model.modules():
            if isinstance(part, (spidr.Downsampler, spidr.PositionalConv, spidr.Layer)):
                part.compile(options=options)
        model.targets = torch.compile(model.targets, options=options)


# ======== model, optimizer, data ========


def initial_model(o, config):
    """A new network or that of --init, and its phone inventories."""
    if not o.init:
        return SpidR(config), {}
    training = "codebook_decay", "ema_start", "ema_timescale", "ema_threshold", "layer_drop"
    changes = {name: getattr(config, name) for name in training}
    require(config == Config(**spidr.PRESETS[o.preset] | changes),
            f"--init brings its own network: of Config only {', '.join(changes)}")
    return spidr.load_init(o.init, **changes)


def trained(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def make_toy(o, place, part):
    """A part of the toy world, if it is not there."""
    if place.first:
        from extras.toy import toy
        toy(o.toy, [part])
    barrier()


def read_rows(manifest, o):
    return data.check_audio(data.read_manifest(manifest), o.min_samples)


def read_data(o, place, inventory, supervised):
    """All recordings; the labelled ones; their phones as classes; the phone inventories."""
    manifest, alignments = o.manifest, o.alignments
    if not manifest:
        make_toy(o, place, "train")
        manifest = Path(o.toy) / "train.csv"
        alignments = alignments or Path(o.toy) / "train_alignments.csv"
    rows = read_rows(manifest, o)
    if not (alignments and supervised):
        return rows, [], {}, inventory
    found = data.read_alignments(alignments, {row.fileid: row.language for row in rows})
    labelled = data.aligned_rows(rows, found, alignments)
    inventory = data.inventories(found) | inventory
    classes, unknown = data.phone_classes(found, inventory)
    if unknown and place.first:
        print(f"{alignments}: {unknown} frames of unknown phones are ignored", file=sys.stderr)
    return rows, labelled, classes, inventory


def fetch(batches, o, place, first, log):
    """Yields the micro-batches of this rank for one step after the other, from `first` on."""
    start = first * o.accumulate * place.world + place.rank
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=itertools.count(start, place.world),
        num_workers=o.loaders, prefetch_factor=4 if o.loaders else None,
        pin_memory=place.device.type == "cuda", worker_init_fn=data.loader_init,
        # Forked loaders are children of this process, and end with it.
        multiprocessing_context="fork" if o.loaders else None))
    while True:
        micro_batches = list(itertools.islice(loader, o.accumulate))
        log.hear(micro_batches)
        yield micro_batches


@torch.no_grad()
def validate(model, batches, o, place):
    """The health of the model on the first batches of held-out audio, whose crops and masks stay
    the same. All ranks compute it, so that none has to tell the others."""
    model.eval()
    stats = {}
    for i in range(min(20, batches.per_epoch)):
        with autocast(o, place):
            _, part = model(batches[i]["wav"].to(place.device), batches[i]["mask"])
        stats = {name: stats.get(name, 0) + value for name, value in part.items()}
    model.train()
    health = model.health(stats)
    return {f"valid_{name}": health[name] for name in ("loss", "accuracy", "target_ppl", "active")}


# ======== the run's folder ========


def open_run(o, model, place, rows=(), about=None):
    """Opens the run's folder, a new one or one to go on with. Then options and audio have to be the
    same. Returns the checkpoint to go on from, or None. `about` describes what is trained; by
    default it is the model's configuration."""
    out, described = Path(o.out), Path(o.out, "config.json")
    on_gpu = place.device.type == "cuda"
    record = {
        "options": asdict(o), "model": about or spidr.released_config(model.config),
        "ranks": place.world,
        "audio": {"recordings": len(rows), "samples": sum(row.num_samples for row in rows)},
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "commit": subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD 2>&-"),
        "torch": torch.__version__, "python": platform.python_version(),
        "device": torch.cuda.get_device_name(place.device) if on_gpu else str(place.device),
    }
    record = json.loads(json.dumps(record))  # as it will be read again
    if place.first:
        claim(out, o.restart)
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
            return spidr.read_checkpoint(out / "last.pt")[1]
    require(not list(out.glob("*.pt")), f"{out} holds checkpoints that nothing describes: {advice}")
    barrier()
    if place.first:
        write_text(described, json.dumps(record, indent=1))
        write_text(out / "metrics.jsonl", json.dumps({"step": 0, **record}) + "\n")
    return None


def comparable(record):
    """What has to be the same when a run resumes."""
    ranks = {"ranks x accumulate": record["ranks"] * record["options"]["accumulate"]}
    everything = record["options"] | record["model"] | record["audio"] | ranks
    return {name: value for name, value in everything.items() if name not in FREE}


def claim(out, restart, held={}):
    """One run writes to a folder. The system frees the lock when the process ends, however."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        writer = file.read()
        raise InputError(f"{out} is being written by {writer}: give another --out") from None
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
    held[str(out)] = file  # closing it would free the lock
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


def is_kept(done, o):
    return done == o.steps or bool(o.keep_every) and done % o.keep_every == 0


def save_checkpoint(o, place, state, optimizer, done, log, **more):
    if place.first:
        out, more = Path(o.out), dict(step=done, **more)
        if is_kept(done, o):
            spidr.save(out / f"step_{done}.pt", state, **more)
        moments = optimizer.state_dict()
        spidr.save(out / "last.pt", state, optimizer=moments, totals=log.totals, **more)


# ======== the log ========


class Log:
    """Now and then a record, on the screen and in metrics.jsonl: the means since the last one."""

    def __init__(self, o, place, length, first, totals):
        self.o, self.place, self.length = o, place, length
        self.path = Path(o.out) / "metrics.jsonl"
        self.totals = totals or dict(
            seconds=0.0, audio_seconds=0.0, skipped=0, skipped_in_a_row=0, bad_recordings=0)
        self.metrics, self.record, self.told, self.began = [], {}, set(), time.time()
        self.heard = torch.zeros(2, dtype=torch.float64)  # samples, bad recordings
        if place.first:
            # What was logged after the last checkpoint comes again.
            lines = self.path.read_text().splitlines(keepends=True)
            write_text(self.path, "".join(x for x in lines if step_of(x) <= first))
            where = f"{place.world} x {place.device}" + f", from step {first}" * bool(first)
            print(f"{o.out}: {o.preset}, {length} steps on {where}", flush=True)

    def hear(self, batches):
        for batch in batches:
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
                    f"finite gradient: stopped; the checkpoint in {self.o.out} is from before. "
                    "Lower the learning rate, or look at the recordings")
        samples, bad = all_sum([self.heard.to(self.place.device, torch.float32)])[0].tolist()
        seconds, audio = time.time() - self.began, samples / data.SAMPLE_RATE
        totals["seconds"] += seconds
        totals["audio_seconds"] += audio
        totals["bad_recordings"] += int(bad)
        self.record = {"step": step, **means, "audio_s_per_s": audio / seconds, **totals}
        self.metrics, self.began = [], time.time()
        self.heard.zero_()
        if not self.place.first:
            return
        # JSON knows neither NaN nor infinity.
        record = {name: x if math.isfinite(x) else None for name, x in self.record.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        shown = ("meta_update relative_delta loss target_ppl accuracy phone_loss phone_accuracy "
                 "valid_loss lr audio_s_per_s").split()
        words = [f"{name} {record[name]:.4g}" for name in shown if record.get(name)]
        if means.get("target_ppl", 9) < 2:
            words.append("(warning: the codebooks are collapsing)")
        left = totals["seconds"] / max(1, step) * (self.length - step) / 60
        print(f"step {step}/{self.length}", *words, f"{left:.1f} min left", flush=True)


def step_of(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # cut off when the run was killed
        return math.inf


# ======== how a run ends ========


class Stop:
    """After SIGTERM or Ctrl-C the ranks agree on a step, save and leave. A second Ctrl-C leaves
    at once."""

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
        if step % 10:  # to agree is to wait for the GPU: not at every step
            return False
        asked = torch.tensor(float(self.asked), device=self.place.device)
        return all_sum([asked])[0].item() > 0


def leave(place, step):
    barrier()  # the first rank has saved
    if place.first:
        print(f"stopped at step {step}; the same command resumes there")
    sys.exit(143)


def finished(o, place):
    if place.first:
        print(f"{o.out}: finished; nothing to do")


def summary(log, what):
    """What a stage has done, how long it took and how it ended."""
    t, out = log.totals, log.o.out
    hours, minutes = t["audio_seconds"] / 3600, t["seconds"] / 60
    print(f"{out}: {what}, {hours:.1f} h of audio, {minutes:.1f} min; {t['skipped']} steps "
          f"skipped, {t['bad_recordings']} recordings skipped")
    shown = "loss target_ppl pred_ppl accuracy active phone_accuracy valid_loss".split()
    print("last:", *(f"{name} {log.record[name]:.3f}" for name in shown if name in log.record))


def show(script, *arguments):
    """Prints another command and runs it. From now on a signal ends this process at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("$ python", script, *arguments, flush=True)
    done = subprocess.run([sys.executable, Path(__file__).with_name(script), *arguments],
                          preexec_fn=lambda: spidr.die_with_parent(signal.SIGTERM))
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    spidr.run(main)
