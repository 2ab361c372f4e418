"""A RevNet trained with the engine follows its twin that stores every activation."""

import torch
import torch.nn.functional as F

from memcnn import data as cifar
from memcnn.models.resnet import revnet38
from memcnn.testing.tolerances import relative_error

STEPS = 50


def losses_and_weights(device: str, dtype: torch.dtype, **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Train for ``STEPS`` steps of SGD at the published hyper-parameters, on small images."""
    images = cifar.generate(10, train=4 * STEPS, test=10, seed=0).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = revnet38(**options).to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    losses = []
    for step in range(STEPS):
        batch = slice(4 * step, 4 * (step + 1))
        x = cifar.normalise(images.train_images[batch], images.mean)[..., 8:24, 8:24].to(dtype)
        loss = F.cross_entropy(model(x), images.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), [p.detach() for p in model.parameters()]


def test_in_exact_mode_the_curve_and_the_weights_are_the_twins_bit_for_bit(device):
    losses, weights = losses_and_weights(device, torch.float32, exact=True)
    twin_losses, twin_weights = losses_and_weights(device, torch.float32, exact=True, disable=True)
    assert torch.equal(losses, twin_losses)
    assert all(torch.equal(w, twin) for w, twin in zip(weights, twin_weights, strict=True))


def test_otherwise_the_curve_is_the_twins_up_to_rounding(device):
    """Training multiplies a rounding error by about 100 every few steps, so the comparison needs float64."""
    losses, _ = losses_and_weights(device, torch.float64)
    twin_losses, _ = losses_and_weights(device, torch.float64, disable=True)
    assert not torch.equal(losses, twin_losses), "equal bits: the engine, which rounds, was not used"
    assert relative_error(losses, twin_losses) <= 1e-6
