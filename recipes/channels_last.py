"""Images stored with the channels innermost."""

from dataclasses import dataclass

from perfkit import Effect, Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class ChannelsLast(Recipe):
    """Store images and convolution weights with the channels innermost (NHWC).

    Convolution libraries are written for this layout: tensor cores and AMX tiles read it without a transpose.
    Values do not change. It can hurt where a model reshapes between its convolutions, or has few channels.

    Source: https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
    """

    stage = Stage.STRUCTURE
    tolerance = 1e-5  # another layout adds in another order

    def torch(self, work):
        import torch

        from perfkit.backends.torch_precision import convolutions
        from perfkit.backends.torch_surgery import around_forward, map_tensors

        touched = convolutions(work.model)
        if not touched:
            return work, Effect(notes=("the model has no convolution over images",))

        def channels_last(tensor):
            return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

        for parameter in work.model.parameters():
            parameter.data = channels_last(parameter.data)

        def wrap(forward):
            def converted(module, *args, **kwargs):
                args, kwargs = map_tensors(channels_last, (args, kwargs))
                return forward(module, *args, **kwargs)

            return converted

        around_forward(work.model, wrap)
        return work, Effect(tuple(touched))

    def jax(self, work):
        return work, Effect(notes=("XLA chooses the layout of every array itself: there is nothing to set",))


RECIPE = ChannelsLast

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("channels_last")
