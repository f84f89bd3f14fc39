"""Train the embedded models: `python -m forget_concept.core.mini.train STAGE… --work FOLDER [--target FOLDER]`.

Every stage is seeded and resumes where it stopped. `all` runs those of `mini` in order; `second-probe` and
`second-pack` make the second classifier. The stages of `mini-xl` (`xl-…`) and of `mini-flow` (`flow-…`) start from the
distributed `mini` and need its stage `data` alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from .. import load, load_modules
from ..config import new_autoencoder
from ..files import weights_folder
from ..probe import Probe
from ..vocabulary import find
from . import autoencoder, dataset, flow, pack, probe, reflow, second_probe, text, tokenizer, unet, xl

STAGES = ("data", "tokenizer", "probe", "autoencoder", "text", "unet", "pack")
# of the second classifier
SECOND_STAGES = ("second-probe", "second-pack")
# after `text` and `unet` with --without
RETRAINED_STAGES = ("retrained-pack",)
XL_STAGES = ("xl-text", "xl-unet", "xl-distil", "xl-pack")
FLOW_STAGES = (
    *("flow-tokenizer", "flow-text", "flow-teacher", *flow.DISTIL_STAGES, "flow-pairs", "flow-reflow"),
    "flow-pack",
)
PICTURES = 20000
MIN_RECONSTRUCTION = 0.98  # probe accuracy on reconstructions, per category, required before the UNet is trained


def trained_probe(work: Path) -> Probe:
    """Load the probe from its latest checkpoint."""
    model = Probe()
    model.load_state_dict(torch.load(work / "probe.pt", weights_only=True)["modules"]["model"])
    return model.eval()


def finish_autoencoder(work: Path, pictures: np.ndarray) -> dict[str, float]:
    """Rescale the latents, save the result as `vae.pt`, and return the probe's accuracy on reconstructions."""
    model = new_autoencoder().eval()
    model.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True)["modules"]["model"])
    autoencoder.rescale(model, pictures[:512])
    torch.save(model.state_dict(), work / "vae.pt")
    images, targets = probe.held_out(600)
    with torch.no_grad():
        shown = torch.cat([model.decode(model.encode(part).latent_dist.mode()).sample for part in images.split(50)])
    return probe.accuracy(trained_probe(work), shown.clamp(-1, 1), targets)


def run_xl(stage: str, work: Path, target: Path | None, length: dict[str, int]) -> None:
    """Run one of the stages of `mini-xl`."""
    mini_unet, mini_text, tokens, autoencoder_module = load_modules()
    if stage == "xl-pack":
        target = target or weights_folder("mini-xl")
        print(f"packed {xl.pack(work, target, tokens) / 1e6:.2f} MB into {target}")
        return
    pictures = np.load(work / "pictures.npy", mmap_mode="r")
    if stage == "xl-text":
        xl.pretrain_text(work, tokens, len(pictures), **length)
    else:
        latents = unet.encode(work / "latents.pt", autoencoder_module, pictures)
        if stage == "xl-unet":
            xl.train(work, tokens, latents, mini_unet.state_dict(), **length)
        else:
            xl.distil(work, tokens, latents, (mini_unet, mini_text), **length)


