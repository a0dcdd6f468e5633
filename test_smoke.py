"""pytest test_smoke.py: what the repository promises, on tiny networks and a CPU."""

import dataclasses
import datetime
import errno
import gzip
import importlib
import inspect
import itertools
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from operator import attrgetter
from pathlib import Path
from unittest.mock import MagicMock

# For the processes that are started, too. A process that has used a GPU cannot be forked.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

import adapt
import data
import evaluate
import meta_train
import model as networks
import pretrain
from extras import assignment, baselines, formats, page, small_batches, unit_lm
from extras import toy as toy_world
from model import Config, InputError, SpidR, num_frames

HERE = Path(__file__).parent
ONE = pretrain.Ranks(0, 1, torch.device("cpu"))
CONVS = [[16, 10, 5]] + [[16, 3, 2]] * 4 + [[16, 2, 2]] * 2
NETWORK = ("--dim 32 --layers 2 --heads 2 --ffn 64 --codebooks 2 --codewords 8 --pos-groups 4 "
           "--conv-layers " + str(CONVS).replace(" ", ""))
RUN = ("--preset tiny --supervised-layer 2 --steps 12 --warmup-steps 2 --batch-samples 64000 "
       "--max-samples 32000 --log-every 3 --save-every 3 --loaders 0 --device cpu --layer-drop 0.3")
torch.set_num_threads(1)


# ======== helpers ========


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return toy_world.toy(tmp_path_factory.mktemp("toy") / "world", scale=0.02)


def small(toy, *more):
    """The arguments of a run of pretrain.py on the toy world, which it takes for audio of mine."""
    audio = "--manifest", toy / "train.csv", "--alignments", toy / "train_alignments.csv"
    return [*NETWORK.split(), *RUN.split(), "--toy", toy, *audio, *more]


