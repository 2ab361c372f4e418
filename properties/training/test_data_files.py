"""CIFAR files from any source: code in them never runs, and the error names files that are no batch or not official."""

import codecs
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memcnn import data as loading
from memcnn.data import files

FOLDER = "cifar-10-batches-py"


class Call:
    """An object whose pickle calls ``function`` when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def global_name(module: str, name: str) -> bytes:
    """Return a pickle that contains only a name."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."


def batch(**changes) -> bytes:
    pixels = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072)
    return pickle.dumps({"data": pixels, "labels": [3, 7], **changes}, protocol=2)


def read(tmp_path, content: bytes):
    (tmp_path / FOLDER).mkdir(exist_ok=True)
    (tmp_path / FOLDER / "test_batch").write_bytes(content)
    return files.read("cifar10", tmp_path, train=False)


@pytest.mark.parametrize("place", ["alone", "as the images", "as a label", "beside"])
def test_a_hostile_pickle_runs_nothing(tmp_path, place):
    harm = tmp_path / "harm"
    for hostile in (Call(os.mkdir, str(harm)), Call(eval, f"__import__('os').mkdir({str(harm)!r})")):
        places = {
            "alone": pickle.dumps(hostile),
            "as the images": batch(data=hostile),
            "as a label": batch(labels=[hostile, 3]),
            "beside": batch(more=hostile),
        }
        with pytest.raises(files.BadData, match="test_batch is not a batch .* which no plain array needs"):
            read(tmp_path, places[place])
        assert not harm.exists()
        pickle.loads(places["alone"])  # unpickled directly, it does harm
        assert harm.exists()
        harm.rmdir()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"), ("os", "system"), ("numpy", "load"), ("numpy", "fromfile"), ("numpy", "ndarray.tofile"),
        ("numpy.core.multiarray", "scalar"), ("numpy.core.numpy", "dtype"), ("_codecs", "decode"),
        ("memcnn.data.files", "_Array"), ("numpy.core.multiarray", "_reconstruct.__globals__"), ("torch", "load"),
    ],
)  # fmt: skip
def test_no_name_outside_of_arrays_is_known(tmp_path, module, name):
    with pytest.raises(files.BadData, match="which no plain array needs"):
        read(tmp_path, global_name(module, name))


@given(content=st.binary(max_size=60) | st.binary().map(lambda words: b"\x80\x02" + words + b"."))
def test_whatever_a_file_holds_it_is_a_batch_or_named(tmp_path_factory, content):
    with pytest.raises(files.BadData, match="test_batch is not a batch of CIFAR images"):
        read(tmp_path_factory.mktemp("data"), content)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, protocol, order):
    pixels = np.random.default_rng(0).integers(256, size=(4, 3072), dtype=np.uint8)
    content = pickle.dumps({"data": np.asarray(pixels, order=order), "labels": [1, 9, 0, 3]}, protocol=protocol)
    images, labels = read(tmp_path, content)
    assert images.dtype == torch.uint8 and labels.tolist() == [1, 9, 0, 3]
    assert torch.equal(images, torch.from_numpy(pixels).view(4, 3, 32, 32))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (batch()[:-5000], "truncated"),
        (batch(labels=[3]), "1 labels and images of shape"),
        (batch(labels=[3, 10]), "whole numbers below 10"),
        (batch(labels=[3, -1]), "whole numbers below 10"),
        (batch(labels=[3, True]), "whole numbers below 10"),
        (batch(labels="37"), "whole numbers below 10"),
        (batch(data=np.zeros((2, 3072))), "got an array of dtype f8, wanted u1"),
        (batch(data=np.zeros((2, 3071), np.uint8)), "shape .2, 3071."),
        (batch(data=[0]), "AttributeError"),
        (pickle.dumps({"labels": [1]}), "KeyError"),
        (pickle.dumps([]), "TypeError"),
        (batch().replace(struct.pack("<H", 3072), struct.pack("<H", 3071)), "reshape"),
        (b"", "EOFError"),
    ],
)
def test_a_file_that_is_no_batch_is_named_with_the_reason(tmp_path, content, reason):
    with pytest.raises(files.BadData, match=f"{FOLDER}/test_batch is not a batch of CIFAR images .*{reason}"):
        read(tmp_path, content)


def test_a_wrong_checksum_is_refused_and_nothing_is_downloaded_over_it(tmp_path, small_source, monkeypatch):
    small_source(tmp_path)
    changed = tmp_path / FOLDER / "data_batch_2"
    changed.write_bytes(changed.read_bytes().replace(b"\x01", b"\x02"))
    (tmp_path / FOLDER / "data_batch_4").unlink()
    monkeypatch.setattr(files.torchvision.datasets.utils, "download_and_extract_archive", lambda *a, **b: 1 / 0)
    with pytest.raises(files.DataNotFound, match="data_batch_4 is missing; data_batch_2 has MD5 "):
        loading.load("cifar10", tmp_path)


def test_unofficial_files_are_read_only_on_request_and_marked(tmp_path, small_source):
    sums = small_source(tmp_path)
    assert loading.load("cifar10", tmp_path, unofficial=True).official
    (tmp_path / FOLDER / "test_batch").write_bytes(batch())
    with pytest.raises(files.DataNotFound, match="(?s)test_batch has MD5 .*--unofficial-data"):
        loading.load("cifar10", tmp_path)
    data = loading.load("cifar10", tmp_path, unofficial=True)
    assert not data.official and len(data.test_labels) == 2
    assert {name for name in sums if sums[name] != data.checksums[name]} == {"test_batch"}


def test_the_official_files_are_read_as_torchvision_reads_them(cifar):
    for name, source in files.DATASETS.items():
        for train in (True, False):
            images, labels = files.read(name, cifar, train=train)
            theirs = source(cifar, train=train)
            assert torch.equal(images, torch.from_numpy(theirs.data).permute(0, 3, 1, 2))
            assert labels.tolist() == theirs.targets


def test_no_codec_that_a_file_names_is_imported(tmp_path):
    """A pickle may name a codec to import; the reader always uses latin1."""
    images, _ = read(tmp_path, batch())
    spoilt = batch().replace(b"latin1", b"rot_13")
    assert spoilt != batch() and codecs.lookup("rot_13")
    assert torch.equal(read(tmp_path, spoilt)[0], images)
