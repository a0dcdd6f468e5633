"""SpidR: the network, its objective, its teacher.  (Papers: SpidR, arXiv 2512.20308; SpidR-Adapt, arXiv 2512.21204.)

    python model.py [tiny|base]       prints the network: shapes for a second of audio, parameters, receptive field

    waveform -> downsampler -> projection -+-> mask -> student Transformer -> K heads --> log-probabilities
                                           |                                                  | cross-entropy
                                           +---------> teacher Transformer -> K codebooks --> labels of masked frames

The teacher is a moving average of the student; a codebook is a moving average of the teacher's outputs, each counted
for its nearest codeword. Layers are counted from 1; head and codebook k (from 0) belong to layer L-K+1+k.

Shapes: B batch, N samples, T frames, D width, L layers, K codebooks, V codewords, M masked frames of the batch.
"""

import ctypes
import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: where, what, and what to do."""


def require(condition, message):
    if not condition:
        raise InputError(message)


def keep_memory():
    """Linux' malloc returns large blocks at once and gets them again page by page: a tenth of a step on a CPU."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and none goes back
    except (OSError, TypeError, AttributeError):  # no such thing on this system
        pass


def run(main):
    """The entry of every script: a mistake of the user's ends in one line and exit status 2, not in a traceback."""
    keep_memory()
    code = 0
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves while another still works takes it down
    except (InputError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = stop.code or 0
    if dist.is_initialized():
        # At once: gloo's threads may hold Python objects, and abort when the interpreter winds down around them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


# ======== options ========


@dataclass
class Config:
    """The network. The defaults are the base model of the papers."""

    objective: str = "spidr"  # spidr: head k reads the student's layer L-K+1+k; dinosr: every head reads the last layer
    norm: str = "layer_norm"  # downsampler: layer_norm after every convolution, or group_norm after the first only
    conv_layers: tuple = ((512, 10, 5),) + ((512, 3, 2),) * 4 + ((512, 2, 2),) * 2  # [channels, kernel, stride] each
    conv_bias: bool = False  # biases in the downsampler
    dim: int = 768  # D, the width
    layers: int = 12  # L, Transformer layers
    heads: int = 12  # attention heads
    ffn: int = 3072  # inner width of the feed-forward blocks
    qkv_bias: bool = False  # bias in the query-key-value projection
    pos_kernel: int = 95  # frames of the positional convolutions together: each has a kernel of pos_kernel // pos_depth
    pos_depth: int = 5  # how many positional convolutions
    pos_groups: int = 16  # groups of each
    projection_dropout: float = 0.0  # after the projection
    dropout: float = 0.1  # on both residual branches and after the positional convolutions
    attention_dropout: float = 0.1  # on the attention weights
    ffn_dropout: float = 0.0  # inside the feed-forward blocks
    layer_drop: float = 0.0  # probability that the residual stream skips a layer
    init_std: float = 0.02  # of the feed-forward weights
    codebooks: int = 8  # K: one for each of the last K layers
    codewords: int = 256  # V, in each codebook
    codebook_decay: float = 0.9  # of the codewords' sums and counts; 1 keeps the codebooks as they are
    ema_start: float = 0.999  # b0, where the teacher's decay starts; 1 keeps the teacher as it is
    ema_timescale: float = 20000.0  # steps in which the teacher's decay approaches 1
    ema_threshold: float = 1e-7  # the teacher stops for good once 1 - decay is this small

    def __post_init__(self):
        try:
            self.conv_layers = tuple((int(c), int(k), int(s)) for c, k, s in self.conv_layers)
        except (TypeError, ValueError):
            raise InputError("conv_layers: a list of [channels, kernel, stride]") from None
        dropouts = self.projection_dropout, self.dropout, self.attention_dropout, self.ffn_dropout, self.layer_drop
        require(self.objective in ("spidr", "dinosr"), f"objective {self.objective!r}: spidr or dinosr")
        require(self.norm in ("layer_norm", "group_norm"), f"norm {self.norm!r}: layer_norm or group_norm")
        sizes = self.dim, self.layers, self.heads, self.ffn, self.pos_depth, self.pos_groups
        require(min(sizes + sum(self.conv_layers, ())) >= 1,
                "dim, layers, heads, ffn, pos_depth, pos_groups and the numbers of conv_layers are at least 1")
        require(self.dim % self.heads == 0, f"dim {self.dim} does not divide into {self.heads} heads")
        require(self.dim % self.pos_groups == 0, f"dim {self.dim} does not divide into {self.pos_groups} pos_groups")
        require(self.pos_kernel // self.pos_depth % 2 == 1, "pos_kernel // pos_depth must be odd")
        require(1 <= self.codebooks <= self.layers, f"codebooks: from 1 to the number of layers, {self.layers}")
        require(self.codewords >= 2, "codewords: at least 2")
        require(all(0 <= p < 1 for p in dropouts), "dropouts lie in [0, 1)")
        require(math.prod(stride for *_, stride in self.conv_layers) == 320,
                "conv_layers: the strides multiply to 320 samples, a frame at 50 Hz")
        require(0 <= self.codebook_decay <= 1 and 0 <= self.ema_start <= 1, "decays lie in [0, 1]")
        require(self.ema_timescale > 0 and self.init_std > 0, "ema_timescale and init_std are positive")


# tiny: what learns in minutes on two cores. Smaller throughout; group norm, because LayerNorm after every one of
# so few channels does not get going in so few steps; wider initial feed-forward weights to keep a layer's gain at
# a smaller width; a teacher that settles within hundreds of steps.
PRESETS = {
    "base": {},
    "tiny": dict(norm="group_norm", conv_layers=((32, 10, 5),) + ((64, 3, 2),) * 4 + ((64, 2, 2),) * 2,
                 dim=128, layers=4, heads=4, ffn=512, pos_kernel=57, pos_depth=3, dropout=0.0, attention_dropout=0.0,
                 init_std=0.05, codebooks=3, codewords=48, ema_timescale=500.0),
}

# Our name for each entry of the "model" section in a released config.json. Ours are written under the same names.
RELEASED_NAMES = {
    "objective": "objective", "norm": "extractor_mode", "conv_layers": "extractor_conv_layer_config",
    "conv_bias": "extractor_conv_bias", "dim": "encoder_embed_dim", "layers": "encoder_num_layers",
    "heads": "encoder_num_heads", "ffn": "encoder_ff_interm_features", "qkv_bias": "encoder_qkv_bias",
    "pos_kernel": "encoder_pos_conv_kernel", "pos_depth": "encoder_pos_conv_depth",
    "pos_groups": "encoder_pos_conv_groups", "projection_dropout": "encoder_projection_dropout",
    "dropout": "encoder_dropout", "attention_dropout": "encoder_attention_dropout",
    "ffn_dropout": "encoder_ff_interm_dropout", "layer_drop": "encoder_layer_drop", "init_std": "init_std",
    "codebooks": "num_codebooks", "codewords": "codebook_size", "codebook_decay": "codebook_decay",
    "ema_start": "ema_start_decay", "ema_timescale": "ema_timescale", "ema_threshold": "ema_threshold",
}


# ======== products and convolutions ========


def by_onednn(x):
    plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    return x.is_cpu and plain and torch.backends.mkldnn.is_available()


def linear(x, weight, bias=None):
    """F.linear. PyTorch leaves it to MKL. On an AMD CPU with AVX-512 oneDNN is a quarter faster at large ones, which is
    an eighth of a step of base; without AVX-512 it is not."""
    large = x.dtype == torch.float32 and weight.numel() >= 2**18
    if large and by_onednn(x) and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), (to_x, to_weight, to_bias) = ctx.saved_tensors, ctx.needs_input_grad
        x, flat = x.flatten(0, -2), gradient.flatten(0, -2)
        return (linear(gradient, weight.T) if to_x else None,
                linear(flat.T, x.T) if to_weight else None,
                flat.sum(0) if to_bias else None)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def convolve(x, layer):
    """x [B, N, C] by an nn.Conv1d with a stride, or with padding and groups -> [B, N', C'].

    A conv1d makes time contiguous, and then oneDNN's kernels make channels so. For a conv2d over pictures of height one
    they are already, and for the norms too: a step of tiny takes a seventh less on a CPU."""
    if not by_onednn(x):
        return layer(x.mT).mT
    if layer.groups > 1 or any(layer.padding):
        x = F.conv2d(x.mT[:, :, None], layer.weight[:, :, None], padding=(0, *layer.padding), groups=layer.groups)
        x = x[:, :, 0].mT
    else:
        x = Convolution.apply(x, layer.weight, *layer.stride)
    return x if layer.bias is None else x + layer.bias


class Convolution(torch.autograd.Function):
    """oneDNN is slow at the gradient to the weight when channels are contiguous. Here it is a matrix product for every
    `stride` taps of the kernel: what they see at all steps is a view of the input."""

    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x.mT[:, :, None], weight[:, :, None], stride=(1, stride))[:, :, 0].mT

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), stride, to_x, to_weight = ctx.saved_tensors, ctx.stride, None, None
        (N, C), (_, _, kernel), (_, frames, channels) = x.shape[1:], weight.shape, gradient.shape
        if ctx.needs_input_grad[0]:
            unread = N - (frames - 1) * stride - kernel  # samples at the end, too few for another step
            to_x = F.conv_transpose2d(gradient.mT[:, :, None], weight[:, :, None], stride=(1, stride),
                                      output_padding=(0, unread))[:, :, 0].mT
        if ctx.needs_input_grad[1]:
            to_weight = []
            for tap in range(0, kernel, stride):
                seen = x[:, tap:].unfold(1, min(stride, kernel - tap), stride)[:, :frames]  # [B, N', C, taps]
                to_weight.append(gradient.mT.bmm(seen.mT.flatten(2)).sum(0))
            to_weight = torch.cat(to_weight, 1).view(channels, kernel, C).mT
        return to_x, to_weight, None


