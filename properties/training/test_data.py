"""Tests of loading: official, missing and generated data."""

import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memcnn import data as loading
from memcnn.data import files


def test_without_network_missing_files_are_named_with_the_fix(tmp_path, no_network):
    wanted = tmp_path / "nowhere"
    with pytest.raises(files.DataNotFound) as raised:
        loading.load("cifar10", wanted)
    message = str(raised.value)
    for part in (
        str(wanted / "cifar-10-batches-py"),
        "no route to host",
        "cifar-10-python.tar.gz",
        "--data",
        "MEMCNN_DATA",
    ):
        assert part in message
    assert not wanted.exists(), "a folder was left behind"


def test_files_are_read_in_torchvisions_order_and_their_checksums_returned(tmp_path, small_source):
    sums = small_source(tmp_path)
    data = loading.load("cifar10", tmp_path)
    assert data.official and data.checksums == sums
    assert data.train_images.shape == (20, 3, 32, 32) and data.test_images.shape == (4, 3, 32, 32)
    images = loading.DATASETS["cifar10"](tmp_path, train=False)
    for index in range(4):
        picture, label = images[index]
        assert torch.equal(
            data.test_images[index], torch.tensor(list(picture.tobytes())).view(32, 32, 3).permute(2, 0, 1)
        )
        assert data.test_labels[index] == label


def test_a_damaged_file_is_named(tmp_path, small_source, no_network):
    small_source(tmp_path, spoil="data_batch_3")
    with pytest.raises(files.DataNotFound, match="data_batch_3 has MD5 "):
        loading.load("cifar10", tmp_path)


def test_a_missing_file_is_named(tmp_path, small_source, no_network):
    small_source(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(files.DataNotFound, match="test_batch is missing"):
        loading.load("cifar10", tmp_path)


def test_missing_files_are_downloaded(tmp_path, small_source, monkeypatch):
    small_source(tmp_path / "elsewhere")
    utilities = files.torchvision.datasets.utils
    monkeypatch.setattr(
        utilities, "download_and_extract_archive", lambda url, root, **names: (tmp_path / "elsewhere").rename(root)
    )
    assert loading.load("cifar10", tmp_path / "data").official


def test_the_folder_comes_from_the_environment_by_default(tmp_path, small_source, monkeypatch):
    small_source(tmp_path)
    monkeypatch.setenv("MEMCNN_DATA", str(tmp_path))
    assert len(loading.load("cifar10").train_images) == 20
    monkeypatch.delenv("MEMCNN_DATA")
    assert loading.whereabouts(None) == "data"


@given(images=st.integers(1, 60), seed=st.integers(0, 9))
def test_the_mean_is_taken_over_the_training_images(images, seed):
    data = loading.generate(10, train=images, test=5, seed=seed)
    expected = (data.train_images.double() / 255).mean(0)
    assert data.mean.dtype == torch.float32
    torch.testing.assert_close(data.mean, expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_generated_images_are_never_official(name, classes):
    data = loading.load(name, "generated")
    assert not data.official
    assert set(data.checksums) == {"generated"}
    assert not set(data.checksums.values()) & {md5 for _, md5 in loading.DATASETS[name].train_list}
    assert data.num_classes == classes
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_images.shape[1:] == data.test_images.shape[1:] == (3, 32, 32)
    assert data.train_labels.unique().tolist() == list(range(classes))


def test_generated_images_are_the_same_each_time_and_made_quickly():
    state = torch.get_rng_state()
    started = time.process_time()
    first = loading.generate(10)
    assert time.process_time() - started < 2
    assert first.checksums == loading.generate(10).checksums
    assert first.checksums != loading.generate(10, seed=1).checksums
    assert torch.equal(torch.get_rng_state(), state)


def test_a_small_network_learns_the_generated_classes():
    data = loading.generate(10, train=2_000, test=500)
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 10),
    )
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1_000_000
        nn.init.normal_(parameter, std=(2 / fan_in) ** 0.5, generator=generator)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(2):
        plan = loading.epoch_plan(0, epoch, 2_000, pad=2, flip=False)
        for index in range(40):
            images, labels = loading.train_batch(data, plan, index, batch_size=50, pad=2)
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    with torch.no_grad():
        right = network(loading.normalise(data.test_images, data.mean)).argmax(1) == data.test_labels
    assert right.double().mean() > 0.5  # guessing gives 0.1


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_the_real_files_are_official(cifar, name, classes):
    data = loading.load(name, cifar, download=False)
    source = loading.DATASETS[name]
    assert data.official
    assert data.checksums == dict(
        [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    )
    assert data.train_images.shape == (50_000, 3, 32, 32) and data.test_images.shape == (10_000, 3, 32, 32)
    assert data.train_labels.bincount().tolist() == [50_000 // classes] * classes
    assert 0.44 < data.mean.mean() < 0.48
