"""The user's pictures come out right side up, in the right place and colours; what is no such picture is named."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image
from tiny import tiny_model

from forget_concept.core.errors import ModelError, RequestError
from forget_concept.core.models.images import check_images, fit_images, load_images, picture_size

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
SIZE = (64, 64)


def quarters(width=64, height=64, mode="RGB"):
    """Red, green over blue, white: which side is up can be seen."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image.convert(mode)


def colour(pictures, row, column, n=0):
    """The 8-bit colour at a place given in parts of the picture."""
    height, width = pictures.shape[2:]
    picked = pictures[n, :, int(row * height), int(column * width)]
    return tuple(((picked + 1) * 127.5).round().int().tolist())


def corners(pictures, n=0):
    return [colour(pictures, r, c, n) for r in (0.2, 0.8) for c in (0.2, 0.8)]


def test_a_picture_of_the_models_size_comes_through_unchanged(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (48, 64, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    found = load_images([tmp_path / "a.png"], (48, 64))
    assert found.dtype == torch.float32 and found.shape == (1, 3, 48, 64)
    assert torch.equal(((found[0] + 1) * 127.5).round().byte(), pixels.permute(2, 0, 1))
    assert float(found.min()) >= -1 and float(found.max()) <= 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "JPG"])
@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_every_kind_and_mode_is_read(tmp_path, suffix, mode):
    if mode == "P" and suffix in ("jpg", "jpeg", "JPG"):
        mode = "RGB"
    quarters(mode=mode).save(tmp_path / f"a.{suffix}", **({} if suffix in ("png", "bmp") else {"quality": 95}))
    found = corners(load_images([tmp_path], SIZE))
    wanted = [(76,) * 3, (150,) * 3, (29,) * 3, WHITE] if mode == "L" else [RED, GREEN, BLUE, WHITE]
    assert all(abs(a - b) <= 12 for a, b in zip(sum(found, ()), sum(wanted, ()), strict=True))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_put_over_white(tmp_path, mode):
    image = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 64, 32))
    image.paste((0, 0, 0, 128), (0, 32, 32, 64))
    if mode == "P":
        image = Image.new("P", SIZE, 1)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.paste(0, (0, 0, 64, 32))
        image.save(tmp_path / "a.png", transparency=1)
    else:
        image.convert(mode).save(tmp_path / "a.png")
    found = load_images([tmp_path / "a.png"], SIZE)
    assert colour(found, 0.2, 0.5) == (0, 0, 0) and colour(found, 0.8, 0.8) == WHITE
    if mode != "P":
        assert colour(found, 0.8, 0.2) == (127, 127, 127)


def test_it_is_cut_about_the_centre_and_never_stretched(tmp_path):
    wide = Image.new("RGB", (256, 64), WHITE)
    wide.paste(RED, (96, 0, 160, 64))  # the middle quarter is all that is to be seen
    wide.save(tmp_path / "wide.png")
    tall = Image.new("RGB", (100, 400), WHITE)
    tall.paste(BLUE, (0, 150, 100, 250))
    tall.save(tmp_path / "tall.png")
    found = load_images([tmp_path / "wide.png", tmp_path / "tall.png"], SIZE)
    assert all(colour(found, r, c, 0) == RED for r in (0.05, 0.95) for c in (0.05, 0.95))
    assert all(colour(found, r, c, 1) == BLUE for r in (0.05, 0.95) for c in (0.05, 0.95))


def test_it_is_made_smaller_without_aliasing(tmp_path):
    """Lines one pixel wide, eight times too fine: their mean is grey; picked pixels would be black or white."""
    lines = Image.new("L", (512, 512))
    lines.putdata([255 * (x % 2) for _ in range(512) for x in range(512)])
    lines.save(tmp_path / "lines.png")
    found = load_images([tmp_path / "lines.png"], SIZE)
    assert float(found.abs().max()) < 0.05


FLIPPED, UPSIDE_DOWN = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM
LEFT, HALF, RIGHT = Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270
ACROSS, ACROSS_BACK = Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE


# EXIF 2.3, tag 274: how a camera stores what is upright, turned to the left or the right, or as in a mirror
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [(1, None), (2, FLIPPED), (3, HALF), (4, UPSIDE_DOWN), (5, ACROSS), (6, LEFT), (7, ACROSS_BACK), (8, RIGHT)],
)
def test_the_camera_was_held_otherwise(tmp_path, orientation, stored):
    image = quarters() if stored is None else quarters().transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    assert corners(load_images([tmp_path / "a.png"], SIZE)) == [RED, GREEN, BLUE, WHITE]


def test_a_phones_jpeg_with_a_preview_in_it_is_one_picture(tmp_path):
    quarters().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", SIZE)], quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert colour(load_images([tmp_path], SIZE), 0.2, 0.2)[0] > 240


