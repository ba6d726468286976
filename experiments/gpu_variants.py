"""Three other ways to run the GPU kernels, kept until a card has decided.

  python -m experiments.benchmark_gpu speed --variants     times each beside rebased/triton_kernels.py, with its errors

By the compiled code each should gain a little; whether it does, only a clock can say. What wins is taken into
rebased/triton_kernels.py, and this file is deleted. So a variant is not an option of the kernels, which would then have
to explain it, but a list of replacements in their text, and `load` makes a module of the changed text. A replacement
that no longer fits raises an error: change it together with the kernels.
"""

import functools
import importlib.util
import tempfile
from pathlib import Path

from rebased import triton_kernels

SOURCE = Path(triton_kernels.__file__).read_text(encoding="utf-8")

# dk and dv hold two sums and two tiles of weights: some 200 registers a thread, so that one program fills a
# multiprocessor. With half as many queries a step, and 128 registers by order, two share it; what does not fit is
# spilled, some dozens of bytes a thread.
SHORT_STEPS = [(
    """        arguments["num_stages"] = 1
    return arguments
""",
    """        arguments["num_stages"] = 1
    if kernel is key_kernel:
        arguments["STEP"] = 32
        arguments["maxnreg"] = 128
    return arguments
""",
)]

# Without what rounding took from o, a tenth of the bytes is saved, and δ comes from an o of three digits: dq gets
# worse, most where a normaliser is tiny.
NO_ROUNDING_ERROR = [
    ("    lost = (exact - rounded.to(tl.float32)).to(rounding_error.dtype.element_ty)\n", ""),
    ("    tl.store(rounding_error + i * DV + e, lost, mask=mask)\n", ""),
    ("    o_tile += tl.load(rounding_error + i * DV + e, mask=row_mask, other=0.0).to(tl.float32)\n", ""),
    (
        "    rounding_error = torch.empty_like(v, dtype=torch.bfloat16)\n",
        "    rounding_error = v.new_empty(0, dtype=torch.bfloat16)\n",
    ),
]

# The tiles round S to bfloat16 when they read it. If the scan rounds it when it writes, half of these bytes are never
# moved nor kept for the backward pass, and in bfloat16 the numbers stay the same. The sums and z stay float32: a slot
# is then S, two bytes each, and z, four bytes each: P_PAD·(DV + 2) places of two bytes.
HALF_STATES = [
    ("segment) * P_PAD * (DV + 1)\n", "segment) * P_PAD * (DV + 2)\n"),
    ("after) * P_PAD * (DV + 1)\n", "after) * P_PAD * (DV + 2)\n"),
    (
        "z = tl.load(states + P_PAD * DV + f)\n",
        "z = tl.load((states + P_PAD * DV).to(tl.pointer_type(tl.float32), bitcast=True) + f)\n",
    ),
    (
        "r = tl.load(states + P_PAD * DV + f)\n",
        "r = tl.load((states + P_PAD * DV).to(tl.pointer_type(tl.float32), bitcast=True) + f)\n",
    ),
    (
        "def scan_kernel(states, slots, STATE: tl.constexpr,",
        "def scan_kernel(states, rounded, slots, STATE: tl.constexpr, S_SIZE: tl.constexpr,",
    ),
    (
        """        tl.store(where, tl.cumsum(x, 0) + total[None, :], mask=mask)
""",
        """        prefix = tl.cumsum(x, 0) + total[None, :]
        tl.store(where, prefix, mask=mask & (slot[:, None] == slots - 1))  # the final state
        to = rounded + (n * slots + slot[:, None]) * (2 * STATE - S_SIZE)
        in_S = column[None, :] < S_SIZE
        tl.store(to + column[None, :], prefix.to(rounded.dtype.element_ty), mask=mask & in_S)
        z = (to + S_SIZE).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(z + (column[None, :] - S_SIZE), prefix, mask=mask & (column[None, :] >= S_SIZE))
""",
    ),
    (
        """    if slots == 0:
        return
    if edge is None:
        states[:, 0] = 0
    else:
        states[:, 0] = edge
    if slots == 1:
        return
    P_PAD = table.shape[1]
""",
        """    P_PAD = table.shape[1]
    rounded = states
    states = x.new_empty(N, slots, P_PAD * (y.shape[2] + 1), dtype=torch.float32)
    if slots == 0:
        return states
    if edge is None:
        states[:, 0] = 0
    else:
        states[:, 0] = edge
""",
    ),
    (
        """    state_kernel[grid](
        x, y, inv_den, delta, table, states, T, slots, REVERSE=reverse, **arguments
    )
""",
        """    if slots > 1:
        state_kernel[grid](
            x, y, inv_den, delta, table, states, T, slots, REVERSE=reverse, **arguments
        )
""",
    ),
    (
        "    scan_kernel[grid](states, slots, STATE=STATE, ROWS=ROWS, COLUMNS=COLUMNS)\n",
        "    sizes = {'STATE': STATE, 'S_SIZE': P_PAD * y.shape[2]}\n"
        "    scan_kernel[grid](states, rounded, slots, **sizes, ROWS=ROWS, COLUMNS=COLUMNS)\n"
        "    return states\n",
    ),
    ("        launch_states(\n", "        sums = launch_states(\n"),
    ("final.copy_(states[:, -1])", "final.copy_(sums[:, -1])"),
    ("d_initial.copy_(mirror[:, -1])", "d_initial.copy_(sums[:, -1])"),
    (
        "    states = q.new_empty(N, slots, STATE, dtype=torch.float32)\n",
        "    states = q.new_empty(N, slots, STATE + table.shape[1], dtype=torch.bfloat16)\n",
    ),
]

VARIANTS = {
    "dk, dv: 32 queries, 128 regs": SHORT_STEPS,
    "without rounding_error": NO_ROUNDING_ERROR,
    "states in bfloat16": HALF_STATES,
    "all three": SHORT_STEPS + NO_ROUNDING_ERROR + HALF_STATES,
}
FOLDER = tempfile.TemporaryDirectory(prefix="gpu_variants_")  # Triton reads the text of its kernels again


@functools.cache
def load(name):
    """The module rebased.triton_kernels with the replacements of VARIANTS[name], and operations of its own."""
    number = list(VARIANTS).index(name)
    text = SOURCE
    for old, new in [*VARIANTS[name], ('"rebased::', f'"rebased_variant_{number}::')]:
        if old not in text:
            raise ValueError(f"{name}: rebased/triton_kernels.py has no longer the text {old.strip()!r}")
        text = text.replace(old, new)
    path = Path(FOLDER.name) / f"variant_{number}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"triton_kernels_variant_{number}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