def module_of(script):
    """pretrain.py -> pretrain, extras/toy.py -> extras.toy"""
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def call(script, *args, at=0, do=None):
    """Runs a script's main in this process, and the commands that it shows, to its exit status. At
    the optimizer step `at`, counted from here, something is done with the model."""
    def show(name, *words):
        print("$ python", name, *words)
        if status := call(module_of(name), *words):
            sys.exit(status)

    def update_teacher(model, step, update=SpidR.update_teacher, calls=itertools.count(1)):
        if next(calls) == at:
            do(model)
        return update(model, step)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, args)])
        patch.setattr(pretrain, "show", show)
        patch.setattr(SpidR, "update_teacher", update_teacher)
        status = networks.outcome(script.main)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return status


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """The same in a folder of the test: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return lambda script, *args, **how: (call(script, *args, **how), *capsys.readouterr())


def complains(message, function, *args, **how):
    with pytest.raises(InputError, match=message):
        function(*args, **how)


def refused(result, message):
    status, _, err = result
    assert status == 2 and message in err and len(err.splitlines()) == 1, (message, err)


def processes(script, *args, ranks=1, at=0, do=None):
    """The same in a process for each rank: [(exit status, what it printed)]. `do` is done in the
    last. Each is a fork of this process, where torch is imported already. It holds one end of a
    pipe, and so does everything that it starts. The other end, its sentinel, tells when all of them
    are gone."""
    def main(rank):
        os.setsid()
        signal.alarm(60)
        sys.stdout = sys.stderr = open(f"{os.getpid()}.txt", "w", buffering=1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
                       "MASTER_PORT": str(20_000 + os.getppid() % 10_000)}
        networks.run(lambda: sys.exit(call(script, *args, at=at * (rank + 1 == ranks), do=do)))

    started = torch.multiprocessing.start_processes(
        main, nprocs=ranks, join=False, start_method="fork").processes
    for process in started:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        over, _, _ = select.select([process.sentinel], [], [], 2)
        assert over, "two seconds later something is left"
        process.join()
    return [(process.exitcode, Path(f"{process.pid}.txt").read_text()) for process in started]


def weights(run):
    state = torch.load(Path(run) / "last.pt", weights_only=True)["model"]
    return {name: t for name, t in state.items() if name != "current_step"}


def moved(before, after):
    before, after = weights(before), weights(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name].double(), b[name].double()
        assert torch.allclose(x, y, rtol=tolerance, atol=tolerance), name


def metrics(run, name):
    records = map(json.loads, open(Path(run) / "metrics.jsonl"))
    return [record[name] for record in records if name in record]


def near(value, golden, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(value), np.asarray(golden), rtol=tolerance)


# ======== the model: numbers of the released implementation ========
# Weights and inputs follow a formula. The golden values are the released code's on the same one,
# in float64 (in float32 a gradient differs by 1e-4 from one CPU to the next, and ten steps later
# everything does). To make them again, with Python 3.12 and `pip install spidr==0.2.0`:
#
#     import torch
#     torch.float32 = torch.float = torch.float64  # the package asks for float32 by name
#     torch.Tensor.float = torch.Tensor.double
#     torch.set_default_dtype(torch.float64)
#     import test_smoke as t
#     from spidr.config import SpidRConfig
#     from spidr.models import SpidR
#     for g in t.GOLDEN.values():
#         ours, batch = t.formula_model(*g["shape"]), t.formula_batch(g["samples"], g["shape"][-1])
#         config = t.networks.released_config(ours.config)
#         known = SpidRConfig.__dataclass_fields__
#         theirs = SpidR(SpidRConfig(**{k: v for k, v in config.items() if k in known}))
#         theirs.double().train().load_state_dict(ours.state_dict())
#         masked = batch["mask"].nonzero()[:, 1].view(2, -1)
#         loss, perplexities = theirs(batch["wav"], mask_indices=masked, attention_mask=None)
#         (loss.sum() / masked.numel()).backward()
#         print(loss.sum() / masked.numel(), perplexities)
#         print([dict(theirs.named_parameters())[name].grad.norm() for name in t.GRADIENTS])


@pytest.fixture
def float64(monkeypatch):
    """All of a test in float64, also where the model asks for at least float32."""
    wider = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))
    monkeypatch.setattr(torch.Tensor, "float", wider)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def s(n, phase):
    x = torch.sin(0.37 * torch.arange(n, dtype=torch.float64) + phase)
    return x.to(torch.get_default_dtype())


def formula_model(dim=32, layers=3, ffn=64, codebooks=2, norm="layer_norm", phase=0.3, **more):
    model = SpidR(Config(
        norm=norm, dim=dim, layers=layers, heads=4, ffn=ffn, pos_groups=4, codebooks=codebooks,
        conv_layers=CONVS, codewords=8, dropout=0, attention_dropout=0, ema_timescale=50, **more))
    for k, (name, t) in enumerate(sorted(model.state_dict().items())):
        x = s(t.numel(), k + phase).view(t.shape)
        if name.endswith(("counts", "norm.weight")):
            x = 1 + 0.1 * x
        elif not name.endswith("codebook"):
            x = x * math.sqrt(3 / t[0].numel()) if t.dim() > 1 else 0.1 * x
        if name != "current_step":
            t.copy_(x)
    return model


def formula_batch(samples, phase=0.0, span=3):
    """With phones, and in each row as many masked frames, as the released code has it."""
    t = torch.arange(2 * samples, dtype=torch.float64).reshape(2, samples)
    x = torch.sin(0.05 * t + phase) + 0.5 * torch.sin(0.31 * t) + 0.25 * torch.sin(1e-5 * t * t)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    mask = torch.zeros(2, num_frames(samples, Config()), dtype=torch.bool)
    for b in range(2):
        for start in range(b, mask.shape[1] - 7, 7):
            mask[b, start : start + span] = True
    phones = torch.arange(mask.numel()).view(mask.shape) % 5
    phones = phones.masked_fill(phones == span, data.IGNORED)
    return dict(wav=x.to(torch.get_default_dtype()), mask=mask, phones=phones, language="x")


def classifier(dim, phones):
    linear = nn.Linear(dim, phones)
    linear.weight.data, linear.bias.data = s(dim * phones, 0).view(phones, dim), s(phones, 0)
    return nn.ModuleDict({"output_layer": linear})


GRADIENTS = (
    "mask_embedding", "feature_extractor.conv_layers.0.conv.weight",
    "student.layers.0.attention.qkv.weight", "student.layers.3.feed_forward.output_dense.weight")
# The sums of the units by codebook; the loss and the perplexity of predictions, of SpidR and of
# DinoSR; the perplexity of targets; the norms of GRADIENTS. After ten steps the loss, and the norms
# of student and teacher.
GOLDEN = {
    "a": dict(
        shape=(32, 4, 64, 3, "layer_norm", 0.0), samples=8000, codes=[74, 288, 140],
        spidr=[2.19161268, 7.444892779], dinosr=[2.619952045, 6.749066456], target=2.516391706,
        gradients=[0.0394977942, 0.09228775979, 0.06739591373, 0.7644195845],
        tenth=[1.396225398, 43.33081, 43.29313992]),
    "b": dict(
        shape=(48, 6, 96, 4, "group_norm", 0.9), samples=12345, codes=[456, 304, 76, 380],
        spidr=[2.258704513, 7.392083321], dinosr=[2.575550972, 7.02563086], target=2.290736802,
        gradients=[0.03563265246, 0.03390646271, 0.01225426116, 1.713413728],
        tenth=[1.748205408, 63.41475824, 62.6226736]),
}


def check_one_step(g, tolerance, of_perplexities, of_gradients):
    batch = formula_batch(g["samples"], g["shape"][-1])
    for objective in "dinosr", "spidr":
        model = formula_model(*g["shape"], objective=objective).train()
        loss, stats = model(batch["wav"], batch["mask"])
        health = model.health(stats)
        near(loss.item(), g[objective][0], tolerance)
        near(health["pred_ppl"].item(), g[objective][1], of_perplexities)
        near(health["target_ppl"].item(), g["target"], of_perplexities)
    loss.backward()
    gradients = dict(model.named_parameters())
    near([gradients[name].grad.norm() for name in GRADIENTS], g["gradients"], of_gradients)
    assert model.eval().units(batch["wav"]).flatten(1).sum(1).tolist() == g["codes"]
    return batch


def test_the_released_implementation_s_numbers_in_float32():
    check_one_step(GOLDEN["b"], 1e-5, 1e-5, 1e-3)


@pytest.mark.parametrize("g", GOLDEN.values(), ids=GOLDEN)
def test_the_same_in_float64_and_after_ten_steps(g, float64):
    batch = check_one_step(g, 1e-8, 1e-6, 1e-8)  # the released logarithms have an epsilon
    model = formula_model(*g["shape"]).train()
    o = pretrain.Options(lr=1e-3, warmup_steps=2, hold_steps=4, decay_steps=4)
    optimizer = pretrain.make_optimizer(model, o)
    for step in range(10):
        rate = pretrain.lr_at(step, o)
        m = pretrain.train_step(model, optimizer, [batch], step + 1, rate, o, ONE)
    norms = [torch.nn.utils.get_total_norm(list(part.parameters())).item()
             for part in (model.student, model.teacher)]
    near([m["loss"].item(), *norms], g["tenth"], 1e-7)


def test_the_gradient_is_averaged_and_clipped():
    p = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=1)
    for clip, expected in (10, [3, 4]), (1, [0.6, 0.8]):
        p.grad = torch.tensor([6.0, 8.0])  # sums over two frames
        metrics = pretrain.average_and_clip(optimizer, 2, pretrain.Options(clip=clip))
        near(p.grad, expected)
        assert metrics["grad_norm"] == 5 and metrics["skipped"] == 0
    p.grad = torch.tensor([math.nan, 1])
    assert pretrain.average_and_clip(optimizer, 2, pretrain.Options())["skipped"] == 1


def test_how_codebooks_begin():
    codebook = networks.Codebook(Config(dim=16, codewords=40, heads=1))
    assert (codebook.counts == 1).all() and codebook.codebook.std() > 0.9
    near(codebook.codebook.mean(0) + 1, np.ones(16), 1e-5)
    near(codebook.codebook.var(0, correction=0), np.ones(16), 1e-4)


@torch.no_grad()
def test_layer_drop_skips_the_stream_but_not_the_output():
    model, x = formula_model(layers=2).student, s(320, 0).view(1, 10, 32)
    outputs = {}
    for drop in 0.0, 0.999999:
        model.layer_drop = drop
        for mode in True, False:
            outputs[drop, mode] = model.train(mode)(x)
    begin = model.layer_norm(x + model.pos_conv_embed(x))
    torch.testing.assert_close(outputs[0.999999, True][0], begin)  # neither layer has changed it
    second = model.layers[1](begin)[1]
    torch.testing.assert_close(outputs[0.999999, True][1][1], second)  # though both have outputs
    for drop in 0.0, 0.999999:  # and nothing is dropped where nothing is trained
        torch.testing.assert_close(outputs[drop, False][0], outputs[0.0, True][0])


def test_the_teacher_hears_no_dropout():
    model, batch = formula_model(projection_dropout=0.5).train(), formula_batch(8000)
    x, y = (model.masked_frames(batch["wav"], batch["mask"]) for _ in range(2))
    assert torch.equal(x[1], y[1]) and not torch.equal(x[0][0], y[0][0])


def test_a_forward_pass_moves_nothing():
    model, batch = formula_model(norm="group_norm").train(), formula_batch(12345)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    _, stats = model(batch["wav"], batch["mask"])
    model.update_codebooks({name: value * math.nan for name, value in stats.items()})
    assert model.update_teacher(1_000_000) == 1  # a teacher that has stopped does not move at all
    same(model.state_dict(), before | {"current_step": torch.tensor([1_000_000])})


@pytest.mark.parametrize("layer", [0, 2])
def test_micro_batches_are_one_batch_of_them_all(float64, layer):
    parts, found = [formula_batch(12345, i, i + 2) for i in (0, 1)], []
    whole = {name: torch.cat([x[name] for x in parts]) for name in ("wav", "mask", "phones")}
    for micro_batches in (parts, [whole | dict(language="x")]):
        model = formula_model().train()
        model.supervised_classifiers["x"] = classifier(32, 5)
        optimizer, o = pretrain.make_optimizer(model, pretrain.Options()), pretrain.Options()
        for step in 1, 2:
            m = pretrain.train_step(model, optimizer, micro_batches, step, 1e-3, o, ONE, layer)
        found.append({**model.state_dict(), **m})
    same(*found, 1e-7)


@pytest.mark.parametrize("norm", ["layer_norm", "group_norm"])
def test_padding_changes_nothing(norm, float64):
    model, lengths = formula_model(norm=norm).eval(), torch.tensor([9000, 4321, 2000])
    wavs = [torch.randn(n) for n in lengths]
    padded = nn.utils.rnn.pad_sequence(wavs, batch_first=True, padding_value=7.0)
    with torch.no_grad():
        together = model.encode(padded, lengths)
        for b, wav in enumerate(wavs):
            for alone, batched in zip(model.encode(wav[None]), together):
                assert (batched[b, : alone.shape[1]] - alone[0]).norm() < 1e-11 * alone.norm()


# The section "model" of a config.json as the released code (0.1.4) writes it.
RELEASED_CONFIG = """{"extractor_mode": "group_norm", "extractor_conv_bias": true,
"extractor_conv_layer_config": [[16, 10, 5], [16, 4, 4], [16, 4, 4], [16, 4, 4]],
"encoder_embed_dim": 32, "encoder_projection_dropout": 0.01, "encoder_pos_conv_kernel": 57,
"encoder_pos_conv_groups": 8, "encoder_pos_conv_depth": 3, "encoder_num_layers": 4,
"encoder_num_heads": 2, "encoder_attention_dropout": 0.02, "encoder_ff_interm_features": 64,
"encoder_ff_interm_dropout": 0.03, "encoder_dropout": 0.04, "encoder_layer_norm_first": false,
"encoder_layer_drop": 0.05, "encoder_qkv_bias": true, "codebook_size": 8, "codebook_decay": 0.8,
"num_codebooks": 3, "ema_start_decay": 0.99, "ema_final_decay": 0.9999, "ema_final_step": 30000,
"ema_exclude_layers": ["pos_conv_embed"], "freeze_step": 1000, "ema_timescale": 50.0,
"ema_threshold": 1e-06}"""


def test_every_name_of_a_released_configuration_is_read(tmp_path):
    released = json.loads(RELEASED_CONFIG)
    (tmp_path / "config.json").write_text(json.dumps({"model": released}))
    config = networks.read_config(tmp_path / "config.json")
    assert config == Config(
        norm="group_norm", conv_bias=True, conv_layers=((16, 10, 5), *((16, 4, 4),) * 3), dim=32,
        projection_dropout=0.01, pos_kernel=57, pos_groups=8, pos_depth=3, layers=4, heads=2,
        attention_dropout=0.02, ffn=64, ffn_dropout=0.03, dropout=0.04, layer_drop=0.05,
        qkv_bias=True, codewords=8, codebook_decay=0.8, codebooks=3, ema_start=0.99,
        ema_timescale=50.0, ema_threshold=1e-6)
    written = networks.released_config(config)
    ours = {"objective", "init_std"}  # what theirs does not say
    assert json.loads(json.dumps({n: x for n, x in written.items() if n not in ours})).items() <= \
        released.items()


def test_load_reads_released_checkpoints_and_refuses_others(tmp_path):
    model, path = formula_model(), tmp_path / "step_7.pt"
    model.add_language("en", 5)
    config, plain = {"model": networks.released_config(model.config)}, model.state_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {f"module.{name}": t for name, t in plain.items()}
    for content in plain, {"model": state, "step": 7}:
        torch.save(content, path)
        same(networks.load(tmp_path).state_dict(), plain)
    for wrong, message in (
        ({"x": torch.zeros(3)}, 'Missing.*"mask_embedding"'),
        (state | {"module.mask_embedding": torch.zeros(3)}, "size mismatch for mask_embedding"),
        (Path("x"), "not a checkpoint"),  # would have to be unpickled
    ):
        torch.save({"model": wrong}, path)
        complains(message, networks.load, path)


# ======== data ========


def write_tone(path, rate=16000, seconds=3.0, channels=1, amplitude=0.5):
    t = np.arange(int(rate * seconds)) / rate
    x = amplitude * np.sin(2 * np.pi * 200 * t) * np.sin(2 * np.pi * 1.7 * t)
    Path(path).parent.mkdir(exist_ok=True, parents=True)
    soundfile.write(path, np.stack([x] * channels, 1), rate)
    return Path(path)


def ten_seconds(count):
    return [data.Row(str(i), f"{i}.wav", 160_000, "xy"[i % 2], f"m:{i}") for i in range(count)]


@pytest.mark.parametrize("name, rate, channels", [
    ("a.wav", 8000, 1), ("b.flac", 22050, 1), ("c.ogg", 44100, 2), ("d.mp3", 16000, 1)])
def test_reading_any_format_and_only_the_crop(tmp_path, name, rate, channels):
    expected = data.read_audio(write_tone(tmp_path / "reference.wav"))
    path = write_tone(tmp_path / name, rate, 3.0, channels)
    whole = data.read_audio(path)
    assert [row.num_samples for row in data.read_manifest(path)] == [len(whole)]
    assert (data.read_audio(path, 7000, 9000) - whole[7000:16000]).abs().max() < 1e-4
    if not name.endswith("mp3"):  # which pads
        assert (whole[200:-200] - expected[200:-200]).abs().max() < 0.05
    complains("cut short", data.read_audio, path, len(whole) - 100, 5000)


def test_a_resampled_file_has_the_length_that_it_was_counted_with(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(size=279_040) / 9, 44_100)
    [row] = data.read_manifest(tmp_path)
    assert len(data.read_audio(row.path, 0, row.num_samples)) == row.num_samples == 101_240


@pytest.mark.parametrize("group", [1, 4])
def test_batches_and_masks(monkeypatch, group):
    def noise(path, start, samples):
        networks.require(path != "7.wav", "cut short")
        return torch.randn(samples, generator=torch.Generator().manual_seed(start))

    monkeypatch.setattr(data, "read_audio", noise)
    lengths = np.random.default_rng(0).integers(20_000, 400_000, 299)
    rows = [row._replace(num_samples=int(n)) for row, n in zip(ten_seconds(299), lengths)]
    o = pretrain.Options(batch_samples=1_000_000, crop_multiple=1, seed=3)
    batches, again = (data.Batches(rows, Config(), o, group) for _ in range(2))
    for i in 0, batches.per_epoch + 1:
        batch = batches[i]
        index, _ = batches.epoch(i // batches.per_epoch)[i % batches.per_epoch]
        assert all(torch.equal(batch[name], again[i][name]) for name in ("wav", "mask"))
        assert batch["wav"].shape == (len(index), min(*lengths[index], 320_000))
        share = batch["mask"].float().mean(1)  # of all frames about half, in each row as many
        assert share.min() == share.max() and 0.4 < share[0] < 0.65
    heard = np.concatenate([index for index, _ in batches.epoch(0)])
    assert len(set(heard)) == len(heard) > 270  # nothing twice in an epoch, and little left out

    classes = {row.fileid: np.zeros(row.num_samples // 160, dtype=np.int16) for row in rows}
    labelled = data.Batches(rows, Config(), o, group, classes)
    order = [index for index, _ in labelled.epoch(0)]
    assert set(np.concatenate(order)) == set(range(299))  # what has labels is never left out
    for i in range(0, len(order), group):  # a step is of one language
        assert len({rows[j].language for batch in order[i : i + group] for j in batch}) == 1
    i, b = next((i, list(batch).index(7)) for i, batch in enumerate(order) if 7 in batch)
    batch = labelled[i]  # the recording that cannot be read is silence, of which nothing counts
    assert batch["bad"] == [("7.wav", "m:7: cut short")] and batch["language"] == "y"
    assert not batch["wav"][b].any() and not batch["mask"][b].any()
    assert (batch["phones"][b] == data.IGNORED).all() and (batch["phones"] == 0).any()


def test_a_mask_is_made_of_spans():
    rng, seen = np.random.default_rng(0), np.zeros(150)
    for _ in range(200):
        [mask] = data.make_mask(1, 150, rng, 0.8, 10)
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        assert min(edges[1::2] - edges[::2]) >= 10
        seen += mask
    assert seen.min() > 0  # the first and the last frame, too


@pytest.fixture
def ramp(tmp_path, monkeypatch):
    """The row of a recording of 12.5 s whose samples, and whose phones, tell their own time."""
    monkeypatch.setattr(data, "standardise", lambda wav: wav)
    samples = np.arange(200_000, dtype=np.float32)
    soundfile.write(tmp_path / "x.wav", samples, 16000, subtype="FLOAT")
    return data.Row("x", str(tmp_path / "x.wav"), 200_000, "x"), {"x": np.arange(1250)}


def starts_of(batch):
    """Where the crops begin. Each frame's phone has to be the one that begins nearest to it."""
    starts = batch["wav"][:, 0].numpy()
    times = starts[:, None] / 160 + 2 * np.arange(batch["phones"].shape[1])
    assert np.abs(batch["phones"].numpy() - times).max() <= 0.5
    return [*starts.astype(int)]


