"""Methods of credit assignment as pure functions of a batch.

One file per idea, each ending with the rows it adds to the tables; the files that read one signal share a folder.
`spec` says what a row holds, `table` puts the rows together, `selection` keeps some tokens and rescales.
"""

from tokencredit.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__, {"table": ("ESTIMATORS", "PRESETS", "TRANSFORMS", "estimators", "presets", "transforms")}
)
