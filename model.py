"""SpidR: the network, its losses, its codebooks and its teacher (SpidR, arXiv 2512.20308;
SpidR-Adapt, arXiv 2512.21204). extras/shapes.py prints the network.

    waveform -> downsample -> project -+-> mask -> student -> K heads -----> log-probabilities
                                       |                                         | cross-entropy
                                       +---------> teacher -> K codebooks -> labels

A training step, with the numbers that its equations have here and in README.md:

    (1) x = project(downsample(wav))         the teacher reads x, the student reads x masked
    (2) f = FFN(h); t = norm(teacher's f)    a layer's output, before its residual sum; the target
    (3) y = argmin_v |t - S_v / N_v|         the label: the nearest codeword of the layer's codebook
    (4) loss = mean of -log p(y)             over masked frames and the last K layers
    (5) N <- a N + (1 - a) n, S likewise     a codeword was given n frames, whose sum is s
    (6) teacher <- b teacher + (1 - b) student
    (7) loss = mean of -log p(phone)         in supervised steps, instead of (4)

Layers are counted from 1. Head and codebook k, counted from 0, belong to layer L-K+1+k.
Shapes: B batch, N samples, T frames, C channels, D width, L layers, K codebooks, V codewords,
M masked frames of the batch. An attribute has the name that released checkpoints give it.
"""

import contextlib
import ctypes
import fcntl
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ======== the sizes ========


def option(default, meaning):
    """A field of a dataclass of options. Its meaning is also what --help prints."""
    return field(default=default, metadata={"help": meaning})


@dataclass
class Config:
    """The network. The defaults are the base model of the papers."""

    objective: str = option("spidr", "spidr: a head reads its own layer; dinosr: all read the last")
    norm: str = option("layer_norm", "after each convolution; group_norm: after the first only")
    conv_layers: tuple = option(
        ((512, 10, 5),) + ((512, 3, 2),) * 4 + ((512, 2, 2),) * 2,
        "the downsampler: [channels, kernel, stride] of each convolution")
    conv_bias: bool = option(False, "biases in the downsampler")
    dim: int = option(768, "D, the width")
    layers: int = option(12, "L, Transformer layers")
    heads: int = option(12, "attention heads")
    ffn: int = option(3072, "inner width of the feed-forward blocks")
    qkv_bias: bool = option(False, "bias in the query-key-value projection")
    pos_kernel: int = option(95, "kernel of all positional convolutions together")
    pos_depth: int = option(5, "positional convolutions, each of kernel pos_kernel // pos_depth")
    pos_groups: int = option(16, "groups of each positional convolution")
    projection_dropout: float = option(0.0, "after the projection")
    dropout: float = option(0.1, "on residual branches and after the positional convolutions")
    attention_dropout: float = option(0.1, "on the attention weights")
    ffn_dropout: float = option(0.0, "inside the feed-forward blocks")
    layer_drop: float = option(0.0, "probability that the residual stream skips a layer")
    init_std: float = option(0.02, "of the initial feed-forward weights")
    codebooks: int = option(8, "K: one for each of the last K layers")
    codewords: int = option(256, "V, in each codebook")
    codebook_decay: float = option(0.9, "a in (5); 1 keeps the codebooks as they are")
    ema_start: float = option(0.999, "b0, where b in (6) starts; 1 keeps the teacher as it is")
    ema_schedule: str = option("exponential", "of b: exponential (SpidR) or linear (DinoSR)")
    ema_timescale: float = option(20000.0, "steps: of the exponential, or of the climb")
    ema_threshold: float = option(1e-7, "the teacher stops for good once 1 - b is this small")
    ema_stop: int = option(0, "from this step on the teacher is frozen; 0: never")

    def __post_init__(self):
        check_config(self)