def test_a_crop_comes_with_its_own_phones(ramp):
    row, classes = ramp
    o = pretrain.Options(batch_samples=80_000, max_samples=40_000)
    batches = data.Batches([row] * 4, Config(), o, 1, classes)
    starts = sum((starts_of(batches[i]) for i in range(20)), [])
    assert len({*starts}) == 40 and min(starts) < 20_000 and max(starts) > 140_000
    # Other keys would be other runs: none would resume, and no result be found again.
    assert starts[:4] == [1878, 155_689, 18_977, 105_929]
    assert batches[0]["mask"][0].nonzero().flatten()[:6].tolist() == [8, 10, 11, 12, 13, 14]
    streams = [value for name, value in vars(data).items() if name.startswith("STREAM_")]
    assert streams == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    # A batch that is repeated in a step has other crops and masks. The first is as without it.
    alone, repeated = (data.Batches([row] * 2, Config(), o, n, classes) for n in (1, 4))
    step = [repeated[i] for i in range(4)]
    assert len({start for batch in step for start in starts_of(batch)}) == 8
    assert not any(torch.equal(a["mask"], b["mask"]) for a, b in itertools.combinations(step, 2))
    assert starts_of(alone[0]) == starts_of(step[0])


def test_a_long_recording_counts_as_several(ramp):
    row, classes = ramp
    cut = data.pieces([row, row._replace(num_samples=79_999)], 40_000)
    spans = [(piece.start, piece.num_samples) for piece in cut]
    assert spans == [(0, 40_000), (40_000, 40_000), (80_000, 40_000), (120_000, 40_000),
                     (160_000, 40_000), (0, 79_999)]
    o = pretrain.Options(batch_samples=80_000, max_samples=30_000)
    batches = data.Batches(data.pieces([row], 30_000), Config(), o, 1, classes)
    for epoch in range(5):
        step = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        starts = sorted(sum((starts_of(batches[i]) for i in step), []))
        assert [start * 6 // 200_000 for start in starts] == [*range(6)]  # a crop of each piece


def test_labelled_recordings_are_cut_too(toy):
    o = pretrain.Options(manifest=toy / "train.csv", alignments=toy / "train_alignments.csv",
                         max_samples=32_000)
    rows, labelled, classes, _ = pretrain.read_data(o, ONE, {}, True)
    assert len(rows) == len(labelled) > 2 * len(classes)
    for row in labelled:
        assert 32_000 <= row.num_samples < 64_000
        assert row.start + row.num_samples <= 160 * len(classes[row.fileid])


def test_a_long_recording_is_never_decoded_as_a_whole(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).normal(size=60 * 16_000) / 10
    silent = np.where(np.arange(len(noise)) // 16_000 % 2, 0, noise)  # every other second, the last
    soundfile.write(tmp_path / "a.flac", silent, 16_000)
    soundfile.write(tmp_path / "b.flac", 0 * noise, 16_000)
    reads, read = [], soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda file, frames=-1, *more, **how: (
        reads.append(frames) or read(file, frames, *more, **how)))
    assert data.inspect(tmp_path / "a.flac", 2000) == (960_000, "")
    assert "silence" in data.inspect(tmp_path / "b.flac", 2000)[1]
    data.read_audio(tmp_path / "a.flac", 800_000, 10_000)
    assert 0 < min(reads) and sum(reads) <= 20 * 16_000


def test_phones(cli):
    classes = np.arange(100, dtype=np.int16)
    for start, expected in (0, [0, 2, 4]), (1681, [11, 13]), (15_520, [97, 99, data.IGNORED]):
        assert data.phones_of_crop(classes, start, len(expected)).tolist() == expected
    Path("a.csv").write_text("fileid,phones,language\nu,a SIL spn q,x\n")
    alignments = data.read_alignments("a.csv")
    assert data.inventories(alignments) == {"x": ["SIL", "a", "q"]}
    classes, unknown = data.phone_classes(alignments, {"x": ["SIL", "a"]})
    assert classes["u"].tolist() == [1, 0, data.IGNORED, data.IGNORED] and unknown == 2


def test_alignments_take_little_memory(tmp_path):
    def read():
        alignments = data.read_alignments(tmp_path / "a.csv")
        return alignments, *data.phone_classes(alignments, data.inventories(alignments))

    lines = (f"{i},{' '.join(['SIL', 'aa', 'b'] * 10_000)},x\n" for i in range(3))
    (tmp_path / "a.csv").write_text("fileid,phones,language\n" + "".join(lines))
    read()  # what this imports does not count
    tracemalloc.start()
    alignments, classes, _ = read()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 300_000  # of 90,000 phones: a byte each, and two for the class
    assert [*alignments["2"][0][:4]] == ["SIL", "aa", "b", "SIL"] and classes["2"][1] == 1


def test_manifests(cli):
    for i, name in enumerate(("aa/x.wav", "aa/y.flac", "z.wav", "twice/y.wav", "twice/y.flac")):
        write_tone(f"in/{name}", seconds=1 + i)
    Path("in/bad.wav").write_text("not audio")
    _, out, err = cli(data, "manifest", "in", "m.csv")
    assert "bad.wav: Error opening" in err and "5 recordings" in out
    refused(cli(data, *"manifest in/aa aa.csv --language".split()), "manifest FOLDER OUT.csv")
    assert "2 recordings" in cli(data, *"manifest in/aa aa.csv --language fr".split())[1]
    assert [row.language for row in data.read_manifest("aa.csv")] == ["fr"] * 2
    languages = [row.language for row in data.read_manifest("m.csv")]
    assert languages == ["aa"] * 2 + ["twice"] * 2 + [""]
    refused(cli(data, "manifest", "in", "m.csv"), "m.csv is there already")
    Path("m.tsv").write_text("in\naa/x.wav\t16000\naa/y.flac\t32000\ntwice/y.flac\t80000\n")
    Path("n.csv").write_text("path,num_frames\nin/aa/x.wav,16000\n")
    all_of_them = "x aa/y twice/y.flac twice/y.wav z".split()
    for path, ids in (("m.csv", all_of_them), ("in", all_of_them), ("n.csv", ["x"]),
                      ("m.tsv", ["x", "aa/y", "twice/y"])):
        rows = data.check_audio(data.read_manifest(path), 2000)
        assert [r.fileid for r in rows] == ids and rows[0].num_samples == 16000
        assert [r.fileid for r in data.read_manifest(path, only={"x", "v"})] == ["x"]


def test_links_to_folders_are_followed(tmp_path, capsys):
    write_tone(tmp_path / "elsewhere/sub/x.wav")
    (tmp_path / "elsewhere/sub/circle").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio/french").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "audio/again").symlink_to(tmp_path / "audio")
    [row] = data.read_manifest(tmp_path / "audio")
    assert (row.fileid, row.language) == ("x", "french")
    assert row.path == str(tmp_path / "audio/french/sub/x.wav")
    assert capsys.readouterr().err.count("a link to a folder that is read already") == 2


def test_a_folder_s_short_recordings_are_left_out(tmp_path, capsys):
    for name, seconds in ("long", 2.0), ("short", 0.5):
        write_tone(tmp_path / f"{name}.wav", seconds=seconds)
    rows = pretrain.read_rows(tmp_path, pretrain.Options(min_samples=16_000))
    assert [row.fileid for row in rows] == ["long"]
    assert "short.wav: 8000 samples at 16 kHz, under the minimum" in capsys.readouterr().err
    data.write_manifest(tmp_path, tmp_path / "m.csv")
    assert pretrain.read_rows(tmp_path / "m.csv", pretrain.Options(min_samples=16_000)) != []
    assert "left out: 1 recordings of under 16000 samples" in capsys.readouterr().err


# ======== corpora ========
# Miniature copies of the layouts in which corpora are distributed.


def test_the_formats_of_the_docs_are_read(cli):
    """The indented examples of docs/data.md, in their order."""
    text = (HERE / "docs/data.md").read_text().partition("## Formats")[2]
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.M)
    Path("grids").mkdir()
    for name, block in zip(
            "m.csv m.tsv a.csv a.txt grids/g.TextGrid x.item u.jsonl".split(), blocks):
        Path(name).write_text(re.sub(r"^    ", "", block.lstrip("\n"), flags=re.M))
    evaluate.write_json("u.meta.json", HEADER | dict(codewords=256))
    assert [(row.path, row.language) for row in data.read_manifest("m.csv")[1:]] == [
        ("audio/a/0002.flac", "en"), ("/corpora/b/0001.ogg", "fr")]
    assert data.read_manifest("m.tsv")[1].num_samples == 78_160
    assert {file: len(x) for file, (x, _) in data.read_alignments("a.csv").items()} == {
        "a-0001": 20, "b-0001": 17}
    assert [*data.read_alignments("a.txt")["a-0001"][0]] == [*["SIL"] * 3, *["HH"] * 4, *["AH"] * 3]
    assert [*data.read_alignments("grids")["g"][0]] == ["SIL"] * 3 + ["HH"] * 17
    assert len(evaluate.read_items("x.item")) == 2
    assert evaluate.read_units("u.jsonl")[1]["a-0002"].tolist() == [28, 5, 5, 9, 9, 9, 41, 28]


# ======== pretraining ========

linux = pytest.mark.skipif(sys.platform != "linux", reason="only there children end with a parent")


