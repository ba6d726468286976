"""Solution of 3a: 2·T·d_model for softmax, H·P·(Dv + 1) for a kernel, at any T."""

from rebased import kernels  # 01_kernels.py

def state_numbers(mixer, T, d_model, heads, feature_dim=16):
    """The last two inputs; keys and values of all tokens; or S and z."""
    if mixer == "short_conv":
        return 2 * d_model
    if mixer == "attention":
        return 2 * T * d_model
    P = kernels.KERNELS[mixer](feature_dim).num_features
    Dv = d_model // heads
    return heads * P * (Dv + 1)


def crossover(kernel, d_model, heads, feature_dim=16):
    """One token adds 2·d_model numbers to softmax. (ReBased, d_model 64, one head: 70 tokens.)"""
    fixed = state_numbers(kernel, 1, d_model, heads, feature_dim)
    return fixed // (2 * d_model) + 1
