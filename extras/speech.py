"""Real speech as one corpus: 11.4 h in 44 languages to train on, and Mboshi to test on.

    python extras/speech.py FOLDER                # clones twelve public repositories, about 4 GB
    python extras/speech.py FOLDER --from DIR     # from clones or checkouts, each DIR/OWNER+NAME

writes, everything at 16 kHz, mono:

    FOLDER/manifest.csv, audio/LANGUAGE/ID.flac   20,048 recordings
    FOLDER/alignments.csv                         a phone every 10 ms: Czech, Dutch; English where
                                                  PocketSphinx is there (pip install pocketsphinx)
    FOLDER/mboshi/eval, FOLDER/mboshi/adapt       15 and 26 minutes, other sentences of the same
                                                  three speakers; items for ABX beside eval

The audio belongs to those who published it, under the licences in the table below; none is in this
repository. Of each source one commit is used, and of each language no more than fits with the
others: what is taken was drawn once and stands in speech.txt, so that everyone has the same corpus.
The same command again goes on where the last one stopped, and tries once more what was left out.
"""

import argparse
import base64
import csv
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from data import SAMPLE_RATE, resampler, write_csv
from model import InputError, require, run

PHONE = SAMPLE_RATE // 100  # samples for each phone of an alignment: 10 ms


# ======== alignments: each format a function ========
# A function of a repository that returns a function of a recording, which gives its phones as
# [(start, end, phone)] in seconds, or None where there are none.


def dutch(repository):
    """JSON lines: {"id", "words": [{"phones": [{"start", "duration", "phone"}]}]}"""
    lines = map(json.loads, repository.read("nathalie_align.jsonl").decode().splitlines())
    words = {line["id"]: line["words"] for line in lines}

    def align(name, wav):
        phones = [phone for word in words.get(name, []) for phone in word["phones"]]
        return [(p["start"], p["start"] + p["duration"], p["phone"].lstrip("ˈˌ")) for p in phones]

    return align


def czech(repository):
    """Lines `end 26 phone`; a phone begins where the one before it ends."""
    def align(name, wav):
        lines = repository.read(f"lab/{name}.lab").decode("latin-1").splitlines()
        lines = [line.split() for line in lines if line.split()[1:2] == ["26"]]
        ends = [float(end) for end, _, _ in lines]
        phones = ["SIL" if phone in "#_" else phone for _, _, phone in lines]
        return list(zip([0.0, *ends], ends, phones))

    return align


def english(repository):
    """No alignments there: PocketSphinx makes them from what was said."""
    try:
        from pocketsphinx import Decoder
    except ImportError:
        print(f"{repository.name}: no alignments, as PocketSphinx is not installed")
        return lambda name, wav: None
    decoder = Decoder(samprate=SAMPLE_RATE, lm=None, loglevel="FATAL")
    said = transcripts(repository)

    def align(name, wav):
        words = re.sub(r"[^a-z' ]", " ", said.get(name, "").lower()).split()
        if not all(decoder.lookup_word(word) for word in words):
            return None  # not in PocketSphinx's dictionary
        try:
            decoder.set_align_text(" ".join(words))
            for level in "words", "phones":
                if level == "phones":
                    decoder.set_alignment()
                decoder.start_utt()
                decoder.process_raw((wav * 32767).astype(np.int16).tobytes(), full_utt=True)
                decoder.end_utt()
            phones = [phone for word in decoder.get_alignment() for phone in word]
        except RuntimeError:
            return None  # what is heard does not fit the words
        return [(p.start / 100, (p.start + p.duration) / 100, p.name) for p in phones]

    return align


def transcripts(repository):
    """{name: text}: LibriSpeech's lines `ID TEXT`, or a text file beside each recording."""
    said = {}
    for path in repository.files:
        folder, _, file = path.rpartition("/")
        if file.endswith(".trans.txt") and not file.startswith("."):
            lines = repository.read(path).decode().splitlines()
            said |= dict(line.split(" ", 1) for line in lines)
        elif folder == "data" and file.endswith(".txt"):
            said[file.removesuffix(".txt")] = repository.read(path).decode()
    return said