@pytest.fixture(scope="session")
def reference(toy, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "run"
    assert call(pretrain, *small(toy, "--out", out)) == 0
    return out


def test_a_run_and_what_it_writes(cli, toy, reference):
    files = ["config.json", "last.pt", "lock", "metrics.jsonl", "step_12.pt"]
    assert sorted(p.name for p in reference.iterdir()) == files
    for name in "target_ppl pred_ppl active usage_entropy grad_norm phone_loss lr".split():
        assert len(metrics(reference, name)) == 4 and np.isfinite(metrics(reference, name)).all()
    shutil.copytree(reference, "run")
    again = [pretrain, *small(toy, "--out", "run")]
    assert "finished; nothing to do" in cli(*again)[1]
    refused(cli(*again, "--lr", "0.1"), "lr was 0.0012, now 0.1")
    # Over again, from another run and on the toy world: that ends with a table.
    more = "--init", reference, "--lr", 1e-12, "--ema-start", 0.99, "--valid", toy / "train.csv"
    again = [pretrain, *RUN.split(), "--toy", toy, "--steps", 1, *more, "--out", "run"]
    status, out, _ = cli(*again, "--restart")
    assert status == 0 and re.search(r"^mfcc +1 +\d+\..*\nrun +2 +\d+\.", out, re.M)
    assert metrics("run", "ema")[-1] < 1 and metrics("run", "valid_loss")[-1] > 0
    students = [networks.load(run).student.state_dict() for run in ("run", reference)]
    same(*students, 1e-9)
    assert not moved("run.1", reference)  # nothing is lost
    refused(cli(*again, "--dim", 32), "--init brings its own network")


def test_the_front_end_is_frozen_from_the_step_that_says_so(cli, toy):
    args = small(toy, "--freeze-step", 6, "--keep-every", 6, "--steps", 9)
    assert cli(pretrain, *args, "--out", "run")[0] == 0
    shutil.copytree("run", "half")
    shutil.copy("half/step_6.pt", "half/last.pt")
    front = {name for name in weights("run") if name.startswith("feature_")}
    assert not moved("half", "run") & front and "heads.0.0.weight" in moved("half", "run")


@pytest.mark.parametrize("forgotten", [False, True])
def test_codewords_begin_as_targets(forgotten):
    """Of the first batch, each another one, also when they begin afresh."""
    model, batch = formula_model().train(), formula_batch(12345)
    options = meta_train.Options(bf16=False, codebook_start="targets")
    if forgotten:
        meta_train.forget(model, [batch], options, ONE, (0,), (0,))
    else:
        small_batches.start_codebooks(model, batch, options, ONE)
    _, targets = model.masked_frames(batch["wav"], batch["mask"])
    for codebook, t in zip(model.codebooks, targets):
        near_ones = torch.cdist(codebook.codebook, t) < 0.01
        assert near_ones.sum() == 8 and near_ones.any(1).all()


def test_a_new_network_is_prepared(cli, toy):
    """Its front end and its codewords; not those of --init."""
    still = small(toy, "--steps", 1, "--lr", 1e-12, "--codebook-decay", 1)
    ways = "--mel-steps", 2, "--codebook-start", "targets"
    of_init = still[len(NETWORK.split()) :]
    for out, words in (("plain", still), ("new", [*still, *ways]),
                       ("old", [*of_init, *ways, "--init", "plain"])):
        assert cli(pretrain, *words, "--out", out)[0] == 0, out
    parts = {"codebooks.0.codebook", "codebooks.1.codebook", "feature_projection.projection.weight"}
    assert parts <= moved("plain", "new") and not parts & moved("plain", "old")


def test_the_front_end_learns_log_mel_spectra(toy):
    torch.manual_seed(0)
    options = pretrain.Options(mel_steps=30, batch_samples=32_000, max_samples=32_000)
    model = SpidR(Config(**networks.PRESETS["tiny"]))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    batches = data.Batches(data.read_manifest(toy / "train.csv"), model.config, options)
    first, last = small_batches.fit_front_end(model, batches, options, ONE)
    parts = {n.split(".")[0] for n, t in model.state_dict().items() if not t.equal(before[n])}
    assert last < 0.9 * first and parts == {"feature_extractor", "feature_projection"}


def test_the_objective_brings_its_schedule():
    for more, expected in (
        ([], ("linear", 750.0, 5000, 0.05)),
        (["--layer-drop", "0", "--ema-timescale", "9"], ("linear", 9.0, 5000, 0.0)),
    ):
        argv = ["--objective", "dinosr", *more]
        _, c = pretrain.parse_options(pretrain.Options, pretrain.PRESETS, Config, argv=argv)
        assert (c.ema_schedule, c.ema_timescale, c.ema_stop, c.layer_drop) == expected
    base = Config(dim=16, heads=1, layers=1, codebooks=1, ffn=8)
    model = SpidR(dataclasses.replace(base, **networks.dinosr(base.ema_timescale)))
    near([model.ema_decay(step) for step in (0, 15_000, 30_000, 199_999, 200_000)],
         [0.999, 0.99945, 0.9999, 0.9999, 1], 1e-9)


def test_the_log_says_how_a_run_goes(tmp_path, capsys):
    """That the codebooks collapse, and that steps are skipped."""
    options = pretrain.Options(out=str(tmp_path))
    lines = '{"step": 0}\n{"step": 7}\n\0\0\n[1]\n{"step": 0, "lo'  # after a crash; 7 comes again
    (tmp_path / "metrics.jsonl").write_text(lines)
    log = pretrain.Log(options, ONE, 9, 0, None)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'
    for step, usage in (1, 0.8), (2, 0.3):
        log.add({"usage_entropy": torch.tensor(usage), "skipped": torch.tensor(0.0)})
        log.write(step)
        assert ("collapsing" in capsys.readouterr().out) == (usage < 0.5)
    log.metrics = [{"grad_norm": torch.tensor(math.nan), "skipped": torch.tensor(1.0)}] * 20
    complains("20 steps in a row up to step 3 had no finite gradient", log.write, 3)


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_the_first_save(_, save=networks.save):
    """After its first file."""
    def kill_after_one_file(*args, **more):
        kill(save(*args, **more))

    networks.save = pretrain.save = kill_after_one_file


@linux
def test_whatever_happens_a_run_ends_and_goes_on_to_the_same_bits(cli, toy, reference):
    # The first save is also a kept one, step_3.pt.
    args = small(toy, "--out", "run", "--loaders", 2, "--keep-every", 3)

    def start_again_and_interrupt(_):
        [(status, printed)] = processes(pretrain, *args)
        refused((status, "", printed), f"run is being written by process {os.getpid()} on ")
        os.killpg(0, signal.SIGINT)  # as Ctrl-C does

    def kill_a_loader(_):
        torch.multiprocessing.active_children()[0].kill()
        time.sleep(5)

    def fill_the_disk(_):
        torch.save = MagicMock(side_effect=RuntimeError("unexpected pos 64 vs 0"))

    for at, grief, expected, message in (
        (1, kill_in_the_first_save, -signal.SIGKILL, ""),
        (5, start_again_and_interrupt, 143, "stopped at step 5"),
        (3, kill_a_loader, 2, "error: a process that reads audio was killed"),
        (1, fill_the_disk, 2, ".pt could not be written, what was there before is untouched"),
        (4, lambda _: 1 / 0, 1, "ZeroDivisionError"),
        (2, kill, -signal.SIGKILL, "from step 9"),
        (0, None, 0, "12 steps"),
    ):
        [(status, printed)] = processes(pretrain, *args, at=at, do=grief)
        assert status == expected and message in printed, printed
        assert ("Traceback" in printed) == (status == 1), printed
    assert not moved("run", reference)
    for name in "step", "loss", "audio_seconds", "lr":
        assert metrics("run", name)[-2:] == metrics(reference, name)[-2:]


def test_another_command_is_run_as_a_process_of_its_own(capfd, monkeypatch):
    monkeypatch.setattr(pretrain.signal, "signal", lambda *_: None)
    pretrain.show("extras/toy.py", "--help")
    with pytest.raises(SystemExit, match="2"):
        pretrain.show("evaluate.py", "abx")
    out, err = capfd.readouterr()
    assert "python extras/toy.py table RUN" in out and "--items" in err


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(networks.fcntl, "lockf", lockf)
    pretrain.claim(tmp_path / "run", False)
    assert "warning: " in capsys.readouterr().err


def test_the_commit_is_read_from_any_folder(tmp_path, monkeypatch):
    folder = tmp_path / "it's here"
    folder.mkdir()
    for words in "init -q", "-c user.name=a -c user.email=b commit -q --allow-empty -m c":
        subprocess.run(["git", "-C", folder, *words.split()], check=True)
    monkeypatch.setattr(pretrain, "__file__", str(folder / "pretrain.py"))
    assert re.fullmatch("[0-9a-f]{40}", pretrain.commit())


@linux
def test_ranks_end_with_each_other_and_with_torchrun(cli, toy):
    args = [*map(str, small(toy, "--out", "ranks", "--loaders", 1, "--steps", 9999))]
    ends = processes(pretrain, *args, ranks=2, at=5, do=kill)
    assert [status for status, _ in ends] == [1, -signal.SIGKILL]
    words = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    words = [sys.executable, *words, HERE / "pretrain.py", *args]
    torchrun = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("step 9/9999 ") for line in torchrun.stdout)
    torchrun.kill()
    torchrun.communicate(timeout=60)  # until nobody holds its output
    assert networks.read_checkpoint("ranks")[1]["step"] >= 9


@linux
def test_two_ranks_are_one_with_accumulation(cli, toy, reference, meta_run):
    def on_ranks(script, *args, ranks=2, **how):
        ends = processes(script, *args, ranks=ranks, **how)
        assert [status for status, _ in ends] == [0] * ranks, ends

    def check(script, *args, ranks=2):
        on_ranks(script, *args, "--out", f"{script.__name__}_{ranks}", ranks=ranks)
        one = f"{script.__name__}_{ranks}_one"
        assert cli(script, *args, "--out", one, "--accumulate", 2)[0] == 0
        same(weights(one), weights(f"{script.__name__}_{ranks}"), 1e-5)

    def spoil_a_gradient(model):
        hook = model.mask_embedding.register_hook(lambda g: hook.remove() or g * math.nan)

    check(pretrain, *small(toy, "--layer-drop", 0, "--steps", 6))
    for name in "loss target_ppl pred_ppl accuracy active phone_loss grad_norm loss_0".split():
        near(metrics("pretrain_2_one", name), metrics("pretrain_2", name), 1e-4)
    check(adapt, *adaptation(toy, meta_run, "--held-out", 0, "--steps", 2))
    half = meta(toy, reference, "--layer-drop", 0, "--batch-samples", 32000)
    check(meta_train, *half, "--workers", 1)
    check(meta_train, *half, ranks=4)  # the papers' layout: two workers of two ranks
    on_ranks(meta_train, *meta(toy, reference, "--out", "workers"))  # two of one
    same(weights("workers"), weights(meta_run), 1e-6)
    # A NaN on one rank is skipped by all. Here the ranks drop different layers, too.
    args = small(toy, "--log-every", 1, "--steps", 6, "--out", "nan")
    on_ranks(pretrain, *args, at=4, do=spoil_a_gradient)
    assert metrics("nan", "skipped") == [0] * 4 + [1] * 2
    assert all(t.isfinite().all() for t in weights("nan").values())


