"""Sizes of well-known models, and what a synthetic model of such a size is to be like."""

from dataclasses import dataclass

from turbosparse.errors import ConfigError

__all__ = ["SHAPES", "SYNTHETIC", "Shape", "SyntheticModel", "shape_named"]

SYNTHETIC = "SYNTHETIC"
"""How the names of synthetic models and of their files begin."""
WEIGHT_TYPES = ("Q4_0", "Q8_0", "F16")
HOT_NEURONS = 0.25
"""Share of an FFN's neurons that are called hot. PowerInfer (arXiv 2312.12456) measured that 26 % of the
neurons of OPT-30B have 80 % of the activations."""
_MOST_ACTIVE = 0.46  # share of tokens that need a hot neuron: the predictor's threshold stays positive


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model. All are computed as llama: gated FFN, RMSNorm, rotary embedding, no biases."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False
    num_experts: int = 0
    """Experts per layer, each of `intermediate_size` neurons; 0: one FFN for all tokens."""
    num_experts_per_tok: int = 0


SHAPES = {
    "mistral-7b": Shape(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32000,
    ),
    "mixtral-8x7b": Shape(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32000,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    # What one token of Mixtral-8x7B computes: its two experts as one FFN, without the router.
    "mixtral-8x7b-expert": Shape(
        hidden_size=4096,
        intermediate_size=2 * 14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32000,
    ),
    "qwen2.5-7b": Shape(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=152064,
    ),
    "llama-3.2-3b": Shape(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tied=True,
    ),
    "qwen2.5-1.5b": Shape(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=151936,
        tied=True,
    ),
    "smollm2-1.7b": Shape(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=64,
        vocab_size=49152,
        tied=True,
    ),
    "smollm2-360m": Shape(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        head_dim=64,
        vocab_size=49152,
        tied=True,
    ),
    "smollm2-135m": Shape(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        tied=True,
    ),
}


def shape_named(name: str) -> Shape:
    """Look up a shape.

    Parameters
    ----------
    name : str
        Such as ``"mistral-7b"``.

    Returns
    -------
    Shape
        Its sizes.

    Raises
    ------
    ConfigError
        For an unknown name, with those that there are.
    """
    if name not in SHAPES:
        raise ConfigError(f"[bench --shape] expected one of {', '.join(SHAPES)}, got {name!r}")
    return SHAPES[name]


@dataclass(frozen=True, kw_only=True)
class SyntheticModel:
    """A dReLU model whose weights are random, made so that it has the stated sparsity."""

    name: str
    """What the shape is called."""
    shape: Shape
    weight_type: str = "Q4_0"
    """Q4_0, Q8_0 or F16; of every matrix, the predictor's included."""
    sparsity: float = 0.9
    """Share of FFN neurons whose activation is zero, 0.5 to 0.99."""
    rank: int = 512
    """Width of the predictor, a multiple of 64 up to 2 (D - 64); 0 leaves it out."""
    recall: float = 0.95
    """Share of the active neurons that are candidates, 0.5 to 0.98."""
    precision: float = 0.95
    """Share of the candidates that are active, 0.98 at most; at least 0.2 and 1.2 times the active share."""
    layers: int | None = None
    """At least 1 and at most what the shape has; None for all of them."""
    hot_share: float = HOT_NEURONS
    """Share of all activations that the hot neurons of an FFN have, `HOT_NEURONS` (no skew) to 0.95."""
    bundled: bool = False
    """Made for a memory budget: the rows of a neuron side by side."""

    def __post_init__(self) -> None:
        if self.weight_type not in WEIGHT_TYPES:
            raise ConfigError(
                f"[bench --quant] expected one of {', '.join(WEIGHT_TYPES)}, got {self.weight_type!r}"
            )
        _check("sparsity", self.sparsity, 0.5, 0.99)
        _check("recall", self.recall, 0.5, 0.98)
        _check("precision", self.precision, max(0.2, round(1.2 * (1 - self.sparsity), 4)), 0.98)
        _check("layers", self.num_hidden_layers, 1, self.shape.num_hidden_layers)
        _check("hot-share", self.hot_share, HOT_NEURONS, 0.95)
        hot_active = (1 - self.sparsity) * self.hot_share / HOT_NEURONS
        if self.hot_share > HOT_NEURONS and hot_active > _MOST_ACTIVE:
            raise ConfigError(
                f"[bench --hot-share] expected hot neurons active for at most {_MOST_ACTIVE:.0%} of tokens, "
                f"got {hot_active:.0%}: less of it, or more --sparsity"
            )
        widest = 2 * (self.shape.hidden_size - 64)
        if self.rank % 64 or not 0 <= self.rank <= widest:
            raise ConfigError(
                f"[bench --rank] expected a multiple of 64 from 0 to {widest // 64 * 64} for {self.name}, "
                f"got {self.rank}"
            )

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers that the model has."""
        return self.shape.num_hidden_layers if self.layers is None else self.layers

    def file_stem(self, *, plain: bool) -> str:
        """Name the model's file.

        Parameters
        ----------
        plain : bool
            The SwiGLU model of the same sizes that other engines can read.

        Returns
        -------
        str
            A file name without its suffix; it holds everything that the contents depend on.
        """
        size = f"{SYNTHETIC}-{self.name}-{self.weight_type.lower()}-L{self.num_hidden_layers}"
        if plain:
            return f"{size}-swiglu"
        quality = f"{self.recall * 100:g}-{self.precision * 100:g}"
        hot = f"-hot{self.hot_share * 100:g}" if self.hot_share > HOT_NEURONS else ""
        layout = "-bundled" if self.bundled else ""
        return f"{size}-s{self.sparsity * 100:g}-r{self.rank}-{quality}{hot}{layout}"

    def groups(self) -> list[tuple[int, float]]:
        """Split an FFN by how often its neurons are active.

        Returns
        -------
        list of (int, float)
            Neurons, and their sparsity; the hot ones first, as in a file that `export` has sorted.
        """
        neurons = self.shape.intermediate_size
        if self.hot_share == HOT_NEURONS:
            return [(neurons, self.sparsity)]
        hot = round(neurons * HOT_NEURONS / 32) * 32
        active = (1 - self.sparsity) * neurons
        return [
            (hot, 1 - active * self.hot_share / hot),
            (neurons - hot, 1 - active * (1 - self.hot_share) / (neurons - hot)),
        ]


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"[bench --{name}] expected {low} to {high}, got {value}")
