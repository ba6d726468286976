"""What holds for all tests: one thread each, unless OMP_NUM_THREADS says another number.

On a machine that others use, threads that wait for each other make the tests take more than twice as long; and most
of what they compute is too small to be shared.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch reads it; the programs that tests start inherit it