def test_mistakes_are_one_line(cli, toy, reference):
    write_tone("good.wav")
    write_tone("silent.wav", amplitude=0)
    shutil.copytree(reference, "cut")
    for path in write_tone("cut.flac"), Path("cut/last.pt"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for row, message in (
        ("none.wav,48000", "m.csv:3: none.wav: no such file"),
        ("cut.flac,48000", "m.csv:3: cut.flac: "),
        ("silent.wav,48000", "m.csv:3: silent.wav: silence"),
        ("good.wav,47000", "m.csv:3: good.wav: 47000 samples stated, the file has 48000"),
        ("\xff,1", "m.csv: no audio that is read, nor a CSV or TSV"),
    ):
        text = f"path,num_samples\ngood.wav,48000\n{row}\n"
        Path("m.csv").write_bytes(text.encode("latin-1"))
        refused(cli(pretrain, *small(toy, "--manifest", "m.csv")), message)
    for row, message in (
        ("nobody,a a,baso", "a.csv: not of these recordings"),
        ("baso-train-0-0000,SIL a,baso", "2 phones at 100 Hz of 'baso', the manifest says"),
        ("baso-train-0-0000,SIL a,x", "2 phones at 100 Hz of 'x', the manifest says"),
    ):
        Path("a.csv").write_text(f"fileid,phones,language\n{row}\n")
        refused(cli(pretrain, *small(toy, "--alignments", "a.csv")), message)
    for script, args, *wrong, message in (
        (pretrain, small(toy), "--out", "/proc/nothing", "No such file or directory"),
        (pretrain, small(toy), "--out", "cut", "not a checkpoint, or one cut short"),
        (pretrain, small(toy), "--accumulate", 10_000, "batches are too few"),
        (meta_train, meta(toy, "nowhere"), "nowhere: no such checkpoint"),
        (adapt, adaptation(toy, reference), "--language", "latin", "latin: no recordings in"),
        (adapt, adaptation(toy, reference), "--budget", "1h", "there are only"),
    ):
        refused(cli(script, *args, "--out", "new", *wrong), message)
    assert not Path("new").exists()


def test_a_recording_that_goes_bad_is_skipped_and_counted(cli, toy, monkeypatch):
    def read(path, *crop, read=data.read_audio):
        return read("gone.wav" if "nore-train-0" in path else path, *crop)

    monkeypatch.setattr(data, "read_audio", read)
    status, _, err = cli(pretrain, *small(toy, "--supervised-every", 0, "--out", "run"))
    assert status == 0 and err.count("skipped:") == 1 and "nore-train-0" in err
    assert metrics("run", "bad_recordings")[-1] >= 2


# ======== meta-training ========
# Golden values: of the released SpidR-Adapt, on the formulas in each test. It is no package, so
# there are no lines to run.


def test_supervised_loss_of_the_released_implementation():
    model = formula_model(32, 3, 64, 2, "layer_norm", 0.0)
    model.supervised_classifiers["x"] = classifier(6, 5)
    targets = (5 * torch.arange(18) % 6).view(2, 9)
    model.frames = lambda wav: (torch.zeros(2, 9, 32), None)
    model.student.forward = lambda x, valid=None, depth=None: (None, [s(108, 0).view(2, 9, 6)])
    mask, phones = torch.zeros(2, 9, dtype=torch.bool), targets.masked_fill(targets == 5, -100)
    loss, _ = model.supervised_loss(None, mask, phones, "x", 1)
    near(loss.item(), 2.466529130935669)


def test_forgetting_and_the_refit_of_the_released_implementation():
    """Fresh codebooks and heads, a function of the seed alone. The heads learn their labels."""
    found, batch = [], formula_batch(12345)
    for phase, seed in (0.1, 1), (0.2, 1), (0.2, 2):
        model = formula_model(phase=phase)
        meta_train.forget(model, [batch], meta_train.Options(refit_steps=0), ONE, (seed,), (0,))
        found.append({**model.codebooks.state_dict(), **model.heads.state_dict()})
    same(found[0], found[1])
    assert all((found[1][name] != x).any() for name, x in found[2].items() if "counts" not in name)
    assert all((x == 1).all() for name, x in found[2].items() if "counts" in name)

    head, inputs = classifier(6, 4).output_layer, s(300, 0).view(1, 50, 6)
    labels, o = (7 * torch.arange(50) % 4)[None], meta_train.Options()
    meta_train.fit_heads(torch.nn.ModuleList([head]), inputs, labels, o, ONE)
    near(head.weight[0, :3].tolist(), [-0.010728472844, 0.326702862978, 0.619916558266])
    near(head.bias.tolist(), [0.12869438529, 0.409635454416, 0.556389689445, 0.836882352829])


@pytest.mark.parametrize("method, golden", [
    ("foblo", [0.873375118, 0.657645643, 0.352906942, 0.030390136, 0.380692631, 0.679470181]),
    ("reptile", [0.842292607, 0.614744484, 0.303993583, 0.078332692, 0.420963973, 0.706619740])])
def test_meta_update_of_the_released_implementation(monkeypatch, method, golden):
    """Of two workers, each with the same episode: the inner loop takes the module to phase 0.5, all
    of it to 0.9. Beta is 0.1."""
    def train_step(*args, phases=itertools.cycle((0.5, 0.9))):
        phase = next(phases)
        theta["stat"].copy_(s(3, 2 + phase))
        theta["weight"].copy_(s(3, phase))
        return {}

    theta = {"stat": s(3, 2), "weight": s(3, 0)}
    monkeypatch.setattr(meta_train, "fetch", lambda *_: itertools.repeat([]))
    monkeypatch.setattr(meta_train, "train_step", train_step)
    monkeypatch.setattr(meta_train, "save", lambda *_: None)
    o = meta_train.Options(method=method, workers=2, updates=1, inner_steps=1, outer_steps=1,
                           beta=0.1, forgetting=False)
    model, phi = MagicMock(state_dict=lambda: theta), torch.cat([*theta.values()])
    delta, episodes = torch.zeros(6), MagicMock(return_value=(1, 1))
    meta_train.meta_train(
        o, model, phi, delta, [None] * 2, [0, 1], episodes, ONE, ONE, MagicMock(), (0, 0))
    near(phi, golden)


@pytest.mark.parametrize("script", [meta_train, adapt])
def test_both_loops_forget(cli, toy, reference, script):
    """After one step that moves nothing codebooks and heads are those that forget() makes."""
    still = "--lr", 1e-12, "--codebook-decay", 1, "--no-bf16", "--out", "run"
    options = script.Options(bf16=False)
    if script is meta_train:
        args = meta(toy, reference, *still, "--method", "reptile", "--beta", 1, "--workers", 1,
                    "--updates", 1, "--inner-steps", 1, "--outer-steps", 0)
        seeds = (0, 0, 0, data.STREAM_FORGET), (0, 0, 0)
    else:
        args = adaptation(toy, reference, *still, "--steps", 1, "--held-out", 0)
        seeds = (0, data.STREAM_FORGET), (0, 0, 0)
    heard, forget = [], meta_train.forget

    def remember(model, micro_batches, *more):
        heard.extend(micro_batches)
        forget(model, micro_batches, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "forget", remember)
        assert cli(script, *args)[0] == 0
    changes = dict(layer_drop=0.3 * (script is meta_train))
    fresh = networks.load_init(reference, **changes)[0].train()
    before = fresh.heads[0][0].weight.clone()
    forget(fresh, heard, options, ONE, *seeds)
    adapted = networks.load("run")
    same(adapted.codebooks.state_dict(), fresh.codebooks.state_dict(), 1e-6)
    same(adapted.heads.state_dict(), fresh.heads.state_dict(), 1e-5)
    assert (fresh.heads[0][0].weight - before).norm() > 0.5
    # By hand: fresh ones, then the heads are fitted to the labels of the frames that they read.
    by_hand = networks.load_init(reference, **changes)[0].train()
    pretrain.seed_step(*seeds[0])
    for codebook, head in zip(by_hand.codebooks, by_hand.heads):
        codebook.reset()
        head[0].reset_parameters()
    pretrain.seed_step(*seeds[1])
    inputs, targets = by_hand.masked_frames(heard[0]["wav"], heard[0]["mask"])
    meta_train.fit_heads(by_hand.heads, torch.stack(inputs).detach(), by_hand.assign(targets),
                         options, ONE)
    same(by_hand.heads.state_dict(), fresh.heads.state_dict(), 1e-6)


def schedule(module, *argv):
    return pretrain.parse_options(module.Options, module.PRESETS, argv=["--preset=base", *argv])[0]


def test_schedules():
    ema = SpidR(Config(layers=1, codebooks=1, dim=16, heads=1, ffn=8)).ema_decay
    for rate, o, golden in (
        (pretrain.lr_at, schedule(pretrain), {
            0: 5e-6, 6000: 2.525e-4, 12000: 5e-4, 199999: 5e-4, 200001: 4.999884872070815e-4,
            300000: 5e-5, 399999: 5.0001151305801365e-6}),
        (lambda step, _: ema(step), None, {
            0: 0.999, 10000: 0.9993934693402874, 184000: 0.9999998989605982, 184300: 1}),
        (meta_train.episode_lr, schedule(meta_train), {
            0: 8.75e-8, 300: 4.41875e-6, 600: 8.75e-6, 1799: 8.75e-6, 1800: 7.925e-6,
            2000: 1.7e-7, 11999: 4.9995875e-5, 101800: 4.6022478587658565e-5,
            199999: 5.000230263811282e-7}),
        (meta_train.episode_lr, schedule(meta_train, "--method=reptile"), {  # one cap an episode
            600: 8.75e-6, 1800: 8.75e-6, 11999: 5e-5, 101800: 4.560054196779549e-5, 199999: 5e-7}),
        (meta_train.episode_lr, schedule(meta_train, "--updates=10"), {19999: 5.002303e-7}),
        # Those shrink along with the run, this one does not.
        (pretrain.lr_at, schedule(adapt, "--steps=4000"), {
            0: 5e-8, 300: 2.525e-6, 600: 5e-6, 3999: 5e-6}),
    ):
        near([rate(step, o) for step in golden], list(golden.values()), 1e-6)


def test_tasks_and_budgets():
    rows = ten_seconds(400)  # 2,000 s a language
    o = meta_train.Options(chunk_seconds=600, chunk_min_seconds=100)
    tasks, again = (meta_train.make_tasks(rows, o, draw) for draw in (0, 1))
    assert sorted(len(r) for _, r in tasks) == [20, 20] + [60] * 6
    assert sorted(row.fileid for _, r in tasks for row in r) == sorted(r.fileid for r in rows)
    assert all(row.language == language for language, r in tasks for row in r)
    assert len(tasks) == len(again) and tasks != again
    o.chunk_seconds = 975  # 50 s join their neighbour
    assert len(meta_train.make_tasks(rows, o, 0)) == 4

    few, again, other = (adapt.subset(rows, 95, seed) for seed in (1, 1, 2))
    assert len(few) == 10 and few == again != other
    steps = [adapt.steps_for(hours) for hours in (0.01, 1 / 6, 1, 100, 999)]
    assert steps == [4000, 4000, 8000, 24000, 24000]
    # Seconds count, not recordings: here of three, of which one is as long as fifty crops.
    long = rows[0]._replace(num_samples=16_000_000)
    rows = data.pieces([long, *rows[1:3]], 320_000)
    kept, held_out = adapt.hold_out(rows, adapt.Options(), Config())
    seconds = adapt.seconds_of(held_out.rows)
    assert 102 <= seconds <= 122 and adapt.seconds_of(kept) == 1020 - seconds
    assert 60 <= adapt.seconds_of(adapt.subset(rows, 60, 0)) < 80


def meta(toy, init, *more):
    return [*"--workers 2 --updates 2 --inner-steps 3 --outer-steps 2 --ramp-steps 2 --lr 1e-3 "
            "--supervised-layer 2 --log-every 1 --loaders 0 --device cpu --batch-samples 64000 "
            "--max-samples 32000 --chunk-seconds 18 --chunk-min-seconds 3 --layer-drop 0.3"
            .split(), "--toy", toy, "--init", init, *more]


@pytest.fixture(scope="session")
def meta_run(toy, reference, tmp_path_factory):
    out = tmp_path_factory.mktemp("meta") / "run"
    assert call(meta_train, *meta(toy, reference, "--out", out)) == 0
    return out


def test_meta_training_identities(cli, toy, reference, meta_run, monkeypatch):
    assert min(metrics(meta_run, "relative_delta")) > 0 and metrics(meta_run, "step")[-1] == 20
    names = moved(reference, meta_run)
    assert "student.layers.0.attention.qkv.weight" in names
    # Supervised steps move neither of these, and what forgetting does to codebooks cancels.
    assert not any(name.startswith(("teacher.", "codebooks.")) for name in names)
    args = meta_train, *meta(toy, reference)
    assert cli(*args, "--outer-steps", 0, "--out", "none")[0] == 0
    assert not moved("none", reference)

    saved = []

    def save(options, ranks, model, phi, *more):
        torch.testing.assert_close(phi, meta_train.to_vector(model, "cpu"), rtol=1e-6, atol=1e-6)
        saved.append(phi)

    # Reptile with beta 1 and one worker goes on from where its training ends.
    monkeypatch.setattr(meta_train, "save", save)
    more = "--workers 1 --method reptile --beta 1 --updates 1 --out plain".split()
    assert cli(*args, *more)[0] == 0 and len(saved) == 1


def test_languages_without_labels_are_left_out(cli, toy, reference):
    lines = (toy / "train_alignments.csv").read_text().splitlines()
    Path("a.csv").write_text("\n".join(x for x in lines if not x.endswith(",nore")))
    args = meta(toy, reference, "--manifest", toy / "train.csv", "--preset", "tiny", "--alignments")
    code, _, err = cli(meta_train, *args, "a.csv", "--updates", 1, "--out", "run")
    assert code == 0 and err.count("left out: language 'nore': no --alignments") == 1, err
    Path("a.csv").write_text("\n".join([lines[0], lines[1].replace(",baso", ",x")]))
    refused(cli(meta_train, *args, "a.csv", "--out", "none"), "'x', the manifest says")


@linux
def test_meta_training_starts_the_episode_again(cli, toy, reference, meta_run):
    args = meta_train, *meta(toy, reference, "--out", "run")

    # In the middle of the first checkpoint; in the inner loop of the second episode, in its outer
    # loop, in the middle of its checkpoint.
    for at, do in (1, kill_in_the_first_save), (8, kill), (4, kill), (5, kill_in_the_first_save):
        [(status, _)] = processes(*args, at=at, do=do)
        assert status == -signal.SIGKILL
        if Path("run/last.pt").exists():
            assert networks.read_checkpoint("run")[1]["done"] == (0, 1)
    assert cli(*args)[0] == 0
    assert not moved("run", meta_run)
    assert metrics("run", "step") == metrics(meta_run, "step")
    assert sorted(os.listdir("run")) == sorted(os.listdir(meta_run))


# ======== adaptation ========


def adaptation(toy, init, *more):
    """Of a recording of the toy world, which it takes for audio of mine."""
    audio = "--audio", toy / "target/goxi.csv", "--preset", "tiny"
    return [*"--loaders 0 --device cpu --max-samples 32000 --batch-samples 32000 --lr 1e-2 "
            "--rank-max 4 --steps 4 --save-every 2".split(), *audio, "--init", init, *more]


@pytest.mark.parametrize("method", ["full", "lora", "dama"])
def test_adaptation(cli, toy, meta_run, method):
    args = adaptation(toy, meta_run, "--method", method)  # a piece of ten is held out
    status, out, err = cli(adapt, *args, "--out", "whole")
    assert status == 0 and "change" in out, err
    config = json.loads(Path("whole/config.json").read_text())
    losses = metrics("whole", "valid_loss")  # before, and at each checkpoint
    assert len(losses) == 3 and min(losses) > 0 and "held out: active " in out
    assert config["audio"]["recordings"] == 9 and config["model"]["encoder_layer_drop"] == 0
    names = moved(meta_run, "whole")
    linears = re.compile(r"student\.layers\.\d\.(attention|feed_forward)\.\w+\.weight")
    products = {name for name in names if linears.fullmatch(name)}
    assert len(products) == 8 and {"heads.0.0.weight", "codebooks.1.codebook"} <= names
    assert not any(name.startswith(("feature_", "teacher.", "supervised_")) for name in names)
    if method != "full":
        assert all(name.startswith(("heads.", "codebooks.")) for name in names - products)
    # The same in two parts.
    parts = adapt, *args, "--out", "parts"
    terminate = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    assert cli(*parts, at=3, do=terminate)[0] == 143
    assert cli(*parts)[0] == 0
    assert not moved("whole", "parts") and "nothing to do" in cli(*parts)[1]


def test_adaptation_scores_items_of_its_own(cli, toy, meta_run):
    """Before and after, the same as evaluate.py does."""
    items = "--items", toy / "eval/goxi.item", "--items-audio", toy / "eval/goxi.csv"
    status, out, err = cli(adapt, *adaptation(toy, meta_run, *items), "--out", "run")
    assert status == 0 and out.count("$ python evaluate.py abx") == 2, err
    for when, model in ("before", meta_run), ("after", "run"):
        words = "--items", toy / "eval/goxi.item", "--audio", toy / "eval/goxi.csv"
        assert cli(evaluate, "abx", "--model", model, *words, "--out", "x.json")[0] == 0
        assert Path("x.json").read_text() == Path(f"run/abx_{when}.json").read_text()
    refused(cli(adapt, *adaptation(toy, meta_run, "--items", "none.item"), "--out", "new"), "none.")


def test_base_on_a_cpu_is_warned_of(capsys):
    for dim in 128, 768:
        adapt.warn_of_days(ONE, Config(dim=dim, heads=4))
        assert ("days on a CPU" in capsys.readouterr().err) == (dim == 768)


@linux
def test_ranks_wait_for_the_score_and_begin_alike(cli, toy, meta_run, monkeypatch):
    """A collective waits for a while only, here three seconds. And the ranks' machines may not
    agree on the signs of singular vectors."""
    def slowly(*_):
        time.sleep(5)
        sys.exit(0)  # as a process of its own would: it takes no part in the ranks' barriers

    def svd(*args, svd=torch.linalg.svd, **how):
        U, S, Vh = svd(*args, **how)
        return U, S, Vh * (-1) ** int(os.environ.get("RANK", 0))

    def init(*args, init=torch.distributed.init_process_group):
        init(*args, timeout=datetime.timedelta(seconds=3))

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    monkeypatch.setattr(torch.linalg, "svd", svd)
    monkeypatch.setattr(evaluate, "main", slowly)
    more = "--items", "any.item", "--method", "dama", "--held-out", 0, "--out"
    ends = processes(adapt, *adaptation(toy, meta_run, *more), "run", ranks=2)
    assert [status for status, _ in ends] == [0, 0], ends
    more = "--method", "dama", "--held-out", 0, "--out", "one", "--accumulate", 2
    assert cli(adapt, *adaptation(toy, meta_run, *more))[0] == 0
    same(weights("one"), weights("run"), 1e-5)


def test_low_rank_updates():
    """They begin at zero. DAMA's basis are W0's leading right singular vectors, LoRA's is random,
    of one rank. Merged they are an ordinary network."""
    assert adapt.dama_ranks(12, 32, 2) == [32, 22, 12, 2, 2, 2, 2, 2, 2, 12, 22, 32]
    wav = formula_batch(8000)["wav"]
    for method, basis, ranks, frozen in (("dama", "middle", [8, 2, 2, 2, 2, 8], [2, 3]),
                                         ("dama", "all", [8, 2, 2, 2, 2, 8], range(6)),
                                         ("lora", "middle", [8] * 6, [])):
        model, plain = (formula_model(32, 6, 64, 2, "layer_norm", 0.1) for _ in range(2))
        adapt.add_adapters(model, adapt.Options(method=method, basis=basis, rank_max=8, rank_min=2))
        for i, (layer, before) in enumerate(zip(model.student.layers, plain.student.layers)):
            for linear, old in zip(adapt.linears(layer), adapt.linears(before)):
                A, B, W0 = *linear.parametrizations.weight[0].parameters(), old.weight.detach()
                assert len(A) == ranks[i] and linear.weight.equal(W0)
                assert B.requires_grad and A.requires_grad == (i not in frozen)
                kept = (W0 @ A.T).norm(), torch.linalg.svdvals(W0)[: len(A)].norm()
                assert torch.isclose(*kept, rtol=1e-4) == (method == "dama")
                if method == "dama":
                    torch.testing.assert_close(A @ A.T, torch.eye(len(A)), atol=1e-5, rtol=0)
                nn.init.normal_(B)
        plain.load_state_dict(adapt.merged(model))
        for x, y in zip(model.encode(wav), plain.encode(wav)):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=0)