# ======== the sources ========


class Source(NamedTuple):
    prefix: str  # of the IDs of its recordings
    repository: str  # on GitHub
    commit: str
    language: str  # "": the recordings' first folder is the language
    audio: str  # a pattern of the audio's paths; its group becomes the ID, with - for /
    megabytes: int  # of the clone
    hours: float  # that are taken
    licence: str  # as stated there
    labels: Callable | None = None


SOURCES = [
    Source("kerstin", "rhasspy/dataset-voice-kerstin", "f73127135cf80d6ef52aef6af58c49774f4fd625",
           "de", r"verified/(.+)\.flac", 326, 0.47, "CC0"),
    Source("kathleen", "rhasspy/dataset-voice-kathleen", "c51cb971036a127359b43c621f26ca5081eab13e",
           "en", r"data/(.+)\.wav", 452, 0.48, "CC0", english),
    Source("nathalie", "rhasspy/dataset-voice-nathalie", "3b3e91f39d13e2e681d8937575efb9bd3b3d8f5c",
           "nl", r"verified/(.+)\.flac", 123, 0.70, "CC0", dutch),
    Source("flemish", "rhasspy/dataset-voice-flemishguy",
           "2576e9c8e5b6eec92e45010b5ede87c4f836f21e",
           "nl", r"wavs/(.+)\.wav", 130, 0.76, "CC0"),
    Source("ls", "Walleclipse/Deep_Speaker-speaker_recognition_system",
           "b975516d368eeac745e8f5270740ef277b88a8af",
           "en", r"audio/LibriSpeechSamples/train-clean-100/\d+/\d+/([\d-]+)\.flac",
           354, 0.36, "CC BY 4.0 (LibriSpeech)", english),
    Source("so", "jimbozhang/speechocean762", "613968e3b0b789fc33936fb5eba1973176ba7d11",
           "en_zh", r"WAVE/(.+)\.WAV", 497, 0.45, "free, for commercial purposes too"),
    Source("ph", "brailcom/voice-czech-ph", "6d074989405f8dddfae9acf116d7ea6a9d1989a2",
           "cs", r"wav/(.+)\.wav", 193, 0.75, "GPL-2", czech),
    Source("marylux", "mbarnig/Marylux-648-TTS-Corpus", "fde78887bc103cdc65cefcda4a785acc6e729076",
           "lb", r"dataset/wavs/(.+)\.wav", 136, 0.50, "CC BY-NC-SA"),
    Source("hsk", "hugolpz/audio-cmn", "ff9ed3d0c631195bd2c06f39450f3264c7124040",
           "cmn", r"64k/hsk/(.+)\.mp3", 436, 0.55, "CC BY-SA"),
    Source("chr", "CherokeeLanguage/cherokee-audio-data",  # not its cno, by permission only
           "9b8a9dc5b297c91df4407486ecefe1fb37ef5480",
           "chr", r"((?:see-say-write|walc-1|wwacc)/mp3/.+)\.mp3", 465, 0.50, "CC BY-NC 4.0"),
    Source("gc", "gcompris/GCompris-voices", "c0e8a743b7b4633af06b8dc15bc2b397e456dd6f",
           "", r"(\w+/.+)\.(?:ogg|wav)", 324, 5.90, "GPL or CC BY-SA by file"),
]
MBOSHI = Source("mboshi", "besacier/mboshi-french-parallel-corpus",
                "83c5b428a8251881711fa45e4ea5bb5ea6bcdc9b", "mboshi",
                r"full_corpus_newsplit/all/(.+)\.wav", 403, 0.68,
                "none; for 'reproducible experiments'")
LANGUAGES = {"nb": "no", "nn": "no", "pt_BR": "pt", "zh_CN": "cmn", "zh_TW": "cmn"}


