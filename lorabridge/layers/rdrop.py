"""R-Drop (Liang et al. 2021) as MindPet 1.0.4 computes it: two passes of one input, kept close by their divergence."""

from __future__ import annotations

from .binding import FLOATS, Cell, Tensor, nn, ops


class RDropLoss(Cell):
    """Add to the cross entropy of all rows the divergence between the two rows that are one input's.

    ``construct(logits, label_ids, alpha=4)``: ``CE(logits, labels) + alpha / 4 * (KL(p1 | p2) + KL(p2 | p1))``, where
    p1 are the softmax of the even rows of ``logits`` ``[2 n, classes]``, p2 of the odd rows, as :func:`rdrop_repeat`
    lays them, and the KL are sums over all rows. ``label_ids``: class indices, int32, any shape of 2 n elements, or
    probabilities ``[2 n, classes]``, float32 or float16, which MindPet's guide allows and its code flattens.
    Raises TypeError for an ``alpha`` that is no integer or float.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cross_entropy = nn.CrossEntropyLoss()
        self.log_softmax, self.softmax = nn.LogSoftmax(axis=-1), nn.Softmax(axis=-1)
        self.divergence = ops.KLDivLoss(reduction="sum")

    def construct(self, logits: Tensor, label_ids: Tensor, alpha: float = 4) -> Tensor:
        """Return the loss, a scalar."""
        # MindSpore's graphs know no unions of types
        if not isinstance(alpha, (int, float)):
            raise TypeError(f"alpha must be an integer or a float, not {alpha}")
        labels = label_ids if label_ids.dtype in FLOATS else label_ids.reshape((-1,))
        first, second = logits[0::2], logits[1::2]
        apart = self.divergence(self.log_softmax(first), self.softmax(second))
        apart = apart + self.divergence(self.log_softmax(second), self.softmax(first))
        loss: Tensor = self.cross_entropy(logits, labels) + apart / 4 * alpha
        return loss


def rdrop_repeat(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Return every input with each of its rows twice, one after the other: MindPet's function of this name.

    MindPet's own calls ``repeat(2, axis=0)`` as NumPy has it, which MindSpore 2.10's tensors do not take.
    """
    return tuple(ops.repeat_interleave(x, 2, 0) for x in inputs)
