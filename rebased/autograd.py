"""Backward passes written by hand: exact first derivatives, and one clear error for second ones."""

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