def print_sources(out, options):
    print(f"{'prefix':9} {'language':9} {'hours':>5} {'clone':>7}  {'phones':7} licence, repository")
    for source in [*SOURCES, MBOSHI]:
        phones = source.labels.__name__ if source.labels else "mboshi" * (source is MBOSHI)
        print(f"{source.prefix:9} {source.language or '40':9} {source.hours:5.2f} "
              f"{source.megabytes:4} MB  {phones:7} {source.licence}, {source.repository}")
    megabytes = sum(source.megabytes for source in [*SOURCES, MBOSHI])
    clones = "" if options.clones else f", after {megabytes / 1000:.1f} GB of clones (in {out}/clones)"
    print(f"takes 900 MB in {out}, about five minutes{clones}")


# ======== reading a repository ========


class Repository:
    """The files of one commit, read from the git directory: it needs no work tree."""

    def __init__(self, source, folder):
        self.name = source.prefix
        git = ["git", f"--git-dir={folder}"]
        tree = call(*git, "ls-tree", "-r", "-z", source.commit).decode(errors="replace")
        self.git = subprocess.Popen([*git, "cat-file", "--batch"], bufsize=0,
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.stream = io.BufferedReader(self.git.stdout)
        self.files, links = {}, []  # {path: hash}
        for line in filter(None, tree.split("\0")):
            about, path = line.split("\t", 1)
            mode, _, self.files[path] = about.split()
            if mode == "120000":
                links.append(path)
        self.follow({path: normpath(join(dirname(path), self.read(path).decode()))
                     for path in links})

    def follow(self, links):
        """A link stands for its target: a file, or all the files of a folder."""
        for path, target in links.items():
            while target in links:
                target = links[target]
            link = self.files.pop(path)
            below = [file for file in self.files if file.startswith(target + "/")]
            self.files |= {path + file[len(target):]: self.files[file] for file in below}
            self.files[path] = self.files.get(target, link)

    def read(self, path):
        require(path in self.files, f"{path}: no such file in the repository")
        self.git.stdin.write(f"{self.files[path]}\n".encode())
        answer = self.stream.readline().split()  # hash, kind, size
        require(len(answer) == 3, f"{path}: its content is missing in this clone")
        return self.stream.read(int(answer[2]) + 1)[:-1]

    def close(self):
        self.git.stdin.close()
        self.git.wait()


def call(*command):
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL,
                          env=os.environ | {"GIT_TERMINAL_PROMPT": "0"})
    reason = done.stderr.decode(errors="replace").strip().splitlines() or [""]
    require(done.returncode == 0, f"git: {reason[0]}")
    return done.stdout


def find_repository(source, out, options):
    """The git directory of a clone that is there, or of a new one, of this one commit."""
    name = source.repository.replace("/", "+")
    folder = Path(options.clones or out / "clones") / name
    for place in folder / ".git", folder, folder / "repo" / ".git", folder / "repo":
        if (place / "objects").is_dir():
            return place
    require(not options.clones, f"no clone of it in {folder}")
    part = folder.with_name(name + ".tmp")  # an interrupted one is taken up again
    call("git", "init", "--quiet", "--bare", str(part))
    call("git", f"--git-dir={part}", "-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=60",
         "fetch", "--quiet", "--depth=1", f"{options.host}/{source.repository}", source.commit)
    part.rename(folder)
    return folder


