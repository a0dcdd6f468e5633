"""Stage 3: fast adaptation to a new language from unlabelled audio (SpidR-Adapt, meta-test; DAMA, arXiv 2602.01008).

    python adapt.py --init runs/meta                                    a language of the toy world
    python adapt.py --init runs/meta --audio recordings/ [--method full|dama|lora] [--budget 10min|1h|10h|100h]

In: a run or checkpoint of any stage, or a released one, and a folder or manifest of audio. Out: --out, whose last.pt is
a plain SpidR. At the end, by layer: rank, trained parameters, relative change; with --items also ABX before and after.
The downsampler, the projection and the teacher stand still; codebooks and heads start afresh (active forgetting).
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

import data
import model as spidr
import pretrain
from meta_train import forget
from model import require
from pretrain import (
    Log, Stop, fetch, finished, lr_at, make_optimizer, open_run, parse_options, save_checkpoint, seed_step, setup,
    stopped, summary, train_step,
)

# ======== options ========


@dataclass
class Options(pretrain.Options):
    """The papers' numbers. A comment is also the option's help."""

    init: str = "runs/meta"  # what to adapt: a run, a checkpoint, or a released checkpoint
    audio: str = ""  # folder or manifest of unlabelled audio; without one: a language of the toy world
    out: str = "runs/adapt"  # the run's folder
    method: str = "full"  # full, lora (low-rank updates, one rank), or dama (rank by depth, a U)
    budget: str = ""  # a random part of the audio: 10min, 1h, 10h, 100h, any number of s, min or h
    items: str = ""  # ABX items of the language: scores before and after
    items_audio: str = ""  # the items' audio, if it is not --audio
    rank_max: int = 32  # rank of lora; rank of DAMA's first and last layer
    rank_min: int = 1  # rank of DAMA's middle third
    basis: str = "all"  # where DAMA's SVD basis A stays frozen and B alone trains: all layers, or the middle third
    steps: int = 0  # 0: by the amount of audio, 4,000 (10 min) to 24,000 (100 h)
    lr: float = 5e-6  # constant after warm-up
    warmup_steps: int = 600  # linear warm-up
    hold_steps: int = 10**9  # the rest
    freeze_step: int = 0  # the downsampler and the projection never move
    forgetting: bool = True  # fresh codebooks and heads at the start
    refit_steps: int = 20  # SGD steps that fit the fresh heads to the fresh codebooks
    refit_lr: float = 5e-2  # their rate
    ema_start: float = 1.0  # the teacher's decay; 1: it stands still (0.999 is better for some inits)
    codebook_decay: float = 0.8  # of the codewords' sums and counts
    supervised_every: int = 0  # there are no labels
    supervised_layer: int = 1  # nor classifiers to train
    language: str = ""  # of the audio, all unless given; of the toy world, goxi unless given


PRESETS = {
    "base": {},
    "tiny": pretrain.PRESETS["tiny"] | dict(
        steps=200, lr=5e-4, warmup_steps=20, hold_steps=10**9, freeze_step=0, supervised_every=0, supervised_layer=1,
        rank_max=16, save_every=50),
}


def check_options(o):
    require(o.method in ("full", "lora", "dama"), f"--method {o.method}: full, lora or dama")
    require(o.basis in ("all", "middle"), f"--basis {o.basis}: all or middle")
    require(1 <= o.rank_min <= o.rank_max, f"--rank-min {o.rank_min}, --rank-max {o.rank_max}: 1 <= min <= max")
    require(not o.items or Path(o.items).is_file(), f"--items {o.items}: no such file")
    require(not o.items or o.items_audio or o.audio, "--items needs --items-audio, or --audio")


# ======== data ========


def steps_for(hours):
    """Between 4,000 steps for ten minutes and 24,000 for a hundred hours, by the logarithm."""
    return int(np.interp(np.log10(hours), np.log10([1 / 6, 1, 10, 100]), [4_000, 8_000, 16_000, 24_000]))


def seconds_of(rows):
    return sum(row.num_samples for row in rows) / data.SAMPLE_RATE


def subset(rows, seconds, seed):
    """A random part of the recordings that holds about so much audio."""
    have = seconds_of(rows)
    require(have >= seconds, f"--budget {seconds:g} s: there are only {have:.0f} s of audio")
    order = np.random.default_rng([seed, 9]).permutation(len(rows))
    total = np.cumsum([rows[i].num_samples for i in order]) / data.SAMPLE_RATE
    return [rows[i] for i in sorted(order[: int(np.searchsorted(total, seconds)) + 1])]


def audio_rows(o, place):
    if not o.audio:
        pretrain.make_toy(o, place)
        o.language = o.language or data.TARGETS[0]
        require(o.language in data.TARGETS,
                f"--language {o.language}: the toy world's new ones are {', '.join(data.TARGETS)}")
    path = o.audio or Path(o.toy) / "target" / f"{o.language}.csv"
    rows = data.check_audio(data.read_manifest(path), o.min_samples)
    if o.language:
        rows = [row for row in rows if row.language == o.language]
        require(rows, f"--language {o.language}: no recordings in {path}")
    return subset(rows, data.parse_seconds(o.budget), o.seed) if o.budget else rows


# ======== low-rank adaptation: LoRA and DAMA ========


class LowRank(nn.Module):
    """W = W0 + B A with B = 0 at the start: A is random (LoRA), or W0's leading right singular vectors (DAMA)."""

    def __init__(self, weight, rank, svd, train_basis):
        super().__init__()
        rank = min(rank, *weight.shape)
        if svd:
            A = torch.linalg.svd(weight.float().cpu(), full_matrices=False)[2][:rank]
        else:
            A = torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5
        self.A = nn.Parameter(A.to(weight), requires_grad=train_basis)
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight):
        return weight + self.B @ self.A