# tiny is what learns in minutes on two cores. It departs from base in more than size: group norm,
# because LayerNorm after each of so few channels does not get going in so few steps; wider initial
# feed-forward weights, which keep a layer's gain at a smaller width; and a teacher that settles
# within hundreds of steps.
TINY = dict(
    norm="group_norm", dim=128, layers=4, heads=4, ffn=512, pos_kernel=57, pos_depth=3,
    conv_layers=((16, 10, 5),) + ((32, 3, 2),) * 2 + ((64, 3, 2),) * 2 + ((64, 2, 2),) * 2,
    dropout=0.0, attention_dropout=0.0, init_std=0.05, codebooks=3, codewords=48,
    ema_timescale=500.0)
# small learns from real speech in minutes. Its codebooks forget ten times as slowly as base's,
# because a step has a hundredth of base's frames.
SMALL = TINY | dict(
    dim=192, heads=6, ffn=768, init_std=0.04, codewords=128,
    codebook_decay=0.99, ema_timescale=1000.0)
PRESETS = {"base": {}, "tiny": TINY, "small": SMALL}


# ======== (1) the downsampler and the projection ========


def num_frames(samples, config):
    """How many frames the downsampler makes of so many samples."""
    for _, kernel, stride in config.conv_layers:
        samples = (samples - kernel) // stride + 1
    return samples


def instance_norm(x, valid=None, eps=1e-5):
    """Each utterance and channel of x [B, T, D] to mean 0 and variance 1 over its valid frames."""
    x, share = x.float(), 1 / x.shape[1]
    if valid is not None:
        share = valid[..., None] / valid.sum(1)[:, None, None]  # [B, T, 1]
    x = x - (x * share).sum(1, keepdim=True)
    return x * ((x.square() * share).sum(1, keepdim=True) + eps).rsqrt()


class Conv1d(nn.Conv1d):
    """A convolution over time, computed as one over a picture of height one. A GPU then keeps the
    channels of a frame side by side in memory, as the norms want them, and copies nothing."""

    def forward(self, x):  # [B, C_in, N] -> [B, C, N']
        return F.conv2d(x[:, :, None], self.weight[:, :, None], self.bias, (1, *self.stride),
                        (0, *self.padding), groups=self.groups)[:, :, 0]


class ConvLayer(nn.Module):
    """A convolution, perhaps a norm over channels or over time, and GELU."""

    def __init__(self, channels_in, channels, kernel, stride, norm, bias):
        super().__init__()
        self.conv = Conv1d(channels_in, channels, kernel, stride, bias=bias)
        self.layer_norm = nn.Identity()
        if norm == "layer_norm":
            self.layer_norm = nn.LayerNorm(channels)
        elif norm == "group_norm":
            self.layer_norm = nn.GroupNorm(channels, channels)
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(self, x, valid=None):  # [B, C_in, N] -> [B, C, N']
        x, norm = self.conv(x), self.layer_norm
        if isinstance(norm, nn.LayerNorm):
            x = norm(x.mT).mT
        elif isinstance(norm, nn.GroupNorm) and valid is not None:  # over real samples
            x = (instance_norm(x.mT, valid) * norm.weight + norm.bias).mT
        else:
            x = norm(x)
        return F.gelu(x)


class Downsampler(nn.Module):
    """16 kHz samples to frames at 50 Hz."""

    def __init__(self, config):
        super().__init__()
        self.conv_layers, channels_in = nn.ModuleList(), 1
        for i, (channels, kernel, stride) in enumerate(config.conv_layers):
            norm = config.norm if i == 0 or config.norm == "layer_norm" else None
            layer = ConvLayer(channels_in, channels, kernel, stride, norm, config.conv_bias)
            self.conv_layers.append(layer)
            channels_in = channels

    def forward(self, wav, lengths=None):  # [B, N] -> [B, T, C], and which frames are real
        x, valid = wav[:, None], None  # [B, 1, N]
        for layer in self.conv_layers:
            if lengths is not None:
                kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
                lengths = (lengths - kernel) // stride + 1  # [B]
                frames = (x.shape[-1] - kernel) // stride + 1
                valid = torch.arange(frames, device=lengths.device) < lengths[:, None]
            x = layer(x, valid)
        return x.mT, valid


