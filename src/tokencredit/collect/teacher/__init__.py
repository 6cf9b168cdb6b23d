"""Teachers: local models, the policy itself with a privileged prompt, and servers."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.collect.teacher.build")
