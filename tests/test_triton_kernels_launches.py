"""What the GPU kernels are launched with, on six cards that are not there.

Forward and backward go the real way: PyTorch's custom operations, Triton's binding and specialising of arguments, its
compiler down to ptxas, which comes with it. Only the driver of the card is replaced, by one that takes notes where
another would launch. So what a card would refuse fails here: an argument that does not bind, a grid that is too large,
more shared memory than there is.

  python -m pytest -q tests/test_triton_kernels_launches.py              a sample, in seconds
  python -m pytest -q -m slow tests/test_triton_kernels_launches.py      every card, type, D and Dv, with T and states
                                                                         taking turns: half an hour, by estimate
  ALL_LAUNCHES=1 python -m pytest -q -m slow ...                         with every T and states: two hours, by estimate

With another Triton: pip install --no-deps --target FOLDER triton==3.6.0, and PYTHONPATH=FOLDER before the command. (The
interpreter of 3.6.0 fails with NumPy 2.4, of which it asks what that no longer does: pip install "numpy<2.4".)
"""

import itertools
import math
import os
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the GPU kernels cannot be compiled")
from experiments import benchmark_gpu as benchmark
from experiments import gpu_variants
from rebased import triton_kernels as gpu

pytestmark = pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter's process cannot compile")
REBASED = (0.0, 0.0, 1.0)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
KERNELS = ("state_kernel", "scan_kernel", "output_kernel", "query_kernel", "key_kernel")
TRITON_NAMES = {FP32: "*fp32", FP16: "*fp16", BF16: "*bf16"}


class Launch:
    """One note: the kernel's name, its grid, its arguments and their types by name, and what it was compiled to."""

    def __init__(self, source, metadata, grid, values, registers_and_stack):
        names = source.fn.arg_names
        self.name = source.fn.__name__
        self.grid = grid
        self.arguments = dict(zip(names, values, strict=True))
        self.types = dict(source.signature)
        self.aligned = {names[place] for (place,), hints in source.attrs.items() if ["tt.divisibility", 16] in hints}
        self.options = metadata
        self.registers, self.stack = registers_and_stack


class RecordingDriver:
    """Stands in for the driver of a card: Triton compiles for its capability, and launches become notes."""

    def __init__(self, capability):
        self.capability = capability
        self.target = gpu.triton.backends.compiler.GPUTarget("cuda", capability, 32)
        self.utils = self
        self.launches = []

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target

    def get_device_properties(self, device):
        return {"max_shared_mem": benchmark.SHARED[self.capability]}

    def load_binary(self, name, binary, shared, device):
        registers_and_stack = benchmark.registers_and_stack(binary)
        return "module", registers_and_stack, registers_and_stack[0], 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *values):
            self.launches.append(Launch(source, metadata, (x, y, z), values, function))

        return launch


def forget(module):
    """What kernels were compiled to for one card must not be launched on another."""
    from triton.runtime import driver

    driver._active = None
    for name in KERNELS:
        getattr(module, name).device_caches.clear()


class Cell(NamedTuple):
    """A card and sizes. q and k have type qk, v and o have type v; `states`: one comes in, and the final one has a
    gradient."""

    capability: int = 90
    qk: torch.dtype = BF16
    v: torch.dtype = BF16
    D: int = 16
    Dv: int = 64
    T: int = 2048
    states: bool = False
    heads: int = 3


def record(cell, module=gpu):
    """The launches of forward and backward on CPU tensors whose contents nobody reads."""
    from triton.runtime import driver

    recorder = RecordingDriver(cell.capability)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "INTERPRETED", True)  # or tensors on a CPU would be refused
        forget(module)
        driver.set_active(recorder)
        try:
            run_both_ways(cell, module)
        finally:
            forget(module)
    return recorder.launches