# ======== evaluation: ABX ========
# The ABX numbers are those of fastabx 0.9.0 on the items and features of `abx_world`:
# zerospeech_abx(items, folder, max_size_group=None, max_x_across=None, speaker=, context=,
# distance=, frequency=50)

GOLDEN_ABX = {  # within speakers: within contexts, any; across speakers: the same
    "angular": (0.110521, 0.141589, 0.352553, 0.407178),
    "euclidean": (0.059987, 0.093832, 0.294423, 0.351208),
    "identity": (0.352670, 0.356760, 0.461069, 0.439022),
}
def abx_world(folder, items=144):
    """An item file and {file: [T, 3]}: 3 phones, of which a speaker lacks one, 3 speakers, 2
    contexts, of which another speaker lacks one, 1 to 9 frames, ties.

    Onsets and offsets lie exactly on the centres of frames, where binary floating point would lose
    some of them.
    """
    features = {f"f{n}": [] for n in range(3)}
    lines = ["#file onset offset #phone prev-phone next-phone speaker"]
    for i in range(items):
        file, phone, speaker, context = f"f{i % 3}", i * i % 7 % 4, i // 4 % 3, i // 12 % 2
        source = i - 36 if i % 5 == 0 and i >= 36 else i  # every fifth repeats an earlier one
        t = torch.arange(1 + 5 * source % 9, dtype=torch.float64)[:, None]
        d = torch.arange(3, dtype=torch.float64)
        x = torch.sin(1.3 * phone * (d + 1) + 0.8 * speaker)
        x = (x + 1.2 * torch.sin(12.9 * source + 4.1 * t + 7.7 * d))
        # The first speaker's frames lie on a grid, which gives ties.
        x = x.float() if speaker else (x * 1.5).round().float() + 0.25
        at = sum(map(len, features[file]))
        onset, offset = (2 * at + 1) / 100, (2 * (at + len(x)) - 1) / 100
        if (speaker, context) != (1, 1) and (speaker, phone) != (2, 1):
            lines.append(f"{file} {onset:.2f} {offset:.2f} p{phone} c{context} c s{speaker}")
        features[file] += [x, torch.full((1, 3), 9.0)]
    path = folder / "x.item"
    path.write_text("\n".join(lines) + "\n")
    return {file: torch.cat(x) for file, x in features.items()}, path


