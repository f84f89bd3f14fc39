"""The webui's library of patches: real files, found by what they say, and no place outside of the Lora folder."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forget_concept.core.errors import ForgetConceptError, PatchError, RequestError
from forget_concept.core.files.safetensors_io import read_metadata, read_safetensors, write_safetensors
from forget_concept.core.formats import context_map, kohya
from forget_concept.core.models.text_entries import TOKENS
from forget_concept.core.patch.low_rank import LowRank
from forget_concept.core.patch.patch import Patch
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest
from forget_concept.core.service.errors import NotFoundError
from forget_concept.core.service.patch_library import PatchLibrary

KEYS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
)


def patch(concept: str = "star", family: str = "sd1", seed: int = 0, scale: float = 1.0) -> Patch:
    random = torch.Generator().manual_seed(seed)
    factors = {
        key: LowRank(scale * torch.randn(8, 2, generator=random), torch.randn(2, 6, generator=random)) for key in KEYS
    }
    return Patch(factors).with_metadata(
        method="uce",
        family=family,
        concepts=(concept,),
        request=ForgetRequest((Concept(concept),)),
        settings={},
        base_model="abc",
        base_name="model",
    )


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "Lora"
    made.mkdir()
    return made


@pytest.fixture()
def library(folder: Path) -> PatchLibrary:
    return PatchLibrary(lambda: folder)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_patch_is_saved_with_its_picture_and_its_card_and_read_back_bit_for_bit(library: PatchLibrary) -> None:
    made = patch("星")
    entry = library.save(made, "", "forget")
    assert (entry.name, entry.place, entry.concepts) == ("星_00001", "forget/星_00001.safetensors", ["星"])
    assert entry.tag == "<lora:星_00001:1>"
    loaded = library.load(entry.name)
    for key, factor in made.factors.items():
        assert torch.equal(loaded.factors[key].up, factor.up) and torch.equal(loaded.factors[key].down, factor.down)
    assert sorted(tree(entry.path.parent)) == ["星_00001.json", "星_00001.preview.png", "星_00001.safetensors"]
    card = json.loads((entry.path.parent / "星_00001.json").read_text(encoding="utf-8"))
    assert card["sd version"] == "SD1" and card["activation text"] == "" and "星" in card["description"]
    assert entry.preview is not None and entry.preview.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("family", "version", "v2", "card"),
    [("sd1", "sd_v1", "False", "SD1"), ("sd2", "sd_v2", "True", "SD2"), ("sdxl", "sdxl_base_v1-0", "False", "SDXL")],
)
def test_the_file_says_its_family_as_the_webui_reads_it(
    library: PatchLibrary, family: str, version: str, v2: str, card: str
) -> None:
    entry = library.save(patch(family=family), "mine", "")
    metadata = read_metadata(entry.path)
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == (version, v2)
    assert metadata["ss_output_name"] == entry.name == "mine_00001"
    assert json.loads(entry.path.with_suffix(".json").read_text())["sd version"] == card


def test_every_run_has_a_name_that_no_lora_has_wherever_it_lies(library: PatchLibrary, folder: Path) -> None:
    """The webui goes by names alone: the same one in another folder would be another's LoRA."""
    assert library.save(patch(), "", "forget").name == "star_00001"
    (folder / "others").mkdir()
    (folder / "others" / "STAR_00002.ckpt").write_bytes(b"x")
    assert library.save(patch(), "", "").name == "star_00003"
    assert library.save(patch(), "deep/er/%concept%", "forget").place == "deep/er/star_00004.safetensors"


def test_only_our_own_patches_are_listed(library: PatchLibrary, folder: Path) -> None:
    library.save(patch(), "", "")
    tensors = kohya.to_state(patch())
    write_safetensors(tensors, folder / "strange.safetensors", {"ss_output_name": "strange"})
    (folder / "broken.safetensors").write_bytes(b"\x00" * 40)
    (folder / "old.ckpt").write_bytes(b"PK\x03\x04")
    mapped = dataclasses.replace(patch(), context_maps={TOKENS: LowRank(torch.ones(6, 1), torch.ones(1, 6))})
    context_map.save(mapped, folder / "map.safetensors")
    assert library.names() == ["star_00001"]
    with pytest.raises(NotFoundError, match="There is no patch 'strange'"):
        library.load("strange")