def test_a_folder_is_read_in_order_and_each_file_once(tmp_path):
    for name, paint in (("b.png", GREEN), ("a.PNG", RED), ("c.bmp", BLUE)):
        Image.new("RGB", SIZE, paint).save(tmp_path / name)
    Image.new("RGB", SIZE).save(tmp_path / ".hidden.png")
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "sub.png").mkdir()
    found = load_images([tmp_path / "c.bmp", tmp_path, str(tmp_path / "b.png")], SIZE)
    assert [colour(found, 0.5, 0.5, n) for n in range(len(found))] == [BLUE, RED, GREEN]


def animation(path):
    Image.new("RGB", SIZE).save(path, save_all=True, append_images=[quarters()], duration=100)


def damaged(path):
    quarters(512, 512).save(path)
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("cmyk.jpg", lambda p: quarters(mode="CMYK").save(p), "mode CMYK"),
        ("deep.png", lambda p: quarters(mode="L").convert("I;16").save(p), "mode I;16"),
        ("bits.png", lambda p: quarters(mode="1").save(p), "mode 1"),
        ("moving.webp", animation, "animated"),
        ("moving.png", animation, "animated"),
        ("small.png", lambda p: quarters(31, 200).save(p), "too small: 31 × 200"),
        ("cut.png", damaged, "cannot be read"),
        ("cut.jpg", damaged, "cannot be read"),
        ("words.png", lambda p: p.write_text("these are words"), "another kind"),
        ("nothing.png", lambda p: p.write_bytes(b""), "another kind"),
        ("table.csv", lambda p: p.write_text("a,b"), "another kind"),
        ("moving.gif", animation, "another kind"),
        ("empty", lambda p: p.mkdir(), "holds no pictures"),
        ("missing.png", lambda p: None, "There is no file"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, name, make, words):
    make(tmp_path / name)
    with pytest.raises(RequestError, match=words) as raised:
        load_images([tmp_path / name], SIZE)
    assert name in str(raised.value)


def test_no_pictures_at_all_and_no_pillow(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="no pictures"):
        load_images([], SIZE)
    quarters().save(tmp_path / "a.png")
    for name in [name for name in sys.modules if name == "PIL" or name.startswith("PIL.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModelError, match="pip install pillow"):
        load_images([tmp_path / "a.png"], SIZE)


def test_half_of_the_models_size_is_enough(tmp_path):
    quarters(32, 32).save(tmp_path / "a.png")
    assert corners(load_images([tmp_path], SIZE)) == [RED, GREEN, BLUE, WHITE]


def test_a_models_picture_size():
    assert picture_size(tiny_model()) == (64, 64)


def good(n=4):
    return torch.zeros(n, 3, 64, 32)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(3, 64, 32), "these are 3 × 64 × 32"),
        (torch.tensor(0.0), "a single number"),
        (torch.zeros(4, 4, 64, 32), "red, green and blue"),
        (torch.zeros(4, 64, 32, 3), "red, green and blue"),
        (torch.zeros(4, 3, 32, 64), "must be 32 × 64 pixels for this model, and these are 64 × 32"),
        (good(3), "too few pictures of star: 3, and at least 4"),
        (torch.zeros(4, 3, 64, 32, dtype=torch.uint8), "whole numbers"),
        (good() + float("nan"), "not finite"),
        (good() + float("inf"), "not finite"),
        (good() + 1.01, r"from 1\.01 to 1\.01"),
        (good() - 255, "from -255"),
    ],
)
def test_a_hosts_pictures_are_checked(images, words):
    with pytest.raises(RequestError, match=words):
        check_images(images, 4, (64, 32), "star")


def test_good_pictures_pass_as_they_are(device):
    for images in (good(), good() + 1, good(9) - 1, good().half()):
        check_images(images.to(device), 4, (64, 32))


def test_given_pictures_are_cut_and_resized_as_files_are(tmp_path):
    """The same picture as a file and as numbers: the same corners, nearly the same pixels, whatever its shape."""
    for width, height in ((64, 64), (200, 128), (100, 260), (40, 40)):
        image = quarters(width, height)
        image.save(tmp_path / "p.png")
        pixels = (
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, height, width, 3).movedim(-1, 1)
        )
        given = fit_images(pixels / 127.5 - 1, SIZE)
        read = load_images([tmp_path / "p.png"], SIZE)
        assert given.shape == read.shape and given.dtype == torch.float32
        assert given.min() >= -1 and given.max() <= 1
        for mine, theirs in zip(corners(given), corners(read), strict=True):
            assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) <= 2
        # two ways to interpolate differ at the quarters' edges alone
        assert float((given - read).abs().mean()) < 0.05


def test_given_pictures_of_the_size_are_left_alone():
    pictures = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert fit_images(pictures, SIZE) is pictures


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 64, 64), "must be"),
        ((1, 4, 64, 64), "must be"),
        ((1, 3, 31, 64), "too small"),
        ((1, 3, 64, 31), "too small"),
    ],
)
def test_given_pictures_that_are_none_or_too_small_are_refused(shape, words):
    with pytest.raises(RequestError, match=words):
        fit_images(torch.zeros(shape), SIZE, "'star'")
