"""pytest: what the code beside the papers promises. Helpers are those of test_smoke.py."""

import http.server
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, MagicMock

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import evaluate
import meta_train
import model as networks
import pretrain
from extras import (
    corpora, experiments, formats, maml, released, shapes, speech, speed, unit_lm)
from extras import toy as toy_world
from model import Config, SpidR
from test_smoke import (
    HEADER, ONE, classifier, cli, complains, float64, formula_batch, formula_model, meta, metrics,
    module_of, moved, near, reference, refused, s, same, small_presets, toy, write_tone,
    write_units_file)


# ======== released models ========


class Site(http.server.SimpleHTTPRequestHandler):
    """Sends files; instead of a busy configuration a 503; of what is cut less than it promises."""
    asked = []

    def do_GET(self):
        busy = self.path.endswith("busy/config.json")
        self.send_error(503) if busy else super().do_GET()

    def send_header(self, name, value):
        cut = name == "Content-Length" and "cut" in self.path
        super().send_header(name, int(value) + 1000 if cut else value)

    def log_message(self, *_):
        self.asked.append(self.path)

DINOSR = released.RELEASED["dinosr_base"][1].rpartition("/")[2]


def test_released_models_are_downloaded_once(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    model, html = formula_model(), b"<!DOCTYPE html><title>Please log in</title>"
    config = json.dumps({"model": networks.released_config(model.config)}).encode()
    torch.save({"model": model.state_dict()}, "whole.pt")
    whole = Path("whole.pt").read_bytes()
    for name, weights, about in (
        ("a", whole, config), ("b", whole, config), ("cut", whole[:5000], config),
        ("page", html, config), ("login", whole, html), ("busy", whole, config),
        ("without", whole, None),
    ):
        Path(name).mkdir()
        Path(name, "step_1.pt").write_bytes(weights)
        if about:
            Path(name, "config.json").write_bytes(about)
    handler = partial(Site, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setitem(released.RELEASED, "mine", ("a model", f"{address}/a/step_1.pt"))
        for what in "mine", "mine", f"{address}/a/step_1.pt":
            same(networks.load(what).state_dict(), model.state_dict())
        assert len(Site.asked) == 2  # the configuration and the weights
        monkeypatch.setitem(released.RELEASED, "dinosr_base", ("", f"{address}/b/{DINOSR}"))
        Path("b/step_1.pt").rename(f"b/{DINOSR}")
        dinosr = networks.load("dinosr_base").config  # its objective is nowhere but in its name
        assert dinosr.objective == "dinosr" and dinosr.ema_schedule == "linear"
        for name, message in (
            ("without", "taken for base for want of"), ("missing", "404"), ("busy", "503"),
            ("login", "config.json"), ("cut", "."), ("page", "not a checkpoint"),
        ):
            complains(message, networks.load, f"{address}/{name}/step_1.pt")
        server.shutdown()
    complains("refused.*put the file there by hand", networks.load, f"{address}/c/step_1.pt")
    assert len([*Path("hub").rglob("*.pt")]) == 3  # nothing that did not load was kept
    assert not [*Path("hub").rglob("*login*/config.json")]
    code, out, _ = cli(released)
    assert code == 0 and out.count("not here yet") == len(released.RELEASED) - 2 and "BY-NC" in out


def test_the_network_is_shown(cli):
    status, out, _ = cli(shapes, "tiny")
    assert status == 0 and "layer 2, head and codebook 0   (1, 49, 128)" in out
    refused(cli(shapes, "huge"), "huge: base, tiny, small")


# ======== formats ========

GRID = """File type = "ooTextFile"
Object class = "TextGrid"

0 0.5 <exists> 3
"IntervalTier" "words" 0 0.5 1 0 0.5 "say ""5 a"" ʃ"
"TextTier" "clicks" 0 0.5 1 0.3 "!"
"IntervalTier" "Phones" 0 0.5 5 0 0.0449 "" 0.0449 0.285 "ʃ"
0.285 0.288 "t" 0.288 0.3 "5 ""a"" b" 0.3 0.5 "<p:>"
"""


def test_textgrids_are_read(tmp_path):
    (tmp_path / "short.TextGrid").write_text(GRID)
    formats.write_textgrid(tmp_path / "long.TextGrid", 0.5, {
        name: [(float(on), float(off), label) for on, off, label in tier]
        for name, tier in formats.read_textgrid(tmp_path / "short.TextGrid").items()})
    long = (tmp_path / "long.TextGrid").read_text()
    (tmp_path / "in/deep").mkdir(parents=True)
    for name, text, encoding in (("deep/a", GRID, "utf-8"), ("b", GRID, "utf-16"),
                                 ("c", long, "utf-8-sig"), ("d", long, "utf-16")):
        path = tmp_path / "in" / f"{name}.TextGrid"
        path.write_text(text, encoding=encoding)
        assert formats.read_textgrid(path)["words"] == [("0", "0.5", 'say "5 a" ʃ')]
    alignments = data.read_alignments(tmp_path / "in", dict(a="x", b="y", c="z"))
    assert {file: language for file, (_, language) in alignments.items()} == dict(
        a="x", b="y", c="z", d="")
    # 44.9 ms are 4 phones, 285 ms are 29: halves go up, in decimals. What is too short goes.
    phones = ["SIL"] * 4 + ["ʃ"] * 25 + ['5 "a" b'] + ["SIL"] * 20
    assert all(found == phones for found, _ in alignments.values())
    [*words] = data.read_alignments(tmp_path / "in", tier="WORDS")["a"][0]
    assert words == ['say "5 a" ʃ'] * 50
    complains("which tier .* words, phones", data.read_alignments, tmp_path / "in", tier="x")
    for old, new, message in (
        ("Phones", "sounds", "which tier"), ("0.288 0.3", "0.288 0.2", "an overlap at 0.288"),
        ("0.288 0.3", "0.288 0.x", "0.x"), (GRID[-80:], "", "not a TextGrid")):
        (tmp_path / "in/b.TextGrid").write_text(GRID.replace(old, new))
        complains(f"b.TextGrid: .*{message}", data.read_alignments, tmp_path / "in")


def test_textgrids_are_written(tmp_path):
    label, path = 'say "5 a" ʃ', tmp_path / "out.TextGrid"
    units = [(0.0, 0.06, "12"), (0.06, 0.1, "3"), (0.5, 1.0, label)]
    formats.write_textgrid(path, 1.234, dict(units=units, phones=[(0.1, 1.25, "a")], empty=[]))
    found = {name: [(float(on), float(off), label) for on, off, label in tier]
             for name, tier in formats.read_textgrid(path).items()}
    assert found == dict(
        units=[*units[:2], (0.1, 0.5, ""), units[2], (1.0, 1.25, "")],
        phones=[(0.0, 0.1, ""), (0.1, 1.25, "a")], empty=[(0.0, 1.25, "")])


# ======== corpora ========


def written(cli, corpus, *more):
    """The manifest and the alignments that the command writes, and what it leaves out."""
    status, _, err = cli(corpora, corpus, "in", "out.csv", *more)
    assert status == 0, err
    refused(cli(corpora, corpus, "in", "out.csv", *more), "out.csv is there already")
    rows, phones = data.check_audio(data.read_manifest("out.csv"), 2000), {}
    if Path("out_alignments.csv").exists():
        phones = data.read_alignments("out_alignments.csv")
        data.aligned_rows(rows, phones)
    rows = [(row.fileid, row.num_samples, row.language) for row in rows]
    return rows, {fileid: [*found] for fileid, (found, _) in phones.items()}, err


def test_librispeech(cli):
    for n in range(3):
        write_tone(f"in/dev-clean/84/1/84-1-000{n}.flac", seconds=0.5)
    Path("in/dev-clean/84/1/84-1.trans.txt").write_text("84-1-0000 GO")
    Path("grids").mkdir()
    for n, end in (0, 0.5), (1, 0.9), (7, 0.5):
        phones = [(0, 0.1, ""), (0.1, 0.2, "AH0"), (0.2, end, "spn")]
        path = Path(f"grids/84-1-000{n}.TextGrid")
        formats.write_textgrid(path, end, dict(words=[], phones=phones))
    Path("grids/84-1-0002.TextGrid").write_text("File type")
    rows, phones, err = written(cli, "librispeech", "--alignments", "grids")
    assert rows == [(f"84-1-000{n}", 8000, "en") for n in range(3)]
    assert phones == {"84-1-0000": ["SIL"] * 10 + ["AH"] * 10 + ["spn"] * 30}
    assert "84-1-0001: it lasts 0.9 s, the recording 0.50 s" in err
    assert "84-1-0002.TextGrid: not a TextGrid" in err
    assert ",8000,en,84\n" in Path("out.csv").read_text()


def test_voxpopuli(cli):
    for name in "fr/2013/x_fr_1", "fr/2014/x_fr_1", "de/2009/20090114-0900_de_0":
        write_tone(f"in/{name}.ogg", seconds=0.5)
    rows, _, _ = written(cli, "voxpopuli")
    assert {fileid: language for fileid, _, language in rows} == {
        "20090114-0900_de_0": "de", "fr/2013/x_fr_1": "fr", "fr/2014/x_fr_1": "fr"}


def test_common_voice(cli):
    write_tone("in/clips/common_voice_cy_1.mp3", 48_000)
    Path("in/validated.tsv").write_text(
        "client_id\tpath\tsentence\tup_votes\tlocale\n"
        'ab\tcommon_voice_cy_1.mp3\t"Ie, meddai\t2\tcy\n'  # a quote that is never closed
        "cd\tcommon_voice_cy_2.mp3\tNa\t2\tcy\n")
    [(fileid, _, language)], _, err = written(cli, "commonvoice")
    assert (fileid, language) == ("common_voice_cy_1", "cy")
    assert "common_voice_cy_2.mp3: no such file" in err


def test_kaldi(cli):
    soundfile.write(write_tone("in/a.wav"), np.arange(48_000) / 48_000, 16_000)
    for name, text in (("wav.scp", f"rec {Path('in/a.wav').absolute()}\n"),
                       ("segments", "s-u1 rec 0.5 1.5\ns-u2 rec 1.5 2.75\ns-u3 rec 2.5 3.5\n"),
                       ("utt2spk", "s-u1 s\ns-u2 s\ns-u3 s\n"), ("phones.txt", "sil_S 1\nAA_B 2\n"),
                       ("ali.ctm", "s-u1 1 0.00 0.30 1\ns-u1 1 0.30 0.68 2\ns-u2 1 0.1 0.2 1\n")):
        Path("in", name).write_text(text)
    refused(cli(corpora, "kaldi", "in", "out.csv"), "--language")
    rows, phones, err = written(cli, *"kaldi --language sw --alignments in/ali.ctm".split())
    assert rows == [("s-u1", 16_000, "sw"), ("s-u2", 20_000, "sw")]
    assert data.read_audio("out/s-u1.flac")[0] == pytest.approx(0.5 / 3, abs=1e-4)
    assert phones == {"s-u1": ["SIL"] * 30 + ["AA"] * 68}
    assert "s-u3: cut short" in err and "s-u2: a gap" in err
    Path("in/wav.scp").write_text("rec sph2pipe -f wav a.sph |\n")
    refused(cli(corpora, *"kaldi in other.csv --language sw".split()), "is a command, not a file")


# ======== MAML ========


def test_maml_is_the_gradient_of_the_loss_after_the_inner_steps(float64):
    model = formula_model(layers=2, ema_start=1.0).train()
    model.supervised_classifiers["x"] = classifier(32, 5)
    *inner, outer = [formula_batch(8000, i, i + 2) for i in range(3)]
    o = maml.Options(alpha=0.02, supervised_layer=2)
    start = {n: t.clone() for n, t in model.state_dict().items() if n != "current_step"}

    def gradient(**how):
        model.load_state_dict(start, strict=False)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return maml.meta_gradient(model, o, inner, [outer], **how)

    exact, first = gradient()[0], gradient(exact=False)[0]
    same(exact, gradient(checkpointed=True)[0], 1e-12)
    for name in "student.layers.0.attention.qkv.weight", "heads.0.0.weight", "mask_embedding":
        slope, losses = exact[f"model.{name}"], []
        for step in 1e-7, -1e-7:
            start[name] += step * slope / slope.norm()
            losses.append(gradient()[1].item())
            start[name] -= step * slope / slope.norm()
        near((losses[0] - losses[1]) / 2e-7, slope.norm(), 1e-4)
        assert not torch.allclose(first[f"model.{name}"], slope, rtol=0.01)
    assert first["model.heads.0.0.weight"].norm() == 0  # FOBLO sees no way from a head to phi


def test_maml_trains_and_is_measured(cli, toy, reference):
    args = meta(toy, reference, "--workers", 1, "--updates", 1, "--beta", 1)
    assert cli(maml, *args, "--out", "maml")[0] == 0
    names = moved(reference, "maml")
    assert any("attention" in name for name in names) and not any("teacher" in n for n in names)
    code, out, _ = cli(maml, *args, "--measure", "--out", "none")
    records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert code == 0 and [r["way"] for r in records][::3] == ["foblo", "maml"]
    assert records[0]["loss"] == pytest.approx(records[-1]["loss"], rel=1e-3)
    refused(cli(meta_train, *args, "--method", "maml"), "--method maml: one of foblo, reptile")


# ======== DiscoPhon ========


@torch.no_grad()
def test_discophon(toy, reference, cli):
    """The toy world in DiscoPhon's layout gives what the same audio gives by its own verbs."""
    disco, table = toy / "discophon", toy / "eval/goxi_alignments.csv"
    rows = data.read_manifest(disco / "manifest/manifest-goxi-test.csv")
    assert len(data.check_audio(rows, 2000)) == len(data.read_alignments(table))
    verb = evaluate, "discophon", "--model", reference, "--data", disco, "--out", "d"
    refused(cli(*verb), "goxi, juthe, wytsa is not a language of DiscoPhon")
    refused(cli(*verb, "--split", "valid"), "no audio/CODE/valid of any")
    more = "--languages", "goxi,juthe", "--layer", 2, "--max-size-group", 5
    code, out, err = cli(*verb, *more)
    found = json.loads(Path("d/discophon-test.json").read_text())["results"]
    assert code == 0 and found.keys() == {"goxi", "juthe", "mean"} and "13.30" in out, err
    records = map(json.loads, open("d/units-goxi-test.jsonl"))
    assert all(record.keys() == {"file", "units"} for record in records)
    cli(evaluate, "quality", "--units", "d/units-goxi-test.jsonl", "--alignments", table,
        "--out", "q.json")
    q = json.loads(Path("q.json").read_text())
    assert found["goxi"]["pnmi"] == 100 * q["pnmi"] and found["goxi"]["per"] == 100 * q["per"]
    values = [found[language]["features across"] for language in ("goxi", "juthe")]
    assert found["mean"]["features across"] == pytest.approx(np.mean(values))

    shutil.copytree(disco, "some")
    Path("some/alignment/alignment-goxi-test.txt").unlink()
    Path("some/item/triphone-goxi-test.item").unlink()
    some = evaluate, *f"discophon --model {reference} --data some --out e --languages".split()
    code, out, err = cli(*some, "goxi")
    assert code == 0 and "-" in out.splitlines()[1].split() and err.count("is not there") == 2
    refused(cli(*some, "goxi,xyz"), "no audio/CODE/test of xyz")
    Path("some/audio/goxi").rename("some/audio/wol")
    refused(cli(*some, "wol", "--track", "one-to-one"), "wol has 39 phones and silence")


# ======== the language model ========


def successors(seed, length=60):
    """A language: the next unit is the last one plus 1, or, one time in ten, any."""
    rng, units = np.random.default_rng(seed), [0]
    while len(units) < length:
        units.append(int(rng.integers(8)) if rng.random() < 0.1 else (units[-1] + 1) % 8)
    return units


@torch.no_grad()
def slow_score(lm, units):
    """One prefix at a time: the log-probability of each unit after what its window has."""
    units, total, half = evaluate.dedupe(units), 0.0, (lm.context + 1) // 2
    tokens = torch.tensor([lm.boundary, *units])
    for t in range(1, len(tokens)):
        start = max(0, -(-(t - lm.context) // half) * half)  # the first window that reaches t
        total -= lm(tokens[None, start : t + 1])[0, -1].item()
    return total / len(units)


def test_a_score_is_the_mean_log_probability_of_each_unit_after_its_prefix():
    torch.manual_seed(0)
    lm = unit_lm.UnitLM(codewords=8, layers=2, dim=16, heads=2, context=16, dropout=0.1).eval()
    for p in lm.parameters():  # far from uniform
        p.data += 0.3 * torch.randn_like(p)
    # -log p of every token that may come next is of a distribution.
    tokens = torch.tensor([[8, 1, 2, 3, v] for v in range(9)])
    assert (-lm(tokens)[:, -1]).exp().sum().item() == pytest.approx(1, abs=1e-5)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(8, size=n) for n in (19, 2, 70, 15, 18, 5, 30, 37, 1)] + [[3] * 9]
    expected = [slow_score(lm, units) for units in sequences]
    found = [unit_lm.score_units(lm, units) for units in sequences]
    assert np.allclose(found, expected, atol=1e-5)
    assert len(set(np.round(expected, 3))) == len(expected)  # the check distinguishes them
    rows = [torch.tensor([8, 1, 2, 3, 8]), torch.tensor([8, 4, 8])]  # padding changes nothing
    padded = lm(nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1))
    assert torch.allclose(padded[1], nn.functional.pad(lm(rows[1][None])[0], (0, 2)), atol=1e-6)


def train(folder, units, *more):
    small = "--layers 2 --dim 32 --heads 2 --context 32 --batch-tokens 512 --log-every 5"
    where = ["--units", str(units), "--out", str(folder), "--device", "cpu"]
    unit_lm.train([*where, *small.split(), *map(str, more)])
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    units = write_units_file(folder / "u.jsonl", {f"f{i}": successors(i) for i in range(60)})
    held_out = {f"v{i}": successors(100 + i) for i in range(5)}
    valid = write_units_file(folder / "v.jsonl", held_out)
    train(folder / "run", units, "--valid", valid, "--steps", 120)
    return folder


def test_it_learns_which_side_is_right(trained):
    lm, header = unit_lm.load_lm(trained / "run", "cpu")
    right = [successors(1000 + i, 20) for i in range(80)]
    wins = [unit_lm.score_units(lm, x) > unit_lm.score_units(lm, x[::-1]) for x in right]
    assert header == HEADER and np.mean(wins) > 0.95
    losses = metrics(trained / "run", "loss")
    assert losses[0] > np.log(9) - 0.3 and metrics(trained / "run", "valid_loss")[-1] < 1


def test_the_language_model_resumes_bit_for_bit(trained, tmp_path):
    options = "--steps", 12, "--save-every", 4, "--accumulate", 2
    whole = train(tmp_path / "whole", trained / "u.jsonl", *options)
    killed = MagicMock(wraps=unit_lm.lm_step, side_effect=[DEFAULT] * 6 + [KeyboardInterrupt])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unit_lm, "lm_step", killed)
        train(tmp_path / "parts", trained / "u.jsonl", *options)
    parts = train(tmp_path / "parts", trained / "u.jsonl", *options)
    assert parts["step"] == 12
    same(parts["model"], whole["model"])
    other = write_units_file(tmp_path / "other.jsonl", {"a": [1, 8]})
    complains("other.jsonl: a: not a list of units from 0 to 7", train, tmp_path / "bad", other)
    evaluate.write_json(evaluate.meta_of(other), dict(codewords=8))
    other.write_text('{"file": "a", "units": [1, 2]}\n')
    complains("other.meta.json is missing or incomplete", train, tmp_path / "bad", other)


# ======== pairs ========


def test_voices_are_averaged_first():
    """The accuracy of pair 1 is 62.5%, of 2 none; over recordings it would be 50%."""
    scores = {"1a1": -1, "1a0": -2, "1b1": -1, "1b0": -2, "1c1": -1, "1c0": -1, "1d1": -3,
              "1d0": -1, "2a1": -2, "2a0": -1}
    pairs = {pair: (["all"], {voice: ([pair + voice + "0"], [pair + voice + "1"])
                              for voice in voices}) for pair, voices in (("1", "abcd"), ("2", "a"))}
    assert unit_lm.accuracies(pairs, scores) == {"all": dict(accuracy=31.25, pairs=2)}

GOLD = """id,filename,voice,frequency,word,phones,length,correct
1,w1,a,oov,x,x,1,1
1,w2.wav,a,oov,x,x,1,0
2,w3,a,7,x,x,1,1
2,w4,a,7,x,x,1,0
"""


def run_pairs(task, folder, lm, *more):
    args = evaluate.parse([task, "--lm", str(lm), "--data", str(folder), *map(str, more)])
    return args.function(args)


def test_gold_csv(trained, tmp_path):
    dev = tmp_path / "lexical/dev"
    dev.mkdir(parents=True)
    right, wrong = successors(7, 20), successors(7, 20)[::-1]
    units = write_units_file(tmp_path / "t.jsonl", dict(w1=right, w2=wrong, w3=wrong, w4=right))
    (dev / "gold.csv").write_text(GOLD)
    common = trained / "run", "--units", units
    results = run_pairs("swuggy", dev.parent, *common, "--out", tmp_path / "out")
    assert results == run_pairs("swuggy", dev, *common)
    assert results == json.loads((tmp_path / "out/swuggy.json").read_text())["results"]
    found = {group: (x["accuracy"], x["pairs"]) for group, x in results.items()}
    assert found == {"all": (50.0, 2), "frequency oov": (100.0, 1), "frequency 6 to 20": (0.0, 1),
                     "in vocabulary": (0.0, 1)}
    names, scores = zip(*map(str.split, open(tmp_path / "out/lexical/dev.txt")))
    assert names == ("w1", "w2", "w3", "w4") and scores[0] == scores[3] != scores[1]
    for old, new, message in (
            ("frequency", "count", "gold.csv:2: .*'frequency'"),
            ("oov,x,x,1,0", "oov,x,x,1,no", "gold.csv:3: .*'no'"),
            ("w4", "w5", "no units of w5"),
            ("2,w4", "3,w4", "a side of pair 2 is missing")):
        (dev / "gold.csv").write_text(GOLD.replace(old, new))
        complains(message, run_pairs, "swuggy", dev, *common)
    (dev / "gold.csv").write_text(GOLD)
    other = write_units_file(tmp_path / "o.jsonl", {"w1": right}, hash="ff")
    complains("hash is 'ff', not '0f'", run_pairs, "swuggy", dev, trained / "run", "--units", other)


def test_pairs_from_audio(trained, tmp_path, monkeypatch):
    """tSC from wav files, by an encoder that makes a unit of nothing but time."""
    def units(wav):
        return dict.fromkeys((2, 3, 4), torch.arange(len(wav) // 320 - 1) % 2)

    encoder = evaluate.Encoder("M", "0f", 4, 3, 8, None, units)
    monkeypatch.setattr(unit_lm, "load_encoder", lambda name: encoder._replace(hash=name))
    for name in ("0001_correct", "0001_incorrect"):
        write_tone(tmp_path / f"{name}.wav", seconds=0.5)
    common = tmp_path, trained / "run", "--model"
    assert run_pairs("tsc", *common, "0f") == {"all": dict(accuracy=50.0, pairs=1)}  # a tie
    complains("other weights than those of M", run_pairs, "tsc", *common, "other")


# ======== experiments ========


@pytest.fixture
def experiment(cli, small_presets, monkeypatch):
    """Experiments run their commands in this process, and shorter ones."""
    def run(script, *words):
        words = [{"10min": "3s", 600: 3, 4: 1}.get(word, word) for word in words]
        status, out, err = cli(module_of(script), *words)
        assert status == 0, (script, words, err)
        return out

    monkeypatch.setattr(experiments, "run", run)
    experiments.RESULTS.mkdir(parents=True)


def test_each_experiment_runs(toy, experiment, monkeypatch):
    for name, value in (("GRID", [[1]] * 3), ("BATCHES", [[4], [1e-3]]),
                        ("INNER", [1]), ("FOLLOW", ([1], [("foblo", 1, 1), ("maml", 1, 1)])),
                        ("AMOUNTS", [10])):
        monkeypatch.setattr(experiments, name, value)
    monkeypatch.setattr(toy_world, "FAR", ["qxan"])
    experiments.table(0, [0, 10], ["sl-foblo"])
    one_language = partial(experiments.discover, languages=["goxi"])
    monkeypatch.setattr(experiments, "discover", one_language)
    corpus = "--manifest", toy / "train.csv", "--alignments", toy / "train_alignments.csv"
    test = [toy / f"eval/goxi{end}" for end in (".item", ".csv", "_alignments.csv")]
    for name, value in (("REAL", ("--preset", "small", *corpus)), ("CURVE", {"sl": 1}),
                        ("TESTS", {"mboshi": [*test, toy / "target/goxi.csv"]}),
                        ("REAL_STEPS", {"sl": []})):
        monkeypatch.setattr(experiments, name, value)
    experiments.real(0, [0, 10], ["mfcc", "untrained", "sl-control"])
    for name in "curve labels layers batch grid far maml follow draw".split():
        getattr(experiments, name)(0)


def test_english_is_held_out(toy, experiment, monkeypatch):
    """No recording is in two parts, and the items lie where the alignment has their phones."""
    rows, labels = [], []
    for part, language in ("train", ""), ("eval/goxi", "en"):
        for path, lines in (f"{part}.csv", rows), (f"{part}_alignments.csv", labels):
            for _, line in data.read_table(toy / path):
                line["language"] = language or line["language"]
                lines.append(line | {"path": toy / "eval" / line.get("path", "")} if language else
                             line | {"path": toy / line.get("path", "")})
    data.write_csv(Path("corpus/manifest.csv"), "fileid path num_samples language", rows)
    data.write_csv(Path("corpus/alignments.csv"), "fileid phones language", labels)
    monkeypatch.setattr(experiments, "CORPUS", Path("corpus"))
    folder = experiments.ENGLISH
    experiments.hold_out_english()
    ids = {name: {row.fileid for row in data.read_manifest(folder / f"{name}.csv")}
           for name in ("eval", "adapt", "sources")}
    assert ids["eval"] == {"goxi-eval-0-0000"} and ids["adapt"] == {"goxi-eval-1-0001"}
    assert len(ids["sources"]) == len(rows) - 2
    assert not ids["sources"] & (ids["eval"] | ids["adapt"])
    alignments = data.read_alignments("corpus/alignments.csv")
    items = [line.split() for line in open(folder / "english.item")][1:]
    assert len(items) > 100
    for file, start, end, phone, *_ in items:
        phones = alignments[file][0][round(100 * float(start)) : round(100 * float(end))]
        assert {*phones} == {phone}
    monkeypatch.setattr(experiments, "ADAPTATIONS", {"as it is": ""})
    monkeypatch.setattr(experiments, "SPEAKERS", ["within"])  # of one speaker
    monkeypatch.setitem(experiments.TESTS, "english", [
        folder / "english.item", folder / "eval.csv", "corpus/alignments.csv", ""])
    experiments.adaptation(0)
    before, after = experiments.results("adaptation")
    assert before["way"] == "before" and after["features within"] > 0


def test_a_step_is_timed(cli):
    status, out, err = cli(speed, "tiny:1x1", "--rounds", 1, "--steps", 1)
    assert status == 0 and re.search(r"\n\| tiny, 1 x 1 s \| [\d.]+ \|", out), (out, err)
    for shape in "tiny", "huge:1x1", "tiny:0x1", "tiny:1x0.01":
        code, _, err = cli(speed, shape)
        assert code == 2 and shape in err and err.count("\n") == 1, err


# ======== real speech from public repositories ========


@pytest.fixture
def repositories(monkeypatch, tmp_path):
    """extras/speech.py with four small repositories in host/OWNER/NAME; a fifth cannot be reached.
    Three speakers of Mboshi, of 10 utterances each, every fifth of all marked as an error."""
    monkeypatch.setattr(speech, "MBOSHI_SECONDS", dict(eval=4, others=4.5, adapt=3))
    phones = [dict(start=0.1, duration=0.2, phone="ˈa"), dict(start=0.3, duration=0.1, phone="t")]
    dutch = [json.dumps(dict(id=name, words=[dict(phones=phones)])) for name in ("one", "two")]
    mboshi, parts = {}, "0.0 0.1 SIL\n0.1 0.2 A\n0.2 0.3 B\n0.3 1.2 C\n1.2 1.22 A\n"
    for n in range(30):
        name = f"{'abm'[n % 3]}_{n:02d}"
        mboshi[f"full_corpus_newsplit/all/{name}.wav"] = 1.3
        text = parts + "ERROR" * (n % 5 == 0)
        mboshi[f"ZRC_scoring/mboshi/in/{name}.phn"] = text.encode()
    files = {  # seconds of audio, the target of a link, or bytes
        "nathalie": {
            "verified/one.flac": 0.5, "verified/two.flac": 0.3, "verified/not.flac": 0.5,
            "verified/broken.flac": b"no audio",
            "nathalie_align.jsonl": "\n".join(dutch).encode()},
        "ph": {"wav/ph1.wav": 0.4,
               "lab/ph1.lab": b"separator ;\n#\n 0.1 26 #\n 0.29 26 e:\n 0.4 26 _\n"},
        "gc": {"nb/words/hei.ogg": 0.5, "nn": "nb", "zh_CN/words/ma.ogg": 0.5, "README.md": b"",
               "zh_CN/words/link.ogg": "ma.ogg", "zh_CN/words/two.ogg": "link.ogg"},
        "mboshi": mboshi}
    # Which audio files are taken, in order of their paths. Nathalie's: broken, not, one, two.
    bits = {"nathalie": "1011", "ph": "1", "gc": "11111", "mboshi": ""}
    taken, rng = {"kerstin": ("0" * 40, "")}, np.random.default_rng(0)
    for source in [*speech.SOURCES, speech.MBOSHI]:
        folder = tmp_path / "host" / source.repository
        for name, content in files.get(source.prefix, {}).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, str):
                path.symlink_to(content)
            else:
                soundfile.write(path, rng.normal(0, 0.1, round(24_000 * content)), 24_000)
        if folder.exists():
            git = "git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test@test"
            for words in "init -q", "add .", "commit -qm all":
                subprocess.run([*git, *words.split()], check=True)
            commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
            taken[source.prefix] = commit, bits[source.prefix]
    real = speech.read_taken()
    assert [*real] == [source.prefix for source in [*speech.SOURCES, speech.MBOSHI]]
    assert sum(bits.count("1") for _, bits in real.values()) == 20_048
    monkeypatch.setattr(speech, "read_taken", lambda: taken)
    monkeypatch.setattr(speech, "SOURCES", [s for s in speech.SOURCES if s.prefix in taken])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and "clones" not in path.parts}


def test_public_repositories_make_a_corpus(cli, repositories, tmp_path, monkeypatch):
    def interrupted(path, *words, write=soundfile.write, **how):
        if next(calls) in (1, 4, 20):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, *words, **how)

    calls, printed = itertools.count(), ""
    monkeypatch.setattr(soundfile, "write", interrupted)
    make = speech, "real", "--host", f"file://{tmp_path}/host"
    for expected in 130, 130, 130, 0:
        assert not Path("real/manifest.csv").exists()
        status, out, err = cli(*make)
        assert status == expected, err
        printed += out + err
    assert next(calls) == 8 + 21 + 3, "nothing is written twice"
    for text in (
        "CC0, rhasspy/dataset-voice-nathalie", "left out: kerstin;",
        "kerstin: left out: git: fatal", "verified/broken.flac: Format not recognised",
        "nathalie: 2 recordings, 0.00 h, 1 with phones; 1 broken files",
    ):
        assert text in printed

    rows = data.read_manifest("real/manifest.csv")
    assert [(row.language, row.fileid, row.num_samples) for row in rows] == [
        ("cmn", "gc-zh_CN-words-link", 8000), ("cmn", "gc-zh_CN-words-ma", 8000),
        ("cmn", "gc-zh_CN-words-two", 8000), ("cs", "ph-ph1", 6400),
        ("nl", "nathalie-one", 8000), ("nl", "nathalie-two", 4800),
        ("no", "gc-nb-words-hei", 8000), ("no", "gc-nn-words-hei", 8000)]
    data.check_audio(rows, 2000)
    alignments = data.read_alignments("real/alignments.csv")  # two.flac is shorter than its phones
    assert {fileid: [*phones] for fileid, (phones, _) in alignments.items()} == {
        "nathalie-one": ["SIL"] * 10 + ["a"] * 20 + ["t"] * 10 + ["SIL"] * 10,
        "ph-ph1": ["SIL"] * 10 + ["e:"] * 19 + ["SIL"] * 11}

    # Mboshi: of 8 good utterances of a speaker 4 s, that is 4, for eval; of 4 others 3 for adapt.
    parts = [data.read_manifest(f"real/mboshi/{part}/manifest.csv") for part in ("eval", "adapt")]
    for part, count in zip(parts, (4, 3)):
        data.check_audio(part, 2000)
        assert Counter(row.fileid[0] for row in part) == dict.fromkeys("abm", count)
    names = [row.fileid for part in parts for row in part]
    assert len({*names}) == 21 and all(int(name[2:]) % 5 for name in names)
    items = Path("real/mboshi/eval/mboshi.item").read_text().splitlines()
    assert len(items) == 25 and items[2].endswith(f" 0.2000 0.3000 B A C {names[0][0]}")
    assert len(Path("real/mboshi/eval/mboshi-triphone.item").read_text().splitlines()) == 1

    # Bare clones that are there give the same. What is complete is not read again.
    before, clones = contents(Path("real")), tmp_path / "real" / "clones"
    assert cli(speech, "again", "--from", clones)[0] == 0
    assert contents(Path("again")) == before
    shutil.rmtree(clones)
    shutil.rmtree(tmp_path / "host")
    assert cli(*make)[0] == 0 and contents(Path("real")) == before
    refused(cli(speech), "folder")
    refused(cli(speech, "none", "--from", "nowhere"), "nowhere: no such folder")
    assert "no repository could be read" in cli(speech, "none", "--from", tmp_path)[2]


