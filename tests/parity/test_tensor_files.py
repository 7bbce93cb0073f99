"""Files of PyTorch, MindSpore, diffusers and transformers are the same to us as to them, and ours to them."""

import sys
import types

import mindspore as ms
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from mindspore import Parameter, Tensor
from mindspore.train import serialization
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from dreambooth_ms.formats.files import mindspore_ckpt
from dreambooth_ms.formats.files.dtypes import DType, cast
from dreambooth_ms.formats.files.mindspore_ckpt import write_mindspore_ckpt
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.safetensors_file import write_safetensors, write_sharded_safetensors
from dreambooth_ms.formats.files.stored import Container, StoredTensor
from tests.stored_tensors import one_of_each, same

TORCH_TYPES = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I16: torch.int16,
    DType.I8: torch.int8,
    DType.U16: torch.uint16,
    DType.U32: torch.uint32,
    DType.U64: torch.uint64,
    DType.U8: torch.uint8,
    DType.BOOL: torch.bool,
}


def to_torch(tensor):
    dtype = TORCH_TYPES[tensor.dtype]
    content = bytearray(tensor.read().tobytes())
    return (
        torch.frombuffer(content, dtype=dtype).reshape(tensor.shape)
        if content
        else torch.empty(tensor.shape, dtype=dtype)
    )


