"""MAML beside FOBLO: meta-training by the exact gradient, and what it costs.

    python extras/maml.py [--init runs/pretrain] [--out runs/maml]    trains, as meta_train.py does
    python extras/maml.py --measure --inner-steps 8       an episode of FOBLO and MAML: JSON lines

MAML's meta-gradient is that of the supervised loss at theta_M to phi, back through all M inner
steps, which are plain SGD here:

    phi <- phi - beta * alpha * mean over workers of d loss(theta_M(phi)) / d phi        (10) MAML

It needs second derivatives, and memory for all that the inner steps computed, or the time to
compute them twice. FOBLO goes back no further than theta_M, so its memory does not grow with M. The
gradient is taken as one step of alpha, the rate of the inner steps, so that beta has the same role
as in FOBLO and Reptile. Fresh codebooks and heads cut the way to those of phi.
"""

import json
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import meta_train
import model as networks
import pretrain
from meta_train import forget, load_vector, mean_over_workers, to_vector
from model import option, require


@dataclass
class Options(meta_train.Options):
    """MAML's."""

    METHODS = ("maml",)

    out: str = option("runs/maml", "the run's folder")
    method: str = option("maml", "maml")
    alpha: float = option(0.05, "rate of the inner steps")
    measure: bool = option(False, "only measure an episode of FOBLO and MAML: JSON lines")


# ======== (10) the gradient ========