# ======== downsampler ========


def num_frames(samples, config):
    """Frames that the downsampler makes of so many samples (an int or a tensor of them)."""
    for _, kernel, stride in config.conv_layers:
        samples = (samples - kernel) // stride + 1
    return samples


def valid_frames(lengths, frames, device):
    """[B] lengths -> [B, T], true before each length; None where nothing is padded, so that attention needs no mask."""
    return None if lengths is None else torch.arange(frames, device=device) < lengths.to(device)[:, None]


class ConvLayer(nn.Module):
    def __init__(self, channels_in, channels, kernel, stride, norm, bias):
        super().__init__()
        self.conv = nn.Conv1d(channels_in, channels, kernel, stride, bias=bias)
        self.layer_norm = (nn.LayerNorm(channels) if norm == "layer_norm" else
                           nn.GroupNorm(channels, channels) if norm == "group_norm" else nn.Identity())
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(self, x, lengths=None):  # [B, N, C_in] -> [B, N', C], of which `lengths` are no padding
        if isinstance(self.layer_norm, nn.GroupNorm):
            return F.gelu(self.group_norm(x[..., 0], lengths))
        return F.gelu(self.layer_norm(convolve(x, self.conv)))

    def group_norm(self, wav, lengths):
        """The convolution of wav [B, N] and its norm, one group a channel: over the time that is no padding.

        A channel is a weighted sum of what the kernel sees, whose mean and covariance tell the channel's own. So the
        norm becomes other weights and a shift for each utterance; a step of tiny takes 3% less on a CPU."""
        windows = wav.unfold(1, *self.conv.kernel_size, *self.conv.stride)  # [B, N', kernel], a view
        seen = (windows.cpu() if wav.device.type == "mps" else windows).double()  # a covariance subtracts near numbers
        weight, gain, bias = (p.to(seen.device) for p in (self.conv.weight[:, 0], *self.layer_norm.parameters()))
        valid = valid_frames(lengths, seen.shape[1], seen.device)
        share = 1 / seen.shape[1] if valid is None else valid[..., None] / valid.sum(1)[:, None, None]
        shared, exact = seen * share, weight.double()
        mean = shared.sum(1)  # [B, kernel]
        covariance = shared.mT @ seen - mean[:, :, None] * mean[:, None]
        scale = gain * ((exact @ covariance * exact).sum(-1) + self.layer_norm.eps).rsqrt()  # [B, C]
        shift = bias - scale * (mean @ exact.T)  # a bias of the convolution would cancel
        return windows @ (weight * scale[..., None]).to(wav).mT + shift.to(wav)[:, None]


