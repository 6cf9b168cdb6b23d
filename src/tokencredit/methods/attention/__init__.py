"""Methods that read attention: the published blend of anchors and explorers, reconstructions, and rhythms."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.methods.attention.weights")
