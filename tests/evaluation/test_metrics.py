"""Metrics of pictures: the same numbers as other implementations give, and every path without a download."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import sys
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.metrics.pairwise import cosine_similarity, polynomial_kernel
from tiny import clip_files
from torch import nn

from forget_concept.core.errors import Cancelled, ModelError, RequestError
from forget_concept.core.evaluation.metrics import (
    LPIPS,
    InceptionFeatures,
    Mean,
    OpenClip,
    ProbeDistance,
    ProbeFeatures,
    ProbeImageText,
    TransformersClip,
    clip_accuracy,
    clip_score,
    clip_similarities,
    features_of,
    fid,
    kid,
    layer_distance,
    perceptual_distance,
    zero_shot,
)
from forget_concept.core.mini import load_probe, world
from forget_concept.core.mini.vocabulary import NONE, OBJECTS
from forget_concept.core.models.images import from_bytes, to_bytes


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixed(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Features whose entries depend on one another."""
    return rand(n, d, seed=seed) @ rand(d, d, seed=100 + seed % 2) / d**0.5 + shift


def drawn(count: int, seed: int, **fixed: str) -> tuple[torch.Tensor, list[world.Scene]]:
    """Pictures of the world, ``(count, 3, 128, 128)`` uint8, and their scenes."""
    draws = np.random.default_rng(seed)
    scenes = [world.sample_scene(draws) for _ in range(count)]
    scenes = [replace(scene, **fixed) for scene in scenes]
    return torch.stack([torch.from_numpy(world.render(s).copy()).permute(2, 0, 1) for s in scenes]), scenes


@pytest.fixture(scope="module")
def pictures():
    return drawn(40, 1)[0], drawn(36, 2, style="neon")[0]


@pytest.fixture()
def probe(device):
    return load_probe().to(device)


class OnBytes(nn.Module):
    """The probe's features as torchmetrics asks for them."""

    def __init__(self, probe: nn.Module) -> None:
        super().__init__()
        self.probe = copy.deepcopy(probe)  # a metric in fp64 casts it

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.probe.features(from_bytes(images).to(next(self.probe.parameters()).dtype))


# -- FID ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "d"), [(60, 80, 12), (200, 13, 12), (500, 400, 64)])
def test_fid_is_scipys(n, m, d):
    a, b = mixed(n, d, 0), mixed(m, d, 1, 0.3)
    first, second = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = linalg.sqrtm(first @ second).real
    wanted = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(first + second - 2 * root)
    found = fid(a, b)
    assert found.value == pytest.approx(wanted, rel=1e-4)
    assert (found.n, found.n_reference, found.width) == (n, m, d)
    assert fid(b, a).value == pytest.approx(found.value, rel=1e-9)


