"""Evaluation: features and units; ABX; unit quality; a language model on units.  (SpidR, arXiv 2512.20308;
ZeroSpeech 2021.)

    python evaluate.py                                                           a report on the toy world's newest runs
    python evaluate.py features --model M --audio A --out FOLDER [--layer L]     a layer's frames, one .npy a file
    python evaluate.py units    --model M --audio A --out U.jsonl [--layer L]    the codeword of every frame
    python evaluate.py abx      --model M --items X.item --audio A [--layer all] [--speaker both] [--context within]
    python evaluate.py abx      --features FOLDER --items X.item
    python evaluate.py quality  --units U.jsonl --alignments A.csv
    python evaluate.py lm       --units U.jsonl --out LM                         a causal Transformer on units
    python evaluate.py swuggy | sblimp | tsc  --lm LM --model M --data FOLDER    spoken language modelling
    python evaluate.py compare  RUN ...                                          adapted runs side by side

M is a run's folder, a checkpoint, a released checkpoint, or a baseline: mfcc, wav2vec2_base, hubert_base, wavlm_base.
A is a folder of audio, a manifest or one file. Layers are counted from 1; codebook k (from 0) belongs to layer L-K+1+k.
Frames come at 50 Hz; frame i stands at (i + 1/2) / 50 s. `features` also writes meta.json, and the first line of U is a
header: whose features they are, so that they are never read as another model's.

ABX: is a token X of phone A nearer to another token of A than to one of B? 0 is perfect, 50% is chance; a good model
has 3 to 6% on clean read speech. A cell is all triples of one pair of phones in one context with one speaker or, across
speakers, with one of A and B and another of X.
"""

import argparse
import csv
import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import model as spidr
from model import InputError, all_sum, num_frames, require, run
from pretrain import (Log, Parser, Stop, autocast, finished, lr_at, make_optimizer, open_run, parse_options,
                      save_checkpoint, seed_step, setup, step_of, stopped, update)

RATE, HOP, FIELD = 50, 320, 400  # frames a second; samples from one frame to the next, and under one frame
BASELINES = ("mfcc", "wav2vec2_base", "hubert_base", "wavlm_base")


# ======== models ========


class Encoder(NamedTuple):
    """Our networks and the baselines, made alike."""

    name: str
    hash: str  # of the weights
    layers: int  # L
    codebooks: int  # K, of the last K layers; baselines have none
    codewords: int  # V
    dim: int  # D
    encode: Callable  # [waveforms] -> for each its layers 1..L, [T, D]
    units: Callable = None  # [waveforms] -> for each the units of its codebooks, [T]

    def codebook(self, layer):
        return layer - (self.layers - self.codebooks + 1)

    def layer(self, wanted, units=False):
        """The layer asked for, or where phones are usually clearest: the second that has a codebook, or the middle."""
        require(self.codebooks or not units, f"{self.name} has no codebooks, so it makes no units")
        lowest = self.layers - self.codebooks + 1 if units else 1
        usual = self.layers - self.codebooks + 2 if self.codebooks > 1 else max(self.layers // 2, lowest)
        layer = usual if wanted is None else wanted
        require(lowest <= layer <= self.layers, f"--layer {layer}: {self.name} has "
                f"{'units of ' if units else ''}layers {lowest} to {self.layers}")
        return layer


def load_encoder(name, device=None):
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if str(name) == "mfcc":
        return Encoder("mfcc", "", 1, 0, 0, 39, mfcc)
    if str(name) in BASELINES:
        return baseline(name, device)
    require(Path(name).exists(), f"{name}: no such run or checkpoint, nor a baseline ({', '.join(BASELINES)})")
    return spidr_encoder(str(name), spidr.load(name, device))


def spidr_encoder(name, net):
    c, device = net.config, net.mask_embedding.device

    def batched(function):
        def compute(wavs):
            lengths = torch.tensor([len(wav) for wav in wavs])
            wav = pad_sequence(wavs, batch_first=True).to(device)  # [B, N]
            padded = len(set(lengths.tolist())) > 1
            outputs = function(wav, lengths.to(device) if padded else None)  # L of [B, T, D] or [K, B, T]
            return [[output[b, :n].cpu() for output in outputs] for b, n in enumerate(num_frames(lengths, c).tolist())]
        return compute

    return Encoder(name, hash_weights(net), c.layers, c.codebooks, c.codewords, c.dim,
                   batched(net.encode), batched(net.units))


def hash_weights(net):
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def mfcc(wavs):
    """13 coefficients and their first and second differences, [T, 39]; 25 ms windows, centred as our frames are."""
    torchaudio, pad = data.import_torchaudio("mfcc"), (FIELD - HOP) // 2
    mel = dict(n_fft=FIELD, hop_length=HOP, n_mels=40, center=False)
    transform = torchaudio.transforms.MFCC(16000, 13, log_mels=True, melkwargs=mel)
    deltas = torchaudio.functional.compute_deltas
    found = [transform(F.pad(wav, (pad, pad))) for wav in wavs]  # [13, T]
    return [[torch.cat([c, deltas(c), deltas(deltas(c))]).T.contiguous()] for c in found]


def baseline(name, device, pretrained=True):
    """One of torchaudio's. pretrained=False: random weights, without a download."""
    torchaudio = data.import_torchaudio(name)
    make = getattr(torchaudio.pipelines, name.upper()).get_model if pretrained else getattr(torchaudio.models, name)
    try:
        net = make().eval().to(device)
    except OSError as error:  # no network, no room
        raise InputError(f"{name}: its weights could not be downloaded: {error}") from None

    def encode(wavs):  # one at a time: their group norm would count padding
        return [[layer[0].cpu() for layer in net.extract_features(wav[None].to(device))[0]] for wav in wavs]

    return Encoder(name, hash_weights(net), 12, 0, 0, 768, encode)


# ======== features and units ========


def windows(samples, longest):
    """[(first sample, end sample, first frame kept, frames kept)]: one window, or for what is longer than `longest`
    seconds overlapping ones, of which the middle two thirds are kept: attention over an hour does not fit, and the
    network has never seen one."""
    if samples <= longest * 16000:
        return [(0, samples, 0, None)]
    frames, found, context = (samples - FIELD) // HOP + 1, [], longest * RATE // 6
    kept = 4 * context
    for first in range(0, frames, kept):
        begin, end = max(0, first - context), min(first + kept + context, frames)
        found.append((begin * HOP, min((end - 1) * HOP + FIELD, samples), first - begin, min(kept, frames - first)))
    return found


def window_batches(rows, window_seconds, samples):
    """Yields [(fileid, the frames to keep, waveform)]: short files together, the shortest first."""
    batch, longest = [], 0
    twice = [fileid for fileid, count in Counter(row.fileid for row in rows).items() if count > 1]
    require(not twice, f"{len(twice)} fileids name more than one recording, such as {(twice or [''])[0]!r}: give the "
            "manifest a column fileid")
    for row in tqdm(sorted(rows, key=lambda row: row.num_samples), "audio", unit="file", leave=False, disable=None):
        try:
            wav = data.standardise(data.read_audio(row.path))
        except InputError as error:
            raise InputError(f"{row.where or row.path}: {error}") from None
        require(len(wav) >= FIELD, f"{row.path}: {len(wav)} samples are too short for a frame")
        for begin, end, first, kept in windows(len(wav), window_seconds):
            longest = max(longest, end - begin)
            if batch and (len(batch) + 1) * longest > samples:
                yield batch
                batch, longest = [], end - begin
            frames = slice(first, None if kept is None else first + kept)
            batch.append((row.fileid, frames, wav[begin:end]))
    if batch:
        yield batch


@torch.no_grad()
def extract(rows, compute, indices, longest=60, batch_seconds=120):
    """Yields (fileid, [the wanted outputs of compute]) for each file."""
    parts = ((fileid, [outputs[i][frames] for i in indices])
             for batch in window_batches(rows, longest, batch_seconds * 16000)
             for (fileid, frames, _), outputs in zip(batch, compute([wav for *_, wav in batch])))
    for fileid, some in itertools.groupby(parts, key=lambda part: part[0]):
        yield fileid, [torch.cat(layer) for layer in zip(*(outputs for _, outputs in some))]


def extract_units(rows, encoder, layer, longest=60):
    """Yields (fileid, [its units by the codebook of a layer])."""
    for fileid, (units,) in extract(rows, encoder.units, [encoder.codebook(layer)], longest):
        yield fileid, units.tolist()


def describe(encoder, layer):
    return dict(model=encoder.name, hash=encoder.hash, layer=layer, frame_rate=RATE)


def write_features(args):
    encoder, out = load_encoder(args.model), Path(args.out)
    layer, rows = encoder.layer(args.layer), data.read_manifest(args.audio)
    require(not (out / "meta.json").exists(), f"{out} holds features already: name another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").write_text(json.dumps(describe(encoder, layer)) + "\n")
    for fileid, (frames,) in extract(rows, encoder.encode, [layer - 1], args.longest):
        path = out / f"{fileid}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, frames.numpy())
    print(f"{len(rows)} files, layer {layer} of {encoder.name}, [T, {encoder.dim}] at {RATE} Hz: {out}")


def read_features(folder, files):
    """A folder of .npy or .pt -> {file: [T, D]} of the wanted files that are there, and its meta.json."""
    require(Path(folder).is_dir(), f"{folder}: no such folder of features")
    features, meta = {}, Path(folder, "meta.json")
    for file in files:
        path = Path(folder, f"{file}.npy")
        try:
            if path.exists():
                features[file] = torch.from_numpy(np.load(path))
            elif (path := Path(folder, f"{file}.pt")).exists():
                features[file] = torch.load(path, map_location="cpu", weights_only=True)
        except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"{path}: not an array of features: {str(error).splitlines()[0]}") from None
        require(file not in features or isinstance(features[file], torch.Tensor), f"{path}: not an array of features")
    try:
        return features, json.loads(meta.read_text()) if meta.exists() else {}
    except ValueError as error:
        raise InputError(f"{meta}: damaged: {error}") from None


