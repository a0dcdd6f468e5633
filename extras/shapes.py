"""The network, part by part: the shape of a second of audio after it, and its parameters.

    python extras/shapes.py [tiny|small|base]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from model import PRESETS, Config, SpidR, require, run


@torch.no_grad()
def main():
    preset = (*sys.argv[1:], "base")[0]
    require(preset in PRESETS, f"{preset}: {', '.join(PRESETS)}")
    model = SpidR(Config(**PRESETS[preset])).eval()
    x = torch.zeros(1, 1, 16000)
    for i, layer in enumerate(model.feature_extractor.conv_layers, 1):
        x = layer(x)
        line(f"convolution {i}", layer, x)
    x = model.feature_projection(x.mT)
    line("projection", model.feature_projection, x)
    line("positions", model.student.pos_conv_embed, model.student.pos_conv_embed(x))
    for i, (layer, x) in enumerate(zip(model.student.layers, model.student(x)[1]), 1):
        k = i - 1 - model.config.layers + model.config.codebooks
        line(f"layer {i}" + f", head and codebook {k}" * (k >= 0), layer, x)
    line("heads", model.heads)
    line("teacher", model.teacher)


def line(name, part, x=None):
    parameters = sum(p.numel() for p in part.parameters()) / 1e6
    print(f"{name:30} {'' if x is None else str(tuple(x.shape)):18} {parameters:8.3f} M")


if __name__ == "__main__":
    run(main)
