"""Stage 3: fast adaptation to a new language from unlabelled audio (SpidR-Adapt, arXiv 2512.21204;
DAMA, arXiv 2602.01008).

    python adapt.py                                     a language of the toy world, from runs/meta
    python adapt.py --init runs/meta --audio recordings/ [--budget 10min] [--method full|lora|dama]

In: a run or checkpoint of any stage, or a released one, and a folder or manifest of audio. Out:
--out, whose last.pt is a plain SpidR. The steps are those of self-supervised pretraining, with

    fresh codebooks and heads at the start                        (11) active forgetting
    a frozen downsampler and projection, and a frozen teacher
    W = W0 + B A in the place of W0, with --method lora or dama   (12) low-rank updates

A tenth of the audio is held out, to tell what can be known without labels: loss, accuracy and
codewords in use, before the first step (after forgetting) and at the end. A table tells how far
each layer moved. With --items ABX is scored, too. In preset small nothing is forgotten.
"""

import copy
import json
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize

import data
import model as networks
import pretrain
from meta_train import EpisodeOptions, forget
from model import Config, option, require
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
    method: str = option("full", "full, lora (one rank everywhere) or dama (rank by depth)")
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
    # In small nothing is forgotten: that helped on held-out English (docs/findings.md, 7 and 9).
    "small": pretrain.SMALL | dict(
        steps=200, lr=2e-4, lr_floor=0.05, warmup_steps=10, forgetting=False, codebook_decay=0.99,
        rank_max=16, save_every=250),
}


# ======== how long ========


