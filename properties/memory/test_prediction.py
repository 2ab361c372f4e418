"""A predicted step needs the bytes and the arithmetic of a computed one, each byte under its right name."""

import copy
import pickle
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import memcnn
from memcnn.memory import (
    PeakSplit,
    TensorMeter,
    allocator_total_bytes,
    measure_peak_split,
    predict_step_memory,
    step_flops,
    tensor_peak_bytes,
    training_step,
)
from memcnn.models.resnet import MODELS

BYTES = ("parameter_bytes", "buffer_bytes", "gradient_bytes", "optimizer_bytes", "batch_bytes", "activation_bytes")


def images(batch: int = 2):
    return torch.ones(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.int64)


def computed(make_model, make_batch, *, block_bytes: int = 1, **options) -> PeakSplit:
    model, optimizer, batch, step = training_step(make_model, make_batch, **options)
    return measure_peak_split(model, step, optimizer=optimizer, batch=batch, block_bytes=block_bytes)


@pytest.mark.parametrize("name", MODELS)
def test_the_prediction_is_the_measurement_to_the_byte(name):
    predicted = predict_step_memory(MODELS[name], images)
    assert predicted == computed(MODELS[name], images)
    assert predicted.peak_bytes == sum(getattr(predicted, name) for name in BYTES)


def branch(channels: int) -> nn.Module:
    convolution = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(0.5))


def chain(*, keep_every: int | None = None, **options) -> nn.Module:
    couplings = [memcnn.create_coupling(branch(4), branch(4), **options) for _ in range(4)]
    blocks = memcnn.ReversibleSequential(*couplings, keep_every=keep_every)
    return nn.Sequential(blocks, nn.Flatten(), nn.Linear(512, 3))


AFFINE = {"coupling": "affine", "adapter": memcnn.AffineAdapterNaive}


def maps():
    return torch.ones(3, 8, 8, 8), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("options", [{}, {"keep_every": 2}, AFFINE], ids=["additive", "every 2nd", "affine"])
@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW], ids=["no update", "AdamW"])
def test_engine_dropout_and_optimisers_are_predicted_too(options, optimizer):
    def make():
        return chain(**options)

    assert predict_step_memory(make, maps, optimizer=optimizer) == computed(make, maps, optimizer=optimizer)


def tied() -> nn.Module:
    first, second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    second.weight = first.weight
    return nn.Sequential(first, second)


def frozen() -> nn.Module:
    module = branch(8)
    module[0].weight.requires_grad_(False)
    return module


EXISTING = branch(8)
COPYING = {
    "a coupling of F alone": lambda: memcnn.AdditiveCoupling(branch(4)),
    "an affine coupling": lambda: memcnn.AffineCoupling(branch(4), adapter=memcnn.AffineAdapterNaive),
    "tied weights": lambda: copy.deepcopy(tied()),
    "frozen weights": lambda: copy.deepcopy(frozen()),
    "spectral norm": lambda: copy.deepcopy(parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))),
    "weight norm": lambda: copy.deepcopy(parametrizations.weight_norm(nn.Conv2d(8, 8, 1))),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(branch(8)),
    "pickled": lambda: pickle.loads(pickle.dumps(branch(8))),
    "moved": lambda: branch(8).to("cpu"),
    "of another dtype": lambda: branch(8).half().float(),
    "existing": lambda: EXISTING,
    "a copy of an existing one": lambda: copy.deepcopy(EXISTING),
}