def write_units(args):
    encoder, out = load_encoder(args.model), Path(args.out)
    require(not out.exists(), f"{out} is there already: name another file, or remove it")
    layer, rows = encoder.layer(args.layer, units=True), data.read_manifest(args.audio)
    with open(f"{out}.part", "w", encoding="utf-8") as file:
        print(json.dumps(describe(encoder, layer) | dict(codewords=encoder.codewords)), file=file)
        for fileid, units in extract_units(rows, encoder, layer, args.longest):
            print(json.dumps(dict(fileid=fileid, units=units)), file=file)
    os.replace(f"{out}.part", out)
    print(f"{len(rows)} files, units of layer {layer} (codebook {encoder.codebook(layer)}) of {encoder.name} "
          f"at {RATE} Hz: {out}")


def read_units(path, **expected):
    """-> header, {file: [unit, ...]}. Refused where the header differs from what is expected, such as layer=6."""
    try:
        with open(path, encoding="utf-8") as file:
            header, *records = map(json.loads, file)
            units = {record["fileid"]: record["units"] for record in records}
            missing = {"model", "hash", "layer", "frame_rate", "codewords"} - set(header)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file of units: {error}") from None
    require(not missing, f"{path}: its first line has no {', '.join(sorted(missing))}; 'evaluate.py units' writes it")
    for name, value in ({"frame_rate": RATE} | expected).items():
        require(header[name] == value, f"{path}: {name} is {header[name]!r}, wanted is {value!r}")
    for file, sequence in units.items():
        fits = set(map(type, sequence)) == {int} and min(sequence) >= 0 and max(sequence) < header["codewords"]
        require(fits, f"{path}: {file}: not a list of units from 0 to {header['codewords'] - 1}")
    require(units, f"{path}: no units")
    return header, units


# ======== ABX: items and tokens ========


class Run(NamedTuple):
    """The tokens of one speaker in one context: consecutive rows lo..hi-1 of the token table, phone by phone."""

    group: int  # the context; one group of all tokens when the context does not count
    speaker: int
    lo: int
    hi: int
    phones: np.ndarray  # [S] its phones, ascending; a "set" is the tokens of one phone in one run
    starts: np.ndarray  # [S] first token of each set, counted from lo
    index: np.ndarray  # [hi - lo] the set of each token
    sizes: np.ndarray  # [S] tokens of each set


class Item(NamedTuple):
    file: str
    first: int  # its first frame
    end: int  # the frame after its last
    phone: str
    context: str
    speaker: str


