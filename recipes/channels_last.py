"""Images and volumes stored with the channels innermost."""

from dataclasses import dataclass

from perfkit import Effect, Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class ChannelsLast(Recipe):
    """Store images, volumes and convolution weights with the channels innermost (NHWC, NDHWC).

    Convolution libraries are written for this layout: tensor cores and AMX tiles read it without a transpose.
    Values do not change. It can hurt where a model reshapes between its convolutions, or has few channels.

    Source: https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
    """

    stage = Stage.STRUCTURE
    tolerance = 1e-5  # another layout adds in another order

    def torch(self, work):
        from perfkit.backends.torch_layout import channels_last

        return channels_last(work)

    def jax(self, work):
        return work, Effect(notes=("XLA chooses the layout of every array itself: there is nothing to set",))


RECIPE = ChannelsLast

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("channels_last")