class Projection(nn.Module):
    def __init__(self, config):
        super().__init__()
        channels = config.conv_layers[-1][0]
        self.layer_norm = nn.LayerNorm(channels)
        self.projection = nn.Linear(channels, config.dim)

    def forward(self, x):  # [B, T, C] -> [B, T, D]
        return self.projection(self.layer_norm(x))


# ======== (2) the Transformer ========


class PositionalConv(nn.Module):
    """Tells frames where they are, by convolutions. It is added to the Transformer's input."""

    def __init__(self, config):
        super().__init__()
        D, kernel = config.dim, config.pos_kernel // config.pos_depth
        self.convs = nn.ModuleList(
            Conv1d(D, D, kernel, padding=kernel // 2, groups=config.pos_groups)
            for _ in range(config.pos_depth))

    def forward(self, x, valid=None):  # [B, T, D]
        padding = None if valid is None else ~valid[..., None]
        for conv in self.convs:
            x = x if padding is None else x.masked_fill(padding, 0)
            x = conv(x.mT).mT
            x = F.gelu(F.layer_norm(x, x.shape[-1:]))
        return x if padding is None else x.masked_fill(padding, 0)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.dim, config.dim)
        nn.init.xavier_uniform_(self.qkv.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x, valid=None):  # [B, T, D]
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, D/heads] each
        mask = None if valid is None else valid[:, None, None]  # nobody attends to padding
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.intermediate_dense = nn.Linear(config.dim, config.ffn)
        self.dropout = nn.Dropout(config.ffn_dropout)
        self.output_dense = nn.Linear(config.ffn, config.dim)
        for dense in self.intermediate_dense, self.output_dense:
            nn.init.normal_(dense.weight, std=config.init_std)
            nn.init.zeros_(dense.bias)

    def forward(self, x):
        return self.output_dense(self.dropout(F.gelu(self.intermediate_dense(x))))


