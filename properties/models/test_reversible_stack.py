"""``to_reversible``: the reversible stack computes the two streams of its docstring, and the report is right."""

import copy
import pickle
import random
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memcnn
from memcnn._torchvision import torchvision
from memcnn.memory import measure_step_memory
from memcnn.models.reversible_stack import ReversibleStack, TwoStreams
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.reference import assert_flat_in_depth, assert_laws
from properties.support.residual import Residual, convert, residual_block
from properties.support.twin import assert_like_twin, backward, data, plain_twin


def encoder(depth=1, *, batch_first=True, norm=True, **options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=batch_first, **options)
    last = nn.LayerNorm(8) if norm else None
    return nn.TransformerEncoder(layer, depth, norm=last, enable_nested_tensor=False)


def seeded(module, *args, **kwargs):
    torch.manual_seed(1)
    return module(*args, **kwargs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_one_transformer_layer_computes_the_same_with_masks_and_dropout(batch_first, training):
    net, x = encoder(batch_first=batch_first).train(training), torch.randn(3, 5, 8, requires_grad=True)
    length = 5 if batch_first else 3
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    padding = torch.zeros(8 - length, length)
    padding[0, -1] = float("-inf")
    stack, report = memcnn.to_reversible(net, x)
    for kwargs in ({}, {"mask": mask}, {"mask": mask, "src_key_padding_mask": padding}):
        assert relative_error(seeded(stack, x, **kwargs), seeded(net, x, **kwargs)) <= tolerance(x.dtype, depth=4)
    assert report.output_difference <= tolerance(x.dtype, depth=4)
    causal, plain = (seeded(stack, x, **kwargs) for kwargs in ({"mask": mask}, {}))
    assert relative_error(causal, plain) > 1e-2, "the mask has an effect"


def test_a_long_stack_computes_the_two_documented_streams():
    blocks, x = [Residual(p=0.0) for _ in range(5)], torch.randn(4, 6)
    stack = convert(*copy.deepcopy(blocks))
    y1 = y2 = x
    for f, g in pairwise([*blocks, None]):
        if f in blocks[::2]:
            y1 = y1 + f.function(y2)
            y2 = y2 + g.function(y1) if g is not None else y2
    assert relative_error(stack(x), y1 + y2 - x) <= tolerance(x.dtype, depth=5)
    assert all(
        torch.equal(stack.state_dict()[name].float(), value.float()) for name, value in stack.state_dict().items()
    )


def test_the_stack_has_the_blocks_own_parameters_each_once():
    blocks = [Residual(), Residual(), Residual()]
    stack = convert(*blocks)
    assert {id(p) for p in stack.parameters()} == {id(p) for block in blocks for p in block.parameters()}
    assert {id(b) for b in stack.buffers()} == {id(b) for block in blocks for b in block.buffers()}
    assert len(stack.state_dict()) == sum(len(block.state_dict()) for block in blocks)


def test_gradients_and_state_equal_the_twins():
    assert_like_twin(convert(*(Residual() for _ in range(5))).double(), backward, data(4, 6), depth=8)


def test_memory_is_flat_in_depth():
    def make(depth: int) -> nn.Module:
        return convert(*(Residual(p=0.0) for _ in range(2 * depth)))

    assert_flat_in_depth(make, torch.randn(4, 6), depths=(2, 6))


def test_the_chain_meets_the_laws():
    chain = convert(*(Residual(p=0.0) for _ in range(4))).parts[0].chain
    assert_laws(chain, torch.randn(8, 6), laws=("inverse", "state"))


def test_the_report_predicts_what_it_measures():
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    stack, report = memcnn.to_reversible(encoder(4), torch.randn(3, 5, 8), {"mask": mask})
    assert report.predicted_bytes == report.measured_bytes
    x = torch.randn(3, 5, 8, requires_grad=True)
    step = measure_step_memory(stack, lambda: stack(x, mask=mask).square().mean().backward())
    assert report.measured_bytes[1] == pytest.approx(step.activation_bytes, rel=0.2)
    assert report.measured_bytes[0] > 2 * report.measured_bytes[1]
    parameters = sum(p.numel() for p in stack.parameters())
    assert report.parameters == (parameters, parameters)
    for line in ("reversible now, 4:", "8 residual functions work on two streams in turn", f"{parameters:,} before",
                 f"measured: {report.measured_bytes[0]:,} bytes before",
                 f"difference of the output for the sample: {report.output_difference:.1e}"):  # fmt: skip
        assert line in str(report)


@pytest.mark.parametrize("training", [True, False])
def test_functional_dropout_follows_the_mode(training):
    block, x = Residual(), torch.randn(4, 6)
    stack = convert(block).train(not training).train(training)
    assert torch.equal(seeded(stack, x), seeded(block.train(training), x))
    torch.manual_seed(2)
    assert torch.equal(stack(x), seeded(stack, x)) is not training


def test_conversion_leaves_no_trace():
    blocks = nn.Sequential(Residual(), Residual())
    blocks[1].norm.eval()
    modes = [module.training for module in blocks.modules()]
    state, names = copy.deepcopy(blocks.state_dict()), [set(vars(block)) for block in blocks]
    generators = torch.get_rng_state(), random.getstate()
    stack, _ = memcnn.to_reversible(blocks, torch.ones(4, 6))
    assert [module.training for module in blocks.modules()] == modes
    assert [set(vars(block)) for block in blocks] == names
    assert all(torch.equal(value, state[name]) for name, value in blocks.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert all(p.grad is None for p in stack.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stack: pickle.loads(pickle.dumps(stack))])
def test_copies_compute_the_same_from_their_own_parameters(copied):
    stack, x = convert(Residual(p=0.0), Residual(p=0.0)), torch.randn(4, 6)
    other = copied(stack)
    assert torch.equal(other(x), stack(x))
    nn.init.zeros_(next(other.parameters()))
    assert not torch.equal(other(x), stack(x))


class WithReLU(Residual):
    """A residual block with a ReLU after its sum."""

    def forward(self, x):
        return F.relu(x + self.function(x))


def test_a_pickle_that_names_the_former_module_is_read():
    blocks, x = [WithReLU(p=0.0) for _ in range(3)], torch.randn(4, 6)
    stack, report = memcnn.to_reversible(blocks, x, move_relu=True, measure=False)
    new = pickle.dumps((stack.eval(), report), protocol=2)
    old = re.sub(rb"memcnn\.models\.(two_streams|stack_report)\n", b"memcnn.models.reversible_stack\n", new)
    assert len(re.findall(rb"cmemcnn.models.reversible_stack\n", old)) == 5, "every module of a stack, and the report"
    other, report = pickle.loads(old.replace(b"stack\nAfterReLU\n", b"stack\n_AfterReLU\n"))
    assert torch.equal(other(x), stack(x)) and len(report.converted) == 3


def test_a_block_that_occurs_twice_keeps_one_set_of_parameters():
    block, x = Residual(p=0.0).eval(), torch.randn(4, 6)
    stack = convert(block, block)
    assert len(list(stack.parameters())) == len(list(block.parameters()))
    assert relative_error(stack(x), block(block(x))) <= tolerance(x.dtype, depth=2)


class Masked(Residual):
    """A residual block with a mask."""

    def forward(self, x, mask=None):
        return x + self.function(x if mask is None else x * mask)


def test_the_stack_takes_the_keyword_arguments_of_the_sample():
    blocks, mask, x = nn.Sequential(Masked(p=0.0), Residual(p=0.0)), torch.arange(6.0), torch.randn(4, 6)
    stack, _ = memcnn.to_reversible(blocks, x, {"mask": mask}, measure=False)
    blocks.eval(), stack.eval()
    assert relative_error(stack(x, mask=2 * mask), blocks[1](blocks[0](x, 2 * mask))) <= tolerance(x.dtype, depth=2)
    with pytest.raises(TypeError, match="mask"):
        stack(x)
    with pytest.raises(TypeError, match="no branch whose forward takes the keyword argument 'msk'|'msk'"):
        stack(x, msk=mask)
    with pytest.raises(TypeError, match="no block of the stack takes the keyword argument 'msk'"):
        memcnn.to_reversible(blocks, x, {"msk": mask})


def test_a_resnet_stage_moves_its_relu_and_keeps_its_first_block():
    stage, x = torchvision.models.resnet34(num_classes=2).layer2.eval(), torch.randn(1, 64, 8, 8)
    with pytest.raises(ValueError, match=r"4 of 4 .*\n  0: BasicBlock: its sum add has no skip connection"):
        memcnn.to_reversible(stage, x)
    stack, report = memcnn.to_reversible(stage, x, keep_others=True, move_relu=True)
    assert [type(part) for part in stack.parts] == [type(stage[0]), TwoStreams]

    def branch(block, x):
        return block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))

    x1 = x2 = h = stage[0](x)
    x1 = x1 + branch(stage[1], x2)
    x2 = x2 + branch(stage[2], x1.relu())
    x1 = x1 + branch(stage[3], x2.relu())
    assert relative_error(stack(x), (x1 + x2 - h).relu()) <= tolerance(x.dtype, depth=8)
    assert report.kept[0].startswith("0: BasicBlock: its sum add") and len(report.converted) == 3
    assert "keeps negative values" in str(report)
    _, report = memcnn.to_reversible([stage[1]], h, move_relu=True, measure=False)
    assert report.output_difference <= tolerance(x.dtype, depth=2), "a single block computes the same"
    assert not any("ReLU" in line for line in report.changes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.swin_transformer.SwinTransformerBlock(
            8, 2, [2, 2], [0, 0], stochastic_depth_prob=0.5
        ),
        lambda: torchvision.models.convnext.CNBlock(8, 1e-1, 0.5),
    ],
    ids=["swin", "convnext"],
)
def test_blocks_of_torchvision_with_stochastic_depth(make):
    block = make()
    x = torch.randn(4, 4, 4, 8) if len(list(block.children())) > 2 else torch.randn(4, 8, 4, 4)
    stack, _ = memcnn.to_reversible([block], x, measure=False)
    assert relative_error(seeded(stack, x), seeded(block, x)) <= tolerance(x.dtype, depth=2)