def read_items(path, frame_rate=RATE):
    """The items of an item file. Frame i belongs to one when onset <= (i + 1/2) / frame_rate <= offset.

    In decimals: an onset such as 0.29 would fall on the wrong side of a frame in binary floating point.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file") from None
    columns = ["#file", "onset", "offset", "#phone", "prev-phone", "next-phone", "speaker"]
    names, items = lines[0].split() if lines else [], []
    for name in columns:
        require(name in names, f"{path}:1: no column {name}; an item file begins with {' '.join(columns)}")
    at = [names.index(name) for name in columns]
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        values = line.split()
        try:
            file, onset, offset, phone, before, after, speaker = (values[i] for i in at)
            first = math.ceil(Decimal(onset) * frame_rate - Decimal("0.5"))
            end = math.floor(Decimal(offset) * frame_rate - Decimal("0.5")) + 1
        except (IndexError, ArithmeticError, ValueError):
            raise InputError(f"{path}:{number}: not an item: {line[:80]!r}") from None
        items.append(Item(file, max(first, 0), end, phone, f"{before} {after}", speaker))
    return items


def abx_tokens(features, items):
    """-> the items that can be used, the frames [T, D] of each, and a line on those that cannot."""
    checked, tokens, frames, lost = {}, [], [], Counter()
    for item in items:
        if item.file not in features:
            lost["left out, no features of their files"] += 1
            continue
        if item.file not in checked:
            feature = torch.as_tensor(features[item.file]).float()
            good = feature.ndim <= 2 and bool(feature.isfinite().all())
            require(good, f"{item.file}: features must be finite and [T, D]")
            checked[item.file] = feature if feature.ndim == 2 else feature[:, None]
        found = checked[item.file][item.first : item.end]
        if len(found) == 0:
            lost["left out, no frame lies within them"] += 1
            continue
        lost["cut short at the end of their features"] += len(found) < item.end - item.first
        tokens.append(item)
        frames.append(found)
    return tokens, frames, "; ".join(f"{n} of {len(items)} items {why}" for why, n in lost.items() if n)


# ======== ABX: distances ========


def prepare(frames, distance):
    """What can be done once for each frame. [F, D] -> [F, .]"""
    if distance == "angular":  # a frame of zeros has no direction; as in fastabx it gets that of (1, ..., 1)
        norm = frames.norm(dim=1, keepdim=True)
        return torch.where(norm > 0, frames / norm, 1 / math.sqrt(frames.shape[1]))
    if distance == "kl":  # a shift of log p by a constant changes nothing, and keeps the sums below small
        log_p = (frames + 1e-6).log()
        log_p = log_p - log_p.mean(1, keepdim=True)
        return torch.cat([frames, log_p, (frames * log_p).sum(1, keepdim=True)], 1)
    return frames


def frame_distances(x, y, distance):
    """Every frame of x against every frame of y, both prepared. -> [Fx, Fy]"""
    if distance == "angular":
        return (x @ y.T).clamp_(-1, 1).acos_().div_(math.pi)
    if distance == "euclidean":  # not by |x|^2 + |y|^2 - 2xy, which loses the small distances
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    if distance == "kl":  # symmetric: the mean of KL(p|q) and KL(q|p)
        d = x.shape[1] // 2
        cross = x[:, :d] @ y[:, d:-1].T + x[:, d:-1] @ y[:, :d].T
        return (x[:, -1:] + y[:, -1] - cross) / 2
    return (x[:, :1] != y[:, 0]).float()  # identity: discrete units


def dtw(cost, start, step, tx, ty):
    """Dynamic time warping of P pairs of tokens at once: the mean frame distance along the best path of each.

    Frames i of x and j of y of pair p are cost[start[p] + i * step[p] + j] apart; x has tx[p] frames, y has ty[p].
    The recurrence walks over the anti-diagonals k = i + j; a pair leaves when its last, tx + ty - 2, is done. With
    the cost goes the length of the path. Among equal costs a path prefers the diagonal, then the step along the
    partner of the token in the role of X: so the length, and with it the distance, depends on which one is X.
    -> [2, P]: with x as X, with y as X
    """
    order = (tx + ty).argsort()
    start, step, tx, ty = start[order], step[order], tx[order], ty[order]
    width, height, pairs, device = int(tx.max()), int(ty.max()), len(order), cost.device
    done = torch.searchsorted(tx + ty - 1, torch.arange(int(tx[-1] + ty[-1]) - 1, device=device), right=True).tolist()
    begins = start[:, None] + step[:, None] * torch.arange(width, device=device)  # [P, Tx] rows of frame distances
    cost = cost.unfold(0, height, 1).index_select(0, begins.clamp_(max=len(cost) - height).view(-1))
    cost = cost.view(pairs, width * height).T.contiguous()  # [Tx * Ty, P] so that every operation runs along pairs
    # The last three diagonals, in turns. Row i + 1 is frame i of x, row 0 lies outside.
    totals = [torch.full((width + 1, pairs), math.inf, device=device) for _ in range(3)]
    lengths = [torch.zeros(2, width + 1, pairs, device=device) for _ in range(3)]  # with x as X, with y as X
    totals[1][0] = 0  # the way into frames (0, 0)
    for k in range(len(done)):
        lo, hi, first = max(0, k - height + 1), min(k + 1, width), done[k]
        (new, new_length), (old, old_length), (older, older_length) = (
            (totals[(k - n) % 3][:, first:], lengths[(k - n) % 3][:, :, first:]) for n in range(3))
        left, up, diagonal = old[lo + 1 : hi + 1], old[lo:hi], older[lo:hi]
        rows = slice(k + lo * (height - 1), k + (hi - 1) * (height - 1) + 1, max(height - 1, 1))  # frames (i, k - i)
        straight = torch.minimum(left, up)
        torch.add(torch.minimum(straight, diagonal), cost[rows, first:], out=new[lo + 1 : hi + 1])
        # Choices as 0. and 1., by which lerp selects: several times as fast as torch.where by booleans.
        is_diagonal = torch.le(diagonal, straight, out=torch.empty_like(straight))
        is_up = straight.new_empty(2, *straight.shape)
        torch.lt(up, left, out=is_up[0])
        torch.le(up, left, out=is_up[1])
        length = torch.lerp(old_length[:, lo + 1 : hi + 1], old_length[:, lo:hi], is_up)
        torch.lerp(length, older_length[:, lo:hi], is_diagonal, out=new_length[:, lo + 1 : hi + 1]).add_(1)
        if k == 0:
            older[0] = math.inf
    end, pair = (tx + ty - 2) % 3, torch.arange(pairs, device=device)  # a pair's last diagonal stays as it was
    result = torch.empty(2, pairs, device=device)
    result[:, order] = torch.stack(totals)[end, tx, pair] / torch.stack(lengths)[end, :, tx, pair].T
    return result


class PairDistances:
    """Distances of pairs of tokens, computed in jobs of many pairs by a pool of threads.

    A thread for each job, and one thread for each operation in it: splitting every small operation over the cores
    would cost more than it brings, and very much more on a machine that has other work to do.
    """

    job_size = 1 << 21  # frame distances in a job: 8 MB
    batch_size = 1 << 17  # numbers in an array of dtw's

    def __init__(self, frames, lengths, distance, pool):
        self.frames, self.lengths, self.distance, self.pool = frames, lengths, distance, pool
        self.begins = np.cumsum(lengths) - lengths
        self.held, self.blocks, self.pairs, self.jobs = 0, [], [], []

    def gather(self, tokens):
        """The rows of these tokens in the table of frames, how many each has, and where it begins among them."""
        lengths = self.lengths[tokens]
        begins = np.cumsum(lengths) - lengths
        return np.repeat(self.begins[tokens] - begins, lengths) + np.arange(lengths.sum()), lengths, begins

    def add(self, x, y, wanted, x_as_x, y_as_x):
        """The pairs of runs x and y where wanted [x, y]: into x_as_x [x, y] and, the roles swapped, y_as_x [y, x]."""
        rows = wanted.any(1).nonzero()[0]
        total = self.lengths[x.lo : x.hi].sum() * self.lengths[y.lo : y.hi].sum()
        parts = max(total // (self.job_size // 2) + 1, 8 if x is y and len(rows) > 64 else 1)
        for rows in np.array_split(rows, min(parts, len(rows)) or 1):  # of a symmetric matrix, little beyond a half
            cols = wanted[rows].any(0).nonzero()[0]
            if len(cols) == 0:
                continue
            frames_x, lengths_x, begins_x = self.gather(x.lo + rows)
            frames_y, lengths_y, begins_y = self.gather(y.lo + cols)
            i, j = wanted[rows[:, None], cols].nonzero()
            start, step = self.held + begins_x[i] * len(frames_y) + begins_y[j], np.full(len(i), len(frames_y))
            self.blocks.append((frames_x, frames_y))
            self.pairs.append((np.stack([start, step, lengths_x[i], lengths_y[j]]),
                               (x_as_x, rows[i], cols[j]), (y_as_x, cols[j], rows[i])))
            self.held += len(frames_x) * len(frames_y)
            if self.held >= self.job_size:
                self.submit()

    def submit(self, most=16):
        """Hands what is held to the pool; waits while there are more jobs than `most`."""
        if self.pairs:
            self.jobs.append(self.pool.submit(self.compute, self.blocks, self.pairs))
            self.held, self.blocks, self.pairs = 0, [], []
        while len(self.jobs) > most:
            self.jobs.pop(0).result()

    def compute(self, blocks, pairs):
        cost = [frame_distances(self.frames[x], self.frames[y], self.distance).view(-1) for x, y in blocks]
        cost = torch.cat([*cost, cost[0].new_zeros(self.lengths.max())])  # dtw reads all rows at the longest's length
        table = np.concatenate([table for table, *_ in pairs], 1)
        order = np.lexsort(table[[3, 2]])[::-1]  # pairs of like lengths together: little padding
        found, at = np.empty((2, len(order)), np.float32), 0
        while at < len(order):
            some = order[at : at + max(1, self.batch_size // table[2, order[at]])]
            found[:, some] = dtw(cost, *torch.from_numpy(table[:, some]).to(cost.device)).cpu().numpy()
            at += len(some)
        ends = np.cumsum([table.shape[1] for table, *_ in pairs])
        for (_, *targets), distances in zip(pairs, np.split(found, ends[:-1], 1)):
            for (into, i, j), values in zip(targets, distances):
                into[i, j] = values


# ======== ABX: cells ========


def active_sets(x, ab, chosen):
    """Which sets of the run x serve as X against A and B of the run ab. -> [S] bool"""
    if len(ab.phones) < 2:  # no B
        return np.zeros(len(x.phones), bool)
    if x is ab:  # A and X are two tokens of the set
        return x.sizes >= 2
    active = np.isin(x.phones, ab.phones)
    if chosen is not None:
        active &= np.array([x.speaker in chosen.get((ab.group, phone, ab.speaker), ()) for phone in x.phones])
    return active


def score_cells(distance, x, ab, active):
    """The cells with X from run x and A, B from run ab. distance [x, ab] -> [cells, 5] as abx_cells"""
    if not active.any():
        return np.empty((0, 5))
    sets, distance = np.flatnonzero(active), distance[active[x.index]]
    sizes, set_of_a = x.sizes[sets], np.searchsorted(ab.phones, x.phones[sets])
    index = np.repeat(set_of_a, sizes)  # [X] the set of A for each X
    nth = np.arange(ab.sizes[index].max())
    column = np.minimum(ab.starts[index][:, None] + nth, distance.shape[1] - 1)
    to_a = np.where(nth < ab.sizes[index][:, None], np.take_along_axis(distance, column, 1), np.inf)
    to_a, to_b = torch.from_numpy(np.sort(to_a, 1)), torch.from_numpy(distance)  # [X, A], [X, B]
    nearer, not_farther = (torch.searchsorted(to_a, to_b, side=side).numpy() for side in ("left", "right"))
    n_a = ab.sizes - (x is ab)  # X is no A of its own
    wrong = n_a[index][:, None] - (nearer + not_farther) / 2  # [X, B] A that are farther than B, ties by half
    begins = np.cumsum(sizes) - sizes
    wrong = np.add.reduceat(np.add.reduceat(wrong, begins, 0), ab.starts, 1)  # [sets of X, sets of B]
    triples = (sizes * n_a[set_of_a])[:, None] * ab.sizes
    i, j = (set_of_a[:, None] != np.arange(len(ab.phones))).nonzero()
    speaker = np.full(len(i), ab.speaker)
    return np.stack([ab.phones[set_of_a[i]], ab.phones[j], speaker, wrong[i, j], triples[i, j]], 1)


def abx_cells(runs, speaker, pairs, chosen):
    """Every cell. -> [cells, 5]: A, B, the speaker of both, errors, triples"""
    units = [(run, run) for run in runs]
    if speaker == "across":
        groups = itertools.groupby(runs, key=lambda run: run.group)
        units = [unit for _, members in groups for unit in itertools.combinations(members, 2)]
    cells, waiting = [np.empty((0, 5))], []
    for n, (x, y) in enumerate(tqdm(units, "abx", leave=False, disable=None), 1):
        x_active, y_active = active_sets(x, y, chosen), active_sets(y, x, chosen)
        if x_active.any() or y_active.any():
            x_token, y_token = x_active[x.index][:, None], y_active[y.index]  # [x, 1], [y]: those that serve as X
            distance = np.full((x.hi - x.lo, y.hi - y.lo), np.inf, np.float32)
            if x is y:  # once for both orders, and never a token against itself
                later = np.triu(np.ones(distance.shape, bool), 1)
                pairs.add(x, x, x_token & (later | ~y_token), distance, distance)
            else:
                reverse = np.full(distance.shape[::-1], np.inf, np.float32)
                pairs.add(x, y, x_token | np.zeros_like(y_token), distance, reverse)
                pairs.add(x, y, ~x_token & y_token, distance, reverse)
                waiting.append((reverse, y, x, y_active))
            waiting.append((distance, x, y, x_active))
        if len(pairs.jobs) >= 8 or n == len(units):
            pairs.submit(most=0)
            cells += [score_cells(*cell) for cell in waiting]
            waiting = []
    return np.concatenate(cells)


def average(keys, values):
    """The mean of the values of equal keys. keys [n, .] -> the different keys, their means"""
    keys, index, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    return keys, np.bincount(index.reshape(-1), values) / counts


def choose_speakers(runs, most, random):
    """For each context, phone and speaker of A and B: at most so many speakers of X."""
    members = {}
    for group, speaker, _, _, phones, *_ in runs:
        for phone in phones:
            members.setdefault((group, phone), []).append(speaker)
    return {(group, phone, speaker): set(random.permutation([s for s in speakers if s != speaker])[:most])
            for (group, phone), speakers in members.items() for speaker in speakers}


def sort_tokens(tokens, context, max_size_group, random):
    """-> the order of the tokens by context, speaker and phone, their runs, and how many there are of each"""
    contexts = [token.context if context == "within" else "" for token in tokens]
    columns = contexts, [token.speaker for token in tokens], [token.phone for token in tokens]
    keys = np.stack([np.unique(column, return_inverse=True)[1] for column in columns])  # [3, tokens]
    order = np.arange(len(tokens)) if max_size_group is None else random.permutation(len(tokens))
    order = order[np.lexsort(keys[::-1, order])]
    if max_size_group is not None:  # as in fastabx, a set has the same tokens in all cells and all roles
        starts = np.flatnonzero(np.diff(keys[:, order], prepend=-1).any(0))
        order = order[np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order))) < max_size_group]
    group, speaker, phone = keys[:, order]
    edges = np.flatnonzero(np.diff(keys[:2, order], prepend=-1).any(0))
    runs = [Run(group[lo], speaker[lo], lo, hi, *np.unique(phone[lo:hi], True, True, True))
            for lo, hi in zip(edges, [*edges[1:], len(order)])]
    return order, runs, keys.max(1) + 1


@contextlib.contextmanager
def thread_pool():
    """As many threads as torch uses, and one thread for each operation of torch's; see PairDistances."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def abx_details(features, item_file, speaker="within", context="within", distance="angular",
                max_size_group=None, max_x_across=None, seed=0, frame_rate=RATE):
    """abx() and what is worth knowing beside the error, as a dict."""
    for name, value, allowed in (("speaker", speaker, ("within", "across")), ("context", context, ("within", "any")),
                                 ("distance", distance, ("angular", "euclidean", "kl", "identity"))):
        require(value in allowed, f"abx: {name} is {' or '.join(allowed)}, not {value!r}")
    items, random, chosen = read_items(item_file, frame_rate), np.random.default_rng(seed), None
    with thread_pool() as pool:
        tokens, frames, note = abx_tokens(features, items)
        require(tokens, f"{item_file}: none of its {len(items)} items can be used: {note}")
        order, runs, (_, speakers, phones) = sort_tokens(tokens, context, max_size_group, random)
        if speaker == "across" and max_x_across is not None:
            chosen = choose_speakers(runs, max_x_across, random)
        lengths = np.array([len(frames[i]) for i in order])
        table = prepare(torch.cat([frames[i] for i in order]), distance)
        cells = abx_cells(runs, speaker, PairDistances(table, lengths, distance, pool), chosen)
    require(len(cells), f"{item_file}: no cell for ABX {speaker} speaker, {context} context: "
            f"no A, B and X among {len(tokens)} items of {speakers} speaker(s) and {phones} phone(s)")
    keys, errors = cells[:, :3], cells[:, 3] / cells[:, 4]
    if context == "within":  # over contexts (and speakers of X); then over speakers; without contexts, both at once
        keys, errors = average(keys, errors)
    keys, errors = average(keys[:, :2], errors)
    return dict(error=100 * float(errors.mean()), speaker=speaker, context=context, distance=distance,
                items=len(tokens), cells=len(cells), triples=int(cells[:, 4].sum()), frame_rate=frame_rate,
                max_size_group=max_size_group, max_x_across=max_x_across, seed=seed, note=note)


