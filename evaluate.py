"""Evaluation: features and units, ABX, and the quality of units (SpidR, arXiv 2512.20308).

    python evaluate.py features --model M --audio A --out FOLDER [--layer L]
    python evaluate.py units    --model M --audio A --out U.jsonl [--layer L] [--dedupe]
    python evaluate.py units    --model M --audio A --textgrid FOLDER [--alignments P]
    python evaluate.py abx      --items X.item (--model M --audio A | --features FOLDER)
    python evaluate.py quality  --units U.jsonl --alignments P [--track one-to-one]
    python evaluate.py discophon ...                              extras/discophon.py
    python evaluate.py lm | swuggy | sblimp | tsc | ssc  ...      extras/unit_lm.py

`features` writes the output of a layer for each recording, [T, D], and `units` the codewords that
the layer's head predicts, [T], both at 50 Hz; frame i is centred at (i + 1/2) / 50 s. `abx` asks
whether a token of a phone is nearer to another token of that phone than to a token of another one:
0% is perfect, 50% is chance, good models reach 3 to 6%. `quality` compares units with phones.
`discophon` is a benchmark of phoneme discovery, `lm` trains a language model on units, and the last
four ask it which of two recordings is a word, is grammatical, or is the right end of a story.

M is a run, a checkpoint, a released model's name, or a baseline: mfcc, wav2vec2_base, hubert_base,
wavlm_base. A is a folder of audio, a manifest, or one file. Layers count from 1. Features and units
carry a hash of their model's weights, so a language model is never fed another model's units.
docs/evaluation.md explains the measures, the benchmarks' folders and all formats.
"""

import argparse
import gzip
import hashlib
import importlib
import json
import math
import os
import shutil
import sys
import zlib
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from statistics import fmean
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import pretrain
from model import InputError, entropy, load, require, run

RATE = 50  # frames a second
HOP, FIELD = 320, 400  # samples from one frame to the next, and samples that a frame sees


# ======== features and units ========


