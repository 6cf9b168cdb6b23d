"""Methods that read the policy's entropy: HAPO's capacity, the four quadrants, and published rules."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.methods.entropy.rules")
