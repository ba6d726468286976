"""3a · How many numbers a layer must keep                               (warm-up, 10 minutes)

Connects to 03_model.py, "Attention as a mixer" and "What one more token costs".

To say one more token, a layer needs its state. Count the numbers in it for one sequence of T
tokens, before you look at one.

Write
  state_numbers(mixer, T, d_model, heads, feature_dim)   of one layer
  crossover(kernel, d_model, heads, feature_dim)         from which T on softmax keeps more

Hint: the docstrings of ShortConv, SoftmaxAttention and KernelAttention say what their states are. A
kernel's P is `kernels.KERNELS[mixer](feature_dim).num_features`, and Dv is d_model // heads.

Check: python -m pytest course -k 3a
"""

from rebased import kernels  # noqa: F401  (01_kernels.py)

def state_numbers(mixer, T, d_model, heads, feature_dim=16):
    """How many numbers the state of one layer holds after T tokens of one sequence: int.

    mixer: "short_conv", "attention" (softmax), or the name of a kernel.
    """
    # Your code.


def crossover(kernel, d_model, heads, feature_dim=16):
    """The smallest T at which softmax holds more numbers than this kernel, the name of one: int."""
    # Your code.
