"""Solution of 1b: normalise, then the square. Without a floor, and the share still goes to 1."""

import torch.nn.functional as F

from rebased import kernels  # 01_kernels.py

class SquaredCosineKernel(kernels.Kernel):
    """sim = cos²(q, k) + floor. P = D(D+1)/2 (+ 1 with floor)."""

    def features(self, x):
        """φ(x) = f(x / |x|): (..., D) -> (..., P)."""
        direction = F.normalize(x, dim=-1)  # a vector of zeros stays one
        return self.add_floor(kernels.symmetric_products(direction))


def random_share(T, D):
    """The mean of cos² is 1/D: the others weigh T/D, the right key 1."""
    others = T / D
    return others / (others + 1)
