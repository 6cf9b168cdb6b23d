"""Methods that read the policy's entropy: HAPO (`hapo`), the four quadrants (`quadrants`), other published rules
(`rules`)."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of(
    "tokencredit.methods.entropy.hapo", "tokencredit.methods.entropy.quadrants", "tokencredit.methods.entropy.rules"
)
