"""PyTorch operators in Relax, by family; ``translator.Translator`` joins them."""

from __future__ import annotations

from tvmtrain.converters.activations import Activations
from tvmtrain.converters.arithmetic import Arithmetic
from tvmtrain.converters.attention import AttentionAndLosses
from tvmtrain.converters.convolutions import Convolutions
from tvmtrain.converters.indexing import Indexing
from tvmtrain.converters.normalization import Normalization
from tvmtrain.converters.products import Products
from tvmtrain.converters.random import Random
from tvmtrain.converters.sampling import Sampling
from tvmtrain.converters.shapes import Shapes


class Converters(
    Arithmetic, Activations, Normalization, Convolutions, Products, Sampling, Shapes, Indexing, AttentionAndLosses, Random
):
    """All converters of ours; what none of them has is TVM's own importer's."""
