"""Opening a file of tensors, whatever it is."""

from collections.abc import Callable, Mapping
from pathlib import Path

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.mindspore_ckpt import read_mindspore_ckpt
from dreambooth_ms.formats.files.recognise import recognise
from dreambooth_ms.formats.files.safetensors_file import read_safetensors
from dreambooth_ms.formats.files.sharded import read_sharded
from dreambooth_ms.formats.files.stored import Container, TensorFile
from dreambooth_ms.formats.files.torch_file import read_torch_legacy, read_torch_zip

_READERS: Mapping[Container, Callable[[Path], TensorFile]] = {
    Container.SAFETENSORS: read_safetensors,
    Container.TORCH_ZIP: read_torch_zip,
    Container.TORCH_LEGACY: read_torch_legacy,
    Container.MINDSPORE: read_mindspore_ckpt,
    Container.SHARDED: read_sharded,
}


def open_tensor_file(path: Path) -> TensorFile:
    """Recognise a file by its content and open it; no tensor is read.

    Raises:
        WeightError: no such file, a folder, damaged, or of no kind that holds tensors.
    """
    container = recognise(path)
    if container is Container.FOLDER:
        raise WeightError(f"{path}: a folder; name a file in it, or the index of a sharded model")
    return _READERS[container](path)