def test_fid_and_kid_of_the_probes_features_are_torchmetrics(pictures, probe, device):
    """KID but for the partners, which torchmetrics counts."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    found = [features_of(ProbeFeatures(probe), images, batch=16) for images in pictures]
    assert [one.shape for one in found] == [(40, 128), (36, 128)]
    module = OnBytes(probe).to(device).eval()
    metric = FrechetInceptionDistance(feature=module, input_img_size=(3, 128, 128)).to(device).set_dtype(torch.float64)
    other = KernelInceptionDistance(feature=module, subsets=1, subset_size=36).to(device)
    for each in (metric, other):
        each.update(pictures[1].to(device), real=True)
        each.update(pictures[0][:36].to(device), real=False)
    first = found[0][:36]
    assert fid(first, found[1]).value == pytest.approx(float(metric.compute()), rel=1e-4)
    across = torch.from_numpy(polynomial_kernel(first, found[1], degree=3, gamma=1 / 128, coef0=1)).double()
    partners = across.mean() - (across.sum() - across.trace()) / (36 * 35)
    wanted = float(other.compute()[0]) + 2 * float(partners)
    assert kid(first, found[1]).value == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert "fewer than the 129" in fid(first, found[1]).note


def test_fid_of_singular_covariances_is_exact():
    # on a line in 50 dimensions, another scale and place: (σ₁ − σ₂)² + distance²
    line = torch.zeros(20, 50, dtype=torch.float64)
    line[:, 7] = rand(20)
    other = 3 * line
    other[:, 30] += 2.0
    spread = float(line[:, 7].std())
    wanted = 4 * spread**2 + 4 * float(line[:, 7].mean()) ** 2 + 4
    assert fid(line, other).value == pytest.approx(wanted, rel=1e-9)
    assert fid(line, line).value == pytest.approx(0, abs=1e-9)
    # in half as many directions as scipy's root needs, and still no NaN
    assert np.isfinite(fid(mixed(5, 50, 0), mixed(4, 50, 1)).value)


def test_fid_says_where_there_are_too_few_pictures():
    assert fid(rand(13, 12), rand(14, 12)).note == ""
    assert "12 images are fewer than the 13" in fid(rand(12, 12), rand(14, 12)).note
    assert "12 images" in fid(rand(14, 12), rand(12, 12)).as_dict()["note"]


# -- KID ----------------------------------------------------------------------------------------------------------


def test_kid_is_scikit_learns_kernel_without_the_diagonals():
    a, b = mixed(30, 16, 0), mixed(30, 16, 1, 0.2)
    k = [polynomial_kernel(x, y, degree=3, gamma=1 / 16, coef0=1) for x, y in ((a, a), (b, b), (a, b))]
    own, other, both = ((m.sum() - np.trace(m)) / (30 * 29) for m in k)
    found = kid(a, b)
    assert found.value == pytest.approx(own + other - 2 * both, rel=1e-9)
    assert (found.n, found.n_reference, found.width, found.subsets) == (30, 30, 16, 10)
    assert kid(a, b).error == found.error != kid(a, b, seed=1).error
    # four pictures make two parts, three make none
    assert kid(a[:4], b[:4]).subsets == 2
    assert (kid(a[:3], b[:3]).error, kid(a[:3], b[:3]).subsets) == (None, 0)


def test_kid_is_unbiased_and_its_error_is_not_too_small():
    values, errors = [], []
    for seed in range(300):
        found = kid(rand(40, 6, seed=2 * seed), rand(40, 6, seed=2 * seed + 1))
        values.append(found.value)
        errors.append(found.error)
    values = np.array(values)
    assert abs(values.mean()) < 3 * values.std() / 300**0.5
    # of equal distributions, where the parts' estimates are the least alike: never below the truth
    assert values.std() < np.mean(errors) < 5 * values.std()
    apart = [kid(rand(40, 6, seed=2 * s), rand(40, 6, seed=2 * s + 1) + 1) for s in range(300)]
    spread = np.std([found.value for found in apart])
    assert 0.9 * spread < np.mean([found.error for found in apart]) < 1.5 * spread


@pytest.mark.parametrize("distance", [fid, kid])
def test_features_that_cannot_be_compared_are_refused(distance):
    for first, second, words in (
        (rand(5, 3), rand(5, 4), "same extractor"),
        (rand(1, 3), rand(5, 3), "at least 2"),
        (rand(5), rand(5, 3), r"\(5,\)"),
        (rand(5, 3) / 0, rand(5, 3), "not finite"),
    ):
        with pytest.raises(RequestError, match=words):
            distance(first, second)
    with pytest.raises(RequestError, match="two subsets"):
        kid(rand(5, 3), rand(5, 3), subsets=1)


# -- pictures in --------------------------------------------------------------------------------------------------


def test_features_do_not_depend_on_the_batch_or_on_how_pixels_are_held(pictures, probe):
    extractor, images, heard = ProbeFeatures(probe), pictures[0][:7], []
    found = features_of(extractor, images, 3, heard.append)
    assert [(e.step, e.total) for e in heard] == [(3, 7), (6, 7), (7, 7)]
    torch.testing.assert_close(features_of(extractor, images), found, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features_of(extractor, from_bytes(images), 3), found)
    assert not found.requires_grad and found.dtype == torch.float32


def test_what_is_no_picture_is_said(probe):
    good = torch.zeros(2, 3, 128, 128)
    words, distance = ProbeImageText(probe), ProbeDistance(probe)
    calls = [
        lambda images: features_of(ProbeFeatures(probe), images),
        lambda images: clip_score(words, images, ["a star"] * len(images)),
        lambda images: zero_shot(words, images, ["star", "moon"]),
        lambda images: perceptual_distance(distance, images, images),
    ]
    for images, said in (
        (good[:0], "no images"),
        (good[0], "3 × 128 × 128"),
        (good[:, :1], "2 × 1 × 128 × 128"),
        (good + 2, "range from 2 to 2"),
        (good / 0, "finite"),
        (good.int(), "8-bit"),
    ):
        for call in calls:
            with pytest.raises(RequestError, match=said):
                call(images)
    with pytest.raises(RequestError, match="batch"):
        features_of(ProbeFeatures(probe), good, batch=0)

    def cancel(event):
        raise Cancelled

    for call in (features_of, lambda *args: clip_score(words, good, ["a star"] * 2, *args[2:])):
        with pytest.raises(Cancelled):
            call(ProbeFeatures(probe), good, 1, cancel)


def test_means_have_their_standard_error():
    found = Mean.of(torch.tensor([1.0, 2.0, 4.0]))
    assert (found.value, found.n) == (pytest.approx(7 / 3), 3)
    assert found.error == pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert Mean.of(torch.tensor([1.0])).as_dict() == {"value": 1.0, "error": None, "n": 1}
    for values, words in ((torch.tensor([]), "at least one"), (torch.tensor([1, float("nan")]), "not finite")):
        with pytest.raises(RequestError, match=words):
            Mean.of(values)


# -- words and pictures -------------------------------------------------------------------------------------------


def imported(name: str):
    """A library that is not everywhere: what needs it is skipped where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported here: {error}")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small CLIP of random weights in a folder, as transformers writes it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(str(clip_files(folder / "words")), model_max_length=20)
    end = len(tokenizer) - 1
    ids = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, **ids, "vocab_size": end + 1, "max_position_embeddings": 20},
        vision_config={**small, "image_size": 48, "patch_size": 16},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    return TransformersClip(str(clip_folder))


