"""Tests with whole models: folders with an index, GGUF, a real model, and random files."""

import copy
import json
import pickle
import subprocess
from collections.abc import Mapping

import gguf
import numpy
import pytest
from safetensors import safe_open

import dmaload
from files import BITS, Expected, random_file, sharded, tensor, write


def assert_same(image, tensors):
    assert sorted(image) == sorted(tensors)
    assert len(image) == len(tensors)
    for name, expected in tensors.items():
        found = image[name]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert memoryview(found).tobytes() == expected.data, name


@pytest.mark.parametrize("named", ["folder", "index"])
def test_three_files_with_an_index_load_as_one_model(tmp_path, named):
    folder, tensors = sharded(tmp_path / "model")
    path = folder if named == "folder" else folder / "model.safetensors.index.json"
    assert_same(dmaload.load(path), tensors)
    arrays = dmaload.numpy.load_file(path)
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: expected.data for name, expected in tensors.items()
    }
    with dmaload.safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == sorted(tensors)
        for name, expected in tensors.items():
            assert file.get_tensor(name).tobytes() == expected.data


def test_several_paths_are_one_load(tmp_path):
    folder, tensors = sharded(tmp_path / "model")
    paths = sorted(folder.glob("*.safetensors"))
    assert len(paths) == 3
    assert_same(dmaload.load(paths), tensors)


def test_index_decides_between_duplicate_names(tmp_path):
    first, second = tensor("U8", (64,), 1), tensor("U8", (64,), 2)
    write(tmp_path / "a.safetensors", {"w": first})
    write(tmp_path / "b.safetensors", {"w": second})
    index = tmp_path / "model.safetensors.index.json"
    for name, expected in [("a.safetensors", first), ("b.safetensors", second)]:
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"w": name}}))
        assert_same(dmaload.load(tmp_path), {"w": expected})


def test_only_selected_tensors_are_loaded(tmp_path):
    folder, tensors = sharded(tmp_path / "model")
    chosen = {name: each for name, each in tensors.items() if name.startswith("layers.1.")}
    image = dmaload.load(folder, tensors=["layers.1.*"])
    assert_same(image, chosen)
    assert "layers.0.weight" not in image
    assert len(dmaload.load(folder, tensors=["layers.{0..1}.bias"])) == 2


def test_shards_of_all_ranks_form_the_tensor(tmp_path):
    expected = tensor("F32", (13, 6))
    path = write(tmp_path / "model.safetensors", {"w": expected})
    whole = numpy.frombuffer(expected.data, numpy.float32).reshape(13, 6)
    parts = [dmaload.load(path, shard=(rank, 4, 0))["w"].numpy() for rank in range(4)]
    assert [len(part) for part in parts] == [3, 3, 3, 4]
    assert numpy.concatenate(parts).tobytes() == whole.tobytes()


@pytest.mark.parametrize("dim", [1, 2])
def test_shards_along_inner_dimensions_form_the_tensor(tmp_path, dim):
    expected = tensor("F32", (3, 10, 7))
    path = write(tmp_path / "model.safetensors", {"w": expected})
    whole = numpy.frombuffer(expected.data, numpy.float32).reshape(expected.shape)
    parts = [dmaload.load(path, shard=(rank, 3, dim))["w"].numpy() for rank in range(3)]
    assert all(0 < part.shape[dim] < expected.shape[dim] for part in parts)
    assert numpy.concatenate(parts, axis=dim).tobytes() == whole.tobytes()


def test_metadata_equals_the_headers(tmp_path):
    metadata = {"format": "pt", "née": "日本"}
    path = write(tmp_path / "model.safetensors", {"w": tensor("U8", (4,))}, metadata)
    assert dmaload.load(path).metadata() == metadata
    with safe_open(path, "np") as oracle, dmaload.safe_open(path, "numpy") as file:
        assert file.metadata() == oracle.metadata() == metadata
    for metadata in (None, {}):
        path = write(tmp_path / "none.safetensors", {"w": tensor("U8", (4,))}, metadata)
        assert dmaload.load(path).metadata() == {}
        with safe_open(path, "np") as oracle, dmaload.safe_open(path, "numpy") as file:
            assert file.metadata() == oracle.metadata() == metadata


def test_two_hundred_random_files_load(tmp_path):
    total = 0
    for seed in range(200):
        path = tmp_path / "model.safetensors"
        tensors, metadata = random_file(path, seed)
        image = dmaload.load(path)
        assert_same(image, tensors)
        assert image.metadata() == (metadata or {}), seed
        with safe_open(path, "np") as oracle, dmaload.safe_open(path, "numpy") as file:
            assert sorted(file.keys()) == sorted(oracle.keys())
            # The order of tensors without bytes is not defined.
            own, other = (
                [name for name in each.offset_keys() if tensors[name].data]
                for each in (file, oracle)
            )
            assert own == other, seed
            for name in tensors:
                own, other = file.get_slice(name), oracle.get_slice(name)
                assert own.get_shape() == other.get_shape()
                assert own.get_dtype() == other.get_dtype()
                assert own.get_shape() == list(tensors[name].shape)
                if BITS[tensors[name].dtype] >= 8:
                    assert file.get_tensor(name).tobytes() == tensors[name].data
        total += len(tensors)
    assert total > 1000


def test_real_model_equals_that_of_safetensors(real_model):
    image = dmaload.load(real_model)
    with safe_open(real_model, "np") as oracle:
        names = oracle.keys()
        assert sorted(image) == sorted(names)
        assert len(names) > 50
        for name in names:
            expected, found = oracle.get_tensor(name), image[name].numpy()
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            assert found.tobytes() == expected.tobytes(), name
    assert image.report()["bytes"] == real_model.stat().st_size