def test_a_decoder_takes_the_memory_as_a_keyword_argument():
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, norm_first=True, batch_first=True)
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 4, 8, requires_grad=True)
    decoder = nn.TransformerDecoder(layer, 2, nn.LayerNorm(8))
    stack, report = memcnn.to_reversible(decoder, x, {"memory": memory}, measure=False)
    self_attention, cross_attention, feed_forward = stack.parts[0].chain[0]._fn.Fm, *_second_and_third(stack)
    first = decoder.layers[0]
    h = x + self_attention(x)
    h = h + cross_attention(h, memory=memory)
    h = h + feed_forward(h)
    assert relative_error(h, first(x, memory)) <= tolerance(x.dtype, depth=3)
    assert report.converted[0] == "0: TransformerDecoderLayer, 3 residual functions"
    wanted, got = (torch.autograd.grad(run(x, memory=memory).square().sum(), memory)[0] for run in
                   (plain_twin(stack), stack))  # fmt: skip
    assert got.abs().max() > 0 and relative_error(got, wanted) <= tolerance(x.dtype, depth=6)
    with pytest.raises(ValueError, match="fails on the sample: TypeError: .*missing 1 required .*'memory'"):
        memcnn.to_reversible(decoder, x)
    post_norm = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match="its last operation is norm3, not a sum"):
        memcnn.to_reversible(post_norm, x, {"memory": memory})


