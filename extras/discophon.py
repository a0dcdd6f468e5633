"""Phoneme discovery, language by language (DiscoPhon, arXiv 2603.18612).

    python evaluate.py discophon --model M --data DISCOPHON --out FOLDER [--languages deu,swa]

DISCOPHON is the benchmark's folder, with audio/CODE/SPLIT, alignment/ and item/.
"""

import sys
from pathlib import Path
from statistics import fmean

import data
from evaluate import (
    MEASURES, about, abx, extract, load_encoder, print_row, quality, read_items,
    read_phones, units_of, write_features, write_json, write_units)
from model import require

# The benchmark's languages, six for development and six for the test, and their phones without SIL.
LANGUAGES = {"deu": 41, "swa": 29, "tam": 29, "tha": 40, "tur": 27, "ukr": 35,
             "cmn": 42, "eng": 39, "eus": 29, "fra": 34, "jpn": 42, "wol": 39}
PUBLISHED = """published by the benchmark's authors, means of the six test languages, in %:
SpidR, 20 VoxPopuli languages, adapted to        0   10 min   1 h   10 h
    ABX of units within triphones, layer 6   13.30    10.54   9.59   9.09
    ABX of features, layer 6                  6.57     6.24   5.53   5.09
    PNMI, layer 7                             59.8     64.1   65.4   65.6
docs/evaluation.md has the leaderboard"""
DISCOVERY = "pnmi", "per", "f1", "r_value"
ABX_COLUMNS = "units within", "units across", "features within", "features across"


def run(args):
    """Language by language. What is not there is a dash."""
    root, out, encoder = Path(args.data), Path(args.out), load_encoder(args.model)
    layer = encoder.layer(args.layer, units=True)
    there = sorted(path.parent.name for path in root.glob(f"audio/*/{args.split}"))
    languages = args.languages.split(",") if args.languages else there
    missing, others = {*languages} - {*there}, {*there} - {*LANGUAGES}
    require(there and not missing,
            f"{root}: no audio/CODE/{args.split} of {', '.join(sorted(missing)) or 'any'}")
    require(args.languages or not others, f"{root}: {', '.join(sorted(others))} is not a language "
            "of DiscoPhon; to score it all the same, name it with --languages")
    out.mkdir(parents=True, exist_ok=True)
    columns = DISCOVERY + (ABX_COLUMNS if args.track == "many-to-one" else ())
    print_row(f"layer {layer}, all in %", *(MEASURES.get(name, [name])[0] for name in columns))
    results = {}
    for code in languages:
        results[code] = discover(root, out, encoder, layer, code, args)
        print_row(code, *(results[code].get(name, "-") for name in columns))
    results["mean"] = {name: fmean(row[name] for row in results.values()) for name in columns
                       if all(name in row for row in results.values())}
    print_row("mean", *(results["mean"].get(name, "-") for name in columns))
    write_json(out / f"discophon-{args.split}.json",
               about(encoder, layer) | dict(track=args.track, results=results))
    print(PUBLISHED)


def discover(root, out, encoder, layer, code, args):
    """The measures of one language, in percent."""
    name, measures = f"{code}-{args.split}", {}
    if args.track == "one-to-one" and code in LANGUAGES:
        require(encoder.codewords == LANGUAGES[code] + 1, f"one-to-one: {code} has "
                f"{LANGUAGES[code]} phones and silence, {encoder.name} {encoder.codewords} units")
    rows = data.read_manifest(root / "audio" / code / args.split)
    units = units_of(rows, encoder, layer)
    write_units(out / f"units-{name}.jsonl", units.items(), encoder, layer)
    alignment, items = root / f"alignment/alignment-{name}.txt", root / f"item/triphone-{name}.item"
    for path in alignment, items:
        if not path.exists():
            print(f"{path} is not there", file=sys.stderr)
    if alignment.exists():
        of_units = quality(units, read_phones(alignment), encoder.codewords, args.track)
        measures = {key: 100 * of_units[key] for key in DISCOVERY}
    if items.exists() and args.track == "many-to-one":
        files = {item.file for item in read_items(items)}
        rows = [row for row in rows if row.fileid in files]
        frames = {file: x[layer] for file, x in extract(rows, encoder, [layer])}
        if args.keep_features:
            write_features(out / f"features-{name}", frames.items(), encoder, layer)
        for column in ABX_COLUMNS:
            kind, speaker = column.split()
            features, distance = (units, "identity") if kind == "units" else (frames, "angular")
            measures[column] = abx(
                features, items, speaker, distance=distance, max_size_group=args.max_size_group,
                max_x_across=args.max_x_across)
    return measures
