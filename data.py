"""The audio that the network trains on: batches, crops, masks and phones.

Recordings of like length make a batch, all cropped at random to the shortest: nothing is padded.
Each crop is standardised, and about half of its frames are masked (1). For a supervised step (7) a
batch is of one language and has a phone for each frame. Batch i is a function of the seed and of i
alone: neither the number of loaders nor a restart changes it.

    python data.py manifest FOLDER OUT.csv    lists the audio of a folder, and what is left out
    python data.py toy FOLDER                 writes the toy world, to listen to
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
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain, combinations, cycle, groupby, islice, product
from pathlib import Path

import numpy as np
import soundfile
import torch

from model import InputError, die_with_parent, num_frames, require, run

SAMPLE_RATE = 16000
PHONE = 160  # samples for each phone of an alignment: 10 ms
IGNORED = -100  # the class of a frame that counts in no loss, as its phone is not known


# ======== masks ========


def make_mask(batch, frames, rng, prob, span):
    """[B, T] bool, for (1): overlapping spans, about half of all frames, as many in each row."""
    span = min(span, max(1, frames // 2))  # so that a short crop is rarely hidden as a whole
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
# Every use of randomness has a generator of its own, whose key is a list of numbers:
#   the order of an epoch's batches    seed, stream, epoch
#   the masks of a batch               seed, stream, epoch, batch, 2
#   the crop of a recording            seed, stream, epoch, recording, 1
# Stream 0 is for unlabelled batches, 1 for labelled ones, 2 for validation; in meta-training 4 for
# the chunks, 5 for their order, 6 and 7 for the batches of an episode; in adaptation 9 for the
# budget, 10 for what is held out.


def make_buckets(lengths, index, budget, ratio=1.2):
    """[(recordings whose lengths differ by at most `ratio`, how many of them make a batch)]."""
    index = index[np.argsort(lengths[index], kind="stable")]
    ordered, buckets, first = lengths[index], [], 0
    while first < len(index):
        end = int(np.searchsorted(ordered, ordered[first] * ratio, side="right"))
        buckets.append((index[first:end], max(1, budget // int(ordered[end - 1]))))
        first = end
    return buckets


class Batches:
    """Batch i, for any i: audio, a mask and, given classes {fileid: phones}, a phone a frame.

    A step takes `per_step` of them, one for each rank and micro-batch. If they are labelled, these
    are of one language.
    """

    def __init__(self, rows, config, options, per_step=1, classes=None, stream=(0,)):
        self.rows, self.config, self.options, self.classes = rows, config, options, classes
        self.per_step, self.seed = per_step, (options.seed, *stream)
        self.labelled = classes is not None
        self.lengths = np.minimum([row.num_samples for row in rows], options.max_samples)
        names = np.array([row.language if self.labelled else "" for row in rows])
        members = [np.flatnonzero(names == name) for name in np.unique(names)]
        self.buckets = [make_buckets(self.lengths, m, options.batch_samples) for m in members]
        self.per_epoch = len(self.epoch(0))
        require(self.per_epoch, f"{len(rows)} recordings: their batches are too few for {per_step} "
                "ranks x micro-batches; take fewer of these, or smaller batches")

    @lru_cache(maxsize=4)
    def epoch(self, number):
        """The batches of an epoch, each an array of recordings, in the order of the steps."""
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
            endless = cycle(batches)
            for _ in range(whole(len(batches) / self.per_step)):
                steps.append(list(islice(endless, self.per_step)))
        return [batch for i in rng.permutation(len(steps)) for batch in steps[i]]

    def __getitem__(self, i):
        o, (epoch, number) = self.options, divmod(i, self.per_epoch)
        index = self.epoch(epoch)[number]  # the recordings of this batch
        shortest = int(self.lengths[index].min())
        crop = shortest // o.crop_multiple * o.crop_multiple or shortest  # so that shapes are few
        frames = num_frames(crop, self.config)
        rng = np.random.default_rng([*self.seed, epoch, number, 2])
        mask = make_mask(len(index), frames, rng, o.mask_prob, o.mask_span)  # [B, T]
        wavs, bad = torch.zeros(len(index), crop), []  # [B, N]
        phones = np.full((len(index), frames), IGNORED, dtype=np.int64)  # [B, T]
        for b, j in enumerate(index):
            row, rng = self.rows[j], np.random.default_rng([*self.seed, epoch, j, 1])
            start = int(rng.integers(row.num_samples - crop + 1))
            try:
                wavs[b] = standardise(read_audio(row.path, start, crop))
                if self.labelled:
                    phones[b] = phones_of_crop(self.classes[row.fileid], start, frames)
            except InputError as error:  # It stays silence, of which nothing counts in the loss.
                bad.append((row.path, f"{row.where}: {error}"))
                mask[b] = False
        batch = {"wav": wavs, "mask": torch.from_numpy(mask), "bad": bad}
        if self.labelled:
            batch |= {"phones": torch.from_numpy(phones), "language": self.rows[index[0]].language}
        return batch


def phones_of_crop(classes, start, frames):
    """A class for each frame of a crop. Frame i begins at sample start + 320 i; it has the phone
    whose beginning is nearest to that."""
    at = (start + PHONE // 2) // PHONE + 2 * np.arange(frames)
    return np.where(at < len(classes), classes[np.minimum(at, len(classes) - 1)], IGNORED)


# ======== plumbing: skip at first reading ========

AUDIO = ".wav .flac .ogg .opus .mp3 .aif .aiff .au .w64 .caf".split()
UNREADABLE = soundfile.LibsndfileError, OSError, TypeError
ALIGNMENT_SLACK = 5  # phones (50 ms) by which an alignment may miss the length of its recording
# num_samples is at 16 kHz, whatever the rate of the file; where is what messages call the row.
Row = namedtuple("Row", "fileid path num_samples language where", defaults=["", ""])


def main():
    match sys.argv[1:]:
        case words if not words or {"-h", "--help"} & {*words}:
            print(__doc__)
        case ["toy", folder]:
            print(f"the toy world is in {toy(folder)}")
        case ["manifest", folder, out]:
            require(not Path(out).exists(), f"{out} is there already: remove it, or name another")
            write_manifest(scan(Path(folder)), Path(out))
        case _:
            raise InputError("data.py manifest FOLDER OUT.csv, or data.py toy FOLDER")


def write_manifest(rows, out):
    write_csv(out, "fileid path num_samples language",
              [row._replace(path=os.path.abspath(row.path))._asdict() for row in rows])
    hours = Counter()
    for row in rows:
        hours[row.language or "(no language)"] += row.num_samples / SAMPLE_RATE / 3600
    for language, amount in sorted(hours.items()):
        print(f"{language:20} {amount:10.3f} h")
    print(f"{out}: {len(rows)} recordings, {hours.total():.3f} h")


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header.split(), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_manifest(path, only=None):
    """The rows of a CSV, a fairseq TSV, a folder or a file; with `only`, those of these fileids."""
    path, rows, names = Path(path), [], []
    if path.is_dir() or path.suffix.lower() in AUDIO:
        return scan(path, only)
    of_discophon = re.fullmatch(r"manifest-([^-]+)-(.+)\.csv", path.name)  # has no paths
    for where, line in read_table(str(path), "fileid" if of_discophon else "path"):
        if "path" not in line:
            name = line["fileid"] + ".wav"
            line["path"] = os.path.join("..", "audio", *of_discophon.groups(), name)
        audio = os.path.join(line["folder"], line["path"])
        length = line.get("num_samples") or line.get("num_frames", "")
        require(length.isdecimal(), f"{where}: num_samples (or num_frames) is {length!r}")
        rows.append(Row(line.get("fileid", ""), audio, int(length), line.get("language", ""),
                        f"{where}: {audio}"))
        names.append(line["path"])
    require(rows, f"{path}: an empty manifest")
    if not all(row.fileid for row in rows):
        rows = [row._replace(fileid=row.fileid or id) for row, id in zip(rows, file_ids(names))]
    return [row for row in rows if only is None or row.fileid in only]


def read_table(path, *columns):
    """Yields (where, {column: field}) for each line of a CSV or of a fairseq TSV."""
    csv.field_size_limit(2**31 - 1)  # an hour of phones is one field
    tsv, folder = path.lower().endswith(".tsv"), os.path.dirname(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, csv.excel_tab if tsv else csv.excel)
            header = next(lines, [])
            if tsv:  # Its first line is the folder of the audio.
                folder, header = os.path.join(folder, *header), ["path", "num_samples"]
            for column in columns:
                require(column in header, f"{path}:1: the header has no column {column!r}")
            for line in filter(None, lines):
                where, found = f"{path}:{lines.line_num}", len(line)
                require(found == len(header), f"{where}: {found} columns instead of {len(header)}")
                yield where, dict(zip(header, line), folder=folder)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: no audio that is read, nor a CSV or TSV: {error}") from None


def file_ids(names):
    """The paths' names without folder and suffix; those that are not unique keep more of it."""
    ids = [Path(name).stem for name in names]
    for longer in (lambda name: os.path.splitext(name)[0], str):
        count = Counter(ids)
        ids = [id if count[id] == 1 else longer(name) for id, name in zip(ids, names)]
    return ids


