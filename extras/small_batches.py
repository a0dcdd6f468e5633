"""What small batches need, and base does without: preset small's --mel-steps and --codebook-start
targets. docs/findings.md has what they bring."""

import torch

import data
import model as networks
import pretrain


def prepare(model, batches, options, ranks):
    """Before the first step of a new network."""
    if options.mel_steps:
        fit_front_end(model, batches, options, ranks)
    if options.codebook_start == "targets":
        start_codebooks(model, batches[0], options, ranks)


def fit_front_end(model, batches, options, ranks):
    """Downsampler and projection learn to tell log-mel spectra by a linear readout. With few and
    small steps the teacher would hear random features for too long: its codewords then tell next to
    nothing of the sound, the student learns to predict just these, and the teacher follows it. All
    ranks compute the same. Returns the error of the first and the last step; the mean's is 1."""
    mel = data.import_torchaudio("--mel-steps").transforms.MelSpectrogram(
        data.SAMPLE_RATE, n_fft=400, hop_length=320, n_mels=40, center=False).to(ranks.device)
    readout = torch.nn.Linear(model.config.dim, 40).to(ranks.device)
    parts = model.feature_extractor, model.feature_projection, readout
    parameters, errors = [p for part in parts for p in part.parameters()], []
    optimizer = torch.optim.AdamW(parameters, weight_decay=options.weight_decay)
    for step in range(options.mel_steps):
        wav = batches[step % batches.per_epoch]["wav"].to(ranks.device)
        target = networks.instance_norm((mel(wav) + 1e-3).log().mT)  # [B, T, 40]
        loss = (readout(model.frames(wav)[0]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        left = 1 - step / options.mel_steps  # warm-up in 20 steps, linear decay in the second half
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20, 2 * left)
        optimizer.step()
        errors.append(loss.item())
    ranks.say(f"front end: error of log-mel spectra {errors[0]:.3f}, then {errors[-1]:.3f}")
    return errors[0], errors[-1]


@torch.no_grad()
def start_codebooks(model, batch, options, ranks):
    """Codewords that are targets of the first rank's first batch. Of those that start as noise most
    are so far from all targets that they never get one."""
    with pretrain.autocast(options, ranks):
        _, targets = model.masked_frames(batch["wav"].to(ranks.device), batch["mask"])
    for codebook, t in zip(model.codebooks, targets):
        some = torch.randperm(len(t))[: len(codebook.counts)].to(t.device)
        codebook.codebook[: len(some)] = t[some].to(codebook.codebook.dtype)
    networks.send_from_first(model.codebooks, ranks.group)