@pytest.mark.parametrize("distance", GOLDEN_ABX)
def test_abx_equals_fastabx(tmp_path, distance):
    features, items = abx_world(tmp_path)
    if distance == "identity":
        features = {file: (x[:, 0] > 0).long() for file, x in features.items()}
    modes = itertools.product(("within", "across"), ("within", "any"))
    found = [evaluate.abx(features, items, *mode, distance=distance) for mode in modes]
    assert found == pytest.approx([100 * error for error in GOLDEN_ABX[distance]], abs=1e-3)


def test_abx_subsampled(tmp_path):
    features, items = abx_world(tmp_path)
    options = dict(speaker="across", context="any", max_size_group=5, max_x_across=1)
    found = [evaluate.abx_details(features, items, seed=seed, **options) for seed in range(12)]
    full = evaluate.abx_details(features, items, speaker="across", context="any")
    assert all(one["triples"] == one["cells"] * 125 for one in found)
    assert full["cells"] > found[0]["cells"]
    errors = torch.tensor([one["error"] for one in found])
    assert 0 < abs(errors.mean() - full["error"]) < 4 * errors.std() / math.sqrt(len(errors))
    assert found[0] == evaluate.abx_details(features, items, seed=0, **options)


def test_abx_says_what_it_leaves_out(tmp_path, cli):
    features, items = abx_world(tmp_path)
    with open(items, "a") as file:
        file.write("f0 0.011 0.012 p0 c0 c s0\nnone 0 1 p0 c0 c s0\nf1 0.01 99 p0 c0 c s0\n")
    head, *lines = items.read_text().splitlines()
    note = evaluate.abx_details(features, items)["note"]
    assert note.count(f"1 of {len(lines)} items") == 3
    lines = [head, *(line for line in lines if line.endswith("s0"))]
    items.write_text("\n".join(lines))
    complains("no cell .* 1 speaker", evaluate.abx, features, items, speaker="across")
    for file, frames in features.items():
        np.save(f"{file}.npy", frames)
    code, out, err = cli(evaluate, "abx", "--features", ".", "--items", items)
    assert code == 0 and re.search(r" \d+\.\d\d +-$", out, re.M) and "1 speaker" in err
    items.write_text("\n".join([*lines, "f0 0.1 x p0 c0 c s0"]))
    complains(rf"{items.name}:{len(lines) + 1}: not an item", evaluate.abx, features, items)


def test_words_of_one_s_own_are_items(tmp_path, cli):
    features, items = abx_world(tmp_path)
    header, *lines = map(str.split, items.read_text().splitlines())
    words = ["file,onset,offset,word,speaker"]
    words += [f"{file}.wav,{onset},{offset},{word},{speaker}"
              for file, onset, offset, word, _, _, speaker in lines]
    Path("words.csv").write_text("\n".join(words))
    for speaker in "within", "across":
        assert evaluate.abx(features, "words.csv", speaker) == \
            pytest.approx(evaluate.abx(features, items, speaker, context="any"))
    Path("words.csv").write_text("file,onset,offset,word\nf0,x,1,a\n")
    complains("words.csv:2: not an item", evaluate.read_items, "words.csv")


# ======== evaluation: quality, features, units ========


def test_quality_by_its_definitions(capsys):
    units, phones = discovery_world()
    pairs = [pair for f in units for pair in zip(phones[f], np.repeat(units[f], 2).tolist())]
    joint, n, (p, u) = Counter(pairs), len(pairs), map(Counter, zip(*pairs))
    runs = sum(len([*itertools.groupby(x)]) for x in units.values())
    found = evaluate.quality(units, phones, codewords=16)
    assert found | dict(
        phone_purity=sum(max(joint[a, b] for a in p) for b in u) / n,
        cluster_purity=sum(max(joint[a, b] for b in u) for a in p) / n,
        perplexity=2 ** -sum(c / n * math.log2(c / n) for c in u.values()),
        active=len(u), bitrate=4 * runs / (sum(map(len, units.values())) / 50),
    ) == pytest.approx(found)
    others = units | {"u": [1]}, phones | {"v": ["x"], "w": ["x"]}
    assert evaluate.quality(*others, codewords=16) == found
    assert capsys.readouterr().err == (
        "quality: 3 files count; 1 files without phones and 2 without units are left out\n")
    too_long = phones | {"f2": phones["f2"] + ["x"] * 7}
    complains("^f2: not of the same audio", evaluate.quality, units, too_long)