def test_a_file_that_changes_or_goes_is_seen(library: PatchLibrary) -> None:
    entry = library.save(patch(), "", "")
    assert library.find("star_00001").concepts == ["star"]
    kohya.save(patch("a very much longer name of a concept"), entry.path)
    assert library.find("star_00001").concepts == ["a very much longer name of a concept"]
    entry.path.unlink()
    assert library.entries() == []


@pytest.mark.skipif(not hasattr(os, "symlink") or sys.platform == "win32", reason="links need rights on Windows")
def test_linked_folders_are_followed_and_a_circle_is_not(library: PatchLibrary, folder: Path, tmp_path: Path) -> None:
    library.save(patch(), "", "inside")
    elsewhere = tmp_path / "elsewhere"
    PatchLibrary(lambda: elsewhere if elsewhere.is_dir() else (elsewhere.mkdir(), elsewhere)[1]).save(
        patch("moon"), "", ""
    )
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    (folder / "inside" / "circle").symlink_to(folder, target_is_directory=True)
    assert sorted(library.names()) == ["moon_00001", "star_00001"]


def test_two_files_of_one_name_are_told(library: PatchLibrary, folder: Path) -> None:
    entry = library.save(patch(), "", "one")
    (folder / "two").mkdir()
    (folder / "two" / "star_00001.safetensors").write_bytes(entry.path.read_bytes())
    with pytest.raises(RequestError, match=r"2 files called 'star_00001' \(.*two/star_00001"):
        library.find("star_00001")


# -- renaming and deleting ------------------------------------------------------------------------------------------


def test_renaming_takes_everything_along_and_changes_no_weight(library: PatchLibrary, folder: Path) -> None:
    entry = library.save(patch(), "", "forget", "float16")
    entry.path.with_suffix(".txt").write_text("mine")
    bystander = entry.path.with_name("star_00001.v2.safetensors")
    bystander.write_bytes(b"not ours")
    before, _ = read_safetensors(entry.path)
    renamed = library.rename("star_00001", "no more stars é")
    assert renamed.place == "forget/no more stars é.safetensors"
    after, metadata = read_safetensors(renamed.path)
    assert metadata["ss_output_name"] == "no more stars é"
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].dtype == before[name].dtype for name in before)
    assert sorted(path.name for path in (folder / "forget").iterdir()) == [
        "no more stars é.json",
        "no more stars é.preview.png",
        "no more stars é.safetensors",
        "no more stars é.txt",
        "star_00001.v2.safetensors",
    ]


def test_renaming_by_the_case_of_a_letter_alone_works(library: PatchLibrary) -> None:
    library.save(patch(), "", "")
    assert library.rename("star_00001", "Star_00001").name == "Star_00001"
    assert library.names() == ["Star_00001"]


def test_renaming_never_writes_over_another(library: PatchLibrary, folder: Path) -> None:
    library.save(patch(), "", "")
    library.save(patch("moon"), "", "other")
    before = tree(folder)
    with pytest.raises(RequestError, match="There is a LoRA called 'MOON_00001' already"):
        library.rename("star_00001", "MOON_00001")
    assert tree(folder) == before


def test_deleting_takes_the_picture_and_the_card_and_nothing_else(library: PatchLibrary, folder: Path) -> None:
    library.save(patch(), "", "")
    other = library.save(patch(), "", "")
    library.delete("star_00001")
    assert sorted(tree(folder)) == [f"{other.name}{end}" for end in (".json", ".preview.png", ".safetensors")]
    with pytest.raises(NotFoundError):
        library.delete("star_00001")


# -- names ----------------------------------------------------------------------------------------------------------