def dama_ranks(layers, rank_max, rank_min):
    """The U over depth: down from rank_max over the first third, rank_min in the middle, up again over the last."""
    third = max(1, layers // 3)
    down = [round(rank_max + (rank_min - rank_max) * i / max(1, third - 1)) for i in range(third)]
    return down + [rank_min] * (layers - 2 * third) + down[::-1]


def linears(layer):
    attention, block = layer.attention, layer.feed_forward
    return attention.qkv, attention.proj, block.intermediate_dense, block.output_dense


def add_adapters(model, o):
    """Only the adapters, the heads and, by their averages, the codebooks move then."""
    for part in model.student, model.supervised_classifiers:
        part.requires_grad_(False)
    model.mask_embedding.requires_grad_(False)
    layers = len(model.student.layers)
    ranks = dama_ranks(layers, o.rank_max, o.rank_min) if o.method == "dama" else [o.rank_max] * layers
    third = max(1, layers // 3)
    for i, (layer, rank) in enumerate(zip(model.student.layers, ranks)):
        frozen = o.method == "dama" and (o.basis == "all" or third <= i < layers - third)
        for linear in linears(layer):
            adapter = LowRank(linear.weight.data, rank, o.method == "dama", not frozen)
            parametrize.register_parametrization(linear, "weight", adapter)


@torch.no_grad()
def merged(model):
    """The state of a plain SpidR: W0 + B A in the place of W0, B and A."""
    state = {name: t for name, t in model.state_dict().items() if ".parametrizations." not in name}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            state[f"{name}.weight"] = module.weight.detach()
    return state


@torch.no_grad()
def change_table(model, before):
    """By layer: rank, trained parameters, |W - W0| / |W0| over the four Linears."""
    lines = [f"{'layer':>5} {'rank':>5} {'trained':>10} {'change':>9}"]
    for i, (layer, old) in enumerate(zip(model.student.layers, before), 1):
        adapted = linears(layer)
        rank = adapted[0].parametrizations.weight[0].A.shape[0] if parametrize.is_parametrized(adapted[0]) else "full"
        trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        moved = sum((x.weight - w).square().sum() for x, w in zip(adapted, old)).sqrt()
        size = sum(w.square().sum() for w in old).sqrt()
        lines.append(f"{i:>5} {rank:>5} {trained:>10} {moved / size:>9.2e}")
    return lines


# ======== the stage ========


def main():
    # ---- options, setup
    unused = "manifest alignments valid compile benchmark freeze_step supervised_every supervised_layer"
    o, _ = parse_options(Options, PRESETS, without=unused)
    check_options(o)
    place = setup(o)
    torch.manual_seed(o.seed)
    model, inventory = spidr.load_init(o.init, ema_start=o.ema_start, codebook_decay=o.codebook_decay)
    model.to(place.device)

    # ---- data
    rows = audio_rows(o, place)
    o.steps = o.steps or steps_for(seconds_of(rows) / 3600)
    pretrain.check_options(o, model.config)
    unlabelled = data.Batches(rows, model.config, o, place.world * o.accumulate)

    # ---- model, optimizer
    before = [[x.weight.detach().clone() for x in linears(layer)] for layer in model.student.layers]
    model.freeze_front_end()
    if o.method != "full":
        add_adapters(model, o)
    optimizer = make_optimizer(model, o)

    # ---- resume
    checkpoint, first, state = open_run(o, model.config, model, place, rows), 0, None
    if checkpoint:
        spidr.load_state(model, checkpoint["unmerged"], o.out)
        optimizer.load_state_dict(checkpoint["optimizer"])
        first, state = int(checkpoint["step"]), checkpoint["log"]
        if first >= o.steps:
            score(o, place, "after", o.out)
            return finished(o, place)
    score(o, place, "before", o.init)
    log, stop = Log(o, place, first, state), Stop(place)

    # ---- loop
    batches = fetch(unlabelled, o, place, first, log)
    model.train()
    for step in range(first, o.steps):
        done, lr, step_seed = step + 1, lr_at(step, o), (o.seed, step, place.rank)
        micro_batches = list(itertools.islice(batches, o.accumulate))
        if step == 0 and o.forgetting:
            forget(model, micro_batches, o, place, (o.seed, 8), step_seed)
        seed_step(*step_seed)
        metrics = train_step(model, optimizer, micro_batches, lr, o, place)
        model.update_teacher(done)
        stopping = stop.agreed(done)
        saving = done % o.save_every == 0 or o.keep_every and done % o.keep_every == 0 or done == o.steps or stopping
        log.step(done, metrics, due=saving, lr=lr)
        if saving:
            more = dict(unmerged=model.state_dict(), inventories=inventory)  # what is in both is stored once
            save_checkpoint(o, place, merged(model), optimizer, done, log, **more)
        if stopping and done < o.steps:
            stopped(log, done)
    if place.first:
        summary(log, f"{o.method} adaptation to {seconds_of(rows) / 60:.1f} min, {o.steps} steps")
        print(*change_table(model, before), sep="\n")
    score(o, place, "after", o.out)
    if place.first:
        print(f"next: python evaluate.py units --model {o.out} --audio {o.audio or 'FOLDER'} --out units.jsonl")


def score(o, place, when, run):
    """ABX, if there are items; before the first step, so that what does not fit is told then."""
    items = o.items or ("" if o.audio else str(Path(o.toy) / "eval" / f"{o.language}.item"))
    out = Path(o.out) / f"abx_{when}.json"
    if items and place.first and not out.exists():
        import evaluate  # only here: adapting itself needs none of it

        audio = o.items_audio or (o.audio if o.items else str(Path(items).with_suffix(".csv")))
        print(f"ABX {when}:")
        evaluate.run_abx(evaluate.parse(["abx", "--model", str(run), "--items", items, "--audio", audio,
                                         "--out", str(out)]))


if __name__ == "__main__":
    spidr.run(main)