def file_name(fileid, where):
    """The fileid, unless it leads out of the folder in which it names a file."""
    leads_out = {"", ".", ".."} & set(re.split(r"[/\\]", fileid))
    require(not leads_out, f"{where}: the fileid {fileid!r} cannot name a file within a folder")
    return fileid


def scan(path, only=None, minimum=2000):
    """The rows of a folder, whose first sub-folder is the language, or of a file. What is left out
    is told, and why. With `only`, other files are not even opened."""
    files = [file for file in [path, *sorted(path.rglob("[!.]*"))] if file.is_file()]
    folder = path if path.is_dir() else path.parent
    names = [file.relative_to(folder) for file in files if file.suffix.lower() in AUDIO]
    rows = [Row(fileid, str(folder / name), 0, "".join(name.parent.parts[:1]))
            for fileid, name in zip(file_ids(names), names) if only is None or fileid in only]
    found = inspect_all(rows, minimum)
    left_out = [f"{row.path}: {problem}" for row, _, problem in found if problem]
    if only is None:
        others = Counter(file.suffix for file in files if file.suffix.lower() not in AUDIO)
        left_out += [f"{n} x {kind}: not a kind of audio we read" for kind, n in others.items()]
    for message in left_out:
        print("left out:", message, file=sys.stderr)
    rows = [row._replace(num_samples=n, where=row.path) for row, n, problem in found if not problem]
    require(rows or only is not None, f"{path}: no audio that can be used")
    return rows


