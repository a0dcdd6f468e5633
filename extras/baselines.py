"""What a model is compared with: MFCC, and torchaudio's wav2vec 2.0, HuBERT and WavLM."""

import torch
import torch.nn.functional as F

import data
from evaluate import FIELD, HOP, Encoder, hash_weights


def mfcc(wav):
    """13 coefficients with their first and second differences, [T, 39], of 25 ms windows that are
    centred as our frames are."""
    torchaudio, pad = data.import_torchaudio("mfcc"), (FIELD - HOP) // 2
    mel = dict(n_fft=FIELD, hop_length=HOP, n_mels=40, center=False)
    transform = torchaudio.transforms.MFCC(data.SAMPLE_RATE, 13, log_mels=True, melkwargs=mel)
    deltas = torchaudio.functional.compute_deltas
    c = transform(F.pad(wav, (pad, pad)))  # [13, T]
    return {1: torch.cat([c, deltas(c), deltas(deltas(c))]).T.contiguous()}


def encoder(name, device, pretrained=True):
    """pretrained=False: random weights, without a download."""
    if name == "mfcc":
        return Encoder(name, "", 1, 0, 0, mfcc)
    torchaudio = data.import_torchaudio(name)
    pipeline = getattr(torchaudio.pipelines, name.upper())
    make = pipeline.get_model if pretrained else getattr(torchaudio.models, name)
    net = make().eval().to(device)

    def encode(wav):
        outputs = net.extract_features(wav[None].to(device))[0]
        return {layer: x[0] for layer, x in enumerate(outputs, 1)}

    return Encoder(name, hash_weights(net), 12, 0, 0, encode)