def abx(features, item_file, speaker="within", context="within", **options):
    """The ABX error in percent. features {file: [T, D] at 50 Hz}; options and defaults as of abx_details.

    ZeroSpeech 2021 keeps max_size_group=10 tokens of a phone in a cell and max_x_across=5 speakers of X; here nothing
    is left out unless asked for.
    """
    details = abx_details(features, item_file, speaker, context, **options)
    if details["note"]:
        print(f"abx: {details['note']}", file=sys.stderr)
    return details["error"]


def abx_by_layer(args):
    """Yields (layer, features of the files of the item file); several passes where all layers do not fit in memory."""
    files = {item.file for item in read_items(args.items)}
    if args.features:
        features, meta = read_features(args.features, files)
        require(meta.get("frame_rate", RATE) == RATE, f"{args.features}: features at {meta.get('frame_rate')} Hz")
        yield meta.get("layer", "-"), features
        return
    encoder = load_encoder(args.model)
    layers = range(1, encoder.layers + 1) if args.layer == "all" else [encoder.layer(args.layer)]
    rows = [row for row in data.read_manifest(args.audio) if row.fileid in files]
    require(rows, f"{args.audio}: none of the {len(files)} files of {args.items}")
    size = sum(row.num_samples for row in rows) / HOP * encoder.dim * 4  # bytes of a layer
    at_once = max(1, int(4e9 / size))
    for some in (layers[i : i + at_once] for i in range(0, len(layers), at_once)):
        features = dict(extract(rows, encoder.encode, [layer - 1 for layer in some], args.longest))
        for n, layer in enumerate(some):
            yield layer, {file: outputs[n] for file, outputs in features.items()}