def run_both_ways(cell, module):
    rows = (1, cell.heads, cell.T)
    P = gpu.count_features(REBASED, cell.D)
    q, k = (torch.empty(*rows, cell.D, dtype=cell.qk, requires_grad=True) for _ in "qk")
    v = torch.empty(*rows, cell.Dv, dtype=cell.v, requires_grad=True)
    S = z = None
    if cell.states:
        S = torch.empty(1, cell.heads, P, cell.Dv, requires_grad=True)
        z = torch.empty(1, cell.heads, P, requires_grad=True)
    results = module.chunked_attention(q, k, v, REBASED, S, z, return_state=cell.states)
    results = results if cell.states else (results,)
    torch.autograd.backward(results, [torch.empty_like(x) for x in results])


# What is expected, computed anew: 32 features and 256 numbers of a state a program, segments of 512 tokens
def feature_blocks(cell):
    return math.ceil(cell.D * (cell.D + 1) / 2 / 32)


def count_slots(cell):
    """One for each segment, one more for the state at the end; none where nobody would read them."""
    segments = math.ceil(cell.T / 512)
    if cell.states:
        return segments + 1
    return segments if segments > 1 else 0


def expected_grids(cell):
    """[(kernel, programs)] of forward and backward."""
    heads = cell.heads
    slots = count_slots(cell)
    prefixes = []
    if slots:
        columns = math.ceil(32 * feature_blocks(cell) * (cell.Dv + 1) / 256)
        prefixes = [("state_kernel", heads * (slots - 1) * feature_blocks(cell)), ("scan_kernel", heads * columns)]
    rows = 128 if cell.v == BF16 else 64  # of a tile: factors of two bytes, and of four
    tiles = heads * math.ceil(cell.T / rows)
    return [*prefixes, ("output_kernel", tiles), ("query_kernel", tiles), *prefixes, ("key_kernel", tiles)]


def expected_tensors(cell):
    """{argument: (type, shape)}"""
    rows = (cell.heads, cell.T)
    features = 32 * feature_blocks(cell)
    return {
        **{name: (cell.qk, (*rows, cell.D)) for name in ("q", "k", "dq", "dk", "x")},
        **{name: (cell.v, (*rows, cell.Dv)) for name in ("v", "o", "do", "dv", "y")},
        **{name: (FP32, rows) for name in ("inv_den", "delta")},
        "rounding_error": (BF16, (*rows, cell.Dv)),
        "table": (FP32, (3, features)),
        "states": (FP32, (cell.heads, count_slots(cell), features * (cell.Dv + 1))),
    }


def check_tensors(launch, cell):
    """Every tensor has the type that its kernel was compiled for, lies without gaps, and starts at 16 bytes."""
    expected = expected_tensors(cell)
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor):
            assert (value.dtype, tuple(value.shape)) == expected[name], (launch.name, name)
            assert launch.types[name] == TRITON_NAMES[value.dtype], (launch.name, name)
            assert value.is_contiguous() and name in launch.aligned, (launch.name, name)


def check_numbers(launch, cell):
    """T, slots and first are integers of 32 bits (a 1 is compiled in), the parabola's numbers are float32."""
    integers = {"T": cell.T, "slots": count_slots(cell), "first": 0 if cell.states else 1}
    for name in integers.keys() & launch.arguments.keys():
        assert launch.arguments[name] == integers[name], (launch.name, name)
        assert launch.types[name] == ("constexpr" if integers[name] == 1 else "i32"), (launch.name, name)
    parabola = {"scale": cell.D**-0.5, "shift": 0.0, "floor": 0.0}  # s² = (q·k/√D)²
    for name in parabola.keys() & launch.arguments.keys():
        assert launch.arguments[name] == pytest.approx(parabola[name]) and launch.types[name] == "fp32"


def check_resources(launch, cell):
    """What a multiprocessor has; and at the sizes of the models, what is fast there."""
    assert 0 < launch.grid[0] < 2**31 and launch.grid[1:] == (1, 1)  # only the first axis may exceed 65,535
    assert launch.options.shared <= benchmark.SHARED[cell.capability], (launch.name, launch.options.shared)
    assert launch.registers * 32 * launch.options.num_warps <= 65536, (launch.name, launch.registers)
    if (cell.D, cell.Dv) == (16, 64):
        assert launch.stack <= allowed_stack(launch, cell), (launch.name, launch.stack)
        if two_programs_should_fit(launch, cell):
            assert launch.registers <= 128, (launch.name, launch.registers)