def check_audio(rows, minimum, most=2000):
    """The same rows, after a look at `most` of the files: mistakes show before hours are spent."""
    for row in rows:
        if row.num_samples < minimum:
            raise InputError(f"{row.where}: {row.num_samples} samples, under the minimum {minimum}")
    for row, samples, problem in inspect_all(rows[:: math.ceil(len(rows) / most) or 1], minimum):
        require(not problem, f"{row.where}: {problem}")
        require(samples == row.num_samples, f"{row.where}: {row.num_samples} samples stated, "
                f"the file has {samples} at 16 kHz ('data.py manifest' counts them)")
    return rows


def inspect_all(rows, minimum):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda row: (row, *inspect(row.path, minimum)), rows))


def inspect(path, minimum):
    """A file's length in samples at 16 kHz, and what is wrong with the file, or ""."""
    samples = 0
    try:
        require(os.path.exists(path), "no such file")
        with soundfile.SoundFile(path) as file:
            rate, last = file.samplerate, min(file.frames, file.samplerate)  # the last second
            samples = math.ceil(file.frames * SAMPLE_RATE / rate)
            file.seek(file.frames - last)
            end = file.read(last, dtype="float32")
        require(samples >= minimum, f"{samples} samples at 16 kHz, under the minimum {minimum}")
        require(0 < last == len(end), "empty or cut short")
        resampler(rate)  # says now if torchaudio is needed and does not load
        standardise(read_audio(path) if np.ptp(end) < 1e-4 else torch.from_numpy(end))
    except (InputError, *UNREADABLE) as error:
        return samples, str(error)
    return samples, ""


def parse_seconds(text):
    found = re.fullmatch(r"(\d*\.?\d+)(min|h|s)", text)
    require(found, f"--budget {text!r}: an amount of time like 10min, 1h or 90s")
    return float(found[1]) * {"min": 60, "h": 3600, "s": 1}[found[2]]


# ======== reading ========


def read_audio(path, start=0, samples=None):
    """[N]: `samples` samples of a file from `start` on, at 16 kHz, the mean of the channels. Only
    these are decoded, and a margin, as resampling and MP3 depend on what is around them."""
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
            wav = torch.from_numpy(file.read(count, dtype="float32", always_2d=True)).mean(1)
    except UNREADABLE as error:
        raise InputError(str(error)) from None
    wav = resampler(rate)(wav) if len(wav) else wav
    wav = wav[start - first :][:samples]
    require(len(wav) == (samples or max(1, len(wav))), f"cut short at sample {start + len(wav)}")
    return wav


