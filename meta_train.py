"""Stage 2: MAdaPT-FOBLO, meta-training for fast adaptation by first-order bi-level optimisation
(SpidR-Adapt, arXiv 2512.21204).

    python meta_train.py                                        the toy world, from runs/pretrain
    torchrun --nproc_per_node=16 meta_train.py --init runs/pretrain --manifest train.csv \\
                                               --alignments phones.csv
    python meta_train.py ... --accumulate 2                     the same on one GPU

The second is the papers' run: 8 workers of 2 GPUs. On fewer processes the workers take turns.

It looks for an initialisation phi from which a language is quickly learnt without labels. For each
meta-update, and in it for each worker, an episode on one task, some hours of one language:

    theta = phi, with fresh codebooks and heads                 (11) active forgetting
    M self-supervised steps, the inner loop, take theta to theta_M
    N supervised steps, the outer loop, move theta on; they take any labelled audio of the language
    delta += theta - theta_M                                    (8)  FOBLO
    delta += theta - phi                                        (9)  Reptile, the baseline

and then phi += beta * (mean of delta over the workers). In Reptile all M + N steps are
self-supervised. FOBLO approximates MAML (extras/maml.py): if theta_M is near phi, a step that helps
at theta_M helps at phi too. --out holds a run; the "model" in its last.pt is phi, from which
adapt.py starts. A run that is stopped or killed starts the episode it was in again, to the same
bits.
"""

import itertools
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import model as networks
import pretrain
from model import Config, InputError, SpidR, all_sum, full_precision, option, require
from pretrain import Log, Ranks, autocast, fetch, lr_at, seed_step, train_step

# ======== options ========


@dataclass
class EpisodeOptions(pretrain.StageOptions):
    """What an episode of meta-training and an adaptation have: they begin alike."""

    forgetting: bool = option(True, "fresh codebooks and heads at the start")
    refit_steps: int = option(20, "SGD steps that fit the fresh heads to the fresh codebooks")
    refit_lr: float = option(5e-2, "their rate")
    ema_start: float = option(1.0, "the teacher's decay; 1: it is frozen")


@dataclass
class Options(EpisodeOptions):
    """The numbers are the papers'."""

    init: str = option("runs/pretrain", "a run, a checkpoint, a released model's name; or random")
    out: str = option("runs/meta", "the run's folder")
    manifest: str = option("", "CSV, TSV or folder of audio; without one the toy world")
    alignments: str = option("", "phone alignments, which FOBLO's outer loop learns from")
    method: str = option("foblo", "foblo or reptile")
    workers: int = option(8, "episodes of a meta-update")
    updates: int = option(100, "meta-updates")
    inner_steps: int = option(1_800, "M, self-supervised steps of an episode")
    outer_steps: int = option(200, "N, supervised steps of an episode")
    beta: float = option(-1.0, "-1: 0.01 for FOBLO from SSL/SL, else 0.1; more is unstable")
    ramp_steps: int = option(600, "linear ramp of the rate at the start of an episode")
    chunk_seconds: float = option(36_000.0, "audio of a task")
    chunk_min_seconds: float = option(100.0, "a smaller remainder joins its neighbour")
    offload: bool = option(False, "keep phi, theta_M and delta off the GPU")
    lr: float = option(5e-5, "peak learning rate")
    hold_steps: int = option(88_000, "at the peak")
    decay_steps: int = option(100_000, "exponential decay")
    layer_drop: float = option(0.05, "of the student")
    codebook_decay: float = option(0.9, "of the codewords' sums and counts")
    supervised_layer: int = option(0, "read by phone classifiers; 0: 8 of 12 from SSL/SL, else 6")

    METHODS = "foblo", "reptile"

    @property
    def steps(self):
        """Steps that a worker makes."""
        return self.updates * (self.inner_steps + self.outer_steps)


# Episodes of 30 steps move the weights by little, so phi takes all of what they bring.
SHORT = dict(
    workers=2, updates=10, inner_steps=20, outer_steps=10, beta=1.0, lr=1e-3, lr_floor=0.05,
    warmup_steps=30, hold_steps=135, decay_steps=135, ramp_steps=6, log_every=50, layer_drop=0.0)
PRESETS = {
    "base": {},
    "tiny": pretrain.TINY | SHORT | dict(chunk_seconds=240.0, supervised_layer=3),
    "small": pretrain.SMALL | SHORT | dict(supervised_layer=3),
}


# ======== tasks ========


