"""SpidR learns from sound alone to tell phones (speech sounds) apart; FOBLO finds weights from
which it learns a new language fast. Here is the algorithm; other files add data, speed and safety.

    python extras/minimal.py [SEED]        two minutes on one CPU core; needs PyTorch alone

Equations are numbered as in README.md; read on in part one of model.py. Shapes: B crops, T frames
of 20 ms, D channels, L layers, K codebooks of V codewords, H frames hidden (masked) in a batch."""
import copy
import functools
import itertools
import math
import random
import sys
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import nn

# ======== sound: tiny languages, spoken by a formula ========
# The throat buzzes or a narrow passage hisses, and the mouth lets through what is near its three
# resonances. So a phone is: how much buzz, how much hiss, three frequencies in kHz. The last
# language is kept for the end: only it has y and x.
PHONES = {"i": (1, 0, .28, 2.25, 3.0), "e": (1, 0, .45, 1.95, 2.6), "a": (1, 0, .76, 1.35, 2.5),
          "o": (1, 0, .45, .85, 2.4), "u": (1, 0, .31, .76, 2.3), "y": (1, 0, .29, 1.75, 2.2),
          "m": (.4, 0, .25, 1.0, 2.2), "n": (.4, 0, .25, 1.6, 2.7), "l": (.5, 0, .38, 1.15, 2.75),
          "f": (0, .3, 1.2, 4.0, 7.0), "s": (0, .6, 4.5, 5.5, 6.5), "x": (0, .5, 1.0, 1.8, 4.0)}
LANGUAGES = ("mani sola nel fumin lise fona somul nafe lufi enos male sifu olin sam nifo lufem",
             "fami lisa mesi nafel sila masif feli las simef fila semal lefis mane safi sem ilaf",
             "nolu safo fun solan fuso nasu lofas sunol san lusaf fomu sanu loson fosa numal asol",
             "syma nexi maxy sine yxan mise xame nyse sixa mayn xeni syx many naxe ximy esan")

def speak(words, voice, frames):
    """Random words: their sound, 320 samples a frame and 80 more, and the phone of each frame."""
    text = "".join(random.choices(words.split(), k=frames))
    phones = [phone for phone in text for _ in range(random.randint(3, 6))][:frames]
    track = torch.tensor([(*PHONES[phone], 0.11 + 0.045 * voice) for phone in phones])  # pitch
    track = (track * (1 + 0.1 * torch.randn(frames, 6))).repeat_interleave(2, 0).T  # every 10 ms
    track = F.avg_pool1d(track, 7, 1, padding=3, count_include_pad=False)  # the tongue is slow
    buzz, hiss, *_, pitch = track.repeat_interleave(160, 1)  # every sample
    pulses = (pitch / 16).cumsum(0).floor().diff(prepend=torch.zeros(1))
    source = 10 * buzz * pulses + (hiss + 0.05) * torch.randn(len(hiss))
    khz = torch.linspace(0, 8, 257)[:, None] / (1 + 0.08 * voice)  # mouths differ in length
    mouth = sum(gain / (1 + ((khz - at) / 0.1) ** 2) for gain, at in zip((1, .6, .4), track[2:]))
    window = torch.hann_window(512)
    spectrum = torch.stft(source, 512, 160, window=window, return_complex=True)[:, :-1] * mouth
    sound = torch.istft(spectrum, 512, 160, window=window, length=320 * frames)
    return F.pad(sound + 0.01 * torch.randn(len(sound)), (0, 80)), phones

def batch(voices):
    """8 crops of 2 s [B, samples], about half of their frames to hide [B, T], phones [B, T]."""
    crops = [(*said, random.randrange(len(said[1]) - 100)) for said in random.choices(voices, k=8)]
    wav = torch.stack([sound[320 * i : 320 * i + 32080] for sound, _, i in crops])
    phones = [[[*PHONES].index(phone) for phone in phones[i : i + 100]] for _, phones, i in crops]
    hide = F.max_pool1d((torch.rand(8, 100) < 0.13).float(), 5, 1, padding=2) > 0  # spans of 5
    return F.layer_norm(wav, wav.shape[1:]), hide, torch.tensor(phones)

# ======== the network ========
# Convolutions turn each second, 16,000 samples, into 50 frames. Two Transformers read them, each
# with a random start of its own: the student learns, and the teacher says what to learn.
D, L, K, V = 64, 3, 2, 32  # each of the last K layers has a codebook and a head

def make_transformer():
    layers = [nn.TransformerEncoderLayer(D, 4, 4 * D, 0, batch_first=True) for _ in range(L)]
    positions = [nn.Conv1d(D, D, 9, padding=4, groups=4) for _ in range(3)]
    return nn.ModuleList([nn.ModuleList(positions), nn.LayerNorm(D), nn.ModuleList(layers)])