def run_abx(args):
    require(bool(args.features) != bool(args.model and args.audio), "abx takes --features, or --model and --audio")
    speakers = ["within", "across"] if args.speaker == "both" else [args.speaker]
    records = []
    for layer, features in abx_by_layer(args):
        found = [abx_details(features, args.items, speaker, args.context, args.distance, args.max_size_group,
                             args.max_x_across, args.seed) for speaker in speakers]
        if not records:
            print("layer" + "".join(f"{speaker:>10}" for speaker in speakers) + "    ABX error, %")
        print(f"{layer:>5}" + "".join(f"{one['error']:10.2f}" for one in found), flush=True)
        records += [dict(layer=layer) | one for one in found]
    for one in found:
        shown = {name: "all" if value is None else value for name, value in one.items()}
        print("{speaker} speaker, {context} context, {distance} distance, {frame_rate} Hz: {items} items, "
              "{cells} cells, {triples} triples; tokens in a cell: {max_size_group}, speakers of X: {max_x_across}, "
              "seed {seed}".format(**shown))
    if found[0]["note"]:
        print(f"note: {found[0]['note']}", file=sys.stderr)
    if args.out:
        Path(args.out).write_text(json.dumps(records, indent=1) + "\n")


# ======== unit quality ========


def quality(units, phones, codewords=None):
    """How well units, {file: [unit at 50 Hz]}, stand for phones, {file: [phone at 100 Hz]}; V = codewords."""
    table, frames, kept = Counter(), 0, 0
    for file in sorted(units.keys() & phones.keys()):
        sequence, labels = np.repeat(units[file], 2).tolist(), phones[file]  # the unit at 100 Hz
        require(abs(len(sequence) - len(labels)) <= 2, f"{file}: {len(units[file])} units at 50 Hz, but "
                f"{len(labels)} phones at 100 Hz: not of the same audio")
        table.update(zip(labels, sequence))
        frames += len(units[file])
        kept += sum(1 for _ in itertools.groupby(units[file]))
    require(table, "quality: no file has both units and phones")
    rows, row = np.unique([phone for phone, _ in table], return_inverse=True)
    columns, column = np.unique([unit for _, unit in table], return_inverse=True)
    joint = np.zeros((len(rows), len(columns)))  # p(phone, unit)
    joint[row, column] = list(table.values())
    joint /= joint.sum()

    def entropy(p):  # in bits
        return float(-(p[p > 0] * np.log2(p[p > 0])).sum())

    h_phone, h_unit = entropy(joint.sum(1)), entropy(joint.sum(0))
    return dict(pnmi=(h_phone + h_unit - entropy(joint)) / h_phone if h_phone > 0 else 0.0,
                phone_purity=float(joint.max(0).sum()), cluster_purity=float(joint.max(1).sum()),
                perplexity=2**h_unit, active=len(columns),
                bitrate=math.log2(codewords or len(columns)) * kept / (frames / RATE))


def run_quality(args):
    header, units = read_units(args.units)
    phones = {file: labels for file, (labels, _) in data.read_alignments(args.alignments).items()}
    found = quality(units, phones, header["codewords"])
    print(f"units of layer {header['layer']} of {header['model']}, {len(units.keys() & phones.keys())} files")
    for name, value in found.items():
        print(f"{name:>15} {value:10.3f}" + {"bitrate": " bit/s", "active": f" of {header['codewords']}"}.get(name, ""))
    if args.out:
        Path(args.out).write_text(json.dumps(header | found, indent=1) + "\n")


# ======== unit language model ========


@dataclass
class LMOptions:
    """The language model's. A comment is also the option's help."""

    preset: str = ""  # tiny or opt125m, the papers' size
    units: str = ""  # the file of units to learn from, as 'units' writes it
    valid: str = ""  # another, to report the loss on
    out: str = "runs/lm"  # the run's folder
    seed: int = 0  # of the weights, the order, the crops and dropout
    layers: int = 12  # of the Transformer
    dim: int = 768  # its width
    heads: int = 12  # of attention
    context: int = 2048  # units of the longest crop, and the most that a score looks back
    dropout: float = 0.1  # of what each block adds
    steps: int = 25_000  # optimizer steps; the schedule below is stretched along unless it is given too
    batch_tokens: int = 65_536  # at most so many tokens in a micro-batch, with padding
    accumulate: int = 1  # micro-batches a step and rank
    lr: float = 6e-4  # peak learning rate
    lr_floor: float = 0.1  # part of the peak that warm-up starts from and decay ends at
    warmup_steps: int = 1_000  # linear warm-up
    hold_steps: int = 0  # at the peak
    decay_steps: int = 24_000  # exponential decay
    betas: tuple = (0.9, 0.95)  # AdamW
    eps: float = 1e-8  # AdamW
    weight_decay: float = 0.1  # AdamW, on everything
    clip: float = 1.0  # gradient norm
    device: str = ""  # cuda, cuda:1, mps, cpu; the best there is unless given
    bf16: bool = True  # bfloat16 autocast, on GPUs
    log_every: int = 50  # steps
    save_every: int = 500  # steps between checkpoints (last.pt)
    keep_every: int = 0  # steps between checkpoints that are kept (step_N.pt)
    restart: bool = False  # move a run of other options aside and start over


LM_PRESETS = {"opt125m": {}, "tiny": dict(
    layers=2, dim=128, heads=4, context=128, steps=2_000, batch_tokens=1_024, lr=3e-3, warmup_steps=200,
    decay_steps=1_800, log_every=100, save_every=500)}


class LMBlock(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):  # [B, T, D]
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, heads, T, D/heads]
        x = x + self.dropout(self.proj(y.transpose(1, 2).reshape(B, T, D)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class UnitLM(nn.Module):
    """A causal, pre-norm Transformer over deduplicated units. Token V is the boundary around an utterance."""

    def __init__(self, codewords, layers, dim, heads, context, dropout=0.0):
        super().__init__()
        self.boundary, self.context, self.units = codewords, context, {}  # the header of the units it was trained on
        self.embedding, self.position = nn.Embedding(codewords + 1, dim), nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*(LMBlock(dim, heads, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, codewords + 1, bias=False)
        for weight in (p for p in self.parameters() if p.ndim == 2):
            nn.init.normal_(weight, std=0.02)
        for block in self.blocks:  # what adds up along the residual stream starts smaller, as in GPT-2
            block.proj.weight.data /= math.sqrt(2 * layers)
            block.down.weight.data /= math.sqrt(2 * layers)

    def forward(self, rows):
        """-log p of each token but the first, given those before it: B rows of tokens -> [B, T]. Padding has 0; it is
        on the right, where causal attention does not look, so it needs no mask."""
        rows = pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=-1)
        tokens = rows.to(self.head.weight.device).long()  # [B, T + 1]
        x = self.embedding(tokens[:, :-1].clamp(min=0)) + self.position.weight[: tokens.shape[1] - 1]  # [B, T, D]
        logits = self.head(self.norm(self.blocks(x))).float()  # [B, T, V + 1]
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], ignore_index=-1, reduction="none")


def dedupe(units):
    units = np.array(units, dtype=np.int32)  # of 6,000 hours a list would not fit
    return units[np.diff(units, prepend=-1) != 0]


def read_deduped(path, **expected):
    header, units = read_units(path, **expected)
    return header, {file: dedupe(sequence) for file, sequence in units.items()}


class UnitBatches(data.Batches):
    """Micro-batch i, for any i, in the order of data.Batches; what is longer than the context is cropped at random."""

    def __init__(self, units, o, boundary, group):
        self.tokens = [np.append(sequence, np.int32(boundary)) for sequence in units.values()]
        self.seed, self.budget, self.group, self.classes = (o.seed,), o.batch_tokens, group, None
        self.boundary = boundary
        self.lengths = np.minimum([len(tokens) for tokens in self.tokens], o.context)
        self.buckets = {"": self.make_buckets(np.arange(len(units)))}
        self.per_epoch = len(self.order(0))
        require(self.per_epoch, f"--batch-tokens {o.batch_tokens}: {len(units)} utterances make no {group} batches")

    def __getitem__(self, i):
        epoch, at = divmod(i, self.per_epoch)
        rows = []
        for j in self.order(epoch)[at]:
            tokens, length = self.tokens[j], self.lengths[j]
            start = np.random.default_rng([*self.seed, epoch, j]).integers(len(tokens) - length + 1)
            rows.append(np.concatenate([[self.boundary], tokens[start : start + length]]))
        return rows


