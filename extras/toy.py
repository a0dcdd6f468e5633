"""The toy world: synthesised speech in made-up languages, for scripts that are given no audio.

    python extras/toy.py FOLDER                             writes it, to listen to
    python extras/toy.py table RUN [RUN ...] [--layer L]    ABX of these runs on its languages
"""

import argparse
import json
import os
import shutil
import sys
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, combinations, groupby, product
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1]))

import evaluate
from data import (
    SAMPLE_RATE, import_torchaudio, read_alignments, read_manifest, write_csv)
from model import InputError, require, run

# ======== the languages ========
# Ten made-up languages. Five to pretrain on. Three unseen ones, with phones that none of the five
# has, other vowels and nearly twice the pace. And two far ones: tonu, whose vowels differ by tone,
# and qxan, which has clicks and ejectives.
# Speech is made as textbooks explain it: a source (pulses of the glottis, noise of a narrow
# passage) goes through a filter (the resonances of the mouth). Different speakers, sloppy
# articulation, echo and noise make it hard. Everything depends on the seed and on names alone.

TOY_VERSION = 6
PLAIN = 1, (1, 1, 1)
LANGUAGES = {  # phones; pace; the factors by which its accent shifts the resonances F1, F2, F3
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
# Languages; recordings and speakers of each; sentences in a recording; dB of speech over noise.
CORPORA = {
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
# Consonants, by where the mouth is narrow: F1, F2, F3, and the strength, centre and width of the
# noise that is made there.
LABIAL, DENTAL = (330, 850, 2200, 0.25, 5000, 4000), (340, 1350, 2600, 0.3, 6400, 1500)
ALVEOLAR, PALATAL = (340, 1700, 2650, 0.8, 6000, 1100), (290, 2150, 2850, 0.8, 3400, 800)
VELAR, GLOTTAL = (320, 1700, 2100, 0.5, 1900, 500), (500, 1450, 2500, 0.4, 1400, 1200)
TONES = {"1": (0.25, 0.25), "2": (-0.25, -0.25), "3": (-0.25, 0.25), "4": (0.25, -0.25)}
# How phones are made: their length in frames of 10 ms; their parts, equally long, each with its
# voice, noise, nasality and perhaps tone (added to the logarithm of pitch); their mouths.
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
    phone: (frames, parts, mouth)
    for frames, parts, phones in MANNERS for phone, mouth in phones.items()
}


def chance(*key):
    """A generator for one purpose, so that nothing depends on the order of the work."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in key])


def make_language(seed, name):
    """The words by their kind, each a tuple of phones. Nouns and verbs belong to four topics."""
    phones, rng, taken = LANGUAGES[name][0].split(), chance(seed, "language", name), set()
    kinds = {
        "V": [p for p in phones if p.strip("1234") in VOWELS],
        "C": [p for p in phones if p.strip("1234") not in VOWELS]}

    def words(count, shapes, *ending):
        made = []
        while len(made) < count:
            word = *(str(rng.choice(kinds[kind])) for kind in rng.choice(shapes)), *ending
            if word not in taken:
                taken.add(word)
                made.append(word)
        return made

    # A noun ends in the vowel of its gender, a verb in a consonant; determiners have a gender too.
    genders, verb = kinds["V"][1:4:2], kinds["C"][-1]
    noun_shapes = ["CVC", "CVVC", "VCVC", "CVCCVC"]
    return {
        "determiners": [words(2, ["CV"]) for _ in genders],
        "nouns": [[words(5, noun_shapes, vowel) for vowel in genders] for topic in range(4)],
        "verbs": [words(5, ["CV", "VCV", "CVCCV"], verb) for topic in range(4)],
        "rare": [words(2, noun_shapes, vowel) for vowel in genders],  # nouns that no sentence has
    }


def sentence(lang, rng, topic, genders=None):
    """Determiner, noun, verb, determiner, noun, on one topic. The first words of a list are said
    most often."""
    def pick(words):
        weights = 1 / np.arange(2, len(words) + 2)
        return words[rng.choice(len(words), p=weights / weights.sum())]

    words = []
    for gender in genders or rng.integers(2, size=2):
        words += [pick(lang["determiners"][gender]), pick(lang["nouns"][topic][gender])]
    return [*words[:2], pick(lang["verbs"][topic]), *words[2:]]


def make_voice(seed, language, speaker):
    """A shorter mouth has higher formants, and usually goes with a higher pitch."""
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
    and width. Tongue and lips are slow: formants glide over 75 ms, so a phone depends on its
    neighbours, and a short one never reaches its target."""
    rows, steps = [], []
    for phone, frames in tokens:
        _, parts, mouth = PHONES[phone]
        strength, centre, width = mouth[3:] or (0, 2000, 2000)
        sloppy = rng.normal(1, 0.09, 8)  # nobody says it twice the same
        rows += [
            np.insert(sloppy * (*mouth[:3], voiced, noise * strength, nasal, centre, width), 3,
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
    """Jobs are (path, tokens, voice, range of decibels, key of their random numbers)."""
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
        alignments = read_alignments(world / part / f"{language}_alignments.csv")
        audio, lines = folder / "audio" / language / split, ["#file onset offset #phone"]
        audio.mkdir(parents=True)
        for row in rows:
            shutil.copy(row.path, audio)
            end = 0
            for phone, same in groupby(alignments[row.fileid][0]):
                begin, end = end, end + len([*same])
                lines.append(f"{row.fileid} {begin / 100:.2f} {end / 100:.2f} {phone}")
        for kind in "alignment", "item", "manifest":
            (folder / kind).mkdir(exist_ok=True)
        name = f"{language}-{split}"
        (folder / "alignment" / f"alignment-{name}.txt").write_text("\n".join(lines) + "\n")
        shutil.copy(world / part / f"{language}.item", folder / "item" / f"triphone-{name}.item")
        write_csv(folder / "manifest" / f"manifest-{name}.csv", "fileid num_samples",
                  [row._asdict() for row in rows])


def toy(folder, parts=(*CORPORA, "discophon"), seed=0, scale=1.0):
    """Makes those parts of the toy world that are not there yet. Together they are 200 minutes.

    train.csv  eval/LANG.csv  target/LANG.csv  lm/train.csv    manifests, with _alignments and .item
    far_eval/LANG.csv  far_target/LANG.csv                     the same of the far languages
    lm/lexical/dev/gold.csv  lm/syntactic/dev/gold.csv  lm/tsc     tests in ZeroSpeech's layout
    discophon/    the unseen languages once more, in DiscoPhon's layout

    The training part is the folder itself; the others are made with its seed and scale.
    """
    about = {"version": TOY_VERSION, "seed": seed, "scale": scale}
    for part in ("train", *parts):
        out = Path(folder) if part == "train" else Path(folder, part)
        if not out.exists():
            make_part(out, part, about)
        try:
            about = json.loads((out / "toy.json").read_text())
            require(about["version"] == TOY_VERSION, "another version")
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{out}: no toy world, or one of another version of the code: name "
                             "a new folder") from None
    return Path(folder)


def make_part(out, part, about):
    """A part is written under a temporary name and gets its own when it is whole."""
    print(f"making {out}, a part of the toy world", flush=True)
    new = out.with_name(f"{out.name}.tmp{os.getpid()}")
    try:
        if part == "discophon":
            write_discophon(new, toy(out.parent, ["target", "eval"]))
        else:
            said = write_corpora(new, part, about["seed"], about["scale"])
        if part == "lm":
            write_tests(new, about["seed"], about["scale"], said)
        (new / "toy.json").write_text(json.dumps(about))
        if not out.exists():  # else another process was faster
            new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


# ======== the table ========


def toy_table(world, encoders, layer=None, every=False):
    """ABX on the toy world, with a few tokens a cell, at one layer or at every layer. Returns
    {encoder: [layers, 4]}: within and across speakers, the mean of the unseen languages and then a
    seen one."""
    evaluate.print_row("ABX error, %", "layer", "unseen within", "unseen across", "seen within",
              "seen across")
    tables = {}
    for name, encoder in encoders.items():
        layers, errors = [encoder.layer(layer if encoder.codebooks else None)], []
        if every:
            layers = range(1, encoder.layers + 1)
        for language in [*TARGETS, EVAL_SOURCES[0]]:
            rows = read_manifest(world / "eval" / f"{language}.csv")
            items = world / "eval" / f"{language}.item"
            outputs_of = dict(evaluate.extract(rows, encoder, layers))
            errors.append([])
            for number in layers:
                features = {file: outputs[number] for file, outputs in outputs_of.items()}
                errors[-1].append([
                    evaluate.abx(features, items, speaker, max_size_group=5, max_x_across=2)
                    for speaker in ("within", "across")])
        tables[name] = np.hstack([np.mean(errors[:-1], 0), errors[-1]])
        for number, line in zip(layers, tables[name]):
            evaluate.print_row(name, number, *line)
    return tables


def toy_encoders(runs):
    """MFCC, if torchaudio loads, and the runs {name: folder}."""
    encoders = {}
    try:
        import_torchaudio("the MFCC baseline")
        encoders["mfcc"] = evaluate.load_encoder("mfcc")
    except InputError as error:
        print(error)
    return encoders | {name: evaluate.load_encoder(run) for name, run in runs.items()}


def run_table(arguments):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--layer", type=int)
    args = parser.parse_args(arguments)
    world = evaluate.options_of(args.runs[0]).get("toy")
    require(world, f"{args.runs[0]}: its config.json names no toy world")
    toy(world, ["eval"])
    toy_table(Path(world), toy_encoders({run: run for run in args.runs}), args.layer)


def main():
    match sys.argv[1:]:
        case ["table", *arguments] if arguments:
            run_table(arguments)
        case [folder] if folder not in ("-h", "--help", "table"):
            print(f"the toy world is in {toy(folder)}")
        case _:
            print(__doc__)


if __name__ == "__main__":
    run(main)