def two_programs_should_fit(launch, cell):
    """On an H100 and a B200 products come from shared memory; other cards need registers for their factors."""
    cards = (90, 100) if cell.qk == BF16 else (90,)
    return cell.v == BF16 and cell.capability in cards and launch.name in ("output_kernel", "query_kernel")


def allowed_stack(launch, cell):
    """Bytes a thread. On an H100, and in bfloat16 on every card, nothing is spilled. With other types, or a single
    token, ptxas puts up to four registers on the stack of some cards."""
    if cell.capability == 90 or (cell.qk == BF16 and cell.T > 1):
        return 0
    return 16


def check(cell):
    launches = record(cell)
    assert [(launch.name, launch.grid[0]) for launch in launches] == expected_grids(cell)
    for launch in launches:
        check_tensors(launch, cell)
        check_numbers(launch, cell)
        check_resources(launch, cell)


@pytest.mark.parametrize("cell", [
    Cell(90, T=513, states=True), Cell(86, FP16, FP16, D=8, Dv=5, T=1), Cell(120, FP32, BF16, T=1),
], ids=str)
def test_a_sample_of_cards_and_sizes(cell):
    check(cell)


TYPES = [(BF16, BF16), (FP32, BF16), (FP16, FP16), (FP32, FP32)]  # of q and k, of v
SIZES = list(itertools.product((8, 16, 32), (5, 21, 64, 128)))  # D, Dv
TURNS = [(2048, False), (513, True), (1, False), (2048, True), (513, False), (1, True)]  # T, states


@pytest.mark.slow
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("capability", benchmark.SHARED)
def test_every_card_type_and_size(capability, types):
    """With another T for each D and Dv, and in turns for each card and type."""
    first_turn = list(benchmark.SHARED).index(capability) + TYPES.index(types)
    for number, (D, Dv) in enumerate(SIZES):
        turns = [TURNS[(first_turn + number) % len(TURNS)]]
        if os.environ.get("ALL_LAUNCHES"):
            turns = TURNS
        for T, states in turns:
            check(Cell(capability, *types, D, Dv, T, states))


@pytest.mark.slow
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("capability", benchmark.SHARED)
def test_the_sizes_of_the_models_on_every_card(capability, types):
    check(Cell(capability, *types, T=2048))


@pytest.mark.slow
@pytest.mark.parametrize("cell", [
    Cell(T=1_000_000, states=True, heads=2),
    Cell(T=1, heads=100_000),
    Cell(T=2**24 - 513, heads=1, Dv=128),  # all that why_not lets through
], ids=str)
def test_long_sequences_and_many_heads(cell):
    """Nothing is read, so that memory is never touched."""
    check(cell)


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_variants.VARIANTS)
def test_the_launches_of_variants(name):
    """Only an H100 is to decide. dk and dv, told to do with 128 registers, spill some dozens of bytes."""
    for launch in record(Cell(T=2048, states=True), gpu_variants.load(name)):
        assert launch.name == "key_kernel" or launch.stack == 0, (launch.name, launch.stack)
        if launch.name == "key_kernel" and launch.options.maxnreg:
            assert launch.arguments["STEP"] == 32 and launch.registers <= 128 and launch.stack <= 100


def test_the_operations_of_pytorch_have_these_signatures():
    """PyTorch infers them from annotations: a release that reads these otherwise would be seen here."""
    tensors = "Tensor q, Tensor k, Tensor v, "
    assert str(gpu.forward._opoverload._schema) == (
        f"rebased::triton_forward({tensors}Tensor? initial, Tensor table, float[] coefficients, SymInt segment, "
        "bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    assert str(gpu.backward._opoverload._schema) == (
        f"rebased::triton_backward(Tensor do, Tensor? d_final, {tensors}Tensor table, Tensor o, "
        "Tensor rounding_error, Tensor inv_den, Tensor states, float[] coefficients, SymInt segment, "
        "bool had_initial) -> (Tensor, Tensor, Tensor, Tensor)"
    )
