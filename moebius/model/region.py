"""Where the weights of a sublayer are split over processes: the seam of tensor parallelism."""

from torch import Tensor


class Region:
    """What goes into such a sublayer and what comes out of it; here its weights are whole.

    Split weights compute on the same slots (see `Spread.part`) a part of the channels in between.
    """

    def enter(self, x_BSD: Tensor) -> Tensor:
        """Own slots to the slots that all of the weights' parts see; gradients are added up."""
        return x_BSD

    def leave(self, y_BSD: Tensor) -> Tensor:
        """The sum of what all parts made, at the own slots."""
        return y_BSD


WHOLE = Region()