class Encoder(NamedTuple):
    """A model that turns audio into frames: one of our networks, or a baseline, which has no units.
    `encode` and `units` take a waveform [N] of variance 1 and return {layer: frames}."""

    name: str
    hash: str  # of the weights
    layers: int  # L
    codebooks: int  # K, of the last K layers
    codewords: int  # V
    encode: Callable  # -> {layer: its output [T, D]}
    units: Callable = None  # -> {layer: the units [T] that its head predicts}

    def layer(self, wanted=None, units=False):
        """The layer asked for. By default the second that has a codebook, where phones are usually
        clearest (6 of 12 in base); of a baseline the middle one."""
        require(self.codebooks or not units, f"{self.name} has no codebooks, so it makes no units")
        first = self.layers - self.codebooks + 1  # that has a codebook
        usual = min(first + 1, self.layers) if self.codebooks else max(1, self.layers // 2)
        layer, lowest = wanted or usual, first if units else 1
        require(lowest <= layer <= self.layers, f"--layer {layer}: {self.name} has "
                f"{'units of ' if units else ''}layers {lowest} to {self.layers}")
        return layer


@torch.no_grad()
def frames_of(wav, make, layers, longest=60):
    """{layer: its frames} of a waveform [N], as `make`, an encoder's encode or units, gives them.
    More than `longest` seconds are encoded in windows."""
    parts = defaultdict(list)
    for begin, end, keep in windows(len(wav), longest):
        outputs = make(wav[begin:end])
        for layer in layers:
            parts[layer].append(outputs[layer][keep].cpu())
    return {layer: torch.cat(part) for layer, part in parts.items()}


def extract(rows, encoder, layers, units=False, longest=60):
    """Yields (fileid, {layer: its frames [T, D], or its units [T]}) for each recording."""
    require(len({row.fileid for row in rows}) == len(rows), "a fileid names several recordings: "
            "give the manifest a column fileid in which all are different")
    for row in tqdm(rows, "audio", unit="file", leave=False, disable=None):
        make = encoder.units if units else encoder.encode
        yield row.fileid, frames_of(read_recording(row), make, layers, longest)


def units_and_durations(encoder, wav, layer=None):
    """What a unit language model takes: the units of a waveform [N] at 16 kHz without repetitions,
    and how many frames of 20 ms each of them lasts."""
    layer = encoder.layer(layer, units=True)
    return runs(frames_of(data.standardise(wav), encoder.units, [layer])[layer].numpy())


def runs(labels):
    """An array of the labels without repetitions, and how often each is repeated."""
    labels = np.asarray(labels)
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    return labels[starts], np.diff(starts, append=len(labels))


def dedupe(labels):
    return runs(labels)[0]


# ======== ABX: the distance of two tokens ========


def angular(x, y):  # of frames of length 1: their angle, in half turns
    return (x @ y.T).clamp_(-1, 1).acos_().div_(math.pi)


def euclidean(x, y):  # A product of matrices would lose the small distances.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def identity(x, y):  # of units
    return (x[:, :1] != y[:, 0]).float()


DISTANCES = {"angular": angular, "euclidean": euclidean, "identity": identity}  # -> [Fx, Fy]


def dtw(d, tx, ty):
    """Dynamic time warping of P pairs of tokens, x and y: the mean distance of their frames along
    the path with the smallest sum, [P].

    d[i, j, p] is the distance of frame i of x from frame j of y in pair p, which have tx[p] and
    ty[p] frames. What lies beyond these is padding and changes nothing.
    """
    height, width, pairs = d.shape
    # cost[k, i] is the sum along the best path to the i-th frame of x and the j-th of y, where
    # j = k - i, and length[k, i] the number of frames on this path. Both depend on k - 1 and k - 2
    # only, so a whole diagonal k is computed at once.
    cost = np.empty((height + width + 1, height + 1, pairs), np.float32)
    length = np.zeros(cost.shape, np.int16)
    border = np.arange(height + 1)
    cost[:, 0] = cost[border, border] = np.inf  # i = 0 and j = 0: no frames
    cost[0, 0] = 0
    for k in range(2, height + width + 1):
        here = slice(max(1, k - width), min(k - 1, height) + 1)
        i, above = np.arange(height + 1)[here], slice(here.start - 1, here.stop - 1)
        diagonal, left, up = (k - 2, above), (k - 1, here), (k - 1, above)
        # Of equal sums the path prefers the diagonal, then the step along y.
        straight = np.minimum(cost[left], cost[up])
        steps = choose(cost[left] <= cost[up], length[left], length[up])
        length[k, here] = 1 + choose(cost[diagonal] <= straight, length[diagonal], steps)
        cost[k, here] = d[i - 1, k - i - 1] + np.minimum(cost[diagonal], straight)
    end = tx + ty, tx, np.arange(pairs)
    return cost[end] / length[end]  # (13)


def choose(condition, a, b):  # np.where(condition, a, b), several times as fast
    return b + condition * (a - b)


# ======== ABX: triples and cells ========


def abx_pools(items, context, max_size_group, random):
    """{(context, speaker): pool}. A pool, {phone: its tokens' numbers}, has the tokens of a speaker
    in a context, from which A and B are taken."""
    pools = defaultdict(lambda: defaultdict(list))
    order = range(len(items)) if max_size_group is None else random.permutation(len(items))
    for n in order:  # As in fastabx, a token that is left out plays no role in any cell.
        item = items[n]
        group = pools[item.context if context == "within" else "", item.speaker][item.phone]
        if max_size_group is None or len(group) < max_size_group:
            group.append(n)
    return {key: dict(sorted(pool.items())) for key, pool in sorted(pools.items())}


def abx_groups(pools, speaker, max_x_across, random):
    """[(context, speaker of A and B, phone of A and X, speaker of X)]: the groups of X for which
    there are an A and a B."""
    speakers, groups = defaultdict(list), []
    for (context, who), pool in pools.items():
        for phone in pool:
            speakers[context, phone].append(who)
    for (context, who), pool in pools.items():
        for phone, tokens in pool.items() if len(pool) > 1 else ():
            if speaker == "within":
                others = [who] * (len(tokens) > 1)  # X is a token of the pool, and A another one
            else:
                others = [other for other in speakers[context, phone] if other != who]
                if max_x_across is not None:
                    others = random.permutation(others)[:max_x_across]
            groups += [(context, who, phone, other) for other in others]
    return groups


def errors(to_a, to_b):
    """From an X's distances from all A and from all B: for each B the share of A with which the
    triple is wrong. It is wrong if X is nearer to B than to A. A tie counts half."""
    to_a = to_a[:, None]
    return ((to_a > to_b).sum(0) + (to_a == to_b).sum(0) / 2) / len(to_a)  # (13)


def abx_cells(pools, groups, tokens, distance):
    """{(A, B, speaker of A and B): each cell's error}, and the number of triples. A cell is all
    triples of one A, one B, one speaker, one context and one speaker of X."""
    cells, triples = defaultdict(list), 0
    rows = distances(pools, groups, tokens, DISTANCES[distance])
    for context, who, phone, x_speaker in groups:
        pool, wrong = pools[context, who], []
        ends = np.cumsum([len(numbers) for numbers in pool.values()])
        at = {name: slice(end - len(pool[name]), end) for name, end in zip(pool, ends)}
        x_count = len(pools[context, x_speaker][phone])
        for x, to_pool in zip(range(x_count), rows):
            to_a = to_pool[at[phone]]
            if x_speaker == who:
                to_a = np.delete(to_a, x)  # X is never its own A.
            wrong.append(errors(to_a, to_pool))
        wrong = np.mean(wrong, 0)
        for phone_b in pool:
            if phone_b != phone:
                cells[phone, phone_b, who].append(wrong[at[phone_b]].mean())
        triples += x_count * len(to_a) * (len(to_pool) - len(pool[phone]))
    return cells, triples


def abx_details(features, item_file, speaker="within", context="within", distance="angular",
                max_size_group=None, max_x_across=None, seed=0):
    """The error of abx(), with the number of items, cells and triples and a note on what was left
    out, as a dict."""
    random = np.random.default_rng(seed)
    items, tokens, note = abx_tokens(features, read_items(item_file), item_file, distance)
    pools = abx_pools(items, context, max_size_group, random)
    groups = abx_groups(pools, speaker, max_x_across, random)
    cells, triples = abx_cells(pools, groups, tokens, distance)
    require(cells, f"{item_file}: no cell for ABX {speaker} speaker, {context} context: no A, B "
            f"and X among {len(items)} items, {len({item.speaker for item in items})} speaker(s)")
    # (13) First the mean over contexts and speakers of X, then over speakers of A and B, then over
    # pairs (A, B). Where any context will do, the first two are one mean.
    pairs = defaultdict(list)
    for (a, b, _), shares in cells.items():
        pairs[a, b] += [fmean(shares)] if context == "within" else shares
    error = fmean(fmean(shares) for shares in pairs.values())
    return dict(error=100 * error, speaker=speaker, context=context, distance=distance,
                items=len(items), cells=sum(map(len, cells.values())), triples=triples,
                max_size_group=max_size_group, max_x_across=max_x_across, seed=seed, note=note)


def abx(features, item_file, speaker="within", context="within", **options):
    """The ABX error in percent. features {file: [T, D] at 50 Hz}; options as of abx_details.

    All items count unless you ask for a sample: ZeroSpeech 2021 keeps max_size_group=10 tokens of a
    phone in a cell and max_x_across=5 speakers of X.
    """
    details = abx_details(features, item_file, speaker, context, **options)
    if details["note"]:
        print(f"abx: {details['note']}", file=sys.stderr)
    return details["error"]


# ======== unit quality ========


def quality(units, phones, codewords=None, track="many-to-one"):
    """How well units, {file: [unit, ...]} at 50 Hz, stand for phones, {file: [phone, ...]} at
    100 Hz. Phones of any name count, silence too. `codewords` is V, by default the number of units
    that occur."""
    names, tracks = labelled_tracks(units, phones)
    table = count_table(tracks, names)
    phone_of = PHONE_OF[track](table, codewords)
    measures = information(table)
    seconds = sum(len(track) for track, _ in tracks) / RATE
    kept = sum(len(dedupe(track)) for track, _ in tracks)
    measures["bitrate"] = math.log2(codewords or measures["active"]) * kept / seconds
    measures["per"] = phone_error_rate(tracks, phone_of)
    return measures | boundaries(tracks, phone_of)


def count_table(tracks, names):
    """How often a phone and a unit coincide, in steps of 10 ms. [phones, units]"""
    table = np.zeros((len(names), 1 + max(units.max() for units, _ in tracks)))
    for units, labels in tracks:
        both = min(2 * len(units), len(labels))
        np.add.at(table, (labels[:both], units.repeat(2)[:both]), 1)
    return table


def information(table):
    """(14) PNMI = I(phone; unit) / H(phone), and what else the counts tell."""
    joint = table / table.sum()  # p(phone, unit)
    h_phone, h_unit, h_both = (entropy(torch.from_numpy(p)).item()  # in bits
                               for p in (joint.sum(1), joint.sum(0), joint.flatten()))
    return dict(pnmi=(h_phone + h_unit - h_both) / h_phone if h_phone > 0 else 0.0,  # (14)
                phone_purity=float(joint.max(0).sum()), cluster_purity=float(joint.max(1).sum()),
                perplexity=2**h_unit, active=int((joint.sum(0) > 0).sum()))


def by_frequency(table):
    """The phones, the most frequent first; of equals, as in DiscoPhon, the one that came later."""
    return np.argsort(table.sum(1), kind="stable")[::-1]


def many_to_one(table, codewords=None):
    """The phone of each unit: the one with which it coincides most, of equals the more frequent."""
    likely = by_frequency(table)
    return likely[table[likely].argmax(0)]


def one_to_one(table, codewords=None):
    """The phone of each unit where no two units share one: the assignment with which units and
    phones coincide most. It takes as many units as the language has phones, silence included."""
    phones, used = table.shape
    size = codewords or max(phones, used)
    require(phones <= size, f"one-to-one: {phones} phones, silence included, for {size} units: "
            "it takes a model with as many units as the language has phones, plus one")
    square = np.zeros((size, size))  # the rows at the end are of phones that do not occur
    likely = by_frequency(table)
    square[:phones, :used] = table[likely]
    from extras.assignment import assignment
    return np.append(likely, range(phones, size))[assignment(square)]


PHONE_OF = {"many-to-one": many_to_one, "one-to-one": one_to_one}  # DiscoPhon's two tracks


def phone_error_rate(tracks, phone_of):
    """(14) Edits that turn the units' phones into the true ones, over the number of these."""
    heard = [dedupe(phone_of[units]) for units, _ in tracks]
    said = [dedupe(labels) for _, labels in tracks]
    return sum(map(edit_distance, heard, said)) / sum(map(len, said))  # (14)


def boundaries(tracks, phone_of, tolerance=2):
    """(14) F1 and R-value of where labels change, in steps of 10 ms. A true boundary is hit if a
    predicted one lies within 20 ms. Where the windows of two true ones overlap they are cut at the
    midpoint, which belongs to the earlier one."""
    hits = true = predicted = 0
    for units, labels in tracks:
        said = np.flatnonzero(np.diff(labels)) + 1
        heard = 2 * (np.flatnonzero(np.diff(phone_of[units])) + 1)
        middles = np.array([-math.inf, *(said[1:] + said[:-1]) / 2, math.inf])
        begin = np.maximum(np.searchsorted(heard, said - tolerance, "left"),
                           np.searchsorted(heard, middles[:-1], "right"))
        end = np.searchsorted(heard, np.minimum(said + tolerance, middles[1:]), "right")
        hits += int((end > begin).sum())  # (14)
        true += len(said)
        predicted += len(heard)
    recall, excess = hits / max(true, 1), predicted / max(true, 1) - 1
    r1, r2 = math.hypot(1 - recall, excess), abs(recall - excess - 1) / math.sqrt(2)
    return dict(f1=2 * hits / max(true + predicted, 1), r_value=1 - (r1 + r2) / 2)


# ======== plumbing: skip at first reading ========
# ======== loading encoders, reading recordings ========

BASELINES = ("mfcc", "wav2vec2_base", "hubert_base", "wavlm_base")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_encoder(name, device=DEVICE):
    if name in BASELINES:
        from extras import baselines
        return baselines.encoder(name, device)
    return spidr_encoder(str(name), load(name, device))


def spidr_encoder(name, net):
    c, device = net.config, net.mask_embedding.device

    def encode(wav):
        outputs = net.encode(wav[None].to(device))
        return {layer: x[0] for layer, x in enumerate(outputs, 1)}

    def units(wav):  # what the student's heads predict, not the labels of the teacher
        with_codebook = range(c.layers - c.codebooks + 1, c.layers + 1)
        return dict(zip(with_codebook, net.units(wav[None].to(device))[:, 0]))

    return Encoder(name, hash_weights(net), c.layers, c.codebooks, c.codewords, encode, units)


def hash_weights(net):
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_recording(row):
    try:
        wav = data.standardise(data.read_audio(row.path))
        require(len(wav) >= FIELD, f"{len(wav)} samples are too short for a frame")
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from None
    return wav


def windows(samples, longest):
    """[(first sample, end sample, frames to keep)]. A recording of over `longest` seconds is cut
    into overlapping windows, of which the middle two thirds are kept: attention over an hour does
    not fit in memory, and the network has never seen one."""
    if samples <= longest * data.SAMPLE_RATE:
        return [(0, samples, slice(None))]
    frames, context, cuts = (samples - FIELD) // HOP + 1, longest * RATE // 6, []
    for first in range(0, frames, 4 * context):
        begin, end = max(0, first - context), min(first + 5 * context, frames)
        keep = slice(first - begin, first - begin + 4 * context)
        cuts.append((begin * HOP, (end - 1) * HOP + FIELD, keep))
    return cuts


# ======== quality: the files that count, and best matches ========


def labelled_tracks(units, phones):
    """The phones' names, as they occur, and for each file its units and its phones' numbers."""
    files = [file for file in phones if file in units]
    require(files, "quality: no file has both units and phones")
    if units.keys() != phones.keys():
        print(f"quality: {len(files)} files count; {len(units) - len(files)} files without phones "
              f"and {len(phones) - len(files)} without units are left out", file=sys.stderr)
    names, tracks = {}, []
    for file in files:
        track, labels = units[file], [names.setdefault(phone, len(names)) for phone in phones[file]]
        # A recording is up to 3 phones longer than its units.
        require(abs(2 * len(track) - len(labels)) <= data.ALIGNMENT_SLACK + 3, f"{file}: not of "
                f"the same audio: {len(track)} units at 50 Hz, {len(labels)} phones at 100 Hz")
        tracks.append((np.array(track), np.array(labels)))
    return [*names], tracks


def edit_distance(x, y):
    """How many insertions, deletions and substitutions turn x into y."""
    steps = np.arange(len(y) + 1, dtype=np.int32)
    row = steps  # from nothing to the first j labels of y
    for label in x:
        longer = row + 1  # x's label is deleted,
        longer[1:] = np.minimum(longer[1:], row[:-1] + (y != label))  # or it is y's, or made so,
        row = np.minimum.accumulate(longer - steps) + steps  # or labels of y are inserted
    return int(row[-1])


# ======== ABX: items and their frames ========


Item = namedtuple("Item", "file first end phone context speaker")  # frames from first to end - 1


def read_items(path):
    """The items of an item file, or of a CSV of words. Frame i belongs to one if
    onset <= (i + 1/2) / RATE <= offset.

    In decimals: an onset such as 0.29 would fall on the wrong side of a frame in floating point.
    """
    path, columns, items = Path(path), "file onset offset phone context speaker".split(), []
    for where, line in (lines_of_words if path.suffix == ".csv" else lines_of_items)(path):
        try:
            file, onset, offset, *more = map(line.__getitem__, columns)
            first = math.ceil(Decimal(onset) * RATE - Decimal("0.5"))
            end = math.floor(Decimal(offset) * RATE + Decimal("0.5"))
        except (KeyError, ArithmeticError, ValueError):
            raise InputError(f"{where}: not an item: {' '.join(line.values())[:80]!r}") from None
        items.append(Item(file, max(first, 0), end, *more))
    return items


def lines_of_items(path):
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    columns = "#file onset offset #phone prev-phone next-phone speaker".split()
    header, *lines = map(str.split, text.rstrip().split("\n"))
    require({*columns} <= {*header}, f"{path}:1: an item file begins with {' '.join(columns)}")
    for number, line in enumerate(lines, 2):
        fields = {name.strip("#"): value for name, value in zip(header, line)}
        if {"prev-phone", "next-phone"} <= fields.keys():
            fields["context"] = f"{fields['prev-phone']} {fields['next-phone']}"
        yield f"{path}:{number}", fields


def lines_of_words(path):
    """A word that was marked twice or more stands for a phone, in no context."""
    for where, line in data.read_table(path, "file", "onset", "offset", "word"):
        name = Path(line["file"])
        file = name.stem if name.suffix.lower() in data.AUDIO else line["file"]
        yield where, dict(line, file=file, phone=line["word"], context="",
                          speaker=line.get("speaker", ""))


def abx_tokens(features, items, item_file, distance):
    """-> the items that can be used, the frames [T, D] of each, and a line on the others."""
    frames, used, tokens, lost = {}, [], [], Counter()
    for file in {item.file for item in items} & features.keys():
        x = torch.as_tensor(features[file]).float().cpu()
        require(x.ndim <= 2 and x.sum().isfinite(), f"{file}: features must be finite and [T, D]")
        x = x if x.ndim == 2 else x[:, None]
        if distance == "angular":  # As in fastabx a frame of zeros points to (1, ..., 1).
            x = (x / x.norm(dim=1, keepdim=True)).nan_to_num_(1 / math.sqrt(x.shape[1]))
        frames[file] = x
    for item in items:
        token = frames.get(item.file, [])[item.first : item.end]
        if len(token):
            used.append(item)
            tokens.append(token)
            lost["cut short at the end of their features"] += len(token) < item.end - item.first
        elif item.file in frames:
            lost["left out, no frame lies within them"] += 1
        else:
            lost["left out, no features of their files"] += 1
    note = "; ".join(f"{n} of {len(items)} items {why}" for why, n in lost.items() if n)
    require(used, f"{item_file}: none of its {len(items)} items can be used: {note}")
    return used, tokens, note


# ======== ABX: many pairs at a time ========

ROWS = 32  # tokens x whose frames are compared with those of a pool in one product of matrices
CHUNK = 1 << 23  # distances of frames that a thread holds at a time


def distances(pools, groups, tokens, distance):
    """Yields for each X of these groups its distances [Y] from all tokens of its pool, A and B."""
    lengths = np.array([len(token) for token in tokens])
    chunks, size = [], CHUNK
    for (context, who), some in groupby(groups, key=lambda group: group[:2]):
        y = [n for numbers in pools[context, who].values() for n in numbers]
        x = [n for _, _, phone, x_speaker in some for n in pools[context, x_speaker][phone]]
        for rows in (x[i : i + ROWS] for i in range(0, len(x), ROWS)):
            if size >= CHUNK:
                chunks.append([])
                size = 0
            chunks[-1].append((rows, y))
            size += lengths[rows].sum() * lengths[y].sum()
    for blocks in in_threads(partial(align, tokens, distance), chunks):
        yield from chain.from_iterable(blocks)


def align(tokens, distance, chunk):
    """For each block of a chunk, the numbers of tokens x and of tokens y, their distances [X, Y].
    Pairs of like lengths, of whatever block, are padded and aligned together."""
    tables, pairs, size = [], [], 0
    for block in chunk:
        table = distance(*(torch.cat([tokens[n] for n in numbers]) for numbers in block))
        tx, ty = (np.array([len(tokens[n]) for n in numbers]) for numbers in block)
        # Frame i of an x and j of a y will be at flat[first + i * row + j].
        row = table.shape[1]
        first = size + (tx.cumsum() - tx)[:, None] * row + ty.cumsum() - ty
        pairs.append([one.ravel() for one in np.broadcast_arrays(first, row, tx[:, None], ty)])
        tables.append(table.flatten())
        size += table.numel()
    flat, (first, row, tx, ty) = torch.cat(tables).numpy(), np.concatenate(pairs, 1)
    d, kinds = np.empty(len(first), np.float32), tx // 6 * 1000 + ty // 6
    for kind in np.unique(kinds):  # pairs whose lengths are alike, in steps of 6 frames
        some = np.flatnonzero(kinds == kind)
        i, j = np.arange(tx[some].max())[:, None, None], np.arange(ty[some].max())[:, None]
        table = flat.take(first[some] + i * row[some] + j, mode="clip")
        d[some] = dtw(table, tx[some], ty[some])
    ends = np.cumsum([len(x) * len(y) for x, y in chunk])
    return [part.reshape(-1, len(y)) for part, (_, y) in zip(np.split(d, ends), chunk)]


def in_threads(work, jobs):
    """Yields work(job) for each job, in order; as many threads as torch uses are at work. Each of
    them works alone: to share out every small operation would cost more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for i in range(0, len(jobs), 16 * threads):  # so that few results wait
                yield from pool.map(work, jobs[i : i + 16 * threads])
    finally:
        torch.set_num_threads(threads)


# ======== files of units and features ========


def write_json(path, record):
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def read_json(path):
    """What is in the file, {} if there is none."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}") from None