def read_taken(path=Path(__file__).with_suffix(".txt")):
    """{prefix: "0110..."}: for each of a source's audio files in order of their paths, whether it
    is in the corpus. A line of the file: the prefix, how many files, and the bits in base 64."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return {prefix: f"{int.from_bytes(base64.b64decode(bits)):0{count}b}"
            for prefix, count, bits in lines}


# ======== audio ========


def decode(data):
    """[N] float32 at 16 kHz, the mean of the channels."""
    try:
        wav, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise InputError(error.error_string) from None
    require(len(wav), "no samples")
    return resampler(rate)(torch.from_numpy(wav).mean(1)).numpy()


def write_audio(path, wav):
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".tmp")
        soundfile.write(part, (wav * 32768).round().clip(-32768, 32767).astype(np.int16),
                        SAMPLE_RATE, format="FLAC")
        part.rename(path)


def write_table(path, header, rows):
    part = path.with_name(path.name + ".tmp")
    write_csv(part, header, rows)
    part.rename(path)


def phone_per_frame(intervals, samples):
    """A phone every 10 ms, SIL where there is none, as one string."""
    phones = ["SIL"] * math.ceil(samples / PHONE)
    for start, end, phone in intervals:
        for i in range(round(100 * start), min(round(100 * end), len(phones))):
            phones[i] = phone
    return " ".join(phones)


# ======== the corpus ========


def add_source(source, repository, out, taken):
    """Writes a source's audio, and then its rows: from then on it is complete."""
    found = sorted(path for path in repository.files if re.fullmatch(source.audio, path))
    taken = taken.get(source.prefix, "1" * len(found))
    require(len(found) == len(taken), f"{len(found)} audio files instead of {len(taken)}")
    paths = [path for path, bit in zip(found, taken) if bit == "1"]
    align = source.labels(repository) if source.labels else lambda name, wav: None
    rows, broken = [], []
    for path in tqdm(paths, source.prefix, leave=False, disable=None):
        name = re.fullmatch(source.audio, path)[1].replace("/", "-")
        fileid, first = f"{source.prefix}-{name}", path.split("/")[0]
        language = source.language or LANGUAGES.get(first, first)
        try:
            wav = decode(repository.read(path))
            phones = align(name, wav)
        except InputError as error:
            broken.append(f"{path}: {error}")
            continue
        file = f"audio/{language}/{fileid}.flac"
        write_audio(out / file, wav)
        # A few of the Dutch alignments are of a longer recording.
        fits = phones and phones[-1][1] < len(wav) / SAMPLE_RATE + 0.1
        rows.append(dict(fileid=fileid, path=file, num_samples=len(wav), language=language,
                         phones=phone_per_frame(phones, len(wav)) if fits else ""))
    report(source, rows, broken)
    write_table(out / "sources" / f"{source.prefix}.csv",
                "fileid path num_samples language phones", rows)


def add_mboshi(repository, out):
    """Draws 5 minutes of each of the three speakers for eval and, of 20 others, 10 for adapt;
    the third speaker has fewer. Utterances whose alignment is marked ERROR are left out."""
    names = sorted(match[1] for path in repository.files
                   if (match := re.fullmatch(MBOSHI.audio, path)))
    parts, seconds, broken = {"eval": [], "reserve": [], "adapt": []}, Counter(), []
    random.Random(0).shuffle(names)
    for name in tqdm(names, "mboshi", leave=False, disable=None):
        speaker = name.split("_")[0]
        part = next((part for part, limit in (("eval", 300), ("reserve", 1200))
                     if seconds[part, speaker] < limit), None)
        labels = f"ZRC_scoring/mboshi/in/{name}.phn"
        if part is None or labels not in repository.files:
            continue
        try:
            lines = repository.read(labels).decode().splitlines()
            if any("ERROR" in line for line in lines):
                continue
            wav = decode(repository.read(MBOSHI.audio.replace(r"(.+)\.", f"{name}.")))
        except InputError as error:
            broken.append(f"{name}: {error}")
            continue
        seconds[part, speaker] += len(wav) / SAMPLE_RATE
        phones = [(float(start), float(end), p) for start, end, p in map(str.split, lines)]
        parts[part].append(dict(
            fileid=name, path=f"audio/{name}.flac", num_samples=len(wav), language="mboshi",
            speaker=speaker, intervals=phones, phones=phone_per_frame(phones, len(wav)), wav=wav))
    random.Random(3).shuffle(parts["reserve"])
    for row in parts["reserve"]:
        if seconds["adapt", row["speaker"]] < 600:
            seconds["adapt", row["speaker"]] += row["num_samples"] / SAMPLE_RATE
            parts["adapt"].append(row)
    report(MBOSHI, parts["eval"] + parts["adapt"], broken)
    write_mboshi(parts, out / "mboshi")


