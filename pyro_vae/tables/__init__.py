"""Tables with columns of several kinds and missing entries, from a data frame to a model and back.

A :class:`Table` infers the kind of each column of a pandas or polars frame, or takes the kind that you state, and
encodes the frame as the tensor that :class:`pyro_vae.parts.likelihoods.Columns` takes. It decodes draws to frames with
the names, dtypes, levels, units and index of the first one.
"""

from pyro_vae.tables.kinds import KINDS
from pyro_vae.tables.table import Table

__all__ = ["KINDS", "Table"]