def standardise(wav):
    """Mean 0 and variance 1: what the network expects."""
    wav = wav - wav.mean()
    std = wav.square().mean().sqrt()
    require(1e-7 < float(std) < math.inf, "silence, or samples that are not numbers")
    return wav / std


@lru_cache(maxsize=8)
def resampler(rate):
    if rate == SAMPLE_RATE:
        return torch.nn.Identity()
    return import_torchaudio(f"audio at {rate} Hz").transforms.Resample(rate, SAMPLE_RATE)


def import_torchaudio(what):
    try:
        import torchaudio
    except (ImportError, OSError) as error:
        raise InputError(f"{what} needs torchaudio, which does not load here: {error}") from None
    return torchaudio


def loader_init(_):
    """Prepares a process that reads audio (worker_init_fn of a DataLoader): Ctrl-C and SIGTERM
    reach it too, but it has to live until the training has saved, and not to outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)


# ======== alignments ========


def read_alignments(path, languages=None):
    """{fileid: (phones, language)}, a phone every 10 ms. A text file (`#file onset offset #phone`)
    does not tell the language, which is then taken from `languages`, {fileid: language}."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        if file.read(5) == "#file":
            languages = languages or {}
            return {fileid: (phones, languages.get(fileid, ""))
                    for fileid, phones in read_intervals(path).items()}
    found = {}
    for where, line in read_table(str(path), "fileid", "phones", "language"):
        fileid, language = line["fileid"], line["language"]
        phones = [*map(sys.intern, line["phones"].split())]  # each phone is kept once
        require(phones and language, f"{where}: no phones or no language")
        require(fileid not in found, f"{where}: {fileid} is there twice")
        found[fileid] = phones, language
    require(found, f"{path}: no alignments in it")
    return found


def read_intervals(path):
    """{fileid: phones}, a phone every 10 ms, of lines `file onset offset phone` without gaps."""
    found = defaultdict(list)
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines()[1:], 2):
        try:
            fileid, onset, offset, phone = line.split()
            first, end = (round(100 * float(time)) for time in (onset, offset))
        except ValueError:
            raise InputError(f"{path}:{number}: not 'file onset offset phone'") from None
        require(first == len(found[fileid]) and first < end, f"{path}:{number}: {fileid} has a gap "
                f"or an overlap at {onset} s")
        found[fileid] += [sys.intern(phone)] * (end - first)
    require(found, f"{path}: no alignments in it")
    return dict(found)


def aligned_rows(rows, alignments, path="the alignments"):
    """The rows that have alignments, which must fit the recordings and the manifest's languages."""
    rows = [row for row in rows if row.fileid in alignments]
    count = Counter(row.fileid for row in rows)
    for fileid in alignments:
        require(count[fileid] == 1, f"{path}: {fileid} is {count[fileid]} times in the manifest")
    for row in rows:
        phones, language = alignments[row.fileid]
        length = row.num_samples / PHONE
        require(language, f"{path}: no language of {row.fileid}: give the manifest one")
        fits = abs(len(phones) - length) <= ALIGNMENT_SLACK and row.language in ("", language)
        require(fits, f"{path}: {row.fileid}: {len(phones)} phones at 100 Hz of {language!r}, "
                f"the manifest says {length:.0f} of {row.language!r}")
    return [row._replace(language=alignments[row.fileid][1]) for row in rows]


def inventories(alignments):
    """{language: its phones}: SIL first, then the others by name. The class is the place."""
    found = defaultdict(set)
    for phones, language in alignments.values():
        found[language].update(phones)
    no_others = {"SIL", "UNK", "unk", "<unk>", "SPN", "spn", "PAD", "<pad>"}
    return {language: ["SIL", *sorted(found[language] - no_others)] for language in sorted(found)}


def phone_classes(alignments, inventory):
    """{fileid: the class of each phone}, and how many phones are unknown, and therefore IGNORED."""
    index = {name: {phone: i for i, phone in enumerate(inventory[name])} for name in inventory}
    classes, unknown = {}, 0
    for fileid, (phones, language) in alignments.items():
        numbers = [index[language].get(phone, IGNORED) for phone in phones]
        classes[fileid] = np.array(numbers, dtype=np.int16)
        unknown += numbers.count(IGNORED)
    return classes, unknown