class Layer(nn.Module):
    """A post-norm Transformer layer. What the papers call its output, everywhere (targets,
    predictions, features), is what the feed-forward block gives before the residual sum."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.layer_norm = nn.LayerNorm(config.dim)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, valid=None):  # [B, T, D] -> residual stream, output, both [B, T, D]
        x = self.layer_norm(x + self.dropout(self.attention(x, valid)))
        output = self.feed_forward(x)  # (2)
        return self.final_layer_norm(x + self.dropout(output)), output


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.pos_conv_embed = PositionalConv(config)
        self.layer_norm = nn.LayerNorm(config.dim)
        self.dropout, self.layer_drop = nn.Dropout(config.dropout), config.layer_drop
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x, valid=None, depth=None):
        """The residual stream after layer `depth`, and the outputs of the layers up to it."""
        x = self.dropout(self.layer_norm(x + self.pos_conv_embed(x, valid)))
        outputs = []
        for layer in self.layers[:depth]:
            stream, output = layer(x, valid)
            outputs.append(output)  # also of a dropped layer, whose head has to learn
            if self.training and self.layer_drop > 0:
                # A dropped layer is computed all the same. Each rank drops others, and all must
                # have a gradient for every weight.
                dropped = (torch.rand(()) < self.layer_drop).to(x.device, non_blocking=True)
                stream = torch.where(dropped, x, stream)
            x = stream
        return x, outputs


# ======== the model ========


class Codebook(nn.Module):
    """Codeword v is S_v / N_v: the average, with forgetting, of the targets assigned to it. In
    released checkpoints, and so here, S is called codebook and N counts."""

    def __init__(self, config):
        super().__init__()
        self.register_buffer("codebook", torch.empty(config.codewords, config.dim))  # S [V, D]
        self.register_buffer("counts", torch.empty(config.codewords))  # N [V]
        self.reset()

    def reset(self):  # each dimension normalised over codewords, as it is over time in targets
        noise = torch.randn(self.codebook.shape)
        self.codebook.copy_(instance_norm(noise[None])[0])
        self.counts.fill_(1)


class SpidR(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or Config()
        self.feature_extractor = Downsampler(config)
        self.feature_projection = Projection(config)
        self.projection_dropout = nn.Dropout(config.projection_dropout)
        self.mask_embedding = nn.Parameter(torch.rand(config.dim))
        self.student = Transformer(config)
        # The teacher starts from weights of its own, not from the student's.
        self.teacher = Transformer(config).requires_grad_(False)
        K, V = config.codebooks, config.codewords
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(config.dim, V)) for _ in range(K))
        self.codebooks = nn.ModuleList(Codebook(config) for _ in range(K))
        self.supervised_classifiers = nn.ModuleDict()
        self.register_buffer("current_step", torch.zeros(1, dtype=torch.int64))

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # there is never any dropout in the targets
        return self

    # -------- inference --------

    def frames(self, wav, lengths=None):
        """[B, N] -> projected frames [B, T, D], and which of them are real, not padding."""
        lengths = None if lengths is None else lengths.to(wav.device)
        features, valid = self.feature_extractor(wav, lengths)  # [B, T, C]
        return self.feature_projection(features), valid  # (1) [B, T, D]

    def encode(self, wav, lengths=None):
        """Standardised wav [B, N], padded where lengths [B] say so -> L outputs [B, T, D]."""
        return self.student(*self.frames(wav, lengths))[1]

    def units(self, wav, lengths=None):
        """The codeword that each head expects, [K, B, T]."""
        stream, outputs = self.student(*self.frames(wav, lengths))
        inputs = self.head_inputs(stream, outputs)  # K times [B, T, D]
        return torch.stack([head(x).argmax(-1) for head, x in zip(self.heads, inputs)])

    def head_inputs(self, stream, outputs):
        # SpidR's one change to DinoSR's objective. With every head on the last layer, nothing ties
        # a lower layer of the student to the codebook of its own teacher layer, and codebooks can
        # collapse; a head for each layer is to keep them alive.
        if self.config.objective == "dinosr":
            return [stream] * self.config.codebooks
        return outputs[-self.config.codebooks :]

    # -------- self-supervised training --------

    def forward(self, wav, mask, lengths=None):
        """(1) to (4): the loss of a micro-batch, and the sums from which codebooks and metrics
        are made. No weight and no codebook changes. `mask` [B, T] is true where the student does
        not hear. It is best kept on the CPU: to find its ones on a GPU would make the CPU wait."""
        inputs, targets = self.masked_frames(wav, mask, lengths)  # K times [M, D], [K, M, D]
        labels = self.assign(targets)  # [K, M]
        logits = torch.stack([head(x) for head, x in zip(self.heads, inputs)])  # [K, M, V]
        log_probs = logits.float().log_softmax(-1)
        losses = -log_probs.gather(-1, labels[..., None])[..., 0]  # [K, M]
        loss = losses.sum() / max(1, losses.numel())  # (4)
        return loss, self.statistics(losses, log_probs, labels, targets)

    def masked_frames(self, wav, mask, lengths=None):
        """Runs student and teacher. At the masked frames: what the K heads read, [M, D] each, and
        the targets [K, M, D]."""
        x, valid = self.frames(wav, lengths)  # [B, T, D]
        # The indices [M] of the masked ones among all B T frames.
        masked = mask.flatten().nonzero()[:, 0].to(x.device, non_blocking=True)
        with torch.no_grad():
            _, outputs = self.teacher(x, valid)  # the teacher hears everything
            targets = self.targets(outputs, masked, valid)
        stream, outputs = self.student(self.hide(x, mask), valid)
        inputs = self.head_inputs(stream, outputs)  # K times [B, T, D]
        return [z.flatten(0, 1)[masked] for z in inputs], targets

    def targets(self, outputs, masked, valid=None):
        """The outputs of the teacher's last K layers, normalised, at the masked frames."""
        targets = [instance_norm(f, valid) for f in outputs[-self.config.codebooks :]]  # (2)
        return torch.stack([t.flatten(0, 1)[masked] for t in targets])

    def hide(self, x, mask):
        """What the student hears: one learned vector in the place of every masked frame."""
        mask = mask.to(x.device, non_blocking=True)[..., None]  # [B, T, 1]
        x = self.projection_dropout(x)  # the teacher's frames have none
        return torch.where(mask, self.mask_embedding.to(x.dtype), x)  # (1)

    @torch.no_grad()
    def assign(self, targets):
        """The nearest codeword of each target, [K, M, D] -> [K, M]."""
        with full_precision(targets.device):
            codewords = torch.stack([c.codebook / c.counts[:, None] for c in self.codebooks])
            # |t - c|^2 without |t|^2, which is the same for every codeword c. [K, M, V]
            norms = codewords.square().sum(-1)[:, None]
            distances = torch.baddbmm(norms, targets.float(), codewords.mT, alpha=-2)
            return distances.argmin(-1)  # (3)

    @torch.no_grad()
    def statistics(self, losses, log_probs, labels, targets):
        """Sums over the masked frames, to be added up over micro-batches and over ranks."""
        (K, M), V, D = labels.shape, self.config.codewords, self.config.dim
        # The indices of the labels among all K V codewords.
        codeword = (labels + V * torch.arange(K, device=labels.device)[:, None]).flatten()
        counts, sums = losses.new_zeros(K * V), losses.new_zeros(K * V, D)
        counts.index_add_(0, codeword, losses.new_ones(K * M))
        sums.index_add_(0, codeword, targets.to(sums.dtype).flatten(0, 1))
        return {
            "frames": losses.new_full((), M),
            "loss": losses.sum(1),  # [K]
            "hits": (log_probs.argmax(-1) == labels).sum(1).to(losses.dtype),  # [K]
            "predicted": log_probs.exp().sum(1),  # [K, V] the predicted distributions
            "counts": counts.view(K, V),  # n in (5), the labels
            "sums": sums.view(K, V, D),  # s in (5)
        }

    def health(self, stats):
        """The metrics of a step: the mean over codebooks, and NAME_k for each of them."""
        frames = stats["frames"]
        labels, predicted = stats["counts"] / frames, stats["predicted"] / frames  # [K, V]
        by_codebook = {
            "loss": stats["loss"] / frames,
            "accuracy": stats["hits"] / frames,
            "target_ppl": 2 ** entropy(labels),
            "pred_ppl": 2 ** entropy(predicted),
            "active": (labels > 0).sum(-1).to(labels.dtype),
            "usage_entropy": entropy(labels) / math.log2(labels.shape[-1]),
        }
        metrics = {name: values.mean() for name, values in by_codebook.items()}
        for name, values in by_codebook.items():
            metrics |= {f"{name}_{k}": value for k, value in enumerate(values)}
        return metrics

    # -------- what moves after the optimizer's step --------

    @torch.no_grad()
    def update_codebooks(self, stats):
        """For the codewords that were given a frame. A batch that is not finite moves none."""
        decay, finite = self.config.codebook_decay, stats["sums"].isfinite().all()
        for codebook, n, s in zip(self.codebooks, stats["counts"], stats["sums"]):
            used = (n > 0) & finite  # a codeword without a frame does not decay
            N, S = codebook.counts, codebook.codebook  # [V], [V, D]
            N.copy_(torch.where(used, decay * N + (1 - decay) * n, N))  # (5)
            S.copy_(torch.where(used[:, None], decay * S + (1 - decay) * s, S))  # (5)

    def ema_decay(self, step):
        """b in (6), which is 1 for good once it is near enough."""
        c = self.config
        remaining = math.exp(-step / c.ema_timescale)  # part of the first distance from 1, 1 - b0
        if c.ema_schedule == "linear":  # to a tenth of it: in DinoSR b goes from 0.999 to 0.9999
            remaining = 1 - 0.9 * min(1.0, step / c.ema_timescale)
        decay = 1 - (1 - c.ema_start) * remaining  # (6)
        stopped = 1 - decay <= c.ema_threshold or 0 < c.ema_stop <= step
        return 1.0 if stopped else decay

    @torch.no_grad()
    def update_teacher(self, step):
        """After optimizer step `step`, counted from 1, which it remembers. Returns the decay."""
        decay = self.ema_decay(step)
        self.current_step.fill_(step)
        if decay < 1:
            names, teacher = zip(*self.teacher.named_parameters())
            # By name, because an adapted weight is not one parameter but W0 + B A.
            student = attrgetter(*names)(self.student)
            torch._foreach_lerp_(teacher, student, 1 - decay)  # (6)
            # The positional convolution is copied, as long as the teacher moves: so both agree on
            # where a frame is.
            self.teacher.pos_conv_embed.load_state_dict(self.student.pos_conv_embed.state_dict())
        return decay

    def freeze_front_end(self):
        for part in self.feature_extractor, self.feature_projection:
            for p in part.requires_grad_(False).parameters():
                p.grad = None  # the optimizer passes by what has no gradient

    # -------- supervised steps (SpidR-Adapt) --------

    def add_language(self, language, phones):
        """A classifier for so many phones. One that is there already stays."""
        require("." not in language and not hasattr(nn.ModuleDict(), language),
                f"language {language!r}: PyTorch keeps this name, or its dot, for itself")
        if language not in self.supervised_classifiers:
            linear = nn.Linear(self.config.dim, phones).to(self.mask_embedding.device)
            self.supervised_classifiers[language] = nn.ModuleDict({"output_layer": linear})
        have = self.supervised_classifiers[language].output_layer.out_features
        require(have == phones, f"language {language}: the model has {have} phone classes, "
                f"the alignments have {phones}")

    def supervised_loss(self, wav, mask, phones, language, layer):
        """The loss of phones [B, T], -100 where none is known, read off the output of `layer`;
        and its sums. The input is masked as ever, but all frames count."""
        x, _ = self.frames(wav)
        _, outputs = self.student(self.hide(x, mask), depth=layer)
        logits = self.supervised_classifiers[language].output_layer(outputs[-1]).float()
        logits, phones = logits.flatten(0, 1), phones.flatten()  # [B T, phones], [B T]
        total = F.cross_entropy(logits, phones, ignore_index=-100, reduction="sum")
        frames = (phones >= 0).sum().to(total.dtype)
        hits = (logits.argmax(-1) == phones).sum().to(total.dtype)
        stats = {"frames": frames, "phone_loss": total.detach(), "phone_accuracy": hits}
        return total / frames.clamp(min=1), stats  # (7)


