"""Methods that read attention: the published blend of anchors and explorers (`blend`), schedules of our own
(`schedules`), the hard subsets (`anchors`) and rules that read other attention statistics (`rhythm`)."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of(
    "tokencredit.methods.attention.blend",
    "tokencredit.methods.attention.schedules",
    "tokencredit.methods.attention.anchors",
    "tokencredit.methods.attention.rhythm",
    "tokencredit.methods.attention.weights",
)