def lm_step(lm, optimizer, micro_batches, lr, o, place):
    """One optimizer step. The loss is a mean over the tokens of all ranks and micro-batches, as in pretraining."""
    optimizer.zero_grad(set_to_none=True)
    count = sum(len(row) - 1 for rows in micro_batches for row in rows)
    total, loss = all_sum(torch.tensor(float(count), device=place.device)), 0
    for rows in micro_batches:
        with autocast(o, place):
            part = lm(rows).sum() / total
        part.backward()
        loss = loss + part.detach()
    return {"loss": all_sum(loss), "tokens": total, **update(optimizer, lr, o)}


def train_lm(arguments):
    o, _ = parse_options(LMOptions, LM_PRESETS, argv=arguments)
    require(o.units, "lm needs --units, a file that 'evaluate.py units' writes")
    for name in ("steps", "layers", "heads", "context", "accumulate", "log_every", "save_every"):
        require(getattr(o, name) >= 1, f"--{name.replace('_', '-')} {getattr(o, name)}: at least 1")
    require(o.dim >= 1 and o.dim % o.heads == 0, f"--dim {o.dim}: a multiple of --heads {o.heads}")
    require(o.lr > 0 and o.clip > 0 and 0 <= o.dropout < 1, "lr and clip are positive, dropout is in [0, 1)")
    place = setup(o)
    torch.manual_seed(o.seed)

    # ---- data, model, optimizer
    header, units = read_deduped(o.units)
    valid = read_deduped(o.valid, **same_units(header))[1] if o.valid else {}
    sizes = dict(codewords=header["codewords"], layers=o.layers, dim=o.dim, heads=o.heads, context=o.context)
    lm = UnitLM(**sizes, dropout=o.dropout).to(place.device)
    batches = UnitBatches(units, o, lm.boundary, place.world * o.accumulate)
    optimizer = make_optimizer(lm, o)

    # ---- resume
    tokens = sum(map(len, units.values()))
    checkpoint, first, state = open_run(o, header | dict(utterances=len(units), tokens=tokens), lm, place), 0, None
    if checkpoint:
        spidr.load_state(lm, checkpoint["model"], o.out)
        optimizer.load_state_dict(checkpoint["optimizer"])
        first, state = int(checkpoint["step"]), checkpoint["log"]
        if first >= o.steps:
            return finished(o, place)
    log, stop = Log(o, place, first, state), Stop(place)

    # ---- loop
    for step in range(first, o.steps):
        seed_step(o.seed, step, place.rank)
        lr, micro = lr_at(step, o), range(step * o.accumulate, (step + 1) * o.accumulate)
        metrics = lm_step(lm.train(), optimizer, [batches[i * place.world + place.rank] for i in micro], lr, o, place)
        done, stopping, more = step + 1, stop.agreed(step + 1), {}
        saving = done % o.save_every == 0 or o.keep_every and done % o.keep_every == 0 or done == o.steps
        if valid and saving:
            sums = log_likelihoods(lm, list(valid.values())[place.rank :: place.world]).sum(0)
            total, count = all_sum(torch.from_numpy(sums).float().to(place.device)).tolist()
            more = {"valid_loss": -total / count}
        log.step(done, metrics, due=saving or stopping, lr=lr, **more)
        if saving or stopping:
            save_checkpoint(o, place, lm.state_dict(), optimizer, done, log, lm=sizes, units=header)
        if stopping and done < o.steps:
            stopped(log, done)
    log.close()
    if place.first:
        print(f"{o.out}: {o.steps} steps on {len(units)} utterances, {tokens} units without repetitions; last:",
              *(f"{name} {log.record[name]:.3f}" for name in ("loss", "valid_loss") if name in log.record))
        print(f"next: python evaluate.py swuggy --lm {o.out} --model {header['model']} --data DIR")


def same_units(header):  # not the name: a model may have several
    return {name: header[name] for name in ("hash", "layer", "frame_rate", "codewords")}


def load_lm(path, device=None):
    path, checkpoint = spidr.read_checkpoint(path)
    require("lm" in checkpoint and "units" in checkpoint, f"{path}: not a language model; 'evaluate.py lm' trains one")
    lm = spidr.load_state(UnitLM(**checkpoint["lm"]), checkpoint["model"], path)
    lm.units = checkpoint["units"]
    return lm.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@torch.no_grad()
def log_likelihoods(lm, sequences, batch_tokens=16_384):
    """[sequences, 2]: the sum of log p(unit | the boundary, all units before it) over the units, and their number.

    Neither boundary counts: the first is given, and for a word that stands alone the last is out of place. In what is
    longer than the context, windows overlap by half, so that a unit sees half a context or more.
    """
    step, pieces = (lm.context + 1) // 2, []  # (sequence, tokens, how many of them were scored in the window before)
    for s, units in enumerate(sequences):
        tokens = np.concatenate([[lm.boundary], dedupe(units)])
        for i in range(0, max(1, len(tokens) - 1 - lm.context + step), step):
            pieces.append((s, tokens[i : i + lm.context + 1], lm.context - step if i else 0))
    pieces.sort(key=lambda piece: len(piece[1]))
    sums = np.zeros((len(sequences), 2))
    lm.eval()
    while pieces:
        n = max(1, batch_tokens // len(pieces[-1][1]))  # the longest come first
        pieces, batch = pieces[:-n], pieces[-n:]
        losses = lm([tokens for _, tokens, _ in batch]).cpu().double().numpy()
        for (s, tokens, skip), row in zip(batch, losses):
            sums[s] += -row[skip : len(tokens) - 1].sum(), len(tokens) - 1 - skip
    return sums


def score_units(lm, sequences, batch_tokens=16_384):
    """For each sequence of units: its log-likelihood over its length, both without repetitions."""
    return [total / count for total, count in log_likelihoods(lm, sequences, batch_tokens).tolist()]


# ======== sWUGGY, sBLIMP, tSC ========


class Side(NamedTuple):
    """One side of a pair, by one voice."""

    id: str
    voice: str
    correct: bool
    file: str
    groups: list  # what it counts in
    where: str  # "gold.csv:line", for messages


def frequency_band(text):
    count = 0 if text.strip().lower() == "oov" else float(text)
    if not 0 <= count < math.inf:
        raise ValueError(text)
    bands = {"oov": 0, "1 to 5": 5, "6 to 20": 20, "21 to 100": 100, "above 100": math.inf}  # ZeroSpeech's
    band = next(f"frequency {name}" for name, most in bands.items() if count <= most)
    return [band, "in vocabulary"] if count > 0 else [band]


# The folder a task has in ZeroSpeech; the column of gold.csv that groups the pairs, and the groups of a value.
TASKS = {"swuggy": ("lexical", "frequency", frequency_band), "tsc": ("tsc", None, None),
         "sblimp": ("syntactic", "type", lambda text: [f"type {text}"])}


def read_pairs(folder, column, groups):
    sides, path = [], folder / "gold.csv"
    if not column:  # tSC has no gold.csv
        for path in sorted(folder.glob("*.wav")):
            id, separator, side = path.stem.rpartition("_")
            if separator and side in ("correct", "incorrect"):
                sides.append(Side(id, "", side == "correct", path.stem, ["all"], path))
        return sides
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file, restval="")
        missing = {"id", "filename", "voice", "correct", column} - set(reader.fieldnames or [])
        require(not missing, f"{path}:1: the header has no column {', '.join(sorted(missing))}")
        for row in reader:
            where, name = f"{path}:{reader.line_num}", row["filename"].removesuffix(".wav")
            require(row["correct"] in ("0", "1"), f"{where}: correct is {row['correct']!r}, not 0 or 1")
            try:
                found = ["all", *groups(row[column])]
            except ValueError:
                raise InputError(f"{where}: {column} is {row[column]!r}, neither a number nor oov") from None
            sides.append(Side(row["id"], row["voice"], row["correct"] == "1", name, found, where))
    return sides