class Downsampler(nn.Module):
    """16 kHz samples to frames at 50 Hz."""

    def __init__(self, config):
        super().__init__()
        self.conv_layers, channels_in = nn.ModuleList(), 1
        for i, (channels, kernel, stride) in enumerate(config.conv_layers):
            norm = config.norm if config.norm == "layer_norm" or i == 0 else None
            self.conv_layers.append(ConvLayer(channels_in, channels, kernel, stride, norm, config.conv_bias))
            channels_in = channels

    def forward(self, wav, lengths=None):  # [B, N] -> [B, T, C]
        x = wav[..., None]
        for layer in self.conv_layers:
            if lengths is not None:
                lengths = (lengths - layer.conv.kernel_size[0]) // layer.conv.stride[0] + 1
            x = layer(x, lengths)
        return x


class Projection(nn.Module):
    def __init__(self, config):
        super().__init__()
        channels = config.conv_layers[-1][0]
        self.layer_norm = nn.LayerNorm(channels)
        self.projection = Linear(channels, config.dim)
        self.dropout = nn.Dropout(config.projection_dropout)

    def forward(self, x):  # [B, T, C] -> [B, T, D]
        return self.dropout(self.projection(self.layer_norm(x)))


# ======== Transformer ========


class PositionalConv(nn.Module):
    """Position by convolution: added to the Transformer's input."""

    def __init__(self, config):
        super().__init__()
        kernel = config.pos_kernel // config.pos_depth
        self.convs = nn.ModuleList(nn.Conv1d(config.dim, config.dim, kernel, padding=kernel // 2,
                                             groups=config.pos_groups) for _ in range(config.pos_depth))

    def forward(self, x, valid=None):  # [B, T, D]
        def clear(x):  # of what is padding
            return x if valid is None else x.masked_fill(~valid[..., None], 0)

        for conv in self.convs:
            x = convolve(clear(x), conv)
            x = F.gelu(F.layer_norm(x, x.shape[-1:]))
        return clear(x)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.qkv = Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.proj = Linear(config.dim, config.dim)
        nn.init.xavier_uniform_(self.qkv.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x, valid=None):  # [B, T, D]
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, D/heads] each
        mask = None if valid is None else valid[:, None, None]  # padding is no key
        x = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.intermediate_dense = Linear(config.dim, config.ffn)
        self.dropout = nn.Dropout(config.ffn_dropout)
        self.output_dense = Linear(config.ffn, config.dim)
        for dense in self.intermediate_dense, self.output_dense:
            nn.init.normal_(dense.weight, std=config.init_std)
            nn.init.zeros_(dense.bias)

    def forward(self, x):
        return self.output_dense(self.dropout(F.gelu(self.intermediate_dense(x))))