# ======== plumbing: skip at first reading ========


class InputError(ValueError):
    """Something that the user gave is wrong. The message is one line: where, what, what to do."""


def require(condition, message):
    if not condition:
        raise InputError(message)


def check_config(c):
    """What PyTorch would not say, or not in time."""
    c.conv_layers = tuple(tuple(layer) for layer in c.conv_layers)
    require(c.objective in ("spidr", "dinosr"), f"objective {c.objective!r}: spidr or dinosr")
    require(c.norm in ("layer_norm", "group_norm"), f"norm {c.norm!r}: layer_norm or group_norm")
    require(c.ema_schedule in ("exponential", "linear"),
            f"ema_schedule {c.ema_schedule!r}: exponential or linear")
    require(math.prod(stride for *_, stride in c.conv_layers) == 320,
            "conv_layers: the strides multiply to 320 samples, a frame at 50 Hz")
    for name in "heads", "pos_groups":
        parts = getattr(c, name)
        require(c.dim % parts == 0, f"dim {c.dim} does not divide into {parts} {name}")
    require(c.pos_kernel // c.pos_depth % 2 == 1, "pos_kernel // pos_depth must be odd")
    require(1 <= c.codebooks <= c.layers and c.codewords >= 2,
            f"codebooks: from 1 to the {c.layers} layers, with 2 codewords or more")


def entropy(p):
    """In bits, of the distributions along the last dimension."""
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2)


