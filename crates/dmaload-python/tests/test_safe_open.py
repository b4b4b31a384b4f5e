"""Tests that `safe_open` behaves like that of safetensors, and reads only what it needs."""

import inspect
import os
import time

import gguf
import numpy
import pytest
import safetensors.numpy
from safetensors import safe_open

import dmaload
from files import BITS, large, make_cold, numpy_dtype, sharded, sparse, tensor, write

SLICES = [
    numpy.s_[:],
    numpy.s_[...],
    numpy.s_[2:5],
    numpy.s_[:3],
    numpy.s_[4:],
    numpy.s_[-3:],
    numpy.s_[:-2],
    numpy.s_[3],
    numpy.s_[-1],
    numpy.s_[:, 1],
    numpy.s_[:, 1:3],
    numpy.s_[1:3, 2:],
    numpy.s_[2, 1],
    numpy.s_[2, 1, 3],
    numpy.s_[:, :, 2:4],
    numpy.s_[1:2, :, 1],
    numpy.s_[..., 1],
    numpy.s_[1, ..., 2:4],
    numpy.s_[3:3],
    numpy.s_[5:2],
    numpy.s_[0:100],
    numpy.s_[::3],
    numpy.s_[1:7:2, ::2],
    numpy.s_[:, ::8],
    numpy.s_[1, 2, ...],
    (),
]

# Indices that NumPy accepts, and safetensors does not.
MORE_INDICES = [
    numpy.s_[::-1],
    numpy.s_[2, ::-1],
    None,
    numpy.s_[2, None],
    numpy.s_[:, None, 1],
    numpy.s_[..., None],
    [0, 2],
    [],
    (3, slice(None), [0, 1]),
    (slice(2, 5), [0, 1, 2]),
    ([0, 1], slice(None), 1),
    True,
    False,
    numpy.bool_(True),
    numpy.int64(3),
    numpy.array(3),
    numpy.array([5, 1]),
    numpy.arange(8) % 2 == 0,
]


@pytest.fixture
def model(tmp_path):
    tensors = {
        "w": tensor("F32", (8, 5, 6)),
        "line": tensor("I64", (40,)),
        "half": tensor("F16", (8, 5, 6)),
        "scalar": tensor("F64", ()),
        "empty": tensor("U8", (0, 3)),
    }
    return write(tmp_path / "model.safetensors", tensors, {"format": "np"}), tensors


def array_of(expected):
    return numpy.frombuffer(expected.data, numpy_dtype(expected.dtype)).reshape(expected.shape)


@pytest.mark.parametrize("index", SLICES + MORE_INDICES, ids=str)
def test_slices_equal_those_of_numpy(model, index):
    path, tensors = model
    with dmaload.safe_open(path, framework="numpy") as file:
        for name in ("w", "half"):
            expected, found = array_of(tensors[name])[index], file.get_slice(name)[index]
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            assert found.tobytes() == expected.tobytes()


def test_slices_equal_those_of_safetensors(model):
    path, _ = model
    compared = 0
    with safe_open(path, "np") as oracle, dmaload.safe_open(path, framework="np") as file:
        for name in ("w", "half", "line"):
            for index in SLICES:
                try:
                    expected = oracle.get_slice(name)[index]
                except Exception:
                    # safetensors refuses some slices; the test above compares with NumPy.
                    continue
                found = file.get_slice(name)[index]
                assert found.shape == expected.shape, (name, index)
                assert found.tobytes() == expected.tobytes(), (name, index)
                compared += 1
    assert compared > 2 * len(SLICES)


@pytest.mark.parametrize(
    "index",
    [
        numpy.s_[8],
        numpy.s_[-9],
        numpy.s_[:, 5],
        numpy.s_[0, 0, 0, 0],
        numpy.s_[::0],
        numpy.s_["a":],
        "a",
        1.5,
        [99],
        numpy.s_[..., ...],
        numpy.array([True, False]),
    ],
    ids=str,
)
def test_invalid_indices_are_refused(model, index):
    path, _ = model
    with dmaload.safe_open(path, framework="numpy") as file:
        with pytest.raises((IndexError, dmaload.InvalidInputError), match='tensor "w"'):
            file.get_slice("w")[index]


