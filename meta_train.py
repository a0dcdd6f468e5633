"""Stage 2: MAdaPT, meta-training for fast adaptation (SpidR-Adapt, arXiv 2512.21204): FOBLO, or Reptile.

    python meta_train.py --init runs/pretrain                           the toy world
    torchrun --nproc_per_node=16 meta_train.py --init runs/pretrain --manifest train.csv --alignments align.csv
                                                                        the paper's run: 8 workers of 2 GPUs
    python meta_train.py ... --accumulate 2                             the same on one GPU, one worker after another

An episode is one worker's work on one task, some hours of one language: inner steps without labels, outer steps with
them. Writes to --out what pretraining writes, and worker_R_step_N.pt, what each process needs to resume anywhere. The
"model" in last.pt is phi, the initialisation that adapt.py starts from.
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
import model as spidr
import pretrain
from model import Config, InputError, SpidR, all_sum, require
from pretrain import (
    Log, Place, Stop, autocast, barrier, fetch, finished, lr_at, make_optimizer, open_run, parse_options, seed_step,
    setup, stopped, summary, train_step,
)

# ======== options ========


@dataclass
class Options(pretrain.Options):
    """The papers' numbers. A comment is also the option's help."""

    init: str = "runs/pretrain"  # where phi starts: a run, a checkpoint, a released checkpoint, or 'random'
    out: str = "runs/meta"  # the run's folder
    method: str = "foblo"  # foblo or reptile
    workers: int = 8  # episodes a meta-update, on as many processes as there are
    updates: int = 100  # meta-updates
    inner_steps: int = 1_800  # M, self-supervised steps of an episode
    outer_steps: int = 200  # N, supervised steps of an episode; Reptile makes them self-supervised
    beta: float = -1.0  # of the meta-update; -1: 0.01 for FOBLO from an SSL/SL init, else 0.1
    forgetting: bool = True  # active forgetting at the start of an episode
    refit_steps: int = 20  # SGD steps that fit the fresh heads to the fresh codebooks
    refit_lr: float = 5e-2  # their rate
    ramp_steps: int = 600  # linear ramp of the learning rate at the start of an episode
    chunk_seconds: float = 36_000.0  # audio of a task
    chunk_min_seconds: float = 100.0  # a smaller remainder joins its neighbour
    offload: bool = False  # keep phi and the sum of updates off the GPU
    lr: float = 5e-5  # peak learning rate
    hold_steps: int = 88_000  # at the peak
    decay_steps: int = 100_000  # exponential decay
    layer_drop: float = 0.05  # of the student
    codebook_decay: float = 0.9  # of the codewords' sums and counts
    supervised_layer: int = 0  # whose output the phoneme classifiers read; 0: 8 from an SSL/SL init, else 6 (of 12)
    steps: int = 0  # not set: updates x (inner + outer steps)
    save_every: int = 1_000  # steps between checkpoints


# tiny: episodes of 30 steps move the weights by little, so phi takes all of what they bring.
PRESETS = {
    "base": {},
    "tiny": pretrain.PRESETS["tiny"] | dict(
        workers=2, updates=10, inner_steps=20, outer_steps=10, beta=1.0, lr=1e-3, warmup_steps=30, hold_steps=135,
        decay_steps=135, ramp_steps=6, batch_samples=256_000, chunk_seconds=240.0, layer_drop=0.0, supervised_layer=3,
        steps=0, save_every=60),
}


def check_options(o):
    require(o.method in ("foblo", "reptile"), f"--method {o.method}: foblo or reptile")
    require(min(o.workers, o.updates, o.inner_steps) >= 1 and o.outer_steps >= 0,
            "--workers, --updates and --inner-steps are at least 1, --outer-steps is not negative")
    require(o.alignments or not o.manifest or o.method == "reptile" or not o.outer_steps,
            "--method foblo needs --alignments (reptile does without)")


# ======== data: tasks ========


def make_tasks(rows, o, draw):
    """[(language, rows)]: each language's audio cut into chunks, anew with each draw, always as many."""
    by_language, tasks = defaultdict(list), []
    for row in rows:
        require(row.language, f"{row.where}: meta-training needs the language of every recording")
        by_language[row.language].append(row)
    for number, (language, members) in enumerate(sorted(by_language.items())):
        rng = np.random.default_rng([o.seed, 4, draw, number])
        members = [members[i] for i in rng.permutation(len(members))]
        starts = np.cumsum([0] + [row.num_samples / data.SAMPLE_RATE for row in members])
        require(starts[-1] >= o.chunk_min_seconds, f"language {language}: {starts[-1]:.0f} s of audio, a task needs at "
                f"least --chunk-min-seconds {o.chunk_min_seconds:g}")
        longest = np.diff(starts).max()  # a chunk is never empty, whatever the order of the recordings
        require(longest <= o.chunk_seconds, f"language {language}: a recording of {longest:.0f} s is longer than "
                f"--chunk-seconds {o.chunk_seconds:g}")
        whole, rest = divmod(starts[-1], o.chunk_seconds)
        count = max(1, int(whole) + (rest >= max(o.chunk_min_seconds, longest)))
        chunk = np.minimum(starts[:-1] // o.chunk_seconds, count - 1)
        tasks += [(language, [row for row, c in zip(members, chunk) if c == i]) for i in range(count)]
    order = np.random.default_rng([o.seed, 5, draw]).permutation(len(tasks))
    return [tasks[i] for i in order]


class Episodes:
    """The batches of any episode, with and without labels, of one task: for the ranks of its worker, `team`."""

    def __init__(self, o, config, place, team, inventory):
        self.o, self.config, self.group = o, config, team.world * o.accumulate
        self.rows, labelled, self.classes, self.inventory = pretrain.read_data(o, place, inventory)
        self.labelled = defaultdict(list)
        for row in labelled:
            self.labelled[row.language].append(row)
        self.tasks = len(make_tasks(self.rows, o, draw=0))
        for draw in range(-(-o.updates * o.workers // self.tasks)):  # what is too small is told now, not after hours
            for language, rows in make_tasks(self.rows, o, draw):
                try:
                    data.Batches(rows, config, o, self.group)
                except InputError as error:
                    raise InputError(f"a task of {language}: {error}") from None
        if o.method == "foblo" and o.outer_steps:
            for language in sorted({row.language for row in self.rows}):
                require(self.labelled[language], f"language {language}: no alignments, which FOBLO's outer steps need")

    def __call__(self, update, worker):
        """Episode `update` of a worker: the next task of the shuffle."""
        o, number = self.o, update * self.o.workers + worker
        language, rows = make_tasks(self.rows, o, draw=number // self.tasks)[number % self.tasks]
        unlabelled = data.Batches(rows, self.config, o, self.group, stream=(6, number))
        if o.method == "reptile" or not o.outer_steps:
            return unlabelled, None
        labelled = data.Batches(self.labelled[language], self.config, o, self.group, self.classes, stream=(7, number))
        return unlabelled, labelled


# ======== active forgetting (SpidR-Adapt) ========


def forget(model, micro_batches, o, team, episode_seed, step_seed):
    """Fresh codebooks and heads, the same on all ranks of the worker; then the heads are fitted to the fresh labels, on
    the student's outputs in the very forward pass, dropout included, that the first step is about to make."""
    seed_step(*episode_seed)
    for codebook, head in zip(model.codebooks, model.heads):
        codebook.reset()
        head[0].reset_parameters()
    seed_step(*step_seed)
    inputs, labels = [], []
    with torch.no_grad(), autocast(o, team):
        for batch in micro_batches:
            z, targets = model.masked_frames(batch["wav"].to(team.device), batch["mask"])
            inputs.append(torch.stack(z).float())
            labels.append(model.assign(targets))
    fit_heads(model.heads, torch.cat(inputs, 1), torch.cat(labels, 1), o.refit_steps, o.refit_lr, model.group)


def fit_heads(heads, z, labels, steps, lr, group=None):
    """SGD on each head's cross-entropy over all frames of the worker: z [K, M, D], labels [K, M]."""
    frames = all_sum(torch.tensor(float(labels.shape[1]), device=z.device), group)
    for _ in range(steps):
        for head, x, y in zip(heads, z, labels):
            parameters = list(head.parameters())
            loss = F.cross_entropy(head(x), y, reduction="sum") / frames
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                p.data.sub_(lr * all_sum(gradient, group))


# ======== MAdaPT: FOBLO and Reptile (SpidR-Adapt) ========
# phi and theta are vectors of every parameter *and buffer* (teacher, codebooks, classifiers), all but the step counter.
# An episode resets theta to phi and, by forgetting, the codebooks and heads. It does not reset Adam: a worker's moments
# persist from episode to episode. The teacher stands still: nothing here calls update_teacher.


def cyclic_lr(step, o):
    """In an episode a linear ramp to the envelope (lr_at) of its end; in supervised steps the envelope itself."""
    length = o.inner_steps + o.outer_steps
    start = step - step % length
    if o.method == "foblo" and step - start >= o.inner_steps:
        return lr_at(step, o)
    hold = o.warmup_steps + o.hold_steps
    cap = lr_at(start + length if step > hold else min(start + length, hold), o)
    return cap * min(1.0, o.lr_floor + (1 - o.lr_floor) * (step - start) / max(1, o.ramp_steps))


def theta(model):
    return [t for name, t in model.state_dict().items() if name != "current_step"]


@torch.no_grad()
def add(vectors, others, scale):
    """vectors += scale * others, wherever the vectors are kept."""
    torch._foreach_add_(vectors, [t.to(v.device) for v, t in zip(vectors, others)], alpha=scale)


def meta_train(o, model, phi, delta, optimizers, workers, episodes, team, log, at):
    """The bi-level loop, for the workers of this process, from `at` = (meta-update, which of them, step) on. After each
    step, and the meta-update if one is due, it yields where to go on and the metrics: one may stop at any."""
    length = o.inner_steps + o.outer_steps
    inner = o.inner_steps if o.method == "foblo" else length  # Reptile has no labels: all steps are self-supervised
    for update in range(at[0], o.updates):
        for i in range(at[1], len(workers)):
            first, worker = at[2], workers[i]
            unlabelled, labelled = episodes(update, worker)
            unlabelled = fetch(unlabelled, o, team, first, log)
            labelled = labelled and fetch(labelled, o, team, max(first - inner, 0), log)
            if first == 0:
                torch._foreach_copy_(theta(model), phi)  # theta_0 = phi
                if o.method == "reptile":
                    add(delta, phi, -1)  # delta -= phi
            for s in range(first, length):
                step, supervised = update * length + s, s >= inner
                step_seed = (o.seed, step, worker * team.world + team.rank)
                micro_batches = list(itertools.islice(labelled if supervised else unlabelled, o.accumulate))
                if s == 0 and o.forgetting:
                    forget(model, micro_batches, o, team, (o.seed, step, worker, 8), step_seed)
                seed_step(*step_seed)
                lr = cyclic_lr(step, o)
                layer = o.supervised_layer if supervised else 0
                metrics = train_step(model, optimizers[i], micro_batches, lr, o, team, layer) | {"lr": torch.tensor(lr)}
                if o.method == "foblo" and s + 1 == inner:
                    add(delta, theta(model), -1)  # delta -= theta_M
                if s + 1 < length:
                    yield (update, i, s + 1), metrics
            add(delta, theta(model), 1)  # FOBLO: delta += theta_{M+N} - theta_M; Reptile: delta += theta_end - phi
            at = (update, i + 1, 0)
            if i + 1 < len(workers):
                yield at, metrics

        # phi <- phi + beta * mean over workers of delta; the ranks of a worker all hold their worker's delta
        for d in delta:
            d.copy_(all_sum(d.to(team.device)))
        add(phi, delta, o.beta / (o.workers * team.world))
        size = torch.stack([d.norm() for d in delta]).norm() / torch.stack([p.norm() for p in phi]).norm()
        torch._foreach_zero_(delta)
        at = (update + 1, 0, 0)
        yield at, metrics | {"meta_update": torch.tensor(at[0]), "relative_delta": size / (o.workers * team.world)}


# ======== the stage ========


def lay_out(o, place):
    """The workers of this process, its place among the ranks of its worker, and their process group."""
    require(place.world % o.workers == 0 or o.workers % place.world == 0,
            f"{o.workers} workers and {place.world} ranks: one must divide the other")
    size = max(1, place.world // o.workers)
    workers = list(range(place.rank // size, o.workers, place.world))
    group = dist.new_subgroups(size)[0] if place.world > 1 else None
    return workers, Place(place.rank % size, size, place.device), group


def warn(place, message):
    if place.first:
        print(f"warning: {message}", file=sys.stderr)


def initial_model(o, place):
    """The network that phi is taken from, and its phone inventories; the defaults that follow the init are set."""
    changes = dict(layer_drop=o.layer_drop, codebook_decay=o.codebook_decay, ema_start=1.0)
    if o.init == "random":
        warn(place, "a random initialisation; the papers find that meta-training does not converge from one")
        model, inventory = SpidR(Config(**spidr.PRESETS[o.preset] | changes)), {}
    else:
        model, inventory = spidr.load_init(o.init, **changes)
    labelled_init = len(model.supervised_classifiers) > 0
    if o.beta < 0:
        o.beta = 0.01 if labelled_init and o.method == "foblo" else 0.1
    o.supervised_layer = o.supervised_layer or max(1, model.config.layers * (8 if labelled_init else 6) // 12)
    if (o.beta > 0.1 or 0 < o.beta < 0.001) and o.preset != "tiny":
        warn(place, f"beta {o.beta}: the papers find above 0.1 unstable and below 0.001 slow")
    return model.to(place.device), inventory


def main():
    # ---- options, setup
    o, _ = parse_options(Options, PRESETS, without="steps valid benchmark freeze_step keep_every")
    check_options(o)
    place = setup(o)
    torch.manual_seed(o.seed)
    model, inventory = initial_model(o, place)
    pretrain.compile_parts(model, o)
    workers, team, model.group = lay_out(o, place)
    length = o.inner_steps + o.outer_steps
    o.steps = o.updates * len(workers) * length  # of this process
    pretrain.check_options(o, model.config)

    # ---- data
    episodes = Episodes(o, model.config, place, team, inventory)

    # ---- model, optimizers: Adam's moments are a worker's own
    for language, phones in episodes.inventory.items():
        model.add_language(language, len(phones))
    optimizers = [make_optimizer(model, o) for _ in workers]
    keep = "cpu" if o.offload else place.device
    phi = [t.to(keep, copy=True) for t in theta(model)]
    delta = [torch.zeros_like(t) for t in phi]

    # ---- resume
    checkpoint, at, done = open_run(o, model.config, model, place, episodes.rows), (0, 0, 0), 0
    if checkpoint:
        done, at = int(checkpoint["step"]), tuple(checkpoint["at"])
        ranks = checkpoint["ranks"]
        require(ranks == place.world, f"{o.out} was made by {ranks} processes: only as many can resume it")
        _, mine = spidr.read_checkpoint(worker_file(o, place, done))
        spidr.load_state(model, mine["model"], o.out)
        phi, delta = ([t.to(keep) for t in mine[name]] for name in ("phi", "delta"))
        for optimizer, state in zip(optimizers, mine["optimizers"]):
            optimizer.load_state_dict(state)
        if at[0] == o.updates:
            return finished(o, place)
    log, stop = Log(o, place, done, checkpoint and checkpoint["log"]), Stop(place)

    # ---- loop
    model.train()
    for at, metrics in meta_train(o, model, phi, delta, optimizers, workers, episodes, team, log, at):
        done = (at[0] * len(workers) + at[1]) * length + at[2]
        stopping = stop.agreed(done)
        log.step(done, metrics, due=done % o.save_every == 0 or stopping or "meta_update" in metrics)
        if done % o.save_every == 0 or at[0] == o.updates or stopping:
            save(o, place, model, phi, delta, optimizers, done, at, log, episodes.inventory)
        if stopping and at[0] < o.updates:
            stopped(log, done)
    if place.first:
        summary(log, f"{o.method}, {o.updates} meta-updates of {o.workers} workers")
        print(f"next: python adapt.py --init {o.out} --audio FOLDER")


def worker_file(o, place, done):
    return Path(o.out) / f"worker_{place.rank}_step_{done}.pt"


def save(o, place, model, phi, delta, optimizers, done, at, log, inventory):
    """Each process writes what it alone knows; then last.pt, naming the step, makes it count; then the old ones go."""
    spidr.save(worker_file(o, place, done), model.state_dict(), phi=phi, delta=delta,
               optimizers=[optimizer.state_dict() for optimizer in optimizers])
    barrier()
    if place.first:
        state = model.state_dict()
        state.update(zip([name for name in state if name != "current_step"], phi))  # as theta() lists them
        for name in ["last.pt"] + [f"update_{at[0]}.pt"] * (at[0] == o.updates):
            spidr.save(Path(o.out) / name, state, step=done, at=at, ranks=place.world, log=log.state,
                       inventories=inventory)
    barrier()
    for old in Path(o.out).glob(f"worker_{place.rank}_step_*.pt"):
        if old != worker_file(o, place, done):
            old.unlink()


if __name__ == "__main__":
    spidr.run(main)