# ======== the toy world ========
# Ten made-up languages: five to pretrain on; three unseen ones with phones that no source has,
# other vowels and nearly twice the pace; and two far ones: tonu, whose vowels differ by tone, and
# qxan, which has clicks and ejectives. Speech is made as textbooks explain it: a source (pulses of
# the glottis, noise of a narrow passage) through a filter (the resonances of the mouth). Speakers,
# sloppy articulation, echo and noise make it hard. All is a function of the seed and of names.

TOY_VERSION = 6
PLAIN = 1, (1, 1, 1)
LANGUAGES = {  # phones; pace; what its accent does to the resonances F1, F2, F3
    "baso": ("i e E a o u p t k b d g m n s z l", *PLAIN),
    "delu": ("i I E a O U p t k b m n N f v h r", *PLAIN),
    "kemi": ("i e @ a o u b d g tS m n v z S j w", *PLAIN),
    "nore": ("I e E @ O U p b t d f v s z N l r", *PLAIN),
    "tivo": ("I E @ O o u d k g tS m N S h l j w", *PLAIN),
    "goxi": ("i y e oe a u p t k b m n J s T x l", 1.8, (1.12, 0.93, 1)),
    "juthe": ("i y ix u e E t d ts Z z s n J N r T", 1.8, (0.9, 1.07, 1.03)),
    "wytsa": ("e oe @ ix o O b d g ts T f x v Z m n", 1.8, (1.1, 1.08, 0.96)),
    "tonu": ("a1 a2 a3 a4 i1 i2 i3 i4 u1 u2 u3 u4 p t k m n s l", *PLAIN),
    "qxan": ("i e a o u | ! || p' t' k' ts' t k m n s", *PLAIN),
}
SOURCES, TARGETS, FAR = list(LANGUAGES)[:5], list(LANGUAGES)[5:8], list(LANGUAGES)[8:]
EVAL_SOURCES, LM_LANGUAGE = SOURCES[:2], SOURCES[0]
CORPORA = {  # languages; of each: recordings, speakers; sentences in a recording; dB over the noise
    "train": (SOURCES, 48, 16, (5, 7.5), (2, 18)),
    "eval": (TARGETS + EVAL_SOURCES, 32, 4, (2, 7), (2, 18)),
    "target": (TARGETS, 60, 6, (5, 7.5), (2, 18)),
    "far_eval": (FAR, 32, 4, (2, 7), (2, 18)),
    "far_target": (FAR, 60, 6, (5, 7.5), (2, 18)),
    "lm": ([LM_LANGUAGE], 240, 6, (5, 7.5), (12, 25)),  # read in a quiet place, as audiobooks are
}

