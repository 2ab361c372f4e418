"""A predicted step needs the bytes and the arithmetic of a computed one."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import memcnn
from memcnn.memory import (
    PeakSplit,
    TensorMeter,
    measure_peak_split,
    predict_step_memory,
    step_flops,
    tensor_peak_bytes,
    training_step,
)
from memcnn.memory.fake import FakeMode
from memcnn.models.irevnet import irevnet_injective
from memcnn.models.momentum import momentum_resnet
from memcnn.models.resnet import MODELS
from properties.support.memory import linear

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

    state = torch.get_rng_state()
    predicted = predict_step_memory(make, maps, optimizer=optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert predicted == computed(make, maps, optimizer=optimizer)


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
    "a new head on an existing one": lambda: nn.Sequential(EXISTING, nn.Conv2d(8, 3, 1)),
    "an exact chain": lambda: memcnn.ReversibleSequential(
        *(memcnn.AdditiveCoupling(branch(4)) for _ in range(3)), exact=True
    ),
    "an i-RevNet with zeros": lambda: nn.Sequential(nn.Conv2d(8, 3, 1), irevnet_injective(3, units=(1, 1, 1))),
    "a momentum network": lambda: nn.Sequential(nn.Conv2d(8, 3, 1), momentum_resnet(3, units=(1, 1, 1))),
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


class Recurrent(nn.Module):
    """Two layers on sequences of 8 vectors of 64 values."""

    def __init__(self, kind: type, **options):
        super().__init__()
        self.layer = kind(64, 16, num_layers=2, batch_first=True, **options)

    def forward(self, x):
        return self.layer(x.flatten(2))[0].mean(1)


class Bag(nn.Module):
    def __init__(self, mode: str):
        super().__init__()
        self.bag = nn.EmbeddingBag(2, 8, mode=mode)

    def forward(self, x):
        return self.bag(x.flatten(1).long())


LIBRARIES = {
    "LSTM": lambda: Recurrent(nn.LSTM, bidirectional=True),
    "LSTM without bias": lambda: Recurrent(nn.LSTM, bias=False),
    "frozen LSTM": lambda: nn.Sequential(Recurrent(nn.LSTM).requires_grad_(False), nn.Linear(16, 3)),
    "GRU": lambda: Recurrent(nn.GRU),
    "mean of a bag": lambda: Bag("mean"),
    "sum of a bag": lambda: Bag("sum"),
}


@pytest.mark.parametrize("make", LIBRARIES.values(), ids=LIBRARIES)
def test_what_only_a_library_knows_the_size_of_is_predicted_too(make):
    assert predict_step_memory(make, maps) == computed(make, maps)


@pytest.mark.filterwarnings("error")
def test_recurrent_layers_on_a_gpu_are_predicted_with_a_warning():
    with pytest.warns(UserWarning, match="an LSTM, a GRU or an RNN on a GPU is wrong"):
        predict_step_memory(LIBRARIES["GRU"], maps, device="cuda")
    predict_step_memory(LIBRARIES["GRU"], maps)


def test_a_fake_operator_of_a_gpu_library_warns_too():
    """A plan of ``budget_bytes`` on a GPU meets this operator. Its fake kernel runs on any machine."""
    gru = nn.GRU(3, 4)
    with FakeMode() as mode:
        weights = [mode.from_tensor(weight) for weight in gru.parameters()]
        x, h = torch.zeros(5, 2, 3), torch.zeros(1, 2, 4)
        arguments = 3, 4, 0, 1, False, 0.0, True, False, (), None
        with pytest.warns(UserWarning, match="on a GPU is wrong"):
            torch.ops.aten._cudnn_rnn(x, weights, 4, None, h, None, *arguments)


def test_an_uninitialised_parameter_is_refused_by_name():
    def make():
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))

    def initialised():
        model = make()
        with torch.no_grad():
            model(maps()[0])
        return model

    with pytest.raises(ValueError, match=r"1\.weight is uninitialised.*let make_model call the model once"):
        predict_step_memory(make, maps)
    assert predict_step_memory(initialised, maps) == computed(initialised, maps)


def test_a_copy_of_a_computed_tensor_is_refused_as_always():
    module = nn.Linear(2, 2)

    def make() -> nn.Module:
        module.extra = module.weight * 2
        return copy.deepcopy(module)

    with pytest.raises(RuntimeError, match="deepcopy"):
        predict_step_memory(make, maps)


def test_on_cuda_memory_comes_in_blocks_and_optimisers_update_all_parameters_at_once():
    predicted = predict_step_memory(chain, maps, device="cuda")
    assert predicted == computed(chain, maps, all_at_once=True, block_bytes=512)
    assert all(getattr(predicted, name) % 512 == 0 for name in BYTES)
    assert predicted.peak_bytes > predict_step_memory(chain, maps).peak_bytes
    assert predicted == predict_step_memory(chain, maps, device="cuda:0")
    with pytest.raises(ValueError, match="device: got 'mps', wanted cpu or cuda"):
        predict_step_memory(chain, maps, device="mps")

    def make():
        return nn.Sequential(*(nn.Linear(300, 300, bias=False) for _ in range(5)))

    def batch():
        return torch.ones(1, 300), torch.zeros(1, dtype=torch.int64)

    one = 4 * 300 * 300  # five weights, gradients and momenta make 15; an update needs one more, or five at once
    assert predict_step_memory(make, batch, device="cuda").peak_bytes // one == 15 + 5
    assert predict_step_memory(make, batch, device="cpu").peak_bytes // one == 15 + 1


def test_counting_gradients_by_name_does_not_change_the_peak():
    model, _optimizer, batch, step = training_step(chain, maps, optimizer=None)
    split = measure_peak_split(model, step, batch=batch)  # two steps; the engine watches the fourth one for drift
    with TensorMeter() as meter:
        meter.count([*model.parameters(), *model.buffers(), *batch, *(p.grad for p in model.parameters())], "held")
        step()
    assert split.peak_bytes == meter.peak_bytes


def test_arithmetic_is_what_a_count_by_hand_gives():
    product = 2 * 5 * 64 * 32
    assert step_flops(*linear()) == 2 * product  # forward, gradient of the weight; the input needs none

    def reversible(disable: bool):
        couplings = (memcnn.AdditiveCoupling(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(3))
        blocks = (memcnn.InvertibleModuleWrapper(coupling, disable=disable) for coupling in couplings)
        return nn.Sequential(nn.Linear(64, 64), *blocks)

    plain, engine = (step_flops(lambda off=off: reversible(off), linear()[1]) for off in (True, False))
    assert engine - plain == 6 * 2 * 5 * 32 * 32  # the engine evaluates each branch once more


def test_a_step_needs_the_memory_of_a_loop_that_frees_gradients_after_the_loss():
    """Logits and loss live until the end of the step, and earlier gradients until the loss is computed."""
    make, batch = linear(rows=500)
    model, optimizer, (x, y), step = training_step(make, batch)

    def loop():
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    assert tensor_peak_bytes(step) == tensor_peak_bytes(loop)