def options_of(run):
    return read_json(Path(run, "config.json")).get("options", {})


def about(encoder, layer):
    return dict(model=encoder.name, hash=encoder.hash, layer=layer, frame_rate=RATE)


def meta_of(path):
    """X.meta.json, which says whose units those in X.jsonl are."""
    return Path(path).with_suffix(".meta.json")


def write_units(path, units, encoder, layer, deduplicated=False):
    """DiscoPhon's lines {"file", "units"}; deduplicated ones have "durations", too."""
    Path(path).unlink(missing_ok=True)
    write_json(meta_of(path), about(encoder, layer) | dict(codewords=encoder.codewords))
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as lines:
        for file, x in units:
            fields = zip(("units", "durations"), runs(x) if deduplicated else [x])
            record = dict(file=file) | {name: labels.tolist() for name, labels in fields}
            lines.write(json.dumps(record) + "\n")
    os.replace(part, path)  # only when it is whole


def read_labels(path, name):
    """{file: labels}, units or phones, of JSON lines {"file" or "name", NAME}, also in gzip.
    Deduplicated ones are repeated as often as their durations say."""
    labels = {}
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as x:
            for record in map(json.loads, x):
                file = record["file" if "file" in record else "name"]
                require(file not in labels, f"{path}: {file} is there twice")
                labels[file] = np.array(record[name])
                if "durations" in record:
                    labels[file] = labels[file].repeat(record["durations"])
    except (ValueError, KeyError, TypeError, EOFError, OSError, zlib.error) as error:
        raise InputError(f'{path}: not JSON lines {{"file", "{name}"}}: {error!r}') from None
    require(labels, f"{path}: empty")
    return labels