# F1, F2, F3 of an adult male in Hz: F1 falls as the tongue rises, F2 as it moves back.
VOWELS = {
    "i": (280, 2250, 3000), "I": (400, 1950, 2600), "e": (420, 2150, 2750), "E": (570, 1800, 2550),
    "a": (760, 1350, 2500), "O": (590, 920, 2450), "o": (430, 800, 2400), "u": (310, 760, 2300),
    "U": (430, 1080, 2300), "@": (500, 1450, 2500), "y": (290, 1850, 2200),
    "oe": (420, 1580, 2250), "ix": (330, 1400, 2450),
}
GLIDES = {
    "l": (380, 1150, 2750), "r": (430, 1250, 1650), "j": (270, 2200, 3050), "w": (300, 680, 2250),
}
# Where they point while the mouth is narrow; strength, centre and width of the noise made there.
LABIAL, DENTAL = (330, 850, 2200, 0.25, 5000, 4000), (340, 1350, 2600, 0.3, 6400, 1500)
ALVEOLAR, PALATAL = (340, 1700, 2650, 0.8, 6000, 1100), (290, 2150, 2850, 0.8, 3400, 800)
VELAR, GLOTTAL = (320, 1700, 2100, 0.5, 1900, 500), (500, 1450, 2500, 0.4, 1400, 1200)
TONES = {"1": (0.25, 0.25), "2": (-0.25, -0.25), "3": (-0.25, 0.25), "4": (0.25, -0.25)}
# 10 ms frames; voice, noise, nasality and tone, a logarithm of pitch, in each of its parts, which
# last equally long.
MANNERS = [
    (18, [(0, 0, 0)], {"SIL": (500, 1450, 2500)}),
    (10, [(1, 0, 0)], VOWELS),
    (7, [(0.5, 0, 0)], GLIDES),
    (7, [(0.6, 0, 1)], {"m": LABIAL, "n": ALVEOLAR, "J": PALATAL, "N": VELAR}),
    (8, [(0, 0, 0), (0, 0, 0), (0, 1, 0)], {"p": LABIAL, "t": ALVEOLAR, "k": VELAR}),
    (8, [(0.12, 0, 0), (0.12, 0, 0), (0.5, 0.6, 0)], {"b": LABIAL, "d": ALVEOLAR, "g": VELAR}),
    (11, [(0, 0, 0), (0, 1, 0)], {"ts": ALVEOLAR, "tS": PALATAL}),
    (9, [(0.25, 0.6, 0)], {"v": LABIAL, "z": ALVEOLAR, "Z": PALATAL}),
    (9, [(0, 1, 0)], {"f": LABIAL, "T": DENTAL, "s": ALVEOLAR, "S": PALATAL, "x": VELAR,
                      "h": GLOTTAL}),
    (9, [(0, 0, 0), (0, 0, 0), (0, 1.5, 0), (0, 0, 0)], {
        "p'": LABIAL, "t'": ALVEOLAR, "k'": VELAR, "ts'": ALVEOLAR}),
    (8, [(0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 4, 0)], {
        "|": DENTAL, "!": VELAR, "||": PALATAL}),
    *((11, [(1, 0, 0, begin), (1, 0, 0, end)], {vowel + tone: VOWELS[vowel] for vowel in "aiu"})
      for tone, (begin, end) in TONES.items()),
]
PHONES = {
    phone: (frames, parts, place)
    for frames, parts, phones in MANNERS for phone, place in phones.items()
}