@pytest.mark.parametrize("heap", ["anon", "memfd"])
def test_every_heap_loads_the_same_bytes(tmp_path, heap):
    tensors = {"a": tensor("BF16", (3, 5)), "b": tensor("F8_E5M2", (7,)), "c": tensor("F64", ())}
    path = write(tmp_path / "model.safetensors", tensors)
    image = dmaload.load(path, heap=heap)
    assert_same(image, tensors)
    assert image.report()["heap"] == heap


def write_gguf(path):
    """Writes a GGUF file with the reference package.

    The file has keys of several types, and blocks of all types but one.
    """
    source = numpy.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "a näme")
    writer.add_uint64("u64", 2**63 + 1)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.15625)
    writer.add_float64("f64", 1e300)
    writer.add_bool("bool", True)
    writer.add_array("tokens", ["<s>", "▁the", ""])
    writer.add_array("ints", [1, 2, 3, 2**20])
    kinds = gguf.GGML_QUANT_SIZES.items()
    for kind, (_, size) in kinds:
        # The package and ggml disagree on the size of Q8_1. Models are not stored in this type.
        if kind != gguf.GGMLQuantizationType.Q8_1:
            raw = source.integers(0, 255, (5, 3 * size), dtype=numpy.uint8)
            writer.add_tensor(f"t.{kind.name}", raw, raw_shape=raw.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_equals_that_of_the_reference_package(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    image = dmaload.load(path)
    oracle = gguf.GGUFReader(path)
    assert sorted(image) == sorted(tensor.name for tensor in oracle.tensors)
    arrays = dmaload.numpy.load_file(path)
    for expected in oracle.tensors:
        found = image[expected.name]
        assert found.dtype == expected.tensor_type.name
        assert found.shape == tuple(int(dim) for dim in reversed(expected.shape))
        assert memoryview(found).tobytes() == expected.data.tobytes(), expected.name
        array = arrays[expected.name]
        assert array.tobytes() == expected.data.tobytes(), expected.name
        if array.dtype == numpy.uint8:
            assert array.ggml_type == expected.tensor_type.name
    keys = image.metadata()
    for name, field in oracle.fields.items():
        if not name.startswith("GGUF."):
            expected = field.contents()
            assert keys[name] == (expected.tolist() if hasattr(expected, "tolist") else expected)


def test_arrays_of_blocks_keep_their_type(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    array = dmaload.numpy.load_file(path)["t.Q4_K"]
    for same in (array, array[1:3], copy.copy(array), pickle.loads(pickle.dumps(array))):
        assert (same.dtype, same.ggml_type) == (numpy.uint8, "Q4_K")
    assert pickle.loads(pickle.dumps(array)).tobytes() == array.tobytes()
    # Arrays that no longer contain blocks do not claim to.
    for other in (array.view("f2"), array.astype("f4"), numpy.asarray(array)):
        assert getattr(other, "ggml_type", None) is None
    for other in (array + 1, array == array, numpy.concatenate([array, array]) & 1):
        assert type(other) is numpy.ndarray
    assert isinstance(array.sum(), numpy.integer) and hash(array.max()) is not None
    assert (array == array).all()
    with dmaload.safe_open(path, framework="numpy") as file:
        assert file.get_tensor("t.Q4_K").ggml_type == "Q4_K"
        assert file.get_slice("t.Q4_K")[1:3].ggml_type == "Q4_K"
        assert not hasattr(file.get_tensor("t.F32"), "ggml_type")


def test_image_is_a_mapping(tmp_path):
    image = dmaload.load(write(tmp_path / "m.safetensors", {"w": tensor("U8", (4,))}))
    assert isinstance(image, Mapping)
    assert {**image} == dict(image.items()) == {"w": image["w"]}
    assert image["w"] is image.get("w") is next(iter(image.values()))


def test_reports_and_formats_match_the_command(tmp_path, command):
    path = write(tmp_path / "model.safetensors", {"w": tensor("F32", (64, 64))})
    output = subprocess.check_output([command, "load", path, "--heap", "anon", "--json"])
    expected, found = json.loads(output), dmaload.load(path).report()
    for key in ("bytes", "wanted_bytes", "heap", "layout"):
        assert found[key] == expected[key], key
    raw = dmaload.load(path, format="raw")
    assert list(raw) == [], "a raw file must have no tensors"
    assert raw.report()["bytes"] == path.stat().st_size
    with pytest.raises(dmaload.Error):
        dmaload.load(path, format="gguf")


def test_stream_yields_each_tensor_once_in_order(tmp_path):
    folder, tensors = sharded(tmp_path / "model")
    with dmaload.stream(folder) as stream:
        found = [(name, memoryview(each).tobytes()) for name, each in stream]
        for _ in range(3):
            assert list(stream) == []
    assert dict(found) == {name: each.data for name, each in tensors.items()}
    assert len(found) == len(tensors)
    order = ["layers.2.bias", "layers.0.weight", "layers.1.scale"]
    with dmaload.stream(folder, tensors=order) as stream:
        assert [name for name, _ in stream] == order


def test_stream_can_exceed_its_memory_limit(disk):
    """Streams 64 MiB with a limit of 16 MiB: dropped tensors make room for later ones."""
    block = tensor("U8", (1 << 20,))
    tensors = {f"t{number}": Expected("U8", (1 << 20,), block.data) for number in range(64)}
    path = write(disk / "model.safetensors", tensors)
    count = 0
    with dmaload.stream(path, memory_limit=16 << 20) as stream:
        for _, each in stream:
            assert memoryview(each)[:64].tobytes() == block.data[:64]
            count += 1
    assert count == 64
    with pytest.raises(dmaload.Error, match="16777216"):
        dmaload.load(path, memory_limit=16 << 20)
