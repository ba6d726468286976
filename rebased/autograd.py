"""Backward passes written by hand: exact first derivatives, and one clear error for second ones.

Also what surrounds them: contexts without autocast, transformations that cannot look inside, copies off the graph.
"""

from contextlib import nullcontext

import torch

class FirstOrderOnly(torch.autograd.Function):
    """compute(*tensors), as a step of the graph that refuses to be differentiated."""

    @staticmethod
    def forward(ctx, compute, instead, *tensors):
        ctx.instead = instead
        return compute(*tensors)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "a backward pass written by hand has no derivative of its own: for a Hessian, or a penalty on a "
            f"gradient, use {ctx.instead}"
        )


def first_order_only(compute, tensors, instead):
    """compute(*tensors) -> a tuple of gradients: for the backward of a torch.autograd.Function.

    A backward pass that writes into its own tensors is invisible to autograd. Under create_graph=True its results
    would count as constants, and a Hessian would come out wrong without a word. (`once_differentiable` guards only
    where the *incoming* gradient requires grad, and that of o.sum() is a constant.) Here the whole pass is one step
    of the graph, which hangs on every tensor it reads, so whoever differentiates it meets the error above.

    tensors: all that the pass reads, the incoming gradients and ctx.saved_tensors; None may be among them.
    instead: what to use for second derivatives, named in the error.
    """
    return FirstOrderOnly.apply(compute, instead, *tensors)


def refuse_transforms(instead):
    """Raise RuntimeError inside torch.func (vmap, grad, jvp, ...) and torch.jit.trace: they cannot look in here.

    instead: what they can look into, named in the error.
    """
    if torch.jit.is_tracing():
        raise RuntimeError(f"torch.jit.trace cannot record a pass written by hand; trace {instead}")
    if inside_torch_func():
        raise RuntimeError(f"torch.func cannot look into a pass written by hand; give it {instead}")


def inside_torch_func():
    """Whether vmap, grad or another transformation of torch.func is at work: then no number can be looked at."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def without_autocast(device):
    """A context in which nothing is cast. The meta device, which has shapes and no numbers, knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def detached(state):
    """A copy, hanging on no graph, of the tensors in tuples and lists of any depth."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if hasattr(state, "_fields"):  # a named tuple
        return type(state)(*map(detached, state))
    return type(state)(map(detached, state)) if isinstance(state, (tuple, list)) else state