class Layer(nn.Module):
    """A post-norm Transformer layer. Its *output*, in every sense of the papers (targets, predictions, features), is
    what the feed-forward block gives before the residual sum."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.layer_norm = nn.LayerNorm(config.dim)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, valid=None):  # [B, T, D] -> the residual stream and the output, [B, T, D] both
        x = self.layer_norm(x + self.dropout(self.attention(x, valid)))
        output = self.feed_forward(x)
        return self.final_layer_norm(x + self.dropout(output)), output


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.pos_conv_embed = PositionalConv(config)
        self.layer_norm = nn.LayerNorm(config.dim)
        self.dropout, self.layer_drop = nn.Dropout(config.dropout), config.layer_drop
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x, valid=None, depth=None):
        """The residual stream after layer `depth`, [B, T, D], and the list of the outputs of the layers up to it."""
        x = self.dropout(self.layer_norm(x + self.pos_conv_embed(x, valid)))
        outputs = []
        for layer in self.layers[:depth]:
            stream, output = layer(x, valid)
            outputs.append(output)  # of a dropped layer too: its head has to learn
            if self.training and self.layer_drop > 0:  # chosen, not passed over: ranks that drop others sum the same
                dropped = (torch.rand(()) < self.layer_drop).to(x.device, non_blocking=True)
                stream = torch.where(dropped, x, stream)
            x = stream
        return x, outputs


# ======== the model ========


class Codebook(nn.Module):
    """Codeword v is S_v / N_v, the decayed sum over the decayed count of the targets assigned to it."""

    def __init__(self, config):
        super().__init__()
        self.register_buffer("codebook", torch.empty(config.codewords, config.dim))  # S [V, D]
        self.register_buffer("counts", torch.empty(config.codewords))  # N [V]
        self.reset()

    def reset(self):
        noise = torch.randn(self.codebook.shape)
        self.codebook.copy_((noise - noise.mean(0)) * (noise.var(0, correction=0) + 1e-5).rsqrt())
        self.counts.fill_(1)


class SpidR(nn.Module):
    """Attributes carry the names of the released checkpoints, so that loading and saving translate nothing."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or Config()
        self.feature_extractor = Downsampler(config)
        self.feature_projection = Projection(config)
        self.mask_embedding = nn.Parameter(torch.rand(config.dim))
        self.student = Transformer(config)
        # The teacher starts from weights of its own, not from the student's.
        self.teacher = Transformer(config).requires_grad_(False)
        K, V = config.codebooks, config.codewords
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(config.dim, V)) for _ in range(K))
        self.codebooks = nn.ModuleList(Codebook(config) for _ in range(K))
        self.supervised_classifiers = nn.ModuleDict()
        self.register_buffer("current_step", torch.zeros(1, dtype=torch.int64))
        self.group = None  # the process group that shares a batch; None: all ranks, if there are any
        self.pending = None  # statistics of the step's micro-batches so far

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # never any dropout in the targets
        return self

    def freeze_front_end(self):
        for part in self.feature_extractor, self.feature_projection:
            for p in part.requires_grad_(False).parameters():
                p.grad = None  # without a gradient the optimizer passes it by

    # -------- inference --------

    def frames(self, wav, lengths=None):
        """[B, N] -> projected frames [B, T, D], and which of them are no padding."""
        features = self.feature_extractor(wav, lengths)
        lengths = None if lengths is None else num_frames(lengths, self.config)
        return self.feature_projection(features), valid_frames(lengths, features.shape[1], wav.device)

    def encode(self, wav, lengths=None):
        """Standardised wav [B, N], padded where lengths [B] says so -> the outputs of layers 1..L, [B, T, D] each."""
        return self.student(*self.frames(wav, lengths))[1]

    def units(self, wav, lengths=None):
        """The codeword that each head expects, [K, B, T]."""
        stream, outputs = self.student(*self.frames(wav, lengths))
        outputs = self.head_inputs(stream, outputs)
        return torch.stack([head(x).argmax(-1) for head, x in zip(self.heads, outputs)])

    def head_inputs(self, stream, outputs):
        # SpidR's one change to DinoSR's objective. With every head on the last layer, nothing ties a lower layer of the
        # student to the codebook of its own teacher layer, and codebooks collapse; a head a layer keeps them alive.
        if self.config.objective == "dinosr":
            return [stream] * self.config.codebooks
        return self.last(outputs)

    def last(self, outputs):
        """The layers that have a head and a codebook."""
        return outputs[-self.config.codebooks :]

    def hide(self, x, mask):
        """The mask embedding in the place of the masked frames."""
        return torch.where(mask.to(x.device, non_blocking=True)[..., None], self.mask_embedding.to(x.dtype), x)

    # -------- self-supervised training (SpidR) --------

    def forward(self, wav, mask, lengths=None, commit=True):
        """One training forward: the mean loss over masked frames and codebooks, and the metrics of the step.

        mask [B, T] bool; on the CPU it costs a GPU no synchronisation. In train mode the codebooks move, after the
        assignment. commit=False: more micro-batches of the same step follow; the last one reduces and moves for all.
        """
        z, targets = self.masked_frames(wav, mask, lengths)  # K times [M, D]; [K, M, D]
        labels = self.assign(targets)  # [K, M]
        log_probs = torch.stack([head(x) for head, x in zip(self.heads, z)]).log_softmax(-1)  # [K, M, V]
        losses = -log_probs.gather(-1, labels[..., None])[..., 0]  # [K, M]
        metrics = self.finish_step(losses.detach(), log_probs.detach(), labels, targets, commit)
        return losses.sum() / max(1, losses.numel()), metrics  # a batch may be without a single masked frame

    def masked_frames(self, wav, mask, lengths=None):
        """What the heads read, K times [M, D], and what their codebooks sort, [K, M, D], at the masked frames."""
        x, valid = self.frames(wav, lengths)  # [B, T, D]
        where = mask.flatten().nonzero()[:, 0].to(x.device, non_blocking=True)  # [M]
        with torch.no_grad():
            _, outputs = self.teacher(x, valid)  # the teacher hears everything
            targets = torch.stack([instance_norm(y, valid).flatten(0, 1)[where] for y in self.last(outputs)])
        stream, outputs = self.student(self.hide(x, mask), valid)
        return [y.flatten(0, 1)[where] for y in self.head_inputs(stream, outputs)], targets

    @torch.no_grad()
    def assign(self, targets):
        """The nearest codeword, [K, M, D] -> [K, M], in float32 (TF32 on GPUs) whatever autocast says."""
        with torch.autocast(targets.device.type, enabled=False):
            codewords = torch.stack([c.codebook / c.counts[:, None] for c in self.codebooks])  # [K, V, D]
            # |t - c|^2 without |t|^2, which is the same for every codeword
            distance = torch.baddbmm(codewords.square().sum(-1)[:, None], targets.float(), codewords.mT, alpha=-2)
            return distance.argmin(-1)

    @torch.no_grad()
    def finish_step(self, losses, log_probs, labels, targets, commit):
        """Sums over the step's micro-batches and ranks; with the last (commit) codebooks move and metrics come out."""
        (K, M), V, D = labels.shape, self.config.codewords, self.config.dim
        slot = (labels + V * torch.arange(K, device=labels.device)[:, None]).flatten()  # k V + v
        one_hot_sum = torch.zeros(K * V, device=slot.device).index_add_(0, slot, torch.ones(K * M, device=slot.device))
        target_sum = torch.zeros(K * V, D, device=slot.device).index_add_(0, slot, targets.float().flatten(0, 1))
        hits = (log_probs.argmax(-1) == labels).sum(1)
        statistics = [losses.sum(1), hits, losses.new_full((K,), M), log_probs.exp().sum(1), one_hot_sum, target_sum]
        flat = torch.cat([s.float().flatten() for s in statistics])
        self.pending = flat if self.pending is None else self.pending + flat
        if not commit:
            return {}
        flat, self.pending = all_sum(self.pending, self.group), None
        loss, hits, frames, probs, n, s = flat.split([K, K, K, K * V, K * V, K * V * D])
        n = n.view(K, V)
        if self.training:
            self.update_codebooks(n, s.view(K, V, D))
        return health(loss / frames, hits / frames, n / frames[:, None], probs.view(K, V) / frames[:, None])

    def update_codebooks(self, n, s):
        """N <- decay N + (1 - decay) n and S likewise, for the codewords that got a frame: n [K, V], s [K, V, D]."""
        decay = self.config.codebook_decay
        used = (n > 0) & s.isfinite().all()  # an idle codeword keeps its place; a broken batch moves none
        for k, c in enumerate(self.codebooks):
            c.counts.copy_(torch.where(used[k], decay * c.counts + (1 - decay) * n[k], c.counts))
            c.codebook.copy_(torch.where(used[k][:, None], decay * c.codebook + (1 - decay) * s[k], c.codebook))

    def ema_decay(self, step):
        """b(s) = 1 - (1 - b0) exp(-s / timescale), and 1 for good once that is near enough."""
        decay = 1 - (1 - self.config.ema_start) * math.exp(-step / self.config.ema_timescale)
        return 1.0 if 1 - decay <= self.config.ema_threshold else decay

    @torch.no_grad()
    def update_teacher(self, step):
        """After optimizer step `step`, from 1: the teacher follows the student. Returns the decay."""
        decay = self.ema_decay(step)
        self.current_step.fill_(step)
        if decay < 1:
            names, teacher = zip(*self.teacher.named_parameters())
            student = attrgetter(*names)(self.student)  # by name: an adapted weight is W0 + B A, not one parameter
            torch._foreach_lerp_(teacher, student, 1 - decay)
            # The positional convolution is copied: teacher and student agree on where things are.
            for theirs, ours in zip(self.teacher.pos_conv_embed.parameters(), self.student.pos_conv_embed.parameters()):
                theirs.copy_(ours)
        return decay

    # -------- interleaved supervision (SpidR-Adapt) --------

    def add_language(self, language, phones):
        """A classifier for so many phones; one that is there already stays."""
        require("." not in language and not hasattr(nn.ModuleDict(), language),
                f"language {language!r}: PyTorch keeps this name, or the dot in it, for itself: rename it")
        if language not in self.supervised_classifiers:
            output_layer = nn.Linear(self.config.dim, phones).to(self.mask_embedding.device)
            self.supervised_classifiers[language] = nn.ModuleDict({"output_layer": output_layer})
        have = self.supervised_classifiers[language].output_layer.out_features
        require(have == phones,
                f"language {language}: the model tells {have} phones apart, the alignments have {phones}")

    def supervised_loss(self, wav, mask, phones, language, layer):
        """Mean cross-entropy of the phones [B, T], -100 where none counts, read off `layer` of the masked input."""
        x, _ = self.frames(wav)
        _, outputs = self.student(self.hide(x, mask), depth=layer)
        logits = self.supervised_classifiers[language].output_layer(outputs[-1]).float()  # [B, T, phones]
        loss = F.cross_entropy(logits.flatten(0, 1), phones.flatten(), ignore_index=-100, reduction="sum")
        hits = (logits.detach().argmax(-1) == phones).sum()
        return loss / (phones >= 0).sum().clamp(min=1), torch.stack([loss.detach(), hits.float()])