def test_a_corpus_s_english_is_aligned_by_pocketsphinx(monkeypatch):
    files = {"data/one.wav": b"", "data/one.txt": b"A cat!", "x/._2.trans.txt": b"\0",
             "x/2.trans.txt": b"2-1 THE CAT\n2-2 THE NOISE\n"}
    repository, wav = MagicMock(files=files, read=files.get), np.zeros(1600, np.float32)
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    assert speech.english(repository)("one", wav) is None
    phone = MagicMock(start=3, duration=4)
    phone.name = "K"
    decoder = MagicMock(get_alignment=lambda: [[phone]], lookup_word=["a", "the", "cat"].count)
    monkeypatch.setitem(sys.modules, "pocketsphinx", MagicMock(Decoder=lambda **_: decoder))
    align = speech.english(repository)
    assert align("one", wav) == align("2-1", wav) == [(0.03, 0.07, "K")]
    assert [said.args for said in decoder.set_align_text.mock_calls] == [("a cat",), ("the cat",)]
    assert align("2-2", wav) is None  # a word that PocketSphinx does not know
    decoder.end_utt.side_effect = RuntimeError
    assert align("one", wav) is None  # words that do not fit what is heard


# ======== the whole algorithm on one page ========
# extras/minimal.py computes what the scripts compute, here in float64 and with its weights.

