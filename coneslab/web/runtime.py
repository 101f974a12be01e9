"""ONNX Runtime for browsers, from the npm registry: one version, whose checksum is known.

Python fetches it, so that no Node.js is needed to build a page; npm's own mirror setting is honoured.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import checks
from ..errors import ConeslabError, FileFormatError
from ..files import require_writable, write_whole

VERSION = "1.30.0"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # SHA-512
_REGISTRY = "https://registry.npmjs.org/"
#: What a page needs of it: for the processor, and for a graphics card.
FILES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}


@dataclass(frozen=True, repr=False)
class Runtime:
    """The files of ONNX Runtime that a page needs: name -> bytes."""

    version: str
    files: Mapping[str, bytes]

    def __repr__(self) -> str:
        return f"Runtime({self.version}, {sum(map(len, self.files.values())):,} bytes)"


def fetch_runtime(kept: str | Path, *, timeout: float = 60.0) -> Runtime:
    """ONNX Runtime for browsers, from the folder where it is kept, or else from the npm registry.

    The registry is that of the environment variable npm_config_registry, as npm reads it. kept: a folder, created if
    missing. timeout: seconds without an answer.
    Raises ConeslabError if it cannot be fetched, FileFormatError if what came is not that version.
    """
    timeout = checks.number("timeout", timeout, "(0, inf)")
    file = require_writable(kept, folder=True) / f"onnxruntime-web-{VERSION}.tgz"
    data = file.read_bytes() if file.is_file() else b""
    if not _is_right(data):
        data = _fetched(timeout)
        write_whole(file, data)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        return Runtime(
            VERSION, {name: _member(archive, f"package/dist/{name}") for names in FILES.values() for name in names}
        )


def _is_right(data: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(data).digest()).decode() == INTEGRITY


def _fetched(timeout: float) -> bytes:
    set_to = (value for name, value in os.environ.items() if name.lower() == "npm_config_registry" and value)
    registry = next(set_to, _REGISTRY).rstrip("/")
    address = f"{registry}/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
    try:
        with urllib.request.urlopen(address, timeout=timeout) as answer:
            data = answer.read()
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise ConeslabError(
            f"ONNX Runtime for browsers could not be fetched from {address} ({error}): connect to the network, or name "
            "a mirror of the npm registry in the environment variable npm_config_registry"
        ) from error
    if not _is_right(data):
        raise FileFormatError(
            f"{address} gave {len(data):,} bytes that are not onnxruntime-web {VERSION}: their SHA-512 differs; try "
            "another mirror of the npm registry (npm_config_registry)"
        )
    return data


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(name)
    assert found is not None, name
    return found.read()