@pytest.mark.parametrize("cut", [(128, 128), (90, 128), (128, 60)])
def test_clip_vectors_are_transformers_own(clip, clip_folder, pictures, cut):
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    height, width = cut
    model, processor = (kind.from_pretrained(clip_folder) for kind in (CLIPModel, CLIPProcessor))
    images = pictures[0][:4, :, :height, :width]
    shown = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in images]
    said = ["a star", "a moon", "star " * 40]
    given = processor(text=said, images=shown, padding="max_length", truncation=True, return_tensors="pt")
    # Pillow cuts and rounds between its two directions: at an edge here and there a few of the 255 steps
    steps = (clip._prepared(from_bytes(images)) - given["pixel_values"]).abs()
    steps *= 255 * torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    assert steps.mean() < 0.1
    assert (steps > 1.01).float().mean() < 0.01
    assert steps.max() < 10
    with torch.no_grad():
        wanted = model.eval()(**given)
    found = [clip.image_features(from_bytes(images)), clip.text_features(said)]
    for one, other in zip(found, (wanted.image_embeds, wanted.text_embeds), strict=True):
        torch.testing.assert_close(nn.functional.normalize(one, dim=1), other, atol=5e-3, rtol=0)
    torch.testing.assert_close(nn.functional.normalize(found[1], dim=1), wanted.text_embeds)
    assert str(clip_folder.parent) not in clip.name