RENAMED = [
    (r"conv\.0\.", "feature_extractor.conv_layers.0.conv."),
    (r"conv\.1\.", "feature_extractor.conv_layers.0.layer_norm."),
    (r"project\.0", "feature_projection.layer_norm"),
    (r"project\.1", "feature_projection.projection"),
    (r"^hidden", "mask_embedding"),
    (r"(student|teacher)\.0", r"\1.pos_conv_embed.convs"),
    (r"(student|teacher)\.1", r"\1.layer_norm"), (r"(student|teacher)\.2", r"\1.layers"),
    (r"self_attn.in_proj_", "attention.qkv."), (r"self_attn.out_proj", "attention.proj"),
    (r"linear1", "feed_forward.intermediate_dense"), (r"linear2", "feed_forward.output_dense"),
    (r"norm1", "layer_norm"), (r"norm2", "final_layer_norm"),
    (r"heads\.(\d)", r"heads.\1.0"),
    (r"classifiers\.(\d)", r"supervised_classifiers.\1.output_layer")]


def as_spidr(tensors):
    """{the name in extras/minimal.py: tensor} by the names in model.SpidR."""
    renamed = {}
    for name, t in tensors.items():
        conv = re.match(r"conv\.(\d+)\.", name)
        if name in "SN":
            kind = {"S": "codebook", "N": "counts"}[name]
            renamed |= {f"codebooks.{k}.{kind}": part for k, part in enumerate(t)}
        elif conv and int(conv[1]) > 1:  # convolution, GELU, convolution, GELU ...
            renamed[f"feature_extractor.conv_layers.{(int(conv[1]) - 1) // 2}.conv.weight"] = t
        else:
            for pattern, new in RENAMED:
                name = re.sub(pattern, new, name)
            renamed[name] = t
    return renamed