def make_model():
    model = nn.Module()
    model.conv = nn.Sequential(nn.Conv1d(1, 16, 10, 5, bias=False), nn.GroupNorm(16, 16), nn.GELU())
    for sizes in (16, 32, 3), (32, 32, 3), (32, 64, 3), (64, 64, 3), (64, 64, 2), (64, 64, 2):
        model.conv.extend([nn.Conv1d(*sizes, stride=2, bias=False), nn.GELU()])
    model.project = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, D))
    model.hidden = nn.Parameter(torch.rand(D))  # heard in the place of a hidden frame
    model.student, model.teacher = make_transformer(), make_transformer().requires_grad_(False)
    model.heads = nn.ModuleList(nn.Linear(D, V) for _ in range(K))
    model.classifiers = nn.ModuleList(nn.Linear(D, len(PHONES)) for _ in LANGUAGES)  # for FOBLO
    model.register_buffer("S", F.instance_norm(torch.randn(K, D, V)).mT)
    model.register_buffer("N", torch.ones(K, V))  # codewords: running sums S / running counts N
    return model

def hear(model, wav, hide=torch.tensor(False)):
    x = model.project(model.conv(wav[:, None]).mT)  # (1) [B, T, D]
    return torch.where(hide[..., None], model.hidden, x)  # (1) hidden frames all sound the same

def layers_of(transformer, x):
    """What each layer makes of frames x: its feed-forward output, which is then added to x."""
    (positions, norm, layers), place, outputs = transformer, x, []
    for convolution in positions:  # a frame's neighbours tell where it is
        place = F.gelu(F.layer_norm(convolution(place.mT).mT, (D,)))
    x = norm(x + place)
    for layer in layers:
        x = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
        outputs.append(layer.linear2(F.gelu(layer.linear1(x))))  # (2)
        x = layer.norm2(x + outputs[-1])
    return outputs

# ======== SpidR: learning from sound alone ========
# Half of the frames are hidden from the student. It must guess what the teacher, which hears all,
# makes of them: in each of the last K layers, the codeword nearest to the teacher's output. If
# gradients reached these answers, all would become the same. Instead, codewords average the outputs
# nearest to them, as in k-means, and the teacher slowly trails the student.
def spidr_step(model, optimizer, wav, hide, b=1.0, refit=0):
    """Gradients move the student, running means the codebooks; b is the decay of the teacher."""
    outputs = torch.stack(layers_of(model.student, hear(model, wav, hide))[-K:])[:, hide]
    with torch.no_grad():
        f = torch.stack(layers_of(model.teacher, hear(model, wav))[-K:])  # [K, B, T, D]
        targets = F.layer_norm(f.mT, f.shape[2:3]).mT[:, hide]  # (2) normed over time
        labels = torch.cdist(targets, model.S / model.N[..., None]).argmin(-1)  # (3) [K, H]
    for _ in range(refit):  # (11) new heads catch up with new codebooks, before all else moves
        sgd = torch.optim.SGD(model.heads.parameters(), lr=0.05 * K)
        descend(sgd, loss_of(model.heads, outputs.detach(), labels))
    descend(optimizer, loss_of(model.heads, outputs, labels))  # (4) moves the student
    with torch.no_grad():
        nearest = F.one_hot(labels, V).type_as(targets)  # [K, H, V]
        n, s = nearest.sum(1), nearest.mT @ targets  # each codeword's targets: how many, their sum
        used = n > 0
        model.N[used] = 0.9 * model.N[used] + 0.1 * n[used]  # (5)
        model.S[used] = 0.9 * model.S[used] + 0.1 * s[used]  # (5)
        if b < 1:  # with b = 1 the teacher stands still
            for old, new in zip(model.teacher.parameters(), model.student.parameters()):
                old.lerp_(new, 1 - b)  # (6)
            model.teacher[0].load_state_dict(model.student[0].state_dict())  # positions: copied

def loss_of(heads, outputs, labels):
    return sum(F.cross_entropy(head(x), y) for head, x, y in zip(heads, outputs, labels)) / K

def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# ======== ABX: does the model tell phones apart? ========
# A and X are one phone, B is another. The model errs if X is nearer to B than to A; chance is 50%.
@functools.cache
def distance(x, y):
    """Mean angle between two tokens (runs of frames of one phone), aligned by time warping."""
    angles, best = ((x @ y.T).clamp(-1, 1).acos() / math.pi).tolist(), {(-1, -1): (0, 0)}
    for i, j in itertools.product(range(len(x)), range(len(y))):
        ways = [best[k] for k in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if k in best]
        total, length = min(ways, key=lambda way: way[0])
        best[i, j] = total + angles[i][j], length + 1
    return best[i, j][0] / best[i, j][1]  # (13)

