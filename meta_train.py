"""Stage 2: MAdaPT-FOBLO, meta-training for fast adaptation by first-order bi-level optimisation
(SpidR-Adapt, arXiv 2512.21204).

    python meta_train.py                                        the toy world, from runs/pretrain
    torchrun --nproc_per_node=16 meta_train.py --init runs/pretrain --manifest train.csv \\
                                               --alignments phones.csv
    python meta_train.py ... --accumulate 2                     the same on one GPU

The second is the papers' run: 8 workers of 2 GPUs. On fewer processes the workers take turns.

It looks for an initialisation phi from which a language is quickly learnt without labels. For each
meta-update, and in it for each worker, an episode on one task, some hours of one language:

    theta_0 = phi, with fresh codebooks and heads                           (11) active forgetting
    theta_M         after M self-supervised steps, the inner loop
    theta_{M+N}     after N more steps, which are supervised: the outer loop, on any labelled
                    audio of the language
    phi <- phi + beta * mean over workers of (theta_{M+N} - theta_M)        (8)  FOBLO
    phi <- phi + beta * mean over workers of (theta_{M+N} - phi)            (9)  Reptile
    phi <- phi - beta * alpha * mean over workers of the gradient to phi
                        of the supervised loss at theta_M                   (10) MAML

In Reptile, the baseline, all M + N steps are self-supervised. FOBLO approximates MAML: if theta_M
is near phi, a step that helps at theta_M helps at phi too. --measure compares the two. --out holds
a run; the "model" in its last.pt is phi, from which adapt.py starts. A run that is stopped or
killed starts the episode it was in again, to the same bits.
"""

import itertools
import json
import math
import resource
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import checkpoint

import data
import model as spidr
import pretrain
from model import Config, InputError, SpidR, all_sum, full_precision, option, require
from pretrain import Log, Place, autocast, fetch, lr_at, seed_step, train_step

# ======== options ========


@dataclass
class EpisodeOptions(pretrain.StageOptions):
    """What an episode of meta-training and an adaptation have: they begin alike."""

    forgetting: bool = option(True, "fresh codebooks and heads at the start")
    refit_steps: int = option(20, "SGD steps that fit the fresh heads to the fresh codebooks")
    refit_lr: float = option(5e-2, "their rate")
    ema_start: float = option(1.0, "the teacher's decay; 1: it stands still")


@dataclass
class Options(EpisodeOptions):
    """The numbers are the papers'."""

    init: str = option("runs/pretrain", "a run or a checkpoint; 'random', which does not converge")
    out: str = option("runs/meta", "the run's folder")
    manifest: str = option("", "CSV, TSV or folder of audio; without one the toy world")
    alignments: str = option("", "phone alignments, which FOBLO's outer loop learns from")
    method: str = option("foblo", "foblo, reptile or maml")
    maml_lr: float = option(0.05, "alpha: rate of MAML's inner steps, which are SGD")
    measure: bool = option(False, "only measure an episode of FOBLO and MAML: JSON lines")
    workers: int = option(8, "episodes of a meta-update")
    updates: int = option(100, "meta-updates")
    inner_steps: int = option(1_800, "M, self-supervised steps of an episode")
    outer_steps: int = option(200, "N, supervised steps of an episode")
    beta: float = option(-1.0, "-1: 0.01 for FOBLO from SSL/SL, else 0.1; more is unstable")
    ramp_steps: int = option(600, "linear ramp of the rate at the start of an episode")
    chunk_seconds: float = option(36_000.0, "audio of a task")
    chunk_min_seconds: float = option(100.0, "a smaller remainder joins its neighbour")
    offload: bool = option(False, "keep phi and the sum of updates off the GPU")
    lr: float = option(5e-5, "peak learning rate")
    hold_steps: int = option(88_000, "at the peak")
    decay_steps: int = option(100_000, "exponential decay")
    layer_drop: float = option(0.05, "of the student")
    codebook_decay: float = option(0.9, "of the codewords' sums and counts")
    supervised_layer: int = option(0, "read by phone classifiers; 0: 8 of 12 from SSL/SL, else 6")

    @property
    def steps(self):
        """Steps that a worker makes."""
        return self.updates * (self.inner_steps + self.outer_steps)