@pytest.mark.parametrize("make", COPYING.values(), ids=COPYING)
def test_models_that_copy_or_convert_themselves_are_predicted_too(make):
    def mean(outputs, _):
        return outputs.mean()

    state = torch.get_rng_state()
    predicted = predict_step_memory(make, maps, loss=mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert predicted == computed(make, maps, loss=mean)
    assert type(EXISTING[0].weight.data) is torch.Tensor  # not a fake one


def test_a_copy_of_a_computed_tensor_is_refused_as_always():
    module = nn.Linear(2, 2)

    def make() -> nn.Module:
        module.extra = module.weight * 2
        return copy.deepcopy(module)

    with pytest.raises(RuntimeError, match="deepcopy"):
        predict_step_memory(make, maps)


def test_a_prediction_leaves_generators_and_engine_as_they_were():
    state = torch.get_rng_state()
    predict_step_memory(chain, maps)
    assert torch.equal(torch.get_rng_state(), state)


def test_for_cuda_memory_comes_in_blocks_and_optimisers_take_all_parameters_at_once():
    predicted = predict_step_memory(chain, maps, device="cuda")
    assert predicted == computed(chain, maps, all_at_once=True, block_bytes=512)
    assert all(getattr(predicted, name) % 512 == 0 for name in BYTES)
    assert predicted.peak_bytes > predict_step_memory(chain, maps).peak_bytes

    def make():
        return nn.Sequential(*(nn.Linear(300, 300, bias=False) for _ in range(5)))

    def batch():
        return torch.ones(1, 300), torch.zeros(1, dtype=torch.int64)

    one = 4 * 300 * 300  # weights, gradients and momentum of five, and what an update works on
    assert predict_step_memory(make, batch, device="cuda").peak_bytes // one == 15 + 5
    assert predict_step_memory(make, batch, device="cpu").peak_bytes // one == 15 + 1


def linear(dtype: torch.dtype = torch.float32, *, rows: int = 5):
    def make():
        return nn.Linear(64, 32, dtype=dtype)

    def batch():
        return torch.ones(rows, 64, dtype=dtype), torch.zeros(rows, dtype=torch.int64)

    return make, batch


def test_each_part_is_what_a_count_by_hand_gives():
    size = 4 * (64 * 32 + 32)
    split = predict_step_memory(*linear(), optimizer=torch.optim.Adam)
    assert (split.parameter_bytes, split.gradient_bytes, split.buffer_bytes) == (size, size, 0)
    assert split.optimizer_bytes == 2 * size + 2 * 4  # two moments, and for either parameter a count of steps
    assert split.batch_bytes == 4 * 5 * 64 + 8 * 5
    assert split.phase == "update"
    assert predict_step_memory(*linear(rows=5000)).phase != "update"
    assert predict_step_memory(lambda: nn.BatchNorm1d(64), linear()[1]).buffer_bytes == 2 * 4 * 64 + 8


class Wide(nn.Linear):
    """Needs most memory in its forward pass, and nothing of that later."""

    def forward(self, x):
        return super().forward(x) + x.repeat(1, 99).sum(1, keepdim=True)


def test_gradients_of_the_last_step_are_there_during_the_forward_pass():
    split = predict_step_memory(lambda: Wide(64, 32), linear(rows=50)[1])
    assert split.phase == "forward"
    assert split.gradient_bytes == split.parameter_bytes == 4 * (64 * 32 + 32)
    assert split.activation_bytes >= 4 * 50 * 64 * 99


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_a_dtype_has_its_size(dtype, size):
    split = predict_step_memory(*linear(dtype))
    assert split.parameter_bytes == split.gradient_bytes == split.optimizer_bytes == size * (64 * 32 + 32)
    assert split.batch_bytes == size * 5 * 64 + 8 * 5


class Leaky(nn.Linear):
    """Keeps every output it ever made."""

    def forward(self, x):
        self.kept = [*getattr(self, "kept", []), super().forward(x).detach().clone()]
        return super().forward(x)


def test_a_leak_shows_among_the_activations():
    batch = linear(rows=500)[1]
    sound, leaky = (predict_step_memory(lambda kind=kind: kind(64, 32), batch) for kind in (nn.Linear, Leaky))
    assert leaky.activation_bytes == sound.activation_bytes + 4 * 500 * 32
    assert {**asdict(leaky), "activation_bytes": 0, "peak_bytes": 0} == {
        **asdict(sound), "activation_bytes": 0, "peak_bytes": 0,
    }  # fmt: skip


def test_a_shared_weight_counts_once():
    def tied():
        first, second = nn.Linear(64, 64), nn.Linear(64, 64)
        second.weight = first.weight
        return nn.Sequential(first, second)

    assert predict_step_memory(tied, linear()[1]).parameter_bytes == 4 * (64 * 64 + 2 * 64)


def test_autocast_stores_activations_in_half():
    def make():
        return nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(8)), nn.Flatten(), nn.Linear(512, 3))

    def batch():
        return torch.ones(400, 8, 8, 8), torch.zeros(400, dtype=torch.int64)

    whole, half = (predict_step_memory(make, batch, autocast=dtype) for dtype in (None, torch.bfloat16))
    assert half.parameter_bytes == whole.parameter_bytes
    assert 0.45 < half.activation_bytes / whole.activation_bytes < 0.7


