"""The kernels of channel sums are right under Triton's interpreter, and compile well for an H100.

The kernels themselves are tested on a CPU by ``interpreted_sums.py``, in a process of its own, and on a GPU here.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from properties.support.triton import assert_passes_interpreted, needs_triton, needs_triton_and_gpu

H100 = 132  # multiprocessors
SHARED_MEMORY_BYTES = 227 * 1024  # of a multiprocessor of an H100
REGISTERS = 65536
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@needs_triton
def test_kernels_under_the_interpreter():
    assert_passes_interpreted(str(Path(__file__).with_name("interpreted_sums.py")))


def compiled_for_an_h100(kernel, pointers: dict[str, str], integers: dict[str, int], constants: dict[str, object]):
    """Return a kernel, compiled as a launch with these arguments would compile it. Other arguments are float32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from memcnn.kernels.channel_sums import WARPS

    names = kernel.arg_names
    signature = dict.fromkeys(names, "fp32") | pointers
    signature |= dict.fromkeys(integers, "i32") | dict.fromkeys(constants, "constexpr")
    aligned = [*pointers, *(name for name, value in integers.items() if value % 16 == 0)]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})


def assert_fast(compiled, *, copies: int, threads: int) -> None:
    """Check widths and number of the copies in advance, the order of the last program, and that two programs fit."""
    from triton import knobs

    code = compiled.asm["ptx"]
    widths = re.findall(r"cp\.async\.c[ag]\S* \[[^]]*\], \[[^]]*\], (\w+)", code)
    assert len(widths) >= copies and set(widths) == {"0x10"}, widths
    loads = re.findall(r"ld\.global\.cg\S*", code)
    assert loads and set(loads) == {"ld.global.cg.v4.b32"}, loads
    (atomic,) = re.finditer(r"atom\.\S*", code)
    assert atomic[0] == "atom.global.gpu.acq_rel.add.u32"
    before = code[: atomic.start()]
    assert before.rindex("bar.sync") > before.rindex("st.global")
    assert "st.global" in before and "ld.global.cg" not in before
    binary = Path(compiled.metadata_group[f"{compiled.name}.cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{name}:(\d+)", done.stdout + done.stderr)[1]) for name in ("REG", "STACK"))
    assert 2 * threads * registers <= REGISTERS and stack == 0, done.stdout
    assert 2 * (compiled.metadata.shared + 1024) <= SHARED_MEMORY_BYTES


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("shape", "dtype", "gradient_dtype"),
    [
        ((100, 64, 32, 32), torch.float32, torch.float32),
        ((100, 64, 32, 32), torch.float32, torch.bfloat16),
        ((100, 16, 32, 32), torch.bfloat16, torch.bfloat16),
        ((99, 56, 16, 16), torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_kernels_compile_for_an_h100(shape, dtype, gradient_dtype):
    """All copies of images are 16 bytes wide, nothing is spilled, and a multiprocessor has room for two programs."""
    from memcnn.kernels import channel_sums

    threads, rows = 32 * channel_sums.WARPS, shape[0] * shape[2] * shape[3]
    division = channel_sums.divide(shape, dtype.itemsize, H100)
    pointers = {"x": POINTERS[dtype], "partial": "*fp32", "counter": "*i32", "result": "*fp32"}
    compiled = compiled_for_an_h100(
        channel_sums.statistics_kernel,
        pointers | {"running_mean": "*fp32", "running_var": "*fp32", "count": "*i64", "copy": "*fp32"},
        {"rows": rows, "rows_each": division.rows_each},
        dict(C=shape[1], STAGES=channel_sums.STATISTICS_STAGES, COPY=True, UPDATE=True, **division.constants),
    )
    assert_fast(compiled, copies=channel_sums.STATISTICS_STAGES, threads=threads)

    division = channel_sums.divide(shape, min(dtype.itemsize, gradient_dtype.itemsize), H100)
    pointers |= {"output_gradient": POINTERS[gradient_dtype]} | dict.fromkeys(("statistics", "weight", "bias"), "*fp32")
    compiled = compiled_for_an_h100(
        channel_sums.gradient_kernel,
        pointers,
        {"rows": rows, "rows_each": division.rows_each},
        dict(C=shape[1], STAGES=channel_sums.GRADIENT_STAGES, RELU=True, **division.constants),
    )
    assert_fast(compiled, copies=2 * channel_sums.GRADIENT_STAGES, threads=threads)


@needs_triton
@pytest.mark.parametrize("processors", [1, 80, H100, 1000])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels", [1, 3, 16, 33, 56, 112, 256, 1024])
def test_a_division_has_each_row_and_channel_once(channels, itemsize, processors):
    from memcnn.kernels.channel_sums import COUNTERS, divide

    for n, height, width in [(1, 1, 1), (3, 5, 7), (100, 32, 32), (64, 112, 112)]:
        division, rows = divide((n, channels, height, width), itemsize, processors), n * height * width
        assert (division.splits - 1) * division.rows_each < rows <= division.splits * division.rows_each
        assert (division.blocks - 1) * division.channels < channels <= division.blocks * division.channels
        assert division.rows_each % 16 == 0
        constants = division.constants
        assert (constants["TILES"] - 1) * division.rows < division.rows_each <= constants["TILES"] * division.rows
        assert constants["LOADS"] * constants["LOADED_SPLITS"] >= division.splits
        assert division.blocks <= COUNTERS
        assert division.splits * division.blocks <= max(2 * processors, division.blocks)


@needs_triton_and_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(100, 64, 32, 32), (100, 16, 32, 32), (33, 56, 16, 15), (7, 300, 5, 3)], ids=str)
def test_on_a_gpu_the_sums_are_right_and_repeat_their_bits(shape, dtype):
    from memcnn.kernels.channel_sums import COUNTERS, batch_statistics, gradient_sums

    channels, device = shape[1], torch.device("cuda")
    x, gradient = (
        torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    weight, bias = (torch.randn(channels, device=device) for _ in range(2))
    layer = torch.nn.BatchNorm2d(channels, device=device)
    running_mean, running_var, count = (value.clone() for value in layer.buffers())
    options = dict(
        counter=torch.zeros(COUNTERS, dtype=torch.int32, device=device),
        processors=torch.cuda.get_device_properties(device).multi_processor_count,
    )
    results = []
    for _ in range(50):
        layer(x.float())
        statistics = batch_statistics(
            x,
            eps=layer.eps,
            momentum=layer.momentum,
            running_mean=running_mean,
            running_var=running_var,
            count=count,
            **options,
        )
        sums = gradient_sums(gradient, x, statistics, weight, bias, relu=True, **options)
        results.append(torch.cat([statistics, sums]))
    assert all(torch.equal(result, results[0]) for result in results)
    assert not options["counter"].any()
    torch.testing.assert_close([running_mean, running_var, count], list(layer.buffers()), rtol=1e-5, atol=1e-6)

    def rows(values):
        return values.permute(0, 2, 3, 1).reshape(-1, channels)

    variance, mean = torch.var_mean(rows(x).double(), 0, correction=0)
    expected = torch.stack([mean, (variance + layer.eps).rsqrt()])
    torch.testing.assert_close(statistics.double(), expected, rtol=1e-5, atol=1e-6)
    mean, scale = statistics.double()
    xhat = (rows(x).double() - mean) * scale
    z = xhat * weight + bias
    terms = torch.stack([rows(gradient).double(), rows(gradient) * xhat])
    expected = torch.where(z > 0, terms, 0).sum(1)
    undecided = torch.where(z.abs() < 1e-5, terms, 0).abs().sum(1)  # rounding decides on which side of the kink z is
    assert ((sums - expected).abs() <= 1e-5 * terms.abs().sum(1) + 1e-6 + undecided).all()