@contextlib.contextmanager
def full_precision(device):
    """Products in float32, whatever autocast and TF32 would make of them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# ======== how a script begins and ends ========


def run(main):
    """The entry of every script. Whatever happens, the process and its children are gone a moment
    later: Python's own way out would wait for loaders, which do not listen to SIGTERM."""
    status = outcome(main)
    end_children()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def outcome(main):
    """The exit status of a script. A mistake of the user's is one line on standard error."""
    try:
        main()
        barrier()  # a rank that leaves while another still works takes it down
        return 0
    except SystemExit as error:
        return error.code or 0
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        end_children()
        message = explain(error)
        if not message:
            traceback.print_exc()
            return 1
        print("error:", message, file=sys.stderr)
        return 2


def explain(error):
    """One line, or nothing if the mistake is ours."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: halve --batch-samples and double --accumulate"
    if isinstance(error, EOFError) or "DataLoader worker" in str(error):
        return ("a process that reads audio was killed, perhaps for want of memory: the same "
                "command resumes; lower --loaders if it happens again")
    if isinstance(error, (InputError, OSError)):
        return " ".join(str(error).split())


def end_children():
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler complains of killed loaders
    for child in multiprocessing.active_children():
        child.kill()


def die_with_parent(signal_number):
    """Asks Linux for a signal when the parent process ends, however it ends."""
    with contextlib.suppress(OSError, AttributeError):  # other systems know no such thing
        ctypes.CDLL(None).prctl(1, int(signal_number))  # 1: PR_SET_PDEATHSIG


def lock(file, wait=True):
    """Holds an open file until it is closed or the process ends. False if another process does."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # some cluster file systems have no locks
        print(f"warning: {file.name} cannot be locked ({error}): see to it yourself that no other "
              "process writes there", file=sys.stderr)
    return True


