"""The audio that the network trains on: batches, crops, masks and phones.

Recordings of like length make a batch, and all of them are cropped at random to the shortest one:
nothing is padded. Each crop is standardised, and about half of its frames are masked (1). For a
supervised step (7) a batch is of one language and has a phone for each frame. Batch i is a function
of the seed and of i alone: neither the number of loaders nor a restart changes it.

    python data.py manifest FOLDER OUT.csv    lists the audio of a folder, and what is left out
    python data.py toy FOLDER                 writes the toy world, to listen to

A manifest is a CSV with a line for each recording and the columns fileid, path, num_samples (or
num_frames) and, where they are known, language and speaker; or a fairseq TSV; or just a folder of
audio. Lengths are counted at 16 kHz, whatever the rate of the file. Alignments are a CSV with the
columns fileid, phones and language: phones with spaces between them, one every 10 ms.
"""

import csv
import json
import math
import os
import re
import shutil
import signal
import sys
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import combinations, cycle, islice, product
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from model import InputError, die_with_parent, num_frames, require, run

SAMPLE_RATE = 16000
PHONE = 160  # samples for each phone of an alignment: 10 ms
IGNORED = -100  # the class of a frame that counts in no loss, as its phone is not known


# ======== masks ========


def make_mask(batch, frames, rng, prob=0.8, span=10):
    """[B, T] bool, for (1): overlapping spans, about half of all frames, as many in each row."""
    span = min(span, max(1, frames // 2))  # a crop shorter than a span still shows something
    mask = np.zeros((batch, frames), dtype=bool)
    for row in mask:
        spans = max(2, int(prob * frames / span + rng.random()))
        starts = rng.choice(frames - span + 1, min(spans, frames - span + 1), replace=False)
        row[starts[:, None] + np.arange(span)] = True
    fewest = mask.sum(1).min(initial=frames)
    for row in mask:
        masked = np.flatnonzero(row)
        row[rng.choice(masked, len(masked) - fewest, replace=False)] = False
    return mask


# ======== batches ========
# Randomness for one purpose has its own number after the seed, the stream: 0 unlabelled batches,
# 1 labelled ones, 2 validation; in meta-training 4 chunks, 5 their order, 6 and 7 the batches of an
# episode; 8 forgetting; 9 the budget of adapt.py.


def make_buckets(lengths, index, budget, ratio=1.2):
    """Sorts the recordings `index` into buckets: [(recordings, how many of them make a batch)].

    The longest recording of a bucket is at most `ratio` times as long as the shortest.
    """
    index = index[np.argsort(lengths[index], kind="stable")]
    ordered, buckets, first = lengths[index], [], 0
    while first < len(index):
        end = int(np.searchsorted(ordered, ordered[first] * ratio, side="right"))
        buckets.append((index[first:end], max(1, budget // int(ordered[end - 1]))))
        first = end
    return buckets


class Order:
    """Which recordings make batch i, for any i.

    A bucket is cut into batches of at most `budget` samples. An epoch shuffles each bucket, and
    then the batches. `group` batches make an optimizer step, one for each rank and micro-batch;
    where the languages are given, the batches of a step share a language.
    """

    def __init__(self, lengths, budget, group, seed, languages=None):
        self.lengths, self.group, self.seed = lengths, group, seed
        self.labelled = languages is not None
        names = np.array(languages if self.labelled else [""] * len(lengths))
        members = [np.flatnonzero(names == name) for name in np.unique(names)]
        self.buckets = [make_buckets(lengths, index, budget) for index in members]
        self.per_epoch = len(self.epoch(0))
        require(self.per_epoch, f"{len(lengths)} recordings: their batches are too few for {group} "
                "ranks x micro-batches; take fewer of these, or smaller batches")

    @lru_cache(maxsize=4)
    def epoch(self, number):
        """The batches of an epoch, each an array of recordings, `group` for each step."""
        rng, steps = np.random.default_rng([*self.seed, number]), []
        for buckets in self.buckets:  # of a language, or of everything
            batches = []
            for bucket, size in buckets:
                bucket = rng.permutation(bucket)
                batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
            batches = [batches[i] for i in rng.permutation(len(batches))]
            # The last step may lack batches. It is then dropped, or, of labelled audio, completed
            # from the beginning: a small language is heard twice rather than never.
            whole = math.ceil if self.labelled else math.floor
            count = whole(len(batches) / self.group)
            batches = list(islice(cycle(batches), count * self.group))
            steps += [batches[i : i + self.group] for i in range(0, len(batches), self.group)]
        return [batch for i in rng.permutation(len(steps)) for batch in steps[i]]

    def __getitem__(self, i):
        """The epoch of batch i, its number in the epoch, and its recordings."""
        epoch, number = divmod(i, self.per_epoch)
        return epoch, number, self.epoch(epoch)[number]


class Batches:
    """Batch i, for any i: audio, a mask and, given classes {fileid: phones}, a phone a frame."""

    def __init__(self, rows, config, options, group=1, classes=None, stream=(0,)):
        self.rows, self.config, self.options, self.classes = rows, config, options, classes
        self.seed = (options.seed, *stream)
        lengths = np.minimum([row.num_samples for row in rows], options.max_samples)
        languages = None if classes is None else [row.language for row in rows]
        self.order = Order(lengths, options.batch_samples, group, self.seed, languages)
        self.per_epoch = self.order.per_epoch

    def __getitem__(self, i):
        o, (epoch, number, index) = self.options, self.order[i]
        shortest = int(self.order.lengths[index].min())
        crop = shortest // o.crop_multiple * o.crop_multiple or shortest  # of few lengths
        frames = num_frames(crop, self.config)
        wavs = torch.zeros(len(index), crop)  # [B, N]
        rng = np.random.default_rng([*self.seed, epoch, number, 2])
        mask = make_mask(len(index), frames, rng, o.mask_prob, o.mask_span)  # [B, T]
        phones = np.full((len(index), frames), IGNORED, dtype=np.int64)  # [B, T]
        bad = []
        for b, j in enumerate(index):
            row, rng = self.rows[j], np.random.default_rng([*self.seed, epoch, j, 1])
            start = int(rng.integers(row.num_samples - crop + 1))
            try:
                wavs[b] = standardise(read_audio(row.path, start, crop))
            except InputError as error:  # It stays silence, of which nothing counts in the loss.
                bad.append((row.path, f"{row.where}: {error}"))
                mask[b] = False
                continue
            if self.classes is not None:
                phones[b] = phones_of_crop(self.classes[row.fileid], start, frames)
        batch = {"wav": wavs, "mask": torch.from_numpy(mask), "bad": bad}
        if self.classes is not None:
            batch |= {"phones": torch.from_numpy(phones), "language": self.rows[index[0]].language}
        return batch


def phones_of_crop(classes, start, frames):
    """Classes at 50 Hz for a crop from sample `start` on: every second one, from the nearest."""
    at = (start + PHONE // 2) // PHONE + 2 * np.arange(frames)
    return np.where(at < len(classes), classes[np.minimum(at, len(classes) - 1)], IGNORED)


# ======== plumbing: skip at first reading ========

# ======== manifests ========

AUDIO = ".wav .flac .ogg .opus .mp3 .aif .aiff .au .w64 .caf".split()


class Row(NamedTuple):
    """A recording."""

    fileid: str
    path: str
    num_samples: int  # at 16 kHz
    language: str = ""
    speaker: str = ""
    where: str = ""  # what messages call it: "manifest:line: path", or the path alone


def read_manifest(path, only=None):
    """The rows of a manifest, of a folder or of one file; with `only`, those of these fileids."""
    path = Path(path)
    require(path.exists(), f"{path}: no such manifest, folder or file")
    if path.is_dir():
        rows, left_out = scan_folder(path, only)
        for name, why in left_out:
            print(f"left out: {name}: {why}", file=sys.stderr)
    elif path.suffix.lower() in AUDIO:
        samples, problem = inspect(path)
        require(not problem, f"{path}: {problem}")
        rows = [Row(path.stem, str(path), samples, where=str(path))]
    else:
        rows = read_table(path, read_tsv if path.suffix.lower() == ".tsv" else read_csv)
        require(rows, f"{path}: an empty manifest")
    return [row for row in rows if only is None or row.fileid in only]


def read_table(path, read):
    """What `read` makes of a text file."""
    csv.field_size_limit(2**31 - 1)  # an hour of phones is one field
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return read(file, path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: no audio that is read, nor a CSV or TSV: {error}") from None


def read_csv(file, path):
    lines, rows = csv.reader(file), []
    header = next(lines, [])
    length = "num_frames" if "num_frames" in header else "num_samples"
    for column in ("path", length):
        require(column in header, f"{path}:1: the header has no column {column!r}")
    names = ("fileid", "path", length, "language", "speaker")
    # What has no column is read from an empty field that is added at the end of each line.
    pick = itemgetter(*(header.index(name) if name in header else -1 for name in names))
    folder = "" if path.parent == Path() else str(path.parent)
    for line in filter(None, lines):
        where = f"{path}:{lines.line_num}"
        if len(line) != len(header):
            raise InputError(f"{where}: {len(line)} columns, the header has {len(header)}")
        fileid, audio, samples, language, speaker = pick([*line, ""])
        number = int(samples) if samples.isdecimal() else 0
        if not number:
            raise InputError(f"{where}: {samples!r} is not a number of samples")
        audio = os.path.join(folder, audio)
        fileid = fileid or Path(audio).stem
        rows.append(Row(fileid, audio, number, language, speaker, f"{where}: {audio}"))
    return rows


def read_tsv(file, path):
    root, *lines = file.read().rstrip().splitlines() or [""]
    rows = []
    for number, line in enumerate(lines, 2):
        name, _, samples = line.partition("\t")
        require(samples.isdecimal(), f"{path}:{number}: expected 'relative path<TAB>samples'")
        audio = os.path.join(path.parent, root, name)
        rows.append(Row(name, audio, int(samples), where=f"{path}:{number}: {audio}"))
    ids = file_ids([Path(row.fileid) for row in rows])
    return [row._replace(fileid=fileid) for row, fileid in zip(rows, ids)]


def file_ids(names):
    """The paths' names without folder and suffix; those that are not unique keep more of it."""
    ids = [name.stem for name in names]
    for longer in (lambda name: str(name.with_suffix("")), str):
        count = Counter(ids)
        ids = [id if count[id] == 1 else longer(name) for id, name in zip(ids, names)]
    return ids


def file_name(fileid, where):
    """The fileid, which is to name a file in a folder: one that leads out of it is refused."""
    leads_out = {"", ".", ".."} & set(re.split(r"[/\\]", fileid))
    require(not leads_out, f"{where}: the fileid {fileid!r} cannot name a file within a folder")
    return fileid


def scan_folder(folder, only=None, minimum=2000):
    """The rows of a folder's audio, and [(file, why)] of what is left out.

    The first sub-folder is the language. With `only`, other files are not even opened.
    """
    folder, rows, left_out = Path(folder), [], []
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    names = [path.relative_to(folder) for path in files if path.suffix.lower() in AUDIO]
    require(names, f"{folder}: no audio in this folder ({', '.join(AUDIO)})")
    wanted = [pair for pair in zip(file_ids(names), names) if only is None or pair[0] in only]
    for suffix, count in Counter(path.suffix.lower() for path in files).items():
        if suffix not in AUDIO and only is None:
            left_out.append((f"{count} x {suffix or 'no suffix'}", "not a kind of audio we read"))
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda pair: inspect(folder / pair[1], minimum), wanted)
        bar = tqdm(found, str(folder), len(wanted), unit="file", leave=False, disable=None)
        for (fileid, name), (samples, problem) in zip(wanted, bar):
            language = name.parts[0] if len(name.parts) > 1 else ""
            path = str(folder / name)
            if problem:
                left_out.append((str(name), problem))
            else:
                rows.append(Row(fileid, path, samples, language, where=path))
    if not rows and only is None:
        name, why = left_out[-1]
        raise InputError(f"{folder}: none of its {len(names)} files is usable; {name}: {why}")
    return rows, left_out


def inspect(path, minimum=0):
    """A file's length in samples at 16 kHz, and what is wrong with the file, or ""."""
    length = 0
    try:
        require(Path(path).exists(), "no such file")
        with soundfile.SoundFile(path) as file:
            length = math.ceil(file.frames * SAMPLE_RATE / file.samplerate)  # as the resampler does
            if file.samplerate != SAMPLE_RATE:
                resampler(file.samplerate)  # says now if torchaudio does not load
            tail = min(file.frames, file.samplerate)
            file.seek(file.frames - tail)
            end = file.read(tail, dtype="float32")
            require(tail and len(end) == tail, "empty or cut short")
            require(np.isfinite(end).all(), "samples that are not numbers")
            if np.ptp(end) == 0:  # The end is silent. Is all of it?
                file.seek(0)
                require(np.ptp(file.read(dtype="float32")) > 0, "silent throughout")
        require(length >= minimum, f"{length} samples at 16 kHz, under the minimum of {minimum}")
    except InputError as error:
        return length, str(error)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        return 0, f"not audio that can be read, or cut short ({error})"
    return length, ""


def check_audio(rows, minimum, most=2000):
    """The same rows, after a look at their files, so that mistakes show before hours are spent.

    Of a long manifest only `most` files are opened, evenly spread.
    """
    for row in rows:
        if row.num_samples < minimum:
            raise InputError(f"{row.where}: {row.num_samples} samples, under the minimum of "
                             f"{minimum}: remove the row ('data.py manifest' lists what will do)")
    chosen = rows[:: math.ceil(len(rows) / most) or 1]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda row: inspect(row.path, minimum), chosen)
        for row, (length, problem) in zip(chosen, found):
            require(not problem, f"{row.where}: {problem}")
            require(length == row.num_samples, f"{row.where}: {row.num_samples} samples stated, "
                    f"the file has {length} at 16 kHz ('data.py manifest' counts them)")
    return rows


def parse_seconds(text):
    found = re.fullmatch(r"(\d*\.?\d+)(min|h|s)", text)
    require(found, f"--budget {text!r}: an amount of time like 10min, 1h or 90s")
    return float(found[1]) * {"min": 60, "h": 3600, "s": 1}[found[2]]


# ======== reading ========


def read_audio(path, start=0, samples=None):
    """[N]: `samples` samples of a file from `start` on, counted at 16 kHz, the channels averaged.

    Only these are decoded, and a margin around them: the resampling filter looks to both sides, and
    a frame of MP3 depends on those before it.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            margin = 16_000 if file.format == "MP3" else 0 if rate == SAMPLE_RATE else 160
            # `new` samples at 16 kHz last exactly as long as `old` of the file, so begin where
            # samples of both coincide.
            new, old = (n // math.gcd(rate, SAMPLE_RATE) for n in (SAMPLE_RATE, rate))
            first = max(0, start - margin) // new * new
            count = -1  # to the end
            if samples is not None:
                count = math.ceil((start + samples + margin - first) / new) * old
            file.seek(min(first // new * old, file.frames))
            wav = torch.from_numpy(file.read(count, dtype="float32", always_2d=True).mean(1))
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise InputError(str(error)) from None
    if rate != SAMPLE_RATE and len(wav):
        wav = resampler(rate)(wav)
    wav = wav[start - first :][:samples]
    require(len(wav) == (samples or max(1, len(wav))), f"cut short at sample {start + len(wav)}")
    return wav


def standardise(wav):
    """Mean 0 and variance 1: what the network expects."""
    wav = wav - wav.mean()
    std = wav.square().mean().sqrt()
    require(bool(torch.isfinite(std)), "samples that are not numbers")
    require(float(std) > 1e-7, "silence")
    return wav / std


@lru_cache(maxsize=8)
def resampler(rate):
    return import_torchaudio(f"audio at {rate} Hz").transforms.Resample(rate, SAMPLE_RATE)


def import_torchaudio(what):
    try:
        import torchaudio
    except (ImportError, OSError) as error:
        raise InputError(f"{what} needs torchaudio, which does not load here: {error}") from None
    return torchaudio


def loader_init(_):
    """Prepares a process that reads audio (worker_init_fn of a DataLoader).

    Ctrl-C and SIGTERM go to all processes, and the loaders have to live until the training has
    saved. But they must not outlive it, however it ends: Linux kills them with their parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    die_with_parent(signal.SIGKILL)


# ======== alignments ========

UNKNOWN_PHONES = ("UNK", "unk", "<unk>", "SPN", "spn", "PAD", "<pad>")
ALIGNMENT_SLACK = 5  # phones (50 ms) by which an alignment may miss the length of its recording


def read_alignments(path):
    """{fileid: (phones, language)}, a phone every 10 ms."""
    require(Path(path).is_file(), f"{path}: no such alignment file")
    found = read_table(path, read_phones)
    require(found, f"{path}: no alignments in it")
    return found


def read_phones(file, path):
    lines, found = csv.DictReader(file), {}
    header = lines.fieldnames or []
    for column in ("fileid", "phones", "language"):
        require(column in header, f"{path}:1: the header has no column {column!r}")
    for line in lines:
        where, fileid = f"{path}:{lines.line_num}", line["fileid"]
        require(line["phones"] and line["language"], f"{where}: no phones or no language")
        require(fileid not in found, f"{where}: {fileid} is there twice")
        found[fileid] = (line["phones"].split(), line["language"])
    return found


def aligned_rows(rows, alignments, path="the alignments"):
    """The rows that have alignments, which must fit the recordings and the manifest's languages."""
    by_id, count = {row.fileid: row for row in rows}, Counter(row.fileid for row in rows)
    for fileid, (phones, language) in alignments.items():
        where = f"{path}: {fileid}"
        require(fileid in by_id, f"{where} is not in the manifest")
        require(count[fileid] == 1, f"{where} names {count[fileid]} recordings of the manifest")
        row = by_id[fileid]
        expected = row.num_samples / PHONE
        require(abs(len(phones) - expected) <= ALIGNMENT_SLACK,
                f"{where}: {len(phones)} phones at 100 Hz, the recording has {expected:.0f}")
        require(row.language in ("", language),
                f"{where}: language {language!r}, the manifest says {row.language!r}")
    return [row._replace(language=alignments[row.fileid][1])
            for row in rows if row.fileid in alignments]


def inventories(alignments):
    """{language: its phones}: SIL first, then the others by name. The class is the place."""
    found = defaultdict(set)
    for phones, language in alignments.values():
        found[language].update(phones)
    no_others = {"SIL", *UNKNOWN_PHONES}
    return {language: ["SIL", *sorted(found[language] - no_others)] for language in sorted(found)}


def phone_classes(alignments, inventory):
    """{fileid: the class of each phone}, and how many phones are unknown, and therefore IGNORED."""
    index = {name: {phone: i for i, phone in enumerate(inventory[name])} for name in inventory}
    classes, unknown = {}, 0
    for fileid, (phones, language) in alignments.items():
        require(language in index, f"alignments of {fileid}: language {language!r} is not one of "
                f"{', '.join(index)}")
        numbers = [index[language].get(phone, IGNORED) for phone in phones]
        classes[fileid] = np.array(numbers, dtype=np.int16)
        unknown += numbers.count(IGNORED)
    return classes, unknown


# ======== the commands ========


def main():
    verb, *args = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        return print(__doc__)
    if verb == "toy" and len(args) == 1:
        return print(f"the toy world is in {toy(*args)}")
    require(verb == "manifest" and len(args) == 2,
            "usage: python data.py manifest FOLDER OUT.csv | python data.py toy FOLDER")
    write_manifest(*args)


def write_manifest(folder, out):
    require(not Path(out).exists(), f"{out} is there already: name another file, or remove it")
    rows, left_out = scan_folder(folder)
    hours = defaultdict(float)
    for row in rows:
        hours[row.language or "(no language)"] += row.num_samples / SAMPLE_RATE / 3600
    write_csv(Path(f"{out}.tmp"), "fileid path num_samples language",
              [row._asdict() | {"path": os.path.abspath(row.path)} for row in rows])
    os.replace(f"{out}.tmp", out)
    for language, amount in sorted(hours.items()):
        print(f"{language:20} {amount:10.3f} h")
    for name, why in left_out:
        print(f"left out: {name}: {why}")
    long = sum(row.num_samples > 20 * SAMPLE_RATE for row in rows)
    if long:
        print(f"{long} recordings are longer than 20 s: an epoch hears one crop of each")
    print(f"{out}: {len(rows)} recordings, {sum(hours.values()):.3f} h; {len(left_out)} left out")


# ======== the toy world ========
# Eight made-up languages: five to pretrain on, and three unseen ones with phones that no source
# has, other vowels and twice the pace. Speech is made as textbooks explain it: a source (pulses of
# the glottis, noise of a narrow passage) through a filter (the resonances of the mouth). Speakers,
# sloppy articulation, echo and noise make it hard. All is a function of the seed and of names.

TOY_VERSION = 4
PLAIN = 1, (1, 1, 1)
LANGUAGES = {  # phones; pace; what its accent does to the resonances F1, F2, F3
    "baso": ("i e E a o u p t k b d g m n s z l", *PLAIN),
    "delu": ("i I E a O U p t k b m n N f v h r", *PLAIN),
    "kemi": ("i e @ a o u b d g tS m n v z S j w", *PLAIN),
    "nore": ("I e E @ O U p b t d f v s z N l r", *PLAIN),
    "tivo": ("I E @ O o u d k g tS m N S h l j w", *PLAIN),
    "goxi": ("i y e oe a u p t k b m n J s T x l", 2, (1.12, 0.93, 1)),
    "juthe": ("i y ix u e E t d ts Z z s n J N r T", 1.8, (0.9, 1.07, 1.03)),
    "wytsa": ("e oe @ ix o O b d g ts T f x v Z m n", 2, (1.1, 1.08, 0.96)),
}
SOURCES, TARGETS = list(LANGUAGES)[:5], list(LANGUAGES)[5:]
EVAL_SOURCES, LM_LANGUAGE = SOURCES[:2], SOURCES[0]
CORPORA = {  # languages; of each: recordings, speakers; sentences in a recording; dB over the noise
    "train": (SOURCES, 48, 6, (5, 7.5), (2, 18)),
    "eval": (TARGETS + EVAL_SOURCES, 32, 4, (2, 7), (2, 18)),
    "target": (TARGETS, 60, 6, (5, 7.5), (2, 18)),
    "lm": ([LM_LANGUAGE], 240, 6, (5, 7.5), (12, 25)),  # read in a quiet place, as audiobooks are
}

# F1, F2, F3 of an adult male in Hz: F1 falls as the tongue rises, F2 as it moves back.
VOWELS = {
    "i": (280, 2250, 3000), "I": (400, 1950, 2600), "e": (420, 2150, 2750), "E": (570, 1800, 2550),
    "a": (760, 1350, 2500), "O": (590, 920, 2450), "o": (430, 800, 2400), "u": (310, 760, 2300),
    "U": (430, 1080, 2300), "@": (500, 1450, 2500), "y": (290, 1850, 2200),
    "oe": (420, 1580, 2250), "ix": (330, 1400, 2450)}
GLIDES = {
    "l": (380, 1150, 2750), "r": (430, 1250, 1650), "j": (270, 2200, 3050), "w": (300, 680, 2250)}
# Where they point while the mouth is narrow; centre, width and strength of the noise made there.
PLACES = {
    "labial": (330, 850, 2200, 5000, 4000, 0.25), "dental": (340, 1350, 2600, 6400, 1500, 0.3),
    "alveolar": (340, 1700, 2650, 6000, 1100, 0.8), "velar": (320, 1700, 2100, 1900, 500, 0.5),
    "palatal": (290, 2150, 2850, 3400, 800, 0.8), "glottal": (500, 1450, 2500, 1400, 1200, 0.4)}
MANNERS = [  # 10 ms frames; voice, noise and nasality in each of its parts, which last equally long
    (8, [(0, 0, 0), (0, 0, 0), (0, 1, 0)], "p:labial t:alveolar k:velar"),
    (8, [(0.12, 0, 0), (0.12, 0, 0), (0.5, 0.6, 0)], "b:labial d:alveolar g:velar"),
    (11, [(0, 0, 0), (0, 1, 0)], "ts:alveolar tS:palatal"),
    (9, [(0, 1, 0)], "f:labial T:dental s:alveolar S:palatal x:velar h:glottal"),
    (9, [(0.25, 0.6, 0)], "v:labial z:alveolar Z:palatal"),
    (7, [(0.6, 0, 1)], "m:labial n:alveolar J:palatal N:velar")]


def gestures():
    """{phone: (10 ms frames, its parts [P, 8])}: F1 F2 F3, voice, noise, nasality, and the noise's
    centre and width."""
    table = {"SIL": (18, [(500, 1450, 2500, 0, 0, 0, 2000, 2000)])}
    for frames, voice, phones in (10, 1, VOWELS), (7, 0.5, GLIDES):
        for phone, formants in phones.items():
            table[phone] = frames, [(*formants, voice, 0, 0, 2000, 2000)]
    for frames, parts, phones in MANNERS:
        for phone, place in (name.split(":") for name in phones.split()):
            *formants, centre, width, strength = PLACES[place]
            table[phone] = frames, [(*formants, voice, noise * strength, nasal, centre, width)
                                    for voice, noise, nasal in parts]
    return table


GESTURES = gestures()


def chance(*key):
    """Random numbers for one purpose, so that nothing depends on the order of the work."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in key])


def make_language(seed, name):
    """The words, each a tuple of phones, by what they are; nouns and verbs belong to 4 topics."""
    phones, rng, taken = LANGUAGES[name][0].split(), chance(seed, "language", name), set()
    kinds = {"V": [p for p in phones if p in VOWELS], "C": [p for p in phones if p not in VOWELS]}

    def words(count, shapes, *ending):
        found = []
        while len(found) < count:
            word = *(str(rng.choice(kinds[kind])) for kind in rng.choice(shapes)), *ending
            if word not in taken:
                taken.add(word)
                found.append(word)
        return found

    # A noun ends in the vowel of its gender, a verb in a consonant; determiners have a gender too.
    genders, verb = kinds["V"][1:4:2], kinds["C"][-1]
    return {
        "determiners": [words(2, ["CV"]) for _ in genders],
        "nouns": [[words(3, ["CVC", "CVCVC"], vowel) for vowel in genders] for topic in range(4)],
        "verbs": [words(3, ["CV", "CVCV"], verb) for topic in range(4)],
        "rare": [words(2, ["CVC", "CVCVC"], vowel) for vowel in genders],  # nouns that nobody says
    }


def sentence(lang, rng, topic, genders=None):
    """Determiner, noun, verb, determiner, noun, all on one topic; some words are said more often."""
    def pick(words):
        weights = 1 / np.arange(2, len(words) + 2)
        return words[rng.choice(len(words), p=weights / weights.sum())]

    words = []
    for gender in genders or rng.integers(2, size=2):
        words += [pick(lang["determiners"][gender]), pick(lang["nouns"][topic][gender])]
    return [*words[:2], pick(lang["verbs"][topic]), *words[2:]]


def make_voice(seed, language, speaker):
    """A shorter mouth has higher formants, and mostly goes with a higher pitch."""
    rng, (_, pace, accent) = chance(seed, "voice", language, speaker), LANGUAGES[language]
    short = rng.integers(2)
    return {
        "pitch": (115, 205)[short] * np.exp(rng.normal(0, 0.12)),
        "formants": (1, 1.15)[short] * np.exp(rng.normal(0, 0.05)) * np.array(accent),
        "tilt": rng.uniform(0.5, 1.1), "pace": pace * np.exp(rng.normal(0, 0.2)),
    }


def pronounce(story, voice, rng):
    """Sentences -> tokens [(phone, 10 ms frames)], with a pause around each sentence."""
    phones = ["SIL"]
    for words in story:
        phones += [phone for word in words for phone in word] + ["SIL"]
    pace = voice["pace"] * np.exp(rng.normal(0, 0.15))  # that day's
    frames = np.array([GESTURES[phone][0] for phone in phones]) / pace
    frames = np.rint(frames * np.exp(rng.normal(0, 0.2, len(phones))))
    return list(zip(phones, np.maximum(frames, 3).astype(int).tolist()))


def smooth(track, steps):
    """Each column averaged over `steps`, the middle counting most."""
    kernel = np.hanning(steps + 2)[1:-1]
    return np.stack([np.convolve(c, kernel / kernel.sum(), mode="same") for c in track.T], 1)


def articulate(tokens, voice, rng):
    """Tokens -> a row every 5 ms [T, 8]. Tongue and lips are slow: formants glide over 75 ms, so a
    phone sounds of its neighbours, and a short one never reaches its target."""
    rows, steps = [], []
    for phone, frames in tokens:
        parts = np.array(GESTURES[phone][1])
        rows.extend(parts * rng.normal(1, 0.07, 8))  # nobody says it twice the same
        steps.extend(np.diff(np.arange(len(parts) + 1) * 2 * frames // len(parts)))
    track = np.repeat(rows, steps, axis=0)
    formants = smooth(track[:, :3] * voice["formants"], 15)
    return np.hstack([formants, smooth(track[:, 3:], 3)]).astype(np.float32)


def speak(tokens, voice, rng):
    """Tokens -> clean speech [N], 160 samples a frame."""
    track = articulate(tokens, voice, rng)
    steps, hertz = len(track), np.linspace(0, 8000, 201, dtype=np.float32)
    f1, f2, f3, voicing, noise, nasal, centre, width = track.T[:, :, None]  # each [T, 1]

    def bump(centre, width):
        return 1 / (1 + ((hertz - centre) / width) ** 2)  # [T, 201]

    mouth = bump(f1, 60) + 0.6 * bump(f2, 80) + 0.35 * bump(f3, 120)
    mouth *= (1 + (hertz / 600) ** 2) ** np.float32(-voice["tilt"] / 2)  # the glottis is dull
    mouth *= 1 - 0.85 * nasal * bump(0.9 * f2, 200)  # a shut mouth swallows part of the sound
    mouth *= voicing
    passage = noise * bump(centre, width) * np.sqrt(1000 / width) + 0.05 * mouth

    pitch = voice["pitch"] * np.exp(0.6 * smooth(rng.normal(0, 1, (steps, 1)), 61)[:, 0])
    pulses = np.diff(np.floor(np.cumsum(np.repeat(pitch, 80)) / SAMPLE_RATE), prepend=0)
    pulses *= 3 * np.sqrt(SAMPLE_RATE / voice["pitch"])
    # Both sources in overlapping windows of 25 ms, each given its spectrum, and added up again.
    window, pieces = np.hanning(401)[:400].astype(np.float32), 0
    for source, spectrum in (pulses, mouth), (rng.standard_normal(80 * steps), passage):
        padded = np.pad(source.astype(np.float32), 200)
        windows = np.lib.stride_tricks.sliding_window_view(padded, 400)[::80][:steps]
        pieces = pieces + np.fft.rfft(window * windows) * spectrum
    wave = np.zeros((steps + 4, 80), np.float32)
    for i, piece in enumerate(np.split(np.fft.irfft(pieces), 5, axis=1)):
        wave[i : i + steps] += piece
    return wave.reshape(-1)[200 : 200 + 80 * steps]


def record(clean, snr, rng):
    """Speech -> what a microphone in some room hears of it: echo and coloured noise."""
    size = -(-(len(clean) + 4000) // 8000) * 8000  # with space for the echo
    decibel, colour, strength, decay = rng.uniform((snr[0], 0, 0.1, 160), (snr[1], 0.6, 0.5, 800))
    echo = rng.standard_normal(4000) * np.exp(-np.arange(4000) / decay)
    echo *= strength / np.sqrt((echo**2).sum())
    echo[0] += 1
    speech = np.fft.rfft(clean, size) * np.fft.rfft(echo.astype(np.float32), size)
    noise = np.fft.rfft(rng.standard_normal(size, dtype=np.float32))
    noise /= (1 + np.linspace(0, 16, len(noise), dtype=np.float32) ** 2) ** np.float32(colour)
    noise *= np.sqrt((np.abs(speech) ** 2).mean() / (np.abs(noise) ** 2).mean())
    wave = np.fft.irfft(speech + noise * np.float32(10 ** (-decibel / 20)), size)[: len(clean)]
    return wave * (0.5 / np.abs(wave).max())


def write_wavs(jobs):
    """Jobs are (path, tokens, voice, range of decibels, key of their chance)."""
    def write(path, tokens, voice, snr, key):
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = record(speak(tokens, voice, chance(*key)), snr, chance(*key, "room"))
        soundfile.write(path, wave.astype(np.float32), SAMPLE_RATE, subtype="PCM_16")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, *zip(*jobs)))


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header.split(), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_corpora(folder, part, seed, scale):
    """Manifests, alignments, ABX items and audio of a part; returns the words that were said."""
    languages, count, speakers, length, snr = CORPORA[part]
    tables, jobs, said = defaultdict(list), [], Counter()
    for name, i in product(languages, range(max(2, round(count * scale)))):
        lang, fileid = make_language(seed, name), f"{name}-{part}-{i % speakers}-{i:04d}"
        voice, rng = make_voice(seed, name, fileid[:-5]), chance(seed, fileid)
        topic, sentences = rng.integers(4), round(voice["pace"] * rng.uniform(*length))
        story = [sentence(lang, rng, topic) for _ in range(sentences)]
        tokens = pronounce(story, voice, rng)
        row = {"fileid": fileid, "language": name, "speaker": fileid[:-5], "tokens": tokens,
               "num_samples": 160 * sum(frames for _, frames in tokens),
               "path": f"{name}/{fileid}.wav",
               "phones": " ".join(phone for phone, frames in tokens for _ in range(frames))}
        tables["train" if part in ("train", "lm") else name].append(row)
        jobs.append((folder / row["path"], tokens, voice, snr, (seed, fileid, "audio")))
        said.update(word for words in story for word in words)
    for table, rows in tables.items():
        write_csv(folder / f"{table}.csv", "fileid path num_samples language speaker", rows)
        write_csv(folder / f"{table}_alignments.csv", "fileid phones language", rows)
        items = ["#file onset offset #phone prev-phone next-phone speaker"]
        items += [item for row in rows for item in abx_items(**row)]
        (folder / f"{table}.item").write_text("\n".join(items) + "\n", encoding="utf-8")
    write_wavs(jobs)
    return said


def abx_items(fileid, speaker, tokens, **_):
    ends = np.cumsum([frames for _, frames in tokens]) / 100
    phones = [phone for phone, _ in tokens]
    for i in range(1, len(tokens) - 1):
        if phones[i] != "SIL":
            times, context = f"{ends[i - 1]:.2f} {ends[i]:.2f}", f"{phones[i - 1]} {phones[i + 1]}"
            yield f"{fileid} {times} {phones[i]} {context} {speaker}"


def make_pairs(lang, rng, said, count):
    """{test: [(type, frequency, right, wrong)]}, where right and wrong are lists of sentences."""
    # Two words swap their beginnings and both become non-words, so neither length nor the frequency
    # of single phones gives the non-words away.
    words = [word for topic in lang["nouns"] + [lang["rare"]] for kind in topic for word in kind]
    lexical, syntactic, stories, seen = [], [], [], set(words)
    for one, two in rng.permutation(list(combinations(range(len(words)), 2))):
        one, two = words[one], words[two]
        new = two[:2] + one[2:], one[:2] + two[2:]
        if len(one) == len(two) and one[-1] == two[-1] and not seen & set(new):
            seen |= set(new)
            lexical += [("", said[w], [[w]], [[n]]) for w, n in zip((one, two), new)]
    # The same words in another order: determiners that do not agree, or that follow their noun.
    orders = ("agreement", (3, 1, 2, 0, 4)), ("order", (0, 2, 1, 3, 4)), ("order", (1, 0, 2, 3, 4))
    for i in range(count):
        kind, order = orders[i % 3]
        right = sentence(lang, rng, rng.integers(4), [(0, 1), (1, 0)][i // 3 % 2])
        syntactic.append((kind, "", [right], [[right[j] for j in order]]))
    # Two stories exchange their endings: only the topic says which belongs to which.
    for _ in range(count // 2):
        topics = rng.choice(4, 2, replace=False)
        one, two = ([sentence(lang, rng, topic) for _ in range(4)] for topic in topics)
        stories += [("", "", one, one[:3] + two[3:]), ("", "", two, two[:3] + one[3:])]
    return {"lexical/dev": lexical[:count], "syntactic/dev": syntactic, "tsc": stories}


def write_tests(folder, seed, scale, said):
    """Tests of a language model in ZeroSpeech's layout; a pair has one voice, timing and room."""
    lang, count = make_language(seed, LM_LANGUAGE), max(4, 2 * round(45 * scale))
    for test, pairs in make_pairs(lang, chance(seed, "tests"), said, count).items():
        rows, jobs = [], []
        for i, (kind, frequency, *sides) in enumerate(pairs):
            voice, key = make_voice(seed, LM_LANGUAGE, f"test-{i % 3}"), (seed, test, i)
            for side, story in zip(("correct", "incorrect"), sides):
                tokens = pronounce(story, voice, chance(*key, "timing"))
                path = folder / test / f"{i:04d}_{side}.wav"
                jobs.append((path, tokens, voice, CORPORA["lm"][-1], key))
                rows.append({
                    "id": i, "filename": path.stem, "voice": i % 3, "type": kind,
                    "frequency": frequency, "phones": " ".join(phone for phone, _ in tokens),
                    "correct": int(side == "correct")})
        write_wavs(jobs)
        write_csv(folder / test / "gold.csv",
                  "id filename voice type frequency phones correct", rows)


def toy(folder, parts=tuple(CORPORA), seed=0, scale=1.0):
    """Makes the parts of the toy world that are not there yet; all are 150 minutes of audio.

    train.csv  eval/LANG.csv  target/LANG.csv  lm/train.csv    manifests, with _alignments and .item
    lm/lexical/dev/gold.csv  lm/syntactic/dev/gold.csv  lm/tsc     tests in ZeroSpeech's layout

    The training part is the folder itself, and holds seed and scale for the others.
    """
    folder = Path(folder)
    about = {"version": TOY_VERSION, "seed": seed, "scale": scale}
    for part in ("train", *parts):
        place = folder if part == "train" else folder / part
        if not place.exists() or place.is_dir() and not any(place.iterdir()):
            new = place.with_name(f"{place.name}.tmp{os.getpid()}")  # renamed when it is whole
            try:
                said = write_corpora(new, part, about["seed"], about["scale"])
                if part == "lm":
                    write_tests(new, about["seed"], about["scale"], said)
                if part == "train":
                    (new / "toy.json").write_text(json.dumps(about))
                if not place.exists() or not any(place.iterdir()):  # another process was faster
                    new.rename(place)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        about = read_toy(folder)
    return folder


def read_toy(folder):
    """What the folder's toy.json says, if it is a toy world of this version of the code."""
    try:
        about = json.loads(Path(folder, "toy.json").read_text())
        require(about["version"] == TOY_VERSION, "")
        return about
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder}: no toy world, or one of another version of the code: name a "
                         "new folder") from None


if __name__ == "__main__":
    run(main)