@torch.no_grad()
def abx(model, voices):
    """Two mean errors in %: with X in the same voice as A and B, and with X in another one."""
    tokens, errors = {}, ({}, {})
    for voice, (sound, phones) in enumerate(voices):
        x = layers_of(model.student, hear(model, F.layer_norm(sound, sound.shape)[None]))[1][0]
        for phone, run in itertools.groupby(range(len(phones)), phones.__getitem__):
            tokens.setdefault((phone, voice), []).append(F.normalize(x[[*run]], dim=1))
    for (a, voice), (b, voice_b), (x, voice_x) in itertools.product(tokens, repeat=3):
        if a == x != b and voice == voice_b and len(tokens[a, voice]) > (voice == voice_x):
            wrong = [(distance(X, A) > distance(X, B)) + (distance(X, A) == distance(X, B)) / 2
                     for A in tokens[a, voice] for X in tokens[x, voice_x] if X is not A
                     for B in tokens[b, voice]]
            errors[voice != voice_x].setdefault((a, b), []).append(fmean(wrong))
    return [100 * fmean(map(fmean, pairs.values())) for pairs in errors]  # (13)

# ======== FOBLO: a start from which a language is quickly learnt ========
# An episode treats a language as new: M steps on sound alone lead from the start phi to theta_M,
# then N steps on phone labels show how theta_M should have been different. FOBLO moves phi by the
# change that the N steps made, as if moving phi moved theta_M by just as much.
def foblo(model, sources, updates=6, workers=2, M=20, N=10, beta=1.0):
    optimizers = [adamw(model.parameters()) for _ in range(workers)]  # each keeps its moments
    phi = copy.deepcopy(model.state_dict())  # of all this, what the N steps do not train stays
    for _ in range(updates):
        delta = dict.fromkeys(phi, 0)
        for adam in optimizers:  # a worker draws a language; here they take turns
            language = random.randrange(len(sources))
            model.load_state_dict(phi)
            adapt(model, adam, sources[language], M)
            theta_M = copy.deepcopy(model.state_dict())
            for _ in range(N):
                wav, hide, phones = batch(sources[language])
                f = layers_of(model.student, hear(model, wav, hide))[1]  # of the second layer
                descend(adam, F.cross_entropy(model.classifiers[language](f).mT, phones))  # (7)
            for name, theta in model.state_dict().items():
                delta[name] += theta - theta_M[name]
        phi = {name: phi[name] + beta * delta[name] / workers for name in phi}  # (8)
    model.load_state_dict(phi)
    return model

def adapt(model, optimizer, voices, steps):
    model.S.copy_(F.instance_norm(torch.randn(K, D, V)).mT)  # (11) the old codebooks are forgotten
    model.N.fill_(1)  # (11)
    for head in model.heads:
        head.reset_parameters()  # (11)
    for step in range(steps):
        spidr_step(model, optimizer, *batch(voices)[:2], refit=20 if step == 0 else 0)

adamw = functools.partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), eps=1e-6)

def main(seed=0, steps=400, updates=6, adaptation=60):
    random.seed(seed)
    torch.manual_seed(seed)
    *sources, new = [[speak(words, voice, 3000) for voice in range(3)] for words in LANGUAGES]
    test = [speak(LANGUAGES[-1], voice, 300) for voice in range(3)]
    models, results = {"untrained": make_model()}, {}
    spidr = models["SpidR"] = copy.deepcopy(models["untrained"])
    optimizer = adamw(spidr.parameters())
    for step in range(1, steps + 1):
        wav, hide, _ = batch(random.choice(sources))
        spidr_step(spidr, optimizer, wav, hide, b=1 - 0.001 * math.exp(-step / 500))  # (6)
        if step % 100 == 0:
            print(f"step {step}: ABX error", *map("{:.1f}".format, abx(spidr, test)), flush=True)
    models["SpidR, FOBLO"] = foblo(copy.deepcopy(spidr), sources, updates)
    print("ABX error on the new language, %: within, across voices; both again once adapted to it")
    for name, model in models.items():
        errors = results[name] = abx(model, test)
        nn.ModuleList([model.conv, model.project]).requires_grad_(False)  # little audio: frozen
        adapt(model, adamw(model.parameters()), new, adaptation)
        errors += abx(model, test)
        print(f"{name:12}", *map("{:8.1f}".format, errors), flush=True)
    print(f"Across voices: SpidR {results['SpidR'][1]:.1f}; after FOBLO, with phone labels of "
          f"other languages, {errors[1]:.1f}; then adapted, from sound alone, {errors[3]:.1f}.")

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:2]))