BAD_NAMES = [
    "..",
    ".",
    "../star",
    "a/../../b",
    "..\\star",
    "/etc/star",
    "\\\\server\\share\\star",
    "C:star",
    "C:\\star",
    "con",
    "NUL.txt",
    "Com1",
    "star.",
    "a:b",
    "a<b",
    'a"b',
    "a|b",
    "a?b",
    "star*",
    "a\x00b",
    "a\nb",
    ".hidden",
    "x" * 200,
    "星" * 60,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_name_leads_out_of_the_folder_or_to_a_file_that_cannot_be(
    library: PatchLibrary, folder: Path, name: str
) -> None:
    library.save(patch(), "", "")
    before = tree(folder.parent)
    with pytest.raises(ForgetConceptError):
        library.save(patch(), name, "forget")
    with pytest.raises(ForgetConceptError):
        library.rename("star_00001", name)
    for look in (library.load, library.delete, library.inspect):
        with pytest.raises(NotFoundError):
            look(name)
    assert tree(folder.parent) == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(name=st.text(min_size=1, max_size=30))
def test_whatever_the_name_the_file_is_in_the_folder_or_there_is_none(
    library: PatchLibrary, folder: Path, tmp_path: Path, name: str
) -> None:
    outside = {path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)}
    try:
        entry = library.save(patch(), name, "")
    except ForgetConceptError:
        pass
    else:
        assert entry.path.resolve().is_relative_to(folder.resolve())
        assert entry == library.find(entry.name)
        library.delete(entry.name)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)} == outside


@pytest.mark.parametrize("name", ["stern", "звезда", "نجمة", "별 하나", "étoile-2", "👩‍🚀", "a.b", "(star)", "[x]"])
def test_names_of_every_alphabet_work(library: PatchLibrary, name: str) -> None:
    library.save(patch(), "", "")
    assert library.rename("star_00001", name).name == name
    assert len(library.load(name)) == 2
    library.delete(name)
    assert library.entries() == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no folder here that nobody may write to")
def test_a_folder_that_cannot_be_written_is_told() -> None:
    with pytest.raises(ForgetConceptError, match="'/proc/forget' cannot be written to"):
        PatchLibrary(lambda: Path("/proc")).save(patch(), "", "forget")


def test_a_file_where_the_folder_should_be_is_told(library: PatchLibrary, folder: Path) -> None:
    (folder / "forget").write_text("a file")
    with pytest.raises(ForgetConceptError, match=r"'.*forget' is a file"):
        library.save(patch(), "", "forget")
    assert sorted(tree(folder)) == ["forget"]


def test_a_save_that_breaks_off_leaves_nothing(
    library: PatchLibrary, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forget_concept.core.service import patch_library as module

    def full(*_: object) -> None:
        raise ForgetConceptError("There is no space left.")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(ForgetConceptError, match="no space"):
        library.save(patch(), "", "")
    assert tree(folder) == {}


# -- combining ------------------------------------------------------------------------------------------------------


def test_a_combination_is_the_sum_at_the_strengths(library: PatchLibrary) -> None:
    library.save(patch("star"), "", "")
    library.save(patch("moon", seed=1), "", "")
    entry, words = library.combine([("star_00001", 1.0), ("moon_00001", -0.5)], "", "forget")
    assert entry.name == "star-moon_00001" and entry.concepts == ["star", "moon"]
    assert "star" in words and "moon" in words
    whole = library.load(entry.name)
    for key in KEYS:
        wanted = patch("star").factors[key].delta() - 0.5 * patch("moon", seed=1).factors[key].delta()
        torch.testing.assert_close(whole.factors[key].delta(), wanted)
    cut, words = library.combine([("star_00001", 1.0), ("moon_00001", 1.0)], "small", "", max_rank=1)
    assert library.load(cut.name).rank == 1 and "truncated from rank 4 to 1" in words


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "at least two"),
        ([("star_00001", 1.0)], "at least two"),
        ([("star_00001", 1.0), ("moon_00001", 0.0)], "at least two"),
        ([("star_00001", 1.0), ("star_00001", 1.0)], "chosen twice"),
        ([("star_00001", 1.0), ("nothing", 1.0)], "no patch 'nothing'"),
        ([("star_00001", 1.0), ("wide_00001", 1.0)], "different model families"),
        ([("star_00001", 1.0), ("star_00002", -1.0)], "changes nothing|at least two"),
        ([("star_00001", float("nan")), ("moon_00001", 1.0)], "finite"),
    ],
)
def test_a_combination_that_cannot_be_says_why(library: PatchLibrary, folder: Path, parts: list, words: str) -> None:
    for made in (patch("star"), patch("moon", seed=1), patch("wide", "sdxl"), patch("star", scale=0.0)):
        library.save(made, "", "")
    if "changes" in words:
        parts = [("star_00002", 1.0), ("star_00003", 1.0)]
        library.save(patch("star", scale=0.0), "", "")
    before = tree(folder)
    with pytest.raises(ForgetConceptError, match=words):
        library.combine(parts, "", "")
    assert tree(folder) == before