def read_phones(path, tier=None):
    """{file: phones, one every 10 ms}"""
    if str(path).endswith((".jsonl", ".jsonl.gz")):
        return read_labels(path, "phones")
    return {file: phones for file, (phones, _) in data.read_alignments(path, tier=tier).items()}


def read_units(path, like=None):
    """-> meta, {file: units [T]}. With `like`, the meta of other units, they must be of the same
    weights and layer; the model's name may differ, since a model may have several."""
    units, meta, like = read_labels(path, "units"), read_json(meta_of(path)), like or {}
    for key in like.keys() & {"hash", "layer", "codewords"}:
        value = meta.get(key)
        require(value == like[key], f"{path}: {key} is {value!r}, not {like[key]!r}")
    most = meta.get("codewords", 1 << 16)
    for file, x in units.items():
        fits = x.ndim == 1 and len(x) and x.dtype == int and 0 <= x.min() and x.max() < most
        require(fits, f"{path}: {file}: not a list of units from 0 to {most - 1}")
    return meta, units


def write_features(folder, features, encoder, layer):
    """FILEID.npy for each recording, and meta.json. The folder gets its name when it is whole."""
    part = Path(f"{Path(folder)}.part")
    if (part / "meta.json").exists():  # of a run that was killed, perhaps of another model
        shutil.rmtree(part)
    require(not part.exists(), f"{part} is there already: remove it")
    part.mkdir(parents=True)
    write_json(part / "meta.json", about(encoder, layer))
    for file, frames in features:
        path = part / f"{file}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, frames.numpy())
    os.replace(part, folder)