def steps_for(hours):
    """4,000 for ten minutes, 8,000 for an hour, 16,000 for ten, 24,000 for a hundred; in between
    linear in the logarithm of the hours."""
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
    """(12) The U over depth: down over the first third of the layers, low in the middle third, up
    over the last. Of 12 layers and 32 to 1: 32, 22, 11, 1, then 1, 1, 1, 1, then 1, 11, 22, 32."""
    third = max(1, layers // 3)
    down = [round(r) for r in np.linspace(rank_max, rank_min, third)]  # (12)
    return down + [rank_min] * (layers - 2 * third) + down[::-1]


def linears(layer):
    attention, block = layer.attention, layer.feed_forward
    return attention.qkv, attention.proj, block.intermediate_dense, block.output_dense


def add_adapters(model, options):
    """In the student only the adapters are left to train. Heads train as ever, codebooks follow."""
    for part in model.student, model.supervised_classifiers, model.mask_embedding:
        part.requires_grad_(False)
    dama, layers = options.method == "dama", len(model.student.layers)
    third = max(1, layers // 3)
    layer_ranks = [options.rank_max] * layers
    if dama:
        layer_ranks = dama_ranks(layers, options.rank_max, options.rank_min)
    for i, (layer, rank) in enumerate(zip(model.student.layers, layer_ranks)):
        frozen = dama and (options.basis == "all" or third <= i < layers - third)
        for linear in linears(layer):
            adapter = LowRank(linear.weight.data, rank, svd=dama, train_basis=not frozen)
            parametrize.register_parametrization(linear, "weight", adapter)


# ======== the stage ========


def main():
    # ======== options, setup ========
    options, _ = pretrain.parse_options(Options, PRESETS)
    check_options(options)
    ranks = pretrain.setup(options)
    torch.manual_seed(options.seed)
    model, inventory = networks.load_init(
        options.init, ema_start=options.ema_start, codebook_decay=options.codebook_decay,
        layer_drop=0.0)
    pretrain.to_device(model, options, ranks)

    # ======== data ========
    rows = audio_rows(options, ranks)
    options.steps = options.steps or steps_for(seconds_of(rows) / 3600)
    pretrain.check_options(options, model.config)
    rows, held_out = hold_out(rows, options, model.config)
    unlabelled = data.Batches(rows, model.config, options, ranks.world * options.accumulate)

    # ======== model, optimizer ========
    before = copy.deepcopy(model.student.layers)
    model.freeze_front_end()
    if options.method != "full":
        add_adapters(model, options)
    networks.send_from_first(model)
    optimizer = pretrain.make_optimizer(model, options)

    # ======== resume ========
    first, totals = pretrain.resume(
        pretrain.open_run(options, model, ranks, rows), model, optimizer, "unmerged")
    if first >= options.steps:
        score(options, ranks, "after", options.out)
        return pretrain.finished(options, ranks)
    score(options, ranks, "before", options.init)
    warn_of_days(ranks, model.config)
    log, stop = Log(options, ranks, options.steps, first, totals), Stop(ranks)

    # ======== loop ========
    steps = fetch(unlabelled, options, ranks, first, log)
    model.train()
    for step in range(first, options.steps):
        micro_batches, step_seed = next(steps), (options.seed, step, ranks.rank)
        if step == 0 and options.forgetting:
            episode_seed = options.seed, data.STREAM_FORGET
            forget(model, micro_batches, options, ranks, episode_seed, step_seed)  # (11)
        if step == 0 and held_out:
            log.add(pretrain.validate(model, held_out, options, ranks))
            log.write(0)
        seed_step(*step_seed)
        metrics = train_step(
            model, optimizer, micro_batches, step + 1, lr_at(step, options), options, ranks)
        log.add(metrics)
        pretrain.end_of_step(
            step + 1, options, ranks, optimizer, log, stop,
            lambda: pretrain.validate(model, held_out, options, ranks),
            lambda: dict(state=merged(model), unmerged=model.state_dict(), inventories=inventory))
    if ranks.first:
        report(log, rows, model.student.layers, before)
    score(options, ranks, "after", options.out)
    ranks.say(f"next: python evaluate.py units --model {options.out} --audio FOLDER "
              "--out units.jsonl")


# ======== plumbing: skip at first reading ========


def check_options(options):
    o = options
    require(o.method in ("full", "lora", "dama"), f"--method {o.method}: full, lora or dama")
    require(o.basis in ("all", "middle"), f"--basis {o.basis}: middle or all")
    require(0 <= o.held_out < 1, f"--held-out {o.held_out}: from 0 to less than 1")
    require(1 <= o.rank_min <= o.rank_max,
            f"--rank-min {o.rank_min}, --rank-max {o.rank_max}: 1 <= min <= max")


def warn_of_days(ranks, config):
    if ranks.device.type == "cpu" and config.dim >= Config().dim:
        ranks.say("warning: base takes days on a CPU. Shorter: fewer --steps, --method lora, a "
                  "smaller model, or a GPU", file=sys.stderr)


@torch.no_grad()
def merged(model):
    """The state of a plain SpidR, with W0 + B A in the place of W0, B and A."""
    state = {name: t for name, t in model.state_dict().items() if ".parametrizations." not in name}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            state[f"{name}.weight"] = module.weight.detach()
    return state


@torch.no_grad()
def report(log, rows, layers, before):
    """What was done; by layer: rank, trained parameters, |W - W0| / |W0| over its four products;
    the health of the model on the audio held out, before and after."""
    method, minutes = log.options.method, seconds_of(rows) / 60
    pretrain.summary(log, f"{method}, {log.options.steps} steps on {minutes:.1f} min")
    print(f"{'layer':>5} {'rank':>5} {'trained':>10} {'change':>9}")
    for i, (layer, old) in enumerate(zip(layers, before), 1):
        rank = "full"
        if parametrize.is_parametrized(layer.attention.qkv):
            rank = len(layer.attention.qkv.parametrizations.weight[0].A)
        trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        W, W0 = (torch.cat([linear.weight.flatten() for linear in linears(one)])
                 for one in (layer, old))
        print(f"{i:>5} {rank:>5} {trained:>10} {(W - W0).norm() / W0.norm():>9.2e}")
    records = [json.loads(line) for line in log.path.read_text().splitlines()]
    records = [record for record in records if record.get("valid_loss")]
    for name in ("loss", "accuracy", "active") if records else ():
        values = (record[f"valid_{name}"] for record in (records[0], records[-1]))
        print("held out: {} {:.3f} before, {:.3f} after".format(name, *values))


def hold_out(rows, options, config):
    """What to learn from, and the batches of what to follow the loss on, if any."""
    if options.held_out == 0 or len(rows) < 2:
        return rows, None
    key = options.seed, data.STREAM_HELD_OUT
    held_out, kept = draw(rows, options.held_out * seconds_of(rows), key)
    return kept, data.Batches(held_out, config, options, stream=(data.STREAM_VALID,))


def audio_rows(options, ranks):
    path = options.audio
    if not path:
        pretrain.make_toy(options, ranks, "target")
        from extras.toy import TARGETS
        options.language = options.language or TARGETS[0]
        path = Path(options.toy) / "target" / f"{options.language}.csv"
        require(path.exists(), f"--language {options.language}: the toy world's new ones are "
                f"{', '.join(TARGETS)}")
    rows = pretrain.read_rows(path, options)
    if options.language:
        rows = [row for row in rows if row.language == options.language]
        require(rows, f"--language {options.language}: no recordings in {path}")
    if options.budget:
        rows = subset(rows, data.parse_seconds(options.budget), options.seed)
    return rows


def subset(rows, seconds, seed):
    have = seconds_of(rows)
    require(have >= seconds, f"--budget {seconds:g} s: there are only {have:.0f} s of audio")
    return draw(rows, seconds, (seed, data.STREAM_BUDGET), spare=0)[0]


def draw(rows, seconds, key, spare=1):
    """Random recordings, or pieces of long ones, which together last about so long; and the others,
    of which there are at least `spare`."""
    order = np.random.default_rng(key).permutation(len(rows))
    ends = np.cumsum([rows[i].num_samples for i in order]) / data.SAMPLE_RATE
    count = min(np.searchsorted(ends, seconds) + 1, len(rows) - spare)
    return [[rows[i] for i in sorted(part)] for part in (order[:count], order[count:])]


def seconds_of(rows):
    return sum(row.num_samples for row in rows) / data.SAMPLE_RATE


def score(options, ranks, when, run):
    """ABX, if there are items. Before the first step, so that what does not fit is told then. The
    first rank scores, which may take longer than the ten minutes that a collective waits."""
    patient = None
    if ranks.world > 1:
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    out, items = Path(options.out) / f"abx_{when}.json", options.items
    if ranks.first and not out.exists() and (items or not options.audio):
        audio = options.items_audio or options.audio
        if not items:
            from extras.toy import toy
            items = toy(options.toy, ["eval"]) / "eval" / f"{options.language}.item"
            audio = items.with_suffix(".csv")
        pretrain.show("evaluate.py", "abx", "--model", run, "--items", items, "--audio", audio,
                      "--out", out)
    if patient:
        dist.barrier(patient)


if __name__ == "__main__":
    networks.run(main)