@pytest.fixture
def one_page(float64):
    """extras/minimal.py, a model of it, a batch, and the same model as a SpidR."""
    minimal = importlib.import_module("extras.minimal")
    torch.manual_seed(0)
    minimal.random.seed(0)
    voices = [minimal.speak(minimal.LANGUAGES[0], voice, 130) for voice in range(2)]
    model, batch = minimal.make_model(), [x[:2] for x in minimal.batch(voices)]
    model.S *= 2  # so that forgetting shows in N, too
    model.N *= 2
    convs = [[16, 10, 5], *([c, 3, 2] for c in (32, 32, 64, 64)), [64, 2, 2], [64, 2, 2]]
    twin = SpidR(Config(
        norm="group_norm", conv_layers=convs, dim=64, layers=3, heads=4, ffn=256, qkv_bias=True,
        pos_kernel=27, pos_depth=3, pos_groups=4, dropout=0, attention_dropout=0, codebooks=2,
        codewords=32, ema_start=0.9, ema_timescale=500))
    for language in range(4):
        twin.add_language(str(language), 12)
    twin.load_state_dict(as_spidr(model.state_dict()) | {"current_step": torch.zeros(1)})
    return minimal, model, batch, twin.train()


def of_scripts(batch, **more):
    """For the scripts: the batch, and options with which the rate stands still."""
    wav, mask, phones = batch
    o = meta_train.Options(lr=1e-3, lr_floor=1, warmup_steps=0, ramp_steps=0, supervised_layer=2,
                           **more)
    return o, dict(wav=wav, mask=mask, phones=phones, language="0")