def read_features(folder, files):
    """{file: [T, D]} of those files whose .npy is in the folder, and its meta.json."""
    features = {}
    for file in files:
        path = Path(folder, data.file_name(file, folder) + ".npy")
        try:
            if path.exists():
                features[file] = torch.from_numpy(np.load(path))
        except (ValueError, TypeError, EOFError) as error:
            raise InputError(f"{path}: damaged, or no array of numbers: {error}") from None
    return features, read_json(Path(folder, "meta.json"))


# ======== the verbs features, units, abx, quality ========


def print_row(name, *cells):
    """A line of a table."""
    texts = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print(f"{name!s:24}", *(f"{text:>14}" for text in texts), flush=True)


def write_outputs(args):
    """The verbs features and units."""
    units = args.verb == "units"
    targets = [path for path in (args.out, units and args.textgrid) if path]
    require(targets, "units takes --out, --textgrid, or both")
    for path in targets:
        require(not Path(path).exists(), f"{path} is there already: name another one, or remove it")
    rows = data.read_manifest(args.audio)
    for row in rows:
        data.file_name(row.fileid, row.where)
    encoder = load_encoder(args.model)
    layer = encoder.layer(args.layer, units)
    frames = ((file, x[layer]) for file, x in extract(rows, encoder, [layer], units, args.longest))
    if units and args.textgrid:
        from extras import formats
        phones = read_phones(args.alignments, args.tier) if args.alignments else {}
        frames = formats.with_textgrids(frames, rows, Path(args.textgrid), phones)
    if not units:
        write_features(args.out, frames, encoder, layer)
    elif args.out:
        write_units(args.out, frames, encoder, layer, args.dedupe)
    else:
        for _ in frames:  # only the TextGrids are wanted
            pass
    print(f"{len(rows)} recordings, {args.verb} of layer {layer} of {encoder.name}, {RATE} a "
          f"second: {', '.join(targets)}")