# tiny: episodes of 30 steps move the weights by little, so phi takes all of what they bring.
PRESETS = {
    "base": {},
    "tiny": pretrain.TINY | dict(
        workers=2, updates=10, inner_steps=20, outer_steps=10, beta=1.0, lr=1e-3, lr_floor=0.05,
        warmup_steps=30, hold_steps=135, decay_steps=135, ramp_steps=6, log_every=50,
        chunk_seconds=240.0, layer_drop=0.0, supervised_layer=3),
}


# ======== tasks ========


def make_tasks(rows, o, draw):
    """[(language, recordings)], shuffled. Each language's audio is cut into chunks, anew with each
    draw but always into as many."""
    tasks = []
    for number, (language, members) in enumerate(by_language(rows).items()):
        order = np.random.default_rng([o.seed, 4, draw, number]).permutation(len(members))
        members = [members[i] for i in order]
        seconds = np.array([row.num_samples / data.SAMPLE_RATE for row in members])
        chunks, rest = divmod(seconds.sum(), o.chunk_seconds)
        # A chunk has the recordings that start in it. A remainder as long as the longest recording
        # has one for sure. A shorter one could be empty, so it joins the chunk before it.
        chunks = max(1, int(chunks) + (rest >= max(o.chunk_min_seconds, seconds.max())))
        starts = np.cumsum(seconds) - seconds
        chunk_of = np.minimum(starts // o.chunk_seconds, chunks - 1)
        edges = np.searchsorted(chunk_of, np.arange(chunks + 1))
        tasks += [(language, members[i:j]) for i, j in zip(edges, edges[1:])]
    order = np.random.default_rng([o.seed, 5, draw]).permutation(len(tasks))
    return [tasks[i] for i in order]


# ======== (11) active forgetting ========


def forget(model, micro_batches, o, team, episode_seed, step_seed):
    """Fresh codebooks and heads, the same on all ranks of the worker, which share `episode_seed`.
    Then each head is fitted to the labels of its fresh codebook, at what the student makes of the
    first step's batches with the first step's dropout, to which `step_seed` belongs."""
    seed_step(*episode_seed)
    for codebook, head in zip(model.codebooks, model.heads):
        codebook.reset()  # (11)
        head[0].reset_parameters()  # (11)
    seed_step(*step_seed)
    inputs, labels = [], []
    with torch.no_grad(), autocast(o, team):
        for batch in micro_batches:
            z, targets = model.masked_frames(batch["wav"].to(team.device), batch["mask"])
            inputs.append(torch.stack(z).float())
            labels.append(model.assign(targets))
    fit_heads(model.heads, torch.cat(inputs, 1), torch.cat(labels, 1), o, team)


def fit_heads(heads, inputs, labels, o, team):
    """SGD on each head's cross-entropy over all frames of the worker: [K, M, D], [K, M]."""
    frames = torch.tensor(float(labels.shape[1]), device=inputs.device)
    frames = all_sum([frames], team.group)[0].clamp(min=1)
    weights = list(heads.parameters())
    with full_precision(inputs.device):
        for _ in range(o.refit_steps):
            loss = sum(F.cross_entropy(head(x), y, reduction="sum") / frames
                       for head, x, y in zip(heads, inputs, labels))
            gradients = all_sum(list(torch.autograd.grad(loss, weights)), team.group)
            for p, gradient in zip(weights, gradients):
                p.data.sub_(o.refit_lr * gradient)  # (11)


# ======== MAdaPT: (8) FOBLO and (9) Reptile ========
# phi, theta and delta are lists of tensors: every parameter and every buffer of the model, also of
# its teacher, codebooks and classifiers, but not the step counter. Each episode begins with
# theta = phi. Adam is not reset: its moments stay with their worker from one episode to the next.
# The teacher stands still unless --ema-start is less than 1. A worker is a team of one or more
# ranks, which share its batches.


def theta(model):
    """The model's own tensors, not copies of them."""
    return [t for name, t in model.state_dict().items() if name != "current_step"]


@torch.no_grad()
def add(vectors, others, scale):
    """vectors += scale * others, wherever the vectors are kept."""
    others = [t.to(v.device) for v, t in zip(vectors, others)]
    torch._foreach_add_(vectors, others, alpha=scale)


def cyclic_lr(step, o):
    """The rate within an episode. In self-supervised steps it climbs for `ramp_steps` to the rate
    that `lr_at` has at the end of the episode, and stays there. In supervised steps it is `lr_at`
    itself."""
    length = o.inner_steps + o.outer_steps
    s = step % length
    if o.method == "foblo" and s >= o.inner_steps:
        return lr_at(step, o)
    ramp = o.lr_floor + (1 - o.lr_floor) * s / max(1, o.ramp_steps)
    return lr_at(step - s + length, o) * min(1.0, ramp)


def meta_train(o, model, phi, delta, optimizers, workers, episodes, place, team, log, done):
    """The bi-level loop over the workers of this process. `done` says where it goes on: how many
    meta-updates were made, and how many episodes of the next one.

    delta is the sum of (end - start) over these workers' episodes. The end is the model after an
    episode, the start theta_M in FOBLO, phi in Reptile and MAML. The start is subtracted when it is
    reached, so that no copy of theta_M is kept."""
    M, N, foblo = o.inner_steps, o.outer_steps, o.method == "foblo"
    for update in range(done[0], o.updates):
        for i in range(done[1], len(workers)):
            worker = workers[i]
            unlabelled, labelled = episodes(update * o.workers + worker)
            unlabelled = fetch(unlabelled, o, team, 0, log)
            labelled = labelled and fetch(labelled, o, team, 0, log)
            torch._foreach_copy_(theta(model), phi)  # of which forget() makes theta_0
            if not foblo:
                add(delta, phi, -1)  # (9), (10) delta -= phi
            for s in range(M + N):
                step, supervised = update * (M + N) + s, foblo and s >= M
                step_seed = o.seed, step, worker * team.world + team.rank
                micro_batches = next(labelled if supervised else unlabelled)
                if s == 0 and o.forgetting:
                    forget(model, micro_batches, o, team, (o.seed, step, worker, 8), step_seed)
                seed_step(*step_seed)
                if o.method == "maml":  # all steps of the episode at once
                    log.add(maml(model, o, micro_batches, unlabelled, labelled))
                    break
                rate, layer = cyclic_lr(step, o), o.supervised_layer if supervised else 0
                log.add(train_step(
                    model, optimizers[i], micro_batches, step + 1, rate, o, team, layer))
                if foblo and s + 1 == M:
                    add(delta, theta(model), -1)  # (8) delta -= theta_M
                if (s + 1) % o.log_every == 0 and s + 1 < M + N:
                    log.write((update * len(workers) + i) * (M + N) + s + 1)
            add(delta, theta(model), 1)  # (8), (9), (10) delta += theta_{M+N}
            if i + 1 < len(workers):
                done = update, i + 1
                save(o, place, model, phi, delta, optimizers, done, log, episodes.inventory)

        # phi <- phi + beta * mean over workers of delta. The ranks of a worker hold the same delta.
        for d in delta:
            d.copy_(all_sum([d.to(place.device)])[0])
        scale = 1 / (o.workers * team.world)
        add(phi, delta, o.beta * scale)  # (8), (9), (10)
        size = scale * get_total_norm(delta) / get_total_norm(phi)
        log.add({"meta_update": torch.tensor(update + 1), "relative_delta": size})
        torch._foreach_zero_(delta)
        done = update + 1, 0
        save(o, place, model, phi, delta, optimizers, done, log, episodes.inventory)


# ======== (10) MAML, for comparison ========
# The exact gradient to phi of the supervised loss at theta_M goes back through all M inner steps,
# here plain SGD: it needs their second derivatives, and keeps all that they computed. FOBLO does
# not go back beyond theta_M: its memory does not grow with M. Fresh codebooks and heads cut the
# way to those of phi, which move as in (9).


class Loss(nn.Module):
    """A loss as a forward pass, which functional_call makes at other weights than the model's."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, layer):
        model, device = self.model, self.model.mask_embedding.device
        wav = batch["wav"].to(device)
        if layer:
            phones = batch["phones"].to(device)
            return model.supervised_loss(wav, batch["mask"], phones, batch["language"], layer)
        return model(wav, batch["mask"])


def meta_gradient(model, o, inner, outer, exact=True, checkpointed=False):
    """(10) {parameter: gradient of the loss of the batches `outer` at theta_M}, and that loss. If
    not exact, the gradient to theta_M, as FOBLO takes it."""
    loss_of = Loss(model)
    names, start = zip(*((name, p) for name, p in loss_of.named_parameters() if p.requires_grad))
    codebooks = [t for codebook in model.codebooks for t in codebook.buffers()]
    # The codebooks before each inner step. Checkpointing computes a step once more on the way back,
    # and then has to find them as they were.
    seen = {0: [t.clone() for t in codebooks]}

    def inner_step(s, *weights):
        torch._foreach_copy_(codebooks, seen[s])
        loss, stats = functional_call(loss_of, dict(zip(names, weights)), (inner[s], 0))
        gradients = torch.autograd.grad(loss, weights, create_graph=exact, materialize_grads=True)
        model.update_codebooks(stats)
        seen[s + 1] = [t.clone() for t in codebooks]
        return tuple(p - o.maml_lr * gradient for p, gradient in zip(weights, gradients))

    weights = start
    for s in range(len(inner)):
        if checkpointed:
            weights = checkpoint(inner_step, s, *weights, use_reentrant=False)
        else:
            weights = inner_step(s, *weights)
        if not exact:
            weights = tuple(p.detach().requires_grad_() for p in weights)
    at_end = dict(zip(names, weights))
    losses = [functional_call(loss_of, at_end, (b, o.supervised_layer))[0] for b in outer]
    loss = sum(losses) / len(losses)
    gradients = torch.autograd.grad(loss, start if exact else weights, materialize_grads=True)
    return dict(zip(names, gradients)), loss.detach()  # (10)


def maml(model, o, first, unlabelled, labelled):
    """An episode. It leaves phi - alpha * gradient in the model, as if that were theta_{M+N}."""
    inner = first + [next(unlabelled)[0] for _ in range(o.inner_steps - 1)]
    outer = [next(labelled)[0] for _ in range(o.outer_steps)]
    with sdpa_kernel(SDPBackend.MATH):  # no other attention kernel has a second derivative
        gradients, loss = meta_gradient(model, o, inner, outer)
    skipped = ~torch.stack([gradient.isfinite().all() for gradient in gradients.values()]).all()
    parameters = dict(Loss(model).named_parameters())
    with torch.no_grad():
        for name, gradient in gradients.items():
            parameters[name].sub_(torch.where(skipped, 0, o.maml_lr * gradient))  # (10)
    return {"phone_loss": loss, "skipped": skipped.float()}


# ======== the stage ========


def main():
    # ======== options, setup ========
    o, _ = pretrain.parse_options(Options, PRESETS)
    place = pretrain.setup(o)
    check_options(o, place)
    torch.manual_seed(o.seed)
    model, inventory = initial_model(o)
    pretrain.check_options(o, model.config)
    if o.method == "maml" or o.measure:  # StridedConv has no second derivative
        model.to(place.device)
    else:
        pretrain.to_device(model, o, place)
    workers, team = lay_out(o, place)

    # ======== data ========
    episodes = Episodes(o, model.config, place, team, inventory)

    # ======== model, optimizers, vectors ========
    for language, phones in episodes.inventory.items():
        model.add_language(language, len(phones))
    if o.measure:
        return measure(model.train(), o, episodes, place)
    optimizers = [pretrain.make_optimizer(model, o) for _ in workers]
    keep = "cpu" if o.offload else place.device
    delta = [torch.zeros_like(t, device=keep) for t in theta(model)]

    # ======== resume: (meta-updates done, episodes of this process done in the next one) ========
    done, totals = resume(
        o, place, pretrain.open_run(o, model, place, episodes.rows), model, delta, optimizers)
    if done[0] == o.updates:
        return pretrain.finished(o, place)
    phi = [t.to(keep, copy=True) for t in theta(model)]
    first = (len(workers) * done[0] + done[1]) * (o.inner_steps + o.outer_steps)
    log = Log(o, place, len(workers) * o.steps, first, totals)

    # ======== loop ========
    model.train()
    meta_train(o, model, phi, delta, optimizers, workers, episodes, place, team, log, done)
    if place.first:
        pretrain.summary(log, f"{o.method}, {o.updates} meta-updates of {o.workers} workers")
        print(f"next: python adapt.py --init {o.out} --audio FOLDER")


# ======== plumbing: skip at first reading ========


def check_options(o, place):
    methods = "foblo", "reptile", "maml"
    require(o.method in methods, f"--method {o.method}: one of {', '.join(methods)}")
    alone = place.world == o.accumulate == 1
    if o.measure or o.method == "maml":
        require(alone, "MAML runs in one process, with one micro-batch a step")
        require(o.outer_steps > 0, "MAML needs --outer-steps")
        require(o.method != "reptile", "--measure compares FOBLO and MAML: Reptile has no labels")


def measure(model, o, episodes, place):
    """Seconds and peak memory of the meta-gradient of an episode, as FOBLO and as MAML take it, in
    the order of the memory that they need."""
    unlabelled, labelled = episodes(0)
    inner = [unlabelled[i] for i in range(o.inner_steps)]
    outer = [labelled[i] for i in range(o.outer_steps)]
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def dot(a, b):  # in double precision, as the weights are many
        return sum((a[name].double() * b[name]).sum().item() for name in a)

    every, plain, first = [*SDPBackend.__members__.values()][1:], [SDPBackend.MATH], None
    for way, kernels, how in (
        ("foblo", every, dict(exact=False)),
        ("foblo, math attention", plain, dict(exact=False)),
        ("maml, checkpointed", plain, dict(checkpointed=True)),
        ("maml", plain, dict()),
    ):
        model.load_state_dict(before)
        if o.forgetting:
            forget(model, inner[:1], o, place, (o.seed, 8), (o.seed,))
        began = time.perf_counter()
        with sdpa_kernel(kernels):
            gradients, loss = meta_gradient(model, o, inner, outer, **how)
        record = {"way": way, "inner_steps": o.inner_steps, "loss": loss.item()}  # waits for a GPU
        record["seconds"] = time.perf_counter() - began
        first = first or gradients
        norms = math.sqrt(dot(first, first) * dot(gradients, gradients))
        record["cosine"] = dot(first, gradients) / norms
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if place.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        print(json.dumps(record | {"peak_memory_gib": round(peak / 2**30, 3)}), flush=True)


def by_language(rows):
    languages = defaultdict(list)
    for row in rows:
        languages[row.language].append(row)
    return dict(sorted(languages.items()))


class Episodes:
    """The batches of any episode, for the ranks of its worker: all without labels, and the
    labelled ones of the same language."""

    def __init__(self, o, config, place, team, inventory):
        supervised = o.method != "reptile" and o.outer_steps > 0
        self.rows, labelled, self.classes, self.inventory = pretrain.read_data(
            o, place, inventory, supervised)
        self.labelled, self.common = by_language(labelled), (config, o, team.world * o.accumulate)
        for language, members in by_language(self.rows).items():
            seconds = [row.num_samples / data.SAMPLE_RATE for row in members]
            require(language, f"{members[0].where}: meta-training needs every recording's language")
            require(language in self.labelled or not supervised,
                    f"language {language}: no --alignments, which FOBLO's outer loop needs")
            require(sum(seconds) >= o.chunk_min_seconds, f"language {language}: "
                    f"{sum(seconds):.0f} s of audio are less than --chunk-min-seconds")
            require(max(seconds) <= o.chunk_seconds, f"language {language}: a recording of "
                    f"{max(seconds):.0f} s is longer than --chunk-seconds")
        self.tasks, draw = [], itertools.count()
        while len(self.tasks) < o.updates * o.workers:
            self.tasks += make_tasks(self.rows, o, next(draw))
        for language, rows in self.tasks:
            try:  # what is too small for a batch is told now, not after hours
                data.Batches(rows, *self.common)
            except InputError as error:
                raise InputError(f"a task of {language}: {error}") from None

    def __call__(self, number):
        language, rows = self.tasks[number]
        unlabelled, labelled = data.Batches(rows, *self.common, stream=(6, number)), None
        if language in self.labelled:
            labelled = data.Batches(
                self.labelled[language], *self.common, self.classes, stream=(7, number))
        return unlabelled, labelled


def lay_out(o, place):
    """The workers of this process, and its place among the ranks of its worker."""
    require(place.world % o.workers == 0 or o.workers % place.world == 0,
            f"{o.workers} workers and {place.world} ranks: one must divide the other")
    size = max(1, place.world // o.workers)
    workers = list(range(place.rank // size, o.workers, place.world))
    group = dist.new_subgroups(size)[0] if place.world > 1 else None
    return workers, Place(place.rank % size, size, place.device, group)


def initial_model(o):
    """The network that phi is taken from, and its phone inventories. The options whose default
    depends on it are set."""
    changes = dict(layer_drop=o.layer_drop, codebook_decay=o.codebook_decay, ema_start=o.ema_start)
    if o.init == "random":
        model, inventory = SpidR(Config(**spidr.PRESETS[o.preset] | changes)), {}
    else:
        model, inventory = spidr.load_init(o.init, **changes)
    labelled = len(model.supervised_classifiers) > 0
    if o.beta < 0:
        o.beta = 0.01 if labelled and o.method == "foblo" else 0.1
    if not o.supervised_layer:
        o.supervised_layer = max(1, model.config.layers * (8 if labelled else 6) // 12)
    return model, inventory


def worker_file(o, place, done):
    return Path(o.out) / f"worker_{place.rank}_{done[0]}_{done[1]}.pt"


def save(o, place, model, phi, delta, optimizers, done, log, inventory):
    """A record in the log; then each process writes what it alone knows. Then last.pt, which names
    the episode and has phi, makes that count. Then the old files go."""
    log.write((done[0] * len(optimizers) + done[1]) * (o.inner_steps + o.outer_steps))
    mine = worker_file(o, place, done)
    spidr.save(mine, {}, delta=delta, optimizers=[x.state_dict() for x in optimizers])
    pretrain.barrier()
    if place.first:
        torch._foreach_copy_(theta(model), phi)
        for name in [f"update_{done[0]}.pt"] * (done[0] == o.updates) + ["last.pt"]:
            spidr.save(Path(o.out) / name, model.state_dict(), done=done, ranks=place.world,
                       totals=log.totals, inventories=inventory)
    pretrain.barrier()
    for old in Path(o.out).glob(f"worker_{place.rank}_*"):
        if old != mine:
            old.unlink()


def resume(o, place, checkpoint, model, delta, optimizers):
    if not checkpoint:
        return (0, 0), None
    ranks, done = checkpoint["ranks"], tuple(checkpoint["done"])
    require(ranks == place.world, f"{o.out} was made by {ranks} processes: only as many resume it")
    _, mine = spidr.read_checkpoint(worker_file(o, place, done))
    model.load_state_dict(checkpoint["model"])
    torch._foreach_copy_(delta, mine["delta"])
    for optimizer, state in zip(optimizers, mine["optimizers"]):
        optimizer.load_state_dict(state)
    return done, checkpoint["totals"]


if __name__ == "__main__":
    spidr.run(main)
