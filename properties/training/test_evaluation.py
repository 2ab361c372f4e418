"""An evaluation, captured or interleaved with others, gives the sums of one pass over the test images."""

import pytest
import torch
import torch.nn.functional as F

from memcnn import data as cifar
from memcnn.training.execution import Execution
from memcnn.training.recipe import override
from memcnn.training.step import Evaluation, TrainingStep
from properties.support.capture import graphs_on_cpu
from properties.support.executions import BF16, COMPILED, GRAPH, PLAIN, Reading, small_resnet, small_revnet
from properties.support.runs import DATA, RECIPE

EXECUTIONS = [PLAIN, GRAPH, COMPILED, BF16, Execution(graph=True, compile=True)]


@pytest.fixture
def graphs(monkeypatch):
    with graphs_on_cpu(monkeypatch) as captures:
        yield captures


def trained(make, seed: int = 0):
    """Return a network after three training steps."""
    torch.manual_seed(seed)
    model = make().to(memory_format=torch.channels_last)
    step = TrainingStep(model, override(RECIPE, learning_rate=0.05), DATA, PLAIN)
    plan = cifar.epoch_plan(seed, 0, 40, pad=2, flip=True)
    for i in range(3):
        step(plan.part(8 * i, 8 * i + 8), 0.05)
    return model


@torch.no_grad()
def in_one_pass(model, count: int) -> tuple[float, float]:
    """Return the summed loss and the number of right answers on the first ``count`` test images."""
    model.eval()
    logits = model(cifar.normalise(DATA.test_images[:count], DATA.mean).contiguous(memory_format=torch.channels_last))
    labels = DATA.test_labels[:count]
    model.train()
    return F.cross_entropy(logits, labels, reduction="sum").item(), (logits.argmax(1) == labels).sum().item()


@pytest.mark.parametrize("make", [small_revnet, small_resnet])
@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
@pytest.mark.parametrize(("count", "batch"), [(45, 20), (40, 20), (7, 20), (50, 50)])
def test_an_evaluation_equals_one_pass_over_the_images(graphs, make, execution, count, batch):
    model = trained(make)
    loss, correct = in_one_pass(model, count)
    evaluation = Evaluation(model, DATA, execution, images=count, batch=batch)
    tolerance = 3e-2 if execution == BF16 else 1e-5
    for _ in range(2):
        assert list(evaluation.turns()) == sorted({*range(batch, count, batch), count})
        assert evaluation.totals[0].item() == pytest.approx(loss, rel=tolerance)
        assert abs(evaluation.totals[1].item() - correct) <= (2 if execution == BF16 else 0)
    loss, correct = evaluation.totals.tolist()
    assert evaluation.result() == pytest.approx((loss / count, 100 * correct / count))
    assert model.training
    assert len(graphs) == execution.graph


def test_a_captured_evaluation_uses_weights_and_statistics_that_are_loaded_later(graphs):
    model, later = trained(small_resnet), trained(small_resnet, seed=1)
    evaluation = Evaluation(model, DATA, GRAPH, images=45, batch=20)
    before = evaluation.result()
    model.load_state_dict(later.state_dict())
    after = evaluation.result()
    assert after == pytest.approx(Evaluation(later, DATA, PLAIN, images=45, batch=20).result())
    assert after != before
    assert len(graphs) == 1, "captured once"


def test_evaluations_of_several_models_can_take_turns(graphs):
    models = [trained(small_resnet), trained(small_revnet)]
    alone = [Evaluation(model, DATA, GRAPH, images=45, batch=20).result() for model in models]
    evaluations = [Evaluation(model, DATA, GRAPH, images=45, batch=20) for model in models]
    for done in zip(*(evaluation.turns() for evaluation in evaluations), strict=True):
        assert done[0] == done[1]
    for (loss, accuracy), evaluation in zip(alone, evaluations, strict=True):
        assert evaluation.totals.tolist() == pytest.approx([45 * loss, 45 * accuracy / 100])


def test_an_abandoned_evaluation_restores_the_models_mode():
    model = trained(small_resnet)
    turns = Evaluation(model, DATA, PLAIN, images=45, batch=20).turns()
    next(turns)
    assert not model.training
    turns.close()
    assert model.training


@pytest.mark.parametrize("execution", [PLAIN, GRAPH], ids=str)
def test_processes_share_every_batch_and_take_the_same_turns(graphs, execution):
    model = trained(small_resnet)
    whole = Evaluation(model, DATA, execution, images=45, batch=20)
    whole.result()
    shares = [lambda n: slice(0, -(-n // 2)), lambda n: slice(-(-n // 2), n)]
    parts = [Evaluation(model, DATA, execution, images=45, batch=20, share=share) for share in shares]
    assert len({tuple(part.turns()) for part in parts}) == 1
    torch.testing.assert_close(parts[0].totals + parts[1].totals, whole.totals, rtol=1e-6, atol=0)
    assert 0 < parts[0].totals[0] < whole.totals[0]


@pytest.mark.parametrize("execution", [PLAIN, BF16], ids=str)
def test_nothing_in_an_evaluation_waits_for_the_device(execution):
    evaluation = Evaluation(trained(small_resnet), DATA, execution, images=45, batch=20)
    with Reading() as reading:
        list(evaluation.turns())
    assert reading.found == []


def test_capturing_ahead_changes_nothing(graphs):
    model = trained(small_resnet)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    evaluation = Evaluation(model, DATA, GRAPH, images=45, batch=20)
    assert evaluation.preparation == "capturing"
    evaluation.prepare()
    assert evaluation.preparation == "" and evaluation.totals.tolist() == [0, 0] and model.training
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert Evaluation(model, DATA, PLAIN).preparation == ""