def chance(*key):
    """Random numbers for one purpose, so that nothing depends on the order of the work."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in key])


def make_language(seed, name):
    """The words, each a tuple of phones, by what they are; nouns and verbs belong to 4 topics."""
    phones, rng, taken = LANGUAGES[name][0].split(), chance(seed, "language", name), set()
    kinds = {
        "V": [p for p in phones if p.strip("1234") in VOWELS],
        "C": [p for p in phones if p.strip("1234") not in VOWELS]}

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
    noun_shapes = ["CVC", "CVVC", "VCVC", "CVCCVC"]
    return {
        "determiners": [words(2, ["CV"]) for _ in genders],
        "nouns": [[words(5, noun_shapes, vowel) for vowel in genders] for topic in range(4)],
        "verbs": [words(5, ["CV", "VCV", "CVCCV"], verb) for topic in range(4)],
        "rare": [words(2, noun_shapes, vowel) for vowel in genders],  # nouns that nobody says
    }


def sentence(lang, rng, topic, genders=None):
    """Determiner, noun, verb, determiner, noun, on one topic; some words are said more often."""
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
        "formants": (1, 1.15)[short] * np.exp(rng.normal(0, 0.06, 3)) * accent,
        "tilt": rng.uniform(0.5, 1.1), "pace": pace * np.exp(rng.normal(0, 0.2)),
    }


def pronounce(story, voice, rng):
    """Sentences -> tokens [(phone, 10 ms frames)], with a pause after one word in five."""
    phones = ["SIL"]
    for word in chain.from_iterable(story):
        phones += [*word, *["SIL"] * (rng.random() < 0.2)]
    phones += ["SIL"] * (phones[-1] != "SIL")
    pace = voice["pace"] * np.exp(rng.normal(0, 0.15))  # that day's
    frames = np.array([PHONES[phone][0] for phone in phones]) / pace
    frames = np.rint(frames * np.exp(rng.normal(0, 0.3, len(phones))))
    return list(zip(phones, np.maximum(frames, 3).astype(int).tolist()))


def smooth(track, steps):
    """Each column averaged over `steps`, the middle counting most."""
    kernel = np.hanning(steps + 2)[1:-1]
    return np.stack([np.convolve(c, kernel / kernel.sum(), mode="same") for c in track.T], 1)


def articulate(tokens, voice, rng):
    """Tokens -> a row every 5 ms [T, 9]: F1 F2 F3, tone, voice, noise, nasality, the noise's centre
    and width. Tongue and lips are slow: formants glide over 75 ms, so a phone sounds of its
    neighbours, and a short one never reaches its target."""
    rows, steps = [], []
    for phone, frames in tokens:
        _, parts, place = PHONES[phone]
        strength, centre, width = place[3:] or (0, 2000, 2000)
        sloppy = rng.normal(1, 0.09, 8)  # nobody says it twice the same
        rows += [
            np.insert(sloppy * (*place[:3], voiced, noise * strength, nasal, centre, width), 3,
                      sum(tone)) for voiced, noise, nasal, *tone in parts]
        steps += np.diff(np.arange(len(parts) + 1) * 2 * frames // len(parts)).tolist()
    track = np.repeat(rows, steps, axis=0)
    slow = smooth(track[:, :4] * (*voice["formants"], 1), 15)
    return np.hstack([slow, smooth(track[:, 4:], 3)]).astype(np.float32)


def speak(tokens, voice, rng):
    """Tokens -> clean speech [N], 160 samples a frame."""
    track = articulate(tokens, voice, rng)
    steps, hertz = len(track), np.linspace(0, 8000, 201, dtype=np.float32)
    f1, f2, f3, tone, voicing, noise, nasal, centre, width = track.T[:, :, None]  # each [T, 1]

    def bump(centre, width):
        return 1 / (1 + ((hertz - centre) / width) ** 2)  # [T, 201]

    mouth = bump(f1, 60) + 0.6 * bump(f2, 80) + 0.35 * bump(f3, 120)
    mouth *= (1 + (hertz / 600) ** 2) ** np.float32(-voice["tilt"] / 2)  # the glottis is dull
    mouth *= 1 - 0.85 * nasal * bump(0.9 * f2, 200)  # a shut mouth swallows part of the sound
    mouth *= voicing
    passage = noise * bump(centre, width) * np.sqrt(1000 / width) + 0.05 * mouth

    pitch = voice["pitch"] * np.exp(tone + 0.6 * smooth(rng.normal(0, 1, (steps, 1)), 61))[:, 0]
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


def write_corpora(folder, part, seed, scale):
    """Manifests, alignments, ABX items and audio of a part; returns the words that were said."""
    languages, count, speakers, length, snr = CORPORA[part]
    tables, jobs, said = defaultdict(list), [], Counter()
    for language, i in product(languages, range(max(2, round(count * scale)))):
        speaker = f"{language}-{part}-{i % speakers}"
        fileid, voice = f"{speaker}-{i:04d}", make_voice(seed, language, speaker)
        path = f"{'train/' if part == 'train' else ''}{language}/{fileid}.wav"
        lang, rng = make_language(seed, language), chance(seed, fileid)
        topic, sentences = rng.integers(4), round(voice["pace"] * rng.uniform(*length))
        story = [sentence(lang, rng, topic) for _ in range(sentences)]
        tokens = pronounce(story, voice, rng)
        tables["train" if part in ("train", "lm") else language].append({
            "fileid": fileid, "path": path, "language": language, "speaker": speaker,
            "num_samples": 160 * sum(frames for _, frames in tokens),
            "phones": " ".join(phone for phone, frames in tokens for _ in range(frames)),
            "items": abx_items(fileid, speaker, tokens)})
        jobs.append((folder / path, tokens, voice, snr, (seed, fileid)))
        said.update(word for words in story for word in words)
    for table, rows in tables.items():
        write_csv(folder / f"{table}.csv", "fileid path num_samples language speaker", rows)
        write_csv(folder / f"{table}_alignments.csv", "fileid phones language", rows)
        lines = ["#file onset offset #phone prev-phone next-phone speaker"]
        lines += [line for row in rows for line in row["items"]]
        (folder / f"{table}.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_wavs(jobs)
    return said


def abx_items(fileid, speaker, tokens):
    phones, frames = zip(*tokens)
    ends = np.cumsum(frames) / 100
    return [f"{fileid} {ends[i - 1]:.2f} {ends[i]:.2f} {phones[i]} {phones[i - 1]} {phones[i + 1]} "
            f"{speaker}" for i in range(len(tokens)) if phones[i] != "SIL"]


def make_pairs(lang, rng, said, count):
    """{test: [(type, frequency, right, wrong)]}, where right and wrong are lists of sentences."""
    # Two words swap their beginnings and both become non-words, so neither length nor the frequency
    # of single phones gives the non-words away.
    nouns = lang["nouns"] + [lang["rare"]]
    words = [word for topic in nouns for gender in topic for word in gender]
    lexical, syntactic, stories, seen = [], [], [], set(words)
    for one, two in rng.permutation(list(combinations(range(len(words)), 2))):
        one, two = words[one], words[two]
        new = two[:2] + one[2:], one[:2] + two[2:]
        if len(one) == len(two) and one[-1] == two[-1] and not seen & set(new):
            seen |= set(new)
            lexical += [("", said[w], [[w]], [[n]]) for w, n in zip((one, two), new)]
    # The same words in another order, so that genders do not agree, or that a noun comes too late
    # or too early.
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
            for correct, story in zip((1, 0), sides):
                name = f"{i:04d}_{'correct' if correct else 'incorrect'}"
                tokens = pronounce(story, voice, chance(*key, "timing"))
                jobs.append((folder / test / f"{name}.wav", tokens, voice, CORPORA["lm"][-1], key))
                rows.append({
                    "id": i, "filename": name, "voice": i % 3, "correct": correct, "type": kind,
                    "frequency": frequency, "phones": " ".join(phone for phone, _ in tokens)})
        write_csv(folder / test / "gold.csv",
                  "id filename voice correct type frequency phones", rows)
        write_wavs(jobs)


def write_discophon(folder, world):
    """The unseen languages once more, as DiscoPhon's folder has its languages."""
    for language, (split, part) in product(TARGETS, (("train-10min", "target"), ("test", "eval"))):
        rows = read_manifest(world / part / f"{language}.csv")
        phones = read_alignments(world / part / f"{language}_alignments.csv")
        audio, lines = folder / "audio" / language / split, ["#file onset offset #phone"]
        audio.mkdir(parents=True)
        for row in rows:
            shutil.copy(row.path, audio)
            at = 0
            for phone, same in groupby(phones[row.fileid][0]):
                begin, at = at, at + len([*same])
                lines.append(f"{row.fileid} {begin / 100:.2f} {at / 100:.2f} {phone}")
        for kind in "alignment", "item", "manifest":
            (folder / kind).mkdir(exist_ok=True)
        name = f"{language}-{split}"
        (folder / "alignment" / f"alignment-{name}.txt").write_text("\n".join(lines) + "\n")
        shutil.copy(world / part / f"{language}.item", folder / "item" / f"triphone-{name}.item")
        write_csv(folder / "manifest" / f"manifest-{name}.csv", "fileid num_samples",
                  [row._asdict() for row in rows])