def from_torch(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return StoredTensor.of(tensor.view(torch.int16).numpy().view(np.uint16), DType.BF16)
    return StoredTensor.of(tensor.numpy())


def from_torch_by_name(tensors):
    return {name: from_torch(tensor) for name, tensor in tensors.items()}


def same_bits(found, expected):
    assert same(from_torch_by_name(found), from_torch_by_name(expected))


EVERYTHING = {name: to_torch(tensor) for name, tensor in one_of_each().items()}


@pytest.fixture
def foreign():
    """An object of a class that nobody has when the file is read."""
    module = types.ModuleType("lightning_of_long_ago")
    module.Callback = type("Callback", (), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    callback = module.Callback()
    callback.state = {"best": torch.zeros(2), "path": "/x"}
    yield callback
    sys.modules.pop(module.__name__, None)


class TestPyTorch:
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_its_checkpoints(self, tmp_path, zipped, foreign):
        base = torch.randn(4, 6)
        tagged = torch.randn(2)
        tagged.note = "an attribute"
        state = EVERYTHING | {
            "base": base,
            "turned": base.t(),
            "slice": base[1:3, 1::2],
            "repeated": torch.randn(1).expand(3, 2),
            "parameter": torch.nn.Parameter(base[0]),
            "with an attribute": tagged,
        }
        checkpoint = {
            "epoch": 3,
            "state_dict": torch.nn.ModuleDict().state_dict() | state,
            "callbacks": {type(foreign): foreign, "it": [foreign]},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
            "numpy": (np.float64(2), np.arange(3)),
            "imaginary": torch.zeros(2, dtype=torch.complex64),
        }
        torch.save(checkpoint, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
        del sys.modules["lightning_of_long_ago"]
        file = open_tensor_file(tmp_path / "model.ckpt")
        assert file.container is (Container.TORCH_ZIP if zipped else Container.TORCH_LEGACY)
        assert file.metadata == {"epoch": "3"}
        assert file.left_out == {"top": 1}
        assert same(file.tensors, from_torch_by_name(state))
        assert "lightning_of_long_ago" not in sys.modules

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_every_protocol_of_pickles(self, tmp_path, protocol, zipped):
        state = {"a": torch.randn(3), "b": torch.randn(2, 2).half()}
        torch.save(state, tmp_path / "x", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        assert same(open_tensor_file(tmp_path / "x").tensors, from_torch_by_name(state))

    def test_safetensors_with_every_type(self, tmp_path):
        save_file(EVERYTHING, tmp_path / "its", {"format": "pt"})
        file = open_tensor_file(tmp_path / "its")
        assert same(file.tensors, from_torch_by_name(EVERYTHING))
        write_safetensors(tmp_path / "ours", file.tensors, file.metadata)
        same_bits(load_file(tmp_path / "ours"), EVERYTHING)

    @pytest.mark.parametrize("target", [DType.F64, DType.F32, DType.F16, DType.BF16])
    @pytest.mark.parametrize("source", [DType.F64, DType.F32, DType.F16, DType.BF16])
    def test_casts(self, source, target):
        """All of it, but which NaN a NaN becomes."""
        if source.itemsize == 2:
            values = np.arange(1 << 16, dtype=np.uint16).view(source.numpy)
        else:
            rng = np.random.default_rng(0)
            near_one = 1 + rng.integers(-(1 << 14), 1 << 14, 10_000) / 2.0**16
            some = [near_one.astype(source.numpy), np.array([np.nan, np.inf, -0.0], source.numpy)]
            values = np.concatenate([np.frombuffer(rng.bytes(80_000), source.numpy), *some])
        expected = to_torch(StoredTensor.of(values, source)).to(TORCH_TYPES[target])
        found = to_torch(StoredTensor.of(cast(values, source, target), target))
        number = ~torch.isnan(expected)
        assert torch.equal(torch.isnan(found), ~number)
        assert number.sum() > 1000
        same_bits({"": found[number]}, {"": expected[number]})


class TestMindSpore:
    @pytest.fixture
    def parameters(self):
        rng = np.random.default_rng(0)
        values = {
            "conv.weight": rng.standard_normal((3, 4), np.float32),
            "norm.gamma": rng.standard_normal(5).astype(np.float16),
            "double": rng.standard_normal(2),
            "ids": np.arange(3),
            "small": np.arange(3, dtype=np.int32),
            "bytes": np.arange(4, dtype=np.uint8),
            "mask": np.array([True, False]),
            "scale": np.array(2.5, np.float32),
        }
        tensors = {name: Tensor(value) for name, value in values.items()}
        tensors["brain"] = Tensor(values["conv.weight"]).astype(ms.bfloat16)
        return [{"name": name, "data": Parameter(tensor, name=name)} for name, tensor in tensors.items()]

    @staticmethod
    def held(parameters):
        """By name what a file must hold; bfloat16 by way of float32, which is exact."""
        held = {}
        for parameter in parameters:
            data = parameter["data"]
            brain = data.dtype == ms.bfloat16
            tensor = StoredTensor.of((data.astype(ms.float32) if brain else data).asnumpy())
            held[parameter["name"]] = tensor.cast_to(DType.BF16) if brain else tensor
        return held

    @pytest.mark.parametrize("crc_check", [False, True])
    def test_its_checkpoints(self, tmp_path, parameters, crc_check):
        notes = {"note": "hällo", "epoch_num": 3}
        ms.save_checkpoint(parameters, str(tmp_path / "x.ckpt"), crc_check=crc_check, append_dict=notes)
        file = open_tensor_file(tmp_path / "x.ckpt")
        assert (file.container, file.metadata) == (Container.MINDSPORE, {"note": "hällo"})
        tensors = dict(file.tensors)
        assert tensors.pop("epoch_num").read() == 3
        assert same(tensors, self.held(parameters))

    @pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
    def test_ours_have_the_same_bytes(self, tmp_path, parameters, parts, monkeypatch):
        """Large parameters are cut in the same places; the limit is lowered from 512 MiB to 1 KiB for both."""
        if parts:
            monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
            monkeypatch.setattr(mindspore_ckpt, "SLICE_BYTES", 1024)
        large = Tensor(np.random.default_rng(1).standard_normal((70, 9), np.float32))
        parameters.append({"name": "large", "data": Parameter(large, name="large")})
        ms.save_checkpoint(parameters, str(tmp_path / "its.ckpt"))
        file = open_tensor_file(tmp_path / "its.ckpt")
        assert same(file.tensors, self.held(parameters))
        write_mindspore_ckpt(tmp_path / "ours.ckpt", file.tensors)
        assert (tmp_path / "ours.ckpt").read_bytes() == (tmp_path / "its.ckpt").read_bytes()
        assert (tmp_path / "ours.ckpt").read_bytes().count(b"large") == (3 if parts else 1)

    def test_it_reads_ours(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mindspore_ckpt, "SLICE_BYTES", 16)
        # It takes the shape (0,) for a number without an axis.
        written = {name: tensor for name, tensor in one_of_each().items() if tensor.shape != (0,)}
        write_mindspore_ckpt(tmp_path / "x.ckpt", written)
        loaded = ms.load_checkpoint(str(tmp_path / "x.ckpt"))
        assert loaded.keys() == written.keys()
        for name, tensor in written.items():
            assert tuple(loaded[name].shape) == tensor.shape
            if tensor.dtype is DType.BF16:
                found = loaded[name].astype(ms.float32).asnumpy()
                assert np.array_equal(found, cast(tensor.read(), DType.BF16, DType.F32), equal_nan=True)
            else:
                assert loaded[name].asnumpy().tobytes() == tensor.read().tobytes()


class TestShardedModels:
    @pytest.fixture
    def autoencoder(self):
        torch.manual_seed(0)
        return AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=2)

    @pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
    @pytest.mark.parametrize("variant", [None, "fp16"])
    def test_of_diffusers(self, tmp_path, autoencoder, variant, safe):
        autoencoder.save_pretrained(tmp_path, max_shard_size="15KB", variant=variant, safe_serialization=safe)
        (index,) = tmp_path.glob("*.index*.json")
        file = open_tensor_file(index)
        assert len(list(tmp_path.glob("*-of-*"))) > 1
        assert same(file.tensors, from_torch_by_name(autoencoder.state_dict()))
        assert index.name == f"diffusion_pytorch_model.{'safetensors' if safe else 'bin'}.index" + (
            f".{variant}.json" if variant else ".json"
        )

    def test_diffusers_reads_ours(self, tmp_path, autoencoder):
        autoencoder.save_config(tmp_path)
        tensors = from_torch_by_name(autoencoder.state_dict())
        _, *shards = write_sharded_safetensors(
            tmp_path, "diffusion_pytorch_model", tensors, {"format": "pt"}, max_shard_bytes=15_000
        )
        assert len(shards) > 1
        loaded = AutoencoderKL.from_pretrained(tmp_path)
        same_bits(loaded.state_dict(), autoencoder.state_dict())

    @pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
    def test_of_transformers(self, tmp_path, safe):
        config = CLIPTextConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        network = CLIPTextModel(config)
        network.save_pretrained(tmp_path, max_shard_size="8KB", safe_serialization=safe)
        (index,) = tmp_path.glob("*.index.json")
        assert len(list(tmp_path.glob("*-of-*"))) > 1
        assert same(open_tensor_file(index).tensors, from_torch_by_name(network.state_dict()))