def _second_and_third(stack: ReversibleStack) -> tuple[nn.Module, nn.Module]:
    return stack.parts[0].chain[0]._fn.Gm, stack.parts[0].chain[1]._fn.Fm


def test_blocks_that_share_a_layer_train_as_their_twin():
    blocks = [Residual(p=0.0) for _ in range(3)]
    for block in blocks:
        block.linear = blocks[0].linear
    stack = convert(*blocks).double()
    assert len(list(stack.parameters())) == sum(len(list(block.parameters())) for block in blocks) - 2
    assert_like_twin(stack, backward, data(4, 6), depth=6)


def test_a_block_that_returns_a_tuple_is_refused_before_the_next_block_gets_it():
    class InTuple(Residual):
        def forward(self, x):
            return (super().forward(x),)

    with pytest.raises(ValueError, match=r"block 0: InTuple returns a tuple, but a stack hands one tensor.*let its"):
        convert(InTuple(), Residual())


def test_blocks_with_the_normalisation_first_or_last_can_form_one_stack():
    before, after, x = Residual(p=0.0), WithReLU(p=0.0), torch.randn(4, 6)
    stack, report = memcnn.to_reversible([before, after], x, move_relu=True, measure=False)
    assert relative_error(stack(x), after(before(x))) <= tolerance(x.dtype, depth=2)
    assert any("the same sums as before" in line for line in report.changes)
    _, report = memcnn.to_reversible([after, before], x, move_relu=True, measure=False)
    assert report.output_difference > 1e-3 and "keeps negative values" in str(report)
    assert not any("the same sums as before" in line for line in report.changes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_conversion_without_gradients_is_the_same(mode):
    blocks, mask = nn.Sequential(Masked(), Residual()), torch.arange(6.0)
    with mode():
        stack, report = memcnn.to_reversible(blocks, torch.randn(4, 6), {"mask": mask})
        assert not torch.is_grad_enabled()
    assert report.predicted_bytes == report.measured_bytes
    assert_like_twin(convert(Residual(p=0.0), Residual(p=0.0)).double(), backward, data(4, 6), depth=4)
    stack(torch.randn(4, 6), mask=mask).sum().backward()
    assert all(p.grad is not None for p in blocks.parameters())


def test_dropout_that_is_always_on_is_no_drift():
    def forward(self, x):
        return x + F.dropout(self.function(x), 0.5)

    blocks = [residual_block(forward=forward) for _ in range(3)]
    _, report = memcnn.to_reversible(blocks, torch.randn(4, 6))
    assert report.rebuild_error <= tolerance(torch.float32, depth=3)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_a_converted_decoder_takes_its_place_in_a_transformer():
    net = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, norm_first=True, batch_first=True)
    source, target = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    for kwargs in ({}, {"tgt_mask": mask}):
        twin = copy.deepcopy(net)
        twin.encoder, _ = memcnn.to_reversible(twin.encoder, source, measure=False)
        twin.decoder, _ = memcnn.to_reversible(twin.decoder, target, {"memory": source, **kwargs}, measure=False)
        wanted = twin.decoder(target, memory=net.encoder(source), **kwargs)
        assert relative_error(twin(source, target, **kwargs), wanted) <= tolerance(target.dtype, depth=8)
    with pytest.raises(TypeError, match="'tgt_mask' is None or missing in this call, but TransformerDecoderLayer was"):
        twin(source, target)
    for args, kwargs in (((source,), {"memory": source}), ((None,) * 8, {})):
        with pytest.raises(TypeError, match=r"by position.* are \['memory', 'tgt_mask', .*give each argument once"):
            twin.decoder(target, *args, **kwargs)