def test_methods_match_those_of_safetensors(model):
    path, tensors = model
    own = {name for name in dir(safe_open) if not name.startswith("_")}
    assert own <= set(dir(dmaload.safe_open))
    with safe_open(path, "np") as oracle, dmaload.safe_open(path, framework="np") as file:
        # `keys` returns the same names in any order, `offset_keys` in the same order.
        assert sorted(file.keys()) == sorted(oracle.keys()) == sorted(tensors)
        assert file.offset_keys() == oracle.offset_keys()
        assert file.metadata() == oracle.metadata() == {"format": "np"}
        everything = file.get_tensors()
        for name, expected in oracle.get_tensors().items():
            assert everything[name].tobytes() == expected.tobytes()
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.tobytes() == expected.tobytes()
            own, other = file.get_slice(name), oracle.get_slice(name)
            assert own.get_shape() == other.get_shape()
            assert own.get_dtype() == other.get_dtype()
    # Works without `with`, and with positional arguments.
    file = dmaload.safe_open(str(path), "numpy", "cpu")
    assert file.get_tensor("line").tolist() == array_of(tensors["line"]).tolist()


def test_closed_file_cannot_be_read(model):
    path, _ = model
    file = dmaload.safe_open(path, framework="numpy")
    with file:
        kept = file.get_tensor("w")
    for use in (lambda: file.get_tensor("w"), file.keys, lambda: file.get_slice("w")):
        with pytest.raises((dmaload.Error, ValueError)):
            use()
    assert kept.shape == (8, 5, 6), "tensors that were read must stay valid"


def test_slice_can_be_used_after_the_file_was_closed(model):
    path, tensors = model
    before = len(os.listdir("/proc/self/fd"))
    with safe_open(path, "np") as oracle, dmaload.safe_open(path, framework="numpy") as file:
        other, own = oracle.get_slice("w"), file.get_slice("w")
    del file
    assert own[2:5].tobytes() == other[2:5].tobytes() == array_of(tensors["w"])[2:5].tobytes()
    del other, oracle
    assert len(os.listdir("/proc/self/fd")) > before
    del own
    assert len(os.listdir("/proc/self/fd")) == before


def test_replaced_file_is_still_read(model, tmp_path):
    path, tensors = model
    other = write(tmp_path / "other.safetensors", {"w": tensor("F32", (8, 5, 6), 9)})
    with dmaload.safe_open(path, framework="numpy") as file:
        part = file.get_slice("w")
        os.replace(other, path)
        assert file.get_tensor("w").tobytes() == part[:].tobytes() == tensors["w"].data
        # This loads the file at the path.
        with pytest.raises(dmaload.ChangedError, match="changed since it was opened"):
            file.get_tensors()


def test_file_that_was_written_to_is_refused(model):
    path, tensors = model
    with dmaload.safe_open(path, framework="numpy") as file:
        part = file.get_slice("w")
        # File systems record times in steps of up to 10 ms.
        time.sleep(0.05)
        with open(path, "r+b") as written:
            written.seek(-1, os.SEEK_END)
            written.write(b"x")
        for use in (lambda: file.get_tensor("w"), lambda: part[:], file.get_tensors):
            with pytest.raises(dmaload.ChangedError, match="changed since it was opened"):
                use()


def test_unknown_names_are_refused(model):
    path, _ = model
    with dmaload.safe_open(path, framework="numpy") as file:
        for use in (file.get_tensor, file.get_slice):
            with pytest.raises(dmaload.Error, match="no-such"):
                use("no-such")


def test_unknown_frameworks_and_devices_are_refused(model):
    path, _ = model
    with pytest.raises((dmaload.Error, ValueError), match="jax-like"):
        dmaload.safe_open(path, framework="jax-like")
    with pytest.raises((dmaload.Error, ValueError), match="tpu"):
        dmaload.safe_open(path, framework="numpy", device="tpu:0")


def read_from_storage():
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def test_slice_reads_only_its_bytes(disk):
    path, tensors = large(disk / "model.safetensors", 64)
    whole = {
        "big": tensor("F32", (4096, 4096), 3),
        "after": tensor("F32", (512, 512), 4),
        "experts": tensor("U8", (4, 1024, 4096), 5),
    }
    big = write(disk / "big.safetensors", whole)

    def cost(use, path=big):
        make_cold(path)
        before = read_from_storage()
        result = use()
        return read_from_storage() - before, result

    opened, file = cost(lambda: dmaload.safe_open(big, framework="numpy"))
    rows, found = cost(lambda: file.get_slice("big")[1000:1010])
    assert found.tobytes() == array_of(whole["big"])[1000:1010].tobytes()
    expert, found = cost(lambda: file.get_slice("experts")[2, 10:20])
    assert found.tobytes() == array_of(whole["experts"])[2, 10:20].tobytes()
    one, found = cost(lambda: file.get_tensor("after"))
    assert found.tobytes() == whole["after"].data
    everything, found = cost(lambda: file.get_tensor("big"))
    assert found.tobytes() == whole["big"].data
    if everything < 64 << 20:
        pytest.skip(f"the kernel does not count reads on {disk}: {everything} bytes of 64 MiB")
    assert opened < 1 << 20, f"opening read {opened} bytes"
    assert rows < 1 << 20, f"{rows} bytes were read from storage for 160 KiB of rows"
    assert expert < 1 << 20, f"{expert} bytes were read from storage for 40 KiB of an expert"
    assert 1 << 20 <= one < 3 << 20, f"{one} bytes were read from storage for a tensor of 1 MiB"
    many, _ = cost(lambda: dmaload.safe_open(path, framework="numpy").get_tensor("t32"), path)
    assert many < 4 << 20, f"{many} bytes were read from storage for 1 MiB of a 64 MiB file"
    assert len(tensors) == 64