def toy(folder, parts=(*CORPORA, "discophon"), seed=0, scale=1.0):
    """Makes the parts of the toy world that are not there yet; all are 200 minutes of audio.

    train.csv  eval/LANG.csv  target/LANG.csv  lm/train.csv    manifests, with _alignments and .item
    far_eval/LANG.csv  far_target/LANG.csv                     the same of the far languages
    lm/lexical/dev/gold.csv  lm/syntactic/dev/gold.csv  lm/tsc     tests in ZeroSpeech's layout
    discophon/    the unseen languages once more, in DiscoPhon's layout

    The training part is the folder itself; the others are made with its seed and scale.
    """
    about = {"version": TOY_VERSION, "seed": seed, "scale": scale}
    for part in ("train", *parts):
        place = Path(folder) if part == "train" else Path(folder, part)
        if not place.exists():
            make_part(place, part, about)
        try:
            about = json.loads((place / "toy.json").read_text())
            require(about["version"] == TOY_VERSION, "another version")
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{place}: no toy world, or one of another version of the code: name "
                             "a new folder") from None
    return Path(folder)


def make_part(place, part, about):
    """A part is written under a temporary name and gets its own when it is whole."""
    print(f"making {place}, a part of the toy world", flush=True)
    new = place.with_name(f"{place.name}.tmp{os.getpid()}")
    try:
        if part == "discophon":
            write_discophon(new, toy(place.parent, ["target", "eval"]))
        else:
            said = write_corpora(new, part, about["seed"], about["scale"])
        if part == "lm":
            write_tests(new, about["seed"], about["scale"], said)
        (new / "toy.json").write_text(json.dumps(about))
        if not place.exists():  # else another process was faster
            new.rename(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)


if __name__ == "__main__":
    run(main)