def discovery_world(files=3, frames=60):
    """Units and phones whose numbers DiscoPhon gave: repetitions, ties of equally frequent phones,
    boundaries midway between two others, a few phones more or fewer than units."""
    units, phones = {}, {}
    for f in range(files):
        units[f"f{f}"] = [(i * i // 7 + i // 3 + f) % 11 for i in range(frames + f)]
        phones[f"f{f}"] = [f"p{(i * i // 97 + i // (7 + f)) % 10}"
                           for i in range(2 * frames + 3 * f)]
    return units, phones


# from discophon.evaluate import phoneme_discovery  # 0.2.0
# phoneme_discovery(*discovery_world(FILES, FRAMES), kind=TRACK, n_units=11, n_phonemes=10)
GOLDEN_DISCOVERY = {  # (track, files, frames): PNMI, PER, F1, R-value
    ("many-to-one", 3, 60): (0.0570397229, 0.7266666667, 0.5542168675, 0.5666739351),
    ("one-to-one", 3, 60): (0.0570397229, 0.6966666667, 0.6753246753, 0.6641262891),
    ("many-to-one", 1, 21): (0.5121099896, 0.6500000000, 0.7500000000, 0.7387723358),
    ("one-to-one", 1, 21): (0.5121099896, 0.7000000000, 0.8108108108, 0.8356730008),
}


@pytest.mark.parametrize("track, files, frames", GOLDEN_DISCOVERY)
def test_quality_equals_discophon(track, files, frames):
    found = evaluate.quality(*discovery_world(files, frames), codewords=11, track=track)
    assert [found[name] for name in ("pnmi", "per", "f1", "r_value")] == pytest.approx(
        GOLDEN_DISCOVERY[track, files, frames], abs=1e-9)


def test_one_to_one_is_the_best_assignment():
    """Of all assignments of 6 units to 6 phones, on random counts with ties."""
    for seed in range(10):
        table = np.random.default_rng(seed).integers(0, 4, (6, 6))
        best = max(table[list(rows), range(6)].sum() for rows in itertools.permutations(range(6)))
        rows = assignment.assignment(table)
        assert sorted(rows) == [*range(6)] and table[rows, range(6)].sum() == best
    complains("3 phones, silence included, for 2 units", evaluate.one_to_one, np.ones((3, 2)), 2)


def test_units_as_people_use_them(toy, reference, cli):
    """Deduplicated units, TextGrids, JSON lines as other projects write them."""
    audio, table = toy / "eval/goxi", toy / "eval/goxi_alignments.csv"
    units = evaluate, "units", "--model", reference, "--audio", audio
    assert cli(*units, "--out", "u.jsonl")[0] == 0
    assert cli(*units, "--out", "d.jsonl", "--dedupe")[0] == 0
    assert cli(*units, "--textgrid", "grids", "--alignments", table)[0] == 0
    refused(cli(*units), "--textgrid")
    refused(cli(*units, "--textgrid", "grids"), "grids is there already")
    (_, plain), (_, expanded) = map(evaluate.read_units, ("u.jsonl", "d.jsonl"))
    same(*({file: torch.tensor(x) for file, x in u.items()} for u in (plain, expanded)))
    seconds = {row.fileid: row.num_samples / 16000 for row in data.read_manifest(audio)}
    for line in map(json.loads, open("d.jsonl")):
        file, runs = line["file"], zip(line["units"], line["durations"])
        assert [*runs] == [(u, len([*run])) for u, run in itertools.groupby(plain[file])]
        grid = Path(f"grids/{file}.TextGrid").read_text()
        assert [*map(int, re.findall(r'text = "(\d+)"', grid))] == line["units"]
        assert grid.count("IntervalTier") == 2 and f"xmax = {seconds[file]}" in grid
    words = "--units", "u.jsonl", "--alignments", "grids", "--tier", "Units", "--out", "q.json"
    assert cli(evaluate, "quality", *words)[0] == 0  # of the units' own tier: they tell all of it
    assert json.loads(Path("q.json").read_text())["phone_purity"] > 0.95
    assert formats.intervals("aab", 0.01, 0.025) == [(0, 0.02, "a"), (0.02, 0.025, "b")]
    # JSON lines {"name", ...} without meta.json, and in gzip
    with gzip.open("p.jsonl.gz", "wt") as lines:
        for name, labels in evaluate.read_phones(table).items():
            lines.write(json.dumps(dict(name=name, phones=list(labels))) + "\n")
    Path("x.jsonl").write_text(Path("u.jsonl").read_text().replace('"file"', '"name"'))
    results = []
    for units, alignments in ("u.jsonl", table), ("x.jsonl", "p.jsonl.gz"):
        code, out, err = cli(evaluate, "quality", "--units", units, "--alignments", alignments,
                             "--out", "q.json")
        assert code == 0 and re.search(r"PNMI +\d+\.\d\d % ", out), err
        results.append(json.loads(Path("q.json").read_text()))
    assert results[0]["pnmi"] == results[1]["pnmi"] and results[0]["per"] == results[1]["per"]
    refused(cli(evaluate, "lm", "--units", "x.jsonl", "--out", "lm"), "x.meta.json is missing")
    Path("x.jsonl").write_text('{"file": "a", "units": [1]}\n{"units": [1]}\n')
    refused(cli(evaluate, "quality", "--units", "x.jsonl", "--alignments", table), "x.jsonl: not")


def test_features_of_a_killed_run_are_not_taken_over(cli, toy):
    def killed():
        yield "gone", torch.ones(2, 3)
        raise KeyboardInterrupt

    make = evaluate, "features", "--audio", toy / "eval/goxi", "--out", "f", "--model", "mfcc"
    with pytest.raises(KeyboardInterrupt):
        evaluate.write_features("f", killed(), evaluate.load_encoder("mfcc"), 1)
    assert Path("f.part/gone.npy").exists()
    assert cli(*make)[0] == 0
    assert not Path("f/gone.npy").exists() and not Path("f.part").exists()
    Path("f").rename("g")
    Path("f.part").mkdir()
    refused(cli(*make), "f.part is there already")


@torch.no_grad()
def test_features_units_and_layers(toy, cli):
    """K = 3 codebooks of L = 4 layers: codebook k belongs to layer 2 + k."""
    net = formula_model(layers=4, codebooks=3).eval()
    networks.save(Path("run/last.pt"), net.state_dict())
    config = {"model": networks.released_config(net.config)}
    Path("run/config.json").write_text(json.dumps(config))
    Path("audio").symlink_to(toy / "eval/goxi")
    first, last = data.read_manifest("audio")
    wav = data.standardise(data.read_audio(last.path))[None]
    encoder, codes = evaluate.load_encoder("run", "cpu"), net.units(wav)[:, 0]  # [K, T]
    assert [encoder.layer(), encoder.layer(units=True), encoder.layer(1)] == [3, 3, 1]
    common = evaluate, "units", *"--model run --audio audio --layer".split()
    for layer in 2, 3, 4:
        Path("u.jsonl").unlink(missing_ok=True)
        assert cli(*common, layer, "--out", "u.jsonl")[0] == 0
        refused(cli(*common, layer, "--out", "u.jsonl"), "u.jsonl is there already")
        header, units = evaluate.read_units("u.jsonl", dict(layer=layer, hash=encoder.hash))
        assert header["codewords"] == 8 and [*units] == [first.fileid, last.fileid]
        assert np.array_equal(units[last.fileid], codes[layer - 2])
    refused(cli(*common, 1, "--out", "v.jsonl"), "--layer 1")
    with pytest.raises(InputError, match="a fileid names several recordings"):
        next(evaluate.extract([first, first], encoder, [1]))
    assert cli(evaluate, *"features --model run --audio audio --layer 3 --out f".split())[0] == 0
    features, meta = evaluate.read_features("f", [last.fileid, "missing"])
    assert [*features] == [last.fileid] and meta["layer"] == 3
    assert torch.allclose(features[last.fileid], net.encode(wav)[2][0], atol=1e-5)


@pytest.mark.parametrize("fileid", ["../outside", "/outside", "a/../../outside"])
def test_a_fileid_stays_in_its_folder(cli, fileid):
    Path("m.csv").write_text(f"fileid,path,num_samples\n{fileid},a.wav,16000\n")
    result = cli(evaluate, *"features --model none --audio m.csv --out f/g".split())
    refused(result, "m.csv:2")  # before the model is looked for
    assert not list(Path().rglob("outside*")) and not Path("f/g").exists()


def test_windows_tile_a_long_recording(tmp_path):
    def means(wav):  # a layer that sees no more than the 400 samples of a frame
        return {1: wav.unfold(0, 400, 320).mean(1)}

    noise = np.random.default_rng(0).normal(size=90_001) / 10
    soundfile.write(tmp_path / "a.wav", noise, 16000)
    rows, encoder = data.read_manifest(tmp_path), evaluate.Encoder("", "", 1, 0, 0, means)
    whole, cut = (dict(evaluate.extract(rows, encoder, [1], longest=n))["a"] for n in (60, 2))
    assert torch.equal(whole[1], cut[1])
    for samples in (60 * 16000, 61 * 16000 + 7, 200 * 16000 - 1):
        frames = []
        for begin, end, keep in evaluate.windows(samples, 60):
            assert begin % 320 == 0 and end <= samples
            frames += range(begin // 320, begin // 320 + (end - begin - 400) // 320 + 1)[keep]
        assert frames == list(range((samples - 400) // 320 + 1))


def test_baselines():
    wav = data.standardise(torch.sin(torch.arange(16000) ** 1.5 / 500))
    assert baselines.mfcc(wav)[1].shape == (50, 39)
    click = torch.zeros(16000)
    click[320 * 20 + 160] = 1  # the centre of frame 20
    energy = baselines.mfcc(click)[1][:, 0]
    assert energy.argmax() == 20 and torch.allclose(energy[19], energy[21], atol=1e-3)
    encoder = baselines.encoder("hubert_base", "cpu", pretrained=False)
    outputs = encoder.encode(wav)
    assert [*outputs] == [*range(1, 13)] and outputs[6].shape == (49, 768)


HEADER = dict(model="M", hash="0f", layer=3, frame_rate=50, codewords=8)


def write_units_file(path, units, **changes):
    evaluate.write_json(evaluate.meta_of(path), HEADER | changes)
    lines = [dict(file=file, units=x) for file, x in units.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ======== the README ========


def test_the_readme_names_what_is_there():
    names = re.findall(r"`((?:extras\.)?[a-z_]+)\.([A-Za-z_][A-Za-z_.]+)`",
                       (HERE / "README.md").read_text())
    assert len(names) > 20
    for script, name in names:
        if name not in ("py", "jsonl", "json", "md", "pt", "meta.json", "item"):
            attrgetter(name)(importlib.import_module(script))


def test_the_readme_is_a_page_and_quotes_the_very_lines():
    """Its code stands in extras/minimal.py, in this order; links of all pages lead somewhere."""
    text = (HERE / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 2000
    quoted = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(quoted) == 2 and sum(block.count("\n") for block in quoted) < 30
    for block in quoted:
        lines = iter(map(str.strip, (HERE / "extras/minimal.py").read_text().splitlines()))
        for line in map(str.strip, block.splitlines()):
            assert line in lines, line
    for page in HERE / "README.md", *(HERE / "docs").glob("**/*.md"):
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", prose):
            assert (page.parent / link).exists(), (page, link)


def test_every_equation_stands_where_the_readme_says():
    rows = re.findall(r"^\| \((\d+)\) \|.*\|(.*)\|$", (HERE / "README.md").read_text(), re.M)
    assert [int(number) for number, _ in rows] == [*range(1, 15)]
    for n, where in rows:
        for name in re.findall(r"`([\w.]+)`", where):
            script = next(s for s in ("extras.maml", name.split(".")[0]) if name.startswith(s))
            thing = attrgetter(name[len(script) + 1 :])(importlib.import_module(script))
            mark = rf"# (\(\d+\), )?\({n}\)|, for \({n}\):"  # at a line, or for all of a function
            assert re.search(mark, inspect.getsource(thing)), (n, name)


@pytest.fixture
def small_presets(toy, tmp_path, monkeypatch):
    """The presets made small, and the toy world at its usual place."""
    stage = dict(batch_samples=64_000, max_samples=32_000, loaders=0, restart=True)
    episodes = dict(workers=1, updates=1, inner_steps=1, outer_steps=1, chunk_seconds=18,
                    chunk_min_seconds=3)
    for presets, small in (
        (networks.PRESETS, dict(norm="group_norm", dim=32, layers=4, heads=2, ffn=64, codebooks=2,
                             codewords=8, conv_layers=CONVS)),
        (pretrain.PRESETS, stage | dict(steps=3, supervised_every=2, supervised_layer=2)),
        (meta_train.PRESETS, stage | episodes),
        (adapt.PRESETS, stage | dict(steps=1, rank_max=2)),
        (unit_lm.PRESETS, dict(layers=1, dim=16, heads=2, steps=2, batch_tokens=256,
                                   context=32, restart=True)),
    ):
        for name in presets:
            monkeypatch.setitem(presets, name, small)
    for module in toy_world, page:
        monkeypatch.setattr(module, "TARGETS", ["goxi"])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").symlink_to(toy)


def test_the_readme_s_commands_run(cli, toy, small_presets):
    """All of them, in their order, in a folder that has what they name."""
    Path("phonetic").mkdir()
    for pair in ("audio train, french_audio train/nore, librilight train/nore, "
                 "recordings target/goxi, lexical lm/lexical, "
                 " syntactic lm/syntactic, tsc lm/tsc, dev-clean.item "
                 "eval/goxi.item, phones.csv train_alignments.csv, phonetic/dev-clean eval/goxi, "
                 "DISCOPHON discophon, textgrids target/goxi_alignments.csv").split(", "):
        name, path = pair.split()
        Path(name).symlink_to(toy / path)
    Path("train.csv").symlink_to(toy / "train.csv")
    Path("train").symlink_to(toy / "train")
    for name in "foblo_ssl_sl", "spidr_base":  # a path goes before a released model's name
        Path(name).symlink_to("runs/pretrain")

    Path("words.csv").write_text("file,onset,offset,word\n" + "".join(
        f"{line.split()[0]},{','.join(line.split()[1:4])}\n"
        for line in (toy / "target/goxi.item").read_text().splitlines()[1:]))
    pages = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
    lines = [x for page in pages for x in page.read_text().splitlines() if x.startswith("    ")]
    others = "test_smoke|extras/(?:experiments|speed|corpora|speech|minimal)"  # have own tests
    command = re.compile(rf"(?:python|=\S+|:29500) (?!{others})([\w/]+)\.py\b([^#&]*)")
    found = [match for line in lines for match in command.findall(line)]
    assert len(found) > 25
    for script, text in dict.fromkeys(found):  # a command that stands on two pages runs once
        for out in re.findall(r"(?:--out|--textgrid|manifest \S+) (\S+)", text):
            if Path(out).is_file():  # of another page
                Path(out).unlink()
            elif not out.startswith("runs/"):
                shutil.rmtree(out, ignore_errors=True)
        text = re.sub(r"--(compile|accumulate \d+|steps \d+)", "", text)
        for written, here in (
            ("--languages wol", "--languages goxi"), ("/wol/", "/goxi/"),
            ("--layer 6", "--layer 3"), ("--budget 10min", "--budget 3s"),
            ("phonetic/dev-clean/dev-clean.item", "dev-clean.item"),
            ("real/manifest.csv", str(toy / "train.csv")), ("real/alignments.csv", "phones.csv"),
            ("real/mboshi/eval/mboshi.item", "dev-clean.item"),
            ("real/mboshi/eval", "phonetic/dev-clean")):
            text = text.replace(written, here)
        status, _, err = cli(module_of(script), *text.split())
        assert status == 0, (script, text, err)
