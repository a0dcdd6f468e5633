"""Evaluation: features and units, ABX, the quality of units, and a language model on units.
(SpidR, arXiv 2512.20308; ZeroSpeech 2021; phoneme discovery: DiscoPhon, arXiv 2603.18612.)

    python evaluate.py                          the report: the newest runs on the toy world
    python evaluate.py toy RUN [RUN ...]        a short table: ABX of these runs on the toy world
    python evaluate.py features --model M --audio A --out FOLDER [--layer L]
    python evaluate.py units    --model M --audio A --out U.jsonl [--layer L]
    python evaluate.py abx      --items X.item (--model M --audio A | --features FOLDER)
    python evaluate.py quality  --units U.jsonl --alignments P.csv
    python evaluate.py lm       --units U.jsonl --out LM
    python evaluate.py swuggy | sblimp | tsc  --lm LM --model M --data FOLDER
    python evaluate.py compare  RUN [RUN ...]   adapted runs side by side

`features` writes what a layer makes of each recording, [T, D], and `units` the codewords that its
head predicts, [T], both at 50 Hz; frame i stands at (i + 1/2) / 50 s. `abx` asks whether a token of
a phone is nearer to another token of it than to one of another phone: 0% errors are perfect, 50%
are chance, good models make 3 to 6%. `quality` tells how well units stand for phones. `lm` trains a
causal Transformer on units; with it `swuggy` asks which of two recordings is a word, `sblimp` which
one is grammatical, `tsc` which one ends a story as it began.

M is a run's folder, a checkpoint of ours or a released one, or a baseline: mfcc, wav2vec2_base,
hubert_base, wavlm_base. A is a folder of audio, a manifest, or one file. Layers count from 1.
Features and units carry a hash of their model, so that they are never taken for another one's.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from statistics import fmean
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import model as spidr
from model import InputError, all_sum, num_frames, option, require, run
from pretrain import (
    Log, Parser, RunOptions, Stop, autocast, finished, is_kept, leave, lr_at, make_optimizer, move,
    open_run, parse_options, resume, save_checkpoint, seed_step, setup, step_of, trained,
)

RATE = 50  # frames a second
HOP, FIELD = 320, 400  # samples from one frame to the next, and samples that a frame sees


# ======== features and units ========


class Encoder(NamedTuple):
    """What makes frames of audio: one of our networks, or a baseline, which makes no units."""

    name: str
    hash: str  # of the weights
    layers: int  # L
    codebooks: int  # K, of the last K layers
    codewords: int  # V
    dim: int  # D
    encode: Callable  # B waveforms [N] -> for each what its L layers make of it, each [T, D]
    units: Callable = None  # B waveforms -> for each its units by layer, [T], None without codebook

    def layer(self, wanted=None, units=False):
        """The layer asked for; else the second that has a codebook, since phones are usually
        clearest there (6 of 12 in base), or the middle one of a baseline."""
        require(self.codebooks or not units, f"{self.name} has no codebooks, so it makes no units")
        first = self.layers - self.codebooks + 1  # that has a codebook
        usual = min(first + 1, self.layers) if self.codebooks else max(1, self.layers // 2)
        layer, lowest = wanted or usual, first if units else 1
        require(lowest <= layer <= self.layers, f"--layer {layer}: {self.name} has "
                f"{'units of ' if units else ''}layers {lowest} to {self.layers}")
        return layer


def spidr_encoder(name, net):
    c, device = net.config, net.mask_embedding.device

    def each(wavs, function):
        """The outputs of a padded batch, [layers, B, T, ...], cut to each waveform's own frames."""
        lengths = torch.tensor([len(wav) for wav in wavs], device=device)
        wav = nn.utils.rnn.pad_sequence(wavs, batch_first=True).to(device)  # [B, N]
        outputs = function(wav, lengths if len(lengths.unique()) > 1 else None)
        frames = num_frames(lengths, c).tolist()
        return [[output[b, :T] for output in outputs] for b, T in enumerate(frames)]

    def encode(wavs):  # the layers' outputs (2)
        return each(wavs, net.encode)

    def units(wavs):  # the codewords that the heads predict, as the labels are (3)
        return [[None] * (c.layers - c.codebooks) + found for found in each(wavs, net.units)]

    return Encoder(name, hash_weights(net), c.layers, c.codebooks, c.codewords, c.dim,
                   encode, units)


@torch.no_grad()
def extract(rows, compute, layers, longest=60):
    """Yields (fileid, outputs of the layers) of each recording, by an Encoder's encode or units:
    short recordings together, and what is over `longest` seconds alone and in windows."""
    for batch in by_length(rows, longest * data.SAMPLE_RATE):
        wavs, parts = [read_recording(row) for row in batch], []
        alone = len(batch) == 1
        for begin, end, keep in windows(len(wavs[0]), longest) if alone else [WHOLE]:
            found = compute([wav[begin:end] for wav in wavs])
            parts.append([[x[layer - 1][keep].cpu() for layer in layers] for x in found])
        for row, *windows_of_row in zip(batch, *parts):
            yield row.fileid, [torch.cat(output) for output in zip(*windows_of_row)]


# ======== ABX: the distance of two tokens ========

CHUNK = 1 << 25  # distances of frames held at a time
BATCH = 1 << 19  # numbers in a table of dtw's


class Tokens(NamedTuple):
    """Token n is frames[begin[n] : begin[n + 1]], prepared for the distance."""

    frames: torch.Tensor  # [F, .]
    begin: np.ndarray  # [tokens + 1]
    distance: str


def prepare(frames, distance):
    """What can be done once for each frame. [F, D] -> [F, .]"""
    if distance == "angular":  # A frame of zeros has no direction; as in fastabx it gets (1, ..., 1).
        norm = frames.norm(dim=1, keepdim=True)
        return torch.where(norm > 0, frames / norm, 1 / math.sqrt(frames.shape[1]))
    if distance == "kl":  # Centring log p changes no distance and keeps the sums precise.
        log_p = (frames + 1e-6).log()
        log_p = log_p - log_p.mean(1, keepdim=True)
        return torch.cat([frames, log_p, (frames * log_p).sum(1, keepdim=True)], 1)
    return frames


def frame_distances(x, y, distance):
    """Every frame of x against every frame of y, both prepared. -> [Fx, Fy]"""
    if distance == "angular":
        return (x @ y.T).clamp_(-1, 1).acos_().div_(math.pi)
    if distance == "euclidean":  # A matrix product would lose the small distances.
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    if distance == "kl":  # symmetric: the mean of KL(p|q) and KL(q|p)
        d = x.shape[1] // 2
        cross = x[:, :d] @ y[:, d:-1].T + x[:, d:-1] @ y[:, :d].T
        return (x[:, -1:] + y[:, -1] - cross) / 2
    return (x[:, :1] != y[:, 0]).float()  # identity: discrete units


def dtw(table, tx, ty):
    """Dynamic time warping: the mean distance of frames along the best path, for P pairs of tokens.

    table [Tx + 1, Ty + 1, P] holds at (i, j) the distance of x's i-th frame from y's j-th, counted
    from 1; row 0 and column 0 are free. It turns into the cost of the best path from (1, 1) to
    (i, j). Pair p has tx[p] and ty[p] frames; what lies beyond them has no influence. -> [P]
    """
    height, width, pairs = table.shape
    table[0], table[:, 0] = np.inf, np.inf
    table[0, 0] = 0
    cost = table.reshape(-1, pairs)  # Cell (i, j) is row i * width + j.
    diagonal, left, up = width + 1, 1, width  # so many rows before a cell are its predecessors
    for k in range(2, height + width - 1):  # The cells with i + j = k depend on earlier k only.
        first, last = max(1, k - width + 1), min(k - 1, height - 1)  # their i
        start, stop = first * width + k - first, last * width + k - last + 1
        before = [cost[start - step : stop - step : width - 1] for step in (diagonal, left, up)]
        best = np.minimum(before[0], before[1])
        cost[start : stop : width - 1] += np.minimum(best, before[2], out=best)

    # The path is walked back to count its cells. Among equal costs it prefers the diagonal,
    # then the step along y (left). Pairs that have arrived at (0, 0) stay before the table.
    cost, steps = cost.reshape(-1), np.array([diagonal, left, up]) * pairs
    end = at = (tx * width + ty) * pairs + np.arange(pairs)
    length = np.zeros(pairs, np.float32)
    while (on_path := at >= pairs).any():
        length += on_path
        to_diagonal, to_left, to_up = (cost.take(at - step, mode="clip") for step in steps)
        straight = np.where(to_left <= to_up, steps[1], steps[2])
        at = at - np.where(to_diagonal <= np.minimum(to_left, to_up), steps[0], straight)
    return cost[end] / length