# ======== several ranks ========


def barrier():
    if dist.is_initialized():
        dist.barrier()


def alone(group):
    return not dist.is_initialized() or dist.get_world_size(group) == 1


def all_sum(tensors, group=None):
    """Sums a list of tensors, in place, over the ranks of a group, in one message."""
    if not alone(group):
        message = torch.cat([t.flatten().float() for t in tensors])
        dist.all_reduce(message, group=group)
        parts = message.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors)])
    return tensors


def backward_and_sum(loss, model, group, last):
    """loss.backward(). In the last micro-batch of a step the gradients are also summed over the
    ranks of a group: each is sent when it is complete, while the backward pass goes on below."""
    if alone(group) or not last:
        return loss.backward()
    messages = []

    def send(p):
        messages.append(dist.all_reduce(p.grad, group=group, async_op=True))

    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(send) for p in trained]
    loss.backward()
    for hook in hooks:
        hook.remove()
    for message in messages:
        message.wait()


def send_from_first(model, group=None):
    """All ranks of a group begin with the first one's weights: unlike machines may have made unlike
    ones."""
    if not alone(group):
        first = dist.get_global_rank(group, 0) if group else 0
        for t in model.state_dict().values():
            message = t.contiguous()
            dist.broadcast(message, first, group)
            t.copy_(message)


# ======== load and save ========

# Our name for each entry of the section "model" in a released config.json. We write the same, and
# what it has no name for under ours, where that is not the default.
RELEASED_NAMES = {
    "objective": "objective", "norm": "extractor_mode",
    "conv_layers": "extractor_conv_layer_config", "conv_bias": "extractor_conv_bias",
    "dim": "encoder_embed_dim", "layers": "encoder_num_layers", "heads": "encoder_num_heads",
    "ffn": "encoder_ff_interm_features", "qkv_bias": "encoder_qkv_bias",
    "pos_kernel": "encoder_pos_conv_kernel", "pos_depth": "encoder_pos_conv_depth",
    "pos_groups": "encoder_pos_conv_groups", "projection_dropout": "encoder_projection_dropout",
    "dropout": "encoder_dropout", "attention_dropout": "encoder_attention_dropout",
    "ffn_dropout": "encoder_ff_interm_dropout", "layer_drop": "encoder_layer_drop",
    "init_std": "init_std", "codebooks": "num_codebooks", "codewords": "codebook_size",
    "codebook_decay": "codebook_decay", "ema_start": "ema_start_decay",
    "ema_timescale": "ema_timescale", "ema_threshold": "ema_threshold",
}