class Loss(nn.Module):
    """A loss as a forward pass, which functional_call makes at other weights than the model's."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, supervised_layer):
        model, device = self.model, self.model.mask_embedding.device
        wav = batch["wav"].to(device)
        if not supervised_layer:
            return model(wav, batch["mask"])
        phones = batch["phones"].to(device)
        return model.supervised_loss(
            wav, batch["mask"], phones, batch["language"], supervised_layer)


def meta_gradient(model, options, inner, outer, exact=True, checkpointed=False):
    """(10) {parameter: gradient of the loss of the batches `outer` at theta_M}, and that loss. If
    not exact, the gradient to theta_M, as FOBLO takes it."""
    loss_of = Loss(model)
    names, start = zip(*((name, p) for name, p in loss_of.named_parameters() if p.requires_grad))
    codebooks = [t for codebook in model.codebooks for t in codebook.buffers()]
    # The codebooks before each inner step. Checkpointing computes a step once more on the way back,
    # and then has to find them as they were.
    codebooks_before = {0: [t.clone() for t in codebooks]}

    def inner_step(s, *weights):
        torch._foreach_copy_(codebooks, codebooks_before[s])
        loss, stats = functional_call(loss_of, dict(zip(names, weights)), (inner[s], None))
        gradients = torch.autograd.grad(loss, weights, create_graph=exact, materialize_grads=True)
        model.update_codebooks(stats)
        codebooks_before[s + 1] = [t.clone() for t in codebooks]
        return tuple(p - options.alpha * gradient for p, gradient in zip(weights, gradients))

    weights = start
    for s in range(len(inner)):
        if checkpointed:
            weights = checkpoint(inner_step, s, *weights, use_reentrant=False)
        else:
            weights = inner_step(s, *weights)
        if not exact:
            weights = tuple(p.detach().requires_grad_() for p in weights)
    theta_M = dict(zip(names, weights))
    losses = [functional_call(loss_of, theta_M, (batch, options.supervised_layer))[0]
              for batch in outer]
    loss = sum(losses) / len(losses)
    gradients = torch.autograd.grad(loss, start if exact else weights, materialize_grads=True)
    return dict(zip(names, gradients)), loss.detach()  # (10)


# ======== meta-training ========


def maml(options, model, phi, delta, optimizers, workers, episodes, ranks, team, log, done):
    """meta_train.meta_train, but for what an episode does."""
    M, N = options.inner_steps, options.outer_steps
    for update in range(done[0], options.updates):
        for worker in workers[done[1]:]:
            unlabelled, labelled = episodes(update * options.workers + worker)
            load_vector(model, phi)
            inner, outer = [unlabelled[i] for i in range(M)], [labelled[i] for i in range(N)]
            step_seed = options.seed, update * (M + N), worker
            if options.forgetting:
                episode_seed = *step_seed, data.STREAM_FORGET
                forget(model, inner[:1], options, ranks, episode_seed, step_seed)
            pretrain.seed_step(*step_seed)
            with sdpa_kernel(SDPBackend.MATH):  # no other attention kernel has a second derivative
                gradients, loss = meta_gradient(model, options, inner, outer)
            skipped = ~torch.stack([x.isfinite().all() for x in gradients.values()]).all()
            parameters = dict(Loss(model).named_parameters())
            for name, gradient in gradients.items():
                parameters[name].data -= torch.where(skipped, 0, options.alpha * gradient)  # (10)
            log.hear(inner + outer)
            log.add({"phone_loss": loss, "skipped": skipped.float()})
            delta += to_vector(model, phi.device) - phi  # (10)
            done = update, done[1] + 1
            if done[1] < len(workers):
                meta_train.save(options, ranks, model, phi, delta, optimizers, done, log,
                                episodes.inventory)
        phi += options.beta * mean_over_workers(delta, options, ranks, team)  # (10)
        log.add({"meta_update": torch.tensor(update + 1)})
        delta.zero_()
        done = update + 1, 0
        meta_train.save(
            options, ranks, model, phi, delta, optimizers, done, log, episodes.inventory)


# ======== the measure ========


def measure(model, options, episodes, ranks):
    """Seconds and peak memory of the meta-gradient of an episode, as FOBLO and as MAML take it, in
    the order of the memory that they need."""
    unlabelled, labelled = episodes(0)
    inner = [unlabelled[i] for i in range(options.inner_steps)]
    outer = [labelled[i] for i in range(options.outer_steps)]
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def dot(a, b):  # in double precision, as the weights are many
        return sum((a[name].double() * b[name]).sum().item() for name in a)

    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    plain, first = [SDPBackend.MATH], None
    for way, kernels, how in (
        ("foblo", fast, dict(exact=False)),
        ("foblo, math attention", plain, dict(exact=False)),
        ("maml, checkpointed", plain, dict(checkpointed=True)),
        ("maml", plain, dict()),
    ):
        model.load_state_dict(before)
        if options.forgetting:
            episode_seed = options.seed, data.STREAM_FORGET
            forget(model, inner[:1], options, ranks, episode_seed, (options.seed,))
        began = time.perf_counter()
        with sdpa_kernel(kernels):
            gradients, loss = meta_gradient(model, options, inner, outer, **how)
        record = {"way": way, "inner_steps": options.inner_steps, "loss": loss.item()}
        record["seconds"] = time.perf_counter() - began  # loss.item() has waited for the GPU
        first = first or gradients
        norms = math.sqrt(dot(first, first) * dot(gradients, gradients))
        record["cosine"] = dot(first, gradients) / norms
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if ranks.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        print(json.dumps(record | {"peak_memory_gib": round(peak / 2**30, 3)}), flush=True)


def main():
    options, _ = pretrain.parse_options(Options, meta_train.PRESETS)
    ranks = pretrain.setup(options)
    require(ranks.world == options.accumulate == 1,
            "MAML runs in one process, with one micro-batch a step")
    require(options.outer_steps > 0, "MAML needs --outer-steps")
    if not options.measure:
        return meta_train.main(Options, maml)
    torch.manual_seed(options.seed)
    model, inventory = meta_train.initial_model(options)
    model.to(ranks.device).train()
    episodes = meta_train.Episodes(options, model.config, ranks, ranks, inventory)
    for language, phones in episodes.inventory.items():
        model.add_language(language, len(phones))
    measure(model, options, episodes, ranks)


if __name__ == "__main__":
    networks.run(main)