def test_file_larger_than_memory_can_be_opened(disk):
    sizes = {"small": ("F32", (4,)), "huge": ("F32", (1 << 21, 1 << 18)), "last": ("U8", (100,))}
    path = sparse(disk / "model.safetensors", sizes)
    assert path.stat().st_size > 2 << 40
    with dmaload.safe_open(path, framework="numpy") as file:
        assert file.get_slice("huge").get_shape() == [1 << 21, 1 << 18]
        assert file.get_tensor("small").tolist() == [0, 0, 0, 0]
        assert file.get_slice("huge")[1 << 20, :10].tolist() == [0] * 10
        assert file.get_tensor("last").shape == (100,)
        with pytest.raises(dmaload.Error):
            file.get_tensor("huge")
    os.unlink(path)


def test_every_type_can_be_sliced(tmp_path):
    whole = [name for name in BITS if BITS[name] >= 8]
    path = write(tmp_path / "m.safetensors", {name: tensor(name, (9, 4)) for name in whole})
    with dmaload.safe_open(path, framework="numpy") as file:
        for name in whole:
            size = BITS[name] // 8 * 4
            expected = tensor(name, (9, 4)).data
            assert file.get_slice(name)[2:5].tobytes() == expected[2 * size : 5 * size], name


def test_tensors_read_as_bytes_are_cut_only_at_rows(tmp_path):
    """If NumPy has no type for a tensor's blocks, slices must select whole rows."""
    values = gguf.quants.quantize(
        numpy.ones((4, 64), numpy.float32), gguf.GGMLQuantizationType.Q4_0
    )
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("rows", values, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("flat", values[0], raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with dmaload.safe_open(tmp_path / "m.gguf", framework="numpy") as file:
        rows, flat = file.get_slice("rows"), file.get_slice("flat")
        assert rows[1:3].tobytes() == values[1:3].tobytes()
        assert rows[2, 0:64].tobytes() == values[2].tobytes()
        assert flat[:].tobytes() == flat[0:64].tobytes() == values[0].tobytes()
        for cut, index in [
            (rows, (0, slice(0, 32))),
            (rows, (slice(None), 0)),
            (flat, slice(0, 32)),
            (flat, 5),
        ]:
            with pytest.raises(dmaload.Error, match="cannot be cut within its rows"):
                cut[index]


def test_folder_reads_like_a_file(tmp_path):
    folder, tensors = sharded(tmp_path / "model")
    with dmaload.safe_open(folder, framework="numpy") as file:
        for name, expected in tensors.items():
            assert file.get_slice(name).get_shape() == list(expected.shape)
            assert file.get_slice(name)[1:].tobytes() == file.get_tensor(name)[1:].tobytes()


def test_module_can_replace_that_of_safetensors(model, tmp_path):
    path, tensors = model
    own = inspect.signature(dmaload.numpy.load_file).parameters
    for name, parameter in inspect.signature(safetensors.numpy.load_file).parameters.items():
        assert own[name].kind == parameter.kind
    from dmaload.numpy import load, load_file, save, save_file

    arrays = load_file(path, backend="pread")
    copied = tmp_path / "copied.safetensors"
    save_file(arrays, copied)
    for found in (load_file(copied), load(save(arrays)), load(copied.read_bytes())):
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: expected.data for name, expected in tensors.items()
        }
    with pytest.raises(ImportError, match="no_such"):
        from dmaload.numpy import no_such  # noqa: F401


def test_load_file_returns_writable_arrays(model):
    path, tensors = model
    arrays = dmaload.numpy.load_file(str(path))
    assert type(arrays) is dict
    for name, expected in tensors.items():
        assert arrays[name].tobytes() == expected.data
        assert arrays[name].flags.writeable
