"""The models that the papers' authors released, which load by their names.

    python extras/released.py    lists them, and says which are here already
"""

import http.client
import os
import re
import sys
import urllib.error
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from model import InputError, lock, read_checkpoint, read_config, run

MODELS = "https://dl.fbaipublicfiles.com/shared/devai/assets/models"
ADAPTED = "https://dl.fbaipublicfiles.com/shared/devai/assets/spidr-adapt/checkpoints"
RELEASED = {  # name: (what it is, its address); all are of base's size
    "spidr_base": ("SpidR, LibriSpeech 960 h", f"{MODELS}/spidr_base.pt"),
    "dinosr_base": ("DinoSR, LibriSpeech 960 h, trained by SpidR's authors",
                    f"{MODELS}/dinosr_base_reproduced.pt"),
    "spidr_vp20": ("SpidR, 20 VoxPopuli languages but English, French, German",
                   "https://huggingface.co/coml/spidr-vp20/resolve/main/final.pt"),
    "mtpt_ssl": ("multi-task pretraining [SSL], 19 languages, 6,000 h",
                 f"{ADAPTED}/spidr_vp19lang/step_400000.pt"),
    "mtpt_ssl_sl": ("multi-task pretraining [SSL/SL]",
                    f"{ADAPTED}/spidr_sl_vp19lang/step_400000.pt"),
    "reptile_ssl": ("mtpt_ssl + MAdaPT-Reptile",
                    f"{ADAPTED}/spidr_reptile_vp19lang/step_200000.pt"),
    "reptile_ssl_sl": ("mtpt_ssl_sl + MAdaPT-Reptile",
                       f"{ADAPTED}/spidr_reptile_sl_vp19lang/step_200000.pt"),
    "foblo_ssl": ("mtpt_ssl + MAdaPT-FOBLO",
                  f"{ADAPTED}/spidr_foblo_vp19lang/step_200000.pt"),
    "foblo_ssl_sl": ("mtpt_ssl_sl + MAdaPT-FOBLO: start here to adapt to a language",
                     f"{ADAPTED}/spidr_foblo_sl_vp19lang/step_200000.pt"),
}


def find(what):
    """The path of a released model or of what a URL names, downloaded if it is not here."""
    url = RELEASED[what][1] if what in RELEASED else what
    return download(url) if "://" in url else Path(what)


def cache_of(url):
    """Where a download is kept: in torch's cache, in a folder for each folder of the server."""
    folder, _, name = url.rpartition("/")
    return Path(torch.hub.get_dir(), "checkpoints", re.sub(r"[^\w.-]+", "_", folder)[-200:], name)


def download(url):
    """The checkpoint, with its config.json if there is one. Nothing that does not load is kept."""
    path = cache_of(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / "lock", "w") as file:
        lock(file)  # one of several ranks downloads, the others wait for it
        if path.exists():
            return path
        config, part = path.with_name("config.json"), path.with_name("part.pt")
        try:
            try:
                torch.hub.download_url_to_file(
                    url.rpartition("/")[0] + "/config.json", config, progress=False)
                read_config(config)
            except urllib.error.HTTPError as error:
                if error.code not in (403, 404):  # these say that there is none: base has none
                    raise
            print(f"downloading {url} to {path}", file=sys.stderr)
            torch.hub.download_url_to_file(url, part)
            read_checkpoint(part)
        except (OSError, ValueError, RuntimeError, http.client.HTTPException) as error:
            part.unlink(missing_ok=True)
            config.unlink(missing_ok=True)
            raise InputError(f"{url}: {error or type(error).__name__}. Without a network put the "
                             f"file there by hand: {path}") from None
        os.replace(part, path)
    return path


def main():
    for name, (what, url) in RELEASED.items():
        state = f"in {cache_of(url).parent}" if cache_of(url).exists() else f"not here yet: {url}"
        print(f"{name:15} {what}\n{'':15} {state}")
    print("Licence: CC BY-NC 4.0; of spidr_vp20 none is stated that we saw. The names stand for "
          "the models wherever one is asked for.")


if __name__ == "__main__":
    run(main)