def units_of(rows, encoder, layer=None):
    """{fileid: units [T]} of a layer."""
    layer = encoder.layer(layer, units=True)
    return {file: x[layer].numpy() for file, x in extract(rows, encoder, [layer], units=True)}


def abx_by_layer(args):
    """Yields (layer, features of the items' files)."""
    files = {item.file for item in read_items(args.items)}
    if args.features:
        features, meta = read_features(args.features, files)
        yield meta.get("layer", "-"), features
        return
    rows, encoder = data.read_manifest(args.audio, only=files), load_encoder(args.model)
    require(rows, f"{args.audio}: none of the {len(files)} files of {args.items}")
    layers = [encoder.layer(args.layer)] if args.layer else range(1, encoder.layers + 1)
    # A frame is 3 kB in base. Where those of all layers would take more than 4 GB, the audio is
    # passed over several times.
    at_once = max(1, 1_300_000 * HOP // sum(row.num_samples for row in rows))
    for some in (layers[i : i + at_once] for i in range(0, len(layers), at_once)):
        outputs = dict(extract(rows, encoder, some, longest=args.longest))
        for layer in some:
            yield layer, {file: x[layer] for file, x in outputs.items()}


def run_abx(args):
    require(bool(args.features) != bool(args.model and args.audio),
            "abx takes --features, or --model and --audio")
    speakers = ["within", "across"] if args.speaker == "both" else [args.speaker]
    print_row("ABX error, %", "layer", *(f"{speaker} speakers" for speaker in speakers))
    records = []
    for layer, features in abx_by_layer(args):
        scored, notes = {}, set()
        for speaker in speakers:
            try:
                scored[speaker] = details = abx_details(
                    features, args.items, speaker, args.context, args.distance,
                    args.max_size_group, args.max_x_across, args.seed)
                notes.add(details["note"])
            except InputError as error:  # of a single speaker there is no ABX across
                notes.add(str(error))
        require(scored, "; ".join(notes))
        shown = (scored[one]["error"] if one in scored else "-" for one in speakers)
        print_row(args.model or args.features, layer, *shown)
        records += [dict(layer=layer) | one for one in scored.values()]
    for one in scored.values():
        print(f"{one['speaker']} speakers, {args.context} context, {args.distance} distance: "
              f"{one['items']:,} items, {one['cells']:,} cells, {one['triples']:,} triples")
    for message in sorted(notes - {""}):
        print(message, file=sys.stderr)
    if args.out:
        write_json(args.out, records)


# name: (as it is shown, its factor, unit, what it means)
MEASURES = {
    "pnmi": ("PNMI", 100, "%", "of the information in the phones that the units carry"),
    "phone_purity": ("phone purity", 100, "%", "of the time a unit stands for its usual phone"),
    "cluster_purity": ("cluster purity", 100, "%", "of the time a phone gets its usual unit"),
    "perplexity": ("perplexity", 1, "units", "in use, weighted by how often"),
    "active": ("active", 1, "units", "that occur at all"),
    "bitrate": ("bitrate", 1, "bit/s", "of the units without repetitions"),
    "per": ("phone error rate", 100, "%", "of the phones; it can exceed 100"),
    "f1": ("boundary F1", 100, "%", "of the boundaries, within 20 ms"),
    "r_value": ("R-value", 100, "%", "of the boundaries, with a penalty for too many"),
}


def run_quality(args):
    meta, units = read_units(args.units)
    phones = read_phones(args.alignments, args.tier)
    measures = quality(units, phones, meta.get("codewords"), args.track)
    if meta:
        print(f"units of layer {meta['layer']} of {meta['model']}, {args.track}")
    for name, value in measures.items():
        shown, factor, unit, meaning = MEASURES[name]
        print(f"{shown:18}{factor * value:10.2f} {unit:6} {meaning}")
    if args.out:
        write_json(args.out, meta | dict(track=args.track) | measures)


# ======== command line ========


def run_elsewhere(args):
    """The code of a benchmark is in extras/."""
    name = "discophon" if args.verb == "discophon" else "unit_lm"
    return importlib.import_module(f"extras.{name}").run(args)


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


OPTIONS = {
    "--model": dict(help=f"a run, a checkpoint, a released model, or {', '.join(BASELINES)}"),
    "--audio": dict(help="a folder of audio, a manifest or one file"),
    "--features": dict(help="a folder of .npy files [T, D], instead of model and audio"),
    "--items": dict(help="an item file"),
    "--units": dict(help="as 'units' writes them; of pairs' wav files: instead of --model"),
    "--alignments": dict(help="a folder of TextGrids, a CSV, intervals, or JSON lines"),
    "--tier": dict(help="of TextGrids, that has the phones [phones, phone, MAU, segments]"),
    "--lm": dict(help="a run's folder or a checkpoint of 'lm'"),
    "--data": dict(help="wav files and gold.csv, for tsc ID_correct.wav and ID_incorrect.wav"),
    "--layer": dict(type=positive, help="from 1 [the second with a codebook; abx: all]"),
    "--longest": dict(type=positive, default=60, help="seconds; above them in windows [60]"),
    "--dedupe": dict(action="store_true", help="units without repetitions, and their durations"),
    "--textgrid": dict(help="a folder for a TextGrid of each recording, for Praat or ELAN"),
    "--track": dict(choices=[*PHONE_OF], default="many-to-one",
                    help="whether units may share a phone"),
    "--speaker": dict(choices=["within", "across", "both"], default="both"),
    "--context": dict(choices=["within", "any"], default="within"),
    "--distance": dict(choices=[*DISTANCES], default="angular"),
    "--max-size-group": dict(type=positive, help="tokens of a phone, 10 in ZeroSpeech [all]"),
    "--max-x-across": dict(type=positive, help="speakers of X, 5 in ZeroSpeech [all]"),
    "--languages": dict(help="codes, separated by commas [all that are there]"),
    "--split": dict(default="test", help="train-10min, train-1h, train-10h, dev or [test]"),
    "--keep-features": dict(action="store_true", help="write the features too"),
    "--seed": dict(type=int, default=0, help="of that choice [0]"),
    "--out": dict(help="a folder; units: JSONL, abx, quality: JSON"),
}
# Each verb's function and options; those with ! are needed.
VERBS = {
    "features": (write_outputs, "--model! --audio! --out! --layer --longest"),
    "units": (write_outputs, "--model! --audio! --out --layer --longest --dedupe --textgrid "
                             "--alignments --tier"),
    "abx": (run_abx, "--items! --model --audio --features --layer --longest --speaker --context "
                     "--distance --max-size-group --max-x-across --seed --out"),
    "quality": (run_quality, "--units! --alignments! --tier --track --out"),
    "discophon": (run_elsewhere, "--model! --data! --out! --languages --split --layer --track "
                                 "--max-size-group --max-x-across --keep-features"),
    "lm": (None, ""),
    **dict.fromkeys(["swuggy", "sblimp", "tsc", "ssc"],
                    (run_elsewhere, "--lm! --data! --model --units --out")),
}


def parse(arguments=None):
    parser = pretrain.Parser(description=__doc__,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    for verb, (function, options) in VERBS.items():
        command = verbs.add_parser(verb, allow_abbrev=False)
        command.set_defaults(function=function)
        for name in options.split():
            flag = name.rstrip("!")
            command.add_argument(flag, required=flag != name, **OPTIONS[flag])
    return parser.parse_args(arguments)


def main():
    if sys.argv[1:2] == ["lm"]:  # its options are a dataclass, like those of the training scripts
        return importlib.import_module("extras.unit_lm").train(sys.argv[2:])
    args = parse()
    if getattr(args, "out", None):  # a path that cannot be written is refused before the work
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    args.function(args)


if __name__ == "__main__":
    run(main)
