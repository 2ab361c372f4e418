"""The batched augmentation against the one-image-at-a-time version, and the plan of an epoch."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from memcnn import data as cifar
from properties.devices import needs_cuda
from properties.support.cifar_files import one_image


@given(seed=st.integers(0, 2**32), batch=st.integers(1, 7), pad=st.integers(0, 4), draw=st.data())
def test_a_batch_equals_its_images_augmented_one_by_one(seed, batch, pad, draw):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (batch, 3, 32, 32), generator=generator, dtype=torch.uint8)
    mean = torch.rand(3, 32, 32, generator=generator)
    corners = st.lists(st.integers(0, 2 * pad), min_size=batch, max_size=batch)
    top, left = draw.draw(corners), draw.draw(corners)
    flip = draw.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))

    augmented = cifar.augment(
        cifar.normalise(images, mean), pad=pad, top=torch.tensor(top), left=torch.tensor(left), flip=torch.tensor(flip)
    )

    alone = [
        one_image(images[i], mean, pad=pad, top=top[i], left=left[i], flip=flip[i])
        for i in range(batch)
    ]  # fmt: skip
    assert torch.equal(augmented, torch.stack(alone))


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**31), index=st.integers(0, 3))
def test_a_training_batch_follows_the_plan(seed, epoch, index):
    data = cifar.generate(10, train=48, test=1)
    plan = cifar.epoch_plan(seed, epoch, 48, pad=2, flip=True)
    images, labels = cifar.train_batch(data, plan, index, batch_size=12, pad=2)
    for position in range(12):
        at = index * 12 + position
        chosen = plan.order[at]
        corner = {"top": int(plan.top[at]), "left": int(plan.left[at]), "flip": bool(plan.flip[at])}
        assert torch.equal(images[position], one_image(data.train_images[chosen], data.mean, pad=2, **corner))
        assert labels[position] == data.train_labels[chosen]


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**63 - 1), state=st.integers(0, 2**32 - 1))
def test_the_plan_depends_only_on_seed_and_epoch(seed, epoch, state):
    def plan(seed, epoch):
        return list(vars(cifar.epoch_plan(seed, epoch, 64, pad=2, flip=True)).values())

    first = plan(seed, epoch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(state)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        again = plan(seed, epoch)
        assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], plan(seed, epoch + 1)[0])
    assert not torch.equal(first[0], plan(seed + 1, epoch)[0])


def test_an_epoch_shows_every_image_once_and_all_corners_and_flips_alike():
    plan = cifar.epoch_plan(0, 0, 50_000, pad=2, flip=True)
    assert torch.equal(plan.order.sort().values, torch.arange(50_000))
    for corner in (plan.top, plan.left):
        counts = corner.bincount()
        assert len(counts) == 5  # offsets 0 to 4, the last one included
        assert (counts - 10_000).abs().max() < 500  # 5.6 standard deviations
    assert abs(plan.flip.double().mean() - 0.5) < 0.0125
    independent = torch.corrcoef(torch.stack([plan.order, plan.top, plan.left, plan.flip]).double()) - torch.eye(4)
    assert independent.abs().max() < 0.025


def test_without_flip_and_pad_nothing_is_moved():
    data = cifar.generate(10, train=20, test=1)
    plan = cifar.epoch_plan(5, 0, 20, pad=0, flip=False)
    images, _ = cifar.train_batch(data, plan, 0, batch_size=20, pad=0)
    assert torch.equal(images, cifar.normalise(data.train_images[plan.order], data.mean))


def example(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a training batch whose images have all values of a pixel, and its labels."""
    data = cifar.generate(10, train=100, test=1)
    data.train_images.view(-1)[:256] = torch.arange(256)
    plan = cifar.epoch_plan(1, 2, 100, pad=2, flip=True)
    return cifar.train_batch(data.to(device), plan.to(device), 0, batch_size=100, pad=2)


@needs_cuda
def test_a_batch_has_the_same_bits_on_cuda():
    for here, there in zip(example("cpu"), example("cuda"), strict=True):
        assert torch.equal(here, there.cpu())


class DividingAsCuda(TorchDispatchMode):
    """Simulate CUDA's division by a Python number, which multiplies by the inverse."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.div_.Tensor and not isinstance(args[1], torch.Tensor):
            return args[0].mul_(torch.ones(()) / args[1])
        return function(*args, **(kwargs or {}))


def test_images_are_scaled_by_a_division_that_cuda_rounds_as_the_cpu_does():
    images, mean = torch.arange(256, dtype=torch.uint8), torch.full((256,), 0.5)
    wanted = cifar.normalise(images, mean)
    with DividingAsCuda():
        assert torch.equal(cifar.normalise(images, mean), wanted)
        assert not torch.equal(images.float().div_(255).sub_(mean), wanted), "the simulation divides as the CPU does"
    divisors = []

    class Divisors(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten.div_:
                divisors.append(args[1].device.type)
            return function(*args, **(kwargs or {}))

    with Divisors():
        cifar.normalise(images.to("meta"), mean.to("meta"))
    assert divisors == ["meta"], "CUDA multiplies with the inverse of a scalar that is not on the images' device"