def save(path, state, **more):
    """A checkpoint in the released format, under a temporary name first: a full disk leaves the
    old one whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"model": state, **more}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 1e6
        raise InputError(f"{path} could not be written, what was there before is untouched; "
                         f"{free:.1f} MB are free: {str(error).splitlines()[0]}") from None


def read_checkpoint(path):
    """(path, the checkpoint's dictionary), never unpickled. A folder stands for its newest one."""
    path = Path(path)
    if path.is_dir():
        kept = sorted(path.glob("step_*.pt"), key=lambda p: (len(p.name), p.name))
        last = path / "last.pt"
        require(kept or last.exists(), f"{path}: a folder without last.pt or step_*.pt")
        path = last if last.exists() else kept[-1]
    require(path.is_file(), f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "model" not in checkpoint:  # a bare state dict, as one released model is
            checkpoint = {"model": checkpoint}
        only_tensors = all(isinstance(t, torch.Tensor) for t in checkpoint["model"].values())
    except Exception as error:  # zip, pickle, end-of-file and type errors of many kinds
        why = type(error).__name__
        raise InputError(f"{path}: not a checkpoint, or one cut short ({why})") from None
    require(only_tensors, f"{path}: holds more than tensors")
    return path, checkpoint


def read_config(path):
    """The section "model" of a config.json, ours or a released one; base if there is no file."""
    if not path.exists():
        return Config()
    try:
        section = json.loads(path.read_text()).get("model", {})
        require(not section.get("encoder_layer_norm_first"), "pre-norm, which SpidR is not")
        names = {ours: RELEASED_NAMES.get(ours, ours) for ours in Config.__dataclass_fields__}
        return Config(**{ours: section[name] for ours, name in names.items() if name in section})
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None


def released_config(config):
    default = asdict(Config())
    return {RELEASED_NAMES.get(name, name): value for name, value in asdict(config).items()
            if name in RELEASED_NAMES or value != default[name]}


def load_state(model, state, path):
    """Strictly: a name or a shape that does not fit is an error."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    for name, value in state.items():
        if name.startswith("supervised_classifiers.") and name.endswith(".output_layer.weight"):
            model.add_language(name.split(".")[1], len(value))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise InputError(f"{path}: does not fit the configuration: {first[:200]}") from None
    return model


def dinosr(timescale):
    """What DinoSR, the predecessor, does otherwise. In base its decay b climbs for 30,000 steps,
    and the teacher stops at step 200,000; smaller presets keep the proportion to SpidR's timescale.
    """
    return dict(objective="dinosr", layer_drop=0.05, ema_schedule="linear",
                ema_timescale=1.5 * timescale, ema_stop=round(10 * timescale))


def load(what, device="cpu"):
    """A run's folder, one of our checkpoints, a released one (with its config.json beside it;
    without one it is taken for base), the name of a released model, or a URL."""
    return load_init(what)[0].to(device)


def load_init(what, **changes):
    """What a stage starts from: the same network, and the phone inventories of its classifiers."""
    path, checkpoint = read_checkpoint(locate(what))
    described, config = path.parent / "config.json", config_of(what)
    model = SpidR(replace(config, **changes))
    name = path if described.exists() else f"{path}, taken for base for want of {described}"
    load_state(model, checkpoint["model"], name)
    return model.eval(), checkpoint.get("inventories", {})


def config_of(what):
    """The configuration of a checkpoint. Released ones have no config.json that would tell it."""
    path = locate(what)
    config = read_config((path if path.is_dir() else path.parent) / "config.json")
    is_dinosr = path.name == "dinosr_base_reproduced.pt"
    return replace(config, **dinosr(config.ema_timescale)) if is_dinosr else config


def locate(what):
    """The path of a checkpoint or run. A released model or a URL is downloaded, once."""
    if Path(what).exists():
        return Path(what)
    from extras import released
    return released.find(str(what))