def pair_accuracy(sides, scores):
    """{pair: how often its right side scores more, ties by half, a mean over its voices}. scores {file: score}"""
    found, wins = {}, {}
    for side in sides:
        found.setdefault((side.id, side.voice), ([], []))[side.correct].append(side)
    for (id, voice), (wrong, right) in found.items():
        require(wrong and right, f"{(wrong + right)[0].where}: this side of pair {id} {voice} has no other side")
        margins = [scores[r.file] - scores[w.file] for r in right for w in wrong]
        wins.setdefault(id, []).append(np.mean([(margin > 0) + (margin == 0) / 2 for margin in margins]))
    return {id: float(np.mean(voices)) for id, voices in wins.items()}


def units_of_pairs(args, lm, folder, sides):
    """{file: units} of what the sides name, made as those that the language model was trained on."""
    wanted = {side.file: side.where for side in sides}
    if args.units:
        units = read_deduped(args.units, **same_units(lm.units))[1]
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
    require(encoder.hash == lm.units["hash"], f"--model {args.model}: other weights than those of {lm.units['model']}, "
            f"on whose units --lm {args.lm} was trained")
    return dict(extract_units(rows, encoder, layer))


def run_pairs(args):
    require(bool(args.model) != bool(args.units), f"{args.verb} takes --model, or --units of the wav files")
    task, column, groups = TASKS[args.verb]
    folder = Path(args.data, "dev") if Path(args.data, "dev").is_dir() else Path(args.data)
    lm, sides = load_lm(args.lm), read_pairs(folder, column, groups)
    require(sides, f"{folder}: no pairs")
    pair_accuracy(sides, dict.fromkeys((side.file for side in sides), 0))  # a missing side shows before the work
    units = units_of_pairs(args, lm, folder, sides)
    scores = dict(zip(units, score_units(lm, list(units.values()))))
    print(f"{args.verb}, {args.lm}, units of layer {lm.units['layer']} of {lm.units['model']}")
    print(f"{'':20} accuracy, %   pairs")
    results = {}
    for group in sorted({group for side in sides for group in side.groups}):
        pairs = pair_accuracy([side for side in sides if group in side.groups], scores)
        results[group] = dict(accuracy=100 * float(np.mean(list(pairs.values()))), pairs=len(pairs))
        print(f"{group:20} {results[group]['accuracy']:11.2f} {len(pairs):7}")
    if args.out:
        out = Path(args.out, task, "dev.txt")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(f"{name} {score:.6f}\n" for name, score in sorted(scores.items())))
        record = dict(lm=args.lm, **lm.units, results=results)
        Path(args.out, f"{args.verb}.json").write_text(json.dumps(record, indent=1) + "\n")
    return results


# ======== the report ========


def toy_abx(encoders, toy):
    """ABX on the toy world, a few tokens a cell: {name: [layers, 4]}, the mean of the unseen languages within and
    across speakers, then a seen language."""
    errors = {name: [] for name in encoders}
    for language in data.TARGETS + data.EVAL_SOURCES[:1]:
        rows, items = data.read_manifest(toy / "eval" / f"{language}.csv"), toy / "eval" / f"{language}.item"
        for name, encoder in encoders.items():
            found, layers = dict(extract(rows, encoder.encode, range(encoder.layers))), []
            for i in range(encoder.layers):
                features = {file: outputs[i] for file, outputs in found.items()}
                layers.append([abx(features, items, speaker, max_size_group=5, max_x_across=2)
                               for speaker in ("within", "across")])
            errors[name].append(layers)
    return {name: np.hstack([np.mean(unseen, 0), seen]) for name, (*unseen, seen) in errors.items()}


def print_toy_abx(toy, runs):
    """A line each for MFCC, a fresh network of the first run's shape, and the runs {name: path}: the layer that is best
    on unseen languages, and its errors. -> the encoders, and the errors as of toy_abx"""
    config, encoders = Path(next(iter(runs.values())), "config.json"), {}
    try:
        data.import_torchaudio("the MFCC baseline")
        encoders["mfcc"] = load_encoder("mfcc")
    except InputError as error:
        print(error)
    torch.manual_seed(json.loads(config.read_text())["options"]["seed"])
    encoders["untrained"] = spidr_encoder("untrained", spidr.SpidR(spidr.read_config(config)).eval())
    encoders |= {name: load_encoder(str(path)) for name, path in runs.items()}
    errors = toy_abx(encoders, Path(toy))
    print(f"{'ABX error, %':24} {'layer':>5} {'unseen: within':>15} {'across':>7} {'seen: within':>15} {'across':>7}")
    for name, layers in errors.items():
        best = layers[:, 1].argmin()
        print(f"{name:24} {best + 1:>5} " + "{:15.2f} {:7.2f} {:15.2f} {:7.2f}".format(*layers[best]))
    return encoders, errors


def newest_runs(folder="runs"):
    """{stage: its newest run on the toy world that has a checkpoint}."""
    found = {}
    for path in sorted(Path(folder).glob("*/last.pt"), key=lambda path: path.stat().st_mtime):
        try:
            options = json.loads((path.parent / "config.json").read_text())["options"]
        except (OSError, ValueError, KeyError):  # not ours
            continue
        stage = {"foblo": "meta", "reptile": "meta"}.get(options.get("method"), "adapt" if "budget" in options else
                                                         "pretrain" if "supervised_every" in options else "lm")
        if stage != "lm" and not options.get("manifest") and not options.get("audio"):
            found[stage] = path.parent, options
    require(found, f"{folder}: no run on the toy world; 'python pretrain.py' makes one")
    return {stage: found[stage] for stage in ("pretrain", "meta", "adapt") if stage in found}


def report(out="runs"):
    """Without a verb: the newest run of each stage on the toy world. The first time a language model is trained too."""
    began, runs = time.time(), newest_runs(out)
    path, options = next(iter(runs.values()))
    toy = Path(options["toy"])
    data.check_toy(toy)
    encoders, errors = print_toy_abx(toy, {f"{stage}: {path}": path for stage, (path, _) in runs.items()})

    language, name = data.LM_LANGUAGE, f"{next(iter(runs))}: {path}"
    first = encoders[name]
    below = first.layers - first.codebooks  # layers without units; of the others the best in the LM's own language
    layer = below + 1 + int(errors[name][below:, 3].argmin())
    print(f"\nunits of layer {layer}, {language}")
    qualities = {}
    for name, encoder in encoders.items():
        if not encoder.codebooks:
            continue
        units = dict(extract_units(data.read_manifest(toy / "eval" / f"{language}.csv"), encoder, layer))
        phones = {file: p for file, (p, _) in data.read_alignments(toy / "eval" / f"{language}_alignments.csv").items()}
        qualities[name] = quality(units, phones, encoder.codewords)
        print(f"{name:24} " + "  ".join(f"{key} {value:.3g}" for key, value in qualities[name].items()))

    lm = toy_lm(path, f"{first.hash}_{layer}", layer, toy, Path(out))
    pairs = {}
    for task in ("swuggy", "sblimp", "tsc"):
        print()
        folder = toy / "lm" / TASKS[task][0]
        pairs[task] = run_pairs(parse([task, "--lm", str(lm), "--model", str(path), "--data", str(folder)]))
    curves = {f"{stage}: {path}": [json.loads(x) for x in open(path / "metrics.jsonl") if step_of(x) < math.inf]
              for stage, (path, _) in runs.items()}
    draw(Path(out) / "report.svg", errors, curves)
    record = dict(abx={name: x.tolist() for name, x in errors.items()}, quality=qualities, pairs=pairs)
    Path(out, "report.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{out}/report.json, {out}/report.svg; {time.time() - began:.0f} s")


def toy_lm(path, name, layer, toy, out):
    """The folder of a language model on the units of a run, trained if it is not there yet."""
    units, folder = out / f"units_{name}.jsonl", out / f"lm_{name}"
    if not units.exists():
        write_units(parse(["units", "--model", str(path), "--audio", str(toy / "lm" / "train.csv"),
                           "--layer", str(layer), "--out", str(units)]))
    train_lm(["--preset", "tiny", "--units", str(units), "--out", str(folder)])
    return folder