def instance_norm(x, valid=None, eps=1e-5):
    """Each utterance and channel of x [B, T, D] to mean 0 and variance 1 over its valid frames."""
    if valid is None:
        return F.instance_norm(x.float().transpose(1, 2), eps=eps).transpose(1, 2)
    weight = valid[..., None] / valid.sum(1)[:, None, None]  # [B, T, 1]
    mean = (x * weight).sum(1, keepdim=True)
    var = ((x - mean).square() * weight).sum(1, keepdim=True)
    return (x - mean) * (var + eps).rsqrt()


def health(loss, accuracy, usage, prediction):
    """The metrics of a step. usage, prediction [K, V]: mean one-hot assignment and mean predicted distribution."""

    def entropy(p):  # in bits
        return -torch.special.xlogy(p, p).sum(-1) / math.log(2)

    layers = {
        "loss": loss, "accuracy": accuracy, "target_ppl": 2 ** entropy(usage), "pred_ppl": 2 ** entropy(prediction),
        "active": (usage > 0).sum(-1).float(), "usage_entropy": entropy(usage) / math.log2(usage.shape[-1]),
    }
    return {name: value.mean() for name, value in layers.items()} | {"layers": layers}


def all_sum(x, group=None):
    """The sum over the ranks of a group, on each of them."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(x, group=group)
    return x


# ======== load and save ========


def save(path, state, **more):
    """A checkpoint in the released format, under a temporary name first: a full disk leaves the old one whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"model": state, **more}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch hides a full disk behind a RuntimeError of its own
        free = shutil.disk_usage(path.parent).free / 1e6 if path.parent.exists() else 0
        temporary.unlink(missing_ok=True)
        why = error if isinstance(error, OSError) else f"{free:.1f} MB were free on its disk"
        raise InputError(f"{path} could not be written, what was there before is untouched: {why}") from None