def test_a_block_that_fails_in_a_training_step_is_named_by_the_measurement():
    def forward(self, x):
        x += self.function(x)
        return x

    blocks, x = [residual_block(forward=forward)], torch.randn(4, 6)
    with pytest.raises(ValueError, match="a training step of the blocks .* fails on the sample: RuntimeError: .*False"):
        memcnn.to_reversible(blocks, x)
    stack, _ = memcnn.to_reversible(blocks, x, measure=False)
    assert relative_error(stack.eval()(x), blocks[0].eval()(x.clone())) <= tolerance(x.dtype, depth=2)


@pytest.mark.parametrize(
    ("module", "sample", "error", "message"),
    [
        (nn.Linear(6, 6), torch.ones(2, 6), TypeError, r"got a Linear; wanted the blocks themselves"),
        ([], torch.ones(2, 6), ValueError, "a stack without a block"),
        ([Residual()], torch.ones(2, 6, dtype=torch.int64), TypeError, "sample must be a floating-point tensor"),
        ([Residual()], [1.0], TypeError, "sample must be a floating-point tensor.*: got list"),
        (
            [Residual().to("meta")],
            torch.ones(2, 6, device="meta"),
            ValueError,
            "sample is on the meta device and has no",
        ),
        (
            [Residual().to("meta")],
            torch.ones(2, 6),
            ValueError,
            "block 0: Residual fails on the sample: RuntimeError: ",
        ),
        ([Residual()], torch.ones(2, 6).double(), ValueError, "block 0: Residual fails on the sample: RuntimeError: "),
    ],
)
def test_modules_that_form_no_stack_are_refused(module, sample, error, message):
    with pytest.raises(error, match=message):
        memcnn.to_reversible(module, sample)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_block_and_keyword_arguments_in_a_list_are_refused():
    with pytest.raises(ValueError, match="0: RecursiveScriptModule: torch.jit has compiled it.* the original module"):
        memcnn.to_reversible([torch.jit.script(nn.Linear(6, 6))], torch.ones(2, 6))
    kept = [torch.jit.script(nn.Linear(6, 6)), Residual()]
    stack, _ = memcnn.to_reversible(kept, torch.ones(2, 6), keep_others=True, measure=False)
    assert stack(torch.ones(2, 6)).shape == (2, 6)
    with pytest.raises(TypeError, match="kwargs must be a dictionary of keyword arguments .*: got list"):
        memcnn.to_reversible([Residual()], torch.ones(2, 6), ["mask"])


def test_a_stream_that_drifts_is_reported():
    blocks = [Residual(p=0.0) for _ in range(8)]
    for block in blocks:
        nn.init.constant_(block.gain, 100)
    with pytest.warns(UserWarning, match="rebuilds its streams with a relative error of"):
        convert(*blocks)