def test_counting_gradients_by_name_does_not_change_the_peak():
    model, _optimizer, batch, step = training_step(chain, maps, optimizer=None)
    split = measure_peak_split(model, step, batch=batch)  # two steps; the engine watches the fourth one for drift
    with TensorMeter() as meter:
        meter.count([*model.parameters(), *model.buffers(), *batch, *(p.grad for p in model.parameters())], "held")
        step()
    assert split.peak_bytes == meter.peak_bytes


def test_labels_partition_what_is_counted():
    x = torch.ones(100)
    with TensorMeter() as meter:
        meter.count([x], "x")
        y = x + 1
        assert (meter.current["x"], meter.current[""]) == (400, 400)
        meter.count([y, y[5:]], "y")
        assert (meter.current["x"], meter.current["y"], meter.current[""]) == (400, 400, 0)
        del x, y
        assert meter.current_bytes == sum(meter.current.values()) == 0
    assert (meter.peak_bytes, meter.peak["x"]) == (800, 400)


def test_blocks_round_each_storage_up():
    with TensorMeter(block_bytes=512) as meter:
        held = [torch.empty(size, dtype=torch.uint8) for size in (0, 1, 512, 513)]
        assert meter.current_bytes == 512 + 512 + 1024
    del held


def test_the_allocator_counts_a_model_once_when_its_gradients_are_replaced():
    model = nn.Linear(1000, 1000, bias=False)
    x, weight = torch.ones(1, 1000), 4 * 1000 * 1000

    def step():
        model.zero_grad()
        model(x).sum().backward()

    step()
    total = allocator_total_bytes(step, lambda: [model.weight, model.weight.grad])
    assert 2 * weight <= total < 2.1 * weight
    split = measure_peak_split(model, step, allocator=True)
    assert split.peak_bytes <= split.allocated_bytes < 1.05 * split.peak_bytes
    assert split.reserved_bytes is None

    def accumulate():  # into the gradient that is there
        model(x).sum().backward()

    assert 3 * weight <= allocator_total_bytes(accumulate, lambda: [model.weight, model.weight.grad]) < 3.1 * weight


def test_the_allocator_counts_gradients_of_the_last_step_during_the_forward_pass():
    def batch():
        return torch.ones(100, 1000), torch.zeros(100, dtype=torch.int64)

    model, optimizer, tensors, step = training_step(lambda: Wide(1000, 1000), batch)
    split = measure_peak_split(model, step, optimizer=optimizer, batch=tensors, allocator=True)
    assert split.phase == "forward"
    assert split.peak_bytes <= split.allocated_bytes < 1.1 * split.peak_bytes


def test_arithmetic_is_what_a_count_by_hand_gives():
    product = 2 * 5 * 64 * 32
    assert step_flops(*linear()) == 2 * product  # forward, gradient of the weight; the input needs none

    def reversible(disable: bool):
        couplings = (memcnn.AdditiveCoupling(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(3))
        blocks = (memcnn.InvertibleModuleWrapper(coupling, disable=disable) for coupling in couplings)
        return nn.Sequential(nn.Linear(64, 64), *blocks)

    plain, engine = (step_flops(lambda off=off: reversible(off), linear()[1]) for off in (True, False))
    assert engine - plain == 6 * 2 * 5 * 32 * 32  # each branch once more


def test_a_step_is_the_trainers():
    """Logits and loss stay until its end, and gradients of the last step until its loss is there."""
    make, batch = linear(rows=500)
    model, optimizer, (x, y), step = training_step(make, batch)

    def trainers():
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    assert tensor_peak_bytes(step) == tensor_peak_bytes(trainers)