def block_distances(blocks, tokens):
    """For each block (unit, x, y): the distance [X, Y] of every token of x from every one of y.

    The frames of a block are compared in one go. Then the pairs of all blocks are sorted by length
    and aligned in batches, in which every pair is padded to the longest.
    """
    flat, pairs, size = [], [], 0
    for _, x, y in blocks:
        at_x, at_y = (tokens.begin[part.start : part.stop + 1] for part in (x, y))
        found = frame_distances(tokens.frames[at_x[0] : at_x[-1]],
                                tokens.frames[at_y[0] : at_y[-1]], tokens.distance)
        # Frames i of x and j of y, from 0, are flat[start + i * step + j] apart.
        step = found.shape[1]
        start = size + (at_x[:-1] - at_x[0])[:, None] * step + (at_y[:-1] - at_y[0])
        four = np.broadcast_arrays(start, step, np.diff(at_x)[:, None], np.diff(at_y))
        pairs.append(np.stack([one.reshape(-1) for one in four]))
        flat.append(found.reshape(-1))
        size += found.numel()
    flat, pairs = torch.cat(flat).numpy(), np.concatenate(pairs, 1)

    result, done = np.empty(pairs.shape[1], np.float32), 0
    order = np.lexsort([pairs[3], pairs[2] // 4])[::-1]  # like lengths together, the longest first
    while done < len(order):
        room = BATCH // max(1, pairs[2:, order[done]].prod())
        batch = order[done : done + max(1, room)]
        start, step, tx, ty = pairs[:, batch]
        i, j = np.ogrid[-1 : tx.max(), -1 : ty.max()]  # -1 for the row and the column left free
        table = flat.take(start + i[..., None] * step + j[..., None], mode="clip")
        result[batch] = dtw(table, tx, ty)
        done += len(batch)
    ends = np.cumsum([len(x) * len(y) for _, x, y in blocks])
    return [d.reshape(len(x), -1) for (_, x, _), d in zip(blocks, np.split(result, ends[:-1]))]


def chunks(blocks, begin):
    """Lists of blocks with about CHUNK distances of frames, which bounds the memory."""
    chunk, size = [], 0
    for block in blocks:
        _, x, y = block
        chunk.append(block)
        size += (begin[x.stop] - begin[x.start]) * (begin[y.stop] - begin[y.start])
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


# ======== ABX: triples and cells ========


def abx_units(runs, speaker, max_x_across, random):
    """Yields what is scored together: the X of one phone and speaker against a run with A and B.

    A run {phone: range of tokens} holds the tokens of one speaker in one context; runs is
    {(context, speaker): run}. -> (phone, speaker of A and B, range of X, run)
    """
    speakers = defaultdict(list)  # {(context, phone): those who say it}
    for (context, who), run in runs.items():
        for phone in run:
            speakers[context, phone].append(who)
    for (context, who), run in runs.items():
        if len(run) < 2:  # no B
            continue
        for phone, tokens in run.items():
            if speaker == "within" and len(tokens) > 1:  # A and X are two tokens of this range
                yield phone, who, tokens, run
            if speaker == "across":
                others = [other for other in speakers[context, phone] if other != who]
                if max_x_across is not None:
                    others = random.permutation(others)[:max_x_across]
                for other in others:
                    yield phone, who, runs[context, other][phone], run


def abx_blocks(units, begin):
    """Cuts the units by X, so that a block has about CHUNK distances of frames at most."""
    for unit in units:
        _, _, x, run = unit
        parts = [*run.values()]
        y = range(parts[0].start, parts[-1].stop)
        longest = np.diff(begin[x.start : x.stop + 1]).max()
        some = max(1, int(CHUNK // (longest * (begin[y.stop] - begin[y.start]))))
        for start in range(x.start, x.stop, some):
            yield unit, x[start - x.start : start - x.start + some], y


def errors(d, x, y, a):
    """For each token B of y: how many of its triples with X of x and A of the range a are wrong.

    d [X, Y] are the distances. A triple is wrong if d(A, X) > d(B, X), and half wrong on a tie.
    """
    d[np.array(x)[:, None] == np.array(y)] = -np.inf  # X itself is no A: this can't be wrong
    wrong = np.zeros(len(y))
    for to_a, to_b in zip(d[:, a.start - y.start : a.stop - y.start, None], d):  # for each X
        wrong += (to_a > to_b).sum(0) + (to_a == to_b).sum(0) / 2  # (13)
    return wrong


def abx_runs(items, context, max_size_group, random):
    """-> the items' numbers, sorted, and {(context, speaker): {phone: range of places in them}}"""
    keys = [(item.context if context == "within" else "", item.speaker, item.phone)
            for item in items]
    order = range(len(items)) if max_size_group is None else random.permutation(len(items))
    kept, runs = [], defaultdict(dict)
    for key, some in itertools.groupby(sorted(order, key=keys.__getitem__), keys.__getitem__):
        some = list(some)[:max_size_group]  # as in fastabx, the same ones in every cell and role
        runs[key[:2]][key[2]] = range(len(kept), len(kept) + len(some))
        kept += some
    return kept, runs


def abx_cells(runs, tokens, speaker, max_x_across, random):
    """-> {(A, B, speaker of A and B): shares of wrong triples in each cell}, number of triples

    A cell is all triples of one A, one B, one speaker, one context and one speaker of X.
    """
    units = abx_units(runs, speaker, max_x_across, random)
    found = (pair for chunk in chunks(abx_blocks(units, tokens.begin), tokens.begin)
             for pair in zip(chunk, block_distances(chunk, tokens)))
    cells, triples = defaultdict(list), 0
    for (phone, who, x, run), parts in itertools.groupby(found, lambda pair: pair[0][0]):
        a, first = run[phone], min(part.start for part in run.values())
        wrong = sum(errors(d, some, y, a) for (_, some, y), d in parts)
        for phone_b, b in run.items():
            if phone_b != phone:
                size = len(x) * (len(a) - (x == a)) * len(b)
                share = wrong[b.start - first : b.stop - first].sum() / size
                cells[phone, phone_b, who].append(share)
                triples += size
    return cells, triples


def abx_details(features, item_file, speaker="within", context="within", distance="angular",
                max_size_group=None, max_x_across=None, seed=0, frame_rate=RATE):
    """abx() and what is worth knowing beside the error, as a dict."""
    distances = ("angular", "euclidean", "kl", "identity")
    for name, value, allowed in (("speaker", speaker, ("within", "across")),
                                 ("context", context, ("within", "any")),
                                 ("distance", distance, distances)):
        require(value in allowed, f"abx: {name} is {' or '.join(allowed)}, not {value!r}")
    random = np.random.default_rng(seed)
    items, frames, note = abx_tokens(features, read_items(item_file, frame_rate), item_file)
    order, runs = abx_runs(items, context, max_size_group, random)
    begin = np.cumsum([0] + [len(frames[n]) for n in order])
    tokens = Tokens(prepare(torch.cat([frames[n] for n in order]), distance), begin, distance)
    cells, triples = abx_cells(runs, tokens, speaker, max_x_across, random)
    speakers, phones = ({getattr(item, name) for item in items} for name in ("speaker", "phone"))
    require(cells, f"{item_file}: no cell for ABX {speaker} speaker, {context} context: no A, B "
            f"and X among {len(items)} items of {len(speakers)} speaker(s), {len(phones)} phone(s)")
    # The mean over contexts and speakers of X, then over speakers, then over pairs (A, B).
    # Where the context does not count, speakers and speakers of X are one mean.
    pairs = defaultdict(list)
    for (a, b, _), shares in cells.items():
        pairs[a, b] += [fmean(shares)] if context == "within" else shares
    error = fmean(fmean(shares) for shares in pairs.values())
    return dict(error=100 * error, speaker=speaker, context=context, distance=distance,
                items=len(items), cells=sum(map(len, cells.values())), triples=triples,
                frame_rate=frame_rate, max_size_group=max_size_group, max_x_across=max_x_across,
                seed=seed, note=note)


def abx(features, item_file, speaker="within", context="within", **options):
    """The ABX error in percent. features {file: [T, D] at 50 Hz}; options as of abx_details.

    ZeroSpeech 2021 keeps max_size_group=10 tokens of a phone in a cell and max_x_across=5 speakers
    of X; here nothing is left out unless asked for.
    """
    details = abx_details(features, item_file, speaker, context, **options)
    if details["note"]:
        print(f"abx: {details['note']}", file=sys.stderr)
    return details["error"]


# ======== unit quality ========


def quality(units, phones, codewords=None):
    """How well units, {file: [unit, ...]} at 50 Hz, stand for phones, {file: [phone, ...]} at
    100 Hz. `codewords` is V; without it the bitrate takes the number of units that occur."""
    files = sorted(units.keys() & phones.keys())
    require(files, "quality: no file has both units and phones")
    number = {phone: i for i, phone in enumerate(sorted({p for f in files for p in phones[f]}))}
    tracks = {f: (np.array(units[f]), np.array([number[p] for p in phones[f]])) for f in files}
    table = count_pairs(tracks, len(number))  # [phones, units]
    likely = np.argsort(-table.sum(1), kind="stable")  # phones, the most frequent first
    phone_of = likely[table[likely].argmax(0)]  # each unit's phone; of equals the more frequent
    frames = sum(len(sequence) for sequence, _ in tracks.values())
    kept = sum(len(dedupe(sequence)) for sequence, _ in tracks.values())
    found = information(table)
    found["bitrate"] = math.log2(codewords or found["active"]) * kept / (frames / RATE)
    found["per"] = phone_error_rate(tracks, phone_of)
    return found | boundaries(tracks, phone_of)


def count_pairs(tracks, phones):
    """[phones, units]: how often they coincide, at 100 Hz, up to the end of the shorter one."""
    table = np.zeros((phones, 1 + max(units.max() for units, _ in tracks.values())))
    for file, (units, labels) in tracks.items():
        # A recording is up to 3 phones longer than its units.
        require(abs(2 * len(units) - len(labels)) <= data.ALIGNMENT_SLACK + 3,
                f"{file}: {len(units)} units at 50 Hz, but {len(labels)} phones at 100 Hz: not of "
                "the same audio")
        both = min(2 * len(units), len(labels))
        np.add.at(table, (labels[:both], units.repeat(2)[:both]), 1)
    return table


def information(table):
    """(14) PNMI = I(phone; unit) / H(phone), and what else the counts tell."""
    joint = table / table.sum()  # p(phone, unit)

    def entropy(p):  # in bits
        return float(-(p[p > 0] * np.log2(p[p > 0])).sum())

    h_phone, h_unit = entropy(joint.sum(1)), entropy(joint.sum(0))
    return dict(pnmi=(h_phone + h_unit - entropy(joint)) / h_phone if h_phone > 0 else 0.0,
                phone_purity=float(joint.max(0).sum()), cluster_purity=float(joint.max(1).sum()),
                perplexity=2**h_unit, active=int((joint.sum(0) > 0).sum()))


def phone_error_rate(tracks, phone_of):
    """(14) Edits that turn the units' phones into the true ones, over the number of these."""
    heard = [dedupe(phone_of[units]) for units, _ in tracks.values()]
    said = [dedupe(labels) for _, labels in tracks.values()]
    return sum(map(edit_distance, heard, said)) / sum(map(len, said))


def edit_distance(x, y):
    """How many insertions, deletions and substitutions make y of x."""
    steps = np.arange(len(y) + 1, dtype=np.int32)
    row = steps  # from nothing to the first j labels of y
    for label in x:
        longer = row + 1  # x's label is deleted,
        longer[1:] = np.minimum(longer[1:], row[:-1] + (y != label))  # or it is y's, or made so,
        row = np.minimum.accumulate(longer - steps) + steps  # or labels of y are inserted
    return int(row[-1])


def boundaries(tracks, phone_of, tolerance=2):
    """(14) F1 and R-value of where labels change, in steps of 10 ms: a true boundary is found if a
    predicted one lies within 20 ms of it, and no nearer to its neighbours."""
    found = true = predicted = 0
    for units, labels in tracks.values():
        said = np.flatnonzero(np.diff(labels)) + 1
        heard = 2 * (np.flatnonzero(np.diff(phone_of[units])) + 1)
        middles = np.array([-math.inf, *(said[1:] + said[:-1]) / 2, math.inf])
        begin = np.searchsorted(heard, np.maximum(said - tolerance, middles[:-1]), "left")
        end = np.searchsorted(heard, np.minimum(said + tolerance, middles[1:]), "right")
        found += int((end > begin).sum())
        true += len(said)
        predicted += len(heard)
    recall, excess = found / max(true, 1), predicted / max(true, 1) - 1
    r1, r2 = math.hypot(1 - recall, excess), abs(recall - excess - 1) / math.sqrt(2)
    return dict(f1=2 * found / max(true + predicted, 1), r_value=1 - (r1 + r2) / 2)


# ======== the language model on units ========


def dedupe(labels):
    """An array of the labels without repetitions."""
    labels = np.asarray(labels)
    return labels[np.diff(labels, prepend=-1) != 0]


class LMBlock(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):  # [B, T, D]
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.proj(y.transpose(1, 2).reshape(B, T, D)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class UnitLM(nn.Module):
    """A causal, pre-norm Transformer over units without repetitions. Token V is the boundary that
    stands before and after an utterance."""

    def __init__(self, codewords, layers, dim, heads, context, dropout=0.0):
        super().__init__()
        self.boundary, self.context = codewords, context
        self.units = {}  # the header of the units that it was trained on
        self.embedding = nn.Embedding(codewords + 1, dim)
        self.position = nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*(LMBlock(dim, heads, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, codewords + 1, bias=False)
        for weight in (p for p in self.parameters() if p.ndim == 2):
            nn.init.normal_(weight, std=0.02)
        for block in self.blocks:  # what adds up along the residual stream starts smaller: GPT-2
            block.proj.weight.data /= math.sqrt(2 * layers)
            block.down.weight.data /= math.sqrt(2 * layers)

    def forward(self, tokens):
        """[B, T + 1] tokens -> [B, T]: -log p of each token but the first, given those before it.
        Padding is -1 and gets 0. It is on the right, where causal attention does not look."""
        seen, following = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
        x = self.embedding(seen) + self.position.weight[: seen.shape[1]]  # [B, T, D]
        logits = self.head(self.norm(self.blocks(x))).float().transpose(1, 2)  # [B, V + 1, T]
        return F.cross_entropy(logits, following, ignore_index=-1, reduction="none")


@torch.no_grad()
def log_likelihood(lm, units):
    """The sum of log p(unit | boundary, units before it), and the number of units.

    Neither boundary counts: the first is given, and for a word that stands alone the last is out
    of place. What is longer than the context goes in windows that overlap by half, so that each
    unit sees half a context or more.
    """
    tokens = np.append(lm.boundary, dedupe(units))
    tokens = torch.from_numpy(tokens).long().to(lm.head.weight.device)
    step, total = (lm.context + 1) // 2, 0.0
    for i in range(0, max(1, len(tokens) - 1 - lm.context + step), step):
        known = lm.context - step if i else 0  # the window before has scored them
        losses = lm(tokens[None, i : i + lm.context + 1])[0]
        total -= losses[known:].double().sum().item()
    return total, len(tokens) - 1


def score_units(lm, units):
    """The score of an utterance: its log-likelihood over its length, without repetitions."""
    total, length = log_likelihood(lm.eval(), units)
    return total / length


# ======== pairs: sWUGGY, sBLIMP, tSC ========


class Side(NamedTuple):
    """One side of a pair, spoken by one voice."""

    id: str
    voice: str
    correct: bool
    file: str
    groups: list  # what it counts in, such as "all" and "in vocabulary"
    where: str  # "gold.csv:line", for messages


def pair_accuracy(sides, scores):
    """{pair: how often its right side has the higher score}, ties by half, a mean over the pair's
    voices, so that a pair of many voices counts no more than another. scores {file: score}"""
    found, wins = defaultdict(lambda: ([], [])), defaultdict(list)
    for side in sides:
        found[side.id, side.voice][side.correct].append(side)
    for (id, voice), (wrong, right) in found.items():
        require(wrong and right, f"{(wrong + right)[0].where}: this side of pair {id} {voice} "
                "has no other side")
        margins = [scores[r.file] - scores[w.file] for r in right for w in wrong]
        wins[id].append(np.mean([(margin > 0) + (margin == 0) / 2 for margin in margins]))
    return {id: float(np.mean(voices)) for id, voices in wins.items()}


def accuracies(sides, scores):
    """{group: its accuracy in percent, its number of pairs}"""
    found = {}
    for group in sorted({group for side in sides for group in side.groups}):
        pairs = pair_accuracy([side for side in sides if group in side.groups], scores).values()
        found[group] = dict(accuracy=100 * float(np.mean(list(pairs))), pairs=len(pairs))
    return found


# ======== plumbing: skip at first reading ========
# ======== loading encoders, reading recordings ========

BASELINES = ("mfcc", "wav2vec2_base", "hubert_base", "wavlm_base")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_encoder(name, device=DEVICE):
    name = str(name)
    if name == "mfcc":
        return Encoder(name, "", 1, 0, 0, 39, mfcc)
    if name in BASELINES:
        return baseline(name, device)
    require(Path(name).exists(), f"{name}: no such run or checkpoint, nor a baseline "
            f"({', '.join(BASELINES)})")
    return spidr_encoder(name, spidr.load(name, device))


def hash_weights(net):
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def mfcc(wavs):
    """13 coefficients with their first and second differences, [T, 39], of 25 ms windows that are
    centred as our frames are."""
    torchaudio, pad = data.import_torchaudio("mfcc"), (FIELD - HOP) // 2
    mel = dict(n_fft=FIELD, hop_length=HOP, n_mels=40, center=False)
    transform = torchaudio.transforms.MFCC(data.SAMPLE_RATE, 13, log_mels=True, melkwargs=mel)
    deltas = torchaudio.functional.compute_deltas
    found = [transform(F.pad(wav, (pad, pad))) for wav in wavs]  # [13, T]
    return [[torch.cat([c, deltas(c), deltas(deltas(c))]).T.contiguous()] for c in found]


def baseline(name, device, pretrained=True):
    """One of torchaudio's. pretrained=False: random weights, without a download."""
    torchaudio = data.import_torchaudio(name)
    pipeline = getattr(torchaudio.pipelines, name.upper())
    make = pipeline.get_model if pretrained else getattr(torchaudio.models, name)
    try:
        net = make().eval().to(device)
    except OSError as error:  # no network, no room
        raise InputError(f"{name}: its weights could not be downloaded: {error}") from None

    def encode(wavs):  # one at a time: their group norm would count padding
        return [[x[0] for x in net.extract_features(wav[None].to(device))[0]] for wav in wavs]

    return Encoder(name, hash_weights(net), 12, 0, 0, 768, encode)


def read_recording(row):
    try:
        wav = data.standardise(data.read_audio(row.path))
    except InputError as error:
        raise InputError(f"{row.where or row.path}: {error}") from None
    require(len(wav) >= FIELD, f"{row.path}: {len(wav)} samples are too short for a frame")
    return wav


def by_length(rows, samples):
    """Yields lists of recordings of like length, of about so many samples; a recording of more is
    alone, since it makes the number of its batch a new one."""
    check_unique(rows)
    rows = sorted(rows, key=lambda row: row.num_samples)
    number = np.cumsum([row.num_samples for row in rows]) // samples
    bar = tqdm(zip(number, rows), "audio", len(rows), unit="file", leave=False, disable=None)
    for _, batch in itertools.groupby(bar, key=lambda pair: pair[0]):
        yield [row for _, row in batch]


WHOLE = (0, None, slice(None))  # a window without ends


def windows(samples, longest):
    """[(first sample, end sample, frames to keep)]. A recording of over `longest` seconds goes in
    windows that overlap, of which the middle two thirds are kept: attention over an hour does not
    fit, and the network has never seen one."""
    if samples <= longest * data.SAMPLE_RATE:
        return [WHOLE]
    frames, context, found = (samples - FIELD) // HOP + 1, longest * RATE // 6, []
    for first in range(0, frames, 4 * context):
        begin, end = max(0, first - context), min(first + 5 * context, frames)
        keep = slice(first - begin, first - begin + 4 * context)
        found.append((begin * HOP, (end - 1) * HOP + FIELD, keep))
    return found


def check_unique(rows):
    for fileid, count in Counter(row.fileid for row in rows).items():
        require(count == 1, f"{fileid!r} names {count} recordings: give the manifest a column "
                "fileid in which all are different")


# ======== ABX: items and their frames ========



class Item(NamedTuple):
    file: str
    first: int  # its first frame
    end: int  # the frame after its last
    phone: str
    context: str
    speaker: str


def read_items(path, frame_rate=RATE):
    """The items of an item file. Frame i is one's if onset <= (i + 1/2) / frame_rate <= offset.

    In decimals: an onset such as 0.29 would fall on the wrong side of a frame in floating point.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file") from None
    columns = ["#file", "onset", "offset", "#phone", "prev-phone", "next-phone", "speaker"]
    names, items = lines[0].split() if lines else [], []
    missing = [name for name in columns if name not in names]
    require(not missing, f"{path}:1: an item file begins with {' '.join(columns)}")
    at = [names.index(name) for name in columns]
    for number, line in enumerate(lines[1:], 2):
        values = line.split()
        if not values:
            continue
        try:
            file, onset, offset, phone, before, after, speaker = (values[i] for i in at)
            first = math.ceil(Decimal(onset) * frame_rate - Decimal("0.5"))
            end = math.floor(Decimal(offset) * frame_rate - Decimal("0.5")) + 1
        except (IndexError, ArithmeticError, ValueError):
            raise InputError(f"{path}:{number}: not an item: {line[:80]!r}") from None
        items.append(Item(file, max(first, 0), end, phone, f"{before} {after}", speaker))
    return items


def abx_tokens(features, items, item_file):
    """-> the items that can be used, the frames [T, D] of each, and a line on the others."""
    checked, used, frames, lost = {}, [], [], Counter()
    for item in items:
        if item.file not in features:
            lost["left out, no features of their files"] += 1
            continue
        if item.file not in checked:
            feature = torch.as_tensor(features[item.file]).float().cpu()
            good = feature.ndim <= 2 and bool(feature.isfinite().all())
            require(good, f"{item.file}: features must be finite and [T, D]")
            checked[item.file] = feature if feature.ndim == 2 else feature[:, None]
        found = checked[item.file][item.first : item.end]
        if len(found) == 0:
            lost["left out, no frame lies within them"] += 1
            continue
        lost["cut short at the end of their features"] += len(found) < item.end - item.first
        used.append(item)
        frames.append(found)
    note = "; ".join(f"{n} of {len(items)} items {why}" for why, n in lost.items() if n)
    require(used, f"{item_file}: none of its {len(items)} items can be used: {note}")
    return used, frames, note


# ======== the verbs features, units, abx, quality ========


def describe(encoder, layer):
    return dict(model=encoder.name, hash=encoder.hash, layer=layer, frame_rate=RATE)


def write_json(path, record):
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def write_features(args):
    rows, out = data.read_manifest(args.audio), Path(args.out)
    for row in rows:
        data.file_name(row.fileid, row.where)
    require(not (out / "meta.json").exists(),
            f"{out} holds features already: name another folder, or remove it")
    encoder = load_encoder(args.model)
    layer = encoder.layer(args.layer)
    out.mkdir(exist_ok=True)
    write_json(out / "meta.json", describe(encoder, layer))
    for fileid, (frames,) in extract(rows, encoder.encode, [layer], args.longest):
        path = out / f"{fileid}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, frames.numpy())
    print(f"{len(rows)} files, layer {layer} of {encoder.name}, {RATE} Hz: {out}")


def read_features(folder, files):
    """A folder of .npy or .pt -> {file: [T, D]} of the wanted files that are there, meta.json."""
    require(Path(folder).is_dir(), f"{folder}: no such folder of features")
    features, path = {}, Path(folder, "meta.json")
    for file in files:
        data.file_name(file, folder)
    try:
        meta = json.loads(path.read_text()) if path.exists() else {}
        for file in files:
            path = Path(folder, f"{file}.npy")
            if path.exists():
                features[file] = torch.from_numpy(np.load(path))
            elif (path := Path(folder, f"{file}.pt")).exists():
                features[file] = torch.load(path, weights_only=True, map_location="cpu").detach()
    except Exception as error:  # of many kinds, some of many lines
        why = type(error).__name__
        raise InputError(f"{path}: damaged, or no array of features ({why})") from None
    return features, meta


def write_units(args):
    out = Path(args.out)
    require(not out.exists(), f"{out} is there already: name another file, or remove it")
    rows, encoder = data.read_manifest(args.audio), load_encoder(args.model)
    layer = encoder.layer(args.layer, units=True)
    with open(f"{out}.part", "w", encoding="utf-8") as file:
        header = describe(encoder, layer) | dict(codewords=encoder.codewords)
        file.write(json.dumps(header) + "\n")
        for fileid, (units,) in extract(rows, encoder.units, [layer], args.longest):
            file.write(json.dumps(dict(fileid=fileid, units=units.tolist())) + "\n")
    os.replace(f"{out}.part", out)
    print(f"{len(rows)} files, units of layer {layer} of {encoder.name}, {RATE} Hz: {out}")


def read_units(path, like=None):
    """-> header, {file: units [T]}. The header must be as another one is, but for the name of the
    model, since a model may have several."""
    units, names = {}, ("model", "hash", "layer", "frame_rate", "codewords")
    try:
        with open(path, encoding="utf-8") as file:
            header = json.loads(file.readline())
            found = [(name, header[name]) for name in names]
            for record in map(json.loads, file):
                units[record["fileid"]] = np.array(record["units"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file that 'evaluate.py units' wrote: {error}") from None
    for name, value in found[1:]:
        wanted = (like or {"frame_rate": RATE}).get(name, value)
        require(value == wanted, f"{path}: {name} is {value!r}, wanted is {wanted!r}")
    require(units, f"{path}: no units")
    for file, x in units.items():
        fits = x.ndim == 1 and len(x) and x.dtype == int and 0 <= x.min() <= x.max()
        require(fits and x.max() < header["codewords"],
                f"{path}: {file}: not a list of units from 0 to {header['codewords'] - 1}")
    return header, {file: x.astype(np.int32) for file, x in units.items()}


def abx_by_layer(args):
    """Yields (layer, features of the items' files), in several passes over the audio where all
    layers together would take more than 4 GB."""
    files = {item.file for item in read_items(args.items)}
    if args.features:
        features, meta = read_features(args.features, files)
        rate = meta.get("frame_rate", RATE)
        require(rate == RATE, f"{args.features}: features at {rate} Hz")
        yield meta.get("layer", "-"), features
        return
    rows, encoder = data.read_manifest(args.audio, only=files), load_encoder(args.model)
    require(rows, f"{args.audio}: none of the {len(files)} files of {args.items}")
    layers = range(1, encoder.layers + 1)
    if args.layer != "all":
        layers = [encoder.layer(args.layer)]
    at_once = max(1, int(4e9 * HOP / (4 * encoder.dim * sum(row.num_samples for row in rows))))
    for some in (layers[i : i + at_once] for i in range(0, len(layers), at_once)):
        found = dict(extract(rows, encoder.encode, some, args.longest))
        for n, layer in enumerate(some):
            yield layer, {file: outputs[n] for file, outputs in found.items()}


def run_abx(args):
    require(bool(args.features) != bool(args.model and args.audio),
            "abx takes --features, or --model and --audio")
    speakers, records = ["within", "across"] if args.speaker == "both" else [args.speaker], []
    for layer, features in abx_by_layer(args):
        found = [abx_details(features, args.items, speaker, args.context, args.distance,
                             args.max_size_group, args.max_x_across, args.seed)
                 for speaker in speakers]
        if not records:
            print("layer" + "".join(f"{speaker:>10}" for speaker in speakers) + "    ABX error, %")
        print(f"{layer:>5}" + "".join(f"{one['error']:10.2f}" for one in found), flush=True)
        records += [dict(layer=layer) | one for one in found]
    for one in found:
        print(*(f"{name} {value}" for name, value in one.items() if name not in ("error", "note")),
              sep=", ")
    if found[0]["note"]:
        print(f"note: {found[0]['note']}", file=sys.stderr)
    if args.out:
        write_json(args.out, records)


def read_phones(path):
    return {file: phones for file, (phones, _) in data.read_alignments(path).items()}


def run_quality(args):
    (header, units), phones = read_units(args.units), read_phones(args.alignments)
    found = quality(units, phones, header["codewords"])
    print(f"units of layer {header['layer']} of {header['model']}, "
          f"{len(units.keys() & phones.keys())} files")
    notes = {"bitrate": " bit/s", "active": f" of {header['codewords']}"}
    for name, value in found.items():
        print(f"{name:>15} {value:10.3f}{notes.get(name, '')}")
    if args.out:
        write_json(args.out, header | found)


# ======== training the language model ========


@dataclass
class LMOptions(RunOptions):
    """The language model's."""

    out: str = option("runs/lm", "the run's folder")
    units: str = option("", "the file of units to learn from, as 'units' writes it")
    valid: str = option("", "another, to report the loss on")
    layers: int = option(12, "of the Transformer")
    dim: int = option(768, "its width")
    heads: int = option(12, "of attention")
    context: int = option(2048, "units of the longest crop, and the most that a score looks back")
    dropout: float = option(0.1, "of what each block adds")
    steps: int = option(25_000, "optimizer steps")
    batch_tokens: int = option(65_536, "most tokens in a micro-batch, with padding")
    lr: float = option(6e-4, "peak learning rate")
    lr_floor: float = option(0.1, "part of the peak where warm-up starts and decay ends")
    warmup_steps: int = option(1_000, "linear warm-up")
    hold_steps: int = option(0, "at the peak")
    decay_steps: int = option(24_000, "exponential decay")
    eps: float = option(1e-8, "AdamW's")
    weight_decay: float = option(0.1, "AdamW's, on everything")
    clip: float = option(1.0, "largest norm of the gradient")
    log_every: int = option(50, "steps between records in metrics.jsonl")
    save_every: int = option(500, "steps between checkpoints (last.pt)")
    keep_every: int = option(0, "steps between checkpoints that are kept (step_N.pt)")


LM_PRESETS = {"opt125m": {}, "tiny": dict(
    layers=2, dim=128, heads=4, context=128, steps=2_000, batch_tokens=1_024, lr=3e-3,
    warmup_steps=200, decay_steps=1_800, log_every=100, save_every=500)}


def lm_batch(sequences, boundary, o, number):
    """Micro-batch `number`, a function of (seed, number): [B, T + 1], padded with -1. One of the
    sequences, which are sorted by length, and those after it, as many as fit, each between two
    boundaries; what is longer than the context is cropped."""
    rng, rows = np.random.default_rng([o.seed, number]), []
    for units in sequences[rng.integers(len(sequences)) :]:
        length = min(len(units) + 1, o.context)
        if rows and (len(rows) + 1) * length > o.batch_tokens:
            break
        start = rng.integers(len(units) + 2 - length)
        crop = np.append(units, boundary)[start : start + length]
        rows.append(torch.from_numpy(np.append(boundary, crop)))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def lm_step(lm, optimizer, micro_batches, lr, o, place):
    """One optimizer step. The loss is a mean over the tokens of all ranks and micro-batches."""
    optimizer.zero_grad()
    sums = torch.zeros(2, device=place.device)  # loss, tokens
    for tokens in micro_batches:
        with autocast(o, place):
            loss = lm(tokens.to(place.device)).sum()
        loss.backward()
        sums += torch.stack([loss.detach(), (tokens[:, 1:] >= 0).sum().to(loss)])
    gradients = [p.grad for p in trained(optimizer)]
    all_sum([*gradients, sums])
    loss, count = sums
    return move(optimizer, gradients, count, lr, o) | {"loss": loss / count}


def mean_loss(lm, sequences, place):
    """The mean of -log p(unit) over a validation set, of which each rank takes its share."""
    found = [log_likelihood(lm.eval(), x) for x in sequences[place.rank :: place.world]]
    sums = torch.tensor(found).view(-1, 2).sum(0).to(place.device, torch.float32)
    total, count = all_sum([sums])[0]
    return -total / count


def train_lm(arguments):
    # ======== options, setup ========
    o, _ = parse_options(LMOptions, LM_PRESETS, argv=arguments)
    require(o.units, "lm needs --units, a file that 'evaluate.py units' writes")
    for name in "steps layers dim heads context accumulate log_every save_every lr clip".split():
        require(getattr(o, name) > 0, f"--{name.replace('_', '-')} {getattr(o, name)}: positive")
    require(o.dim % o.heads == 0 and 0 <= o.dropout < 1, "dim is a multiple of heads, dropout < 1")
    place = setup(o)
    torch.manual_seed(o.seed)

    # ======== data, model, optimizer ========
    header, units = read_units(o.units)
    sequences = sorted(map(dedupe, units.values()), key=len)
    valid = list(read_units(o.valid, like=header)[1].values()) if o.valid else []
    sizes = dict(codewords=header["codewords"], layers=o.layers, dim=o.dim, heads=o.heads,
                 context=o.context)
    lm = UnitLM(**sizes, dropout=o.dropout).to(place.device)
    optimizer = make_optimizer(lm, o)

    # ======== resume ========
    about = header | dict(utterances=len(units), tokens=sum(map(len, sequences)))
    checkpoint = open_run(o, about, lm, place)
    first, totals = resume(checkpoint, lm, optimizer)
    if first >= o.steps:
        return finished(o, place)
    log, stop = Log(o, place, o.steps, first, totals), Stop(place)

    # ======== loop ========
    for step in range(first, o.steps):
        seed_step(o.seed, step, place.rank)
        done = step + 1
        micro_batches = [lm_batch(sequences, lm.boundary, o, i * place.world + place.rank)
                         for i in range(step * o.accumulate, done * o.accumulate)]
        log.add(lm_step(lm.train(), optimizer, micro_batches, lr_at(step, o), o, place))
        stopping = stop.agreed(done)
        saving = stopping or done % o.save_every == 0 or is_kept(done, o)
        if saving and valid:
            log.add({"valid_loss": mean_loss(lm, valid, place)})
        if saving or done % o.log_every == 0:
            log.write(done)
        if saving:
            save_checkpoint(o, place, lm.state_dict(), optimizer, done, log, lm=sizes, units=header)
        if stopping and done < o.steps:
            leave(place, done)
    if place.first:
        print(f"{o.out}: {o.steps} steps on {len(units)} utterances, {about['tokens']} units "
              f"without repetitions; loss {log.record['loss']:.3f}")
        print(f"next: python evaluate.py swuggy --lm {o.out} --model {header['model']} --data DIR")


def load_lm(path, device=DEVICE):
    path, checkpoint = spidr.read_checkpoint(path)
    require("lm" in checkpoint and "units" in checkpoint,
            f"{path}: not a language model; 'evaluate.py lm' trains one")
    lm = spidr.load_state(UnitLM(**checkpoint["lm"]), checkpoint["model"], path)
    lm.units = checkpoint["units"]
    return lm.eval().to(device)


# ======== the verbs swuggy, sblimp, tsc ========

# The folder that a task has in ZeroSpeech, and the column of gold.csv that groups its pairs. A task
# without one has no gold.csv, but ID_correct.wav and ID_incorrect.wav.
TASKS = {"swuggy": ("lexical", "frequency"), "sblimp": ("syntactic", "type"), "tsc": ("tsc", None)}


def groups_of(column, text, where):
    """What a pair counts in: all, and its type, or ZeroSpeech's band of its word's frequency."""
    if column == "type":
        return ["all", f"type {text}"]
    try:
        count = 0.0 if text.strip().lower() == "oov" else float(text)
    except ValueError:
        count = -1.0
    require(0 <= count < math.inf, f"{where}: frequency is {text!r}, neither a number nor oov")
    bands = {"oov": 0, "1 to 5": 5, "6 to 20": 20, "21 to 100": 100, "above 100": math.inf}
    band = next(f"frequency {name}" for name, most in bands.items() if count <= most)
    return ["all", band, "in vocabulary"] if count else ["all", band]


def read_sides(folder, column):
    """The sides of a task's pairs."""
    if not column:
        ends = "_correct", "_incorrect"
        return [Side(path.stem.removesuffix(end), "", end == ends[0], path.stem, ["all"], path)
                for end in ends for path in sorted(folder.glob(f"*{end}.wav"))]
    sides, path = [], folder / "gold.csv"
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file, restval="")
        missing = {"id", "filename", "voice", "correct", column} - set(reader.fieldnames or [])
        require(not missing, f"{path}:1: the header has no column {', '.join(sorted(missing))}")
        for row in reader:
            where, name = f"{path}:{reader.line_num}", row["filename"].removesuffix(".wav")
            data.file_name(name, where)
            correct = row["correct"]
            require(correct in ("0", "1"), f"{where}: correct is {correct!r}, not 0 or 1")
            groups = groups_of(column, row[column], where)
            sides.append(Side(row["id"], row["voice"], correct == "1", name, groups, where))
    return sides


def units_of_sides(args, lm, folder, sides):
    """{file: units} of what the sides name, made as those that the language model learnt from."""
    wanted = {side.file: side.where for side in sides}
    if args.units:
        units = read_units(args.units, like=lm.units)[1]
        for name, where in wanted.items():
            require(name in units, f"{where}: {name}: not in {args.units}")
        return {name: units[name] for name in wanted}
    rows = []
    for name, where in wanted.items():
        path = str(folder / f"{name}.wav")
        samples, problem = data.inspect(path, FIELD)
        require(not problem, f"{where}: {path}: {problem}")
        rows.append(data.Row(name, path, samples, where=where))
    encoder = load_encoder(args.model)
    layer = encoder.layer(lm.units["layer"], units=True)
    require(encoder.hash == lm.units["hash"], f"--model {args.model}: other weights than those of "
            f"{lm.units['model']}, on whose units --lm {args.lm} was trained")
    return {name: x.numpy() for name, (x,) in extract(rows, encoder.units, [layer])}


def run_pairs(args):
    require(bool(args.model) != bool(args.units),
            f"{args.verb} takes --model, or --units of the wav files")
    task, column = TASKS[args.verb]
    folder = Path(args.data, "dev") if Path(args.data, "dev").is_dir() else Path(args.data)
    lm, sides = load_lm(args.lm), read_sides(folder, column)
    require(sides, f"{folder}: no pairs")
    pair_accuracy(sides, {side.file: 0 for side in sides})  # a missing side is told before the work
    units = units_of_sides(args, lm, folder, sides)
    scores = {name: score_units(lm, x) for name, x in units.items()}
    results = accuracies(sides, scores)
    print(f"{args.verb}, {args.lm}, units of layer {lm.units['layer']} of {lm.units['model']}")
    print(f"{'':20} accuracy, %   pairs")
    for group, found in results.items():
        print(f"{group:20} {found['accuracy']:11.2f} {found['pairs']:7}")
    if args.out:
        path = Path(args.out, task, "dev.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name} {scores[name]:.6f}\n" for name in sorted(scores)))
        write_json(Path(args.out, f"{args.verb}.json"),
                   dict(lm=args.lm, **lm.units, results=results))
    return results


# ======== the verb toy, and the report ========


def toy_abx(encoder, toy, layers):
    """[layers, 4]: ABX errors on the toy world, a few tokens a cell: the mean of the unseen
    languages within and across speakers, then a seen language within and across."""
    errors = []
    for language in [*data.TARGETS, data.EVAL_SOURCES[0]]:
        rows = data.read_manifest(toy / "eval" / f"{language}.csv")
        items = toy / "eval" / f"{language}.item"
        found = dict(extract(rows, encoder.encode, layers))
        errors.append([])
        for n in range(len(layers)):
            features = {file: outputs[n] for file, outputs in found.items()}
            errors[-1].append([abx(features, items, speaker, max_size_group=5, max_x_across=2)
                               for speaker in ("within", "across")])
    return np.hstack([np.mean(errors[:-1], 0), errors[-1]])


def toy_table(toy, encoders, layer=None, all_layers=False):
    """A line for each of {name: encoder}, at one layer that is fixed beforehand. -> {name: errors}
    as of toy_abx, of that layer or of all."""
    print(f"{'ABX error, %':24} layer  unseen: within  across    seen: within  across")
    errors = {}
    for name, encoder in encoders.items():
        one = encoder.layer(layer if encoder.codebooks else None)
        layers = list(range(1, encoder.layers + 1)) if all_layers else [one]
        errors[name] = toy_abx(encoder, toy, layers)
        shown = "{:16.2f} {:7.2f} {:15.2f} {:7.2f}".format(*errors[name][layers.index(one)])
        print(f"{name:24} {one:>5}{shown}", flush=True)
    return errors


def toy_encoders(runs):
    """MFCC, if torchaudio loads, and the runs {name: folder}."""
    encoders = {}
    try:
        data.import_torchaudio("the MFCC baseline")
        encoders["mfcc"] = load_encoder("mfcc")
    except InputError as error:
        print(error)
    return encoders | {name: load_encoder(folder) for name, folder in runs.items()}


def options_of(run):
    try:
        return json.loads(Path(run, "config.json").read_text())["options"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # not a run of ours


def run_toy(args):
    toy = options_of(args.runs[0]).get("toy")
    require(toy, f"{args.runs[0]}: not a run's folder with a config.json that names its toy world")
    data.toy(toy, ["eval"])
    toy_table(Path(toy), toy_encoders({path: path for path in args.runs}), args.layer)


def newest_runs(folder="runs"):
    """{"stage: folder": folder} of each stage's newest run on the toy world that has weights."""
    found = {}
    for path in sorted(Path(folder).glob("*/last.pt"), key=lambda path: path.stat().st_mtime):
        options = options_of(path.parent)
        if options.get("toy") and not options.get("manifest") and not options.get("audio"):
            stage = "meta" if "method" in options else "pretrain"
            found["adapt" if "budget" in options else stage] = path.parent
    require(found, f"{folder}: no run on the toy world; 'python pretrain.py' makes one")
    stages = [stage for stage in ("pretrain", "meta", "adapt") if stage in found]
    return {f"{stage}: {found[stage]}": found[stage] for stage in stages}


def report(out="runs"):
    """Without a verb: the newest run of each stage on the toy world. The first time it trains a
    language model too, on the units of the first of them."""
    began, runs = time.time(), newest_runs(out)
    name, path = next(iter(runs.items()))
    toy = data.toy(options_of(path)["toy"], ["eval", "lm"])
    torch.manual_seed(options_of(path)["seed"])
    fresh = spidr.SpidR(spidr.read_config(path / "config.json")).eval()
    encoders = {"untrained": spidr_encoder("untrained", fresh)} | toy_encoders(runs)
    errors = toy_table(toy, encoders, all_layers=True)

    language = data.LM_LANGUAGE
    print(f"\nunits, {language}")
    rows = data.read_manifest(toy / "eval" / f"{language}.csv")
    phones, found = read_phones(toy / "eval" / f"{language}_alignments.csv"), {}
    for encoder in (encoder for encoder in encoders.values() if encoder.codebooks):
        layer = encoder.layer(units=True)
        units = {file: x.numpy() for file, (x,) in extract(rows, encoder.units, [layer])}
        found[encoder.name] = quality(units, phones, encoder.codewords)
        shown = (f"{key} {x:.3g}" for key, x in found[encoder.name].items())
        print(f"{encoder.name:24} layer {layer}", *shown)

    layer, train = encoders[name].layer(units=True), str(toy / "lm" / "train.csv")
    units, lm = (f"{out}/{kind}_{encoders[name].hash}_{layer}" for kind in ("units", "lm"))
    units += ".jsonl"
    if not Path(units).exists():
        write_units(parse(["units", "--model", str(path), "--audio", train, "--layer", str(layer),
                           "--out", units]))
    train_lm(["--preset", "tiny", "--units", units, "--out", lm])
    pairs = {}
    for task, (folder, _) in TASKS.items():
        print()
        pairs[task] = run_pairs(parse([task, "--lm", lm, "--model", str(path),
                                       "--data", str(toy / "lm" / folder)]))
    draw_report(Path(out) / "report.svg", errors, runs)
    tables = {name: table.tolist() for name, table in errors.items()}
    write_json(Path(out) / "report.json", dict(abx=tables, quality=found, pairs=pairs))
    print(f"\n{out}/report.json, {out}/report.svg; {time.time() - began:.0f} s")


def draw_report(path, errors, runs):
    """ABX on unseen languages by layer, and three curves of each run's training."""
    deepest = max(map(len, errors.values()))
    lines = {name: list(enumerate(np.resize(table[:, 1], deepest), 1))  # MFCC: a level line
             for name, table in errors.items()}
    plots = [("unseen languages: ABX across, %, by layer", lines)]
    logs = {name: [json.loads(line) for line in open(run / "metrics.jsonl")
                   if step_of(line) < math.inf] for name, run in runs.items()}
    for key in ("loss", "target_ppl", "phone_accuracy"):
        lines = {name: [(r["step"], r[key]) for r in log if r.get(key) is not None]
                 for name, log in logs.items()}
        plots.append((f"{key}, by step", {name: line for name, line in lines.items() if line}))
    write_svg(path, [(title, lines) for title, lines in plots if lines])


def write_svg(path, plots, ticks=None):
    """Plots [(title, {name: [(x, y)]})] side by side. ticks {x: text} stand below the axis; without
    them its two ends do."""
    palette = ("#888", "#c93", "#36c", "#393", "#a3a", "#c33")
    colours, shapes = {}, ['<rect width="100%" height="100%" fill="white"/>']
    for i, (title, lines) in enumerate(plots):
        xs, ys = zip(*(point for line in lines.values() for point in line))
        x0, y0 = min(xs), min(ys)
        wide, high = (max(xs) - x0 or 1) / 265, (max(ys) - y0 or 1) / 160  # a pixel
        shapes += [f'<g transform="translate({330 * i + 45} 30)"><text y="-12">{title}</text>',
                   '<path d="M0 -4V164H267" fill="none" stroke="black"/>']
        for y, at in ((max(ys), 4), (y0, 163)):
            shapes.append(f'<text x="-4" y="{at}" text-anchor="end">{y:.3g}</text>')
        for x, text in (ticks or {x: f"{x:g}" for x in (x0, max(xs))}).items():
            at = (x - x0) / wide
            shapes.append(f'<text x="{at:.1f}" y="178" text-anchor="middle">{text}</text>')
        for n, (name, line) in enumerate(lines.items()):
            colour = colours.setdefault(name, palette[len(colours) % len(palette)])
            points = " ".join(f"{(x - x0) / wide:.1f},{160 - (y - y0) / high:.1f}" for x, y in line)
            shapes += [f'<polyline points="{points}" fill="none" stroke="{colour}"/>',
                       f'<text y="{194 + 13 * n}" fill="{colour}">{name}</text>']
        shapes.append("</g>")
    size = f'width="{330 * len(plots)}" height="290" font-family="sans-serif" font-size="11"'
    shapes = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *shapes, "</svg>\n"]
    Path(path).write_text("\n".join(shapes))


# ======== the verb compare ========


class Score(NamedTuple):
    """An ABX error across speakers, in percent."""

    name: str  # of the model that was adapted, and how
    layer: int
    amount: str  # of audio that it was adapted to: none, 10min, ..., all; or any
    seed: int
    language: str
    error: float


def seconds_of(amount):
    return data.parse_seconds(amount) if amount[0].isdigit() else {"none": 0}.get(amount, math.inf)


def read_scores(path):
    """Of a run of adapt.py, or of NAME<seed>-<language>.json by 'abx --out', which stands for a
    model that was not adapted: the same error with any amount."""
    try:
        if path.suffix == ".json":
            name, language = path.stem.split("-")
            o, files = dict(init=name, method="full", seed=name, items=language), {"any": path}
        else:
            o = json.loads((path / "config.json").read_text())["options"]
            amount = o["budget"] or "all"
            files = {"none": path / "abx_before.json", amount: path / "abx_after.json"}
        init = Path(o["init"])
        name = (init.parent if init.suffix == ".pt" else init).name.rstrip("0123456789")
        name += f", {o['method']}" if o["method"] != "full" else ""
        return [Score(name, r["layer"], amount, o["seed"], o["items"] or o["language"], r["error"])
                for amount, file in files.items() for r in json.loads(file.read_text())
                if r["speaker"] == "across"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no ABX there, as 'adapt.py --items' or 'abx --out "
                         f"NAME-LANGUAGE.json' write it: {error}") from None


def mean_by(scores, *fields):
    """{the fields' values: the mean error of the scores that share them}"""
    groups = defaultdict(list)
    for score in dict.fromkeys(scores):  # what was adapted twice was measured twice before
        groups[tuple(getattr(score, field) for field in fields)].append(score.error)
    return {key: np.mean(errors) for key, errors in groups.items()}


def compare(args):
    """A line for each model that was adapted, by amount of audio: the mean and the spread over
    seeds of the mean over languages."""
    scores = [score for path in args.runs for score in read_scores(Path(path))]
    amounts = sorted({score.amount for score in scores} - {"any"} | {"none"}, key=seconds_of)
    scores = [score._replace(amount=amount) for score in scores for amount in amounts
              if score.amount in (amount, "any")]
    require(scores, "no ABX across speakers in these files")
    adapted = [score for score in scores if score.amount != "none"]
    after = mean_by(adapted or scores, "name", "layer")
    lines = {}
    columns = "".join(f"{amount:>14}" for amount in amounts)
    print(f"{'adapted from':24} layer{columns}   ABX across, %")
    for name in sorted({score.name for score in scores}):
        layers = sorted({score.layer for score in scores if score.name == name})
        layer = args.layer or min(layers, key=lambda layer: after.get((name, layer), math.inf))
        require(layer in layers, f"--layer {layer}: {name} has layers {layers}")
        chosen = [score for score in scores if (score.name, score.layer) == (name, layer)]
        by_seed, shown, lines[name] = mean_by(chosen, "amount", "seed"), "", []
        for i, amount in enumerate(amounts):
            errors = [error for (of, _), error in by_seed.items() if of == amount]
            if errors:
                lines[name].append((i, np.mean(errors)))
            text = f"{np.mean(errors):.2f} ±{np.std(errors):5.2f}" if errors else ""
            shown += f"{text:>14}"
        print(f"{name:24} {layer:>5}{shown}")
    if args.out:
        write_svg(args.out, [("ABX across, %, by audio to adapt to", lines)],
                  dict(enumerate(amounts)))


# ======== command line ========


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


OPTIONS = {
    "runs": dict(nargs="+", help="folders; for compare also NAME-LANGUAGE.json of 'abx --out'"),
    "--model": dict(help=f"a run's folder, a checkpoint, or {', '.join(BASELINES)}"),
    "--audio": dict(help="a folder of audio, a manifest or one file"),
    "--features": dict(help="a folder of .npy or .pt files [T, D], instead of model and audio"),
    "--items": dict(help="an item file"),
    "--units": dict(help="as 'units' writes them; of pairs' wav files: instead of --model"),
    "--alignments": dict(help="CSV fileid,phones,language: a phone every 10 ms"),
    "--lm": dict(help="a run's folder or a checkpoint of 'lm'"),
    "--data": dict(help="wav files and gold.csv, for tsc ID_correct.wav and ID_incorrect.wav"),
    "--layer": dict(type=positive, help="from 1 [the second that has a codebook; compare: best]"),
    "abx --layer": dict(type=lambda text: text if text == "all" else positive(text), default="all",
                        help="from 1 [all]"),
    "--longest": dict(type=positive, default=60, help="seconds; above them in windows [60]"),
    "--speaker": dict(choices=["within", "across", "both"], default="both"),
    "--context": dict(choices=["within", "any"], default="within"),
    "--distance": dict(choices=["angular", "euclidean", "kl", "identity"], default="angular"),
    "--max-size-group": dict(type=positive, help="tokens of a phone, 10 in ZeroSpeech [all]"),
    "--max-x-across": dict(type=positive, help="speakers of X, 5 in ZeroSpeech [all]"),
    "--seed": dict(type=int, default=0, help="of that choice [0]"),
    "--out": dict(help="a folder; units: JSONL, abx and quality: JSON, compare: an SVG file"),
}

VERBS = {  # the function, what it does, its options: those with ! are needed
    "toy": (run_toy, "ABX of runs on the toy world, quickly", "runs --layer"),
    "features": (write_features, "writes a layer's frames", "--model! --audio! --out! --layer "
                 "--longest"),
    "units": (write_units, "writes units", "--model! --audio! --out! --layer --longest"),
    "abx": (run_abx, "ABX error by layer", "--items! --model --audio --features --layer --longest "
            "--speaker --context --distance --max-size-group --max-x-across --seed --out"),
    "quality": (run_quality, "how well units stand for phones", "--units! --alignments! --out"),
    "lm": (None, "trains a language model on units; its options: evaluate.py lm --help", ""),
    **{task: (run_pairs, f"a language model's accuracy on the pairs of {task}",
              "--lm! --data! --model --units --out") for task in TASKS},
    "compare": (compare, "adapted runs side by side", "runs --layer --out"),
}


def parse(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", metavar="verb")
    for verb, (function, summary, options) in VERBS.items():
        command = verbs.add_parser(verb, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(function=function)
        for option in options.split():
            name, needed = option.rstrip("!"), {"required": True} if option.endswith("!") else {}
            command.add_argument(name, **OPTIONS.get(f"{verb} {name}", OPTIONS[name]), **needed)
    return parser.parse_args(arguments)


def main():
    if sys.argv[1:2] == ["lm"]:  # its options are a dataclass, like those of the training scripts
        return train_lm(sys.argv[2:])
    args = parse()
    if not args.verb:
        return report()
    if getattr(args, "out", None):  # what cannot be written is told before the work
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    args.function(args)


if __name__ == "__main__":
    run(main)