def run_flow(stage: str, work: Path, target: Path | None, length: dict[str, int]) -> None:
    """Run one of the stages of `mini-flow`."""
    mini_unet, mini_text, clip_tokens, autoencoder_module = load_modules()
    if stage == "flow-tokenizer":
        flow.build_tokenizer(work / "flow-tokenizer")
        return
    if stage == "flow-pack":
        target = target or weights_folder("mini-flow")
        print(f"packed {flow.pack(work, target, clip_tokens, reflow.LAST) / 1e6:.2f} MB into {target}")
        return
    tokens = flow.load_tokenizer(work / "flow-tokenizer")
    pictures = np.load(work / "pictures.npy", mmap_mode="r")
    if stage == "flow-text":
        flow.pretrain_text(work, clip_tokens, tokens, len(pictures), **length)
        return
    if stage == "flow-pairs":
        reflow.draw_pairs(work, load(), len(pictures))
        return
    if stage == "flow-reflow":
        reflow.train(work, load(), clip_tokens, tokens, len(pictures), **length)
        return
    latents = unet.encode(work / "latents.pt", autoencoder_module, pictures)
    if stage == "flow-teacher":
        flow.train_teacher(work, clip_tokens, tokens, latents, **length)
    else:
        flow.distil(work, stage, clip_tokens, tokens, latents, (mini_unet, mini_text), **length)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m forget_concept.core.mini.train", description=__doc__)
    parser.add_argument(
        "stages", nargs="+", choices=[*STAGES, *SECOND_STAGES, *RETRAINED_STAGES, *XL_STAGES, *FLOW_STAGES, "all"]
    )
    parser.add_argument("--work", type=Path, default=Path("build/mini"))
    parser.add_argument("--target", type=Path, help="folder of the packed model (default: the distributed one's)")
    parser.add_argument("--steps", type=int, help="override the length of the stage")
    parser.add_argument(
        "--without",
        default="",
        help="concepts, separated by commas, whose pictures are left out: a model that never knew them (text, unet)",
    )
    parser.add_argument("--peak-lr", type=float, default=1e-3, help="of the UNet stage")
    options = parser.parse_args()
    stages = STAGES if "all" in options.stages else options.stages
    length = {} if options.steps is None else {"steps": options.steps}
    work: Path = options.work
    without = [name.strip() for name in options.without.split(",") if name.strip()]
    for name in without:
        find(name)  # raises for a concept that the world does not have
    for stage in stages:
        if stage == "data":
            for done in dataset.draw(work / "pictures.npy", PICTURES):
                print(f"rendered {done} of {PICTURES}", flush=True)
            continue
        if stage == "tokenizer":
            tokenizer.build(work / "tokenizer")
            continue
        if stage == "pack":
            target = options.target or weights_folder()
            print(f"packed {pack.pack(work, target) / 1e6:.2f} MB into {target}")
            continue
        if stage == "retrained-pack":
            target = options.target or Path("benchmarks/mini_retrained")
            print(f"packed {pack.pack_retrained(work, target) / 1e6:.2f} MB into {target}")
            continue
        if stage == "second-probe":
            second_probe.train(work, np.load(work / "pictures.npy", mmap_mode="r"), **length)
            print("held-out rendered images:", probe.accuracy(second_probe.trained(work), *probe.held_out(2000)))
            continue
        if stage == "second-pack":
            target = options.target or weights_folder()
            print(f"packed {second_probe.pack(work, target) / 1e6:.2f} MB into {target}")
            continue
        if stage in XL_STAGES:
            run_xl(stage, work, options.target, length)
            continue
        if stage in FLOW_STAGES:
            run_flow(stage, work, options.target, length)
            continue
        from transformers import CLIPTokenizer

        pictures = np.load(work / "pictures.npy", mmap_mode="r")
        # a model that is retrained for comparison has the distributed tokenizer and autoencoder
        own = work if (work / "tokenizer").is_dir() else weights_folder()
        words = CLIPTokenizer.from_pretrained(own / "tokenizer")
        if stage == "probe":
            probe.train(work, pictures, **length)
            print("held-out rendered images:", probe.accuracy(trained_probe(work), *probe.held_out(2000)))
        elif stage == "autoencoder":
            autoencoder.train(work, pictures, **length)
            found = finish_autoencoder(work, pictures)
            print("held-out reconstructions:", found)
            if min(found.values()) < MIN_RECONSTRUCTION:
                raise SystemExit(
                    f"probe accuracy below {MIN_RECONSTRUCTION:.0%}: train the autoencoder longer before the UNet"
                )
        elif stage == "text":
            text.train(work, words, len(pictures), **length, without=without)
        elif stage == "unet":
            if own == work:
                model = new_autoencoder().eval()
                model.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
            else:
                model = load_modules()[3]
            latents = unet.encode(work / "latents.pt", model, pictures)
            unet.train(work, words, latents, peak_lr=options.peak_lr, **length, without=without)


if __name__ == "__main__":
    main()
