"""Stage 3: fast adaptation to a new language from unlabelled audio (SpidR-Adapt, arXiv 2512.21204;
DAMA, arXiv 2602.01008).

    python adapt.py                                     a language of the toy world, from runs/meta
    python adapt.py --init runs/meta --audio recordings/ [--budget 10min] [--method full|lora|dama]

In: a run or checkpoint of any stage, or a released one, and a folder or manifest of audio. Out:
--out, whose last.pt is a plain SpidR. The steps are those of self-supervised pretraining, with

    fresh codebooks and heads at the start                        (11) active forgetting
    a downsampler, a projection and a teacher that stand still
    W = W0 + B A in the place of W0, with --method lora or dama   (12) low-rank updates

A tenth of the recordings is held out. At the end a table tells for each layer its rank, what was
trained, and how far it moved; another one how the loss went on the recordings held out, which is
what one knows of a language without labels; with --items also the ABX error before and after.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

import data
import model as spidr
import pretrain
from meta_train import EpisodeOptions, forget
from model import option, require
from pretrain import Log, Stop, fetch, lr_at, seed_step, train_step

# ======== options ========


@dataclass
class Options(EpisodeOptions):
    """The numbers are the papers'."""

    init: str = option("runs/meta", "what to adapt: a run or a checkpoint, a released one too")
    audio: str = option("", "folder or manifest of unlabelled audio; without one the toy world's")
    held_out: float = option(0.1, "part of the audio held out, to follow the loss on; 0: none")
    language: str = option("", "of the audio, all unless given; of the toy world, goxi")
    budget: str = option("", "a random part of the audio: 10min, 1h, 90s")
    out: str = option("runs/adapt", "the run's folder")
    method: str = option("full", "full, lora (one rank), or dama (rank by depth)")
    rank_max: int = option(32, "rank of lora, and of DAMA's first and last layer")
    rank_min: int = option(1, "rank of DAMA's middle third")
    basis: str = option("middle", "where DAMA's basis A stays frozen: the middle third, or all")
    steps: int = option(0, "0: by the amount of audio, 4,000 (10 min) to 24,000 (100 h)")
    lr: float = option(5e-6, "after warm-up")
    warmup_steps: int = option(600, "linear warm-up")
    hold_steps: int = option(10**9, "the rest")
    codebook_decay: float = option(0.8, "of the codewords' sums and counts")
    items: str = option("", "ABX items of the language: scores before and after")
    items_audio: str = option("", "the items' audio, if it is not --audio")
    save_every: int = option(1_000, "steps between checkpoints (last.pt)")
    keep_every: int = option(0, "steps between checkpoints that are kept (step_N.pt)")


PRESETS = {
    "base": {},
    "tiny": pretrain.TINY | dict(
        steps=200, lr=5e-4, lr_floor=0.05, warmup_steps=20, rank_max=16, log_every=50,
        save_every=50),
}


# ======== how long ========


def steps_for(hours):
    """Between 4,000 steps for ten minutes and 24,000 for a hundred hours, by the logarithm."""
    amounts = np.log10([1 / 6, 1, 10, 100])
    return int(np.interp(np.log10(hours), amounts, [4_000, 8_000, 16_000, 24_000]))


# ======== (12) low-rank updates: LoRA and DAMA ========


class LowRank(nn.Module):
    """W = W0 + B A, with B = 0 at the start. A is random (LoRA), or W0's leading right singular
    vectors (DAMA)."""

    def __init__(self, weight, rank, svd, train_basis):
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        if svd:
            A = torch.linalg.svd(weight.float().cpu(), full_matrices=False)[2][:rank]
        else:
            A = torch.randn(rank, columns) / columns**0.5
        self.A = nn.Parameter(A.to(weight), requires_grad=train_basis)
        self.B = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):  # fp32, as it will be merged
            return weight + self.B @ self.A  # (12)