def test_minimal_takes_the_same_training_step(one_page, monkeypatch):
    """The same loss, gradients and weights, and labels, as the codebooks show, and teacher."""
    minimal, model, batch, twin = one_page
    o, same_batch = of_scripts(batch)
    losses, descend = [], minimal.descend
    monkeypatch.setattr(minimal, "descend", lambda optimizer, loss: (
        losses.append(loss.item()), descend(optimizer, loss)))
    optimizer = pretrain.make_optimizer(twin, o)
    minimal.spidr_step(model, minimal.adamw(model.parameters()), *batch[:2], twin.ema_decay(10))
    metrics = pretrain.train_step(twin, optimizer, [same_batch], 10, o.lr, o, ONE)
    near(losses.pop(), metrics["loss"].item())
    ours, theirs = ({name: p.grad for name, p in net.named_parameters() if p.grad is not None}
                    for net in (model, twin))
    same(as_spidr(ours), theirs, 1e-7)
    state = as_spidr(model.state_dict()) | {"current_step": torch.tensor([10])}
    same(state, twin.state_dict(), 1e-6)


def test_minimal_moves_phi_as_meta_train_does(one_page, monkeypatch):
    """Two meta-updates of two workers, with fresh codebooks and heads by a formula."""
    minimal, model, batch, twin = one_page
    noise = torch.randn(32, 64)
    monkeypatch.setattr(torch, "randn", lambda *shape: (
        noise if len(shape) == 1 else noise.T.expand(shape)))
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda linear: [
        p.data.copy_(s(p.numel(), 0).view(p.shape) / 8) for p in linear.parameters()])
    monkeypatch.setattr(minimal, "batch", lambda voices: batch)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    minimal.foblo(model, [None], updates=2, workers=2, M=2, N=2, beta=0.5)

    o, same_batch = of_scripts(
        batch, updates=2, workers=2, inner_steps=2, outer_steps=2, beta=0.5)
    twin.config.ema_start = 1.0
    monkeypatch.setattr(meta_train, "fetch", lambda *_: itertools.repeat([same_batch]))
    monkeypatch.setattr(meta_train, "save", lambda *_: None)
    phi = meta_train.to_vector(twin, "cpu")
    meta_train.meta_train(
        o, twin, phi, torch.zeros_like(phi),
        [pretrain.make_optimizer(twin, o) for _ in range(2)], [0, 1],
        MagicMock(return_value=(1, 1)), ONE, ONE, MagicMock(), (0, 0))
    meta_train.load_vector(twin, phi)
    ours = as_spidr(model.state_dict())
    same(ours, {name: t for name, t in twin.state_dict().items() if name in ours}, 1e-6)
    assert all((start[name] != t).any() for name, t in model.state_dict().items()
               if name.startswith(("conv", "student.2.0")))