def read_checkpoint(path):
    """The checkpoint's dictionary, never unpickled; a run's folder stands for its newest checkpoint."""
    path = Path(path)
    if path.is_dir():
        steps = sorted(path.glob("step_*.pt"), key=lambda p: (len(p.name), p.name))
        found = [p for p in [path / "last.pt", *reversed(steps)] if p.exists()]
        require(found, f"{path}: a folder without last.pt or step_*.pt")
        path = found[0]
    require(path.is_file(), f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and end-of-file errors of many kinds
        raise InputError(f"{path}: not a checkpoint, or one cut short ({type(error).__name__})") from None
    require(isinstance(checkpoint, dict) and isinstance(checkpoint.get("model"), dict), f'{path}: no "model" inside')
    return path, checkpoint


def read_config(path):
    """The "model" section of a config.json, ours or released; the base configuration if there is no such file."""
    path = Path(path)
    if not path.exists():
        return Config()
    try:
        section = json.loads(path.read_text()).get("model", {})
        require(not section.get("encoder_layer_norm_first", False), f"{path}: pre-norm Transformers are not SpidR's")
        return Config(**{ours: section[name] for ours, name in RELEASED_NAMES.items() if name in section})
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None


def released_config(config):
    return {RELEASED_NAMES[name]: value for name, value in asdict(config).items()}


def load_state(model, state, path):
    """Strictly: a name or a shape that does not fit is one clear error."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    require(all(isinstance(value, torch.Tensor) for value in state.values()), f"{path}: holds more than tensors")
    for name, value in state.items():
        if name.startswith("supervised_classifiers.") and name.endswith(".output_layer.weight"):
            model.add_language(name.split(".")[1], len(value))
    own = model.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is not of this model" for name in state if name not in own]
    wrong += [f"{name} has shape {tuple(state[name].shape)}, the configuration says {tuple(own[name].shape)}"
              for name in own if name in state and state[name].shape != own[name].shape]
    if wrong:
        raise InputError(f"{path}: {wrong[0]}" + (f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""))
    model.load_state_dict(state)
    return model


def load(path, device="cpu"):
    """A run's folder, one of our checkpoints or a released one (with its config.json beside it, else base)."""
    return load_init(path)[0].to(device)


def load_init(path, **changes):
    """What a stage starts from: the same network, and the phone inventories of its classifiers."""
    path, checkpoint = read_checkpoint(path)
    described = path.parent / "config.json"
    model = SpidR(replace(read_config(described), **changes))
    name = path if described.exists() else f"{path}, taken for base, since there is no {described}"
    return load_state(model, checkpoint["model"], name).eval(), checkpoint.get("inventories", {})


# ======== what the network looks like ========


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "base"
    if name in ("-h", "--help"):
        return print(__doc__)
    require(name in PRESETS, f"preset {name!r}: one of {', '.join(PRESETS)}")
    config = Config(**PRESETS[name])
    model, field, hop = SpidR(config), 1, 1

    def count(part):
        return sum(p.numel() for p in part.parameters()) / 1e6

    def row(stage, shape, part):
        print(f"{stage:36} {str(shape):18} {count(part):9.3f} M")

    print(f"{name}: a second of audio                {'shape':18} parameters")
    for i, (channels, kernel, stride) in enumerate(config.conv_layers):
        field, hop = field + (kernel - 1) * hop, hop * stride
        row(f"convolution {i + 1}: kernel {kernel}, stride {stride}", [channels, (16000 - field) // hop + 1],
            model.feature_extractor.conv_layers[i])
    frames = [num_frames(16000, config), config.dim]
    row("projection [T, D]", frames, model.feature_projection)
    row(f"{config.pos_depth} positional convolutions", frames, model.student.pos_conv_embed)
    for i, layer in enumerate(model.student.layers):
        k = i - (config.layers - config.codebooks)
        row(f"layer {i + 1}" + (f", head and codebook {k}" if k >= 0 else ""), frames, layer)
    row("heads [K, V]", [config.codebooks, config.codewords], model.heads)
    row("teacher (no gradient)", frames, model.teacher)
    print(f"trained {count(model) - count(model.teacher):.1f} M, with the teacher {count(model):.1f} M parameters")
    print(f"a frame every {hop} samples ({16000 / hop:g} Hz) sees {field} samples ({field / 16:g} ms)")


if __name__ == "__main__":
    run(main)