def write_mboshi(parts, out):
    for part in "adapt", "eval":
        for row in parts[part]:
            write_audio(out / part / row["path"], row["wav"])
        write_table(out / part / "alignments.csv", "fileid phones language", parts[part])
    write_items(out / "eval" / "mboshi.item", parts["eval"], context=0, longest=0.5)
    write_items(out / "eval" / "mboshi-triphone.item", parts["eval"], context=1, longest=1.0)
    header = "fileid path num_samples language speaker"
    write_table(out / "adapt" / "manifest.csv", header,
                sorted(parts["adapt"], key=lambda row: row["fileid"]))
    write_table(out / "eval" / "manifest.csv", header, parts["eval"])  # last: all is complete


def write_items(path, rows, context, longest):
    """ABX items: phones of 30 to 500 ms; with context=1 they span their neighbours, too."""
    lines = ["#file onset offset #phone prev-phone next-phone speaker"]
    for row in rows:
        silence = (0, 0, "SIL")
        padded = [silence, *row["intervals"], silence]
        for before, (start, end, phone), after in zip(padded, padded[1:], padded[2:]):
            around = before[2], after[2]
            if phone == "SIL" or not 0.03 <= end - start <= 0.5 or context and "SIL" in around:
                continue
            if context:
                start, end = before[0], after[1]
            if end - start <= longest:
                lines.append(f"{row['fileid']} {start:.4f} {end:.4f} {phone} {' '.join(around)} "
                             f"{row['speaker']}")
    part = path.with_name(path.name + ".tmp")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.rename(path)


def report(source, rows, broken):
    for line in broken[:3]:
        print(f"{source.prefix}: left out {line}", file=sys.stderr)
    hours = sum(row["num_samples"] for row in rows) / SAMPLE_RATE / 3600
    labels = sum(bool(row["phones"]) for row in rows)
    print(f"{source.prefix}: {len(rows)} recordings, {hours:.2f} h, {labels} with phones; "
          f"{len(broken)} files could not be read")
    require(rows, "none of its recordings can be read")


def collect(out):
    """manifest.csv and alignments.csv from the sources that are complete."""
    rows = []
    for path in (out / "sources").glob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    rows.sort(key=lambda row: (row["language"], row["fileid"]))
    write_table(out / "manifest.csv", "fileid path num_samples language", rows)
    write_table(out / "alignments.csv", "fileid phones language",
                [row for row in rows if row["phones"]])
    hours = sum(int(row["num_samples"]) for row in rows) / SAMPLE_RATE / 3600
    languages = len({row["language"] for row in rows})
    print(f"{out}/manifest.csv: {len(rows)} recordings, {hours:.1f} h, {languages} languages")


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: require(False, message)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="clones", type=Path, metavar="DIR",
                        help="holds the repositories: clones or checkouts, named OWNER+NAME")
    parser.add_argument("--host", default="https://github.com", metavar="URL",
                        help="where they are cloned from (default: %(default)s)")
    options = parser.parse_args()
    require(not options.clones or options.clones.is_dir(), f"{options.clones}: no such folder")
    return options


def main():
    options = parse_options()
    out = options.folder
    torch.set_num_threads(1)
    print_sources(out, options)
    taken, missing = read_taken(), []
    for source in [*SOURCES, MBOSHI]:
        last = "mboshi/eval/manifest.csv" if source is MBOSHI else f"sources/{source.prefix}.csv"
        if (out / last).exists():
            continue
        repository = None
        try:
            repository = Repository(source, find_repository(source, out, options))
            if source is MBOSHI:
                add_mboshi(repository, out)
            else:
                add_source(source, repository, out, taken)
        except InputError as error:
            missing.append(source.prefix)
            print(f"{source.prefix}: left out: {error}", file=sys.stderr)
        finally:
            if repository:
                repository.close()
    require(len(missing) <= len(SOURCES), "no repository could be read")
    collect(out)
    if missing:
        print(f"left out: {', '.join(missing)} (the same command tries again)")


if __name__ == "__main__":
    run(main)