def test_minimal_has_the_same_abx(one_page, tmp_path):
    minimal, model, _, twin = one_page
    voices = [minimal.speak(minimal.LANGUAGES[3], voice, 120) for voice in range(3)]
    features, lines = {}, ["#file onset offset #phone prev-phone next-phone speaker"]
    for voice, (sound, phones) in enumerate(voices):
        wav = (sound - sound.mean()) / sound.std(correction=0)
        features[f"f{voice}"], start = twin.encode(wav[None])[1][0].detach(), 0
        for phone, run in itertools.groupby(phones):
            end = start + len([*run])
            lines.append(f"f{voice} {start / 50:.2f} {end / 50:.2f} {phone} - - {voice}")
            start = end
    items = tmp_path / "new.item"
    items.write_text("\n".join(lines) + "\n")
    found = [evaluate.abx(features, items, speaker, "any") for speaker in ("within", "across")]
    assert minimal.abx(model, voices) == pytest.approx(found, abs=1e-2)


def test_minimal_runs_and_fits_on_a_page(capsys, monkeypatch):
    minimal = importlib.import_module("extras.minimal")
    text, decays, spidr_step = Path(minimal.__file__).read_text(), [], minimal.spidr_step
    monkeypatch.setattr(minimal, "spidr_step", lambda *which, b=1.0, **more: (
        decays.append(b), spidr_step(*which, b=b, **more)))
    monkeypatch.setattr(minimal, "foblo", partial(minimal.foblo, workers=1, M=1, N=1))
    monkeypatch.setattr(minimal, "speak", lambda *which, speak=minimal.speak: (
        speak(*which[:2], min(which[2], 110))))
    minimal.main(seed=0, steps=2, updates=1, adaptation=1)
    *_, untrained, learnt, prepared, _ = capsys.readouterr().out.splitlines()
    for line in untrained, learnt, prepared:
        assert all(0 < float(error) < 60 for error in line.split()[-4:])
    twin = SpidR(Config(layers=1, dim=16, heads=1, codebooks=1, ema_timescale=500))
    near(decays, [twin.ema_decay(1), twin.ema_decay(2)] + [1] * 4)
    lines = [line for line in text.splitlines() if line]
    assert len(lines) <= 200 and max(map(len, lines)) <= 100
    assert all(f"({n})" in text for n in (*range(1, 9), 11, 13))