def test_an_inspection_says_what_is_in_it(library: PatchLibrary) -> None:
    found = library.inspect(library.save(patch(), "", "", "float16").name)
    assert (found["layers"], found["rank"], found["precision"], found["family"]) == (2, 2, "float16", "sd1")
    assert found["concepts"] == ["star"] and "patch: 2 weights" in found["words"]
    assert json.loads(json.dumps(found)) == found


def test_a_damaged_patch_is_named(library: PatchLibrary) -> None:
    from safetensors.torch import save_file

    entry = library.save(patch(), "", "")
    tensors, metadata = read_safetensors(entry.path)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, str(entry.path), metadata)
    with pytest.raises(PatchError, match=r"star_00001.safetensors' holds NaN"):
        library.load("star_00001")
    entry.path.write_bytes(entry.path.read_bytes()[:-10])
    with pytest.raises(NotFoundError, match="There is no patch 'star_00001'"):
        library.load("star_00001")


def test_other_programs_adapters_are_inspected_but_not_listed(library: PatchLibrary, folder: Path) -> None:
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    lokr = {f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": torch.ones(4, 3), f"{key}.alpha": torch.ones(())}
    write_safetensors(lokr, folder / "lokr.safetensors")
    write_safetensors(kohya.to_state(patch()), folder / "plain.safetensors")
    (folder / "plain.safetensors").rename(folder / "plain.sft")
    found = library.inspect("lokr")
    assert found["layers"] == 1 and "LoKr of 1 layers" in found["words"] and "cannot be applied" in found["words"]
    assert library.inspect("plain")["rank"] == 2
    assert library.names() == []
    for name in ("lokr", "plain"):
        with pytest.raises(NotFoundError):
            library.load(name)


def test_an_own_file_with_parts_that_are_no_lora_is_never_applied_in_part(library: PatchLibrary, folder: Path) -> None:
    entry = library.save(patch(), "star", "")
    tensors, metadata = read_safetensors(entry.path)
    layer = next(name for name in tensors if name.endswith(".alpha")).removesuffix(".alpha")
    write_safetensors(tensors | {f"{layer}.dora_scale": torch.ones(8, 1)}, entry.path, metadata)
    with pytest.raises(PatchError, match="DoRA in 1 tensor"):
        library.load(entry.name)
    assert "DoRA of 1 layers" in library.inspect(entry.name)["words"]


@pytest.mark.parametrize("name", ["star.ckpt", "forget/star.PT", "star.sft"])
def test_a_name_with_the_ending_of_another_kind_is_refused(library: PatchLibrary, folder: Path, name: str) -> None:
    with pytest.raises(RequestError, match="leave out"):
        library.place(name, "", ["star"])
    with pytest.raises(RequestError, match="leave out"):
        library.save(patch(), name, "")
    assert not list(folder.iterdir())
    assert (
        library.place("star.safetensors", "", [])[1] == "star" and library.place("v1.5 star", "", [])[1] == "v1.5 star"
    )
