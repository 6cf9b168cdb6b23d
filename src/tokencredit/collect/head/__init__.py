"""The output head: log-probs and entropies from hidden states, without a tensor over tokens and vocabulary."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.collect.head.logprobs")