def dama_ranks(layers, rank_max, rank_min):
    """(12) The U over depth: down over the first third, low in the middle, up over the last."""
    third = max(1, layers // 3)
    down = [round(r) for r in np.linspace(rank_max, rank_min, third)]  # (12)
    return down + [rank_min] * (layers - 2 * third) + down[::-1]


def linears(layer):
    attention, block = layer.attention, layer.feed_forward
    return attention.qkv, attention.proj, block.intermediate_dense, block.output_dense


def add_adapters(model, o):
    """After this only the adapters, the heads and, by their averages, the codebooks move."""
    for part in model.student, model.supervised_classifiers:
        part.requires_grad_(False)
    model.mask_embedding.requires_grad_(False)
    dama, layers = o.method == "dama", len(model.student.layers)
    third = max(1, layers // 3)
    ranks = dama_ranks(layers, o.rank_max, o.rank_min) if dama else [o.rank_max] * layers
    for i, (layer, rank) in enumerate(zip(model.student.layers, ranks)):
        frozen = dama and (o.basis == "all" or third <= i < layers - third)
        for linear in linears(layer):
            adapter = LowRank(linear.weight.data, rank, svd=dama, train_basis=not frozen)
            parametrize.register_parametrization(linear, "weight", adapter)


# ======== the stage ========


def main():
    # ======== options, setup ========
    o, _ = pretrain.parse_options(Options, PRESETS)
    check_options(o)
    place = pretrain.setup(o)
    torch.manual_seed(o.seed)
    changes = dict(ema_start=o.ema_start, codebook_decay=o.codebook_decay, layer_drop=0.0)
    model, inventory = spidr.load_init(o.init, **changes)
    pretrain.to_device(model, o, place)

    # ======== data ========
    rows = audio_rows(o, place)
    o.steps = o.steps or steps_for(seconds_of(rows) / 3600)
    pretrain.check_options(o, model.config)
    rows, held_out = hold_out(rows, o, model.config)
    unlabelled = data.Batches(rows, model.config, o, place.world * o.accumulate)

    # ======== model, optimizer ========
    before = [[linear.weight.detach().clone() for linear in linears(layer)]
              for layer in model.student.layers]
    model.freeze_front_end()
    if o.method != "full":
        add_adapters(model, o)
    optimizer = pretrain.make_optimizer(model, o)

    # ======== resume ========
    first, totals = pretrain.resume(
        pretrain.open_run(o, model, place, rows), model, optimizer, "unmerged")
    if first >= o.steps:
        score(o, place, "after", o.out)
        return pretrain.finished(o, place)
    score(o, place, "before", o.init)
    log, stop = Log(o, place, o.steps, first, totals), Stop(place)

    # ======== loop ========
    batches = fetch(unlabelled, o, place, first, log)
    model.train()
    for step in range(first, o.steps):
        done, step_seed = step + 1, (o.seed, step, place.rank)
        micro_batches = next(batches)
        if step == 0 and o.forgetting:
            forget(model, micro_batches, o, place, (o.seed, 8), step_seed)  # (11)
        if step == 0 and held_out:
            log.add(pretrain.validate(model, held_out, o, place))
            log.write(0)
        seed_step(*step_seed)
        log.add(train_step(model, optimizer, micro_batches, done, lr_at(step, o), o, place))
        stopping = stop.agreed(done)
        saving = stopping or done % o.save_every == 0 or pretrain.is_kept(done, o)
        if saving and held_out:
            log.add(pretrain.validate(model, held_out, o, place))
        if saving or done % o.log_every == 0:
            log.write(done)
        if saving:
            more = dict(unmerged=model.state_dict(), inventories=inventory)
            pretrain.save_checkpoint(o, place, merged(model), optimizer, done, log, **more)
        if stopping and done < o.steps:
            pretrain.leave(place, done)
    if place.first:
        conclude(o, place, log, model, before, seconds_of(rows))


# ======== plumbing: skip at first reading ========


def check_options(o):
    require(o.method in ("full", "lora", "dama"), f"--method {o.method}: full, lora or dama")
    require(o.basis in ("all", "middle"), f"--basis {o.basis}: middle or all")
    require(0 <= o.held_out < 1, f"--held-out {o.held_out}: from 0 to less than 1")
    require(1 <= o.rank_min <= o.rank_max,
            f"--rank-min {o.rank_min}, --rank-max {o.rank_max}: 1 <= min <= max")


@torch.no_grad()
def merged(model):
    """The state of a plain SpidR, with W0 + B A in the place of W0, B and A."""
    state = {name: t for name, t in model.state_dict().items() if ".parametrizations." not in name}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            state[f"{name}.weight"] = module.weight.detach()
    return state


@torch.no_grad()
def print_changes(model, before):
    """By layer: rank, trained parameters, |W - W0| / |W0| over its four products."""
    print(f"{'layer':>5} {'rank':>5} {'trained':>10} {'change':>9}")
    for i, (layer, old) in enumerate(zip(model.student.layers, before), 1):
        weights = [linear.weight for linear in linears(layer)]
        rank = "full"
        if parametrize.is_parametrized(layer.attention.qkv):
            rank = len(layer.attention.qkv.parametrizations.weight[0].A)
        trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        moved = sum((w - w0).square().sum() for w, w0 in zip(weights, old)).sqrt()
        change = moved / sum(w0.square().sum() for w0 in old).sqrt()
        print(f"{i:>5} {rank:>5} {trained:>10} {change:>9.2e}")


def print_held_out(path):
    """How the loss went on the audio that was held out: all that one knows without labels."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records = [record for record in records if record.get("valid_loss") is not None]
    if not records:
        return
    names = "loss", "accuracy", "target_ppl", "active"
    print("held out, step", *(f"{name:>10}" for name in names))
    for record in records:
        print(f"{record['step']:>14}", *(f"{record['valid_' + name]:>10.3f}" for name in names))
    best = min(records[1:] or records, key=lambda record: record["valid_loss"])
    if records[-1]["valid_loss"] > 1.02 * best["valid_loss"]:
        print(f"warning: the loss on held-out audio has risen since step {best['step']}: so many "
              "steps may be too many for so little audio", file=sys.stderr)


def hold_out(rows, o, config):
    """The recordings to learn from, and the batches of those to follow the loss on, if any."""
    order = np.random.default_rng([o.seed, 10]).permutation(len(rows))
    count = min(math.ceil(o.held_out * len(rows)), len(rows) - 1)  # one is left to learn from
    kept, held_out = ([rows[i] for i in sorted(part)] for part in (order[count:], order[:count]))
    return kept, data.Batches(held_out, config, o, stream=(2,)) if held_out else None


def conclude(o, place, log, model, before, seconds):
    pretrain.summary(log, f"{o.method}, {o.steps} steps on {seconds / 60:.1f} min")
    print_changes(model, before)
    print_held_out(log.path)
    score(o, place, "after", o.out)
    print(f"next: python evaluate.py units --model {o.out} --audio FOLDER --out units.jsonl")


def audio_rows(o, place):
    path = o.audio
    if not path:
        pretrain.make_toy(o, place, "target")
        from extras.toy import TARGETS
        o.language = o.language or TARGETS[0]
        path = Path(o.toy) / "target" / f"{o.language}.csv"
        require(path.exists(), f"--language {o.language}: the toy world's new ones are "
                f"{', '.join(TARGETS)}")
    rows = pretrain.read_rows(path, o)
    if o.language:
        rows = [row for row in rows if row.language == o.language]
        require(rows, f"--language {o.language}: no recordings in {path}")
    return subset(rows, data.parse_seconds(o.budget), o.seed) if o.budget else rows


def subset(rows, seconds, seed):
    """A random part of the recordings, which together last about so long."""
    have = seconds_of(rows)
    require(have >= seconds, f"--budget {seconds:g} s: there are only {have:.0f} s of audio")
    order = np.random.default_rng([seed, 9]).permutation(len(rows))
    ends = np.cumsum([rows[i].num_samples for i in order]) / data.SAMPLE_RATE
    return [rows[i] for i in sorted(order[: np.searchsorted(ends, seconds) + 1])]


def seconds_of(rows):
    return sum(row.num_samples for row in rows) / data.SAMPLE_RATE


def score(o, place, when, run):
    """ABX, if there are items. Before the first step, so that what does not fit is told then."""
    out = Path(o.out) / f"abx_{when}.json"
    if not place.first or out.exists() or o.audio and not o.items:
        return
    items, audio = o.items, o.items_audio or o.audio
    if not items:
        from extras.toy import toy
        toy(o.toy, ["eval"])
        items = Path(o.toy) / "eval" / f"{o.language}.item"
        audio = items.with_suffix(".csv")
    pretrain.show(
        "evaluate.py", "abx", "--model", run, "--items", items, "--audio", audio, "--out", out)


if __name__ == "__main__":
    spidr.run(main)