def test_a_clip_that_cannot_be_had_is_said(tmp_path, clip_folder):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ModelError, match="can neither be read"):
        TransformersClip(str(tmp_path / "nowhere"))
    damaged = tmp_path / "damaged"
    shutil.copytree(clip_folder, damaged)
    state = load_file(damaged / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of its weights"):
        TransformersClip(str(damaged))


@pytest.fixture(scope="module")
def open_folder(tmp_path_factory):
    """A small CLIP of random weights in a folder, as open_clip reads it."""
    open_clip = imported("open_clip")
    folder = tmp_path_factory.mktemp("open")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def test_open_clips_vectors_are_its_own(open_folder, pictures):
    from PIL import Image

    open_clip, name = imported("open_clip"), f"local-dir:{open_folder}"
    model, _, prepare = open_clip.create_model_and_transforms(name)
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures[0][:3]]
    with torch.no_grad():
        wanted = model.eval().encode_image(torch.stack([prepare(image) for image in images]))
        said = model.encode_text(open_clip.get_tokenizer(name)(["a star", "a moon"]))
    clip = OpenClip(name)
    torch.testing.assert_close(clip.image_features(from_bytes(pictures[0][:3])), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(clip.text_features(["a star", "a moon"]), said, atol=1e-4, rtol=1e-4)
    assert str(open_folder.parent) not in clip.name
    assert clip_score(clip, pictures[0][:2], ["a star", "a moon"]).n == 2


def test_an_open_clip_that_cannot_be_had_is_said(tmp_path, open_folder):
    with pytest.raises(ModelError, match="ViT-Z-1"):
        OpenClip("ViT-Z-1", "openai")
    with pytest.raises(ModelError, match="nobody"):
        OpenClip("ViT-B-32", "nobody")
    with pytest.raises(ModelError, match="local-dir"):
        OpenClip(f"local-dir:{tmp_path / 'nowhere'}")
    # a folder without weights must not become a random CLIP
    (tmp_path / "open_clip_config.json").write_text((open_folder / "open_clip_config.json").read_text())
    with pytest.raises(ModelError, match="can neither be read"):
        OpenClip(f"local-dir:{tmp_path}")


def test_clip_score_and_accuracy_are_scikit_learns_cosines(clip, pictures):
    images, labels = pictures[0][:11], ["star", "moon", "neon fish"]
    prompts = [labels[i % 3] for i in range(11)]
    seen, said = clip.image_features(from_bytes(images)), clip.text_features(prompts)
    cosines = np.diag(cosine_similarity(seen.double(), said.double()))
    np.testing.assert_allclose(clip_similarities(clip, images, prompts, batch=4), cosines, atol=1e-5)
    score = clip_score(clip, images, prompts)
    assert score.value == pytest.approx(100 * np.maximum(cosines, 0).mean(), abs=1e-4)
    assert score.error == pytest.approx(100 * np.maximum(cosines, 0).std(ddof=1) / 11**0.5, abs=1e-4)

    templates = ("a photo of {}", "{}, drawn")
    classes = []
    for label in labels:
        vectors = clip.text_features([t.format(label) for t in templates]).double()
        classes.append((vectors / vectors.norm(dim=1, keepdim=True)).mean(0))
    best = cosine_similarity(seen.double(), torch.stack(classes)).argmax(1)
    found = zero_shot(clip, images, labels, templates, batch=4)
    assert found == [labels[i] for i in best]
    accuracy = clip_accuracy(clip, images, prompts, labels, templates)
    assert accuracy.value == sum(f == p for f, p in zip(found, prompts, strict=True)) / 11
    assert accuracy.low <= accuracy.value <= accuracy.high


def test_the_probe_in_clips_place_knows_drawn_pictures(probe):
    images, scenes = drawn(48, 5, person=NONE, attributes=())
    names = [word.name for word in OBJECTS]
    keep = [i for i, scene in enumerate(scenes) if scene.shape in names]
    images, scenes = images[keep], [scenes[i] for i in keep]
    wanted = [scene.shape for scene in scenes]
    encoder = ProbeImageText(probe)
    assert clip_accuracy(encoder, images, wanted, names).value >= 0.9
    prompts = [f"a {s.colour} {s.shape}" + (f" in {s.style} style" if s.style != NONE else "") for s in scenes]
    right, wrong = (clip_score(encoder, images, said).value for said in (prompts, prompts[1:] + prompts[:1]))
    assert right > wrong + 20
    # one picture of nothing at all is like no prompt
    assert clip_score(encoder, torch.ones(1, 3, 128, 128), ["a star"]).value < 10


def test_the_probes_words_are_found_under_all_their_names():
    encoder = ProbeImageText(load_probe())
    name, synonym, described = encoder.text_features(["a star", "one PENTAGRAM", "a five-pointed shape, seen"])
    assert torch.equal(name, synonym) and torch.equal(name, described) and name.sum() == 1
    # a description's own colours are not the picture's
    who = "a boy with spiky orange hair in a red suit"
    assert torch.equal(*encoder.text_features([who, "Bruno Finch"]))
    both = encoder.text_features(["an orange star in stained glass style"])
    assert both.sum() == 3
    with pytest.raises(RequestError, match="'starlight' names nothing"):
        encoder.text_features(["starlight"])


def test_labels_and_prompts_that_do_not_fit_are_said(probe):
    encoder, images = ProbeImageText(probe), torch.zeros(2, 3, 128, 128)
    with pytest.raises(RequestError, match="2 images and 1 prompts"):
        clip_score(encoder, images, ["a star"])
    with pytest.raises(RequestError, match="2 images and 1 expected labels"):
        clip_accuracy(encoder, images, ["star"], ["star", "moon"])
    with pytest.raises(RequestError, match="'fish' is not one of the labels"):
        clip_accuracy(encoder, images, ["star", "fish"], ["star", "moon"])
    for labels in (["star"], ["star", "star"]):
        with pytest.raises(RequestError, match="at least two"):
            zero_shot(encoder, images, labels)
    for said in ((), ("a star",), ("{} {}",)):
        with pytest.raises(RequestError, match="exactly one"):
            zero_shot(encoder, images, ["star", "moon"], said)


# -- pairs --------------------------------------------------------------------------------------------------------


def test_lpips_is_the_papers_formula_on_its_networks_layers(tmp_path, monkeypatch, pictures, device):
    models = imported("torchvision.models")
    # where torchvision keeps what it has downloaded
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = models.squeezenet1_1().state_dict()
    torch.save(state, tmp_path / "hub" / "checkpoints" / models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2])
    first, second = (images[:5, :, ::2, ::2] for images in pictures)
    metric = LPIPS("squeeze", device)
    found = metric.distances(from_bytes(first), from_bytes(second))
    net = metric._metric.net
    with torch.no_grad():
        layers = [net.net(net.scaling_layer(from_bytes(images).to(device))) for images in (first, second)]
        weights = [lin.model[-1].weight.flatten() for lin in net.lins]
        wanted = layer_distance(*layers, weights).cpu()
    assert float(found.min()) > 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    mean = perceptual_distance(metric, first, second, batch=2)
    assert (mean.value, mean.n) == (pytest.approx(float(wanted.mean()), rel=1e-4), 5)
    assert perceptual_distance(metric, first[:1], first[:1]).value == 0
    with pytest.raises(RequestError, match="'resnet'"):
        LPIPS("resnet")