def draw(path, errors, curves):
    """Four plots side by side, plain SVG: ABX by layer on unseen languages, and the curves of a run's health."""
    deepest, lines = max(map(len, errors.values())), {}
    for name, layers in errors.items():
        across = layers[:, 1].tolist()
        lines[name] = list(enumerate(across if len(across) > 1 else across * deepest, 1))  # one layer: a level line
    plots = [("unseen languages: ABX across, %, by layer", lines)]
    for key in ("loss", "target_ppl", "phone_accuracy"):
        lines = {name: [(r["step"], r[key]) for r in log if key in r] for name, log in curves.items()}
        plots.append((f"{key}, by step", {name: line for name, line in lines.items() if line}))
    write_svg(path, plots)


def write_svg(path, plots, ticks=None):
    names = dict.fromkeys(name for _, lines in plots for name in lines)  # each has one colour throughout
    colours = dict(zip(names, itertools.cycle(("#888", "#c93", "#36c", "#393", "#a3a", "#c33"))))
    shapes = [plot(title, lines, 330 * i, colours, ticks) for i, (title, lines) in enumerate(plots) if lines]
    Path(path).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{330 * len(plots)}" height="290" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(shapes)}</svg>\n')


def plot(title, lines, left, colours, ticks=None):
    """One plot of {name: [(x, y)]}, 330 x 290, with its axes' ends, or {x: what stands there}, and a legend."""
    xs, ys = ([point[i] for line in lines.values() for point in line] for i in (0, 1))
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))

    def at(x, y):
        return left + 45 + 265 * (x - x0) / ((x1 - x0) or 1), 190 - 160 * (y - y0) / ((y1 - y0) or 1)

    parts = [f'<text x="{left + 45}" y="18" font-size="12">{title}</text>',
             f'<path d="M{left + 45} 26V194H{left + 312}" fill="none" stroke="black"/>']
    marks = [(f"{y1:.3g}", left + 41, 34, "end"), (f"{y0:.3g}", left + 41, 193, "end")]
    marks += [(text, at(x, 0)[0], 208, "middle") for x, text in (ticks or {x: f"{x:g}" for x in (x0, x1)}).items()]
    parts += [f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{text}</text>' for text, x, y, anchor in marks]
    for i, (name, line) in enumerate(lines.items()):
        points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="1.5"/>')
        parts.append(f'<text x="{left + 45}" y="{224 + 13 * i}" fill="{colours[name]}">{name}</text>')
    return "".join(parts)


def compare(args):
    """Adapted runs by what they started from: ABX across speakers, mean over languages, mean and spread over seeds.
    NAME<seed>-<language>.json, as `abx --out` writes it, stands for a model that is not adapted: a level line."""
    nest = lambda: defaultdict(nest)
    errors, amounts = nest(), {0: "none"}  # [name][layer][seconds of audio][seed][language]; {seconds: as given}
    for path in sorted(map(Path, args.runs), key=lambda path: path.suffix == ".json"):
        require(path.suffix == ".json" or (path / "abx_after.json").exists(),
                f"{path}: no ABX there: adapt.py with --items writes it")
        try:
            if path.suffix == ".json":
                name, language = path.stem.split("-")
                o, files = dict(init=name, method="full", seed=name, items=language), dict.fromkeys(amounts, path)
            else:
                o = json.loads((path / "config.json").read_text())["options"]
                seconds = data.parse_seconds(o["budget"]) if o["budget"] else math.inf
                amounts[seconds] = o["budget"] or "all"
                files = {0: path / "abx_before.json", seconds: path / "abx_after.json"}
            init = Path(o["init"])
            name = (init.parent if init.suffix == ".pt" else init).name.rstrip("0123456789")
            name += f", {o['method']}" if o["method"] != "full" else ""
            for amount, file in files.items():
                for r in json.loads(file.read_text()):
                    if r["speaker"] == "across":
                        errors[name][r["layer"]][amount][o["seed"]][o["items"] or o["language"]] = r["error"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not an adapted run, nor NAME-LANGUAGE.json: {error}") from None

    lines, amounts = {}, dict(sorted(amounts.items()))
    columns = "".join(f"{text:>14}" for text in amounts.values())
    print(f"{'adapted from':24} {'layer':>5}{columns}   ABX across, %")
    for name, layers in sorted(errors.items()):
        means = {layer: {amount: [np.mean(list(languages.values())) for languages in seeds.values()]
                         for amount, seeds in by_amount.items()} for layer, by_amount in layers.items()}
        after = {layer: sum(np.mean(x) for amount, x in some.items() if amount) for layer, some in means.items()}
        layer = args.layer or min(after, key=after.get)
        require(layer in means, f"--layer {layer}: {name} has layers {min(means)} to {max(means)}")
        lines[name] = [(i, np.mean(means[layer][a])) for i, a in enumerate(amounts) if a in means[layer]]
        shown = [f"{np.mean(x):.2f} ±{np.std(x):5.2f}" if x else "" for x in map(means[layer].get, amounts)]
        print(f"{name:24} {layer:>5}" + "".join(f"{text:>14}" for text in shown))
    if args.out:
        write_svg(args.out, [("ABX across, %, by audio to adapt to", lines)], dict(enumerate(amounts.values())))


# ======== command line ========


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def parse(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", metavar="verb")

    def verb(name, function, summary):
        command = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(function=function)
        return command.add_argument

    models = f"a run's folder, a checkpoint, or {', '.join(BASELINES)}"
    longest = "seconds of a recording that go in one pass; a longer one goes in windows of so much [60]"
    for name, function, what in (("features", write_features, "a folder"), ("units", write_units, "a JSONL file")):
        add = verb(name, function, f"writes {name} of audio to {what}")
        add("--model", required=True, help=models)
        add("--audio", required=True, help="a folder of audio, a manifest or one file")
        add("--out", required=True, help=what)
        add("--layer", type=positive, help="counted from 1 [the second that has a codebook; a baseline's middle one]")
        add("--longest", type=positive, default=60, help=longest)
    add = verb("abx", run_abx, "ABX error by layer")
    add("--items", required=True, help="an item file")
    add("--model", help=models)
    add("--audio", help="a folder of audio, a manifest or one file")
    add("--features", help="a folder of .npy or .pt files [T, D], instead of --model and --audio")
    add("--layer", type=lambda text: text if text == "all" else positive(text), default="all",
        help="counted from 1 [all]")
    add("--longest", type=positive, default=60, help=longest)
    add("--speaker", choices=["within", "across", "both"], default="both")
    add("--context", choices=["within", "any"], default="within")
    add("--distance", choices=["angular", "euclidean", "kl", "identity"], default="angular")
    add("--max-size-group", type=positive, help="tokens of a phone in a cell, 10 in ZeroSpeech [all]")
    add("--max-x-across", type=positive, help="speakers of X for an A and B, 5 in ZeroSpeech [all]")
    add("--seed", type=int, default=0, help="of that choice [0]")
    add("--out", help="a JSON file")
    verb("lm", None, "trains a language model on units; its options: evaluate.py lm --help")
    for name in TASKS:
        add = verb(name, run_pairs, f"accuracy of a language model on the pairs of {name}")
        add("--lm", required=True, help="a run's folder or a checkpoint of 'lm'")
        add("--model", help="whose units it was trained on")
        add("--units", help="units of the wav files, instead of --model")
        add("--data", required=True, help="a folder with wav files and gold.csv "
            "(tsc: ID_correct.wav, ID_incorrect.wav), or with such a dev/")
        add("--out", help="a folder: the scores as the challenge wants them, and a JSON file")
    add = verb("compare", compare, "adapted runs side by side: ABX before and after, by amount of audio")
    add("runs", nargs="+", help="folders that adapt.py wrote, with ABX before and after, or NAME-LANGUAGE.json of abx")
    add("--layer", type=positive, help="counted from 1 [of each model the one with the lowest errors]")
    add("--out", help="an SVG file")
    add = verb("quality", run_quality, "PNMI, purities, perplexity and bitrate of units")
    add("--units", required=True, help="as 'units' writes them")
    add("--alignments", required=True, help="CSV fileid,phones,language: a phone every 10 ms")
    add("--out", help="a JSON file")
    return parser.parse_args(arguments)


def main():
    if sys.argv[1:2] == ["lm"]:  # its options are a dataclass, like those of the training scripts
        return train_lm(sys.argv[2:])
    args = parse()
    if getattr(args, "out", None):  # what cannot be written is told before the work
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    args.function(args) if args.verb else report()


if __name__ == "__main__":
    run(main)