def make_tasks(rows, options, draw):
    """[(language, recordings)], shuffled. Each language's audio is cut into chunks, anew with each
    draw but always into as many."""
    tasks = []
    for number, (language, members) in enumerate(by_language(rows).items()):
        rng = np.random.default_rng([options.seed, data.STREAM_CHUNKS, draw, number])
        members = [members[i] for i in rng.permutation(len(members))]
        seconds = np.array([row.num_samples / data.SAMPLE_RATE for row in members])
        chunks, rest = divmod(seconds.sum(), options.chunk_seconds)
        # A chunk has the recordings that start in it. A remainder as long as the longest recording
        # has one for sure. A shorter one could be empty, so it joins the chunk before it.
        chunks = max(1, int(chunks) + (rest >= max(options.chunk_min_seconds, seconds.max())))
        starts = np.cumsum(seconds) - seconds
        chunk_of = np.minimum(starts // options.chunk_seconds, chunks - 1)
        edges = np.searchsorted(chunk_of, np.arange(chunks + 1))
        tasks += [(language, members[i:j]) for i, j in zip(edges, edges[1:])]
    rng = np.random.default_rng([options.seed, data.STREAM_TASK_ORDER, draw])
    return [tasks[i] for i in rng.permutation(len(tasks))]


# ======== (11) active forgetting ========


def forget(model, micro_batches, options, ranks, episode_seed, step_seed):
    """Codebooks and heads start afresh, alike on all ranks of the worker, which share
    `episode_seed`. Then each head is fitted to the labels that its new codebook gives on the first
    step's batches, under the first step's dropout (`step_seed`). The step then takes these batches
    again."""
    seed_step(*episode_seed)
    for codebook, head in zip(model.codebooks, model.heads):
        codebook.reset()  # (11)
        head[0].reset_parameters()  # (11)
    if options.codebook_start == "targets":
        from extras import small_batches  # base has no need of it
        small_batches.start_codebooks(model, micro_batches[0], options, ranks)
    seed_step(*step_seed)
    inputs, labels = [], []
    with torch.no_grad(), autocast(options, ranks):
        for batch in micro_batches:
            z, targets = model.masked_frames(batch["wav"].to(ranks.device), batch["mask"])
            inputs.append(torch.stack(z).float())
            labels.append(model.assign(targets))
    fit_heads(model.heads, torch.cat(inputs, 1), torch.cat(labels, 1), options, ranks)


def fit_heads(heads, inputs, labels, options, ranks):
    """SGD on each head's cross-entropy over all frames of the worker: [K, M, D], [K, M]."""
    frames = torch.tensor(float(labels.shape[1]), device=inputs.device)
    frames = all_sum([frames], ranks.group)[0].clamp(min=1)
    weights = list(heads.parameters())
    with full_precision(inputs.device):
        for _ in range(options.refit_steps):
            loss = sum(F.cross_entropy(head(x), y, reduction="sum") / frames
                       for head, x, y in zip(heads, inputs, labels))
            gradients = all_sum(list(torch.autograd.grad(loss, weights)), ranks.group)
            for p, gradient in zip(weights, gradients):
                p.data.sub_(options.refit_lr * gradient)  # (11)


# ======== MAdaPT: (8) FOBLO and (9) Reptile ========
# phi, theta, theta_M and delta are vectors: every parameter and every buffer of the model, one
# after the other, also those of its teacher, codebooks and classifiers, but not the step counter.
# Adam is not reset: its moments stay with their worker from one episode to the next. The teacher is
# frozen unless --ema-start is less than 1. A worker is one or more ranks, which share its batches.


def tensors_of(model):
    return [t for name, t in model.state_dict().items() if name != "current_step"]


def to_vector(model, device):
    """theta, a copy."""
    return torch.cat([t.flatten() for t in tensors_of(model)]).to(device)


def load_vector(model, vector):
    for t, part in zip(tensors_of(model), vector.split([t.numel() for t in tensors_of(model)])):
        t.copy_(part.view_as(t))


def episode_lr(step, options):
    """The rate of a step, counted from 0 over all episodes. Supervised steps take `lr_at`. In the
    self-supervised ones the rate climbs for `ramp_steps` to what `lr_at` will be at the end of the
    episode, and stays there."""
    length = options.inner_steps + options.outer_steps
    s = step % length
    if options.method == "foblo" and s >= options.inner_steps:
        return lr_at(step, options)
    ramp = options.lr_floor + (1 - options.lr_floor) * s / max(1, options.ramp_steps)
    return lr_at(step - s + length, options) * min(1.0, ramp)


def meta_train(options, model, phi, delta, optimizers, workers, episodes, ranks, team, log, done):
    """The bi-level loop over the workers of this process. `team` are the ranks that share a worker.
    `done` says where to go on: after how many meta-updates, and episodes of the next one."""
    M, N, foblo = options.inner_steps, options.outer_steps, options.method == "foblo"
    for update in range(done[0], options.updates):
        for i in range(done[1], len(workers)):
            worker = workers[i]
            unlabelled, labelled = episodes(update * options.workers + worker)
            unlabelled_steps = fetch(unlabelled, options, team, 0, log)
            labelled_steps = labelled and fetch(labelled, options, team, 0, log)
            load_vector(model, phi)
            for s in range(M + N):
                step, supervised = update * (M + N) + s, foblo and s >= M
                step_seed = options.seed, step, worker * team.world + team.rank
                micro_batches = next(labelled_steps if supervised else unlabelled_steps)
                if s == 0 and options.forgetting:
                    episode_seed = options.seed, step, worker, data.STREAM_FORGET
                    forget(model, micro_batches, options, team, episode_seed, step_seed)  # (11)
                seed_step(*step_seed)
                metrics = train_step(
                    model, optimizers[i], micro_batches, step + 1, episode_lr(step, options),
                    options, team, options.supervised_layer if supervised else None)
                log.add(metrics)
                if foblo and s + 1 == M:
                    theta_M = to_vector(model, phi.device)
                if (s + 1) % options.log_every == 0 and s + 1 < M + N:
                    log.write((update * len(workers) + i) * (M + N) + s + 1)
            theta = to_vector(model, phi.device)
            delta += theta - (theta_M if foblo else phi)  # (8), (9)
            if i + 1 < len(workers):
                done = update, i + 1
                save(options, ranks, model, phi, delta, optimizers, done, log, episodes.inventory)
        mean = mean_over_workers(delta, options, ranks, team)
        phi += options.beta * mean  # (8), (9)
        log.add({"meta_update": torch.tensor(update + 1),
                 "relative_delta": mean.norm() / phi.norm()})
        delta.zero_()
        done = update + 1, 0
        save(options, ranks, model, phi, delta, optimizers, done, log, episodes.inventory)


def mean_over_workers(delta, options, ranks, team):
    """The ranks of one worker hold the same delta."""
    total = all_sum([delta.to(ranks.device, copy=True)])[0]
    return total.to(delta.device) / (options.workers * team.world)


# ======== the stage ========


def main(options_class=Options, loop=meta_train):
    # ======== options, setup ========
    options, _ = pretrain.parse_options(options_class, PRESETS)
    require(options.method in options_class.METHODS,
            f"--method {options.method}: one of {', '.join(options_class.METHODS)}")
    ranks = pretrain.setup(options)
    torch.manual_seed(options.seed)
    model, inventory = initial_model(options)
    pretrain.check_options(options, model.config)
    pretrain.to_device(model, options, ranks)
    workers, team = lay_out(options, ranks)

    # ======== data ========
    episodes = Episodes(options, model.config, ranks, team, inventory)

    # ======== model, optimizers, vectors ========
    for language, phones in episodes.inventory.items():
        model.add_language(language, len(phones))
    networks.send_from_first(model)
    optimizers = [pretrain.make_optimizer(model, options) for _ in workers]
    delta = torch.zeros_like(to_vector(model, "cpu" if options.offload else ranks.device))

    # ======== resume: (meta-updates done, episodes of this process done in the next one) ========
    done, totals = resume(
        options, ranks, pretrain.open_run(options, model, ranks, episodes.rows), model, delta,
        optimizers)
    if done[0] == options.updates:
        return pretrain.finished(options, ranks)
    phi = to_vector(model, delta.device)
    first = (len(workers) * done[0] + done[1]) * (options.inner_steps + options.outer_steps)
    log = Log(options, ranks, len(workers) * options.steps, first, totals)

    # ======== loop ========
    model.train()
    loop(options, model, phi, delta, optimizers, workers, episodes, ranks, team, log, done)
    if ranks.first:
        what = f"{options.method}, {options.updates} meta-updates of {options.workers} workers"
        pretrain.summary(log, what)
        print(f"next: python adapt.py --init {options.out} --audio FOLDER")


# ======== plumbing: skip at first reading ========


def by_language(rows):
    languages = defaultdict(list)
    for row in rows:
        languages[row.language].append(row)
    return dict(sorted(languages.items()))


class Episodes:
    """The batches of any episode, for the ranks of its worker: all without labels, and the
    labelled ones of the same language."""

    def __init__(self, options, config, ranks, team, inventory):
        supervised = options.method != "reptile" and options.outer_steps > 0
        rows, labelled_rows, self.classes, self.inventory = pretrain.read_data(
            options, ranks, inventory, supervised)
        self.common = config, options, team.world * options.accumulate
        self.labelled_rows, self.rows = by_language(labelled_rows), []
        for language, members in by_language(rows).items():
            seconds, problem = [row.num_samples / data.SAMPLE_RATE for row in members], ""
            if not language:
                problem = f"{members[0].where} and {len(members) - 1} more have none"
            elif supervised and language not in self.labelled_rows:
                problem = "no --alignments, which FOBLO's outer loop needs"
            elif sum(seconds) < options.chunk_min_seconds:
                problem = f"{sum(seconds):.0f} s of audio, less than --chunk-min-seconds"
            elif max(seconds) > options.chunk_seconds:
                problem = f"a recording of {max(seconds):.0f} s is longer than --chunk-seconds"
            if problem:
                ranks.say(f"left out: language {language!r}: {problem}", file=sys.stderr)
            else:
                self.rows += members
        require(self.rows, "no language that meta-training could use")
        self.tasks, draw = [], itertools.count()
        while len(self.tasks) < options.updates * options.workers:
            self.tasks += make_tasks(self.rows, options, next(draw))
        for language, rows in self.tasks:
            try:  # what is too small for a batch is told now, not after hours
                data.Batches(rows, *self.common)
            except InputError as error:
                raise InputError(f"a task of {language}: {error}") from None

    def __call__(self, number):
        language, rows = self.tasks[number]
        unlabelled = data.Batches(rows, *self.common, stream=(data.STREAM_EPISODE, number))
        if language not in self.labelled_rows:
            return unlabelled, None
        return unlabelled, data.Batches(self.labelled_rows[language], *self.common, self.classes,
                                        stream=(data.STREAM_EPISODE_LABELLED, number))


def lay_out(options, ranks):
    """The workers of this process, and its team: the ranks that share its worker."""
    require(ranks.world % options.workers == 0 or options.workers % ranks.world == 0,
            f"{options.workers} workers and {ranks.world} ranks: one must divide the other")
    size = max(1, ranks.world // options.workers)
    workers = list(range(ranks.rank // size, options.workers, ranks.world))
    group = dist.new_subgroups(size)[0] if ranks.world > 1 else None
    return workers, Ranks(ranks.rank % size, size, ranks.device, group)


def initial_model(options):
    """The network that phi is taken from, and its phone inventories. The options whose default
    depends on it are set."""
    changes = dict(layer_drop=options.layer_drop, codebook_decay=options.codebook_decay,
                   ema_start=options.ema_start)
    if options.init == "random":
        config = Config(**networks.PRESETS[options.preset] | changes)
        model, inventory = SpidR(config), {}
    else:
        model, inventory = networks.load_init(options.init, **changes)
    labelled = len(model.supervised_classifiers) > 0
    if options.beta < 0:
        options.beta = 0.01 if labelled and options.method == "foblo" else 0.1
    if not options.supervised_layer:
        options.supervised_layer = max(1, model.config.layers * (8 if labelled else 6) // 12)
    return model, inventory


def worker_file(options, ranks, done):
    return Path(options.out) / f"worker_{ranks.rank}_{done[0]}_{done[1]}.pt"


def save(options, ranks, model, phi, delta, optimizers, done, log, inventory):
    """A record in the log; then each process writes what it alone knows. Then last.pt, which names
    the episode and has phi, makes that count. Then the old files go. It leaves phi in the model."""
    log.write((done[0] * len(optimizers) + done[1]) * (options.inner_steps + options.outer_steps))
    mine = worker_file(options, ranks, done)
    networks.save(mine, {}, delta=delta, optimizers=[x.state_dict() for x in optimizers])
    pretrain.barrier()
    if ranks.first:
        load_vector(model, phi)
        for name in [f"update_{done[0]}.pt"] * (done[0] == options.updates) + ["last.pt"]:
            networks.save(Path(options.out) / name, model.state_dict(), done=done,
                          ranks=ranks.world, totals=log.totals, inventories=inventory)
    pretrain.barrier()
    for old in Path(options.out).glob(f"worker_{ranks.rank}_*"):
        if old != mine:
            old.unlink()


def resume(options, ranks, checkpoint, model, delta, optimizers):
    if not checkpoint:
        return (0, 0), None
    made_by, done = checkpoint["ranks"], tuple(checkpoint["done"])
    require(made_by == ranks.world,
            f"{options.out} was made by {made_by} processes: only as many resume it")
    _, mine = networks.read_checkpoint(worker_file(options, ranks, done))
    model.load_state_dict(checkpoint["model"])
    delta.copy_(mine["delta"])
    for optimizer, state in zip(optimizers, mine["optimizers"]):
        optimizer.load_state_dict(state)
    return done, checkpoint["totals"]


if __name__ == "__main__":
    networks.run(main)