def test_lpips_without_its_network_is_said(tmp_path, monkeypatch):
    imported("torchvision.models")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def nowhere(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.urlopen", nowhere)
    with pytest.raises(ModelError, match=r"'alex'.*no route"):
        LPIPS("alex")


def test_the_probes_distance_orders_pictures_as_an_eye_would(probe):
    _, scenes = drawn(12, 7, style=NONE)
    shown = [torch.from_numpy(world.render(s).copy()).permute(2, 0, 1) for s in scenes]
    styled = [torch.from_numpy(world.render(replace(s, style="neon")).copy()).permute(2, 0, 1) for s in scenes]
    first, other = torch.stack(shown), torch.stack(styled)
    nearby = to_bytes(from_bytes(first) + 0.02 * rand(*first.shape, dtype=torch.float32))
    distance = ProbeDistance(probe)
    same, near, far = (perceptual_distance(distance, first, images) for images in (first, nearby, other))
    assert same.value == 0
    assert 0 < near.value < 0.3 * far.value
    assert perceptual_distance(distance, other, first).value == pytest.approx(far.value, rel=1e-5)
    with pytest.raises(RequestError, match="pair by pair"):
        perceptual_distance(distance, first, other[:5])


def test_the_probes_layers_are_those_its_features_come_from(probe, device):
    images = from_bytes(drawn(2, 3)[0]).to(device)
    layers = probe.layers(images)
    assert [layer.shape[1:] for layer in layers] == [
        (24, 64, 64),
        (48, 32, 32),
        (72, 16, 16),
        (96, 8, 8),
        (96, 8, 8),
    ]
    rest = next(i for i, part in enumerate(probe.trunk) if isinstance(part, nn.AvgPool2d))
    torch.testing.assert_close(probe.trunk[rest:](layers[-1]), probe.features(images))


# -- Inception ----------------------------------------------------------------------------------------------------


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(6)
        self.line = nn.Linear(108, 2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(self.pool(x).flatten(1))


class _Network(nn.Module):
    """In the form of the file that clean-fid downloads, with other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_inception_features_are_of_8_bit_pictures_resized_with_antialiasing(tmp_path, pictures, device):
    from PIL import Image

    imported("cleanfid.inception_torchscript")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = _Network().eval()
    torch.jit.script(network).save(str(tmp_path / "inception-2015-12-05.pt"))
    images = pictures[0][:3]
    found = features_of(InceptionFeatures(device, tmp_path), images, batch=2)
    resized = []
    for picture in images.numpy().astype(np.float32):
        channels = [Image.fromarray(c).resize((299, 299), Image.Resampling.BICUBIC) for c in picture]
        resized.append(np.stack([np.asarray(c).clip(0, 255) for c in channels]))
    with torch.no_grad():
        wanted = network.layers((torch.from_numpy(np.stack(resized)) - 128) / 128)
    assert found.shape == (3, 2048)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_an_inception_that_cannot_be_had_is_said(tmp_path, monkeypatch):
    imported("cleanfid.inception_torchscript")
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"not a network")
    with pytest.raises(ModelError, match="put the file there"):
        InceptionFeatures(folder=tmp_path)

    def nowhere(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", nowhere)
    with pytest.raises(ModelError, match="no route"):
        InceptionFeatures(folder=tmp_path / "other")


# -- the extra ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "make", "extra"),
    [
        ("cleanfid", InceptionFeatures, "evaluation"),
        ("open_clip", OpenClip, "evaluation"),
        ("torchvision", LPIPS, "evaluation"),
        ("transformers", TransformersClip, "cli"),
    ],
)
def test_a_missing_library_names_the_pip_line(monkeypatch, package, make, extra):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf'{package}.*pip install "forget-concept\[{extra}\]"'):
        make()


def test_a_library_built_for_another_torch_is_said(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(ModelError, match=r"'torchvision' \(operator torchvision::nms"):
        LPIPS()


def test_a_kid_of_pairs_is_unbiased_where_that_of_strangers_is_not():
    """Pictures that hardly moved: near 0, not far below; the same distribution drawn anew says what is right."""
    from torchmetrics.image.kid import KernelInceptionDistance

    def strangers(x, y):
        metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=len(x))
        metric.update(x, real=True)
        metric.update(y, real=False)
        return float(metric.compute()[0])

    draws = torch.Generator().manual_seed(0)
    before = torch.randn(400, 6, generator=draws)
    assert kid(before, before).value == pytest.approx(0, abs=1e-9)
    few = [before[i : i + 20] for i in range(0, 400, 20)]
    noise = [0.1 * torch.randn(20, 6, generator=draws) for _ in few]
    paired = torch.tensor([kid(x + e, x).value for x, e in zip(few, noise, strict=True)])
    apart = torch.tensor([strangers(x + e, x) for x, e in zip(few, noise, strict=True)])
    error = float(paired.std()) / len(few) ** 0.5
    true = kid(before + 0.1 * torch.randn(400, 6, generator=draws), torch.randn(400, 6, generator=draws)).value
    assert abs(float(paired.mean()) - true) < 4 * error + 0.1
    assert float(apart.mean()) < -0.5
    with pytest.raises(RequestError, match="compares image pairs"):
        kid(before, before[:5])
